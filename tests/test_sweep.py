"""The search: what a sweep file may say, what a study remembers, and what is left when it is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import optuna
import pytest
import yaml
from PIL import Image

from eurosat_mlops.cli import main, make_parser
from eurosat_mlops.core import EurosatError, read_json, read_status
from eurosat_mlops.findings import find_importances, trial_table, write_best
from eurosat_mlops.learner import config_from
from eurosat_mlops.sweep import METRICS, counted_trials, next_trial, open_study, read_space, requeue, storage_url
from eurosat_mlops.trials import Sweep, choose_pruner, search, trial_folder

SWEEP = {
    "method": "random",
    "metric": {"name": "epoch/accuracy", "goal": "maximize"},
    "parameters": {"lr": {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1}, "epochs": {"value": 2}},
}
# what a run writes, without the training: the search sees no more of a run than this
PRETEND = """
import os, time
from pathlib import Path
from eurosat_mlops.core import EurosatError, new_run, write_json, write_status
from eurosat_mlops.track import append_history

run = new_run(None, "", out)
began = time.time()
if bs == 13:
    raise EurosatError("bs: 13 brings bad luck")
for epoch in range(1, epochs + 1):
    time.sleep(pause)
    append_history(run / "history.jsonl", {"epoch/accuracy": 1 - lr - 0.1 / epoch, "epoch/valid_loss": lr}, epoch)
