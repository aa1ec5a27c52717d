from pathlib import Path

import numpy as np
import pytest

import soak
from nodules import paths

REAL = paths.ROOT.parent / "shared" / "data"  # real patches for measuring, no part of the project


@pytest.fixture
def real():
    """Path of a file of real patches or labels; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        if not (REAL / name).exists():
            pytest.skip(f"real data not here: {name}")
        return REAL / name

    return find


@pytest.fixture
def own():
    """Arrays of a valid file of one's own: 40 patches in HU, 20 patients, both classes."""
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(-1000, 400, (40, 64, 64), dtype=np.int16),
        "malignant": np.arange(40) % 2,
        "patient": np.array([f"p{i // 2:02d}" for i in range(40)]),
        "diameter_mm": rng.uniform(3, 30, 40),
    }


@pytest.fixture(scope="session")
def smoke_run():
    """The folder of a finished run on the smoke profile, with its report, made where it is not there or out of date."""
    done = soak.make(paths.ROOT, "figures", "-j2", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return paths.ROOT / "runs" / "smoke-phantom"
