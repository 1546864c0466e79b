"""Pictures of what a network has learned: the plane of t-SNE, images beside those most similar to them, and where in
an image the class token of a ViT looks.

    python visualize.py --pretrained runs/simsiam/backbone.pt --data /imagenet
    python visualize.py --pretrained runs/simsiam/backbone.pt --data /imagenet --tsne --features feat4 feat5
    torchrun --nproc_per_node=8 visualize.py --pretrained runs/simsiam/backbone.pt --data /imagenet --neighbours
    python visualize.py --pretrained random --arch resnet18 --data digits --split train
    python visualize.py --pretrained dino_deitsmall8_pretrain.pth --data /photos --attention --image-size 480
    python visualize.py --pretrained runs/ibot/backbone.pt --data /photos --attention --threshold 0.6

Written to --out, features/ beside the checkpoint by default; without one of --tsne, --neighbours, --attention and
--spectrum, the first two:
    tsne.png        the plane of t-SNE (van der Maaten and Hinton 2008), a colour per class; tsne.npz: its points
    neighbours.png  some images and those most similar to them (cosine), framed green where the classes are the same
                    and red where not, with file names instead where there are no classes; beside them those that a
                    random network of the same architecture (seed 0) finds: what training has changed
    attention.png   (ViTs, XCiTs) what the class token attends to in the last block, a column per head and their mean,
                    below the same of a random network
    spectrum.png    in how many dimensions the features lie: singular values of their covariance, in order, as shares of
                    the largest (Jing et al. 2022, figure 1), beside those of a random network; a cliff is dimensional
                    collapse; with the effective rank (common/features.py); spectrum.npz: its values
With several --features a file each: tsne_feat4.png, tsne_feat5.png.

Images are seen as in the other evaluations: shorter side to 256, central 224 x 224 pixels (images of at most 64 pixels:
no margin).

t-SNE runs on the features as they are, after a PCA to 50 dimensions where there are more, from a random start with
perplexity 30, early exaggeration 12, learning rate 200 and 1000 iterations. It shows at most 2000 images, evenly spaced
over those of the first 20 classes, and --tsne alone computes only their features. --neighbours searches all images and
holds their features in memory: 10 GB for ImageNet's training set and 2048 dimensions; the random network, which
--no-compare leaves out, takes a second pass over the images.

--attention computes only the images that it shows, --queries of them, and is for networks whose class token attends to
patches: our ViTs and XCiTs, and published ones (DINO, iBOT, MAE, MoCo v3 ...). Shown are shares: of what a head's class
token gives to all patches, so that they sum to one. Brightness is relative to the largest share, or to four times an
equal one if that is more: equal attention is evenly dark. With --threshold 0.6 (as in figure 4 of Caron et al. 2021)
the image is shown at the fewest patches that hold 60 % of the attention, and is dark elsewhere. A larger --image-size
gives more and smaller patches: a ViT's positions are interpolated, an XCiT needs none.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import math
import os
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.args import Parser, at_least, fail, positive, share, toggle
from common.augment import EvalView, augment
from common.checkpoint import MAKERS, load_pretrained
from common.classes import class_names
from common.datasets import Subset, open_split
from common.distributed import end_processes, is_main, print0
from common.features import Features, effective_rank, extract, has_class_token, singular_values, usual_interpolation
from common.files import atomic, make_folder, result_folder
from common.images import BadImage, to_tensor
from common.knn import nearest
from common.networks import network
from common.optim import or_precise, precision
from common.pictures import rgb, shorten
from common.resnet import SMALL as SMALL_STEM
from common.resnet import ResNet, resnet
from common.run import start_device
from common.vit import ViT
from common.xcit import XCiT

COLOURS = """#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #17becf #bcbd22 #3b3b3b
#3c1ea5 #960069 #00f0a5 #005a00 #a5b4ff #d2a596 #5a8778 #78000f #6978ff #877800""".split()
RANDOM = "random initialisation"
GREY, GREEN, RED = "#666666", "#1a9641", "#d7191c"
HEAT = torch.tensor([[8, 6, 30], [60, 15, 95], [140, 35, 100], [215, 75, 55], [250, 160, 15], [252, 255, 165]]).double()
BIG, TEXT, SMALL = (ImageFont.load_default(size) for size in (26, 18, 15))


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_pretrained()
    group = parser.add_argument_group("pictures")
    group.add_argument("--split", choices=["train", "val"], help="default: val, or all images of an undivided folder")
    group.add_argument("--features", nargs="+", help="feat1 ... feat5, or cls and mean (default: the pooled output)")
    group.add_argument("--batch-size", type=positive(int), default=256, help="images per process and forward pass")
    group.add_argument("--tsne", action=toggle, help="draw tsne.png (default: both pictures)")
    group.add_argument("--points", type=at_least(5), default=2000, help="images in it, at most")
    group.add_argument("--perplexity", type=positive(float), help="default: 30, less for fewer than 91 images")
    group.add_argument("--neighbours", action=toggle, help="draw neighbours.png (default: both pictures)")
    group.add_argument("--queries", type=positive(int), default=10, help="images in its rows, and in attention.png")
    group.add_argument("--k", type=positive(int), default=8, help="neighbours in a row")
    group.add_argument("--compare", action=toggle, default=True, help="with what a random network finds or attends to")
    group.add_argument("--attention", action=toggle, default=False, help="draw attention.png: ViTs and XCiTs")
    group.add_argument("--spectrum", action=toggle, default=False, help="draw spectrum.png, of all images")
    text = "show the patches that hold this share of the attention instead of how much each of them has"
    group.add_argument("--threshold", type=share, help=text)
    args = parser.parse_args(argv)
    if args.threshold and not args.attention:
        parser.error("--threshold is for --attention: add it")
    return args


