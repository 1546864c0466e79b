"""Images with a class for each of their pixels: Cityscapes, VOC2012 and other sets in its layout; pictures of masks.

A mask that cannot be used ends the program with one line that names the file and what is wrong.
"""

import collections
import concurrent.futures
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.args import fail
from common.datasets import Files
from common.distributed import print0
from common.lists import read_text, split_lines
from common.pictures import save_captioned
from common.voc import find_set, open_images, read_ids

IGNORED, PADDING = 255, 254  # labels of pixels that do not count; the second one of what an augmentation adds
VOC_CLASSES = "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike"
VOC_CLASSES = f"{VOC_CLASSES} person pottedplant sheep sofa train tvmonitor".split()
CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # those that are evaluated
CITY_CLASSES = "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider"
CITY_CLASSES = f"{CITY_CLASSES},car,truck,bus,train,motorcycle,bicycle".split(",")


class BadMask(Exception):
    """A mask that cannot be used; the text names the file and what is wrong."""


class Pairs:
    """Images and their masks as one: uint8 (channels + 1, H, W), the class of each pixel last.

    images: Files. masks: a path each. table: (256,) int16, what a number in a mask means, -1 for one that is wrong."""

    labels, dtype = None, torch.uint8

    def __init__(self, images, masks, classes, table):
        self.images, self.masks, self.classes, self.table = images, masks, classes, table
        self.channels, self.path = images.channels + 1, images.path

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, mask = self.images[i][0], torch.from_numpy(read_mask(self.masks[i], self.table))
        if image.shape[1:] != mask.shape:
            sizes = (f"{shape[1]} x {shape[0]}" for shape in (mask.shape, image.shape[1:]))
            raise BadMask("{}: the mask has {} pixels, its image {}".format(self.masks[i], *sizes))
        return torch.cat([image, mask[None]]), -1


def read_mask(path, table):
    """The classes of the pixels of a mask, uint8 (H, W)."""
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.array(image) + 0  # of black and white ones, numbers
    except Exception as error:  # of a dozen kinds
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise BadMask(f"{path}: {reason}") from None
    if mode not in ("1", "P", "L", "I", "I;16"):
        raise BadMask(f"{path}: holds colours ({mode}), expected numbers of classes: a palette or a grey PNG")
    known = table[mask.clip(0, 255)]
    wrong = (known < 0) | (mask != mask.clip(0, 255))
    if wrong.any():
        allowed = np.flatnonzero(table >= 0)
        last = allowed[allowed < IGNORED][-1]
        raise BadMask(f"{path}: label {mask[wrong][0]}, expected 0 to {last}, or {IGNORED} where nothing counts")
    return known.astype(np.uint8)


def open_cityscapes(root, split, channels):
    """A split of Cityscapes, images by name."""
    folder, end = root / "leftImg8bit" / split, "_leftImg8bit.png"
    names = sorted(str(path.relative_to(folder)) for path in folder.glob(f"*/*{end}"))
    if not names:
        fail(f"{folder} holds no <city>/*{end}")
    masks = [root / "gtFine" / split / f"{name.removesuffix(end)}_gtFine_labelIds.png" for name in names]
    table = np.full(256, -1, np.int16)
    table[:34] = table[IGNORED] = IGNORED
    table[list(CITY_IDS)] = np.arange(len(CITY_IDS))
    return Pairs(Files(folder, names, channels=channels), present(masks), CITY_CLASSES, table)


def open_voc(root, splits, channels, classes=None, but=()):
    """Lists of a set in VOC's layout as one, without the ids of `but`. classes: a file, or None for the set's own."""
    ids = list(dict.fromkeys(i for split in splits for i in read_ids(root, split, "Segmentation")))
    but = set(but)
    kept, named = [i for i in ids if i not in but], ", ".join(splits)
    if not kept:
        fail(f"--train-split: all images of {named} are test images; name the list to train on them")
    if len(kept) < len(ids):
        print0(f"note        {len(ids) - len(kept)} images of {named} are test images and left out")
    file = Path(classes) if classes else root / "classes.txt"
    if file.is_file():
        names = [line.strip() for line in split_lines(read_text(file, file)) if line.strip()]
    elif classes or not root.name.startswith("VOC20"):
        fail(f"--classes: {file} does not exist; it has the name of a class per line, in the order of their numbers")
    else:
        names = VOC_CLASSES
    if not 2 <= len(set(names)) == len(names) <= PADDING:
        fail(f"--classes: {file} names {len(names)} classes, expected 2 to {PADDING}, none of them twice")
    table = np.full(256, -1, np.int16)
    table[: len(names)], table[IGNORED] = np.arange(len(names)), IGNORED
    folders = [root / name for name in ("SegmentationClass", "SegmentationClassAug")]
    there = [{path.stem for path in folder.glob("*.png")} for folder in folders]
    masks = [folders[i not in there[0] and i in there[1]] / f"{i}.png" for i in kept]
    return Pairs(open_images(root, kept, channels), present(masks), names, table)


