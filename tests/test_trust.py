"""Which answers to hold back, whether strangers are told from the known, which labels are suspicious, and the map."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.core import EurosatError, Settings
from eurosat_mlops.data import EUROSAT_CLASSES
from eurosat_mlops.learner import TrainConfig
from eurosat_mlops.metrics import accuracy_interval, expected_calibration_error, softmax
from eurosat_mlops.reference import familiar_distance, fit_clouds
from eurosat_mlops.session import answer, open_session
from eurosat_mlops.synthetic import make_synthetic
from eurosat_mlops.trust import (
    View,
    calibration_by_bins,
    draw_classes,
    energy,
    flagged_shares,
    hold_out,
    judge_classes,
    judge_scores,
    label_table,
    map_embedding,
    neighbour_distance,
    risk_coverage,
    sample_rows,
    selective_figures,
    strangeness,
    study_held_out,
    suspicious_labels,
    view_tiles,
    write_labels,
)
from eurosat_mlops.trust_plots import plot_coverage, plot_map, plot_strangeness, plot_suspects

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def answers():
    "A model of four classes that is right nine times of ten, and knows when."
    y = RNG.integers(0, 4, 2000)
    return softmax(2.5 * (2.5 * np.eye(4)[y] + RNG.normal(0, 1, (2000, 4)))), y


@pytest.fixture(scope="module")
def tileset():
    return make_synthetic(per_class=12, size=16)


def test_risk_is_the_share_of_wrong_answers_among_the_surest():
    confidence, right = RNG.permutation(500) / 500, RNG.random(500) < 0.8
    coverage, risk = risk_coverage(confidence, right)
    for kept in (1, 17, 250, 500):
        surest = np.argsort(-confidence)[:kept]
        assert coverage[kept - 1] == kept / 500 and risk[kept - 1] == pytest.approx(1 - right[surest].mean())


def test_equal_confidences_leave_no_room_for_luck():
    right = np.arange(100) < 90
    assert risk_coverage(np.full(100, 0.9), right)[1] == pytest.approx(0.1)
    assert risk_coverage(np.full(100, 0.9), right[::-1])[1] == pytest.approx(0.1)


def test_the_limit_parts_the_answers_and_every_share_has_its_interval(answers):
    p, y = answers
    found = selective_figures(p, y, limit=0.8)
    kept, right = p.max(1) >= 0.8, p.argmax(1) == y
    assert found["coverage"]["value"] == kept.mean()
    assert found["answered"]["n"] + found["held_back"]["n"] == len(y)
    assert found["answered"]["accuracy"]["value"] == right[kept].mean()
    low, high = accuracy_interval(int(right[~kept].sum()), int((~kept).sum()))
    assert (found["held_back"]["accuracy"]["low"], found["held_back"]["accuracy"]["high"]) == (low, high)
    assert 0 < found["aurc_best"] < found["aurc"] < 1 - right.mean()


def test_nothing_answered_and_nothing_held_back_are_figures_too(answers):
    p, y = answers
    assert selective_figures(p, y, limit=2)["answered"] == {"n": 0, "accuracy": dict.fromkeys(("value", "low", "high"))}
    assert selective_figures(p, y, limit=0)["held_back"]["accuracy"]["value"] is None
    for limit in (0, 0.8, 2):
        assert plot_coverage(p, y, selective_figures(p, y, limit)).png()


def test_a_calibrated_model_lies_in_the_range_of_chance_and_a_boastful_one_does_not(answers):
    p, _ = answers
    y = (RNG.random((len(p), 1)) > p.cumsum(1)[:, :-1]).sum(1)  # drawn from the probabilities themselves
    good, boastful = calibration_by_bins(p, y, (10, 15)), calibration_by_bins(softmax(4 * np.log(p)), y, (10, 15))
    assert all(row["low"] <= row["ece"] <= row["high"] for row in good)
    assert all(row["ece"] > row["high"] for row in boastful)
    assert good[1]["ece"] == expected_calibration_error(p, y, 15) and good[0]["perfect"] < good[1]["perfect"]


def test_held_out_classes_are_nowhere_in_what_is_trained_on(tileset):
    held = draw_classes(tileset.classes, 4, seed=0)
    known, rows = hold_out(tileset, held)
    assert held == draw_classes(tileset.classes, 4, seed=0) != draw_classes(tileset.classes, 4, seed=1)
    assert set(known.classes) == set(tileset.classes) - set(held) and known.digest != tileset.digest
    truth = {name: tileset.classes[label] for name, label in zip(tileset.names, tileset.labels, strict=True)}
    pixels = dict(zip(tileset.names, tileset.tiles, strict=True))
    for part in ("train", "val", "test"):
        before = {tileset.names[row] for row in tileset.parts[part]}
        for row in known.parts[part]:
            name = known.names[row]
            assert name in before and known.classes[known.labels[row]] == truth[name] not in held
            assert np.array_equal(known.tiles[row], pixels[name])
    assert {tileset.classes[label] for label in tileset.labels[rows]} == set(held)
    assert sorted([*rows, *(tileset.names.index(known.names[r]) for r in known.parts["test"])]) == sorted(
        tileset.parts["test"]
    )


@pytest.mark.parametrize("classes", [["Glacier"], [], EUROSAT_CLASSES[:9]])
def test_what_leaves_nothing_to_learn_or_to_hold_out_is_refused(tileset, classes):
    with pytest.raises(EurosatError, match="held_out"):
        hold_out(tileset, classes)


def test_energy_keeps_what_softmax_forgets():
    logits = RNG.normal(size=(50, 6))
    assert energy(logits) == pytest.approx(-np.log(np.exp(logits).sum(1)))
    assert softmax(logits + 5) == pytest.approx(softmax(logits)) and energy(logits + 5) == pytest.approx(
        energy(logits) - 5
    )
    assert np.isfinite(energy(1000 * logits)).all()


def test_distances_are_those_to_the_nearest_class_and_to_the_kth_neighbour():
    train, labels, some = RNG.normal(size=(300, 5)) + 1, RNG.integers(0, 3, 300), RNG.normal(size=(40, 5)) + 1
    units = [e / np.linalg.norm(e, axis=1, keepdims=True) for e in (some, train)]
    every = np.sort(np.linalg.norm(units[0][:, None] - units[1], axis=2), axis=1)
    assert neighbour_distance(some, train, 7) == pytest.approx(every[:, 6], abs=1e-3)
    assert neighbour_distance(some, train, 1000) == pytest.approx(every[:, -1], abs=1e-3)
    scores = strangeness(View(RNG.normal(size=(40, 3)), some), train, labels)
    assert scores["class distance"] == pytest.approx(familiar_distance(some, *fit_clouds(train, labels)))


def test_the_logits_of_a_bundle_give_the_probabilities_of_its_graph(bundle_folder, tileset):
    bundle = read_bundle(bundle_folder)
    tiles = make_synthetic(per_class=3).tiles
    p, embedding = answer(open_session(bundle.read("model.onnx")), tiles)
    view = view_tiles(bundle, tiles)
    assert np.allclose(softmax(view.logits / bundle.temperature), p, atol=1e-4)
    assert np.allclose(view.embedding, embedding, atol=1e-4)


def test_a_score_is_judged_by_its_ranking_and_by_who_is_let_in():
    strange = np.arange(1000) >= 600
    score = RNG.normal(size=1000) + strange
    found = judge_scores({"it": score, "perfect": strange.astype(float), "blind": np.zeros(1000)}, strange)
    pairs = score[strange][:, None] > score[~strange]
    assert found["it"]["auroc"]["value"] == pytest.approx(pairs.mean())
    assert found["it"]["auroc"]["low"] < pairs.mean() < found["it"]["auroc"]["high"]
    limit = np.sort(score[~strange])[int(np.ceil(0.95 * 600)) - 1]
    assert found["it"]["let_in"] == pytest.approx((score[strange] <= limit).mean())
    assert found["perfect"]["auroc"]["value"] == 1 and found["perfect"]["let_in"] == 0
    assert found["blind"]["auroc"]["value"] == 0.5 and found["blind"]["let_in"] == 1
    areas = judge_classes({"it": score}, np.where(strange, np.arange(1000) % 2, -1), ("a", "b"))
    assert np.mean([areas[name]["it"] for name in "ab"]) == pytest.approx(pairs.mean(), abs=1e-3)
    assert plot_strangeness({"it": score}, strange, found | {"perfect": found["it"], "blind": found["it"]}).png()


def test_a_finished_trial_is_not_trained_again_and_another_is_not_taken_for_it(tileset, tmp_path):
    settings = Settings(tmp_path, runs_dir=tmp_path / "runs", wandb="off", log_level="ERROR")
    config = TrainConfig(
        data="synthetic", epochs=1, bs=16, ema=0, wandb="off", device="cpu", out=str(tmp_path / "study" / "draw-0")
    )
    first = study_held_out(tileset, config, tileset.classes[:4], settings)
    made = (Path(config.out) / "bundle" / "MANIFEST.sha256").stat().st_mtime_ns
    again = study_held_out(tileset, config, tileset.classes[:4], settings)
    assert made == (Path(config.out) / "bundle" / "MANIFEST.sha256").stat().st_mtime_ns
    assert all(np.array_equal(first.scores[name], again.scores[name]) for name in first.scores)
    assert not (tmp_path / "runs" / "latest").exists(), "evaluate would take it for a model"
    for other in (replace(config, epochs=2), replace(config, label_smoothing=0.0)):
        with pytest.raises(EurosatError, match="other parameters"):
            study_held_out(tileset, other, tileset.classes[:4], settings)
    with pytest.raises(EurosatError, match="other parameters"):
        study_held_out(tileset, config, tileset.classes[2:6], settings)


def test_labels_made_wrong_are_found_and_come_first(answers):
    p, y = answers
    wrong = RNG.choice(np.flatnonzero(p.max(1) > 0.95), 40, replace=False)
    noisy = y.copy()
    noisy[wrong] = (noisy[wrong] + 1) % 4
    rows, scores = suspicious_labels(p, noisy)
    assert np.isin(wrong, rows).mean() > 0.9 and (np.diff(scores) >= 0).all()
    assert (p[rows].argmax(1) != noisy[rows]).all()
    assert np.isin(rows[:40], wrong).mean() > np.isin(rows[40:], wrong).mean()


@pytest.mark.parametrize(("n", "k", "there"), [(1, 2, 1), (3, 3, 3), (40, 2, 2), (50, 6, 2), (20, 4, 1)])
def test_few_tiles_and_absent_classes_are_no_error(n, k, there):
    y, p = RNG.integers(0, there, n), softmax(RNG.normal(size=(n, k)))
    rows, scores = suspicious_labels(p, y)
    assert len(rows) == len(scores) <= n


def test_without_cleanlab_the_extra_is_named(answers, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(EurosatError, match=r"eurosat-mlops\[trust\]"):
        suspicious_labels(*answers)


def test_the_table_of_labels_names_tiles_of_the_set_and_opens_as_csv(tileset, tmp_path):
    turned = replace(tileset, labels=np.roll(tileset.labels, 1))
    said = {part: softmax(6 * np.eye(10)[tileset.labels[tileset.parts[part]]]) for part in ("val", "test")}
    table = label_table(turned, said)
    assert table and [row["score"] for row in table] == sorted(row["score"] for row in table)
    for row in table:
        place = turned.names.index(row["name"])
        assert place == row["row"] in turned.parts[row["part"]]
        assert row["label"] == turned.classes[turned.labels[place]] != row["suggested"]
    write_labels(tmp_path / "labels.csv", table)
    with (tmp_path / "labels.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["name"] for row in read] == [row["name"] for row in table]
    assert set(read[0]) == {"name", "part", "label", "suggested", "score"}
    shares = flagged_shares(turned, table, ("val", "test"))
    assert sum(found["n"] for found in shares.values()) == len(table)
    assert shares["test"]["share"]["value"] == shares["test"]["n"] / len(turned.parts["test"])
    assert plot_suspects(turned.tiles, table, most=7).png() and plot_suspects(turned.tiles, []).png()


def test_a_map_is_the_same_for_a_seed_and_keeps_neighbours_together():
    labels = np.repeat([0, 1], 60)
    embedding = 4 * np.eye(2, 12)[labels] + RNG.normal(0, 0.3, (120, 12))
    places = map_embedding(embedding, seed=3)
    assert np.array_equal(places, map_embedding(embedding, seed=3))
    assert places.min(0).tolist() == [0, 0] and places.max(0).tolist() == [1, 1]
    nearest = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(nearest, np.inf)
    assert (labels[nearest.argmin(1)] == labels).mean() > 0.95


@pytest.mark.parametrize("embedding", [np.ones((30, 4)), np.zeros((30, 4)), np.ones((1, 4)), RNG.normal(size=(3, 1))])
def test_tiles_that_are_equal_or_few_have_places_too(embedding):
    places = map_embedding(embedding)
    assert places.shape == (len(embedding), 2) and np.isfinite(places).all()


def test_a_sample_is_seeded_sorted_and_not_larger_than_what_there_is():
    rows = sample_rows(5000, most=100, seed=1)
    assert len(set(rows)) == 100 and (np.diff(rows) > 0).all() and np.array_equal(rows, sample_rows(5000, 100, 1))
    assert sample_rows(7).tolist() == list(range(7))


def test_a_map_is_drawn_of_any_number_of_tiles_and_classes(tileset):
    for n, classes in ((1, tileset.classes), (3, tileset.classes), (120, [f"class {k}" for k in range(30)])):
        places, wrong = RNG.random((n, 2)), np.zeros(n, dtype=bool)
        assert plot_map(places, tileset.tiles[:n], tileset.labels[:n], classes, wrong).png()
    with pytest.raises(EurosatError, match="places"):
        plot_map(RNG.random((3, 2)), tileset.tiles, tileset.labels, tileset.classes, np.zeros(120, dtype=bool))
