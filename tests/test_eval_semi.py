"""Semi-supervised evaluation: which images are labelled, rates, the grid; test_eval_finetune.py has its whole runs."""

import inspect
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import eval_finetune
import eval_semi as semi
from common.datasets import open_dataset
from tests import helpers
from tests.helpers import EXACT, command, different, main, refused, write_images

RESNET = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --data fake:64 --batch-size 16 --epochs 4"
RESNET += " --labels 50% --workers 2 --log-every 1 --seed 3"


def run(out, *more):
    return main("eval_semi", *RESNET.split(), "--out", out, *more)


@pytest.mark.parametrize("name", ["Classifier", "layer_id", "parameter_groups", "accuracy", "validate"])
def test_copies_are_equal(name):
    assert len({inspect.getsource(getattr(script, name)) for script in (semi, eval_finetune)}) == 1


# ------------------------------------------------------------------------------------------------------ recipe
def test_schedules():
    """MAE's cosine with 7 steps in each of 100 epochs, 5 of them warm-up; drops at 12 and 16 of 20 epochs."""
    peak, low = 2e-3, 1e-6
    rates = [peak * semi.schedule(step, 700, 35, "cosine", low / peak) for step in (0, 7, 35, 168, 700)]
    fifth = low + (peak - low) * (1 + math.cos(math.pi / 5)) / 2
    assert rates == pytest.approx([0, 0.2 * peak, peak, fifth, low], rel=1e-12)
    factors = [semi.schedule(e * 50, 20 * 50, 0, "step") for e in range(20)]
    assert factors == pytest.approx([1] * 12 + [0.2] * 4 + [0.04] * 4)
    assert semi.schedule(12 * 50 - 1, 20 * 50, 0, "step") == 1


def test_defaults_are_those_of_the_papers():
    def row(arch, labelled):
        args = helpers.parsed("eval_semi", "--pretrained", "random", "--labels", "1%")
        backbone = SimpleNamespace(**{"patch_size" if arch.startswith("vit") else "stages": None})
        meta = {"arch": arch, "width": 1.0, "image_size": 224, "channels": 3}
        names = "epochs batch_size lr head_lr schedule weight_decay layer_decay drop_path val_every"
        return tuple(vars(semi.complete(args, backbone, meta, labelled))[name] for name in names.split())

    assert row("resnet50", 0.01) == (20, 256, 0.01, 100, "step", 5e-4, 1, 0, 5)
    assert row("resnet50", 0.1) == (20, 256, 0.01, 100, "step", 1e-4, 1, 0, 5)
    assert row("vit_base", 0.01) == (100, 1024, 5e-4, 1, "cosine", 0.05, 0.65, 0.1, 1)
    assert row("vit_large", 0.01) == (50, 1024, 1e-3, 1, "cosine", 0.05, 0.75, 0.2, 1)
    assert semi.GRID == [(a, h) for a in (0.1, 0.01, 0.001) for h in (1, 10, 100)]


