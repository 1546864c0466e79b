"""The path on a GPU, without one: the loop of every script on CUDA tensors that have shapes and a device, no numbers.

A host tensor that meets a device tensor, and a step that waits for the device, both fail here. What cannot be seen:
values, and the backward pass, for which PyTorch needs a GPU.
"""

import contextlib
import importlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from common import loader
from common.datasets import in_memory
from common.kmeans import Clusters
from common.run import Run
from tests.helpers import ROOT, SCRIPTS, flags, main

aten, CUDA = torch.ops.aten, torch.device("cuda", 0)
COPIES = (aten._to_copy.default, aten.copy_.default)


class Waits(Exception):
    """The host would wait for the device."""


class Device(FakeTensorMode):
    """Between steps every number of the device reads as 1; `within` a step that nobody logs, none may be read."""

    within = False

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo):
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        kinds = {t.device.type for t in tensors if t.ndim}
        if func is aten._pin_memory.default:
            return args[0]
        if func in (aten._local_scalar_dense.default, aten.equal.default) and tensors[0].is_cuda:
            self.refuse(f"{func} reads a number")  # item(), float(x), tolist(), `if x`, torch.equal
            return torch.ones((), dtype=torch.bool if func is aten.equal.default else args[0].dtype).item()
        if func in COPIES:
            source, target = tensors[-1].device.type, (kwargs.get("device") or tensors[0].device).type
            quick = kwargs.get("non_blocking") or args[2:3] == (True,)
            if source != target and (target == "cpu" or not quick):
                self.refuse(f"{func} from {source} to {target} waits until all before it is done")
        elif len(kinds) > 1:
            self.refuse(f"{func} of tensors on {kinds}")  # an index on the host is allowed, and copied
        return super().__torch_dispatch__(func, types, args, kwargs)

    def refuse(self, message):
        if self.within:
            raise Waits(message)


READERS = ["refill"]  # methods that may read in a step: rare, and need to


def forget(script):
    """Empties caches, which hold tensors without numbers now."""
    for name, module in [*sys.modules.items()]:
        for value in vars(module).values() if name == script or name.startswith("common.") else ():
            getattr(value, "cache_clear", lambda: None)()


def on_device(script, out, *more, resident=False):
    """Runs the main of a script. Only these are replaced: the device, the model's tensors when they are placed there,
    the backward pass, which leaves gradients without numbers, and writing files. Returns the steps that were done."""
    mode, runs, moved = Device(), [], {}
    real_numpy, real_generator, real_steps = torch.Tensor.numpy, torch.Generator, Run.steps

    def place(run, model, sync=True):
        stack.enter_context(mode)
        stack.enter_context(torch.no_grad())
        for table in (t for module in model.modules() for t in (module._parameters, module._buffers)):
            for name, value in table.items():
                if value is not None:
                    moved[id(value)] = moved.get(id(value), fake(value))
                    table[name] = moved[id(value)]
        if resident:
            pool = run.loader.pool
            pool.resident, pool.labels = (torch.from_numpy(a).to(CUDA) for a in (in_memory(run.data), run.data.labels))
        runs.append(run)
        return model

    def numpy(tensor, **options):
        if not isinstance(tensor, FakeTensor):
            return real_numpy(tensor, **options)
        return np.ones(tensor.shape, str(tensor.dtype).removeprefix("torch."))

    def clustered(features, k, *rest, **options):
        centroids = features.new_zeros(k, features.shape[1], dtype=torch.float32)
        return Clusters(centroids, centroids.new_zeros(len(features), dtype=torch.int64), 0.0)

    def fake(value):
        new = mode.from_tensor(value.data).to(CUDA)
        return nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new

    def steps(run, epoch, order=None):
        for step, batches in real_steps(run, epoch, order):
            mode.within = step > 0 and not run.due  # in the first step caches are filled
            yield step, batches
            mode.within = False

    def backward(loss):
        assert loss.is_cuda and loss.dtype == torch.float32
        for p in runs[0].model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(forget, script)
        patch.setattr("common.run.start_device", lambda args: CUDA)
        patch.setattr(torch, "Generator", lambda device="cpu": real_generator())
        patch.setattr(torch.Tensor, "numpy", numpy)
        patch.setattr(f"{script}.kmeans", clustered, raising=False)
        patch.setattr(f"{script}.save_classifier", lambda *args: None, raising=False)
        for kind in vars(importlib.import_module(script)).values():
            for name in READERS if isinstance(kind, type) and issubclass(kind, nn.Module) else ():
                if name in vars(kind):
                    patch.setattr(kind, name, lambda *args: 1)
        patch.setattr(loader, "resident", lambda *args: None)
        patch.setattr(loader, "_pin", lambda *args: None)
        patch.setattr(torch.cuda, "Event", lambda: types.SimpleNamespace(record=lambda: 0, synchronize=lambda: 0))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.Tensor, "backward", backward)
        for name, new in (("place", place), ("steps", steps), ("save", lambda run: None)):
            patch.setattr(Run, name, new)
        main(script, *flags(script, out, "--workers", 0, "--log-every", 9, "--precision", "bf16", *more))
    return runs[0].step


@pytest.mark.parametrize("script", SCRIPTS)
def test_steps_neither_mix_devices_nor_wait(script, tmp_path):
    steps = 6 if "epoch_done" in (ROOT / f"{script}.py").read_text() else 3  # is there work between epochs?
    assert on_device(script, tmp_path, "--max-steps", steps) == steps


def test_images_held_on_the_device(tmp_path):
    assert on_device("simsiam", tmp_path, "--data", "digits", "--max-steps", 3, resident=True) == 3


MISTAKES = {
    "a number is read": (lambda loss, p: loss * loss.item(), "reads a number"),
    "a branch": (lambda loss, p: loss if loss > 0 else -loss, "reads a number"),
    "on the host": (lambda loss, p: loss + torch.zeros(1), "Expected all tensors to be on the same device"),
    "an index of the host": (lambda loss, p: loss + p[torch.arange(3)].mean(), "index.Tensor of tensors on"),
    "a blocking copy": (lambda loss, p: loss + torch.zeros(1).to(loss.device), "from cpu to cuda waits"),
    "a table": (lambda loss, p: loss + torch.tensor([1.0], device=loss.device), "from cpu to cuda waits"),
    "a copy to the host": (
        lambda loss, p: loss + loss.cpu().to(loss.device, non_blocking=True),
        "from cuda to cpu waits",
    ),
    "a mask": (lambda loss, p: loss + p[p > 0].mean(), "nonzero"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake, tmp_path, monkeypatch):
    import simsiam

    (wrong, message), real = MISTAKES[mistake], simsiam.simsiam_loss
    monkeypatch.setattr(simsiam, "simsiam_loss", lambda *outputs: wrong(real(*outputs), outputs[0]))
    with pytest.raises(Exception, match=message):
        on_device("simsiam", tmp_path, "--max-steps", 3)
