"""The gate to production: its statistics, each of its checks, what can be waived, races and the way back."""

import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from eurosat_mlops.bands import EUROSAT_RGB, contract_to_dict
from eurosat_mlops.bundle import Bundle, to_arrays, write_bundle
from eurosat_mlops.core import EurosatError, Settings, load_settings
from eurosat_mlops.gate import (
    FIRM,
    SOFT,
    Check,
    checks_table,
    compare_answers,
    compare_counts,
    gate,
    promote,
    rollback,
)
from eurosat_mlops.registry import Event, Registry
from eurosat_mlops.session import answer, open_session
from eurosat_mlops.signing import make_key_pair, sign_version

TEST = "test, random"
LABELS = np.random.default_rng(5).integers(0, 3, 2000)
GOLDEN = np.zeros((3, 64, 64, 3), dtype=np.uint8)
GOLDEN[np.arange(3), :, :, np.arange(3)] = 60


def colour_graph(gain: float = 0.1, output: str = "probabilities") -> bytes:
    "The brightest channel wins."
    nodes = [
        helper.make_node("Cast", ["tiles"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["embedding"], keepdims=0),
        helper.make_node("Mul", ["embedding", "gain"], ["logits"]),
        helper.make_node("Softmax", ["logits"], [output], axis=-1),
    ]
    tiles = helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["N", 64, 64, 3])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in (output, "embedding")]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("gain", TensorProto.FLOAT, [1], [gain]),
    ]
    graph = helper.make_graph(nodes, "colours", [tiles], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


RECORDED = answer(open_session(colour_graph()), GOLDEN)[0]
Make = Callable[..., Bundle]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    "Makes bundles that differ in what a test says, with wrong answers on the tiles `wrong`."

    def one(
        wrong: range = range(100),
        labels: np.ndarray = LABELS,
        part: str = TEST,
        graphs: dict[str, bytes] | None = None,
        **changes: Any,
    ) -> Bundle:
        predicted = labels.copy()
        predicted[list(wrong)] = (predicted[list(wrong)] + 1) % 3
        value = float((predicted == labels).mean())
        figure = {"value": value, "low": value - 0.01, "high": min(1.0, value + 0.01)}
        report = {"n": len(labels), "accuracy": figure, "macro_f1": figure, "ece": 0.01}
        info = {
            "classes": ["Forest", "Pasture", "River"],
            "contract": contract_to_dict(EUROSAT_RGB),
            "temperature": 1.0,
            "precision": "fp32",
            "limits": {"confidence": 0.6, "distance": 20.0},
            "metrics": {"validation": report, part: report},
            "config": {"arch": "brightest_channel"},
            "data": {"name": "eurosat", "split": "random", "digest": "0" * 64},
            "graphs": {"fp32": {"bytes": 500}},
            "licence": {"weights": "Apache-2.0", "data": "MIT"},
            "provenance": {},
            "created": "2026-01-01T00:00:00Z",
        }
        arrays = {"golden_tiles": GOLDEN, "golden_labels": np.arange(3), "golden_probabilities": RECORDED}
        answers = {f"{part}/labels": labels.astype(np.int16), f"{part}/predicted": predicted.astype(np.int16)}
        files = {"model.onnx": colour_graph(), "weights.safetensors": b"weights", **(graphs or {})}
        files |= {"reference.npz": to_arrays(arrays), "answers.npz": to_arrays(answers)}
        number = len(list(tmp_path.glob("bundle-*")))
        return write_bundle(tmp_path / f"bundle-{number}", info | changes, files)

    return one


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "store"), tmp_path / "cache")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(root=tmp_path, gate_latency_ms=1000.0)


def go(registry: Registry, bundle: Bundle, settings: Settings, alias: str = "production", **given: Any) -> Event:
    registry.add(bundle.folder)
    return promote(registry, bundle.id, alias, settings=settings, **{"who": "tester", "why": "try", **given})


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def look(registry: Registry, bundle: Bundle, settings: Settings, test: str = "") -> list[Check]:
    registry.add(bundle.folder)
    return gate(registry, bundle.id, settings, test)


# the statistics


def test_the_exact_test_agrees_with_whole_numbers() -> None:
    for lost, won in [(0, 0), (1, 0), (5, 0), (6, 0), (0, 9), (30, 60), (60, 30), (45, 40), (700, 650)]:
        found, m = compare_counts(5400, lost, won), lost + won
        exact = sum(math.comb(m, k) for k in range(lost, m + 1)) / 2**m
        assert found.p == pytest.approx(exact, rel=1e-9)
        assert found.worse == (exact < 0.025), (lost, won)
        assert found.low <= found.difference <= found.high


