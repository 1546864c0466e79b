"""MoCo: the loss, the queue, split and shuffled batch norm, and version 1."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moco
from common import batchnorm
from common.resnet import resnet
from tests.helpers import EXACT, SMALL, main, records, refused, rows, state, train, unit


def small_model(queue=24, **settings):
    torch.manual_seed(0)
    return moco.MoCo(resnet(*SMALL), dim=8, queue=queue, **settings).double()


def views(batch=8, seed=0):
    return rows(2, batch, 3, 16, 16, seed=seed)


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_equals_the_formula_in_numpy(temperature):
    q, k, queue = unit(6, 8, seed=1), unit(6, 8, seed=2), unit(50, 8, seed=3)
    total = 0.0
    for a, b in zip(q.numpy(), k.numpy(), strict=True):
        right = np.exp(np.dot(a, b) / temperature)
        total -= np.log(right / (right + sum(np.exp(np.dot(a, n) / temperature) for n in queue.numpy())))
    assert moco.info_nce(q, k, queue, temperature).item() == pytest.approx(total / 6, abs=1e-10)


def test_loss_and_gradient_equal_those_of_concatenated_logits():
    """Also where the exponentials of the formula would overflow."""
    k, queue = unit(6, 8, seed=2), unit(50, 8, seed=3)
    for temperature in (0.2, 0.001):
        a, b = (unit(6, 8, seed=1).requires_grad_() for _ in range(2))
        ours = moco.info_nce(a, k, queue, temperature)
        logits = torch.cat([(b * k).sum(1, keepdim=True), b @ queue.T], 1) / temperature
        theirs = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
        ours.backward()
        theirs.backward()
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-12)
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_equal_embeddings_give_chance(size):
    q = unit(1, 8).expand(5, -1)
    assert moco.info_nce(q, q, q[:1].expand(size, -1), 0.07).item() == pytest.approx(math.log(1 + size), abs=1e-12)


def test_queue_may_change_between_loss_and_backward_pass():
    grads = []
    for change in (False, True):
        q, queue = unit(3, 8).requires_grad_(), unit(9, 8, seed=1)
        loss = moco.info_nce(q, unit(3, 8, seed=2), queue, 0.2)
        if change:
            queue.zero_()
        loss.backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


# ------------------------------------------------------------------------------------------------------ queue
@pytest.mark.parametrize("sizes", [[3] * 9, [5, 7, 2, 10], [23, 1, 10, 9], [10], [40, 3]])
def test_queue_equals_a_list(sizes):
    """Ten places; batches that do not divide them, fill them exactly, and are larger."""
    model = small_model(queue=10)
    slow, place = [row.tolist() for row in model.queue], 0
    for seed, n in enumerate(sizes):
        keys = unit(n, 8, seed=seed)
        model.enqueue(keys)
        for row in keys.tolist():
            slow[place] = row
            place = (place + 1) % 10
        assert model.queue.tolist() == slow
        assert model.oldest.item() == place


def test_queue_starts_with_unit_vectors_of_the_seed():
    a, b = small_model(), small_model()
    torch.testing.assert_close(a.queue.norm(dim=1), torch.ones(24, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(a.queue, b.queue)
    assert (a.queue @ a.queue.T - torch.eye(24)).abs().max() < 0.99  # 24 different ones
    torch.manual_seed(1)
    assert not torch.equal(moco.MoCo(resnet(*SMALL), dim=8, queue=24).queue.double(), a.queue)


def test_queue_of_a_run_holds_the_last_keys(tmp_path):
    """Four steps of 16 keys into 40 places: all are replaced, 24 of them twice, and `oldest` has gone round once."""
    before = train("moco", tmp_path / "a", "--max-steps", 1)["model"]
    after = train("moco", tmp_path / "b", "--max-steps", 4)["model"]
    assert before["oldest"] == 16 and after["oldest"] == 64 - 40
    same = (before["queue"] == after["queue"]).all(1)
    assert not same.any()
    torch.manual_seed(3)
    start = moco.MoCo(resnet(*SMALL), dim=16, queue=40).queue
    assert torch.equal(before["queue"][16:], start[16:]) and not torch.equal(before["queue"][:16], start[:16])
    torch.testing.assert_close(after["queue"].norm(dim=1), torch.ones(40))


def test_accumulated_and_symmetric_steps_enqueue_everything_once(tmp_path):
    for words, count in ((["--accum", 2], 16), (["--symmetric"], 32), (["--symmetric", "--accum", 4], 32)):
        out = tmp_path / "".join(map(str, words))
        assert train("moco", out, "--max-steps", 1, *words)["model"]["oldest"] == count


def test_symmetric_step_swaps_the_views_and_makes_one_backward_pass_through_both_losses(tmp_path, monkeypatch):
    seen, losses, passes = [], [], []
    forward, loss, backward = moco.MoCo.forward, moco.info_nce, moco.Run.backward
    monkeypatch.setattr(moco.MoCo, "forward", lambda self, *x: seen.append(x[:2]) or forward(self, *x))
    monkeypatch.setattr(moco, "info_nce", lambda *x: losses.append(loss(*x)) or losses[-1])
    monkeypatch.setattr(moco.Run, "backward", lambda run, x: passes.append(x) or backward(run, x))
    train("moco", tmp_path, *EXACT, "--max-steps", 1, "--accum", 2, "--symmetric")
    assert [torch.equal(seen[i][j], seen[i + 1][1 - j]) for i in (0, 2) for j in (0, 1)] == [True] * 4
    assert len(losses) == 4 and passes == [losses[0] + losses[1], losses[2] + losses[3]]
    assert records(tmp_path)[1]["loss"] == pytest.approx(sum(passes).item() / 2, rel=1e-12)


# ------------------------------------------------------------------------------------------------- batch norm
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_split_batch_norm_equals_one_batch_norm_per_group(splits):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    ours = nn.BatchNorm2d(5).double()
    nn.init.normal_(ours.weight), nn.init.normal_(ours.bias), nn.init.uniform_(ours.running_var)
    theirs = [copy.deepcopy(ours) for _ in range(splits)]
    batchnorm.split_batch_norm(ours, splits)
    for _ in range(2):
        out = ours(x)
        expected = torch.cat([norm(x[8 // splits * g :][: 8 // splits]) for g, norm in enumerate(theirs)])
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (out, expected)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=0)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in theirs]).mean(0)
        torch.testing.assert_close(getattr(ours, name), mean, atol=1e-12, rtol=0)
    assert ours.num_batches_tracked == 2
    ours.eval()
    plain = nn.BatchNorm2d(5).double().eval()
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), plain(x))


def test_every_batch_norm_is_split_and_names_stay():
    model = small_model(splits=4)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2 * 20 and all(type(m) is batchnorm.SplitBatchNorm and m.splits == 4 for m in norms)
    assert model.backbone.state_dict().keys() == resnet(*SMALL).state_dict().keys()


def test_queries_of_one_group_do_not_depend_on_the_other_groups():
    x, other = views(), views(seed=1)
    changed = torch.cat([x[:, :6], other[:, 6:]], 1)
    for splits, same in ((4, 6), (1, 0)):
        model, order = small_model(splits=splits), torch.arange(8)
        a, b = (model(*v, order)[0] for v in (x, changed))
        assert ((a - b).abs().amax(1) < 1e-12).tolist() == [True] * same + [False] * (8 - same)


def test_keys_are_normalised_in_groups_of_the_other_order():
    """Rows 0 and 5 are swapped: changing image 5 changes the keys of the first group, and leaves image 4's alone."""
    model, (x1, x2) = small_model(splits=4), views()
    order = torch.tensor([5, 1, 2, 3, 4, 0, 6, 7])
    changed = x2.clone()
    changed[5] = views(seed=1)[0, 5]
    a, b = model(x1, x2, order)[1], model(x1, changed, order)[1]
    assert ((a - b).abs().amax(1) > 1e-6).nonzero().flatten().tolist() == [1, 5]  # groups (5 1) (2 3) (4 0) (6 7)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shuffling_and_its_inverse_give_the_keys_of_the_images(world, monkeypatch):
    """Each rank in turn, with collectives that know what all the others hold: a network that works row by row must
    return the key of each image in its own place, and every rank passes exactly its share of `order`."""
    model = small_model()
    model.backbone, model.projector = nn.Flatten(), nn.Identity()
    model.target_backbone, model.target_projector = nn.Flatten(), nn.Identity()
    images, order = views(12)[0], moco.key_order(seed=5, step=7, part=0, batch=12)
    expected, n = F.normalize(images.flatten(1), dim=1), 12 // world
    monkeypatch.setattr(moco, "world_size", lambda: world)
    for r in range(world):
        seen = []
        held = iter([images, images[order].flatten(1)])  # what the two gathers of a step collect
        monkeypatch.setattr(moco, "gather", lambda rows, held=held, seen=seen: seen.append(rows) or next(held))
        monkeypatch.setattr(moco, "rank", lambda r=r: r)
        own = images[n * r : n * (r + 1)]
        q, k, keys = model(own, own, order)
        assert torch.equal(seen[1], images[order[n * r : n * (r + 1)]].flatten(1))
        torch.testing.assert_close(keys, expected, atol=1e-15, rtol=0)
        assert torch.equal(k, keys[n * r : n * (r + 1)])
        torch.testing.assert_close(q, k, atol=1e-15, rtol=0)


