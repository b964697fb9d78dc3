"""A release adds to a bundle what was measured, and ships only what passed."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from eurosat_mlops import release as module
from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.core import Settings, read_json
from eurosat_mlops.learner import TrainConfig
from eurosat_mlops.reference import training_sample
from eurosat_mlops.release import add_int8, latency_table, open_candidate, prune_and_tune, record_release, time_ways
from eurosat_mlops.runs import evaluate, train


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    return Settings(root=root, runs_dir=root / "runs", data_dir=root / "data", wandb="off", log_level="ERROR")


@pytest.fixture(scope="module")
def run(settings):
    config = TrainConfig(data="synthetic", epochs=3, bs=32, ema=0.9, wandb="off", device="cpu")
    return train(config, settings=settings)


@pytest.fixture
def candidate(run, settings, tmp_path):
    "The run, copied, so that each test changes its own."
    folder = shutil.copytree(run.folder, tmp_path / "run")
    return open_candidate(folder, settings)


def test_int8_is_shipped_and_served_when_it_passes(candidate, settings):
    before = candidate.bundle
    after, parity = add_int8(candidate, 128)
    assert parity["fp32"]["agreement"] == 1 and parity["fp32"]["largest_difference"] < 1e-4
    assert after.bundle.precision == "int8" and after.bundle.id != before.id
    assert after.bundle.info["graphs"]["int8"]["agreement"] >= 0.995
    assert after.bundle.read("model.onnx") == before.read("model.onnx")
    report = evaluate(candidate.folder, settings=settings).metrics["test"]["stratified"]
    assert report["precision"] == "int8" and 0 <= report["unfamiliar"] <= 1


def test_int8_is_left_out_with_the_reason_when_it_fails(candidate, monkeypatch):
    shipped, _ = add_int8(candidate, 128)
    assert "model.int8.onnx" in shipped.bundle.hashes
    from eurosat_mlops.export import quantize_graph

    monkeypatch.setattr(module, "quantize_graph", lambda graph, tiles: quantize_graph(graph, tiles, percentile=50))
    after, parity = add_int8(candidate, 128)
    assert parity["int8"]["agreement"] < 0.995
    assert after.bundle.precision == "fp32" and "model.int8.onnx" not in after.bundle.hashes
    assert "int8: not shipped, it " in (after.bundle.folder / "card.md").read_text()


def test_the_sample_of_training_keeps_every_class_and_no_other_part(run):
    tileset = run.tileset
    rows = training_sample(tileset, most=100)
    assert set(rows) <= set(tileset.parts["train"].tolist())
    assert set(tileset.labels[rows]) == set(range(10)) and len(rows) == 200, "at least 20 of each class"
    assert np.array_equal(training_sample(tileset), tileset.parts["train"])


def test_pruning_and_timing_leave_their_figures_in_bundle_and_metrics(candidate):
    pruned, accuracy = prune_and_tune(candidate, 0.25, 1)
    assert 0.3 < accuracy <= 1
    rows = time_ways(candidate, pruned, batches=(1, 4), threads=(1,))
    assert [r["batch"] for r in rows] == [1, 1, 1, 4, 4, 4]
    after = record_release(candidate, {"fp32": {}}, rows)
    assert (
        after.bundle.info["latency"] == rows
        and read_json(candidate.folder / "metrics.json")["release"]["latency"] == rows
    )
    assert latency_table(rows).count("\n") == 7


def test_a_release_can_be_made_again(candidate):
    once, _ = add_int8(candidate, 128)
    twice, _ = add_int8(replace(candidate, bundle=read_bundle(candidate.folder / "bundle")), 128)
    assert once.bundle.id == twice.bundle.id
