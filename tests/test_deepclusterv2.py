"""DeepCluster-v2, and what SeLa-v2 shares with it: banks, labels, loss, resuming, recipes; clusters by slow loops."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import deepcluster
import deepclusterv2
import odc
import selav2
import swav
from common import rng
from common.resnet import resnet
from tests.helpers import EXACT, SMALL, different, logged, main, parsed, records, refused, rows, state, train, unit

PAGES = {"deepclusterv2": deepclusterv2, "selav2": selav2}
CLASSES = {"deepclusterv2": deepclusterv2.DeepClusterV2, "selav2": selav2.SeLaV2}
LOSSES = {"deepclusterv2": deepclusterv2.deepclusterv2_loss, "selav2": selav2.selav2_loss}
METHOD = {"deepclusterv2": "cluster", "selav2": "relabel"}
both = pytest.mark.parametrize("script", PAGES)


def model_of(script, prototypes=(6, 5, 6), images=70, rows=64, seed=0):
    torch.manual_seed(seed)
    return CLASSES[script](resnet(*SMALL), 8, 16, prototypes, images, rows)


# ------------------------------------------------------------------------------------------------------- loss
def slow_loss(scores, labels, temperature):
    """One image, crop and head at a time, in float64."""
    heads = []
    for s, y in zip(scores, labels, strict=True):
        terms = []
        for v, i in np.ndindex(s.shape[:2]):
            if y[i] >= 0:
                p = np.exp(s[v, i] / temperature)
                terms.append(-np.log(p[y[i]] / p.sum()))
        heads.append(np.mean(terms))
    return np.mean(heads)


@both
def test_loss_equals_numpy_and_images_without_a_label_do_not_count(script):
    loss, labels = LOSSES[script], torch.tensor([[3, 0, -100, 2, 3], [1, 6, -100, 0, 0]])
    scores = [rows(3, 5, k, seed=k).mul(0.3).requires_grad_() for k in (4, 7)]
    expected = slow_loss([s.detach().numpy() for s in scores], labels.numpy(), 0.1)
    value = loss(scores, labels, 0.1)
    assert value.item() == pytest.approx(expected, abs=1e-10)
    assert torch.autograd.gradcheck(lambda *s: loss(s, labels, 0.1), scores)
    value.backward()
    assert all((s.grad[:, 2] == 0).all() and (s.grad[:, [0, 1, 3, 4]] != 0).any(2).all() for s in scores)
    equal = [torch.full_like(s, 0.3) for s in scores]
    assert loss(equal, labels, 0.1).item() == pytest.approx((math.log(4) + math.log(7)) / 2, rel=1e-12)


@both
def test_loss_without_any_label_is_zero(script):
    scores = [rows(3, 5, 4).requires_grad_()]
    value = LOSSES[script](scores, torch.full((1, 5), -100), 0.1)
    value.backward()
    assert value.item() == 0 and (scores[0].grad == 0).all()


@both
def test_loss_of_two_processes_is_that_of_all_labelled_images(script, monkeypatch):
    """Also where they hold different numbers of them."""
    scores, labels = [rows(2, 6, 4)], torch.tensor([[0, 3, 1, -100, 2, -100]])
    whole = LOSSES[script](scores, labels, 0.1)
    monkeypatch.setattr(PAGES[script], "world_size", lambda: 2)
    monkeypatch.setattr(PAGES[script], "all_reduce", lambda count: 0 * count + 4)
    parts = [LOSSES[script]([scores[0][:, part]], labels[:, part], 0.1) for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------- model
@both
def test_one_backbone_pass_per_resolution(script):
    model, seen = model_of(script).eval(), []
    for i, prototypes in enumerate(model.prototypes.parameters()):
        prototypes.data.copy_(unit(*prototypes.shape, seed=i))
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    views = [rows(3, 3, size, size).float() for size in (16, 16, 12)]
    z, *scores = model(views)
    assert seen == [(6, 3, 16, 16), (3, 3, 12, 12)]
    assert [s.shape for s in scores] == [(3, 3, 6), (3, 3, 5), (3, 3, 6)]
    for v, view in enumerate(views):  # in eval mode each view is on its own, so the order can be checked
        torch.testing.assert_close(z[v], F.normalize(model.projector(model.backbone(view)), dim=1))
        for s, c in zip(scores, model.prototypes.parameters(), strict=True):
            torch.testing.assert_close(s[v], z[v] @ c.T)


# -------------------------------------------------------------------------------------------------------- banks
@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """script -> what a run of three epochs saw: 70 images in 4 batches of 16, so that each leaves out six."""

    def watch(script):
        seen = {"out": tmp_path_factory.mktemp(script), "store": [], "loss": [], "modes": [], "tables": []}
        page, kind, method = PAGES[script], CLASSES[script], METHOD[script]
        store, loss, label, forward = kind.store, LOSSES[script], getattr(kind, method), kind.forward

        def record_store(model, place, indices, z):
            seen["store"].append((place, indices.clone(), z.detach().clone()))
            store(model, place, indices, z)

        def record_label(model, *rest):
            bank = model.bank.clone(), model.index.clone()
            label(model, *rest)
            seen["tables"].append((*bank, model.labels.clone(), [p.clone() for p in model.prototypes.parameters()]))

        def record_forward(model, views):
            seen["modes"].append((model.training, torch.is_grad_enabled(), [tuple(x.shape) for x in views]))
            return forward(model, views)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "store", record_store)
            patch.setattr(kind, method, record_label)
            patch.setattr(kind, "forward", record_forward)
            patch.setattr(page, f"{script}_loss", lambda s, y, t: seen["loss"].append(y.clone()) or loss(s, y, t))
            seen["state"] = train(script, seen["out"], "--data", "fake:70", "--epochs", 3, "--lr", 2, "--seed", 5)
        return seen

    return {script: watch(script) for script in PAGES}


@both
def test_banks_hold_the_last_epoch_in_its_order(script, watched):
    """Before the first epoch they are filled without a step, one crop at a time, in training mode."""
    seen = watched[script]
    assert [place for place, *_ in seen["store"]] == [0, 1, 2, 3] * 4
    assert seen["modes"][:8] == [(True, False, [(16, 3, 16, 16)])] * 8
    assert all(grad and len(shapes) == 3 for _, grad, shapes in seen["modes"][8:])
    for e, (bank, index, *_) in enumerate(seen["tables"]):
        order = rng.permutation(5, 3 if e == 0 else e - 1, 70)[:64]  # epoch 3 never comes
        assert index.tolist() == order.tolist()
        stored = seen["store"][4 * e : 4 * e + 4]
        assert torch.equal(bank, torch.cat([z for *_, z in stored], 1)) and bank.norm(dim=2).min() > 0.999
    assert torch.equal(seen["state"]["model"]["bank"], torch.cat([z for *_, z in seen["store"][-4:]], 1))


@both
def test_a_step_uses_the_labels_of_its_images(script, watched):
    """Those that the last epoch left out have none."""
    seen, missing = watched[script], 0
    assert len(seen["tables"]) == 3 and len(seen["loss"]) == 12
    for step, y in enumerate(seen["loss"]):
        _, index, labels, _ = seen["tables"][step // 4]
        indices = rng.permutation(5, step // 4, 70)[step % 4 * 16 :][:16]
        assert torch.equal(y, labels[:, indices])
        assert (y < 0).tolist() == [[i not in index for i in indices]] * 3
        missing += (y[0] == -100).sum().item()
        assert y.max(1).values.tolist() <= [5, 4, 5]
    assert missing > 0


@both
def test_report_is_on_the_first_head(script, watched):
    seen, truth = watched[script], np.arange(70) % 10
    notes = [r for r in logged(seen["out"]) if "clusters" in r]
    assert [r["step"] for r in notes] == [0, 4, 8]
    for e, note in enumerate(notes):
        now, known, before = seen["tables"][e][2][0].numpy(), np.ones(70, bool), None
        if e:
            before = seen["tables"][e - 1][2][0].numpy()
            known = before >= 0
        known &= now >= 0
        report = deepcluster.cluster_report(now[known], None if before is None else before[known], truth[known])
        assert {k: v for k, v in note.items() if k not in ("step", "seconds")} == report


@both
def test_banks_do_not_depend_on_micro_batches(script):
    """Places count batches of the size at hand: a resumed run may take other micro-batches."""
    z, indices, found = unit(2, 64, 8), torch.arange(64), []
    for size in (16, 8):
        model = model_of(script).double()
        for place, part in enumerate(indices.split(size)):
            model.store(place, part, z[:, part])
        found.append(model)
    assert torch.equal(found[0].bank, z) and torch.equal(found[1].bank, z)
    assert torch.equal(found[0].index, indices) and torch.equal(found[1].index, indices)


# ----------------------------------------------------------------------------------------------------- clusters
def slow_kmeans(x, start, iterations):
    """One row at a time; empty clusters keep their centroid."""
    c = start.copy()
    for _ in range(iterations):
        labels = np.array([np.argmax(c @ row) for row in x])
        for j in range(len(c)):
            if (labels == j).any():
                c[j] = x[labels == j].mean(0)
                c[j] /= np.sqrt((c[j] ** 2).sum())
    return c, np.array([np.argmax(c @ row) for row in x])


def test_clusters_equal_a_slow_loop_with_empty_clusters(monkeypatch):
    """Heads take turns with the banks; each starts from rows of its own draw."""
    model, starts = model_of("deepclusterv2", (6, 40, 7)).double(), []
    model.bank.copy_(unit(2, 64, 8))
    model.bank[:, 20:] = model.bank[:, 20:40].repeat(1, 3, 1)[:, :44]  # equal rows, so that centroids lose all theirs
    model.index.copy_(torch.randperm(70, generator=torch.Generator().manual_seed(0))[:64])
    kmeans = deepclusterv2.kmeans

    def record(x, k, iterations, seed, **rest):
        starts.append(kmeans(x, k, 0, seed, **rest).centroids.numpy())
        return kmeans(x, k, iterations, seed, **rest)

    monkeypatch.setattr(deepclusterv2, "kmeans", record)
    model.cluster(3, [11, 12, 13])
    for head, start in enumerate(starts):
        bank = model.bank[head % 2].numpy()
        assert {tuple(row) for row in start} <= {tuple(row) for row in F.normalize(model.bank[head % 2], dim=1).numpy()}
        centroids, labels = slow_kmeans(bank, start, 3)
        np.testing.assert_allclose(model.prototypes[head].numpy(), centroids, rtol=0, atol=1e-12)
        assert np.array_equal(model.labels[head][model.index].numpy(), labels)
        assert (model.labels[head] == -100).sum() == 6
    assert len(set(labels)) == 7 and len(model.labels[1].unique()) - 1 < 40
    assert not np.array_equal(starts[0][:6], starts[2][:6])


def test_prototypes_are_centroids_and_never_trained(watched):
    seen = watched["deepclusterv2"]
    saved, names = seen["state"]["model"], dict(model_of("deepclusterv2").named_parameters())
    for head in range(3):
        assert torch.equal(saved[f"prototypes.{head}"], seen["tables"][-1][3][head])
        assert not torch.equal(seen["tables"][0][3][head], seen["tables"][1][3][head])
    (group,) = seen["state"]["optimizer"]["param_groups"]
    assert len(group["params"]) == sum("prototypes" not in name for name in names) == len(names) - 3


def test_each_head_and_epoch_starts_from_other_rows(tmp_path, monkeypatch):
    seeds, cluster = [], deepclusterv2.DeepClusterV2.cluster
    monkeypatch.setattr(deepclusterv2.DeepClusterV2, "cluster", lambda m, n, s: seeds.extend(s) or cluster(m, n, s))
    train("deepclusterv2", tmp_path, "--max-steps", 5)
    assert len(seeds) == len(set(seeds)) == 6


# ----------------------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("kill", ["within the first", "within the second", "between"])
@both
def test_killed_runs_end_bit_equal(script, kill, tmp_path, monkeypatch):
    """A kill while labels are found, of the second of three heads, and one between two such times; every step saves."""
    words = [*EXACT, "--data", "fake:70", "--max-steps", 9, "--save-every", 0]
    whole = train(script, tmp_path / "whole", *words)
    page, calls = PAGES[script], []
    name = {"deepclusterv2": "kmeans", "selav2": "sinkhorn_labels"}[script]
    deadly = {"within the first": (name, 2), "within the second": (name, 5), "between": (f"{script}_loss", 6)}[kill]
    original = getattr(page, deadly[0])

    def dies(*args, **more):
        calls.append(0)
        if len(calls) == deadly[1]:
            raise ZeroDivisionError
        return original(*args, **more)

    monkeypatch.setattr(page, deadly[0], dies)
    with pytest.raises(ZeroDivisionError):
        train(script, tmp_path / "killed", *words)
    reached = state(tmp_path / "killed")["step"] if (tmp_path / "killed/last.pt").exists() else 0
    assert reached == {"within the first": 0, "within the second": 4, "between": 5}[kill]
    assert different(whole, train(script, tmp_path / "killed", *words)) == []


@both
def test_other_heads_are_another_recipe(script, tmp_path, capsys):
    train(script, tmp_path, "--max-steps", 1)
    error = refused(capsys, train, script, tmp_path, "--max-steps", 2, "--prototypes", 6, 5)
    assert "--prototypes was [6, 5, 6], is [6, 5]" in error and "choose another --out" in error
    words = ["--max-steps", 1, "--prototypes", 6, 5, "--init", tmp_path / "last.pt"]
    train(script, tmp_path / "new", *words)
    assert state(tmp_path / "new")["model"]["labels"].shape == (2, 64)


# ------------------------------------------------------------------------------------------------------ recipes
@pytest.mark.parametrize(
    "words, message",
    [
        ("--prototypes 65", "--prototypes 65 for 64 images: use at most 6, ten images per prototype"),
        ("--prototypes 6 6 65", "--prototypes 65 for 64 images"),
        ("--prototypes 65 --data fake:79", "--prototypes 65 for 64 images"),  # in whole batches
        ("--prototypes 1", "--prototypes: must be at least 2"),
        ("--prototypes", "--prototypes: expected at least one argument"),
        ("--iterations 0", "--iterations: must be greater than 0"),
        ("--temperature 0", "--temperature: must be greater than 0"),
        ("--crops 1 6", "--crops must begin with at least 2"),
        ("--crops 2 2 2", "--sizes, --crop-min and --crop-max need 3 values"),
        ("--sizes 16 7", "--sizes: must be at least 8"),
        ("--crop-min .5 .3 --crop-max .4 .4", "no --crop-min may exceed its --crop-max"),
        ("--precision fp32 --batch-size 128", "--batch-size 128 is larger than the data set (64 images)"),
    ],
)
@both
def test_mistakes_end_in_one_line(script, words, message, tmp_path, capsys):
    assert message in refused(capsys, train, script, tmp_path, *words.split())


def test_wrong_lambda_ends_in_one_line(tmp_path, capsys):
    assert "--lambd: must be greater than 0" in refused(capsys, train, "selav2", tmp_path, "--lambd", 0)


SHARED = {"arch": "resnet50", "batch_size": 4096, "lr": 0.6, "weight_decay": 1e-6, "momentum": 0.9, "dim": 128}
SHARED |= {"hidden_dim": 2048, "temperature": 0.1, "warmup_epochs": 10, "prototypes": None}
RECIPES = {
    "deepclusterv2": ({"epochs": 800, "iterations": 10}, [(224, 0.14, 1.0)] * 2 + [(96, 0.05, 0.14)] * 6),
    "selav2": (
        {"epochs": 400, "lambd": 25, "freeze_steps": None},
        [(160, 0.08, 1.0)] * 2 + [(96, 0.05, 0.14)] * 4,
    ),
}
SMALLER = {
    "deepclusterv2 --crops 2": [(224, 0.08, 1.0)] * 2,
    "deepclusterv2 --crops 2 4 --sizes 160 96 --crop-min .08 .05": [(160, 0.08, 1.0)] * 2 + [(96, 0.05, 0.14)] * 4,
    "selav2 --image-size 224 --crops 2": [(224, 0.08, 1.0)] * 2,
    "deepclusterv2 --data cifar10": [(32, 0.08, 1.0)] * 2,
    "selav2 --data cifar10": [(32, 0.08, 1.0)] * 2,
    "selav2 --data stl10": [(96, 0.08, 1.0)] * 2 + [(58, 0.05, 0.14)] * 4,
}


def views_of(page, args):
    return page.augmentation(args.crops, args.sizes, args.crop_min, args.crop_max, args.flip, args.color_strength)


@both
def test_defaults_are_the_published_ones(script):
    args, (expected, crops) = parsed(script, "--data", "/imagenet"), RECIPES[script]
    assert {k: getattr(args, k) for k in SHARED | expected} == SHARED | expected
    views = views_of(PAGES[script], args)
    assert [(v.size, *v.area) for v in views] == crops and args.image_size == crops[0][0]
    for v in views:
        assert (v.jitter, v.jitter_p, v.gray_p, v.flip) == ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5)
        assert (v.blur_p, v.blur_sigma, v.solarize_p) == (0.5, (0.1, 2.0), 0.0)
    assert PAGES[script].head_sizes(None, 1_281_167 // 4096 * 4096) == [3000, 3000, 3000]
    assert PAGES[script].head_sizes(None, 9984) == [998] * 3 and PAGES[script].head_sizes([7, 9], 64) == [7, 9]


@pytest.mark.parametrize("words", SMALLER)
def test_crops_by_flags(words):
    script, *words_of = words.split()
    args = parsed(script, *words_of, *([] if "--data" in words_of else ["--data", "/x"]))
    assert [(v.size, *v.area) for v in views_of(PAGES[script], args)] == SMALLER[words]


@both
def test_learning_rate_rule_and_start(script, watched, tmp_path, capsys):
    """From a sixteenth of the peak up, then half a cosine to a thousandth, as SwAV's."""
    peak = 2 * (16 / 256) ** 0.75
    rates = [r["lr"] for r in records(watched[script]["out"]).values()]
    up = np.linspace(peak / 16, peak, 5)[:4]
    down = peak * (0.001 + 0.999 * 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8)))
    assert rates == pytest.approx([*up, *down], rel=1e-12)
    (group,) = watched[script]["state"]["optimizer"]["param_groups"]
    assert (group["adapt"], group["weight_decay"], group["momentum"]) == (True, 1e-6, 0.9)
    words = "--data fake:70 --arch resnet18 --width 0.125 --image-size 16 --batch-size 16 --workers 0 --max-steps 1"
    words += " --hidden-dim 16 --dim 8 --knn-every 0"
    main(script, *words.split(), "--out", tmp_path)
    shown = capsys.readouterr()
    assert "prototypes  6 + 6 + 6 (a tenth of the images)" in shown.out and "banks of 2 x 64 x 8" in shown.out
    assert f"baseline    loss {math.log(6):.2f}, the mean of ln K\n" in shown.out and shown.err == ""
    train(script, tmp_path / "many", "--prototypes", 7, "--max-steps", 1)
    assert "fewer than ten images per prototype, --prototypes 6 would be better" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- copies
COPIES = [
    *((name, deepclusterv2, other) for name in ("cluster_report",) for other in (deepcluster, odc, selav2)),
    *((name, deepclusterv2, selav2) for name in ("head_sizes", "first_report", "own_share", "augmentation")),
    ("augmentation", deepclusterv2, swav),
    ("own_share", deepclusterv2, odc),
    ("store", deepclusterv2.DeepClusterV2, selav2.SeLaV2),
]


@pytest.mark.parametrize("name, one, other", COPIES, ids=lambda x: getattr(x, "__name__", x))
def test_copies_are_equal(name, one, other):
    assert inspect.getsource(getattr(one, name)) == inspect.getsource(getattr(other, name))


def test_losses_are_equal():
    one, other = (inspect.getsource(loss) for loss in LOSSES.values())
    assert one.replace("deepclusterv2", "selav2") == other
