"""What --data names: folders, lists, small sets, and one line where something is wrong."""

import argparse
import os

import numpy as np
import pytest
import torch
from PIL import Image

from common.args import default_size
from common.augment import EvalView, View
from common.classes import class_names
from common.datasets import Files, evenly_spaced, open_dataset, open_labelled, open_split
from common.folders import note, split_of
from common.knn import monitor
from common.loader import Loader
from eval_knn import Pixels
from tests.helpers import encode, photo, refused, write_images


def paths(dataset):
    return [os.path.relpath(dataset.path(i), os.fsdecode(dataset.root)) for i in range(len(dataset))]


def opened(root, **more):
    return open_dataset(str(root), "train", **more), open_dataset(str(root), "val", required=False, **more)


def test_folder_with_classes(tmp_path):
    names = ["train/cat/2.jpg", "train/cat/1.PNG", "train/ant/deep/down/x.jpeg", "train/bee/1.jpg"]
    write_images(tmp_path, [*names, "val/bee/9.jpg", "val/ant/8.jpg", "val/cat/7.jpg", "train/.hidden/1.jpg"])
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    train, val = opened(tmp_path)
    assert paths(train) == ["ant/deep/down/x.jpeg", "bee/1.jpg", "cat/1.PNG", "cat/2.jpg"]
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    assert train.labels.tolist() == [train[i][1] for i in range(4)] == [0, 1, 2, 2]
    assert val.labels.tolist() == [0, 1, 2]
    assert np.array_equal(train[2][0].permute(1, 2, 0), photo(33, 42, 1))


def test_flat_train_and_val(tmp_path):
    write_images(tmp_path, ["train/b.jpg", "train/a.jpg", "val/c.jpg"])
    train, val = opened(tmp_path)
    assert paths(train) == ["a.jpg", "b.jpg"] and paths(val) == ["c.jpg"]
    assert train.labels is None and train.classes is None and train[0][1] == -1


def test_folder_of_images_without_labels(tmp_path):
    dataset, val = opened(write_images(tmp_path, ["2020/may/1.jpg", "2020/june/2.jpg", "2021/3.jpg"]))
    assert paths(dataset) == ["2020/june/2.jpg", "2020/may/1.jpg", "2021/3.jpg"]
    assert dataset.labels is None and dataset[1][1] == -1 and val is None


def test_names_of_any_kind(tmp_path):
    names = ["train/a class/my cat (2).jpg", "train/Vögel/grün  ü.png", "train/鳥/写真.jpg", "train/z/ö.JPG"]
    dataset, _ = opened(write_images(tmp_path, names))
    assert len(dataset) == 4 and set(dataset.classes) == {"a class", "Vögel", "鳥", "z"}
    assert {f"train/{p}" for p in paths(dataset)} == set(names)
    with open(os.fsencode(tmp_path) + b"/train/z/\xff\xfe.jpg", "wb") as file:  # no text in any encoding
        file.write(encode(photo(40, 50)))
    (batch,) = Loader(opened(tmp_path)[0], [View(8)], 5, workers=2).epoch(0)
    assert sorted(batch.indices.tolist()) == [0, 1, 2, 3, 4]


def test_links_to_folders(tmp_path):
    write_images(tmp_path, ["data/one/1.jpg", "data2/two/2.jpg"])
    (tmp_path / "data2" / "link").symlink_to(tmp_path / "data")  # data2 begins with data, but does not lie in it
    (tmp_path / "data2" / "two" / "up").symlink_to(tmp_path / "data2")
    assert paths(open_dataset(tmp_path / "data2", "train")) == ["link/one/1.jpg", "two/2.jpg"]


