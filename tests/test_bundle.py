"""A bundle is read whole or refused."""

import subprocess

import numpy as np
import pytest

from eurosat_mlops.bands import EUROSAT_RGB, contract_to_dict
from eurosat_mlops.bundle import MANIFEST, add_metrics, check_info, read_bundle, verify_bundle, write_bundle
from eurosat_mlops.core import EurosatError

INTERVAL = {"value": 0.9, "low": 0.8, "high": 0.95}
FIGURES = {"n": 10, "accuracy": INTERVAL, "macro_f1": INTERVAL, "ece": 0.01}
INFO = {
    "classes": ["Forest", "River"],
    "contract": contract_to_dict(EUROSAT_RGB),
    "temperature": 1.1,
    "metrics": {"validation": FIGURES},
    "config": {"arch": "tilenet_s"},
    "data": {"name": "eurosat", "split": "random", "digest": "0" * 64},
    "provenance": {},
    "created": "2026-01-01T00:00:00Z",
}


@pytest.fixture
def bundle(tmp_path):
    weights = np.random.default_rng(0).bytes(5000)
    return write_bundle(tmp_path / "bundle", INFO, {"weights.safetensors": weights})


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


@pytest.mark.parametrize("name", ["weights.safetensors", "bundle.json", "card.md", MANIFEST])
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
        ({"schema_version": 2}, "schema version"),
        ({"classes": ["River", "River"]}, "classes"),
        ({"temperature": 0}, "temperature"),
        ({"contract": {}}, "contract"),
    ],
)
def test_a_description_that_cannot_be_is_refused(change, word):
    with pytest.raises(EurosatError, match=word):
        check_info({"schema_version": 1, **INFO, **change}, "bundle")


def test_a_description_without_classes_is_never_written(tmp_path):
    with pytest.raises(EurosatError, match="lacks classes"):
        write_bundle(tmp_path / "bundle", {k: v for k, v in INFO.items() if k != "classes"}, {})
    assert not list(tmp_path.iterdir())


def test_new_figures_make_a_new_bundle_with_the_same_weights(bundle):
    weights = (bundle.folder / "weights.safetensors").read_bytes()
    after = add_metrics(bundle.folder, "test, random", FIGURES)
    assert after.id != bundle.id and list(after.info["metrics"]) == ["validation", "test, random"]
    assert (after.folder / "weights.safetensors").read_bytes() == weights
    assert "test, random" in (after.folder / "card.md").read_text()


def test_the_card_of_a_synthetic_model_warns(tmp_path):
    info = {**INFO, "data": {**INFO["data"], "name": "synthetic"}}
    assert "synthetic tiles" in (write_bundle(tmp_path / "b", info, {}).folder / "card.md").read_text()
