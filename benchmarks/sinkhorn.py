"""Sinkhorn-Knopp on a batch of SwAV: swav.py's beside the usual form, which rewrites the whole matrix again and again.

    python benchmarks/sinkhorn.py

The usual form divides the transport plan in place by its row sums, by K, by its column sums and by B, in every
iteration: in torch as most code does it, and in NumPy. Ours iterates two scaling vectors and only reads the matrix.
Before timing, the codes of all forms must agree to 1e-5, in single precision and, to 1e-10, in double.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, machine, measure, milliseconds, parser, speed, table
from swav import sinkhorn


@torch.no_grad()
def in_place(scores, epsilon, iterations):
    q = torch.exp(scores / epsilon).t()
    prototypes, samples = q.shape
    q /= torch.sum(q)
    for _ in range(iterations):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= prototypes
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= samples
    q *= samples
    return q.t()


def in_numpy(scores, epsilon, iterations):
    q = np.exp(scores.numpy() / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= q.shape[0]
        q /= q.sum(axis=0, keepdims=True)
        q /= q.shape[1]
    q *= q.shape[1]
    return torch.from_numpy(q.T)


def main():
    flags = parser(__doc__, repeats=7)
    flags.add_argument("--batch", type=int, default=4096)
    flags.add_argument("--prototypes", type=int, default=3000)
    flags.add_argument("--dim", type=int, default=128)
    flags.add_argument("--epsilon", type=float, default=0.05)
    flags.add_argument("--iterations", type=int, default=3)
    args = flags.parse_args()

    print(machine(args.device))
    print(f"{args.batch} samples, {args.prototypes} prototypes, {args.iterations} iterations, float32")
    generator = torch.Generator().manual_seed(0)
    sizes = (args.batch, args.prototypes)
    z, c = (F.normalize(torch.randn(n, args.dim, generator=generator).to(args.device), dim=1) for n in sizes)
    scores = z @ c.T
    forms = {"ours": sinkhorn, "torch, in place": in_place}
    if args.device.type == "cpu":
        forms["NumPy, in place"] = in_numpy

    for tolerance, values in ((1e-5, scores), (1e-10, scores.double())):  # also warms up
        codes = [form(values, args.epsilon, args.iterations) for form in forms.values()]
        for name, code in zip(list(forms)[1:], codes[1:], strict=True):
            difference = (code - codes[0]).abs().max().item()
            print(f"{values.dtype}, {name}: codes differ by {difference:.1e} from ours")
            if not difference <= tolerance:
                sys.exit("error: the forms disagree: their times would not compare")
    del codes

    jobs = {name: lambda form=form: form(scores, args.epsilon, args.iterations) for name, form in forms.items()}
    times = measure(jobs, args.repeats, clock(args), args.device)
    table(times, "ms", milliseconds, digits=1, columns=speed(times, "torch, in place"))


if __name__ == "__main__":
    main()
