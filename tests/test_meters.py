"""Profiles and energy: what a profile must hold, and that a meter never costs a run."""

import importlib.util
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.utils.data import TensorDataset

from eurosat_mlops.core import EurosatError, log_to, read_json
from eurosat_mlops.meters import measure_energy, profile_callbacks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class SlowTiles(TensorDataset):
    "Tiles that take 6 ms each to read."

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        time.sleep(0.006)
        return super().__getitem__(index)


class SlowLayer(nn.Module):
    "A layer that takes 30 ms forward."

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        return x


def fitted(
    kind: str, run: Path, tiles: int = 96, epochs: int = 2, data: type = TensorDataset, *first: nn.Module
) -> None:
    "Fit a tiny network for `epochs`, with the profile that `kind` names."
    torch.manual_seed(0)
    part = data(torch.rand(tiles, 3, 16, 16), torch.randint(0, 4, (tiles,)))
    loaders = DataLoaders.from_dsets(part, part, bs=16, device=DEVICE, num_workers=0)
    net = nn.Sequential(*first, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learner = Learner(loaders, net, nn.CrossEntropyLoss(), cbs=profile_callbacks(kind, run))
    learner.logger = lambda values: None
    learner.fit(epochs)


def test_none_adds_nothing(tmp_path: Path) -> None:
    assert profile_callbacks("none", tmp_path) == []


def test_an_unknown_profile_or_energy_mode_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(EurosatError, match="expected one of none, simple, torch"):
        profile_callbacks("pytorch", tmp_path)
    with pytest.raises(EurosatError, match="expected off or auto"), measure_energy("on"):
        pass


def test_simple_tells_a_slow_dataset_from_a_slow_network(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "net").mkdir()
    fitted("simple", tmp_path / "data", 96, 2, SlowTiles)
    fitted("simple", tmp_path / "net", 96, 2, TensorDataset, SlowLayer())
    data, net = (read_json(tmp_path / name / "profile.json") for name in ("data", "net"))
    for epoch in data["epochs"]:
        assert set(epoch) == {"data", "forward", "backward", "optimizer", "validation"}
        assert epoch["data"] > 0.55 and epoch["validation"] > 0.55
    others = ("forward", "backward", "optimizer")
    assert any(epoch["data"] > sum(epoch[name] for name in others) for epoch in data["epochs"])
    assert all(epoch["forward"] > 0.17 for epoch in net["epochs"])
    assert any(epoch["forward"] > epoch["data"] for epoch in net["epochs"])
    for found in (data, net):
        assert found["tiles"] == 192 and found["peak_memory_mb"]["process"] > 50
        phases = sum(sum(epoch.values()) for epoch in found["epochs"])
        assert 0.5 * found["seconds"] < phases <= found["seconds"]
        training = phases - sum(epoch["validation"] for epoch in found["epochs"])
        assert found["tiles_per_second"] == pytest.approx(192 / training, rel=0.01)


def test_torch_writes_a_trace_of_three_steps_and_the_operators(tmp_path: Path) -> None:
    fitted("torch", tmp_path)
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 3
    found = read_json(tmp_path / "profile.json")
    assert found["kind"] == "torch" and 0 < len(found["operators"]) <= 15
    assert any("conv" in row["operator"] for row in found["operators"])
    assert found["operators"][0]["cpu_ms"] >= found["operators"][-1]["cpu_ms"] or DEVICE == "cuda"


def test_torch_says_so_when_a_run_is_too_short_to_trace(tmp_path: Path) -> None:
    with log_to(tmp_path):
        fitted("torch", tmp_path, 16, 1)
    assert not (tmp_path / "trace.json").exists()
    assert "2 training batches" in (tmp_path / "log.jsonl").read_text()


def test_a_profile_does_not_change_what_is_learned(tmp_path: Path) -> None:
    losses = []
    for kind in ("none", "simple", "torch"):
        torch.manual_seed(0)
        random.seed(0)  # fastai shuffles with it
        part = TensorDataset(torch.rand(64, 3, 8, 8), torch.randint(0, 4, (64,)))
        loaders = DataLoaders.from_dsets(part, part, bs=16, device="cpu", num_workers=0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        learner = Learner(loaders, net, nn.CrossEntropyLoss(), cbs=profile_callbacks(kind, tmp_path))
        learner.logger = lambda values: None
        learner.fit(1)
        losses.append(learner.recorder.values)
    assert losses[0] == losses[1] == losses[2]


def test_off_measures_nothing_and_imports_nothing() -> None:
    with measure_energy("off") as energy:
        time.sleep(0.05)
    assert energy.result["joules"] is None and energy.result["method"] == "not measured (energy is off)"
    assert energy.result["seconds"] >= 0.05


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("codecarbon", "zeus", "zeus.monitor"):
        monkeypatch.setitem(sys.modules, package, None)
    with measure_energy("auto") as energy:
        pass
    assert energy.result["joules"] is None
    assert energy.result["method"] == "not measured (install eurosat-mlops[energy])"


def test_auto_gives_joules_and_says_how(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("zeus" if DEVICE == "cuda" else "codecarbon") is None:
        pytest.skip("pip install eurosat-mlops[energy]")
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    with measure_energy("auto") as energy:
        x = torch.rand(500, 500, device=DEVICE)
        while time.perf_counter() - began < 3:
            x = torch.tanh(x @ x)
    assert energy.result["joules"] > 0, energy.result
    assert energy.result["method"].startswith("measured" if DEVICE == "cuda" else "estimated")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_block_that_fails_still_fails_and_is_metered() -> None:
    with pytest.raises(ZeroDivisionError), measure_energy("auto") as energy:
        1 / 0
    assert set(energy.result) == {"joules", "method", "seconds"}


def test_the_estimate_asks_nobody() -> None:
    "Every attempt to reach another machine is refused and counted."
    code = """
import socket
tried = []
def refuse(*args, **kwargs):
    tried.append(args)
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from eurosat_mlops.meters import measure_energy
with measure_energy("auto") as energy:
    pass
assert not tried, tried
"""
    subprocess.run([sys.executable, "-c", code], check=True)
