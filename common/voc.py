"""Data sets in Pascal VOC's layout: JPEGImages/<id>.jpg, Annotations/<id>.xml and lists of ids in ImageSets/.

A file that lacks something or cannot be read ends the program with one line that names it.
"""

import os
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from common.args import fail
from common.datasets import Files
from common.folders import data_path
from common.images import EXTENSIONS
from common.lists import composed, read_text, split_lines


class Object(NamedTuple):
    """box: xmin, ymin, xmax, ymax as the file has them, in pixels counted from 1, the last ones included; or None."""

    name: str
    difficult: bool
    box: tuple | None


def find_set(data, task="Main", name="VOC2007"):
    """The folder that has ImageSets/<task>: --data itself, a set of this name in it, or the first VOC* in it."""
    data = data_path(data)
    folders = [data, data / name, *sorted(data.glob("VOC*"))]
    found = next((folder for folder in folders if (folder / "ImageSets" / task).is_dir()), None)
    if found is None:
        fail(f"--data {data}: no ImageSets/{task} there nor in a {name} below: give the folder of a set like VOC's")
    return found


def _lines(path):
    """Its lines, without empty ones."""
    if not path.is_file():
        fail(f"{path} does not exist (VOC2007 comes as two archives: unpack both in one place)")
    lines = [line.strip() for line in split_lines(read_text(path, path)) if line.strip()]
    return lines or fail(f"{path} names no image")


def read_ids(root, split, task="Main"):
    """The ids of a split in the order of its list."""
    return _lines(root / f"ImageSets/{task}/{split}.txt")


def read_objects(root, image):
    """The objects of an image, given its id, in the order of its annotation."""
    path, objects = root / f"Annotations/{image}.xml", []
    try:
        for item in ElementTree.parse(path).getroot().findall("object"):
            box = item.find("bndbox")
            if box is not None:
                box = tuple(float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            difficult = item.findtext("difficult", "0").strip() not in ("", "0")
            objects.append(Object(item.findtext("name", "").strip(), difficult, box))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        fail(f"{path} cannot be read: {error}")
    return objects


def _presence(objects):
    """{class: 1, or 0 if all its objects are difficult}"""
    return {item.name: int(not item.difficult) for item in sorted(objects, key=lambda item: -item.difficult)}


def _class_list(path):
    """{id: 1, -1 or 0} from lines "id label"."""
    labels = {}
    for line in _lines(path):
        words = line.rsplit(None, 1)
        if len(words) != 2 or words[1] not in ("1", "+1", "-1", "0"):
            fail(f"{path}: {line!r} is not an image and 1, -1 or 0")
        labels[words[0]] = int(words[1])
    return labels


def read_labels(root, splits=("trainval", "test")):
    """Which classes are in which image: (class names, {split: (ids, labels)}), ids sorted. labels (N, classes) int8: 1
    there, -1 not there, 0 only as difficult objects. They come from the lists <class>_<split>.txt or, where there are
    none, from the annotations; then the classes are those of the first split."""
    lists, found = root / "ImageSets/Main", {}
    names = sorted(path.name.removesuffix(f"_{splits[0]}.txt") for path in lists.glob(f"[!.]*_{splits[0]}.txt"))
    for split in splits:
        if names:
            columns = {name: _class_list(lists / f"{name}_{split}.txt") for name in names}
            for name, column in columns.items():
                if column.keys() != columns[names[0]].keys():
                    fail(f"{lists}: {name}_{split}.txt and {names[0]}_{split}.txt name different images")
            found[split] = {i: {name: columns[name][i] for name in names} for i in columns[names[0]]}
        else:
            found[split] = {i: _presence(read_objects(root, i)) for i in read_ids(root, split)}
    names = names or sorted({name for labels in found[splits[0]].values() for name in labels})
    tables = {}
    for split, labels in found.items():
        ids = sorted(labels)
        tables[split] = ids, np.array([[labels[i].get(name, -1) for name in names] for i in ids], np.int8)
    return names, tables


def open_images(root, ids, channels=3):
    """The images of these ids in JPEGImages, whatever the endings of their names."""
    folder = root / "JPEGImages"
    names = sorted(os.listdir(folder), reverse=True) if folder.is_dir() else []
    there = {Path(name).stem: name for name in names if name.lower().endswith(EXTENSIONS)}
    there = {composed(stem): name for stem, name in there.items()} | there
    ids = [i if i in there else composed(i) for i in ids]
    missing = [i for i in ids if i not in there]
    if missing:
        fail(f"{folder} lacks {len(missing)} of the {len(ids)} images of a split, the first is {missing[0]}.jpg")
    return Files(folder, [there[i] for i in ids], channels=channels)
