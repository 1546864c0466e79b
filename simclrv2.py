"""SimCLR v2: Big Self-Supervised Models are Strong Semi-Supervised Learners (Chen et al., NeurIPS 2020, 2006.10029).

SimCLR with a projector of three layers, whose first layer is kept when labels come, with networks that have selective
kernels, and with a memory: K projections of earlier images, by a second network that is a moving average of the first,
w_k <- m w_k + (1 - m) w, and has no gradient. They are further negatives, m_1 ... m_K:

    L = mean over the 2B anchors i of  -log [ e(z_i, z_j) / (sum_{k != i} e(z_i, z_k) + sum_k e(z_i, m_k)) ],
    e(a, b) = exp(cos(a, b) / T), j the other view of i.

    torchrun --nproc_per_node=8 simclrv2.py --data /imagenet --arch resnet50_sk
    torchrun --nproc_per_node=8 simclrv2.py --data /imagenet --arch resnet152_sk --width 3
    python simclrv2.py --data digits --arch resnet18 --width 0.25 --batch-size 128 --lr 0.25 --epochs 40 --flip 0

Then, with few labels and again without any (eval_semi.py; last.pt has the projector, backbone.pt has not):

    python eval_semi.py --pretrained runs/simclrv2/last.pt --data /imagenet --labels 1% --head-layer 1 --lars
    python eval_semi.py --pretrained random --data /imagenet --distill runs/simclrv2/semi.pt --out runs/student

Published, ImageNet, top-1 of networks fine-tuned with 1, 10 and 100 % of the labels, and linear (official README):
ResNet-50 57.9 68.4 76.3 71.7; with selective kernels 64.5 72.1 78.7 74.6; ResNet-152 of width 3 with selective kernels
74.9 80.1 83.1 79.8; ResNet-50 as its student 73.9 with 1 %, 77.5 with 10 % (paper). Without memory ResNet-50 has 71.1
linear (first author, issue 77 of the official code). Ours: not run.

Deviations: the memory, which the official code does not have, is our design after the paper's description: it takes the
keys of the second view, once per step, after the loss, and starts with random vectors. It has not been tried on
ImageNet; in a short run with small batches it ruined the features (results/README.md; negatives of another network may
be told apart without looking at the image), so that fewer than 65,536 images get none. Others are those of simclr.py:
crops, bicubic interpolation, saturation, contrast and the blur's borders are torchvision's, not TensorFlow's;
convolutions start from He's initialisation; the blur's sigma is drawn per image; LARS multiplies by the rate outside
its momentum buffer; bf16 on CUDA, the loss in fp32; images of at most 64 pixels are not blurred, are cropped to a fifth
of their area at least (0.08 in the paper), and get a 3x3 stem.
To hack: copy this file. What is SimCLR v2: the sections model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, fail, number, positive, probability, share, width
from common.augment import View
from common.distributed import gather, rank
from common.features import output_std
from common.networks import network
from common.optim import LARS, cosine, param_groups, upcast
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("SimCLR v2")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    text = "resnet18, 34, 50, 101, 152, with selective kernels resnet50_sk ..., torchvision:NAME or timm:NAME"
    group.add_argument("--arch", default="resnet50", help=text)
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--layers", type=at_least(2, high=20), default=3, help="of the projector g")
    group.add_argument("--dim", type=positive(int), default=128, help="outputs of the projector g")
    group.add_argument("--temperature", type=positive(float), default=0.1, help="T; 0.5 is better on CIFAR-10")
    group.add_argument(
        "--color-strength", type=at_least(0, float), default=1.0, help="s of the colour distortion; 0.5 on CIFAR-10"
    )
    text = "number of keys, K; 0: no memory (default: 65536, of fewer images 0)"
    group.add_argument("--memory", type=at_least(0), help=text)
    group.add_argument("--key-momentum", type=number(float, 0, 1), default=0.999, help="m of the memory's network")
    group.add_argument("--scale-loss", type=positive(float), default=1.0, help="2 as in the official code")
    group.add_argument("--epochs", type=positive(int), default=800)
    group.add_argument("--warmup-epochs", type=at_least(0, float), help="default: 5 %% of the epochs")
    group.add_argument(
        "--batch-size", type=positive(int), default=4096, help="images per step over all processes and --accum"
    )
    group.add_argument("--lr", type=positive(float), default=0.1, help="multiplied by the root of batch-size")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-4)
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    args.warmup_epochs = 0.05 * args.epochs if args.warmup_epochs is None else args.warmup_epochs
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5, strength=1.0):
    """Both views alike: crop, flip, colour distortion of strength s, blur (appendix A). Pixels stay in [0, 1]."""
    view = View(
        size=size,
        area=(crop_min, 1.0),
        interpolation="bicubic",
        flip=flip,
        jitter=(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=0.5 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    return [view, view]


# ------------------------------------------------------------------------------------------------------ model
class SimCLRv2(nn.Module):
    """Backbone f and projector g with batch norm after each layer (section 2), and the memory with its network.

    layers, dim: of the projector, whose hidden layers are as wide as the features. memory: K, 0 for none.
    """

    def __init__(self, backbone, layers=3, dim=128, memory=0):
        super().__init__()
        self.backbone, parts = backbone, []
        for outputs in [*[backbone.dim] * (layers - 1), dim]:
            parts += [nn.Linear(backbone.dim, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*parts[:-1])
        self.projector[-1].bias.requires_grad_(False)  # a scale but no shift, as in the official code
        for layer in self.projector[::3]:
            nn.init.normal_(layer.weight, std=0.01)
        if memory:
            self.reset_target()
            self.register_buffer("queue", F.normalize(torch.randn(memory, dim), dim=1))
            self.register_buffer("oldest", torch.tensor(0))  # row of the queue that the next key replaces

    def reset_target(self):
        """Makes the target a copy of the online network as it is now, without gradient."""
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum):
        """target <- momentum * target + (1 - momentum) * online, for parameters; batch-norm statistics are its own."""
        target = [*self.target_backbone.parameters(), *self.target_projector.parameters()]
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys):
        """Replaces the oldest keys by `keys` (N, D), in place. Neither N nor K has to divide the other."""
        size, n = len(self.queue), len(keys)
        rows = torch.arange(max(0, n - size), n, device=keys.device)  # of more than K, the last K stay
        self.queue[(self.oldest + rows) % size] = keys[-size:]
        self.oldest.add_(n).remainder_(size)  # stays on the device: reading it would wait for the step

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns projections z1, z2, (B, D) each, and with a memory the keys of x2 of all
        processes (W B, D), of length 1.

        The views pass together: batch-norm statistics are those of both. The memory's network sees x2 alone.
        """
        z1, z2 = self.projector(self.backbone(torch.cat([x1, x2]))).chunk(2)
        if not hasattr(self, "queue"):
            return z1, z2
        with torch.no_grad():
            return z1, z2, F.normalize(upcast(gather(self.target_projector(self.target_backbone(x2)))), dim=1)


