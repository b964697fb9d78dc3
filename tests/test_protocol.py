"""The Open Inference Protocol v2, asked by a client that we did not make, and in ways in which no client should."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from test_serve import client, png, server
from tritonclient.utils import InferenceServerException

from eurosat_mlops.bundle import Bundle, read_bundle, update_bundle
from eurosat_mlops.journal import open_journal
from eurosat_mlops.problems import hash_key
from eurosat_mlops.protocol import JSON_BYTES, OUTPUTS

INFER = "/v2/models/eurosat/infer"


@pytest.fixture(scope="module")
def served(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    place = tmp_path_factory.mktemp("served")
    with server(bundle_folder, place) as (port, _):
        yield port, place


@pytest.fixture
def asked(served: tuple[int, Path]) -> Iterator[triton.InferenceServerClient]:
    found = triton.InferenceServerClient(f"127.0.0.1:{served[0]}")
    yield found
    found.close()


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path) -> Bundle:
    return read_bundle(bundle_folder)


def tensor(tiles: np.ndarray, binary: bool = True) -> triton.InferInput:
    given = triton.InferInput("tiles", list(tiles.shape), "UINT8")
    given.set_data_from_numpy(tiles, binary_data=binary)
    return given


def test_a_standard_client_learns_what_there_is(asked: triton.InferenceServerClient, bundle: Bundle) -> None:
    assert asked.is_server_live() and asked.is_server_ready()
    assert asked.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    for version in ("", bundle.id, bundle.id[:12]):
        assert asked.is_model_ready("eurosat", version)
        model = asked.get_model_metadata("eurosat", version)
        assert model["versions"] == [bundle.id]
        assert model["inputs"] == [{"name": "tiles", "datatype": "UINT8", "shape": [-1, 64, 64, 3]}]
        assert {each["name"]: each["datatype"] for each in model["outputs"]} == OUTPUTS
        assert model["outputs"][0]["shape"] == [-1, len(bundle.classes)]
    assert not asked.is_model_ready("resnet") and not asked.is_model_ready("eurosat", "1")


@pytest.mark.parametrize("as_bytes", [True, False], ids=["binary", "json"])
def test_a_standard_client_gets_the_answers_of_predict(
    served: tuple[int, Path], asked: triton.InferenceServerClient, bundle: Bundle, as_bytes: bool
) -> None:
    "The golden tile of each class, alone and together, by both ways in and out."
    tiles, labels = (bundle.reference[f"golden_{name}"] for name in ("tiles", "labels"))
    images = [("files", (f"{i}.png", png(tile))) for i, tile in enumerate(tiles)]
    batch = httpx.post(f"http://127.0.0.1:{served[0]}/predict/batch", files=images).json()["results"]
    outputs = [triton.InferRequestedOutput(name, binary_data=as_bytes) for name in OUTPUTS]
    together = asked.infer("eurosat", [tensor(tiles, as_bytes)], outputs=outputs, request_id="mine")
    assert together.get_response()["id"] == "mine" and together.get_response()["model_version"] == bundle.id
    names = [name if isinstance(name, str) else name.decode() for name in together.as_numpy("label")]
    assert names == [bundle.classes[label] for label in labels] == [each["label"] for each in batch]
    probabilities = together.as_numpy("probabilities")
    assert np.allclose(probabilities, [list(each["probabilities"].values()) for each in batch], rtol=0, atol=1e-6)
    for name in ("uncertain", "unfamiliar"):
        assert together.as_numpy(name).tolist() == [each[name] for each in batch]
    with open_journal(str(served[1] / "runs" / "journal.db")) as journal:
        recorded = {record.id: record.label for record in journal.read()}
    assert [recorded[id] for id in together.as_numpy("journal_id").tolist()] == names
    for row, tile in enumerate(tiles):
        alone = asked.infer("eurosat", [tensor(tile[None], as_bytes)], bundle.id[:12], outputs=outputs)
        assert np.array_equal(alone.as_numpy("probabilities")[0], probabilities[row])


def test_a_standard_client_gets_everything_as_bytes_if_it_names_nothing(
    asked: triton.InferenceServerClient, bundle: Bundle
) -> None:
    tiles = np.repeat(bundle.reference["golden_tiles"], 20, axis=0)[:200]
    found = asked.infer("eurosat", [tensor(tiles)])
    assert found.as_numpy("probabilities").shape == (200, len(bundle.classes))
    assert found.as_numpy("label").dtype == object and found.as_numpy("distance").dtype == np.float32
    assert all("parameters" in each for each in found.get_response()["outputs"])


def test_a_standard_client_is_told_what_is_wrong(asked: triton.InferenceServerClient, bundle: Bundle) -> None:
    tiles = bundle.reference["golden_tiles"][:1]
    three = triton.InferRequestedOutput("probabilities", class_count=3)
    gzipped: Any = {"request_compression_algorithm": "gzip"}
    for status, said, ask in (
        ("422", r"expected \[N, 64, 64, 3\]", lambda: asked.infer("eurosat", [tensor(tiles[:, 1:])])),
        ("422", "of datatype UINT8", lambda: asked.infer("eurosat", [tensor(tiles), tensor(tiles)])),
        ("413", "expected at most 256", lambda: asked.infer("eurosat", [tensor(np.repeat(tiles, 257, axis=0))])),
        ("404", "no model 'resnet'", lambda: asked.infer("resnet", [tensor(tiles)])),
        ("404", "no version '2'", lambda: asked.infer("eurosat", [tensor(tiles)], "2")),
        ("404", "nothing is here", lambda: asked.get_model_config("eurosat")),
        ("422", "classification is not offered", lambda: asked.infer("eurosat", [tensor(tiles)], outputs=[three])),
        ("415", "send the body as it is", lambda: asked.infer("eurosat", [tensor(tiles)], **gzipped)),
    ):
        with pytest.raises(InferenceServerException, match=said) as refused:
            ask()
        assert refused.value.status() == status


TILE = {"name": "tiles", "datatype": "UINT8", "shape": [1, 64, 64, 3]}
ZEROS = [0] * 64 * 64 * 3


def whole(**changes: Any) -> dict[str, Any]:
    return {"inputs": [TILE | {"data": ZEROS} | changes]}


def with_outputs(*outputs: Any) -> dict[str, Any]:
    return whole() | {"outputs": list(outputs)}


WRONG: list[tuple[int, Any]] = [
    (422, b""),
    (422, b"{"),
    (422, b"\xff\xfe\x00"),
    (422, b"[" * 100_000),
    (422, b'{"inputs":' + b"[" * 90 + b"]" * 90 + b"}"),
    (422, []),
    (422, {}),
    (422, {"inputs": []}),
    (422, {"inputs": {}}),
    (422, {"inputs": [TILE]}),
    (422, {"inputs": [TILE | {"data": ZEROS}] * 2}),
    (422, {"inputs": [{}] * 100}),
    (422, whole(name="image")),
    (422, whole(name=7)),
    (422, whole(datatype="FP32")),
    (422, whole(shape=[0, 64, 64, 3], data=[])),
    (422, whole(shape=[-1, 64, 64, 3])),
    (422, whole(shape=[1.0, 64, 64, 3])),
    (422, whole(shape=["1", 64, 64, 3])),
    (422, whole(shape=[1 << 62, 64, 64, 3])),
    (422, whole(shape=[10**400, 64, 64, 3])),
    (422, whole(shape=[64, 64, 3])),
    (422, whole(shape=[1] * 1000)),
    (422, whole(shape=[2, 64, 64, 3])),
    (413, whole(shape=[257, 64, 64, 3])),
    (413, whole(shape=[(1 << 31) - 1, 64, 64, 3])),
    (422, whole(data=ZEROS[1:])),
    (422, whole(data=[*ZEROS[1:], -1])),
    (422, whole(data=[*ZEROS[1:], 256])),
    (422, whole(data=[*ZEROS[1:], 10**400])),
    (422, whole(data=[*ZEROS[1:], 0.5])),
    (422, whole(data=[*ZEROS[1:], "0"])),
    (422, whole(data=[*ZEROS[1:], None])),
    (422, whole(data=[*ZEROS[1:], {}])),
    (422, whole(data=[*ZEROS[1:], []])),
    (422, whole(data=[ZEROS])),
    (422, whole(data=[["0"] * len(ZEROS)])),
    (422, whole(data="0" * len(ZEROS))),
    (422, json.dumps(whole()).replace("[0, ", "[NaN, ", 1).encode()),
    (422, json.dumps(whole()).replace("[0, ", "[Infinity, ", 1).encode()),
    (422, json.dumps(whole()).replace("[0, ", "[1e999, ", 1).encode()),
    (413, json.dumps(whole(shape=[100, 64, 64, 3], data=ZEROS * 100)).encode()),
    (413, b" " * (JSON_BYTES + 1)),
    (422, whole(parameters={"binary_data_size": len(ZEROS)})),
    (422, {"inputs": [TILE | {"parameters": {"binary_data_size": len(ZEROS)}}]}),
    (422, {"inputs": [TILE | {"parameters": {"shared_memory_region": "x"}}]}),
    (422, {"inputs": [TILE | {"parameters": []}]}),
    (422, whole() | {"id": 7}),
    (422, whole() | {"id": "x" * 1000}),
    (422, whole() | {"parameters": {"binary_data_output": "yes"}}),
    (422, with_outputs({"name": "embedding"})),
    (422, with_outputs({"name": "label"}, {"name": "label"})),
    (422, with_outputs({"name": "label", "parameters": {"binary_data": 1}})),
    (422, with_outputs({"name": "label", "parameters": {"classification": 3}})),
    (422, with_outputs({"name": "label", "parameters": {"shared_memory_region": "x"}})),
    (422, with_outputs(*[{"name": "label"}] * 100)),
]


def binary(size: Any, length: int, header: Any = None) -> tuple[bytes, dict[str, str]]:
    "A request with a tensor of so many bytes, which is said to have others."
    text = json.dumps({"inputs": [TILE | {"parameters": {"binary_data_size": size}}]}).encode()
    said = {"Inference-Header-Content-Length": str(len(text) if header is None else header)}
    return text + bytes(length), said


WRONG_BINARY = [
    binary(12288, 12287),
    binary(12288, 12289),
    binary(12287, 12287),
    binary("12288", 12288),
    binary(-1, 12288),
    binary(True, 1),
    binary(12288.5, 12288),
    binary(10**400, 12288),
    binary(12288, 12288, "-1"),
    binary(12288, 12288, "x"),
    binary(12288, 12288, 0),
    binary(12288, 12288, 3),
    binary(12288, 12288, 10**9),
    binary(12288, 12288, "9" * 5000),
]


def test_wrong_requests_are_refused_as_the_protocol_says(bundle_folder: Path, tmp_path: Path) -> None:
    "With the member that its clients read, in one of our problems, and nothing of it recorded."

    async def run() -> None:
        async with client(bundle_folder, tmp_path) as asked:
            cases = [(status, body, {}) for status, body in WRONG] + [(422, *each) for each in WRONG_BINARY]
            for status, body, headers in cases:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                answer = await asked.post(INFER, content=content, headers=headers)
                problem = answer.json()
                assert answer.status_code == status, (content[:200], headers, problem)
                assert problem["error"] == problem["detail"] and len(problem["error"]) < 400
                assert problem["request_id"] == answer.headers["x-request-id"]
            right, headers = binary(12288, 12288)
            assert (await asked.post(INFER, content=right, headers=headers)).status_code == 200
            assert (await asked.post(INFER, json=whole())).status_code == 200
            assert asked.app.state.service.journal.count() == 2  # type: ignore[attr-defined]

    asyncio.run(run())


def test_the_gates_of_predict_are_the_gates_of_infer(bundle_folder: Path, tmp_path: Path) -> None:
    "A key, a rate that counts tiles, a body that is too large, a service that is full, one that goes down."
    key = {"Authorization": "Bearer asker"}
    two = whole(shape=[2, 64, 64, 3], data=ZEROS * 2)

    async def run() -> None:
        async with client(bundle_folder, tmp_path, predict_keys=(hash_key("asker"),), rate=5) as asked:
            assert (await asked.post(INFER, json=two)).status_code == 401
            statuses = [(await asked.post(INFER, json=two, headers=key)).status_code for _ in range(3)]
            assert statuses == [200, 200, 429]
        async with client(bundle_folder, tmp_path, batch_bytes=1000) as asked:
            large = await asked.post(INFER, json=two)
            assert large.status_code == 413 and "error" in large.json()
        async with client(bundle_folder, tmp_path, requests=0) as asked:
            full = await asked.post(INFER, json=two)
            assert full.status_code == 429 and full.headers["retry-after"] == "1" and "error" in full.json()
            assert (await asked.get("/v2/models/eurosat/ready")).status_code == 200
            asked.app.state.service.closing = True  # type: ignore[attr-defined]
            for path in ("/v2/health/ready", "/v2/models/eurosat/ready"):
                assert (await asked.get(path)).status_code == 503
            assert (await asked.get("/v2/health/live")).status_code == 200

    asyncio.run(run())


def test_a_version_that_is_named_answers_itself(bundle_folder: Path, tmp_path: Path) -> None:
    "Beside a canary that gets all other requests; the shadow cannot be named."
    ids = [read_bundle(bundle_folder).id]
    for year in (2026, 2027):
        folder = tmp_path / str(year)
        shutil.copytree(bundle_folder, folder)
        ids.append(update_bundle(folder, {"created": f"{year}-01-01T00:00:00Z"}, {}).id)

    async def run() -> None:
        async with client(bundle_folder, tmp_path) as asked:
            engine = asked.app.state.service.engine  # type: ignore[attr-defined]
            await engine.set_canary(tmp_path / "2026", 1.0)
            await engine.set_shadow(tmp_path / "2027")
            assert (await asked.get("/v2/models/eurosat")).json()["versions"] == ids[:2]
            assert (await asked.post(INFER, json=whole())).json()["model_version"] == ids[1]
            for id in ids[:2]:
                answer = await asked.post(f"/v2/models/eurosat/versions/{id}/infer", json=whole())
                assert answer.json()["model_version"] == id
            for id in (ids[2], ids[0][:11], "", "0" * 64):
                answer = await asked.post(f"/v2/models/eurosat/versions/{id}/infer", json=whole())
                assert answer.status_code == 404, (id, answer.text, ids)

    asyncio.run(run())
