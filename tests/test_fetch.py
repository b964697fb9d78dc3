"Fetching EuroSAT: verification, resumed downloads, the canonical archive, the packed cache, and every fault of them."

import hashlib
import http.server
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eurosat_mlops import fetch
from eurosat_mlops.core import EurosatError, Settings, sha256_file
from eurosat_mlops.data import EUROSAT_DIGEST, PARTS, FileList, content_digest
from eurosat_mlops.datasets import load_tiles
from eurosat_mlops.fetch import ARCHIVE, FetchError, download, fetch_eurosat, open_packed
from eurosat_mlops.synthetic import make_synthetic

# ---------------------------------------------------------------- a small dataset, and real EuroSAT


def encode(tile: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def small() -> dict[str, bytes]:
    tiles = make_synthetic(per_class=12, size=64, seed=2)
    return {
        f"{tiles.classes[label]}_{row}.jpg": encode(tile)
        for row, (tile, label) in enumerate(zip(tiles.tiles, tiles.labels, strict=True))
    }


@pytest.fixture(scope="module")
def files(small) -> FileList:
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(small.items())}
    return FileList({name: value[:8] for name, value in hashes.items()}, content_digest(hashes))


def pack(content: dict[str, bytes], target: Path, top: str = "2750/", extra: dict[str, bytes] | None = None) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(f"{top}{name.rsplit('_', 1)[0]}/{name}", data)
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return target


def settings_in(folder: Path, archive: Path | str = "", mirror: str = "") -> Settings:
    return Settings(folder, archive=str(archive), mirror=mirror, data_dir=folder / "data")


def nothing_to_trust(settings: Settings, files: FileList) -> bool:
    return open_packed(settings, files) is None and not list(settings.data_dir.glob("**/tiles.npy"))


def test_real_archive_loads_at_once_from_the_cache(eurosat_settings):
    begin = time.process_time()  # other work may share the machine
    tiles = load_tiles("auto", "spatial", eurosat_settings)
    seconds = time.process_time() - begin
    assert tiles.name == "eurosat" and tiles.split == "spatial" and tiles.digest == EUROSAT_DIGEST
    assert isinstance(tiles.tiles, np.memmap) and not tiles.tiles.flags.writeable
    assert tiles.tiles.shape == (27000, 64, 64, 3)
    assert seconds < 1
    assert {part: len(rows) for part, rows in tiles.parts.items()} == {"train": 16200, "val": 5400, "test": 5400}


def test_packed_pixels_and_labels_are_those_of_the_files(eurosat_settings):
    tiles = load_tiles("eurosat", "random", eurosat_settings)
    with zipfile.ZipFile(eurosat_settings.data_dir / ARCHIVE) as opened:
        members = opened.namelist()
        for row in range(0, 27000, 1500):
            assert members[row].endswith(f"/{tiles.classes[tiles.labels[row]]}/{tiles.names[row]}")
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(opened.read(members[row])))), tiles.tiles[row])


