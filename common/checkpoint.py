"""Saving and loading: complete run states, exported backbones, and a loader that refuses half a network.

Our files hold tensors, numbers, strings, lists and dictionaries only, so all of them load with `weights_only=True`.
Other people's files are read by common/formats.py; the tables of common/layouts.py say what is in them.
"""

import contextlib
import os
import re
import sys
from pathlib import Path

import torch
from torch import nn

from common import conv4, formats, layouts, networks, resnet, swin, vit, xcit
from common.args import default_size, fail
from common.distributed import agree, is_main, print0
from common.files import atomic, make_folder
from common.folders import nearest_name

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

# of the networks that take whatever the shapes tell
MAKERS = {"vit": vit.vit, "swin": swin.swin, "xcit": xcit.xcit, "conv4": conv4.conv4}
FORMAT = 2  # of last.pt: a state of another number is that of another version of these scripts


def save_file(path, state, keep=False):
    """Writes a dictionary from the main process: nobody ever sees half a file.

    keep: what was there becomes `<name>.previous.pt`. Ends the program with code 1 when the file cannot be written.
    """
    if not is_main():
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # someone may have removed the folder of a run
        with atomic(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # a rename must not overtake the contents when the machine loses power
            if keep and path.exists():
                path.replace(path.with_suffix(".previous.pt"))
    except (OSError, RuntimeError) as error:  # torch wraps the errors of the system
        reason = getattr(error.__context__ if isinstance(error, RuntimeError) else error, "strerror", None) or error
        left = f"; the state saved before is in {path}" if path.exists() else ""
        fail(f"cannot write {path}: {str(reason).splitlines()[0]}{left}. Make room and repeat the command", code=1)


def load_file(path, flag, trust_pickle=False):
    """The dictionary in a file, or in a folder as Hugging Face has it. `flag` names it in the message that ends the
    program when it cannot be read. trust_pickle: the file's origin is trusted, its pickle may run anything."""
    if not str(path).strip():
        fail(f"{flag} is empty: name a file")
    if not Path(path).exists():
        fail(f"{flag} {path}: no such file{_missing(Path(path))}")
    remedy = "add" if flag == "--pretrained" else "convert it by export.py"
    state, problem = formats.read(path, trust_pickle, remedy)
    return state if problem is None else fail(f"{flag} {path} {problem}")


def _missing(path):
    """Why a file may not be there."""
    if re.match(r"\w+:/", str(path)):
        return "; it is an address: download it first"
    if os.path.islink(path):
        remedy = ": run git annex get where it was cloned" if "annex/objects" in os.readlink(path) else ""
        return f", but a link to {os.readlink(path)}, which does not exist{remedy}"
    with contextlib.suppress(OSError):
        return nearest_name(path.name, os.listdir(path.parent))
    return f"; there is no folder {path.parent}"


def save_run(args, step, images, model, optimizer, scaler, backbone, view):
    """Writes `<out>/last.pt`, the complete state of a run, and `<out>/backbone.pt`, all that an evaluation needs.
    view: whose mean and std the backbone was trained with."""
    meta = {"method": type(model).__name__.lower(), "arch": args.arch, "width": args.width}
    meta |= {"image_size": args.image_size, "channels": len(view.mean), "mean": [*view.mean], "std": [*view.std]}
    meta |= getattr(backbone, "config", {})  # whatever else the architecture needs to be built again
    state = run_state(args, step, images, model, optimizer, scaler) | {"meta": meta}
    state["backbone_prefix"] = prefix_of(backbone, model)
    # last.pt comes last: when it says that a run is complete, so is everything else
    save_file(Path(args.out) / "backbone.pt", {"backbone": backbone.state_dict(), "step": step, "meta": meta})
    save_file(Path(args.out) / "last.pt", state, keep=True)


def prefix_of(backbone, model):
    return next(name + "." for name, module in model.named_modules() if module is backbone)


def run_state(args, step, images, model, optimizer, scaler):
    """What `resume` needs. images: their number in the data set."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    recipe = {k: v for k, v in args.plain().items() if k in args.held}
    state |= {"format": FORMAT, "script": args.script, "step": step, "images": images}
    return state | {"args": args.plain(), "recipe": recipe}


def resume(args, images, model, optimizer, scaler, name="last.pt", more=()):
    """Continues from `<out>/<name>` if it is there and its recipe agrees. Returns its dictionary, or None at a start.

    A damaged file is replaced by the one saved before it. Ends the program if that does not help either, if the run is
    one of another script, or with the list of differences when the recipe, the number of images or more["same"], {what:
    hash}, differs: nothing starts again from zero in silence.
    """
    path = make_folder(args.out) / name
    agree(images, model) or fail("--data has another number of images on another process: is a copy incomplete?")
    found = [p for p in (path, path.with_suffix(".previous.pt")) if p.exists()]
    apart = f"--out {args.out} is not the same folder on all nodes: put it on a file system that all of them see"
    if not args.resume or not found:
        return None if agree(-1, model) else fail(apart)
    remedy = "choose another --out, or --no-resume to overwrite it"
    for path in found:
        state, problem = formats.read(path)
        if problem is None:
            break
        print0(f"warning: --out {path} {problem}", file=sys.stderr)
    else:
        fail(f"--out {args.out}: no state of the run can be read; {remedy}")
    if path != found[0] and is_main():  # or the next save would put the damaged file in the place of this good one
        with contextlib.suppress(OSError):
            found[0].replace(found[0].with_suffix(".damaged.pt"))
    if not {"args", "step", "model", "optimizer", "scaler", "images"} <= state.keys():
        fail(f"--out {args.out}: {name} is not the state of a run; {remedy}")
    if not agree(state["step"], model):  # a node without it would start from zero in silence
        fail(apart)
    if state.get("format") != FORMAT:
        fail(f"{path} was written by another version of these scripts, which cannot be continued: {remedy}")
    if (owner := state.get("script", args.script)) != args.script:
        fail(f"--out {args.out} belongs to {owner}, this is {args.script}: choose another --out")
    was, now = state["recipe"], {k: v for k, v in args.plain().items() if k in args.held}
    changed = [k for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
    differences = [f"--{k.replace('_', '-')} was {was.get(k)}, is {now.get(k)}" for k in changed]
    differences += [f"the data set had {state['images']} images, has {images}"] * (state["images"] != images)
    same = more["same"].items() if "same" in more else ()  # a file of an earlier version does not say it
    differences += [f"{what} are others" for what, now in same if state.get("same", {}).get(what, now) != now]
    if differences:
        prefix, both = state.get("backbone_prefix", ""), (model.state_dict(), state["model"])
        own, there = ({k: v.shape for k, v in tensors.items() if k.startswith(prefix)} for tensors in both)
        if prefix and own == there and "init" in vars(args):
            remedy += f"; to go on from its weights with a new schedule: --out NEW --init {path}"
        fail(f"{path} is another recipe ({'; '.join(differences)}): {remedy}")
    if (accum := state["args"].get("accum")) != args.accum:
        print0(f"note        --accum was {accum}, is {args.accum}: batch norm now sees batches of another size")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty but for fp16
        scaler.load_state_dict(state["scaler"])
    print0(f"resuming    {path}, step {state['step']}")
    return state


def init_from(path, model):
    """`--init`: weights for a fresh schedule. The whole backbone, from any file that `load_backbone` reads; from the
    last.pt of a run also what else (heads, for instance) has the same name and shape here."""
    state, own, where = load_file(path, "--init"), model.state_dict(), f"--init {path}"
    found = find_backbone(state, where)
    heads, was = getattr(model.backbone, "heads", None), network_shape(found).get("heads")
    if heads and was and heads != was:
        known = "heads" in found.meta or found.layout.heads
        was = f"was{'' if known else ', as far as one can tell,'} trained with {was} attention heads"
        (fail if known else print0)(f"{where} {was}, this model has {heads}")
    weights = fit_channels(resize_positions(found.weights, model.backbone), model.backbone)
    if compare_tensors(model.backbone, weights)[0]:
        why = layouts.explain(found, model.backbone)
        refuse_tensors(where, "this model's backbone", model.backbone, weights, why)
    fitting = {prefix_of(model.backbone, model) + k: v for k, v in weights.items()}
    if "backbone_prefix" in state:
        fitting = {k: v for k, v in state["model"].items() if k in own and own[k].shape == v.shape} | fitting
    model.load_state_dict(fitting, strict=False)
    print0(f"init        {path}: {len(fitting)} of {len(own)} tensors")


def fit_channels(weights, network):
    """The weights with the first layer for images of other channels, where there is one right way: what grey images
    give is what they gave as three equal channels, and any channels give what their mean gave as a grey image."""
    names = ("conv1.weight", "conv1.0.weight", "patch_embed.proj.0.0.weight", "patch_embed.proj.weight")
    name = next((name for name in names if name in weights), "")
    layer, own = weights.get(name), network.state_dict().get(name)
    if layer is None or own is None or layer.ndim != 4 or "input_filter" in weights | network.state_dict():
        return weights
    was, now = layer.shape[1], own.shape[1]
    if (was, now) == (3, 1):
        weights, how = weights | {name: layer.sum(1, keepdim=True)}, "summed over the three"
    elif was == 1 < now:
        weights, how = weights | {name: layer.expand(-1, now, -1, -1) / now}, "shared out among them"
    else:
        return weights
    print0(f"init        first layer for {now} channels instead of {was}: its weights are {how}")
    return weights


# --------------------------------------------------------------------------------------------------- backbones
def find_backbone(state, where, arch=None, key=None):
    """The backbone (layouts.Found) in the dictionary of a file: the complete one with the most tensors. Says which
    copies were left.

    where: flag and path, for the message that ends the program when there is none. arch: what it is said to be.
    key: only what stands under this name in the file.
    """
    found = layouts.candidates(state, key)
    if not found:
        if key and (places := [entry.place[:-1] for entry in layouts.candidates(state)]):
            fail(f"{where}: no whole backbone under --pretrained-key {key}; there is {', '.join(places)}")
        path, held = max(layouts.containers(state).items(), key=lambda item: len(item[1]), default=("", state))
        names = ", ".join(map(str, list(held)[:5])) or "none at all"
        place = path[:-1] or "it"
        fail(f"{where}: no backbone found (a ResNet, ViT, Swin or XCiT); the names in {place} are {names} ...")

    def rank(candidate):
        shape = network_shape(candidate, arch)
        if candidate.family == "vit" and shape["heads"] is None:
            return False, 0
        bad, matched, _ = compare_tensors(make_network(candidate, shape, where), candidate.weights)
        return not bad, matched

    best = max(found, key=rank) if len(found) > 1 else found[0]
    if best.naming.name == "transformers":
        for setting, value in layouts.CONFIG[best.family].items():
            if (there := state.get("config.json", {}).get(setting, value)) != value:
                fail(f"{where}: config.json has {setting} {there}, this network is not built here ({value} is)")
    for name, value in best.weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            remedy = f"take an earlier file{', or another copy by --pretrained-key' if len(found) > 1 else ''}"
            fail(f"{where}: {name} holds numbers that are not finite: the run has diverged, {remedy}")
    if others := _copies(state, best, found):
        place = best.place.removesuffix(".") or "the first level"
        flag = "--pretrained-key" if where.startswith("--pretrained") else "export.py --pretrained-key"
        print0(f"copies      taken is {place}; the file also has {', '.join(others)} ({flag} takes another)")
    return best


def _copies(state, best, found):
    """Where else in the file such tensors stand, whole or in part, that are not the best one's under another name."""
    known = {entry.place: entry.weights for entry in found}
    held = layouts.containers(state)
    container = max((path for path in held if best.place.startswith(path)), key=len)
    prefix = best.place.removeprefix(container)
    names = {name for name in held[container] if name.startswith(prefix)}
    more = {path + prefix: {} for path in held if path != container and names & held[path].keys()}
    return [p.removesuffix(".") for p, weights in (more | known).items() if not _equal(weights, best.weights)]


def _equal(a, b):
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and bool((a[k] == b[k]).all()) for k in a)


