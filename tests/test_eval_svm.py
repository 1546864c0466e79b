"""SVM evaluation: features, draws, average precision, fits in other coordinates, and the script as a user runs it."""

import json

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC
from torchvision.transforms.v2.functional import resize

import eval_svm as svm
from common.resnet import resnet
from common.vit import ViT
from tests.helpers import SMALL, launch, main, parsed, photo, refused, write_voc

TINY = "--pretrained random --arch resnet18 --width 0.125 --image-size 32 --workers 0 --jobs 1 --seed 3".split()
FEW = "--features feat2 feat5 --costs 1 0.01 --k 1 2 --draws 2".split()
ARGS = "eval_svm", "--pretrained", "random"
pytestmark = pytest.mark.filterwarnings(f"ignore::{ConvergenceWarning.__module__}.{ConvergenceWarning.__name__}")


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    root = tmp_path_factory.mktemp("devkit")
    write_voc(root / "VOC2007")
    return root


def run(data, out, *words):
    return main("eval_svm", *TINY, "--data", data, "--out", out, *words)


def rows(n, dim, seed=0):
    """Normalised rectified noise with some structure, (n, dim) float64, and labels that depend on it."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((n, 8))
    x = np.maximum(latent @ rng.standard_normal((8, dim)) + 2 * rng.standard_normal((n, dim)), 0)
    return svm.normalize(torch.from_numpy(x)).numpy(), latent[:, 0] + 0.5 * rng.standard_normal(n) > 0.7


# ----------------------------------------------------------------------------------------------------- features
@pytest.mark.parametrize("height, width", [(50, 400), (90, 61), (24, 24), (36, 37)])
def test_images_are_squeezed_not_cropped(height, width):
    """Bit for bit torchvision's resize of the shorter side, then of both sides: what lies at the ends is kept."""
    image = torch.from_numpy(photo(height, width)).permute(2, 0, 1)
    image[0, :, : width // 6] = image[2, :, -width // 6 :] = 255
    squeezed = svm.Squeezed(32).crop(image)
    assert torch.equal(squeezed, resize(resize(image, [37]), [32, 32])) and squeezed.dtype == torch.uint8
    assert squeezed[0, :, :3].min() > 240 and squeezed[2, :, -3:].min() > 240


def test_levels_of_both_kinds_of_network():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    network = resnet(*SMALL).eval()
    every, two = svm.Levels(network, 32), svm.Levels(network, 32, ["feat5", "feat2"])
    assert every.names == ["feat1", "feat2", "feat3", "feat4", "feat5"] and two.names == ["feat2", "feat5"]
    a, b = every(x).split(every.dims, 1), two(x).split(two.dims, 1)
    assert torch.equal(a[1], b[0]) and torch.equal(a[4], b[1])
    torch.testing.assert_close(a[4].view(2, network.dim, -1).mean(2), network(x))  # 4 x 4 map: nothing is left out
    vit = ViT(16, 1, 2, patch_size=8, image_size=32).eval()
    levels = svm.Levels(vit, 32)
    assert levels.names == ["cls", "mean"] and levels.dims == [16, 16]
    torch.testing.assert_close(levels(x), torch.cat([vit(x), vit.tokens(x)[:, 1:].mean(1)], 1))


def test_normalised_rows():
    expected = np.array([[0.6, 0.8], [0, 0]]) * 5 / (5 + 1e-5)
    np.testing.assert_allclose(svm.normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).numpy(), expected, rtol=1e-12)


# -------------------------------------------------------------------------------------------- average precision
def test_average_precision_of_a_hand_example():
    """Ranking + - + + -: precisions at the positives 1, 2/3, 3/4. The envelope lifts the second to 3/4; scikit-learn's
    does not."""
    scores, positive = np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([1, 0, 1, 1, 0], bool)
    assert svm.average_precision(scores, positive) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3, abs=1e-12)
    assert average_precision_score(positive, scores) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3, abs=1e-12)


def test_average_precision_against_its_definition():
    """Mean over the positives of the best precision at any threshold that lets at least as many positives pass."""
    rng = np.random.default_rng(1)
    for n in (3, 10, 60):
        scores, positive = rng.integers(0, 8, n).astype(float), rng.random(n) < 0.4
        positive[0] = True
        passed = [(scores >= t, t) for t in set(scores)]
        points = [(positive[p].sum(), positive[p].mean()) for p, _ in passed]
        best = [max(precision for hits, precision in points if hits >= i) for i in range(1, positive.sum() + 1)]
        assert svm.average_precision(scores, positive) == pytest.approx(np.mean(best), abs=1e-12)
        assert svm.average_precision(scores, positive) >= average_precision_score(positive, scores) - 1e-12
    assert np.isnan(svm.average_precision(scores, np.zeros(60, bool)))


