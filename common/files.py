"""Files that nobody ever sees half written, and where results go."""

import contextlib
import os
from pathlib import Path

from common.args import fail


def temporary(path, shared=False):
    """The path beside `path`, of the same ending, where it is written. shared: see `atomic`."""
    path = Path(path)
    return path.with_name(f"{path.stem}{f'.{os.getpid()}' if shared else ''}.tmp{path.suffix}")


@contextlib.contextmanager
def atomic(path, shared=False):
    """A temporary path, which takes the place of `path` when the block ends, and is removed when the block raises.
    shared: several runs may write the same file at the same time."""
    unfinished = temporary(path, shared)
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def result_folder(pretrained, out=None):
    """Where what is found out about a checkpoint goes: --out, else beside the file, runs/random for "random"."""
    return Path(out or ("runs/random" if str(pretrained) == "random" else Path(pretrained).parent))


def make_folder(path):
    """Makes the folder of --out, or ends the program. Returns it."""
    if not str(path).strip():
        fail("--out is empty: name a folder")
    if Path(path).is_file():
        fail(f"--out {path} is a file: name a folder")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {path} cannot be made: {error.strerror}")
    return Path(path)
