"""What a run tells: one line for every mistake, one line per log step, log.jsonl, pictures, and a clean stop."""

import argparse
import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision
from tqdm import tqdm

from common.distributed import any_process, finish, is_main, print0, world_size
from common.optim import precision_name


def fail(message, code=2):
    """Ends the program with one line on stderr (from the main process): code 2 means the user can mend it."""
    if is_main():
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _explain(kind, error, trace):
    """The hook for errors that nobody caught: those that a user can mend become one line, others stay as they are."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        remedy = "lower --batch-size, or raise --accum, which keeps the batch but takes it in smaller parts"
        print(f"error: out of memory: {remedy}", file=sys.stderr, flush=True)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr, flush=True)
    elif isinstance(error, KeyboardInterrupt):
        print("interrupted; what was saved last is in --out", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, takes no abbreviated flags and reports a mistake in one line."""

    def __init__(self, doc, **kwargs):
        super().__init__(
            description=doc,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )
        sys.excepthook = _explain

    recipe = None  # the defaults of the script that runs, by flag

    def parse_args(self, args=None, namespace=None):
        Parser.recipe = {action.dest: action.default for action in self._actions}
        for action in self._actions:  # a default is shown only where there is a text
            action.help = action.help or action.dest.replace("_", " ")
        return super().parse_args(args, namespace)

    def error(self, message):
        fail(f"{message} (try: python {self.prog} --help)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        told = "default:" in action.help or "unset:" in action.help or action.nargs == 0
        return action.help if told or action.default in (None, "") else super()._get_help_string(action)


def check_args(args):
    """Refuses values that no script can use: exit 2 and one line naming the flag."""
    positive = {"epochs", "batch_size", "accum", "log_every", "width", "lr", "crop_min", "temperature"}
    positive |= {"channels", "dim", "hidden_dim", "pred_dim", "clusters", "prototypes", "layer_decay", "head_lr"}
    positive |= {"val_every"}
    at_most_one = {"crop_min", "flip", "layer_decay", "drop_path", "erase", "smoothing"}
    most = {
        "image_size": 10_000,
        "width": 64,
        "depth": 1000,
        "decoder_depth": 1000,
        "lr": 1e9,
        "workers": 1000,
        "channels": 10_000,
        "batch_size": 10**7,
        "temperature": 1000,
    }
    most |= dict.fromkeys(("dim", "hidden_dim", "pred_dim", "decoder_dim", "pca_dim", "queue", "prototypes"), 10**9)
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"{flag} must be a finite number, not {value}")
        if not isinstance(value, (int, float)):
            continue
        if value < 0 or (value == 0 and name in positive):
            fail(f"{flag} must be {'greater than' if name in positive else 'at least'} 0, not {value}")
        if name in at_most_one and value > 1:
            fail(f"{flag} must be at most 1, not {value}")
        if value > most.get(name, value):
            fail(f"{flag} must be at most {most[name]:g}, not {value}")
        if name == "image_size" and value < 8:
            fail(f"{flag} must be at least 8, not {value}")
    if getattr(args, "momentum", 0) >= 1:
        fail(f"--momentum must be below 1, not {args.momentum}")
    if getattr(args, "warmup_epochs", 0) and args.warmup_epochs >= args.epochs:
        remedy = f"try --warmup-epochs {args.epochs // 10}"
        fail(f"--warmup-epochs {args.warmup_epochs} must be smaller than --epochs {args.epochs}: {remedy}")
    parts = world_size() * getattr(args, "accum", 1)
    if hasattr(args, "accum") and args.batch_size % parts:
        fail(
            f"--batch-size {args.batch_size} is not divisible by {world_size()} processes x --accum"
            f" {parts // world_size()}: try {max(1, round(args.batch_size / parts)) * parts}"
        )


def plain(args):
    """The arguments as a dictionary of what a checkpoint and JSON can hold."""
    return {k: v if isinstance(v, (int, float, str, type(None))) else str(v) for k, v in vars(args).items()}


class Stop:
    """Turns SIGTERM and SIGINT into a request to finish the step, save and exit with code 75."""

    CODE = 75  # EX_TEMPFAIL: run the same command again

    def __init__(self):
        self.flag = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._handle)

    def _handle(self, number, frame):
        if self.flag and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means it
        self.flag = True

    def requested(self, device):
        """The same answer on every process (a collective when there are several)."""
        return any_process(self.flag, device)


def _git_commit():
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        here = Path(__file__).resolve().parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


