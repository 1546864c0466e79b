"""common/lists.py: lists as people and programs write them, and one line where a list is wrong."""

import codecs
import json
import unicodedata

import pytest
from PIL import Image

from common.datasets import open_dataset
from common.folders import note
from common.lists import in_folder, in_names, read_list
from tests.helpers import refused

PLAIN = "a/1.jpg 1\na/2.jpg 1\nb/3.jpg 2\n"
FILES = ["a/1.jpg", "a/2.jpg", "b/3.jpg"]
NFC, NFD = (unicodedata.normalize(form, "\u00e9/caf\u00e9.jpg") for form in ("NFC", "NFD"))


def lines(text, change):
    return "".join(f"{change(line)}\n" for line in text.splitlines())


def read(root, files, content, name="list.txt", split="train"):
    """What `read_list` returns, labels as a list. content: text or bytes; ROOT stands for the folder."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"x")
    content = content if isinstance(content, bytes) else content.replace("ROOT", str(root)).encode("utf-8")
    (root / name).write_bytes(content)
    paths, labels, classes = read_list(name, split, in_folder(root), root)
    return paths, None if labels is None else labels.tolist(), classes


SAME = {  # all say the same as PLAIN
    "utf-8 with a mark": codecs.BOM_UTF8 + PLAIN.encode(),
    "utf-16 of Windows": codecs.BOM_UTF16_LE + PLAIN.encode("utf-16-le"),
    "utf-16 of others": codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
    "utf-16 without a mark": PLAIN.encode("utf-16-le"),
    "utf-32": codecs.BOM_UTF32_LE + PLAIN.encode("utf-32-le"),
    "marks where files were joined": b"\n".join(codecs.BOM_UTF8 + line for line in PLAIN.encode().splitlines()),
    "ends of Windows": PLAIN.replace("\n", "\r\n") + "\x1a",
    "ends of old Macs": PLAIN.replace("\n", "\r"),
    "spaces at the end": lines(PLAIN, lambda line: f"  {line} \t"),
    "tabs": PLAIN.replace(" ", "\t"),
    "commas": PLAIN.replace(" ", ","),
    "semicolons": PLAIN.replace(" ", "; "),
    "spaces that do not break": PLAIN.replace(" ", "\u00a0"),
    "backslashes": PLAIN.replace("/", "\\"),
    "relative to here": lines(PLAIN, lambda line: f"./{line}"),
    "relative to here on Windows": lines(PLAIN, lambda line: ".\\" + line.replace("/", "\\")),
    "slashes twice": PLAIN.replace("/", "//"),
    "absolute": lines(PLAIN, lambda line: f"ROOT/{line}"),
    "from the folder on": lines(PLAIN, lambda line: f"set/{line}"),
    "quotes": lines(PLAIN, lambda line: '"{}" "{}"'.format(*line.split())),
    "floats of a table": lines(PLAIN, lambda line: f"{line}.0"),
    "header with commas": "image,label\n" + PLAIN.replace(" ", ","),
    "header with semicolons": "Filename;Class\r\n" + PLAIN.replace(" ", ";"),
    "header with tabs": "file_path\ttarget\n" + PLAIN.replace(" ", "\t"),
    "header with spaces": "path label\n" + PLAIN,
    "header of unknown words": "foo,bar\n" + PLAIN.replace(" ", ","),
    "header after Excel's line and a comment": "sep=;\n# mine\nimage;label\n" + PLAIN.replace(" ", ";"),
    "label first": "label,image\n" + lines(PLAIN, lambda line: ",".join(line.split()[::-1])),
    "more columns": "no,imagePath,width,Label\n" + lines(PLAIN, lambda line: "7,{},640,{}".format(*line.split())),
    "names without ending": "image_id,breed\n" + PLAIN.replace(" ", ",").replace(".jpg", ""),
    "records": json.dumps(
        [dict(zip(("file_name", "label"), line.split(), strict=True)) for line in PLAIN.splitlines()]
    ),
    "mapping": json.dumps(dict(line.split() for line in PLAIN.splitlines())),
    "lines of JSON": lines(PLAIN, lambda line: json.dumps({"image": line.split()[0], "class": int(line.split()[1])})),
}


@pytest.mark.parametrize("way", SAME)
def test_ways_to_write_a_list(tmp_path, way):
    name = "list.json" if "JSON" in way or way in ("records", "mapping") else "list.csv"
    assert read(tmp_path / "set", FILES, SAME[way], name) == (FILES, [0, 0, 1], ["1", "2"])


FOUND = {  # files, list, expected
    "one normal form": ([NFD], f"{NFC} 0\n", ([NFD], [0], ["0"])),
    "the other": ([NFC], f"{NFD} 0\n", ([NFC], [0], ["0"])),
    "both": ([NFC, NFD], f"{NFC} 0\n{NFD} 1\n", ([NFC, NFD], [0, 1], ["0", "1"])),
    "code page of Windows": (["gr\u00fcn.jpg"], "gr\u00fcn.jpg 0\n".encode("cp1252"), (["gr\u00fcn.jpg"], [0], ["0"])),
    "digit at the end": (["photo 1.jpg", "a 2"], "photo 1.jpg\na 2\n", (["photo 1.jpg", "a 2"], None, None)),
    "digit and label": (["a 2", "a", "b 7"], "a 2 0\na 1\nb 7 3\n", (["a 2", "a", "b 7"], [0, 1, 2], ["0", "1", "3"])),
    "label or digit": (["a 2", "a", "b"], "a 2\nb 3\n", (["a", "b"], [0, 1], ["2", "3"])),
    "number sign": (["#1 x.jpg", "2.jpg"], "#1 x.jpg 4\n2.jpg 2\n", (["#1 x.jpg", "2.jpg"], [1, 0], ["2", "4"])),
    "names": (
        ["1.jpg", "2.jpg"],
        "1.jpg golden retriever\n2.jpg cat\n",
        (["1.jpg", "2.jpg"], [1, 0], ["cat", "golden retriever"]),
    ),
    "comma in a name": (["a, b.jpg"], 'image,label\n"a, b.jpg","x, ""y"""\n', (["a, b.jpg"], [0], ['x, "y"'])),
    "control signs": (
        ["a\x0bb.jpg", "\u2028.jpg"],
        "a\x0bb.jpg\n\u2028.jpg\n",
        (["a\x0bb.jpg", "\u2028.jpg"], None, None),
    ),
    "one column": (["1.jpg"], "filename\n1.jpg\n", (["1.jpg"], None, None)),
    "below train/": (
        ["train/x/1.jpg", "train/2.jpg"],
        "x/1.jpg 0\n2 1\n",
        (["train/x/1.jpg", "train/2.jpg"], [0, 1], ["0", "1"]),
    ),
    "leading zeros": (["1.jpg", "2.jpg"], "1.jpg 007\n2.jpg 7\n", (["1.jpg", "2.jpg"], [0, 0], ["7"])),
    "-1 for none": (["1.jpg", "2.jpg"], "1.jpg -1\n2.jpg -1\n", (["1.jpg", "2.jpg"], None, None)),
}


