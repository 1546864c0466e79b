"""DenseCL: the dense loss, its matches, what the geometry says of them, two heads and two queues."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import densecl
from common.resnet import resnet
from results import geometry
from tests.helpers import SMALL, main, parsed, records, refused, rows, state, train, unit

SIZES = {"q": (3, 5, 4), "k": (3, 5, 4), "backbone_q": (3, 7, 4), "backbone_k": (3, 7, 4)}  # 3 images, 2 x 2 cells


def small_model(queue=24, **settings):
    torch.manual_seed(0)
    return densecl.DenseCL(resnet(*SMALL), dim=8, queue=queue, **settings).double()


def maps():
    """Arguments of the dense loss: vectors of length 1 in each cell of q and k, anything in the backbone's maps."""
    found = [rows(*shape, seed=i) for i, shape in enumerate(SIZES.values())]
    return [*(x / x.norm(dim=1, keepdim=True) for x in found[:2]), *found[2:], unit(9, 5)]


def slow(q, k, backbone_q, backbone_k, queue, temperature):
    """The loss one cell at a time, in NumPy; and the match of each cell."""
    q, k, backbone_q, backbone_k, queue = (x.numpy() for x in (q, k, backbone_q, backbone_k, queue))
    terms, matches = [], []
    for image in range(len(q)):
        for s in range(q.shape[2]):
            f = backbone_q[image, :, s]
            others = backbone_k[image].T
            cosines = [f @ other / math.sqrt((f @ f) * (other @ other)) for other in others]
            matches.append(max(range(len(cosines)), key=cosines.__getitem__))
            right = math.exp(q[image, :, s] @ k[image, :, matches[-1]] / temperature)
            terms.append(-math.log(right / (right + sum(math.exp(q[image, :, s] @ t / temperature) for t in queue))))
    return np.mean(terms), np.reshape(matches, (len(q), -1))


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_loss_equals_numpy(temperature):
    expected, found = slow(*maps(), temperature)
    assert densecl.dense_info_nce(*maps(), temperature).item() == pytest.approx(expected, abs=1e-10)
    assert densecl.matches(*maps()[2:4]).tolist() == found.tolist()
    assert len({tuple(row) for row in found.tolist()}) > 1 and found.tolist() != [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("chunk", [1, 9, 20, 45])
def test_parts_change_nothing(chunk, monkeypatch):
    whole, gradient = run_backward()
    monkeypatch.setattr(densecl, "CHUNK", chunk)  # 1, 1, 2 and 5 of 12 rows at a time
    part, other = run_backward()
    torch.testing.assert_close([part, other], [whole, gradient], atol=1e-14, rtol=1e-12)


def run_backward():
    q, *rest = maps()
    q.requires_grad_()
    loss = densecl.dense_info_nce(q, *rest, 0.2)
    loss.backward()
    return loss.detach(), q.grad


def test_gradient_goes_into_queries_only():
    inputs = [x.requires_grad_() for x in maps()]
    densecl.dense_info_nce(*inputs, 0.2).backward()
    assert inputs[0].grad.abs().max() > 0 and [x.grad for x in inputs[1:]] == [None] * 4
    rest = [x.detach() for x in inputs[1:]]
    assert torch.autograd.gradcheck(lambda q: densecl.dense_info_nce(q, *rest, 0.2), inputs[:1])


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_equal_cells_give_chance(size):
    cell = unit(1, 5)
    q, queue = cell[:, :, None].expand(2, 5, 9), cell.expand(size, -1)
    loss = densecl.dense_info_nce(q, q, rows(2, 7, 9), rows(2, 7, 9, seed=5), queue, 0.07)
    assert loss.item() == pytest.approx(math.log(1 + size), abs=1e-12)


def test_match_is_the_direction_not_the_length():
    """The key cell of the same direction wins over a longer one that points elsewhere."""
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).double()  # cells (1, 0) and (0, 1)
    k = torch.tensor([[[0.0, 5.0, 0.1], [0.2, 5.0, 0.0]]]).double()  # cells (0, 0.2), (5, 5), (0.1, 0)
    assert densecl.matches(100 * q, k).tolist() == [[2, 0]]


def test_identical_maps_match_cell_by_cell():
    x = rows(2, 7, 16)
    assert torch.equal(densecl.matches(x, 3 * x), torch.arange(16).expand(2, -1))


