"""Lets `pytest --nbval-lax nbs` run the notebooks as nbdev keeps them, away from the checkout's own runs."""

import os
import re
import tempfile

import pytest

SKIP = re.compile(r"^#\|\s*(slow|gpu|net|notest|eval:\s*false)\b", re.MULTILINE)


def pytest_configure(config: pytest.Config) -> None:
    "Notebooks under test shrink (`IN_TEST`), and what they write goes to a folder that vanishes."
    if getattr(config.option, "nbval_lax", False):
        folder = tempfile.TemporaryDirectory(prefix="eurosat-notebooks-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ |= {"IN_TEST": "1", "TMPDIR": folder.name, "EUROSAT_RUNS_DIR": f"{folder.name}/runs"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Skip the cells that are marked, and give the others the execution count that nbdev-clean took."
    for item in items:
        if (cell := getattr(item, "cell", None)) is None:
            continue
        if found := SKIP.search(cell.source):
            item.add_marker(pytest.mark.skip(reason=f"the cell is marked #| {found[1]}"))
        elif cell.outputs:
            cell.execution_count = 1
