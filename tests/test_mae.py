"""MAE's masks, patches, loss, network sizes, pictures and the way it draws randomness."""

import argparse
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.rng import uniforms
from common.vit import vit
from mae import MAE, augmentation, mae_loss, patchify, random_masking, reconstruct, unpatchify
from tests.helpers import TINY, flags, main, parsed, records, refused, rows, state, train, write_images

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def noise(images, patches):
    return torch.from_numpy(uniforms(7, 0, range(images), 100, patches))


def masked(images, patches, ratio=0.75):
    return random_masking(noise(images, patches), ratio)[2]


def shaped(mask, patch_size, grid):
    """A mask (B, L) as one of pixels (B, 3, H, W)."""
    return unpatchify(mask[:, :, None].expand(-1, -1, 3 * patch_size**2), grid) > 0


def tiny(dim=24, **decoder):
    torch.manual_seed(0)
    return MAE(vit("vit_tiny", 16, dim / 192, 4, 2, 3), **{**DECODER, **decoder}).double()


# ------------------------------------------------------------------------------------------- patches and masks
def test_patches_hold_rows_then_columns_then_channels():
    x = torch.arange(2 * 3 * 6 * 9.0).reshape(2, 3, 6, 9)
    patches = patchify(x, 3)
    assert patches.shape == (2, 2 * 3, 27)
    for b, row, column, p, q, c in np.ndindex(2, 2, 3, 3, 3, 3):
        assert patches[b, row * 3 + column, (p * 3 + q) * 3 + c] == x[b, c, row * 3 + p, column * 3 + q]
    assert torch.equal(unpatchify(patches, (2, 3)), x)


@pytest.mark.parametrize(
    "patches, ratio, visible", [(64, 0.75, 16), (49, 0.75, 12), (196, 0.75, 49), (256, 0.75, 64), (36, 0.6, 14)]
)
def test_mask_removes_the_largest_numbers_and_restore_puts_everything_back(patches, ratio, visible):
    u = noise(5, patches)
    keep, restore, mask = random_masking(u, ratio)
    assert keep.shape == (5, visible)
    assert mask.sum(1).tolist() == [patches - visible] * 5
    for i in range(5):
        ranking = sorted(range(patches), key=lambda j, i=i: u[i, j].item())
        assert keep[i].tolist() == ranking[:visible]
        assert [j for j in range(patches) if mask[i, j] == 0] == sorted(ranking[:visible])
        order = torch.tensor(ranking)  # the visible ones, then the others: "restore" is the way back
        assert order[restore[i]].tolist() == list(range(patches))


