"""Who fills the buffers of a loader: threads of the training process, or a process of its own with threads in it.

Threads beside the training loop take Python's lock from it, which it needs for each kernel that it launches; a process
leaves it alone. It is forked, so that it has the data set without copying or pickling it, and shares the buffers. It
ends when the training process does, however that ends, because its end of the pipe closes then. What is changed in the
data set later does not reach it.
"""

import collections
import concurrent.futures
import contextlib
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
import weakref

import torch

POSSIBLE = hasattr(os, "fork") and sys.platform != "darwin"  # some libraries of macOS do not survive a fork


class Died(Exception):
    """The loading process is gone; the text says how."""


def shared(shape, dtype):
    """A tensor in memory that forked processes share. It has no name: when its users die, nothing is left of it."""
    count = torch.Size(shape).numel()
    memory = mmap.mmap(-1, max(1, count) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype)[:count].view(shape)


class Threads:
    """Takes requests (number, indices, draws) and answers them in their order: work(*request, rows), called for some
    rows at a time, returns a list. workers = 0: in the calling thread, when the answer is asked for."""

    def __init__(self, work, workers):
        self.work, self.workers, self.queue = work, workers, collections.deque()
        self.pool = concurrent.futures.ThreadPoolExecutor(workers, initializer=_one_thread) if workers else None

    def submit(self, number, indices, draws):
        n = len(indices)
        chunk = max(1, min(8, n // max(1, self.workers)))
        jobs = [(self.work, number, indices, draws, range(i, min(i + chunk, n))) for i in range(0, n, chunk)]
        self.queue.append([self.pool.submit(*job) for job in jobs] if self.pool else jobs)

    def result(self):
        """What work returned for the oldest request, as one list."""
        jobs = self.queue.popleft()
        return [item for job in jobs for item in (job.result() if self.pool else job[0](*job[1:]))]

    def drop(self):
        """Forgets all requests; then nobody writes into the buffers."""
        jobs = [job for jobs in self.queue for job in jobs if self.pool]
        self.queue.clear()
        [job.cancel() for job in jobs]
        concurrent.futures.wait(jobs)


class Process:
    """The same in a process of its own. Its death raises Died."""

    def __init__(self, work, workers):
        self.connection, theirs = multiprocessing.Pipe()
        self.waiting = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child needs none of them
            pid = os.fork()
        if not pid:
            self.connection.close()
            _serve(theirs, Threads(work, workers))
        theirs.close()
        self.close = weakref.finalize(self, _end, self.connection, pid)

    def submit(self, *request):
        self.waiting += 1
        try:
            self.connection.send(request)
        except OSError:
            raise Died(self.close()) from None

    def result(self):
        self.waiting -= 1
        try:
            items, error = self.connection.recv()
        except (EOFError, OSError):
            raise Died(self.close()) from None
        if error is not None:
            raise error
        return items

    def drop(self):
        if self.waiting and self.close.alive:
            with contextlib.suppress(OSError):
                self.connection.send(())
        while self.waiting and self.close.alive:
            with contextlib.suppress(Exception):  # reported before, or of requests that no longer count
                self.result()
        self.waiting = 0


def _end(connection, pid):
    """Ends the process, if it has not ended yet. Returns how it did."""
    with contextlib.suppress(OSError):
        connection.send(None)  # processes that were forked later may hold the pipe open, too
    connection.close()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with code {os.WEXITSTATUS(status)}"


def _serve(connection, threads):
    """The loading process. It ignores signals: the training process needs some more batches to end well."""
    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        _one_thread()
        answers = concurrent.futures.ThreadPoolExecutor(1)

        def answer():
            try:
                content = threads.result(), None
            except BaseException as error:
                content = None, error
                try:
                    pickle.loads(pickle.dumps(error))
                except Exception:
                    content = None, RuntimeError("".join(traceback.format_exception(error)))
            connection.send(content)

        while (request := connection.recv()) is not None:
            if request:
                threads.submit(*request)
                answers.submit(answer)
            else:
                threads.drop()  # each request is answered all the same, by an error
        os._exit(0)
    except (EOFError, OSError):  # the training process is gone
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _one_thread():
    """Each loading thread works on its own image: more threads inside an operator would only get in the way."""
    torch.set_num_threads(1)
