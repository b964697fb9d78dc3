"Synthetic tiles: the same for the same seed, different otherwise, balanced, and not to be told apart by colour alone."

import hashlib

import numpy as np
import pytest

from eurosat_mlops.bands import EUROSAT_RGB, check_tiles
from eurosat_mlops.core import EurosatError
from eurosat_mlops.data import EUROSAT_CLASSES, TileSet
from eurosat_mlops.synthetic import make_synthetic, paint_tile


@pytest.fixture(scope="module")
def tileset() -> TileSet:
    return make_synthetic(per_class=100)


def test_a_set_is_what_the_other_rooms_expect(tileset):
    check_tiles(tileset.tiles, EUROSAT_RGB)
    assert (tileset.name, tileset.split, tileset.classes) == ("synthetic", "stratified", EUROSAT_CLASSES)
    assert tileset.contract == EUROSAT_RGB
    assert tileset.labels.dtype == np.int64
    assert tileset.tiles.min() > 0, "0 means no data"
    for name, label in zip(tileset.names, tileset.labels, strict=True):
        assert name.split("_")[0] == EUROSAT_CLASSES[label]
    assert tileset.names[0] == "AnnualCrop_1.png"
    assert len(set(tileset.names)) == 1000


def test_the_same_arguments_give_the_same_bytes(tileset):
    again = make_synthetic(per_class=100)
    assert again.tiles.tobytes() == tileset.tiles.tobytes()
    assert again.digest == tileset.digest
    assert all((again.parts[part] == rows).all() for part, rows in tileset.parts.items())


def test_a_tile_depends_on_neither_the_number_of_tiles_nor_numpys_global_state(tileset):
    np.random.seed(1)  # noqa: NPY002
    few = make_synthetic(per_class=5)
    for name, tile in zip(few.names, few.tiles, strict=True):
        assert (tileset.tiles[tileset.names.index(name)] == tile).all()
    assert (paint_tile("River", 5) == tileset.tiles[tileset.names.index("River_5.png")]).all()


def test_another_seed_gives_other_tiles():
    first, second = make_synthetic(per_class=20, seed=0), make_synthetic(per_class=20, seed=1)
    assert first.digest != second.digest
    assert not {tile.tobytes() for tile in first.tiles} & {tile.tobytes() for tile in second.tiles}


def test_no_tile_comes_twice(tileset):
    assert len({tile.tobytes() for tile in tileset.tiles}) == len(tileset.tiles)


def test_the_digest_is_over_the_pixels_and_the_names():
    tileset = make_synthetic(per_class=3, size=16)
    lines = sorted(
        (name, hashlib.sha256(tile.tobytes()).hexdigest())
        for name, tile in zip(tileset.names, tileset.tiles, strict=True)
    )
    assert tileset.digest == hashlib.sha256("".join(f"{key}  {name}\n" for name, key in lines).encode()).hexdigest()


@pytest.mark.parametrize("per_class", [3, 10, 100])
def test_classes_are_balanced_in_every_part(per_class):
    tileset = make_synthetic(per_class=per_class, size=16)
    assert sorted(np.concatenate(list(tileset.parts.values()))) == list(range(10 * per_class))
    for part in tileset.parts:
        counts = np.bincount(tileset.part(part)[1], minlength=10)
        assert counts.min() == counts.max() > 0
    if per_class >= 10:
        assert len(tileset.parts["train"]) == 6 * per_class


def logistic_regression(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    "Classes predicted by multinomial logistic regression on standardised features, fitted by gradient descent."
    centre, spread = x.mean(0), x.std(0)
    x, x_test = (np.c_[(a - centre) / spread, np.ones(len(a))] for a in (x, x_test))
    weights = np.zeros((x.shape[1], 10))
    for _ in range(2000):
        scores = np.exp(x @ weights)
        weights -= x.T @ (scores / scores.sum(1, keepdims=True) - np.eye(10)[y]) / len(x)
    return (x_test @ weights).argmax(1)


@pytest.mark.parametrize("seed", [0, 1])
def test_mean_colours_alone_do_not_tell_the_classes_apart(seed):
    tileset = make_synthetic(per_class=100, seed=seed)
    (tiles, y), (tiles_test, y_test) = tileset.part("train"), tileset.part("test")
    said = logistic_regression(tiles[:].mean((1, 2)), y, tiles_test[:].mean((1, 2)))
    assert 0.2 < (said == y_test).mean() < 0.7


def test_texture_and_colour_tell_much_more_than_colour(tileset):
    "The classes can be learnt: a few hand-made measures of texture already beat the means by far."

    def measures(tiles):
        pixels = tiles.astype(np.float32)
        steps = [np.abs(np.diff(pixels, axis=axis)).mean((1, 2)) for axis in (1, 2)]
        wide = np.abs(pixels[:, 8:] - pixels[:, :-8]).mean((1, 2))
        return np.log(np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2)), *steps, wide], axis=1))

    (tiles, y), (tiles_test, y_test) = tileset.part("train"), tileset.part("test")
    by_colour = (logistic_regression(tiles[:].mean((1, 2)), y, tiles_test[:].mean((1, 2))) == y_test).mean()
    by_texture = (logistic_regression(measures(tiles[:]), y, measures(tiles_test[:])) == y_test).mean()
    assert by_texture > by_colour + 0.2


@pytest.mark.parametrize("size", [16, 33, 512])
def test_sizes_at_the_limits(size):
    tileset = make_synthetic(per_class=3, size=size)
    assert tileset.tiles.shape == (30, size, size, 3)
    check_tiles(tileset.tiles, tileset.contract)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"per_class": 2}, "per_class"),
        ({"per_class": 0}, "per_class"),
        ({"per_class": 3.0}, "per_class"),
        ({"per_class": True}, "per_class"),
        ({"size": 15}, "size"),
        ({"size": 513}, "size"),
        ({"size": "64"}, "size"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(arguments, name):
    with pytest.raises(EurosatError, match=rf"^{name}: got .*, expected a whole number from \d+ to \d+$"):
        make_synthetic(**arguments)


def test_an_unknown_class_is_refused_with_the_classes_there_are():
    with pytest.raises(EurosatError, match=r"got 'Desert', expected one of AnnualCrop, .*SeaLake$"):
        paint_tile("Desert", 1)
