"""The registry in a folder and in emulated object stores: kills, races, damage, and what must never happen."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

from eurosat_mlops.bands import EUROSAT_RGB, contract_to_dict
from eurosat_mlops.bundle import write_bundle
from eurosat_mlops.core import EurosatError, Settings, load_settings
from eurosat_mlops.registry import (
    Event,
    Registry,
    copy_version,
    held_versions,
    kept_versions,
    open_registry,
    parse_manifest,
)
from eurosat_mlops.store import Store

PLAIN_UPLOAD = objects._multipart_upload


def checked_upload(request: Any, response: Any, storage: Any) -> None:
    "What Google's store does and the emulator does not: refuse to create an object that exists."
    name = request.data["meta"]["name"]
    if request.query.get("ifGenerationMatch") == ["0"]:
        try:
            storage.get_file_obj(request.params["bucket_name"], name)
        except NotFound:
            pass
        else:
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            return
    PLAIN_UPLOAD(request, response, storage)


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    "An emulated Google Cloud Storage that keeps its preconditions."
    # gcsfs asks over gRPC what kind of bucket it has; the emulator speaks none
    own = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "FSSPEC_GS": '{"token": "anon"}', "no_proxy": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch, create_server("127.0.0.1", 0, True, "eurosat") as server:
        patch.setattr(objects, "_multipart_upload", checked_upload)
        port = server._api._httpd.server_port  # it offers no other way to learn a free port
        for name, value in (own | {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}).items():
            patch.setenv(name, value)
        import fsspec.config

        fsspec.config.set_conf_env(fsspec.config.conf)  # it was read when another test imported fsspec
        yield "gs://eurosat"
        import gcsfs

        gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def amazon() -> Iterator[str]:
    "An emulated S3, which keeps its preconditions by itself."
    reason = "S3 is tried where moto and s3fs are installed: pip install 'moto[s3,server]' s3fs"
    s3fs = pytest.importorskip("s3fs", reason=reason)
    server = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        address = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in (keys | {"AWS_ENDPOINT_URL": address, "no_proxy": "127.0.0.1"}).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem().mkdir("eurosat")
        yield "s3://eurosat"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["folder", "google", "amazon"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    "An empty place for a registry."
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue(request.param)}/{tmp_path.name}"


@pytest.fixture
def registry(url: str, tmp_path: Path) -> Registry:
    return Registry(url, tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Registry:
    "A registry in a folder."
    return Registry(str(tmp_path / "store"), tmp_path / "cache")


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    "Makes small bundles that differ by their name."

    def one(name: str, size: int = 1000) -> Path:
        figure = {"value": 0.97, "low": 0.96, "high": 0.98}
        info = {
            "classes": ["Forest", "River"],
            "contract": contract_to_dict(EUROSAT_RGB),
            "temperature": 1.2,
            "precision": "fp32",
            "limits": {"confidence": 0.61, "distance": 24.5},
            "metrics": {"validation": {"n": 5400, "accuracy": figure, "macro_f1": figure, "ece": 0.004}},
            "config": {"arch": name},
            "data": {"name": "synthetic", "split": "stratified", "digest": "0" * 64},
            "graphs": {"fp32": {"bytes": 5}},
            "licence": {"weights": "Apache-2.0", "data": "drawn by this project"},
            "provenance": {},
            "created": "2026-01-01T00:00:00Z",
        }
        files = {"model.onnx": b"graph" * size, "weights.safetensors": name.encode(), "reference.npz": b"arrays"}
        return write_bundle(tmp_path / f"bundle-{name}", info, files).folder

    return one


def go(registry: Registry, alias: str, id: str, after: int, **given: Any) -> Event:
    return registry.move(alias, id, **{"who": "tester", "why": "try", "after": after, **given})


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def make_old(registry: Registry, days: float) -> None:
    for path in Path(registry.url).rglob("*"):
        stamp = path.stat().st_mtime - days * 86400
        os.utime(path, (stamp, stamp))


# a store


def test_of_many_writers_one_creates(url: str) -> None:
    store = Store(url)
    with ThreadPoolExecutor(6) as pool:
        won = [sum(pool.map(lambda n, r=turn: store.create(f"race/{r}", bytes([n])), range(6))) for turn in range(5)]
    assert won == [1] * 5
    assert [path for path in store.find("") if path.startswith("race/")] == [f"race/{turn}" for turn in range(5)]


def test_a_store_that_takes_the_condition_and_ignores_it_is_found_out(
    google: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "The emulator as it is installed."
    monkeypatch.setattr(objects, "_multipart_upload", PLAIN_UPLOAD)
    registry = Registry(f"{google}/{tmp_path.name}", tmp_path / "cache")
    found = registry.add(make("a"))
    with pytest.raises(EurosatError, match="lets a second writer replace"):
        go(registry, "candidate", found, 0)
    assert registry.aliases() == {}


def test_a_refusal_that_is_the_echo_of_our_own_request_counts_as_success(tmp_path: Path) -> None:
    class Echo(Store):
        def write_new(self, name: str, content: bytes) -> None:
            super().write_new(name, content)
            raise FileExistsError("the answer was lost, the request repeated")

    store = Echo(str(tmp_path / "store"))
    assert store.create("event", b"ours") and not store.create("event", b"theirs")
    assert store.read("event") == b"ours"


def test_what_another_machine_wrote_is_seen_at_once(registry: Registry, make: Make) -> None:
    other = Registry(registry.url, registry.cache)
    assert other.ids() == [] and other.aliases() == {}
    found = registry.add(make("a"))
    assert other.ids() == [found]
    go(registry, "staging", found, 0)
    assert other.aliases()["staging"].id == found
    go(other, "staging", registry.add(make("b")), 1)
    assert registry.aliases()["staging"].number == 2


def test_what_cannot_be_reached_or_written_is_said(google: str, make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url in ("tape://shelf", "gs://no-such-bucket/x", str(tmp_path / "file")):
        with pytest.raises(EurosatError, match=r"cannot be (opened|read|written)|failed.*check"):
            Registry(url, tmp_path / "cache").add(make("a"))


# versions


def test_a_version_comes_back_bit_for_bit(registry: Registry, make: Make) -> None:
    bundle = make("a")
    found = registry.add(bundle)
    assert registry.ids() == [found] and registry.info(found)["config"]["arch"] == "a"
    fetched = registry.fetch(found[:8])
    assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {p.name: p.read_bytes() for p in bundle.iterdir()}
    assert registry.fetch(found) == fetched and registry.verify() == []


def test_adding_again_writes_nothing(folder: Registry, make: Make) -> None:
    bundle = make("a")
    found = folder.add(bundle)
    stamps = {p: p.stat().st_mtime_ns for p in Path(folder.url).rglob("*") if p.is_file()}
    assert folder.add(bundle) == found
    assert stamps == {p: p.stat().st_mtime_ns for p in Path(folder.url).rglob("*") if p.is_file()}
    assert all(p.stat().st_mode & 0o222 == 0 for p in stamps), "kept files are read-only"


def test_a_bundle_that_does_not_verify_is_not_kept(registry: Registry, make: Make) -> None:
    bundle = make("a")
    (bundle / "model.onnx").write_bytes(b"other")
    with pytest.raises(EurosatError, match="manifest"):
        registry.add(bundle)
    assert registry.store.find("") == []


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "deep/evil", "..", ".hidden", "C:\\evil", "a b", "evil\t", ""]
)
def test_no_manifest_leads_out_of_its_folder(name: str, registry: Registry, tmp_path: Path) -> None:
    content = b"evil"
    manifest = f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode()
    with pytest.raises(EurosatError, match="plain"):
        parse_manifest(manifest)
    found = hashlib.sha256(manifest).hexdigest()
    registry.store.write(f"versions/{found}/MANIFEST.sha256", manifest)
    before = sorted(tmp_path.rglob("*"))
    for call in (registry.fetch, registry.info):
        with pytest.raises(EurosatError, match="plain"):
            call(found)
    assert sorted(tmp_path.rglob("*")) == before and any("plain" in problem for problem in registry.verify())


def test_a_manifest_names_each_file_once() -> None:
    line = f"{'0' * 64}  model.onnx\n"
    assert parse_manifest(line.encode()) == {"model.onnx": "0" * 64}
    for text in (line * 2, "", "junk\n", line + "\n", line.replace("model.onnx", "MANIFEST.sha256"), "\xff"):
        with pytest.raises(EurosatError, match="plain"):
            parse_manifest(text.encode("latin-1"))


def test_damage_is_refused_found_and_mended(registry: Registry, make: Make) -> None:
    bundle = make("a")
    found = registry.add(bundle)
    for name in ("model.onnx", "bundle.json", "MANIFEST.sha256"):
        registry.store.write(f"versions/{found}/{name}", b"other")
        with pytest.raises(EurosatError, match="differs from the manifest"):
            registry.fetch(found)
        (problem,) = registry.verify()
        assert name in problem
        assert registry.add(bundle) == found and registry.verify() == []
    registry.store.remove(f"versions/{found}/card.md")
    with pytest.raises(EurosatError, match=r"card\.md"):
        registry.fetch(found)
    registry.store.write(f"versions/{found}/extra.bin", b"x")
    assert len(registry.verify()) == 2


def test_a_copy_in_the_cache_is_checked_at_each_use(google: str, make: Make, tmp_path: Path) -> None:
    registry = Registry(f"{google}/{tmp_path.name}", tmp_path / "cache")
    found = registry.add(make("a"))
    copy = registry.fetch(found)
    good = (copy / "model.onnx").read_bytes()
    for damage in (
        lambda: (copy / "model.onnx").write_bytes(b"other"),
        lambda: (copy / "card.md").unlink(),
        lambda: (copy / "extra.pkl").touch(),
        lambda: (copy / "MANIFEST.sha256").write_text(""),
    ):
        damage()
        assert registry.fetch(found) == copy and (copy / "model.onnx").read_bytes() == good
    registry.store.write(f"versions/{found}/model.onnx", b"other")
    assert registry.fetch(found) == copy, "the copy is whole"
    (copy / "model.onnx").write_bytes(b"other")
    with pytest.raises(EurosatError, match="differs from the manifest"):
        registry.fetch(found)


def test_many_fetch_at_once(google: str, make: Make, tmp_path: Path) -> None:
    registry = Registry(f"{google}/{tmp_path.name}", tmp_path / "cache")
    found = registry.add(make("a"))
    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(registry.fetch, [found] * 6)) == {tmp_path / "cache" / found}
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {found, ".lock"}


# names


@pytest.mark.parametrize(
    "ref",
    [
        *("", "..", "../../etc/passwd", "aliases/production", "versions", "*", "????????", "https://x/y", "\0"),
        *("Production", "production ", "production\n", "abcdef0", "A" * 64, "a" * 65, "g" * 8),
    ],
)
def test_a_name_that_is_none_never_reaches_the_store(ref: str, tmp_path: Path) -> None:
    registry = Registry("tape://shelf", tmp_path)  # which cannot be opened
    for call in (registry.resolve, registry.fetch, registry.read_signature):
        with pytest.raises(EurosatError, match="expected candidate, staging, production, or 8 to 64 digits"):
            call(ref)
    for call in (registry.info, lambda id: go(registry, "staging", id, 0)):
        with pytest.raises(EurosatError, match="expected 64 hexadecimal digits"):
            call(ref)
    with pytest.raises(EurosatError, match="alias: got"):
        registry.history(ref if ref != "production" else "x")


def test_a_name_that_is_not_there_or_not_enough_lists_what_there_is(folder: Registry, make: Make) -> None:
    with pytest.raises(EurosatError, match="holds nothing yet"):
        folder.resolve("production")
    found = folder.add(make("a"))
    go(folder, "staging", found, 0)
    twins = ["abcdefab" + digit * 56 for digit in "01"]
    for twin in twins:
        folder.store.write(f"versions/{twin}/MANIFEST.sha256", b"")
    with pytest.raises(EurosatError, match=f"names 2 versions.*staging .{found[:12]}.*{twins[0][:12]}"):
        folder.resolve("abcdefab")
    assert folder.resolve("abcdefab1") == twins[1]
    with pytest.raises(EurosatError, match="production names no versions"):
        folder.fetch("production")


# aliases


def test_a_history_is_only_ever_longer(registry: Registry, make: Make) -> None:
    a, b = registry.add(make("a")), registry.add(make("b"))
    checks = ({"name": "golden", "passed": True, "text": "as recorded", "waived": False},)
    first = go(registry, "production", a, 0, who="release team", why="the first: größer", checks=checks)
    content = registry.store.read("aliases/production/000001.json")
    second = go(registry, "production", b, 1)
    third = go(registry, "production", a, 2, action="rollback")
    assert registry.history("production") == [first, second, third]
    assert registry.aliases() == {"production": third} and registry.resolve("production") == a
    assert registry.store.read("aliases/production/000001.json") == content
    assert (first.who, first.why, first.checks, third.action) == (
        "release team",
        "the first: größer",
        checks,
        "rollback",
    )
    for after in (0, 1, 2, 4, -1):
        with pytest.raises(EurosatError, match="moved by somebody else in the meantime; it names"):
            go(registry, "production", b, after)
    assert len(registry.history("production")) == 3 and registry.history("staging") == []


def test_a_move_says_who_and_why_and_names_a_version_that_is_there(folder: Registry, make: Make) -> None:
    found = folder.add(make("a"))
    for given in ({"who": ""}, {"why": " \n"}, {"action": "delete"}, {"who": "\x1b[2J"}):
        with pytest.raises(EurosatError, match="say who moves"):
            go(folder, "staging", found, 0, **given)
    with pytest.raises(EurosatError, match="add the bundle again"):
        go(folder, "staging", "0" * 64, 0)
    assert folder.aliases() == {}


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../../etc"},
        {"number": 2},
        {"alias": "staging"},
        {"checks": None},
        {"id": None},
        {"who": ...},
        {"who": 1},
        {"why": "\x1b"},
    ],
)
def test_an_event_that_is_none_is_not_believed(change: dict[str, Any], folder: Registry, make: Make) -> None:
    go(folder, "production", folder.add(make("a")), 0)
    name = "aliases/production/000001.json"
    event = json.loads(folder.store.read(name)) | change
    folder.store.write(name, json.dumps({k: v for k, v in event.items() if v is not ...}).encode())
    for call in (lambda: folder.resolve("production"), folder.aliases, lambda: folder.history("production")):
        with pytest.raises(EurosatError, match=f"{name}: not an event"):
            call()
    assert any(name in problem for problem in folder.verify())


def test_verify_names_gaps_strangers_and_aliases_of_nothing(folder: Registry, make: Make) -> None:
    a = folder.add(make("a"))
    for after in range(3):
        go(folder, "staging", a, after)
    folder.write_signature(a, b"{}")
    assert folder.verify() == []
    folder.store.remove("aliases/staging/000002.json")
    folder.store.write("aliases/live/000001.json", b"{}")
    folder.store.write("versions/readme.txt", b"hello")
    folder.store.write("notes.txt", b"outside of what the registry keeps")
    for path in folder.store.find(f"versions/{a}"):
        folder.store.remove(path)
    text = "\n".join(folder.verify())
    for said in ("staging: its history has gaps", "aliases/live/000001.json: does not", "readme.txt: does not"):
        assert said in text
    assert f"staging: names {a[:12]}, which is not here" in text and len(folder.verify()) == 4


# killed and raced, with real processes

KILL_AT_EACH_STEP = """
import os, signal, sys
from pathlib import Path
from eurosat_mlops.registry import Registry

