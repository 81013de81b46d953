"""Pictures in: built-in pictures, folders and tar shards; decoding, captions, and the order of the data.

Every random choice is a pure function of (seed, purpose, position), so the stream has no state: position p
shows the same picture, crop and caption for any number of ranks and workers, and to resume is to start at p.
Letters: H W pixels, B pictures in a batch, N pictures in a source.  Pictures are uint8 (3, H, W), RGB."""
import atexit
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, lru_cache, partial
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")     # beside pictures, only .txt and .json are read
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")             # by content: other parsers are out of reach
MAX_PIXELS = 64 * 2**20                   # a larger picture is refused before decoding
MAX_TRIES, MAX_CAPTION = 20, 2000         # unreadable pictures in a row; a longer caption is cut [characters]
ENDLESS = 2**40              # built-in pictures
VIEWS, MODES = ("picture", "lowres"), {"colour": "RGB", "grey": "L"}    # a channel a letter


@dataclass
class DataConfig:
    data: list[str] = field(default_factory=list)  # folders, tars, patterns: PATH or PATH:WEIGHT; or built-in
    limit: int = 0  # use only the first so many pictures of each source, 0 = all [images]
    held_out: int = 1024  # kept for validation, at most 1 in 20 of a source, none with --limit [images]
    min_crop: float = 1.0  # smallest part of the short side a random crop keeps, 1 = all, centred [0..1]
    max_bad: float = 0.05  # largest share of unreadable pictures before training stops [0..1]
    min_size: int = 8  # a picture that gives a smaller square is refused before decoding [pixels]
    picture_mode: Literal["colour", "grey"] = "colour"  # of the pictures, 3 channels or 1
    lowres: int = 0  # side of the small pictures that the stage enlarges, 0 = a base stage [pixels]
    lowres_mode: Literal["colour", "grey"] = "colour"  # of the small pictures; grey: the stage colours them
    blur: tuple[float, ...] = (0.0, 0.4, 0.6)  # share of the small pictures that is blurred; sigmas [pixels]
    crop: int = 0  # side of the square, anywhere in a picture, to train on, 0 = the whole [pixels]


