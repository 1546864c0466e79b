"""Relative location: the square, the grid and its patches, nine passes for eight pairs, the loss, and its picture."""

import inspect
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import odc
import relative_loc
from common import rng
from common.augment import DRAWS, LEFT, TOP
from common.resnet import resnet
from relative_loc import RelativeLoc, Square, augmentation, cut, places, position_loss
from results import geometry
from tests.helpers import EXACT, SMALL, main, parsed, photo, records, refused, rows, train

BELOW_ONE = 1 - 2.0**-53
OTHERS = [0, 1, 2, 3, 5, 6, 7, 8]


def small_model(hidden_dim=12):
    torch.manual_seed(0)
    return RelativeLoc(resnet(*SMALL), hidden_dim).double()


# --------------------------------------------------------------------------------------------------- geometry
@pytest.mark.parametrize("size, patch, jitter", [(255, 64, 21), (96, 24, 8), (32, 8, 2), (28, 7, 2), (9, 2, 1)])
def test_default_geometry(size, patch, jitter):
    assert parsed("relative_loc", "--image-size", size).patch_size == patch
    first, last = (places(torch.full((1, 18), u, dtype=torch.float64), size, patch) for u in (0.0, BELOW_ONE))
    cell = size // 3
    assert [first[0].tolist(), first[1].tolist()] == [
        [[0] * 3 + [cell] * 3 + [2 * cell] * 3],
        [[0, cell, 2 * cell] * 3],
    ]
    assert all((b - a == jitter).all() for a, b in zip(first, last, strict=True))
    assert max(last[0].max(), last[1].max()) + patch == 3 * cell <= size


@pytest.mark.parametrize(
    "data, size, resize", [("/photos", 255, 292), ("cifar10", 28, 32), ("stl10", 84, 96), ("digits", 28, 32)]
)
def test_image_size_without_a_flag(data, size, resize):
    """Images of a small named set are not resized, unless they are tiny."""
    args = parsed("relative_loc", "--data", data)
    assert (args.image_size, args.resize) == (size, resize)
    if data != "digits":
        assert Square(size, resize=resize).box(numbers(0.9, 0.2), resize, resize)[2:] == (size, size)


def test_grid_of_the_paper():
    """Patches of 96 pixels, 48 apart, each moved by up to 7 either way."""
    top, left = places(torch.full((1, 18), 0.5, dtype=torch.float64), 432, 96, 34)
    assert sorted(set(top[0].tolist())) == sorted(set(left[0].tolist())) == [24, 168, 312]  # 144 = 96 + 48
    u = torch.from_numpy(np.random.default_rng(0).random((4000, 18)))
    top, left = (x - x.new_tensor([24, 168, 312])[i] for x, i in zip(places(u, 432, 96, 34), index(), strict=True))
    assert top.min() == left.min() == -7 and top.max() == left.max() == 7
    counts = np.bincount((top.flatten() + 7).numpy())
    assert len(counts) == 15 and abs(counts / counts.mean() - 1).max() < 0.1  # all equally likely


def index():
    """Row and column of each cell."""
    return torch.arange(9) // 3, torch.arange(9) % 3


