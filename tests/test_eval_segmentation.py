"""Segmentation: dilation, crops, colours, loss and IoU beside slow references; data, mistakes, processes, resuming."""

import colorsys
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import eval_segmentation as seg
from common import rng
from common.checkpoint import load_backbone
from common.resnet import Pool, resnet
from common.segmentation import open_pairs
from tests import helpers
from tests.helpers import EXACT, SMALL, assert_close, different, launch, main, photo, refused, write_vit

NAMES = ("sky", "road", "tree")
BASE = "--crop 32 --scale 60 45 --batch-size 4 --steps 6 --workers 1 --log-every 1 --seed 3"
SMALLEST = "--pretrained random --arch resnet18 --width 0.125 --image-size 16"


def write_set(root, train=9, test=5, **lists):
    """A set in VOC's layout: photographs of two sizes whose classes are three bands; some pixels do not count."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    ids = {"train": [f"t{i}" for i in range(train)], "val": [f"v{i}" for i in range(test)], **lists}
    for number, name in enumerate(dict.fromkeys(name for split in ids.values() for name in split)):
        height, width = (45, 60) if number % 2 else (50, 40)
        mask = (np.arange(height)[:, None] * 3 // height + np.zeros((1, width))).astype(np.uint8)
        Image.fromarray((photo(height, width, number) // 2 + 60 * mask[..., None]).astype(np.uint8)).save(
            root / f"JPEGImages/{name}.jpg"
        )
        mask[:4, number % 9 :] = 255
        mask = Image.fromarray(mask)
        mask.putpalette(list(range(256)) * 3)
        mask.save(root / f"SegmentationClass/{name}.png")
    for split, names in ids.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "own")


def run(data, out, *more, network=SMALLEST):
    return main("eval_segmentation", *f"{network} {BASE}".split(), "--data", data, "--out", out, *more)


def state(out):
    return helpers.state(out, "segmentation_last.pt")


# ------------------------------------------------------------------------------------------------------ model
def test_dilated_resnet50_is_that_of_torchvision():
    torch.manual_seed(0)
    ours = resnet("resnet50").eval()
    with torch.device("meta"):
        theirs = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    theirs = theirs.backbone.eval()
    weights = {k: v for k, v in ours.state_dict().items() if k in theirs.state_dict()}
    theirs.load_state_dict(weights, assign=True)
    assert len(weights) == len(theirs.state_dict()) == len(ours.state_dict())
    x = torch.randn(1, 3, 41, 33)
    with torch.no_grad():
        expected, (third, fourth) = theirs(x), seg.dilate(ours).stages(x)[-2:]
    assert torch.equal(third, expected["aux"]) and torch.equal(fourth, expected["out"])
    assert fourth.shape == (1, 2048, 6, 5)


def test_dilation_adds_maps_between_and_changes_none():
    """Basic blocks, and the shortcuts of ResNet-D; networks with the small stem have the stride already."""
    torch.manual_seed(0)
    plain, dilated = (resnet("resnet18", 0.125, 224).double().eval() for _ in range(2))
    dilated.load_state_dict(plain.state_dict())
    seg.dilate(dilated)
    x = helpers.rows(1, 3, 128, 160)
    before, after = plain.stages(x), dilated.stages(x)
    assert after[3].shape[2:] == after[4].shape[2:] == (16, 20)
    torch.testing.assert_close(after[3][..., ::2, ::2], before[3], atol=1e-12, rtol=0)
    torch.testing.assert_close(after[4][..., ::4, ::4], before[4], atol=1e-12, rtol=0)
    x = helpers.rows(1, 4, 13, 10)
    torch.testing.assert_close(seg.Mean(1)(x)[..., ::2, ::2], Pool(2)(x))
    torch.testing.assert_close(seg.Mean(2)(x)[..., ::4, ::4], Pool(2)(x[..., ::2, ::2]))
    fancy = seg.dilate(resnet("resnet50_sk", 0.03125, 224))
    assert fancy.stages(torch.randn(2, 3, 64, 64))[-1].shape[2:] == (8, 8)
    small = seg.dilate(resnet(*SMALL))
    assert small.layer4[0].conv1.stride == (2, 2) and small.stages(torch.randn(2, 3, 64, 64))[-1].shape[2:] == (8, 8)


def test_heads_of_a_resnet50_are_those_of_the_reference():
    """Numbers of parameters, by hand: 3x3 convolutions without bias, batch norm, a linear layer with bias."""
    with torch.device("meta"):
        backbone = resnet("resnet50")
        model = seg.Segmenter(
            backbone, 21, SimpleNamespace(recipe="voc12aug", align_corners=False, dropout=0.1, width=1)
        )
    count = sum(p.numel() for p in model.head.parameters())
    convs = 9 * 512 * (2048 + 512 + 2048 + 512)
    assert count == convs + 3 * 2 * 512 + 21 * (512 + 1)
    assert sum(p.numel() for p in model.auxiliary.parameters()) == 9 * 1024 * 256 + 2 * 256 + 21 * (256 + 1)


def test_dropout_is_of_channels_and_of_the_sample():
    head = seg.FCN(4, 6, 3, 1, False).double().eval()
    x, keep = helpers.rows(2, 4, 5, 5), torch.tensor([[0.0] * 6, [2.0] * 6]).double()
    bias, plain = head.classify.bias.view(1, 3, 1, 1), head(x)
    out = head(x, keep)
    torch.testing.assert_close(out[:1] - bias, torch.zeros(1, 3, 5, 5).double())
    torch.testing.assert_close(out[1:] - bias, 2 * (plain[1:] - bias))


# ------------------------------------------------------------------------------------------------- loss, rates
def test_loss_divides_by_all_pixels():
    logits, labels = helpers.rows(2, 4, 3, 5).requires_grad_(), torch.randint(0, 4, (2, 3, 5))
    labels[0, 0], labels[1, 2, 3] = 255, 255
    loss, total = seg.segmentation_loss(logits, labels), 0.0
    z = logits.detach().numpy()
    for b, y, x in np.ndindex(2, 3, 5):
        if labels[b, y, x] != 255:
            total += np.log(np.exp(z[b, :, y, x]).sum()) - z[b, labels[b, y, x], y, x]
    assert loss.item() == pytest.approx(total / 30, rel=1e-12)
    loss.backward()
    assert not logits.grad[0, :, 0].any() and not logits.grad[1, :, 2, 3].any() and logits.grad[1, :, 2, 2].all()


def test_rates_of_the_schedule(data, tmp_path):
    rates = [seg.poly(step, 20_000, 0.01, 1e-4) for step in (0, 10_000, 20_000)]
    assert rates == pytest.approx([0.01, 1e-4 + 0.0099 * 0.5**0.9, 1e-4], rel=1e-12)
    run(data, tmp_path, "--lr", 0.4, "--max-steps", 2)  # a batch of 4 instead of 16
    logged = [r["lr"] for r in helpers.records(tmp_path, "segmentation.jsonl").values()]
    assert logged == pytest.approx([0.1, 0.001 + 0.099 * (5 / 6) ** 0.9], rel=1e-12)


def test_defaults_are_those_of_the_recipes(tmp_path):
    (tmp_path / "leftImg8bit").mkdir()

    def options(data, *more, backbone=None, arch="resnet50"):
        args = helpers.parsed("eval_segmentation", "--pretrained", "random", "--data", data, *more)
        meta = {"arch": arch, "width": 1.0, "image_size": 224, "channels": 3}
        args = seg.complete(args, backbone or resnet(*SMALL), meta)
        names = "recipe crop scale slide align_corners batch_size steps lr min_lr weight_decay factor".split()
        return [getattr(args, name) for name in names]

    voc = ["voc12aug", 512, [2048, 512], 0, False, 16, 20_000, 0.01, pytest.approx(1e-4), 5e-4, 1]
    city = ["cityscapes", 769, [2049, 1025], 513, True, 8, 40_000, 0.01, pytest.approx(1e-4), 5e-4, 1]
    assert options("/nowhere") == voc and options(tmp_path) == city
    linear = ["linear", 769, [2049, 1025], 513, False, 16, 20_000, 1e-3, 0, 1e-4, 1]
    assert options(tmp_path, backbone=SimpleNamespace(maps=None), arch="vit_base") == linear
    assert options(tmp_path, "--recipe", "voc12aug", "--batch-size", 4)[-1] == 0.25


# ----------------------------------------------------------------------------------------------- augmentation
def test_crop_beside_a_slow_reference():
    """The whole image resized by torch, then cut; classes counted by NumPy; up to ten places are refused."""
    images = torch.from_numpy(np.stack([photo(40, 60, seed=i) for i in range(40)])).permute(0, 3, 1, 2)
    masks = torch.zeros(40, 1, 40, 60, dtype=torch.uint8)
    masks[:, :, :, 52:], masks[::2, :, 30:], masks[:, :, :3] = 1, 2, 255
    view, tries, padded = seg.Crop(32, scale=(120, 40)), [], set()
    for image, mask, u in zip(images, masks, rng.uniforms(0, 0, np.arange(40), 0, 40), strict=True):
        ratio = 0.5 + 1.5 * u[0]
        factor = min(int(120 * ratio) / 60, int(40 * ratio) / 40)
        height, width = int(40 * factor + 0.5), int(60 * factor + 0.5)
        big = F.interpolate(image[None].double(), (height, width), mode="bilinear")[0]
        small = F.interpolate(mask[None].float(), (height, width), mode="nearest")[0, 0].numpy()
        h, w = min(32, height), min(32, width)
        for attempt in range(11):
            top, left = (int(u[1 + 2 * attempt + k] * (side - n + 1)) for k, side, n in ((0, height, h), (1, width, w)))
            cut = small[top : top + h, left : left + w]
            labels, counts = np.unique(cut, return_counts=True)
            counts = counts[labels != 255]
            if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
                break
        tries.append(attempt)
        padded.add(h < 32)
        cut = np.concatenate([big[:, top : top + h, left : left + w].numpy(), cut[None]])
        expected = np.zeros((4, 32, 32))
        expected[3] = 254
        expected[:, :h, :w] = cut[..., ::-1] if u[23] < 0.5 else cut
        result = view.crop(torch.cat([image, mask]), u).numpy()
        assert np.abs(result[:3] - expected[:3]).max() < 0.5 + 1e-3 and (result[3] == expected[3]).all()
    assert {0, 10} <= set(tries) and len(set(tries)) > 4 and len(padded) == 2


def test_limit_of_a_class():
    mask = torch.zeros(4, 5, dtype=torch.uint8)
    for labels, limit, fine in (
        ([0] * 20, 0.75, False),
        ([0] * 15 + [1] * 5, 0.75, False),
        ([0] * 14 + [1] * 6, 0.75, True),
        ([0] * 14 + [1] * 4 + [255] * 2, 0.75, False),
        ([255] * 20, 0.75, False),
        ([0] * 20, 1.0, True),
    ):
        assert seg.varied(mask.new_tensor(labels).view(4, 5), limit) == fine


def test_colours_beside_colorsys():
    """In the order of the reference; every value, also where it is clipped."""
    x, u = torch.rand(60, 3, 2, 3, dtype=torch.float64), rng.uniforms(1, 0, np.arange(60), 0, 9)
    x[0], x[1] = 0.4, 0.0
    result = seg.distort(x.clone(), u)
    for b, i, j in np.ndindex(60, 2, 3):
        p, v = x[b, :, i, j].numpy(), u[b]
        if v[0] < 0.5:
            p = np.clip(p + (-32 + 64 * v[1]) / 255, 0, 1)
        if v[2] < 0.5 and v[8] < 0.5:
            p = np.clip(p * (0.5 + v[3]), 0, 1)
        hue, saturation, value = colorsys.rgb_to_hsv(*p)
        saturation = min(1, saturation * (0.5 + v[5])) if v[4] < 0.5 else saturation
        hue = (hue + (int(36 * v[7]) - 18) / 180) % 1 if v[6] < 0.5 else hue
        p = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
        if v[2] < 0.5 and v[8] >= 0.5:
            p = np.clip(p * (0.5 + v[3]), 0, 1)
        np.testing.assert_allclose(result[b, :, i, j].numpy(), p, atol=1e-9)
    grey = seg.distort(torch.full((60, 1, 1, 1), 0.5), u)
    assert grey.std() > 0.1


def test_padding_is_zero_after_normalising_and_does_not_count():
    crops = torch.full((2, 4, 4, 4), 100, dtype=torch.uint8)
    crops[:, 3], crops[:, 3, :, 3], crops[0, 3, 0, 0] = 1, 254, 255
    view = SimpleNamespace(mean=(0.5, 0.4, 0.3, 0), std=(0.2, 0.2, 0.2, 1 / 255))
    batch = SimpleNamespace(images=[crops], specs=[view], draws=np.full((1, 2, 40), 0.9), dtype=torch.float64)
    x, labels = seg.inputs(batch, SimpleNamespace(distort=True))
    assert not x[..., 3].any() and (labels[..., 3] == 255).all() and labels[0, 0, 0] == 255 and labels[1, 0, 0] == 1
    torch.testing.assert_close(x[0, :, 0, 0], (100 / 255 - torch.tensor(view.mean[:3]).double()) / 0.2)


# ------------------------------------------------------------------------------------------------- evaluation
def test_scores_beside_a_slow_loop():
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 3, (6, 7, 8)), generator.integers(0, 3, (6, 7, 8))
    truth[generator.random(truth.shape) < 0.2] = 255
    truth[truth == 2], predicted[0, :2] = 1, 4  # class 2 is predicted only, class 3 neither, class 4 by mistake
    matrix = sum(seg.confusion(*(torch.from_numpy(a[i]) for a in (truth, predicted)), 5) for i in range(6))
    ious, right = [], 0
    for c in range(5):
        pixels = [(t, p) for t, p in zip(truth.ravel(), predicted.ravel(), strict=True) if t != 255]
        both, either = sum(t == p == c for t, p in pixels), sum(c in (t, p) for t, p in pixels)
        right += both
        ious.append(100 * both / either if either else None)
    means, found = seg.scores(matrix)
    assert found == [None if iou is None else pytest.approx(iou, abs=0.006) for iou in ious] and found[2:] == [
        0,
        None,
        0,
    ]
    assert means["miou"] == pytest.approx(sum(iou for iou in ious if iou is not None) / 4, abs=1e-3)
    assert means["pixel_accuracy"] == pytest.approx(100 * right / len(pixels), abs=1e-3)


@pytest.mark.parametrize("slide", [0, 5])
def test_predictions_at_the_size_of_the_original(slide):
    """A model that sees single pixels predicts as they are, whole or in windows, at the image's own size."""

    class Bright(nn.Module):
        def forward(self, x):
            return (torch.cat([-x[:, :1], x[:, :1]], 1),)

        def resize(self, logits, shape):
            assert logits.shape[2:] == shape and max(shape) <= (8 if slide else 99)
            return logits

    image = torch.from_numpy(photo(17, 12)).permute(2, 0, 1)
    view = SimpleNamespace(mean=(0.5, 0.5, 0.5, 0), std=(1, 1, 1, 1 / 255))
    fake = SimpleNamespace(model=Bright(), loader=SimpleNamespace(specs=[view]), device="cpu", dtype=torch.float32)
    fake.amp = torch.no_grad()
    args = SimpleNamespace(scale=(17, 12), slide=slide, crop=8, align_corners=True)
    assert torch.equal(seg.predict(fake, image, args), (image[0] > 127).long())
    large = seg.predict(fake, image, SimpleNamespace(**vars(args) | {"scale": (34, 24)}))
    assert large.shape == (17, 12) and (large == (image[0] > 127)).float().mean() > 0.8


