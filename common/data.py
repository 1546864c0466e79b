"""Images: finding them, decoding them, and a loader whose batches depend on (seed, epoch, step) and nothing else.

The loader decodes and crops in threads (decoding and resizing release the interpreter lock) into uint8 batches a few
steps ahead, and the rest of the augmentation runs in batch on the device when a script asks for `batch.views()`.
A dataset is anything with `__len__` and `__getitem__(i) -> (uint8 tensor (3, H, W) or PIL image, int label)`. One with
other channels says so in its attribute `channels`; one with `dtype` float32 gives such tensors, in [0, 255].
"""

import collections
import concurrent.futures
import dataclasses
import io
import json
import math
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from common import augment
from common.archive import Names, archive_index, folder_index
from common.distributed import print0, rank, world_size
from common.log import fail

try:
    from torchvision.io import ImageReadMode, decode_jpeg, decode_png
except ImportError:  # torchvision means to drop its decoders one day; PIL reads the same files
    decode_jpeg = decode_png = None

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".npy")
DEEP = (".npy", ".png", ".tif", ".tiff", ".pgm")  # may hold more than 8 bits
NAMES = {"digits": 16, "cifar10": 32, "cifar100": 32, "stl10": 96, "fake": 64}  # and the size they are used at
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}  # names of their folders
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}  # beside train.tar and val.tar
TOLD = set()  # files whose names have been reported, by whichever loader
AHEAD = 2  # batches prepared in advance; with the one in use, three exist at a time


# ---------------------------------------------------------------------------------------------------- datasets
class BadImage(Exception):
    """An image that cannot be decoded; the text names the file and the reason."""


MODES = {1: "L", 3: "RGB"}  # what any image can be made, by its channels


def to_tensor(image, channels=3, dtype=torch.uint8):
    """Any PIL image -> (channels, H, W), upright (EXIF). 16-bit and float grey is scaled to [0, 255], and rounded if
    dtype is uint8. Any image becomes grey or RGB; with other numbers of channels it must have as many."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip these at 255
        array = np.array(image, dtype=np.float32)
        if image.mode.startswith("I;16") or array.max(initial=0) > 255:
            array = array / 257
        elif image.mode == "F" and array.max(initial=0) <= 1:
            array = array * 255
        return _typed(torch.from_numpy(array)[None], channels, dtype)
    image.info.pop("transparency", None)  # changes no colour, and PIL warns of it
    if channels in MODES:
        array = np.array(image.convert(MODES[channels]))
    elif len(image.getbands()) == channels:
        array = np.array(image)
    else:
        raise ValueError(f"has {len(image.getbands())} channels, expected {channels} (--channels)")
    array = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(array).permute(2, 0, 1)


def _typed(image, channels, dtype):
    """A tensor (c, H, W) in [0, 255] as (channels, H, W) of dtype: grey is repeated, any other number must agree."""
    if image.shape[0] == 1 and channels == 3:
        image = image.expand(3, -1, -1)
    if image.shape[0] != channels:
        raise ValueError(f"has {image.shape[0]} channels, expected {channels} (--channels)")
    if image.is_floating_point() and dtype == torch.uint8:
        image = image.round().clamp(0, 255)
    return image.to(dtype) if image.is_floating_point() else image


def _array(data, channels, dtype):
    """A NumPy file (H, W), (H, W, C) or (C, H, W) of uint8, uint16 or floats in [0, 1]."""
    array = np.load(io.BytesIO(data), allow_pickle=False)
    shape, fit = array.shape, (channels, 1) if channels == 3 else (channels,)
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and shape[2] not in fit and shape[0] in fit:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in fit:
        raise ValueError(f"has the shape {shape}: expected (H, W, C) or (C, H, W) with C = {channels} (--channels)")
    array = np.ascontiguousarray(array).transpose(2, 0, 1)  # a pixel's values lie side by side, as in decoded images
    if array.dtype == np.uint8:
        return _typed(torch.from_numpy(array), channels, dtype)
    if array.dtype == np.uint16:
        return _typed(torch.from_numpy(array.astype(np.float32) / 257), channels, dtype)
    if array.dtype.kind != "f":
        raise ValueError(f"holds {array.dtype}: expected uint8, uint16, or floats in [0, 1]")
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if not (low >= 0 and high <= 1):  # not a number is neither
        raise ValueError(f"holds floats from {low:g} to {high:g}: scale all images alike to [0, 1]")
    return _typed(torch.from_numpy(array.astype(np.float32) * 255), channels, dtype)


def _jpeg_size(data):
    """(pixels, channels) that a JPEG says it has, from its frame header; (0, 0) if there is none."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            return height * width, data[at + 9]
        at += 1 if marker == 0xFF else 2 + length
    return 0, 0


