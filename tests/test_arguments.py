"""Every numeric flag of every script with values that make no sense: one line and exit code 2, never a traceback."""

import argparse
import importlib

import pytest

from common import log
from tests.helpers import SCRIPTS, flags

EVALUATIONS = {
    "eval_knn": "--pretrained random --data fake:64 --arch resnet18 --width 0.125 --image-size 16",
    "eval_linear": "--pretrained random --data fake:64 --arch resnet18 --width 0.125 --image-size 16",
    "eval_finetune": "--pretrained random --data fake:64 --arch resnet18 --width 0.125 --image-size 16",
    "eval_svm": "--pretrained random --data /nowhere --arch resnet18 --width 0.125",
    "features": "--pretrained random --data fake:64 --arch resnet18 --width 0.125 --image-size 16",
    "pack": "/nowhere --out /nowhere",
    "export": "--pretrained random --to torchvision --out /nowhere/x.pt",
}


class Done(Exception):
    """The script has accepted its arguments and would begin to train."""


def numeric_flags(script):
    """{flag: type} of a script's parser, from the parser itself."""
    found = {}

    class Captured(Exception):
        pass

    def capture(parser, *argv):
        for action in parser._actions:
            if action.type in (int, float) and action.option_strings:
                found[action.option_strings[0]] = action.type
        raise Captured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        with pytest.raises(Captured):
            importlib.import_module(script).parse_args([])
    return found


def outcome(script, words, tmp_path, capsys):
    """("refused", the line), or ("accepted", "") when the script would have begun to train."""
    module = importlib.import_module(script)

    def stop(*args, **kwargs):
        raise Done

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "describe"):
            patch.setattr(module, "describe", stop)
        patch.chdir(tmp_path)
        try:
            module.main(module.parse_args(words))
        except Done:
            return "accepted", ""
        except SystemExit as error:
            message = capsys.readouterr().err
            assert error.code == 2 and message.count("\n") == 1 and message.startswith("error: "), message
            return "refused", message
        except (RuntimeError, MemoryError) as error:  # more memory than there is
            log._explain(type(error), error, error.__traceback__)
            message = capsys.readouterr().err
            assert message.count("\n") == 1 and "out of memory" in message, message
            return "refused", message
    return "accepted", ""


@pytest.mark.parametrize("script", [*SCRIPTS, *EVALUATIONS])
def test_words_and_negative_numbers_are_refused(script, tmp_path, capsys):
    start = flags(script, tmp_path) if script in SCRIPTS else EVALUATIONS[script].split()
    found = numeric_flags(script)
    for flag, kind in found.items():
        for value in ("many", "-1", "1.5" if kind is int else "nan", "-inf"):
            result, message = outcome(script, [*start, flag, value], tmp_path, capsys)
            assert result == "refused", f"{flag} {value}"
            assert flag in message, f"{flag} {value}: {message}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_zero_and_absurd_numbers_are_refused_or_mean_something(script, tmp_path, capsys):
    start = flags(script, tmp_path)
    for flag, kind in numeric_flags(script).items():
        for value in ("0", "1000000000000000" if kind is int else "1e300"):
            outcome(script, [*start, flag, value], tmp_path, capsys)
