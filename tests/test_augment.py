"""Augmentation against torchvision and PIL: every operator, whole plans, crops, and the numbers they are drawn from."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms as v1
from torchvision.transforms.v2 import functional as TF

from common import augment
from common.augment import EvalView, View, center_crop, crop_box, crop_resize, plan, uniforms

NEUTRAL = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and std that leave the pixels alone
AMOUNTS = {  # one amount per image of a batch of 6, the ends of every range included
    "brightness": [0.2, 1.0, 1.8, 0.0, 0.73, 1.4],
    "contrast": [0.2, 1.0, 1.8, 0.0, 0.73, 1.4],
    "saturation": [0.2, 1.0, 1.8, 0.0, 0.73, 1.4],
    "hue": [-0.5, 0.5, 0.0, 0.1, -0.2, 0.37],
    "gray": [0.0] * 6,
    "flip": [0.0] * 6,
    "solarize": [0.5, 0.0, 1.0, 0.25, 0.5, 0.75],
    "blur": [0.1, 2.0, 0.5, 1.3, 1.0, 0.31],
}


def photo(height, width, seed=0, grain=25):
    """Smooth colours, some hard edges and grain, as uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.BICUBIC)).astype(np.float64)
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return (image + grain * rng.standard_normal(image.shape)).clip(0, 255).astype(np.uint8)


def chw(array):
    """As the decoder returns it: (3, H, W) with the strides of (H, W, 3)."""
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def batch(size, n=6, seed=0):
    images = torch.stack([chw(photo(size, size, seed + i)) for i in range(n)])
    images[0, :, : size // 2] = torch.arange(size, dtype=torch.uint8)  # greys: no hue, no saturation
    images[1, :, :2], images[1, :, 2:4], images[2, 0] = 0, 255, images[2, 1]  # extremes, and ties between channels
    return images


def reference(name, x, amount):
    """torchvision's operator on one float image (3, H, W)."""
    if name == "blur":
        taps = [2 * min(11, side - 1) + 1 for side in (x.shape[2], x.shape[1])]
        return TF.gaussian_blur(x, taps, [amount, amount])
    return {
        "brightness": TF.adjust_brightness,
        "contrast": TF.adjust_contrast,
        "saturation": TF.adjust_saturation,
        "hue": TF.adjust_hue,
        "solarize": TF.solarize,
        "gray": lambda x, _: TF.rgb_to_grayscale(x, 3),
        "flip": lambda x, _: TF.horizontal_flip(x),
    }[name](x, amount)


# -------------------------------------------------------------------------------------------------- operators
@pytest.mark.parametrize("name", augment.OPERATORS)
@pytest.mark.parametrize("size", [9, 32, 61])  # the blur's radius of 11 pixels does not fit into 9
def test_operator_equals_torchvision_with_an_amount_per_sample(name, size):
    images, rows = batch(size), torch.tensor([0, 1, 2, 4, 5])
    kept = images.clone()
    amounts = torch.tensor(AMOUNTS[name])[rows]
    ours = augment.augment(images, [(name, rows, amounts)], *NEUTRAL)
    assert torch.equal(images, kept)
    expected = images.float() / 255
    for row, amount in zip(rows.tolist(), amounts.tolist(), strict=True):
        expected[row] = reference(name, expected[row], amount)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert torch.equal(ours[3], images[3] / 255)  # not among the rows


def test_every_operator_changes_the_images():
    """Else the comparison above would compare nothing."""
    images = batch(32)
    for name, amounts in AMOUNTS.items():
        amount = torch.full((6,), amounts[3])
        ours = augment.augment(images, [(name, torch.arange(6), amount)], *NEUTRAL)
        assert (ours - images / 255).abs().amax((1, 2, 3)).min() > 0.05, name


def test_rectangular_images_are_blurred_along_both_axes():
    images = torch.stack([chw(photo(20, 7, i)) for i in range(3)])
    sigma = torch.tensor([0.4, 1.9, 1.0])
    ours = augment.augment(images, [("blur", torch.arange(3), sigma)], *NEUTRAL)
    expected = [reference("blur", x / 255, s) for x, s in zip(images, sigma.tolist(), strict=True)]
    torch.testing.assert_close(ours, torch.stack(expected), atol=1e-5, rtol=0)


def test_steps_apply_in_their_order():
    images, rows = batch(16), torch.arange(6)
    steps = [("solarize", rows, torch.full((6,), 0.5)), ("brightness", rows, torch.full((6,), 0.5))]
    there = augment.augment(images, steps, *NEUTRAL)
    back = augment.augment(images, steps[::-1], *NEUTRAL)
    x = images / 255
    torch.testing.assert_close(there, TF.adjust_brightness(TF.solarize(x, 0.5), 0.5), atol=1e-6, rtol=0)
    torch.testing.assert_close(back, TF.solarize(TF.adjust_brightness(x, 0.5), 0.5), atol=1e-6, rtol=0)
    assert not torch.equal(there, back)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 0.02)])
