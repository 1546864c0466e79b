"""SimSiam: Exploring Simple Siamese Representation Learning (Chen & He, CVPR 2021, arXiv 2011.10566).

Two views of an image pass one network; a predictor on one side has to predict the projection of the other side,
which receives no gradient:  L = -1/2 [cos(p1, stopgrad(z2)) + cos(p2, stopgrad(z1))].

    torchrun --nproc_per_node=8 simsiam.py --data /imagenet
    python simsiam.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40

Published, ResNet-50 on ImageNet, 100 epochs, linear top-1: 68.1 with batch 512, 68.3 with 256 (official code);
68.3 in MMSelfSup 0.11. Ours: not run.

Small images (paper, appendix D; 32 px): --image-size 32 --arch resnet18 --lr 0.03 --weight-decay 5e-4 --epochs 800.

Deviations from the paper: the learning rate follows the cosine per step, not per epoch; images of at most 64 pixels
are not blurred (as in the paper's CIFAR-10 appendix) and get a 3x3 stem.
To hack: copy this file. What is SimSiam: the sections augmentation, model and loss, and the lines marked in main.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.augment import EvalView, View
from common.checkpoint import init_from, resume, save_run
from common.data import Loader, build, default_size, fit
from common.distributed import finish, init, mean, parallel, sync_batch_norm
from common.knn import knn_monitor
from common.log import Logger, Parser, check_args, describe, output_std, save_views
from common.optim import cosine, full, precision
from common.resnet import resnet


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", required=True, help="folder or .tar of images, or digits, cifar10[:DIR], cifar100, stl10, fake[:N]"
    )
    group.add_argument("--train-list", help="list file of training images, 'relative/path[ label]' per line")
    group.add_argument("--val-list", help="list file of validation images")
    group.add_argument("--image-size", type=int, help="pixels of a view (default: 224, or what fits a small named set)")
    group.add_argument("--crop-min", type=float, default=0.2, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=float, default=0.5, help="probability of a mirrored view")
    group.add_argument("--channels", type=int, default=3, help="of the images; all can be made 1 or 3")
    group.add_argument("--stats", choices=["imagenet", "auto"], help="normalisation (default: auto unless 3 channels)")
    group.add_argument("--decode", choices=["cpu", "gpu"], default="cpu", help="gpu: JPEGs by nvJPEG, other rounding")
    group.add_argument("--max-bad", type=int, default=100, help="stop after this many undecodable images")
    group = parser.add_argument_group("SimSiam")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=int, default=2048, help="width of projector and output d")
    group.add_argument("--pred-dim", type=int, default=512, help="bottleneck of the predictor h")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=100)
    group.add_argument("--warmup-epochs", type=int, default=0)
    group.add_argument("--batch-size", type=int, default=512, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--lr", type=float, default=0.05, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--weight-decay", type=float, default=1e-4)
    group.add_argument("--momentum", type=float, default=0.9)
    group = parser.add_argument_group("run")
    group.add_argument("--out", default=f"runs/{Path(__file__).stem}", help="run folder")
    group.add_argument("--resume", action="store_true", default=True, help="continue from last.pt in --out")
    group.add_argument("--no-resume", dest="resume", action="store_false", help="start again, overwriting --out")
    group.add_argument("--init", help="weights to start from, with a fresh schedule")
    group.add_argument("--max-steps", type=int, default=0, help="stop after this many steps, keeping the schedule")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--workers", type=int, default=8, help="loading threads per process")
    group.add_argument("--device", default="auto")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16", "fp64"], default="auto")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--log-every", type=int, default=20, help="steps")
    group.add_argument("--save-every", type=float, default=10, help="minutes")
    group.add_argument("--knn-every", type=int, default=10, help="epochs between k-NN accuracies (0: never)")
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5):
    """Both views alike: that of MoCo v2 (paper, section 3)."""
    view = View(
        size=size,
        crop=(crop_min, 1.0),
        flip=flip,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=0.5 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
    )
    return [view, view]


# ------------------------------------------------------------------------------------------------------ model
class SimSiam(nn.Module):
    """Backbone f, projector of 3 layers and predictor h of 2 (section 3, "Baseline settings").

    dim: width of the projector's layers, pred_dim: bottleneck of the predictor.
    """

    def __init__(self, backbone, dim=2048, pred_dim=512):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.ReLU(inplace=True),
            nn.Linear(dim, dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.ReLU(inplace=True),
            nn.Linear(dim, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),  # without scale and shift, as in the official code
        )
        self.predictor = nn.Sequential(
            nn.Linear(dim, pred_dim, bias=False),
            nn.BatchNorm1d(pred_dim),
            nn.ReLU(inplace=True),
            nn.Linear(pred_dim, dim),
        )

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns predictions p1, p2 and projections z1, z2, (B, D) each.

        The views pass separately: batch-norm statistics are those of one view.
        """
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        return self.predictor(z1), self.predictor(z2), z1.detach(), z2.detach()