def _is_deep(data):
    """Does an encoded image hold more than 8 bits per value?"""
    if data[:6] == b"\x93NUMPY":
        return np.load(io.BytesIO(data), allow_pickle=False).dtype != np.uint8
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data[24] == 16
    if data[:4] in (b"II*\0", b"MM\0*") or data[:2] == b"P5":
        with Image.open(io.BytesIO(data)) as image:
            return image.mode.startswith("I") or image.mode == "F"
    return False


def decode(data, channels=3, dtype=torch.uint8):
    """Encoded bytes -> (channels, H, W) of dtype, or uint8. JPEG by torchvision's decoder, everything unusual by PIL.

    A picture of more pixels than PIL accepts, which a few bytes can claim to be, is an error before memory is taken.
    """
    if decode_jpeg is not None and data[:3] == b"\xff\xd8\xff" and channels in MODES:
        if _jpeg_size(data)[0] <= Image.MAX_IMAGE_PIXELS:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            mode = ImageReadMode.UNCHANGED if channels == 3 else ImageReadMode.GRAY
            try:
                image = decode_jpeg(encoded, mode=mode, apply_exif_orientation=True)
                if image.shape[0] in (1, 3):
                    return image.expand(channels, -1, -1)
            except RuntimeError:
                pass  # PIL reads some more kinds, and has the better message for the rest
    if data[:6] == b"\x93NUMPY":
        return _array(data, channels, dtype)
    with Image.open(io.BytesIO(data)) as image:
        # PIL reads 16-bit colour as 8 bits; opening it has checked the size
        if decode_png is not None and dtype != torch.uint8 and image.format == "PNG" and data[24:26] == b"\x10\x02":
            image = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
            return _typed(image.to(torch.float32) / 257, channels, dtype)
        return to_tensor(image, channels, dtype)


class Files:
    """Image files. names: their paths relative to root, an archive.Names or a list, which becomes one.

    channels: of the tensors, whatever the files have. dtype: float32, set by `build`, where they hold more than 8 bits.
    """

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
            raise self.bad(i, error) from None
        return image, -1 if self.labels is None else int(self.labels[i])

    def bad(self, i, error):
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error).partition("\n")[0]
        return BadImage(f"{self.path(i)}: {type(error).__name__}: {reason}")


class Tar(Files):
    """Images in an uncompressed tar archive, read in any order and by any number of threads."""

    def __init__(self, path, names, positions, sizes, labels=None, classes=None):
        super().__init__(path, names, labels, classes)
        self.positions, self.sizes = positions, sizes
        self.file = open(path, "rb")

    def read(self, i):
        return os.pread(self.file.fileno(), int(self.sizes[i]), int(self.positions[i]))


class Arrays:
    """Images held in memory as one uint8 array (N, H, W, C)."""

    def __init__(self, images, labels, classes=None):
        self.images, self.labels, self.classes = images, np.asarray(labels, dtype=np.int64), classes
        self.channels = images.shape[3]
        if (self.labels < 0).all():
            self.labels = None

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
        label = int(self.labels[i])
        shape = (self.size, self.size, self.channels)
        noise = augment.uniforms(0, 0, [i + self.offset], 99, math.prod(shape)).reshape(shape)
        tint = augment.uniforms(0, 0, [label], 98, self.channels)
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


def spread(dataset, most):
    """At most `most` samples, evenly spaced over the dataset."""
    if len(dataset) <= most:
        return dataset
    return Subset(dataset, np.linspace(0, len(dataset) - 1, most).round().astype(np.int64))


# ------------------------------------------------------------------------------------- finding what --data names
def default_size(data):
    """The image size to use when none is asked for: that of a small named set, else 224."""
    return NAMES.get(str(data).partition(":")[0], 224)