def test_windows_of_cityscapes():
    boxes = seg.windows(1025, 2049, 769, 513)
    assert sorted({b[0] for b in boxes}) == [0, 256] and sorted({b[1] for b in boxes}) == [0, 513, 1026, 1280]
    assert len(boxes) == 8 and {(b[2] - b[0], b[3] - b[1]) for b in boxes} == {(769, 769)}
    assert seg.windows(300, 700, 769, 513) == [(0, 0, 300, 700)]


# ------------------------------------------------------------------------------------------------------- data
def test_labels_of_cityscapes_are_mapped(tmp_path):
    known = torchvision.datasets.Cityscapes.classes
    for split, towns in {"train": ("aachen", "ulm"), "val": ("bonn",)}.items():
        for town in towns:
            for kind in ("leftImg8bit", "gtFine"):
                (tmp_path / kind / split / town).mkdir(parents=True)
            image = tmp_path / "leftImg8bit" / split / town / f"{town}_000000_000019_leftImg8bit.png"
            Image.fromarray(photo(5, 7)).save(image)
            mask = np.append(np.arange(34), 255).astype(np.uint8).reshape(5, 7)
            Image.fromarray(mask).save(tmp_path / "gtFine" / split / town / f"{town}_000000_000019_gtFine_labelIds.png")
    data, test = open_pairs(tmp_path)
    assert (len(data), len(test)) == (2, 1)
    pair = data[1][0]
    expected = [255 if c.train_id in (-1, 255) else c.train_id for c in known if c.id >= 0] + [255]
    assert pair.shape == (4, 5, 7) and pair[3].flatten().tolist() == expected
    assert data.classes == [c.name for c in known if 0 <= c.train_id < 255]


