"""Whole scenes: products in every wrapping, maps against ground truth, blocks, kills, odd sizes, files for others."""

import asyncio
import csv
import json
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio", reason="the extra scene is not installed")

from onnx import TensorProto, helper  # noqa: E402

from eurosat_mlops.bands import EUROSAT_RGB, to_digital_numbers  # noqa: E402
from eurosat_mlops.blocks import MapSettings, answer_scene  # noqa: E402
from eurosat_mlops.bundle import Bundle  # noqa: E402
from eurosat_mlops.change import CHANGED, SAME, compare_maps, read_map, write_change  # noqa: E402
from eurosat_mlops.core import EurosatError, Settings  # noqa: E402
from eurosat_mlops.data import EUROSAT_CLASSES, decode_image, split_list  # noqa: E402
from eurosat_mlops.mapper import FinishedMap, Outputs, map_scene  # noqa: E402
from eurosat_mlops.maps import area_table  # noqa: E402
from eurosat_mlops.mosaics import cells_right, lay_tiles, write_large_scene, write_scene  # noqa: E402
from eurosat_mlops.predict import Classifier, load_bundle  # noqa: E402
from eurosat_mlops.products import Declared, open_scene  # noqa: E402
from eurosat_mlops.scene import BlockReader  # noqa: E402
from eurosat_mlops.session import open_session  # noqa: E402
from eurosat_mlops.synthetic import make_synthetic  # noqa: E402

BANDS = EUROSAT_RGB.bands


