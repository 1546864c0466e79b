"""Every mistake gets exit code 2 and one line on stderr that names the flag or file; never a traceback."""

import re
import signal
import subprocess

import pytest
import torch
from PIL import Image

import simsiam
from common import args as arguments
from common import loader
from common.augment import View
from common.datasets import open_dataset
from tests.helpers import (
    ROOT,
    SCRIPTS,
    command,
    environment,
    flags,
    main,
    parsed,
    refused,
    start_of,
    state,
    train,
)

CASES = {
    "no data flag": ("", "--data"),
    "no such folder": ("--data /nowhere/at/all", "does not exist"),
    "unknown arch": ("--arch vit_giant", "unknown, expected one of"),
    "unknown flag": ("--batchsize 4", "--batchsize is unknown: did you mean --batch-size?"),
    "abbreviated flag": ("--batch=4", "did you mean --batch-size?"),
    "pasted flag": ("—num_workers 4", "did you mean --workers?"),
    "initials": ("--wd 1", "did you mean --weight-decay?"),
    "nothing like it": ("--xyzzy", "unrecognized arguments: --xyzzy"),
    "not a number": ("--epochs ten", "--epochs"),
    "zero epochs": ("--epochs 0", "--epochs"),
    "negative rate": ("--lr -1", "--lr"),
    "infinite rate": ("--lr inf", "--lr"),
    "more than certain": ("--flip 1.5", "--flip"),
    "negative workers": ("--workers -1", "--workers"),
    "tiny images": ("--image-size 4", "--image-size"),
    "batch larger than data": ("--batch-size 65", "--batch-size"),
    "batch not divisible": ("--batch-size 9 --accum 2", "--accum"),
    "warm-up longer than the run": ("--epochs 3 --warmup-epochs 3", "--warmup-epochs"),
    "init missing": ("--init /nowhere.pt", "--init"),
    "fake without number": ("--data fake:many", "fake:many"),
    "device that is not there": ("--device xpu:7", "--device xpu:7 cannot be used here"),
    "unknown device": ("--device gpu", "--device gpu is no device: choose auto"),
    "device without numbers": ("--device meta", "--device meta cannot be used here"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", CASES)
def test_pretraining(script, case, capsys, tmp_path):
    words, expected = CASES[case]
    base = flags(script, tmp_path) if words else []
    assert expected in refused(capsys, main, script, *base, *words.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_recipe_is_not_resumed(script, capsys, tmp_path):
    saved = train(script, tmp_path, "--max-steps", 1)
    error = refused(capsys, train, script, tmp_path, "--seed", 4, "--max-steps", 2)
    assert "--seed was 3, is 4" in error and "--no-resume" in error
    assert f"with a new schedule: --out NEW --init {tmp_path}/last.pt" in error
    assert "--init" not in refused(capsys, train, script, tmp_path, "--width", 0.375, "--max-steps", 2)
    for change in ({"format": 1}, {"format": None}):
        torch.save({k: v for k, v in (saved | change).items() if v is not None}, tmp_path / "last.pt")
        error = refused(capsys, train, script, tmp_path, "--max-steps", 2)
        assert "was written by another version of these scripts" in error and "--no-resume" in error
    train(script, tmp_path, "--seed", 4, "--max-steps", 1, "--no-resume")


@pytest.mark.parametrize("other", ["moco", "simsiam_copy"])
def test_folder_of_another_script(other, capsys, tmp_path, monkeypatch):
    train("simsiam", tmp_path, "--max-steps", 1)
    if other == "simsiam_copy":  # as its own file would name it
        monkeypatch.setattr(simsiam, "__file__", f"/elsewhere/{other}.py")
    error = refused(capsys, train, other.partition("_")[0], tmp_path)
    assert f"--out {tmp_path} belongs to simsiam.py, this is {other}.py: choose another --out" in error
    train(other.partition("_")[0], tmp_path, "--max-steps", 1, "--no-resume")


NO_BATCH_NORM = ("mae", "ijepa", "dino", "ibot", "esvit", "cae", "maskfeat", "simmim")
BATCH_NORM = [script for script in SCRIPTS if script not in NO_BATCH_NORM]


@pytest.mark.parametrize("words", ["--batch-size 1", "--batch-size 2 --accum 2", "--batch-size 1 --data fake:1"])
@pytest.mark.parametrize("script", BATCH_NORM)
def test_batch_norm_of_one_image(script, words, capsys, tmp_path):
    error = refused(capsys, main, script, *flags(script, tmp_path, *words.split()))
    assert re.search("at least 2 images|needs 2 images or more|for 1 images: more are needed", error)


@pytest.mark.parametrize("script", ["mae", "dino"])
def test_one_image_is_enough_without_batch_norm(script, tmp_path):
    assert train(script, tmp_path, *"--batch-size 1 --max-steps 1 --data fake:1".split())["step"] == 1


@pytest.mark.parametrize("words", ["--protocol mae --batch-size 1", "--protocol multihead --batch-size 257"])
def test_batch_norm_of_one_feature(words, capsys, tmp_path):
    network = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --data fake:300".split()
    error = refused(capsys, main, "eval_linear", *network, "--out", tmp_path, *words.split())
    assert "needs at least 2 images: choose an even --batch-size" in error


@pytest.mark.parametrize("script", ["eval_finetune", "eval_semi"])
def test_batch_norm_of_one_labelled_image(script, capsys, tmp_path):
    words = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --data fake:40 --batch-size 1".split()
    words += ["--labels", "50%"] if script == "eval_semi" else []
    assert "at least 2 images per micro-batch" in refused(capsys, main, script, *words, "--out", tmp_path)


@pytest.mark.parametrize("world, accum", [(1, 1), (2, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("images", [1, 2, 3, 5, 8, 9, 17, 70, 1000])
def test_advised_batches_can_be_used(images, world, accum, capsys, monkeypatch):
    """They share out evenly, fit the data set, and leave batch norm two images; where none does, none is named."""
    for module in (loader, arguments):
        monkeypatch.setattr(module, "world_size", lambda: world)
    data = open_dataset(f"fake:{images}", "train")
    error = refused(capsys, loader.Loader, data, [View(size=16)], 2000, accum=accum)
    found, parts = re.search(r"try (\d+)\n", error), world * accum
    assert bool(found) == (images >= 2 * parts), error
    if found:
        assert int(found[1]) % parts == 0 and 2 * parts <= int(found[1]) <= images
    args = parsed("simsiam", "--batch-size", 6 * images + 1, "--accum", accum)
    if (6 * images + 1) % parts:
        near = int(re.search(r"try (\d+)\n", refused(capsys, arguments.check_schedule, args))[1])
        assert near % parts == 0 and near >= 2 * parts and abs(near - 6 * images - 1) < 2 * parts


@pytest.mark.parametrize(
    "out, message", [("", "--out is empty"), ("f", "--out f is a file"), ("f/g", "cannot be made")]
)
def test_results_need_a_folder(out, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").touch()
    assert message in refused(capsys, train, "simsiam", out, "--max-steps", 1)


@pytest.mark.parametrize("gap", [0, 1, 5, 13])
def test_advised_sizes_of_squares_can_be_used(gap, capsys):
    for size in range(8, 60):
        try:
            parsed("relative_loc", "--image-size", size, "--gap", gap)
        except SystemExit:
            advised = re.search(r"--image-size (\d+) does", capsys.readouterr().err)[1]
            parsed("relative_loc", "--image-size", advised, "--gap", gap)


@pytest.mark.parametrize("script", ["odc", "interclr"])
def test_eight_images_can_be_clustered(script, tmp_path):
    words = "--data fake:8 --arch resnet18 --width 0.125 --image-size 16 --batch-size 4 --workers 0 --max-steps 1"
    main(script, *words.split(), "--min-cluster", 1, "--epochs", 1, "--out", tmp_path)
    assert state(tmp_path)["step"] == 1


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_ctrl_c_while_torch_is_imported(path, tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(start_of(path), cwd=ROOT, env=environment(PYTHONPATH=str(tmp_path)), **pipes)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert message == "interrupted\n" and process.returncode in (130, -signal.SIGINT)


def test_folders(capsys, tmp_path):
    for name in ("empty", "unreadable/a"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("w.jpg", "x.jpg"):
        (tmp_path / "unreadable/a" / name).write_bytes(b"no image")
    (tmp_path / "file").write_text("")
    words = flags("simsiam", tmp_path / "run", "--batch-size", 2, "--max-bad", 0, "--data")
    assert "no images" in refused(capsys, main, "simsiam", *words, tmp_path / "empty")
    assert "not a folder" in refused(capsys, main, "simsiam", *words, tmp_path / "file")
    done = command("simsiam.py", *words, tmp_path / "unreadable", check=2)
    assert ".jpg" in done.stderr and done.stderr.count("\n") == 1


def test_two_processes_report_once(tmp_path):
    done = command("simsiam.py", *flags("simsiam", tmp_path, "--batch-size", 9), processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: --batch-size 9 is not divisible by 2 processes") == 1


def test_knn(capsys, tmp_path):
    random = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --workers 0".split()
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / f"flat/{split}/a.png")
    own = tmp_path / "run/backbone.pt"
    train("simsiam", tmp_path / "run", "--max-steps", 1)
    half = state(tmp_path / "run", "backbone.pt")
    half["backbone"] = {k: v for k, v in half["backbone"].items() if "layer3" not in k}
    torch.save(half, tmp_path / "half.pt")
    digits = ["--data", "digits", "--out", tmp_path, "--pretrained"]
    assert "no labels" in refused(capsys, main, "eval_knn", *random, "--data", tmp_path / "flat", "--out", tmp_path)
    assert "no such file" in refused(capsys, main, "eval_knn", *digits, tmp_path / "no.pt")
    assert "--arch resnet50" in refused(capsys, main, "eval_knn", *digits, own, "--arch", "resnet50")
    error = refused(capsys, main, "eval_knn", *digits, tmp_path / "half.pt")
    assert "/120 tensors match" in error and "layer3.0.conv1.weight missing" in error


def test_a_pattern_that_the_shell_has_expanded_is_named(tmp_path, capsys):
    paths = [tmp_path / f"{i}.tar" for i in range(3)]
    for path in paths:
        path.touch()
    assert "put a pattern in quotes" in refused(capsys, main, "simsiam", "--data", *paths)
