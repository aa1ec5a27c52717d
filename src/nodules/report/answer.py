"""How much of 0.95 is real: the 2019 report, a kept run on real nodules, and this run, side by side."""

import json
import re
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from nodules import paths
from nodules.evaluation import metrics
from nodules.report import text

REAL = text.TEMPLATES / "real"  # what was kept of runs on real nodules, which are not part of this project
HEADLINE = paths.ROOT / "figures" / "headline"  # of make sweep
DIVISIONS = "divisions of the real patients into folds"
SWEPT = {  # the results of sweeps
    DIVISIONS: REAL / "splits.json",
    "runs on a phantom, simulated patches (`figures/headline/report.html`)": HEADLINE / "results.json",
}
ELSEWHERE = text.TEMPLATES / "elsewhere"  # what the default run found on other machines
FINDINGS = {  # differences that notebooks keep as facts
    "gain_nodules": "nodule network minus ruler, AUC per nodule",
    "gain_patches": "nodule network minus ruler, AUC per patch",
    "added_nodules": "network and ruler minus ruler, AUC per nodule",
    "added_patches": "network and ruler minus ruler, AUC per patch",
    "gain_slices": "all slices minus one, AUC per nodule",
    "gain": "test-time augmentation, accuracy",
    "inflation_auc": "shuffled minus patients apart, AUC",
    "log_loss_change": "temperature, log-loss",
    "zoom": "zoom in training, AUC",
    "whole": "all layers of the ResNet minus its head alone, AUC",
    "lead": "attention minus a blob, highest point inside the nodule",
}
NAMED = {"chosen": "network chosen", "diverged": "ways to train all layers that diverge"}  # facts that are no numbers
SURER = "three readers or more"  # ends the names of rows of nodules whose label is surer
REPORT = "The report: "  # rows of cited.csv
SHOWN = {  # title and name of each row that is compared
    "benign": ("always the larger class, per patch", r"prevalence"),
    "frozen": ("like the report: last layers, TTA; per patch", r"second result, with TTA"),
    "slice": ("a ruler on the same slice, per patch", r"ruler on the slice, mm"),
    "patch": ("nodule network, per patch", r"nodule network, \d+ folds, patches"),
    "larger": ("always the larger class, per nodule", r"prevalence, \d+ folds, nodules"),
    "ruler": ("a ruler, per nodule", r"ruler on the whole nodule, \d+ folds, nodules"),
    "whole": ("ResNet50, all layers, per nodule", r"whole network, \d+ folds, nodules"),
    "nodule": ("nodule network, per nodule", r"nodule network, \d+ folds, nodules"),
    "both": ("nodule network and ruler, per nodule", r"network and ruler, \d+ folds, nodules"),
}


@cache
def real() -> dict[str, Any]:
    """The ``results.json`` of the kept run on real nodules."""
    return json.loads((REAL / "results.json").read_text(encoding="utf-8"))


def swept() -> list[dict[str, Any]]:
    """Of each sweep of network against ruler: ``runs``, how many; ``of``, what they are; and its findings by fact.

    ``ruler`` is how the accuracy of the ruler on the slice differs between their test patches, if that was measured.
    """
    kept = {kind: json.loads(path.read_text(encoding="utf-8")) for kind, path in SWEPT.items() if path.exists()}
    ruler = {"name": SHOWN["slice"][1], "metric": "accuracy"}
    found = [
        {"runs": content["runs"], "of": kind}
        | {"ruler": next((row for row in content["results"] if ruler.items() <= row.items()), None)}
        | {finding["fact"]: finding for finding in content["findings"]}
        for kind, content in kept.items()
    ]
    return [sweep for sweep in found if {"added_nodules", "gain_nodules"} <= set(sweep)]


