"""Packages that the default environment does not have."""

import importlib
from types import ModuleType

from nodules.errors import InputError


def package(name: str, group: str = "teaching") -> ModuleType:
    """Import a package or one of its modules; ``group`` names the requirements that it is part of.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name}: not installed; add the packages of requirements-{group}.txt") from error
