"""Every mistake gets exit code 2 and one line on stderr that names the flag or file; never a traceback."""

import pytest
import torch
from PIL import Image

from tests.helpers import SCRIPTS, command, flags, main, refused, state, train

CASES = {
    "no data flag": ("", "--data"),
    "no such folder": ("--data /nowhere/at/all", "does not exist"),
    "unknown arch": ("--arch resnet19", "unknown, expected one of"),
    "unknown flag": ("--batchsize 4", "--batchsize"),
    "abbreviated flag": ("--batch 4", "--batch"),
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
    for change in ({"format": 1}, {"format": None}):
        torch.save({k: v for k, v in (saved | change).items() if v is not None}, tmp_path / "last.pt")
        error = refused(capsys, train, script, tmp_path, "--max-steps", 2)
        assert "was written by another version of these scripts" in error and "--no-resume" in error
    train(script, tmp_path, "--seed", 4, "--max-steps", 1, "--no-resume")


def test_folders(capsys, tmp_path):
    for name in ("empty", "unreadable/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "unreadable/a/x.jpg").write_bytes(b"no image")
    (tmp_path / "file").write_text("")
    words = flags("simsiam", tmp_path / "run", "--batch-size", 1, "--max-bad", 0, "--data")
    assert "no images" in refused(capsys, main, "simsiam", *words, tmp_path / "empty")
    assert "not a folder" in refused(capsys, main, "simsiam", *words, tmp_path / "file")
    done = command("simsiam.py", *words, tmp_path / "unreadable", check=2)
    assert "x.jpg" in done.stderr and done.stderr.count("\n") == 1


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
