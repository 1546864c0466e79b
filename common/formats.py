"""Reading weights from the files that people have: those of torch, safetensors, folders of Hugging Face. What is no
such file is recognised by its first bytes and named in one line.

A pickle can run any program. None is run here: only tensors, plain values and harmless types are restored, unless the
caller trusts the file's origin.
"""

import argparse
import collections
import json
import math
import pathlib
import pickle
import pickletools
import re
import types
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pth.tar", ".pt.tar")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool}

WRITE = "torch.save({name: tensor}, ...) of its arrays, under the names of torchvision or timm, can be read"
SOURCE = "take the file that it was made from"
# How other files begin, and what they are.
SIGNS = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself: run git lfs pull where it was cloned"),
    (rb"# xet version", "is a pointer, not the file itself: run git lfs pull where it was cloned"),
    (rb"[./\w]*annex/objects/", "is a git-annex pointer, not the file itself: run git annex get where it was cloned"),
    (rb"(#.*?\n|\s)*(outs:|md5: )", "is a DVC pointer, not the file itself: run dvc pull where it was cloned"),
    (rb"(\xef\xbb\xbf)?\s*<", "is a web page, not a checkpoint: the download needs another address, or a login"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|.{257}ustar", "is an archive: unpack it"),
    (
        rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*",
        "is an image, not a checkpoint",
    ),
    (rb"\x89HDF", "is an HDF5 file, of Keras for instance, and holds no network that is known here"),
    (rb"\x93NUMPY", f"is a NumPy array, not a checkpoint: {WRITE}"),
    (rb"\x08[\x01-\x14][\x12\x3a\x42]|.{4}TFL3", f"is a file of ONNX or TensorFlow, not a checkpoint: {SOURCE}"),
    (rb"[\x81-\x8f\xde\xdf][^\0]?\0?.?[\xa1-\xbf\xd9\xda]", f"is a MessagePack file, of Flax for instance: {WRITE}"),
    (rb"GGUF", f"is a GGUF file, not a checkpoint: {SOURCE}"),
    (rb"%PDF", "is a document, not a checkpoint"),
    (rb"\0{64}", "begins with zeros: its download was never written"),
)
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first of five pickles with which files before torch 1.6 begin
CUT = r"EOF|truncated|Ran out of input|wrong byte size"  # words of torch


def read(path, trust_pickle=False, remedy="add"):
    """(the dictionary in a file, None) or (None, what is wrong with it: the end of a sentence, in one line).
    remedy: what to do with --trust-pickle where that helps."""
    try:
        path = Path(path)
        if path.is_dir():
            state = {}
            for file in next((files for pattern in WEIGHTS if (files := sorted(path.glob(pattern)))), []):
                part, problem = read(file, trust_pickle, remedy)
                if problem:
                    return None, f"holds {file.name}, which {problem}"
                state |= part
            return (state, None) if state else (None, _folder(path))
        with open(path, "rb") as file:
            head = file.read(512)
        if problem := _recognise(path, head):
            return None, problem
        if head[7:9] == b"\0{" or (path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))):
            state = _read_safetensors(path)
        else:  # from the open file: the name might end in .safetensors
            with torch.serialization.safe_globals(harmless_types()), open(path, "rb") as file:
                state = torch.load(file, "cpu", PICKLE if trust_pickle else None, weights_only=not trust_pickle)
    except Exception as error:  # a damaged file can raise anything
        return None, _explain(path, error, None if trust_pickle else remedy)
    state = state.state_dict() if isinstance(state, nn.Module) else state  # only if the pickle is trusted
    state = {str(i): part for i, part in enumerate(state)} if isinstance(state, (list, tuple)) else state
    if not isinstance(state, dict):
        return None, f"holds a {type(state).__name__}, not a dictionary of weights"
    beside = ("config.json", "preprocessor_config.json") if path.suffix in (".safetensors", ".bin") else ()
    config = {k: v for name in beside for k, v in _read_json(path.with_name(name)).items()}
    return (state | {"config.json": config} if config else state), None


def _recognise(path, head):
    """What a file is that begins like this, or None if it may hold weights."""
    if not head:
        return "is empty (0 bytes)"
    for sign, text in SIGNS:
        if re.match(sign, head, re.DOTALL):
            return text
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            return _cut(path)
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            return f"is a zip archive of {', '.join(names[:3]) or 'nothing'}, not a checkpoint{_zip_remedy(names)}"
    if head.startswith(b"\x80") and OLD[3:] not in head and not OLD.startswith(head):  # torch would run it, and give up
        return _cut(path) if _ends_early(path) else f"is a pickle that torch.save did not write: {WRITE}"
    if not re.search(rb"^\x80|[^\t\n\r -~\x80-\xff]", head):
        return f"is not a checkpoint but text: {head[:60].decode(errors='replace').strip()!r}"
    return None


