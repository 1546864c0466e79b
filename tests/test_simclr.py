"""NT-Xent, SimCLR's model and its two rules of the learning rate."""

import math

import numpy as np
import pytest
import torch

from common.resnet import resnet
from simclr import SimCLR, nt_xent
from tests.helpers import rows, train


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_loss_equals_numpy(temperature):
    """Equation 1 of the paper, one anchor and one candidate at a time."""
    z1, z2 = rows(2, 6, 5)
    z = np.concatenate([z1, z2])
    n, b = len(z), len(z1)

    def sim(i, k):
        return math.exp(z[i] @ z[k] / math.sqrt((z[i] @ z[i]) * (z[k] @ z[k])) / temperature)

    losses = [-math.log(sim(i, (i + b) % n) / sum(sim(i, k) for k in range(n) if k != i)) for i in range(n)]
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(sum(losses) / n, abs=1e-10)


@pytest.mark.parametrize("b", [1, 2, 17])
def test_equal_embeddings_give_chance(b):
    z = torch.ones(b, 4, dtype=torch.float64)
    assert nt_xent(z, z, 0.1).item() == pytest.approx(math.log(2 * b - 1), abs=1e-12)


def test_model_follows_the_official_code():
    model = SimCLR(resnet("resnet50", image_size=224, zero_init_residual=True))
    first, _, _, second, norm = model.projector
    assert (first.in_features, first.out_features, second.out_features) == (2048, 2048, 128)
    assert first.bias is None and second.bias is None
    assert norm.weight.requires_grad and not norm.bias.requires_grad
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert model.backbone.layer1[0].bn3.weight.abs().sum() == 0  # zero gamma


@pytest.mark.parametrize("width, millions", [(1, 23.51), (2, 93.91), (4, 375.38)])
def test_width_gives_the_published_parameter_counts(width, millions):
    """Encoder sizes of the SimCLR v2 table, derived from the layer description."""
    with torch.device("meta"):
        count = sum(p.numel() for p in resnet("resnet50", width).parameters())
    assert round(count / 1e6, 2) == millions


def test_both_learning_rate_rules(tmp_path):
    """At 16 images: 0.3 x 16/256 and 0.075 x sqrt(16) (appendix B.1)."""
    for rule, peak in (("linear", 0.3 * 16 / 256), ("sqrt", 0.075 * 4)):
        state = train("simclr", tmp_path / rule, "--max-steps", 5, "--lr-rule", rule)
        assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(peak)  # the first step after warm-up