def test_masks_are_uniform_and_differ_between_images():
    mask = masked(4000, 16)
    assert (mask.mean(0) - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5
    assert len({tuple(m) for m in mask.tolist()}) > 1200  # of 16 choose 4 = 1820 possible masks


# -------------------------------------------------------------------------------------------------------- loss
def slow_loss(images, prediction, mask, p, norm_pix):
    """Patch by patch, in NumPy."""
    images, prediction, mask = images.numpy(), prediction.numpy(), mask.numpy()
    terms, columns = [], images.shape[3] // p
    for b, i in np.argwhere(mask):
        top, left = i // columns * p, i % columns * p
        target = [images[b, c, top + y, left + x] for y in range(p) for x in range(p) for c in range(3)]
        if norm_pix:
            centre = sum(target) / len(target)
            variance = sum((t - centre) ** 2 for t in target) / (len(target) - 1)
            target = [(t - centre) / np.sqrt(variance + 1e-6) for t in target]
        terms.append(sum((a - t) ** 2 for a, t in zip(prediction[b, i], target, strict=True)) / len(target))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_equals_loops(norm_pix):
    images, prediction, mask = 3 * rows(3, 3, 8, 12) + 1, rows(3, 6, 48), masked(3, 6, 0.5)
    expected = slow_loss(images, prediction, mask, 4, norm_pix)
    assert mae_loss(images, prediction, mask, 4, norm_pix).item() == pytest.approx(expected, abs=1e-10)


def test_loss_sees_the_removed_patches_only_and_halves_average_to_the_whole():
    """So that processes and micro-batches can share a batch."""
    images, prediction, mask = rows(4, 3, 8, 8), rows(4, 16, 12).requires_grad_(), masked(4, 16)
    whole = mae_loss(images, prediction, mask, 2)
    whole.backward()
    assert torch.equal(prediction.grad.abs().sum(2) > 0, mask > 0)
    assert torch.autograd.gradcheck(lambda p: mae_loss(images, p, mask, 2), prediction)
    halves = [mae_loss(images[s], prediction[s], mask[s], 2) for s in (slice(0, 2), slice(2, 4))]
    assert sum(halves).item() / 2 == pytest.approx(whole.item(), abs=1e-12)


def test_predicting_the_mean_gives_the_loss_of_chance():
    loss = mae_loss(10 * rows(4, 3, 16, 16), torch.zeros(4, 16, 48, dtype=torch.float64), masked(4, 16), 4)
    assert loss.item() == pytest.approx(47 / 48, abs=1e-6)


def test_flat_images_are_harmless():
    """The variance of a patch may be 0: with target 0 the loss is the mean square of the prediction."""
    prediction = rows(2, 16, 12).float().requires_grad_()
    loss = mae_loss(torch.full((2, 3, 8, 8), 0.3), prediction, torch.ones(2, 16), 2)
    loss.backward()
    assert loss.item() == pytest.approx(prediction.square().mean().item(), rel=1e-3)
    assert prediction.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------- model
SIZES = {"vit_base": (85.6, 111.7), "vit_large": (303.1, 329.2), "vit_huge": (630.4, 656.6)}


@pytest.mark.parametrize("arch", SIZES)
def test_parameters_are_those_of_the_published_networks(arch):
    with torch.device("meta"):
        model = MAE(vit(arch, 224))

    def millions(module):
        return round(sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6, 1)

    assert (millions(model.backbone), millions(model)) == SIZES[arch]


def test_names_are_the_official_ones():
    with torch.device("meta"):
        names = set(MAE(vit("vit_base", 224)).state_dict())
    decoder = {"mask_token", "decoder_pos_embed"}
    decoder |= {f"decoder_{m}.{p}" for m in ("embed", "norm", "pred") for p in ("weight", "bias")}
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    decoder |= {f"decoder_blocks.{i}.{x}.{p}" for i in range(8) for x in layers for p in ("weight", "bias")}
    encoder = {"cls_token", "pos_embed", "norm.weight", "norm.bias", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    encoder |= {f"blocks.{i}.{x}.{p}" for i in range(12) for x in layers for p in ("weight", "bias")}
    assert names == decoder | {f"backbone.{name}" for name in encoder}


def test_only_visible_tokens_pass_the_encoder():
    """Multiplications counted by torch equal a formula with 16 + 1 tokens in the encoder and 64 + 1 in the decoder."""
    model = MAE(vit("vit_tiny", 32, patch_size=4, depth=2), decoder_dim=64, decoder_depth=1, decoder_heads=4)
    # as plain products: older counters miss the fused attention of the CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(2, 3, 32, 32), noise(2, 64), 0.75)

    def block(tokens, dim):  # per image: qkv and projection, MLP, both products of the attention
        return 2 * tokens * (4 + 8) * dim**2 + 2 * 2 * tokens**2 * dim

    encoder = 2 * 64 * 48 * 192 + 2 * block(17, 192)
    decoder = 2 * 17 * 192 * 64 + block(65, 64) + 2 * 65 * 64 * 48
    assert counter.get_total_flops() == 2 * (encoder + decoder)


def test_removed_pixels_change_nothing():
    model, x, u = tiny(), rows(2, 3, 16, 16), noise(2, 16)
    prediction, mask = model(x, u)
    hidden = shaped(mask, 4, (4, 4))
    assert torch.equal(model(x + 5 * hidden, u)[0], prediction)
    assert not torch.allclose(model(x + 5 * ~hidden, u)[0], prediction)


def test_decoder_puts_every_token_in_its_place():
    """Without blocks and positions a prediction depends on its own token: the image's where it is visible, else the
    mask token, which is the same everywhere."""
    model = tiny(decoder_depth=0)
    model.decoder_pos_embed.data.zero_()
    x, u = rows(3, 3, 16, 16), noise(3, 16)
    keep, _, mask = random_masking(u, 0.75)
    tokens = model.backbone.tokens(x, keep)
    prediction, _ = model(x, u)

    def head(t):
        return model.decoder_pred(model.decoder_norm(t))

    for b in range(3):
        for place, patch in enumerate(keep[b].tolist()):
            torch.testing.assert_close(prediction[b, patch], head(model.decoder_embed(tokens[b, 1 + place])))
        for patch in mask[b].nonzero()[:, 0].tolist():
            torch.testing.assert_close(prediction[b, patch], head(model.mask_token)[0, 0])


def test_gradient_checkpointing_changes_no_gradient():
    model, x, u = tiny(), rows(2, 3, 16, 16), noise(2, 16)
    found = []
    for model.backbone.checkpointing in (False, True):
        model.zero_grad()
        prediction, mask = model(x, u)
        mae_loss(x, prediction, mask, 4).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with torch.no_grad():
        assert torch.equal(model(x, u)[0], prediction)


def test_it_learns_to_continue_a_ramp():
    """Grey slopes of random directions: what is visible tells what is missing, and the loss falls far below chance."""
    model = tiny(dim=48, decoder_dim=32).float()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(60):
        a, b = torch.randn(2, 16, 1, 1, 1, generator=generator)
        images = (a * x + b * y).expand(-1, 3, -1, -1)
        prediction, mask = model(images, torch.rand(16, 16, generator=generator))
        loss = mae_loss(images, prediction, mask, 4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 47 / 48 and np.mean(losses[-10:]) < 0.2


# ------------------------------------------------------------------------------------------------------ recipe
def test_recipe_is_the_papers():
    args = parsed("mae", "--data", "/images")
    assert (args.arch, args.image_size, args.batch_size) == ("vit_base", 224, 4096)
    assert (args.epochs, args.warmup_epochs) == (800, 40)
    assert (args.lr * args.batch_size / 256, args.weight_decay, args.mask_ratio) == (pytest.approx(2.4e-3), 0.05, 0.75)
    assert (args.decoder_dim, args.decoder_depth, args.decoder_heads, args.norm_pix) == (512, 8, 16, True)
    assert "norm_pix" in args.held and not {"grad_checkpointing", "pictures_every"} & {*args.held}
    (view,) = augmentation(224)
    assert (view.area, view.ratio, view.interpolation, view.flip) == ((0.2, 1.0), (3 / 4, 4 / 3), "bicubic", 0.5)
    assert (view.jitter_p, view.gray_p, view.blur_p, view.solarize_p) == (0, 0, 0, 0)


def test_optimizer(tmp_path):
    saved = train("mae", tmp_path, "--max-steps", 7)["optimizer"]
    decayed, plain = saved["param_groups"]
    assert decayed["betas"] == plain["betas"] == (0.9, 0.95)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    shapes = {i: tuple(moments["exp_avg"].shape) for i, moments in saved["state"].items()}
    assert all(len(shapes[i]) > 1 for i in decayed["params"]) and all(len(shapes[i]) == 1 for i in plain["params"])
    # class and mask token are decayed, as in the official code; the tables of positions are not trained
    assert sorted(shape for shape in shapes.values() if len(shape) == 3) == [(1, 1, 16), (1, 1, 48)]
    # 4 steps of warm-up from 0, 12 of cosine: steps 1 and 5 begin them
    rates = {step: r["lr"] for step, r in records(tmp_path).items()}
    peak = 1.5e-4 * 16 / 256
    expected = [0, 1 / 4, 2 / 4, 3 / 4, 1, (1 + np.cos(np.pi / 12)) / 2, (1 + np.cos(np.pi / 6)) / 2]
    assert [rates[s] for s in range(1, 8)] == pytest.approx([peak * e for e in expected])


def masks_seen(monkeypatch, tmp_path, *more):
    """{pixels of an augmented image: its mask} over one epoch of a run."""
    seen, real = {}, MAE.forward

    def forward(self, x, u, ratio):
        prediction, mask = real(self, x, u, ratio)
        seen.update({image.contiguous().numpy().tobytes(): tuple(m.tolist()) for image, m in zip(x, mask, strict=True)})
        return prediction, mask

    monkeypatch.setattr(MAE, "forward", forward)
    train("mae", tmp_path, "--pictures-every", 0, *more)
    monkeypatch.setattr(MAE, "forward", real)
    return seen


def test_a_mask_belongs_to_its_image(monkeypatch, tmp_path):
    """Its place in the batch, threads and micro-batches do not matter (nor do processes: test_scripts.py)."""
    whole = masks_seen(monkeypatch, tmp_path / "a", "--max-steps", 4)
    assert len(whole) == 64 and len(set(whole.values())) == 64
    parts = masks_seen(monkeypatch, tmp_path / "b", "--max-steps", 8, "--batch-size", 8, "--workers", 0)
    assert parts == whole
    assert masks_seen(monkeypatch, tmp_path / "c", "--max-steps", 4, "--accum", 4) == whole
    later = masks_seen(monkeypatch, tmp_path / "d", "--max-steps", 8)
    assert len(set(later.values())) == 128, "every epoch has masks of its own"


# ---------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("norm_pix", [True, False])
def test_pictures_of_a_perfect_prediction_are_the_image(norm_pix):
    """norm_pix: scaling a patch and taking that back loses nothing."""
    x, u, hidden = 2 * rows(2, 3, 8, 8) - 1, noise(2, 16), shaped(masked(2, 16), 2, (4, 4))
    perfect = patchify(x, 2)
    if norm_pix:
        perfect = (perfect - perfect.mean(2, keepdim=True)) / (perfect.var(2, keepdim=True) + 1e-6) ** 0.5

    def model(x, u, ratio):
        return perfect, random_masking(u, ratio)[2]

    model.backbone = types.SimpleNamespace(patch_size=2, grid=(4, 4))
    original, visible, reconstruction, both = reconstruct(model, x, u, 0.75, norm_pix)
    for panel, expected in ((original, x), (reconstruction, torch.where(hidden, x, 0)), (both, x)):
        torch.testing.assert_close(panel, expected, atol=1e-12, rtol=0)
    assert torch.equal(visible, torch.where(hidden, 0, x)) and hidden.sum() == 2 * 12 * 12


def test_visible_patches_are_shown_as_they_are():
    x, hidden = rows(2, 3, 16, 16), shaped(masked(2, 16), 4, (4, 4))
    _, _, reconstruction, both = reconstruct(tiny(), x, noise(2, 16))
    assert torch.equal(both, torch.where(hidden, reconstruction, x))
    assert (reconstruction[~hidden] == 0).all() and (reconstruction[hidden] != 0).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an encoder of 192 dimensions, which the layouts of other people's files know."""
    out = tmp_path_factory.mktemp("run")
    train("mae", out, "--width", 1, "--max-steps", 2)
    return out


def test_training_leaves_pictures(run, tmp_path):
    with Image.open(run / "reconstructions.png") as picture:
        side = 4 + 160  # 16 pixels, ten times enlarged, and the gap
        assert picture.width == 4 * side + 4
        assert picture.height > 8 * side + 4 + 20, "eight images, headings and a caption"
        original, visible, predicted, both = (
            np.asarray(picture)[24 : 20 + 8 * side, 4 + i * side :][:, :160] for i in range(4)
        )
    grey = [(panel == 204).all(2) for panel in (original, visible, predicted, both)]
    assert not grey[0].any() and not grey[3].any(), "no patch is missing"
    rows = np.arange(len(original)) % side < 160  # without the gaps
    assert np.array_equal(grey[1][rows], ~grey[2][rows]) and grey[2][rows].mean() == 1 / 4
    assert np.array_equal(both, np.where(grey[1][..., None], predicted, visible))
    train("mae", tmp_path, "--max-steps", 1, "--pictures-every", 0)
    assert not (tmp_path / "reconstructions.png").exists()


@pytest.fixture
def photos(tmp_path):
    write_images(tmp_path, ["a.png", "b.jpg"], size=(40, 30))
    return [tmp_path / "a.png", tmp_path / "b.jpg"]


def visualize(photos, pretrained, out, *more):
    main("mae", "--visualize", *photos, "--pretrained", pretrained, "--out", out, *more)
    return (out / "visualize.png").read_bytes()


def test_visualize_any_image(run, photos, tmp_path):
    """Also from the official layout: encoder and decoder side by side under "model", beside the arguments; nothing says
    how many heads there are."""
    last, official = run / "last.pt", tmp_path / "official.pth"
    picture = visualize(photos, last, tmp_path)
    assert len(picture) > 1000 and not list(tmp_path.glob("*.tmp*"))
    assert visualize(photos, last, tmp_path) == picture
    assert visualize(photos, last, tmp_path, "--seed", 1) != picture, "another seed, another mask"
    half = visualize(photos, last, tmp_path, "--mask-ratio", 0.5)
    assert half != picture and visualize(photos, last, tmp_path, "--no-norm-pix") != picture
    saved = state(run)
    saved["args"]["mask_ratio"] = 0.5
    torch.save(saved, tmp_path / "half.pt")
    assert visualize(photos, tmp_path / "half.pt", tmp_path) == half, "a run's own ratio, unless told otherwise"
    weights = {name.removeprefix("backbone."): value for name, value in state(run)["model"].items()}
    torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, official)
    assert visualize(photos, official, tmp_path, "--decoder-heads", 2) == picture
    assert visualize(photos, official, tmp_path, "--decoder-heads", 4) != picture
    assert visualize(photos, official, tmp_path, "--decoder-heads", 2, "--no-norm-pix") != picture


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--arch vit_tiny", (192, 4, 3)),
        ("--arch vit_small", (384, 4, 6)),
        ("--arch vit_base", (512, 8, 16)),
        ("--arch vit_large", (512, 8, 16)),
        ("--arch vit_huge", (512, 8, 16)),
        ("--arch vit_base --width 0.5", (384, 4, 12)),
        ("--arch vit_small --width 3", (512, 8, 16)),
        ("--arch vit_tiny --depth 2 --heads 4", (192, 1, 4)),
        ("--arch vit_tiny --decoder-dim 512 --decoder-depth 8 --decoder-heads 16", (512, 8, 16)),
        ("--arch vit_tiny --decoder-dim 128", (128, 4, 2)),  # 3 heads do not divide it
        ("--arch vit_tiny --decoder-depth 1", (192, 1, 3)),
        ("--arch vit_base --decoder-dim 192", (192, 8, 16)),
        ("--arch vit_base --decoder-heads 8", (512, 8, 8)),
    ],
)
def test_decoder_goes_with_the_encoder(words, expected):
    args = parsed("mae", *words.split())
    assert (args.decoder_dim, args.decoder_depth, args.decoder_heads) == expected


