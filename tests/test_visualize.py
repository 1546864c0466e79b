"""The pictures of features and of attention: what they show, where, and which images they choose."""

import copy
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
from common.xcit import xcit
from tests.helpers import different, launch, main, refused, train, write_images, write_vit
from tests.test_checkpoint import FILES
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
    assert visualize.same_class(points, labels, 5).mean() > 0.95 and 0 < divergence < 2
    assert np.array_equal(points, visualize.embed(x, 5, seed=0)[0])


# ------------------------------------------------------------------------------------------------ attention
@pytest.mark.parametrize("kind", ["vit", "xcit"])
def test_shares_of_attention_by_hand(kind):
    """Written out for every head and patch in NumPy, from what the last block's attention gets to see."""
    torch.manual_seed(0)
    if kind == "vit":
        network = vit("vit_tiny", 16, width=0.25, depth=2, patch_size=4, positions="learned").double().eval()
        last = network.blocks[-1].attn
    else:
        network = xcit("xcit_nano_12", 16, width=0.25, patch_size=4, depth=1, heads=2).double().eval()
        last = network.cls_attn_blocks[-1].attn
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # far from equal attention
    tokens = []
    last.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].detach().numpy()))
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    network(x)
    found = visualize.class_attention(network, x).numpy()
    assert found.shape == (2, last.heads, 4, 4) and found.max() > 0.1
    np.testing.assert_allclose(found.sum((2, 3)), 1, atol=1e-12)
    weight, bias = (getattr(last.qkv, name).detach().numpy() for name in ("weight", "bias"))
    dim = weight.shape[1]
    for i, sample in enumerate(tokens[0]):
        query, key = (sample @ weight[s].T + bias[s] for s in (slice(dim), slice(dim, 2 * dim)))
        for head in range(last.heads):
            part = slice(head * dim // last.heads, (head + 1) * dim // last.heads)
            e = [np.exp(query[0, part] @ k[part] / (dim / last.heads) ** 0.5) for k in key]
            expected = [value / sum(e[1:]) for value in e[1:]]
            np.testing.assert_allclose(found[i, head].ravel(), expected, rtol=1e-9)


def test_the_fewest_patches_that_hold_a_share():
    shares = torch.tensor([[[0.1, 0.4], [0.2, 0.3]], [[0.25, 0.25], [0.25, 0.25]]], dtype=torch.float64)
    for mass, (first, count) in {0.3: (["01"], 2), 0.5: (["01", "11"], 2), 0.8: (["01", "10", "11"], 4)}.items():
        found = visualize.holding(shares, mass)
        assert [f"{r}{c}" for r, c in found[0].nonzero().tolist()] == first and found[1].sum() == count
    assert visualize.holding(shares, 1.0).all()
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(36, 0.3), size=5)
    order = np.sort(shares, axis=1)  # as the authors of DINO do: from the smallest on, what exceeds the rest
    least = order[np.arange(5), (order.cumsum(1) <= 1 - 0.6).sum(1)]
    found = visualize.holding(torch.from_numpy(shares).view(5, 6, 6), 0.6).view(5, 36).numpy()
    np.testing.assert_array_equal(found, shares >= least[:, None])


def attention_of(*words):
    main("visualize", "--workers", 0, "--attention", *words)


def test_picture_of_attention(classes, tmp_path, monkeypatch, capsys):
    """Original, heads and mean; the network of the file above a random one: brightness by shares, or what they keep."""
    maps = torch.zeros(2, 3, 4, 4, dtype=torch.float64)  # of two networks, three heads
    maps[0, 0, 0, 0], maps[0, 1, 2, 1], maps[0, 2, 3, 3] = 1, 1, 1
    maps[1] = 1 / 16
    turns = iter([*maps] * 9)
    monkeypatch.setattr(visualize, "class_attention", lambda *_: next(turns)[None])
    words = ["--pretrained", write_vit(tmp_path / "vit.pt"), "--data", classes, "--queries", 3]
    attention_of(*words, "--out", tmp_path)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("attention ")] == [
        "attention   trained: 6% of the patches hold 60% of it",
        "attention   random initialisation: 62% of the patches hold 60% of it",  # 10 of 16
    ]
    assert not (tmp_path / "tsne.png").exists() and not (tmp_path / "neighbours.png").exists()
    picture = np.asarray(Image.open(tmp_path / "attention.png"))
    left = 24 + int(visualize.TEXT.getlength("random initialisation")) + 16
    bright, dark = visualize.HEAT[-1].tolist(), visualize.HEAT[0].tolist()

    def square(row, network, column):
        x, y = left + 112 + 24 + 120 * column, 134 + 274 * row + 120 * network
        return picture[y : y + 112, x : x + 112]

    for row, name in enumerate((NAMES[3], NAMES[9], NAMES[15])):
        with Image.open(classes / name) as image:
            original = np.asarray(image.convert("RGB").resize((112, 112), Image.Resampling.BICUBIC))
        assert np.array_equal(picture[134 + 274 * row :][:112, left:][:, :112], original)
        for head, (r, c) in enumerate([(0, 0), (2, 1), (3, 3)]):
            expected = np.full((112, 112, 3), dark)
            expected[28 * r : 28 * r + 28, 28 * c : 28 * c + 28] = bright
            assert np.array_equal(square(row, 0, head), expected)
        assert all((square(row, 0, 3)[28 * r + 14, 28 * c + 14] == bright).all() for r, c in [(0, 0), (2, 1), (3, 3)])
        quarter = visualize.HEAT[1] + (visualize.HEAT[2] - visualize.HEAT[1]) / 4  # an equal share: 1.25 of 5 steps
        assert all((square(row, 1, column) == quarter.round().numpy()).all() for column in range(4))

    attention_of(*words, "--out", tmp_path, "--threshold", 0.5, "--no-compare", "--queries", 1)
    picture = np.asarray(Image.open(tmp_path / "attention.png"))
    assert picture.shape[0] == 134 + 120 + 34
    left = 24 + int(visualize.TEXT.getlength("trained")) + 16
    kept = square(0, 0, 1)
    with Image.open(classes / NAMES[9]) as image:
        original = np.asarray(image.convert("RGB").resize((112, 112), Image.Resampling.BICUBIC))
    same = (kept == original).all(2)
    assert same[56:84, 28:56].all() and same.sum() < 28 * 28 + 20


