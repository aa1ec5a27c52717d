"""Cards: what the data are, what the model is for, and the CLAIM checklist, all said from a run's results.

Each function takes what ``report.build`` writes to ``results.json`` and returns markdown.
"""

from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from nodules import decisions, metrics, patches, phantom, split

CLAIM = Path(__file__).with_name("claim.csv")
MODEL = ("04_training", "second result, with TTA")  # the row that the model card is about
MISSING = "not measured in this run"
APART = {
    "patient": "All patches of a patient stand on one side.",
    "random": "Patches are shuffled, so that slices of one nodule can stand on both sides and scores be too good.",
}
BORROWED = {
    "chest-ct": "learned on chest CTs and their reports; which scans is not stated, so that an overlap with LIDC-IDRI "
    "can't be excluded",
    "imagenet": "learned on photographs (ImageNet)",
    "random": "drawn at random, never trained",
}
UNREAD = {
    "phantom": "Rendered when asked for; by default as many patches of each class as Kaggle's set has.",
    "kaggle": "A set with other counts than these is refused.",
    "own": "An npz or HDF5 file with these keys:\n\n```\n" + patches.__doc__.split("\n\n")[-1].strip() + "\n```",
}
# What a card can name, by where it is from: a notebook (its parameters and facts), the model's row, the run, a module
SAID = {
    "sizes": "{data[n_train]} patches train, {data[n_valid]} select, {data[n_test]} test",
    "tested": "{data[n_test]}",
    "version": "profile `{training[profile]}`, seed {training[seed]}, code {training[git_revision]}",
    "profile": "{run[profile]}",
    "revision": "{run[git_revision]}",
    "seed": "{training[seed]}",
    "folds": "{split.FOLDS}",
    "slices": "{phantom.MAX_SLICES}",
    "resamples": "{metrics.RESAMPLES}",
    "bins": "{metrics.BINS}",
    "network": "{training[weights]}; patches brought to {architectures[size]} pixels a side; stages that the head "
    "reads: {architectures[pool]}",
    "body": "{training[weights]}",
    "choice": "{architectures[chosen]} (AUC {architectures[valid_auc]:.3f} on valid): of those within one standard "
    "error of the best on valid, the one with the fewest parameters",
    "rate": "median of what fastai's finder suggests (valley) with {learning_rate[lr_seeds]} seeds",
    "training": "{training[epochs]} epochs of Adam on the cross-entropy; learning rate {training[lr]:.1e}, falling "
    "along a cosine with restarts (first cycle {training[cycle_len]} epochs, growth factor {training[cycle_mult]}); "
    "{training[views]} views of each patch, itself and random turns, one of them drawn in each epoch",
    "tta": "the probabilities of {training[views]} views, the patch and its turns, are averaged (rule: "
    "{training[rule]})",
    "result": "AUC {model[auc]:.3f} ({model[auc_low]:.3f} to {model[auc_high]:.3f}), accuracy {model[accuracy]:.3f} "
    "({model[accuracy_low]:.3f} to {model[accuracy_high]:.3f}) on {model[n]} test patches",
    "log_loss": "{model[log_loss]:.3f} ({model[log_loss_low]:.3f} to {model[log_loss_high]:.3f})",
    "threshold": "{interpretation[threshold]:.3f}",
    "maps": "Grad-CAM of stage {interpretation[stage]} ({interpretation[side]} x {interpretation[side]}); rank "
    "correlation {interpretation[alike]:.2f} with the maps of a head of random weights, where 1 is the same map",
    "calibration": "expected calibration error on test {evaluation[ece_before]:.3f}, and {evaluation[ece_after]:.3f} "
    "after dividing logits by a temperature of {evaluation[temperature]:.2f} fitted on valid; Brier score then "
    "{evaluation[brier]:.3f}",
    "sensitivity": "{evaluation[sensitivity_at_90]:.3f} ({evaluation[sensitivity_at_90_low]:.3f} to "
    "{evaluation[sensitivity_at_90_high]:.3f}) where the threshold reaches a specificity of {decisions.RATES[0]} on "
    "valid",
    "specificity": "{evaluation[specificity_at_90]:.3f} ({evaluation[specificity_at_90_low]:.3f} to "
    "{evaluation[specificity_at_90_high]:.3f}) where the threshold reaches a sensitivity of {decisions.RATES[0]} on "
    "valid",
    "conformal": "sets that may miss the truth in {decisions.ALPHA:.0%} hold it in "
    "{evaluation[conformal_coverage]:.1%} ({evaluation[conformal_coverage_low]:.1%} to "
    "{evaluation[conformal_coverage_high]:.1%}) of test patches; {evaluation[conformal_single]:.1%} name one class",
    "leakage": "dealing the same patches at random instead of keeping {evaluation[kept]} apart changes the AUC of a "
    "quick model on the same features by {evaluation[inflation_auc]:+.3f} ({evaluation[inflation_auc_low]:+.3f} to "
    "{evaluation[inflation_auc_high]:+.3f}; {evaluation[repeats]} repeats)",
    "duplicates": "{evaluation[duplicates_share]:.1%} of all patches have one",
    "readers": "AUC {evaluation[reader_auc]:.3f}, kappa {evaluation[reader_kappa]:.2f} for one radiologist against the "
    "median of the others; AUC {evaluation[model_auc_readers]:.3f}, kappa {evaluation[model_kappa_readers]:.2f} for "
    "the model against the same targets on the same nodules; intervals in report.html",
    "shift": "of the simulated shifts at the highest severity the worst is {evaluation[worst_shift]}, which changes "
    "the AUC by {evaluation[worst_shift_auc]:+.3f}",
}
MODEL_CARD = Template("""## Model card

After Mitchell et al. 2019, Model Cards for Model Reporting, https://doi.org/10.1145/3287560.3287596. $about

**This is no medical device. Nothing here may be used to diagnose or treat anyone.**

### Model details

- **Which**: the second result with TTA of notebook `04_training`; $version.
- **Body**: a convolutional network, frozen: $network. Its weights were $borrowed.
- **Choice of the body**: $choice.
- **Head**: batch norm, a hidden layer, dropout, two logits; trained here (learners.py).
- **Training**: $training. The weights of the last epoch are kept.
- **Learning rate**: $rate.
- **Test-time augmentation (TTA)**: $tta.
- **Output**: the probability that a patch is labelled malignant.
- **Licence**: code MIT; pretrained weights as their owners say (README.md).

### Intended use

- **For**: learning how such a model is built, measured and doubted; comparing methods on one split.
- **By**: students, teachers, researchers.
- **Not for**: diagnosis, screening, triage, treatment, or any advice to a patient. Whole scans: somebody has to find \
the nodule first. Patches of another source: not tested.

### Factors

- **Likely to matter**: the nodule's size and texture, the scanner, its kernel, dose and slice thickness, who rated; \
age, sex, smoking and disease of the patient.
- **Looked at, where the source knows them**: the diameter, as a rival of the model (Quantitative analyses); the \
radiologists (likewise); the scanner (Robustness).
- **Not looked at**: age, sex, ethnicity, smoking, hospital. No score is broken down by groups of people.

### Metrics

- **AUC**: the chance that a malignant patch is ranked above a benign one.
- **Accuracy**: share of patches on the right side of probability 0.5.
- **Log-loss**: mean negative log-likelihood, in nats. **Brier score**: mean squared distance from the label.
- **Expected calibration error**: mean gap between the probability and the share of malignant patches, over $bins bins.
- **Sensitivity, specificity**: share of malignant patches called malignant, of benign ones called benign.
- **Kappa**: agreement beyond chance.
- **Intervals**: 95%, by bootstrap of the test $units ($resamples resamples). They tell how much another test set of \
this source would change a score, not what another training or another split would.

### Training data

$title: $patches patches ($malignant malignant, $benign benign), patients: $patients. $sizes. $apart What the data \
are: data_card.md.

### Evaluation data

The $tested test patches of the same source. The notebooks choose nothing on them, but whoever works on the notebooks \
sees their scores. No data of another source.

### Quantitative analyses

$table

- **Log-loss of the model**: $log_loss.
- **Against radiologists**: $readers.
- **By groups of people**: not measured.

### Calibration and decisions

- **Calibration**: $calibration.
- **Sensitivity on test**: $sensitivity.
- **Specificity on test**: $specificity.
- **Conformal sets**: $conformal.

### Robustness

- **Leakage**: $leakage.
- **Near-duplicates**: $duplicates.
- **Another scanner**: $shift.

### Ethical considerations

- Behind the data stand people who were scanned. Licence: $licence. Of a patient this project knows at most the \
identifier that the source gives.
- A malignant nodule called benign costs time that a patient may not have; a benign one called malignant costs \
needless procedures. Neither was measured in patients.
- Whether the model is equally right for all groups of people is unknown.

### Caveats and recommendations

$limits
- One split and one training: another seed gives other numbers.
- Before any claim about patients: proven diagnoses, other hospitals, and a protocol written first.
""")


