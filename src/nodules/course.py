"""The course: its notebooks with their questions, their parameters, and the figures of the 2019 report."""

import ast
import json
import math
import reprlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodules.errors import InputError, in_brief

LITERALS = (bool, int, float, str, list)
LARGEST_INTEGER = 2**63  # in absolute value: numpy can't hold more


@dataclass(frozen=True)
class Lesson:
    """One notebook."""

    name: str  # of its file, without .ipynb
    title: str
    question: str  # its heading


DATA, ARCHITECTURES, RATE, TRAINING, WHOLE, RULER, INTERPRETATION, EVALUATION, DECISIONS, OWN_SCAN = LESSONS = (
    Lesson("01_data", "Data", "What is in the data, and how far do we get without looking at the images?"),
    Lesson("02_architectures", "Architectures", "Which pretrained network works best?"),
    Lesson("03_learning_rate", "Learning rate", "How fast should the network learn?"),
    Lesson("04_training", "Training", "How far do augmentation, cosine annealing and TTA get us?"),
    Lesson("05_whole_network", "Whole network", "Can the whole network be trained?"),
    Lesson("06_picture_or_ruler", "Picture or ruler", "Does the picture tell more than a ruler?"),
    Lesson("07_interpretation", "Interpretation", "What does the network look at, and where does it fail?"),
    Lesson("08_evaluation", "Evaluation", "How far can the results be trusted?"),
    Lesson("09_decisions", "Decisions", "What may be decided with it, and where does it break?"),
    Lesson("10_your_own_scan", "Your own scan", "What does the model say of a nodule in my scan?"),
)

# The figures of the 2019 report, by its numbers
FIGURES = {
    1: "Benign lung nodules",
    2: "Malignant lung nodules",
    3: "A convolutional neural network",
    4: "Training with ResNet34",
    5: "Training with ResNet50",
    6: "Training with ResNet101",
    7: "Training with ResNet152",
    8: "The learning-rate finder",
    9: "Learning-rate schedules",
    10: "Last layers trained without augmentation",
    11: "Last layers trained with augmentation",
    12: "Data augmentation of a lung nodule",
    13: "Malignant lung nodules and class activation maps",
    14: "First result: last layers",
    15: "Second result: augmentation, cosine annealing and TTA",
    16: "Most correct, predicted malignant",
    17: "Most correct, predicted benign",
    18: "Most incorrect, predicted malignant",
    19: "Most incorrect, predicted benign",
    20: "Most uncertain predictions",
    21: "Confusion matrix",
    22: "Whole network trained",
}


def figure_name(number: int) -> str:
    """The file name of a figure of the report, without its suffix: ``fig01`` for figure 1."""
    return f"fig{number:02d}"


HEADINGS = {figure_name(number): f"Figure {number}. {title}" for number, title in FIGURES.items()}
SHORT = {figure_name(number): f"Figure {number}" for number in FIGURES}


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook: ``source`` and ``metadata``.

    Read as JSON, since importing nbformat takes a second.

    Raises:
        InputError: the file is not a readable notebook.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{notebook}: not a readable notebook ({in_brief(error)}); restore it from the repository"
        ) from error


def parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults in a notebook's ``parameters`` cell, which may only assign literals.

    Raises:
        InputError: an unreadable notebook, no or several such cells, or a statement that does not assign a literal.
    """
    cells = [cell for cell in code_cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{notebook}: {len(cells)} cells are tagged 'parameters'; tag exactly one")
    defaults = {}
    for statement in ast.parse(cells[0]["source"]).body:
        try:
            (target,) = statement.targets
            defaults[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError) as error:
            text = ast.unparse(statement)
            raise InputError(f"{notebook}: parameter {text!r} is not a literal; write name = value") from error
        if type(defaults[target.id]) not in LITERALS:
            raise InputError(f"{notebook}: parameter {target.id} is not a bool, int, float, str or list; make it one")
    return defaults


def typed(name: str, value: Any, default: Any) -> Any:
    """A parameter's value in the type of its default; a float may be given as 3 or ``1e-3``, which YAML reads as text.

    Raises:
        InputError: a value of another type, or not a usable one.
    """
    if isinstance(default, float) and type(value) in (int, str):
        with suppress(ValueError, OverflowError):
            value = float(value)
    shown = reprlib.repr(value)
    if type(value) is not type(default):
        given, expected = type(value).__name__, type(default).__name__
        raise InputError(f"{name}: {shown} is {given}, not {expected}; write it as in {name}: {default!r}")
    too_large = isinstance(value, int) and abs(value) > LARGEST_INTEGER
    if too_large or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{name}: {shown} is infinite, NaN or too large; write it as in {name}: {default!r}")
    if isinstance(value, str) and not value.isprintable():
        raise InputError(f"{name}: {shown} contains unprintable characters; remove them")
    if isinstance(default, list) and default:
        return [typed(name, item, default[0]) for item in value]
    return value
