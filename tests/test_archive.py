"""Tar archives equal the folders they were made from; indices are used, and made again when they have to be."""

import concurrent.futures
import io
import json
import os
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from common import archive, tars
from common.datasets import open_dataset, open_labelled, scan_images
from common.images import EXTENSIONS
from tests.helpers import encode, main, photo, refused, write_images

FILES = ["train/b/1.jpg", "train/a/2.jpg", "train/a/9 \u00e4\n.jpg", "val/a/3.jpg", "val/b/4.jpg"]


def jpeg(seed):
    return encode(photo(20, 14, seed))


def tar(path, members):
    """members: {name: bytes}, or pairs of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items() if isinstance(members, dict) else members:
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


@pytest.mark.parametrize("content", [b"", b"garbage" * 200, bytes(10240)])
def test_what_is_not_a_tar(tmp_path, capsys, content):
    (tmp_path / "x.tar").write_bytes(content)
    message = refused(capsys, open_dataset, tmp_path / "x.tar", "train")
    assert "x.tar" in message and ("not an uncompressed tar" in message or "no images" in message)


@pytest.mark.parametrize(
    ("name", "magic", "remedy"),
    [
        ("x.tgz", b"\x1f\x8b\x08", "gunzip -c {0}/x.tgz > {0}/x.tar, then --data {0}/x.tar"),
        ("x.tar.gz", b"\x1f\x8b\x08", "gunzip -c {0}/x.tar.gz > {0}/x.tar"),
        ("x.tar", b"\x1f\x8b\x08", "gunzip -c {0}/x.tar > {0}/x_unpacked.tar"),
        ("my x.tar.bz2", b"BZh9", "bunzip2 -c '{0}/my x.tar.bz2' > '{0}/my x'.tar"),
        ("x.tar.xz", b"\xfd7zXZ\0", "unxz -c"),
        ("x.tar.zst", b"\x28\xb5\x2f\xfd", "unzstd -c"),
        ("x.zip", b"PK\3\4", "unzip -q {0}/x.zip -d {0}/x, then --data {0}/x"),
        ("x.7z", b"7z\xbc\xaf\x27\x1c", "7z x {0}/x.7z -o{0}/x"),
        ("x.rar", b"Rar!\x1a\x07", "unrar x {0}/x.rar {0}/x/"),
    ],
)
def test_compressed_archives_are_refused_with_the_command_that_unpacks(tmp_path, capsys, name, magic, remedy):
    (tmp_path / name).write_bytes(magic + bytes(600))
    for data in (tmp_path / name, tmp_path):  # a folder that holds nothing else
        message = refused(capsys, open_dataset, data, "train")
        assert "is compressed" in message and remedy.format(tmp_path) in message


def test_damaged_archives_are_refused_and_joined_ones_read(tmp_path, capsys):
    """tarfile takes a header that is cut or damaged for the end, and stops where one archive ends in the middle."""
    path = tmp_path / "x.tar"
    whole = tar(path, {f"{name}/1.jpg": jpeg(i) for i, name in enumerate("abc")})
    second = 512 + -(-len(jpeg(0)) // 512) * 512  # where its header begins
    for content in (whole[:100], whole[:700], whole[: second - 1], whole[: second + 100], whole[: second + 600]):
        path.write_bytes(content)
        assert " is cut " in refused(capsys, open_dataset, path, "train")
    path.write_bytes(whole[:second] + b"\xff" * 512 + whole[second + 512 :])
    assert f"cut or damaged at byte {second:,}" in refused(capsys, open_dataset, path, "train")
    path.write_bytes(whole[:second])  # which might be all there is
    assert len(open_dataset(path, "train")) == 1 and "lacks its end mark" in capsys.readouterr().out
    path.write_bytes(whole + tar(tmp_path / "y.tar", {"d/2.jpg": jpeg(5)}))
    data = open_dataset(path, "train")
    assert names(data) == ["a/1.jpg", "b/1.jpg", "c/1.jpg", "d/2.jpg"] and data.read(3) == jpeg(5)


def test_what_an_archive_holds_besides_images_is_counted(tmp_path, capsys):
    path = tmp_path / "x.tar"
    members = [("/abs/1.jpg", jpeg(0)), ("../../up/1.JPG", jpeg(1)), ("./a/1.jpg", jpeg(2)), ("a/1.jpg", jpeg(3))]
    members += [(f"b/{'x' * 200}.jpg", jpeg(4)), ("a/._1.jpg", b"x"), ("__MACOSX/a/1.jpg", b"x"), (".git/1.jpg", b"x")]
    members += [("a/Thumbs.db", b"x"), ("a/notes.txt", b"x"), ("a/README", b"x"), ("a/1.heic", b"x")]
    tar(path, members)
    with tarfile.open(path, "a") as file:
        link, sparse = tarfile.TarInfo("l.jpg"), tarfile.TarInfo("s.jpg")
        link.type, link.linkname, sparse.pax_headers = tarfile.SYMTYPE, "a/1.jpg", {"GNU.sparse.map": "0,1"}
        sparse.pax_headers |= {"GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"}
        file.addfile(link)
        file.addfile(sparse)
    data = open_dataset(path, "train")
    assert names(data) == ["a/1.jpg", "abs/1.jpg", f"b/{'x' * 200}.jpg", "up/1.JPG"]
    assert [data.read(i) for i in range(4)] == [jpeg(3), jpeg(0), jpeg(4), jpeg(1)]  # of one name the last, as unpacked
    said = "10 left out: hidden or of the system 4, .heic 1, .txt 1, link 1, no ending 1, of the same name 1, sparse 1"
    assert said in capsys.readouterr().out
    tar(path, {"a/1.txt": b"x"})
    assert "no images in" in (message := refused(capsys, open_dataset, path, "train")) and ".txt 1" in message


# ----------------------------------------------------------------------------------------------- several archives
def write_shards(root):
    """The same images as a folder and, in archives that know nothing of it, as one that is divided into several."""
    files = [f"{split}/{c}/{i}.jpg" for split in ("train", "val") for i in range(6) for c in "ab"]
    folder = write_images(root / "folder", files, size=(12, 16))
    for split, count in (("train", 3), ("val", 2)):
        for s in range(count):
            part = [f for f in files if f.startswith(split)][s::count]
            content = {f.partition("/")[2]: (folder / f).read_bytes() for f in part}
            tar(root / f"shards/{split}-{s:02}.tar", content)
    return folder, root / "shards"


def test_several_archives_equal_the_folder(tmp_path, monkeypatch):
    folder, shards = write_shards(tmp_path)
    for data in (shards, f"{shards}/train-{{00..02}}.tar", f"{shards}/train-*.tar", f"{shards}/{{train,val}}-*.tar"):
        for split in ("train", "val"):
            same(open_dataset(folder, split), open_dataset(data, split))
    (tmp_path / "list.txt").write_text("b/3.jpg 1\na/0.jpg 0\n")
    listed = open_dataset(f"{shards}/train-*.tar", "train", tmp_path / "list.txt")
    assert [listed.read(i) for i in range(2)] == [(folder / f"train/{n}.jpg").read_bytes() for n in ("b/3", "a/0")]
    for split in ("train", "val"):  # train/ and val/ with archives in them
        (tmp_path / "parts" / split).mkdir(parents=True)
        for i, path in enumerate(sorted(shards.glob(f"{split}-*.tar"))):
            path.rename(tmp_path / "parts" / split / f"{i}.tar")
        same(open_dataset(folder, split), open_dataset(tmp_path / "parts", split))
    monkeypatch.setattr(tars, "_members", lambda *a: pytest.fail("an index was not used"))
    undivided = open_dataset(tmp_path / "parts/train", "train")
    assert len(undivided) == 12 and open_dataset(tmp_path / "parts/train", "val", required=False) is None


@pytest.mark.parametrize("pread", [tars.pread, tars._seek_and_read])
def test_any_number_of_threads_with_few_open_files(tmp_path, monkeypatch, pread):
    for s in range(8):
        tar(tmp_path / f"{s}.tar", {f"{s}{i:02}.jpg": bytes([s, i]) * (50 + i) for i in range(20)})
    data = open_dataset(f"{tmp_path}/{{0..7}}.tar", "train")
    monkeypatch.setattr(tars, "pread", pread)
    data.archives = tars.Archives(data.archives.paths)
    data.archives.most = 3
    order = list(range(160)) * 5
    np.random.default_rng(0).shuffle(order)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(data.read, order))
    assert found == [bytes([row // 20, row % 20]) * (50 + row % 20) for row in order]
    assert len(data.archives.open) <= 3 + 7  # a thread may have asked before another one opened the last


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("train-{00..04}.tar", "2 of 5 archives are missing: {0}/train-03.tar, {0}/train-04.tar"),
        ("x-{8..10}.tar", "3 of 3 archives are missing: {0}/x-8.tar, {0}/x-9.tar, {0}/x-10.tar"),
        ("train-{00-02}.tar", "neither a range like {{000..146}} nor a choice like {{a,b}}"),
        ("train-{0..999999999}.tar", "names 1,000,000,000 archives"),
        ("trian-*.tar", "matches no file"),
        ("{train-00,list}.t*", "list.txt, which is no tar archive"),
    ],
)
def test_missing_archives_are_named(tmp_path, capsys, pattern, reason):
    _, shards = write_shards(tmp_path)
    (shards / "list.txt").write_text("a\n")
    assert reason.format(shards) in refused(capsys, open_dataset, f"{shards}/{pattern}", "train")


def test_archives_beside_images_or_others(tmp_path, capsys):
    write_images(tmp_path / "images", ["a/1.jpg"])
    tar(tmp_path / "images/backup.tar", {"x.jpg": jpeg(0)})
    assert names(open_dataset(tmp_path / "images", "train")) == ["a/1.jpg"]
    for name in ("img_train", "img_val", "img_train_t3"):
        tar(tmp_path / f"set/{name}.tar", {f"a/{name}.jpg": jpeg(0), f"b/{name}.jpg": jpeg(1)})
    (tmp_path / "set/devkit.tar.gz").write_bytes(b"\x1f\x8b\x08")
    for data in (tmp_path / "set", tmp_path / "set/img_train.tar"):
        found = [names(open_dataset(data, split)) for split in ("train", "val")]
        assert found == [["a/img_train.jpg", "b/img_train.jpg"], ["a/img_val.jpg", "b/img_val.jpg"]]
    assert "not used: devkit.tar.gz, img_train_t3.tar" in capsys.readouterr().out
    for c in ("n01440764", "n01443537"):  # ImageNet's training set, unpacked once
        tar(tmp_path / f"classes/{c}.tar", {f"{c}_1.JPEG": jpeg(0)})
    assert open_dataset(tmp_path / "classes", "train").classes == ["n01440764", "n01443537"]


@pytest.mark.parametrize("top", ["", "set/"])
def test_splits_inside_an_archive_in_other_spellings(tmp_path, top):
    tar(tmp_path / "x.tar", {f"{top}{s}/{c}/1.jpg": jpeg(0) for s in ("Training", "Validation", "rest") for c in "ab"})
    for split, folder in (("train", "Training"), ("val", "Validation")):
        data = open_dataset(tmp_path / "x.tar", split)
        assert names(data) == [f"{top}{folder}/{c}/1.jpg" for c in "ab"] and data.classes == ["a", "b"]


# ------------------------------------------------------------------------------------------- labels of WebDataset
def webdataset(path, labels, ending=".cls"):
    tar(path, [m for i, text in enumerate(labels) for m in ((f"{i}{ending}", text.encode()), (f"{i}.jpg", jpeg(i)))])
    return path


@pytest.mark.parametrize(
    ("ending", "train", "val", "classes"),
    [
        (".cls", ["10", "3\n", "3"], ["10"], ["3", "10"]),
        (".cls", ["zebra", "ape", "\ufeffape"], ["zebra"], ["ape", "zebra"]),
        (".json", ['{"label": 10, "x": []}', '{"class": "3"}', '{"cls": 3.0}'], ['{"target": 10}'], ["3", "10"]),
        (".json", ['{"class_name": "zebra"}', '"ape"', '{"label": "ape"}'], ['"zebra"'], ["ape", "zebra"]),
    ],
)
def test_labels_beside_the_images(tmp_path, ending, train, val, classes):
    webdataset(tmp_path / "train-0.tar", train[:2], ending)
    webdataset(tmp_path / "train-1.tar", train[2:], ending)  # its first image is called 0.jpg, too
    webdataset(tmp_path / "val-0.tar", val, ending)
    data, test = open_labelled(tmp_path)
    assert data.classes == test.classes == classes
    found = {(os.path.relpath(data.path(i), tmp_path), int(label)) for i, label in enumerate(data.labels)}
    assert found == {("train-0.tar/0.jpg", 1), ("train-0.tar/1.jpg", 0), ("train-1.tar/0.jpg", 0)}
    assert test.labels.tolist() == [1]  # by the mapping of the training set


def test_the_image_of_a_sample(tmp_path, capsys):
    members = {f"{i}.{e}": jpeg(i) for i in range(2) for e in ("seg.png", "jpg", "JPEG")}
    tar(tmp_path / "x.tar", members | {"0.cls": b"a", "1.cls": b"b", "1.txt": b"x", "2.cls": b"c"})
    data = open_dataset(tmp_path / "x.tar", "train")
    assert names(data) == ["0.jpg", "1.jpg"] and data.classes == ["a", "b"]
    said = "6 left out: .JPEG beside .jpg 2, .seg.png beside .jpg 2, .cls 1, .txt 1"
    assert said in capsys.readouterr().out
    tar(tmp_path / "y.tar", {f"{c}/photo.{i}.jpg": jpeg(i) for c in "ab" for i in range(2)})
    assert len(open_dataset(tmp_path / "y.tar", "train")) == 4, "dots in names, and no labels: each is an image"


@pytest.mark.parametrize("odd", ["", "{}", '{"caption": "x"}', "[1]", "{bad", '{"label": true}', '{"label": [1]}'])
def test_samples_without_a_label(tmp_path, capsys, odd):
    webdataset(tmp_path / "x.tar", ["1", "2", odd], ".json")
    assert open_dataset(tmp_path / "x.tar", "train").labels is None
    assert "1 of 3 samples have no label (2.jpg): none gets one" in capsys.readouterr().out
    webdataset(tmp_path / "y.tar", [odd, odd], ".json")
    assert open_dataset(tmp_path / "y.tar", "train").labels is None
    assert "2 left out: .json 2" in capsys.readouterr().out


def test_index_is_used_and_renewed(tmp_path, monkeypatch):
    path, members = tmp_path / "train.tar", {"a/1.jpg": jpeg(0), "b/2.jpg": jpeg(1)}
    tar(path, members)
    assert len(open_dataset(path, "train")) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_members", lambda *a: pytest.fail("the index was not used"))
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
    for name in ("small.jpg", "small.bmp"):
        Image.new("L", (10, 12), 7).save(folder / "a" / name)
    (folder / "a/broken.jpg").write_bytes(jpeg(0)[:100])
    main("pack", folder, "--out", tmp_path, "--resize", 100)
    output = capsys.readouterr()
    assert "a/broken.jpg" in output.err and "4 images" in output.out and "1 left out" in output.out
    data = open_dataset(tmp_path / "train.tar", "train")
    assert names(data) == ["a/small.bmp.jpg", "a/small.jpg", "a/wide.jpg", "a/wide.png.jpg"]
    assert data.read(1) == (folder / "a/small.jpg").read_bytes()
    assert data[2][0].shape == (3, 100, 200) and data[2][0][0].float().mean() > 250
    (tmp_path / "file").touch()
    assert "--out" in refused(capsys, main, "pack", folder, "--out", tmp_path / "file")


def test_images_beside_class_folders_are_mentioned(tmp_path, capsys):
    data = open_dataset(write_images(tmp_path, [*FILES, "train/stray.jpg"]), "train")
    assert data.labels is None and "1 images lie beside the class folders ('stray.jpg'" in capsys.readouterr().out


def test_scan_names_all_folders(tmp_path):
    paths, folders, left = scan_images(write_images(tmp_path, FILES))
    assert paths == sorted(FILES) and not left
    assert folders == {"": 0, "train/": 0, "train/a/": 2, "train/b/": 1, "val/": 0, "val/a/": 1, "val/b/": 1}
    assert archive.Names.of(paths).strings() == paths and all(p.lower().endswith(EXTENSIONS) for p in paths)
