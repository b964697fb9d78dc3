"""What the service promises, tried by doing harm to it: each trial at its small size; in full: `make chaos`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eurosat_mlops.chaos import TRIALS, try_it
from eurosat_mlops.cli import main

TIMED = {"what is answered is answered within 250 ms"}  # that is for `make chaos`, on a machine that does nothing else


@pytest.mark.parametrize("name", TRIALS)
def test_a_promise_holds(name: str, bundle_folder: Path, tmp_path: Path) -> None:
    outcome = try_it(name, bundle_folder, tmp_path, quick=True)
    assert set(outcome.failed) <= TIMED, outcome.measured


def test_the_command_shows_a_table_and_leaves_a_file(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EUROSAT_RUNS_DIR", str(tmp_path))
    assert main(["chaos", "--model", str(bundle_folder), "--only", "flipped", "--quick"]) == 0
    found = json.loads(next(tmp_path.glob("*chaos*/chaos.json")).read_text())
    assert [each["name"] for each in found["outcomes"]] == ["flipped"] and found["outcomes"][0]["passed"]
    assert "all refused" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from eurosat_mlops.cli import main; sys.exit(main())", "chaos"]
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        env=os.environ | {"EUROSAT_RUNS_DIR": str(tmp_path / "runs")},
    )
    assert done.returncode == 2 and "no bundle here" in done.stderr and not (tmp_path / "runs").exists()
