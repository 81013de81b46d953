"""Pictures in: built-in pictures, folders and tar shards; decoding, captions, and the order of the data.

Everything that is random is a pure function of (seed, purpose, position), so that the stream of pictures has no state: position
p shows the same picture, crop and caption whatever the number of ranks and workers, and resuming is starting at p.

Letters: H W pixels, B pictures in a batch, N pictures in a source.  Pictures are uint8 (3, H, W), RGB.
"""
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
import traceback
import warnings
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")    # of pictures; the only other files ever read are .txt and .json
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")            # what they may hold: Pillow's other parsers are never reached
MAX_PIXELS = 64 * 2**20      # a larger picture is refused before it is decoded
MIN_SIDE = 8                 # [pixels] so is one with a shorter side
MAX_TRIES = 20               # keyed replacements of an unreadable picture before giving up
MAX_CAPTION = 2000           # [characters] a longer caption is cut
MAX_TEXT = 2**20             # [bytes] read of one caption file
ENDLESS = 2**40              # built-in pictures


@dataclass
class DataConfig:
    data: list[str] = field(default_factory=list)  # folders, tar shards or patterns, each PATH or PATH:WEIGHT; none = built-in pictures
    limit: int = 0  # use only the first so many pictures of each source, 0 = all [images]
    held_out: int = 1024  # pictures kept for validation, at most one in 20, none with --limit [images]
    min_crop: float = 1.0  # smallest part of the short side that a random crop keeps, 1 = centre crop of all of it [0..1]
    max_bad: float = 0.05  # largest share of unreadable pictures before training stops [0..1]


# ---------------------------------------------------------------------------------------------- the order of the data

def keyed(seed: int, purpose: str, position: int) -> np.random.Generator:
    """A random generator that is a pure function of its arguments: Philox under a 128-bit BLAKE2b key."""
    digest = hashlib.blake2b(f"{seed} {purpose} {position}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def permute(index: int, n: int, key: int | bytes) -> int:
    """Where a keyed permutation of 0..n-1 sends `index`, without state or tables.

    A balanced Feistel network over the next even power of two (Luby and Rackoff, 1988), walked along its cycle until it
    falls below n (Black and Rogaway, 2002, section 4): fewer than four steps on average. Eight rounds of a multiplicative hash.
    """
    if isinstance(key, bytes):
        key = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(8):
            mixed = (right + key + turn * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 29) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 40 & mask if half <= 24 else (mixed ^ mixed >> 32) & mask)
        index = left << half | right
        if index < n:
            return index


def interleave(position: int, weights: list[Fraction]) -> tuple[int, int]:
    """The source that serves a position, and how often it served before; exact shares at every prefix, within one.

    Of the first p positions a source of share w takes floor(p w); what is left is dealt to the others in the same way.
    """
    total = sum(weights)
    for source, weight in enumerate(weights[:-1]):
        before = math.floor(position * weight / total)
        if math.floor((position + 1) * weight / total) > before:
            return source, before
        position, total = position - before, total - weight
    return len(weights) - 1, position


# ---------------------------------------------------------------------------------------------- built-in pictures

COLOURS = {"red": (216, 34, 44), "orange": (246, 130, 22), "yellow": (252, 214, 36), "green": (46, 152, 66),
           "blue": (34, 92, 214), "purple": (126, 52, 172), "pink": (250, 132, 184), "brown": (122, 74, 40),
           "white": (250, 250, 248), "black": (36, 36, 42)}
BACKGROUNDS = {"white": (246, 245, 240), "yellow": (253, 232, 150), "green": (172, 220, 160), "blue": (160, 208, 244),
               "pink": (250, 198, 216), "purple": (208, 188, 236), "grey": (172, 176, 184), "black": (46, 50, 72)}
TONES = {"ink": (40, 40, 50), "snow": (252, 252, 250), "wood": (132, 86, 52), "leaf": (62, 140, 70),
         "glass": (196, 230, 250), "cream": (252, 236, 196), "rose": (244, 150, 160), "flame": (255, 190, 60)}
WORDS = ("ART", "BAR", "BEE", "CAFE", "CITY", "COOL", "FISH", "FOOD", "GO", "HELLO", "HOME", "ICE", "JAZZ", "KEY", "LOVE",
         "MAP", "MOON", "OPEN", "PARK", "PIZZA", "SHOP", "STOP", "TAXI", "TEA", "WOW", "YES", "ZOO")
SIZES = {"large": (0.35, 0.40), "": (0.27, 0.31), "small": (0.19, 0.23)}      # half the side of a thing, of the picture's
PLACES = {"in the middle": (0, 0), "at the top left": (-1, -1), "at the top": (0, -1), "at the top right": (1, -1),
          "on the left": (-1, 0), "on the right": (1, 0), "at the bottom left": (-1, 1), "at the bottom": (0, 1),
          "at the bottom right": (1, 1)}
RELATIONS = {"left of": ("right of", -1, 0), "right of": ("left of", 1, 0), "above": ("below", 0, -1), "below": ("above", 0, 1)}