def test_lists_and_masks_of_voc_with_sbd(tmp_path, capsys):
    """Masks of SBD are taken where VOC has none; test images are never trained on; other lists by name."""
    root = write_set(tmp_path / "VOCdevkit" / "VOC2012", 4, 2, aug=["t1", "s0", "v1"])
    (root / "classes.txt").unlink()
    (root / "SegmentationClassAug").mkdir()
    (root / "SegmentationClass/s0.png").rename(root / "SegmentationClassAug/s0.png")
    shutil.copy(root / "SegmentationClass/t0.png", root / "SegmentationClassAug/t1.png")
    data, test = open_pairs(tmp_path / "VOCdevkit")
    assert [p.stem for p in data.masks] == ["t0", "t1", "t2", "t3", "s0"] and len(data.classes) == 21
    assert [p.parent.name for p in data.masks] == ["SegmentationClass"] * 4 + ["SegmentationClassAug"]
    assert [p.stem for p in test.masks] == ["v0", "v1"] and test[0][0].shape[0] == 4
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("s0\nt2\n")
    assert len(open_pairs(root)[0]) == 2 and len(open_pairs(root, "train")[0]) == 4
    assert len(open_pairs(root, "val", "train")[0]) == 2  # as it is asked for
    assert "all images of trainaug are test" in refused(capsys, open_pairs, root, None, "trainaug")


