"""The house rules: notebooks as STYLE wants them, copies of a fact that agree, no secret and no machine."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from dataclasses import fields
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import eurosat_mlops
from eurosat_mlops.core import Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
ROOMS = [path for path in NOTEBOOKS if path.name[0].isdigit()]
RUNS = [path for path in NOTEBOOKS if path not in ROOMS]
MODULES = sorted(path for path in (ROOT / "eurosat_mlops").glob("*.py") if path.name != "_modidx.py")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

EXPORT = re.compile(r"^#\|\s*exports?\b", re.MULTILINE)
PROGRESS = re.compile(r"\d%\|| it/s|s/it\]|<progress|[█▏▎▍▌▋▊▉]")
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|Users|opt|var|mnt)/|[A-Z]:\\\\")
EXAMPLE_TIME = "2026-01-31T12:00"  # in the sentences that say what a time looks like
CLOCK = re.compile(r"20\d\d-\d\d-\d\d[T ]\d\d:\d\d|20\d{6}T\d{6}Z")
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_\w{36}|github_pat_\w{22}|hf_[A-Za-z]{34}|AIza[\w-]{35}|xox[baprs]-[\w-]{10}"
    r"|wandb_v\d_\w{20}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|(?i:(api_?key|token|secret|password)\s*[:=]\s*[\"']?[0-9a-f]{40}\b)"
)


def cells_of(path: Path, kind: str = "") -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if kind in ("", cell["cell_type"])]


def text_outputs(path: Path) -> str:
    "All that a notebook's outputs say in words; pictures are left out."
    found: list[str] = []
    for cell in cells_of(path, "code"):
        for output in cell["outputs"]:
            texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
            found += ["".join(text) for text in texts]
    return "\n".join(found)


def test_the_notebooks_are_found() -> None:
    assert {"train.ipynb", "evaluate.ipynb", "benchmark.ipynb", "index.ipynb"} <= {path.name for path in RUNS}
    assert len(ROOMS) >= 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_cells_carry_word_ids(self, path: Path) -> None:
        ids = [cell["id"] for cell in cells_of(path)]
        assert len(set(ids)) == len(ids)
        assert [i for i in ids if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", i)] == []
        assert [i for i in ids if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]+)*", i)] == [], "a machine's id, not a word"

    def test_it_is_small(self, path: Path) -> None:
        assert path.stat().st_size < 300_000

    def test_outputs_hold_nothing_of_the_machine_or_the_moment(self, path: Path) -> None:
        text = text_outputs(path).replace(EXAMPLE_TIME, "")
        assert [m[0] for pattern in (MACHINE, CLOCK, PROGRESS) for m in pattern.finditer(text)] == []
        assert socket.gethostname() not in text or len(socket.gethostname()) < 4
        kinds = {kind for cell in cells_of(path, "code") for out in cell["outputs"] for kind in out.get("data", {})}
        assert not [kind for kind in kinds if "widget" in kind]

    def test_no_cell_ended_in_an_error(self, path: Path) -> None:
        cells = [c for c in cells_of(path, "code") if "raises-exception" not in c["metadata"].get("tags", [])]
        assert [c["id"] for c in cells if any(out["output_type"] == "error" for out in c["outputs"])] == []

    def test_imports_are_explicit(self, path: Path) -> None:
        assert [
            c["id"] for c in cells_of(path, "code") if re.search(r"^\s*from \S+ import \*", c["source"], re.M)
        ] == []

    def test_the_title_cell_holds_title_and_promise_only(self, path: Path) -> None:
        "nbdev turns this cell into the page's metadata: any further prose in it would be lost on the site."
        title = cells_of(path, "markdown")[0]["source"]
        assert re.fullmatch(r"# [^\n]+\n+> [^\n]+\s*", title), title


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
class TestRoom:
    def test_it_opens_as_every_room_does(self, path: Path) -> None:
        first, title = cells_of(path)[:2]
        imports = cells_of(path, "code")[1]
        assert first["source"].strip() == f"#| default_exp {path.stem[3:]}"
        assert title["cell_type"] == "markdown" and title["source"].startswith("# ")
        assert EXPORT.match(imports["source"]), "the exported imports come first"
        nodes = ast.parse(imports["source"]).body  # no TYPE_CHECKING either: the site reads the annotations
        assert nodes and all(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)

    def test_its_headings_end_with_what_can_go_wrong(self, path: Path) -> None:
        cells = [cell["source"] for cell in cells_of(path, "markdown")]
        headings = [source for source in cells if re.search(r"^## ", source, re.MULTILINE)]
        assert [source for source in headings if "\n" in source.strip()] == [], "a heading owns its cell"
        assert 3 <= len(headings) <= 7
        assert headings[-1].strip() == "## What can go wrong"

    def test_its_export_cells_are_short(self, path: Path) -> None:
        exports = {c["id"]: c["source"] for c in cells_of(path, "code") if EXPORT.search(c["source"])}
        lengths = {i: len([line for line in s.splitlines()[1:] if line.strip()]) for i, s in exports.items()}
        assert {i: n for i, n in lengths.items() if n > 40} == {}
        assert 20 < sum(lengths.values()) <= 330


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_exports_nothing(path: Path) -> None:
    assert [c["id"] for c in cells_of(path, "code") if EXPORT.search(c["source"])] == []


def test_make_export_changes_nothing(tmp_path: Path) -> None:
    "Notebooks are formatted and clean, keep papermill's tag, and modules and README say what they say."
    kept = [
        "nbs",
        "eurosat_mlops",
        "tests",
        ".ci",
        "Makefile",
        "pyproject.toml",
        "_quarto.yml",
        "README.md",
        "README_files",
    ]
    for name in filter(lambda name: (ROOT / name).exists(), kept):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name, **({"symlinks": True} if (ROOT / name).is_dir() else {}))
    command = ["make", "export", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.ready"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in kept:
        files = {p.relative_to(base) for base in (ROOT, tmp_path) for p in (base / name).rglob("*") if p.is_file()}
        files |= {Path(name)} if (ROOT / name).is_file() else set()
        files = {f for f in files if not {"__pycache__", ".ipynb_checkpoints"} & set(f.parts) and f.suffix != ".pyc"}
        changed = [f for f in sorted(files) if read(ROOT / f) != read(tmp_path / f)]
        assert changed == [], "run make prep and commit"
    tags = [tag for cell in cells_of(tmp_path / "nbs" / "train.ipynb") for tag in cell["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1


def read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def test_the_notebook_runner_runs_skips_and_fails(tmp_path: Path) -> None:
    "A clean cell with outputs passes, a marked one is skipped with its reason, a broken one fails; IN_TEST is set."
    sources = [
        "import os\nassert os.environ['IN_TEST'] == '1'",
        "6 * 7",
        "#| slow\n1 / 0",
        "raise ValueError('broken')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.cells[1].outputs = [
        nbformat.v4.new_output("execute_result", data={"text/plain": "42"}, execution_count=None)
    ]
    nbformat.write(notebook, tmp_path / "small.ipynb")
    shutil.copy(ROOT / "conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "--nbval-lax", "small.ipynb"]
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 failed, 2 passed, 1 skipped" in done.stdout, done.stdout
    assert "marked #| slow" in done.stdout


def test_the_site_lists_every_notebook_once() -> None:
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and link.resolve() == ROOT / "_quarto.yml"

    def listed(contents: list[Any]) -> list[str]:
        return [x for e in contents for x in ([e] if isinstance(e, str) else listed(e["contents"]))]

    contents = yaml.safe_load(link.read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    assert sorted(listed(contents)) == [path.name for path in NOTEBOOKS]


def test_settings_ini_names_every_setting_and_no_other() -> None:
    parser = ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    assert sorted(parser["eurosat"]) == sorted(field.name for field in fields(Settings) if field.name != "root")
    assert load_settings(ROOT).root == ROOT


def test_make_help_lists_every_job() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    jobs = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    assert {"setup", "train", "evaluate", "test", "prep", "lint", "docs", "bench", "clean", "help"} <= jobs
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make (\w+) +\S", shown, re.MULTILINE)) == jobs


def test_make_setup_says_what_is_wrong_with_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Python 3.11 or newer is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"] and "version" not in PYPROJECT["project"]
    assert version("eurosat-mlops") == eurosat_mlops.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", eurosat_mlops.__version__)


def test_the_constraints_are_exact_portable_and_fit_the_requirements() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", pin)] == []
    pinned = {canonicalize_name(name): number for name, number in (pin.split("==") for pin in pins)}
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = map(Requirement, [*PYPROJECT["project"]["dependencies"], *extras["train"], *extras["dev"]])
    for need in (need for need in wanted if need.name != "eurosat-mlops"):
        assert canonicalize_name(need.name) in pinned, f"{need.name} is not pinned"
        assert need.specifier.contains(pinned[canonicalize_name(need.name)]), f"{need.name} is pinned outside its range"
    lowest = re.sub(r"[^\d.]", "", PYPROJECT["project"]["requires-python"]) + ".0"  # Debian 12 has 3.11.2
    found = [d for d in distributions() if pinned.get(canonicalize_name(d.metadata["Name"])) == d.version]
    assert len(found) > 100
    refused = [d.name for d in found if not SpecifierSet(d.metadata.get("Requires-Python") or "").contains(lowest)]
    assert refused == [], f"pins that Python {lowest} cannot install"


def public_functions(path: Path) -> list[tuple[str, ast.FunctionDef]]:
    found: list[tuple[str, ast.FunctionDef]] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, node))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += [(f"{node.name}.{f.name}", f) for f in node.body if isinstance(f, ast.FunctionDef)]
    return [(name, node) for name, node in found if not node.name.startswith("_")]


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=lambda path: path.stem)
def test_public_functions_are_typed_and_say_what_they_do(path: Path) -> None:
    functions = public_functions(path)
    assert functions or path.stem == "bands"
    for name, node in functions:
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        untyped = [a.arg for a in given if a and a.annotation is None and a.arg not in ("self", "cls")]
        assert not untyped and node.returns is not None, f"{path.stem}.{name}: untyped {untyped or 'result'}"
        if "." not in name:
            assert ast.get_docstring(node), f"{path.stem}.{name} has no docstring"


def test_nothing_looks_like_a_secret() -> None:
    assert SECRETS.search("WANDB_API_KEY=" + "0123456789" * 4), "the pattern would see nothing"
    folders = ["nbs", "eurosat_mlops", "tests", "deploy", ".ci", ".github", ".dvc"]
    files = [p for name in folders for p in (ROOT / name).rglob("*")] + [p for p in ROOT.iterdir() if p.name != ".env"]
    texts = {p: p.read_bytes().decode("utf-8", "ignore") for p in files if p.is_file() and p.stat().st_size < 3_000_000}
    assert len(texts) > 20
    assert [f"{p.relative_to(ROOT)}: {m[0][:12]}" for p, text in texts.items() if (m := SECRETS.search(text))] == []


def test_workflows_pin_their_actions_and_ask_for_little() -> None:
    for path in (ROOT / ".github" / "workflows").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        used = re.findall(r"uses: (\S+)", text)
        assert used and [action for action in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)] == []
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
