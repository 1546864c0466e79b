"""Every kind of image with every decoder, and files as people have them: each becomes an image, or one line that names
it, and never ends the program."""

import importlib.util
import io
import itertools
import os
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from common import datasets
from common import images as in_use
from common.augment import DRAWS, EvalView, View
from common.datasets import Files, open_dataset
from common.images import BadImage, decode
from common.loader import Loader
from common.rng import uniforms
from tests.helpers import deep_png, encode, parsed, photo, refused
from tests.test_deep import tiff

MISSING = {"torchvision": [], "torchcodec": ["torchvision.io"], "PIL": ["torchvision.io", "torchcodec.decoders"]}


@pytest.fixture(scope="module", params=MISSING)
def images(request):
    """common/images.py as it is where some decoders cannot be imported."""
    if request.param == "torchcodec":
        pytest.importorskip("torchcodec")
    with pytest.MonkeyPatch.context() as patch:
        for name in MISSING[request.param]:
            patch.setitem(sys.modules, name, None)
        spec = importlib.util.spec_from_file_location("common.images", in_use.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    assert module.DECODER == request.param
    return module


# ---------------------------------------------------------------------------------------------- kinds of images
def turned(image, orientation, kind="JPEG", **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif, **options)


def without_adobe(content):
    """A JPEG without its Adobe segment; that the inks are stored inverted has to be assumed then, as PIL does."""
    at = content.index(b"\xff\xee")
    return content[:at] + content[at + 2 + struct.unpack(">H", content[at + 2 : at + 4])[0] :]


def with_alpha(image):
    image = image.copy()
    image.putalpha(Image.fromarray(ALPHA))
    return image


ALPHA = np.random.default_rng(1).integers(0, 256, (40, 56), dtype=np.uint8)
PIXELS = photo(40, 56, grain=10)
RGB = Image.fromarray(PIXELS)
GREY, CMYK, PALETTE = RGB.convert("L"), RGB.convert("CMYK"), RGB.quantize(32)
JPEG = encode(RGB, quality=90)
KINDS = {
    "jpeg": JPEG,
    "jpeg 4:4:4": encode(RGB, quality=90, subsampling=0),
    "jpeg progressive": encode(RGB, progressive=True),
    "jpeg grey": encode(GREY),
    "jpeg cmyk": encode(CMYK, quality=95),
    "jpeg cmyk plain": without_adobe(encode(CMYK, quality=95)),
    "jpeg with bytes behind the end": JPEG + b"x" * 100,
    "jpeg of one pixel": encode(photo(1, 1)),
    "jpeg, very wide": encode(photo(10, 20_000)),
    "png": encode(RGB, "PNG"),
    "png bilevel": encode(RGB.convert("1"), "PNG"),
    "png grey": encode(GREY, "PNG"),
    "png grey, one transparent": encode(GREY, "PNG", transparency=7),
    "png grey and alpha": encode(with_alpha(GREY), "PNG"),
    "png rgba": encode(with_alpha(RGB), "PNG"),
    "png palette": encode(PALETTE, "PNG"),
    "png palette, one transparent": encode(PALETTE, "PNG", transparency=3),
    "png palette, half transparent": encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 8))),
    "png upside down": turned(RGB, 3, "PNG"),
    "png 16-bit rgb": deep_png(PIXELS.astype(np.uint16) * 257),
    "png 16-bit rgba": deep_png(np.dstack([PIXELS, ALPHA]).astype(np.uint16) * 257),
    "png of one pixel": encode(photo(1, 1), "PNG"),
    "png of one column": encode(photo(300, 1), "PNG"),
    "png, very high": encode(photo(20_000, 10), "PNG"),
    "gif": encode(PALETTE, "GIF"),
    "gif transparent": encode(PALETTE, "GIF", transparency=2),
    "gif of two frames": encode(RGB, "GIF", save_all=True, append_images=[Image.fromarray(photo(40, 56, 1))]),
    "webp": encode(RGB, "WEBP", quality=90),
    "webp rgba": encode(with_alpha(RGB), "WEBP", lossless=True),
    "bmp": encode(RGB, "BMP"),
    "ppm": encode(RGB, "PPM"),
    "tiff": encode(RGB, "TIFF"),
    "tiff compressed": encode(RGB, "TIFF", compression="tiff_lzw"),
    "tiff cmyk": encode(CMYK, "TIFF"),
    "tiff jpeg": encode(RGB, "TIFF", compression="jpeg"),
    "tiff palette": encode(PALETTE, "TIFF", compression="tiff_deflate"),
    "tiff fax": encode(RGB.convert("1"), "TIFF", compression="group4"),
    "tiff rgba": encode(with_alpha(RGB), "TIFF", compression="tiff_lzw"),
    "tiff upside down": turned(RGB, 3, "TIFF", compression="tiff_lzw"),
    "tga": encode(RGB, "TGA"),
    "qoi": encode(RGB, "QOI"),
    "pcx": encode(RGB, "PCX"),
    "pbm": encode(RGB.convert("1"), "PPM"),
    "jpeg 2000": encode(RGB, "JPEG2000"),
    "apng": encode(RGB, "PNG", save_all=True, append_images=[Image.fromarray(photo(40, 56, 1))]),
    "tiff of two pages": encode(RGB, "TIFF", save_all=True, append_images=[Image.fromarray(photo(40, 56, 1))]),
}
if features.check("avif"):
    KINDS["avif"] = encode(RGB, "AVIF")