what, place, one, two = sys.argv[1:]

def begin(step):
    registry = Registry(f"{place}/{step}", Path(place) / "cache")
    a = registry.add(one)
    registry.move("production", a, who="release team", why="the first", after=0)
    return registry, a, registry.add(two) if what == "move" else ""

def act(registry, b):
    if what == "move":
        registry.move("production", b, who="release team", why="the second", after=1)
    else:
        registry.add(two)

step, kills = 0, 0
while True:
    step += 1
    registry, a, b = begin(step)
    child = os.fork()
    if not child:
        left = step
        def count(event, arguments):
            global left
            if event.startswith(("open", "os.", "shutil.", "tempfile.")) and place in str(arguments):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        act(registry, b)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    history = [event.why for event in registry.history("production")]
    if what == "move":
        assert history in (["the first"], ["the first", "the second"]), history
        assert registry.resolve("production") == (b if len(history) == 2 else a)
        if len(history) == 1:
            act(registry, b)
    else:
        assert history == ["the first"]
        seen = registry.ids()
        for id in seen:
            registry.fetch(id)
        act(registry, b)
        assert len(registry.ids()) == 2 and set(seen) <= set(registry.ids())
    assert registry.verify() == [], registry.verify()
    if os.waitstatus_to_exitcode(status) == 0:
        break
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    kills += 1
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("what", ["add", "move"])
def test_killed_at_any_step_in_a_folder_it_is_consistent_and_can_be_repeated(
    what: str, make: Make, tmp_path: Path
) -> None:
    (tmp_path / "stores").mkdir()
    done = python(KILL_AT_EACH_STEP, what, str(tmp_path / "stores"), str(make("a")), str(make("b")))
    out, _ = done.communicate(timeout=100)
    assert done.returncode == 0 and int(out) >= {"add": 30, "move": 6}[what], out


