"""The input contract and the way between digital numbers and bytes."""

import numpy as np
import pytest

from eurosat_mlops.bands import (
    EUROSAT_RGB,
    IMAGE_RGB,
    InputContract,
    check_tiles,
    contract_from_dict,
    contract_to_dict,
    to_digital_numbers,
    to_reflectance_bytes,
)
from eurosat_mlops.core import EurosatError


@pytest.mark.parametrize("offset", [0, -1000])
def test_every_byte_comes_back_from_its_digital_number(offset):
    tile = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (1, 1, 3))
    dn = to_digital_numbers(tile, EUROSAT_RGB, offset)
    assert (to_reflectance_bytes(dn.transpose(2, 0, 1), EUROSAT_RGB, offset).transpose(1, 2, 0) == tile).all()


def test_the_scale_is_that_of_eurosat():
    dn = np.array([1, 1375, 2750, 65535], np.uint16).reshape(1, 1, 4).repeat(3, 0)
    assert to_reflectance_bytes(dn, EUROSAT_RGB, 0)[0, 0].tolist() == [1, 128, 255, 255]


def test_a_measured_pixel_is_never_nodata_and_nodata_stays():
    dn = np.array([0, 1, 900], np.uint16).reshape(1, 1, 3).repeat(3, 0)
    assert to_reflectance_bytes(dn, EUROSAT_RGB, -1000)[0, 0].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "dn, contract, word",
    [
        (np.zeros((2, 4, 4), np.uint16), EUROSAT_RGB, "shape"),
        (np.zeros((4, 4), np.uint16), EUROSAT_RGB, "shape"),
        (np.zeros((3, 4, 4), np.float32), EUROSAT_RGB, "integer"),
        (np.zeros((3, 4, 4), np.uint16), IMAGE_RGB, "pictures"),
    ],
)
def test_what_is_no_scene_in_the_contract_is_refused(dn, contract, word):
    with pytest.raises(EurosatError, match=word):
        to_reflectance_bytes(dn, contract, 0)


def test_contract_through_json_and_back():
    for contract in (EUROSAT_RGB, IMAGE_RGB):
        assert contract_from_dict(contract_to_dict(contract)) == contract
    for broken in ({}, contract_to_dict(EUROSAT_RGB) | {"extra": 1}):
        with pytest.raises(EurosatError, match="fields differ"):
            contract_from_dict(broken)


@pytest.mark.parametrize("bad", [{"level": "L3"}, {"hi": 0}, {"bands": ()}, {"tile_size": 0}])
def test_an_impossible_contract_is_refused(bad):
    with pytest.raises(EurosatError, match="contract"):
        InputContract(**{"bands": ("B04",), "level": "L1C", "lo": 0, "hi": 2750, **bad})


def test_only_batches_of_tiles_pass():
    check_tiles(np.zeros((0, 64, 64, 3), np.uint8), EUROSAT_RGB)
    for bad in (np.zeros((1, 3, 64, 64), np.uint8), np.zeros((64, 64, 3), np.uint8), np.zeros((1, 64, 64, 3))):
        with pytest.raises(EurosatError, match="tiles"):
            check_tiles(bad, EUROSAT_RGB)
