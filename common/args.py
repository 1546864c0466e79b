"""Command lines: the flags that all scripts share, types that check a flag where it is declared, one line per mistake.

A flag belongs to the recipe, and must be the same when a run is resumed, unless its group says `recipe=False`.
"""

import argparse
import copy
import difflib
import errno
import functools
import math
import os
import sys
from pathlib import Path

import torch

from common.distributed import first_here, print0, world_size
from common.images import MAX_PIXELS, limit_pixels

NAMED_SETS = {"digits": 16, "cifar10": 32, "cifar100": 32, "stl10": 96, "fake": 64}  # --data, and its --image-size
FREE = "may change when a run is resumed"
toggle = argparse.BooleanOptionalAction  # --x / --no-x


def fail(message, code=2):
    """Ends the program with one line on stderr (once per machine): code 2 means the user can mend it."""
    if first_here():  # what is missing on one machine may be there on that of the main process
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _explain(kind, error, trace, flags=("--batch-size", "--accum", "--resume")):
    """The hook for errors that nobody caught: those that a user can mend become one line, others stay as they are.
    flags: of the script."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        remedies = {
            "--batch-size": "lower --batch-size",
            "--accum": "raise --accum, which keeps the batch but takes it in smaller parts",
            "--image-size": "take a smaller --image-size",
        }
        remedy = ", or ".join(text for flag, text in remedies.items() if flag in flags) or "free some"
        print(f"error: out of memory: {remedy}", file=sys.stderr, flush=True)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr, flush=True)
    elif isinstance(error, KeyboardInterrupt):
        saved = "; what was saved last is in --out" if "--resume" in flags else ""
        print(f"interrupted{saved}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


# ------------------------------------------------------------------------------------------------------ types
def number(kind, low=-math.inf, high=1e9, above=-math.inf, below=math.inf):
    """A type of argparse: an int or a finite float from `low` to `high`, greater than `above`, less than `below`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a {'whole' if kind is int else 'finite'} number, not {text!r}")
        for wrong, bound in (
            (value < low, f"at least {low:g}"),
            (value <= above, f"greater than {above:g}"),
            (value > high, f"at most {high:g}"),
            (value >= below, f"less than {below:g}"),
        ):
            if wrong:
                raise argparse.ArgumentTypeError(f"must be {bound}, not {text}")
        return value

    parse.kind = kind
    return parse


def positive(kind, high=1e9):
    return number(kind, above=0, high=high)


def at_least(low, kind=int, high=1e9):
    return number(kind, low=low, high=high)


share = number(float, above=0, high=1)
probability = number(float, low=0, high=1)
below_one = number(float, low=0, below=1)  # what is kept of an average: 1 would never take anything in
width, image_size, channels = positive(float, 64), at_least(8, high=10_000), positive(int, 10_000)


