"""Detection: a pre-trained ResNet becomes Faster or Mask R-CNN, which is trained end to end.

    torchrun --nproc_per_node=8 eval_detection.py --pretrained runs/moco/backbone.pt --data VOCdevkit
    torchrun --nproc_per_node=8 eval_detection.py --pretrained runs/moco/backbone.pt --data coco --recipe coco-fpn
    python eval_detection.py --pretrained random --data bccd --steps 300 --sizes 160 192 --test-size 192 --rois 64

recipe    network                              steps    batch  rate  falls by 10 at    warm-up  short side
voc-c4    Faster R-CNN, layer3 and layer4      24,000   16     0.02  18,000, 22,000    100      480 to 800
coco-fpn  Mask R-CNN, feature pyramid          90,000   16     0.02  60,000, 80,000    1,000    640 to 800
coco-c4   Mask R-CNN, layer3 and layer4        180,000  16     0.02  120,000, 160,000  1,000    640 to 800

SGD, momentum 0.9, weight decay 1e-4, mirrored with probability 1/2, tested at 800. With another --batch-size the rate
goes with it, and the steps against it. C4 is that of MoCo (He et al., CVPR 2020, arXiv 1911.05722): proposals and RoIs
from layer3; layer4, from the file as well, and one more batch norm work on each RoI, once for box and mask. The pyramid
has a box head of four convolutions and a dense layer, as the tables of MMSelfSup. All layers are trained, all batch
norms see the whole batch. As in detectron2 box losses are L1, RoIAlign is aligned and samples adaptively, the loss of
proposals is divided by 256 per image. Channels of the heads go with the width of the backbone.

--data: a folder in the layout of VOC (VOC2007, trained with VOC2012 if it lies beside it) or of COCO; common/boxes.py.
Either goes with any recipe: masks are learned where the recipe and the set have them. VOC's layout is judged by the
11-point AP of VOC2007: overlaps of whole pixels, difficult objects neither right nor wrong, scores rounded to three
digits and boxes to one as detectron2 does, AP the mean over overlaps .5 to .95. COCO's is judged by pycocotools. Images
smaller than usual need smaller --sizes and --anchors; --proposals and --rois bound the time of a step. A network for
images of at most 64 px has no stride in its stem: its maps are four times as fine, and cost 16 times as much.

Published, AP50/AP/AP75 on VOC07: supervised 81.3/53.5/58.8, MoCo 81.5/55.9/62.6, MoCo v2 82.4/57.0/63.6 (official);
random 59.0/32.8/31.6, Relative-Loc 80.4/55.1/61.2, Rotation 80.9/55.5/61.4, NPID 80.0/54.1/59.5, SimCLR 79.4/51.5/55.6,
BYOL 79.6/49.0/52.8 (OpenSelfSup). COCO FPN, box/mask AP: MoCo v2 40.2/36.1, BYOL 40.9/36.8, SwAV 40.2/36.3, SimSiam
38.6/34.6, SimCLR 38.7/34.9 (MMSelfSup). COCO C4: supervised 40.0/34.7, random 35.6/31.4, MoCo v2 41.0/35.6, SimCLR
39.6/34.6, BYOL 40.2/34.9 (OpenSelfSup). Ours: not run.

Deviations: sizes, mirroring and the draws of anchors and RoIs belong to the image, and a batch is padded to its largest
image, so that nothing depends on the number of processes. Batches are not sorted by aspect ratio; anchors are rounded
to pixels. Scales and shifts of norms have no weight decay, in the pyramid either. Masks are drawn at the size of the
resized image. Images without objects are not trained on. The statistics of batch norm are measured anew over
--precise-bn batches before the test, as in MoCo's code.
"""

