"""Features of whole data sets, their nearest neighbours, and the weighted k-nearest-neighbour classifier on them."""

import contextlib
import sys

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.data import eval_batches, eval_share, spread
from common.distributed import all_reduce, gather_uneven, is_main, print0, rank, world_size
from common.log import fail
from common.optim import full

GROUP = 16  # scores of which the largest stands for all in the first round of `_largest`


class Features(nn.Module):
    """Several features of a backbone from one forward pass, side by side: (B, 3, H, W) -> (B, sum of dims).

    names of a ResNet: feat1 to feat5, the averages over the maps of its stages (feat5 is what it returns by itself).
    names of a ViT: cls, the class token after the final norm (which one of pool "mean" lacks), and mean, the mean of
    the patch tokens. None: what the backbone returns. After construction: names, without repetition, and dims.
    """

    def __init__(self, backbone, names=None):
        super().__init__()
        self.backbone = backbone
        if hasattr(backbone, "stages"):
            kind, known, self.default = "a ResNet", [f"feat{i}" for i in range(1, 6)], "feat5"
            layers = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
            last = [[m for m in layer[-1].modules() if isinstance(m, nn.Conv2d)][-1] for layer in layers]
            dims = [conv.out_channels for conv in (backbone.conv1, *last)]
        else:
            kind, known, self.default = "a ViT", ["cls", "mean"], backbone.pool
            dims = [backbone.dim] * 2
        self.names = list(dict.fromkeys(names or [self.default]))
        unknown = [name for name in self.names if name not in known]
        if unknown:
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
        found = {"cls": tokens[:, 0], "mean": self.backbone.fc_norm(tokens[:, 1:].mean(1))}
        return torch.cat([found[name] for name in self.names], 1)


