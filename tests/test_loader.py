"""The loader's promises: what a batch holds, whoever loads it, and what happens when something is wrong."""

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import loader as module
from common import process, rng
from common.augment import DRAWS, EvalView, View, WholeView, augment
from common.crop import crop_resize
from common.datasets import Arrays, Fake, Files, open_dataset
from common.loader import Loader, adapt_views, agree_on_undecodable, eval_batches, image_statistics
from tests.helpers import ROOT, deep_png, encode, photo, refused, write_images

VIEW = View(24, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.2)
SMALL = View(16, area=(0.05, 0.3), interpolation="bicubic", solarize_p=0.3)
NEUTRAL = {"mean": (0, 0, 0), "std": (1, 1, 1)}


@pytest.fixture
def threads(monkeypatch):
    """Loading threads in this process, so that a test sees what they do."""
    monkeypatch.setattr(process, "POSSIBLE", False)


@dataclasses.dataclass(frozen=True)
class Corner(View):
    """A view as a script may write it: the first pixels of an image."""

    batched = False

    def crop(self, image, u):
        return image[:, : self.size, : self.size]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """26 images of two classes, JPEG and PNG in turn."""
    names = [f"train/{'ab'[i % 2]}/{i:02}.{('jpg', 'png')[i % 3 == 0]}" for i in range(26)]
    return open_dataset(write_images(tmp_path_factory.mktemp("images"), names), "train")


def seen(loader, epoch=0, start=0, order=None):
    """All micro-batches of an epoch: lists of indices, labels, script's numbers, boxes, and per view the uint8 crops
    and the final floats."""
    found = []
    for b in loader.epoch(epoch, start, order):
        boxes = [b.boxes(v) for v in range(len(b.images))]
        found.append([b.indices, b.labels, b.uniforms(3), *boxes, *[x.clone() for x in b.images], *b.views()])
    return found


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
    )


def merged(parts):
    """Micro-batches one after the other."""
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def be(monkeypatch, rank, processes):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(processes))


def assert_crops(batch, epoch, images, seed=0):
    """The crops and labels of a batch are those of VIEW, made here from the images: (tensor, label), by index."""
    indices, labels, _, _, crops, _ = batch
    for i, label, crop, u in zip(indices.tolist(), labels, crops, draws(indices, epoch, seed), strict=True):
        image, expected = images[i]
        assert torch.equal(crop, crop_resize(image, VIEW.box(u, *image.shape[1:]), 24)) and label == expected


def draws(indices, epoch, seed=0, stream=0):
    return rng.uniforms(seed, epoch, indices.numpy(), stream, DRAWS)


# ------------------------------------------------------------------------------------------------- exactness
def test_workers_do_not_change_anything(images):
    runs = [seen(Loader(images, [VIEW, SMALL], 8, seed=1, workers=w), epoch=3) for w in (0, 1, 4)]
    assert len(runs[0]) == 3 and [x.shape[1:] for x in runs[0][0][5:7]] == [(3, 24, 24), (3, 16, 16)]
    assert equal(runs[0], runs[1]) and equal(runs[0], runs[2])


@pytest.mark.parametrize("processes, accum", [(2, 1), (4, 1), (1, 2), (2, 2), (1, 8), (2, 4)])
def test_processes_and_accumulation_share_the_same_batches(images, monkeypatch, processes, accum):
    """The micro-batches of all ranks, in the order of micro-step and rank, are the batch of a single process."""
    alone = seen(Loader(images, [VIEW, SMALL], 8, seed=1, workers=2), epoch=1)
    ranks = []
    for rank in range(processes):
        be(monkeypatch, rank, processes)
        loader = Loader(images, [VIEW, SMALL], 8, seed=1, workers=2, accum=accum)
        assert loader.epoch_steps == 3 and loader.local == 8 // processes // accum
        ranks.append(seen(loader, epoch=1))
        assert len(ranks[-1]) == 3 * accum
    order = [[(r, step * accum + micro) for micro in range(accum) for r in range(processes)] for step in range(3)]
    assert equal([merged([ranks[r][i] for r, i in step]) for step in order], alone)


