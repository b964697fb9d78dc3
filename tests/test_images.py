"""Pictures of one's own: read whole, faults listed, copies kept on one side, split by content, kept on the disk."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eurosat_mlops.core import EurosatError, Settings
from eurosat_mlops.data import PARTS, TileSet
from eurosat_mlops.images import choose_parts, hold_apart, native_size, read_pictures, summarize_report
from eurosat_mlops.sources import open_pictures
from eurosat_mlops.synthetic import make_synthetic


def save_folder(tileset: TileSet, folder: Path, ending: str = "png") -> Path:
    for row, (tile, label) in enumerate(zip(tileset.tiles, tileset.labels, strict=True)):
        home = folder / tileset.classes[label]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tile).save(home / f"{row:03}.{ending}")
    return folder


@pytest.fixture(scope="module")
def tiles() -> TileSet:
    return make_synthetic(per_class=10, size=32, seed=1)


@pytest.fixture
def folder(tiles, tmp_path) -> Path:
    return save_folder(tiles, tmp_path / "own")


def pixels_of(tileset: TileSet) -> dict[str, set[bytes]]:
    return {part: {tile.tobytes() for tile in tileset.part(part)[0][:]} for part in PARTS}


def test_folder_and_zip_give_the_same(tiles, folder, tmp_path):
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_text("not an image")
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png"), reverse=True):
            archive.write(file, f"deep/er/{file.relative_to(folder)}")
        archive.writestr("__MACOSX/deep/er/River/._001.png", b"x")
    one, two = (read_pictures(source, tmp_path / "cache") for source in (folder, tmp_path / "own.zip"))
    assert np.array_equal(one.tiles, two.tiles) and one.classes == two.classes == tiles.classes
    assert all(np.array_equal(one.parts[part], two.parts[part]) for part in PARTS)
    assert one.names == two.names and one.digest == two.digest and one.name == two.name == "own"
    assert one.contract.level == "image" and one.contract.tile_size == 32 and one.split == "stratified"


def test_renamed_files_keep_their_part(tiles, folder, tmp_path):
    before = pixels_of(read_pictures(folder, tmp_path / "cache"))
    for row, file in enumerate(sorted(folder.rglob("*.png"))):
        file.rename(file.with_name(f"x{len(tiles.names) - row:03}.png"))
    assert pixels_of(read_pictures(folder, tmp_path / "cache")) == before


def test_the_seed_draws_the_split_and_nothing_else(folder, tmp_path):
    one, other = (read_pictures(folder, tmp_path / "cache", seed=seed) for seed in (0, 1))
    assert one.digest == other.digest and pixels_of(one) != pixels_of(other)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "1"])
def test_grey_and_transparent_pictures_are_read(tmp_path, mode):
    tileset = make_synthetic(per_class=3, size=20)
    for row, label in enumerate(tileset.labels):
        home = tmp_path / "own" / tileset.classes[label]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tileset.tiles[row]).convert(mode).save(home / f"{row}.png")
    found = read_pictures(tmp_path / "own", tmp_path / "cache")
    assert found.tiles.shape == (30, 20, 20, 3) and list(found.report["kinds"]) == [f"PNG {mode}"]


@pytest.mark.parametrize(
    "sides, side", [([32], 32), ([100], 100), ([9], 16), ([700], 512), ([30, 50, 70], 48), ([33, 33, 34], 32)]
)
def test_the_native_size_is_that_of_the_pictures_within_limits(tmp_path, sides, side):
    for row in range(12):
        home = tmp_path / "own" / "ab"[row % 2]
        home.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(row).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        short = sides[row % len(sides)]
        Image.fromarray(pixels).resize((short, short + (40 if len(sides) > 1 else 0))).save(home / f"{row}.png")
    with open_pictures(tmp_path / "own") as pictures:
        assert native_size(pictures) == side
    found = read_pictures(tmp_path / "own", tmp_path / "cache")
    assert found.contract.tile_size == found.tiles.shape[1] == side
    assert found.report["resized"] == (0 if sides == [side] else 12)


def test_a_picture_saved_again_stays_on_one_side(tiles, folder, tmp_path):
    for row in range(0, 100, 4):
        home = folder / tiles.classes[tiles.labels[row]]
        Image.fromarray(tiles.tiles[row]).save(home / f"{row:03}-again.bmp")
    found = read_pictures(folder, tmp_path / "cache")
    part_of = {found.names[row]: part for part, rows in found.parts.items() for row in rows}
    assert len(found.report["alike"]) == 25
    assert all(len({part_of[name] for name in group}) == 1 for group in found.report["alike"])
    assert "look alike: 25 groups" in summarize_report(found.report)


def test_a_picture_in_two_classes_is_named(folder, tmp_path):
    twice = (folder / "Forest" / "010.png").read_bytes()
    (folder / "River" / "same.png").write_bytes(twice)
    found = read_pictures(folder, tmp_path / "cache")
    assert found.report["conflicts"] == [["Forest/010.png", "River/same.png"]]


def split_by_owner(tiles: TileSet, folder: Path, parts: dict[str, slice]) -> Path:
    for label, name in enumerate(tiles.classes):
        rows = np.flatnonzero(tiles.labels == label)
        for part, these in parts.items():
            home = folder / part / name
            home.mkdir(parents=True, exist_ok=True)
            for row in rows[these]:
                Image.fromarray(tiles.tiles[row]).save(home / f"{row}.png")
    return folder


def test_the_split_of_the_owner_is_kept(tiles, tmp_path):
    parts = {"train": slice(0, 6), "valid": slice(6, 8), "test": slice(8, 10)}
    found = read_pictures(split_by_owner(tiles, tmp_path / "own", parts), tmp_path / "cache")
    assert found.split == "own" and [len(found.parts[part]) for part in PARTS] == [60, 20, 20]
    assert all(found.names[row].startswith("test/") for row in found.parts["test"])


def test_a_part_that_the_owner_lacks_is_taken_from_training(tiles, tmp_path):
    parts = {"train": slice(0, 8), "test": slice(8, 10)}
    found = read_pictures(split_by_owner(tiles, tmp_path / "own", parts), tmp_path / "cache")
    held = {part: {found.names[row].split("/")[0] for row in found.parts[part]} for part in PARTS}
    assert held == {"train": {"train"}, "val": {"train"}, "test": {"test"}}
    assert len(found.parts["test"]) == 20 and len(found.parts["val"]) in range(10, 21)
    assert len(found.parts["train"]) + len(found.parts["val"]) == 80


def test_a_training_picture_that_is_also_tested_is_left_out_and_named(tiles, tmp_path):
    home = split_by_owner(tiles, tmp_path / "own", {"train": slice(0, 8), "test": slice(8, 10)})
    leak = Image.open(next((home / "test" / "River").iterdir())).transpose(Image.Transpose.ROTATE_90)
    leak.save(home / "train" / "River" / "leak.jpg", quality=95)
    found = read_pictures(home, tmp_path / "cache")
    held = {found.names[row] for rows in found.parts.values() for row in rows}
    assert "train/River/leak.jpg" not in held
    assert [name for name, _ in found.report["left_out"]] == ["train/River/leak.jpg"]
    assert "the same picture as test/River/" in found.report["left_out"][0][1]


def test_hold_apart_prefers_test_then_val():
    assert hold_apart(["train", "val", "test", "train", ""], list("aaabb")) == {0: 2, 1: 2}


def test_rows_without_a_part_stay_outside():
    parts = choose_parts(
        np.array([0, 1, 0, 1, 0, 1, 0]), ["train"] * 2 + ["val"] * 2 + ["test"] * 2 + [""], list("abcdefg"), 0
    )
    assert 6 not in np.concatenate(list(parts.values()))


def test_what_was_read_is_kept_and_read_again_only_when_it_changes(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = read_pictures(folder, cache)
    stored = next(cache.glob("*/tiles.u8"))
    before = stored.stat().st_mtime_ns
    assert np.array_equal(read_pictures(folder, cache).tiles, first.tiles) and stored.stat().st_mtime_ns == before
    assert not first.tiles.flags.writeable
    Image.new("RGB", (32, 32), (9, 99, 200)).save(folder / "River" / "new.png")
    again = read_pictures(folder, cache)
    assert len(again.names) == len(first.names) + 1 and len(list(cache.glob("*/tiles.u8"))) == 1
    assert read_pictures(folder, cache, size=32).digest == again.digest  # their own size, by its number
    assert len(list(cache.glob("*/tiles.u8"))) == 1
    assert read_pictures(folder, cache, size=16).tiles.shape[1:] == (16, 16, 3)


def test_a_cache_that_was_cut_short_is_made_again(folder, tmp_path):
    first = np.array(read_pictures(folder, tmp_path / "cache").tiles)
    stored = next((tmp_path / "cache").glob("*/tiles.u8"))
    os.truncate(stored, 5000)
    assert np.array_equal(read_pictures(folder, tmp_path / "cache").tiles, first)


READ = """
import sys
from pathlib import Path
from eurosat_mlops.images import read_pictures
print("begun", flush=True)
print(read_pictures(sys.argv[1], Path(sys.argv[2])).digest)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_a_reader_that_is_killed_leaves_nothing_that_is_trusted(tmp_path):
    home = save_folder(make_synthetic(per_class=60, size=128, seed=3), tmp_path / "own")
    command = [sys.executable, "-c", READ, str(home), str(tmp_path / "cache")]
    for wait in (0.0, 0.1, 0.3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]  # and two at once
    said = {reader.communicate(timeout=100)[0].split()[-1] for reader in readers}
    assert said == {read_pictures(home, tmp_path / "cache").digest}
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_faults_of_a_whole_set_are_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EurosatError, match="no labelled picture in it"):
        read_pictures(tmp_path / "empty", tmp_path / "cache")
    with pytest.raises(EurosatError, match="no such file or folder"):
        read_pictures(tmp_path / "nowhere", tmp_path / "cache")
    for file in folder.rglob("*.png"):
        if file.parent.name != "River":
            file.unlink()
    with pytest.raises(EurosatError, match="one class, 'River'"):
        read_pictures(folder, tmp_path / "cache")


