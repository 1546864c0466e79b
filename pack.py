"""Packs folders of images into tar archives, which every script reads in any order: --data FOLDER_OF_THE_ARCHIVES.

One large file instead of a million small ones: copying is fast, network disks are not asked for each image, and the
index that is written beside each archive (train.tar.index.npz) lets a run start at once. Names and class folders stay.

    python pack.py /imagenet --out /fast/imagenet                   # train.tar and val.tar, the files as they are
    python pack.py /imagenet --out /fast/imagenet256 --resize 256   # shorter side at most 256 pixels
    python simsiam.py --data /fast/imagenet256

--resize makes decoding several times cheaper, but it is not the published input: small crops of a picture are then
enlarged from fewer pixels, and each picture is compressed twice. Files that cannot be decoded are named and left out.
"""

import collections
import concurrent.futures
import io
import sys
import tarfile
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from common.archive import archive_index
from common.data import EXTENSIONS, SPLITS, scan
from common.log import Parser, fail


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folder", help="folder with train/ and val/, or of images")
    parser.add_argument("--out", required=True, help="folder of the archives")
    parser.add_argument("--resize", type=int, default=0, help="most pixels of the shorter side (0: copy the files)")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, with --resize")
    parser.add_argument("--workers", type=int, default=8, help="threads")
    args = parser.parse_args(argv)
    if (args.resize and args.resize < 8) or args.resize < 0 or not 1 <= args.quality <= 100 or args.workers < 1:
        parser.error("--resize must be 0 or at least 8, --quality 1 to 100, --workers at least 1")
    return args


def encode(path, resize, quality):
    """(bytes, suffix or None to keep the file's own) of an image file. resize: see --resize; 0 copies."""
    data = path.read_bytes()
    if not resize:
        return data, None
    if path.suffix.lower() == ".npy":
        raise ValueError("an array, not a picture: pack without --resize")
    with Image.open(io.BytesIO(data)) as image:
        scale = resize / min(image.size)
        if scale >= 1 and image.format == "JPEG":
            image.load()  # a file that breaks off is found here, not in the middle of a run
            return data, None
        if image.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits per channel: pack without --resize")
        image = ImageOps.exif_transpose(image).convert("RGB")
        if scale < 1:
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
    return file.getvalue(), ".jpg"


def pack(folder, target, args):
    """Writes all images below folder into the archive target. Returns (images, files left out)."""
    names, _ = scan(folder)
    if not names:
        fail(f"no images in {folder}: expected files ending in {' '.join(EXTENSIONS)}")
    temporary, bad, seen = target.with_suffix(".tar.tmp"), 0, set()
    with (
        concurrent.futures.ThreadPoolExecutor(args.workers) as threads,
        tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive,
        tqdm(total=len(names), desc=target.name, unit="image", disable=not sys.stderr.isatty()) as bar,
    ):
        waiting, left = collections.deque(), iter(names)
        while True:
            while len(waiting) < 4 * args.workers and (name := next(left, None)) is not None:
                waiting.append((name, threads.submit(encode, Path(folder, name), args.resize, args.quality)))
            if not waiting:
                break
            name, job = waiting.popleft()
            bar.update()
            try:
                data, suffix = job.result()
            except Exception as error:  # decoders raise a dozen kinds
                bad += 1
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error).partition("\n")[0]
                tqdm.write(f"left out: {Path(folder, name)}: {reason}", file=sys.stderr)
                continue
            packed = name if suffix is None else str(Path(name).with_suffix(suffix))
            packed = packed if packed not in seen else f"{name}{suffix or ''}"  # a.png and a.bmp would both be a.jpg
            seen.add(packed)
            member = tarfile.TarInfo(packed)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    if bad == len(names):
        temporary.unlink()
        fail(f"none of the {bad} images in {folder} can be decoded")
    temporary.replace(target)
    archive_index(target, EXTENSIONS)
    return len(names) - bad, bad


def main(args):
    root, out = Path(args.folder), Path(args.out)
    if not root.is_dir():
        fail(f"{root} is not a folder")
    out.mkdir(parents=True, exist_ok=True)
    parts = {}
    for split, folders in SPLITS.items():
        found = next((root / f for f in folders if (root / f).is_dir()), None)
        if found:
            parts[split] = found
    for split, folder in (parts or {"train": root}).items():
        target = out / f"{split}.tar"
        images, bad = pack(folder, target, args)
        size = target.stat().st_size / 2**20
        print(f"{target}: {images:,} images, {size:,.1f} MB{f', {bad} left out' if bad else ''}", flush=True)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
