"""Every flag of every script: values that make no sense give one line and exit code 2, never a traceback."""

import argparse
import importlib
import subprocess

import pytest

from common import args as arguments
from common.args import Parser, positive, probability, share, toggle
from common.checkpoint import resume, run_state, save_file
from tests.helpers import ROOT, SCRIPTS, TINY, flags, parsed, refused

RANDOM = "--pretrained random --data fake:64 --arch resnet18 --width 0.125 --image-size 16"
OTHERS = "eval_knn eval_linear eval_cluster eval_fewshot eval_finetune eval_semi features visualize".split()
OTHERS = dict.fromkeys(OTHERS, RANDOM)
OTHERS |= {
    "eval_svm": "--pretrained random --data /nowhere --arch resnet18 --width 0.125",
    "eval_detection": "--pretrained random --data /nowhere --arch resnet18 --width 0.125",
    "eval_segmentation": "--pretrained random --data /nowhere --arch resnet18 --width 0.125",
    "pack": "/nowhere --out /nowhere",
    "export": "--pretrained random --to torchvision --out /nowhere/x.pt",
    "plot": "/nowhere",
    "predict": "--pretrained /nowhere --data fake:8",
}


class Stopped(Exception):
    """The script has gone as far as the test wants: it has a parser, or would begin to train."""


def stop(*args, **kwargs):
    raise Stopped


def options(script):
    """The flags of a script, from its parser itself."""
    found = []

    def capture(parser, *argv):
        found.extend(action for action in parser._actions if action.option_strings and action.dest != "help")
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        importlib.import_module(script).parse_args([])
    return found


def numeric(script):
    """{flag: int or float} of those that take a number."""
    return {a.option_strings[0]: a.type.kind for a in options(script) if hasattr(a.type, "kind")}


def outcome(script, words, tmp_path, capsys):
    """The line with which the words are refused, or None when the script would have begun to train."""
    module = importlib.import_module(script)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        for user in ("common.run", script):
            patch.setattr(f"{user}.describe", stop, raising=False)
        patch.chdir(tmp_path)
        try:
            module.main(module.parse_args(words))
        except Stopped:
            return None
        except SystemExit as error:
            message = capsys.readouterr().err
            assert error.code == 2 and message.count("\n") == 1 and message.startswith("error: "), message
            return message
        except (RuntimeError, MemoryError) as error:  # more memory than there is
            arguments._explain(type(error), error, error.__traceback__)
            message = capsys.readouterr().err
            assert message.count("\n") == 1 and "out of memory" in message, message
            return message
    return None


def test_no_script_is_forgotten():
    there = {path.name for path in ROOT.glob("*.py")}
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    there &= set(listed.stdout.split()) or there  # a copy that somebody works on is not a part of the project
    assert {name.removesuffix(".py") for name in there} == {*SCRIPTS, *OTHERS, "demo"}


@pytest.mark.parametrize("script", [*SCRIPTS, *OTHERS])
def test_every_flag_is_declared_with_its_limits(script):
    for action in options(script):
        flag, number = action.option_strings[0], (int, float)
        values = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        if isinstance(action, toggle) or any(isinstance(v, bool) for v in values) or action.nargs == 0:
            assert isinstance(action, toggle) and f"--no-{flag[2:]}" in action.option_strings, flag
        elif action.type in number or any(isinstance(v, number) for v in values):
            assert hasattr(action.type, "kind"), f"{flag} takes any number"
            for value in values:
                assert value is None or action.type(str(value)) == value, f"{flag} would refuse its default"


