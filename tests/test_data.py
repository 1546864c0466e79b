"""The loader's promises, every kind of image and of `--data`, and what happens when something is wrong."""

import io
import os
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common import augment, data
from common.augment import EvalView, View
from common.data import Loader, build, decode, eval_batches

VIEW = View(
    24, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, blur_sigma=(0.1, 2.0), solarize_p=0.2
)
SMALL = View(16, crop=(0.05, 0.3), interpolation="bicubic", solarize_p=0.3)


def pixels(seed, height=40, width=56):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    noise = rng.integers(-15, 16, (height, width, 3))
    return (np.asarray(coarse.resize((width, height), Image.BICUBIC)) + noise).clip(0, 255).astype(np.uint8)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed=0, **options):
    return encode(Image.fromarray(pixels(seed)), "JPEG", **options)


def fill(folder, names, seed=0):
    """Writes one small image under every name, each different and of its own size."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed + i, 30 + 3 * (i % 5), 40 + 2 * (i % 7))).save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """26 images of two classes, JPEG and PNG in turn."""
    names = [f"{'ab'[i % 2]}/{i:02}.{('jpg', 'png')[i % 3 == 0]}" for i in range(26)]
    return build(str(fill(tmp_path_factory.mktemp("images") / "train", names).parent), "train")


def seen(loader, epoch=0, start=0, order=None):
    """All micro-batches of an epoch: lists of indices, labels, and per view the uint8 crops and the final floats."""
    return [
        [b.indices, b.labels, *[x.clone() for x in b.images], *b.views()] for b in loader.epoch(epoch, start, order)
    ]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
    )


def merged(parts):
    """Micro-batches one after the other."""
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def refuses(capsys, function, *args, **kwargs):
    """The one line on stderr with which `function` exits 2."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **kwargs)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
    return err


# ------------------------------------------------------------------------------------------------- exactness
def test_workers_do_not_change_anything(images):
    runs = [seen(Loader(images, [VIEW, SMALL], 8, seed=1, workers=w), epoch=3) for w in (0, 1, 4)]
    assert len(runs[0]) == 3 and runs[0][0][4].shape == (8, 3, 24, 24) and runs[0][0][5].shape == (8, 3, 16, 16)
    assert equal(runs[0], runs[1]) and equal(runs[0], runs[2])


@pytest.mark.parametrize("processes, accum", [(2, 1), (4, 1), (1, 2), (2, 2), (1, 8), (2, 4)])
def test_processes_and_accumulation_share_the_same_batches(images, monkeypatch, processes, accum):
    """The micro-batches of all ranks, in the order of micro-step and rank, are the batch of a single process."""
    alone = seen(Loader(images, [VIEW, SMALL], 8, seed=1, workers=2), epoch=1)
    monkeypatch.setattr(data, "world_size", lambda: processes)
    ranks = []
    for rank in range(processes):
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        loader = Loader(images, [VIEW, SMALL], 8, seed=1, workers=2, accum=accum)
        assert loader.steps == 3 and loader.local == 8 // processes // accum
        ranks.append(seen(loader, epoch=1))
        assert len(ranks[-1]) == 3 * accum
    together = [
        merged([ranks[r][step * accum + micro] for micro in range(accum) for r in range(processes)])
        for step in range(3)
    ]
    assert equal(together, alone)


@pytest.mark.parametrize("accum", [1, 2])
def test_epoch_can_start_in_the_middle(images, accum):
    loader = Loader(images, [VIEW], 8, seed=1, workers=2, accum=accum)
    whole = seen(loader, epoch=2)
    assert equal(seen(Loader(images, [VIEW], 8, seed=1, workers=2, accum=accum), 2, start=1), whole[accum:])
    assert seen(loader, epoch=2, start=3) == []


def test_epoch_visits_every_sample_at_most_once_and_in_a_new_order(images):
    loader = Loader(images, [VIEW], 8, seed=1, workers=0)
    orders = [loader.order(epoch) for epoch in (0, 1)] + [Loader(images, [VIEW], 8, seed=2, workers=0).order(0)]
    for order in orders:
        assert sorted(order) == list(range(26))
    assert len({tuple(order) for order in orders}) == 3
    visited = torch.cat([batch[0] for batch in seen(loader)])
    assert visited.tolist() == loader.order(0)[:24].tolist()  # two are left over: no whole batch
    labels = torch.cat([batch[1] for batch in seen(loader)])
    assert labels.tolist() == images.labels[visited].tolist()