# ------------------------------------------------------------------------------------------------------- loss
def simsiam_loss(p1, p2, z1, z2):
    """Negative cosine similarity, symmetric (algorithm 1); no gradient into z. (B, D) each -> scalar in [-1, 1]."""
    return -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2


# --------------------------------------------------------------------------------------------------- training
def main(args):
    device = init(args.device)
    check_args(args)
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)

    data = build(args.data, "train", args.train_list, channels=args.channels)
    val = build(args.data, "val", args.val_list, required=False, channels=args.channels)
    views = fit(augmentation(args.image_size, args.crop_min, args.flip), data, args.stats, args.workers)
    settings = {k: getattr(args, k) for k in ("seed", "workers", "accum", "max_bad", "decode")}
    loader = Loader(data, views, args.batch_size, device=device, dtype=dtype, **settings)
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    backbone = resnet(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = SimSiam(backbone, args.dim, args.pred_dim)
    model = sync_batch_norm(model.to(device, dtype, memory_format=torch.channels_last))
    if args.init:
        init_from(args.init, model)
    peak = args.lr * args.batch_size / 256
    groups = [  # SimSiam: weight decay on everything, and a predictor whose learning rate does not decay (section 4.2)
        {"params": [*model.backbone.parameters(), *model.projector.parameters()], "fixed": False},
        {"params": [*model.predictor.parameters()], "fixed": True},
    ]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    describe(args, data, loader, model, lr=f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", chance="loss 0, best -1")
    log = Logger(args, loader, total, step)

    def save():
        save_run(args, step, len(data), model, optimizer, scaler, model.backbone, views[0])

    def knn():
        view = EvalView(args.image_size, mean=views[0].mean, std=views[0].std)
        return knn_monitor(model.backbone, data, val, view, device, args.workers, amp)

    if args.knn_every and not state:
        log.note(0, **knn())
    saved = time.monotonic()
    for epoch in range(step // loader.steps, args.epochs):
        batches = loader.epoch(epoch, start=step % loader.steps)
        for step in range(step + 1, min((epoch + 1) * loader.steps, log.last) + 1):
            lr = peak * cosine(step - 1, total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = peak if group["fixed"] else lr  # SimSiam
            loss = 0.0
            for _ in range(args.accum):
                batch = next(batches)
                if step == 1:
                    save_views(f"{args.out}/views.png", batch)
                x1, x2 = batch.views()
                with amp:
                    p1, p2, z1, z2 = net(x1, x2)
                part = simsiam_loss(full(p1), full(p2), full(z1), full(z2)) / args.accum  # SimSiam
                scaler.scale(part).backward()
                loss = loss + part.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            if log.due(step):
                log.log(step, step / loader.steps, mean(loss).item(), lr, std=mean(output_std(z1)).item())
                stop = log.stop.requested(device)
                if stop or step == log.last or time.monotonic() - saved > 60 * args.save_every:
                    save()
                    saved = time.monotonic()
                if stop:
                    log.end(step)
        whole = step == (epoch + 1) * loader.steps  # not cut short by --max-steps
        if args.knn_every and whole and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            log.note(step, **knn())
        if step >= log.last:
            break
    log.close()
    finish()


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
