"""Where things live, and how a file is written so that it is never seen half done."""

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nodules.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
PARTIAL = ".partial-"  # how the name of a file begins while it is being written
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO}


def resolve(path: str | Path) -> Path:
    """A path as a user gives it: absolute, or relative to the project's root wherever the caller stands."""
    return (ROOT / Path(path).expanduser()).resolve()


def cache() -> Path:
    """The folder for what takes long to make: ``.cache``, or the one that the variable ``NODULES_CACHE`` names."""
    named = os.environ.get("NODULES_CACHE")
    return resolve(named) if named else ROOT / ".cache"


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends well, and goes if not.

    The writer holds a lock on the temporary file, which the system releases when the writer is killed. So what killed
    writers left behind in this folder can be told from what others are writing now, and is removed here. Where the
    file system has no locks, as some network drives, what they left stays.

    Raises:
        InputError: there is no room, or no right to write.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{PARTIAL}*"):
            _remove_unlocked(left)
        handle, temporary = _locked(path)
        try:
            yield temporary
            with suppress(PermissionError):  # drives of Windows know no modes
                temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line that a file can't be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise InputError(
            f"{path}: can't be written ({error.strerror}); make room, or name a folder that you may write to"
        ) from error


def _locked(path: Path) -> tuple[int, Path]:
    """A new temporary file beside ``path``, locked; again where another writer took it for a remnant meanwhile."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{PARTIAL}{path.stem}-", suffix=path.suffix)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)


def _remove_unlocked(path: Path) -> None:
    # NFS locks only what is open for writing. It is gone, locked by its writer, or can't be locked: leave it
    with suppress(OSError), path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
