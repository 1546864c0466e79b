"""Nearest neighbours, and the weighted k-nearest-neighbour classifier on them."""

import numpy as np
import torch
import torch.nn.functional as F

from common.datasets import evenly_spaced, match_classes, with_labels
from common.distributed import all_reduce, gather_uneven, print0, rank, world_size
from common.features import broken_rows, extract, spectrum
from common.folders import note
from common.log import bar
from common.optim import upcast

GROUP = 16  # scores of which the largest stands for all in the first round of `_largest`


@torch.no_grad()
def nearest(queries, bank, k, chunk_bytes=2**28, block=2**16):
    """Cosine similarities (M, k), descending, of the k rows of bank (N, D) most similar to each query (M, D), and
    the numbers of these rows (M, k). min(k, N) columns if the bank is small.

    Exact; which of several rows of equal similarity come first, or at all, is not defined. The scores of at most
    `block` rows of the bank exist at a time, in a buffer of chunk_bytes. The bank is not copied: its lengths divide
    the scores.
    """
    queries, k = F.normalize(upcast(queries), dim=1), min(k, len(bank))
    parts = bank.split(_even(len(bank), block))
    lengths = [torch.linalg.vector_norm(upcast(part), dim=1).clamp_(min=1e-12) for part in parts]
    rows = _even(len(queries), max(1, chunk_bytes // (queries.element_size() * len(parts[0]))))
    buffer = queries.new_empty(rows * len(parts[0]))
    results = [(queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries.device))]
    for query in bar(queries.split(rows) if len(queries) else (), "neighbours", delay=2):
        found, first = [], 0
        for part, length in zip(parts, lengths, strict=True):
            scores = buffer[: len(query) * len(part)].view(len(query), len(part))
            torch.mm(query, upcast(part).T, out=scores).div_(length)
            value, index = _largest(scores, k)
            found.append((value, index + first))
            first += len(part)
        value, index = found[0]
        if len(found) > 1:
            value, index = (torch.cat(f, 1) for f in zip(*found, strict=True))
            value, order = value.topk(k, dim=1)
            index = index.gather(1, order)
        results.append((value, index))
    return tuple(map(torch.cat, zip(*results, strict=True)))


def _even(n, most):
    """The size of equal parts, each of at most `most`, of n things."""
    return max(1, -(-n // max(1, -(-n // most))))


def _largest(scores, k):
    """The k largest of each row (or all, if there are fewer), descending: values and columns (M, min(k, N)).

    Sorting is what a CPU is slow at. The k largest are all in the k groups with the largest maxima, since any number
    outside has k maxima that are no smaller. A group is every n-th column: rows of groups are compared as vectors.
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
def knn(train, train_labels, test, test_labels, ks=(20,), temperature=0.07, chunk_bytes=2**28, predictions=None):
    """Weighted k-NN (Wu et al. 2018, section 3.4): the k most similar training samples vote exp(cosine / temperature).

    train (N, D), test (M, D), labels (N,) and (M,). Returns {k: (top-1, top-5)} in percent. Every process classifies
    its share of the test samples, in chunks of at most chunk_bytes. Of classes with equally many votes the one with
    the lower number comes first; a class without a vote is no prediction. predictions: a dictionary that gets {k: the
    class (M,) with most votes}, the same on every process.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    share = slice(len(test) * rank() // world_size(), len(test) * (rank() + 1) // world_size())
    similarity, index = nearest(test[share], train, max(ks), chunk_bytes)
    # subtracting the best similarity changes no ranking and keeps exp() finite
    weights, neighbours = ((similarity - similarity[:, :1]) / temperature).clamp_(min=-69).exp_(), train_labels[index]
    correct = torch.zeros(len(ks), 2, dtype=torch.float64, device=test.device)
    rows = max(1, chunk_bytes // (4 * classes))
    number, first = torch.arange(classes, device=test.device), {k: [] for k in ks}
    parts = [t.split(rows) for t in (weights, neighbours, test_labels[share, None])]
    for weight, neighbour, target in zip(*parts, strict=True):
        for i, k in enumerate(ks):
            votes = weight.new_zeros(len(weight), classes)
            votes.scatter_add_(1, neighbour[:, :k], weight[:, :k])
            own = votes.gather(1, target)
            before = ((votes > own) | ((votes == own) & (number < target))).sum(1, keepdim=True)
            correct[i, 0] += ((before == 0) & (own > 0)).sum()
            correct[i, 1] += ((before < 5) & (own > 0)).sum()
            if predictions is not None:
                first[k].append(votes.argmax(1))
    correct = all_reduce(correct) * 100 / len(test)
    if predictions is not None:
        predictions |= {k: gather_uneven(torch.cat(parts)) for k, parts in first.items()}
    return {k: tuple(row.tolist()) for k, row in zip(ks, correct, strict=True)}


def monitor(backbone, train, val, view, device, workers, amp):
    """What frozen features are like, of at most 10,000 training and 2,000 validation images.

    {"rankme": their effective rank, "alpha": slope of their spectrum}, and with labels of both sets {"knn": top-1 in
    percent}, k = 20. {} where features are not finite. Ranks are those of a network of this width: of no other one.
    """
    labelled = train.labels is not None and val is not None
    if labelled:
        reason = "the validation images have no labels" if val.labels is None else match_classes(train, val)
        if reason or len(np.unique(with_labels(train).labels)) == 1:
            note(f"no k-NN accuracy: {reason or 'all training images are of one class'}")
            labelled = False
    how = {"workers": workers, "amp": amp, "replace": False}
    images = evenly_spaced(with_labels(train) if labelled else train, 10_000)
    bank, labels = extract(backbone, images, view, device, **how)
    broken = broken_rows(bank, images, "training", amp)
    if labelled and not broken:
        images = evenly_spaced(val, 2_000)
        queries, targets = extract(backbone, images, view, device, **how)
        broken = broken_rows(queries, images, "validation", amp)
    if broken:
        print0(f"note: no k-NN accuracy: {broken}")
        return {}
    found = {"knn": round(knn(bank, labels, queries, targets)[20][0], 2)} if labelled else {}
    return found | spectrum(bank)
