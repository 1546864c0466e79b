"""Every mistake gets exit code 2 and one line on stderr that names the flag or file; never a traceback."""

import importlib

import pytest
import torch
from PIL import Image

from tests.helpers import SCRIPTS, command, flags, train


def refused(capsys, script, words):
    """Runs a script in this process; returns its single line on stderr."""
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        module.main(module.parse_args([str(w) for w in words]))
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


CASES = {
    "no data flag": ([], "--data"),
    "no such folder": (["--data", "/nowhere/at/all"], "does not exist"),
    "unknown arch": (["--data", "fake:64", "--arch", "resnet19"], "unknown, expected one of"),
    "unknown flag": (["--data", "fake:64", "--batchsize", "4"], "--batchsize"),
    "not a number": (["--data", "fake:64", "--epochs", "ten"], "--epochs"),
    "zero epochs": (["--data", "fake:64", "--epochs", "0"], "--epochs"),
    "negative rate": (["--data", "fake:64", "--lr", "-1"], "--lr"),
    "infinite rate": (["--data", "fake:64", "--lr", "inf"], "--lr"),
    "crop larger than the image": (["--data", "fake:64", "--flip", "1.5"], "--flip"),
    "negative workers": (["--data", "fake:64", "--workers", "-1"], "--workers"),
    "tiny images": (["--data", "fake:64", "--image-size", "4"], "--image-size"),
    "batch larger than data": (["--data", "fake:64", "--batch-size", "65"], "--batch-size"),
    "batch not divisible": (["--data", "fake:64", "--batch-size", "9", "--accum", "2"], "--accum"),
    "warm-up longer than the run": (["--data", "fake:64", "--epochs", "3", "--warmup-epochs", "3"], "--warmup-epochs"),
    "init missing": (["--data", "fake:64", "--init", "/nowhere.pt"], "--init"),
    "fake without number": (["--data", "fake:many"], "fake:many"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", CASES)
def test_pretraining(script, case, capsys, tmp_path):
    words, expected = CASES[case]
    base = flags(script, tmp_path)[2:] if words else []  # without --data
    assert expected in refused(capsys, script, [*base, *words])


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_recipe_is_not_resumed(script, capsys, tmp_path):
    train(script, tmp_path, "--max-steps", 1)
    capsys.readouterr()
    error = refused(capsys, script, flags(script, tmp_path, "--seed", 4, "--max-steps", 2))
    assert "--seed was 3, is 4" in error and "--no-resume" in error
    train(script, tmp_path, "--seed", 4, "--max-steps", 1, "--no-resume")


def test_folders(capsys, tmp_path):
    for name in ("empty", "unreadable/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "unreadable/a/x.jpg").write_bytes(b"no image")
    out = ["--out", tmp_path / "run", "--arch", "resnet18", "--epochs", 1, "--batch-size", 1, "--image-size", 16]
    assert "no images" in refused(capsys, "simsiam", ["--data", tmp_path / "empty", *out])
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(capsys, "simsiam", ["--data", tmp_path / "file", *out])
    words = ["--data", tmp_path / "unreadable", *map(str, out), "--max-bad", 0]
    done = command("simsiam.py", *words, check=2)
    assert "x.jpg" in done.stderr and done.stderr.count("\n") == 1


def test_two_processes_report_once(tmp_path):
    words = flags("simsiam", tmp_path, "--batch-size", 9)
    done = command("simsiam.py", *words, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: --batch-size 9 is not divisible by 2 processes") == 1


def test_knn(capsys, tmp_path):
    knn = ["--arch", "resnet18", "--width", 0.125, "--image-size", 16, "--out", tmp_path, "--workers", 0]
    (tmp_path / "flat/train").mkdir(parents=True)
    (tmp_path / "flat/val").mkdir()
    for split in ("train", "val"):
        Image.new("RGB", (20, 20)).save(tmp_path / f"flat/{split}/a.png")
    assert "no labels" in refused(capsys, "eval_knn", ["--pretrained", "random", "--data", tmp_path / "flat", *knn])
    assert "no such file" in refused(capsys, "eval_knn", ["--pretrained", tmp_path / "no.pt", "--data", "digits", *knn])
    train("simsiam", tmp_path / "run", "--max-steps", 1)
    capsys.readouterr()
    own = ["--pretrained", tmp_path / "run/backbone.pt", "--data", "digits", "--arch", "resnet50"]
    assert "--arch resnet50" in refused(capsys, "eval_knn", own)
    half = torch.load(tmp_path / "run/backbone.pt", weights_only=True)
    half["backbone"] = {k: v for k, v in half["backbone"].items() if "layer3" not in k}
    torch.save(half, tmp_path / "half.pt")
    error = refused(capsys, "eval_knn", ["--pretrained", tmp_path / "half.pt", "--data", "digits"])
    assert "/120 tensors match" in error and "layer3.0.conv1.weight missing" in error


def test_non_finite_loss_stops_and_keeps_the_last_good_state(tmp_path, capsys, monkeypatch):
    import simsiam

    train("simsiam", tmp_path, "--max-steps", 2)
    good = (tmp_path / "last.pt").read_bytes()
    real = simsiam.simsiam_loss
    monkeypatch.setattr(simsiam, "simsiam_loss", lambda *z: real(*z) * float("nan"))
    with pytest.raises(SystemExit) as stop:
        train("simsiam", tmp_path, "--max-steps", 4)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "loss is nan at step 3" in error and "lr" in error
    assert (tmp_path / "last.pt").read_bytes() == good
