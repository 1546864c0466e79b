"""Sinkhorn-Knopp on a batch of SwAV: swav.py's beside the usual form, which rewrites the whole matrix again and again.

    python benchmarks/sinkhorn.py

The usual form divides the transport plan in place by its row sums, by K, by its column sums and by B, in every
iteration: in torch as most code does it, and in NumPy. Ours iterates two scaling vectors and only reads the matrix.
Before timing, the codes of all forms must agree to 1e-5, in single precision and, to 1e-10, in double. The repeats are
interleaved and their order turns, so that a drift of the machine hits all.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.ema_lars import machine
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


def seconds(form, scores, *rest):
    if scores.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    form(scores, *rest)
    if scores.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--prototypes", type=int, default=3000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    device = torch.device(args.device)
    print(machine(device))
    print(f"{args.batch} samples, {args.prototypes} prototypes, {args.iterations} iterations, float32")
    generator = torch.Generator().manual_seed(0)
    sizes = (args.batch, args.prototypes)
    z, c = (F.normalize(torch.randn(n, args.dim, generator=generator).to(device), dim=1) for n in sizes)
    scores = z @ c.T
    forms = {"ours": sinkhorn, "torch, in place": in_place}
    if device.type == "cpu":
        forms["NumPy, in place"] = in_numpy

    for tolerance, values in ((1e-5, scores), (1e-10, scores.double())):  # also warms up
        codes = [form(values, args.epsilon, args.iterations) for form in forms.values()]
        for name, code in zip(list(forms)[1:], codes[1:], strict=True):
            difference = (code - codes[0]).abs().max().item()
            print(f"{values.dtype}, {name}: codes differ by {difference:.1e} from ours")
            if not difference <= tolerance:
                sys.exit("error: the forms disagree: their times would not compare")
    del codes

    times = {name: [] for name in forms}
    order = list(forms)
    for _ in range(args.repeats):
        for name in order:
            times[name].append(seconds(forms[name], scores, args.epsilon, args.iterations))
        order = order[1:] + order[:1]

    print(f"\n{'':16}{'median ms':>10}{'min-max ms':>18}  speed relative to torch, in place")
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{1000 * min(values):.1f}-{1000 * max(values):.1f}"
        print(
            f"{name:16}{1000 * median:>10.1f}{spread:>18}  {statistics.median(times['torch, in place']) / median:.2f}x"
        )


if __name__ == "__main__":
    main()
