"""Kills pre-training runs with SIGKILL at random instants, starts them again, and compares with runs left alone.

    python benchmarks/kill.py                      # 20 kills in a row for each of simsiam, moco, swav, odc and mae
    python benchmarks/kill.py byol --kills 5

Every step is a log step and is saved, so that many kills fall into the writing of last.pt. At the end the weights,
optimiser, queues, banks, centroids and the records of the log must equal those of the run left alone, bit for bit. Runs
on one thread of the CPU: there, two runs of one command agree bit for bit in the first place.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.helpers import ROOT, SCRIPTS, environment, flags, records, start_of, state, tensors


def start(words):
    """Starts a script in a process of its own. Its stdout has everything that it prints."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(start_of(*words), cwd=ROOT, env=environment(), **output)


def step_of(line):
    """The step of a line of a run, as text; None if the line is of something else."""
    return line.split("  step ")[1].split("/")[0] if "  step " in line else None


def killed_run(words, kills, draw):
    """Runs a command to its end through that many kills. Returns the steps at which it was killed.

    Each kill comes a moment after one of its first steps or, one time in five, at a random moment of its start.
    """
    steps = []
    while len(steps) < kills:
        process = start(words)
        step, lines = None, draw.randrange(1, 4)
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 4))
        else:
            for line in process.stdout:
                if step_of(line):
                    step, lines = step_of(line), lines - 1
                if not lines:
                    time.sleep(draw.expovariate(20))
                    break
        if process.poll() is None:
            process.kill()
            steps.append(step or "start")
        output = process.stdout.read()
        if process.wait() not in (-9, 0):
            sys.exit(f"error: {' '.join(words)} ended with code {process.returncode}:\n{output[-2000:]}")
        if process.returncode == 0:  # it came to its end: nothing is left to kill
            return steps
    process = start(words)
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"error: {' '.join(words)} ended with code {process.returncode}:\n{output[-2000:]}")
    return steps


def differences(a, b):
    """Names of what differs between two run folders: tensors and numbers of last.pt, records of log.jsonl."""
    one, two = tensors(state(a)), tensors(state(b))
    found = sorted(one.keys() ^ two.keys())
    found += [name for name in one.keys() & two.keys() if not torch.equal(one[name], two[name])]
    keep = ("step", "epoch", "loss", "lr", "std", "knn", "clusters", "nmi_previous")
    logs = [{s: {k: r.get(k) for k in keep} for s, r in records(out).items()} for out in (a, b)]
    return found + [f"log of step {s}" for s in logs[0].keys() | logs[1].keys() if logs[0].get(s) != logs[1].get(s)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=["simsiam", "moco", "swav", "odc", "mae"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    unknown = set(args.scripts) - set(SCRIPTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(SCRIPTS)}")
    draw, failed = random.Random(args.seed), False
    for script in args.scripts:
        folder = Path(tempfile.mkdtemp())
        more = ["--epochs", -(-args.steps // 4), "--save-every", 0]
        words = [[f"{script}.py", *flags(script, folder / name, *more)] for name in ("alone", "killed")]
        began = time.monotonic()
        process = start(words[0])
        process.communicate()
        if process.returncode:
            sys.exit(f"error: {script} fails when left alone")
        steps = killed_run(words[1], args.kills, draw)
        found = differences(folder / "alone", folder / "killed")
        failed |= bool(found) or len(steps) < args.kills
        verdict = "equal bit for bit" if not found else f"{len(found)} differences: {', '.join(found[:5])}"
        seconds = time.monotonic() - began
        print(f"{script}: {len(steps)} kills at steps {' '.join(steps)}: {verdict} ({seconds:.0f} s)", flush=True)
        shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    main()