# --------------------------------------------------------------------------------------------------- features
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


def untrained(backbone, meta, seed=0):
    """A network of the same architecture with random weights. meta: what its file says, as from `load_pretrained`."""
    torch.manual_seed(seed)
    shape = {k: meta[k] for k in ("arch", "width", "image_size", "channels")} | getattr(backbone, "config", {})
    make = MAKERS.get(meta["arch"].split("_")[0], network)
    if isinstance(backbone, ResNet):
        make, shape["input_filter"] = resnet, backbone.input_filter
        shape["image_size"] = SMALL_STEM if backbone.small else 224
    if isinstance(backbone, ViT):
        block = backbone.blocks[0]
        shape["mlp_ratio"] = (block.mlp.fc1.out_features + 0.5) / backbone.dim
        shape["layer_scale"] = float(hasattr(block.ls1, "gamma"))
    fresh = make(**shape)
    other = copy.deepcopy(backbone)  # with whatever its file has made it do otherwise
    other.load_state_dict(fresh.state_dict())
    return other


def neighbours(features, queries, k):
    """The k rows of features (N, D) most similar to each of the rows `queries` (Q,), which is not one of them: their
    cosine and their numbers, (Q, k) both."""
    similarity, index = nearest(features[queries], features, k + 1)
    kept = index != queries[:, None]
    kept[kept.all(1), -1] = False  # so many copies of the query that it is not among them
    return similarity[kept].view(-1, k), index[kept].view(-1, k)


@torch.no_grad()
def class_attention(backbone, x):
    """What the class token gives to the patches in the last block, as shares that sum to one: images (B, C, S, S) ->
    (B, heads, side, side)."""
    if isinstance(backbone, XCiT):
        attention, seen = backbone.cls_attn_blocks[-1].attn, []
        hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        backbone(x)
        hook.remove()
        q, k, _ = attention.qkv(seen[0]).unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q[:, :, :1] @ k.mT / q.shape[3] ** 0.5).softmax(3)
    else:
        weights = backbone.attention(x)
    weights = weights[:, :, 0, 1:].cpu().double()
    side = math.isqrt(weights.shape[2])
    return (weights / weights.sum(2, keepdim=True)).unflatten(2, (side, side))


