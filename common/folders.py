"""Folders of images: what --data names, which part of it is for training, and what in it is left out."""

import collections
import difflib
import functools
import os
import re
import stat
from pathlib import Path

from common.args import NAMED_SETS, fail
from common.distributed import print0
from common.images import EXTENSIONS

WORDS = {  # what folders of a split are called, the usual name first
    "train": ("train", "training", "trainval", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
KIND = {word: kind for kind, words in WORDS.items() for word in words}
FILLER = "(?:set|images?|imgs?|data|splits?|pictures?|pics|photos?|samples?|files|jpe?gs?|pngs?|all|full|px?|x)"
SPLIT = re.compile(rf"{FILLER}*({'|'.join(sorted(KIND, key=len, reverse=True))}){FILLER}*")
SYSTEM = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "#recycle", "@recycle", "system volume information"}
SYSTEM |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__"}  # and all that begins with a dot


@functools.cache
def note(text):
    """A line about the data, once in a run."""
    print0(f"note: {text}")


def several(names, most=5):
    """The first of some names, and how many more there are."""
    names = list(names)
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def nearest_name(name, names):
    """ " (did you mean ...?)", where one of the names is like it."""
    lower = {str(n).lower(): n for n in names}
    found = difflib.get_close_matches(str(name).lower(), lower, 1, 0.7)
    return f" (did you mean {lower[found[0]]}?)" if found else ""


def data_path(data):
    """The path that --data names, which exists; ~ is the home folder."""
    path = Path(data)
    if not str(data).strip():
        fail("--data is empty")
    if not os.path.exists(path) and str(data).startswith("~"):
        path = Path(os.path.expanduser(path))
    if os.path.exists(path):
        return path
    if os.path.islink(path):
        fail(f"--data {data} is a link to {os.readlink(path)}, which does not exist")
    there = next((p for p in path.parents if os.path.isdir(p)), Path("."))
    missing = path.relative_to(there).parts[0] if there != Path(".") else path.parts[0]
    try:
        names = [*os.listdir(there), *(NAMED_SETS if len(path.parts) == 1 else ())]
    except OSError:
        names = []
    near = nearest_name(missing, names)
    fail(f"--data {data} does not exist{near}: give a folder of images or one of {', '.join(NAMED_SETS)}")


# -------------------------------------------------------------------------------------------------------- splits
@functools.cache
def split_of(name):
    """ "train", "val" or "test" if that is what the name of a folder says, in any spelling (Training, test_set,
    valImages, train2017), else None."""
    found = SPLIT.fullmatch(re.sub("[^a-z]", "", name.lower()))
    return KIND[found[1]] if found else None


def split_names(names):
    """{"train": names, "val": names, "test": names} of folders, the best first, without empty ones. Names with any
    other word count where a pair differs in the split alone: dogs_train beside dogs_test."""
    found, pairs = collections.defaultdict(list), collections.defaultdict(dict)
    for name in sorted(names):
        words = re.findall("[a-z]+", name.lower())
        if kind := split_of(name):
            found[kind].append(name)
        elif len(kinds := [KIND[w] for w in words if w in KIND]) == 1:
            pairs[tuple(w for w in words if w not in KIND)][kinds[0]] = name
    for pair in pairs.values():
        if "train" in pair and len(pair) > 1:
            for kind, name in pair.items():
                found[kind].append(name)
    order = list(KIND)
    for kind, names in found.items():
        rank = {n: (order.index(n.lower()), n != n.lower()) if n.lower() in KIND else (len(order),) for n in names}
        found[kind] = sorted(names, key=rank.get)  # which leaves others in their order
    return dict(found)


def _mode(entry):
    """What an entry of a folder is, for `stat`; 0 for a broken link."""
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG  # without a call of the system
    try:
        return entry.stat().st_mode
    except OSError:
        return 0


def _entries(folder):
    """(entry, kind) of all that lies in a folder: "folder", "image", or the kind of what is left out."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.endswith(EXTENSIONS) and name[0] != "." and entry.is_file(follow_symlinks=False):
                    yield entry, "image"  # nearly all
                    continue
                mode = _mode(entry)
                kind, ending = "not a file" if mode else "broken link", os.path.splitext(name)[1]
                if name[0] == "." or name in SYSTEM:
                    kind = "hidden or of the system"
                elif stat.S_ISDIR(mode):
                    kind = "folder"
                elif stat.S_ISREG(mode):
                    kind = ending if 1 < len(ending) < 12 else "no ending"
                    kind = "image" if name.endswith(EXTENSIONS) else kind
                yield entry, kind
    except OSError as error:
        fail(f"folder {folder} cannot be read: {error.strerror}")


def _outline(folder):
    """(names of the sub-folders, number of images) directly in a folder."""
    found = [(entry.name, kind) for entry, kind in _entries(folder) if kind in ("folder", "image")]
    folders = sorted(name for name, kind in found if kind == "folder")
    return folders, len(found) - len(folders)


def find_splits(root):
    """{"train": folder, "val": folder} of a data folder, without those that it has not; {} if it is not divided. They
    may lie one folder further down. A line tells which are used unless they are train/ and val/ alone."""
    folders, images = _outline(root)
    found = split_names(folders)
    if not found:
        inner = [n for n in folders if "train" in split_names(_outline(root / n)[0])] if len(folders) <= 10 else []
        if len(inner) > 1:
            fail(f"--data {root} holds several data sets ({several(inner)}): give one, such as {root / inner[0]}")
        if inner:
            folders.remove(inner[0])
            beside = [f"{name}/" for name in folders] + [f"{images} images"] * bool(images)
            note(f"{root}: {inner[0]}/ is the data set" + (f"; not used: {several(beside)}" if beside else ""))
        return find_splits(root / inner[0]) if inner else {}
    used = {"train": found.get("train", [None])[0], "val": [*found.get("val", ()), *found.get("test", ()), None][0]}
    used = {split: name for split, name in used.items() if name}
    rest = [f"{name}/" for name in folders if name not in used.values()] + [f"{images} images"] * bool(images)
    if rest or any(split != name for split, name in used.items()):
        purpose = {"train": "training", "val": "validation and tests"}
        text = ", ".join(f"{name}/ is for {purpose[split]}" for split, name in used.items())
        note(f"{root}: {text}" + (f"; not used without a list: {several(rest)}" if rest else ""))
    return {split: root / name for split, name in used.items()}


# ------------------------------------------------------------------------------------------------------ contents
def scan_images(folder):
    """(paths, folders, left): the sorted relative paths of all images below a folder, {relative path of each folder:
    images directly in it}, and a Counter of what is left out, by kind. Links to folders are followed."""
    images, folders, left = [], {}, collections.Counter()
    waiting = [("", (os.path.realpath(folder),))]
    while waiting:
        below, above = waiting.pop()
        path, before = os.path.join(folder, below), len(images)
        for entry, kind in _entries(path):
            if kind == "image":
                images.append(below + entry.name)
            elif kind != "folder":
                left[kind] += 1
            elif not entry.is_symlink():
                waiting.append((f"{below}{entry.name}/", above))
            else:
                real, inside = os.path.realpath(entry.path), (*above, os.path.realpath(path))
                if any(os.path.join(one, "").startswith(os.path.join(real, "")) for one in inside):
                    left["link to a folder above"] += 1
                else:
                    waiting.append((f"{below}{entry.name}/", (*inside, real)))
        folders[below] = len(images) - before
    return sorted(images), folders, left


def left_out(left):
    """ "8 left out: .heic 4, .txt 2, no ending 2", or "" """
    kinds = [f"{kind} {count:,}" for kind, count in sorted(left.items(), key=lambda item: (-item[1], item[0]))]
    return f"{sum(left.values()):,} left out: {several(kinds, 8)}" if kinds else ""


def describe(folder, folders, left, divided):
    """Says what of a folder is not used as it might be meant. divided: it is the folder of a split. For the rest see
    `scan_images`."""
    tops = collections.Counter()
    for path, count in folders.items():
        tops[path.partition("/")[0]] += count
    loose, empty = tops.pop("", 0), [f"{top}/" for top, count in tops.items() if not count]
    said = [left_out(left)] if left else []
    if empty:
        said.append(f"no image in {several(sorted(empty))}")
    if said:
        note(f"{folder}: {'; '.join(said)}")
    if divided:
        return
    inside = {path: n for path, n in folders.items() if any(split_of(p) in ("val", "test") for p in path.split("/"))}
    if split_of(os.path.basename(os.path.realpath(folder))) in ("val", "test"):
        note(f"{folder} is, by its name, a folder of test images")
    elif sum(inside.values()):
        note(f"{folder}: {sum(inside.values()):,} of the images lie in folders of test images ({several(inside)})")
    if not loose and (classes := len(tops) - len(empty)) > 1:
        around = f": --data {folder.parent}" if split_of(folder.name) else ""
        note(f"{folder}: {classes} sub-folders look like classes; labels are used when they lie in train/{around}")


def class_labels(paths, where):
    """(labels, class names) from the first folder of each path; (None, None) if not every image lies in one. A folder
    around all classes that only says what they are, as images/ does, is passed over."""
    paths = list(paths)
    while paths and "/" in paths[0]:
        top = paths[0].partition("/")[0]
        says = split_of(top) or (len(top) > 2 and re.fullmatch(f"{FILLER}+", top.lower()))
        if not ((says or top == os.path.basename(where)) and all(path.startswith(f"{top}/") for path in paths)):
            break
        paths = [path[len(top) + 1 :] for path in paths]
    tops, loose = [p.partition("/")[0] for p in paths], [p for p in paths if "/" not in p]
    if loose:
        if len(loose) < len(paths):
            beside = f"{len(loose)} images lie beside the class folders ({loose[0]!r} ...)"
            note(f"{where}: {beside}: none gets a label")
        return None, None
    number = {c: i for i, c in enumerate(sorted(set(tops)))}
    return [number[top] for top in tops], list(number)