@pytest.mark.parametrize("accum", [1, 2])
def test_epoch_can_start_in_the_middle(images, accum):
    loader = Loader(images, [VIEW], 8, seed=1, workers=2, accum=accum)
    whole = seen(loader, epoch=2)
    assert equal(seen(Loader(images, [VIEW], 8, seed=1, workers=2, accum=accum), 2, start=1), whole[accum:])
    assert seen(loader, epoch=2, start=3) == []


def test_epoch_visits_every_sample_at_most_once_and_in_a_new_order(images):
    orders = [rng.permutation(seed, epoch, 26) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(order) == list(range(26)) for order in orders) and len({tuple(order) for order in orders}) == 3
    visited, labels, *_ = merged(seen(Loader(images, [VIEW], 8, seed=1, workers=0)))
    assert visited.tolist() == orders[0][:24].tolist()  # two are left over: no whole batch
    assert labels.tolist() == images.labels[visited].tolist()


def test_samples_follow_seed_epoch_index_and_view_and_nothing_else(images):
    def samples(seed, epoch, order):
        """{sample: the script's numbers, crops in both views}"""
        batches = seen(Loader(images, [VIEW, VIEW], 4, seed=seed, workers=0), epoch, order=order)
        return {int(b[0][row]): [b[k][row] for k in (2, 5, 6)] for b in batches for row in range(4)}

    first = samples(0, 0, [3, 1, 4, 15])
    moved = samples(0, 0, [9, 2, 6, 5, 15, 3, 4, 1])  # other positions, other neighbours
    for i, (u, x, y) in first.items():
        assert equal([first[i]], [moved[i]]) and not torch.equal(x, y)  # the recipe is drawn anew for the second view
        assert u.dtype == torch.float64 and u.tolist() == rng.uniforms(0, 0, [i], rng.SCRIPT, 3)[0].tolist()
        for other in (samples(1, 0, [3, 1, 4, 15]), samples(0, 1, [3, 1, 4, 15])):
            assert not torch.equal(u, other[i][0]) and not torch.equal(x, other[i][1])


def test_sample_that_comes_up_twice_is_drawn_anew(images):
    loader = Loader(images, [VIEW], 4, seed=0, workers=2)
    order = [5, 7, 5, 5, 7, 5, 0, 1]
    a, b = seen(loader, order=order)
    both = merged([a, b])
    assert both[0].tolist() == order
    for drawn in (both[2][[0, 2, 3, 5]], both[4][[0, 2, 3, 5]]):  # the script's numbers, crops
        assert all(not torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))
    plain = seen(loader, order=[5, 1, 2, 3])[0]
    assert torch.equal(plain[4][0], both[4][0])  # the first time is as if it came up once
    assert equal(seen(loader, order=order, start=1), [b])


def test_batch_is_the_plan_applied_to_the_crops(images):
    """One batch put together by hand from the functions of common/augment.py."""
    batch = seen(Loader(images, [VIEW], 8, seed=4, workers=2), epoch=6)[1]
    assert_crops(batch, 6, images, seed=4)
    plan = [(n, torch.from_numpy(r), torch.from_numpy(a)) for n, r, a in VIEW.plan(draws(batch[0], 6, seed=4))]
    assert torch.equal(batch[5], augment(batch[4], plan, VIEW.mean, VIEW.std))


# ------------------------------------------------------------------------------------------ views of all kinds
def test_views_of_all_kinds_give_together_what_each_gives_alone(images, monkeypatch, threads):
    views = [VIEW, EvalView(20), WholeView(12, interpolation="bicubic"), Corner(10)]
    read = []
    monkeypatch.setattr(images, "read", lambda i: read.append(i) or Files.read(images, i))
    together = seen(Loader(images, views, 8, seed=1, workers=2), epoch=1)
    assert len(read) == 24  # each image was decoded once
    for v, view in enumerate(views):
        alone = seen(Loader(images, [view], 8, seed=1, workers=0, streams=[v]), epoch=1)
        assert equal([[b[k] for k in (0, 1, 2, 3 + v, 7 + v, 11 + v)] for b in together], alone)
    indices, crops = together[0][0].tolist(), together[0][7:11]
    for row, i in enumerate(indices):
        image = images[i][0]
        assert torch.equal(crops[2][row], crop_resize(image, (0, 0, *image.shape[1:]), 12, "bicubic"))
        assert torch.equal(crops[3][row], image[:, :10, :10])


