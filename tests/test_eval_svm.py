"""SVM evaluation: labels, draws, average precision, fits in other coordinates, and the script as a user runs it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

import eval_svm
from common.resnet import resnet
from common.vit import ViT
from eval_svm import (
    COSTS,
    Levels,
    Squeezed,
    Triangle,
    average_precision,
    cross_validate,
    decisions,
    draw,
    evaluate_full,
    evaluate_low_shot,
    normalise,
    pool_stage,
    solve,
    voc,
)
from tests.helpers import command
from tests.test_bad_input import refused

TINY = "--pretrained random --arch resnet18 --width 0.125 --image-size 32 --workers 0 --jobs 1 --seed 3".split()
FEW = "--features feat2 feat5 --costs 1 0.01 --k 1 2 --draws 2".split()
NAMES = ["cat", "dog", "emu"]


def tree(root, lists=True, numbers=(30, 18)):
    """A set in VOC's layout: a class brightens its colour channel; every 7th image of a class is 'difficult' instead.

    Labels stand in the lists of the classes, or (lists=False) in annotations. Returns {split: {id: labels}}.
    """
    rng = np.random.default_rng(0)
    truth = {}
    for folder in ("JPEGImages", "ImageSets/Main", "Annotations"):
        (root / folder).mkdir(parents=True)
    for split, number in zip(("trainval", "test"), numbers, strict=True):
        truth[split] = {}
        for i in range(number):
            name = f"{split[0:2]}{i:03}"
            labels = [0 if (i + c) % 7 == 6 else 1 if (i + c) % 3 == 0 else -1 for c in range(3)]
            truth[split][name] = labels
            image = rng.integers(0, 160, (40, 56, 3)) + 60 * (np.array(labels) >= 0)
            Image.fromarray(image.astype(np.uint8)).save(root / f"JPEGImages/{name}.jpg")
            objects = [(c, label == 0) for c, label in zip(NAMES, labels, strict=True) if label >= 0]
            objects += [(c, True) for c, difficult in objects if not difficult]  # a second one, which changes nothing
            text = "".join(f"<object><name>{c}</name><difficult>{d:d}</difficult></object>" for c, d in objects)
            (root / f"Annotations/{name}.xml").write_text(f"<annotation>{text}</annotation>")
        ids = list(truth[split])[::-1]  # in no order
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(ids) + "\n")
        for c, name in enumerate(NAMES if lists else []):
            lines = [f"{i} {truth[split][i][c]:2d}" for i in ids]
            (root / f"ImageSets/Main/{name}_{split}.txt").write_text("\n".join(lines) + "\n")
    return truth


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    root = tmp_path_factory.mktemp("devkit")
    tree(root / "VOC2007")
    return root


def run(data, out, *words):
    words = [*TINY, "--data", data, "--out", out, *words]
    return eval_svm.main(eval_svm.parse_args([str(w) for w in words]))


def rows(n, dim, seed=0):
    """Normalised rectified noise with some structure, (n, dim) float64, and labels that depend on it."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((n, 8))
    x = np.maximum(latent @ rng.standard_normal((8, dim)) + 2 * rng.standard_normal((n, dim)), 0)
    return normalise(torch.from_numpy(x)).numpy(), latent[:, 0] + 0.5 * rng.standard_normal(n) > 0.7


# ------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("lists", [True, False])
def test_labels_of_lists_and_of_annotations(tmp_path, lists):
    truth = tree(tmp_path, lists)
    folder, names, splits = voc(tmp_path)
    assert names == NAMES and folder == tmp_path / "JPEGImages"
    for split, (ids, labels) in splits.items():
        assert ids == sorted(truth[split])
        assert labels.tolist() == [truth[split][i] for i in ids]
        assert {-1, 0, 1} == set(labels.ravel())


def test_devkit_folder_and_set_folder_are_the_same(devkit):
    assert voc(devkit)[0] == voc(devkit / "VOC2007")[0]


def test_annotations_without_difficult_are_easy(tmp_path):
    tree(tmp_path, lists=False)
    (tmp_path / "Annotations/tr000.xml").write_text("<annotation><object><name>emu</name></object></annotation>")
    assert voc(tmp_path)[2]["trainval"][1][0].tolist() == [-1, -1, 1]


