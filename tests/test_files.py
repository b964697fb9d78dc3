"""Pictures in, answers out: order, broken files, bounded memory, every format, and going on after a kill."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eurosat_mlops.bands import IMAGE_RGB
from eurosat_mlops.core import EurosatError
from eurosat_mlops.files import Failure, Prediction, find_images, overlay, predict_files, shown, write_overlays
from eurosat_mlops.predict import Classifier, load_bundle
from eurosat_mlops.synthetic import make_synthetic
from eurosat_mlops.tables import FORMATS, Tally, predict_into, write_predictions

CLASSES = ("Forest", "River", "SeaLake")
ROW = Prediction("a.jpg", "River", 0.7, False, True, 3.25, [0.1, 0.7, 0.2])
NAMES = [
    "a.jpg",
    "=1+1.jpg",
    "+x",
    "-x",
    "@x",
    "line\nbreak.jpg",
    "tab\t,\"quoted'.jpg",
    "\r.jpg",
    "\udcff.jpg",
    "é水.jpg",
]


@pytest.fixture(scope="module")
def model(bundle_folder: Path) -> Classifier:
    return load_bundle(bundle_folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "40 tiles in a folder and two folders in it; nobody writes here."
    root = tmp_path_factory.mktemp("pictures")
    for row, tile in enumerate(make_synthetic(per_class=4, seed=3).tiles):
        home = root / ("", "north", "north/far")[row % 3]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tile).save(home / f"tile_{row:02}.{('png', 'JPG')[row % 2]}", quality=95)
    return root


def ask_by_name(images: Iterator[str | Failure]) -> Iterator[Prediction | Failure]:
    "Answers without a model, for what is only about files."
    for image in images:
        yield image if isinstance(image, Failure) else ROW._replace(name=image)


def test_the_order_is_the_same_whatever_the_chunks_and_threads(model: Classifier, pictures: Path) -> None:
    names = list(find_images([pictures]))
    assert len(names) == 40 and names == sorted(names, key=lambda name: (Path(str(name)).parent, name))
    rows = list(predict_files(model, names, batch=32, workers=1))
    assert [row.name for row in rows] == names and all(isinstance(row, Prediction) for row in rows)
    for batch, workers in ((1, 4), (7, 2), (64, 3)):
        others = list(predict_files(model, find_images([pictures]), batch=batch, workers=workers))
        assert [row[:5] + tuple(row[6:]) for row in others] == [row[:5] + tuple(row[6:]) for row in rows]
        assert np.allclose([row[5] for row in others], [row[5] for row in rows], atol=2e-3)


def test_rows_say_what_the_classifier_says(model: Classifier, pictures: Path) -> None:
    (row,) = predict_files(model, [str(pictures / "tile_00.png")])
    answers = model.predict(np.asarray(Image.open(pictures / "tile_00.png"))[None])
    assert isinstance(row, Prediction) and row.label == answers.names[0]
    assert np.allclose(row.probabilities, answers.probabilities[0], atol=1e-6)
    assert (row.uncertain, row.unfamiliar) == (bool(answers.uncertain[0]), bool(answers.unfamiliar[0]))
    (averaged,) = predict_files(model, [row.name], averaging=True)
    assert averaged.probabilities != row.probabilities


def test_broken_files_do_not_stop_the_others(model: Classifier, pictures: Path, tmp_path: Path) -> None:
    good = (pictures / "tile_00.png").read_bytes()
    broken = {
        "empty.jpg": b"",
        "text.jpg": b"River, 2019",
        "cut.png": good[:-300],
        "noise.tif": np.random.default_rng(0).bytes(4000),
        "fat.png": good + bytes(1 << 24),
    }
    for name, content in broken.items() | {"good1.png": good, "good2.png": good}.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (96, 64)).save(tmp_path / "wide.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "notes.txt").write_text("left out")
    rows = {Path(row.name).name: row for row in predict_files(model, find_images([tmp_path]), batch=4)}
    assert {name for name, row in rows.items() if isinstance(row, Prediction)} == {"good1.png", "good2.png"}
    reasons = {name: row.reason for name, row in rows.items() if isinstance(row, Failure)}
    assert set(reasons) == {*broken, "wide.png", "gone.png", "self.png", "pipe.png"}
    assert all(reasons.values()) and not any(str(tmp_path) in reason for reason in reasons.values())
    (resized,) = predict_files(model, [str(tmp_path / "wide.png")], resize=True)
    assert isinstance(resized, Prediction)


def test_ordinary_pictures_of_another_size_are_scaled_unasked(model: Classifier, tmp_path: Path) -> None:
    Image.new("RGB", (96, 40), "red").save(tmp_path / "wide.png")
    assert isinstance(next(predict_files(model, [str(tmp_path / "wide.png")])), Failure)
    ordinary = replace(model, contract=replace(IMAGE_RGB, tile_size=64))
    (found,) = predict_files(ordinary, [str(tmp_path / "wide.png")])
    (same,) = predict_files(model, [str(tmp_path / "wide.png")], resize=True)
    assert found == same


def test_a_picture_that_vanished_is_a_row(model: Classifier) -> None:
    assert list(predict_files(model, ["no/such.png"])) == [Failure("no/such.png", "No such file or directory")]


def test_links_in_a_circle_end_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for folder in ("a", "b", ".hidden", "__MACOSX"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").touch()
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / ".x.png").touch()
    found = [os.path.relpath(str(name), tmp_path) for name in find_images([tmp_path])]
    assert found == ["a/x.png", "a/to_b/x.png"]
    assert len(list(find_images([tmp_path / "a" / "x.png", tmp_path / "a" / "x.png"]))) == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_read_is_reported(model: Classifier, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    good = (pictures / "tile_00.png").read_bytes()
    for name in ("closed/x.png", "open/secret.png", "open/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(good)
    monkeypatch.chdir(tmp_path)
    for path, mode in ((".", 0o755), ("closed", 0o000), ("open/secret.png", 0o000)):
        os.chmod(path, mode)
    os.seteuid(65534)
    try:
        rows = list(predict_files(model, find_images(["closed", "open"]), workers=1))
    finally:
        os.seteuid(0)
    assert rows[:2] == [Failure("closed", "Permission denied"), Failure("open/secret.png", "Permission denied")]
    assert isinstance(rows[2], Prediction)


def test_only_a_few_files_are_ahead_of_the_reader(model: Classifier, pictures: Path) -> None:
    taken, before = 0, set(threading.enumerate())
    name = str(pictures / "tile_00.png")

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield name

    rows = predict_files(model, endless(), batch=4, workers=2)
    for given in range(1, 200):
        next(rows)
        assert taken - given <= 4 * 6
    rows.close()
    assert set(threading.enumerate()) <= before, "no thread is left behind"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_is_bounded_for_many_files(bundle_folder: Path, pictures: Path) -> None:
    "Tens of thousands of rows take hardly more memory than a few."
    code = f"""
