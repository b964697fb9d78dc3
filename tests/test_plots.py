"Plots: each picture holds the right content, nothing is clipped or overlaps, for 2, 10 and 20 classes and long names."

import io
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'eurosat-mlops[train]'")
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from eurosat_mlops import plots
from eurosat_mlops.bands import EUROSAT_RGB, LAND_COVER_COLOURS, class_colours
from eurosat_mlops.core import EurosatError
from eurosat_mlops.data import EUROSAT_CLASSES, TileSet
from eurosat_mlops.metrics import (
    binary_figures,
    classification_report,
    confusion_matrix,
    most_confident_mistakes,
    softmax,
)

LONG = tuple(f"Discontinuous urban fabric with gardens {k:02d}" for k in range(20))
ODD = tuple(sorted(("100$ of $bill_{", "猫猫", "Ελιά", "قطة", "x_1^2", "unbroken_" * 9)))
HUNDRED = tuple(f"class number {k:03d}" for k in range(94)) + ODD
CLASSES = [EUROSAT_CLASSES, ("cloud", "clear"), LONG, ODD, HUNDRED[:47], HUNDRED]


def tile_set(classes: tuple[str, ...], per_class: int = 10) -> TileSet:
    n = per_class * len(classes)
    rows = np.arange(n)
    return TileSet(
        name="some",
        split="stratified",
        tiles=np.random.default_rng(0).integers(0, 255, (n, 16, 16, 3), dtype=np.uint8),
        labels=rows // per_class,
        names=tuple(f"{k}.png" for k in rows),
        classes=classes,
        parts={"train": rows[rows % 5 < 3], "val": rows[rows % 5 == 3], "test": rows[rows % 5 == 4]},
        digest="0" * 64,
        contract=EUROSAT_RGB,
    )


def predictions(k: int, n: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % k
    return 3 * np.eye(k)[y] + rng.normal(0, 1.5, (n, k)), y


def hidden_ticks(axes: Axes) -> list[Text]:
    "Labels of ticks beyond the limits of the axes, which matplotlib keeps but does not draw."
    (x0, x1), (y0, y1) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    beyond_x = [t for t in axes.get_xticklabels() if not x0 <= t.get_position()[0] <= x1]
    return beyond_x + [t for t in axes.get_yticklabels() if not y0 <= t.get_position()[1] <= y1]


def check_layout(figure: Figure) -> None:
    "Every visible text lies inside the figure, and no two labels of one axis overlap."
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    frame = figure.bbox.padded(1)
    hidden = {id(t) for axes in figure.axes for t in hidden_ticks(axes)}
    off = {id(t) for axes in figure.axes if not axes.axison for t in (*axes.get_xticklabels(), *axes.get_yticklabels())}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden | off:
            box = text.get_window_extent(renderer)
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text
            assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text
    for axes in figure.axes:
        for labels in (axes.get_yticklabels(), axes.get_xticklabels()):
            shown = [t for t in labels if t.get_text() and id(t) not in hidden | off and not t.get_rotation()]
            boxes = [t.get_window_extent(renderer) for t in shown]
            assert not any(a.overlaps(b) for a, b in pairwise(boxes)), [t.get_text() for t in shown]
        assert axes.bbox.width > figure.bbox.width * 0.15, "no room left for the data"


def title(figure: Figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def y_names(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize("classes", CLASSES, ids=["10", "2", "20 long", "odd", "47", "100"])
def test_every_picture_fits_its_frame(classes):
    k, tiles = len(classes), tile_set(classes)
    logits, y = predictions(k, 10 * k)
    p, said = softmax(logits), logits.argmax(1)
    history = [
        {"epoch": e, "train_loss": 2.3, "valid_loss": 1 / e, "accuracy": 0.9987, "lr": 1e-5 * e} for e in range(1, 101)
    ]
    for figure in (
        plots.plot_sheet(*tiles.part("train"), classes, 5),
        plots.plot_balance(tiles),
        plots.plot_band_statistics(*tiles.part("train"), classes),
        plots.plot_history(history),
        plots.plot_history(history[:1]),
        plots.plot_confusion(confusion_matrix(y, said, k) * 300, classes),
        plots.plot_per_class(classification_report(logits, y, classes, 1.0)),
        plots.plot_mistakes(tiles.tiles, y, p, classes, most_confident_mistakes(p, y, 11)),
        plots.plot_mistakes(tiles.tiles, y, p, classes, most_confident_mistakes(p, y, 1)),
        plots.plot_reliability(p, softmax(logits * 2), y),
    ):
        check_layout(figure)


def test_sheet_shows_the_tiles_of_each_class_in_its_row():
    tiles = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (10, 90, 200)])
    figure = plots.plot_sheet(tiles, np.array([0, 2, 0]), ("a", "b", "c"), per_class=3)
    sheet = figure.axes[0].images[0].get_array()
    assert y_names(figure) == ["a", "b", "c"]
    assert [sheet[17 * row + 5, 17 * column + 5, 0] for row, column in ((0, 0), (0, 1), (1, 0), (2, 0))] == [
        10,
        200,
        255,
        90,
    ]


def test_balance_has_the_counts_and_the_largest_class_first():
    tiles = tile_set(("a", "b", "c"))
    labels = tiles.labels.copy()
    labels[:6] = 2
    figure = plots.plot_balance(TileSet(**{**vars(tiles), "labels": labels}))
    assert y_names(figure) == ["c", "b", "a"]
    assert [t.get_text().strip() for t in figure.axes[0].texts] == ["16", "10", "4"]
    assert title(figure) == "some: 30 tiles, from 4 (a) to 16 (c) tiles a class"
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["train 18", "val 6", "test 6"]


def test_band_statistics_rank_by_brightness_and_leave_out_absent_classes():
    tiles = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (200, 200, 10, 10)])
    figure = plots.plot_band_statistics(tiles, np.array([0, 0, 2, 2]), ("snow", "none", "sea"))
    assert y_names(figure) == ["sea", "snow"]
    assert title(figure) == "sea is the darkest class, snow the brightest"
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[10, 200]] * 3


