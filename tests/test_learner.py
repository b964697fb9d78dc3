"""The parameters and the trainer."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from eurosat_mlops.core import EurosatError
from eurosat_mlops.learner import (
    TrainConfig,
    config_from,
    config_from_notebook,
    growing_sizes,
    make_learner,
    resolve,
    split_decay,
)
from eurosat_mlops.synthetic import make_synthetic
from eurosat_mlops.training import fit, predict_logits

QUICK = {"epochs": 2, "bs": 32, "ema": 0.9, "device": "cpu"}


@pytest.fixture(scope="module")
def tileset():
    return make_synthetic(per_class=20)


def test_the_parameters_cell_agrees_with_the_dataclass(project):
    notebook = json.loads((project / "nbs" / "train.ipynb").read_text())
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    found: dict = {}
    exec("".join(cell["source"]), found)  # plain literals
    assert {k: v for k, v in found.items() if k != "__builtins__"} == {f.name: f.default for f in fields(TrainConfig)}


@pytest.mark.parametrize(
    "given, words",
    [
        ({"lr": "fast"}, "'fast'.*above 0"),
        ({"lr": 0}, "above 0"),
        ({"lr": float("inf")}, "inf"),
        ({"epochs": 0}, "1 to 10000"),
        ({"epochs": 2.5}, "whole number"),
        ({"epochs": True}, "True"),
        ({"learning_rate": 1e-3}, "no such parameter.*lr"),
        ({"split": "honest"}, "random or spatial"),
        ({"arch": "resnet81"}, "resnet18"),
        ({"wandb": False}, "online"),
        ({"data": ""}, "data"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_with_what_is_allowed(given, words):
    with pytest.raises(EurosatError, match=words) as caught:
        config_from(given)
    assert next(iter(given)) in str(caught.value)


def test_a_whole_number_serves_as_a_float():
    assert isinstance(TrainConfig(wd=0).wd, float)


def test_only_parameters_may_appear_in_a_notebook():
    assert config_from_notebook({"np": np, "lr": 0.5, "before": set(), "_i1": ""}, before={"np"}).lr == 0.5
    with pytest.raises(EurosatError, match="learning_rate"):
        config_from_notebook({"np": np, "learning_rate": 0.5}, before={"np"})
    # a second Run All in one kernel: the names are there already, and still count
    assert config_from_notebook({"lr": 0.5}, before={"lr"}).lr == 0.5


def test_a_device_that_is_not_there_is_refused():
    if not torch.cuda.is_available():
        with pytest.raises(EurosatError, match="only cpu"):
            resolve(TrainConfig(device="cuda"))
    assert resolve(TrainConfig(device="cpu")).precision in ("bf16", "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_config_and_seed_give_one_result(tileset, precision):
    config = TrainConfig(**QUICK, precision=precision, seed=3)
    results = []
    for _ in range(2):
        learner = make_learner(config, tileset)
        results.append((fit(learner, config), predict_logits(learner.model, tileset.part("val")[0])))
    assert results[0][0] == results[1][0] and (results[0][1] == results[1][1]).all()
    other = make_learner(TrainConfig(**QUICK, precision=precision, seed=4), tileset)
    assert fit(other, config) != results[0][0]


class Modes(Callback):
    "What mode the network is in whenever it is asked."

    def before_fit(self):
        self.seen = set()

    def after_pred(self):
        batch_norm = next(m for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        self.seen.add((bool(self.training), batch_norm.training))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_network_is_in_evaluation_mode_whenever_it_predicts(tileset, ema):
    config = TrainConfig(**{**QUICK, "ema": ema})
    learner = make_learner(config, tileset)
    modes = Modes()
    fit(learner, config, cbs=[modes])
    assert modes.seen == {(True, True), (False, False)}
    assert not learner.model.training
    before = {n: v.clone() for n, v in learner.model.state_dict().items()}
    learner.model.train()
    tiles = tileset.part("val")[0]
    alone, together = predict_logits(learner.model, tiles, bs=1), predict_logits(learner.model, tiles)
    assert learner.model.training and np.allclose(
        alone, together, atol=0.1
    )  # no batch statistics: company is no matter
    assert all(torch.equal(v, before[n]) for n, v in learner.model.state_dict().items())


def test_fastai_predicts_the_same(tileset):
    config = TrainConfig(**QUICK, precision="fp32")
    learner = make_learner(config, tileset)
    fit(learner, config)
    p, y = learner.get_preds(act=lambda x: x)
    assert (y.numpy() == tileset.part("val")[1]).all()
    assert learner.validate()[-1] == pytest.approx((p.argmax(1) == y).float().mean().item())
    assert np.allclose(p.numpy(), predict_logits(learner.model, tileset.part("val")[0]), atol=1e-4)


def test_the_best_epoch_is_kept(tileset):
    config = TrainConfig(**{**QUICK, "epochs": 4, "lr": 0.02}, precision="fp32")
    learner = make_learner(config, tileset)
    history = fit(learner, config)
    logits = predict_logits(learner.model, tileset.part("val")[0])
    kept = (logits.argmax(1) == tileset.part("val")[1]).mean()
    assert kept == pytest.approx(max(h["accuracy"] for h in history))


def test_a_short_run_is_not_judged_by_its_random_beginning(tileset):
    config = TrainConfig(**{**QUICK, "epochs": 4, "bs": 8, "ema": 0.99}, precision="fp32")
    averaged = fit(make_learner(config, tileset), config)
    assert max(h["accuracy"] for h in averaged) > 0.3  # chance is 0.1; a fixed decay gave 0.125


def test_patience_ends_a_run_that_gains_nothing(tileset):
    config = TrainConfig(**{**QUICK, "epochs": 30, "lr": 1e-7}, patience=2)
    history = fit(make_learner(config, tileset), config)
    assert len(history) < 30 and len(history) >= 3


def test_a_loss_that_diverges_stops_with_a_reason(tileset):
    config = TrainConfig(**{**QUICK, "epochs": 4, "ema": 0.0, "lr": 10.0, "wd": 10.0}, precision="fp32")
    learner = make_learner(config, tileset)
    with torch.no_grad():
        learner.model.trunk.head.bias.fill_(float("nan"))
    with pytest.raises(EurosatError, match="lower rate"):
        fit(learner, config)


def test_norms_and_biases_do_not_decay(tileset):
    learner = make_learner(TrainConfig(**QUICK), tileset)
    inner, last, stays = split_decay(learner.model)
    assert all(p.ndim > 1 for p in inner + last) and all(p.ndim <= 1 for p in stays)
    assert [p.shape[0] for p in last] == [10]
    assert sum(p.numel() for p in inner + last + stays) == sum(p.numel() for p in learner.model.parameters())
    config = TrainConfig(**QUICK, wd=0.3)
    fit(learner, config)
    assert [g["weight_decay"] for g in learner.opt.opt.param_groups] == [0.3, 0.3, 0.0]


def test_every_batch_and_epoch_is_reported(tileset):
    seen: list[tuple[dict, int]] = []
    config = TrainConfig(**{**QUICK, "bs": 2, "epochs": 1})
    fit(make_learner(config, tileset), config, lambda values, step: seen.append((values, step)))
    names = {name for values, _ in seen for name in values}
    assert {"batch/loss", "batch/lr", "epoch/accuracy", "epoch/valid_loss"} <= names
    assert [step for _, step in seen] == sorted(step for _, step in seen)


def test_a_timm_network_from_real_imagenet_weights_learns(project, tileset):
    path = project.parent / "shared" / "data" / "weights" / "mobilenetv2_035_imagenet_timm.pth"
    if not Path(path).exists():
        pytest.skip("the ImageNet weights of MobileNetV2 are not here")
    config = TrainConfig(**{**QUICK, "lr": 2e-3}, arch="mobilenetv2_035", weights=str(path))
    history = fit(make_learner(config, tileset), config)
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_muon_turns_the_inner_matrices_and_leaves_the_rest_to_adamw(tileset):
    config = TrainConfig(**QUICK, optimizer="muon", colours=1.0)
    learner = make_learner(config, tileset)
    before = [p.detach().clone() for p in learner.model.parameters()]
    fit(learner, config)
    assert not any(torch.equal(old, p) for old, p in zip(before, learner.model.parameters(), strict=True))
    inner, last, stays = split_decay(learner.model)
    by_muon = {id(p) for p, state in learner.opt.opt.state.items() if state["use_muon"]}
    assert by_muon == {id(p) for p in inner} and not by_muon & {id(p) for p in last + stays}


def test_tiles_grow_while_the_network_trains_and_are_whole_when_it_is_judged(tileset):
    class Note(Callback):
        def after_pred(self) -> None:
            seen.append((self.training, self.learn.model.side))

    for ema in (0.0, 0.9):
        seen: list[tuple[bool, int]] = []
        config = TrainConfig(**{**QUICK, "epochs": 3, "ema": ema, "start_size": 16}, precision="fp32")
        learner = make_learner(config, tileset)
        fit(learner, config, cbs=[Note()])
        side = tileset.tiles.shape[1]
        trained = [size for training, size in seen if training]
        assert list(dict.fromkeys(trained)) == growing_sizes(16, side) and trained == sorted(trained)
        assert {size for training, size in seen if not training} <= {0, side} and learner.model.side == side


@pytest.mark.parametrize(("given", "words"), [({"start_size": 64}, "start_size"), ({"input_size": 32}, "input_size")])
def test_a_network_neither_shrinks_nor_sees_less_than_the_tile(tileset, given, words):
    with pytest.raises(EurosatError, match=words):
        make_learner(TrainConfig(**{**QUICK, **given}), make_synthetic(per_class=5, size=64))
