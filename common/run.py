"""A training run: where it starts, when it saves, what it logs and when it stops. It calls no model and no loss."""

import os
import time

import torch

from common.args import check_schedule
from common.augment import EvalView
from common.batchnorm import sync_batch_norm
from common.checkpoint import init_from, resume, run_state, save_file, save_run
from common.datasets import open_dataset
from common.distributed import end_processes, init_processes, parallel, process_mean
from common.knn import monitor
from common.loader import Loader, adapt_views
from common.log import Logger, describe
from common.optim import precision, upcast
from common.pictures import save_views


class Run:
    """In this order: Run(args), open(views), place(model), start(model, optimizer); then epochs() and steps(epoch).

    args: from `Parser.add_common`, with --arch, --width, --epochs, --warmup-epochs and --batch-size. name: of an
    evaluation that trains, whose files are <name>_last.pt, <name>_views.png and <name>.jsonl; it has no k-NN and no
    backbone.pt, and ends its processes itself. more: what it saves besides, by name, with what must be the `same` when
    it goes on. step: optimiser steps done so far, those of the run that is continued included. total, warmup: steps of
    the schedule. last: the step of the end, below total by --max-steps. epoch_steps: per epoch. resumed: has it begun
    in an earlier run?
    """

    def __init__(self, args, name=""):
        self.args, self.device = args, start_device(args)
        self.name, self.prefix, self.more = name, f"{name}_" if name else "", {}
        check_schedule(args)
        torch.manual_seed(args.seed)
        self.amp, self.scaler, self.dtype = precision(args.precision, self.device)

    def open(self, views, streams=None, data=None):
        """The data set that --data names, to be loaded as these random views in batches of --batch-size over all
        processes. streams: see `Loader`. data: one that is open already, which the views fit."""
        args, self.data = self.args, data
        if data is None:
            self.data = open_dataset(args.data, "train", args.train_list, channels=args.channels)
            self.val = open_dataset(args.data, "val", args.val_list, required=False, channels=args.channels)
            views = adapt_views(views, self.data, args.stats, args.workers)
        settings = {k: v for k, v in vars(args).items() if k in ("seed", "workers", "accum", "max_bad")}
        settings |= {"device": self.device, "dtype": self.dtype, "streams": streams}
        self.loader = Loader(self.data, views, args.batch_size, **settings)
        self.view = EvalView(args.image_size, mean=views[0].mean, std=views[0].std)  # that of k-NN and of the files
        self.epoch_steps = self.loader.epoch_steps
        self.total, self.warmup = args.epochs * self.epoch_steps, round(args.warmup_epochs * self.epoch_steps)
        return self.data

    def place(self, model, sync=True):
        """The model on its device, with batch norm over all processes (sync) and the weights of --init."""
        model = model.to(self.device, self.dtype, memory_format=torch.channels_last)
        model = sync_batch_norm(model, self.loader.local, sync)
        if not self.name and self.args.init:
            init_from(self.args.init, model)
        return model

    def start(self, model, optimizer, chance=None, export=None, **lines):
        """Continues from last.pt if it is there, prints what will happen, opens the log. chance: the loss of a
        model that has learned nothing, if it is to be compared with. export: the module that k-NN judges and
        backbone.pt gets (default: model.backbone). lines: more to print, by name. Returns the model to train: over all
        processes, compiled if asked for, under autocast, its outputs in single precision at least."""
        args, self.model, self.optimizer, self.export = self.args, model, optimizer, export or model.backbone
        state = resume(args, len(self.data), model, optimizer, self.scaler, f"{self.prefix}last.pt", self.more)
        self.step, self.resumed = (state["step"], True) if state else (0, False)
        self.more, self.net = {k: state.get(k, v) if state else v for k, v in self.more.items()}, parallel(model)
        net = torch.compile(self.net) if args.compile else self.net
        describe(args, self.data, self.loader, model, **lines)
        self.logger = Logger(args, self.loader, self.total, self.step, chance, self.name or "log")
        self.last, self.saved = self.logger.last, time.monotonic()

        def forward(*inputs):
            with self.amp:
                outputs = net(*inputs)
            return tuple(map(upcast, outputs)) if isinstance(outputs, tuple) else upcast(outputs)

        return forward

    def epochs(self):
        """Epochs, from the one in which the run stopped. After each comes `quality`, every --knn-every. A
        `break` of this loop ends the run without it; then call `close`."""
        every = 0 if self.name else self.args.knn_every
        if every and not self.resumed:
            self.note(**self.quality())
        for epoch in range(self.step // self.epoch_steps, self.args.epochs):
            if self.step >= self.last:
                break
            yield epoch
            if every and self.epoch_done and ((epoch + 1) % every == 0 or epoch + 1 == self.args.epochs):
                self.note(**self.quality())
        self.close()

    def steps(self, epoch, order=None):
        """(step, micro-batches) from where the run stopped, step counted from 0. order: sample indices instead of a
        permutation. Between two steps the run saves, and ends with code 75 if a signal asked for it. A step counts as
        done when its body ends, also by `continue` or with micro-batches left over. `break` leaves the step undone:
        nothing is counted, logged or saved for it."""
        batches = self.loader.epoch(epoch, start=self.step % self.epoch_steps, order=order)
        while self.step < min((epoch + 1) * self.epoch_steps, self.last):
            self.loss, self._due, self._unscaled = 0.0, None, False
            micro = self._micro_batches(batches)
            yield self.step, micro
            for _ in micro:  # what the body has left
                pass
            due, self.step = self.due, self.step + 1
            if due:
                stop = self.logger.stop.requested(self.device)
                if stop or self.step == self.last or time.monotonic() - self.saved > 60 * self.args.save_every:
                    self.save()
                if stop:
                    self.logger.end(self.step)

    def _micro_batches(self, batches):
        for i in range(self.args.accum):
            self.net.require_backward_grad_sync = i + 1 == self.args.accum  # gradients travel once per step
            batch = next(batches)
            if self.step == 0 and i == 0:
                save_views(f"{self.args.out}/{self.prefix}views.png", batch, self.data)
            yield batch

    def backward(self, loss, scale=1.0):
        """Once per micro-batch: adds the gradients of its mean loss, times `scale`, to those of the step."""
        part = loss / self.args.accum
        self.scaler.scale(part * scale).backward()
        self.loss = self.loss + part.detach()

    def unscale(self, optimizer):
        """Makes gradients what they are also under fp16: for a script that looks at them before the update."""
        if not self._unscaled:  # the scaler refuses a second time
            self.scaler.unscale_(optimizer)
        self._unscaled = True

    def update(self, optimizer, clip=0.0):
        """The optimiser's step, with gradients clipped to this total norm (0: not); then they start from zero."""
        if clip:
            self.unscale(optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()

    @property
    def due(self):
        """Is this step one to log after, and so one that may read from the device?"""
        if self._due is None:  # asked once: a signal that arrives later waits for the next step
            self._due = self.logger.due(self.step + 1)
        return self._due

    def log(self, lr, **monitors):
        """Once per step, after the update; reads from the device every --log-every steps. monitors: scalar tensors."""
        if self.due:
            step, values = self.step + 1, {k: process_mean(v).item() for k, v in monitors.items()}
            self.logger.log(step, step / self.epoch_steps, process_mean(self.loss).item(), lr, **values)

    def note(self, **values):
        """A line and a record of what was measured between steps."""
        self.logger.note(self.step, **values)

    def warn(self, kind, message):
        """A line on stderr, once per kind."""
        self.logger.warn(kind, message)

    @property
    def epoch_done(self):
        """Is the last epoch complete, not cut short by --max-steps?"""
        return self.step % self.epoch_steps == 0

    def save(self):
        """Writes last.pt, and backbone.pt or, of an evaluation, what stands in `more`."""
        state = (self.args, self.step, len(self.data), self.model, self.optimizer, self.scaler)
        if self.name:
            save_file(f"{self.args.out}/{self.prefix}last.pt", run_state(*state) | self.more, keep=True)
        else:
            save_run(*state, self.export, self.view)
        self.saved = time.monotonic()

    def quality(self):
        """What the backbone's features are like now: {"knn", "rankme", "alpha"}, without labels no "knn"."""
        return monitor(self.export, self.data, self.val, self.view, self.device, self.args.workers, self.amp)

    def close(self):
        self.logger.close()
        self.name or end_processes()


def start_device(args):
    """This process's device, its processes joined, and deterministic algorithms on CUDA where asked for."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    device = init_processes(args.device)
    if args.deterministic and device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
    return device