# --------------------------------------------------------------------------------------------------- geometry
def test_true_matches_of_hand_made_boxes():
    """2 x 2 cells; boxes are top, left, height, width of the crop, height, width of the image, mirrored."""
    image = [0, 0, 8, 8, 8, 8, 0]
    mirrored, low, part = [0, 0, 8, 8, 8, 8, 1], [4, 0, 4, 8, 8, 8, 0], [0, 4, 4, 4, 8, 8, 0]
    cases = [
        (image, image, [0, 1, 2, 3]),
        (image, mirrored, [1, 0, 3, 2]),
        (mirrored, image, [1, 0, 3, 2]),
        (mirrored, mirrored, [0, 1, 2, 3]),
        (image, low, [-1, -1, 2, 3]),  # cells of the lower half have their centres at 6 of 8: in the second row
        (low, image, [2, 3, 2, 3]),
        (part, image, [1, 1, 1, 1]),
        (image, part, [-1, 3, -1, -1]),  # the centre of the upper right cell, (2, 6), is that of the crop
        ([0, 4, 4, 4, 8, 8, 1], [0, 4, 8, 4, 8, 8, 0], [1, 0, 1, 0]),
    ]
    for q, k, expected in cases:
        found = densecl.true_matches(*(torch.tensor([box], dtype=torch.float64) for box in (q, k)), 2)
        assert found.tolist() == [expected], (q, k)


def test_true_matches_equal_a_slow_loop():
    """The centre of each cell as a point of the image, looked for in every cell of the other view."""
    rng = np.random.default_rng(0)
    boxes = [
        np.stack(
            [*rng.uniform(0, 20, (2, 30)), *rng.uniform(5, 30, (2, 30)), *np.full((2, 30), 50), rng.random(30) < 0.5]
        )
        for _ in range(2)
    ]

    def corners(box, row, column, side):
        top, left, height, width, *_, mirrored = box
        column = side - 1 - column if mirrored else column
        return top + height * row / side, left + width * column / side, height / side, width / side

    side, inside = 3, 0
    found = densecl.true_matches(*(torch.from_numpy(b.T) for b in boxes), side).tolist()
    for i in range(30):
        for cell in range(side * side):
            top, left, height, width = corners(boxes[0][:, i], *divmod(cell, side), side)
            y, x, hits = top + height / 2, left + width / 2, []
            for other in range(side * side):
                start, left, height, width = corners(boxes[1][:, i], *divmod(other, side), side)
                hits += [other] if start <= y < start + height and left <= x < left + width else []
            assert [found[i][cell]] == (hits or [-1])
            inside += bool(hits)
    assert 50 < inside < 250


def test_agreement_and_its_chance(tmp_path, monkeypatch):
    """Recomputed in slow loops from what the run has matched: over the cells in view, and with the matches of the image
    before."""
    seen = []
    for name in ("matches", "true_matches"):
        original = getattr(densecl, name)

        def record(*args, original=original, name=name):
            found = original(*args)
            seen.append((name, found.tolist()))
            return found

        monkeypatch.setattr(densecl, name, record)
    train("densecl", tmp_path, "--max-steps", 3)
    record = records(tmp_path)[3]
    assert [name for name, _ in seen] == ["matches", "matches", "true_matches"] * 3  # in the loss, then for the log
    (_, match), (_, true) = seen[-2:]
    cells = [(i, c) for i in range(16) for c in range(4) if true[i][c] >= 0]
    assert 20 < len(cells) < 64
    assert record["agree"] == pytest.approx(sum(match[i][c] == true[i][c] for i, c in cells) / len(cells))
    assert record["chance"] == pytest.approx(sum(match[i - 1][c] == true[i][c] for i, c in cells) / len(cells))


def test_agreement_on_other_images(tmp_path, capsys, monkeypatch):
    """What results/geometry.py says of a run: matches that know all are right, but not those of another image."""
    train("densecl", tmp_path, "--max-steps", 1)
    found, true_matches = [], densecl.true_matches

    def matches(*maps):
        return found[-1].clamp(min=0)

    monkeypatch.setattr(densecl, "true_matches", lambda *a: found.append(true_matches(*a)) or found[-1])
    monkeypatch.setattr(densecl, "matches", matches)
    monkeypatch.setattr("sys.argv", ["geometry.py", str(tmp_path), "--data", "fake:40", "--workers", "0"])
    geometry.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    seen, right = found[0] >= 0, found[0].clamp(min=0).roll(1, 0) == found[0]
    chance = (right.sum(1) / seen.sum(1))[seen.any(1)]
    for name in ("trained", "untrained"):
        assert result[name]["agree"] == {"mean": 1.0, "error": 0.0}
        assert result[name]["chance"]["mean"] == pytest.approx(chance.mean().item(), abs=1e-4)
        assert result[name]["difference"]["error"] == pytest.approx(chance.std().item() / len(chance) ** 0.5, abs=1e-4)


