"""The loop of common/run.py: what travels between processes, which batches a step sees, where a signal may stop it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run as run_module
from common.augment import View
from common.run import Run
from tests.helpers import (
    EXACT,
    assert_close,
    command,
    flags,
    logged,
    main,
    parsed,
    records,
    refused,
    state,
    train,
    write_vit,
)

CASES = {
    f"{script} {accum}": (script, [*EXACT, *more, "--accum", accum, "--max-steps", 3])
    for script, more in (("simsiam", []), ("moco", ["--symmetric"]))
    for accum in (1, 4)
}


def count(folder):
    """Run by torchrun: trains the cases, and writes how many buckets of gradients were reduced in each step."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    parallel, update = run_module.parallel, Run.update
    run_module.end_processes = lambda: None

    def watched(model):
        net = parallel(model)
        net.register_comm_hook(None, hook)
        return net

    def hook(_, bucket):
        steps[-1] += 1
        return allreduce_hook(None, bucket)

    def counted(run, *args, **kwargs):
        update(run, *args, **kwargs)
        steps.append(0)

    run_module.parallel, Run.update = watched, counted
    for case, (script, more) in CASES.items():
        steps = [0]
        main(script, *flags(script, folder / case, *more))
        (folder / case / "buckets.json").write_text(json.dumps(steps))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def counted_by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")
    command("tests/test_run.py", folder, processes=2, check=0)
    return folder


@pytest.mark.parametrize("script", dict.fromkeys(case.split()[0] for case in CASES))
def test_gradients_travel_once_per_step(script, counted_by_two):
    one, four = (json.loads((counted_by_two / f"{script} {n}" / "buckets.json").read_text()) for n in (1, 4))
    assert one == four and len(one) == 4 and min(one[:3]) > 0


@pytest.mark.parametrize("script", dict.fromkeys(case.split()[0] for case in CASES))
def test_micro_batches_of_two_processes_equal_those_of_one(script, counted_by_two, tmp_path):
    """The micro-batches of all processes together are those of one, so all gradients must have arrived."""
    one = train(script, tmp_path, *CASES[f"{script} 4"][1])
    assert_close(one, state(counted_by_two / f"{script} 4"), atol=1e-8, rtol=1e-7)


# ------------------------------------------------------------------------------------------------- in one process
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 2, bias=False)
        nn.init.ones_(self.backbone.weight)

    def forward(self, x):
        return self.backbone(x.mean((2, 3)))


def test_shortened_warm_up_is_recorded_and_resumed(tmp_path, capsys):
    """Four epochs of four steps: a tenth are 1.6, so 2 steps of warm-up."""
    words = flags("byol", tmp_path, "--lr", 16)
    at = words.index("--warmup-epochs")
    words = words[:at] + words[at + 2 :]
    main("byol", *words, "--max-steps", 3)
    assert "the default --warmup-epochs 10 is for longer runs: here it is 0.4" in capsys.readouterr().out
    assert [r["lr"] for r in records(tmp_path).values()] == pytest.approx([0, 0.5, 1])
    assert state(tmp_path)["recipe"]["warmup_epochs"] == 0.4 == logged(tmp_path)[0]["args"]["warmup_epochs"]
    main("byol", *words, "--max-steps", 4)
    assert "resuming" in capsys.readouterr().out and list(records(tmp_path)) == [1, 2, 3, 4]


@pytest.mark.parametrize("script", ["eval_finetune", "eval_semi"])
def test_evaluations_shorten_their_warm_up(script, tmp_path, capsys):
    network = write_vit(tmp_path / "vit.pt")
    words = f"--pretrained {network} --data fake:40 --epochs 2 --batch-size 10 --workers 0 --out {tmp_path}".split()
    words += ["--labels", "50%"] if script == "eval_semi" else []
    main(script, *words)
    assert "the default --warmup-epochs 5 is for longer runs: here it is 0.2 of --epochs 2" in capsys.readouterr().out
    error = refused(capsys, main, script, *words, "--warmup-epochs", 5, "--no-resume")
    assert "--warmup-epochs 5 must be smaller than --epochs 2: try --warmup-epochs 0" in error


