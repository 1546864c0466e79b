"""Saving and loading: complete run states, exported backbones, and a loader that refuses half a network.

Files hold tensors, numbers, strings, lists and dictionaries only, so all of them load with `weights_only=True`.
"""

import pickle
from pathlib import Path

import torch

from common.distributed import barrier, is_main, print0
from common.log import fail, plain
from common.resnet import resnet

# Flags that may change between a run and its continuation: none of them alters what is learned.
RUN_FLAGS = {"data", "train_list", "val_list", "out", "workers", "device", "precision", "compile", "accum", "max_steps"}
RUN_FLAGS |= {"log_every", "save_every", "knn_every", "max_bad", "resume", "init", "dump_clusters"}


def save(path, state):
    """Writes a dictionary from the main process to a temporary file and renames it: nobody ever sees half a file."""
    if is_main():
        temporary = Path(path).with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)


def load(path, flag):
    """The dictionary in a file. `flag` names it in the message when it cannot be read."""
    if not Path(path).is_file():
        fail(f"{flag} {path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        fail(f"{flag} {path} is not a checkpoint that can be read safely: {reason}")
    if not isinstance(state, dict):
        fail(f"{flag} {path} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def save_run(args, step, images, model, optimizer, scaler, backbone, recipe, **more):
    """Writes `<out>/last.pt`, the complete state of a run, and `<out>/backbone.pt`, all that an evaluation needs.

    recipe: the view whose mean and std the backbone was trained with. more: what else the method has to remember.
    """
    meta = {
        "method": type(model).__name__.lower(),
        "arch": args.arch,
        "width": args.width,
        "image_size": args.image_size,
        "mean": list(recipe.mean),
        "std": list(recipe.std),
        **getattr(backbone, "config", {}),  # whatever else the architecture needs to be built again
    }
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    state |= {"step": step, "images": images, "args": plain(args), "meta": meta, **more}
    state["backbone_prefix"] = next(n + "." for n, m in model.named_modules() if m is backbone)
    save(Path(args.out) / "last.pt", state)
    save(Path(args.out) / "backbone.pt", {"backbone": backbone.state_dict(), "step": step, "meta": meta})


def resume(args, images, model, optimizer, scaler):
    """Continues from `<out>/last.pt` if it is there and its recipe agrees. Returns its dictionary, or None at a start.

    Ends the program with the list of differences when the recipe or the number of images differs.
    """
    path = Path(args.out) / "last.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    barrier()
    if not args.resume or not path.exists():
        return None
    state = load(path, "--out")
    if not {"args", "step", "model", "optimizer", "scaler", "images"} <= state.keys():
        fail(
            f"--out {args.out}: last.pt is not the state of a run; choose another --out, or --no-resume to overwrite it"
        )
    now = plain(args)
    names = sorted((now.keys() | state["args"].keys()) - RUN_FLAGS)
    differences = [
        f"--{n.replace('_', '-')} was {state['args'].get(n)}, is {now.get(n)}"
        for n in names
        if state["args"].get(n) != now.get(n)
    ]
    if state["images"] != images:
        differences.append(f"the data set had {state['images']} images, has {images}")
    if differences:
        fail(
            f"{path} is another recipe ({'; '.join(differences)}): choose another --out, or --no-resume to overwrite it"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    print0(f"resuming    {path}, step {state['step']}")
    return state


def init_from(path, model):
    """`--init`: weights for a fresh schedule, from a last.pt of the same script (everything) or any backbone file."""
    state = load(path, "--init")
    if "model" in state and "backbone_prefix" in state:
        missing, _ = model.load_state_dict(_fitting(state["model"], model), strict=False)
        loaded = len(model.state_dict()) - len(missing)
    else:
        loaded = load_weights(model.backbone, backbone_weights(state, path, "--init"), path, "--init")
    print0(f"init        {path}: {loaded} of {len(model.state_dict())} tensors")
    if not loaded:
        fail(f"--init {path}: no tensor fits this model")


def _fitting(weights, model):
    own = model.state_dict()
    return {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}


# --------------------------------------------------------------------------------------------------- backbones
def backbone_weights(state, path, flag):
    """The backbone's tensors under torchvision names, from any layout known here."""
    if "backbone" in state and "meta" in state:
        return state["backbone"]
    if "backbone_prefix" in state:
        prefix = state["backbone_prefix"]
        return {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
    if "conv1.weight" in state:  # torchvision
        return {k: v for k, v in state.items() if not k.startswith("fc.")}
    fail(f"{flag} {path}: no backbone found, its keys are {', '.join(map(str, list(state)[:5]))} ...")


def load_weights(backbone, weights, path, flag):
    """Loads all of a backbone or ends the program. Returns the number of tensors."""
    own = backbone.state_dict()
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    wrong = [k for k in own if k in weights and weights[k].shape != own[k].shape]
    if missing or wrong:
        names = [f"{k} missing" for k in missing]
        names += [f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}" for k in wrong]
        matched = sum(k in weights and weights[k].shape == v.shape for k, v in own.items())
        fail(f"{flag} {path}: only {matched}/{len(own)} tensors match the architecture: {'; '.join(names[:5])}")
    backbone.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)
    return len(own)


def load_backbone(path, arch=None, width=None, image_size=None, seed=0):
    """The network behind `--pretrained`: (backbone, meta). "random" gives a random initialisation.

    arch, width, image_size: taken from the file where it says, else resnet50, 1.0 and 224; a flag that contradicts the
    file ends the program. Prints how many tensors matched.
    """
    asked = {"arch": arch, "width": width, "image_size": image_size}
    meta = {
        "arch": "resnet50",
        "width": 1.0,
        "image_size": 224,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    meta["method"] = "random"
    if str(path) == "random":
        meta |= {k: v for k, v in asked.items() if v is not None}
        torch.manual_seed(seed)
        return resnet(meta["arch"], meta["width"], meta["image_size"]), meta
    state = load(path, "--pretrained")
    meta |= {"method": "unknown"} | state.get("meta", {})
    for name, value in asked.items():
        known = state.get("meta", {}).get(name)
        if value is not None and known is not None and value != known and name != "image_size":
            fail(f"--{name} {value}: {path} holds {name} {known}; leave the flag out")
        if value is not None:
            meta[name] = value
    # the stem goes with the size the network was trained at, not with the size it is used at
    trained_size = state.get("meta", meta).get("image_size", meta["image_size"])
    weights = backbone_weights(state, path, "--pretrained")
    backbone = resnet(meta["arch"], meta["width"], trained_size, input_filter=weights.get("input_filter"))
    count = load_weights(backbone, weights, path, "--pretrained")
    print0(f"pretrained  {path}: {meta['method']}, {meta['arch']}, tensors matched {count}/{count}")
    return backbone, meta
