"""MAE's two savings: an encoder that sees the visible patches only, and one cheap view per image.

    python benchmarks/mae.py
    python benchmarks/mae.py --data /imagenet/val --workers 8
    python benchmarks/mae.py --device cuda --arch vit_large --batch-size 64 --images 0

Step: forward, loss, backward and AdamW of mae.py, beside the same encoder and decoder when mask tokens take the places
of the removed patches before the encoder, so that all tokens pass it. Before timing, both must predict the same
when nothing is removed. The ratio of their multiplications, as torch counts them, is printed beside that of the times.
Input: the view of mae.py (decode, crop, bicubic, mirror, normalise), as benchmarks/loader.py times it with --views one.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import loader
from benchmarks.timing import machine, measure, milliseconds, parser, speed, table
from common.datasets import open_dataset
from common.optim import param_groups, precision, upcast
from common.vit import vit
from mae import MAE, mae_loss, random_masking


class AllTokens(MAE):
    """The same networks with mask tokens in the encoder."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.encoder_mask = nn.Parameter(torch.zeros(1, 1, backbone.dim))

    def forward(self, x, noise, mask_ratio=0.75):
        _, _, mask = random_masking(noise, mask_ratio)
        backbone = self.backbone
        positions, first = backbone.pos_embed[:, 1:], backbone.pos_embed[:, :1]
        x = torch.where(mask[:, :, None] > 0, self.encoder_mask, backbone.patch_embed(x)) + positions
        x = torch.cat([(backbone.cls_token + first).expand(len(x), -1, -1), x], 1)
        for block in backbone.blocks:
            x = block(x)
        in_place = torch.arange(mask.shape[1], device=x.device).expand(len(x), -1)
        return self.decode(backbone.norm(x), in_place), mask


def steps(args):
    """Times both forms of a step."""
    device = args.device
    amp, _, _ = precision("auto", device)
    models = {}
    for name, kind in (("ours", MAE), ("all tokens", AllTokens)):
        torch.manual_seed(0)
        models[name] = kind(vit(args.arch, args.image_size)).to(device)
    patches, patch = models["ours"].backbone.grid[0] ** 2, models["ours"].backbone.patch_size
    x = torch.randn(args.batch_size, 3, args.image_size, args.image_size).to(device)
    x, noise = x.contiguous(memory_format=torch.channels_last), torch.rand(args.batch_size, patches).to(device)

    work, found = {}, []
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            found.append(model(x[:1], noise[:1], 0.0)[0])
            before = counter.get_total_flops()
            model(x[:1], noise[:1])
        work[name] = counter.get_total_flops() - before
    off = (found[0] - found[1]).abs().max().item() / found[0].abs().max().item()
    print(f"\n{args.arch}, {args.image_size} px, batch {args.batch_size}; nothing removed: they differ by {off:.0e}")
    if not off < 1e-4:
        sys.exit("error: the two forms disagree: their times would not compare")

    optimizers = {n: torch.optim.AdamW(param_groups(m, 0.05), lr=1e-4, betas=(0.9, 0.95)) for n, m in models.items()}

    def step(name):
        with amp:
            prediction, mask = models[name](x, noise)
        mae_loss(x, upcast(prediction), mask, patch).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    jobs = {name: lambda name=name: step(name) for name in models}
    times = measure(jobs, args.repeats, device=device, warm_up=True)
    ratios = {name: f"{work['all tokens'] / work[name]:.2f}" for name in models}
    table(times, "ms/step", milliseconds, 0, speed(times, "all tokens") | {"x multiplications": ratios})


def main():
    flags = parser(__doc__, repeats=5, cpu_time=False)
    flags.add_argument("--arch", default="vit_base")
    flags.add_argument("--image-size", type=int, default=224)
    flags.add_argument("--batch-size", type=int, default=4, help="of the step")
    flags.add_argument("--no-step", action="store_true", help="the input only")
    flags.add_argument("--data", help="folder of JPEG files (default: makes its own)")
    flags.add_argument("--images", type=int, default=512, help="images per pass of the input (0: the step only)")
    flags.add_argument("--workers", type=int, default=2, help="threads, or processes of the DataLoaders")
    args = flags.parse_args()
    if args.repeats < 1 or args.batch_size < 1:
        flags.error("--repeats and --batch-size must be at least 1")

    print(machine(args.device))
    if not args.no_step:
        steps(args)
    if args.images:
        args.batch_size = min(64, args.images)
        args.images -= args.images % args.batch_size
        with tempfile.TemporaryDirectory() as folder:
            if not args.data:
                loader.make_photos(folder)
            dataset = open_dataset(args.data or folder, "train")
            print(f"\n{len(dataset)} files, {args.images} images per pass, {args.workers} workers", end="")
            loader.compare("one", dataset, args)
    print(f"\nafter: {machine(args.device)}")


if __name__ == "__main__":
    main()
