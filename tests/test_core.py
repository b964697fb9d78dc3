"""Settings, atomic files, run folders and the log, where they are put under strain."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from eurosat_mlops.core import (
    EurosatError,
    Settings,
    atomic_path,
    find_run,
    load_settings,
    log,
    log_to,
    new_run,
    point_latest,
    project_root,
    provenance,
    read_json,
    read_status,
    recorded,
    redact,
    reserve_run,
    sha256_file,
    write_json,
    write_status,
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(root=tmp_path, runs_dir=tmp_path / "runs")


def test_settings_are_found_upward_and_overridden_by_the_environment(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[eurosat]\nwandb = offline\narchive = here.zip\nruns_dir = out\n")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.delenv("EUROSAT_ARCHIVE", raising=False)
    found = load_settings(deep)
    assert found.root == tmp_path and found.runs_dir == tmp_path / "out" and found.archive == str(tmp_path / "here.zip")
    monkeypatch.setenv("EUROSAT_WANDB", "off")
    monkeypatch.setenv("EUROSAT_ARCHIVE", "other.zip")
    assert (load_settings(deep).wandb, load_settings(deep).archive) == ("off", "other.zip")


def test_without_settings_the_working_directory_is_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path and load_settings().data_dir == tmp_path / "data"


def test_a_settings_file_of_another_project_is_not_ours(tmp_path):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    (tmp_path / "sub").mkdir()
    assert project_root(tmp_path / "sub") == tmp_path / "sub"


@pytest.mark.parametrize("text", ["[eurosat]\nnonsense = 1\n", "[eurosat\n", "[eurosat]\nwandb = a\nwandb = b\n"])
def test_a_damaged_settings_file_is_named(tmp_path, text):
    (tmp_path / "settings.ini").write_text(text)
    with pytest.raises(EurosatError, match=r"settings\.ini"):
        load_settings(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError), atomic_path(target) as tmp:
        tmp.write_text("half")
        raise ValueError
    assert read_json(target) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(ValueError):
        write_json(target, {"a": float("nan")})
    assert read_json(target) == {"a": 1}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_path(tmp_path / "folder") as tmp:
            tmp.mkdir()
            (tmp / content).write_text(content)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]


def test_unreadable_json_is_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        with pytest.raises(EurosatError, match=name):
            read_json(tmp_path / name)


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_twenty_runs_at_one_moment_get_twenty_folders(settings):
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(reserve_run(settings, "same"))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 20


@pytest.mark.parametrize("name", ["", "../up", "a/b", "-x", "a" * 65, "a b"])
def test_a_run_name_cannot_leave_the_runs_folder(settings, name):
    with pytest.raises(EurosatError, match="name"):
        new_run(settings, name)


def test_a_run_folder_is_never_used_twice(settings, tmp_path):
    new_run(settings, "x", tmp_path / "mine")
    with pytest.raises(EurosatError, match="already holds a run"):
        new_run(settings, "x", tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(EurosatError, match="is a file"):
        new_run(settings, "x", tmp_path / "file")


def test_latest_points_to_the_last_finished_run(settings, tmp_path):
    with pytest.raises(EurosatError, match="no run"):
        find_run(settings)
    elsewhere = new_run(settings, "a", tmp_path / "elsewhere")
    with recorded(settings, elsewhere):
        pass
    assert find_run(settings) == elsewhere
    second = new_run(settings, "b")
    with pytest.raises(KeyboardInterrupt), recorded(settings, second):
        raise KeyboardInterrupt
    assert find_run(settings) == elsewhere and read_status(second)["state"] == "failed"
    with pytest.raises(EurosatError, match="failed, not finished"):
        find_run(settings, second.name)
    point_latest(settings, second)
    assert (settings.runs_dir / "latest").resolve() == second


def test_a_run_whose_process_is_gone_counts_as_failed(settings):
    run = new_run(settings, "gone")
    code = "import sys; from pathlib import Path; from eurosat_mlops.core import write_status; "
    subprocess.run([sys.executable, "-c", code + f"write_status(Path({str(run)!r}), 'running')"], check=True)
    assert read_status(run)["state"] == "failed"
    write_status(run, "running")
    assert read_status(run)["state"] == "running"


def test_a_planted_key_reaches_neither_log_nor_status(settings, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "planted-key-0123456789")
    run = new_run(settings, "secret")
    with pytest.raises(EurosatError), recorded(settings, run):
        log.warning("the key is planted-key-0123456789")
        raise EurosatError("failed with planted-key-0123456789")
    texts = [p.read_text() for p in run.iterdir()] + ["".join(capsys.readouterr())]
    assert all("planted" not in text for text in texts) and redact("planted-key-0123456789") == "***"


def test_the_log_is_json_lines_and_leaves_the_logger_as_it_was(tmp_path, capsys):
    before = (log.level, log.propagate, list(log.handlers))
    with log_to(tmp_path, "warning"):
        log.info("quiet")
        log.warning("loud", extra={"data": {"epoch": 2}})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["message"], e.get("epoch")) for e in lines] == [("quiet", None), ("loud", 2)]
    assert capsys.readouterr().err == "loud\n"
    assert before == (log.level, log.propagate, list(log.handlers))
    with pytest.raises(EurosatError, match="log_level"), log_to(tmp_path, "shout"):
        pass


def test_provenance_outside_a_repository_says_so(tmp_path):
    found = provenance(tmp_path)
    assert found["git_commit"] is None and "numpy" in found["versions"]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert len(provenance(tmp_path)["git_commit"]) == 40 and provenance(tmp_path)["git_dirty"] is False


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
def test_a_full_disk_is_said_in_a_sentence(tmp_path):
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115  closed with the test
    with pytest.raises(EurosatError, match="disk is full"), full, atomic_path(tmp_path / "a"):
        full.write(b"x")
    assert not os.listdir(tmp_path)