KILL_AT_EACH_WRITE = """
import os, signal, sys
from eurosat_mlops.registry import Registry
from eurosat_mlops.store import Store

url, cache, bundle, left = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
write = Store.write
def count(self, name, content):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, content)
Store.write = count
Registry(url, cache).add(bundle)
"""


def test_killed_between_uploads_a_version_is_invisible_and_can_be_added_again(
    google: str, make: Make, tmp_path: Path
) -> None:
    bundle, files = make("a"), 6
    registries = [Registry(f"{google}/{tmp_path.name}-{n}", tmp_path / "cache") for n in (0, 3, files - 1)]
    for registry, after in zip(registries, (0, 3, files - 1), strict=True):
        done = python(KILL_AT_EACH_WRITE, registry.url, str(registry.cache), str(bundle), str(after))
        done.communicate(timeout=60)
        assert done.returncode == -9
        assert registry.ids() == [] and len(registry.store.find("versions")) == after and registry.verify() == []
        with pytest.raises(EurosatError, match="names no versions"):
            registry.fetch("0" * 64)
        found = registry.add(bundle)
        assert registry.ids() == [found] and registry.fetch(found).is_dir() and registry.verify() == []


PROMOTE = """
import sys
from pathlib import Path
from eurosat_mlops.core import EurosatError
from eurosat_mlops.registry import Registry

url, cache, who, rounds = sys.argv[1:]
registry = Registry(url, Path(cache))
id = registry.ids()[0]
registry.aliases()
print("ready", flush=True)
sys.stdin.readline()
for turn in range(int(rounds)):
    last = registry.aliases().get("production")
    try:
        event = registry.move("production", id, who=who, why=str(turn), after=last.number if last else 0)
        print(event.number, event.why, flush=True)
    except EurosatError as error:
        assert "meantime" in str(error), error
print("done", flush=True)
"""