def test_history_names_the_best_epoch():
    history = [
        {"epoch": e, "train_loss": 1.0, "valid_loss": 1.0, "accuracy": a, "lr": 0.1}
        for e, a in ((1, 0.5), (2, 0.75), (3, 0.7))
    ]
    figure = plots.plot_history(history)
    assert len(figure.axes) == 3
    assert title(figure) == "Validation accuracy reaches 75.0% in epoch 2 of 3"
    with pytest.raises(EurosatError, match="no epoch"):
        plots.plot_history([])


def test_confusion_writes_counts_and_leaves_zeros_silent():
    figure = plots.plot_confusion(np.array([[50, 0, 2], [0, 0, 0], [7, 0, 41]]), ("a", "b", "c"))
    assert sorted(t.get_text() for t in figure.axes[0].texts) == ["2", "41", "50", "7"]
    assert title(figure) == "91.0% of 100 tiles right; most often c is taken for a (7)"
    assert y_names(figure) == [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]
    assert title(plots.plot_confusion(np.diag([3, 4]), ("a", "b"))) == "100.0% of 7 tiles right"
    check_layout(plots.plot_confusion(np.zeros((2, 2), int), ("a", "b")))


def test_per_class_is_sorted_and_names_absent_classes():
    logits = np.eye(4)[[0, 0, 1, 1, 1, 2]] * 9.0
    report = classification_report(logits, np.array([0, 0, 1, 1, 0, 2]), ("a", "b", "c", "gone"), 1.0)
    figure = plots.plot_per_class(report)
    assert y_names(figure) == ["a (3)", "b (2)", "c (1)"]
    assert title(figure).startswith("Recall is lowest for a: 66.7%")
    assert "no tile of gone" in figure.axes[0].get_xlabel().replace("\n", " ")
    perfect = classification_report(np.eye(2) * 9, np.array([0, 1]), ("a", "b"), 1.0)
    assert title(plots.plot_per_class(perfect)) == "Every tile of every class is found"


