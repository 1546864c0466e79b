"""The picture of the views: the images as they are stored on top, then a row for each view, with its name."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.augment import View, WholeView
from common.images import BadImage
from common.pictures import original, save_views, shorten, shown, view_names
from tests.helpers import train

PLAIN = WholeView(8, mean=(0.0,) * 3, std=(1.0,) * 3)


class Images(list):
    """A data set of tensors, in which None cannot be decoded."""

    def __getitem__(self, i):
        image = super().__getitem__(i)
        if image is None:
            raise BadImage("broken")
        return image, -1


def coloured(*values, height=4, width=6):
    return torch.tensor(values, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width)


@pytest.mark.parametrize(
    "sizes, names",
    [
        ([224], ["view"]),
        ([224, 224], ["view 1", "view 2"]),
        ([224, 224, 96], ["view 1", "view 2", "small crop 3"]),
        ([96, 224], ["small crop 1", "view 2"]),
    ],
)
def test_names_of_the_rows(sizes, names):
    assert view_names(sizes) == names


@pytest.mark.parametrize("height, width, shape", [(40, 60, (64, 96)), (600, 20, (96, 3)), (2, 3000, (1, 96))])
def test_original_keeps_its_shape(height, width, shape):
    """Enlarged pixel by pixel, reduced smoothly, and never to nothing."""
    x = original(Images([coloured(10, 20, 30, height=height, width=width)]), 0, 96, PLAIN)
    assert x.shape == (3, *shape)
    assert torch.allclose(255 * x.amin((1, 2)), torch.tensor([10.0, 20, 30]), atol=0.6)
    assert torch.allclose(255 * x.amax((1, 2)), torch.tensor([10.0, 20, 30]), atol=0.6)


def test_original_is_not_smoothed_where_it_is_enlarged():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 4).expand(3, -1, -1)
    x = original(Images([image]), 0, 8, PLAIN)
    assert torch.equal((255 * x).round().to(torch.uint8), image.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_views_below_their_originals(tmp_path):
    """Tiles of 48 and 24 pixels enlarged to 96 and 48; the neighbour of an image that cannot be decoded."""
    data = Images([coloured(200, 0, 0), None, coloured(0, 0, 200)])
    views = [torch.full((2, 3, 48, 48), 0.2), torch.full((2, 3, 24, 24), 0.6)]
    batch = SimpleNamespace(views=lambda: views, specs=[PLAIN, PLAIN], indices=torch.tensor([0, 1]))
    save_views(tmp_path / "views.png", batch, data)
    picture = np.asarray(Image.open(tmp_path / "views.png"))
    assert picture.shape == (6 + (64 + 6) + (96 + 6) + (48 + 6), 96 + 2 * (96 + 6), 3)
    columns = [slice(96 + 102 * i, 96 + 102 * i + 96) for i in range(2)]
    for column, colour in zip(columns, [(200, 0, 0), (0, 0, 200)], strict=True):
        assert (picture[6:70, column] == colour).all() and (picture[70:76, column] == 255).all()
        assert (picture[76:172, column] == 51).all()
        assert (picture[178:226, column][:, 24:72] == 153).all() and (picture[178:226, column][:, :24] == 255).all()
    for top, bottom in ((6, 70), (76, 172), (178, 226)):  # a name beside each row
        assert (picture[top:bottom, :96] < 100).any()


@pytest.mark.parametrize("script, rows", [("swav", [96, 96, 96, 72]), ("mae", [96, 96]), ("relative_loc", [96, 96])])
def test_every_method_shows_its_images(script, rows, tmp_path):
    """Eight noisy images of 64 x 64 pixels, whose originals have the colours of their classes."""
    train(script, tmp_path, "--max-steps", 1)
    picture = np.asarray(Image.open(tmp_path / "views.png"))
    tile = max(rows)
    assert picture.shape == (6 + sum(row + 6 for row in rows), 96 + 8 * (tile + 6), 3)
    assert all(picture[6 : 6 + tile, 96 + i * (tile + 6) :][:, :tile].std() > 5 for i in range(8))


def test_dark_originals_are_as_bright_as_their_views():
    """12 bits stored in 16, two channels: the first in grey."""
    view = View(8, mean=(0.03, 0.02), std=(0.01, 0.01))  # 0.06 becomes white
    image = torch.full((2, 8, 8), 255 * 0.03)
    x = original(Images([image]), 0, 8, view)
    assert torch.allclose(x, torch.full((3, 8, 8), 0.5), atol=1e-6)
    assert torch.allclose(shown(torch.zeros(1, 2, 8, 8), view)[0], x, atol=1e-6)


def test_long_names_keep_their_end():
    font = SimpleNamespace(getlength=len)
    assert shorten("a photograph 0001.jpg", font, 15) == "a photograph..."
    assert shorten("a photograph 0001.jpg", font, 15, 8) == "a ph...0001.jpg"
    assert shorten("é.jpg", font, 15, 8) == "e.jpg"
