"""InfoNCE over a long queue, forward and backward: moco.py's beside the usual form, which copies queue and logits.

    python benchmarks/infonce.py

The usual form clones the queue (so that replacing keys cannot spoil the backward pass), concatenates the positive logit
with those of the queue, divides by the temperature and takes the cross entropy. Before timing, losses and gradients
of both must agree to 1e-5. The repeats are interleaved and their order turns, so that a drift of the machine hits all.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.ema_lars import machine
from moco import info_nce


def ours(q, k, queue, temperature):
    return info_nce(q, k, queue, temperature)


def usual(q, k, queue, temperature):
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.clone().T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def seconds(clock, loss, q, *rest):
    """One forward and backward pass."""
    q.grad = None
    if q.is_cuda:
        torch.cuda.synchronize()
    began = clock()
    loss(q, *rest).backward()
    if q.is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="time spent computing, for a machine with other work")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter

    device = torch.device(args.device)
    print(machine(device))
    print(f"{args.batch} queries, {args.queue:,} keys of {args.dim} numbers, forward and backward")
    generator = torch.Generator().manual_seed(0)
    sizes = (args.batch, args.batch, args.queue)
    q, k, queue = (F.normalize(torch.randn(n, args.dim, generator=generator), dim=1).to(device) for n in sizes)
    q.requires_grad_()
    forms = {"ours": ours, "usual": usual}

    found = {}
    for name, loss in forms.items():  # also warms up
        seconds(clock, loss, q, k, queue, args.temperature)
        found[name] = (loss(q, k, queue, args.temperature).item(), q.grad.clone())
    (loss_a, grad_a), (loss_b, grad_b) = found.values()
    difference = (grad_a - grad_b).abs().max().item() / grad_b.abs().max().item()
    print(f"losses {loss_a:.6f} and {loss_b:.6f}; gradients differ by {difference:.1e} of the largest")
    if not (abs(loss_a - loss_b) <= 1e-5 * abs(loss_b) and difference <= 1e-5):
        sys.exit("error: the two forms disagree: their times would not compare")

    times = {name: [] for name in forms}
    order = list(forms)
    for _ in range(args.repeats):
        for name in order:
            times[name].append(seconds(clock, forms[name], q, k, queue, args.temperature))
        order.reverse()

    print(f"\n{'':8}{'median ms':>10}{'min-max ms':>18}  speed relative to usual")
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{1000 * min(values):.1f}-{1000 * max(values):.1f}"
        print(f"{name:8}{1000 * median:>10.1f}{spread:>18}  {statistics.median(times['usual']) / median:.2f}x")


if __name__ == "__main__":
    main()