@pytest.mark.parametrize(
    "size, patch, gap", [(255, 64, 0), (255, 50, 7), (96, 24, 0), (32, 7, 2), (33, 7, 3), (32, 8, 1)]
)
def test_patches_keep_their_distance(size, patch, gap):
    """Of neighbours in a row or column: at least gap, at most gap + 2 jitter, both reached; all within the image."""
    u = torch.from_numpy(np.random.default_rng(1).random((20000, 18)))
    for start, axis in zip(places(u, size, patch, gap), (1, 2), strict=True):
        apart = start.unflatten(1, (3, 3)).diff(dim=axis) - patch
        assert (apart.min(), apart.max()) == (gap, gap + 2 * (size // 3 - patch - gap))
        assert start.min() >= 0 and start.max() + patch <= size


def test_each_coordinate_has_its_own_number():
    """One uniform at a time: for each cell first down, then across; nothing else moves."""
    start = torch.stack(places(torch.zeros(1, 18).double(), 96, 24))
    for k in range(18):
        u = torch.zeros(1, 18).double()
        u[0, k] = 0.5
        moved = torch.stack(places(u, 96, 24)) - start
        assert moved[k % 2, 0, k // 2] == 4 and moved.abs().sum() == 4


def test_patches_hold_the_pixels_of_their_places():
    """Each pixel tells its image, row and column."""
    rows_, columns = torch.arange(32.0)[:, None].expand(32, 32), torch.arange(32.0).expand(32, 32)
    x = torch.stack([torch.stack([torch.full((32, 32), float(b)), rows_, columns]) for b in range(3)])
    top, left = places(torch.from_numpy(np.random.default_rng(2).random((3, 18))), 32, 8)
    patches = cut(x.contiguous(memory_format=torch.channels_last), top, left, 8)
    assert patches.shape == (27, 3, 8, 8) and patches.is_contiguous(memory_format=torch.channels_last)
    for i, patch in enumerate(patches):
        b, k = divmod(i, 9)
        r, c = int(top[b, k]), int(left[b, k])
        assert r // 10 == k // 3 and c // 10 == k % 3  # row by row, in cells of 10
        assert torch.equal(patch, x[b, :, r : r + 8, c : c + 8])


# ------------------------------------------------------------------------------------------------------- view
def numbers(top, left):
    u = np.zeros(DRAWS)
    u[TOP], u[LEFT] = top, left
    return u


@pytest.mark.parametrize(
    "shape, top, left, box",
    [
        ((375, 500), 0.0, 0.0, (0, 0, 327, 327)),  # 375 x 255 / 292 = 327.5
        ((375, 500), BELOW_ONE, BELOW_ONE, (48, 173, 327, 327)),
        ((500, 375), 0.5, 0.5, (87, 24, 327, 327)),
        ((292, 292), 0.25, 0.75, (9, 28, 255, 255)),
        ((3, 2), 0.9, 0.9, (1, 0, 2, 2)),
    ],
)
def test_square(shape, top, left, box):
    assert Square(255, resize=292).box(numbers(top, left), *shape) == box


def test_square_equals_resizing_first():
    """The usual order, shorter side to 292 and then a square of 255, where both cut at the same places: away from the
    border, whose pixels see a little less, within one grey level."""
    image = photo(584, 700, grain=10)
    crop = Square(255, resize=292).crop(torch.from_numpy(image).permute(2, 0, 1), numbers(20.5 / 75, 40.5 / 191))
    resized = Image.fromarray(image).resize((350, 292), Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[10:265, 20:275].astype(int)
    assert abs(crop.permute(1, 2, 0).numpy() - expected)[2:-2, 2:-2].max() <= 1


def test_square_is_grey_as_a_whole_never_mirrored_and_otherwise_as_it_was():
    (view,) = augmentation(255, 292)
    u = rng.uniforms(0, 0, np.arange(20000), 0, DRAWS)
    ((name, gray, _),) = view.plan(u)
    assert name == "gray" and len(gray) / len(u) == pytest.approx(0.66, abs=0.01) and not view.mirrored(u).any()
    (view,) = augmentation(255, 292, gray=0.0)
    assert view.plan(u) == []
    assert augmentation(255, 292)[0].without_colours().plan(u) == []


def test_squares_in_batch_equal_single_ones():
    view = Square(32, resize=37)
    images = torch.stack([torch.from_numpy(photo(40, 50, i)) for i in range(5)])
    u = rng.uniforms(0, 0, np.arange(5), 0, DRAWS)
    single = [view.crop(image.permute(2, 0, 1), row) for image, row in zip(images, u, strict=True)]
    assert torch.equal(view.crop_batch(images, u), torch.stack(single).permute(0, 2, 3, 1))


@pytest.mark.parametrize("accum", [1, 2])
def test_places_come_from_the_stream_of_the_sample(accum, tmp_path, monkeypatch):
    """Nine patches of each image reach the network, in colour or in grey as a whole, another time elsewhere."""
    seen, real = [], relative_loc.places

    def recorded(u, size, patch, gap):
        assert (size, patch, gap) == (32, 8, 0)
        seen.append(u)
        return real(u, size, patch, gap)

    monkeypatch.setattr(relative_loc, "places", recorded)
    train("relative_loc", tmp_path, "--max-steps", 8, "--accum", accum)
    for epoch in (0, 1):
        order = rng.permutation(3, epoch, 64)
        found = torch.cat(seen[4 * accum * epoch : 4 * accum * (epoch + 1)])
        assert torch.equal(found, torch.from_numpy(rng.uniforms(3, epoch, order, rng.SCRIPT, 18)))


# ------------------------------------------------------------------------------------------------------ model
def test_nine_passes_give_what_eight_pairs_give():
    """With fixed statistics: each other patch beside the middle one, one pair at a time, as the paper has it."""
    model, x = small_model().eval(), rows(18, 3, 8, 8)
    keep = (rows(2, 96, seed=1) > 0).double() / 0.5
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    f, logits = model(x, keep)
    assert f.shape == (18, model.backbone.dim) and logits.shape == (16, 8)
    for image in range(2):
        for y, k in enumerate(OTHERS):
            pair = torch.cat([model.backbone(x[9 * image + k, None]), model.backbone(x[9 * image + 4, None])], 1)
            expected = model.head(model.neck(pair) * keep[image].view(8, 12)[y])
            torch.testing.assert_close(logits[None, 8 * image + y], expected, atol=1e-12, rtol=1e-10)


def test_batch_norm_counts_the_middle_patch_once():
    model, x = small_model(), rows(18, 3, 8, 8)
    model(x, torch.ones(2, 96).double())
    conv = nn.functional.conv2d(x, model.backbone.conv1.weight, padding=1)
    torch.testing.assert_close(model.backbone.bn1.running_mean, 0.1 * conv.mean((0, 2, 3)), atol=1e-12, rtol=1e-10)
    assert model.backbone.bn1.num_batches_tracked == 1
    assert model.neck[1].momentum == 0.003 and model.neck[1].num_batches_tracked == 1


def test_network_is_that_of_mmselfsup():
    torch.manual_seed(0)
    model = RelativeLoc(resnet("resnet50", image_size=255))
    assert model.neck[0].weight.shape == (4096, 4096) and model.head.weight.shape == (8, 4096)
    assert model.neck[0].weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert model.head.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert not model.neck[0].bias.any() and not model.head.bias.any() and model.backbone.conv1.kernel_size == (7, 7)
    maps = model.backbone.eval().stages(torch.randn(1, 3, 64, 64))
    assert maps[-1].shape == (1, 2048, 2, 2)


# ------------------------------------------------------------------------------------------------------- loss
def test_loss_equals_numpy():
    logits, labels = 3 * rows(24, 8), torch.arange(24) % 8
    z = logits.numpy()
    expected = np.mean([math.log(sum(math.exp(v - z[i, i % 8]) for v in z[i])) for i in range(24)])
    assert position_loss(logits, labels).item() == pytest.approx(expected, abs=1e-10)


def test_equal_logits_give_chance():
    logits = torch.full((16, 8), -3.0).double()
    assert position_loss(logits, torch.arange(16) % 8).item() == pytest.approx(math.log(8))


def test_gradient():
    logits = rows(16, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: position_loss(z, torch.arange(16) % 8), [logits])


def test_gradient_reaches_the_middle_patch_from_all_pairs():
    model, x = small_model().eval(), rows(9, 3, 8, 8).requires_grad_()
    _, logits = model(x, torch.ones(1, 96).double())
    for y in range(8):
        (gradient,) = torch.autograd.grad(logits[y].square().sum(), x, retain_graph=True)
        assert gradient.flatten(1).abs().amax(1).gt(0).nonzero().flatten().tolist() == sorted({OTHERS[y], 4})


# ----------------------------------------------------------------------------------------------------- recipe
def test_recipe_is_that_of_mmselfsup(tmp_path):
    args = vars(parsed("relative_loc", "--data", "/imagenet"))
    expected = {"arch": "resnet50", "image_size": 255, "epochs": 70, "warmup_epochs": 5, "batch_size": 512, "lr": 0.1}
    expected |= {"weight_decay": 1e-4, "head_weight_decay": 5e-4, "momentum": 0.9, "decay": 0.1, "milestones": None}
    expected |= {"hidden_dim": 4096, "dropout": 0.5, "gray": 0.66, "patch_size": 64, "gap": 0, "resize": 292}
    assert {name: args[name] for name in expected} == expected and args["lr"] * args["batch_size"] / 256 == 0.2


def test_layers_on_top_decay_more(tmp_path):
    backbone, top = train("relative_loc", tmp_path, "--max-steps", 1)["optimizer"]["param_groups"]
    assert (backbone["weight_decay"], top["weight_decay"]) == (1e-4, 5e-4) and len(top["params"]) == 6
    assert len(backbone["params"]) == len([*resnet(*SMALL).parameters()])


def test_rates_of_a_run(tmp_path):
    """Four epochs of four steps, one of warm-up: 3/7 and 5/7 of 16 are 6.9 and 11.4."""
    train("relative_loc", tmp_path)
    expected = [0.1, 0.325, 0.55, 0.775, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01]
    found = [record["lr"] for record in records(tmp_path).values()]
    assert found == pytest.approx([0.1 * 16 / 256 * factor for factor in expected], rel=1e-12)


def test_units_are_dropped(tmp_path):
    losses = []
    for p in (0, 0.5, 0.9):
        train("relative_loc", tmp_path / str(p), *EXACT, "--max-steps", 1, "--dropout", p)
        losses.append(records(tmp_path / str(p))[1]["loss"])
    assert len(set(losses)) == 3 and losses == pytest.approx([math.log(8)] * 3, abs=0.1)


def test_logged_accuracy_is_that_of_the_classifier(tmp_path, monkeypatch):
    """A classifier that says "to the right" whatever it sees, and one that knows."""
    for name, logits in (("fixed", torch.eye(8)[[4] * 8]), ("knows", torch.eye(8))):

        def forward(self, x, keep, logits=logits):
            f = self.backbone(x)
            return f, logits.repeat(len(f) // 9, 1) + 0 * self.head.weight.sum() * self.neck[0].weight.sum()

        monkeypatch.setattr(RelativeLoc, "forward", forward)
        train("relative_loc", tmp_path / name, "--max-steps", 1)
    assert [records(tmp_path / name)[1]["accuracy"] for name in ("fixed", "knows")] == [0.125, 1.0]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--image-size 8", "leave no jitter in cells of 2 pixels, a third of --image-size 8: --image-size 9 does"),
        ("--image-size 255 --patch-size 85", "cells of 85 pixels, a third of --image-size 255: --image-size 258 does"),
        ("--image-size 255 --patch-size 300", "--patch-size 300 and --gap 0 leave no jitter"),
        ("--image-size 96 --gap 8", "--patch-size 24 and --gap 8 leave no jitter in cells of 32 pixels"),
        ("--image-size 96 --resize 95", "--resize 95 is smaller than --image-size 96: use 110"),
        ("--patch-size 0", "--patch-size: must be greater than 0"),
        ("--gap -1", "--gap: must be at least 0"),
        ("--gray 1.5", "--gray: must be at most 1"),
        ("--dropout 1", "--dropout: must be less than 1"),
        ("--milestones 9 --epochs 9", "--milestones 9 must be smaller than --epochs 9"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    assert message in refused(capsys, main, "relative_loc", "--data", "fake:64", "--out", tmp_path, *words.split())


@pytest.mark.parametrize("words", ["--image-size 8", "--image-size 255 --gap 30", "--image-size 96 --patch-size 40"])
def test_advice_about_the_grid_can_be_followed(words, capsys, tmp_path):
    line = refused(capsys, main, "relative_loc", "--data", "fake:64", "--out", tmp_path, *words.split())
    size = re.search(r": --image-size (\d+) does", line)[1]
    parsed("relative_loc", *words.split(), "--image-size", size)


def test_positions_on_other_images(tmp_path, capsys, monkeypatch):
    """What results/geometry.py says of a run whose classifier always says "to the right"."""
    train("relative_loc", tmp_path, "--max-steps", 2)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    saved["model"]["head.bias"][4] += 100
    torch.save(saved, tmp_path / "last.pt")
    monkeypatch.setattr(
        "sys.argv", ["geometry.py", str(tmp_path), "--data", "fake:30", "--draws", "2", "--workers", "0"]
    )
    geometry.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["images"], result["steps"]) == (10, 2)  # the validation images of fake:30
    assert result["positions"] == {"mean": 0.125, "error": 0.0}


# ---------------------------------------------------------------------------------------------------- picture
def test_picture_shows_the_patches_in_their_places(tmp_path):
    train("relative_loc", tmp_path, "--max-steps", 1)
    picture = np.asarray(Image.open(tmp_path / "patches.png"))
    side = (picture.shape[1] - 4) // 2 - 4  # two tiles between margins of 4 pixels, below 20 of headings
    first = rng.permutation(3, 0, 64)[:1]
    top, left = places(torch.from_numpy(rng.uniforms(3, 0, first, rng.SCRIPT, 18)), 32, 8)
    image, patches = (picture[24 : 24 + side, 4 + c * (side + 4) :][:, :side] for c in (0, 1))
    mask, zoom = np.zeros((side, side), bool), side // 32
    for r, c in zip(top[0].tolist(), left[0].tolist(), strict=True):
        mask[zoom * r : zoom * (r + 8), zoom * c : zoom * (c + 8)] = True
    assert side == 160 and mask.sum() == 9 * 64 * zoom**2
    assert np.array_equal(patches[mask], image[mask]) and image.std() > 5
    assert (patches[~mask] == (0, 102, 255)).all()  # blue, which the sky of a photograph hardly is


# ----------------------------------------------------------------------------------------------------- copies
def test_dropout_is_that_of_the_other_script():
    assert inspect.getsource(relative_loc.dropout) == inspect.getsource(odc.dropout)