def test_lists_with_and_without_labels(tmp_path):
    write_images(tmp_path, ["x/1.jpg", "x/two words.jpg", "y/3 4.jpg", "ü.png"])
    text = "# a comment\n\nx/two words.jpg 3\n  ü.png   0  \r\nx/1.jpg 12\n\n"
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    dataset = open_dataset(tmp_path, "train", tmp_path / "list.txt")
    assert paths(dataset) == ["x/two words.jpg", "ü.png", "x/1.jpg"]
    assert dataset.labels.tolist() == [1, 0, 2] and dataset[2][1] == 2 and dataset.classes == ["0", "3", "12"]
    (tmp_path / "list.txt").write_text("x/two words.jpg\n# x/5.jpg\ny/3 4.jpg\nx/1.jpg")
    dataset = open_dataset(tmp_path, "val", str(tmp_path / "list.txt"))
    assert paths(dataset) == ["x/two words.jpg", "y/3 4.jpg", "x/1.jpg"]
    assert dataset.labels is None and dataset[0][1] == -1


MALFORMED = {
    "1.jpg 0\n2.jpg\n": "line 2:",
    "# header\n1.jpg\n\n2.jpg 4\n": "line 4:",
    "1.jpg 0\n2.jpg cat\n": "line 2:",
    "1.jpg 0\n3.jpg 0\n": "line 2:",
    "1.jpg 0\n2.jpg 0.5\n": "line 2:",
    "\n1.jpg 0 1 0\n": "line 2:",
    "1.jpg 0\n2.jpg ²\n": "line 2:",
    "# nothing\n\n": "names no image",
}


@pytest.mark.parametrize("content", MALFORMED)
@pytest.mark.parametrize("split", ["train", "val"])
def test_malformed_list(tmp_path, capsys, content, split):
    write_images(tmp_path, ["1.jpg", "2.jpg"])
    (tmp_path / "list.txt").write_text(content, encoding="utf-8")
    message = refused(capsys, open_dataset, tmp_path, split, tmp_path / "list.txt")
    assert f"--{split}-list" in message and "list.txt" in message and MALFORMED[content] in message
    message = refused(capsys, open_dataset, tmp_path, split, tmp_path / "nowhere.txt")
    assert f"--{split}-list" in message and "nowhere.txt" in message


def test_folder_that_is_missing_or_empty_or_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "train" / "cat").mkdir(parents=True)
    write_images(tmp_path, ["only/val/a/1.jpg", "other/train/a/1.jpg"])
    said = {"nowhere": "nowhere", "file": "is not a folder", "empty": "no images in", "half": "half", "only": "train/"}
    for folder, message in said.items():
        assert message in refused(capsys, open_dataset, str(tmp_path / folder), "train")
    assert "val/" in refused(capsys, open_dataset, str(tmp_path / "other"), "val")
    assert open_dataset(tmp_path / "other", "val", required=False) is None


# -------------------------------------------------------------------------------------------------------- splits
def both(folder, part):
    return [f"{folder}/{part}/{c}/{i}.png" for c in ("cat", "dog") for i in (1, 2)]


def test_names_of_splits():
    for (
        name
    ) in "train Train TRAIN training training_set train_images trainset train2017 Train-Data images_train".split():
        assert split_of(name) == "train", name
    for name in "val Val valid validation val_images dev eval val2017 validationSet".split():
        assert split_of(name) == "val", name
    for name in "test Test TEST testing test_set test-images Testing tst".split():
        assert split_of(name) == "test", name
    for (
        name
    ) in "train_station trains latest contest evaluate devices train_labels validity test_tube images data".split():
        assert split_of(name) is None, name


PAIRS = "Train Test, TRAIN VALID, training testing, train_set dev_set, train2017 val2017, dogs_train dogs_test"


@pytest.mark.parametrize("pair", PAIRS.split(", "))
@pytest.mark.parametrize("below", ["set", "outer/set"])
def test_splits_in_any_spelling(tmp_path, capsys, pair, below):
    names = [name for part in pair.split() for name in both(below, part)]
    root = write_images(tmp_path, names, size=(8, 8)) / below.partition("/")[0]
    train, val = opened(f"{root}/")
    assert [os.path.basename(os.fsdecode(part.root)) for part in (train, val)] == pair.split()
    assert train.labels.tolist() == val.labels.tolist() == [0, 0, 1, 1] and train.classes == val.classes == [
        "cat",
        "dog",
    ]
    first, second = pair.split()
    said = capsys.readouterr().out
    assert f"{first}/ is for training, {second}/ is for validation and tests" in said
    assert ("set/ is the data set" in said) == (below != "set")


