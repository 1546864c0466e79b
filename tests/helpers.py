"""What several test files share: the scripts, tiny flags for each, ways to run them, numbers and images."""

import concurrent.futures
import difflib
import importlib
import io
import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.vit import vit

ROOT = Path(__file__).resolve().parent.parent

# Pre-training scripts and what they need beside TINY to run in seconds.
SCRIPTS = {
    "simsiam": ["--dim", "32", "--pred-dim", "8"],
    "simclr": ["--dim", "16"],
    "nnclr": "--dim 16 --hidden-dim 32 --pred-dim 32 --queue 40".split(),
    "simclrv2": ["--dim", "16", "--memory", "40"],
    "barlowtwins": ["--hidden-dim", "32", "--dim", "24"],
    "vicreg": ["--hidden-dim", "32", "--dim", "16"],
    "lejepa": "--arch vit_tiny --width 0.125 --depth 2 --local-crops 1 --hidden-dim 32 --dim 16 --slices 8".split(),
    "byol": ["--dim", "16", "--hidden-dim", "32"],
    "moco": ["--dim", "16", "--queue", "40"],
    "moco_ft": ["--dim", "16", "--queue", "40"],
    "mocov3": ["--dim", "16", "--hidden-dim", "32"],
    "deepcluster": ["--clusters", "6", "--pca-dim", "8", "--reweight"],
    "npid": ["--dim", "16", "--temperature", "0.25"],
    "swav": "--dim 16 --crops 2 1 --sizes 16 12 --prototypes 8 --freeze-steps 2 --queue 24 --queue-epoch 0".split(),
    "scan": "--pretrained random --clusters 5 --neighbours 4 --heads 2".split(),
    "obow": "--image-size 24 --words 32 --patches 2".split(),
    "deepclusterv2": "--dim 16 --hidden-dim 32 --crops 2 1 --sizes 16 12 --prototypes 6 5 6 --iterations 3".split(),
    "selav2": "--dim 16 --hidden-dim 32 --crops 2 1 --sizes 16 12 --prototypes 6 5 6 --freeze-steps 2".split(),
    "odc": "--dim 16 --hidden-dim 32 --clusters 4 --min-cluster 8 --centroid-every 2".split(),
    "densecl": ["--dim", "16", "--queue", "40"],
    "directclr": [],
    "interclr": "--dim 16 --queue 40 --clusters 4 --min-cluster 8 --centroid-every 2 --negatives 6 --pool 20".split(),
    "pixpro": ["--dim", "16", "--hidden-dim", "32", "--instance-weight", "1", "--image-size", "24"],
    "protoclr": ["--arch", "conv4"],
    "rotation_pred": [],
    "relative_loc": ["--hidden-dim", "32", "--image-size", "32"],
    "dino": "--arch vit_tiny --width 0.125 --depth 2 --local-crops 2 --out-dim 24 --hidden-dim 16"
    " --bottleneck-dim 8".split(),
    "simdino": "--arch vit_tiny --width 0.125 --depth 2 --local-crops 2 --out-dim 8 --hidden-dim 16".split(),
    "esvit": "--arch swin_tiny --width 0.125 --local-crops 2 --out-dim 24 --hidden-dim 16 --bottleneck-dim 8".split(),
    "ibot": "--arch vit_tiny --width 0.125 --depth 2 --local-crops 1 --out-dim 24 --hidden-dim 16 --bottleneck-dim 8"
    " --drop-path 0.2".split(),
    "mae": "--arch vit_tiny --width 0.25 --depth 2 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2".split(),
    "ijepa": "--arch vit_tiny --width 0.25 --depth 2 --predictor-depth 1 --group 4".split(),
    "simmim": "--arch vit_tiny --width 0.25 --depth 2".split(),
    "maskfeat": "--arch vit_tiny --width 0.25 --depth 2".split(),
    "cae": "--arch vit_tiny --width 0.25 --depth 2 --regressor-depth 1 --decoder-depth 1 --target kmeans"
    " --codebook 8".split(),
}
TINY = "--data fake:64 --arch resnet18 --width 0.125 --image-size 16 --batch-size 16 --epochs 4 --warmup-epochs 1"
TINY += " --workers 2 --log-every 1 --knn-every 0 --seed 3"
SHIPPED = dict(SCRIPTS)  # also where the tests are run for a copy alone
SMALL = ("resnet18", 0.125, 16)  # the arguments of `resnet` for a backbone of that kind
EXACT = ["--precision", "fp64"]