def network_shape(found, arch=None):
    """The arguments that build the network: what the file says, and where it says nothing, what its shapes tell."""
    if found.family in ("library", "conv4"):  # of our own files alone, which say it
        return {k: found.meta[k] for k in ("arch", "width", "image_size", "channels")}
    told = layouts.shape_of(found.family, found.weights, found.layout, arch)
    return told | {k: v for k, v in found.meta.items() if k in told and k != "image_size"}


def make_network(found, shape, where):
    """The network of these arguments, one of ours without memory for its weights (on the device "meta")."""
    if found.family == "library":
        return networks.Library(**shape)
    if found.family == "vit" and shape["heads"] is None:
        dim = round(vit.ARCHS[shape["arch"]][0] * shape["width"])
        likely = " or ".join(f"{name} ({row[2]})" for name, row in vit.ARCHS.items() if dim % row[2] == 0)
        fail(f"{where}: a ViT of {dim} dimensions, whose number of heads is not known: --arch {likely or 'of it'}")
    with torch.device("meta"):
        if found.family in MAKERS:
            return MAKERS[found.family](**shape)
        size = resnet.SMALL if shape["small"] else 224  # the stem goes with the size the network was trained at
        inputs = {"input_filter": found.weights.get("input_filter"), "channels": shape["channels"]}
        backbone = resnet.resnet(shape["arch"], shape["width"], size, **inputs)
    if shape["small"]:
        backbone.conv1.padding = (found.layout.padding, found.layout.padding)
    if not found.naming.stem_relu:
        backbone.relu = nn.Identity()
    return backbone


