"""Images in tar archives, read in any order, and indices that are made once: of archives and of large folders.

An index holds one bytes blob of names with offsets, never a list of a million strings. It is written beside an archive
(`train.tar.index.npz`), and for folders into the user's cache folder; it is made again when what it describes changed.
"""

import hashlib
import os
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.distributed import barrier, is_main, print0
from common.log import fail

LARGE = 20_000  # images from which on the list of a folder is worth a cache


class Names:
    """A list of byte strings as one blob: names[i], len(names)."""

    def __init__(self, blob, offsets):
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, names):
        encoded = [os.fsencode(name) for name in names]
        return cls(b"".join(encoded), np.cumsum([0, *map(len, encoded)]))

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        return self.blob[self.offsets[i] : self.offsets[i + 1]]

    def strings(self):
        return [os.fsdecode(self[i]) for i in range(len(self))]


def _write(path, **arrays):
    """Writes an index, or nothing where that is not allowed: an index only saves time."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def _read(path, stamp=None):
    """The arrays of an index if it is there and has this stamp, else None."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if stamp is None or np.array_equal(file["stamp"], stamp):
                return {key: file[key] for key in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return None


# ------------------------------------------------------------------------------------------------------ archives
class _Part:
    """A stretch of a file as a file of its own, for the archives inside an archive."""

    def __init__(self, file, offset, size):
        self.file, self.offset, self.size, self.at = file, offset, size, 0

    def seek(self, position, whence=0):
        self.at = position + (0, self.at, self.size)[whence]
        return self.at

    def tell(self):
        return self.at

    def read(self, n=-1):
        n = min(n if n >= 0 else self.size, max(0, self.size - self.at))
        data = os.pread(self.file.fileno(), n, self.offset + self.at)
        self.at += len(data)
        return data


def _members(file, offset, size, prefix, extensions, bar):
    """(name, position, bytes) of each image in the archive at offset; images of an inner x.tar are named x/..."""
    with tarfile.open(fileobj=_Part(file, offset, size), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # or it keeps them all
            name = os.path.normpath(member.name)
            bar.n = offset + member.offset_data + member.size
            bar.update(0)
            if not member.isreg() or os.path.basename(name).startswith("."):
                continue
            position = offset + member.offset_data
            if name.lower().endswith(".tar"):
                yield from _members(file, position, member.size, f"{prefix}{name[:-4]}/", extensions, bar)
            elif name.lower().endswith(extensions):
                yield prefix + name, position, member.size


def _index(path, extensions):
    """The index of an archive as arrays, in the order of the names."""
    size = os.stat(path).st_size
    try:
        with (
            open(path, "rb") as file,
            tqdm(
                total=size,
                desc=f"index of {path}",
                unit="B",
                unit_scale=True,
                disable=not (is_main() and sys.stderr.isatty()),
            ) as bar,
        ):
            rows = sorted(_members(file, 0, size, "", extensions, bar))
    except (tarfile.TarError, EOFError, ValueError) as error:
        fail(f"--data {path} is not an uncompressed tar archive that can be read: {error}")
    if not rows:
        fail(f"no images in {path}: expected files ending in {' '.join(extensions)}")
    names, positions, sizes = zip(*rows, strict=True)
    names = Names.of(names)
    blob = np.frombuffer(names.blob, np.uint8)
    return {"blob": blob, "offsets": names.offsets, "positions": np.array(positions), "sizes": np.array(sizes)}


def archive_index(path, extensions):
    """(Names, positions, sizes in bytes) of the images in a tar, sorted by name, from its index if that is good.

    Links and devices in the archive are not followed, compressed archives refused: they have no random access.
    """
    state, cache = os.stat(path), f"{path}.index.npz"
    stamp = np.array([state.st_size, state.st_mtime_ns])
    for turn in (is_main(), not is_main()):  # the others find what the main process has written, if it could write
        if turn:
            index = _read(cache, stamp)
            if index is None:
                index = _index(path, extensions)
                if is_main() and not _write(cache, stamp=stamp, **index):
                    print0(f"note: {cache} cannot be written: every start will read all headers of the archive")
        barrier()
    return Names(index["blob"].tobytes(), index["offsets"]), index["positions"], index["sizes"]


# ------------------------------------------------------------------------------------------------------- folders
def folder_index(folder, scan):
    """Names of the images below a folder. scan(folder) -> (relative paths, sorted; relative paths of all its folders).

    Large results are kept in the user's cache folder. They are good as long as no folder has got or lost an entry,
    which its time of modification tells; so a later start asks for the times of some thousand folders, not of a million
    files.
    """
    real = os.path.realpath(folder)
    where = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "one-page-ssl"
    cache = where / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.npz"
    index = _read(cache)
    if index is not None:
        folders = Names(index["folders"].tobytes(), index["folder_offsets"]).strings()
        if np.array_equal(_times(folder, folders), index["times"]):
            return Names(index["blob"].tobytes(), index["offsets"])
    began = time.time_ns()
    paths, folders = scan(folder)
    names = Names.of(paths)
    if is_main() and len(names) >= LARGE:
        times, encoded = _times(folder, folders), Names.of(folders)
        if times.max() < began - 2 * 10**9:  # else a file could still come in the same tick of the clock
            index = {"blob": np.frombuffer(names.blob, np.uint8), "offsets": names.offsets, "times": times}
            index |= {"folders": np.frombuffer(encoded.blob, np.uint8), "folder_offsets": encoded.offsets}
            _write(cache, **index)
    return names


def _times(folder, folders):
    """Times of modification of folders in ns; 0 for one that is gone."""

    def one(name):
        try:
            return os.stat(os.path.join(folder, name)).st_mtime_ns
        except OSError:
            return 0

    return np.array([one(name) for name in folders], dtype=np.int64)