# -------------------------------------------------------------------------------------------------- few labels
def test_balanced_draw():
    """ImageNet's sizes: 1 % of 1,281,167 images is 12,811, 12 or 13 of each class."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(1000), [732] * 104 + [1300] * 894 + [1442, 1397]))
    labels = np.concatenate([labels, np.arange(1281167 - len(labels)) % 896 + 104])
    drawn = semi.balanced(labels, 0.01, 0)
    assert len(labels) == 1281167 and len(drawn) == 12811 == len(set(drawn))
    assert set(np.bincount(labels[drawn])) == {12, 13} and (np.diff(drawn) > 0).all()
    assert np.array_equal(drawn, semi.balanced(labels, 0.01, 0))
    many = np.arange(20000) % 10
    assert len(np.intersect1d(semi.balanced(many, 0.1, 0), semi.balanced(many, 0.1, 1))) < 0.15 * 2000
    uneven = np.array([5] * 90 + [7] * 3)
    assert list(np.bincount(uneven[semi.balanced(uneven, 0.5, 0)])[[5, 7]]) == [23, 3]
    assert len(semi.balanced(np.arange(10).repeat(10), 0.01, 0)) == 10  # at least one of each


def test_lists_of_labelled_images(tmp_path, capsys):
    names = [f"train/{c}/{name}.png" for c in ("one", "two") for i in range(6) for name in (i, f"{c} {i}")]
    data = open_dataset(write_images(tmp_path, names, size=(16, 16)), "train")
    where = {"/".join(data.path(i).split("/")[-2:]): i for i in range(len(data))}
    text = tmp_path / "list.txt"
    text.write_text("# as SimCLR's\ntwo 3.png\n\none 0.png\ntwo/4.png\ntrain/one/1.png 0\none/1.png\n")
    expected = sorted(where[name] for name in ("two/two 3.png", "one/one 0.png", "two/4.png", "one/1.png"))
    subset, how = semi.few_labels(data, str(text), 0)
    assert list(subset.indices) == expected and "4 of 24" in how and "list.txt" in how
    assert [subset[i][1] for i in range(4)] == list(data.labels[expected])
    text.write_bytes("two\\4.png,1\r\none\\1.png\r\n".encode("utf-16"))  # of Windows
    assert list(semi.few_labels(data, str(text), 0)[0].indices) == sorted([where["two/4.png"], where["one/1.png"]])
    for line, reason in (("3.png", "class/file"), ("three.png", "not among"), ("", "names no image")):
        text.write_text(line)
        error = refused(capsys, semi.few_labels, data, str(text), 0)
        assert reason in error and str(text) in error


# ------------------------------------------------------------------------------------------------------ the grid
def test_grid_prints_and_reports_nine_runs(tmp_path, capsys):
    more = ["--epochs", 1, *EXACT]
    result = run(tmp_path, *more, "--grid")
    printed = capsys.readouterr().out
    assert len([text for text in printed.splitlines() if text.startswith("result ")]) == len(result["grid"]) == 9
    assert [(r["lr"], r["head_lr"]) for r in result["grid"]] == semi.GRID
    assert result["top1"] == max(r["top1"] for r in result["grid"])
    how = "32 of 64 images, balanced draw with seed 3"
    assert how in result["labels"] and how in printed
    last = json.loads(printed.splitlines()[-1])
    assert last == json.loads((tmp_path / "eval_semi.json").read_text()) == json.loads(json.dumps(result))
    # each is the run that its two flags give alone
    alone = run(tmp_path / "alone", *more, "--lr", 0.01, "--head-lr", 10)
    assert alone["top1"] == result["grid"][4]["top1"]
    assert different(*(helpers.state(tmp_path / x, "semi_last.pt")["model"] for x in ("alone", "lr0.01_head10"))) == []
    command("eval_semi.py", *RESNET.split(), *more, "--grid", "--out", tmp_path / "two", processes=2, check=0)
    assert json.loads((tmp_path / "two/eval_semi.json").read_text()) == last


def test_a_run_of_the_grid_may_diverge(tmp_path, monkeypatch):
    monkeypatch.setattr(semi, "GRID", [(1e30, 100.0), (0.01, 1.0)])
    result = run(tmp_path, "--grid")
    bad, good = result["grid"]
    assert bad["diverged_at_step"] >= 2 and bad["top1"] == 0 and result["lr"] == 0.01 and good["epoch"] == 4
    assert helpers.logged(tmp_path / "lr1e+30_head100", "semi.jsonl")[-1]["diverged_at_step"] == bad["diverged_at_step"]


MISTAKES = {"--labels 0%": "above 0%", "--labels nowhere.txt": "nowhere.txt: no such file", "--mixup 0.8": "--mixup"}
MISTAKES |= {"--labels pyproject.toml": "pyproject.toml, line 1", "--drop-path 0.1": "vision transformers only"}
MISTAKES |= {"--arch vit_tiny --width 0.25 --grid": "ResNets only", "--grid --lr 1": "--grid sets"}
MISTAKES |= {"--batch-size 33": "larger than the data set (32 images)"}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_get_one_line(line, capsys, tmp_path):
    assert MISTAKES[line] in refused(capsys, run, tmp_path, *line.split())
