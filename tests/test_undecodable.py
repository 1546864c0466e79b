"""Images that cannot be decoded do not count in an evaluation: as if they were not there, and said in line and JSON."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from common import loader
from common.augment import EvalView, View
from common.datasets import open_dataset, open_labelled
from common.features import extract
from common.knn import monitor
from common.loader import Loader, eval_batches
from tests.helpers import command, encode, launch, main, photo, write_images, write_voc

NAMES = [f"{split}/{c}/{i}.png" for split, n in (("train", 12), ("val", 6)) for c in "ab" for i in range(n)]
BROKEN = ["train/a/0.png", "train/b/11.png", "val/a/5.png", "val/b/0.png"]
RANDOM = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --workers 0 --device cpu".split()
SCRIPTS = {
    "eval_knn": "--k 1 3 --batch-size 4",
    "eval_linear": "--protocol small --lr 0.1 --epochs 2",
}


@pytest.fixture
def sets(tmp_path):
    """(a set with some broken files, the same without them)"""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    write_images(broken, NAMES, size=(20, 20))
    shutil.copytree(broken, whole)
    for i, name in enumerate(BROKEN):
        content = (broken / name).read_bytes()
        (broken / name).write_bytes((b"", b"no image", content[: len(content) // 2], content[:60])[i])
        (whole / name).unlink()
    return broken, whole


@pytest.mark.parametrize("script", SCRIPTS)
def test_figures_are_those_without_the_broken_files(sets, tmp_path, capsys, script):
    words = SCRIPTS[script].split()
    with_them, without = (main(script, *RANDOM, "--data", p, "--out", tmp_path / p.name, *words) for p in sets)
    out, err = capsys.readouterr()
    assert (with_them["train"], with_them["test"], with_them["undecodable"]) == (22, 10, 4)
    assert (without["train"], without["test"], without["undecodable"]) == (22, 10, 0)
    assert "2 of 24 train images cannot be decoded and do not count; 2 of 12 test images" in with_them["note"]
    assert f"note        {with_them['note']}" in out and "cannot be decoded" not in without.get("note", "")
    lines = [line for line in err.splitlines() if "cannot decode" in line]
    assert len(lines) == 4 and all(line.endswith("; it is left out") for line in lines)
    for key in ("knn", "pixels", "heads"):
        assert json.dumps(with_them.get(key)) == json.dumps(without.get(key))


@pytest.mark.parametrize(
    "script, words", [("eval_finetune", ""), ("eval_semi", "--labels 100%"), ("eval_linear", "--protocol moco")]
)
def test_trained_networks_are_judged_without_them(sets, tmp_path, capsys, script, words):
    """In training their neighbours take their place."""
    more = "--epochs 1 --batch-size 6 --lr 0.001".split()
    result = main(script, *RANDOM, "--data", sets[0], "--out", tmp_path / "out", *more, *words.split())
    assert (result["test"], result["undecodable"], result["train"]) == (10, 4, 22)
    best = result["best"]["top1"] if "best" in result else result["top1"]
    assert best == pytest.approx(100 * round(best / 10) / 10)  # of ten
    assert capsys.readouterr().err.count("its neighbour is used instead") == 2


def test_support_vector_machines(tmp_path, capsys):
    """Labels stay with their images."""
    write_voc(tmp_path / "set")
    words = [
        *RANDOM,
        "--data",
        tmp_path / "set",
        "--out",
        tmp_path,
        "--features",
        "feat2",
        "--costs",
        1,
        "--k",
        1,
        "--jobs",
        1,
    ]
    before = main("eval_svm", *words)
    for path in (tmp_path / "set/JPEGImages").glob("te00[3-5].jpg"):
        path.write_bytes(b"")
    (tmp_path / "set/JPEGImages/tr007.jpg").write_bytes(b"")
    after = main("eval_svm", *words)
    assert (before["train"], before["test"], before["undecodable"]) == (30, 18, 0)
    assert (after["train"], after["test"], after["undecodable"]) == (29, 15, 4)
    for part in (tmp_path / "set/ImageSets/Main").glob("*.txt"):
        lines = part.read_text().splitlines(True)
        part.write_text("".join(line for line in lines if line.split()[0] not in ("te003", "te004", "te005", "tr007")))
    without = main("eval_svm", *words)
    assert without["svm"] == after["svm"] and without["low_shot"] == after["low_shot"]


@pytest.mark.parametrize("half", [False, True])
def test_rows_of_features_are_nan(sets, tmp_path, capsys, half):
    words = [*RANDOM, "--split", "val", "--batch-size", 4, *["--fp16"] * half]
    for p in sets:
        main("features", *words, "--data", p, "--out", tmp_path / p.name / "out")
    found, without = (np.load(p / "out/features.npy") for p in sets)
    paths = (sets[0] / "out/paths.txt").read_text().splitlines()
    missing = [i for i, path in enumerate(paths) if path.endswith(("val/a/5.png", "val/b/0.png"))]
    assert missing == np.flatnonzero(np.isnan(found).all(1)).tolist() == [5, 6] and len(found) == 12
    np.testing.assert_allclose(np.delete(found, missing, 0), without, rtol=1e-2 if half else 1e-5)
    assert "2 rows are NaN, their images cannot be decoded: 5, 6" in capsys.readouterr().out


def test_several_processes_count_each_once(sets, tmp_path):
    words = [*RANDOM, "--data", sets[0]]
    jobs = [
        ("eval_knn", [*words, "--out", tmp_path / "two", "--k", 3, "--batch-size", 4]),
        ("features", [*words, "--out", tmp_path / "two", "--batch-size", 4]),
        ("eval_linear", [*words, "--out", tmp_path / "two", "--protocol", "moco", "--batch-size", 4, "--epochs", 1]),
        ("eval_finetune", [*words, "--out", tmp_path / "tune", "--epochs", 1, "--batch-size", 6]),
    ]
    assert launch(*jobs).stdout.count("NaN") == 1  # of features.py
    main("eval_knn", *words, "--out", tmp_path / "one", "--k", 3, "--batch-size", 4)
    one, two = (json.loads((tmp_path / name / "eval_knn.json").read_text()) for name in ("one", "two"))
    assert one == two
    for name, folder in (("linear", "two"), ("finetune", "tune")):
        result = json.loads((tmp_path / folder / f"eval_{name}.json").read_text())
        assert (result["train"], result["test"], result["undecodable"]) == (22, 10, 4)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("script", ["eval_knn", "eval_linear", "eval_finetune", "features"])
def test_when_all_are_broken(sets, tmp_path, capsys, script, part):
    for path in (sets[0] / part).rglob("*.png"):
        path.write_bytes(b"")
    out = tmp_path / "out"
    words = [*RANDOM, "--data", sets[0], "--out", out, *(["--split", part] if script == "features" else [])]
    words += ["--epochs", 1, "--batch-size", 6] if script == "eval_finetune" else []
    with pytest.raises(SystemExit) as stop:
        main(script, *words)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: ") and ("can be decoded" in last or "cannot be" in last)
    assert not list(out.glob("*.npy")) and not list(out.glob("eval_*"))


def test_all_broken_in_two_processes(sets):
    for path in (sets[0] / "val").rglob("*.png"):
        path.write_bytes(b"")
    done = command("eval_knn.py", *RANDOM, "--data", sets[0], "--batch-size", 4, processes=2)
    assert done.returncode and done.stderr.count("error: none of the 12 images can be decoded, the first is") == 1


def test_the_monitor_leaves_them_out(sets):
    from common.resnet import resnet

    backbone = resnet("resnet18", 0.125, 16)
    found = [monitor(backbone, *open_labelled(p), EvalView(16), "cpu", 0, None) for p in sets]
    assert found[0] == found[1] and found[0]["knn"] % 10 == 0  # of ten images


def test_more_than_a_hundred_do_not_stop_an_evaluation(tmp_path):
    write_images(tmp_path, ["000.png", "200.png"], size=(16, 16))
    for i in range(1, 120):
        (tmp_path / f"{i:03}.png").write_bytes(b"")
    dataset = open_dataset(tmp_path, "train")
    batches = list(eval_batches(dataset, EvalView(16), 8, "cpu", 0))
    assert [i for *_, rows in batches for i in rows.tolist()] == [0, 120]
    assert dataset.undecodable == set(range(1, 120))


def test_rows_for_all_where_training_needs_them(sets):
    """Neighbours, as in its batches."""
    from common.resnet import resnet

    dataset = open_dataset(sets[0], "train")
    features, labels = extract(resnet("resnet18", 0.125, 16), dataset, EvalView(16), "cpu", 0, 4)
    assert len(features) == 24 and (features[0] == features[1]).all()
    assert labels[15] == 1 and (features[15] == features[16]).all()


# ------------------------------------------------------------------------------------------------ several pictures
@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP"])
@pytest.mark.parametrize("workers", [0, 2])
def test_only_the_first_picture_is_used_and_said_once(tmp_path, capsys, kind, workers):
    loader.REPORTED.clear()
    pictures = [Image.new("RGB", (20, 16), (80 * i, 0, 250 - 80 * i)) for i in range(3)]
    for i in range(12):
        more = {"save_all": True, "append_images": pictures[1:]} if i in (5, 7) else {}
        more |= {"lossless": True} if kind == "WEBP" else {}
        (tmp_path / f"{i:02}.{kind.lower()[:4]}").write_bytes(encode(pictures[0], kind, **more))
    dataset = open_dataset(tmp_path, "train")
    for epoch in range(2):
        for batch in Loader(dataset, [View(16)], 4, workers=workers).epoch(epoch):
            mean = batch.images[0].float().mean((0, 2, 3)).numpy()
            assert np.abs(mean - [0, 0, 250]).max() < 3
    out = capsys.readouterr().out
    assert out.count("holds several pictures; the first is used, as of all such files") == 1
    assert "05." in out or "07." in out


def test_smaller_copies_are_no_pages(tmp_path, capsys):
    from tests.test_deep import tiff

    loader.REPORTED.clear()
    (tmp_path / "a.tif").write_bytes(two_pages(tiff(photo(16, 20)), 1))
    assert list(eval_batches(open_dataset(tmp_path, "train"), EvalView(16), 4, "cpu", 0))
    assert "several pictures" not in capsys.readouterr().out
    (tmp_path / "a.tif").write_bytes(two_pages(tiff(photo(16, 20)), 0))
    assert list(eval_batches(open_dataset(tmp_path, "train"), EvalView(16), 4, "cpu", 0))
    assert "several pictures" in capsys.readouterr().out


def two_pages(content, kind):
    """A TIFF whose directory comes twice, the second time as a page of a kind."""
    (start,) = np.frombuffer(content, "<u4", 1, 4)
    count = int(np.frombuffer(content, "<u2", 1, start)[0])
    entries = content[start + 2 : start + 2 + 12 * count]
    page = np.array([254, 4], "<u2").tobytes() + np.array([1, kind], "<u4").tobytes() + entries
    second = np.array([count + 1], "<u2").tobytes() + page + bytes(4)
    end = start + 2 + 12 * count
    return content[:end] + np.array([len(content)], "<u4").tobytes() + content[end + 4 :] + second
