"""Images that were broken on purpose, sent to a running service: it refuses or answers, soon, and grows no fat."""

import http.client
import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, PngImagePlugin
from test_serve import server
from tqdm.auto import tqdm

from eurosat_mlops.bundle import read_bundle

Forge = Callable[[Image.Image, np.random.Generator], bytes]


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(image: Image.Image, kind: bytes, data: bytes) -> bytes:
    "A PNG with one chunk more, right after its header."
    png = encode(image, "PNG")
    return png[:33] + chunk(kind, data) + png[33:]


def bomb(size: int) -> bytes:
    "Zeros that were packed: about a thousandth of what they unpack to."
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


BOMB = bomb(256 << 20)


def wide_png(image: Image.Image, rng: np.random.Generator) -> bytes:
    "A header that promises up to four thousand million pixels a side."
    side = [int(2 ** rng.uniform(0, 32)) for _ in range(2)]
    header = struct.pack(">II", *side) + bytes([8, int(rng.integers(0, 7)), 0, 0, int(rng.integers(0, 2))])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", BOMB[:5000]) + chunk(b"IEND", b"")


def patched(form: str, find: bytes, ahead: int, pack: str, **options: object) -> Forge:
    "A file in whose header the two sizes behind a mark are others."

    def forge(image: Image.Image, rng: np.random.Generator) -> bytes:
        data, limit = bytearray(encode(image, form, **options)), 2 ** (8 * struct.calcsize(pack) // 2) - 1
        place = data.find(find) + len(find) + ahead
        data[place : place + struct.calcsize(pack)] = struct.pack(pack, *(int(rng.integers(0, limit)) for _ in "12"))
        return bytes(data)

    return forge


def tiff_tags(image: Image.Image, rng: np.random.Generator) -> bytes:
    "Tags whose kinds, counts and values are anything, and a directory that may lead back to itself."
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 1), (278, 4, 1, 64), (279, 4, 1, 4096), (322, 4, 1, 64), (323, 4, 1, 64), (34665, 4, 1, 8)]
    for _ in range(int(rng.integers(1, 4))):
        row, wild = int(rng.integers(len(tags))), [int(2 ** rng.uniform(0, 32)) for _ in range(2)]
        tags[row] = (tags[row][0], int(rng.integers(0, 17)), wild[0], wild[1])
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    after = struct.pack("<I", 8 if rng.random() < 0.5 else 0)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + after + bytes(4096)


