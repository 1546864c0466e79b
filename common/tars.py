"""What is in tar archives, found out once and kept beside them (`train.tar.index.npz`), and reading in any order.

Labels may stand in WebDataset's layout: `dir/0001.jpg` beside `dir/0001.cls` or `dir/0001.json`. A sample is what has
the same path up to the first dot of the file's name.
"""

import collections
import json
import os
import posixpath
import re
import tarfile
import threading
from typing import NamedTuple

import numpy as np

from common.archive import Names, read_index, write_index
from common.args import fail
from common.distributed import barrier, is_main, print0
from common.folders import SYSTEM
from common.log import bar

try:
    from resource import RLIMIT_NOFILE, getrlimit
except ImportError:  # Windows
    getrlimit = None

VERSION = 2  # of the index
LABELS = (".cls", ".class", ".json")  # whole endings of members that hold a label, the best one first
KEYS = "label cls class target class_id category category_id class_name label_name".split()  # of a label in JSON
LONGEST = 2**20  # bytes of a member that is read for a label


# ------------------------------------------------------------------------------------------------------ contents
def _members(file, start, end, prefix, where, left):
    """(name, position, bytes) of each file in the archive from start to end of a file; those of an inner x.tar are
    named x/... What is no such file is counted in left."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None and member.offset < end:
            archive.members = []  # or it keeps them all
            name, position = posixpath.normpath(member.name), member.offset_data
            name = re.sub(r"^(\.{0,2}/)+", "", name)  # no name leads out
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                left["link" if member.islnk() or member.issym() else "sparse" if member.issparse() else "device"] += 1
            elif any(part.startswith(".") or part in SYSTEM for part in name.lower().split("/")):
                left["hidden or of the system"] += 1
            elif name.lower().endswith(".tar"):
                inner = position + member.size, f"{prefix}{name[:-4]}/", f"{where}/{name}"
                yield from _members(file, position, *inner, left)
            else:
                yield prefix + name, position, member.size
        if member is None and archive.offset < end:  # tarfile takes whatever is no header for the end
            file.seek(archive.offset)
            rest = file.read(min(10240, end - archive.offset))
            if rest[:512].strip(b"\0"):
                fail(f"--data {where} is cut or damaged at byte {archive.offset:,}: copy or download it again")
            after = (len(rest) - len(rest.lstrip(b"\0"))) // 512 * 512
            if rest[after:][257:262] == b"ustar":  # archives put together by `cat`
                yield from _members(file, archive.offset + after, end, prefix, where, left)
        elif member is None:
            print0(f"note: {where} lacks its end mark: is it complete?")


def _label(data, ending):
    """The label in the bytes of a member: text, a number in its shortest form; None if there is none."""
    try:
        value = data.decode("utf-8-sig").strip()
        if ending == ".json":
            value = json.loads(value)
            if isinstance(value, dict):
                value = next((value[key] for key in KEYS if isinstance(value.get(key), (int, float, str))), None)
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                return None
            value = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
        if not value or len(value) > 200 or "\n" in value:
            return None
        return str(int(value)) if re.fullmatch(r"[+-]?\d+", value) else value
    except (ValueError, RecursionError):
        return None


def _scan(path, extensions):
    """The index of an archive as arrays, in the order of the names."""
    size, left, images, labels = os.stat(path).st_size, collections.Counter(), {}, {}
    try:
        with open(path, "rb") as file, bar(None, f"index of {path}", size, unit="B", unit_scale=True) as progress:
            for name, position, length in _members(file, 0, size, "", str(path), left):
                progress.update(position - progress.n)
                stem, _, ending = posixpath.basename(name).partition(".")
                if name.lower().endswith(extensions):
                    left["of the same name"] += name in images
                    images[name] = position, length  # the last one, as when it is unpacked
                elif f".{ending}".lower() in LABELS and length <= LONGEST:
                    file.seek(position)
                    stem = posixpath.join(posixpath.dirname(name), stem)
                    labels.setdefault(stem, {})[f".{ending}".lower()] = _label(file.read(length), f".{ending}".lower())
                else:
                    ending = posixpath.splitext(name)[1].lower()
                    left[ending if 1 < len(ending) < 12 else "no ending"] += 1
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        if re.match("unexpected end|truncated", str(error)):
            fail(f"--data {path} is cut after {size:,} bytes: copy or download it again")
        fail(f"--data {path} is not an uncompressed tar archive that can be read: {error}")
    label = _samples(images, labels, left)
    names, texts = sorted(images), sorted(set(label.values()))
    number = {text: i for i, text in enumerate(texts)}
    rows, texts = [images[name] for name in names], Names.of(texts)
    arrays = {**vars(Names.of(names)), "positions": [p for p, _ in rows], "sizes": [n for _, n in rows]}
    arrays |= {"labels": [number[label[n]] if n in label else -1 for n in names]}
    arrays = {k: np.asarray(v, None if k == "blob" else np.int64) for k, v in arrays.items()}
    return arrays | {"texts": texts.blob, "text_offsets": texts.offsets, "left": np.array(json.dumps(+left))}


def _samples(images, labels, left):
    """{name of an image: its label} by WebDataset's rule. images: {name: ...}, of which one per sample with members
    of LABELS is kept; labels: {path of a sample: {ending: label or None}}."""
    samples, found = collections.defaultdict(list), {}
    for name in images:
        folder, base = posixpath.split(name)
        samples[posixpath.join(folder, base.partition(".")[0])].append(name)
    for path, there in labels.items():
        names = sorted(samples.get(path, ()), key=lambda name: (name.count("."), len(name), name))
        endings = [name[len(path) :] for name in names]
        for name, ending in zip(names[1:], endings[1:], strict=True):
            left[f"{ending} beside {endings[0]}"] += 1
            del images[name]
        used = next((ending for ending in LABELS if names and there.get(ending) is not None), None)
        left.update(ending for ending in there if ending != used)
        if used:
            found[names[0]] = there[used]
    return found


class Index(NamedTuple):
    """The images of several archives, sorted by name. names: list of str. archive, positions, sizes: (N,) arrays.
    labels: list of str or None. left: Counter of what was left out, by kind."""

    names: list
    archive: np.ndarray
    positions: np.ndarray
    sizes: np.ndarray
    labels: list
    left: collections.Counter


def index_of(paths, extensions):
    """The Index of some archives, from what stands beside them if that is good. Links in an archive are not followed,
    compressed archives refused: they have no random access."""
    parts = []
    for turn in (is_main(), not is_main()):  # the others find what the main process has written, if it could write
        if turn:
            parts = [_stored(path, extensions) for path in paths]
            if unwritten := [cache for _, cache in parts if cache]:
                text = "every start will read all headers of the archive"
                print0(f"note: {unwritten[0]} cannot be written: {text}")
        barrier()
    names, labels, left = [], [], collections.Counter()
    for part, _ in parts:
        names += Names(part["blob"], part["offsets"]).strings()
        texts = [*Names(part["texts"], part["text_offsets"]).strings(), None]
        labels += [texts[i] for i in part["labels"]]
        left.update(json.loads(str(part["left"])))
    archive = np.repeat(np.arange(len(paths)), [len(part["positions"]) for part, _ in parts])
    positions, sizes = (np.concatenate([part[key] for part, _ in parts]) for key in ("positions", "sizes"))
    order = sorted(range(len(names)), key=names.__getitem__) if len(paths) > 1 else slice(None)
    if len(paths) > 1:
        names, labels = [names[i] for i in order], [labels[i] for i in order]
    return Index(names, archive[order], positions[order], sizes[order], labels, left)


def _stored(path, extensions):
    """(index of an archive as arrays, path where it should be but cannot be written, or None)."""
    state, cache = os.stat(path), f"{path}.index.npz"
    kinds = int.from_bytes(" ".join(extensions).encode(), "little") % (2**61 - 1)
    stamp = np.array([VERSION, state.st_size, state.st_mtime_ns, kinds])
    index = read_index(cache)
    if index is not None and np.array_equal(index.get("stamp"), stamp):
        return index, None
    index = _scan(path, extensions)
    return index, None if not is_main() or write_index(cache, stamp=stamp, **index) else cache


# --------------------------------------------------------------------------------------------------------- bytes
LOCK = threading.Lock()


def _seek_and_read(number, size, position):
    with LOCK:
        os.lseek(number, position, os.SEEK_SET)
        return os.read(number, size)


pread = getattr(os, "pread", _seek_and_read)  # Windows has none


class Archives:
    """Archives that any number of threads read. A file is opened when it is first needed, so that processes that load
    have their own, and kept open as long as a quarter of those that the system allows suffices."""

    def __init__(self, paths):
        self.paths, self.open = [os.fspath(path) for path in paths], {}
        limit = getrlimit(RLIMIT_NOFILE)[0] if getrlimit else 512
        self.most = limit // 4 if limit > 0 else 4096  # -1: no limit

    def read(self, archive, size, position):
        file = self.open.get(archive)
        if file is not None:
            return pread(file.fileno(), size, position)
        file = open(self.paths[archive], "rb", buffering=0)
        if len(self.open) < self.most and self.open.setdefault(archive, file) is file:
            return pread(file.fileno(), size, position)
        with file:
            return pread(file.fileno(), size, position)
