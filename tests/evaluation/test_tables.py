from dataclasses import replace

import numpy as np
import pandas as pd
from torch import nn

from nodules.evaluation import tables
from nodules.networks.heads import Training

SCORE = {"auc": 0.8, "auc_low": 0.7, "auc_high": 0.9, "accuracy": 0.75, "accuracy_low": 0.6, "accuracy_high": 0.85}
LOSSES = [0.6, 0.5, 0.4]
TRAINED = Training(
    nn.Identity(),
    pd.DataFrame({"epoch": [1.0, 2.0, 3.0], "train_loss": 0.1, "valid_loss": LOSSES, "accuracy": 0.5}),
    pd.DataFrame({"epoch": np.arange(6) / 2, "loss": np.linspace(0.9, 0.4, 6), "lr": 0.1}),
    1.0,
    "",
)


def test_a_brief_table_names_the_metrics_of_both_sides():
    brief = tables.brief(SCORE | {"brier": 0.2}, SCORE | {"auc": 0.5})
    sides, metrics = ("valid", "test"), ("AUC", "accuracy")
    assert list(brief) == [f"{side} {m}{end}" for side in sides for m in metrics for end in ("", " low", " high")]
    assert (brief["valid AUC"], brief["test AUC"], brief["test accuracy high"]) == (0.8, 0.5, 0.85)


def test_a_forest_has_a_row_for_each_side_of_each_network():
    forest = tables.forest({"a": {"valid": SCORE, "test": SCORE}, "b": {"test": SCORE | {"auc": 0.72}}}, "auc")
    assert forest.values.tolist() == [
        ["a", "valid", 0.8, 0.7, 0.9],
        ["a", "test", 0.8, 0.7, 0.9],
        ["b", "test", 0.72, 0.7, 0.9],
    ]
    assert list(forest) == ["name", "part", "value", "low", "high"]


def test_phases_end_the_head_where_all_layers_begin():
    head = pd.DataFrame({"epoch": [1, 2], "train_loss": [0.7, 0.6], "valid_loss": [0.8, 0.7], "accuracy": 0.5})
    table = tables.phases({"a": TRAINED}, head)
    before, after = table[table["done"] <= -0.5], table[(table["done"] > 0) & (table["part"] == "valid")]
    assert before["loss"].tolist() == [0.7, 0.8]
    assert table.loc[table["done"] == 0, "loss"].isin([0.6, 0.7]).sum() == 2
    assert table["done"].between(-1, 1).all() and np.allclose(after["loss"], LOSSES)
    assert set(before["phase"]) == {"head alone"} and set(after["phase"]) == {"all layers"}
    assert tables.phases({"a": TRAINED})["done"].min() == 0


def test_a_training_that_stopped_ends_early():
    stopped = replace(TRAINED, steps=TRAINED.steps.head(2), history=TRAINED.history.head(0), stopped="diverged")
    table = tables.phases({"a": TRAINED, "b": stopped})
    assert table.groupby("arm")["done"].max().to_dict() == {"a": 1.0, "b": 0.2}
    assert table.groupby("arm")["stopped"].all().to_dict() == {"a": False, "b": True}


def test_phases_show_the_losses_of_the_steps_and_of_every_arm():
    table = tables.phases({"a": TRAINED, "b": TRAINED})
    assert set(table["arm"]) == {"a", "b"}
    steps = table[(table["arm"] == "b") & (table["part"] == "train")]
    assert np.allclose(steps["done"], np.linspace(0, 1, 6)) and np.allclose(steps["loss"], TRAINED.steps["loss"])
