"""A bundle is read whole or refused."""

import subprocess

import numpy as np
import pytest

from eurosat_mlops.bands import EUROSAT_RGB, IMAGE_RGB, contract_to_dict
from eurosat_mlops.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    add_metrics,
    bundle_answers,
    card_text,
    check_info,
    graph_name,
    read_arrays,
    read_bundle,
    to_arrays,
    two_class_table,
    update_bundle,
    verify_bundle,
    write_bundle,
)
from eurosat_mlops.core import EurosatError

INTERVAL = {"value": 0.9, "low": 0.8, "high": 0.95}
FIGURES = {"n": 10, "accuracy": INTERVAL, "macro_f1": INTERVAL, "ece": 0.01}
INFO = {
    "classes": ["Forest", "River"],
    "contract": contract_to_dict(EUROSAT_RGB),
    "temperature": 1.1,
    "precision": "fp32",
    "limits": {"confidence": 0.6, "distance": 20.0},
    "metrics": {"validation": FIGURES},
    "config": {"arch": "tilenet_s"},
    "data": {"name": "eurosat", "split": "random", "digest": "0" * 64},
    "graphs": {"fp32": {"bytes": 100}},
    "licence": {"weights": "Apache-2.0", "data": "MIT"},
    "provenance": {},
    "created": "2026-01-01T00:00:00Z",
}
RANDOM = np.random.default_rng(0)
FILES = {
    "model.onnx": RANDOM.bytes(3000),
    "weights.safetensors": RANDOM.bytes(5000),
    "reference.npz": to_arrays({"labels": np.arange(5)}),
}


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle", INFO, FILES)


def test_reading_gives_what_was_written(bundle):
    again = read_bundle(bundle.folder)
    assert again.id == bundle.id and again.classes == ("Forest", "River")
    assert again.contract == EUROSAT_RGB and again.temperature == 1.1


def test_the_manifest_is_readable_by_sha256sum(bundle):
    subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=bundle.folder, check=True, capture_output=True)


def test_a_thousand_flipped_bits_are_a_thousand_refusals(bundle):
    rng = np.random.default_rng(1)
    files = sorted(p for p in bundle.folder.iterdir())
    refused = 0
    for _ in range(1000):
        path = files[rng.integers(len(files))]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            refused += read_bundle(bundle.folder).id != bundle.id  # a changed manifest is another bundle
        except EurosatError:
            refused += 1
        path.write_bytes(good)
    assert refused == 1000 and read_bundle(bundle.folder).id == bundle.id


@pytest.mark.parametrize("name", [*FILES, "bundle.json", "card.md", MANIFEST])
def test_a_missing_file_is_refused(bundle, name):
    (bundle.folder / name).unlink()
    with pytest.raises(EurosatError, match=name):
        read_bundle(bundle.folder)


def test_an_added_file_is_refused(bundle):
    (bundle.folder / "sub").mkdir()
    (bundle.folder / "sub" / "evil.pkl").write_bytes(b"")
    with pytest.raises(EurosatError, match=r"evil\.pkl"):
        verify_bundle(bundle.folder)


def test_a_manifest_that_is_no_list_is_refused(bundle):
    (bundle.folder / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(EurosatError, match=MANIFEST):
        read_bundle(bundle.folder)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"schema_version": 1}, "schema version"),
        ({"classes": ["River", "River"]}, "classes"),
        ({"temperature": 0}, "temperature"),
        ({"contract": {}}, "contract"),
        ({"precision": "int4"}, "precision"),
        ({"limits": {}}, "limits"),
    ],
)
def test_a_description_that_cannot_be_is_refused(change, word):
    with pytest.raises(EurosatError, match=word):
        check_info({"schema_version": SCHEMA_VERSION, **INFO, **change}, "bundle")


def test_a_description_without_classes_is_never_written(tmp_path):
    with pytest.raises(EurosatError, match="lacks classes"):
        write_bundle(tmp_path / "bundle", {k: v for k, v in INFO.items() if k != "classes"}, FILES)
    assert not list(tmp_path.iterdir())


def test_new_figures_make_a_new_bundle_with_the_same_weights(bundle):
    weights = (bundle.folder / "weights.safetensors").read_bytes()
    said = np.array([0, 1, 1]), np.array([0, 1, 0])
    after = add_metrics(bundle.folder, "test, random", FIGURES, *said)
    assert after.id != bundle.id and list(after.info["metrics"]) == ["validation", "test, random"]
    assert (after.folder / "weights.safetensors").read_bytes() == weights
    assert "test, random" in (after.folder / "card.md").read_text()
    assert bundle_answers(bundle, "test, random") is None and bundle_answers(after, "test, spatial") is None
    assert [a.tolist() for a in bundle_answers(after, "test, random")] == [[0, 1, 1], [0, 1, 0]]
    again = add_metrics(after.folder, "test, spatial", FIGURES, *said)
    assert bundle_answers(again, "test, random") is not None and bundle_answers(again, "test, spatial") is not None


