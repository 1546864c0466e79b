"""PixPro: pairs of cells by hand-made geometry, propagation and losses against loops, monitors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.resnet import resnet
from pixpro import PixPro, instance_loss, pairs, pixpro_loss, propagate
from tests.helpers import EXACT, SMALL, records, rows, train


def box(top, left, height, width, mirrored=0, image=(100, 200)):
    return torch.tensor([[top, left, height, width, *image, mirrored]], dtype=torch.float64)


def test_equal_crops_pair_each_cell_with_itself():
    a = pairs(box(10, 20, 40, 80), box(10, 20, 40, 80), 3, 0.7)
    assert torch.equal(a[0], torch.eye(9, dtype=torch.float64))  # the next centre lies 0.71 diagonals away


def test_a_mirrored_crop_pairs_columns_from_the_other_side():
    a = pairs(box(10, 20, 40, 80), box(10, 20, 40, 80, mirrored=1), 2, 0.5)[0]
    assert a.nonzero().tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]
    same = pairs(box(10, 20, 40, 80, mirrored=1), box(10, 20, 40, 80, mirrored=1), 2, 0.5)[0]
    assert torch.equal(same, torch.eye(4, dtype=torch.float64))


def test_shifted_and_disjoint_crops():
    a = pairs(box(0, 0, 50, 100), box(0, 50, 50, 100), 2, 0.5)[0]  # shifted by one column of cells
    assert a.nonzero().tolist() == [[1, 0], [3, 2]]
    assert not pairs(box(0, 0, 40, 80), box(60, 120, 40, 80), 2, 0.7).any()


def test_pairs_equal_a_loop_over_cells():
    generator = np.random.default_rng(0)
    for _ in range(20):
        crops = [
            [*generator.uniform(0, 40, 2), *generator.uniform(20, 60, 2), 110, 120, *generator.integers(0, 2, 1)]
        ] * 1
        crops += [[*generator.uniform(0, 40, 2), *generator.uniform(20, 60, 2), 110, 120, *generator.integers(0, 2, 1)]]
        side, expected = 3, np.zeros((9, 9))

        def centre(crop, cell, side=3):
            top, left, h, w, rows_, columns, mirrored = crop
            row, column = divmod(cell, side)
            column = side - 1 - column if mirrored else column
            return (top + h * (row + 0.5) / side) / rows_, (left + w * (column + 0.5) / side) / columns

        diagonal = max(np.hypot(h / 110, w / 120) / side for _, _, h, w, *_ in crops)
        for i in range(9):
            for j in range(9):
                (y, x), (v, u) = centre(crops[0], i), centre(crops[1], j)
                expected[i, j] = np.hypot(y - v, x - u) < 0.7 * diagonal
        found = pairs(*(torch.tensor([crop], dtype=torch.float64) for crop in crops), side, 0.7)[0]
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("power", [2.0, 1.0, 3.0])
def test_propagation_and_loss_equal_loops(power):
    x, g, t1, t2 = (rows(3, 4, 5, seed=seed) for seed in range(4))
    unit = [F.normalize(v, dim=2).numpy() for v in (x, g, t1, t2)]
    y = np.zeros((3, 4, 5))
    for b in range(3):
        for i in range(4):
            for j in range(4):
                y[b, i] += max(unit[0][b, i] @ unit[0][b, j], 0) ** power * unit[1][b, j]
            y[b, i] /= np.linalg.norm(y[b, i])
    found = propagate(x, g, power)
    assert found.numpy() == pytest.approx(y)
    a = (rows(3, 4, 4, seed=9) > 0).double()
    a[2] = 0  # an image without pairs
    loss = 0.0
    for b in range(3):
        total = sum(a[b, i, j].item() for i in range(4) for j in range(4)) + 1e-6
        loss -= 2 / 3 * sum(a[b, i, j].item() * (y[b, i] @ unit[3][b, j]) for i in range(4) for j in range(4)) / total
        loss -= 2 / 3 * sum(a[b, i, j].item() * (y[b, j] @ unit[2][b, i]) for i in range(4) for j in range(4)) / total
    assert pixpro_loss(found, found, t1, t2, a).item() == pytest.approx(loss, abs=1e-10)


def test_best_losses_are_minus_four_and_targets_have_no_gradient():
    y = F.normalize(rows(2, 4, 5), dim=2).requires_grad_()
    target = y.detach().clone().requires_grad_()
    loss = pixpro_loss(y, y, target, target, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    assert loss.item() == pytest.approx(-4, abs=1e-5)
    loss.backward()
    assert target.grad is None
    assert instance_loss(y[0], y[0], y[0], y[0]).item() == pytest.approx(-4)


def test_shapes_and_target():
    model = PixPro(resnet("resnet18", 0.125, 32), 16, 32, instance=True).train()
    outputs = model(*torch.rand(2, 4, 3, 32, 32))
    assert [tuple(v.shape) for v in outputs] == [(4, 16, 16)] * 6 + [(4, 16)] * 4
    assert not any(v.requires_grad for v in outputs[4:6] + outputs[8:])
    assert len(PixPro(resnet(*SMALL), 16, 32)(*torch.rand(2, 4, 3, 16, 16))) == 6


def test_pairs_are_counted_and_without_the_instance_branch_too(tmp_path):
    train("pixpro", tmp_path, "--max-steps", 3, "--instance-weight", 0, "--transform-layers", 2, *EXACT)
    for record in records(tmp_path).values():
        assert 0 < record["positives"] <= 256 and -4 <= record["loss"] <= 4
