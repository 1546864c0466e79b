"""What --data names: folders, lists, small sets, and one line where something is wrong."""

import os

import numpy as np
import pytest
import torch

from common.args import default_size
from common.augment import View
from common.datasets import Files, evenly_spaced, open_dataset
from common.loader import Loader
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
    assert dataset.labels.tolist() == [3, 0, 12] and dataset[2][1] == 12
    (tmp_path / "list.txt").write_text("x/two words.jpg\n# x/5.jpg\ny/3 4.jpg\nx/1.jpg")
    dataset = open_dataset(tmp_path, "val", str(tmp_path / "list.txt"))
    assert paths(dataset) == ["x/two words.jpg", "y/3 4.jpg", "x/1.jpg"]
    assert dataset.labels is None and dataset[0][1] == -1


MALFORMED = {
    "1.jpg 0\n2.jpg\n": "line 2:",
    "# header\n1.jpg\n\n2.jpg 4\n": "line 4:",
    "1.jpg 0\n2.jpg cat\n": "line 2:",
    "1.jpg 0\n3.jpg 0\n": "line 2:",
    "1.jpg 0\n2.jpg -1\n": "line 2:",
    "\n1.jpg ²\n": "line 2:",
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


def test_named_set_that_is_not_there(tmp_path, capsys):
    for name in ("cifar10", "cifar100", "stl10"):
        assert f"--data {name}" in refused(capsys, open_dataset, f"{name}:{tmp_path}", "train")
    for name in ("fake:many", "fake:0"):
        assert name in refused(capsys, open_dataset, name, "train")


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