def holding(shares, mass):
    """The fewest places of each map (..., side, side) that hold this share of it, the largest first: booleans."""
    largest, order = shares.flatten(-2).sort(dim=-1, descending=True)
    before = largest.cumsum(-1) - largest
    return torch.zeros_like(before).scatter(-1, order, (before < mass).to(before.dtype)).view(shares.shape) > 0


# --------------------------------------------------------------------------------------------------- pictures
def seen(dataset, i, view):
    """Image i as the network sees it, (C, S, S) uint8; None if it cannot be decoded."""
    try:
        image, _ = dataset[i]
    except BadImage:
        return None
    return view.crop(image if isinstance(image, torch.Tensor) else to_tensor(image))


def tile(dataset, i, view, side=112):
    """The same as a picture of side x side pixels."""
    image = seen(dataset, i, view)
    if image is None:
        return Image.new("RGB", (side, side), "#dddddd")
    image = (255 * rgb(image[None] / 255, view.mean, view.std)[0]).round().to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)


def sheet(width, height, margin, title, notes):
    """A white picture with a title and lines below it, and what draws on it."""
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, 20), shorten(title, BIG, width - 2 * margin), "black", BIG)
    for row, note in enumerate(notes):
        draw.text((margin, 58 + 24 * row), shorten(note, TEXT, width - 2 * margin), GREY, TEXT)
    return canvas, draw


def draw_tsne(path, points, labels, names, title, note, thumbnail):
    """points (n, 2), labels (n,) or None, names: {label: text} of all classes. Equal scales on both axes, which have no
    meaning.

    Without labels, images where there is room: thumbnail(i) is the one of point i.
    """
    side, margin, fine = 900, 24, 3  # points are drawn `fine` times larger, then reduced: smooth edges
    n = len(points)
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

    notes = [note]
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
        where = "names stand where a class is dense and in the majority, if there is room"
        notes.append(f"{where}: {len(taken)} of {len(classes)} classes")

    entries = [(c, shorten(names[c], TEXT, 220), f"{(labels == c).sum():,}") for c in classes]
    counts = max((TEXT.getlength(count) for *_, count in entries), default=0)
    legend = 34 + max((TEXT.getlength(name) for _, name, _ in entries), default=-60) + 24 + counts
    top, width = 72 + 24 * len(notes), int(2 * margin + side + (margin + legend if classes else 0))
    canvas, draw = sheet(width, top + side + margin, margin, title, notes)
    canvas.paste(plane, (margin, top))
    left = 2 * margin + side
    for row, (c, name, count) in enumerate(entries):
        y = top + 14 + 32 * row
        draw.ellipse((left, y, left + 20, y + 20), fill=colour[c])
        draw.text((left + 34, y - 1), name, "black", TEXT)
        draw.text((width - margin - TEXT.getlength(count), y - 1), count, GREY, TEXT)
    with atomic(path) as temporary:
        canvas.save(temporary)
    print0(f"{path}: {n:,} images{some_of(classes, names)}, {canvas.width} x {canvas.height} pixels")
    for note in notes[1:]:
        print0(f"note        {note}")


def some_of(classes, names):
    """What to say where there are more classes than are shown."""
    return f" of {len(classes)} of {len(names)} classes" if names and len(classes) < len(names) else ""