@pytest.mark.parametrize("case", FOUND)
def test_names_and_labels(tmp_path, case):
    assert read(tmp_path, *FOUND[case][:2]) == FOUND[case][2]


NOTES = {
    "2 left out that begin with # (line 1: '# image label')": "# image label\n1.jpg 0\n#x.jpg 1\n2.jpg 1\n",
    "lines that repeat an image: 2; images with different labels: 1 (1.jpg)": "1.jpg 0\n1.jpg 1\n2.jpg 1\n2.jpg 1\n",
    "the label -1 is a class like the others": "1.jpg -1\n2.jpg 1\n",
    "all labels are -1: taken as none": "1.jpg -1\n2.jpg -1\n",
    "images from the column 'filename', no labels: no column is called label or class": "filename,w,h\n1.jpg,3,4\n",
    "1 of 2 rows, those whose split is train": "image,label,split\n1.jpg,0,train\n2.jpg,1,test\n",
}


@pytest.mark.parametrize("line", NOTES)
def test_what_is_said_of_a_list(tmp_path, capsys, line):
    note.cache_clear()  # it is printed once in a process
    read(tmp_path, ["1.jpg", "2.jpg"], NOTES[line])
    assert f"note: --train-list list.txt: {line}\n" in capsys.readouterr().out


def test_rows_of_the_other_split(tmp_path):
    table = "image,label,split\n1.jpg,0,train\n2.jpg,1,test\n"
    assert read(tmp_path, ["1.jpg", "2.jpg"], table)[0] == ["1.jpg"]
    assert read(tmp_path, ["1.jpg", "2.jpg"], table, split="val")[0] == ["2.jpg"]


