"""What the tests share: the project's folder, and real EuroSAT where it is present."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from eurosat_mlops.core import Settings
from eurosat_mlops.fetch import fetch_eurosat

os.environ.setdefault("MPLBACKEND", "agg")
# gcsfs asks over gRPC what kind of bucket it has, and remembers this when it is imported; the emulator speaks no gRPC
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.fixture(scope="session")
def project() -> Path:
    "The root of the checkout."
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def archive(project: Path) -> Path:
    "EuroSAT's real archive; a test that needs it is skipped where there is none."
    path = Path(os.environ.get("EUROSAT_ARCHIVE") or project.parent / "shared" / "data" / "EuroSAT_RGB.zip")
    if not path.exists():
        pytest.skip("EuroSAT is not here; name its zip or folder in EUROSAT_ARCHIVE")
    return path


@pytest.fixture(scope="session")
def eurosat_settings(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    "A project in which EuroSAT was fetched and packed, once for all tests; they only read it."
    root = tmp_path_factory.mktemp("eurosat")
    places = {"data_dir": root / "data", "runs_dir": root / "runs", "models_dir": root / "models"}
    settings = Settings(root, archive=str(archive), log_level="ERROR", **places)
    fetch_eurosat(settings)
    yield settings
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle trained on synthetic tiles for a moment, and evaluated; copy it before you change it."
    from eurosat_mlops.learner import TrainConfig  # here, since most tests need no torch
    from eurosat_mlops.runs import evaluate, train

    root = tmp_path_factory.mktemp("trained")
    settings = Settings(root, runs_dir=root / "runs", data_dir=root / "data", wandb="off", log_level="ERROR")
    run = train(TrainConfig(data="synthetic", epochs=2, bs=64, ema=0.9, wandb="off", device="cpu"), settings=settings)
    return evaluate(run.folder, settings=settings).bundle.folder
