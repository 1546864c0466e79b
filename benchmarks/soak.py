"""Does anything grow in a long run? 10,000 steps on fake data, with the memory, open files, threads, processes and
shared segments of the run along the way, those of its loading process included.

    python benchmarks/soak.py                 # simsiam; Linux, a few minutes
    python benchmarks/soak.py moco --steps 20000

Every step is logged, each tenth epoch measures the k-NN accuracy, and the state is saved all the time. After the first
tenth of the steps neither open files nor threads may grow, and memory by less than 3 %.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.kill import start, step_of
from tests.helpers import SCRIPTS, flags


def usage(pid):
    """(resident MB, open files, threads, processes, mappings of shared memory) of a process and its children."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    total = [0.0, 0, 0, len(pids), 0]
    for each in pids:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
        total[0] += int(status["VmRSS"].split()[0]) / 1024
        total[1] += len(os.listdir(f"/proc/{each}/fd"))
        total[2] += int(status["Threads"])
        total[4] += sum("/dev/zero" in line for line in Path(f"/proc/{each}/maps").read_text().splitlines())
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="?", default="simsiam", choices=SCRIPTS)
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()
    folder = tempfile.mkdtemp()
    more = ["--epochs", args.steps // 4, "--knn-every", 10, "--save-every", 0.01]
    process = start([f"{args.script}.py", *flags(args.script, folder, *more)])
    rows, tenth = [], args.steps // 10
    print(f"{args.script}: {'step':>8}{'MB':>10}{'files':>8}{'threads':>9}{'processes':>11}{'shared':>8}")
    for line in process.stdout:
        step = int(step_of(line) or 0)
        if step and step % tenth == 0 and step < args.steps:
            rows.append(usage(process.pid))
            memory, files, threads, processes, shared = rows[-1]
            counts = f"{memory:>10.1f}{files:>8}{threads:>9}{processes:>11}{shared:>8}"
            print(f"{'':{len(args.script)}}  {step:>8}{counts}", flush=True)
    shutil.rmtree(folder)
    if process.wait():
        sys.exit(f"error: the run ended with code {process.returncode}")
    first, last = rows[0], rows[-1]
    grown = last[0] > 1.03 * first[0] or any(b > a for a, b in zip(first[1:], last[1:], strict=True))
    print("something grows" if grown else f"nothing grows: memory {last[0] / first[0] - 1:+.1%}")
    sys.exit(grown)


if __name__ == "__main__":
    main()
