"""Augmentation against torchvision: every operator, whole plans, and batches in portions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import functional as TF

from common import augment as module
from common.augment import DRAWS, FACTORS, FLIP, GRAY, JITTER, ORDER, SIGMA, SOLARIZE, View, augment
from common.rng import uniforms
from tests.helpers import photo

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
NAMES = list(AMOUNTS)[:4]  # of the jitter


def batch(size, n=6):
    """n images, of which 48 differ."""
    images = torch.stack([torch.from_numpy(photo(size, size, i)).permute(2, 0, 1) for i in range(min(n, 48))])
    images[0, :, : size // 2] = torch.arange(size, dtype=torch.uint8)  # greys: no hue, no saturation
    images[1, :, :2], images[1, :, 2:4], images[2, 0] = 0, 255, images[2, 1]  # extremes, and ties between channels
    return images.repeat(-(-n // 48), 1, 1, 1)[:n]


def all_rows(*names):
    return [(name, torch.arange(6), torch.tensor(AMOUNTS[name])) for name in names]


def planned(view, u):
    return [(name, torch.from_numpy(rows), torch.from_numpy(amounts)) for name, rows, amounts in view.plan(u)]


def reference(name, x, amount):
    """torchvision's operator on one float image (3, H, W)."""
    if name == "blur":
        taps = [2 * min(11, side - 1) + 1 for side in (x.shape[2], x.shape[1])]
        return TF.gaussian_blur(x, taps, [amount, amount])
    if name in ("gray", "flip"):
        return TF.horizontal_flip(x) if name == "flip" else TF.rgb_to_grayscale(x, 3)
    return getattr(TF, f"adjust_{name}" if name in NAMES else name)(x, amount)


# -------------------------------------------------------------------------------------------------- operators
@pytest.mark.parametrize("name", module.OPERATORS)
@pytest.mark.parametrize("size", [9, 32, 61])  # the blur's radius of 11 pixels does not fit into 9
def test_operator_equals_torchvision_with_an_amount_per_sample(name, size):
    images, rows = batch(size), torch.tensor([0, 1, 2, 4, 5])
    kept, amounts = images.clone(), torch.tensor(AMOUNTS[name])[rows]
    ours = augment(images, [(name, rows, amounts)], *NEUTRAL)
    assert torch.equal(images, kept)
    expected = images.float() / 255
    for row, amount in zip(rows.tolist(), amounts.tolist(), strict=True):
        expected[row] = reference(name, expected[row], amount)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert torch.equal(ours[3], images[3] / 255)  # not among the rows
    changed = augment(images, [(name, torch.arange(6), torch.full((6,), AMOUNTS[name][3]))], *NEUTRAL)
    assert (changed - images / 255).abs().amax((1, 2, 3)).min() > 0.05  # else this would compare nothing


@pytest.mark.parametrize("shape", [(20, 7), (224, 224), (64, 96), (96, 50)])
def test_blur_equals_torchvision(shape):
    """Along both axes, in blocks of pixels or at once."""
    images, sigma = torch.stack([torch.from_numpy(photo(*shape, i)).permute(2, 0, 1) for i in range(3)]), (0.1, 1.1, 2)
    ours = augment(images, [("blur", torch.arange(3), torch.tensor(sigma))], *NEUTRAL)
    expected = torch.stack([reference("blur", x.double() / 255, s) for x, s in zip(images, sigma, strict=True)])
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)


def test_operations_apply_in_their_order():
    images, half = batch(16), torch.full((6,), 0.5)
    steps = [(name, torch.arange(6), half) for name in ("solarize", "brightness")]
    there, back, x = augment(images, steps, *NEUTRAL), augment(images, steps[::-1], *NEUTRAL), images / 255
    torch.testing.assert_close(there, TF.adjust_brightness(TF.solarize(x, 0.5), 0.5), atol=1e-6, rtol=0)
    torch.testing.assert_close(back, TF.solarize(TF.adjust_brightness(x, 0.5), 0.5), atol=1e-6, rtol=0)
    assert not torch.equal(there, back)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 0.02)])
def test_normalisation(dtype, tolerance):
    images, mean, std = batch(16), (0.1, 0.5, 0.8), (0.2, 0.3, 0.05)
    ours = augment(images, [], mean, std, dtype)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    expected = TF.normalize(images / 255, list(mean), list(std))
    torch.testing.assert_close(ours.float(), expected, atol=tolerance, rtol=tolerance)
    floats = torch.rand(3, 1, 24, 24) * 255  # which no conversion copies
    kept = floats.clone()
    torch.testing.assert_close(augment(floats, [], (0.0,), (1.0,)), kept / 255)
    assert torch.equal(floats, kept)


def test_autocast_does_not_reach_the_pixels():
    images, steps = batch(16), all_rows("blur", "hue")
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment(images, steps, *NEUTRAL)
    assert torch.equal(inside, augment(images, steps, *NEUTRAL))


