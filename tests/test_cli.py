"""The command line and papermill, as a person calls them."""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.cli import VERBS, diagnose, main
from eurosat_mlops.core import read_json
from eurosat_mlops.synthetic import make_synthetic
from eurosat_mlops.training_verbs import add_release

SMALL = ["--data", "synthetic", "--epochs", "1", "--bs", "64", "--wandb", "off"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    "An empty folder, away from the project, with nothing set."
    for name in [n for n in os.environ if n.startswith("EUROSAT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def papermill(project: Path, place: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(project / "nbs" / "train.ipynb"), "out.ipynb", "-k", "python3"]
    return subprocess.run([*command, *words], cwd=place, capture_output=True, text=True)


def test_train_and_evaluate_leave_notebooks_figures_and_metrics(place, capfd):
    assert main(["train", *SMALL, "--lr", "1e-3", "--name", "cli"]) == 0
    (run,) = place.glob("runs/*-cli")
    assert read_json(run / "config.json")["lr"] == 0.001 and (place / "runs" / "latest").resolve() == run
    assert main(["evaluate", "--corruptions", "8"]) == 0
    assert {p.name for p in run.glob("*.ipynb")} == {"train.ipynb", "evaluate.ipynb"}
    figures = {p.name for p in (run / "figures").iterdir()}
    assert {"history.png", "confusion-test.png", "reliability-test.png", "robustness-test.png"} <= figures
    assert {"coverage-test.png", "map-test.png"} <= figures
    trust = read_json(run / "metrics.json")["trust"]["stratified"]
    assert trust["selective"]["stated_coverage"] == 0.95 and trust["calibration"][0]["bins"] == 5
    listed = (run / "suspicious_labels.csv").read_text(encoding="utf-8").splitlines()
    assert len(listed) - 1 == sum(part["n"] for part in trust["flagged"].values())
    printed = capfd.readouterr().out
    harmed = read_json(run / "metrics.json")["test"]["stratified"]["robustness"]
    assert harmed["tiles"] == 8 and len(harmed["kinds"]) == 12 and "mean corruption error" in printed
    assert "test, stratified" in printed and "metrics.json" in printed and "NOTE" in printed and "synthetic" in printed


@pytest.mark.parametrize(
    "words, said",
    [
        (["train", "--lr", "fast"], "lr: got 'fast', expected a number above 0"),
        (["train", "--epochs", "0"], "epochs: got 0, expected a whole number, 1 to 10000"),
        (["train", "--epochs", "1.5"], "epochs: got '1.5'"),
        (["train", "-f", "none.yaml"], "none.yaml"),
        (["train", "-f", "list.yaml"], "list.yaml: got list"),
        (["evaluate"], "train one first"),
        (["release", "--run", "yesterday"], "train one first"),
        (["data", "verify"], "eurosat data fetch"),
        (["data", "inspect", "pictures"], "pictures: no such file or folder"),
        (["predict", "production", "tiles"], "tiles: no such file or folder"),
        (["predict", "production", "empty"], "empty: no image found"),
        (["predict", "production", "tile.png"], "production"),
        (["predict", "no/bundle", "tile.png"], "no bundle here"),
        (["predict", "production", "tile.png", "--out", "answers.xlsx"], "does not say a format"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(place, capsys, words, said):
    (place / "list.yaml").write_text("- 1\n")
    (place / "empty").mkdir()
    Image.new("RGB", (64, 64)).save(place / "tile.png")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and not (place / "runs").exists()


def test_a_mistake_that_shows_late_is_a_sentence_too(place, capfd):
    (place / "empty").mkdir()
    assert main(["train", "--data", str(place / "empty"), "--wandb", "off"]) == 2
    assert "eurosat: " in capfd.readouterr().err.splitlines()[-1]
    (run,) = (place / "runs").iterdir()
    status = read_json(run / "status.json")
    assert status["state"] == "failed" and "empty" in status["reason"]


def test_a_file_of_parameters_comes_before_flags(place, project):
    shutil.copy(project / "nbs" / "experiments" / "smoke.yaml", place / "smoke.yaml")
    assert main(["train", "-f", "smoke.yaml", "--epochs", "1"]) == 0
    (run,) = place.glob("runs/*-smoke")
    config = read_json(run / "config.json")
    assert (config["data"], config["epochs"], config["bs"]) == ("synthetic", 1, 32)


def test_inspect_says_what_is_in_a_folder_and_what_a_run_would_do(place, capsys):
    tiles = make_synthetic(per_class=12, size=40)
    for row, label in enumerate(tiles.labels):
        home = place / "own" / tiles.classes[label]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tiles.tiles[row]).save(home / f"{row}.png")
    (place / "own" / "Forest" / "broken.png").write_bytes(b"no picture")
    assert main(["data", "inspect", "own", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "left out: 1, such as Forest/broken.png" in printed and "40 px, 0 of 120 resized" in printed
    (run,) = (place / "runs").iterdir()
    found = read_json(run / "data.json")
    assert found["plan"]["split"].startswith("drawn by content") and (run / "inspect.ipynb").is_file()
    assert not (place / "runs" / "latest").exists()  # nothing was trained


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_flags_and_its_work(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0 and VERBS[verb][0] in " ".join(capsys.readouterr().out.split())
    module = import_module(f"eurosat_mlops.{VERBS[verb][1]}")
    assert callable(getattr(module, f"add_{verb}")) and callable(getattr(module, f"run_{verb}"))


def test_the_flags_of_release_are_parameters_of_its_notebook(project):
    parser = argparse.ArgumentParser()
    add_release(parser)
    cells = read_json(project / "nbs" / "release.ipynb")["cells"]
    (parameters,) = ("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    assert set(vars(parser.parse_args([]))) == {line.split(" = ")[0] for line in parameters.splitlines()}


def test_a_wrong_verb_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2


def test_the_command_starts_without_torch():
    code = "import sys; from eurosat_mlops.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'fastai', 'timm', 'wandb', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_doctor_names_what_it_finds(place, capsys, monkeypatch):
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_API_KEY", "planted-key-0123456789")
    monkeypatch.setenv("EUROSAT_ARCHIVE", "nowhere.zip")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "FAULT" in printed and "nowhere.zip" in printed and "planted" not in printed
    assert {what for what, _, _ in diagnose()} >= {"python", "disk", "torch", "device", "data", "tracking"}


def test_papermill_records_the_parameter_from_a_folder_of_ones_own(place, project):
    given = ["-p", "lr", "1e-3", "-p", "data", "synthetic", "-p", "epochs", "1", "-p", "wandb", "off"]
    done = papermill(project, place, *given)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (p for p in place.glob("runs/*-train"))
    assert read_json(run / "config.json")["lr"] == 0.001 and (place / "out.ipynb").exists()


@pytest.mark.parametrize(
    "given, said",
    [
        (["learning_rate", "1e-3"], "learning_rate: no such parameter"),
        (["lr", "fast"], "lr: got 'fast', expected a number above 0"),
        (["epochs", "0"], "epochs: got 0, expected a whole number, 1 to 10000"),
    ],
)
def test_papermill_stops_at_what_is_no_parameter(place, project, given, said):
    done = papermill(project, place, "-p", *given)
    assert done.returncode == 1 and said in done.stderr and not (place / "runs").exists()


def test_papermill_takes_a_file_of_parameters(place, project):
    done = papermill(project, place, "-f", str(project / "nbs" / "experiments" / "smoke.yaml"), "-p", "epochs", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(place.glob("runs/*-smoke/metrics.json"))) == 1


def test_fetched_data_is_reported_and_pinned(eurosat_settings, project, place, capsys, monkeypatch):
    subprocess.run(["git", "init", "-q"], check=True)
    for name in (".dvc", ".dvcignore", "data.dvc", "settings.ini"):
        (shutil.copytree if (project / name).is_dir() else shutil.copy)(project / name, place / name)
    shutil.copytree(eurosat_settings.data_dir, place / "data")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    assert main(["data", "fetch"]) == 0
    printed = capsys.readouterr()
    assert "27,000 tiles" in printed.out and "leaks between the parts of the spatial split: 0" in printed.out
    status = subprocess.run([sys.executable, "-m", "dvc", "status"], capture_output=True, text=True, check=True)
    assert "up to date" in status.stdout and "Error" not in printed.err  # a slow machine shows its progress there
    assert main(["data", "verify"]) == 0


@pytest.fixture
def tiles(place):
    "Five tiles in a folder, one of them in a folder below."
    for row, tile in enumerate(make_synthetic(per_class=3, seed=5).tiles[::6]):
        (place / "tiles" / "more").mkdir(parents=True, exist_ok=True)
        Image.fromarray(tile).save(place / "tiles" / ("more" if row == 3 else ".") / f"tile_{row}.png")
    return place / "tiles"


def test_predict_on_the_screen(bundle_folder, tiles, capsys):
    assert main(["predict", str(bundle_folder), "tiles", "--top", "2"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["label", "confidence", "label", "2", "doubt", "name"]
    assert [line.split("tiles/")[1] for line in lines[1:]] == [f"tile_{n}.png" for n in (0, 1, 2, 4)] + [
        "more/tile_3.png"
    ]
    assert "synthetic" in captured.err, "whose model was trained on synthetic tiles must be told"


def test_predict_takes_a_run_and_one_picture_on_standard_input(bundle_folder, tiles):
    code = "import sys; from eurosat_mlops.cli import main; status = main(); "
    code += (
        "sys.exit(3 if {'torch', 'fastai', 'timm', 'matplotlib', 'pyarrow', 'wandb'} & set(sys.modules) else status)"
    )
    command = [sys.executable, "-c", code, "predict", str(bundle_folder.parent), "-", "--format", "jsonl"]
    done = subprocess.run(command, input=(tiles / "tile_0.png").read_bytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["name"] == "stdin" and row["confidence"] == max(row["probabilities"].values())
    nothing = subprocess.run(command, input=b"", capture_output=True, text=False)
    assert nothing.returncode == 1 and b"stdin: " in nothing.stderr and not nothing.stdout


def test_predict_lists_what_it_could_not_read_and_writes_the_others(bundle_folder, tiles, capsys):
    (tiles / "tile_1.png").write_text("River, 2019")
    Image.new("RGB", (96, 64)).save(tiles / "wide.png")
    for form in ("csv", "jsonl", "txt"):
        assert main(["predict", str(bundle_folder), "tiles", "--out", f"new/answers.{form}"]) == 1
        captured = capsys.readouterr()
        assert f"4 answers: new/answers.{form}" in captured.out
        said = captured.err.split("2 could not be read:")[1]
        assert "tiles/tile_1.png: " in said and "tiles/wide.png: 96 x 64 px, expected 64 x 64" in said
    with open("new/answers.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert sorted(os.listdir("new")) == ["answers.csv", "answers.jsonl", "answers.txt"]
    (tiles / "tile_1.png").unlink()
    assert main(["predict", str(bundle_folder), "tiles", "--resize"]) == 0


def test_predict_averages_and_explains(bundle_folder, tiles, capsys):
    words = ["predict", str(bundle_folder), "tiles", "--format", "jsonl"]
    assert main(words) == 0 and main([*words, "--average", "--explain", "why"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows[:5]] == [row["name"] for row in rows[5:]] and rows[:5] != rows[5:]
    assert len(list(Path("why").glob("tile_*.png"))) == 5


def test_predict_does_not_mix_two_precisions_or_options_in_one_file(bundle_folder, tiles, capsys):
    words = ["predict", str(bundle_folder), "tiles", "--out", "answers.csv"]
    header = {"begun": 0, "columns": [], "bundle": "f" * 64, "precision": "fp32", "average": False, "resize": False}
    Path("answers.csv.partial").write_text(json.dumps(header) + "\n")
    assert main(words) == 2
    assert "another model" in capsys.readouterr().err and not Path("answers.csv").exists()
    Path("answers.csv.partial").unlink()
    assert main(words) == 0 and main([*words, "--precision", "int4"]) == 2
    assert main([*words, "--top", "11"]) == 2 and "expected 1 to 10" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(bundle_folder, tiles):
    run = "import sys; from eurosat_mlops.cli import main; sys.exit(main())"
    command = f"{sys.executable} -c '{run}' predict {bundle_folder} {'tiles ' * 400} --format jsonl | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_a_released_model_is_predicted_with_by_its_alias(bundle_folder, tiles, capsys):
    id = read_bundle(bundle_folder).id
    assert main(["predict", "candidate", "tiles"]) == 2
    assert main(["registry", "add", str(bundle_folder)]) == 0
    assert main(["registry", "promote", id[:12], "candidate", "--why", "a test"]) == 0
    capsys.readouterr()
    screens = []
    for ref in ("candidate", id[:12], id, str(bundle_folder)):
        assert main(["predict", ref, "tiles"]) == 0
        screens.append(capsys.readouterr().out)
    assert len(set(screens)) == 1 and "tiles/more/tile_3.png" in screens[0]
