"""InfoNCE over a long queue, forward and backward: moco.py's beside the usual form, which copies queue and logits.

    python benchmarks/infonce.py

The usual form clones the queue (so that replacing keys cannot spoil the backward pass), concatenates the positive logit
with those of the queue, divides by the temperature and takes the cross entropy. Before timing, losses and gradients
of both must agree to 1e-5.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, machine, measure, milliseconds, parser, speed, table
from moco import info_nce


def usual(q, k, queue, temperature):
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.clone().T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def main():
    flags = parser(__doc__, repeats=15)
    flags.add_argument("--batch", type=int, default=256)
    flags.add_argument("--queue", type=int, default=65536)
    flags.add_argument("--dim", type=int, default=128)
    flags.add_argument("--temperature", type=float, default=0.2)
    args = flags.parse_args()

    print(machine(args.device))
    print(f"{args.batch} queries, {args.queue:,} keys of {args.dim} numbers, forward and backward")
    generator = torch.Generator().manual_seed(0)
    sizes = (args.batch, args.batch, args.queue)
    q, k, queue = (F.normalize(torch.randn(n, args.dim, generator=generator), dim=1).to(args.device) for n in sizes)
    q.requires_grad_()

    def passes(loss):
        q.grad = None
        value = loss(q, k, queue, args.temperature)
        value.backward()
        return value.detach(), q.grad

    jobs = {"ours": lambda: passes(info_nce), "usual": lambda: passes(usual)}
    (loss_a, grad_a), (loss_b, grad_b) = (job() for job in jobs.values())  # also warms up
    difference = ((grad_a - grad_b).abs().max() / grad_b.abs().max()).item()
    print(f"losses {loss_a:.6f} and {loss_b:.6f}; gradients differ by {difference:.1e} of the largest")
    if not (abs(loss_a - loss_b) <= 1e-5 * abs(loss_b) and difference <= 1e-5):
        sys.exit("error: the two forms disagree: their times would not compare")
    times = measure(jobs, args.repeats, clock(args), args.device)
    table(times, "ms", milliseconds, digits=1, columns=speed(times, "usual"))


if __name__ == "__main__":
    main()
