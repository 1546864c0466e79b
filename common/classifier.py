"""A network with its classifier in one file: what eval_linear.py, eval_finetune.py, eval_semi.py and pages that find
clusters leave, and predict.py, eval_cluster.py and eval_semi.py take."""

import torch
import torch.nn.functional as F
from torch import nn

from common.args import fail
from common.augment import EvalView
from common.checkpoint import load_file, load_pretrained, save_file
from common.distributed import gather_uneven, print0
from common.features import features
from common.loader import agree_on_undecodable, eval_batches


class Classifier(nn.Module):
    """Images (B, C, S, S) -> logits (B, classes) of at least single precision.

    kind: of the features, as `features` names them; stage: which of several. hidden: layers between features and
    classifier, (outputs, inputs + 1) each, weights and in the last column biases, each with a ReLU. mean, std: of what
    they give (D,), which is brought to 0 and 1 before the linear layer of weight (classes, D) and bias (classes,).
    """

    def __init__(self, backbone, weight, bias, kind="pool", stage=0, mean=None, std=None, hidden=()):
        super().__init__()
        self.backbone, self.kind, self.stage = backbone, kind, stage
        self.hidden = nn.ParameterList(nn.Parameter(layer.detach(), requires_grad=False) for layer in hidden)
        mean, std = (torch.full(weight.shape[1:], v) if x is None else x for v, x in ((0.0, mean), (1.0, std)))
        for name, value in (("weight", weight), ("bias", bias), ("mean", mean), ("std", std)):
            self.register_buffer(name, value.detach())

    def forward(self, x, amp):
        found = features(self.backbone, x, {self.kind}, amp)[self.kind][self.stage].flatten(1)
        for layer in self.hidden:
            found = F.relu(F.linear(found, layer[:, :-1], layer[:, -1]))
        return F.linear((found - self.mean) / self.std, self.weight, self.bias)


def save_classifier(path, model, meta, view, classes, what):
    """Writes a Classifier. meta: of the backbone, as `load_pretrained` gives it. view: EvalView in which it was judged.
    classes: their names. what: in words, for the line that is printed."""
    layer = {name: getattr(model, name) for name in ("weight", "bias", "kind", "stage", "mean", "std")}
    layer |= {"hidden": [part.data for part in model.hidden]} if model.hidden else {}
    layer |= {"interpolation": view.interpolation, "resize": view.resize, "classes": [*classes], "what": what}
    save_file(path, {"backbone": model.backbone.state_dict(), "meta": meta, "classifier": layer})
    print0(f"classifier  {what}: {path} is what predict.py and eval_cluster.py take")


def load_classifier(args, flag="--pretrained"):
    """(Classifier, EvalView, names of the classes, meta) of the file that --pretrained names (`Parser.add_pretrained`),
    or the end of the program with the command that makes one. flag: which has named it."""
    remedy = "eval_linear.py writes a linear.pt that has one, eval_finetune.py a finetune.pt, eval_semi.py a semi.pt"
    remedy += ", clustering a clusters.pt"
    if str(args.pretrained) == "random":
        fail(f"{flag} random has no classifier: {remedy}")
    state = load_file(args.pretrained, flag, args.trust_pickle)
    if not isinstance(layer := state.get("classifier"), dict) or "classes" not in layer:
        fail(f"{flag} {args.pretrained} has no classifier: {remedy}")
    backbone, meta = load_pretrained(args)
    layer, size = dict(layer), meta["image_size"]
    how = {"interpolation": layer.pop("interpolation"), "mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    resize, classes, what = layer.pop("resize") and size, layer.pop("classes"), layer.pop("what")
    print0(f"classifier  {what}; {len(classes)} classes, {size} px")
    return Classifier(backbone, **layer), EvalView(size, resize=resize, **how), classes, meta


def projector_layers(path, count, trust_pickle=False):
    """The first layers of the projector in a last.pt, three modules each: dense, batch norm and ReLU. The last layer of
    a projector, which has no ReLU, is none of them."""
    state = load_file(path, "--pretrained", trust_pickle) if count and str(path) != "random" else {}
    held, layers = state.get("model") if "backbone_prefix" in state else {}, []
    for i in range(0, 3 * count, 3):
        weight = held.get(f"projector.{i}.weight", torch.empty(0))
        if weight.ndim == 2 and f"projector.{i + 3}.weight" in held:
            dense = nn.Linear(*weight.shape[::-1], bias=f"projector.{i}.bias" in held)
            layers += [dense, nn.BatchNorm1d(len(weight)), nn.ReLU(inplace=True)]
    layers = nn.Sequential(*layers)
    weights = {name: held.get(f"projector.{name}") for name in layers.state_dict()}
    if len(layers) < 3 * count or any(value is None for value in weights.values()):
        known = "the last.pt of a run whose projector has dense layers with batch norm and ReLU"
        fail(f"--head-layer {count}: --pretrained {path} has no such layer below the last of a projector; give {known}")
    layers.load_state_dict(weights)
    return layers


def folded(layers):
    """What `Classifier` takes as hidden: the same layers with the running statistics of their batch norms."""
    result = []
    for dense, norm in zip(layers[::3], layers[1::3], strict=True):
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = norm.bias + factor * ((0 if dense.bias is None else dense.bias) - norm.running_mean)
        result.append(torch.cat([dense.weight * factor[:, None], bias[:, None]], 1))
    return result


@torch.no_grad()
def predict(model, dataset, view, batch_size, device, workers, amp):
    """Probabilities (N, classes) of all images as an array, on every process; rows of zeros for those that cannot be
    decoded, which are in the set `dataset.undecodable`."""
    model.eval()
    found, rows = [model.bias.new_zeros(0, len(model.bias))], [torch.zeros(0, dtype=torch.int64, device=device)]
    for x, _, indices in eval_batches(dataset, view, batch_size, device, workers, model.bias.dtype):
        found.append(model(x, amp).softmax(1))
        rows.append(indices.to(device))
    agree_on_undecodable(dataset, device)
    found, rows = (gather_uneven(torch.cat(parts)) for parts in (found, rows))
    return found.new_zeros(len(dataset), found.shape[1]).index_copy(0, rows, found).cpu().numpy()
