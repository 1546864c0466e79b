"""Run by torchrun: trains several scripts one after the other in the same processes. Argument: JSON [[script, flags]]."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    for script, flags in json.loads(sys.argv[1]):
        module = importlib.import_module(script)
        module.main(module.parse_args(flags))