def wrong(root, kind):
    """Breaks a training image that is not among those that are looked at before."""
    path = root / "SegmentationClass/t1.png"
    mask = np.array(Image.open(path))
    if kind == "label":
        mask[-1, -1] = 3
    if kind == "size":
        mask = mask[:-1]
    if kind == "colours":
        mask = np.stack([mask] * 3, -1)
    if kind == "missing":
        path.unlink()
    elif kind == "broken":
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "image":
        (root / "JPEGImages/v1.jpg").write_bytes(b"no image")
    elif kind == "classes":
        (root / "classes.txt").unlink()
    else:
        Image.fromarray(mask).save(path)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("label", "SegmentationClass/t1.png: label 3, expected 0 to 2, or 255 where nothing counts"),
        ("size", "SegmentationClass/t1.png: the mask has 60 x 44 pixels, its image 60 x 45"),
        ("colours", "SegmentationClass/t1.png: holds colours (RGB), expected numbers of classes"),
        ("broken", "SegmentationClass/t1.png: cannot be read"),
        ("missing", "1 of 9 masks are missing, the first is"),
        ("image", "JPEGImages/v1.jpg: UnidentifiedImageError: not an image"),
        ("classes", "--classes: "),
    ],
)
def test_poor_data_is_named(kind, text, tmp_path, capsys):
    """Also what the loading process meets, in the middle of a run."""
    wrong(write_set(tmp_path / "set"), kind)
    more = ["--recipe", "linear", "--max-steps", 2]
    assert text in refused(capsys, run, tmp_path / "set", tmp_path / "out", *more).replace("\\", "/")


