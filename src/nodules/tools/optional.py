"""Packages of the teaching group, which the default environment does not have."""

import importlib
from types import ModuleType

from nodules.errors import InputError


def package(name: str) -> ModuleType:
    """Import a package or one of its modules.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name}: not installed; add the packages of requirements-teaching.txt") from error