def test_a_hundred_classes_leave_a_picture_readable():
    tiles, (logits, y) = tile_set(HUNDRED, 3), predictions(100, 4000)
    matrix = confusion_matrix(y, logits.argmax(1), 100)
    matrix[3, 7] = 30
    shown = {
        "sheet": plots.plot_sheet(tiles.tiles, tiles.labels, HUNDRED),
        "balance": plots.plot_balance(tiles),
        "pairs": plots.plot_confusion(matrix, HUNDRED),
        "recall": plots.plot_per_class(classification_report(logits, y, HUNDRED, 1.0)),
    }
    for figure in shown.values():
        assert len(y_names(figure)) <= plots.MANY and figure.get_figheight() < 15
    assert y_names(shown["pairs"])[0] == "class number 003 as class number 007"
    assert shown["pairs"].axes[0].texts[0].get_text().strip() == f"30 ({30 / matrix[3].sum():.0%})"
    assert title(shown["sheet"]) == "The first tiles of 25 of 100 classes"
    assert "of 100 classes" in shown["balance"].axes[0].get_xlabel()
    assert "the lowest 25 of 100 classes" in shown["recall"].axes[0].get_xlabel().replace("\n", " ")
    assert not y_names(plots.plot_confusion(np.diag(np.full(100, 9)), HUNDRED))


def test_the_balance_of_many_classes_shows_the_largest_and_the_smallest():
    tiles = tile_set(HUNDRED, 2)
    labels = np.repeat(np.arange(100), np.append(101, np.ones(99, int)))
    figure = plots.plot_balance(TileSet(**{**vars(tiles), "labels": labels}))
    assert y_names(figure)[0] == HUNDRED[0] and len(y_names(figure)) == 24
    assert [t.get_text().strip() for t in figure.axes[0].texts] == ["101"] + ["1"] * 23


@pytest.mark.parametrize("size", [16, 32, 512])
def test_tiles_of_any_size_make_a_sheet_of_the_same_size(size):
    tiles = np.stack([np.full((size, size, 3), value, np.uint8) for value in (10, 90, 200)])
    figure = plots.plot_sheet(tiles, np.arange(3), ("a", "b", "c"), 2)
    sheet = figure.axes[0].images[0].get_array()
    assert sheet.shape[0] < 3 * 140 and sheet[5, 5, 0] == 10 and sheet[-10, 5, 0] == 200
    assert figure.get_size_inches() == pytest.approx([3, 2.15], abs=0.1)


def test_a_long_name_is_cut_in_the_middle_by_the_room_it_takes():
    assert plots.shorten("River") == "River" and plots.shorten("猫" * 6) == "猫" * 6
    assert plots.shorten("ab" * 30) == "ab" * 6 + "…" + ("ab" * 30)[-11:]
    assert plots.shorten("猫" * 30) == "猫" * 6 + "…" + "猫" * 5


def test_a_class_has_one_colour_in_every_picture():
    report = classification_report(np.array([[9.0, 0], [9, 0], [0, 9]]), np.array([0, 1, 1]), ("FAKE", "REAL"), 1.0)
    figure = plots.plot_per_class(report)
    assert y_names(figure) == ["REAL (2)", "FAKE (1)"]
    colours = [
        tuple(round(255 * part) for part in colour[:3]) for colour in figure.axes[0].collections[1].get_facecolor()
    ]
    assert colours == [tuple(bytes.fromhex(code[1:])) for code in class_colours(("FAKE", "REAL"))[::-1]]