@pytest.mark.parametrize(
    "line", ["--slide 64", "--min-lr 2", "--steps 0", "--batch-size 10", "--scale 5 5", "--recipe a"]
)
def test_mistakes_get_one_line(line, data, capsys, tmp_path):
    assert line.split()[0] in refused(capsys, run, data, tmp_path, *line.split())
    assert "choose linear" in refused(
        capsys, run, data, tmp_path, "--recipe", "voc12aug", network=f"--pretrained {write_vit(tmp_path / 'v.pt')}"
    )


# ------------------------------------------------------------------------------------------------- whole runs
def test_a_run_and_what_it_leaves(data, tmp_path):
    """It learns; what it wrote is a backbone again; a finished run is evaluated again to the same figures."""
    more = ["--lr", 0.4, "--steps", 30, "--val-every", 15, "--no-distort", "--flip", 0, "--log-every", 10]
    result = run(data, tmp_path, *more)
    assert result["miou"] > 60 and result["iou"].keys() == set(NAMES) and (result["train"], result["test"]) == (9, 5)
    assert json.loads((tmp_path / "eval_segmentation.json").read_text()) == json.loads(json.dumps(result))
    assert [h["step"] for h in state(tmp_path)["history"]] == [15, 30]
    assert Image.open(tmp_path / "segmentation.png").width > 600 and (tmp_path / "segmentation_views.png").exists()
    again, meta = load_backbone(tmp_path / "segmentation_last.pt")
    assert meta["arch"] == "resnet18" and torch.equal(
        again.conv1.weight, state(tmp_path)["model"]["backbone.conv1.weight"]
    )
    assert run(data, tmp_path, *more) == result
    assert not list(tmp_path.glob("*.tmp*"))


