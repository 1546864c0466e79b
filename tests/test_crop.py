"""Crops against PIL and torchvision, boxes against torchvision's, and batches of crops against single ones."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms as v1

from common.augment import DRAWS, EvalView, View, WholeView
from common.crop import crop_resize, crop_resize_batch
from common.rng import uniforms
from tests.helpers import photo

FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
ODD = [(1, 1), (1, 2), (2, 1), (1, 5000), (5000, 1), (3, 2000), (2, 2)]


def chw(array):
    """As the decoder returns it: (3, H, W) with the strides of (H, W, 3)."""
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def draws(n, seed=0):
    return uniforms(seed, 0, range(n), 0, DRAWS)


# ------------------------------------------------------------------------------------------------------ pixels
def off_pil(ours, array, box, interpolation):
    """How many levels each value is from PIL's crop-then-resize."""
    top, left, height, width = box
    image = Image.fromarray(array).crop((left, top, left + width, top + height))
    expected = np.asarray(image.resize(ours.shape[:0:-1], FILTERS[interpolation])).astype(int)
    return np.abs(ours.permute(1, 2, 0).numpy() - expected)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("layout", ["channels last", "contiguous", "grey"])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_crop_equals_pil_within_one_level(size, layout, interpolation):
    view, apart, total, boxes = View(size, area=(0.05, 1.0), interpolation=interpolation), 0, 0, []
    for i, shape in enumerate([(375, 500), (500, 333), (120, 90), (40, 31), (225, 225)]):
        array = photo(*shape, seed=i)
        image = chw(array)
        if layout == "contiguous":
            image = image.contiguous()
        if layout == "grey":
            image, array = image[:1].expand(3, -1, -1), array[:, :, :1].repeat(3, axis=2)
        for u in uniforms(0, 0, [3 * i, 3 * i + 1], 0, DRAWS):
            boxes.append(view.box(u, *shape))
            ours = view.crop(image, u)
            assert ours.dtype == torch.uint8 and ours.shape == (3, size, size)
            off = off_pil(ours, array, boxes[-1], interpolation)
            # bicubic overshoots at edges: where both passes are cut off at 0 or 255, some pixels differ by more
            assert off.max() <= (1 if interpolation == "bilinear" else 8)
            apart, total = apart + (off > 1).sum(), total + off.size
    assert apart / total < 1e-3
    assert size == 224 or any(box[2] > size for box in boxes)
    assert size == 32 or any(box[2] < size for box in boxes)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (2, 300)])
def test_whole_tiny_images(shape, interpolation):
    array = photo(*shape)
    ours = WholeView(16, interpolation=interpolation).crop(chw(array), None)
    assert ours.shape == (3, 16, 16) and off_pil(ours, array, (0, 0, *shape), interpolation).max() <= 1


@pytest.mark.parametrize("interpolation", FILTERS)
def test_float_images_are_cropped_as_8_bit_ones(interpolation):
    # far enough from black and white that no overshoot is cut off between the two passes
    values = torch.from_numpy(np.random.default_rng(0).integers(90, 166, (3, 50, 60), dtype=np.uint8))
    box = (4, 7, 37, 41)
    for size in (16, 90):
        exact = crop_resize(values.float(), box, size, interpolation)
        off = (exact - crop_resize(values, box, size, interpolation)).abs()
        assert exact.dtype == torch.float32 and 0 <= exact.min() and exact.max() <= 255
        assert off.max() <= 1.1  # two roundings of half a level, the first of them amplified
    assert torch.equal(crop_resize(values, (3, 11, 24, 24), 24, interpolation), values[:, 3:27, 11:35])
    overshoot = crop_resize(values.float() * 10 - 1000, box, 90, interpolation)
    assert interpolation == "bilinear" or (overshoot.min() == 0 and overshoot.max() == 255)


@pytest.mark.parametrize("view", [EvalView(224), EvalView(32), EvalView(48, resize=80, interpolation="bicubic")])
@pytest.mark.parametrize("shape", [(375, 503), (503, 375), (98, 49), (49, 147), (30, 300), (32, 32), (35, 55)])
def test_view_of_evaluations_is_torchvisions_and_its_box_tells_where(view, shape):
    array, resize = photo(*shape), {224: 256, 32: 32, 48: 80}[view.size]
    transform = v1.Compose([v1.Resize(resize, v1.InterpolationMode(view.interpolation)), v1.CenterCrop(view.size)])
    expected = np.asarray(transform(Image.fromarray(array))).astype(int)
    assert np.abs(view.crop(chw(array)).permute(1, 2, 0).numpy() - expected).max() <= 1
    # images of which each pixel is its own row, or its own column
    ramps = torch.stack(torch.meshgrid(*(torch.arange(side).float() for side in shape), indexing="ij"))
    seen = view.crop(ramps * 255 / max(shape)) * max(shape) / 255
    top, left, height, width = view.box(None, *shape)
    centres = ((torch.arange(view.size) + 0.5) / view.size)[2:-2]  # at borders the filter is cut off
    assert (seen[0, 2:-2, 0] - (top + centres * height - 0.5)).abs().max() < 0.6
    assert (seen[1, 0, 2:-2] - (left + centres * width - 0.5)).abs().max() < 0.6


