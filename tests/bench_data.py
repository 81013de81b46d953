"""What the data costs on one core: python tests/bench_data.py

    [--pictures 400 --side 512 --size 64 --pairs 7 --many 100000 --folder FOLDER]

Decoding: positions of the stream (index, reading, captions, decoding) in pairs with the least that Pillow
takes to make the same squares of bytes in memory, and with webdataset where it is installed. Indexes: a
tenth of `--many` pictures of 8x8 pixels with their .txt and .json in shards of 10,000, then all: the first
start, the second, memory and looking up, each in a process of its own. Processor seconds hold on a machine
that is shared.
"""
import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data

ROOT = Path(data.__file__).parent
START = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import data
began, worked = time.perf_counter(), time.process_time()
pictures = data.Pictures(data.DataConfig(data=[sys.argv[2]]), 64, 0)
children = resource.getrusage(resource.RUSAGE_CHILDREN)
spent = time.process_time() - worked + children.ru_utime + children.ru_stime
wall = time.perf_counter() - began
worked = time.process_time()
for position in range(2000):
    pictures.sources[0].key(int(pictures.rows[0][data.permute(position, len(pictures), b"bench")]))
look_up = (time.process_time() - worked) / 2000
anonymous = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
print(len(pictures), wall, spent, 1e6 * look_up, anonymous / 1024,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def photograph(i: int, side: int) -> bytes:
    """Something that compresses as a photograph does."""
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(0, 255, (side // 16, side // 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC)).astype(int)
    return encoded((smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))


def put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def shard(path: Path, first: int, count: int, picture) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            meta = {"url": f"https://example.org/{i}", "caption": f"picture {i}", "key": f"{i:09}",
                    "width": 8, "height": 8, "sha256": f"{i:064}", "AESTHETIC_SCORE": i % 97 / 10}
            put(tar, f"{i:09}.jpg", picture(i))
            put(tar, f"{i:09}.txt", meta["caption"].encode())
            put(tar, f"{i:09}.json", json.dumps(meta).encode())


def bare(content: bytes, size: int) -> np.ndarray:
    """The least that Pillow takes to make the square: drafted, cut in the middle, resized."""
    image = Image.open(io.BytesIO(content))
    scale = 2 * size / min(image.size)
    image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=1.0))


def decoding(args, folder: Path) -> None:
    shard(folder / "photographs.tar", 0, args.pictures, lambda i: photograph(i, args.side))
    pictures = data.Pictures(data.DataConfig(data=[str(folder)], held_out=0), args.size, 0)
    with tarfile.open(folder / "photographs.tar") as tar:
        contents = [tar.extractfile(member).read() for member in tar if member.name.endswith("jpg")]

    def stream():
        for position in range(len(pictures)):
            pictures[position]

    def pillow():
        for content in contents:
            bare(content, args.size)

    def webdataset():
        import webdataset
        source = webdataset.WebDataset(str(folder / "photographs.tar"), shardshuffle=False, empty_check=False)
        for image, _ in source.shuffle(100).decode("pil").to_tuple("jpg", "txt"):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side))
            np.asarray(square.resize((args.size, args.size), Image.Resampling.BICUBIC))

    def seconds(run) -> float:
        began = time.process_time()
        run()
        return time.process_time() - began

    for name, other in (("Pillow alone", pillow), ("webdataset", webdataset)):
        try:
            ratios = [seconds(other) / seconds(stream) for _ in range(args.pairs)]
        except ImportError:
            print(f"{name}: not installed")
            continue
        speed = args.pictures / seconds(stream)
        print(f"decoding {args.side} -> {args.size}: {speed:.0f} pictures/s and core, "
              f"{statistics.median(ratios):.2f} of {name} ({min(ratios):.2f} to {max(ratios):.2f})")


def indexing(args, folder: Path) -> None:
    tiny = encoded(np.full((8, 8, 3), 99, np.uint8))
    for count in (args.many // 10, args.many):
        many = folder / str(count)
        many.mkdir()
        for first in range(0, count, 10_000):
            shard(many / f"{first // 10_000:05}.tar", first, min(10_000, count - first), lambda i: tiny)
        env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        for start in ("first", "second"):
            done = subprocess.run([sys.executable, "-c", START, str(ROOT), str(many)], env=env, check=True,
                                  capture_output=True, text=True)
            pictures, wall, spent, look_up, anonymous, most = map(float, done.stdout.split())
            print(f"{start:6} start, {pictures:9,.0f} pictures: {wall:6.2f} s, {spent:6.2f} s of processors, "
                  f"looking up {look_up:.1f} us, {anonymous:.0f} MB its own, {most:.0f} MB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in (("pictures", 400), ("side", 512), ("size", 64), ("pairs", 7), ("many", 100_000)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--folder", help="of what is made, and removed")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=args.folder))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        (folder / "photographs").mkdir()
        decoding(args, folder / "photographs")
        if args.many:
            indexing(args, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
