"""What happens to runs in ten days: killed, preempted, two in one folder, full disks, damaged and malicious files."""

import importlib
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.kill import differences, killed_run
from tests.helpers import (
    ROOT,
    SCRIPTS,
    command,
    different,
    environment,
    flags,
    records,
    refused,
    start_of,
    state,
    tensors,
    train,
)

EVERY_STEP = ["--save-every", 0]


def test_killed_run_equals_one_left_alone(tmp_path):
    """SIGKILL at random instants; state and log are those of a run that nobody killed (more: benchmarks/kill.py)."""
    more = ["--epochs", 10, *EVERY_STEP]
    train("simsiam", tmp_path / "alone", *more)
    words = ["simsiam.py", *flags("simsiam", tmp_path / "killed", *more)]
    assert len(killed_run(words, 2, random.Random(1))) == 2
    assert differences(tmp_path / "alone", tmp_path / "killed") == []


def started(words, **more):
    """A program whose output can be read while it runs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment(), **pipes | more)


def await_step(process, step):
    for line in process.stdout:
        if f"  step {step}/" in line:
            return


def test_torchrun_preempted_and_continued(tmp_path):
    """SIGTERM to torchrun: its processes finish the step and save; the same command goes on where they were."""
    process = started(start_of("simsiam.py", *flags("simsiam", tmp_path, "--epochs", 5000), processes=2))
    await_step(process, 2)
    process.send_signal(signal.SIGTERM)
    assert "run the same command again" in process.stdout.read()
    process.wait(timeout=120)
    stopped = state(tmp_path)["step"]
    assert sorted(records(tmp_path)) == list(range(1, stopped + 1))
    assert train("simsiam", tmp_path, "--epochs", 5000, "--max-steps", stopped + 1)["step"] == stopped + 1


def test_torchrun_restarts_after_a_worker_was_killed(tmp_path):
    """One worker: with more, gloo itself sometimes hangs when it connects the restarted ones."""
    words = start_of("simsiam.py", *flags("simsiam", tmp_path, "--epochs", 8, *EVERY_STEP), processes=2)
    words[words.index("--nproc_per_node=2")] = "--nproc_per_node=1"
    process = started([*words[:4], "--max-restarts=2", *words[4:]])
    await_step(process, 3)
    os.kill(int((tmp_path / "lock").read_text().split()[1]), signal.SIGKILL)
    output = process.stdout.read()
    assert process.wait(timeout=240) == 0, output[-3000:]
    assert "resuming" in output and state(tmp_path)["step"] == 32
    assert sorted(records(tmp_path)) == list(range(1, 33))


def test_two_runs_in_one_folder(tmp_path):
    words = ["simsiam.py", *flags("simsiam", tmp_path, "--epochs", 5000)]
    first, end = started(start_of(*words), stdout=subprocess.DEVNULL), time.monotonic() + 120
    try:
        while not (tmp_path / "log.jsonl").exists():
            assert time.monotonic() < end, "the first run does not begin"
            time.sleep(0.05)
        second = command(*words, check=2)
        assert f"process {first.pid} on" in second.stderr and "choose another --out" in second.stderr
        assert second.stderr.count("\n") == 1
    finally:
        first.kill()
        first.wait()
    command(*words, "--max-steps", 1, check=0)  # a lock does not outlive its process


def test_full_disk_leaves_the_last_good_state(tmp_path):
    train("simsiam", tmp_path, "--max-steps", 2)
    before = (tmp_path / "last.pt").read_bytes()
    words = ["simsiam.py", *flags("simsiam", tmp_path, "--max-steps", 4)]
    small = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))}
    done = command(*words, check=1, **small)
    assert "cannot write" in done.stderr and "Make room and repeat the command" in done.stderr
    assert "run the same command again" not in done.stderr + done.stdout, "a job of Slurm would be queued for ever"
    assert done.stderr.count("\n") == 1 and (tmp_path / "last.pt").read_bytes() == before
    assert state(tmp_path)["step"] == 2 and not list(tmp_path.glob("*.tmp*"))
    assert train("simsiam", tmp_path, "--max-steps", 4)["step"] == 4


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/no/such"])
def test_folder_that_cannot_be_made(out, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, train, "simsiam", tmp_path / out, "--max-steps", 1)


def test_run_folder_removed_meanwhile(tmp_path, monkeypatch):
    """The run goes on, and its folder is there again at the end."""
    import simsiam

    out, real, calls = tmp_path / "run", simsiam.simsiam_loss, []

    def loss(*tensors):
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(out)
        return real(*tensors)

    monkeypatch.setattr(simsiam, "simsiam_loss", loss)
    assert train("simsiam", out, "--max-steps", 3)["step"] == 3
    assert sorted(records(out)) == [2, 3] and (out / "backbone.pt").exists()


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "another file": lambda data: b"hello",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_falls_back_to_the_one_before(damage, tmp_path, capsys):
    run, path = tmp_path / "run", tmp_path / "run/last.pt"
    whole = train("simsiam", tmp_path / "whole", "--max-steps", 4)
    for steps in (2, 3):
        train("simsiam", run, "--max-steps", steps)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    capsys.readouterr()
    assert different(whole, train("simsiam", run, "--max-steps", 4)) == []
    output = capsys.readouterr()
    assert "warning: --out" in output.err and "last.pt" in output.err and "last.previous.pt, step 2" in output.out
    assert [records(tmp_path / out)[4]["loss"] for out in ("whole", "run")] == [records(run)[4]["loss"]] * 2
    # the good one, not the damaged one, is what a crash would fall back to
    assert (run / "last.damaged.pt").exists() and state(run, "last.previous.pt")["step"] == 2


def test_nothing_readable_does_not_start_from_zero(tmp_path, capsys):
    train("simsiam", tmp_path, "--max-steps", 2)
    (tmp_path / "last.pt").write_bytes(b"hello")
    with pytest.raises(SystemExit) as stop:
        train("simsiam", tmp_path, "--max-steps", 4)
    assert stop.value.code == 2 and "no state of the run can be read" in capsys.readouterr().err


def test_malicious_state_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "run").mkdir()
    torch.save({"model": Payload()}, tmp_path / "run" / "last.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Payload()))
    for words in (["--out", tmp_path / "run"], ["--out", tmp_path / "new", "--init", tmp_path / "old.pt"]):
        with pytest.raises(SystemExit):
            train("simsiam", tmp_path / "x", *words, "--max-steps", 1)
    assert not (tmp_path / "executed").exists()


def test_complete_run_says_so(tmp_path, capsys):
    for _ in range(2):
        train("simsiam", tmp_path, "--epochs", 2, "--warmup-epochs", 0)
    assert "all 8 steps were done before" in capsys.readouterr().out


@pytest.mark.parametrize("script, loss", [("simsiam", "simsiam_loss"), ("byol", "byol_loss"), ("moco", "info_nce")])
def test_loss_that_is_not_finite_keeps_the_last_good_state(script, loss, tmp_path, capsys, monkeypatch):
    """Stops with step, rate and last losses; the saved state is finite."""
    saved, module = train(script, tmp_path, "--max-steps", 2), importlib.import_module(script)
    real = getattr(module, loss)
    monkeypatch.setattr(module, loss, lambda *a: real(*a) * float("nan"))
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path, "--max-steps", 4)
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "loss is nan at step 3 (lr" in message and "lower --lr" in message
    assert different(saved, state(tmp_path)) == []


NOISE = np.random.default_rng(0).integers(0, 256, (32, 20, 20, 3), dtype=np.uint8)
POOR = {
    "constant": np.full_like(NOISE, 7),
    "duplicates": NOISE[:1].repeat(32, 0),
    "one class": NOISE,
    "three images": NOISE[:3],
}


@pytest.mark.parametrize("kind", POOR)
@pytest.mark.parametrize("script", SCRIPTS)
def test_poor_data_gives_finite_numbers_or_one_line(script, kind, tmp_path, capsys):
    """Images without content, one image many times, a single class, three images in batches of two."""
    folder = tmp_path / "data/train/a"
    folder.mkdir(parents=True)
    for i, image in enumerate(POOR[kind]):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    words = ["--data", tmp_path / "data", "--max-steps", 4, "--precision", "fp32"]
    words += ["--batch-size", 2] if kind == "three images" else []
    try:
        saved = tensors(train(script, tmp_path / "run", *words))
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code in (1, 2) and message.count("error: ") == 1 and message.count("\n") == 1, message
        assert stop.code == 2 or "is nan" not in message, "a loss of such images is finite"
    else:
        assert all(value.isfinite().all() for value in saved.values() if value.is_floating_point())
        assert all(torch.tensor(r["loss"]).isfinite() for r in records(tmp_path / "run").values())