def test_of_processes_that_promote_at_once_each_number_has_one_winner(registry: Registry, make: Make) -> None:
    registry.add(make("a"))
    rounds = 40 if registry.store.folder else 8
    workers = {
        who: python(PROMOTE, registry.url, str(registry.cache), who, str(rounds))
        for who in ("release team", "on call", "third")
    }
    for worker in workers.values():
        assert worker.stdout and worker.stdout.readline() == "ready\n"
    for worker in workers.values():
        assert worker.stdin
        worker.stdin.write("go\n")
        worker.stdin.flush()
    won = {}
    for who, worker in workers.items():
        lines = worker.communicate(timeout=100)[0].splitlines()
        assert worker.returncode == 0 and lines[-1] == "done"
        for line in lines[:-1]:
            number, why = line.split()
            assert int(number) not in won, "two were told that they had won"
            won[int(number)] = (who, why)
    events = registry.history("production")
    assert [event.number for event in events] == list(range(1, len(won) + 1)) and len(won) >= rounds
    assert {event.number: (event.who, event.why) for event in events} == won
    assert registry.verify() == []


def test_adding_one_bundle_many_times_at_once_never_shows_half_of_it(folder: Registry, make: Make) -> None:
    bundle = make("a", size=400_000)
    code = "from sys import argv; from eurosat_mlops.registry import Registry; print(Registry(*argv[1:3]).add(argv[3]))"
    workers = [python(code, folder.url, str(folder.cache), str(bundle)) for _ in range(3)]
    seen = 0
    while any(worker.poll() is None for worker in workers):
        for found in folder.ids():
            folder.fetch(found)
            seen += 1
    assert len({worker.communicate()[0] for worker in workers}) == 1 and seen
    assert folder.verify() == [] and folder.store.find("tmp") == []


