"""What happens to runs in ten days: killed, preempted, two in one folder, full disks, damaged and malicious files."""

import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.kill import differences, killed_run
from tests.helpers import ROOT, SCRIPTS, command, flags, records, state, tensors, train

EVERY_STEP = ["--save-every", 0]


@pytest.mark.parametrize("script", ["simsiam"])
def test_killed_run_equals_one_left_alone(script, tmp_path):
    """SIGKILL at random instants; state and log are those of a run that nobody killed (more: benchmarks/kill.py)."""
    more = ["--epochs", 10, *EVERY_STEP]
    train(script, tmp_path / "alone", *more)
    words = [f"{script}.py", *flags(script, tmp_path / "killed", *more)]
    assert len(killed_run(words, 2, random.Random(1))) == 2
    assert differences(tmp_path / "alone", tmp_path / "killed") == []


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


def test_torchrun_preempted_and_continued(tmp_path):
    """SIGTERM to torchrun: its processes finish the step and save; the same command goes on where they were."""
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    words += ["simsiam.py", *flags("simsiam", tmp_path, "--epochs", 5000)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if "  step 2/" in line:
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    process.wait(timeout=120)
    assert "run the same command again" in output
    stopped = state(tmp_path)["step"]
    assert sorted(records(tmp_path)) == list(range(1, stopped + 1))
    one = tensors(train("simsiam", tmp_path, "--epochs", 5000, "--max-steps", stopped + 1))
    assert one["/step"] == stopped + 1


def test_torchrun_restarts_after_a_worker_was_killed(tmp_path):
    """One worker: with more, gloo itself sometimes hangs when it connects the restarted ones."""
    words = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--max-restarts=2", "--rdzv-backend=c10d"]
    words += ["--rdzv-endpoint=localhost:0", "simsiam.py", *flags("simsiam", tmp_path, "--epochs", 8, *EVERY_STEP)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if "  step 3/" in line:
            worker = int((tmp_path / "lock").read_text().split()[1])
            os.kill(worker, signal.SIGKILL)
            break
    output = process.stdout.read()
    assert process.wait(timeout=240) == 0, output[-3000:]
    assert "resuming" in output and state(tmp_path)["step"] == 32
    assert sorted(records(tmp_path)) == list(range(1, 33))


def test_two_runs_in_one_folder(tmp_path):
    words = ["simsiam.py", *flags("simsiam", tmp_path, "--epochs", 5000)]
    first = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "log.jsonl")
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
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot write" in done.stderr and "run the same command again" in done.stderr
    assert (tmp_path / "last.pt").read_bytes() == before
    assert state(tmp_path)["step"] == 2 and not list(tmp_path.glob("*.tmp"))
    assert train("simsiam", tmp_path, "--max-steps", 4)["step"] == 4


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/no/such"])
def test_folder_that_cannot_be_made(out, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        train("simsiam", tmp_path / out, "--max-steps", 1)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "--out" in message


def test_run_folder_removed_meanwhile(tmp_path, monkeypatch):
    """The run goes on, and its folder is there again at the end."""
    import simsiam

    out, real = tmp_path / "run", simsiam.simsiam_loss
    calls = []

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
    train("simsiam", tmp_path / "whole", "--max-steps", 4)
    train("simsiam", tmp_path / "run", "--max-steps", 2)
    train("simsiam", tmp_path / "run", "--max-steps", 3)
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    capsys.readouterr()
    train("simsiam", tmp_path / "run", "--max-steps", 4)
    output = capsys.readouterr()
    assert "warning: --out" in output.err and "last.pt" in output.err
    assert "last.previous.pt, step 2" in output.out
    assert (tmp_path / "run" / "last.damaged.pt").exists()
    previous = torch.load(tmp_path / "run" / "last.previous.pt", weights_only=True)
    assert previous["step"] == 2  # the good one, not the damaged one, is what a crash would fall back to
    assert [d for d in differences(tmp_path / "whole", tmp_path / "run") if "max_steps" not in d] == []


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
    with open(tmp_path / "old.pt", "wb") as file:
        pickle.dump(Payload(), file)
    for words in (["--out", tmp_path / "run"], ["--out", tmp_path / "new", "--init", tmp_path / "old.pt"]):
        with pytest.raises(SystemExit):
            train("simsiam", tmp_path / "x", *words, "--max-steps", 1)
    assert not (tmp_path / "executed").exists()


def test_complete_run_says_so(tmp_path, capsys):
    train("simsiam", tmp_path, "--epochs", 2, "--warmup-epochs", 0)
    capsys.readouterr()
    train("simsiam", tmp_path, "--epochs", 2, "--warmup-epochs", 0)
    assert "all 8 steps were done before" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["simsiam", "byol", "moco"])
def test_loss_that_is_not_finite_keeps_the_last_good_state(script, tmp_path, capsys):
    """A learning rate far too high: stops with step, rate and last losses; the saved state is finite."""
    train(script, tmp_path, "--max-steps", 2)
    saved = tensors(state(tmp_path))
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        module = __import__(script)
        name = {"simsiam": "simsiam_loss", "byol": "byol_loss", "moco": "info_nce"}[script]
        real = getattr(module, name)
        patch.setattr(module, name, lambda *a: real(*a) * float("nan"))
        train(script, tmp_path, "--max-steps", 4)
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "loss is nan at step 3" in message and "lower --lr" in message
    after = tensors(state(tmp_path))
    assert all(torch.equal(saved[k], after[k]) for k in saved)


def pictures(folder, kind):
    from PIL import Image

    (folder / "train" / "a").mkdir(parents=True)
    noise = torch.randint(
        0, 256, (64, 20, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    ).numpy()
    images = {
        "constant": [Image.new("RGB", (20, 20), (7, 7, 7))] * 32,
        "duplicates": [Image.fromarray(noise[0])] * 32,
        "one class": [Image.fromarray(x) for x in noise[:32]],
        "three images": [Image.fromarray(x) for x in noise[:3]],
    }
    for i, image in enumerate(images[kind]):
        image.save(folder / "train" / "a" / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("kind", ["constant", "duplicates", "one class", "three images"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_poor_data_gives_finite_numbers_or_one_line(script, kind, tmp_path, capsys):
    """Images without content, one image many times, a single class, three images in batches of two."""
    words = ["--data", pictures(tmp_path / "data", kind), "--max-steps", 4, "--precision", "fp32"]
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