def about(content: dict[str, Any]) -> str:
    """Which run the numbers come from, in one line."""
    run = content["runs"][0]
    what = "**a simulation, not patients**" if run["simulation"] else "measured images"
    return (
        f"Run `{run['profile']}` on {run['data']} ({what}), {run['split']} split, seed {run['parameters']['seed']}. "
        f"Fitted on train, reported on test, intervals by bootstrap over {_units(content)}."
    )


def data_card(content: dict[str, Any]) -> str:
    """The card of the run's own source, generated so that it cannot go stale."""
    card = dict(content["card"])
    limits, card["notes"] = _list(card.pop("limits")), " ".join(card["notes"]) or "none"
    scores = result_table([row for row in content["rows"] if row["notebook"] == "01_data"])
    scores = markdown(scores[["what", "AUC (95% interval)"]])
    return f"## Data card: {card['title']}\n\n{limits}\n\n{_fields(card)}\n\nModels that see no picture:\n\n{scores}\n"


def data_cards(content: dict[str, Any]) -> str:
    """The card of the run's own source, then what is known of the sources that it did not read."""
    others = [_unread(name) for name in UNREAD if name != source(content)]
    return "\n".join([data_card(content), *others])


def model_card(content: dict[str, Any]) -> str:
    """What the model is, for what it may be used, how it was measured (Mitchell et al. 2019)."""
    if not _model(content):
        return f"## Model card\n\n{about(content)} It has not trained the model of `{MODEL[0]}`.\n"
    rows = [row for row in content["rows"] if row["notebook"] in ("01_data", MODEL[0])]
    names = _names(content) | {"limits": _list(content["card"]["limits"]), "table": markdown(result_table(rows))}
    return MODEL_CARD.substitute(names)


