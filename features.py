"""Features of all images of a data set as a NumPy file, and two pictures of what they hold alike.

    python features.py --pretrained runs/simsiam/backbone.pt --data /imagenet
    torchrun --nproc_per_node=8 features.py --pretrained runs/simsiam/backbone.pt --data /imagenet --split train --fp16
    python features.py --pretrained random --arch resnet18 --data digits --split train --tsne --neighbours

Written to --out, features/ beside the checkpoint by default:
    features.npy    (N, D) in the order of the data set, float32 (--fp16: half), written as it is computed: it may be
                    larger than memory. With several --features a file each: features_feat4.npy, features_feat5.npy
    paths.txt       the path of each row, one per line (a line break in a name is written as a backslash and n)
    labels.npy      (N,) int64, where there are labels
    tsne.png        --tsne: the plane of t-SNE (van der Maaten and Hinton 2008), a colour per class; tsne.npz: points
    neighbours.png  --neighbours: some images and those most similar to them (cosine), framed green where the classes
                    are the same and red where not

Images are seen as in the other evaluations: shorter side to 256, central 224 x 224 pixels (images of at most 64 pixels:
no margin). Where one cannot be decoded, a warning names it, and its row holds the features of its neighbour. The rows
do not depend on the number of processes.

t-SNE runs on the features as they are, after a PCA to 50 dimensions where there are more, from a random start with
perplexity 30, early exaggeration 12, learning rate 200 and 1000 iterations. It shows at most 2000 images, evenly spaced
over those of the first 20 classes.
"""

import contextlib
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common.augment import EvalView, center_crop
from common.checkpoint import load_backbone
from common.data import BadImage, build, default_size, eval_batches, eval_share, to_tensor
from common.distributed import any_process, barrier, finish, init, is_main, print0
from common.knn import Features, nearest
from common.log import Parser, check_args, fail, rgb
from common.optim import precision

COLOURS = """#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #17becf #bcbd22 #3b3b3b
#3c1ea5 #960069 #00f0a5 #005a00 #a5b4ff #d2a596 #5a8778 #78000f #6978ff #877800""".split()
GREY, GREEN, RED = "#666666", "#1a9641", "#d7191c"


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--pretrained", required=True, help="backbone.pt, last.pt, a published file, or random")
    parser.add_argument("--data", required=True, help="folder of images, or of train/ and val/, or digits ...")
    parser.add_argument("--train-list", help="list file of training images, 'relative/path[ label]' per line")
    parser.add_argument("--val-list", help="list file of test images")
    parser.add_argument("--split", choices=["train", "val"], help="default: val, or all images of an undivided folder")
    parser.add_argument("--features", nargs="+", help="feat1 ... feat5, or cls and mean (default: the pooled output)")
    parser.add_argument("--fp16", action="store_true", help="store half floats")
    parser.add_argument("--trust-pickle", action="store_true", help="allow --pretrained to run code while it is read")
    parser.add_argument("--arch", help="of a random initialisation (default: resnet50); a file tells it")
    parser.add_argument("--width", type=float, help="of a random initialisation (default: 1); a file tells it")
    parser.add_argument("--channels", type=int, help="of a random initialisation (default: 3); a file tells it")
    parser.add_argument("--image-size", type=int, help="default: that of the file, else what fits the data")
    parser.add_argument("--batch-size", type=int, default=256, help="images per process and forward pass")
    parser.add_argument("--workers", type=int, default=8, help="loading threads per process")
    parser.add_argument("--seed", type=int, default=0, help="of the random initialisation and of t-SNE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16", "fp64"], default="auto")
    parser.add_argument("--out", help="folder (default: features/ beside the checkpoint, or in runs/random)")
    group = parser.add_argument_group("pictures")
    group.add_argument("--tsne", action="store_true", help="draw tsne.png")
    group.add_argument("--points", type=int, default=2000, help="images in it, at most")
    group.add_argument("--perplexity", type=float, help="default: 30, less for fewer than 91 images")
    group.add_argument("--neighbours", action="store_true", help="draw neighbours.png")
    group.add_argument("--queries", type=int, default=10, help="rows of it")
    group.add_argument("--k", type=int, default=8, help="neighbours in a row")
    args = parser.parse_args(argv)
    if min(args.k, args.queries) < 1 or (args.perplexity or 1) <= 0 or args.points < 5:
        parser.error("--k and --queries must be at least 1, --perplexity greater than 0, --points at least 5")
    return args


