"""Augmentation touches training tiles and no others; loaders repeat themselves."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from eurosat_mlops.batch import TileLoader, augment_tiles, class_weights, exchange_colours, make_loaders
from eurosat_mlops.core import EurosatError
from eurosat_mlops.synthetic import make_synthetic


@pytest.fixture(scope="module")
def tileset():
    return make_synthetic(per_class=20)


def test_training_tiles_are_augmented_and_validation_tiles_never(tileset):
    dls = make_loaders(tileset, 16, "cpu")
    stored = {t.tobytes() for t in tileset.part("train")[0]}
    for _ in range(3):
        seen = torch.cat([x for x, _ in dls.train])
        assert np.mean([t.numpy().tobytes() in stored for t in seen]) < 0.1
        valid, labels = (torch.cat(v) for v in zip(*dls.valid, strict=True))
        assert (valid.numpy() == tileset.part("val")[0]).all() and (labels.numpy() == tileset.part("val")[1]).all()


def test_without_a_shift_exactly_the_eight_symmetries_come_out():
    tile = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = augment_tiles(tile.expand(500, -1, -1, -1), torch.Generator().manual_seed(1), shift=0)
    square = tile[0].numpy()
    expected = {np.rot90(m, k).tobytes() for m in (square, square.swapaxes(0, 1)) for k in range(4)}
    assert {t.numpy().tobytes() for t in drawn} == expected


def test_a_shift_mirrors_at_the_border_and_invents_no_value():
    ramp = torch.arange(8, dtype=torch.uint8)[None, :, None, None].expand(1, 8, 8, 1)
    drawn = augment_tiles(ramp.expand(200, -1, -1, -1), torch.Generator().manual_seed(0), shift=3)
    for tile in drawn[..., 0].int():
        steps = torch.cat([(tile[1:] - tile[:-1]).abs().flatten(), (tile[:, 1:] - tile[:, :-1]).abs().flatten()])
        assert steps.max() <= 1


def test_labels_stay_with_their_tiles(tileset):
    tiles, labels = tileset.part("train")
    loader = TileLoader(torch.from_numpy(tiles[:]), torch.from_numpy(labels), bs=16, shuffle=True)
    known = {t.tobytes(): y for t, y in zip(*tileset.part("train"), strict=True)}
    for tiles, labels in loader:
        assert all(known[t.numpy().tobytes()] == y for t, y in zip(tiles, labels, strict=True))


def test_one_seed_one_sequence(tileset):
    def epochs(seed):
        loader = make_loaders(tileset, 16, "cpu", seed=seed).train
        return torch.stack([torch.cat([x for x, _ in loader]) for _ in range(2)])

    assert torch.equal(epochs(1), epochs(1)) and not torch.equal(epochs(1), epochs(2))


def test_lengths_say_what_comes(tileset):
    dls = make_loaders(tileset, 16, "cpu")
    assert len(dls.train) == len(list(dls.train)) == len(tileset.parts["train"]) // 16
    assert len(dls.valid) == len(list(dls.valid)) and dls.train.one_batch()[0].shape == (16, 64, 64, 3)
    assert not dls.train.new().augment and len(list(dls.train.new())) == -(-dls.train.n // 16)


@pytest.mark.parametrize("wrong", [{"bs": 10_000}, {"shift": 64}, {"shift": -1}])
def test_impossible_loaders_are_refused(tileset, wrong):
    with pytest.raises(EurosatError, match=next(iter(wrong))):
        make_loaders(tileset, **{"bs": 16, "device": "cpu", **wrong})


def test_a_picture_is_mirrored_left_and_right_only():
    tile = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = augment_tiles(tile.expand(100, -1, -1, -1), torch.Generator().manual_seed(1), 0, "mirror")
    assert {t.numpy().tobytes() for t in drawn} == {tile[0].numpy().tobytes(), tile[0].flip(1).numpy().tobytes()}
    still = augment_tiles(tile.expand(100, -1, -1, -1), torch.Generator().manual_seed(1), 0, "none")
    assert {t.numpy().tobytes() for t in still} == {tile[0].numpy().tobytes()}


@pytest.mark.parametrize("symmetry", ["square", "mirror"])
@pytest.mark.parametrize("sampling", [False, True])
def test_tiles_read_from_the_file_are_the_same_to_the_bit(tileset, symmetry, sampling):
    kept, read = (make_loaders(tileset, 16, "cpu", 2, 5, symmetry, sampling, memory) for memory in (0, 1))
    for part in ("train", "valid"):
        for _ in range(2):
            for one, two in zip(getattr(kept, part), getattr(read, part), strict=True):
                assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_sampling_brings_rare_classes_as_often_as_others():
    labels = torch.tensor([0] * 190 + [1] * 10)
    weights = torch.from_numpy(class_weights(labels.numpy(), 2))[labels]
    loader = TileLoader(torch.zeros(200, 1, 1, 1, dtype=torch.uint8), labels, 20, True, weights=weights)
    drawn = torch.cat([y for _ in range(20) for _, y in loader]).float().mean()
    assert len(loader) == 10 and 0.45 < drawn < 0.55
    assert class_weights(np.array([0, 0, 2]), 3)[1] == 0


LIMITED = """
import resource, sys
from pathlib import Path
import timm
from torch import nn
from eurosat_mlops.core import Settings
from eurosat_mlops.learner import TrainConfig
from eurosat_mlops.models import TileNet
from eurosat_mlops.runs import evaluate, train


