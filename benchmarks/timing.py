"""What the benchmarks share: their flags, a line about the machine, repeats in turns, and tables of medians."""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import torch


def parser(doc, repeats, device=True, cpu_time=True):
    """A parser with the flags that nearly all benchmarks have."""
    new = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    new.add_argument("--repeats", type=int, default=repeats)
    if cpu_time:
        text = "CPU time of all threads instead of time, for a machine with other work"
        new.add_argument("--cpu-time", action="store_true", help=text)
    if device:
        new.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    return new


def machine(device="cpu"):
    """The hardware, its load and the version of torch, in one line."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    gpu = f"{torch.cuda.get_device_name(device)}, " if torch.device(device).type == "cuda" else ""
    threads = f"{cores} cores, {torch.get_num_threads()} threads, load {load}"
    return f"machine: {gpu}{model}, {threads}, {platform.system()}, torch {torch.__version__}"


def settle(device):
    """Waits until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def clock(args):
    """What --cpu-time asks for."""
    return time.process_time if args.cpu_time else time.perf_counter


def in_turns(names, repeats):
    """The names of each repeat, in another order every time, so that a drift of the machine affects all alike."""
    names = list(names)
    for repeat in range(repeats):
        first = repeat % len(names)
        yield names[first:] + names[:first]


def measure(jobs, repeats, clock=time.perf_counter, device="cpu", warm_up=False):
    """{name: function} -> {name: what the clock counted in each repeat}. warm_up: one repeat before, not counted."""
    spent = {name: [] for name in jobs}
    for names in in_turns(jobs, repeats + warm_up):
        for name in names:
            settle(device)
            began = clock()
            jobs[name]()
            settle(device)
            spent[name].append(clock() - began)
    return {name: values[warm_up:] for name, values in spent.items()}


def table(times, unit, convert=lambda seconds: seconds, digits=2, columns=None):
    """A row per job: median and range of its times, converted to the unit. columns: {heading: {name: text}}, further
    ones."""
    print(f"\n{'':28}{f'median {unit}':>16}{'min-max':>20}" + "".join(f"  {heading:>12}" for heading in columns or {}))
    for name, seconds in times.items():
        values = [convert(s) for s in seconds]
        spread = f"{min(values):.{digits}f}-{max(values):.{digits}f}" if len(values) > 1 else ""
        more = "".join(f"  {texts.get(name, ''):>{max(12, len(h))}}" for h, texts in (columns or {}).items())
        print(f"{name:28}{statistics.median(values):>16.{digits}f}{spread:>20}{more}", flush=True)


def milliseconds(seconds):
    return 1000 * seconds


def speed(times, base):
    """A column of `table`: how many times as fast as `base` each job is."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {f"speed to {base}": {name: f"{medians[base] / median:.2f}x" for name, median in medians.items()}}


def duration(times, base):
    """A column of `table`: how many times as long as `base` each job takes."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {f"time to {base}": {name: f"{median / medians[base]:.2f}x" for name, median in medians.items()}}
