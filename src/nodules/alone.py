"""One at a time: ``python alone.py LOCK COMMAND...`` runs a command while no other holds the lock.

The Makefile runs this file by itself with any Python, before there is an environment: standard library only.
"""

import fcntl
import os
import sys
from pathlib import Path


def main(lock: str, *command: str) -> None:
    """Become ``command``, which keeps the lock until it and all that it started have ended, however they end."""
    try:
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        reason = "a link that leads nowhere" if isinstance(error, FileExistsError) else error.strerror
        folder = Path(lock).parent
        sys.exit(f"error: {folder}: can't be written to ({reason}); make it a folder that you may write to")
    os.set_inheritable(handle, True)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting: another make holds {lock}", file=sys.stderr, flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:  # some network drives have no locks
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