def test_key_order_is_a_permutation_that_belongs_to_seed_step_and_micro_batch():
    orders = [moco.key_order(*which, 64).tolist() for which in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1))]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == moco.key_order(0, 1, 0, 64).tolist()
    assert sum(i == j for i, j in enumerate(orders[0])) < 8


@pytest.mark.parametrize(
    "world, batch, asked, groups",
    [
        *[(1, 256, None, 8), (8, 256, None, 8), (2, 16, None, 8), (1, 12, None, 6), (3, 96, None, 6)],
        *[(16, 256, None, 16), (1, 7, None, 1), (1, 256, 16, 16), (2, 256, 2, 2), (8, 16, None, 8)],
    ],
)
def test_number_of_groups(world, batch, asked, groups, monkeypatch):
    monkeypatch.setattr(batchnorm, "world_size", lambda: world)
    assert batchnorm.batch_norm_groups(asked, batch) == groups


@pytest.mark.parametrize("world, asked", [(1, 3), (1, 0), (1, -8), (1, 16), (2, 1)])
def test_impossible_groups_end_the_program_with_one_line(world, asked, monkeypatch, capsys):
    monkeypatch.setattr(batchnorm, "world_size", lambda: world)
    assert f"--bn-splits {asked}" in refused(capsys, batchnorm.batch_norm_groups, asked, 16)


