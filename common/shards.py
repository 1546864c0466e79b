"""Which tar archives --data names, one or several, and which of their images belong to a split."""

import collections
import glob
import os
import re
import shlex
from pathlib import Path

from common.args import fail
from common.folders import KIND, SYSTEM, class_labels, find_splits, left_out, note, several, split_names
from common.images import EXTENSIONS
from common.lists import in_names, read_list
from common.tars import Index, index_of

UNPACK = "unzip -q {0} -d {1}", "7z x {0} -o{1}", "unrar x {0} {1}/"
COMPRESSED = {  # first bytes: kind, command that makes a folder or, where it ends in .tar, an archive
    b"\x1f\x8b": ("gzip", "gunzip -c {0} > {1}.tar"),
    b"BZh": ("bzip2", "bunzip2 -c {0} > {1}.tar"),
    b"\xfd7zXZ\0": ("xz", "unxz -c {0} > {1}.tar"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd -c {0} > {1}.tar"),
    b"PK\x03\x04": ("zip", UNPACK[0]),
    b"PK\x05\x06": ("zip", UNPACK[0]),
    b"7z\xbc\xaf\x27\x1c": ("7z", UNPACK[1]),
    b"Rar!\x1a\x07": ("rar", UNPACK[2]),
}
ENDINGS = re.compile(r"\.(tar(\.\w+)?|t[gbx]z2?|tzst|gz|bz2|xz|zst|zip|7z|rar)$", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------- archives
def refuse_compressed(path):
    """Ends the program with the command that unpacks, if a file is a compressed archive, whatever its name says."""
    with open(path, "rb") as file:
        first = file.read(8)
    for magic, (kind, command) in COMPRESSED.items():
        if first.startswith(magic) and (kind != "zip" or ENDINGS.search(str(path))):  # .npz and .pt are zip files, too
            target = ENDINGS.sub("", str(path))
            target += "_unpacked" if f"{target}.tar" == str(path) or os.path.isfile(target) else ""
            command = command.format(shlex.quote(str(path)), shlex.quote(target))
            target += ".tar" if command.endswith(".tar") else ""
            why = f"is compressed ({kind}), so that its images cannot be read in any order"
            fail(f"--data {path} {why}. Unpack it: {command}, then --data {target}")


def is_tar(path):
    """Is it an archive, by its name or its contents? Compressed ones end the program."""
    if not os.path.isfile(path):
        return False
    refuse_compressed(path)
    with open(path, "rb") as file:
        return str(path).lower().endswith(".tar") or file.read(262)[257:] == b"ustar"


def expand(data):
    """The archives that a range, a choice or a pattern names (`train-{000..146}.tar`, `{a,b}.tar`, `train-*.tar`), in
    order; None where data is a plain path."""
    if os.path.lexists(data) or not re.search(r"\{.*\}|[*?[]", data):
        return None
    found, missing = [], []
    for path in _braces(data, data):
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path))
        found += matches
        missing += [] if matches else [path]
    if missing and (found or "{" in data):
        fail(
            f"--data {data}: {len(missing)} of {len(missing) + len(found)} archives are missing: {several(missing, 10)}"
        )
    tars = [path for path in dict.fromkeys(found) if is_tar(path)]
    if not tars or (len(tars) < len(set(found)) and "{" in data):
        odd = next((path for path in found if path not in tars), None)
        fail(f"--data {data} {f'names {odd}, which is no tar archive' if odd else 'matches no file'}")
    return tars


def _braces(text, data):
    """What a shell makes of {000..146} and {a,b}, which stand in quotes here."""
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        low, high = sorted(map(int, span.groups()))
        if high - low >= 100_000:
            fail(f"--data {data}: {match[0]} names {high - low + 1:,} archives")
        width = max(map(len, span.groups())) if any(re.match(r"0\d", end) for end in span.groups()) else 0
        parts = [f"{number:0{width}}" for number in range(low, high + 1)]
    else:
        parts = match[1].split(",")
        if len(parts) < 2:
            fail(f"--data {data}: {match[0]} is neither a range like {{000..146}} nor a choice like {{a,b}}")
    return [path for part in parts for path in _braces(text[: match.start()] + part + text[match.end() :], data)]


def _by_split(paths):
    """{"train": archives, "val": archives} by their names, which differ in numbers within a part; {} if they tell
    nothing."""
    groups = collections.defaultdict(list)
    for path in paths:
        groups[re.sub(r"\d+", "", Path(path).stem)].append(path)
    found = split_names(groups)
    if not found and len(groups) == 1:
        kinds = {KIND[word] for word in re.findall("[a-z]+", next(iter(groups)).lower()) if word in KIND}
        found = {kind: [*groups] for kind in kinds} if len(kinds) == 1 else {}
    used = {"train": found.get("train"), "val": found.get("val") or found.get("test")}
    return {split: groups[names[0]] for split, names in used.items() if names}


def _inside(folder):
    """(archives directly in a folder, compressed ones too; has it sub-folders?), ([], True) if there are images."""
    found, folders = [], False
    with os.scandir(folder) as entries:
        for entry in entries:
            lower = entry.name.lower()
            if lower[0] == "." or lower in SYSTEM:
                continue
            if lower.endswith(EXTENSIONS):
                return [], True  # before a million of them have been listed
            if entry.is_dir():
                folders = True
            elif ENDINGS.search(lower):
                found.append(entry.path)
    return sorted(found), folders


