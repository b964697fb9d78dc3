"""The watch over a served model: level and power, windows in bounded memory, results that are whole, and the routes."""

import asyncio
import json
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from eurosat_mlops.bundle import Bundle, read_bundle
from eurosat_mlops.cli import main
from eurosat_mlops.core import EurosatError, Settings
from eurosat_mlops.drift_routes import GAUGES, join_drift
from eurosat_mlops.engine import Engine, open_model
from eurosat_mlops.entries import Entry, as_utc
from eurosat_mlops.journal import open_journal
from eurosat_mlops.monitor_verbs import watch_once
from eurosat_mlops.monitoring import last_result, run_pass
from eurosat_mlops.problems import ServeConfig, hash_key
from eurosat_mlops.serve import make_app
from eurosat_mlops.shift import Standard, compare, study_reference
from eurosat_mlops.windows import Sample, make_sample

NOW = datetime.now(UTC)
PARTS = ("probabilities", "embedding", "channel_mean", "channel_std")


def world(rng: np.random.Generator, count: int, shares: Any = None, change: float = 0.0) -> tuple[Sample, np.ndarray]:
    "Answers of a model of six classes, some of them alike; a change moves all embeddings and darkens the tiles."
    centers = 2.2 * np.random.default_rng(9).normal(size=(6, 16))
    labels = rng.choice(6, count, p=shares)
    embedding = centers[labels] + rng.normal(size=(count, 16)) + change * np.eye(16)[3]
    logits = (2 * embedding @ centers.T - (centers**2).sum(1)) / 4
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    looks = 60 + 8 * labels[:, None] + rng.normal(0, 8, (count, 3)) - 4 * change, rng.normal(20, 4, (count, 3))
    return make_sample(probabilities / probabilities.sum(1, keepdims=True), embedding, *looks), labels


@pytest.fixture(scope="module")
def standard() -> Standard:
    sample, labels = world(np.random.default_rng(1), 2000)
    arrays = {name: getattr(sample, name) for name in PARTS} | {"labels": labels}
    return study_reference(
        SimpleNamespace(reference=arrays | {"class_counts": np.bincount(sample.predicted, minlength=6)})  # type: ignore[arg-type]
    )


def test_clean_windows_and_windows_of_another_mix_are_silent(standard: Standard) -> None:
    rng = np.random.default_rng(2)
    mixes = [None] * 40 + [rng.permutation([0.45, 0.45, 0.04, 0.02, 0.02, 0.02]) for _ in range(40)]
    found = [compare(standard, world(rng, 200, mix)[0], seed) for seed, mix in enumerate(mixes)]
    assert sum(shift.changed for shift in found) <= 1
    p = np.array([shift.p for shift in found[:40]])
    assert 0.2 < p.mean() < 0.8, "p-values of clean windows are spread over 0 to 1"


def test_changed_pictures_are_found_whatever_the_mix(standard: Standard) -> None:
    rng = np.random.default_rng(3)
    mixes = [None, np.array([0.5, 0.3, 0.05, 0.05, 0.05, 0.05])]
    found = [compare(standard, world(rng, 200, mix, change=0.8)[0], seed) for mix in mixes for seed in range(5)]
    assert all(shift.changed for shift in found)
    assert all(shift.looks[:3].mean() < -1 for shift in found), "they are darker"


def entries(bundle: Bundle, count: int, begin: datetime, change: float = 0.0, model: str = "") -> list[Entry]:
    "Answers like those to the validation tiles, a minute apart; with a change they move."
    arrays, rng = bundle.reference, np.random.default_rng(count)
    made = []
    for number, row in enumerate(rng.integers(len(arrays["embedding"]), size=count)):
        p, embedding, mean, std = (np.asarray(arrays[name][row], np.float32) for name in PARTS)
        embedding = embedding + change * np.abs(embedding).mean()
        time, label = as_utc(begin + timedelta(minutes=number)), bundle.classes[p.argmax()]
        facts = (time, "request", model or bundle.id, "ab" * 32, (64, 64, 3), label)
        vectors = p, embedding + 1e-3 * rng.normal(size=embedding.shape), mean + 20 * change, std
        made.append(Entry(*facts, *vectors, float(p.max()), 1.0, False, False, 1.0))
    return made


