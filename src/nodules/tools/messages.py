"""Every error that a user can cause, in one table, collected from the code that raises them."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd

from nodules import paths
from nodules.report.text import markdown

PACKAGE = Path(__file__).parents[1]
DOCUMENT = paths.ROOT / "docs" / "errors.md"
NAMES = ("InputError", "NotebookFailed")
MAKEFILE = r"(?:'error: |\$\(error )(.*; .*)[')]"
INTRODUCTION = """# Error messages

Written by `make errors` from the code that raises the errors; a test keeps this page up to date.

Bad input ends with one line, `error: what: what is wrong; what to do`, and exit code 2. A notebook that fails for any
other reason ends with its cell and the last lines of the error, and exit code 1. Words in *italics* stand for what is
known only when the error occurs.

"""


def table() -> pd.DataFrame:
    """One row per message: ``message`` (the subject and what is wrong), ``remedy``, ``raised in``.

    Raises:
        ValueError: a message lacks one of its parts.
    """
    raised = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if not name.stem.startswith("__"):
            module = importlib.import_module(".".join((PACKAGE.name, *name.with_suffix("").parts)))
            raised += [(text, str(name)) for text in _texts(path, module)]
    raised += [(re.sub(r"\$\((\w+)\)", r"*\1*", text), "Makefile") for text in re.findall(MAKEFILE, _makefile())]
    rows = []
    for text, place in raised:
        message, mark, remedy = text.rpartition("; ")
        if not mark or ": " not in message:
            raise ValueError(f"{place}: {text!r} lacks the form what: what is wrong; what to do")
        rows.append({"message": message, "remedy": remedy, "raised in": place})
    return pd.DataFrame(rows)


def document() -> str:
    """The table as a page in Markdown."""
    return INTRODUCTION + markdown(table().replace(r"\|", r"\\|", regex=True)) + "\n"


def write() -> Path:
    """Write the page to ``DOCUMENT``."""
    return paths.write(DOCUMENT, document())


def _makefile() -> str:
    return (paths.ROOT / "Makefile").read_text(encoding="utf-8")


def _texts(path: Path, module: ModuleType) -> Iterator[str]:
    """The texts of the errors that a module creates; an error that is only passed on has none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
            text = "".join(_pieces(node.args[0], module))
            if text:
                yield text.splitlines()[0]


def _pieces(node: ast.expr, module: ModuleType) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.Call):  # of join: the first line is the message
        yield from _pieces(node.args[0].elts[0], module)
    elif isinstance(node, ast.JoinedStr):
        for part in node.values:
            yield from [_filled(part.value, module)] if isinstance(part, ast.FormattedValue) else _pieces(part, module)


def _filled(node: ast.expr, module: ModuleType) -> str:
    """The text for an expression in braces: the values of a constant, or the last name in it, in italics."""
    match node:
        case ast.Name(name) if name.isupper():
            return str(getattr(module, name))
        case ast.Subscript(ast.Name(name), ast.Constant(place)) if name.isupper():
            return str(getattr(module, name)[place])
        case ast.Call(ast.Attribute(attr="join"), [ast.Name(name)]) if name.isupper():
            return ", ".join(getattr(module, name))
        case ast.Call(ast.Attribute(attr="join"), [ast.Attribute(ast.Name(owner), name)]) if name.isupper():
            return ", ".join(getattr(getattr(module, owner), name))
        case ast.Attribute(attr=name):
            return f"*{name}*"
    return f"*{[name.id for name in ast.walk(node) if isinstance(name, ast.Name)][-1]}*"