def ring(n: int, radius: float, inner: float = 0.0, x: float = 0.0, y: float = 0.0) -> tuple[float, ...]:
    """Corners of a regular n-gon, or of a star of n points when it has an inner radius; the first one points up."""
    radii = (radius, inner) if inner else (radius,)
    angles = [2 * math.pi * i / (n * len(radii)) for i in range(n * len(radii))]
    return tuple(v for i, a in enumerate(angles)
                 for v in (x + radii[i % len(radii)] * math.sin(a), y - radii[i % len(radii)] * math.cos(a)))


def heart(scale: float) -> tuple[float, ...]:
    """Outline of a heart: x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t."""
    turns = [2 * math.pi * i / 80 for i in range(80)]
    return tuple(v * scale for t in turns for v in (16 * math.sin(t)**3, -2 - 13 * math.cos(t) + 5 * math.cos(2 * t)
                                                    + 2 * math.cos(3 * t) + math.cos(4 * t)))


def crescent() -> tuple[float, ...]:
    """Outline of a moon: the outer arc one way, the inner arc back."""
    outer = [math.radians(a) for a in range(40, 321, 10)]
    inner = [math.radians(a) for a in range(300, 59, -10)]
    return tuple(v for a in outer for v in (0.15 + 0.92 * math.cos(a), 0.92 * math.sin(a))) + \
        tuple(v for a in inner for v in (0.52 + 0.68 * math.cos(a), 0.68 * math.sin(a)))


# One thing fills the square [-1, 1], y down. Each row is (shape, tone, coordinates); tones are the thing's own colour (main), its shade
# and its tint, the background (ground), or one of TONES. The thing's own colour covers the larger part of it.
KINDS = {
    "house": [("box", "shade", .42, -.88, .68, -.2), ("poly", "shade", -1, -.04, 0, -.96, 1, -.04), ("box", "main", -.78, -.06, .78, .94),
              ("box", "glass", -.58, .16, -.26, .5), ("box", "glass", .26, .16, .58, .5), ("box", "shade", -.16, .34, .16, .94)],
    "tree": [("box", "wood", -.15, .2, .15, .96), ("oval", "main", -.92, -.5, .16, .5), ("oval", "main", -.16, -.5, .92, .5),
             ("oval", "main", -.6, -.98, .6, .16), ("oval", "tint", -.34, -.76, .02, -.46), ("oval", "shade", .28, -.06, .6, .24)],
    "car": [("poly", "main", -.66, .04, -.42, -.62, .36, -.62, .72, .04), ("round", "main", -1, -.1, 1, .5),
            ("poly", "glass", -.46, -.08, -.3, -.46, -.04, -.46, -.04, -.08), ("poly", "glass", .08, -.08, .08, -.46, .28, -.46, .5, -.08),
            ("oval", "ink", -.76, .2, -.2, .76), ("oval", "ink", .2, .2, .76, .76), ("oval", "snow", -.59, .37, -.37, .59),
            ("oval", "snow", .37, .37, .59, .59)],
    "boat": [("box", "wood", -.06, -.94, .06, .4), ("poly", "main", .1, -.96, .1, .18, .86, .18), ("poly", "tint", -.1, -.76, -.1, .18, -.7, .18),
             ("poly", "main", -1, .32, 1, .32, .62, .92, -.62, .92), ("poly", "shade", -1, .32, 1, .32, .9, .48, -.9, .48)],
    "sun": [("poly", "shade", *ring(12, 1.0, .66)), ("oval", "main", -.68, -.68, .68, .68), ("oval", "ink", -.32, -.26, -.14, .02),
            ("oval", "ink", .14, -.26, .32, .02), ("pie", "ink", -.32, -.2, .32, .42, 15, 165)],
    "flower": [("box", "leaf", -.07, .1, .07, .98), ("oval", "leaf", -.58, .56, -.02, .8), ("oval", "leaf", .02, .68, .58, .92)]
        + [("oval", "main", x - .3, y - .3, x + .3, y + .3) for x, y in zip(*[iter(ring(6, .42, 0, 0, -.28))] * 2)]
        + [("oval", "cream", -.24, -.52, .24, -.04)],
    "fish": [("poly", "shade", .36, 0, .98, -.56, .8, 0, .98, .56), ("poly", "shade", -.4, -.4, .0, -.86, .34, -.3),
             ("oval", "main", -.98, -.56, .6, .56), ("oval", "snow", -.74, -.3, -.42, .02), ("oval", "ink", -.66, -.22, -.5, -.06),
             ("poly", "shade", -.1, -.12, .24, .06, -.1, .24)],
    "star": [("poly", "main", *ring(5, 1.04, .46, 0, .06)), ("poly", "tint", *ring(5, .46, .2, 0, .06))],
    "heart": [("poly", "main", *heart(.06)), ("oval", "tint", -.66, -.6, -.34, -.24)],
    "moon": [("poly", "main", *crescent()), ("oval", "shade", -.56, -.36, -.34, -.14), ("oval", "shade", -.42, .32, -.22, .52)],
    "mushroom": [("round", "cream", -.3, -.1, .3, .94), ("pie", "main", -1, -.92, 1, 1.08, 180, 360), ("oval", "snow", -.62, -.36, -.26, -.02),
                 ("oval", "snow", -.16, -.76, .2, -.42), ("oval", "snow", .34, -.34, .66, -.04)],
    "balloon": [("poly", "ink", -.03, .4, .03, .4, .1, .68, .01, .99, -.05, .99, .03, .68), ("poly", "shade", 0, .3, .16, .56, -.16, .56),
                ("oval", "main", -.68, -.98, .68, .44), ("oval", "tint", -.42, -.76, -.12, -.34)],
    "cup": [("oval", "main", .2, -.3, .98, .5), ("oval", "ground", .4, -.1, .78, .3), ("poly", "main", -.82, -.5, .56, -.5, .4, .9, -.66, .9),
            ("oval", "shade", -.82, -.68, .56, -.32), ("oval", "wood", -.7, -.62, .44, -.38)],
    "cat": [("poly", "main", -.86, -.98, -.9, .2, -.1, -.4), ("poly", "main", .86, -.98, .9, .2, .1, -.4),
            ("poly", "rose", -.74, -.68, -.74, -.3, -.44, -.46), ("poly", "rose", .74, -.68, .74, -.3, .44, -.46),
            ("oval", "main", -.94, -.54, .94, .92), ("oval", "snow", -.56, -.2, -.16, .22), ("oval", "snow", .16, -.2, .56, .22),
            ("oval", "ink", -.44, -.16, -.26, .2), ("oval", "ink", .26, -.16, .44, .2), ("poly", "rose", -.16, .32, .16, .32, 0, .52)],
    "rocket": [("poly", "flame", -.24, .5, .24, .5, 0, 1), ("poly", "shade", -.36, .0, -.74, .72, -.3, .56),
               ("poly", "shade", .36, .0, .74, .72, .3, .56), ("poly", "main", 0, -1, .24, -.7, .38, -.3, .4, .1, .32, .6, -.32, .6, -.4, .1,
               -.38, -.3, -.24, -.7), ("oval", "snow", -.26, -.4, .26, .12), ("oval", "glass", -.18, -.32, .18, .04)],
    "butterfly": [("oval", "main", -1, -.86, -.04, .12), ("oval", "main", .04, -.86, 1, .12), ("oval", "main", -.82, -.06, -.04, .86),
                  ("oval", "main", .04, -.06, .82, .86), ("oval", "tint", -.74, -.6, -.36, -.2), ("oval", "tint", .36, -.6, .74, -.2),
                  ("oval", "shade", -.58, .24, -.28, .56), ("oval", "shade", .28, .24, .58, .56), ("oval", "ink", -.11, -.7, .11, .8)],
    "sign": [("box", "wood", -.09, .2, .09, .98), ("round", "shade", -1, -.72, 1, .4), ("round", "main", -.94, -.66, .94, .34)],
}