# clean-up


def test_gc_keeps_what_aliases_name_and_named_before(folder: Registry, make: Make) -> None:
    ids = [folder.add(make(name)) for name in "abcde"]
    for after, id in enumerate(ids[:4]):
        go(folder, "production", id, after)
    go(folder, "production", ids[1], 4, action="rollback")  # to b; a is the way back, d was named before
    go(folder, "staging", ids[3], 0)
    folder.write_signature(ids[4], b"{}")
    assert kept_versions(folder) == {ids[0], ids[1], ids[3]}
    assert folder.gc(days=30) == []
    make_old(folder, 31)
    young = folder.add(make("young"))
    assert sorted(folder.gc(days=30)) == sorted([ids[2], ids[4]])
    assert folder.ids() == sorted([ids[0], ids[1], ids[3], young]) and folder.verify() == []
    assert folder.read_signature(ids[0]) is None and not folder.store.find("signatures")
    assert folder.add(make("c")) == ids[2], "what is gone can come back"
    with pytest.raises(EurosatError, match="days: got -1"):
        folder.gc(-1)


def test_gc_works_in_any_store(registry: Registry, make: Make) -> None:
    a, b = registry.add(make("a")), registry.add(make("b"))
    go(registry, "staging", a, 0)
    assert registry.gc(days=1) == [] and registry.gc(days=0) == [b] and registry.ids() == [a]
    assert registry.verify() == [] and not [path for path in registry.store.find("") if b in path]