def test_views_of_one_stream_see_the_same_part(images):
    same, other = VIEW, dataclasses.replace(VIEW, size=12, flip=0)
    for batch in seen(Loader(images, [same, other], 8, workers=0, streams=[0, 0])):
        assert torch.equal(batch[3][:, :6], batch[4][:, :6]) and batch[3][:, 6].any() and not batch[4][:, 6].any()


@pytest.mark.parametrize("kept", [False, True])
def test_boxes_tell_where_views_were_taken(images, monkeypatch, kept):
    """Cropped there and mirrored where they say so, the images give the views."""
    if kept:  # a set that lies on the device
        images = Arrays(np.stack([photo(30, 40, i) for i in range(26)]), np.zeros(26), None)
        monkeypatch.setattr(module, "resident", lambda dataset, device: torch.from_numpy(dataset.images))
    views = [View(24, **NEUTRAL), View(16, (0.05, 0.3), interpolation="bicubic", **NEUTRAL), WholeView(9, **NEUTRAL)]
    flipped = []
    for batch in Loader(images, views, 8, seed=1, workers=2).epoch(1):
        numbers = rng.uniforms(1, 1, batch.indices.numpy(), rng.DROPOUT, 5)  # of another stream than seen() asks for
        assert np.array_equal(batch.uniforms(5, rng.DROPOUT).numpy(), numbers)
        for v, (view, final) in enumerate(zip(views, batch.views(), strict=True)):
            boxes = batch.boxes(v)
            assert boxes.shape == (8, 7) and boxes.dtype == torch.float64
            for i, x, (*box, height, width, mirrored) in zip(batch.indices, final, boxes.int().tolist(), strict=True):
                image = images[int(i)][0]
                assert (height, width) == image.shape[1:]
                crop = crop_resize(image, box, view.size, view.interpolation)
                torch.testing.assert_close((crop.flip(2) if mirrored else crop) / 255, x, atol=1e-6, rtol=0)
                flipped += [mirrored] * (v < 2)
    assert 0 < sum(flipped) < len(flipped)


class Counting:
    """Remembers which samples have been asked for; waits at `gate` from the `free`-th on."""

    def __init__(self, n, gate=None, free=0):
        self.n, self.asked, self.gate, self.free = n, [], gate, free

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.asked.append(i)
        if self.gate and len(self.asked) > self.free:
            self.gate.wait(60)
        return torch.full((3, 8, 8), i % 256, dtype=torch.uint8), i


# ----------------------------------------------------------------------------------------- bounded, and clean
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_three_batches_exist_however_large_the_set(threads, workers):
    dataset, addresses = Counting(4000), set()
    loader = Loader(dataset, [View(8)], 50, workers=workers)
    for step, batch in enumerate(loader.epoch(0), 1):
        addresses.add(batch.images[0].data_ptr())
        assert len(dataset.asked) <= 50 * (step + (module.AHEAD if workers else 0))
    assert step == 80 and len(dataset.asked) == 4000
    assert len(addresses) == len(loader.pool.slots) == module.AHEAD + 1
    assert all(slot.images[0].numel() == 50 * 8 * 8 * 3 for slot in loader.pool.slots)


def test_leaving_an_epoch_early_stops_the_threads(threads):
    gate = threading.Event()
    dataset = Counting(1000, gate, free=100)
    batches = Loader(dataset, [View(8)], 100, workers=1).epoch(0)
    next(batches)
    threading.Timer(0.5, gate.set).start()
    batches.close()  # waits for the piece in hand
    assert len(dataset.asked) <= 100 + 8  # not the 200 that were ahead


