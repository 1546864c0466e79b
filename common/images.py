"""One image: from the bytes of a file to a tensor (C, H, W), whatever the file holds."""

import contextlib
import functools
import io
import math
import re
import warnings

import numpy as np
import torch
from PIL import Image, features

from common import deep

DECODER = "PIL"  # of JPEGs; PIL reads all other kinds
try:
    from torchvision.io import decode_jpeg

    DECODER, _decode_jpeg = "torchvision", functools.partial(decode_jpeg, apply_exif_orientation=True)
except ImportError:  # torchvision means to drop its decoders, in favour of torchcodec's
    try:
        from torchcodec.decoders import decode_jpeg as _decode_jpeg  # which turns images as EXIF says, unasked

        DECODER = "torchcodec"
    except (ImportError, RuntimeError):  # not installed, or without the libraries it needs
        pass

EXTENSIONS = (
    ".jpg .jpeg .png .bmp .gif .ppm .pgm .tif .tiff .webp .npy .jfif .jpe .pjpeg .mpo .apng .dib .pnm .pbm .pfm"
)
EXTENSIONS = (*EXTENSIONS.split(), ".tga", ".pcx", ".qoi", ".sgi")  # pictures that PIL reads, not icons or documents
EXTENSIONS += (".jp2", ".j2k", ".j2c", ".jpx") if features.check("jpg_2000") else ()
EXTENSIONS += (".avif", ".avifs") if features.check("avif") else ()
MODES = {1: "L", 3: "RGB"}  # what any image can be made, by its channels
MAX_PIXELS = 179  # million of an image: nearly what PIL takes unless told otherwise
warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata and sizes, one for each file


class BadImage(Exception):
    """An image that cannot be decoded; the text names the file and the reason."""


def limit_pixels(millions):
    """Sets how many pixels an image may have, for all decoders, here and in processes that are forked later."""
    Image.MAX_IMAGE_PIXELS = round(millions * 500_000)  # PIL refuses twice as many


limit_pixels(MAX_PIXELS)


def _too_large(pixels):
    """The text about an image of more pixels than that. A few bytes can claim to be one."""
    millions, limit = pixels / 1e6, 2e-6 * Image.MAX_IMAGE_PIXELS
    enough = math.ceil(millions)
    remedy = f"cut it into tiles, shrink it with pack.py (--resize 512 --max-pixels {enough}), or --max-pixels {enough}"
    has = f"{millions:,.{0 if round(millions) > limit else 2}f}"
    return f"has {has} million pixels, the limit is {limit:,g} million: {remedy}"


def to_tensor(image, channels=3, dtype=torch.uint8):
    """Any PIL image -> (channels, H, W), upright (EXIF). Any image becomes grey or RGB, with white behind what is
    transparent; with other numbers of channels it must have as many. 65535 is white in integers of more than 8 bits, 1
    in floats."""
    image.load()
    turn = deep.orientation(image)
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip these at 255
        pixels = deep.Pixels(np.array(image)[..., None], 1 if image.mode == "F" else 65535, 0, turn)
        return _fitted(deep.scaled(pixels, channels), channels, dtype)
    clear = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if clear and channels in MODES:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if channels in MODES:
        image = image.convert(MODES[channels])
    elif clear or image.mode == "P":
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if grey else "RGBA" if clear else "RGB")
    array = np.array(image)
    array = deep.upright(array[..., None] if array.ndim == 2 else array, turn)
    return _fitted(np.ascontiguousarray(array), channels, dtype)


def _fitted(array, channels, dtype):
    """(H, W, c) of uint8, or floats in [0, 255] -> (channels, H, W): grey is repeated, any other number must agree."""
    image = torch.from_numpy(array).permute(2, 0, 1)
    image = image.expand(3, -1, -1) if channels == 3 and len(image) == 1 else image
    if len(image) != channels:
        raise ValueError(f"has {len(image)} channels, expected {channels} (--channels)")
    if not image.is_floating_point():
        return image.to(dtype)
    return (image.round().clamp(0, 255) if dtype == torch.uint8 else image).to(dtype)


def _jpeg_pixels(data):
    """How many pixels a JPEG says it has, from its frame header; 0 if there is none."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7], "big") * int.from_bytes(data[at + 7 : at + 9], "big")
        at += 1 if marker == 0xFF else 2 + length
    return 0


def is_deep(data):
    """Does an encoded image hold more than 8 bits per value?"""
    return _is_deep(deep.read(data))


def _is_deep(pixels):
    return pixels is not None and (pixels.values.dtype.itemsize > 1 or pixels.white != 255)


def survey(dataset, most=8):
    """Looks at some images, evenly spaced, of a dataset that reads bytes, and sets what holds for all of them: `dtype`
    float32 if they have more than 8 bits, and `white`, the number that is white where their type does not tell: the
    smallest of 1 (of floats), 255 and 65535 that is not exceeded; 0 where it needs no telling."""
    top, lowest = -math.inf, 255
    for i in range(0, len(dataset), -(-len(dataset) // most)):
        try:
            pixels = deep.read(dataset.read(i), dataset.channels)
        except Exception:  # a broken file: it is named when it is loaded
            continue
        if _is_deep(pixels):
            dataset.dtype = torch.float32
        if pixels is not None and not pixels.white:
            top = max(top, float(np.nanmax(pixels.values)))  # half precision would not hold 65535
            lowest = 1 if pixels.values.dtype.kind == "f" else lowest
    fitting = [white for white in (1, 255, 65535) if lowest <= white >= top]
    dataset.white = (fitting or [65535])[0] if top > -math.inf else 0


def decode(data, channels=3, dtype=torch.uint8, white=0):
    """Encoded bytes -> (channels, H, W) of dtype, or uint8. white: as `survey` sets it. The attribute `several` of the
    tensor tells that the file holds more pictures. Too large a picture is an error before memory is taken."""
    try:
        return _decode(data, channels, dtype, white)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(int(re.search(r"\d+", str(error))[0]))) from None
    except Exception:
        with contextlib.suppress(Exception):  # metadata must not cost an image
            if plain := deep.without_metadata(data):
                return _decode(plain, channels, dtype, white)
        raise


def _decode(data, channels, dtype, white):
    jpeg = DECODER != "PIL" and data[:3] == b"\xff\xd8\xff" and channels in MODES
    if jpeg and _jpeg_pixels(data) <= 2 * Image.MAX_IMAGE_PIXELS:
        try:
            image = _decode_jpeg(_bytes(data), mode="UNCHANGED" if channels == 3 else "GRAY")
            if len(image) in (1, 3):
                return image.expand(channels, -1, -1)
        except RuntimeError:  # PIL reads some more kinds, and has the better message for the rest
            pass
    tiff = data.startswith(deep.TIFF)
    several = tiff and len(deep.tiff_pages(data)) > 1
    if (pixels := deep.read(data, channels)) is not None:
        image = _fitted(deep.scaled(pixels, channels, white), channels, dtype)
    else:
        plain = tiff and deep.without_metadata(data)  # libtiff writes about the rest to stderr
        with Image.open(io.BytesIO(plain or data)) as opened:  # which checks the size
            image = to_tensor(opened, channels, dtype)
            if opened.format not in ("TIFF", "MPO"):  # photographs with a preview, or a map of depth
                with contextlib.suppress(Exception):
                    several = opened.is_animated
    image.several = several
    return image


def _bytes(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
