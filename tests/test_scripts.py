"""Every pre-training script as a user runs it: one process against two, interrupted against not, and its files."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT, SCRIPTS, command, flags, records, state, tensors, train

EXACT = ["--precision", "fp64", "--max-steps", "5"]


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """Five steps of every script by two gloo processes, all in one launch; {script: run folder}."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [[script, flags(script, folder / script, *EXACT)] for script in SCRIPTS]
    command("tests/run_scripts.py", json.dumps(jobs), processes=2, check=0)
    return {script: folder / script for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_equal_one(script, two_processes, tmp_path):
    one, two = train(script, tmp_path, *EXACT), state(two_processes[script])
    losses = [{step: r["loss"] for step, r in records(out).items()} for out in (tmp_path, two_processes[script])]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], abs=1e-8)
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-8, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_continued_by_one(script, two_processes, tmp_path):
    """Five steps by two processes and three by one: step 5 is the first of the second epoch of four."""
    shutil.copytree(two_processes[script], tmp_path / "two")
    one = tensors(train(script, tmp_path / "one", *EXACT, "--max-steps", "8"))
    rest = tensors(train(script, tmp_path / "two", *EXACT, "--max-steps", "8"))
    for name in one:
        torch.testing.assert_close(one[name], rest[name], atol=1e-8, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="session")
def continued_by_two(tmp_path_factory):
    """Five steps of every script by one process, three more by two, all in one launch; {script: run folder}."""
    folder = tmp_path_factory.mktemp("continued")
    for script in SCRIPTS:
        train(script, folder / script, *EXACT)
    jobs = [[script, flags(script, folder / script, *EXACT, "--max-steps", "8")] for script in SCRIPTS]
    command("tests/run_scripts.py", json.dumps(jobs), processes=2, check=0)
    return {script: folder / script for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_process_continued_by_two(script, continued_by_two, tmp_path):
    one = tensors(train(script, tmp_path, *EXACT, "--max-steps", "8"))
    rest = tensors(state(continued_by_two[script]))
    for name in one:
        torch.testing.assert_close(one[name], rest[name], atol=1e-8, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_equals_uninterrupted_bit_for_bit(script, tmp_path):
    """64 images in batches of 16: step 6 of 8 cuts the second epoch in the middle."""
    whole = train(script, tmp_path / "a", "--max-steps", "8")
    train(script, tmp_path / "b", "--max-steps", "6")
    parts = train(script, tmp_path / "b", "--max-steps", "8")
    a, b = tensors(whole), tensors(parts)
    assert a.keys() == b.keys() and len(a) > 50
    different = [name for name in a if not torch.equal(a[name], b[name]) and "max_steps" not in name]
    assert different == []
    logs = [{s: (r["loss"], r["lr"], r.get("std")) for s, r in records(tmp_path / x).items()} for x in "ab"]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulation_keeps_steps_and_learning_rate(script, tmp_path):
    train(script, tmp_path / "a", "--max-steps", "2")
    train(script, tmp_path / "b", "--max-steps", "2", "--accum", "2")
    a, b = records(tmp_path / "a"), records(tmp_path / "b")
    assert [r["lr"] for r in a.values()] == [r["lr"] for r in b.values()]
    assert a.keys() == b.keys()


def test_other_micro_batches_on_resume_are_said(tmp_path, capsys):
    train("simsiam", tmp_path, "--max-steps", 1)
    train("simsiam", tmp_path, "--max-steps", 2)
    assert "--accum" not in capsys.readouterr().out
    train("simsiam", tmp_path, "--max-steps", 3, "--accum", 2)
    assert "note        --accum was 1, is 2: batch norm now sees batches of another size" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line_writes_the_promised_files(script, tmp_path):
    """As a user runs it, in a fresh process, in every precision that the CPU has."""
    out = tmp_path / "run"
    done = command(
        f"{script}.py", *flags(script, out, "--max-steps", 2, "--knn-every", 1, "--precision", "bf16"), check=0
    )
    assert "knn" in done.stdout and "step 2/2" in done.stdout
    for name in ("last.pt", "backbone.pt", "log.jsonl", "views.png", f"{script}.py"):
        assert (out / name).stat().st_size > 0, name
    assert not list(out.glob("*.tmp*"))
    backbone = torch.load(out / "backbone.pt", weights_only=True)
    assert backbone["meta"]["method"] == script
    vit = backbone["meta"]["arch"].startswith("vit")
    names = {"cls_token", "blocks.1.mlp.fc2.bias"} if vit else {"conv1.weight", "layer4.1.bn2.running_var"}
    assert names <= backbone["backbone"].keys()
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert {"command", "args", "versions", "commit"} <= first.keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_run_saves_and_continues(number, tmp_path):
    """SIGTERM and Ctrl-C: the step is finished, everything is saved, exit code 75, and the same command goes on."""
    words = [sys.executable, "simsiam.py", *flags("simsiam", tmp_path, "--epochs", 2000)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "step 3/" in line:
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75
    assert "run the same command again" in rest
    stopped = state(tmp_path)["step"]
    assert stopped >= 3
    words += ["--max-steps", str(stopped + 2)]
    done = command(*words[1:], check=0)
    assert f"step {stopped}\n" in done.stdout and f"step {stopped + 2}/" in done.stdout
    assert sorted(records(tmp_path)) == list(range(1, stopped + 3))


def test_loading_threads_change_nothing(tmp_path):
    """Two runs of one command agree bit for bit, whatever the number of loading threads."""
    a = tensors(train("simsiam", tmp_path / "a", "--max-steps", 3, "--workers", 0))
    b = tensors(train("simsiam", tmp_path / "b", "--max-steps", 3, "--workers", 3))
    assert [n for n in a if not torch.equal(a[n], b[n]) and "workers" not in n] == []
