"""Images that PIL would cut to 8 bits or to fewer bands: PNG, TIFF, PNM, JPEG 2000 and .npy, as arrays of any type.

No value is scaled by what else is in its image: white is what the type or the header says or, of 32-bit numbers, what
holds for the whole data set.
"""

import io
import re
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

REMEDY = "convert it to a PNG of 16 bits or to .npy"
PNG, NUMPY, JPEG_2000 = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
TIFF = tuple(order + mark for order, mark in ((b"II", b"*\0"), (b"MM", b"\0*"), (b"II", b"+\0"), (b"MM", b"\0+")))


class Pixels(NamedTuple):
    """values (H, W, c). white: the number that counts as white, 0 where the whole set decides. alpha: 1 if the last
    channel is opacity, 2 if the colours are multiplied by it as well. turn: EXIF's orientation."""

    values: np.ndarray
    white: float
    alpha: int = 0
    turn: int = 1


def read(data, channels=3):
    """The Pixels of an encoded image, None if PIL reads all that is in it. channels: what is wanted of it."""
    if data.startswith(NUMPY):
        return _read_numpy(data, channels)
    if data.startswith(PNG) and data[24] == 16:
        return _read_png(data)
    if data.startswith(TIFF):
        return _read_tiff(data, channels)
    if re.match(rb"P[2356Ff]\s", data):
        return _read_pnm(data)
    return _read_jpeg_2000(data) if data.startswith(JPEG_2000) else None


def check_size(height, width):
    """Refuses more pixels than PIL takes, before memory is."""
    Image._decompression_bomb_check((width, height))


def orientation(image):
    """EXIF's orientation of a PIL image that has been loaded; 1 where that cannot be read."""
    try:
        turn = image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata raises a dozen kinds
        return 1
    return turn if turn in range(1, 9) else 1


def upright(array, turn):
    """An array (H, W, c) turned as EXIF's orientation says."""
    array = array.swapaxes(0, 1) if turn >= 5 else array
    array = array[:, ::-1] if turn in (2, 3, 6, 7) else array
    return array[::-1] if turn in (3, 4, 7, 8) else array


def scaled(pixels, channels, white=0):
    """Pixels as `channels` or as many values as they have, upright: uint8, or float32 in [0, 255]. Opacity lets white
    shine through unless it is wanted. white: see Pixels."""
    values, top, alpha, turn = pixels
    values = upright(values, turn)
    if values.dtype != np.uint8 or top != 255:
        top = top or white or (1 if values.dtype.kind == "f" else 65535)
        if not values.size:
            raise ValueError("is empty")
        low, high = values.min(), values.max()
        if not np.isfinite([low, high]).all():
            raise ValueError("holds values that are not finite")
        if low < 0 or high > top:
            raise ValueError(f"holds values from {low:g} to {high:g}: scale all images alike to [0, {top:g}]")
        values = values.astype(np.float32)
        values = np.minimum(values * np.float32(255) if top == 1 else values / np.float32(top / 255), 255)
    if alpha and values.shape[2] != channels:
        opacity, values = values[..., -1:] / np.float32(255), values[..., :-1]
        values = (values if alpha == 2 else values * opacity) + 255 * (1 - opacity)
        values = values.clip(0, 255)
    if channels == 1 and values.shape[2] == 3:
        values = values @ np.array([[0.299], [0.587], [0.114]], np.float32)
    return np.require(values, requirements="CW")  # a pixel's values lie side by side, as in decoded images


# ------------------------------------------------------------------------------------------------------- formats
def _read_numpy(data, channels):
    """(H, W), (H, W, C) or (C, H, W) of uint8, uint16 or floats in [0, 1]."""
    file = io.BytesIO(data)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, columns, dtype = headers[np.lib.format.read_magic(file)](file)
    if dtype.newbyteorder("=") not in (np.uint8, np.uint16) and dtype.kind != "f":
        raise ValueError(f"holds {dtype}: expected uint8, uint16, or floats in [0, 1]")
    if len(shape) not in (2, 3):
        raise ValueError(f"has the shape {shape}: expected (H, W, C) or (C, H, W) with C = {channels} (--channels)")
    array = np.frombuffer(data, dtype, offset=file.tell())[: np.prod(shape)]
    array = array.reshape(shape, order="F" if columns else "C")
    fit = (channels, 1) if channels == 3 else (channels,)
    if array.ndim == 2:
        array = array[..., None]
    elif shape[2] not in fit and shape[0] in fit:
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in fit:
        raise ValueError(f"has the shape {shape}: expected (H, W, C) or (C, H, W) with C = {channels} (--channels)")
    if not array.size:
        raise ValueError(f"has the shape {shape}: it is empty")
    check_size(*array.shape[:2])
    return Pixels(array, {"f": 1}.get(dtype.kind, 255 if dtype == np.uint8 else 65535))


