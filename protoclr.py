"""ProtoCLR: Self-Supervised Prototypical Transfer Learning for Few-Shot Classification (Medina et al. 2020,
arXiv 2006.11325).

Every image of a batch of N is a class of its own. Its prototype c_i is the feature of the image as it is; Q augmented
views of it are queries q, which have to find it among the N prototypes:
L = mean over queries of  -log [ exp(-|q - c_i|^2) / sum_k exp(-|q - c_k|^2) ].
There is no projector, no temperature, and features are not normalised: prototypes are compared in the same way by
eval_fewshot.py afterwards.

    python protoclr.py --data /mini-imagenet
    torchrun --nproc_per_node=8 protoclr.py --data /imagenet --batch-size 48 --arch resnet18
    python protoclr.py --data /omniglot --augmentation characters --image-size 28 --channels 1 --epochs 1000
    python eval_fewshot.py --pretrained runs/protoclr/backbone.pt --data /mini-imagenet --shots 1 5

Published, Conv4, 5 classes, accuracy on unseen classes with fine-tuning of the last layer (the paper, by a listing of
results): mini-ImageNet, 1 and 5 images per class: 45.67 and 62.99. Ours: not run; on a few characters see
results/README.md.

The rate is halved every 25,000 steps, whatever their number. The official code draws batches at random until the
training accuracy has not risen for 20,000 steps; here epochs are counted, and 130, about 100,000 steps on
mini-ImageNet, are our number. --augmentation photos (mini-ImageNet): crop, both mirrors, colours; characters
(Omniglot): crop, both mirrors, 30 % of the pixels and a rectangle erased. Pixels stay in [0, 1].

Deviations from the official code beside that: the support image is cropped to a square; pixels that are kept are not
divided by 0.7; a rectangle that does not fit is clipped, not drawn again; resizing is antialiased.
To hack: copy this file. What is ProtoCLR: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, default_size, positive, probability, share, width
from common.augment import EvalView, View
from common.checkpoint import MAKERS
from common.distributed import gather, rank
from common.features import output_std
from common.networks import network
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("ProtoCLR")
    text = "photos: colours change; characters: pixels and a rectangle are erased"
    group.add_argument("--augmentation", choices=["photos", "characters"], default="photos", help=text)
    group.add_argument("--crop-min", type=share, help="smallest share of the image area in a crop (default: 0.5, 0.6)")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of each mirror, left-right, up-down")
    text = "conv4, resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME"
    group.add_argument("--arch", default="conv4", help=text)
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--queries", type=positive(int), default=3, help="Q: augmented views of an image")
    group.add_argument("--epochs", type=positive(int), default=130)
    group.add_argument("--warmup-epochs", type=at_least(0), default=0)
    group.add_argument(
        "--batch-size", type=positive(int), default=50, help="N: images per step over all processes and --accum"
    )
    group.add_argument("--lr", type=positive(float), default=1e-3, help="as it is, whatever the batch size")
    group.add_argument("--weight-decay", type=at_least(0, float), default=0.0)
    group.add_argument("--halve-every", type=positive(int), default=25_000, help="steps after which the rate is halved")
    args = parser.parse_args(argv)
    usual = {"photos": 84, "characters": 28}[args.augmentation] if default_size(args.data) == 224 else None
    args.image_size = args.image_size or usual or default_size(args.data)
    args.crop_min = args.crop_min or {"photos": 0.5, "characters": 0.6}[args.augmentation]
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, queries=3, crop_min=0.5, flip=0.5, characters=False):
    """The image as it is, then the queries. Of characters, crops of more than the image are drawn again, ten times."""
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    jitter = {} if characters else {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.2}
    query = View(size=size, area=(crop_min, 1.4 if characters else 1.0), flip=flip, **jitter, **plain)
    return [EvalView(size, resize=size, **plain)] + [query] * queries


def erase(x, u, dropout=0.3, p=0.5, area=(0.02, 0.33), ratio=0.3):
    """Sets pixels to 0 with this probability, and with probability p a rectangle; x: (B, C, S, S), u: uniforms
    (B, S S + 5). area: of the rectangle, as a share, ratio: its smallest height / width, 1 / ratio the largest."""
    size = x.shape[-1]
    keep = (u[:, 5:] >= dropout).view(-1, 1, size, size)
    whether, share, aspect, top, left = u[:, :5].T
    pixels, aspect = size * size * (area[0] + share * (area[1] - area[0])), ratio ** (1 - 2 * aspect)
    sides = torch.stack([(pixels * aspect).sqrt(), (pixels / aspect).sqrt()]).round().clamp(max=size)
    first = (torch.stack([top, left]) * (size + 1 - sides)).floor()
    line = torch.arange(size, device=x.device)
    rows, columns = ((line >= f[:, None]) & (line < (f + s)[:, None]) for f, s in zip(first, sides, strict=True))
    inside = rows[:, :, None] & columns[:, None] & (whether < p)[:, None, None]
    return x * (keep & ~inside[:, None])


# ------------------------------------------------------------------------------------------------------ model
class ProtoCLR(nn.Module):
    """The backbone alone: its features are compared as they are (section 3.1)."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, support, *queries):
        """Images (B, C, S, S) each. Returns the features of the support (B, D) and of all queries (Q, B, D).

        They pass together: batch-norm statistics are those of all.
        """
        z = self.backbone(torch.cat([support, *queries])).unflatten(0, (1 + len(queries), -1))
        return z[0], z[1:]