# ------------------------------------------------------------------------------------------------------- fits
def reference(x, positive, cost, seed=0):
    """scikit-learn's LinearSVC with the published parameters, on the features themselves."""
    svc = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, tol=1e-4, max_iter=2000, random_state=seed)
    return svc.fit(x, np.where(positive, 1, -1))


@pytest.mark.parametrize("twins", [False, True])
def test_decision_values_do_not_change_with_the_coordinates(twins):
    """Fewer rows than columns: from the products alone. Equal rows, as of an image that a set holds twice, make the
    matrix of products singular."""
    x, positive = rows(90, 300)
    if twins:
        x[5] = x[6] = x[40]
    gram, chosen, at = x @ x[:70].T, np.arange(1, 70, 2), np.arange(50, 90)
    costs = [0.001, 1, 100]
    values, _ = svm.decisions(None, gram, chosen, positive[chosen], costs, at, seed=4)
    plain, _ = svm.decisions(x, None, chosen, positive[chosen], costs, at, seed=4)
    for i, cost in enumerate(costs):
        expected = reference(x[chosen], positive[chosen], cost, seed=4).decision_function(x[at])
        np.testing.assert_allclose(values[i], expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(plain[i], expected, rtol=0, atol=1e-12)
    assert np.ptp(values[2]) > 0.5  # they say something


def test_triangle_keeps_the_products_and_has_few_numbers():
    x, _ = rows(40, 100)
    x[3] = x[7]
    triangle = svm.Triangle(x @ x.T)
    np.testing.assert_allclose(triangle.rows @ triangle.rows.T, x @ x.T, atol=1e-13)
    assert triangle.rows.shape == (40, 39) and (triangle.rows != 0).sum() <= 40 * 41 / 2
    weights = np.random.default_rng(0).standard_normal((2, 39))
    np.testing.assert_allclose(triangle.dual(weights).T @ triangle.rows, weights, atol=1e-10)


def test_cross_validation_is_that_of_scikit_learn():
    x, positive = rows(61, 100)
    y = np.where(positive, 1, -1)
    for given in ({"x": x, "gram": None}, {"x": None, "gram": x @ x.T}):
        folds = [svm.cross_validate(**given, positive=positive, fold=f, costs=[0.01, 10], seed=0)[:2] for f in range(3)]
        for i, cost in enumerate((0.01, 10)):
            expected = cross_val_score(reference(x, positive, cost), x, y, cv=3, scoring="average_precision")
            assert [fold[i] for fold in folds] == pytest.approx(list(expected), abs=1e-12)
    alone = np.arange(61) == 4  # the fold with this positive has none to train on, the others have none to judge by
    assert np.isnan([svm.cross_validate(x, None, alone, fold, [1.0], 0)[0] for fold in range(3)]).all()


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
    found = svm.solve(scores, jobs, 400, 2, "")
    for row, job in zip(found, jobs, strict=True):
        assert np.array_equal(row, scores(*job))


# ------------------------------------------------------------------------------------------------- full, low-shot
def labelled(n, dim, every):
    """Rows and labels of two classes; every so many images have only difficult objects."""
    x, positive = rows(n, dim)
    labels = np.stack([np.where(positive, 1, -1), np.where(np.arange(n) % 4 == 1, 1, -1)], 1).astype(np.int8)
    labels[::every] = 0
    return x, labels


def test_full_evaluation_against_a_plain_loop():
    """Difficult images train as negatives and are left out of the test; the cost is that of the best mean fold."""
    assert len(svm.COSTS) == 19 and sorted(svm.COSTS)[0] == 2.0**-19 and sorted(svm.COSTS)[-4:] == [0.0625, 1, 10, 100]
    x, labels = labelled(90, 150, 9)
    costs = [10.0, 0.01, 1.0]
    found = svm.evaluate_full("", None, x @ x[:60].T, labels[:60], labels[60:], parsed(*ARGS, "--costs", *costs), 1)
    for c in range(2):
        y = np.where(labels[:60, c] == 1, 1, -1)
        make = {cost: reference(x[:60], y == 1, cost) for cost in costs}
        cv = [cross_val_score(make[cost], x[:60], y, cv=3, scoring="average_precision").mean() for cost in costs]
        assert found["cost"][c] == costs[int(np.argmax(cv))]
        at = 60 + np.flatnonzero(labels[60:, c] != 0)
        expected = svm.average_precision(make[found["cost"][c]].decision_function(x[at]), labels[at, c] == 1)
        assert found["ap"][c] == pytest.approx(100 * expected, abs=1e-3)
    assert found["map"] == pytest.approx(np.mean(found["ap"]), abs=1e-3)


def test_draws_hold_k_positives_and_19_k_negatives():
    labels = np.random.default_rng(0).choice([-1, 0, 1], 1000, p=[0.8, 0.1, 0.1]).astype(np.int8)
    for k in (1, 4, 16):
        chosen = svm.draw(labels, k, 0, 0, seed=0)
        assert len(set(chosen)) == len(chosen) == 20 * k and (np.diff(chosen) > 0).all()
        assert (labels[chosen] == 1).sum() == k and (labels[chosen] == -1).sum() == 19 * k
    short = svm.draw(labels[:60], 4, 0, 0, seed=0)
    assert (labels[short] == -1).sum() == (labels[:60] == -1).sum() < 76


def test_negatives_per_positive_are_the_other_classes(monkeypatch, capsys):
    """Three classes: two negatives for a positive, not VOC's 19; and a line where there are fewer."""
    labels = np.where(np.random.default_rng(0).random((200, 3)) < 0.2, 1, -1).astype(np.int8)
    assert [(labels[svm.draw(labels[:, 0], 8, 0, 0, 0, ratio), 0] == -1).sum() for ratio in (2, 4)] == [16, 32]
    ratios, real = [], svm.draw
    monkeypatch.setattr(svm, "draw", lambda *rest: ratios.append(rest[5]) or real(*rest))
    for classes, ratio in ((3, 2), (2, 1), (1, 1)):
        ratios.clear()
        x, _ = rows(200, 20)
        kept = labels[:, :classes]
        svm.evaluate_low_shot("", x, None, kept[:120], kept[120:], [2], parsed(*ARGS, "--costs", 1, "--draws", 1), 1)
        assert set(ratios) == {ratio}
    few = np.where(np.arange(30)[:, None] % 3 == np.arange(3), 1, -1)  # 10 positives and 20 negatives of each
    assert svm.shots(["a", "b", "c"], few, [4, 10]) == [4, 10] and capsys.readouterr().out == ""
    few = np.repeat([1, -1, 0], 10)[:, None].repeat(3, 1)
    assert svm.shots(["a", "b", "c"], few, [4, 10]) == [4, 10]
    assert "class a has 10 negatives: all are used where 2 k is more" in capsys.readouterr().out


def test_features_that_are_not_finite_are_told(devkit, tmp_path, monkeypatch, capsys):
    real = svm.extract

    def broken(*rest, **more):
        return [real(*rest, **more)[0].index_fill_(0, torch.tensor([4]), np.nan)]

    monkeypatch.setattr(svm, "extract", broken)
    error = refused(capsys, run, devkit, tmp_path, *FEW)
    assert "1 of 30 trainval images are not finite" in error and "tr004.jpg" in error


def test_draws_are_seeded_and_differ():
    labels = np.where(np.arange(400) % 5 == 0, 1, -1)
    first, larger = svm.draw(labels, 4, 0, 0, seed=0), svm.draw(labels, 8, 0, 0, seed=0)
    assert np.array_equal(first, svm.draw(labels, 4, 0, 0, seed=0))
    assert not set(first[labels[first] == 1]) <= set(larger)  # each k is drawn for itself
    for other in ((4, 1, 0, 0), (4, 0, 1, 0), (4, 0, 0, 1)):  # another draw, class, seed
        assert not np.array_equal(first, svm.draw(labels, *other))
    often = np.bincount(np.concatenate([svm.draw(labels, 8, i, 0, 0) for i in range(200)]), minlength=400)
    assert 5 < often[labels == 1].min() <= often[labels == 1].max() < 40  # 20 expected of each of 80 positives


def test_low_shot_against_a_plain_loop():
    x, labels = labelled(160, 200, 11)
    train, tested, costs = labels[:100], labels[100:], [100.0, 1e-4, 1.0]
    args = parsed(*ARGS, "--costs", *costs, "--draws", 3, "--seed", 5)
    found = svm.evaluate_low_shot("", None, x @ x[:100].T, train, tested, [2, 1], args, 1)
    assert list(found) == [1, 2]
    for k, row in found.items():
        on_test, on_rest = np.zeros((2, 3, 2, 3))
        for number, c in np.ndindex(3, 2):
            chosen = svm.draw(train[:, c], k, number, c, 5, ratio=1)
            rest = [i for i in range(100) if i not in chosen and train[i, c] != 0]
            at = 100 + np.flatnonzero(tested[:, c] != 0)
            for i, cost in enumerate(costs):
                scores = reference(x[chosen], train[chosen, c] == 1, cost, seed=5).decision_function(x)
                on_test[number, c, i] = svm.average_precision(scores[at], labels[at, c] == 1)
                on_rest[number, c, i] = svm.average_precision(scores[rest], labels[rest, c] == 1)
        for part, values in (("test", on_test), ("trainval", on_rest)):
            best = values.mean((0, 1)).argmax()
            maps = 100 * on_test[:, :, best].mean(1)
            assert row[part]["cost"] == costs[best]
            assert row[part]["maps"] == pytest.approx(maps.tolist(), abs=1e-3)
            for name in ("mean", "min", "max", "std"):
                assert row[part][name] == pytest.approx(getattr(maps, name)(), abs=1e-3)
        assert row["test"]["mean"] >= row["trainval"]["mean"]


def test_without_positives_left_there_is_no_honest_cost():
    x, _ = rows(40, 50)
    labels = np.where(np.arange(40) % 10 == 1, 1, -1)[:, None]
    found = svm.evaluate_low_shot("", None, x @ x[:20].T, labels[:20], labels[20:], [2], parsed(*ARGS, "--costs", 1), 1)
    assert found[2]["trainval"] is None and 0 < found[2]["test"]["mean"] <= 100


# ------------------------------------------------------------------------------------------------------ the script
def test_whole_run_in_one_process_and_two(devkit, tmp_path, capsys):
    """All figures agree, whether one process computes them or two share images and jobs."""
    one = run(devkit, tmp_path / "one", *FEW)
    text = capsys.readouterr().out
    assert json.loads(text.splitlines()[-1]) == one == json.loads((tmp_path / "one/eval_svm.json").read_text())
    assert list(one["svm"]) == ["feat2", "feat5"] and list(one["svm"]["feat2"]["ap"]) == ["cat", "dog", "emu"]
    assert one["map"] == max(row["map"] for row in one["svm"].values())
    assert one["map"] > one["chance"] + 20  # colours are easy, even for random weights
    assert list(one["low_shot"]) == [one["preferred"]] and list(one["low_shot"][one["preferred"]]) == ["1", "2"]
    done = launch(("eval_svm", [*TINY, "--data", devkit, *FEW, "--out", tmp_path / "two"]))
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


def test_class_without_positive_test_image_is_left_out(tmp_path, capsys):
    write_voc(tmp_path / "set", lists=False)
    for path in (tmp_path / "set/Annotations").glob("te*.xml"):
        path.write_text(path.read_text().replace("dog", "cow"))
    result = run(tmp_path / "set", tmp_path / "out", *FEW, "--no-low-shot", "--features", "feat2")
    assert list(result["svm"]["feat2"]["ap"]) == ["cat", "emu"]
    assert "class dog: it has no positive test image" in capsys.readouterr().out


def test_mistakes_get_one_line(devkit, tmp_path, capsys):
    def says(*words, data=devkit):
        return refused(capsys, run, data, tmp_path, *words)

    assert "ImageSets/Main" in says(data=tmp_path)
    assert "feat1, feat2" in says("--features", "feat6")
    assert "--k" in says("--k", 0) and "--costs" in says("--costs", -1) and "--draws" in says("--draws", 0)
    assert "leave nothing to do" in says("--no-full", "--no-low-shot")
    assert "ask for fewer" in says("--no-full", "--k", 500)
    write_voc(tmp_path / "set", lists=False)
    (tmp_path / "set/ImageSets/Main/test.txt").write_text("tr000\n")
    assert "in trainval and in test, tr000" in says(data=tmp_path / "set")
    (tmp_path / "set/ImageSets/Main/trainval.txt").write_text("tr000\ntr001\ntr003\n")
    (tmp_path / "set/ImageSets/Main/test.txt").write_text("te000\nte001\nte003\n")
    assert "3 trainval images" in says(data=tmp_path / "set")