# ------------------------------------------------------------------------------------------ a process of its own
def loading_processes():
    """Processes that this one has started and that still run."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(p) for p in found if Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[0] != "Z"]


def test_a_process_gives_the_batches_of_threads(images, monkeypatch, capsys):
    gc.collect()  # ends those of earlier tests
    views, before = [VIEW, EvalView(20)], loading_processes()
    one = Loader(images, views, 8, seed=1, workers=2)
    assert isinstance(one.pool.filler, process.Process) and len(loading_processes()) == len(before) + 1
    other = Loader(images, views, 8, seed=1, workers=2)  # a later process holds the pipes of the first one, too
    batches = one.epoch(0)
    next(batches)
    batches.close()  # what was asked for ahead is forgotten
    found = seen(one, epoch=1)
    assert equal(seen(other, epoch=1), found)
    capsys.readouterr()
    monkeypatch.setattr(process, "POSSIBLE", False)
    assert equal(seen(Loader(images, views, 8, seed=1, workers=2), epoch=1), found)
    assert "this platform starts no loading process" in capsys.readouterr().out
    del one, other, batches
    gc.collect()
    assert set(loading_processes()) <= set(before)


class Odd(Exception):
    def __init__(self, a, b):  # which pickle cannot make again
        super().__init__(f"{a} and {b}")


def test_an_error_that_cannot_be_pickled_is_told_in_words():
    class Broken(Counting):
        def __getitem__(self, i):
            raise Odd("this", "that")

    with pytest.raises(RuntimeError, match="this and that"):
        list(Loader(Broken(64), [View(8)], 16, workers=2).epoch(0))


def test_death_of_the_loading_process_is_one_line(images, capsys):
    loader = Loader(images, [VIEW], 8, workers=1)
    batches = loader.epoch(0)
    next(batches)
    os.kill(max(loading_processes()), signal.SIGKILL)
    with pytest.raises(SystemExit) as stop:
        list(batches)
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.count("\n") == 1
    assert "the loading process was ended by SIGKILL" in message and "The same command continues" in message


def test_nothing_is_left_when_the_training_process_is_killed(tmp_path):
    script = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from common.augment import View
from common.datasets import Fake
from common.loader import Loader
batches = Loader(Fake(1000, 0), [View(64)], 100, workers=2).epoch(0)
next(batches)
print(open(f"/proc/self/task/{{os.getpid()}}/children").read(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    shared = set(os.listdir("/dev/shm"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL
    child, deadline = Path(f"/proc/{int(done.stdout)}"), time.monotonic() + 60
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists()
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if "torch" in name}


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_dataset_reaches_the_caller(workers):
    class Broken(Counting):
        def __getitem__(self, i):
            if i == 13:
                raise KeyError("thirteen")
            return super().__getitem__(i)

    with pytest.raises(KeyError, match="thirteen"):
        list(Loader(Broken(64), [View(8)], 16, workers=workers).epoch(0))


def test_loading_threads_leave_the_number_of_threads_alone():
    """In a thread of its own, which like a script's main thread may not have computed anything before."""
    found = []

    def script():
        torch.set_num_threads(2)
        list(Loader(Counting(64), [View(8)], 16, workers=2).epoch(0))
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=script)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    assert found == [2]


def test_users_own_dataset_of_pil_images():
    class Photos:
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return Image.fromarray(photo(40, 56, i)).convert(["RGB", "L", "RGBA", "P"][i % 4]), np.int64(i)

    photos = [Photos()[i] for i in range(12)]
    expected = [(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), y) for image, y in photos]
    for batch in seen(Loader(Photos(), [VIEW], 4, workers=2)):
        assert_crops(batch, 0, expected)


def test_batch_larger_than_the_data_set(images, capsys):
    message = refused(capsys, Loader, images, [VIEW], 27)
    assert "--batch-size 27" in message and "26" in message
    assert Loader(images, [VIEW], 26).epoch_steps == 1