def test_linear_head_leaves_the_network_alone(data, tmp_path):
    """Weights and running statistics of a ResNet; a ViT takes crops and images that are no multiple of its patches."""
    run(data, tmp_path / "a", "--recipe", "linear", "--max-steps", 2)
    before, _ = load_backbone("random", "resnet18", 0.125, 16, seed=3)
    after = state(tmp_path / "a")["model"]
    assert all(torch.equal(v, after[f"backbone.{k}"]) for k, v in before.state_dict().items())
    assert after["head.0.running_mean"].any() and "auxiliary.classify.weight" not in after
    file = write_vit(tmp_path / "vit.pt", patch_size=8)
    result = run(data, tmp_path / "b", "--crop", 30, "--max-steps", 2, network=f"--pretrained {file}")
    assert result["recipe"] == "linear" and result["miou"] >= 0
    after, network = state(tmp_path / "b")["model"], load_backbone(file)[0]
    assert all(torch.equal(v, after[f"backbone.{k}"]) for k, v in network.state_dict().items())


def test_processes_and_interruptions_change_nothing(data, tmp_path):
    """Two processes give one's weights and confusion; a run continued at a step in the middle of an epoch, by one or by
    two, gives what an uninterrupted one gives, by one to the bit."""
    base = [*f"{SMALLEST} {BASE}".split(), *EXACT, "--data", str(data), "--lr", "0.1"]
    whole = run(data, tmp_path / "one", *base[-2:], *EXACT)
    run(data, tmp_path / "cut", *base[-2:], *EXACT, "--max-steps", 3)
    shutil.copytree(tmp_path / "cut", tmp_path / "cut two")
    again = run(data, tmp_path / "cut", *base[-2:], *EXACT)
    assert different(state(tmp_path / "one"), state(tmp_path / "cut"), but=["max_steps"]) == [] and again == whole
    outs = [tmp_path / name for name in ("two", "cut two")]
    launch(*(("eval_segmentation", [*base, "--out", out]) for out in outs))
    for out in outs:
        assert_close(state(tmp_path / "one")["model"], state(out)["model"], atol=1e-9, rtol=1e-7)
        result = json.loads((out / "eval_segmentation.json").read_text())
        assert result | {"out": 0} == whole | {"out": 0}
