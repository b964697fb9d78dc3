"""A whole run and its evaluation; above all, what training must not do."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.core import EurosatError, Settings, find_run, read_json, read_status
from eurosat_mlops.datasets import load_tiles
from eurosat_mlops.learner import TrainConfig
from eurosat_mlops.runs import SYNTHETIC_NOTE, check_unseen, evaluate, load_classifier, train
from eurosat_mlops.synthetic import make_synthetic
from eurosat_mlops.training import predict_logits

QUICK = {"data": "synthetic", "epochs": 2, "bs": 64, "ema": 0.9, "wandb": "off", "device": "cpu"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    return Settings(root=root, runs_dir=root / "runs", data_dir=root / "data", wandb="off", log_level="ERROR")


@pytest.fixture(scope="module")
def run(settings):
    return train(TrainConfig(**QUICK), settings=settings)


@pytest.fixture(scope="module")
def evaluation(run, settings):
    return evaluate(run.folder, settings=settings)


def test_the_run_folder_holds_the_whole_record(run, settings):
    assert read_status(run.folder)["state"] == "finished" and find_run(settings) == run.folder.resolve()
    config = read_json(run.folder / "config.json")
    assert config["lr"] == 0.01 and config["precision"] in ("bf16", "fp32") and config["device"] == "cpu"
    lines = [json.loads(line) for line in (run.folder / "history.jsonl").read_text().splitlines()]
    assert sum("epoch/accuracy" in line for line in lines) == 2
    assert (run.folder / "log.jsonl").read_text().count("epoch ") == 2


def test_synthetic_tiles_are_named_in_metrics_bundle_and_card(run):
    assert read_json(run.folder / "metrics.json")["data"]["note"] == SYNTHETIC_NOTE
    bundle = read_bundle(run.folder / "bundle")
    assert bundle.info["data"]["note"] == SYNTHETIC_NOTE
    assert "synthetic tiles" in (bundle.folder / "card.md").read_text()


def test_the_bundle_is_the_trained_model(run):
    tiles = run.validation.tiles
    model = load_classifier(read_bundle(run.folder / "bundle"))
    assert (predict_logits(model, tiles) == predict_logits(run.learner.model, tiles)).all()
    assert (predict_logits(model, tiles) == run.validation.logits).all()


def test_evaluation_writes_the_figures_of_the_test_part(run, evaluation, settings):
    test = read_json(run.folder / "metrics.json")["test"]["stratified"]
    tiles, labels = run.tileset.part("test")
    right = (predict_logits(run.learner.model, tiles).argmax(1) == labels).mean()
    assert test["n"] == len(labels) and test["accuracy"]["value"] == pytest.approx(right)
    assert test["accuracy"]["low"] < right < test["accuracy"]["high"]
    assert read_bundle(run.folder / "bundle").info["metrics"]["test, stratified"] == test


def test_evaluating_twice_gives_the_same_bundle(run, evaluation, settings):
    assert evaluate(run.folder, settings=settings).bundle.id == evaluation.bundle.id


def test_the_same_config_and_seed_give_the_same_metrics(run, settings):
    again = train(TrainConfig(**QUICK), settings=settings)
    assert again.history == run.history and again.metrics["validation"] == run.metrics["validation"]
    same = [(r.folder / "bundle" / "weights.safetensors").read_bytes() for r in (run, again)]
    assert same[0] == same[1]


POISONED = """
import ctypes, mmap, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from eurosat_mlops.core import Settings
from eurosat_mlops.learner import TrainConfig
from eurosat_mlops.runs import train
from eurosat_mlops.synthetic import make_synthetic

root, touch = Path(sys.argv[1]), sys.argv[2]
made = make_synthetic(per_class=40)
np.save(root / "tiles.npy", made.tiles)
tileset = replace(made, tiles=np.load(root / "tiles.npy", mmap_mode="r"))
libc, start, row = ctypes.CDLL(None, use_errno=True), tileset.tiles.ctypes.data, tileset.tiles[0].nbytes
for i in tileset.parts["test"]:  # take away the right to read the whole pages inside each test tile
    first = -(-(start + int(i) * row) // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + (int(i) + 1) * row) // mmap.PAGESIZE * mmap.PAGESIZE
    assert last > first and libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 0) == 0