# ----------------------------------------------------------------------------------------------------- parser
class Arguments(argparse.Namespace):
    """The values of all flags. held: names of those that must agree when a run is resumed. defaults: by name. given:
    names of those that the command line has. script: name of the file that trains, "" of an evaluation."""

    __slots__ = ("defaults", "given", "held", "script")  # which vars() does not list

    def replace(self, **changes):
        """A copy with other values."""
        new = copy.copy(self)
        vars(new).update(changes)
        return new

    def plain(self):
        """The values as a dictionary of what a checkpoint and JSON can hold."""
        return {k: v if isinstance(v, (int, float, str, type(None))) else str(v) for k, v in vars(self).items()}


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, takes no abbreviated flags and reports a mistake in one line."""

    def __init__(self, doc, **kwargs):
        super().__init__(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.script = ""
        sys.excepthook = functools.partial(_explain, flags=self._option_string_actions)

    def add_argument_group(self, title, recipe=True):
        group = super().add_argument_group(title, None if recipe else FREE)
        group.recipe = recipe
        return group

    def add_common(self, script, data=True):
        """What every pre-training script takes. script: its __file__. data: is --data required?"""
        self.script = Path(script).name
        add = self.add_argument_group("data", recipe=False).add_argument
        add("--data", required=data, help=f"folder or .tar of images, or {', '.join(NAMED_SETS)}")
        add("--train-list", help="list file of training images, 'relative/path[ label]' per line")
        add("--val-list", help="list file of validation images")
        self.add_max_bad(add)
        self.add_max_pixels(add)
        add = self.add_argument_group("images").add_argument
        add("--image-size", type=image_size, help="pixels of a view (default: 224, or what fits a small named set)")
        add("--channels", type=channels, default=3, help="per image; any file converts to 1 or 3")
        text = "normalise by ImageNet's mean and deviation or by those of the images (default: auto unless 3 channels)"
        add("--stats", choices=["imagenet", "auto"], help=text)
        add("--seed", type=at_least(0), default=0)
        group = self.add_argument_group("run", recipe=False)
        group.add_argument("--out", default=f"runs/{Path(script).stem}", help="run folder")
        group.add_argument("--init", help="weights to start from, with a fresh schedule")
        self.add_loop(group)
        self._add_machine(group)
        text = "epochs between looks at the features: k-NN accuracy, RankMe, alpha-ReQ (0: never)"
        group.add_argument("--knn-every", type=at_least(0), default=10, help=text)

    def add_pretrained(self, lists=True):
        """What every evaluation takes: a network and the data to judge it on. Returns the group of the run's flags."""
        add = self.add_argument_group("what is evaluated").add_argument
        add("--pretrained", required=True, help="backbone.pt, last.pt, a published file, or random")
        text = "only with --pretrained random (default: {}); else read from the file"
        add("--arch", help=text.format("resnet50"))
        add("--width", type=width, help=text.format(1))
        add("--channels", type=channels, help=text.format(3))
        text = "of the images: one number, or one per channel (default: what the file says, else ImageNet's)"
        add("--mean", type=probability, nargs="+", help=text)
        add("--std", type=positive(float), nargs="+", help=text)
        text = "take the backbone under this name in the file, where it holds several (default: says which it takes)"
        add("--pretrained-key", metavar="NAME", help=text)
        add("--image-size", type=image_size, help="default: that of the file, else what fits the data")
        add("--seed", type=at_least(0), default=0)
        group = self.add_argument_group("run", recipe=False)
        group.description, add = None, group.add_argument  # until there is something to resume
        add("--data", required=True, help="folder with train/ and val/, or digits, cifar10[:DIR] ...")
        if lists:
            add("--train-list", help="list file of training images, 'relative/path label' per line")
            add("--val-list", help="list file of test images")
        self.add_max_pixels(add)
        add("--trust-pickle", action=toggle, default=False, help="allow --pretrained to run code while it is read")
        add("--out", help="folder of the results (default: beside the checkpoint, or runs/random)")
        self._add_machine(group)
        return group

    @staticmethod
    def add_max_bad(add):
        add("--max-bad", type=at_least(0), default=100, help="stop after this many undecodable training images")

    @staticmethod
    def add_max_pixels(add):
        add("--max-pixels", type=positive(float), default=MAX_PIXELS, help="million pixels that an image may have")

    def _add_machine(self, group):
        add = group.add_argument
        add("--workers", type=at_least(0, high=1000), default=8, help="loading threads per process")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
        add("--precision", choices=["auto", "fp32", "bf16", "fp16", "fp64"], default="auto")
        text = "on CUDA, algorithms that give the same bits in every run, which costs speed; a CPU always does"
        add("--deterministic", action=toggle, default=False, help=text)

    def add_loop(self, group, log_every=20, network=True):
        """What every script that trains takes. network: it trains a network, not only classifiers on features."""
        group.description, add = FREE, group.add_argument
        add("--resume", action=toggle, default=True, help="continue from what was saved in --out")
        add("--max-steps", type=at_least(0), default=0, help="stop after so many steps, keeping the schedule (0: off)")
        if network:
            add("--accum", type=positive(int), default=1, help="micro-batches per step")
            add("--compile", action=toggle, default=False, help="torch.compile the model")
        add("--log-every", type=positive(int), default=log_every, help="steps")
        add("--save-every", type=at_least(0, float), default=10, help="minutes")

    def parse_args(self, args=None, namespace=None):
        """Flags without a text get their name as one."""
        for action in self._actions:
            action.help = action.help or action.dest.replace("_", " ")
        parsed = super().parse_args(args, Arguments())
        parsed.defaults, parsed.script = {action.dest: action.default for action in self._actions}, self.script
        for action in self._actions:
            action.default = argparse.SUPPRESS
        parsed.given = set(vars(super().parse_args(args)))
        for action in self._actions:
            action.default = parsed.defaults[action.dest]
        limit_pixels(getattr(parsed, "max_pixels", MAX_PIXELS))
        groups = [group for group in self._action_groups if not getattr(group, "recipe", True)]
        parsed.held = sorted(vars(parsed).keys() - {a.dest for group in groups for a in group._group_actions})
        return parsed

    def error(self, message):
        _, unknown, words = message.partition("unrecognized arguments: ")
        first, near = (words.split() or [""])[0], self._nearest(words)
        message = f"{first} is unknown: did you mean {near}?" if unknown and near else message
        if unknown and os.path.exists(first):  # a pattern that the shell has replaced by the names that fit it
            message = f"{first}: one name more than expected; put a pattern in quotes (--data 'shards/*.tar')"
        fail(f"{message} (try: python {self.prog} --help)")

    def _nearest(self, words):
        """The flag that the first of some unknown words may have meant: by its letters or, if short, its initials."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        plain = {"".join(part[0] for part in flag[2:].split("-")): flag for flag in reversed(flags) if "-" in flag[2:]}
        plain |= {flag[2:].replace("-", ""): flag for flag in flags}
        name = words.split("=")[0].split()[0] if words.strip("= ") else ""
        name = name.lower().strip("-_\u2010\u2011\u2012\u2013\u2014\u2015\u2212").replace("-", "").replace("_", "")
        return plain.get(next(iter(difflib.get_close_matches(name, plain, 1, 0.7)), ""), "")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        text = action.help.replace(" (default: %(default)s)", "")  # which some versions add to a toggle
        if "default" in text or action.default in (None, "", argparse.SUPPRESS):
            return text
        if isinstance(action, toggle):
            return f"{text} (default: {'on' if action.default else 'off'})"
        return super()._get_help_string(action)


def default_size(data):
    """The image size to use when none is asked for: that of a small named set, else 224."""
    return NAMED_SETS.get(str(data).partition(":")[0], 224)


def check_schedule(args):
    """Refuses batches that cannot be shared out, and a warm-up that never ends. Defaults that are numbers of epochs and
    would take more than half of a short run become a tenth of it."""
    for name, value in args.defaults.items():
        value = getattr(args, name) if name.endswith(("_epoch", "_epochs")) and name not in args.given else 0
        if value and 2 * value > args.epochs:
            setattr(args, name, args.epochs / 10)
            flag, now = f"--{name.replace('_', '-')}", f"{args.epochs / 10:g} of --epochs {args.epochs}"
            print0(f"note        the default {flag} {value} is for longer runs: here it is {now}")
    if args.warmup_epochs and args.warmup_epochs >= args.epochs:
        remedy = f"try --warmup-epochs {args.epochs // 10}"
        fail(f"--warmup-epochs {args.warmup_epochs} must be smaller than --epochs {args.epochs}: {remedy}")
    parts = world_size() * args.accum
    if args.batch_size % parts:
        by, near = f"{world_size()} processes x --accum {args.accum}", fitting_batch(args.batch_size, parts)
        fail(f"--batch-size {args.batch_size} is not divisible by {by}: try {near}")


def fitting_batch(near, parts, most=math.inf):
    """The batch nearest to `near` that `parts` share in equal parts of at least two images (which is what batch norm
    needs), of at most so many images; 0 if there is none."""
    fitting = max(2, round(min(near, most) / parts)) * parts
    while fitting > most:
        fitting -= parts
    return fitting if fitting >= 2 * parts else 0
