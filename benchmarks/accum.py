"""Bytes that each of two processes hands to collectives per optimiser step, with --accum 1 and with --accum 4.

    python benchmarks/accum.py                  # simsiam, simclr
    python benchmarks/accum.py byol moco

Gradients travel once per step, however many micro-batches it has, or the run fails here. What depends on the batch
travels for every micro-batch: statistics of batch norm (about two numbers per channel, forward and backward, whatever
the number of images, so four times as much in four micro-batches), and outputs that are gathered (in total as many as
there are images, and their gradients, which every process sends for all of them).

Runs each script's own `main` under torchrun (gloo, CPU), with a network of a few channels and 16 images per step, and
counts in its second step. A ring moves 2 (W - 1) / W times these bytes for a sum over W processes.
"""

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import machine
from common import batchnorm, distributed, log, run
from tests.helpers import SCRIPTS, command, flags

ACCUM = (1, 4)
KINDS = ("gradients", "batch norm", "gathered", "other")


def counted(script, words):
    """{kind: bytes of this process in the second step of a run}, and the bytes of all gradients."""
    module, sent, steps, within = importlib.import_module(script), dict.fromkeys(KINDS, 0), [], ["other"]
    parallel, stepping, normalise = run.parallel, run.Run.steps, batchnorm.SyncBatchNorm.forward
    forward, backward = distributed._Gather.forward, distributed._Gather.backward
    reduce, gather = dist.all_reduce, dist.all_gather

    def during(kind, function, *args):
        within.append(kind)
        try:
            return function(*args)
        finally:
            within.pop()

    def hooked(model):
        steps.append({"trained": sum(p.nbytes for p in model.parameters() if p.requires_grad)})
        net = parallel(model)
        net.register_comm_hook(None, lambda state, bucket: during("gradients", allreduce_hook, state, bucket))
        return net

    def all_reduce(tensor, *rest, **more):
        sent[within[-1]] += tensor.nbytes
        return reduce(tensor, *rest, **more)

    def all_gather(parts, tensor, *rest, **more):
        sent[within[-1]] += tensor.nbytes
        return gather(parts, tensor, *rest, **more)

    def gathering(ctx, rows):
        ctx.kind = "batch norm" if within[-1] == "batch norm" else "gathered"
        return during(ctx.kind, forward, ctx, rows)

    def returning(ctx, grad):
        return during(ctx.kind, backward, ctx, grad)

    def counting(self, epoch, order=None):
        for step in stepping(self, epoch, order):
            before = dict(sent)
            yield step
            steps.append({kind: sent[kind] - before[kind] for kind in KINDS})

    changes = [(run, "parallel", hooked), (run.Run, "steps", counting), (dist, "all_reduce", all_reduce)]
    changes += [(distributed._Gather, "forward", staticmethod(gathering))]
    changes += [(distributed._Gather, "backward", staticmethod(returning)), (dist, "all_gather", all_gather)]
    norm = lambda self, x: during("batch norm", normalise, self, x)  # noqa: E731
    changes += [(batchnorm.SyncBatchNorm, "forward", norm)]
    changes += [(user, "end_processes", lambda: None) for user in (run, log, module)]  # one group for all runs
    patches = [mock.patch.object(*change, create=True) for change in changes]
    for patch in patches:
        patch.start()
    module.main(module.parse_args(words))
    for patch in patches:
        patch.stop()
    return steps[2] | steps[0]


def worker(scripts):
    """In each of the two processes."""
    for script in scripts:
        for accum in ACCUM:
            folder = [tempfile.mkdtemp()]
            if not dist.is_initialized():
                distributed.init_processes("cpu")
            dist.broadcast_object_list(folder)
            more = ("--max-steps", 3, "--log-every", 100, "--accum", accum, "--workers", 0, "--device", "cpu")
            found = counted(script, flags(script, folder[0], *more))
            distributed.print0(json.dumps({"script": script, "accum": accum, "sent": found}))
    distributed.end_processes()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=["simsiam", "simclr"])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.scripts) - set(SCRIPTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(SCRIPTS)}")
    if args.worker:
        return worker(args.scripts)
    print(machine())
    print("bytes per process and step, 2 processes (gloo), 16 images per step, network of a few channels\n")
    print(f"{'':<14}{'--accum':>8}" + "".join(f"{kind:>18}" for kind in KINDS) + f"{'trained':>12}")
    done = command("benchmarks/accum.py", "--worker", *args.scripts, processes=2, check=0, timeout=1800)
    failed = []
    for line in done.stdout.splitlines():
        if line.startswith('{"script"'):
            found = json.loads(line)
            sent, trained = found["sent"], found["sent"]["trained"]
            cells = "".join(f"{sent[kind]:>18,}" for kind in KINDS)
            print(f"{found['script']:<14}{found['accum']:>8}{cells}{trained:>12,}", flush=True)
            failed += [found["script"]] if sent["gradients"] != trained else []
    if failed:
        sys.exit(f"error: more or less than the gradients of one backward pass: {', '.join(failed)}")
    print("\ngradients are sent once per step: as many bytes as the trained parameters have")


if __name__ == "__main__":
    main()
