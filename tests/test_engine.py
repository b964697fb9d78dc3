"""The engine: in time or not at all, one answer for one tile, and models that change under load."""

import asyncio
import gc
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eurosat_mlops.bundle import update_bundle
from eurosat_mlops.core import EurosatError, Settings
from eurosat_mlops.engine import DeadlinePassed, Engine, EngineBusy, EngineClosed, open_model


@pytest.fixture(scope="module")
def two(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    "Two bundles with different ids and the same graph."
    other = tmp_path_factory.mktemp("other") / "bundle"
    shutil.copytree(bundle_folder, other)
    update_bundle(other, {"created": "2026-01-01T00:00:00Z"}, {})
    return bundle_folder, other


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, models_dir=tmp_path / "models")


def some_tiles(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def test_answers_are_those_of_the_classifier_bit_for_bit(two: tuple[Path, Path], settings: Settings) -> None:
    "Alone, in any company, and after a thousand others."

    async def run() -> None:
        engine = Engine(settings, open_model(two[0], settings), threads=2)
        tiles = some_tiles(1000)
        alone = engine.active.classifier.predict(tiles[:3])
        found = [(await engine.predict(tile[None])).answers for tile in tiles[:3]]
        for i in range(0, 1000, 250):
            await asyncio.gather(*(engine.predict(tile[None]) for tile in tiles[i : i + 250]))
        after = (await engine.predict(tiles[:200])).answers
        for i in range(3):
            assert np.array_equal(found[i].probabilities[0], alone.probabilities[i])
            assert np.array_equal(after.probabilities[i], alone.probabilities[i])
            assert after.distance[i] == alone.distance[i]
        await engine.close()

    asyncio.run(run())


def test_a_full_queue_refuses_and_recovers(two: tuple[Path, Path], settings: Settings) -> None:
    async def run() -> None:
        engine = Engine(settings, open_model(two[0], settings), threads=1, queue=64)
        tiles = some_tiles(1)
        asked = await asyncio.gather(*(engine.predict(tiles) for _ in range(500)), return_exceptions=True)
        kinds = Counter(type(result).__name__ for result in asked)
        assert kinds == {"Result": 64, "EngineBusy": 436}
        with pytest.raises(EngineBusy, match="64 may wait"):
            await engine.predict(some_tiles(65))
        assert engine.pump.waiting == engine.pump.running == 0
        assert len((await engine.predict(some_tiles(64))).answers) == 64
        await engine.close()

    asyncio.run(run())


def test_who_gave_up_costs_nothing(two: tuple[Path, Path], settings: Settings) -> None:
    async def run() -> None:
        engine = Engine(settings, open_model(two[0], settings), threads=1, batch=8, queue=2000)
        late = [asyncio.create_task(engine.predict(some_tiles(8), deadline_s=0.02)) for _ in range(200)]
        done = await asyncio.gather(*late, return_exceptions=True)
        kinds = Counter(type(result).__name__ for result in done)
        assert "DeadlinePassed" in kinds and set(kinds) <= {"Result", "DeadlinePassed"}
        task = asyncio.create_task(engine.predict(some_tiles(8)))
        await asyncio.sleep(0)
        task.cancel()
        await engine.drain()
        assert engine.pump.waiting == 0
        with pytest.raises(DeadlinePassed, match=r"0\.0001 s"):
            await engine.predict(some_tiles(64), deadline_s=0.0001)
        await engine.close()

    asyncio.run(run())


def memory() -> float:
    "MB that this process holds."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_swaps_under_load_lose_nothing_and_leak_nothing(two: tuple[Path, Path], settings: Settings) -> None:
    async def run() -> None:
        engine = Engine(settings, open_model(two[0], settings), threads=2)
        stop, answered = asyncio.Event(), Counter[str]()

        async def ask() -> None:
            while not stop.is_set():
                answered[(await engine.predict(some_tiles(4))).version] += 1

        asking = [asyncio.create_task(ask()) for _ in range(4)]
        sizes = []
        for i in range(30):
            await engine.activate(two[(i + 1) % 2])
            sizes.append(memory())
        stop.set()
        await asyncio.gather(*asking)
        assert len(answered) == 2 and min(answered.values()) > 5
        gc.collect()
        assert max(sizes[20:]) < 1.1 * max(sizes[:10])
        await engine.close()

    asyncio.run(run())


def test_a_bad_bundle_leaves_the_old_one_serving(two: tuple[Path, Path], settings: Settings, tmp_path: Path) -> None:
    flipped = tmp_path / "flipped"
    shutil.copytree(two[1], flipped)
    content = bytearray((flipped / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (flipped / "model.onnx").write_bytes(content)

    async def run() -> None:
        engine = Engine(settings, open_model(two[0], settings), threads=1)
        for change in (engine.activate, engine.set_shadow, engine.set_canary):
            with pytest.raises(EurosatError, match="differs from the manifest"):
                await change(flipped)
            assert list(engine.models()) == ["primary"]
        assert (await engine.predict(some_tiles(1))).version == engine.active.version
        await engine.close()

    asyncio.run(run())


def test_shadow_and_canary(two: tuple[Path, Path], settings: Settings) -> None:
    async def run() -> None:
        engine = Engine(settings, open_model(two[0], settings), threads=1)
        first = engine.active.version
        await engine.set_canary(two[1], 0.25)
        await engine.set_shadow(two[1])
        second = engine.models()["canary"].version
        results = [await engine.predict(some_tiles(1)) for _ in range(40)]
        assert Counter((r.role, r.version) for r in results) == {("primary", first): 30, ("canary", second): 10}
        shadows = [await r.shadow for r in results if r.shadow]
        assert len(shadows) == 40 and {(s.role, s.version) for s in shadows if s} == {("shadow", second)}
        assert await engine.activate(second) is engine.models()["canary"]
        await engine.set_canary(None)
        await engine.set_shadow(None)
        assert (await engine.predict(some_tiles(1))).shadow is None
        with pytest.raises(EurosatError, match="share"):
            await engine.set_canary(two[0], 1.5)
        await engine.close()

    asyncio.run(run())


def test_closing_answers_what_was_asked_and_refuses_the_rest(two: tuple[Path, Path], settings: Settings) -> None:
    async def run() -> None:
        engine = Engine(settings, open_model(two[0], settings), threads=1)
        asked = [asyncio.create_task(engine.predict(some_tiles(1))) for _ in range(100)]
        await asyncio.sleep(0)
        await engine.close()
        assert len([await task for task in asked]) == 100
        with pytest.raises(EngineClosed):
            await engine.predict(some_tiles(1))

    asyncio.run(run())


def test_an_explanation_has_the_size_of_the_tile(two: tuple[Path, Path], settings: Settings) -> None:
    async def run() -> None:
        engine = Engine(settings, open_model(two[0], settings), threads=1, queue=60)
        tile = some_tiles(1)[0]
        found = await engine.explain(tile)
        assert np.array_equal(found, engine.active.classifier.explain(tile[None])[0])
        with pytest.raises(DeadlinePassed):
            await engine.explain(tile, deadline_s=0.0001)
        await engine.drain()
        both = await asyncio.gather(engine.explain(tile), engine.explain(tile), return_exceptions=True)
        assert [type(result).__name__ for result in both] == ["ndarray", "EngineBusy"]
        await engine.close()

    asyncio.run(run())