write_json(run / "times.json", {"began": began, "ended": time.time(), "threads": os.environ["OMP_NUM_THREADS"]})
write_json(run / "metrics.json", {"validation": {"accuracy": {"value": 0.5}, "nll": lr}})
write_status(run, "finished")
"""


def pretend(folder: Path, pause: float) -> Path:
    parameters = f"lr = 0.01\nbs = 64\nepochs = 2\nname = ''\nout = ''\npause = {pause}"
    cells = [nbformat.v4.new_code_cell(parameters), nbformat.v4.new_code_cell(PRETEND)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "pretend.ipynb")
    return folder / "pretend.ipynb"


def space_of(folder: Path, fixed=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}))
    return read_space(folder / "space.yaml", fixed)


def sweep_in(folder: Path, trials: int, pause: float = 0.0, workers: int = 1, storage: str = "", **changes) -> Sweep:
    space = space_of(folder, **changes)
    study = open_study("s", space, storage_url(storage, folder), choose_pruner(space))
    return Sweep(folder, study, space, trials, workers, notebook=pretend(folder, pause))


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"method": "hyperopt"}, "method: got 'hyperopt', expected bayes, random or grid"),
        ({"program": "train.py", "agents": 3}, "agents: not a key"),
        ({"metric": {"name": "test/accuracy", "goal": "maximize"}}, "metric.*validation/accuracy"),
        ({"metric": {"name": "validation/accuracy"}}, "goal: got 'minimize'.*is to maximize"),
        ({"metric": {"name": "validation/nll", "goal": "maximize"}}, "is to minimize"),
        ({"metric": {"name": "validation/nll", "goal": "minimize", "impute": "best"}}, "impute"),
        ({"parameters": {}}, "nothing is left"),
        ({"parameters": ["lr"]}, "expected names"),
        ({"parameters": {"lr": 0.1}}, "lr: got 0.1, expected value, values, or min and max"),
        ({"parameters": {"learning_rate": {"values": [0.1]}}}, "learning_rate: no such parameter"),
        ({"parameters": {"lr": {"values": [0.1, 100]}}}, "lr: got 100.0, expected a number above 0 and at most 10"),
        ({"parameters": {"bs": {"distribution": "uniform", "min": 32, "max": 64}}}, "bs: got 32.0.*whole number"),
        ({"parameters": {"lr": {"min": 0.1, "max": 0.01}}}, "lr: min, max: got 0.1, 0.01"),
        ({"parameters": {"lr": {"min": "1e-3", "max": 0.1}}}, "lr: min: YAML reads 1e-3 as a text"),
        ({"parameters": {"lr": {"distribution": "normal", "mu": 0.1}}}, "'normal' has no counterpart"),
        ({"parameters": {"lr": {"distribution": "log_uniform", "min": -6, "max": -1}}}, "no counterpart"),
        ({"parameters": {"lr": {"distribution": "uniform", "min": 0.1}}}, "uniform: got min, expected max and min"),
        ({"parameters": {"bs": {"values": [32, 64], "probabilities": [0.9, 0.1]}}}, "categorical: got prob"),
        ({"parameters": {"bs": {"distribution": "q_uniform", "min": 20, "max": 64, "q": 16}}}, "multiples of q"),
        ({"parameters": {"bs": {"values": [[32]]}}}, "list of numbers or texts"),
        ({"parameters": {"out": {"values": ["a", "b"]}}}, "out: the sweep gives each trial its own"),
        ({"method": "grid"}, "lr: a grid needs values"),
        ({"early_terminate": {"type": "envelope"}}, "early_terminate.*hyperband"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "strict": True}}, "early_terminate"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "above 0"),
        ({"run_cap": "many"}, "run_cap"),
    ],
)
def test_a_bad_sweep_file_is_refused_with_its_place(tmp_path, changes, words):
    with pytest.raises(EurosatError, match=rf"space\.yaml: .*{words}"):
        space_of(tmp_path, **changes)


def test_kinds_of_parameters_become_what_optuna_has(tmp_path):
    kinds = {
        "lr": {"min": 0.001, "max": 0.1},
        "bs": {"distribution": "q_uniform", "min": 32, "max": 128, "q": 32},
        "shift": {"min": 0, "max": 8},
        "epochs": {"distribution": "q_log_uniform_values", "min": 2, "max": 64, "q": 1},
        "arch": {"values": ["tilenet_s", "resnet18"]},
        "wd": {"distribution": "constant", "value": 0.1},
    }
    space = space_of(tmp_path, {"data": "synthetic", "shift": 2}, parameters=kinds)
    assert space.fixed == {"wd": 0.1, "data": "synthetic", "shift": 2} and set(space.searched) == {*kinds} - {
        "wd",
        "shift",
    }
    assert space.searched["bs"] == optuna.distributions.IntDistribution(32, 128, step=32)
    assert space.searched["epochs"] == optuna.distributions.IntDistribution(2, 64, log=True)
    trial = next_trial(open_study("s", space, storage_url("", tmp_path)), space, 1)
    assert config_from(space.fixed | trial.params).bs in (32, 64, 96, 128)


def test_the_file_of_the_project_is_a_sweep_of_wandb_too(project):
    "W&B's own translation of it agrees with ours; its validator, the package `sweeps`, cannot live beside numpy 2."
    path = project / "nbs" / "experiments" / "sweep.yaml"
    space, found = read_space(path), yaml.safe_load(path.read_text())
    assert space.metric in METRICS and space.halving == (2, 2) and space.cap == found["run_cap"]
    from wandb.sdk.sweeps.scheduler.optuna import search_space_from_sweep_config

    theirs = search_space_from_sweep_config(found["parameters"])
    assert {name: theirs[name] for name in space.searched} == space.searched
    assert set(found["early_terminate"]) <= {"type", "min_iter", "max_iter", "s", "eta", "strict"}
    assert set(found["metric"]) <= {"name", "goal", "target"} and isinstance(found["program"], str)


def test_the_command_line_takes_what_an_agent_of_wandb_writes(project):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    found = yaml.safe_load((project / "nbs" / "experiments" / "sweep.yaml").read_text())
    drawn = {"lr": 0.0123, "label_smoothing": 1e-05, "bs": 64, "shift": 3, "wd": 0.1, "epochs": 8}
    args = create_sweep_command_args({"args": {name: {"value": value} for name, value in drawn.items()}})
    words = [
        w for word in create_sweep_command(found["command"]) for w in (args["args"] if word == "${args}" else [word])
    ]
    assert words[:2] == ["eurosat", "train"] and "--label_smoothing=1e-05" in words
    given = vars(make_parser("train").parse_args(words[1:]))
    assert {name: type(value)(given[name]) for name, value in drawn.items()} == drawn


def test_a_grid_is_every_combination_once_and_no_more(tmp_path):
    parameters = {"bs": {"values": [32, 64]}, "shift": {"min": 0, "max": 2}}
    space = space_of(tmp_path, method="grid", parameters=parameters)
    study = open_study("s", space, storage_url("", tmp_path))
    while trial := next_trial(study, space, len(space.grid)):
        failed = trial.number == 2
        study.tell(trial, None if failed else 0.5, optuna.trial.TrialState.FAIL if failed else None)
        if failed:
            requeue(study, study.trials[2])
    tried = sorted(tuple(t.params.values()) for t in counted_trials(study))
    assert tried == [(bs, shift) for bs in (32, 64) for shift in (0, 1, 2)] and len(study.trials) == 7


def test_what_is_drawn_depends_on_seed_and_number_alone(tmp_path):
    "So a search that goes on does not begin its random numbers anew."
    space = space_of(tmp_path / "a")

    def draw(folder: Path, seed: int, stops: tuple[int, ...]) -> list[float]:
        folder.mkdir(exist_ok=True)
        for stop in stops:
            study = open_study("s", space, storage_url("", folder))
            while trial := next_trial(study, space, stop, seed):
                study.tell(trial, 0.5)
        return [trial.params["lr"] for trial in study.trials]

    whole = draw(tmp_path / "a", 0, (4,))
    assert whole == draw(tmp_path / "b", 0, (2, 4)) != draw(tmp_path / "c", 1, (4,)) and len(set(whole)) == 4


def test_a_name_belongs_to_one_space(tmp_path):
    open_study("s", space_of(tmp_path), storage_url("", tmp_path))
    with pytest.raises(EurosatError, match="another space"):
        open_study("s", space_of(tmp_path, {"epochs": 3}), storage_url("", tmp_path))


@pytest.mark.parametrize(
    "url", ["postgresql://me:open-sesame@127.0.0.1:9/x", "oracle://me:open-sesame@h/x", "a://:open-sesame@:x"]
)
def test_a_password_is_never_said(tmp_path, url):
    with pytest.raises(EurosatError, match="storage: ") as error:
        open_study("s", space_of(tmp_path), storage_url(url, tmp_path))
    assert "sesame" not in str(error.value)


def test_the_others_go_on_when_a_trial_fails(tmp_path):
    sweep = sweep_in(tmp_path, 3, method="grid", parameters={"bs": {"values": [13, 32]}, "lr": {"value": 0.01}})
    study = search(sweep, "ERROR")
    assert states(study) == ["FAIL", "COMPLETE"], "a grid of two has two, whatever was asked for"
    failed = read_status(trial_folder(tmp_path, 0))
    assert failed["state"] == "failed" and "bad luck" in failed["reason"] + study.trials[0].user_attrs["reason"]
    assert config_from(yaml.safe_load(write_best(sweep).read_text())).bs == 32
    assert "| 1 | finished | 0.9400 | 2 |" in trial_table(study) and find_importances(study) == {}


def test_two_workers_share_cores_and_a_hopeless_trial_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    values = {"lr": {"values": [0.01, 0.02, 0.9]}, "epochs": {"value": 40}}
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    sweep = sweep_in(tmp_path, 3, 0.1, 2, method="grid", parameters=values, early_terminate=rule)
    study = search(sweep, "ERROR")
    assert states(study)[0] == "COMPLETE" and states(study)[2] == "PRUNED"
    stopped = trial_folder(tmp_path, 2)
    assert read_status(stopped)["state"] == "pruned" and "others were better" in read_status(stopped)["reason"]
    assert 2 <= len(study.trials[2].intermediate_values) < 40 and not (stopped / "metrics.json").exists()
    assert read_json(trial_folder(tmp_path, 0) / "times.json")["threads"] == "2"
    began = [trial.datetime_start for trial in study.trials]
    assert began[1] < study.trials[0].datetime_complete, "they ran at one time"
    assert study.best_trial.number in (0, 1) and len(study.trials[0].intermediate_values) == 40


SEARCH = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_sweep import search, sweep_in
try:
    search(sweep_in(Path({folder!r}), {trials}, {pause}, 2))
except KeyboardInterrupt:
    sys.exit(130)
"""