def over_white(image):
    """(H, W, 3) of a PIL image, by the formula."""
    values = np.asarray(image.convert("RGBA")).astype(float)
    opacity = values[..., 3:] / 255
    return (values[..., :3] * opacity + 255 * (1 - opacity)).round().astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_what_pil_makes_of_it(images, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PIL has some to give, which no user could act on
        ours = images.decode(KINDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = over_white(ImageOps.exif_transpose(Image.open(io.BytesIO(KINDS[kind]))))
    assert ours.dtype == torch.uint8 and ours.shape == (3, *expected.shape[:2])
    off = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - expected)
    clear = any(word in kind for word in ("alpha", "rgba", "transparent"))
    assert off.max() <= (
        2 if kind.startswith("jpeg") else clear
    )  # two builds of one JPEG library may round differently
    assert images.DECODER == "PIL" or torch.equal(ours, decode(KINDS[kind]))
    for u in uniforms(0, 0, range(3), 0, DRAWS):
        assert View(16).crop(ours, u).shape == EvalView(16).crop(ours).shape == (3, 16, 16)


def test_colours_are_those_of_the_picture(images):
    """Not only PIL's, but the right ones: inks not inverted, high bytes not dropped."""
    for kind in ("jpeg cmyk", "jpeg cmyk plain", "tiff cmyk", "png 16-bit rgb"):
        off = np.abs(images.decode(KINDS[kind]).permute(1, 2, 0).numpy() - PIXELS.astype(int))
        assert off.mean() < 20, kind
    assert np.array_equal(images.decode(KINDS["png 16-bit rgb"]).permute(1, 2, 0), PIXELS)


CLEAR = np.zeros((12, 16), np.uint8)
CLEAR[3:7, 4:9] = 1


def hidden(mode, kind, colour):
    """A picture of which only a dark square is seen, with a colour hidden under the rest."""
    if mode in ("RGBA", "LA", "RGBA;16", "LA;16"):
        ink = np.array([10, 20, 30] if mode[0] == "R" else [20])
        under = np.array(colour if mode[0] == "R" else colour[:1])
        array = np.concatenate([np.where(CLEAR[..., None], ink, under), 255 * CLEAR[..., None]], 2)
        if "16" in mode:
            return deep_png((array * 257).astype(np.uint16))
        return encode(array.astype(np.uint8), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    if mode == "RGB":
        array = np.where(CLEAR[..., None], (10, 20, 30), colour).astype(np.uint8)
        return encode(array, kind, transparency=colour)
    if mode == "L":
        return encode(np.where(CLEAR, 20, colour[0]).astype(np.uint8), kind, transparency=colour[0])
    image = Image.fromarray(CLEAR, "L").copy()
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([*colour, 10, 20, 30])
    return encode(image, kind, transparency=bytes([0, 255]) if mode == "P bytes" else 0)


@pytest.mark.parametrize(
    "mode, kind",
    [(mode, "PNG") for mode in ("RGBA", "LA", "RGB", "L", "P", "P bytes", "RGBA;16", "LA;16")]
    + [("P", "GIF"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "TIFF"), ("RGBA", "TGA"), ("RGBA", "QOI")],
)
def test_hidden_colours_stay_hidden(images, mode, kind):
    """Pictures that look the same are the same: white shows where nothing is."""
    seen = [images.decode(hidden(mode, kind, colour)) for colour in ((200, 60, 90), (0, 255, 250))]
    assert torch.equal(*seen) and (seen[0][:, 0, 0] == 255).all() and (seen[0][:, 4, 5] <= 30).all()
    grey = [images.decode(hidden(mode, kind, colour), 1) for colour in ((200, 60, 90), (0, 255, 250))]
    assert torch.equal(*grey) and grey[0][0, 0, 0] == 255 and 10 <= grey[0][0, 4, 5] <= 30


def test_four_channels_keep_the_opacity(images):
    for mode in ("RGBA", "P bytes", "RGB"):
        found = images.decode(hidden(mode, "PNG", (1, 2, 3)), 4)
        assert found[:, 0, 0].tolist() == [1, 2, 3, 0] and found[:, 4, 5].tolist() == [10, 20, 30, 255]
    assert images.decode(hidden("LA", "PNG", (7, 2, 3)), 2)[:, 0, 0].tolist() == [7, 0]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(images, orientation, mode):
    upright = np.full((24, 40, 3), 30, np.uint8)
    upright[:8, :16] = 250  # the corner tells all eight apart
    upright[:4, 16:] = 140
    content = turned(Image.fromarray(upright).convert(mode), orientation, quality=95, subsampling=0)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    for channels in (3, 1):
        ours = images.decode(content, channels).permute(1, 2, 0).numpy()
        assert ours.shape == ((24, 40, channels) if orientation < 5 else (40, 24, channels))
        assert np.abs(ours.astype(int) - expected).max() <= (2 if channels == 3 or mode == "L" else 5)
        if orientation > 1:
            assert ours.shape[:2] != (24, 40) or np.abs(ours.astype(int) - upright).max() > 100


def test_content_counts_not_the_name(tmp_path):
    (tmp_path / "a.png").write_bytes(JPEG)
    (tmp_path / "b.jpg").write_bytes(encode(RGB, "PNG"))
    dataset = open_dataset(tmp_path, "train")
    assert torch.equal(dataset[0][0], decode(JPEG)) and np.array_equal(dataset[1][0].permute(1, 2, 0), PIXELS)


# ----------------------------------------------------------------------------- more than 8 bits, other channels
@pytest.mark.parametrize("brightest", [65_535, 300, 200])  # even where all values would fit into 8 bits
@pytest.mark.parametrize("kind", ["png", "png with alpha", "tiff", "tiff big-endian"])
def test_16_bit_grey_is_scaled(kind, brightest):
    array = np.linspace(0, brightest, 30 * 20).astype(np.uint16).reshape(20, 30)
    content = {
        "png": lambda: encode(array, "PNG"),
        "png with alpha": lambda: deep_png(np.dstack([array, np.full_like(array, 65_535)])),
        "tiff": lambda: encode(array, "TIFF"),
        "tiff big-endian": lambda: encode(array.astype(">u2"), "TIFF"),
    }[kind]()
    ours = decode(content)
    assert ours.shape == (3, 20, 30) and torch.equal(ours[0], ours[1]) and torch.equal(ours[0], ours[2])
    assert np.abs(ours[0].numpy() - array / 257).max() <= 0.5


def test_16_bit_grey_keeps_its_bits(tmp_path):
    values = np.array([[0, 1, 257], [300, 40000, 65535]], np.uint16)
    (tmp_path / "a.png").write_bytes(deep_png(values))
    (tmp_path / "b.tif").write_bytes(encode(values, "TIFF"))
    np.save(tmp_path / "c.npy", values)
    for channels in (1, 3):
        for image, _ in open_dataset(tmp_path, "train", channels=channels):
            assert image.shape == (channels, 2, 3) and image.dtype == torch.float32
            np.testing.assert_allclose(image, np.broadcast_to(values / 257, image.shape), rtol=1e-6)


def test_16_bit_colour_keeps_its_bits(images, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "decode", images.decode)
    values = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(deep_png(values))
    np.save(tmp_path / "b.npy", values)
    png, npy = (image.permute(1, 2, 0).numpy() for image, _ in open_dataset(tmp_path, "train"))
    np.testing.assert_allclose(npy, values / 257, rtol=1e-6)
    np.testing.assert_allclose(png, values / 257, rtol=1e-6)


def test_8_bits_stay_8_bits(tmp_path):
    values = photo(5, 7)
    (tmp_path / "a.png").write_bytes(encode(values, "PNG"))
    np.save(tmp_path / "b.npy", values)
    (tmp_path / "c.jpg").write_bytes(encode(values))
    images = open_dataset(tmp_path, "train")
    assert images.dtype == torch.uint8 and all(image.dtype == torch.uint8 for image, _ in images)
    assert all(np.array_equal(images[i][0].permute(1, 2, 0), values) for i in (0, 1))


@pytest.mark.parametrize("shape", [(6, 8, 4), (4, 6, 8)])
def test_arrays_have_channels_last_or_first(tmp_path, shape):
    values = np.random.default_rng(0).random(shape)
    np.save(tmp_path / "a.npy", values)
    image, label = open_dataset(tmp_path, "train", channels=4)[0]
    assert image.shape == (4, 6, 8) and label == -1
    np.testing.assert_allclose(image, 255 * (values if shape[0] == 4 else values.transpose(2, 0, 1)), rtol=1e-6)


def test_pictures_of_four_bands_stay_as_they_are(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    for mode, kind in (("CMYK", "TIFF"), ("RGBA", "PNG")):
        (tmp_path / f"a.{kind}").write_bytes(encode(Image.frombytes(mode, (7, 5), values.tobytes()), kind))
    dataset = open_dataset(tmp_path, "train", channels=4)
    assert len(dataset) == 2 and all(np.array_equal(image.permute(1, 2, 0), values) for image, _ in dataset)


def test_one_channel_of_colour_files_is_their_luma(images):
    for content in (encode(RGB, "PNG"), encode(RGB.resize((240, 160)), quality=95)):
        grey = np.asarray(Image.open(io.BytesIO(content)).convert("L")).astype(int)
        image = images.decode(content, 1)
        off = abs(image[0].numpy() - grey)
        assert image.shape == (1, *grey.shape) and off.max() <= 4 and off.mean() < 0.5  # a JPEG holds its luma itself


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((6, 8, 2), "u1"), "the shape (6, 8, 2): expected (H, W, C) or (C, H, W) with C = 3 (--channels)"),
        (np.zeros(5, np.uint8), "the shape (5,)"),
        (np.zeros((6, 8), np.int32), "holds int32: expected uint8, uint16, or floats in [0, 1]"),
        (np.full((6, 8), -3.0), "holds values from -3 to -3: scale all images alike to [0, 1]"),
        (np.full((6, 8), np.nan), "holds values that are not finite"),
        (np.array([[{}]]), "holds object: expected"),
        (np.full((6, 8), 1j), "holds complex128: expected"),
        (np.full((6, 8), 2.0), "holds values from 2 to 2: scale all images alike to [0, 1]"),
        (np.zeros((0, 8), "u1"), "has the shape (0, 8): it is empty"),
    ],
)
def test_arrays_that_mean_nothing_are_named(tmp_path, array, said):
    np.save(tmp_path / "odd.npy", array)
    with pytest.raises(BadImage, match=r"odd\.npy") as error:
        Files(tmp_path, ["odd.npy"])[0]
    assert said in str(error.value)