@dataclass(frozen=True)
class Thing:
    """One thing of a scene: its centre and half its side as fractions of the picture's side."""
    kind: str
    colour: str
    x: float
    y: float
    half: float


@dataclass(frozen=True)
class Scene:
    """What a built-in picture shows: one thing with a size and a place, two with a relation, or a sign with a word."""
    things: tuple[Thing, ...]
    background: str
    size: str = ""
    place: str = ""
    relation: str = ""
    word: str = ""


def scene(index: int) -> Scene:
    """The scene of a built-in picture, a pure function of its index: 76% one thing, 20% two things, 4% a sign."""
    draws = iter(keyed(0, "scene", index).random(16).tolist())

    def pick(table):
        table = list(table)
        return table[int(next(draws) * len(table))]

    def near(x, spread=0.02):
        return x + spread * (2 * next(draws) - 1)

    layout = next(draws)
    kind, colour = pick(k for k in KINDS if k != "sign"), pick(COLOURS)
    if layout < 0.20:
        kinds = kind, pick(k for k in KINDS if k not in ("sign", kind))
        colours = colour, pick(c for c in COLOURS if c != colour)
        relation = pick(RELATIONS)
        _, dx, dy = RELATIONS[relation]
        things = tuple(Thing(k, c, near(0.5 + s * 0.24 * dx), near(0.5 + s * 0.24 * dy), near(0.215, 0.015))
                       for k, c, s in zip(kinds, colours, (1, -1)))
        return Scene(things, pick(b for b in BACKGROUNDS if b not in colours), relation=relation)
    background = pick(b for b in BACKGROUNDS if b != colour)
    if layout < 0.24:
        return Scene((Thing("sign", colour, near(0.5), near(0.5), near(0.41)),), background, word=pick(WORDS))
    size = pick(("large", "large", "", "", "small"))
    half = SIZES[size][0] + (SIZES[size][1] - SIZES[size][0]) * next(draws)
    place = "in the middle" if size == "large" or next(draws) < 0.4 else pick(PLACES)
    dx, dy = PLACES[place]
    reach = 0.46 - half
    return Scene((Thing(kind, colour, near(0.5 + dx * reach), near(0.5 + dy * reach), half),), background, size, place)


