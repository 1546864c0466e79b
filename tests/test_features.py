"""Features written to files: their order, their values, any number of processes, and the two pictures."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import features
from common.augment import IMAGENET_MEAN, IMAGENET_STD
from common.data import Fake
from common.resnet import resnet
from tests.helpers import command

TINY = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --workers 0 --batch-size 4 --precision fp32"


def run(*words):
    features.main(features.parse_args([*TINY.split(), *map(str, words)]))


def paint(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path, "PNG")


@pytest.fixture
def classes(tmp_path):
    """A folder with val/{ant,bee,cat}/{0..5}.png."""
    for number, name in enumerate(("ant", "bee", "cat")):
        for i in range(6):
            paint(tmp_path / f"set/val/{name}/{i}.png", 10 * number + i)
    return tmp_path / "set"


# -------------------------------------------------------------------------------------------------- the files
def test_rows_are_the_features_of_the_paths(classes, tmp_path, capsys):
    out = tmp_path / "out"
    run("--data", classes, "--out", out, "--features", "feat5", "feat2")
    paths = (out / "paths.txt").read_text().splitlines()
    assert paths == [str(classes / f"val/{c}/{i}.png") for c in ("ant", "bee", "cat") for i in range(6)]
    assert np.load(out / "labels.npy").tolist() == [0] * 6 + [1] * 6 + [2] * 6
    torch.manual_seed(0)
    backbone = resnet("resnet18", 0.125, 16).eval()
    for name in ("feat5", "feat2"):
        found = np.load(out / f"features_{name}.npy")
        assert found.dtype == np.float32 and found.shape == (18, {"feat5": 64, "feat2": 8}[name])
        for row in (0, 4, 17):
            x = np.asarray(Image.open(paths[row]), dtype=np.float32) / 255
            x = torch.from_numpy((x - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)).permute(2, 0, 1)[None]
            maps = backbone.stages(x)[int(name[-1]) - 1].detach().numpy()
            np.testing.assert_allclose(found[row], maps[0].mean((1, 2)), atol=1e-5)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["features_feat2.npy", "features_feat5.npy", "labels.npy", "paths.txt"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[2:]] == [
        str(out / name) for name in ("features_feat5.npy", "features_feat2.npy", "paths.txt", "labels.npy")
    ]

    run("--data", classes, "--out", out, "--fp16")
    half = np.load(out / "features.npy")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, np.load(out / "features_feat5.npy"), rtol=1e-3, atol=1e-4)


def test_two_processes_write_what_one_writes(classes, tmp_path):
    words = [*TINY.split(), "--data", str(classes), "--split", "val"]
    command("features.py", *words, "--out", tmp_path / "two", processes=2, check=0)
    run("--data", classes, "--out", tmp_path / "one")
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == ["features.npy", "labels.npy", "paths.txt"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_unlabelled_folder_with_odd_names(tmp_path, capsys):
    names = [b"a b.png", b"line\nbreak.png", b"\xff\xe9.png"]
    folder = os.fsencode(tmp_path / "flat")
    paint(tmp_path / "flat/x.png", 0)
    for i, name in enumerate(names):
        with open(os.path.join(folder, name), "wb") as file:
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(file, "PNG")
    out = tmp_path / "out"
    out.mkdir()
    np.save(out / "labels.npy", np.arange(3))  # of an earlier run on something else
    run("--data", tmp_path / "flat", "--out", out)
    lines = (out / "paths.txt").read_bytes().split(b"\n")
    expected = sorted([*names, b"x.png"], key=os.fsdecode)
    assert lines == [*(os.path.join(folder, n.replace(b"\n", b"\\n")) for n in expected), b""]
    assert np.load(out / "features.npy").shape == (4, 64) and not (out / "labels.npy").exists()


def test_split_and_lists(classes, tmp_path, capsys):
    paint(classes / "train/ant/9.png", 1)
    run("--data", classes, "--split", "train", "--out", tmp_path / "train")
    assert len(np.load(tmp_path / "train/features.npy")) == 1
    (tmp_path / "list.txt").write_text("val/bee/1.png 7\nval/ant/1.png 3\nval/ant/2.png 3\n")
    run("--data", classes, "--train-list", tmp_path / "list.txt", "--out", tmp_path / "list")
    assert np.load(tmp_path / "list/labels.npy").tolist() == [7, 3, 3]


def test_numbered_classes_are_called_after_their_folders(tmp_path, capsys):
    class Set:
        def __init__(self, paths, labels, classes=None):
            self.paths, self.labels, self.classes = paths, np.array(labels), classes

        def __len__(self):
            return len(self.paths)

        def path(self, i):
            return self.paths[i]

    def names(*given):
        return features.write_paths(tmp_path, Set(*given))

    assert names(["a/dog/1", "a/dog/2", "a/owl/1"], [4, 4, 2]) == {4: "dog", 2: "owl"}
    assert names(["a/1", "a/2"], [0, 1]) == {0: "class 0", 1: "class 1"}  # one folder of two classes
    assert names(["a/1", "b/2", "c/2"], [0, 0, 1]) == {0: "class 0", 1: "class 1"}  # two folders of one class
    assert names(["a/1", "b/2"], [0, 1], ["x", "y"]) == {0: "x", 1: "y"}


# ----------------------------------------------------------------------------------------------- the pictures
def test_pictures_of_labelled_images(classes, tmp_path, capsys):
    out = tmp_path / "out"
    run("--data", classes, "--out", out, "--tsne", "--neighbours", "--k", 8, "--queries", 3)
    found = np.load(out / "tsne.npz")
    assert found["points"].shape == (18, 2) and np.isfinite(found["points"]).all()
    assert found["labels"].tolist() == np.load(out / "labels.npy").tolist()
    assert found["indices"].tolist() == list(range(18))
    picture = np.asarray(Image.open(out / "tsne.png").convert("RGB")).reshape(-1, 3)
    for colour in features.COLOURS[:3]:  # 18 points of about 200 pixels, and the legend
        assert (picture == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(1).sum() > 6 * 50
    assert not (picture == [int(features.COLOURS[3][i : i + 2], 16) for i in (1, 3, 5)]).all(1).any()

    picture = Image.open(out / "neighbours.png").convert("RGB")
    assert picture.size == (24 + 126 + 24 + 8 * 126 - 14 + 24, 134 + 3 * (112 + 44 + 10) + 6)
    bank, labels = np.load(out / "features.npy").astype(np.float64), np.load(out / "labels.npy")
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    for row, query in enumerate((3, 9, 15)):  # the middle of each class
        others = [i for i in np.argsort(-(bank @ bank[query])) if i != query][:8]
        for column, i in enumerate(others):
            x, y = 174 + 126 * column, 134 + 166 * row
            same = labels[i] == labels[query]
            assert picture.getpixel((x - 3, y + 50)) == ((0x1A, 0x96, 0x41) if same else (0xD7, 0x19, 0x1C))
            with Image.open((out / "paths.txt").read_text().splitlines()[i]) as image:
                expected = image.convert("RGB").resize((112, 112), Image.Resampling.BICUBIC)
            assert np.array_equal(np.asarray(picture)[y : y + 112, x : x + 112], np.asarray(expected))


def test_pictures_of_unlabelled_images(tmp_path, capsys):
    for i in range(12):
        paint(tmp_path / f"flat/{i:02}.png", i)
    out = tmp_path / "out"
    run(
        "--data",
        tmp_path / "flat",
        "--out",
        out,
        "--tsne",
        "--neighbours",
        "--queries",
        2,
        "--features",
        "feat3",
        "feat5",
    )
    for name in ("feat3", "feat5"):
        assert "labels" not in np.load(out / f"tsne_{name}.npz")
        assert Image.open(out / f"neighbours_{name}.png").size == (1192, 134 + 2 * (112 + 26 + 10) + 6)
        picture = Image.open(out / f"tsne_{name}.png").convert("RGB")
        assert picture.size == (948, 1020)
        assert len(picture.getcolors(2**20)) > 12 * 100  # thumbnails of noise, not dots on a plane


def test_a_query_is_not_its_own_neighbour():
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(40, 4))
    bank[:20] = bank[0]  # so many copies that a query need not be among its own nearest
    cosine, index = features.neighbours(torch.from_numpy(bank), torch.tensor([0, 7, 30]), 5)
    assert not (index == torch.tensor([0, 7, 30])[:, None]).any()
    assert (index[:2] < 20).all() and torch.allclose(cosine[:2], torch.ones(2, 5, dtype=torch.float64))
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    assert cosine[2].tolist() == pytest.approx(np.sort(np.delete(unit @ unit[30], 30))[::-1][:5])


def test_share_of_the_same_class():
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(50, 2)), rng.integers(0, 3, 50)
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(50)
    nearest = np.argsort(distance, axis=1)[:, :7]
    expected = [np.mean(labels[row] == label) for row, label in zip(nearest, labels, strict=True)]
    np.testing.assert_allclose(features.same_class(points, labels, 7), expected)


def test_embedding_keeps_apart_what_is_apart():
    """Three clouds in 60 dimensions, so that PCA is part of it; twice the same."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    x = (rng.normal(size=(60, 60)) + 30 * rng.normal(size=(3, 60))[labels]).astype(np.float32)
    points, divergence = features.embed(x, 5, seed=0)
    assert features.same_class(points, labels, 5).mean() == 1 and 0 < divergence < 2
    assert np.array_equal(points, features.embed(x, 5, seed=0)[0])


