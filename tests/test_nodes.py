"""Several nodes: two agents of torchrun on one machine, one of which dies and comes back; folders that differ."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from common import checkpoint, distributed
from common.args import fail
from tests.helpers import (
    EXACT,
    ROOT,
    as_processes,
    assert_close,
    environment,
    flags,
    logged,
    parsed,
    records,
    state,
    train,
)


def free_port():
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return server.getsockname()[1]
    except OSError as error:
        pytest.skip(f"needs the address 127.0.0.1: {error.strerror}")


def family(pid):
    """A process and all below it. (torchrun gives its workers sessions of their own: a signal to its process group does
    not reach them.)"""
    with contextlib.suppress(OSError):
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(other for child in below for other in family(int(child)))]
    return []


def end(agent):
    """As a power cut would."""
    for pid in family(agent.pid) if agent.poll() is None else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()


def wait_for(condition):
    limit = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def listening(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of a node in /proc")
def test_a_node_dies_and_comes_back(tmp_path):
    """Two nodes have the result of one process, also where one of them loses all its processes and the same command is
    given again there. The other node waits for it, and both go on from the last save."""
    port, out, agents = free_port(), tmp_path / "two", []
    torchrun = "-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --max-restarts=1 --rdzv_backend=c10d"
    torchrun += f" --rdzv_endpoint=127.0.0.1:{port} --rdzv-conf=keep_alive_interval=1 --monitor-interval=0.5"
    more = [*EXACT, "--save-every", 0, "--max-steps", 6, "--workers", 0]
    words = [sys.executable, *torchrun.split(), "simsiam.py", *flags("simsiam", out, *more)]

    def node(name):
        with open(tmp_path / name, "w") as file:
            settings = {"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT}
            settings["env"] = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
            agents.append(subprocess.Popen(words, **settings))
        return agents[-1]

    try:
        first = node("first")
        one = train("simsiam", tmp_path / "one", *more)
        wait_for(lambda: listening(port))  # the first one is to be where the nodes meet
        second, log = node("second"), out / "log.jsonl"
        wait_for(lambda: log.exists() and log.read_text().count('"loss"') > 1)
        end(second)
        again = node("again")
        codes = [agent.wait(timeout=240) for agent in (first, again)]
        said = (tmp_path / "first").read_text() + (tmp_path / "again").read_text()
        assert codes == [0, 0], said
    finally:
        for agent in agents:
            end(agent)
    assert said.count("16 = 2 processes") == 2 and said.count("resuming") == 1 and said.count("step 6/6") == 1
    starts = [r["resumed_at"] for r in logged(out) if "resumed_at" in r]
    assert starts[0] == 0 and 1 <= starts[-1] < 6
    losses = [[r["loss"] for r in records(folder).values()] for folder in (tmp_path / "one", out)]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=1e-8)
    assert_close(one, state(out), atol=1e-8, rtol=1e-7)


def test_a_folder_that_nodes_do_not_share_is_refused(tmp_path, monkeypatch, capsys):
    """The node that has no state would start from zero, beside the one that goes on."""
    model, scaler = nn.Linear(2, 2), torch.amp.GradScaler(enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    own, other = (parsed("simsiam", "--out", tmp_path / name) for name in ("own", "other"))
    checkpoint.save_file(tmp_path / "own/last.pt", checkpoint.run_state(own, 5, 8, model, optimizer, scaler))

    def step(args, images=8):
        found = checkpoint.resume(args, images, model, optimizer, scaler)
        return found and found["step"]

    assert as_processes(monkeypatch, distributed, step, [own], [own]) == [5, 5]
    assert as_processes(monkeypatch, distributed, step, [other], [other]) == [None, None]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        as_processes(monkeypatch, distributed, step, [own], [other])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and f"--out {tmp_path}/own is not the same folder on all nodes" in message
    with pytest.raises(SystemExit) as stop:
        as_processes(monkeypatch, distributed, step, [own, 8], [own, 9])
    assert stop.value.code == 2 and "--data has another number of images" in capsys.readouterr().err


@pytest.mark.parametrize("local, told", [(0, 1), (1, 0)])
def test_a_mistake_is_told_once_per_node(local, told, monkeypatch, capsys):
    """Also on a node without the main process: what is missing may be missing there alone."""
    monkeypatch.setenv("RANK", str(8 + local))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    with pytest.raises(SystemExit):
        fail("--data /images: no such file")
    assert capsys.readouterr().err.count("error: --data /images") == told
