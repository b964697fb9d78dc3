"""The service as a client meets it: over HTTP, in a process of its own where the process matters."""

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from eurosat_mlops.bands import IMAGE_RGB, contract_to_dict
from eurosat_mlops.bundle import read_bundle, update_bundle
from eurosat_mlops.core import Settings
from eurosat_mlops.engine import Engine, open_model
from eurosat_mlops.journal import open_journal
from eurosat_mlops.problems import ServeConfig, hash_key
from eurosat_mlops.registry import open_registry
from eurosat_mlops.serve import make_app

KEY = "a key for the tests"
EUROSAT = (sys.executable, "-c", "import sys; from eurosat_mlops.cli import main; sys.exit(main())")
ADMIN = {"Authorization": f"Bearer {KEY}"}


def png(tile: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tile(bundle_folder: Path) -> bytes:
    return png(read_bundle(bundle_folder).reference["golden_tiles"][0])


@asynccontextmanager
async def client(
    folder: Path, place: Path, record: str = "must", queue: int = 256, **limits: Any
) -> AsyncIterator[httpx.AsyncClient]:
    "The application with a journal, asked in this process."
    settings = Settings(place, models_dir=place / "models")
    engine = Engine(settings, open_model(folder, settings), threads=2, queue=queue)
    config = ServeConfig(keys=(hash_key(KEY),), record=record, **limits)
    app = make_app(config, engine, None if record == "off" else open_journal(str(place / "journal.db")))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as asked:
        asked.app = app  # type: ignore[attr-defined]
        yield asked
    await app.state.service.close()


def test_golden_tiles_through_http_are_their_classes(bundle_folder: Path, tmp_path: Path) -> None:
    "As a body, as a form and in a batch, with the numbers that the classifier gives."
    arrays = read_bundle(bundle_folder).reference
    classes = read_bundle(bundle_folder).classes
    images = [png(each) for each in arrays["golden_tiles"]]
    expected = [classes[label] for label in arrays["golden_labels"]]

    async def run() -> None:
        async with client(bundle_folder, tmp_path) as asked:
            bodies = [(await asked.post("/predict", content=image)).json() for image in images]
            forms = [(await asked.post("/predict", files={"file": ("t.png", image)})).json() for image in images]
            files = [("files", (f"{i}.png", image)) for i, image in enumerate(images)]
            batch = (await asked.post("/predict/batch", files=files)).json()
        for found in (bodies, forms, batch["results"]):
            assert [each["label"] for each in found] == expected
        for body, form, row in zip(bodies, forms, batch["results"], strict=True):
            assert body["probabilities"] == form["probabilities"] == row["probabilities"]
            assert len(body["top"]) == 3 and body["top"][0]["label"] == body["label"]
        assert sorted(each["journal_id"] for each in bodies + forms + batch["results"]) == [
            *range(1, 3 * len(images) + 1)
        ]

    asyncio.run(run())


def test_a_thousand_uploads_change_no_bit(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    async def run() -> None:
        async with client(bundle_folder, tmp_path, record="off") as asked:
            first = (await asked.post("/predict", content=tile)).json()["probabilities"]
            for _ in range(50):
                many = await asyncio.gather(*(asked.post("/predict", content=tile) for _ in range(20)))
                assert all(each.json()["probabilities"] == first for each in many)

    asyncio.run(run())


def test_refusals_are_problem_details(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    wide = png(np.zeros((64, 65, 3), np.uint8))

    async def run() -> None:
        async with client(bundle_folder, tmp_path, image_bytes=50_000, batch_files=3) as asked:
            cases = [
                (415, asked.post("/predict", content=b"GIF89a")),
                (415, asked.post("/predict", content=b"")),
                (415, asked.post("/predict", content=b"{}", headers={"Content-Type": "application/json"})),
                (413, asked.post("/predict", content=tile + b"0" * 50_000)),
                (422, asked.post("/predict", content=wide)),
                (422, asked.post("/predict", content=tile[:100])),
                (422, asked.post("/predict?top_k=0", content=tile)),
                (422, asked.post("/predict", files={"image": ("t.png", tile)})),
                (422, asked.post("/predict", content=b"x", headers={"Content-Type": "multipart/form-data"})),
                (422, asked.post("/predict/batch", files=[("files", tile)] * 4)),
                (422, asked.post("/feedback", json={"request_id": "a", "journal_id": 1, "label": "Moon"})),
                (422, asked.post("/feedback", content=b"{")),
                (404, asked.post("/feedback", json={"request_id": "a", "journal_id": 99, "label": "River"})),
                (404, asked.get("/nothing")),
                (405, asked.get("/predict")),
                (401, asked.get("/journal")),
                (401, asked.get("/journal", headers={"Authorization": f"Bearer {hash_key(KEY)}"})),
                (422, asked.get("/journal?since=yesterday", headers=ADMIN)),
                (404, asked.delete("/journal/99", headers=ADMIN)),
                (401, asked.post("/models/production/activate")),
                (404, asked.post("/models/production/activate", headers=ADMIN)),
                (404, asked.post("/models/..%2F..%2Fetc/activate", headers=ADMIN)),
                (422, asked.post("/models/etc/activate", headers=ADMIN)),
            ]
            for status, question in cases:
                answer = await question
                problem = answer.json()
                assert answer.status_code == status, (status, problem)
                assert answer.headers["content-type"] == "application/problem+json"
                assert set(problem) == {"type", "title", "status", "detail", "instance", "request_id"}
                assert problem["request_id"] == answer.headers["x-request-id"] and problem["status"] == status
                assert str(tmp_path) not in answer.text

    asyncio.run(run())


def test_every_answer_has_an_id_and_the_headers_for_browsers(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    async def run() -> None:
        async with client(bundle_folder, tmp_path) as asked:
            mine = await asked.post("/predict", content=tile, headers={"X-Request-ID": "mine.1", "Origin": "http://x"})
            assert mine.headers["x-request-id"] == mine.json()["request_id"] == "mine.1"
            other = await asked.get("/nothing", headers={"X-Request-ID": "a b<script>"})
            assert re.fullmatch(r"[0-9a-f]{16}", other.headers["x-request-id"])
            for answer in (mine, other, await asked.get("/")):
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
                assert "access-control-allow-origin" not in answer.headers

    asyncio.run(run())


def test_busy_and_late_say_when_to_come_again(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    async def run() -> None:
        async with client(bundle_folder, tmp_path, record="off", queue=8) as asked:
            many = await asyncio.gather(*(asked.post("/predict", content=tile) for _ in range(200)))
            counts = Counter(each.status_code for each in many)
            assert set(counts) == {200, 429} and counts[200] >= 8
            assert {each.headers["retry-after"] for each in many if each.status_code == 429} == {"1"}
            assert (await asked.post("/predict", content=tile)).status_code == 200
        async with client(bundle_folder, tmp_path, record="off", deadline_s=0.00001) as asked:
            late = await asked.post("/predict", content=tile)
            assert late.status_code == 504 and "0.00001" not in late.headers.get("retry-after", "")

    asyncio.run(run())


def test_keys_and_rate_for_predictions(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    asker = {"Authorization": "Bearer asker"}

    async def run() -> None:
        async with client(bundle_folder, tmp_path, record="off", predict_keys=(hash_key("asker"),), rate=3) as asked:
            assert (await asked.post("/predict", content=tile)).status_code == 401
            statuses = [(await asked.post("/predict", content=tile, headers=asker)).status_code for _ in range(5)]
            assert statuses == [200, 200, 200, 429, 429]
            assert (await asked.post("/predict", content=tile, headers=ADMIN)).status_code == 200
            assert (await asked.get("/journal", headers=asker)).status_code == 401

    asyncio.run(run())


def test_the_record_is_kept_corrected_exported_and_deleted(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    async def run() -> None:
        async with client(bundle_folder, tmp_path) as asked:
            asks = [(await asked.post("/predict", content=tile)).json() for _ in range(3)]
            assert [each["journal_id"] for each in asks] == [1, 2, 3]
            truth = {"request_id": asks[1]["request_id"], "journal_id": 2, "label": "River"}
            for wrong in (asks[0]["request_id"], "guessed"):
                assert (await asked.post("/feedback", json=truth | {"request_id": wrong})).status_code == 404
            said = await asked.post("/feedback", json=truth)
            assert said.status_code == 200 and said.json()["label"] == "River"
            assert (await asked.delete("/journal/1", headers=ADMIN)).status_code == 204
            rows = [json.loads(r) for r in (await asked.get("/journal?format=jsonl", headers=ADMIN)).text.splitlines()]
            assert [(row["id"], row["feedback"]) for row in rows] == [(2, "River"), (3, "")]
            assert (await asked.get("/journal", headers=ADMIN)).text.count("\n") == 3
            parquet = await asked.get("/journal?format=parquet&since=2026-01-01", headers=ADMIN)
            assert parquet.content[:4] == b"PAR1" and "attachment" in parquet.headers["content-disposition"]

    asyncio.run(run())


@pytest.mark.parametrize(("record", "status"), [("must", 503), ("try", 200)])
def test_a_journal_that_fails_is_never_lied_about(
    bundle_folder: Path, tmp_path: Path, tile: bytes, record: str, status: int
) -> None:
    async def run() -> None:
        async with client(bundle_folder, tmp_path, record=record) as asked:
            asked.app.state.service.journal.close()  # type: ignore[attr-defined]
            answer = await asked.post("/predict", content=tile)
            assert answer.status_code == status
            assert answer.json().get("journal_id") is None
            text = (await asked.get("/metrics")).text
            assert f"eurosat_unrecorded_total {float(status == 200)}" in text

    asyncio.run(run())


@pytest.fixture(scope="module")
def released(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    "A models folder whose registry holds one more version."
    root = tmp_path_factory.mktemp("released")
    shutil.copytree(bundle_folder, root / "second")
    update_bundle(root / "second", {"created": "2026-01-01T00:00:00Z"}, {})
    settings = Settings(root, models_dir=root / "models")
    return root, open_registry(settings).add(root / "second")


def test_models_are_listed_and_switched(bundle_folder: Path, released: tuple[Path, str], tile: bytes) -> None:
    place, second = released

    async def run() -> None:
        async with client(bundle_folder, place) as asked:
            listed = (await asked.get("/models")).json()
            first = listed["active"]["version"]
            assert [each["version"] for each in listed["models"]] == [first, second]
            assert {"alias", "classes", "metrics", "created", "arch", "data"} <= set(listed["models"][1])
            active = (await asked.post(f"/models/{second[:12]}/activate", headers=ADMIN)).json()["active"]
            assert active["version"] == second
            assert (await asked.post("/predict", content=tile)).json()["model"]["version"] == second
            assert (await asked.post(f"/models/{first}/activate", headers=ADMIN)).status_code == 200
            assert (await asked.post("/predict", content=tile)).json()["model"]["version"] == first
            graph = place / "models" / "versions" / second / "model.onnx"
            content = bytearray(graph.read_bytes())
            content[1000] ^= 4
            graph.chmod(0o644)
            graph.write_bytes(content)
            assert (await asked.post(f"/models/{second}/activate", headers=ADMIN)).status_code in (404, 422)
            assert (await asked.post("/predict", content=tile)).json()["model"]["version"] == first
            content[1000] ^= 4
            graph.write_bytes(content)

    asyncio.run(run())


def test_shadow_and_canary_in_the_journal(bundle_folder: Path, released: tuple[Path, str], tile: bytes) -> None:
    place, second = released

    async def run() -> None:
        async with client(bundle_folder, place) as asked:
            for role in ("shadow", "canary?share=0.5"):
                path = role.replace("?", f"/{second}?") if "?" in role else f"{role}/{second}"
                assert (await asked.put(f"/models/{path}", headers=ADMIN)).status_code == 200
            answers = [(await asked.post("/predict", content=tile)).json() for _ in range(10)]
            assert Counter(each["model"]["role"] for each in answers) == {"primary": 5, "canary": 5}
            for role in ("shadow", "canary"):
                assert (await asked.delete(f"/models/{role}", headers=ADMIN)).status_code == 200
            assert (await asked.post("/predict", content=tile)).json()["model"]["role"] == "primary"
            text = (await asked.get("/metrics")).text
            assert 'role="shadow"' in text and text.count("eurosat_model_info{") == 1
        with open_journal(str(place / "journal.db")) as journal:
            roles = Counter(record.role for record in journal.read(since="2026-01-01"))
        assert roles["shadow"] == 10 and roles["canary"] == 5

    asyncio.run(run())


def test_labels_of_metrics_are_bounded(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    async def run() -> None:
        async with client(bundle_folder, tmp_path) as asked:
            for i in range(50):
                await asked.get(f"/path/{i}")
                await asked.post(f"/models/{i:08x}/activate")
            await asked.post("/predict", content=tile, headers={"X-Request-ID": "never-a-label"})
            text = (await asked.get("/metrics")).text
            assert 'eurosat_requests_total{route="other",status="404"} 50.0' in text
            assert 'eurosat_requests_total{route="/models/{version}/activate",status="401"} 50.0' in text
            assert 'eurosat_requests_total{route="/predict",status="200"} 1.0' in text
            assert "never-a-label" not in text and "eurosat_journal_lag_rows 0.0" in text
            figures = (await asked.get("/stats")).json()
            assert figures["requests"] == 1 and sum(figures["class_counts"].values()) == 1

    asyncio.run(run())


def test_an_explanation_comes_on_request(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    async def run() -> None:
        async with client(bundle_folder, tmp_path) as asked:
            found = (await asked.post("/predict?explain=true", content=tile)).json()["explanation"]
            assert np.shape(found) == (64, 64)
            large = png(np.zeros((300, 200, 3), np.uint8))
            assert (await asked.post("/predict?resize=true", content=large)).status_code == 200

    asyncio.run(run())


def test_a_model_of_ordinary_pictures_scales_them_unasked(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    "Also when more come at a time than may wait to be decoded, if they have the model's size."
    folder = shutil.copytree(bundle_folder, tmp_path / "pictures")
    update_bundle(folder, {"contract": contract_to_dict(IMAGE_RGB)}, {})
    noise = png(np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8))

    async def run() -> None:
        async with client(folder, tmp_path) as asked:
            for content in (noise, png(np.zeros((9, 12, 3), np.uint8))):
                assert (await asked.post("/predict", content=content)).status_code == 200
            form = [("files", (name, noise)) for name in ("a.png", "b.png")]
            found = (await asked.post("/predict/batch", files=form)).json()["results"]
            assert [row["status"] for row in found] == ["ok", "ok"]
            assert (await asked.post("/predict", content=b"no picture")).status_code == 415
            many = await asyncio.gather(*(asked.post("/predict", content=tile) for _ in range(30)))
            assert {answer.status_code for answer in many} == {200}
            document = (await asked.get("/openapi.json")).json()
            (told,) = [p for p in document["paths"]["/predict"]["post"]["parameters"] if p["name"] == "resize"]
            assert (
                "ordinary pictures" in told["description"] and "land" not in str(document["paths"]["/predict"]).lower()
            )

    asyncio.run(run())


def test_the_description_is_complete(bundle_folder: Path, tmp_path: Path) -> None:
    async def run() -> None:
        async with client(bundle_folder, tmp_path) as asked:
            paths = (await asked.get("/openapi.json")).json()["paths"]
        names = ("/predict", "/predict/batch", "/models", "/journal", "/feedback", "/healthz", "/readyz", "/stats")
        assert set(names) <= set(paths)
        assert "multipart/form-data" in paths["/predict"]["post"]["requestBody"]["content"]

    asyncio.run(run())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def server(folder: Path, place: Path, *flags: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    "`eurosat serve` as a process, ready."
    port = free_port()
    command = [*EUROSAT, "serve", "--model", str(folder), "--port", str(port), *flags]
    places = {"EUROSAT_RUNS_DIR": str(place / "runs"), "EUROSAT_MODELS_DIR": str(place / "models")}
    keys = {"EUROSAT_SERVE_KEYS": hash_key(KEY), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    process = subprocess.Popen(command, env=os.environ | places | keys, stderr=subprocess.PIPE)
    try:
        for _ in range(500):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        yield port, process
    finally:
        process.kill()
        process.wait()


def stalled(port: int, count: int, said: bytes) -> list[socket.socket]:
    "Clients that say something and then nothing."
    found = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for each in found:
        each.sendall(said)
    return found


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nhalf"


def test_stalled_clients_do_not_stop_others_nor_the_end(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    "400 clients that stall: with half a body, half a head, or without a word."
    with server(bundle_folder, tmp_path) as (port, process):
        held = stalled(port, 200, HEAD) + stalled(port, 100, HEAD[:20]) + stalled(port, 100, b"")
        times = []
        for _ in range(20):
            began = time.perf_counter()
            assert httpx.post(f"http://127.0.0.1:{port}/predict", content=tile).status_code == 200
            times.append(time.perf_counter() - began)
        assert sorted(times)[10] < 2  # who waits for a stalled client waits for its time limit
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.perf_counter() - began < 9
        assert len(held) == 400


def test_sigterm_loses_no_accepted_request(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    "Each answer that was given is in the journal, and nobody was cut off in the middle."

    async def load(port: int, process: subprocess.Popen[bytes]) -> Counter[str]:
        seen = Counter[str]()

        async def ask() -> None:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as asked:
                while True:
                    try:
                        answer = await asked.post("/predict", content=tile)
                        seen[str(answer.status_code)] += 1
                    except httpx.ConnectError:
                        return
                    except httpx.HTTPError as error:
                        seen[type(error).__name__] += 1

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        await asyncio.sleep(1)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 503
        await asyncio.gather(*asking)
        return seen

    with server(bundle_folder, tmp_path) as (port, process):
        seen = asyncio.run(load(port, process))
        assert process.wait(10) == 0
    assert seen["200"] > 50 and set(seen) == {"200"}, seen
    with open_journal(str(tmp_path / "runs" / "journal.db")) as journal:
        assert journal.count() == seen["200"]


def test_administration_on_another_port(bundle_folder: Path, tmp_path: Path, tile: bytes) -> None:
    admin = free_port()
    with server(bundle_folder, tmp_path, "--admin-port", str(admin)) as (port, process):
        assert httpx.post(f"http://127.0.0.1:{port}/predict", content=tile).status_code == 200
        for path, public, other in (("/metrics", 404, 200), ("/journal", 404, 200), ("/healthz", 200, 200)):
            assert httpx.get(f"http://127.0.0.1:{port}{path}", headers=ADMIN).status_code == public
            assert httpx.get(f"http://127.0.0.1:{admin}{path}", headers=ADMIN).status_code == other
        assert httpx.post(f"http://127.0.0.1:{admin}/predict", content=tile).status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_mistake_is_said_in_a_line(tmp_path: Path, bundle_folder: Path) -> None:
    command = [*EUROSAT, "serve", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no bundle here" in done.stderr and "Traceback" not in done.stderr
