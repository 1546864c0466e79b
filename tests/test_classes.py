"""Accuracy by class and confusions: counts against loops, the table, the picture, and what evaluations say of both."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import classes
from common.knn import knn
from tests.helpers import launch, main

TINY = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --workers 0 --data digits".split()


def data(labels, names=None, path="val/{}.png"):
    return SimpleNamespace(labels=np.array(labels), classes=names, path=path.format)


def rows_of(out, name):
    with open(out / f"per_class_{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_class(out, targets, predictions, test, train=None):
    args = SimpleNamespace(pretrained="random", out=out)
    return classes.by_class(args, "knn", "k-NN, k 20", targets, predictions, test, train or test)


# ------------------------------------------------------------------------------------------------------ counts
def test_pairs_most_often_confused_come_first():
    targets = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    predictions = np.array([0, 2, 2, -1, 0, 0, 1, 2, -1])
    # of equally frequent ones, that of the smaller class comes first; no prediction is none
    assert classes.confusions(targets, predictions) == [(2, 1, 0), (2, 0, 2), (1, 2, 1)]


def test_table_against_loops():
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(0, 6, 200), rng.integers(-1, 6, 200)
    shown, table = classes.confusion_table(targets, predictions, dict.fromkeys(range(6), ""), [])
    expected = [[((targets == a) & (predictions == b)).sum() for b in (*range(6), -1)] for a in range(6)]
    assert shown.tolist() == list(range(6)) and table.tolist() == expected


def test_of_many_classes_only_those_that_are_confused():
    """130 classes with numbers that leave gaps; 45 is taken for 1290 and 20 for 30, most often."""
    names = {10 * c: f"no. {c}" for c in range(130)} | {45: "x"}
    targets = np.repeat(list(names), 10)
    predictions = targets.copy()
    predictions[targets == 45] = [1290] * 8 + [45, 500]
    predictions[targets == 20] = [30] * 5 + [20] * 5
    found = classes.confusions(targets, predictions)
    shown, table = classes.confusion_table(targets, predictions, names, found)
    assert len(shown) == 20 and {45, 1290, 20, 30, 500} < {*shown.tolist()} and sorted(shown) == shown.tolist()
    row, column = shown.tolist().index(45), shown.tolist().index(1290)
    assert table.shape == (20, 21) and table[row, column] == 8 and table[row].sum() == 10
    assert table[:, -1].sum() == 0 and table.sum() == 200


def test_predictions_of_nearest_neighbours():
    """Those that are counted, also in parts, and with classes of equally many votes."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 8, generator=generator) for n in (90, 40))
    labels, targets = (torch.randint(0, 5, (n,), generator=generator) for n in (90, 40))
    bank[45:] = bank[:45]  # votes of the same weight, of several classes
    found = {}
    result = knn(bank, labels, queries, targets, (1, 2, 20), chunk_bytes=4 * 90 * 7, predictions=found)
    assert result == knn(bank, labels, queries, targets, (1, 2, 20))
    for k, (top1, _) in result.items():
        assert found[k].shape == (40,) and (found[k] == targets).double().mean() * 100 == pytest.approx(top1)


# ----------------------------------------------------------------------------------------------- what is written
def test_what_is_said_of_classes(tmp_path, capsys):
    """Names from the folders of the training images, as a test set in one folder has none."""
    targets = np.array([3] * 4 + [7] * 10 + [9])
    predictions = np.array([3, 7, 7, 7] + [7] * 9 + [3] + [9])
    train = data([3, 7, 9], path="train/{}.png")
    train.path = lambda i: f"train/{['cat', 'dog', 'emu'][i]}/1.png"
    result = by_class(tmp_path, targets, predictions, data(targets), train)
    assert result == {"per_class": {"cat": 25.0, "dog": 90.0, "emu": 100.0}}
    text = capsys.readouterr().out
    assert "k-NN, k 20: mean of 3 classes 71.67; worst cat 25.0; best emu 100.0" in text
    lines = [line for line in text.splitlines() if line.startswith("confused")]
    assert lines == ["confused    cat taken for dog: 3 of 4", "confused    dog taken for cat: 1 of 10"]
    rows = rows_of(tmp_path, "knn")
    assert [row["label"] for row in rows] == ["3", "7", "9"] and [row["right"] for row in rows] == ["1", "9", "1"]
    assert (rows[0]["most often taken for"], rows[0]["times"], rows[2]["times"]) == ("dog", "3", "0")
    assert Image.open(tmp_path / "confusion_knn.png").width > 150


