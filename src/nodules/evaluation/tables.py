"""Results reshaped into the tables of figures and reports."""

import pandas as pd

from nodules.networks.heads import Training


def brief(valid: dict[str, float], test: dict[str, float]) -> dict[str, float]:
    """AUC and accuracy on valid and test with their intervals, keyed by column title."""
    ends = {"": "", "_low": " low", "_high": " high"}
    return {
        f"{part} {title}{text}": score[f"{metric}{end}"]
        for part, score in (("valid", valid), ("test", test))
        for metric, title in (("auc", "AUC"), ("accuracy", "accuracy"))
        for end, text in ends.items()
    }


def forest(scores: dict[str, dict[str, dict[str, float]]], metric: str) -> pd.DataFrame:
    """One metric of ``scores[name][part]`` as ``name, part, value, low, high``, for :func:`nodules.plots.intervals`."""
    rows = [
        (name, part, score[metric], score[f"{metric}_low"], score[f"{metric}_high"])
        for name, parts in scores.items()
        for part, score in parts.items()
    ]
    return pd.DataFrame(rows, columns=["name", "part", "value", "low", "high"])


def phases(trainings: dict[str, Training], head: pd.DataFrame | None = None) -> pd.DataFrame:
    """Losses of several trainings: ``arm, part, done, loss``, for :func:`nodules.plots.phases`.

    ``done`` is training progress, 0 to 1. The history of the ``head`` that all started from, if any, runs from -1 to 0.
    """
    losses = []
    for arm, training in trainings.items():
        length = training.steps["epoch"].iloc[-1] or 1
        histories = [training.history[["epoch", "valid_loss"]], training.steps[["epoch", "loss"]]]
        histories = [history.assign(epoch=(history["epoch"] / length).clip(upper=1)) for history in histories]
        if head is not None:
            histories.append(head.assign(epoch=head["epoch"] / head["epoch"].iloc[-1] - 1))
        for history in histories:
            named = history.rename(
                columns={"epoch": "done", "valid_loss": "valid", "train_loss": "train", "loss": "train"}
            )
            long = named.melt("done", [name for name in ("train", "valid") if name in named], "part", "loss")
            losses.append(long.assign(arm=arm))
    return pd.concat(losses, ignore_index=True).sort_values("done", kind="stable")
