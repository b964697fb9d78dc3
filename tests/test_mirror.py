"""The mirror to W&B, as far as it can be tried without a server: what may travel, and every way to say no."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.core import EurosatError, Settings, log_to
from eurosat_mlops.mirror import check_allowed, check_entries, connect, make_artifact, pull_artifact, push_version
from eurosat_mlops.registry import Registry

pytest.importorskip("wandb", reason="W&B comes with the train extra")
KEY = "planted0key1" * 4


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    "No key, an empty home, and a server's address at which nobody listens."
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield


@pytest.fixture
def registry(bundle_folder: Path, tmp_path: Path) -> Registry:
    made = Registry(str(tmp_path / "store"), tmp_path / "cache")
    found = made.add(shutil.copytree(bundle_folder, tmp_path / "bundle"))
    made.move("candidate", found, who="tester", why="try", after=0)
    return made


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(root=tmp_path, wandb="online", wandb_allowed="acme/maps/land-cover, acme/maps/roads")


@pytest.mark.parametrize("name", ["acme/maps/land-cover", "acme/maps/roads", "acme/maps/land-cover:v3"])
def test_a_listed_name_may_be_pulled(name: str, settings: Settings) -> None:
    check_allowed(name, settings)


@pytest.mark.parametrize(
    "name", ["acme/maps/rivers", "acme/maps/land-cover2", "Acme/maps/land-cover", "evil/maps/land-cover:production"]
)
def test_any_other_name_may_not(name: str, settings: Settings, registry: Registry) -> None:
    with pytest.raises(EurosatError, match="may not be pulled, only acme/maps/land-cover, acme/maps/roads"):
        pull_artifact(name, registry, settings)
    with pytest.raises(EurosatError, match="only none; list it under wandb_allowed"):
        pull_artifact(name, registry, replace(settings, wandb_allowed=""))


@pytest.mark.parametrize(
    "name", ["", "land-cover", "a/b", "a/b/c/d", "../../etc/passwd", "a/b/c:d:e", "a/b/c\n", "a/b /c", "https://x/y/z"]
)
def test_a_malformed_name_is_refused_whatever_the_list_says(name: str, settings: Settings) -> None:
    with pytest.raises(EurosatError, match="expected entity/project/name"):
        check_allowed(name, replace(settings, wandb_allowed=name))


@pytest.mark.parametrize("mode", ["off", "offline", "auto", "online"])
def test_without_a_connection_nothing_is_tried(mode: str, registry: Registry, settings: Settings) -> None:
    "There is no key, so that auto and online are offline too."
    began = time.monotonic()
    for call in (
        lambda: push_version(registry, "candidate", replace(settings, wandb=mode)),
        lambda: pull_artifact("acme/maps/roads", registry, replace(settings, wandb=mode)),
    ):
        with pytest.raises(EurosatError, match=r"needs online.*WANDB_API_KEY"):
            call()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("listening", [False, True])
def test_a_server_that_does_not_answer_is_given_up_and_the_key_stays_hidden(
    listening: bool,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    "Nobody at the port, and somebody who never says a word."
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = tmp_path / "run"
    run.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if listening:
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        environment, began = dict(os.environ), time.monotonic()
        with log_to(run), pytest.raises(EurosatError, match="cannot be reached") as refused:
            connect(settings, tmp_path / "mirror", seconds=3)
        assert time.monotonic() - began < 60
    assert dict(os.environ) == environment
    out, err = capfd.readouterr()
    assert KEY not in out + err + str(refused.value) + (run / "log.jsonl").read_text()
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file()]


@pytest.mark.parametrize("given", [{"name": "land/cover"}, {"name": ""}, {"name": "x" * 129}, {"collection": "model"}])
def test_names_that_the_server_would_refuse_are_refused_here(
    given: dict[str, str], registry: Registry, settings: Settings
) -> None:
    with pytest.raises(EurosatError, match="expected"):
        push_version(registry, "candidate", settings, **given)


def test_the_artifact_is_the_bundle_with_its_description(registry: Registry) -> None:
    bundle = read_bundle(registry.fetch("candidate"))
    artifact = make_artifact(bundle, "land-cover")
    assert artifact.type == "model" and artifact.metadata["id"] == bundle.id
    assert artifact.metadata["classes"] == list(bundle.classes)
    assert set(artifact.metadata["accuracy"]) == set(bundle.info["metrics"])
    assert set(artifact.manifest.entries) == {*bundle.hashes, "MANIFEST.sha256"}
    check_entries(artifact.manifest.entries)


def test_references_and_folders_are_not_pulled(tmp_path: Path) -> None:
    import wandb

    (tmp_path / "file").write_text("x")
    for add in (
        lambda artifact: artifact.add_reference((tmp_path / "file").as_uri(), name="model.onnx"),
        lambda artifact: artifact.add_file(str(tmp_path / "file"), name="deep/file", policy="immutable"),
        lambda artifact: artifact.add_file(str(tmp_path / "file"), name=".hidden", policy="immutable"),
    ):
        artifact = wandb.Artifact("odd", type="model")
        add(artifact)
        with pytest.raises(EurosatError, match="not a plain file"):
            check_entries(artifact.manifest.entries)
