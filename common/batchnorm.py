"""Batch norm over the batches of all processes, or over groups of a batch."""

import torch
import torch.nn.functional as F
from torch import nn

from common.args import fail
from common.distributed import gather, process_mean, world_size


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes, on any device and in any float type.

    PyTorch's own SyncBatchNorm refuses CPU tensors; this one is slower and is used only there.
    Input (B, C, ...), of any number of elements on each process.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        n = x.numel() // x.shape[1]
        own = full.sum(dims) / max(n, 1)
        squares = (full - own.view(shape)).square().sum(dims)
        # mean, sum of squares around it and count of each process, joined by the formula of Chan, Golub and LeVeque
        # (1979): one collective, where sums around the common mean would take two
        parts = gather(torch.cat([own, squares, own.new_tensor([n])])[None])
        means, squares, counts = parts.split([len(own), len(own), 1], 1)
        n = counts.sum()
        mean = (counts * means).sum(0) / n
        var = (squares + counts * (means - mean).square()).sum(0) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                factor = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
                self.running_var.lerp_((var * n / (n - 1).clamp(min=1)).to(self.running_var.dtype), factor)
        out = (full - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def sync_batch_norm(model, images=0, sync=True):
    """Makes every batch norm of `model` use the statistics of the global batch, if `sync`. Ends the program where a
    batch norm would see one image. images: per micro-batch of this process (0: enough)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms and images * (world_size() if sync else 1) == 1:
        refuse_single_images()
    if not sync:
        return model
    if world_size() > 1 and next(model.parameters()).is_cuda:
        return convert(model)
    for module in model.modules() if world_size() > 1 else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm
    return model


def refuse_single_images():
    least = f"--batch-size {2 * world_size()} times --accum, or more"
    fail(f"batch norm needs at least 2 images per micro-batch, and would get 1: {least}")


def convert(model):
    """PyTorch's own conversion, which forgets hooks: the networks of a library have activations there."""
    hooks = {name: module._forward_hooks for name, module in model.named_modules()}
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in model.named_modules():
        module._forward_hooks.update(hooks.get(name, {}))
    return model


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of each of `splits` groups of consecutive rows; running ones are their means."""

    def forward(self, x):
        if not self.training or self.splits == 1:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        means, variances = self.running_mean.repeat(self.splits, 1), self.running_var.repeat(self.splits, 1)
        rest = (self.weight, self.bias, True, self.momentum, self.eps)
        x = torch.cat([F.batch_norm(*g, *rest) for g in zip(x.chunk(self.splits), means, variances, strict=True)])
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return x


def batch_norm_groups(asked, batch):
    """Groups of the batch of all processes: as asked for, else 8 or the next smaller number that is possible."""
    possible = [n for n in range(world_size(), batch // 2 + 1, world_size()) if batch % n == 0]
    if not possible:
        refuse_single_images()
    if asked is not None and asked not in possible:
        fail(f"--bn-splits {asked}: {batch} images on {world_size()} processes form groups of equal size by {possible}")
    return asked or max([n for n in possible if n <= 8], default=possible[0])


def split_batch_norm(model, splits):
    """Makes every 2-d batch norm of `model` use the statistics of each of `splits` groups: same tensors and names."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__, module.splits = SplitBatchNorm, splits


@torch.no_grad()
def average_statistics(model):
    """Replaces running statistics by their mean over processes: as they add up linearly, now and then is enough."""
    statistics = [buffer for name, buffer in model.named_buffers() if "running" in name]
    if not statistics:  # a network of layer norms
        return
    torch._foreach_copy_(statistics, process_mean(torch.cat(statistics)).split([len(b) for b in statistics]))
