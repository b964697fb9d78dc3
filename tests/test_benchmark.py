"""What a benchmark rests on, and `eurosat bench` as a person calls it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eurosat_mlops.benchmark import fit_slope, form_requests, raw_rate, running_peer, tensor_request, watched_memory
from eurosat_mlops.clients import closed_loop
from eurosat_mlops.core import EurosatError, read_json
from eurosat_mlops.load import make_images

EUROSAT = (sys.executable, "-c", "import sys; from eurosat_mlops.cli import main; sys.exit(main())")
ECHO = """
async def app(scope, receive, send):
    size = 0
    while scope["path"] != "/readyz":
        message = await receive()
        size += len(message["body"])
        if not message["more_body"]:
            break
    body = str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""


def test_a_line_is_found_and_noise_is_told_from_growth() -> None:
    seconds = np.arange(0, 3600, 5.0)
    slope, error, start = fit_slope([(s, 100 + s / 360) for s in seconds])
    assert slope == pytest.approx(10) and start == pytest.approx(100) and error < 1e-6
    rng = np.random.default_rng(0)
    found = [fit_slope([(s, 100 + rng.normal()) for s in seconds]) for _ in range(200)]
    within = np.mean([abs(slope) < 2.31 * error for slope, error, _ in found])  # 95 % of Student's t, 8 degrees
    assert 0.9 < within < 0.99
    with pytest.raises(EurosatError, match="expected at least 20"):
        fit_slope([(0.0, 1.0)] * 19)


def test_a_tensor_request_is_json_and_then_the_tiles() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    request = tensor_request(tiles)
    size = int(request.headers["Inference-Header-Content-Length"])
    (tensor,) = json.loads(request.body[:size])["inputs"]
    assert tensor["shape"] == [5, 8, 8, 3] and tensor["parameters"]["binary_data_size"] == len(request.body) - size
    assert request.body[size:] == tiles.tobytes()


def test_a_peer_is_served_watched_and_ended(tmp_path: Path) -> None:
    request = form_requests([b"0123456789"])[0]
    bodies: set[bytes] = set()
    with running_peer(ECHO, tmp_path / "peer") as peer, watched_memory(peer, 0.05) as seen:
        report = closed_loop(peer.url, [request], 2, 0.5, lambda status, headers, body: bodies.add(body))
    assert bodies == {str(len(request.body)).encode()} and report.errors == 0
    assert len(seen) >= 5 and all(5 < megabytes < 500 for _, megabytes in seen)
    assert peer.process.poll() is not None
    with pytest.raises(EurosatError, match="no model here"), running_peer("raise OSError('no model here')", tmp_path):
        pass


def test_the_plain_service_of_the_notebook_answers(project: Path, tmp_path: Path) -> None:
    "The one it is compared with, at both sizes of a tile; a benchmark in the tests leaves it out."
    cells = {cell["id"]: "".join(cell["source"]) for cell in read_json(project / "nbs" / "benchmark.ipynb")["cells"]}
    names: dict[str, Any] = {"peers": True}
    exec(cells["peer-code"], names)
    assert "Resize" in names["PEERS"]["plain"] and "Resize" not in names["PEERS"]["plain, 64 px"]
    request = form_requests(make_images(np.zeros((1, 64, 64, 3), np.uint8)))[0]
    answers: list[dict[str, Any]] = []
    with running_peer(names["PEERS"]["plain"], tmp_path) as peer:
        report = closed_loop(
            peer.url, [request], 1, 0.3, lambda status, headers, body: answers.append(json.loads(body))
        )
    assert set(report.statuses) == {200} and 0 <= answers[0]["label"] < 10 and 0 < answers[0]["confidence"] <= 1


def test_raw_speed_counts_all_threads_and_their_last_turn() -> None:
    calls: list[int] = []
    rate = raw_rate(lambda: calls.append(1) or time.sleep(0.01) or 7, 2, 0.2)
    assert 7 * len(calls) / 0.4 < rate <= 7 * len(calls) / 0.2, "late turns count with the time they took"
    assert rate < 2 * 7 / 0.01


def bench(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    "`eurosat bench` in an empty project."
    places = {"EUROSAT_RUNS_DIR": str(place / "runs"), "EUROSAT_MODELS_DIR": str(place / "models")}
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    package = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [*EUROSAT, "bench", *words]
    return subprocess.run(command, cwd=place, env=environment | places | package, capture_output=True, text=True)


def test_a_short_benchmark_measures_everything(bundle_folder: Path, tmp_path: Path) -> None:
    words = ("--model", str(bundle_folder), "--seconds", "0.2", "--soak-minutes", "0.03", "--no-peers", "--no-training")
    done = bench(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in run.iterdir()) == ["benchmark.ipynb", "benchmark.json", "figures"]
    assert sorted(path.name for path in (run / "figures").iterdir()) == ["clients.png", "memory.png"]
    found = read_json(run / "benchmark.json")
    assert [row["clients"] for row in found["closed"]["recorded"]] == [1, 8, 32, 128]
    assert all(row["answered"] > 0 and row["errors"] == 0 for rows in found["closed"].values() for row in rows)
    assert [row["share"] for row in found["open"]] == [0.25, 0.5, 0.75]
    assert found["soak"]["answered"] > 0 and len(found["soak"]["memory"]) >= 20
    kept = {row["what"]: row["kept"] for row in found["promises"]}
    assert kept["memory at rest, MB"] and kept["1 to 128 clients: errors"]
    assert kept["most requests/s, times the plain service's"] is None, "it was not measured"
    assert "not measured" in done.stdout and "benchmark.json" in done.stdout


def test_a_mistake_is_said_in_a_line(tmp_path: Path) -> None:
    for words, said in ((("--model", "nowhere/at/all"), "no bundle here"), ((), "no bundle here")):
        done = bench(tmp_path, *words)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
