"""Memory per GPU of one training step of every script's default recipe on 8 GPUs: traced, not measured.

    python benchmarks/memory.py                     # all scripts; the records go to results/benchmarks/memory.jsonl
    python benchmarks/memory.py simsiam dino
    python benchmarks/memory.py --check             # a trace beside memory that was really used, on the CPU
    python benchmarks/memory.py simsiam --words "--accum 4"

Runs each script's own `main` in a process that takes itself for the first of 8, on tensors that have shapes and no
numbers (torch's FakeTensorMode), and counts the bytes of all that exist at a time. No GPU and little time
is needed. What is counted is a step in the middle of a run on ImageNet's 1,281,167 images, one that logs: batch of
views, augmentation, forward and backward pass, optimiser, moving averages, queues and banks. What a script does between
epochs (k-means of a whole bank, k-NN) is not.

The tensors are fake CPU tensors, as PyTorch's backward pass does not run on fake CUDA tensors without a GPU. Autocast
(bf16) is made to cast what it casts on CUDA, and attention with a bias, optimisers and augmentation go the ways that
they go there. Batch norm counts as PyTorch's synchronised one, which saves the same as the plain one.
DistributedDataParallel is replaced by its buckets, one more copy of the gradients.

What no trace sees: the CUDA context and NCCL's buffers (about 1 GB), workspaces of cuDNN, and memory that the allocator
holds but cannot use. So the largest batch for a card of 24 or 80 GB is one whose trace fills nine tenths of it. 1 GB is
2^30 bytes, as in the log of a run.
"""

import argparse
import contextlib
import gc
import importlib
import inspect
import io
import itertools
import json
import math
import shlex
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import augment, batchnorm, loader, log, run  # noqa: E402
from tests.helpers import SCRIPTS  # noqa: E402

GB, CARDS, USABLE = 2**30, (24, 80), 0.9
IMAGES, GPUS = 1281167, 8
LOG = ROOT / "results" / "benchmarks" / "memory.jsonl"
WORDS = {"scan": "--pretrained random --clusters 1000", "cae": "--tokenizer dalle"}  # what has no default
GROUPS = {"simdino": 64}  # images of which a process takes whole groups
aten = torch.ops.aten


class Done(Exception):
    """The steps to be counted have been done."""


class Fake(FakeTensorMode):
    """Tensors without numbers: every one that the host reads is 1."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo):
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.equal.default:
            return True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except DataDependentOutputException:
            return torch.ones((), dtype=args[0].dtype).item()


KINDS = ("parameters", "gradients", "buckets", "optimizer", "buffers", "activations")


class Counter(TorchDispatchMode):
    """Bytes of all storages that exist, by kind, from the operation that returns them to the end of their last tensor.

    peak: their sum when it was largest, at: {kind: bytes} then. What nobody has given a kind counts as an activation,
    as does all that comes and goes. torch.distributed._tools.mem_tracker.MemTracker counts the same (SimSiam's default:
    5.859 GB, 5.424 of them activations), and refuses a network that is called twice.
    """

    def __init__(self, block=512):
        super().__init__()
        self.block, self.live, self.now = block, {}, dict.fromkeys(KINDS, 0)  # CUDA gives multiples of 512 bytes
        self.start()

    def start(self):
        """Forgets the peak so far."""
        self.sum = self.peak = sum(self.now.values())
        self.at = dict(self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return found

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if (key := id(storage)) not in self.live:
            size = -(-storage.nbytes() // self.block) * self.block
            self.live[key] = [size, "activations", weakref.ref(storage, lambda _: self.forget(key))]
            self.add("activations", size)
        return self.live[key]

    def add(self, kind, size):
        self.now[kind] += size
        self.sum += size
        if self.sum > self.peak:
            self.peak, self.at = self.sum, dict(self.now)

    def forget(self, key):
        size, kind, _ = self.live.pop(key)
        self.add(kind, -size)

    def tag(self, kind, tensors):
        """Says what kind these are."""
        for tensor in tensors:
            entry = self.see(tensor)
            self.now[entry[1]] -= entry[0]
            self.now[kind] += entry[0]
            entry[1] = kind

    def tag_model(self, model, optimizer):
        """Parameters, buffers, what the optimiser keeps, and gradients as they come."""
        parameters = [*model.parameters()]
        self.tag("parameters", parameters)
        self.tag("buffers", model.buffers())
        kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        self.tag("optimizer", kept)
        for p in parameters:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: self.tag("gradients", [p.grad]))


class Images:
    """A data set of n images that nobody reads."""

    labels = classes = None
    channels, dtype = 3, torch.uint8

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


class Pool:
    """Batches on the device, of nothing."""

    waited, bad = 0.0, frozenset()

    def __init__(self, dataset, specs, batch, device, *rest):
        self.specs, self.device = specs, device

    def run(self, jobs):
        for indices, draws in jobs:
            n, sizes = len(indices), [spec.size for spec in self.specs]
            crops = [torch.zeros(n, s, s, 3, dtype=torch.uint8).permute(0, 3, 1, 2) for s in sizes]
            yield crops, np.full((n, 2), 500), torch.zeros(n, dtype=torch.int64), indices, draws


class Norm(nn.modules.batchnorm._BatchNorm):
    """In the place of SyncBatchNorm."""

    def _check_input_dim(self, x):
        pass


# What autocast computes in single precision on CUDA, and leaves as it is on a CPU
SINGLE = """exp expm1 log log1p log2 log10 pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar reciprocal rsqrt softplus
layer_norm native_layer_norm group_norm cosine_similarity dist logsumexp linalg_vector_norm norm.Scalar
norm.ScalarOpt_dim""".split()
SINGLE_DTYPE = "softmax.int log_softmax.int sum sum.dim_IntList cumsum cumprod".split()  # told so by their dtype


def in_single(name):
    """The operator in single precision, whatever it is given."""
    base, _, overload = name.partition(".")
    operator = getattr(getattr(aten, base), overload or "default")
    without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def cast(x):
        low = isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16)
        return x.float() if low else x

    def call(*args, **options):
        with torch._C._ExcludeDispatchKeyGuard(without):
            if name not in SINGLE_DTYPE:
                return operator(*map(cast, args), **{k: cast(v) for k, v in options.items()})
            place = next(i for i, a in enumerate(operator._schema.arguments) if a.name == "dtype")
            given = options.get("dtype") or (args[place] if len(args) > place else None)
            if given is None and cast(args[0]) is not args[0]:
                args, options = args[:place], options | {"dtype": torch.float32}
            return operator(*args, **options)

    return call


def attention(q, k, v, attn_mask=None, **options):
    """What scaled_dot_product_attention takes on a GPU if there is a bias, whose gradient the CPU's kernels lack."""
    if attn_mask is None:
        return ATTENTION(q, k, v, **options)
    q, k, v, bias = (x.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else x for x in (q, k, v, attn_mask))
    bias = F.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]  # aligned rows, as PyTorch makes them
    bias = bias.expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled())[0]


