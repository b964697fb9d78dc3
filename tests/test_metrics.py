"Metrics: agreement with scikit-learn and published values, statistical promises, and the refusal of bad input."

import json
import time

import numpy as np
import pytest

from eurosat_mlops import metrics
from eurosat_mlops.core import EurosatError

sklearn_metrics = pytest.importorskip(
    "sklearn.metrics", reason="scikit-learn is the yardstick here: pip install scikit-learn"
)
CLASSES = tuple("abcde")


def sample(n: int = 3000, k: int = 5, temperature: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Logits, and labels drawn from softmax(logits / temperature): calibrated at exactly that temperature."
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, k)) * temperature
    return logits, (logits / temperature + rng.gumbel(size=(n, k))).argmax(1)


@pytest.mark.parametrize("seed", range(3))
def test_counts_and_averages_are_those_of_scikit_learn(seed):
    logits, y = sample(seed=seed)
    said = logits.argmax(1)
    matrix = metrics.confusion_matrix(y, said, 5)
    assert (matrix == sklearn_metrics.confusion_matrix(y, said)).all()
    assert metrics.balanced_accuracy(matrix) == pytest.approx(sklearn_metrics.balanced_accuracy_score(y, said))
    assert metrics.macro_f1(matrix) == pytest.approx(sklearn_metrics.f1_score(y, said, average="macro"))
    for ours, theirs in zip(
        (metrics.precision, metrics.recall, metrics.f1),
        sklearn_metrics.precision_recall_fscore_support(y, said),
        strict=False,
    ):
        assert ours(matrix) == pytest.approx(theirs)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_averages_agree_with_scikit_learn_when_a_class_is_absent_or_only_predicted():
    y, said = np.array([0, 0, 1, 1, 3]), np.array([0, 1, 1, 1, 2])  # 2 never occurs, 3 is never predicted, 4 neither
    matrix = metrics.confusion_matrix(y, said, 5)
    assert metrics.balanced_accuracy(matrix) == pytest.approx(sklearn_metrics.balanced_accuracy_score(y, said))
    expected = sklearn_metrics.f1_score(y, said, average="macro", zero_division=0)
    assert metrics.macro_f1(matrix) == pytest.approx(expected)
    assert np.isnan(metrics.recall(matrix)[[2, 4]]).all() and np.isnan(metrics.precision(matrix)[[3, 4]]).all()


def test_proper_scores_are_those_of_scikit_learn():
    logits, y = sample()
    p = metrics.softmax(logits)
    assert metrics.negative_log_likelihood(p, y) == pytest.approx(sklearn_metrics.log_loss(y, p))
    uniform = np.full((4, 4), 0.25)
    assert metrics.negative_log_likelihood(uniform, np.arange(4)) == pytest.approx(np.log(4))
    assert metrics.brier_score(uniform, np.arange(4)) == pytest.approx(3 / 4)
    certain_and_wrong = np.array([[1.0, 0.0]])
    assert metrics.brier_score(certain_and_wrong, np.array([1])) == 2
    assert np.isfinite(metrics.negative_log_likelihood(certain_and_wrong.astype(np.float32), np.array([1])))
    binary = np.array([0.1, 0.6, 0.8]), np.array([0, 1, 0])
    ours = metrics.brier_score(np.stack([1 - binary[0], binary[0]], 1), binary[1])
    assert ours == pytest.approx(2 * sklearn_metrics.brier_score_loss(binary[1], binary[0]))


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_is_the_published_one(correct, total, low, high):
    assert metrics.accuracy_interval(correct, total) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_covers_95_percent():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.8, 1, 4000)
    bounds = np.array([metrics.accuracy_interval(int(c), 500) for c in rng.binomial(500, truth)])
    assert 0.94 < ((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).mean() < 0.965


def test_bootstrap_interval_covers_95_percent():
    rng = np.random.default_rng(0)
    truth = np.array([[0.30, 0.02, 0.01], [0.04, 0.25, 0.03], [0.02, 0.03, 0.30]])
    hits = 0
    for seed in range(400):
        y, said = np.divmod(rng.choice(9, size=600, p=truth.ravel()), 3)
        low, high = metrics.bootstrap_interval(y, said, metrics.macro_f1, 3, seed=seed, draws=400)
        hits += low <= metrics.macro_f1(truth) <= high
    assert 0.92 < hits / 400 < 0.98


def test_bootstrap_is_seeded_and_fast():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 5400)
    said = np.where(rng.random(5400) < 0.9, y, rng.integers(0, 10, 5400))
    begin = time.process_time()
    first = metrics.bootstrap_interval(y, said, metrics.balanced_accuracy, 10, seed=1, draws=1000)
    assert time.process_time() - begin < 2
    assert (first == metrics.bootstrap_interval(y, said, metrics.balanced_accuracy, 10, seed=1)).all()
    assert (first != metrics.bootstrap_interval(y, said, metrics.balanced_accuracy, 10, seed=2)).any()