def test_normalisation(dtype, tolerance):
    images = batch(16)
    mean, std = (0.1, 0.5, 0.8), (0.2, 0.3, 0.05)
    ours = augment.augment(images, [], mean, std, dtype)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    expected = TF.normalize(images / 255, list(mean), list(std))
    torch.testing.assert_close(ours.float(), expected, atol=tolerance, rtol=tolerance)


def test_autocast_does_not_reach_the_pixels():
    images, rows = batch(16), torch.arange(6)
    steps = [("blur", rows, torch.tensor(AMOUNTS["blur"])), ("hue", rows, torch.tensor(AMOUNTS["hue"]))]
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment.augment(images, steps, *NEUTRAL)
    assert torch.equal(inside, augment.augment(images, steps, *NEUTRAL))


# ------------------------------------------------------------------------------------------------------ plans
RECIPES = {
    "all": View(
        32, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.3, blur_p=0.5, blur_sigma=(0.1, 2.0), solarize_p=0.3
    ),
    "gray first": View(32, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.9, gray_p=0.5, gray_first=True, flip=0.0),
    "no hue": View(32, jitter=(0.4, 0.0, 0.4, 0.0), jitter_p=0.7, flip=1.0, blur_p=1.0, blur_sigma=(1.0, 1.0)),
    "strong": View(32, jitter=(1.6, 1.2, 2.0, 0.5), jitter_p=1.0),
}


def operations(view, u):
    """What happens to one sample, straight from its uniforms: a list of (name, amount)."""
    todo = [("flip", 0.0)] if u[augment.FLIP] < view.flip else []
    gray = [("gray", 0.0)] if u[augment.GRAY] < view.gray_p else []
    jitter = []
    if u[augment.JITTER] < view.jitter_p:
        names = ["brightness", "contrast", "saturation", "hue"]
        for k in sorted(range(4), key=lambda k: u[augment.ORDER + k]):
            s, where = view.jitter[k], u[augment.FACTORS + k]
            low, high = (-s, s) if k == 3 else (max(0, 1 - s), 1 + s)
            if s > 0:
                jitter.append((names[k], low + where * (high - low)))
    todo += gray + jitter if view.gray_first else jitter + gray
    if u[augment.BLUR] < view.blur_p:
        low, high = view.blur_sigma
        todo.append(("blur", low + u[augment.SIGMA] * (high - low)))
    return todo + ([("solarize", 0.5)] if u[augment.SOLARIZE] < view.solarize_p else [])


@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_plan_equals_torchvision_sample_by_sample(recipe):
    view, n = RECIPES[recipe], 48
    images = batch(32, n)
    u = uniforms(5, 2, range(n), 0, augment.DRAWS)
    steps = [(name, torch.from_numpy(rows), torch.from_numpy(amounts)) for name, rows, amounts in plan(view, u)]
    ours = augment.augment(images, steps, view.mean, view.std)
    seen = set()
    for i in range(n):
        x, todo = images[i] / 255, operations(view, u[i])
        for name, amount in todo:
            x = reference(name, x, amount)
        seen |= {tuple(name for name, _ in todo)}
        x = TF.normalize(x, list(view.mean), list(view.std)) * torch.tensor(view.std).view(3, 1, 1)
        mine = ours[i] * torch.tensor(view.std).view(3, 1, 1)
        torch.testing.assert_close(mine, x, atol=1e-5, rtol=0, msg=lambda m, i=i, todo=todo: f"{i} {todo}: {m}")
    assert len(seen) > 2  # different samples, different operations