# ------------------------------------------------------------------------------------------------------- loss
def nt_xent(z1, z2, temperature, memory=None):
    """Normalised temperature-scaled cross entropy, mean over the 2B anchors of this process.

    z1, z2: (B, D), row i of one is the partner of row i of the other; candidates are those of all processes, and the
    rows of memory (K, D), of length 1 and without gradient. Equal embeddings give ln(2B - 1 + K), B the global batch.
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    anchors, candidates = torch.cat([z1, z2]), torch.cat([gather(z1), gather(z2)])
    batch = len(candidates) // 2
    if memory is not None:
        candidates = torch.cat([candidates, memory.detach()])
    own = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
    logits = anchors @ candidates.T / temperature  # (2 B_local, 2B + K)
    logits = logits.scatter(1, torch.cat([own, own + batch])[:, None], -math.inf)  # never its own candidate
    return F.cross_entropy(logits, torch.cat([own + batch, own]))


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    data = run.open(augmentation(args.image_size, args.crop_min, args.flip, args.color_strength))
    usual = 65536 if len(data) >= 65536 else 0  # SimCLR v2: a memory of all images would hold the anchor's own
    memory = usual if args.memory is None else args.memory
    if 0 < memory < args.batch_size:
        fail(f"--memory {memory} is smaller than --batch-size {args.batch_size}, whose keys it takes: 0, or more")
    backbone = network(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = run.place(SimCLRv2(backbone, args.layers, args.dim, memory))
    if args.init and memory:
        model.reset_target()  # SimCLR v2: the target starts as a copy
    peak = args.lr * math.sqrt(args.batch_size)
    optimizer = LARS(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)
    rule = f"{args.lr} x sqrt({args.batch_size})"
    candidates = 2 * args.batch_size // args.accum - 1 + memory
    chance = math.log(candidates)
    lines = {"baseline": f"loss ln({candidates}) = {chance:.2f}"}
    none = "none" + (f": there are {len(data):,} images, fewer than 65,536 keys" if args.memory is None else "")
    lines["memory"] = f"{memory:,} keys" if memory else none
    lines |= {"small batch": "our short runs took --lr 0.25"} if args.lr < 0.25 and args.batch_size <= 256 else {}
    net = run.start(model, optimizer, chance=chance, lr=f"{rule} = {peak:.4g}", **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if memory:
                model.update_target(args.key_momentum)  # SimCLR v2: once per step, before its keys
            keys = []
            for batch in batches:
                x1, x2 = batch.views()
                z1, z2, *new = net(x1, x2)
                run.backward(nt_xent(z1, z2, args.temperature, model.queue if memory else None), args.scale_loss)
                keys += new
            run.update(optimizer)
            if memory:
                model.enqueue(torch.cat(keys))  # SimCLR v2: once the losses of the step have used the memory
            run.log(lr, std=output_std(z1))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