class Logger:
    """Writes `<out>/log.jsonl`, and a progress bar (terminal) or plain lines (anywhere else), from the main process.

    args: the script's arguments; uses out, log_every, max_steps. start: steps already done (resumed run); records of
    later steps, which that run wrote before it died, are dropped. chance: the loss of a model that has learned
    nothing, shown as a ratio. loader: its share of waiting is shown. name: of the log file, if not log.jsonl.
    """

    def __init__(self, args, loader, total, start, chance=None, name="log"):
        self.args, self.loader, self.total, self.chance = args, loader, total, chance
        self.last = min(total, args.max_steps) if args.max_steps else total
        self.recent, self.warned, self.stop = [], set(), Stop()
        self.bar = None
        self._mark(start)
        if not is_main():
            return
        self.lock = self._lock(Path(args.out) / "lock")
        self.path = Path(args.out) / f"{name}.jsonl"
        kept = []
        if start and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line).get("step", 0) <= start:
                        kept.append(line)
                except ValueError:  # the line that a killed process was writing
                    pass
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(self.path)
        shutil.copy(sys.argv[0], args.out) if sys.argv[0].endswith(".py") and Path(sys.argv[0]).exists() else None
        self._write(
            command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            args=plain(args),
            versions={
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
            commit=_git_commit(),
            processes=world_size(),
            resumed_at=start,
        )
        if start >= self.last:
            print(f"complete    all {self.last} steps were done before; another run needs another --out")
        layout = "{percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt} {remaining} left{postfix}"
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=self.last, initial=start, dynamic_ncols=True, bar_format=layout, disable=hidden)

    def _lock(self, path):
        """The file that says that a run is writing here; free again when the run ends, however it does."""
        try:
            file = open(path, "a+")
        except OSError as error:
            fail(f"--out {self.args.out} cannot be written: {error.strerror}")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            fail(f"--out {self.args.out}: {file.read() or 'another run'} is writing there; choose another --out")
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        return file

    def _mark(self, step):
        self.clock, self.step, self.waited = time.perf_counter(), step, self.loader.waited if self.loader else 0.0

    def _write(self, **record):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # someone may have removed the folder of a run
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # the run is worth more than its log
            self.warn("log", f"cannot write {self.path}: {error.strerror}")

    def due(self, step):
        """Is there something to log (and so, anything to read from the device) after this step?"""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if self.stop.flag and world_size() == 1:
            return True
        return step % self.args.log_every == 0 or step == self.last or step % self.loader.steps == 0

    def log(self, step, epoch, loss, lr, **monitors):
        """One log step. loss: the global mean, float. monitors: further floats to show (std, ...).

        Stops the run, with code 1, when the loss is not finite: nothing has been saved since the last good step.
        """
        if not math.isfinite(loss):
            last = ", ".join(f"{value:.4g}" for value in self.recent) or "none"
            fail(
                f"loss is {loss} at step {step} (lr {lr:.3g}; last losses: {last}). The last good state is in"
                f" {Path(self.args.out) / 'last.pt'} if it was saved: lower --lr, or try --precision fp32",
                code=1,
            )
        self.recent = [*self.recent[-4:], loss]
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        speed = (step - self.step) * self.args.batch_size / seconds
        wait = (self.loader.waited - self.waited) / seconds
        record = {"step": step, "epoch": round(epoch, 4), "loss": loss, "lr": lr, "images_per_s": round(speed, 1)}
        record |= {"wait": round(wait, 3), **monitors, "memory_gb": round(_memory(), 2)}
        self._mark(step)
        if not is_main():
            return
        self._write(**record)
        shown = {"loss": f"{loss:.4f}"} | ({"of chance": f"{loss / self.chance:.0%}"} if self.chance else {})
        shown |= {"img/s": f"{speed:.0f}", **{k: f"{v:.3f}" for k, v in monitors.items()}, "lr": f"{lr:.4g}"}
        shown |= {"data wait": f"{wait:.0%}", "mem": f"{record['memory_gb']:.1f}G"}
        text = "  ".join(f"{k} {v}" for k, v in shown.items())
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        if self.bar.disable or step % self.loader.steps == 0:  # a bar leaves one line per epoch
            tqdm.write(f"epoch {epoch:.2f}  step {step}/{self.last}  {text}", file=sys.stdout)
            sys.stdout.flush()
        if monitors.get("std", 1) < 0.1:
            self.warn(
                "collapse",
                f"std {monitors['std']:.3f}: the outputs of all images are nearly equal (collapse). Lower --lr,"
                " check --batch-size, and look at views.png",
            )
        if self.chance and epoch >= 5 and loss > 0.99 * self.chance:
            self.warn(
                "chance",
                f"after {epoch:.0f} epochs the loss is still that of a network that learned nothing: look at views.png"
                " (can you tell which views belong together?), lower --lr, see the small images in the docstring",
            )
        if wait > 0.2 and step > 20:
            self.warn(
                "wait",
                f"{wait:.0%} of the time is spent waiting for images: raise --workers (now {self.args.workers}),"
                " move the images to a faster disk, or store them smaller",
            )

    def note(self, step, **values):
        """Something measured between steps (k-NN accuracy, clusters in use ...): a line and a record."""
        self._mark(step)  # the time it took does not count as training
        if not is_main() or not values:
            return
        self._write(step=step, **values)
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        tqdm.write(f"step {step}: {text}", file=sys.stdout)
        sys.stdout.flush()

    def warn(self, kind, message):
        """Once per kind."""
        if kind not in self.warned and is_main():
            self.warned.add(kind)
            tqdm.write(f"warning: {message}", file=sys.stderr)

    def end(self, step):
        """Ends the program after a signal; everything has been saved."""
        self.close()
        print0(f"stopped at step {step}, all saved in {self.args.out}: run the same command again to continue")
        finish()
        raise SystemExit(Stop.CODE)

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.lock.close()
            if self.step >= self.total and self.path.stem == "log":
                print(f"complete    {self.args.out}/backbone.pt is what eval_*.py, features.py and export.py take")