def test_usual_splits_alone_are_not_mentioned(tmp_path, capsys):
    opened(write_images(tmp_path, both(".", "train") + both(".", "val"), size=(8, 8)))
    assert capsys.readouterr().out == ""


def test_test_images_are_never_trained_on_in_silence(tmp_path, capsys):
    write_images(tmp_path, ["a/test/x/1.png", "a/images/2.png", "b/2020/test/1.png", "b/2020/2.png", "c/test/1.png"])
    write_images(tmp_path, ["two/x/train/1.png", "two/y/train/1.png", "d/val/1.png", "d/test/1.png", "d/train/1.png"])
    assert "no train/ folder, only test/" in refused(capsys, open_dataset, tmp_path / "a", "train")
    assert "holds several data sets (x, y)" in refused(capsys, open_dataset, tmp_path / "two", "train")
    for folder, line in (
        ("b", "1 of the images lie in folders of test images (2020/test/)"),
        ("c/test", "is, by its name, a folder of test images"),
        ("d", "val/ is for validation and tests; not used without a list: test/"),
    ):
        opened(tmp_path / folder)
        assert line in capsys.readouterr().out


def test_folders_around_the_classes(tmp_path, capsys):
    """train/images/cat/ has the class cat, train/images/ alone has none, as has a folder named like the one around."""
    write_images(tmp_path, [*both("a", "train/images"), "b/train/images/1.png", *both("c", "seg_train/seg_train")])
    write_images(tmp_path, both("c", "seg_test/seg_test"))
    assert opened(tmp_path / "a")[0].classes == ["cat", "dog"] and opened(tmp_path / "b")[0].classes is None
    assert [part.classes for part in opened(tmp_path / "c")] == [["cat", "dog"]] * 2


def test_sub_folders_that_look_like_classes(tmp_path, capsys):
    write_images(tmp_path, ["cat/1.png", "dog/1.png", "cow/1.png"])
    assert opened(tmp_path)[0].labels is None
    assert "3 sub-folders look like classes; labels are used when they lie in train/" in capsys.readouterr().out
    write_images(tmp_path / "x", ["train/cat/1.png", "train/dog/1.png"])
    assert opened(tmp_path / "x/train")[0].labels is None
    assert f"2 sub-folders look like classes; labels are used when they lie in train/: --data {tmp_path}/x" in (
        capsys.readouterr().out
    )


# ------------------------------------------------------------------------------------------------ what is left out
def test_what_is_left_out_is_counted(tmp_path, capsys, monkeypatch):
    write_images(tmp_path, ["train/a/1.png", "train/b/1.png", "val/a/1.png", "2.png", "extra/3.png"], size=(8, 8))
    files = "a/x.heic a/y.HEIC a/notes.txt a/README b/._1.png b/.DS_Store Thumbs.db a/@eaDir/1.png __MACOSX/a/._1.png"
    for name in [*files.split(), "b/.ipynb_checkpoints/1.png", "__MACOSX/a/2.png"]:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"x")
    (tmp_path / "train/empty/deep").mkdir(parents=True)
    links = {"a/up": tmp_path, "a/dangling.png": "nowhere", "a/b": tmp_path / "train/b", "b/a": tmp_path / "train/a"}
    for name, target in links.items():
        (tmp_path / "train" / name).symlink_to(target)
    os.mkfifo(tmp_path / "train/pipe.png")
    train = opened(tmp_path)[0]
    said = capsys.readouterr().out
    assert f"{tmp_path}: train/ is for training, val/ is for validation and tests; not used" in said
    assert "without a list: extra/, 1 images" in said
    assert paths(train) == ["a/1.png", "a/b/1.png", "b/1.png", "b/a/1.png"] and train.classes == ["a", "b"]
    kinds = "hidden or of the system 10, .heic 4, link to a folder above 4, .txt 2, broken link 2, no ending 2"
    assert f"train: 25 left out: {kinds}, not a file 1; no image in empty/" in said  # a and b are seen twice