@pytest.mark.parametrize("name", ["dino full", "ibot", "mae with decoder", "mocov3 vit"])
def test_attention_of_official_files(name, classes, tmp_path, monkeypatch):
    """Of the network that the file holds, with its number of heads; at twice the size by interpolated positions."""
    rows = []
    monkeypatch.setattr(visualize, "draw_attention", lambda path, drawn, *_: rows.extend(drawn))
    _, network, state = FILES[name]
    torch.save(state, tmp_path / "file.pth")
    side = 2 * network.grid[0] * network.patch_size
    words = ["--pretrained", tmp_path / "file.pth", "--data", classes, "--queries", 1, "--out", tmp_path]
    attention_of(*words, "--image-size", side, "--mean", 0.5, "--std", 0.25, "--no-compare", "--precision", "fp64")
    ((_, label, found),) = rows
    assert label == "bee" and list(found) == ["trained"]
    view = visualize.EvalView(side, interpolation=visualize.usual_interpolation(network))
    with Image.open(classes / NAMES[9]) as image:
        x = view.crop(visualize.to_tensor(image.convert("RGB"))).double() / 255
    expected = copy.deepcopy(network).double().attention(4 * x[None] - 2)[0, :, 0, 1:]
    expected = (expected / expected.sum(1, keepdim=True)).detach()
    assert found["trained"].shape == (network.heads, side // network.patch_size, side // network.patch_size)
    assert name != "mocov3 vit" or network.heads == 12
    torch.testing.assert_close(found["trained"].flatten(1), expected, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------- wrong commands
@pytest.mark.parametrize("arch", ["resnet18", "swin_tiny", "torchvision:alexnet"])
def test_networks_without_a_class_token_are_refused(arch, classes, capsys):
    words = ["--pretrained", "random", "--arch", arch, "--data", classes, "--image-size", 64]
    message = refused(capsys, attention_of, *words)
    assert f"--attention: {arch} has no class token" in message and "ViTs and XCiTs" in message


def test_one_line_for_a_mistake(classes, tmp_path, capsys, monkeypatch):
    words = ["--data", classes, "--out", tmp_path / "out"]
    assert "--k 18: 18 images" in refused(capsys, run, *words, "--neighbours", "--k", 18)
    assert "--perplexity 18 must be smaller" in refused(capsys, run, *words, "--tsne", "--perplexity", 18)
    assert "--k" in refused(capsys, run, *words, "--k", 0) and "--points" in refused(capsys, run, *words, "--points", 4)
    monkeypatch.setattr(Features, "forward", lambda self, x: torch.full((len(x), self.dim), torch.inf))
    assert "some features are not finite" in refused(capsys, run, *words)
    assert "--threshold is for --attention" in refused(capsys, run, *words, "--threshold", 0.6)
    assert "--threshold" in refused(capsys, run, *words, "--attention", "--threshold", 1.5)


# --------------------------------------------------------------------------------------------------- the spectrum
def test_spectrum_is_that_of_the_covariance_of_the_features(classes, tmp_path):
    train("simsiam", tmp_path / "run", "--max-steps", 1)
    words = ["--pretrained", tmp_path / "run" / "backbone.pt", "--data", classes, "--out", tmp_path, "--workers", "1"]
    main("visualize", *words, "--spectrum")
    assert not (tmp_path / "tsne.png").exists() and (tmp_path / "spectrum.png").exists()
    main("features", *words)
    bank, found = np.load(tmp_path / "features.npy").astype(np.float64), np.load(tmp_path / "spectrum.npz")
    expected = np.linalg.svd(bank - bank.mean(0), compute_uv=False) ** 2
    assert found["trained"] == pytest.approx(expected, rel=1e-3, abs=1e-6 * expected[0])
    assert not np.allclose(found["random_initialisation"], expected, rtol=0.01)
