"""What the data costs: python tests/bench_data.py [--pictures 200 --side 512 --size 64 --pairs 7
                                                 --many 1000000 --old CHECKOUT --folder FOLDER]

Decoding, on one core: positions of the stream (index, reading, captions, decoding) in pairs with Pillow, that
makes the same squares, to the bit, of bytes in memory; with nothing but its decoder, at the same scale; and
with webdataset on the same shards, where it is installed. Indexes: a tenth of `--many` pictures of 8x8 pixels
with their .txt and .json in shards of 10,000, then all: the first start, the second, memory and looking up,
each in a process of its own; with --old, of another checkout in turn. Processor seconds hold on a machine
that is shared, those of the clock on a quiet one, where all takes about three minutes. Prints Markdown.
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
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import data

def memory():
    found = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(found[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")]

bare = memory()
began, worked = time.perf_counter(), time.process_time()
pictures = data.Pictures(data.DataConfig(data=[sys.argv[2]]), 64, 0)
children = resource.getrusage(resource.RUSAGE_CHILDREN)
spent = time.process_time() - worked + children.ru_utime + children.ru_stime
wall = time.perf_counter() - began
worked = time.process_time()
for position in range(2000):
    pictures.sources[0].key(int(pictures.rows[0][data.permute(position, len(pictures), b"bench")]))
look_up = (time.process_time() - worked) / 2000
print(json.dumps({"wall": wall, "spent": spent, "look up": 1e6 * look_up, "bare": bare, "memory": memory()}))
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


def opened(content: bytes, size: int) -> Image.Image:
    """A picture, to be decoded at the scale that decode takes."""
    image = Image.open(io.BytesIO(content))
    image.draft(None, (2 * size, 2 * size))
    return image


def square(image: Image.Image, size: int, **how) -> np.ndarray:
    """What any trainer needs: cut in the middle, resized."""
    side = min(image.size)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    small = image.crop((left, top, left + side, top + side))
    small = small.resize((size, size), Image.Resampling.BICUBIC, **how)
    return np.asarray(small)


def row(*cells) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def decoding(args, folder: Path) -> None:
    shard(folder / "photographs.tar", 0, args.pictures, lambda i: photograph(i, args.side))
    pictures = data.Pictures(data.DataConfig(data=[str(folder)], held_out=0), args.size, 0, "val")
    with tarfile.open(folder / "photographs.tar") as tar:
        contents = [tar.extractfile(member).read() for member in tar if member.name.endswith("jpg")]
    for position, content in enumerate(contents):
        expected = square(opened(content, args.size), args.size, reducing_gap=1.0)
        if not np.array_equal(pictures[position]["picture"], expected.transpose(2, 0, 1)):
            raise ValueError(f"picture {position} is not what Pillow makes of it")

    def stream():
        for position in range(len(pictures)):
            pictures[position]

    def same():
        for content in contents:
            square(opened(content, args.size), args.size, reducing_gap=1.0)

    def decoder():
        for content in contents:
            opened(content, args.size).load()

    def webdataset():
        import webdataset
        source = webdataset.WebDataset(str(folder / "photographs.tar"), shardshuffle=False, empty_check=False)
        for image, _ in source.shuffle(100).decode("pil").to_tuple("jpg", "txt"):
            square(image, args.size)

    def seconds(run) -> float:
        began = time.process_time()
        run()
        return time.process_time() - began

    row(f"decoding {args.side} -> {args.size}, one core", "pictures/s", "limn", "times as fast", "from", "to")
    row(*["---"] * 6)
    others = {"Pillow, same squares": same, "Pillow, decoder alone": decoder, "webdataset": webdataset}
    for name, other in others.items():
        try:
            other()
        except ImportError:
            row(name, "not installed", *[""] * 4)
            continue
        pairs = [(seconds(other), seconds(stream)) for _ in range(args.pairs)]
        ratios = [theirs / ours for theirs, ours in pairs]
        best = [f"{args.pictures / min(times):.0f}" for times in zip(*pairs)]
        row(name, *best, *(f"{ratio:.2f}" for ratio in (statistics.median(ratios), min(ratios), max(ratios))))
    print()


def start(root: Path, many: Path, cache: Path) -> dict:
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", START, str(root), str(many)], env=env, check=True,
                          stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def indexing(args, folder: Path) -> None:
    tiny = encoded(np.full((8, 8, 3), 99, np.uint8))
    shard(folder / "shard.tar", 0, 10_000, lambda i: tiny)
    for count in (args.many // 10, args.many):
        (folder / str(count)).mkdir()
        for first in range(0, count, 10_000):               # one file by many names
            os.link(folder / "shard.tar", folder / str(count) / f"{first // 10_000:05}.tar")

    row("start", "pictures", "s", "s of processors", "looking up us", "MB in memory", "its own", "bare: MB",
        "its own")
    row(*["---"] * 9)
    starts = [("limn", ROOT, args.many // 10), ("limn", ROOT, args.many)]
    if args.old:
        starts.insert(1, ("old", Path(args.old), args.many // 10))
        starts = 2 * starts[:2] + starts
    for turn, (name, root, count) in enumerate(starts):
        for which in ("first", "second"):
            found = start(root, folder / str(count), folder / f"cache-{turn}")
            sizes = found["memory"] + found["bare"]
            row(f"{name}, {which}", f"{count:,}", f"{found['wall']:.2f}", f"{found['spent']:.2f}",
                f"{found['look up']:.0f}", *map(round, sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"--pictures": 200, "--side": 512, "--size": 64, "--pairs": 7, "--many": 1_000_000}
    for flag, default in numbers.items():
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--old", help="another checkout, to be compared with")
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