def test_other_channels_than_the_files_have_end_the_program(tmp_path, capsys):
    """At once, with one line, not after a hundred warnings."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match=r"a\.png.*has 3 channels, expected 5"):
        Files(tmp_path, ["a.png"], channels=5)[0]
    message = refused(capsys, open_dataset, tmp_path, "train", channels=5)
    assert "has 3 channels, expected 5 (--channels)" in message
    (tmp_path / "a.png").write_bytes(b"broken")  # which the loader tells, and goes on
    assert len(open_dataset(tmp_path, "train", channels=5)) == 1


# ----------------------------------------------------------------------------------------------------- metadata
def png_chunk(name, body, wrong=0):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ wrong)


def segment(marker, body):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def exif(kind=3, count=1, value=6, at=8):
    """EXIF with an orientation of any type."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", at, 1, 0x0112, kind, count, value, 0, 0)


PNG = encode(RGB, "PNG")
LARGE = zlib.compress(bytes(20_000_000))
BROKEN_EXIF = {
    "empty": b"",
    "text": b"no tiff at all",
    "only its name": b"Exif\0\0",
    "cut off": exif()[:15],
    "far away": exif(at=10**9),
    "within itself": exif(at=2),
    "orientation 0": exif(value=0),
    "orientation 9": exif(value=9),
    "orientation 65535": exif(value=65535),
    "orientation as text": exif(kind=2),
    "orientation as a fraction": exif(kind=5),
    "orientation of no type": exif(kind=99),
    "many orientations": exif(count=2**30),
}
BROKEN_PNG = {
    "large text": png_chunk(b"zTXt", b"comment\0\0" + LARGE),
    "much text": 80 * png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(900_000))),
    "damaged text": png_chunk(b"zTXt", b"comment\0\0damaged"),
    "short text": png_chunk(b"iTXt", b"k"),
    "damaged profile": png_chunk(b"iCCP", b"name\0\0damaged"),
    "large profile": png_chunk(b"iCCP", b"name\0\0" + LARGE),
    "wrong checksum": png_chunk(b"tEXt", b"k\0v", wrong=1),
    "short resolution": png_chunk(b"pHYs", b"\0"),
    "resolution 0": png_chunk(b"pHYs", bytes(9)),
    "short gamma": png_chunk(b"gAMA", b""),
    "short animation": png_chunk(b"acTL", b""),
    "frame of none": png_chunk(b"fcTL", b"12"),
    "xmp orientation": png_chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="9"/>'),
    "raw exif": png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 30\nzzzz"),
}
BROKEN_JPEG = {
    "xmp": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<broken"),
    "no name": segment(0xE1, b""),
    "profile": segment(0xE2, b"ICC_PROFILE\0"),
    "second picture": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
    "photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\xff\0\0\0\0\xff"),
    "adobe": segment(0xEE, b"Adobe"),
    "jfif": segment(0xE0, b"JFIF"),
    "thumbnail": segment(0xE0, b"JFXX\0\x10\xff\xd8\xff"),
    "comment": segment(0xFE, b"\xff\0\xff"),
}


