"""Indices that are made once: of archives (common/tars.py) and of large folders.

An index holds one blob of names with offsets, never a list of a million strings. It is written beside an archive
(`train.tar.index.npz`), and for folders into the user's cache folder; it is made again when what it describes changed.
"""

import collections
import contextlib
import hashlib
import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np

from common.distributed import is_main
from common.files import atomic

LARGE = 20_000  # images from which on the list of a folder is worth a cache


class Names:
    """A list of byte strings as one blob of uint8: names[i], len(names)."""

    def __init__(self, blob, offsets):
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, names):
        encoded = [os.fsencode(name) for name in names]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)]))

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        return self.blob[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def strings(self):
        return [os.fsdecode(self[i]) for i in range(len(self))]


def write_index(path, **arrays):
    """Writes an index, or nothing where that is not allowed: an index only saves time."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, shared=True) as temporary:
            np.savez(temporary, **arrays)
    except OSError:
        return False
    return True


def read_index(path):
    """The arrays of an index if it is there."""
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(path, allow_pickle=False) as file:
            return dict(file)


# ------------------------------------------------------------------------------------------------------- folders
def folder_index(folder, scan, kinds):
    """(Names of the images below a folder, {its folders: images}, Counter of what is left out). scan(folder) -> the
    same, with a sorted list of paths; kinds: what the result depends on besides.

    Large results are kept in the user's cache folder, and good as long as no folder has got or lost an entry, which its
    time of modification tells: a later start looks at some thousand folders, not at a million files.
    """
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder)) + repr((2, kinds)).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / f"one-page-ssl/{key}.npz"
    if (index := read_index(cache)) is not None:
        folders = Names(index["folders"], index["folder_offsets"]).strings()
        if np.array_equal(_times(folder, folders), index["times"]):
            names = Names(index["blob"], index["offsets"])
            folders = dict(zip(folders, index["counts"].tolist(), strict=True))
            return names, folders, collections.Counter(json.loads(str(index["left"])))
    began = time.time_ns()
    paths, folders, left = scan(folder)
    names = Names.of(paths)
    if is_main() and len(names) >= LARGE and not left["broken link"]:  # which may be mended where no folder shows it
        times, below = _times(folder, folders), Names.of(folders)
        if times.max() < began - 2 * 10**9:  # else a file could still come in the same tick of the clock
            more = {"folders": below.blob, "folder_offsets": below.offsets, "counts": np.array([*folders.values()])}
            write_index(cache, **vars(names), times=times, left=np.array(json.dumps(left)), **more)
    return names, folders, left


def _times(folder, folders):
    """Times of modification of folders in ns; 0 for one that is gone."""
    times = np.zeros(len(folders), np.int64)
    for i, name in enumerate(folders):
        with contextlib.suppress(OSError):
            times[i] = os.stat(os.path.join(folder, name)).st_mtime_ns
    return times
