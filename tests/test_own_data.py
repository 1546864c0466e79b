"""Images that are not 8-bit photographs, of any size, from training to evaluation; and what a run says of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import loader
from common.augment import View
from common.datasets import in_memory, open_dataset
from common.log import describe
from tests.helpers import ROOT, SCRIPTS, command, deep_png, different, encode, main, parsed, records, refused, train


def folder(path, write, suffix, classes=2, each=8):
    """A labelled set: write(file, number) makes each image."""
    for split in ("train", "val"):
        for c in range(classes):
            (path / split / f"c{c}").mkdir(parents=True)
            for i in range(each):
                write(path / split / f"c{c}" / f"{i}{suffix}", 100 * c + i + (50 if split == "val" else 0))
    return path


def bands(file, number, channels=5, size=(24, 30)):
    values = np.random.default_rng(number).random((*size, channels)) * 0.4
    np.save(file, (values + 0.5 * (number >= 100) * np.linspace(0, 1, channels)).astype(np.float32))


# -------------------------------------------------------------------------------------------- one scale, one limit
def test_training_and_test_images_have_one_white(tmp_path):
    """Decided by the training images, though those of the test would fit into [0, 1]."""
    for split, top in (("train", 200), ("val", 0.9)):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.tif").write_bytes(
            encode(np.linspace(0, top, 30, dtype=np.float32).reshape(5, 6), "TIFF")
        )
    train_set, val_set = (open_dataset(tmp_path, split) for split in ("train", "val"))
    assert train_set.white == val_set.white == 255
    assert val_set[0][0].max().item() == pytest.approx(0.9)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_large_image_is_named_with_ways_out_or_read(tmp_path, capsys, monkeypatch, workers):
    """The flag reaches whichever process loads."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 0)  # puts back what it was
    for i in range(48):
        Image.new("L", (16, 16)).save(tmp_path / f"{i}.png")
    Image.new("L", (1500, 1000)).save(tmp_path / "wide.png")
    words = ["--data", tmp_path, "--workers", workers, "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 7]
    train("simsiam", tmp_path / "a", *words, "--max-pixels", 1)
    assert "wide.png: has 2 million pixels, the limit is 1 million: cut it into" in capsys.readouterr().err
    train("simsiam", tmp_path / "b", *words, "--max-pixels", 1.5)
    assert "wide.png" not in capsys.readouterr().err


def test_packing_sees_images_as_training_does(tmp_path, capsys, monkeypatch):
    """White behind what is transparent, broken EXIF, the limit of pixels; what has more bits is left out."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 0)
    (tmp_path / "set").mkdir()
    Image.new("RGBA", (40, 40), (200, 0, 0, 0)).save(tmp_path / "set/clear.png")
    Image.new("RGB", (40, 40), (200, 0, 0)).save(tmp_path / "set/exif.png", exif=b"Exif\0\0broken")
    Image.new("RGB", (1500, 1000)).save(tmp_path / "set/wide.png")
    (tmp_path / "set/deep.png").write_bytes(deep_png(np.zeros((40, 40, 3), np.uint16)))
    (tmp_path / "set/notes.txt").write_text("no image")
    main("pack", tmp_path / "set", "--out", tmp_path / "tars", "--resize", 16, "--max-pixels", 1)
    out, err = capsys.readouterr()
    assert "1 left out: .txt 1" in out and "2 images" in out and "2 left out" in out
    assert "wide.png: has 2 million pixels, the limit is 1 million" in err
    assert "deep.png: more than 8 bits per channel: pack without --resize" in err
    packed = open_dataset(tmp_path / "tars", "train")
    clear, red = (packed[i][0].float().mean((1, 2)) for i in range(2))
    assert clear.min() > 253 and abs(red[0] - 200) < 3 and red[1] < 3


# ----------------------------------------------------------------------------------------------- other channels
@pytest.mark.parametrize("script", ["simsiam", "deepcluster", "mae", "mocov3"])
def test_five_bands_from_training_to_evaluation(tmp_path, script, capsys):
    images = folder(tmp_path / "set", bands, ".npy")
    words = ["--data", images, "--channels", 5, "--epochs", 2, "--knn-every", 1]
    saved = train(script, tmp_path / "run", *words)
    assert saved["meta"]["channels"] == len(saved["meta"]["mean"]) == 5
    assert "statistics  mean" in capsys.readouterr().out
    assert (tmp_path / "run" / "views.png").stat().st_size > 100
    words = ["--pretrained", tmp_path / "run" / "backbone.pt", "--data", images, "--workers", 0, "--device", "cpu"]
    assert main("eval_knn", *words, "--k", 3)["test"] == 16
    assert main("eval_linear", *words, "--epochs", 1, "--batch-size", 8)["test"] == 16
    assert "error: --channels 3:" in refused(capsys, main, "eval_knn", *words, "--channels", 3)


def test_grey_training_and_pictures(tmp_path, capsys):
    def write(file, number):
        values = np.random.default_rng(number).integers(0, 30000, (30, 20)).astype(np.uint16)
        file.write_bytes(deep_png(values + np.uint16(20000 * (number >= 100))))

    data = ["--data", folder(tmp_path / "set", write, ".png"), "--workers", 0]
    saved = train("mae", tmp_path / "run", *data, "--channels", 1, "--epochs", 1, "--warmup-epochs", 0)
    assert saved["meta"]["channels"] == 1 and saved["model"]["backbone.patch_embed.proj.weight"].shape[1] == 1
    assert (tmp_path / "run" / "reconstructions.png").exists()
    words, out = ["--pretrained", tmp_path / "run" / "backbone.pt", *data], tmp_path / "features"
    main("features", *words, "--out", out)
    main("visualize", *words, "--neighbours", "--k", 3, "--queries", 2, "--out", out)
    assert np.load(out / "features.npy").shape[0] == 16 and (out / "neighbours.png").exists()
    main("eval_finetune", *words, "--epochs", 1, "--batch-size", 8, "--out", tmp_path / "tune", "--warmup-epochs", 0)
    assert "RandAugment, which is for RGB images of 8 bits, is switched off" in capsys.readouterr().out


def test_measured_statistics_reach_the_evaluation(tmp_path):
    images = folder(tmp_path / "set", lambda file, n: bands(file, n, 3), ".npy")
    saved = train("simsiam", tmp_path / "run", "--data", images, "--stats", "auto", "--max-steps", 1)
    mean, std = loader.image_statistics(open_dataset(images, "train"), 16)
    assert saved["meta"]["mean"] == list(mean) and saved["meta"]["std"] == list(std)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_other_channels(tmp_path, script):
    saved = train(script, tmp_path, "--channels", 2, "--max-steps", 1)
    assert saved["meta"]["channels"] == len(saved["meta"]["std"]) == 2 and np.isfinite(records(tmp_path)[1]["loss"])


def test_dark_images_are_shown_bright(tmp_path, capsys):
    """12 bits in files of 16: views.png is not black, and a line says so."""

    def write(file, number):
        np.save(file, np.random.default_rng(number).integers(0, 4096, (20, 20, 2)).astype(np.uint16))

    images = folder(tmp_path / "set", write, ".npy")
    train("simsiam", tmp_path / "run", "--data", images, "--channels", 2, "--max-steps", 1)
    assert "images are dark: nearly all values are below" in capsys.readouterr().out
    for path in images.rglob("*.npy"):  # without measured statistics, too
        np.save(path, np.load(path)[..., :1].repeat(3, 2))
    assert loader.adapt_views([View(16)], open_dataset(images, "train")) == [View(16)]
    assert "scale them up, or try --stats auto" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "run" / "views.png").convert("L")).astype(float)
    shown = picture[picture < 250]  # without the white between the views
    assert 50 < shown.mean() < 200 and shown.std() > 20


@pytest.mark.parametrize("script", ["simsiam", "mae", "deepcluster"])
def test_a_set_kept_on_the_device_trains_to_the_same_bits(tmp_path, monkeypatch, script):
    words = ["--data", "digits", "--max-steps", 3, "--batch-size", 32, "--knn-every", 1]
    kept, threads = [], train(script, tmp_path / "threads", *words)

    def resident(dataset, device):
        kept.append(in_memory(dataset))
        return torch.from_numpy(kept[-1])

    monkeypatch.setattr(loader, "resident", resident)
    assert not different(threads["model"], train(script, tmp_path / "device", *words)["model"])
    assert len(kept) >= 3 and kept[0].shape == (1438, 8, 8, 3)  # training, and both halves of the k-NN accuracy


# -------------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("size", [24, 37, 100, 512])
def test_sizes_from_24_to_512(tmp_path, size):
    """Photographs of extreme shapes at odd sizes: a step of training, and features."""
    for i, shape in enumerate([(9, 300), (300, 9), (40, 41), (1, 1), (64, 64), (200, 100), (3, 5), (90, 31)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    words = ["--data", tmp_path, "--image-size", size, "--batch-size", 4, "--max-steps", 1, "--width", 0.25]
    train("simsiam", tmp_path / "run", *words)
    assert np.isfinite(records(tmp_path / "run")[1]["loss"])


@pytest.mark.parametrize("script", ["simclr", "byol", "barlowtwins", "deepcluster", "odc"])
def test_small_images_are_cropped_less(script, capsys):
    for words, share in (("/x", 0.08), ("cifar10", 0.2), ("/x --image-size 64", 0.2), ("digits --crop-min 0.5", 0.5)):
        args = parsed(script, "--data", *words.split())
        assert args.crop_min == share
    describe(args, range(9), SimpleNamespace(epoch_steps=1, local=1), torch.nn.Linear(1, 1))
    assert "3x3 stem without pooling, no blur, crops of at least 50% (--crop-min)" in capsys.readouterr().out


def test_small_images_in_large_views_are_noted(tmp_path, capsys):
    folder(tmp_path / "set", lambda file, n: Image.new("RGB", (40, 30)).save(file), ".png")
    words = ["--data", tmp_path / "set", "--max-steps", 1, "--width", 0.25]
    train("simsiam", tmp_path / "run", *words, "--image-size", 80)
    said = capsys.readouterr().out
    assert "images of at most 40 x 40 pixels (8 of 16 looked at): --image-size 64 loses nothing and is faster" in said
    assert "16 images in 2 classes" in said and "fp32 on cpu" in said
    train("simsiam", tmp_path / "other", *words, "--image-size", 64)
    assert "looked at" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:99"])
def test_devices_that_are_not_there(device, capsys):
    message = refused(capsys, main, "eval_knn", "--pretrained", "random", "--data", "fake", "--device", device)
    assert message.startswith(f"error: --device {device} ") and "choose auto" in message


def test_a_copied_script_has_a_run_folder_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "simsiam.py").read_text())
    done = command(tmp_path / "mine.py", "--help", check=0, env={"PYTHONPATH": str(ROOT)})
    assert "run folder (default: runs/mine)" in done.stdout


def test_help_shows_each_default_once():
    text = " ".join(command("simclr.py", "--help", check=0).stdout.split())
    assert "epochs (default: 1000)" in text and "weight decay (default: 1e-06)" in text
    assert "(default: None)" not in text and "(default: True)" not in text and "(default: )" not in text
