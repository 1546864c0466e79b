"""The output of a run: an opening block, one line per log step, log.jsonl, warnings, a clean stop; results as JSON."""

import contextlib
import hashlib
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

import numpy as np
import torch
import torchvision
from tqdm import tqdm

from common.args import fail
from common.distributed import any_process, end_processes, is_main, print0, world_size
from common.files import atomic, make_folder, result_folder
from common.images import DECODER
from common.optim import precision_name

try:
    import fcntl  # a platform without it loses the lock of the run folder, not the program
except ImportError:
    fcntl = None

FAKE = "fake images: their classes are tints, which any network tells apart, so that accuracies mean nothing"


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

    def end(self, step, where, resume=True):
        """Ends the program after a signal; everything has been saved in `where`, from which `resume` will continue."""
        again = "run the same command again" if resume else "run the same command without --no-resume"
        print0(f"stopped at step {step}, all saved in {where}: {again} to continue")
        end_processes()
        raise SystemExit(self.CODE)


def cores():
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loading_threads(args):
    """Loading threads of all processes on this machine."""
    return args.workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _git_commit():
    command, here = ["git", "describe", "--always", "--dirty", "--abbrev=12"], Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10).stdout.strip() or None


class Logger:
    """Writes `<out>/log.jsonl`, and a progress bar (terminal) or plain lines (anywhere else), from the main process.

    args: the script's arguments; uses out, log_every, max_steps. start: steps already done (resumed run); records of
    later steps, which that run wrote before it died, are dropped. chance: the loss of a model that has learned
    nothing, shown as a ratio. loader: its share of waiting is shown. name: of the log file, if not log.jsonl.
    """

    def __init__(self, args, loader, total, start, chance=None, name="log"):
        self.args, self.loader, self.total, self.chance = args, loader, total, chance
        self.last = min(total, args.max_steps) if args.max_steps else total
        self.recent, self.warned, self.stop, self.bar = [], set(), Stop(), None
        self._mark(start)
        if not is_main():
            return
        self.lock = self._lock(Path(args.out) / "lock")
        self.path = Path(args.out) / f"{name}.jsonl"
        kept = []
        for line in self.path.read_text().splitlines() if start and self.path.exists() else ():
            with contextlib.suppress(ValueError):  # of the line that a killed process was writing
                kept += [line] if json.loads(line).get("step", 0) <= start else []
        with atomic(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        script, *words = sys.argv
        if script.endswith(".py") and Path(script).exists():
            with contextlib.suppress(shutil.SameFileError):  # the copy itself was started
                shutil.copyfile(script, Path(args.out) / Path(script).name)  # not its mode, which may be read-only
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"torchvision": torchvision.__version__}
        origin = {"command": " ".join([Path(script).name, *words]), "args": args.plain(), "versions": versions}
        self._write(**origin, commit=_git_commit(), processes=world_size(), resumed_at=start)
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
            fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        return step % self.args.log_every == 0 or step == self.last or step % self.loader.epoch_steps == 0

    def log(self, step, epoch, loss, lr, **monitors):
        """One log step. loss: the global mean, float. monitors: further floats to show (std, ...).

        Stops the run, with code 1, when the loss is not finite: nothing has been saved since the last good step.
        """
        if not math.isfinite(loss):
            before = ", ".join(map("{:.4g}".format, self.recent)) or "none"
            fail(f"loss is {loss} at step {step} (lr {lr:.3g}; last losses: {before}). {self._cure(step)}", code=1)
        self.recent = [*self.recent[-4:], loss]
        monitors = {k: v for k, v in monitors.items() if not math.isnan(v)}  # of one image there is no deviation
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
        if self.bar.disable or step % self.loader.epoch_steps == 0:  # a bar leaves one line per epoch
            tqdm.write(f"epoch {epoch:.2f}  step {step}/{self.last}  {text}", file=sys.stdout)
            sys.stdout.flush()
        if monitors.get("std", 1) < 0.1:
            cure = "Lower --lr, check --batch-size, and look at views.png"
            text = f"std {monitors['std']:.3f}: the outputs of all images are nearly equal (collapse)"
            self.warn("collapse", f"{text}. {cure}")
        if self.chance and epoch >= 5 and loss > 0.99 * self.chance:
            cure = "(can you tell which views belong together?), lower --lr, see the small images in the docstring"
            text = f"after {epoch:.0f} epochs the loss is still that of a network that learned nothing"
            if hasattr(self.args, "head_lr"):  # a classifier, trained with the network
                text = f"after {epoch:.0f} epochs the loss is {loss / self.chance:.3g} times that of guessing"
                self.warn("chance", f"{text}: lower --head-lr, or --lr")
            self.warn("chance", f"{text}: look at views.png {cure}")
        if wait > 0.2 and step > 20:
            more = f"raise --workers (now {self.args.workers}), " if loading_threads(self.args) < cores() else ""
            cure = f"{more}move the images to a faster disk, or store them smaller"
            self.warn("wait", f"{wait:.0%} of the time is spent waiting for images: {cure}")

    def _cure(self, step):
        """What helps when the loss is not finite."""
        saved = Path(self.args.out) / ("last.pt" if self.path.stem == "log" else f"{self.path.stem}_last.pt")
        device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
        precise = precision_name(self.args.precision, device) in ("fp32", "fp64")
        cures = [] if step == 1 else ["lower --lr"]  # no rate has been applied before the first step
        cures += [] if precise else ["try --precision fp32"]
        cures = cures or ["it is the first step, so look for such numbers in the images and in --init"]
        state = f"The last good state is in {saved}" if saved.exists() else "No state has been saved"
        return f"{state}: {', or '.join(cures)}"

    def note(self, step, **values):
        """Something measured between steps (k-NN accuracy, clusters in use ...): a line and a record."""
        if self.bar is not None and not self.bar.disable:  # the time it took does not count as training
            self.bar.start_t += time.perf_counter() - self.clock
            self.bar.last_print_t, self.bar.last_print_n = self.bar._time(), self.bar.n
        self._mark(step)
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
        self.stop.end(step, self.args.out, self.args.resume)

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.lock.close()
            if self.step >= self.total and self.path.stem == "log":
                takers = "eval_*.py, features.py, visualize.py and export.py"
                print(f"complete    {self.args.out}/backbone.pt is what {takers} take")
            elif self.step >= self.last and self.path.stem == "log":
                how = "with a larger one" if self.args.resume else "with a larger one and without --no-resume"
                print(f"cut short   by --max-steps; all is saved in {self.args.out}: {how} the run goes on")


