"""The command line and papermill, as a person calls them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eurosat_mlops.cli import diagnose, main
from eurosat_mlops.core import read_json

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
    assert main(["evaluate"]) == 0
    assert {p.name for p in run.glob("*.ipynb")} == {"train.ipynb", "evaluate.ipynb"}
    figures = {p.name for p in (run / "figures").iterdir()}
    assert {"history.png", "confusion-test.png", "reliability-test.png"} <= figures
    printed = capfd.readouterr().out
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
        (["data", "verify"], "eurosat data fetch"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(place, capsys, words, said):
    (place / "list.yaml").write_text("- 1\n")
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
    assert "up to date" in status.stdout and not printed.err
    assert main(["data", "verify"]) == 0
