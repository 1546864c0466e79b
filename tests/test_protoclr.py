"""ProtoCLR: the loss against NumPy, what is erased, the schedule; Conv4's sizes; few-shot episodes and their two
classifiers."""

import json
import math
import subprocess

import numpy as np
import pytest
import torch

import eval_fewshot
from common.checkpoint import load_backbone
from common.conv4 import conv4
from protoclr import ProtoCLR, erase, protoclr_logits, protoclr_loss
from tests.helpers import flags, launch, main, records, refused, rows, train, write_images


def test_loss_equals_numpy():
    support, queries = rows(1, 5, 4)[0], rows(3, 5, 4, seed=1)
    expected = []
    for view in queries.numpy():
        for i, q in enumerate(view):
            d = [-((q - c) ** 2).sum() for c in support.numpy()]
            expected.append(math.log(sum(math.exp(v) for v in d)) - d[i])
    assert protoclr_loss(protoclr_logits(support, queries)).item() == pytest.approx(np.mean(expected), abs=1e-10)
    same = torch.ones(3, 7, 4, dtype=torch.float64)
    assert protoclr_loss(protoclr_logits(same[0], same)).item() == pytest.approx(math.log(7), abs=1e-12)


def test_published_sizes_of_conv4():
    assert conv4("conv4", 84).dim == 1600 and conv4("conv4", 28, channels=1).dim == 64
    network = conv4("conv4", 84)
    assert network(torch.zeros(2, 3, 84, 84)).shape == (2, 1600)
    # a convolution of 3 channels and three of 64 with biases, four batch norms
    assert sum(p.numel() for p in network.parameters()) == 9 * 3 * 64 + 64 + 3 * (9 * 64 * 64 + 64) + 4 * 128


def test_support_and_queries_pass_together():
    model = ProtoCLR(conv4("conv4", 16, 0.25)).train()
    x = torch.rand(4, 2, 3, 16, 16)
    z, q = model(*x)
    expected = model.backbone(x.flatten(0, 1)).unflatten(0, (4, 2))
    torch.testing.assert_close(torch.cat([z[None], q]), expected)


def test_erased_share_and_rectangle():
    x, u = torch.ones(400, 1, 28, 28), torch.rand(400, 28 * 28 + 5, generator=torch.Generator().manual_seed(0))
    plain, dropped = u.clone(), u.clone()
    plain[:, 0] = 1.0  # no rectangle
    assert erase(x, plain).mean().item() == pytest.approx(0.7, abs=0.01)
    dropped[:, 5:] = 1.0  # no single pixels
    gone = erase(x, dropped)[:, 0] == 0
    areas = gone.sum((1, 2)) / 28**2
    assert (areas > 0).float().mean().item() == pytest.approx(0.5, abs=0.08) and areas.max() < 0.36
    for mask in gone[areas > 0]:  # a rectangle: the product of its rows and columns
        assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0))


def test_rate_is_halved_by_steps_and_characters_train(tmp_path):
    words = ["--halve-every", 3, "--warmup-epochs", 0, "--max-steps", 8, "--lr", 0.01]
    state = train("protoclr", tmp_path / "a", *words, "--augmentation", "characters")
    assert [round(r["lr"], 6) for r in records(tmp_path / "a").values()] == [0.01] * 3 + [0.005] * 3 + [0.0025] * 2
    plain = train("protoclr", tmp_path / "b", *words)
    assert any((state["model"][k] != plain["model"][k]).any() for k in plain["model"])
    backbone, meta = load_backbone(tmp_path / "a" / "backbone.pt")
    assert meta["arch"] == "conv4" and backbone.dim == 8  # 16 px: one cell


