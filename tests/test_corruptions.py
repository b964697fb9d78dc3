"""EuroSAT-C is the same for everybody, hurts more from strength to strength, and harms as air, sensor and files do."""

import numpy as np
import pytest

from eurosat_mlops.bands import IMAGE_RGB
from eurosat_mlops.core import EurosatError
from eurosat_mlops.corruptions import CORRUPTIONS, LEVELS, corrupt
from eurosat_mlops.data import TileRows
from eurosat_mlops.fetch import load_eurosat
from eurosat_mlops.synthetic import make_synthetic

TILES = make_synthetic(per_class=4, seed=1).tiles
KINDS = list(CORRUPTIONS)
STRENGTHS = range(1, 6)


def change(tiles: np.ndarray, clean: np.ndarray = TILES) -> float:
    return float(np.abs(tiles.astype(np.float32) - clean).mean())


def test_there_are_twelve_kinds_at_five_strengths():
    assert len(KINDS) == 12 and list(LEVELS) == KINDS
    assert {len(levels) for levels in LEVELS.values()} == {5}


@pytest.mark.parametrize("kind", KINDS)
class TestEachKind:
    def test_it_keeps_shape_and_type_and_leaves_the_tiles_it_was_given_alone(self, kind):
        before = TILES.copy()
        for size in (8, 33, 64):
            tiles = TILES[:3, :size, :size]
            done = corrupt(tiles, kind, 5)
            assert done.shape == tiles.shape and done.dtype == np.uint8 and not np.shares_memory(done, tiles)
        assert (before == TILES).all()
        assert corrupt(TILES[:0], kind, 1).shape == (0, 64, 64, 3)

    def test_it_hurts_more_from_strength_to_strength(self, kind):
        changes = [change(corrupt(TILES, kind, strength)) for strength in STRENGTHS]
        assert changes[0] > 0 and (np.diff(changes) > 0).all()

    def test_a_tile_is_harmed_alike_in_every_batch(self, kind):
        rows = np.array([31, 2, 17, 2])
        whole = corrupt(TILES, kind, 3, seed=5)
        assert (corrupt(TILES[rows], kind, 3, seed=5, rows=rows) == whole[rows]).all()
        assert (corrupt(TileRows(TILES, rows), kind, 3, 5, rows) == whole[rows]).all()
        assert (corrupt(np.repeat(TILES, 3, 0), kind, 3, 5, np.repeat(np.arange(40), 3))[::3] == whole).all()

    def test_chance_comes_from_seed_and_row(self, kind):
        twice = np.stack([TILES[12]] * 30)
        by_row, by_seed = corrupt(twice, kind, 4), corrupt(twice, kind, 4, seed=1)
        free = kind in ("saturation", "blur", "jpeg", "resampling")
        assert (by_row == by_row[0]).all() == free
        assert (by_row == by_seed).all() == free

    def test_extreme_tiles_stand_it(self, kind):
        for value in (0, 255):
            assert corrupt(np.full((2, 16, 16, 3), value, np.uint8), kind, 5).dtype == np.uint8


def test_the_set_does_not_change_unnoticed():
    "Means of tiles at strength 4: chance, order or levels that change would change every published figure."
    means = {kind: corrupt(TILES[::5], kind, 4, seed=3).mean(axis=(1, 2, 3))[:2].tolist() for kind in KINDS}
    assert {kind: pytest.approx(mean, abs=0.05) for kind, mean in EXPECTED.items()} == means


EXPECTED = {
    "haze": [147.72, 144.87],
    "thin_cloud": [130.05, 168.72],
    "shadow": [59.85, 60.04],
    "stripes": [87.88, 75.85],
    "saturation": [155.86, 135.03],
    "blur": [86.97, 75.47],
    "misregistration": [86.62, 75.12],
    "jpeg": [87.01, 74.99],
    "noise": [87.23, 75.47],
    "brightness": [120.43, 59.74],
    "season": [84.99, 75.46],
    "resampling": [87.29, 75.72],
}


def test_haze_is_blue_and_takes_contrast():
    pair = [corrupt(np.full((4, 32, 32, 3), value, np.uint8), "haze", 3).astype(np.float32) for value in (20, 120)]
    left = (pair[1] - pair[0]).mean((0, 1, 2)) / 100
    assert left[0] > left[1] > left[2]
    added = pair[0].mean((0, 1, 2)) - 20
    assert added[2] > added[1] > added[0] > 0


def test_clouds_are_white_and_only_brighten_what_is_dark():
    done = corrupt(np.full((20, 64, 64, 3), 60, np.uint8), "thin_cloud", 5)
    assert (done >= 60).all() and np.ptp(done.astype(int), axis=-1).max() <= 1
    assert done.reshape(20, -1).std(1).mean() > 20, "patches, not a veil"


