"""Data sets: finding what --data names, and the images in folders, archives, lists and memory.

A dataset is anything with `__len__` and `__getitem__(i) -> (uint8 tensor (3, H, W) or PIL image, int label)`. One with
other channels says so in its attribute `channels`; one with `dtype` float32 gives such tensors, in [0, 255].
"""

import collections
import math
import os
import unicodedata

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from common import rng
from common.archive import Names, folder_index
from common.args import NAMED_SETS, fail
from common.folders import class_labels, data_path, describe, find_splits, left_out, note, scan_images, several
from common.images import EXTENSIONS, MODES, BadImage, decode, survey
from common.lists import in_folder, read_list
from common.shards import select
from common.tars import Archives

WHITE = {}  # of each --data, decided by the part of it that is opened first, the training images


class Files:
    """Image files. names: their paths relative to root, an archive.Names or a list, which becomes one. channels: of the
    tensors, whatever the files have. dtype, white: set by `open_dataset`, see `images.survey`."""

    dtype, white = torch.uint8, 0

    def __init__(self, root, names, labels=None, classes=None, channels=3):
        self.root, self.names = os.fsencode(root), Names.of(names) if isinstance(names, list) else names
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes, self.channels = classes, channels

    def __len__(self):
        return len(self.names)

    def path(self, i):
        return os.fsdecode(os.path.join(self.root, self.names[i]))

    def read(self, i):
        """The encoded bytes of image i."""
        with open(self.path(i), "rb") as file:
            return file.read()

    def __getitem__(self, i):
        try:
            image = decode(self.read(i), self.channels, self.dtype, self.white)
        except Exception as error:  # decoders raise a dozen kinds, all of which mean the same to the reader
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error).partition("\n")[0]
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "  # those are ours, in plain words
            raise BadImage(f"{self.path(i)}: {kind}{reason}") from None
        return image, -1 if self.labels is None else int(self.labels[i])


class Tar(Files):
    """Images in tar archives, read in any order and by any number of threads. index: a tars.Index of the archives."""

    def __init__(self, archives, index, labels=None, classes=None):
        super().__init__("", index.names, labels, classes)
        self.archives, self.archive = Archives(archives), index.archive
        self.positions, self.sizes = index.positions, index.sizes

    def path(self, i):
        return os.path.join(self.archives.paths[self.archive[i]], os.fsdecode(self.names[i]))

    def read(self, i):
        return self.archives.read(int(self.archive[i]), int(self.sizes[i]), int(self.positions[i]))


class Arrays:
    """Images held in memory as one uint8 array (N, H, W, C)."""

    def __init__(self, images, labels, classes=None):
        labels = np.asarray(labels, dtype=np.int64)
        self.images, self.labels, self.classes = images, None if (labels < 0).all() else labels, classes
        self.channels = images.shape[3]

    def __len__(self):
        return len(self.images)

    def path(self, i):
        return f"image {i}"

    def __getitem__(self, i):
        image = torch.from_numpy(self.images[i]).permute(2, 0, 1)
        return image, -1 if self.labels is None else int(self.labels[i])


class Fake:
    """Coloured noise of 10 classes, drawn from the index: for trying things without data."""

    def __init__(self, n, offset, size=64, channels=3):
        self.n, self.offset, self.size, self.channels = n, offset, size, channels
        self.labels, self.classes = np.arange(n) % 10, [str(c) for c in range(10)]

    def __len__(self):
        return self.n

    def path(self, i):
        return f"fake image {i}"

    def __getitem__(self, i):
        label, shape = int(self.labels[i]), (self.size, self.size, self.channels)
        noise = rng.uniforms(0, 0, [i + self.offset], rng.NOISE, math.prod(shape)).reshape(shape)
        tint = rng.uniforms(0, 0, [label], rng.TINT, self.channels)
        return torch.from_numpy((255 * (noise + tint) / 2).astype(np.uint8)).permute(2, 0, 1), label


class Subset:
    """Some samples of a dataset, by index."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, np.asarray(indices)
        self.labels = None if dataset.labels is None else dataset.labels[self.indices]
        self.classes = dataset.classes
        self.channels, self.dtype = getattr(dataset, "channels", 3), getattr(dataset, "dtype", torch.uint8)

    def __len__(self):
        return len(self.indices)

    def path(self, i):
        return self.dataset.path(self.indices[i])

    def __getitem__(self, i):
        return self.dataset[int(self.indices[i])]


def with_labels(dataset):
    """Without the samples that have no label beside others that have one: of STL-10's training set, most of them."""
    if dataset.labels is None or (dataset.labels >= 0).all():
        return dataset
    return Subset(dataset, np.flatnonzero(dataset.labels >= 0))


def evenly_spaced(dataset, most):
    """At most `most` samples, evenly spaced over the dataset."""
    if len(dataset) <= most:
        return dataset
    return Subset(dataset, np.linspace(0, len(dataset) - 1, most).round().astype(np.int64))


