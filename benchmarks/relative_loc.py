"""Relative location with nine patches per image through the backbone, as relative_loc.py has it, beside eight pairs.

    python benchmarks/relative_loc.py
    python benchmarks/relative_loc.py --device cuda --batch-size 64

The usual form lets both patches of each pair pass the backbone, so the one in the middle passes eight times: 16 patches
instead of 9. Timed are cutting, forward, loss and backward of one batch of images that are on the device. Before that,
losses and gradients of both forms must agree to 1e-8 in double precision and with fixed batch-norm statistics, which
are what the forms differ in. The ratio of their multiplications, as torch counts them, is printed beside that of times.
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, machine, measure, milliseconds, parser, speed, table
from common.optim import precision, upcast
from common.resnet import resnet
from relative_loc import RelativeLoc, cut, places, position_loss


class Pairs(RelativeLoc):
    """The same network, given every pair."""

    def forward(self, x, keep):
        nine = x.unflatten(0, (-1, 9))
        others, middle = torch.cat([nine[:, :4], nine[:, 5:]], 1), nine[:, 4:5].expand(-1, 8, -1, -1, -1)
        f, f_middle = (
            self.backbone(part.flatten(0, 1).contiguous(memory_format=torch.channels_last)) for part in (others, middle)
        )
        hidden = self.neck(torch.cat([f, f_middle], 1))
        return f, self.head(hidden * keep.view_as(hidden))


def main():
    flags = parser(__doc__, repeats=7)
    flags.add_argument("--arch", default="resnet50")
    flags.add_argument("--width", type=float, default=1.0)
    flags.add_argument("--image-size", type=int, default=255)
    flags.add_argument("--patch-size", type=int, default=64)
    flags.add_argument("--hidden-dim", type=int, default=4096)
    flags.add_argument("--batch-size", type=int, default=4, help="images")
    args = flags.parse_args()

    print(machine(args.device))
    print(f"{args.arch}, {args.batch_size} images of {args.image_size} px, patches of {args.patch_size} px")
    torch.manual_seed(0)
    amp, _, _ = precision("auto", args.device)
    backbone = resnet(args.arch, args.width, args.image_size)
    models = {name: kind(backbone, args.hidden_dim) for name, kind in (("nine", RelativeLoc), ("sixteen", Pairs))}
    models["sixteen"].load_state_dict(models["nine"].state_dict())
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    x = x.contiguous(memory_format=torch.channels_last)
    u = torch.rand(args.batch_size, 18, dtype=torch.float64, device=args.device)
    keep = (torch.rand(args.batch_size, 8 * args.hidden_dim, device=args.device) >= 0.5) / 0.5
    labels = torch.arange(8 * args.batch_size, device=args.device) % 8

    def step(name, x=x, amp=amp):
        models[name].zero_grad()
        with amp:
            patches = cut(x, *places(u[: len(x)], args.image_size, args.patch_size), args.patch_size)
            _, logits = models[name](patches, keep[: len(x)].to(x.dtype))
        loss = position_loss(upcast(logits), labels[: len(logits)])
        loss.backward()
        return loss.item()

    work, found, one = {}, [], x[:1].double()
    for name, model in models.items():
        model.to(args.device, torch.float64, memory_format=torch.channels_last).eval()
        with FlopCounterMode(display=False) as counter:
            loss = step(name, one, contextlib.nullcontext())
        work[name] = counter.get_total_flops()
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss_a, gradient_a), (loss_b, gradient_b) = found
    off = ((gradient_a - gradient_b).abs().max() / gradient_b.abs().max()).item()
    print(f"losses {loss_a:.6f} and {loss_b:.6f}; gradients differ by {off:.1e} of the largest")
    if not (abs(loss_a - loss_b) <= 1e-8 and off <= 1e-8):
        sys.exit("error: the two forms disagree: their times would not compare")
    for model in models.values():
        model.float().train()

    jobs = {name: lambda name=name: step(name) for name in models}
    times = measure(jobs, args.repeats, clock(args), args.device, warm_up=True)
    ratios = {name: f"{work['sixteen'] / work[name]:.2f}" for name in models}
    table(times, "ms/step", milliseconds, 0, speed(times, "sixteen") | {"x multiplications": ratios})


if __name__ == "__main__":
    main()
