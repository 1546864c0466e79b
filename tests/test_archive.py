"""Tar archives equal the folders they were made from; indices are used, and made again when they have to be."""

import io
import os
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

import pack
from common import archive
from common.data import EXTENSIONS, build, scan


def jpeg(seed, size=(20, 14)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tree(root, names):
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(seed))
    return root


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


def refused(capsys, *args, **kwargs):
    with pytest.raises(SystemExit) as stop:
        build(*args, **kwargs)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    return message


FILES = ["train/b/1.jpg", "train/a/2.jpg", "train/a/9 \u00e4\n.jpg", "val/a/3.jpg", "val/b/4.jpg"]


def same(a, b):
    assert len(a) == len(b) and a.classes == b.classes and np.array_equal(a.labels, b.labels)
    for i in range(len(a)):
        assert torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1]


def test_packed_folder_equals_the_folder(tmp_path):
    folder = tree(tmp_path / "folder", FILES)
    pack.main(pack.parse_args([str(folder), "--out", str(tmp_path / "tars")]))
    for split in ("train", "val"):
        same(build(folder, split), build(tmp_path / "tars", split))
        same(build(folder, split), build(tmp_path / "tars" / "train.tar", split))  # val.tar lies beside
    assert names(build(tmp_path / "tars", "train")) == ["a/2.jpg", "a/9 \u00e4\n.jpg", "b/1.jpg"]
    assert not list((tmp_path / "tars").glob("*.tmp*"))


def test_one_archive_with_both_splits_below_another_folder(tmp_path):
    folder = tree(tmp_path / "folder", FILES)
    tar(tmp_path / "all.tar", {f"./set/{n}": (folder / n).read_bytes() for n in FILES})
    for split in ("train", "val"):
        same(build(folder, split), build(tmp_path / "all.tar", split))


def test_archive_without_splits(tmp_path, capsys):
    tar(tmp_path / "x.tar", {"b/1.jpg": jpeg(0), "a/2.jpg": jpeg(1)})
    assert build(tmp_path / "x.tar", "train").classes == ["a", "b"]
    assert build(tmp_path / "x.tar", "val", required=False) is None
    assert "has no val/ folder" in refused(capsys, tmp_path / "x.tar", "val")
    tar(tmp_path / "flat.tar", {"images/1.jpg": jpeg(0), "images/2.jpg": jpeg(1)})
    assert build(tmp_path / "flat.tar", "train").labels is None


def test_archive_of_archives_and_flat_archive_with_a_list(tmp_path):
    """The layout in which ImageNet is handed out."""
    inner = {
        f"n0{c}.tar": tar(tmp_path / "inner", {f"n0{c}_{i}.JPEG": jpeg(10 * c + i) for i in (2, 1)}) for c in (2, 1)
    }
    (tmp_path / "inner").unlink()
    tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    tar(tmp_path / "ILSVRC2012_img_val.tar", {"v1.JPEG": jpeg(5), "v2.JPEG": jpeg(6), "v3.JPEG": jpeg(7)})
    train = build(tmp_path, "train")
    assert names(train) == ["n01/n01_1.JPEG", "n01/n01_2.JPEG", "n02/n02_1.JPEG", "n02/n02_2.JPEG"]
    assert train.classes == ["n01", "n02"] and train.labels.tolist() == [0, 0, 1, 1]
    assert train.read(2) == jpeg(21)
    (tmp_path / "val.txt").write_text("v3.JPEG 1\nv1.JPEG 0\n")
    val = build(tmp_path, "val", tmp_path / "val.txt")
    assert names(val) == ["v3.JPEG", "v1.JPEG"] and val.labels.tolist() == [1, 0] and val.read(0) == jpeg(7)


def test_list_with_a_missing_name(tmp_path, capsys):
    tar(tmp_path / "train.tar", {"1.jpg": jpeg(0)})
    (tmp_path / "list.txt").write_text("1.jpg 0\n2.jpg 1\n")
    assert "line 2: '2.jpg' is not in" in refused(capsys, tmp_path, "train", tmp_path / "list.txt")


