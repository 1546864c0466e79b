"""Features of a backbone, nearest neighbours and k-NN votes against NumPy, scikit-learn and numbers found by hand."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import eval_knn
from common.augment import EvalView
from common.checkpoint import load_backbone
from common.datasets import Fake, open_dataset, open_labelled
from common.features import Features, broken_rows, extract
from common.knn import knn, monitor, nearest
from common.loader import eval_batches
from common.resnet import resnet
from common.vit import vit
from tests.helpers import SMALL, launch, logged, main, refused, rows, state, train, write_images, write_vit


# ---------------------------------------------------------------------------------------------------- features
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_stages_are_averaged(arch):
    backbone, x = resnet(arch, 0.125, 32).eval(), rows(3, 3, 32, 32).float()
    names = ["feat4", "feat1", "feat5", "feat2", "feat3"]
    model = Features(backbone, names).eval()
    with torch.no_grad():
        found, maps, pooled = model(x).split(model.dims, 1), backbone.stages(x), backbone(x)
    assert model.names == names
    for name, f in zip(names, found, strict=True):
        expected = maps[int(name[-1]) - 1].numpy().astype(np.float64)
        height, width = expected.shape[2:]
        np.testing.assert_allclose(f.numpy(), expected.sum((2, 3)) / (height * width), atol=1e-5)
    assert torch.equal(found[2], pooled)
    default = Features(backbone)
    assert default.names == ["feat5"] and default.dims == [backbone.dim] and torch.equal(default(x), pooled)
    assert Features(backbone, ["feat2", "feat2"]).names == ["feat2"]


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_class_token_and_mean_of_patches(pool):
    backbone, x = vit("vit_tiny", 16, 0.25, heads=3, depth=2, pool=pool).eval(), rows(2, 3, 16, 16).float()
    model = Features(backbone, ["mean", "cls"])
    with torch.no_grad():
        mean, cls = (f.numpy() for f in model(x).split(model.dims, 1))
        tokens, pooled = backbone.tokens(x).numpy(), backbone(x).numpy()
    average = tokens[:, 1:].sum(1) / 64  # patches of an eighth of the side
    if pool == "mean":  # which has its norm after the average, starting as the identity
        average = average - average.mean(1, keepdims=True)
        average = average / np.sqrt((average**2).mean(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(mean, average, atol=1e-5)
    np.testing.assert_array_equal(cls, tokens[:, 0])
    np.testing.assert_allclose({"cls": cls, "mean": mean}[pool], pooled, atol=1e-6)
    assert Features(backbone).names == [pool]


@pytest.mark.parametrize("backbone, name, known", [("resnet", "cls", "feat1, feat2"), ("vit", "feat3", "cls, mean")])
def test_unknown_features_are_refused(backbone, name, known, capsys):
    model = resnet(*SMALL) if backbone == "resnet" else vit("vit_tiny", 16, 0.25, heads=3, depth=1)
    error = refused(capsys, Features, model, [name])
    assert f"--features {name}" in error and known in error


def test_features_do_not_depend_on_the_number_of_processes(monkeypatch):
    """To the last bit: batches hold the same samples, and follow each other in rank order."""
    backbone, images = resnet(*SMALL), Fake(45, 0, 16)
    one, labels = extract(backbone, images, EvalView(16), "cpu", 0, 8)
    assert labels.tolist() == [i % 10 for i in range(45)] and one.shape == (45, 64)
    for processes in (2, 3, 9):  # the last has more processes than batches
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        parts = []
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            parts.append(extract(backbone, images, EvalView(16), "cpu", 0, 8, everywhere=False))
        assert torch.equal(torch.cat([f for f, _ in parts]), one)
        assert torch.equal(torch.cat([y for _, y in parts]), labels)


# -------------------------------------------------------------------------------------------------- neighbours
def slow_cosines(queries, bank):
    queries, bank = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, bank))
    return queries @ bank.T


@pytest.mark.parametrize("n", [1, 70, 1000, 1007])  # few and many, with and without a rest of 16
@pytest.mark.parametrize("k", [1, 5, 200])
@pytest.mark.parametrize("block", [2**16, 333, 64])
def test_nearest_equals_sorting_everything(n, k, block):
    rng = np.random.default_rng(n + k)
    bank, queries = rng.normal(size=(n, 6)), rng.normal(size=(23, 6))
    expected = slow_cosines(queries, bank)
    order = np.argsort(-expected, axis=1)[:, :k]
    for chunk in (2**28, 8 * 64 * 3):
        similarity, index = nearest(torch.from_numpy(queries), torch.from_numpy(bank), k, chunk, block)
        assert index.shape == (23, min(k, n))
        np.testing.assert_array_equal(index.numpy(), order)
        np.testing.assert_allclose(similarity.numpy(), np.take_along_axis(expected, order, 1), atol=1e-12)


def test_nearest_with_many_equal_similarities():
    """Features of few whole numbers, most rows there several times: any of equals may be taken, none twice."""
    rng = np.random.default_rng(0)
    bank, queries = rng.integers(-1, 2, (3000, 3)).astype(float), rng.integers(-1, 2, (40, 3)).astype(float)
    expected = slow_cosines(queries, bank)
    similarity, index = (t.numpy() for t in nearest(torch.from_numpy(queries), torch.from_numpy(bank), 40))
    np.testing.assert_allclose(similarity, -np.sort(-expected, axis=1)[:, :40], atol=1e-12)
    np.testing.assert_allclose(similarity, np.take_along_axis(expected, index, 1), atol=1e-12)
    assert all(len(set(row)) == 40 for row in index.tolist())


def test_nearest_takes_what_comes():
    bank = torch.randn(500, 8, dtype=torch.float64)
    wide, _ = nearest(bank[:9], bank, 5)
    half, _ = nearest(bank[:9].half(), bank.half(), 5)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), wide, atol=2e-3, rtol=0)
    columns, index = nearest(torch.randn(4, 3), torch.randn(50, 8)[:, 2:5], 2)  # columns of a wider matrix
    assert columns.shape == index.shape == (4, 2)
    values, index = nearest(bank[:0], bank, 5)  # a process may have no query
    assert values.shape == index.shape == (0, 5)
    values, _ = nearest(torch.zeros(1, 8), bank.float(), 3)
    assert values.tolist() == [[0.0, 0.0, 0.0]]


# ------------------------------------------------------------------------------------------------------- votes
def test_votes_by_hand():
    """Cosines 1, 0.8, 0.6, of classes 2, 1, 1: with T = 1 the votes are e = 2.72, and e^0.8 + e^0.6 = 4.05."""
    bank, labels = torch.tensor([[2.0, 0], [0.8, 0.6], [0.3, 0.4]]), torch.tensor([2, 1, 1])
    query = torch.tensor([[5.0, 0]])

    def top(label, k, temperature):
        return knn(bank, labels, query, torch.tensor([label]), (k,), temperature)[k]

    assert top(1, 3, 1.0) == (100, 100) and top(2, 3, 1.0) == (0, 100)
    assert top(2, 2, 1.0) == (100, 100) and top(2, 3, 0.1) == (100, 100)  # e^10 against e^8 + e^6
    assert top(0, 3, 1.0) == (0, 0)  # no vote, although only three classes exist


def test_equal_votes_go_to_the_lower_class():
    bank, labels = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]]), torch.tensor([3, 1, 0])
    for label, expected in ((1, (100, 100)), (3, (0, 100)), (0, (0, 0))):
        assert knn(bank, labels, bank[:1], torch.tensor([label]), (2,))[2] == expected


def test_temperatures_that_overflow_single_precision():
    """Cosines 0.8 and 1: exp(160) and exp(200) are both beyond float32, and the nearer one has to win."""
    bank, labels = torch.tensor([[0.8, 0.6], [1.0, 0.0]]), torch.tensor([0, 1])
    assert knn(bank, labels, bank[1:], labels[1:], (2,), 0.005)[2][0] == 100


# -------------------------------------------------------------------------------------------------- the script
WORDS = ["--pretrained", "random", "--arch", "resnet18", "--width", 0.125, "--image-size", 16, "--device", "cpu"]


def test_script_reports_every_feature(tmp_path, capsys):
    words = [*WORDS, "--data", "fake:120", "--k", 5, 20, "--workers", 0, "--batch-size", 50, "--out", tmp_path]
    several = main("eval_knn", *words, "--features", "feat2", "feat5")
    assert "feat2       k 20" in capsys.readouterr().out
    assert list(several["knn"]) == ["feat2", "feat5"]
    assert several["knn"]["feat5"] == main("eval_knn", *words)["knn"]

    torch.manual_seed(0)
    backbone, sets, features = resnet(*SMALL).eval(), open_labelled("fake:120"), []
    for part in sets:
        x = torch.cat([b[0] for b in eval_batches(part, EvalView(16), 50, "cpu", 0)])
        features.append(backbone.stages(x)[1].mean((2, 3)).detach().numpy())
    for k in (5, 20):
        peer = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        peer.fit(features[0], sets[0].labels)
        expected = (peer.predict(features[1]) == sets[1].labels).mean() * 100
        assert several["knn"]["feat2"][str(k)]["top1"] == pytest.approx(expected, abs=1e-3)


def test_two_processes_report_what_one_reports(tmp_path):
    """The whole script, on shares of 160 training and 32 test images that do not divide evenly into batches of 24."""
    words = [*WORDS, "--data", "fake:160", "--k", 1, 5, "--batch-size", 24, "--features", "feat1", "feat5"]
    one = main("eval_knn", *words, "--out", tmp_path / "one")
    launch(["eval_knn", [*words, "--out", tmp_path / "two"]])
    two = json.loads((tmp_path / "two" / "eval_knn.json").read_text())
    assert two["knn"] == one["knn"] and two["pixels"] == one["pixels"] and two["test"] == 32


def write_resnet(path, mean=0.5, std=0.25, damaged=False):
    """The file of a tiny ResNet, which says how its images were normalised."""
    torch.manual_seed(0)
    weights = resnet(*SMALL).state_dict()
    if damaged:
        weights["layer4.1.bn2.weight"].fill_(3e38)  # finite, but nothing that is computed with it
    meta = {"method": "simsiam", "arch": SMALL[0], "width": SMALL[1], "image_size": SMALL[2], "channels": 3}
    torch.save({"backbone": weights, "meta": meta | {"mean": [mean] * 3, "std": [std] * 3}}, path)
    return path


RUN = ["--data", "digits", "--k", 5, "--workers", 0, "--device", "cpu"]


def test_raw_pixels_are_the_same_beside_every_network(tmp_path):
    """Normalised by ImageNet's numbers, resized bilinearly, whatever the file says."""
    files = [write_resnet(tmp_path / "a.pt"), write_resnet(tmp_path / "b.pt", 0.0, 1.0), write_vit(tmp_path / "c.pt")]
    first, *others = (main("eval_knn", "--pretrained", path, *RUN) for path in files)
    assert [result["pixels"] for result in others] == [first["pixels"]] * 2
    assert first["knn"] != others[0]["knn"] != others[1]["knn"]
    sets = [torch.cat([x for x, *_ in eval_batches(s, EvalView(16), 64, "cpu", 0)]) for s in open_labelled("digits")]
    bank, queries = (x.flatten(1).double().numpy() for x in sets)
    order = np.argsort(-slow_cosines(queries, bank), axis=1)[:, 0]
    train, test = (s.labels for s in open_labelled("digits"))
    nearest_one = main("eval_knn", "--pretrained", files[0], *RUN, "--k", 1)["pixels"]["1"]["top1"]
    assert nearest_one == pytest.approx(100 * (train[order] == test).mean(), abs=1e-3)


