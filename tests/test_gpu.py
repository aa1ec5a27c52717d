import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from fastai.torch_core import no_random
from torch.nn import functional as F

from nodules import model, paths, plots, teaching
from nodules.data import patches, split
from nodules.errors import in_brief
from nodules.evaluation import metrics, tables
from nodules.networks import bank, bodies, finetune, heads, maps, small, weights
from nodules.networks.bodies import Spec
from nodules.networks.device import described, device, has_bfloat16
from nodules.networks.network import Mixed, predict, restore
from nodules.tools import bench

pytestmark = pytest.mark.gpu

PAPER = yaml.safe_load((paths.ROOT / "params" / "paper.yaml").read_text(encoding="utf-8"))
SMALL = Spec("resnet10t", "random")
UNIT = "HU"  # of the phantom's pixels
REPORTED_S = 262  # the report's 200 epochs of the head, on a Quadro P4000
STOCK_EPOCHS = 5  # of stock fastai, scaled up
WHOLE_EPOCHS = 100
WHOLE_S = 160  # for both trainings of the whole network: a slower card is shown fewer nodules
TRIAL = 40  # steps that tell how long one takes
REPEATS = 20
# Mean differences from the CPU over those between two patches. A GPU rounds the factors of float32 convolutions to the
# 10 bits of half precision (TF32), which a deep network of random weights makes one or two hundredths.
HALF = 0.03
BFLOAT16 = 8 * HALF  # three bits less
NEAR = 0.03  # probability


# What is measured