def only(script, words=""):
    """Makes SCRIPTS this one script, a copy that somebody works on, with the tiny flags of the page that it resembles
    most, as far as it still has them, and then with these words."""
    text = (ROOT / f"{script}.py").read_text()
    lines = {name: (ROOT / f"{name}.py").read_text().splitlines() for name in SHIPPED}

    def likeness(name):
        return difflib.SequenceMatcher(None, lines[name], text.splitlines(), autojunk=False).ratio()

    known, tiny, flag = text + (ROOT / "common/args.py").read_text(), [], ""
    for word in SHIPPED[max(lines, key=likeness)]:
        flag = word if word.startswith("--") else flag
        tiny += [word] * (f'"{flag}"' in known)
    SCRIPTS.clear()
    SCRIPTS[script] = [*tiny, *words.split()]


# ------------------------------------------------------------------------------------------------------ running
def parsed(script, *words):
    """The arguments of a script, with a data set unless the words name one."""
    words = [str(w) for w in words]
    return importlib.import_module(script).parse_args(words if "--data" in words else ["--data", "fake:64", *words])


def main(script, *words):
    """Runs a script in this process with exactly these words; returns what its main returns."""
    module = importlib.import_module(script)
    return module.main(module.parse_args([str(w) for w in words]))


def flags(script, out, *more):
    return [*TINY.split(), *SCRIPTS[script], "--out", str(out), *map(str, more)]


def train(script, out, *more):
    """Runs a pre-training script in this process with tiny flags; returns the state that it saved."""
    main(script, *flags(script, out, *more))
    return state(out)


def start_of(*words, processes=1):
    """The command line that starts a script."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=localhost:0"]
    return [sys.executable, *(torchrun if processes > 1 else []), *map(str, words)]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def command(*words, processes=1, check=None, env=None, timeout=300, **more):
    """Runs a script as a user does. Returns the finished process with stdout and stderr as text."""
    settings = {"cwd": ROOT, "capture_output": True, "text": True, "env": environment(**(env or {})), **more}
    done = subprocess.run(start_of(*words, processes=processes), timeout=timeout, check=False, **settings)
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def launch(*jobs, processes=2):
    """Runs scripts one after the other in one launch of several processes. jobs: (script, words) each."""
    jobs = [[script, [str(w) for w in words]] for script, words in jobs]
    return command("tests/run_scripts.py", json.dumps(jobs), processes=processes, check=0, timeout=600)


def refused(capsys, function, *args, **kwargs):
    """The one line on stderr with which function(*args) ends with code 2; of a script: refused(capsys, main, "mae")."""
    capsys.readouterr()
    code = None
    try:
        function(*args, **kwargs)
    except SystemExit as stop:
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
    return message


def as_processes(monkeypatch, module, function, *parts):
    """[function(*part) for part in parts], each on a process of its own as far as the collectives of `module` tell.

    Threads play the processes: what one hands to a collective is joined with what the others do, with gradient. So the
    gradient of the mean of losses is what DistributedDataParallel's average is with those of common/distributed.py.
    """
    count, own, given = len(parts), threading.local(), {}
    barrier = threading.Barrier(count, timeout=60)

    def collective(join):
        def of_all(tensor):
            given[own.rank] = tensor
            barrier.wait()
            tensors = [given[i] for i in range(count)]
            barrier.wait()
            return join(tensors)

        return of_all

    def process(i):
        own.rank = i
        return function(*parts[i])

    there = {"rank": lambda: own.rank, "world_size": lambda: count, "all_reduce": collective(sum)}
    there |= {"gather": collective(torch.cat), "process_mean": collective(lambda all: sum(all).detach() / count)}
    with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor(count) as threads:
        for name in there.keys() & vars(module).keys():
            patch.setattr(module, name, there[name])
        return list(threads.map(process, range(count)))


# ------------------------------------------------------------------------------------------------ what runs leave
def state(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def logged(out, name="log.jsonl"):
    """All records of a log."""
    return [json.loads(line) for line in (Path(out) / name).read_text().splitlines()]


def records(out, name="log.jsonl"):
    """{step: record} of the training steps of a log."""
    return {r["step"]: r for r in logged(out, name) if "loss" in r}


def tensors(value, name=""):
    """All tensors and numbers of a nested state, by path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in tensors(item, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in tensors(item, f"{name}/{i}").items()}
    if isinstance(value, (torch.Tensor, int, float)):
        return {name: torch.as_tensor(value)}
    return {}