def test_the_card_of_a_synthetic_model_warns(tmp_path):
    info = {**INFO, "data": {**INFO["data"], "name": "synthetic"}}
    assert "synthetic tiles" in (write_bundle(tmp_path / "b", info, FILES).folder / "card.md").read_text()


@pytest.mark.parametrize("name", list(FILES))
def test_a_bundle_is_not_written_without_its_files(tmp_path, name):
    with pytest.raises(EurosatError, match=name):
        write_bundle(tmp_path / "b", INFO, {k: v for k, v in FILES.items() if k != name})
    assert not list(tmp_path.iterdir())


def test_a_file_that_changes_after_the_check_is_not_loaded(bundle):
    assert bundle.read("model.onnx") == FILES["model.onnx"]
    (bundle.folder / "model.onnx").write_bytes(b"another graph")
    with pytest.raises(EurosatError, match="differs from the manifest"):
        bundle.read("model.onnx")
    with pytest.raises(EurosatError, match=r"no \.\./secret in this bundle"):
        bundle.read("../secret")


def test_only_a_graph_that_is_there_is_served(bundle):
    assert graph_name(bundle) == graph_name(bundle, "fp32") == "model.onnx"
    for precision in ("int8", "int4"):
        with pytest.raises(EurosatError, match="fp32"):
            graph_name(bundle, precision)
    after = update_bundle(bundle.folder, {"precision": "int8"}, {"model.int8.onnx": b"small"})
    assert graph_name(after) == "model.int8.onnx" and after.read("model.onnx") == FILES["model.onnx"]


def test_arrays_carry_no_code(bundle):
    with pytest.raises(ValueError, match="pickle"):
        read_arrays(to_arrays({"bad": np.array([{}], dtype=object)}))
    assert bundle.reference["labels"].tolist() == list(range(5))


BINARY_POINT = dict.fromkeys(("precision", "recall", "specificity", "balanced_accuracy"), INTERVAL)
BINARY = {
    "positive": "REAL",
    "auroc": INTERVAL,
    "average_precision": {"value": None, "low": None, "high": None},
    "threshold": 0.3,
    "at_half": {"threshold": 0.5, **BINARY_POINT},
    "at_threshold": {"threshold": 0.3, **BINARY_POINT},
}


def test_the_card_of_ordinary_pictures_speaks_of_no_ground():
    info = INFO | {"contract": contract_to_dict(IMAGE_RGB), "data": INFO["data"] | {"name": "cifake"}}
    card = card_text(info)
    assert card.startswith("# Picture classifier tilenet_s") and "scaled to 64 x 64 px" in card
    assert [word for word in ("Sentinel", "parcel", "scene", "Land", "m a pixel", "level") if word in card] == []
    assert card_text(INFO).startswith("# Land-cover model") and "10 m a pixel" in card_text(INFO)


def test_the_card_of_two_classes_names_the_positive_one_and_the_threshold():
    assert two_class_table({"validation": FIGURES}) == "" and "Two classes" not in card_text(INFO)
    card = card_text(INFO | {"metrics": {"validation": FIGURES | {"binary": BINARY}}})
    assert "REAL is the positive one" in card and "0.300 was chosen on validation" in card
    assert "| validation, REAL from 0.300 on | 90.00 | none | 90.00 | 90.00 | 90.00 | 90.00 |" in card
    level = BINARY | {"threshold": 0.5, "at_threshold": BINARY["at_half"]}
    assert two_class_table({"test": {"binary": level}}).count("REAL from") == 1  # 0.5 was chosen: one row is enough


def test_the_card_names_use_limits_data_energy_and_licences(tmp_path):
    info = INFO | {"energy": {"joules": 1234.0, "method": "zeus"}, "graphs": {"int8": {"refused": "too coarse"}}}
    card = (write_bundle(tmp_path / "b", info, FILES).folder / "card.md").read_text()
    words = ("Not for", "90.00 (80.00 to 95.00)", "1,234 J (zeus)", "Apache-2.0", "MIT", "not shipped, too coarse")
    assert [word for word in words if word not in card] == []
