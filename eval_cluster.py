"""Clustering as an evaluation: do clusters found without labels agree with the classes? (Van Gansbeke et al. 2020)

A file that scan.py leaves (clusters.pt) has clusters of its own: an image belongs to the one of largest probability.
Of any other network the k-means of its features is judged: features of length 1, --clusters centroids (as many as
there are classes unless told otherwise) found in the training images, the images of --split going to the nearest; from
--starts random starts, because single ones differ much.

    python eval_cluster.py --pretrained runs/scan/clusters.pt --data /data/cifar10
    python eval_cluster.py --pretrained runs/simclr/backbone.pt --data /data/cifar10
    python eval_cluster.py --pretrained runs/simclr/backbone.pt --data /photos --clusters 20      # no labels needed

Figures, in percent, over the images of --split (test images where there are any):
    acc     accuracy under the best matching of clusters and classes, each of which is used once (Kuhn 1955); where
            there are more clusters than classes, the images of those that are left over count as wrong
    top5    the class is among those matched to the five most probable (or nearest) clusters
    purity  accuracy where every cluster stands for its largest class: 100 if each image is a cluster of its own
    nmi     mutual information divided by the mean of both entropies; ami: corrected for chance; ari: the adjusted Rand
            index. They need no matching.
Matching and purity use the labels of the images that are scored, as SCAN's own evaluation does.

Of the k-means, mean and standard deviation over the starts, and the start of the smallest inertia, which is chosen
without labels, as "best". Without labels: the sizes of the clusters, and the silhouette (mean over at most 2,000
images of how much nearer an image is to its own cluster than to the next one, from -1 to 1). Written beside the
checkpoint, or to --out: eval_cluster.json, clusters.csv (image, cluster, its share or cosine), clusters.png (images of
each cluster, from its most typical to its least), and with labels confusion_cluster.png and per_class_cluster.csv.
"""

import common.interrupt  # noqa: F401 (before torch)
import csv
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from common.args import Parser, at_least, fail, positive
from common.augment import EvalView
from common.checkpoint import load_file, load_pretrained
from common.classes import by_class, class_names
from common.classifier import load_classifier, predict
from common.datasets import open_dataset, open_split, with_labels
from common.distributed import is_main, print0, rank, world_size
from common.features import Features, broken_rows, extract, usual_interpolation
from common.files import atomic, make_folder, result_folder
from common.kmeans import kmeans
from common.log import facts, report
from common.optim import precision
from common.pictures import original, shorten
from common.run import start_device

ROWS, TILE, GAP = 30, 96, 8  # of the sheet: clusters at most, sides of the images and between them
SAMPLE = 2000  # images of the silhouette, whose time grows with their square


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_pretrained()
    group = parser.add_argument_group("clusters")
    group.add_argument("--split", choices=["train", "val"], help="default: val, or all images of an undivided folder")
    text = "of the k-means (default: the number of classes); a file with clusters of its own has its number"
    group.add_argument("--clusters", type=at_least(2), help=text)
    group.add_argument("--starts", type=positive(int), default=5, help="random starts of the k-means, from --seed on")
    group.add_argument("--iterations", type=positive(int), default=50, help="of the k-means")
    group.add_argument("--features", nargs=1, help="feat1 ... feat5, or cls or mean (default: the pooled output)")
    group.add_argument("--images", type=positive(int), default=12, help="images of each cluster in clusters.png")
    group.add_argument("--batch-size", type=positive(int), default=256, help="images per process and forward pass")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------- measures
def count_pairs(labels, clusters, classes, k):
    """How often each class meets each cluster: (classes, k), from integers (N,) both."""
    return np.bincount(labels * k + clusters, minlength=classes * k).reshape(classes, k)


