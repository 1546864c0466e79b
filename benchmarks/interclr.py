"""What interclr.py's clusters cost in a training step: sampling of members and negatives, and the bank's update.

    python benchmarks/interclr.py

Steps of the script's own functions on views that are there already, with a bank of N images: CIFAR-10's number and
ImageNet's. "sampling" is all that finds the member and the negatives of each query, the product with the bank included;
"bank" is its update with the new keys, and every tenth time new centroids. Beside them stands the usual sampling:
similarity to all images, the P most similar ones, M of these at random, and a copy of their vectors. The network is a
small one: for a ResNet-50 at 224 pixels a step takes a hundred times as long and sampling the same time per query.
"""

import functools
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import interclr
from benchmarks.timing import clock, machine, measure, milliseconds, parser, table
from common.optim import precision, upcast
from common.resnet import resnet


def sampling(model, q, indices, u, *wanted):
    """As in interclr.inter_nce: members, and which images are negatives."""
    pool, count = wanted
    member = model.features[model.members(indices, u)]
    order = torch.randperm(len(model.features), device=q.device)
    logits = (q @ model.features.T).masked_fill_(model.labels[indices, None] == model.labels, -torch.inf)
    found, where = logits.topk(pool, sorted=False)
    chosen = order[where].masked_fill_(found.isinf(), -1).topk(count, sorted=False).indices
    return member, logits.fill_(-torch.inf).scatter_(1, where.gather(1, chosen), found.gather(1, chosen))


def usual(model, q, pool, negatives):
    found = (q @ model.features.T).topk(pool, sorted=False).indices
    drawn = torch.multinomial(torch.ones(len(q), pool, device=q.device), negatives)
    return model.features[found.gather(1, drawn).flatten()].view(len(q), negatives, -1)


def step(model, optimizer, amp, views, order, indices, u, *wanted):
    model.update_target(0.999)
    with amp:
        outputs = model(*views, order)
    q, k, keys = map(upcast, outputs)
    wanted = (*wanted, torch.randperm(len(model.features), device=q.device))
    inter = interclr.inter_nce(q, indices, model.members(indices, u), model, 0.2, -0.5, *wanted)
    (0.75 * interclr.info_nce(q, k, model.queue, 0.2) + 0.25 * inter).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.enqueue(keys)
    model.update(indices, keys)


def main():
    flags = parser(__doc__, repeats=7)
    flags.add_argument("--arch", default="resnet18")
    flags.add_argument("--width", type=float, default=0.25)
    flags.add_argument("--image-size", type=int, default=32)
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--images", type=int, nargs="+", default=[50_000, 1_281_167])
    flags.add_argument("--precision", default="auto")
    args = flags.parse_args()

    print(machine(args.device))
    print(f"{args.arch}, width {args.width}, {args.image_size} px, batch {args.batch_size}, 4,096 keys")
    torch.manual_seed(0)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    views = [torch.randn(shape).to(args.device, memory_format=torch.channels_last) for _ in range(2)]
    for n in args.images:
        pool, clusters = n // 10, min(10000, n // 100)
        negatives = min(16384, pool * 4 // 5)
        backbone = resnet(args.arch, args.width, args.image_size)
        model = interclr.InterCLR(backbone, n, clusters, queue=4096)
        model = model.to(args.device, memory_format=torch.channels_last)
        model.features.copy_(F.normalize(torch.randn(n, 128), dim=1))
        model.labels.copy_(torch.randint(clusters, (n,)))
        model.recentre()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
        q, keys = (F.normalize(torch.randn(args.batch_size, 128), dim=1).to(args.device) for _ in range(2))
        order, indices = (torch.randperm(m)[: args.batch_size].to(args.device) for m in (args.batch_size, n))
        u = torch.rand(args.batch_size, dtype=torch.float64).to(args.device)
        own = (indices, u, pool, negatives)
        jobs = {
            "step": functools.partial(
                step, model, optimizer, precision(args.precision, args.device)[0], views, order, *own
            ),
            "sampling": functools.partial(sampling, model, q, *own),
            "bank": functools.partial(model.update, indices, keys),
            "new centroids": model.recentre,
            "usual sampling": functools.partial(usual, model, q, pool, negatives),
        }
        times = measure(jobs, args.repeats, clock(args), args.device, warm_up=True)
        print(f"\nN = {n:,}, {clusters:,} clusters, {negatives:,} negatives of a pool of {pool:,}")
        whole = statistics.median(times["step"])
        shares = {name: f"{statistics.median(values) / whole:.1%}" for name, values in times.items()}
        table(times, "ms", milliseconds, digits=1, columns={"of the step": shares})


if __name__ == "__main__":
    main()
