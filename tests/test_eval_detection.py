"""Detection: sets in both layouts, average precision, losses and parts of the network, and the script as it is run."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import eval_detection as det
from common import boxes
from common.boxes import Objects, open_boxes, prepare
from common.crop import fitted
from common.resnet import resnet
from tests.helpers import SMALL, different, launch, main, photo, records, refused, rows, state, write_voc

TINY = "--pretrained random --arch resnet18 --width 0.125 --image-size 224 --steps 3 --batch-size 4 --sizes 48 64"
TINY += " --test-size 48 --anchors 4 8 12 16 32 --proposals 200 --rois 64 --warmup 1 --precise-bn 1 --workers 2"
TINY += " --log-every 1 --seed 3"


# ---------------------------------------------------------------------------------------------- VOC: reading, AP
def test_boxes_of_voc_are_counted_from_zero_and_both_years_are_trained_on(tmp_path):
    truth = write_voc(tmp_path / "VOC2007", numbers=(6, 4))
    train, test = open_boxes(tmp_path)
    assert train.classes == ["cat", "dog", "emu"] and (len(train), len(test)) == (6, 4) and not train.has_masks
    assert train.path(0).endswith("JPEGImages/tr005.jpg") and truth["trainval"]["tr005"] == [-1, 0, -1]
    assert train.objects[0].boxes.tolist() == [[5, 1, 48.5, 40]] and train.objects[0].difficult.all()
    write_voc(tmp_path / "VOC2012", numbers=(3, 1))
    train, test = open_boxes(tmp_path)
    assert (len(train), len(test)) == (9, 4) and "VOC2012" in train.path(8) and train[8][0].shape == (3, 40, 56)


def test_broken_sets_of_voc_get_one_line(tmp_path, capsys):
    write_voc(tmp_path, numbers=(3, 2))
    path = tmp_path / "Annotations/te001.xml"
    text = path.read_text()
    for new, expected in (
        (text.replace("<name>emu<", "<name>cow<"), "te001.xml: class 'cow'"),
        (text.replace("<xmax>48.5<", "<xmax>0<"), "te001.xml: bndbox 2 2 0 40 has no area"),
        (text.replace("bndbox", "polygon"), "te001.xml: an object 'emu' without bndbox"),
    ):
        path.write_text(new)
        assert expected in refused(capsys, open_boxes, tmp_path)
    (tmp_path / "ImageSets").rename(tmp_path / "Lists")
    assert "neither annotations/ (COCO) nor ImageSets/Main" in refused(capsys, open_boxes, tmp_path)


def slow_ap(found, truth, label, share):
    """The evaluation of VOC2007 as its text says, box by box; boxes in whole pixels from 1."""
    objects = [[(*b, d) for b, n, d in zip(t.boxes, t.labels, t.difficult, strict=True) if n == label] for t in truth]
    claims = [(round(s, 3), i, b) for i, f in enumerate(found)
              for b, n, s in zip(f["boxes"], f["labels"], f["scores"], strict=True) if n == label]  # fmt: skip
    claims.sort(key=lambda claim: -claim[0])
    seen, right, wrong, curve = set(), 0, 0, []
    for _, i, (x, t, r, b) in claims:
        best, at = -1.0, None
        for k, (gl, gt, gr, gb, _) in enumerate(objects[i]):
            w, h = min(r, gr) - max(x, gl), min(b, gb) - max(t, gt)  # from 0 the last pixel is r - 1: no + 1
            inter = max(w, 0) * max(h, 0)
            union = (r - x) * (b - t) + (gr - gl) * (gb - gt) - inter
            if inter / union > best:
                best, at = inter / union, k
        if best > share and objects[i][at][4]:
            continue
        if best > share and (i, at) not in seen:
            seen.add((i, at))
            right += 1
        else:
            wrong += 1
        curve.append((right / sum(not o[4] for each in objects for o in each), right / (right + wrong)))
    return sum(max((p for r, p in curve if r >= t), default=0) for t in np.arange(0, 1.1, 0.1)) / 11


def test_eleven_point_precision_of_voc():
    """Whole boxes against a loop: ties, duplicates, difficult objects, images without any; all ten overlaps."""
    generator, found, truth = np.random.default_rng(0), [], []
    for i in range(12):
        n = i % 4
        corner, size = generator.integers(0, 30, (n, 2)), generator.integers(5, 20, (n, 2))
        own = np.concatenate([corner, corner + size], 1).astype(float)
        truth.append(Objects(own, generator.integers(1, 3, n), generator.random(n) < 0.3))
        guess = np.concatenate([own, own, own[:1] + 9]) + generator.integers(-2, 3, (2 * n + min(n, 1), 4))
        labels = np.concatenate([truth[i].labels, truth[i].labels, [1] * min(n, 1)]).astype(int)
        scores = generator.integers(1, 6, len(guess)) / 5
        found.append({"boxes": guess.tolist(), "labels": labels.tolist(), "scores": scores.tolist()})
    scores = det.voc_scores(found, truth, ["a", "b", "never there"])
    table = {p: np.mean([slow_ap(found, truth, c, p / 100) for c in (1, 2)]) * 100 for p in det.OVERLAPS}
    expected = {"AP": np.mean([*table.values()]), "AP50": table[50], "AP75": table[75]}
    assert 10 < expected["AP"] < expected["AP50"] < 95
    assert {k: scores[k] for k in expected} == pytest.approx(expected, abs=1e-3)
    assert scores["AP50_of"].keys() == {"a", "b"}


def test_average_precision_by_hand(capsys):
    """Overlaps of one half do not count; the difficult object is neither; the second hit of an object is wrong."""
    assert det.overlaps(np.array([[1, 1, 10, 5]]), np.array([[1, 1, 10, 10], [11, 1, 20, 5]])).tolist() == [[0.5, 0]]
    truth = [Objects(np.array([[0, 0, 10, 10], [20, 0, 30, 10.0]]), np.array([1, 1]), np.array([False, True]))]

    def ap50(*claims):
        found = {"boxes": [b for b, _ in claims], "labels": [1] * len(claims), "scores": [s for _, s in claims]}
        return det.voc_scores([found], truth, ["a"])["AP50"]

    hit, half, hard = [0, 0, 10, 10], [0, 0, 10, 5], [20, 0, 30, 10]
    assert (ap50((hit, 0.5)), ap50((half, 0.5)), ap50(), ap50((hard, 0.9), (hit, 0.5))) == (100, 0, 0, 100)
    assert ap50((hit, 0.9), (hit, 0.8)) == 100 and ap50((half, 0.9), (hit, 0.5)) == 50
    assert ap50((half, 0.50012), (hit, 0.5004)) == 50 and ap50((hit, 0.5004), (half, 0.50012)) == 100  # a tie
    assert det.eleven_points(np.array([1, 0, 1]), np.array([0, 1, 0]), 4) == pytest.approx((3 + 3 * 2 / 3) / 11)
    easy = [truth[0]._replace(difficult=np.array([True, True]))]
    assert "nothing to find" in refused(capsys, det.voc_scores, [{"boxes": [], "labels": [], "scores": []}], easy, "a")


# ------------------------------------------------------------------------------------------------- COCO's layout
def write_coco(root, number=4):
    """Images of 40 x 56 with a light polygon and a dark square of runs, one crowd, one empty image. Returns root."""
    mask = pytest.importorskip("pycocotools.mask")
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        content = {"images": [], "annotations": [], "categories": [{"id": 90, "name": "b"}, {"id": 7, "name": "a"}]}
        for i in range(number):
            picture, name, shift = Image.fromarray(photo(40, 56, i)), f"{i:012}.jpg", 3 * i
            content["images"].append({"id": 1000 - 10 * i, "file_name": name, "height": 40, "width": 56})
            polygon, square = [2 + shift, 4, 22 + shift, 4, 22 + shift, 20, 2 + shift, 20], np.zeros((40, 56), np.uint8)
            square[22:38, 30:50] = 1
            ImageDraw.Draw(picture).polygon(polygon, fill="white")
            runs = mask.encode(np.asfortranarray(square))
            runs = runs | {"counts": runs["counts"].decode()}
            parts = [(7, [2 + shift, 4, 20, 16], [polygon], 0), (90, [30, 22, 20, 16], runs, 0)]
            parts += [(7, [0, 0, 56, 3], {"size": [40, 56], "counts": [0, 3, 2237]}, 1)] if i == 0 else []
            for category, box, shape, crowd in parts if i < number - 1 else ():
                item = {"id": len(content["annotations"]) + 5, "image_id": 1000 - 10 * i, "category_id": category}
                item |= {"bbox": box, "segmentation": shape, "iscrowd": crowd, "area": box[2] * box[3]}
                content["annotations"].append(item)
            picture.save(root / split / name)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def test_objects_of_coco_and_a_perfect_answer(tmp_path):
    """Ids with gaps, in no order; crowds are left to the evaluation; the truth itself scores 100."""
    train, test = open_boxes(write_coco(tmp_path))
    assert (train.classes, train.categories, train.ids) == (["a", "b"], [7, 90], [970, 980, 990, 1000])
    assert [len(item.labels) for item in train.objects] == [0, 2, 2, 2] and len(train.not_empty()) == 3
    assert train.objects[3].boxes.tolist() == [[2, 4, 22, 20], [30, 22, 50, 38]]
    found = []
    for i in range(len(test)):
        _, _, target = prepare(test, i, 40, 99, masks=True)
        masks = [boxes.encode_mask(mask) for mask in target["masks"].bool()]
        found.append({"boxes": target["boxes"].tolist(), "labels": target["labels"].tolist(), "masks": masks})
        found[-1]["scores"] = [0.9] * len(masks)
    found[3] = {k: [*v, *v[:1]] for k, v in found[3].items()}
    found[3]["boxes"][2], found[3]["scores"][2] = [10.0, 0.0, 40.0, 3.0], 0.95  # in the crowd: not wrong
    scores = det.coco_scores(found, test, False)
    assert (scores["box_AP"], scores["box_AP75"]) == (100, 100)
    scores = det.coco_scores([*found[:3], {k: v[:2] for k, v in found[3].items()}], test, True)
    assert (scores["box_AP"], scores["mask_AP"]) == (100, 100)
    found[2] = {k: [] for k in found[2]}
    assert 50 < det.coco_scores(found, test, False)["box_AP"] < 80  # a third is missing
    assert det.coco_scores([{k: [] for k in f} for f in found], test, True)["mask_AP50"] == 0


def test_broken_sets_of_coco_get_one_line(tmp_path, capsys, monkeypatch):
    path = write_coco(tmp_path) / "annotations/instances_val2017.json"
    good = path.read_text()

    def error(change):
        content = json.loads(good)
        change(content)
        path.write_text(json.dumps(content))
        return refused(capsys, open_boxes, tmp_path)

    assert "annotation 5: image_id 3 is not" in error(lambda c: c["annotations"][0].update(image_id=3))
    assert "annotation 6: category_id 8 is not" in error(lambda c: c["annotations"][1].update(category_id=8))
    assert "annotation 5: bbox [0, 0, -1, 2]" in error(lambda c: c["annotations"][0].update(bbox=[0, 0, -1, 2]))
    assert "annotation 5 lacks" in error(lambda c: c["annotations"][0].pop("bbox"))
    assert "a mask of size [40, 55]" in error(lambda c: c["annotations"][1]["segmentation"].update(size=[40, 55]))
    assert "odd number" in error(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]))
    assert "first is x.jpg" in error(lambda c: c["images"][1].update(file_name="x.jpg"))
    assert "other categories" in error(lambda c: c["categories"][0].update(name="c"))
    assert "KeyError 'images'" in error(lambda c: c.pop("images"))
    path.write_text("{")
    assert "instances_val2017.json cannot be read" in refused(capsys, open_boxes, tmp_path)
    path.unlink()
    assert "no instances_val*.json" in refused(capsys, open_boxes, tmp_path)
    path.write_text(good)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert "pip install pycocotools" in refused(capsys, main, "eval_detection", *TINY.split(), "--data", tmp_path)


def test_sizes_boxes_and_masks_go_together(tmp_path):
    assert [fitted(480, 640, 800, 1333), fitted(300, 900, 800, 1333), fitted(5, 900, 100, 90)] == [
        (800, 1067),
        (444, 1333),
        (1, 90),
    ]
    train, _ = open_boxes(write_coco(tmp_path))
    train.objects[2].boxes[0] += (0, -50, 0, -50)  # outside the image: left out, like its mask
    for i, count in ((2, 1), (3, 2)):
        for flip in (False, True):
            image, old, target = prepare(train, i, 80, 999, flip, True)
            assert image.shape == (3, 80, 112) and old == (40, 56) and target["masks"].shape == (count, 80, 112)
            for (left, top, right, bottom), mask in zip(target["boxes"].long(), target["masks"], strict=True):
                assert mask[top:bottom, left:right].float().mean() > 0.9 and mask.sum() < 1.1 * 40 * 32
    assert image[:, target["masks"][0] > 0].float().mean() > 230  # where the mirrored polygon is


# ----------------------------------------------------------------------------------------------- losses and parts
def test_draws_are_functions_of_the_seed():
    labels = torch.tensor([1, 0, -1, 2, 0, 0, 3, -1, 0, 0])
    positive, negative = det.draw(labels, 5, 8, 0.25)
    again = det.draw(labels, 5, 8, 0.25)
    assert torch.equal(positive, again[0]) and torch.equal(negative, again[1])
    assert len(positive) == 2 and set(positive.tolist()) < {0, 3, 6}
    assert sorted(negative.tolist()) == [1, 4, 5, 8, 9]  # all there are, fewer than 6
    assert len({tuple(det.draw(labels, s, 3, 1)[0].tolist()) for s in range(20)}) > 3


def test_losses_are_detectron2s():
    """L1, not smooth; proposals divided by 256 per image, whatever was drawn; RoIs by their number."""
    model = det.Detector(resnet(*SMALL), 2, False, False, [8] * 5, 16)
    objectness, deltas, wanted = rows(2 * 300), rows(2 * 300, 4), rows(2, 300, 4, seed=1)
    labels = torch.zeros(2, 300, dtype=torch.float64)
    labels[0, :200], labels[1, 5], labels[1, 10:100] = 1, 1, -1
    model.rpn.seeds = [1, 2]
    drawn = [det.draw(own, seed, 256, 0.5) for own, seed in zip(labels, (1, 2), strict=True)]
    found = model.rpn.compute_loss(objectness[:, None], deltas, [*labels], [*wanted])
    x, d, w = objectness.view(2, 300).numpy(), deltas.view(2, 300, 4).numpy(), wanted.numpy()
    entropy = distance = 0.0
    for i, (positive, negative) in enumerate(drawn):
        assert (len(positive), len(negative)) == ((128, 100), (1, 209))[i]
        entropy += np.log1p(np.exp(-x[i, positive])).sum() + np.log1p(np.exp(x[i, negative])).sum()
        distance += np.abs(d[i, positive] - w[i, positive]).sum()
    assert [v.item() for v in found] == pytest.approx([entropy / 512, distance / 512])

    logits, deltas, wanted, labels = rows(5, 3), rows(5, 12), rows(5, 4, seed=1), torch.tensor([0, 2, 1, 0, 2])
    found = det.box_losses(logits, deltas, labels, wanted)
    x, d = logits.numpy(), deltas.view(5, 3, 4).numpy()
    entropy = np.mean([np.log(np.exp(row).sum()) - row[c] for row, c in zip(x, labels, strict=True)])
    distance = sum(np.abs(d[i, labels[i]] - wanted[i].numpy()).sum() for i in (1, 2, 4)) / 5
    assert [v.item() for v in found] == pytest.approx([entropy, distance])


def test_rois_are_pooled_where_they_are():
    """On maps that hold their own coordinates; sides of 224 px from stride 16 and finer strides of a small stem."""

    def maps(strides, side):
        line = [(torch.arange(side // s, dtype=torch.float64) + 0.5) * s for s in strides]
        return {str(i): torch.stack([x.expand(len(x), -1), torch.full((len(x),) * 2, float(s))])[None]
                for i, (x, s) in enumerate(zip(line, strides, strict=True))}  # fmt: skip

    rois = torch.tensor([[30, 40, 30.0 + side, 40.0 + side] for side in (100, 113, 223, 225, 449)]).double()
    out = det.RoIPool(7, (4, 8, 16, 32))(maps((4, 8, 16, 32), 640), [rois])
    assert out[:, 1, 3, 3].tolist() == [4, 8, 8, 16, 32]
    for roi, cells in zip(rois.tolist(), out[:, 0, 3], strict=True):
        centres = roi[0] + (np.arange(7) + 0.5) * (roi[2] - roi[0]) / 7
        np.testing.assert_allclose(cells.numpy(), centres, atol=1e-9)
    out = det.RoIPool(7, (1, 2, 4, 8))(maps((1, 2, 4, 8), 96), [torch.tensor([[3, 3, 60, 60.0]]).double()])
    assert out.shape == (1, 2, 7, 7) and out[0, 1, 3, 3] == 4


def test_boxes_stay_in_single_precision_under_autocast(monkeypatch):
    """bfloat16 has steps of 4 px from 512 px on: proposals, and the objects they are compared with, would move."""
    model = det.Detector(resnet("resnet18", 0.125, 224), 3, False, False, [32, 64], 16, 0.125, 100).train()
    select, seen = det.Heads.select_training_samples, []

    def watch(self, proposals, targets):
        seen.append((proposals, select(self, proposals, targets)))
        return seen[0][1]

    monkeypatch.setattr(det.Heads, "select_training_samples", watch)
    objects = torch.tensor([[701.0, 3, 907, 61], [513, 20, 611, 57]])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(
            torch.randn(1, 3, 64, 1024), [(64, 1024)], [{"boxes": objects, "labels": torch.tensor([1, 2])}], [1]
        )
    proposals, (chosen, _, labels, regression) = seen[0]
    assert {x.dtype for x in (losses, *proposals, *chosen, *regression)} == {torch.float32}
    assert (proposals[0] % 1 > 0).any() and (labels[0] == 1).any()
    box, target = chosen[0][labels[0] == 1], regression[0][labels[0] == 1]  # offsets of centres in widths, times 10
    centres = box[:, 0] + (box[:, 2] - box[:, 0]) * (0.5 + target[:, 0] / 10)
    torch.testing.assert_close(centres, torch.full_like(centres, (701 + 907) / 2), atol=1e-2, rtol=0)


def test_masks_are_cut_out_and_pasted():
    mask = torch.zeros(1, 40, 60, dtype=torch.uint8)
    mask[0, 10:20, 20:50] = 1
    box = torch.tensor([[20.0, 0, 50, 20]])
    wanted = det.mask_targets(mask, box, torch.tensor([0]), 14)
    assert not wanted[0, :7].any() and wanted[0, 7:].all()
    back = det.paste(wanted.double(), box.double(), (40, 60))
    assert back.shape == (1, 40, 60) and (back[0] == mask[0].bool()).float().mean() > 0.98
    assert det.paste(wanted[:0].double(), box[:0].double(), (40, 60)).shape == (0, 40, 60)


@pytest.mark.parametrize("fpn, masks", [(False, False), (False, True), (True, True)])
def test_everything_is_trained_and_layer4_is_that_of_the_file(fpn, masks):
    torch.manual_seed(0)
    backbone = resnet("resnet18", 0.125, 64)
    kept = {k: v.clone() for k, v in backbone.state_dict().items()}
    model = det.Detector(backbone, 3, fpn, masks, [4, 8, 16, 32, 64], 16, 0.125, 200).double().train()
    for i in (1, 2, 3) if not fpn else (1, 2, 3, 4):
        assert torch.equal(
            getattr(model.backbone, f"layer{i}")[0].conv1.weight.float(), kept[f"layer{i}.0.conv1.weight"]
        )
    if not fpn:
        for name, value in model.heads.shared[0].state_dict().items():
            assert torch.equal(value.to(kept[f"layer4.{name}"].dtype), kept[f"layer4.{name}"])
        assert isinstance(model.heads.shared[1], torch.nn.BatchNorm2d)
        assert (model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n)[1] == {"training": 2000, "testing": 1000}
    predictor = model.heads.box_predictor
    assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.3)
    target = {"boxes": torch.tensor([[4.0, 4, 30, 28]]).double(), "labels": torch.tensor([2])}
    targets = [target | {"masks": torch.ones(1, 64, 64, dtype=torch.uint8)}]
    targets += [{k: v[:0] for k, v in targets[0].items()}]  # an image without objects
    losses = model(rows(2, 3, 64, 64), [(64, 64), (60, 50)], targets, [1, 2])
    assert len(losses) == 4 + masks and losses.isfinite().all()
    losses.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.requires_grad for p in model.parameters())
    still = [n for n, p in model.named_parameters() if not p.grad.any()]
    assert not still, still
    found = model.eval()(rows(1, 3, 64, 64), [(64, 64)])
    assert found[0].keys() >= {"boxes", "labels", "scores"}


def test_rates():
    """24,000 steps of MoCo's table: from a thousandth over 100 steps, a tenth after 18,000 and 22,000."""
    steps, falls = (0, 50, 100, 17_999, 18_000, 21_999, 22_000), det.RECIPES["voc-c4"]["falls"]
    expected = [0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01]
    assert [det.rate(step, 24_000, 100, falls) for step in steps] == pytest.approx(expected)
    model = det.Detector(resnet(*SMALL), 2, False, False, [8] * 5, 16)
    decayed, plain = det.parameter_groups(model, 1e-4)
    assert all(p.ndim == 1 for p in plain["params"]) and plain["weight_decay"] == 0
    assert sum(len(g["params"]) for g in (decayed, plain)) == len([*model.parameters()])