@pytest.mark.parametrize("write, usual", [(write_resnet, "bilinear"), (write_vit, "bicubic")])
def test_interpolation_is_that_of_the_reference(write, usual, tmp_path, monkeypatch, capsys):
    views, real = [], eval_knn.extract
    monkeypatch.setattr(
        eval_knn, "extract", lambda m, d, view, *rest, **more: views.append(view) or real(m, d, view, *rest, **more)
    )
    words = ["--pretrained", write(tmp_path / "own.pt"), *RUN]
    result = main("eval_knn", *words)
    assert f"16 px, {usual}, T 0.07" in capsys.readouterr().out and result["interpolation"] == usual
    other = {"bilinear": "bicubic", "bicubic": "bilinear"}[usual]
    assert main("eval_knn", *words, "--interpolation", other)["interpolation"] == other
    assert [view.interpolation for view in views] == [usual] * 2 + ["bilinear"] * 2 + [other] * 2 + ["bilinear"] * 2


# ----------------------------------------------------------------------------------------- figures that mislead
def test_rows_that_are_not_finite_are_told(tmp_path, monkeypatch, capsys):
    features, images = torch.ones(60, 4), Fake(60, 0, 16)
    assert broken_rows(features, images, "test") == ""
    features[7, 2], features[30:34] = math.inf, math.nan
    text = broken_rows(features, images, "test")
    assert "5 of 60 test images are not finite" in text and "fake image 7, fake image 30, fake image 31 ..." in text
    real = eval_knn.extract

    def one(*words, **more):
        found, labels = real(*words, **more)
        found[3] = math.nan
        return found, labels

    monkeypatch.setattr(eval_knn, "extract", one)
    error = refused(capsys, main, "eval_knn", "--pretrained", write_resnet(tmp_path / "own.pt"), *RUN)
    assert "1 of 1,438 training images" in error and "image 3" in error and "--precision" not in error  # which is fp32
    error = refused(capsys, main, "eval_knn", "--pretrained", tmp_path / "own.pt", *RUN, "--precision", "bf16")
    assert "or try --precision fp32" in error
    assert not (tmp_path / "eval_knn.json").exists()