def test_images_keep_their_left_and_right_end(tmp_path):
    """A wide image is squeezed, not cropped: the marks at both ends are still there."""
    wide = np.zeros((50, 400, 3), np.uint8)
    wide[:, :60, 0] = wide[:, -60:, 2] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    image, _ = Squeezed(tmp_path, ["a"], 32)[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert image[0, :, :3].min() > 240 and image[2, :, -3:].min() > 240 and image[:, :, 14:18].max() < 15


# ----------------------------------------------------------------------------------------------------- features
def test_pooled_sizes_of_resnet50():
    maps = [torch.randn(1, c, s, s) for c, s in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))]
    pooled = [pool_stage(x) for x in maps]
    assert [tuple(p.shape[1:]) for p in pooled] == [(64, 12, 12), (256, 6, 6), (512, 4, 4), (1024, 3, 3), (2048, 2, 2)]
    # the first window of feat1 lies over 4 padded rows and columns and counts them; the last of feat5 is 6 x 6
    assert pooled[0][0, 0, 0, 0].item() == pytest.approx(maps[0][0, 0, :6, :6].sum().item() / 100, abs=1e-6)
    assert pooled[4][0, 3, 1, 1].item() == pytest.approx(maps[4][0, 3, 1:, 1:].mean().item(), abs=1e-6)


def test_levels_of_both_kinds_of_network():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    network = resnet("resnet18", 0.125, 32).eval()
    every, two = Levels(network, 32), Levels(network, 32, ["feat5", "feat2"])
    assert every.names == ["feat1", "feat2", "feat3", "feat4", "feat5"] and two.names == ["feat2", "feat5"]
    a, b = every(x).split(every.dims, 1), two(x).split(two.dims, 1)
    assert torch.equal(a[1], b[0]) and torch.equal(a[4], b[1])
    torch.testing.assert_close(a[4].view(2, network.dim, -1).mean(2), network(x))  # 4 x 4 map: nothing is left out
    vit = ViT(16, 1, 2, patch_size=8, image_size=32).eval()
    levels = Levels(vit, 32)
    assert levels.names == ["cls", "mean"] and levels.dims == [16, 16]
    torch.testing.assert_close(levels(x), torch.cat([vit(x), vit.tokens(x)[:, 1:].mean(1)], 1))


def test_normalised_rows():
    expected = np.array([[0.6, 0.8], [0, 0]]) * 5 / (5 + 1e-5)
    np.testing.assert_allclose(normalise(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).numpy(), expected, rtol=1e-12)


# -------------------------------------------------------------------------------------------- average precision
def test_average_precision_of_a_hand_example():
    """Ranking + - + + -: precisions at the positives 1, 2/3, 3/4. The envelope lifts the second to 3/4; scikit-learn's
    does not. VOC's 11 points: 1 at recalls 0 to 0.3, 3/4 at the other seven."""
    scores, positive = np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([1, 0, 1, 1, 0], bool)
    envelope, points = (1 + 3 / 4 + 3 / 4) / 3, (4 * 1 + 7 * 3 / 4) / 11
    assert average_precision(scores, positive) == pytest.approx(envelope, abs=1e-12)  # 0.8333
    assert average_precision_score(positive, scores) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3, abs=1e-12)  # 0.8056
    assert abs(average_precision(scores, positive) - points) > 1e-3  # 0.8409


def test_average_precision_against_its_definition():
    """Mean over the positives of the best precision at any threshold that lets at least as many positives pass."""
    rng = np.random.default_rng(1)
    for n in (3, 10, 60):
        scores, positive = rng.integers(0, 8, n).astype(float), rng.random(n) < 0.4
        positive[0] = True
        passed = [(scores >= t, t) for t in set(scores)]
        points = [(positive[p].sum(), positive[p].mean()) for p, _ in passed]
        best = [max(precision for hits, precision in points if hits >= i) for i in range(1, positive.sum() + 1)]
        assert average_precision(scores, positive) == pytest.approx(np.mean(best), abs=1e-12)
        assert average_precision(scores, positive) >= average_precision_score(positive, scores) - 1e-12
    assert np.isnan(average_precision(scores, np.zeros(60, bool)))


# ------------------------------------------------------------------------------------------------------- fits
def reference(x, positive, cost, seed=0):
    """scikit-learn's LinearSVC with the published parameters, on the features themselves."""
    svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, tol=1e-4, max_iter=2000, random_state=seed)
    return svm.fit(x, np.where(positive, 1, -1))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("twins", [False, True])