# ------------------------------------------------------------------------------------------------------ model
def test_heads_and_outputs():
    model, x = small_model(), rows(2, 8, 3, 32, 32)
    layers = [type(m).__name__ for m in (*model.projector.pooled, *model.projector.dense)]
    assert layers == ["Linear", "ReLU", "Linear", "Conv2d", "ReLU", "Conv2d"]
    q, dense_q, map_q, k, dense_k, map_k, keys, dense_keys = model(*x, torch.arange(8))
    assert (q.shape, dense_q.shape, map_q.shape) == ((8, 8), (8, 8, 16), (8, 64, 16))
    for one, other in ((q, k), (dense_q, dense_k), (map_q, map_k), (q, keys), (q, dense_keys)):
        assert one.shape == other.shape
    for vectors in (q, dense_q, k, dense_k, keys, dense_keys):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones_like(vectors[:, 0]))
    assert [t.requires_grad for t in (q, dense_q, map_q, k, dense_k, map_k, keys, dense_keys)] == [True] * 2 + [
        False
    ] * 6

    found = model.target_backbone.stages(x[1])[-1]
    maps = model.target_projector.dense(found)
    torch.testing.assert_close(map_k, found.flatten(2))
    torch.testing.assert_close(dense_k, torch.nn.functional.normalize(maps, dim=1).flatten(2))
    torch.testing.assert_close(dense_keys, torch.nn.functional.normalize(maps.mean((2, 3)), dim=1))
    torch.testing.assert_close(
        k, torch.nn.functional.normalize(model.target_projector.pooled(found.mean((2, 3))), dim=1)
    )
    assert torch.equal(k, keys)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_everything_of_an_image_returns_to_its_place(world, monkeypatch):
    """As every rank in turn, with collectives that know what the others hold: a network that works image by image gives
    keys, maps and dense keys that belong to the queries' images, whatever the order."""
    model = small_model().eval()
    x, order = rows(12, 3, 16, 16), densecl.key_order(5, 7, 0, 12)
    expected = model(x, x, torch.arange(12))
    monkeypatch.setattr(densecl, "world_size", lambda: world)
    shuffled = model.target_backbone.stages(x[order])[-1]
    pooled, cells = model.target_projector(shuffled)
    for r in range(world):
        held = iter([x, pooled, cells.mean(2), cells, shuffled])  # what the gathers of a step collect
        monkeypatch.setattr(densecl, "gather", lambda rows, held=held: next(held))
        monkeypatch.setattr(densecl, "rank", lambda r=r: r)
        own = slice(12 // world * r, 12 // world * (r + 1))
        found = model(x[own], x[own], order)
        for i, (tensor, whole) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(tensor, whole if i > 5 else whole[own], atol=1e-12, rtol=0)


@pytest.mark.parametrize("sizes", [[3] * 9, [5, 7, 2, 10], [40, 3]])
def test_both_queues_equal_lists(sizes):
    model = small_model(queue=10)
    slow, place = [model.queue.tolist(), model.dense_queue.tolist()], 0
    assert slow[0] != slow[1]
    for seed, n in enumerate(sizes):
        keys = [unit(n, 8, seed=seed), unit(n, 8, seed=seed + 50)]
        model.enqueue(*keys)
        for pair in zip(*(k.tolist() for k in keys), strict=True):
            slow[0][place], slow[1][place] = pair
            place = (place + 1) % 10
        assert [model.queue.tolist(), model.dense_queue.tolist()] == slow and model.oldest == place


# ----------------------------------------------------------------------------------------------------- script
@pytest.mark.parametrize("lambd", [0.0, 0.3, 1.0])
def test_loss_of_a_run_is_the_weighted_sum(lambd, tmp_path, monkeypatch):
    losses = {"info_nce": [], "dense_info_nce": []}
    for name, values in losses.items():
        original = getattr(densecl, name)

        def record(*args, original=original, values=values):
            values.append(original(*args))
            return values[-1]

        monkeypatch.setattr(densecl, name, record)
    train("densecl", tmp_path, "--max-steps", 2, "--lambd", lambd, "--precision", "fp64")
    dense, plain = losses["dense_info_nce"], losses["info_nce"][1::2]  # every other one is a part of the dense loss
    expected = [((1 - lambd) * a + lambd * b).item() for a, b in zip(plain, dense, strict=True)]
    assert [r["loss"] for r in records(tmp_path).values()] == pytest.approx(expected, abs=1e-12)


def test_lambda_may_start_late(tmp_path):
    """Until then the dense head gets no gradient and keeps its weights, but for their decay."""
    words = ["--weight-decay", 0, "--warmup-epochs", 0, "--lr", 5, "--lambd-warmup", 2]
    before, during, after = (train("densecl", tmp_path / str(n), *words, "--max-steps", n)["model"] for n in (1, 2, 3))
    name, other = "projector.dense.0.weight", "projector.pooled.0.weight"
    assert torch.equal(before[name], during[name]) and not torch.equal(during[name], after[name])
    assert not torch.equal(before[other], during[other])


def test_matches_are_drawn_at_start_and_end(tmp_path):
    train("densecl", tmp_path, "--max-steps", 6, "--log-every", 4)
    train("densecl", tmp_path, "--max-steps", 7, "--log-every", 4)
    for name in ("start", "end"):
        width, height = Image.open(tmp_path / f"matches_{name}.png").size
        assert width == 2 * 224 + 3 * 32 and height > 4 * 224 + 5 * 32
    assert (tmp_path / "matches_start.png").read_bytes() != (tmp_path / "matches_end.png").read_bytes()


def test_lines_of_the_picture(tmp_path):
    """Black views: a green line from the upper left cell to itself, a red one, a grey one."""

    def drawn(match, true):
        view, black = densecl.augmentation(32)[0], torch.full((1, 3, 32, 32), -9.0)
        densecl.save_matches(tmp_path / "x.png", (black, black), *torch.tensor([[match], [true]]), view, size=64, gap=0)
        picture = np.asarray(Image.open(tmp_path / "x.png"))[20:84]  # below the headings, above the caption
        assert picture.shape == (64, 128, 3)
        return (np.argwhere((picture == colour).all(2)) for colour in ((0, 255, 0), (255, 0, 0), (128,) * 3))

    lime, red, gray = drawn([0, 2, 2, 3], [0, 1, -1, 3])
    assert (lime[:, 1].min(), lime[:, 1].max()) == (16, 48 + 64)  # cells 0 and 3 lie at 16 and 48, in both views
    assert red.min(0).tolist() == pytest.approx([24, 48], abs=3)  # from cell 1, a little lower than cell 0 ...
    assert red.max(0).tolist() == pytest.approx([40, 64 + 16], abs=3)  # ... to cell 2
    assert set(gray[:, 0]) <= {39, 40, 41} and len(gray)
    lime, red, gray = drawn([3, 2, 0, 0], [3, 1, -1, -1])  # the red line lies under the green one
    assert len(lime) and len(gray) and not len(red)


def test_recipe_is_the_published_one():
    args = parsed("densecl", "--data", "/imagenet")
    assert (args.lambd, args.lambd_warmup, args.temperature, args.key_momentum, args.dim) == (0.5, 0, 0.2, 0.999, 128)
    assert (args.lr, args.batch_size, args.weight_decay, args.momentum, args.epochs) == (0.03, 256, 1e-4, 0.9, 200)
    view, other = densecl.augmentation(224)
    assert view == other and (view.area, view.jitter, view.jitter_p) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8)
    assert (view.flip, view.gray_p, view.blur_p, view.blur_sigma) == (0.5, 0.2, 0.5, (0.1, 2.0))
    assert densecl.augmentation(32)[0].blur_p == 0


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lambd 1.5", "--lambd: must be at most 1"),
        ("--lambd -0.1", "--lambd: must be at least 0"),
        ("--lambd-warmup 0.5", "--lambd-warmup: expected a whole number"),
        ("--queue 8", "--queue 8 cannot hold the keys of a step: use at least --batch-size, 16"),
        ("--bn-splits 3", "--bn-splits 3: 16 images on 1 processes"),
        ("--temperature 0", "--temperature: must be greater than 0"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    flags = ["--data", "fake:64", "--batch-size", 16, "--out", tmp_path, *words.split()]
    assert message in refused(capsys, main, "densecl", *flags)


def test_small_data_gets_a_shorter_queue_that_holds_a_batch(tmp_path, capsys):
    words = ["--data", "fake:400", "--arch", "resnet18", "--width", 0.125, "--image-size", 16, "--batch-size", 64]
    main("densecl", *words, "--knn-every", 0, "--max-steps", 1, "--workers", 0, "--out", tmp_path)
    saved = state(tmp_path)["model"]
    assert saved["queue"].shape == saved["dense_queue"].shape == (64, 128)
    shown = capsys.readouterr().out
    assert f"loss ln(65) = {math.log(65):.2f}" in shown and "65,536 are more than 400 images" in shown