@contextmanager
def searching(folder: Path, trials: int, pause: float) -> Iterator[subprocess.Popen]:
    code = SEARCH.format(tests=str(Path(__file__).parent), folder=str(folder), trials=trials, pause=pause)
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        yield process
        process.kill()


def wait_until(condition, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_a_killed_search_goes_on_to_the_number_that_was_asked_for(tmp_path):
    "kill -9 in the middle: what ran is failed and tried again once, what was finished stays, and no kernel lives on."
    with searching(tmp_path, 4, 1.0):
        wait_until(lambda: len([*tmp_path.glob("trials/*/metrics.json")]) >= 2)
        wait_until(lambda: (trial_folder(tmp_path, 3) / "status.json").exists())
        kernels = [read_json(path)["pid"] for path in tmp_path.glob("trials/*/status.json")]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in kernels))
    sweep = sweep_in(tmp_path, 4)
    before = {trial.number: trial.value for trial in sweep.study.trials if trial.state.name == "COMPLETE"}
    lost = [trial for trial in sweep.study.trials if trial.state.name == "RUNNING"]
    assert len(before) >= 2 and lost
    study = search(sweep, "ERROR")
    assert [trial.state.name for trial in counted_trials(study)] == ["COMPLETE"] * 4
    assert all(study.trials[number].value == value for number, value in before.items())
    for trial in lost:
        assert read_status(trial_folder(tmp_path, trial.number))["reason"] == "killed before it ended"
        (again,) = [t for t in study.trials if t.user_attrs.get("again") == trial.number]
        assert again.params == trial.params and study.trials[trial.number].state.name == "FAIL"
    requeue(study, study.trials[again.number])
    assert len(study.trials) == 4 + len(lost), "a second kill is the fault of the trial"