def tiff_bomb(image: Image.Image, rng: np.random.Generator) -> bytes:
    "A strip that unpacks to far more than the picture has."
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 200)]
    tags += [(277, 3, 1, 1), (278, 4, 1, 64), (279, 4, 1, len(BOMB))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(200, b"\0") + BOMB


def exif(image: Image.Image, rng: np.random.Generator) -> bytes:
    "A JPEG turned by its EXIF, or with an EXIF of noise."
    if rng.random() < 0.5:
        return encode(image, "JPEG", exif=b"Exif\0\0II*\0" + rng.bytes(int(rng.integers(0, 60_000))))
    found = Image.Exif()
    found[274] = int(rng.integers(0, 300))
    return encode(image, "JPEG", exif=found)


def frames(form: str, most: int, **options: object) -> Forge:
    def forge(image: Image.Image, rng: np.random.Generator) -> bytes:
        others = [image.rotate(int(turn)) for turn in rng.integers(0, 360, int(rng.integers(1, most)))]
        return encode(image, form, save_all=True, append_images=others, **options)

    return forge


def odd_mode(image: Image.Image, rng: np.random.Generator) -> bytes:
    "All that Pillow can write that is not plain RGB."
    pairs = [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
    pairs += [("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16")]
    pairs += [("JPEG", "L"), ("JPEG", "CMYK"), ("BMP", "1"), ("BMP", "L"), ("BMP", "P"), ("BMP", "RGBA")]
    form, mode = pairs[rng.integers(len(pairs))]
    return encode(image.convert("L").convert(mode) if mode in ("I;16", "LA", "F") else image.convert(mode), form)


def large(image: Image.Image, rng: np.random.Generator) -> bytes:
    "A true picture of up to eight million pixels, flat enough for a small file."
    side = [int(rng.integers(65, 2900)) for _ in range(2)]
    return encode(image.resize(side, Image.Resampling.NEAREST), ("PNG", "JPEG", "WEBP", "TIFF", "BMP")[rng.integers(5)])


def many_segments(image: Image.Image, rng: np.random.Generator) -> bytes:
    "A JPEG with thousands of comments before the picture, or with its tables and scans many times over."
    jpeg = encode(image, "JPEG", progressive=bool(rng.random() < 0.5))
    scan = jpeg.find(b"\xff\xda")
    if rng.random() < 0.5:
        return jpeg[:2] + b"\xff\xfe\0\x04ab" * int(rng.integers(1, 60_000)) + jpeg[2:]
    return jpeg[:scan] + jpeg[scan:-2] * int(rng.integers(2, 2000)) + b"\xff\xd9"


FORGES: dict[str, Forge] = {
    "jpeg": lambda image, rng: encode(image, "JPEG", quality=int(rng.integers(1, 100))),
    "progressive": lambda image, rng: encode(image, "JPEG", progressive=True),
    "png": lambda image, rng: encode(image, "PNG"),
    "bmp": lambda image, rng: encode(image, "BMP"),
    "webp": lambda image, rng: encode(image, "WEBP", lossless=bool(rng.random() < 0.5)),
    "tiff": lambda image, rng: encode(image, "TIFF", compression=("tiff_lzw", "jpeg", "packbits")[rng.integers(3)]),
    "gif": lambda image, rng: encode(image, "GIF"),
    "odd mode": odd_mode,
    "exif": exif,
    "large": large,
    "segments": many_segments,
    "webp frames": frames("WEBP", 30),
    "apng frames": frames("PNG", 30),
    "tiff pages": frames("TIFF", 60),
    "mpo frames": frames("MPO", 5),
    "wide png": wide_png,
    "wide jpeg": patched("JPEG", b"\xff\xc0", 3, ">HH"),
    "wide bmp": patched("BMP", b"BM", 16, "<II"),
    "wide webp": patched("WEBP", b"\x9d\x01\x2a", 0, "<HH", quality=80),
    "wide frames": patched("WEBP", b"VP8X", 8, "<HH", quality=80, exif=b"Exif\0\0"),
    "iccp bomb": lambda image, rng: with_chunk(image, b"iCCP", b"icc\0\0" + BOMB),
    "text bomb": lambda image, rng: with_chunk(image, b"zTXt", b"text\0\0" + BOMB),
    "itxt bomb": lambda image, rng: with_chunk(image, b"iTXt", b"text\0\1\0\0\0" + BOMB),
    "idat bomb": lambda image, rng: with_chunk(image, b"IDAT", BOMB),
    "tiff bomb": tiff_bomb,
    "tiff tags": tiff_tags,
    "texts": lambda image, rng: encode(image, "PNG", pnginfo=texts(rng)),
}


def texts(rng: np.random.Generator) -> PngImagePlugin.PngInfo:
    found = PngImagePlugin.PngInfo()
    for row in range(int(rng.integers(1, 500))):
        found.add_text(f"key{row}", "x" * int(rng.integers(0, 5000)), zip=bool(rng.random() < 0.5))
    return found


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    found = bytearray(data)
    for place in rng.integers(0, len(data), int(2 ** rng.uniform(0, 8))):
        found[place] ^= 1 << int(rng.integers(8))
    return bytes(found)


def head_flipped(data: bytes, rng: np.random.Generator) -> bytes:
    return flipped(data[:200], rng) + data[200:]


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def spliced(data: bytes, rng: np.random.Generator) -> bytes:
    "A piece of itself somewhere else: left out, twice, or in another's place."
    start, end, to = sorted(int(place) for place in rng.integers(0, len(data), 3))
    return (data[:start] + data[end:], data[:end] + data[start:], data[:start] + data[end:to] + data[start:])[
        rng.integers(3)
    ]


def noisy(data: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(0, len(data)))
    noise = rng.bytes(int(2 ** rng.uniform(0, 12)))
    return data[:start] + noise + data[start + len(noise) :]


MUTATIONS = (flipped, head_flipped, cut, spliced, noisy)


@dataclass
class Report:
    "What came of it."

    statuses: Counter[int] = field(default_factory=Counter)
    slowest: list[tuple[float, str]] = field(default_factory=list)  # ms of the processor, and what it was
    rest_mb: float = 0  # of the server's memory, before
    peak_mb: float = 0


def memory(process: int, name: str) -> float:
    "MB of a process, now (VmRSS) or at most so far (VmHWM)."
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+) kB", text)[0]) / 1024


def torture(
    port: int, process: int, tiles: np.ndarray, count: int, seed: int = 0, names: tuple[str, ...] = tuple(FORGES)
) -> Report:
    "Send so many broken images, one after the other; an answer that took long is asked for again."
    rng, report = np.random.default_rng(seed), Report(rest_mb=memory(process, "VmRSS"))
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def spent() -> float:  # ms of the processor; time on the clock is also what else the machine does
        return 1000 * sum(psutil.Process(process).cpu_times()[:2])

    def ask(data: bytes, resize: bool) -> tuple[float, int]:
        began = spent()
        line.request("POST", f"/predict?resize={resize}", data)
        answer = line.getresponse()
        answer.read()
        return spent() - began, answer.status

    for _ in tqdm(range(count), "broken images", delay=2):
        name = names[rng.integers(len(names))]
        data = FORGES[name](Image.fromarray(tiles[rng.integers(len(tiles))]), rng)
        for mutation in rng.choice(MUTATIONS, int(rng.integers(0, 3))) if rng.random() < 0.9 else ():
            data, name = mutation(data or b"0", rng), f"{name}, {mutation.__name__}"
        resize = bool(rng.random() < 0.5)
        data = data[: 8 << 20]  # what the service takes; of more, it hangs up before it has all
        took, status = ask(data, resize)
        for _ in range(4 if took > 200 else 0):
            took = min(took, ask(data, resize)[0])
        report.statuses[status] += 1
        report.slowest = sorted([*report.slowest, (took, f"{name}, resize={resize}: {status}")], reverse=True)[:10]
    report.peak_mb = memory(process, "VmHWM")
    return report


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the server's memory is read from Linux's /proc")
def test_broken_images_cost_little_and_break_nothing(bundle_folder: Path, tmp_path: Path) -> None:
    tiles = read_bundle(bundle_folder).reference["golden_tiles"]
    with server(bundle_folder, tmp_path) as (port, process):
        report = torture(port, process.pid, tiles, 1500)
    assert set(report.statuses) <= {200, 413, 415, 422}, report
    assert report.statuses[200] > 100 and report.statuses[422] > 300, report
    assert report.slowest[0][0] < 250, report
    assert report.peak_mb - report.rest_mb < 256, report


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the server's memory is read from Linux's /proc")
def test_what_was_refused_is_let_go(bundle_folder: Path, tmp_path: Path) -> None:
    "Canvases of gigabytes that a header of 30 bytes promises, and refused pictures of megabytes, do not pile up."
    tiles = read_bundle(bundle_folder).reference["golden_tiles"]
    with server(bundle_folder, tmp_path) as (port, process):
        report = torture(port, process.pid, tiles, 400, names=("wide webp", "wide frames", "large"))
    assert set(report.statuses) <= {200, 413, 415, 422}, report
    assert report.peak_mb - report.rest_mb < 160, report