def test_crops_follow_seed_epoch_sample_and_view_and_nothing_else(images):
    def crops(seed, epoch, order):
        """{sample: its crops in both views}"""
        batches = seen(Loader(images, [VIEW, VIEW], 4, seed=seed, workers=0), epoch, order=order)
        return {int(i): (x, y) for b in batches for i, x, y in zip(b[0], b[2], b[3], strict=True)}

    first = crops(0, 0, [3, 1, 4, 15])
    moved = crops(0, 0, [9, 2, 6, 5, 15, 3, 4, 1])  # other positions, other neighbours
    for i, (x, y) in first.items():
        assert torch.equal(x, moved[i][0]) and torch.equal(y, moved[i][1])
        assert not torch.equal(x, y)  # the same recipe, drawn anew for the second view
        for other in (crops(1, 0, [3, 1, 4, 15]), crops(0, 1, [3, 1, 4, 15])):
            assert not torch.equal(x, other[i][0])


def test_sample_that_comes_up_twice_is_augmented_differently(images):
    loader = Loader(images, [VIEW], 4, seed=0, workers=2)
    order = [5, 7, 5, 5, 7, 5, 0, 1]
    a, b = seen(loader, order=order)
    assert torch.cat([a[0], b[0]]).tolist() == order
    crops = torch.cat([a[2], b[2]])[[0, 2, 3, 5]]
    assert all(not torch.equal(crops[i], crops[j]) for i in range(4) for j in range(i))
    plain = seen(loader, order=[5, 1, 2, 3])[0]
    assert torch.equal(plain[2][0], crops[0])  # the first time is as if it came up once
    assert equal(seen(loader, order=order, start=1), [b])


def test_batch_is_the_plan_applied_to_the_crops(images):
    """One batch put together by hand from the functions of common/augment.py."""
    indices, labels, crops, views = seen(Loader(images, [VIEW], 8, seed=4, workers=2), epoch=6)[1]
    u = augment.uniforms(4, 6, indices.numpy(), 0, augment.DRAWS)
    decoded = [images[i] for i in indices.tolist()]
    for row, (image, label) in enumerate(decoded):
        box = augment.crop_box(u[row].tolist(), *image.shape[1:], VIEW)
        assert torch.equal(crops[row], augment.crop_resize(image, box, 24)) and labels[row] == label
    steps = [(name, torch.from_numpy(rows), torch.from_numpy(x)) for name, rows, x in augment.plan(VIEW, u)]
    assert torch.equal(views, augment.augment(crops, steps, VIEW.mean, VIEW.std))


# ----------------------------------------------------------------------------------------- bounded, and clean
class Counting:
    """Remembers which samples have been asked for; waits at `gate` from the `free`-th on."""

    def __init__(self, n, gate=None, free=0):
        self.n, self.asked, self.gate, self.free = n, [], gate, free

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.asked.append(i)
        if self.gate and len(self.asked) > self.free:
            self.gate.wait(60)
        return torch.full((3, 8, 8), i % 256, dtype=torch.uint8), i


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_three_batches_exist_however_large_the_set(monkeypatch, workers):
    slots = []

    class Slot(data._Slot):
        def __init__(self):
            super().__init__()
            slots.append(self)

    monkeypatch.setattr(data, "_Slot", Slot)
    dataset = Counting(4000)
    addresses = set()
    for step, batch in enumerate(Loader(dataset, [View(8)], 50, workers=workers).epoch(0), 1):
        addresses.add(batch.images[0].data_ptr())
        assert len(dataset.asked) <= 50 * (step + (data.AHEAD if workers else 0))
    assert step == 80 and len(dataset.asked) == 4000
    assert len(addresses) == len(slots) == (data.AHEAD + 1 if workers else 1)
    assert all(slot.images[0].numel() == 50 * 8 * 8 * 3 for slot in slots)


def test_leaving_an_epoch_early_stops_the_threads():
    gate = threading.Event()
    dataset = Counting(1000, gate, free=100)
    loader = Loader(dataset, [View(8)], 100, workers=1)
    batches = loader.epoch(0)
    next(batches)
    batches.close()
    gate.set()
    loader.pool.threads.shutdown(wait=True)
    assert len(dataset.asked) <= 100 + 8  # the piece in hand, not the 200 that were ahead


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_dataset_reaches_the_caller(workers):
    class Broken(Counting):
        def __getitem__(self, i):
            if i == 13:
                raise KeyError("thirteen")
            return super().__getitem__(i)

    with pytest.raises(KeyError, match="thirteen"):
        for _ in Loader(Broken(64), [View(8)], 16, workers=workers).epoch(0):
            pass


