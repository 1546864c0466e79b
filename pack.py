"""Packs folders of images into tar archives, which every script reads in any order: --data FOLDER_OF_THE_ARCHIVES.

One large file instead of a million small ones: it is copied fast, a network disk opens one file instead of one per
image, and the index written beside each archive (train.tar.index.npz) lets a run start at once. Names and class folders
stay.

    python pack.py /imagenet --out /fast/imagenet                   # train.tar and val.tar, the files as they are
    python pack.py /imagenet --out /fast/imagenet256 --resize 256   # shorter side at most 256 pixels
    python simsiam.py --data /fast/imagenet256

--resize makes decoding several times cheaper, but it is not the published input: small crops of a picture are then
enlarged from fewer pixels, and each picture is compressed twice. White is put behind what is transparent. Files that
cannot be decoded are named and left out.
"""

import collections
import common.interrupt  # noqa: F401 (before torch)
import concurrent.futures
import io
import sys
import tarfile
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from common.args import Parser, at_least, fail, positive
from common.files import atomic, make_folder
from common.folders import describe, find_splits, note, scan_images
from common.images import EXTENSIONS, decode, is_deep
from common.log import bar
from common.tars import index_of


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folder", help="folder with train/ and val/, or of images")
    parser.add_argument("--out", required=True, help="folder of the archives")
    text = "most pixels of the shorter side, at least 8 (0: copy the files)"
    parser.add_argument("--resize", type=at_least(0), default=0, help=text)
    parser.add_argument("--quality", type=positive(int, 100), default=90, help="of JPEG, with --resize, up to 100")
    parser.add_argument("--workers", type=positive(int, 1000), default=8, help="threads")
    parser.add_max_pixels(parser.add_argument)
    args = parser.parse_args(argv)
    if 0 < args.resize < 8:
        parser.error(f"--resize {args.resize} must be 0 or at least 8")
    return args


def encode(path, resize, quality):
    """(bytes, suffix or None to keep the file's own) of an image file. resize: see --resize; 0 copies."""
    data = path.read_bytes()
    if not resize:
        return data, None
    if path.suffix.lower() == ".npy":
        raise ValueError("an array, not a picture: pack without --resize")
    image = decode(data)  # a file that breaks off is found here, not in the middle of a run
    scale = resize / min(image.shape[1:])
    if scale >= 1 and data.startswith(b"\xff\xd8\xff"):
        return data, None
    if is_deep(data):
        raise ValueError("more than 8 bits per channel: pack without --resize")
    if getattr(image, "several", False):
        note("of files with several pictures the first is packed")
    image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if scale < 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue(), ".jpg"


def pack(folder, target, args):
    """Writes all images below folder into the archive target. Returns (images, files left out)."""
    names, folders, left = scan_images(folder)
    if not names:
        fail(f"no images in {folder}: expected files ending in {' '.join(EXTENSIONS)}")
    describe(folder, folders, left, divided=True)
    bad, seen = 0, {*names}
    with (
        atomic(target) as temporary,
        concurrent.futures.ThreadPoolExecutor(args.workers) as threads,
        tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive,
        bar(name=target.name, total=len(names), unit="image") as progress,
    ):
        waiting, left = collections.deque(), iter(names)
        while True:
            while len(waiting) < 4 * args.workers and (name := next(left, None)) is not None:
                waiting.append((name, threads.submit(encode, Path(folder, name), args.resize, args.quality)))
            if not waiting:
                break
            name, job = waiting.popleft()
            progress.update()
            try:
                data, suffix = job.result()
            except Exception as error:  # decoders raise a dozen kinds
                bad += 1
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error).partition("\n")[0]
                tqdm.write(f"left out: {Path(folder, name)}: {reason}", file=sys.stderr)
                continue
            packed = name if suffix is None else str(Path(name).with_suffix(suffix))
            if packed != name and packed in seen:  # a.png and a.bmp would both be a.jpg, which may be there, too
                packed = f"{name}{suffix}"
            seen.add(packed)
            member = tarfile.TarInfo(packed)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if bad == len(names):
            fail(f"none of the {bad} images in {folder} can be decoded")
    index_of([target], EXTENSIONS)
    return len(names) - bad, bad


def main(args):
    root, out = Path(args.folder), Path(args.out)
    if not root.is_dir():
        fail(f"{root} is not a folder")
    make_folder(out)
    for split, folder in (find_splits(root) or {"train": root}).items():
        target = out / f"{split}.tar"
        images, bad = pack(folder, target, args)
        size = target.stat().st_size / 2**20
        print(f"{target}: {images:,} images, {size:,.1f} MB{f', {bad} left out' if bad else ''}", flush=True)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
