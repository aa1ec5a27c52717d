"""Speed and memory, measured side by side in one run and printed as ratios; never asserted."""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from nodules import patches, phantom

REPEATS = 3
PATCHES = 800  # N; also measured at 4N
MEGABYTES = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss counts bytes on macOS, kilobytes on Linux


def _measured(job: Callable[..., Any], arguments: tuple, answer: multiprocessing.Queue) -> None:
    started = time.perf_counter()
    job(*arguments)
    seconds = time.perf_counter() - started
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    answer.put((seconds, peak / MEGABYTES))


def measure(job: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Seconds and peak memory (MB, of the largest process) of a job in a fresh process."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_measured, args=(job, arguments, answer))
    process.start()
    result = answer.get()
    process.join()
    return result


def _write(path: Path, n: int) -> None:
    images = np.random.default_rng(0).integers(-1000, 400, (n, patches.SIDE, patches.SIDE), dtype=np.int16)
    np.savez(path, images=images, malignant=np.arange(n) % 2)


def main() -> None:
    """Print one line a comparison: both medians in seconds, their ratio, both peaks in MB."""
    with tempfile.TemporaryDirectory() as name:
        small, large = (Path(name) / f"{n}.npz" for n in (10 * PATCHES, 40 * PATCHES))
        _write(small, 10 * PATCHES)
        _write(large, 40 * PATCHES)
        half, whole = (round(n * 0.38) for n in (PATCHES, 4 * PATCHES))
        render_n = (phantom.render, half, PATCHES - half)
        render_4n = (phantom.render, whole, 4 * PATCHES - whole)
        comparisons = {
            "render N phantom patches, 1 worker / 2 workers": ((*render_n, 0, 1), (*render_n, 0, 2)),
            "render phantom patches, 4N / N (linear: at most 4)": ((*render_4n, 0, 2), (*render_n, 0, 2)),
            "N phantom patches, render / read a file": ((*render_n, 0, 2), (patches.read, str(small))),
            "read own file, 40N / 10N (linear: 4)": ((patches.read, str(large)), (patches.read, str(small))),
        }
        rows = []
        for what, (first, second) in comparisons.items():
            pairs = [(measure(*first), measure(*second)) for _ in range(REPEATS)]
            a, b = (median(pair[side][0] for pair in pairs) for side in (0, 1))
            ratio = median(pair[0][0] / pair[1][0] for pair in pairs)
            peaks = [max(pair[side][1] for pair in pairs) for side in (0, 1)]
            rows.append((what, a, b, ratio, *peaks))
    columns = ["comparison", "A [s]", "B [s]", "A/B", "peak A [MB]", "peak B [MB]"]
    print(f"N = {PATCHES}, medians of {REPEATS} runs each in a fresh process, A and B in turn")
    print(pd.DataFrame(rows, columns=columns).to_string(index=False, float_format="{:.2f}".format))
