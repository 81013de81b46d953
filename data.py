"""Pictures in and out: folders, tar shards, remote ones, built-in ones; captions, caches, the loader; sheets.

Every random choice is a pure function of (seed, purpose, position), so the stream has no state:
position p shows the same picture, crop and caption for any number of ranks and workers, and to
resume is to start at p. Letters: H W pixels, B pictures in a batch, N pictures in a source.
Pictures are uint8 (3, H, W), RGB. `python data.py --check PATH ...` tells what is wrong with one's own."""
import argparse
import atexit
import gc
import glob
import io
import json
import math
import multiprocessing
import os
import posixpath
import re
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import urllib.request
import warnings
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, lru_cache, partial
from hashlib import blake2b
from itertools import accumulate, chain
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import (
    Image,
    ImageCms,
    ImageColor,
    ImageDraw,
    ImageFilter,
    ImageFont,
    ImageOps,
    PngImagePlugin,
)
from torch import Tensor
from tqdm import tqdm

# Suffixes of files that hold a picture, and what they may be by content: no other parser is used.
SUFFIXES = "jpg jpeg png webp gif bmp jpe jfif jpg_large apng tif tiff avif"
FORMATS = "JPEG PNG WEBP GIF BMP TIFF AVIF"
MAX_PIXELS = 64 * 2**20                   # a larger picture is refused before decoding
MAX_TRIES = 20                            # unreadable pictures in a row
MAX_TEXT = 2**20                          # of a longer text or .json the start is read [bytes]
MAX_CAPTION = 2**16                       # is cut; more than encoders read, 16 for each token [characters]
MAX_FIELDS = 256                          # of the metadata of a shard that are indexed
MAX_FILES = 10**6                         # that a pattern with braces may name
MODES = {"colour": "RGB", "grey": "L"}    # a channel a letter
RECODED = "not UTF-8"                     # a field of meta: the encoding of its texts was guessed
# How helpers are started: a forked one has what is loaded already.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass
class DataConfig:
    data: list[str] = field(default_factory=list)  # built-in, or paths, patterns, URLs: PATH or PATH:WEIGHT
    caption_key: str = ""  # field of the metadata that holds the captions, "" = the usual ones
    class_names: str = ""  # file of captions, one a line, for pictures with the number of a class, NAME.cls
    filter: list[str] = field(default_factory=list)  # filters of the metadata: "aesthetic>5" "license==cc0"
    missing: Literal["drop", "keep"] = "drop"  # pictures without a field that --filter names
    limit: int = 0  # use only the first so many pictures of each source, 0 = all [images]
    held_out: int = 1024  # kept for validation, at most 1 in 20 of a source, none with --limit [images]
    min_crop: float = 1.0  # smallest part of the short side a random crop keeps, 1 = all, centred [0.01..1]
    crops: int = 0  # different random crops of each picture, 0 = a new one in each pass [0..1000]
    latent_cache: str = ""  # folder that keeps the latents of --vae of each crop, computed once
    shard_cache: str = ""  # folder of copies of remote shards, "" = one in the user's cache folder
    shard_cache_size: float = 100.0  # of that folder; the copies used least recently go [GB]
    shuffle_shards: int = 16  # remote shards that are mixed at a time, each is fetched once a pass [1..10000]
    max_bad: float = 0.05  # largest share of unreadable pictures before training stops [0..1]
    min_size: int = 8  # a picture that gives a smaller square is refused before decoding [1..65536 pixels]
    picture_mode: Literal["colour", "grey"] = "colour"  # of the pictures, 3 channels or 1
    lowres: int = 0  # side of the small pictures that the stage enlarges, 0 = a base stage [0..4096 pixels]
    lowres_mode: Literal["colour", "grey"] = "colour"  # of the small pictures; grey: the stage colours them
    flip: float = 0.0  # share of the pictures without text that is mirrored in training [0..1]
    txt: Literal["captions", "transcription"] = "captions"  # what NAME.txt holds; the other is in NAME.json
    text_crop: float = 0.0  # share of the pictures with a safebox that is cropped, around all text [0..1]
    text_area: float = 0.5  # smallest part of the largest square that such a crop keeps [0..1 of its area]
    shuffle_tags: bool = False  # in training, mix what stands between the commas of a caption, not the first
    blur: tuple[float, ...] = (0.0, 0.4, 0.6)  # share of the small pictures that is blurred; sigmas [pixels]
    crop: int = 0  # side of the square, anywhere in a picture, to train on, 0 = the whole [0..4096 pixels]


# ---------------------------------------------------------------------------- the order of the data
def hash_of(content: bytes) -> str:
    """128 bits as 32 letters: who has the same has the same content."""
    return blake2b(content, digest_size=16).hexdigest()


def keyed(seed: int, purpose: str, position: int) -> np.random.Generator:
    """A random generator, a pure function of its arguments: Philox under a 128-bit BLAKE2b key."""
    digest = blake2b(f"{seed} {purpose} {position}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def permute(index: int, n: int, key: bytes) -> int:
    """Where the permutation of 0..n-1 under a key (up to 64 bytes) sends `index`, without a table.
    A Feistel network (Luby and Rackoff 1988), walked along its cycle until below n (Black and
    Rogaway 2002)."""
    size = 1 << ((n - 1).bit_length() + 1) // 2             # of each half, so that a pair is n or more

    while True:
        left, right = divmod(index, size)
        for turn in range(6):
            digest = blake2b(f"{turn} {right}".encode(), key=key, digest_size=8).digest()
            mixed = (left ^ int.from_bytes(digest, "little")) % size
            left, right = right, mixed

        index = left * size + right
        if index < n:
            return index


def interleave(position: int, weights: list[int]) -> tuple[int, int]:
    """The source that serves a position, and how often it has before.
    Of the first p positions a source of share w takes floor(p w), the others share the rest in that
    way: shares are exact within one all along."""
    total = sum(weights)
    for chosen, weight in enumerate(weights):               # the last one takes all that are left
        before = position * weight // total
        after = (position + 1) * weight // total
        if after > before:
            return chosen, before

        position -= before
        total -= weight


@lru_cache(16)
def arrange(bounds: tuple[int, ...], key: bytes) -> tuple[list[int], list[int]]:
    """Shards, whose pictures begin and end at `bounds`, in an order by a key: their numbers, without empty
    ones, and where each of them begins in a pass in that order, and the last one ends."""
    sizes = np.diff(bounds).tolist()
    order = [permute(i, len(sizes), key) for i in range(len(sizes))]
    order = [shard for shard in order if sizes[shard]]
    return order, [*accumulate((sizes[shard] for shard in order), initial=0)]


# ----------------------------------------------------------------------------------------- decoding
def array(image: Image.Image) -> np.ndarray:
    """An image as uint8 (C, H, W)."""
    pixels = np.atleast_3d(np.asarray(image))                               # (H, W, C)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def shrink(image: Image.Image, size: int) -> Image.Image:
    """The one resize kernel: means of blocks by a whole factor, antialiased bicubic the rest."""
    return image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=1.0)


def plain(image: Image.Image, mode: str) -> Image.Image:
    """An image upright and in a mode without alpha: over white, 16 bits scaled to 8."""
    with suppress(Exception):                               # damaged tags: as it lies
        ImageOps.exif_transpose(image, in_place=True)

    if image.mode.startswith("I"):                  # 16-bit grey: convert() would clip it to white
        grey = np.asarray(image).clip(0, 65535) / 257 + 0.5
        image = Image.fromarray(grey.astype(np.uint8))

    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)

    if image.mode == "F":
        raise ValueError("its colours are floats, of which nothing says what is white")
    return image if image.mode == mode else image.convert(mode)         # which would copy it


@lru_cache(32)
def to_srgb(profile: bytes, mode: str) -> Callable | None:
    """What makes sRGB of an image in a mode (RGB, L, CMYK) by the colour profile of its file.
    None where it stays as it is: the profile is sRGB within 3 of 255, broken, or of another mode."""
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = given.profile.xcolor_space.strip().replace("GRAY", "L")
        if space != mode:
            return None
        convert = ImageCms.buildTransform(
            given, ImageCms.createProfile("sRGB"), mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION).apply
    except Exception:                               # lcms raises nearly anything on garbage
        return None

    ramp = Image.linear_gradient("L")
    probe = Image.merge("RGB", (ramp, ramp.rotate(90), ImageOps.invert(ramp))).convert(mode)
    change = array(convert(probe)) - array(probe.convert("RGB")).astype(int)
    return convert if abs(change).max() > 3 else None


def lazy(picture: bytes | np.ndarray) -> Image.Image:
    """A picture as it is stored, in FORMATS or uint8 (3, H, W): its pixels are decoded when they are used.
    ValueError or Pillow's errors for what is none."""
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_PIXELS      # texts beside the pixels, of a mebibyte or more
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture.transpose(1, 2, 0))
    try:
        with warnings.catch_warnings(action="ignore"):      # of bombs: the limits are ours
            return Image.open(io.BytesIO(picture), formats=FORMATS.split())
    except Image.UnidentifiedImageError:
        raise ValueError(f"not a whole picture of {FORMATS}") from None


def decode(data: bytes | np.ndarray, size: int, keep=1.0, right=0.5, down=0.5,
           least=8) -> np.ndarray:
    """A square of an encoded picture, uint8 (3, size, size): upright, on white, 8 bits, sRGB.
    It keeps a part of the short side, `least` pixels or more, placed in the rest by fractions, as
    stored; cut before it is resized, a JPEG decoded at the smallest scale that leaves twice the
    size, to save memory. Pixels, uint8 (3, H, W), are treated alike, but stay as they are, whatever
    the crop, where they have the size already. Raises ValueError or Pillow's errors for all but a
    whole, sane picture in FORMATS."""
    if isinstance(data, np.ndarray) and data.shape == (3, size, size):
        return data

    with warnings.catch_warnings(action="ignore"):          # of damaged tags
        image = lazy(data)
        width, height = image.size
        kept = keep * min(width, height)
        if width * height > MAX_PIXELS or kept < least:
            raise ValueError(f"{width}x{height} is over {MAX_PIXELS >> 20} megapixels "
                             f"or under {least}")

        wanted = math.ceil(2 * size / keep)         # of the short side, whatever the long one is
        image.draft(None, (wanted, wanted))

        side = max(1, round(keep * min(image.size)))
        left = round(right * (image.width - side))
        top = round(down * (image.height - side))
        image = image.crop((left, top, left + side, top + side))

        # The small square is converted: of the whole it may take longer than decoding.
        mode = {"CMYK": "CMYK", "P": "RGB"}.get(image.mode, Image.getmodebase(image.mode))
        convert = to_srgb(image.info.get("icc_profile") or b"", mode)
        image = shrink(plain(image, mode if convert else "RGB"), size)
        return array(convert(image) if convert else image)


# ----------------------------------------------------------------------------------------- captions
def printable(name: str) -> str:
    """A file's name, safe to print: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def one_line(error: Exception) -> str:
    """What an error says, on one line, else its name."""
    return " ".join(str(error).split()) or type(error).__name__


def clean(text: str) -> str:
    """A caption on one line, without control characters and lone surrogates, not too long."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    parts = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split()
    return " ".join(parts)[:MAX_CAPTION].rstrip()


def read_text(content: bytes) -> tuple[str, bool]:
    """The start of a text file, and whether its encoding is none that it says.
    By its byte order mark, or UTF-8; else as cp1252 where that is printable, else with U+FFFD."""
    content = content[:MAX_TEXT]
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding), False
    except UnicodeDecodeError:
        text = content.decode(encoding, "replace")
        if len(content) == MAX_TEXT:                # it may be cut within a letter
            return text, False

    with suppress(UnicodeDecodeError):
        western = content.decode("cp1252")
        if "".join(western.split()).isprintable():
            return western, True
    return text, True


def read_meta(sidecar: bytes) -> dict:
    """The fields of a .json; {} where it is empty or broken, as if it were not there.
    RECODED is one more where its encoding was guessed."""
    if not sidecar:                                 # the usual case, and an error takes long
        return {}

    text, guessed = read_text(sidecar)
    with suppress(ValueError, RecursionError, TypeError):
        meta = {**json.loads(text)}
        if guessed:
            meta[RECODED] = True
        return meta
    return {}


def words(value: object) -> list[str]:
    """The captions in a field of a .json: a word, or those of a list."""
    values = value if isinstance(value, list) else [value]
    cleaned = [clean(word) for word in values if isinstance(word, str)]
    return list(filter(None, cleaned))


def read_captions(text: str, meta: dict) -> list[str]:
    """All captions of a picture: "captions" of its .json, else the lines of its text, else the first
    of the .json's usual fields that has any."""
    get = meta.get
    found = words(get("captions")) or words(text.splitlines())
    found = found or words(get("caption")) + words(get("text"))
    return found or words(get("TEXT")) or words(get("prompt"))