def test_at_most_twenty_classes_and_as_many_points_as_asked(tmp_path, capsys, monkeypatch):
    data = Fake(75, 0, 16)
    data.labels, data.classes = np.arange(75) % 25, [f"no. {c}" for c in range(25)]
    monkeypatch.setattr(features, "build", lambda *_, **__: data)
    run("--data", "fake", "--out", tmp_path, "--tsne", "--points", 30)
    found = np.load(tmp_path / "tsne.npz")
    expected = [i for i in range(75) if i % 25 < 20]
    assert found["indices"].tolist() == [expected[round(59 * j / 29)] for j in range(30)]
    assert found["labels"].max() < 20


# ---------------------------------------------------------------------------------------------- wrong commands
CASES = {
    "no such feature": (["--features", "feat6"], "--features feat6"),
    "fewer images than neighbours": (["--neighbours", "--k", "18"], "--k 18: 18 images"),
    "perplexity too large": (["--tsne", "--perplexity", "18"], "--perplexity 18 must be smaller"),
    "no neighbour": (["--neighbours", "--k", "0"], "--k"),
    "no such split": (["--split", "train"], "train"),
    "no such backbone": (["--pretrained", "/nowhere.pt"], "no such file"),
    "out is a file": (["--out", __file__], "--out"),
    "no such list": (["--val-list", "/nowhere.txt"], "--val-list"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_for_a_mistake(case, classes, tmp_path, capsys):
    words, expected = CASES[case]
    with pytest.raises(SystemExit) as stop:
        run("--data", classes, "--out", tmp_path / "out", *words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and expected in error


def test_overflow_and_full_disks_are_told(classes, tmp_path, capsys, monkeypatch):
    words = ["--data", classes, "--out", tmp_path / "out"]
    monkeypatch.setattr(features.Features, "forward", lambda self, x: torch.full((len(x), self.dim), 1e5))
    with pytest.raises(SystemExit):
        run(*words, "--fp16")
    assert "leave --fp16 out" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())
    run(*words)
    assert (np.load(tmp_path / "out/features.npy") == 1e5).all()
    capsys.readouterr()
    usage = features.shutil.disk_usage(tmp_path)._replace(free=18 * 64 * 4 - 1)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SystemExit):
        run(*words)
    assert "free; try --fp16" in capsys.readouterr().err
