"""Files as people have them: each becomes an image, or one line that names it, and never ends the program."""

import io
import os
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from common import augment
from common.data import BadImage, Files, Loader, build, decode

SIZE = (48, 36)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(seed=0, size=SIZE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


GOOD = encoded(picture(), quality=90)


def with_size(data, height, width):
    """A JPEG whose header claims another size."""
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def bomb_png():
    """200 million pixels in a few bytes."""
    import zlib

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 20000, 10000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(picture(), exif=exif)


palette = picture().quantize(16)
READABLE = {  # content and the (height, width) it is to have
    "a png named jpg": (encoded(picture(), "PNG"), SIZE[::-1]),
    "a gif that moves": (encoded(palette, "GIF", save_all=True, append_images=[palette, palette]), SIZE[::-1]),
    "webp": (encoded(picture(), "WEBP"), SIZE[::-1]),
    "cmyk": (encoded(picture().convert("CMYK")), SIZE[::-1]),
    "16-bit grey": (encoded(Image.fromarray(np.full((36, 48), 40_000, np.uint16)), "PNG"), SIZE[::-1]),
    "palette with transparency": (encoded(palette, "PNG", transparency=1), SIZE[::-1]),
    "one pixel": (encoded(picture(size=(1, 1)), "PNG"), (1, 1)),
    "one pixel as jpeg": (encoded(picture(size=(1, 1))), (1, 1)),
    "very wide": (encoded(picture(size=(20_000, 10))), (10, 20_000)),
    "very high": (encoded(picture(size=(10, 20_000)), "PNG"), (20_000, 10)),
    "one column": (encoded(picture(size=(1, 300)), "PNG"), (300, 1)),
    "bytes behind the end": (GOOD + b"x" * 100, SIZE[::-1]),
    "progressive": (encoded(picture(), progressive=True), SIZE[::-1]),
    "bilevel": (encoded(picture().convert("1"), "PNG"), SIZE[::-1]),
    "bmp": (encoded(picture(), "BMP"), SIZE[::-1]),
    "tiff": (encoded(picture(), "TIFF"), SIZE[::-1]),
}
READABLE |= {f"orientation {i}": (orientation(i), SIZE if i >= 5 else SIZE[::-1]) for i in range(1, 9)}
BROKEN = {
    "empty": b"",
    "zeros": bytes(5000),
    "text": b"<html><body>404 Not Found</body></html>",
    "only the signature": b"\xff\xd8\xff",
    "png cut off": encoded(picture(), "PNG")[:200],
    "gif cut off": encoded(palette, "GIF")[:40],
    "webp cut off": encoded(picture(), "WEBP")[:100],
    "png bomb": bomb_png(),
    "jpeg bomb": with_size(GOOD, 65_000, 65_000),
    "no width": with_size(GOOD, 36, 0),
}
BROKEN |= {f"jpeg cut off at {i}0 %": GOOD[: len(GOOD) * i // 10] for i in range(10)}


@pytest.mark.parametrize("kind", READABLE)
def test_readable(kind, tmp_path):
    """Becomes RGB of its size, and every view of it has the size asked for."""
    content, (height, width) = READABLE[kind]
    (tmp_path / "x.jpg").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of torchvision's decoder as such
        image, _ = Files(tmp_path, ["x.jpg"])[0]
    assert image.dtype == torch.uint8 and image.shape == (3, height, width)
    view = augment.View(size=16)
    for seed in range(3):
        box = augment.crop_box(augment.uniforms(seed, 0, [0], 0, augment.DRAWS)[0].tolist(), height, width, view)
        assert augment.crop_resize(image, box, 16).shape == (3, 16, 16)
    assert augment.center_crop(image, augment.EvalView(16)).shape == (3, 16, 16)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken(kind, tmp_path):
    """Is refused with a line that names the file, before much memory is taken."""
    (tmp_path / "x.jpg").write_bytes(BROKEN[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(BadImage) as error:
            Files(tmp_path, ["x.jpg"])[0]
    assert str(tmp_path / "x.jpg") in str(error.value) and "\n" not in str(error.value)


def test_entries_of_a_folder_that_are_no_files(tmp_path):
    """A folder named x.jpg is a folder; links that lead nowhere or in a circle are found when they are read."""
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "1.jpg").write_bytes(GOOD)
    os.symlink("nowhere", tmp_path / "dangling.jpg")
    os.symlink("circle.jpg", tmp_path / "circle.jpg")
    os.symlink(".", tmp_path / "self")
    data = build(tmp_path, "train")
    assert data.names.strings() == ["circle.jpg", "dangling.jpg", "folder.jpg/1.jpg"]
    for i in (0, 1):
        with pytest.raises(BadImage):
            data[i]
    assert data[2][0].shape == (3, *SIZE[::-1])


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "x.jpg").write_bytes(GOOD)
    data = Files(tmp_path, ["x.jpg"])
    (tmp_path / "x.jpg").chmod(0)
    if os.access(tmp_path / "x.jpg", os.R_OK):  # root may read everything: then the system's refusal is imitated

        def refuse(i):
            raise PermissionError(13, "Permission denied", data.path(i))

        monkeypatch.setattr(data, "read", refuse)
    with pytest.raises(BadImage, match="Permission denied"):
        data[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_over_all_of_them(tmp_path, capsys, workers):
    """Each broken file is reported once and replaced; the others arrive; two loaders agree bit for bit."""
    contents = [c for c, _ in READABLE.values()] + list(BROKEN.values())
    for i, content in enumerate(contents):
        (tmp_path / f"name {i:02d}\n\u00e9.jpg").write_bytes(content)
    data = build(tmp_path, "train")
    assert len(data) == len(contents) >= 40
    runs = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            loader = Loader(data, [augment.View(size=16)], 4, workers=workers)
            runs.append([b.views()[0].clone() for epoch in range(2) for b in loader.epoch(epoch)])
        lines = [
            line for line in capsys.readouterr().err.replace("\n\u00e9", "").splitlines() if "cannot decode" in line
        ]
        assert len(lines) == len(set(lines)) == (0 if len(runs) == 2 else len(BROKEN))  # named once in a process
    assert len(runs[0]) == 2 * (len(contents) // 4)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_size_in_the_header_of_a_jpeg(monkeypatch):
    """The guard against bombs reads what PIL reads, and lets images through up to PIL's own limit."""
    for data in (GOOD, orientation(6), encoded(picture(), progressive=True), encoded(picture().convert("CMYK"))):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1])
        assert decode(data).shape[0] == 3
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1] // 3)
        with pytest.raises(Image.DecompressionBombError):
            decode(data)