def test_a_shadow_darkens_red_most_and_never_brightens():
    done = corrupt(TILES, "shadow", 5)
    assert (done <= TILES).all()
    kept = done.mean((0, 1, 2)) / TILES.mean((0, 1, 2))
    assert kept[0] < kept[1] < kept[2]


def test_stripes_run_from_top_to_bottom():
    flat = np.full((10, 64, 64, 3), 100, np.uint8)
    done = corrupt(flat, "stripes", 4)
    assert (done == done[:, :1]).all() and done[:, 0].std() > 5


def test_misregistration_leaves_green_and_moves_the_others_by_parts_of_a_pixel():
    done = corrupt(TILES, "misregistration", 1)
    assert (done[..., 1] == TILES[..., 1]).all()
    assert (done[..., 0] != TILES[..., 0]).any() and (done[..., 2] != TILES[..., 2]).any()
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, None, :, None] * 3 + 20, (30, 64, 64, 3)).copy()
    moved = corrupt(ramp, "misregistration", 5)[:, 32, 32].astype(int) - ramp[:, 32, 32]
    assert np.abs(moved).max() <= 10 and np.abs(moved[:, [0, 2]]).max() >= 8, "3 px at most, of 3 bytes each"


def test_noise_grows_with_the_light():
    deviation = [corrupt(np.full((4, 64, 64, 3), v, np.uint8), "noise", 3).std() for v in (40, 100, 200)]
    assert deviation == sorted(deviation) and deviation[1] == pytest.approx(LEVELS["noise"][2], rel=0.03)


def test_brightness_goes_both_ways_and_the_air_stays():
    done = corrupt(TILES, "brightness", 4).astype(int) - TILES
    way = np.sign(done.mean((1, 2, 3)))
    assert set(way) == {-1, 1}
    assert (corrupt(np.full((4, 8, 8, 3), 10, np.uint8), "brightness", 5) == 10).all(), "darker than air alone"


def test_seasons_turn_plants_and_soil_and_leave_water_and_roofs():
    leaf, soil, sea, roof = np.array([[50, 96, 86], [182, 150, 136], [22, 41, 67], [180, 196, 219]], np.uint8)
    field = np.full((20, 16, 16, 3), leaf)
    field[:, 8:] = soil
    turned = (corrupt(field, "season", 4) != field).any(-1)
    autumn, spring = turned[:, 0, 0], turned[:, 15, 0]
    assert 0 < autumn.sum() < 20 and (autumn ^ spring).all(), "one or the other"
    for still in (sea, roof):
        tiles = np.full((20, 16, 16, 3), still)
        assert change(corrupt(tiles, "season", 5), tiles) < 1


def test_resampled_tiles_have_fewer_pixels():
    done = corrupt(TILES, "resampling", 2)  # 20 m
    assert (done[:, ::2, ::2] == done[:, 1::2, 1::2]).all()


@pytest.mark.parametrize(
    "tiles, kind, strength, said",
    [
        (TILES, "rain", 1, "kind: got 'rain', expected one of haze"),
        (TILES, "haze", 0, "strength: got 0, expected a whole number from 1 to 5"),
        (TILES, "haze", 6, "strength: got 6"),
        (TILES, "haze", 1.5, "strength: got 1.5"),
        (TILES, "haze", True, "strength: got True"),
        (TILES[..., :1], "haze", 1, "red, green and blue"),
        (TILES[:, :, :32], "blur", 1, "expected uint8"),
        (TILES[:, :4, :4], "blur", 1, "8 px or more"),
        (TILES[0], "blur", 1, "expected uint8"),
        (TILES.astype(np.uint16), "blur", 1, "got uint16"),
    ],
)
def test_what_is_no_corruption_of_tiles_is_refused(tiles, kind, strength, said):
    with pytest.raises(EurosatError, match=said):
        corrupt(tiles, kind, strength)


def test_rows_must_fit_and_seeds_be_whole():
    with pytest.raises(EurosatError, match="rows"):
        corrupt(TILES, "haze", 1, rows=np.arange(3))
    with pytest.raises(EurosatError, match="seed"):
        corrupt(TILES, "haze", 1, seed=-1)


def test_ordinary_pictures_are_harmed_too():
    assert IMAGE_RGB.tile_size == 64
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert all(change(corrupt(pictures, kind, 3), pictures) > 0 for kind in KINDS)


def test_real_tiles_are_hurt_more_from_strength_to_strength(eurosat_settings):
    tileset = load_eurosat(eurosat_settings, "random")
    rows = tileset.parts["val"][::54]
    tiles = tileset.tiles[rows]
    for kind in KINDS:
        changes = [change(corrupt(tiles, kind, strength, rows=rows), tiles) for strength in STRENGTHS]
        assert changes[0] > 0 and (np.diff(changes) > 0).all(), kind
