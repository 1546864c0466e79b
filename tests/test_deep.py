"""Images of more than 8 bits or of many bands: every value as it was written, at one scale, or a line that says why."""

import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets import Files, open_dataset
from common.deep import upright
from common.images import BadImage, decode, to_tensor
from tests.helpers import deep_png, encode

GENERATOR = np.random.default_rng(0)


def lzw(raw):
    """Bytes as PIL compresses them."""
    content = encode(np.frombuffer(raw, np.uint8)[None], "TIFF", compression="tiff_lzw")
    with Image.open(__import__("io").BytesIO(content)) as image:
        (at,), (size,) = image.tag_v2[273], image.tag_v2[279]
    return content[at : at + size]


def packed(raw):
    """Bytes in PackBits without runs."""
    return b"".join(bytes([len(raw[i : i + 128]) - 1]) + raw[i : i + 128] for i in range(0, len(raw), 128))


PACK = {1: bytes, 5: lzw, 8: zlib.compress, 32773: packed}


def differences(part, predictor):
    """Rows (h, w, c) as TIFF's predictors store them, in bytes."""
    if predictor == 2:
        return np.diff(part, axis=1, prepend=part.dtype.type(0)).astype(part.dtype).tobytes()
    if predictor == 3:
        rows, _, per = part.shape
        raw = part.astype(part.dtype.newbyteorder(">")).reshape(rows, -1, 1).view(np.uint8).swapaxes(1, 2)
        raw = raw.reshape(rows, -1, per)
        return np.diff(raw, axis=1, prepend=np.uint8(0)).astype(np.uint8).tobytes()
    return part.tobytes()


def tiff(values, ink=None, extra=(), order="<", pack=1, rows=7, tile=0, planar=False, predictor=1, big=False, **more):
    """The bytes of a TIFF of values (H, W, c). more: further tags as t<number>=value, with bits=n of integers that are
    packed."""
    values = np.atleast_3d(values)
    values = values.astype(values.dtype.newbyteorder(order))
    height, width, bands = values.shape
    bits = more.pop("bits", values.dtype.itemsize * 8)
    parts = np.split(values, bands, 2) if planar else [values]
    if tile:
        corners = list(itertools.product(range(0, height, tile), range(0, width, tile)))
        padded = [np.pad(p, ((0, -height % tile), (0, -width % tile), (0, 0))) for p in parts]
        parts = [p[y : y + tile, x : x + tile] for p in padded for y, x in corners]
    else:
        parts = [p[y : y + rows] for p in parts for y in range(0, height, rows)]
    if bits % 8:
        planes = [((p.astype(np.uint16)[..., None] >> np.arange(bits)[::-1]) & 1).astype(np.uint8) for p in parts]
        chunks = [np.packbits(p.reshape(len(p), -1), axis=1).tobytes() for p in planes]
    else:
        chunks = [differences(np.ascontiguousarray(p), predictor) for p in parts]
    chunks = [PACK[pack](c) for c in chunks]
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    ink = (2 if bands >= 3 else 1) if ink is None else ink
    tags = {256: width, 257: height, 258: [bits] * bands, 259: pack, 262: ink, 277: bands, 284: 2 if planar else 1}
    tags |= {317: predictor, 339: [kind] * bands} | ({338: list(extra)} if extra else {})
    head = 16 if big else 8
    places = [head + sum(map(len, chunks[:i])) for i in range(len(chunks))]
    tags |= {322: tile, 323: tile} if tile else {278: rows}
    tags |= {324 if tile else 273: places, 325 if tile else 279: [len(c) for c in chunks]}
    tags |= {int(name[1:]): value for name, value in more.items()}
    word, long, count = (8, "Q", "Q") if big else (4, "I", "H")
    start = head + sum(map(len, chunks))
    body, entries = b"", b""
    behind = start + struct.calcsize(order + count) + len(tags) * (20 if big else 12) + word
    for tag, value in sorted(tags.items()):
        value = value if isinstance(value, list) else [value]
        raw = struct.pack(f"{order}{len(value)}I", *value)
        if len(raw) > word:
            place = behind + len(body)
            body, raw = body + raw, struct.pack(order + long, place)
        entries += struct.pack(f"{order}HH{long}", tag, 4, len(value)) + raw.ljust(word, b"\0")
    mark = b"II" if order == "<" else b"MM"
    mark += struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, start) if big else (42, start)))
    return mark + b"".join(chunks) + struct.pack(order + count, len(tags)) + entries + bytes(word) + body