@timm.models.register_model
def patches(pretrained=False, num_classes=1000, in_chans=3, **_):  # a network that itself takes next to no memory
    net = TileNet((16, 32), num_classes, in_chans)
    net.stem, net.stages = nn.Sequential(nn.Conv2d(in_chans, 32, 16, stride=16)), nn.ReLU()
    return net


root, how, memory, more = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
settings = Settings(root, data_dir=root / "data", runs_dir=root / how, wandb="off", log_level="ERROR")
same = {"arch": "patches", "epochs": 1, "bs": 32, "ema": 0.0, "wandb": "off", "device": "cpu", "precision": "fp32"}
train(TrainConfig(data="synthetic", size=16, **same), settings=settings)  # what any run needs is loaded now
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
limit = used + more * 1_000_000
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
run = train(TrainConfig(data="own", size=128, memory=memory, **same), settings=settings)
print(evaluate(run.folder, settings=settings).metrics["training"]["tiles_in"], len(run.tileset.names))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is a limit of Linux")
def test_a_set_larger_than_the_memory_is_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    for row in range(7000):  # 344 MB of tiles, 275 MB of them for training and validation
        home = tmp_path / "own" / "abcd"[row % 4]
        home.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 128), Image.Resampling.NEAREST).save(home / f"{row}.png", compress_level=1)
    told = {}
    for how, memory in (("streamed", 100), ("kept", 1000)):
        command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(tmp_path), how, str(memory), "340"]
        told[how] = subprocess.run(command, capture_output=True, text=True)
    assert told["streamed"].stdout.split() == ["file", "7000"], told["streamed"].stderr
    assert told["kept"].returncode and "llocat" in told["kept"].stderr  # "Unable to allocate", "can't allocate"


def test_borrowed_light_is_the_same_however_many_share_the_batch(tileset):
    dls = make_loaders(tileset, 16, "cpu", seed=3, colours=1.0)
    whole = list(dls.train)
    parts = []
    for rank in range(2):
        loader = make_loaders(tileset, 16, "cpu", seed=3, colours=1.0).train
        loader.share = (rank, 2)
        parts.append(list(loader))
    for (tiles, labels), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([part[0] for part in shares]), tiles)
        assert torch.equal(torch.cat([part[1] for part in shares]), labels)


def test_borrowed_light_changes_means_and_contrasts_alone():
    tiles = torch.randint(60, 190, (32, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tiles[16:] = tiles[16:] // 3
    lent = exchange_colours(tiles, torch.Generator().manual_seed(1))
    changed = [i for i in range(32) if not torch.equal(tiles[i], lent[i])]
    assert 8 <= len(changed) <= 24
    for i in changed:
        for old, new in zip(tiles[i].reshape(-1, 3).T, lent[i].reshape(-1, 3).T, strict=True):
            assert torch.corrcoef(torch.stack([old.float(), new.float()]))[0, 1] > 0.99