def _zip_remedy(names):
    if all(name.endswith(".npy") for name in names):
        return f": {WRITE}"
    if any("data/weights/" in name or "archive_format" in name for name in names):  # of torch.export
        return f": {SOURCE}"
    return ": unpack it" if any(name.endswith(ENDINGS) for name in names) else ""


def _folder(path):
    """What to say of a folder without weights of Hugging Face."""
    if any(path.glob("*.distcp")):
        tool = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        return f"is a distributed checkpoint: {tool} {path} FILE.pt makes one file of it"
    names = sorted(file.relative_to(path).as_posix() for file in path.glob("**/*") if file.name.endswith(ENDINGS))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"is a folder: name the file in it, {', '.join(names[:5])}{more}" if names else "is a folder without weights"


def _cut(path):
    return f"is cut short (a broken download?): {path.stat().st_size} bytes"


def _ends_early(path):
    """Does a pickle of the file end early? Nothing in it is carried out."""
    with open(path, "rb") as file:
        count = 5 if file.read(len(OLD)) == OLD else 1
        file.seek(0)
        try:
            for _ in range(count):
                collections.deque(pickletools.genops(file), 0)
        except ValueError:
            return not file.read(1)
    return False


def _explain(path, error, remedy):
    reason = re.sub("(?s).*Unpickler error: ", "", str(error)).strip() or type(error).__name__
    reason = reason.splitlines()[0][:120]
    with open(path, "rb") as file:
        head = file.read(len(OLD))
    pickled = head.startswith(b"\x80")
    if isinstance(error, EOFError) or re.search(CUT, str(error)) or (pickled and _ends_early(path)):
        return _cut(path)
    if not pickled and not head.startswith((b"PK", OLD)) and head[7:9] != b"\0{":
        return f"is a file of no known kind: it begins with {head[:8]!r}"
    foreign = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
    if foreign and remedy:
        trust = f"If you trust the origin of the file: {remedy} --trust-pickle"
        held = foreign[1] or "a TorchScript program"
        return f"cannot be read safely: it holds {held}, and restoring that could run any program. {trust}"
    return f"is not a checkpoint that can be read safely: {reason}" if remedy else f"cannot be read: {reason}"


def _read_json(path):
    """The dictionary in a JSON file; {} if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ----------------------------------------------------------------------------------------------------- pickles
def harmless_types():
    """What published files hold beside tensors and what can do nothing but store values: arguments, paths, numbers."""
    kinds = [argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    for function in (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]):  # scalar, _reconstruct
        kinds += [(function, f"numpy.{core}.multiarray.{function.__name__}") for core in ("core", "_core")]
    kinds += [np.ndarray]
    for module in ("pathlib", "pathlib._local"):  # the second name is that of Python 3.13
        for name in ("Posix", "PurePosix", "Windows", "PureWindows"):
            kind = pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
            kinds.append((kind, f"{module}.{name}Path"))
    return kinds


class Stub(dict):
    """Stands for an object whose class is not installed: takes whatever it is given and holds nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        pass

    def extend(self, values):
        pass

    append = extend
    __hash__ = object.__hash__


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name, (Stub,), {})


def _load(file, **more):
    return _Unpickler(file, **more).load()


PICKLE = types.SimpleNamespace(__name__="pickle", Unpickler=_Unpickler, load=_load)  # what torch asks of a module


# ------------------------------------------------------------------------------------------------- safetensors
# Eight bytes n, n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, then the numbers.
def _read_safetensors(path):
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size < path.stat().st_size else b""
        if len(header) < size:
            raise EOFError
        data = torch.from_numpy(np.fromfile(file, np.uint8))
    header, state = json.loads(header), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        kind, (begin, end) = DTYPES.get(entry["dtype"]), entry["data_offsets"]
        if kind is None:
            raise ValueError(f"{name} has numbers of type {entry['dtype']}, which are not known here")
        if end > len(data):
            raise EOFError
        if end - begin != math.prod(entry["shape"]) * kind.itemsize:
            raise ValueError(f"{name} does not have as many numbers as its shape says")
        state[name] = data[begin:end].clone().view(kind).reshape(entry["shape"])
    return state


def write_safetensors(weights, file):
    """Writes tensors by name into an open file, in an order that depends on nothing else."""
    names, header, parts, begin = {v: k for k, v in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, [], 0
    for name in sorted(weights, key=lambda name: (-weights[name].itemsize, name)):  # so that all of them are aligned
        value = weights[name].contiguous()
        parts.append(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        end = begin + len(parts[-1])
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text + b"".join(parts))
