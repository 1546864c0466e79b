import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks gain nothing from more threads, and a fixed number keeps sums in a fixed order."""
    torch.set_num_threads(1)
