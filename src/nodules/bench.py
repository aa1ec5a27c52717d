"""Speed and memory, measured side by side in one run and printed as ratios; never asserted."""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from nodules import patches, paths, phantom, split

# Jobs import torch and fastai themselves: a job that reads a file shall pay for neither, in time or memory
if TYPE_CHECKING:
    import torch

REPEATS = 3
PATCHES = 800  # N; also measured at 4N
ARCHITECTURE = "resnet50"
MANY, SMALLEST = 100_000, "resnet34"  # patches of the largest load, and the network that it is measured with
STEPS = 9  # of all layers
EPOCHS, FEW, LR, TURNED = 200, 3, 1e-3, 4  # of a head; of stock fastai, scaled; learning rate; turned views
MEGABYTES = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss counts bytes on macOS, kilobytes on Linux
Job = tuple[Callable[..., Any], *tuple[Any, ...]]


def _measured(job: Callable[..., Any], arguments: tuple) -> dict[str, Any]:
    started = time.perf_counter()
    told = job(*arguments)
    seconds = time.perf_counter() - started
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": seconds, "peak": peak / MEGABYTES} | (told if isinstance(told, dict) else {})


def measure(job: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run a job in a fresh process.

    Returns:
        ``seconds`` and ``peak`` memory (MB, of the largest process), and what the job itself tells as a dictionary;
        a job that prepares something first tells its own ``seconds``.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_measured, job, arguments).result()


def compare(what: str, first: Job, second: Job, repeats: int = REPEATS) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure two jobs in turn, print a line of medians, their ratio and peaks, and return the last pair."""
    pairs = [(measure(*first), measure(*second)) for _ in range(repeats)]
    a, b = (median(pair[side]["seconds"] for pair in pairs) for side in (0, 1))
    ratio = median(pair[0]["seconds"] / pair[1]["seconds"] for pair in pairs)
    peaks = [max(pair[side]["peak"] for pair in pairs) for side in (0, 1)]
    print(f"{what:<72} {a:>9.2f} {b:>9.2f} {ratio:>7.2f} {peaks[0]:>8.0f} {peaks[1]:>8.0f}", flush=True)
    return pairs[-1]


def _noise(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 400, (n, patches.SIDE, patches.SIDE), dtype=np.int16)


def _write(path: Path, n: int) -> None:
    np.savez(path, images=_noise(n), malignant=np.arange(n) % 2)


def extract(n: int) -> dict[str, Any]:
    """Seconds of a bank of ``n`` plain patches, with the sizes of what it holds."""
    from nodules import features, models

    images, body = _noise(n), models.body(ARCHITECTURE, "random")
    with tempfile.TemporaryDirectory() as folder:
        paths.CACHE = Path(folder)
        started = time.perf_counter()
        bank = features.bank(body, images)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "images": images.nbytes, "bank": bank.features.nbytes}


def load(path: str) -> dict[str, Any]:
    """Seconds from a file to a trained head: reader, bank, two epochs."""
    from nodules import features, learners, models

    started = time.perf_counter()
    found = patches.read(path)
    with tempfile.TemporaryDirectory() as folder:
        paths.CACHE = Path(folder)
        bank = features.bank(models.body(SMALLEST, "random", unit=found.card.unit), found.images)
        parts = np.where(np.arange(len(found)) % 8, "train", "valid")
        learners.train(bank, found.table["malignant"].to_numpy(), parts, epochs=2, lr=LR)
        return {"seconds": time.perf_counter() - started, "bank": bank.features.nbytes}


def forward(n: int) -> dict[str, Any]:
    """Seconds of the same network alone on ``n`` patches, in the same precision and batches."""
    import torch

    from nodules import features, models

    body = models.body(ARCHITECTURE, "random").eval().to(features.device(), memory_format=torch.channels_last)
    batches = torch.from_numpy(_noise(n)).split(features.BATCH)
    ready = [body.prepare(batch).contiguous(memory_format=torch.channels_last) for batch in batches]
    precision = torch.autocast(features.device().type, torch.bfloat16, enabled=features.has_bfloat16())
    started = time.perf_counter()
    with torch.inference_mode(), precision:
        for batch in ready:
            body(batch)[-1].mean().item()  # waits for a GPU
    return {"seconds": time.perf_counter() - started}


def fine_tune(precision: str) -> dict[str, Any]:
    """Seconds of ``STEPS`` steps of all layers, and their validations, in ``float32`` or as the machine does best."""
    from nodules import features, learners, models, whole

    if precision == "float32":
        whole.has_bfloat16 = lambda: False
    body = models.body(ARCHITECTURE, "random")
    network = whole.Network(body, "all", learners.head(features.width(body, "all")))
    images, parts = _noise(PATCHES), np.where(np.arange(PATCHES) % 8, "train", "valid")
    about = {"steps": STEPS, "budget": whole.Budget(1, 1), "name": precision}
    return {"seconds": whole.train(network, images, np.arange(PATCHES) % 2, parts, whole.DEFAULT, **about).seconds}


def _phantom() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels and splits of the default run."""
    found = patches.read("phantom")
    return found.images, found.table["malignant"].to_numpy(), split.assign(found.table)["split"].to_numpy()


