"""Images in tar archives, read in any order, and indices that are made once: of archives and of large folders.

An index holds one blob of names with offsets, never a list of a million strings. It is written beside an archive
(`train.tar.index.npz`), and for folders into the user's cache folder; it is made again when what it describes changed.
"""

import contextlib
import hashlib
import os
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np

from common.args import fail
from common.distributed import barrier, is_main, print0
from common.files import atomic
from common.log import bar

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


def _write(path, **arrays):
    """Writes an index, or nothing where that is not allowed: an index only saves time."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, shared=True) as temporary:
            np.savez(temporary, **arrays)
    except OSError:
        return False
    return True


def _read(path):
    """The arrays of an index if it is there."""
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(path, allow_pickle=False) as file:
            return dict(file)


# ------------------------------------------------------------------------------------------------------ archives
def _members(file, start, end, prefix, extensions, progress):
    """(name, position, bytes) of each image in the archive from start to end of a file; images of an inner x.tar are
    named x/..."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None and member.offset < end:
            archive.members = []  # or it keeps them all
            name, position = os.path.normpath(member.name), member.offset_data
            progress.n = position + member.size
            progress.update(0)
            if not member.isreg() or os.path.basename(name).startswith("."):
                continue
            if name.lower().endswith(".tar"):
                yield from _members(file, position, progress.n, f"{prefix}{name[:-4]}/", extensions, progress)
            elif name.lower().endswith(extensions):
                yield prefix + name, position, member.size


def _index(path, extensions):
    """The index of an archive as arrays, in the order of the names."""
    size = os.stat(path).st_size
    try:
        with open(path, "rb") as file, bar(None, f"index of {path}", size, unit="B", unit_scale=True) as progress:
            rows = sorted(_members(file, 0, size, "", extensions, progress))
    except (tarfile.TarError, EOFError, ValueError) as error:
        fail(f"--data {path} is not an uncompressed tar archive that can be read: {error}")
    if not rows:
        fail(f"no images in {path}: expected files ending in {' '.join(extensions)}")
    names, positions, sizes = zip(*rows, strict=True)
    return {**vars(Names.of(names)), "positions": np.array(positions), "sizes": np.array(sizes)}


def archive_index(path, extensions):
    """(Names, positions, sizes in bytes) of the images in a tar, sorted by name, from its index if that is good. Links
    in the archive are not followed, compressed archives refused: they have no random access."""
    state, cache = os.stat(path), f"{path}.index.npz"
    stamp = np.array([state.st_size, state.st_mtime_ns])
    for turn in (is_main(), not is_main()):  # the others find what the main process has written, if it could write
        if turn:
            index = _read(cache)
            if index is None or not np.array_equal(index.get("stamp"), stamp):
                index = _index(path, extensions)
                if is_main() and not _write(cache, stamp=stamp, **index):
                    print0(f"note: {cache} cannot be written: every start will read all headers of the archive")
        barrier()
    return Names(index["blob"], index["offsets"]), index["positions"], index["sizes"]


# ------------------------------------------------------------------------------------------------------- folders
def folder_index(folder, scan):
    """Names of the images below a folder. scan(folder) -> (relative paths, sorted; relative paths of all its folders).

    Large results are kept in the user's cache folder, and good as long as no folder has got or lost an entry, which its
    time of modification tells: a later start looks at some thousand folders, not at a million files.
    """
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / f"one-page-ssl/{key}.npz"
    if (index := _read(cache)) is not None:
        folders = Names(index["folders"], index["folder_offsets"]).strings()
        if np.array_equal(_times(folder, folders), index["times"]):
            return Names(index["blob"], index["offsets"])
    began = time.time_ns()
    paths, folders = scan(folder)
    names = Names.of(paths)
    if is_main() and len(names) >= LARGE:
        times, below = _times(folder, folders), Names.of(folders)
        if times.max() < began - 2 * 10**9:  # else a file could still come in the same tick of the clock
            _write(cache, **vars(names), times=times, folders=below.blob, folder_offsets=below.offsets)
    return names


def _times(folder, folders):
    """Times of modification of folders in ns; 0 for one that is gone."""
    times = np.zeros(len(folders), np.int64)
    for i, name in enumerate(folders):
        with contextlib.suppress(OSError):
            times[i] = os.stat(os.path.join(folder, name)).st_mtime_ns
    return times
