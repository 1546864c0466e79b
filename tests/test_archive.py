"""Tar archives equal the folders they were made from; indices are used, and made again when they have to be."""

import io
import json
import os
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from common import archive
from common.datasets import open_dataset, scan_images
from common.images import EXTENSIONS
from tests.helpers import encode, main, photo, refused, write_images

FILES = ["train/b/1.jpg", "train/a/2.jpg", "train/a/9 \u00e4\n.jpg", "val/a/3.jpg", "val/b/4.jpg"]


def jpeg(seed):
    return encode(photo(20, 14, seed))


def tar(path, members):
    """members: {name: bytes}."""
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def names(dataset):
    return dataset.names.strings()


def same(a, b):
    assert len(a) == len(b) and a.classes == b.classes and np.array_equal(a.labels, b.labels)
    for i in range(len(a)):
        assert torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1]


def test_packed_folder_equals_the_folder(tmp_path):
    folder, tars = write_images(tmp_path / "folder", FILES), tmp_path / "tars"
    main("pack", folder, "--out", tars)
    for split in ("train", "val"):
        same(open_dataset(folder, split), open_dataset(tars, split))
        same(open_dataset(folder, split), open_dataset(tars / "train.tar", split))  # val.tar lies beside
    assert names(open_dataset(tars, "train")) == ["a/2.jpg", "a/9 \u00e4\n.jpg", "b/1.jpg"]
    assert not list(tars.glob("*.tmp*"))


def test_one_archive_with_both_splits_below_another_folder(tmp_path):
    folder = write_images(tmp_path / "folder", FILES)
    tar(tmp_path / "all.tar", {f"./set/{n}": (folder / n).read_bytes() for n in FILES})
    for split in ("train", "val"):
        same(open_dataset(folder, split), open_dataset(tmp_path / "all.tar", split))


def test_archive_without_splits(tmp_path, capsys):
    tar(tmp_path / "x.tar", {"b/1.jpg": jpeg(0), "a/2.jpg": jpeg(1)})
    assert open_dataset(tmp_path / "x.tar", "train").classes == ["a", "b"]
    assert open_dataset(tmp_path / "x.tar", "val", required=False) is None
    assert "has no val/ folder" in refused(capsys, open_dataset, tmp_path / "x.tar", "val")
    tar(tmp_path / "flat.tar", {"images/1.jpg": jpeg(0), "images/2.jpg": jpeg(1)})
    assert open_dataset(tmp_path / "flat.tar", "train").labels is None


def test_archive_of_archives_and_flat_archive_with_a_list(tmp_path, capsys):
    """The layout in which ImageNet is handed out."""
    inner = {}
    for c in (2, 1):
        inner[f"n0{c}.tar"] = tar(tmp_path / "inner", {f"n0{c}_{i}.JPEG": jpeg(10 * c + i) for i in (2, 1)})
    (tmp_path / "inner").unlink()
    tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    tar(tmp_path / "ILSVRC2012_img_val.tar", {"v1.JPEG": jpeg(5), "v2.JPEG": jpeg(6), "v3.JPEG": jpeg(7)})
    train = open_dataset(tmp_path, "train")
    assert names(train) == ["n01/n01_1.JPEG", "n01/n01_2.JPEG", "n02/n02_1.JPEG", "n02/n02_2.JPEG"]
    assert train.classes == ["n01", "n02"] and train.labels.tolist() == [0, 0, 1, 1]
    assert train.read(2) == jpeg(21)
    (tmp_path / "val.txt").write_text("v3.JPEG 1\nv1.JPEG 0\n")
    val = open_dataset(tmp_path, "val", tmp_path / "val.txt")
    assert names(val) == ["v3.JPEG", "v1.JPEG"] and val.labels.tolist() == [1, 0] and val.read(0) == jpeg(7)
    (tmp_path / "val.txt").write_text("v3.JPEG 1\nv4.JPEG 0\n")
    assert "line 2: 'v4.JPEG' is not in" in refused(capsys, open_dataset, tmp_path, "val", tmp_path / "val.txt")