def ours() -> dict[str, Any]:
    """Seconds of a bank with turned views and all epochs of a head on it; accuracies of that head and a short one."""
    from nodules import features, learners, models

    (images, y, parts), body = _phantom(), models.body(ARCHITECTURE)
    with tempfile.TemporaryDirectory() as folder:
        paths.CACHE = Path(folder)
        started = time.perf_counter()
        bank = features.bank(body, images, kind="rotate", k=TURNED)
        extracted = time.perf_counter()
        long = learners.train(bank, y, parts, epochs=EPOCHS, lr=LR, draw=True)
        ended = time.perf_counter()
        short = learners.train(bank, y, parts, epochs=FEW, lr=LR, draw=True)
        p, q = (learners.predict(one.model, bank, np.arange(len(y)))[:, 0] for one in (long, short))
    return {
        "seconds": ended - started,
        "extraction": extracted - started,
        "weights": body.weights.source,
        "long": _accuracies(p, y, parts),
        "short": _accuracies(q, y, parts),
    }


def stock() -> dict[str, Any]:
    """Seconds of ``EPOCHS`` epochs of fastai's own learner, scaled from ``FEW``, and its accuracies after those."""
    import torch
    from fastai.callback.progress import ProgressCallback  # noqa: F401  gives learners no_bar
    from fastai.data.core import Datasets
    from fastai.torch_core import TensorCategory, TensorImage, set_seed
    from fastai.vision.augment import Rotate
    from fastai.vision.learner import vision_learner
    from torch import nn
    from torchvision.models import get_model_builder

    from nodules import features, models

    (images, y, parts), body = _phantom(), models.body(ARCHITECTURE)
    pixels, labels = body.prepare(torch.tensor(images)), torch.tensor(y)
    set_seed(0)
    pairs = [[lambda row: TensorImage(pixels[row])], [lambda row: TensorCategory(labels[row])]]
    rows = [np.flatnonzero(parts == part).tolist() for part in ("train", "valid")]
    dls = Datasets(range(len(y)), pairs, splits=rows).dataloaders(
        bs=64, num_workers=0, after_batch=Rotate(180, p=1), device=features.device()
    )
    network = get_model_builder(ARCHITECTURE)
    learn = vision_learner(dls, network, normalize=False, n_out=2, pretrained=False, loss_func=nn.CrossEntropyLoss())
    # The same tensors in the same order, by other names
    names = learn.model[0].state_dict()
    learn.model[0].load_state_dict(dict(zip(names, body.net.state_dict().values(), strict=True)))
    learn.freeze()
    started = time.perf_counter()
    with learn.no_bar(), redirect_stdout(sys.stderr):  # an epoch's line as progress, beside the table
        learn.fit(FEW, LR)
    seconds = (time.perf_counter() - started) * EPOCHS / FEW
    return {"seconds": seconds, "short": _accuracies(_probabilities(learn.model, pixels), y, parts)}


def _probabilities(model: Any, pixels: "torch.Tensor") -> np.ndarray:
    import torch

    from nodules import features

    with torch.inference_mode():
        logits = [model.eval()(part.to(features.device())).cpu() for part in pixels.split(features.BATCH)]
    return torch.cat(logits).softmax(1)[:, 1].numpy()


def _accuracies(p: np.ndarray, y: np.ndarray, parts: np.ndarray) -> dict[str, float]:
    return {part: float(np.mean((p >= 0.5) == y, where=parts == part)) for part in ("valid", "test")}