def png_chunks(data):
    """(name, start, end) of the chunks of a PNG, whole with length and checksum; what is cut off comes last."""
    at = 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, end
        at = end


def _read_png(data):
    """16 bits, of which PIL keeps 8 unless the image is grey. It is shown each value as two of 8 bits."""
    kind, transparent = data[25], None
    for name, start, end in png_chunks(data):
        if name == b"tRNS":
            transparent = np.frombuffer(data[start + 8 : end - 4], ">u2")
        if name == b"IDAT":
            break
    if kind in (0, 4):  # a byte of grey and one of opacity, or four of colour and opacity, lie in a file as these do
        header = data[12:24] + bytes([8, kind + (4 if kind == 0 else 2)]) + data[26:29]
        with Image.open(io.BytesIO(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])) as image:
            values, turn = np.ascontiguousarray(np.array(image)).view(">u2"), orientation(image)
    else:  # high bytes, then low bytes
        parts = []
        for order in "BL":
            with Image.open(io.BytesIO(data)) as image:
                image.tile = [(*tile[:3], f"{image.mode};16{order}") for tile in image.tile]
                parts.append(np.array(image))
                turn = orientation(image)
        values = parts[0].astype(np.uint16) << 8 | parts[1]
    if transparent is not None and len(transparent) == values.shape[2]:
        opacity = (values != transparent).any(2, keepdims=True)
        return Pixels(np.concatenate([values, opacity * np.uint16(65535)], 2), 65535, 1, turn)
    return Pixels(values, 65535, int(kind >= 4), turn)