import common.interrupt  # noqa: F401 (before torch)
import contextlib
import io
import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from common.args import Parser, at_least, fail, fitting_batch, positive, probability, toggle
from common.boxes import Loader, coco_tools, draw_masks, encode_mask, jobs, open_boxes, padded, prepare, save_pairs
from common.checkpoint import load_pretrained
from common.distributed import gather_uneven, is_main, print0, process_mean, world_size
from common.files import result_folder
from common.loader import eval_share
from common.log import bar, facts, identity, report
from common.optim import upcast
from common.run import Run, start_device

RECIPES = {
    "voc-c4": {"steps": 24_000, "falls": (18 / 24, 22 / 24), "warmup": 100, "sizes": range(480, 801, 32)},
    "coco-fpn": {"steps": 90_000, "falls": (60 / 90, 80 / 90), "warmup": 1000, "sizes": range(640, 801, 32)},
    "coco-c4": {"steps": 180_000, "falls": (120 / 180, 160 / 180), "warmup": 1000, "sizes": range(640, 801, 32)},
}
PROPOSALS = {"c4": ({"training": 12_000, "testing": 6_000}, {"training": 2_000, "testing": 1_000})}
PROPOSALS["fpn"] = ({"training": 2_000, "testing": 1_000}, {"training": 1_000, "testing": 1_000})  # before, after NMS
OVERLAPS = [50 + 5 * i for i in range(10)]  # percent
FIRST, PICTURES = np.array([1, 1, 0, 0]), 8  # VOC counts pixels from 1
LOSSES = ("rpn", "rpn_box", "class", "box", "mask")


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    run = parser.add_pretrained(lists=False)
    group = parser.add_argument_group("recipe (defaults: the table above)")
    group.add_argument("--recipe", choices=sorted(RECIPES), help="default: voc-c4, of a set in COCO's layout coco-fpn")
    group.add_argument("--steps", type=positive(int), help="default: those of the table x 16 / batch-size")
    group.add_argument("--batch-size", type=positive(int), default=16, help="images per step over all processes")
    group.add_argument("--lr", type=positive(float), default=0.02, help="per 16 images: multiplied by batch-size / 16")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-4)
    group.add_argument("--warmup", type=at_least(0), help="steps in which the rate rises to its peak")
    group.add_argument("--sizes", type=positive(int, 10_000), nargs="+", help="shorter sides in training, in pixels")
    group.add_argument("--test-size", type=positive(int, 10_000), default=800, help="shorter side in the test")
    group.add_argument("--max-side", type=positive(int, 100_000), default=1333, help="no image becomes longer")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored image")
    group.add_argument("--anchors", type=positive(int, 10_000), nargs=5, default=[32, 64, 128, 256, 512], help="sides")
    group.add_argument("--rois", type=positive(int, 100_000), default=512, help="trained on per image")
    group.add_argument(
        "--proposals", type=positive(int, 100_000), default=100_000, help="most that are compared by NMS"
    )
    group.add_argument("--masks", action=toggle, help="default: where recipe and set have them")
    group.add_argument("--precise-bn", type=at_least(0), help="batches (default: 200, for coco-fpn 0)")
    parser.add_loop(run, network=False)
    run.add_argument("--accum", type=positive(int), default=1, help="micro-batches per step")
    return parser.parse_args(argv)


