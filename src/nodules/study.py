"""What a notebook opens: its parameters, the data and their split, what earlier notebooks kept, and its own record."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from nodules import course, paths
from nodules.data import patches, split, transforms
from nodules.data.patches import Patches
from nodules.errors import SEEDS, InputError, within
from nodules.networks import POOLS, RULES
from nodules.record import Earlier, Record

if TYPE_CHECKING:  # importing networks takes long, and the first notebook has none
    from nodules.networks.bodies import Body, Spec
    from nodules.networks.network import Network

# Minimum and maximum of a parameter, or of each number in a list, in any notebook
RANGES = {
    **dict.fromkeys(("n_patches", "compared"), (1, patches.MOST_PATCHES)),
    **dict.fromkeys(("seed", "split_seed", "compare_seeds"), (0, SEEDS)),
    **dict.fromkeys(("epochs", "compare_epochs", "cycle_len", "cycle_mult"), (1, 100_000)),
    **dict.fromkeys(("views", "seeds", "lr_seeds", "cases", "pointed", "erased", "map_epochs"), (1, 1000)),
    "members": (1, 20),
    "simulated": (300, patches.MOST_PATCHES),
    "empty_places": (10, 1000),
    "company": (0, patches.MOST_PATCHES),
    **dict.fromkeys(("arm_epochs", "whole_epochs", "scratch_epochs"), (1, 1000)),
    "fold_epochs": (0, 1000),
    "compare_lr": (1e-12, 10),
    "size": (32, 1024),
    "repeats": (2, 1000),
    **dict.fromkeys(("slices", "simulations"), (1, 100_000)),
    **dict.fromkeys(("ablated", "shifted", "arm_patches"), (20, 100_000)),
}
CHOICES = {
    "unit": ("mm", "voxel"),
    "split_kind": split.KINDS,
    "pool": POOLS,
    "rule": RULES,
    "folds": (0, *range(2, 11)),
    "cited": ("SqueezeNet", "CapsuleNet"),
    "ingredients": (
        *("attention", "outlines", "densities", "company", "middle", "sampling", "neighbours"),
        *("spacing", "resolution", "ratings", "readers", "all"),
    ),
}


def check(parameters: dict[str, Any]) -> None:
    """Raise InputError for a parameter that is out of range or not one of its choices."""
    for name, value in parameters.items():
        if name in RANGES:
            within(*RANGES[name], **{name: value})
        for one in value if isinstance(value, list) else [value]:
            if one not in CHOICES.get(name, [one]):
                raise InputError(f"{name}={one!r}: unknown; use one of {', '.join(map(str, CHOICES[name]))}")
    if "architectures" in parameters:
        from nodules.networks import bodies

        for architecture in parameters["architectures"]:
            bodies.check(architecture)


class Study(Record):
    """One notebook's work on patches that are split into train, valid and test.

    Attributes:
        patches: all of them, with their card.
        split: of each patch, as :func:`nodules.data.split.assign` returns it.
        everything: all patches as one part.
        train: the part to train on.
        valid: the part to select on.
        test: the part to report on.
        parts: all three.
        seed: of everything random in this notebook but the split.
        split_seed: of the split and of folds.
        unit: of the pixel values, as on the card.
        window: pixel values shown as black and white.
    """

    def __init__(
        self, notebook: str, parameters: dict[str, Any], patches: Patches, assigned: pd.DataFrame, split_seed: int
    ) -> None:
        super().__init__(
            notebook, parameters["run_dir"], parameters, patches.card, assigned["split_kind"].iloc[0], split_seed
        )
        self.patches, self.split = patches, assigned
        self.everything = split.whole(patches)
        self.parts = split.divide(self.everything, assigned["split"].to_numpy())
        self.train, self.valid, self.test = self.parts
        self.seed, self.unit = parameters["seed"], patches.card.unit
        self.window = list(transforms.default_window(self.unit))

    @classmethod
    def open(cls, notebook: str, namespace: dict[str, Any]) -> "Study":
        """Open a notebook's study.

        The first notebook reads and splits the data; the others reuse its data and its split.

        Args:
            notebook: its name, without its suffix.
            namespace: the notebook's ``globals()``, which hold the values of its parameters.

        Raises:
            InputError: invalid parameters, unreadable data, or the first notebook has not run on these data.
        """
        defaults = course.parameters(paths.NOTEBOOKS / f"{notebook}.ipynb")
        parameters = {name: course.typed(name, namespace[name], default) for name, default in defaults.items()}
        check(parameters)
        if notebook == course.DATA.name:
            ct = patches.read(parameters["data"], parameters["n_patches"])
            assigned = split.assign(ct.table, parameters["split_kind"], parameters["split_seed"])
            return cls(notebook, parameters, ct, assigned, parameters["split_seed"])
        first = Earlier(parameters["run_dir"], course.DATA.name)
        ct = patches.read(first.parameters["data"], first.parameters["n_patches"])
        if ct.card.sha256 != first.content["card"]["sha256"]:
            raise InputError(f"{first.folder}: made from different patches; run {course.DATA.name} again")
        return cls(notebook, parameters, ct, first.table("split"), first.parameters["split_seed"])

    @property
    def counted(self) -> str:
        """What intervals resample: ``patients``, or ``patches`` where patients are unknown."""
        return "patients" if "patient" in self.patches.table else "patches"

    @property
    def kept_together(self) -> pd.Series:
        """What no two parts of the split share, (N,): the patient, or the patch if patches were shuffled."""
        return self.patches.table["patient" if self.split_kind == "patient" else "id"]

    def earlier(self, notebook: str) -> Earlier:
        """What an earlier notebook of this run kept."""
        return Earlier(self.run_dir, notebook)

    @property
    def described(self) -> pd.DataFrame:
        """By patch: ``id, patient, split, y, nodule, unit, diameter``, and ``slice_index`` where known."""
        whole = self.everything
        known = whole.table[whole.table.columns.intersection(["slice_index"])]
        about = {"y": whole.y, "nodule": whole.nodules, "unit": whole.units, "diameter": whole.diameters}
        return self.split[["id", "patient", "split"]].assign(**about).join(known)

    @property
    def network(self) -> "Spec":
        """The network chosen in the notebook on architectures."""
        from nodules.networks.bodies import Spec

        choice = self.earlier(course.ARCHITECTURES.name).choice("network")
        return Spec(*(choice[name] for name in ("architecture", "weights", "size", "pool")))

    def body(self) -> "Body":
        """The body of the chosen :attr:`network`; everything kept from now on names its weights."""
        from nodules.networks import bodies

        body = bodies.build(self.network, self.unit)
        self.weights = f"{body.architecture}, {body.weights.source}"
        return body

    def model(self) -> "Network":
        """The chosen :attr:`network` with its trained head; everything kept from now on names its weights."""
        from nodules.networks.network import restore

        model = restore(self.network, self.unit, self.earlier(course.TRAINING.name).file("head.safetensors"))
        self.weights = f"{model.body.architecture}, {model.body.weights.source}"
        return model

    def predicted(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The tables of the valid and test patches with predictions of :meth:`model`: ``y, p`` (plain), ``p_tta``.

        They also have ``unit``, which intervals resample, and ``nodule``, one per patch where nodules are unknown.
        """
        predictions = self.earlier(course.TRAINING.name).table("predictions").set_index("id")[["y", "p", "p_tta"]]
        named = self.patches.table.drop(columns=list(predictions), errors="ignore")  # a source may have such columns
        described = named.assign(nodule=self.everything.nodules, unit=self.everything.units)
        valid, test = (described.iloc[part.rows].join(predictions, on="id") for part in (self.valid, self.test))
        return valid, test
