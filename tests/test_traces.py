"""Traces of a running service, as a collector gets them over OTLP."""

import asyncio
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from PIL import Image

from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.core import EurosatError, Settings
from eurosat_mlops.engine import Engine, open_model
from eurosat_mlops.journal import open_journal
from eurosat_mlops.problems import ServeConfig
from eurosat_mlops.serve import make_app
from eurosat_mlops.service import Service
from eurosat_mlops.traces import Traces

CALLER = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    spans: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            spans.extend(span for each in sent.resource_spans for scope in each.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1/traces", spans
        listening.shutdown()


def answer(bundle: Path, place: Path, address: str) -> int:
    "The status of one prediction asked for by a caller that has a trace of its own."

    async def run() -> int:
        settings = Settings(place, models_dir=place / "models")
        engine = Engine(settings, open_model(bundle, settings), threads=1)
        service = Service(ServeConfig(), engine, open_journal(str(place / "journal.db")), Traces(address))
        transport = httpx.ASGITransport(make_app(service.config, engine, service.journal, service=service))
        file = io.BytesIO()
        Image.fromarray(read_bundle(bundle).reference["golden_tiles"][0]).save(file, "PNG")
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as asked:
            got = await asked.post("/predict?top_k=1", content=file.getvalue(), headers={"traceparent": CALLER})
            await asked.get("/no/such/place")
        await service.close()
        return got.status_code

    return asyncio.run(run())


def test_a_request_is_one_trace_with_its_parts(
    bundle_folder: Path, tmp_path: Path, collector: tuple[str, list[Any]]
) -> None:
    address, spans = collector
    assert answer(bundle_folder, tmp_path, address) == 200
    named = {span.name: span for span in spans}
    assert set(named) == {"POST /predict", "infer", "record", "GET other"}
    asked = named["POST /predict"]
    assert asked.trace_id.hex() == "a" * 32 and asked.parent_span_id.hex() == "b" * 16
    assert named["infer"].parent_span_id == named["record"].parent_span_id == asked.span_id
    values = {each.key: each.value.int_value or each.value.string_value for each in asked.attributes}
    assert values.pop("request_id") and values == {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
    }


def test_a_collector_that_is_away_costs_only_the_spans(bundle_folder: Path, tmp_path: Path) -> None:
    assert answer(bundle_folder, tmp_path, "http://127.0.0.1:9/v1/traces") == 200


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(EurosatError, match="expected an OTLP address"):
        Traces("collector")