# ------------------------------------------------------------------------------------------------------ plans
ALL = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8, "gray_p": 0.3, "blur_p": 0.5, "solarize_p": 0.3}
RECIPES = {  # view, number of images, and of portions in which a CPU works through them
    "all": (View(32, **ALL), 48, 1),
    "gray first": (View(32, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.9, gray_p=0.5, gray_first=True, flip=0.0), 48, 1),
    "no hue": (View(32, jitter=(0.4, 0, 0.4, 0), jitter_p=0.7, flip=1.0, blur_p=1.0, blur_sigma=(1.0, 1.0)), 48, 1),
    "strong": (View(32, jitter=(1.6, 1.2, 2.0, 0.5), jitter_p=1.0), 48, 1),
    "large images": (View(160, **ALL), 8, 8),
    "many images": (View(32, **ALL), 700, 2),
}


def operations(view, u):
    """What happens to one sample, straight from its uniforms: a list of (name, amount)."""
    todo = [("flip", 0.0)] if u[FLIP] < view.flip else []
    gray = [("gray", 0.0)] if u[GRAY] < view.gray_p else []
    jitter = []
    if u[JITTER] < view.jitter_p:
        for k in sorted(range(4), key=lambda k: u[ORDER + k]):
            s, where = view.jitter[k], u[FACTORS + k]
            low, high = (-s, s) if k == 3 else (max(0, 1 - s), 1 + s)
            if s > 0:
                jitter.append((NAMES[k], low + where * (high - low)))
    todo += gray + jitter if view.gray_first else jitter + gray
    if u[module.BLUR] < view.blur_p:
        low, high = view.blur_sigma
        todo.append(("blur", low + u[SIGMA] * (high - low)))
    return todo + ([("solarize", 0.5)] if u[SOLARIZE] < view.solarize_p else [])


@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_plan_equals_torchvision_sample_by_sample(recipe):
    view, n, portions = RECIPES[recipe]
    images, u, seen = batch(view.size, n), uniforms(5, 2, range(n), 0, DRAWS), set()
    plan = planned(view, u)
    assert len(module._portions(images, plan)) == portions
    ours = augment(images, plan, view.mean, view.std)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (view.mean, view.std))
    for i in range(n) if n < 99 else [*range(8), *range(n - 60, n)]:  # on both sides of the border of portions
        x, todo = images[i] / 255, operations(view, u[i])
        for name, amount in todo:
            x = reference(name, x, amount)
        seen |= {tuple(name for name, _ in todo)}
        torch.testing.assert_close(
            ours[i] * std + mean, x, atol=1e-5, rtol=0, msg=lambda m, i=i, todo=todo: f"{i} {todo}: {m}"
        )
    assert len(seen) > 2  # different samples, different operations


def test_plan_keeps_probabilities_ranges_and_uniform_orders():
    n, count, amounts = 24_000, {}, {}
    sequence = [""] * n
    for name, rows, values in View(32, **ALL).plan(uniforms(0, 0, range(n), 1, DRAWS)):
        assert rows.dtype == np.int64 and values.dtype == np.float32 and len(rows) == len(values) == len(set(rows))
        count[name] = count.get(name, 0) + len(rows)
        amounts.setdefault(name, []).append(values)
        for row in rows if name in NAMES else ():
            sequence[row] += name[0]
    expected = {"flip": 0.5, "gray": 0.3, "blur": 0.5, "solarize": 0.3} | dict.fromkeys(NAMES, 0.8)
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
    u = uniforms(0, 0, range(500), 0, DRAWS)
    assert View(32, flip=0.0).plan(u) == []
    names = [(name, len(rows)) for name, rows, _ in View(32, flip=1.0, gray_p=1.0, solarize_p=1.0).plan(u)]
    assert names == [("flip", 500), ("gray", 500), ("solarize", 500)]


# -------------------------------------------------------------------------------------------------- portions
@pytest.mark.parametrize("size, n", [(8, 48), (15, 48), (32, 48), (75, 48), (160, 4), (32, 700)])
def test_a_sample_is_the_same_in_any_batch(size, n):
    """Bit for bit: two processes with half the batch each see what one process sees, and train to the same weights."""
    view, images, everything = View(size, **ALL, lighting=0.1), batch(size, n), np.arange(n)

    def views(rows):
        return augment(images[rows], planned(view, uniforms(0, 0, rows, 0, DRAWS)), view.mean, view.std)

    whole = views(everything)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    for parts in (np.split(everything, 2), np.split(everything, [1, 3, 29]), np.split(everything[:48], min(n, 48))):
        assert torch.equal(torch.cat([views(part) for part in parts if len(part)]), whole[: sum(map(len, parts))])


def test_threads_change_no_bit():
    """Portions are shared out to threads that work alone, so a sum over an image is taken in one order."""
    view, images, found = View(160, **ALL), batch(160, 7), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(augment(images, planned(view, uniforms(2, 0, range(7), 0, DRAWS)), view.mean, view.std))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("size", [24, 224])
def test_blur_kernels_hold_no_subnormal_numbers(size):
    """Some processors multiply these a hundred times more slowly. What is cut off is less than 1e-12 of a kernel."""
    sigma = torch.linspace(0.1, 2, 20)
    *_, kernels = module._band(sigma, size)
    assert (kernels[kernels > 0] > 1e-13).all() and (kernels[0] == 0).any()
    taps = torch.arange(-11, 12, dtype=torch.float64)
    exact = torch.exp(-0.5 * (taps / sigma[:, None].double()).square())
    torch.testing.assert_close(kernels[:, 0, :23].double(), exact / exact.sum(1, keepdim=True), atol=1e-7, rtol=0)
