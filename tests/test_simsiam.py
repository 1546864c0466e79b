"""SimSiam's loss, layers and learning rates."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from common.resnet import resnet
from simsiam import SimSiam, simsiam_loss
from tests.helpers import rows, train


def test_loss_equals_numpy():
    p1, p2, z1, z2 = rows(4, 7, 5)

    def cosine(a, b):
        a, b = a.numpy(), b.numpy()
        return np.mean([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)])

    expected = -0.5 * cosine(p1, z2) - 0.5 * cosine(p2, z1)
    assert simsiam_loss(p1, p2, z1, z2).item() == pytest.approx(expected, abs=1e-10)


def test_loss_of_known_vectors():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert simsiam_loss(a, a, a, a).item() == pytest.approx(-1)
    assert simsiam_loss(a, a, b, b).item() == pytest.approx(-math.cos(math.pi / 4))
    assert simsiam_loss(a, a, -a, b).item() == pytest.approx((-math.cos(math.pi / 4) + 1) / 2)


def test_model_follows_section_3():
    model = SimSiam(resnet("resnet50", image_size=224), dim=2048, pred_dim=512)
    linear = [m for m in model.projector if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is None) for m in linear] == [(2048, 2048, True)] * 3
    assert not model.projector[-1].affine
    bottleneck, last = model.predictor[0], model.predictor[-1]
    assert (bottleneck.in_features, bottleneck.out_features, bottleneck.bias) == (2048, 512, None)
    assert (last.in_features, last.out_features, last.bias is not None) == (512, 2048, True)


def test_learning_rate_of_the_predictor_stays(tmp_path):
    groups = train("simsiam", tmp_path, "--max-steps", 12)["optimizer"]["param_groups"]
    peak = 0.05 * 16 / 256
    assert groups[1]["lr"] == pytest.approx(peak)
    # 4 steps of warm-up, 12 of cosine; the 12th step is the 8th of the cosine (index 7)
    assert groups[0]["lr"] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 7 / 12)))
    assert groups[0]["weight_decay"] == groups[1]["weight_decay"] == 1e-4