@pytest.mark.parametrize("path", ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg"])
def test_list_cannot_lead_out_of_the_folder(tmp_path, capsys, path):
    tree(tmp_path, ["x.jpg", "data/a/y.jpg"])
    (tmp_path / "list.txt").write_text(f"{path} 0\n")
    assert "leads out of the data folder" in refused(capsys, tmp_path / "data", "train", tmp_path / "list.txt")


def test_links_in_an_archive_are_not_followed(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    with tarfile.open(tmp_path / "train.tar", "w") as file:
        for name, kind in (("hard.jpg", tarfile.LNKTYPE), ("soft.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.jpg")
            file.addfile(info)
        info = tarfile.TarInfo("../../out.jpg")
        info.size = len(jpeg(2))
        file.addfile(info, io.BytesIO(jpeg(2)))
    data = build(tmp_path / "train.tar", "train")
    assert len(data) == 1 and data.read(0) == jpeg(2)  # read from the archive, whatever its name says


@pytest.mark.parametrize("content", [b"", b"garbage" * 200, b"\x1f\x8b\x08" + bytes(600)])
def test_what_is_not_a_tar(tmp_path, capsys, content):
    (tmp_path / "x.tar").write_bytes(content)
    message = refused(capsys, tmp_path / "x.tar", "train")
    assert "x.tar" in message and ("not an uncompressed tar" in message or "no images" in message)


def test_index_is_used_and_renewed(tmp_path, monkeypatch):
    path = tmp_path / "train.tar"
    tar(path, {"a/1.jpg": jpeg(0), "b/2.jpg": jpeg(1)})
    assert len(build(path, "train")) == 2
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_members", lambda *a: pytest.fail("the index was not used"))
        assert len(build(path, "train")) == 2
    tar(path, {"a/1.jpg": jpeg(0), "b/2.jpg": jpeg(1), "b/3.jpg": jpeg(2)})
    assert len(build(path, "train")) == 3
    (tmp_path / "train.tar.index.npz").write_bytes(b"broken")
    assert len(build(path, "train")) == 3


def test_folder_cache_notices_new_and_removed_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(archive, "LARGE", 2)
    folder = tree(tmp_path / "data", FILES)
    old = time.time() - 100

    def age():
        for path, _, _ in os.walk(folder):
            os.utime(path, (old, old))

    age()
    expected = names(build(folder, "train"))
    assert len(list((tmp_path / "cache" / "one-page-ssl").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr("common.data.scan", lambda *a: pytest.fail("the cache was not used"))
        assert names(build(folder, "train")) == expected
    tree(folder, ["train/a/new.jpg"])
    assert names(build(folder, "train")) == sorted([*expected, "a/new.jpg"])
    (folder / "train/a/new.jpg").unlink()
    assert names(build(folder, "train")) == expected


def test_fresh_folder_is_not_cached(tmp_path, monkeypatch):
    """A file could still come within the same tick of the clock."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(archive, "LARGE", 2)
    build(tree(tmp_path / "data", FILES), "train")
    assert not (tmp_path / "cache").exists()


def test_pack_resizes_and_leaves_out_what_is_broken(tmp_path, capsys):
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    Image.new("RGB", (400, 200), (255, 0, 0)).save(folder / "a/wide.png")
    Image.new("RGB", (400, 200), (255, 0, 0)).save(folder / "a/wide.bmp")
    Image.new("L", (10, 12), 7).save(folder / "a/small.jpg")
    (folder / "a/broken.jpg").write_bytes(jpeg(0)[:100])
    pack.main(pack.parse_args([str(folder), "--out", str(tmp_path), "--resize", "100"]))
    output = capsys.readouterr()
    assert "a/broken.jpg" in output.err and "3 images" in output.out and "1 left out" in output.out
    data = build(tmp_path / "train.tar", "train")
    assert names(data) == ["a/small.jpg", "a/wide.jpg", "a/wide.png.jpg"]
    assert data.read(0) == (folder / "a/small.jpg").read_bytes()
    assert data[1][0].shape == (3, 100, 200) and data[1][0][0].float().mean() > 250


def test_images_beside_class_folders_are_mentioned(tmp_path, capsys):
    data = build(tree(tmp_path, [*FILES, "train/stray.jpg"]), "train")
    assert data.labels is None and "1 images lie beside the class folders ('stray.jpg'" in capsys.readouterr().out


def test_scan_names_all_folders(tmp_path):
    paths, folders = scan(tree(tmp_path, FILES))
    assert paths == sorted(FILES) and set(folders) == {"", "train/", "train/a/", "train/b/", "val/", "val/a/", "val/b/"}
    assert archive.Names.of(paths).strings() == paths and all(p.lower().endswith(EXTENSIONS) for p in paths)
