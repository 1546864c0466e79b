"""Optimisation: LARS, parameter groups, a schedule as a pure function of the step, and numeric precision."""

import contextlib
import math

import torch

from common.distributed import print0


def cosine(step, total, warmup=0, final=0.0):
    """Factor of the peak learning rate at a step: linear from 0 over `warmup` steps, then half a cosine down to `final`
    at step `total`."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def param_groups(module, weight_decay):
    """Two groups: weights (2 dimensions or more), and biases and norm parameters, which get neither weight decay nor
    layer-wise adaptation. ndim decides, because names miss shortcuts such as `downsample.1.weight`."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


def _parts(params, most=2**20):
    """Splits a list of tensors into what one foreach call takes: everything on a GPU, where the calls cost most; on a
    CPU up to `most` numbers, which stay in its cache from one operation to the next."""
    part, count = [], 0
    for p in params:
        if part and p.device.type == "cpu" and count + p.numel() > most:
            yield part
            part, count = [], 0
        part.append(p)
        count += p.numel()
    if part:
        yield part


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), in the form most self-supervised code uses:

        g <- g + weight_decay * w;  g <- trust * |w| / |g| * g;  m <- momentum * m + g;  w <- w - lr * m

    Where a norm is 0 the factor is 1. The learning rate stays outside the momentum buffer. Groups with `adapt=False`
    take the plain gradient.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for params in _parts([p for p in group["params"] if p.grad is not None]):
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                grads = [p.grad for p in params]
                if group["weight_decay"]:
                    grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
                if group["adapt"]:
                    weights, updates = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
                    ratio = torch.where((weights > 0) & (updates > 0), group["trust"] * weights / updates, 1.0)
                torch._foreach_mul_(buffers, group["momentum"])
                if not group["adapt"]:
                    torch._foreach_add_(buffers, grads)
                elif ratio.device.type == "cpu":  # reading numbers costs nothing there, and spares a broadcast
                    for buffer, grad, factor in zip(buffers, grads, ratio.tolist(), strict=True):
                        buffer.add_(grad, alpha=factor)
                else:
                    torch._foreach_addcmul_(buffers, grads, list(ratio.unbind()))
                torch._foreach_add_(params, buffers, alpha=-group["lr"])


def precision_name(name, device):
    """fp32, bf16, fp16 or fp64: what "auto" is on a device, and any other name itself."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def precision(name, device):
    """What `--precision` means on a device: (autocast context for every forward, GradScaler, dtype of the weights).

    auto: bf16 autocast on CUDA, fp32 elsewhere. fp64: everything in double precision, for exactness tests.
    """
    name = precision_name(name, device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    if dtype and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        print0(f"note        this processor has no {name} instructions: --precision fp32 is several times faster here")
    amp = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
    return amp, scaler, torch.float64 if name == "fp64" else torch.float32


def or_precise(amp):
    """What may help, too, against numbers that are not finite, under the autocast that `precision` gave, if any."""
    return ", or try --precision fp32" if isinstance(amp, torch.autocast) else ""


def upcast(tensor):
    """At least single precision: losses, softmax and distances are never computed in 16 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