def compare_tensors(network, weights):
    """Names and shapes of a network and a file: (what differs, a line each; tensors that agree; tensors needed)."""
    own, there = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (network.state_dict(), weights))
    counted = any(k.endswith("num_batches_tracked") for k in weights)  # old files do not have them
    needed = [k for k in own if counted or not k.endswith("num_batches_tracked")]
    bad = [f"{k} missing" for k in needed if k not in there]
    bad += [f"{k} {there[k]} instead of {own[k]}" for k in needed if there.get(k, own[k]) != own[k]]
    matched = len(needed) - len(bad)
    return bad + [f"{k} unexpected" for k in weights if k not in own], matched, len(needed)


def refuse_tensors(where, name, network, weights, why=""):
    bad, matched, needed = compare_tensors(network, weights)
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    only = "only " if matched < needed else ""
    why = f"{why}; " if why else ""
    fail(f"{where}: {why}{only}{matched}/{needed} tensors match {name}: {'; '.join(bad[:5])}{more}")


def resize_positions(weights, network):
    """The weights with the positions of a ViT interpolated to the grid of the network."""
    if not hasattr(network, "grid"):
        return weights
    fitting, side = vit.fit_positions(weights, network.grid)
    if side:
        print0(f"positions   {side} x {side} patches resized to {network.grid[0]} x {network.grid[1]} (bicubic)")
    return fitting


