"""Images with boxes and masks: sets in Pascal VOC's layout or in COCO's, read, resized and drawn.

VOC: VOC2007/ with the lists trainval and test, beside which VOC2012/ is trained on, too, if it is there. COCO:
annotations/instances_train*.json, instances_val*.json and folders of images named as what follows "instances_". Wrong
contents end the program with one line that names file and value.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import rng
from common.args import fail
from common.crop import crop_resize, fitted
from common.datasets import Files, Subset
from common.distributed import gather, rank, world_size
from common.files import atomic
from common.folders import data_path
from common.images import BadImage
from common.lists import composed
from common.pictures import shorten
from common.process import Threads
from common.voc import find_set, open_images, read_ids, read_objects

COLOURS = ("#ff4b3e", "#2ea3ff", "#2fd566", "#ffc400", "#d86bff", "#00d5d5", "#ff7fb5", "#b4e300")


class Objects(NamedTuple):
    """Those of an image. boxes (n, 4) float64: left, top, right, bottom in pixels, 0 the left edge of the image. labels
    (n,): from 1, 0 is the background. difficult (n,) bool. masks: n masks as `_mask` returns them, or nothing."""

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    masks: list | tuple = ()


class Annotated:
    """Images and their objects. classes: names of labels 1, 2 ... file, ids, categories: of COCO, its file, ids of the
    images and of the classes. sizes: (height, width) of the images, as far as the file has them."""

    labels = None

    def __init__(self, images, objects, classes, file=None, ids=None, categories=None, sizes=None):
        self.images, self.objects, self.classes, self.channels = images, objects, classes, images.channels
        self.file, self.ids, self.categories, self.sizes = file, ids, categories, sizes

    def __len__(self):
        return len(self.objects)

    def __getitem__(self, i):
        return self.images[i]

    def path(self, i):
        return self.images.path(i)

    @property
    def has_masks(self):
        return any(mask is not None for item in self.objects for mask in item.masks)

    def not_empty(self):
        """The images that have objects."""
        rows = [i for i, item in enumerate(self.objects) if len(item.labels)]
        if len(rows) == len(self):
            return self
        if not rows:
            fail(f"{self.file or self.path(0)}: no image of the training set has an object")
        sizes = self.sizes and [self.sizes[i] for i in rows]
        objects, ids = [self.objects[i] for i in rows], self.ids and [self.ids[i] for i in rows]
        return Annotated(Subset(self.images, rows), objects, self.classes, self.file, ids, self.categories, sizes)


# ---------------------------------------------------------------------------------------------------- reading sets
def open_boxes(data, channels=3):
    """Training and test set that --data names, with the same classes."""
    root = data_path(data)
    if (root / "annotations").is_dir():
        return _open_coco(root, channels)
    if not any((folder / "ImageSets").is_dir() for folder in (root, *root.glob("VOC*"))):
        fail(f"--data {data}: neither annotations/ (COCO) nor ImageSets/Main or VOC2007/ImageSets/Main (VOC) there")
    return _open_voc(find_set(data), channels)


def _open_voc(root, channels):
    other, parts = root.parent / "VOC2012", {"trainval": [root], "test": [root]}
    if root.name == "VOC2007" and (other / "ImageSets/Main/trainval.txt").is_file():
        parts["trainval"].append(other)
    found = {}
    for split, folders in parts.items():
        ids = [(folder, i) for folder in folders for i in read_ids(folder, split)]
        images = [open_images(folder, read_ids(folder, split), channels) for folder in folders]
        names = [os.path.relpath(part.path(i), root.parent) for part in images for i in range(len(part))]
        found[split] = Files(root.parent, names, channels=channels), [_voc_objects(*item) for item in ids], ids
    classes = sorted({name for _, objects, _ in found.values() for item in objects for name in item[1]})
    known = {name for item in found["trainval"][1] for name in item[1]}
    for item, (folder, i) in zip(*found["test"][1:], strict=True):
        if odd := sorted({*item[1]} - known):
            fail(f"{folder}/Annotations/{i}.xml: class {odd[0]!r}, which no object of the training set has")
    sets = []
    for images, objects, _ in found.values():
        number = {name: label for label, name in enumerate(classes, 1)}
        filled = [Objects(b, np.array([number[n] for n in names], int), d) for b, names, d in objects]
        sets.append(Annotated(images, filled, classes))
    return sets


def _voc_objects(root, image):
    """(boxes, names, difficult) of an image."""
    objects, path = read_objects(root, image), f"{root}/Annotations/{image}.xml"
    for item in objects:
        left, top, right, bottom = item.box or fail(f"{path}: an object {item.name!r} without bndbox")
        if not (left <= right < math.inf and top <= bottom < math.inf):
            fail(f"{path}: bndbox {left:g} {top:g} {right:g} {bottom:g} has no area")
    boxes = np.array([item.box for item in objects], float).reshape(-1, 4) - (1, 1, 0, 0)  # pixels counted from 0
    return boxes, [item.name for item in objects], np.array([item.difficult for item in objects], bool)


def _open_coco(root, channels):
    sets = []
    for split in ("train", "val"):
        files = sorted((root / "annotations").glob(f"instances_{split}*.json"))
        if not files:
            fail(f"{root}/annotations has no instances_{split}*.json")
        sets.append(_read_coco(files[-1], root / files[-1].stem.removeprefix("instances_"), channels))
    train, val = sets
    if (train.classes, train.categories) != (val.classes, val.categories):
        fail(f"{val.file}: other categories than in {Path(train.file).name}")
    return sets


def _read_coco(path, folder, channels):
    try:
        content = json.loads(path.read_bytes())
        images = sorted(content["images"], key=lambda item: item["id"])
        categories = sorted(content["categories"], key=lambda item: item["id"])
        label = {item["id"]: i for i, item in enumerate(categories, 1)}
        row, classes = {item["id"]: i for i, item in enumerate(images)}, [item["name"] for item in categories]
        names, sizes = [item["file_name"] for item in images], [(item["height"], item["width"]) for item in images]
        annotations = content["annotations"]
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read: {error}")
    except (KeyError, TypeError) as error:
        fail(f"{path} is not one of instances as COCO has them: {type(error).__name__} {error}")
    if len(row) < len(images) or not images or not categories:
        fail(f"{path}: {len(images)} images with {len(row)} ids, {len(categories)} categories")
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    lacking = [name for name in names if name not in there and not (folder / name).is_file()]
    if lacking:
        fail(f"{folder} lacks {len(lacking)} of the {len(names)} images of {path.name}, the first is {lacking[0]}")
    parts = [[] for _ in images]
    for item in annotations:
        where = f"{path}: annotation {item.get('id') if isinstance(item, dict) else item}"
        try:
            image, category, (left, top, width, height) = item["image_id"], item["category_id"], item["bbox"]
        except (KeyError, TypeError, ValueError):
            fail(f"{where} lacks image_id, category_id or bbox of four numbers")
        if image not in row or category not in label:
            known = "image_id" if image not in row else "category_id"
            fail(f"{where}: {known} {item[known]} is not in the file")
        if not (0 <= width < math.inf and 0 <= height < math.inf):
            fail(f"{where}: bbox {item['bbox']} has no area")
        if not item.get("iscrowd"):  # crowds are not learned, and the evaluation has them from the file
            mask = _mask(item.get("segmentation"), sizes[row[image]], where)
            parts[row[image]].append(((left, top, left + width, top + height), label[category], mask))
    objects = []
    for part in parts:
        boxes, masks = np.array([box for box, *_ in part], float).reshape(-1, 4), [mask for *_, mask in part]
        objects.append(Objects(boxes, np.array([i for _, i, _ in part], int), np.zeros(len(part), bool), masks))
    ids, numbers = [item["id"] for item in images], [item["id"] for item in categories]
    return Annotated(Files(folder, names, channels=channels), objects, classes, str(path), ids, numbers, sizes)


def _mask(segmentation, size, where):
    """Polygons as arrays (points, 2), or a dictionary of runs; None where there is nothing."""
    if isinstance(segmentation, dict):
        if tuple(segmentation.get("size", ())) != tuple(size) or "counts" not in segmentation:
            fail(f"{where}: a mask of size {segmentation.get('size')} in an image of {[*size]}")
        return segmentation
    polygons = [p for p in segmentation or () if len(p) >= 6]  # fewer than three points enclose nothing
    if any(len(p) % 2 for p in polygons):
        fail(f"{where}: a polygon of an odd number of coordinates")
    return [np.array(p, np.float32).reshape(-1, 2) for p in polygons] or None


# --------------------------------------------------------------------------------------------------------- masks
def coco_tools():
    """pycocotools' module of masks, or the end of the program."""
    try:
        from pycocotools import mask
    except ImportError:
        fail("sets in COCO's format need pycocotools: pip install pycocotools")
    return mask