def test_nothing_is_confused(tmp_path, capsys):
    assert by_class(tmp_path, [0, 0], [0, 0], data([0, 0], ["one, and only"])) == {
        "per_class": {"one, and only": 100.0}
    }
    assert "no test image is taken for another class" in capsys.readouterr().out
    assert rows_of(tmp_path, "knn")[0]["class"] == "one, and only"


@pytest.mark.parametrize("count, said", [(20, 20), (21, 0), (150, 0)])
def test_pictures_of_few_and_many_classes(count, said, tmp_path, capsys):
    """The result lists at most 20 classes, ten pairs are named whatever their number, and a picture fits a screen."""
    targets = np.repeat(np.arange(count), 12)
    predictions = np.where(np.arange(len(targets)) % 3 == 0, (targets + 1) % count, targets)
    result = by_class(tmp_path, targets, predictions, data(targets, [f"name {c}" for c in range(count)]))
    assert len(result.get("per_class", ())) == said and len(rows_of(tmp_path, "knn")) == count
    assert capsys.readouterr().out.count("taken for name") == 10
    assert max(Image.open(tmp_path / "confusion_knn.png").size) < 1500


def test_colours_of_the_picture(tmp_path):
    """A class that is always right, one that is always taken for it."""
    by_class(tmp_path, [0] * 5 + [1] * 5, [0] * 10, data([0] * 5 + [1] * 5, ["a", "b"]))
    picture = np.asarray(Image.open(tmp_path / "confusion_knn.png"))
    blue, red = (np.argwhere((picture == colour).all(2)) for colour in (classes.BLUE, classes.RED))
    assert 900 < len(blue) < 35 * 35 and 900 < len(red) < 35 * 35  # one cell each, but for its number
    assert red[:, 0].min() - blue[:, 0].min() == 36 and red[:, 1].min() == blue[:, 1].min()  # below the other


# ------------------------------------------------------------------------------------------------- evaluations
def test_evaluations_show_classes(tmp_path, capsys):
    """Per-class accuracies are those of the figure that is called the best one."""
    near = main("eval_knn", *TINY, "--k", 5, 5, 300, "--out", tmp_path)
    assert near["best"] == {"features": "features", "k": 5, **near["knn"]["5"]} and near["knn"].keys() == {"5", "300"}
    assert "k-NN, k 5, top-1" in capsys.readouterr().out
    linear = main("eval_linear", *TINY, "--lr", 0.1, "--epochs", 3, "--out", tmp_path)
    assert f"linear, small lr 0.1, epoch 3, top-1 {linear['best']['top1']:.2f} %" in capsys.readouterr().out
    for name, result in (("knn", near), ("linear", linear)):
        rows = rows_of(tmp_path, name)
        assert [row["class"] for row in rows] == [str(d) for d in range(10)]
        assert sum(int(row["images"]) for row in rows) == 359
        assert 100 * sum(int(row["right"]) for row in rows) / 359 == pytest.approx(result["best"]["top1"], abs=1e-3)
        assert result["per_class"] == {row["class"]: float(row["accuracy"]) for row in rows}
        assert json.loads((tmp_path / f"eval_{name}.json").read_text())["per_class"] == result["per_class"]


def test_the_best_epoch_is_shown_also_of_a_run_that_goes_on(tmp_path):
    """Two classifiers, of which another epoch may be the best; a complete run that is started again says the same."""
    words = [*TINY, "--protocol", "moco", "--lr", "30,3", "--batch-size", 64, "--epochs", 3]
    result = main("eval_linear", *words, "--out", tmp_path)
    right = sum(int(row["right"]) for row in rows_of(tmp_path, "linear"))
    assert 100 * right / 359 == pytest.approx(result["best"]["top1"], abs=1e-3)
    assert main("eval_linear", *words, "--out", tmp_path) == result
    saved = torch.load(tmp_path / "linear_last.pt", weights_only=True)
    for probe in saved["probes"].values():
        labels, predicted = probe["kept"]
        best = max(scores[0][0] for _, scores in probe["results"])
        assert 100 * (labels == predicted).double().mean() == pytest.approx(best)


def test_two_processes_count_what_one_does(tmp_path):
    words = {
        "eval_knn": ["--k", 5],
        "eval_linear": ["--protocol", "moco", "--epochs", 1, "--batch-size", 64],
    }
    launch(*((script, [*TINY, *more, "--out", tmp_path / "two"]) for script, more in words.items()))
    for script, more in words.items():
        main(script, *TINY, *more, "--out", tmp_path / "one")
        for name in (f"per_class_{script[5:]}.csv", f"confusion_{script[5:]}.png"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