# --------------------------------------------------------------------------------------------------- features
def temporary(path):
    return path.with_name(f"{path.stem}.tmp{path.suffix}")


@torch.no_grad()
def write_features(files, model, dataset, view, device, args, amp):
    """Fills one .npy file (N, d) per feature of `model` (Features). Each process writes the rows of its share."""
    model.eval()
    kind, storage = (np.dtype("f2"), torch.float16) if args.fp16 else (np.dtype("f4"), torch.float32)
    needed, free = len(dataset) * model.dim * kind.itemsize, shutil.disk_usage(files[0].parent).free
    if needed > free:
        fail(f"--out {files[0].parent}: {needed / 1e9:.1f} GB of features, {free / 1e9:.1f} GB free; try --fp16")
    shapes = [(len(dataset), d) for d in model.dims]
    if is_main():
        for file, shape in zip(files, shapes, strict=True):
            np.lib.format.open_memmap(temporary(file), "w+", kind, shape).flush()
    barrier()
    arrays = [np.lib.format.open_memmap(temporary(file), "r+") for file in files]
    first, last = eval_share(len(dataset), args.batch_size)
    dtype, overflow = next(model.parameters()).dtype, False
    batches = eval_batches(dataset, view, args.batch_size, device, args.workers, dtype)
    bar = tqdm(total=last - first, unit="image", leave=False, disable=not (is_main() and sys.stderr.isatty()))
    for x, _, rows in batches:
        with amp or contextlib.nullcontext():
            features = model(x).to(storage)
        overflow |= not torch.isfinite(features).all()
        for array, part in zip(arrays, features.cpu().split(model.dims, 1), strict=True):
            array[rows[0] : rows[-1] + 1] = part.numpy()
        bar.update(len(rows))
    bar.close()
    for array in arrays:
        array.flush()
    if any_process(overflow, device):  # here every process waits for the others
        for file in files:
            temporary(file).unlink(missing_ok=True)
        remedy = "leave --fp16 out" if args.fp16 else "try --precision fp32"
        fail(f"--pretrained {args.pretrained}: some features overflow; {remedy}")
    if is_main():
        for file, shape in zip(files, shapes, strict=True):
            temporary(file).replace(file)
            print0(f"{file}: {shape[0]:,} x {shape[1]:,}, {kind}")


