"""The protocol for small sets of eval_linear.py, on raw pixels: what a representation has to beat.

    python results/pixels.py --data data/cifar10 --train-list train.txt --val-list test.txt --image-size 32 --out FOLDER

Flags are those of eval_linear.py; pixels are seen as in eval_knn.py. Writes linear_pixels.json.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from contextlib import nullcontext

from common.checkpoint import default_statistics
from common.datasets import open_labelled
from common.files import make_folder
from eval_knn import Pixels
from eval_linear import evaluate_small, parse_args

if __name__ == "__main__":
    args = parse_args(["--pretrained", "raw pixels", *sys.argv[1:]])
    train, test = open_labelled(args.data, args.train_list, args.val_list, 3)
    meta = {"image_size": args.image_size} | default_statistics(3)
    classes = int(max(train.labels)) + 1
    found = evaluate_small(args, Pixels(args.image_size), meta, train, test, classes, "cpu", nullcontext())[0]
    text = json.dumps({"command": " ".join(["results/pixels.py", *sys.argv[1:]]), **found}, indent=1)
    (make_folder(args.out) / "linear_pixels.json").write_text(text + "\n")
    print(text)