def test_plan_keeps_probabilities_ranges_and_uniform_orders():
    view, n = RECIPES["all"], 24_000
    steps = plan(view, uniforms(0, 0, range(n), 1, augment.DRAWS))
    count, amounts, sequence = {}, {}, [""] * n
    for name, rows, values in steps:
        assert rows.dtype == np.int64 and values.dtype == np.float32 and len(rows) == len(values) == len(set(rows))
        count[name] = count.get(name, 0) + len(rows)
        amounts.setdefault(name, []).append(values)
        if name in ("brightness", "contrast", "saturation", "hue"):
            for row in rows:
                sequence[row] += name[0]
    expected = {"flip": 0.5, "gray": 0.3, "blur": 0.5, "solarize": 0.3}
    expected |= dict.fromkeys(["brightness", "contrast", "saturation", "hue"], 0.8)
    for name, p in expected.items():
        assert abs(count[name] - n * p) < 4 * math.sqrt(n * p * (1 - p)), name
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in (ranges | {"blur": (0.1, 2.0)}).items():
        scaled = (np.concatenate(amounts[name]) - low) / (high - low)
        assert scaled.min() > -1e-6 and scaled.max() < 1 + 1e-6
        assert stats.kstest(scaled, "uniform").pvalue > 1e-3, name
    orders = [s for s in sequence if s]
    assert {len(s) for s in orders} == {4}
    _, counts = np.unique(orders, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


def test_operations_of_probability_zero_and_one():
    u = uniforms(0, 0, range(500), 0, augment.DRAWS)
    assert plan(View(32, flip=0.0), u) == []
    names = [(name, len(rows)) for name, rows, _ in plan(View(32, flip=1.0, gray_p=1.0, solarize_p=1.0), u)]
    assert names == [("flip", 500), ("gray", 500), ("solarize", 500)]


# ------------------------------------------------------------------------------------------------------ crops
FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


def pil_crop(array, box, size, interpolation):
    top, left, height, width = box
    image = Image.fromarray(array).crop((left, top, left + width, top + height))
    return np.asarray(image.resize((size, size), FILTERS[interpolation])).astype(int)


def difference(ours, expected):
    return np.abs(ours.permute(1, 2, 0).numpy().astype(int) - expected)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("layout", ["channels last", "contiguous", "grey"])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_crop_equals_pil_within_one_level(size, layout, interpolation):
    view, apart, total = View(size, crop=(0.05, 1.0)), 0, 0
    smaller = larger = False
    for i, shape in enumerate([(375, 500), (500, 333), (120, 90), (40, 31), (225, 225)]):
        array = photo(*shape, seed=i)
        image = chw(array)
        if layout == "contiguous":
            image = image.contiguous()
        if layout == "grey":
            image = image[:1].expand(3, -1, -1)
            array = array[:, :, :1].repeat(3, axis=2)
        for u in uniforms(0, 0, [3 * i, 3 * i + 1], 0, augment.DRAWS).tolist():
            box = crop_box(u, *shape, view)
            ours = crop_resize(image, box, size, interpolation)
            assert ours.dtype == torch.uint8 and ours.shape == (3, size, size)
            off = difference(ours, pil_crop(array, box, size, interpolation))
            # bicubic overshoots at edges: where both passes are cut off at 0 or 255, some pixels differ by more
            assert off.max() <= (1 if interpolation == "bilinear" else 8)
            apart, total = apart + (off > 1).sum(), total + off.size
            smaller, larger = smaller or box[2] > size, larger or box[2] < size
    assert apart / total < 1e-3
    assert (smaller or size == 224) and (larger or size == 32)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (2, 300)])
def test_crop_of_tiny_images(shape, interpolation):
    array = photo(*shape)
    ours = crop_resize(chw(array), (0, 0, *shape), 16, interpolation)
    assert difference(ours, pil_crop(array, (0, 0, *shape), 16, interpolation)).max() <= 1


def test_crop_of_the_right_size_is_the_image_itself():
    array = photo(40, 50)
    ours = crop_resize(chw(array), (3, 11, 24, 24), 24)
    assert np.array_equal(ours.permute(1, 2, 0), array[3:27, 11:35])


@pytest.mark.parametrize("view", [EvalView(224), EvalView(32), EvalView(48, resize=80, interpolation="bicubic")])
@pytest.mark.parametrize("shape", [(375, 503), (503, 375), (98, 49), (49, 147), (30, 300), (32, 32), (35, 55)])
def test_center_crop_equals_torchvision(view, shape):
    array = photo(*shape)
    resize = {224: 256, 32: 32, 48: 80}[view.size]
    mode = v1.InterpolationMode(view.interpolation)
    transform = v1.Compose([v1.Resize(resize, interpolation=mode), v1.CenterCrop(view.size)])
    ours = center_crop(chw(array), view)
    off = difference(ours, np.asarray(transform(Image.fromarray(array))).astype(int))
    assert off.max() <= 1