def bar(iterable=None, name="", total=None, **more):
    """A progress bar that leaves nothing behind, on a terminal and in the main process only."""
    hidden = not (is_main() and sys.stderr.isatty())
    return tqdm(iterable, name, total, leave=False, dynamic_ncols=True, disable=hidden, **more)


def is_fake(data):
    """Does --data name the set that is made up?"""
    return str(data).partition(":")[0] == "fake"


def fingerprint(backbone):
    """A hash of all weights and statistics."""
    digest = hashlib.sha256()
    for name, value in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def identity(args, backbone, train, test):
    """What an evaluation that goes on must have in common with what was saved: {what: hash} of the weights, and of the
    labels and a thousand file names of each data set, wherever its folder lies."""
    found = {"the weights of --pretrained": fingerprint(backbone)[:12]}
    for what, dataset in (("training", train), ("test", test)):
        rows = np.linspace(0, len(dataset) - 1, min(len(dataset), 1000)).astype(np.int64).tolist()
        names = [dataset.path(i) for i in rows]
        names = [os.path.relpath(name, args.data) for name in names] if os.path.exists(args.data) else names
        labels = b"" if dataset.labels is None else np.asarray(dataset.labels, dtype=np.int64).tobytes()
        digest = hashlib.sha256(ascii((len(dataset), names)).encode() + labels)
        found[f"the {what} images"] = digest.hexdigest()[:12]
    return found


def facts(args, meta, train, test, *notes):
    """What the result of every evaluation begins with. train, test: data sets, or anything else that has a length; the
    samples in their `undecodable` do not count. notes: what has to be known to read the figures, "" where there is
    nothing to say."""
    network = {k: meta[k] for k in ("method", "arch", "width", "image_size")}
    sizes = {"train": len(train), "test": len(test), "undecodable": 0}
    for which, part in (("train", train), ("test", test)):
        bad = len(getattr(part, "undecodable", ()))
        notes = (*notes, f"{bad:,} of {len(part):,} {which} images cannot be decoded and do not count" if bad else "")
        sizes[which] -= bad
        sizes["undecodable"] += bad
    notes = [note for note in (FAKE if is_fake(args.data) else "", *notes) if note]
    note = {"note": "; ".join(notes)} if notes else {}
    return {"pretrained": str(args.pretrained), "data": args.data} | network | sizes | note