def _read_pnm(data):
    """PGM and PPM of more than 8 bits, and the floats of PFM; None for others."""
    header = re.match(rb"P[2356Ff]" + 3 * rb"(?:\s+|\s*#[^\n]*\n\s*)+([-+.\deE]+)" + rb"\s", data)
    if not header or (data[1] in b"2356" and not 255 < int(header[3]) < 65536):
        return None
    (width, height), body = map(int, header.groups()[:2]), data[header.end() :]
    check_size(height, width)
    shape = height, width, 3 if data[1] in b"36F" else 1
    if data[1] in b"Ff":  # the lowest row comes first
        kind = "<f4" if float(header[3]) < 0 else ">f4"
        return Pixels(np.frombuffer(body, kind)[: np.prod(shape)].reshape(shape)[::-1], 0)
    if data[1] in b"23":
        values = np.array(re.sub(rb"#[^\n]*", b"", body).split(), np.float32)
    else:
        values = np.frombuffer(body[: len(body) // 2 * 2], ">u2")
    return Pixels(values[: np.prod(shape)].reshape(shape), int(header[3]))


def _read_jpeg_2000(data):
    """Grey of more than 8 bits; PIL cuts colours."""
    at = data.find(b"\xff\x4f\xff\x51") + 40
    bands = int.from_bytes(data[at : at + 2], "big")
    bits = max(((size & 127) + 1 for size in data[at + 2 : at + 2 + 3 * bands : 3]), default=8)
    if at < 40 or bits <= 8:
        return None
    if bands > 1 or bits > 16:
        raise ValueError(f"holds {bands} bands of {bits} bits, which PIL cuts: {REMEDY}")
    with Image.open(io.BytesIO(data)) as image:
        return Pixels(np.array(image)[..., None], 65535)


# ---------------------------------------------------------------------------------------------------------- TIFF
KINDS = {1: "u1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 18: "u8"}
NEEDED = {254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325}
NEEDED |= {
    332,
    338,
    339,
    347,
    512,
    513,
    514,
    515,
    519,
    520,
    521,
    529,
    530,
    532,
}  # for the pixels; all other tags describe them
NONE, LZW, DEFLATE, PACKED = 1, 5, (8, 32946), (32773, 34925, 50000)  # compressions that keep bytes


def tiff_pages(data):
    """The tags {number: (type, values)} that the pixels of each page need, without smaller copies of pages."""
    order, big = "<" if data[:1] == b"I" else ">", data[2:4] in (b"+\0", b"\0+")
    word, many, size = (8, "Q", 20) if big else (4, "H", 12)
    number = {4: "I", 8: "Q"}[word]
    (at,), pages, seen = struct.unpack_from(order + number, data, word), [], set()
    while at and at not in seen and at < len(data) and len(pages) < 1000:
        seen.add(at)
        (count,), tags = struct.unpack_from(order + many, data, at), {}
        at += struct.calcsize(many)
        for entry in range(at, min(at + count * size, len(data) - size), size):
            tag, kind, length = struct.unpack_from(f"{order}HH{number}", data, entry)
            if tag in NEEDED and kind in KINDS:
                dtype, place = np.dtype(order + KINDS[kind]), entry + size - word
                length *= 2 if kind == 5 else 1
                if length * dtype.itemsize > word:
                    (place,) = struct.unpack_from(order + number, data, place)
                if 0 < length <= (len(data) - place) // dtype.itemsize:
                    tags[tag] = kind, np.frombuffer(data, dtype, length, place)
        at += count * size
        if 274 in tags and tags[274][1].tolist() not in [[turn] for turn in range(1, 9)]:
            del tags[274]  # no orientation
        following = struct.unpack_from(order + number, data, at)[0] if at + word <= len(data) else 0
        if not pages or not int(tags.get(254, (4, [0]))[1][0]) & 5:  # neither a smaller copy nor a mask
            pages.append(tags)
        at = following
    return pages


def write_tiff(data, tags):
    """A TIFF of one page with some tags {number: (type, values)} behind the bytes `data`, which begin as one does."""
    order, big = "<" if data[:1] == b"I" else ">", data[2:4] in (b"+\0", b"\0+")
    word, many, number = (8, "Q", "Q") if big else (4, "H", "I")
    body, entries = bytearray(data) + bytes(len(data) % 2), b""
    for tag, (kind, values) in sorted(tags.items()):
        raw = np.asarray(values, order + KINDS[kind]).tobytes()
        count = len(raw) // np.dtype(KINDS[kind]).itemsize // (2 if kind == 5 else 1)
        if len(raw) > word:
            place = struct.pack(order + number, len(body))
            body += raw + bytes(len(raw) % 2)
            raw = place
        entries += struct.pack(f"{order}HH{number}", tag, kind, count) + raw.ljust(word, b"\0")
    body[word : 2 * word] = struct.pack(order + number, len(body))
    return bytes(body + struct.pack(order + many, len(tags)) + entries + bytes(word))


def _unpack(chunk, compression, rows, length, reverse):
    """A strip or tile as uint8 (rows, length)."""
    if compression in DEFLATE:
        chunk = zlib.decompressobj().decompress(chunk, rows * length)
    elif compression != NONE or reverse:  # a grey picture of bytes, for PIL
        tags = {256: length, 257: rows, 258: 8, 259: compression, 262: 1, 273: 8, 277: 1, 278: rows, 279: len(chunk)}
        tags = {tag: (4, [value]) for tag, value in (tags | {266: 2 if reverse else 1}).items()}
        with Image.open(io.BytesIO(write_tiff(b"II*\0" + bytes(4) + chunk, tags))) as image:
            return np.array(image)
    if len(chunk) < rows * length:
        raise ValueError("is cut off")
    return np.frombuffer(chunk, np.uint8, rows * length).reshape(rows, length)


def _numbers(raw, dtype, bits, per, predictor):
    """Rows of bytes (rows, length) -> (rows, pixels, per)."""
    rows = len(raw)
    if bits % 8:
        unpacked = np.unpackbits(raw, axis=1)[:, : raw.shape[1] * 8 // (bits * per) * bits * per]
        values = np.zeros((rows, unpacked.shape[1] // bits), np.uint16)
        for i in range(bits):
            values = values << 1 | unpacked[:, i::bits]
        return values.reshape(rows, -1, per)
    if predictor == 3:  # the bytes of a row, highest first, and differences of all of them
        raw = np.cumsum(raw.reshape(rows, -1, per), 1, np.uint8).reshape(rows, bits // 8, -1)
        return np.ascontiguousarray(raw.swapaxes(1, 2)).view(dtype.newbyteorder(">")).reshape(rows, -1, per)
    values = np.ascontiguousarray(raw).view(dtype).reshape(rows, -1, per)
    return np.cumsum(values, 1, dtype.newbyteorder("=")) if predictor == 2 else values


def _read_tiff(data, channels):
    """None for 8 bits per value in up to 4 bands, unless bands are wanted that PIL drops."""
    pages = tiff_pages(data)
    if not pages or not {256, 257} <= pages[0].keys():
        return None
    tags = {tag: values.astype(np.int64).tolist() for tag, (_, values) in pages[0].items()}
    (width,), (height,), (bands,) = tags[256][:1], tags[257][:1], tags.get(277, [1])[:1]
    each, kind, ink, packing = (tags.get(tag, [1]) for tag in (258, 339, 262, 259))
    bits, ink, packing, extra = max(each), ink[0], packing[0], tags.get(338, [])
    kind = "f" if kind[0] == 3 else "i" if kind[0] == 2 else "u"
    readable = ink in (0, 1, 2, 5) and packing in (NONE, LZW, *DEFLATE, *PACKED) and min(each) == bits
    known = bands <= (2 if ink < 2 else 4) and (channels in (1, 3) or not readable)
    if bits <= 8 and kind == "u" and (known or bits < 8):
        return None
    if not readable or bits > 64 or set(map(str, tags.get(339, []))) & {"5", "6"} or (bits % 8 and bits > 16):
        what = f"{bands} bands of {bits} bits, compression {packing}, photometric {ink}"
        raise ValueError(f"is a TIFF of a kind that is not read ({what}): {REMEDY}")
    check_size(height, width)
    order = "<" if data[:1] == b"I" else ">"
    dtype = np.dtype(f"{order}{kind}{bits // 8}") if bits % 8 == 0 and bits in (8, 16, 32, 64) else np.dtype("u2")
    if bits % 8 == 0 and dtype.itemsize * 8 != bits:
        raise ValueError(f"holds {bits} bits per value: {REMEDY}")
    planes, per = (bands, 1) if tags.get(284, [1])[0] == 2 else (1, bands)
    tiled = 322 in tags
    wide, high = (tags[322][0], tags[323][0]) if tiled else (width, min(height, tags.get(278, [height])[0]))
    across, down, length = -(-width // wide), -(-height // high), -(-wide * per * bits // 8)
    places = tags[324 if tiled else 273]
    sizes = tags.get(325 if tiled else 279, [high * length] * len(places))
    if len(places) < planes * across * down or len(sizes) < len(places):
        raise ValueError("is cut off")
    values = np.zeros((height, width, bands), dtype.newbyteorder("="))
    reverse, predictor = tags.get(266, [1])[0] == 2, tags.get(317, [1])[0] if packing != NONE else 1
    for i in range(planes * across * down):
        plane, place = divmod(i, across * down)
        top, left = place // across * high, place % across * wide
        rows = high if tiled else min(high, height - top)
        part = _unpack(data[places[i] : places[i] + sizes[i]], packing, rows, length, reverse)
        part = _numbers(part, dtype, bits, per, predictor)[: height - top, : width - left]
        values[top : top + high, left : left + wide, plane * (planes > 1) :][..., :per] = part[:, :width]
    white = 0 if bits > 16 or kind == "f" else 255 if bits == 8 else 65535 if kind == "i" else 2**bits - 1
    return _meant(values, white, ink, extra, channels, tags.get(274, [1])[0])


def _meant(values, white, ink, extra, channels, turn):
    """The Pixels of a TIFF's values (H, W, bands), by what the bands are."""
    bands = values.shape[2]
    if ink == 0:
        if not white or values.dtype.kind != "u":
            raise ValueError(f"has white as 0 in numbers of this type: {REMEDY}")
        values = np.concatenate([white - values[..., :1], values[..., 1:]], 2).astype(values.dtype)
    colours = {2: 3, 5: 4}.get(ink, 1)
    alpha = {1: 2, 2: 1}.get(extra[0], 0) if extra and bands > colours else int(bands == colours + 1 and ink != 5)
    if bands == channels:
        return Pixels(values, white, 0, turn)
    if ink == 5 and bands >= 4 and white:
        inks = values[..., :4].astype(np.float32) / white
        return Pixels((1 - inks[..., :3]) * (1 - inks[..., 3:]), 1, 0, turn)
    if ink == 2 or bands <= 2:
        return Pixels(values[..., : colours + (alpha > 0)], white, alpha, turn)
    return Pixels(values, white, 0, turn)  # bands of no known colour


def without_metadata(data):
    """A picture with nothing but what its pixels need, for a reader that stumbles over the rest; None of other formats.
    What is broken in the pixels stays so."""
    if data.startswith(PNG):
        kept = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
        return data[:8] + b"".join(data[a:b] for name, a, b in png_chunks(data) if name in kept or b > len(data))
    if data.startswith(TIFF) and (pages := tiff_pages(data)):
        return write_tiff(data, pages[0])
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        body, at = b"WEBP", 12
        while at + 8 <= len(data):
            name, end = data[at : at + 4], at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            flags = [data[at + 8] & ~0x2C] if name == b"VP8X" else []  # colour profile, EXIF, XMP
            body += b"" if name in (b"ICCP", b"EXIF", b"XMP ") else data[at : at + 8] + bytes(flags)
            body += b"" if name in (b"ICCP", b"EXIF", b"XMP ") else data[at + 8 + len(flags) : end + end % 2]
            at = end + end % 2
        return b"RIFF" + len(body).to_bytes(4, "little") + body
    if data.startswith(b"\xff\xd8"):
        body, at = data[:2], 2
        while data[at : at + 1] == b"\xff" and data[at + 1] not in (0xDA, 0xFF):
            marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            content = data[at + 4 : end]
            colours = (marker == 0xEE and len(content) >= 12) or (marker == 0xE1 and content.startswith(b"Exif"))
            body += data[at:end] if colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE) else b""
            at = end
        return body + data[at:]
    return None
