"""Classes beside each other: their names, the accuracy of each, and which of them are taken for which."""

import csv

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.datasets import folder_classes, only_numbers
from common.distributed import is_main
from common.files import atomic, make_folder, result_folder
from common.pictures import shorten

FEW = 20  # classes whose numbers are printed, and stand in the cells of the picture
MOST = 100  # classes in the picture; of more, only FEW that are confused most often
BLUE, RED = np.array([31, 102, 180]), np.array([205, 32, 32])


def class_names(dataset):
    """{label: text}, None without labels. Classes that have only numbers, as those of a list file, are called after the
    folders of their images, if that is one folder for each."""
    if dataset.labels is None:
        return None
    if (not dataset.classes or only_numbers(dataset.classes)) and (names := folder_classes(dataset)):
        return names
    return {int(c): dataset.classes[c] if dataset.classes else f"class {c}" for c in np.unique(dataset.labels)}


def confusions(targets, predictions):
    """[(count, true, predicted)] of all pairs of different classes that occur, the most frequent first; of equally
    frequent ones, those of the smaller classes. A prediction of -1 is none."""
    wrong = (targets != predictions) & (predictions >= 0)
    pairs, counts = np.unique(np.stack([targets, predictions], 1)[wrong], axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], np.bincount(targets)[pairs[:, 0]], -counts))
    return [(int(counts[i]), *map(int, pairs[i])) for i in order]