def write_paths(out, dataset):
    """paths.txt and, where there are labels, labels.npy. Returns the names of the classes (None without labels).

    Classes that have only numbers, as those of a list file, are called after the folders of their images, if that is
    one folder for each.
    """
    labels, folders = dataset.labels, {}
    with open(temporary(out / "paths.txt"), "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for i in range(len(dataset)):
            path = dataset.path(i)
            file.write(path.replace("\n", "\\n") + "\n")
            if labels is not None:
                folders.setdefault(int(labels[i]), set()).add(os.path.basename(os.path.dirname(path)))
    temporary(out / "paths.txt").replace(out / "paths.txt")
    print0(f"{out / 'paths.txt'}: {len(dataset):,} lines")
    if labels is None:
        (out / "labels.npy").unlink(missing_ok=True)  # of an earlier data set
        return None
    np.save(temporary(out / "labels.npy"), np.asarray(labels, dtype=np.int64))
    temporary(out / "labels.npy").replace(out / "labels.npy")
    print0(f"{out / 'labels.npy'}: {len(labels):,} labels, {len(folders):,} classes")
    if dataset.classes:
        return {c: dataset.classes[c] for c in folders}
    names = {c: next(iter(found)) for c, found in folders.items() if len(found) == 1}
    return names if len(set(names.values())) == len(folders) else {c: f"class {c}" for c in folders}


# --------------------------------------------------------------------------------------------------- pictures
def shorten(text, font, width):
    """Text that fits, in the letters that the font has."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c if " " <= c <= "~" else "?" for c in text if not unicodedata.combining(c))
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def embed(features, perplexity, seed):
    """t-SNE of (n, D): points (n, 2) and the divergence that is left. sklearn's defaults are 1000 iterations, early
    exaggeration 12 and the end after 300 iterations without progress."""
    from sklearn.decomposition import PCA  # half a second of import
    from sklearn.manifold import TSNE

    if features.shape[1] > 50:
        features = PCA(min(50, len(features)), random_state=seed).fit_transform(features)
    tsne = TSNE(perplexity=perplexity, learning_rate=200.0, init="random", random_state=seed)
    return tsne.fit_transform(features), tsne.kl_divergence_


def same_class(points, labels, k):
    """Share (n,) of the k nearest other points that have the label of the point."""
    from sklearn.neighbors import KDTree

    found = KDTree(points).query(points, k=k + 1, return_distance=False)
    own = found == np.arange(len(points))[:, None]
    return ((labels[found] == labels[:, None]) & ~own).sum(1) / k


def draw_tsne(path, points, labels, names, title, note, thumbnail):
    """points (n, 2), labels (n,) or None, names: {label: text}. Equal scales on both axes, which have no meaning.

    Without labels, images where there is room: thumbnail(i) is the one of point i.
    """
    side, margin, fine = 900, 24, 3  # points are drawn `fine` times larger, then reduced: smooth edges
    n, big, text = len(points), ImageFont.load_default(26), ImageFont.load_default(18)
    spots = points - (points.min(0) + points.max(0)) / 2
    spots = spots * ((side - 3 * margin) / max(np.ptp(points, axis=0).max(), 1e-9)) + side / 2
    radius = min(8.0, max(2.0, 180 / n**0.5))
    classes = [] if labels is None else sorted(set(labels.tolist()))
    colour = dict(zip(classes, COLOURS, strict=False))
    plane = Image.new("RGB", (side * fine, side * fine), "#f7f7f7")
    draw = ImageDraw.Draw(plane)
    order = np.random.default_rng(0).permutation(n)  # so that no class lies on top of another
    for i in order:
        box = [fine * (v + s) for s in (-radius, radius) for v in spots[i]]
        fill = "#9aa5b1" if labels is None else colour[int(labels[i])]
        draw.ellipse(box, fill=fill, outline="white", width=fine // 2 + 1)
    plane = plane.resize((side, side), Image.Resampling.LANCZOS)

    placed = []
    for i in order if labels is None else ():
        x, y = spots[i]
        if all(max(abs(x - a), abs(y - b)) >= 50 for a, b in placed):
            placed.append((x, y))
            plane.paste(thumbnail(i).resize((48, 48), Image.Resampling.LANCZOS), (round(x) - 24, round(y) - 24))

    if len(classes) > 1:  # a name where its class is dense and in the majority, if there is room
        draw, taken, label = ImageDraw.Draw(plane), [], ImageFont.load_default(22 if len(classes) <= 10 else 17)
        share = same_class(points, labels, min(40, n - 1))
        for c in classes:
            best = share[labels == c].max()
            if best <= 0.5:
                continue
            dense = spots[(labels == c) & (share >= best - 0.1)]
            spot = dense[((dense - np.median(dense, axis=0)) ** 2).sum(1).argmin()]
            name = shorten(names[c], label, 160)
            width = label.getlength(name)
            x = min(max(spot[0] - width / 2, 6), side - width - 6)
            for shift in (0, -30, 30):
                y = min(max(spot[1] - 14 + shift, 4), side - 34)
                if all(x + width + 8 < a or a + w + 8 < x or abs(y - b) > 29 for a, b, w in taken):
                    taken.append((x, y, width))
                    draw.text((x, y), name, "black", label, stroke_width=4, stroke_fill="white")
                    break

    entries = [(c, shorten(names[c], text, 220), f"{(labels == c).sum():,}") for c in classes]
    counts = max((text.getlength(count) for *_, count in entries), default=0)
    legend = 34 + max((text.getlength(name) for _, name, _ in entries), default=-60) + 24 + counts
    top, width = 96, int(2 * margin + side + (margin + legend if classes else 0))
    canvas = Image.new("RGB", (width, top + side + margin), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, 20), shorten(title, big, width - 2 * margin), "black", big)
    draw.text((margin, 58), shorten(note, text, width - 2 * margin), GREY, text)
    canvas.paste(plane, (margin, top))
    left = 2 * margin + side
    for row, (c, name, count) in enumerate(entries):
        y = top + 14 + 32 * row
        draw.ellipse((left, y, left + 20, y + 20), fill=colour[c])
        draw.text((left + 34, y - 1), name, "black", text)
        draw.text((width - margin - text.getlength(count), y - 1), count, GREY, text)
    canvas.save(temporary(path))
    temporary(path).replace(path)
    print0(f"{path}: {n:,} images, {canvas.width} x {canvas.height} pixels")


def draw_neighbours(path, tiles, similarity, index, queries, labels, names, title, note):
    """A row for each query: its image, then its neighbours'. index, similarity (Q, k); tiles: {index: PIL image}."""
    tile, gap, margin, top = 112, 14, 24, 134
    big, text, small = (ImageFont.load_default(size) for size in (26, 18, 15))
    caption = 44 if labels is not None else 26
    step, line = tile + gap, tile + caption + 10
    left = margin + step + margin
    width = max(left + index.shape[1] * step - gap + margin, int(big.getlength(title)) + 2 * margin + 1)
    canvas = Image.new("RGB", (width, top + len(queries) * line + 6), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, 20), shorten(title, big, canvas.width - 2 * margin), "black", big)
    draw.text((margin, 58), shorten(note, text, canvas.width - 2 * margin), GREY, text)
    draw.text((margin, top - 34), "image", GREY, text)
    draw.text((left, top - 34), "most similar first; below: cosine", GREY, text)
    draw.line((left - margin + gap / 2 - 7, top, left - margin + gap / 2 - 7, canvas.height - 20), "#cccccc", 2)

    def place(i, x, y, frame, lines):
        if frame:
            draw.rectangle((x - 5, y - 5, x + tile + 4, y + tile + 4), fill=frame)
        canvas.paste(tiles[i], (x, y))
        for row, (words, ink) in enumerate(lines):
            words = shorten(words, small, tile + gap - 4)
            draw.text((x + (tile - small.getlength(words)) / 2, y + tile + 6 + 18 * row), words, ink, small)

    for row, query in enumerate(queries.tolist()):
        y = top + row * line
        place(query, margin, y, None, [] if labels is None else [(names[int(labels[query])], "black")])
        for column, (i, value) in enumerate(zip(index[row].tolist(), similarity[row].tolist(), strict=True)):
            frame, lines = None, [(f"{value:.3f}", GREY)]
            if labels is not None:
                frame = GREEN if labels[i] == labels[query] else RED
                lines = [(names[int(labels[i])], frame), *lines]
            place(i, left + column * step, y, frame, lines)
    canvas.save(temporary(path))
    temporary(path).replace(path)
    print0(f"{path}: {index.shape[1]} neighbours of {len(queries)} images, {canvas.width} x {canvas.height} pixels")


