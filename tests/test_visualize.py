"""The two pictures of features: what they show, where, and which images they choose."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from common.checkpoint import load_backbone
from common.datasets import Fake
from common.features import Features
from common.resnet import resnet
from common.vit import vit
from tests.helpers import different, launch, main, refused, train, write_images
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
        assert Image.open(out / f"neighbours_{name}.png").size == (1192, 134 + 2 * (112 + 62 + 10) + 6)
        picture = Image.open(out / f"tsne_{name}.png").convert("RGB")
        assert picture.size == (948, 1020)
        assert len(picture.getcolors(2**20)) > 12 * 100  # thumbnails of photographs, not dots on a plane


def test_file_names_stand_where_there_are_no_classes(tmp_path, monkeypatch):
    """In two lines where they are long, with their end."""
    written = []
    monkeypatch.setattr(visualize.ImageDraw.ImageDraw, "text", lambda self, xy, text, *more: written.append(text))
    names = [f"{i}.png" for i in range(4)] + ["a photograph of something in the garden, 0001.png"]
    run("--data", write_images(tmp_path / "flat", names), "--out", tmp_path, "--neighbours", "--queries", 5, "--k", 4)
    assert all(written.count(name) == 1 + 4 for name in names[:4])  # a query, and a neighbour of the four others
    (first, second) = sorted({text for text in written if text.startswith("a photo") or text.endswith("0001.png")})
    assert first.startswith("a photograph") and second.endswith("...0001.png") and second[:3] in names[4][len(first) :]


def test_neighbours_beside_those_of_a_random_network(classes, tmp_path, capsys):
    """The left half shows the network of the file, the right one what --pretrained random would show."""
    data = ["--data", classes, "--queries", 3, "--k", 4, "--neighbours"]
    train("simsiam", tmp_path / "run", "--max-steps", 3, "--lr", 1)
    words = ["--pretrained", tmp_path / "run" / "backbone.pt", "--workers", 0, *data]
    pictures = {}
    for name, more in {"both": [], "alone": ["--no-compare"]}.items():
        main("visualize", *words, *more, "--out", tmp_path / name)
        pictures[name] = np.asarray(Image.open(tmp_path / name / "neighbours.png"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("neighbours  ")]
    run(*data, "--seed", 0, "--out", tmp_path / "random")
    pictures["random"] = np.asarray(Image.open(tmp_path / "random" / "neighbours.png"))
    block = 4 * 126 - 14 + 48
    assert pictures["both"].shape[1] == pictures["alone"].shape[1] + block
    below = slice(134 - 6, None)  # without titles
    for name, left in (("alone", 174), ("random", 174 + block)):
        found = pictures["both"][below, left - 6 :][:, : block - 48 + 12]
        assert np.array_equal(found, pictures[name][below, 174 - 6 :][:, : block - 48 + 12])
    assert [line.split(":")[0][12:] for line in said] == ["trained", "random initialisation", "trained"]
    assert all(line.endswith("of 12 of the same class") for line in said) and said[0] == said[2]


@pytest.mark.parametrize("kind", ["resnet", "vit", "filtered", "swin_tiny", "xcit_nano_12", "torchvision:alexnet"])
def test_random_network_of_the_same_architecture(kind, tmp_path):
    """Whatever a file says of it; it draws other weights, and the same ones every time."""
    torch.manual_seed(1)
    if kind == "vit":
        more = {
            "patch_size": 4,
            "heads": 2,
            "pool": "mean",
            "positions": "learned",
            "mlp_ratio": 2,
            "layer_scale": 1e-5,
        }
        network = vit("vit_tiny", 16, width=0.25, depth=2, **more)
        meta = {"arch": "vit_tiny", "width": 0.25, "image_size": 16}
    elif ":" in kind or "_" in kind:
        network, meta = load_backbone("random", kind, image_size=64 if ":" in kind else 32, seed=1)
    else:
        filtered = torch.randn(2, 3, 3, 3) if kind == "filtered" else None
        network = resnet("resnet18", 0.125, 16, input_filter=filtered)
        meta = {"arch": "resnet18", "width": 0.125, "image_size": 96}  # seen at another size than it was trained at
    meta = {"channels": 3, **meta}
    other, again = visualize.untrained(network, meta).state_dict(), visualize.untrained(network, meta).state_dict()
    own = network.state_dict()
    assert not different(other, again) and [v.shape for v in other.values()] == [v.shape for v in own.values()]
    weights = [k for k, v in own.items() if k.endswith("weight") and v.ndim > 1]
    assert weights and not any(torch.equal(own[k], other[k]) for k in weights)
    assert kind != "filtered" or torch.equal(own["input_filter"], other["input_filter"])


def test_one_picture_by_two_processes_is_that_of_both_by_one(classes, tmp_path):
    words = ["--data", classes, "--queries", 2]
    pictures = {"--tsne": ["tsne.npz", "tsne.png"], "--no-tsne": ["neighbours.png"]}
    launch(*(("visualize", [*TINY, *words, flag, "--out", tmp_path / flag]) for flag in pictures))
    run(*words, "--out", tmp_path / "both")
    for flag, files in pictures.items():
        assert sorted(p.name for p in (tmp_path / flag).iterdir()) == files
        assert (tmp_path / flag / files[-1]).read_bytes() == (tmp_path / "both" / files[-1]).read_bytes()


def test_at_most_twenty_classes_and_as_many_points_as_asked(tmp_path, monkeypatch, capsys):
    """The picture and a line say so, and for which classes there is a name."""
    data = Fake(75, 0, 16)
    data.labels, data.classes = np.arange(75) % 25, [f"no. {c}" for c in range(25)]
    monkeypatch.setattr(visualize, "open_split", lambda *_: data)
    run("--data", "fake", "--out", tmp_path, "--tsne", "--points", 30)
    found = np.load(tmp_path / "tsne.npz")
    expected = [i for i in range(75) if i % 25 < 20]
    assert found["indices"].tolist() == [expected[round(59 * j / 29)] for j in range(30)]
    assert found["labels"].max() < 20
    text = capsys.readouterr().out
    assert "tsne.png: 30 images of 20 of 25 classes" in text
    assert "names stand where a class is dense and in the majority, if there is room:" in text


def test_names_of_classes_that_are_apart(tmp_path, capsys):
    """Two that are, of seven; all of a set with fewer classes than colours are shown."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(7), 50)
    points = rng.normal(size=(350, 2)) + np.array([[0, 0], [40, 0]] + 5 * [[0, 40]])[labels]
    names = {c: f"no. {c}" for c in range(7)}
    visualize.draw_tsne(tmp_path / "x.png", points, labels, names, "title", "note", None)
    text = capsys.readouterr().out
    assert "if there is room: 2 of 7 classes" in text and "x.png: 350 images, " in text
    assert Image.open(tmp_path / "x.png").height == 120 + 900 + 24
    assert visualize.some_of([0, 1], names) == " of 2 of 7 classes" and visualize.some_of((), None) == ""


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
    assert "some features are not finite" in refused(capsys, run, *words)
