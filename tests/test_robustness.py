"""Robustness is counted on the graph that is shipped, the same way however few tiles and whatever the batches."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.core import EurosatError
from eurosat_mlops.corruptions import CORRUPTIONS, corrupt
from eurosat_mlops.metrics import accuracy_interval
from eurosat_mlops.predict import load_bundle
from eurosat_mlops.robustness import (
    draw_rows,
    error_table,
    find_mistakes,
    mean_errors,
    measure_robustness,
    plot_robustness,
)
from eurosat_mlops.synthetic import make_synthetic

SET = make_synthetic()


@pytest.fixture(scope="module")
def bundle(bundle_folder):
    return read_bundle(bundle_folder)


@pytest.fixture(scope="module")
def report(bundle):
    return measure_robustness(bundle, SET, most=40, seed=2)


def test_the_report_holds_all_conditions_and_its_means_follow_from_them(report):
    assert list(report["kinds"]) == list(CORRUPTIONS) and report["strengths"] == [1, 2, 3, 4, 5]
    assert (report["part"], report["tiles"], report["seed"]) == ("test", 40, 2)
    errors = np.array([[1 - a["value"] for a in kind["accuracy"]] for kind in report["kinds"].values()])
    assert errors.shape == (12, 5)
    assert report["mean_corruption_error"]["value"] == pytest.approx(errors.mean())
    assert [k["mean_error"]["value"] for k in report["kinds"].values()] == pytest.approx(errors.mean(1))
    clean, mean = report["clean_error"]["value"], report["mean_corruption_error"]["value"]
    assert report["rise"]["value"] == pytest.approx(mean - clean) and report["rise"]["value"] > 0
    assert json.loads(json.dumps(report)) == report


def test_a_condition_is_what_the_served_model_says_of_the_harmed_tiles(bundle_folder, report):
    rows = draw_rows(SET, "test", 40, 2)
    said = load_bundle(bundle_folder).predict(corrupt(SET.tiles[rows], "haze", 4, 2, rows)).labels
    right = int((said == SET.labels[rows]).sum())
    found = report["kinds"]["haze"]["accuracy"][3]
    assert found["value"] == right / 40 and (found["low"], found["high"]) == accuracy_interval(right, 40)


def test_the_same_seed_gives_the_same_figures_and_another_gives_others(bundle, report):
    few = {"kinds": ["noise", "haze"], "strengths": [5, 2], "most": 40}
    again = measure_robustness(bundle, SET, **few, seed=2)
    assert again["strengths"] == [5, 2] and list(again["kinds"]) == ["noise", "haze"]
    for kind in few["kinds"]:
        assert again["kinds"][kind]["accuracy"] == [report["kinds"][kind]["accuracy"][s - 1] for s in (5, 2)]
    assert measure_robustness(bundle, SET, **few, seed=3) != again


def test_batches_make_no_difference(bundle):
    rows, conditions = draw_rows(SET, "test", 0, 0), [("", 0), ("thin_cloud", 2), ("noise", 2)]
    assert len(rows) == len(SET.parts["test"]) > 256
    whole, part = (find_mistakes(bundle, SET, some, conditions) for some in (rows, rows[100:130]))
    assert (whole[:, 100:130] == part).all()


def test_a_larger_number_of_tiles_takes_the_smaller_ones_and_more():
    few, more, everything = (draw_rows(SET, "val", most, 7) for most in (30, 60, 0))
    assert set(few) < set(more) and (everything == SET.parts["val"]).all()
    assert (few == np.sort(few)).all()


def test_the_interval_holds_the_mean_of_many_tiles_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        hard = rng.beta(1, 4, 80)  # of each tile, in all its conditions; the mean of all tiles there are is 0.2
        found = mean_errors({"x": (rng.random((60, 80)) < hard).mean(0)}, seed=trial, draws=300)["x"]
        held += found["low"] <= 0.2 <= found["high"]
    assert 88 <= held <= 99


def test_a_difference_within_tiles_has_its_own_narrower_interval():
    rng = np.random.default_rng(1)
    base = (rng.random(300) < 0.5).astype(float)
    worse = np.maximum(base, rng.random(300) < 0.1)
    found = mean_errors({"worse": worse, "rise": worse - base})
    assert found["rise"]["high"] - found["rise"]["low"] < 0.7 * (found["worse"]["high"] - found["worse"]["low"])
    assert found["rise"]["low"] > 0


def test_the_picture_and_the_table_name_the_worst_kind_first(report):
    worst = max(report["kinds"], key=lambda kind: report["kinds"][kind]["mean_error"]["value"]).replace("_", " ")
    figure = plot_robustness(report)
    cells, means = figure.axes
    assert cells.get_yticklabels()[0].get_text() == worst and len(cells.texts) == 60 and len(means.texts) == 12
    assert figure._repr_png_()[:4] == b"\x89PNG"
    lines = error_table(report).splitlines()
    assert "mean corruption error" in lines[2] and lines[5].startswith(f"| {worst} |") and len(lines) == 17


def test_one_condition_alone_and_no_mistake_at_all_can_be_drawn(bundle):
    one = measure_robustness(bundle, SET, kinds=["thin_cloud"], strengths=[1], most=5)
    one["kinds"]["thin_cloud"]["accuracy"] = [{"value": 1.0, "low": 0.5, "high": 1.0}]
    assert len(plot_robustness(one)._repr_png_()) > 1000


@pytest.mark.parametrize(
    "given, said",
    [
        ({"kinds": ["rain"]}, "kind: got 'rain'"),
        ({"kinds": []}, "kinds, strengths: got"),
        ({"kinds": ["haze", "haze"]}, "each of them once"),
        ({"strengths": [0]}, "strength: got 0"),
        ({"part": "holdout"}, "part: got 'holdout'"),
        ({"most": -1}, "most, seed"),
    ],
)
def test_what_cannot_be_measured_is_refused(bundle, given, said):
    with pytest.raises(EurosatError, match=said):
        measure_robustness(bundle, SET, **given)


def test_tiles_of_another_size_are_refused(bundle):
    with pytest.raises(EurosatError, match="expected \\(N, 64, 64, 3\\)"):
        measure_robustness(bundle, make_synthetic(per_class=3, size=32))


def test_evaluate_refuses_a_number_of_tiles_that_is_none(project, tmp_path):
    command = [sys.executable, "-m", "papermill", str(project / "nbs" / "evaluate.ipynb"), str(tmp_path / "out.ipynb")]
    env = {name: text for name, text in os.environ.items() if name != "IN_TEST"}
    words = ["-k", "python3", "-p", "corruptions", "-1"]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode and "corruptions: got -1, expected a number of tiles" in done.stderr
