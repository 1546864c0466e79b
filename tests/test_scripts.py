"""Every pre-training script as a user runs it: one process against two, interrupted against not, and its files."""

import functools
import runpy
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest

from tests.helpers import (
    EXACT,
    ROOT,
    SCRIPTS,
    SHIPPED,
    assert_close,
    command,
    different,
    flags,
    launch,
    logged,
    records,
    start_of,
    state,
    train,
)

SAME = {"atol": 1e-8, "rtol": 1e-7}
# Conv4's biases come before batch norm: their gradients are rounding alone, and Adam divides them by about 1e-8.
TOLERANCES = {"protoclr": {"atol": 1e-7, "rtol": 1e-7}}
SHORT = ["--data", "fake:32"]  # epochs of two steps
THREE, FIVE = [*EXACT, *SHORT, "--max-steps", 3], [*EXACT, *SHORT, "--max-steps", 5]  # three steps cut the second epoch


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folders of each script: .one, three steps by one process; .two, by two; .more, three by one and two by two.
    whole(script): five by one, without a stop. All that two processes do is one launch."""
    folder, jobs = tmp_path_factory.mktemp("runs"), []
    for script in SCRIPTS:
        train(script, folder / "one" / script, *THREE)
        shutil.copytree(folder / "one" / script, folder / "more" / script)
        jobs += [(script, flags(script, folder / "two" / script, *THREE))]
        jobs += [(script, flags(script, folder / "more" / script, *FIVE))]
    launch(*jobs)
    whole = functools.cache(lambda script: train(script, folder / "whole" / script, *FIVE))
    return SimpleNamespace(one=folder / "one", two=folder / "two", more=folder / "more", whole=whole, folder=folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_equal_one(script, runs):
    outs = runs.one / script, runs.two / script
    losses = [{step: r["loss"] for step, r in records(out).items()} for out in outs]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-8)
    assert_close(*map(state, outs), **TOLERANCES.get(script, SAME))


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_continued_by_one_and_the_reverse(script, runs, tmp_path):
    shutil.copytree(runs.two / script, tmp_path / "two")
    tolerance = TOLERANCES.get(script, SAME)
    assert_close(runs.whole(script), train(script, tmp_path / "two", *FIVE), **tolerance)
    assert_close(runs.whole(script), state(runs.more / script), **tolerance)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_equals_uninterrupted_bit_for_bit(script, runs, tmp_path):
    out = shutil.copytree(runs.one / script, tmp_path / "out")
    assert different(runs.whole(script), train(script, out, *FIVE)) == []
    outs = runs.folder / "whole" / script, out
    logs = [{s: (r["loss"], r["lr"], r.get("std")) for s, r in records(out).items()} for out in outs]
    assert logs[0] == logs[1] and len(logs[0]) == 5


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line_writes_the_promised_files(script, runs, tmp_path, monkeypatch, capsys):
    """As `python script.py` does it, in the precision that GPUs take. Micro-batches change neither steps nor rates."""
    out = tmp_path / "run"
    words = flags(script, out, *SHORT, "--max-steps", 2, "--knn-every", 1, "--precision", "bf16", "--accum", 2)
    monkeypatch.setattr("sys.argv", [f"{ROOT}/{script}.py", *words])
    runpy.run_path(f"{ROOT}/{script}.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "knn" in printed and "step 2/2" in printed and "cut short   by --max-steps" in printed
    for name in ("last.pt", "backbone.pt", "log.jsonl", "views.png", f"{script}.py"):
        assert (out / name).stat().st_size > 0, name
    assert not list(out.glob("*.tmp*"))
    backbone = state(out, "backbone.pt")
    assert backbone["meta"]["method"].partition(",")[0] == script.replace("_", "") or script not in SHIPPED
    names = {
        "vit": {"patch_embed.proj.weight", "blocks.1.mlp.fc2.bias"},
        "swin": {"layers.1.blocks.1.mlp.fc2.bias", "norm.bias"},
    }
    names["conv4"] = {"encoder.0.0.weight", "encoder.3.1.running_var"}
    kind = backbone["meta"]["arch"].partition("_")[0]
    assert names.get(kind, {"conv1.weight", "layer4.1.bn2.running_var"}) <= backbone["backbone"].keys()
    first = logged(out)[0]
    assert {"args", "versions", "commit"} <= first.keys() and first["command"].startswith(f"{script}.py --data fake:64")
    rates = [{step: records(o)[step]["lr"] for step in (1, 2)} for o in (out, runs.one / script)]
    assert rates[0] == rates[1]


def test_other_micro_batches_on_resume_are_said(tmp_path, capsys):
    train("simsiam", tmp_path, "--max-steps", 1)
    train("simsiam", tmp_path, "--max-steps", 2)
    assert "--accum" not in capsys.readouterr().out
    train("simsiam", tmp_path, "--max-steps", 3, "--accum", 2)
    assert "note        --accum was 1, is 2: batch norm now sees batches of another size" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_run_saves_and_continues(number, tmp_path):
    """SIGTERM and Ctrl-C: the step is finished, everything is saved, exit code 75, and the same command goes on."""
    words = ["simsiam.py", *flags("simsiam", tmp_path, "--epochs", 2000)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(start_of(*words), cwd=ROOT, **pipes)
    for line in process.stdout:
        if "step 3/" in line:
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75 and "run the same command again" in rest
    stopped = state(tmp_path)["step"]
    assert stopped >= 3
    done = command(*words, "--max-steps", stopped + 2, check=0)
    assert f"step {stopped}\n" in done.stdout and f"step {stopped + 2}/" in done.stdout
    assert sorted(records(tmp_path)) == list(range(1, stopped + 3))


def test_loading_threads_change_nothing(tmp_path):
    """Two runs of one command agree bit for bit, whatever the number of loading threads."""
    a = train("simsiam", tmp_path / "a", "--max-steps", 3, "--workers", 0)
    assert different(a, train("simsiam", tmp_path / "b", "--max-steps", 3, "--workers", 3), but=["workers"]) == []
