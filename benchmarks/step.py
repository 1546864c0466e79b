"""The training step of every script beside its floor: the network calls that this very step makes.

    python benchmarks/step.py
    python benchmarks/step.py --only moco byol --augment
    python benchmarks/step.py --only moco --words "--bn-splits 1"
    python benchmarks/step.py --device cuda --arch resnet50 --width 1 --image-size 224 --batch-size 256 \\
        --vit vit_base --swin swin_base --vit-width 1 --depth 12 --patch-size 16 --images 1281167

Runs each script's own `main`, with a loader that gives the same views, made beforehand, again and again. So what is
timed is the loop as it is, with heads, loss, backward pass, optimiser, moving averages, queues, memories and log, but
without images to load, decode, crop and, unless --augment is given, to augment.

The floor is a replay. During one step before those that count, every call of a network is noted that the script's model
makes, or the script itself: the outermost modules below the model (backbone, projector, predictor, teacher; of a ViT
that is given a part of the patches, its blocks), with their inputs, and which outputs a gradient came back to. Whenever
the script asks for the next batch, the loader makes all these calls again under the same autocast, on copies of the
networks, and sends random gradients back to where some came; so step and floor take turns. What a step takes beyond
this is loss, optimiser, moving averages, queues, memories, masks and what is computed between two modules. The
backbones' share is that of their calls alone.

Networks: ResNets, ViTs or Swins, as the script has them by default, at the sizes that the flags say; `NAME vit` is a
script that takes both, with a ViT. Heads are as narrow as the backbone is. Memories have the size that N images need
(--images; the default is CIFAR-10's number) and start from random features instead of those of a pass over the images;
deepclusterv2 and selav2 begin after the first step of their epoch, with random labels, cae's codebook of
--target kmeans is empty. scan finds no neighbours, and its second views are those of the same images. SwAV's queue,
which its recipe uses from epoch 15 on, is empty. With less than 9 steps odc and interclr get no new centroids.

Recorded inputs of one step and copies of the networks stay in memory beside the step.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import math
import shlex
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.memory import SPECIAL, Images
from benchmarks.timing import clock, machine, parser, settle
from common import loader, log, rng, run
from common.augment import DRAWS, augment, to_device
from tests.helpers import SCRIPTS

WARMUP = 2  # steps before the first that counts; calls are noted in the last of them
WORDS = {"scan": "--pretrained random --clusters 1000", "cae": "--target kmeans"}
HEADS = ("dim", "hidden_dim", "pred_dim", "out_dim", "bottleneck_dim", "decoder_dim", "predictor_dim")
LATER = ("deepclusterv2", "selav2", "cae")  # would pass over all images before the first step, but not on resuming
CALL = nn.Module.__call__


class Done(Exception):
    """All steps have been timed."""


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def fresh(x):
    """The same numbers, in no graph."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


@dataclasses.dataclass
class Call:
    """One call of a module: its inputs, whether gradients were on, and of its outputs the places that got one."""

    module: nn.Module
    inputs: tuple
    grad: bool
    autocast: bool
    backbone: bool
    reached: set = dataclasses.field(default_factory=set)


class Replay:
    """The calls of networks below a model, noted in one step, to be made again."""

    def __init__(self, model, amp):
        self.model, self.amp, self.calls, self.gradients, self.inside = model, amp, [], {}, False
        self.kind = next(model.parameters()).device.type
        self.backbones = {id(m) for name, m in model.named_modules() if "backbone" in name}

    @contextlib.contextmanager
    def noting(self):
        """While this is entered, calls are noted; afterwards their networks are copied."""
        with mock.patch.object(nn.Module, "__call__", lambda module, *args, **more: self.note(module, args, more)):
            yield
        copies = copy.deepcopy([call.module for call in self.calls])  # one copy of what is called twice
        for call, module in zip(self.calls, copies, strict=True):
            call.module = module
            if hasattr(module, "inplace"):  # its input has no graph that it could be written into
                module.inplace = False
        self.parameters = {p for module in copies for p in module.parameters()}

    def note(self, module, args, more):
        if self.inside or module is self.model:
            return CALL(module, *args, **more)
        states = torch.is_grad_enabled(), torch.is_autocast_enabled(self.kind)
        call = Call(module, tree_map(fresh, (args, more)), *states, id(module) in self.backbones)
        self.calls.append(call)
        self.inside = True
        try:
            outputs = CALL(module, *args, **more)
        finally:
            self.inside = False
        for place, x in enumerate(tensors(outputs)):
            if x.requires_grad:
                x.register_hook(lambda _, place=place: call.reached.add(place))
        return outputs

    def make(self, backbones):
        """Makes the calls of backbones, or all others."""
        outputs = []
        with self.amp:
            for call in (call for call in self.calls if call.backbone == backbones):
                args, more = tree_map(fresh, call.inputs)
                off = contextlib.nullcontext() if call.autocast else torch.autocast(self.kind, enabled=False)
                with torch.set_grad_enabled(call.grad), off:
                    found = tensors(call.module(*args, **more))
                outputs += [found[place] for place in sorted(call.reached)]
        if outputs:
            torch.autograd.backward(outputs, [self.gradient(x) for x in outputs])
        for p in self.parameters:
            p.grad = None

    def gradient(self, x):
        """Random numbers, drawn once: for many outputs drawing them is some percent of the passes."""
        key = (x.shape, x.stride(), x.dtype)
        if key not in self.gradients:
            self.gradients[key] = torch.randn_like(x)
        return self.gradients[key]


