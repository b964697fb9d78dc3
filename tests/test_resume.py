"""A run that was cut off goes on to the same bits; what cannot go on says why; how long it takes is told."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from safetensors.torch import load as from_safetensors

from eurosat_mlops.core import EurosatError, Settings, read_json, read_status
from eurosat_mlops.datasets import load_tiles
from eurosat_mlops.learner import TrainConfig, config_from, make_learner
from eurosat_mlops.meters import in_words
from eurosat_mlops.runs import train
from eurosat_mlops.synthetic import make_synthetic
from eurosat_mlops.training import CHECKPOINT, Checkpoints, fit, read_checkpoint, resumed, write_checkpoint

CONFIG = {"data": "synthetic", "size": 16, "epochs": 6, "bs": 64, "ema": 0.9, "lr": 0.02, "wandb": "off"}
CONFIG |= {"device": "cpu", "balance": "sampling", "checkpoint": 1e-6, "patience": 5}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
TRAIN = """
import sys; from pathlib import Path; from eurosat_mlops.core import Settings, read_json
from eurosat_mlops.learner import config_from; from eurosat_mlops.runs import train
root = Path(sys.argv[1])
settings = Settings(root, runs_dir=root / "runs", data_dir=root / "data", wandb="off")
train(config_from(read_json(root / "config.json")), settings=settings)
"""


def settings_of(root: Path) -> Settings:
    return Settings(root, runs_dir=root / "runs", data_dir=root / "data", wandb="off", log_level="ERROR")


def run_until(root: Path, config: dict, epoch: int) -> Path:
    "Train in another process that is killed, with no chance to tidy up, once it has kept so many epochs."
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    process = subprocess.Popen([sys.executable, "-c", TRAIN, root], env=os.environ | ONE_THREAD, stderr=subprocess.PIPE)
    while process.poll() is None:
        found = list(root.glob(f"runs/*/{CHECKPOINT}"))
        if found and read_checkpoint(found[0].parent)["epoch"] >= epoch:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return found[0].parent
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1].decode()[-2000:])


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A run that was killed in its second epoch or soon after; copy it before you go on with it."
    return run_until(tmp_path_factory.mktemp("cut"), CONFIG, 1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Sums depend on how many threads share them, so all runs here have one."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def copied(run: Path, root: Path) -> tuple[Path, Settings]:
    shutil.copytree(run.parents[1], root, dirs_exist_ok=True)
    return root / "runs" / run.name, settings_of(root)


def test_a_killed_run_goes_on_to_the_same_bits(cut_off, tmp_path):
    run, settings = copied(cut_off, tmp_path)
    assert read_status(run)["state"] == "failed" and 0 < read_checkpoint(run)["epoch"] < 6
    gone_on = train(TrainConfig(resume=run.name), settings=settings)
    config = config_from(read_json(run / "config.json"))
    whole = make_learner(config, load_tiles("synthetic", "random", settings, size=16))
    steps: list[int] = []
    assert fit(whole, config, lambda _, step: steps.append(step)) == gone_on.history and len(gone_on.history) == 6
    weights = from_safetensors((run / "bundle" / "weights.safetensors").read_bytes())
    assert all(torch.equal(weights[name], value) for name, value in whole.model.state_dict().items())
    assert gone_on.folder == run and 0 < gone_on.metrics["training"]["resumed_after"] < 6
    assert read_status(run)["state"] == "finished" and not (run / CHECKPOINT).exists()
    noted = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in noted][: len(steps)] == steps, "the record has every batch once"


class Stop(Callback):
    "Break off in the middle of an epoch."

    def __init__(self, epoch: int):
        self.at = epoch

    def after_batch(self) -> None:
        if self.training and self.epoch == self.at and self.iter == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("given", [{"ema": 0.0}, {"arch": "mobilenetv2_035", "memory": 1}, {"patience": 1, "lr": 1e-6}])
def test_whatever_a_fit_holds_is_kept(tmp_path, given):
    tileset = make_synthetic(per_class=16, size=32)
    config = TrainConfig(**{"epochs": 4, "bs": 16, "ema": 0.9, "device": "cpu"} | given)
    whole = make_learner(config, tileset)
    history = fit(whole, config)
    for epoch in (1, 2):  # broken off twice
        with pytest.raises(KeyboardInterrupt):
            fit(
                make_learner(config, tileset),
                config,
                cbs=[Checkpoints(tmp_path, tileset.digest, 1e-9), Stop(min(epoch, len(history) - 1))],
            )
    last = make_learner(config, tileset)
    torch.rand(7)  # other draws in between change nothing
    assert fit(last, config, cbs=[Checkpoints(tmp_path, tileset.digest, 1e-9)]) == history
    states = [learner.model.state_dict() for learner in (whole, last)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_checkpoint_is_replaced_only_when_that_is_cheap(tmp_path):
    tileset = make_synthetic(per_class=16, size=16)
    config = TrainConfig(epochs=3, bs=32, device="cpu")
    fit(make_learner(config, tileset), config, cbs=[Checkpoints(tmp_path, tileset.digest, 60)])
    fit(make_learner(config, tileset), config, cbs=[Checkpoints(tmp_path, tileset.digest, 0)])
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_run_goes_on_with_its_own_parameters(cut_off, tmp_path):
    run, settings = copied(cut_off, tmp_path)
    for given, words in (({"lr": 0.5}, "lr: got 0.5, but the run has 0.02"), ({"data": "eurosat"}, "data: got")):
        with pytest.raises(EurosatError, match=words):
            train(TrainConfig(resume=run.name, **given), settings=settings)
    assert resumed(TrainConfig(resume=run.name, lr=0.02), settings).epochs == 6
    with pytest.raises(EurosatError, match="epochs: got 16"):  # named, although it is the default
        resumed(TrainConfig(resume=run.name, epochs=16), settings, {"epochs"})
    assert read_status(run)["state"] == "failed", "a refusal leaves the run as it is"


def test_what_cannot_go_on_says_why(cut_off, tmp_path):
    run, settings = copied(cut_off, tmp_path)
    config = TrainConfig(resume=str(run))
    with pytest.raises(EurosatError, match="no run at 'yesterday'"):
        train(TrainConfig(resume="yesterday"), settings=settings)
    tiles = make_synthetic(per_class=20, size=16, seed=1)
    with pytest.raises(EurosatError, match="not those of the run"):
        train(config, tiles, settings)
    assert "not those of the run" in read_status(run)["reason"]
    (run / "status.json").write_text(json.dumps({"state": "running", "reason": "", "pid": os.getpid()}))
    with pytest.raises(EurosatError, match="still runs"):
        train(config, settings=settings)
    (run / "status.json").write_text(json.dumps({"state": "finished", "reason": "", "pid": 0}))
    with pytest.raises(EurosatError, match="is finished"):
        train(config, settings=settings)
    (run / "status.json").write_text(json.dumps({"state": "failed", "reason": "", "pid": 0}))
    (run / CHECKPOINT).unlink()
    with pytest.raises(EurosatError, match="no checkpoint"):
        train(config, settings=settings)


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "other"])
def test_a_damaged_checkpoint_is_refused(tmp_path, harm):
    write_checkpoint(tmp_path, {"epoch": 3, "model": {"w": torch.arange(100.0)}})
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    if harm == "flipped":
        content[-7] ^= 1
    elif harm == "other":
        content[content.index(b'\\"epoch\\": 3') + 11] ^= 1
    path.write_bytes(content[: {"cut": -50, "empty": 0}.get(harm)])
    with pytest.raises(EurosatError, match="damaged"):
        read_checkpoint(tmp_path)


def test_no_pickle_is_written_or_read(tmp_path):
    write_checkpoint(tmp_path, {"seen": [1, -float("inf")], "order": torch.get_rng_state()})
    header = (tmp_path / CHECKPOINT).read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["sha256"]
    (tmp_path / CHECKPOINT).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(EurosatError, match="damaged"):
        read_checkpoint(tmp_path)


class Slow(Callback):
    "A hundredth of a second for each training batch."

    def before_batch(self) -> None:
        time.sleep(0.01 if self.training else 0)


def test_the_time_that_is_left_is_told_and_a_limit_warns_at_once(caplog):
    tileset = make_synthetic(per_class=60, size=16)
    config = TrainConfig(epochs=4, bs=16, device="cpu", limit=0.2 / 60)
    learner = make_learner(config, tileset)
    with caplog.at_level(logging.INFO, "eurosat"):
        fit(learner, config, cbs=[Slow()])
    texts = [record.getMessage() for record in caplog.records]
    assert "left" in texts[1] and "accuracy" not in texts[1], "after twenty batches, before the first epoch is over"
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "more than the 0.00333333 min" in texts[0] == warnings[0].getMessage()
    assert len([text for text in texts if "left" in text]) == 5 and texts[-1].endswith("0 s left")
    caplog.clear()
    fit(make_learner(config, tileset), replace(config, limit=10.0))
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


def test_times_are_said_as_people_say_them():
    assert [in_words(s) for s in (0.4, 60, 125, 5399, 7260)] == ["0 s", "60 s", "2 min", "1 h 30 min", "2 h 1 min"]