def test_the_cache_of_a_large_folder_tells_what_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("common.archive.LARGE", 2)
    folder = write_images(tmp_path / "data", ["train/a/1.png", "train/b/2.png"])
    for name in ("x.heic", "y.txt"):
        (folder / "train/a" / name).write_text("")
    (folder / "train/c").mkdir()
    for path, _, _ in os.walk(folder):
        os.utime(path, (1e9, 1e9))
    said = []
    for _ in range(2):
        note.cache_clear()
        opened(folder)
        said.append(capsys.readouterr().out)
        monkeypatch.setattr("common.datasets.scan_images", lambda *_: pytest.fail("the cache was not used"))
    assert said[0] == said[1] and "2 left out: .heic 1, .txt 1; no image in c/" in said[0]


# ---------------------------------------------------------------------------------------------------- what it names
def test_names_of_data(tmp_path, capsys, monkeypatch):
    """Home, links, relative paths, a folder called as a built-in set, and the nearest name for what is not there."""
    write_images(tmp_path, ["photos/1.png", "digits/1.png", "digits/2.png", "list.txt/1.png"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("photos")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("photos", "photos/", "./photos", "~/photos", "link", "link/", "photos/../photos"):
        assert len(open_dataset(name, "train")) == 1
    assert len(open_dataset("./digits", "train")) == len(open_dataset("digits/", "train")) == 2
    assert capsys.readouterr().out == "" and len(open_dataset("digits", "train")) == 1438
    assert "is the built-in set, not the folder of that name here, which is --data ./digits" in capsys.readouterr().out
    said = {
        "photso": "did you mean photos?",
        "phots/train": "did you mean photos?",
        "CIFAR-10": "did you mean cifar10?",
    }
    said |= {
        "": "--data is empty",
        "dangling": "link to nowhere",
        "~/nowhere": "does not exist",
        "x" * 5000: "not exist",
    }
    for name, expected in said.items():
        assert expected in refused(capsys, open_dataset, name, "train")
    (tmp_path / "l.csv").write_text("1.png")
    assert "and --train-list l.csv" in refused(capsys, open_dataset, "l.csv", "train")
    (tmp_path / "images.tar.gz").write_bytes(b"")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(b"")
    assert "put labelled images into train/<class>/" in refused(capsys, open_dataset, "flat", "val")
    assert "unpack it and give the folder" in refused(capsys, open_dataset, "images.tar.gz", "train")
    assert "goes with --data FOLDER" in refused(capsys, open_dataset, "fake", "train", "l.csv")


# ----------------------------------------------------------------------------------------------------- two numberings
FOLDERS = ["train/red/1.png", "train/red/2.png", "train/green/1.png", "train/blue/1.png"]
FLAT = ["1.png", "2.png", "3.png", "4.png"]
NUMBERS = {  # images, lists, expected: classes, training labels, test labels or the error
    "the list numbers the folders": (
        [*FOLDERS, "val/red/1.png", "val/green/1.png", "val/blue/1.png"],
        ["train/red/1.png 0\ntrain/green/1.png 1\ntrain/blue/1.png 2\n", None],
        (["red", "green", "blue"], [0, 1, 2], [2, 1, 0]),
    ),
    "a test list numbers the folders": (
        [*FOLDERS, "val/red/1.png", "val/green/1.png"],
        [None, "red/1.png 7\ngreen/1.png 3\n"],
        (["blue", "green", "red"], [0, 1, 2, 2], [2, 1]),
    ),
    "a list of names": (
        [*FOLDERS, "val/green/1.png"],
        ["train/red/1.png red\ntrain/green/1.png green\n", None],
        (["green", "red"], [1, 0], [0]),
    ),
    "places in the alphabet": (
        [*FOLDERS, "val/1.png"],
        [None, "1.png 2\n"],
        (["blue", "green", "red"], [0, 1, 2, 2], [2]),
    ),
    "counted from 1 against folders": ([*FOLDERS, "val/1.png"], [None, "1.png 3\n"], "no training image is of 3"),
    "sparse, huge and negative": (
        FLAT,
        [f"1.png 900\n2.png {10**12}\n3.png -5\n4.png 900\n", f"4.png {10**12}\n1.png 900\n"],
        (["-5", "900", str(10**12)], [1, 2, 0, 1], [2, 1]),
    ),
    "beyond 64 bits": (FLAT, [f"1.png {10**30}\n2.png 1\n", "1.png 1\n"], (["1", str(10**30)], [1, 0], [0])),
    "unseen number": (FLAT, ["1.png 0\n2.png 1\n", "3.png 2\n"], "no training image is of 2"),
    "numbers and names": (FLAT, ["1.png 0\n2.png 1\n", "3.png cat\n"], "no training image is of cat"),
    "one class": (FLAT, ["1.png 4\n2.png 4\n", "3.png 4\n"], "all images are of one class, 4"),
    "some of the classes": ([*FOLDERS, "val/green/1.png"], [None, None], (["blue", "green", "red"], [0, 1, 2, 2], [1])),
    "other case": ([*FOLDERS, "val/Green/1.png"], [None, None], (["blue", "green", "red"], [0, 1, 2, 2], [1])),
    "other normal form": (
        ["train/\u00e9/1.png", "train/a/1.png", "val/e\u0301/1.png"],
        [None, None],
        (["a", "\u00e9"], [0, 1], [1]),
    ),
    "unknown folder": ([*FOLDERS, "val/pink/1.png"], [None, None], "no training image is of pink"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_one_numbering_for_both_sides(tmp_path, capsys, case):
    images, lists, expected = NUMBERS[case]
    write_images(tmp_path, images, size=(8, 8))
    for name, text in zip(("train.txt", "val.txt"), lists, strict=True):
        if text:
            (tmp_path / name).write_text(text)
    lists = [name if text else None for name, text in zip(("train.txt", "val.txt"), lists, strict=True)]
    if isinstance(expected, str):
        assert expected in refused(capsys, open_labelled, tmp_path, *lists)
        return
    train, val = open_labelled(tmp_path, *lists)
    classes, labels, targets = expected
    assert train.classes == val.classes == classes
    assert train.labels.tolist() == labels and val.labels.tolist() == targets == [val[i][1] for i in range(len(val))]
    assert ("alphabetical order: blue is 0" in capsys.readouterr().out) == (case == "places in the alphabet")


def test_lists_that_contradict_each_other(tmp_path, capsys):
    write_images(tmp_path, ["a/1.png", "b/2.png"], size=(8, 8))
    for name, text in (("train.txt", "a/1.png 0\nb/2.png 1\n"), ("val.txt", "a/1.png 1\nb/2.png 0\n")):
        (tmp_path / name).write_text(text)
    train, _ = open_labelled(tmp_path, "train.txt", "val.txt")
    assert "the images in folders a/ have the label 0 in training, 1 in the test set" in capsys.readouterr().out
    assert class_names(train) == {0: "a", 1: "b"}


def test_accuracy_during_training_uses_one_numbering(tmp_path, capsys):
    """The classes are colours, which raw pixels tell apart: 100 % if both sides number them alike."""
    for split, numbers in (("train", range(8)), ("val", range(3))):
        for c, name in enumerate(("red", "green", "blue")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in numbers:
                colour = tuple(200 * (c == k) + i for k in range(3))
                Image.new("RGB", (8, 8), colour).save(tmp_path / split / name / f"{i}.png")
    texts = {"all": "red 5 green 1 blue 9", "one": "red 5", "few": "red 5 green 1"}
    for name, text in texts.items():
        pairs = zip(text.split()[::2], text.split()[1::2], strict=True)
        (tmp_path / name).write_text("".join(f"train/{c}/{i}.png {n}\n" for c, n in pairs for i in range(8)))

    def accuracy(words):
        train, val = open_dataset(tmp_path, "train", words), open_dataset(tmp_path, "val")
        return monitor(Pixels(8), train, val, EvalView(8), "cpu", 0, None).get("knn")

    assert accuracy("all") == accuracy(None) == 100.0
    assert accuracy("one") is accuracy("few") is None
    said = capsys.readouterr().out
    assert "no k-NN accuracy: train and val have different classes" in said and "of blue, green" in said


def test_named_set_that_is_not_there(tmp_path, capsys):
    for name in ("cifar10", "cifar100", "stl10"):
        assert f"--data {name}" in refused(capsys, open_dataset, f"{name}:{tmp_path}", "train")
    for name in ("fake:many", "fake:0"):
        assert name in refused(capsys, open_dataset, name, "train")


def test_images_of_stl10_without_a_label_train_and_do_not_vote(monkeypatch, capsys):
    class Twenty:
        def __init__(self, root, split, download):
            self.data = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(8, 2).repeat(8, 3) * 9
            self.labels, self.classes = np.where(np.arange(20) < 8, np.arange(20) % 4, -1), list("abcd")
            if split == "test":
                self.data, self.labels = self.data[:8], self.labels[:8]

    monkeypatch.setattr("torchvision.datasets.STL10", Twenty)
    train, val = opened("stl10")
    assert len(train) == 20 and monitor(Pixels(8), train, val, EvalView(8), "cpu", 0, None)["knn"] > 0
    assert len(open_split(argparse.Namespace(data="stl10", split="train", train_list=None, val_list=None))) == 8
    train, val = open_labelled("stl10")
    assert len(train) == len(val) == 8 and train.labels.tolist() == [0, 1, 2, 3] * 2


def test_digits(capsys):
    train, val = opened("digits")
    assert len(train) + len(val) == 1797 and min(np.bincount(val.labels)) > 20 and len(train.classes) == 10
    image, label = train[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8) and label == 0
    assert train.images.min() == 0 and train.images.max() == 255
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    taken = {train[i][0].numpy().tobytes() for i in range(len(train))}
    assert sum(val[i][0].numpy().tobytes() in taken for i in range(len(val))) == 0
    grey, _ = opened("digits", channels=1)  # all three channels are the luma
    assert grey.images.shape == (1438, 8, 8, 1) and np.array_equal(grey.images[..., 0], train.images[..., 1])
    assert "can be made grey" in refused(capsys, open_dataset, "digits", "train", channels=4)


def test_fake():
    train, val = opened("fake:30")
    assert len(train) == 30 and len(val) == 10 and len(opened("fake")[0]) == 1000
    assert train[7][1] == 7 and train[17][1] == 7 and train[3][0].shape == (3, 64, 64)
    assert torch.equal(train[5][0], opened("fake:30")[0][5][0])
    everything = [dataset[i][0] for dataset in (train, val) for i in range(len(dataset))]
    assert len({x.numpy().tobytes() for x in everything}) == 40  # no image of val is in train
    mean = torch.stack([x.float().mean((1, 2)) for x in everything[:30]])
    sizes = {"digits": 16, "cifar10:/x": 32, "stl10": 96, "fake:5": 64, "/data": 224}
    assert {name: default_size(name) for name in sizes} == sizes
    within, between = (mean[:10] - mean[10:20]).norm(dim=1).max(), torch.pdist(mean[:10]).min()
    assert within < between  # a class can be told from its colour


def test_subset_and_evenly_spaced(tmp_path):
    names = [f"{'ab'[i % 2]}/{i:02}.png" for i in range(26)]
    write_images(tmp_path, names)
    images = Files(tmp_path, names, [i % 2 for i in range(26)], ["a", "b"])
    few = evenly_spaced(images, 5)
    assert few.indices.tolist() == [0, 6, 12, 19, 25] and few.labels.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(few[3][0], images[19][0]) and few.path(3) == images.path(19) and few.classes == images.classes
    assert evenly_spaced(images, 26) is images