# ------------------------------------------------------------------------------------------------------ few shots
def clouds(classes=6, each=30, dim=8, spread=1.0, seed=0):
    """Features of classes around random centres, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + spread * torch.randn(len(labels), dim, generator=generator), labels.numpy()


def test_episodes_repeat_nothing_and_depend_on_their_number_alone():
    labels = np.repeat(np.arange(7), 25)
    labels = np.concatenate([labels, [7] * 10])  # too few images: never drawn
    shots, asked = eval_fewshot.draw_episodes(labels, 5, 3, 15, 20, seed=4)
    assert shots.shape == (20, 5, 3) and asked.shape == (20, 5, 15)
    for few, many in zip(shots, asked, strict=True):
        every = torch.cat([few, many], 1)
        assert len(set(every.flatten().tolist())) == 5 * 18
        of = labels[every.numpy()]
        assert (of == of[:, :1]).all() and len(set(of[:, 0])) == 5 and 7 not in of
    again = eval_fewshot.draw_episodes(labels, 5, 3, 15, 5, seed=4)
    assert torch.equal(again[0], shots[:5]) and torch.equal(again[1], asked[:5])


def test_prototypes_are_the_nearest_mean():
    x, labels = clouds()
    shots, asked = eval_fewshot.draw_episodes(labels, 5, 4, 10, 8, seed=0)
    found = eval_fewshot.accuracy(eval_fewshot.logits_of(x, asked, *eval_fewshot.prototypes(x, shots)))
    for few, many, share in zip(shots.numpy(), asked.numpy(), found.tolist(), strict=True):
        centres = [x.numpy()[row].mean(0) for row in few]
        right = [
            np.argmin([((x.numpy()[i] - c) ** 2).sum() for c in centres]) == w
            for w, row in enumerate(many)
            for i in row
        ]
        assert share == pytest.approx(np.mean(right))


def test_prototune_starts_at_the_prototypes_and_trains_each_episode_alone():
    x, labels = clouds(spread=0.7)
    shots, _ = eval_fewshot.draw_episodes(labels, 5, 5, 10, 6, seed=0)
    before = eval_fewshot.prototypes(x, shots)
    for a, b in zip(before, eval_fewshot.prototune(x, shots, 0, 0, lr=1e-30), strict=True):
        assert torch.equal(a, b)
    together = eval_fewshot.prototune(x, shots, 0, 0)
    alone = eval_fewshot.prototune(x, shots[3:4], 3, 0)
    for a, b, start in zip(together, alone, before, strict=True):
        torch.testing.assert_close(a[3:4], b)
        assert not torch.equal(a, start)

    def loss(layer):
        logits = eval_fewshot.logits_of(x, shots, *layer).flatten(0, 2)
        return torch.nn.functional.cross_entropy(logits, torch.arange(5).repeat_interleave(5).repeat(6))

    assert loss(together) < loss(before)


def test_interval_is_that_of_a_mean():
    found = eval_fewshot.interval(torch.tensor([0.5, 0.7, 0.9, 0.7], dtype=torch.float64))
    assert found == {"mean": 70.0, "interval": round(100 * 1.96 * np.std([5, 7, 9, 7], ddof=1) / 10 / 2, 3)}


RANDOM = "--pretrained random --arch conv4 --width 0.125 --image-size 16 --episodes 20 --workers 1".split()


def test_classes_two_folders_deep(tmp_path, capsys):
    names = [f"{a}/{c}/{i}.png" for a in ("greek", "latin") for c in ("a", "b", "c") for i in range(6)]
    data = write_images(tmp_path / "data", names, size=(20, 20))
    words = [*RANDOM, "--data", data, "--out", tmp_path / "out", "--shots", 1, "--queries", 5]
    assert main("eval_fewshot", *words, "--class-depth", 2)["classes"] == 6
    assert "--ways 5" in refused(capsys, main, "eval_fewshot", *words, "--class-depth", 1)
    subprocess.run(["tar", "-cf", tmp_path / "all.tar", "-C", tmp_path, "data"], check=True)
    assert main("eval_fewshot", *words, "--class-depth", 2, "--data", tmp_path / "all.tar")["classes"] == 6
    order = [*names[1:], names[0]]  # a list has an order of its own
    (tmp_path / "list.txt").write_text("".join(f"data/{name}\n" for name in order))
    listed = ["--data", tmp_path / "all.tar", "--val-list", tmp_path / "list.txt", "--class-depth", 2]
    assert main("eval_fewshot", *words, *listed)["classes"] == 6
    assert "not lie in folders" in refused(capsys, main, "eval_fewshot", *words, "--class-depth", 2, "--data", "digits")
    assert "no labels" in refused(capsys, main, "eval_fewshot", *words)
    assert "2 folders only" in refused(capsys, main, "eval_fewshot", *words, "--class-depth", 3)
    message = refused(capsys, main, "eval_fewshot", *words, "--class-depth", 2, "--shots", 2)
    assert "--shots 1 is possible" in message


def test_two_processes_see_the_episodes_of_one(tmp_path):
    words = [*RANDOM, "--data", "digits", "--shots", 1, 5, "--precision", "fp64", "--batch-size", 64]
    one = main("eval_fewshot", *words, "--out", tmp_path / "one")
    assert one["shots"]["5"]["prototypes"]["mean"] > one["shots"]["1"]["prototypes"]["mean"] > 20
    launch(["eval_fewshot", [*words, "--out", tmp_path / "two"]])
    assert json.loads((tmp_path / "two" / "eval_fewshot.json").read_text()) == one


def test_small_images_are_refused(tmp_path, capsys):
    words = flags("protoclr", tmp_path, "--image-size", 12)
    assert "needs 16 pixels" in refused(capsys, main, "protoclr", *words)