@pytest.fixture(scope="module", autouse=True)
def usable():
    if device().type != "cuda":
        # pytest.skip, in a fixture, would report each test in a line of its own
        raise SkipTest("no GPU that this torch can use")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = Path(os.environ.get("OUT") or tmp_path_factory.mktemp("gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def tell(out):
    """Prints what was measured, and adds it to the table in gpu.md."""
    page = out / "gpu.md"
    about = f"{described()}, torch {torch.__version__}, CUDA {torch.version.cuda}; the phantom is a simulation"
    print(f"\n{about}\n{page}")
    page.write_text(f"{about}\n\n| what | measured |\n| :-- | :-- |\n", encoding="utf-8")

    def tell(what, found):
        print(f"\n{what}: {found}", flush=True)
        with page.open("a", encoding="utf-8") as file:
            file.write(f"| {what} | {found} |\n")

    return tell


def measured(job):
    """What a job gives, its seconds, and the highest use of the GPU's memory in words."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = job()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return result, seconds, f"peak {torch.cuda.max_memory_allocated() / 1e6:.0f} MB of GPU memory"


def seconds(job):
    """Seconds of one call, a mean after a warm-up."""
    for count in (5, REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            job()
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


# The CPU beside it


@contextmanager
def patched(**functions):
    """Replace functions of nodules.networks.device in all modules that have imported them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            for function in functions.keys() & vars(module) if name.startswith("nodules.") else ():
                if callable(vars(module)[function]):  # nodules.networks.device is a module of that name
                    patch.setattr(module, function, functions[function])
        yield


def on_cpu():
    return patched(device=lambda: torch.device("cpu"), has_bfloat16=lambda: False)


@contextmanager
def uncached(folder):
    """Find nothing in the cache, such as what another device computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODULES_CACHE", str(folder))
        yield


def on_gpu(network):
    assert all(value.is_cuda for value in (*network.parameters(), *network.buffers()))
    return network


def numbers(training):
    assert all(np.isfinite(table.to_numpy()).all() and len(table) for table in (training.history, training.steps))
    return training


def apart(found, expected):
    """Mean difference over that of two patches: 0 the same, 1 another patch."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return np.abs(found - expected).mean() / np.abs(expected - np.roll(expected, 1, axis=0)).mean()


def differ(network, images):
    """The largest difference of probabilities from those of the same network on the CPU."""
    with on_cpu():
        expected = predict(copy.deepcopy(network).cpu(), images)
    return np.abs(predict(on_gpu(network), images) - expected).max()


# Patches


@pytest.fixture(scope="module")
def few():
    return split.whole(patches.read("phantom", 300))


def divided(part):
    return split.divide(part, split.assign(part.table)["split"].to_numpy())


@pytest.fixture(scope="module")
def paper():
    """All patches of the phantom, split as in the report."""
    part = split.whole(patches.read("phantom", PAPER["n_patches"]))
    sides = split.assign(part.table, PAPER["split_kind"], PAPER["split_seed"])["split"].to_numpy()
    return SimpleNamespace(part=part, sides=sides, parts=split.divide(part, sides))


@pytest.fixture(scope="module")
def spec():
    """The report's network with the best weights that are here."""
    return Spec("resnet50", weights.available("resnet50")[0])


@pytest.fixture(scope="module")
def body(spec):
    return bodies.build(spec, UNIT)


@pytest.fixture(scope="module")
def features(body, paper, tell):
    """Of all patches in all views."""
    images, views = paper.part.images, PAPER["views"]
    with tempfile.TemporaryDirectory() as folder:
        with uncached(folder):
            job = partial(bank.compute, body, images, "all", "rotate", views, PAPER["seed"])
            features, total, memory = measured(job)
        speed = f"{features.patches_per_second:.0f} views a second"
        weights_of = f"{body.architecture}, {body.weights.source}"
        tell(f"bank of {len(images)} patches in {1 + views} views, {weights_of}", f"{total:.1f} s, {speed}; {memory}")
        yield features


# Every module computes on the GPU, and what the CPU does


@pytest.mark.parametrize("architecture", ["resnet50", "efficientnet_lite0", "resnet10t"])
def test_a_body_shows_on_the_gpu_what_it_shows_on_the_cpu(architecture, few, tell):
    body, images = bodies.build(Spec(architecture, "random"), UNIT), few.images[:8]

    def shown():
        with torch.inference_mode():
            stages = body.eval()(body.prepare(torch.from_numpy(images)))
        strongest, (_, filtered) = bank.strongest(body, images[0], 3), bank.first_filter(body, images[0])
        return [m.cpu().numpy() for m in stages], strongest.mean((2, 3)), filtered.std(), bodies.stages(body, 64)

    expected = shown()
    on_gpu(body.to(device()))
    found = shown()
    difference = max(map(apart, found[0], expected[0]))
    tell(f"maps of {architecture}, GPU against CPU", f"{difference:.4f} of the difference between two patches")
    assert difference < HALF and found[3] == expected[3]
    assert all(np.allclose(found[i], expected[i], rtol=0.05) for i in (1, 2))


def test_the_bank_is_that_of_the_cpu_within_half_precision(body, tell, tmp_path):
    images, banks = patches.read("phantom", 48).images, {}
    precisions = {"CPU": on_cpu(), "float32": patched(has_bfloat16=lambda: False), "as it comes": patched()}
    for name, precision in precisions.items():
        with uncached(tmp_path / name), precision:
            banks[name] = bank.compute(body, images, kind="rotate", k=2).features
    single, usual = (apart(banks[name], banks["CPU"]) for name in ("float32", "as it comes"))
    bits = "bfloat16" if has_bfloat16() else "float32"
    text = f"{single:.4f} of the difference between two patches in float32, {usual:.4f} as it comes ({bits})"
    tell(f"bank of {body.architecture}, {body.weights.source}, GPU against CPU", text)
    assert single < HALF and usual < (BFLOAT16 if has_bfloat16() else HALF)


def restarted(features, parts, epochs, cycle_len):
    """A head trained with cosine annealing, as the report's."""
    with no_random(0):
        learn = heads.learner(features, parts, augment=True)
        started = time.perf_counter()
        learn.fit_sgdr(len(heads.cycles(epochs, cycle_len, 1)), cycle_len, heads.LR)
        seconds = time.perf_counter() - started
    return heads.recorded(learn, seconds)


def test_heads_are_searched_trained_and_asked_on_the_gpu(few, tell, tmp_path):
    parts, rows = divided(few), few.rows
    with uncached(tmp_path):
        features = bank.compute(bodies.build(SMALL, UNIT), few.images, kind="rotate", k=2)
    rates = heads.learner(features, parts).lr_find()
    assert all(1e-7 <= rate <= 10 for rate in rates.values())
    trained = numbers(heads.train(features, parts, heads.Recipe(4, heads.LR, augment=True)))
    numbers(restarted(features, parts, 4, 2))
    history, p, _ = heads.repeat(features, parts, heads.Recipe(2, heads.LR), [0, 1])
    assert np.isfinite(history.to_numpy()).all() and p.shape == (2, len(few))
    found = heads.predict(on_gpu(trained.model), features, rows)
    with on_cpu():
        expected = heads.predict(copy.deepcopy(trained.model).cpu(), features, rows)
    difference = np.abs(found - expected).max()
    tell("probabilities of a head, GPU against CPU", f"at most {difference:.1e} apart")
    assert difference < 1e-3


def test_all_layers_are_trained_and_put_back_on_the_gpu(few, tell, tmp_path):
    parts = divided(few)
    with uncached(tmp_path):
        features = bank.compute(bodies.build(SMALL, UNIT), few.images)
    network, history = finetune.head_first(SMALL, UNIT, features, parts)
    weights.save({name: value.cpu() for name, value in network.head.state_dict().items()}, tmp_path / "head")
    assert np.isfinite(history.to_numpy()).all() and differ(restore(SMALL, UNIT, tmp_path / "head"), few.images) < NEAR
    trained = numbers(finetune.train(network, parts, finetune.DEFAULT, epochs=3, name="all layers"))
    difference = differ(trained.model.network, parts.test.images)
    tell(
        f"probabilities of {SMALL.architecture}, all layers trained, GPU against CPU", f"at most {difference:.4f} apart"
    )
    assert difference < NEAR and not trained.stopped


NETWORKS = {
    "plain network": (small.Plain, finetune.SCRATCH),
    "SqueezeNet": (small.squeezenet, replace(finetune.SCRATCH, lr=5e-4)),
    "CapsuleNet": (small.CapsuleNet, replace(finetune.SCRATCH, lr=1e-3, loss=small.margin_loss)),
    "nodule network": (small.NoduleNet, finetune.NODULE),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_from_scratch_are_trained_on_the_gpu(name, few, tell):
    make, recipe = NETWORKS[name]
    parts = divided(few)
    network = small.seeded(partial(make, UNIT), 0)
    numbers(finetune.train(network, parts, recipe, epochs=8, name=name))
    difference = differ(network, parts.test.images)
    tell(f"probabilities of the {name}, GPU against CPU", f"at most {difference:.4f} apart")
    assert difference < NEAR


def test_maps_are_those_of_the_cpu(few, tell, tmp_path):
    parts, images = divided(few), few.images[:8]
    with uncached(tmp_path):
        recipe = heads.Recipe(2, heads.LR)
        linear, network = maps.networks(bodies.build(SMALL, UNIT), parts, recipe, 0)
    nodules = on_gpu(small.seeded(partial(small.NoduleNet, UNIT), 0).to(device()))

    def shown(linear, network, nodules):
        stages = maps.grad_cams(network, images, range(len(network.taps)))
        return [maps.cam(linear, images), *stages, *small.attention(nodules, images)]

    found = shown(linear, on_gpu(network), nodules)
    with on_cpu():
        twin = copy.deepcopy(network).cpu()
        linear = maps.Averaged(twin.body, linear.mean.cpu(), linear.weight.cpu(), linear.bias)
        expected = shown(linear, twin, copy.deepcopy(nodules).cpu())
    difference = max(map(apart, found, expected))
    tell("activation maps and attention, GPU against CPU", f"{difference:.4f} of the difference between two patches")
    assert difference < 2 * HALF  # gradients too
    on_gpu(maps.forgotten(network, 1))


def test_a_model_is_taught_and_answers_on_the_gpu(few, tell, tmp_path):
    taught = teaching.teach(few, None, UNIT, folds=3, epochs=8, seed=0, name="model", about={"name": "taught here"})
    on_gpu(taught.members)
    differences = []
    for path in (teaching.save(taught, tmp_path / "taught.safetensors"), model.DEFAULT):
        loaded = model.load(path)
        on_gpu(loaded.members)
        found, pictures = loaded.answers(few)["p"], loaded.maps(few.images[:8])
        with on_cpu():
            twin = model.load(path)
            differences.append(np.abs(found - twin.answers(few)["p"]).max())
            assert max(map(apart, pictures, twin.maps(few.images[:8]))) < HALF
    tell("probabilities of two models, GPU against CPU", f"at most {max(differences):.4f} apart")
    assert max(differences) < NEAR


# What it brings


def test_the_time_of_the_reports_epochs_of_the_head_is_told(features, paper, tell):
    # The third notebook would choose a rate; the time doesn't depend on it
    epochs = PAPER["epochs"]
    trained, _, memory = measured(lambda: restarted(features, paper.parts, epochs, PAPER["cycle_len"]))
    count, reached = f"{epochs} epochs of the head", numbers(trained).history["accuracy"].iloc[-1]
    text = f"{trained.seconds:.1f} s, accuracy on valid {reached:.3f}; {memory}"
    tell(f"{count} on the bank, {len(paper.parts.train)} training patches, split as in the report", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_phantom", lambda: (paper.part, paper.sides))
        patch.setattr(bench, "EPOCHS", epochs)
        patch.setattr(bench, "FEW", STOCK_EPOCHS)
        stock, _, memory = measured(bench.stock)
    tell(f"{count}, stock fastai, scaled from {STOCK_EPOCHS}", f"{stock['seconds']:.0f} s; {memory}")
    with_bank = trained.seconds + np.prod(features.features.shape[:2]) / features.patches_per_second
    text = f"{stock['seconds'] / trained.seconds:.0f} times as fast as stock fastai on this card"
    text += f" ({stock['seconds'] / with_bank:.0f} times with the time for the bank), "
    text += f"{REPORTED_S / trained.seconds:.0f} times as fast as the report ({REPORTED_S} s on a Quadro P4000)"
    tell(f"{count} on the bank", text)
    assert trained.seconds < stock["seconds"]


def affordable(start, parts, recipes):
    """The parts with as many training nodules as there is time for, drawn at random."""
    names, cost = np.unique(parts.train.nodules), 0.0
    for recipe in recipes:
        options = {"epochs": TRIAL * recipe.batch / len(names), "name": "trial", "checks": 1}
        for _ in range(2):  # the first warms up
            trial = finetune.train(copy.deepcopy(start), parts, recipe, **options)
        cost += WHOLE_EPOCHS * trial.seconds / len(trial.steps) / recipe.batch  # of each nodule
    chosen = np.random.default_rng(0).permutation(names)[: max(100, int(WHOLE_S / cost))]
    return parts._replace(train=parts.train.take(np.flatnonzero(np.isin(parts.train.nodules, chosen))))


def test_the_whole_network_is_trained_in_minutes_and_draws_figure_22(features, paper, spec, out, tell):
    arms = {"as the report": finetune.Recipe(lr=1e-2, batch=16), "our recipe": finetune.DEFAULT}
    start, head = finetune.head_first(spec, UNIT, features, paper.parts)
    parts, valid = affordable(start, paper.parts, arms.values()), paper.parts.valid
    shown = len(np.unique(parts.train.nodules))
    about = f"one patch of each of {shown} nodules an epoch, {len(parts.train)} patches in all"
    trainings, results = {}, {"head alone": {"auc": auc(Mixed(copy.deepcopy(start)), valid)}}
    for name, recipe in arms.items():
        job = partial(finetune.train, copy.deepcopy(start), parts, recipe, epochs=WHOLE_EPOCHS, name=name, checks=10)
        trained, _, memory = measured(job)
        trainings[name] = trained
        results[name] = {
            "auc": None if trained.stopped else auc(trained.model, valid),
            "stopped": trained.stopped,
            "seconds": trained.seconds,
            "steps": len(trained.steps),
            "history": json.loads(trained.history.to_json(orient="records")),  # null where not finite
        }
        end = trained.stopped or f"AUC on valid {results[name]['auc']:.3f}"
        text = f"{trained.seconds:.0f} s, {len(trained.steps) / trained.seconds:.0f} steps a second"
        what = f"whole network, {WHOLE_EPOCHS} epochs, {name}, batches of {recipe.batch}"
        tell(f"{what}, {about}", f"{text}, {end} (head alone: {results['head alone']['auc']:.3f}); {memory}")
    heading = f"The head, then all layers: {WHOLE_EPOCHS} epochs on the phantom, a simulation"
    plots.phases(tables.phases(trainings, head), heading).savefig(out / "fig22_gpu.png", dpi=150)
    kept = {"device": described(), "data": "the phantom is a simulation", "epochs": WHOLE_EPOCHS, "patches": about}
    text = json.dumps({**kept, "head": head.to_dict("records"), "arms": results}, indent=1, default=float)
    (out / "fig22_gpu.json").write_text(text, encoding="utf-8")
    assert not numbers(trainings["our recipe"]).stopped


def auc(network, part):
    p = predict(network, part.images, 1)[:, 0]
    return float(metrics.auc(part.y, p, np.ones((1, len(part))))[0])


def step(body, images, train, bfloat16, channels_last, compiled):
    """A call that passes a batch through a network and, in training, back."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    body = copy.deepcopy(body).to(device(), memory_format=layout).train(train)
    head = heads.head(bank.width(body, "all")).to(device()).train(train)
    batch = body.prepare(torch.from_numpy(images)).contiguous(memory_format=layout)
    target = torch.arange(len(batch), device=device()) % 2
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=1e-4, fused=True)
    passed = torch.compile(body) if compiled else body

    def call():
        with torch.inference_mode(not train), torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            logits = head(bank.pooled(passed(batch), "all"))
        if train:
            F.cross_entropy(logits.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    return call


@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
def test_precision_layout_and_compiler_are_compared(train, body, paper, tell):
    images = paper.part.images[: finetune.DEFAULT.batch if train else bank.FORWARD_BATCH]
    what = f"{'training step, all layers' if train else 'forward pass, frozen body'}, {len(images)} patches"
    usual = {"bfloat16": has_bfloat16(), "channels_last": True, "compiled": False}
    changes = {"bfloat16": "float32", "channels_last": "contiguous", "compiled": "eager"}
    for option, other in changes.items():
        name = f"{what}, {option} against {other}"
        if option == "bfloat16" and not has_bfloat16():
            tell(name, "this card has no bfloat16")
            continue
        without = seconds(step(body, images, train, **usual | {option: False}))
        try:
            having = seconds(step(body, images, train, **usual | {option: True}))
        except Exception as error:  # a compiler can be missing in many ways
            if option != "compiled":
                raise
            tell(name, f"unavailable here ({in_brief(error)})")
        else:
            text = f"{1e3 * having:.2f} ms against {1e3 * without:.2f} ms"
            tell(name, f"{without / having:.2f} times as fast: {text}")


def test_several_gpus_share_the_training_of_a_head(features, paper, tell, tmp_path):
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("one GPU: nothing to share")
    if not find_spec("accelerate"):
        pytest.skip("accelerate is not installed")
    labels, found = tmp_path / "labels.npy", tmp_path / "history.json"
    np.save(labels, paper.part.y)
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", str(count)]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", __file__, features.features.filename, labels, found]
    done = subprocess.run([sys.executable, "-m", *map(str, launch)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    history = json.loads(found.read_text())
    losses = [epoch["train_loss"] for epoch in history["epochs"]]
    tell(
        f"{len(losses)} epochs of the head on {count} GPUs",
        f"{history['seconds']:.1f} s, training loss {losses[-1]:.3f}",
    )
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def share(features, labels, found):
    """The part of each process: a head on a bank, on a GPU of its own."""
    from fastai.distributed import teardown_distrib  # gives learners distrib_ctx

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    y = np.load(labels)
    rows = np.arange(len(y))
    part = split.Part(y, y, rows, pd.DataFrame({"id": rows}), rows)
    held = bank.Bank(np.load(features, mmap_mode="r"), "shared", 0.0)
    learn = heads.learner(held, split.divide(part, np.where(rows % 8, "train", "valid")), augment=True)
    started = time.perf_counter()
    with learn.distrib_ctx():
        learn.fit(20, heads.LR)
    training = heads.recorded(learn, time.perf_counter() - started)
    if os.environ["RANK"] == "0":
        kept = {"seconds": training.seconds, "epochs": training.history.to_dict("records")}
        Path(found).write_text(json.dumps(kept))
    teardown_distrib()


if __name__ == "__main__":
    share(*sys.argv[1:])