# ------------------------------------------------------------------------------------------------------- boxes
BOX_VIEWS = [View(224), View(96, area=(0.05, 0.14)), View(224, area=(0.2, 1.0), ratio=(0.5, 2.0))]


@pytest.mark.parametrize("view", BOX_VIEWS)
def test_boxes_have_the_area_and_shape_asked_for(view):
    for u in draws(2000, seed=1):
        top, left, height, width = view.box(u, 375, 500)
        assert 0 <= top <= top + height <= 375 and 0 <= left <= left + width <= 500
        slack = 0.5 * (height + width) + 0.25  # both sides are rounded to whole pixels
        assert view.area[0] * 375 * 500 - slack <= height * width <= view.area[1] * 375 * 500 + slack
        assert view.ratio[0] <= (width + 0.5) / (height - 0.5) and (width - 0.5) / (height + 0.5) <= view.ratio[1]
    for shape in ODD:
        for u in draws(100, seed=3):
            top, left, height, width = view.box(u, *shape)
            assert height >= 1 and width >= 1 and 0 <= top <= shape[0] - height and 0 <= left <= shape[1] - width


@pytest.mark.parametrize("view", BOX_VIEWS)
@pytest.mark.parametrize("shape", [(375, 500), (200, 640)])
def test_boxes_are_distributed_as_torchvision_draws_them(shape, view):
    torch.manual_seed(0)
    theirs = [v1.RandomResizedCrop.get_params(torch.empty(1, *shape), view.area, view.ratio) for _ in range(1500)]
    theirs, ours = np.array(theirs, float), np.array([view.box(u, *shape) for u in draws(1500)], float)
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
    view = View(224, area=(2.0, 3.0))
    top, left, height, width = v1.RandomResizedCrop.get_params(torch.empty(1, *shape), view.area, view.ratio)
    # theirs is empty where a side rounds to zero
    assert view.box(draws(1)[0], *shape) == (top, left, max(1, height), max(1, width))


def test_every_position_of_a_small_box_is_reached_equally_often():
    view = View(4, area=(0.25, 0.25), ratio=(1.0, 1.0))
    boxes = [view.box(u, 8, 8) for u in draws(5000)]
    assert {box[2:] for box in boxes} == {(4, 4)}
    _, counts = np.unique([5 * top + left for top, left, *_ in boxes], return_counts=True)
    assert len(counts) == 25 and stats.chisquare(counts).pvalue > 1e-3


# ----------------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("shape, size", [((32, 32), 32), ((96, 96), 96), ((8, 8), 16), ((96, 96), 9), ((20, 33), 24)])
def test_batched_crops_have_the_bits_of_single_ones(shape, size, interpolation):
    rng = np.random.default_rng(size)
    images = torch.from_numpy(rng.integers(0, 256, (200, *shape, 3), dtype=np.uint8))
    images[:50] = torch.where(images[:50] < 128, 0, 255).to(torch.uint8)  # edges, where bicubic overshoots
    sides = np.stack([rng.integers(1, side + 1, 200) for side in shape], 1)
    sides[:9] = shape
    boxes = np.concatenate([(rng.random((200, 2)) * (np.array(shape) - sides + 1)).astype(int), sides], 1)
    crops = crop_resize_batch(images, torch.from_numpy(boxes), size, interpolation)
    for image, box, crop in zip(images, boxes.tolist(), crops, strict=True):
        assert torch.equal(crop.permute(2, 0, 1), crop_resize(image.permute(2, 0, 1), box, size, interpolation))
    for view in (View(size, area=(0.05, 1)), EvalView(size), EvalView(size, resize=size + 5), WholeView(size)):
        view = dataclasses.replace(view, interpolation=interpolation)
        crops = view.crop_batch(images, draws(200))
        assert crops.shape == (200, size, size, 3) and crops.dtype == torch.uint8 and view.batched
        for image, u, crop in zip(images, draws(200), crops, strict=True):
            assert torch.equal(crop.permute(2, 0, 1), view.crop(image.permute(2, 0, 1), u))
