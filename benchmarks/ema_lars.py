"""Optimiser-side work on ResNet-50's 161 parameter tensors: moving averages and LARS, as here and as elsewhere.

    python benchmarks/ema_lars.py

Moving average of the weights: one `torch._foreach_lerp_` over all tensors, beside three loops that published code has:
`q.mul_(m).add_((1 - m) * p)`, the same without the temporary, `add_(p, alpha=1 - m)`, and `q * m + p * (1 - m)`. On a
CPU all are bound by memory: lerp reads or writes 3 numbers per weight, the loops 7, 5 and 7.
LARS: common/optim.py beside the loop over tensors of several official repositories, with `torch.where` for zero norms.
Before timing, the results must agree (1e-6 of the largest value, for LARS after three steps). The repeats are
interleaved and their order turns, so that a drift of the machine hits all alike.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.optim import LARS
from common.resnet import resnet


# --------------------------------------------------------------------------------------------- moving averages
@torch.no_grad()
def foreach_lerp(target, online, m):
    torch._foreach_lerp_(target, online, 1 - m)


@torch.no_grad()
def mul_add(target, online, m):
    for q, p in zip(target, online, strict=True):
        q.mul_(m).add_((1 - m) * p)


@torch.no_grad()
def mul_add_alpha(target, online, m):
    for q, p in zip(target, online, strict=True):
        q.mul_(m).add_(p, alpha=1 - m)


@torch.no_grad()
def formula(target, online, m):
    for q, p in zip(target, online, strict=True):
        q.data = q.data * m + p.data * (1 - m)


# -------------------------------------------------------------------------------------------------------- LARS
class LoopLARS(torch.optim.Optimizer):
    """A loop over tensors, one operation after the other."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if group["adapt"]:
                    update = update.add(p, alpha=group["weight_decay"])
                    weight_norm, update_norm = torch.norm(p), torch.norm(update)
                    one = torch.ones_like(weight_norm)
                    ratio = torch.where(
                        weight_norm > 0,
                        torch.where(update_norm > 0, group["trust"] * weight_norm / update_norm, one),
                        one,
                    )
                    update = update.mul(ratio)
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(update)
                p.add_(state["mu"], alpha=-group["lr"])


# ---------------------------------------------------------------------------------------------------- measuring
def machine(device):
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if device.type == "cuda":
        return f"machine: {torch.cuda.get_device_name(device)}, {model}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    threads = f"{cores} cores, {torch.get_num_threads()} threads, load {load}"
    return f"machine: {model}, {threads}, {platform.system()}, torch {torch.__version__}"


def compare(jobs, base, args, clock):
    """jobs: {name: function}. Interleaved repeats, and a table of medians."""
    times, order = {name: [] for name in jobs}, list(jobs)
    for _ in range(args.repeats):
        for name in order:
            torch.cuda.synchronize() if args.device.type == "cuda" else None
            began = clock()
            jobs[name]()
            torch.cuda.synchronize() if args.device.type == "cuda" else None
            times[name].append(clock() - began)
        order = order[1:] + order[:1]
    print(f"\n{'':32}{'median ms':>10}{'min-max ms':>18}  speed relative to {base}")
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{1000 * min(values):.2f}-{1000 * max(values):.2f}"
        print(f"{name:32}{1000 * median:>10.2f}{spread:>18}  {statistics.median(times[base]) / median:.2f}x")


def check(name, ours, theirs):
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    difference /= max(b.abs().max().item() for b in theirs)
    print(f"{name}: largest difference {difference:.1e} of the largest value")
    if not difference <= 1e-6:
        sys.exit(f"error: {name} and ours disagree: their times would not compare")


def parameters(seed, args):
    torch.manual_seed(seed)
    model = resnet("resnet50", args.width)
    model.fc = torch.nn.Linear(model.dim, 1000)  # torchvision's 161 tensors
    return [p.detach().to(args.device).requires_grad_() for p in model.parameters()]


def averages(args, clock):
    online, jobs, targets = parameters(0, args), {}, {}
    for function in (foreach_lerp, mul_add, mul_add_alpha, formula):
        target = targets[function] = [p.detach() for p in parameters(1, args)]
        function(target, online, 0.99)  # also warms up
        jobs[function.__name__] = lambda function=function, target=target: function(target, online, 0.99)
    for function in (mul_add, mul_add_alpha, formula):
        check(function.__name__, targets[foreach_lerp], targets[function])
    compare(jobs, "mul_add", args, clock)


def lars(args, clock):
    jobs, weights = {}, {}
    for name, optimizer_class in (("common.optim.LARS", LARS), ("loop over tensors", LoopLARS)):
        params = weights[name] = parameters(0, args)
        torch.manual_seed(2)
        for p in params:
            p.grad = torch.randn(p.shape).to(args.device).mul_(0.01)
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 1e-6, "adapt": True},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
        ]
        optimizer = optimizer_class(groups, lr=0.3, momentum=0.9)
        for _ in range(3):
            optimizer.step()
        jobs[name] = optimizer.step
    check("loop over tensors", weights["common.optim.LARS"], weights["loop over tensors"])
    compare(jobs, "loop over tensors", args, clock)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--width", type=float, default=1.0, help="multiplier of the channels")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="time spent computing, for a machine with other work")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter

    print(machine(args.device))
    tensors = parameters(0, args)
    print(
        f"ResNet-50, width {args.width}: {len(tensors)} tensors, {sum(p.numel() for p in tensors) / 1e6:.1f} M numbers"
    )
    del tensors
    lars(args, clock)
    print()
    averages(args, clock)


if __name__ == "__main__":
    main()
