"""SimCLR v2: its loss with a memory, projector, selective kernels, fine-tuning from the projector, and distillation."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval_semi
import simclr
import simclrv2
from common.checkpoint import fit_channels, load_backbone
from common.classifier import folded, projector_layers
from common.resnet import Pool, SelectiveKernel, resnet
from tests.helpers import (
    EXACT,
    SMALL,
    different,
    main,
    parsed,
    records,
    refused,
    rows,
    state,
    train,
    unit,
    write_colours,
)


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("temperature, k", [(0.1, 1), (0.5, 9)])
def test_loss_with_a_memory_equals_numpy(temperature, k):
    """One anchor and one candidate at a time."""
    (z1, z2), memory = rows(2, 6, 5), unit(k, 5, seed=3)
    z = np.concatenate([z1, z2])
    n, b = len(z), len(z1)

    def sim(a, b):
        return math.exp(a @ b / math.sqrt((a @ a) * (b @ b)) / temperature)

    def total(i):
        return sum(sim(z[i], z[k]) for k in range(n) if k != i) + sum(sim(z[i], m) for m in memory.numpy())

    losses = [-math.log(sim(z[i], z[(i + b) % n]) / total(i)) for i in range(n)]
    assert simclrv2.nt_xent(z1, z2, temperature, memory).item() == pytest.approx(sum(losses) / n, abs=1e-10)


def test_loss_without_a_memory_is_that_of_simclr():
    for seed in range(3):
        z = rows(2, 5, 4, seed=seed)
        assert torch.equal(simclrv2.nt_xent(*z, 0.2), simclr.nt_xent(*z, 0.2))


@pytest.mark.parametrize("b, k", [(1, 1), (2, 7), (17, 64)])
def test_equal_embeddings_give_chance(b, k):
    z = torch.ones(b, 4, dtype=torch.float64)
    loss = simclrv2.nt_xent(z, z, 0.1, torch.full((k, 4), 0.5, dtype=torch.float64))
    assert loss.item() == pytest.approx(math.log(2 * b - 1 + k), abs=1e-12)


def test_gradient_is_right_and_none_reaches_the_memory():
    z1, z2 = rows(2, 4, 3).requires_grad_().unbind()
    memory = unit(5, 3, seed=1).requires_grad_()
    simclrv2.nt_xent(z1, z2, 0.5, memory).backward()
    assert memory.grad is None
    views = [x.detach().clone().requires_grad_() for x in (z1, z2)]
    assert torch.autograd.gradcheck(lambda *x: simclrv2.nt_xent(*x, 0.5, memory.detach()), views, atol=1e-7, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ model
def test_model_follows_the_official_code():
    model = simclrv2.SimCLRv2(resnet("resnet50", image_size=224, zero_init_residual=True))
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert [type(m) for m in model.projector] == kinds
    dense, norms = model.projector[::3], model.projector[1::3]
    assert [(m.in_features, m.out_features, m.bias) for m in dense] == [(2048, n, None) for n in (2048, 2048, 128)]
    assert [(m.weight.requires_grad, m.bias.requires_grad) for m in norms] == [
        (True, True),
        (True, True),
        (True, False),
    ]
    assert dense[1].weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert model.backbone.layer1[0].bn3.weight.abs().sum() == 0 and not hasattr(model, "queue")
    assert len(simclrv2.SimCLRv2(resnet(*SMALL), layers=2).projector) == len(simclr.SimCLR(resnet(*SMALL)).projector)


def test_augmentation_is_that_of_simclr_and_defaults_are_the_papers():
    assert inspect.getsource(simclrv2.augmentation) == inspect.getsource(simclr.augmentation)
    args = vars(parsed("simclrv2", "--data", "/imagenet"))
    expected = {"epochs": 800, "warmup_epochs": 40, "batch_size": 4096, "lr": 0.1, "weight_decay": 1e-4, "layers": 3}
    expected |= {"momentum": 0.9, "temperature": 0.1, "dim": 128, "key_momentum": 0.999, "crop_min": 0.08}
    assert {k: args[k] for k in expected} == expected and args["memory"] is None
    assert args["lr"] * math.sqrt(args["batch_size"]) == 6.4


def test_a_step_uses_the_memory_before_it_takes_the_keys(tmp_path, monkeypatch):
    """The target moves once per step before its keys; these are of the second view, and the loss sees older ones."""
    seen, passes, moves = [], [], []
    loss, forward, update = simclrv2.nt_xent, simclrv2.SimCLRv2.forward, simclrv2.SimCLRv2.update_target

    def record(model, x1, x2):
        out = forward(model, x1, x2)
        with torch.no_grad():
            for m in (model.target_backbone, model.target_projector):
                assert m.training
            keys = F.normalize(model.target_projector(model.target_backbone(x2)), dim=1)
        torch.testing.assert_close(out[2], keys, atol=1e-12, rtol=0)
        passes.append(out[2])
        return out

    def moved(model, momentum):
        online, target = model.projector[0].weight.clone(), model.target_projector[0].weight.clone()
        update(model, momentum)
        torch.testing.assert_close(model.target_projector[0].weight, momentum * target + (1 - momentum) * online)
        moves.append(len(passes))

    monkeypatch.setattr(simclrv2, "nt_xent", lambda *x: seen.append(x[3].clone()) or loss(*x))
    monkeypatch.setattr(simclrv2.SimCLRv2, "forward", record)
    monkeypatch.setattr(simclrv2.SimCLRv2, "update_target", moved)
    words = [*EXACT, "--max-steps", 3, "--accum", 2, "--key-momentum", 0.6, "--lr", 2, "--warmup-epochs", 0]
    saved = train("simclrv2", tmp_path, *words)["model"]
    assert moves == [0, 2, 4] and len(seen) == len(passes) == 6
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert torch.equal(seen[2][:16], torch.cat(passes[:2])) and torch.equal(seen[2][16:], seen[0][16:])
    assert torch.equal(seen[4][:32], torch.cat(passes[:4])) and saved["oldest"] == 8  # 40 places, 48 keys
    assert torch.equal(saved["queue"], torch.cat([passes[5], torch.cat(passes)[8:40]]))


def test_without_a_memory_there_is_no_second_network(tmp_path, capsys):
    saved = train("simclrv2", tmp_path / "a", *EXACT, "--max-steps", 2, "--memory", 0, "--layers", 2, "--lr", 0.1)
    assert not [name for name in saved["model"] if name.startswith(("target_", "queue", "oldest"))]
    assert "loss ln(31) = 3.43" in capsys.readouterr().out
    words = ["--max-steps", 2, "--lr", 0.4, "--lr-rule", "sqrt", "--weight-decay", 1e-4]  # 0.4 / 4 x sqrt
    same = train("simclr", tmp_path / "b", *EXACT, *words)["model"]
    assert not different(saved["model"], same), "two layers and no memory are SimCLR"


def test_size_of_the_memory(tmp_path, capsys):
    words = "--data fake:300 --arch resnet18 --width 0.125 --image-size 16 --batch-size 16 --max-steps 1 --knn-every 0"
    main("simclrv2", *words.split(), "--out", tmp_path)
    assert "none: there are 300 images, fewer than 65,536 keys" in capsys.readouterr().out
    assert "queue" not in state(tmp_path)["model"]
    main("simclrv2", *words.split(), "--memory", 32, "--out", tmp_path / "more")
    assert len(state(tmp_path / "more")["model"]["queue"]) == 32 and "32 keys" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- selective kernels
COUNTS = {  # official README, millions, without and with selective kernels: batch-norm statistics are counted there
    ("resnet50", 1): (24, 35), ("resnet50", 2): (94, 140), ("resnet101", 1): (43, 65), ("resnet101", 2): (170, 257),
    ("resnet152", 1): (58, 89), ("resnet152", 2): (233, 354), ("resnet152", 3): (None, 795),
}  # fmt: skip


@pytest.mark.parametrize("arch, width", COUNTS)
def test_parameter_counts_are_the_published_ones(arch, width):
    for name, published in zip((arch, f"{arch}_sk"), COUNTS[arch, width], strict=True):
        with torch.device("meta"):
            values = resnet(name, width).state_dict()
        count = sum(v.numel() for k, v in values.items() if not k.endswith("num_batches_tracked"))
        assert published in (None, round(count / 1e6)), name


def test_selective_kernel_equals_numpy():
    """One image and one channel at a time, after the convolution."""
    torch.manual_seed(0)
    unit = SelectiveKernel(3, stride=2).double().eval()
    for m in (unit.bn, unit.mix[1]):
        nn.init.uniform_(m.running_var, 0.5, 2), nn.init.normal_(m.running_mean), nn.init.normal_(m.bias)
    x = rows(2, 3, 5, 5)
    out, maps = unit(x).detach().numpy(), F.relu(unit.bn(unit.conv(x))).detach().numpy()
    first, last = (unit.mix[i].weight.detach().numpy()[:, :, 0, 0] for i in (0, 3))
    norm = unit.mix[1]
    assert out.shape == (2, 3, 3, 3) and first.shape == (32, 3) and last.shape == (6, 32)
    for image, streams in zip(out, maps, strict=True):
        pooled = (streams[:3] + streams[3:]).mean((1, 2))
        hidden = (first @ pooled - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy() + norm.eps)
        hidden = np.maximum(hidden * norm.weight.detach().numpy() + norm.bias.detach().numpy(), 0)
        a, b = np.split(np.exp(last @ hidden), 2)
        for c in range(3):
            expected = (a[c] * streams[c] + b[c] * streams[3 + c]) / (a[c] + b[c])
            np.testing.assert_allclose(image[c], expected, atol=1e-12)


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_shortcuts_average_as_the_official_padding_does(stride, side):
    """Stride 2 pads by zeros at the end, which count; stride 1 has TensorFlow's SAME, where only pixels count."""
    x = rows(1, 2, side, side)
    out, a = Pool(stride)(x)[0].numpy(), x[0].numpy()
    assert out.shape == (2, -(-side // stride), -(-side // stride))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            part = a[:, stride * i : stride * i + 2, stride * j : stride * j + 2]
            expected = part.mean((1, 2)) if stride == 1 else part.sum((1, 2)) / 4
            np.testing.assert_allclose(out[:, i, j], expected, atol=1e-12)


def test_stem_and_stages():
    large, small = (resnet("resnet50_sk", 0.25, size) for size in (96, 64))
    assert [tuple(m.weight.shape) for m in large.conv1 if isinstance(m, nn.Conv2d)] == [
        (8, 3, 3, 3), (8, 8, 3, 3), (16, 8, 3, 3)
    ]  # fmt: skip
    shapes = [tuple(m.shape[1:]) for m in large.eval().stages(torch.zeros(1, 3, 96, 96))]
    assert shapes == [(16, 48, 48), (64, 24, 24), (128, 12, 12), (256, 6, 6), (512, 3, 3)]
    assert small.conv1.kernel_size == (3, 3) and small.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    x = torch.zeros(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    maps = small.to(memory_format=torch.channels_last).stages(x)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


@pytest.mark.parametrize("size", [16, 72])
def test_files_of_selective_kernels(size, tmp_path):
    """Ours, and one of which only the tensors tell what it is; grey images get the sum of the first layer."""
    torch.manual_seed(0)
    network = resnet("resnet50_sk", 0.0625, size)
    values = network.state_dict()
    meta = {"method": "x", "arch": "resnet50_sk", "width": 0.0625, "image_size": size, "channels": 3}
    torch.save({"backbone": values, "meta": meta | {"mean": [0.5] * 3, "std": [0.5] * 3}}, tmp_path / "own.pt")
    torch.save({"state_dict": {f"net.{k}": v for k, v in values.items()}}, tmp_path / "other.pt")
    for name in ("own.pt", "other.pt"):
        found, told = load_backbone(tmp_path / name)
        assert (told["arch"], told["width"], found.small) == ("resnet50_sk", 0.0625, size == 16)
        assert not different(found.state_dict(), values)
    grey, first = resnet("resnet50_sk", 0.0625, size, channels=1), "conv1.weight" if size == 16 else "conv1.0.weight"
    fitted = fit_channels(values, grey)
    torch.testing.assert_close(fitted[first], values[first].sum(1, keepdim=True))
    grey.load_state_dict(fitted)


def test_evaluations_export_and_pictures_of_selective_kernels(tmp_path, capsys):
    torch.manual_seed(0)
    network = resnet("resnet50_sk", 0.0625, 72).eval()
    meta = {"method": "x", "arch": "resnet50_sk", "width": 0.0625, "image_size": 72, "channels": 3}
    torch.save(
        {"backbone": network.state_dict(), "meta": meta | {"mean": [0.4] * 3, "std": [0.2] * 3}}, tmp_path / "a.pt"
    )
    words = ["--pretrained", tmp_path / "a.pt", *"--data fake:24 --workers 0 --out".split(), tmp_path]
    main("eval_knn", *words, "--k", 3)
    main("eval_linear", *words, "--epochs", 1, "--protocol", "multihead", "--batch-size", 8)
    main("features", *words, "--features", "feat1", "--split", "train")
    assert np.load(tmp_path / "features.npy").shape == (24, 4)
    main("visualize", *words, "--neighbours", "--spectrum", "--queries", 2, "--k", 2)  # also of a random twin
    assert {"neighbours.png", "spectrum.png"} <= {path.name for path in tmp_path.iterdir()}
    main("export", "--pretrained", tmp_path / "a.pt", "--out", tmp_path / "a.pt2")
    x = torch.rand(3, 3, 72, 72)
    exported = torch.export.load(tmp_path / "a.pt2").module()(x)
    torch.testing.assert_close(exported, network((x - 0.4) / 0.2), atol=1e-5, rtol=1e-4)
    for to in ("torchvision", "timm", "mmdet"):
        message = refused(capsys, main, "export", "--pretrained", tmp_path / "a.pt", "--to", to, "--out", "a.pth")
        assert "there is no resnet50_sk with these names; --to pt2" in message


# ------------------------------------------------------------------------------- from the projector, and students
TINY = "--data fake:64 --batch-size 16 --epochs 2 --workers 2 --log-every 1 --seed 3".split()
TUNED = [*TINY, "--labels", "50%", "--lars"]
STUDENT = [*TINY, *"--pretrained random --arch resnet18 --width 0.125 --image-size 16 --warmup-epochs 0".split()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and the same network fine-tuned from the first layer of its projector."""
    out = tmp_path_factory.mktemp("simclrv2")
    train("simclrv2", out, *EXACT, "--max-steps", 3, "--lr", 1)
    main("eval_semi", "--pretrained", out / "last.pt", *TUNED, *EXACT, "--head-layer", 1, "--lr", 0.02)
    return out


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_of_the_projector_are_those_of_the_file(layers, trained):
    values = state(trained)["model"]
    found = projector_layers(trained / "last.pt", layers)
    assert [type(m) for m in found] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * layers and found[0].bias is None
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, values[f"projector.{name}"].to(value.dtype), rtol=1e-6, atol=1e-7)
    x = torch.rand(5, 64)
    expected = found.eval()(x)
    for matrix in folded(found):
        x = F.relu(matrix[:, :-1] @ x.T + matrix[:, -1:]).T
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_fine_tuning_starts_at_chance_and_trains_all_but_the_rest_of_the_projector(trained):
    """The classifier starts from zero: the first loss is ln 10. Its steps and those of vectors are not adapted."""
    saved, before = state(trained, "semi_last.pt"), state(trained)["model"]
    first = records(trained, "semi.jsonl")[1]
    classes = len(saved["model"]["head.bias"])
    assert first["loss"] == pytest.approx(math.log(classes), abs=1e-9) and first["lr"] == pytest.approx(0.02 * 4)
    names = {name for name in saved["model"] if name.startswith("projector.")}
    assert names == {n for n in before if n.startswith(("projector.0.", "projector.1."))}
    after = {n: v for n, v in saved["model"].items() if not n.startswith("head.")}
    changed = different(after, {n: before[n] for n in after})
    assert {"/projector.0.weight", "/projector.1.bias", "/backbone.conv1.weight"} <= set(changed)
    groups = {g["adapt"]: (len(g["params"]), g["weight_decay"]) for g in saved["optimizer"]["param_groups"]}
    trained_shapes = [v.ndim for n, v in saved["model"].items() if not n.rpartition(".")[2].startswith(("run", "num"))]
    adapted = sum(d > 1 for d in trained_shapes) - 1
    assert groups == {True: (adapted, 0), False: (len(trained_shapes) - adapted, 0)}


def test_recipes_of_the_readme():
    def row(*words, labelled=0.01):
        args = parsed("eval_semi", "--pretrained", "random", *words)
        meta = {"arch": "resnet50", "width": 1.0, "image_size": 224, "channels": 3}
        names = "epochs warmup_epochs batch_size lr head_lr schedule weight_decay"
        args = eval_semi.complete(args, nn.Identity(), meta, labelled)
        return tuple(vars(args)[name] for name in names.split())

    assert row("--labels", "1%", "--lars") == (60, 0, 1024, 0.005, 1, "cosine", 0)
    assert row("--labels", "10%", "--lars", labelled=0.1) == (30, 0, 1024, 0.005, 1, "cosine", 0)
    assert row("--distill", "semi.pt", labelled=1.0) == (400, 20, 4096, 0.1, 1, "cosine", 1e-4)
    assert row("--distill", "semi.pt", "--no-lars", labelled=1.0)[:4] == (20, 0, 256, 0.01)


def test_saved_classifier_is_the_network_that_was_judged(trained, tmp_path, capsys):
    result = state(trained, "semi_last.pt")["history"][-1]["top1"]
    main("predict", "--pretrained", trained / "semi.pt", "--data", "fake:64", "--workers", 0, "--out", tmp_path)
    assert f"top-1       {result:.2f} % of the 12 images" in capsys.readouterr().out


def test_student_learns_what_the_teacher_finds_probable(trained, tmp_path, monkeypatch):
    """Against cross entropy with probabilities that the teacher's layers, out of the files, give to the same views."""
    saved, pairs = state(trained, "semi_last.pt")["model"], []
    loss = F.cross_entropy
    monkeypatch.setattr(eval_semi.F, "cross_entropy", lambda z, p: pairs.append((z.detach(), p)) or loss(z, p))
    seen, forward = [], eval_semi.Classifier.forward
    monkeypatch.setattr(
        eval_semi.Classifier, "forward", lambda self, x, *more: seen.append(x) or forward(self, x, *more)
    )
    words = [*STUDENT, *EXACT, "--distill", trained / "semi.pt", "--out", tmp_path, "--max-steps", 1]
    result = main("eval_semi", *words)
    assert result["train"] == 64 and result["labels"] == f"those that {trained}/semi.pt gives to 64 images"
    backbone, meta = load_backbone(trained / "last.pt")
    backbone = backbone.double()
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in saved.items() if k.startswith("backbone.")})
    assert meta["mean"] == [0, 0, 0], "the student's images are normalised otherwise"
    x = seen[0] * torch.tensor([0.229, 0.224, 0.225]).double().view(3, 1, 1)
    x = x + torch.tensor([0.485, 0.456, 0.406]).double().view(3, 1, 1)
    with torch.no_grad():
        z = F.linear(backbone.eval()(x), saved["projector.0.weight"])
        statistics = (saved[f"projector.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        z = F.batch_norm(z, *statistics).relu()
        expected = F.linear(z, saved["head.weight"], saved["head.bias"]).softmax(1)
    (logits, probabilities), step = pairs[0], records(tmp_path, "semi.jsonl")[1]
    torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=1e-5)
    assert step["loss"] == pytest.approx(-(expected * logits.log_softmax(1)).sum(1).mean().item(), abs=1e-6)


MISTAKES = {
    "--labels 50% --distill semi.pt": "give either --labels, 1% for example, or --distill",
    "": "give either --labels",
    "--distill last.pt": "last.pt has no classifier: eval_linear.py writes a linear.pt",
    "--distill random": "--distill random has no classifier",
    "--distill nowhere.pt": "--distill nowhere.pt: no such file",
    "--distill semi.pt --image-size 24": "has --image-size 16, the student 24: both see the same views",
    "--distill semi.pt --channels 1": "has --channels 3, the student 1",
    "--distill semi.pt --grid": "--grid is for ResNets only",
    "--distill semi.pt --data colours": "semi.pt knows 0 ..., but not the class dark of the test images",
    "--labels 50% --head-layer 1": "--head-layer 1: --pretrained random has no such layer",
    "--labels 50% --head-layer 1 --pretrained backbone.pt": "backbone.pt has no such layer below the last",
    "--labels 50% --head-layer 3 --pretrained last.pt": "last.pt has no such layer below the last",
    "--labels 50% --head-layer -1": "--head-layer: must be at least 0",
    "--labels 50% --lars --arch vit_tiny": "--lars is for ResNets only",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_get_one_line(line, trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    if "colours" in line:
        write_colours(trained / "colours")
    network = (
        [] if "--pretrained" in line else "--pretrained random --arch resnet18 --width 0.125 --image-size 16".split()
    )
    words = [*TINY, *network, "--out", tmp_path]
    assert MISTAKES[line] in refused(capsys, main, "eval_semi", *words, *line.split())


def test_memory_smaller_than_the_batch(capsys, tmp_path):
    words = [*"--data fake:64 --arch resnet18 --batch-size 16 --memory 15 --workers 0 --out".split(), tmp_path]
    assert "--memory 15 is smaller than --batch-size 16" in refused(capsys, main, "simclrv2", *words)
    assert "--layers: must be at least 2" in refused(capsys, main, "simclrv2", *words, "--layers", 1)
