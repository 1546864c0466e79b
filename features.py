"""Features of all images of a data set as a NumPy file.

    python features.py --pretrained runs/simsiam/backbone.pt --data /imagenet
    torchrun --nproc_per_node=8 features.py --pretrained runs/simsiam/backbone.pt --data /imagenet --split train --fp16
    python features.py --pretrained random --arch resnet18 --data digits --split train --features feat4 feat5

Written to --out, features/ beside the checkpoint by default:
    features.npy    (N, D) in the order of the data set, float32 (--fp16: half), written as it is computed: it may be
                    larger than memory. With several --features a file each: features_feat4.npy, features_feat5.npy
    paths.txt       the path of each row, one per line (a line break in a name is written as a backslash and n)
    labels.npy      (N,) int64, where there are labels: the numbers in a list, else those of the names in order

Images are seen as in the other evaluations: shorter side to 256, central 224 x 224 pixels (images of at most 64 pixels:
no margin). The row of one that cannot be decoded, which a warning names, is not a number (NaN) in all columns. The rows
do not depend on the number of processes. RankMe, the effective rank, and alpha, the slope of the spectrum, are printed
of at most 10,000 evenly spaced rows: measures without labels, to compare networks of one width with each other.
visualize.py draws pictures of the features.
"""

import common.interrupt  # noqa: F401 (before torch)
import contextlib
import shutil
import sys

import numpy as np
import torch

from common.args import Parser, fail, positive, toggle
from common.augment import EvalView
from common.checkpoint import load_pretrained
from common.datasets import only_numbers, open_split
from common.distributed import any_process, barrier, end_processes, is_main, print0
from common.features import Features, spectrum, usual_interpolation
from common.files import atomic, make_folder, result_folder, temporary
from common.loader import agree_on_undecodable, eval_batches, eval_share
from common.log import bar
from common.optim import or_precise, precision
from common.run import start_device


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_pretrained()
    group = parser.add_argument_group("features")
    group.add_argument("--split", choices=["train", "val"], help="default: val, or all images of an undivided folder")
    group.add_argument("--features", nargs="+", help="feat1 ... feat5, or cls and mean (default: the pooled output)")
    group.add_argument("--fp16", action=toggle, default=False, help="store half floats")
    group.add_argument("--batch-size", type=positive(int), default=256, help="images per process and forward pass")
    return parser.parse_args(argv)


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
    progress = bar(total=last - first, unit="image")
    for x, _, rows in eval_batches(dataset, view, args.batch_size, device, args.workers, dtype):
        with amp or contextlib.nullcontext():
            features = model(x).to(storage)
        overflow |= not torch.isfinite(features).all()
        for array, part in zip(arrays, features.cpu().split(model.dims, 1), strict=True):
            array[rows.numpy()] = part.numpy()
        progress.update(len(rows))
    progress.close()
    try:
        agree_on_undecodable(dataset, device)
    except SystemExit:  # all of them
        for file in files:
            temporary(file).unlink(missing_ok=True)
        raise
    missing = sorted(i for i in dataset.undecodable if first <= i < last)
    for array in arrays:
        array[missing] = np.nan
        array.flush()
    if any_process(overflow, device):  # here every process waits for the others
        for file in files:
            temporary(file).unlink(missing_ok=True)
        remedy = "leave --fp16 out" if args.fp16 else f"its weights or an image are damaged{or_precise(amp)}"
        fail(f"--pretrained {args.pretrained}: some features are not finite: {remedy}")
    if is_main():
        for file, shape in zip(files, shapes, strict=True):
            temporary(file).replace(file)
            rows = np.load(file, mmap_mode="r")[:: -(-shape[0] // 10_000)].astype(np.float32)
            measures = spectrum(torch.from_numpy(rows[~np.isnan(rows).any(1)]))
            text = "".join(f"   {name} {value:.4g}" for name, value in measures.items())
            print0(f"{file}: {shape[0]:,} x {shape[1]:,}, {kind}{text}")
        if missing := sorted(dataset.undecodable):
            rows = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
            print0(f"note: {len(missing):,} rows are NaN, their images cannot be decoded: {rows}")


def write_paths(out, dataset):
    """paths.txt and, where there are labels, labels.npy."""
    with atomic(out / "paths.txt") as path:
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.writelines(dataset.path(i).replace("\n", "\\n") + "\n" for i in range(len(dataset)))
    print0(f"{out / 'paths.txt'}: {len(dataset):,} lines")
    if dataset.labels is None:
        (out / "labels.npy").unlink(missing_ok=True)  # of another data set
        return
    labels, classes = np.asarray(dataset.labels, dtype=np.int64), dataset.classes
    if classes and only_numbers(classes) and max(map(len, classes)) < 19:  # those of a list, not their places
        labels = np.array([int(name) for name in classes], np.int64)[labels]
    with atomic(out / "labels.npy") as path:
        np.save(path, labels)
    print0(f"{out / 'labels.npy'}: {len(dataset):,} labels, {len(np.unique(dataset.labels)):,} classes")


def main(args):
    device = start_device(args)
    backbone, meta = load_pretrained(args)
    amp, _, dtype = precision(args.precision, device)
    model = Features(backbone, args.features).to(device, dtype, memory_format=torch.channels_last)
    how = {"interpolation": usual_interpolation(backbone), "mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    view = EvalView(meta["image_size"], **how)
    dataset = open_split(args, meta["channels"])
    print0(f"data        {args.data}: {len(dataset):,} images, {view.size} px, {', '.join(model.names)}")
    out = make_folder(args.out or result_folder(args.pretrained) / "features")
    many = len(model.names) > 1
    files = [out / f"features{f'_{name}' if many else ''}.npy" for name in model.names]
    write_features(files, model, dataset, view, device, args, amp)
    end_processes()
    if is_main():
        write_paths(out, dataset)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