def captions(scene: Scene) -> list[str]:
    """True captions of a scene, from short to full, each at most 96 bytes."""
    def a(words):
        return ("an " if words[0] in "aeio" else "a ") + words

    first, ground = scene.things[0], f"on {a(scene.background)} background"
    name = f"{first.colour} {first.kind}"
    if scene.word:
        return [f'a sign with the word "{scene.word}"', f'{a(name)} that says "{scene.word}"',
                f'{a(name)} with the word "{scene.word}" {ground}']
    if len(scene.things) == 2:
        second = scene.things[1]
        other, back = f"{second.colour} {second.kind}", RELATIONS[scene.relation][0]
        return [f"a {first.kind} {scene.relation} a {second.kind}", f"{a(name)} {scene.relation} {a(other)}",
                f"{a(other)} {back} {a(name)}", f"{a(name)} {scene.relation} {a(other)} {ground}"]
    sized = f"{scene.size} {name}".strip()
    return [f"a {first.kind}", a(name), f"{a(name)} {ground}", f"{a(sized)} {scene.place}", f"{a(sized)} {scene.place} {ground}"]


def draw(scene: Scene, size: int) -> np.ndarray:
    """A scene as a picture, uint8 (3, size, size): drawn at a multiple of the size and reduced with the one antialiased kernel."""
    side = size * (4 if size <= 256 else 2)
    ground = BACKGROUNDS[scene.background]
    canvas = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        main, scale = COLOURS[thing.colour], thing.half * side
        left, top = thing.x * side - 0.5, thing.y * side - 0.5          # a pixel's centre has integer coordinates
        tones = {**TONES, "main": main, "ground": ground, "shade": mix(main, (0, 0, 0), 0.28), "tint": mix(main, (255, 255, 255), 0.5)}
        if thing.colour == "yellow":
            tones["shade"] = (236, 170, 24)             # darkened yellow would look green
        if thing.colour == "white":
            tones |= {"snow": tones["shade"], "tint": mix(main, (0, 0, 0), 0.12), "shade": mix(main, (0, 0, 0), 0.2)}
        if thing.colour == "black":
            tones |= {"ink": (112, 114, 126), "shade": (78, 78, 88), "tint": (120, 120, 130)}
        for shape, tone, *numbers in KINDS[thing.kind]:
            at = [v * scale + (top if i % 2 else left) for i, v in enumerate(numbers)]
            if shape == "poly":
                pen.polygon(at, fill=tones[tone])
            elif shape == "oval":
                pen.ellipse(at, fill=tones[tone])
            elif shape == "box":
                pen.rectangle(at, fill=tones[tone])
            elif shape == "round":
                pen.rounded_rectangle(at, 0.18 * scale, fill=tones[tone])
            else:
                pen.pieslice(at[:4], *numbers[4:], fill=tones[tone])
        if scene.word:
            bright = thing.colour in ("yellow", "white", "pink", "orange")
            letter(pen, scene.word, left, top - 0.16 * scale, scale, TONES["ink" if bright else "snow"])
    return np.ascontiguousarray(np.asarray(canvas.reduce(side // size)).transpose(2, 0, 1))


def mix(a: tuple, b: tuple, share: float) -> tuple[int, ...]:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))


def letter(pen, word: str, x: float, y: float, scale: float, colour: tuple) -> None:
    """Write a word around (x, y), a letter at a time, so that no shaping library of the machine has a say."""
    step = scale * min(0.5, 1.76 / len(word))
    for i, character in enumerate(word):
        pen.text((x + step * (i - (len(word) - 1) / 2), y), character, colour, font(round(1.25 * step)), anchor="mm")


@lru_cache(maxsize=32)
def font(size: int):
    return ImageFont.load_default(size)


def picture(index: int, size: int) -> tuple[np.ndarray, list[str]]:
    """A built-in picture, uint8 (3, size, size), and its captions: a pure function of the index, the same on every machine."""
    shown = scene(index)
    return draw(shown, size), captions(shown)


# ---------------------------------------------------------------------------------------------- decoding

def shrink(image: Image.Image, size: int) -> Image.Image:
    """The one resize kernel: means of whole blocks down to the next whole factor, bicubic (antialiased) for the rest."""
    return image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=1.0)


def crop_box(width: int, height: int, keep: float = 1.0, right: float = 0.5, down: float = 0.5) -> tuple[int, int, int, int]:
    """A square (left, top, right, bottom) [pixels] inside a picture: `keep` of its short side, placed by two fractions in [0, 1]."""
    side = max(1, round(keep * min(width, height)))
    left, top = round(right * (width - side)), round(down * (height - side))
    return left, top, left + side, top + side


