"""Run by torchrun: trains several scripts, one after the other. Argument: [[script, [flag, ...]], ...] as JSON."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.distributed import finish

if __name__ == "__main__":
    for script, flags in json.loads(sys.argv[1]):
        module = importlib.import_module(script)
        module.finish = lambda: None  # one process group for all: a second one may meet the addresses of the first
        module.main(module.parse_args(flags))
    finish()