def started(out, *more):
    """A run of a linear layer; (run, optimizer, net)."""
    run = Run(parsed("simsiam", *flags("simsiam", out, "--log-every", 100, *more)))
    run.open([View(size=16)])
    model = run.place(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return run, optimizer, run.start(model, optimizer)


def one_step(run, batches, loss=None):
    for batch in batches:
        run.backward(run.model(batch.views()[0]).square().mean() if loss is None else loss)
    run.update(run.optimizer)
    run.log(0.1)


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_unread_micro_batches_do_not_reach_the_next_step(left, tmp_path):
    """`continue`, with some of the three micro-batches of 5 images not asked for."""
    run, _, _ = started(tmp_path, "--accum", 3, "--batch-size", 15)
    expected, seen = [b.indices.tolist() for b in run.loader.epoch(0)], []
    for step, batches in run.steps(0):
        if step == 1:
            for _ in range(3 - left):
                seen.append(next(batches).indices.tolist())
            continue
        seen += [batch.indices.tolist() for batch in batches]
        assert run.net.require_backward_grad_sync, "the last micro-batch takes the gradients along"
    assert run.step == run.epoch_steps == 4 and len(expected) == 12
    assert seen == expected[: 6 - left] + expected[6:]


def test_break_leaves_the_step_undone(tmp_path):
    run, _, _ = started(tmp_path)
    expected = [b.indices.tolist() for b in run.loader.epoch(0)]
    for step, batches in run.steps(0):
        if step == 2:
            break
        one_step(run, batches)
    assert run.step == 2 and not records(tmp_path) and not (tmp_path / "last.pt").exists()
    again = {step: [b.indices.tolist() for b in batches] for step, batches in run.steps(0)}
    assert again == {2: [expected[2]], 3: [expected[3]]} and run.epoch_done


@pytest.mark.parametrize("when, steps", [("before", 2), ("after", 3)])
def test_signal_never_splits_a_step(when, steps, tmp_path, capsys):
    """Before the step has asked whether to log, a signal ends the run behind this step; after that, behind the next.
    In both, what is saved has been logged."""
    run, _, _ = started(tmp_path)
    with pytest.raises(SystemExit) as stop:
        for step, batches in run.steps(0):
            assert not (tmp_path / "last.pt").exists()
            run.logger.stop.flag |= step == 1 and when == "before"
            one_step(run, batches)
            run.logger.stop.flag |= step == 1 and when == "after"
    assert stop.value.code == 75 and f"stopped at step {steps}, all saved" in capsys.readouterr().out
    assert list(records(tmp_path)) == [steps] and state(tmp_path)["step"] == steps


@pytest.mark.parametrize("clip, length", [(0.0, 24**0.5), (1.5, 1.5), (100.0, 24**0.5)])
def test_clipping_bounds_the_norm_of_all_gradients_together(clip, length, tmp_path):
    run, optimizer, _ = started(tmp_path)
    before, _ = run.model.backbone.weight.clone(), next(run.steps(0))
    run.backward((2 * run.model.backbone.weight).sum())
    run.update(optimizer, clip=clip)
    assert (run.model.backbone.weight - before).norm().item() == pytest.approx(length, rel=1e-5)
    assert all(p.grad is None for p in run.model.parameters())


def test_another_precision_continues_a_run(tmp_path):
    train("simsiam", tmp_path, "--max-steps", 1, "--precision", "fp32")
    for step, precision in ((2, "fp16"), (3, "fp16"), (4, "bf16")):
        assert train("simsiam", tmp_path, "--max-steps", step, "--precision", precision)["step"] == step


def test_gradients_of_half_precision_are_scaled_until_they_are_asked_for(tmp_path):
    """Two micro-batches of loss 2 and a factor of 3: the gradient of the mean loss, times 3."""
    run, optimizer, _ = started(tmp_path, "--precision", "fp16", "--accum", 2)
    weight = run.model.backbone.weight
    before, _ = weight.detach().clone(), next(run.steps(0))
    for _ in range(2):
        run.backward(2 * weight.sum(), scale=3.0)
    assert (weight.grad == 6 * run.scaler.get_scale()).all() and run.scaler.get_scale() > 1
    assert run.loss.item() == pytest.approx(12.0)
    run.unscale(optimizer)
    assert (weight.grad == 6).all()
    run.update(optimizer, clip=1.0)
    assert (weight - before).norm().item() == pytest.approx(1.0, rel=1e-5)


if __name__ == "__main__":
    count(Path(sys.argv[1]))
