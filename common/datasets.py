"""Data sets: finding what --data names, and the images in folders, archives, lists and memory.

A dataset is anything with `__len__` and `__getitem__(i) -> (uint8 tensor (3, H, W) or PIL image, int label)`. One with
other channels says so in its attribute `channels`; one with `dtype` float32 gives such tensors, in [0, 255].
"""

import contextlib
import functools
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from common import rng
from common.archive import Names, archive_index, folder_index
from common.args import NAMED_SETS, fail
from common.distributed import print0
from common.images import EXTENSIONS, MODES, BadImage, decode, is_deep
from common.lists import read_list

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}  # names of their folders
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}  # beside train.tar and val.tar


class Files:
    """Image files. names: their paths relative to root, an archive.Names or a list, which becomes one. channels: of the
    tensors, whatever the files have. dtype: float32, set by `open_dataset`, where they hold more than 8 bits."""

    dtype = torch.uint8

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
            image = decode(self.read(i), self.channels, self.dtype)
        except Exception as error:  # decoders raise a dozen kinds, all of which mean the same to the reader
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error).partition("\n")[0]
            raise BadImage(f"{self.path(i)}: {type(error).__name__}: {reason}") from None
        return image, -1 if self.labels is None else int(self.labels[i])


class Tar(Files):
    """Images in an uncompressed tar archive, read in any order and by any number of threads."""

    def __init__(self, path, names, positions, sizes, labels=None, classes=None):
        super().__init__(path, names, labels, classes)
        self.positions, self.sizes, self.file = positions, sizes, open(path, "rb")

    def read(self, i):
        return os.pread(self.file.fileno(), int(self.sizes[i]), int(self.positions[i]))


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

    data: a folder with train/ and val/ (class sub-folders, or flat), a folder of images, a .tar archive, or one of
    NAMED_SETS (cifar10:/path to say where it lies, fake:N for N images). Returns None if the split does not exist and
    is not required. Anything wrong ends the program with code 2 and one line.
    """
    name, _, where = str(data).partition(":")
    if name in NAMED_SETS and not image_list:
        return _named(name, where, split, channels)
    dataset = _files(data, split, image_list, required)
    if dataset is not None:
        dataset.channels = channels
        for i in range(0, len(dataset), -(-len(dataset) // 8)):
            with contextlib.suppress(Exception):  # a broken file: it is named when it is loaded
                dataset.dtype = torch.float32 if is_deep(dataset.read(i)) else dataset.dtype
        if channels not in MODES or dataset.path(0).lower().endswith(".npy"):  # else any image can be made to fit
            try:
                dataset[0]
            except BadImage as error:
                if "(--channels)" in str(error):  # a mistake in the command, not in a file
                    fail(f"--data {data}: {error}")
    return dataset


def _files(data, split, image_list, required):
    root = Path(data)
    if archive := _archive(root, split):
        return _from_archive(archive, split, image_list, required)
    if not root.is_dir():
        kind = "is not a folder or a .tar archive" if root.exists() else "does not exist"
        fail(f"--data {data} {kind}: give a folder of images or one of {', '.join(NAMED_SETS)}")
    if image_list:

        @functools.cache
        def listed(folder):  # once, which is faster than asking for each of a million files
            return set(os.listdir(root / folder)) if (root / folder).is_dir() else ()

        def there(path):
            folder, _, name = path.rpartition("/")
            return name in listed(folder)

        return Files(root, *read_list(Path(image_list), split, there, root))
    found = next((root / f for f in SPLITS[split] if (root / f).is_dir()), None)
    if found is None and (split == "val" or (root / "val").is_dir()):
        if required:
            fail(f"--data {data} has no {split}/ folder: put images for it there, or give --{split}-list")
        return None
    folder = found or root
    names = folder_index(folder, scan_images)
    if not len(names):
        fail(f"no images in {folder}: expected files ending in {' '.join(EXTENSIONS)}")
    return Files(folder, names, *(_classes(names.strings(), folder) if found else (None, None)))


def open_split(args, channels=3):
    """The images that --split names; without it those of val, of an undivided folder, or of the only list."""
    split = args.split or ("train" if args.train_list and not args.val_list else "val")
    image_list = args.val_list if split == "val" else args.train_list
    dataset = open_dataset(args.data, split, image_list, bool(args.split), channels)
    return dataset if dataset is not None else open_dataset(args.data, "train", channels=channels)


def open_labelled(data, train_list=None, val_list=None, channels=3):
    """Training and test set of an evaluation: (train, val). Ends the program if labels are missing or do not agree."""
    lists = {"train": train_list, "val": val_list}
    train, val = (open_dataset(data, split, names, channels=channels) for split, names in lists.items())
    for split, flag, dataset in (("training", "--train-list", train), ("test", "--val-list", val)):
        if dataset.labels is None:
            fail(f"--data {data}: the {split} images have no labels (put them in class folders, or give {flag})")
    if train.classes and val.classes and train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[:5]
        fail(f"--data {data}: train and val have different classes ({', '.join(odd)} ...)")
    if unseen := sorted(set(map(int, val.labels)) - set(map(int, train.labels))):
        fail(f"--data {data}: test labels that no training image has: {', '.join(map(str, unseen[:5]))}")
    return train, val


def scan_images(folder):
    """Relative paths of all images below a folder, sorted, and of all folders; links to folders are followed once."""

    def unreadable(error):
        fail(f"folder {error.filename} cannot be read: {error.strerror}")

    def leads_up(folder, above):
        """Is it a link to one of its own parents?"""
        real = os.path.realpath(folder)
        return os.path.islink(folder) and os.path.commonpath([real, os.path.realpath(above)]) == real

    images, folders, root = [], [], os.path.join(folder, "")
    for path, below, files in os.walk(root, onerror=unreadable, followlinks=True):
        folders.append(os.path.join(path, "")[len(root) :])
        below[:] = [name for name in below if not name.startswith(".") and not leads_up(os.path.join(path, name), path)]
        files = [name for name in files if not name.startswith(".") and name.lower().endswith(EXTENSIONS)]
        images += [folders[-1] + name for name in files]
    return sorted(images), folders


def _classes(paths, where):
    """(labels, class names) from the first folder of each path; (None, None) if not every image lies in one."""
    tops, loose = [p.partition("/")[0] for p in paths], [p for p in paths if "/" not in p]
    if loose:
        if len(loose) < len(paths):
            beside = f"{len(loose)} images lie beside the class folders ({loose[0]!r} ...)"
            print0(f"note: {where}: {beside}: none gets a label")
        return None, None
    number = {c: i for i, c in enumerate(sorted(set(tops)))}
    return [number[top] for top in tops], list(number)


def _archive(root, split):
    """The tar archive that holds a split, if --data names an archive or a folder with archives instead of folders."""
    if root.is_file() and root.suffix.lower() == ".tar":
        pairs = {"train.tar": "val.tar", ARCHIVES["train"]: ARCHIVES["val"]}
        other = root.parent / pairs.get(root.name, root.name)
        return other if split == "val" and other.is_file() else root  # which itself may hold both
    if any((root / folder).is_dir() for folder in SPLITS[split]):
        return None
    return next((root / n for n in (f"{split}.tar", ARCHIVES[split]) if (root / n).is_file()), None)


def _from_archive(path, split, image_list, required):
    names, positions, sizes = archive_index(path, EXTENSIONS)
    paths, classes = names.strings(), None
    if image_list:
        place = {p: i for i, p in enumerate(paths)}
        wanted, labels = read_list(Path(image_list), split, place.__contains__, path)
        rows = [place[p] for p in wanted]
    else:  # train/class/image, perhaps below one more folder, or class/image
        folders = {f for names in SPLITS.values() for f in names}
        first = {p.partition("/")[0] for p in paths}
        skip = 1 if len(first) == 1 and not first & folders else 0
        tops = [p.split("/", skip + 1)[skip] for p in paths] if skip or first & folders else []
        if set(tops) & folders:
            rows = [i for i, top in enumerate(tops) if top in SPLITS[split]]
            paths = [paths[i].split("/", skip + 1)[-1] for i in rows]
        elif split == "val" and path.stem not in SPLITS["val"] and path.name != ARCHIVES["val"]:
            rows = []
        else:
            rows = range(len(paths))
        if not rows:
            if required:
                fail(f"--data {path} has no {split}/ folder inside, and no {split}.tar lies beside it")
            return None
        labels, classes = _classes(paths, path)
        if classes and len(classes) == 1:  # one folder around everything says nothing
            labels, classes = None, None
    if len(rows) < len(names) or image_list:
        names, positions, sizes = Names.of([names[i] for i in rows]), positions[rows], sizes[rows]
    return Tar(path, names, positions, sizes, labels, classes)


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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(f"--data {name} in {root}: {reason}; put torchvision's files in a folder and say --data {name}:FOLDER")
    if name == "stl10":
        return np.ascontiguousarray(found.data.transpose(0, 2, 3, 1)), found.labels, found.classes
    return found.data, found.targets, found.classes
