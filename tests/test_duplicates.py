"Duplicates: what real tiles hold, what is found of copies of them, and how rows are tied together."

import hashlib
import io
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from eurosat_mlops.archives import open_source
from eurosat_mlops.core import EurosatError
from eurosat_mlops.data import decode_image, eurosat_names, eurosat_parts
from eurosat_mlops.duplicates import group_rows, near_duplicates, take_look, thumbnails, turned_alike, unturned
from eurosat_mlops.synthetic import make_synthetic

EUROSAT_COPIES = {  # looked at one by one: the same place twice, cut a few metres apart or not at all
    ("Highway_291.jpg", "Highway_513.jpg"),
    ("River_111.jpg", "River_1680.jpg"),
    ("River_2330.jpg", "River_676.jpg"),
    ("River_492.jpg", "River_597.jpg"),
}
CIFAKE_COPIES = {("test/REAL/1200.jpg", "train/REAL/0367.jpg")}


def read_all(path: Path, size: int) -> tuple[np.ndarray, list[str]]:
    with open_source(path) as (members, read):
        images = [member for member in members if member.name.endswith(".jpg")]
        tiles = np.stack([decode_image(read(member), size, member.name) for member in images])
        return tiles, [member.name for member in images]


@pytest.fixture(scope="module")
def eurosat(archive: Path) -> tuple[np.ndarray, list[str]]:
    "All 27,000 tiles and their file names."
    tiles, names = read_all(archive, 64)
    return tiles, [PurePosixPath(name).name for name in names]


@pytest.fixture(scope="module")
def cifake(project: Path) -> tuple[np.ndarray, list[str]]:
    "The 3,000 pictures of the CIFAKE sample and their names."
    sample = project.parent / "shared" / "data" / "cifake_sample.zip"
    if not sample.exists():
        pytest.skip("the CIFAKE sample is not beside the checkout")
    tiles, names = read_all(sample, 32)
    return tiles, ["/".join(PurePosixPath(name).parts[-3:]) for name in names]


def names_of(pairs: np.ndarray, names: list[str]) -> set[tuple[str, ...]]:
    return {tuple(sorted(names[row] for row in pair)) for pair in pairs.tolist()}


def test_eurosat_holds_four_pairs_and_none_of_its_plain_tiles_is_reported(eurosat):
    tiles, names = eurosat
    thumbs = thumbnails(tiles)
    assert np.mean(take_look(thumbs).contrast < 5) > 0.09, "thousands of tiles are nearly plain"
    start = time.process_time()
    pairs = near_duplicates(thumbs)
    assert time.process_time() - start < 10
    assert names_of(pairs, names) == EUROSAT_COPIES


def test_the_random_split_of_eurosat_parts_every_pair_and_the_spatial_one_none():
    row_of = {name: row for row, name in enumerate(eurosat_names())}
    parted = {}
    for split in ("random", "spatial"):
        part_of = {row: part for part, rows in eurosat_parts(split).items() for row in rows.tolist()}
        parted[split] = sum(part_of[row_of[a]] != part_of[row_of[b]] for a, b in EUROSAT_COPIES)
    assert parted == {"random": 4, "spatial": 0}