# ---------------------------------------------------------------------------------- the order of the data
def keyed(seed: int, purpose: str, position: int) -> np.random.Generator:
    """A random generator that is a pure function of its arguments: Philox under a 128-bit BLAKE2b key."""
    digest = hashlib.blake2b(f"{seed} {purpose} {position}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def permute(index: int, n: int, key: bytes) -> int:
    """Where the permutation of 0..n-1 under a key (up to 64 bytes) sends `index`: no state, no table. A
    Feistel network (Luby and Rackoff 1988), walked along its cycle until below n (Black and Rogaway 2002)."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & (1 << half) - 1
        for turn in range(6):
            digest = hashlib.blake2b(f"{turn} {right}".encode(), key=key, digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest, "little") & (1 << half) - 1
        index = left << half | right
        if index < n: return index


def interleave(position: int, weights: list[int]) -> tuple[int, int]:
    """The source that serves a position, and how often it has before: shares are exact within one all along.
    Of the first p positions a source of share w takes floor(p w), the others share the rest in that way."""
    total = sum(weights)
    for source, weight in enumerate(weights):               # the last one takes all that are left
        before = position * weight // total
        if (position + 1) * weight // total > before: return source, before
        position, total = position - before, total - weight


# -------------------------------------------------------------------------------------- built-in pictures
COLOURS = {"red": (216, 34, 44), "orange": (246, 130, 22), "yellow": (252, 214, 36), "green": (46, 152, 66),
           "blue": (34, 92, 214), "purple": (126, 52, 172), "pink": (250, 132, 184), "brown": (122, 74, 40),
           "white": (250, 250, 248), "black": (36, 36, 42)}
GROUNDS = {"white": (246, 245, 240), "yellow": (253, 232, 150), "green": (172, 220, 160),
           "black": (46, 50, 72), "blue": (160, 208, 244), "pink": (250, 198, 216),
           "purple": (208, 188, 236), "grey": (172, 176, 184)}
TONES = {"ink": (40, 40, 50), "snow": (252, 252, 250), "wood": (132, 86, 52), "leaf": (62, 140, 70),
         "glass": (196, 230, 250), "cream": (252, 236, 196), "rose": (244, 150, 160), "flame": (255, 190, 60)}
SPECIAL = {"yellow": {"shade": (240, 186, 30)},             # darkened, it looks green; details of the rest
           "white": {"shade": (214, 214, 212), "tint": (224, 224, 222), "snow": (180, 180, 178)},
           "black": {"shade": (66, 66, 72), "tint": (120, 120, 126), "ink": (112, 112, 118)}}
SIZES = {"small": 0.25, "": 0.34, "large": 0.42}           # half a thing's side, of the picture's
PLACES = {"in the middle": (0, 0), "at the top": (0, -1), "at the bottom": (0, 1), "on the left": (-1, 0),
          "on the right": (1, 0), "at the top left": (-1, -1), "at the top right": (1, -1),
          "at the bottom left": (-1, 1), "at the bottom right": (1, 1)}
RELATIONS = {"left of": ("right of", -1, 0), "right of": ("left of", 1, 0),         # its reverse, x, y
             "above": ("below", 0, -1), "below": ("above", 0, 1)}
WORDS = ("ART", "BAR", "CAFE", "FOOD", "GO", "HELLO", "HOME", "ICE", "JAZZ", "KEY", "LOVE", "MAP", "MOON",
         "OPEN", "PARK", "PIZZA", "SHOP", "STOP", "TAXI", "TEA", "WOW", "YES", "ZOO")
Thing = namedtuple("Thing", "kind colour x y half")         # its centre and half its side, of the picture's
Scene = namedtuple("Scene", "things background size place relation word", defaults=("", "", "", ""))

# A thing fills the square -100..100, y down: shape, tone, coordinates; + draws it again with x mirrored.
# Tones: its own colour (main), a shade and a tint of it, the background (ground), TONES. Most of it is main.
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
font = cache(ImageFont.load_default)
array = lambda image: np.ascontiguousarray(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))    # (C, H, W)


@lru_cache(64)
def scene(index: int) -> Scene:
    """The scene of a built-in picture, a pure function of its index: 81% one thing, 15% two, 4% a sign."""
    draws = iter(keyed(0, "scene", index).random(16).tolist())
    pick = lambda table, *but: (left := [x for x in table if x not in but])[int(next(draws) * len(left))]
    near = lambda x: x + 0.02 * (2 * next(draws) - 1)
    layout, kind, colour = next(draws), pick(KINDS, "sign"), pick(COLOURS)
    if layout < 0.15:
        relation = pick(RELATIONS)
        x, y = (0.24 * step for step in RELATIONS[relation][1:])
        other = pick(KINDS, "sign", kind), pick(COLOURS, colour)
        things = (Thing(kind, colour, near(0.5 + x), near(0.5 + y), near(0.22)),
                  Thing(*other, near(0.5 - x), near(0.5 - y), near(0.22)))
        return Scene(things, pick(GROUNDS, colour, other[1]), relation=relation)
    background = pick(GROUNDS, colour)
    if layout < 0.19:
        return Scene((Thing("sign", colour, near(0.5), near(0.5), near(0.42)),), background, word=pick(WORDS))
    size = pick(("large", "large", "large", "", "", "small"))
    place = "in the middle" if next(draws) < 0.4 or size == "large" else pick(PLACES)
    half = near(SIZES[size])
    return Scene((Thing(kind, colour, *(near(0.5 + step * (0.46 - half)) for step in PLACES[place]), half),),
                 background, size, place)


def captions(scene: Scene) -> list[str]:
    """True captions of a scene, from short to full, each at most 96 bytes."""
    a = lambda words: ("an " if words[0] in "aeio" else "a ") + words
    first, *others = scene.things
    name, ground = a(f"{first.colour} {first.kind}"), f"on {a(scene.background)} background"
    if scene.word:
        return [f'a sign with the word "{scene.word}"', f'{name} that says "{scene.word}"',
                f'{name} with the word "{scene.word}" {ground}']
    if others:
        other, reverse = a(f"{others[0].colour} {others[0].kind}"), RELATIONS[scene.relation][0]
        return [f"a {first.kind} {scene.relation} a {others[0].kind}", f"{name} {scene.relation} {other}",
                f"{other} {reverse} {name}", f"{name} {scene.relation} {other} {ground}"]
    placed = f"{a(f'{scene.size} {first.colour} {first.kind}'.strip())} {scene.place}"
    return [f"a {first.kind}", name, f"{name} {ground}", placed, f"{placed} {ground}"]


def draw(scene: Scene, size: int) -> np.ndarray:
    """A scene, uint8 (3, size, size), drawn larger, reduced by the one resize kernel, everywhere the same."""
    side = size * (4 if size <= 256 else 2)
    canvas = Image.new("RGB", (side, side), GROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        main, unit = COLOURS[thing.colour], thing.half * side / 100
        middle = thing.x * side - 0.5, thing.y * side - 0.5     # the centre of a pixel is a whole number
        tones = {"main": main, "ground": GROUNDS[scene.background], "shade": tuple(v * 4 // 5 for v in main),
                 "tint": tuple(v // 2 + 127 for v in main), **TONES, **SPECIAL.get(thing.colour, {})}
        shapes = {"poly": pen.polygon, "box": pen.rectangle, "oval": pen.ellipse,
                  "round": partial(pen.rounded_rectangle, radius=18 * unit)}
        for shape, tone, *corners in (line.split() for line in KINDS[thing.kind].split(",")):
            for mirror in (1, -1)[:1 + shape.endswith("+")]:
                xs = [middle[0] + mirror * unit * int(v) for v in corners[::2]]
                ys = [middle[1] + unit * int(v) for v in corners[1::2]]
                points = list(zip(xs if "poly" in shape else sorted(xs), ys))
                shapes[shape.strip("+")](points, fill=tones[tone])
    if scene.word:                                          # on 1024 pixels: a letter stands on whole ones
        sheet, step = Image.new("L", (1024, 1024)), 10.24 * thing.half * min(50, 176 / len(scene.word))
        for i, letter in enumerate(scene.word):             # one at a time: no shaping library has a say
            at = 1024 * thing.x + step * (i - (len(scene.word) - 1) / 2), 1024 * (thing.y - 0.16 * thing.half)
            ImageDraw.Draw(sheet).text(at, letter, 255, font(round(1.25 * step)), anchor="mm")
        canvas.paste(tones["snow" if sum(main) < 350 else "ink"], mask=shrink(sheet, side))
    return array(shrink(canvas, size))


# ----------------------------------------------------------------------------------------------- decoding
def shrink(image: Image.Image, size: int) -> Image.Image:
    """The one resize kernel: means of blocks by a whole factor, antialiased bicubic for the rest."""
    return image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=1.0)


def decode(data: bytes, size: int, keep=1.0, right=0.5, down=0.5, least=8) -> np.ndarray:
    """A square of an encoded picture, uint8 (3, size, size): upright, alpha over white, 16 bits scaled to 8.
    It keeps a part of the short side, `least` pixels or more, placed in the rest by fractions, as stored; cut
    before it is resized, a JPEG decoded at the smallest scale that leaves twice the size, to save memory.
    Raises ValueError or Pillow's errors for all but a whole, sane picture in FORMATS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # of bombs and damaged tags: the limits are ours
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise ValueError(f"not a whole {'/'.join(FORMATS)} picture") from None
        (width, height), short = image.size, min(image.size)
        if width * height > MAX_PIXELS or keep * short < least:
            raise ValueError(f"{width}x{height} is over {MAX_PIXELS >> 20} megapixels or under {least}")
        scale = 2 * size / (keep * short)
        image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))
        side = max(1, round(keep * min(image.size)))
        left, top = round(right * (image.width - side)), round(down * (image.height - side))
        image = image.crop((left, top, left + side, top + side))
        with suppress(Exception):                           # damaged tags: as it lies
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):                      # 16-bit grey: convert() would clip it to white
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
        if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return array(shrink(image.convert("RGB"), size))


