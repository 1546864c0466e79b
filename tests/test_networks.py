"""--arch LIBRARY:NAME: networks of torchvision and timm through pre-training, evaluations and files."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from common import batchnorm
from common.checkpoint import load_backbone
from common.networks import network, settle
from tests.helpers import EXACT, assert_close, different, flags, launch, main, records, refused, state

SHUFFLE, ALL = "torchvision:shufflenet_v2_x0_5", ["--data", "fake:24", "--workers", 0]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny(out, arch, *more):
    """The flags of a tiny run of SimSiam with this network, on 32 px."""
    words = flags("simsiam", out, "--arch", arch, "--width", 1, "--image-size", 32, "--data", "fake:32", *more)
    return ["simsiam", *words]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("shuffle")
    main(*tiny(out, SHUFFLE, "--max-steps", 1))
    return out


# Networks whose last layers differ: a linear one, behind dropout, a convolution, in a head; those with dropout and
# stochastic depth; one with positions for one size; one with extra classifiers. The numbers are the inputs of the
# classifiers as the papers have them.
DIMS = {"mobilenet_v3_small": 1024, "squeezenet1_1": 512, "convnext_tiny": 768, "vit_b_32": 768, "swin_t": 768}
DIMS |= {"googlenet": 1024, "densenet121": 1024, "mnasnet0_5": 1280, "efficientnet_b0": 1280}


@pytest.mark.parametrize("name", DIMS)
def test_features_are_what_the_classifier_saw(name):
    torch.manual_seed(0)
    model, seen = network(f"torchvision:{name}", image_size=32), []
    assert model.dim == DIMS[name]
    theirs = torchvision.models.get_model(name, **model.options)
    missing, extra = theirs.load_state_dict(model.state_dict(), strict=False)
    assert {key.rpartition(".")[0] for key in missing} == {model.head} and not extra, "its own names, all but one layer"
    theirs.eval().get_submodule(model.head).register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        theirs(IMAGES)
        if name == "squeezenet1_1":  # a convolution, whose outputs are averaged after a ReLU
            seen = [seen[0].relu().mean((2, 3), keepdim=True)]
        torch.testing.assert_close(model.eval()(IMAGES), seen[0].flatten(1), rtol=1e-5, atol=1e-5)
        model.train()
        torch.manual_seed(1)  # of another process, or of a run that continues
        first = model(IMAGES)
        torch.manual_seed(2)
        assert torch.equal(first, model(IMAGES)), "nothing is drawn from the generator of the process"


def test_weights_follow_the_seed_and_survive_a_file(tmp_path):
    torch.manual_seed(3)
    a = network("torchvision:mnasnet0_5", image_size=32)
    torch.manual_seed(3)
    b = network("torchvision:mnasnet0_5", image_size=32)
    assert not different(a.state_dict(), b.state_dict())
    assert different(load_backbone("random", "torchvision:mnasnet0_5", image_size=32)[0].state_dict(), a.state_dict())
    meta = {"method": "x", "arch": a.arch, "width": 1.0, "image_size": 32, "channels": 3, "mean": [0.5] * 3}
    torch.save({"backbone": a.state_dict(), "meta": meta | {"std": [0.5] * 3}}, tmp_path / "backbone.pt")
    backbone, told = load_backbone(tmp_path / "backbone.pt")
    assert told["arch"] == a.arch and not different(backbone.state_dict(), a.state_dict())
    assert torch.equal(backbone.eval()(IMAGES), a.eval()(IMAGES))


def test_evaluations_and_features(trained, capsys, tmp_path):
    meta = state(trained, "backbone.pt")["meta"]
    assert (meta["arch"], meta["width"], meta["image_size"]) == (SHUFFLE, 1.0, 32)
    for file in ("backbone.pt", "last.pt"):
        words = ["--pretrained", trained / file, *ALL, "--out", tmp_path]
        main("features", *words, "--split", "train")
        backbone, _ = load_backbone(trained / file)
        assert np.load(tmp_path / "features.npy").shape == (24, 1024) and backbone.dim == 1024
    main("eval_knn", *words, "--k", 5)
    main("eval_linear", *words, "--epochs", 1)
    main("eval_linear", *words, "--epochs", 1, "--protocol", "moco,dino,mae", "--batch-size", 8)
    main("eval_finetune", *words, "--epochs", 1, "--batch-size", 8, "--warmup-epochs", 0)
    matched = f"tensors matched {len(backbone.state_dict())}/{len(backbone.state_dict())}"
    assert capsys.readouterr().out.count(f"{SHUFFLE}, {matched}") == 8
    tuned = load_backbone(tmp_path / "finetune_last.pt")[0].state_dict()
    assert tuned.keys() == load_backbone(trained / "last.pt")[0].state_dict().keys()
    main("eval_finetune", *words, "--epochs", 1, "--batch-size", 8, "--warmup-epochs", 0, "--freeze", 1, "--no-resume")
    frozen, first = load_backbone(tmp_path / "finetune_last.pt")[0], load_backbone(trained / "last.pt")[0]
    assert not different(frozen.state_dict(), first.state_dict()), "the whole network is one layer"
    message = refused(capsys, main, "eval_linear", *words, "--protocol", "multihead")
    assert "reads the five stages of a ResNet" in message
    message = refused(capsys, main, "features", *words, "--features", "feat4")
    assert f"--features feat4: the features of {SHUFFLE} are pool" in message


def test_two_processes_and_a_run_that_continues(tmp_path):
    words = [*EXACT, "--data", "fake:64", "--no-compile"]
    one = tiny(tmp_path / "one", "torchvision:mobilenet_v3_small", *words)
    whole = train_like(*one, "--max-steps", 4)
    two = tiny(tmp_path / "two", "torchvision:mobilenet_v3_small", *words, "--max-steps", 3)
    launch((two[0], two[1:]))
    losses = [{k: r["loss"] for k, r in records(tmp_path / out).items() if k <= 3} for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-7) and len(losses[0]) == 3
    half = tiny(tmp_path / "half", "torchvision:mobilenet_v3_small", *words)
    train_like(*half, "--max-steps", 2)
    assert not different(whole, train_like(*half, "--max-steps", 4))
    initialised = tiny(tmp_path / "init", "torchvision:mobilenet_v3_small", "--init", tmp_path / "one/backbone.pt")
    assert_close(state_of(train_like(*initialised, "--max-steps", 1, "--lr", 1e-9)), state_of(whole), atol=1e-4, rtol=1)


def train_like(script, *words):
    main(script, *words)
    return state(words[words.index("--out") + 1])


def state_of(saved):
    return {k: v.double() for k, v in saved["model"].items() if "backbone" in k and k.endswith("weight")}


MISTAKES = {
    "simsiam --arch torchvision:convnext_tinny": "did you mean torchvision:convnext_tiny",
    "simsiam --arch torchvision:ConvNeXt_Tiny": "did you mean torchvision:convnext_tiny",
    "simsiam --arch convnext_tiny": "unknown, expected one of resnet18, resnet34, resnet50, resnet101, resnet152, "
    "resnet50_sk, resnet101_sk, resnet152_sk, torchvision:NAME or timm:NAME; did you mean torchvision:convnext_tiny",
    "simsiam --arch resnet_50": "did you mean resnet50",
    "simsiam --arch tv:resnet18": "unknown library, expected torchvision:NAME or timm:NAME",
    "simsiam --arch torchvision:": "torchvision has no such network",
    f"simsiam --arch {SHUFFLE} --width 0.5": f"--width 0.5: {SHUFFLE} has one width; leave the flag out",
    f"simsiam --arch {SHUFFLE} --channels 1": "is for images of 3 channels; try timm:NAME, or resnet18",
    "simsiam --arch torchvision:alexnet --image-size 32": "cannot take images of 32 pixels (",
    "simsiam --arch torchvision:maxvit_t --image-size 32": "cannot be built for images of 32 pixels (",
    "simsiam --arch torchvision:vit_b_16 --image-size 40": "images of 40 pixels (Input shape indivisible by patch size",
    f"densecl --arch {SHUFFLE}": "only our ResNets have the maps and the filter used here, expected one of resnet18",
    f"deepcluster --arch {SHUFFLE}": "only our ResNets have the maps",
    f"eval_knn --pretrained random --arch {SHUFFLE} --width 0.25": "has one width",
    "swav --arch torchvision:vit_b_32 --image-size 32 --crops 2 1 --sizes 32 64": "cannot take images of 64 pixels (W",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_what_they_lack_is_refused(words, capsys, tmp_path):
    script, *more = words.split()
    batch = ["--batch-size", 16] if not script.startswith("eval") else []
    message = refused(capsys, main, script, "--data", "fake:32", *batch, "--workers", 0, "--out", tmp_path, *more)
    assert MISTAKES[words] in message


def test_files_and_networks_that_do_not_go_together(trained, capsys, tmp_path):
    run = tiny(tmp_path / "run", "torchvision:mobilenet_v3_small", "--init", trained / "backbone.pt")
    message = f"the file has {SHUFFLE}, this model is torchvision:mobilenet_v3_small: --arch {SHUFFLE}"
    assert message in refused(capsys, main, *run)
    assert f"this model is resnet18: --arch {SHUFFLE}" in refused(capsys, main, *run, "--arch", "resnet18")
    words = ["--pretrained", trained / "backbone.pt", *ALL, "--out", tmp_path]
    assert f"holds arch {SHUFFLE}; leave" in refused(capsys, main, "eval_knn", *words, "--arch", "resnet50")
    main("eval_knn", *words, "--image-size", 64, "--k", 5)  # a network without positions
    vit = network("torchvision:vit_b_32", image_size=32)
    meta = {"arch": vit.arch, "width": 1.0, "image_size": 32, "channels": 3}
    torch.save({"backbone": vit.state_dict(), "meta": meta}, tmp_path / "vit.pt")
    words[1] = tmp_path / "vit.pt"
    error = refused(capsys, main, "eval_knn", *words, "--image-size", 64)
    assert "holds torchvision:vit_b_32 for 32 pixels; leave the flag out" in error


def test_a_missing_library_is_one_hint(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert "--arch timm:NAME needs timm: pip install timm" in refused(capsys, network, "timm:convnextv2_atto")


@pytest.mark.parametrize("name", ["convnextv2_atto", "test_efficientnet", "test_vit"])
def test_networks_of_timm(name, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = network(f"timm:{name}", image_size=32, channels=2)
    theirs = timm.create_model(name, **model.options)
    theirs.load_state_dict(model.state_dict())
    x = torch.rand(2, 2, 32, 32)
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x))
    synchronised = batchnorm.convert(model.network)  # eval mode: no collective
    torch.testing.assert_close(synchronised(x), theirs(x))
    main(*tiny(tmp_path, f"timm:{name}", "--channels", 2, "--max-steps", 1))
    backbone, meta = load_backbone(tmp_path / "backbone.pt")
    assert meta["arch"] == f"timm:{name}" and meta["channels"] == 2 and backbone.dim == model.dim


def test_misspelt_names_of_timm(capsys):
    pytest.importorskip("timm")
    assert "did you mean timm:convnextv2_atto" in refused(capsys, network, "timm:convnext_v2_ato")
    assert "timm has no such network" in refused(capsys, network, "timm:hf_hub:someone/something")


def test_batch_norm_that_holds_its_activation():
    """As timm has it: synchronised or in groups, the activation stays."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4))
    judged, trained = model.eval()(IMAGES), model.train()(IMAGES)
    settle(model)
    torch.testing.assert_close(model.train()(IMAGES), trained)
    batchnorm.split_batch_norm(model, 1)
    torch.testing.assert_close(model(IMAGES), trained)
    model[1].reset_running_stats()
    changed = batchnorm.convert(model)
    assert isinstance(changed[1], nn.SyncBatchNorm)
    torch.testing.assert_close(changed.eval()(IMAGES), judged)
