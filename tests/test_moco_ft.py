"""Feature transformation: the formulas in NumPy, their known consequences, one draw per step, MoCo as the limit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import moco
from moco_ft import draw_lambdas, feature_transform, ft_loss, save_scores, scores
from tests.helpers import EXACT, records, rows, tensors, train


def unit(count, n, dim, seed=0):
    return [F.normalize(x, dim=1) for x in rows(count, n, dim, seed=seed)]


def test_transformation_and_loss_equal_numpy():
    (q, k), (queue,) = unit(2, 5, 4), unit(1, 7, 4, seed=1)
    lam_p, lam_n, order = 1.7, 0.3, torch.tensor([3, 0, 6, 1, 2, 5, 4])
    moved = feature_transform(q, k, queue, lam_p, lam_n, order)
    q, k, n = q.numpy(), k.numpy(), queue.numpy()
    hard_q, hard_k = lam_p * q + (1 - lam_p) * k, lam_p * k + (1 - lam_p) * q
    mixed = np.array([lam_n * n[i] + (1 - lam_n) * n[j] for i, j in enumerate(order.tolist())])
    for found, expected in zip(moved, (hard_q, hard_k, mixed), strict=True):
        assert found.numpy() == pytest.approx(expected)
    loss = 0.0
    for a, b in zip(hard_q, hard_k, strict=True):
        logits = [a @ b / 0.2, *(a @ c / 0.2 for c in mixed)]
        loss += (math.log(sum(math.exp(v) for v in logits)) - logits[0]) / 5
    assert ft_loss(*moved, 0.2).item() == pytest.approx(loss, abs=1e-10)


def test_pairs_become_harder_by_the_papers_formula():
    q, k = unit(2, 6, 8)
    s = (q * k).sum(1)
    for lam in (1.0, 1.3, 2.0):
        a, b, _ = feature_transform(q, k, q, lam, 1, None)
        torch.testing.assert_close((a * b).sum(1), s + 2 * lam * (lam - 1) * (s - 1))
        assert ((a * b).sum(1) <= s + 1e-12).all()


def test_gradient_reaches_the_query_through_both_vectors_of_a_pair_and_only_the_query():
    (q, k), (queue,) = unit(2, 5, 4), unit(1, 9, 4, seed=1)
    q, k, queue = (x.requires_grad_() for x in (q, k, queue))

    def loss(q):
        a, b, n = feature_transform(q, k, queue.detach(), 1.6, 0.4, torch.arange(8, -1, -1))
        return ft_loss(a, b, n, 0.5)

    assert torch.autograd.gradcheck(loss, (q,))
    loss(q).backward()
    assert k.grad is None and queue.grad is None


def test_lambdas_of_one_are_moco():
    (q, k), (queue,) = unit(2, 5, 4), unit(1, 9, 4, seed=1)
    same = [x.clone().requires_grad_() for x in (q, q)]
    ft_loss(*feature_transform(same[0], k, queue, 1.0, 1.0, None), 0.2).backward()
    moco.info_nce(same[1], k, queue, 0.2).backward()
    assert torch.equal(same[0].grad, same[1].grad)


def test_draws_are_functions_of_the_step_with_the_published_distributions():
    one, two = draw_lambdas(0, 5, 2.0, 1.6, 40), draw_lambdas(0, 5, 2.0, 1.6, 40)
    assert one[:2] == two[:2] and torch.equal(one[2], two[2]) and one[0] != draw_lambdas(0, 6, 2.0, 1.6, 40)[0]
    assert sorted(one[2].tolist()) == list(range(40))
    p, n, _ = zip(*(draw_lambdas(1, step, 2.0, 1.6, 2) for step in range(2000)), strict=True)
    assert np.mean(p) == pytest.approx(1.5, abs=0.02) and 1 < min(p) < max(p) < 2
    assert np.var(p) == pytest.approx(1 / (4 * (2 * 2.0 + 1)), rel=0.1)  # of Beta(a, a): 1 / (4 (2 a + 1))
    assert np.var(n) == pytest.approx(1 / (4 * (2 * 1.6 + 1)), rel=0.1)
    assert draw_lambdas(0, 5, 0, 0, 40)[:2] == (1.0, 1.0)


def test_without_transformation_training_is_that_of_moco(tmp_path):
    words = ["--max-steps", 3, "--v1", *EXACT]  # v2's rates end differently
    plain = train("moco_ft", tmp_path / "a", "--pos-alpha", 0, "--neg-alpha", 0, *words)
    late = train("moco_ft", tmp_path / "b", "--ft-epoch", 4, *words)
    theirs, moved = train("moco", tmp_path / "c", *words), train("moco_ft", tmp_path / "d", *words)
    expected = tensors(theirs["model"])
    for state in (plain, late):
        for name, value in tensors(state["model"]).items():
            torch.testing.assert_close(value, expected[name])
    assert any((value != expected[name]).any() for name, value in tensors(moved["model"]).items())


def test_scores_are_logged_and_drawn(tmp_path):
    train("moco_ft", tmp_path, "--max-steps", 4)
    for record in records(tmp_path).values():
        assert record["pos_ft"] <= record["pos"] and -1 <= record["neg"] <= 1
    (q, k), (queue,) = unit(2, 5, 4), unit(1, 9, 4, seed=1)
    pos, neg = scores(q, k, queue)
    assert pos.tolist() == pytest.approx((q * k).sum(1).tolist())
    assert neg.mean().item() == pytest.approx((q @ queue.T).mean().item())
    (tmp_path / "scores.png").unlink()
    save_scores(tmp_path / "scores.png", (q, k, queue), feature_transform(q, k, queue, 2.0, 0.5, torch.arange(9)), "x")
    assert len(Image.open(tmp_path / "scores.png").getcolors(100000)) > 4
    nothing = [x * math.nan for x in (q, k, queue)]  # the picture comes before the line that ends such a run
    save_scores(tmp_path / "scores.png", nothing, nothing, "x")
