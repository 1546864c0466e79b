"""The names under which `common/datasets.py` was imported before; new code imports from there."""

from common.datasets import Files  # noqa: F401
from common.datasets import open_dataset as build  # noqa: F401
