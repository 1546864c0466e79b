"""Curves of one or several runs in one picture: loss, accuracy, std of the outputs and learning rate by epoch.

    python plot.py runs/simclr runs/moco runs/byol --out curves.png
    python plot.py results/cifar10_subset/*.jsonl

A run is its folder, of which log.jsonl and the logs of evaluations that train (finetune.jsonl, semi.jsonl) are drawn,
or one such file. A line per run is printed, with the last and the best accuracy. Needs matplotlib.
"""

import common.interrupt  # noqa: F401 (before torch)
import contextlib
import json
import math
import sys
from pathlib import Path

from common.args import Parser, fail
from common.files import atomic, make_folder

PANELS = {  # keys of the records: title
    ("loss",): "loss (of different methods: not comparable)",
    ("knn", "top1"): "k-NN or test accuracy, %",
    ("std",): "std of the outputs (1: spread, 0: collapsed)",
    ("lr",): "learning rate",
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a log of one")
    parser.add_argument("--out", default="runs/plot.png", help="the picture, .png, .pdf or .svg")
    args = parser.parse_args(argv)
    if Path(args.out).suffix.lower() not in (".png", ".pdf", ".svg"):
        parser.error(f"--out {args.out} must end in .png, .pdf or .svg")
    return args


def find_logs(run):
    """The logs of a run folder, or the file itself; ends the program where there is none."""
    path = Path(run)
    if not path.is_dir():
        return [path] if path.is_file() else fail(f"{run}: no such run folder")
    logs = [log for log in sorted(path.glob("*.jsonl")) if log.name != "evaluations.jsonl"]
    below = ", ".join(sorted(str(log.parent) for log in path.glob("*/log.jsonl"))[:3])
    return logs or fail(f"{run} holds no log.jsonl" + (f"; name the runs in it: {below} ..." if below else ""))


def read_log(path):
    """{key: [(epoch, value), ...]} of a log, in the order of the steps. Records of what was measured between two steps
    have no epoch, which follows from the others; a line cut short, of a process that was killed, is left out."""
    records, curves = {}, {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.setdefault(record["step"], {}).update(record)  # of a step that was done twice, the later one
    rates = [record["epoch"] / step for step, record in records.items() if step and record.get("epoch")]
    for step, record in sorted(records.items()):
        epoch = record.get("epoch", step * rates[-1] if rates else None if step else 0.0)
        for key, value in record.items() if epoch is not None else ():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(key, []).append((epoch, value))
    return curves if curves.keys() & {*sum(PANELS, ())} else fail(f"{path} holds no record of a run yet: leave it out")


def label_logs(paths):
    """What each log is called: as its run folder, with the file's name behind it where that is not log.jsonl, and with
    as much of the path before it as tells them apart."""
    parts = [path.resolve().with_suffix("").parts for path in paths]
    folders, shared = [p[:-1] if p[-1] == "log" else p for p in parts], 0
    parts = folders if len({*folders}) == len(parts) else parts  # x.jsonl beside x/log.jsonl
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def summary(curves):
    text = f"epoch {max(c[-1][0] for c in curves.values()):.4g}"
    for key, name in {"loss": "loss", "knn": "k-NN", "top1": "top-1"}.items():
        if values := [value for _, value in curves.get(key, ())]:
            text += f", {name} {values[-1]:.4g}" + ("" if key == "loss" else f" (best {max(values):.4g})")
    return text


def draw(path, runs):
    """A panel for each of PANELS and one legend. runs: {name: curves as from `read_log`}."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure((13, 8.5), layout="constrained")
    axes, colours = figure.subplots(2, 2), colormaps["tab10" if len(runs) <= 10 else "tab20"].colors
    looks = [{"color": colours[i % len(colours)], "linestyle": ["-", "--", ":"][i // 20 % 3]} for i in range(len(runs))]
    for axis, (keys, title) in zip(axes.flat, PANELS.items(), strict=True):
        found = [next((curves[key] for key in keys if key in curves), []) for curves in runs.values()]
        for points, look in zip(found, looks, strict=True):
            look |= {"marker": "o" if len(points) < 40 else None, "ms": 3, "lw": 1.3}  # one point alone has no line
            axis.plot([e for e, _ in points], [v for _, v in points], **look)
        sizes = sorted(abs(value) for points in found for _, value in points) or [0]
        axis.set_yscale("symlog" if "loss" in keys and sizes[-1] > 30 * sizes[len(sizes) // 2] else "linear")
        axis.set(title=title if any(found) else f"{title}: not in these logs", xlabel="epoch")
        axis.set_ylim(bottom=0 if {"std", "lr"} & {*keys} else None)
        axis.grid(alpha=0.3)
    figure.legend(axes[0, 0].lines, runs, loc="outside lower center", ncols=min(5, len(runs)), frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def main(args):
    paths = list(dict.fromkeys(path for run in args.runs for path in find_logs(run)))
    runs = {name: read_log(path) for name, path in zip(label_logs(paths), paths, strict=True)}
    for name, curves in runs.items():
        print(f"{name}: {summary(curves)}")
    make_folder(Path(args.out).parent)
    try:
        draw(args.out, runs)
    except ImportError:
        fail("plot.py needs matplotlib: pip install matplotlib")
    print(f"written     {args.out}")


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
