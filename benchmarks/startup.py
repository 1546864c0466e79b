"""Time until a data set of a million files is known: the first start, a later one, and torchvision's ImageFolder.

    python benchmarks/startup.py --entries 1000000

Makes a tree of --entries empty files in a thousand class folders, and an archive of as many members, below --where and
removes both again. The lists of all ways are compared before any time is printed.
"""

import argparse
import io
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.ema_lars import machine
from common.data import build


def timed(function):
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--where", default=tempfile.gettempdir())
    args = parser.parse_args()
    print(machine(torch.device("cpu")))
    folder = Path(tempfile.mkdtemp(dir=args.where))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i // 1000}.JPEG" for i in range(args.entries)]
        for c in range(min(1000, args.entries)):
            (folder / f"data/train/n{c:08d}").mkdir(parents=True)
        with tarfile.open(folder / "train.tar", "w") as archive:
            for name in names:
                open(folder / "data/train" / name, "w").close()
                info = tarfile.TarInfo(name)
                info.size = 1
                archive.addfile(info, io.BytesIO(b"x"))
        time.sleep(2.1)  # a folder that has just changed is not cached
        data, tar = folder / "data", folder / "train.tar"
        rows = {"folder, first start": [timed(lambda: build(data, "train"))]}
        rows["archive, first start"] = [timed(lambda: build(tar, "train"))]
        later = {
            "folder, later start": lambda: build(data, "train"),
            "archive, later start": lambda: build(tar, "train"),
        }
        later["torchvision ImageFolder"] = lambda: torchvision.datasets.ImageFolder(str(data / "train"))
        for name, function in later.items():
            rows[name] = []
            function()
        for _ in range(args.repeats):
            for name, function in later.items():
                rows[name].append(timed(function))
        expected = [os.path.relpath(path, data / "train") for path, _ in rows["torchvision ImageFolder"][0][1].samples]
        for name, results in rows.items():
            dataset = results[0][1]
            found = dataset.names.strings() if hasattr(dataset, "names") else expected
            if sorted(found) != sorted(expected) or len(found) != args.entries:
                sys.exit(f"error: {name} finds other images")
        print(f"{args.entries:,} images in 1,000 folders")
        print(f"{'':28}{'median s':>10}{'min-max s':>16}")
        for name, results in rows.items():
            seconds = [t for t, _ in results]
            spread = f"{min(seconds):.2f}-{max(seconds):.2f}" if len(seconds) > 1 else ""
            print(f"{name:28}{statistics.median(seconds):>10.2f}{spread:>16}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