def test_loading_threads_leave_the_number_of_threads_alone():
    """In a thread of its own, which like a script's main thread may not have computed anything before."""
    found = []

    def script():
        torch.set_num_threads(2)
        for _ in Loader(Counting(64), [View(8)], 16, workers=2).epoch(0):
            pass
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=script)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    assert found == [2]


class Photos:
    """A dataset as a user would write it: PIL images of several modes, NumPy labels."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        image = Image.fromarray(pixels(i))
        return image.convert(["RGB", "L", "RGBA", "P"][i % 4]), np.int64(i)


def test_users_own_dataset_of_pil_images():
    batches = seen(Loader(Photos(), [VIEW], 4, seed=0, workers=2), epoch=0)
    for indices, labels, crops, _ in batches:
        assert torch.equal(indices, labels)
        u = augment.uniforms(0, 0, indices.numpy(), 0, augment.DRAWS)
        for row, i in enumerate(indices.tolist()):
            image = torch.from_numpy(np.array(Photos()[i][0].convert("RGB"))).permute(2, 0, 1)
            box = augment.crop_box(u[row].tolist(), 40, 56, VIEW)
            assert torch.equal(crops[row], augment.crop_resize(image, box, 24))


# ------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_evaluation_covers_every_sample_once(monkeypatch, n, processes):
    monkeypatch.setattr(data, "world_size", lambda: processes)
    order, sizes = [], []
    for rank in range(processes):
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        for x, labels, indices in eval_batches(Counting(n), EvalView(8, mean=(0, 0, 0), std=(1, 1, 1)), 4, "cpu", 2):
            assert x.shape == (len(indices), 3, 8, 8) and len(indices) <= 4
            assert torch.equal(labels, indices) and torch.equal((x[:, 0, 0, 0] * 255).round().long(), indices)
            order += indices.tolist()
            sizes.append(len(indices))
    assert order == list(range(n))
    assert processes > 1 or sizes == {1: [1], 3: [3], 10: [4, 4, 2]}[n]


def test_evaluation_pixels(images):
    view = EvalView(24, resize=28, mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.125))
    several, alone = (list(eval_batches(images, view, 7, "cpu", workers)) for workers in (3, 0))
    assert equal(several, alone) and sum(len(batch[2]) for batch in alone) == 26
    for x, labels, indices in several:
        for row, i in enumerate(indices.tolist()):
            image, label = images[i]
            expected = augment.center_crop(image, view)[None] / 255
            expected = (expected - torch.tensor(view.mean).view(3, 1, 1)) / torch.tensor(view.std).view(3, 1, 1)
            torch.testing.assert_close(x[row], expected[0], atol=1e-5, rtol=1e-5)
            assert labels[row] == label
    doubles = next(iter(eval_batches(images, view, 7, "cpu", 0, torch.float64)))[0]
    assert doubles.dtype == torch.float64


# ---------------------------------------------------------------------------------------------- kinds of images
def png(array, colour_type):
    """A 16-bit PNG of uint16 (H, W, C), which PIL cannot write."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = array.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def rotated(image, orientation, kind, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif, **options)


def without_adobe(content):
    """A JPEG without its Adobe segment; that the inks are stored inverted has to be assumed then, as PIL does."""
    at = content.index(b"\xff\xee")
    return content[:at] + content[at + 2 + struct.unpack(">H", content[at + 2 : at + 4])[0] :]