@pytest.mark.parametrize("size", [8, 15, 32, 75])
def test_a_sample_is_the_same_in_any_batch(size):
    """Bit for bit: two processes with half the batch each see what one process sees, and train to the same weights."""
    view = View(size, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.3, blur_p=0.5, solarize_p=0.3, lighting=0.1)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (48, 3, size, size), dtype=np.uint8))

    def views(rows):
        u = uniforms(0, 0, rows, 0, augment.DRAWS)
        steps = [(name, torch.from_numpy(r), torch.from_numpy(a)) for name, r, a in augment.plan(view, u)]
        return augment.augment(images[rows], steps, view.mean, view.std)

    rows = np.arange(48)
    whole = views(rows)
    for parts in (np.split(rows, 2), np.split(rows, [1, 6, 29]), np.split(rows, 48)):
        assert torch.equal(torch.cat([views(part) for part in parts]), whole)


# -------------------------------------------------------------------------------------------------- crop boxes
BOX_VIEWS = [View(224), View(96, crop=(0.05, 0.14)), View(224, crop=(0.2, 1.0), ratio=(0.5, 2.0))]


@pytest.mark.parametrize("view", BOX_VIEWS)
def test_boxes_have_the_area_and_shape_asked_for(view):
    for u in uniforms(1, 0, range(2000), 0, augment.DRAWS).tolist():
        top, left, height, width = crop_box(u, 375, 500, view)
        assert 0 <= top <= top + height <= 375 and 0 <= left <= left + width <= 500
        slack = 0.5 * (height + width) + 0.25  # both sides are rounded to whole pixels
        assert view.crop[0] * 375 * 500 - slack <= height * width <= view.crop[1] * 375 * 500 + slack
        assert view.ratio[0] <= (width + 0.5) / (height - 0.5) and (width - 0.5) / (height + 0.5) <= view.ratio[1]


@pytest.mark.parametrize("view", BOX_VIEWS)
@pytest.mark.parametrize("shape", [(375, 500), (200, 640)])
def test_boxes_are_distributed_as_torchvision_draws_them(shape, view):
    n = 1500
    torch.manual_seed(0)
    image = torch.empty(1, *shape)
    theirs = [v1.RandomResizedCrop.get_params(image, list(view.crop), list(view.ratio)) for _ in range(n)]
    ours = [crop_box(u, *shape, view) for u in uniforms(0, 0, range(n), 0, augment.DRAWS).tolist()]
    theirs, ours = np.array(theirs, dtype=float), np.array(ours, dtype=float)
    for value in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] + box[:, 2] / 2,
        lambda box: box[:, 1] + box[:, 3] / 2,
    ):
        assert stats.ks_2samp(value(ours), value(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10), (3, 7), (300, 301), (1, 50), (2, 1), (1, 1)])
def test_fallback_box_is_torchvisions_central_crop(shape):
    """Nothing of at least twice the image's area fits, so that the fallback decides alone."""
    view = View(224, crop=(2.0, 3.0))
    theirs = v1.RandomResizedCrop.get_params(torch.empty(1, *shape), list(view.crop), list(view.ratio))
    ours = crop_box(uniforms(0, 0, [0], 0, augment.DRAWS)[0].tolist(), *shape, view)
    top, left, height, width = theirs
    assert ours == (top, left, max(1, height), max(1, width))  # theirs is empty where a side rounds to zero


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 5000), (5000, 1), (3, 2000), (2, 2)])
@pytest.mark.parametrize("view", [View(16), View(16, crop=(0.2, 1.0)), View(16, crop=(0.05, 0.14))])
def test_boxes_fit_into_odd_images(shape, view):
    for u in uniforms(3, 1, range(100), 2, augment.DRAWS).tolist():
        top, left, height, width = crop_box(u, *shape, view)
        assert height >= 1 and width >= 1
        assert 0 <= top <= shape[0] - height and 0 <= left <= shape[1] - width


def test_every_position_of_a_small_box_is_reached_equally_often():
    view = View(4, crop=(0.25, 0.25), ratio=(1.0, 1.0))
    boxes = [crop_box(u, 8, 8, view) for u in uniforms(0, 0, range(5000), 0, augment.DRAWS).tolist()]
    assert {box[2:] for box in boxes} == {(4, 4)}
    _, counts = np.unique([5 * top + left for top, left, *_ in boxes], return_counts=True)
    assert len(counts) == 25 and stats.chisquare(counts).pvalue > 1e-3


