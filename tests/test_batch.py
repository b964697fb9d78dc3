"""Augmentation touches training tiles and no others; loaders repeat themselves."""

import numpy as np
import pytest
import torch

from eurosat_mlops.batch import TileLoader, augment_tiles, make_loaders
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
    loader = TileLoader(*map(torch.from_numpy, tileset.part("train")), bs=16, shuffle=True)
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
