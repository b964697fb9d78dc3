"""Tracking: the record on disk, the mode, what W&B's files hold, and that neither a key nor a fault gets out."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from eurosat_mlops.core import EurosatError, log_to
from eurosat_mlops.track import Tracker, read_history, resolve_mode

KEY = "planted0key1" * 4


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    "No key, no mode and an empty home; whatever a test sets, the tracker leaves as it found it."
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there: nothing leaves the machine
    yield
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file() and p.name != ".netrc"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def wandb_records(run: Path) -> list:
    "The records of an offline run: protobuf messages in LevelDB's log format."
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    data, place, records, parts = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_history(records: list) -> list[dict]:
    rows = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row} for row in rows]


@pytest.mark.parametrize("key", ["", " \n\t", "''", "short"])
def test_auto_without_a_usable_key_is_offline(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert resolve_mode("auto") == resolve_mode("online") == "offline"


@pytest.mark.parametrize(
    "asked, got", [("", "online"), ("offline", "offline"), ("disabled", "off"), ("nonsense", "online")]
)
def test_auto_with_a_key_is_online_unless_the_environment_says_otherwise(
    asked: str, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", f' "{KEY}"\n')
    monkeypatch.setenv("WANDB_MODE", asked)
    assert resolve_mode("auto") == got
    assert resolve_mode("offline") == "offline"


def test_a_key_that_wandb_login_stored_counts(tmp_path: Path) -> None:
    (tmp_path / "home" / ".netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    assert resolve_mode("auto") == "online"
    (tmp_path / "home" / ".netrc").write_text("machine machine\n")
    assert resolve_mode("auto") == "offline"


def test_an_unknown_mode_stops_the_run(run: Path) -> None:
    with pytest.raises(EurosatError, match="expected one of auto, online, offline, off"):
        Tracker(run, "onlin")


def test_off_writes_the_record_and_never_imports_wandb(run: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from eurosat_mlops.track import Tracker
with Tracker(Path({str(run)!r}), "off") as tracker:
    tracker.log({{"loss": 1.0}}, 1)
    tracker.log_confusion([[1]], ["a"])
assert not {{"wandb", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert read_history(run / "history.jsonl") == [{"step": 1, "loss": 1.0}]
    assert [p.name for p in run.iterdir()] == ["history.jsonl"]


def test_without_wandb_the_record_is_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with log_to(run), Tracker(run, "auto") as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert tracker.mode == "off" and len(read_history(run / "history.jsonl")) == 1
    assert "wandb" in (run / "log.jsonl").read_text()


def test_an_offline_run_holds_everything(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", f"'{KEY}'\n")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_MODE", "")
    before = dict(os.environ)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "bundle.json").write_text("{}")
    tiles = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    with log_to(run), Tracker(run, "offline", {"lr": 0.01, "data_digest": "9d0d", "git_commit": "abc"}) as tracker:
        tracker.log({"batch/loss": np.float32(0.5)}, step=20)
        tracker.log({"epoch/loss": float("nan")}, step=10)  # a step that goes back is kept too
        tracker.log_images("mistakes", tiles, ["River", "Highway"])
        tracker.log_confusion(np.array([[5, 1], [0, 6]]), ["River", "Highway"])
        tracker.log_bundle(bundle, "a bundle")
        assert tracker.mode == "offline"
    assert dict(os.environ) == before
    assert read_history(run / "history.jsonl") == [{"step": 20, "batch/loss": 0.5}, {"step": 10, "epoch/loss": None}]

    records = wandb_records(run)
    rows = wandb_history(records)
    assert any(row.get("batch/loss") == 0.5 and row["step"] == 20 for row in rows)
    assert any("epoch/loss" in row and row["step"] == 10 for row in rows)
    (images,) = [row for row in rows if "mistakes/count" in row]
    assert images["mistakes/count"] == 2 and images["mistakes/captions"] == ["River", "Highway"]
    assert all(list(run.rglob(Path(name).name)) for name in images["mistakes/filenames"])
    assert any(row.get("confusion_matrix_table/nrows") == 4 for row in rows)
    (table,) = run.rglob("confusion_matrix_table*.table.json")
    assert ["River", "Highway", 1] in json.loads(table.read_text())["data"]
    (started,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert started.run_id == tracker.id and started.project == "eurosat_mlops"
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert config["data_digest"] == "9d0d" and config["git_commit"] == "abc"
    (artifact,) = [r.artifact for r in records if r.artifact.type == "model"]
    assert artifact.name == "a-bundle" and [entry.path for entry in artifact.manifest.contents] == ["bundle.json"]
    (ended,) = [r.exit for r in records if r.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 0

    assert not (tmp_path / "elsewhere").exists() and not [p for p in run.rglob("*") if p.is_symlink()]
    assert not [p for p in run.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    out, err = capfd.readouterr()
    assert KEY not in out + err and out + err == ""


def test_a_server_out_of_reach_leaves_an_offline_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY + "\n")
    began = time.monotonic()
    with log_to(run), Tracker(run, "auto", init_timeout=3, run_id="resumed1") as tracker:
        tracker.log({"loss": 0.25}, step=1)
    assert time.monotonic() - began < 60 and tracker.mode == "offline"
    assert any(row.get("loss") == 0.25 for row in wandb_history(wandb_records(run)))
    warned = [row["message"] for row in read_history(run / "log.jsonl")]
    assert any("offline instead of online" in message for message in warned)
    out, err = capfd.readouterr()
    assert KEY not in out + err
    assert not [p for p in run.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def test_a_key_that_the_server_refuses_leaves_an_offline_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(401)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        began = time.monotonic()
        with log_to(run), Tracker(run, "online") as tracker:
            tracker.log({"loss": 0.25}, step=1)
        server.shutdown()
    assert time.monotonic() - began < 60 and tracker.mode == "offline"
    assert any(row.get("loss") == 0.25 for row in wandb_history(wandb_records(run)))
    assert KEY not in (run / "log.jsonl").read_text()


def test_a_call_that_fails_is_said_once_and_the_run_goes_on(run: Path) -> None:
    with log_to(run), Tracker(run, "offline") as tracker:
        for _ in range(3):
            tracker.log_bundle(run / "no-such-folder", "bundle")
        tracker.log({"loss": 0.125}, step=1)
    warned = [row["message"] for row in read_history(run / "log.jsonl")]
    assert len(warned) == 1 and "log_bundle failed" in warned[0]
    assert any(row.get("loss") == 0.125 for row in wandb_history(wandb_records(run)))


def test_a_service_that_hangs_delays_only_the_end_and_only_so_long(run: Path) -> None:
    code = f"""