def test_weights_that_are_not_finite_are_told(tmp_path, capsys):
    words = ["--pretrained", write_resnet(tmp_path / "own.pt", damaged=True), *RUN]
    error = refused(capsys, main, "eval_knn", *words)
    assert "1,438 of 1,438 training images are not finite" in error and "weights are damaged" in error


def test_monitor_gives_no_accuracy_of_features_that_are_not_finite(capsys):
    backbone = resnet(*SMALL)
    sets = Fake(40, 0, 16), Fake(20, 40, 16)
    assert {"knn", "rankme"} <= monitor(backbone, *sets, EvalView(16), "cpu", 0, None).keys()
    backbone.bn1.weight.data.fill_(math.nan)
    assert monitor(backbone, *sets, EvalView(16), "cpu", 0, None) == {}
    assert "no k-NN accuracy: the network's features of 40 of 40 training images" in capsys.readouterr().out


def test_figures_of_fake_images_are_marked(tmp_path, capsys):
    words = [*WORDS, "--k", 5, "--workers", 0, "--out", tmp_path]
    assert "accuracies mean nothing" in main("eval_knn", *words, "--data", "fake:40")["note"]
    assert "note        fake images" in capsys.readouterr().out
    assert "note" not in main("eval_knn", *words, "--data", "digits")