def printable(name: str) -> str:
    """A file's name, safe to print and to encode: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def clean(text: str) -> str:
    """A caption on one line: no control characters, no lone surrogates, at most MAX_CAPTION characters."""
    text = text[:4 * MAX_CAPTION].encode("utf-8", "replace").decode("utf-8")
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())[:MAX_CAPTION].rstrip()


def read_captions(text: bytes, sidecar: bytes) -> list[str]:
    """All captions of a picture: "captions" of its .json, else the lines of its .txt, else .json's one."""
    listed, single = [], []
    with suppress(ValueError, RecursionError, AttributeError):      # empty or broken: as if it were not there
        fields = json.loads(sidecar)
        listed, single = fields.get("captions"), [fields.get("caption"), fields.get("text")]
    for found in (listed, text.decode("utf-8-sig", "replace").splitlines(), single):
        kept = [clean(c) for c in found if isinstance(c, str)] if isinstance(found, list) else []
        if any(kept): return [c for c in kept if c]
    return []


# --------------------------------------------------------------------------------- folders and tar shards
PARTS = {**dict.fromkeys(SUFFIXES, 0), "txt": 1, "json": 2, "t5.safetensors": 3}
NAME = re.compile(rf"(.*)\.({'|'.join(PARTS)})", re.IGNORECASE | re.DOTALL)     # KEY.PART