# ---------------------------------------------------------------------------------------------------- uniforms
def test_uniforms_are_a_pure_function_of_their_arguments():
    whole = uniforms(3, 7, [4, 9, 2, 9], 1, 40)
    assert whole.shape == (4, 40) and whole.dtype == np.float64
    assert np.array_equal(whole[1], whole[3])
    assert np.array_equal(uniforms(3, 7, np.array([2]), 1, 40)[0], whole[2])
    assert np.array_equal(uniforms(3, 7, [4, 9, 2, 9], 1, 5), whole[:, :5])  # asking for more changes none
    for other in ((4, 7, 1), (3, 8, 1), (3, 7, 2), (7, 3, 1)):
        seed, epoch, stream = other
        assert not np.isin(uniforms(seed, epoch, [4, 9, 2], stream, 40), whole).any()
    assert uniforms(0, 0, [], 0, 3).shape == (0, 3)


GOLDEN = (0.7383342515493277, 0.8298562645235117, 0.2410831801458766)


def test_uniforms_never_change():
    """Resumed runs, and comparisons between versions, rely on these numbers."""
    assert uniforms(0, 0, [0], 0, 1)[0, 0] == GOLDEN[0]
    assert uniforms(1, 2, [3], 4, 6)[0, 5] == GOLDEN[1]
    assert uniforms(2**40 + 1, 999, [1_281_166], 101, 36)[0, 35] == GOLDEN[2]


def test_uniforms_fill_the_unit_interval():
    u = uniforms(0, 0, range(20_000), 0, 8)
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == u.size
    assert abs(u.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / u.size)
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / u.size)
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3


NEIGHBOURS = {
    "index": (lambda n: uniforms(0, 0, range(n), 0, 1), lambda n: uniforms(0, 0, range(1, n + 1), 0, 1)),
    "index far": (lambda n: uniforms(0, 0, range(n), 0, 1), lambda n: uniforms(0, 0, np.arange(n) + 2**32, 0, 1)),
    "epoch": (lambda n: uniforms(0, 0, range(n), 0, 1), lambda n: uniforms(0, 1, range(n), 0, 1)),
    "stream": (lambda n: uniforms(0, 0, range(n), 0, 1), lambda n: uniforms(0, 0, range(n), 1, 1)),
    "seed": (lambda n: uniforms(0, 0, range(n), 0, 1), lambda n: uniforms(1, 0, range(n), 0, 1)),
    "epoch and index": (lambda n: uniforms(0, 1, range(n), 0, 1), lambda n: uniforms(0, 0, range(1, n + 1), 0, 1)),
    "column": (lambda n: uniforms(0, 0, range(n), 0, 2)[:, :1], lambda n: uniforms(0, 0, range(n), 0, 2)[:, 1:]),
    "row, column": (lambda n: uniforms(0, 0, range(n), 0, 2)[:, 1:], lambda n: uniforms(0, 0, range(1, n + 1), 0, 1)),
}


@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_neighbouring_uniforms_are_independent(pair):
    n = 40_000
    a, b = (draw(n)[:, 0] for draw in NEIGHBOURS[pair])
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(n)
    cells, _, _ = np.histogram2d(a, b, bins=16, range=[[0, 1], [0, 1]])
    assert 1e-3 < stats.chisquare(cells.ravel()).pvalue < 1 - 1e-3
    low_a, low_b = ((x * 2**53).astype(np.int64) % 16 for x in (a, b))  # the lowest bits are as good as the highest
    cells = np.bincount(16 * low_a + low_b, minlength=256)
    assert 1e-3 < stats.chisquare(cells).pvalue < 1 - 1e-3


def test_uniforms_of_consecutive_epochs_and_seeds_are_independent():
    """One sample over 1,500 epochs, streams and seeds, as a chain."""
    for chain in (
        np.concatenate([uniforms(0, e, [17], 0, 1)[0] for e in range(1500)]),
        np.concatenate([uniforms(0, 0, [17], s, 1)[0] for s in range(1500)]),
        np.concatenate([uniforms(s, 0, [17], 0, 1)[0] for s in range(1500)]),
    ):
        assert abs(np.corrcoef(chain[:-1], chain[1:])[0, 1]) < 4 / math.sqrt(1500)
        assert stats.kstest(chain, "uniform").pvalue > 1e-3