def draw_neighbours(path, tiles, found, queries, labels, names, title, note):
    """A row for each query: its image, then its neighbours'. found: {whose: (similarity (Q, k), index (Q, k))}, beside
    each other; tiles: {index: PIL image}; names: {label: text}, or without labels {index: text}."""
    tile, gap, margin, top = 112, 14, 24, 134
    step, line = tile + gap, tile + (44 if labels is not None else 62) + 10
    k = next(iter(found.values()))[1].shape[1]
    block = k * step - gap + 2 * margin
    first = margin + step + margin
    width = max(first + len(found) * block - margin, int(BIG.getlength(title)) + 2 * margin + 1)
    canvas, draw = sheet(width, top + len(queries) * line + 6, margin, title, [note])
    draw.text((margin, top - 34), "image", GREY, TEXT)

    def place(i, x, y, frame, lines):
        if frame:
            draw.rectangle((x - 5, y - 5, x + tile + 4, y + tile + 4), fill=frame)
        canvas.paste(tiles[i], (x, y))
        for row, (words, ink) in enumerate(lines):
            draw.text((x + (tile - SMALL.getlength(words)) / 2, y + tile + 6 + 18 * row), words, ink, SMALL)

    def name(i, ink="black"):
        """The class, or the name of the file in two lines, if it needs them."""
        if labels is not None:
            return [(shorten(names[int(labels[i])], SMALL, tile + gap - 4), ink)]
        text = shorten(names[i], SMALL, 1e9)
        n = max(n for n in range(len(text) + 1) if SMALL.getlength(text[:n]) <= tile + gap - 4)
        return [(part, ink) for part in (text[:n], shorten(text[n:], SMALL, tile + gap - 4, 8)) if part]

    for row, query in enumerate(queries.tolist()):
        place(query, margin, top + row * line, None, name(query))
    for part, (whose, (similarity, index)) in enumerate(found.items()):
        left, heading = first + part * block, ""
        if labels is not None:
            right = (labels[index] == labels[queries][:, None]).sum()
            heading = f": {right} of {index.size} of the same class"
            print0(f"neighbours  {whose}{heading}")
        draw.text((left, top - 34), shorten(whose + heading, TEXT, block - 2 * margin), GREY, TEXT)
        draw.line((left - margin, top, left - margin, canvas.height - 20), "#cccccc", 2)
        for row, query in enumerate(queries.tolist()):
            for column, (i, value) in enumerate(zip(index[row].tolist(), similarity[row].tolist(), strict=True)):
                frame = None
                if labels is not None:
                    frame = GREEN if labels[i] == labels[query] else RED
                place(
                    i,
                    left + column * step,
                    top + row * line,
                    frame,
                    [*name(i, frame or "black"), (f"{value:.3f}", GREY)],
                )
    with atomic(path) as temporary:
        canvas.save(temporary)
    print0(f"{path}: {k} neighbours of {len(queries)} images, {canvas.width} x {canvas.height} pixels")


def draw_attention(path, rows, title, note, mass=None):
    """For each of `rows` (PIL image, name, {whose: shares (heads, side, side)}) the image, and a line per network with
    a square for each of its heads and for their mean. mass: as in `holding`, of the patches that are shown."""
    side, heads = rows[0][0].width, len(next(iter(rows[0][2].values())))
    gap, margin, top, networks = 8, 24, 134, list(rows[0][2])
    left = margin + max(int(TEXT.getlength(name)) for name in networks) + 16
    first, height = left + side + margin, len(networks) * (side + gap) + 34
    width = max(first + (heads + 1) * (side + gap) - gap + margin, int(BIG.getlength(title)) + 2 * margin + 1)
    canvas, draw = sheet(width, top + len(rows) * height, margin, title, [note])
    for column, words in enumerate(["image", *(f"head {i + 1}" for i in range(heads)), "mean"]):
        x = left if column == 0 else first + (column - 1) * (side + gap)
        draw.text((x, top - 34), shorten(words, TEXT, side), GREY, TEXT)
    for row, (image, name, found) in enumerate(rows):
        canvas.paste(image, (left, top + row * height))
        draw.text((left, top + row * height + side + 6), shorten(name, SMALL, side + margin - 4), "black", SMALL)
        pixels = torch.from_numpy(np.array(image)).double()
        for line, (whose, shares) in enumerate(found.items()):
            y = top + row * height + line * (side + gap)
            draw.text((margin, y + 4), whose, GREY, TEXT)
            maps = torch.cat([shares, shares.mean(0, keepdim=True)])
            zoom = side // maps.shape[2]
            if mass:
                shown = holding(maps, mass).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)[..., None]
                squares = torch.where(shown, pixels, torch.lerp(HEAT[1], pixels.mean(2, keepdim=True), 0.2))
            else:
                largest = maps.amax((1, 2), keepdim=True).clamp(min=4 / maps[0].numel())
                place = maps / largest * (len(HEAT) - 1)
                low = place.long().clamp(max=len(HEAT) - 2)
                squares = torch.lerp(HEAT[low], HEAT[low + 1], (place - low)[..., None])
                squares = squares.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
            for column, square in enumerate(squares):
                square = Image.fromarray(square.round().to(torch.uint8).numpy())
                canvas.paste(square, (first + column * (side + gap), y))
    with atomic(path) as temporary:
        canvas.save(temporary)
    print0(f"{path}: {heads} heads, {len(rows)} images, {canvas.width} x {canvas.height} pixels")