@pytest.mark.parametrize("path", ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg"])
def test_list_cannot_lead_out_of_the_folder(tmp_path, capsys, path):
    write_images(tmp_path, ["x.jpg", "data/a/y.jpg"])
    (tmp_path / "list.txt").write_text(f"{path} 0\n")
    (tmp_path / "list.json").write_text(json.dumps({"images": [{"id": 1, "file_name": path}]}))
    for name in ("list.txt", "list.json"):
        message = refused(capsys, open_dataset, tmp_path / "data", "train", tmp_path / name)
        assert "leads out of the data folder" in message


def test_links_in_an_archive_are_not_followed(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    tar(tmp_path / "train.tar", {"../../out.jpg": jpeg(2)})
    with tarfile.open(tmp_path / "train.tar", "a") as file:
        for name, kind in (("hard.jpg", tarfile.LNKTYPE), ("soft.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.jpg")
            file.addfile(info)
    data = open_dataset(tmp_path / "train.tar", "train")
    assert len(data) == 1 and data.read(0) == jpeg(2)  # read from the archive, whatever its name says


@pytest.mark.parametrize("content", [b"", b"garbage" * 200, b"\x1f\x8b\x08" + bytes(600)])
def test_what_is_not_a_tar(tmp_path, capsys, content):
    (tmp_path / "x.tar").write_bytes(content)
    message = refused(capsys, open_dataset, tmp_path / "x.tar", "train")
    assert "x.tar" in message and ("not an uncompressed tar" in message or "no images" in message)


def test_index_is_used_and_renewed(tmp_path, monkeypatch):
    path, members = tmp_path / "train.tar", {"a/1.jpg": jpeg(0), "b/2.jpg": jpeg(1)}
    tar(path, members)
    assert len(open_dataset(path, "train")) == 2
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_members", lambda *a: pytest.fail("the index was not used"))
        assert len(open_dataset(path, "train")) == 2
    tar(path, members | {"b/3.jpg": jpeg(2)})
    assert len(open_dataset(path, "train")) == 3
    (tmp_path / "train.tar.index.npz").write_bytes(b"broken")
    assert len(open_dataset(path, "train")) == 3


def test_folder_cache_notices_new_and_removed_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(archive, "LARGE", 2)
    folder, old = write_images(tmp_path / "data", FILES), time.time() - 100
    expected = names(open_dataset(folder, "train"))
    assert not (tmp_path / "cache").exists()  # a file could still come within the same tick of the clock
    for path, _, _ in os.walk(folder):
        os.utime(path, (old, old))
    assert names(open_dataset(folder, "train")) == expected
    assert len(list((tmp_path / "cache" / "one-page-ssl").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr("common.datasets.scan_images", lambda *a: pytest.fail("the cache was not used"))
        assert names(open_dataset(folder, "train")) == expected
    write_images(folder, ["train/a/new.jpg"])
    assert names(open_dataset(folder, "train")) == sorted([*expected, "a/new.jpg"])
    (folder / "train/a/new.jpg").unlink()
    assert names(open_dataset(folder, "train")) == expected


def test_pack_resizes_and_leaves_out_what_is_broken(tmp_path, capsys):
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    for name in ("wide.png", "wide.bmp"):
        Image.new("RGB", (400, 200), (255, 0, 0)).save(folder / "a" / name)
    Image.new("L", (10, 12), 7).save(folder / "a/small.jpg")
    (folder / "a/broken.jpg").write_bytes(jpeg(0)[:100])
    main("pack", folder, "--out", tmp_path, "--resize", 100)
    output = capsys.readouterr()
    assert "a/broken.jpg" in output.err and "3 images" in output.out and "1 left out" in output.out
    data = open_dataset(tmp_path / "train.tar", "train")
    assert names(data) == ["a/small.jpg", "a/wide.jpg", "a/wide.png.jpg"]
    assert data.read(0) == (folder / "a/small.jpg").read_bytes()
    assert data[1][0].shape == (3, 100, 200) and data[1][0][0].float().mean() > 250


def test_images_beside_class_folders_are_mentioned(tmp_path, capsys):
    data = open_dataset(write_images(tmp_path, [*FILES, "train/stray.jpg"]), "train")
    assert data.labels is None and "1 images lie beside the class folders ('stray.jpg'" in capsys.readouterr().out


def test_scan_names_all_folders(tmp_path):
    paths, folders = scan_images(write_images(tmp_path, FILES))
    assert paths == sorted(FILES) and set(folders) == {"", "train/", "train/a/", "train/b/", "val/", "val/a/", "val/b/"}
    assert archive.Names.of(paths).strings() == paths and all(p.lower().endswith(EXTENSIONS) for p in paths)
