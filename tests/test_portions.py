"""On a CPU, `augment` works through a batch in portions: large images one by one, small ones by hundreds."""

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from common import augment
from common.augment import View
from tests.test_augment import NEUTRAL, batch, operations, reference

RECIPE = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8, "gray_p": 0.3, "blur_p": 0.5, "solarize_p": 0.3}


def planned(view, u):
    return [(name, torch.from_numpy(rows), torch.from_numpy(amounts)) for name, rows, amounts in augment.plan(view, u)]


def many(size, n):
    """n images, of which 20 differ."""
    return batch(size, min(n, 20)).repeat(-(-n // 20), 1, 1, 1)[:n]


@pytest.mark.parametrize("size, n, portions", [(160, 8, 8), (32, 700, 2)])
def test_portions_equal_torchvision_sample_by_sample(size, n, portions):
    view, images, u = View(size, **RECIPE), many(size, n), augment.uniforms(4, 1, range(n), 0, augment.DRAWS)
    steps = planned(view, u)
    assert len(augment._portions(images, steps)) == portions
    ours = augment.augment(images, steps, *NEUTRAL)
    blurred = 0
    for i in [*range(min(n, 8)), *range(max(8, n - 30), n)]:  # on both sides of the border
        x, todo = images[i] / 255, operations(view, u[i])
        for name, amount in todo:
            x = reference(name, x, amount)
            blurred += name == "blur"
        torch.testing.assert_close(ours[i], x, atol=1e-5, rtol=0, msg=lambda m, i=i, todo=todo: f"{i} {todo}: {m}")
    assert blurred > 2  # in several blocks of pixels along each axis, at 160


@pytest.mark.parametrize("size, n", [(160, 4), (32, 700)])
def test_a_sample_is_augmented_alike_in_any_batch(size, n):
    view, images, u = (
        View(size, **RECIPE, lighting=0.1),
        many(size, n),
        augment.uniforms(0, 0, range(n), 0, augment.DRAWS),
    )
    whole = augment.augment(images, planned(view, u), view.mean, view.std)
    for i in [0, 1, n // 2, n - 2, n - 1]:
        alone = augment.augment(images[i : i + 1], planned(view, u[i : i + 1]), view.mean, view.std)
        assert torch.equal(alone[0], whole[i])
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_threads_change_no_bit():
    """Portions are shared out to threads that work alone, so a sum over an image is taken in one order."""
    view, images, u = View(160, **RECIPE), many(160, 7), augment.uniforms(2, 0, range(7), 0, augment.DRAWS)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(augment.augment(images, planned(view, u), view.mean, view.std))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("shape", [(224, 224), (64, 96), (96, 50)])
def test_blur_in_blocks_of_pixels_equals_torchvision(shape):
    x = torch.rand(3, 3, *shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 1.1, 2.0])
    ours = augment._blur(x, sigma.view(-1, 1, 1, 1))
    expected = [TF.gaussian_blur(y, [23, 23], [s, s]) for y, s in zip(x.double(), sigma.tolist(), strict=True)]
    torch.testing.assert_close(ours.double(), torch.stack(expected), atol=1e-6, rtol=0)


def test_images_are_left_as_they_are():
    """Also those that are floats already, which no conversion copies."""
    images = torch.rand(3, 1, 24, 24) * 255
    kept = images.clone()
    ours = augment.augment(images, [], (0.0,), (1.0,))
    assert torch.equal(images, kept)
    torch.testing.assert_close(ours, images / 255)