@pytest.fixture
def watched(bundle_folder: Path, tmp_path: Path) -> tuple[Settings, Bundle]:
    "A journal of two days, the second of another camera, and some answers of another model."
    settings, bundle = Settings(tmp_path, runs_dir=tmp_path / "runs"), read_bundle(bundle_folder)
    with open_journal(str(settings.runs_dir / "journal.db")) as journal:
        journal.append(entries(bundle, 300, NOW - timedelta(hours=47)))
        journal.append(entries(bundle, 300, NOW - timedelta(hours=23), change=1.0))
        journal.append(entries(bundle, 50, NOW - timedelta(hours=23), model="cd" * 32))
    return settings, bundle


def test_a_pass_says_what_changed_and_since_when(watched: tuple[Settings, Bundle]) -> None:
    settings, bundle = watched
    folder, result = watch_once(settings, bundle, "2d")
    assert [window["severity"] for window in result["windows"]] == ["ok", "alarm"] and result["answers"] == 600
    first = result["findings"][0]
    assert first["what"] == "pictures" and first["since"] == result["windows"][1]["since"]
    page = (folder / "report.html").read_text()
    assert (
        "Something is wrong" in page
        and "<script" not in page
        and "http://" not in page.replace("http://www.w3.org", "")
    )
    assert last_result(settings, bundle.id) == (folder, json.loads((folder / "result.json").read_text()))
    assert last_result(settings, "ef" * 32) is None, "another model's result is not taken for ours"


def test_labels_that_people_gave_are_counted(watched: tuple[Settings, Bundle]) -> None:
    settings, bundle = watched
    with open_journal(str(settings.runs_dir / "journal.db")) as journal:
        for record in journal.read(model=bundle.id, limit=120):
            wrong = bundle.classes[(bundle.classes.index(record.label) + record.id % 2) % len(bundle.classes)]
            journal.feedback(record.id, wrong, "expert", bundle.classes)
        result = run_pass(journal, bundle, NOW - timedelta(days=2), NOW - timedelta(days=1))
    (window,) = result["windows"]
    assert window["best"] == "counted" and window["accuracy"]["counted"]["value"] == 0.5
    assert result["severity"] == "alarm" and result["findings"][0]["what"] == "accuracy"


def test_too_few_answers_and_no_answers_are_said(watched: tuple[Settings, Bundle], tmp_path: Path) -> None:
    settings, bundle = watched
    _, result = watch_once(settings, bundle, "2026-01-01", 10_000)
    assert result["answers"] == 600
    with open_journal(str(tmp_path / "empty.db")) as journal:
        result = run_pass(journal, bundle, NOW - timedelta(days=1))
        assert result["severity"] == "few" and "too few" in result["findings"][0]["text"]
        journal.append(entries(bundle, 60, NOW - timedelta(hours=3)))
        result = run_pass(journal, bundle, NOW - timedelta(days=1))
    assert [window["severity"] for window in result["windows"]] == ["few"]


def test_a_missing_or_damaged_journal_is_a_clear_error(watched: tuple[Settings, Bundle]) -> None:
    settings, bundle = watched
    path = settings.runs_dir / "journal.db"
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(EurosatError, match="another kind of file"):
        watch_once(settings, bundle)
    path.unlink()
    with pytest.raises(EurosatError, match="serve first"):
        watch_once(settings, bundle)
    assert last_result(settings) is None


def test_an_entry_that_does_not_fit_is_named(watched: tuple[Settings, Bundle]) -> None:
    settings, bundle = watched
    with sqlite3.connect(settings.runs_dir / "journal.db") as database:
        database.execute("UPDATE entries SET embedding = ? WHERE id = 7", (b"\0\0" * 3,))
    with pytest.raises(EurosatError, match="entry 7 does not fit"):
        watch_once(settings, bundle)


KILLED = """
import os, sys
from pathlib import Path
from eurosat_mlops import core, monitoring
real = core.write_json
def cut(path, value):
    real(path, value)
    os.kill(os.getpid(), 9)
monitoring.write_json = cut
from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.monitor_verbs import watch_once
root = Path(sys.argv[1])
watch_once(core.Settings(root, runs_dir=root / "runs"), read_bundle(Path(sys.argv[2])), "2d")
"""