def build(data, split, image_list=None, required=True, channels=3):
    """The dataset that `--data` names. split: "train" or "val". image_list: a list file instead of the folder's own.
    channels: of its images.

    data: a folder with train/ and val/ (class sub-folders, or flat), a folder of images, or one of NAMES
    (cifar10:/path to say where it lies, fake:N for N images). Returns None if the split does not exist and
    `required` is false. Anything wrong ends the program with code 2 and one line.
    """
    name, _, where = str(data).partition(":")
    if name in NAMES and not image_list:
        return _named(name, where, split, channels)
    dataset = _files(data, split, image_list, required)
    if dataset is not None:
        dataset.channels = channels
        deep = [i for i in range(0, len(dataset), -(-len(dataset) // 8)) if dataset.path(i).lower().endswith(DEEP)]
        dataset.dtype = torch.float32 if any(_looks_deep(dataset, i) for i in deep) else torch.uint8
        if channels not in MODES or dataset.path(0).lower().endswith(".npy"):  # else any image can be made to fit
            try:
                dataset[0]
            except BadImage as error:
                if "(--channels)" in str(error):  # a mistake in the command, not in a file
                    fail(f"--data {data}: {error}")
    return dataset


def _looks_deep(dataset, i):
    try:
        return _is_deep(dataset.read(i))
    except Exception:  # a broken file: it is told when it is loaded
        return False


def _files(data, split, image_list, required):
    root = Path(data)
    archive = _archive(root, split)
    if archive:
        return _from_archive(archive, split, image_list, required)
    if not root.is_dir():
        kind = "is not a folder or a .tar archive" if root.exists() else "does not exist"
        fail(f"--data {data} {kind}: give a folder of images or one of {', '.join(NAMES)}")
    if image_list:
        return Files(root, *_read_list(Path(image_list), split, _listed(root), root))
    folders = SPLITS[split]
    found = next((root / f for f in folders if (root / f).is_dir()), None)
    if found is None and (split == "val" or (root / "val").is_dir()):
        if required:
            fail(f"--data {data} has no {folders[0]}/ folder: put images for it there, or give --{split}-list")
        return None
    return _from_folder(found or root, labelled=found is not None)


def labelled(data, train_list=None, val_list=None, channels=3):
    """Training and test set of an evaluation: (train, val). Ends the program if labels are missing or do not agree."""
    train, val = build(data, "train", train_list, True, channels), build(data, "val", val_list, True, channels)
    for split, flag, dataset in (("training", "--train-list", train), ("test", "--val-list", val)):
        if dataset.labels is None:
            fail(f"--data {data}: the {split} images have no labels (put them in class folders, or give {flag})")
    if train.classes and val.classes and train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[:5]
        fail(f"--data {data}: train and val have different classes ({', '.join(odd)} ...)")
    unseen = sorted(set(map(int, val.labels)) - set(map(int, train.labels)))
    if unseen:
        fail(f"--data {data}: test labels that no training image has: {', '.join(map(str, unseen[:5]))}")
    return train, val


def scan(folder, prefix=""):
    """Relative paths of all images below a folder, sorted, and of all folders; links to folders are followed once."""
    images, folders, found = [], [], [prefix]
    try:
        with os.scandir(folder) as entries:
            entries = list(entries)
    except OSError as error:
        fail(f"folder {folder} cannot be read: {error.strerror}")
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():  # is_dir() of a circular link raises
            folders.append(entry.name)
        elif entry.name.lower().endswith(EXTENSIONS):
            images.append(prefix + entry.name)
    for name in sorted(folders):
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        if os.path.islink(path) and os.path.commonpath([real, os.path.realpath(folder)]) == real:
            continue  # a link to one of its own parents
        more, below = scan(path, f"{prefix}{name}/")
        images += more
        found += below
    return images if prefix else sorted(images), found


def _classes(paths, where):
    """(labels, class names) from the first folder of each path; (None, None) if not every image lies in one."""
    tops = [p.partition("/") for p in paths]
    loose = [top for top, slash, _ in tops if not slash]
    if loose:
        if len(loose) < len(paths):
            print0(
                f"note: {where}: {len(loose)} images lie beside the class folders ({loose[0]!r} ...): none gets a label"
            )
        return None, None
    tops = [top for top, _, _ in tops]
    classes = sorted(set(tops))
    number = {c: i for i, c in enumerate(classes)}
    return [number[top] for top in tops], classes


def _from_folder(folder, labelled):
    names = folder_index(folder, scan)
    if not len(names):
        fail(f"no images in {folder}: expected files ending in {' '.join(EXTENSIONS)}")
    labels, classes = _classes(names.strings(), folder) if labelled else (None, None)
    return Files(folder, names, labels, classes)


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
    paths, labels, classes = names.strings(), None, None
    if image_list:
        rows = {p: i for i, p in enumerate(paths)}
        wanted, labels = _read_list(Path(image_list), split, rows.__contains__, path)
        rows = [rows[p] for p in wanted]
    else:
        # train/class/image, perhaps below one more folder, or class/image
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
                fail(f"--data {path} has no {SPLITS[split][0]}/ folder inside, and no {split}.tar lies beside it")
            return None
        labels, classes = _classes(paths, path)
        if classes and len(classes) == 1:  # one folder around everything says nothing
            labels, classes = None, None
    if len(rows) < len(names) or image_list:
        names, positions, sizes = Names.of([names[i] for i in rows]), positions[rows], sizes[rows]
    return Tar(path, names, positions, sizes, labels, classes)


def _read_list(image_list, split, there, root):
    """(paths, labels or None) of a list file. there(path): is this image in root?"""
    flag = f"--{split}-list {image_list}"
    if not image_list.is_file():
        fail(f"{flag} does not exist")
    if image_list.suffix == ".json":
        return _read_json(image_list, flag, there, root)
    paths, labels = [], []
    for number, line in enumerate(image_list.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        path, _, label = line.rpartition(" ")
        labelled = bool(path) and label.isdecimal()
        if paths and labelled != bool(labels):
            fail(f"{flag}, line {number}: {'a' if labelled else 'no'} label, unlike the lines before: {line!r}")
        path = path.rstrip() if labelled else line
        if path.startswith("/") or ".." in path.split("/"):
            fail(f"{flag}, line {number}: {path!r} leads out of the data folder: paths are relative to --data")
        if not there(path):
            fail(f"{flag}, line {number}: {path!r} is not in {root} (expected: relative/path, a space and a number)")
        paths.append(path)
        if labelled:
            labels.append(int(label))
    if not paths:
        fail(f"{flag} names no image")
    return paths, labels or None


def _read_json(image_list, flag, there, root):
    """The same from iNaturalist's file: images[id, file_name], annotations[image_id, category_id] (none: no labels)."""
    try:
        content = json.loads(image_list.read_text(encoding="utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        labels = {a["image_id"]: int(a["category_id"]) for a in content.get("annotations", ())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        fail(f"{flag} has no images[id, file_name] and annotations[image_id, category_id]: {reason}")
    if not names:
        fail(f"{flag} names no image")
    first, prefix = next(iter(names.values())), f"{Path(root).resolve().name}/"
    if first.startswith(prefix) and not there(first):  # the names begin with the folder that --data already names
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    for key, name in names.items():
        if not there(name):
            fail(f"{flag}: {name!r} is not in {root}: --data is the folder that the file_name are relative to")
        if labels and labels.get(key, -1) < 0:
            fail(f"{flag}: {name!r} has no annotation with a category_id of at least 0, unlike others")
    return list(names.values()), [labels[key] for key in names] if labels else None


def _listed(root):
    """Tells whether root has a file. Its folder is listed once, which is faster than asking for each of a million."""
    listed = {}

    def there(path):
        folder, _, name = path.rpartition("/")
        if folder not in listed:
            listed[folder] = set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
        return name in listed[folder]

    return there


def _named(name, where, split, channels):
    train = split == "train"
    if name == "fake":
        if where and not (where.isdigit() and int(where) > 0):
            fail(f"--data fake:{where}: the part after the colon is the number of images")
        n = int(where or 1000)
        return Fake(n, 0, channels=channels) if train else Fake(max(10, n // 5), n, channels=channels)
    dataset = _array_set(name, where, train)
    if channels == 1:  # PIL's weights of red, green and blue
        r, g, b = (dataset.images[..., c].astype(np.uint32) * w for c, w in enumerate((19595, 38470, 7471)))
        dataset.images, dataset.channels = ((r + g + b + 0x8000) >> 16).astype(np.uint8)[..., None], 1
    elif channels != 3:
        fail(f"--channels {channels}: {name} has 3, and can be made grey (1)")
    return dataset


def _array_set(name, where, train):
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = (images.reshape(-1, 8, 8, 1) * (255 / 16)).round().astype(np.uint8).repeat(3, axis=3)
        val = np.arange(len(labels)) % 5 == 4  # every fifth image: 1,438 to train on, 359 to test
        part = ~val if train else val
        return Arrays(np.ascontiguousarray(images[part]), labels[part], [str(d) for d in range(10)])
    import torchvision

    root = where or os.environ.get("TORCH_DATA", "data")
    try:
        if name == "stl10":
            sets = torchvision.datasets.STL10(root, "train+unlabeled" if train else "test", download=not where)
            return Arrays(np.ascontiguousarray(sets.data.transpose(0, 2, 3, 1)), sets.labels, sets.classes)
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        sets = kind(root, train, download=not where)
        return Arrays(sets.data, sets.targets, sets.classes)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(f"--data {name} in {root}: {reason}; put torchvision's files in a folder and say --data {name}:FOLDER")


# ------------------------------------------------------------------------------------------------------ loading
@dataclasses.dataclass
class Batch:
    """One micro-batch of one process. images[v]: uint8 (B, 3, S, S) on the device. labels, indices: int64 (B,).

    host_indices: the indices in host memory, to draw numbers from without waiting for the device.
    On the CPU the images lie in the loader's buffers: they change when the next batch is asked for.
    """

    images: list
    steps: list
    recipes: tuple
    labels: torch.Tensor
    indices: torch.Tensor
    dtype: torch.dtype
    host_indices: np.ndarray

    def views(self):
        """The augmented, normalised views: a list of (B, 3, S, S) floats, channels_last."""
        return [
            augment.augment(images, steps, recipe.mean, recipe.std, self.dtype)
            for images, steps, recipe in zip(self.images, self.steps, self.recipes, strict=True)
        ]


class Loader:
    """Random views of a dataset in batches, each a pure function of (seed, epoch, step) whatever processes there are.

    views: one `augment.View` each. batch_size: images per optimiser step over all processes and `accum` micro-batches.
    `epoch(e)` yields `steps * accum` micro-batches of `local` images; the last, incomplete step is dropped.
    decode: "cpu", or "gpu" to decode JPEGs in batch on a CUDA device: another decoder, whose pixels differ by a few
    levels. Small sets that lie in memory are kept on a CUDA device and cropped there, with the same pixels.
    waited: seconds that the caller has spent waiting for images so far. streams: which random numbers each view takes
    (0, 1, 2 ... unless the caller sets it); views of one stream and one kind of crop see the same part of an image.
    """

    def __init__(
        self,
        dataset,
        views,
        batch_size,
        *,
        seed=0,
        device="cpu",
        workers=4,
        accum=1,
        max_bad=100,
        dtype=None,
        decode="cpu",
    ):
        if batch_size > len(dataset):
            smaller = 2 ** max(0, (len(dataset) // 8).bit_length() - 1)
            fail(f"--batch-size {batch_size} is larger than the data set ({len(dataset)} images): try {smaller}")
        self.dataset, self.recipes, self.seed, self.accum = dataset, tuple(views), seed, accum
        self.batch_size, self.local = batch_size, batch_size // (world_size() * accum)
        self.steps, self.streams = len(dataset) // batch_size, range(len(self.recipes))
        self.dtype = dtype or torch.float32
        self.pool = Pool(dataset, device, workers, max_bad, decode)

    @property
    def waited(self):
        return self.pool.waited

    def order(self, epoch):
        """The epoch's permutation of the whole data set, the same on every process."""
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.dataset))

    def epoch(self, epoch, start=0, order=None):
        """Micro-batches of an epoch from optimiser step `start` on. order: sample indices instead of a permutation;
        a sample that comes up twice is augmented differently each time."""
        order = self.order(epoch) if order is None else np.asarray(order)
        shuffled = np.argsort(order, kind="stable")
        first = np.searchsorted(order[shuffled], order[shuffled])
        occurrence = np.empty_like(order)
        occurrence[shuffled] = np.arange(len(order)) - first
        jobs = []
        for step in range(start, len(order) // self.batch_size):
            for micro in range(self.accum):
                begin = step * self.batch_size + (micro * world_size() + rank()) * self.local
                jobs.append(slice(begin, begin + self.local))

        def job(part):
            key = order[part] + len(self.dataset) * occurrence[part]
            draws = [augment.uniforms(self.seed, epoch, key, v, augment.DRAWS) for v in self.streams]
            return order[part], np.stack(draws)

        for indices, draws, images, labels in self.pool.run(map(job, jobs), self.recipes, self._crop, self._crop_batch):
            steps = [self._steps(augment.plan(recipe, u)) for recipe, u in zip(self.recipes, draws, strict=True)]
            on_device = self.pool.to_device(torch.from_numpy(indices))
            yield Batch(images, steps, self.recipes, labels, on_device, self.dtype, indices)

    @staticmethod
    def _crop(image, view, u):
        box = augment.crop_box(u.tolist(), image.shape[1], image.shape[2], view)
        return augment.crop_resize(image, box, view.size, view.interpolation)

    def _crop_batch(self, images, view, draws):
        boxes = [augment.crop_box(u, *images.shape[1:3], view) for u in draws.tolist()]
        boxes = self.pool.to_device(torch.tensor(boxes))
        return augment.crop_resize_batch(images, boxes, view.size, view.interpolation)

    def _steps(self, steps):
        """The rows and amounts of a plan on the device, in two transfers."""
        if not steps:
            return []
        names, rows, amounts = zip(*steps, strict=True)
        sizes = [len(r) for r in rows]
        rows = self.pool.to_device(torch.from_numpy(np.concatenate(rows))).split(sizes)
        amounts = self.pool.to_device(torch.from_numpy(np.concatenate(amounts))).split(sizes)
        return list(zip(names, rows, amounts, strict=True))


def eval_share(n, batch_size):
    """(first, last): this process's part [first, last) of n samples, consecutive in rank order and of whole batches.

    So a batch holds the same samples whatever the number of processes, and its features are the same to the last bit.
    """
    batches = -(-n // batch_size)
    first, last = (batches * r // world_size() * batch_size for r in (rank(), rank() + 1))
    return min(first, n), min(last, n)


def eval_batches(dataset, view, batch_size, device, workers=4, dtype=torch.float32):
    """This process's share of a dataset in order: yields (images (B, 3, S, S), labels (B,), indices (B,)).

    The shares of the processes (`eval_share`) together hold every sample exactly once.
    """
    indices = np.arange(*eval_share(len(dataset), batch_size))
    parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    pool = Pool(dataset, device, workers, max_bad=100)
    jobs = ((part, np.zeros((1, len(part), 0))) for part in parts)
    for part, _, images, labels in pool.run(jobs, (view,), center_crop, center_crop_batch):
        yield augment.augment(images[0], [], view.mean, view.std, dtype), labels, torch.from_numpy(part)


def center_crop(image, view, u):
    return augment.center_crop(image, view)


def center_crop_batch(images, view, u):
    return augment.center_crop_batch(images, view)


def statistics(dataset, size, workers=4, most=1000):
    """(mean, std) per channel, in [0, 1], over the central `size` x `size` pixels of `most` evenly spaced images."""
    images = spread(dataset, most)
    parts = np.array_split(np.arange(len(images)), -(-len(images) // 64))
    jobs = [(rows, np.zeros((1, len(rows), 0))) for rows in parts]
    total, square, count = 0, 0, 0
    for _, _, (x,), _ in Pool(images, "cpu", workers, max_bad=100).run(jobs, (augment.EvalView(size),), center_crop):
        x = x.double() / 255
        total, square = total + x.sum((0, 2, 3)), square + x.square().sum((0, 2, 3))
        count += x.numel() // x.shape[1]
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())  # a channel without contrast stays finite


def fit(views, dataset, stats=None, workers=4):
    """Views for the images of a dataset: normalised as `--stats` says, colour operators only where there are colours.

    stats: "imagenet" or "auto", the mean and standard deviation of the images themselves (`statistics`); by default
    "auto" unless they have three channels.
    """
    channels = getattr(dataset, "channels", 3)
    changes = {}
    if channels != 3:
        if stats == "imagenet":
            fail(f"--stats imagenet is for 3 channels, --channels says {channels}: leave it out")
        plain = [augment.without_colours(v) for v in views]
        if plain != list(views):
            print0(f"colours     {channels} channels: saturation, hue, greyscale and lighting are switched off")
        views = plain
    if (stats or ("imagenet" if channels == 3 else "auto")) == "auto":
        mean, std = statistics(dataset, views[0].size, workers)
        changes = {"mean": mean, "std": std}
        shown = (" ".join(f"{x:.3f}" for x in values[:8]) + (" ..." if channels > 8 else "") for values in (mean, std))
        print0("statistics  mean {}, std {}".format(*shown))
    elif getattr(dataset, "dtype", torch.uint8) != torch.uint8:
        mean, std = statistics(dataset, views[0].size, workers, most=64)
    else:
        return list(views)
    if (white := max(m + 3 * s for m, s in zip(mean, std, strict=True))) < 0.25:
        remedy = "scale them up" if changes else "scale them up, or try --stats auto"
        print0(f"note        images are dark: nearly all values are below {white:.0%} of the range; {remedy}")
    return [dataclasses.replace(v, **changes) for v in views]


class Pool:
    """Threads that fill batches in host memory. workers = 0 does the same in the calling thread.

    A small set that is held in memory is kept on a CUDA device as a whole instead, and its batches are cut there.
    decode: "gpu" leaves the decoding of JPEGs to a CUDA device.
    """

    def __init__(self, dataset, device, workers, max_bad, decode="cpu"):
        self.dataset, self.device, self.max_bad = dataset, torch.device(device), max_bad
        self.channels, self.dtype = getattr(dataset, "channels", 3), getattr(dataset, "dtype", torch.uint8)
        self.pinned = self.device.type == "cuda"
        self.workers, self.bad, self.lock, self.waited = workers, set(), threading.Lock(), 0.0
        torch.get_num_threads()  # fixes this thread's number before the loading threads set theirs to one
        self.threads = concurrent.futures.ThreadPoolExecutor(workers, initializer=_one_thread) if workers else None
        self.decode, self.resident = decode, None
        if decode == "gpu":
            check_gpu_decoder(dataset, self.device)
        else:
            self.resident = resident(dataset, self.device)
        if self.resident is not None:
            labels = np.full(len(dataset), -1) if dataset.labels is None else dataset.labels
            self.labels = torch.from_numpy(labels).to(self.device)

    def to_device(self, tensor):
        if self.pinned:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def run(self, jobs, views, crop, crop_batch=None):
        """jobs: (indices (B,), draws (V, B, n)) each. Yields (indices, draws, images per view on the device, labels).

        crop(image (C, H, W), view, draws (n,)) -> (C, S, S); crop_batch(images (B, H, W, C), view, draws (B, n)) ->
        (B, S, S, C) the same for images on the device. Buffers are used again; on CUDA only after the copy to the
        device has been made.
        """
        way = self._decoding if self.decode == "gpu" else self._loading
        if self.resident is not None and crop_batch:
            return self._cutting(jobs, views, crop_batch)
        return way(iter(jobs), views, crop)

    def _cutting(self, jobs, views, crop_batch):
        for indices, draws in jobs:
            rows = self.to_device(torch.from_numpy(np.asarray(indices)))
            images = self.resident[rows]
            crops = [crop_batch(images, view, draws[v]).permute(0, 3, 1, 2) for v, view in enumerate(views)]
            yield indices, draws, crops, self.labels[rows]

    def _decoding(self, jobs, views, crop):
        """Threads read the files, the device decodes and crops: what is no plain JPEG is decoded by the threads."""
        queue, read = collections.deque(), self.threads.map if self.threads else map

        def submit():
            for indices, draws in jobs:
                queue.append((indices, draws, read(self._read, indices.tolist())))
                return

        for _ in range(AHEAD):
            submit()
        try:
            while queue:
                indices, draws, files = queue.popleft()
                clock = time.perf_counter()
                files = list(files)
                self.waited += time.perf_counter() - clock
                submit()
                images, labels = zip(*self._decode_batch(indices, files), strict=True)
                crops = [
                    torch.stack([crop(image, view, u) for image, u in zip(images, draws[v], strict=True)])
                    for v, view in enumerate(views)
                ]
                yield indices, draws, crops, self.to_device(torch.tensor(labels))
        except TooManyBad as error:
            _give_up(error)

    def _read(self, index):
        """(bytes as a tensor (n,), label) of a JPEG that the device can decode; of anything else what `_load` gives."""
        try:
            data = self.dataset.read(index)
        except OSError:
            data = b""
        pixels, channels = _jpeg_size(data) if data[:3] == b"\xff\xd8\xff" else (0, 0)
        # orientation (EXIF) is for the CPU's decoder
        if 0 < pixels <= Image.MAX_IMAGE_PIXELS and channels in (1, 3) and b"Exif\0\0" not in data:
            label = -1 if self.dataset.labels is None else int(self.dataset.labels[index])
            return torch.frombuffer(bytearray(data), dtype=torch.uint8), label
        return self._load(index)

    def _decode_batch(self, indices, files):
        """Pairs of image (C, H, W) on the device and label, from those of `_read`."""
        rows = [row for row, (image, _) in enumerate(files) if image.ndim == 1]
        mode = ImageReadMode.RGB if self.channels == 3 else ImageReadMode.GRAY
        try:
            decoded = decode_jpeg([files[row][0] for row in rows], mode=mode, device=self.device) if rows else []
            for row, image in zip(rows, decoded, strict=True):
                files[row] = image, files[row][1]
        except RuntimeError:  # one of them is broken: the CPU names it and takes its neighbour
            for row in rows:
                files[row] = self._load(int(indices[row]))
        return [(image.to(self.device), label) for image, label in files]

    def _loading(self, jobs, views, crop):
        free, queue = collections.deque(), collections.deque()

        def submit():
            for indices, draws in jobs:
                slot = free.popleft() if free else _Slot()
                slot.prepare(len(indices), views, self.channels, self.dtype, self.pinned)
                chunk = max(1, min(8, len(indices) // max(1, self.workers)))
                parts = [range(i, min(i + chunk, len(indices))) for i in range(0, len(indices), chunk)]
                work = [(self._fill, slot, indices, draws, part, views, crop) for part in parts]
                futures = [self.threads.submit(*w) for w in work] if self.threads else work
                queue.append((indices, draws, slot, futures))
                return

        try:
            for _ in range(AHEAD if self.threads else 1):
                submit()
            while queue:
                indices, draws, slot, futures = queue[0]
                clock = time.perf_counter()
                for future in futures:
                    future.result() if self.threads else future[0](*future[1:])
                self.waited += time.perf_counter() - clock
                queue.popleft()
                if self.threads:
                    submit()
                images = [b[: len(indices)].to(self.device, non_blocking=True).permute(0, 3, 1, 2) for b in slot.images]
                labels = slot.labels[: len(indices)].to(self.device, non_blocking=True, copy=True)
                if self.pinned:
                    slot.copied = torch.cuda.Event()
                    slot.copied.record()
                yield indices, draws, images, labels
                free.append(slot)
                if not self.threads:
                    submit()
        except TooManyBad as error:
            _give_up(error)
        finally:  # after an error, or when the caller has seen enough
            for *_, futures in queue:
                [future.cancel() for future in futures if self.threads]

    def _fill(self, slot, indices, draws, rows, views, crop):
        for row in rows:
            image, label = self._load(int(indices[row]))
            slot.labels[row] = label
            for v, view in enumerate(views):
                slot.images[v][row].copy_(crop(image, view, draws[v, row]).permute(1, 2, 0))

    def _load(self, index):
        """Sample `index`, or the next one that can be decoded; stops the run after max_bad bad images."""
        for offset in range(len(self.dataset)):
            try:
                image, label = self.dataset[(index + offset) % len(self.dataset)]
                return (image if isinstance(image, torch.Tensor) else to_tensor(image, self.channels)), label
            except BadImage as error:
                self._report((index + offset) % len(self.dataset), error)
        raise TooManyBad("no image can be decoded")

    def _report(self, index, error):
        with self.lock:
            if index in self.bad:
                return
            self.bad.add(index)
            if len(self.bad) > self.max_bad:
                raise TooManyBad(f"more than --max-bad {self.max_bad} images cannot be decoded, the last: {error}")
            if str(error) not in TOLD:
                TOLD.add(str(error))
                sys.stderr.write(f"warning: cannot decode {error}; its neighbour is used instead\n")


class TooManyBad(Exception):
    """More undecodable images than allowed."""


def _give_up(error):
    print(f"error: {error}", file=sys.stderr, flush=True)  # from whichever process met it
    raise SystemExit(2) from None


def in_memory(dataset):
    """The uint8 array (N, H, W, C) of a dataset that holds its images in memory; None for others."""
    if isinstance(dataset, Subset):
        images = in_memory(dataset.dataset)
        return None if images is None else images[dataset.indices]
    return dataset.images if isinstance(dataset, Arrays) else None


def resident(dataset, device):
    """The images (N, H, W, C) of a set held in memory, on a CUDA device of which they take less than a quarter."""
    images = in_memory(dataset) if device.type == "cuda" else None
    if images is None or 4 * images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return None
    return torch.from_numpy(images).to(device)


def check_gpu_decoder(dataset, device):
    """Ends the program with one line where `--decode gpu` cannot work."""
    if device.type != "cuda":
        fail(f"--decode gpu needs a CUDA device, and this run is on {device.type}: leave the flag out")
    if not isinstance(dataset, Files) or dataset.channels not in MODES or dataset.dtype != torch.uint8:
        fail("--decode gpu: --data names no grey or colour image files of 8 bits: leave the flag out")
    try:
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG")
        decode_jpeg([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device=device)
    except (RuntimeError, TypeError) as error:  # decode_jpeg may be None
        fail(f"--decode gpu: torchvision cannot decode here ({str(error).splitlines()[0]}): leave the flag out")


class _Slot:
    """The buffers of one batch."""

    def __init__(self):
        self.images, self.labels, self.copied = [], None, None

    def prepare(self, n, views, channels, dtype, pinned):
        if self.copied is not None:
            self.copied.synchronize()
        if self.labels is None or len(self.labels) < n:
            shapes = [(n, v.size, v.size, channels) for v in views]
            self.images = [torch.empty(shape, dtype=dtype, pin_memory=pinned) for shape in shapes]
            self.labels = torch.empty(n, dtype=torch.int64, pin_memory=pinned)


def _one_thread():
    """Each loading thread works on its own image: more threads inside an operator would only get in the way."""
    torch.set_num_threads(1)
