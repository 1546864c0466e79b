"""Features of whole data sets and the weighted k-nearest-neighbour classifier on them."""

import contextlib
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.data import eval_batches, spread
from common.distributed import all_reduce, gather_uneven, is_main, rank, world_size


@torch.no_grad()
def extract(backbone, dataset, view, device, workers=4, batch_size=256, amp=None, everywhere=True):
    """Features of every sample, in order, on every process: (N, D) float32 and labels (N,) int64, on the device.

    everywhere=False: each process keeps the rows of its own share, which are contiguous and follow in rank order.
    The backbone is put into eval mode for the while. Each process computes its share of the samples once.
    """
    training = backbone.training
    backbone.eval()
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    features = [torch.empty(0, backbone.dim, device=device)]  # a process may have no sample of a tiny set
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    batches = eval_batches(dataset, view, batch_size, device, workers, dtype)
    total = -(-len(dataset) // world_size() // batch_size)
    for x, y, _ in tqdm(batches, "features", total, leave=False, disable=not (is_main() and sys.stderr.isatty())):
        with amp or contextlib.nullcontext():
            features.append(backbone(x).float().flatten(1))
        labels.append(y)
    backbone.train(training)
    features, labels = torch.cat(features), torch.cat(labels)
    return (gather_uneven(features), gather_uneven(labels)) if everywhere else (features, labels)


@torch.no_grad()
def knn(train, train_labels, test, test_labels, ks=(20,), temperature=0.07, chunk_bytes=2**28):
    """Weighted k-NN (Wu et al. 2018, section 3.4): the k most similar training samples vote exp(cosine / temperature).

    train (N, D), test (M, D), labels (N,) and (M,). Returns {k: (top-1, top-5)} in percent. Every process classifies
    its share of the test samples; the similarities are computed in chunks of at most chunk_bytes.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    share = slice(len(test) * rank() // world_size(), len(test) * (rank() + 1) // world_size())
    bank = F.normalize(train, dim=1).T.contiguous()
    queries, targets = F.normalize(test[share], dim=1), test_labels[share]
    most = min(max(ks), len(train))
    rows = max(1, chunk_bytes // (4 * max(len(train), classes)))
    correct = torch.zeros(len(ks), 2, dtype=torch.float64, device=test.device)
    for query, target in zip(queries.split(rows), targets.split(rows), strict=True):
        # unsorted is enough for one k; smaller ones need the order
        similarity, index = (query @ bank).topk(most, dim=1, sorted=len(ks) > 1)
        # subtracting the best similarity changes no ranking and keeps exp() finite
        weight = ((similarity - similarity.amax(1, keepdim=True)) / temperature).exp()
        neighbour = train_labels[index]
        for i, k in enumerate(ks):
            votes = weight.new_zeros(len(query), classes)
            votes.scatter_add_(1, neighbour[:, :k], weight[:, :k])
            score, best = votes.topk(min(5, classes), dim=1)
            best = (best == target[:, None]) & (score > 0)  # a class without a vote is no prediction
            correct[i] += torch.stack([best[:, 0].sum(), best.any(1).sum()])
    correct = all_reduce(correct) * 100 / len(test)
    return {k: tuple(row.tolist()) for k, row in zip(ks, correct, strict=True)}


def knn_monitor(backbone, train, val, view, device, workers, amp):
    """{"knn": top-1 in percent}, k = 20, at most 10,000 training and 2,000 validation samples; {} without labels."""
    if train.labels is None or val is None or val.labels is None:
        return {}
    sets = spread(train, 10_000), spread(val, 2_000)
    (bank, labels), (queries, targets) = (extract(backbone, s, view, device, workers, amp=amp) for s in sets)
    return {"knn": round(knn(bank, labels, queries, targets)[20][0], 2)}