def test_gc_takes_what_was_begun_and_left(folder: Registry, make: Make) -> None:
    found = folder.add(make("a"))
    folder.store.remove(f"versions/{found}/MANIFEST.sha256")
    folder.store.write("tmp/left", b"half a file")
    folder.store.write("versions/notes/readme.txt", b"not ours to remove")
    assert folder.gc(days=0) == [] and len(folder.store.find("versions")) == 6
    make_old(folder, 2)
    assert folder.gc(days=0) == [found] and folder.store.find("") == ["versions/notes/readme.txt"]


def test_an_alias_that_moves_during_gc_keeps_its_version(folder: Registry, make: Make) -> None:
    found = folder.add(make("a"))

    class Raced(Store):
        def remove(self, name: str) -> None:
            if name.endswith("MANIFEST.sha256"):
                go(folder, "production", found, 0)
            super().remove(name)

    slow = Registry(folder.url, folder.cache)
    slow.__dict__["store"] = Raced(folder.url)
    assert slow.gc(days=0) == []
    assert folder.resolve("production") == found and folder.verify() == []


def test_two_clean_ups_at_once_take_each_version_and_no_other(folder: Registry, make: Make) -> None:
    kept, *others = [folder.add(make(f"v{n}")) for n in range(12)]
    go(folder, "staging", kept, 0)
    with ThreadPoolExecutor(4) as pool:
        removed = {id for ids in pool.map(lambda _: folder.gc(days=0), range(4)) for id in ids}
    assert removed == set(others) and folder.ids() == [kept] and folder.verify() == []