def hundred_classes(home: Path) -> dict[str, int]:
    "A hundred classes of 400 to 1 pictures of many sizes, with files that are none; the number of whole ones."
    rng, counts = np.random.default_rng(0), {}
    for k in range(100):
        name = f"{k:02} class é" if k % 10 == 0 else f"class{k:02}"
        counts[name] = max(1, round(400 * 400 ** (-k / 99)))
        (home / name).mkdir(parents=True)
        for n in range(counts[name]):
            pixels = rng.integers(0, 60, (8, 8, 3)) + np.array([k * 2, 195 - k, (k * 37) % 195])
            side = int(rng.integers(16, 60))
            Image.fromarray(pixels.astype(np.uint8)).resize((side, side + n % 9)).save(home / name / f"{n}.png")
    return counts


def test_a_hundred_rare_and_common_classes_with_broken_files_run_through(tmp_path):
    from eurosat_mlops.learner import TrainConfig
    from eurosat_mlops.runs import evaluate, train

    counts = hundred_classes(tmp_path / "own")
    broken = {
        "class01/empty.png": b"",
        "class01/page.jpg": b"<html>sign in</html>",
        "class02/cut.png": (tmp_path / "own" / "class01" / "0.png").read_bytes()[:40],
        "class02/deep.png": _deep(),
        "class03/read.me": b"words",
        "gone/only.jpg": b"broken too",
    }
    for name, content in broken.items():
        (tmp_path / "own" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "own" / name).write_bytes(content)
    settings = Settings(
        tmp_path, data_dir=tmp_path / "data", runs_dir=tmp_path / "runs", wandb="off", log_level="ERROR"
    )
    run = train(
        TrainConfig(data="own", epochs=2, size=16, shift=1, ema=0.9, wandb="off", device="cpu"), settings=settings
    )
    report = run.tileset.report
    assert {name for name, _ in report["left_out"]} == {*broken}
    assert {name: sum(n) for name, n in report["classes"].items()} == counts
    assert run.config.balance == "sampling" and run.config.symmetry == "mirror" and run.config.size == 16
    test = evaluate(run.folder, settings=settings).metrics["test"]["stratified"]
    few = [name for name, n in counts.items() if n == 1]
    assert few and all(test["per_class"][name]["recall"]["value"] is None for name in few)
    assert test["n"] == sum(held for _, _, held in report["classes"].values())
    assert run.metrics["data"]["left_out"] == len(report["left_out"])
    assert json.loads((run.folder / "data.json").read_text()) == report
    with (run.folder / "index.csv").open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == sum(counts.values()) and {row["part"] for row in listed} == set(PARTS)


def _deep() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((20, 20), 3000, np.uint16)).save(file, "PNG")
    return file.getvalue()
