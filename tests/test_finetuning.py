"""Learning from weights that others trained, and from few labels: what moves, how fast, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from fastai.callback.core import Callback
from safetensors.torch import save_file
from torch import nn

from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.core import EurosatError, Settings, read_json
from eurosat_mlops.datasets import few_labels, load_tiles
from eurosat_mlops.learner import TrainConfig, config_from, group_hypers, layer_groups, make_learner, settle
from eurosat_mlops.models import build_model, layer_rates, native_size
from eurosat_mlops.runs import load_classifier, train
from eurosat_mlops.synthetic import make_synthetic
from eurosat_mlops.training import Checkpoints, fit

STATISTICS = ((90.0, 95.0, 100.0), (50.0, 35.0, 30.0))
QUICK = {"epochs": 2, "bs": 32, "ema": 0.9, "device": "cpu", "precision": "fp32"}
EXPERIMENTS = ("resnet50", "efficientnet_b0", "convnext_tiny", "vit_small", "mobilenetv2")


@pytest.fixture(scope="module")
def tileset():
    return make_synthetic(per_class=20, size=32)


def settings_of(root: Path) -> Settings:
    return Settings(root, runs_dir=root / "runs", data_dir=root / "data", wandb="off", log_level="ERROR")


def write_folder(folder: Path, arch: str = "mobilenetv2_035", safe: bool = True, **changed) -> Path:
    "A folder of random weights, as timm lays one out."
    folder.mkdir(exist_ok=True)
    args = {"pad_type": "same", "bn_eps": 1e-3} if arch.startswith("mobilenet") else {}
    seen = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 48, 48], "classifier": "classifier"}
    about = {"architecture": arch, "num_classes": 5, "model_args": args, "pretrained_cfg": seen}
    (folder / "config.json").write_text(json.dumps(about | changed))
    torch.manual_seed(7)
    stored = timm.create_model(arch, num_classes=5, **args).state_dict()
    if safe:
        save_file(stored, folder / "model.safetensors")
    else:
        torch.save(stored, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_says_how_its_weights_were_trained(tmp_path, tileset, safe):
    folder = str(write_folder(tmp_path / "weights", safe=safe))
    model = build_model("mobilenetv2_035", 10, *STATISTICS, weights=folder)
    assert model.mean.unique().tolist() == [127.5] and model.std.unique().tolist() == [63.75]
    assert model.trunk.bn1.eps == 1e-3 and "Same" in type(model.trunk.conv_stem).__name__
    torch.manual_seed(7)
    stored = timm.create_model("mobilenetv2_035", num_classes=5, pad_type="same", bn_eps=1e-3)
    assert torch.equal(stored.conv_stem.weight, model.trunk.conv_stem.weight)
    assert model.trunk.classifier.out_features == 10
    given = {"arch": "mobilenetv2_035", "weights": folder}
    assert native_size(**given) == 48 and settle(TrainConfig(**given), tileset).input_size == 48
    assert settle(TrainConfig(**given, input_size=40), tileset).input_size == 40
    assert settle(TrainConfig(), tileset).input_size == 0


def test_pretrained_weights_set_the_size_unless_one_is_given(tileset):
    given = {"arch": "resnet50.a1_in1k", "weights": "pretrained"}
    assert settle(TrainConfig(**given), tileset).input_size == 224
    assert settle(TrainConfig(**given, input_size=96), tileset).input_size == 96
    assert settle(TrainConfig(arch="resnet50"), tileset).input_size == 0


def harmed(folder: Path, harm: str) -> Path:
    path, weights = folder / "config.json", folder / "model.safetensors"
    about = json.loads(path.read_text())
    if harm == "no config":
        path.unlink()
    elif harm == "no weights":
        weights.unlink()
    elif harm == "cut config":
        path.write_text(path.read_text()[:40])
    elif harm == "no architecture":
        path.write_text(json.dumps({name: value for name, value in about.items() if name != "architecture"}))
    elif harm == "strange mean":
        path.write_text(json.dumps(about | {"pretrained_cfg": {"mean": ["grey"] * 3}}))
    elif harm == "strange argument":
        path.write_text(json.dumps(about | {"model_args": {"padding_of_another_kind": 1}}))
    elif harm == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif harm == "half the weights":
        save_file(dict(list(timm.create_model("mobilenetv2_035").state_dict().items())[:50]), weights)
    elif harm == "code":
        weights.unlink()
        torch.save({"run": Path}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("no config", "no config.json in weights; expected config.json beside model.safetensors"),
        ("no weights", "could not be made: No suitable checkpoints"),
        ("cut config", "config.json in weights is damaged"),
        ("no architecture", "damaged"),
        ("strange mean", "damaged.*grey"),
        ("strange argument", "could not be made.*padding_of_another_kind"),
        ("cut weights", "could not be made"),
        ("half the weights", "do not fit its config.json"),
        ("code", "could not be made: weights_only=True blocked"),
        ("", "use arch=mobilenetv2_035"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, harm, words):
    folder = harmed(write_folder(tmp_path / "weights"), harm)
    with pytest.raises(EurosatError, match=words):
        build_model("mobilenetv2_035" if harm else "resnet18", 10, *STATISTICS, weights=str(folder))


def test_real_imagenet_weights_tell_real_tiles_apart_better_than_random_ones(project, eurosat_settings, tmp_path):
    path = project.parent / "shared" / "data" / "weights" / "mobilenetv2_035_imagenet_timm.pth"
    if not path.exists():
        pytest.skip("the ImageNet weights of MobileNetV2 are not here")
    (tmp_path / "config.json").write_text((project / "nbs" / "experiments" / "mobilenetv2_035.json").read_text())
    (tmp_path / "pytorch_model.bin").symlink_to(path)
    tileset = load_tiles("eurosat", "random", eurosat_settings)
    known, asked = (few_labels(tileset, 20, seed) for seed in (0, 1))
    rows = np.setdiff1d(asked.parts["train"], known.parts["train"])
    right = {}
    for weights in ("none", str(tmp_path)):
        torch.manual_seed(0)
        model = build_model("mobilenetv2_035", 10, *STATISTICS, weights=weights, side=96).eval()
        with torch.inference_mode():
            x, y = (
                nn.functional.normalize(
                    torch.cat([model.embed(t) for t in torch.from_numpy(tileset.tiles[r]).split(50)])
                )
                for r in (known.parts["train"], rows)
            )
        nearest = tileset.labels[known.parts["train"]][(y @ x.T).argmax(1).numpy()]
        right[weights] = (nearest == tileset.labels[rows]).mean()
    assert right[str(tmp_path)] > right["none"] + 0.1 and right[str(tmp_path)] > 0.6, right


class Trunk(Callback):
    "The trunk's weights and statistics after each epoch."

    order = 65  # before the best weights are put back

    def before_fit(self):
        self.seen = [self._state()]

    def _state(self):
        return {n: v.detach().clone() for n, v in self.learn.model.trunk.state_dict().items()}

    def after_epoch(self):
        self.seen.append(self._state())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_trunk_stands_still_and_then_moves(tileset, optimizer):
    config = TrainConfig(**QUICK | {"epochs": 3}, optimizer=optimizer, freeze=2)
    learner, trunk = make_learner(config, tileset), Trunk()
    history = fit(learner, config, cbs=[trunk])
    start, first, second, third = trunk.seen
    inner = [name for name in start if not name.startswith("head")]
    assert all(torch.equal(start[name], second[name]) for name in inner), "batch-norm statistics stand still too"
    assert not torch.equal(start["head.weight"], first["head.weight"])
    assert not any(torch.equal(second[name], third[name]) for name in inner)
    assert len(history) == 3 and all(p.requires_grad for p in learner.model.parameters())


@pytest.mark.parametrize("arch", ["tilenet_s", "resnet10t", "mobilenetv2_035", "vit_tiny_patch16_224"])
def test_lower_layers_learn_more_slowly(arch):
    model = build_model(arch, 10, *STATISTICS, size=32)
    shares = layer_rates(model, 0.5)
    last = {id(p) for p in model.trunk.get_classifier().parameters()}
    first = next(p for p in model.trunk.parameters() if p.ndim == 4)
    assert all(shares[i] == 1 for i in last) and all(
        shares[id(p)] < 1 for p in model.trunk.parameters() if id(p) not in last
    )
    assert shares[id(first)] == min(shares.values()) <= 0.125
    groups, rates = layer_groups(model, 0.5)
    assert {id(p) for group in groups for p in group} == {id(p) for p in model.parameters()}
    assert sum(len(group) for group in groups) == len(list(model.parameters()))
    assert all(shares[id(p)] == rate for group, rate in zip(groups, rates, strict=True) for p in group)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_rates_reach_the_optimizer_and_the_schedule(tileset, optimizer):
    config = TrainConfig(**QUICK, optimizer=optimizer, layer_decay=0.5, lr=0.01, wd=0.2)
    learner = make_learner(config, tileset)
    fit(learner, config)
    rates, decay = group_hypers(learner.model, config)
    groups = learner.opt.opt.param_groups
    assert [g["lr"] / groups[-1]["lr"] for g in groups] == pytest.approx([rate / 0.01 for rate in rates])
    assert [g["weight_decay"] for g in groups] == decay and set(decay) == {0.0, 0.2} and rates[-1] == 0.01
    if optimizer == "muon":
        turned = {id(p) for g in groups if not g.get("use_fallback") for p in g["params"]}
        trunk = learner.model.trunk
        assert turned == {id(p) for n, p in trunk.named_parameters() if p.ndim > 1 and not n.startswith("head")}


@pytest.mark.parametrize("given", [{}, {"optimizer": "muon"}, {"labels": 3}, {"labels": 3, "balance": "sampling"}])
def test_a_run_that_was_cut_off_while_frozen_or_after_goes_on_to_the_same_bits(tmp_path, tileset, given):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.epoch == self.at and self.iter == 1:
                raise KeyboardInterrupt

    config = TrainConfig(**QUICK | {"epochs": 4, "bs": 16}, freeze=2, layer_decay=0.7, **given)
    whole = make_learner(config, tileset)
    history = fit(whole, config)
    for epoch in (1, 2, 3):
        stop = Stop()
        stop.at = epoch
        with pytest.raises(KeyboardInterrupt):
            fit(make_learner(config, tileset), config, cbs=[Checkpoints(tmp_path, tileset.digest, 1e-9), stop])
    last = make_learner(config, tileset)
    assert fit(last, config, cbs=[Checkpoints(tmp_path, tileset.digest, 1e-9)]) == history
    states = [learner.model.state_dict() for learner in (whole, last)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_processes_freeze_and_thaw_as_one_does(tmp_path):
    given = {"data": "synthetic", "size": 16, "epochs": 2, "bs": 200, "ema": 0.0, "device": "cpu", "precision": "fp32"}
    config = TrainConfig(**given, wandb="off", freeze=1, layer_decay=0.5, labels=0.5)
    alone = train(config, settings=settings_of(tmp_path / "one"))
    together = train(TrainConfig(**alone.config.__dict__ | {"processes": 2}), settings=settings_of(tmp_path / "two"))
    for one, two in zip(alone.history, together.history, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)


def test_few_labels_are_drawn_by_class_and_seed(tileset):
    five, three = (few_labels(tileset, n, 0).parts["train"] for n in (5, 3))
    assert np.bincount(tileset.labels[five]).tolist() == [5] * 10 and set(three) < set(five)
    assert (few_labels(tileset, 5, 0).parts["train"] == five).all()
    assert (few_labels(tileset, 5, 1).parts["train"] != five).any()
    assert np.bincount(tileset.labels[few_labels(tileset, 0.01, 0).parts["train"]]).tolist() == [1] * 10
    assert (
        few_labels(tileset, 0, 0) is tileset and (few_labels(tileset, 5, 0).parts["val"] == tileset.parts["val"]).all()
    )
    with pytest.raises(EurosatError, match="labels: got 50, but AnnualCrop has 12 training tiles"):
        few_labels(tileset, 50, 0)


def test_an_epoch_of_few_labels_is_as_long_and_shows_no_other_tile(tileset):
    config = TrainConfig(**QUICK, labels=2)
    learner, whole = make_learner(config, tileset), make_learner(TrainConfig(**QUICK), tileset)
    loader = learner.dls.train
    assert len(loader) == len(whole.dls.train) and len(loader.tiles) == 20 and len(learner.dls.valid.tiles) == 40
    labels = torch.cat([y for _, y in loader])
    assert np.bincount(labels.numpy()).min() >= len(labels) // 20, "each of them again and again"


def test_few_labels_choose_no_epoch(tileset):
    config = TrainConfig(**QUICK | {"epochs": 4, "ema": 0.0, "lr": 0.3}, labels=2)
    learner, trunk = make_learner(config, tileset), Trunk()
    history = fit(learner, config, cbs=[trunk])
    assert all(torch.equal(trunk.seen[-1][n], v) for n, v in learner.model.trunk.state_dict().items())
    assert len(history) == 4
    with pytest.raises(EurosatError, match="patience"):
        make_learner(TrainConfig(**QUICK, labels=2, patience=1), tileset)


def test_a_run_says_which_labels_it_had_and_comes_back_from_its_bundle(tmp_path):
    folder = write_folder(tmp_path / "weights")
    config = TrainConfig(
        **QUICK | {"epochs": 1},
        data="synthetic",
        size=32,
        arch="mobilenetv2_035",
        weights=str(folder),
        labels=4,
        wandb="off",
    )
    run = train(config, settings=settings_of(tmp_path))
    names = (run.folder / "labels.txt").read_text().split()
    used = few_labels(run.tileset, 4, 0)
    assert names == [used.names[row] for row in used.parts["train"]] and len(names) == 40
    assert run.metrics["data"]["tiles"]["train"] == 40 and read_json(run.folder / "config.json")["input_size"] == 48
    bundle = read_bundle(run.folder / "bundle")
    assert bundle.info["config"]["weights"] == "weights", "a bundle carries no path"
    again, tiles = load_classifier(bundle), torch.from_numpy(run.tileset.tiles[:4])
    with torch.inference_mode():
        assert torch.equal(again(tiles), run.learner.model(tiles))


@pytest.mark.parametrize("value", [-1, 2.5, 1.5])
def test_labels_are_a_share_or_a_whole_number(value):
    with pytest.raises(EurosatError, match="labels: got"):
        TrainConfig(labels=value)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_experiments_build_and_learn_at_their_size(project, name):
    given = yaml.safe_load((project / "nbs" / "experiments" / f"{name}.yaml").read_text())
    config = config_from(given)
    known = timm.get_pretrained_cfg(config.arch)
    assert known.has_weights and config.weights == "pretrained" and config.input_size <= max(known.input_size)
    model = build_model(config.arch, 10, *STATISTICS, size=64, side=config.input_size)
    _, shares = layer_groups(model, config.layer_decay)
    assert min(shares) < 0.5 < max(shares) == 1
    tiles = make_synthetic(per_class=3).tiles[:2]
    nn.functional.cross_entropy(model(torch.from_numpy(tiles)), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