def load_pretrained(args):
    """The network that the flags of an evaluation name (`Parser.add_pretrained`), and what is known of it."""
    size = args.image_size or (default_size(args.data) if str(args.pretrained) == "random" else None)
    given = {k: getattr(args, k) for k in ("mean", "std") if getattr(args, k) is not None}
    rest = (args.seed, args.trust_pickle, getattr(args, "channels", None), args.pretrained_key)
    return load_backbone(args.pretrained, args.arch, args.width, size, *rest, **given)


def load_backbone(
    path, arch=None, width=None, image_size=None, seed=0, trust_pickle=False, channels=None, key=None, **given
):
    """The network behind `--pretrained`: (backbone, meta). "random" gives a random initialisation.

    arch, width, channels, image_size: taken from the file, which has them in words (ours) or in the shapes of its
    tensors; one of the first three that contradicts it ends the program. Another image_size makes a ViT interpolate
    its positions. trust_pickle: see `load_file`. key: see `find_backbone`. given: mean and std of the images in place
    of what the file says, one number or one per channel. Prints how many tensors matched: all, or the program ends.
    """
    if str(path) != "random":
        found = find_backbone(load_file(path, "--pretrained", trust_pickle), f"--pretrained {path}", arch, key)
        backbone, meta = build_backbone(found, path, arch, width, image_size, channels, given)
        if channels not in (None, meta["channels"]):
            fail(f"--channels {channels}: {path} is for images of {meta['channels']}; leave the flag out")
        return backbone, meta
    meta = {"method": "random", "arch": arch or "resnet50", "width": width or 1.0, "image_size": image_size or 224}
    meta |= default_statistics(channels or 3)
    torch.manual_seed(seed)
    make = MAKERS.get(meta["arch"].split("_")[0], networks.network)
    backbone = make(**{k: meta[k] for k in ("arch", "width", "image_size", "channels")})
    same = f"{meta['arch']}, width {meta['width']:g}, {meta['image_size']} px, {meta['channels']} channels"
    print0(f"pretrained  random: {same}; compare with networks of the same --arch, --width and --image-size")
    return backbone, meta | getattr(backbone, "config", {}) | per_channel(given, meta["channels"])


def default_statistics(channels):
    """Channels, mean and standard deviation where a file says nothing of them: ImageNet's, if they are three."""
    other = {"mean": [0.5] * channels, "std": [0.25] * channels}
    return {"channels": channels} | (IMAGENET if channels == 3 else other)


