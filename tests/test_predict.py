"""What is predicted with: any file gives the right tile or a clear refusal, and a bundle the same answer always."""

import io
import itertools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eurosat_mlops import predict as room
from eurosat_mlops.bands import EUROSAT_RGB, InputContract
from eurosat_mlops.bundle import update_bundle, verify_bundle
from eurosat_mlops.core import EurosatError, Settings
from eurosat_mlops.data import MAX_PIXELS, _plain_jpeg, decode_image
from eurosat_mlops.export import quantize_graph
from eurosat_mlops.predict import Answers, Classifier, _cover_masks, load_bundle, read_tile, square_views
from eurosat_mlops.synthetic import make_synthetic

ROOT = Path(__file__).resolve().parents[1]
TILES = make_synthetic(per_class=8, seed=3).tiles
PICTURE = Image.fromarray(TILES[7])


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_by_hand(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    "A PNG of any header, for what Pillow does not write."

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def tiff_by_hand(bits: int, block: int, content: bytes) -> bytes:
    "A 64 x 64 px RGB TIFF in deflated blocks of a size that may be larger than the picture."
    tags = {256: 64, 257: 64, 258: None, 259: 8, 262: 2, 277: 3, 284: 1, 322: block, 323: block, 324: None, 325: None}
    after = 8 + 2 + 12 * len(tags) + 4
    packed = zlib.compress(content, 9)
    tags |= {258: after, 324: after + 6, 325: len(packed)}
    entries = b"".join(
        struct.pack("<HHII", tag, 3, 3, value) if tag == 258 else struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in tags.items()
    )
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return header + entries + struct.pack("<I3H", 0, bits, bits, bits) + packed


# --- any file: the right tile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_formats_without_loss_give_the_pixels_back(kind):
    data = encode(PICTURE, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(read_tile(data, EUROSAT_RGB, "a"), TILES[7])


def test_a_jpeg_is_what_pillow_makes_of_it():
    data = encode(PICTURE, "JPEG", quality=90)
    assert np.array_equal(read_tile(data, EUROSAT_RGB, "a"), np.asarray(Image.open(io.BytesIO(data))))


def test_greyscale_palette_and_cmyk_are_converted():
    grey = PICTURE.convert("L")
    for data in (encode(grey, "PNG"), encode(grey, "TIFF"), encode(grey.convert("LA"), "PNG")):
        assert np.array_equal(read_tile(data, EUROSAT_RGB, "a"), np.repeat(np.asarray(grey)[..., None], 3, 2))
    bits = PICTURE.convert("1")
    assert np.array_equal(read_tile(encode(bits, "PNG"), EUROSAT_RGB, "a"), np.asarray(bits.convert("RGB")))
    palette = PICTURE.quantize(32)
    assert np.array_equal(read_tile(encode(palette, "PNG"), EUROSAT_RGB, "a"), np.asarray(palette.convert("RGB")))
    assert np.array_equal(read_tile(encode(PICTURE.convert("CMYK"), "TIFF"), EUROSAT_RGB, "a"), TILES[7])
    jpeg = read_tile(encode(PICTURE.convert("CMYK"), "JPEG", quality=95), EUROSAT_RGB, "a")
    assert abs(jpeg.astype(int) - TILES[7]).mean() < 8


def test_what_is_transparent_is_black_and_what_is_half_so_is_half_as_bright():
    alpha = np.zeros((64, 64), np.uint8)
    alpha[:, 20:40], alpha[:, 40:] = 128, 255
    seen = PICTURE.copy()
    seen.putalpha(Image.fromarray(alpha))
    for data in (encode(seen, "PNG"), encode(seen, "WEBP", lossless=True, exact=True), encode(seen, "TIFF")):
        tile = read_tile(data, EUROSAT_RGB, "a")
        assert not tile[:, :20].any() and np.array_equal(tile[:, 40:], TILES[7][:, 40:])
        assert abs(tile[:, 20:40] - TILES[7][:, 20:40] * (128 / 255)).max() <= 1
    marked = Image.new("RGB", (64, 64), (9, 8, 7))
    assert not read_tile(encode(marked, "PNG", transparency=(9, 8, 7)), EUROSAT_RGB, "a").any()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_picture_that_exif_turns_is_upright(kind, orientation, scale):
    "The bright quarter is where a viewer shows it, whether or not the picture is resized as well."
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores an upright picture so
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, :32] = 200
    stored = Image.fromarray(upright).resize((64 * scale, 64 * scale))
    if orientation != 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    tile = read_tile(encode(stored, kind, exif=exif), EUROSAT_RGB, "a", resize=True)
    assert tile[4:28, 4:28].min() > 180 and tile[36:].max() < 20 and tile[:, 36:].max() < 20


def test_another_size_is_said_and_resized_only_when_asked():
    wide = PICTURE.resize((128, 96), Image.Resampling.BICUBIC)
    for kind in ("JPEG", "PNG"):
        with pytest.raises(EurosatError, match=r"wide: 128 x 96 px, expected 64 x 64; cut or resize it"):
            read_tile(encode(wide, kind), EUROSAT_RGB, "wide")
        tile = read_tile(encode(wide, kind), EUROSAT_RGB, "wide", resize=True)
        assert tile.shape == (64, 64, 3) and abs(tile.astype(int) - TILES[7]).mean() < 12


def test_a_large_jpeg_is_resized_as_well_as_a_png():
    large = Image.fromarray(TILES[7]).resize((1024, 1024), Image.Resampling.BICUBIC)
    from_png = decode_image(encode(large, "PNG"), 64, "a").astype(int)
    assert abs(decode_image(encode(large, "JPEG", quality=95), 64, "a") - from_png).mean() < 2


# --- any file: a clear refusal --------------------------------------------------------------------------------------

FRAMES = [Image.fromarray(tile) for tile in TILES[:30:10]]
WHOLE, BITMAP = encode(PICTURE, "JPEG"), encode(PICTURE, "BMP")
DEEP = "have more than 8 bits"
REFUSED = {
    "empty.jpg": (b"", "not a whole image .0 bytes"),
    "text.jpg": (b"River, seen on 2019-04-16\n" * 40, "not a whole image .* no JPEG, PNG, BMP, WebP or TIFF"),
    "page.png": (b"<!doctype html><title>404</title>", "not a whole image .* no JPEG"),
    "cartoon.gif": (encode(PICTURE, "GIF"), "not a whole image .* no JPEG"),
    "truncated.jpg": (WHOLE[:-300], "not a whole image"),
    "cut.jpg": (WHOLE[:-1], "not a whole image"),
    "truncated.png": (encode(PICTURE, "PNG")[:-2000], "not a whole image"),
    "truncated.tif": (encode(PICTURE, "TIFF")[:-2000], "not a whole image"),
    "truncated.webp": (encode(PICTURE, "WEBP")[:-100], "not a whole image"),
    "grey16.png": (encode(Image.fromarray(np.full((64, 64), 3000, np.uint16)), "PNG"), DEEP),
    "grey16.tif": (encode(Image.fromarray(np.full((64, 64), 3000, np.uint16)), "TIFF"), DEEP),
    "int32.tif": (encode(Image.fromarray(np.full((64, 64), 3000, np.int32)), "TIFF"), DEEP),
    "float.tif": (encode(Image.fromarray(np.full((64, 64), 0.3, np.float32)), "TIFF"), DEEP),
    "rgb16.png": (png_by_hand(64, 64, 16, 2, bytes(64 * (1 + 64 * 6))), DEEP),
    "rgba16.png": (png_by_hand(64, 64, 16, 6, bytes(64 * (1 + 64 * 8))), DEEP),
    "greyalpha16.png": (png_by_hand(64, 64, 16, 4, bytes(64 * (1 + 64 * 4))), DEEP),
    "rgb16.tif": (tiff_by_hand(16, 64, bytes(64 * 64 * 6)), DEEP),
    "animated.png": (encode(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "holds several pictures"),
    "animated.webp": (encode(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "holds several pictures"),
    "pages.tif": (encode(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "holds several pictures"),
    "huge.png": (png_by_hand(60_000, 60_000, 8, 2, b""), "more than 4,194,304 px"),
    "large.png": (png_by_hand(2049, 2048, 8, 2, b""), "4,196,352 px at once, expected at most 4,194,304"),
    "huge.bmp": (BITMAP[:18] + struct.pack("<ii", 60_000, 60_000) + BITMAP[26:], "more than 4,194,304 px"),
    "huge.jpg": (WHOLE.replace(b"\x08\x00\x40\x00\x40\x03", b"\x08\xea\x60\xea\x60\x03"), "more than 4,194,304 px"),
    "block.tif": (tiff_by_hand(8, 16_384, bytes(64)), "268,435,456 px at once"),
    "long.bmp": (BITMAP + bytes(1 << 24), "bytes, expected at most 16,777,216"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_tile_is_refused_with_the_reason(name):
    data, reason = REFUSED[name]
    for resize in (False, True):
        with pytest.raises(EurosatError, match=rf"^{name}: .*{reason}"):
            read_tile(data, EUROSAT_RGB, name, resize)


def largest_pictures() -> dict[str, bytes]:
    "Of each kind the picture that takes most memory and is still let through."
    side = int(MAX_PIXELS**0.5)
    small = np.random.default_rng(0).integers(0, 256, (side // 32, side // 32, 3), dtype=np.uint8)
    rgb = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
    rgba = rgb.copy()
    rgba.putalpha(100)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "progressive.jpg": encode(rgb, "JPEG", progressive=True, subsampling=0, quality=90, exif=exif),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG", progressive=True),
        "alpha.png": encode(rgba, "PNG", compress_level=1),
        "grey.png": encode(rgb.convert("LA"), "PNG", compress_level=1),
        "palette.png": encode(rgb.quantize(16), "PNG", transparency=3),
        "alpha.webp": encode(rgba, "WEBP", method=0, exif=exif),
        "plain.bmp": encode(rgb, "BMP"),
        "strip.tif": encode(rgb, "TIFF", compression="tiff_deflate", tiffinfo={278: side}),
        "turned.tif": encode(rgb, "TIFF", exif=exif),
    }


ASK = """
import json, pathlib, sys
from eurosat_mlops.core import EurosatError, Settings
from eurosat_mlops.predict import load_bundle, read_tile
classifier, said = load_bundle(sys.argv[1]), {}
for file in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    try:
        tile = read_tile(file.read_bytes(), classifier.contract, file.name, resize=True)
        said[file.name] = classifier.predict(tile[None]).names[0]
    except EurosatError as error:
        said[file.name] = f"refused: {error}"
peak = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
heavy = {"torch", "torchvision", "fastai", "timm", "matplotlib", "fsspec"} & set(sys.modules)
print(json.dumps({"said": said, "peak_mb": int(peak.split()[1]) / 1024, "heavy": sorted(heavy)}))
"""


def ask(folder: Path, files: Path) -> dict:
    "The answers of a fresh process to the files of a folder."
    command = [sys.executable, "-W", "error", "-c", ASK, str(folder), str(files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
def test_no_file_takes_250_mb(bundle_folder, tmp_path):
    "The peak is VmHWM and not getrusage, which would count what the process was forked from."
    largest = largest_pictures()
    for name, data in {**largest, **{name: data for name, (data, _) in REFUSED.items()}}.items():
        (tmp_path / name).write_bytes(data)
    answered = ask(bundle_folder, tmp_path)
    refused = {name for name, said in answered["said"].items() if said.startswith("refused: ")}
    assert refused == set(REFUSED) and set(answered["said"]) == refused | set(largest)
    assert answered["peak_mb"] < 250


def mutate(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 2, 5, 20))):
        place = chance.randrange(min(len(changed), chance.choice((64, 400, len(changed)))))
        changed[place] = chance.choice((0, 255, chance.randrange(256), changed[place] ^ (1 << chance.randrange(8))))
    if chance.random() < 0.1:
        place = chance.randrange(len(changed))
        changed[place : place + chance.randrange(40)] = chance.randbytes(chance.randrange(40))
    return bytes(changed[: chance.randrange(len(changed)) if chance.random() < 0.1 else None])


def outcomes(files: list[bytes]) -> tuple[int, int]:
    "How many became a tile and how many were refused; anything else fails the test."
    read = 0
    for data in files:
        try:
            tile = read_tile(data, EUROSAT_RGB, "a", resize=True)
        except EurosatError:
            continue
        assert tile.shape == (64, 64, 3) and tile.dtype == np.uint8
        read += 1
    return read, len(files) - read


@pytest.fixture(scope="module")
def real_files(archive) -> dict[str, bytes]:
    "Ten real tiles of each class, as they are in the archive."
    with zipfile.ZipFile(archive) as zipped:
        names = [name for name in zipped.namelist() if name.endswith(".jpg")]
        return {name: zipped.read(name) for name in sorted(names)[::270]}


@pytest.mark.filterwarnings("ignore")
def test_damaged_real_tiles_are_read_or_refused(real_files):
    chance, whole = random.Random(0), list(real_files.values())
    read, refused = outcomes([mutate(chance.choice(whole), chance) for _ in range(5000)])
    assert read > 500 and refused > 500


def test_no_part_of_a_real_tile_passes_for_the_whole(real_files):
    whole = next(iter(real_files.values()))
    assert outcomes([whole[:end] for end in range(len(whole))]) == (0, len(whole))
    assert outcomes([whole]) == (1, 0)


@pytest.mark.filterwarnings("ignore")
def test_the_quick_way_says_what_pillow_says(real_files):
    "A JPEG, whole or damaged, that is read without a picture object gets the pixels that Pillow gives it."
    chance, whole = random.Random(2), list(real_files.values())
    quick = [data for data in whole if _plain_jpeg(data, 64) is not None]
    assert quick == whole
    for data in whole + [mutate(chance.choice(whole), chance) for _ in range(3000)]:
        if (tile := _plain_jpeg(data, 64)) is not None:
            quick.append(data)
            assert np.array_equal(tile, np.asarray(Image.open(io.BytesIO(data))))
    assert len(quick) > 1000
    assert _plain_jpeg(whole[0], 32) is None and _plain_jpeg(whole[0][:-1], 64) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "tiff_lzw", "tiff_deflate", "jpeg"])
def test_damaged_files_of_other_kinds_are_read_or_refused(kind):
    whole = encode(PICTURE, kind) if kind.isupper() else encode(PICTURE, "TIFF", compression=kind)
    chance = random.Random(1)
    assert outcomes([mutate(whole, chance) for _ in range(600)])[1] > 60


def test_a_model_of_other_bands_takes_no_pictures():
    contract = InputContract(bands=("B08", "B04", "B03", "B02"), level="L1C")
    with pytest.raises(EurosatError, match="takes the bands B08, B04, B03, B02, a picture has 3"):
        read_tile(WHOLE, contract, "a")


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(bundle_folder, tmp_path_factory) -> Path:
    "A bundle that holds both graphs."
    copy = shutil.copytree(bundle_folder, tmp_path_factory.mktemp("predict") / "run" / "bundle")
    if not (copy / "model.int8.onnx").exists():
        update_bundle(copy, {}, {"model.int8.onnx": quantize_graph((copy / "model.onnx").read_bytes(), TILES)})
    return copy


@pytest.fixture(scope="module", params=["fp32", "int8"])
def classifier(folder, request) -> Classifier:
    return load_bundle(folder, request.param)


def raw(answers: Answers) -> tuple[bytes, bytes, bytes]:
    return answers.probabilities.tobytes(), answers.embedding.tobytes(), answers.distance.tobytes()


def test_the_same_tiles_get_the_same_bytes(classifier):
    first, again = classifier.predict(TILES), classifier.predict(TILES.copy())
    assert raw(first) == raw(again)
    averaged = [classifier.predict(TILES[:9], averaging=True) for _ in range(2)]
    assert raw(averaged[0]) == raw(averaged[1])


@pytest.mark.parametrize("batch", [1, 2, 7, 32, 64])
def test_a_tile_gets_the_same_bytes_alone_and_among_others(classifier, batch):
    together = classifier.predict(TILES)
    parts = [classifier.predict(TILES[i : i + batch]) for i in range(0, len(TILES), batch)]
    for name in ("probabilities", "embedding", "distance"):
        assert np.concatenate([getattr(p, name) for p in parts]).tobytes() == getattr(together, name).tobytes()
    shuffled = np.random.default_rng(0).permutation(len(TILES))
    assert np.array_equal(classifier.predict(TILES[shuffled]).probabilities, together.probabilities[shuffled])


def test_threads_at_once_get_the_same_bytes(classifier):
    expected = [raw(classifier.predict(TILES[i : i + 4])) for i in range(0, len(TILES), 4)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            got = pool.map(lambda i: raw(classifier.predict(TILES[i : i + 4])), range(0, len(TILES), 4))
            assert list(got) == expected


def test_predicting_changes_nothing(folder, classifier):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    tiles, arrays = TILES.copy(), [classifier.centers.copy(), classifier.whitening.copy()]
    first = raw(classifier.predict(tiles[:5]))
    classifier.predict(tiles, averaging=True)
    classifier.explain(tiles[:2])
    assert raw(classifier.predict(tiles[:5])) == first and np.array_equal(tiles, TILES)
    assert all(map(np.array_equal, arrays, [classifier.centers, classifier.whitening]))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert verify_bundle(folder) == classifier.bundle.id


def test_averaging_is_the_mean_over_the_eight_views(classifier):
    averaged = classifier.predict(TILES[:6], averaging=True)
    views = [classifier.predict(np.ascontiguousarray(view)) for view in square_views(TILES[:6])]
    assert len(views) == 8
    for name in ("probabilities", "embedding", "distance"):
        assert np.allclose(getattr(averaged, name), np.mean([getattr(v, name) for v in views], axis=0), atol=1e-6)
    turned = classifier.predict(np.rot90(TILES[:6], axes=(1, 2)), averaging=True)
    assert np.allclose(turned.probabilities, averaged.probabilities, atol=1e-5)


@pytest.mark.parametrize(("symmetry", "count"), [("square", 8), ("mirror", 2), ("none", 1)])
def test_averaging_takes_the_views_that_training_took_for_the_same(classifier, symmetry, count):
    config = classifier.bundle.info["config"] | {"symmetry": symmetry}
    other = replace(classifier, bundle=replace(classifier.bundle, info=classifier.bundle.info | {"config": config}))
    views = [np.ascontiguousarray(view) for view in square_views(TILES[:6], symmetry)]
    assert len({view.tobytes() for view in views}) == len(views) == count
    by_hand = np.mean([classifier.predict(view).probabilities for view in views], axis=0)
    assert np.allclose(other.predict(TILES[:6], averaging=True).probabilities, by_hand, atol=1e-6)
    assert np.array_equal(views[0], TILES[:6]) and (count == 1 or np.array_equal(views[1], TILES[:6, :, ::-1]))


@pytest.mark.parametrize("size", [16, 50, 512])
def test_explaining_a_tile_of_any_size_asks_as_often(size):
    masks = _cover_masks(size, size // 4, size // 8)
    assert 49 <= len(masks) <= 100 and masks.any(0).all()


def test_answers_name_their_doubts():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2]], np.float32)
    distance = np.array([1, 9, 2], np.float32)
    answers = Answers(probabilities, probabilities, distance, ("a", "b", "c"), {"confidence": 0.6, "distance": 9.0})
    assert answers.labels.tolist() == [0, 2, 1] and answers.names == ["a", "c", "b"] and len(answers) == 3
    assert answers.uncertain.tolist() == [True, False, False] and not answers.unfamiliar.any()
    assert [name for name, _ in answers.top(3)[1]] == ["c", "a", "b"] and answers.top(1)[0] == [("a", 0.5)]
    for k in (0, 4):
        with pytest.raises(EurosatError, match="expected 1 to 3"):
            answers.top(k)


def test_no_tiles_get_no_answers(classifier):
    nothing = classifier.predict(TILES[:0])
    assert len(nothing) == 0 and nothing.probabilities.shape == (0, 10) and nothing.names == []
    assert classifier.explain(TILES[:0]).shape == (0, 64, 64)


@pytest.mark.parametrize("tiles", [TILES.astype(np.float32), TILES[0], TILES[:, :32], TILES[..., :1]])
def test_what_is_no_batch_of_tiles_is_refused(classifier, tiles):
    with pytest.raises(EurosatError, match=r"^tiles: got .* expected"):
        classifier.predict(tiles)


def test_the_map_shows_what_was_planted(classifier):
    "A quarter of another class that tips the answer is where the map is brightest, mostly: other parts count too."
    labels, brighter = classifier.predict(TILES).labels, []
    for row, other in itertools.product(range(0, len(TILES), 2), range(1, len(TILES), 9)):
        planted = TILES[row : row + 1].copy()
        planted[0, 32:, :32] = TILES[other, 32:, :32]
        if labels[row] != labels[other] == classifier.predict(planted).labels[0]:
            heat = classifier.explain(planted)[0]
            brighter.append(heat[32:, :32].mean() > heat[:32].mean())
    assert len(brighter) >= 5 and np.mean(brighter) > 0.75, brighter
    assert classifier.explain(TILES[:2]).dtype == np.float32
    with pytest.raises(EurosatError, match="1 <= stride <= patch <= 64"):
        classifier.explain(TILES[:1], patch=4, stride=8)


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_fresh_process_answers_in_time_and_without_the_training_stack(folder, tmp_path):
    (tmp_path / "River_1.jpg").write_bytes(WHOLE)
    began = sum(os.times()[2:4])  # of the processor, since other work may share the machine
    answered = ask(folder, tmp_path)
    seconds = sum(os.times()[2:4]) - began
    assert answered["heavy"] == [] and not answered["said"]["River_1.jpg"].startswith("refused")
    assert seconds < 2


def test_a_run_is_as_good_as_its_bundle(folder):
    assert load_bundle(folder.parent).bundle.id == load_bundle(str(folder)).bundle.id
    for source in (folder.parent / "nothing", folder.parent.parent, f"{folder.parent}/nothing"):
        with pytest.raises(EurosatError, match="no bundle here; expected the folder"):
            load_bundle(source)


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory) -> Path:
    return shutil.copytree(folder, tmp_path_factory.mktemp("small") / "bundle")


def test_a_flipped_bit_never_reaches_onnxruntime(small, monkeypatch):
    opened = []
    monkeypatch.setattr(room, "open_session", lambda *given: opened.append(given))
    chance = random.Random(0)
    for name in ("model.onnx", "model.int8.onnx", "reference.npz", "bundle.json"):
        whole = (small / name).read_bytes()
        for _ in range(25):
            changed = bytearray(whole)
            changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            (small / name).write_bytes(changed)
            with pytest.raises(EurosatError, match="differs from the manifest"):
                load_bundle(small)
        (small / name).write_bytes(whole)
    assert opened == []


@pytest.mark.parametrize("name", ["model.onnx", "reference.npz"])
def test_what_is_opened_is_what_was_checked(small, name, monkeypatch):
    "A file that is exchanged after the bundle was verified, and before it is opened, is refused."
    verify, whole = room.read_bundle, (small / name).read_bytes()

    def exchange(folder):
        bundle = verify(folder)
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        return bundle

    monkeypatch.setattr(room, "read_bundle", exchange)
    with pytest.raises(EurosatError, match="differs from the manifest"):
        load_bundle(small)
    (small / name).write_bytes(whole)


def test_an_alias_or_an_id_comes_from_the_registry(folder, tmp_path, monkeypatch):
    from eurosat_mlops.registry import open_registry

    settings = Settings(tmp_path, models_dir=tmp_path / "models")
    registry = open_registry(settings)
    held = registry.add(folder)
    registry.move("staging", held, who="a test", why="to be found", after=0)
    shutil.copytree(folder, tmp_path / "staging")
    update_bundle(tmp_path / "staging", {"created": "2020-01-01T00:00:00Z"}, {})
    monkeypatch.chdir(tmp_path)
    for source in ("staging", held, held[:12]):
        assert load_bundle(source, settings=settings).bundle.id == held
    assert load_bundle("./staging", settings=settings).bundle.id != held
    for source in ("production", "f" * 64):
        with pytest.raises(EurosatError):
            load_bundle(source, settings=settings)