def in_memory(dataset):
    """The uint8 array (N, H, W, C) of a dataset that holds its images in memory; None for others."""
    if isinstance(dataset, Subset):
        images = in_memory(dataset.dataset)
        return None if images is None else images[dataset.indices]
    return dataset.images if isinstance(dataset, Arrays) else None


# ------------------------------------------------------------------------------------- finding what --data names
def open_dataset(data, split, image_list=None, required=True, channels=3):
    """The dataset that `--data` names. split: "train" or "val". image_list: a list file instead of the folder's own.

    data: a folder with train/ and val/ (class sub-folders, or flat), a folder of images, .tar archives (a path, a range
    like x-{000..146}.tar, a pattern like x-*.tar, or a folder of them), or one of NAMED_SETS (cifar10:/path to say
    where it lies, fake:N for N images). Returns None if the split does not exist and is not required. Anything wrong
    ends the program with code 2 and one line.
    """
    name, _, where = str(data).partition(":")
    if name in NAMED_SETS and image_list is None:
        if not where and os.path.exists(name):
            note(f"--data {name} is the built-in set, not the folder of that name here, which is --data ./{name}")
        return _named(name, where, split, channels)
    if name in NAMED_SETS and not os.path.exists(data):
        fail(f"--{split}-list goes with --data FOLDER, not with the built-in {name}")
    dataset = _files(data, split, image_list, required)
    if dataset is not None:
        dataset.channels = channels
        survey(dataset)
        if dataset.white:
            dataset.white = WHITE.setdefault(str(data), dataset.white)
            note(f"{data}: {dataset.white} is white in its images of 32 bits or floats, the same in all of them")
        if channels not in MODES or dataset.path(0).lower().endswith(".npy"):  # else any image can be made to fit
            try:
                dataset[0]
            except BadImage as error:
                if "(--channels)" in str(error):  # a mistake in the command, not in a file
                    fail(f"--data {data}: {error}")
    return dataset