def values(kind, bands, shape=(21, 34)):
    """Numbers of a type, with its smallest and largest among them."""
    dtype = np.dtype(kind).newbyteorder("=")
    if dtype.kind == "f":
        array = GENERATOR.random((*shape, bands)).astype(dtype)
        array.flat[:2] = 0, 1
    else:
        array = GENERATOR.integers(0, np.iinfo(dtype).max, (*shape, bands), dtype, endpoint=True)
    return array


def expect(found, numbers, scale):
    """The image found is these numbers times a scale, grey in all its channels."""
    np.testing.assert_allclose(found, np.broadcast_to(numbers.astype(float) * scale, found.shape), rtol=1e-6)


def one(tmp_path, content, name="a.tif", channels=3):
    """The only image of a data set, as float64 (H, W, C), and the set."""
    (tmp_path / name).write_bytes(content)
    dataset = open_dataset(tmp_path, "train", channels=channels)
    return dataset[0][0].permute(1, 2, 0).double().numpy(), dataset


# -------------------------------------------------------------------------------------------------- TIFF, layouts
LAYOUTS = {
    "strips": {},
    "one strip": {"rows": 21},
    "big-endian": {"order": ">"},
    "tiles": {"tile": 16},
    "planes": {"planar": True},
    "planes of tiles, big-endian": {"planar": True, "tile": 16, "order": ">"},
    "lzw": {"pack": 5},
    "lzw tiles": {"pack": 5, "tile": 16},
    "lzw differences": {"pack": 5, "predictor": 2},
    "deflate": {"pack": 8},
    "deflate differences": {"pack": 8, "predictor": 2},
    "deflate differences, tiles, big-endian": {"pack": 8, "predictor": 2, "tile": 16, "order": ">"},
    "packbits planes": {"pack": 32773, "planar": True},
    "bigtiff": {"big": True},
    "bigtiff big-endian lzw": {"big": True, "order": ">", "pack": 5},
}


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bit_tiff_in_every_layout(tmp_path, layout, bands):
    written = values("u2", bands)
    found, dataset = one(tmp_path, tiff(written, **LAYOUTS[layout]))
    assert dataset.dtype == torch.float32 and dataset.white == 0
    expect(found, written, 1 / 257)


@pytest.mark.parametrize("layout", ["strips", "tiles", "planes", "bigtiff", "lzw differences", "big-endian"])
@pytest.mark.parametrize("bands", [3, 4, 5, 12])
@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_bands_stay_as_they_are(tmp_path, kind, bands, layout):
    """Whatever the file says that they are: RGB and infrared, or nothing."""
    written = values(kind, bands)
    for ink, extra in ((2, [0] * (bands - 3)), (1, [0] * (bands - 1))):
        how = LAYOUTS[layout] | ({"predictor": 1} if kind == "f4" else {})
        found, _ = one(tmp_path, tiff(written, ink, extra, **how), channels=bands)
        expect(found, written, {"u1": 1, "u2": 1 / 257, "f4": 255}[kind])


@pytest.mark.parametrize("predictor", [1, 3])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
@pytest.mark.parametrize("bands", [1, 3])
def test_floats(tmp_path, kind, bands, order, predictor):
    written = values(kind, bands)
    found, dataset = one(tmp_path, tiff(written, pack=8, order=order, predictor=predictor, tile=16))
    assert dataset.white == 1 and dataset.dtype == torch.float32
    expect(found, written, 255)


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
@pytest.mark.parametrize("bands", [1, 3])
def test_bits_between_8_and_16(tmp_path, bits, bands):
    written = values("u2", bands) >> (16 - bits)
    found, _ = one(tmp_path, tiff(written, bits=bits))
    expect(found, written, 255 / (2**bits - 1))