def with_metadata():
    """{name: (content, the same without)}"""
    cases = {}
    deep, webp = deep_png(PIXELS.astype(np.uint16) * 257), encode(RGB, "WEBP", lossless=True)
    for name, body in BROKEN_EXIF.items():
        chunk = png_chunk(b"eXIf", body.removeprefix(b"Exif\0\0"))
        for kind, plain in (("png", PNG), ("deep png", deep)):
            cases[f"{kind} exif {name}"] = plain[:33] + chunk + plain[33:], plain
        cases[f"png late exif {name}"] = PNG[:-12] + chunk + PNG[-12:], PNG
        if not name.startswith(("orientation as", "orientation of", "many")):  # torchvision takes any type for a number
            cases[f"jpeg exif {name}"] = JPEG[:2] + segment(0xE1, body) + JPEG[2:], JPEG
        if body:
            content = encode(RGB, "WEBP", lossless=True, exif=body)
            cases[f"webp exif {name}"] = content, webp
            at = content.find(b"EXIF") + 4
            if at > 4:
                cases[f"webp exif {name}, too long"] = content[:at] + b"\xff\xff\0\0" + content[at + 4 :], webp
    for name, chunk in BROKEN_PNG.items():
        cases[f"png {name}"] = PNG[:33] + chunk + PNG[33:], PNG
        cases[f"deep png {name}"] = deep[:33] + chunk + deep[33:], deep
    for name, part in BROKEN_JPEG.items():
        cases[f"jpeg {name}"] = JPEG[:2] + part + JPEG[2:], JPEG
    cases["jpeg resolution 0"] = JPEG[:13] + b"\1" + bytes(4) + JPEG[18:], JPEG
    tags = {
        "exif far away": (34665, 10**8),
        "exif in the pixels": (34665, 20),
        "gps": (34853, 5),
        "profile": (34675, 7),
    }
    tags |= {"xmp": (700, 1), "resolution 0": (282, [0, 0]), "unit": (296, 99), "text": (305, [7] * 5)}
    tags |= {
        "orientation 0": (274, 0),
        "orientation 9": (274, 9),
        "two orientations": (274, [6, 1]),
        "own": (65000, [1] * 300),
    }
    for (name, (tag, value)), pack, bits in itertools.product(tags.items(), (1, 5), (8, 16)):
        array = PIXELS.astype(f"u{bits // 8}") * (1 if bits == 8 else 257)
        plain = tiff(array, pack=pack)
        cases[f"tiff of {bits} bits, compression {pack}, {name}"] = tiff(array, pack=pack, **{f"t{tag}": value}), plain
    return cases


