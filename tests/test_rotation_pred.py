"""RotNet: rotated images and their labels, the loss, the staircase of its learning rate, and its picture."""

import inspect
import math

import numpy as np
import pytest
import torch
from PIL import Image

import relative_loc
import rotation_pred
from common.resnet import resnet
from rotation_pred import RotationPred, augmentation, quarter_turns, rotate4, rotation_loss, staircase
from tests.helpers import SMALL, main, parsed, records, refused, rows, train


# -------------------------------------------------------------------------------------------------- rotations
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_rotations_equal_numpy(size):
    """np.rot90 turns counter-clockwise; to the bit, and y = 0 leaves everything where it is."""
    x = rows(3, 2, size, size)
    turned, labels = rotate4(x), quarter_turns(3)
    assert turned.shape == (12, 2, size, size) and labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for row, (image, y) in enumerate(zip(turned, labels.tolist(), strict=True)):
        assert np.array_equal(image.numpy(), np.rot90(x[row % 3].numpy(), y, (1, 2))), row


def test_upper_left_pixel_goes_round_counter_clockwise():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert rotate4(x).flatten(1).tolist() == [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]


def test_memory_is_laid_out_as_convolutions_want_it():
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    assert rotate4(x).is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------- loss
def test_loss_equals_numpy():
    logits, labels = 3 * rows(20, 4), quarter_turns(5)
    z = logits.numpy()
    expected = np.mean([math.log(sum(math.exp(v - z[i, y]) for v in z[i])) for i, y in enumerate(labels.tolist())])
    assert rotation_loss(logits, labels).item() == pytest.approx(expected, abs=1e-10)


def test_equal_logits_give_chance():
    assert rotation_loss(torch.full((8, 4), 7.0).double(), quarter_turns(2)).item() == pytest.approx(math.log(4))


def test_gradient():
    logits = rows(8, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: rotation_loss(z, quarter_turns(2)), [logits])


# ------------------------------------------------------------------------------------------------------ model
def test_rotations_pass_together():
    """Batch norm sees the four rotations as one batch; the logits are linear in the features."""
    torch.manual_seed(0)
    model, x = RotationPred(resnet(*SMALL)).double(), rotate4(rows(2, 3, 16, 16))
    f, logits = model(x)
    assert f.shape == (8, model.backbone.dim) and logits.shape == (8, 4)
    torch.testing.assert_close(logits, f @ model.head.weight.T, atol=1e-14, rtol=1e-12)
    assert not torch.allclose(f[:4], model(x[:4])[0])


def test_classifier_starts_small():
    torch.manual_seed(0)
    head = RotationPred(resnet("resnet50")).head
    assert head.weight.shape == (4, 2048) and head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.bias.any()


# ----------------------------------------------------------------------------------------------------- recipe
def test_recipe_is_that_of_mmselfsup():
    args = vars(parsed("rotation_pred", "--data", "/imagenet"))
    expected = {"arch": "resnet50", "image_size": 224, "epochs": 70, "warmup_epochs": 5, "batch_size": 128, "lr": 0.4}
    expected |= {"weight_decay": 1e-4, "momentum": 0.9, "nesterov": False, "decay": 0.1, "milestones": None}
    expected |= {"crop_min": 0.08, "flip": 0.5}
    assert {name: args[name] for name in expected} == expected and args["lr"] * args["batch_size"] / 256 == 0.2
    (view,) = augmentation(224)
    assert (view.size, view.area, view.flip, view.interpolation) == (224, (0.08, 1.0), 0.5, "bilinear")
    assert view.jitter_p == view.gray_p == view.blur_p == view.solarize_p == 0
    assert parsed("rotation_pred", "--image-size", 32).crop_min == 0.2


def test_staircase_of_seventy_epochs():
    """As mmcv has it: 1 - (1 - t / T) 0.9 while t < T, the steps of 5 epochs; a tenth from epoch 30 on, a hundredth
    from epoch 50 on. 10 steps per epoch."""
    found = [staircase(step, [300, 500], 0.1, 50) for step in range(700)]
    expected = [1 - (1 - t / 50) * 0.9 for t in range(50)] + [1.0] * 250 + [0.1] * 200 + [0.01] * 200
    assert found == pytest.approx(expected, abs=1e-15)
    assert staircase(0, [3], 0.2) == 1 and staircase(3, [3], 0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], [0.1, 0.325, 0.55, 0.775, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01]),
        (["--warmup-epochs", 0, "--milestones", 1, 3, "--decay", 0.2], [1] * 4 + [0.2] * 8 + [0.04] * 4),
    ],
)
def test_rates_of_a_run(words, expected, tmp_path):
    """Four epochs of four steps: 3/7 and 5/7 of 16 are 6.9 and 11.4."""
    train("rotation_pred", tmp_path, *words)
    found = [record["lr"] for record in records(tmp_path).values()]
    assert found == pytest.approx([0.4 * 16 / 256 * factor for factor in expected], rel=1e-12)


def test_logged_accuracy_is_that_of_the_classifier(tmp_path, monkeypatch):
    """A classifier that says "one quarter turn" whatever it sees, and one that knows."""
    for logits, accuracy in ((torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(64, 4), 0.25), (torch.eye(4), 1.0)):
        if accuracy == 1:
            logits = logits[quarter_turns(16)]

        def forward(self, x, logits=logits):
            f = self.backbone(x)
            return f, logits + 0 * self.head(f)

        monkeypatch.setattr(RotationPred, "forward", forward)
        train("rotation_pred", tmp_path / str(accuracy), "--max-steps", 1)
        assert records(tmp_path / str(accuracy))[1]["accuracy"] == accuracy


def test_nesterov_reaches_the_optimiser(tmp_path):
    for words, expected in (([], False), (["--nesterov"], True)):
        (group,) = train("rotation_pred", tmp_path / str(expected), *words, "--max-steps", 1)["optimizer"][
            "param_groups"
        ]
        assert group["nesterov"] is expected


@pytest.mark.parametrize(
    "words, message",
    [
        ("--milestones 2 9 --epochs 9", "--milestones 9 must be smaller than --epochs 9"),
        ("--milestones 0", "--milestones: must be greater than 0"),
        ("--nesterov --momentum 0", "--nesterov needs a --momentum above 0"),
        ("--decay 0", "--decay: must be greater than 0"),
        ("--crop-min 0", "--crop-min: must be greater than 0"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    assert message in refused(capsys, main, "rotation_pred", "--data", "fake:64", "--out", tmp_path, *words.split())


# ---------------------------------------------------------------------------------------------------- picture
def test_picture_shows_the_rotations(tmp_path):
    train("rotation_pred", tmp_path, "--max-steps", 1)
    picture = np.asarray(Image.open(tmp_path / "rotations.png"))
    side = (picture.shape[1] - 4) // 4 - 4  # four tiles between margins of 4 pixels, below 20 of headings
    tiles = [[picture[24 + r * (side + 4) :, 4 + c * (side + 4) :][:side, :side] for c in range(4)] for r in range(4)]
    for row in tiles:
        assert all(np.array_equal(np.rot90(row[0], y), tile) for y, tile in enumerate(row))
    assert tiles[0][0].std() > 5 and not np.array_equal(tiles[0][0], tiles[1][0])


# ----------------------------------------------------------------------------------------------------- copies
def test_staircase_is_that_of_the_other_pretext_task():
    assert inspect.getsource(rotation_pred.staircase) == inspect.getsource(relative_loc.staircase)
