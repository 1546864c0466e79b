"""Files that are handed in as weights: places where a whole network is found, and what is no checkpoint, each in one
line that names what it is and, where there is one, the remedy."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load_backbone
from common.formats import read, write_safetensors
from common.resnet import resnet
from tests.helpers import refused

torch.manual_seed(0)
NET = resnet("resnet18", 3 / 64, 224).state_dict()
OTHER = {k: v + 1 if v.is_floating_point() else v for k, v in NET.items()}


def prefixed(prefix, weights=NET):
    return {prefix + k: v for k, v in weights.items()}


def inside(wrapper, weights=NET):
    """With a wrapper behind the first part of each name: layer1._orig_mod.0.conv1.weight."""
    return {k.replace(".", f".{wrapper}.", 1) if k.count(".") > 1 else k: v for k, v in weights.items()}


def saved(content, **more):
    file = io.BytesIO()
    torch.save(content, file, **more)
    return file.getvalue()


PLACES = {
    "twice wrapped": prefixed("module.module."),
    "compiled and parallel": prefixed("_orig_mod.module."),
    "lightning, compiled": {"state_dict": prefixed("model._orig_mod."), "epoch": 1},
    "compiled stages": {"state_dict": inside("_orig_mod")},
    "everything": {"model_state": prefixed("module.encoder._orig_mod.", inside("module"))},
    "any prefix": prefixed("image_encoder.net."),
    "any container": {"weights": {"student_or_so": NET}, "epoch": 3},
    "average": {"n_averaged": torch.tensor(4), **prefixed("module.")},
    "list": [NET, {"step": 3}],
    "tuple": (3, NET),
    "list of networks": {"models": [{"state": NET}]},
    "arrays": {k: v.numpy() for k, v in NET.items()},
    "parameters": {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in NET.items()},
}


@pytest.mark.parametrize("place", PLACES)
def test_whole_network_is_found(place, tmp_path):
    torch.save(PLACES[place], tmp_path / "x.pt")
    backbone, _ = load_backbone(tmp_path / "x.pt")
    assert all(torch.equal(v, NET[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize(
    "content, taken, other",
    [
        ({"state_dict": NET, "state_dict_ema": OTHER}, "state_dict", "state_dict_ema"),
        ({"state_dict": prefixed("model."), "callbacks": {"EMA": {"w": OTHER}}}, "state_dict.model", "callbacks.EMA.w"),
        ({"net": {**prefixed("encoder_q."), **prefixed("encoder_k.", OTHER)}}, "net.encoder_q", "net.encoder_k"),
        ({"models": [NET, OTHER]}, "models.0", "models.1"),
    ],
)
def test_copies_are_named_and_can_be_chosen(content, taken, other, tmp_path, capsys):
    torch.save(content, tmp_path / "x.pt")
    load_backbone(tmp_path / "x.pt")
    assert f"taken is {taken}; the file also has {other} (--pretrained-key" in capsys.readouterr().out
    chosen, _ = load_backbone(tmp_path / "x.pt", key=other)
    assert all(torch.equal(v, OTHER[k]) for k, v in chosen.state_dict().items())


def test_names_in_a_refusal_come_from_inside(tmp_path, capsys):
    torch.save({"state_dict": {"tower.w": torch.zeros(3)}, "epoch": 1, "args": {}}, tmp_path / "x.pt")
    error = refused(capsys, load_backbone, tmp_path / "x.pt")
    assert "no backbone found" in error and "the names in state_dict are tower.w" in error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layer2.0.conv1.weight", "bn1.running_var"])
def test_broken_weights_are_refused_and_a_good_copy_can_be_chosen(name, value, tmp_path, capsys):
    broken = NET | {name: torch.full_like(NET[name], value)}
    torch.save({"state_dict": broken}, tmp_path / "one.pt")
    error = refused(capsys, load_backbone, tmp_path / "one.pt")
    assert f"{name} holds numbers that are not finite" in error and "--pretrained-key" not in error
    torch.save({"state_dict": broken, "state_dict_ema": NET}, tmp_path / "two.pt")
    assert "or another copy by --pretrained-key" in refused(capsys, load_backbone, tmp_path / "two.pt")
    load_backbone(tmp_path / "two.pt", key="state_dict_ema")


# ------------------------------------------------------------------------------------------------ no checkpoints
def archive(kind, **files):
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            for name, content in files.items():
                file.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w") as file:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                file.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def image(kind):
    out = io.BytesIO()
    Image.new("RGB", (9, 9)).save(out, kind)
    return out.getvalue()


def arrays():
    out = io.BytesIO()
    np.savez(out, **{"conv1.weight": np.zeros(3)})
    return out.getvalue()


def safetensors():
    out = io.BytesIO()
    write_safetensors(NET, out)
    return out.getvalue()


NEW, OLD = saved(NET), saved(NET, _use_new_zipfile_serialization=False)
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xe4\x01\n" + bytes(range(256))
WRONG = {  # content, part of the line
    "empty": (b"", "is empty (0 bytes)"),
    "zeros": (bytes(4096), "begins with zeros"),
    "page": (b"\xef\xbb\xbf\n<!DOCTYPE html>", "is a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is a web page"),
    "answer": (b'{"error": "Not Found"}', 'is not a checkpoint but text: \'{"error": "Not Found"}\''),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "run git lfs pull"),
    "xet": (b"# xet version 0\nfilesize = 1\n", "run git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s1048576--abc.pt\n", "run git annex get"),
    "annex link": (b"../.git/annex/objects/8f/x/SHA256E-s1--a.pt", "run git annex get"),
    "dvc": (b"outs:\n- md5: a304afb96060aad90176268345e10355\n  path: model.pt\n", "run dvc pull"),
    "dvc with comment": (b"# made by hand\nmd5: a304\nouts:\n- path: model.pt\n", "run dvc pull"),
    "cut": (NEW[: len(NEW) // 2], f"is cut short (a broken download?): {len(NEW) // 2} bytes"),
    "cut at the end": (NEW[:-100], "is cut short"),
    "cut at the start": (NEW[:4], "is cut short"),
    "cut, old": (OLD[: len(OLD) // 2], "is cut short"),
    "cut early, old": (OLD[:30], "is cut short"),
    "cut.safetensors": (safetensors()[:20_000], "is cut short"),
    "cut in the header.safetensors": (safetensors()[:100], "is cut short"),
    "cut before it.safetensors": (safetensors()[:8], "is cut short"),
    "compressed": (gzip.compress(NEW), "is an archive: unpack it"),
    "tar": (archive("tar", **{"a/model.pt": NEW}), "is an archive: unpack it"),
    "zip": (archive("zip", **{"a/model.pth": NEW}), "is a zip archive of a/model.pth, not a checkpoint: unpack it"),
    "keras": (
        archive("zip", **{"config.json": b"{}", "model.weights.h5": b""}),
        "config.json, model.weights.h5, not a",
    ),
    "program": (
        archive("zip", **{"p/archive_format": b"pt2"}),
        "not a checkpoint: take the file that it was made from",
    ),
    "npz": (arrays(), "conv1.weight.npy, not a checkpoint: torch.save({name: tensor}, ...) of its arrays"),
    "cut npz": (arrays()[:100], "is cut short"),
    "npy": (b"\x93NUMPY\x01\0v\0", "is a NumPy array"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "onnx": (ONNX, "is a file of ONNX or TensorFlow, not a checkpoint: take the file that it was made from"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(99), "is a file of ONNX or TensorFlow"),
    "flax": (b"\x81\xa6params\x82\xa6Conv_0" + bytes(99), "is a MessagePack file"),
    "gguf": (b"GGUF\x03\0\0\0", "is a GGUF file"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a document"),
    "script": (b"import torch\n", "is not a checkpoint but text: 'import torch'"),
    "pickle": (pickle.dumps({"a": [1]}), "is a pickle that torch.save did not write"),
    "binary": (b"\x7fELF\x02\x01\x01" + bytes(99), "is a file of no known kind: it begins with"),
    "database": (b"SQLite format 3\0" + bytes(90), "is a file of no known kind"),
    "tensor": (saved(torch.zeros(3)), "holds a Tensor, not a dictionary"),
    **{kind: (image(kind), "is an image, not a checkpoint") for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff")},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_checkpoint_is_named(name, tmp_path, capsys):
    content, expected = WRONG[name]
    path = tmp_path / (name if "." in name else f"{name}.pt")
    path.write_bytes(content)
    error = refused(capsys, load_backbone, path)
    assert error.startswith(f"error: --pretrained {path} ") and expected in error and "Weights only" not in error


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x"])
@pytest.mark.parametrize("content", [NEW, OLD, safetensors()])
def test_contents_decide_and_not_the_name(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    state, problem = read(tmp_path / name)
    assert problem is None and torch.equal(state["conv1.weight"], NET["conv1.weight"])


@pytest.mark.parametrize(
    "files, expected",
    [
        ((), "is a folder without weights"),
        (("backbone.pt", "last.pt", "log.jsonl"), "is a folder: name the file in it, backbone.pt, last.pt\n"),
        (("checkpoints/epoch=1.ckpt",), "name the file in it, checkpoints/epoch=1.ckpt\n"),
        ((".metadata", "__0_0.distcp"), "is a distributed checkpoint: python -m torch.distributed.checkpoint."),
        (("saved_model.pb",), "is a folder without weights"),
    ],
)
def test_folders(files, expected, tmp_path, capsys):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert expected in refused(capsys, load_backbone, tmp_path)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("modle.pt", "no such file (did you mean model.pt?)"),
        ("x/model.pt", "no such file; there is no folder "),
        ("https://host/model.pt", "it is an address: download it first"),
        ("annexed.pt", "which does not exist: run git annex get"),
        ("dangling.pt", "but a link to nowhere, which does not exist\n"),
        ("", "--pretrained is empty"),
    ],
)
def test_missing_files(path, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").touch()
    (tmp_path / "annexed.pt").symlink_to(".git/annex/objects/x")
    (tmp_path / "dangling.pt").symlink_to("nowhere")
    assert expected in refused(capsys, load_backbone, path)


def test_architectures_that_are_advised_can_be_taken(tmp_path, capsys):
    """48 dimensions: no usual number of heads; each architecture of those named gives one that divides them."""
    from common.vit import vit

    torch.save(vit("vit_tiny", 32, width=0.25, depth=2).state_dict(), tmp_path / "x.pt")
    error = refused(capsys, load_backbone, tmp_path / "x.pt")
    advised = [word for word in error.split() if word.startswith("vit_")]
    assert advised == ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    for arch in advised:
        load_backbone(tmp_path / "x.pt", arch=arch)
