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
FIVE, EIGHT = [*EXACT, "--max-steps", 5], [*EXACT, "--max-steps", 8]  # step 5 is the first of an epoch of four


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """Folders of each script: .one, five steps by one process; .two, by two; .more, five by one and three by two.
    whole(script): eight by one. All that two processes do is one launch."""
    folder, jobs = tmp_path_factory.mktemp("two"), []
    for script in SCRIPTS:
        train(script, folder / "one" / script, *FIVE)
        shutil.copytree(folder / "one" / script, folder / "more" / script)
        jobs += [(script, flags(script, folder / "two" / script, *FIVE))]
        jobs += [(script, flags(script, folder / "more" / script, *EIGHT))]
    launch(*jobs)
    whole = functools.cache(lambda script: train(script, folder / "whole" / script, *EIGHT))
    return SimpleNamespace(one=folder / "one", two=folder / "two", more=folder / "more", whole=whole, folder=folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_equal_one(script, two_processes):
    outs = two_processes.one / script, two_processes.two / script
    losses = [{step: r["loss"] for step, r in records(out).items()} for out in outs]
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], abs=1e-8)
    assert_close(*map(state, outs), **SAME)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_continued_by_one_and_the_reverse(script, two_processes, tmp_path):
    shutil.copytree(two_processes.two / script, tmp_path / "two")
    assert_close(two_processes.whole(script), train(script, tmp_path / "two", *EIGHT), **SAME)
    assert_close(two_processes.whole(script), state(two_processes.more / script), **SAME)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_equals_uninterrupted_bit_for_bit(script, two_processes, tmp_path):
    """64 images in batches of 16: step 6 of 8 cuts the second epoch in the middle."""
    whole = two_processes.whole(script)
    train(script, tmp_path, *EXACT, "--max-steps", 6)
    assert different(whole, train(script, tmp_path, *EIGHT)) == []
    outs = two_processes.folder / "whole" / script, tmp_path
    logs = [{s: (r["loss"], r["lr"], r.get("std")) for s, r in records(out).items()} for out in outs]
    assert logs[0] == logs[1] and len(logs[0]) == 8


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line_writes_the_promised_files(script, tmp_path, monkeypatch, capsys):
    """As `python script.py` does it, in the precision that GPUs take. Micro-batches change neither steps nor rates."""
    out = tmp_path / "run"
    words = flags(script, out, "--max-steps", 2, "--knn-every", 1, "--precision", "bf16", "--accum", 2)
    monkeypatch.setattr("sys.argv", [f"{ROOT}/{script}.py", *words])
    runpy.run_path(f"{ROOT}/{script}.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "knn" in printed and "step 2/2" in printed
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
    train(script, tmp_path / "whole batches", "--max-steps", 2)
    rates = [{step: r["lr"] for step, r in records(o).items()} for o in (out, tmp_path / "whole batches")]
    assert rates[0] == rates[1] and len(rates[0]) == 2


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