def draw_masks(masks, size, old, flip=False):
    """Masks as `Objects` has them, of an image of old (height, width) -> uint8 (n, *size), mirrored if asked for."""
    tools, (height, width), drawn = coco_tools(), size, []
    for mask in masks:
        if isinstance(mask, dict):
            runs = tools.frPyObjects(mask, *old) if isinstance(mask["counts"], list) else mask
            picture = Image.fromarray(tools.decode(runs)).resize((width, height), Image.Resampling.NEAREST)
            picture = np.asarray(picture)
            drawn.append(picture[:, ::-1] if flip else picture)
        else:
            scaled = [p * (width / old[1], height / old[0]) for p in mask]
            scaled = [p * (-1, 1) + (width, 0) for p in scaled] if flip else scaled
            drawn.append(tools.decode(tools.merge(tools.frPyObjects([p.ravel().tolist() for p in scaled], *size))))
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, *size, dtype=torch.uint8)


def encode_mask(mask):
    """(H, W) bool -> COCO's compressed runs, which JSON can hold."""
    runs = coco_tools().encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return runs | {"counts": runs["counts"].decode()}


# --------------------------------------------------------------------------------------------------- one image
def prepare(data, i, short, longest, flip=False, masks=False):
    """Image i resized, uint8 (C, h, w), its size in the file, and its objects at the new size as tensors: boxes (n, 4),
    labels (n,) and masks (n, h, w). Boxes are clipped at the edges of the image; what has no area then is left out."""
    image, _ = data[i]
    old, objects = tuple(image.shape[1:]), data.objects[i]
    if data.sizes and tuple(data.sizes[i]) != old:
        raise BadImage(f"{data.path(i)}: {old[0]} x {old[1]} pixels, its annotation says {[*data.sizes[i]]}")
    height, width = size = fitted(*old, short, longest)
    image = crop_resize(image, (0, 0, *old), size)
    boxes = objects.boxes * ([width / old[1], height / old[0]] * 2)
    boxes = boxes.clip(0, [width, height, width, height])
    if flip:
        image, boxes = image.flip(2), np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    kept = (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(1)
    if masks:
        kept &= np.array([mask is not None for mask in objects.masks], bool)
    target = {"boxes": torch.from_numpy(boxes[kept]).float(), "labels": torch.from_numpy(objects.labels[kept])}
    if masks:
        target["masks"] = draw_masks([objects.masks[k] for k in np.flatnonzero(kept)], size, old, flip)
    return image, old, target


# ------------------------------------------------------------------------------------------------------- loading
def jobs(work, items, workers, ahead=4):
    """Yields [work(part) for part in item] of each item, in their order; threads do it ahead of time."""
    items = iter(items)
    pool = Threads(lambda number, parts, draws, rows: [work(parts[row]) for row in rows], workers)
    waiting = sum(pool.submit(0, item, None) is None for item in itertools.islice(items, ahead))
    try:
        while waiting:
            found = pool.result()
            waiting += sum(pool.submit(0, item, None) is None for item in itertools.islice(items, 1)) - 1
            yield found
    except BadImage as error:  # on whichever process: without the image its objects would count as missed
        print(f"error: cannot decode {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        pool.drop()


def padded(images, size, view, device, dtype):
    """uint8 images (C, h, w) -> (B, C, H, W), normalised, in one corner of zeros up to multiples of 32 pixels."""
    std, mean = (torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1) for values in (view.std, view.mean))
    x = torch.zeros(len(images), len(mean), *(-(-side // 32) * 32 for side in size), dtype=dtype, device=device)
    for row, image in zip(x, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = (image.to(device, dtype, non_blocking=True) / 255 - mean) / std
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


@dataclasses.dataclass
class Batch:
    """A micro-batch of one process. images, targets: as `prepare` returns them. seeds: one per image, for what else is
    drawn of it. specs: the view, which has the mean and std of the images."""

    images: list
    targets: list
    seeds: list
    indices: torch.Tensor
    specs: list
    device: torch.device
    dtype: torch.dtype

    def tensors(self):
        """Images (B, C, H, W) of the largest size of all processes (a collective), their own sizes, and targets."""
        sizes = [tuple(image.shape[1:]) for image in self.images]
        largest = gather(torch.from_numpy(np.max(sizes, 0, keepdims=True)).to(self.device)).amax(0).tolist()
        x = padded(self.images, largest, self.specs[0], self.device, self.dtype)
        targets = [{k: v.to(self.device) for k, v in target.items()} for target in self.targets]
        return x, sizes, [t | {"boxes": t["boxes"].to(self.dtype)} for t in targets]

    def views(self):
        """The images with their boxes drawn in, for a picture."""
        sizes = [tuple(image.shape[1:]) for image in self.images]  # not of all processes: the main one alone draws
        x = padded(self.images, np.max(sizes, 0).tolist(), self.specs[0], self.device, self.dtype)
        for image, (height, width), target in zip(x, sizes, self.targets, strict=True):
            for left, top, right, bottom in target["boxes"].long().tolist():
                right, bottom = min(right, width - 1), min(bottom, height - 1)
                image[:, top : bottom + 1, [left, right]] = image[:, [top, bottom], left : right + 1] = 3.0
        return [x]


class Loader:
    """Micro-batches as those of common/loader.py, of images of any size. What is random belongs to the image."""

    def __init__(self, data, args, view, device, dtype):
        self.data, self.args, self.waited = data, args, 0.0
        self.rest = {"specs": [view], "device": device, "dtype": dtype}
        self.local, self.epoch_steps = args.batch_size // (world_size() * args.accum), len(data) // args.batch_size

    def epoch(self, epoch, start=0, order=None):
        args = self.args
        order = rng.permutation(args.seed, epoch, len(self.data)) if order is None else order
        own = [(micro * world_size() + rank()) * self.local for micro in range(args.accum)]
        firsts = [step * args.batch_size + i for step in range(start, len(order) // args.batch_size) for i in own]
        parts = [order[first : first + self.local] for first in firsts]

        def plan(part):
            sizes = [args.sizes[int(u * len(args.sizes))] for u in self._uniforms(epoch, part, 0)]
            flips = [bool(u < args.flip) for u in self._uniforms(epoch, part, 1)]
            return [*zip(part.tolist(), sizes, flips, strict=True)]

        def work(item):
            return prepare(self.data, item[0], item[1], args.max_side, item[2], args.masks)

        loaded = jobs(work, map(plan, parts), args.workers)
        with contextlib.closing(loaded):
            for part in parts:
                clock = time.perf_counter()
                images, _, targets = zip(*next(loaded), strict=True)
                self.waited += time.perf_counter() - clock
                seeds = (self._uniforms(epoch, part, 2) * 2**53).astype(int).tolist()
                yield Batch(images, targets, seeds, torch.from_numpy(part), **self.rest)

    def _uniforms(self, epoch, part, column):
        return rng.uniforms(self.args.seed, epoch, part, rng.VIEWS, 3)[:, column]


# ------------------------------------------------------------------------------------------------------ pictures
def save_pairs(path, pairs, classes, headings=("truth", "found"), side=320):
    """PNG of images twice, with two sets of objects. pairs: (image uint8 (C, H, W), two lists of (box, label, mask
    (H, W) or None, text))."""
    font, rows = ImageFont.load_default(12), []
    for image, *sets in pairs:
        height, width = image.shape[1:]
        scale = side / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = image[: 3 if len(image) > 2 else 1].permute(1, 2, 0).expand(-1, -1, 3).numpy()
        for objects in sets:
            painted = pixels.astype(np.float32)
            for _, label, mask, _ in objects:
                if mask is not None:
                    colour = np.array(bytearray.fromhex(COLOURS[(label - 1) % len(COLOURS)][1:]), np.float32)
                    painted[np.asarray(mask, bool)] *= 0.5
                    painted[np.asarray(mask, bool)] += 0.5 * colour
            picture = Image.fromarray(painted.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
            draw = ImageDraw.Draw(picture)
            for box, label, _, text in objects:
                colour, corners = COLOURS[(label - 1) % len(COLOURS)], [float(v) * scale for v in box]
                draw.rectangle(corners, outline=colour, width=2)
                if text:
                    draw.text((corners[0] + 3, corners[1] + 1), text, colour, font)
            rows.append(picture)
    columns = 4 if len(pairs) > 1 else 2
    lines = [rows[i : i + columns] for i in range(0, len(rows), columns)]
    heights = [max(p.height for p in line) + 6 for line in lines]
    legend = "   ".join(f"{name}" for name in classes[: len(COLOURS)])
    canvas = Image.new("RGB", (columns * (side + 6), 40 + sum(heights)), "white")
    draw, top, left = ImageDraw.Draw(canvas), 20, 4
    for column in range(columns):
        draw.text(((column + 0.5) * (side + 6), 3), headings[column % 2], "black", font, anchor="ma")
    for line, height in zip(lines, heights, strict=True):
        for column, picture in enumerate(line):
            canvas.paste(picture, (column * (side + 6), top))
        top += height
    for label, name in enumerate(classes[: len(COLOURS)] if legend else ()):
        text = shorten(composed(name), font, 150)
        draw.rectangle((left, top + 3, left + 10, top + 13), COLOURS[label])
        draw.text((left + 14, top + 1), text, "black", font)
        left += 30 + round(font.getlength(text))
    with atomic(path) as temporary:
        canvas.save(temporary)
