"""What the tests share: the project's folder, and real EuroSAT where it is present."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "agg")


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
