"""Features of a backbone: of whole data sets, of its stages, of crops of several sizes."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from common.args import fail
from common.distributed import gather_uneven
from common.loader import agree_on_undecodable, eval_batches, eval_share
from common.log import bar
from common.optim import or_precise, upcast
from common.vit import ViT

# Stages of ResNet-50 at 224 pixels, by channels: side; kernel, stride, padding of average pooling (Goyal et al. 2019)
WINDOWS = {64: (112, 10, 10, 4), 256: (56, 16, 8, 0), 512: (28, 13, 5, 0), 1024: (14, 8, 3, 0), 2048: (7, 6, 1, 0)}


def pool_stage(x):
    """A stage (B, C, H, W) averaged to about 9,000 numbers per image: (B, C, s, s)."""
    channels, side = x.shape[1:3]
    usual, *window = WINDOWS.get(channels, [0])
    if side == usual:
        return F.avg_pool2d(x, *window)
    return F.adaptive_avg_pool2d(x, max(1, min(side, math.isqrt(9216 // channels))))


def has_class_token(backbone):
    """Is it a ViT with one? Networks of other kinds keep theirs, if any, to themselves."""
    return isinstance(backbone, ViT) and backbone.cls_token is not None


@torch.no_grad()
def features(backbone, x, kinds, amp):
    """{kind: list of tensors (B, ...)} of at least single precision, from one forward pass."""
    found = {}
    with amp:
        if hasattr(backbone, "stages"):
            maps = backbone.stages(x)
            if "stages" in kinds:
                found["stages"] = [upcast(pool_stage(m)) for m in maps]
            if "pool" in kinds:
                found["pool"] = [upcast(maps[-1]).mean((2, 3))]
            return found
        if "pool" in kinds:
            found["pool"] = [upcast(backbone(x))]
        if "blocks" in kinds and not has_class_token(backbone):  # Li et al. 2022: the mean of each of the last 4 blocks
            found["blocks"] = [torch.cat([upcast(t).mean(1) for t in backbone.last(x, 4)], 1)]
        elif kinds & {"cls", "blocks"}:
            several = backbone.dim < 768  # Caron et al. 2021: ViT-S, and smaller; else ViT-B
            tokens = backbone.last(x, 4 if several and "blocks" in kinds else 1)
            tops = [upcast(t[:, 0]) for t in tokens]
            if "cls" in kinds:
                found["cls"] = tops[-1:]
            if "blocks" in kinds:
                patches = [] if several else [upcast(tokens[-1][:, 1:]).mean(1)]
                found["blocks"] = [torch.cat([*tops, *patches], 1)]
    return found


def by_size(network, views):
    """network(x) of views (B, C, S, S) whose S may differ: a list in their order. Those of one size pass it together,
    and so share batch-norm statistics."""
    found = {}
    for size in dict.fromkeys(x.shape[-1] for x in views):
        group = [v for v, x in enumerate(views) if x.shape[-1] == size]
        found |= zip(group, network(torch.cat([views[v] for v in group])).chunk(len(group)), strict=True)
    return [found[v] for v in range(len(views))]


def output_std(z):
    """Collapse monitor: the standard deviation of the normalised outputs (B, D) over the batch, averaged over
    dimensions, times sqrt(D). 1: spread evenly over the sphere; 0: all images give the same output."""
    return F.normalize(z.detach().float(), dim=1).std(0).mean() * z.shape[1] ** 0.5


def singular_values(z, center=False):
    """Of rows z (N, D), descending: (min(N, D),) in float64, by the smaller of both products of z with itself. center:
    of the rows minus their mean. Of a million rows no copy is made."""
    dtype = torch.float32 if z.device.type == "mps" else torch.float64
    parts = z.detach().split(2**14 if len(z) > z.shape[1] else len(z))
    mean = sum(part.to(dtype).sum(0) for part in parts) / len(z) if center else 0
    parts = (part.to(dtype) - mean for part in parts)
    product = sum(part.T @ part for part in parts) if len(z) > z.shape[1] else (part := next(parts)) @ part.T
    return torch.linalg.eigvalsh(product).clamp(min=0).sqrt().flip(0)


def effective_rank(z, center=False):
    """In how many dimensions rows z (N, D) lie: exp of the entropy of their singular values, as shares of the sum (Roy
    and Vetterli 2007; as RankMe, Garrido et al. 2023, without centring). From 1, all rows on a line, to min(N, D)."""
    values = singular_values(z, center)
    p = values / values.sum().clamp(min=1e-30) + 1e-7
    return (-(p * p.log()).sum()).exp()


def spectrum_slope(z):
    """alpha of an eigenvalue ~ rank^-alpha of the covariance of rows z (N, D), by least squares over the ranks from
    D / 20 to D / 2 (alpha-ReQ, Agrawal et al. 2022, who fit it in a middle range, too). 1: variance is spread over all
    scales; far above: few dimensions hold it; 0: noise. nan where fewer than three of these eigenvalues are not 0."""
    values = singular_values(z, center=True).square().cpu()
    values = values[values > 1e-10 * values[0]]  # the others are rounding
    first, last = max(2, min(z.shape) // 20), min(min(z.shape) // 2, len(values))  # counted from 1
    if last < first + 2:
        return math.nan
    x, y = torch.arange(first, last + 1, dtype=values.dtype).log(), values[first - 1 : last].log()
    x = x - x.mean()
    return -(x @ y / (x @ x)).item()


def spectrum(z):
    """{"rankme", "alpha"}: effective rank and slope of the spectrum of rows z (N, D), for a log: RankMe and alpha-ReQ.
    N should be 10 D or more; alpha is left out where there are too few dimensions for it."""
    slope = spectrum_slope(z)
    return {"rankme": round(effective_rank(z).item(), 2)} | ({} if math.isnan(slope) else {"alpha": round(slope, 3)})


class Features(nn.Module):
    """Several features of a backbone from one forward pass, side by side: (B, 3, H, W) -> (B, sum of dims).

    names (default: what the backbone returns): of a ResNet feat1 to feat5, the averages over the maps of its stages; of
    a ViT cls, the class token after the final norm (which one of pool "mean" lacks), if any, and mean, of the patch
    tokens.
    Others have what they return: mean of a Swin, cls of an XCiT, pool of a library's network.
    """

    def __init__(self, backbone, names=None):
        super().__init__()
        self.backbone = backbone
        if hasattr(backbone, "stages"):
            kind, known, self.default = "a ResNet", [f"feat{i}" for i in range(1, 6)], "feat5"
            stages = [backbone.conv1, backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
            convs = [[m for m in stage.modules() if isinstance(m, nn.Conv2d)] for stage in stages]
            dims = [conv[-1].out_channels for conv in convs]
        elif isinstance(backbone, ViT):
            kind, known, self.default = "a ViT", ["cls", "mean"][1 - backbone.prefix :], backbone.pool
            dims = [backbone.dim] * len(known)
        else:
            kind, self.default = getattr(backbone, "arch", type(backbone).__name__), getattr(backbone, "pool", "pool")
            known, dims = [self.default], [backbone.dim]
        self.names = list(dict.fromkeys(names or [self.default]))
        if unknown := [name for name in self.names if name not in known]:
            fail(f"--features {' '.join(unknown)}: the features of {kind} are {', '.join(known)}")
        self.dims = [dims[known.index(name)] for name in self.names]
        self.dim = sum(self.dims)

    def forward(self, x):
        if self.names == [self.default]:
            return self.backbone(x)
        if hasattr(self.backbone, "stages"):
            maps = self.backbone.stages(x)
            return torch.cat([maps[int(name[-1]) - 1].mean((2, 3)) for name in self.names], 1)
        tokens = self.backbone.tokens(x)
        found = {"cls": tokens[:, 0], "mean": self.backbone.fc_norm(tokens[:, self.backbone.prefix :].mean(1))}
        return torch.cat([found[name] for name in self.names], 1)


def usual_interpolation(backbone):
    """How evaluations of frozen features resize images unless told otherwise: as most published code, bicubically for a
    transformer of ours, bilinearly for others."""
    return "bicubic" if hasattr(backbone, "patch_size") else "bilinear"


def broken_rows(features, dataset, which, amp=None):
    """What to say of rows of features (N, D) that are not finite, which make every figure that rests on them wrong: how
    many, of which of the `which` images, what to do. "" if there are none. amp: under which they were computed."""
    parts = [~part.isfinite().all(1) for part in features.split(2**16)]
    rows = torch.cat(parts).nonzero().flatten().tolist() if parts else []
    if not rows:
        return ""
    missing = dataset.undecodable if len(features) < len(dataset) else ()
    there = [i for i in range(len(dataset)) if i not in missing]  # of which each has a row
    images = ", ".join(str(dataset.path(there[i])) for i in rows[:3]) + (" ..." if len(rows) > 3 else "")
    cause = "its weights are damaged" if len(rows) == len(features) else f"look at these images: {images}"
    many = f"{len(rows):,} of {len(features):,} {which} images"
    return f"the network's features of {many} are not finite; {cause}{or_precise(amp)}"


@torch.no_grad()
def extract(backbone, dataset, view, device, workers=4, batch_size=256, amp=None, everywhere=True, replace=True):
    """Features of every sample, in order, on every process: (N, D) float32 and labels (N,) int64, on the device.

    everywhere=False: each process keeps the rows of the share that it computes, which follow in rank order.
    replace: a sample that cannot be decoded gets the row of its neighbour; else none, see `agree_on_undecodable`.
    """
    training = backbone.training
    backbone.eval()
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    first, last = eval_share(len(dataset), batch_size)
    features = torch.empty(last - first, backbone.dim, device=device)
    labels = torch.empty(last - first, dtype=torch.int64, device=device)
    batches = eval_batches(dataset, view, batch_size, device, workers, dtype, replace)
    total, row = -(-(last - first) // batch_size), 0
    for x, y, _ in bar(batches, "features", total):
        with amp or contextlib.nullcontext():
            features[row : row + len(x)] = backbone(x).flatten(1)
        labels[row : row + len(x)] = y
        row += len(x)
    backbone.train(training)
    features, labels = features[:row], labels[:row]
    if not replace:
        agree_on_undecodable(dataset, device)
    return (gather_uneven(features), gather_uneven(labels)) if everywhere else (features, labels)