def test_a_pass_that_is_killed_leaves_the_one_before(watched: tuple[Settings, Bundle]) -> None:
    settings, bundle = watched
    before = watch_once(settings, bundle, "2d")
    words = [sys.executable, "-c", KILLED, str(settings.root), str(bundle.folder)]
    assert subprocess.run(words, capture_output=True).returncode == -9
    assert last_result(settings) == (before[0], json.loads((before[0] / "result.json").read_text()))


MANY = """
import sys
from pathlib import Path
from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.core import Settings
from eurosat_mlops.monitor_verbs import watch_once
root = Path(sys.argv[1])
_, result = watch_once(Settings(root, runs_dir=root / "runs"), read_bundle(Path(sys.argv[2])), "8d")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss counts the parent's too
print(result["answers"], int(peak.split()[1]) * 1024)
"""


def test_a_pass_over_100_000_answers_takes_less_than_a_minute_and_a_gigabyte(
    bundle_folder: Path, tmp_path: Path
) -> None:
    bundle = read_bundle(bundle_folder)
    path = tmp_path / "runs" / "journal.db"
    with open_journal(str(path), most_waiting=200_000) as journal:
        journal.append(entries(bundle, 1000, NOW - timedelta(days=7)))
    later = "strftime('%Y-%m-%dT%H:%M:%f', time, ?) || 'Z'"
    copy = f"INSERT INTO entries SELECT NULL, {later}, {{}} FROM entries WHERE id <= 1000"
    with sqlite3.connect(path) as database:
        names = [row[1] for row in database.execute("PRAGMA table_info(entries)")][2:]
        for number in range(99):
            database.execute(copy.format(", ".join(names)), (f"+{90 * number} minutes",))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path), str(bundle_folder)], capture_output=True, text=True
    )
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    answers, memory = map(int, done.stdout.split())
    assert answers == 100_000 and memory < 1e9
    assert now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime < 60, "processor seconds"


KEY = "a-key-of-the-tests"


@pytest.fixture
def served(watched: tuple[Settings, Bundle], bundle_folder: Path) -> Iterator[tuple[Any, Settings, Bundle]]:
    settings, bundle = watched
    engine = Engine(settings, open_model(bundle_folder, settings), threads=1)
    journal = open_journal(str(settings.runs_dir / "journal.db"))
    app = join_drift(make_app(ServeConfig(keys=(hash_key(KEY),)), engine, journal))
    yield app, settings, bundle
    asyncio.run(app.state.service.close())


def ask(app: Any, path: str, key: str = "") -> httpx.Response:
    async def work() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path, headers={"Authorization": f"Bearer {key}"} if key else {})

    return asyncio.run(work())


def test_the_service_shows_the_last_pass(served: tuple[Any, Settings, Bundle]) -> None:
    app, settings, bundle = served
    assert ask(app, "/drift").json()["last"] is None
    assert ask(app, "/drift/report", KEY).status_code == 404
    text = ask(app, "/metrics", KEY).text
    assert all(f"{name} NaN" in text for name in GAUGES)
    _, result = watch_once(settings, bundle, "2d")
    found = ask(app, "/drift").json()
    assert found["last"]["severity"] == "alarm" and found["model"] == bundle.id
    assert "moved" not in found["last"]["windows"][-1], "which tiles were asked about takes a key"
    assert ask(app, "/drift/report").status_code == 401
    page = ask(app, "/drift/report", KEY)
    assert page.headers["content-type"].startswith("text/html") and "Something is wrong" in page.text
    assert result["severity"] == "alarm"


def test_the_verb_says_what_was_found(
    watched: tuple[Settings, Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, bundle = watched
    monkeypatch.chdir(settings.root)
    assert main(["monitor", "--model", str(bundle.folder), "--since", "2d"]) == 1
    said = capsys.readouterr().out
    assert "alarm" in said and "report.html" in said
    assert main(["monitor", "--model", str(bundle.folder), "--since", "someday"]) == 2
    shutil.rmtree(settings.runs_dir)
    assert main(["monitor", "--model", str(bundle.folder)]) == 2
