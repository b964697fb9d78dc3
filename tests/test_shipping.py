"""From a run on real tiles to the label on the command line: the whole way, nothing replaced."""

import csv
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eurosat_mlops.bundle import bundle_answers, read_bundle
from eurosat_mlops.core import Settings
from eurosat_mlops.data import TileSet
from eurosat_mlops.fetch import ARCHIVE, load_eurosat
from eurosat_mlops.predict import load_bundle


@pytest.fixture(scope="module")
def tileset(eurosat_settings: Settings) -> TileSet:
    "EuroSAT with a fifth of its training part, so that a test can train on it."
    whole = load_eurosat(eurosat_settings, "random")
    return replace(whole, parts=whole.parts | {"train": whole.parts["train"][::5], "val": whole.parts["val"][::3]})


@pytest.fixture(scope="module")
def released(eurosat_settings: Settings, tileset: TileSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    "A project with one evaluated run, int8 added, its bundle promoted to production by the command line."
    from eurosat_mlops.learner import TrainConfig
    from eurosat_mlops.release import add_int8, open_candidate
    from eurosat_mlops.runs import evaluate, train

    root = tmp_path_factory.mktemp("released")
    settings = replace(eurosat_settings, runs_dir=root / "runs", models_dir=root / "models")
    config = TrainConfig(data="eurosat", epochs=4, bs=64, ema=0.9, wandb="off", device="cpu", name="golden")
    run = train(config, tileset, settings)
    add_int8(open_candidate(run.folder, settings))
    evaluate(run.folder, settings=settings)
    (root / "settings.ini").write_text("[eurosat]\nwandb = off\n")
    for words in (
        ["registry", "add", str(run.folder)],
        ["registry", "promote", "VERSION", "production", "--why", "test"],
    ):
        version = read_bundle(run.folder / "bundle").id
        done = eurosat(root, *[version if word == "VERSION" else word for word in words])
        assert done.returncode == 0, done.stdout + done.stderr
    yield root


def eurosat(root: Path, *words: str, **given) -> subprocess.CompletedProcess[str]:
    "The command line in a process of its own, in that project."
    env = {name: value for name, value in os.environ.items() if not name.startswith("EUROSAT_")}
    command = [str(Path(sys.executable).parent / "eurosat"), *words]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300, **given)


def write_tiles(settings: Settings, names: list[str], folder: Path) -> None:
    "Original files of EuroSAT as folder/<Class>/<name>."
    with zipfile.ZipFile(settings.data_dir / ARCHIVE) as archive:
        members = {Path(member).name: member for member in archive.namelist()}
        for name in names:
            (folder / name.split("_")[0]).mkdir(parents=True, exist_ok=True)
            (folder / name.split("_")[0] / name).write_bytes(archive.read(members[name]))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_real_tile_of_each_class_comes_out_as_the_folder_it_came_from(
    released: Path, eurosat_settings: Settings, tileset: TileSet, tmp_path: Path
) -> None:
    bundle = read_bundle(released / "runs" / "latest" / "bundle")
    assert set(bundle.info["graphs"]) == {"fp32", "int8"} and bundle.info["data"]["name"] == "eurosat"
    labels, predicted = bundle_answers(bundle, "test, random")
    rows = tileset.parts["test"]
    golden = [int(rows[np.flatnonzero((labels == k) & (predicted == k))[0]]) for k in range(10)]
    write_tiles(eurosat_settings, [tileset.names[row] for row in golden], tmp_path / "tiles")
    for source in ("production", bundle.id[:12], str(released / "runs" / "latest")):
        out = tmp_path / f"{len(source)}.csv"
        done = eurosat(released, "predict", source, str(tmp_path / "tiles"), "--out", str(out), "--format", "csv")
        assert done.returncode == 0, done.stderr
        found = {Path(row["name"]).parent.name: row["label"] for row in read_csv(out)}
        assert len(found) == 10 and all(folder == label for folder, label in found.items()), found


def test_a_folder_of_all_test_tiles_gives_the_figure_of_the_run(
    released: Path, eurosat_settings: Settings, tileset: TileSet, tmp_path: Path
) -> None:
    names = [tileset.names[row] for row in tileset.parts["test"]]
    write_tiles(eurosat_settings, names, tmp_path / "tiles")
    out = tmp_path / "answers.csv"
    done = eurosat(released, "predict", "production", str(tmp_path / "tiles"), "--out", str(out), "--format", "csv")
    assert done.returncode == 0, done.stderr
    rows = read_csv(out)
    right = sum(Path(row["name"]).parent.name == row["label"] for row in rows)
    report = read_bundle(released / "runs" / "latest" / "bundle").info["metrics"]["test, random"]
    assert len(rows) == report["n"] == 5400
    assert right / len(rows) == report["accuracy"]["value"]


def test_predicting_changes_nothing_in_the_model(released: Path, tileset: TileSet) -> None:
    folder = released / "runs" / "latest" / "bundle"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    classifier = load_bundle(folder)
    tiles = tileset.part("val")[0][:200]
    first = classifier.predict(tiles)
    for start in range(0, 200, 7):
        classifier.predict(tiles[start : start + 7], averaging=True)
    again = classifier.predict(tiles)
    assert first.probabilities.tobytes() == again.probabilities.tobytes()
    assert (
        first.embedding.tobytes() == again.embedding.tobytes() and first.distance.tobytes() == again.distance.tobytes()
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_pictures_of_other_things_are_unfamiliar(released: Path, tileset: TileSet, project: Path) -> None:
    sample = project.parent / "shared" / "data" / "cifake_sample.zip"
    if not sample.exists():
        pytest.skip("the CIFAKE sample is not here")
    from eurosat_mlops.metrics import auroc
    from eurosat_mlops.predict import read_tile

    classifier = load_bundle(released / "runs" / "latest")
    with zipfile.ZipFile(sample) as archive:
        names = [name for name in archive.namelist() if name.endswith((".jpg", ".png"))][:200]
        other = np.stack([read_tile(archive.read(n), classifier.contract, n, resize=True) for n in names])
    known = classifier.predict(tileset.part("test")[0][:500])
    unknown = classifier.predict(other)
    distance = np.concatenate([known.distance, unknown.distance])
    assert auroc(distance, np.arange(len(distance)) >= len(known)) > 0.9
    assert known.unfamiliar.mean() < 0.05 < unknown.unfamiliar.mean()