def decode(data: bytes, size: int, keep: float = 1.0, right: float = 0.5, down: float = 0.5) -> np.ndarray:
    """A square of an encoded picture (see crop_box), uint8 (3, size, size): upright, alpha over white, 16 bits scaled to 8.

    Cut before it is converted and resized, so that memory follows the stored picture, which has at most MAX_PIXELS; a JPEG is
    decoded at the smallest scale that still leaves twice the size. Of an animation, the first frame.
    Raises ValueError or Pillow's errors for anything that is not a whole, sane picture in one of FORMATS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                 # damaged EXIF and the like; limits are checked here
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise ValueError(f"not {'/'.join(FORMATS)}") from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} is over {MAX_PIXELS >> 20} megapixels")
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"{width}x{height} has a side under {MIN_SIDE} pixels")
        turn = image.getexif().get(0x0112)                              # orientation
        scale = 2 * size / (keep * min(width, height))
        image.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))
        image = image.crop(crop_box(*image.size, keep, right, down))
        if image.mode.startswith("I"):                                  # 16-bit grey; convert() would clip it to white
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
        if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = shrink(image.convert("RGB"), size)
        if turn in TURNS:
            image = image.transpose(TURNS[turn])
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}    # EXIF orientation -> upright


def clean(text: str) -> str:
    """A caption on one line: no control characters, no lone surrogates, at most MAX_CAPTION characters."""
    text = text[:4 * MAX_CAPTION].encode("utf-8", "replace").decode("utf-8")
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())[:MAX_CAPTION].rstrip()


def read_captions(text: bytes, sidecar: bytes) -> list[str]:
    """All captions of a picture: those listed in its .json, else the lines of its .txt, else caption or text in its .json."""
    try:
        fields = json.loads(sidecar) if sidecar else {}
    except ValueError:                                                  # broken: as if it were not there
        fields = {}
    fields = fields if isinstance(fields, dict) else {}
    listed = fields.get("captions")
    lines = text.decode("utf-8-sig", "replace").splitlines()
    for found in (listed if isinstance(listed, list) else [], lines, [fields.get("caption")], [fields.get("text")]):
        kept = [c for c in (clean(c) for c in found if isinstance(c, str)) if c]
        if kept:
            return kept
    return []


def printable(name: str) -> str:
    """A file's name that is safe to print and to encode: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


# ---------------------------------------------------------------------------------------------- folders and tar shards

PART = {**dict.fromkeys(SUFFIXES, 0), "txt": 1, "json": 2}
ROW = np.dtype([("file", "<i4", 3), ("at", "<i8", 3), ("size", "<i8", 3), ("hash", "<u8")])     # of (picture, .txt, .json); file -1 = none