def test_calibration_error_by_hand():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.65, 0.35], [0.35, 0.65]])
    y = np.array([0, 1, 0, 1])
    table = metrics.reliability(p, y, bins=10)
    assert table.count.tolist() == [0] * 6 + [2, 0, 2, 0]  # 0.9 belongs to (0.8, 0.9]
    assert metrics.expected_calibration_error(p, y, bins=10) == pytest.approx(0.5 * 0.35 + 0.5 * 0.4)
    assert np.isnan(table.confidence[0])


def test_calibrated_predictions_have_a_small_error():
    logits, y = sample(50_000)
    assert metrics.expected_calibration_error(metrics.softmax(logits), y) < 0.01
    assert metrics.expected_calibration_error(metrics.softmax(logits * 3), y) > 0.1


@pytest.mark.parametrize("truth", [0.3, 1.0, 2.5])
def test_temperature_is_found_and_is_the_best(truth):
    logits, y = sample(20_000, temperature=truth)
    found = metrics.fit_temperature(logits, y)
    assert found == pytest.approx(truth, rel=0.05)
    loss = {
        t: metrics.negative_log_likelihood(metrics.softmax(logits / t), y) for t in (found, found * 1.01, found / 1.01)
    }
    assert min(loss, key=loss.get) == found


def test_temperature_leaves_every_label_alone():
    logits, y = sample(temperature=2)
    for t in (0.05, metrics.fit_temperature(logits, y), 20):
        assert (metrics.softmax(logits / t).argmax(1) == logits.argmax(1)).all()


def test_temperature_at_the_edges():
    y = np.array([0, 1])
    assert metrics.fit_temperature(np.eye(2) * 5, y) == 1  # every tile right: nothing to learn
    assert metrics.fit_temperature(np.zeros((2, 2)), y) == 1
    assert metrics.fit_temperature(np.eye(2)[::-1] * 5, y) == pytest.approx(
        20
    )  # every tile wrong: as unsure as it gets
    assert np.isfinite(metrics.fit_temperature(np.array([[1e4, -1e4], [1e4, -1e4]]), y))


def test_report_is_json_and_its_parts_agree():
    logits, y = sample(temperature=2)
    report = metrics.classification_report(logits, y, CLASSES, metrics.fit_temperature(logits, y))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    matrix = np.array(report["confusion"])
    assert matrix.sum() == report["n"] == 3000
    assert report["accuracy"]["value"] == matrix.trace() / 3000
    assert [c["support"] for c in report["per_class"].values()] == matrix.sum(1).tolist()
    assert report["nll"] < report["nll_uncalibrated"] and report["ece"] < report["ece_uncalibrated"]
    figures = [report[n] for n in ("accuracy", "balanced_accuracy", "macro_f1")]
    figures += [c[n] for c in report["per_class"].values() for n in ("precision", "recall", "f1")]
    assert all(f["low"] <= f["value"] <= f["high"] for f in figures)
    assert report == metrics.classification_report(logits, y, CLASSES, report["temperature"])


def ranked(n: int = 2000, share: float = 0.1, digits: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Probabilities with many ties, and which tiles are positive."
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < share
    return (1 / (1 + np.exp(1 - rng.normal(2 * positive, 1.5)))).round(digits), positive


@pytest.mark.parametrize("digits", [1, 2, 15])
def test_curves_and_their_areas_are_those_of_scikit_learn(digits):
    scores, positive = ranked(digits=digits)
    theirs = sklearn_metrics.roc_curve(positive, scores, drop_intermediate=False)
    for ours, expected in zip(metrics.roc_curve(scores, positive), theirs, strict=True):
        assert ours == pytest.approx(expected)
    precision, recall, cuts = metrics.precision_recall_curve(scores, positive)
    expected = sklearn_metrics.precision_recall_curve(positive, scores)  # the other way round, and a point (1, 0) more
    assert precision[::-1] == pytest.approx(expected[0][:-1]) and recall[::-1] == pytest.approx(expected[1][:-1])
    assert cuts[::-1] == pytest.approx(expected[2])
    assert metrics.auroc(scores, positive) == pytest.approx(sklearn_metrics.roc_auc_score(positive, scores))
    average = sklearn_metrics.average_precision_score(positive, scores)
    assert metrics.average_precision(scores, positive) == pytest.approx(average)


def test_auroc_is_the_chance_that_a_positive_scores_higher():
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 5, 60), rng.integers(2, 8, 40)
    pairs = [(h > k) + 0.5 * (h == k) for k in low for h in high]
    assert metrics.auroc(np.append(low, high), np.arange(100) >= 60) == pytest.approx(np.mean(pairs))