def transcribed(meta: dict) -> str:
    """What is written in a picture, lines by \\n, "" if nothing is. ValueError where it is no text."""
    found = meta.get("transcription") or ""
    if not isinstance(found, str):
        raise ValueError(f"its transcription is {found!r:.40}, not a text")
    return "\n".join(map(clean, found.strip().splitlines()))


def labels(captions: list[str], transcriptions: list[str]) -> list[str]:
    """Captions, each with what is written in its picture on lines of its own below it."""
    return [f"{caption}\n{written}".rstrip() for caption, written in zip(captions, transcriptions)]


# ------------------------------------------------------------------------- files, whole or not at all
@contextmanager
def whole(path: Path, stamp: float | None = None) -> Iterator[io.IOBase]:
    """A file to be written, that appears as `path` at the end; it is on disk afterwards, else OSError.
    stamp: its time [seconds], None = as it is. A file with an old one would be swept, so it comes last."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if stamp is not None:
            os.utime(temporary, (time.time(), stamp))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

    with suppress(OSError):                         # Windows opens no folder, some disks sync none
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; it is on disk afterwards, else OSError."""
    with whole(path) as file:
        file.write(content)


def sweep(folder: Path, pattern: str = ".tmp-[0-9]*", age: float = 3600) -> None:
    """Remove files that nobody has written to for so long [seconds]: if not told otherwise, .tmp-PID-*, which
    killed writers left."""
    for path in folder.glob(pattern):
        with suppress(OSError):                     # another one swept it
            if time.time() - path.stat().st_mtime > age:
                path.unlink()


# ------------------------------------------------------------------------------------ remote shards
WAITS = (0.5, 1, 2, 4, 8, 16, 32, 0)        # behind each time that a shard could not be fetched [seconds]
AWAY = 600                                  # and then its pictures are replaced so long [seconds]
BEGAN = time.time()


@contextmanager
def streamed(url: str) -> Iterator[tuple]:
    """The stream of a remote file, its size [bytes], 0 = not said, and what changes with its content, if
    anything does."""
    if url.startswith("http"):                      # without the package that fsspec needs
        with urllib.request.urlopen(url, timeout=30) as stream:
            yield stream, int(stream.headers["Content-Length"] or 0), stream.headers["ETag"]
        return

    import fsspec
    disk, path = fsspec.url_to_fs(url)
    found = disk.info(path)
    with disk.open(path, "rb", block_size=2**24) as stream:
        yield stream, found["size"], found.get("ETag", found.get("etag"))


def make_room(folder: Path, limit: float) -> None:
    """Keep so many bytes of copies, those that were used last, and nothing that killed processes left. One
    stays however large it is."""
    sweep(folder)
    copies = []
    for path in folder.glob("[!.]*.tar"):           # .tmp-*: not yet there
        with suppress(FileNotFoundError):           # another process removed it
            found = path.stat()
            copies.append((found.st_atime_ns, found.st_size, path))

    kept = 0
    for _, size, path in sorted(copies, reverse=True):
        kept += size
        if kept > max(limit, size):
            path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Alone among all processes and threads, or, without `wait`, False. A killed process holds no lock."""
    try:
        import fcntl
    except ImportError:                             # Windows: each fetches for itself
        yield True
        return

    with open(path, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:                             # a disk without locks
            yield True
            return
        try:
            yield True
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)        # a process forked meanwhile would hold it, too


class Away(OSError):
    """A remote shard could not be fetched."""


class Remote(namedtuple("Remote", "url folder limit")):
    """A shard behind a URL, and its copy in a folder of a limited size [bytes], which all runs, ranks and
    workers share."""

    @property
    def copy(self) -> Path:
        return self.folder / f"{hash_of(self.url.encode())}.tar"

    def here(self) -> bool:
        """Whether there is a copy, which is the one used last from now on."""
        with suppress(FileNotFoundError):
            found = self.copy.stat()
            os.utime(self.copy, ns=(time.time_ns(), found.st_mtime_ns))
            return True
        return False

    def away(self) -> str:
        """Why it could not be fetched in this run, a while ago, else ""."""
        note = self.copy.with_suffix(".away")
        with suppress(FileNotFoundError):
            if note.stat().st_mtime > max(BEGAN, time.time() - AWAY):
                return note.read_text("utf-8")
        return ""

    def download(self) -> None:
        """The copy appears whole or not at all; its time stands for the version, and so tells its content."""
        with streamed(self.url) as (stream, size, version):
            stamp = zlib.crc32(str(version).encode()) // 2
            with whole(self.copy, stamp) as file:
                shutil.copyfileobj(stream, file, 2**20)
                if size and file.tell() != size:
                    raise ValueError(f"{file.tell():,} of its {size:,} bytes arrived")
        make_room(self.folder, self.limit)

    def fetch(self, wait: bool = True) -> bool:
        """Whether it was fetched now: not where it is here or away, nor, without `wait`, where another one is
        at it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.copy.with_suffix(".lock"), wait) as alone:
            if not alone or self.here() or self.away():
                return False

            gone = 0
            for pause in WAITS:
                try:
                    self.download()
                    return True
                except Exception as error:          # file systems raise nearly anything
                    reason = one_line(error)
                    gone += isinstance(error, FileNotFoundError) or getattr(error, "code", 0) == 404
                    if gone == 3:
                        break
                time.sleep(pause)
            self.copy.with_suffix(".away").write_text(f"{self.url}: {reason}", "utf-8")
            return False

    def open(self) -> io.RawIOBase:
        """The copy, fetched where it is not here; Away where that fails."""
        while True:
            with suppress(FileNotFoundError):       # not here, or another process just removed it
                file = open(self.copy, "rb", buffering=0)       # noqa: SIM115
                self.here()
                return file
            if not self.fetch() and self.away():
                raise Away(self.away())


def opened(path: str | Remote, buffering: int = -1) -> io.IOBase:
    return path.open() if isinstance(path, Remote) else open(path, "rb", buffering=buffering)


def listed(url: str) -> list[str]:
    """The remote tars that a URL, maybe with *, stands for; ValueError where its protocol lacks a package."""
    if not url.lower().endswith(".tar"):
        raise ValueError(f"--data {printable(url)} is no .tar; of remote files only shards are read")
    if url.startswith("http"):
        return [url]
    import fsspec
    try:
        disk, path = fsspec.url_to_fs(url)
        return sorted(map(disk.unstrip_protocol, disk.glob(path))) if "*" in path else [url]
    except Exception as error:                      # file systems raise nearly anything
        raise ValueError(f"--data {printable(url)}: {one_line(error)}") from None


# ------------------------------------------------------------------------------------------ sources
Sample = namedtuple("Sample", "picture captions meta")


def hash_keys(keys: Iterable[str]) -> np.ndarray:
    """64 bits of each key, by which pictures are held out."""
    hashes = [blake2b(key.encode(), digest_size=8).digest() for key in keys]
    return np.frombuffer(b"".join(hashes), "<u8")


def held_below(share: float) -> int:
    """The hash below which pictures are held out, for a share of them: 1 in 20 at most."""
    return int(min(0.05, share) * 2**64)


class Source:
    """Pictures with captions, by number: a subclass has __len__ and sample, the rest is inherited.
    A line in SOURCES, below built-in pictures, gives it a name for --data; it is called with the
    side of the pictures that are wanted [pixels], for sources that draw."""
    name = "pictures"           # in messages
    warned = []                 # lines for the user, about all of it
    embedded = False            # set from outside: meta["embeddings"] is wanted
    columns = ()                # fields of the metadata, by which --filter chooses
    told = ""                   # what it dropped
    far = ()                    # remote shards, whose pictures are mixed by blocks of --shuffle-shards
    endless = False             # there are samples behind the end, too: the held-out ones

    def sample(self, i: int) -> Sample:
        """(picture, captions, meta): encoded bytes in FORMATS, or pixels, uint8 (3, H, W); a list
        of str; the parsed .json, {} if none, and where `embedded` is set "embeddings": the bytes of
        KEY.t5.safetensors; RECODED where the encoding of a text was guessed. Any error it raises
        costs this picture alone: it is replaced and counted."""
        raise NotImplementedError

    def captions(self, i: int) -> list[str]:
        return self.sample(i).captions

    def key(self, i: int) -> str:
        """What a picture is called, and by what it is held out: it stays when others are added."""
        return f"{self.name}/{i}"

    def keys(self) -> Iterable[str]:
        return map(self.key, range(len(self)))

    def mark(self, i: int) -> str:
        """What a picture is known by in a cache."""
        return self.key(i)

    def fields(self) -> str:
        """The end of a message about a field that is not there."""
        return f": its metadata has {printable(', '.join(sorted(self.columns)[:40])) or 'nothing'}"

    def held(self, share: float) -> np.ndarray:
        """The numbers of the pictures that are held out, in order, so that there are about that share."""
        return np.flatnonzero(hash_keys(self.keys()) < held_below(share))

    def fingerprint(self) -> bytes:
        """What tells whether two runs see the same pictures."""
        return "\n".join(self.keys()).encode()


# Parts of a sample, by suffix; of a .jsonl a line.
PARTS = {**dict.fromkeys(SUFFIXES.split(), 0), "txt": 1, "json": 2, "t5.safetensors": 3, "caption": 4,
         "cls": 5, "jsonl": 6}
PACKED = ".zip .gz .tgz .bz2 .xz .zst .rar .7z .parquet"
# What systems and programs put beside pictures: hidden files and folders, thumbnails, masks.
HIDDEN = re.compile(r"(^|/)(\.(?!\.?/)|(@eaDir|__MACOSX|thumb(nail)?s?)/)|-(mask|cond)label\.\w+$",
                    re.IGNORECASE)
# The pictures of a shard, or the loose ones of a source. `index` is the file of its index, and a mark that
# tells what it was made of; `parts` are those of loose files, None for a tar.
Shard = namedtuple("Shard", "name prefix files parts index")
Member = namedtuple("Member", "name plain start at size end")   # of a tar: its place [bytes]
WHERE = 3 * (PARTS["jsonl"] + 1)          # numbers that tell where the parts of a sample lie
HEADER = struct.Struct("100s 24x 12s 12x 8s c 188x 155s 12x")   # of a tar: name, size, checksum, type, prefix


def split(name: str, left: Counter) -> tuple | None:
    """Key and part of a file by its name; None for what is no part of a sample, counted by kind."""
    key, _, suffix = name.rpartition(".")
    if suffix.lower() == "safetensors":
        key, _, kind = key.rpartition(".")
        suffix = f"{kind}.{suffix}"

    part = PARTS.get(suffix.lower())
    if HIDDEN.search(name):
        left["hidden, thumbnails or masks"] += 1
    elif part is not None:
        return key, part
    else:
        suffix = os.path.splitext(name)[1].lower()
        fix = " (unpack it, or pack it into tar shards)" if suffix in PACKED.split() else ""
        left[(printable(suffix) or "without suffix") + fix] += 1
    return None


