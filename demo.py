"""Three minutes on a laptop: pre-trains SimCLR on scikit-learn's 1,797 handwritten digits without their labels, then
compares the features with raw pixels and with those of a random network, in a table and a picture.

    python demo.py            # or: make demo

Everything lands in runs/demo: the run folder of simclr.py, table.json and demo.png.
"""

import common.interrupt  # noqa: F401 (before torch)
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import simclr
from common.args import Parser, at_least
from common.augment import EvalView
from common.checkpoint import load_backbone
from common.datasets import open_dataset
from common.features import extract
from common.knn import knn, nearest
from common.loader import Loader
from eval_knn import Pixels, pixel_view

OUT = Path("runs/demo")
SIZE = 16
TRAIN = f"--data digits --image-size {SIZE} --arch resnet18 --width 0.25 --flip 0 --crop-min 0.3 --batch-size 128"
TRAIN += " --lr 1 --lr-rule sqrt --warmup-epochs 2 --temperature 0.25 --color-strength 0.5 --workers 2"
TRAIN += f" --log-every 55 --knn-every 30 --out {OUT}"


def parse_args(argv=None):
    parser = Parser(__doc__)
    text = "of pre-training; 60 take about two minutes on two cores"
    parser.add_argument("--epochs", type=at_least(3), default=60, help=text)
    return parser.parse_args(argv)


def few_labels(train, labels, test, targets, shots, draws=50):
    """Accuracy in percent with `shots` labelled images per class: nearest class mean of the normalised features,
    averaged over `draws` random choices of the labelled images (the same choices for every representation)."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes = int(labels.max()) + 1
    accuracy = []
    for draw in range(draws):
        rng = np.random.default_rng([shots, draw])
        means = []
        for c in range(classes):
            rows = torch.from_numpy(rng.choice(np.flatnonzero(labels.numpy() == c), shots, replace=False))
            means.append(train[rows].mean(0))
        prediction = (test @ F.normalize(torch.stack(means), dim=1).T).argmax(1)
        accuracy.append((prediction == targets).float().mean().item() * 100)
    return float(np.mean(accuracy))


def picture(path, views, test, neighbours, test_labels, train_labels):
    """views: list of (n, 3, S, S); test (m, 3, S, S); neighbours: {title: ((m, k, 3, S, S), indices (m, k))}."""
    tile, gap, margin, head = 48, 4, 16, 26
    step, font = tile + gap, ImageFont.load_default(15)

    def image(x):
        array = (x.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        return Image.fromarray(array).resize((tile, tile), Image.Resampling.NEAREST)

    k = next(iter(neighbours.values()))[1].shape[1]
    block = k * step + 2 * margin
    width = margin + step + margin + block * len(neighbours)
    top = margin + head + len(views) * step + margin
    height = top + head + len(test) * step + margin
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), "What the network learns to find alike: two views of each digit", "black", font)
    for row, view in enumerate(views):
        for column, x in enumerate(view[: (width - 2 * margin) // step]):
            canvas.paste(image(x), (margin + column * step, margin + head + row * step))
    draw.text((margin, top), "test", "black", font)
    for row, x in enumerate(test):
        canvas.paste(image(x), (margin, top + head + row * step))
    for part, (title, (images, indices)) in enumerate(neighbours.items()):
        left = margin + step + margin + part * block
        wrong = train_labels[indices] != test_labels[:, None]
        text = f"nearest training digits, {title}: {int(wrong.sum())} of {wrong.numel()} of another class"
        draw.text((left, top), text, "black", font)
        for row in range(len(test)):
            for column in range(k):
                x, y = left + column * step, top + head + row * step
                canvas.paste(image(images[row, column]), (x, y))
                if wrong[row, column]:
                    draw.rectangle((x - 2, y - 2, x + tile + 1, y + tile + 1), outline="red", width=3)
    canvas.save(path)


def main(args):
    torch.set_num_threads(1)  # layers this narrow gain little from a second thread, and lose much on a busy machine
    simclr.main(simclr.parse_args([*TRAIN.split(), "--epochs", str(args.epochs), "--no-resume"]))

    view = EvalView(SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    train, test = open_dataset("digits", "train"), open_dataset("digits", "val")
    trained, _ = load_backbone(OUT / "backbone.pt")
    random, _ = load_backbone("random", "resnet18", 0.25, SIZE)
    table, features = {}, {}
    networks = {"raw pixels": Pixels(SIZE), "random initialisation": random, "trained": trained}
    for name, network in networks.items():
        seen = pixel_view(SIZE) if name == "raw pixels" else view
        (bank, labels), (queries, targets) = (extract(network, d, seen, "cpu", workers=2) for d in (train, test))
        features[name] = bank, queries
        table[name] = {
            "k-NN (k=20)": knn(bank, labels, queries, targets)[20][0],
            "1 label per class": few_labels(bank, labels, queries, targets, 1),
            "5 labels per class": few_labels(bank, labels, queries, targets, 5),
        }

    shown = torch.tensor([int((targets == digit).nonzero()[1]) for digit in range(10)])
    images = [extract(Pixels(SIZE), d, view, "cpu", workers=2)[0].view(-1, 3, SIZE, SIZE) for d in (train, test)]
    neighbours = {}
    for name in list(features)[1:]:
        bank, queries = features[name]
        _, indices = nearest(queries[shown], bank, 9)
        neighbours[name] = images[0][indices], indices
    loader = Loader(train, simclr.augmentation(SIZE, 0.3, 0.0, 0.5), 20, workers=0)
    views = next(loader.epoch(0)).views()
    picture(OUT / "demo.png", views, images[1][shown], neighbours, targets[shown], labels)

    (OUT / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    columns = list(next(iter(table.values())))
    print(f"\n{'accuracy on 359 test digits, %':<32}" + "".join(f"{c:>20}" for c in columns))
    for name, row in table.items():
        print(f"{name:<32}" + "".join(f"{row[c]:>20.1f}" for c in columns))
    print(f"\npicture: {OUT / 'demo.png'}")
    return table


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
