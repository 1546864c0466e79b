"""Processes: start-up from torchrun's environment, and collectives with exact gradients.

Every function is the identity (or a no-op) when there is one process, so scripts never ask how many there are.

Gradients: what a page computes is right if every process ends with the gradient of one loss L, that of the whole batch.
DistributedDataParallel averages over the W processes what each of them gets by backward(). Three kinds of loss do it:

- the mean over the rows of a process (cosine of pairs, cross-entropy): the mean of these means is L. Nothing to do;
- own rows against those of all: `gather(z)`, a mean over the own rows. The gradient also has to reach the rows of the
  others, so the backward pass of `gather` sums over processes what each of them has for a row;
- statistics of the whole batch (variance, covariance): every process computes the same L from `gather(z)`, or from
  `all_reduce` of its own sums. The sum over processes is W times the gradient, the average of DDP takes it back.

In all three the loss is what one process with the whole batch would have, without any factor W. torch.distributed's own
all_gather and all_reduce pass no gradient: with them, and the own rows put back, the second kind gets a wrong direction
and the third 1 / W of its length. Keys and targets, which have no gradient, may be gathered by either. `make test-mine`
finds such mistakes.
"""

import inspect
import os
import sys

import torch
import torch.distributed as dist
from torch import nn


def init_processes(device="auto"):
    """Joins the process group that torchrun describes (if any) and returns this process's device.

    device: "auto" (CUDA if there is one, else CPU), "cpu", "cuda", "cuda:1", "mps" ...
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    if problem := _unusable(device, own):
        if first_here():  # another machine may have the device
            print(f"error: --device {device} {problem}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    device = torch.device(own)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def _unusable(device, own):
    """Why this process cannot use a device, and what to do; "" if it can. own: the device with its number."""
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    names = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus if gpus > 1 else 0))]
    names += [name for name in ("mps", "xpu") if hasattr(torch, name) and getattr(torch, name).is_available()]
    remedy = f"choose auto, {', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "choose auto or cpu"
    try:
        kind = torch.device(own).type
    except RuntimeError:
        return f"is no device: {remedy}"
    if device == "cuda" and 0 < gpus < local:
        return f"has {gpus} GPUs here for {local} processes: --nproc_per_node={gpus}, or --device cpu"
    try:
        torch.empty(0, device=own).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):  # the last one: "meta" has no numbers
        built = kind == "cuda" and torch.version.cuda is None and torch.version.hip is None
        return f"cannot be used here{', this torch is built without it' if built else ''}: {remedy}"
    return ""


def end_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    return rank() == 0


def first_here():
    """Is this the first process of its machine?"""
    return os.environ.get("LOCAL_RANK", "0") == "0"


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


def agree(number, model):
    """Have all processes this whole number? (one small collective, on the device of the model)"""
    if world_size() == 1:
        return True
    return len(gather(torch.tensor([number], device=next(model.parameters()).device)).unique()) == 1


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


def process_mean(tensor):
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
    """(B, ...) of each process -> (W B, ...) in rank order, with gradient. All processes hold equally many rows; those
    of this one are rows rank() * B to (rank() + 1) * B. The gradient of a row is the sum of what all processes have for
    it, which is right for a loss that is a mean over own rows, and for one that every process computes of all rows; see
    above. It must not be scaled by the number of processes."""
    return _Gather.apply(rows) if world_size() > 1 else rows


def gather_uneven(rows):
    """As `gather`, without gradient, for different numbers of rows per process."""
    if world_size() == 1:
        return rows
    sizes = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = gather(padded).chunk(len(sizes))  # split(0) would give one part where nobody has rows
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


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
