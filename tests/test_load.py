"""`eurosat load` as a person calls it: real clients against the real service."""

import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from eurosat_mlops.core import read_json
from eurosat_mlops.load import SHARES

EUROSAT = (sys.executable, "-c", "import sys; from eurosat_mlops.cli import main; sys.exit(main())")


def load(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    "`eurosat load` in an empty project."
    places = {"EUROSAT_RUNS_DIR": str(place / "runs"), "EUROSAT_MODELS_DIR": str(place / "models")}
    package = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [*EUROSAT, "load", *words]
    return subprocess.run(command, cwd=place, env=os.environ | places | package, capture_output=True, text=True)


def test_a_short_load_passes_and_leaves_a_report(bundle_folder: Path, tmp_path: Path) -> None:
    done = load(tmp_path, "--model", str(bundle_folder), "--users", "8", "--spawn-rate", "8", "--seconds", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    rows = {row["kind"]: row for row in read_json(run / "stats.json")["rows"]}
    assert list(rows) == [*SHARES, "all"]
    assert rows["all"]["requests"] == sum(rows[kind]["requests"] for kind in SHARES) > 100
    assert rows["all"]["failures"] == 0 and rows["tile"]["p50_ms"] <= rows["tile"]["p95_ms"] <= rows["tile"]["p99_ms"]
    assert f"{rows['all']['requests']:,}" in done.stdout and "report.html" in done.stdout
    assert not (tmp_path / "runs" / "latest").exists(), "evaluate and release would take it for a model"
    assert not (tmp_path / "runs" / "journal.db").exists(), "the record of what people asked stays free of it"


@pytest.fixture
def broken() -> Iterator[str]:
    "A service that says it is ready, refuses every third request, and fails at all others."

    class Handler(http.server.BaseHTTPRequestHandler):
        count = itertools.count()  # its next is one step, whatever the threads do

        def answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(b"{}")

        def do_GET(self) -> None:
            self.answer(200)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(500 if next(self.count) % 3 else 429)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_failures_are_a_fault_and_refusals_are_not(bundle_folder: Path, tmp_path: Path, broken: str) -> None:
    done = load(tmp_path, broken, "--model", str(bundle_folder), "--users", "2", "--seconds", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    total = json.loads((run / "stats.json").read_text())["rows"][-1]
    assert total["failures"] == total["requests"] and total["per_second"] == 0
    assert abs(total["requests"] - 2 * total["refused"]) < 10


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:8000", "file:///etc"])
def test_a_wrong_url_is_said_in_a_line(tmp_path: Path, url: str) -> None:
    done = load(tmp_path, url)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"eurosat: {url}: no service is ready there") and done.stderr.count("\n") == 1


def test_without_a_model_it_says_so(tmp_path: Path) -> None:
    done = load(tmp_path)
    assert done.returncode == 2 and "no bundle here" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("--users", "0"), ("--seconds", "-1"), ("--spawn-rate", "fast")])
def test_numbers_are_checked(tmp_path: Path, words: tuple[str, str]) -> None:
    done = load(tmp_path, *words)
    assert done.returncode == 2 and words[1] in done.stderr


def test_locust_stays_out_of_our_process() -> None:
    "It replaces the socket and threading modules of whoever imports it."
    code = "import sys, eurosat_mlops.load; sys.exit('gevent' in sys.modules or 'locust' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
