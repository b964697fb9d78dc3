"Two classes of ordinary pictures, trained for a moment: the threshold is chosen on validation, and measured on test."

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="training needs torch: pip install 'eurosat-mlops[train]'")

from eurosat_mlops.bundle import read_bundle, update_bundle
from eurosat_mlops.core import Settings, read_json
from eurosat_mlops.learner import TrainConfig
from eurosat_mlops.metrics import best_threshold
from eurosat_mlops.plots import plot_ranking
from eurosat_mlops.runs import Evaluation, Run, answer_part, evaluate, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Evaluation]:
    root, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    for name, count, light in (("dark", 300, 100), ("light", 40, 112)):  # rare and hard to tell
        (root / "pictures" / name).mkdir(parents=True)
        for row in range(count):
            pixels = np.clip(rng.normal(light + rng.normal(0, 8), 30, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / name / f"{row}.png")
    settings = Settings(root, runs_dir=root / "runs", data_dir=root / "data", wandb="off", log_level="ERROR")
    quick = {"epochs": 2, "bs": 32, "ema": 0.5, "size": 16, "shift": 0, "wandb": "off", "device": "cpu"}
    run = train(TrainConfig(data=str(root / "pictures"), **quick), settings=settings)
    return run, evaluate(run.folder, settings=settings)


def test_the_threshold_of_validation_is_carried_to_the_test_part(trained: tuple[Run, Evaluation]) -> None:
    run, evaluation = trained
    validation = read_json(run.folder / "metrics.json")["validation"]["binary"]
    test = read_json(run.folder / "metrics.json")["test"]["stratified"]["binary"]
    bundle = read_bundle(run.folder / "bundle")
    assert bundle.info["metrics"]["validation"]["binary"] == validation and validation["positive"] == "light"
    scores, positive = run.validation.probabilities[:, 1], run.validation.labels == 1
    assert validation["threshold"] == pytest.approx(best_threshold(scores, positive), abs=1e-6)
    assert test["threshold"] == test["at_threshold"]["threshold"] == validation["threshold"]
    said = evaluation.test.probabilities[:, 1] >= validation["threshold"]
    assert test["at_threshold"]["recall"]["value"] == said[evaluation.test.labels == 1].mean()


def test_the_answer_stays_the_most_probable_class(trained: tuple[Run, Evaluation]) -> None:
    test = trained[1].test
    report = trained[1].metrics["test"]["stratified"]
    right = int((test.probabilities.argmax(1) == test.labels).sum())
    assert report["accuracy"]["value"] == right / len(test.labels)
    assert report["binary"]["at_half"]["recall"] == report["per_class"]["light"]["recall"]


def test_card_and_picture_show_both_thresholds(trained: tuple[Run, Evaluation]) -> None:
    evaluation = trained[1]
    binary = evaluation.metrics["test"]["stratified"]["binary"]
    card = (evaluation.bundle.folder / "card.md").read_text(encoding="utf-8")
    assert card.startswith("# Picture classifier") and "light is the positive one" in card and "Sentinel" not in card
    assert f"test, stratified, light from {binary['threshold']:.3f} on" in card
    figure = plot_ranking(evaluation.test.probabilities[:, 1], evaluation.test.labels == 1, binary)
    assert f"chosen: {binary['threshold']:.3f}" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_bundle_without_a_threshold_never_gets_one_from_the_test_part(trained: tuple[Run, Evaluation]) -> None:
    run, evaluation = trained
    figures = evaluation.bundle.info["metrics"]["validation"]
    older = {"validation": {name: value for name, value in figures.items() if name != "binary"}}
    bundle = update_bundle(evaluation.bundle.folder, {"metrics": older}, {})
    assert answer_part(bundle, run.tileset, "test")[1]["binary"]["threshold"] == 0.5
