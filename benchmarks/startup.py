"""Time until a data set of a million files is known: the first start, a later one, and torchvision's ImageFolder.

    python benchmarks/startup.py --entries 1000000

Makes a tree of --entries empty files in a thousand class folders, and an archive of as many members, below --where and
removes both again. Before any time is printed, all ways must have found the same images.
"""

import io
import os
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, machine, measure, parser, table
from common.datasets import open_dataset


def main():
    flags = parser(__doc__, repeats=5, device=False)
    flags.add_argument("--entries", type=int, default=1_000_000)
    flags.add_argument("--where", default=tempfile.gettempdir())
    args = flags.parse_args()
    print(machine())
    folder = Path(tempfile.mkdtemp(dir=args.where))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i // 1000}.JPEG" for i in range(args.entries)]
        data, tar = folder / "data", folder / "train.tar"
        for c in range(min(1000, args.entries)):
            (data / f"train/n{c:08d}").mkdir(parents=True)
        with tarfile.open(tar, "w") as archive:
            for name in names:
                open(data / "train" / name, "w").close()
                info = tarfile.TarInfo(name)
                info.size = 1
                archive.addfile(info, io.BytesIO(b"x"))
        time.sleep(2.1)  # a folder that has just changed is not cached
        ways = {
            "folder": lambda: open_dataset(data, "train"),
            "archive": lambda: open_dataset(tar, "train"),
            "torchvision ImageFolder": lambda: torchvision.datasets.ImageFolder(str(data / "train")),
        }
        ours, found = ("folder", "archive"), {}

        def job(way):
            return lambda: found.update({way: ways[way]()})

        times = measure({f"{way}, first start": job(way) for way in ours}, 1, clock(args))
        later = {f"{way}, later start" if way in ours else way: job(way) for way in ways}
        times |= measure(later, args.repeats, clock(args), warm_up=True)
        theirs = [os.path.relpath(path, data / "train") for path, _ in found["torchvision ImageFolder"].samples]
        for images in (theirs, *(found[way].names.strings() for way in ours)):
            if sorted(images) != sorted(names):
                sys.exit("error: not all ways find the same images")
        print(f"{args.entries:,} images in 1,000 folders")
        table(times, "s")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