def test_decision_values_do_not_change_with_the_coordinates(twins):
    """Fewer rows than columns: from the products alone. Equal rows, as of an image that a set holds twice, make the
    matrix of products singular."""
    x, positive = rows(90, 300)
    if twins:
        x[5] = x[6] = x[40]
    gram, chosen, at = x @ x[:70].T, np.arange(1, 70, 2), np.arange(50, 90)
    costs = [0.001, 1, 100]
    values, _ = decisions(None, gram, chosen, positive[chosen], costs, at, seed=4)
    plain, _ = decisions(x, None, chosen, positive[chosen], costs, at, seed=4)
    for i, cost in enumerate(costs):
        expected = reference(x[chosen], positive[chosen], cost, seed=4).decision_function(x[at])
        np.testing.assert_allclose(values[i], expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(plain[i], expected, rtol=0, atol=1e-12)
    assert np.ptp(values[2]) > 0.5  # they say something


def test_triangle_keeps_the_products_and_has_few_numbers():
    x, _ = rows(40, 100)
    x[3] = x[7]
    triangle = Triangle(x @ x.T)
    np.testing.assert_allclose(triangle.rows @ triangle.rows.T, x @ x.T, atol=1e-13)
    assert triangle.rows.shape == (40, 39) and (triangle.rows != 0).sum() <= 40 * 41 / 2
    weights = np.random.default_rng(0).standard_normal((2, 39))
    np.testing.assert_allclose(triangle.dual(weights).T @ triangle.rows, weights, atol=1e-10)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_cross_validation_is_that_of_scikit_learn():
    x, positive = rows(61, 100)
    for given in ({"x": x, "gram": None}, {"x": None, "gram": x @ x.T}):
        folds = [cross_validate(**given, positive=positive, fold=f, costs=[0.01, 10], seed=0)[:2] for f in range(3)]
        for i, cost in enumerate((0.01, 10)):
            svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)
            expected = cross_val_score(svm, x, np.where(positive, 1, -1), cv=3, scoring="average_precision")
            assert [fold[i] for fold in folds] == pytest.approx(list(expected), abs=1e-12)


def test_folds_without_a_positive_do_not_count():
    x, _ = rows(30, 50)
    positive = np.arange(30) == 4
    found = np.array([cross_validate(x, None, positive, fold, [1.0], 0)[0] for fold in range(3)])
    assert np.isnan(found).all()  # the fold with the positive has none to train on


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_several_solvers_give_what_one_after_the_other_gives():
    """Bit for bit, which threads would not: they share liblinear's random generator."""

    def scores(x, positive, cost, seed):  # a function of its own, so that the solvers need not import torch
        import warnings

        from sklearn.svm import LinearSVC

        warnings.simplefilter("ignore")
        return LinearSVC(C=cost, random_state=seed).fit(x, positive).decision_function(x)

    x, positive = rows(400, 600)  # large enough to be mapped into the solvers' memory
    assert x.nbytes > 2**20
    jobs = [(x, positive, cost, seed) for cost in (0.1, 10, 100) for seed in range(4)]
    found = solve(scores, jobs, 400, 2, "")
    for row, job in zip(found, jobs, strict=True):
        assert np.array_equal(row, scores(*job))


# ------------------------------------------------------------------------------------------------- full, low-shot
def args_of(*words):
    return eval_svm.parse_args(["--pretrained", "random", "--data", "x", *map(str, words)])


def test_nineteen_costs():
    assert len(COSTS) == 19 and sorted(COSTS)[0] == 2.0**-19 and sorted(COSTS)[-4:] == [0.0625, 1, 10, 100]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_full_evaluation_against_a_plain_loop():
    """Difficult images train as negatives and are left out of the test; the cost is that of the best mean fold."""
    x, positive = rows(90, 150)
    labels = np.stack([np.where(positive, 1, -1), np.where(np.arange(90) % 4 == 1, 1, -1)], 1).astype(np.int8)
    labels[::9] = 0
    costs = [10.0, 0.01, 1.0]
    found = evaluate_full("", None, x @ x[:60].T, labels[:60], labels[60:], args_of("--costs", *costs), 1)
    for c in range(2):
        y = np.where(labels[:60, c] == 1, 1, -1)
        make = {cost: reference(x[:60], y == 1, cost) for cost in costs}
        cv = [cross_val_score(make[cost], x[:60], y, cv=3, scoring="average_precision").mean() for cost in costs]
        assert found["cost"][c] == costs[int(np.argmax(cv))]
        at = 60 + np.flatnonzero(labels[60:, c] != 0)
        expected = average_precision(make[found["cost"][c]].decision_function(x[at]), labels[at, c] == 1)
        assert found["ap"][c] == pytest.approx(100 * expected, abs=1e-3)
    assert found["map"] == pytest.approx(np.mean(found["ap"]), abs=1e-3)


