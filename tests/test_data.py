"Tile sets: official splits, parts, stratified splits, decoding, archives, leaks."

import hashlib
import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eurosat_mlops import data
from eurosat_mlops.archives import open_source
from eurosat_mlops.core import EurosatError
from eurosat_mlops.data import PARTS, TileSet, decode_image, find_leaks, index_table
from eurosat_mlops.synthetic import make_synthetic

FILE_NAMES = {"random": "eurosat", "spatial": "eurosat-spatial"}


@pytest.fixture(scope="module")
def tiles() -> TileSet:
    return make_synthetic(per_class=10, size=32, seed=1)


@pytest.mark.parametrize("split", FILE_NAMES)
@pytest.mark.parametrize("part", PARTS)
def test_official_lists_are_published_files_byte_for_byte(archive, split, part):
    published = Path(os.environ.get("EUROSAT_SPLITS") or archive.parent / "splits") / f"{FILE_NAMES[split]}-{part}.txt"
    if not published.exists():
        pytest.skip("the published lists are not here; name their folder in EUROSAT_SPLITS")
    assert data.split_list(split, part) == published.read_bytes()


@pytest.mark.parametrize("split", FILE_NAMES)
def test_official_parts_cover_everything_once(split):
    parts = data.eurosat_parts(split)
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 16200, "val": 5400, "test": 5400}
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(27000))
    assert all(np.all(np.diff(rows) > 0) and rows.dtype == np.int64 for rows in parts.values())
    for part, expected in data.EUROSAT_SPLITS[split].items():
        assert hashlib.sha256(data.split_list(split, part)).hexdigest() == expected


def test_file_list_agrees_with_the_archive(archive):
    if archive.is_dir():
        pytest.skip("EUROSAT_ARCHIVE is a folder; this test reads a zip")
    with zipfile.ZipFile(archive) as opened:
        members = [name for name in opened.namelist() if name.endswith(".jpg")]
        hashes = {Path(name).name: hashlib.sha256(opened.read(name)).hexdigest() for name in members}
    assert data.content_digest(hashes) == data.EUROSAT_DIGEST
    assert {name: value[:8] for name, value in hashes.items()} == data.eurosat_files().prefixes


def test_unknown_split_and_part_are_refused(tiles):
    with pytest.raises(EurosatError, match="split: got 'temporal', expected one of random, spatial"):
        data.split_list("temporal", "train")
    with pytest.raises(EurosatError, match="part: got 'valid', expected one of train, val, test"):
        data.split_list("random", "valid")
    with pytest.raises(EurosatError, match="expected one of train, val, test"):
        tiles.part("holdout")


def test_tileset_refuses_what_does_not_fit(tiles):
    with pytest.raises(EurosatError, match="expected as many of each"):
        replace(tiles, names=tiles.names[1:])
    with pytest.raises(EurosatError, match="a label is outside"):
        replace(tiles, classes=tiles.classes[:3])
    with pytest.raises(EurosatError, match="in two parts"):
        replace(tiles, parts=tiles.parts | {"val": tiles.parts["train"]})


def test_a_part_is_a_view_that_reads_the_rows_it_is_asked_for(tiles):
    pixels, labels = tiles.part("val")
    rows = tiles.parts["val"]
    assert len(pixels) == len(rows) and pixels.shape == (len(rows), 32, 32, 3)
    assert np.array_equal(pixels[:], tiles.tiles[rows]) and np.array_equal(pixels[2:5], tiles.tiles[rows[2:5]])
    assert np.array_equal(pixels[np.array([4, 0])], tiles.tiles[rows[[4, 0]]])
    assert np.array_equal(pixels[3], tiles.tiles[rows[3]]) and np.array_equal(np.asarray(pixels), pixels[:])
    assert np.array_equal(labels, tiles.labels[rows])
    copy = pixels[:]
    copy[:] = 0
    assert pixels[:].any()


def test_stratified_split_depends_on_content_and_seed_only():
    rng = np.random.default_rng(0)
    labels, keys = rng.integers(0, 4, 400), [f"{key:064x}" for key in range(400)]
    split = data.stratified_split(labels, keys, seed=3)
    order = rng.permutation(400)
    shuffled = data.stratified_split(labels[order], [keys[row] for row in order], seed=3)
    other = data.stratified_split(labels, keys, seed=4)
    for part, share in zip(PARTS, (0.6, 0.2, 0.2), strict=True):
        assert set(split[part]) == set(order[shuffled[part]])
        assert set(split[part]) != set(other[part])
        for label in range(4):
            assert abs(np.sum(labels[split[part]] == label) - share * np.sum(labels == label)) <= 1
    assert np.array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(400))


@pytest.mark.parametrize("count", range(3, 12))
def test_every_class_is_in_every_part(count):
    split = data.stratified_split(np.zeros(count, int), [str(row) for row in range(count)], seed=0)
    assert all(len(split[part]) >= 1 for part in PARTS)


def test_same_content_stays_in_one_part():
    keys = [str(row // 5) for row in range(100)]
    split = data.stratified_split(np.zeros(100, int), keys, seed=0)
    held = [{keys[row] for row in rows} for rows in split.values()]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])


def test_split_of_different_images_is_the_one_that_runs_were_trained_on():
    "Held by a digest, since another split would make every earlier figure of an own dataset incomparable."
    rng = np.random.default_rng(5)
    keys = [hashlib.sha256(str(row).encode()).hexdigest() for row in range(1000)]
    split = data.stratified_split(rng.integers(0, 7, 1000), keys, seed=11)
    listed = "".join(f"{part} {row}\n" for part in PARTS for row in split[part].tolist())
    assert (
        hashlib.sha256(listed.encode()).hexdigest()
        == "95eb27e2da6669161ce41e18510af36dca83f2ba8419ddc243189dd0b0c96806"
    )


