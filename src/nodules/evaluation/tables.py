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
    """Losses of several trainings: ``arm, stopped, phase, part, done, loss``, for :func:`nodules.plots.phases`.

    ``done`` is the progress, 0 to 1, in the phase ``all layers``; a training that stopped early ends below 1. The
    history of the ``head`` that all started from, if any, runs from -1 to 0, in the phase ``head alone``.
    """
    losses, length = [], max(training.steps["epoch"].iloc[-1] for training in trainings.values()) or 1
    for arm, training in trainings.items():
        histories = [("all layers", training.steps), ("all layers", training.history[["epoch", "valid_loss"]])]
        histories = [(phase, each.assign(done=(each["epoch"] / length).clip(upper=1))) for phase, each in histories]
        if head is not None:
            histories.insert(0, ("head alone", head.assign(done=head["epoch"] / head["epoch"].iloc[-1] - 1)))
        for phase, history in histories:
            named = history.rename(columns={"valid_loss": "valid", "train_loss": "train", "loss": "train"})
            long = named.melt("done", [name for name in ("train", "valid") if name in named], "part", "loss")
            losses.append(long.assign(arm=arm, stopped=bool(training.stopped), phase=phase))
    return pd.concat(losses, ignore_index=True)