import os, signal, sys, time
from pathlib import Path
from eurosat_mlops.track import Tracker
tracker = Tracker(Path({str(run)!r}), "offline", finish_timeout=1)
service = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and (p / "stat").exists()
           and (p / "stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid())
           and "wandb-core" in (p / "cmdline").read_text()]
os.kill(service[0], signal.SIGSTOP)
began = time.monotonic()
for step in range(2000):
    tracker.log({{"loss": 1.0}}, step)
logged = time.monotonic()
tracker.finish()
print(logged - began, time.monotonic() - logged)
os.kill(service[0], signal.SIGKILL)
"""
    if not Path("/proc/self/stat").exists():
        pytest.skip("stopping the service is tried on Linux, where /proc tells which process it is")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    logging, finishing = ended.stdout.split()
    assert float(logging) < 10 and float(finishing) < 30, ended.stdout
    assert len(read_history(run / "history.jsonl")) == 2000


def test_a_run_that_fails_is_marked_so(run: Path) -> None:
    with pytest.raises(ZeroDivisionError), Tracker(run, "offline") as tracker:
        tracker.log({"loss": 1.0})
        1 / 0
    assert [r.exit.exit_code for r in wandb_records(run) if r.WhichOneof("record_type") == "exit"] == [1]
    assert "WANDB_SERVICE" not in os.environ


def test_two_trackers_at_once_keep_apart(tmp_path: Path) -> None:
    with Tracker(tmp_path / "outer", "offline") as outer:
        with Tracker(tmp_path / "inner", "offline") as inner:
            inner.log({"loss": 1.0}, 1)
        outer.log({"loss": 2.0}, 1)
    for name, value in (("outer", 2.0), ("inner", 1.0)):
        rows = wandb_history(wandb_records(tmp_path / name))
        assert [row["loss"] for row in rows if "loss" in row] == [value]
