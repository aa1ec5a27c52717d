"""Real faults: kill runs, fill a disk, forbid writing, start two runs at once; ``make soak``.

Everything happens in a copy of the project in a temporary folder. Results are printed, a line for each fault.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements.txt", "requirements-weights.txt")
COPIED = ("Makefile", "README.md", "pyproject.toml", *LOCKS, "notebooks", "params", "src")
TIMED = ("seconds", "patches_per_second", "time")  # differ from run to run
LONGEST = 75  # seconds until a kill
SETTINGS = ("MAKE", "MFLAGS", "NODULES_CACHE", "DATA", "PROFILE", "CELL_TIMEOUT_S", "LOCKED")  # of the shell
DISK = "12m"  # of the small disk: enough for the first files only


def copy(folder: Path) -> Path:
    """Copy the project, without its products, to a folder to run in."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(source, folder / name)
    return folder


def environment(project: Path, **changes: str) -> dict[str, str]:
    """Environment variables under which the copy's code and cache are used, as if started from a shell, not by make."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(SETTINGS)}
    return kept | {"PYTHONPATH": str(project / "src"), "LC_ALL": "C.UTF-8"} | changes


def make(project: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    """Run make on the smoke profile, whether it succeeds or fails."""
    command = ["make", f"PY={sys.executable}", "PROFILE=smoke", *arguments]
    return subprocess.run(command, cwd=project, env=environment(project, **changes), capture_output=True, text=True)


def start(project: Path, *arguments: str, **changes: str) -> subprocess.Popen:
    """Start ``make figures`` on the smoke profile in a process group of its own, its output in ``make.log``."""
    command = ["make", "figures", f"PY={sys.executable}", "PROFILE=smoke", *arguments]
    with (project / "make.log").open("w") as log:
        return subprocess.Popen(
            command, cwd=project, env=environment(project, **changes), stdout=log, stderr=log, start_new_session=True
        )


def finish(project: Path, *arguments: str, **changes: str) -> None:
    """Run ``make figures``, which must succeed."""
    code = start(project, *arguments, **changes).wait()
    assert code == 0, (project / "make.log").read_text()[-3000:]


def product(project: Path) -> dict[str, str]:
    """A hash of every table, number, head and picture that a run has made, without measured times."""
    hashes = {}
    for path in sorted([*project.glob("runs/smoke-phantom/*/*"), *project.glob("figures/smoke-phantom/*")]):
        name = str(path.relative_to(project))
        if path.suffix == ".png":
            content = np.asarray(Image.open(path).convert("RGB")).tobytes()
        elif path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str)
            content = table[[column for column in table if not any(t in column for t in TIMED)]].to_csv().encode()
        elif path.suffix == ".safetensors":
            content = path.read_bytes()
        elif path.name == "results.json" and "runs" in path.parts:
            rows = json.loads(path.read_text())["rows"]
            content = json.dumps([{k: v for k, v in row.items() if k not in TIMED} for row in rows]).encode()
        else:
            continue
        hashes[name] = hashlib.sha256(content).hexdigest()
    return hashes


def differences(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Names of the files that differ between two products."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def check_whole(project: Path) -> int:
    """Open every finished file of a run, which fails for one that is half written; return how many there are."""
    openers = {
        ".png": lambda path: Image.open(path).load(),
        ".csv": pd.read_csv,
        ".json": lambda path: json.loads(path.read_text()),
        ".choice": lambda path: json.loads(path.read_text()),
        ".ipynb": lambda path: json.loads(path.read_text())["cells"],
        ".npz": lambda path: [np.load(path, allow_pickle=False)[key] for key in np.load(path, allow_pickle=False)],
        ".npy": lambda path: np.load(path, mmap_mode="r", allow_pickle=False),
        ".safetensors": load_file,
        ".html": lambda path: path.read_text().index("</html>"),
        ".d": lambda path: path.read_text().index(":\n"),
    }
    files = [path for folder in ("runs", "figures", ".cache") for path in (project / folder).rglob("*")]
    shown = [path for path in files if path.suffix in openers and not path.name.startswith(".")]
    for path in shown:
        openers[path.suffix](path)
    return len(shown)


def processes(project: Path) -> list[int]:
    """Processes that still run the copy's code, kernels and workers included: its path is in their environment."""
    running = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            copied = f"PYTHONPATH={project / 'src'}".encode() in (path / "environ").read_bytes()
            dead = (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if copied and not dead:
            running.append(int(path.name))
    return running


def gone(project: Path, seconds: float = 15) -> float:
    """The seconds until no process of the copy is left."""
    started = time.monotonic()
    while left := processes(project):
        assert time.monotonic() - started < seconds, f"processes {left} are still running"
        time.sleep(0.2)
    return time.monotonic() - started


def executed(project: Path) -> dict[str, int]:
    """The time at which each executed notebook was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in project.glob("runs/smoke-phantom/[0-9]*.ipynb")}


def kills(project: Path, expected: dict[str, str], count: int, rng: random.Random) -> str:
    """Kill the whole process group at random moments and start again; from nothing whenever a run has finished."""
    done, ends, opened, longest = 0, 0, 0, 0.0
    while done < count:
        running, before, moment = start(project), executed(project), rng.uniform(1, LONGEST)
        try:
            assert running.wait(moment) == 0, (project / "make.log").read_text()[-3000:]
            assert differences(expected, product(project)) == []
            ends += 1
            shutil.rmtree(project / "runs")
            shutil.rmtree(project / "figures")
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            done += 1
            longest = max(longest, gone(project))
            opened += check_whole(project)
            after = executed(project)
            assert all(after[name] == when for name, when in before.items()), "finished work was done again"
            print(f"  kill {done} of {count} after {moment:.0f} s, {len(after)} notebooks done", flush=True)
    finish(project)
    assert differences(expected, product(project)) == []
    left = [path for path in project.rglob(".partial-*") if path.parent.name != "smoke-phantom"]
    assert len(left) <= 1, left
    return (
        f"{count} kills, {ends} runs finished in between; {opened} files opened, none half written; no finished "
        f"notebook run again; all processes gone within {longest:.1f} s; result byte-identical to an undisturbed run"
    )


def interrupt(project: Path) -> str:
    """Ctrl-C: one word, no traceback, no process left."""
    shutil.rmtree(project / "runs", ignore_errors=True)
    running = start(project)
    time.sleep(25)
    os.killpg(running.pid, signal.SIGINT)
    code = running.wait(30)
    seconds, text = gone(project), (project / "make.log").read_text()
    assert code != 0 and "interrupted" in text and "Traceback" not in text, text[-2000:]
    return f"prints interrupted, no traceback; all processes gone within {seconds:.1f} s"


def twice(project: Path, expected: dict[str, str]) -> str:
    """Two runs at once: the second waits and has nothing left to do."""
    shutil.rmtree(project / "runs", ignore_errors=True)
    first = start(project)
    time.sleep(3)
    with (project / "second.log").open("w") as log:
        second = subprocess.Popen(
            ["make", "figures", f"PY={sys.executable}", "PROFILE=smoke"],
            cwd=project,
            env=environment(project),
            stdout=log,
            stderr=log,
        )
    assert first.wait() == 0 and second.wait() == 0
    lines = (project / "second.log").read_text().splitlines()
    assert lines[0].startswith("waiting: another make") and "nodules run" not in "\n".join(lines)
    assert differences(expected, product(project)) == []
    return "the second says in one line that it waits, then has nothing to do; the result is the same"


@contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """Mount a small disk in memory; needs root."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def refused(project: Path) -> str:
    """Run until the disk refuses a file; return the one line that reports it."""
    code, text = start(project).wait(), (project / "make.log").read_text()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(lines) == 1 and "Traceback" not in text, text[-3000:]
    gone(project)
    check_whole(project)
    return lines[0].replace(f"{project}/", "")


def full_disk(project: Path, expected: dict[str, str]) -> str:
    """Put runs, then the cache, on a disk that is too small; then give them room again."""
    reported = []
    for folder in ("runs", ".cache"):
        shutil.rmtree(project / "runs", ignore_errors=True)
        shutil.rmtree(project / ".cache", ignore_errors=True)
        with mounted(project / folder, f"size={DISK if folder == '.cache' else '200k'}"):
            reported.append(refused(project))
    finish(project)
    assert differences(expected, product(project)) == []
    return "; ".join(f"`{line}`" for line in reported) + "; with room again, the result is the same"


def read_only(project: Path) -> str:
    """Put runs, then figures, in folders that can't be written to."""
    reported = []
    shutil.rmtree(project / "runs", ignore_errors=True)
    with mounted(project / "runs" / "smoke-phantom", "ro,size=1m"):
        reported.append(refused(project))
    finish(project)
    shutil.rmtree(project / "figures" / "smoke-phantom")
    with mounted(project / "figures" / "smoke-phantom", "ro,size=1m"):
        reported.append(refused(project))
    return "; ".join(f"`{line}`" for line in reported)


def main() -> None:
    """Cause each fault and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25, help="number of kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their moments (%(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    with tempfile.TemporaryDirectory() as folder:
        project = copy(Path(folder).resolve())
        started = time.monotonic()
        finish(project)
        expected = product(project)
        print(
            f"undisturbed: {time.monotonic() - started:.0f} s, {len(expected)} tables, heads and pictures", flush=True
        )
        rng = random.Random(arguments.seed)
        print(f"SIGKILL: {kills(project, expected, arguments.kills, rng)}", flush=True)
        print(f"SIGINT: {interrupt(project)}", flush=True)
        print(f"two at once: {twice(project, expected)}", flush=True)
        if os.geteuid() == 0 and sys.platform == "linux":
            print(f"read-only folder: {read_only(project)}", flush=True)
            print(f"full disk: {full_disk(project, expected)}", flush=True)
        else:
            print("full disk, read-only folder: skipped, because mounting a small disk needs root on Linux", flush=True)


if __name__ == "__main__":
    main()