# ------------------------------------------------------------------------------------------------------- loss
def protoclr_logits(support, queries):
    """Minus the squared distance of each query to the prototypes of all processes, without |q|^2, which they share:
    support (B, D), queries (Q, B, D) -> (Q, B, N)."""
    prototypes = gather(support)
    return 2 * queries @ prototypes.T - prototypes.square().sum(1)


def protoclr_loss(logits):
    """Cross entropy of the own prototype, mean over the queries. logits: (Q, B, N). Equal features give ln N."""
    own = torch.arange(logits.shape[1], device=logits.device) + rank() * logits.shape[1]
    return F.cross_entropy(logits.flatten(0, 1), own.repeat(len(logits)))


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    characters = args.augmentation == "characters"
    run.open(augmentation(args.image_size, args.queries, args.crop_min, args.flip, characters))
    shape = {"width": args.width, "image_size": args.image_size, "channels": args.channels}
    backbone = MAKERS.get(args.arch, network)(args.arch, **shape)
    model = run.place(ProtoCLR(backbone))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    classes = args.batch_size // args.accum
    chance = math.log(classes)
    halvings = (run.total - 1) // args.halve_every
    lines = {"baseline": f"loss ln({classes}) = {chance:.2f}; distances of {backbone.dim:,} numbers begin far above"}
    lines["classes"] = f"{classes} images, {args.queries} queries of each"
    net = run.start(model, optimizer, chance=chance, lr=f"{args.lr:g}, halved {halvings} times", **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = args.lr * (step / run.warmup if step < run.warmup else 0.5 ** (step // args.halve_every))  # ProtoCLR
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                support, *queries = batch.views()
                pixels, n = args.image_size**2 if characters else 0, args.queries
                u = batch.uniforms(n * (1 + 5 + pixels)).to(support.dtype).unflatten(1, (n, -1))
                for i, x in enumerate(queries):  # ProtoCLR: the second mirror
                    x = torch.where((u[:, i, 0] < args.flip)[:, None, None, None], x.flip(2), x)
                    queries[i] = erase(x, u[:, i, 1:]) if characters else x
                z, q = net(support, *queries)
                logits = protoclr_logits(z, q)
                run.backward(protoclr_loss(logits))  # ProtoCLR
            run.update(optimizer)
            own = torch.arange(logits.shape[1], device=logits.device) + rank() * logits.shape[1]
            run.log(lr, accuracy=100 * (logits.argmax(2) == own).float().mean(), std=output_std(z))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