GUARDED = """
import ctypes, mmap, sys
from pathlib import Path
from eurosat_mlops.core import Settings
from eurosat_mlops.datasets import load_tiles
tiles = load_tiles("eurosat", "random", Settings(Path(sys.argv[1]), data_dir=Path(sys.argv[1]) / "data"))
libc, page, size = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, tiles.tiles[0].nbytes
for row in tiles.parts["test"]:
    begin = tiles.tiles.ctypes.data + int(row) * size
    first, last = -(-begin // page) * page, (begin + size) // page * page
    assert libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 0) == 0
for part in sys.argv[2:]:
    print(part, len(tiles.part(part)[0][:]), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="pages are guarded with mprotect, a POSIX call")
def test_a_part_never_touches_the_rows_of_another(eurosat_settings):
    def read(*parts: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", GUARDED, str(eurosat_settings.root), *parts]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    allowed = read("train", "val")
    assert allowed.returncode == 0 and allowed.stdout == "train 16200\nval 5400\n", allowed.stderr
    assert read("test").returncode == -signal.SIGSEGV


# ---------------------------------------------------------------- sources, the archive and the cache


def test_same_archive_from_any_source(small, files, tmp_path):
    zipped = pack(small, tmp_path / "a.zip")
    shuffled = pack(dict(reversed(small.items())), tmp_path / "b.zip", top="x/y/", extra={"__MACOSX/x/._a": b"1"})
    with zipfile.ZipFile(zipped) as opened:
        opened.extractall(tmp_path / "folder")
    archives = [
        fetch_eurosat(settings_in(tmp_path / str(number), source), files=files)
        for number, source in enumerate((zipped, shuffled, tmp_path / "folder"))
    ]
    assert len({sha256_file(archive) for archive in archives}) == 1
    with zipfile.ZipFile(archives[0]) as opened:
        infos = opened.infolist()
    assert [info.filename.rsplit("/", 1)[1] for info in infos] == sorted(small)
    for info in infos:
        name = info.filename.rsplit("/", 1)[1]
        assert info.filename == f"EuroSAT_RGB/{name.rsplit('_', 1)[0]}/{name}"
        assert (info.date_time, info.compress_type, info.create_system) == ((1980, 1, 1, 0, 0, 0), 0, 3)
        assert (info.external_attr, info.extra, info.comment) == (0o644 << 16, b"", b"")


def test_archive_alone_is_enough_and_its_source_is_not_needed_again(small, files, tmp_path):
    first = settings_in(tmp_path / "1", pack(small, tmp_path / "a.zip"))
    fetch_eurosat(first, files=files)
    (tmp_path / "a.zip").unlink()
    assert fetch_eurosat(first, files=files).exists()
    second = settings_in(tmp_path / "2")
    second.data_dir.mkdir(parents=True)
    shutil.copy(first.data_dir / ARCHIVE, second.data_dir)
    fetch_eurosat(second, files=files)
    assert np.array_equal(open_packed(first, files), open_packed(second, files))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS: dict[str, Callable[[Path], object]] = {
    "a bit of the tiles": lambda data: damage(data / "cache/eurosat/tiles.npy"),
    "tiles cut short": lambda data: os.truncate(data / "cache/eurosat/tiles.npy", 5000),
    "no tiles": lambda data: (data / "cache/eurosat/tiles.npy").unlink(),
    "no note": lambda data: (data / "cache/eurosat/made_from.json").unlink(),
    "a broken note": lambda data: (data / "cache/eurosat/made_from.json").write_text("{"),
    "a note that is no note": lambda data: (data / "cache/eurosat/made_from.json").write_text("[]"),
    "a bit of the archive": lambda data: damage(data / ARCHIVE),
    "no archive": lambda data: (data / ARCHIVE).unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_cache_is_made_again(small, files, tmp_path, fault):
    settings = settings_in(tmp_path, pack(small, tmp_path / "a.zip"))
    before = sha256_file(fetch_eurosat(settings, files=files)), np.array(open_packed(settings, files))
    FAULTS[fault](settings.data_dir)
    assert open_packed(settings, files) is None
    assert sha256_file(fetch_eurosat(settings, files=files)) == before[0]
    assert np.array_equal(open_packed(settings, files), before[1])


def test_runs_that_start_at_once_fetch_once(small, files, tmp_path, caplog):
    settings = settings_in(tmp_path, pack(small, tmp_path / "a.zip"))
    with caplog.at_level(logging.INFO, "eurosat"), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch_eurosat(settings, files=files), range(4)))
    assert caplog.text.count("tiles verified") == 1
    assert open_packed(settings, files) is not None


# ---------------------------------------------------------------- faults of the archive


@pytest.mark.parametrize(
    "fault", ["truncated", "changed", "missing", "extra", "misplaced", "twice", "outside", "large"]
)
def test_a_faulty_archive_is_refused_by_the_name_of_the_file(small, files, tmp_path, fault):
    victim = sorted(small)[57]
    flipped = bytearray(small[victim])
    flipped[-300] ^= 1
    content = {
        "truncated": small | {victim: small[victim][: len(small[victim]) // 2]},
        "changed": small | {victim: bytes(flipped)},
        "missing": {name: data for name, data in small.items() if name != victim},
        "misplaced": {name: data for name, data in small.items() if name != victim},
        "large": small | {victim: small[victim] + bytes(1 << 17)},
    }.get(fault, small)
    extra = {
        "extra": {"2750/River/River_9999.jpg": small[victim]},
        "misplaced": {f"2750/SeaLake/{victim}": small[victim]},
        "twice": {f"copy/{victim.rsplit('_', 1)[0]}/{victim}": small[victim]},
        "outside": {f"../{victim}": small[victim]},
    }.get(fault)
    said = {
        "truncated": f"{victim}: not a whole image",
        "changed": f"{victim}: (changed|not a whole image)",
        "missing": f"missing: {victim}",
        "extra": "not a file of the dataset: 2750/River/River_9999.jpg",
        "misplaced": f"in the wrong class folder: 2750/SeaLake/{victim}",
        "twice": f"twice there: .*{victim} and .*{victim}",
        "outside": f"'../{victim}' points out of the archive",
        "large": f"{victim}' has [0-9,]+ bytes, expected at most 65,536",
    }[fault]
    settings = settings_in(tmp_path, pack(content, tmp_path / "bad.zip", extra=extra))
    with pytest.raises(EurosatError, match=said):
        fetch_eurosat(settings, files=files)
    assert nothing_to_trust(settings, files) and not (settings.data_dir / ARCHIVE).exists()


def test_a_change_that_keeps_the_short_hash_is_seen_by_the_digest(small, files, tmp_path):
    other = FileList(files.prefixes, "0" * 64)
    with pytest.raises(EurosatError, match=f"the digest is {files.digest}, expected 0000"):
        fetch_eurosat(settings_in(tmp_path, pack(small, tmp_path / "a.zip")), files=other)


@pytest.mark.parametrize("data", ["auto", "eurosat"])
def test_a_bad_archive_is_an_error_and_never_synthetic(tmp_path, data):
    (tmp_path / "bad.zip").write_bytes(b"<html>sign in</html>")
    with pytest.raises(EurosatError, match=r"bad\.zip: not a zip"):
        load_tiles(data, "random", settings_in(tmp_path, tmp_path / "bad.zip"))
    with pytest.raises(EurosatError, match=r"none\.zip: no such file"):
        load_tiles(data, "random", settings_in(tmp_path, tmp_path / "none.zip"))


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a disk that fills up needs the right to mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("size", "kept"), [("64k", False), ("1m", True)], ids=["in the archive", "in the tiles"])
def test_a_full_disk_leaves_nothing_half_made(small, files, tmp_path, tiny_disk, size, kept):
    disk = tiny_disk(size)
    settings = Settings(tmp_path, archive=str(pack(small, tmp_path / "a.zip")), data_dir=disk / "data")
    with pytest.raises(EurosatError, match="the disk is full"):
        fetch_eurosat(settings, files=files)
    assert nothing_to_trust(settings, files)
    left = {file.name for file in settings.data_dir.rglob("*") if file.is_file()}
    assert left == ({ARCHIVE, ".lock"} if kept else {".lock"})
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    fetch_eurosat(settings, files=files)
    assert open_packed(settings, files) is not None


# ---------------------------------------------------------------- downloads


class Server(http.server.ThreadingHTTPServer):
    "Serves one body with Range and If-Range; breaks off each answer after `drop_after` bytes while `drops` last."

    body, tag, ranges, drops, drop_after, status = b"", '"one"', True, 0, 0, 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.sent = 0
        self.hold = threading.Event()  # until it is set, an answer stops after 1.5 MB
        self.hold.set()
        self.url = f"http://127.0.0.1:{self.server_port}/EuroSAT.zip"

    def handle_error(self, request, client_address) -> None: ...


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers["Range"]
        server.asked.append(wanted)
        if server.status != 200:
            return self.send_error(server.status)
        same = self.headers["If-Range"] == server.tag
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges and same else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(len(server.body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        self.end_headers()
        body = server.body[start:]
        if server.drops:
            server.drops, body = server.drops - 1, body[: server.drop_after]
        server.sent += len(body)
        self.wfile.write(body[:1_500_000])
        server.hold.wait(20)
        self.wfile.write(body[1_500_000:])

    def log_message(self, *args) -> None: ...


@contextmanager
def serving(body: bytes, **how: object) -> Iterator[Server]:
    with Server() as server:
        server.body = body
        vars(server).update(how)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


BODY = np.random.default_rng(0).bytes(3_000_000)


def test_a_download_that_drops_goes_on(tmp_path):
    with serving(BODY, drops=2, drop_after=1_200_000) as server:
        assert download(server.url, tmp_path / "a.zip").read_bytes() == BODY
    assert server.asked == [None, "bytes=1200000-", "bytes=2400000-"] and server.sent == len(BODY)
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]


def test_a_killed_download_is_resumed_by_the_next_run(tmp_path):
    code = (
        "import sys; from pathlib import Path; from eurosat_mlops.fetch import download\n"
        "download(sys.argv[1], Path(sys.argv[2]))"
    )
    target, part = tmp_path / "a.zip", tmp_path / "a.zip.part"
    with serving(BODY) as server:
        server.hold = threading.Event()
        run = subprocess.Popen([sys.executable, "-c", code, server.url, str(target)])
        end = time.monotonic() + 20
        while time.monotonic() < end and not (part.exists() and part.stat().st_size >= 1 << 20):
            time.sleep(0.02)
        run.kill()
        run.wait()
        server.hold.set()
        have = part.stat().st_size
        assert 0 < have < len(BODY) and not target.exists()
        server.sent = 0
        assert download(server.url, target).read_bytes() == BODY
    assert server.asked[-1] == f"bytes={have}-" and server.sent == len(BODY) - have


def test_a_changed_file_is_never_mixed_with_the_old_one(tmp_path):
    part = tmp_path / "a.zip.part"
    part.write_bytes(BODY[:1_000_000])
    with serving(bytes(2_000_000), tag='"two"') as server:
        part.with_name("a.zip.part.json").write_text(f'{{"url": "{server.url}", "validator": "\\"one\\""}}')
        assert download(server.url, tmp_path / "a.zip").read_bytes() == bytes(2_000_000)
    assert server.asked == ["bytes=1000000-"]


def test_a_server_without_ranges_starts_again(tmp_path):
    with serving(BODY, drops=1, drop_after=1_200_000, ranges=False) as server:
        assert download(server.url, tmp_path / "a.zip").read_bytes() == BODY
    assert server.sent == len(BODY) + 1_200_000


def test_refusals_of_a_download(tmp_path):
    with serving(BODY) as server:
        with pytest.raises(EurosatError, match="3,000,000 bytes or more, expected at most 1,000"):
            download(server.url, tmp_path / "a.zip", max_bytes=1000)
        server.status = 404
        with pytest.raises(FetchError, match="404"):
            download(server.url, tmp_path / "b.zip")
        server.status, asked = 503, len(server.asked)
        with pytest.raises(FetchError, match="503"):
            download(server.url, tmp_path / "b.zip", attempts=2)
        assert len(server.asked) == asked + 2
    for url in ("file:///etc/passwd", "ftp://example.org/a.zip", "EuroSAT.zip"):
        with pytest.raises(EurosatError, match="expected a URL that begins with http"):
            download(url, tmp_path / "c.zip")
    assert not any(tmp_path.glob("*.zip"))


def test_a_full_disk_stops_a_download(tmp_path, tiny_disk):
    disk = tiny_disk("1m")
    with serving(BODY) as server, pytest.raises(EurosatError, match="the disk is full"):
        download(server.url, disk / "a.zip")
    assert not (disk / "a.zip").exists()


def test_the_mirror_comes_first_and_a_dead_one_is_passed_over(small, files, tmp_path, monkeypatch, caplog):
    body = pack(small, tmp_path / "a.zip").read_bytes()
    with serving(body) as good, serving(b"<html>sign in</html>") as wrong:
        fetch_eurosat(settings_in(tmp_path / "1", mirror=good.url), files=files)
        monkeypatch.setattr(fetch, "ZENODO_URL", wrong.url)
        monkeypatch.setattr(fetch, "HUGGING_FACE_URL", good.url)
        settings = settings_in(tmp_path / "2", mirror="http://127.0.0.1:9/EuroSAT_RGB.zip")
        fetch_eurosat(settings, files=files)
    assert "127.0.0.1:9" in caplog.text and "not a zip" in caplog.text
    assert open_packed(settings, files) is not None
    assert not any((settings.data_dir / "downloads").iterdir())


# ---------------------------------------------------------------- any source by its name


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setattr(fetch, "ZENODO_URL", "http://127.0.0.1:9/zenodo.zip")
    monkeypatch.setattr(fetch, "HUGGING_FACE_URL", "http://127.0.0.1:9/huggingface.zip")


def test_auto_without_a_network_is_synthetic_and_says_so(tmp_path, caplog, offline):
    tiles = load_tiles("auto", "random", settings_in(tmp_path))
    assert tiles.name == "synthetic" and "SYNTHETIC" in caplog.text
    with pytest.raises(FetchError, match=r"could not be fetched.*EUROSAT_ARCHIVE"):
        load_tiles("eurosat", "random", settings_in(tmp_path))
    with pytest.raises(EurosatError, match="split: spatial needs"):
        load_tiles("auto", "spatial", settings_in(tmp_path))


def test_auto_is_an_error_if_what_is_here_or_comes_is_bad(tmp_path, offline):
    with serving(b"<html>sign in</html>") as server, pytest.raises(EurosatError, match="not a zip"):
        load_tiles("auto", "random", settings_in(tmp_path / "1", mirror=server.url))
    settings = settings_in(tmp_path / "2")
    settings.data_dir.mkdir(parents=True)
    (settings.data_dir / ARCHIVE).write_bytes(b"half")
    with pytest.raises(EurosatError, match="could not be fetched"):
        load_tiles("auto", "random", settings)


def test_folder_zip_and_url_give_the_same_tiles(small, tmp_path):
    zipped = pack(small, tmp_path / "mine.zip")
    with zipfile.ZipFile(zipped) as opened:
        opened.extractall(tmp_path / "mine")
    with serving(zipped.read_bytes()) as server:
        sources = [str(zipped), "mine", server.url, server.url]
        found = [load_tiles(source, "random", settings_in(tmp_path), seed=5) for source in sources]
        assert len(server.asked) == 1
    for other in found[1:]:
        assert other.digest == found[0].digest and np.array_equal(other.tiles, found[0].tiles)
        assert all(np.array_equal(other.parts[part], found[0].parts[part]) for part in PARTS)
    assert found[0].split == "stratified" and found[0].contract.level == "image"


@pytest.mark.parametrize("data", ["synthetic", "mine.zip"])
def test_only_eurosat_has_a_spatial_split(tmp_path, data):
    with pytest.raises(EurosatError, match="split: spatial needs to know where each tile lies"):
        load_tiles(data, "spatial", settings_in(tmp_path))


def test_split_and_size_are_checked(tmp_path):
    with pytest.raises(EurosatError, match="split: got 'stratified', expected one of random, spatial"):
        load_tiles("synthetic", "stratified", settings_in(tmp_path))
    with pytest.raises(EurosatError, match="size: got 224"):
        load_tiles("eurosat", "random", settings_in(tmp_path), size=224)