# ------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_evaluation_covers_every_sample_once(monkeypatch, n, processes):
    order, sizes = [], []
    for rank in range(processes):
        be(monkeypatch, rank, processes)
        for x, labels, indices in eval_batches(Counting(n), EvalView(8, **NEUTRAL), 4, "cpu", 2):
            assert x.shape == (len(indices), 3, 8, 8) and len(indices) <= 4
            assert torch.equal(labels, indices) and torch.equal((x[:, 0, 0, 0] * 255).round().long(), indices)
            order += indices.tolist()
            sizes.append(len(indices))
    assert order == list(range(n))
    assert processes > 1 or sizes == {1: [1], 3: [3], 10: [4, 4, 2]}[n]


def test_evaluation_pixels(images):
    view = EvalView(24, resize=28, mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.125))
    several, alone = (list(eval_batches(images, view, 7, "cpu", workers)) for workers in (3, 0))
    assert equal(several, alone) and sum(len(batch[2]) for batch in alone) == 26
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (view.mean, view.std))
    for x, labels, indices in several:
        for row, i in enumerate(indices.tolist()):
            image, label = images[i]
            torch.testing.assert_close(x[row], (view.crop(image) / 255 - mean) / std, atol=1e-5, rtol=1e-5)
            assert labels[row] == label
    assert next(eval_batches(images, view, 7, "cpu", 0, torch.float64))[0].dtype == torch.float64


