"""The classes of new images, by a network with the classifier that an evaluation has trained.

    python eval_finetune.py --pretrained runs/mae/backbone.pt --data /photos        # writes runs/mae/finetune.pt
    python eval_linear.py --pretrained runs/simsiam/backbone.pt --data /photos      # writes runs/simsiam/linear.pt
    python predict.py --pretrained runs/simsiam/linear.pt --data /new/photos
    python predict.py --pretrained runs/simsiam/linear.pt --data photo.jpg --topk 3

Written to --out, predictions/ beside the file by default:
    predictions.csv  a row per image: its path, the --topk most probable classes with their probabilities, and the true
                     class where it is known; an image that cannot be decoded has no class
    predictions.png  some of the images, evenly spaced, with their two most probable classes, green where the first is
                     right and red where it is not

Images are seen as in the evaluation, and the probabilities are the softmax of its outputs: how sure the network is, not
how often it is right. They sum to 1 whatever an image shows; of things that are no class it knows nothing.
"""

import common.interrupt  # noqa: F401 (before torch)
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from common.args import Parser, at_least, fail, positive
from common.classes import class_names
from common.classifier import load_classifier, predict
from common.datasets import Files, open_split
from common.distributed import end_processes, is_main, print0
from common.files import atomic, make_folder, result_folder
from common.images import EXTENSIONS, survey
from common.optim import or_precise, precision
from common.pictures import original, shorten
from common.run import start_device

GREEN, RED, GREY = "#1a9641", "#d7191c", "#666666"
COLUMNS, TILE, GAP = 6, 176, 20  # of the picture
LINES = 20  # images whose classes are printed


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_pretrained()
    group = parser.add_argument_group("predictions")
    group.add_argument("--split", choices=["train", "val"], help="default: val, or all images of an undivided folder")
    group.add_argument("--topk", type=positive(int), default=5, help="classes per image")
    group.add_argument("--pictures", type=at_least(0), default=24, help="images in predictions.png (0: none)")
    group.add_argument("--batch-size", type=positive(int), default=256, help="images per process and forward pass")
    return parser.parse_args(argv)


def write_table(path, rows, k):
    """rows: (path, [(class, probability), ...], true class or None)."""
    columns = [f"{name}_{i + 1}" if i else name for i in range(k) for name in ("class", "probability")]
    true = ["true class"] if any(row[2] is not None for row in rows) else []
    text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with atomic(path) as temporary, open(temporary, "w", **text) as file:
        writer = csv.writer(file)
        writer.writerow(["path", *columns, *true])
        for image, found, truth in rows:
            cells = [cell for name, p in found for cell in (name, f"{p:.6g}")]
            writer.writerow([image, *cells, *[""] * (2 * (k - len(found))), *[truth or ""] * len(true)])


def draw(path, dataset, view, shown, rows, title):
    """The images `shown` (numbers) with their two most probable classes."""
    bold, small = ImageFont.load_default(17), ImageFont.load_default(13)
    columns, line = min(COLUMNS, len(shown)), TILE + 72
    width = max(columns * (TILE + GAP) + GAP, 520)
    canvas = Image.new("RGB", (width, 56 + -(-len(shown) // columns) * line), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, 16), shorten(title, bold, width - 2 * GAP), "black", bold)
    for place, i in enumerate(shown):
        x, y = GAP + place % columns * (TILE + GAP), 56 + place // columns * line
        image, (name, found, truth) = to_pil_image(original(dataset, i, TILE, view)), rows[i]
        canvas.paste(image, (x + (TILE - image.width) // 2, y + (TILE - image.height) // 2))
        ink = "black" if truth is None else GREEN if truth == found[0][0] else RED
        for row, (text, p) in enumerate(found[:2]):
            font, number = (bold, small)[row], f"{100 * p:.0f} %"
            right = font.getlength(number)
            pen.text((x, y + TILE + 4 + 22 * row), shorten(text, font, TILE - right - 6), (ink, GREY)[row], font)
            pen.text((x + TILE - right, y + TILE + 4 + 22 * row), number, (ink, GREY)[row], font)
        pen.text((x, y + TILE + 44), shorten("/".join(Path(name).parts[-2:]), small, TILE, tail=14), GREY, small)
    with atomic(path) as temporary:
        canvas.save(temporary)


def main(args):
    device = start_device(args)
    model, view, classes, meta = load_classifier(args)
    amp, _, dtype = precision(args.precision, device)
    model = model.to(device, dtype, memory_format=torch.channels_last)
    photo = Path(args.data)
    if photo.is_file() and photo.name.lower().endswith(EXTENSIONS):
        dataset = Files(photo.parent, [photo.name], channels=meta["channels"])
        survey(dataset)
    else:
        dataset = open_split(args, meta["channels"])
    print0(f"data        {args.data}: {len(dataset):,} images")
    out = make_folder(args.out or result_folder(args.pretrained) / "predictions")
    p = predict(model, dataset, view, args.batch_size, device, args.workers, amp)
    end_processes()
    if not np.isfinite(p).all():
        cause = f"its weights or an image are damaged{or_precise(amp)}"
        fail(f"--pretrained {args.pretrained}: some outputs are not finite: {cause}")
    if not is_main():
        return
    k, names = min(args.topk, len(classes)), class_names(dataset)
    best = np.argsort(-p, axis=1, kind="stable")[:, : max(k, 2)]
    rows = []
    for i in range(len(dataset)):
        found = [(classes[c], float(p[i, c])) for c in best[i]] if i not in dataset.undecodable else []
        rows.append((dataset.path(i), found, names and names[int(dataset.labels[i])]))
    for image, found, _ in rows[:LINES]:
        print(f"{image}: " + (", ".join(f"{name} {100 * q:.1f} %" for name, q in found[:k]) or "cannot be decoded"))
    if len(rows) > LINES:
        print(f"... and {len(rows) - LINES:,} more")
    known = [(found[0][0], true) for _, found, true in rows if found and true in classes]
    if known:
        right = sum(name == true for name, true in known)
        print(f"top-1       {100 * right / len(known):.2f} % of the {len(known):,} images whose class is known")
    write_table(out / "predictions.csv", [(image, found[:k], true) for image, found, true in rows], k)
    print(f"{out / 'predictions.csv'}: {len(rows):,} rows")
    if args.pictures:
        some = np.flatnonzero([bool(found) for _, found, _ in rows])
        shown = some[np.linspace(0, len(some) - 1, min(len(some), args.pictures)).round().astype(int)].tolist()
        title = f"{len(shown)} of {len(rows):,} images in {args.data}"
        draw(out / "predictions.png", dataset, view, shown, rows, title)
        print(f"{out / 'predictions.png'}: {len(shown)} images")


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
