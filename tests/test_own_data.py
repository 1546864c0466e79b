"""Images that are not 8-bit RGB files: other channels, 16 bits, NumPy arrays, odd sizes; and where pixels are made."""

import dataclasses
import importlib
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval_finetune
import eval_knn
import eval_linear
import features
from common import augment, data
from common.augment import EvalView, View, center_crop_batch, crop_resize, crop_resize_batch
from common.data import BadImage, Loader, build, fit, statistics
from common.log import describe
from tests.helpers import ROOT, SCRIPTS, command, flags, records, state, tensors, train

KNN = "--batch-size 16 --k 3 --workers 0 --device cpu".split()


def deep_png(path, array):
    """Writes uint16 (H, W) or (H, W, 3) as a 16-bit PNG, which PIL does only for grey."""
    colour = {2: 0, 3: 2}[array.ndim]

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def folder(path, write, suffix, classes=2, each=8):
    """A labelled set: write(file, number) makes each image."""
    for split in ("train", "val"):
        for c in range(classes):
            (path / split / f"c{c}").mkdir(parents=True)
            for i in range(each):
                write(path / split / f"c{c}" / f"{i}{suffix}", 100 * c + i + (50 if split == "val" else 0))
    return path


def bands(file, number, channels=5, size=(24, 30)):
    rng = np.random.default_rng(number)
    values = rng.random((*size, channels)) * 0.4 + 0.5 * (number >= 100) * np.linspace(0, 1, channels)
    np.save(file, values.astype(np.float32))


# ----------------------------------------------------------------------------------------- decoding to the bit
def test_16_bit_grey_keeps_its_bits(tmp_path):
    values = np.array([[0, 1, 257], [300, 40000, 65535]], np.uint16)
    deep_png(tmp_path / "a.png", values)
    Image.fromarray(values).save(tmp_path / "b.tif")
    np.save(tmp_path / "c.npy", values)
    for channels in (1, 3):
        images = build(tmp_path, "train", channels=channels)
        assert images.dtype == torch.float32
        for image, _ in images:
            assert image.shape == (channels, 2, 3) and image.dtype == torch.float32
            for channel in image:
                np.testing.assert_allclose(channel, values / 257, rtol=1e-6)


def test_16_bit_colour_keeps_its_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3), dtype=np.uint16)
    deep_png(tmp_path / "a.png", values)
    np.save(tmp_path / "b.npy", values)
    for image, _ in build(tmp_path, "train"):
        np.testing.assert_allclose(image.permute(1, 2, 0), values / 257, rtol=1e-6)


def test_8_bits_stay_8_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", values)
    Image.fromarray(values).save(tmp_path / "c.jpg")
    images = build(tmp_path, "train")
    assert images.dtype == torch.uint8 and all(image.dtype == torch.uint8 for image, _ in images)
    assert all(np.array_equal(images[i][0].permute(1, 2, 0), values) for i in (0, 1))


@pytest.mark.parametrize("shape", [(6, 8, 4), (4, 6, 8)])
def test_arrays_have_channels_last_or_first(tmp_path, shape):
    values = np.random.default_rng(0).random(shape)
    np.save(tmp_path / "a.npy", values)
    (image, label) = build(tmp_path, "train", channels=4)[0]
    expected = values if shape[0] == 4 else values.transpose(2, 0, 1)
    assert image.shape == (4, 6, 8) and label == -1
    np.testing.assert_allclose(image, 255 * expected, rtol=1e-6)