def kinds():
    rgb = Image.fromarray(pixels(0))
    alpha = np.random.default_rng(1).integers(0, 256, (40, 56), dtype=np.uint8)
    rgba, grey, palette = rgb.copy(), rgb.convert("L"), rgb.quantize(32)
    rgba.putalpha(Image.fromarray(alpha))
    la = grey.copy()
    la.putalpha(Image.fromarray(alpha))
    moving = [Image.fromarray(pixels(i)) for i in (5, 6)]
    return {
        "jpeg": jpeg(quality=90),
        "jpeg 4:4:4": jpeg(quality=90, subsampling=0),
        "jpeg progressive": jpeg(progressive=True),
        "jpeg grey": encode(grey, "JPEG"),
        "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG", quality=95),
        "jpeg cmyk plain": without_adobe(encode(rgb.convert("CMYK"), "JPEG", quality=95)),
        "png": encode(rgb, "PNG"),
        "png bilevel": encode(rgb.convert("1"), "PNG"),
        "png grey": encode(grey, "PNG"),
        "png grey, one transparent": encode(grey, "PNG", transparency=7),
        "png grey and alpha": encode(la, "PNG"),
        "png rgba": encode(rgba, "PNG"),
        "png palette": encode(palette, "PNG"),
        "png palette, one transparent": encode(palette, "PNG", transparency=3),
        "png palette, half transparent": encode(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "gif": encode(palette, "GIF"),
        "gif transparent": encode(palette, "GIF", transparency=2),
        "gif of two frames": encode(moving[0], "GIF", save_all=True, append_images=moving[1:]),
        "webp": encode(rgb, "WEBP", quality=90),
        "webp rgba": encode(rgba, "WEBP", lossless=True),
        "bmp": encode(rgb, "BMP"),
        "ppm": encode(rgb, "PPM"),
        "tiff": encode(rgb, "TIFF"),
        "tiff compressed": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff cmyk": encode(rgb.convert("CMYK"), "TIFF"),
        "png upside down": rotated(rgb, 3, "PNG"),
        "png 16-bit rgb": png(pixels(3).astype(np.uint16) * 257, 2),
        "png 16-bit rgba": png(np.dstack([pixels(3), alpha]).astype(np.uint16) * 257, 6),
    }


@pytest.mark.parametrize("kind, content", kinds().items(), ids=kinds().keys())
def test_every_kind_of_image_becomes_what_pil_makes_of_it(kind, content):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PIL has some to give, which no user could act on
        ours = decode(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert ours.dtype == torch.uint8 and ours.shape == (3, *expected.shape[:2])
    off = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - expected)
    assert off.max() <= (2 if kind.startswith("jpeg") else 0)  # two builds of one JPEG library may round differently


def test_colours_are_those_of_the_picture():
    """Not only PIL's, but the right ones: inks not inverted, high bytes not dropped, transparency without effect."""
    truth = pixels(0).astype(int)
    for kind in ("jpeg cmyk", "jpeg cmyk plain", "png rgba", "webp rgba", "png palette, half transparent", "tiff cmyk"):
        off = np.abs(decode(kinds()[kind]).permute(1, 2, 0).numpy() - truth)
        assert off.mean() < 20, kind
    truth = pixels(3).astype(int)
    for kind in ("png 16-bit rgb", "png 16-bit rgba"):
        assert np.array_equal(decode(kinds()[kind]).permute(1, 2, 0), truth), kind


@pytest.mark.parametrize("brightest", [65_535, 300, 200])  # even where all values would fit into 8 bits
@pytest.mark.parametrize("kind", ["png", "png with alpha", "tiff", "tiff big-endian"])
def test_16_bit_grey_is_scaled(kind, brightest):
    array = np.linspace(0, brightest, 30 * 20).astype(np.uint16).reshape(20, 30)
    content = {
        "png": lambda: encode(Image.fromarray(array), "PNG"),
        "png with alpha": lambda: png(np.dstack([array, array[::-1]]), 4),
        "tiff": lambda: encode(Image.fromarray(array), "TIFF"),
        "tiff big-endian": lambda: encode(Image.fromarray(array.astype(">u2")), "TIFF"),
    }[kind]()
    ours = decode(content)
    assert ours.shape == (3, 20, 30) and torch.equal(ours[0], ours[1]) and torch.equal(ours[0], ours[2])
    # PIL itself reads grey with alpha and keeps the high byte
    assert np.abs(ours[0].numpy() - array / 257).max() <= (1 if kind == "png with alpha" else 0.5)