def test_scaled_decoder_is_said_and_kept(tmp_path, capsys):
    words = [*TINY.split(), *"--arch vit_tiny --width 0.25 --depth 3 --pictures-every 0".split(), "--out", tmp_path]
    main("mae", *words, "--max-steps", 1)
    text = (
        "decoder     48 dimensions, 1 blocks, 3 heads, scaled with the encoder (the paper's, for ViT-B and larger: 512"
    )
    assert text in capsys.readouterr().out
    assert state(tmp_path)["model"]["decoder_embed.weight"].shape == (48, 48)
    main("mae", *words, "--max-steps", 2)
    assert "resuming" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "words, expected",
    [
        ("--mask-ratio 0.999", "--mask-ratio 0.999 leaves 0 of 64 patches"),
        ("--mask-ratio 1", "--mask-ratio: must be less than 1"),
        ("--mask-ratio 0", "--mask-ratio 0.0 leaves 64 of 64 patches"),
        ("--decoder-dim 18 --decoder-heads 3", "--decoder-dim 18"),
        ("--decoder-dim 16 --decoder-heads 3", "of 3 heads: try 12"),
        ("--decoder-depth 0", "--decoder-depth"),
        ("--patch-size 5", "--patch-size"),
        ("--patch-size 1 --channels 1", "--norm-pix divides by the deviation of a patch"),
        ("--heads 5", "5 heads"),
        ("--pretrained x.pt", "--visualize"),
        ("--visualize x.jpg", "--pretrained"),
    ],
)
def test_mistakes(words, expected, capsys, tmp_path):
    assert expected in refused(capsys, main, "mae", *flags("mae", tmp_path, *words.split()))


def test_mistakes_with_visualize(run, photos, capsys, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    half = state(run)
    del half["model"]["decoder_norm.bias"]
    torch.save(half, tmp_path / "half.pt")
    for images, pretrained, expected in (
        (photos, run / "backbone.pt", "no decoder"),
        (photos, tmp_path / "no.pt", "no such file"),
        ([tmp_path / "none.jpg"], run / "last.pt", "none.jpg"),
        ([*photos, tmp_path / "text.jpg"], run / "last.pt", "text.jpg"),
        (photos, tmp_path / "half.pt", "decoder_norm.bias missing"),
    ):
        words = ["--visualize", *images, "--pretrained", pretrained, "--out", tmp_path]
        assert expected in refused(capsys, main, "mae", *words)
    assert "--data" in refused(capsys, main, "mae", "--out", tmp_path)