def complete(args, meta, train):
    """The arguments with everything that was left out filled in."""
    recipe = args.recipe or ("coco-fpn" if train.file else "voc-c4")
    usual, fpn = RECIPES[recipe], recipe.endswith("fpn")
    defaults = {"steps": max(1, round(usual["steps"] * 16 / args.batch_size)), "sizes": [*usual["sizes"]]}
    defaults |= {"precise_bn": 0 if fpn else 200, "masks": recipe != "voc-c4" and train.has_masks}
    known = {k: meta[k] for k in ("arch", "width", "channels")} | {"recipe": recipe, "compile": False}
    known |= {"image_size": args.test_size, "out": str(result_folder(args.pretrained, args.out)), "warmup_epochs": 0}
    args = args.replace(**defaults | {k: v for k, v in vars(args).items() if v is not None} | known)
    if args.warmup is None:
        args = args.replace(warmup=min(usual["warmup"], args.steps // 10))
    if args.masks and not train.has_masks:
        fail(f"--masks: {train.file or args.data} has none")
    if args.batch_size > len(train):
        parts = world_size() * args.accum
        fail(
            f"--batch-size {args.batch_size} is larger than the data set ({len(train)} images): "
            f"try {fitting_batch(len(train), parts, len(train)) or 'one process'}"
        )
    return args.replace(epochs=-(-args.steps // (len(train) // args.batch_size)), anchors=sorted(args.anchors))


# ------------------------------------------------------------------------------------------------------- model
def draw(labels, seed, count, share):
    """Rows of at most `count` boxes, a function of the seed: of labels 1 and more, which are at most this share of
    `count`, and of label 0 for the rest. Boxes of label -1 are never drawn."""
    generator, found = torch.Generator().manual_seed(seed), []
    for rows, most in ((torch.where(labels >= 1)[0], int(count * share)), (torch.where(labels == 0)[0], count)):
        most -= len(found[0]) if found else 0
        found.append(rows[torch.randperm(len(rows), generator=generator)[:most].to(rows.device)])
    return found


def average(total, count):
    """A sum of this process over the mean count of a process: their mean over processes is that of all boxes."""
    return total / process_mean(total.new_tensor(float(count))).clamp(min=1)


class Proposals(RegionProposalNetwork):
    """Region proposals with detectron2's losses. seeds: of the images of the batch."""

    def compute_loss(self, objectness, deltas, labels, regression):
        """Cross-entropy of 256 anchors per image and L1 of those on objects, both divided by 256 per image."""
        each, start, positive, negative = len(labels[0]), 0, [], []
        for label, seed in zip(labels, self.seeds, strict=True):
            for rows, drawn in zip((positive, negative), draw(label, seed, 256, 0.5), strict=True):
                rows.append(drawn + start)
            start += each
        positive, negative = torch.cat(positive), torch.cat(negative)
        rows, labels, regression = torch.cat([positive, negative]), torch.cat(labels), torch.cat(regression)
        logits, number = upcast(objectness.flatten()[rows]), 256 * len(self.seeds)
        entropy = F.binary_cross_entropy_with_logits(logits, labels[rows].to(logits.dtype), reduction="sum")
        return entropy / number, (upcast(deltas[positive]) - regression[positive]).abs().sum() / number


class RoIPool(nn.Module):
    """RoIAlign, aligned, with as many samples as a cell has pixels. Of several maps the first pools RoIs of less than
    28 of its cells, the second those of less than 28 of its own ... (Lin et al., CVPR 2017: 224 px from stride 16)."""

    def __init__(self, side, strides):
        super().__init__()
        self.side, self.strides = side, strides

    def forward(self, features, boxes, shapes=None):
        maps = list(features.values())[: len(self.strides)]
        owner = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        rois = torch.cat([owner, torch.cat(boxes)], 1).to(maps[0].dtype)
        if len(maps) == 1:
            return roi_align(maps[0], rois, self.side, 1 / self.strides[0], -1, True)
        out = maps[0].new_zeros(len(rois), maps[0].shape[1], self.side, self.side)
        sides = (rois[:, 3:] - rois[:, 1:3]).prod(1).clamp(min=0).sqrt()
        level = torch.floor(torch.log2(sides / (14 * self.strides[0])) + 1e-8).clamp(0, len(maps) - 1)
        for i, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
            rows = torch.where(level == i)[0]
            out[rows] = roi_align(x, rois[rows], self.side, 1 / stride, -1, True)
        return out


class Heads(RoIHeads):
    """Boxes and masks of RoIs. shared: what both are computed from; mask: from maps to logits (N, classes, S, S), or
    None; mask_pool: None if masks are computed from the maps of the boxes. seeds: of the images of the batch."""

    def __init__(self, pool, shared, box, predictor, mask=None, mask_pool=None, rois=512):
        super().__init__(pool, box, predictor, 0.5, 0.5, rois, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100)
        self.shared, self.mask, self.mask_pool, self.rois = shared, mask, mask_pool, rois
        nn.init.normal_(predictor.cls_score.weight, std=0.01)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
        nn.init.zeros_(predictor.cls_score.bias)
        nn.init.zeros_(predictor.bbox_pred.bias)

    def subsample(self, labels):
        drawn = [draw(own, seed + 1, self.rois, 0.25) for own, seed in zip(labels, self.seeds, strict=True)]
        return [torch.cat(rows).sort()[0] for rows in drawn]

    def forward(self, features, proposals, shapes, targets=None):
        """Losses by name in training, else detections: {boxes, scores, labels, masks (n, 1, S, S)} per image."""
        if not self.training:
            x = self.box_head(self.shared(self.box_roi_pool(features, proposals)))
            found = self.postprocess_detections(*map(upcast, self.box_predictor(x)), proposals, shapes)
            found = [dict(zip(("boxes", "scores", "labels"), each, strict=True)) for each in zip(*found, strict=True)]
            boxes = [each["boxes"] for each in found]
            if self.mask and sum(map(len, boxes)):
                x = (
                    self.mask_pool(features, boxes)
                    if self.mask_pool
                    else self.shared(self.box_roi_pool(features, boxes))
                )
                logits, labels = self.mask(x), torch.cat([each["labels"] for each in found])
                logits = upcast(logits[torch.arange(len(labels)), labels - 1]).split([len(b) for b in boxes])
                found = [each | {"masks": own.sigmoid()} for each, own in zip(found, logits, strict=True)]
            return found
        proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        maps = self.shared(self.box_roi_pool(features, proposals))
        logits, deltas = map(upcast, self.box_predictor(self.box_head(maps)))
        losses = box_losses(logits, deltas, torch.cat(labels), torch.cat(regression))
        if self.mask:
            rows = [torch.where(own > 0)[0] for own in labels]
            count = sum(map(len, rows))
            if not count:  # batch norm needs something to see, which does not count
                rows[0] = rows[0].new_zeros(1)
            boxes = [p[r] for p, r in zip(proposals, rows, strict=True)]
            starts = np.cumsum([0] + [len(p) for p in proposals])
            own = torch.cat([r + s for r, s in zip(rows, starts.tolist()[:-1], strict=True)])
            x = self.mask(self.mask_pool(features, boxes) if self.mask_pool else maps[own])
            classes = torch.cat(labels)[own].clamp(min=1)
            x = upcast(x[torch.arange(len(own)), classes - 1])
            wanted = [
                mask_targets(t["masks"], b, m[r], x.shape[-1]) if len(t["masks"]) else x.new_zeros(len(b), *x.shape[1:])
                for t, b, m, r in zip(targets, boxes, matched, rows, strict=True)
            ]
            entropy = F.binary_cross_entropy_with_logits(x, torch.cat(wanted).to(x.dtype), reduction="none")
            losses.append(average(entropy.mean((1, 2)).sum() * bool(count), count))
        return losses


def box_losses(logits, deltas, labels, regression):
    """Cross-entropy of RoIs, and L1 of those on objects divided by the number of all. logits (N, classes + 1), deltas
    (N, 4 (classes + 1)), labels (N,), regression (N, 4)."""
    rows = torch.where(labels > 0)[0]
    own = deltas.unflatten(1, (-1, 4))[rows, labels[rows]]
    distance = (own - regression[rows]).abs().sum()
    return [average(F.cross_entropy(logits, labels, reduction="sum"), len(labels)), average(distance, len(labels))]


def mask_targets(masks, boxes, matched, side):
    """What lies in the boxes of the masks (n, h, w) that they are matched with: 0 or 1, (len(boxes), side, side)."""
    rois = torch.cat([matched[:, None].to(boxes), boxes], 1)
    return roi_align(masks[:, None].to(boxes), rois, side, 1.0, -1, True)[:, 0] >= 0.5


class Detector(nn.Module):
    """Images (B, C, H, W), their sizes and targets -> losses (4 or 5,) in training, else detections per image."""

    def __init__(self, backbone, classes, fpn, masks, anchors, rois, width=1.0, proposals=100_000):
        super().__init__()
        self.backbone = backbone
        strides = [(1 if backbone.small else 4) * 2**i for i in range(4)]
        channels = [getattr(backbone, f"layer{i}")[-1] for i in (1, 2, 3, 4)]
        channels = [(b.conv3 if hasattr(b, "conv3") else b.conv2).out_channels for b in channels]
        ratios, dim, mask, mask_pool = (0.5, 1.0, 2.0), max(1, round(256 * width)), None, None
        if fpn:
            self.fpn = FeaturePyramidNetwork(channels, dim, LastLevelMaxPool(), nn.BatchNorm2d)
            generator, inputs = AnchorGenerator([(side,) for side in anchors], [ratios] * 5), dim
            shared, hidden = nn.Identity(), max(1, round(1024 * width))
            box, pool = FastRCNNConvFCHead((dim, 7, 7), [dim] * 4, [hidden], nn.BatchNorm2d), RoIPool(7, strides)
            nn.init.kaiming_uniform_(box[-2].weight, a=1)
            nn.init.zeros_(box[-2].bias)
            if masks:
                layers, mask_pool = [*MaskRCNNHeads(dim, [dim] * 4, 1, nn.BatchNorm2d)], RoIPool(14, strides)
        else:
            self.fpn, inputs, hidden, layers = None, channels[2], channels[3], []
            generator = AnchorGenerator((tuple(anchors),), (ratios,))
            shared = nn.Sequential(backbone.layer4, nn.BatchNorm2d(hidden))
            box, pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), RoIPool(14, strides[2:3])
            backbone.layer4 = nn.Identity()
        if masks:
            up, last = nn.ConvTranspose2d(dim if fpn else hidden, dim, 2, 2), nn.Conv2d(dim, classes, 1)
            nn.init.kaiming_normal_(up.weight, mode="fan_out", nonlinearity="relu")
            nn.init.normal_(last.weight, std=0.001)
            nn.init.zeros_(up.bias)
            nn.init.zeros_(last.bias)
            mask = nn.Sequential(*layers, up, nn.ReLU(inplace=True), last)
        head = RPNHead(inputs, generator.num_anchors_per_location()[0])  # boxes get the type of its outputs
        head.register_forward_hook(lambda head, inputs, outputs: tuple([upcast(x) for x in part] for part in outputs))
        before, after = PROPOSALS["fpn" if fpn else "c4"]
        before = {k: min(n, proposals) for k, n in before.items()}
        self.rpn = Proposals(generator, head, 0.7, 0.3, 256, 0.5, before, after, 0.7)
        self.heads = Heads(pool, shared, box, FastRCNNPredictor(hidden, classes + 1), mask, mask_pool, rois)

    def forward(self, images, sizes, targets=None, seeds=None):
        maps = self.backbone.stages(images)
        maps = self.fpn({str(i): x for i, x in enumerate(maps[1:])}) if self.fpn else {"0": maps[3]}
        maps = {name: upcast(x) for name, x in maps.items()}  # anchors are made in the type of the maps
        self.rpn.seeds = self.heads.seeds = seeds
        proposals, losses = self.rpn(ImageList(images, sizes), maps, targets)
        found = self.heads(maps, proposals, sizes, targets)
        return torch.stack([*losses.values(), *found]) if self.training else found


def paste(masks, boxes, size, chunk=16):
    """Probabilities (n, S, S) in boxes of an image -> (n, height, width) bool: where they exceed one half."""
    (height, width), done = size, []
    for m, b in zip(masks.split(chunk), boxes.split(chunk), strict=True):
        y, x = (torch.arange(n, device=m.device, dtype=m.dtype) + 0.5 for n in (height, width))
        y, x = ((v - b[:, [i]]) / (b[:, [i + 2]] - b[:, [i]]) * 2 - 1 for v, i in ((y, 1), (x, 0)))
        grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], 3)
        done.append(F.grid_sample(m[:, None], grid, align_corners=False)[:, 0] >= 0.5)
    return torch.cat(done) if done else masks.new_zeros(0, height, width, dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------ judging
def overlaps(a, b):
    """Intersection over union of boxes (n, 4) and (m, 4), in whole pixels, of which the last ones count: (n, m)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low + 1).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1] - shared)


def eleven_points(right, wrong, objects):
    """The AP of VOC2007 of detections in the order of their scores: the mean, over the recalls 0, .1 ... 1, of the
    highest precision at that recall or a higher one."""
    right, wrong = np.cumsum(right), np.cumsum(wrong)
    recall, precision = right / objects, right / np.maximum(right + wrong, 1)
    return sum(precision[recall >= t].max(initial=0) for t in np.arange(0, 1.1, 0.1)) / 11


def voc_scores(found, truth, classes):
    """AP, AP50, AP75 and AP50 of each class that has objects which are not difficult, in percent. found: per image
    {boxes, labels, scores}, truth: its Objects."""
    images = np.repeat(np.arange(len(found)), [len(f["scores"]) for f in found])
    boxes, labels, scores = (
        np.concatenate([np.array(f[k], float).reshape(len(f["scores"]), *shape) for f in found])
        for k, shape in (("boxes", (4,)), ("labels", ()), ("scores", ()))
    )
    boxes, scores, table = np.round(boxes + FIRST, 1), np.round(scores, 3), {}
    for label, name in enumerate(classes, 1):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        own = [item.labels == label for item in truth]
        difficult = np.concatenate([item.difficult[mask] for item, mask in zip(truth, own, strict=True)])
        if difficult.all():
            continue
        starts = np.cumsum([0] + [mask.sum() for mask in own])
        best, match = np.full(len(rows), -np.inf), np.zeros(len(rows), int)
        for i in np.unique(images[rows]):
            at = np.flatnonzero(images[rows] == i)
            if own[i].any():
                shares = overlaps(boxes[rows[at]], truth[i].boxes[own[i]] + FIRST)
                best[at], match[at] = shares.max(1), shares.argmax(1) + starts[i]
        for percent in OVERLAPS:
            hit = best > percent / 100
            ignored = hit & difficult[match]
            counted = np.flatnonzero(hit & ~ignored)
            right = np.zeros(len(rows), bool)
            right[counted[np.unique(match[counted], return_index=True)[1]]] = True  # the first one of each object
            table[name, percent] = 100 * eleven_points(right, ~right & ~ignored, (~difficult).sum())
    if not table:
        fail("no object of the test set is not difficult: there is nothing to find")
    means = {p: float(np.mean([v for (_, q), v in table.items() if q == p])) for p in OVERLAPS}
    result = {"AP": float(np.mean([*means.values()])), "AP50": means[50], "AP75": means[75]}
    each = {name: round(float(v), 3) for (name, p), v in table.items() if p == 50}
    return {k: round(v, 3) for k, v in result.items()} | {"AP50_of": each}


def coco_scores(found, test, masks):
    """Average precisions of boxes, and of masks if asked for, in percent, by pycocotools. found: see `voc_scores`."""
    coco_tools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results, scores = [], {}
    for i, image in zip(test.ids, found, strict=True):
        for k, (left, top, right, bottom) in enumerate(image["boxes"]):
            item = {"image_id": i, "category_id": test.categories[image["labels"][k] - 1], "score": image["scores"][k]}
            box = {"bbox": [left, top, right - left, bottom - top]}
            results.append((item | box, item | {"segmentation": image["masks"][k]} if masks else None))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(test.file)
        truth.dataset.setdefault("info", {})
        for item in truth.dataset["annotations"]:  # which sets of one's own may lack
            left, top, width, height = item["bbox"]
            item.setdefault("area", width * height)
            item.setdefault("iscrowd", 0)
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            item["segmentation"] = item.get("segmentation") or [corners]
        for which, (kind, name) in enumerate((("bbox", "box"), ("segm", "mask"))[: 1 + masks]):
            stats = [0.0] * 6
            if results:
                judge = COCOeval(truth, truth.loadRes([both[which] for both in results]), kind)
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
                stats = [float(v) for v in judge.stats[:6]]
            names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
            scores |= {f"{name}_{k}": round(100 * v, 3) if v >= 0 else None for k, v in zip(names, stats, strict=True)}
    return scores


@torch.no_grad()
def detect(run, test, view, args):
    """What is found in the test images, in their order, on every process: {boxes, labels, scores, masks} per image.
    Each image is seen once, alone, whatever the number of processes."""
    model, lines = run.model.eval(), []
    own = np.arange(*eval_share(len(test), 1))
    loaded = jobs(lambda i: prepare(test, i, args.test_size, args.max_side), ([i] for i in own.tolist()), args.workers)
    for i, ((image, (height, width), _),) in bar(zip(own.tolist(), loaded, strict=True), "test", len(own)):
        size = image.shape[1:]
        with run.amp:
            (found,) = model(padded([image], size, view, run.device, run.dtype), [tuple(size)])
        boxes = found["boxes"] * found["boxes"].new_tensor([width / size[1], height / size[0]] * 2)
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height] * 2))
        record = {"image": i} | {k: v.tolist() for k, v in (found | {"boxes": boxes}).items() if k != "masks"}
        if args.masks:
            probabilities = found.get("masks", boxes.new_zeros(0, 1, 1))
            record["masks"] = [encode_mask(mask) for mask in paste(probabilities, boxes, (height, width))]
        lines.append(json.dumps(record))
    text = np.frombuffer(("\n".join(lines) + "\n").encode(), np.uint8).copy()
    text = gather_uneven(torch.from_numpy(text).to(run.device)).cpu().numpy().tobytes().decode()
    return sorted((json.loads(line) for line in text.split("\n") if line), key=lambda record: record["image"])


@torch.no_grad()
def measure_statistics(run, batches):
    """Replaces the running statistics of batch norm by their means over so many batches of training images."""
    norms = [m for m in run.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms if batches else ():
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all
    run.model.train()
    epochs = itertools.chain.from_iterable(run.loader.epoch(run.args.epochs + i) for i in itertools.count())
    for batch in bar(itertools.islice(epochs, batches), "batch norm", batches):
        with run.amp:
            run.model(*batch.tensors(), batch.seeds)


def save_picture(path, test, found, masks, least=0.5):
    """PNG of evenly spaced test images: their objects beside what is found with a score of `least` or more."""
    pairs = []
    for i in np.unique(np.linspace(0, len(test) - 1, PICTURES).astype(int)):
        image, truth, guess = test[i][0], test.objects[i], found[i]
        size = tuple(image.shape[1:])
        known = [m for m in truth.masks if m is not None] if masks else []
        drawn = (
            draw_masks(known, size, size) if len(known) == len(truth.labels) and known else [None] * len(truth.labels)
        )
        rows = [k for k, score in enumerate(guess["scores"]) if score >= least]
        seen = [coco_tools().decode(guess["masks"][k]) if masks else None for k in rows]
        pairs.append(
            (
                image,
                [*zip(truth.boxes, truth.labels, drawn, [""] * len(drawn), strict=True)],
                [
                    (guess["boxes"][k], guess["labels"][k], m, f"{guess['scores'][k]:.2f}")
                    for k, m in zip(rows, seen, strict=True)
                ],
            )
        )
    save_pairs(path, pairs, test.classes, ("truth", f"found, score {least:g} or more"))


# --------------------------------------------------------------------------------------------------- training
def rate(step, steps, warmup, falls):
    """Factor of the peak learning rate: linear from 0.001 over the warm-up, a tenth after each of two shares of all."""
    start = min(1.0, step / warmup) if warmup else 1.0
    return (0.001 * (1 - start) + start) * 0.1 ** sum(step >= round(share * steps) for share in falls)


def parameter_groups(model, weight_decay):
    """All parameters; scales and shifts of batch norm have no weight decay, as in detectron2."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    plain = {id(p) for m in norms for p in m.parameters()}
    groups = [[p for p in model.parameters() if (id(p) in plain) is flag] for flag in (False, True)]
    return [{"params": p, "weight_decay": w} for p, w in zip(groups, (weight_decay, 0.0), strict=True)]


def main(args):
    start_device(args)  # the processes have to exist when the data are read
    backbone, meta = load_pretrained(args)
    if not hasattr(backbone, "layer4"):
        fail(f"--pretrained {args.pretrained}: {meta['arch']} is not a ResNet, whose layers this network is made of")
    train, test = open_boxes(args.data, meta["channels"])
    if test.file:
        coco_tools()
    everything, train = len(train), train.not_empty()
    args = complete(args, meta, train)
    run = Run(args, "detection")
    run.more = {"same": identity(args, backbone, train, test)}
    view = SimpleNamespace(mean=meta["mean"], std=meta["std"])
    run.data, run.loader = train, Loader(train, args, view, run.device, run.dtype)
    run.epoch_steps, run.total, run.warmup = run.loader.epoch_steps, args.steps, args.warmup

    fpn, classes = args.recipe == "coco-fpn", len(train.classes)
    torch.manual_seed(args.seed)
    model = Detector(backbone, classes, fpn, args.masks, args.anchors, args.rois, args.width, args.proposals)
    model = run.place(model).train()
    if run.device.type == "cpu":  # where torch's kernels for the other layout of maps crash in the pyramid
        model.to(memory_format=torch.contiguous_format)
    peak, falls = args.lr * args.batch_size / 16, RECIPES[args.recipe]["falls"]
    optimizer = torch.optim.SGD(parameter_groups(model, args.weight_decay), peak, momentum=0.9)
    drops = ", ".join(f"{round(share * args.steps):,}" for share in falls)
    lines = {"lr": f"{args.lr:g} x {args.batch_size}/16 = {peak:.4g}, warm-up {args.warmup} steps"}
    lines |= {"schedule": f"{args.steps:,} steps, the rate falls by 10 at {drops}"}
    lines |= {"recipe": f"{args.recipe}{', with masks' if args.masks else ''}; {len(test):,} test images"}
    if everything > len(train):
        lines["note"] = f"{everything - len(train):,} training images without objects are left out"
    net = run.start(model, optimizer, **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr = peak * rate(step, args.steps, args.warmup, falls)
            for batch in batches:
                losses = net(*batch.tensors(), batch.seeds)
                run.backward(losses.sum())
            run.update(optimizer)
            run.log(lr, **dict(zip(LOSSES, losses.detach(), strict=False)))

    measure_statistics(run, args.precise_bn)
    found = detect(run, test, view, args)
    result = facts(args, meta, train, test)
    result |= {k: getattr(args, k) for k in ("recipe", "steps", "batch_size", "lr", "sizes", "test_size", "seed")}
    if is_main():
        scores = coco_scores(found, test, args.masks) if test.file else voc_scores(found, test.objects, test.classes)
        save_picture(f"{args.out}/detection.png", test, found, args.masks)
        print0("result      " + "  ".join(f"{k} {v}" for k, v in scores.items()))
        result |= {"step": run.step, "detections": sum(len(image["scores"]) for image in found)} | scores
    return report(args, "detection", result)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
