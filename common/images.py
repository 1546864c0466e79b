"""One image: from the bytes of a file to a tensor (C, H, W), whatever the file holds."""

import functools
import io

import numpy as np
import torch
from PIL import Image, ImageOps

DECODER = "PIL"  # of JPEGs and of 16-bit colour, which PIL reads as 8 bits; PIL reads all other kinds
try:
    from torchvision.io import decode_image as _decode_png
    from torchvision.io import decode_jpeg

    DECODER, _decode_jpeg = "torchvision", functools.partial(decode_jpeg, apply_exif_orientation=True)
except ImportError:  # torchvision means to drop its decoders, in favour of torchcodec's
    try:
        from torchcodec.decoders import decode_jpeg as _decode_jpeg  # which turns images as EXIF says, unasked
        from torchcodec.decoders import decode_png

        DECODER, _decode_png = "torchcodec", functools.partial(decode_png, output_dtype="auto")
    except (ImportError, RuntimeError):  # not installed, or without the libraries it needs
        pass

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".npy")
MODES = {1: "L", 3: "RGB"}  # what any image can be made, by its channels


class BadImage(Exception):
    """An image that cannot be decoded; the text names the file and the reason."""


def to_tensor(image, channels=3, dtype=torch.uint8):
    """Any PIL image -> (channels, H, W), upright (EXIF). 16-bit and float grey is scaled to [0, 255]. Any image becomes
    grey or RGB; with other numbers of channels it must have as many."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip these at 255
        array = np.array(image, dtype=np.float32)
        if image.mode.startswith("I;16") or array.max(initial=0) > 255:
            array = array / 257
        elif image.mode == "F" and array.max(initial=0) <= 1:
            array = array * 255
    else:
        image.info.pop("transparency", None)  # changes no colour, and PIL warns of it
        array = np.array(image.convert(MODES[channels]) if channels in MODES else image)
    return _fitted(array[..., None] if array.ndim == 2 else array, channels, dtype)


def _fitted(array, channels, dtype):
    """(H, W, c) of uint8, or floats in [0, 255] -> (channels, H, W): grey is repeated, any other number must agree."""
    image = torch.from_numpy(array).permute(2, 0, 1)
    image = image.expand(3, -1, -1) if channels == 3 and len(image) == 1 else image
    if len(image) != channels:
        raise ValueError(f"has {len(image)} channels, expected {channels} (--channels)")
    if not image.is_floating_point():
        return image
    return (image.round().clamp(0, 255) if dtype == torch.uint8 else image).to(dtype)


def _read_array(data, channels):
    """A NumPy file (H, W), (H, W, C) or (C, H, W) of uint8, uint16 or floats in [0, 1], as `_fitted` takes it."""
    array = np.load(io.BytesIO(data), allow_pickle=False)
    shape, fit = array.shape, (channels, 1) if channels == 3 else (channels,)
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and shape[2] not in fit and shape[0] in fit:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in fit:
        raise ValueError(f"has the shape {shape}: expected (H, W, C) or (C, H, W) with C = {channels} (--channels)")
    array = np.ascontiguousarray(array)  # a pixel's values lie side by side, as in decoded images
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return array.astype(np.float32) / 257
    if array.dtype.kind != "f":
        raise ValueError(f"holds {array.dtype}: expected uint8, uint16, or floats in [0, 1]")
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if not (low >= 0 and high <= 1):  # not a number is neither
        raise ValueError(f"holds floats from {low:g} to {high:g}: scale all images alike to [0, 1]")
    return array.astype(np.float32) * 255


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
    if data[:6] == b"\x93NUMPY":
        return np.load(io.BytesIO(data), allow_pickle=False).dtype != np.uint8
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data[24] == 16
    if data[:4] in (b"II*\0", b"MM\0*") or data[:2] == b"P5":
        with Image.open(io.BytesIO(data)) as image:
            return image.mode.startswith("I") or image.mode == "F"
    return False


def decode(data, channels=3, dtype=torch.uint8):
    """Encoded bytes -> (channels, H, W) of dtype, or uint8. A picture of more pixels than PIL accepts, which a few
    bytes can claim to be, is an error before memory is taken."""
    if data[:6] == b"\x93NUMPY":
        return _fitted(_read_array(data, channels), channels, dtype)
    jpeg = DECODER != "PIL" and data[:3] == b"\xff\xd8\xff" and channels in MODES
    if jpeg and _jpeg_pixels(data) <= Image.MAX_IMAGE_PIXELS:
        try:
            image = _decode_jpeg(_bytes(data), mode="UNCHANGED" if channels == 3 else "GRAY")
            if len(image) in (1, 3):
                return image.expand(channels, -1, -1)
        except RuntimeError:  # PIL reads some more kinds, and has the better message for the rest
            pass
    with Image.open(io.BytesIO(data)) as image:  # which checks the size
        if DECODER != "PIL" and dtype != torch.uint8 and image.format == "PNG" and data[24:26] == b"\x10\x02":
            array = _decode_png(_bytes(data), mode="UNCHANGED").permute(1, 2, 0).numpy()
            return _fitted(array / np.float32(257), channels, dtype)
        return to_tensor(image, channels, dtype)


def _bytes(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
