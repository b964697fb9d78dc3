"""Alerts: their tests pass and can fail, what they ask for exists, and a real Prometheus calls and calls off."""

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from eurosat_mlops.alerts import (
    exported_metrics,
    inline_records,
    make_dashboard,
    metrics_in,
    read_rules,
    write_monitoring,
)
from eurosat_mlops.corruptions import corrupt
from eurosat_mlops.discovery import find_faults, read_document, type_schema
from eurosat_mlops.entries import encode_png
from eurosat_mlops.processes import free_port, running_service, stop_service
from eurosat_mlops.synthetic import make_synthetic

ROOT = Path(__file__).resolve().parents[1]
MONITORING = ROOT / "deploy" / "monitoring"
RULES = read_rules(MONITORING / "rules.yml")
ALERTS = [rule for rule in RULES if not rule.recorded]


def need(*programs: str) -> None:
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"{missing[0]} is not here; on Debian: apt-get install prometheus prometheus-alertmanager")


def promtool(*words: str, cwd: Path = MONITORING) -> subprocess.CompletedProcess[str]:
    need("promtool")
    return subprocess.run(["promtool", *words], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_prometheus_takes_the_rules_and_its_settings() -> None:
    done = promtool("check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_alertmanager_takes_the_routes() -> None:
    need("amtool")
    done = subprocess.run(
        ["amtool", "check-config", "alertmanager.yml"], cwd=MONITORING, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_speaks_and_is_silent_where_its_test_says() -> None:
    done = promtool("test", "rules", "rules_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_alert_that_is_wrong_fails_its_test(tmp_path: Path) -> None:
    text = (MONITORING / "rules.yml").read_text()
    assert "eurosat_journal_lag_rows > 1000" in text
    (tmp_path / "rules.yml").write_text(
        text.replace("eurosat_journal_lag_rows > 1000", "eurosat_journal_lag_rows > 9e9")
    )
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())
    tests["tests"] = [each for each in tests["tests"] if "the record falls behind" in each["name"]]
    assert len(tests["tests"]) == 1
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(tests))
    assert promtool("test", "rules", "rules_test.yml", cwd=tmp_path).returncode != 0


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.name)
def test_every_alert_has_a_test_in_which_it_speaks_a_page_in_the_runbook_and_somebody_to_call(rule: Any) -> None:
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    expected = [check for each in tests for check in each["alert_rule_test"] if check["alertname"] == rule.name]
    assert any(check["exp_alerts"] for check in expected), "no test in which it speaks"
    headings = [
        "".join(cell["source"]).strip()
        for cell in json.loads((ROOT / "nbs" / "runbook.ipynb").read_text())["cells"]
        if cell["cell_type"] == "markdown"
    ]
    assert f"## {rule.name}" in headings
    assert rule.labels["severity"] in ("page", "ticket") and rule.summary


def test_every_metric_that_is_asked_for_exists(bundle_folder: Path, tmp_path: Path) -> None:
    board = [target["expr"] for panel in make_dashboard()["panels"] for target in panel.get("targets", [])]
    recorded = {rule.name for rule in RULES if rule.recorded}
    asked = {name for expr in [*board, *(rule.expr for rule in RULES)] for name in metrics_in(expr)} - recorded
    with running_service(str(bundle_folder), tmp_path) as service:
        exported = exported_metrics(httpx.get(f"{service.url}/metrics").text)
    assert len(asked) > 10 and sorted(asked - exported) == []
    assert "eurosat_made_up_total" not in exported


def test_what_is_made_from_the_rules_is_what_is_committed(tmp_path: Path) -> None:
    shutil.copy(MONITORING / "rules.yml", tmp_path)
    for path in write_monitoring(tmp_path):
        committed = (MONITORING / path.name).read_text()
        assert path.read_text() == committed, f"{path.name}: make alerts, and commit"


def test_google_cloud_would_take_every_policy_and_not_a_broken_one() -> None:
    schema = type_schema(read_document("monitoring", "v3"), "AlertPolicy")
    policies = json.loads((MONITORING / "google-cloud-alerts.json").read_text())
    assert [policy["displayName"] for policy in policies] == [rule.name for rule in ALERTS]
    assert [fault for policy in policies for fault in find_faults(policy, schema)] == []
    assert not [name for rule in inline_records(RULES) for name in metrics_in(rule.expr) if ":" in name]
    policies[0]["conditions"][0]["conditionPrometheusQueryLanguage"]["wait"] = "1m"
    assert find_faults(policies[0], schema)


class Receiver(ThreadingHTTPServer):
    "Hears what Alertmanager says."

    def __init__(self) -> None:
        heard: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.heard = heard

    def states(self, alert: str) -> list[str]:
        "firing and resolved, in the order in which they came."
        return [a["status"] for each in self.heard for a in each["alerts"] if a["labels"]["alertname"] == alert]


def hastened(text: str) -> str:
    "The same settings, in seconds rather than minutes; the expressions stay as they are."
    return re.sub(
        r"(for|group_wait|group_interval|scrape_interval|evaluation_interval|interval): \d+[smhd]", r"\1: 1s", text
    )


@contextmanager
def watched(place: Path, service_port: int) -> Iterator[Receiver]:
    "A real Prometheus and a real Alertmanager, which watch a service by the project's own settings."
    prometheus, alertmanager, receiver = free_port(), free_port(), Receiver()
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    places = {"8000": service_port, "9093": alertmanager, "9096": receiver.server_address[1]}
    for name in ("prometheus.yml", "rules.yml", "alertmanager.yml"):
        text = hastened((MONITORING / name).read_text())
        for old, new in places.items():
            text = text.replace(f"localhost:{old}", f"127.0.0.1:{new}")
        (place / name).write_text(text)
    alert_options = (f"--web.listen-address=127.0.0.1:{alertmanager}", f"--storage.path={place / 'a'}")
    options = (f"--web.listen-address=127.0.0.1:{prometheus}", f"--storage.tsdb.path={place / 'p'}")
    commands = [
        ["prometheus-alertmanager", "--config.file=alertmanager.yml", "--cluster.listen-address=", *alert_options],
        ["prometheus", "--config.file=prometheus.yml", *options],
    ]
    running = [subprocess.Popen(c, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]
    try:
        yield receiver
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=20)
        receiver.shutdown()


def until(holds: Callable[[], bool], seconds: float = 60) -> bool:
    "Whether it comes to hold."
    end = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def ask(url: str, tiles: np.ndarray) -> None:
    "Let the service answer tiles, in batches."
    files = [("files", (f"{i}.png", encode_png(tile))) for i, tile in enumerate(tiles)]
    with ThreadPoolExecutor(4) as pool:
        batches = [files[i : i + 25] for i in range(0, len(files), 25)]
        answers = list(pool.map(lambda batch: httpx.post(f"{url}/predict/batch", files=batch, timeout=60), batches))
    assert {answer.status_code for answer in answers} == {200}


def test_hazy_tiles_raise_an_alert_that_arrives_and_clear_ones_call_it_off(bundle_folder: Path, tmp_path: Path) -> None:
    need("prometheus", "prometheus-alertmanager")
    clear, _ = make_synthetic().part("val")
    (tmp_path / "watch").mkdir()
    with (
        running_service(str(bundle_folder), tmp_path / "service") as service,
        watched(tmp_path / "watch", service.port) as receiver,
    ):
        ask(service.url, clear[:250])
        time.sleep(3)  # several times of looking
        assert receiver.states("EurosatInputsMoved") == [], "clear tiles are no reason to call"
        ask(service.url, corrupt(clear[:400], "haze", 5))
        assert until(lambda: "firing" in receiver.states("EurosatInputsMoved")), "nobody was called"
        for _ in range(8):
            ask(service.url, clear)
        assert until(lambda: receiver.states("EurosatInputsMoved")[-1] == "resolved"), "nobody was told that it is over"
        assert receiver.states("EurosatDown") == []
        stop_service(service)
        assert until(lambda: "firing" in receiver.states("EurosatDown")), "a dead service calls nobody"
