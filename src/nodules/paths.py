"""Where files are, and how they are written atomically."""

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from nodules.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
PARTIAL = ".partial-"  # prefix of the name of a file that is being written
UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),  # something else is in the way
}


def resolve(path: str | Path) -> Path:
    """A user's path, made absolute: relative to the project's root, whatever the working directory."""
    return (ROOT / Path(path).expanduser()).resolve()


def cache() -> Path:
    """The cache folder: ``.cache``, or the one that the environment variable ``NODULES_CACHE`` names."""
    named = os.environ.get("NODULES_CACHE")
    return resolve(named) if named else ROOT / ".cache"


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which it replaces if the block succeeds.

    The writer locks the temporary file, and the system releases the lock if the writer is killed. So files left behind
    by killed writers can be told from those being written, and are removed here. On file systems without locks, such
    as some network drives, they stay.

    Raises:
        InputError: no space, or no permission to write.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{PARTIAL}*"):
            _remove_unlocked(left)
        handle, temporary = _locked(path)
        try:
            yield temporary
            with suppress(PermissionError):  # Windows drives have no modes
                temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)


def write(path: Path, text: str) -> Path:
    """Write a text atomically, as with :func:`replacing`; its path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@contextmanager
def alone(path: Path) -> Iterator[TextIO]:
    """A file opened for appending, once no other process has it open so; some network drives lack locks.

    Raises:
        InputError: as for :func:`writing`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise InputError if a file can't be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise InputError(
            f"{path}: can't be written ({error.strerror}); free up space, or choose a writable folder"
        ) from error


def _locked(path: Path) -> tuple[int, Path]:
    """A new, locked temporary file beside ``path``; retried if another writer removed it before it was locked."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{PARTIAL}{path.stem}-", suffix=path.suffix)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)


def _remove_unlocked(path: Path) -> None:
    # NFS locks only files open for writing. Errors: it is gone, locked by its writer, or can't be locked
    with suppress(OSError), path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