def neighbours(features, queries, k):
    """The k rows of features (N, D) most similar to each of the rows `queries` (Q,), which is not one of them: their
    cosine and their numbers, (Q, k) both."""
    similarity, index = nearest(features[queries], features, k + 1)
    kept = index != queries[:, None]
    kept[kept.all(1), -1] = False  # so many copies of the query that it is not among them
    return similarity[kept].view(-1, k), index[kept].view(-1, k)


def tile(dataset, i, view, side=112):
    """Image i as the network sees it."""
    try:
        image, _ = dataset[i]
    except BadImage:
        return Image.new("RGB", (side, side), "#dddddd")
    image = center_crop(image if isinstance(image, torch.Tensor) else to_tensor(image), view)
    image = (255 * rgb(image[None] / 255, view.mean, view.std)[0]).round().to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------------- main
def main(args):
    device = init(args.device)
    check_args(args)
    size = args.image_size or (default_size(args.data) if args.pretrained == "random" else None)
    rest = (size, args.seed, args.trust_pickle, args.channels)
    backbone, meta = load_backbone(args.pretrained, args.arch, args.width, *rest)
    amp, _, dtype = precision(args.precision, device)
    model = Features(backbone, args.features).to(device, dtype, memory_format=torch.channels_last)
    view = EvalView(meta["image_size"], mean=tuple(meta["mean"]), std=tuple(meta["std"]))

    split = args.split or ("train" if args.train_list and not args.val_list else "val")
    image_list, channels = args.val_list if split == "val" else args.train_list, meta["channels"]
    dataset = build(args.data, split, image_list, bool(args.split), channels)
    if dataset is None:
        split, dataset = "train", build(args.data, "train", channels=channels)
    n, labels = len(dataset), dataset.labels
    print0(f"data        {args.data}: {n:,} images, {view.size} px, {', '.join(model.names)}")
    if args.neighbours and n < args.k + 1:
        fail(f"--k {args.k}: {n} images have at most {n - 1} neighbours each")
    shown = np.arange(n) if labels is None else np.flatnonzero(np.isin(labels, np.unique(labels)[: len(COLOURS)]))
    if len(shown) > args.points:
        shown = shown[np.linspace(0, len(shown) - 1, args.points).round().astype(np.int64)]
    perplexity = args.perplexity or min(30.0, (len(shown) - 1) / 3)
    if args.tsne and (len(shown) < 5 or perplexity >= len(shown)):
        remedy = "at least 5 are needed" if len(shown) < 5 else f"--perplexity {perplexity:g} must be smaller"
        fail(f"--tsne of {len(shown)} images: {remedy}")

    root = Path("runs/random") if args.pretrained == "random" else Path(args.pretrained).parent
    out = Path(args.out or root / "features")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out}: {error.strerror}")
    many = len(model.names) > 1
    suffix = {name: f"_{name}" if many else "" for name in model.names}
    files = [out / f"features{suffix[name]}.npy" for name in model.names]
    write_features(files, model, dataset, view, device, args, amp)
    finish()
    if not is_main():
        return
    names = write_paths(out, dataset)

    network = "random initialisation" if meta["method"] == "random" else meta["method"]
    network = f"{network}, {meta['arch']}{'' if meta['width'] == 1 else ' x {:g}'.format(meta['width'])}"
    tiles = {}
    for file, name, dim in zip(files, model.names, model.dims, strict=True):
        features = np.load(file, mmap_mode="c")  # private and writable, as torch wishes, but never written
        if args.tsne:
            if sys.stderr.isatty():
                print(f"t-SNE of {len(shown):,} images ...", end="\r", file=sys.stderr, flush=True)
            points, divergence = embed(features[shown].astype(np.float32), perplexity, args.seed)
            note = f"{dim:,} dimensions{', PCA to 50 first' if dim > 50 else ''}"
            note += f", perplexity {perplexity:.3g}, KL divergence {divergence:.2f}"
            if labels is not None:
                near = min(10, len(shown) - 1)
                share = same_class(points, labels[shown], near).mean()
                note += f"; {share:.0%} of the {near} nearest points are of the same class"
            path, known = out / f"tsne{suffix[name]}", None if labels is None else labels[shown]
            title = f"t-SNE of {len(shown):,} images: {network}, {name}"

            def thumbnail(point):
                return tile(dataset, int(shown[point]), view)

            draw_tsne(path.with_suffix(".png"), points, known, names, title, note, thumbnail)
            arrays = {"points": points, "indices": shown, "perplexity": perplexity, "kl_divergence": divergence}
            np.savez(temporary(path.with_suffix(".npz")), **arrays, **({} if known is None else {"labels": known}))
            temporary(path.with_suffix(".npz")).replace(path.with_suffix(".npz"))
            print0(f"{path.with_suffix('.npz')}: {', '.join(arrays)}{'' if known is None else ', labels'}")
        if args.neighbours:
            order = np.arange(n) if labels is None else labels.argsort(kind="stable")  # so many images of each class
            rows = min(args.queries, n)
            queries = torch.from_numpy(order[((np.arange(rows) + 0.5) * n / rows).astype(np.int64)])
            similarity, index = neighbours(torch.from_numpy(features), queries, args.k)
            for i in {*queries.tolist(), *index.flatten().tolist()} - tiles.keys():
                tiles[i] = tile(dataset, i, view)
            title = f"Nearest of {n:,} images: {network}, {name}"
            note = f"{dim:,} dimensions, images as the network sees them"
            if labels is not None:
                right = int((labels[index.numpy()] == labels[queries.numpy()][:, None]).sum())
                note = f"{dim:,} dimensions; green: same class ({right} of {index.numel()}), red: another class"
            path = out / f"neighbours{suffix[name]}.png"
            draw_neighbours(path, tiles, similarity, index, queries, labels, names, title, note)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