def test_ranking_intervals_cover_95_percent_and_are_fast():
    truth, _ = metrics.ranking_figures(*ranked(200_000, 0.3, 15)).values()
    hits = 0
    for seed in range(200):
        figure = metrics.ranking_figures(*ranked(300, 0.3, 15, seed + 1))["auroc"]
        hits += figure["low"] <= truth["value"] <= figure["high"]
    assert 0.90 < hits / 200 < 0.99
    begin = time.process_time()
    first = metrics.ranking_figures(*ranked(5400, digits=15), seed=1)
    assert time.process_time() - begin < 3
    assert first == metrics.ranking_figures(*ranked(5400, digits=15), seed=1)
    assert first != metrics.ranking_figures(*ranked(5400, digits=15), seed=2)


def test_the_threshold_is_the_best_of_all_and_stays_at_a_half_without_need():
    scores, positive = ranked(500, digits=3)
    best = metrics.best_threshold(scores, positive)

    def balanced(cut: float) -> float:
        return float((scores[positive] >= cut).mean() + (scores[~positive] < cut).mean())

    assert balanced(best) == pytest.approx(max(balanced(cut) for cut in np.unique(scores)))
    assert best not in scores and balanced(best) > balanced(0.5)
    assert metrics.best_threshold(np.array([0.1, 0.2, 0.9]), np.array([False, False, True])) == 0.5
    assert metrics.best_threshold(np.array([0.6, 0.7, 0.9]), np.array([False, False, True])) == pytest.approx(0.8)
    assert metrics.best_threshold(np.array([0.3, 0.3]), np.array([False, True])) == 0.5  # no threshold helps