def present(masks):
    """The paths of masks, all of which must exist."""
    listed = {folder: {path.name for path in folder.glob("*.png")} for folder in {mask.parent for mask in masks}}
    missing = [mask for mask in masks if mask.name not in listed[mask.parent]]
    if missing:
        fail(f"{len(missing)} of {len(masks)} masks are missing, the first is {missing[0]}")
    return masks


def is_cityscapes(data):
    """Does --data name a folder in the layout of Cityscapes?"""
    return (Path(data) / "leftImg8bit").is_dir()


def open_pairs(data, train_split=None, val_split="val", channels=3, classes=None):
    """Training and test set. train_split None: "train"; of VOC's layout trainaug, or train and aug, if they are there,
    without test images. classes: see `open_voc`. Some masks are looked at, so that what all have wrong shows at once.
    """
    if is_cityscapes(data):
        root = Path(data)
        data, test = (open_cityscapes(root, split, channels) for split in (train_split or "train", val_split))
    else:
        root = find_set(data, "Segmentation", "VOC2012")
        lists = {path.stem for path in (root / "ImageSets/Segmentation").glob("*.txt")}
        usual = ["trainaug"] if "trainaug" in lists else ["train", *{"aug"} & lists]
        test = open_voc(root, [val_split], channels, classes)
        ids = [mask.stem for mask in test.masks]
        data = open_voc(root, [train_split] if train_split else usual, channels, classes, () if train_split else ids)
    for part in (data, test):
        for i in sorted({len(part) * k // 4 for k in range(4)} & {*range(len(part))}):
            read_mask(part.masks[i], part.table)
    return data, test


def read_ahead(data, indices, workers):
    """The samples of a set in this order, some of them read in threads before they are asked for."""
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = collections.deque()
        for i in indices:
            waiting.append(pool.submit(data.__getitem__, i))
            if len(waiting) > max(1, workers):
                yield waiting.popleft().result()[0]
        while waiting:
            yield waiting.popleft().result()[0]


def sample(image, size, top=0, left=0, rows=None, columns=None):
    """A part of an image (C, H, W) resized to `size`, bilinear, without antialiasing: no more than it is computed.
    uint8 (C, rows, columns)."""
    places = []
    for start, count, old, new in zip((top, left), (rows, columns), image.shape[1:], size, strict=True):
        at = torch.arange(start, start + (new if count is None else count), dtype=torch.float64)
        places.append(((at + 0.5) * (old / new) - 0.5).clamp(0, old - 1))
    first, last = int(places[1][0]), int(places[1][-1]) + 2
    image, places[1] = image[:, :, first:last], places[1] - first
    for dim, place in enumerate(places, 1):
        low = place.long()
        high, weight = (low + 1).clamp(max=image.shape[dim] - 1), (place - low).float()
        parts = [image.index_select(dim, index).float() for index in (low, high)]
        image = torch.lerp(*parts, weight[:, None] if dim == 1 else weight)
    return image.round_().to(torch.uint8)


def nearest(mask, size, top, left, rows, columns):
    """The same of a mask (H, W), where the value of a pixel is that of the nearest one."""
    places = [
        (torch.arange(start, start + count) * old).div(new, rounding_mode="floor")
        for start, count, old, new in zip((top, left), (rows, columns), mask.shape, size, strict=True)
    ]
    return mask[places[0]][:, places[1]]


def palette():
    """The colours of VOC's masks: uint8 (256, 3)."""
    n, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((n >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    colours[IGNORED] = 255
    return colours


def save_masks(path, rows, names, width=224):
    """PNG of images (C, H, W), their truth and what is predicted (H, W), in colours over the image; white where nothing
    counts."""
    colours, cells = palette(), []
    for image, *masks in rows:
        photo = np.broadcast_to(image[:3] if len(image) >= 3 else image[:1], (3, *image.shape[1:])).transpose(1, 2, 0)
        size = width, max(1, round(width * photo.shape[0] / photo.shape[1]))
        mixed = [photo, *((0.35 * photo + 0.65 * colours[mask]).astype(np.uint8) for mask in masks)]
        cells += [Image.fromarray(np.ascontiguousarray(cell)).resize(size) for cell in mixed]
    columns, height = min(6, len(cells)), max(cell.height for cell in cells) + 4
    per, font = columns * (width + 4) // 150, ImageFont.load_default(13)
    top = -(-len(cells) // columns) * height
    canvas = Image.new("RGB", (columns * (width + 4), top + 20 * -(-len(names) // per)), "white")
    for i, cell in enumerate(cells):
        canvas.paste(cell, (i % columns * (width + 4), i // columns * height))
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(names):
        x, y = i % per * 150 + 2, top + i // per * 20
        draw.rectangle((x, y + 2, x + 14, y + 16), tuple(colours[i].tolist()), "black")
        draw.text((x + 20, y + 1), name[:18], "black", font)
    save_captioned(path, canvas, ["image", "truth", "predicted"] * (columns // 3))
