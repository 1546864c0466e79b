"""SCAN: both losses, neighbours, views, choice of a head, the second stage on two processes and resumed, mistakes."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import scan
from common import rng
from common.augment import DRAWS, FLIP, JITTER, LEFT, TOP
from common.checkpoint import load_backbone
from common.datasets import open_dataset
from common.features import extract
from tests.helpers import (
    EXACT,
    SMALL,
    TINY,
    assert_close,
    different,
    launch,
    logged,
    main,
    parsed,
    photo,
    records,
    refused,
    rows,
    state,
    train,
    write_images,
)

SAME = {"atol": 1e-8, "rtol": 1e-7}
LOW = ["--threshold", 0.25]  # which some images of an untrained head reach


def second(first, out, *more):
    """Runs the second stage from the folder of a first one; returns the state that it saved."""
    main("scan", *TINY.split(), "--self-label", "--pretrained", first / "last.pt", "--out", out, *more)
    return state(out)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Folder of a run of the first stage."""
    out = tmp_path_factory.mktemp("scan") / "first"
    train("scan", out, *EXACT, "--max-steps", 3, "--lr", 0.01)
    return out


# ------------------------------------------------------------------------------------------------------- loss
def softmax(z):
    z = np.exp(z - z.max())
    return z / z.sum()


@pytest.mark.parametrize("weight", [5.0, 0.5])
def test_loss_equals_loops(weight):
    anchors, neighbours = 3 * rows(2, 7, 4), 3 * rows(2, 7, 4, seed=9)
    found = scan.scan_loss(anchors, neighbours, weight)
    for head in range(2):
        p, q = ([softmax(z) for z in x[head].numpy()] for x in (anchors, neighbours))
        consistency = -sum(np.log(sum(p[i][c] * q[i][c] for c in range(4))) for i in range(7)) / 7
        mean = [sum(p[i][c] for i in range(7)) / 7 for c in range(4)]
        spread = -sum(m * np.log(m) for m in mean)
        expected = consistency - weight * spread, consistency, spread
        assert [part[head].item() for part in found] == pytest.approx(expected, abs=1e-10)


def test_limits_and_gradients_of_the_loss():
    equal = torch.zeros(6, 3, dtype=torch.float64)
    assert scan.scan_loss(equal, equal, 5.0)[0].item() == pytest.approx(-4 * np.log(3), abs=1e-12)
    sure = 1e4 * torch.eye(3, dtype=torch.float64).repeat(2, 1)  # every cluster as often, without doubt
    assert scan.scan_loss(sure, sure, 5.0)[0].item() == pytest.approx(-5 * np.log(3), abs=1e-6)
    apart = scan.scan_loss(sure.float(), sure.roll(1, 1).float(), 5.0)[0]  # p.q is 0 in any precision
    assert apart.isfinite() and apart > 1e3
    x = [rows(5, 3).requires_grad_(), rows(5, 3, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *z: scan.scan_loss(*z, 5.0)[0], x)
    assert scan.entropy(torch.tensor([1.0, 0.0])).item() == 0


@pytest.mark.parametrize("balance", [True, False])
def test_self_labelling_loss_equals_loops(balance):
    weak, strong = 4 * rows(12, 4, seed=1), rows(12, 4, seed=2).requires_grad_()
    weak.requires_grad_()
    loss, count = scan.self_label_loss(weak, strong, 0.8, balance)
    terms = {}
    for w, s in zip(weak.detach().numpy(), strong.detach().numpy(), strict=True):
        if softmax(w).max() > 0.8:
            terms.setdefault(w.argmax(), []).append(-np.log(softmax(s)[w.argmax()]))
    assert 2 <= len(terms) <= 4 and len({len(t) for t in terms.values()}) > 1
    means = [np.mean(t) for t in terms.values()] if balance else [x for t in terms.values() for x in t]
    assert loss.item() == pytest.approx(np.mean(means), abs=1e-10) and count == sum(map(len, terms.values()))
    loss.backward()
    sure = weak.detach().softmax(1).amax(1) > 0.8
    assert weak.grad is None and torch.equal(strong.grad.abs().sum(1) > 0, sure)


def test_without_a_sure_image_loss_and_gradient_are_zero():
    strong = rows(6, 3).requires_grad_()
    loss, count = scan.self_label_loss(torch.zeros(6, 3), strong, 0.99)
    loss.backward()
    assert loss.item() == 0 and count.item() == 0 and strong.grad.abs().max() == 0


def test_average_copied_back_is_a_smaller_rate():
    """What --ema rests on: weights w + (1 - m) (step - w), with momentum and weight decay."""
    a, b = (torch.ones(3, dtype=torch.float64).requires_grad_() for _ in range(2))
    rest = {"momentum": 0.9, "weight_decay": 0.1}
    optimizers = torch.optim.SGD([a], lr=0.5, **rest), torch.optim.SGD([b], lr=0.5 * (1 - 0.7), **rest)
    for step in range(4):
        before = a.detach().clone()
        for p, optimizer in zip((a, b), optimizers, strict=True):
            p.grad = p.detach().cos() + step
            optimizer.step()
        a.data.copy_(0.7 * before + 0.3 * a.data)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------------------- neighbours
@pytest.mark.parametrize("n, k", [(30, 4), (30, 29), (5, 20)])
def test_neighbours_are_the_most_similar_of_the_others(n, k):
    x = rows(n, 6)
    table = scan.neighbour_table(x, k).numpy()
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j, i=i: -float(unit[i] @ unit[j]))
        assert table[i].tolist() == [i, *others[:k]]