def test_draws_hold_k_positives_and_19_k_negatives():
    rng = np.random.default_rng(0)
    labels = rng.choice([-1, 0, 1], 1000, p=[0.8, 0.1, 0.1]).astype(np.int8)
    for k in (1, 4, 16):
        chosen = draw(labels, k, 0, 0, seed=0)
        assert len(set(chosen)) == len(chosen) == 20 * k and (np.diff(chosen) > 0).all()
        assert (labels[chosen] == 1).sum() == k and (labels[chosen] == -1).sum() == 19 * k
    short = draw(labels[:60], 4, 0, 0, seed=0)
    assert (labels[short] == -1).sum() == (labels[:60] == -1).sum() < 76


def test_draws_are_seeded_and_differ():
    labels = np.where(np.arange(400) % 5 == 0, 1, -1)
    first = draw(labels, 4, 0, 0, seed=0)
    assert np.array_equal(first, draw(labels, 4, 0, 0, seed=0))
    positives = [draw(labels, *key)[labels[draw(labels, *key)] == 1] for key in ((4, 0, 0, 0), (8, 0, 0, 0))]
    assert not set(positives[0]) <= set(positives[1])  # each k is drawn for itself
    for other in ((4, 1, 0, 0), (4, 0, 1, 0), (4, 0, 0, 1)):  # another draw, class, seed
        assert not np.array_equal(first, draw(labels, *other))
    often = np.bincount(np.concatenate([draw(labels, 8, i, 0, 0) for i in range(200)]), minlength=400)
    assert often[labels == 1].min() > 5  # 20 expected of each of 80 positives: all get their turn
    assert often[labels == 1].max() < 40


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_low_shot_against_a_plain_loop():
    x, positive = rows(160, 200)
    labels = np.stack([np.where(positive, 1, -1), np.where(np.arange(160) % 4 == 1, 1, -1)], 1).astype(np.int8)
    labels[::11] = 0
    train, tested, costs = labels[:100], labels[100:], [100.0, 1e-4, 1.0]
    args = args_of("--costs", *costs, "--draws", 3, "--seed", 5)
    found = evaluate_low_shot("", None, x @ x[:100].T, train, tested, [2, 1], args, 1)
    assert list(found) == [1, 2]
    for k, row in found.items():
        on_test, on_rest = np.zeros((2, 3, 2, 3))
        for number in range(3):
            for c in range(2):
                chosen = draw(train[:, c], k, number, c, 5)
                rest = [i for i in range(100) if i not in chosen and train[i, c] != 0]
                at = 100 + np.flatnonzero(tested[:, c] != 0)
                for i, cost in enumerate(costs):
                    svm = reference(x[chosen], train[chosen, c] == 1, cost, seed=5)
                    on_test[number, c, i] = average_precision(svm.decision_function(x[at]), labels[at, c] == 1)
                    on_rest[number, c, i] = average_precision(svm.decision_function(x[rest]), labels[rest, c] == 1)
        for part, values in (("test", on_test), ("trainval", on_rest)):
            best = values.mean((0, 1)).argmax()
            maps = 100 * on_test[:, :, best].mean(1)
            assert row[part]["cost"] == costs[best]
            assert row[part]["maps"] == pytest.approx(maps.tolist(), abs=1e-3)
            expected = [maps.mean(), maps.min(), maps.max(), maps.std()]
            assert [row[part][q] for q in ("mean", "min", "max", "std")] == pytest.approx(expected, abs=1e-3)
        assert row["test"]["mean"] >= row["trainval"]["mean"]


def test_without_positives_left_there_is_no_honest_cost():
    x, _ = rows(40, 50)
    labels = np.where(np.arange(40) % 10 == 1, 1, -1)[:, None]
    found = evaluate_low_shot("", None, x @ x[:20].T, labels[:20], labels[20:], [2], args_of("--costs", 1), 1)
    assert found[2]["trainval"] is None and 0 < found[2]["test"]["mean"] <= 100