def test_integer_and_float_grey():
    array = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    for values, scale in ((array, 255), (array * 255, 1), (array * 65_535, 1 / 257)):
        ours = decode(encode(Image.fromarray(values), "TIFF"))[0].numpy()
        assert np.abs(ours - values * scale).max() <= 0.5 + 1e-3
    whole = (array * 65_535).astype(np.int32)
    assert np.abs(decode(encode(Image.fromarray(whole), "TIFF"))[0].numpy() - whole / 257).max() <= 0.5


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, mode):
    upright = np.full((24, 40, 3), 30, np.uint8)
    upright[:8, :16] = 250  # the corner tells all eight apart
    upright[:4, 16:] = 140
    stored = Image.fromarray(upright).convert(mode)
    content = rotated(stored, orientation, "JPEG", quality=95, subsampling=0)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    ours = decode(content).permute(1, 2, 0).numpy()
    assert ours.shape == expected.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    assert np.abs(ours.astype(int) - expected).max() <= 2
    if orientation > 1:
        assert ours.shape != upright.shape or np.abs(ours.astype(int) - upright).max() > 100


def test_content_counts_not_the_name(tmp_path):
    (tmp_path / "a.png").write_bytes(jpeg(3))
    (tmp_path / "b.jpg").write_bytes(encode(Image.fromarray(pixels(4)), "PNG"))
    dataset = build(str(tmp_path), "train")
    assert torch.equal(dataset[0][0], decode(jpeg(3)))
    assert np.array_equal(dataset[1][0].permute(1, 2, 0), pixels(4))


