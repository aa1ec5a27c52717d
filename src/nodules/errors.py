"""Errors that a user can cause, each reported in one line."""

SEEDS = 2**31 - 1  # the largest seed: libraries accept twice as much, and repeats count on from it


class InputError(ValueError):
    """Unusable input. The message is one line: which file or name, what is wrong, what to do."""


class NotebookFailed(RuntimeError):
    """A cell raised an error, timed out or lost its kernel. The message shows the cell and the end of the error."""


def within(least: float, most: float, **named: float | list) -> None:
    """Check that each named number, or every number in a named list, lies between ``least`` and ``most``.

    Raises:
        InputError: a number is out of range, or a list is empty.
    """
    for name, value in named.items():
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(least <= number <= most for number in numbers):
            raise InputError(f"{name}={value}: out of range; use {least} to {most}")


def in_brief(error: Exception) -> str:
    """An error's text on one line, at most 200 characters, to quote in a message."""
    return " ".join(str(error).split())[:200]