def draw_spectrum(path, curves, title, note):
    """PNG of {whose: (singular values of a covariance, descending, effective rank)}: log10 of each value as a share of
    the largest, from 0 down to -12, by its number."""
    width, height, margin, top = 760, 460, 70, 120
    canvas, draw = sheet(width + 2 * margin, top + height + 110, margin, title, [note])
    count = max(len(values) for values, _ in curves.values())
    for power in range(0, -13, -2):
        y = top - power * height / 12
        draw.line((margin, y, margin + width, y), "#dddddd")
        draw.text((margin - 8, y), f"1e{power}" if power else "1", GREY, SMALL, anchor="rm")
    for tick in np.unique(np.linspace(1, count, 6).round().astype(int)).tolist():
        x = margin + width * (tick - 1) / max(1, count - 1)
        draw.text((x, top + height + 8), f"{tick}", GREY, SMALL, anchor="ma")
    draw.text((margin + width / 2, top + height + 30), "number of the singular value", GREY, SMALL, anchor="ma")
    for line, ((whose, (values, rank)), colour) in enumerate(zip(curves.items(), COLOURS, strict=False)):
        share = (values / values.max().clamp(min=1e-300)).clamp(min=1e-12).log10().tolist()
        points = [(margin + width * i / max(1, count - 1), top - v * height / 12) for i, v in enumerate(share)]
        draw.line(points, colour, 3)
        text = f"{whose}: effective rank {rank:.1f} of {len(values)}"
        draw.text((margin, top + height + 54 + 24 * line), text, colour, TEXT)
    with atomic(path) as temporary:
        canvas.save(temporary)
    words = ", ".join(f"{whose} {rank:.1f}" for whose, (_, rank) in curves.items())
    print0(f"{path}: effective rank {words}, of {count} dimensions")