def test_the_interval_is_that_of_clopper_and_pearson() -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy comes with the train extra")
    for lost, won in [(1, 0), (0, 9), (30, 60), (60, 30), (700, 650)]:
        share = stats.binomtest(lost, lost + won).proportion_ci(0.95)
        found, differ = compare_counts(5400, lost, won), (lost + won) / 5400
        assert found.low == pytest.approx(differ * (1 - 2 * share.high), abs=1e-9)
        assert found.high == pytest.approx(differ * (1 - 2 * share.low), abs=1e-9)


def refusals(loss: float, differ: float, draws: int = 1000, tiles: int = 5400) -> float:
    "The share of candidates that are refused, when they are truly worse by `loss`."
    rng = np.random.default_rng(0)
    shares = [differ / 2 + loss, differ / 2, 1 - differ - loss]
    pairs, counts = np.unique(rng.multinomial(tiles, shares, draws)[:, :2], axis=0, return_counts=True)
    worse = [compare_counts(tiles, lost, won).worse for lost, won in pairs.tolist()]
    return float(np.dot(worse, counts) / draws)


@pytest.mark.parametrize("differ", [0.005, 0.015, 0.04])
def test_an_equally_good_model_is_refused_at_most_once_in_forty(differ: float) -> None:
    assert refusals(0.0, differ) < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 1000)


def test_a_clear_loss_is_refused_and_a_gain_never() -> None:
    assert refusals(0.005, 0.015) > 0.65 and refusals(0.01, 0.015) > 0.98
    assert refusals(-0.003, 0.015) < 0.001


def test_tiles_are_compared_one_by_one() -> None:
    labels, old, new = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0]), np.array([0, 0, 1, 2, 1])
    found = compare_answers(labels, new, old)
    assert (found.tiles, found.lost, found.won, found.difference) == (5, 1, 1, 0.0)


# one bundle


def test_the_first_version_passes_every_check_and_the_event_keeps_them(
    make: Make, registry: Registry, settings: Settings
) -> None:
    event = go(registry, make(), settings, why="the first")
    assert registry.resolve("production") == event.id
    (kept,) = registry.history("production")
    assert (kept.who, kept.why, kept.number) == ("tester", "the first", 1)
    assert {check["name"] for check in kept.checks} == {*FIRM, *SOFT} - {"signature"}
    assert all(check["passed"] and not check["waived"] for check in kept.checks)


def test_a_bundle_that_does_not_verify_moves_nowhere(make: Make, registry: Registry, settings: Settings) -> None:
    bundle = make()
    registry.add(bundle.folder)
    weights = registry.fetch(bundle.id) / "weights.safetensors"
    weights.unlink()
    weights.write_bytes(b"weighty")
    assert failed(gate(registry, bundle.id, settings)) == ["verify"]
    for alias in ("staging", "production"):
        with pytest.raises(EurosatError, match=r"(?s)not promoted.*FAILED +verify.*weights"):
            promote(registry, bundle.id, alias, who="tester", why="try", settings=settings)
    assert registry.aliases() == {}


@pytest.mark.parametrize(
    "graphs, said",
    [
        ({"model.onnx": b"not a graph"}, "fp32: golden tiles cannot be answered"),
        ({"model.onnx": colour_graph(output="scores")}, "fp32: golden tiles cannot be answered"),
        ({"model.onnx": colour_graph(gain=-0.1)}, "fp32: golden tile 0 is answered Pasture, expected Forest"),
        ({"model.onnx": colour_graph(gain=0.0)}, "is answered Forest, expected Pasture"),
        ({"model.onnx": colour_graph(gain=0.09)}, "fp32: probabilities differ by"),
        ({"model.onnx": colour_graph(gain=math.nan)}, "fp32:"),
        ({"model.int8.onnx": colour_graph(gain=-0.1)}, "int8: golden tile 0"),
    ],
)
def test_every_graph_must_answer_the_golden_tiles_as_recorded(
    graphs: dict[str, bytes], said: str, make: Make, registry: Registry, settings: Settings
) -> None:
    bundle = make(graphs=graphs)
    (golden,) = [check for check in look(registry, bundle, settings) if check.name == "golden"]
    assert not golden.passed and said in golden.text
    for alias in ("candidate", "production"):
        with pytest.raises(EurosatError, match="golden"):
            go(registry, bundle, settings, alias)


def test_int8_may_differ_in_its_probabilities(make: Make, registry: Registry, settings: Settings) -> None:
    assert not failed(look(registry, make(graphs={"model.int8.onnx": colour_graph(gain=0.08)}), settings))


def test_a_card_cannot_claim_more_than_its_answers_show(make: Make, registry: Registry, settings: Settings) -> None:
    report = make().info["metrics"][TEST]
    one_tile = 1 / len(LABELS)
    better = report["accuracy"] | {"value": report["accuracy"]["value"] + one_tile}
    for claim in (report | {"accuracy": better}, report | {"n": 1999}):
        bundle = make(metrics={TEST: claim})
        assert "figures" in failed(look(registry, bundle, settings))
        with pytest.raises(EurosatError, match="figures"):
            go(registry, bundle, settings, waive=SOFT)