def compare_files(folder: Path) -> None:
    """The phantom and the reader."""
    small, large = (folder / f"{n}.npz" for n in (10 * PATCHES, 40 * PATCHES))
    # In processes of their own: on Linux a new process starts with the peak of the one that starts it
    measure(_write, small, 10 * PATCHES)
    measure(_write, large, 40 * PATCHES)
    half, whole = (round(n * 0.38) for n in (PATCHES, 4 * PATCHES))
    render_n = (phantom.render, half, PATCHES - half)
    render_4n = (phantom.render, whole, 4 * PATCHES - whole)
    compare("render N phantom patches, 1 worker / 2 workers", (*render_n, 0, 1), (*render_n, 0, 2))
    compare("render phantom patches, 4N / N (linear: at most 4)", (*render_4n, 0, 2), (*render_n, 0, 2))
    compare("N phantom patches, render / read a file", (*render_n, 0, 2), (patches.read, str(small)))
    compare("read own file, 40N / 10N (linear: 4)", (patches.read, str(large)), (patches.read, str(small)))


def compare_extraction() -> None:
    """The feature bank: speed, memory and size."""
    what = f"{ARCHITECTURE} on 4N patches"
    compare(f"{what}, forward pass alone / bank (aim: at least 0.9)", (forward, 4 * PATCHES), (extract, 4 * PATCHES))
    large, small = compare("bank of plain patches, 4N / N (linear: 4)", (extract, 4 * PATCHES), (extract, PATCHES))
    images, bank = ((large[name] - small[name]) / 1e6 for name in ("images", "bank"))
    print(f"  at 4N, {images:.0f} MB more are images, and {bank:.0f} MB more are the bank: a file mapped into memory,")
    print("  whose pages count in the peak, though the system takes them back where it needs them")
    print(f"  bank: {small['bank'] / PATCHES:.0f} bytes for each patch and view", flush=True)


def compare_load(folder: Path) -> None:
    """Many patches from a file to a head: time grows in proportion, memory stays within 4 GB."""
    half, whole = (folder / f"load-{n}.npz" for n in (MANY // 2, MANY))
    measure(_write, half, MANY // 2)
    measure(_write, whole, MANY)
    what = f"file, {SMALLEST} bank, head: {MANY} patches / {MANY // 2} (linear: 2; aim: 4000 MB)"
    large, _ = compare(what, (load, str(whole)), (load, str(half)), repeats=1)
    print(f"  of the peak of {MANY}, {MANY * 2 * patches.SIDE**2 / 1e6:.0f} MB are images", end=" ")
    print(f"and up to {large['bank'] / 1e6:.0f} MB pages of the bank", flush=True)


def compare_training() -> None:
    """All layers in two precisions; heads on the bank against fastai's own learner."""
    layers = f"{STEPS} steps of all layers of {ARCHITECTURE}, float32 / bfloat16 where there is any"
    compare(layers, (fine_tune, "float32"), (fine_tune, "bfloat16"))
    scaled = f"{EPOCHS} head epochs, stock fastai ({FEW} epochs x {EPOCHS}/{FEW}) / bank (aim: 100)"
    theirs, own = compare(scaled, (stock,), (ours,), repeats=1)
    print(f"  {own['weights']}, same patches, split and lr {LR:g}; of B, {own['extraction']:.1f} s are the bank")
    results = {f"stock, {FEW} epochs": theirs["short"], f"ours, {FEW} epochs": own["short"]}
    for name, accuracies in (results | {f"ours, {EPOCHS} epochs": own["long"]}).items():
        print(f"  accuracy of {name:<17} valid {accuracies['valid']:.3f}  test {accuracies['test']:.3f}", flush=True)


def main() -> None:
    """Print one line a comparison as it is ready: both medians in seconds, their ratio, both peaks in MB."""
    print(f"N = {PATCHES}, medians of {REPEATS} runs (the last two rows: 1) each in a fresh process, A and B in turn")
    print(f"{'A / B':<72} {'A [s]':>9} {'B [s]':>9} {'A/B':>7} {'A [MB]':>8} {'B [MB]':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        compare_files(Path(folder))
        compare_extraction()
        compare_training()
        compare_load(Path(folder))
