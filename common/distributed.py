"""Processes: start-up from torchrun's environment, collectives with exact gradients, synchronised batch norm.

Every function is the identity (or a no-op) when there is one process, so scripts never ask how many there are.

Gradient convention: a script's loss is the mean over the rows of its own process, and DistributedDataParallel
averages gradients over processes. With `gather` and `all_reduce` below, whose backward passes *sum* over
processes, the result is exactly the gradient of the mean loss over the global batch.
"""

import inspect
import os
import sys

import torch
import torch.distributed as dist
from torch import nn


def init(device="auto"):
    """Joins the process group that torchrun describes (if any) and returns this process's device.

    device: "auto" (CUDA if there is one, else CPU), "cpu", "cuda", "cuda:1", "mps" ...
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    try:
        torch.empty(0, device=own)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        print0(f"error: --device {device} cannot be used here: {reason}", file=sys.stderr)
        raise SystemExit(2) from None
    device = torch.device(own)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def finish():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    return rank() == 0


def print0(*args, **kwargs):
    """Prints in the main process only."""
    if is_main():
        print(*args, **{"flush": True, **kwargs})


def barrier():
    if world_size() > 1:
        dist.barrier()


def any_process(flag, device):
    """True on every process if `flag` is true on any (one small collective)."""
    if world_size() == 1:
        return bool(flag)
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return _AllReduce.apply(grad)


def all_reduce(tensor):
    """Sum over processes, with gradient (which is summed over processes too). Leaves the input as it is."""
    return _AllReduce.apply(tensor) if world_size() > 1 else tensor


def mean(tensor):
    """Mean over processes of equally weighted values, without gradient."""
    return all_reduce(tensor.detach()) / world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        rows = rows.detach().contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows):
    """(B, ...) of each process -> (W B, ...) in rank order, with gradient. All processes hold equally many rows."""
    return _Gather.apply(rows) if world_size() > 1 else rows


def gather_uneven(rows):
    """As `gather`, without gradient, for different numbers of rows per process."""
    if world_size() == 1:
        return rows
    sizes = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = gather(padded).split(max(sizes))
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes, on any device and in any float type.

    PyTorch's own SyncBatchNorm refuses CPU tensors; this one is slower and is used only there.
    Input (B, C, ...) with equally many elements on each process.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        n = x.numel() // x.shape[1] * world_size()
        mean = all_reduce(full.sum(dims)) / n
        centred = full - mean.view(shape)
        var = all_reduce(centred.square().sum(dims)) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                factor = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
                self.running_var.lerp_((var * n / max(n - 1, 1)).to(self.running_var.dtype), factor)
        out = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def _replace_batch_norm(module):
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNorm):
            new = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            new.load_state_dict(child.state_dict())
            new.to(next(iter(child.state_dict().values())))
            for old_p, new_p in zip(child.parameters(), new.parameters(), strict=True):
                new_p.requires_grad_(old_p.requires_grad)
            setattr(module, name, new)
        else:
            _replace_batch_norm(child)
    return module


def sync_batch_norm(model):
    """Makes every batch norm of `model` use the statistics of the global batch."""
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _replace_batch_norm(model)


def parallel(model):
    """Wraps `model` so that backward() averages its gradients over processes."""
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    wrapper = nn.parallel.DistributedDataParallel
    # Buffers agree anyway, or are meant to differ. torch 2.13 gave the flag another name.
    new = "forward_sync_buffers" in inspect.signature(wrapper).parameters
    return wrapper(model, device_ids=ids, **{"forward_sync_buffers" if new else "broadcast_buffers": False})