import itertools, re
from functools import partial
from pathlib import Path
from eurosat_mlops.files import Prediction, predict_files
from eurosat_mlops.predict import load_bundle
from eurosat_mlops.tables import predict_into
model = load_bundle({str(bundle_folder)!r})
def peak(count):
    names = itertools.islice(itertools.cycle([{str(pictures / "tile_00.png")!r}, *['gone.png'] * 24]), count)
    predict_into(Path('out.jsonl'), partial(predict_files, model), names, 'jsonl', model.bundle.classes, {{}}, reasons)
    return int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024
def written(count):
    row = ('River', 0.7, False, True, 3.25, [0.1, 0.7, 0.2, 0, 0, 0, 0, 0, 0, 0])
    ask = lambda names: (Prediction(name, *row[:5], list(row[5])) for name in names)
    names = (f'tile_{{number}}.png' for number in range(count))
    predict_into(Path('out.csv'), ask, names, 'csv', model.bundle.classes, {{}}, reasons)
with open('reasons', 'w+') as reasons:
    small = peak(2000)
    written(50_000)
    large = peak(20_000)
print(large - small)
assert large - small < 6 and large < 250, (small, large)
"""
    place = pictures.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def read_back(form: str, path: Path) -> list[dict]:
    if form == "csv":
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if form == "jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed; it is the parquet extra")
    return parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_every_format_is_read_back_equal(form: str, top: int, tmp_path: Path) -> None:
    rows = [ROW._replace(name=name, distance=index / 8) for index, name in enumerate(NAMES)]
    write_predictions(iter(rows), form, CLASSES, top, tmp_path / "out")
    found = read_back(form, tmp_path / "out")
    safe = [name.replace("\udcff", "\\udcff") for name in NAMES]
    if form == "csv":
        safe = ["'" + name if name[0] in "=+-@\r" else name for name in safe]
    assert [row["name"] for row in found] == safe
    for row, expected in zip(found, rows, strict=True):
        flags = [str(row[key]).lower() for key in ("uncertain", "unfamiliar")]
        assert row["label"] == "River" and flags == ["false", "true"]
        assert float(row["confidence"]) == 0.7 and float(row["distance"]) == expected.distance
        if form == "jsonl":
            best = {"River": 0.7, "SeaLake": 0.2}
            assert row["probabilities"] == (best if top else dict(zip(CLASSES, ROW.probabilities, strict=True)))
        elif top:
            assert row["label_2"] == "SeaLake" and float(row["confidence_2"]) == 0.2 and "p_River" not in row
        else:
            assert [float(row[f"p_{name}"]) for name in CLASSES] == ROW.probabilities


def test_a_table_has_a_line_a_picture_and_nothing_that_moves_the_cursor(tmp_path: Path) -> None:
    rows = [ROW._replace(name=name) for name in [*NAMES, "\x1b[2J.jpg"]]
    write_predictions(rows, "table", CLASSES, 3, tmp_path / "out")
    lines = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(rows) + 1 and all(line.isprintable() for line in lines)
    assert "unfamiliar" in lines[1] and "SeaLake" in lines[1] and "Forest" in lines[1]
    assert shown("a\n\x1b\udcffé") == r"a\n\x1b\udcffé"


@pytest.mark.parametrize("form", FORMATS)
def test_no_answers_make_an_empty_table(form: str, tmp_path: Path) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed; it is the parquet extra")
    write_predictions([], form, CLASSES, 0, tmp_path / "out")
    assert form == "table" or read_back(form, tmp_path / "out") == []


def into(out: Path, images: list[str], ask=ask_by_name, **options: object) -> tuple[Tally, str]:
    reasons = io.StringIO()
    return predict_into(out, ask, images, "csv", CLASSES, options, reasons), reasons.getvalue()


def touched(folder: Path, count: int) -> list[str]:
    names = [str(folder / f"{number:03}.png") for number in range(count)]
    for name in names:
        Path(name).touch()
    time.sleep(0.02)  # a file's time is that of the last tick
    return names


def stop_after(count: int, asked: list[str]):
    def ask(images: Iterator[str | Failure]) -> Iterator[Prediction | Failure]:
        for row in ask_by_name(images):
            if len(asked) == count:
                raise KeyboardInterrupt
            asked.append(row.name)
            yield row

    return ask


@pytest.mark.parametrize("cut", [0, 1, 30, 90, 10_000])
def test_a_run_cut_anywhere_goes_on_and_ends_as_if_it_had_not_been(cut: int, tmp_path: Path) -> None:
    names = touched(tmp_path, 20)
    into(tmp_path / "whole.csv", names)
    with pytest.raises(KeyboardInterrupt):
        into(tmp_path / "out.csv", names, stop_after(12, []))
    left = tmp_path / "out.csv.partial"
    left.write_bytes(left.read_bytes()[: -cut or None])
    tally, _ = into(tmp_path / "out.csv", names, stop_after(99, asked := []))
    assert tally == Tally(20, 0, 20 - len(asked)) and (len(asked) == 8) == (cut == 0)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes() and not left.exists()


def test_garbage_at_the_end_of_what_was_kept_costs_only_itself(tmp_path: Path) -> None:
    names = touched(tmp_path, 6)
    for garbage in (b"\0\0\0\0\n", b'["x"\n', b"{}\n", b'[1,2,3,4,5,6,7,8]\n["', b'"name"\n'):
        with pytest.raises(KeyboardInterrupt):
            into(tmp_path / "out.csv", names, stop_after(4, []))
        with open(tmp_path / "out.csv.partial", "ab") as file:
            file.write(garbage)
        assert into(tmp_path / "out.csv", names)[0] == Tally(6, 0, 4)


def test_a_folder_that_changed_is_answered_as_it_is_now(tmp_path: Path) -> None:
    names = touched(tmp_path, 6)
    with pytest.raises(KeyboardInterrupt):
        into(tmp_path / "out.csv", names, stop_after(4, []))
    assert into(tmp_path / "out.csv", names[1:])[0] == Tally(5, 0, 0)
    with pytest.raises(KeyboardInterrupt):
        into(tmp_path / "out.csv", names, stop_after(4, []))
    time.sleep(0.02)
    Path(names[2]).write_bytes(b"another picture under the same name")
    assert into(tmp_path / "out.csv", names)[0] == Tally(6, 0, 2)


def test_failures_of_the_killed_run_are_reported_too(tmp_path: Path) -> None:
    names = touched(tmp_path, 5)

    def ask(images: Iterator[str], stop: bool) -> Iterator[Prediction | Failure]:
        for row in ask_by_name(images):
            yield Failure(row.name, "bad") if row.name == names[1] else row
            if stop and row.name == names[3]:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        into(tmp_path / "out.csv", names, partial(ask, stop=True))
    tally, reasons = into(tmp_path / "out.csv", names, partial(ask, stop=False))
    assert tally == Tally(4, 1, 4) and reasons == f"{names[1]}: bad\n"


def test_other_options_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    names = touched(tmp_path, 5)
    with pytest.raises(KeyboardInterrupt):
        into(tmp_path / "out.csv", names, stop_after(3, []), bundle="a" * 64, average=False)
    before = (tmp_path / "out.csv.partial").read_bytes()
    for options in ({"bundle": "b" * 64, "average": False}, {"bundle": "a" * 64, "average": True}, {}):
        with pytest.raises(EurosatError, match=r"out\.csv\.partial.*(bundle|average).*delete the file"):
            into(tmp_path / "out.csv", names, **options)
    assert (tmp_path / "out.csv.partial").read_bytes() == before and not (tmp_path / "out.csv").exists()
    (tmp_path / "out.csv.partial").write_text("name,label\n")
    with pytest.raises(EurosatError, match="none of ours"):
        into(tmp_path / "out.csv", names)


def test_two_runs_at_once_do_not_write_one_file(tmp_path: Path) -> None:
    names = touched(tmp_path, 3)

    def ask(images: Iterator[str]) -> Iterator[Prediction | Failure]:
        with pytest.raises(EurosatError, match="another run is writing"):
            into(tmp_path / "out.csv", names)
        yield from ask_by_name(images)

    assert into(tmp_path / "out.csv", names, ask)[0].answered == 3


def test_where_the_file_goes(tmp_path: Path) -> None:
    names = touched(tmp_path, 2)
    assert into(tmp_path / "new" / "deep" / "out.csv", names)[0].answered == 2
    with pytest.raises(EurosatError, match="is a folder"):
        into(tmp_path, names)
    with pytest.raises(EurosatError, match=r"000\.png"):
        into(Path(names[0]) / "out.csv", names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.png", "001.png", "new"]


def test_a_full_disk_keeps_the_answers_so_far(tmp_path: Path) -> None:
    names = touched(tmp_path, 2000)
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_files import into
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
into(Path('out.csv'), sorted(map(str, Path({str(tmp_path)!r}).glob('*.png'))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "EurosatError" in done.stderr and "answers so far are kept" in done.stderr
    assert not (tmp_path / "out.csv").exists()
    tally, _ = into(tmp_path / "out.csv", names, stop_after(9999, []))
    assert tally.answered == 2000 and tally.kept > 100


def test_a_real_kill_9_loses_little_and_the_end_is_the_same(
    bundle_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    code = "import sys; from eurosat_mlops.cli import main; sys.exit(main())"
    words = ["predict", str(bundle_folder), *[str(pictures)] * 40, "--format", "csv", "--out"]
    command = [sys.executable, "-c", code, *words]
    subprocess.run([*command, str(tmp_path / "whole.csv")], check=True, capture_output=True)
    left = tmp_path / "out.csv.partial"
    running = subprocess.Popen([*command, str(tmp_path / "out.csv"), "--workers", "1"], stdout=subprocess.DEVNULL)
    while running.poll() is None and not (left.exists() and left.stat().st_size > 30_000):
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL and left.exists() and not (tmp_path / "out.csv").exists()
    subprocess.run([*command, str(tmp_path / "out.csv")], check=True, capture_output=True)

    def table(path: Path) -> list[list[str]]:  # the distance may differ in its last digits, by the size of a chunk
        with open(path, newline="") as file:
            return [row[:5] + row[6:] for row in csv.reader(file)]

    assert table(tmp_path / "out.csv") == table(tmp_path / "whole.csv") and len(table(tmp_path / "out.csv")) == 1601


def test_overlays_get_names_of_their_own(model: Classifier, tmp_path: Path) -> None:
    tiles = make_synthetic(per_class=3, seed=0).tiles[:3]
    names = ["a/River_1.jpg", "b/River_1.jpg", "\udcff/../ü\n.png"]
    write_overlays(model, tmp_path / "why", names, tiles)
    files = sorted((tmp_path / "why").iterdir())
    assert len(files) == 3 and all(file.name.isascii() and file.suffix == ".png" for file in files)
    assert Image.open(files[0]).size == (2 * 256 + 4, 256)
    calm = overlay(tiles[0], np.zeros((64, 64)))
    assert np.array_equal(np.asarray(calm)[:, :256], np.asarray(calm)[:, 260:]), "no part mattered"
    (tmp_path / "file").touch()
    with pytest.raises(EurosatError, match="overlay"):
        write_overlays(model, tmp_path / "file", names, tiles)