def test_control_c_leaves_order(tmp_path):
    with searching(tmp_path, 3, 60) as process:
        wait_until(lambda: all((trial_folder(tmp_path, n) / "status.json").exists() for n in (0, 1)))
        kernels = [read_json(trial_folder(tmp_path, n) / "status.json")["pid"] for n in (0, 1)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=180) == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in kernels)
    study = sweep_in(tmp_path, 3).study
    assert states(study) == ["FAIL", "FAIL", "WAITING", "WAITING"] and len(counted_trials(study)) == 2
    assert {read_status(trial_folder(tmp_path, n))["reason"] for n in (0, 1)} == {"stopped with the search"}


@pytest.fixture
def few_tiles(tmp_path):
    "A folder of 3 x 20 plain tiles that a network learns at once."
    rng = np.random.default_rng(0)
    for number, label in enumerate(("red", "green", "blue")):
        (tmp_path / "tiles" / label).mkdir(parents=True)
        for i in range(20):
            tile = rng.integers(0, 80, (32, 32, 3), np.uint8)
            tile[..., number] += 120
            Image.fromarray(tile).save(tmp_path / "tiles" / label / f"{i}.png")
    return tmp_path / "tiles"


def test_the_command_searches_with_real_trainings_and_says_how_to_train_the_best(
    few_tiles, tmp_path, monkeypatch, capfd
):
    for name in [name for name in os.environ if name.startswith("EUROSAT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EUROSAT_STORAGE", "")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SWEEP))
    fixed = {"data": str(few_tiles), "epochs": 1, "bs": 8, "wandb": "off", "device": "cpu", "workers": 1}
    storage = ("--storage", f"sqlite:///{tmp_path}/open-sesame.db")
    words = [word for name, value in fixed.items() for word in ("-p", f"{name}={value}")]
    assert (
        main(["sweep", "-f", "space.yaml", "--name", "small", "--trials", "2", "--workers", "2", *storage, *words]) == 0
    )
    folder = tmp_path / "runs" / "sweep-small"
    said, found = capfd.readouterr().out, read_json(folder / "sweep.json")
    assert "eurosat train -f runs/sweep-small/best.yaml" in said and found["trials"] == 2
    runs = [trial_folder(folder, number) for number in (0, 1)]
    assert all((run / "bundle" / "model.onnx").is_file() and (run / "train.ipynb").is_file() for run in runs)
    assert (tmp_path / "runs" / "latest").resolve() == runs[found["best"]["number"]]
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert config_from(best).lr == found["best"]["parameters"]["lr"] and best["data"] == str(few_tiles)
    metrics = read_json(runs[found["best"]["number"]] / "metrics.json")
    assert metrics["test"] == {} and found["best"]["value"] == pytest.approx(metrics["validation"]["accuracy"]["value"])
    assert {path.name for path in (folder / "figures").iterdir()} == {"search.png", "slices.png"}
    history = (runs[0] / "history.jsonl").read_text()
    for name, (_, figure) in METRICS.items():  # each is in what runs write, of the validation part
        place, _, key = name.partition("/")
        assert key in metrics["validation"] if place == "validation" else f'"{name}"' in history
        assert not figure or f'"{figure}"' in history
    kept = (folder / "sweep.ipynb").read_text()
    assert "open-sesame" not in kept and (tmp_path / "open-sesame.db").is_file(), "what may hold a password is not kept"