ATTENTION = F.scaled_dot_product_attention


def as_on_cuda(stack):
    """Enters what makes fake CPU tensors take the ways of CUDA tensors."""
    change = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
    library = torch.library.Library("aten", "IMPL")
    stack.callback(library._destroy)
    for name in SINGLE + SINGLE_DTYPE:
        library.impl(name, in_single(name), "AutocastCPU")
    change(F, "scaled_dot_product_attention", attention)
    optimizer = importlib.import_module("torch.optim.optimizer")
    kinds = optimizer._get_foreach_kernels_supported_devices
    change(optimizer, "_get_foreach_kernels_supported_devices", lambda: [*kinds(), "cpu"])
    change(augment, "_portions", lambda images, operations: [(images, operations)])


def numpy(tensor, **options):
    """An array for a tensor without numbers."""
    if not isinstance(tensor, FakeTensor):
        return NUMPY(tensor, **options)
    return np.ones(tensor.shape, str(tensor.dtype).removeprefix("torch."))


NUMPY = torch.Tensor.numpy


def deepcopied(tensor, memo):
    """A copy of a tensor without numbers."""
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return memo[id(tensor)]


def forget(script):
    """Empties caches, which hold tensors without numbers now."""
    for name, module in [*sys.modules.items()]:
        for value in vars(module).values() if name == script or name.startswith("common.") else ():
            getattr(value, "cache_clear", lambda: None)()


