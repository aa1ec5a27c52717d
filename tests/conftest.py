import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from playwright.sync_api import sync_playwright

import soak
from nodules import paths

REAL = paths.ROOT.parent / "shared" / "data"  # real patches for measuring, no part of the project
LONGEST = ("test_matrix", "test_notebooks")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]


# The same examples in each run
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, since each is run in one process."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def browser():
    """The system's browser; the test is skipped where there is none."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser here: {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
        yield browser
        browser.close()


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