def elsewhere(content: dict[str, Any]) -> pd.DataFrame:
    """What the default run finds, here and on other machines, which may lack some; empty for another run.

    Differences agree if all are surely above 0, all surely below, or none is either.

    Returns:
        ``finding, this run``, a column for each other machine, and ``agree``, true or false.
    """
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(ELSEWHERE.glob("*.json"))]
    if {run["profile"] for run in kept} != {content["runs"][0]["profile"]}:
        return pd.DataFrame()
    found = {"this run": facts(content)} | {run["where"]: facts(run) for run in kept}
    rows = []
    for fact, title in (NAMED | FINDINGS).items():
        needed = {fact} if fact in NAMED else {fact, f"{fact}_low"}
        known = {where: run for where, run in found.items() if needed <= run.keys()}
        if "this run" not in known or len(known) < 2:
            continue
        if fact in NAMED:
            told = verdicts = {where: run[fact] for where, run in known.items()}
        else:
            told = {where: text.interval(run, fact, "+.3f") for where, run in known.items()}
            verdicts = {where: text.excludes(run, fact) * np.sign(run[fact]) for where, run in known.items()}
        rows.append({"finding": title, **dict.fromkeys(found, "–"), **told, "agree": len(set(verdicts.values())) == 1})
    return pd.DataFrame(rows)


def ingredients() -> pd.DataFrame:
    """What each ingredient of the nodule network gained, on real nodules and on the phantom, as people read it."""
    table = pd.read_csv(REAL / "ingredients.csv")
    table["gain"] = [text.span(row.value, row.low, row.high, "+.3f") for row in table.itertuples()]
    table["where"] = table["data"] + ", per " + table["counted"].map({"patches": "patch", "nodules": "nodule"})
    wide = table.pivot(index="without", columns="where", values="gain")[table["where"].unique()]
    return wide.reindex(table["without"].unique()).reset_index(names="compared with").rename_axis(columns=None)


def facts(content: dict[str, Any]) -> dict[str, Any]:
    """The facts of all notebooks of a run."""
    return {key: value for of_notebook in content["facts"].values() for key, value in of_notebook.items()}


def rows(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a run that are compared, by key of ``SHOWN``; those that it has."""
    found = {key: [r for r in content["rows"] if re.fullmatch(name, r["name"])] for key, (_, name) in SHOWN.items()}
    return {key: matching[0] for key, matching in found.items() if matching}


def reported() -> list[dict[str, Any]]:
    """The 2019 report's accuracies, with the interval that they would have if patches were independent."""
    cited = pd.read_csv(text.TEMPLATES / "cited.csv")
    of_report = cited[cited["model"].str.startswith(REPORT)].to_dict("records")
    for row in of_report:
        row["accuracy_low"], row["accuracy_high"] = metrics.wilson(row["accuracy"], row["patches"])
    return of_report


def table(content: dict[str, Any]) -> pd.DataFrame:
    """All of them, by (run, key): ``name, part`` (where measured), ``value, low, high`` (accuracy), ``auc`` (as text).

    ``tested`` says on what, and whether by a test split or folds. The runs are ``report``, whose keys are numbers,
    ``real`` and ``here``.
    """
    named = {("report", i): (row["model"].removeprefix(REPORT), row) for i, row in enumerate(reported())}
    for run, of_run in (("real", real()), ("here", content)):
        named |= {(run, key): (SHOWN[key][0], row) for key, row in rows(of_run).items()}
    parts = {
        "report": "the 2019 report, shuffled patches",
        "real": "real nodules, patients apart",
        "here": content["runs"][0]["data"],
    }
    lines = {
        (run, key): {"name": name, "part": parts[run], "auc": text.interval(row, "auc") if "auc_low" in row else None}
        | {"tested": _tested(row)}
        | {end: row[f"accuracy{name}"] for end, name in (("value", ""), ("low", "_low"), ("high", "_high"))}
        for (run, key), (name, row) in named.items()
    }
    return pd.DataFrame.from_dict(lines, orient="index")


def _tested(row: dict[str, Any]) -> str:
    """On what a row was measured: ``666 patches, test`` or ``1243 nodules, 5 folds``."""
    by = re.search(r"\d+ folds", row.get("name", ""))
    return f"{row.get('n', row.get('patches')):.0f} {row.get('counted', 'patches')}, {by[0] if by else 'test'}"


def values(content: dict[str, Any]) -> dict[str, Any]:
    """What ``answer.md`` names: ``reported``, rows and facts of the real nodules and of this run, ``swept``."""
    kept = real()
    return {
        "reported": reported()[0],
        "swept": swept(),
        "divisions": DIVISIONS,
        "here": rows(content),
        "real": rows(kept) | {"card": kept["card"], "facts": facts(kept), "runs": kept["runs"]},
    }
