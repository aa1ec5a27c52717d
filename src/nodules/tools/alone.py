"""One at a time: ``python alone.py LOCK COMMAND...`` runs a command once no other process holds the lock.

The Makefile runs this file as a script, with any Python, before an environment exists: standard library only.
"""

import fcntl
import os
import sys
from pathlib import Path


def main(lock: str, *command: str) -> None:
    """Become ``command``. The lock is held until the command and all processes that it starts have ended."""
    try:
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        reason = "a broken link" if isinstance(error, FileExistsError) else error.strerror
        folder = Path(lock).parent
        sys.exit(f"error: {folder}: can't be written to ({reason}); make it a folder you may write to")
    os.set_inheritable(handle, True)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting: another make holds {lock}", file=sys.stderr, flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:  # some network drives lack locks
        print(
            f"WARNING: {lock} can't be locked ({error.strerror}): run one make at a time", file=sys.stderr, flush=True
        )
    os.execvp(command[0], command)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
