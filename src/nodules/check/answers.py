"""What the checks of all lessons share."""

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np


class Wrong(AssertionError):
    """An answer that is not right yet. A notebook shows its message as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"Not yet: {self}"]


def right(why: str) -> None:
    """Tell a student that an answer is right, and why."""
    print(f"Right: {why}")


def require(holds: Any, hint: str) -> None:
    """Raise Wrong with a hint unless a condition holds."""
    if not holds:
        raise Wrong(hint)


def given(answer: Any, kind: type | tuple[type, ...] = object) -> Any:
    """An answer that is no longer the dots of its cell, and of one of the kinds.

    Raises:
        Wrong: it still is the dots, or of another kind.
    """
    require(answer is not ..., "there is no answer yet; replace the three dots")
    names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
    require(isinstance(answer, kind), f"the answer is a {type(answer).__name__}, but a {names} is asked for")
    return answer


def fields(answer: Any, names: Collection[str], what: str = "the answer") -> dict[str, Any]:
    """An answer as a dictionary that holds all of the names.

    Raises:
        Wrong: it is no dictionary, or lacks one of them.
    """
    answer = given(answer, dict)
    missing = set(names) - set(answer)
    require(not missing, f"{what} lacks {', '.join(sorted(missing))}")
    return answer


def number(answer: Any) -> float:
    """An answer as a finite number; numpy's numbers and 0-dimensional arrays count as numbers."""
    answer = answer.item() if hasattr(answer, "item") and np.ndim(answer) == 0 else answer
    answer = float(given(answer, (int, float)))
    require(math.isfinite(answer), f"{answer} is not a finite number")
    return answer


def close(answer: Any, expected: float, hint: str, within: float = 1e-6) -> None:
    """Raise Wrong with a hint unless an answer is a number near the expected one."""
    require(abs(number(answer) - expected) <= within, f"{number(answer):.4g} is not it; {hint}")


def array(answer: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An answer as an array of numbers of a shape."""
    try:
        answer = np.asarray(given(answer))
    except ValueError as error:
        raise Wrong("the parts of the answer differ in length") from error
    require(answer.dtype.kind in "biuf", f"the answer holds {answer.dtype}, but numbers are asked for")
    require(answer.shape == shape, f"the answer has the shape {answer.shape}, but {shape} is asked for")
    return answer


def choice(answer: Any, correct: str, wrong: dict[str, str]) -> None:
    """Raise Wrong unless the answer is the correct letter; ``wrong`` holds a hint for each other letter."""
    letter = given(answer, str).strip().lower()
    letters = ", ".join(sorted({correct, *wrong}))
    require(letter in {correct, *wrong}, f"{answer!r} is none of the letters; use one of {letters}")
    require(letter == correct, wrong.get(letter))


def called(function: Any, *arguments: Any) -> Any:
    """What a student's function returns.

    Raises:
        Wrong: it is no function, still a stub, or it fails; the cause is what stopped it.
    """
    given(function, Callable)
    try:
        result = function(*arguments)
    except Wrong:  # from a check that the function ran into
        raise
    except Exception as error:  # whatever a student's code raises is an answer to be told of
        raise Wrong(f"your function stopped with {type(error).__name__}: {error}") from error
    require(result is not ..., "the function has no body yet; replace the three dots")
    require(result is not None, "your function returns nothing; end it with return")
    return result
