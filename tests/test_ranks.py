"""Several processes train as one: same order, same draws, same statistics, same result; none is missed in silence."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import distributed, nn

from eurosat_mlops.batch import make_loaders
from eurosat_mlops.core import EurosatError, Settings, read_status
from eurosat_mlops.data import TileRows
from eurosat_mlops.learner import TrainConfig, make_learner, resolve
from eurosat_mlops.ranks import SharedStatistics
from eurosat_mlops.runs import train
from eurosat_mlops.synthetic import make_synthetic
from eurosat_mlops.training import CHECKPOINT, fit

# The recipe, batch norm and all, in 64 bit, where rounding is too small to be trained into a difference.
EXACT = """
import os, sys, torch
from torch import nn
from fastai.learner import AvgSmoothLoss
from eurosat_mlops.learner import TrainConfig, make_learner
from eurosat_mlops.synthetic import make_synthetic
from eurosat_mlops.training import fit

class Exact(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk.double()

    def forward(self, tiles):
        return self.trunk(tiles.permute(0, 3, 1, 2).double() / 255 - 0.3)

class Smooth(AvgSmoothLoss):
    def reset(self):
        self.count, self.val = 0, torch.zeros((), dtype=torch.float64)

def exact(out):
    tileset = make_synthetic(per_class=17, size=32)  # 102 tiles to train on, 34 to validate with: shares are uneven
    config = TrainConfig(epochs=4, bs=16, ema=0.9, device="cpu", balance="sampling", precision="fp32")
    learner = make_learner(config, tileset)
    learner.model, learner.recorder.smooth_loss = Exact(learner.model.trunk), Smooth(0.98)
    history = fit(learner, config)
    torch.save((learner.model.state_dict(), history), out)

if __name__ == "__main__":
    exact(sys.argv[1] + os.environ.get("RANK", ""))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, torch.Tensor], list[dict[str, float]]]]:
    "Weights and history of: one process, and the two that torchrun has started."
    root = tmp_path_factory.mktemp("ranks")
    (root / "exact.py").write_text(EXACT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "exact.py", "rank"]
    done = subprocess.run(torchrun, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    space: dict = {"__name__": "exact"}
    exec(EXACT, space)
    space["exact"](root / "alone")
    return [torch.load(root / name, weights_only=True) for name in ("alone", "rank0", "rank1")]


def test_both_ranks_end_with_the_same_bits(ranks):
    _, (first, history), (second, other) = ranks
    assert all(torch.equal(first[name], second[name]) for name in first) and history == other


def test_two_processes_give_the_result_of_one(ranks):
    (alone, history), (shared, told), _ = ranks
    for name, weights in alone.items():
        assert torch.allclose(weights.double(), shared[name].double(), rtol=1e-8, atol=1e-8), name
    for one, two in zip(history, told, strict=True):
        assert two == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("memory", [0, 1])
def test_shares_make_the_batch_and_no_more_is_read(memory):
    tileset = make_synthetic(per_class=17)
    whole, first, second = (make_loaders(tileset, 16, "cpu", 2, 5, sampling=True, memory=memory) for _ in range(3))
    asked: list[int] = []

    class Counted(TileRows):
        def __getitem__(self, index):
            asked.append(len(index))
            return super().__getitem__(index)

    for rank, dls in enumerate((first, second)):
        for loader in dls.loaders:
            loader.share = (rank, 2)
            if memory:
                loader.tiles = Counted(loader.tiles.tiles, loader.tiles.rows)
    for part in ("train", "valid"):
        for _ in range(2):
            batches = zip(getattr(whole, part), getattr(first, part), getattr(second, part), strict=True)
            for one, *shares in batches:
                for values, *parts in zip(one, *shares, strict=True):
                    assert torch.equal(values, torch.cat(parts)) and abs(len(parts[0]) - len(parts[1])) <= 1
    assert sum(asked) == (2 * (len(whole.train) * 16 + whole.valid.n) if memory else 0)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(4), nn.BatchNorm1d(4, affine=False), BatchNormAct2d(4), nn.BatchNorm2d(4, momentum=None)]
)
def test_shared_statistics_of_one_process_are_batch_norm(layer):
    x = torch.randn(6, 4, *([5, 5] if "2d" in type(layer).__name__ else []), dtype=torch.float64)
    layer, found = layer.double(), []
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for shared in (False, True):
            own = type(layer)(4, affine=layer.affine, momentum=layer.momentum).double()
            given = x.clone().requires_grad_()
            if shared:
                with SharedStatistics():
                    out = own(given)
            else:
                out = own(given)
            (out**3).sum().backward()
            found.append([out, given.grad, own.running_mean, own.running_var, own.eval()(x)])
    finally:
        distributed.destroy_process_group()
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*found, strict=True))


def test_shares_must_be_equal_and_the_number_that_of_torchrun(monkeypatch):
    with pytest.raises(EurosatError, match="bs: got 65 for 2 processes; use a multiple of 2"):
        resolve(TrainConfig(bs=65, processes=2, device="cpu"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolve(TrainConfig(device="cpu")).processes == 4
    with pytest.raises(EurosatError, match="processes: got 2, but 4 were started"):
        resolve(TrainConfig(processes=2, device="cpu"))


SHARED = {"data": "synthetic", "size": 16, "bs": 64, "ema": 0.9, "wandb": "off", "device": "cpu", "processes": 2}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, runs_dir=tmp_path / "runs", data_dir=tmp_path / "data", wandb="off", log_level="ERROR")


def test_a_run_starts_the_others_and_keeps_all_itself(settings):
    before = dict(os.environ), torch.get_num_threads()
    run = train(TrainConfig(epochs=3, **SHARED), settings=settings)
    assert (dict(os.environ), torch.get_num_threads()) == before and not distributed.is_initialized()
    assert [p.name for p in settings.runs_dir.iterdir() if p.name != "latest"] == [run.folder.name]
    assert read_status(run.folder)["state"] == "finished" and not multiprocessing.active_children()
    assert run.metrics["training"]["machine"].endswith("2 processes") and run.learner.dls.train.share == (0, 1)
    alone = make_learner(run.config, run.tileset)
    history = fit(alone, run.config)
    assert run.history[0]["train_loss"] == pytest.approx(history[0]["train_loss"], rel=0.1)
    assert (
        run.history[-1]["accuracy"] == pytest.approx(history[-1]["accuracy"], abs=0.15)
        and history[-1]["accuracy"] > 0.4
    )


def test_a_process_that_dies_ends_the_run_and_is_named(settings):
    def kill() -> None:
        while not list(settings.runs_dir.glob(f"*/{CHECKPOINT}")):
            time.sleep(0.05)
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(EurosatError, match=r"process 1 of the run is gone \(terminated with signal SIGKILL\)"):
        train(TrainConfig(epochs=2000, checkpoint=1e-6, **SHARED), settings=settings)
    assert time.monotonic() - began < 120
    (run,) = (p for p in settings.runs_dir.iterdir())
    assert read_status(run)["state"] == "failed" and "SIGKILL" in read_status(run)["reason"]
    assert (run / CHECKPOINT).exists() and not multiprocessing.active_children()


def test_processes_that_see_other_tiles_are_refused(settings):
    other = make_synthetic(per_class=300, size=16, seed=9)  # not what `data` names
    with pytest.raises(EurosatError, match="other tiles"):
        train(TrainConfig(epochs=1, **SHARED), other, settings)


def test_torchrun_starts_the_command_line(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "eurosat_mlops.cli"]
    done = subprocess.run([*command, "train", "--bs", "65"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode and re.search("use a multiple of 2", done.stderr), done.stderr[-2000:]