@pytest.mark.parametrize("script", [*SCRIPTS, *OTHERS])
def test_words_and_negative_numbers_are_refused(script, tmp_path, capsys):
    start = flags(script, tmp_path) if script in SCRIPTS else OTHERS[script].split()
    for flag, kind in numeric(script).items():
        for value in ("many", "-1", "1.5" if kind is int else "nan", "-inf"):
            message = outcome(script, [*start, flag, value], tmp_path, capsys)
            assert message and flag in message, f"{flag} {value}: {message}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_zero_and_absurd_numbers_are_refused_or_mean_something(script, tmp_path, capsys):
    for flag, kind in numeric(script).items():
        for value in ("0", "1000000000000000" if kind is int else "1e300"):
            outcome(script, [*flags(script, tmp_path), flag, value], tmp_path, capsys)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (positive(int), ["1", "1000000000"], ["0", "-3", "1.0", "1e3", "", "1000000001", "inf", "nan"]),
        (positive(float), ["1e-9", "3"], ["0", "-0.1", "inf", "nan", "1e10", "x"]),
        (arguments.at_least(2), ["2", "3"], ["1", "2.5"]),
        (arguments.at_least(0, float, high=3), ["0", "3", "2.5"], ["-1e-9", "3.01"]),
        (share, ["1e-6", "1"], ["0", "1.01"]),
        (probability, ["0", "1"], ["-0.01", "1.01"]),
        (arguments.below_one, ["0", "0.999"], ["1", "-0.1"]),
    ],
)
def test_types(kind, good, bad):
    assert [kind(text) for text in good] == [float(text) for text in good]
    assert all(type(kind(text)) is kind.kind for text in good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


@pytest.mark.parametrize(
    "words, given",
    [
        ("", {"data", "out"}),
        ("--seed 0 --no-resume --stats auto", {"data", "out", "seed", "resume", "stats"}),
        ("--chunk=4 --resume", {"data", "out", "chunk", "resume"}),
    ],
)
def test_flags_that_are_given_are_known_from_their_defaults(words, given, tmp_path):
    args = made(tmp_path, *words.split())
    assert args.given == given == args.replace(seed=1).given
    assert (args.strength, args.seed, args.chunk, args.script) == (0.5, 0, 4, "test_arguments.py")


@pytest.mark.parametrize(
    "words, name, expected",
    [
        ("mae --epochs 3", "warmup_epochs", 0.3),
        ("mae --epochs 79", "warmup_epochs", 7.9),
        ("mae --epochs 80", "warmup_epochs", 40),
        ("mae --epochs 79 --warmup-epochs 40", "warmup_epochs", 40),
        ("mocov3 --arch vit_tiny --epochs 20", "warmup_epochs", 2.0),
        ("simclr --epochs 1", "warmup_epochs", 0.1),
        ("simclr --epochs 3 --warmup-epochs 0", "warmup_epochs", 0),
        ("rotation_pred --epochs 5", "warmup_epochs", 0.5),
        ("swav --epochs 20", "queue_epoch", 2.0),
        ("swav --epochs 20 --queue-epoch 15", "queue_epoch", 15),
        ("swav --epochs 200", "queue_epoch", 15),
        ("dino --epochs 1", "freeze_epochs", 0.1),
        ("dino --epochs 1 --freeze-epochs 1", "freeze_epochs", 1),
        ("esvit --epochs 2", "freeze_epochs", 1),
    ],
)
def test_defaults_made_for_long_runs_are_shortened(words, name, expected, capsys):
    """What takes more than half of the run becomes a tenth of it, unless it was asked for."""
    args = parsed(*words.split(), "--batch-size", 16)
    before = getattr(args, name)
    arguments.check_schedule(args)
    flag = f"--{name.replace('_', '-')}"
    note = (
        f"note        the default {flag} {before} is for longer runs: here it is {expected:g} of --epochs {args.epochs}"
    )
    assert getattr(args, name) == pytest.approx(expected)
    assert (note in capsys.readouterr().out.splitlines()) is (expected != before)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_of_three_epochs_needs_no_other_flag(script):
    args = parsed(script, "--epochs", 3, "--batch-size", 64)
    arguments.check_schedule(args)
    assert args.warmup_epochs < 3 and "warmup_epochs" in args.held


# ------------------------------------------------------------------------------------------------------- recipe
def made(tmp_path, *words):
    """The arguments of a script with a flag of its own in each kind of group."""
    parser = Parser("doc")
    parser.add_common(__file__)
    parser.add_argument_group("method").add_argument("--strength", type=share, default=0.5)
    parser.add_argument_group("speed", recipe=False).add_argument("--chunk", type=positive(int), default=4)
    return parser.parse_args(["--data", "fake:8", "--out", str(tmp_path), *words])


class Nothing:
    """What has no state."""

    state_dict = dict

    def load_state_dict(self, state):
        assert state == {}


def test_a_new_flag_belongs_to_the_recipe_unless_its_group_says_no(tmp_path, capsys):
    none = [Nothing()] * 3
    args = made(tmp_path)
    assert "strength" in args.held and "chunk" not in args.held
    save_file(tmp_path / "last.pt", run_state(args, 5, 8, *none))
    other = made(tmp_path, "--chunk", "5", "--workers", "1", "--max-steps", "9", "--data", "fake:9")
    assert resume(other, 8, *none)["step"] == 5
    assert "--strength was 0.5, is 0.25)" in refused(capsys, resume, made(tmp_path, "--strength", "0.25"), 8, *none)
    assert "--seed was 0, is 1)" in refused(capsys, resume, made(tmp_path, "--seed", "1"), 8, *none)
    assert "had 8 images, has 9)" in refused(capsys, resume, args, 9, *none)
    assert resume(made(tmp_path, "--strength", "0.25", "--no-resume"), 8, *none) is None


@pytest.mark.parametrize("script", SCRIPTS)
def test_recipe_of_every_script(script):
    args = parsed(script)
    held = {"seed", "image_size", "channels", "stats", "arch", "width", "epochs", "warmup_epochs", "batch_size", "lr"}
    assert held | {"weight_decay"} <= set(args.held)
    free = {
        "data",
        "train_list",
        "val_list",
        "max_bad",
        "max_pixels",
        "out",
        "init",
        "resume",
        "max_steps",
        "accum",
        "workers",
    }
    free |= {"device", "precision", "compile", "deterministic", "log_every", "save_every", "knn_every"}
    assert not free & set(args.held) and free <= vars(args).keys()


def test_values_and_copies_of_arguments():
    args = parsed("simsiam", *TINY.split())
    other = args.replace(lr=7.0)
    assert (other.lr, args.lr, other.held, other.defaults) == (7.0, 0.05, args.held, args.defaults)
    assert args.defaults["batch_size"] == 512 and args.batch_size == 16
    assert argparse.Namespace(**args.plain(), x=1).x == 1 and args.replace(data={1}).plain()["data"] == "{1}"