# --------------------------------------------------------------------------------------------------------- script
def test_two_processes_and_an_interruption_change_nothing(tmp_path, capsys):
    """In double precision: the losses of one process; then the same detections, each image once."""
    write_voc(tmp_path / "VOC2007", numbers=(9, 5))
    words = [*TINY.split(), "--data", tmp_path, "--precision", "fp64"]
    one = main("eval_detection", *words, "--out", tmp_path / "one")
    assert "0.02 x 4/16 = 0.005" in capsys.readouterr().out and one["step"] == 3
    assert (tmp_path / "one/detection.png").exists() and (tmp_path / "one/detection_views.png").exists()
    main("eval_detection", *words, "--out", tmp_path / "part", "--max-steps", 1)
    again = main("eval_detection", *words, "--out", tmp_path / "part")
    assert not different(*(state(tmp_path / name, "detection_last.pt")["model"] for name in ("one", "part")))
    assert again == one
    launch(["eval_detection", [*words, "--out", tmp_path / "two"]])
    losses = [records(tmp_path / name, "detection.jsonl") for name in ("one", "two")]
    for step in (1, 2, 3):
        assert losses[1][step]["loss"] == pytest.approx(losses[0][step]["loss"], rel=1e-9)
    two = json.loads((tmp_path / "two/eval_detection.json").read_text())
    assert two == one and one["detections"] > 5


def test_masks_as_a_user_runs_it(tmp_path, capsys):
    write_coco(tmp_path)
    words = [*TINY.split(), "--data", tmp_path, "--batch-size", 2, "--rois", 16, "--steps", 1, "--out", tmp_path / "a"]
    result = main("eval_detection", *words)
    assert result["recipe"] == "coco-fpn" and {"box_AP", "mask_AP50"} <= result.keys() and result["train"] == 3
    assert "1 training images without objects are left out" in capsys.readouterr().out
    (tmp_path / "train2017/000000000001.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main("eval_detection", *words, "--no-resume")
    error = capsys.readouterr().err
    assert "error: cannot decode" in error and "000000000001.jpg" in error
    assert "is larger than the data set (3 images)" in refused(
        capsys, main, "eval_detection", *words, "--batch-size", 4
    )