def test_equal_rows_are_neighbours_of_each_other_and_first_comes_oneself():
    table = scan.neighbour_table(torch.ones(9, 4), 3)
    assert table[:, 0].tolist() == list(range(9))
    assert all(len(set(row)) == 4 for row in table.tolist())


def test_partners_are_drawn_evenly_by_the_numbers_of_the_samples():
    table = np.arange(20_000 * 5).reshape(20_000, 5).astype(np.int32)
    order = np.random.default_rng(0).permutation(20_000)
    found = scan.partners(table, order, 3, 7)
    u = rng.uniforms(3, 7, order, 100, 1)[:, 0]
    assert found.tolist() == [int(table[i, int(5 * v)]) for i, v in zip(order, u, strict=True)]
    assert np.abs(np.bincount(found % 5) - 4000).max() < 5 * (20_000 * 0.2 * 0.8) ** 0.5
    assert np.array_equal(found[::-1], scan.partners(table, order[::-1], 3, 7))
    assert (found != scan.partners(table, order, 3, 8)).mean() > 0.7


def test_pairs_are_images_and_their_partners_in_views_of_their_own(tmp_path, monkeypatch):
    """What the network gets in a step, against the table, the order of the epoch and the images."""
    seen, real = [], scan.SCAN.forward
    monkeypatch.setattr(scan.SCAN, "forward", lambda self, *x: seen.append(x) or real(self, *x))
    view = scan.Strong(16, flip=0.0, operations=0)
    monkeypatch.setattr(scan, "augmentation", lambda *how: view)
    train("scan", tmp_path, *"--batch-size 8 --max-steps 9 --data fake:16".split())
    data, table = open_dataset("fake:16", "train"), np.load(tmp_path / "neighbours.npz")["training"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (view.mean, view.std))
    for step in (0, 5):
        epoch, part = divmod(step, 2)
        order = rng.permutation(3, epoch, 16)
        near = scan.partners(table, order, 3, epoch)
        for x, indices in zip(seen[step], (order, near), strict=True):
            for row, i in zip(x, indices[8 * part : 8 * part + 8], strict=True):
                image = view.crop(data[int(i)][0], np.zeros(DRAWS))
                torch.testing.assert_close(row, (image / 255 - mean) / std, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ views
def nearest_pixels(image, a, b, c, d, e, f):
    """An affine map by loops, black outside."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for y, x in np.ndindex(height, width):
        column = int(np.floor(a * (x + 0.5) + b * (y + 0.5) + c))
        row = int(np.floor(d * (x + 0.5) + e * (y + 0.5) + f))
        if 0 <= column < width and 0 <= row < height:
            out[y, x] = image[row, column]
    return out


def test_operations():
    """In ranges of the recipe; those that are simple to write down, against NumPy."""
    ranges = [operation[:2] for operation in scan.OPERATIONS]
    assert len(ranges) == 14 and ranges.count((0.05, 0.95)) == ranges.count((-0.1, 0.1)) == 4
    assert ranges.count((0, 0)) == 3 and {(-30, 30), (0, 256), (4, 8)} <= set(ranges)
    pixels = photo(20, 30)
    image, wide = Image.fromarray(pixels), pixels.astype(float)
    run = [lambda v, o=o: np.asarray(o[2](image, v)) for o in scan.OPERATIONS]
    assert np.array_equal(run[0](0), pixels)
    low, high = wide.min((0, 1)), wide.max((0, 1))
    assert np.abs(run[1](0) - (wide - low) / (high - low) * 255).max() <= 1
    assert [len(np.unique(channel)) > 20 for channel in np.moveaxis(run[2](0), 2, 0)] == [True] * 3
    assert np.array_equal(run[3](0), pixels) and (run[3](30)[0, 0] == 0).all() and (run[3](-30)[0, 0] == 0).all()
    assert np.array_equal(run[4](100.7), np.where(pixels < 100, pixels, 255 - pixels))
    assert np.abs(run[7](0.3) - 0.3 * wide).max() <= 1
    for which, matrix in ((9, (1, 0.1, 0, 0, 1, 0)), (10, (1, 0, 0, -0.07, 1, 0))):
        amount = matrix[1] or matrix[3]
        assert np.array_equal(run[which](amount), nearest_pixels(pixels, *matrix))
    assert np.array_equal(run[11](0.1)[:, :27], pixels[:, 3:]) and (run[11](0.1)[:, 27:] == 0).all()
    assert np.array_equal(run[12](-0.1)[2:], pixels[:18]) and (run[12](-0.1)[:2] == 0).all()
    assert np.array_equal(run[13](4.9), pixels // 16 * 16) and np.array_equal(run[13](7.9), pixels // 2 * 2)


def test_strong_views_take_the_operations_that_were_drawn(monkeypatch):
    calls, u = [], np.zeros(DRAWS)

    def operation(number):
        return lambda image, v: calls.append((number, round(v, 9))) or image

    monkeypatch.setattr(scan, "OPERATIONS", [(number, 2 * number, operation(number)) for number in range(10)])
    u[JITTER : JITTER + 8] = 0.35, 0.5, 0.99, 0.0, 0.0, 0.75, 0.35, 0.25
    image = torch.from_numpy(photo(16, 16)).permute(2, 0, 1)
    u[FLIP] = 0.4
    x = scan.Strong(16).crop(image, u)
    assert calls == [(3, 4.5), (9, 9.0), (0, 0.0), (3, 3.75)] and torch.equal(x, image.flip(2))
    u[FLIP] = 0.6
    assert torch.equal(scan.Strong(16, operations=0).crop(image, u), image)
    calls.clear()
    scan.Strong(16).crop(torch.rand(2, 16, 16), u)  # neither colours nor 8 bits
    assert calls == []


def test_holes_are_squares_of_the_mean_colour_cut_at_the_borders():
    view, sides = scan.Strong(32, flip=0.0, operations=0, cutout=16), []
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    for u in rng.uniforms(0, 0, range(3000), 0, DRAWS):
        before = white.clone()
        x = view.crop(white, u)
        assert torch.equal(white, before), "the stored image stays as it is"
        hole = (x != 255).any(0).nonzero()
        (top, left), (bottom, right) = hole.amin(0).tolist(), hole.amax(0).tolist()
        assert len(hole) == (bottom - top + 1) * (right - left + 1)
        assert x[:, top, left].tolist() == [round(255 * m) for m in view.mean]
        if 0 < top and 0 < left and bottom < 31 and right < 31:
            assert bottom - top == right - left
        sides.append(max(bottom - top, right - left) + 1)
    assert set(sides) == set(range(1, 17))


@pytest.mark.parametrize("height, width", [(32, 32), (40, 70), (300, 200), (20, 16)])
def test_strong_views_are_squares_of_the_resized_image(height, width):
    for size in (32, 224):
        margin = 256 / 224 if size > 64 else 1
        view, found = scan.Strong(size), []
        for u in (0.0, 0.5, 1 - 1e-9):
            numbers = np.zeros(DRAWS)
            numbers[[TOP, LEFT]] = u
            found.append(view.box(numbers, height, width))
        for top, left, h, w in found:
            assert h == w and abs(h - min(height, width) / margin) <= 1
            assert 0 <= top <= height - h and 0 <= left <= width - w
        assert found[0][:2] == (0, 0) and found[2][:2] == (height - h, width - w)


def test_views_and_defaults_follow_the_recipe():
    assert [scan.augmentation(size).cutout for size in (32, 96, 224)] == [16, 32, 75]
    view = scan.augmentation(32, "simclr")
    assert (view.area, view.jitter, view.gray_p, view.blur_p) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.2, 0)
    names = "epochs batch_size optimizer lr weight_decay neighbours heads views freeze balance ema".split()
    expected = {
        "": (50, 128, "adam", 1e-4, 1e-4, 20, 1, "strong", False),
        "--recipe imagenet": (100, 512, "sgd", 5, 0, 50, 10, "simclr", True),
        "--self-label": (200, 1000, "adam", 1e-4, 1e-4, None, 1, "strong", False, True, 0),
        "--self-label --recipe imagenet": (25, 512, "sgd", 0.03, 0, None, 1, "strong", False, False, 0.999),
    }
    for words, values in expected.items():
        args = vars(parsed("scan", *words.split()))
        assert all(v in (None, args[n]) for n, v in zip(names, values, strict=False)), words
    assert (args["entropy_weight"], args["threshold"], args["out"]) == (5, 0.99, "runs/scan_selflabel")


# ------------------------------------------------------------------------------------------------------ model
def test_frozen_backbone_stays_as_it_is(tmp_path):
    words = ["--freeze", "--optimizer", "sgd", "--lr", 0.5, "--max-steps", 3, "--warmup-epochs", 0]
    saved = train("scan", tmp_path, *words)["model"]
    start = load_backbone("random", *SMALL, seed=3)[0].state_dict()
    assert [name for name, value in start.items() if not torch.equal(value, saved[f"backbone.{name}"])] == []
    assert len(state(tmp_path)["optimizer"]["state"]) == 4


def test_head_of_lowest_loss_is_taken_and_its_clusters_are_those_of_the_evaluation(tmp_path):
    """Whatever the labels say; against NumPy, from what the run has left."""
    words = ["--data", "digits", "--heads", 4, "--max-steps", 2, "--lr", 0.01, *EXACT]
    saved = train("scan", tmp_path, *words)
    backbone, meta = load_backbone(tmp_path / "last.pt")
    view = scan.EvalView(16, mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    x, _ = extract(backbone.double(), open_dataset("digits", "val"), view, "cpu", 0)
    table, losses = np.load(tmp_path / "neighbours.npz")["judged"], []
    assert table.shape == (359, 6) and (table[:, 0] == np.arange(359)).all()
    for head in range(4):
        weight, bias = (saved["model"][f"heads.{head}.{name}"].numpy() for name in ("weight", "bias"))
        p = np.apply_along_axis(softmax, 1, x.double().numpy() @ weight.T + bias)
        mean = p.mean(0)
        losses.append(-np.log((p[:, None] * p[table]).sum(2)).mean() + (mean * np.log(mean)).sum())
    best = int(np.argmin(losses))
    assert saved["model"]["best"] == best and min(losses) == pytest.approx(np.sort(losses)[0])
    note = next(r for r in logged(tmp_path) if "head" in r)
    assert note["head"] == best and note["judged"] == pytest.approx(min(losses), abs=6e-5)
    layer = state(tmp_path, "clusters.pt")["classifier"]
    assert torch.equal(layer["weight"], saved["model"][f"heads.{best}.weight"]) and len(layer["classes"]) == 5
    words = ["--data", "digits", "--pretrained", tmp_path / "clusters.pt", "--out", tmp_path / "eval", *EXACT]
    found = main("eval_cluster", *words)
    assert found["own"] and found["clusters"] == 5 and found["method"] == "scan"
    assert [round(found["best"][n], 2) for n in ("acc", "nmi")] == pytest.approx([note["acc"], note["nmi"]], abs=0.011)
    assert sum(size > 0 for size in found["sizes"]) == note["used"]


# --------------------------------------------------------------------------------------------- the second stage
def test_second_stage_starts_from_the_best_head(first, tmp_path):
    saved = state(first)["model"]
    found = second(first, tmp_path, "--threshold", 0.999, "--max-steps", 2, *EXACT)
    for name in ("weight", "bias"):
        assert torch.equal(found["model"][f"heads.0.{name}"], saved[f"heads.{int(saved['best'])}.{name}"])


def test_steps_without_a_sure_image_are_left_out_and_counted(first, tmp_path, capsys, monkeypatch):
    saved = second(first, tmp_path / "none", "--threshold", 0.999, "--max-steps", 3)
    trained = [n for n, _ in scan.SCAN(load_backbone("random", *SMALL)[0], 5).named_parameters()]
    start = state(first)["model"]
    assert [n for n in trained if "heads" not in n and not torch.equal(saved["model"][n], start[n].float())] == []
    assert saved["model"]["skipped"] == 3 and saved["optimizer"]["state"] == {} and saved["step"] == 3
    assert [r["loss"] for r in records(tmp_path / "none").values()] == [0, 0, 0]
    assert "no image had a cluster with a probability above 0.999" in capsys.readouterr().err

    real, calls = scan.self_label_loss, []

    def sometimes(weak, strong, threshold, balance):
        calls.append(1)
        return real(weak, strong, 1.0 if len(calls) == 2 else threshold, balance)

    one = second(first, tmp_path / "one", *LOW, "--max-steps", 1, "--warmup-epochs", 0)["model"]
    monkeypatch.setattr(scan, "self_label_loss", sometimes)
    two = second(first, tmp_path / "two", *LOW, "--max-steps", 2, "--warmup-epochs", 0)["model"]
    assert two["skipped"] == 1 and [n for n in trained if not torch.equal(one[n], two[n])] == []


def test_second_stage_on_two_processes_and_resumed(first, tmp_path):
    """Steps in which the processes have different numbers of labels; neighbours of the first stage, too."""
    words = [*LOW, *EXACT, "--max-steps", 6, "--lr", 0.003]
    base = [*TINY.split(), "--self-label", "--pretrained", first / "last.pt"]
    again = ["scan", [*TINY.split(), "--pretrained", "random", "--clusters", "5", "--neighbours", "4", "--heads", "2"]]
    again[1] += ["--out", tmp_path / "first", *EXACT, "--max-steps", 3, "--lr", 0.01]
    launch(["scan", [*base, "--out", tmp_path / "two", *words]], again)
    one = second(first, tmp_path / "one", *words)
    assert_close(one, state(tmp_path / "two"), **SAME)
    losses = [{s: r["loss"] for s, r in records(tmp_path / out).items()} for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-8) and all(losses[0].values())
    tables = [np.load(out / "neighbours.npz") for out in (first, tmp_path / "first")]
    assert set(tables[0]) == {"training", "judged"} and tables[0]["training"].shape == (64, 5)
    assert all(np.array_equal(tables[0][name], tables[1][name]) for name in tables[0])
    second(first, tmp_path / "resumed", *words, "--max-steps", 3)
    assert different(one, second(first, tmp_path / "resumed", *words)) == []


# --------------------------------------------------------------------------------------------------- files
def test_neighbours_are_found_once(first, tmp_path, capsys, monkeypatch):
    """By the network with which the run starts; a run that goes on reads them, or says what is wrong with them."""
    monkeypatch.setattr(scan, "nearest", None)
    shutil.copytree(first, tmp_path / "a")
    path, words = tmp_path / "a/neighbours.npz", ["scan", tmp_path / "a", *EXACT, "--lr", 0.01, "--max-steps"]
    assert train(*words, 4)["step"] == 4
    tables = dict(np.load(path))
    np.savez(path, **tables | {"judged": tables["judged"][:-1]})
    assert "is of [64, 11] images (training and judged), --data has [64, 12]" in refused(capsys, train, *words, 5)
    path.write_bytes(b"PK nothing")
    assert "neighbours.npz cannot be read" in refused(capsys, train, *words, 5)
    path.unlink()
    assert "neighbours.npz cannot be read" in refused(capsys, train, *words, 5)
    assert "the data set had 64 images, has 80" in refused(capsys, train, *words, 5, "--data", "fake:80")
    assert "--heads was 2, is 3" in refused(capsys, train, *words, 5, "--heads", 3)


def test_images_without_labels_in_every_stage(tmp_path, capsys):
    data = write_images(tmp_path / "images", [f"{i:02d}.png" for i in range(16)])
    words = f"--data {data} --arch resnet18 --width 0.125 --image-size 16 --batch-size 8 --epochs 1 --workers 0".split()
    words += ["--pretrained", "random", "--neighbours", "3", "--out", tmp_path / "a"]
    assert "--clusters: say how many; there are no labels" in refused(capsys, main, "scan", *words)
    main("scan", *words, "--clusters", 3)
    rest = f"--data {data} --batch-size 8 --epochs 1 --workers 0 --self-label --threshold 0.3 --pretrained".split()
    main("scan", *rest, tmp_path / "a/last.pt", "--out", tmp_path / "b")
    for out in ("a", "b"):
        note = [r for r in logged(tmp_path / out) if "used" in r]
        assert len(note) == 1 and "acc" not in note[0] and np.isfinite(note[0]["largest"])
        evaluation = ["--pretrained", tmp_path / out / "clusters.pt", "--data", data, "--workers", 0]
        assert main("eval_cluster", *evaluation, "--out", tmp_path / "eval")["clusters"] == 3
        main("predict", *evaluation, "--out", tmp_path / "predict")
    assert not any("neighbours_of_same_class" in r for r in logged(tmp_path / "a"))


def test_mistakes_end_in_one_line(first, tmp_path, capsys):
    words = [*TINY.split(), "--out", tmp_path / "x"]
    stage = ["--self-label", "--pretrained"]
    plain = tmp_path / "backbone.pt"
    shutil.copy(first / "backbone.pt", plain)
    cases = {
        (): "--pretrained: name a network to start from",
        ("--pretrained", "/nowhere.pt"): "--pretrained /nowhere.pt: no such file",
        ("--pretrained", "random", "--clusters", 65): "--clusters 65 for 64 images: use at most 6",
        ("--pretrained", "random", "--neighbours", 64): "--neighbours 64 for 64 images: use at most 63",
        ("--pretrained", plain, "--width", 0.5): "--width 0.5",
        ("--pretrained", "random", "--ema", 0.9): "--ema is of the second stage: add --self-label",
        ("--pretrained", "random", "--threshold", 0.9): "--threshold is of the second stage: add --self-label",
        (*stage, plain, "--heads", 3): "--heads is of the first stage: leave it out",
        (*stage, "random"): "--pretrained random has no heads, which --self-label starts from",
        (*stage, plain): "backbone.pt has no heads, which --self-label starts from: give the last.pt",
        (*stage, first / "clusters.pt"): "clusters.pt has no heads",
        (*stage, first / "last.pt", "--clusters", 6): "last.pt has 5; leave the flag out",
    }
    for more, message in cases.items():
        assert message in refused(capsys, main, "scan", *words, *more), more
    assert parsed("scan", "--self-label", "--out", "here").out == "here"
    monkey = ["--out", first, *stage, first / "last.pt"]  # the folder of the first stage
    assert "--self-label was False, is True" in refused(capsys, main, "scan", *TINY.split(), *monkey)