@pytest.mark.parametrize(
    "moves, held",
    [("", ""), ("a", "a"), ("ab", "ab"), ("aab", "ab"), ("abA", "a"), ("abcB", "ab"), ("abaBc", "abc"), ("abBA", "a")],
)
def test_a_rollback_takes_back_what_came_after(moves: str, held: str) -> None:
    "Small letters are promotions, capital ones rollbacks."
    events = [
        Event(n, "staging", move.lower(), "rollback" if move.isupper() else "promote", "tester", "", "", ())
        for n, move in enumerate(moves, 1)
    ]
    assert held_versions(events) == list(held)


# around it


def test_a_version_travels_with_its_signature(url: str, make: Make, tmp_path: Path) -> None:
    near, far = Registry(str(tmp_path / "near"), tmp_path / "cache"), Registry(url, tmp_path / "cache")
    found = near.add(make("a"))
    near.write_signature(found, b"signed")
    go(near, "production", found, 0)
    assert copy_version(near, far, "production") == found
    assert far.read_signature(found[:8]) == b"signed" and far.aliases() == {}
    back = Registry(str(tmp_path / "back"), tmp_path / "cache")
    assert copy_version(far, back, found) == found and back.verify() == []
    with pytest.raises(EurosatError, match="names no versions"):
        far.write_signature("0" * 64, b"")


def test_where_the_registry_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings.ini").write_text("[eurosat]\nmodels_dir = kept\n")
    assert open_registry(load_settings(tmp_path)).url == str(tmp_path / "kept")
    (tmp_path / "settings.ini").write_text("[eurosat]\nregistry = shared/models\n")
    assert open_registry(load_settings(tmp_path)).url == str(tmp_path / "shared" / "models")
    monkeypatch.setenv("EUROSAT_REGISTRY", "gs://bucket/models")
    found = open_registry(load_settings(tmp_path))
    assert found.url == "gs://bucket/models" and found.cache == tmp_path / "models" / "cache"
    assert open_registry(Settings(tmp_path)).url == str(tmp_path / "models")


def test_the_registry_lies_beside_its_cache_without_taking_it_for_a_version(tmp_path: Path, make: Make) -> None:
    registry = open_registry(Settings(tmp_path))
    found = registry.add(make("a"))
    (tmp_path / "models" / "cache" / found).mkdir(parents=True)
    (tmp_path / "models" / "cache" / found / "MANIFEST.sha256").write_text("junk")
    assert registry.ids() == [found] and registry.verify() == [] and registry.gc(0) == [found]
    assert (tmp_path / "models" / "cache" / found).is_dir()


def test_importing_it_costs_no_store_library() -> None:
    code = "import sys, eurosat_mlops.registry; print({'fsspec', 'gcsfs', 'onnxruntime', 'torch'} & set(sys.modules))"
    done = python(code)
    assert done.communicate(timeout=60)[0].strip() == "set()"