def test_cifake_sample_holds_one_pair_across_its_own_parts(cifake):
    tiles, names = cifake
    assert names_of(near_duplicates(thumbnails(tiles)), names) == CIFAKE_COPIES


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def save(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return save


def resized(share: float) -> Callable[[Image.Image], Image.Image]:
    def resize(image: Image.Image) -> Image.Image:
        there = image.resize([round(side * share) for side in image.size], Image.Resampling.BICUBIC)
        return there.resize(image.size, Image.Resampling.BICUBIC)

    return resize


def brighter(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.point(lambda level: min(255, round(level * share)))


def cropped(left: int, top: int, right: int, bottom: int) -> Callable[[Image.Image], Image.Image]:
    def crop(image: Image.Image) -> Image.Image:
        inner = image.crop((left, top, image.width - right, image.height - bottom))
        return inner.resize(image.size, Image.Resampling.BICUBIC)

    return crop


def turned(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.TRANSVERSE)


DISTURBED = {  # what was done, and the share found at least: of EuroSAT, of CIFAKE
    "saved as JPEG 95": ([jpeg(95)], 0.92, 0.99),
    "saved as JPEG 75": ([jpeg(75)], 0.89, 0.99),
    "saved as JPEG 50": ([jpeg(50)], 0.82, 0.99),
    "half the size and back": ([resized(0.5)], 0.93, 0.99),
    "twice the size and back": ([resized(2), jpeg(75)], 0.89, 0.99),
    "a tenth brighter": ([brighter(1.1)], 0.94, 0.99),
    "a tenth darker": ([brighter(0.9)], 0.94, 0.99),
    "turned": ([turned], 0.99, 0.99),
    "turned, brighter, saved as JPEG 75": ([turned, brighter(1.1), jpeg(75)], 0.89, 0.99),
    "a pixel cut from two edges": ([cropped(1, 0, 0, 1)], 0.90, 0.92),
    "a pixel cut from every edge": ([cropped(1, 1, 1, 1)], 0.90, 0.82),
    "two pixels cut from two edges": ([cropped(2, 0, 0, 2)], 0.70, 0.10),
}


@pytest.mark.parametrize("what", DISTURBED)
@pytest.mark.parametrize("dataset", ["eurosat", "cifake"])
def test_copies_of_real_pictures_are_found_and_nothing_else(request, dataset, what):
    tiles, _ = request.getfixturevalue(dataset)
    steps, *least = DISTURBED[what]
    rows = np.random.default_rng(1).choice(len(tiles), 500, replace=False)
    copies = []
    for image in map(Image.fromarray, tiles[rows]):
        for step in steps:
            image = step(image)
        copies.append(np.asarray(image))
    pairs = near_duplicates(thumbnails(np.concatenate([tiles[rows], np.stack(copies)])))
    assert all(b - a == 500 for a, b in pairs.tolist()), "two different pictures were taken for one"
    assert len(pairs) / 500 >= least[dataset == "cifake"]


def test_every_way_to_turn_a_picture_is_seen():
    tiles = make_synthetic(per_class=6, size=32, seed=2).tiles
    ways = [np.rot90(mirrored, turns, (1, 2)) for mirrored in (tiles, tiles[:, ::-1]) for turns in range(4)]
    for way in ways[1:]:
        pairs = near_duplicates(thumbnails(np.concatenate([tiles, way])))
        keys = group_rows(2 * len(tiles), pairs, [str(row) for row in range(2 * len(tiles))])
        assert keys[: len(tiles)] == keys[len(tiles) :] and len(set(keys)) == len(tiles)


def test_the_first_look_loses_no_pair():
    "The product of what stays the same is never below the best correlation, so a pair that is passed over is none."
    waves = np.random.default_rng(0).normal(size=(400, 55)).astype(np.float32)
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    first, second = waves[:200], waves[200:]
    alike, turned_second = turned_alike(first, second)
    assert np.all((unturned(first) * unturned(second)).sum(1) >= alike - 1e-5)
    assert np.allclose((first * turned_second).sum(1), alike, atol=1e-5)
    assert np.allclose(np.linalg.norm(unturned(waves), axis=1), 1, atol=1e-5)


def test_plain_pictures_are_not_taken_for_one_another():
    rng = np.random.default_rng(0)
    flat = np.broadcast_to(rng.integers(0, 256, (300, 1, 1, 3), dtype=np.uint8), (300, 64, 64, 3))
    noisy = (rng.integers(20, 220, (300, 1, 1, 3)) + rng.normal(0, 3, (300, 64, 64, 3))).astype(np.uint8)
    assert near_duplicates(thumbnails(np.concatenate([flat, noisy]))).size == 0


@pytest.mark.parametrize("noise, count", [(0, 50_000), (1, 4000)])
def test_many_copies_of_one_picture_stay_cheap(noise, count):
    "4,000 copies are 8 million pairs, and 50,000 are more than a billion; far fewer tie them."
    thumbs = thumbnails(make_synthetic(per_class=3, size=64, seed=0).tiles[::3])
    changes = np.random.default_rng(0).integers(0, noise + 1, (count, 16, 16, 3), dtype=np.uint8)
    many = np.concatenate([thumbs, thumbs[7] + changes])
    tracemalloc.start()
    pairs = near_duplicates(many)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(group_rows(len(many), pairs, [str(row) for row in range(len(many))]))) == 10
    assert len(pairs) < 10 * len(many) and peak < 2**28


def test_the_order_of_the_rows_changes_no_group():
    tiles = make_synthetic(per_class=20, size=64, seed=3).tiles
    copies = np.stack([np.asarray(cropped(1, 0, 0, 1)(Image.fromarray(tile))) for tile in tiles])
    thumbs = thumbnails(np.concatenate([tiles, tiles[:, ::-1], copies]))
    hashes = [hashlib.sha256(thumb.tobytes()).hexdigest() for thumb in thumbs]
    order = np.random.default_rng(0).permutation(len(thumbs))
    keys = group_rows(len(thumbs), near_duplicates(thumbs), hashes)
    again = group_rows(len(thumbs), near_duplicates(thumbs[order]), [hashes[row] for row in order])
    assert [keys[row] for row in order] == again and len(set(keys)) < 0.5 * len(keys)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_rows_have_few_pairs(count):
    tiles = make_synthetic(per_class=3, size=64, seed=0).tiles[21:22].repeat(count, 0)
    pairs = near_duplicates(thumbnails(tiles))
    assert pairs.dtype == np.int64 and pairs.tolist() == [[0, 1]][: count - 1 if count else 0]


@pytest.mark.parametrize("size", [16, 17, 31, 64, 100, 224, 512])
def test_a_picture_has_one_thumbnail_whatever_its_size(size):
    ramp = (np.arange(size) + 0.5) / size
    picture = np.stack([np.outer(ramp, 1 - ramp), np.outer(ramp, ramp), np.outer(1 - ramp, ramp)], -1)
    thumb = thumbnails(np.rint(255 * picture).astype(np.uint8)[None])[0].astype(int)
    middle = (np.arange(16) + 0.5) / 16
    assert np.abs(thumb[..., 1] - 255 * np.outer(middle, middle)).max() <= 1.5


def test_thumbnails_are_the_same_block_by_block(tmp_path):
    tiles = make_synthetic(per_class=3, size=32, seed=0).tiles
    np.save(tmp_path / "tiles.npy", tiles)
    mapped = np.load(tmp_path / "tiles.npy", mmap_mode="r")
    blocks = np.concatenate([thumbnails(mapped[first : first + 7]) for first in range(0, len(tiles), 7)])
    assert np.array_equal(blocks, thumbnails(tiles))


def test_what_is_no_set_of_pictures_is_refused():
    for shape in ((3, 8, 8, 3), (3, 32, 16, 3), (3, 32, 32), (3, 32, 32, 4)):
        with pytest.raises(EurosatError, match="expected"):
            thumbnails(np.zeros(shape, np.uint8))
    with pytest.raises(EurosatError, match=r"got float32 of shape \(3, 32, 32, 3\)"):
        thumbnails(np.zeros((3, 32, 32, 3), np.float32))
    with pytest.raises(EurosatError, match="make them with `thumbnails`"):
        near_duplicates(np.zeros((3, 32, 32, 3), np.uint8))
    for n, pairs, hashes in ((3, [], ["a"]), (2, [(0, 2)], ["a", "b"]), (2, [(-1, 0)], ["a", "b"])):
        with pytest.raises(EurosatError, match="expected to fit"):
            group_rows(n, pairs, hashes)


def test_groups_are_what_pairs_and_equal_hashes_connect():
    "Held against a walk through the ties."
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 40))
        pairs, hashes = rng.integers(0, n, (int(rng.integers(0, n)), 2)), [f"{k:02}" for k in rng.integers(0, 30, n)]
        ties = {row: {other for other in range(n) if hashes[other] == hashes[row]} for row in range(n)}
        for a, b in pairs.tolist():
            ties[a].add(b)
            ties[b].add(a)
        expected = []
        for row in range(n):
            seen, todo = set(), {row}
            while todo:
                seen |= todo
                todo = {other for one in todo for other in ties[one]} - seen
            expected.append(min(hashes[one] for one in seen))
        assert group_rows(n, pairs, hashes) == expected


def test_a_row_alone_keeps_its_hash():
    assert group_rows(3, [], ["c", "a", "b"]) == ["c", "a", "b"]
    assert group_rows(0, [], []) == []
    assert group_rows(3, [(0, 1)], ["c", "a", "b"]) == ["a", "a", "b"]