def _tars(paths):
    """The tar archives among some; if there are only compressed ones, the program ends with what to do."""
    named = [path for path in paths if path.lower().endswith(".tar")]
    return [path for path in named or paths if is_tar(path)]


def find(data, split, listed=False):
    """(archives of a split, is it theirs by their names?), ([], False) where --data names no archives: a path, a range
    or pattern, or a folder that holds archives instead of images, or whose folder of this split does.
    listed: a list names the images, so that folders of splits mean nothing."""
    data = os.path.expanduser(data)
    named = expand(data) or ([data] if is_tar(data) else [])
    if named:
        own = _by_split(named)
        if split == "val" and "train" in own and "val" not in own:  # val-*.tar beside train-*.tar

            def other(path):
                return [w for w in re.findall("[a-z]+", re.sub(r"\d+", "", Path(path).stem.lower())) if w not in KIND]

            beside = [path for path in _inside(Path(named[0]).absolute().parent)[0] if other(path) == other(named[0])]
            own = _by_split([path for path in beside if is_tar(path)])
        return (own[split], True) if split in own else (named, False)
    if not os.path.isdir(data):
        return [], False
    there, folders = _inside(data)
    if folders and not listed and (divided := find_splits(Path(data))):
        there, folders = _inside(divided[split]) if split in divided else ([], True)
        tars = [] if folders else _tars(there)
        return tars, bool(tars)
    parts = _by_split(path for path in there if path.lower().endswith(".tar"))
    if folders and "train" not in parts:  # a folder of images, and archives beside them
        return [], False
    tars = _tars(there)
    if parts and (rest := [Path(path).name for path in there if not any(path in part for part in parts.values())]):
        note(f"{data}: not used: {several(rest)}")
    return (parts.get(split, []), True) if parts else (tars, False)


# --------------------------------------------------------------------------------------------------------- images
def select(data, split, image_list=None):
    """The images of a split in the archives that --data names: (paths of the archives, Index of them, labels (N,) or
    None, names of the classes or None). The Index is None where they have no such split; None without archives."""
    paths, divided = find(data, split, image_list is not None)
    if not paths:
        return None if not divided else (paths, None, None, None)
    index, where = index_of(paths, EXTENSIONS), paths[0] if len(paths) == 1 else data
    text = left_out(index.left)
    if not index.names:
        fail(f"no images in {where}: expected files ending in {' '.join(EXTENSIONS)}{text and f'; {text}'}")
    if text:
        note(f"{where}: {text}")
    if len(paths) > 1 and not any("/" in name for name in index.names):
        classes = [Path(path).stem for path in paths]
        if all(re.fullmatch(r"n\d{8}", name) for name in classes):  # ImageNet's training set, unpacked once
            names = [f"{classes[i]}/{name}" for i, name in zip(index.archive, index.names, strict=True)]
            index = _rows(index._replace(names=names), sorted(range(len(names)), key=names.__getitem__))
    if image_list is not None:
        place = {name: i for i, name in enumerate(index.names)}
        wanted, labels, classes = read_list(image_list, split, in_names(index.names), where)
        return paths, _rows(index, [place[name] for name in wanted]), labels, classes
    names, prefix = index.names, ""
    while True:  # train/class/image, perhaps below other folders
        inner = [name[len(prefix) :].partition("/")[::2] for name in names]
        tops = {top for top, rest in inner if rest}
        found = split_names(tops)
        if found or len(tops) != 1 or not all(rest for _, rest in inner):
            break
        prefix += f"{tops.pop()}/"
    used = {"train": found.get("train"), "val": found.get("val") or found.get("test")}[split]
    if used:
        prefix = f"{prefix}{used[0]}/"
        index = _rows(index, [i for i, name in enumerate(names) if name.startswith(prefix)])
    elif not divided and (found or split == "val"):
        return paths, None, None, None
    else:
        prefix = ""
    return paths, index, *_labels(index, prefix, where)


def _rows(index, rows):
    columns = [[column[i] for i in rows] for column in (index.names, index.labels)]
    return Index(columns[0], index.archive[rows], index.positions[rows], index.sizes[rows], columns[1], index.left)


def _labels(index, prefix, where):
    """(labels, names of the classes) from WebDataset's members, else from the folders below prefix."""
    without = [name for name, label in zip(index.names, index.labels, strict=True) if label is None]
    if len(without) == len(index.names):
        labels, classes = class_labels([name[len(prefix) :] for name in index.names], where)
        return (labels, classes) if classes and len(classes) > 1 else (None, None)  # one folder around all says nothing
    if without:
        beside = f"{len(without):,} of {len(index.names):,} samples have no label ({several(without, 2)})"
        note(f"{where}: {beside}: none gets one")
        return None, None
    classes = set(index.labels)
    if classes == {"-1"}:
        return None, None
    classes = sorted(classes, key=int if all(re.fullmatch(r"-?\d+", text) for text in classes) else None)
    number = {text: i for i, text in enumerate(classes)}
    return [number[text] for text in index.labels], classes