def claim(content: dict[str, Any]) -> str:
    """The CLAIM checklist (``claim.csv``), answered for this run's source."""
    items = pd.read_csv(CLAIM, keep_default_na=False)
    kind, names = source(content), _names(content)
    answers = [row.get(kind) or row["answer"] for row in items.to_dict("records")]
    filled = [Template(answer).substitute(names) for answer in answers]
    table = items[["item", "section", "asked"]].assign(answer=filled)
    return (
        "## CLAIM checklist\n\nChecklist for Artificial Intelligence in Medical Imaging, 2024 update: Tejani et al. "
        "2024, Radiology: Artificial Intelligence 6(4), e240300, https://doi.org/10.1148/ryai.240300 (first edition: "
        "Mongan, Moy, Kahn 2020, https://doi.org/10.1148/ryai.2020200029). What is asked is put in our own words. "
        f"{about(content)}\n\n{markdown(table)}\n"
    )


def source(content: dict[str, Any]) -> str:
    """Which source the run read: ``phantom``, ``kaggle`` or ``own``."""
    titles = {known["title"]: name for name, known in patches.SOURCES.items()}
    return titles.get(content["card"]["title"], "own")


def result_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as people read them: value and 95% interval in one cell."""

    def cell(row: dict[str, Any], metric: str) -> str:
        return f"{row[metric]:.3f} ({row[f'{metric}_low']:.3f} to {row[f'{metric}_high']:.3f})"

    cells = [
        {
            "what": row["name"],
            "AUC (95% interval)": cell(row, "auc"),
            "accuracy (95% interval)": cell(row, "accuracy"),
            "weights": row.get("weights", "none"),
            "split": row["split"],
            "seed": row["seed"],
            "test patches": row["n"],
        }
        for row in rows
    ]
    return pd.DataFrame(cells)


def markdown(table: pd.DataFrame) -> str:
    """A table in markdown, without its index."""
    rows = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _fields(card: dict[str, Any]) -> str:
    return markdown(pd.DataFrame({"field": card.keys(), "value": card.values()}).fillna("unknown"))


def _unread(name: str) -> str:
    """The card of a source that this run did not read: what is known without reading it."""
    card = dict(patches.SOURCES.get(name, patches.OWN))
    title, limits = card.pop("title", "a file of your own"), _list(card.pop("limits"))
    counts = patches.KAGGLE_COUNTS if name == "kaggle" else {}
    note = f"Not read by this run: no number of its report comes from here. {UNREAD[name]}"
    return f"## Data card: {title}\n\n{note}\n\n{limits}\n\n{_fields(card | counts)}\n"


def _units(content: dict[str, Any]) -> str:
    return "patches" if content["card"]["patients"] is None else "patients"


def _model(content: dict[str, Any]) -> dict[str, Any]:
    """The row of the model that the cards describe; empty where this run has not trained it."""
    return next((row for row in content["rows"] if (row["notebook"], row["name"]) == MODEL), {})


def _names(content: dict[str, Any]) -> dict[str, str]:
    """All that a card or an answer can name, as text; where this run lacks a number, that it does."""
    run, model = content["runs"][0], _model(content)
    values = {"run": run, "model": model}
    values |= {"decisions": decisions, "metrics": metrics, "phantom": phantom, "split": split}
    for one in content["runs"]:
        values[one["notebook"].partition("_")[2]] = one | one["parameters"] | content["facts"][one["notebook"]]
    names = {key: "unknown" if value is None else str(value) for key, value in content["card"].items()}
    names |= {"about": about(content), "units": _units(content), "apart": APART[run["split"]]}
    names |= {"borrowed": BORROWED.get(model.get("weights"), MISSING), "limits": " ".join(content["card"]["limits"])}
    return names | {name: _said(text, values) for name, text in SAID.items()}


def _said(text: str, values: dict[str, Any]) -> str:
    try:
        return text.format(**values)
    except KeyError:
        return MISSING