if touch == "test":
    tileset.part("test")[0][:]
config = TrainConfig(data="synthetic", epochs=1, bs=32, wandb="off", device="cpu")
train(config, tileset, Settings(root=root, runs_dir=root / "runs", log_level="ERROR"))
print("trained")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes away the right to read memory, by mprotect")
@pytest.mark.parametrize("touch", ["nothing", "test"])
def test_training_runs_although_the_test_part_cannot_be_read(tmp_path, touch):
    done = subprocess.run([sys.executable, "-c", POISONED, tmp_path, touch], capture_output=True, text=True)
    if touch == "test":  # the trap works: a single read of the test part ends the process
        assert done.returncode == -signal.SIGSEGV
    else:
        assert done.returncode == 0 and "trained" in done.stdout, done.stderr[-2000:]


def test_a_failed_run_says_why_and_is_never_latest(settings, run):
    tileset = make_synthetic(per_class=20)
    with pytest.raises(EurosatError, match="bs"):
        train(TrainConfig(**{**QUICK, "bs": 5000, "name": "fails"}), tileset, settings)
    failed = max(settings.runs_dir.glob("*-fails"))
    assert read_status(failed)["state"] == "failed" and "bs" in read_status(failed)["reason"]
    assert not (failed / "bundle").exists() and find_run(settings) != failed
    with pytest.raises(EurosatError, match="failed, not finished"):
        evaluate(failed, settings=settings)


def test_a_run_killed_in_training_is_not_trusted(tmp_path):
    code = (
        "import sys; from pathlib import Path; from eurosat_mlops.core import Settings; "
        "from eurosat_mlops.learner import TrainConfig; from eurosat_mlops.runs import train; "
        "r = Path(sys.argv[1]); train(TrainConfig(data='synthetic', epochs=500, wandb='off', device='cpu'), "
        "settings=Settings(root=r, runs_dir=r / 'runs'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch " in line:
            break
    process.kill()
    process.wait()
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_status(folder)["state"] == "failed" and not os.path.lexists(tmp_path / "runs" / "latest")


def test_figures_of_tiles_that_training_saw_are_refused(evaluation, run):
    with pytest.raises(EurosatError, match="training part holds test tiles"):
        check_unseen(evaluation.bundle, replace(run.tileset, split="spatial"))
    with pytest.raises(EurosatError, match="not those of the run"):
        check_unseen(evaluation.bundle, replace(run.tileset, digest="f" * 64))


def test_a_touched_bundle_is_not_evaluated(settings):
    touched = train(TrainConfig(**{**QUICK, "epochs": 1}), settings=settings)
    weights = touched.folder / "bundle" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EurosatError, match=r"weights\.safetensors"):
        evaluate(touched.folder, settings=settings)


def test_real_tiles_are_learned(eurosat_settings):
    "A quarter of the training part, twice, is enough to be far from chance."
    whole = load_tiles("eurosat", "random", eurosat_settings)
    quarter = {"train": whole.parts["train"][::4], "val": whole.parts["val"][::4], "test": whole.parts["test"]}
    config = TrainConfig(data="eurosat", epochs=2, bs=32, ema=0.95, wandb="off")
    small = train(config, replace(whole, parts=quarter), eurosat_settings)
    assert small.metrics["validation"]["accuracy"]["value"] > 0.5
    measured = evaluate(settings=eurosat_settings)
    assert measured.metrics["test"]["random"]["n"] == 5400
    assert np.array(measured.metrics["test"]["random"]["confusion"]).sum() == 5400
    with pytest.raises(EurosatError, match="training part holds test tiles"):
        evaluate(split="spatial", settings=eurosat_settings)
