"""SimMIM's squares, loss, networks, rates, pictures and the way it draws randomness."""

import math
import types

import numpy as np
import pytest
import torch
from PIL import Image

from common import swin
from common.checkpoint import load_backbone
from common.rng import PATHS, uniforms
from common.vit import TABLE, path_factors
from simmim import SimMIM, augmentation, enlarge, fit, learning_rate, random_mask, reconstruct, simmim_loss, transformer
from tests.helpers import different, flags, main, parsed, records, refused, rows, state, train, write_images

SWIN = "--arch swin_tiny --width 0.125 --depth 2 2 --patch-size 2".split()
KINDS = ["swin", "vit"]


def noise(images, squares):
    return torch.from_numpy(uniforms(7, 0, range(images), 100, squares))


def tiny(kind, size=16):
    torch.manual_seed(0)
    if kind == "vit":
        backbone = transformer("vit_tiny", size, width=0.125, patch_size=4, depth=2, heads=2)
    else:
        backbone = swin.swin("swin_tiny", size, 0.125, 2, 4, (2, 2))  # tokens of the last map are 4 pixels
    model = SimMIM(backbone).double()
    for name, p in model.named_parameters():
        if name.endswith(TABLE) or p.ndim == 1:
            torch.nn.init.normal_(p, std=0.3)  # as after training
    return model


