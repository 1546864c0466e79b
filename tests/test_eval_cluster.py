"""eval_cluster.py: its measures against scikit-learn, all permutations and hand-made clusters; what it writes."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.cluster import KMeans

import eval_cluster
from common.augment import EvalView
from common.classifier import Classifier, save_classifier
from common.resnet import resnet
from tests.helpers import launch, main, refused, write_images

RANDOM = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --workers 1".split()


@pytest.mark.parametrize("k", [3, 4, 6])
def test_matching_is_the_best_of_all_permutations(k):
    generator = np.random.default_rng(k)
    labels, clusters = generator.integers(0, 4, 60), generator.integers(0, k, 60)
    found, matched = eval_cluster.agreement(labels, clusters[:, None], k)
    used = [c for c in matched if c >= 0]
    assert len(set(used)) == len(used) == min(4, k)  # no class twice, as many clusters as can be
    pool = [*range(4), *[-1] * (k - 4)]  # -1 is the class of nothing
    every = itertools.permutations(pool, k)
    assert found["acc"] == pytest.approx(100 * max((np.array(p)[clusters] == labels).mean() for p in every))
    assert found["acc"] == pytest.approx(100 * (matched[clusters] == labels).mean())


def test_measures_of_hand_made_clusters():
    labels = np.array([0, 0, 0, 1, 1, 1])
    perfect, _ = eval_cluster.agreement(labels, np.array([1, 1, 1, 0, 0, 0])[:, None], 2)
    assert {round(v, 9) for v in perfect.values()} == {100.0}
    split, _ = eval_cluster.agreement(labels, np.array([0, 0, 1, 2, 2, 2])[:, None], 3)
    assert split["acc"] == pytest.approx(500 / 6) and split["purity"] == 100  # one cluster is left over
    entropy = -(np.log(1 / 3) / 3 + np.log(1 / 6) / 6 + np.log(1 / 2) / 2)
    assert split["nmi"] == pytest.approx(100 * np.log(2) / ((np.log(2) + entropy) / 2))
    one, _ = eval_cluster.agreement(labels, np.zeros((6, 1), np.int64), 2)
    assert one["acc"] == one["purity"] == pytest.approx(50) and one["ari"] == 0


def test_measures_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    labels, ranked = generator.integers(0, 7, 300), generator.permuted(np.tile(np.arange(9), (300, 1)), axis=1)
    found, matched = eval_cluster.agreement(labels, ranked, 9)
    table = metrics.cluster.contingency_matrix(labels, ranked[:, 0])
    assert found["purity"] == pytest.approx(100 * table.max(0).sum() / 300)
    assert found["ari"] == pytest.approx(100 * metrics.adjusted_rand_score(labels, ranked[:, 0]))
    assert found["top5"] == pytest.approx(
        100 * np.mean([y in matched[row[:5]] for y, row in zip(labels, ranked, strict=True)])
    )


def test_kmeans_finds_what_scikit_learn_finds_and_its_files_agree(tmp_path):
    words = ["eval_cluster", *RANDOM, "--data", "digits", "--starts", "3", "--out", tmp_path]
    result = main(*words, "--clusters", 12)
    assert result["clusters"] == len(result["sizes"]) == 12 and sum(result["sizes"]) == result["test"] == 359
    assert set(result["best"]) == set(result["starts"]) == {"acc", "top5", "purity", "nmi", "ami", "ari"}
    with open(tmp_path / "clusters.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert np.bincount([int(row["cluster"]) for row in rows]).tolist() == result["sizes"]
    for name in ("clusters.png", "confusion_cluster.png", "per_class_cluster.csv"):
        assert (tmp_path / name).stat().st_size > 0
    again = main(*words, "--clusters", 12)
    assert again == result


def test_centroids_come_from_the_training_images_and_are_as_good_as_scikit_learns(tmp_path, monkeypatch):
    seen, real = [], eval_cluster.kmeans
    monkeypatch.setattr(eval_cluster, "kmeans", lambda x, *rest: seen.append((x, real(x, *rest))) or seen[-1][1])
    main("eval_cluster", *RANDOM, "--data", "digits", "--starts", 4, "--out", tmp_path)
    x = seen[0][0].numpy()
    assert len(x) == 1438 and np.linalg.norm(x, axis=1) == pytest.approx(1)
    theirs = KMeans(10, n_init=4, init="random", random_state=0).fit(x).inertia_
    assert min(found.inertia for _, found in seen) < 1.03 * theirs


def test_two_processes_give_the_clusters_of_one(tmp_path):
    words = [*RANDOM, "--data", "digits", "--starts", 2, "--precision", "fp64", "--batch-size", 32]
    one = main("eval_cluster", *words, "--out", tmp_path / "one")
    launch(["eval_cluster", [*words, "--out", tmp_path / "two"]])
    assert json.loads((tmp_path / "two" / "eval_cluster.json").read_text()) == one


def write_clusters(path):
    """A file with three clusters of its own, of a random network."""
    torch.manual_seed(0)
    backbone = resnet("resnet18", 0.125, 16)
    meta = {"arch": "resnet18", "width": 0.125, "image_size": 16, "channels": 3, "method": "scan", "stem": "3x3"}
    meta |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    weight = torch.randn(3, backbone.dim)
    view = EvalView(16, mean=(0.5,) * 3, std=(0.25,) * 3)
    names = [f"cluster {i}" for i in range(3)]
    save_classifier(path, Classifier(backbone, weight, torch.zeros(3)), meta, view, names, "three clusters")
    return path


def test_clusters_of_a_file_are_the_argmax_of_its_probabilities(tmp_path):
    path, data = (
        write_clusters(tmp_path / "clusters.pt"),
        write_images(tmp_path / "images", [f"{i:02d}.png" for i in range(12)]),
    )
    result = main("eval_cluster", "--pretrained", path, "--data", data, "--out", tmp_path / "a", "--workers", "1")
    assert result["own"] and result["clusters"] == 3 and sum(result["sizes"]) == 12 and "best" not in result
    main("predict", "--pretrained", path, "--data", data, "--out", tmp_path / "b", "--workers", "1")
    with open(tmp_path / "a" / "clusters.csv") as ours, open(tmp_path / "b" / "predictions.csv") as theirs:
        ours, theirs = list(csv.DictReader(ours)), list(csv.DictReader(theirs))
    assert [f"cluster {row['cluster']}" for row in ours] == [row["class"] for row in theirs]
    assert [float(row["probability"]) for row in ours] == pytest.approx([float(r["probability"]) for r in theirs])


def test_mistakes_end_in_one_line(tmp_path, capsys):
    data, path = (
        write_images(tmp_path / "images", [f"{i}.png" for i in range(6)]),
        write_clusters(tmp_path / "clusters.pt"),
    )
    words = [*RANDOM, "--data", data, "--out", tmp_path / "out"]
    assert "--clusters: say how many" in refused(capsys, main, "eval_cluster", *words)
    assert "from 2 to 6" in refused(capsys, main, "eval_cluster", *words, "--clusters", 7)
    own = ["--pretrained", path, "--data", data, "--out", tmp_path / "out"]
    assert "clusters of its own" in refused(capsys, main, "eval_cluster", *own, "--clusters", 3)
    assert "clusters of its own" in refused(capsys, main, "eval_cluster", *own, "--features", "feat4")