# ------------------------------------------------------------------------------------------------- broken files
def spoil(folder, *names):
    """Makes the named files unreadable, each in another way."""
    whole = encode(photo(40, 56, 99))
    ways = [b"", whole[: len(whole) // 2], b"no image at all", whole[:3], whole[:200] + bytes(100)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(ways[i % len(ways)])


@pytest.mark.parametrize("workers", [0, 4])
def test_broken_file_is_replaced_by_its_neighbour_and_reported_once(tmp_path, capsys, workers):
    names, broken = [f"train/{'ab'[i // 6]}/{i:02}.jpg" for i in range(12)], [0, 4, 5, 8, 11]
    spoil(write_images(tmp_path, names), *[names[i] for i in broken])
    dataset = open_dataset(tmp_path, "train")
    loader = Loader(dataset, [VIEW], 6, workers=workers, max_bad=5)
    used = {0: 1, 4: 6, 5: 6, 8: 9, 11: 1}  # 11 goes on at 0, which is broken too
    found = {i: dataset[used.get(i, i)] for i in range(12)}
    for epoch in range(3):
        for batch in seen(loader, epoch):
            assert_crops(batch, epoch, found)
            assert batch[3][:, 4:6].tolist() == [list(found[i][0].shape[1:]) for i in batch[0].tolist()]
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 5
    assert all(sum(str(tmp_path / names[i]) in line for line in err.splitlines()) == 1 for i in broken)


@pytest.mark.parametrize("workers", [0, 4])
def test_too_many_broken_files_stop_the_run(tmp_path, capsys, workers):
    names = [f"{i:03}.jpg" for i in range(64)]
    spoil(write_images(tmp_path, names), *names[::2])
    loader = Loader(open_dataset(tmp_path, "train"), [VIEW], 16, workers=workers, max_bad=3)
    with pytest.raises(SystemExit) as stop:
        seen(loader)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert stop.value.code == 2 and out == "" and len(lines) == 4
    assert all(line.startswith("warning: ") for line in lines[:3]) and lines[3].startswith("error: ")
    assert "--max-bad 3" in lines[3] and str(tmp_path) in lines[3]


def test_nothing_but_broken_files(tmp_path, capsys):
    names = [f"{i}.png" for i in range(4)]
    spoil(write_images(tmp_path, names), *names)
    dataset = open_dataset(tmp_path, "train")
    with pytest.raises(SystemExit) as stop:
        list(eval_batches(dataset, EvalView(16), 4, "cpu", 2, replace=True))
    assert stop.value.code == 2 and "no image can be decoded" in capsys.readouterr().err.splitlines()[-1]
    assert list(eval_batches(dataset, EvalView(16), 4, "cpu", 2)) == []
    assert "none of the 4 images can be decoded" in refused(capsys, agree_on_undecodable, dataset, "cpu")


# ------------------------------------------------------------------------------ other channels and bits, statistics
def test_the_loader_keeps_16_bits(tmp_path):
    """A ramp within one of 256 levels: at 8 bits it would be flat."""
    for i in range(4):
        ramp = (25700 + np.arange(40 * 40).reshape(40, 40) % 200).astype(np.uint16)
        (tmp_path / f"{i}.png").write_bytes(deep_png(ramp))
    images = open_dataset(tmp_path, "train")
    (batch,) = Loader(images, [View(16, area=(0.5, 1), flip=0, **NEUTRAL)], 4, workers=2).epoch(0)
    (x,) = batch.views()
    assert batch.images[0].dtype == torch.float32
    assert 100 / 255 <= x.min() and x.max() <= 101 / 255 and x.std() > 0.1 / 255
    whole = next(eval_batches(images, EvalView(40, **NEUTRAL), 4, "cpu", 0))[0]
    np.testing.assert_allclose(whole[0, 0, 0, :3], np.array([25700, 25701, 25702]) / 65535, rtol=1e-6)


def test_statistics_are_those_of_the_pixels(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (6, 20, 20, 2)).astype(np.uint16)
    values[..., 1] //= 50
    for i, image in enumerate(values):
        np.save(tmp_path / f"{i}.npy", image)
    mean, std = image_statistics(open_dataset(tmp_path, "train", channels=2), 20, workers=2)
    np.testing.assert_allclose(mean, (values / 65535).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, (values / 65535).std((0, 1, 2)), rtol=1e-4)
    flat = Arrays(np.zeros((2, 8, 8, 3), np.uint8), [0, 0])
    assert image_statistics(flat, 8) == ((0.0, 0.0, 0.0), (1 / 255,) * 3)  # stay finite


def test_colours_are_left_alone_where_there_are_none(capsys):
    view = View(16, jitter=(0.4, 0.3, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, lighting=0.1, solarize_p=0.1)
    for channels in (1, 5):
        dataset = Fake(8, 0, 16, channels)
        adapted, *others = adapt_views([view, EvalView(16), WholeView(16)], dataset)
        off = "saturation, hue, greyscale and lighting are switched off"
        assert f"{channels} channels: {off}" in capsys.readouterr().out
        plain = {"jitter": (0.4, 0.3, 0, 0), "gray_p": 0, "lighting": 0}
        assert adapted == dataclasses.replace(view, **plain, mean=adapted.mean, std=adapted.std)
        assert all((other.mean, other.std) == (adapted.mean, adapted.std) for other in others)
        assert len(adapted.mean) == len(adapted.std) == channels
        (batch,) = Loader(dataset, [adapted, *others], 8, workers=0).epoch(0)
        assert all(x.shape == (8, channels, 16, 16) for x in batch.views())
    dataset = Fake(8, 0, 16, 3)
    assert adapt_views([view], dataset) == [view] and not capsys.readouterr().out
    (adapted,) = adapt_views([view], dataset, "auto")
    assert adapted == dataclasses.replace(view, mean=adapted.mean, std=adapted.std) != view
    assert "statistics  mean" in capsys.readouterr().out
    assert "--stats imagenet is for 3 channels" in refused(capsys, adapt_views, [view], Fake(8, 0, 16, 5), "imagenet")


# --------------------------------------------------------------------------- small sets, cut where they are kept
def test_what_is_kept_on_the_device(monkeypatch):
    """Random views cut there have the bits of those that threads cut; a view that cannot keeps the set where it is."""
    monkeypatch.setattr(module, "resident", lambda dataset, device: torch.from_numpy(dataset.images))
    images = Arrays(np.stack([photo(30, 40, i) for i in range(26)]), np.arange(26) % 3, list("abc"))
    views = [VIEW, SMALL, EvalView(20), WholeView(12, interpolation="bicubic")]
    kept = Loader(images, views, 8, seed=1)
    threads = Loader(images, [*views, Corner(10)], 8, seed=1, workers=2)
    assert kept.pool.resident is not None and threads.pool.resident is None
    for a, b in zip(seen(kept, 1), seen(threads, 1), strict=True):
        assert equal([a], [[*b[:7], *b[8:12], *b[13:17]]])