def trace(script, words, processes=1, images=IMAGES, fake=True):
    """Runs a step of a script that logs, in the middle of the run, and returns {kind: bytes} at the peak. words: of its
    command line. fake: without numbers."""
    module, counter = importlib.import_module(script), Counter()
    start, stepping = run.Run.start, run.Run.steps

    def started(self, model, optimizer, *args, **lines):
        net = start(self, model, optimizer, *args, **lines)
        self.step, self.resumed = self.args.epochs // 2 * self.epoch_steps + 1, True
        self.last = self.logger.last = self.step + 1
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()  # what it keeps exists from the first step on
        optimizer.zero_grad()
        counter.tag_model(model, optimizer)
        counter.start()
        return net

    def parallel(model):
        if processes > 1:  # DistributedDataParallel copies gradients into buckets
            model.buckets = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
            counter.tag("buckets", model.buckets)
        return model

    def counted(self, epoch, order=None):
        for step in stepping(self, epoch, order):
            yield step
            raise Done

    with contextlib.ExitStack() as stack:
        change = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(forget, script)
        change(run, "start_device", lambda args: torch.device("cpu"))
        change(run, "open_dataset", lambda data, split, *rest, **more: Images(images) if split == "train" else None)
        change(run, "save_views", lambda *args: None)
        change(run, "resume", lambda *args: None)
        change(run, "parallel", parallel)
        for name, value in (("start", started), ("steps", counted), ("save", lambda self: None)):
            change(run.Run, name, value)
        change(loader, "Pool", Pool)
        change(batchnorm, "SyncBatchNorm", Norm)
        change(log, "any_process", lambda flag, device: False)
        change(log, "Stop", lambda: mock.Mock(flag=False))
        for name, value in SPECIAL.get(script, {}).items():
            change(module, name, value)
        if processes > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
            stack.callback(dist.destroy_process_group)
        if fake:
            as_on_cuda(stack)
            change(torch.Tensor, "numpy", numpy)
            change(nn.init, "trunc_normal_", lambda tensor, *args, **options: tensor)  # draws until all values fit
            stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", deepcopied, create=True))
            change(FakeTensor, "__format__", lambda self, how: format(1.0, how))  # warnings print what they saw
            change(nn.Module, "to", lambda self, *args, **options: self)  # which has to exchange tensors' storage
            stack.enter_context(Fake())
        stack.enter_context(counter)
        output = io.StringIO()
        stack.enter_context(contextlib.redirect_stdout(output))
        words = ["--data", "imagenet", "--knn-every", "0", "--workers", "0", "--out", folder, *words]
        with contextlib.suppress(Done):
            module.main(module.parse_args(words))
            raise RuntimeError(f"{script} ended before its steps: {output.getvalue()}")
    gc.collect()
    return counter.at | {"peak": counter.peak}


def tokenizer(path, channels, device):
    """DALL-E's encoder, without its numbers."""
    import cae

    return {name: torch.zeros(shape) for name, shape in cae.tokenizer_shapes(256, 8192).items()}


def whole_hog(*args, **options):
    """That of maskfeat.py, for all images at once, as on a GPU."""
    import maskfeat

    names = dict(vars(maskfeat))
    exec(inspect.getsource(HOG).replace('images.device.type == "cpu"', "False"), names)
    return names["hog"](*args, **options)


HOG = importlib.import_module("maskfeat").hog
SPECIAL = {  # what needs numbers before the first step, or asks for the device
    "cae": {"load_tokenizer": tokenizer},
    "maskfeat": {"hog": whole_hog},
    "scan": {"mine": lambda *args: {"training": None}, "partners": lambda table, order, *args: order},
}


# ------------------------------------------------------------------------------------------------------- table
def arguments(script, *words):
    parsed = importlib.import_module(script).parse_args
    return parsed(["--data", "imagenet", *shlex.split(WORDS.get(script, "")), *words])


def traced(script, local, processes, words=""):
    """`trace` with so many images per process, under bf16."""
    batch = ["--batch-size", str(local * processes), "--precision", "bf16"]
    return trace(script, [*shlex.split(WORDS.get(script, "")), *batch, *shlex.split(words)], processes)


def largest(limit, points, peak_of, group=None):
    """The largest batch whose peak is at most `limit` bytes, a multiple of `group` if given, of 8 from 16, else of 2,
    and that peak. points: {batch: peak} of two or more traces, to which those made here are added; 0: no batch fits.
    A straight line says where to trace next; what ends the search is a trace that fills at least 97 % of the limit, or
    one beside a larger batch that does not fit."""
    while True:
        fitting = max((b for b, peak in points.items() if peak <= limit), default=0)
        above = min((b for b, peak in points.items() if peak > limit), default=math.inf)
        step = group or (8 if fitting >= 16 or above > 24 else 2)
        if (fitting and points[fitting] >= 0.97 * limit) or above - fitting <= step:
            return fitting, points.get(fitting, 0)
        low, high = sorted(points, key=lambda b: abs(points[b] - limit))[:2]
        slope = (points[high] - points[low]) / (high - low)
        guess = low + (limit - points[low]) / slope if slope > 0 else 2 * max(points)
        guess = int(min(guess, 4 * max(points), 2**20)) // step * step
        guess = max(step, fitting + step, min(guess, above - step))
        if guess in points or guess >= above:
            return fitting, points.get(fitting, 0)
        points[guess] = peak_of(guess)