def test_white_as_zero_inks_and_orientation(tmp_path):
    written = values("u2", 1)
    found, _ = one(tmp_path, tiff(written, ink=0), channels=1)
    np.testing.assert_allclose(found, 255 - written / 257, atol=1e-4)
    inks = values("u2", 4)
    found, _ = one(tmp_path, tiff(inks, ink=5))
    np.testing.assert_allclose(found, 255 * (1 - inks[..., :3] / 65535) * (1 - inks[..., 3:] / 65535), atol=1e-3)
    small = np.arange(6).reshape(2, 3, 1)
    for turn in range(1, 9):  # the same as of a picture of 8 bits, which PIL turns
        exif = Image.Exif()
        exif[0x0112] = turn
        picture = decode(encode(small[..., 0].astype(np.uint8), "PNG", exif=exif), 1)
        found, _ = one(tmp_path, tiff((small * 257).astype(np.uint16), t274=turn), channels=1)
        np.testing.assert_allclose(found[..., 0], picture[0], rtol=1e-6)
        assert np.array_equal(upright(small, turn)[..., 0], picture[0])


@pytest.mark.parametrize("bands", [2, 4])
@pytest.mark.parametrize("kind", ["png", "tiff", "tiff multiplied"])
def test_opacity_of_16_bits(tmp_path, kind, bands):
    """Lies over white, or stays where it is asked for."""
    written = values("u2", bands)
    colour, opacity = written[..., :-1].astype(float) / 65535, written[..., -1:] / 65535
    if kind == "tiff multiplied":
        written[..., :-1] = (written[..., :-1] * opacity).astype(np.uint16)
    content = deep_png(written) if kind == "png" else tiff(written, extra=[2 if kind == "tiff" else 1])
    expected = 255 * (colour * opacity + 1 - opacity)
    name = "a.png" if kind == "png" else "a.tif"
    for channels in (1, 3):
        found, _ = one(tmp_path, content, name, channels)
        grey = expected @ [[0.299], [0.587], [0.114]] if bands == 4 and channels == 1 else expected
        np.testing.assert_allclose(found, np.broadcast_to(grey, found.shape), atol=0.01)
    found, _ = one(tmp_path, content, name, bands)
    np.testing.assert_allclose(found, written / 257, rtol=1e-6)


def test_extra_bands_are_no_colours(tmp_path):
    """Red, green, blue and infrared are seen in three channels; five bands of nothing known are refused."""
    written = values("u2", 4)
    found, _ = one(tmp_path, tiff(written, 2, [0]))
    np.testing.assert_allclose(found, written[..., :3] / 257, rtol=1e-6)
    (tmp_path / "a.tif").write_bytes(tiff(values("u1", 5), 1, [0] * 4))
    with pytest.raises(BadImage, match=r"a\.tif: has 5 channels, expected 3 \(--channels\)"):
        Files(tmp_path, ["a.tif"])[0]