@pytest.fixture(scope="module")
def model() -> Classifier:
    "The mean colour is the embedding, and the brightest channel names the class."
    nodes = [
        helper.make_node("Cast", ["tiles"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["embedding"], keepdims=0),
        helper.make_node("Mul", ["embedding", "sharpness"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("sharpness", TensorProto.FLOAT, [], [0.1]),
    ]
    tiles = helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", 64, 64, 3])
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in ("probabilities", "embedding")]
    graph = helper.make_graph(nodes, "colours", [tiles], outputs, constants)
    graph = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    info = {"classes": ["Soil", "Grass", "Water"], "limits": {"confidence": 0.7, "distance": 0.5}}
    bundle = Bundle(Path(), "0" * 64, info, {})
    return Classifier(bundle, "fp32", EUROSAT_RGB, open_session(graph), np.eye(3), np.eye(3))


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    return make_synthetic(8, seed=4).tiles


def assert_same(one: FinishedMap, other: FinishedMap) -> None:
    assert np.array_equal(one.cover.labels, other.cover.labels)
    assert np.array_equal(one.cover.probabilities, other.cover.probabilities, equal_nan=True)
    assert np.array_equal(one.cover.valid, other.cover.valid)


# products ------------------------------------------------------------------------------------------------------------


def write_band(path: Path, band: np.ndarray, driver: str = "GTiff", **more: object) -> None:
    place = {"crs": "EPSG:32633", "transform": rasterio.transform.from_origin(4e5, 5e6, 10, 10)} | more
    options = {"QUALITY": "100", "REVERSIBLE": "YES"} if driver == "JP2OpenJPEG" else {}
    size = {"height": band.shape[0], "width": band.shape[1], "count": 1, "dtype": band.dtype}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver=driver, **size, **place, **options) as file:
        file.write(band, 1)


def write_safe(folder: Path, numbers: dict[str, np.ndarray], offsets: dict[str, int] | None, level: str) -> Path:
    "A SAFE folder with what matters of its metadata."
    names = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
    field = {"1C": "RADIO_ADD_OFFSET", "2A": "BOA_ADD_OFFSET"}[level]
    units = {"1C": "QUANTIFICATION_VALUE", "2A": "BOA_QUANTIFICATION_VALUE"}[level]
    images = []
    for name, band in numbers.items():
        images.append(f"GRANULE/L{level}_T33/IMG_DATA/T33TUL_20230101T100000_{name}" + "_10m" * (level == "2A"))
        write_band(folder / f"{images[-1]}.jp2", band, "JP2OpenJPEG")
    listed = "".join(f'<{field} band_id="{names.index(b)}">{v}</{field}>' for b, v in (offsets or {}).items())
    files = "".join(f"<IMAGE_FILE>{image}</IMAGE_FILE>" for image in images)
    text = f"<PROCESSING_LEVEL>Level-{level}</PROCESSING_LEVEL>{files}<{units}>10000</{units}>{listed}"
    (folder / f"MTD_MSIL{level}.xml").write_text(f'<?xml version="1.0"?><n1:P xmlns:n1="x">{text}</n1:P>')
    return folder


def test_a_safe_folder_of_jp2_gives_the_tiles_back_with_the_offsets_of_its_metadata(tmp_path, tiles):
    mosaic = lay_tiles(tiles, 4)[:128]
    numbers = to_digital_numbers(mosaic, EUROSAT_RGB, offset=-1000)
    bands = {name: numbers[..., k] for k, name in enumerate(BANDS)}
    safe = write_safe(tmp_path / "S2B_MSIL1C.SAFE", bands, dict.fromkeys(BANDS, -1000), "1C")
    scene = open_scene(safe, EUROSAT_RGB)
    assert scene.level == "L1C" and set(scene.offsets.values()) == {-1000.0} and list(scene.bands) == list(BANDS)
    with BlockReader(scene, EUROSAT_RGB) as reader:
        assert (reader.bytes_of(0, 0, *scene.shape) == mosaic).all()


def test_safe_metadata_without_offsets_are_of_an_older_product_and_mean_none(tmp_path, tiles):
    numbers = to_digital_numbers(lay_tiles(tiles, 2)[:64], EUROSAT_RGB)
    safe = write_safe(tmp_path / "old.SAFE", {n: numbers[..., k] for k, n in enumerate(BANDS)}, None, "2A")
    scene = open_scene(safe, EUROSAT_RGB)
    assert scene.level == "L2A" and set(scene.offsets.values()) == {0.0}


@pytest.mark.parametrize(("applied", "expected"), [(True, 0.0), (False, -1000.0)])
def test_a_stac_item_says_whether_its_offset_was_applied_already(tmp_path, tiles, applied, expected):
    numbers = to_digital_numbers(lay_tiles(tiles, 2)[:64], EUROSAT_RGB)
    assets = {}
    for k, (key, name) in enumerate(zip(["red", "green", "blue"], BANDS, strict=True)):
        write_band(tmp_path / f"{key}.tif", numbers[..., k])
        facts = {
            "href": f"./{key}.tif",
            "eo:bands": [{"name": name}],
            "raster:bands": [{"scale": 1e-4, "offset": -0.1}],
        }
        assets[key] = facts
    properties = {"processing:level": "L2A", "earthsearch:boa_offset_applied": applied}
    item = tmp_path / "item.json"
    item.write_text(json.dumps({"type": "Feature", "properties": properties, "assets": assets}))
    scene = open_scene(item, EUROSAT_RGB)
    assert set(scene.offsets.values()) == {expected} and scene.level == "L2A"
    assets["red"]["href"] = "https://example.org/red.tif"
    item.write_text(json.dumps({"type": "Feature", "properties": properties, "assets": assets}))
    with pytest.raises(EurosatError, match="not on this machine"):
        open_scene(item, EUROSAT_RGB)


def test_a_folder_of_band_files_with_a_scene_classification_leaves_clouds_out(tmp_path, tiles):
    numbers = to_digital_numbers(lay_tiles(tiles, 2)[:128], EUROSAT_RGB)
    for k, name in enumerate(BANDS):
        write_band(tmp_path / f"T33_{name}_10m.tif", numbers[..., k])
    layer = np.full((64, 64), 4, np.uint8)
    layer[:10, :20] = 9
    write_band(tmp_path / "T33_SCL_20m.tif", layer, transform=rasterio.transform.from_origin(4e5, 5e6, 20, 20))
    with pytest.raises(EurosatError, match="nothing says its offset"):
        open_scene(tmp_path, EUROSAT_RGB)
    scene = open_scene(tmp_path, EUROSAT_RGB, Declared(offset=0))
    with BlockReader(scene, EUROSAT_RGB) as reader:
        seen = reader.bytes_of(5, 7, 100, 110)
    assert (seen[:15, :33] == 0).all() and (seen[15:] > 0).all() and (seen[:, 33:] > 0).all()


def test_what_is_no_scene_of_the_contract_is_refused_with_the_reason(tmp_path, tiles):
    mosaic = lay_tiles(tiles, 3)[:128]
    cases = [
        ({"crs": None}, Declared(), "where on the Earth"),
        ({"crs": "EPSG:4326", "origin": (13.0, 46.0)}, Declared(), "degrees"),
        ({}, Declared(bands=("B02", "B03", "B08")), "no band B04"),
        ({}, Declared(bands=("B02", "B03")), "2 names for the 3 bands"),
        ({"tell": False}, Declared(), "no names"),
        ({}, Declared(air=True), "only L2A"),
    ]
    for made, declared, why in cases:
        path = write_scene(tmp_path / "scene.tif", mosaic, EUROSAT_RGB, **made)
        with pytest.raises(EurosatError, match=why):
            open_scene(path, EUROSAT_RGB, declared)
    (tmp_path / "text.tif").write_text("no picture")
    for path, why in [(tmp_path / "text.tif", "GDAL cannot read"), (tmp_path / "none.tif", "no such scene")]:
        with pytest.raises(EurosatError, match=why):
            open_scene(path, EUROSAT_RGB)


def test_int16_other_projections_and_resampled_grids_are_mapped(tmp_path, tiles, model):
    mosaic = lay_tiles(tiles, 3)[:192]
    numbers = to_digital_numbers(mosaic, EUROSAT_RGB).astype(np.int16).transpose(2, 0, 1)
    grid = {
        "height": 192,
        "width": 192,
        "crs": "EPSG:3035",
        "transform": rasterio.transform.from_origin(4e6, 3e6, 10, 10),
    }
    with rasterio.open(
        tmp_path / "laea.tif", "w", driver="GTiff", dtype="int16", count=3, nodata=-9999, **grid
    ) as file:
        numbers[:, :70, :70] = -9999
        file.write(numbers)
        file.descriptions = BANDS
    done = map_scene(tmp_path / "laea.tif", model, tmp_path / "laea", declared=Declared(offset=0, level="L1C"))
    total = done.areas[-1]
    assert total["hectares"] == pytest.approx((192 * 192 - 70 * 70) / 100, rel=1e-4)  # EPSG:3035 is equal-area
    fine = grid | {"transform": rasterio.transform.from_origin(4e6, 3e6, 20, 20)}
    with rasterio.open(
        tmp_path / "coarse.tif", "w", driver="GTiff", dtype="int16", count=3, nodata=-9999, **fine
    ) as file:
        file.write(numbers)
        file.descriptions = BANDS
    with pytest.raises(EurosatError, match="ask to resample"):
        open_scene(tmp_path / "coarse.tif", EUROSAT_RGB, Declared(offset=0))
    done = map_scene(tmp_path / "coarse.tif", model, tmp_path / "fine", declared=Declared(offset=0, resample=True))
    assert done.cover.shape == (384, 384) and any("resampled" in note for note in done.info["notes"])


# ground truth ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth(archive, bundle_folder):
    "Real test tiles, their labels, and a model with what it says of each tile by itself."
    if archive.suffix != ".zip":
        pytest.skip("EuroSAT is here as a folder; the test reads its zip")
    names = np.random.default_rng(0).permutation(split_list("random", "test").decode().split())[:400]
    with zipfile.ZipFile(archive) as file:
        members = {Path(member).name: member for member in file.namelist()}
        found = np.stack([decode_image(file.read(members[name]), 64, name) for name in names])
    labels = np.array([EUROSAT_CLASSES.index(name.split("_")[0]) for name in names])
    trained = load_bundle(bundle_folder)
    return found, labels, trained, trained.predict(found)


@pytest.mark.parametrize("offset", [0.0, -1000.0])
def test_a_mosaic_of_real_test_tiles_is_mapped_exactly_as_its_tiles_are_answered(truth, tmp_path, offset):
    found, labels, trained, alone = truth
    path = write_scene(tmp_path / "mosaic.tif", lay_tiles(found, 20), EUROSAT_RGB, offset)
    done = map_scene(path, trained, tmp_path / "map")
    best = done.cover.probabilities.argmax(-1)
    assert np.array_equal(done.cover.probabilities.reshape(400, -1), alone.probabilities)
    assert cells_right(best, labels) == (alone.labels == labels).sum()
    assert np.array_equal(done.cover.labels.ravel() == len(trained.bundle.classes), alone.uncertain)


def test_on_real_tiles_a_forgotten_offset_and_a_stretched_picture_are_refused(truth, tmp_path):
    found, _, trained, _ = truth
    mosaic = lay_tiles(found, 20)
    shifted = write_scene(tmp_path / "shifted.tif", mosaic, EUROSAT_RGB, -1000, tell=False)
    told = Declared(bands=BANDS, level="L1C")
    for offset, why in [(None, "nothing says its offset"), (0.0, "say offset -1000")]:
        with pytest.raises(EurosatError, match=why):
            map_scene(shifted, trained, tmp_path / "map", declared=replace(told, offset=offset))
    plain = write_scene(tmp_path / "plain.tif", mosaic, EUROSAT_RGB, 0, tell=False)
    with pytest.raises(EurosatError, match="say offset 0"):
        map_scene(plain, trained, tmp_path / "map", declared=replace(told, offset=-1000.0))
    profile = {"driver": "GTiff", "crs": "EPSG:32633", "transform": rasterio.transform.from_origin(4e5, 5e6, 10, 10)}
    with rasterio.open(
        tmp_path / "TCI.tif", "w", dtype="uint8", count=3, height=len(mosaic), width=mosaic.shape[1], **profile
    ) as file:
        file.write(mosaic.transpose(2, 0, 1))
    with pytest.raises(EurosatError, match="stretched for the eye"):
        map_scene(tmp_path / "TCI.tif", trained, tmp_path / "map", declared=replace(told, offset=0.0))
    done = map_scene(tmp_path / "TCI.tif", trained, tmp_path / "map", declared=replace(told, scaled=True))
    assert np.array_equal(done.cover.probabilities.reshape(400, -1), truth[3].probabilities)


def test_bands_in_another_order_are_found_by_name_and_refused_under_wrong_names(truth, tmp_path):
    found, _, trained, alone = truth
    numbers = to_digital_numbers(lay_tiles(found, 20), EUROSAT_RGB).transpose(2, 0, 1)[::-1]
    profile = {"driver": "GTiff", "crs": "EPSG:32633", "transform": rasterio.transform.from_origin(4e5, 5e6, 10, 10)}
    size = {"dtype": "uint16", "count": 3, "height": numbers.shape[1], "width": numbers.shape[2]}
    with rasterio.open(tmp_path / "bgr.tif", "w", **size, **profile) as file:
        file.write(numbers)
    told = Declared(offset=0.0, level="L1C", bands=("B02", "B03", "B04"))
    done = map_scene(tmp_path / "bgr.tif", trained, tmp_path / "map", declared=told)
    assert np.array_equal(done.cover.probabilities.reshape(400, -1), alone.probabilities)
    with pytest.raises(EurosatError, match="another order"):
        map_scene(tmp_path / "bgr.tif", trained, tmp_path / "wrong", declared=replace(told, bands=BANDS))


# blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [64, 32, 16])
def test_one_block_or_many_and_one_thread_or_three_give_the_same_bits(tmp_path, tiles, bundle_folder, stride):
    trained = load_bundle(bundle_folder)
    path = write_large_scene(tmp_path / "scene.tif", tiles, EUROSAT_RGB, (333, 471), seed=stride)
    scene = open_scene(path, EUROSAT_RGB)
    one = answer_scene(scene, trained, tmp_path / "one", MapSettings(stride, block=1024), workers=1)
    for side in (64, 128, 192):
        many = answer_scene(scene, trained, tmp_path / f"{side}", MapSettings(stride, block=side), workers=3)
        assert many.computed > one.computed == 1
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one[:3], many[:3], strict=True))