def two_classes(n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    logits, y = sample(n, k=2, temperature=2)
    return logits + np.array([1.5, 0]), y  # the first is thought more frequent than it is


def test_report_of_two_classes_has_ranking_and_thresholds():
    logits, y = two_classes()
    validation = metrics.classification_report(logits[::2], y[::2], ("fake", "real"), 2.0)
    binary = validation["binary"]
    assert json.loads(json.dumps(validation, allow_nan=False)) == validation
    assert binary["positive"] == "real" and binary["threshold"] < 0.4
    report = metrics.classification_report(logits[1::2], y[1::2], ("fake", "real"), 2.0, threshold=binary["threshold"])
    found, p, truth = report["binary"], metrics.softmax(logits[1::2] / 2)[:, 1], y[1::2]
    assert found["threshold"] == found["at_threshold"]["threshold"] == binary["threshold"]
    assert found["auroc"]["value"] == pytest.approx(sklearn_metrics.roc_auc_score(truth, p))
    assert found["share"] == truth.mean() and found["at_half"]["threshold"] == 0.5
    for name, cut in (("at_half", 0.5), ("at_threshold", binary["threshold"])):
        said, figures = p >= cut, {k: v["value"] for k, v in found[name].items() if k != "threshold"}
        expected = {
            "precision": sklearn_metrics.precision_score(truth, said),
            "recall": sklearn_metrics.recall_score(truth, said),
            "specificity": sklearn_metrics.recall_score(truth, said, pos_label=0),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(truth, said),
        }
        assert figures == pytest.approx(expected)
    assert found["at_half"]["recall"] == report["per_class"]["real"]["recall"]
    gain = [found[name]["balanced_accuracy"]["value"] for name in ("at_half", "at_threshold")]
    assert gain[1] > gain[0]
    figures = [found["auroc"], found["average_precision"], *(v for v in found["at_half"].values() if type(v) is dict)]
    assert all(f["low"] <= f["value"] <= f["high"] for f in figures)


def test_the_positive_class_is_the_later_in_sorted_order_wherever_it_stands():
    logits, y = two_classes()
    straight = metrics.classification_report(logits, y, ("fake", "real"), 2.0)["binary"]
    turned = metrics.classification_report(logits[:, ::-1], 1 - y, ("real", "fake"), 2.0)["binary"]
    assert turned == straight
    assert "binary" not in metrics.classification_report(*sample(50), CLASSES, 1.0)


def test_a_two_class_report_without_one_of_them_has_no_ranking():
    report = metrics.classification_report(np.array([[3.0, 0], [0, 1]]), np.array([0, 0]), ("a", "b"), 1.0)
    nothing = {"value": None, "low": None, "high": None}
    json.dumps(report, allow_nan=False)
    assert report["binary"]["auroc"] == report["binary"]["average_precision"] == nothing
    assert report["binary"]["threshold"] == 0.5 and report["binary"]["at_half"]["recall"] == nothing
    assert report["binary"]["at_half"]["specificity"]["value"] == 0.5


def test_report_of_one_tile_says_what_is_unknown():
    report = metrics.classification_report(np.array([[0.0, 3, 0, 0, 0]]), np.array([1]), CLASSES, 1.0)
    json.dumps(report, allow_nan=False)
    assert report["per_class"]["b"]["recall"]["value"] == 1 and report["per_class"]["b"]["recall"]["low"] < 0.3
    nothing = {"value": None, "low": None, "high": None}
    assert report["per_class"]["a"] == {"precision": nothing, "recall": nothing, "f1": nothing, "support": 0}


def test_mistakes_come_the_most_confident_first():
    p = np.array([[0.6, 0.4], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    y = np.array([1, 0, 1, 0])
    assert metrics.most_confident_mistakes(p, y, 2).tolist() == [1, 3]
    assert metrics.most_confident_mistakes(p, y, 99).tolist() == [1, 3, 0]
    assert metrics.most_confident_mistakes(p, p.argmax(1), 5).tolist() == []


GOOD, Y = np.eye(3), np.arange(3)
NAN, INF = GOOD.copy(), GOOD.copy()
NAN[1, 1], INF[0, 2] = np.nan, np.inf


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.fit_temperature(NAN, Y), "1 of 3 rows hold NaN"),
        (lambda: metrics.fit_temperature(INF, Y), "1 of 3 rows hold NaN or infinity"),
        (
            lambda: metrics.fit_temperature(np.zeros((0, 3)), np.zeros(0, int)),
            r"expected whole numbers of shape \(N,\)",
        ),
        (lambda: metrics.fit_temperature(GOOD, Y[:2]), "3 rows for 2 labels"),
        (lambda: metrics.fit_temperature(GOOD[0], Y), "expected \\(N, K\\)"),
        (lambda: metrics.classification_report(NAN, Y, "abc", 1.0), "NaN"),
        (lambda: metrics.classification_report(GOOD, Y, "ab", 1.0), "2 names for 3 logits"),
        (lambda: metrics.classification_report(GOOD, Y, "aab", 1.0), "one name for each"),
        (lambda: metrics.classification_report(GOOD, Y, "abc", 0.0), "temperature: got 0.0"),
        (lambda: metrics.confusion_matrix(Y, Y[:2], 3), "got 2 labels, expected 3"),
        (lambda: metrics.confusion_matrix(Y, Y, 2), "got labels 0..2, expected 0..1"),
        (lambda: metrics.confusion_matrix(Y, Y - 1, 3), "predicted: got labels -1..1"),
        (lambda: metrics.confusion_matrix(Y / 2, Y, 3), "got float64"),
        (lambda: metrics.brier_score(GOOD * 2, Y), "not distributions"),
        (lambda: metrics.most_confident_mistakes(GOOD - 0.5, Y, 3), "not distributions"),
        (lambda: metrics.auroc(np.array([0.1, 0.9]), np.array([True, True])), "2 of 2 tiles are positive"),
        (lambda: metrics.auroc(np.array([0.1, np.nan]), np.array([True, False])), "expected finite numbers"),
        (lambda: metrics.roc_curve(np.zeros(2), np.array([0, 1])), "int64"),
        (lambda: metrics.classification_report(GOOD[:2, :2], Y[:2], "ab", 1.0, threshold=1.5), "threshold: got 1.5"),
        (lambda: metrics.accuracy_interval(3, 2), "got 3 of 2"),
        (lambda: metrics.accuracy_interval(0, 0), "got 0 of 0"),
    ],
)
def test_bad_input_is_refused_with_the_reason(call, says):
    with pytest.raises(EurosatError, match=says):
        call()