def record(script, words="", cards=CARDS):
    """What the table says of a script; for no cards, of its default batch only."""
    began, args = time.process_time(), arguments(script, *shlex.split(words))
    gpus = math.gcd(args.batch_size, GPUS)
    local = args.batch_size // gpus
    found = traced(script, local, gpus, words)
    peaks = {local: found["peak"]}

    def peak_of(batch):
        with contextlib.suppress(SystemExit):
            return traced(script, batch, gpus, words)["peak"]
        return math.inf  # refused: larger than its queue

    group = GROUPS.get(script)
    if cards:
        other = local + group if group else max(2, local // 2)
        peaks[other] = peak_of(other)
    fitting = {str(card): largest(card * USABLE * GB, peaks, peak_of, group)[0] for card in cards}
    result = {"script": script, "words": f"{WORDS.get(script, '')} {words}".strip(), "arch": args.arch or "resnet50"}
    result |= {"image_size": args.image_size or 224, "batch_size": args.batch_size, "gpus": gpus, "per_gpu": local}
    result |= {kind: round(size / GB, 3) for kind, size in found.items()} | {"largest": fitting}
    peaks = {batch: round(peak / GB, 3) for batch, peak in sorted(peaks.items()) if peak < math.inf}
    return result | {"peaks": peaks, "seconds": round(time.process_time() - began, 1), "kind": "traced, not measured"}


def measured(script, words):
    """Bytes at the peak of a run with numbers, as PyTorch's allocator told the profiler of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trace(script, words, images=10_000, fake=False)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def check():
    """A trace beside what a run takes, of small networks that a CPU can train, in single precision."""
    print(f"torch {torch.__version__}, CPU, float32, one process; MB of 10^6 bytes\n")
    print(f"{'':<14}{'traced':>9}{'allocated':>11}{'difference':>12}")
    small = "--image-size 32 --batch-size 64 --precision fp32"
    for script, more in CHECKED.items():
        words = f"{small} {more}".split()
        found, real = trace(script, words, images=10_000)["peak"], measured(script, words)
        print(f"{script:<14}{found / 1e6:>9.1f}{real / 1e6:>11.1f}{found / real - 1:>12.1%}", flush=True)


CHECKED = {
    "simsiam": "--arch resnet18 --width 0.5 --dim 512 --pred-dim 128",
    "moco": "--arch resnet18 --width 0.5 --queue 4096",
    "mae": "--arch vit_tiny --patch-size 4 --depth 4 --pictures-every 0",
}
COLUMNS = {"script": -15, "arch": -11, "px": 5, "batch": 7, "GPUs": 6, "per GPU": 9, "peak GB": 9, "state": 7}
COLUMNS |= {"banks": 7, "activations": 13, "24 GB": 7, "80 GB": 7}  # and their widths


def row(found):
    """Of the table. state: parameters, gradients, buckets and optimiser at the peak."""
    state = sum(found[kind] for kind in ("parameters", "gradients", "buckets", "optimizer"))
    sizes = (f"{x:.2f}" for x in (found["peak"], state, found["buffers"], found["activations"]))
    batches = (str(found["largest"].get(str(card), "?") or "none") for card in CARDS)
    names = ("script", "arch", "image_size", "batch_size", "gpus", "per_gpu")
    return (*(str(found[name]) for name in names), *sizes, *batches)


def show(cells):
    widths = zip(cells, COLUMNS.values(), strict=True)
    print("".join(c.ljust(-w) if w < 0 else c.rjust(w) for c, w in widths), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), help="default: all")
    parser.add_argument("--words", default="", help="more flags of the scripts; such traces are not recorded")
    parser.add_argument("--default", action="store_true", help="only the default batch: a fifth of the time")
    parser.add_argument("--check", action="store_true", help="a trace beside memory that was really used")
    parser.add_argument("--recorded", action="store_true", help="print the records of earlier runs, trace nothing")
    args = parser.parse_args()
    if unknown := set(args.scripts) - set(SCRIPTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(SCRIPTS)}")
    if args.check:
        return check()
    records = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    records = {r["script"]: r for r in records}
    print(f"traced, not measured: torch {torch.__version__}, bf16, {GPUS} GPUs, {IMAGES:,} images; GB of 2^30 bytes;")
    print(f"largest batch per GPU whose trace fills at most {USABLE:.0%} of a card\n")
    show(COLUMNS)
    for script in args.scripts:
        if args.recorded and script not in records:
            continue
        if not args.recorded:
            records[script] = record(script, args.words, () if args.default else CARDS)
        show(row(records[script]))
        if not args.words and not args.recorded:
            kept = [records[name] for name in SCRIPTS if name in records]
            LOG.write_text("".join(json.dumps(r) + "\n" for r in kept))


if __name__ == "__main__":
    main()