def match(counts):
    """The class (k,) that each cluster stands for, -1 for none, so that most images are right while no class and no
    cluster is used twice (Kuhn 1955). counts: (classes, k)."""
    from scipy.optimize import linear_sum_assignment  # scikit-learn brings it

    matched = np.full(counts.shape[1], -1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    matched[columns] = rows
    return matched


def agreement(labels, ranked, k):
    """The measures of the docstring, in percent, and `match`'s result.

    labels: (N,) integers from 0; ranked: (N, R) clusters of each image, the most probable first; k: clusters.
    """
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

    clusters = ranked[:, 0]
    counts = count_pairs(labels, clusters, labels.max() + 1, k)
    matched = match(counts)
    hits = matched[ranked[:, :5]] == labels[:, None]
    found = {"acc": hits[:, 0].mean(), "top5": hits.any(1).mean(), "purity": counts.max(0).sum() / len(labels)}
    found["nmi"] = normalized_mutual_info_score(labels, clusters)
    found["ami"] = adjusted_mutual_info_score(labels, clusters)
    found["ari"] = adjusted_rand_score(labels, clusters)
    return {name: 100 * float(value) for name, value in found.items()}, matched


def silhouette(x, clusters, seed=0):
    """Mean silhouette (Rousseeuw 1987), cosine distance, over at most SAMPLE rows of x (N, D); None for one cluster."""
    from sklearn.metrics import silhouette_score

    some = np.random.default_rng(seed).permutation(len(x))[:SAMPLE]
    if not 1 < len(np.unique(clusters[some])) < len(some):
        return None
    return float(silhouette_score(x[some], clusters[some], metric="cosine"))


# ---------------------------------------------------------------------------------------------------- pictures
def draw_sheet(path, dataset, rows, view, clusters, typical, labels, names, count, title):
    """A row of images for each of the largest clusters, from the most typical image to the least.

    rows: (N,) numbers of the images in the dataset; clusters: (N,); typical: (N,) the larger the more; labels: (N,) or
    None, names: {label: text}. At most ROWS clusters.
    """
    ids, sizes = np.unique(clusters, return_counts=True)
    order = np.lexsort((ids, -sizes))[:ROWS]
    font, small, left = ImageFont.load_default(18), ImageFont.load_default(14), 190
    width = max(left + count * (TILE + GAP), 24 + round(font.getlength(title)))
    canvas = Image.new("RGB", (width, 76 + len(order) * (TILE + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 12), title, "black", font)
    note = "the most typical image on the left, the least typical on the right"
    note += "" if labels is None else "; green: the largest class of the cluster, red: another"
    note += "" if len(order) == len(ids) else f"; the largest {len(order)} of {len(ids)} clusters"
    draw.text((12, 42), note, "#666666", small)
    for row, c in enumerate(ids[order].tolist()):
        top, own = 72 + row * (TILE + GAP), np.flatnonzero(clusters == c)
        own = own[np.argsort(-typical[own], kind="stable")]
        own = own[np.unique(np.linspace(0, len(own) - 1, min(count, len(own))).round().astype(np.int64))]
        lines = [f"cluster {c}", f"{(clusters == c).sum():,} images"]
        if labels is not None:
            largest = int(np.bincount(labels[clusters == c]).argmax())
            lines += [shorten(names[largest], small, left - 24), f"{(labels[clusters == c] == largest).mean():.0%}"]
        for i, text in enumerate(lines):
            draw.text((12, top + 4 + 21 * i), text, "#666666" if i else "black", small)
        for column, i in enumerate(own.tolist()):
            image, x = to_pil_image(original(dataset, int(rows[i]), TILE, view)), left + column * (TILE + GAP)
            if labels is not None:
                frame = "#1a9641" if labels[i] == largest else "#d7191c"
                draw.rectangle((x - 3, top - 3, x + TILE + 2, top + TILE + 2), fill=frame)
                draw.rectangle((x, top, x + TILE - 1, top + TILE - 1), fill="white")
            canvas.paste(image, (x + (TILE - image.width) // 2, top + (TILE - image.height) // 2))
    with atomic(path) as temporary:
        canvas.save(temporary)


# ---------------------------------------------------------------------------------------------------- clusters
def open_images(args, channels):
    """The images that are scored, and those in which centroids are sought: training images where both are there."""
    split = args.split or ("train" if args.train_list and not args.val_list else "val")
    test = open_dataset(args.data, "val", args.val_list, bool(args.split), channels) if split == "val" else None
    train = open_dataset(args.data, "train", args.train_list, test is None, channels)
    train = train and with_labels(train)
    return train if test is None else test, test if train is None else train


def own_clusters(args, device, amp, dtype):
    """Of a file with clusters what `kmeans_clusters` gives, with one run, and without features."""
    model, view, names, meta = load_classifier(args)
    data = open_split(args, meta["channels"])
    print0(f"data        {args.data}: {len(data):,} images, {len(names)} clusters of the file")
    model = model.to(device, dtype, memory_format=torch.channels_last)
    found = predict(model, data, view, args.batch_size, device, args.workers, amp)
    found = found[[i for i in range(len(data)) if i not in data.undecodable]]
    ranked = (-found).argsort(1, kind="stable")[:, :5]
    return data, [], view, meta, [ranked], found.max(1), None, len(names)


def kmeans_clusters(args, device, amp, dtype):
    """Images that are scored, images of the centroids, view, `meta`; per start, the best first, the five nearest
    clusters of each image (N, 5); of the best how typical each image is (N,); features (N, D); number of clusters."""
    backbone, meta = load_pretrained(args)
    model = Features(backbone, args.features).to(device, dtype, memory_format=torch.channels_last)
    how = {"mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    view = EvalView(meta["image_size"], interpolation=usual_interpolation(backbone), **how)
    data, fitted = open_images(args, meta["channels"])
    labelled = next((part.labels for part in (fitted, data) if part.labels is not None), None)
    if args.clusters is None and labelled is None:
        fail("--clusters: say how many; there are no labels whose classes could be counted")
    k = args.clusters or len(np.unique(labelled))
    if not 2 <= k <= len(fitted):
        fail(f"--clusters {k}: a number from 2 to {len(fitted)}, that of the images they are found in")
    same = fitted is data
    print0(f"data        {args.data}: {len(data):,} images, {k} clusters of {'these' if same else len(fitted)} images")

    found = {}
    for part, which in ((data, "test"), (fitted, "training")):
        if part not in found:
            x, _ = extract(model, part, view, device, args.workers, args.batch_size, amp, replace=False)
            if broken := broken_rows(x, part, which, amp):
                fail(f"--pretrained {args.pretrained}: {broken}")
            found[part] = F.normalize(x, dim=1)
    x, share = found[data], found[fitted].tensor_split(world_size())[rank()]
    runs = []
    for start in range(args.starts):
        centroids, _, inertia = kmeans(share, k, args.iterations, args.seed + start)
        lengths = centroids.square().sum(1) / 2
        ranked = torch.cat([(part @ centroids.T - lengths).topk(min(5, k), dim=1).indices for part in x.split(2**16)])
        cosine = F.cosine_similarity(x, centroids[ranked[:, 0]], dim=1)
        runs.append((inertia, start, ranked.cpu().numpy(), cosine.cpu().numpy()))
    best = min(runs, key=lambda run: run[:2])
    runs.remove(best)
    return data, fitted, view, meta, [best[2], *(run[2] for run in runs)], best[3], x.cpu().numpy(), k


def main(args):
    device = start_device(args)
    amp, _, dtype = precision(args.precision, device)
    known = {} if args.pretrained == "random" else load_file(args.pretrained, "--pretrained", args.trust_pickle)
    own = isinstance(known, dict) and "classifier" in known
    if own and (args.clusters or args.features):
        flag = "--clusters" if args.clusters else "--features"
        fail(f"{flag}: {args.pretrained} has clusters of its own; for the k-means of its network give its backbone.pt")
    find = own_clusters if own else kmeans_clusters
    data, fitted, view, meta, runs, typical, x, k = find(args, device, amp, dtype)

    rows = np.array([i for i in range(len(data)) if i not in data.undecodable])
    clusters, sizes = runs[0][:, 0], np.bincount(runs[0][:, 0], minlength=k)
    result = facts(args, meta, fitted, data) | {"clusters": k, "own": own, "sizes": sizes.tolist()}
    print0(f"sizes       {sizes.min():,} to {sizes.max():,} images, {(sizes == 0).sum()} clusters empty")
    if x is not None and (value := silhouette(x, clusters)) is not None:
        result["silhouette"] = round(value, 4)
        print0(f"silhouette  {value:.4f}")
    what, labels, names = "clusters of the file" if own else f"best of {len(runs)} k-means", None, class_names(data)
    if data.labels is not None:
        ids, labels = np.unique(np.asarray(data.labels)[rows], return_inverse=True)
        scores = [agreement(labels, ranked, k) for ranked in runs]
        result["best"] = {name: round(value, 3) for name, value in scores[0][0].items()}
        print0(f"{'best':<12}" + "   ".join(f"{name} {value:.2f}" for name, value in scores[0][0].items()))
        if len(runs) > 1:
            table = {name: [found[name] for found, _ in scores] for name in scores[0][0]}
            spread = {name: (np.mean(values), np.std(values, ddof=1)) for name, values in table.items()}
            result["starts"] = {n: {"mean": round(m, 3), "std": round(s, 3)} for n, (m, s) in spread.items()}
            print0("starts      " + "   ".join(f"{n} {m:.2f} +- {s:.2f}" for n, (m, s) in spread.items()))
        matched, names = scores[0][1][clusters], {i: names[int(c)] for i, c in enumerate(ids)}
        what += f", acc {scores[0][0]['acc']:.2f} %"
        result |= by_class(args, "cluster", what, ids[labels], np.where(matched < 0, -1, ids[matched]), data, data)
    if is_main():
        out = make_folder(result_folder(args.pretrained, args.out))
        with atomic(out / "clusters.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "cluster", "probability" if own else "cosine"])
            for i, c, value in zip(rows.tolist(), clusters.tolist(), typical.tolist(), strict=True):
                writer.writerow([data.path(i), c, f"{value:.6g}"])
        title = f"{meta['method']}, {meta['arch']}: {what}"
        draw_sheet(out / "clusters.png", data, rows, view, clusters, typical, labels, names, args.images, title)
        print0(f"clusters    {out / 'clusters.csv'}, {out / 'clusters.png'}")
    return report(args, "cluster", result)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