def test_groups_of_one_image_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(batchnorm, "world_size", lambda: 8)
    assert "at least 2 images" in refused(capsys, batchnorm.batch_norm_groups, None, 8)


def test_statistics_become_the_mean_over_processes(monkeypatch):
    model = small_model()
    for i, (name, buffer) in enumerate(model.named_buffers()):
        if "running" in name:
            buffer.fill_(i)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(batchnorm, "process_mean", lambda flat: (flat + 3 * flat) / 2)  # the other has 3 times as much
    batchnorm.average_statistics(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] * (2 if "running" in name else 1)), name
    batchnorm.average_statistics(nn.LayerNorm(4))  # as in torchvision's ConvNeXt: none to average


# -------------------------------------------------------------------------------------------------- versions
def test_heads_of_both_versions():
    v2, v1 = small_model(), small_model(mlp=False)
    assert [type(m) for m in v2.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in v2.projector.parameters()] == [(64, 64), (64,), (8, 64), (8,)]
    assert [tuple(p.shape) for p in v1.projector.parameters()] == [(8, 64), (8,)]


def test_staircase_falls_at_epochs_120_and_160():
    steps = 7  # of an epoch
    factors = [moco.staircase(step, 200 * steps) for step in range(200 * steps)]
    drops = [step for step in range(1, 200 * steps) if factors[step] < factors[step - 1]]
    assert drops == [120 * steps, 160 * steps]
    assert sorted(set(factors)) == pytest.approx([0.01, 0.1, 1.0])
    assert [moco.staircase(step, 10, warmup=2) for step in (0, 1, 2)] == [0, 0.5, 1]


def test_v1_runs_with_its_schedule(tmp_path):
    train("moco", tmp_path, "--v1", "--warmup-epochs", 0)  # 16 steps
    rates = [r["lr"] / (0.03 * 16 / 256) for r in records(tmp_path).values()]
    assert rates == pytest.approx([1] * 10 + [0.1] * 3 + [0.01] * 3)


def test_small_data_gets_a_shorter_queue_and_a_line_that_says_so(tmp_path, capsys):
    words = ["--data", "fake:400", "--arch", "resnet18", "--width", 0.125, "--image-size", 16, "--batch-size", 16]
    words += ["--knn-every", 0, "--max-steps", 1, "--workers", 0]
    for more, size, reason in ((["--queue", 70], 70, False), ([], 32, True), (["--batch-size", 64], 64, True)):
        out = tmp_path / str(size)
        main("moco", *words, *more, "--out", out)
        assert state(out)["model"]["queue"].shape == (size, 128)
        text = capsys.readouterr().out
        assert ("65,536 are more than 400 images" in text) == reason
        assert f"ln({size + 1}) = {math.log(size + 1):.2f}" in text
