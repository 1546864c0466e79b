"""What a run says by itself: each warning is provoked, comes once, and names the cure."""

import errno
import importlib
import io
import re
import sys
import time
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


@pytest.mark.parametrize("flag, again", [("--resume", "again"), ("--no-resume", "without --no-resume")])
def test_stopped_run_names_the_command_that_continues_it(flag, again, tmp_path, capsys):
    """With --no-resume the same command would start at the first step."""
    run = Logger(parsed("simsiam", "--out", tmp_path, flag), types.SimpleNamespace(waited=0.0), 100, 0)
    with pytest.raises(SystemExit) as stopped:
        run.end(3)
    assert stopped.value.code == 75
    assert f"step 3, all saved in {tmp_path}: run the same command {again} to continue" in capsys.readouterr().out


def test_loss_of_chance_is_warned_of_after_five_epochs(tmp_path, capsys):
    run = logger(tmp_path, chance=4.0)
    run.log(10, 1.0, 4.0, 0.1)
    run.log(50, 5.0, 3.9, 0.1)  # 97.5 % of chance: it learns
    assert warnings(capsys) == []
    run.log(60, 6.0, 3.99, 0.1)
    run.log(70, 7.0, 4.01, 0.1)
    (warning,) = warnings(capsys)
    assert "learned nothing" in warning and "views.png" in warning


@pytest.mark.parametrize("cores, more", [(1, False), (2, False), (3, True)])
def test_waiting_for_images_is_warned_of(cores, more, tmp_path, capsys, monkeypatch):
    """More than the two threads are advised only where there are cores for them."""
    clock = iter(range(100))
    monkeypatch.setattr(log.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(log, "cores", lambda: cores)
    run = logger(tmp_path)
    for step in (10, 30, 40):
        run.loader.waited += 0.9
        run.log(step, 0.1, 1.0, 0.1)
    (warning,) = warnings(capsys)
    assert ("--workers (now 2)" in warning) is more and "%" in warning and "a faster disk" in warning


def test_loss_that_is_not_finite_names_what_came_before(tmp_path, capsys):
    run = logger(tmp_path)
    run.log(1, 0.1, 2.5, 0.1)
    with pytest.raises(SystemExit) as stop:
        run.log(2, 0.2, float("inf"), 0.1)
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "step 2" in message and "last losses: 2.5" in message
    assert message.endswith("No state has been saved: lower --lr\n")


@pytest.mark.parametrize(
    "words, first, cure",
    [
        ("--precision auto", True, "it is the first step, so look for such numbers in the images and in --init"),
        ("--precision fp16", True, "try --precision fp32"),
        ("--precision bf16", False, "lower --lr, or try --precision fp32"),
        ("--precision fp64", False, "lower --lr"),
    ],
)
def test_cures_of_a_loss_that_is_not_finite_can_work(words, first, cure, tmp_path, capsys):
    """No rate is blamed before the first step, no precision advised that is there already, no state that is not."""
    run = logger(tmp_path)
    run.args = run.args.replace(precision=words.split()[1])
    (tmp_path / "last.pt").touch()
    with pytest.raises(SystemExit):
        run.log(1 if first else 2, 0.2, float("nan"), 0.1)
    assert capsys.readouterr().err.endswith(f"The last good state is in {tmp_path}/last.pt: {cure}\n")


def test_time_left_does_not_count_pauses(tmp_path):
    """Ten steps of a second, a pause of 1000 seconds (k-NN), then ten more: the rate is one step per second."""
    run, now = logger(tmp_path), [0.0]
    run.bar = log.tqdm(total=100, file=io.StringIO(), disable=False, mininterval=0.5)
    run.bar._time, run.bar.start_t, run.bar.last_print_t = (lambda: now[0]), 0.0, 0.0
    for step in range(1, 21):
        now[0] += 1.0
        run.due(step)
        if step == 10:
            run.clock = time.perf_counter() - 1000.0  # when the last step was logged
            now[0] += 1000.0
            run.note(step, knn=50.0)
    assert run.bar.format_dict["rate"] == pytest.approx(1.0, rel=0.2)
    assert run.bar.format_dict["elapsed"] == pytest.approx(20.0, abs=1.0)


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
        (KeyboardInterrupt(), "interrupted; what was saved last is in --out"),
    ],
)
def test_errors_that_a_user_can_mend_become_one_line(error, text, capsys):
    args._explain(type(error), error, None)
    message = capsys.readouterr().err
    assert text in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "words, flags, saved",
    [
        ("simsiam --data fake:64", ["--batch-size", "--accum", "--image-size"], "; what was saved last is in --out"),
        ("eval_linear --pretrained random --data fake:64", ["--batch-size", "--image-size"], None),
        ("pack somewhere --out elsewhere", [], ""),
    ],
)
def test_remedies_are_flags_of_the_script(words, flags, saved, capsys):
    script, *words = words.split()
    importlib.import_module(script).parse_args(words)
    sys.excepthook(MemoryError, MemoryError(), None)
    assert re.findall(r"--[\w-]+", capsys.readouterr().err) == flags
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert saved is None or capsys.readouterr().err == f"interrupted{saved}\n"


def test_other_errors_keep_their_traceback(capsys):
    args._explain(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capsys.readouterr().err


def test_start_names_what_differs_from_the_recipe(tmp_path, capsys):
    """Batch 16 instead of 512, and 16 pixels."""
    train("simsiam", tmp_path, "--max-steps", 1)
    text = capsys.readouterr().out
    assert "batch 16 is far from the recipe's 512: also try --lr 0.017 and 0.15, compare" in text and "3x3 stem" in text
    assert "--workers" not in text and "looked at" not in text


SMALL = {  # image size, sizes of the images -> what is advised
    (224, (28,)): "--image-size 32 loses nothing",
    (224, (1, 100)): "--image-size 128 loses nothing",
    (224, (1, 112)): "--image-size 128 loses nothing",
    (224, (1, 113)): None,
    (64, (1, 30)): "--image-size 32 loses nothing",
    (32, (1, 16)): "enlarges",  # a page may refuse less than 32
    (32, (1, 200)): None,
    (32, (1,)): "enlarges",
}


@pytest.mark.parametrize("size, sides", SMALL)
def test_advised_image_sizes_exist(size, sides):
    """Large images at the end or in the middle count, too; a size is advised only where no other flag depends on it."""
    sets = [[torch.empty(3, 1, side)] for side in sides]
    data, advice = [*sets * 3, sets[0], *sets[-1:] * 3], SMALL[size, sides]
    args = parsed("simsiam", "--image-size", size)
    text = log._small_images(args, data, None)
    assert advice in text if advice else text == ""
    if advice and advice.startswith("--image-size"):
        parsed("simsiam", *advice.split()[:2])
        other = parsed("swav", "--image-size", size, "--crops", 2, "--sizes", size)
        assert f"which --image-size {size} enlarges" in log._small_images(other, data, None)


def test_more_threads_than_cores_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "cores", lambda: 1)
    train("simsiam", tmp_path, "--max-steps", 1)
    assert "note        2 loading threads on 1 cores: --workers 1 loads as fast" in capsys.readouterr().out