def different(a, b, but=()):
    """Paths of what is not bit-equal in two nested states. but: endings of paths that may differ."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and a
    return [name for name in a if not torch.equal(a[name], b[name]) and not name.endswith(tuple(but))]


def assert_close(a, b, **tolerance):
    """Two nested states agree but for rounding."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def pairs(names, targets):
    """(name in a network, name in its moving average) of what both have. targets: {prefix: prefix of the average}."""
    return [(n, new + n.removeprefix(old)) for n in names for old, new in targets.items() if n.startswith(old)]


# --------------------------------------------------------------------------------------------- numbers and images
def rows(*shape, seed=None):
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(sum(shape) if seed is None else seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def unit(*shape, seed=0):
    """Rows of length one."""
    return torch.nn.functional.normalize(rows(*shape, seed=seed), dim=-1)


def photo(height, width, seed=0, grain=25):
    """Smooth colours, some hard edges and grain, as uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return (image + grain * rng.standard_normal(image.shape)).clip(0, 255).astype(np.uint8)


def encode(image, kind="JPEG", **options):
    """The bytes of a file. image: PIL, or an array that PIL takes."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def deep_png(array, kind=None):
    """The bytes of a 16-bit PNG of uint16 (H, W) or (H, W, C), which PIL writes only of grey images. kind: PNG's number
    of the colour type, where the channels alone do not tell."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    array = array.reshape(*array.shape[:2], -1)
    height, width, channels = array.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels] if kind is None else kind
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def write_images(root, names, seed=0, size=None):
    """A folder of images, each different and, without a size (height, width), of its own size. Returns root."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(*(size or (30 + 3 * (i % 5), 40 + 2 * (i % 7))), seed + i)).save(root / name)
    return root


def write_colours(root, count=6):
    """A training and a test set of two classes, each of one colour. Returns root."""
    for split in ("train", "val"):
        for c, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (40 + 150 * c,) * 3).save(root / split / name / f"{i}.png")
    return root


def write_vit(path, image_size=16, **shape):
    """The file of a tiny ViT with two blocks. Returns path."""
    torch.manual_seed(0)
    network = vit("vit_tiny", image_size, width=0.125, depth=2, **shape)
    meta = {"method": "mae", "arch": "vit_tiny", "width": 0.125, "image_size": image_size}
    meta |= {"mean": [0.5] * 3, "std": [0.5] * 3, **network.config}
    torch.save({"backbone": network.state_dict(), "meta": meta}, path)
    return path


def write_voc(root, lists=True, numbers=(30, 18)):
    """A set in Pascal VOC's layout. A class brightens its colour channel; every 7th image of a class has only difficult
    objects of it. Labels stand in lists of the classes or, without `lists`, only in the annotations. Returns {split:
    {id: labels of cat, dog and emu}}."""
    generator, names, truth = np.random.default_rng(0), ("cat", "dog", "emu"), {}
    for folder in ("JPEGImages", "ImageSets/Main", "Annotations"):
        (root / folder).mkdir(parents=True)
    for split, number in zip(("trainval", "test"), numbers, strict=True):
        truth[split] = {}
        for i in range(number):
            image = f"{split[:2]}{i:03}"
            labels = [0 if (i + c) % 7 == 6 else 1 if (i + c) % 3 == 0 else -1 for c in range(3)]
            truth[split][image] = labels
            pixels = generator.integers(0, 160, (40, 56, 3)) + 60 * (np.array(labels) >= 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"JPEGImages/{image}.jpg")
            objects = [(name, label == 0) for name, label in zip(names, labels, strict=True) if label >= 0]
            objects += [(name, True) for name, difficult in objects if not difficult]  # which changes no label
            box = f"<bndbox><ymin>2</ymin><xmin>{i + 1}</xmin><xmax>48.5</xmax><ymax>40</ymax></bndbox>"
            text = [f"<name>{name}</name><difficult>{difficult:d}</difficult>{box}" for name, difficult in objects]
            text = "".join(f"<object>{part}</object>" for part in text)
            (root / f"Annotations/{image}.xml").write_text(f"<annotation>{text}</annotation>")
        ids = list(truth[split])[::-1]  # in no order
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(ids) + "\n")
        for c, name in enumerate(names if lists else ()):
            lines = "".join(f"{image} {truth[split][image][c]:2d}\n" for image in ids)
            (root / f"ImageSets/Main/{name}_{split}.txt").write_text(lines)
    return truth