# ------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize(
    "size, square, patch, side, masked, grid",
    [(192, 32, 4, 6, 22, 48), (224, 32, 16, 7, 30, 14), (224, 32, 4, 7, 30, 56), (32, 8, 4, 4, 10, 8)],
    ids=["Swin", "ViT", "Swin at 224", "small"],
)
def test_squares_are_counted_as_in_the_paper_and_cover_whole_patches(size, square, patch, side, masked, grid):
    backbone = types.SimpleNamespace(patch_size=patch, stride=patch, config={})
    assert fit(size, backbone, square, 0.6) == side**2
    u = noise(5, side**2)
    mask = random_mask(u, 0.6)
    assert mask.shape == (5, side, side) and mask.sum((1, 2)).tolist() == [masked] * 5
    fine = enlarge(mask, size // patch)
    assert fine.shape == (5, grid, grid)
    for b in range(5):
        smallest = sorted(range(side**2), key=lambda j, b=b: u[b, j].item())[:masked]
        assert mask[b].flatten().nonzero()[:, 0].tolist() == sorted(smallest)
        for y, x in np.ndindex(grid, grid):
            assert fine[b, y, x] == mask[b, y * patch // square, x * patch // square]


def test_masks_are_uniform_and_differ_between_images():
    mask = random_mask(noise(4000, 16), 0.6).flatten(1)
    assert (mask.mean(0) - 10 / 16).abs().max() < 5 * (0.625 * 0.375 / 4000) ** 0.5
    assert len({tuple(m) for m in mask.tolist()}) > 3000  # of 16 choose 10 = 8008 possible masks


# -------------------------------------------------------------------------------------------------------- loss
def test_loss_equals_the_formula():
    images, prediction, mask = rows(3, 2, 8, 8), rows(3, 2, 8, 8, seed=1), random_mask(noise(3, 16), 0.6)
    x, y, pixels = images.numpy(), prediction.numpy(), np.kron(mask.numpy(), np.ones((2, 2)))
    expected = np.mean([abs(x[b, c, i, j] - y[b, c, i, j]) for b, i, j in np.argwhere(pixels) for c in range(2)])
    assert simmim_loss(images, prediction, mask).item() == pytest.approx(expected, abs=1e-14)
    assert simmim_loss(images, images + 0.25, mask).item() == pytest.approx(0.25, abs=1e-14)


def test_loss_sees_the_masked_pixels_only_and_halves_average_to_the_whole():
    """So that processes and micro-batches can share a batch."""
    images, prediction, mask = rows(4, 3, 8, 8), (3 * rows(4, 3, 8, 8, seed=1)).requires_grad_(), noise(4, 16)
    mask = random_mask(mask, 0.6)
    whole = simmim_loss(images, prediction, mask)
    whole.backward()
    assert torch.equal(prediction.grad.abs().sum(1) > 0, enlarge(mask, 8) > 0)
    assert torch.autograd.gradcheck(lambda p: simmim_loss(images, p, mask), prediction)
    halves = [simmim_loss(images[s], prediction[s], mask[s]) for s in (slice(0, 2), slice(2, 4))]
    assert sum(halves).item() / 2 == pytest.approx(whole.item(), abs=1e-12)


# ------------------------------------------------------------------------------------------------------- model
def test_parameters_are_those_of_the_published_networks():
    """Counted in the official code; a ViT has 768 biases of keys more in each of 12 blocks, which change nothing."""
    with torch.device("meta"):
        models = SimMIM(swin.swin("swin_base", 192)), SimMIM(transformer("vit_base", 224))
    assert [sum(p.numel() for p in m.parameters()) for m in models] == [89_874_104, 86_256_720 + 12 * 768]
    assert models[0].decoder[0].weight.shape == (32 * 32 * 3, 1024, 1, 1) and models[0].mask_token.shape == (1, 1, 128)
    assert models[1].decoder[0].weight.shape == (16 * 16 * 3, 768, 1, 1)
    assert models[1].backbone.rel_pos_bias[TABLE].shape == (732, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_pixels_change_nothing_and_every_prediction_sees_the_others(kind):
    model, x, u = tiny(kind), rows(2, 3, 16, 16), noise(2, 16)
    prediction, mask = model(x, u)
    hidden = enlarge(mask, 16)[:, None]
    assert prediction.shape == x.shape and mask.shape == (2, 4, 4)
    assert torch.equal(model(x + 5 * hidden, u)[0], prediction)
    changed = model(x + (1 - hidden), u)[0]
    assert ((changed - prediction).abs() > 1e-9).double().mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_predicts_its_own_pixels(kind):
    """Channel c, row i and column j of a token's pixels come from row c P^2 + i P + j of the decoder's weight."""
    model, x, u = tiny(kind), rows(2, 3, 16, 16), noise(2, 16)
    prediction, mask = model(x, u)
    patches = enlarge(mask, 16 // model.backbone.patch_size).flatten(1)
    if kind == "vit":
        tokens = model.backbone.tokens(x, mask=patches, token=model.mask_token)[:, 1:]
    else:
        maps = model.backbone.encode(model.backbone.embed(x, patches, model.mask_token))[0]
        tokens = maps.flatten(1, 2)
    weight, bias = model.decoder[0].weight[:, :, 0, 0], model.decoder[0].bias
    for b, c, y, z in np.ndindex(2, 3, 16, 16):
        row = c * 16 + y % 4 * 4 + z % 4
        value = tokens[b, y // 4 * 4 + z // 4] @ weight[row] + bias[row]
        assert prediction[b, c, y, z].item() == pytest.approx(value.item(), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_branches_and_checkpointing(kind):
    model, x, u = tiny(kind), rows(2, 3, 16, 16), noise(2, 16)
    paths = path_factors(torch.rand(2, model.backbone.draws, generator=torch.Generator().manual_seed(1)).double(), 0.9)
    found = []
    for model.backbone.checkpointing in (False, True):
        model.zero_grad()
        prediction, mask = model(x, u, 0.6, paths)
        simmim_loss(x, prediction, mask).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.allclose(prediction, model(x, u)[0])


def test_a_vit_starts_like_beits():
    torch.manual_seed(0)
    model = SimMIM(transformer("vit_tiny", 32, depth=4))
    weights = dict(model.named_parameters())
    cut = [model.mask_token, weights["backbone.cls_token"], weights["backbone.patch_embed.proj.weight"]]
    cut += [weights[f"backbone.blocks.2.{name}.weight"] for name in ("attn.qkv", "mlp.fc1")]
    for p in cut:  # a normal number cut at one deviation has 0.54 of it
        assert p.abs().max() <= 0.02 and p.std().item() == pytest.approx(0.0108, rel=0.1)
    for i in range(4):
        for name in ("attn.proj", "mlp.fc2"):
            p = weights[f"backbone.blocks.{i}.{name}.weight"] * math.sqrt(2 * (i + 1))
            assert 0.0199 < p.abs().max() <= 0.020001
    assert all((weights[f"backbone.blocks.3.ls{i}.gamma"] == 0.1).all() for i in (1, 2))
    assert not weights[f"backbone.rel_pos_bias.{TABLE}"].any() and "backbone.pos_embed" not in weights
    assert not any(p.any() for name, p in weights.items() if name.endswith("bias") and "backbone" in name)
    assert SimMIM(swin.swin("swin_tiny", 16)).mask_token.abs().max() > 0.03  # not cut


def test_it_learns_to_continue_a_ramp():
    """Grey slopes of random directions: what is visible tells what is missing."""
    torch.manual_seed(0)
    model = SimMIM(transformer("vit_tiny", 16, width=0.25, patch_size=4, depth=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(80):
        a, b = torch.randn(2, 16, 1, 1, 1, generator=generator)
        images = (a * x + b * y).expand(-1, 3, -1, -1)
        prediction, mask = model(images, torch.rand(16, 16, generator=generator))
        loss = simmim_loss(images, prediction, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[:5]) > 0.6 and np.mean(losses[-10:]) < 0.5


# ------------------------------------------------------------------------------------------------------ recipe
def test_recipes_are_the_papers():
    names = "image_size mask_patch_size mask_ratio batch_size epochs warmup_epochs lr warmup_lr weight_decay drop_path"
    names = (*names.split(), "schedule", "clip", "momentum")
    common = {"mask_patch_size": 32, "mask_ratio": 0.6, "batch_size": 2048, "warmup_epochs": 10, "weight_decay": 0.05}
    common |= {"clip": 5.0, "momentum": 0.9}
    cosine = {"schedule": "cosine", "epochs": 100, "lr": 2e-4, "warmup_lr": 1e-6}
    multistep = {"schedule": "multistep", "epochs": 800, "lr": 1e-4, "warmup_lr": 5e-7}
    for words, expected in (
        ("", cosine | {"image_size": 192, "drop_path": 0}),
        ("--arch vit_base", multistep | {"image_size": 224, "drop_path": 0.1}),
        ("--schedule multistep --image-size 224", multistep | {"image_size": 224, "drop_path": 0}),
        ("--arch vit_small --schedule cosine --lr 1", cosine | {"image_size": 224, "drop_path": 0.1, "lr": 1}),
    ):
        args = parsed("simmim", "--data", "/images", *words.split())
        assert {name: getattr(args, name) for name in names} == common | expected, words
    assert args.min_lr == 1e-5 and {"decay_tables", "mask_patch_size", "schedule"} <= {*args.held}
    sizes = {32: 8, 64: 16, 96: 24, 128: 32, 28: 4, 36: 9}  # the side, that of a square
    for arch in ("swin_tiny", "vit_tiny"):
        found = {s: parsed("simmim", "--image-size", s, "--arch", arch).mask_patch_size for s in sizes}
        assert found | {28: 4, 36: 9} == sizes | {28: 4, 36: 9}
    (view,) = augmentation(192)
    assert (view.area, view.ratio, view.interpolation, view.flip) == ((0.67, 1.0), (3 / 4, 4 / 3), "bilinear", 0.5)
    assert (view.jitter_p, view.gray_p, view.blur_p, view.solarize_p) == (0, 0, 0, 0)


def test_rates():
    """100 epochs of 10 steps, 10 of them warm-up: the cosine has begun at step 0; 800 epochs: a tenth from 700 on."""
    rates = [learning_rate(step, 1000, 100, 8e-4, 4e-6, 4e-5) for step in (0, 50, 99, 100, 500, 1000)]
    low = 4e-5 + 7.6e-4 * (1 + math.cos(math.pi / 10)) / 2
    assert rates == pytest.approx([4e-6, 4.02e-4, 4e-6 + 0.99 * 7.96e-4, low, 4.2e-4, 4e-5], rel=1e-12)
    assert low < 0.98 * 8e-4
    rates = [learning_rate(step, 8000, 100, 4e-4, 2e-6, falls=[7000]) for step in (0, 100, 6999, 7000, 7999)]
    assert rates == pytest.approx([2e-6, 4e-4, 4e-4, 4e-5, 4e-5], rel=1e-12)
    assert learning_rate(9, 10, 0, 1, 0, falls=[3, 6, 9]) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", [0.1, 1.075, 2.05, 3.025, 4, 4, 4, 0.4]),
        ("--milestones 1 3 --warmup-epochs 0", [4, 4, 4, 4, 0.4, 0.4, 0.4, 0.4]),
    ],
)
def test_rates_of_a_run(words, expected, tmp_path):
    """Per 512 images: 16 are 1/32. Without milestones the rate falls before the last eighth of 4 epochs of 4 steps."""
    more = ["--lr", 128, "--warmup-lr", 3.2, "--pictures-every", 0, *words.split()]
    train("simmim", tmp_path, *more, "--max-steps", 8, *["--epochs", "2"] * (not words))
    assert [r["lr"] for r in records(tmp_path).values()] == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay(kind, tmp_path):
    """As in the official code: a Swin's mask token has none, a ViT's has; tables have it, against its intention."""
    model, saved = tiny(kind), {}
    for name, more in (("as there", []), ("without", ["--no-decay-tables"])):
        words = [*(SWIN if kind == "swin" else []), "--max-steps", 1, "--weight-decay", 0.25, *more]
        saved[name] = train("simmim", tmp_path / name, *words, "--pictures-every", 0)
        decayed, plain = saved[name]["optimizer"]["param_groups"]
        assert (decayed["weight_decay"], plain["weight_decay"], decayed["betas"]) == (0.25, 0, (0.9, 0.999))
        shapes = {i: v["exp_avg"] for i, v in saved[name]["optimizer"]["state"].items()}
        tokens = sorted(tuple(shapes[i].shape) for i in plain["params"] if shapes[i].ndim == 3)
        assert tokens == ([(1, 1, 12)] if kind == "swin" else [(1, 1, 48)])
        assert all(shapes[i].ndim > 1 for i in decayed["params"])
    tables = sum(name.endswith(TABLE) for name, _ in model.named_parameters())
    counts = [len(saved[name]["optimizer"]["param_groups"][0]["params"]) for name in ("as there", "without")]
    assert counts[0] - counts[1] == tables


def drawn(monkeypatch, tmp_path, *more):
    """{pixels of an augmented image: its mask and its paths} of a run."""
    seen, real = {}, SimMIM.forward

    def forward(self, x, u, ratio, paths):
        prediction, mask = real(self, x, u, ratio, paths)
        for image, m, p in zip(x, mask, paths.T, strict=True):
            seen[image.contiguous().numpy().tobytes()] = (*m.flatten().tolist(), *p.tolist())
        return prediction, mask

    monkeypatch.setattr(SimMIM, "forward", forward)
    train("simmim", tmp_path, "--pictures-every", 0, "--drop-path", 0.6, *more)
    monkeypatch.setattr(SimMIM, "forward", real)
    return seen


def test_mask_and_paths_belong_to_the_image(monkeypatch, tmp_path):
    """Its place in the batch, threads and micro-batches do not matter (nor do processes: test_scripts.py)."""
    whole = drawn(monkeypatch, tmp_path / "a", "--max-steps", 4)
    assert (
        len(whole) == 64 and len({d[:16] for d in whole.values()}) == 64 and len({d[16:] for d in whole.values()}) > 1
    )
    parts = drawn(monkeypatch, tmp_path / "b", "--max-steps", 8, "--batch-size", 8, "--workers", 0)
    assert parts == whole
    assert drawn(monkeypatch, tmp_path / "c", "--max-steps", 4, "--accum", 4) == whole
    u = uniforms(3, 0, range(64), PATHS, 4)
    dropped = sorted(tuple((row[2:] < 0.6).tolist()) for row in u)  # the second block's, whose rate is the highest
    assert sorted(tuple(p == 0 for p in d[18:]) for d in whole.values()) == dropped


def test_a_swin_resumes_bit_for_bit(tmp_path):
    words = [*SWIN, "--drop-path", 0.3, "--pictures-every", 0]
    whole = train("simmim", tmp_path / "a", *words, "--max-steps", 6)
    train("simmim", tmp_path / "b", *words, "--max-steps", 3)
    assert different(whole, train("simmim", tmp_path / "b", *words, "--max-steps", 6)) == []


# ---------------------------------------------------------------------------------------------------- pictures
def test_panels():
    x, u, model = rows(2, 3, 16, 16), noise(2, 16), tiny("swin")
    hidden = enlarge(random_mask(u, 0.6), 16)[:, None].expand(-1, 3, -1, -1) > 0
    original, visible, predicted, both = reconstruct(model, x, u, 0.6)
    assert torch.equal(original, x) and torch.equal(visible, torch.where(hidden, 0, x))
    assert torch.equal(predicted, torch.where(hidden, model(x, u)[0], 0))
    assert torch.equal(both, torch.where(hidden, predicted, x)) and hidden[0, 0].sum() == 10 * 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folders of a run of either kind, whose networks the layouts of other people's files know."""
    out = tmp_path_factory.mktemp("run")
    train("simmim", out / "vit", "--width", 1, "--depth", 1, "--max-steps", 2)
    train("simmim", out / "swin", *SWIN, "--width", 0.25, "--depth", 1, 1, "--max-steps", 2)
    return out


def test_training_leaves_pictures(run):
    with Image.open(run / "vit" / "reconstructions.png") as picture:
        side = 4 + 160  # 16 pixels, ten times enlarged, and the gap
        assert picture.width == 4 * side + 4 and picture.height > 8 * side + 24
        original, visible, predicted, both = (
            np.asarray(picture)[24 : 20 + 8 * side, 4 + i * side :][:, :160] for i in range(4)
        )
    grey = [(panel == 204).all(2) for panel in (original, visible, predicted, both)]
    inside = np.arange(len(original)) % side < 160  # without the gaps
    assert not grey[0].any() and not grey[3].any() and np.array_equal(grey[1][inside], ~grey[2][inside])
    assert grey[1][inside].mean() == 10 / 16 and np.array_equal(both, np.where(grey[1][..., None], predicted, visible))


def official(run, path, kind, **more):
    """A file under the names of the official code."""
    weights = {}
    for name, value in state(run / kind)["model"].items():
        name = name.replace("backbone.", "encoder.").replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        name = "encoder.mask_token" if name == "mask_token" else name
        if kind == "vit" and name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            weights |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            weights[name] = value
    index = "encoder.layers.0.blocks.0.attn.relative_position_index"
    weights |= {index if kind == "swin" else "encoder.rel_pos_bias.relative_position_index": torch.zeros(4, 4).long()}
    torch.save({"model": weights, "optimizer": {}, "epoch": 3, "max_accuracy": 0.0, **more}, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_official_files_and_pictures_of_any_image(kind, run, tmp_path, capsys):
    write_images(tmp_path, ["a.png", "b.jpg"], size=(40, 30))
    photos, last, theirs = [tmp_path / "a.png", tmp_path / "b.jpg"], run / kind / "last.pt", tmp_path / "official.pth"

    def visualize(pretrained, *more):
        main("simmim", "--visualize", *photos, "--pretrained", pretrained, "--out", tmp_path, *more)
        return (tmp_path / "visualize.png").read_bytes()

    picture = visualize(last)
    assert len(picture) > 1000 and visualize(last) == picture and visualize(last, "--seed", 1) != picture
    assert visualize(last, "--mask-ratio", 0.3) != picture
    official(run, theirs, kind)
    assert visualize(theirs, "--mask-patch-size", 4) == picture
    capsys.readouterr()
    (ours, _), (backbone, meta) = (load_backbone(path) for path in (run / kind / "backbone.pt", theirs))
    assert ": SimMIM, " in capsys.readouterr().out and meta["image_size"] == 16
    x = rows(2, 3, 16, 16).float()
    torch.testing.assert_close(backbone(x), ours(x), atol=1e-6, rtol=0)
    if kind == "vit":
        assert (meta["relative"], meta["positions"], meta["heads"]) == ("shared", "none", 3)
        other, _ = load_backbone(theirs, image_size=24)
        assert other.rel_pos_bias[TABLE].shape == (23 * 23 + 3, 3)  # patches of 2 pixels


class Config(dict):
    """A dictionary of settings, as yacs has one."""


def test_official_files_hold_settings_that_could_run_code(run, tmp_path, capsys):
    path = official(run, tmp_path / "official.pth", "vit", config=Config(MODEL="vit"))
    assert "--trust-pickle" in refused(capsys, load_backbone, path)
    assert load_backbone(path, trust_pickle=True)[1]["method"] == "SimMIM"


# ------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "words, expected",
    [
        ("--mask-patch-size 5", "--mask-patch-size 5 does not fit --image-size 16: choose one of 2, 4, 8"),
        ("--mask-patch-size 1", "1 does not fit multiples of the patch size 2: choose one of 2, 4, 8"),
        ("--mask-patch-size 16", "--mask-ratio 0.6 masks 1 of 1 squares"),
        ("--image-size 17", "--image-size 17 is not a multiple of the patch size 2: choose 16 or 18"),
        ("--image-size 18 --arch swin_tiny --depth 2 2", "--image-size 18 is not a multiple of 4"),
        ("--image-size 20 --arch swin_tiny --depth 2 2 --window 4", "--window 4 does not divide a map of 10 x 10"),
        ("--arch swin_tiny --depth 2 2 --window 3", "a map of 8 x 8 tokens: choose one of 2, 4, 8"),
        ("--mask-ratio 0", "--mask-ratio 0.0 masks 0 of 16 squares"),
        ("--mask-ratio 1", "--mask-ratio: must be less than 1"),
        ("--arch vit_giant", "--arch vit_giant: unknown"),
        ("--window 4", "are for Swins"),
        ("--depth 2 2", "are for Swins"),
        ("--milestones 9", "--milestones 9 must be smaller than --epochs 4"),
        ("--milestones 2 --schedule cosine", "--milestones does nothing with --schedule cosine"),
        ("--warmup-lr 1", "--warmup-lr 1.0 must not exceed --lr"),
        ("--schedule cosine --lr 1e-6 --warmup-lr 0", "--min-lr 1e-05 must not exceed --lr 1e-06"),
        ("--min-lr 0", "--min-lr does nothing with --schedule multistep"),
        ("--pretrained x.pt", "--visualize"),
    ],
)
def test_mistakes(words, expected, capsys, tmp_path):
    assert expected in refused(capsys, main, "simmim", *flags("simmim", tmp_path, "--patch-size", 2, *words.split()))


def test_mistakes_with_visualize(run, capsys, tmp_path):
    write_images(tmp_path, ["a.png"])
    half = state(run / "swin")
    del half["model"]["decoder.0.bias"]
    torch.save(half, tmp_path / "half.pt")
    for pretrained, expected in (
        (run / "vit" / "backbone.pt", "no decoder"),
        (tmp_path / "no.pt", "no such file"),
        (tmp_path / "half.pt", "decoder.0.bias missing"),
    ):
        words = ["--visualize", tmp_path / "a.png", "--pretrained", pretrained, "--out", tmp_path]
        assert expected in refused(capsys, main, "simmim", *words)
    assert "--data" in refused(capsys, main, "simmim", "--out", tmp_path)