def test_metadata_never_costs_an_image(images, capfd):
    """Broken as it may be, the pixels and their orientation are those without it; nothing is said."""
    cases = with_metadata()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as common/images.py does, which pytest undoes
        wrong = []
        for name, (content, plain) in cases.items():
            try:
                same = torch.equal(images.decode(content), images.decode(plain))
            except Exception as error:
                wrong.append((name, error))
                continue
            if not same:
                wrong.append((name, "differs"))
    assert not wrong and len(cases) > 150
    assert not [line for line in capfd.readouterr().err.splitlines() if "TIFF" in line or "libpng" in line]


def test_what_pixels_need_is_not_dropped_with_the_metadata(images):
    """Colour tables, and the pixels' own damage."""
    broken = png_chunk(b"tEXt", b"k\0v", wrong=1)
    for kind in ("png palette", "png palette, half transparent", "png upside down", "apng"):
        content = KINDS[kind][:33] + broken + KINDS[kind][33:]
        assert torch.equal(images.decode(content), images.decode(KINDS[kind]))
        with pytest.raises(Exception, match=r"\w"):
            images.decode(content[: len(content) * 2 // 3])
    at = PNG.index(b"IDAT") + 20
    with pytest.raises(Exception, match=r"\w"):
        images.decode(PNG[:33] + broken + PNG[33:at] + bytes(20) + PNG[at + 20 :])


# ------------------------------------------------------------------------------------------------- broken files
def jpeg_of_size(height, width):
    """A JPEG whose header claims another size."""
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]


def png_of_size(height, width):
    png = encode(RGB, "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


BROKEN = {
    "empty": b"",
    "zeros": bytes(5000),
    "text": b"<html><body>404 Not Found</body></html>",
    "only the signature": b"\xff\xd8\xff",
    "png cut off": encode(RGB, "PNG")[:200],
    "gif cut off": encode(PALETTE, "GIF")[:40],
    "webp cut off": encode(RGB, "WEBP")[:100],
    "png bomb": png_of_size(10_000, 20_000),
    "jpeg bomb": jpeg_of_size(65_000, 65_000),
    "no width": jpeg_of_size(40, 0),
}
BROKEN |= {f"jpeg cut off at {i}0 %": JPEG[: len(JPEG) * i // 10] for i in range(10)}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BROKEN)
def test_broken(images, kind, tmp_path, monkeypatch):
    """Is refused with a line that names the file, before much memory is taken."""
    monkeypatch.setattr(datasets, "decode", images.decode)
    (tmp_path / "x.jpg").write_bytes(BROKEN[kind])
    with pytest.raises(BadImage) as error:
        Files(tmp_path, ["x.jpg"])[0]
    assert str(tmp_path / "x.jpg") in str(error.value) and "\n" not in str(error.value)


def of_size(kind, height, width):
    """An image of one colour of any size, in any format."""
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, np.broadcast_to(np.uint8(9), (height, width)))
        return file.getvalue()
    if kind == "16 bits":
        return deep_png(np.full((height, width), 9, np.uint16))
    return encode(Image.new("L", (width, height), 9), kind)


SIZED = ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "JPEG2000", "npy", "16 bits"]


@pytest.mark.parametrize("kind", SIZED)
def test_one_limit_of_pixels_for_all(images, tmp_path, monkeypatch, kind):
    """Up to it an image is read; the line about a larger one has its size, the limit, and three ways out."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 0)  # puts back what it was
    monkeypatch.setattr(datasets, "decode", images.decode)
    (tmp_path / "big.x").write_bytes(of_size(kind, 1100, 1900))
    for limit in (2.09, 3):
        images.limit_pixels(limit)
        assert Files(tmp_path, ["big.x"])[0][0].shape == (3, 1100, 1900)
    images.limit_pixels(2)
    with pytest.raises(BadImage) as error:
        Files(tmp_path, ["big.x"])[0]
    remedy = "cut it into tiles, shrink it with pack.py (--resize 512 --max-pixels 3), or --max-pixels 3"
    assert str(error.value) == f"{tmp_path}/big.x: has 2.09 million pixels, the limit is 2 million: {remedy}"


def test_the_limit_of_pixels_is_a_flag(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 0)
    for script, words in (("simsiam", []), ("eval_knn", ["--pretrained", "random"])):
        for more, pixels in ((["--max-pixels", "250"], 250e6), ([], 179e6)):
            parsed(script, *words, *more)
            assert 2 * Image.MAX_IMAGE_PIXELS == pixels


def test_entries_of_a_folder_that_are_no_files(tmp_path, capsys):
    """A folder named x.jpg is a folder; links that lead nowhere or in a circle are left out, and counted."""
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "1.jpg").write_bytes(JPEG)
    for name, target in (("dangling.jpg", "nowhere"), ("circle.jpg", "circle.jpg"), ("self", ".")):
        os.symlink(target, tmp_path / name)
    dataset = open_dataset(tmp_path, "train")
    assert dataset.names.strings() == ["folder.jpg/1.jpg"] and dataset[0][0].shape == (3, 40, 56)
    assert "3 left out: broken link 2, link to a folder above 1" in capsys.readouterr().out


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    dataset = Files(tmp_path, ["x.jpg"])

    def refuse(i):  # an imitation: root may read everything
        raise PermissionError(13, "Permission denied", dataset.path(i))

    monkeypatch.setattr(dataset, "read", refuse)
    with pytest.raises(BadImage, match="Permission denied"):
        dataset[0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_over_all_of_them(tmp_path, capsys, workers):
    """Each broken file is reported once and replaced; the others arrive; two loaders agree bit for bit."""
    contents = [*KINDS.values(), *BROKEN.values()]
    for i, content in enumerate(contents):
        (tmp_path / f"name {i:02d}\n\u00e9.jpg").write_bytes(content)
    dataset, runs = open_dataset(tmp_path, "train"), []
    assert len(dataset) == len(contents)
    for reported in (len(BROKEN), 0):  # each file is named once in a process
        loader = Loader(dataset, [View(16)], 4, workers=workers)
        runs.append([b.views()[0].clone() for epoch in range(2) for b in loader.epoch(epoch)])
        lines = capsys.readouterr().err.replace("\n\u00e9", "").splitlines()
        lines = [line for line in lines if "cannot decode" in line]
        assert len(lines) == len(set(lines)) == reported
    assert len(runs[0]) == 2 * (len(contents) // 4)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
