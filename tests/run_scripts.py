"""Run by torchrun: runs several scripts, one after the other. Argument: [[script, [flag, ...]], ...] as JSON."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import log, run
from common.distributed import end_processes

if __name__ == "__main__":
    for script, flags in json.loads(sys.argv[1]):
        module = importlib.import_module(script)
        for user in (run, log, module):  # one process group for all: a second one may meet the addresses of the first
            user.end_processes = lambda: None
        module.main(module.parse_args(flags))
    end_processes()