def per_channel(given, channels):
    """--mean and --std with as many numbers as there are channels."""
    for name, value in given.items():
        if len(value) not in (1, channels):
            fail(f"--{name}: {len(value)} numbers for images of {channels} channels: give one, or one per channel")
    return {name: [*value] * (channels // len(value)) for name, value in given.items()}


def build_backbone(found, path, arch=None, width=None, image_size=None, channels=None, given=()):
    """Builds what was found in a file and loads all of it, or ends the program. Returns (backbone, meta). channels and
    given (mean, std): what the user says of the images."""
    where = f"--pretrained {path}"
    if found.name != found.layout.name and channels == 2:  # not edges after all
        weights = {k: v for k, v in found.weights.items() if k != "input_filter"}
        found = found._replace(weights=weights, name=found.layout.name)
    shape = network_shape(found, arch)
    if found.family == "library" and image_size:
        shape["image_size"] = image_size
    backbone, weights = make_network(found, shape, where), found.weights
    if compare_tensors(backbone, weights)[0]:
        if shape.get("image_size") != (was := found.meta.get("image_size")) and found.family == "library":
            fail(f"--image-size {image_size}: {path} holds {shape['arch']} for {was} pixels; leave the flag out")
        if arch in resnet.ARCHS and found.family == "resnet":  # tell what the one that was asked for lacks
            shape["arch"], backbone = arch, make_network(found, shape | {"arch": arch}, where)
        refuse_tensors(where, shape["arch"], backbone, weights)
    if arch not in (None, shape["arch"]):
        fail(f"--arch {arch}: {path} holds arch {shape['arch']}; leave the flag out")
    if width is not None and round(64 * width) != round(64 * shape["width"]):  # the same number of channels
        fail(f"--width {width}: {path} holds width {shape['width']:g}; leave the flag out")

    own, name = "arch" in found.meta, found.name
    size = 32 if shape.get("small") else shape.get("image_size", 224)
    kind = "" if shape["width"] == 1 else f", width {shape['width']:g}"
    if found.family == "vit":
        patch, size = shape["patch_size"], image_size or size
        if size % patch:
            fail(f"--image-size {size}: {path} has patches of {patch} pixels, choose a multiple")
        backbone = make_network(found, shape | {"image_size": size}, where)
        weights = resize_positions(weights, backbone)
        usual = vit.ARCHS[shape["arch"]][1]
        kind += f", {shape['depth']} blocks instead of {usual}" if shape["depth"] != usual else ""
        kind += f", patches of {patch}, {shape['heads']} heads"
        told = "heads" in found.meta or shape["relative"] != "none"
        kind += "" if told else " (assumed from layout and dimension: the tensors do not show it)"
        name = layouts.FIXED.get(shape["positions"], name) if name == "unknown" else name
    elif found.family in MAKERS:
        size = image_size or found.meta.get("image_size", size)
        backbone = make_network(found, shape | {"image_size": size}, where)  # its size decides which windows shift
        kind += f", patches of {shape['patch_size']}" if "patch_size" in shape else ""
        if found.family == "swin":
            kind += f", windows of {'/'.join(map(str, shape['window']))}, {'/'.join(map(str, shape['depths']))} blocks"
    if shape.get("small"):
        padded = ", padded by 2" if found.layout.padding == 2 else ""
        kind += ", 3x3 stem" + ("" if own else f" without max-pooling{padded} (assumed: the tensors do not show it)")
    if shape.get("filtered") and not own:
        kind += ", of edges (Sobel: conv1 has 2 channels; --channels 2 if the images have two)"
    _, matched, needed = compare_tensors(backbone, weights)
    counters = {k: torch.tensor(0) for k in backbone.state_dict() if k.endswith("num_batches_tracked")}
    if found.family != "library":
        backbone.to_empty(device="cpu")
    backbone.load_state_dict(counters | weights)
    usual = default_statistics(shape["channels"])
    told = {k: v for k, v in found.meta.items() if k not in ("mean", "std") or len(v) == usual["channels"]}
    meta = {"method": name, "arch": shape["arch"], "width": shape["width"], "image_size": size} | usual
    meta |= getattr(backbone, "config", {}) | told | per_channel(dict(given), meta["channels"])
    meta |= {"image_size": image_size} if image_size else {}
    method = meta["method"] if meta["method"] != "unknown" else f"unknown method (names of {found.naming.name})"
    print0(f"pretrained  {path}: {method}, {meta['arch']}{kind}, tensors matched {matched}/{needed}")
    if not {"mean", "std"} <= {*told, *given}:
        which = "ImageNet's mean and standard deviation" if meta["channels"] == 3 else "mean 0.5 and deviation 0.25"
        print0(f"normalised  with {which}: the file does not say (--mean, --std)")
    return backbone, meta
