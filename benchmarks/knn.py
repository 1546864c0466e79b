"""Weighted k-NN classification: knn() of common/knn.py beside one-hot votes, and beside the matrix product alone.

    python benchmarks/knn.py

The usual form (chunks of 500 queries) looks for the k best of every row of similarities and spreads the votes over a
one-hot tensor of queries x k x classes. The matrix product, all queries at once, is what no exact form can do without.
All start from features of unit length; knn(), which takes any, measures their length within its time. Before timing,
both forms must agree on the top-1 accuracy.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, duration, machine, measure, parser, speed, table
from common.knn import knn


def ours(bank, labels, queries, targets, k, temperature):
    return knn(bank, labels, queries, targets, (k,), temperature)[k][0]


def one_hot(bank, labels, queries, targets, k, temperature, chunk=500):
    classes, correct = int(labels.max()) + 1, 0
    space = queries.new_empty(chunk * k, classes)  # used again by every chunk
    for query, target in zip(queries.split(chunk), targets.split(chunk), strict=True):
        similarity, index = (query @ bank.T).topk(k, dim=1)
        votes = space[: index.numel()].zero_().scatter_(1, labels[index].view(-1, 1), 1).view(len(query), k, classes)
        votes = (votes * (similarity / temperature).exp()[:, :, None]).sum(1)
        correct += (votes.sort(dim=1, descending=True).indices[:, 0] == target).sum().item()
    return 100 * correct / len(queries)


def product(bank, labels, queries, targets, k, temperature):
    return queries @ bank.T


def main():
    flags = parser(__doc__, repeats=7)
    flags.add_argument("--bank", type=int, default=50000)
    flags.add_argument("--queries", type=int, default=2000)
    flags.add_argument("--dim", type=int, default=2048)
    flags.add_argument("--classes", type=int, default=1000)
    flags.add_argument("--k", type=int, default=200)
    flags.add_argument("--temperature", type=float, default=0.07)
    args = flags.parse_args()

    print(machine(args.device))
    print(f"{args.queries:,} queries, {args.bank:,} x {args.dim}, {args.classes:,} classes, k {args.k}")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(args.classes, args.dim, generator=generator)

    def draw(n):  # classes that overlap, so that the accuracies have something to agree on
        labels = torch.randint(args.classes, (n,), generator=generator)
        features = torch.randn(n, args.dim, generator=generator).mul_(6).add_(centres[labels])
        return F.normalize(features, dim=1).to(args.device), labels.to(args.device)

    problem = (*draw(args.bank), *draw(args.queries), args.k, args.temperature)
    forms = {"ours": ours, "one-hot": one_hot, "product": product}
    jobs = {name: lambda form=form: form(*problem) for name, form in forms.items()}
    a, b, _ = (job() for job in jobs.values())  # also warms up
    print(f"top-1 {a:.2f} and {b:.2f}")
    if abs(a - b) > 0.1:
        sys.exit("error: the two forms disagree: their times would not compare")

    times = measure(jobs, args.repeats, clock(args), args.device)
    table(times, "s", digits=3, columns=speed(times, "one-hot") | duration(times, "product"))


if __name__ == "__main__":
    main()