def _files(data, split, image_list, required):
    if (found := select(data, split, image_list)) is not None:
        archives, index, labels, classes = found
        if index is None and required:
            fail(f"--data {data} has no {split}/ folder inside, and no {split}.tar lies beside it")
        return None if index is None else Tar(archives, index, labels, classes)
    root = data_path(data)
    if not root.is_dir():
        remedy = f"give a folder of images or one of {', '.join(NAMED_SETS)}"
        if root.suffix.lower() in (".txt", ".csv", ".tsv", ".json", ".jsonl"):
            remedy = f"give the folder of its images, and --{split}-list {data}"
        elif root.suffix.lower() in (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"):
            remedy = "unpack it and give the folder"
        fail(f"--data {data} is not a folder or a .tar archive: {remedy}")
    if image_list is not None:
        return Files(root, *read_list(image_list, split, in_folder(root), root))
    splits = find_splits(root)
    if split not in splits and (splits or split == "val"):
        if required:
            there = f", only {several(path.name for path in splits.values())}/" if splits else ""
            remedy = f"put images for it there, give --{split}-list, or the folder of the images as --data"
            if not splits:
                remedy = "put labelled images into train/<class>/ and val/<class>/, or give --train-list and --val-list"
            fail(f"--data {data} has no {split}/ folder{there}: {remedy}")
        return None
    folder = splits.get(split, root)
    names, folders, left = folder_index(folder, scan_images, EXTENSIONS)
    if not len(names):
        text = left_out(left)
        fail(f"no images in {folder}: expected files ending in {' '.join(EXTENSIONS)}{text and f'; {text}'}")
    describe(folder, folders, left, bool(splits))
    return Files(folder, names, *(class_labels(names.strings(), folder) if splits else (None, None)))


def open_split(args, channels=3):
    """The images that --split names; without it those of val, of an undivided folder, or of the only list. Where some
    have a label, those."""
    split = args.split or ("train" if args.train_list and not args.val_list else "val")
    image_list = args.val_list if split == "val" else args.train_list
    dataset = open_dataset(args.data, split, image_list, bool(args.split), channels)
    return with_labels(dataset if dataset is not None else open_dataset(args.data, "train", channels=channels))


def open_labelled(data, train_list=None, val_list=None, channels=3):
    """Training and test set of an evaluation: (train, val), with the same class numbers. Ends the program if labels are
    missing or do not agree."""
    lists = {"train": train_list, "val": val_list}
    train, val = (open_dataset(data, split, names, channels=channels) for split, names in lists.items())
    for split, flag, dataset in (("training", "--train-list", train), ("test", "--val-list", val)):
        if dataset.labels is None:
            fail(f"--data {data}: the {split} images have no labels (put them in class folders, or give {flag})")
    train, val = with_labels(train), with_labels(val)
    if reason := match_classes(train, val):
        fail(f"--data {data}: {reason}")
    name = train.classes or range(10**9)
    if unseen := sorted(set(val.labels.tolist()) - set(train.labels.tolist())):
        fail(f"--data {data}: test labels that no training image has: {several(name[i] for i in unseen)}")
    if len(set(train.labels.tolist())) == 1:
        fail(f"--data {data}: all images are of one class, {name[train.labels[0]]}: there is nothing to tell apart")
    return train, val


def match_classes(train, val):
    """Gives `val` the class numbers of `train`, by the names of the classes. Returns why that cannot be, or None."""
    if not train.classes or not val.classes:
        return None
    counted = [only_numbers(part.classes) for part in (train, val)]
    if counted[0] != counted[1]:  # numbers of a list on one side, names of folders on the other
        part, named = (train, val) if counted[0] else (val, train)
        places = {str(i) for i in range(len(named.classes))}
        names = folder_classes(part)
        if names and set(names.values()) & set(named.classes):
            part.classes = [names.get(label, name) for label, name in enumerate(part.classes)]
        elif set(part.classes) == places or (part is val and set(part.classes) < places):
            note(f"the labels of the list are taken for class folders in alphabetical order: {named.classes[0]} is 0")
            part.labels, part.classes = np.array([int(c) for c in part.classes])[part.labels], named.classes
    elif all(counted) and (odd := _contradiction(train, val)):
        note(odd)
    if train.classes == val.classes:
        return None
    alike = collections.Counter(map(_folded, train.classes))
    number = {_folded(c): i for i, c in enumerate(train.classes) if alike[_folded(c)] == 1}
    number |= {c: i for i, c in enumerate(train.classes)}
    new = [number.get(c, number.get(_folded(c), -1)) for c in val.classes]
    if unknown := [val.classes[i] for i in np.unique(val.labels) if new[i] < 0]:
        odd = several(sorted(set(train.classes) ^ set(val.classes)))
        return f"train and val have different classes ({odd}): no training image is of {several(unknown)}"
    val.labels, val.classes = np.array(new)[val.labels], train.classes
    return None


def _folded(name):
    """A class in the spelling in which train/ and val/ may differ."""
    return unicodedata.normalize("NFC", name).casefold()


def _folders(dataset, most=None):
    """{folder: its labels} of the images of a dataset, of at most so many."""
    count = len(dataset.labels)
    rows = np.arange(count) if most is None else np.linspace(0, count - 1, min(count, most)).astype(np.int64)
    found = collections.defaultdict(set)
    for i, label in zip(rows.tolist(), dataset.labels[rows].tolist(), strict=True):
        found[os.path.basename(os.path.dirname(dataset.path(i)))].add(label)
    return found


def only_numbers(classes):
    """Are classes called as those of a list of numbers?"""
    return all(name.removeprefix("-").isdecimal() for name in classes)


def folder_classes(dataset):
    """{label: folder of its images} if that is one folder for each, else None."""
    found = _folders(dataset)
    names = {label: folder for folder, labels in found.items() for label in labels}
    alone = len(names) == len(found) and all(len(labels) == 1 for labels in found.values())
    return names if alone and "" not in found else None


def _contradiction(train, val):
    """Says where two lists give one folder different labels."""
    found = [_folders(part, 10_000) for part in (train, val)]
    for folder in sorted(found[0].keys() & found[1].keys() - {""}):
        if all(len(labels[folder]) == 1 for labels in found):
            first, second = (
                part.classes[min(labels[folder])] for part, labels in zip((train, val), found, strict=True)
            )
            if first != second:
                return f"the images in folders {folder}/ have the label {first} in training, {second} in the test set"
    return None


def _named(name, where, split, channels):
    if name == "fake":
        if where and not (where.isdigit() and int(where) > 0):
            fail(f"--data fake:{where}: the part after the colon is the number of images")
        n = int(where or 1000)
        return Fake(*((n, 0) if split == "train" else (max(10, n // 5), n)), channels=channels)
    if channels not in MODES:
        fail(f"--channels {channels}: {name} has 3, and can be made grey (1)")
    images, labels, classes = _array_set(name, where, split == "train")
    if channels == 1:
        images = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
    return Arrays(images, labels, classes)


def _array_set(name, where, train):
    """(images (N, H, W, 3), labels, classes)"""
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = (images.reshape(-1, 8, 8, 1) * (255 / 16)).round().astype(np.uint8).repeat(3, axis=3)
        part = (np.arange(len(labels)) % 5 < 4) == train  # every fifth image is one of the 359 to test, not to train on
        return images[part], labels[part], [str(d) for d in range(10)]
    import torchvision

    root = where or os.environ.get("TORCH_DATA", "data")
    split = train if name != "stl10" else "train+unlabeled" if train else "test"
    try:
        found = getattr(torchvision.datasets, name.upper())(root, split, download=not where)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0].partition(". You can use")[0] if str(error) else type(error).__name__
        fail(f"--data {name} in {root}: {reason}; put torchvision's files in a folder and say --data {name}:FOLDER")
    if name == "stl10":
        return np.ascontiguousarray(found.data.transpose(0, 2, 3, 1)), found.labels, found.classes
    return found.data, found.targets, found.classes