def test_the_named_test_must_have_been_taken(make: Make, registry: Registry, settings: Settings) -> None:
    bundle = make()
    with pytest.raises(EurosatError, match="no figures for 'test, spatial', only for 'validation', 'test, random'"):
        go(registry, bundle, settings, test="test, spatial")
    untested = make(metrics={"validation": bundle.info["metrics"][TEST]})
    assert "figures" in failed(look(registry, untested, settings))
    unshown = make(metrics={"test, spatial": bundle.info["metrics"][TEST]})
    (figures,) = [c for c in look(registry, unshown, settings) if c.name == "figures"]
    assert "no answers" in figures.text


@pytest.mark.parametrize(
    "name, limit",
    [
        ("calibration", {"gate_calibration": 0.009}),
        ("latency", {"gate_latency_ms": 1e-6}),
        ("size", {"gate_megabytes": 1e-6}),
    ],
)
def test_each_limit_holds_and_can_be_waived_with_a_record(
    name: str, limit: dict[str, float], make: Make, registry: Registry, settings: Settings
) -> None:
    strict, bundle = replace(settings, **limit), make()  # type: ignore[arg-type]
    assert failed(look(registry, bundle, strict)) == [name]
    with pytest.raises(EurosatError, match=f"1 of 8 checks failed\nFAILED +{name}"):
        go(registry, bundle, strict)
    event = go(registry, bundle, strict, waive=[name], why="agreed for the pilot")
    assert [check["name"] for check in event.checks if check["waived"]] == [name]
    assert registry.history("production")[0].why == "agreed for the pilot"


def test_a_model_of_drawn_tiles_never_reaches_production(
    bundle_folder: Path, tmp_path: Path, registry: Registry, settings: Settings, make: Make
) -> None:
    found = registry.add(shutil.copytree(bundle_folder, tmp_path / "drawn"))
    assert "data" in failed(gate(registry, found, settings))
    with pytest.raises(EurosatError, match="synthetic"):
        promote(registry, found, "production", who="tester", why="try", settings=settings, waive=SOFT)
    assert promote(registry, found, "staging", who="tester", why="try", settings=settings).number == 1
    renamed = make(data={"name": "mine", "split": "random", "digest": "0", "note": "SYNTHETIC tiles"})
    assert "data" in failed(look(registry, renamed, settings))


def test_with_a_key_only_what_is_signed_with_it_is_promoted(
    make: Make, registry: Registry, settings: Settings, tmp_path: Path
) -> None:
    private, public = make_key_pair(tmp_path / "keys")
    other, _ = make_key_pair(tmp_path / "keys", "other")
    strict, bundle = replace(settings, registry_key=str(public)), make()
    with pytest.raises(EurosatError, match=r"signature +.*not signed"):
        go(registry, bundle, strict, waive=SOFT)
    sign_version(registry, bundle.id, other)
    with pytest.raises(EurosatError, match="another key"):
        go(registry, bundle, strict)
    sign_version(registry, bundle.id, private)
    assert "signature" in {check["name"] for check in go(registry, bundle, strict).checks}


# against production


def test_a_worse_version_is_refused_and_may_be_waived(make: Make, registry: Registry, settings: Settings) -> None:
    first, worse = make(), make(range(140))
    go(registry, first, settings)
    with pytest.raises(EurosatError, match=r"accuracy  -2\.00 points.*40 lost of 2,000.*") as refused:
        go(registry, worse, settings)
    assert first.id[:12] in str(refused.value) and registry.resolve("production") == first.id
    event = go(registry, worse, settings, waive=["accuracy"], why="the old one fails on snow")
    assert [check["name"] for check in event.checks if check["waived"]] == ["accuracy"]


@pytest.mark.parametrize("wrong", [range(100), range(50), range(103), range(50, 150)])
def test_a_version_that_is_not_worse_beyond_chance_passes(
    wrong: range, make: Make, registry: Registry, settings: Settings
) -> None:
    go(registry, make(), settings)
    assert go(registry, make(wrong, temperature=1.1), settings).number == 2


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"data": {"name": "eurosat", "split": "random", "digest": "1" * 64}}, "other data"),
        ({"labels": np.roll(LABELS, 1)}, "other tiles"),
        ({"labels": LABELS[:1000]}, "other tiles"),
        ({"classes": ["Forest", "Pasture", "Water"]}, "other classes"),
        ({"part": "test, spatial"}, "no answers"),
    ],
)
def test_what_cannot_be_compared_is_not_guessed(
    changes: dict[str, Any], why: str, make: Make, registry: Registry, settings: Settings
) -> None:
    bundle, other = make(), make(**changes)
    go(registry, other, settings)
    (accuracy,) = [check for check in look(registry, bundle, settings) if check.name == "accuracy"]
    assert not accuracy.passed and why in accuracy.text and "waive" in accuracy.text
    assert go(registry, bundle, settings, waive=["accuracy"]).number == 2


