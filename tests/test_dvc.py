"""What data.dvc promises: the archive that arrives is the archive that is pinned, and it comes back from a remote."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server

from eurosat_mlops.core import Settings, sha256_file
from eurosat_mlops.fetch import fetch_eurosat

ZIP = "data/EuroSAT_RGB.zip"
Dvc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def dvc(tmp_path_factory: pytest.TempPathFactory) -> Dvc:
    "Run DVC in a folder, away from the settings and caches of whoever runs the tests."
    home = str(tmp_path_factory.mktemp("dvc"))
    own = {f"DVC_{name}_DIR": home for name in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG")}
    # gcsfs asks over gRPC what kind of bucket it has; the emulator speaks none, and DVC would wait for minutes
    own |= {"DVC_NO_ANALYTICS": "1", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "no_proxy": "127.0.0.1"}

    def run(folder: Path, *args: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
        command, env = [sys.executable, "-m", "dvc", *args], os.environ | own
        done = subprocess.run(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        assert bool(done.returncode) == fails, f"dvc {' '.join(args)}: {done.stdout}{done.stderr}"
        return done

    return run


def status(dvc: Dvc, folder: Path) -> str | None:
    "What DVC says of data/: None if it is as pinned and in the cache."
    found = json.loads(dvc(folder, "status", "--json").stdout)
    return found["data.dvc"][0]["changed outs"]["data"] if found else None


def check_out(project: Path, folder: Path) -> Path:
    "What a clone holds of the data: the pin and DVC's settings."
    for name in ("data.dvc", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project / name, folder / name)
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def fetched(project: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    "A clone in which EuroSAT was fetched and packed."
    folder = check_out(project, tmp_path_factory.mktemp("fetched"))
    assert fetch_eurosat(Settings(folder, archive=str(archive), data_dir=folder / "data")) == folder / ZIP
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def clone(project: Path, fetched: Path, tmp_path: Path) -> Iterator[Path]:
    "A clone with the archive that was fetched, not yet known to DVC's cache."
    folder = check_out(project, tmp_path / "clone")
    (folder / "data").mkdir()
    shutil.copy(fetched / ZIP, folder / ZIP)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=["local", "gs"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    "The settings of a remote: a folder, or a bucket of an emulated Google Cloud Storage."
    if request.param == "local":
        yield {"url": str(tmp_path / "remote")}
        shutil.rmtree(tmp_path / "remote")
        return
    with create_server("127.0.0.1", 0, in_memory=True, default_bucket="eurosat") as server:
        endpoint = f"http://127.0.0.1:{server._api._httpd.server_port}"  # it offers no other way to learn a free port
        yield {"url": "gs://eurosat/dvc", "endpointurl": endpoint, "allow_anonymous_login": "true"}


def test_no_remote_is_invented_and_nothing_is_reported(project: Path, dvc: Dvc, tmp_path: Path) -> None:
    folder = check_out(project, tmp_path)
    assert dvc(folder, "config", "--list").stdout.split() == ["core.analytics=false", "core.autostage=false"]


def test_what_is_fetched_and_packed_is_what_is_pinned(project: Path, fetched: Path, dvc: Dvc) -> None:
    assert (fetched / "data" / "cache").is_dir() and any((fetched / "data" / "cache").rglob("*.npy"))
    (fetched / "data" / "downloads").mkdir(exist_ok=True)
    (fetched / "data" / "downloads" / "other.zip").write_bytes(b"another dataset")
    (fetched / f"{ZIP}.part").write_bytes(b"the first bytes of a download")
    assert status(dvc, fetched) == "not in cache"
    dvc(fetched, "commit")
    assert status(dvc, fetched) is None
    assert (fetched / "data.dvc").read_bytes() == (project / "data.dvc").read_bytes()


def test_one_changed_byte_is_seen_refused_and_mended(clone: Path, fetched: Path, dvc: Dvc) -> None:
    dvc(clone, "commit")
    with open(clone / ZIP, "r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    assert status(dvc, clone) == "modified"
    assert "unable to commit changed stage" in dvc(clone, "commit", fails=True).stderr
    dvc(clone, "checkout", "--force")
    assert status(dvc, clone) is None and sha256_file(clone / ZIP) == sha256_file(fetched / ZIP)


def test_what_was_pushed_can_be_pulled(clone: Path, fetched: Path, dvc: Dvc, remote: dict[str, str]) -> None:
    lines = [f"{name} = {value}" for name, value in remote.items()]
    config = ["[core]", "remote = store", "['remote \"store\"']", *lines]
    (clone / ".dvc" / "config.local").write_text("\n".join(config))
    dvc(clone, "commit")
    dvc(clone, "push")
    shutil.rmtree(clone / ".dvc" / "cache")
    (clone / ZIP).unlink()
    packed = clone / "data" / "cache" / "tiles.npy"
    packed.parent.mkdir()
    packed.write_bytes(b"packed")
    dvc(clone, "pull")
    assert status(dvc, clone) is None and sha256_file(clone / ZIP) == sha256_file(fetched / ZIP)
    assert packed.read_bytes() == b"packed"