# ------------------------------------------------------------------------------------------------------- main
def attend(args, backbone, meta, dataset, view, queries, path, title):
    """Draws attention.png, and says how few patches hold most of the attention."""
    device, (_, _, dtype) = backbone.cls_token.device, precision(args.precision, backbone.cls_token.device)
    if backbone.pool == "mean":
        print0("note        the feature of this ViT is the mean of its patches: its class token may be untrained")
    networks = {"trained" if meta["method"] != "random" else RANDOM: backbone.to(dtype)}
    if args.compare and meta["method"] != "random":
        networks[RANDOM] = untrained(backbone, meta).to(device, dtype)
    names, rows, counts = class_names(dataset), [], {name: [] for name in networks}
    for i in queries.tolist():
        image, found = seen(dataset, i, view), {}
        if image is None:
            image = torch.full((meta["channels"], view.size, view.size), 128, dtype=torch.uint8)
        x = augment(image[None].to(device), [], view.mean, view.std, dtype)
        for name, part in networks.items():
            found[name] = class_attention(part.eval(), x)[0]
            counts[name].append(holding(found[name], args.threshold or 0.6).double().mean().item())
        side = next(iter(found.values())).shape[2]
        cell = side * max(1, round(min(max(view.size, 112), 160) / side))
        name = names[int(dataset.labels[i])] if names else os.path.basename(dataset.path(i))
        rows.append((tile(dataset, i, view, cell), name, found))
    if not all(shares.isfinite().all() for _, _, found in rows for shares in found.values()):
        fail(f"--pretrained {args.pretrained}: some attention is not finite: its weights or an image are damaged")
    note = f"{view.size} px, {side} x {side} patches; of a head's attention to them, "
    note += f"the patches that hold {args.threshold:.0%}" if args.threshold else "each one's share: dark is little"
    draw_attention(path, rows, title, note, args.threshold)
    for name, values in counts.items():
        print0(f"attention   {name}: {np.mean(values):.0%} of the patches hold {args.threshold or 0.6:.0%} of it")


