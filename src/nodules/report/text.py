"""Text with gaps to fill: one jinja2 environment for the report, the cards and the README.

A template that names a number which a run did not keep is an error. Where a run may lack a number, the template says
so itself, by a condition.
"""

import math
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from nodules import course
from nodules.errors import InputError
from nodules.evaluation.metrics import wilson

TEMPLATES = Path(__file__).with_name("templates")
PICO = TEMPLATES / "pico.classless.min.css"  # https://picocss.com, version 2.1.1, MIT licence
WORDS = {None: "unknown", True: "yes", False: "no"}


def number(value: float, spec: str = ".3f") -> str:
    """A number as text."""
    return format(float(value), spec)


def interval(values: dict[str, float], name: str, spec: str = ".3f") -> str:
    """A value with its 95% interval, ``name``, ``<name>_low`` and ``<name>_high``: ``0.891 (0.835 to 0.935)``."""
    return span(*(_value(values, f"{name}{end}") for end in ("", "_low", "_high")), spec)


def style() -> str:
    """The style sheet of pages."""
    return PICO.read_text(encoding="utf-8")


def span(value: float, low: float, high: float, spec: str = ".3f") -> str:
    """A value and the ends of its interval as text, as in :func:`interval`."""
    return f"{number(value, spec)} ({number(low, spec)} to {number(high, spec)})"


def excludes(values: dict[str, float], name: str, reference: float = 0.0) -> bool:
    """Whether the 95% interval of a value excludes ``reference``: only then is a difference claimed."""
    return not float(_value(values, f"{name}_low")) <= reference <= float(_value(values, f"{name}_high"))


def in_words(value: Any) -> Any:
    """A field of a card as text."""
    if isinstance(value, list):
        return " ".join(value) or "none"
    return WORDS[value] if value is None or isinstance(value, bool) else value


def markdown(table: pd.DataFrame) -> str:
    """A table in markdown, without its index; an empty cell is a dash."""
    cells = table.astype(object).where(table.notna(), "–")
    rows = [table.columns, ["---"] * table.shape[1], *cells.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def render(template: str, values: dict[str, Any]) -> str:
    """Fill a template of this package.

    Args:
        template: its file name.
        values: what it can name; the sentences of ``sentences.md`` are there as ``say``.

    Raises:
        InputError: it names a number that the run did not keep.
    """
    return _fill(ENVIRONMENT.get_template(template), values, template).strip() + "\n"


def render_text(text: str, values: dict[str, Any], name: str) -> str:
    """Fill a template given as text.

    Args:
        text: such as an answer of ``claim.csv``.
        values: as for :func:`render`.
        name: of the file it is from.

    Raises:
        InputError: as for :func:`render`.
    """
    return _fill(ENVIRONMENT.from_string(text), values, name)


def _fill(template: jinja2.Template, values: dict[str, Any], name: str) -> str:
    sentences = ENVIRONMENT.get_template("sentences.md")
    try:
        return template.render(values | {"say": sentences.make_module(values)})
    except jinja2.UndefinedError as error:
        raise InputError(f"{name}: needs what this run did not keep ({error}); run make notebooks again") from error


def _value(values: dict[str, float], name: str) -> Any:
    """A number by its name; if it is unknown, jinja2's undefined value, which no text can be made of."""
    return ENVIRONMENT.getitem(values, name)


def _no_gap(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise jinja2.UndefinedError(f"a value is {value}")
    return value


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    undefined=jinja2.StrictUndefined,
    finalize=_no_gap,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"number": number, "in_words": in_words, "markdown": markdown}
ENVIRONMENT.globals |= {"interval": interval, "span": span, "excludes": excludes, "wilson": wilson, "course": course}