# ------------------------------------------------------------------------------------------------------ one scale
@pytest.mark.parametrize(
    "kind, tops, white",
    [
        ("f4", (0.25, 0.5, 1), 1),
        ("f4", (0.5, 2, 255), 255),
        ("f4", (0.5, 200, 4000), 65535),
        ("u4", (1, 200, 255), 255),
        ("u4", (100, 300, 65535), 65535),
        ("i4", (100, 255, 256), 65535),
        ("u2", (1, 255, 1000), 65535),
        ("i2", (1, 255, 1000), 65535),
        ("i1", (1, 50, 100), 255),
    ],
)
def test_all_images_of_a_set_have_one_scale(tmp_path, capsys, kind, tops, white):
    """Ramps of different heights keep their relations; before, each was judged by its own largest value."""
    for i, top in enumerate(tops):
        (tmp_path / f"{i}.tif").write_bytes(tiff(np.linspace(0, top, 30).astype(kind).reshape(5, 6)))
    dataset = open_dataset(tmp_path, "train", channels=1)
    for i, top in enumerate(tops):
        assert dataset[i][0].max().item() == pytest.approx(255 * top / white, rel=1e-5)
    said = f"{white} is white in its images of 32 bits or floats" in capsys.readouterr().out
    assert said == (kind[1] == "4")
    if white < 65535 and kind[1] == "4":
        (tmp_path / "3.tif").write_bytes(tiff(np.full((5, 6), 2 * white).astype(kind)))
        dataset.names = Files(tmp_path, ["3.tif"]).names
        with pytest.raises(
            BadImage, match=rf"3\.tif: holds values from {2 * white}.*all images alike to \[0, {white}\]"
        ):
            dataset[0]


@pytest.mark.parametrize("name", ["a.tif", "a.npy", "a.pfm"])
@pytest.mark.parametrize(
    "odd, said", [(np.nan, "not finite"), (np.inf, "not finite"), (-1, "values from -1"), (9e5, "9")]
)
def test_numbers_that_are_no_brightness(tmp_path, name, odd, said):
    written = np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)
    written[2, 3] = odd
    contents = {"a.tif": lambda: tiff(written), "a.pfm": lambda: b"Pf\n6 5\n-1.0\n" + written[::-1].tobytes()}
    if name == "a.npy":
        np.save(tmp_path / name, written)
    else:
        (tmp_path / name).write_bytes(contents[name]())
    with pytest.raises(BadImage, match=rf"{name}: .*{said}"):
        open_dataset(tmp_path, "train")[0]


def test_negative_integers_are_named(tmp_path):
    for kind in ("i1", "i2", "i4"):
        (tmp_path / "a.tif").write_bytes(tiff(np.full((3, 4), -5, kind)))
        with pytest.raises(BadImage, match="holds values from -5 to -5: scale all images alike"):
            open_dataset(tmp_path, "train")[0]


def test_pil_images_of_a_users_set():
    """Integers up to 65535, floats up to 1."""
    for array, scale in ((np.arange(6, dtype=np.uint16), 1 / 257), (np.arange(6, dtype=np.int32) * 9000, 1 / 257)):
        image = Image.fromarray(array.reshape(2, 3))
        np.testing.assert_allclose(to_tensor(image, 1, torch.float32)[0], array.reshape(2, 3) * scale, rtol=1e-6)
    floats = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_allclose(to_tensor(Image.fromarray(floats), 1, torch.float32)[0], 255 * floats, rtol=1e-6)
    with pytest.raises(ValueError, match=r"values from 0 to 2: .*\[0, 1\]"):
        to_tensor(Image.fromarray(2 * floats))