def report(args, name, result):
    """The end of an evaluation: writes `<out>/eval_<name>.json` and prints the result as the last line, as JSON.

    args: the script's arguments; the folder is args.out, else that of args.pretrained (runs/random for "random").
    """
    if not is_main():
        return
    out = Path(args.out or ("runs/random" if str(args.pretrained) == "random" else Path(args.pretrained).parent))
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f"eval_{name}.tmp"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(out / f"eval_{name}.json")
    print(json.dumps(result), flush=True)


def output_std(z):
    """Collapse monitor: the standard deviation of the normalised outputs (B, D) over the batch, averaged over
    dimensions, times sqrt(D). 1: spread evenly over the sphere; 0: all images give the same output."""
    return torch.nn.functional.normalize(z.detach().float(), dim=1).std(0).mean() * z.shape[1] ** 0.5


def _memory():
    """Peak GB of device memory on CUDA, current resident GB of the process on the CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (OSError, ValueError):
        return 0.0


def rgb(x, mean, std):
    """Images (B, C, H, W) in [0, 1] as a picture can show them, (B, 3, H, W): the first three channels, or the first in
    grey. Where these use less than half of the range (12 bits stored in 16), the largest mean + 3 std becomes white."""
    count = 3 if x.shape[1] >= 3 else 1
    white = max(m + 3 * s for m, s in zip(mean[:count], std[:count], strict=True))
    x = x[:, :count] / (white if white < 0.5 else 1)
    return x.expand(-1, 3, -1, -1).clamp(0, 1)


def save_views(path, batch, count=8):
    """PNG of the first samples of a batch: a column per sample, a row per view, as the network sees them."""
    if not is_main():
        return
    rows = []
    for x, view in zip(batch.views(), batch.recipes, strict=True):
        x = x[:count].float().cpu()
        x = x * torch.tensor(view.std).view(1, -1, 1, 1) + torch.tensor(view.mean).view(1, -1, 1, 1)
        size = max(96, x.shape[-1])  # small images are enlarged without smoothing, so that their pixels can be seen
        shown = rgb(x, view.mean, view.std)
        rows.append(torch.nn.functional.interpolate(shown, (size, size), mode="nearest"))
    size = max(c.shape[-1] for c in rows)
    rows = [torch.nn.functional.pad(c, (0, size - c.shape[-1], 0, size - c.shape[-1]), value=1.0) for c in rows]
    grid = torchvision.utils.make_grid(torch.cat(rows), nrow=len(rows[0]), padding=4, pad_value=1.0)
    temporary = Path(path).with_suffix(".tmp.png")
    torchvision.utils.save_image(grid, temporary)
    temporary.replace(path)


def describe(args, data, loader, model, **lines):
    """The block printed before the first step: what will happen, in numbers."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    steps = loader.steps * args.epochs
    classes, labels = getattr(data, "classes", None), getattr(data, "labels", None)
    kind = f"in {len(classes)} classes" if classes else "with labels" if labels is not None else "without labels"
    images = f"{len(data):,} images {kind}"
    print0(f"data        {args.data}: {images}, {loader.steps} steps x {args.epochs} epochs = {steps:,} steps")
    print0(f"batch       {args.batch_size} = {world_size()} processes x {args.accum} micro-batches x {loader.local}")
    device = next(model.parameters()).device
    size = f"width {args.width:g}, {args.image_size} px, {parameters:.2f} M trained parameters"
    print0(f"model       {args.arch}, {size}, {precision_name(args.precision, device)} on {device.type}")
    for name, text in lines.items():
        print0(f"{name:<11} {text}")
    usual = (Parser.recipe or {}).get("batch_size")
    if usual and not usual / 4 <= args.batch_size <= usual * 4:
        print0(f"note        batch {args.batch_size} is far from the recipe's {usual}: --lr may need more than scaling")
    if args.image_size <= 64 and args.arch.startswith("resnet"):
        crops = getattr(args, "crop_min", None)
        crops = f", crops of at least {crops:.0%} (--crop-min)" if isinstance(crops, float) else ""
        print0(f"note        images of at most 64 px: 3x3 stem without pooling, no blur{crops}")
    with contextlib.suppress(Exception):  # an image that cannot be decoded is told later
        height, width = data[0][0].shape[1:]
        if 2 * max(height, width) <= args.image_size:
            less = (args.image_size / max(height, width)) ** 2
            remedy = f"--image-size {max(height, width)} loses nothing and computes {less:.0f} times less"
            print0(f"note        the first image has {height} x {width} pixels: {remedy}")
    print0(f"output      {args.out}")
