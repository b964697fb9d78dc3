"""When an answer is not to be trusted."""

import numpy as np
import pytest

from eurosat_mlops.core import EurosatError
from eurosat_mlops.reference import coverage_limit, familiar_distance, fit_clouds

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95, 1.0])
def test_the_limit_keeps_the_coverage_that_was_asked_for(coverage):
    confidence = RNG.random(1000)
    limit = coverage_limit(confidence, coverage)
    assert coverage <= (confidence >= limit).mean() <= coverage + 0.002


def test_equal_confidences_are_all_kept():
    assert coverage_limit(np.full(10, 0.7), 0.5) == 0.7


@pytest.mark.parametrize("coverage", [0, -1, 1.1, float("nan")])
def test_an_impossible_coverage_is_refused(coverage):
    with pytest.raises(EurosatError, match="coverage"):
        coverage_limit(RNG.random(10), coverage)


def test_distance_is_mahalanobis_of_unit_embeddings():
    labels, embedding = RNG.integers(0, 3, 500), RNG.normal(size=(500, 6)) + 2
    centers, whitening = fit_clouds(embedding, labels, shrinkage=1e-9)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    means = np.stack([unit[labels == k].mean(0) for k in range(3)])
    spread = unit - means[labels]
    inverse = np.linalg.inv(spread.T @ spread / len(spread))
    expected = [min(np.sqrt((u - m) @ inverse @ (u - m)) for m in means) for u in unit[:20]]
    assert familiar_distance(embedding[:20], centers, whitening) == pytest.approx(expected, rel=1e-3)


def test_distance_does_not_depend_on_length_and_stands_more_directions_than_tiles():
    labels, embedding = np.arange(20) % 2, RNG.normal(size=(20, 50))
    clouds = fit_clouds(embedding, labels)
    distance = familiar_distance(embedding, *clouds)
    assert np.isfinite(distance).all()
    assert familiar_distance(embedding * 7, *clouds) == pytest.approx(distance, rel=1e-4)
    assert np.isfinite(familiar_distance(np.zeros((1, 50)), *clouds)).all()
