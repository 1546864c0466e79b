"""SimSiam's loss, stop-gradient, layers and learning rates."""

import math

import numpy as np
import pytest
import torch

from common.resnet import resnet
from simsiam import SimSiam, augmentation, parse_args, simsiam_loss
from tests.helpers import train

torch.manual_seed(0)


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


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


def test_gradient_reaches_predictions_only():
    p1, p2, z1, z2 = (t.clone().requires_grad_() for t in rows(4, 3, 5))
    simsiam_loss(p1, p2, z1, z2).backward()
    assert p1.grad.norm() > 0 and p2.grad.norm() > 0
    assert z1.grad is None and z2.grad is None
    z1, z2 = z1.detach(), z2.detach()
    assert torch.autograd.gradcheck(lambda a, b: simsiam_loss(a, b, z1, z2), (p1, p2))


def test_model_follows_section_3():
    model = SimSiam(resnet("resnet50", image_size=224), dim=2048, pred_dim=512)
    linear = [m for m in model.projector if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is None) for m in linear] == [(2048, 2048, True)] * 3
    assert not model.projector[-1].affine
    bottleneck, last = model.predictor[0], model.predictor[-1]
    assert (bottleneck.in_features, bottleneck.out_features, bottleneck.bias) == (2048, 512, None)
    assert (last.in_features, last.out_features, last.bias is not None) == (512, 2048, True)


def test_views_are_normalised_separately():
    """Batch-norm statistics are those of one view: a second view of other brightness does not change the first."""
    model = SimSiam(resnet("resnet18", 0.125, 16), dim=16, pred_dim=4)
    x = torch.randn(8, 3, 16, 16)
    z1 = model(x, x)[2]
    assert torch.allclose(z1, model(x, 5 * x + 3)[2], atol=1e-6)


def test_recipe_is_the_papers():
    args = parse_args(["--data", "/images"])
    assert (args.lr, args.batch_size, args.weight_decay, args.momentum, args.epochs) == (0.05, 512, 1e-4, 0.9, 100)
    view, other = augmentation(224)
    assert view == other
    assert (view.crop, view.jitter, view.jitter_p) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8)
    assert (view.gray_p, view.blur_p, view.blur_sigma, view.solarize_p) == (0.2, 0.5, (0.1, 2.0), 0.0)


def test_learning_rate_of_the_predictor_stays(tmp_path):
    groups = train("simsiam", tmp_path, "--max-steps", 12)["optimizer"]["param_groups"]
    peak = 0.05 * 16 / 256
    assert groups[1]["lr"] == pytest.approx(peak)
    # 4 steps of warm-up, 12 of cosine; the 12th step is the 8th of the cosine (index 7)
    assert groups[0]["lr"] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 7 / 12)))
    assert groups[0]["weight_decay"] == groups[1]["weight_decay"] == 1e-4
