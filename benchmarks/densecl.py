"""A training step of densecl.py beside one of moco.py at equal batch, and its dense loss beside the usual form.

    python benchmarks/densecl.py
    python benchmarks/densecl.py --arch resnet50 --width 1 --image-size 224 --batch-size 256 --device cuda

A step is what the scripts do once the views are there: moving average, both networks, losses, backward pass, optimiser
and queues. The usual dense loss concatenates the logits of all cells with the positive ones and takes the cross
entropy, which holds the array (batch x cells, queue) three times with its gradient. Before timing, loss and gradient of
both must agree to 1e-5.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import densecl
import moco
from benchmarks.timing import clock, duration, machine, measure, milliseconds, parser, speed, table
from common.optim import precision, upcast
from common.resnet import resnet


def usual(q, k, backbone_q, backbone_k, queue, temperature):
    match = (F.normalize(backbone_q, dim=1).transpose(1, 2) @ F.normalize(backbone_k, dim=1)).argmax(2)
    positive = (q * k.gather(2, match[:, None].expand_as(q))).sum(1).flatten()
    logits = torch.cat([positive[:, None], q.transpose(1, 2).flatten(0, 1) @ queue.clone().T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=q.device))


def stepper(model, loss, args, views):
    """A function that makes one step of a model. loss: of what the model returns, and the queues' new keys."""
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    amp, _, _ = precision(args.precision, args.device)
    order = torch.randperm(args.batch_size, generator=torch.Generator().manual_seed(0)).to(args.device)

    def step():
        model.update_target(0.999)
        with amp:
            outputs = model(*views, order)
        value, keys = loss(model, *map(upcast, outputs))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.enqueue(*keys)

    return step


def moco_loss(model, q, k, keys):
    return moco.info_nce(q, k, model.queue, 0.2), [keys]


def densecl_loss(model, q, dense_q, map_q, k, dense_k, map_k, *keys):
    dense = densecl.dense_info_nce(dense_q, dense_k, map_q, map_k, model.dense_queue, 0.2)
    return 0.5 * densecl.info_nce(q, k, model.queue, 0.2) + 0.5 * dense, keys


def main():
    flags = parser(__doc__, repeats=10)
    flags.add_argument("--arch", default="resnet18")
    flags.add_argument("--width", type=float, default=0.25)
    flags.add_argument("--image-size", type=int, default=32)
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--queue", type=int, default=4096)
    flags.add_argument("--precision", default="auto")
    args = flags.parse_args()

    print(machine(args.device))
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    print(f"{args.arch}, width {args.width}, {args.image_size} px, batch {args.batch_size}, {args.queue:,} keys")
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(shape, generator=generator).to(args.device) for _ in range(2)]
    views = [x.contiguous(memory_format=torch.channels_last) for x in views]
    backbones = [resnet(args.arch, args.width, args.image_size) for _ in range(2)]
    jobs = {
        "moco.py's step": stepper(moco.MoCo(backbones[0], queue=args.queue), moco_loss, args, views),
        "densecl.py's step": stepper(densecl.DenseCL(backbones[1], queue=args.queue), densecl_loss, args, views),
    }
    times = measure(jobs, args.repeats, clock(args), args.device, warm_up=True)
    table(times, "ms", milliseconds, digits=1, columns=duration(times, "moco.py's step"))

    cells = backbones[1].stages(views[0][:1].cpu().to(args.device))[-1].shape[2:].numel()
    sizes = [(args.batch_size, 128, cells)] * 2 + [(args.batch_size, backbones[1].dim, cells)] * 2
    q, k, map_q, map_k = (torch.randn(size, generator=generator).to(args.device) for size in sizes)
    queue = F.normalize(torch.randn(args.queue, 128, generator=generator), dim=1).to(args.device)
    q, k = F.normalize(q, dim=1).requires_grad_(), F.normalize(k, dim=1)

    def passes(loss):
        q.grad = None
        value = loss(q, k, map_q, map_k, queue, 0.2)
        value.backward()
        return value.detach(), q.grad

    jobs = {"dense loss": lambda: passes(densecl.dense_info_nce), "usual": lambda: passes(usual)}
    (loss_a, grad_a), (loss_b, grad_b) = (job() for job in jobs.values())  # also warms up
    difference = ((grad_a - grad_b).abs().max() / grad_b.abs().max()).item()
    print(f"\n{cells} cells: losses {loss_a:.6f} and {loss_b:.6f}; gradients differ by {difference:.1e} of the largest")
    if not (abs(loss_a - loss_b) <= 1e-5 * abs(loss_b) and difference <= 1e-5):
        sys.exit("error: the two forms disagree: their times would not compare")
    times = measure(jobs, args.repeats, clock(args), args.device)
    size = 4 * args.batch_size * cells * args.queue
    arrays = {"dense loss": f"{min(size, 4 * densecl.CHUNK) / 2**20:.0f} MB", "usual": f"3 x {size / 2**20:.0f} MB"}
    table(times, "ms", milliseconds, digits=1, columns=speed(times, "usual") | {"logits": arrays})


if __name__ == "__main__":
    main()