def test_ranking_marks_a_half_and_the_chosen_threshold():
    scores, positive = np.array([0.1, 0.3, 0.4, 0.45, 0.7, 0.9]), np.array([0, 0, 1, 0, 1, 1], dtype=bool)
    p = np.stack([1 - scores, scores], 1)
    report = binary_figures(p, positive.astype(int), ("fake", "real"), threshold=0.35)
    figure = plots.plot_ranking(scores, positive, report)
    check_layout(figure)
    roc, recall = figure.axes
    marks = [[float(v[0]) for v in line.get_data()] for line in (*roc.lines[2:], *recall.lines[2:])]
    assert np.allclose(marks, [[0, 2 / 3], [1 / 3, 1], [2 / 3, 1], [1, 3 / 4]])
    assert title(figure) == "real is the positive class: AUROC 0.889, average precision 0.917"
    nothing = binary_figures(p / 3 + np.array([2 / 3, 0]), positive.astype(int), ("fake", "real"))
    check_layout(plots.plot_ranking(scores / 3, positive, nothing))  # from 0.5 on there is no tile, so no precision


def test_mistakes_show_label_prediction_and_probability():
    p = np.array([[0.25, 0.75], [0.1, 0.9], [0.2, 0.8]])
    y = np.array([0, 1, 0])
    figure = plots.plot_mistakes(
        np.zeros((3, 8, 8, 3), np.uint8), y, p, ("sea", "land"), most_confident_mistakes(p, y, 5)
    )
    assert [a.get_title() for a in figure.axes] == ["sea", "sea"]
    assert [a.texts[0].get_text() for a in figure.axes] == ["land\n80.0%", "land\n75.0%"]
    assert title(plots.plot_mistakes(np.zeros((3, 8, 8, 3)), y, p, ("sea", "land"), np.array([], int))).startswith(
        "No mistake"
    )


def test_reliability_has_errors_and_counts():
    p = np.array([[0.9, 0.1]] * 10)
    figure = plots.plot_reliability(p, np.array([[0.5, 0.5]] * 10), np.array([0] * 5 + [1] * 5))
    assert len(figure.axes) == 4
    assert title(figure) == "With the temperature the calibration error falls from 40.0% to 0.0%"
    assert [a.get_title(loc="left") for a in figure.axes[:2]] == ["before: ECE 40.0%", "after: ECE 0.0%"]
    assert [bar.get_height() for bar in figure.axes[2].patches] == [10]


@pytest.mark.parametrize(
    "call",
    [
        lambda: plots.plot_confusion(np.eye(3, dtype=int), ("a", "b")),
        lambda: plots.plot_mistakes(
            np.zeros((1, 8, 8, 3)), np.array([0]), np.array([[0.1, 0.9]]), ("a",), np.array([0])
        ),
    ],
)
def test_names_that_do_not_fit_are_refused(call):
    with pytest.raises(EurosatError, match="expected one name for each"):
        call()


def test_a_picture_is_small_white_and_leaves_pyplot_alone():
    figure = plots.plot_sheet(*tile_set(EUROSAT_CLASSES).part("train"), EUROSAT_CLASSES)
    png = figure._repr_png_()
    assert png == plots.plot_sheet(*tile_set(EUROSAT_CLASSES).part("train"), EUROSAT_CLASSES)._repr_png_()
    assert len(png) < 120_000
    assert Image.open(io.BytesIO(png)).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


def test_colours_of_other_classes_do_not_change_those_of_land_cover():
    colours = class_colours(("Forest", "Vineyard", "River", "Rice"))
    assert colours[0] == LAND_COVER_COLOURS["Forest"] and colours[2] == LAND_COVER_COLOURS["River"]
    assert colours[1] != colours[3]
    assert set(LAND_COVER_COLOURS) == set(EUROSAT_CLASSES)


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]


@pytest.mark.parametrize("sight", [np.eye(3), DEUTERANOPIA, PROTANOPIA], ids=["full", "deuteranopia", "protanopia"])
def test_land_cover_colours_stay_apart_for_colour_blind_readers(sight):
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in LAND_COVER_COLOURS.values()])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = np.clip(linear @ np.array(sight).T, 0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(len(lab), 1)]
    assert apart.min() > 18  # CIELAB; about 2 is just noticeable