def report(args, name, result):
    """The end of an evaluation. `eval_<name>.json` in its folder becomes this result, and `evaluations.jsonl` beside it
    gets one more line: script, time, flags and result of every evaluation so far, so that none is lost to the next one
    with other flags. The result is the last line printed, as JSON. Ends the processes and returns the result.
    args: those of the script, whose folder is that of `result_folder`."""
    if is_main():
        out = make_folder(result_folder(args.pretrained, args.out))
        with atomic(out / f"eval_{name}.json", shared=True) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        entry = {"script": f"eval_{name}", "time": time.strftime("%Y-%m-%d %H:%M:%S"), "args": args.plain()}
        line = json.dumps(entry | {"result": result}) + "\n"
        with open(out / "evaluations.jsonl", "ab", buffering=0) as file:  # in one piece: several may end at once
            file.write(line.encode())
        print(f"results     {out}/eval_{name}.json, and with all earlier ones {out}/evaluations.jsonl")
        if "note" in result:
            print(f"note        {result['note']}")
        print(json.dumps(result), flush=True)
    end_processes()
    return result


def _memory():
    """Peak GB of device memory on CUDA, current resident GB of the process on the CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    return 0.0


def describe(args, data, loader, model, **lines):
    """The block printed before the first step: what will happen, in numbers."""
    parameters, device = sum(p.numel() for p in model.parameters() if p.requires_grad), next(model.parameters()).device
    classes, labels = getattr(data, "classes", None), getattr(data, "labels", None)
    kind = f"in {len(classes)} classes" if classes else "with labels" if labels is not None else "without labels"
    steps = f"{loader.epoch_steps} steps x {args.epochs} epochs = {loader.epoch_steps * args.epochs:,} steps"
    slow = ", decoded by PIL (slowly; pip install torchcodec)" if DECODER == "PIL" else ""
    print0(f"data        {args.data}: {len(data):,} images {kind}, {steps}{slow}")
    if is_fake(args.data):
        print0(f"note        {FAKE}")
    print0(f"batch       {args.batch_size} = {world_size()} processes x {args.accum} micro-batches x {loader.local}")
    size = f"width {args.width:g}, {args.image_size} px, {parameters / 1e6:.2f} M trained parameters"
    print0(f"model       {args.arch}, {size}, {precision_name(args.precision, device)} on {device.type}")
    for name, text in lines.items():
        print0(f"{name:<11} {text}")
    usual = args.defaults.get("batch_size")
    if usual and not usual / 4 <= args.batch_size <= usual * 4:
        others = f"also try --lr {args.lr / 3:.2g} and {args.lr * 3:.2g}, compare them"
        others += " by knn or loss after a few epochs" * hasattr(args, "knn_every")
        print0(f"note        batch {args.batch_size} is far from the recipe's {usual}: {others}")
    if args.image_size <= 64 and args.arch.startswith("resnet"):
        crops = getattr(args, "crop_min", None)
        crops = f", crops of at least {crops:.0%} (--crop-min)" if isinstance(crops, float) else ""
        print0(f"note        images of at most 64 px: 3x3 stem without pooling, no blur{crops}")
    if is_main() and (text := _small_images(args, data, model)):
        print(f"note        {text}")
    if "workers" in args.given and (threads := loading_threads(args)) > cores():
        enough = max(1, cores() * args.workers // threads)
        print0(f"note        {threads} loading threads on {cores()} cores: --workers {enough} loads as fast")
    print0(f"output      {args.out}")


def _small_images(args, data, model, most=8):
    """What to say where the images are at most half as large as the views; "" where they are not. Looks at a few."""
    sides = []
    for i in sorted({len(data) * i // most for i in range(most)}):
        with contextlib.suppress(Exception):  # an image that cannot be decoded is named when it is loaded
            sides.append(max(data[i][0].shape[1:]))
    if not sides or 2 * max(sides) > args.image_size:
        return ""
    text = f"images of at most {max(sides)} x {max(sides)} pixels ({len(sides)} of {len(data):,} looked at)"
    patch = getattr(getattr(model, "backbone", None), "patch_size", 1)  # up to 128 px it goes with the size
    sizes = range(-(-max(sides) // 32) * 32, args.image_size, 32)
    size = next((size for size in sizes if size <= 128 or size % patch == 0), 0)
    pixels = {"sizes", "local_size", "patch_size", "gap", "resize", "window"} & args.given  # flags that go with it
    if not size or pixels or ":" in args.arch:
        return f"{text}, which --image-size {args.image_size} enlarges"
    return f"{text}: --image-size {size} loses nothing and is faster"