def test_group_that_spans_classes_stays_in_one_part():
    rng = np.random.default_rng(1)
    labels, keys = rng.integers(0, 5, 600), [f"{key}" for key in rng.integers(0, 250, 600)]
    split = data.stratified_split(labels, keys, seed=2)
    held = [{keys[row] for row in rows} for rows in split.values()]
    assert sum(len(part) for part in held) == len(set(keys))
    assert np.array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(600))
    order = rng.permutation(600)
    shuffled = data.stratified_split(labels[order], [keys[row] for row in order], seed=2)
    assert all(set(split[part]) == set(order[shuffled[part]]) for part in PARTS)


def test_small_classes_go_to_train_and_then_to_test():
    labels = np.array([0] * 10 + [1] + [2] * 2 + [3] * 4)
    keys = [*map(str, range(13)), "a", "a", "b", "b"]
    split = {part: labels[rows].tolist() for part, rows in data.stratified_split(labels, keys, seed=0).items()}
    assert [part for part in PARTS if 1 in split[part]] == ["train"]
    assert [part for part in PARTS if 2 in split[part]] == ["train", "test"]
    assert [split[part].count(3) for part in PARTS] == [2, 0, 2]


@pytest.mark.parametrize("labels, empty", [([0], "val, test"), ([0, 0, 1], "val"), ([0, 1, 2], "val, test")])
def test_split_that_leaves_a_part_empty_is_refused(labels, empty):
    with pytest.raises(EurosatError, match=f"which leaves {empty} empty"):
        data.stratified_split(np.array(labels), [str(row) for row in range(len(labels))], seed=0)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("shape", [(64, 64), (31, 77), (1, 1), (300, 200)])
def test_any_8_bit_picture_becomes_rgb_of_one_size(mode, shape):
    file = io.BytesIO()
    Image.new("RGB", shape, (200, 100, 50)).convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
    tile = decode_image(file.getvalue(), 64, "a.png")
    assert tile.shape == (64, 64, 3) and tile.dtype == np.uint8
    if mode in ("RGBA", "CMYK"):
        assert np.allclose(tile, (200, 100, 50), atol=2)
    if mode in ("L", "LA"):
        assert np.all(tile == tile[0, 0, 0])


def test_transparent_pixels_are_black_and_16_bit_is_refused():
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), (200, 100, 50, 0)).save(file, "PNG")
    assert not decode_image(file.getvalue(), 64, "a.png").any()
    file = io.BytesIO()
    Image.fromarray(np.full((64, 64), 3000, np.uint16)).save(file, "PNG")
    with pytest.raises(EurosatError, match=r"dn\.png: its pixels have more than 8 bits"):
        decode_image(file.getvalue(), 64, "dn.png")


@pytest.mark.parametrize("data_bytes", [b"", b"<html>not found</html>", b"\xff\xd8\xff\xe0 half a JPEG"])
def test_what_is_no_image_is_named(data_bytes):
    with pytest.raises(EurosatError, match=r"River/7\.jpg: not a whole image"):
        decode_image(data_bytes, 64, "River/7.jpg")


def opened(path: Path) -> list[bytes]:
    "Every file of a source."
    with open_source(path) as (members, read):
        return [read(member) for member in members]


@pytest.mark.parametrize("member", ["../River/1.png", "/River/1.png", "a/../../River/1.png", "C:/River/1.png"])
def test_zip_that_points_out_is_refused(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(member, b"x")
    with pytest.raises(EurosatError, match="points out of the archive"):
        opened(tmp_path / "evil.zip")


def test_zip_links_bombs_and_damage_are_refused(tmp_path):
    link = zipfile.ZipInfo("River/1.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(EurosatError, match=r"'River/1\.png' is a link"):
        opened(tmp_path / "link.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("River/2.png", bytes(70_000_000))
    with pytest.raises(EurosatError, match=r"'River/2\.png' has 70,000,000 bytes, expected at most"):
        opened(tmp_path / "bomb.zip")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("River/3.png", b"0123456789")
    (tmp_path / "bad.zip").write_bytes((tmp_path / "bad.zip").read_bytes().replace(b"0123456789", b"012345678X"))
    with pytest.raises(EurosatError, match=r"River/3\.png cannot be read \(Bad CRC"):
        opened(tmp_path / "bad.zip")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "bomb.zip").read_bytes()[:-30])
    with pytest.raises(EurosatError, match="not a zip, or cut short"):
        opened(tmp_path / "cut.zip")


def test_planted_leaks_are_found(tiles):
    assert find_leaks(tiles) == []
    train, test = tiles.parts["train"][0], tiles.parts["test"][0]
    pixels = tiles.tiles.copy()
    pixels[test] = pixels[train]
    leaks = find_leaks(replace(tiles, tiles=pixels))
    assert [set(leak["names"]) for leak in leaks] == [{tiles.names[train], tiles.names[test]}]
    assert sorted(leaks[0]["parts"]) == ["test", "train"]


def test_index_lists_every_tile(tiles):
    table = index_table(tiles)
    assert [row["name"] for row in table] == list(tiles.names)
    for part in PARTS:
        assert [n for n, row in enumerate(table) if row["part"] == part] == tiles.parts[part].tolist()
    assert len({row["sha256"] for row in table}) == len(table)
    assert all(tiles.classes[label] == row["class"] for label, row in zip(tiles.labels, table, strict=True))