def test_a_map_that_was_killed_goes_on_and_computes_only_what_is_missing(tmp_path, tiles, bundle_folder):
    path = write_large_scene(tmp_path / "scene.tif", tiles, EUROSAT_RGB, (1024, 1024))
    out = tmp_path / "map"
    code = f"""
import time
from eurosat_mlops import blocks, mapper
from eurosat_mlops.predict import load_bundle
real = blocks.answer_block
blocks.answer_block = lambda *given: (time.sleep(0.1), real(*given))[1]
mapper.map_scene({str(path)!r}, load_bundle({str(bundle_folder)!r}), {str(out)!r}, blocks.MapSettings(block=128))
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        while len([*out.glob(".blocks-*/*.npz")]) < 10 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = len([*out.glob(".blocks-*/*.npz")])
    assert 10 <= kept < 64 and not (out / "map.json").exists()
    trained = load_bundle(bundle_folder)
    with pytest.raises(EurosatError, match="another folder"):
        map_scene(path, trained, out, MapSettings(32, block=128))
    done = map_scene(path, trained, out, MapSettings(block=128))
    assert done.info["blocks"] == {"computed": 64 - kept, "reused": kept} and not [*out.glob(".blocks-*")]
    assert_same(done, map_scene(path, trained, tmp_path / "whole", MapSettings(block=128)))


def test_dask_with_two_workers_gives_the_same_bits_as_threads(tmp_path, tiles, bundle_folder):
    pytest.importorskip("distributed", reason="the extra scene is not installed")
    trained = load_bundle(bundle_folder)
    path = write_large_scene(tmp_path / "scene.tif", tiles, EUROSAT_RGB, (400, 600))
    settings = MapSettings(32, block=128)
    by_dask = map_scene(path, trained, tmp_path / "dask", settings, outputs=Outputs(engine="dask", workers=2))
    assert by_dask.info["blocks"]["computed"] == 15
    assert_same(by_dask, map_scene(path, trained, tmp_path / "local", settings))


def test_blocks_that_cannot_be_read_are_named_and_the_others_are_kept(tmp_path, tiles, model):
    options = [("compress", "deflate"), ("blockxsize", 64), ("blockysize", 64)]
    path = write_large_scene(tmp_path / "scene.tif", tiles, EUROSAT_RGB, (512, 512), options)
    scene, settings = open_scene(path, EUROSAT_RGB), MapSettings(block=128)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    with pytest.raises(EurosatError, match=r"of 16 blocks failed .*run again"):
        answer_scene(scene, model, tmp_path / "parts", settings)
    assert 0 < len([*(tmp_path / "parts").glob("*.npz")]) < 16


# files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiles, model) -> FinishedMap:
    folder = tmp_path_factory.mktemp("finished")
    path = write_large_scene(folder / "scene.tif", tiles, EUROSAT_RGB, (700, 900))
    return map_scene(path, model, folder / "map", MapSettings(32), outputs=Outputs(probabilities=True, overlay=True))


def test_areas_add_up_to_the_valid_area_of_the_scene(finished):
    *parts, total = area_table(finished.cover)
    assert sum(row["hectares"] for row in parts) == pytest.approx(total["hectares"], rel=1e-12)
    scene = finished.folder.parent / "scene.tif"
    with rasterio.open(scene) as file:
        valid = int((file.read() > 0).all(0).sum())
    assert finished.cover.valid.sum() == valid and total["hectares"] == pytest.approx(valid / 100, rel=1e-3)
    with open(finished.folder / "areas.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["hectares"]) == pytest.approx(total["hectares"], abs=1e-4)


def test_all_rasters_are_valid_cogs_that_say_what_they_are(finished):
    cogeo = pytest.importorskip("rio_cogeo", reason="rio-cogeo is of the extra dev")
    for name in ("classes.tif", "confidence.tif", "probabilities.tif", "classes_10m.tif"):
        valid, errors, _ = cogeo.cog_validate(finished.folder / name, quiet=True)
        assert valid, (name, errors)
        with rasterio.open(finished.folder / name) as file:
            said, shape = file.tags(), file.shape
        assert said["BUNDLE"] == "0" * 64 and said["STRIDE_PX"] == "32" and "640 m" in said["CELL"]
        assert shape == ((700, 900) if name == "classes_10m.tif" else (22, 29))


def test_regions_are_the_same_in_both_files_and_add_up_to_the_map(finished):
    import pyarrow.parquet as pq
    import shapely

    table = pq.read_table(finished.folder / "regions.parquet")
    said = json.loads(table.schema.metadata[b"geo"])
    assert said["version"] == "1.1.0" and said["columns"]["geometry"]["crs"]["id"]["code"] == 32633
    shapes = shapely.from_wkb(table["geometry"].to_pylist())
    assert shapely.is_valid(shapes).all()
    with rasterio.open(finished.folder.parent / "scene.tif") as file:
        assert shapely.box(*file.bounds).buffer(0.01).covers(shapely.union_all(shapes))
    mapped = sum(row["hectares"] for row in finished.areas[:-2])
    assert sum(table["hectares"].to_pylist()) == pytest.approx(mapped, abs=0.1)
    features = json.loads((finished.folder / "regions.geojson").read_text())["features"]
    assert [f["properties"]["hectares"] for f in features] == table["hectares"].to_pylist()


def test_the_page_asks_nobody_for_anything_and_runs_under_its_own_policy(finished):
    text = (finished.folder / "map.html").read_text(encoding="utf-8")
    assert not re.search(r"""https?:|(src|href)=["'](?!data:)|url\(|@import| style=| on\w+=""", text)
    assert "default-src 'none'" in text and "unsafe" not in text


