"""The two laws of DESIGN: imports go to smaller numbers only, and what serves never reaches the training stack."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "eurosat_mlops"
HEAVY = {"torch", "torchvision", "fastai", "timm", "matplotlib"}
LIGHT = {
    *range(12),
    13,
    14,
    *range(16, 20),
    21,
    22,
    *range(28, 31),
    32,
    33,
    34,
    36,
    37,
    38,
    *range(40, 60),
    *range(70, 95),
} - {55}

ROOMS = {path.stem[3:]: int(path.stem[:2]) for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))}
LIGHT_ROOMS = sorted(name for name, number in ROOMS.items() if number in LIGHT)


def imports_of(source: str) -> set[str]:
    "Full dotted names of everything a module of the package imports, inside functions too."
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [PACKAGE if node.level else "", node.module or ""]))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def rooms_of(imports: set[str]) -> set[str]:
    return {
        parts[1] for name in imports if (parts := name.split("."))[0] == PACKAGE and parts[1:2] and parts[1] in ROOMS
    }


def heavy_of(imports: set[str]) -> set[str]:
    "Imports that load the training stack: torch itself, and the likes of safetensors.torch."
    return {name for name in imports if name.split(".")[0] != PACKAGE and HEAVY & set(name.split(".")[:2])}


IMPORTS = {name: imports_of((ROOT / PACKAGE / f"{name}.py").read_text(encoding="utf-8")) for name in ROOMS}


def reach(name: str) -> set[str]:
    "All rooms that a room leads to, itself among them."
    seen: set[str] = set()
    todo = {name}
    while todo:
        seen |= todo
        todo = {room for one in todo for room in rooms_of(IMPORTS[one])} - seen
    return seen


def test_the_reader_sees_every_form_of_import() -> None:
    source = f"""
import os, {PACKAGE}.core
from {PACKAGE} import bands
def late():
    from .metrics import softmax
    from safetensors.torch import load
    from . import missing
    import torch.nn
"""
    imports = imports_of(source)
    assert rooms_of(imports) == {"core", "bands", "metrics"}
    assert heavy_of(imports) == {"torch.nn", "safetensors.torch.load"}
    assert not heavy_of({"eurosat_mlops.timm", "numpy.torch_like"})


def test_every_module_has_one_room_and_every_room_one_module() -> None:
    modules = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set(ROOMS)
    assert len(set(ROOMS.values())) == len(ROOMS), "two rooms share a number"
    for name, number in ROOMS.items():
        cells = json.loads((ROOT / "nbs" / f"{number:02}_{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        assert re.match(rf"#\|\s*default_exp {name}\s*$", "".join(cells[0]["source"])), f"{name}: another default_exp"


def test_law_1_imports_go_to_smaller_numbers() -> None:
    edges = [(name, room) for name in ROOMS for room in rooms_of(IMPORTS[name])]
    assert ("fetch", "data") in edges and len(edges) > len(ROOMS)
    assert [edge for edge in edges if ROOMS[edge[1]] >= ROOMS[edge[0]]] == []


def test_law_2_no_light_room_names_the_training_stack() -> None:
    assert {"core", "bands", "data", "synthetic", "fetch", "metrics", "bundle"} <= set(LIGHT_ROOMS)
    assert heavy_of(IMPORTS["learner"]), "the check would see nothing"
    reached = {(name, found) for name in LIGHT_ROOMS for room in reach(name) for found in heavy_of(IMPORTS[room])}
    assert reached == set()


@pytest.mark.parametrize("name", [*LIGHT_ROOMS, "cli"])
def test_law_2_importing_it_loads_no_training_stack(name: str) -> None:
    "The command line is held to it too: `eurosat --help` must not wait for torch."
    code = f"import sys, {PACKAGE}.{name}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""