# -------------------------------------------------------------------------------------------------- other formats
@pytest.mark.parametrize("top", [256, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_pnm_of_more_than_8_bits(tmp_path, kind, top):
    written = values("u2", 3 if kind in ("P3", "P6") else 1) % np.uint32(top + 1)
    written = written.astype(np.uint16)
    written.flat[:2] = 0, top
    head = f"{kind}\n# a comment\n34 21 # width and height\n{top}\n".encode()
    text = " ".join(map(str, written.ravel())).encode()
    found, dataset = one(tmp_path, head + (text if kind in ("P2", "P3") else written.astype(">u2").tobytes()), "a.pnm")
    assert dataset.dtype == torch.float32
    expect(found, written, 255 / top)


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("order", "<>")
def test_pfm(tmp_path, bands, order):
    written = values("f4", bands)
    head = f"{'PF' if bands == 3 else 'Pf'}\n34 21\n{'-' if order == '<' else ''}1.0\n".encode()
    found, dataset = one(tmp_path, head + written[::-1].astype(f"{order}f4").tobytes(), "a.pfm")
    assert dataset.white == 1
    expect(found, written, 255)


@pytest.mark.parametrize("bands", [1, 3])
def test_png_with_a_transparent_colour(tmp_path, bands):
    written = values("u2", bands)
    content = deep_png(written)
    body = b"tRNS" + b"\0\0" * (bands == 0) + written[4, 5].astype(">u2").tobytes()
    at = content.index(b"IDAT") - 4
    content = content[:at] + struct.pack(">I", 2 * bands) + body + struct.pack(">I", zlib.crc32(body)) + content[at:]
    found, _ = one(tmp_path, content, "a.png")
    expected = np.broadcast_to(written / 257, found.shape).copy()
    expected[(written == written[4, 5]).all(2)] = 255
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_jpeg_2000(tmp_path):
    grey = values("u2", 1, (32, 40))[..., 0]
    found, _ = one(tmp_path, encode(grey, "JPEG2000"), "a.jp2", 1)
    np.testing.assert_allclose(found[..., 0], grey / 257, rtol=1e-6)
    for content in (
        encode(values("u1", 3, (32, 40)), "JPEG2000"),
        encode(values("u1", 3, (32, 40)), "JPEG2000", no_jp2=True),
    ):
        assert decode(content).shape == (3, 32, 40)
        at = content.index(b"\xff\x4f\xff\x51") + 42  # the sizes of the values
        deep = content[:at] + b"\x0f\1\1" * 3 + content[at + 9 :]
        (tmp_path / "b.jp2").write_bytes(deep)
        with pytest.raises(BadImage, match="holds 3 bands of 16 bits, which PIL cuts: convert it to a PNG"):
            Files(tmp_path, ["b.jp2"])[0]


@pytest.mark.parametrize("kind", [">u2", "<f8", ">f4", "f2"])
@pytest.mark.parametrize("columns", [False, True])
def test_arrays_of_any_order(tmp_path, kind, columns):
    written = values(kind, 3)
    np.save(tmp_path / "a.npy", np.asarray(written, kind, order="F" if columns else "C"))
    found = open_dataset(tmp_path, "train")[0][0].permute(1, 2, 0)
    expect(found.numpy(), written, 255 if "f" in kind else 1 / 257)


# -------------------------------------------------------------------------------------------------------- refused
WHOLE = tiff(values("u2", 3), pack=8)
REFUSED = {
    "LogLuv": (
        tiff(values("u2", 3), ink=32845),
        "kind that is not read (3 bands of 16 bits, compression 1, photometric",
    ),
    "jpeg of 12 bits": (tiff(values("u2", 1), t259=7), "compression 7"),
    "complex": (tiff(values("f4", 1), t339=6), "not read"),
    "24 bits": (tiff(values("u4", 1), t258=24), "holds 24 bits per value: convert it to a PNG"),
    "mixed bits": (tiff(values("u2", 3), t258=[16, 8, 8]), "not read"),
    "cut off": (WHOLE[: len(WHOLE) // 3], ""),
    "strip cut off": (tiff(values("u2", 1), t279=[100] * 3), "is cut off"),
    "strip behind the end": (tiff(values("u2", 1), t273=[10**6] * 3), "is cut off"),
    "strip missing": (tiff(values("u2", 1), t273=[8]), "is cut off"),
    "deflate damaged": (WHOLE[:200] + bytes(200) + WHOLE[400:], ""),
    "enormous": (
        tiff(values("u2", 1), t256=10**6, t257=10**6),
        "has 1,000,000 million pixels, the limit is 179 million",
    ),
    "pgm cut off": (b"P5 34 21 65535\n" + bytes(100), ""),
    "pgm enormous": (b"P5 900000 900000 65535\n" + bytes(100), "the limit is 179 million"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_named(tmp_path, kind):
    content, said = REFUSED[kind]
    (tmp_path / "a.tif").write_bytes(content)
    for channels in (1, 3):
        with pytest.raises(BadImage, match=r"a\.tif: ") as error:
            Files(tmp_path, ["a.tif"], channels=channels)[0]
        assert said in str(error.value) and "\n" not in str(error.value)
