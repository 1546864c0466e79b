"""What a run says by itself: each warning is provoked, comes once, and names the cure."""

import errno
import types

import pytest
import torch

from common import args, log
from common.log import Logger
from tests.helpers import logged, parsed, records, train


def logger(out, **more):
    words = f"--out {out} --log-every 1 --batch-size 4 --workers 2".split()
    return Logger(parsed("simsiam", *words), types.SimpleNamespace(waited=0.0, epoch_steps=10), 10_000, 0, **more)


def warnings(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_collapse_is_warned_of_once(tmp_path, capsys):
    run = logger(tmp_path)
    for step, std in enumerate((0.9, 0.05, 0.01), 1):
        run.log(step, 0.1 * step, 1.0, 0.1, std=std)
    (warning,) = warnings(capsys)
    assert "collapse" in warning and "std 0.050" in warning and "Lower --lr" in warning


def test_loss_of_chance_is_warned_of_after_five_epochs(tmp_path, capsys):
    run = logger(tmp_path, chance=4.0)
    run.log(10, 1.0, 4.0, 0.1)
    run.log(50, 5.0, 3.9, 0.1)  # 97.5 % of chance: it learns
    assert warnings(capsys) == []
    run.log(60, 6.0, 3.99, 0.1)
    run.log(70, 7.0, 4.01, 0.1)
    (warning,) = warnings(capsys)
    assert "learned nothing" in warning and "views.png" in warning


def test_waiting_for_images_is_warned_of(tmp_path, capsys, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(log.time, "perf_counter", lambda: float(next(clock)))
    run = logger(tmp_path)
    for step in (10, 30, 40):
        run.loader.waited += 0.9
        run.log(step, 0.1, 1.0, 0.1)
    (warning,) = warnings(capsys)
    assert "--workers (now 2)" in warning and "%" in warning


def test_loss_that_is_not_finite_names_what_came_before(tmp_path, capsys):
    run = logger(tmp_path)
    run.log(1, 0.1, 2.5, 0.1)
    with pytest.raises(SystemExit) as stop:
        run.log(2, 0.2, float("inf"), 0.1)
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "step 2" in message and "last losses: 2.5" in message and "lower --lr" in message


def test_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, capsys, monkeypatch):
    run = logger(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        run.log(1, 0.1, 1.0, 0.1)
        run.log(2, 0.2, 1.0, 0.1)
    (warning,) = warnings(capsys)
    assert "log.jsonl" in warning and "No space left" in warning
    run.log(3, 0.3, 1.0, 0.1)
    assert list(records(tmp_path)) == [3]


def test_continued_log_keeps_what_came_before_and_no_half_line(tmp_path):
    run = logger(tmp_path)
    for step in (1, 2, 3):
        run.log(step, 0.1, 1.0, 0.1)
    run.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    Logger(run.args, run.loader, 10_000, 2).log(3, 0.1, 7.0, 0.1)
    assert {step: r["loss"] for step, r in records(tmp_path).items()} == {1: 1.0, 2: 1.0, 3: 7.0}
    assert [r["resumed_at"] for r in logged(tmp_path) if "command" in r] == [0, 2]


@pytest.mark.parametrize(
    "error, text",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: lower --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: lower --batch-size"),
        (OSError(errno.ENOSPC, "No space left on device", "x.png"), "x.png: No space left on device"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_errors_that_a_user_can_mend_become_one_line(error, text, capsys):
    args._explain(type(error), error, None)
    message = capsys.readouterr().err
    assert text in message and message.count("\n") == 1


def test_other_errors_keep_their_traceback(capsys):
    args._explain(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capsys.readouterr().err


def test_start_names_what_differs_from_the_recipe(tmp_path, capsys):
    """Batch 16 instead of 512, and 16 pixels."""
    train("simsiam", tmp_path, "--max-steps", 1)
    text = capsys.readouterr().out
    assert "batch 16 is far from the recipe's 512" in text and "3x3 stem" in text