def join(shard: Shard, parts: list[tuple]) -> tuple:
    """Samples of a list of (key, part, file, at, size): rows, keys, warnings, of keys used twice say.
    Of those only the first picture and what stands with it is kept: none gets another one's
    caption."""
    runs_of = {}
    last = None
    for key, part, *where in parts:
        runs = runs_of.setdefault(key, [])
        if key != last or part in runs[-1]:
            runs.append({})
        runs[-1][part] = where
        last = key

    rows = np.zeros((len(runs_of), WHERE // 3, 3), np.int64)
    rows[:, :, 0] = -1
    keys = []
    twice = 0
    alone = 0
    for key, runs in runs_of.items():
        sample = {}
        for run in runs:
            sample |= run
        if len(sample) < sum(map(len, runs)):
            twice += 1
            sample = next((run for run in runs if 0 in run), {})
        if 0 not in sample:
            alone += 1
            continue
        for part, where in sample.items():
            rows[len(keys), part] = where
        keys.append(shard.prefix + printable(key))

    warned = []
    if twice:
        warned.append(f"{shard.name}: {twice} duplicate keys; kept the first of each")
    if alone:
        warned.append(f"{shard.name}: {alone} texts without a picture; left out")
    return rows[:len(keys)], keys, warned


def pax_fields(records: bytes) -> dict:
    """What an extended header of a tar says: records of length, name and value, "9 path=a\\n"."""
    fields = {}
    at = 0
    while at < len(records):
        length = int(records[at:at + 20].partition(b" ")[0])
        _, _, record = records[at:at + length - 1].partition(b" ")
        name, _, value = record.partition(b"=")
        fields[name] = value
        at += max(1, length)
    return fields


def tar_header(block: bytes) -> tuple[str, bytes, int]:
    """Name, type and size by a member's header, as tarfile reads it; of a plain file, the usual kind, in a
    tenth of the time."""
    name, size, check, kind, prefix = HEADER.unpack(block)
    with suppress(ValueError):
        rest = sum(check) - 8 * ord(" ") + int(check.strip(b" \0"), 8)
        whole = zlib.adler32(block, 0) % 2**16 == rest % 65521         # half of it is the sum of the bytes
        if whole and kind == b"0" and not prefix[0]:
            name, _, _ = name.partition(b"\0")
            return name.decode("utf-8", "surrogateescape"), kind, int(size.strip(b" \0"), 8)

    member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    return member.name, member.type, member.size


def members(file: io.RawIOBase) -> Iterator[Member]:
    """The members of a tar, from its headers alone: a few bytes of memory, whatever they claim.
    `plain` is a file with all its bytes: no link, device, folder or sparse file. Raises ValueError
    or tarfile.TarError where a header is damaged or the two zero blocks of the end are missing."""
    start = 0
    at = 0
    said = {}                                       # of the next member, by the headers before it
    while True:
        file.seek(at)
        block = file.read(512)
        if not any(block):
            tail = block + file.read(2**16)
            if len(tail) < 1024 or any(tail):
                raise ValueError("no end mark")
            return

        name, kind, size = tar_header(block)
        at += 512
        if kind in b"123456":                       # links, devices and folders have no content
            size = 0
        elif said:
            size = int(said.get(b"size", size))
        if size < 0:
            raise ValueError("a size below 0")

        more = kind == tarfile.GNUTYPE_SPARSE and block[482]
        while more:                                 # the rest of its map, before the content
            more = file.read(512)[504]
            at += 512

        end = at + size + -size % 512
        if kind in b"LxX":                          # a long name, or fields
            text = file.read(min(size, MAX_TEXT))
            said |= {b"path": text.partition(b"\0")[0]} if kind == b"L" else pax_fields(text)
        elif kind not in b"Kg":
            name = said.get(b"path", b"").decode("utf-8", "surrogateescape") or name
            sparse = said and b"GNU.sparse" in b" ".join(said)
            yield Member(name, kind in b"0\x007" and not sparse, start, at, size, end)
            start = end
            said = {}
        at = end


def scan_tar(path: str | Remote) -> tuple:
    """Parts of samples in a tar, a count by kind of what is left out, what is damaged, and its state.
    Names are only keys: nothing is extracted, no link is followed."""
    parts = []
    left = Counter()
    problem = ""
    with opened(path) as file:
        found = state(file.fileno())
        try:
            for member in members(file):
                named = member.plain and split(member.name, left)
                if named and member.at + member.size <= found[0]:
                    parts.append((*named, 0, member.at, member.size))
        except Exception as error:                  # there is nearly anything in garbage
            problem = one_line(error)
    return parts, left, problem, found


def state(file: str | int) -> tuple:
    """What changes with a file's content: size [bytes], time [ns]."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


@contextmanager
def reading(files: list[tuple]) -> Iterator[Callable]:
    """read(row, kind, most) -> the first bytes of a part of a sample, by its suffix in PARTS, b"" for none.
    files: paths and states. ValueError where one is not what it was."""
    last = None
    with ExitStack() as stack:
        def read(row, kind, most=8 * MAX_PIXELS):
            nonlocal last, stream
            file, at, size = row[PARTS[kind]]
            if file < 0:
                return b""

            if file != last:
                path, indexed = files[file]
                stack.close()
                last = None
                stream = stack.enter_context(opened(path, buffering=0))
                if state(stream.fileno()) != indexed:
                    raise ValueError("changed since it was indexed")
                last = file
            stream.seek(at)
            return stream.read(min(size, most))

        stream = None
        yield read


def fields_of(read: Callable, row: list) -> dict:
    """The metadata of a sample: its line in a metadata.jsonl, and over that its .json."""
    return read_meta(read(row, "jsonl", MAX_TEXT)) | read_meta(read(row, "json", MAX_TEXT))


# ------------------------------------------------------------------------------------------ indexes
COMPARE = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal,
           "!=": np.not_equal}
WORD = 0x7ff9                               # the first 16 bits of a number that stands for a word


def number_of(value: object) -> float:
    """A field of the metadata as a number. A word that is none is a NaN that bears its checksum and length,
    and what is empty or nested is a NaN without."""
    if isinstance(value, bool):
        value = str(value).lower()
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        if not isinstance(value, str) or not value.strip():
            return math.nan

    word = value.encode("utf-8", "replace")
    bits = struct.pack("<IHH", zlib.crc32(word), len(word) % 2**16, WORD)
    return struct.unpack("<d", bits)[0]


def columns_of(rows: np.ndarray, files: list[tuple]) -> dict:
    """The fields of the metadata of samples by their names, float64 (N,), see number_of."""
    columns = {}
    with reading(files) as read:
        for i, row in enumerate(watched(rows.tolist(), "pictures")):
            with suppress(OSError, ValueError):     # counted when it is drawn
                for name, value in fields_of(read, row).items():
                    if name not in columns and len(columns) < MAX_FIELDS:
                        columns[name] = np.full(len(rows), np.nan)
                    if name in columns:
                        columns[name][i] = number_of(value)
    return columns


def scan(shard: Shard) -> tuple[dict, dict]:
    """Arrays, int64 (rows, numbers), and notes of an index. Of N samples, "rows" are the places of their
    parts, WHERE numbers: file, start and size of each; file -1 for none; and the letters of their
    keys. "held": rows and hashes of those that may be held out. "columns" (N, columns): see columns_of."""
    left = Counter()
    parts = shard.parts
    problem = ""
    files = shard.files
    if parts is None:
        (path, _), = files
        parts, left, problem, found = scan_tar(path)
        files = [(path, found)]
    rows, keys, warned = join(shard, parts)
    if problem:
        warned.append(f"{shard.name}: damaged after {len(rows)} pictures ({problem}); using those")

    hashes = hash_keys(keys)
    keys = np.array([*map(str.encode, keys)], "S")
    held = np.flatnonzero(hashes < held_below(1))
    columns = columns_of(rows, files)
    sizes = rows[:, :3, 2].copy()
    sizes[:, 1] += rows[:, PARTS["caption"], 2]     # .caption beside .txt
    width = -(-keys.itemsize // 8)                  # of the keys [8 bytes]
    letters = keys.astype(f"S{8 * width}").view(np.int64).reshape(len(keys), width)
    table = np.reshape([*columns.values()], (len(columns), len(rows)))
    arrays = {
        "rows": np.hstack([rows.reshape(len(rows), WHERE), letters]),
        "held": np.column_stack([held, hashes[held].view(np.int64)]),
        "columns": table.T.view(np.int64),
    }
    notes = {"count": len(rows), "columns": [*columns], "warned": warned, "left": left, "dropped": {},
             "state": files[0][1], "digest": hash_of(keys.tobytes() + sizes.tobytes())}
    return arrays, notes


def check(rows: np.ndarray) -> np.ndarray:
    """Checksums of the rows of an index: one flipped bit changes them."""
    return (rows * 3 ** np.arange(rows.shape[-1])).sum(-1)


def save_index(index: tuple[Path, str], arrays: dict, notes: dict) -> None:
    """Write the file of an index: safetensors, with its mark and notes in the metadata."""
    place, mark = index
    text = json.dumps([mark, notes])
    place.parent.mkdir(parents=True, exist_ok=True)         # somebody may have emptied the cache folder
    arrays = {name: np.c_[array, check(array)].copy() for name, array in arrays.items()}
    write(place, safetensors.numpy.save(arrays, {"notes": text, "checksum": hash_of(text.encode())}))


def header_of(file: io.IOBase) -> dict:
    """The header of a safetensors file, open at its start: its tensors by name, its texts by __metadata__."""
    size = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(size))


@lru_cache(256)
def open_index(index: tuple[Path, str]) -> tuple[Callable, dict]:
    """read(name) -> an array of an index, read(name, i) -> a row of it, (1, numbers); and notes. What is not
    asked for is never in memory. ValueError for one of another mark, and by read where it is damaged."""
    place, mark = index
    file = place.open("rb")
    header = header_of(file)
    start = file.tell()
    meta = header["__metadata__"]
    made_of, notes = json.loads(meta["notes"])
    if made_of != mark or hash_of(meta["notes"].encode()) != meta["checksum"]:
        raise ValueError("changed since it was indexed")

    def read(name, row=None):
        _, width = header[name]["shape"]
        first, last = header[name]["data_offsets"]
        if row is not None:
            first += 8 * width * row
            last = first + 8 * width
        if hasattr(os, "pread"):                    # forked processes share the place of a file
            found = os.pread(file.fileno(), last - first, start + first)
        else:                                       # on Windows, where none are
            file.seek(start + first)
            found = file.read(last - first)

        array = np.frombuffer(found, np.int64).reshape(-1, width)
        if (check(array[:, :-1]) != array[:, -1]).any():
            raise ValueError(f"{place} is damaged")
        return array[:, :-1]
    return read, notes


def indexed(shard: Shard) -> bool:
    """Whether there is an index of the shard as it is, or as the copy of a remote one is; then it is marked
    as in use, see index_folder."""
    path, _ = shard.files[0]
    with suppress(Exception):                       # not there, or torn
        _, notes = open_index(shard.index)
        with suppress(OSError):                     # another user's
            os.utime(shard.index[0])
        return not isinstance(path, Remote) or not path.copy.exists() or notes["state"] == [*state(path.copy)]
    return False


def index(shard: Shard) -> None:
    """Keep what a scan gives, unless another process has by now; of a shard that stays away there is none."""
    with suppress(Away):
        if not indexed(shard):
            save_index(shard.index, *scan(shard))


def fold(name: str) -> str:
    """A field's name by letters and numbers, without what programs add: AESTHETIC_SCORE is aesthetic,
    pwatermark is watermark, where there is no field of just that name."""
    return re.sub(r"[\W_]|s?_?score$|^p(?=watermark|unsafe)|^clip_?(?=simil)", "", name.lower())


def parse_filter(text: str) -> tuple[str, Callable, float]:
    """Name, comparison and value of "aesthetic>5" or "license==cc0"; ValueError for what is no filter."""
    found = re.fullmatch(r"\s*([^<>=!]+?)\s*(<=|>=|==|!=|<|>)\s*([^<>=!]+?)\s*", text)
    value = number_of(found[3]) if found else math.nan
    if not found or (math.isnan(value) and found[2] not in ("==", "!=")):
        raise ValueError(f'--filter {printable(text)!r} is no filter such as "aesthetic>5" or "license==cc0"')
    return found[1], COMPARE[found[2]], value


def index_all(shards: list[Shard]) -> None:
    """Index what is not yet, by the processes of all ranks of a machine: each looks for what is left, in an
    order of its own."""
    rank = os.environ.get("RANK", "0")
    missing = [shard for shard in shards if not indexed(shard)]
    missing.sort(key=lambda shard: hash_of(f"{rank} {shard.index}".encode()))
    gc.freeze()                                     # or a third of the time is spent on what is there already
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    helpers = min(cores, len(missing) // 4, 32)
    if helpers < 2:
        for shard in watched(missing, "shards"):
            index(shard)
        return

    with PROCESSES.Pool(helpers, ignore_signals) as pool:
        for _ in watched(pool.imap_unordered(index, missing), "shards", len(missing)):
            pass


def ignore_signals() -> None:
    """In a process whose end is its parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def watched(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """The items, with a bar on a terminal of the first rank where they take longer than a second."""
    first = os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None
    seen = first and sys.stderr and sys.stderr.isatty()
    return tqdm(items, what, total, delay=1, disable=not seen)


@cache
def index_folder(home: str) -> Path:
    """Where indexes are kept, those that nobody uses for 30 days: in the user's cache folder or, if it cannot
    be written or its disk is nearly full, in one of this run."""
    folder = Path(home, "limn")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        sweep(folder, "*.index", 30 * 86400)
        if shutil.disk_usage(folder).free > 2**28:
            return folder

    folder = Path(tempfile.mkdtemp(prefix="limn-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def lines_of(path: str, folder: str, number: int, left: Counter) -> Iterator[tuple]:
    """The lines of a .jsonl (metadata.jsonl of Hugging Face's imagefolder), each a part of the sample whose
    picture its "file_name" names, in that folder; without one it is counted."""
    at = 0
    with open(path, "rb") as file:
        for line in file:
            name = read_meta(line).get("file_name")
            if isinstance(name, str):
                key, _, _ = posixpath.normpath(posixpath.join(folder, name)).rpartition(".")
                yield key, PARTS["jsonl"], number, at, len(line)
            elif line.strip():
                left["lines of a .jsonl without a file_name"] += 1
            at += len(line)


def expand(pattern: str) -> list[str]:
    """The paths or URLs a pattern stands for: braces, {000..018} or {a,b}, then * ? [ ] and ** as on disk.
    ValueError where a path is not there."""
    if os.path.exists(pattern):
        return [pattern]
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if "://" in pattern and not brace:
        return listed(pattern)
    if not brace:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ValueError(f"--data {printable(pattern)} is not on a local disk; "
                             "give folders, tars, patterns or URLs")
        return found

    choices = brace[1].split(",")
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", brace[1])
    if numbers:
        first, last = numbers.groups()
        counted = range(int(first), int(last) + 1)
        if len(counted) > MAX_FILES:
            raise ValueError(f"--data {printable(pattern)} names over {MAX_FILES:,} files; give fewer")
        choices = [str(number).zfill(len(first)) for number in counted] or choices

    paths = []
    for choice in choices:
        paths += expand(pattern[:brace.start()] + choice + pattern[brace.end():])
    return paths


class Files(Source):
    """Loose pictures with captions beside them, and tar shards, read by offset: a --data entry."""

    def __init__(self, pattern: str, config: DataConfig, again: bool = False):
        self.again = again                                  # only for its indexes
        self.config = config
        self.pattern = pattern
        self.name = printable(pattern)
        self.warned = []
        self.far = []
        self.classes = []
        if config.class_names:
            text, _ = read_text(Path(config.class_names).read_bytes())
            self.classes = text.splitlines()

        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.indexes = index_folder(home)
        copies = Path(config.shard_cache or self.indexes / "shards")
        room = config.shard_cache_size * 10**9

        left = Counter()                                    # by kind, what is no part of a sample
        count = 0
        files = []                                          # path, state
        loose = []
        shards = []
        for path, name in watched(self.walk(pattern, left), "files"):
            count += 1
            if "://" in path:
                file = Remote(path, copies, room), None
            else:
                file = path, state(path)
            if name.lower().endswith(".tar") and not HIDDEN.search(name):
                prefix = f"{printable(name[:-4])}/"
                shards.append(self.shard(printable(os.path.basename(path)), prefix, path, [file]))
                continue

            named = split(name, left)
            if not named:
                continue
            key, part = named
            if part == PARTS["jsonl"]:
                loose += lines_of(path, posixpath.dirname(key), len(files), left)
            else:
                loose.append((key, part, len(files), 0, file[1][0]))
            files.append(file)

        if loose:
            loose.sort(key=lambda part: (part[0], -part[1]))    # texts before the picture
            shards.append(self.shard(self.name, "", pattern, files, loose))
        index_all(shards)
        open_index.cache_clear()                            # there may be newer ones

        self.parts = [*filter(None, map(self.known, shards))]
        self.gather(left)
        if not len(self) and not self.told:
            reason = " ".join(self.warned[:1])
            raise ValueError(f"no pictures in {self.name} (looked for {SUFFIXES} tar); "
                             f"found {count} files {reason}".rstrip())
        wanted = config.caption_key
        if wanted and wanted not in self.columns:
            raise ValueError(f"--caption-key {wanted} is no field of {self.name}{self.fields()}")
        if not again:
            self.look()

    def gather(self, left: Counter) -> None:
        """Filter the pictures, and take from the heads of their indexes what concerns all of them."""
        self.starts = [0]
        self.digests = []
        self.columns = set()
        dropped = Counter()
        if self.config.filter:
            self.parts = [*map(self.narrow, self.parts)]
        for shard in self.parts:
            _, notes = open_index(shard.index)
            self.columns |= set(notes["columns"])
            self.starts.append(self.starts[-1] + notes["count"])
            self.digests.append(notes["digest"])
            self.warned += notes["warned"]
            left.update(notes["left"])
            dropped.update(notes["dropped"])
        if left:
            kinds = [f"{number} {kind}" for kind, number in left.most_common(12)]
            self.warned.append(f"{self.name}: left out {', '.join(kinds)}")
        self.told = "".join(f", {number:,} dropped by {rule}" for rule, number in dropped.items())

    def narrow(self, shard: Shard) -> Shard:
        """The shard with only the pictures that pass each --filter: an index of its own, kept as well."""
        config = self.config
        place, mark = shard.index
        rule = f"{config.filter} {config.missing} {shard.files[0][1]}"
        place = place.with_stem(hash_of(f"{place.stem} {rule}".encode()))
        narrowed = shard._replace(index=(place, f"{mark} {rule}"))
        if indexed(narrowed):
            return narrowed

        rows, held, columns = map(partial(self.array, shard), ("rows", "held", "columns"))
        _, notes = open_index(shard.index)
        fields = dict(zip(notes["columns"], columns.T))
        alike = {fold(name): column for name, column in fields.items()}
        absent = np.full(notes["count"], np.nan)
        kept = np.ones(notes["count"], bool)
        dropped = {}
        for text in config.filter:
            name, compare, value = parse_filter(text)
            column = fields.get(name, alike.get(fold(name), absent)).view(float)
            bits = column.view(np.uint64)
            missing = np.isnan(column) & (bits >> 48 != WORD)
            if math.isnan(value):                       # a word
                passes = compare(bits, np.float64(value).view(np.uint64))
            else:
                passes = compare(column, value)
            passes = np.where(missing, config.missing == "keep", passes)
            dropped[text] = int((kept & ~passes).sum())
            kept &= passes

        places = np.cumsum(kept) - 1
        notes = notes | {"count": int(kept.sum()), "dropped": dropped}
        notes["digest"] = hash_of(notes["digest"].encode() + kept.tobytes())
        held = held[kept[held[:, 0]]]
        held[:, 0] = places[held[:, 0]]
        save_index(narrowed.index, {"rows": rows[kept], "held": held}, notes)
        return narrowed

    def known(self, shard: Shard) -> Shard | None:
        """A shard without what only its scan needs; a remote one as it was then, None if it stays away."""
        path, _ = shard.files[0]
        if isinstance(path, Remote):
            if not indexed(shard):
                self.warned.append(f"{path.away()}; left out")
                return None
            _, notes = open_index(shard.index)
            shard = shard._replace(files=[(path, tuple(notes["state"]))])
            self.far.append(path)
        return shard._replace(parts=None)

    def shard(self, name: str, prefix: str, path: str, files: list, parts=None) -> Shard:
        """What is indexed as one; `prefix` stands before its keys."""
        path = path if "://" in path else os.path.abspath(path)
        place = f"5 {prefix} {path}".encode("utf-8", "surrogateescape")
        states = [found for _, found in files]
        mark = hash_of(repr((parts, states)).encode())
        file = self.indexes / f"{hash_of(place)}.index"
        return Shard(name, prefix, files, parts, (file, mark))

    def look(self) -> None:
        """Warn of captions that are missing in up to 256 of the pictures, none of a remote shard.
        What these captions say is kept for the fingerprint."""
        looked = range(0, 0 if self.far else len(self), len(self) // 256 + 1)
        self.looked = []
        empty = 0
        for i in looked:
            with suppress(Exception):                           # replaced and counted when it is drawn
                found = self.captions(i)
                self.looked += found
                empty += not found
        if empty:
            self.warned.append(f"{self.name}: {empty} of {len(looked)} pictures looked at have no caption"
                               f"{self.fields()}; see --caption-key and --class-names")

    def walk(self, pattern: str, left: Counter) -> Iterator[tuple]:
        """All files in order, and their names below the folder, or below what several of them share, so that
        no two are named alike; links to folders are not followed."""
        def lost(error):
            self.warned.append(f"{printable(error.filename)}: {error.strerror}; left out")

        roots = expand(pattern)
        shared = len(roots) > 1 and "://" not in pattern and (os.path.commonpath(roots) or ".")
        for root in roots:
            if "://" in root or os.path.isfile(root):
                name = os.path.relpath(root, shared) if shared else os.path.basename(root)
                yield root, name.replace(os.sep, "/")
                continue

            for folder, folders, files in os.walk(root, onerror=lost):
                inside = os.path.relpath(folder, shared or root).replace(os.sep, "/") + "/"
                folders.sort()
                for name in folders[:]:
                    path = os.path.join(folder, name)
                    if HIDDEN.search(f"{name}/"):
                        left[f"{printable(name)}/"] += 1
                        folders.remove(name)
                    elif os.path.islink(path):
                        self.warned.append(f"{printable(path)}: a link to a folder, not followed")

                for name in sorted(files):
                    path = os.path.join(folder, name)
                    if os.path.isfile(path):
                        yield path, (inside + name).removeprefix("./")

    def __len__(self):
        return self.starts[-1]

    def array(self, shard: Shard, *what) -> np.ndarray:
        """What open_index reads; an index that is damaged or gone is made again."""
        place, _ = shard.index
        try:
            read, _ = open_index(shard.index)
            return read(*what)
        except Exception as error:                  # there is nearly anything in garbage
            if self.again:
                raise
            print(f"warning: {one_line(error)}; making {place} again", file=sys.stderr)

        place.unlink(missing_ok=True)
        open_index.cache_clear()
        Files(self.pattern, self.config, again=True)
        read, _ = open_index(shard.index)
        return read(*what)

    @lru_cache(1)           # noqa: B019, one is asked for by key, then by sample
    def row(self, i: int) -> tuple:
        """The files, the places of the parts, and the key of a sample."""
        number = bisect_right(self.starts, i) - 1
        shard = self.parts[number]
        row, = self.array(shard, "rows", i - self.starts[number])
        key = row[WHERE:].tobytes().rstrip(b"\0")
        return shard.files, row[:WHERE].reshape(-1, 3).tolist(), key.decode()

    def texts(self, read: Callable, row: list) -> tuple:
        """Captions and metadata of a sample."""
        content = read(row, "txt", MAX_TEXT)
        meta = fields_of(read, row)
        recoded = False
        if content and self.config.txt == "transcription":
            meta["transcription"], recoded = read_text(content)
            content = b""
        text, guessed = read_text(content or read(row, "caption", MAX_TEXT))
        if guessed or recoded:
            meta[RECODED] = True

        wanted = self.config.caption_key
        found = words(meta.get(wanted)) if wanted else read_captions(text, meta)
        label = read(row, "cls", 20)
        if label:
            meta["cls"] = int(label)
            known = len(self.classes)
            if known and not found:
                if not 0 <= meta["cls"] < known:
                    raise ValueError(f"class {meta['cls']} is none of the {known} of --class-names")
                found = words(self.classes[meta["cls"]])
        return found, meta

    def sample(self, i):
        files, row, _ = self.row(i)
        with reading(files) as read:
            picture = read(row, "jpg")
            texts, meta = self.texts(read, row)
            if self.embedded:
                meta["embeddings"] = read(row, "t5.safetensors")
        return Sample(picture, texts, meta)

    def captions(self, i):
        files, row, _ = self.row(i)
        with reading(files) as read:
            return self.texts(read, row)[0]

    def key(self, i):
        return self.row(i)[2]

    def mark(self, i):
        files, ((file, _, size), *_), key = self.row(i)
        return f"{os.path.basename(self.name)} {key}, {size} bytes"

    def held(self, share):
        held = []
        below = held_below(1 if self.far else share)
        for start, shard in zip(self.starts, self.parts):
            rows, hashes = self.array(shard, "held").T
            held.append(start + rows[hashes.view(np.uint64) < below])
            if self.far and sum(map(len, held)) >= share * len(self):       # of few: they are fetched often
                break
        return np.concatenate(held)

    def fingerprint(self):
        return repr((self.digests, self.looked)).encode()

    def shards(self) -> list[str]:
        """The files that pictures lie in."""
        return [far.url for far in self.far] or [shard.files[0][0] for shard in self.parts]


def copy_shard(path: str, target: str, beside: Callable, config: DataConfig) -> None:
    """Copy a tar shard, and behind each picture, KEY.jpg, put KEY.t5.safetensors.
    Its content, for what it had, is what `beside` makes of the captions: list of str -> bytes. The
    other members stay as they are; `target` appears whole or not at all."""
    source = Files(path, config)
    numbers = {source.row(i)[1][0][1]: i for i in range(len(source))}
    file, _ = source.parts[0].files[0]
    with opened(file, buffering=0) as old, whole(Path(target)) as new:
        for member in members(old):
            if not member.name.lower().endswith(".t5.safetensors"):
                old.seek(member.start)
                new.write(old.read(member.end - member.start))

            if member.at in numbers:
                content = beside(source.captions(numbers[member.at]))
                added = tarfile.TarInfo(member.name.rpartition(".")[0] + ".t5.safetensors")
                added.size = len(content)
                new.write(added.tobuf() + content + bytes(-len(content) % 512))
        new.write(bytes(1024))


# ------------------------------------------------------------------------------------------- caches
def checksum(entry: tuple) -> str:
    """The shapes of a text's tensors, and the checksum of their bytes."""
    shapes = ["x".join(map(str, tensor.shape)) for tensor in entry]
    crc = 0
    for tensor in entry:
        crc = zlib.crc32(tensor.flatten().view(torch.int16).numpy(), crc)
    return " ".join([*shapes, str(crc)])


class Cache:
    """What a frozen network makes of texts, or of what they name: cache[text] -> its tensors.
    A folder of safetensors files, which are mapped, or the content of one. The hash of a text and
    its encoder (fingerprint: which weights, which settings) names the tensors, and in the metadata
    their shapes and checksum. Raises ValueError for a file that is torn or of another encoder, and
    for a text that is not there: none gets another one's tensors."""

    def __init__(self, name: Path | str, fingerprint: str, content: bytes | None = None):
        self.name = name
        self.fingerprint = fingerprint
        self.content = content
        self.found = {}                                         # hash -> function to read, checksum
        if content is None:
            self.fix = "Delete it or use another folder"
            sources = sorted(name.glob("[!.]*.safetensors"))    # .tmp-*: being written
        else:
            self.fix = "Write the shards again"
            sources = filter(None, [content])
        for source in sources:
            self.open(source)

    def __reduce__(self):
        """A copy, of another process say, opens the files again."""
        return Cache, (self.name, self.fingerprint, self.content)

    def open(self, source: Path | bytes) -> None:
        try:
            if isinstance(source, bytes):
                checksums = header_of(io.BytesIO(source))["__metadata__"]
                read = safetensors.torch.load(source).__getitem__
            else:
                file = safetensors.safe_open(source, "pt")
                checksums = file.metadata()
                read = file.get_tensor
            made_by = checksums.pop("fingerprint")
        except Exception as error:                              # safetensors raises nearly anything
            name = self.name if isinstance(source, bytes) else source
            raise ValueError(f"{name} is damaged: {one_line(error)[:200]}. {self.fix}") from None

        if self.fingerprint not in made_by:
            raise ValueError(f"{self.name} was made with {made_by}, not {self.fingerprint}. "
                             f"{self.fix}")
        self.found |= {key: (read, text) for key, text in checksums.items()}

    def key(self, text: str) -> str:
        return hash_of(f"{self.fingerprint} {text}".encode())

    def __getitem__(self, text: str) -> tuple[Tensor, ...]:
        key = self.key(text)
        if key not in self.found:
            fix = self.fix.replace("Delete it", "Start again")
            raise ValueError(f"{self.name} has nothing of {text[:80]!r}. {fix}")

        read, expected = self.found[key]
        try:
            entry = tuple(read(f"{key}.{i}") for i in range(expected.count(" ")))
            if checksum(entry) != expected:
                raise ValueError("it does not match its checksum")
        except Exception as error:
            raise ValueError(f"{self.name} is damaged at {text[:80]!r}: {error}. "
                             f"{self.fix}") from None
        return entry

    def pack(self, entries: dict, meta: dict | None = None) -> tuple[dict, dict]:
        """The tensors and the metadata of a file of what texts have become, {text: tensors}.
        meta: what other encoders have in the same file already."""
        others = meta["fingerprint"] + " " if meta else ""
        marks = {"fingerprint": others + self.fingerprint}
        tensors = {}
        for text, entry in entries.items():
            key = self.key(text)
            marks[key] = checksum(entry)
            for i, tensor in enumerate(entry):
                tensors[f"{key}.{i}"] = tensor.contiguous().clone()
        return tensors, marks

    def fill(self, texts: Iterable[str], encode: Callable, part: int = 8192) -> Iterator[int]:
        """Write what is missing, `part` texts to a file, and yield how many.
        encode(texts) yields (index, *tensors) in any order; what it leaves out stays missing. A
        file appears whole or not at all, named by its texts: a stopped run goes on where it was,
        two at once write the same."""
        missing = {}
        for text in texts:
            key = self.key(text)
            if key not in self.found:
                missing[key] = text
        order = [missing[key] for key in sorted(missing)]
        sweep(self.name)

        for start in range(0, len(order), part):
            entries = {}
            for i, *entry in encode(order[start:start + part]):
                entries[order[start + i]] = entry

            if entries:
                tensors, meta = self.pack(entries)
                names = " ".join(sorted(meta))
                self.name.mkdir(parents=True, exist_ok=True)
                path = self.name / f"{self.key(names)}.safetensors"
                write(path, safetensors.torch.save(tensors, meta))
                self.open(path)
            yield len(entries)


# --------------------------------------------------------------------------- the stream of pictures
def parse_source(entry: str) -> tuple:
    """PATH or PATH:WEIGHT; what exists under the whole name has no weight."""
    path, _, weight = entry.rpartition(":")
    if os.path.exists(entry) or not re.fullmatch(r"\d*\.?\d+", weight):
        return entry, None
    return path, Fraction(weight)


def around(size: tuple[int, int], box: list, least: float, area: float,
           drawn: list[float] | None) -> tuple[int, int, int]:
    """Left, top and side of a square inside a picture of size (W, H) that has all of a box, left, top, right,
    bottom [pixels]; ValueError for a box that is outside, or longer than the short side W or H.
    least: of its side, as far as the picture has that; area: smallest part of the largest square; drawn: for
    its size and place three numbers of 0..1, None = the largest, as near to the middle as can be."""
    short = min(size)
    firsts = np.floor(box[:2])
    lasts = np.ceil(box[2:])
    edges = np.concatenate([(0, 0), firsts, lasts, size])
    inside = len(box) == 4 and (edges[:-2] <= edges[2:]).all()
    if not inside or max(lasts - firsts) > short:
        raise ValueError(f"its safebox {box} is not inside a square of its {size[0]}x{size[1]} pixels")

    side = short
    if drawn:
        least = max(*(lasts - firsts), math.ceil(min(least, short)))
        area = max(area, (least / short) ** 2)
        side = int(max(least, round(short * math.sqrt(area + drawn[0] * (1 - area)))))
    room = np.array(size) - side
    low = np.maximum(0, lasts - side)
    high = np.minimum(firsts, room)
    corner = (room // 2).clip(low, high)
    if drawn:
        corner = low + drawn[1:] * (high - low + 1) // 1
    return *map(int, corner), side


class Rest(Sequence):
    """The numbers below `count`, in order, but for those that are held out."""

    def __init__(self, count: int, held: np.ndarray):
        self.count = count - len(held)
        self.gaps = held - np.arange(len(held))             # how many numbers stay before each

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        return i + bisect_right(self.gaps, i)


class Pictures:
    """The endless stream: position 0, 1, 2, ... -> a picture, its crop and its caption, by keys.
    Every pass over a source shows each of its pictures once, in an order keyed by (seed, source,
    pass). Sources are interleaved by weight, by default their numbers of pictures. The "val" split,
    fixed and centred, is those whose hashed key is below a threshold; with --limit, or too few,
    those of training.
    To be set from outside, for what the workers do besides: `reader`, with read(caption, bytes) ->
    an entry and batch(entries) -> a dict of arrays; `transcriber`, that of what is written in
    pictures, whose arrays have transcription_ before their names; `embedded`, whether these bytes
    are those of KEY.t5.safetensors, else none; `draws`, positions -> a dict of arrays; `latents`, a
    cache of what a VAE makes of each of `squares`. Raises ValueError for --data and --blur that
    make no sense."""
    embedded = False
    reader = None
    transcriber = None
    draws = None
    latents = None

    def __init__(self, config: DataConfig, size: int, seed: int,
                 split: Literal["train", "val"] = "train"):
        self.config = config
        self.size = size
        self.split = split
        self.seed = seed if split == "train" else 0

        names, weights = zip(*map(parse_source, config.data or ["built-in"]))
        if set(weights) != {None} and not all(weights):
            given = printable(" ".join(config.data))
            raise ValueError(f"--data {given}: give all a weight above 0, or none")
        blur = config.blur
        if len(blur) != 3 or not 0 <= blur[0] <= 1 or not 0 <= blur[1] <= blur[2]:
            raise ValueError(f"--blur {blur} is not a share from 0 to 1 and two rising sigmas")

        for text in config.filter:                          # before anything is indexed
            parse_filter(text)
        self.sources = []
        self.warnings = []
        for name in names:
            source = SOURCES[name](size) if name in SOURCES else Files(name, config)
            self.sources.append(source)
            self.warnings += source.warned
        self.check_filters()
        self.rows = [self.choose(source) for source in self.sources]
        self.bounds = [self.divide(source, rows) for source, rows in zip(self.sources, self.rows)]

        if None in weights:
            weights = [Fraction(len(rows)) for rows in self.rows]
        scale = math.lcm(*(weight.denominator for weight in weights))
        self.weights = [int(weight * scale) for weight in weights]

        self.fingerprint = hash_of(b"".join(source.fingerprint() for source in self.sources))
        counts = [f"{s.name}: {len(rows):,} pictures{s.told}" for s, rows in zip(self.sources, self.rows)]
        self.summary = "; ".join(counts)

    def check_filters(self) -> None:
        """ValueError for a filter of a field that is not there, and for those that leave nothing."""
        for text in self.config.filter:
            name, *_ = parse_filter(text)
            lacking = [source for source in self.sources if fold(name) not in map(fold, source.columns)]
            if lacking and (self.config.missing == "drop" or len(lacking) == len(self.sources)):
                raise ValueError(f"--filter {text} names no field of {lacking[0].name}{lacking[0].fields()}")
        for source in self.sources:
            if not len(source):
                raise ValueError(f"--filter leaves no pictures in {source.name}{source.told}")

    def choose(self, source: Source) -> Sequence:
        """The numbers of the pictures of a source that belong to this split."""
        limit = self.config.limit
        held_out = self.config.held_out
        count = len(source)
        if limit:
            return range(min(count, limit))
        if source.endless and self.split == "val":
            return range(count, count + max(1, held_out))
        if source.endless or not held_out:
            return range(count)

        held = source.held(held_out / count)
        if not 0 < len(held) < count:               # neither split is empty
            self.warnings.append(f"{source.name}: {count} pictures, none to hold out; "
                                 "validating on them")
            return range(count)
        return held if self.split == "val" else Rest(count, held)

    def divide(self, source: Source, rows: Sequence) -> tuple[int, ...]:
        """Where the shards of a source begin among its pictures of this split, and their end: of a remote one
        in training, the others are as one. ValueError where the cache does not hold two blocks."""
        if not source.far or self.split == "val":
            return 0, len(rows)
        most = self.config.shuffle_shards
        sizes = [shard.files[0][1][0] for shard in source.parts]
        needed = min(2 * most, len(sizes)) * max(sizes) / 10**9
        if needed > self.config.shard_cache_size:
            raise ValueError(f"--shuffle-shards {most} of {source.name}: the cache must hold twice as many; "
                             f"give --shard-cache-size {needed:.3g}, or fewer")
        return tuple(bisect_left(rows, start) for start in source.starts)

    def block(self, chosen: int, visit: int) -> tuple[list[int], list[int]]:
        """The shards of the block that a visit to a source is in, and the visits at which each of them begins
        and the last one ends."""
        count = len(self.rows[chosen])
        most = self.config.shuffle_shards
        turn, index = divmod(visit, count)
        order, starts = arrange(self.bounds[chosen], f"{self.seed} {chosen} shards {turn}".encode())
        first = (bisect_right(starts, index) - 1) // most * most
        return order[first:first + most], [turn * count + start for start in starts[first:first + most + 1]]

    def coming(self, position: int, most: int = 2) -> list[Remote]:
        """The remote shards of the block of each source at a position in training, and of those behind it."""
        found = []
        for chosen, source in enumerate(self.sources):
            visit = position * self.weights[chosen] // sum(self.weights)
            for _ in range(most if source.far and self.split == "train" else 0):
                shards, starts = self.block(chosen, visit)
                found += [source.far[shard] for shard in shards]
                visit = starts[-1]
        return found

    def fetch_ahead(self, position: int) -> None:
        """Fetch the first that is missing of the coming shards, in a thread of which a process has one."""
        coming = self.coming(position)
        if coming and "fetch" not in [thread.name for thread in threading.enumerate()]:
            fetched = (remote.fetch(wait=False) for remote in coming)
            threading.Thread(target=any, args=(fetched,), name="fetch", daemon=True).start()

    def shards(self) -> list[str]:
        """The tar files of all sources, to be copied; ValueError where this is not all there is."""
        paths = []
        for source in self.sources:
            paths += source.shards() if isinstance(source, Files) else [source.name]
        names = {os.path.basename(path) for path in paths if path.endswith(".tar")}

        reasons = [line for line in self.warnings if "damaged after" in line]
        if self.config.limit or self.config.filter:
            reasons.append("there is a --limit or a --filter")
        if len(names) < len(paths):
            reasons.append("not all of it are tar shards with names of their own")
        if reasons:
            raise ValueError(f"--data is not whole: {reasons[0]}")
        return paths

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def enough(self) -> int:
        """After so many pictures the share of unreadable ones tells something of all: of remote shards after
        two blocks, since one that is away is more of its block than of the data."""
        enough = 1000
        for bounds in self.bounds:
            if len(bounds) > 2:
                enough = max(enough, 2 * bounds[-1] * self.config.shuffle_shards // (len(bounds) - 1))
        return enough

    def captions(self) -> Iterator[str]:
        """Every caption that can be drawn; of built-in pictures they do not end without --limit."""
        for source, rows in zip(self.sources, self.rows):
            for row in rows:
                with suppress(Exception):           # replaced and counted when it is drawn
                    yield from source.captions(int(row))

    def square(self, key: str, view: int, drawn: list[float], picture: bytes | np.ndarray,
               meta: dict) -> tuple[float, float, float]:
        """How much of its short side a picture keeps, and where the rest is cut, see decode: around all of
        its text, with a safebox; without one a picture with text is not cut."""
        config = self.config
        if config.crops:
            drawn = keyed(0, f"crop {key}", view % config.crops).random(3).tolist()
        if meta.get("safebox"):
            return self.text_square(picture, meta, drawn)
        uncut = 1.0, 0.5, 0.5
        if self.split == "val" or config.min_crop == 1:
            return uncut
        if transcribed(meta):
            if self.latents is not None:
                raise ValueError("it has text and is not cut, and --latent-cache has only its --crops")
            return uncut
        keep, right, down = drawn
        return 1 - keep * (1 - config.min_crop), right, down

    def text_square(self, picture: bytes | np.ndarray, meta: dict, drawn: list[float]) -> tuple:
        """The same around meta["safebox"]; meta["px_scale"]: how much the picture was enlarged already."""
        if self.latents is not None:
            raise ValueError("it has a safebox, which --latent-cache does not know")
        config = self.config
        first, *place = drawn
        chosen = None
        if self.split == "train" and first < config.text_crop:
            chosen = [first / config.text_crop, *place]
        size = lazy(picture).size
        least = self.size * max(1, np.max(meta.get("px_scale") or 1))
        left, top, side = around(size, meta["safebox"], least, config.text_area, chosen)
        width, height = (max(1, length - side) for length in size)
        return side / min(size), left / width, top / height

    def squares(self) -> Iterator[tuple[str, Callable]]:
        """The name of each square that can be shown, and a function that reads it."""
        for source, rows in zip(self.sources, self.rows):
            for row in map(int, rows):
                for view in range(max(1, self.config.crops)):
                    crop = self.square(source.key(row), view, [], b"", {})
                    yield f"{source.mark(row)} {crop}", partial(self.shown, source, row, crop)

    def shown(self, source: Source, row: int, crop: tuple) -> np.ndarray:
        picture, *_ = source.sample(row)
        return decode(picture, self.size, *crop, self.config.min_size)

    def __getitem__(self, position: int) -> dict:
        """{"position", "picture", "lowres" (see views), "caption", "key", "replaced", "words", and
        "recoded", whether the encoding of its caption was guessed}.
        A picture that cannot be read is replaced by another one of its source, by keys again: no
        other position changes; "replaced" lists f"{key}: {reason}". "words" is the reader's entry.
        Raises ValueError after MAX_TRIES."""
        # Which source, and how often it was asked before.
        chosen, visit = interleave(position, self.weights)
        source = self.sources[chosen]
        source.embedded = self.embedded
        rows = self.rows[chosen]
        turn = visit // len(rows)                   # passes over it

        # Shuffled within a block of shards, whose key is the pass and how far into it the block begins;
        # local data is a single block.
        shards, starts = self.block(chosen, visit)
        if self.split == "train":
            first, *_, last = starts
            key = f"{self.seed} {chosen} {Fraction(first, len(rows))}"
            visit = first + permute(visit - first, last - first, key.encode())

        rng = keyed(self.seed, self.split, position)
        *drawn, which = rng.random(4).tolist()
        replaced = []
        while len(replaced) < MAX_TRIES:
            place = bisect_right(starts, visit) - 1
            row = int(rows[self.bounds[chosen][shards[place]] + visit - starts[place]])
            key = source.key(row)
            try:
                picture, texts, meta = source.sample(row)
                crop = self.square(key, turn, drawn, picture, meta)
                written = transcribed(meta)
                if self.latents is not None:
                    latent, = self.latents[f"{source.mark(row)} {crop}"]
                    item = {"picture": latent.numpy()}
                else:
                    shown = decode(picture, self.size, *crop, self.config.min_size)
                    item = self.views(shown, position, bool(written or meta.get("safebox")))
                caption = texts[int(which * len(texts))] if texts else ""
                if self.config.shuffle_tags and self.split == "train":
                    first, *tags = caption.split(",")
                    keyed(self.seed, "tags", position).shuffle(tags)
                    caption = ",".join([first, *tags])
                embeddings = meta.get("embeddings", b"") if self.embedded else b""
                item |= self.texts(caption, embeddings, written)
            except Exception as error:              # decoders raise nearly anything on garbage
                replaced.append(f"{key}: {one_line(error)}")
                if len(replaced) % 4 == 0:                  # its whole block may be away
                    shards, starts = self.block(chosen, starts[-1])
                visit = int(rng.integers(starts[0], starts[-1]))
                continue

            item |= {"position": position, "key": key, "replaced": replaced, "recoded": RECODED in meta}
            return item
        raise ValueError(f"{source.name}: {MAX_TRIES} pictures in a row are unreadable, "
                         f"last {replaced[-1]}")

    def texts(self, caption: str, embeddings: bytes = b"", written: str = "") -> dict:
        """{"caption", "transcription"}, and with readers of them "words" and "letters", their entries;
        "uncaptioned", "overlong": whether one is empty, or cut."""
        item = {"caption": caption, "transcription": written, "uncaptioned": not caption, "overlong": False}
        if self.reader:
            item["words"] = self.reader.read(caption, embeddings)
        if self.transcriber:
            item["letters"] = self.transcriber.read(written)
            item["overlong"] = item["letters"]["cut"]
        return item

    def views(self, shown: np.ndarray, position: int, has_text: bool = False) -> dict:
        """{"picture", "lowres" with --lowres}: of the whole picture, cut at matching places."""
        config = self.config
        flipped = config.flip and not has_text and keyed(self.seed, "flip", position).random() < config.flip
        if flipped and self.split == "train":
            shown = np.ascontiguousarray(shown[:, :, ::-1])
        if (config.lowres, config.crop, config.picture_mode) == (0, 0, "colour"):
            return {"picture": shown}                           # as it is

        rng = keyed(self.seed, f"{self.split} view", position)
        right, down, blurred, sigma = rng.random(4).tolist()
        image = Image.fromarray(shown.transpose(1, 2, 0))
        views = {"picture": image.convert(MODES[config.picture_mode])}

        if config.lowres:
            small = shrink(image, config.lowres).convert(MODES[config.lowres_mode])
            share, *sigmas = config.blur
            if self.split == "train" and blurred < share:
                radius = float(np.interp(sigma, (0, 1), sigmas))
                small = small.filter(ImageFilter.GaussianBlur(radius))
            views["lowres"] = small

        cells = config.lowres or self.size                      # the places where a crop may begin
        side = (config.crop or self.size) * cells // self.size
        room = cells - side + 1
        left = int(right * room)
        top = int(down * room)

        for name, view in views.items():
            cell = view.width // cells
            box = [cell * edge for edge in (left, top, left + side, top + side)]
            views[name] = array(view.crop(box))
        return views

    def batch(self, items: list[dict]) -> dict:
        """Of items "picture", maybe "lowres", uint8 (B, channels, H, W), with what the reader and
        `draws` make of them, and the lists "captions", "transcriptions", "positions" and "keys"; of
        some of them, to be told, "replaced", "uncaptioned", "recoded" and "overlong", whose transcriptions
        are cut: reasons or keys."""
        def column(name):
            return [item[name] for item in items]

        batch = {name: np.stack(column(name)) for name in ("picture", "lowres") if name in items[0]}
        for name in ("caption", "transcription", "position", "key"):
            batch[f"{name}s"] = column(name)
        batch["replaced"] = list(chain(*column("replaced")))
        for name in ("uncaptioned", "recoded", "overlong"):
            batch[name] = [item["key"] for item in items if item[name]]
        if self.reader:
            batch |= self.reader.batch(column("words"))
        if self.transcriber:
            letters = self.transcriber.batch(column("letters"))
            batch |= {f"transcription_{name}": array for name, array in letters.items()}
        if self.draws:
            batch |= self.draws(batch["positions"])
        return batch


def collect(dataset: Pictures, first: int, last: int) -> dict:
    """The batch of positions first..last-1."""
    dataset.fetch_ahead(first)
    return dataset.batch([dataset[position] for position in range(first, last)])


# ------------------------------------------------------------------------------------------ workers
def pour(move: Callable, pipe, array: np.ndarray) -> None:
    """All bytes of an array through a pipe, by os.writev or os.readv."""
    left = array.reshape(-1).view(np.uint8)
    while len(left):
        count = move(pipe.fileno(), [left])
        if not count:
            raise EOFError
        left = left[count:]


def send(pipe, batch: dict) -> None:
    """A batch into a pipe: its arrays as they lie, behind their shapes and all else. Within a message they
    would be copied three times, by a trainer that has better things to do."""
    shapes = {}
    for name, value in batch.items():
        if isinstance(value, np.ndarray) and hasattr(os, "readv"):          # Windows has none
            shapes[name] = value.shape, value.dtype
    pipe.send((batch | shapes, [*shapes]))
    for name in shapes:
        pour(os.writev, pipe, batch[name])


def work(ours, pipe, dataset: Pictures, firsts, share, stop) -> None:
    """A worker process: its batches into a pipe, which holds each back until it is wanted."""
    ours.close()                            # or it would not break when the trainer is gone
    ignore_signals()                        # where they could not be blocked
    torch.set_num_threads(1)                # a forked process has no thread pool
    with suppress(BrokenPipeError):         # the trainer is gone
        try:
            for first in firsts:
                send(pipe, collect(dataset, first, min(first + share, stop)))
        except ValueError as error:
            pipe.send((error, []))


def start_worker(*job) -> tuple:
    """A process at work on (dataset, firsts, share, stop), and our end of its pipe."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work, args=(ours, theirs, *job), daemon=True)

    # Workers inherit blocked signals: only the trainer handles SIGTERM and Ctrl-C.
    change = getattr(signal, "pthread_sigmask", lambda how, signals: signals)   # Windows has none
    before = change(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        process.start()
    finally:
        change(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def receive(process, pipe, timeout: float) -> dict:
    """The next batch of a worker, or what it ended with."""
    if not pipe.poll(timeout):
        raise TimeoutError(f"a data worker gave nothing for {timeout:g} s; is the disk there? "
                           "Raise --timeout, or use more --workers")
    try:
        batch, names = pipe.recv()
        for name in names:
            batch[name] = np.empty(*batch[name])
            pour(os.readv, pipe, batch[name])
    except (EOFError, OSError):             # between two messages, or within one
        process.join()
        raise ChildProcessError(f"a data worker died (exit code {process.exitcode}, -9 is no "
                                "memory); use fewer --workers or a smaller --batch-size") from None
    if isinstance(batch, Exception):
        raise batch
    return batch


def loader(dataset: Pictures, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1,
           workers: int = 0, timeout: float = 600, pin: bool = False) -> Iterator[dict]:
    """Batches of start..stop-1: those of Pictures.batch, with each array as a tensor.
    Rank r gets the r-th contiguous block of each global batch, B = batch_size / world. Workers have
    a pipe each, read in turn by a thread, a batch ahead: the same for any number. They are forked,
    safe as they touch neither CUDA nor torch's threads, and send numpy, not shared memory, which
    containers ration. `pin` page-locks tensors. close() it. ValueError above --max-bad,
    ChildProcessError of a dead worker, TimeoutError after `timeout` [seconds]."""
    share = batch_size // world
    firsts = range(start + rank * share, stop, batch_size)
    team = []
    thread = ThreadPoolExecutor(1)          # receives a batch while the one before it is in use

    def end():
        for process, _ in team:
            process.kill()                  # SIGTERM is blocked there, and a kill is safe
            process.join()
        thread.shutdown()
    atexit.register(end)

    def fetch(turn):
        first = firsts[turn]
        if workers:
            batch = receive(*team[turn % workers], timeout)
        else:
            batch = collect(dataset, first, min(first + share, stop))
        for name, value in batch.items():
            if isinstance(value, np.ndarray):
                tensor = torch.from_numpy(value)
                batch[name] = tensor.pin_memory() if pin else tensor
        return batch

    seen = bad = 0
    enough = dataset.enough()
    try:
        coming = dataset.coming(start, 1)           # before any worker is waited for
        for _ in watched(map(Remote.fetch, coming), "shards", len(coming)):
            pass

        for worker in range(workers):
            team.append(start_worker(dataset, firsts[worker::workers], share, stop))

        ahead = thread.submit(fetch, 0) if workers else None
        for turn in range(len(firsts)):
            batch = ahead.result() if ahead else fetch(turn)
            if workers:
                ahead = thread.submit(fetch, turn + 1)

            seen += len(batch["keys"]) + len(batch["replaced"])
            bad += len(batch["replaced"])
            if bad > dataset.config.max_bad * max(seen, enough):
                last = batch["replaced"][-1]
                raise ValueError(f"{bad} of {seen} pictures are unreadable (last: {last}); "
                                 f"--max-bad {dataset.config.max_bad} allows fewer")
            yield batch
    finally:
        end()
        atexit.unregister(end)


# ------------------------------------------------------------------------------------- pictures out
def side_by_side(*views: Tensor) -> Tensor:
    """Pictures, each uint8 (B, 3 or 1, H, W), in a row: uint8 (B, channels, H, W of all).
    Smaller ones are enlarged to the largest by repeating pixels, grey ones get colours where
    another one has them."""
    channels, *sides = np.max([view.shape[1:] for view in views], 0).tolist()

    row = []
    for view in views:
        large = F.interpolate(view.cpu(), sides, mode="nearest")
        row.append(large.expand(-1, channels, -1, -1))
    return torch.cat(row, 3)


font = cache(ImageFont.load_default)


def contact_sheet(pictures: Tensor | np.ndarray, captions: list[str],
                  columns: int = 4) -> Image.Image:
    """One picture of many, uint8 (N, 3 or 1, H, W), each with its caption wrapped below it, see labels."""
    n, _, height, width = pictures.shape
    scale = max(1, 128 // height)                               # small pictures are shown larger
    height *= scale
    width *= scale
    columns = min(columns, n)
    lines = []
    for label in captions:
        caption, *written = label.split("\n")
        wrapped = textwrap.wrap(caption, max(8, width // 6))
        lines.append([*wrapped[:3], *written] or ["(no caption)"])

    gap = 8
    wide = width + gap
    high = height + gap + 14 * max(map(len, lines))
    rows = math.ceil(n / columns)
    sheet = Image.new("RGB", (gap + columns * wide, gap + rows * high), "white")
    pen = ImageDraw.Draw(sheet)

    tiles = np.asarray(pictures).repeat(scale, 2).repeat(scale, 3)
    tiles = np.broadcast_to(tiles, (n, 3, height, width)).transpose(0, 2, 3, 1)
    for i, tile in enumerate(tiles):
        left = gap + i % columns * wide
        top = gap + i // columns * high
        sheet.paste(Image.fromarray(tile), (left, top))
        text = "\n".join(lines[i])
        pen.text((left, top + height + 1), text, "black", font(11), spacing=1)
    return sheet


def put(path: Path, content: dict | Image.Image, warn: Callable) -> None:
    """Append a line to a log, or write a picture; a full disk is a warning: training goes on."""
    try:
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            with open(path, "a", encoding="utf-8") as log:
                log.write(json.dumps(content) + "\n")
    except OSError as error:
        warn(f"warning: {path} not written ({error.strerror}); training continues")


def claim(path: Path) -> Path:
    """Create NAME, NAME-2, NAME-3, ...: the first that nobody has, cut to the 255 bytes of a name."""
    number = 1
    ending = path.suffix
    while True:
        stem = path.stem
        while stem and len(os.fsencode(stem + ending)) > 255:
            stem = stem[:-1]
        free = path.with_name(stem + ending)
        try:
            free.touch(exist_ok=False)
            return free
        except FileExistsError:
            number += 1
            ending = f"-{number}{path.suffix}"


def save_png(image: Image.Image, path: Path, notes: dict, warn: Callable,
             replace: bool = False) -> Path:
    """Write a picture with its notes inside, whole or not at all; returns where.
    To the temporary folder if `path` fails, OSError if both do. Nothing is overwritten, see claim,
    but `path` itself with `replace`."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("limn", json.dumps(notes))
    spare = Path(tempfile.gettempdir(), path.name)

    for wanted in (path, spare):
        unfinished = wanted.with_name(f".tmp-{os.getpid()}-picture")
        try:
            image.save(unfinished, "PNG", pnginfo=info)
            given = replace and wanted == path
            return unfinished.replace(path if given else claim(wanted))
        except OSError as error:
            if wanted == spare:
                raise
            warn(f"cannot write {path} ({error.strerror or error}); writing {spare} instead")
        finally:
            unfinished.unlink(missing_ok=True)


# -------------------------------------------------------------------------------- built-in pictures
def rgb(colours: str) -> dict:
    """The colours by their names, each behind its name."""
    words = iter(colours.split())
    return {name: ImageColor.getrgb(next(words)) for name in words}


COLOURS = rgb("red #d8222c orange #f68216 yellow #fcd624 green #2e9842 blue #225cd6 purple #7e34ac "
              "pink #fa84b8 brown #7a4a28 white #fafaf8 black #24242a")
GROUNDS = rgb("white #f6f5f0 yellow #fde896 green #acdca0 black #2e3248 blue #a0d0f4 pink #fac6d8 "
              "purple #d0bcec grey #acb0b8")
TONES = rgb("ink #282832 snow #fcfcfa wood #845634 leaf #3e8c46 glass #c4e6fa cream #fcecc4 "
            "rose #f496a0 flame #ffbe3c")
SPECIAL = {                                 # darkened, yellow looks green; details of the rest
    "yellow": rgb("shade #f0ba1e"),
    "white": rgb("shade #d6d6d4 tint #e0e0de snow #b4b4b2"),
    "black": rgb("shade #424248 tint #78787e ink #707076"),
}
ENDLESS = 2**40                                            # pictures to train on
SIZES = {"small": 0.25, "": 0.34, "large": 0.42}           # half a thing's side, of the picture's
PLACES = {"in the middle": "0 0", "at the top": "0 -1", "at the bottom": "0 1", "on the left": "-1 0",
          "on the right": "1 0", "at the top left": "-1 -1", "at the top right": "1 -1",
          "at the bottom left": "-1 1", "at the bottom right": "1 1"}               # x and y
RELATIONS = {"left of": ("right of", -1, 0), "right of": ("left of", 1, 0),         # its reverse, x, y
             "above": ("below", 0, -1), "below": ("above", 0, 1)}
WORDS = ("ART BAR CAFE FOOD GO HELLO HOME ICE JAZZ KEY LOVE MAP MOON OPEN PARK PIZZA SHOP STOP TAXI TEA "
         "WOW YES ZOO")
Thing = namedtuple("Thing", "kind colour x y half")         # centre, half its side, of the picture's
Scene = namedtuple("Scene", "things background size place relation word", defaults=("", "", "", ""))

# A thing fills the square -100..100, y down: shape, tone, coordinates; + draws it again with x
# mirrored. Tones: its own colour (main), a shade and a tint of it, the background (ground), TONES.
KINDS = {
    "house": "box shade 42 -88 68 -20, poly shade -100 -18 0 -96 100 -18, box main -78 -20 78 94, "
        "box+ glass 26 8 58 42, box shade -16 32 16 94",
    "tree": "box wood -15 20 15 96, oval+ main -16 -50 92 50, oval main -60 -98 60 16, "
        "oval tint -34 -76 2 -46, oval shade 28 -6 60 24",
    "car": "poly main -66 4 -42 -62 36 -62 72 4, round main -100 -10 100 50, "
        "poly glass -46 -8 -30 -46 -4 -46 -4 -8, poly glass 8 -8 8 -46 28 -46 50 -8, oval+ ink 20 20 76 76, "
        "oval+ snow 37 37 59 59",
    "boat": "box wood -6 -94 6 40, poly main 10 -96 10 18 86 18, poly tint -10 -76 -10 18 -70 18, "
        "poly main -100 32 100 32 62 92 -62 92, poly shade -100 32 100 32 90 48 -90 48",
    "sun": "poly shade 0 -100 100 0 0 100 -100 0, poly+ shade 50 -87 87 50 -50 87 -87 -50, "
        "oval main -72 -72 72 72, oval ink -38 6 38 50, oval main -50 -20 50 28, oval+ ink 14 -28 34 4",
    "flower": "box leaf -7 10 7 98, oval leaf -58 56 -2 80, oval leaf 2 68 58 92, oval main -30 -100 30 -40, "
        "oval+ main 6 -79 66 -19, oval+ main 6 -37 66 23, oval main -30 -16 30 44, oval cream -24 -52 24 -4",
    "fish": "poly shade 36 0 98 -56 80 0 98 56, poly shade -40 -40 0 -86 34 -30, oval main -98 -56 60 56, "
        "oval snow -74 -30 -42 2, oval ink -66 -22 -50 -6, poly shade -10 -12 24 6 -10 24",
    "star": "poly main 0 -98 27 -31 99 -26 44 20 61 90 0 52 -61 90 -44 20 -99 -26 -27 -31, "
        "poly tint 0 -40 12 -10 44 -8 19 12 27 43 0 26 -27 43 -19 12 -44 -8 -12 -10",
    "heart": "oval+ main -6 -88 98 16, poly main -85 -1 0 94 85 -1 0 -60, oval tint -70 -64 -38 -28",
    "moon": "oval main -95 -95 95 95, oval ground -32 -76 98 54, oval shade -80 -20 -56 4, "
        "oval shade -58 36 -34 60",
    "mushroom": "oval main -100 -92 100 112, box ground -100 10 100 114, round cream -30 -2 30 94, "
        "oval+ snow 32 -36 66 -2, oval snow -18 -76 18 -42",
    "balloon": "poly ink -3 40 3 40 10 68 1 99 -5 99 3 68, poly shade 0 30 16 56 -16 56, "
        "oval main -68 -98 68 44, oval tint -42 -76 -12 -34",
    "cup": "oval main 20 -30 98 50, oval ground 40 -10 78 30, poly main -82 -50 56 -50 40 90 -66 90, "
        "oval shade -82 -68 56 -32, oval wood -70 -62 44 -38",
    "cat": "poly+ main 86 -98 90 20 10 -40, poly+ rose 74 -68 74 -30 44 -46, oval main -94 -54 94 92, "
        "oval+ snow 16 -20 56 22, oval+ ink 26 -16 44 20, poly rose -16 32 16 32 0 52",
    "rocket": "poly flame -24 50 24 50 0 100, poly+ shade 36 0 74 72 30 56, "
        "poly main 0 -100 24 -70 38 -30 40 10 32 60 -32 60 -40 10 -38 -30 -24 -70, oval snow -26 -40 26 12, "
        "oval glass -18 -32 18 4",
    "butterfly": "oval+ main 4 -86 100 12, oval+ main 4 -6 82 86, oval+ tint 36 -60 74 -20, "
        "oval+ shade 28 24 58 56, oval ink -11 -70 11 80",
    "sign": "box wood -9 20 9 98, round shade -100 -72 100 40, round main -93 -65 93 33",
}
# Where things have room for letters: its centre, and half of its width and height; "" is a plain ground.
ROOM = {"sign": (0, -16, 88, 45), "cup": (-13, 20, 58, 56), "balloon": (0, -4, 52, 40), "": (0, 0, 92, 80)}
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"            # without 0 and 1, which are as O and I


def choose(draw: Callable, names: Iterable, *but):
    """One of the names, without some; draw(count) -> a number below it."""
    left = [name for name in names if name not in but]
    return left[draw(len(left))]


@lru_cache(64)
def scene(index: int) -> Scene:
    """The scene of a built-in picture, by its index alone: 81% one thing, 15% two, 4% a sign."""
    draws = iter(keyed(0, "scene", index).random(16).tolist())
    pick = partial(choose, lambda count: int(next(draws) * count))

    def near(x):
        return x + 0.02 * (2 * next(draws) - 1)

    layout = next(draws)
    kind = pick(KINDS, "sign")
    colour = pick(COLOURS)

    if layout < 0.15:
        relation = pick(RELATIONS)
        _, right, down = RELATIONS[relation]
        x = 0.24 * right
        y = 0.24 * down
        other = pick(KINDS, "sign", kind)
        other_colour = pick(COLOURS, colour)
        first = Thing(kind, colour, near(0.5 + x), near(0.5 + y), near(0.22))
        second = Thing(other, other_colour, near(0.5 - x), near(0.5 - y), near(0.22))
        background = pick(GROUNDS, colour, other_colour)
        return Scene((first, second), background, relation=relation)

    background = pick(GROUNDS, colour)
    if layout < 0.19:
        sign = Thing("sign", colour, near(0.5), near(0.5), near(0.42))
        return Scene((sign,), background, word=pick(WORDS.split()))

    size = pick(("large", "large", "large", "", "", "small"))
    place = "in the middle"
    if next(draws) >= 0.4 and size != "large":
        place = pick(PLACES)
    right, down = map(int, PLACES[place].split())
    half = near(SIZES[size])
    room = 0.46 - half
    only = Thing(kind, colour, near(0.5 + right * room), near(0.5 + down * room), half)
    return Scene((only,), background, size, place)


@lru_cache(64)
def lettered(index: int) -> Scene:
    """The scene of a picture of words, by its index alone: a sign, cup, balloon or plain ground, with one or
    two lines of 1 to 8 characters (up to 5 on a cup or balloon), or 1 in 5 with none. An eighth of the words
    of 3 characters or more is shown from index ENDLESS on alone, and there no others are."""
    rng = keyed(0, "words", index)
    pick = partial(choose, rng.integers)
    kind = pick(ROOM)
    colour = pick(COLOURS, "purple")                       # on which no ink is seen well
    lines = []
    for _ in range(pick((0, 1, 1, 1, 2))):
        length = rng.integers(1, 9 if kind in ("sign", "") else 6)
        wanted = index >= ENDLESS
        unseen = not wanted
        while unseen != wanted:
            word = "".join(ALPHABET[i] for i in rng.integers(len(ALPHABET), size=length))
            unseen = zlib.crc32(word.encode()) % 8 == 0 if length > 2 else wanted
        lines.append(word)
    x, y, half = (0.5 + 0.02 * rng.uniform(-1, 1, 3)).tolist()
    things = (Thing(kind, colour, x, y, half - 0.08),) if kind else ()
    return Scene(things, pick(GROUNDS, colour), place="in the middle", word="\n".join(lines))


def a(words: str) -> str:
    """The words behind their article."""
    return ("an " if words[0] in "aeio" else "a ") + words


def captions(scene: Scene) -> list[str]:
    """True captions of a scene, from short to full, each at most 96 bytes."""
    first, *others = scene.things
    name = a(f"{first.colour} {first.kind}")
    ground = f"on {a(scene.background)} background"

    if scene.word:
        return [f'a sign with the word "{scene.word}"', f'{name} that says "{scene.word}"',
                f'{name} with the word "{scene.word}" {ground}']

    if others:
        second = others[0]
        other = a(f"{second.colour} {second.kind}")
        reverse, _, _ = RELATIONS[scene.relation]
        full = f"{name} {scene.relation} {other}"
        return [f"a {first.kind} {scene.relation} a {second.kind}", full,
                f"{other} {reverse} {name}", f"{full} {ground}"]

    sized = f"{scene.size} {first.colour} {first.kind}".strip()
    placed = f"{a(sized)} {scene.place}"
    return [f"a {first.kind}", name, f"{name} {ground}", placed, f"{placed} {ground}"]


def tones_of(thing: Thing, ground: str) -> dict:
    """The colours by the names that KINDS has for them."""
    main = COLOURS[thing.colour]
    shade = tuple(v * 4 // 5 for v in main)
    tint = tuple(v // 2 + 127 for v in main)
    tones = {"main": main, "ground": GROUNDS[ground], "shade": shade, "tint": tint}
    return tones | TONES | SPECIAL.get(thing.colour, {})


def draw_thing(pen, thing: Thing, side: int, ground: str) -> None:
    """A thing on a canvas of so many pixels and that ground."""
    tones = tones_of(thing, ground)
    unit = thing.half * side / 100
    centre_x = thing.x * side - 0.5         # the centre of a pixel is a whole number
    centre_y = thing.y * side - 0.5
    shapes = {"poly": pen.polygon, "box": pen.rectangle, "oval": pen.ellipse,
              "round": partial(pen.rounded_rectangle, radius=18 * unit)}

    for line in KINDS[thing.kind].split(","):
        shape, tone, *corners = line.split()
        for mirror in (1, -1) if shape.endswith("+") else (1,):
            xs = [centre_x + mirror * unit * int(x) for x in corners[::2]]
            ys = [centre_y + unit * int(y) for y in corners[1::2]]
            if not shape.startswith("poly"):
                xs.sort()                   # a mirrored box goes from left to right, too
            points = list(zip(xs, ys))
            shapes[shape.strip("+")](points, fill=tones[tone])


def letters(scene: Scene) -> list[tuple[str, float, float, float]]:
    """Each letter that is written on the only thing of a scene, or its ground: the letter, x and y of its
    centre, and the step to the next one, of the picture's side."""
    *_, thing = Thing("", "", 0.5, 0.5, 0.5), *scene.things
    right, down, wide, high = ROOM[thing.kind]
    lines = scene.word.split("\n")
    step = min(50, 2 * wide / max(map(len, lines)), 1.5 * high / len(lines))
    unit = thing.half / 100
    found = []
    for row, line in enumerate(lines):
        y = thing.y + unit * (down + 1.25 * step * (row - (len(lines) - 1) / 2))
        for i, letter in enumerate(line):
            x = thing.x + unit * (right + step * (i - (len(line) - 1) / 2))
            found.append((letter, x, y, unit * step))
    return found


def draw_word(scene: Scene) -> Image.Image:
    """What is written, white on black on 1024 pixels: there a letter stands on whole ones."""
    sheet = Image.new("L", (1024, 1024))
    pen = ImageDraw.Draw(sheet)
    for letter, x, y, step in letters(scene):       # one by one: no shaping library changes the picture
        pen.text((1024 * x, 1024 * y), letter, 255, font(round(1280 * step)), anchor="mm")
    return sheet


def draw(scene: Scene, size: int) -> np.ndarray:
    """A scene, uint8 (3, size, size): drawn larger, reduced by shrink, everywhere the same."""
    side = size * (4 if size <= 256 else 2)
    below = GROUNDS[scene.background]
    canvas = Image.new("RGB", (side, side), below)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        draw_thing(pen, thing, side, scene.background)
        below = COLOURS[thing.colour]

    if scene.word:
        ink = TONES["snow" if sum(below) < 350 else "ink"]
        canvas.paste(ink, mask=shrink(draw_word(scene), side))
    return array(shrink(canvas, size))


class BuiltIn(Source):
    """Scenes without end, drawn at the side that is wanted [pixels]."""
    name = "built-in pictures"
    endless = True

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return ENDLESS

    def sample(self, i):
        return Sample(draw(scene(i), self.size), self.captions(i), {})

    def captions(self, i):
        return captions(scene(i))

    def key(self, i):
        return f"built-in/{i}"

    def fingerprint(self):
        return b"version 3"


class Words(BuiltIn):
    """Scenes with words, which the metadata has, with the box around them; the captions do not say them."""
    name = "words"
    said = ""
    key = Source.key

    def sample(self, i):
        meta = {}
        shown = lettered(i)
        if shown.word:
            places = np.array([place for _, *place in letters(shown)])
            centres, steps = places[:, :2], places[:, 2:]
            edges = (centres - 0.75 * steps).min(0), (centres + 0.75 * steps).max(0)    # of the widest letter
            box = self.size * np.concatenate(edges).clip(0, 1)
            meta = {"transcription": shown.word, "safebox": box.tolist()}
        return Sample(draw(shown, self.size), self.captions(i), meta)

    def captions(self, i):
        shown = lettered(i)
        plain = f"{shown.background} background"
        texts = [a(plain), a(f"plain {plain}")]
        if shown.things:
            texts = captions(shown._replace(word=""))
        word = shown.word.replace("\n", " ")
        return [f"{text}{self.said.format(word)}" if word else text for text in texts]

    def fingerprint(self):
        return f"{self.name} 1".encode()


class QuotedWords(Words):
    """The same, whose captions say what is written."""
    name = "quoted-words"
    said = ' that says "{}"'


# What --data knows by name; the rest is Files.
SOURCES = {
    "built-in": BuiltIn,
    "words": Words,
    "quoted-words": QuotedWords,
}


# ---------------------------------------------------------------------------------------- the check
def spread(content: bytes, texts: list[str]) -> list[float]:
    """Of each caption that a KEY.t5.safetensors has, the standard deviation of its embedding's numbers."""
    names = header_of(io.BytesIO(content))["__metadata__"]["fingerprint"].split(" ")
    deviations = []
    for first in range(len(names)):                 # of several encoders, that of the last ends the names
        cache = Cache("KEY.t5.safetensors", " ".join(names[first:]), content)
        for text in texts:
            if cache.key(text) in cache.found:
                deviations.append(float(cache[text][0].float().std()))
    return deviations


def told_of(text: str, readers: list[tuple]) -> Iterator[tuple]:
    """Name and number of what text encoders make of a caption; numbered where they are several. readers: of
    each its reader, see Pictures, and its Cache, or None."""
    for number, (reader, known) in enumerate(readers, 1):
        which = f" of encoder {number}" if len(readers) > 1 else ""
        reader.counts.clear()
        entry = reader.read(text)
        yield f"tokens{which}", len(entry["ids"])
        yield f"unknown tokens{which}", reader.counts["unknown"]
        yield f"captions cut{which}", entry["cut"]
        if known:
            cached = known.key(text) in known.found
            yield f"not in the cache{which}", not cached
            if cached:
                yield f"deviation in the cache{which}", float(known[text][0].float().std())


def facts(sample: Sample, square: np.ndarray) -> Iterator[tuple]:
    """Name and number of what can be counted of a picture; square: itself, uint8 (3, 64, 64)."""
    stored, texts, meta = sample
    width, height = lazy(stored).size
    yield "width", width
    yield "height", height
    yield "captions", len(texts)
    yield "without caption", not texts
    yield "near-black", square.mean() < 8
    yield "of one colour", np.ptp(square) < 8
    embeddings = meta.pop("embeddings")
    yield "without embeddings", not embeddings
    if embeddings:
        deviations = spread(embeddings, texts)
        yield "embeddings of other captions", len(deviations) < len(texts)
        if deviations:
            yield "deviation of embeddings", sum(deviations) / len(deviations)
    yield "not UTF-8", meta.pop(RECODED, False)
    if texts:
        yield "bytes of a caption", max(len(text.encode()) for text in texts)
    for name, value in meta.items():
        yield f"metadata {printable(name)}", number_of(value)


def survey(pictures: Pictures, readers: list, most: int) -> tuple[dict, list[str], list]:
    """{name: [count, least, sum, largest]} of facts of all pictures, or of about `most`, evenly spread, and
    of what text encoders make of their captions; why some are unreadable; up to 16 squares with captions."""
    table = {}
    reasons = []
    tiles = []
    seen = set()
    step = max(1, len(pictures) // most) if most else 1
    for source, rows in zip(pictures.sources, pictures.rows):
        source.embedded = True
        for i in watched(range(0, len(rows), step), source.name):
            row = int(rows[i])
            try:
                sample = source.sample(row)
                square = decode(sample.picture, 64, least=pictures.config.min_size)
                found = [("unreadable", 0), *facts(sample, square)]
                texts = sample.captions
            except Exception as error:              # decoders raise nearly anything on garbage
                found = [("unreadable", 1)]
                texts = []
                reasons.append(f"{source.key(row)}: {one_line(error)}")
            else:
                found.append(("caption of another", not seen.isdisjoint(texts)))
                seen.update(texts)
                if len(tiles) < 16:
                    tiles.append((square, "; ".join(texts)))

            for name, value in chain(found, *(told_of(text, readers) for text in texts)):
                if value == value:                  # a word is none
                    count, least, total, largest = table.get(name, (0, value, 0, value))
                    table[name] = count + 1, min(least, value), total + value, max(largest, value)
    return table, reasons, tiles


def report(config: DataConfig, most: int, readers: list[tuple]) -> int:
    """Print and write what `survey` finds; 1 where more than --max-bad are unreadable, else 0."""
    pictures = Pictures(replace(config, held_out=0, shuffle_shards=1), 64, 0)
    if any(source.endless for source in pictures.sources):
        raise ValueError("--check built-in has no end; give folders, tars, patterns")
    table, reasons, tiles = survey(pictures, readers, most)

    print(pictures.summary, *pictures.warnings, *reasons[:10], sep="\n")
    print(f"{'':32}{'counted':>12}{'least':>12}{'mean':>12}{'largest':>12}")
    for name, (count, least, total, largest) in table.items():
        print(f"{name:32}{count:12}{least:12.5g}{total / count:12.5g}{largest:12.5g}")
    found = {"summary": pictures.summary, "warnings": pictures.warnings, "table": table,
             "unreadable": reasons}
    Path("check.json").write_text(json.dumps(found, indent=1, default=float))
    if tiles:
        squares, texts = zip(*tiles)
        contact_sheet(np.stack(squares), texts).save("check.png")
    count, *_ = table["unreadable"]
    return int(len(reasons) > config.max_bad * count)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("data.py", argument_default=argparse.SUPPRESS,
                                     description="What is in pictures: a table, check.json and check.png.")

    def error(message):
        raise ValueError(f"{message}. See --help")

    parser.error = error
    flag = parser.add_argument
    flag("--check", nargs="+", required=True, dest="data", help="as of --data")
    flag("--filter", nargs="*", help="as of train.py")
    flag("--missing", choices=("drop", "keep"), help="as of train.py")
    for name in ("caption-key", "class-names", "shard-cache"):
        flag(f"--{name}", help="as of train.py")
    flag("--max-bad", type=float, help="status 1 above this share of unreadable ones [0..1]")
    flag("--sample", type=int, default=0, help="how many are looked at, 0 = all [images]")
    options = vars(parser.parse_args(argv))
    most = options.pop("sample")
    return report(DataConfig(**options), most, [])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"data.py: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
