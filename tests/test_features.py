"""Features written to files: their order, their values, and any number of processes."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import features
from common.augment import IMAGENET_MEAN, IMAGENET_STD
from common.resnet import resnet
from tests.helpers import SMALL, command, main, refused, write_images

TINY = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --workers 0 --batch-size 4".split()
NAMES = [f"val/{name}/{i}.png" for name in ("ant", "bee", "cat") for i in range(6)]


def run(*words):
    main("features", *TINY, *words)


@pytest.fixture
def classes(tmp_path):
    return write_images(tmp_path / "set", NAMES, size=(16, 16))


def test_rows_are_the_features_of_the_paths(classes, tmp_path, capsys):
    out = tmp_path / "out"
    run("--data", classes, "--out", out, "--features", "feat5", "feat2")
    paths = (out / "paths.txt").read_text().splitlines()
    assert paths == [str(classes / name) for name in NAMES]
    assert np.load(out / "labels.npy").tolist() == [0] * 6 + [1] * 6 + [2] * 6
    torch.manual_seed(0)
    backbone = resnet(*SMALL).eval()
    for name in ("feat5", "feat2"):
        found = np.load(out / f"features_{name}.npy")
        assert found.dtype == np.float32 and found.shape == (18, {"feat5": 64, "feat2": 8}[name])
        for row in (0, 4, 17):
            x = np.asarray(Image.open(paths[row]), dtype=np.float32) / 255
            x = torch.from_numpy((x - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)).permute(2, 0, 1)[None]
            maps = backbone.stages(x)[int(name[-1]) - 1].detach().numpy()
            np.testing.assert_allclose(found[row], maps[0].mean((1, 2)), atol=1e-5)
    written = [str(out / name) for name in ("features_feat5.npy", "features_feat2.npy", "paths.txt", "labels.npy")]
    assert sorted(map(str, out.iterdir())) == sorted(written)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.partition(":")[0] for line in lines] == written
    values = np.linalg.svd(found.astype(np.float64), compute_uv=False)
    share = values / values.sum()
    rank = float(lines[1].split("rankme ")[1].split()[0])
    assert rank == pytest.approx(np.exp(-(share * np.log(share + 1e-30)).sum()), abs=0.01), "of feat2, 18 x 8"

    run("--data", classes, "--out", out, "--fp16")
    half = np.load(out / "features.npy")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, np.load(out / "features_feat5.npy"), rtol=1e-3, atol=1e-4)


def test_two_processes_write_what_one_writes(classes, tmp_path):
    words = [*TINY, "--data", classes, "--split", "val"]
    command("features.py", *words, "--out", tmp_path / "two", processes=2, check=0)
    run("--data", classes, "--out", tmp_path / "one")
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == ["features.npy", "labels.npy", "paths.txt"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_unlabelled_folder_with_odd_names(tmp_path):
    names = [b"a b.png", b"line\nbreak.png", b"\xff\xe9.png", b"x.png"]
    folder, out = os.fsencode(tmp_path / "flat"), tmp_path / "out"
    write_images(tmp_path / "flat", map(os.fsdecode, names), size=(16, 16))
    out.mkdir()
    np.save(out / "labels.npy", np.arange(3))  # of an earlier run on something else
    run("--data", tmp_path / "flat", "--out", out)
    lines = (out / "paths.txt").read_bytes().split(b"\n")
    expected = sorted(names, key=os.fsdecode)
    assert lines == [*(os.path.join(folder, n.replace(b"\n", b"\\n")) for n in expected), b""]
    assert np.load(out / "features.npy").shape == (4, 64) and not (out / "labels.npy").exists()


def test_split_and_lists(classes, tmp_path):
    write_images(classes, ["train/ant/9.png"])
    run("--data", classes, "--split", "train", "--out", tmp_path / "train")
    assert len(np.load(tmp_path / "train/features.npy")) == 1
    (tmp_path / "list.txt").write_text("val/bee/1.png 7\nval/ant/1.png 3\nval/ant/2.png 3\n")
    run("--data", classes, "--train-list", tmp_path / "list.txt", "--out", tmp_path / "list")
    assert np.load(tmp_path / "list/labels.npy").tolist() == [7, 3, 3]


@pytest.mark.parametrize("script", ["features", "visualize"])
def test_one_line_for_a_mistake(script, classes, tmp_path, capsys):
    for words, expected in (
        ("--features feat6", "--features feat6"),
        ("--split train", "train"),
        ("--pretrained /nowhere.pt", "no such file"),
        (f"--out {__file__}", "--out"),
        ("--val-list /nowhere.txt", "--val-list"),
    ):
        start = [script, *TINY, "--data", classes, "--out", tmp_path / "out"]
        assert expected in refused(capsys, main, *start, *words.split())


def test_overflow_and_full_disks_are_reported(classes, tmp_path, capsys, monkeypatch):
    words, out = ["--data", classes, "--out", tmp_path / "out"], tmp_path / "out"
    monkeypatch.setattr(features.Features, "forward", lambda self, x: torch.full((len(x), self.dim), 1e5))
    assert "leave --fp16 out" in refused(capsys, run, *words, "--fp16") and not list(out.iterdir())
    run(*words)
    assert (np.load(out / "features.npy") == 1e5).all()
    usage = features.shutil.disk_usage(tmp_path)._replace(free=18 * 64 * 4 - 1)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage)
    assert "free; try --fp16" in refused(capsys, run, *words)
