"""Curves of runs: what is read of whole, short, resumed and broken logs, how runs are called, the picture."""

import json
import sys

import pytest
from PIL import Image

import plot
from tests.helpers import main, refused


def write(path, *records, end=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    first = {"command": "simsiam.py", "args": {"epochs": 4}, "resumed_at": 0}
    path.write_text("".join(json.dumps(record) + "\n" for record in (first, *records)) + end)
    return path


def step(n, loss=1.0, **more):
    return {"step": n, "epoch": n / 10, "loss": loss, "lr": 0.1, **more}


WHOLE = [{"step": 0, "knn": 10.0}, step(5, 3.0, std=0.5), step(10, 2.0, std=0.9), {"step": 10, "knn": 30.5}, step(15)]


def test_epochs_of_what_is_measured_between_steps(tmp_path):
    curves = plot.read_log(write(tmp_path / "log.jsonl", *WHOLE))
    assert curves["loss"] == [(0.5, 3.0), (1.0, 2.0), (1.5, 1.0)] and curves["knn"] == [(0.0, 10.0), (1.0, 30.5)]
    assert curves["std"] == [(0.5, 0.5), (1.0, 0.9)] and curves["lr"] == [(e, 0.1) for e in (0.5, 1.0, 1.5)]
    assert plot.summary(curves) == "epoch 1.5, loss 1, k-NN 30.5 (best 30.5)"


def test_logs_of_runs_that_died_or_went_on(tmp_path):
    """A line cut short, a second opening record, a step that comes up again, values that are no numbers."""
    resumed = [step(5), {"command": "again", "resumed_at": 3}, step(4, 7.0), step(5, 6.0, std=None, memory_gb="?"), [1]]
    curves = plot.read_log(write(tmp_path / "log.jsonl", *resumed, end='{"step": 6, "lo'))
    assert curves["loss"] == [(0.4, 7.0), (0.5, 6.0)] and "std" not in curves and "memory_gb" not in curves
    curves = plot.read_log(write(tmp_path / "one.jsonl", {"step": 0, "knn": 12.0}))
    assert curves == {"step": [(0.0, 0)], "knn": [(0.0, 12.0)]}
    tuned = step(10), {"step": 10, "top1": 50.0}, {"step": 20, "top1": 40}
    curves = plot.read_log(write(tmp_path / "finetune.jsonl", *tuned))
    assert curves["top1"] == [(1.0, 50.0), (2.0, 40)] and plot.summary(curves).endswith("top-1 40 (best 50)")


@pytest.mark.parametrize(
    "paths, names",
    [
        (["runs/simclr/log.jsonl"], ["simclr"]),
        (["runs/simclr/log.jsonl", "runs/moco/log.jsonl"], ["simclr", "moco"]),
        (["a/run/log.jsonl", "b/run/log.jsonl"], ["a/run", "b/run"]),
        (["runs/mae/finetune.jsonl", "runs/mae/log.jsonl"], ["mae/finetune", "mae"]),
        (["results/set/byol.jsonl", "results/set/moco.jsonl"], ["byol", "moco"]),
        (["runs/x/log.jsonl", "runs/x.jsonl"], ["x/log", "x"]),
    ],
)
def test_names_of_runs(paths, names, tmp_path):
    assert plot.label_logs([tmp_path / path for path in paths]) == names


def test_logs_of_a_folder(tmp_path):
    for name in ("log.jsonl", "finetune.jsonl", "evaluations.jsonl", "backbone.pt"):
        write(tmp_path / name)
    assert [path.name for path in plot.find_logs(tmp_path)] == ["finetune.jsonl", "log.jsonl"]
    assert plot.find_logs(tmp_path / "evaluations.jsonl") == [tmp_path / "evaluations.jsonl"]


def test_mistakes_get_one_line(tmp_path, capsys, monkeypatch):
    write(tmp_path / "runs" / "moco" / "log.jsonl")
    message = refused(capsys, main, "plot", tmp_path / "runs")
    assert "runs holds no log.jsonl; name the runs in it" in message and "runs/moco" in message.replace("\\", "/")
    (tmp_path / "none").mkdir()
    assert refused(capsys, main, "plot", tmp_path / "none").endswith("none holds no log.jsonl\n")
    assert "nowhere: no such run folder" in refused(capsys, main, "plot", tmp_path / "nowhere")
    assert "moco/log.jsonl holds no record" in refused(capsys, main, "plot", tmp_path / "runs/moco").replace("\\", "/")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert "binary holds no record" in refused(capsys, main, "plot", tmp_path / "binary")
    assert "--out x.jpg must end in" in refused(capsys, main, "plot", tmp_path / "runs/moco", "--out", "x.jpg")
    write(tmp_path / "log.jsonl", *WHOLE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    error = refused(capsys, main, "plot", tmp_path, "--out", tmp_path / "x.png")
    assert error == "error: plot.py needs matplotlib: pip install matplotlib\n"


def test_picture_of_very_different_runs(tmp_path, capsys):
    """Whole, with one record, without k-NN, much longer, with a much larger loss."""
    pytest.importorskip("matplotlib")
    write(tmp_path / "a" / "log.jsonl", *WHOLE)
    write(tmp_path / "b" / "log.jsonl", {"step": 0, "knn": 25.0})
    write(tmp_path / "c" / "log.jsonl", *(step(n, 1e4 / n) for n in range(10, 3000, 10)))
    words = [tmp_path / name for name in ("a", "b", "c", "a")]
    main("plot", *words, "--out", tmp_path / "new" / "x.png")
    picture = Image.open(tmp_path / "new" / "x.png").convert("RGB")
    assert picture.size == (1300, 850) and [p.name for p in (tmp_path / "new").iterdir()] == ["x.png"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["a", "b", "c"] and len(lines) == 4
    colours = {colour: n for n, colour in picture.getcolors(2**20)}
    assert all(colours.get(colour, 0) > 5 for colour in [(31, 119, 180), (255, 127, 14), (44, 160, 44)])  # b: one point
