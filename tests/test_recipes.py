"""Recipes by several seeds: what is planned, what is trained again, and what the table says."""

from pathlib import Path

import nbformat
import pytest
from scipy import stats

from eurosat_mlops.core import EurosatError, read_json, write_json, write_status
from eurosat_mlops.learner import config_from
from eurosat_mlops.recipes import (
    ablation_table,
    finished_folder,
    is_finished,
    plan_ablation,
    plan_seeds,
    read_row,
    recipe_table,
    seed_mean,
    summarize,
    train_planned,
)
from eurosat_mlops.training_verbs import read_parameters

EXPERIMENTS = Path(__file__).resolve().parents[1] / "nbs" / "experiments"
# what a run leaves, without the training
PRETEND = """
import os
from pathlib import Path
from eurosat_mlops.core import new_run, write_json, write_status

run = new_run(None, "", out)
if seed == 1:
    raise ValueError("the network burnt down")
write_json(run / "threads.json", {"threads": os.environ["OMP_NUM_THREADS"]})
write_status(run, "finished")
"""


@pytest.fixture
def pretend(tmp_path: Path) -> Path:
    cells = [nbformat.v4.new_code_cell("seed = 0\nepochs = 1\nname = ''\nout = ''"), nbformat.v4.new_code_cell(PRETEND)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "pretend.ipynb")
    return tmp_path / "pretend.ipynb"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_file_can_be_trained(path: Path) -> None:
    if path.stem == "sweep":
        return  # a search space, see test_sweep
    if path.stem == "ablation":
        assert len({run.name for run in plan_ablation(path)}) == 2 * len(read_parameters(path)["changes"])
    else:
        assert config_from(read_parameters(path)).name == path.stem


def test_a_change_of_an_ablation_that_is_no_parameter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("epochs: 1\n")
    (tmp_path / "a.yaml").write_text("file: base.yaml\nall: {}\nchanges:\n  typo: {smoothing: 0.1}\n")
    with pytest.raises(EurosatError, match="smoothing: no such parameter"):
        plan_ablation(tmp_path / "a.yaml")


def test_a_fault_is_named_the_others_go_on_and_only_what_is_missing_is_trained_again(
    tmp_path: Path, pretend: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "e.yaml").write_text("epochs: 1\n")
    planned, study = plan_seeds([tmp_path / "e.yaml"], 3), tmp_path / "study"
    done = train_planned(planned, study, workers=2, notebook=pretend)
    assert set(done) == {"e-0", "e-2"}
    assert "e-1: ValueError: the network burnt down" in caplog.text
    before = {name: (folder / "status.json").stat().st_mtime_ns for name, folder in done.items()}
    again = train_planned(planned[:2], study, notebook=pretend)
    assert again == {"e-0": done["e-0"]}
    assert (study / "e-1-again1").is_dir(), "a folder that a run has failed in is not used again"
    assert {name: (folder / "status.json").stat().st_mtime_ns for name, folder in done.items()} == before
    assert int(read_json(done["e-0"] / "threads.json")["threads"]) >= 1


def test_the_first_seed_does_not_pass_for_the_tenth(tmp_path: Path) -> None:
    (tmp_path / "e-10").mkdir()
    write_status(tmp_path / "e-10", "finished")
    assert is_finished(tmp_path / "e-10") and finished_folder(tmp_path / "e-1") is None


def row(split: str, seed: int, test: float | None, group: str = "quick") -> dict[str, object]:
    same = {"arch": "tilenet_m", "parameters": 682_270, "epochs": 20, "machine": "1 CPU threads, bf16"}
    return {"group": group, "split": split, "seed": seed, "test": test, "validation": test, "seconds": 10.0 + seed} | {
        **same,
        "commit": "abc",
    }


def test_the_mean_over_seeds_has_students_interval() -> None:
    values = [0.97, 0.98, 0.975, 0.972, 0.979]
    found = seed_mean(values)
    low, high = stats.t.interval(0.95, 4, loc=found["value"], scale=stats.sem(values))
    assert found["low"] == pytest.approx(low) and found["high"] == pytest.approx(high)


def test_splits_are_never_mixed_in_a_mean_and_what_was_not_tested_is_left_out() -> None:
    rows = [row("random", 0, 0.98), row("spatial", 0, 0.91), row("random", 1, 0.97), row("random", 2, None)]
    summary = summarize(rows)
    assert [(each["split"], each["seeds"]) for each in summary] == [("random", 2), ("spatial", 1)]
    table = recipe_table(summary)
    assert "97.50 (" in table and "| 91.00 |" in table, "one seed has no interval"


def test_a_change_is_read_against_the_recipe_on_its_own_split() -> None:
    rows = [row("random", 0, 0.97), row("spatial", 0, 0.92), row("spatial", 0, 0.90, "no turning")]
    assert "| no turning |  | 90.00 (-2.00) |" in ablation_table(rows)


def test_a_row_says_what_was_not_evaluated(tmp_path: Path) -> None:
    training = {"parameters": 1, "epochs": 1, "seconds": 1.0, "machine": "m"}
    found = {"data": {"split": "random"}, "validation": {"accuracy": {"value": 0.9}}, "test": {}, "training": training}
    write_json(tmp_path / "metrics.json", found | {"provenance": {"git_commit": None}})
    write_json(tmp_path / "config.json", {"seed": 3, "arch": "a"})
    (tmp_path / "history.jsonl").write_text('{"step": 1, "epoch/accuracy": 0.9}\n')
    (planned,) = plan_seeds([EXPERIMENTS / "quick.yaml"], 1)
    found_row = read_row(planned, tmp_path)
    assert found_row["test"] is None and found_row["commit"] == "" and found_row["seed"] == 3
