"""Imported before torch, whose import takes seconds: Ctrl-C in this time leaves one line, and exit code 130 as ever."""

import sys


def one_line(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = one_line