def test_pictures_of_four_bands_stay_as_they_are(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    Image.fromarray(values, "CMYK").save(tmp_path / "a.tif")
    Image.fromarray(values, "RGBA").save(tmp_path / "b.png")
    for image, _ in build(tmp_path, "train", channels=4):
        assert np.array_equal(image.permute(1, 2, 0), values)


def test_one_channel_of_colour_files_is_their_luma(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).resize((240, 160)).save(tmp_path / "b.jpg", quality=95)
    for i, name in enumerate(("a.png", "b.jpg")):
        grey = np.asarray(Image.open(tmp_path / name).convert("L")).astype(int)
        image = build(tmp_path, "train", channels=1)[i][0]
        off = abs(image[0].numpy() - grey)
        assert image.shape == (1, *grey.shape) and off.max() <= 4 and off.mean() < 0.5  # a JPEG holds its luma itself


@pytest.mark.parametrize(
    "array, said",
    [
        (
            np.zeros((6, 8, 2), np.uint8),
            "the shape (6, 8, 2): expected (H, W, C) or (C, H, W) with C = 3 (--channels)",
        ),
        (np.zeros(5, np.uint8), "the shape (5,)"),
        (np.zeros((6, 8), np.int32), "holds int32: expected uint8, uint16, or floats in [0, 1]"),
        (np.full((6, 8), -3.0), "holds floats from -3 to -3: scale all images alike to [0, 1]"),
        (np.full((6, 8), np.nan), "holds floats from nan to nan"),
        (np.array([[{}]]), "allow_pickle=False"),
    ],
)
def test_arrays_that_mean_nothing_are_named(tmp_path, array, said):
    np.save(tmp_path / "odd.npy", array)
    with pytest.raises(BadImage, match=r"odd\.npy") as error:
        data.Files(tmp_path, ["odd.npy"])[0]
    assert said in str(error.value)


def test_other_channels_than_the_files_have_end_the_program(tmp_path, capsys):
    """At once, with one line, not after a hundred warnings."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match=r"a\.png.*has 3 channels, expected 5"):
        data.Files(tmp_path, ["a.png"], channels=5)[0]
    with pytest.raises(SystemExit) as stopped:
        build(tmp_path, "train", channels=5)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and "has 3 channels, expected 5 (--channels)" in message
    (tmp_path / "a.png").write_bytes(b"broken")  # which the loader tells, and goes on
    assert len(build(tmp_path, "train", channels=5)) == 1


def test_named_sets_in_grey():
    colour, grey = build("digits", "train"), build("digits", "train", channels=1)
    assert grey.images.shape == (1438, 8, 8, 1)  # the digits are grey: all three channels are the luma
    assert np.array_equal(grey.images[..., 0], colour.images[..., 1])
    with pytest.raises(SystemExit):
        build("digits", "train", channels=4)


# ----------------------------------------------------------------------------- the loader keeps what was decoded
def test_the_loader_keeps_16_bits(tmp_path):
    """A ramp within one of 256 levels: at 8 bits it would be flat."""
    for i in range(4):
        deep_png(tmp_path / f"{i}.png", (25700 + np.arange(40 * 40).reshape(40, 40) % 200).astype(np.uint16))
    images = build(tmp_path, "train")
    view = View(16, crop=(0.5, 1), flip=0, mean=(0, 0, 0), std=(1, 1, 1))
    (batch,) = Loader(images, [view], 4, workers=2).epoch(0)
    (x,) = batch.views()
    assert batch.images[0].dtype == torch.float32
    assert 100 / 255 <= x.min() and x.max() <= 101 / 255 and x.std() > 0.1 / 255
    whole = next(data.eval_batches(images, EvalView(40, mean=(0, 0, 0), std=(1, 1, 1)), 4, "cpu", 0))[0]
    np.testing.assert_allclose(whole[0, 0, 0, :3], np.array([25700, 25701, 25702]) / 65535, rtol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_float_images_are_cropped_as_8_bit_ones(interpolation):
    # far enough from black and white that no overshoot is cut off between the two passes
    values = torch.from_numpy(np.random.default_rng(0).integers(90, 166, (3, 50, 60), dtype=np.uint8))
    for size in (16, 90):
        box = (4, 7, 37, 41)
        exact = crop_resize(values.float(), box, size, interpolation)
        off = (exact - crop_resize(values, box, size, interpolation)).abs()
        assert exact.dtype == torch.float32 and 0 <= exact.min() and exact.max() <= 255
        assert off.max() <= 1.1  # two roundings of half a level, the first of them amplified
    overshoot = crop_resize(values.float() * 10 - 1000, (4, 7, 37, 41), 90, interpolation)
    assert interpolation == "bilinear" or (overshoot.min() == 0 and overshoot.max() == 255)


def test_statistics_are_those_of_the_pixels(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**16, (6, 20, 20, 2)).astype(np.uint16)
    values[..., 1] //= 50
    for i, image in enumerate(values):
        np.save(tmp_path / f"{i}.npy", image)
    mean, std = statistics(build(tmp_path, "train", channels=2), 20, workers=2)
    np.testing.assert_allclose(mean, (values / 65535).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, (values / 65535).std((0, 1, 2)), rtol=1e-4)


def test_statistics_of_flat_images_stay_finite(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 3), np.uint8))
    assert statistics(build(tmp_path, "train"), 8) == ((0.0, 0.0, 0.0), (1 / 255,) * 3)


def test_colours_are_left_alone_where_there_are_none(capsys):
    view = View(16, jitter=(0.4, 0.3, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, lighting=0.1, solarize_p=0.1)
    for channels in (1, 3, 5):
        dataset = data.Fake(8, 0, 16, channels)
        (fitted,) = fit([view], dataset)
        said = capsys.readouterr().out
        if channels == 3:
            assert fitted == view and not said
            (fitted,) = fit([view], dataset, "auto")
            assert fitted == dataclasses.replace(view, mean=fitted.mean, std=fitted.std) != view
            assert "statistics  mean" in capsys.readouterr().out
        else:
            assert f"{channels} channels: saturation, hue, greyscale and lighting are switched off" in said
            assert fitted.jitter == (0.4, 0.3, 0, 0) and fitted.gray_p == fitted.lighting == 0
            assert (fitted.jitter_p, fitted.blur_p, fitted.solarize_p) == (0.8, 0.5, 0.1)
            assert len(fitted.mean) == len(fitted.std) == channels
            (batch,) = Loader(dataset, [fitted], 8, workers=0).epoch(0)
            assert batch.views()[0].shape == (8, channels, 16, 16)
    with pytest.raises(SystemExit):
        fit([view], data.Fake(8, 0, 16, 5), "imagenet")
    assert "--stats imagenet is for 3 channels" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- from end to end
@pytest.mark.parametrize("script", ["simsiam", "deepcluster", "mae", "mocov3"])
def test_five_bands_from_training_to_evaluation(tmp_path, script, capsys):
    images = folder(tmp_path / "set", bands, ".npy")
    words = ["--data", images, "--channels", 5, "--epochs", 2, "--knn-every", 1, "--out", tmp_path / "run"]
    saved = train(script, tmp_path / "run", *words)
    assert saved["meta"]["channels"] == len(saved["meta"]["mean"]) == 5
    assert "statistics  mean" in capsys.readouterr().out
    assert (tmp_path / "run" / "views.png").stat().st_size > 100
    file = tmp_path / "run" / "backbone.pt"
    linear = "--epochs 1 --batch-size 8 --workers 0 --device cpu".split()
    for module, more in ((eval_knn, KNN), (eval_linear, linear)):
        words = ["--pretrained", str(file), "--data", str(images), *more]
        assert module.main(module.parse_args(words))["test"] == 16
    with pytest.raises(SystemExit) as stopped:
        eval_knn.main(eval_knn.parse_args(["--pretrained", str(file), "--data", str(images), "--channels", "3"]))
    assert stopped.value.code == 2 and "error: --channels 3:" in capsys.readouterr().err


def test_grey_training_and_pictures(tmp_path, capsys):
    def write(file, number):
        values = np.random.default_rng(number).integers(0, 30000, (30, 20)).astype(np.uint16)
        deep_png(file, values + (20000 if number >= 100 else 0))

    images = folder(tmp_path / "set", write, ".png")
    saved = train("mae", tmp_path / "run", "--data", images, "--channels", 1, "--epochs", 1, "--warmup-epochs", 0)
    assert saved["meta"]["channels"] == 1 and saved["model"]["backbone.patch_embed.proj.weight"].shape[1] == 1
    assert (tmp_path / "run" / "reconstructions.png").exists()
    file, out = tmp_path / "run" / "backbone.pt", tmp_path / "features"
    words = ["--data", images, "--neighbours", "--k", 3, "--queries", 2, "--out", out, "--workers", 0]
    features.main(features.parse_args([*map(str, ["--pretrained", file, *words])]))
    assert np.load(out / "features.npy").shape[0] == 16 and (out / "neighbours.png").exists()
    words = ["--data", images, "--epochs", 1, "--batch-size", 8, "--out", tmp_path / "tune", "--workers", 0]
    words = ["--pretrained", file, *words, "--warmup-epochs", 0]
    eval_finetune.main(eval_finetune.parse_args([*map(str, words)]))
    assert "RandAugment, which is for RGB images of 8 bits, is switched off" in capsys.readouterr().out


def test_measured_statistics_reach_the_evaluation(tmp_path):
    images = folder(tmp_path / "set", lambda file, n: bands(file, n, 3), ".npy")
    saved = train("simsiam", tmp_path / "run", "--data", images, "--stats", "auto", "--epochs", 1, "--warmup-epochs", 0)
    mean, std = statistics(build(images, "train"), 16)
    assert saved["meta"]["mean"] == list(mean) and saved["meta"]["std"] == list(std)


@pytest.mark.parametrize("size", [24, 37, 100, 512])
def test_sizes_from_24_to_512(tmp_path, size):
    """Photographs of extreme shapes at odd sizes: a step of training, and features."""
    for i, shape in enumerate([(9, 300), (300, 9), (40, 41), (1, 1), (64, 64), (200, 100), (3, 5), (90, 31)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    words = ["--data", tmp_path, "--image-size", size, "--batch-size", 4, "--max-steps", 1, "--width", 0.25]
    train("simsiam", tmp_path / "run", *words)
    assert np.isfinite(records(tmp_path / "run")[1]["loss"])


@pytest.mark.parametrize("size, patch", [(24, 3), (32, 4), (36, 4), (96, 12), (100, 10), (128, 16), (160, 16)])
def test_default_patches_divide_the_image(size, patch):
    from common.vit import default_patch

    assert default_patch("vit_base", size) == patch


def test_a_size_that_no_patch_divides_names_those_around(capsys):
    from common.vit import vit

    with pytest.raises(SystemExit):
        vit("vit_tiny", 150)
    assert "--image-size 150 is not a multiple of the patch size 16: choose 144 or 160" in capsys.readouterr().err


# --------------------------------------------------------------------------- small sets, cut where they are kept
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape, size", [((32, 32), 32), ((96, 96), 96), ((8, 8), 16), ((96, 96), 9), ((20, 33), 24)])
def test_batched_crops_have_the_bits_of_single_ones(shape, size, interpolation):
    rng = np.random.default_rng(size)
    images = torch.from_numpy(rng.integers(0, 256, (200, *shape, 3), dtype=np.uint8))
    images[:50] = torch.where(images[:50] < 128, 0, 255).to(torch.uint8)  # edges, where bicubic overshoots
    sides = np.stack([rng.integers(1, side + 1, 200) for side in shape], 1)
    sides[:9] = shape
    corners = (rng.random((200, 2)) * (np.array(shape) - sides + 1)).astype(int)
    boxes = np.concatenate([corners, sides], 1)
    crops = crop_resize_batch(images, torch.from_numpy(boxes), size, interpolation)
    for image, box, crop in zip(images, boxes.tolist(), crops, strict=True):
        expected = crop_resize(image.permute(2, 0, 1), box, size, interpolation)
        assert torch.equal(crop, expected.permute(1, 2, 0))
    view = EvalView(size, resize=size + 5, interpolation=interpolation)
    for image, crop in zip(images, center_crop_batch(images, view), strict=True):
        assert torch.equal(crop.permute(2, 0, 1), augment.center_crop(image.permute(2, 0, 1), view))


@pytest.mark.parametrize("script", ["simsiam", "mae", "deepcluster"])
def test_a_set_kept_on_the_device_trains_to_the_same_bits(tmp_path, monkeypatch, script):
    words = ["--data", "digits", "--max-steps", 3, "--batch-size", 32, "--knn-every", 1]
    kept = []

    def resident(dataset, device):
        kept.append(data.in_memory(dataset))
        return torch.from_numpy(kept[-1])

    threads = train(script, tmp_path / "threads", *words)
    monkeypatch.setattr(data, "resident", resident)
    device = train(script, tmp_path / "device", *words)
    a, b = tensors(threads), tensors(device)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert len(kept) >= 3 and kept[0].shape == (1438, 8, 8, 3)  # training, and both halves of the k-NN accuracy


# ------------------------------------------------------------------------------------------ --decode gpu, as far
# as it can be tried without one: the messages, and the same code with the decoder of the CPU
def test_gpu_decoding_is_refused_on_a_cpu(tmp_path):
    done = command("simsiam.py", *flags("simsiam", tmp_path), "--decode", "gpu", "--device", "cpu", check=2)
    assert done.stderr == "error: --decode gpu needs a CUDA device, and this run is on cpu: leave the flag out\n"


def test_gpu_decoding_of_what_is_no_file_is_refused(capsys):
    with pytest.raises(SystemExit):
        data.check_gpu_decoder(data.Fake(8, 0), torch.device("cuda"))
    assert "--decode gpu: --data names no grey or colour image files" in capsys.readouterr().err


def test_batches_decoded_on_the_device_are_those_of_the_threads(tmp_path, monkeypatch, capfd):
    rng = np.random.default_rng(0)
    for i in range(16):
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40, 30))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        kind = {3: {"exif": exif}, 5: {"format": "PNG"}}.get(i, {})
        image = image.convert({2: "L", 4: "CMYK"}.get(i, "RGB"))
        image.save(tmp_path / f"{i:02}.jpg", **{"format": "JPEG", **kind})
    (tmp_path / "08.jpg").write_bytes((tmp_path / "09.jpg").read_bytes()[:200])
    images = build(tmp_path, "train")
    views = [View(24), View(16, interpolation="bicubic")]

    def epoch(**how):
        batches = Loader(images, views, 4, seed=1, **how).epoch(2)
        return [[b.indices, b.labels, *(v.clone() for v in b.images), *b.views()] for b in batches]

    expected = epoch(workers=2)
    monkeypatch.setattr(data, "check_gpu_decoder", lambda dataset, device: None)
    for workers in (0, 2):
        found = epoch(workers=workers, decode="gpu")
        for a, b in zip(expected, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert capfd.readouterr().err.count("08.jpg") == 1


def test_gpu_decoding_gives_up_as_the_threads_do(tmp_path, monkeypatch, capsys):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8\xff nothing")
    monkeypatch.setattr(data, "check_gpu_decoder", lambda dataset, device: None)
    loader = Loader(build(tmp_path, "train"), [View(16)], 4, max_bad=3, workers=0, decode="gpu")
    with pytest.raises(SystemExit) as stopped:
        list(loader.epoch(0))
    assert stopped.value.code == 2 and "more than --max-bad 3" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_other_channels(tmp_path, script):
    saved = train(script, tmp_path, "--channels", 2, "--max-steps", 1)
    assert saved["meta"]["channels"] == len(saved["meta"]["std"]) == 2 and np.isfinite(records(tmp_path)[1]["loss"])


def test_the_state_says_where_pixels_came_from(tmp_path):
    train("simsiam", tmp_path, "--max-steps", 1)
    assert state(tmp_path)["args"]["decode"] == "cpu"


def test_dark_images_are_shown_bright(tmp_path, capsys):
    """12 bits in files of 16: views.png is not black, and a line says so."""

    def write(file, number):
        np.save(file, np.random.default_rng(number).integers(0, 4096, (20, 20, 2)).astype(np.uint16))

    images = folder(tmp_path / "set", write, ".npy")
    train("simsiam", tmp_path / "run", "--data", images, "--channels", 2, "--max-steps", 1)
    assert "images are dark: nearly all values are below" in capsys.readouterr().out
    for path in (tmp_path / "set").rglob("*.npy"):  # without measured statistics, too
        np.save(path, np.load(path)[..., :1].repeat(3, 2))
    (view,) = fit([View(16)], build(tmp_path / "set", "train"))
    assert view == View(16) and "scale them up, or try --stats auto" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "run" / "views.png").convert("L")).astype(float)
    shown = picture[picture < 250]  # without the white between the views
    assert 50 < shown.mean() < 200 and shown.std() > 20


@pytest.mark.parametrize("script", ["simclr", "byol", "barlowtwins", "deepcluster", "odc"])
def test_small_images_are_cropped_less(script, capsys):
    parse = importlib.import_module(script).parse_args
    for words, share in (("/x", 0.08), ("cifar10", 0.2), ("/x --image-size 64", 0.2), ("digits --crop-min 0.5", 0.5)):
        args = parse(["--data", *words.split()])
        assert args.crop_min == share
    describe(args, range(9), SimpleNamespace(steps=1, local=1), torch.nn.Linear(1, 1))
    assert "3x3 stem without pooling, no blur, crops of at least 50% (--crop-min)" in capsys.readouterr().out


def test_small_images_in_large_views_are_noted(tmp_path, capsys):
    folder(tmp_path / "set", lambda file, n: Image.new("RGB", (40, 30)).save(file), ".png")
    words = ["--data", tmp_path / "set", "--max-steps", 1, "--width", 0.25]
    train("simsiam", tmp_path / "run", *words, "--image-size", 80)
    said = capsys.readouterr().out
    assert "the first image has 30 x 40 pixels: --image-size 40 loses nothing and computes 4 times less" in said
    assert "16 images in 2 classes" in said and "fp32 on cpu" in said
    train("simsiam", tmp_path / "other", *words, "--image-size", 64)
    assert "the first image" not in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:99"])
def test_devices_that_are_not_there(device):
    done = command("eval_knn.py", "--pretrained", "random", "--data", "fake", "--device", device, check=2)
    assert done.stderr.startswith(f"error: --device {device} cannot be used here: ") and done.stderr.count("\n") == 1


def test_a_copied_script_has_a_run_folder_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "simsiam.py").read_text())
    done = command(tmp_path / "mine.py", "--help", check=0, env={"PYTHONPATH": str(ROOT)})
    assert "run folder (default: runs/mine)" in done.stdout


def test_help_shows_each_default_once():
    done = command("simclr.py", "--help", check=0)
    text = " ".join(done.stdout.split())
    assert "epochs (default: 1000)" in text and "weight decay (default: 1e-06)" in text
    assert "(default: None)" not in text and "(default: True)" not in text and "(default: )" not in text