# ---------------------------------------------------------------------------------------------------------- run
@dataclasses.dataclass
class Ready(loader.Batch):
    """A batch whose views exist already, unless `made` is None."""

    made: list | None = None

    def views(self):
        return super().views() if self.made is None else self.made


class Views(loader.Loader):
    """The same views and random numbers again and again, of other images each time."""

    options = None  # set by `timed_run`

    def epoch(self, epoch, start=0, order=None):
        device, generator = self.pool.device, torch.Generator().manual_seed(0)
        images = [
            torch.randint(0, 256, (self.local, v.size, v.size, 3), dtype=torch.uint8, generator=generator)
            for v in self.specs
        ]
        images = [to_device(x, device).permute(0, 3, 1, 2) for x in images]
        shuffled = rng.permutation(self.seed, epoch, len(self.dataset)) if order is None else order
        plain = [augment(x, [], v.mean, v.std, self.dtype) for x, v in zip(images, self.specs, strict=True)]
        keys, sizes = shuffled[: self.local], np.array([images[0].shape[2:]] * self.local)
        draws = np.stack([rng.uniforms(self.seed, epoch, keys, stream, DRAWS) for stream in self.streams])
        rest = (keys, draws, sizes, self.seed, epoch, self.dtype, None if self.options.augment else plain)
        for step in range(start, self.epoch_steps):
            indices = to_device(torch.from_numpy(shuffled[step * self.local : (step + 1) * self.local]), device)
            yield Ready(images, self.specs, torch.zeros_like(indices), indices, *rest)


class Timer(Views):
    """The loader of a script: takes the time between two batches, which is that of a step, and those of the floor."""

    replay, timed = None, None  # set by `timed_run`
    watch = staticmethod(lambda step: contextlib.nullcontext())  # around each step, for a profiler

    def epoch(self, epoch, start=0, order=None):
        options, device = self.options, self.pool.device
        seconds = clock(options)

        def lap():
            settle(device)
            return seconds()

        for step, batch in enumerate(super().epoch(epoch, start, order)):
            laps = [lap()]
            with self.replay.noting() if step == WARMUP - 1 else self.watch(step):
                yield batch
                laps.append(lap())
            for backbones in (True, False) if step >= WARMUP - 1 else ():
                self.replay.make(backbones)
                laps.append(lap())
            if step >= WARMUP:
                self.timed.append(tuple(np.diff(laps)))
            if len(self.timed) == options.steps * options.repeats:
                raise Done


def words_of(name, args):
    """The command line of a script: its networks as wide as the flags say."""
    script, _, kind = name.partition(" ")
    parse, own = importlib.import_module(script).parse_args, shlex.split(WORDS.get(script, ""))
    usual = parse(["--data", "none", *own])
    arch = usual.arch or "resnet50"
    kind = kind or next((k for k in ("resnet", "vit", "swin") if arch.startswith(k)), "")
    width = args.width if kind in ("resnet", "") else args.vit_width
    own += ["--width", width, *([] if not kind else ["--arch", {"resnet": args.arch}.get(kind) or getattr(args, kind)])]
    own += ["--patch-size", args.patch_size, "--depth", args.depth] if kind == "vit" else []
    own += ["--decoder-heads", max(1, round(16 * width))] if hasattr(usual, "decoder_heads") else []
    own += ["--pictures-every", 0] if hasattr(usual, "pictures_every") else []
    for head in HEADS:
        if value := getattr(usual, head, None):
            own += [f"--{head.replace('_', '-')}", max(8, round(value * width))]
    common = f"--data none --knn-every 0 --save-every 1e6 --workers 0 --device {args.device}"
    common += f" --precision {args.precision} --image-size {args.image_size} --batch-size {args.batch_size}"
    return [*common.split(), *map(str, own), *shlex.split(args.words)]


