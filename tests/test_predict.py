"""predict.py gives what the evaluation that trained a classifier has seen, and names what it cannot read."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from common.augment import EvalView
from tests.helpers import main, refused, write_images, write_vit

FINETUNE = ["--epochs", "2", "--batch-size", "8", "--recipe", "plain", "--warmup-epochs", "0", "--workers", "1"]


def write_set(root):
    """Three classes that differ in brightness, with overlap; their names come from the folders. Returns root."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 7)):
        for c, name in enumerate(("ape", "bee", "cat, big")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(60 + 60 * c, 45) + generator.normal(0, 40, (20, 24, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def table(out):
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def top1(rows):
    return 100 * sum(row["class"] == row["true class"] for row in rows) / len(rows)


SMALL = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --workers 1".split()
LINEAR = ["--epochs", "2", "--batch-size", "8", "--protocol"]


@pytest.mark.parametrize("case", ["small", "swav", "multihead", "dino", "finetune resnet", "finetune vit"])
def test_predictions_are_those_of_the_evaluation(tmp_path, monkeypatch, case):
    data, out, logits = write_set(tmp_path / "data"), tmp_path / "out", []
    network = SMALL if case not in ("dino", "finetune vit") else ["--pretrained", write_vit(tmp_path / "v.pt")]
    if case.startswith("finetune"):
        result = main("eval_finetune", *network, "--data", data, "--out", out, *FINETUNE)
        expected = result["top1"]
    else:
        result = main("eval_linear", *network, "--data", data, "--out", out, "--workers", "1", *LINEAR, case)
        expected = result["classifier"]["top1"]
        assert expected == max(head["last"]["top1"] for head in result["heads"].values())
    path = out / ("finetune.pt" if case.startswith("finetune") else "linear.pt")
    shutil.rmtree(data / "train")  # one file is all it needs
    forward = predict.load_classifier

    def spy(args):
        model, *rest = forward(args)
        model.register_forward_hook(lambda module, inputs, output: logits.append(output))
        return model, *rest

    monkeypatch.setattr(predict, "load_classifier", spy)
    main("predict", "--pretrained", path, "--data", data, "--workers", "1", "--topk", "3", "--batch-size", "10")
    rows, p = table(path.parent / "predictions"), torch.cat(logits).softmax(1).numpy()
    assert [row["true class"] for row in rows] == ["ape"] * 7 + ["bee"] * 7 + ["cat, big"] * 7
    assert top1(rows) == pytest.approx(expected, abs=1e-3)
    names = ["ape", "bee", "cat, big"]
    for row, values in zip(rows, p, strict=True):
        order = np.argsort(-values)
        assert [row[k] for k in ("class", "class_2", "class_3")] == [names[c] for c in order]
        found = [float(row[k]) for k in ("probability", "probability_2", "probability_3")]
        assert found == pytest.approx(values[order], rel=1e-5) and sum(found) == pytest.approx(1, abs=1e-5)


def test_probabilities_from_the_saved_numbers(tmp_path):
    """Computed once more from the file: network, standardised features, linear layer, softmax."""
    data = write_set(tmp_path / "data")
    main("eval_linear", *SMALL, "--data", data, "--out", tmp_path, *LINEAR, "small")
    args = predict.parse_args(["--pretrained", str(tmp_path / "linear.pt"), "--data", str(data)])
    model, view, names, meta = predict.load_classifier(args)
    assert names == ["ape", "bee", "cat, big"]
    assert view == EvalView(16, interpolation="bilinear", mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    saved = torch.load(tmp_path / "linear.pt", weights_only=True)["classifier"]
    image = torch.from_numpy(np.array(Image.open(data / "test/bee/3.png"))).permute(2, 0, 1)
    x = (view.crop(image)[None] / 255 - torch.tensor(view.mean).view(3, 1, 1)) / torch.tensor(view.std).view(3, 1, 1)
    with torch.no_grad():
        features = model.backbone.eval()(x)
    logits = ((features - saved["mean"]) / saved["std"]) @ saved["weight"].T + saved["bias"]
    main("predict", "--pretrained", tmp_path / "linear.pt", "--data", data / "test/bee/3.png", "--out", tmp_path)
    (row,) = table(tmp_path)
    best = logits.softmax(1).max()
    assert float(row["probability"]) == pytest.approx(best.item(), rel=1e-4)
    assert row["class"] == names[logits.argmax()] and "true class" not in row


def test_new_images_of_any_kind(tmp_path, capsys):
    main("eval_linear", *SMALL, "--data", write_set(tmp_path / "data"), "--out", tmp_path, *LINEAR, "small")
    new = write_images(tmp_path / "new", [f"{i}.png" for i in range(4)] + ["a, b.png"])
    (new / "2.png").write_bytes(b"no image")
    capsys.readouterr()
    main("predict", "--pretrained", tmp_path / "linear.pt", "--data", new, "--pictures", "3")
    output, rows = capsys.readouterr(), table(tmp_path / "predictions")
    assert "2.png: cannot be decoded" in output.out and "2.png" in output.err
    assert [row["path"].rpartition("/")[2] for row in rows] == ["0.png", "1.png", "2.png", "3.png", "a, b.png"]
    assert [bool(row["class"] and row["probability"]) for row in rows] == [True, True, False, True, True]
    assert "true class" not in rows[0] and {row["class_3"] for row in rows} - {"ape", "bee", "cat, big", ""} == set()
    assert Image.open(tmp_path / "predictions/predictions.png").width > 500
    for path in new.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        main("predict", "--pretrained", tmp_path / "linear.pt", "--data", new)
    assert stop.value.code == 2 and "none of the 5 images can be decoded" in capsys.readouterr().err


def test_files_without_a_classifier(tmp_path, capsys):
    backbone = write_vit(tmp_path / "backbone.pt")
    for path in ("random", backbone):
        message = refused(capsys, main, "predict", "--pretrained", path, "--data", "digits")
        assert "has no classifier: eval_linear.py writes a linear.pt" in message and "finetune.pt" in message


def test_the_file_is_also_a_backbone_and_names_come_from_anywhere(tmp_path):
    """Digits have names without folders; a file with a classifier is a --pretrained like others."""
    out = tmp_path / "out"
    main("eval_linear", *SMALL, "--data", "digits", "--out", out, *LINEAR, "small")
    result = json.loads((out / "eval_linear.json").read_text())
    main("predict", "--pretrained", out / "linear.pt", "--data", "digits", "--pictures", "0")
    rows = table(out / "predictions")
    assert len(rows) == 359 and top1(rows) == pytest.approx(result["best"]["top1"], abs=1e-3)
    again = main("eval_knn", "--pretrained", out / "linear.pt", "--data", "digits", "--workers", "1")
    assert again["arch"] == "resnet18"