WRONG = {
    "1.jpg 1\n2.jpg cat\n": "line 2: the label 'cat' is a name, unlike the first one",
    "1.jpg cat\n\n2.jpg 1\n": "line 3: the label '1' is a number, unlike the first one",
    "1.jpg 0 1 0\n": "line 1: '0 1 0' is not a label",
    "1.jpg 0.5\n": "line 1: '0.5' is not a label",
    "1.jpg,0,x\n": "line 1: several columns ('0,x' behind the path)",
    "image,label\n1.jpg,0\n2.jpg\n": "line 3: 1 columns, unlike the 2 of the header",
    "image,label\n1.jpg,0\n2.jpg,\n": "line 3: no label, unlike the first one: '2.jpg'",
    "image,label\n": "names no image",
    'image,title,label\n1.jpg,"Sunset,0\n2.jpg,Dawn,1\n': "begins with a quotation mark does not end with one",
    'image,title,label\n1.jpg,"Sunset,0\n2.jpg,5" wide,1\n': "begins with a quotation mark does not end with one",
    "1.JPG 0\n3.jpg 1\n": "line 1: '1.JPG' is not in",
    "1.jpg 0\n2.jpeg 1\n9.png 1\n": "(did you mean 2.jpg?), nor are 1 more",
    "C:\\x\\1.jpg 0\n": "leads out of the data folder",
    "folder 0\n": "line 1: 'folder' is a folder",
    "1.jpg,2.jpg\n": "line 1: '1.jpg,2.jpg' is not in",
    "": "names no image",
    "\ufeff": "names no image",
    "PK\x03\x04\0": "is not a text file",
}


@pytest.mark.parametrize("content", WRONG)
def test_wrong_lists(tmp_path, capsys, content):
    assert WRONG[content] in refused(capsys, read, tmp_path, ["1.jpg", "2.jpg", "folder/1.jpg"], content)


def test_where_a_list_is_looked_for(tmp_path, capsys, monkeypatch):
    (tmp_path / "data/folder").mkdir(parents=True)
    (tmp_path / "data/train.txt").write_text("1.jpg")
    monkeypatch.chdir(tmp_path)
    assert read(tmp_path / "data", ["1.jpg", "2.jpg"], "1.jpg")[0] == ["1.jpg"]
    (tmp_path / "list.txt").write_text("2.jpg")
    assert read(tmp_path / "data", ["1.jpg"], "1.jpg")[0] == ["2.jpg"]
    assert "the file in the working directory is used, not that in" in capsys.readouterr().out
    for name, expected in {
        "trian.txt": "does not exist, here or in data (did you mean train.txt?)",
        "folder": "is a folder: expected a list file",
        "": "--train-list is empty",
    }.items():
        assert expected in refused(capsys, read_list, name, "train", in_folder("data"), "data")


def test_quotation_marks_of_tables(tmp_path):
    """Between tabs one that is not closed is a letter, which swallows no row; CSV's own may hold its comma."""
    files = ["1.jpg", "2.jpg"]
    table = 'image\ttitle\tlabel\n1.jpg\t"Sunset\t0\n2.jpg\tDawn\t1\n'
    assert read(tmp_path, files, table)[:2] == (files, [0, 1])
    assert read(tmp_path, files, 'image,title,label\n"1.jpg","a, b",0\n2.jpg,c,1\n')[:2] == (files, [0, 1])


def test_names_of_categories(tmp_path, capsys):
    """COCO's files name their categories; an image with objects of several has no label."""
    content = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)]}
    content["categories"] = [{"id": 18, "name": "dog"}, {"id": 90, "name": "ant"}, {"id": 7, "name": "cow"}]
    content["annotations"] = [{"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 90}]
    expected = ["1.jpg", "2.jpg"], [1, 0], ["ant", "dog"]
    assert read(tmp_path, ["1.jpg", "2.jpg"], "\ufeff" + json.dumps(content), "list.json") == expected
    content["annotations"].append({"image_id": 2, "category_id": 7})
    assert read(tmp_path, [], json.dumps(content), "list.json") == (["1.jpg", "2.jpg"], None, None)
    assert "annotations of several categories: no labels are used" in capsys.readouterr().out


def test_lists_of_an_archive(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    (tmp_path / "list.txt").write_text(f"{NFC},1\r\nb.jpg,0\r\n", encoding="utf-16")
    paths, labels, _ = read_list("list.txt", "val", in_names([NFD, "b.jpg"]), tmp_path / "x.tar")
    assert paths == [NFD, "b.jpg"] and labels.tolist() == [1, 0]


def test_folders_of_splits_mean_nothing_beside_a_list(tmp_path, capsys):
    """A list may name images of several data sets, each with its own train/."""
    names = ["first/train/a.png", "second/train/b.png", "second/val/c.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text("\n".join(names))
    found = open_dataset(tmp_path, "train", tmp_path / "list.txt")
    assert [found.names[i].decode() for i in range(3)] == names and capsys.readouterr().out == ""