def join(parts) -> tuple[np.ndarray, np.ndarray, int]:
    """Samples from (key, part, file, at, size) in any order: rows, keys, and how many keys were used twice.

    Parts need not be adjacent. Of a key used twice only the first picture and what stands beside it is kept, so that a picture
    never gets another one's caption.
    """
    runs, last = {}, None
    for key, part, *where in parts:
        found = runs.setdefault(key, [])
        if key != last or part in found[-1]:
            found.append({})
        found[-1][part] = where
        last = key
    rows, keys, twice = [], [], 0
    for key, found in runs.items():
        merged = {part: where for run in reversed(found) for part, where in run.items()}
        if len(merged) < sum(len(run) for run in found):
            twice += 1
            merged = next((run for run in found if 0 in run), {})
        if 0 in merged:
            name = printable(key).encode()
            where = [merged.get(part, (-1, 0, 0)) for part in range(3)]
            rows.append((*zip(*where), int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")))
            keys.append(name)
    return np.array(rows, ROW), np.array(keys, "S"), twice


def scan_tar(path: str) -> tuple[list, str]:
    """The parts of a tar shard that are read by offset, and what is wrong with it: nothing is extracted, no link followed.

    tarfile ends silently at a damaged header; an undamaged shard ends in zero blocks, at least two, and nothing else.
    """
    parts, end = [], 0
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members.clear()
                    end = tar.offset
                    key, _, suffix = member.name.rpartition(".")
                    if member.isreg() and not member.issparse() and suffix.lower() in PART and end <= total:
                        parts.append((key, PART[suffix.lower()], 0, member.offset_data, member.size))
            file.seek(end)
            tail = file.read(2**16)
            problem = "" if len(tail) >= 1024 and not any(tail) else "no end mark"
        except Exception as error:                                      # tarfile raises nearly anything on garbage
            problem = str(error) or type(error).__name__
    return parts, problem


def index_tar(path: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows, keys and warnings of a shard, from the cache when the file is as it was when it was scanned."""
    name, state = printable(os.path.basename(path)), os.stat(path)
    mark = f"1 {os.path.abspath(path)} {state.st_size} {state.st_mtime_ns}".encode("utf-8", "surrogateescape")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "limn"
    cache = folder / f"{hashlib.blake2b(mark, digest_size=16).hexdigest()}.npz"
    try:
        with np.load(cache, allow_pickle=False) as stored:
            return stored["rows"], stored["keys"], stored["warned"].tolist()
    except Exception:                                                   # absent or torn: scan again
        pass
    parts, problem = scan_tar(path)
    rows, keys, twice = join(parts)
    warned = [f"{name}: damaged after {len(rows)} pictures ({problem}); using those"] if problem else []
    if twice:
        warned.append(f"{name}: {twice} duplicate keys; kept the first of each")
    try:
        expected = json.loads(Path(path.removesuffix(".tar") + "_stats.json").read_bytes())["successes"]
        if expected != len(rows):
            warned.append(f"{name}: holds {len(rows)} pictures, its _stats.json says {expected}")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f"{cache.stem}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, rows=rows, keys=keys, warned=np.array(warned, "U"))
        os.replace(temporary, cache)
    except OSError:                                                     # no place for it: scanned again next time
        pass
    return rows, keys, warned


def walk(folder: str, warned: list[str]):
    """All files below a folder, sorted; links to folders are not followed."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from walk(entry.path, warned)
            elif entry.is_file():
                yield entry.path
            elif entry.is_symlink():
                warned.append(f"{printable(entry.path)}: a link to a folder or to nothing; not followed")
        except OSError as error:
            warned.append(f"{printable(entry.path)}: {error.strerror}; left out")


def expand(pattern: str) -> list[str]:
    """The paths that a pattern stands for: braces {000..018} and {a,b}, then * ? [ ] on the disk."""
    if os.path.exists(pattern):
        return [pattern]
    if brace := re.search(r"\{([^{}]*)\}", pattern):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
        if numbers:
            low, high = numbers.groups()
            choices = [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
        else:
            choices = brace[1].split(",")
        return [path for choice in choices for path in expand(pattern[:brace.start()] + choice + pattern[brace.end():])]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise ValueError(f"--data {printable(pattern)} does not exist; give a folder, tar shards or a pattern")
    return found


class Files:
    """The samples of one --data entry: loose pictures with their captions beside them, and tar shards read by offset."""

    def __init__(self, pattern: str):
        self.name, self.warned = printable(pattern), []
        self.files, self.sizes, self.shards = [], [], 0
        others, loose, indexed = [], [], []
        for root in expand(pattern):
            for path in [root] if os.path.isfile(root) else walk(root, self.warned):
                key, suffix = os.path.relpath(os.path.splitext(path)[0], root if path != root else "."), path.rpartition(".")[2].lower()
                if suffix == "tar":
                    rows, keys, warned = index_tar(path)
                    rows["file"][rows["file"] >= 0] += len(self.files)
                    stem = printable(os.path.basename(path))[:-4].encode()
                    indexed.append((rows, np.array([stem + b"/" + k for k in keys.tolist()], "S")))
                    self.warned += warned
                    self.shards += 1
                elif suffix in PART:
                    loose.append((key, PART[suffix], len(self.files), 0, os.path.getsize(path)))
                else:
                    others.append(path)
                    continue
                self.files.append(path)
                self.sizes.append(os.path.getsize(path))
        *loose, twice = join(sorted(loose, key=lambda part: (part[0], -part[1])))    # captions first: they belong to the first picture
        if twice:
            self.warned.append(f"{self.name}: {twice} names are used by several pictures; kept the first of each")
        rows, keys = zip(*indexed, loose)
        self.rows, self.keys = np.concatenate(rows), np.concatenate(keys)
        if not len(self.rows):
            example = f", e.g. {printable(os.path.basename((others + self.files)[0]))}" if others or self.files else ""
            raise ValueError(f"no pictures in {self.name} (looked for {', '.join(SUFFIXES)} and tar); "
                             f"found {len(others) + len(self.files)} other files{example}")
        if bare := int((self.rows["size"][:, 1:].sum(1) == 0).sum()):
            self.warned.append(f"{self.name}: {bare} of {len(self.rows)} pictures have no caption; they train as unconditional")

    def part(self, row: int, part: int, limit: int | None = None) -> bytes:
        """The bytes of a sample's picture (0), .txt (1) or .json (2); empty when it has none."""
        file, at, size = (int(self.rows[name][row, part]) for name in ("file", "at", "size"))
        if file < 0:
            return b""
        with open(self.files[file], "rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_size != self.sizes[file]:
                raise ValueError("the file changed since it was indexed")
            return os.pread(stream.fileno(), min(size, limit or size), at)

    def key(self, row: int) -> str:
        return self.keys[row].decode()

    def show(self, row: int, size: int, keep: float, right: float, down: float) -> tuple[np.ndarray, list[str]]:
        """A decoded picture (see decode) and its captions. Raises whatever is wrong with it."""
        texts = self.part(row, 1, MAX_TEXT), self.part(row, 2, MAX_TEXT)
        return decode(self.part(row, 0), size, keep, right, down), read_captions(*texts)


class BuiltIn:
    """The built-in pictures behind the same three methods as Files."""
    name, warned, shards = "built-in pictures", [], 0

    def key(self, row: int) -> str:
        return f"built-in/{row}"

    def show(self, row: int, size: int, keep: float, right: float, down: float) -> tuple[np.ndarray, list[str]]:
        return picture(row, size)


# ---------------------------------------------------------------------------------------------- the stream of pictures

def parse_sources(entries: list[str]) -> tuple[list[str], list[Fraction] | None]:
    """Patterns and weights from PATH or PATH:WEIGHT; weights are given to all or to none (None)."""
    patterns, weights = [], []
    for entry in entries:
        path, colon, weight = entry.rpartition(":")
        if scheme := re.match(r"(\w+)://", entry):
            raise ValueError(f"--data {printable(entry)}: {scheme[1]}:// is not read yet; copy it to a local folder first")
        if not colon or os.path.exists(entry):
            path, weight = entry, None
        else:
            try:
                weight = Fraction(weight)
            except (ValueError, ZeroDivisionError):
                raise ValueError(f"--data {printable(entry)}: {weight!r} is not a weight and the path does not exist") from None
            if weight <= 0:
                raise ValueError(f"--data {printable(entry)}: the weight must be above 0")
        patterns.append(path)
        weights.append(weight)
    given = [w for w in weights if w is not None]
    if given and len(given) < len(weights):
        raise ValueError(f"--data {printable(entries[weights.index(None)])} has no weight; give one to every source or to none")
    return patterns, given or None


class Pictures:
    """The endless stream of pictures: position 0, 1, 2, ... -> one picture, its crop and its caption, by keyed choices alone.

    Each pass over a source shows each of its pictures once, in an order keyed by (seed, pass). Sources are interleaved by their weights,
    by default in proportion to their numbers of pictures. `split="val"` is the held-out pictures in a fixed order, centre-cropped: those
    whose key hashes below a threshold, so they stay the same when pictures are added or removed. With `limit`, or when too few
    pictures are there to hold any out, validation uses the training pictures.
    """

    def __init__(self, config: DataConfig, size: int, seed: int, split: Literal["train", "val"] = "train"):
        if not 0 < config.min_crop <= 1:
            raise ValueError(f"--min-crop {config.min_crop} is not in (0, 1]")
        self.config, self.size, self.seed, self.split, self.warnings = config, size, seed, split, []
        patterns, weights = parse_sources(config.data)
        self.sources = [Files(pattern) for pattern in patterns] or [BuiltIn()]
        self.rows = [self.choose(source) for source in self.sources]
        self.weights = weights or [Fraction(len(rows)) for rows in self.rows]
        self.warnings += [line for source in self.sources for line in source.warned]
        digest = hashlib.blake2b(digest_size=16)
        for source in self.sources:
            digest.update(source.keys.tobytes() + source.rows["size"].tobytes() if isinstance(source, Files) else b"built-in 1")
        self.fingerprint = digest.hexdigest()
        self.summary = "; ".join(f"{source.name}: {len(rows):,} pictures" + (f" in {source.shards} shards" if source.shards else "")
                                 for source, rows in zip(self.sources, self.rows))

    def choose(self, source) -> range | np.ndarray:
        """The rows of a source that belong to this split."""
        limit, held_out = self.config.limit, self.config.held_out
        if isinstance(source, BuiltIn):
            if limit:
                return range(limit)
            return range(ENDLESS) if self.split == "train" else range(ENDLESS, ENDLESS + max(1, held_out))
        count = len(source.rows)
        everything = np.arange(min(count, limit or count))
        if limit or not held_out:
            return everything
        held = source.rows["hash"] < int(min(0.05, held_out / count) * 2**64)
        if not held.any():
            self.warnings.append(f"{source.name}: {count} pictures are too few to hold any out; validation uses the training pictures")
            return everything
        return np.flatnonzero(held if self.split == "val" else ~held)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def __getitem__(self, position: int) -> dict:
        """{"picture" uint8 (3, size, size), "caption", "key", "position", "replaced": list of "name: reason"}.

        A picture that cannot be read is replaced by another one of its source, chosen by the same keys, so that no other position changes.
        Raises ValueError after MAX_TRIES of them.
        """
        chosen, visit = interleave(position, self.weights)
        source, rows = self.sources[chosen], self.rows[chosen]
        passed, index = divmod(visit, len(rows))
        if self.split == "train":
            index = permute(index, len(rows), f"{self.seed} order {chosen} {passed}".encode())
        rng, replaced = keyed(self.seed, self.split, position), []
        keep, right, down, caption = rng.random(4).tolist()
        if self.split == "val" or self.config.min_crop == 1:
            keep, right, down = 1.0, 0.5, 0.5
        else:
            keep = self.config.min_crop + (1 - self.config.min_crop) * keep
        for _ in range(MAX_TRIES):
            row = int(rows[index])
            try:
                shown, texts = source.show(row, self.size, keep, right, down)
                return {"picture": shown, "caption": texts[int(caption * len(texts))] if texts else "", "key": source.key(row),
                        "position": position, "replaced": replaced}
            except Exception as error:                                  # decoders raise nearly anything on garbage
                replaced.append(f"{source.key(row)}: {' '.join(str(error).split()) or type(error).__name__}")
                index = int(rng.integers(len(rows)))
        raise ValueError(f"{source.name}: {MAX_TRIES} pictures in a row could not be read (last: {replaced[-1]})")


def blocks(start: int, stop: int, batch_size: int, rank: int, world: int):
    """The positions of each batch that are this rank's: its contiguous block of every global batch; the last may be short."""
    share = batch_size // world
    for first in range(start + rank * share, stop, batch_size):
        yield range(first, min(first + share, stop))


def collect(dataset: Pictures, positions: range) -> dict:
    items = [dataset[position] for position in positions]
    return {"picture": np.stack([item["picture"] for item in items]), "captions": [item["caption"] for item in items],
            "positions": list(positions), "keys": [item["key"] for item in items],
            "replaced": [line for item in items for line in item["replaced"]]}


def work(dataset: Pictures, span: tuple, worker: int, workers: int, pipe) -> None:
    """A worker process: every workers-th batch, into a pipe that holds it back until the batch is wanted.

    It deaf to SIGTERM and SIGINT, which reach the whole group: the trainer still needs its batches to stop in order. It ends when
    the pipe's other end is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for positions in islice(blocks(*span), worker, None, workers):
            pipe.send(collect(dataset, positions))
    except (BrokenPipeError, ConnectionResetError):
        pass
    except (ValueError, OSError) as error:
        pipe.send(ValueError(str(error)))
    except Exception:
        pipe.send(RuntimeError(f"a data worker failed:\n{traceback.format_exc()}"))


class Loader:
    """Batches in order, from worker processes: {"picture" uint8 (b, 3, H, W), "captions", "positions", "keys", "replaced"}.

    One pipe per worker, read in turn, is all it takes when batch k is a pure function of k; the same batches come for any number of
    workers. Workers are forked on Linux (they share the index and start at once; they never touch torch, so neither its
    threads nor a CUDA context matter), spawned elsewhere. They send numpy through the pipe: no shared memory, which containers ration.
    Raises ChildProcessError when a worker is killed, TimeoutError after `timeout` seconds of silence, ValueError for more bad pictures
    than config.max_bad allows.
    """

    def __init__(self, dataset: Pictures, span: tuple, workers: int, timeout: float, pin: bool):
        self.dataset, self.span, self.timeout, self.pin = dataset, span, timeout, pin
        self.processes, self.pipes, self.seen, self.bad = [], [], 0, 0
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        for worker in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(dataset, span, worker, workers, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        self.batches = self.run()
        atexit.register(self.close)                                     # a deaf worker would keep the interpreter from leaving

    def run(self):
        for turn, positions in enumerate(blocks(*self.span)):
            batch = self.receive(turn % len(self.pipes)) if self.pipes else collect(self.dataset, positions)
            self.seen, self.bad = self.seen + len(positions), self.bad + len(batch["replaced"])
            if self.bad > self.dataset.config.max_bad * max(self.seen, 1000):
                raise ValueError(f"{self.bad} of {self.seen} pictures could not be read (last: {batch['replaced'][-1:]}); "
                                 f"more than --max-bad {self.dataset.config.max_bad}")
            if self.seen >= 10_000:
                self.seen, self.bad = self.seen // 2, self.bad // 2
            picture = torch.from_numpy(batch["picture"])
            yield {**batch, "picture": picture.pin_memory() if self.pin else picture}

    def receive(self, worker: int) -> dict:
        try:
            if not self.pipes[worker].poll(self.timeout):
                raise TimeoutError(f"the data workers gave nothing for {self.timeout:.0f} seconds")
            batch = self.pipes[worker].recv()
        except EOFError:
            self.processes[worker].join()
            raise ChildProcessError(f"a data worker was killed (signal {-self.processes[worker].exitcode}, usually out of memory); "
                                    "use fewer --workers or a smaller --batch-size") from None
        if isinstance(batch, Exception):
            raise batch
        return batch

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        return next(self.batches)

    def close(self) -> None:
        """End the workers at once; they hold nothing that could be lost."""
        atexit.unregister(self.close)
        for process, pipe in zip(self.processes, self.pipes):
            process.kill()
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []


def loader(dataset: Pictures, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0,
           timeout: float = 600, pin: bool = False) -> Loader:
    """Batches of positions start..stop-1; of each global batch of batch_size, rank r gets the r-th contiguous block.

    `timeout` is in seconds; `pin` puts the pictures into page-locked memory for a GPU. Close it when done.
    """
    if batch_size % world:
        raise ValueError(f"--batch-size {batch_size} is not a multiple of {world} ranks")
    return Loader(dataset, (start, stop, batch_size, rank, world), workers, timeout, pin)
