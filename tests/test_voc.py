"""common/voc.py: labels, boxes and images of a set in Pascal VOC's layout, and the messages for a broken one."""

import unicodedata

import numpy as np
import pytest

from common.voc import Object, find_set, open_images, read_ids, read_labels, read_objects
from tests.helpers import refused, write_voc


@pytest.mark.parametrize("lists", [True, False])
def test_labels_of_lists_and_of_annotations(tmp_path, lists):
    truth = write_voc(tmp_path, lists)
    names, splits = read_labels(tmp_path)
    assert names == ["cat", "dog", "emu"]
    for split, (ids, labels) in splits.items():
        assert ids == sorted(truth[split]) and labels.dtype == np.int8
        assert labels.tolist() == [truth[split][i] for i in ids]
        assert {-1, 0, 1} == set(labels.ravel())


def test_set_is_found_in_the_folder_around_it(tmp_path):
    write_voc(tmp_path / "VOC2007", numbers=(1, 1))
    write_voc(tmp_path / "VOC2012", numbers=(1, 1))
    (tmp_path / "VOC2012/ImageSets/Segmentation").mkdir()
    assert find_set(tmp_path) == find_set(tmp_path / "VOC2007") == tmp_path / "VOC2007"
    assert find_set(tmp_path, name="VOC2012") == find_set(tmp_path, "Segmentation") == tmp_path / "VOC2012"


def test_objects_have_boxes_as_numbers(tmp_path):
    truth = write_voc(tmp_path)
    assert truth["trainval"]["tr005"] == [-1, 0, -1] and truth["trainval"]["tr003"] == [1, -1, -1]
    assert read_objects(tmp_path, "tr005") == [Object("dog", True, (6, 2, 48.5, 40))]
    assert read_objects(tmp_path, "tr003") == [Object("cat", d, (4, 2, 48.5, 40)) for d in (False, True)]
    (tmp_path / "Annotations/tr000.xml").write_text("<annotation><object><name>emu</name></object></annotation>")
    assert read_objects(tmp_path, "tr000") == [Object("emu", False, None)]


def test_images_in_the_order_of_their_list(tmp_path):
    write_voc(tmp_path, numbers=(3, 2))
    (tmp_path / "JPEGImages/tr001.jpg").rename(tmp_path / "JPEGImages/tr001.JPEG")
    ids = read_ids(tmp_path, "trainval")
    images = open_images(tmp_path, ids, channels=1)
    assert ids == ["tr002", "tr001", "tr000"]
    assert [images.path(i).rpartition("/")[2] for i in range(3)] == ["tr002.jpg", "tr001.JPEG", "tr000.jpg"]
    assert images[0][0].shape == (1, 40, 56) and images.labels is None


def test_lists_as_other_systems_write_them(tmp_path):
    """Names with spaces and in another Unicode form, byte order marks, ends of lines, and macOS's files beside them."""
    truth = write_voc(tmp_path)["trainval"]
    main, names = tmp_path / "ImageSets/Main", {"tr000": "cafe\u0301 1", "tr001": "a 2"}
    for old, new in names.items():
        (tmp_path / f"JPEGImages/{old}.jpg").rename(tmp_path / f"JPEGImages/{unicodedata.normalize('NFC', new)}.jpg")
    for path in main.glob("*trainval.txt"):
        text = path.read_text()
        for old, new in names.items():
            text = text.replace(old, new)
        path.write_bytes(text.replace("\n", "\r\n").encode("utf-16"))
        (main / f"._{path.name}").write_bytes(b"\0\5\x16\7")
    (tmp_path / "JPEGImages/._tr002.jpg").write_bytes(b"\0\5\x16\7")
    classes, splits = read_labels(tmp_path)
    ids, labels = splits["trainval"]
    assert classes == ["cat", "dog", "emu"] and set(names.values()) < set(ids) == set(read_ids(tmp_path, "trainval"))
    assert labels[ids.index("a 2")].tolist() == truth["tr001"]
    assert len(open_images(tmp_path, ids)) == len(ids) and open_images(tmp_path, ["a 2"])[0][0].shape == (3, 40, 56)


def test_mistakes_get_one_line(tmp_path, capsys):
    data, main = tmp_path / "set", tmp_path / "set/ImageSets/Main"
    write_voc(data)
    assert "ImageSets/Main" in refused(capsys, find_set, tmp_path)
    (data / "JPEGImages/te003.jpg").unlink()
    error = refused(capsys, open_images, data, read_ids(data, "test"))
    assert "lacks 1 of the 18 images" in error and "te003.jpg" in error
    good = (main / "dog_test.txt").read_text()
    for line, expected in (("te000 2", "dog_test.txt: 'te000 2'"), ("te999 1", "different images")):
        (main / "dog_test.txt").write_text(f"{good}{line}\n")
        assert expected in refused(capsys, read_labels, data)
    (main / "dog_test.txt").unlink()
    assert "dog_test.txt does not exist" in refused(capsys, read_labels, data)
    for path in main.glob("*_*.txt"):
        path.unlink()
    box = "<annotation><object><name>cat</name><bndbox><xmin>left</xmin></bndbox></object></annotation>"
    for text in ("", "<annotation>", box):
        (data / "Annotations/te004.xml").write_text(text)
        assert "te004.xml cannot be read" in refused(capsys, read_labels, data)
    (data / "Annotations/te004.xml").unlink()
    assert "te004.xml cannot be read" in refused(capsys, read_labels, data)
    (main / "test.txt").write_text("\n")
    assert "test.txt names no image" in refused(capsys, read_ids, data, "test")
    (main / "test.txt").unlink()
    assert "test.txt does not exist" in refused(capsys, read_labels, data)
