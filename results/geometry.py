"""What relative_loc.py and densecl.py have learned of the geometry of images that they were not trained on.

    python results/geometry.py runs/relative_loc --data photographs --val-list heldout.txt --draws 20
    python results/geometry.py runs/densecl --data data/cifar10 --val-list runs/results/test.txt

Of a run of relative_loc.py: how many positions are told right. Of a run of densecl.py: how many cells of a view are
matched with the cell of the other view that shows the same place ("agree" in its log), how many with the matches of
another image ("chance"), and both by the same network before the first step. Views are random ones of the run's recipe,
--draws of them per image; +- is the standard error over images. The last line is JSON, also written to --out.
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import densecl
import relative_loc
from common.datasets import open_dataset
from common.loader import Loader
from common.networks import network
from common.resnet import resnet


def views(args, recipe, augmentation):
    """Batches of all images, --draws times."""
    data = open_dataset(args.data, "val", args.val_list)
    size = next((n for n in range(100, 4, -1) if len(data) % n == 0), 0)
    if not size:
        sys.exit(f"error: {len(data)} images do not form equal batches of 5 to 100: leave some out of --val-list")
    loader = Loader(data, augmentation, size, seed=recipe["seed"] + 1, workers=args.workers)
    return len(data), (batch for draw in range(args.draws) for batch in loader.epoch(draw))


def summary(values):
    """Mean and standard error of one value per image."""
    return {"mean": round(values.mean().item(), 4), "error": round((values.std() / len(values) ** 0.5).item(), 4)}


@torch.no_grad()
def positions(args, recipe, weights):
    backbone = network(recipe["arch"], recipe["width"], recipe["image_size"])
    model = relative_loc.RelativeLoc(backbone, recipe["hidden_dim"])
    model.load_state_dict(weights)
    model.eval()
    grid = [recipe[k] for k in ("image_size", "patch_size", "gap")]
    n, batches = views(args, recipe, relative_loc.augmentation(*(recipe[k] for k in ("image_size", "resize", "gray"))))
    right = torch.zeros(n)
    for batch in batches:
        (x,) = batch.views()
        _, logits = model(
            relative_loc.cut(x, *relative_loc.places(batch.uniforms(18), *grid), grid[1]),
            torch.ones(len(x), 8 * recipe["hidden_dim"]),
        )
        right[batch.indices] += (logits.argmax(1).view(-1, 8) == torch.arange(8)).float().mean(1) / args.draws
    return {"images": n, "positions": summary(right), "chance": 0.125}


@torch.no_grad()
def agreement(args, recipe, weights):
    """Batch norm takes statistics of batches of 100, as in training, so that untrained networks can be compared."""
    torch.manual_seed(recipe["seed"])
    untrained = resnet(recipe["arch"], recipe["width"], recipe["image_size"])  # the run's own start
    networks = {"trained": copy.deepcopy(untrained), "untrained": untrained}
    networks["trained"].load_state_dict(
        {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    )
    n, batches = views(args, recipe, densecl.augmentation(*(recipe[k] for k in ("image_size", "crop_min", "flip"))))
    counts = {(name, kind): torch.zeros(n) for name in networks for kind in ("agree", "chance")}
    shown = torch.zeros(n)
    for batch in batches:
        x, rows = batch.views(), batch.indices
        for name, net in networks.items():
            maps = [net.train().stages(v)[-1] for v in x]
            true = densecl.true_matches(batch.boxes(0), batch.boxes(1), math.isqrt(maps[0][0, 0].numel()))
            match = densecl.matches(*(m.flatten(2) for m in maps))
            for kind, found in (("agree", match), ("chance", match.roll(1, 0))):
                counts[name, kind][rows] += (found == true).sum(1)
        shown[rows] += (true >= 0).sum(1)
    seen = shown > 0
    shares = {key: (count / shown)[seen] for key, count in counts.items()}
    result = {"images": int(seen.sum())}
    for name in networks:
        agree, chance = shares[name, "agree"], shares[name, "chance"]
        result[name] = {"agree": summary(agree), "chance": summary(chance), "difference": summary(agree - chance)}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of relative_loc.py or densecl.py")
    parser.add_argument("--data", required=True)
    parser.add_argument("--val-list")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file for the result")
    args = parser.parse_args()
    start = json.loads((args.run / "log.jsonl").read_text().splitlines()[0])
    state = torch.load(args.run / "last.pt", map_location="cpu", weights_only=True)
    measure = positions if "patch_size" in start["args"] else agreement  # of relative_loc.py
    torch.manual_seed(0)
    result = {"command": f"results/geometry.py {' '.join(sys.argv[1:])}", "run": start["command"]}
    result |= {"commit": start["commit"], "steps": state["step"]} | measure(args, start["args"], state["model"])
    line = json.dumps(result)
    print(line)
    if args.out:
        args.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