def join(name: str, parts: list[tuple]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Samples of a list of (key, part, file, at, size): rows, keys and a warning of keys used twice. Rows are
    int64 (N, 3, 4), [file, at, size] by [picture, .txt, .json, .t5.safetensors], file -1 for none. Of a key
    used twice only the first picture and what stands with it is kept: none gets another one's caption."""
    groups, last = {}, None
    for key, part, *where in parts:
        runs = groups.setdefault(key, [])
        if key != last or part in runs[-1]: runs.append({})
        runs[-1][part], last = where, key
    rows, keys, twice = [], [], 0
    for key, runs in groups.items():
        sample = {part: where for run in runs for part, where in run.items()}
        if len(sample) < sum(len(run) for run in runs):
            sample, twice = next((run for run in runs if 0 in run), {}), twice + 1
        if 0 in sample:
            keys.append(printable(key).encode())
            rows.append(list(zip(*(sample.get(part, (-1, 0, 0)) for part in range(4)))))
    warned = [f"{name}: {twice} duplicate keys; kept the first of each"] if twice else []
    return np.array(rows, np.int64).reshape(-1, 3, 4), np.array(keys, "S"), warned


def scan_tar(path: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows, keys and warnings of a shard. Names are only keys: nothing is extracted, no link is followed.
    tarfile takes a damaged header for the end without a word; a whole shard has two zero blocks there."""
    parts, end, name = [], 0, printable(os.path.basename(path))
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members.clear()
                    named = NAME.fullmatch(member.name)
                    if named and member.isreg() and not member.issparse():
                        parts.append((named[1], PARTS[named[2].lower()], 0, member.offset_data, member.size))
                    end = tar.offset
            tail = os.pread(file.fileno(), 2**16, end)
            problem = "" if len(tail) >= 1024 and not any(tail) else "no end mark"
        except Exception as error:                          # tarfile raises nearly anything on garbage
            problem = " ".join(str(error).split()) or type(error).__name__
        total = os.fstat(file.fileno()).st_size
    rows, keys, warned = join(name, [part for part in parts if part[3] + part[4] <= total])
    if problem:
        warned.append(f"{name}: damaged after {len(rows)} pictures ({problem}); using those")
    return rows, keys, warned


def index_tar(path: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """scan_tar, once: kept in the user's cache folder until the shard changes its path, size or time."""
    state = os.stat(path)
    mark = f"2 {os.path.abspath(path)} {state.st_size} {state.st_mtime_ns}".encode("utf-8", "surrogateescape")
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "limn")
    kept = os.path.join(folder, hashlib.blake2b(mark, digest_size=16).hexdigest() + ".npz")
    with suppress(Exception), np.load(kept, allow_pickle=False) as stored:      # not there, or torn
        return stored["rows"], stored["keys"], stored["warned"].tolist()
    rows, keys, warned = scan_tar(path)
    with suppress(OSError):                                 # no room for it: scanned again next time
        os.makedirs(folder, exist_ok=True)
        np.savez(temporary := f"{kept}.{os.getpid()}.npz", rows=rows, keys=keys, warned=np.array(warned, "U"))
        os.replace(temporary, kept)
    return rows, keys, warned


def expand(pattern: str) -> list[str]:
    """The paths a pattern stands for: braces, {000..018} or {a,b}, then * ? [ ] and ** as on disk."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace and not os.path.exists(pattern):
        first, _, last = brace[1].partition("..")
        numbers = range(int(first), int(last) + 1) if f"{first}{last}".isdecimal() and last else ()
        choices = [str(number).zfill(len(first)) for number in numbers] or brace[1].split(",")
        return [path for c in choices for path in expand(pattern[:brace.start()] + c + pattern[brace.end():])]
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise ValueError(f"--data {printable(pattern)} is not on a local disk; give folders, tars, patterns")
    return found


class Files:
    """The samples of a --data entry: loose pictures with captions beside them, tar shards read by offset."""
    def __init__(self, pattern: str):
        self.name, self.warned, self.files, loose, tables = printable(pattern), [], [], [], []
        for path, name in self.walk(pattern):
            size, named = os.path.getsize(path), NAME.fullmatch(name)
            if name.lower().endswith(".tar"):
                rows, keys, warned = index_tar(path)
                rows[:, 0] += np.where(rows[:, 0] < 0, 0, len(self.files))
                tables.append((rows, np.char.add(printable(name[:-4]).encode() + b"/", keys)))
                self.warned += warned
            elif named:
                loose.append((named[1], PARTS[named[2].lower()], len(self.files), 0, size))
            self.files.append((path, size))
        *alone, warned = join(self.name, sorted(loose, key=lambda part: (part[0], -part[1])))   # .txt first
        self.warned += warned
        self.rows, self.keys = (np.concatenate(arrays) for arrays in zip(*tables, alone))
        if not len(self.rows):
            example = f", e.g. {printable(os.path.basename(self.files[0][0]))}" if self.files else ""
            raise ValueError(f"no pictures in {self.name} (looked for {' '.join(SUFFIXES)} tar); found "
                             f"{len(self.files)} files{example} {' '.join(self.warned[:1])}".rstrip())
        if bare := int((self.rows[:, 2, 1:3].sum(1) == 0).sum()):
            self.warned.append(f"{self.name}: {bare} of {len(self.rows)} pictures have no caption")

    def walk(self, pattern: str) -> Iterator[tuple[str, str]]:
        """All files and their names below the folder, in order; links to folders are not followed."""
        lost = lambda error: self.warned.append(f"{printable(error.filename)}: {error.strerror}; left out")
        for root in expand(pattern):
            if os.path.isfile(root):
                yield root, os.path.basename(root)
            for folder, folders, files in os.walk(root, onerror=lost) if os.path.isdir(root) else ():
                folders.sort()
                self.warned += [f"{printable(os.path.join(folder, name))}: a link to a folder, not followed"
                                for name in folders if os.path.islink(os.path.join(folder, name))]
                for path in filter(os.path.isfile, (os.path.join(folder, name) for name in sorted(files))):
                    yield path, os.path.relpath(path, root)

    def part(self, row: int, part: int, most: int = 8 * MAX_PIXELS) -> bytes:
        """The first bytes of a part of a sample (see join); empty when it has none."""
        file, at, size = self.rows[row, :, part].tolist()
        if file < 0: return b""
        path, whole = self.files[file]
        with open(path, "rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_size != whole:
                raise ValueError("changed since it was indexed")
            return os.pread(stream.fileno(), min(size, most), at)

    key = lambda self, row: self.keys[row].decode()
    captions = lambda self, row: read_captions(*(self.part(row, part, most=2**20) for part in (1, 2)))
    show = lambda self, row, size, *crop: decode(self.part(row, 0), size, *crop)


class BuiltIn:
    name, warned, rows, keys = "built-in pictures", [], np.zeros((0, 3, 4)), np.array([b"version 3"])
    key = staticmethod("built-in/{}".format)
    captions = staticmethod(lambda row: captions(scene(row)))
    part = staticmethod(lambda row, part: b"")
    show = staticmethod(lambda row, size, *crop: draw(scene(row), size))


def copy_shard(path: str, target: str, beside: Callable[[list[str]], bytes]) -> None:
    """Copy a tar shard, and behind each picture, KEY.jpg, put KEY.t5.safetensors: what `beside` makes of its
    captions, for what it had. The other members stay as they are; `target` appears whole or not at all."""
    source = Files(path)
    rows = {at: row for row, at in enumerate(source.rows[:, 1, 0].tolist())}
    with tarfile.open(path, "r:") as old, tarfile.open(f"{target}.part", "w") as new:
        for member in old:
            old.fileobj.seek(member.offset_data)
            if not member.name.lower().endswith(".t5.safetensors"):
                new.addfile(member, old.fileobj if member.isreg() else None)
            if member.offset_data in rows:
                content = beside(source.captions(rows[member.offset_data]))
                info = tarfile.TarInfo(member.name.rpartition(".")[0] + ".t5.safetensors")
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))
    os.replace(f"{target}.part", target)


# --------------------------------------------------------------------------------- the stream of pictures
def parse_source(entry: str) -> tuple[str, Fraction | None]:
    """PATH or PATH:WEIGHT; what exists under the whole name has no weight."""
    path, _, weight = entry.rpartition(":")
    weighted = re.fullmatch(r"\d*\.?\d+", weight) and not os.path.exists(entry)
    return (path, Fraction(weight)) if weighted else (entry, None)


class Caption(str):
    """A caption, the .key of its picture and, where they are wanted, the .embeddings its shard has of it."""


class Pictures:
    """The endless stream: position 0, 1, 2, ... -> a picture, its crop and its caption, by keys alone.
    Every pass over a source shows each of its pictures once, in an order keyed by (seed, source, pass).
    Sources are interleaved by weight, by default their numbers of pictures. The "val" split, fixed and
    centred, is those whose hashed key is below a threshold; with --limit, or too few, those of training."""
    def __init__(self, config: DataConfig, size: int, seed: int, split: Literal["train", "val"] = "train"):
        self.config, self.size, self.split, self.embedded = config, size, split, False
        self.seed = seed if split == "train" else 0
        patterns, weights = zip(*map(parse_source, config.data)) if config.data else ((), ())
        if set(weights) != {None} and not all(weights):
            raise ValueError(f"--data {printable(' '.join(config.data))}: give all a weight above 0, or none")
        if not (len(config.blur) == 3 and 0 <= config.blur[0] <= 1 and 0 <= config.blur[1] <= config.blur[2]):
            raise ValueError(f"--blur {config.blur} is not a share from 0 to 1 and two rising sigmas")
        self.sources = [Files(pattern) for pattern in patterns] or [BuiltIn()]
        self.warnings = [line for source in self.sources for line in source.warned]
        self.rows = [self.choose(source) for source in self.sources]
        weights = weights if any(weights) else [Fraction(len(rows)) for rows in self.rows]
        self.weights = [int(w * math.lcm(*(w.denominator for w in weights))) for w in weights]
        contents = b"".join(s.keys.tobytes() + s.rows[:, 2:, :3].tobytes() for s in self.sources)
        self.fingerprint = hashlib.blake2b(contents, digest_size=16).hexdigest()
        self.summary = "; ".join(f"{s.name}: {len(r):,} pictures" for s, r in zip(self.sources, self.rows))

    def choose(self, source: Files | BuiltIn) -> range | np.ndarray:
        """The rows of a source that belong to this split."""
        limit, held_out, count = self.config.limit, self.config.held_out, len(source.rows)
        if isinstance(source, BuiltIn) and not limit:       # validation lies behind the end of training
            return range(ENDLESS) if self.split == "train" else range(ENDLESS, ENDLESS + max(1, held_out))
        if limit or not held_out:
            return range(min(count or limit, limit or count))
        hashes = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in source.keys.tolist())
        held = np.frombuffer(hashes, "<u8") < int(min(0.05, held_out / count) * 2**64)
        if not held.any():
            self.warnings.append(f"{source.name}: {count} pictures, none to hold out; validating on them")
            return range(count)
        return np.flatnonzero(held == (self.split == "val"))

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def captions(self) -> Iterator[str]:
        """Every caption that can be drawn; without --limit, those of the built-in pictures do not end."""
        for source, row in ((source, row) for source, rows in zip(self.sources, self.rows) for row in rows):
            with suppress(OSError, ValueError):             # replaced and counted when it is drawn
                yield from source.captions(row)

    def __getitem__(self, position: int) -> dict:
        """{"picture", "lowres" (see views), "caption", "key", "replaced": [f"{key}: {reason}"]}. A picture
        that cannot be read is replaced by another one of its source, by keys again: no other position
        changes. Raises ValueError after MAX_TRIES."""
        chosen, visit = interleave(position, self.weights)
        source, rows, training = self.sources[chosen], self.rows[chosen], self.split == "train"
        turn, index = divmod(visit, len(rows))
        if training:
            index = permute(index, len(rows), f"{self.seed} {chosen} {turn}".encode())
        rng, replaced = keyed(self.seed, self.split, position), []
        keep, right, down, which = rng.random(4).tolist()
        free = training and self.config.min_crop < 1
        crop = (1 - keep * (1 - self.config.min_crop), right, down) if free else (1.0, 0.5, 0.5)
        for _ in range(MAX_TRIES):
            row, key = rows[index], source.key(rows[index])
            try:
                shown, texts = source.show(row, self.size, *crop, self.config.min_size), source.captions(row)
                caption = Caption(texts[int(which * len(texts))] if texts else "")
                caption.key, caption.embeddings = key, source.part(row, 3) if self.embedded else b""
                return {**self.views(shown, position), "key": key, "caption": caption, "replaced": replaced}
            except Exception as error:                      # decoders raise nearly anything on garbage
                replaced.append(f"{key}: {' '.join(str(error).split()) or type(error).__name__}")
                index = int(rng.integers(len(rows)))
        raise ValueError(f"{source.name}: {MAX_TRIES} pictures in a row are unreadable, last {replaced[-1]}")

    def views(self, shown: np.ndarray, position: int) -> dict[str, np.ndarray]:
        """{"picture", "lowres" with --lowres}: made of the whole picture, cut at matching places, by keys."""
        if (self.config.lowres, self.config.crop, self.config.picture_mode) == (0, 0, "colour"):
            return {"picture": shown}                           # as it is
        config, rng = self.config, keyed(self.seed, f"{self.split} view", position)
        right, down, blurred, sigma = rng.random(4).tolist()
        image = Image.fromarray(shown.transpose(1, 2, 0))
        views, cells = {"picture": image.convert(MODES[config.picture_mode])}, config.lowres or self.size
        if config.lowres:
            small = shrink(image, config.lowres).convert(MODES[config.lowres_mode])
            share, *sigmas = config.blur
            blur = ImageFilter.GaussianBlur(float(np.interp(sigma, (0, 1), sigmas)))
            views["lowres"] = small.filter(blur) if self.split == "train" and blurred < share else small
        side = (config.crop or self.size) * cells // self.size
        left, top = (int(x * (cells - side + 1)) for x in (right, down))
        cut = left, top, left + side, top + side
        return {key: array(view.crop([view.width // cells * x for x in cut])) for key, view in views.items()}


def collect(dataset: Pictures, first: int, last: int) -> dict:
    """Of positions first..last-1 {"picture", maybe "lowres", "captions", "positions", "keys", "replaced"}."""
    items = [dataset[position] for position in range(first, last)]
    views = {name: np.stack([item[name] for item in items]) for name in VIEWS if name in items[0]}
    return {**views, "positions": list(range(first, last)),
            "captions": [item["caption"] for item in items], "keys": [item["key"] for item in items],
            "replaced": [line for item in items for line in item["replaced"]]}


def work(ours, pipe, dataset: Pictures, firsts: range, share: int, stop: int) -> None:
    """A worker process: its batches into a pipe, which holds each back until it is wanted."""
    ours.close()                                            # or it would not break when the trainer is gone
    with suppress(BrokenPipeError):                         # the trainer is gone
        try:
            for first in firsts:
                pipe.send(collect(dataset, first, min(first + share, stop)))
        except ValueError as error:
            pipe.send(error)


def loader(dataset: Pictures, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1,
           workers: int = 0, timeout: float = 600, pin: bool = False) -> Iterator[dict]:
    """Batches of start..stop-1: collect()'s, with the pictures, uint8 (b, channels, H, W), as tensors.
    Rank r gets the r-th contiguous block of each global batch, b = batch_size / world. Workers have a pipe
    each, read in turn: the same for any number. They are forked, safe as they touch neither torch nor CUDA,
    and send numpy, not shared memory, which containers ration. `pin` page-locks the pictures. close() it.
    ValueError above --max-bad, ChildProcessError of a dead worker, TimeoutError after `timeout` [seconds]."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    share, team, seen, bad = batch_size // world, [], 0, 0
    firsts = range(start + rank * share, stop, batch_size)

    def end():                                              # they hear nothing kinder, and hold nothing
        for process, pipe in team:
            process.kill()
            process.join()
            pipe.close()
    atexit.register(end)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))      # born deaf
    try:
        for worker in range(workers):
            pipe, theirs = context.Pipe(duplex=False)
            job = (pipe, theirs, dataset, firsts[worker::workers], share, stop)
            process = context.Process(target=work, args=job, daemon=True)
            process.start()
            theirs.close()
            team.append((process, pipe))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for turn, first in enumerate(firsts):
            if workers:
                process, pipe = team[turn % workers]
                try:
                    batch = pipe.recv() if pipe.poll(timeout) else TimeoutError(f"no data in {timeout} s")
                except EOFError:
                    process.join()
                    batch = ChildProcessError(f"a data worker died (exit code {process.exitcode}, -9 is no "
                                              "memory); use fewer --workers or a smaller --batch-size")
                if isinstance(batch, Exception): raise batch
            else:
                batch = collect(dataset, first, min(first + share, stop))
            seen, bad = seen + len(batch["keys"]), bad + len(batch["replaced"])
            if bad > dataset.config.max_bad * max(seen, 1000):
                raise ValueError(f"{bad} of {seen} pictures are unreadable (last: {batch['replaced'][-1]}); "
                                 f"--max-bad {dataset.config.max_bad} allows fewer")
            views = {name: torch.from_numpy(batch[name]) for name in VIEWS if name in batch}
            yield batch | {name: view.pin_memory() if pin else view for name, view in views.items()}
    finally:
        end()
        atexit.unregister(end)
