"""The two pictures of features: what they show, where, and which images they choose."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from common.datasets import Fake
from common.features import Features
from tests.helpers import launch, main, refused, write_images
from tests.test_features import NAMES, TINY


def run(*words):
    main("visualize", *TINY, *words)


@pytest.fixture
def classes(tmp_path):
    return write_images(tmp_path / "set", NAMES, size=(16, 16))


def colour(text):
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


# ----------------------------------------------------------------------------------------------- the pictures
def test_pictures_of_labelled_images(classes, tmp_path):
    out = tmp_path / "out"
    run("--data", classes, "--out", out, "--k", 8, "--queries", 3)
    assert sorted(p.name for p in out.iterdir()) == ["neighbours.png", "tsne.npz", "tsne.png"]
    found = np.load(out / "tsne.npz")
    assert found["points"].shape == (18, 2) and np.isfinite(found["points"]).all()
    assert found["labels"].tolist() == [0] * 6 + [1] * 6 + [2] * 6 and found["indices"].tolist() == list(range(18))
    pixels = np.asarray(Image.open(out / "tsne.png").convert("RGB")).reshape(-1, 3)
    counts = [(pixels == colour(c)).all(1).sum() for c in visualize.COLOURS[:4]]
    assert min(counts[:3]) > 6 * 50 and counts[3] == 0  # 18 points of about 200 pixels, and the legend

    picture = Image.open(out / "neighbours.png").convert("RGB")
    assert picture.size == (24 + 126 + 24 + 8 * 126 - 14 + 24, 134 + 3 * (112 + 44 + 10) + 6)
    main("features", *TINY, "--data", classes, "--out", out)
    bank = np.load(out / "features.npy").astype(np.float64)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    for row, query in enumerate((3, 9, 15)):  # the middle of each class
        others = [i for i in np.argsort(-(bank @ bank[query])) if i != query][:8]
        for column, i in enumerate(others):
            x, y = 174 + 126 * column, 134 + 166 * row
            frame = visualize.GREEN if found["labels"][i] == found["labels"][query] else visualize.RED
            assert picture.getpixel((x - 3, y + 50)) == colour(frame)
            with Image.open(classes / NAMES[i]) as image:
                expected = image.convert("RGB").resize((112, 112), Image.Resampling.BICUBIC)
            assert np.array_equal(np.asarray(picture)[y : y + 112, x : x + 112], np.asarray(expected))


def test_pictures_of_unlabelled_images(tmp_path):
    out, data = tmp_path / "out", write_images(tmp_path / "flat", [f"{i:02}.png" for i in range(12)])
    run("--data", data, "--out", out, "--queries", 2, "--features", "feat3", "feat5")
    for name in ("feat3", "feat5"):
        assert "labels" not in np.load(out / f"tsne_{name}.npz")
        assert Image.open(out / f"neighbours_{name}.png").size == (1192, 134 + 2 * (112 + 26 + 10) + 6)
        picture = Image.open(out / f"tsne_{name}.png").convert("RGB")
        assert picture.size == (948, 1020)
        assert len(picture.getcolors(2**20)) > 12 * 100  # thumbnails of photographs, not dots on a plane


def test_one_picture_by_two_processes_is_that_of_both_by_one(classes, tmp_path):
    words = ["--data", classes, "--queries", 2]
    pictures = {"--tsne": ["tsne.npz", "tsne.png"], "--no-tsne": ["neighbours.png"]}
    launch(*(("visualize", [*TINY, *words, flag, "--out", tmp_path / flag]) for flag in pictures))
    run(*words, "--out", tmp_path / "both")
    for flag, files in pictures.items():
        assert sorted(p.name for p in (tmp_path / flag).iterdir()) == files
        assert (tmp_path / flag / files[-1]).read_bytes() == (tmp_path / "both" / files[-1]).read_bytes()


def test_at_most_twenty_classes_and_as_many_points_as_asked(tmp_path, monkeypatch):
    data = Fake(75, 0, 16)
    data.labels, data.classes = np.arange(75) % 25, [f"no. {c}" for c in range(25)]
    monkeypatch.setattr(visualize, "open_split", lambda *_: data)
    run("--data", "fake", "--out", tmp_path, "--tsne", "--points", 30)
    found = np.load(tmp_path / "tsne.npz")
    expected = [i for i in range(75) if i % 25 < 20]
    assert found["indices"].tolist() == [expected[round(59 * j / 29)] for j in range(30)]
    assert found["labels"].max() < 20


# ------------------------------------------------------------------------------------------------- what they show
def test_numbered_classes_are_called_after_their_folders():
    def names(paths, labels, classes=None):
        data = SimpleNamespace(path=paths.__getitem__, labels=np.array(labels), classes=classes)
        return visualize.class_names(data)

    assert names(["a/dog/1", "a/dog/2", "a/owl/1"], [4, 4, 2]) == {4: "dog", 2: "owl"}
    assert names(["a/1", "a/2"], [0, 1]) == {0: "class 0", 1: "class 1"}  # one folder of two classes
    assert names(["a/1", "b/2", "c/2"], [0, 0, 1]) == {0: "class 0", 1: "class 1"}  # two folders of one class
    assert names(["a/1", "b/2"], [0, 1], ["x", "y"]) == {0: "x", 1: "y"}


def test_a_query_is_not_its_own_neighbour():
    bank = np.random.default_rng(0).normal(size=(40, 4))
    bank[:20] = bank[0]  # so many copies that a query need not be among its own nearest
    cosine, index = visualize.neighbours(torch.from_numpy(bank), torch.tensor([0, 7, 30]), 5)
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
    np.testing.assert_allclose(visualize.same_class(points, labels, 7), expected)


def test_embedding_keeps_apart_what_is_apart():
    """Three clouds in 60 dimensions, so that PCA is part of it; twice the same."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    x = (rng.normal(size=(60, 60)) + 30 * rng.normal(size=(3, 60))[labels]).astype(np.float32)
    points, divergence = visualize.embed(x, 5, seed=0)
    assert visualize.same_class(points, labels, 5).mean() == 1 and 0 < divergence < 2
    assert np.array_equal(points, visualize.embed(x, 5, seed=0)[0])


# ---------------------------------------------------------------------------------------------- wrong commands
def test_one_line_for_a_mistake(classes, tmp_path, capsys, monkeypatch):
    words = ["--data", classes, "--out", tmp_path / "out"]
    assert "--k 18: 18 images" in refused(capsys, run, *words, "--neighbours", "--k", 18)
    assert "--perplexity 18 must be smaller" in refused(capsys, run, *words, "--tsne", "--perplexity", 18)
    assert "--k" in refused(capsys, run, *words, "--k", 0) and "--points" in refused(capsys, run, *words, "--points", 4)
    monkeypatch.setattr(Features, "forward", lambda self, x: torch.full((len(x), self.dim), torch.inf))
    assert "some features overflow" in refused(capsys, run, *words)
