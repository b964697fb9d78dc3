"""The peers of a benchmark really train, are judged alike, and what they did not reach is said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eurosat_mlops.core import EurosatError
from eurosat_mlops.peers import (
    PEERS,
    STARTERS,
    STEPS,
    Enough,
    Parts,
    Race,
    Stretches,
    Task,
    open_folder,
    pack_folder,
    picture_loader,
    train_loop,
    write_pictures,
)
from eurosat_mlops.races import measure_shares, rate_ratio, reached, run_race, running, tell_reached, times_faster
from eurosat_mlops.synthetic import make_synthetic


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = write_pictures(make_synthetic(per_class=6, size=32), tmp_path_factory.mktemp("task") / "pictures")
    pack_folder(folder, 1)
    return Task(folder, epochs=1, bs=8, threads=1, workers=0)


def race(task: Task, limit: float = 600.0, every: int = 16) -> Race:
    tiles, labels = open_folder(task.folder).part("val")
    return Race(tiles[:], labels, limit, every)


@pytest.mark.parametrize("name", [*PEERS, "tilenet_s"])
def test_every_peer_trains_an_epoch_and_is_judged_on_the_way(task: Task, name: str) -> None:
    STARTERS[name](task, clock := race(task))
    full = len(open_folder(task.folder).parts["train"]) // 8 * 8
    assert clock.images == full and len(clock.curve) == full // 16
    seconds = [s for s, _ in clock.curve]
    assert seconds == sorted(seconds) and all(0 <= accuracy <= 1 for _, accuracy in clock.curve)


def test_a_limit_ends_a_training_wherever_it_is(task: Task) -> None:
    for name in ("ours, tilenet_s", "Lightning, resnet18", "plain loop, resnet18"):
        clock = race(task, limit=1e-6)
        with pytest.raises(Enough):
            STARTERS[name](replace(task, epochs=1000), clock)
        assert clock.images == 8 and len(clock.curve) == 1


def test_all_ways_of_the_loop_see_the_same_tiles(task: Task) -> None:
    wanted = sorted(float(x) for x in open_folder(task.folder).part("train")[0][:].mean((1, 2, 3)))
    for stored in (False, True):
        loader = picture_loader(replace(task, bs=1), stored)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        seen = sorted(float((255 * (x[0] * std + mean)).mean()) for x, _ in loader)
        assert np.allclose(seen, wanted, atol=1.0), "our decoder may differ from Pillow's by a rounding"
    switched = [sum((p.stored, p.batched, p.channels_last, p.bf16, p.arch != "resnet18")) for p in STEPS.values()]
    assert switched == [1, 2, 3, 4, 5], "one thing at a time"


def test_what_a_peer_waits_for_is_not_counted(task: Task) -> None:
    class Link:
        def __init__(self) -> None:
            self.rates: list[float] = []

        def send(self, rate: float) -> None:
            self.rates.append(rate)

        def recv(self) -> float | None:
            return 0.02 if len(self.rates) < 3 else None

    clock = Stretches(link := Link())
    with pytest.raises(Enough):
        train_loop(replace(task, epochs=1000), clock, Parts(True, True, arch="tilenet_s"))
    assert len(link.rates) == 3 and min(link.rates) > 0


def test_a_target_that_was_not_reached_is_said() -> None:
    quick = {"curve": [[1.0, 0.4], [2.0, 0.85]]}
    slow = {"curve": [[30.0, 0.2], [60.0, 0.4]]}
    assert reached(quick["curve"], 0.8) == 2.0 and tell_reached(quick, 0.8) == "2 s"
    assert reached(slow["curve"], 0.8) is None and tell_reached(slow, 0.8) == "not in 60 s (40.0%)"
    assert times_faster(quick, slow, 0.8) == (30.0, True), "no more than a lower bound is known"
    assert times_faster(slow, quick, 0.8) == (None, False)
    rows = [{"peer": "a", "rates": [4.0, 2.0]}, {"peer": "b", "rates": [2.0, 0.5]}]
    assert rate_ratio(rows, "a", "b") == (2.0, 3.0, 4.0)


def test_a_race_runs_in_a_process_of_its_own_and_a_failing_peer_says_why(task: Task, tmp_path: Path) -> None:
    found = run_race("plain loop, resnet18", task, 600.0)
    assert found["images"] == 40 and found["memory_mb"] > 100 and found["joules"] is None
    assert len(found["curve"]) >= 2 and found["energy"].startswith("not measured")
    with pytest.raises(EurosatError, match=r"plain loop, resnet18: .*tiles\.npy"):
        run_race("plain loop, resnet18", replace(task, folder=tmp_path), 600.0)
    with pytest.raises(EurosatError, match="peer: got 'someone'"), running("someone", task):
        pass


def test_a_share_reads_its_part_of_the_batch(tmp_path: Path) -> None:
    rows = measure_shares(tmp_path, tiles=2000, bs=64, batches=3, processes=(1, 4))
    mb = {(row["processes"], row["announced"]): row["mb"] for row in rows}
    if not mb[1, True]:
        pytest.skip("this disk does not tell what is read from it")
    assert 64 * 12_288 / 1e6 <= mb[1, True] < 2 * 64 * 12_288 / 1e6 and mb[4, True] < 0.5 * mb[1, True]
    assert mb[1, False] >= mb[1, True] and not list(tmp_path.iterdir())
