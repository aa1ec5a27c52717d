"""The cache of what takes long to make: each file under a key of all that it depends on, and checked when it is read.

A file ``<stem>-<key>.<suffix>`` has a note beside it, ``<stem>-<key>.json``, with its SHA-256 and what its maker noted.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nodules import paths

DIGITS = 16  # of the key's hash in a file's name


def place(stem: str, suffix: str, key: Mapping[str, Any]) -> Path:
    """Where a file is kept.

    Args:
        stem: what the file is, for people.
        suffix: of its name, such as ``npz``.
        key: all that its content depends on: text, numbers, None, lists and dictionaries of them.
    """
    text = json.dumps(key, sort_keys=True, default=lambda number: number.item())
    return paths.cache() / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:DIGITS]}.{suffix}"


def kept(
    stem: str, suffix: str, key: Mapping[str, Any], make: Callable[[Path], dict[str, Any] | None]
) -> tuple[Path, dict[str, Any]]:
    """Find a file in the cache, or make it if it is missing or not as it was written.

    Args:
        stem: as for :func:`place`.
        suffix: as for :func:`place`.
        key: as for :func:`place`.
        make: writes the file to the path that it is given; what it returns is noted beside the file.

    Returns:
        The file's path; what ``make`` returned when the file was made, and the file's ``sha256``.

    Raises:
        InputError: the cache can't be written to.
    """
    path = place(stem, suffix, key)
    note = _note(path)
    if note is None:
        with paths.replacing(path) as temporary:
            made = make(temporary) or {}
            text = json.dumps(made | {"sha256": paths.sha256(temporary)}, default=lambda number: number.item())
            # The note first, so that there is never a file without one; a note without its file makes the file anew
            with paths.replacing(path.with_suffix(".json")) as beside:
                beside.write_text(text, encoding="utf-8")
        note = json.loads(text)  # the same as a later reading returns
    return path, note


def _note(path: Path) -> dict[str, Any] | None:
    """The note beside a file; None unless both are there and the file is as it was written."""
    try:
        note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return note if paths.sha256(path) == note["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
