"""Speed and memory: measured side by side in one run and printed as ratios, never asserted."""

import importlib
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from nodules import course, paths
from nodules.data import patches, phantom, split

# Jobs import torch and fastai themselves, so that their cost is not counted for a job that merely reads a file
if TYPE_CHECKING:
    import torch

REPEATS = 3
PATCHES = 800  # N; some jobs are also measured at 4N
ARCHITECTURE = "resnet50"
MANY, SMALLEST = 100_000, "resnet34"  # patches in the largest load, and the network it is measured with
ASKED = 20  # times that a model is asked
PASSES = 0.4  # over the patches, in fine-tuning
RUNS = {
    "profile": "smoke",
    "notebooks": [course.DATA.name, course.ARCHITECTURES.name, course.RULER.name],
    "product": {"seed": list(range(10))},
}
EPOCHS, FEW, LR, TURNED = 200, 3, 1e-3, 4  # of a head; of stock fastai, scaled up; learning rate; rotated views
MEGABYTES = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss counts bytes on macOS, kilobytes on Linux
Job = tuple[Callable[..., Any], *tuple[Any, ...]]


def _measured(job: Callable[..., Any], arguments: tuple) -> dict[str, Any]:
    started = time.perf_counter()
    result = job(*arguments)
    seconds = time.perf_counter() - started
    peak = max(resource.getrusage(process).ru_maxrss for process in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": seconds, "peak": peak / MEGABYTES} | (result if isinstance(result, dict) else {})


def measure(job: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run a job in a fresh process.

    Returns:
        ``seconds``, ``peak`` memory (MB, of the largest process) and, where the job returns a dictionary, its entries;
        a job with preparations that are not to be timed returns its own ``seconds``.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_measured, job, arguments).result()


def compare(title: str, first: Job, second: Job, repeats: int = REPEATS) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure two jobs in turn, print a line of medians, their ratio and peaks, and return the last pair."""
    pairs = [(measure(*first), measure(*second)) for _ in range(repeats)]
    a, b = (median(pair[side]["seconds"] for pair in pairs) for side in (0, 1))
    ratio = median(pair[0]["seconds"] / pair[1]["seconds"] for pair in pairs)
    peaks = [max(pair[side]["peak"] for pair in pairs) for side in (0, 1)]
    print(f"{title:<72} {a:>9.2f} {b:>9.2f} {ratio:>7.2f} {peaks[0]:>8.0f} {peaks[1]:>8.0f}", flush=True)
    return pairs[-1]


@contextmanager
def _empty_cache() -> Iterator[None]:
    """From here on, keep what this process caches in a new folder; a measured job has a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NODULES_CACHE"] = folder
        yield


def _noise(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 400, (n, patches.SIDE, patches.SIDE), dtype=np.int16)


def _write(path: Path, n: int) -> None:
    np.savez(path, images=_noise(n), malignant=np.arange(n) % 2)


def _divided(part: split.Part) -> split.Parts:
    """One patch in eight selects, the others train."""
    return split.divide(part, np.where(np.arange(len(part)) % 8, "train", "valid"))


def extract(n: int) -> dict[str, Any]:
    """Seconds for a bank of ``n`` plain patches, and the sizes of both."""
    from nodules.networks import bank, bodies

    images, body = _noise(n), bodies.build(bodies.Spec(ARCHITECTURE, "random"), unit="HU")
    with _empty_cache():
        started = time.perf_counter()
        features = bank.compute(body, images).features
        return {"seconds": time.perf_counter() - started, "images": images.nbytes, "bank": features.nbytes}


def load(path: str) -> dict[str, Any]:
    """Seconds from a file to a trained head: reading, bank, two epochs."""
    from nodules.networks import bank, bodies, heads

    started = time.perf_counter()
    held = patches.read(path)
    with _empty_cache():
        body = bodies.build(bodies.Spec(SMALLEST, "random"), unit=held.card.unit)
        features = bank.compute(body, held.images)
        heads.train(features, _divided(split.whole(held)), heads.Recipe(epochs=2, lr=LR))
        return {"seconds": time.perf_counter() - started, "bank": features.features.nbytes}


def forward(n: int) -> dict[str, Any]:
    """Seconds for the same network alone on ``n`` patches, in the same precision and batches."""
    import torch

    from nodules.networks import bank, bodies

    body = bodies.build(bodies.Spec(ARCHITECTURE, "random"), unit="HU").frozen()
    batches = torch.from_numpy(_noise(n)).split(bank.FORWARD_BATCH)
    ready = [body.prepare(batch).contiguous(memory_format=torch.channels_last) for batch in batches]
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in ready:
            body(batch)[-1].mean().item()  # waits for a GPU
    return {"seconds": time.perf_counter() - started}


def fine_tune(bfloat16: bool) -> dict[str, Any]:
    """Seconds for ``PASSES`` passes through all layers and a validation, in bfloat16 where the machine has it."""
    from nodules.networks import bank, bodies, finetune, heads
    from nodules.networks.network import Network

    body = bodies.build(bodies.Spec(ARCHITECTURE, "random"), unit="HU")
    network = Network(body, "all", heads.head(bank.width(body, "all")))
    rows = np.arange(PATCHES)
    parts = _divided(split.Part(_noise(PATCHES), rows % 2, rows, pd.DataFrame({"id": rows}, index=rows), rows))
    recipe = replace(finetune.DEFAULT, bfloat16=bfloat16)
    return {"seconds": finetune.train(network, parts, recipe, epochs=PASSES, checks=1, name="bench").seconds}


def _phantom() -> tuple[split.Part, np.ndarray]:
    """The patches of the default run, and the side of the split that each is on."""
    held = patches.read("phantom")
    return split.whole(held), split.assign(held.table)["split"].to_numpy()


def ours() -> dict[str, Any]:
    """Seconds for a bank with rotated views and all epochs of a head; accuracies of that head and of a short one."""
    from nodules.networks import bank, bodies, heads

    (phantoms, sides), body = _phantom(), bodies.build(bodies.Spec(ARCHITECTURE), unit="HU")
    parts = split.divide(phantoms, sides)
    with _empty_cache():
        started = time.perf_counter()
        features = bank.compute(body, phantoms.images, kind="rotate", k=TURNED)
        extracted = time.perf_counter()
        long = heads.train(features, parts, heads.Recipe(EPOCHS, LR, augment=True))
        ended = time.perf_counter()
        short = heads.train(features, parts, heads.Recipe(FEW, LR, augment=True))
        p, q = (heads.predict(training.model, features, phantoms.rows)[:, 0] for training in (long, short))
    return {
        "seconds": ended - started,
        "extraction": extracted - started,
        "weights": body.weights.source,
        "long": _accuracies(p, phantoms.y, sides),
        "short": _accuracies(q, phantoms.y, sides),
    }


def stock() -> dict[str, Any]:
    """Seconds for ``EPOCHS`` epochs of fastai's own learner, scaled up from ``FEW``; its accuracies after those."""
    import torch
    from fastai.callback.progress import ProgressCallback  # noqa: F401  gives learners no_bar
    from fastai.data.core import Datasets
    from fastai.torch_core import TensorCategory, TensorImage, set_seed
    from fastai.vision.augment import Rotate
    from fastai.vision.learner import vision_learner
    from torch import nn
    from torchvision.models import get_model_builder

    from nodules.networks import bodies
    from nodules.networks.device import device

    (phantoms, sides), body = _phantom(), bodies.build(bodies.Spec(ARCHITECTURE), unit="HU")
    pixels, labels = body.prepare(torch.tensor(phantoms.images)), torch.tensor(phantoms.y)
    set_seed(0)
    pairs = [[lambda row: TensorImage(pixels[row])], [lambda row: TensorCategory(labels[row])]]
    rows = [np.flatnonzero(sides == side).tolist() for side in ("train", "valid")]
    dls = Datasets(range(len(phantoms)), pairs, splits=rows).dataloaders(
        bs=64, num_workers=0, after_batch=Rotate(180, p=1), device=device()
    )
    network = get_model_builder(ARCHITECTURE)
    learn = vision_learner(dls, network, normalize=False, n_out=2, pretrained=False, loss_func=nn.CrossEntropyLoss())
    # The same tensors in the same order, under other names
    names = learn.model[0].state_dict()
    learn.model[0].load_state_dict(dict(zip(names, body.net.state_dict().values(), strict=True)))
    learn.freeze()
    started = time.perf_counter()
    with learn.no_bar(), redirect_stdout(sys.stderr):  # fastai prints a line per epoch
        learn.fit(FEW, LR)
    seconds = (time.perf_counter() - started) * EPOCHS / FEW
    return {"seconds": seconds, "short": _accuracies(_probabilities(learn.model, pixels), phantoms.y, sides)}


def _probabilities(model: Any, pixels: "torch.Tensor") -> np.ndarray:
    import torch

    from nodules.networks.bank import FORWARD_BATCH
    from nodules.networks.device import device

    with torch.inference_mode():
        logits = [model.eval()(batch.to(device())).cpu() for batch in pixels.split(FORWARD_BATCH)]
    return torch.cat(logits).softmax(1)[:, 1].numpy()


def _accuracies(p: np.ndarray, y: np.ndarray, sides: np.ndarray) -> dict[str, float]:
    return {side: float(np.mean((p >= 0.5) == y, where=sides == side)) for side in ("valid", "test")}


def compare_files(folder: Path) -> None:
    """Rendering the phantom and reading a file."""
    small, large = (folder / f"{n}.npz" for n in (10 * PATCHES, 40 * PATCHES))
    # Written in other processes: on Linux a new process starts with the peak of its parent
    measure(_write, small, 10 * PATCHES)
    measure(_write, large, 40 * PATCHES)
    few, many = (round(n * 0.38) for n in (PATCHES, 4 * PATCHES))  # malignant patches
    render_n = (phantom.render, few, PATCHES - few)
    render_4n = (phantom.render, many, 4 * PATCHES - many)
    compare("render N phantom patches, 1 worker / 2 workers", (*render_n, 0, 1), (*render_n, 0, 2))
    compare("render phantom patches, 4N / N (linear: at most 4)", (*render_4n, 0, 2), (*render_n, 0, 2))
    compare("N phantom patches, render / read a file", (*render_n, 0, 2), (patches.read, str(small)))
    compare("read own file, 40N / 10N (linear: 4)", (patches.read, str(large)), (patches.read, str(small)))


def compare_extraction() -> None:
    """The feature bank: speed, memory and size."""
    title = f"{ARCHITECTURE} on 4N patches"
    compare(f"{title}, forward pass alone / bank (aim: at least 0.9)", (forward, 4 * PATCHES), (extract, 4 * PATCHES))
    large, small = compare("bank of plain patches, 4N / N (linear: 4)", (extract, 4 * PATCHES), (extract, PATCHES))
    images, bank = ((large[name] - small[name]) / 1e6 for name in ("images", "bank"))
    print(f"  at 4N, images take {images:.0f} MB more and the bank {bank:.0f} MB more. The bank is mapped into memory:")
    print("  its pages count towards the peak, though the system reclaims them when it needs memory")
    print(f"  bank: {small['bank'] / PATCHES:.0f} bytes per patch and view", flush=True)


def compare_load(folder: Path) -> None:
    """Many patches from a file to a head; the aim: time proportional to their number, memory within 4 GB."""
    half, full = (folder / f"load-{n}.npz" for n in (MANY // 2, MANY))
    measure(_write, half, MANY // 2)
    measure(_write, full, MANY)
    title = f"file, {SMALLEST} bank, head: {MANY} patches / {MANY // 2} (linear: 2; aim: 4000 MB)"
    large, _ = compare(title, (load, str(full)), (load, str(half)), repeats=1)
    print(f"  of the peak at {MANY}, {MANY * 2 * patches.SIDE**2 / 1e6:.0f} MB are images", end=" ")
    print(f"and up to {large['bank'] / 1e6:.0f} MB are pages of the bank", flush=True)


def compare_training() -> None:
    """Fine-tuning in two precisions; heads on the bank against fastai's own learner."""
    layers = f"{PASSES} epochs of all layers of {ARCHITECTURE}, float32 / bfloat16 if available"
    compare(layers, (fine_tune, False), (fine_tune, True))
    scaled = f"{EPOCHS} head epochs, stock fastai ({FEW} epochs x {EPOCHS}/{FEW}) / bank (aim: 100)"
    a, b = compare(scaled, (stock,), (ours,), repeats=1)
    print(f"  {b['weights']}, same patches, split and lr {LR:g}; {b['extraction']:.1f} s of B are the bank")
    rows = {f"stock, {FEW} epochs": a["short"], f"ours, {FEW} epochs": b["short"], f"ours, {EPOCHS} epochs": b["long"]}
    for name, accuracies in rows.items():
        print(f"  accuracy of {name:<17} valid {accuracies['valid']:.3f}  test {accuracies['test']:.3f}", flush=True)


def scan_read(folder: str) -> dict[str, Any]:
    """Seconds to read a whole DICOM scan, which is written first where it is not there."""
    from nodules.data import phantom_scan, scans

    if not Path(folder).exists():
        phantom_scan.write(phantom_scan.scan(patches.read("phantom"))[0], Path(folder))
    started = time.perf_counter()
    scans.only(Path(folder))
    return {"seconds": time.perf_counter() - started}


def answered(folder: str) -> dict[str, Any]:
    """Seconds for what a model says of one nodule in a scan that has been read, mean of ``ASKED``."""
    from nodules import model
    from nodules.data import cut, scans

    taught, scan = model.load(model.DEFAULT), scans.only(Path(folder))
    places = pd.DataFrame({"x": [250.0], "y": [250.0], "z": [30.0], "unit": ["voxel"], "nodule": ["a"]})

    def ask() -> None:
        taken = cut.at_places(scan, places)
        taught.answers(model.part_of(taken.images, taken.table))

    ask()  # the first is slower
    return {"seconds": timeit.timeit(ask, number=ASKED) / ASKED}


def imported(module: str) -> None:
    """Import a module, as a command does when it starts."""
    importlib.import_module(module)


def compare_answers(folder: Path) -> None:
    """A model that is used: how long it takes to start, and to answer."""
    scan = str(folder / "scan")
    measure(scan_read, scan)
    compare("read a DICOM scan / one nodule in it (aim: 0.1 s)", (scan_read, scan), (answered, scan))
    compare(
        "import what teaches / what answers (aim: 5 s)", (imported, "nodules.teaching"), (imported, "nodules.model")
    )


def executed(notebooks: list[str], run_dir: Path, profile: str, *parameters: str) -> None:
    """Execute notebooks, as ``make`` does: a process each, which keeps in ``run_dir`` what it found."""
    run_dir.mkdir(parents=True)
    for name in notebooks:
        command = [sys.executable, "-m", "nodules", "run", paths.NOTEBOOKS / f"{name}.ipynb", run_dir / f"{name}.ipynb"]
        command += ["--profile", paths.ROOT / "params" / f"{profile}.yaml"]
        command += [f"-p{parameter}" for parameter in (f"run_dir={run_dir}", *parameters)]
        subprocess.run(command, check=True, capture_output=True)


def reported(folder: str) -> None:
    """All notebooks on the default profile, and their report; what is cached in ``folder`` is used."""
    os.environ["NODULES_CACHE"] = folder
    with tempfile.TemporaryDirectory() as new:
        run_dir = Path(new) / "run"
        executed([lesson.name for lesson in course.LESSONS], run_dir, "demo")
        command = [sys.executable, "-m", "nodules", "report", run_dir, Path(new) / "figures"]
        subprocess.run(command, check=True, capture_output=True)


def one_by_one(folder: str) -> dict[str, Any]:
    """Seconds of the runs of a sweep, each with one thread and none beside it, divided by the cores."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as new, _empty_cache():
        started = time.perf_counter()
        for seed in RUNS["product"]["seed"]:
            executed(RUNS["notebooks"], Path(new) / str(seed), RUNS["profile"], f"seed={seed}")
        return {"seconds": (time.perf_counter() - started) / os.cpu_count()}


def swept(folder: str) -> None:
    """The same runs as one sweep, a worker on each core."""
    from nodules.tools import sweep

    with tempfile.TemporaryDirectory(dir=folder) as new, _empty_cache(), redirect_stdout(sys.stderr):
        plan = Path(new) / "bench.yaml"
        plan.write_text(yaml.safe_dump(RUNS), encoding="utf-8")
        sweep.sweep(plan, Path(new) / "figures", store=str(Path(new) / "store"))


def compare_runs(folder: Path) -> None:
    """Many notebooks: the default report, its cache empty and filled, and what a sweep costs beside its runs."""
    cache = str(folder / "cache")
    compare("the default report, cold / warm cache", (reported, cache), (reported, cache), repeats=1)
    title = f"{len(RUNS['product']['seed'])} small runs, their sum by cores / a sweep (aim: at least 0.87)"
    compare(title, (one_by_one, str(folder)), (swept, str(folder)), repeats=1)


def main() -> None:
    """Print a line after each comparison: both medians in seconds, their ratio, both peaks in MB."""
    print(f"N = {PATCHES}; medians of {REPEATS} runs (those of minutes: 1), each in a fresh process, A and B in turn")
    print(f"{'A / B':<72} {'A [s]':>9} {'B [s]':>9} {'A/B':>7} {'A [MB]':>8} {'B [MB]':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        compare_files(Path(folder))
        compare_extraction()
        compare_training()
        compare_answers(Path(folder))
        compare_load(Path(folder))
        compare_runs(Path(folder))