def by_class(args, name, what, targets, predictions, test, train):
    """What an evaluation says of single classes: `per_class_<name>.csv` and `confusion_<name>.png` in its folder, and
    the ten pairs most often confused in words. From the main process.

    targets, predictions: (M,) integers of all test images, a prediction of -1 is none. what: whose predictions, in
    words. test, train: the data sets, for the names of the classes. Returns {"per_class": {name: accuracy in percent}}
    for at most FEW classes, else {}.
    """
    if not is_main():
        return {}
    targets, predictions = (np.asarray(values, dtype=np.int64) for values in (targets, predictions))
    classes, images = np.unique(targets, return_counts=True)
    names, found = class_names(test), confusions(targets, predictions)
    if (not test.classes or only_numbers(test.classes)) and not folder_classes(test):
        names = class_names(train)  # test images often lie in one folder
    names = {
        int(c): names.get(int(c), f"class {c}") for c in {*classes.tolist(), *predictions[predictions >= 0].tolist()}
    }
    right = np.bincount(targets[targets == predictions], minlength=classes[-1] + 1)[classes]
    accuracy, taken = dict(zip(classes.tolist(), 100 * right / images, strict=True)), {}
    for count, true, other in found:
        taken.setdefault(true, (names[other], count))
    out, size = make_folder(result_folder(args.pretrained, args.out)), dict(zip(classes.tolist(), images, strict=True))
    table, picture = out / f"per_class_{name}.csv", out / f"confusion_{name}.png"
    with atomic(table, shared=True) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "class", "images", "right", "accuracy", "most often taken for", "times"])
        for c, n in zip(classes.tolist(), right.tolist(), strict=True):
            writer.writerow([c, names[c], size[c], n, round(accuracy[c], 3), *taken.get(c, ("", 0))])
    ranked, some = sorted(accuracy, key=accuracy.get), max(1, min(3, len(classes) // 2))
    worst, best = (
        ", ".join(f"{names[c]} {accuracy[c]:.1f}" for c in part) for part in (ranked[:some], ranked[::-1][:some])
    )
    mean = f"mean of {len(classes)} classes {np.mean([*accuracy.values()]):.2f}"
    print(f"classes     {what}: {mean}; worst {worst}; best {best}")
    for count, true, other in found[:10]:
        print(f"confused    {names[true]} taken for {names[other]}: {count} of {size[true]}")
    if not found:
        print("confused    no test image is taken for another class")
    draw_confusion(picture, targets, predictions, names, found, what)
    print(f"classes     all in {table}, {picture}")
    few = len(classes) <= FEW
    return {"per_class": {names[c]: round(float(value), 3) for c, value in accuracy.items()}} if few else {}


# ----------------------------------------------------------------------------------------------------- picture
def confusion_table(targets, predictions, names, found):
    """Which classes the picture shows, as labels (n,), and how often each is taken for each: (n, n + 1), last of all
    what is taken for none of them."""
    shown = sorted(names)
    if len(shown) > MOST:
        shown = [*dict.fromkeys(c for _, *pair in found for c in pair), *shown]
        shown = sorted([*dict.fromkeys(shown)][:FEW])
    shown = np.array(shown)
    rows, columns = (np.searchsorted(shown, values).clip(max=len(shown) - 1) for values in (targets, predictions))
    columns[shown[columns] != predictions] = len(shown)
    kept = shown[rows] == targets
    width = len(shown) + 1
    return shown, np.bincount((rows * width + columns)[kept], minlength=len(shown) * width).reshape(-1, width)


def draw_confusion(path, targets, predictions, names, found, what):
    """PNG: a row for each true class, a column for each that is predicted, blue where it is right and red where it is
    wrong, the darker the larger the share of the row; numbers in the cells of at most FEW classes."""
    shown, table = confusion_table(targets, predictions, names, found)
    n, total = len(shown), table.sum(1)
    other = bool(table[:, -1].any())
    table = table[:, : n + other]
    numbers, font = n <= FEW, ImageFont.load_default(15)
    cell = max(36, round(font.getlength(f"{table.max():,}")) + 12) if numbers else max(12, min(36, 1000 // n))
    label, big = ImageFont.load_default(min(15, cell)), ImageFont.load_default(22)
    rows = [shorten(names[c], label, 200) for c in shown.tolist()]
    columns = [*rows, "all others" if n < len(names) else "none"][: n + other]
    left = 24 + round(max(map(label.getlength, rows))) + 10
    turned = max(map(label.getlength, columns)) > cell - 4
    top = 100 + (round(max(map(label.getlength, columns))) if turned else 16)
    title = f"Confusion of {n} classes, {what}" if n == len(names) else f"{n} of {len(names)} classes, {what}"
    lines = [
        "rows: true class; columns: predicted; right: accuracy, %",
        "blue: right, red: wrong, darker: more of the row",
    ]
    if n < len(names):
        lines[0] = "those confused most often; " + lines[0]
    width = max(left + cell * (n + other) + 70, 48 + round(max(big.getlength(title), *map(font.getlength, lines))))
    canvas = Image.new("RGB", (width, top + cell * n + 24), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((24, 14), title, "black", big)
    draw.multiline_text((24, 44), "\n".join(lines), "#666666", font)
    for j, text in enumerate(columns):
        x = left + cell * j + cell / 2
        if turned:
            strip = Image.new("RGB", (round(label.getlength(text)) + 2, cell), "white")
            ImageDraw.Draw(strip).text((0, cell / 2), text, "black", label, anchor="lm")
            strip = strip.transpose(Image.Transpose.ROTATE_90)
            canvas.paste(strip, (round(x - cell / 2), top - 6 - strip.height))
        else:
            draw.text((x, top - 6), text, "black", label, anchor="ms")
    for i, row in enumerate(table.tolist()):
        y = top + cell * i
        draw.text((left - 8, y + cell / 2), rows[i], "black", label, anchor="rm")
        score = f"{100 * row[i] / total[i]:.1f}" if total[i] else "-"
        draw.text((left + cell * (n + other) + 8, y + cell / 2), score, "black", label, anchor="lm")
        for j, count in enumerate(row):
            share = count / total[i] if total[i] else 0
            colour = 247 + ((BLUE if i == j else RED) - 247) * (share if i == j else share**0.5)
            box = (left + cell * j, y, left + cell * (j + 1) - 2, y + cell - 2)
            draw.rectangle(box, tuple(colour.round().astype(int).tolist()))
            if numbers and count:
                ink = "white" if colour.mean() < 140 else "black"
                draw.text((left + cell * (j + 0.5) - 1, y + cell / 2 - 1), f"{count:,}", ink, font, anchor="mm")
    with atomic(path, shared=True) as temporary:
        canvas.save(temporary)
