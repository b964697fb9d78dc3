"""The journal: what it says is kept, is kept; under kills, full disks, locks and several writers, on both databases."""

import asyncio
import csv
import json
import os
import pwd
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from eurosat_mlops.core import EurosatError
from eurosat_mlops.database import open_database
from eurosat_mlops.entries import Entry, as_utc, hash_pixels, utc_now
from eurosat_mlops.journal import STEPS, Journal, JournalBusy, JournalError, open_journal

CLASSES = ("Forest", "River", "SeaLake")
MODEL = "a" * 64


def make_entry(name: str = "request", seed: int = 0, **changes: object) -> Entry:
    rng = np.random.default_rng(seed)
    tile = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    entry = Entry(
        time=utc_now(),
        request_id=name,
        model_id=MODEL,
        input_hash=hash_pixels(tile),
        shape=tile.shape,
        label="River",
        probabilities=np.array([0.25, 0.5, 0.25], np.float32),
        embedding=rng.normal(size=128).astype(np.float32),
        channel_mean=tile.mean((0, 1)),
        channel_std=tile.std((0, 1)),
        confidence=0.5,
        distance=8.25,
        uncertain=True,
        unfamiliar=False,
        latency_ms=1.5,
        tile=tile,
    )
    return replace(entry, **changes)


# PostgreSQL: a real server, in a folder of its own, reached by a socket and by a password


