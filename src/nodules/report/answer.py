"""How much of 0.95 is real: the 2019 report, a kept run on real nodules, and this run, side by side."""

import json
import re
from functools import cache
from typing import Any

import pandas as pd

from nodules import paths
from nodules.evaluation import metrics
from nodules.report import text

REAL = text.TEMPLATES / "real"  # what was kept of runs on real nodules, which are not part of this project
SWEPT = {  # the results of sweeps
    "divisions of the real patients into folds": REAL / "splits.json",
    "runs on a phantom, simulated patches (`figures/headline/report.html`)": paths.ROOT
    / "figures/headline/results.json",
}
REPORT = "The report: "  # rows of cited.csv
SHOWN = {  # title and name of each row that is compared
    "benign": ("always “benign”, per patch", r"prevalence"),
    "frozen": ("like the report: frozen ResNet, TTA; per patch", r"second result, with TTA"),
    "patch": ("nodule network, per patch", r"nodule network, \d+ folds, patches"),
    "ruler": ("a ruler, per nodule", r"ruler on the whole nodule, \d+ folds, nodules"),
    "nodule": ("nodule network, per nodule", r"nodule network, \d+ folds, nodules"),
    "both": ("nodule network and ruler, per nodule", r"network and ruler, \d+ folds, nodules"),
}


@cache
def real() -> dict[str, Any]:
    """The ``results.json`` of the kept run on real nodules."""
    return json.loads((REAL / "results.json").read_text(encoding="utf-8"))


def swept() -> list[dict[str, Any]]:
    """Of each sweep that there is: ``runs``, how many; ``of``, what they are; and its findings by fact."""
    found = []
    for kind, path in SWEPT.items():
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            facts = {finding["fact"]: finding for finding in content["findings"]}
            found += (
                [{"runs": content["runs"], "of": kind, **facts}]
                if {"added_nodules", "gain_nodules"} <= set(facts)
                else []
            )
    return found


def ingredients() -> pd.DataFrame:
    """What each ingredient of the nodule network gained, on real nodules and on the phantom, as people read it."""
    table = pd.read_csv(REAL / "ingredients.csv")
    table["gain"] = [f"{row.value:+.3f} ({row.low:+.3f} to {row.high:+.3f})" for row in table.itertuples()]
    table["where"] = table["data"] + ", per " + table["counted"].str.removesuffix("s")
    wide = table.pivot(index="without", columns="where", values="gain")[table["where"].unique()]
    return (
        wide.reindex(table["without"].unique()).fillna("").reset_index(names="compared with").rename_axis(columns=None)
    )


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

    The runs are ``report``, whose keys are numbers, ``real`` and ``here``.
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
        | {end: row[f"accuracy{name}"] for end, name in (("value", ""), ("low", "_low"), ("high", "_high"))}
        for (run, key), (name, row) in named.items()
    }
    return pd.DataFrame.from_dict(lines, orient="index")


def values(content: dict[str, Any]) -> dict[str, Any]:
    """What ``answer.md`` names: ``reported``, rows and facts of the run on real nodules and of this one, ``swept``."""
    kept = real()
    facts = {key: value for of_notebook in kept["facts"].values() for key, value in of_notebook.items()}
    return {
        "reported": reported()[0],
        "swept": swept(),
        "here": rows(content),
        "real": rows(kept) | {"card": kept["card"], "facts": facts},
    }