def test_the_page_moves_by_keys_and_fades_by_its_slider(finished):
    api = pytest.importorskip("playwright.sync_api")
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("there is no chromium to open the page with")
    with api.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1100, "height": 700})
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto((finished.folder / "map.html").as_uri())
        before = page.evaluate("document.getElementById('stack').style.transform")
        page.focus("#view")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("+")
        assert page.evaluate("document.getElementById('stack').style.transform") != before
        page.keyboard.press("0")
        assert page.evaluate("document.getElementById('stack').style.transform") == before
        page.fill("#opacity", "20")
        assert page.evaluate("getComputedStyle(document.getElementById('cells')).opacity") == "0.2"
        browser.close()
    assert faults == []


def test_odd_sizes_and_tiny_scenes_are_right_or_refused(tmp_path, tiles, model):
    for height, width in [(64, 64), (65, 200), (127, 64), (129, 191)]:
        path = write_large_scene(tmp_path / f"{height}-{width}.tif", tiles, EUROSAT_RGB, (height, width))
        done = map_scene(path, model, tmp_path / f"map-{height}-{width}")
        assert done.cover.labels.shape == (-(-height // 64), -(-width // 64))
        with rasterio.open(path) as file:
            assert done.cover.valid.sum() == (file.read() > 0).all(0).sum()
    path = write_large_scene(tmp_path / "tiny.tif", tiles, EUROSAT_RGB, (63, 500))
    with pytest.raises(EurosatError, match="at least 64 x 64"):
        map_scene(path, model, tmp_path / "tiny")


# change --------------------------------------------------------------------------------------------------------------


def test_change_is_where_the_land_has_changed_and_its_hectares_add_up(tmp_path, model):
    colours = np.zeros((3, 64, 64, 3), np.uint8) + 20
    for k in range(3):
        colours[k, ..., k] = 200
    was, became = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 2, 0])
    maps = []
    for name, classes in (("then", was), ("now", became)):
        mosaic = lay_tiles(colours[classes], 3)
        mosaic[:10, :10] = 0  # not measured
        maps.append(
            read_map(
                map_scene(write_scene(tmp_path / f"{name}.tif", mosaic, EUROSAT_RGB), model, tmp_path / name).folder
            )
        )
    change = compare_maps(*maps)
    assert change.states.ravel().tolist() == [SAME, CHANGED, SAME, SAME, SAME, CHANGED]
    assert {(a, b) for a, b, _ in change.largest} == {("Soil", "Grass"), ("Water", "Soil")}
    assert change.transitions.sum() == pytest.approx(maps[0].hectares.sum(), rel=1e-6)
    assert change.largest[0][2] == pytest.approx(40.96, rel=2e-3)
    written = write_change(tmp_path / "change", *maps, change)
    with rasterio.open(written[0]) as file:
        assert (file.read(1) == change.states).all() and file.nodata == 255