@torch.no_grad()
def extract(backbone, dataset, view, device, workers=4, batch_size=256, amp=None, everywhere=True):
    """Features of every sample, in order, on every process: (N, D) float32 and labels (N,) int64, on the device.

    everywhere=False: each process keeps the rows of its own share, which are contiguous and follow in rank order.
    The backbone is put into eval mode for the while. Each process computes its share of the samples once.
    """
    training = backbone.training
    backbone.eval()
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    first, last = eval_share(len(dataset), batch_size)
    features = torch.empty(last - first, backbone.dim, device=device)
    labels = torch.empty(last - first, dtype=torch.int64, device=device)
    batches = eval_batches(dataset, view, batch_size, device, workers, dtype)
    total, row = -(-(last - first) // batch_size), 0
    for x, y, _ in tqdm(batches, "features", total, leave=False, disable=not (is_main() and sys.stderr.isatty())):
        with amp or contextlib.nullcontext():
            features[row : row + len(x)] = backbone(x).flatten(1)
        labels[row : row + len(x)] = y
        row += len(x)
    backbone.train(training)
    return (gather_uneven(features), gather_uneven(labels)) if everywhere else (features, labels)


@torch.no_grad()
def nearest(queries, bank, k, chunk_bytes=2**28, block=2**16):
    """Cosine similarities (M, k), descending, of the k rows of bank (N, D) most similar to each query (M, D), and
    the numbers of these rows (M, k). min(k, N) columns if the bank is small.

    Exact. Which of several rows of equal similarity come first, or at all if they are too many, is not defined.
    The scores of at most `block` rows of the bank exist at a time, in a buffer of chunk_bytes. The bank is not copied:
    its lengths divide the scores.
    """
    queries, k = F.normalize(full(queries), dim=1), min(k, len(bank))
    parts = bank.split(_even(len(bank), block))
    lengths = [torch.linalg.vector_norm(full(part), dim=1).clamp_(min=1e-12) for part in parts]
    rows = _even(len(queries), max(1, chunk_bytes // (queries.element_size() * len(parts[0]))))
    buffer = queries.new_empty(rows * len(parts[0]))
    similarities, indices = [queries.new_empty(0, k)], [torch.empty(0, k, dtype=torch.int64, device=queries.device)]
    bar = tqdm(
        total=len(queries), desc="neighbours", leave=False, disable=not (is_main() and sys.stderr.isatty()), delay=2
    )
    for query in queries.split(rows) if len(queries) else ():
        found, first = [], 0
        for part, length in zip(parts, lengths, strict=True):
            scores = buffer[: len(query) * len(part)].view(len(query), len(part))
            torch.mm(query, full(part).T, out=scores).div_(length)
            value, index = _largest(scores, k)
            found.append((value, index + first))
            first += len(part)
        value, index = found[0]
        if len(found) > 1:
            value, index = (torch.cat(f, 1) for f in zip(*found, strict=True))
            value, order = value.topk(k, dim=1)
            index = index.gather(1, order)
        similarities.append(value)
        indices.append(index)
        bar.update(len(query))
    bar.close()
    return torch.cat(similarities), torch.cat(indices)


def _even(n, most):
    """The size of equal parts, each of at most `most`, of n things."""
    return max(1, -(-n // max(1, -(-n // most))))


def _largest(scores, k):
    """The k largest of each row (or all, if there are fewer), descending: values and columns (M, min(k, N)).

    Sorting is what a CPU is slow at. The k largest are all in the k groups with the largest maxima, since any number
    outside has k maxima that are no smaller; so only these groups are looked at. A group is every n-th column: one row
    of groups is compared with the next in whole vectors.
    """
    n = scores.shape[1] // GROUP
    if n < 4 * k:
        return scores.topk(min(k, scores.shape[1]), dim=1)
    head = scores[:, : n * GROUP].unflatten(1, (GROUP, n))
    group = head.amax(1).topk(k, dim=1, sorted=False).indices
    found = head.gather(2, group[:, None].expand(-1, GROUP, -1)).flatten(1)
    values, place = torch.cat([found, scores[:, n * GROUP :]], 1).topk(k, dim=1)
    columns = place // k * n + group.gather(1, place % k)
    return values, torch.where(place < k * GROUP, columns, place + (n - k) * GROUP)  # the rest has no group


@torch.no_grad()
def knn(train, train_labels, test, test_labels, ks=(20,), temperature=0.07, chunk_bytes=2**28):
    """Weighted k-NN (Wu et al. 2018, section 3.4): the k most similar training samples vote exp(cosine / temperature).

    train (N, D), test (M, D), labels (N,) and (M,). Returns {k: (top-1, top-5)} in percent. Every process classifies
    its share of the test samples; the similarities are computed in chunks of at most chunk_bytes. Of classes with
    equally many votes the one with the lower number comes first; a class without a vote is no prediction.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    share = slice(len(test) * rank() // world_size(), len(test) * (rank() + 1) // world_size())
    similarity, index = nearest(test[share], train, max(ks), chunk_bytes)
    # subtracting the best similarity changes no ranking and keeps exp() finite
    weights, neighbours = ((similarity - similarity[:, :1]) / temperature).exp_(), train_labels[index]
    correct = torch.zeros(len(ks), 2, dtype=torch.float64, device=test.device)
    rows = max(1, chunk_bytes // (4 * classes))
    number = torch.arange(classes, device=test.device)
    for weight, neighbour, target in zip(
        weights.split(rows), neighbours.split(rows), test_labels[share, None].split(rows), strict=True
    ):
        for i, k in enumerate(ks):
            votes = weight.new_zeros(len(weight), classes)
            votes.scatter_add_(1, neighbour[:, :k], weight[:, :k])
            own = votes.gather(1, target)
            before = ((votes > own) | ((votes == own) & (number < target))).sum(1, keepdim=True)
            correct[i, 0] += ((before == 0) & (own > 0)).sum()
            correct[i, 1] += ((before < 5) & (own > 0)).sum()
    correct = all_reduce(correct) * 100 / len(test)
    return {k: tuple(row.tolist()) for k, row in zip(ks, correct, strict=True)}


def knn_monitor(backbone, train, val, view, device, workers, amp):
    """{"knn": top-1 in percent}, k = 20, at most 10,000 training and 2,000 validation samples; {} without labels."""
    if train.labels is None or val is None or val.labels is None:
        return {}
    if train.classes and val.classes and train.classes != val.classes:
        print0("note: no k-NN accuracy: the training and the validation images have different classes")
        return {}
    sets = spread(train, 10_000), spread(val, 2_000)
    (bank, labels), (queries, targets) = (extract(backbone, s, view, device, workers, amp=amp) for s in sets)
    return {"knn": round(knn(bank, labels, queries, targets)[20][0], 2)}
