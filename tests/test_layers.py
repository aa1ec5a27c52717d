"""A module imports only from the layers above it in the list of the package's docstring."""

import ast
import re
from pathlib import Path

import nodules

PACKAGE = Path(nodules.__file__).parent
LAYERS = [re.findall(r"``(\w+)``", line) for line in re.findall(r"^\d+\. .*?(?=:)", nodules.__doc__, re.M)]


def test_every_module_stands_in_the_list_once():
    listed = [name for layer in LAYERS for name in layer]
    assert sorted(listed) == sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_modules_import_only_from_lower_layers():
    depth = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for name in depth:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("nodules") for alias in node.names), "write from nodules import x"
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nodules":
                parts = node.module.split(".")[1:]
                for imported in parts or [alias.name for alias in node.names]:
                    assert depth[imported] < depth[name], f"{name} imports {imported}"
