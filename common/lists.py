"""List files: which images are used, and their labels."""

import json
from pathlib import Path

from common.args import fail


def read_list(image_list, split, there, root):
    """(paths, labels or None) of a list file. there(path): is this image in root?"""
    flag = f"--{split}-list {image_list}"
    if not image_list.is_file():
        fail(f"{flag} does not exist")
    unit, read = ("image", _json_rows) if image_list.suffix == ".json" else ("line", _text_rows)
    rows = read(image_list, flag) or fail(f"{flag} names no image")
    (_, first, label), prefix = rows[0], f"{Path(root).resolve().name}/"
    if first.startswith(prefix) and not there(first):  # the paths begin with the folder that --data already names
        rows = [(number, path.removeprefix(prefix), label) for number, path, label in rows]
    labelled = label is not None
    for number, path, label in rows:
        if labelled != (label is not None):
            fail(f"{flag}, {unit} {number}: {'no' if labelled else 'a'} label, unlike the first one: {path!r}")
        if path.startswith("/") or ".." in path.split("/"):
            fail(f"{flag}, {unit} {number}: {path!r} leads out of the data folder: paths are relative to --data")
        if not there(path):
            how = " (expected: relative/path, a space and a number)" if unit == "line" else ""
            fail(f"{flag}, {unit} {number}: {path!r} is not in {root}{how}")
    return [path for _, path, _ in rows], [label for *_, label in rows] if labelled else None


def _text_rows(image_list, flag):
    """(line, path, label or None) of each image in a text file, `relative/path[ label]` per line."""
    rows = []
    for number, line in enumerate(image_list.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            path, _, label = line.rpartition(" ")
            rows.append((number, path.rstrip(), int(label)) if path and label.isdecimal() else (number, line, None))
    return rows


def _json_rows(image_list, flag):
    """The same of iNaturalist's file: images[id, file_name], annotations[image_id, category_id] (none: no labels)."""
    try:
        content = json.loads(image_list.read_text(encoding="utf-8"))
        labels = {a["image_id"]: int(a["category_id"]) for a in content.get("annotations", ()) if a["category_id"] >= 0}
        return [(image["id"], str(image["file_name"]), labels.get(image["id"])) for image in content["images"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        fail(f"{flag} has no images[id, file_name] and annotations[image_id, category_id]: {reason}")
