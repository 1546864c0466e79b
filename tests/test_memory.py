"""The counter of benchmarks/memory.py beside bytes counted by hand, and its autocast beside that of CUDA."""

import contextlib

import pytest
import torch
from torch import nn

from benchmarks.memory import SINGLE, SINGLE_DTYPE, Counter, Fake, as_on_cuda


@pytest.mark.parametrize("fake", [False, True])
def test_two_layers_by_hand(fake):
    """4 rows of 5 numbers, 7 hidden ones, 3 outputs: most exists when the gradient passes ReLU."""
    with Fake() if fake else contextlib.nullcontext(), Counter(block=1) as counter:
        net = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        counter.tag_model(net, optimizer)
        x, slope = torch.zeros(4, 5), torch.zeros(4, 3)
        counter.start()
        y = net(x)
        y.backward(slope)
        optimizer.step()
    weights, hidden = 4 * (5 * 7 + 7 * 3), 4 * 4 * 7
    expected = {"parameters": weights, "gradients": 4 * 7 * 3, "buckets": 0, "optimizer": weights, "buffers": 0}
    # x, y and its gradient; the hidden ones that ReLU saved, their gradient behind it and before it
    expected["activations"] = 4 * 4 * (5 + 3 + 3) + 3 * hidden
    assert counter.at == expected and counter.peak == sum(expected.values())
    assert counter.now["gradients"] == weights  # all of them in the end


def test_autocast_is_that_of_cuda(monkeypatch):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in SINGLE + SINGLE_DTYPE:
        assert has(f"aten::{name}", "AutocastCUDA") and not has(f"aten::{name}", "AutocastCPU"), name

    def dtypes(device):
        x = torch.zeros(2, 4, device=device)
        z = nn.functional.linear(x, torch.zeros(4, 4, device=device))
        outputs = [z, nn.functional.layer_norm(z, (4,)), z.softmax(1), z.sum(), z.exp(), z + z, z.relu(), z.norm()]
        outputs += [z**2, nn.functional.normalize(z), torch.cat([z, x]), z @ x.T, z.mean(0)]
        return [output.dtype for output in outputs]

    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with Fake(), contextlib.ExitStack() as stack:
        with torch.autocast("cuda", torch.bfloat16):
            expected = dtypes("cuda")
        as_on_cuda(stack)
        with torch.autocast("cpu", torch.bfloat16):
            assert dtypes("cpu") == expected
    assert {torch.float32, torch.bfloat16} == set(expected)
