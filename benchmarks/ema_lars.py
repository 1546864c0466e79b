"""Optimiser-side work on ResNet-50's 161 parameter tensors: moving averages and LARS, as here and as elsewhere.

    python benchmarks/ema_lars.py

Moving average of the weights: one `torch._foreach_lerp_` over all tensors, beside three loops that published code has:
`q.mul_(m).add_((1 - m) * p)`, the same without the temporary, `add_(p, alpha=1 - m)`, and `q * m + p * (1 - m)`. On a
CPU all are bound by memory: lerp reads or writes 3 numbers per weight, the loops 7, 5 and 7.
LARS: common/optim.py beside the loop over tensors of several official repositories, with `torch.where` for zero norms.
Before timing, the results must agree (1e-6 of the largest value, for LARS after three steps).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, machine, measure, milliseconds, parser, speed, table
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


def compare(jobs, base, args):
    times = measure(jobs, args.repeats, clock(args), args.device)
    table(times, "ms", milliseconds, columns=speed(times, base))


def averages(args):
    online, jobs, targets = parameters(0, args), {}, {}
    for function in (foreach_lerp, mul_add, mul_add_alpha, formula):
        target = targets[function] = [p.detach() for p in parameters(1, args)]
        function(target, online, 0.99)  # also warms up
        jobs[function.__name__] = lambda function=function, target=target: function(target, online, 0.99)
    for function in (mul_add, mul_add_alpha, formula):
        check(function.__name__, targets[foreach_lerp], targets[function])
    compare(jobs, "mul_add", args)


def lars(args):
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
    compare(jobs, "loop over tensors", args)


def main():
    flags = parser(__doc__, repeats=15)
    flags.add_argument("--width", type=float, default=1.0, help="multiplier of the channels")
    args = flags.parse_args()

    print(machine(args.device))
    tensors = parameters(0, args)
    size = sum(p.numel() for p in tensors) / 1e6
    print(f"ResNet-50, width {args.width}: {len(tensors)} tensors, {size:.1f} M numbers")
    del tensors
    lars(args)
    print()
    averages(args)


if __name__ == "__main__":
    main()
