"""A graph is opened in one way."""

import numpy as np
import pytest

from eurosat_mlops.bundle import read_bundle
from eurosat_mlops.core import EurosatError
from eurosat_mlops.reference import AnsweredTiles, describe_validation, golden_rows
from eurosat_mlops.session import answer, measure_latency, open_session


@pytest.fixture(scope="module")
def bundle(bundle_folder):
    return read_bundle(bundle_folder)


@pytest.fixture(scope="module")
def session(bundle):
    return open_session(bundle.read("model.onnx"))


def test_the_slices_come_back_in_order(bundle, session):
    tiles = bundle.reference["golden_tiles"]
    whole, cut = answer(session, tiles), answer(session, tiles, batch=3)
    assert whole[0].shape == (len(tiles), 10) and whole[1].shape == (len(tiles), 128)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(whole, cut, strict=True))
    assert answer(session, tiles[:0])[0].shape == (0, 10)


def test_the_same_tiles_twice_give_the_same_bytes(bundle, session):
    tiles = bundle.reference["golden_tiles"]
    first, again = answer(session, tiles), answer(session, tiles)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))


def test_what_is_no_graph_is_refused():
    with pytest.raises(EurosatError, match="cannot open"):
        open_session(b"")


def test_latency_counts_what_it_is_told():
    calls = []
    latency = measure_latency(lambda: calls.append(1), repeats=20, warm_up=3)
    assert len(calls) == 23 and 0 < latency.p50 <= latency.p99


def test_golden_tiles_are_right_and_certain(bundle, session):
    reference = bundle.reference
    p, _ = answer(session, reference["golden_tiles"])
    assert (p.argmax(1) == reference["golden_labels"]).all() and len(np.unique(reference["golden_labels"])) == len(p)
    assert p == pytest.approx(reference["golden_probabilities"], abs=1e-5)
    assert p.max(1).min() >= bundle.info["limits"]["confidence"]


def test_the_reference_keeps_its_promises(bundle):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 3000)
    embedding = (np.eye(4, 32)[labels] + rng.normal(0, 0.2, (3000, 32))).astype(np.float32)
    p = np.full((3000, 4), 0.1, np.float32)
    p[np.arange(3000), labels] = rng.uniform(0.4, 0.7, 3000)
    tiles = rng.integers(0, 256, (3000, 8, 8, 3)).astype(np.uint8)
    found = describe_validation(AnsweredTiles(tiles, labels, p, embedding), embedding, labels)
    assert len(found.arrays["embedding"]) == 2000 and found.arrays["class_counts"].sum() == 3000
    assert 0.94 < (p.max(1) >= found.confidence).mean() < 0.96
    means = tiles.astype(float).mean((1, 2))
    assert all(np.abs(means - row).sum(1).min() < 1e-3 for row in found.arrays["channel_mean"][:5])
    assert len(golden_rows(AnsweredTiles(tiles, labels, p[:, ::-1], embedding), 0.0)) == 0
