"""What a user can do wrong, said in one line."""

SEEDS = 2**32 - 1  # the largest seed that all libraries take


class InputError(ValueError):
    """Input that cannot be used. The message is one line: which file or name, what is wrong, what to do."""


class NotebookFailed(RuntimeError):
    """A cell raised, timed out, or lost its kernel. The message names the cell and ends with the error."""


def within(least: float, most: float, **named: float | list) -> None:
    """Refuse a number, or any of a list, that is not in ``least`` to ``most``, and an empty list, under its name.

    Raises:
        InputError: there is such a number.
    """
    for name, value in named.items():
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(least <= number <= most for number in numbers):
            raise InputError(f"{name}={value}: out of range; take from {least} to {most}")