class Server:
    "A server of one's own; PostgreSQL refuses to be started by root, so then it runs as the user of its package."

    def __init__(self, bin: Path, folder: Path) -> None:
        self.bin, self.folder, self.count = bin, folder, 0
        self.user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        (folder / "password").write_text("s3cret-word")
        if self.user:
            owner = pwd.getpwnam("postgres")
            for path in (folder, folder / "password"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        access = ["-U", "eurosat", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
        command = [bin / "initdb", "-D", folder / "data", "--no-sync", "-E", "UTF8", "--locale=C", *access]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, **self.user)
        self.start()

    def start(self) -> None:
        command = [self.bin / "postgres", "-D", self.folder / "data", "-k", self.folder, "-c", "listen_addresses="]
        command += ["-c", "recovery_init_sync_method=syncfs"]  # else a crash costs an fsync of each file
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stderr=log, **self.user)
        for _ in range(200):
            try:
                with closing(open_database(self.url("postgres"))) as database:
                    database.ask("SELECT 1")
                return
            except EurosatError as error:
                reason = error
                time.sleep(0.05)
        raise reason

    def stop(self, how: signal.Signals) -> None:
        "SIGINT is a fast but orderly shutdown, SIGQUIT a crash."
        self.process.send_signal(how)
        self.process.wait(30)

    def url(self, name: str, password: str = "s3cret-word") -> str:
        return f"postgresql://eurosat:{password}@/{name}?host={self.folder}"

    def new_database(self) -> str:
        self.count += 1
        with closing(open_database(self.url("postgres"))) as database:
            database.ask(f"CREATE DATABASE journal{self.count}")
        return self.url(f"journal{self.count}")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="psycopg is not here: pip install 'eurosat-mlops[postgres]'")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    bin = found[-1].parent if found else Path(shutil.which("initdb") or "").parent
    if not (bin / "initdb").exists():
        pytest.skip("PostgreSQL is not here: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # the name of a socket must be short
    try:
        running = Server(bin, folder)
        yield running
        running.stop(signal.SIGQUIT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/journal.db"
    return request.getfixturevalue("server").new_database()


@pytest.fixture
def journal(url: str) -> Iterator[Journal]:
    with open_journal(url, keep_images=True) as opened:
        yield opened


# What is written can be read


def test_an_entry_comes_back_as_it_was(journal: Journal) -> None:
    entry = make_entry(role="canary", embedding=np.linspace(-1e6, 1e6, 9))
    assert journal.append([entry, make_entry("next")]) == [1, 2]
    record = next(journal.read())
    simple = "time request_id model_id input_hash shape label confidence distance uncertain unfamiliar latency_ms role"
    assert all(getattr(record, name) == getattr(entry, name) for name in simple.split())
    assert type(record.uncertain) is bool and record.probabilities.dtype == np.float32
    assert np.array_equal(record.probabilities, entry.probabilities)
    assert np.allclose(record.channel_std, entry.channel_std)
    assert record.embedding.dtype == np.float16 and np.isfinite(record.embedding).all(), "cut, not infinite"
    assert (record.id, record.feedback, record.tile) == (1, "", None)


def test_read_and_count_know_their_conditions(journal: Journal) -> None:
    start = datetime(2025, 3, 1, tzinfo=UTC)
    rows = [
        make_entry(f"r{i}", time=as_utc(start + timedelta(hours=i)), label=CLASSES[i % 3], model_id="ab"[i % 2] * 64)
        for i in range(1200)
    ]
    assert journal.append(rows) == list(range(1, 1201))

    def ids(**which: object) -> list[int]:
        found = [record.id for record in journal.read(**which)]
        assert journal.count(**which) == len(found)
        return found

    assert ids() == list(range(1, 1201)), "more than a page"
    assert ids(limit=3) == [1, 2, 3] and ids(after_id=1198) == [1199, 1200] and ids(after_id=5, limit=1) == [6]
    assert ids(since="2025-03-02", until="2025-03-02T02:00:00+01:00") == [25]
    assert ids(since="2025-03-02", until="2025-03-02T02:00:00Z") == [25, 26]
    assert ids(until="2025-03-01") == [] and ids(since="2030-01-01") == []
    assert ids(label="Forest", model="b" * 64, since="2025-03-01T06:00") == list(range(10, 1201, 6))
    for wrong in ({"since": "soon"}, {"limit": -1}, {"after_id": 2**70}, {"label": "a\0"}, {"lable": "River"}):
        with pytest.raises(EurosatError):
            journal.read(**wrong)


def test_a_reader_holds_a_page_and_hinders_nobody(journal: Journal) -> None:
    for _ in range(6):
        journal.append([make_entry(embedding=np.ones(512, np.float32), tile=None)] * 500)
    reader = journal.read()
    next(reader)
    tracemalloc.start()
    seen = sum(1 for _ in zip(range(1500), reader, strict=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000, "3,000 rows take about 10 MB"
    journal.append([make_entry("new")])
    assert journal.retain(max_age_days=0) == 3001, "deleting and vacuuming wait for no reader"
    assert list(reader) == [] or seen + len(list(reader)) < 3000


def test_feedback_lies_beside_and_the_newest_counts(journal: Journal) -> None:
    journal.append([make_entry("one"), make_entry("one", role="shadow"), make_entry("two", seed=1)])
    journal.append([make_entry("many", seed=seed) for seed in range(3)])
    assert journal.feedback("one", "Forest", "page", CLASSES) == [1, 2], "the shadow's entry of the same tile too"
    assert journal.feedback(1, "SeaLake", "expert", CLASSES, request_id="one") == [1]
    with pytest.raises(EurosatError, match="nothing is kept"):
        journal.feedback(1, "Forest", "page", CLASSES, request_id="two")
    found = [(record.feedback, record.feedback_source) for record in journal.read(limit=3)]
    assert found == [("SeaLake", "expert"), ("Forest", "page"), ("", "")]
    assert next(journal.read()).label == "River"
    for entry, label, classes, said in (
        (1, "Lake", CLASSES, "expected Forest, River, SeaLake"),
        (1, "River", CLASSES[:2], "the 3 classes"),
        ("many", "River", CLASSES, r"several tiles: \[4, 5, 6\]"),
        (99, "River", CLASSES, "nothing is kept"),
        (10**30, "River", CLASSES, "64 bits"),
        ("a\0b", "River", CLASSES, "printable"),
    ):
        with pytest.raises(EurosatError, match=said):
            journal.feedback(entry, label, "page", classes)


def test_deleting_takes_everything_that_hangs_on_it(journal: Journal) -> None:
    journal.append([make_entry("stay"), make_entry("go", seed=1), make_entry("go", seed=2)])
    journal.feedback(2, "Forest", "page", CLASSES)
    assert journal.image(2).startswith(b"\x89PNG")
    assert journal.delete("go") == 2 and [record.request_id for record in journal.read()] == ["stay"]
    assert journal._commits.add(lambda database: database.ask("SELECT * FROM feedback")).result() == []
    assert len(journal._commits.add(lambda database: database.ask("SELECT * FROM images")).result()) == 1
    with pytest.raises(EurosatError, match="nothing is kept"):
        journal.delete(2)
    assert journal.append([make_entry()]) == [4], "an id is never used twice"


def test_retention_by_age_and_by_size_takes_the_oldest(journal: Journal) -> None:
    old = as_utc(datetime.now(UTC) - timedelta(days=10))
    journal.append([make_entry(time=old)] * 700 + [make_entry()] * 1300)
    assert journal.retain() == 0 and journal.retain(max_age_days=11) == 0
    assert journal.retain(max_age_days=9) == 700 and journal.count() == 1300
    used = journal._commits.add(lambda database: database.used()).result()
    removed = journal.retain(max_bytes=used // 2)
    assert 550 < removed < 800
    assert [record.id for record in journal.read()] == list(range(2001 - 1300 + removed, 2001)), "the oldest went"
    assert journal._commits.add(lambda database: database.used()).result() <= used // 2
    assert journal.retain(max_bytes=0) == 1300 - removed and journal.count() == 0
    for days, size in ((-1, None), (10**9, None), (None, -1), (float("nan"), None)):
        with pytest.raises(EurosatError, match="retain"):
            journal.retain(days, size)


def test_exports_are_safe_whole_and_the_same(journal: Journal, tmp_path: Path) -> None:
    journal.append([make_entry("=HYPERLINK(1)"), make_entry("@x", label="Forest")])
    journal.feedback(1, "SeaLake", "-page", CLASSES)
    text = journal.export(tmp_path / "a.csv", "csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert rows[0]["request_id"] == "'=HYPERLINK(1)" and rows[0]["feedback_source"] == "'-page"
    assert json.loads(rows[0]["probabilities"]) == [0.25, 0.5, 0.25] and rows[0]["uncertain"] == "true"
    lines = [json.loads(line) for line in journal.export(tmp_path / "a.jsonl", "jsonl").read_text().splitlines()]
    assert lines[0]["request_id"] == "=HYPERLINK(1)" and len(lines[0]["embedding"]) == 128
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not here: pip install 'eurosat-mlops[parquet]'")
    table = parquet.read_table(journal.export(tmp_path / "a.parquet", "parquet", label="Forest")).to_pylist()
    assert len(table) == 1 and table[0].keys() == lines[1].keys()
    assert {name: table[0][name] for name in rows[0] if "channel" not in name} == {
        name: lines[1][name] for name in rows[0] if "channel" not in name
    }
    empty = journal.export(tmp_path / "none.parquet", "parquet", label="SeaLake")
    assert parquet.read_table(empty).schema == parquet.read_table(tmp_path / "a.parquet").schema
    with pytest.raises(EurosatError, match="expected csv, jsonl, parquet"):
        journal.export(tmp_path / "a.xls", "xls")


# Nothing is said to be kept that is not


def test_nobody_is_told_before_the_commit(url: str, journal: Journal) -> None:
    with closing(open_database(url)) as other:
        with other.transaction():
            futures = [journal.submit([make_entry(f"r{i}")]) for i in range(20)]
            time.sleep(0.2)
            assert not any(future.done() for future in futures) and journal.lag == 20
            assert journal.count() == 0, "reading goes on"
        ids = [future.result(10)[0] for future in futures]
    assert ids == list(range(1, 21)) and journal.lag == 0 and journal.count() == 20


def test_a_full_queue_says_so_and_closing_loses_nothing(url: str) -> None:
    journal = open_journal(url, most_waiting=50)
    with closing(open_database(url)) as other:
        with other.transaction():
            futures = [journal.submit([make_entry(f"r{i}")] * 5) for i in range(10)]
            for rows in (1, 51):
                with pytest.raises(JournalBusy, match="50 rows wait"):
                    journal.submit([make_entry()] * rows)
            closing_thread = threading.Thread(target=journal.close)
            closing_thread.start()
            time.sleep(0.1)
            with pytest.raises(JournalError, match="closed"):
                journal.submit([make_entry()])
        closing_thread.join(10)
    assert sorted(id for future in futures for id in future.result(0)) == list(range(1, 51))
    with open_journal(url) as again:
        assert again.count() == 50


def test_a_bad_entry_hurts_only_its_owner(url: str, journal: Journal) -> None:
    for changes, name in (
        ({"distance": float("nan")}, "distance"),
        ({"probabilities": np.array([np.inf])}, "probabilities"),
        ({"request_id": "a\0"}, "request_id"),
        ({"label": "\ud800"}, "label"),
        ({"time": "2026-01-31 12:00"}, "time"),
        ({"role": "boss"}, "role"),
        ({"tile": np.zeros((4, 4, 13), np.uint8)}, "tile"),
    ):
        with pytest.raises(EurosatError, match=name):
            journal.submit([make_entry(**changes)])
    with closing(open_database(url)) as other, other.transaction():
        first = journal.submit([make_entry("first")])
        time.sleep(0.1)  # its group is formed, the others wait for the next
        cancelled, last = journal.submit([make_entry("cancelled")]), journal.submit([make_entry("last")])
        assert cancelled.cancel() and not first.cancel()
    assert len(first.result(10)) == len(last.result(10)) == 1
    assert [record.request_id for record in journal.read()] == ["first", "last"], "what was called off is not recorded"


def test_an_asyncio_service_awaits_it(journal: Journal) -> None:
    async def serve() -> list[list[int]]:
        return await asyncio.gather(*(asyncio.wrap_future(journal.submit([make_entry(f"r{i}")])) for i in range(40)))

    assert sorted(asyncio.run(serve())) == [[id] for id in range(1, 41)]


KILLED = """
import os, random, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from test_journal import make_entry, open_journal
url, acknowledged, kills = sys.argv[2], os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT), int(sys.argv[4])
draw = random.Random(0)

def write(journal, who):
    for n in range(1_000_000):
        journal.append([make_entry(f"{who}-{n}", tile=None)])
        os.write(acknowledged, f"{who}-{n}\\n".encode())

for kill in range(kills):
    before = os.fstat(acknowledged).st_size
    child = os.fork()
    if not child:
        journal = open_journal(url)
        for thread in range(4):
            threading.Thread(target=write, args=(journal, f"{kill}-{thread}")).start()
        time.sleep(60)
    while os.fstat(acknowledged).st_size == before and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def run_script(script: str, *args: object) -> None:
    command = [sys.executable, "-c", script, str(Path(__file__).parent), *map(str, args)]
    subprocess.run(command, check=True, timeout=100, cwd=Path(__file__).resolve().parents[1])


def test_twenty_kills_lose_nothing_that_was_acknowledged(url: str, tmp_path: Path) -> None:
    run_script(KILLED, url, tmp_path / "acknowledged", 20)
    acknowledged = (tmp_path / "acknowledged").read_text().split()
    with open_journal(url) as journal:
        recorded = [record.request_id for record in journal.read()]
    assert len({name.split("-")[0] for name in acknowledged}) == 20 and len(acknowledged) > 100
    assert set(acknowledged) <= set(recorded) and len(set(recorded)) == len(recorded)
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(tmp_path / "journal.db")) as raw:
            assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


TWO = """
import sys
sys.path.insert(0, sys.argv[1])
from test_journal import make_entry, open_journal
with open_journal(sys.argv[2], wait=20) as journal:
    for n in range(100):
        journal.append([make_entry(f"{sys.argv[3]}-{n}", tile=None)])
"""


def test_two_processes_share_a_journal_and_a_follower_misses_nothing(url: str, tmp_path: Path) -> None:
    "Both find no database and make it; the follower asks again and again for what is new."
    command = [sys.executable, "-c", TWO, str(Path(__file__).parent), url]
    root = Path(__file__).resolve().parents[1]
    writers = [subprocess.Popen([*command, name], cwd=root) for name in ("a", "b")]
    seen: list[int] = []
    names: list[str] = []
    with open_journal(url, wait=20) as journal:
        while True:
            ended = all(writer.poll() is not None for writer in writers)
            for record in journal.read(after_id=seen[-1] if seen else 0):
                seen.append(record.id)
                names.append(record.request_id)
            if ended:
                break
        assert [writer.returncode for writer in writers] == [0, 0]
        assert journal.count() == 200 == len(seen) and len(set(names)) == 200


# SQLite: the file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def test_the_file_is_durable_and_private(path: Path) -> None:
    with open_journal(str(path)) as journal:
        journal.append([make_entry("somebody's request")])
        ask = journal._commits.add
        settings = ask(
            lambda database: [
                database.ask(f"PRAGMA {name}")[0][0]
                for name in ("synchronous", "journal_mode", "auto_vacuum", "secure_delete")
            ]
        )
        assert settings.result() == [2, "wal", 2, 1]
        assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
        assert journal.image(1) is None, "no image unless it is switched on"
        search = ["grep", "-rc", "somebody", str(path.parent)]  # in another process: closing a file gives up its locks
        assert subprocess.run(search, stdout=subprocess.DEVNULL, check=False).returncode == 0
        journal.delete(1)
        assert subprocess.run(search, stdout=subprocess.DEVNULL, check=False).returncode == 1


def test_retention_gives_the_space_back(path: Path) -> None:
    with open_journal(str(path)) as journal:
        journal.append([make_entry(f"r{i}") for i in range(2000)])
        full = path.stat().st_size + path.with_name("journal.db-wal").stat().st_size
        journal.retain(max_bytes=200_000)
        assert 0 < journal.count() < 300
        assert path.stat().st_size <= 200_000 < full and path.with_name("journal.db-wal").stat().st_size == 0


V1 = """
CREATE TABLE entries (id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, request_id TEXT NOT NULL,
    model_id TEXT NOT NULL, input_hash TEXT NOT NULL, shape TEXT NOT NULL, label TEXT NOT NULL,
    probabilities BLOB NOT NULL, embedding BLOB NOT NULL, channel_mean BLOB NOT NULL, channel_std BLOB NOT NULL,
    confidence REAL NOT NULL, distance REAL NOT NULL, uncertain SMALLINT NOT NULL, unfamiliar SMALLINT NOT NULL,
    latency_ms REAL NOT NULL);
CREATE INDEX entries_time ON entries (time, id);
CREATE TABLE feedback (id INTEGER PRIMARY KEY AUTOINCREMENT, entry_id BIGINT NOT NULL, time TEXT NOT NULL,
    label TEXT NOT NULL);
CREATE INDEX feedback_entry ON feedback (entry_id);
PRAGMA user_version = 1;
"""


def test_a_journal_of_the_first_version_is_brought_up(path: Path) -> None:
    "It has no roles, no sources, no images, and was made without the vacuum that gives space back."
    half, vector = np.ones(64, "<f2").tobytes(), np.array([0.2, 0.3, 0.5], "<f4").tobytes()
    with closing(sqlite3.connect(path)) as raw, raw:
        raw.executescript(V1)
        row = ("2024-05-01T00:00:00.000Z", "old", MODEL, "b" * 64, "64,64,3", "SeaLake", vector, half, vector, vector)
        marks = ", ".join("?" * 15)
        columns = (
            "time, request_id, model_id, input_hash, shape, label, probabilities, embedding, channel_mean, channel_std"
        )
        names = f"{columns}, confidence, distance, uncertain, unfamiliar, latency_ms"
        raw.executemany(f"INSERT INTO entries ({names}) VALUES ({marks})", [(*row, 0.5, 3.0, 1, 0, 2.0)] * 1000)
        raw.execute("INSERT INTO feedback (entry_id, time, label) VALUES (7, '2024-05-02T00:00:00.000Z', 'River')")
    with open_journal(str(path), keep_images=True) as journal:
        records = list(journal.read(limit=7))
        assert {(r.role, r.label, r.shape, r.uncertain) for r in records} == {("primary", "SeaLake", (64, 64, 3), True)}
        assert (records[6].feedback, records[6].feedback_source) == ("River", "")
        assert np.array_equal(records[0].embedding, np.ones(64)) and records[0].probabilities[2] == np.float32(0.5)
        assert journal.append([make_entry(role="shadow")]) == [1001] and journal.image(1001)
        size = path.stat().st_size
        assert journal.retain(max_age_days=100) == 1000 and path.stat().st_size < size / 4
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (len(STEPS),)


def test_a_migration_that_fails_leaves_the_old_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as raw, raw:
        raw.executescript(V1)
        raw.execute("CREATE TABLE images (in_the_way TEXT)")
    with pytest.raises(JournalError, match="images"):
        open_journal(str(path))
    with closing(sqlite3.connect(path)) as raw:
        columns = [row[1] for row in raw.execute("PRAGMA table_info(entries)")]
        assert raw.execute("PRAGMA user_version").fetchone() == (1,) and "role" not in columns


def test_what_is_no_journal_of_ours_is_refused(tmp_path: Path, url: str) -> None:
    open_journal(url).close()
    with closing(open_database(url)) as database, database.transaction():
        database.version(99)
    with pytest.raises(JournalError, match=r"version 99.*upgrade"):
        open_journal(url)
    (tmp_path / "text.db").write_text("just a text, and a long one " * 50)
    with closing(sqlite3.connect(tmp_path / "other.db")) as raw, raw:
        raw.execute("CREATE TABLE recipes (name TEXT)")
    for name, said in (("text.db", "another kind of file"), ("other.db", "something else"), ("", "name a file")):
        with pytest.raises(JournalError, match=said):
            open_journal(str(tmp_path / name))
    with pytest.raises(JournalError):
        open_journal("/proc/journal.db")
    for wrong in ("mysql://ada:s3cret-word@host/x", "", "sqlite:///"):
        with pytest.raises(EurosatError, match="expected a path") as caught:
            open_journal(wrong)
        assert "s3cret" not in str(caught.value)


def test_a_locked_database_is_said_and_gets_over_it(url: str) -> None:
    with open_journal(url, wait=0.2) as journal, closing(open_database(url)) as other:
        with other.transaction(), pytest.raises(JournalError, match="lock"):
            journal.append([make_entry()])
        assert len(journal.append([make_entry()])) == 1 and journal.count() == 1


def test_a_file_that_was_taken_away_is_noticed(path: Path) -> None:
    with open_journal(str(path)) as journal:
        journal.append([make_entry()])
        path.rename(path.with_suffix(".away"))
        with pytest.raises(JournalError, match="deleted or replaced"):
            journal.append([make_entry()])
        path.with_suffix(".away").rename(path)
        assert journal.append([make_entry()]) == [2]


def fill_and_free(path: Path, fill: Callable[[], None], free: Callable[[], None], said: str) -> None:
    "While there is no space every caller is told so; afterwards it goes on, and what it said was true."
    kept = []
    with open_journal(str(path)) as journal:
        kept += journal.append([make_entry("before", tile=None)])
        fill()
        failed = 0
        for _ in range(400):
            try:
                kept += journal.append([make_entry("during", tile=None)])
            except JournalError as error:
                assert said in str(error)
                failed += 1
        free()
        kept += journal.append([make_entry("after", tile=None)])
        assert failed > 5
        assert [record.id for record in journal.read()] == kept


def test_a_full_disk_is_said_and_gets_over_it(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: needs root and the right to mount")
    ballast = folder / "ballast"

    def fill() -> None:
        with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))

    try:
        fill_and_free(folder / "journal.db", fill, ballast.unlink, "the disk is full")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_journal import limit_files
limit_files(Path(sys.argv[2]))
"""


def limit_files(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    set_limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    fill_and_free(path, lambda: set_limit(120_000), lambda: set_limit(hard), "the disk refuses")


def test_a_disk_that_refuses_is_said_and_gets_over_it(path: Path) -> None:
    "A limit on the size of files makes each write fail, for everybody and without rights; in a process of its own."
    run_script(LIMITED, path)


# PostgreSQL: the server


def test_a_server_that_stops_is_said_and_gets_over_it(server: Server) -> None:
    "An immediate stop is a crash: what was acknowledged comes back from the server's own log."
    url = server.new_database()
    with open_journal(url, wait=2) as journal:
        journal.append([make_entry(f"r{i}", tile=None) for i in range(50)])
        server.stop(signal.SIGQUIT)
        try:
            with pytest.raises(JournalError, match=r"PostgreSQL \("):
                journal.append([make_entry("lost", tile=None)])
        finally:
            server.start()
        assert journal.append([make_entry("after")]) and journal.count() == 51
        server.stop(signal.SIGINT)
        server.start()
        journal.append([make_entry("first after an idle restart")])
        assert journal.count() == 52


def test_the_password_is_in_no_message(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    for url in (
        server.url("postgres", "wr0ng-word"),
        server.url("nowhere"),
        "postgresql://ada:wr0ng-word@127.0.0.1:1/x",
        "postgresql://ada:wr0ng-word/2@host/x",
        "postgresql://ada:wr0ng-word@2@host/x",
        "postgresql://ada:wr0ng-word?2@host/x",
        "postgresql://ada:wr0ng-word#2@host:port/x",
        "postgresql://ada@127.0.0.1:1/x?password=wr0ng-word",
    ):
        with pytest.raises(EurosatError) as caught:
            open_journal(url, wait=0.1)
        said = "".join([str(caught.value), repr(caught.value), repr(caught.value.__cause__), caplog.text])
        assert "wr0ng" not in said and "s3cret" not in said


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(EurosatError, match=r"eurosat-mlops\[postgres\]"):
        open_journal("postgresql://ada@host/x")