def test_maps_of_another_grid_stride_or_model_and_damaged_ones_are_not_compared(tmp_path, tiles, model):
    mosaic = lay_tiles(tiles, 4)[:128]
    one = map_scene(write_scene(tmp_path / "one.tif", mosaic, EUROSAT_RGB), model, tmp_path / "one")
    moved = write_scene(tmp_path / "moved.tif", mosaic, EUROSAT_RGB, origin=(380_010.0, 5_080_000.0))
    other = map_scene(moved, model, tmp_path / "other")
    fine = map_scene(tmp_path / "one.tif", model, tmp_path / "fine", MapSettings(stride=32))
    before = read_map(one.folder)
    for folder, what in ((other.folder, "grid"), (fine.folder, "stride")):
        with pytest.raises(EurosatError, match=what):
            compare_maps(before, read_map(folder))
    with pytest.raises(EurosatError, match="model"):
        compare_maps(before, replace(before, info={**before.info, "bundle": "f" * 64}))
    (other.folder / "classes.tif").write_bytes((one.folder / "classes.tif").read_bytes() + b"0")
    with pytest.raises(EurosatError, match="not as it was written"):
        read_map(other.folder)


def test_the_command_maps_a_scene_and_its_mistakes_exit_with_2(tmp_path, tiles, bundle_folder, capsys):
    from eurosat_mlops.cli import main

    path = write_scene(tmp_path / "scene.tif", lay_tiles(tiles, 4)[:256], EUROSAT_RGB)
    words = ["map", str(path), "--model", str(bundle_folder), "--out", str(tmp_path / "map")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Total" in said and "map.html" in said
    assert main([*words, "--stride", "32"]) == 2
    assert "another folder" in capsys.readouterr().err
    assert main(["change", str(tmp_path / "map"), str(tmp_path / "map"), "--out", str(tmp_path / "change")]) == 0
    assert "changed" in capsys.readouterr().out
    assert main(["change", str(tmp_path / "map"), str(tmp_path), "--out", str(tmp_path / "none")]) == 2
    assert "no finished map" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_real_scene_is_mapped_and_its_lagoon_is_water_when_air_lies_over_it(project, tmp_path, model):
    path = project.parent / "shared" / "data" / "aquileia_S2_L2A_20190416_B04B03B02_utm33n_10m.tif"
    if not path.exists():
        pytest.skip("the real scene is not beside the checkout")
    done = map_scene(path, model, tmp_path / "map", declared=Declared(air=True))
    assert done.cover.labels.shape == (16, 27) and done.areas[-1]["hectares"] == pytest.approx(15_657, rel=1e-3)
    assert any("L2A" in note for note in done.info["notes"]) and any("air" in note for note in done.info["notes"])
    lagoon, fields = done.cover.labels[12:15, 3:8], done.cover.labels[5:8, 12:20]
    assert (lagoon == 2).mean() > 0.8 > 0.2 > (fields == 2).mean()  # the lesson's model: brightest in blue


# the service ---------------------------------------------------------------------------------------------------------


def test_the_service_makes_a_map_behind_the_predictions_and_refuses_what_it_cannot_map(tmp_path, tiles, bundle_folder):
    from eurosat_mlops.engine import Engine, open_model
    from eurosat_mlops.map_routes import KEPT, join_maps
    from eurosat_mlops.problems import ServeConfig
    from eurosat_mlops.serve import make_app

    settings = Settings(tmp_path, runs_dir=tmp_path / "runs")
    engine = Engine(settings, open_model(bundle_folder, settings), threads=1)
    app = join_maps(make_app(ServeConfig(), engine), settings)
    scene = write_scene(tmp_path / "scene.tif", lay_tiles(tiles, 8)[:448], EUROSAT_RGB).read_bytes()
    silent = write_scene(tmp_path / "silent.tif", lay_tiles(tiles, 8)[:448], EUROSAT_RGB, tell=False).read_bytes()
    vrt = b"<VRTDataset rasterXSize='64' rasterYSize='64'></VRTDataset>"

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as asked:
            for status, path, body in (
                (415, "/map", vrt),
                (415, "/map", b""),
                (422, "/map?stride=50", scene),
                (422, "/map?bands=B04,B03,B02", silent),
                (422, "/map", scene[: len(scene) // 2][:2000]),
                (413, "/map", b"II*\x00" + bytes(50 << 20)),
            ):
                refused = await asked.post(path, content=body)
                assert refused.status_code == status, refused.text
                assert refused.headers["content-type"] == "application/problem+json"
            assert list((tmp_path / "runs" / "maps").iterdir()) == [], "nothing is left of what was refused"
            for number in range(KEPT + 5):  # what an earlier server has left
                (tmp_path / "runs" / "maps" / f"20200101T0000{number:02}Z-0123456789abcdef").mkdir()
            accepted = await asked.post("/map?stride=32", content=scene)
            assert accepted.status_code == 202 and accepted.json()["state"] in ("queued", "running")
            where = f"/map/{accepted.json()['id']}"
            for _ in range(600):
                told = (await asked.get(where)).json()
                if told["state"] in ("finished", "failed"):
                    break
                assert 0 <= told["progress"] <= 1 and told["files"] == {}
                await asyncio.sleep(0.1)
            assert told["state"] == "finished", told
            left = tmp_path / "runs" / "maps"
            for _ in range(100):
                if len(list(left.iterdir())) <= KEPT:
                    break
                await asyncio.sleep(0.1)
            assert len(list(left.iterdir())) == KEPT and (left / told["id"]).is_dir(), "the disk does not fill up"
            areas = await asked.get(told["files"]["areas.csv"])
            assert areas.status_code == 200 and "Total" in areas.text
            made = map_scene(
                tmp_path / "scene.tif", load_bundle(bundle_folder), tmp_path / "here", MapSettings(stride=32)
            )
            assert areas.content == (made.folder / "areas.csv").read_bytes()
            assert (await asked.get(f"{where}/scene.tif")).status_code == 404
            assert (await asked.get(f"{where}/..%2Fscene.tif")).status_code in (404, 422)
            assert (await asked.get("/map/20260101T000000Z-0123456789abcdef")).status_code == 404
        await app.state.service.close()

    asyncio.run(run())
