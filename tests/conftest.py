import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import helpers


def pytest_addoption(parser):
    text = "run, for this copy of a page, the tests that every page passes, and no others: --script mine for mine.py"
    parser.addoption("--script", metavar="NAME", help=text)
    parser.addoption("--flags", default="", help="flags that make its runs tiny, beside those it has from its original")


def pytest_configure(config):
    if script := config.getoption("--script"):
        script = script.removesuffix(".py")
        if not (helpers.ROOT / f"{script}.py").exists():
            raise pytest.UsageError(f"--script {script}: there is no {script}.py here")
        helpers.only(script, config.getoption("--flags"))


def pytest_collection_modifyitems(config, items):
    """With --script, what is left are the tests that have it as their parameter; those of the repository's shape ask
    for what a page of a paper has."""
    if config.getoption("--script"):
        mine = [item for item in items if getattr(item, "callspec", None) and item.path.stem != "test_repository"]
        mine = [item for item in mine if item.callspec.params.get("script") in helpers.SCRIPTS]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks gain nothing from more threads, and a fixed number keeps sums in a fixed order."""
    torch.set_num_threads(1)
