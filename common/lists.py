"""List files: which images are used, and their labels.

A list is text (`relative/path[ label]` per line), a table with a header (comma, semicolon or tab), or JSON: files like
those of iNaturalist and COCO, or records with the columns of a table. A path is what names a file in --data; labels are
all whole numbers or all names.
"""

import codecs
import collections
import csv
import functools
import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np

from common.args import fail
from common.folders import WORDS, nearest_name, note, split_of
from common.images import EXTENSIONS

PATHS = "path file_path filepath image_path img_path file_name filename file image_name img_name image images img"
PATHS = (*PATHS.split(), "image_id", "img_id", "imageid", "photo", "picture", "name", "id")  # columns, the best first
LABELS = "label labels class class_name classname category category_name target targets class_id category_id y"
SPLITS = ("split", "set", "subset", "partition", "usage")
MARKS = (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")
MARKS = (*MARKS, (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


# ------------------------------------------------------------------------------------------------ names of files
def composed(text):
    """The Unicode normal form in which the names of macOS and of other systems agree."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _by_name(names):
    """{name: name}, also under the normal form of a name, unless that is the name of another."""
    own = {name: name for name in names}
    return {composed(name): name for name in names if not name.isascii()} | own


def in_folder(root):
    """find(path) -> path relative to root as the disk has it, or None. Lists each folder once, which is faster than
    asking for each of a million files."""

    @functools.cache
    def names(folder):
        try:
            return _by_name(os.listdir(os.path.join(root, folder)))
        except (OSError, ValueError):  # no such folder, or no name of one
            return {}

    def find(path):
        folder, slash, name = path.rpartition("/")
        above = known(folder) if folder else "" if not slash else None
        if above is None:
            return None
        name = names(above).get(name) or names(above).get(composed(name))
        return name and (f"{above}/{name}" if above else name)

    known = functools.cache(find)
    return find


def in_names(paths):
    """The same for the paths of an archive."""
    names = _by_name(paths)
    return lambda path: names.get(path) or names.get(composed(path))


def _locator(find, root, split):
    """locate(path) -> what `find` finds under the path in one of the ways in which other programs write it, and in the
    folder of the split."""
    root = Path(root)
    absolute, here = os.path.abspath(root), os.path.join(os.getcwd(), "")
    around = {absolute, os.path.realpath(root), str(root), absolute.removeprefix(here), root.resolve().name}
    around = [f"{path}/".replace("\\", "/").replace("//", "/") for path in around if path not in ("", ".")]
    words = [*WORDS[split], *(WORDS["test"] if split == "val" else ())]
    below = [f"{there}/" for word in words for name in (word, word.title()) if (there := find(name))]

    def locate(path):
        path = path.strip().strip("\"'").strip()
        if not path.isascii() and any("\udc80" <= c <= "\udcff" for c in path):  # no UTF-8: of Windows, in the West
            path = os.fsencode(path).decode("cp1252", errors="replace")
        for way in dict.fromkeys((path, path.replace("\\", "/"))):
            way = re.sub(r"(?<=/)(\./|/)+|^(\./+)+", "", way) if "./" in way or "//" in way else way
            for inside in (way, *(way[len(a) :] for a in around if way.startswith(a)), *(b + way for b in below)):
                if found := find(inside):
                    return found
        return None

    return locate


def _completed(locate):
    """The same for names without their ending."""
    endings = [ending for e in EXTENSIONS for ending in (e, e.upper())]

    def complete(path):
        bare = not path.lower().endswith(EXTENSIONS)
        return next((found for e in endings if (found := locate(path.strip() + e))), None) if bare and path else None

    return complete


# ---------------------------------------------------------------------------------------------------------- text
def read_text(path, flag):
    """The text of a file in UTF-8, or in any encoding that a byte order mark tells."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        fail(f"{flag} cannot be read: {error.strerror}")
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))
    if not mark and b"\0" in data:
        zeros = [data[start::2].count(0) > len(data) / 4 for start in (1, 0)]
        if not any(zeros):
            fail(f"{flag} is not a text file")
        encoding = "utf-16-le" if zeros[0] else "utf-16-be"
    errors = "surrogateescape" if encoding == "utf-8" else "replace"
    text = data[len(mark) :].decode(encoding, errors)
    return text.replace("\ufeff", "").rstrip(
        "\x1a"
    )  # marks also stand where files were joined, the other ends DOS files


def split_lines(text):
    """The lines of a text, with the ends of any system, and no others, which names may contain."""
    return re.split(r"\r\n?|\n", text)


def _parse(line, ways, labelled=False):
    """(file, label or None) of a line: the longest beginning, up to a separator, that names a file, is the path. None
    without one. labelled: the whole line is none."""
    text = line.strip()
    if not labelled and (found := ways[0](text)):
        return found, None
    path, _, label = text.replace("\t", " ").rpartition(" ")
    if label.isalnum() and (found := ways[0](path.rstrip())):  # what most lists have
        return found, label
    ends = [(m.start(), m.end()) for m in re.finditer(r"[\s,;]+", text)][::-1]
    for way in ways:
        if not labelled and (found := way(line) or way(text)):
            return found, None
        for end, start in ends:
            label = text[start:]
            if label and not label.lower().endswith(EXTENSIONS) and (found := way(text[:end])):
                return found, label
    return None


def _lines(text, ways, flag):
    """[(number, line)] of a text without empty lines and comments, which begin with # and name no file."""
    lines = [(i, line) for i, line in enumerate(split_lines(text), 1) if line.strip()]
    lines = lines[1:] if lines and re.fullmatch("sep=.", lines[0][1].strip(), re.IGNORECASE) else lines  # Excel's
    comments = {i: line for i, line in lines if "#" in line and line.lstrip()[0] == "#" and not _parse(line, ways)}
    if comments:
        first = next(iter(comments))
        note(f"{flag}: {len(comments):,} left out that begin with # (line {first}: {comments[first].strip()[:40]!r})")
    return [(i, line) for i, line in lines if i not in comments]


def _text_rows(lines, ways, flag):
    """(line, path, file or None, label or None) of each image in the lines [(number, line)] of a text file."""
    rows = []
    for number, line in lines:
        if found := _parse(line, ways):
            rows.append((number, line, *found))
        else:
            path, _, label = line.strip().rpartition(" ")
            labelled = path and _whole(label) is not None
            rows.append((number, path.rstrip() if labelled else line.strip(), None, label if labelled else None))
    if any(label is not None for *_, label in rows):  # then "a 2" is not the file "a 2"
        again = {i: _parse(row[1], ways, labelled=True) for i, row in enumerate(rows) if row[2] and row[3] is None}
        if all(again.values()):
            rows = [(*row[:2], *again[i]) if i in again else row for i, row in enumerate(rows)]
    plain = {}
    for number, *_, label in rows:
        if label is not None and label not in plain:
            plain[label] = label.strip("\"'")
            if plain[label] == label and re.search("[,;\t]", label):
                fail(f"{flag}, line {number}: several columns ({label!r} behind the path): name them in a first line")
    return [(*row[:3], plain.get(row[3])) for row in rows]


# --------------------------------------------------------------------------------------------------------- tables
def _cells(lines, sign, flag):
    """Rows of cells. Quotation marks are CSV's; where they are not, in a file with tabs they are letters."""
    how = {"delimiter": sign, "skipinitialspace": True}
    try:
        return list(csv.reader(lines, **how, strict=True))
    except csv.Error as error:  # read loosely, one that is not closed would swallow the rows below it
        if sign == "\t":
            return list(csv.reader(lines, **how, quoting=csv.QUOTE_NONE))
        fail(f"{flag}: a cell that begins with a quotation mark does not end with one ({error})")


def _delimiter(lines, ways):
    """What separates the columns of a table, if the first of the lines is a header; None for other files."""
    if _parse(lines[0][1], ways):
        return None
    for sign in ("\t", ";", ",", " "):
        first, *rest = csv.reader([line.strip() if sign == " " else line for _, line in lines[:2]], delimiter=sign)
        known = [_column(cell) in (*PATHS, *LABELS.split()) for cell in first]
        like = [cell.strip().lower().endswith(EXTENSIONS) or "/" in cell for cell in first]
        if any(like) or (sign == " " and not all(known)) or (len(first) == 1 and not all(known)):
            continue
        found = rest and any(way(cell) for way in ways for cell in rest[0])
        if (any(known) or found) and (len(first) > 1 or sign == ","):
            return sign
    return None


def _column(name):
    """The name of a column in the spelling of PATHS."""
    return re.sub("[^a-z0-9]+", "_", re.sub("(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()).strip("_")


def _table_rows(columns, records, ways, split, flag):
    """The same of records [(number, cells)] with named columns."""
    names, width = [_column(name) for name in columns], len(columns)
    for number, cells in records:
        if len(cells) != width:
            fail(f"{flag}, line {number}: {len(cells)} columns, unlike the {width} of the header")
    if not records:
        return []
    part = next((i for i, name in enumerate(names) if name in SPLITS), None)
    if part is not None and all(split_of(cells[part]) for _, cells in records):
        kinds = {split_of(cells[part]) for _, cells in records}
        wanted = split if split in kinds or split == "train" else "test"
        kept = [row for row in records if split_of(row[1][part]) == wanted]
        if len(kept) < len(records):
            note(
                f"{flag}: {len(kept):,} of {len(records):,} rows, those whose {columns[part]} is {kept[0][1][part]}"
                if kept
                else f"{flag}: no row whose {columns[part]} is {split}"
            )
        records = kept
        if not records:
            return []
    order = sorted(range(width), key=lambda i: PATHS.index(names[i]) if names[i] in PATHS else len(PATHS))
    first = records[0][1]
    path = next((i for way in ways for i in order if first[i] and way(first[i])), order[0])
    rest = [i for i in range(width) if i not in (path, part) and names[i]]
    labels = [i for i in rest if names[i] in LABELS.split()] or (rest if len(rest) == 1 else [])
    label = labels[0] if labels else None
    if width > 2 or (label is None and rest):
        text = f"labels from {columns[label]!r}" if labels else "no labels: no column is called label or class"
        note(f"{flag}: images from the column {columns[path]!r}, {text}")

    def file(cell):
        return next((found for way in ways if (found := way(cell))), None)

    return [(n, c[path], file(c[path]), c[label].strip() or None if labels else None) for n, c in records]


# ----------------------------------------------------------------------------------------------------------- JSON
def _json_rows(text, ways, split, flag):
    """The same of a JSON file: images[id, file_name], annotations[image_id, category_id] (none: no labels), categories
    [id, name] (none: numbers); or records with the columns of a table."""
    try:
        try:
            content = json.loads(text)
        except ValueError:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
            if len(content) < 2:
                raise
        if isinstance(content, list) and content and all(isinstance(record, dict) for record in content):
            columns = list(dict.fromkeys(name for record in content for name in record))
            cells = [["" if r.get(name) is None else str(r[name]) for name in columns] for r in content]
            return _table_rows(columns, list(enumerate(cells, 1)), ways, split, flag)
        if content and all(isinstance(value, (str, int)) for value in content.values()):  # {path: label}
            content = {"images": [{"id": i, "file_name": i} for i in content], "labels": content}
        names = {c["id"]: str(c["name"]) for c in content.get("categories", ())}
        names = names if len(set(names.values())) == len(names) else {}
        labels, many = {path: str(label) for path, label in content.get("labels", {}).items()}, 0
        for a in content.get("annotations", ()):
            if int(a["category_id"]) >= 0:
                label = names.get(a["category_id"], str(int(a["category_id"])))
                many += labels.setdefault(str(a["image_id"]), label) != label
        if many:
            note(f"{flag}: images with annotations of several categories: no labels are used")
            labels = {}
        rows = [(image["id"], str(image["file_name"]), labels.get(str(image["id"]))) for image in content["images"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        fail(f"{flag} has no images[id, file_name] and annotations[image_id, category_id]: {reason}")
    return [(i, path, next((f for way in ways if (f := way(path))), None), label) for i, path, label in rows]


# ---------------------------------------------------------------------------------------------------------- lists
def find_list(image_list, split, root):
    """The path of a list file, which is looked for in the working directory, then in --data."""
    flag, folder = f"--{split}-list {image_list}", Path(root) if Path(root).is_dir() else Path(root).parent
    if not str(image_list).strip():
        fail(f"--{split}-list is empty")
    places = [Path(os.path.expanduser(image_list)), folder / image_list]
    there = [path for path in places if path.exists()]
    if not there:
        names = [name for path in places if path.parent.is_dir() for name in os.listdir(path.parent)]
        near = nearest_name(places[0].name, names[:10_000])
        fail(f"{flag} does not exist, here or in {folder}{near}")
    if there[0].is_dir():
        fail(f"{flag} is a folder: expected a list file (a folder of images is for --data)")
    if len(there) > 1 and not there[0].samefile(there[1]):
        note(f"{flag}: the file in the working directory is used, not that in {folder}")
    return there[0]


def read_list(image_list, split, find, root):
    """(paths, labels (N,) from 0 on or None, class names or None) of a list file. find: of `in_folder` or `in_names`.
    root: the folder or archive. Wrong content ends the program with one line."""
    path, flag = find_list(image_list, split, root), f"--{split}-list {image_list}"
    locate = _locator(find, root, split)
    ways, unit = (find, locate, _completed(locate)), "line"
    text = read_text(path, flag)
    if path.suffix.lower() in (".json", ".jsonl") or text.lstrip()[:1] == "{":
        unit, rows = "image", _json_rows(text, ways, split, flag)
    else:
        lines = _lines(text, ways, flag)
        if lines and (sign := _delimiter(lines, ways)):
            table = _cells([line for _, line in lines], sign, flag)
            (_, columns), *records = zip([i for i, _ in lines], table, strict=False)
            rows = _table_rows(columns, records, ways, split, flag)
        else:
            rows = _text_rows(lines, ways, flag)
    rows = rows or fail(f"{flag} names no image")
    missing = [row for row in rows if row[2] is None]
    for number, name, *_ in missing[:1]:
        if re.match(r"[/\\]|\w:[/\\]", name) or ".." in re.split(r"[/\\]", name):
            fail(f"{flag}, {unit} {number}: {name!r} leads out of the data folder: paths are relative to --data")
        how = " (expected: relative/path, a space and a label)" if unit == "line" else ""
        more = f", nor are {len(missing) - 1:,} more" if len(missing) > 1 else ""
        near = _near(name.replace("\\", "/"), root)
        fail(f"{flag}, {unit} {number}: {name[:200]!r} is not in {root}{near}{more}{how}")
    labels, classes = _numbered(rows, flag, unit)
    files = [file for _, _, file, _ in rows]
    for (number, *_), file in zip(rows, files, strict=True):
        if not file.lower().endswith(EXTENSIONS) and os.path.isdir(os.path.join(root, file)):
            fail(f"{flag}, {unit} {number}: {file!r} is a folder: expected images")
    if len(set(files)) < len(files):
        _say_repeated(files, labels, flag)
    return files, labels, classes


def _near(name, root):
    """ " (did you mean ...?)", where the folder of a missing file holds one of a similar name."""
    folder, base = os.path.split(os.path.join(root, name))
    return nearest_name(base, os.listdir(folder)[:10_000]) if os.path.isdir(folder) else ""


def _whole(text):
    """The whole number that a text is, or None."""
    found = re.fullmatch(r"([+-]?\d{1,1000})(\.0*)?", text, re.ASCII)
    return int(found[1]) if found else None


def _numbered(rows, flag, unit):
    """(labels (N,) from 0 on, class names) of rows, (None, None) if there are none. Numbers and names are sorted."""
    labels, first = [label for *_, label in rows], rows[0][3]
    values, number = {label: label and _whole(label) for label in dict.fromkeys(labels)}, first and _whole(first)
    for label, value in values.items():
        wrong = None
        if (label is None) != (first is None):
            wrong = f"{'no' if label is None else 'a'} label, unlike the first one: {rows[labels.index(label)][1]!r}"
        elif (value is None) != (number is None):
            wrong = f"the label {label!r} is a {'name' if value is None else 'number'}, unlike the first one"
        elif label and value is None and re.fullmatch(r"[-+.\d\s,;e]*\d[-+.\d\s,;e]*", label):
            wrong = f"{label[:60]!r} is not a label: expected one whole number or the name of a class"
        if wrong:
            fail(f"{flag}, {unit} {rows[labels.index(label)][0]}: {wrong}")
    if first is None:
        return None, None
    values = {label: label if value is None else value for label, value in values.items()}
    order = {value: i for i, value in enumerate(sorted(set(values.values())))}
    if [*order] == [-1]:
        note(f"{flag}: all labels are -1: taken as none")
        return None, None
    if number is not None and min(order) < 0:
        note(f"{flag}: the label {min(order)} is a class like the others")
    places = {label: order[value] for label, value in values.items()}
    return np.array([places[label] for label in labels], np.int64), list(map(str, order))


def _say_repeated(files, labels, flag):
    """A line about images that a list names more than once."""
    known = collections.defaultdict(set)
    for i, file in enumerate(files):
        known[file].add(None if labels is None else int(labels[i]))
    odd = [file for file, found in known.items() if len(found) > 1]
    text = f"; images with different labels: {len(odd):,} ({odd[0]})" if odd else ""
    note(f"{flag}: lines that repeat an image: {len(files) - len(known):,}{text}")
