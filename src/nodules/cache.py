"""A cache of slow results: each file has a key of everything that it depends on, and is verified when read.

A file ``<stem>-<key>.<suffix>`` has a note beside it, ``<stem>-<key>.json``, with its SHA-256 and its maker's notes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nodules import paths

DIGITS = 16  # of the key's hash in a file name


def place(stem: str, suffix: str, key: Mapping[str, Any]) -> Path:
    """The path of a cached file.

    Args:
        stem: human-readable start of its name.
        suffix: of its name, such as ``npz``.
        key: everything that its content depends on: text, numbers, None, lists and dictionaries of them.
    """
    text = json.dumps(key, sort_keys=True, default=lambda number: number.item())
    return paths.cache() / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:DIGITS]}.{suffix}"


def kept(
    stem: str, suffix: str, key: Mapping[str, Any], make: Callable[[Path], dict[str, Any] | None]
) -> tuple[Path, dict[str, Any]]:
    """Find a file in the cache, or make it if it is missing or damaged.

    ``make`` writes the file to a given path; what it returns is noted beside it. Other arguments as for :func:`place`.

    Returns:
        The file's path; what ``make`` returned, with the file's ``sha256``.

    Raises:
        InputError: the cache can't be written to.
    """
    path = place(stem, suffix, key)
    note = _note(path)
    if note is None:
        with paths.replacing(path) as temporary:
            made = make(temporary) or {}
            text = json.dumps(made | {"sha256": paths.sha256(temporary)}, default=lambda number: number.item())
            # The note first: no file is ever without one, and a note without its file is ignored
            with paths.replacing(path.with_suffix(".json")) as beside:
                beside.write_text(text, encoding="utf-8")
        note = json.loads(text)  # the same as on later calls
    return path, note


def _note(path: Path) -> dict[str, Any] | None:
    """The note beside a file; None if either is missing or damaged."""
    try:
        note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return note if paths.sha256(path) == note["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