def timed_run(name, args):
    """Returns the seconds of each step, of the replay of its backbones and of that of the rest, [(step, backbones,
    rest), ...], and the last loss."""
    script, losses = importlib.import_module(name.split()[0]), []
    Views.options, Timer.timed = args, []
    start, logging = run.Run.start, run.Run.log

    def started(self, model, *rest, **lines):
        net = start(self, model, *rest, **lines)
        Timer.replay = Replay(self.net, self.amp)
        if name.split()[0] in LATER:
            self.step, self.resumed = 1, True
            if hasattr(model, "labels"):
                model.labels.random_(2)
        return net

    def logged(self, lr, **monitors):
        losses[:] = [self.loss]
        logging(self, lr, **monitors)

    def random_features(model, data, view, device, *rest, **more):
        return F.normalize(torch.randn(len(data), model.dim, device=device), dim=1), None

    with contextlib.ExitStack() as stack:
        change = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        change(run, "open_dataset", lambda data, split, *_, **more: Images(args.images) if split == "train" else None)
        change(run, "save_views", lambda *args: None)
        change(run, "Loader", Timer)
        change(run.Run, "start", started)
        change(run.Run, "log", logged)
        change(log, "Stop", lambda: mock.Mock(flag=False))
        special = {"extract": random_features, "Loader": Views} | (SPECIAL[name] if name == "scan" else {})
        if "kmeans" in vars(script):  # of random features, for which one iteration will do
            special["kmeans"] = functools.partial(script.kmeans, iterations=1)
        special |= {key: lambda *args, **more: None for key in vars(script) if key.startswith("save_")}
        if hasattr(script, "step_masks"):  # ijepa's blocks: of the same size in all steps, as the floor has them
            masks = script.step_masks
            special["step_masks"] = lambda seed, epoch, step, _, keys, *a, **b: masks(seed, 0, 0, keys, keys, *a, **b)
        for key, value in special.items():
            if hasattr(script, key):
                change(script, key, value)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        errors = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            script.main(script.parse_args([*words_of(name, args), "--out", folder]))
        except Done:
            pass
        except SystemExit:
            raise RuntimeError(errors.getvalue().strip().splitlines()[-1]) from None
    if not math.isfinite(loss := losses[-1].item()):
        raise RuntimeError("the loss is not finite")
    return Timer.timed, loss


def parse_args(argv=None):
    words = parser(__doc__, repeats=5)
    names = [name for script in SCRIPTS for name in [script, *[f"{script} vit"] * (script == "mocov3")]]
    words.add_argument("--only", nargs="+", default=names, metavar="NAME")
    words.add_argument("--words", default="", help="more flags of the scripts")
    words.add_argument("--arch", default="resnet18")
    words.add_argument("--width", type=float, default=0.25, help="multiplier of the channels, and of the heads")
    words.add_argument("--image-size", type=int, default=32)
    words.add_argument("--batch-size", type=int, default=64)
    words.add_argument("--images", type=int, default=50000, help="N, of the memories")
    words.add_argument("--vit", default="vit_tiny")
    words.add_argument("--swin", default="swin_tiny")
    words.add_argument("--vit-width", type=float, default=0.25, help="of both, and of the heads")
    words.add_argument("--depth", type=int, default=6, help="of ViTs")
    words.add_argument("--patch-size", type=int, default=4, help="of ViTs")
    words.add_argument("--augment", action="store_true", help="with the augmentation on the device")
    words.add_argument("--precision", default="auto")
    words.add_argument("--steps", type=int, default=5, help="per repeat")
    args = words.parse_args(argv)
    if unknown := {name.removesuffix(" vit") for name in args.only} - set(SCRIPTS):
        words.error(f"--only {', '.join(sorted(unknown))}: expected {', '.join(names)}")
    if WARMUP + args.steps * args.repeats >= args.images // args.batch_size:
        words.error("--images: all steps have to fit into one epoch")
    return args


def main():
    args = parse_args()
    print(machine(args.device))
    print(f"{args.arch}, width {args.width}; {args.vit}, {args.depth} blocks, {args.patch_size} px patches,", end=" ")
    print(f"and {args.swin}, width {args.vit_width}; {args.image_size} px, batch {args.batch_size},", end=" ")
    print(f"{args.precision} precision {args.words}".rstrip())
    print(f"medians of {args.repeats} repeats of {args.steps} steps, N = {args.images:,}", end="")
    print(", augmentation included" if args.augment else ", views made beforehand", end="")
    print(", CPU time of all threads" if args.cpu_time else "")
    print(f"\n{'':<14}{'images/s':>9}{'min - max':>14}{'floor':>8}{'share of it':>13}", end="")
    print(f"{'backbones':>11}{'ms beyond it':>14}{'loss':>10}")
    for name in args.only:
        try:
            timed, loss = timed_run(name, args)
        except Exception as error:
            print(f"{name:<14}  not run: {error}", flush=True)
            continue
        parts = np.array(timed).reshape(args.repeats, args.steps, 3).mean(1)
        step, backbones, floor = parts[:, 0], parts[:, 1], parts[:, 1] + parts[:, 2]
        speed = args.batch_size / step
        print(
            f"{name:<14}{np.median(speed):>9.0f}{f'{speed.min():.0f} - {speed.max():.0f}':>14}"
            f"{args.batch_size / np.median(floor):>8.0f}{np.median(floor / step):>13.0%}"
            f"{np.median(backbones / step):>11.0%}{1000 * np.median(step - floor):>14.1f}{loss:>10.3f}",
            flush=True,
        )
    print(f"\nafter: {machine(args.device)}")


if __name__ == "__main__":
    main()