def test_a_production_that_cannot_be_read_is_said(make: Make, registry: Registry, settings: Settings) -> None:
    first = make()
    go(registry, first, settings)
    (registry.fetch(first.id) / "card.md").unlink()
    (accuracy,) = [c for c in look(registry, make(range(40)), settings) if c.name == "accuracy"]
    assert not accuracy.passed and "cannot be read" in accuracy.text


@pytest.mark.parametrize("name", [*FIRM, "everything"])
def test_no_waiver_for_what_must_hold(name: str, make: Make, registry: Registry, settings: Settings) -> None:
    with pytest.raises(EurosatError, match=f"waive: got '{name}', expected some of accuracy"):
        go(registry, make(), settings, waive=[name])


# races and the way back


def test_a_promotion_that_was_overtaken_is_refused(make: Make, registry: Registry, settings: Settings) -> None:
    first, second = make(), make(range(50))

    class Overtaken(Registry):
        "Somebody else promotes while this one is being checked."

        def fetch(self, ref: str) -> Path:
            if not registry.aliases():
                go(registry, first, settings, why="overtook")
            return super().fetch(ref)

    slow = Overtaken(registry.url, registry.cache)
    slow.add(second.folder)
    with pytest.raises(EurosatError):
        promote(slow, second.id, "production", who="on call", why="slow", settings=settings)
    assert [event.why for event in registry.history("production")] == ["overtook"]


def test_of_many_promotions_at_once_each_wins_or_says_so(make: Make, registry: Registry, settings: Settings) -> None:
    bundles = [make(range(100 - n)) for n in range(6)]
    for bundle in bundles:
        registry.add(bundle.folder)
    won: list[int] = []
    refused: list[str] = []

    def run(bundle: Bundle) -> None:
        try:
            won.append(go(registry, bundle, settings, "staging").number)
        except EurosatError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run, args=(bundle,)) for bundle in bundles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) + len(refused) == 6 and sorted(won) == list(range(1, len(won) + 1)) and won
    assert [event.number for event in registry.history("staging")] == sorted(won)


def test_two_rollbacks_go_two_versions_back(make: Make, registry: Registry, settings: Settings) -> None:
    a, b, c = make(), make(range(90)), make(range(80))
    for bundle in (a, b, c):
        go(registry, bundle, settings)
    for expected in (b, a):
        event = rollback(registry, "production", who="tester", why="rivers")
        assert (event.id, event.action, registry.resolve("production")) == (expected.id, "rollback", expected.id)
    with pytest.raises(EurosatError, match="no version before"):
        rollback(registry, "production", who="tester", why="more")
    go(registry, c, settings)
    assert rollback(registry, "production", who="tester", why="rivers").id == a.id


def test_a_rollback_to_a_damaged_version_is_refused(make: Make, registry: Registry, settings: Settings) -> None:
    a, b = make(), make(range(90))
    for bundle in (a, b):
        go(registry, bundle, settings)
    (registry.fetch(a.id) / "model.onnx").unlink()
    with pytest.raises(EurosatError, match=r"(?s)not rolled back.*verify"):
        rollback(registry, "production", who="tester", why="rivers")
    assert registry.resolve("production") == b.id
    with pytest.raises(EurosatError, match="no version before"):
        rollback(registry, "staging", who="tester", why="nothing there")


# around it


def test_the_table_has_a_line_for_each_check() -> None:
    lines = checks_table([Check("size", True, "1 MB"), Check("latency", False, "9 ms")]).splitlines()
    assert lines == ["ok      size     1 MB", "FAILED  latency  9 ms"] and checks_table([]) == ""


@pytest.mark.parametrize("value", ["fast", "0", "-1", "nan", "inf", ""])
def test_a_limit_that_is_no_number_is_named(value: str, tmp_path: Path) -> None:
    (tmp_path / "settings.ini").write_text(f"[eurosat]\ngate_latency_ms = {value}\nwandb = off\n")
    with pytest.raises(EurosatError, match=r"gate_latency_ms: got .* expected a number above 0"):
        load_settings(tmp_path)


def test_limits_come_from_settings_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings.ini").write_text("[eurosat]\ngate_megabytes = 12.5\nregistry_key = keys/release.pub\n")
    monkeypatch.setenv("EUROSAT_GATE_CALIBRATION", "0.05")
    found = load_settings(tmp_path)
    assert (found.gate_megabytes, found.gate_calibration, found.gate_latency_ms) == (12.5, 0.05, 5.0)
    assert found.registry_key == str(tmp_path / "keys" / "release.pub")