def main(args):
    device = start_device(args)
    backbone, meta = load_pretrained(args)
    amp, _, dtype = precision(args.precision, device)
    if args.attention and not (has_class_token(backbone) or isinstance(backbone, XCiT)):
        fail(f"--attention: {meta['arch']} has no class token that attends to patches: it is for ViTs and XCiTs")
    model = Features(backbone, args.features).to(device, dtype, memory_format=torch.channels_last)
    how = {"interpolation": usual_interpolation(backbone), "mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    view = EvalView(meta["image_size"], **how)
    dataset = open_split(args, meta["channels"])
    n, labels = len(dataset), dataset.labels
    both = not (args.tsne or args.neighbours or args.attention or args.spectrum)
    tsne, near = (both if wanted is None else wanted for wanted in (args.tsne, args.neighbours))
    print0(f"data        {args.data}: {n:,} images, {view.size} px, {', '.join(model.names)}")
    if near and n < args.k + 1:
        fail(f"--k {args.k}: {n} images have at most {n - 1} neighbours each")
    shown = np.arange(n) if labels is None else np.flatnonzero(np.isin(labels, np.unique(labels)[: len(COLOURS)]))
    if len(shown) > args.points:
        shown = shown[np.linspace(0, len(shown) - 1, args.points).round().astype(np.int64)]
    perplexity = args.perplexity or min(30.0, (len(shown) - 1) / 3)
    if tsne and (len(shown) < 5 or perplexity >= len(shown)):
        remedy = "at least 5 are needed" if len(shown) < 5 else f"--perplexity {perplexity:g} must be smaller"
        fail(f"--tsne of {len(shown)} images: {remedy}")
    order = np.arange(n) if labels is None else labels.argsort(kind="stable")  # so many images of each class
    rows = min(args.queries, n)
    queries = order[((np.arange(rows) + 0.5) * n / rows).astype(np.int64)]
    out = make_folder(args.out or result_folder(args.pretrained) / "features")
    names, trained = class_names(dataset), meta["method"] != "random"
    title = f"{meta['method'] if trained else RANDOM}, {meta['arch']}"
    title += "" if meta["width"] == 1 else f" x {meta['width']:g}"
    if args.attention and is_main():
        text = f"Attention of the class token in the last block: {title}"
        attend(args, backbone, meta, dataset, view, queries, out / "attention.png", text)
    if not (tsne or near or args.spectrum):
        return end_processes()

    how = (view, device, args.workers, args.batch_size, amp)

    def search(features):
        """{feature: (similarity, index)} of the neighbours of the queries, of the main process."""
        parts = zip(model.names, features.split(model.dims, 1), strict=True) if is_main() else ()
        found = {name: neighbours(x, torch.from_numpy(queries).to(device), args.k) for name, x in parts}
        return {name: [part.cpu().numpy() for part in pair] for name, pair in found.items()}

    def spectra(features):
        """{feature: (singular values of the covariance, effective rank)}."""
        parts = zip(model.names, features.split(model.dims, 1), strict=True) if is_main() else ()
        return {
            name: (singular_values(x, center=True).square().cpu(), effective_rank(x, center=True)) for name, x in parts
        }

    chance, chance_spectra, whole = {}, {}, near or args.spectrum
    if whole and args.compare and trained:
        other = Features(untrained(backbone, meta), args.features).to(device, dtype, memory_format=torch.channels_last)
        bank, _ = extract(other, dataset, *how)
        chance, chance_spectra = search(bank) if near else {}, spectra(bank) if args.spectrum else {}
        del bank
    images = dataset if whole else Subset(dataset, shown)
    features, _ = extract(model, images, *how)
    end_processes()
    if not is_main():
        return
    if not features.isfinite().all():
        cause = f"its weights or an image are damaged{or_precise(amp)}"
        fail(f"--pretrained {args.pretrained}: some features are not finite: {cause}")
    tiles, found, drawn = {}, search(features) if near else {}, spectra(features) if args.spectrum else {}
    whose = "trained" if trained else RANDOM
    for name, x in zip(model.names, features.split(model.dims, 1), strict=True):
        suffix, dim = f"_{name}" if len(model.names) > 1 else "", f"{x.shape[1]:,} dimensions"
        if tsne:
            if sys.stderr.isatty():
                print(f"t-SNE of {len(shown):,} images ...", end="\r", file=sys.stderr, flush=True)
            points = (x[torch.from_numpy(shown).to(device)] if whole else x).cpu().numpy()
            points, divergence = embed(points, perplexity, args.seed)
            note = f"{dim}{', PCA to 50 first' if x.shape[1] > 50 else ''}"
            note += f", perplexity {perplexity:.3g}, KL divergence {divergence:.2f}"
            arrays = {"points": points, "indices": shown, "perplexity": perplexity, "kl_divergence": divergence}
            if labels is not None:
                arrays["labels"], among = labels[shown], min(10, len(shown) - 1)
                share = same_class(points, labels[shown], among).mean()
                note += f"; {share:.0%} of the {among} nearest points are of the same class"
            path, classes = out / f"tsne{suffix}.png", () if labels is None else np.unique(labels[shown])
            text = f"t-SNE of {len(shown):,} images{some_of(classes, names)}: {title}, {name}"
            draw_tsne(
                path, points, arrays.get("labels"), names, text, note, lambda i: tile(dataset, int(shown[i]), view)
            )
            with atomic(path.with_suffix(".npz")) as temporary:
                np.savez(temporary, **arrays)
            print0(f"{path.with_suffix('.npz')}: {', '.join(arrays)}")
        if near:
            panels = {whose: found[name]} | ({RANDOM: chance[name]} if chance else {})
            wanted = {*queries.tolist(), *(i for _, index in panels.values() for i in index.flatten().tolist())}
            tiles |= {i: tile(dataset, i, view) for i in wanted - tiles.keys()}
            text = f"Nearest of {n:,} images: {title}, {name}"
            note = f"{dim}; most similar first; below: cosine"
            note += "" if labels is None else "; green: same class, red: another class"
            words = names or {i: os.path.basename(dataset.path(i)) for i in tiles}
            draw_neighbours(out / f"neighbours{suffix}.png", tiles, panels, queries, labels, words, text, note)
        if args.spectrum:
            curves = {whose: drawn[name]} | ({RANDOM: chance_spectra[name]} if chance_spectra else {})
            path, text = out / f"spectrum{suffix}.png", f"Singular values of {n:,} images: {title}, {name}"
            draw_spectrum(path, curves, text, f"{dim}; of the covariance, as shares of the largest")
            with atomic(path.with_suffix(".npz")) as temporary:
                np.savez(temporary, **{key.replace(" ", "_"): values.numpy() for key, (values, _) in curves.items()})


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