# ------------------------------------------------------------------------------------------------- broken files
def spoil(folder, *names):
    """Makes the named files unreadable, each in another way."""
    whole = jpeg(99)
    ways = [b"", whole[: len(whole) // 2], b"no image at all", whole[:3], whole[:200] + bytes(100)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(ways[i % len(ways)])


@pytest.mark.parametrize("workers", [0, 4])
def test_broken_file_is_replaced_by_its_neighbour_and_reported_once(tmp_path, capsys, workers):
    names = [f"{'ab'[i // 6]}/{i:02}.jpg" for i in range(12)]
    fill(tmp_path / "train", names)
    broken = [0, 4, 5, 8, 11]
    spoil(tmp_path / "train", *[names[i] for i in broken])
    dataset = build(str(tmp_path), "train")
    loader = Loader(dataset, [VIEW], 6, seed=0, workers=workers, max_bad=5)
    for epoch in range(3):
        for indices, labels, crops, _ in seen(loader, epoch):
            u = augment.uniforms(0, epoch, indices.numpy(), 0, augment.DRAWS)
            for row, i in enumerate(indices.tolist()):
                used = {0: 1, 4: 6, 5: 6, 8: 9, 11: 1}.get(i, i)  # 11 goes on at 0, which is broken too
                image, label = dataset[used]
                box = augment.crop_box(u[row].tolist(), *image.shape[1:], VIEW)
                assert torch.equal(crops[row], augment.crop_resize(image, box, 24)) and labels[row] == label
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 5
    for i in broken:
        assert sum(str(tmp_path / "train" / names[i]) in line for line in lines) == 1


@pytest.mark.parametrize("workers", [0, 4])
def test_too_many_broken_files_stop_the_run(tmp_path, capsys, workers):
    names = [f"{i:03}.jpg" for i in range(64)]
    fill(tmp_path, names)
    spoil(tmp_path, *names[::2])
    loader = Loader(build(str(tmp_path), "train"), [VIEW], 16, workers=workers, max_bad=3)
    with pytest.raises(SystemExit) as stop:
        seen(loader)
    if workers:
        loader.pool.threads.shutdown(wait=True)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert stop.value.code == 2 and out == "" and len(lines) == 4
    assert all(line.startswith("warning: ") for line in lines[:3]) and lines[3].startswith("error: ")
    assert "--max-bad 3" in lines[3] and str(tmp_path) in lines[3]


def test_nothing_but_broken_files(tmp_path, capsys):
    names = [f"{i}.png" for i in range(4)]
    fill(tmp_path, names)
    spoil(tmp_path, *names)
    with pytest.raises(SystemExit) as stop:
        list(eval_batches(build(str(tmp_path), "train"), EvalView(16), 4, "cpu", 2))
    assert stop.value.code == 2 and "no image can be decoded" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------- what --data names
def paths(dataset):
    return [os.path.relpath(dataset.path(i), os.fsdecode(dataset.root)) for i in range(len(dataset))]


def test_folder_with_classes(tmp_path):
    fill(tmp_path, ["train/cat/2.jpg", "train/cat/1.PNG", "train/ant/deep/down/x.jpeg", "train/bee/1.jpg"])
    fill(tmp_path, ["val/bee/9.jpg", "val/ant/8.jpg", "val/cat/7.jpg", "train/.hidden/1.jpg"])
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    train, val = build(str(tmp_path), "train"), build(str(tmp_path), "val")
    assert paths(train) == ["ant/deep/down/x.jpeg", "bee/1.jpg", "cat/1.PNG", "cat/2.jpg"]
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    assert train.labels.tolist() == [0, 1, 2, 2] and val.labels.tolist() == [0, 1, 2]
    assert [train[i][1] for i in range(4)] == [0, 1, 2, 2]
    assert np.abs(train[2][0].permute(1, 2, 0).numpy().astype(int) - pixels(1, 33, 42)).max() == 0


def test_flat_train_and_val(tmp_path):
    fill(tmp_path, ["train/b.jpg", "train/a.jpg", "val/c.jpg"])
    train, val = build(str(tmp_path), "train"), build(str(tmp_path), "val")
    assert paths(train) == ["a.jpg", "b.jpg"] and paths(val) == ["c.jpg"]
    assert train.labels is None and train.classes is None and train[0][1] == -1


def test_folder_of_images_without_labels(tmp_path):
    fill(tmp_path, ["2020/may/1.jpg", "2020/june/2.jpg", "2021/3.jpg"])
    dataset = build(str(tmp_path), "train")
    assert paths(dataset) == ["2020/june/2.jpg", "2020/may/1.jpg", "2021/3.jpg"]
    assert dataset.labels is None and dataset[1][1] == -1
    assert build(str(tmp_path), "val", required=False) is None


def test_names_of_any_kind(tmp_path):
    names = ["train/a class/my cat (2).jpg", "train/Vögel/grün  ü.png", "train/鳥/写真.jpg", "train/z/ö.JPG"]
    fill(tmp_path, names)
    dataset = build(str(tmp_path), "train")
    assert len(dataset) == 4 and set(dataset.classes) == {"a class", "Vögel", "鳥", "z"}
    assert {f"train/{p}" for p in paths(dataset)} == set(names)
    raw = os.fsencode(tmp_path) + b"/train/z/\xff\xfe.jpg"  # no text in any encoding
    with open(raw, "wb") as file:
        file.write(jpeg(8))
    again = build(str(tmp_path), "train")
    assert len(again) == 5
    assert sorted(seen(Loader(again, [VIEW], 5, workers=2))[0][0].tolist()) == [0, 1, 2, 3, 4]


def test_links_to_folders(tmp_path):
    fill(tmp_path, ["data/one/1.jpg", "data2/two/2.jpg"])
    (tmp_path / "data2" / "link").symlink_to(tmp_path / "data")  # data2 begins with data, but does not lie in it
    (tmp_path / "data2" / "two" / "up").symlink_to(tmp_path / "data2")
    assert paths(build(str(tmp_path / "data2"), "train")) == ["link/one/1.jpg", "two/2.jpg"]


def test_train_list_with_labels(tmp_path):
    fill(tmp_path, ["x/1.jpg", "x/two words.jpg", "ü.png"])
    (tmp_path / "list.txt").write_text(
        "# a comment\n\nx/two words.jpg 3\n  ü.png   0  \r\nx/1.jpg 12\n\n", encoding="utf-8"
    )
    dataset = build(str(tmp_path), "train", tmp_path / "list.txt")
    assert paths(dataset) == ["x/two words.jpg", "ü.png", "x/1.jpg"]
    assert dataset.labels.tolist() == [3, 0, 12] and dataset[2][1] == 12


def test_list_without_labels(tmp_path):
    fill(tmp_path, ["x/1.jpg", "x/two words.jpg", "y/3 4.jpg"])
    (tmp_path / "list.txt").write_text("x/two words.jpg\n# x/5.jpg\ny/3 4.jpg\nx/1.jpg")
    dataset = build(str(tmp_path), "val", str(tmp_path / "list.txt"))
    assert paths(dataset) == ["x/two words.jpg", "y/3 4.jpg", "x/1.jpg"]
    assert dataset.labels is None and dataset[0][1] == -1


@pytest.mark.parametrize(
    "content, line",
    [
        ("1.jpg 0\n2.jpg\n", 2),
        ("# header\n1.jpg\n\n2.jpg 4\n", 4),
        ("1.jpg 0\n2.jpg cat\n", 2),
        ("1.jpg 0\n3.jpg 0\n", 2),
        ("1.jpg 0\n2.jpg -1\n", 2),
        ("\n1.jpg ²\n", 2),
    ],
)
def test_malformed_list(tmp_path, capsys, content, line):
    fill(tmp_path, ["1.jpg", "2.jpg"])
    (tmp_path / "list.txt").write_text(content, encoding="utf-8")
    for split in ("train", "val"):
        message = refuses(capsys, build, str(tmp_path), split, tmp_path / "list.txt")
        assert f"--{split}-list" in message and "list.txt" in message and f"line {line}:" in message


def test_list_that_is_missing_or_empty(tmp_path, capsys):
    fill(tmp_path, ["1.jpg"])
    message = refuses(capsys, build, str(tmp_path), "val", tmp_path / "nowhere.txt")
    assert "--val-list" in message and "nowhere.txt" in message
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    assert "empty.txt" in refuses(capsys, build, str(tmp_path), "train", tmp_path / "empty.txt")


def test_folder_that_is_missing_or_empty_or_a_file(tmp_path, capsys):
    assert "nowhere" in refuses(capsys, build, str(tmp_path / "nowhere"), "train")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refuses(capsys, build, str(tmp_path / "file"), "train")
    (tmp_path / "empty").mkdir()
    assert "no images in" in refuses(capsys, build, str(tmp_path / "empty"), "train")
    (tmp_path / "half" / "train" / "cat").mkdir(parents=True)
    assert "half" in refuses(capsys, build, str(tmp_path / "half"), "train")
    fill(tmp_path / "only", ["val/a/1.jpg"])
    assert "train/" in refuses(capsys, build, str(tmp_path / "only"), "train")
    fill(tmp_path / "other", ["train/a/1.jpg"])
    assert "val/" in refuses(capsys, build, str(tmp_path / "other"), "val")
    assert build(str(tmp_path / "other"), "val", required=False) is None


def test_batch_larger_than_the_data_set(images, capsys):
    message = refuses(capsys, Loader, images, [VIEW], 27)
    assert "--batch-size 27" in message and "26" in message
    assert Loader(images, [VIEW], 26).steps == 1


def test_named_set_that_is_not_there(tmp_path, capsys):
    for name in ("cifar10", "cifar100", "stl10"):
        assert f"--data {name}" in refuses(capsys, build, f"{name}:{tmp_path}", "train")
    assert "fake:many" in refuses(capsys, build, "fake:many", "train")
    assert "fake:0" in refuses(capsys, build, "fake:0", "train")


def test_digits():
    train, val = build("digits", "train"), build("digits", "val")
    assert len(train) + len(val) == 1797 and min(np.bincount(val.labels)) > 20 and len(train.classes) == 10
    image, label = train[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8) and label == 0
    assert train.images.min() == 0 and train.images.max() == 255
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    taken = {train[i][0].numpy().tobytes() for i in range(len(train))}
    assert sum(val[i][0].numpy().tobytes() in taken for i in range(len(val))) == 0


def test_fake():
    train, val = build("fake:30", "train"), build("fake:30", "val")
    assert len(train) == 30 and len(val) == 10 and len(build("fake", "train")) == 1000
    assert train[7][1] == 7 and train[17][1] == 7 and train[3][0].shape == (3, 64, 64)
    assert torch.equal(train[5][0], build("fake:30", "train")[5][0])
    everything = [dataset[i][0] for dataset in (train, val) for i in range(len(dataset))]
    assert len({x.numpy().tobytes() for x in everything}) == 40  # no image of val is in train
    mean = torch.stack([x.float().mean((1, 2)) for x in everything[:30]])
    within = (mean[:10] - mean[10:20]).norm(dim=1).max()
    between = torch.pdist(mean[:10]).min()
    assert within < between  # a class can be told from its colour


def test_default_size():
    assert [data.default_size(name) for name in ("digits", "cifar10:/x", "stl10", "fake:5", "/data")] == [
        16,
        32,
        96,
        64,
        224,
    ]


def test_subset_and_spread(images):
    few = data.spread(images, 5)
    assert few.indices.tolist() == [0, 6, 12, 19, 25] and few.labels.tolist() == images.labels[few.indices].tolist()
    assert torch.equal(few[3][0], images[19][0]) and few.path(3) == images.path(19) and few.classes == images.classes
    assert data.spread(images, 26) is images
