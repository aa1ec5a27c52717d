"""Every error that a user can cause, in one table, read from where the errors are raised."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd

from nodules import cards, paths

DOCUMENT = paths.ROOT / "docs" / "errors.md"
NAMES = ("InputError", "NotebookFailed")
MAKEFILE = r"(?:'error: |\$\(error )(.*; .*)[')]"
INTRODUCTION = """# What errors say

Written by `python -m nodules messages` from the places where the errors are raised; a test keeps it up to date.

Bad input ends with one line, `error: what: what is wrong; what to do`, and exit code 2. A notebook that fails for
another reason ends with its cell and the end of the error, and exit code 1. Words in *italics* stand for what is known
only when it happens.

"""


def table() -> pd.DataFrame:
    """One row a message: ``message`` (about what, and the cause), ``remedy``, ``raised in``.

    Raises:
        ValueError: a message lacks one of its parts.
    """
    rows = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            module = importlib.import_module(f"nodules.{path.stem}")
            rows += [(text, path.name) for text in _raised(path, module)]
    rows += [(re.sub(r"\$\((\w+)\)", r"*\1*", text), "Makefile") for text in re.findall(MAKEFILE, _makefile())]
    found = []
    for text, where in rows:
        message, mark, remedy = text.rpartition("; ")
        if not mark or ": " not in message:
            raise ValueError(f"{where}: {text!r} is not in the form what: what is wrong; what to do")
        found.append({"message": message, "remedy": remedy, "raised in": where})
    return pd.DataFrame(found)


def document() -> str:
    """The table as a page in markdown."""
    return INTRODUCTION + cards.markdown(table().replace(r"\|", r"\\|", regex=True)) + "\n"


def write() -> Path:
    """Write the page to where it is kept."""
    with paths.replacing(DOCUMENT) as temporary:
        temporary.write_text(document(), encoding="utf-8")
    return DOCUMENT


def _makefile() -> str:
    return (paths.ROOT / "Makefile").read_text(encoding="utf-8")


def _raised(path: Path, module: ModuleType) -> Iterator[str]:
    """Texts of the errors that a module makes; errors that it only passes on have none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
            text = "".join(_parts(node.args[0], module))
            if text:
                yield text.splitlines()[0]


def _parts(node: ast.expr, module: ModuleType) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.Call):  # lines that are joined: the first is the message
        yield from _parts(node.args[0].elts[0], module)
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from [_shown(value.value, module)] if isinstance(value, ast.FormattedValue) else _parts(value, module)


def _shown(node: ast.expr, module: ModuleType) -> str:
    """What stands between braces: a constant of the module as it is, anything else as its name in italics."""
    match node:
        case ast.Name(id=name) if name.isupper():
            return str(getattr(module, name))
        case ast.Call(func=ast.Attribute(attr="join"), args=[ast.Name(id=name)]) if name.isupper():
            return ", ".join(getattr(module, name))
        case ast.Attribute(value=ast.Name(), attr=name):
            return f"*{name}*"
    return f"*{[one.id for one in ast.walk(node) if isinstance(one, ast.Name)][-1]}*"