def test_results_of_other_settings_stay(tmp_path, capsys):
    words = [*WORDS, "--data", "fake:40", "--workers", 0, "--out", tmp_path]
    results = [main("eval_knn", *words, "--k", k) for k in (1, 5)]
    entries = logged(tmp_path, "evaluations.jsonl")
    assert [entry["result"] for entry in entries] == results and entries[0]["script"] == "eval_knn"
    assert [entry["args"]["k"] for entry in entries] == ["[1]", "[5]"]
    assert json.loads((tmp_path / "eval_knn.json").read_text()) == results[1]
    assert f"{tmp_path}/evaluations.jsonl" in capsys.readouterr().out


def test_embedding_is_that_of_the_linear_projector(tmp_path, capsys):
    """Of npid.py's last.pt: features times its matrix, by hand; refused where there is none."""
    train("npid", tmp_path, "--max-steps", 1)
    weights, _ = load_backbone(tmp_path / "last.pt")
    layer = state(tmp_path)["model"]
    words = ["--data", "fake:64", "--image-size", "16", "--k", "3", "--workers", "0", "--out", str(tmp_path)]
    found = main("eval_knn", "--pretrained", tmp_path / "last.pt", "--embedding", *words)["knn"]
    sets = open_labelled("fake:64")
    view = EvalView(16)
    (bank, labels), (queries, targets) = (extract(weights, s, view, torch.device("cpu"), 0) for s in sets)
    bank, queries = (x @ layer["projector.weight"].T + layer["projector.bias"] for x in (bank, queries))
    top1, top5 = knn(bank, labels, queries, targets, (3,))[3]
    assert (found["3"]["top1"], found["3"]["top5"]) == (round(top1, 3), round(top5, 3))
    words = [main, "eval_knn", "--pretrained", tmp_path / "backbone.pt", "--embedding", *words]
    assert "the last.pt of npid.py does" in refused(capsys, *words)


def test_monitor_without_labels_gives_the_spectrum(tmp_path):
    write_images(tmp_path, [f"{i}.png" for i in range(40)], size=(16, 16))
    images = open_dataset(tmp_path, "train")
    found = monitor(resnet(*SMALL), images, None, EvalView(16), "cpu", 0, None)
    assert found.keys() == {"rankme", "alpha"} and 1 <= found["rankme"] <= 40