# ------------------------------------------------------------------------------------------------------ the script
def test_whole_run_in_one_process_and_two(devkit, tmp_path, capsys):
    """All figures agree, whether one process computes them or two share images and jobs."""
    one = run(devkit, tmp_path / "one", *FEW)
    text = capsys.readouterr().out
    assert json.loads(text.splitlines()[-1]) == one == json.loads((tmp_path / "one/eval_svm.json").read_text())
    assert list(one["svm"]) == ["feat2", "feat5"] and list(one["svm"]["feat2"]["ap"]) == NAMES
    assert one["map"] == max(row["map"] for row in one["svm"].values())
    assert one["map"] > one["chance"] + 20  # colours are easy, even for random weights
    assert list(one["low_shot"]) == [one["preferred"]] and list(one["low_shot"][one["preferred"]]) == ["1", "2"]
    words = ["eval_svm.py", *TINY, "--data", devkit, *FEW, "--out", tmp_path / "two"]
    done = command(*words, processes=2, check=0)
    assert json.loads((tmp_path / "two/eval_svm.json").read_text()) == one
    assert json.loads(done.stdout.splitlines()[-1]) == one
    assert not list(tmp_path.glob("*/*.tmp"))


def test_parts_can_be_left_out(devkit, tmp_path, capsys):
    full = run(devkit, tmp_path, *FEW, "--no-low-shot")
    assert "low_shot" not in full and set(full["svm"]) == {"feat2", "feat5"}
    low = run(devkit, tmp_path, *FEW, "--no-full", "--k", 1, 1000)
    assert "svm" not in low and set(low["low_shot"]) == {"feat2", "feat5"}
    assert list(low["low_shot"]["feat2"]) == ["1"]
    text = capsys.readouterr().out
    assert "k 1000: class" in text and "positive trainval images" in text
    assert "negatives: all of them serve" in text  # 30 images have fewer than 19 of some class


def test_class_without_positive_test_image_is_left_out(tmp_path, capsys):
    tree(tmp_path / "set", lists=False)
    for path in (tmp_path / "set/Annotations").glob("te*.xml"):
        path.write_text(path.read_text().replace("dog", "cow"))
    result = run(tmp_path / "set", tmp_path / "out", *FEW, "--no-low-shot", "--features", "feat2")
    assert list(result["svm"]["feat2"]["ap"]) == ["cat", "emu"]
    assert "class dog: it has no positive test image" in capsys.readouterr().out


def test_mistakes_get_one_line(tmp_path, capsys):
    def says(*words, data=tmp_path / "set"):
        return refused(capsys, "eval_svm", [*TINY, "--data", data, "--out", tmp_path / "out", *words])

    tree(tmp_path / "set")
    main = tmp_path / "set/ImageSets/Main"
    assert "ImageSets/Main" in says(data=tmp_path)
    assert "feat1, feat2" in says("--features", "feat6")
    assert "--k" in says("--k", 0) and "--costs" in says("--costs", -1) and "--draws" in says("--draws", 0)
    assert "leave nothing to do" in says("--no-full", "--no-low-shot")
    assert "ask for fewer" in says("--no-full", "--k", 500)
    (tmp_path / "set/JPEGImages/te003.jpg").rename(tmp_path / "te003.jpg")
    assert "te003.jpg" in says(*FEW)
    (tmp_path / "te003.jpg").rename(tmp_path / "set/JPEGImages/te003.jpg")
    good = (main / "dog_test.txt").read_text()
    (main / "dog_test.txt").write_text(good + "te000 2\n")
    assert "dog_test.txt: 'te000 2'" in says()
    (main / "dog_test.txt").write_text(good + "te999 1\n")
    assert "different images" in says()
    (main / "dog_test.txt").unlink()
    assert "dog_test.txt does not exist" in says()
    for path in main.glob("*_*.txt"):
        path.unlink()
    (tmp_path / "set/Annotations/te004.xml").write_text("<annotation>")
    assert "te004.xml" in says()
    (main / "test.txt").write_text("tr000\n")
    assert "in trainval and in test" in says()
    (main / "test.txt").unlink()
    assert "test.txt does not exist" in says()
