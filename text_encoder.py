"""Captions to tensors: every T5 in plain torch, and CLIP, for captions and for pictures.

    encoder = load_text_encoder(TextConfig())                  # bytes, trained along with the U-Net
    encoder = load_text_encoder(TextConfig(["t5-v1_1-xl"]))    # a folder as published, frozen
    condition = encoder.encode(["a red house"], "cpu")         # {"context", "mask", "pooled"}

Training does the same in two halves; the first needs no weights and runs in the loader's workers:

    batch = encoder.reader.batch([encoder.reader.read("a red house")])
    condition = encoder(**encoder.inputs(batch, device))

Letters: B batch, L text tokens, D text width, P pooled width, K heads, E head width, H W pixels."""
import base64
import contextlib
import itertools
import json
import math
import os
import re
import struct
import timeit
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from torch.nn import Embedding, Module, ModuleDict, ModuleList

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TextConfig:
    text_encoder: list[str] = field(default_factory=lambda: ["bytes"])  # bytes (trained along), or folders
    text_length: int = 128  # a caption is cut to this length (tokens, or bytes) [4..4096 tokens]
    text_dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights of frozen encoders
    text_cache: str = ""  # folder that keeps the embeddings of all captions; or "shards", which hold them
    text_shards: str = ""  # write the shards of --data with the embeddings of --text-cache here, then leave
    clip_layer: Literal["last", "penultimate"] = "last"  # of a CLIP text encoder, which gives the context
    text_padding: bool = False  # CLIPs read what pads captions too; several as one wide one, as in SDXL
    allow_bin: bool = False  # read pytorch_model.bin by torch's restricted unpickler where no safetensors are
    byte_width: int = 128  # width of the byte encoder, a multiple of 32 [32..2048 channels]
    byte_layers: int = 1  # layers of the byte encoder [1..24 layers]
    transcription: Literal["", "bytes"] = ""  # bytes: read what is written in pictures, too (trained along)
    transcription_length: int = 64  # it is cut to this length [4..4096 bytes]
    transcription_width: int = 128  # width of its encoder, a multiple of 32 [32..2048 channels]
    transcription_layers: int = 2  # layers of its encoder [1..24 layers]

    def __post_init__(self):
        if not self.text_encoder:
            raise ValueError("--text-encoder has no value. Give bytes, or folders")
        for name in ("byte_width", "transcription_width"):
            width = getattr(self, name)
            if width % 32:
                raise ValueError(f"--{name.replace('_', '-')} {width} is no multiple of 32")


# ------------------------------------------------------------------------ files that may be damaged
@contextlib.contextmanager
def damaged(path: Path):
    """Turn whatever a reader throws at a missing or broken file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        names = sorted(p.name for p in path.parent.glob("*"))
        found = ", ".join(names[:8]) or "nothing"
        raise ValueError(f"{path.parent} has no {path.name} (found {found}). "
                         "Download it again") from None
    except Exception as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {line[:200]}. Download it again") from None


def read_json(path: Path) -> dict:
    with damaged(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("not a JSON object")
        return content


# --------------------------------------------------------------------------------------- tokenizers
def clean(text: str) -> str:
    """A caption without what no tokenizer reads: lone surrogates, NUL, byte order mark."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\0", " ").replace("\ufeff", "").strip()


class ByteTokenizer:
    """UTF-8 bytes as tokens (ByT5; Xue et al. 2021, arXiv:2105.13626): byte + 3, end 1."""
    version = 1
    files = []
    content = None
    prefix = []
    suffix = [1]
    unknown = 2

    def encode(self, text):
        return [byte + 3 for byte in text.encode()]


def message(number: int, content: bytes):
    """A field of a protocol buffer: its number, the length in five groups of 7 bits, the content."""
    size = len(content)
    groups = [size >> shift & 127 | 128 for shift in (0, 7, 14, 21)]
    return bytes([8 * number + 2, *groups, size >> 28]) + content


def spiece_of(content: dict):
    """The `spiece.model` that the unigrams and the normaliser of a `tokenizer.json` came from."""
    model = content["model"]
    if model["type"] != "Unigram" or model.get("byte_fallback"):
        raise ValueError("its model is not the unigrams of T5")

    kinds = {token["content"]: 3 for token in content["added_tokens"]}      # control: never in a text
    kinds[model["vocab"][model["unk_id"]][0]] = 2                           # unknown
    proto = b""
    for piece, score in model["vocab"]:
        end = struct.pack("<BfBB", 21, score, 24, kinds.get(piece, 1))      # 1: normal
        proto += message(1, message(1, piece.encode()) + end)

    normalizer = content["normalizer"] or {"normalizers": []}
    for part in normalizer.get("normalizers", [normalizer]):
        if part["type"] not in ("Precompiled", "Replace", "Strip"):
            raise ValueError(f"its normaliser {part['type']} is not T5's")
        if part["type"] == "Precompiled":
            proto += message(3, message(2, base64.b64decode(part["precompiled_charsmap"])))
    return proto


class SentencePieceTokenizer:
    """The pieces of a `spiece.model` (Kudo & Richardson 2018, arXiv:1808.06226) or `tokenizer.json`,
    read by sentencepiece, as T5 was trained. The port in transformers differs in three things: a
    letter with combining marks or joiners is normalised there as a whole, by code point here; the
    name of a special token in a caption (`</s>`) is text here; NUL is a space here, see `clean`."""
    version = 1

    def __init__(self, path: Path, vocabulary: int):
        with damaged(path):
            proto = spiece_of(read_json(path)) if path.suffix == ".json" else path.read_bytes()
            model = SentencePieceProcessor(model_proto=proto)

        pieces = model.get_piece_size()
        end = model.eos_id()
        fits = max(1, vocabulary - 512) <= pieces <= vocabulary         # tables are padded by < 512
        if not fits or end < 0:
            raise ValueError(f"{path} has {pieces} pieces and end token {end}, "
                             f"config.json says {vocabulary}")

        self.encode = model.encode
        self.prefix = []
        self.suffix = [end]
        self.unknown = model.unk_id()
        self.files = [path]
        numbers = range(pieces)
        letters = "".join(map(chr, range(32, 0x3100)))                  # which show the normaliser
        self.content = [*map(model.id_to_piece, numbers), *map(model.get_score, numbers),
                        *model.encode(letters)]


@lru_cache(1 << 16)
def letter_class(char: str) -> str:
    """An ASCII stand-in of the same class: itself, or a letter, digit, space or sign."""
    if char.isascii() and char.isprintable():
        return char
    if char in "\t\n\v\f\r\x85":
        return " "
    return {"L": "a", "N": "1", "Z": " "}.get(unicodedata.category(char)[0], "!")


def letters_of_bytes():
    """CLIP's letter for each byte: its own where that is visible, else one from chr(256) on."""
    hidden = iter(range(256, 324))
    letters = {}
    for byte in range(256):
        visible = chr(byte).isprintable() and byte != 32
        letters[byte] = chr(byte if visible else next(hidden))
    return letters


class ClipTokenizer:
    """Byte pairs by `vocab.json` and `merges.txt`, or `tokenizer.json` (Radford et al. 2021,
    arXiv:2103.00020). The name of a special token in a caption is text, see T5."""
    version = 2         # 1 merged a pair that repeats without gap only every other time
    words = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")

    def __init__(self, path: Path, vocabulary: int):
        content = read_json(path)
        self.files = [path]
        if path.name == "vocab.json":
            merges = path.with_name("merges.txt")
            self.files.append(merges)
            with damaged(merges):
                lines = merges.read_text(encoding="utf-8").splitlines()
        else:
            with damaged(path):
                merges = content["model"]["merges"]
                lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
                content = dict(content["model"]["vocab"])

        start = content.get("<|startoftext|>")
        end = content.get("<|endoftext|>")
        known = [start, end, *content.values()]
        good = all(isinstance(i, int) and 0 <= i < vocabulary for i in known)

        pairs = []
        for line in lines:
            if line.strip() and not line.startswith("#version"):
                pairs.append(tuple(line.split()))
        if not good or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{path} or merges.txt is damaged, or does not fit config.json")

        self.vocab = content
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        self.content = sorted(content.items()), pairs
        self.prefix = [start]
        self.suffix = [end]
        self.unknown = end
        beside = path.with_name("tokenizer_config.json")
        said = read_json(beside) if beside.exists() else {}
        older = path.with_name("special_tokens_map.json")       # where both say something it counts: SD 2
        if older.exists() and "added_tokens_decoder" not in said:
            said |= read_json(older)
        pad = said.get("pad_token")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        self.pad = content.get(pad, end) if isinstance(pad, str) else end
        self.letter = letters_of_bytes()
        self.word = lru_cache(1 << 16)(self.merge)
        self.made_of = path, vocabulary

    def __reduce__(self):
        return ClipTokenizer, self.made_of          # pickled without what it remembers of words

    def merge(self, word):
        """Merge the neighbours of lowest rank until none are left that merge, a pair at all of its
        places at once, from the left. Each part has a space on both sides of its own."""
        letters = [self.letter[byte] for byte in word.encode()]
        parts = f" {'  '.join(letters)}</w> "
        while True:
            pairs = itertools.pairwise(parts.split())
            best = min(pairs, key=lambda pair: self.rank.get(pair, math.inf), default=None)
            if best not in self.rank:
                return [self.vocab.get(part, self.unknown) for part in parts.split()]
            parts = parts.replace(f" {'  '.join(best)} ", f" {''.join(best)} ")

    def encode(self, text):
        text = "".join(char.lower() for char in unicodedata.normalize("NFC", text))
        classes = "".join(map(letter_class, text))
        ids = []
        for match in self.words.finditer(classes):
            ids += self.word(text[match.start():match.end()])
        return ids


# --------------------------------------------------------------------------------- reading captions
def padded(tokens: int, length: int):
    """A number of tokens rounded up to a multiple of 8, from 8 to `length`."""
    return min(length, max(8, math.ceil(tokens / 8) * 8))


def numbered(part: dict, number):
    """What belongs to one of several encoders, by names that end in its number: `ids.0`."""
    return {f"{name}.{number}": x for name, x in part.items()}


def part_of(whole: dict, number):
    """What belongs to one of several encoders, by its plain names: the inverse of `numbered`."""
    end = f".{number}"
    return {name.removesuffix(end): x for name, x in whole.items() if name.endswith(end)}


@dataclass
class Reader:
    """Captions to arrays: token ids, or what a cache has of a frozen encoder.

    It has no weights, pickles, and runs no kernel of torch: made for the workers of a loader.
    lookup(caption, beside) -> context (l, D), pooled (P,), tensors in bfloat16, or a ValueError;
    they leave as uint16 of the same bits, since numpy has no such type. pad: the token that fills
    each caption up to `length` and counts as one of it, None = none; empty: whether an empty caption
    is read like any other. counts: of the captions that this process tokenised how many were empty,
    cut or cleaned, and the unknown tokens."""
    tokenizer: object
    length: int
    dim: int
    pooled_dim: int
    lookup: Callable | None = None
    pad: int | None = None
    empty: bool = False
    counts: Counter = field(default_factory=Counter)

    def __deepcopy__(self, memo):
        return self                     # the average of a network reads nothing of its own

    @property
    def limit(self):
        """Captions are cut here before they are tokenised, a megabyte takes 0.1 s [characters]."""
        return max(2000, 15 * self.length)

    def read(self, caption: str, beside: bytes = b"") -> dict:
        """The entry of a caption: "ids" (l,) int64, or "context" (l, D) and "pooled" (P,), uint16;
        and "cut", whether its end is missing. An empty caption has l = 0. beside: what a shard has
        beside the picture, for the lookup. Raises the ValueError of the lookup."""
        start = caption[:self.limit]
        text = clean(start)
        if self.lookup:
            context = np.zeros((0, self.dim), np.uint16)
            pooled = np.zeros(self.pooled_dim, np.uint16)
            if text or self.empty:
                found = self.lookup(caption, beside)
                context, pooled = (x.view(torch.uint16).numpy() for x in found)
            return {"context": context, "pooled": pooled, "cut": False}

        tokenizer = self.tokenizer
        tokens = tokenizer.encode(text) if text else []
        room = self.length - len(tokenizer.prefix) - len(tokenizer.suffix)
        cut = len(tokens) > room or len(caption) > self.limit
        self.counts.update(
            captions=1,
            empty=not tokens,
            cut=cut,
            cleaned=text != start.strip(),
            tokens=len(tokens),
            unknown=tokens.count(tokenizer.unknown),
        )
        if tokens or self.empty:
            tokens = [*tokenizer.prefix, *tokens[:room], *tokenizer.suffix]
        if tokens and self.pad is not None:
            tokens += [self.pad] * (self.length - len(tokens))
        return {"ids": np.array(tokens, np.int64), "cut": cut}

    def batch(self, entries: list) -> dict:
        """Entries -> "ids" (B, L) int64, or "context" (B, L, D) and "pooled" (B, P), uint16; "mask"
        (B, L) bool, True at tokens; "cut" (B,) bool. L is that of the longest, see `padded`."""
        name = "context" if self.lookup else "ids"
        lengths = [len(entry[name]) for entry in entries]
        width = padded(max(lengths), self.length)
        mask = np.arange(width) < np.array(lengths)[:, None]
        tokens = np.concatenate([entry[name] for entry in entries])
        rows = np.zeros((*mask.shape, *tokens.shape[1:]), tokens.dtype)
        rows[mask] = tokens

        batch = {name: rows, "mask": mask, "cut": np.array([entry["cut"] for entry in entries])}
        if self.lookup:
            batch["pooled"] = np.stack([entry["pooled"] for entry in entries])
        return batch


class MultiReader:
    """The readers of several encoders as one."""
    def __init__(self, readers: list[Reader]):
        self.readers = readers
        self.length = sum(reader.length for reader in readers)
        self.counts = sum((reader.counts for reader in readers), Counter())
        for reader in readers:
            reader.counts = self.counts

    def read(self, caption: str, beside: bytes = b""):
        """The entries that each encoder's reader makes of a caption."""
        return [reader.read(caption, beside) for reader in self.readers]

    def batch(self, entries: list):
        """The batches of all readers, see `numbered`, and "cut" (B,): whether any of them did."""
        batch = {"cut": np.zeros(len(entries), bool)}
        for number, reader in enumerate(self.readers):
            part = reader.batch([entry[number] for entry in entries])
            batch["cut"] |= part.pop("cut")
            batch |= numbered(part, number)
        return batch


# ------------------------------------------------------------------------------------------- towers
@cache
def imitates_bf16(kind: str) -> bool:
    """Whether a device of a kind, such as "cpu", multiplies float32 faster than bfloat16: GPUs before
    Ampere, and most desktops, which without AVX-512 BF16, AMX or ARM's imitate it, up to sixty times
    slower. Processors are measured, on one core."""
    if kind != "cpu":
        there = kind == "cuda" and torch.cuda.is_available()
        return there and not torch.cuda.is_bf16_supported(including_emulation=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                            # or other work would disturb it
    best = []
    ones = torch.ones(256, 256)
    for x in (ones.bfloat16(), ones):
        best.append(min(timeit.repeat(partial(torch.mm, x, x), number=1, repeat=5)))
    torch.set_num_threads(threads)
    return best[0] > 1.5 * best[1]                      # where they are near, bfloat16, whatever was measured


class Tower(Module):
    """A network whose layers compute in the type of their input. wide: the kinds of devices where that
    is float32, whatever that of the weights, of which a part at a time is then widened."""
    wide = ()

    def widened(self, x):
        return x.float() if x.device.type in self.wide else x


def weights_for(layer, x):
    """Those of a layer in the type of x, as its arguments."""
    return [weight.to(x.dtype) for weight in layer.parameters()]


class Linear(torch.nn.Linear):
    def forward(self, x):
        if self.weight.dtype == x.dtype:
            return super().forward(x)
        parts = []
        for rows in self.weight.split(1024):            # small copies, which malloc keeps: 4 times as fast
            parts.append(F.linear(x, rows.to(x.dtype)))
        y = torch.cat(parts, -1)
        return y if self.bias is None else y + self.bias


class RMSNorm(torch.nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, *weights_for(self, x), eps=self.eps)


class LayerNorm(torch.nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, *weights_for(self, x), eps=self.eps)


# ----------------------------------------------------------------------------------------------- T5
# What shapes a tower, by its name in config.json: the default, or all that is known here, the
# default first.
T5_SHAPE = {
    "vocab_size": None, "d_model": None, "d_kv": None, "d_ff": None, "num_layers": None, "num_heads": None,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6, "feed_forward_proj": ("relu", "gated-gelu"),
    "model_type": ("t5", "mt5", "umt5"),
}


def table(rows, width, kind=Embedding, **how):
    """An embedding, whose numbers are not drawn on the meta device: that would import torch's compiler."""
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        torch.nn.init.normal_(weight)
    return kind(rows, width, _weight=weight, **how)


def attend(x, linears, heads, bias=None, **how):
    """Attention of x (B, L, D) by the linear layers for q, k, v and what they give, (B, L, D)."""
    *inner, outer = linears
    q, k, v = (
        linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)                          # (B, K, L, E)
        for linear in inner)
    if bias is not None:
        bias = bias.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, bias, **how)
    return outer(y.transpose(1, 2).flatten(2))


class T5Block(Module):
    """Attention, then gelu(wi_0 y) * wi_1 y (Shazeer 2020, arXiv:2002.05202); v1.0: relu(wi y)."""
    def __init__(self, shape, has_table):
        super().__init__()
        self.heads = shape.num_heads
        self.gated = shape.feed_forward_proj == "gated-gelu"
        width = shape.d_model
        inner = shape.num_heads * shape.d_kv
        eps = shape.layer_norm_epsilon
        linear = partial(Linear, bias=False)

        attention = {name: linear(width, inner) for name in "qkv"}
        attention["o"] = linear(inner, width)
        if has_table:
            buckets = shape.relative_attention_num_buckets
            attention["relative_attention_bias"] = table(buckets, self.heads)

        names = ["wi_0", "wi_1"] if self.gated else ["wi"]
        feed = {name: linear(width, shape.d_ff) for name in names}
        feed["wo"] = linear(shape.d_ff, width)

        first = {"SelfAttention": ModuleDict(attention), "layer_norm": RMSNorm(width, eps)}
        second = {"DenseReluDense": ModuleDict(feed), "layer_norm": RMSNorm(width, eps)}
        self.layer = ModuleList([ModuleDict(first), ModuleDict(second)])

    def forward(self, x, bias):
        first, second = self.layer
        linears = [first["SelfAttention"][name] for name in "qkvo"]
        y = first["layer_norm"](x)
        x = x + attend(y, linears, self.heads, bias, scale=1.0)                       # (B, L, D)

        w = second["DenseReluDense"]
        y = second["layer_norm"](x)
        if self.gated:
            y = F.gelu(w["wi_0"](y), approximate="tanh") * w["wi_1"](y)
        else:
            y = F.relu(w["wi"](y))
        return x + w["wo"](y)


def relative_buckets(shape, length, device):
    """Bucket of each (query, key) pair, (L, L), by distance (Raffel et al. 2020, arXiv:1910.10683,
    2.1): half of them for keys ahead; in each half one for every near offset, then wider ones up to
    the largest distance."""
    place = torch.arange(length, device=device)
    offset = place[None, :] - place[:, None]
    distance = offset.abs()
    half = shape.relative_attention_num_buckets // 2
    exact = shape.relative_attention_num_buckets // 4

    scale = math.log(shape.relative_attention_max_distance / exact)
    far = torch.log(distance.clamp(min=exact).float() / exact) / scale
    far = exact + (far * (half - exact)).long()
    bucket = torch.where(distance < exact, distance, far.clamp(max=half - 1))
    return half * (offset > 0) + bucket


class ByteEmbedding(Module):
    """Bytes, each with the hashed 3- to 8-grams that end there (Pagnoni et al. 2024,
    arXiv:2412.09871, 3.2): a word has a vector of its own from the first step. ids (B, L) ->
    (B, L, D)."""
    def __init__(self, width):
        super().__init__()
        self.bytes = table(259, width)
        self.grams = table(8192, width, torch.nn.EmbeddingBag, mode="sum")

    def forward(self, ids):
        grams = [ids]
        for _ in range(7):
            grams.append(F.pad(grams[-1][:, :-1], (1, 0)) * 1000003 + ids)            # modulo 2^64
        mixed = torch.stack(grams[2:], -1) * -0x61C8864680B583EB >> 32                # (B, L, 6)
        bucket = (mixed % self.grams.num_embeddings).flatten(0, 1)
        return self.bytes(ids) + 0.4 * self.grams(bucket).view(*ids.shape, -1)        # (B, L, D)


class LetterEmbedding(Module):
    """Bytes of a transcription, each with its line and its place in that, counted from both ends: letters
    have an order, and lines are centred. ids (B, L), L up to `length`, 0 behind the end -> (B, L, D)."""
    def __init__(self, width, length):
        super().__init__()
        self.bytes = table(259, width)
        self.line = table(length, width)
        self.place = table(length, width)
        self.lines_left = table(length, width)
        self.places_left = table(length, width)

    def forward(self, ids):
        index = torch.arange(ids.shape[1], device=ids.device)
        breaks = ids == 3 + ord("\n")                                                 # (B, L)
        start = torch.where(breaks, index, 0).cummax(1).values
        line = breaks.cumsum(1)
        first = self.line(line) + self.place(index - start)

        # The end of a line is a break, or what is no byte: the end token, padding.
        ends = torch.where(breaks | (ids < 3), index, ids.shape[1] - 1)
        end = ends.flip(1).cummin(1).values.flip(1)
        last = self.lines_left(line[:, -1:] - line) + self.places_left(end - index)
        return self.bytes(ids) + first + last                                         # (B, L, D)


class T5Encoder(Tower):
    """The encoder of T5 v1.0 (Raffel et al. 2020, arXiv:1910.10683), v1.1, Flan, mT5, umT5, ByT5:
    pre-norm, no biases, q.k unscaled, one unscaled table of relative positions for all layers
    (umT5: one each). ids (B, L) int64, mask (B, L) bool -> context (B, L, D), its mean over the
    tokens (B, D); finite if empty. around: add the tokens themselves to what the blocks say of them."""
    others = ("decoder.", "lm_head.")           # what a published file has beside it
    around = False

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.dim = self.pooled_dim = shape.d_model

        self.shared = table(shape.vocab_size, shape.d_model)   # byte_encoder puts a ByteEmbedding here
        self.encoder = Module()
        self.encoder.block = ModuleList(
            T5Block(shape, has_table=i == 0 or shape.model_type == "umt5")
            for i in range(shape.num_layers))
        self.encoder.final_layer_norm = RMSNorm(shape.d_model, shape.layer_norm_epsilon)

    def forward(self, ids, mask):
        buckets = relative_buckets(self.shape, ids.shape[1], ids.device)
        seen = mask | ~mask.any(1, keepdim=True)        # where all keys are hidden some kernels say nan
        x = tokens = self.widened(self.shared(ids))                                   # (B, L, D)
        for block in self.encoder.block:
            attention = block.layer[0]["SelfAttention"]
            if "relative_attention_bias" in attention:
                tables = attention["relative_attention_bias"](buckets)                 # (L, L, K)
                hidden = torch.finfo(tables.dtype).min
                bias = torch.where(seen[:, None, None], tables.permute(2, 0, 1), hidden)   # (B, K, L, L)
            x = block(x, bias)

        x = self.encoder.final_layer_norm(x)
        if self.around:
            x = x + tokens
        count = mask.sum(1, keepdim=True).clamp(min=1)
        return x, (x.float() * mask[..., None]).sum(1) / count


# --------------------------------------------------------------------------------------------- CLIP
CLIP_TEXT = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "projection_dim": 512, "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5, "hidden_act": ("quick_gelu", "gelu"), "model_type": ("clip_text_model",),
}
CLIP_VISION = CLIP_TEXT | {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "model_type": ("clip_vision_model",),
}

CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class ClipLayer(Module):
    def __init__(self, shape):
        super().__init__()
        width = shape.hidden_size
        inner = shape.intermediate_size
        self.heads = shape.num_attention_heads
        self.quick = shape.hidden_act == "quick_gelu"

        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = ModuleDict({name: Linear(width, width) for name in names})
        self.mlp = ModuleDict({"fc1": Linear(width, inner), "fc2": Linear(inner, width)})
        self.layer_norm1 = LayerNorm(width, shape.layer_norm_eps)
        self.layer_norm2 = LayerNorm(width, shape.layer_norm_eps)

    def forward(self, x, causal):
        linears = self.self_attn.values()
        x = x + attend(self.layer_norm1(x), linears, self.heads, is_causal=causal)    # (B, L, D)

        y = self.mlp["fc1"](self.layer_norm2(x))
        y = y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y)
        return x + self.mlp["fc2"](y)


class ClipTower(ModuleDict):
    """What both towers of CLIP have (Radford et al. 2021, arXiv:2103.00020)."""
    def __init__(self, shape, positions, norms, **embeddings):
        super().__init__()
        width = shape.hidden_size
        for name in norms:
            self[name] = LayerNorm(width, shape.layer_norm_eps)
        self.embeddings = ModuleDict(embeddings)
        self.embeddings["position_embedding"] = table(positions, width)
        layers = ModuleList(ClipLayer(shape) for _ in range(shape.num_hidden_layers))
        self.encoder = ModuleDict({"layers": layers})


class CLIPTextEncoder(Tower):
    """The text tower of CLIP or OpenCLIP. ids (B, L) int64, mask (B, L) bool -> context (B, L, D),
    the last layer normalised or the penultimate as it is; pooled (B, P), the last layer at the
    first token `end`, projected if the checkpoint has a projection."""
    others = ("vis", "logit_scale")

    def __init__(self, shape, has_projection, layer, end):
        super().__init__()
        self.layer = layer
        self.end = end
        self.dim = shape.hidden_size
        self.pooled_dim = shape.projection_dim if has_projection else self.dim

        tokens = table(shape.vocab_size, self.dim)
        self.text_model = ClipTower(shape, shape.max_position_embeddings, ("final_layer_norm",),
                                    token_embedding=tokens)
        projection = Linear(self.dim, self.pooled_dim, bias=False)
        self.text_projection = projection if has_projection else torch.nn.Identity()

    def forward(self, ids, mask):
        model = self.text_model
        place = model.embeddings.position_embedding.weight[:ids.shape[1]]
        x = self.widened(model.embeddings.token_embedding(ids)) + place               # (B, L, D)
        for layer in model.encoder.layers:
            before = x
            x = layer(x, causal=True)           # no token sees the padding behind it
        x = model.final_layer_norm(x)

        row = torch.arange(len(x), device=x.device)
        last = (ids == self.end).int().argmax(1)
        pooled = self.text_projection(x[row, last]) * mask.any(1, keepdim=True)       # (B, P)
        return before if self.layer == "penultimate" else x, pooled


def clip_pixels(pictures, size):
    """CLIP's pre-processing, uint8 (B, 3, H, W) -> float32 (B, 3, size, size): the short side is
    resized (bicubic, antialiased, rounded to 256 levels), the middle cut out, and CLIP's mean and
    deviation taken off."""
    short = min(pictures.shape[-2:])
    shape = [size * side // short for side in pictures.shape[-2:]]
    top, left = ((side - size) // 2 for side in shape)

    x = F.interpolate(pictures.float(), shape, mode="bicubic", antialias=True)
    x = x[..., top:top + size, left:left + size]                                      # (B, 3, H, W)
    x = x.round().clamp(0, 255) / 255
    mean, deviation = x.new_tensor(CLIP_PIXELS).view(2, 3, 1, 1)
    return (x - mean) / deviation


class CLIPImageEncoder(Tower):
    """The picture tower: uint8 (B, 3, H, W) -> (B, P) float32, in the space of its text tower's
    pooled."""
    others = ("text_", "logit_scale")

    def __init__(self, shape):
        super().__init__()
        self.size = shape.image_size
        width = shape.hidden_size
        patch = shape.patch_size
        positions = (self.size // patch) ** 2 + 1

        patches = torch.nn.Conv2d(3, width, patch, patch, bias=False)
        self.vision_model = ClipTower(shape, positions, ("pre_layrnorm", "post_layernorm"),
                                      patch_embedding=patches)
        self.vision_model.embeddings.class_embedding = torch.nn.Parameter(torch.zeros(width))
        self.visual_projection = Linear(width, shape.projection_dim, bias=False)

    def forward(self, pictures):
        model = self.vision_model
        embed = model.embeddings
        first = embed.class_embedding.expand(len(pictures), 1, -1)
        x = embed.patch_embedding(clip_pixels(pictures, self.size).to(first.dtype))
        x = self.widened(torch.cat([first, x.flatten(2).transpose(1, 2)], 1))         # (B, L, D)
        x = model.pre_layrnorm(x + embed.position_embedding.weight)
        for layer in model.encoder.layers:
            x = layer(x, causal=False)
        return self.visual_projection(model.post_layernorm(x[:, 0])).float()          # (B, P)


# -------------------------------------------------------------------------------- published weights
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "model.fp16.safetensors", "model.safetensors.index.fp16.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


def first_of(folders, names):
    """The first of some files that is there, or the one that should be."""
    paths = [folder / name for folder in folders for name in names]
    return next((path for path in paths if path.exists()), paths[0])


def read_shape(table, config, path):
    """The fields of `table` out of a config.json; ValueError for one missing or impossible."""
    shape = {}
    kind = config.get("model_type")
    if kind not in table["model_type"]:
        read = ", ".join(table["model_type"])
        raise ValueError(f"{path}: model_type is {kind!r}, which is not read here: {read} is")

    for name, usual in table.items():
        if isinstance(usual, tuple):
            value = config.get(name, usual[0])
            good = value in usual
            known = f"one of {', '.join(usual)}"
        else:
            value = config.get(name, usual)
            kind = float if isinstance(usual, float) else int
            limit = 1000 if "layers" in name else 500_000       # no product of three overflows
            good = type(value) is kind and 0 < value < limit
            known = f"a number below {limit}"
        if not good:
            raise ValueError(f"{path}: {name} is {value!r}, it must be {known}")
        shape[name] = value

    if shape.get("hidden_size", 0) % shape.get("num_attention_heads", 1):
        raise ValueError(f"{path}: hidden_size is no multiple of num_attention_heads")
    near = shape.get("relative_attention_num_buckets", 4) // 4
    if not 0 < near < shape.get("relative_attention_max_distance", 2):
        raise ValueError(f"{path}: relative_attention_num_buckets is below 4, or a quarter of it "
                         "not below relative_attention_max_distance")
    return SimpleNamespace(**shape)


def weight_files(folder: Path, allow_bin: bool):
    """The file with a folder's weights, or the shards that its index lists."""
    path = first_of([folder], WEIGHT_FILES)
    major, minor = torch.__version__.split(".")[:2]
    recent = (int(major), int(minor)) >= (2, 10)
    if ".bin" in path.name and not (allow_bin and recent):
        raise ValueError(f"{path} is a pickle file. Convert it to safetensors, or pass --allow-bin "
                         f"with torch >= 2.10 (this is {torch.__version__}; CVE-2026-24747)")
    if path.suffix != ".json":
        return [path]

    with damaged(path):
        shards = sorted(set(map(str, read_json(path)["weight_map"].values())))
        for name in shards:
            if name != Path(name).name or name in ("", ".."):
                raise ValueError(f"it lists a path outside the folder: {name!r}")
            if not (folder / name).exists():
                raise ValueError(f"it lists {name}, which is missing")
    return [folder / name for name in shards]


def read_rows(path, name, rows):
    with damaged(path), safe_open(path, "pt") as file:
        return file.get_slice(name)[rows].clone()      # leaving unmaps the file: it holds no memory


def open_weights(path: Path):
    """Yield the name and the shape of each tensor in a file, and what reads some of its rows."""
    with damaged(path):
        if path.suffix == ".bin":
            tensors = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            for name, tensor in tensors.items():
                if tensor.nbytes > tensor.untyped_storage().nbytes():
                    raise ValueError(f"{name} is larger than what is stored of it")
                yield str(name), tensor.shape, tensor.__getitem__
        else:
            with safe_open(path, "pt") as file:
                for name in list(file.keys()):
                    shape = file.get_slice(name).get_shape()
                    yield name, shape, partial(read_rows, path, name)


class Weights:
    """The tensors of a folder by their published names; each is read only when it is asked for."""
    def __init__(self, folder: Path, allow_bin: bool):
        self.folder = folder
        self.files = weight_files(folder, allow_bin)
        self.shape = {}
        self.read = {}                  # name -> function of the rows to read
        for path in self.files:
            for name, shape, read in open_weights(path):
                if name == "encoder.embed_tokens.weight":
                    name = "shared.weight"              # two names of one matrix
                elif name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
                    name = f"text_model.{name}"         # CLIP's text tower, by transformers >= 5
                self.shape[name] = tuple(shape)
                self.read[name] = read

    def check(self, model):
        """ValueError unless these are the tensors of `model`, but for those of its `others`."""
        wrong = []
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name, shape in wanted.items():
            found = self.shape.get(name, "missing")
            if found != shape:
                wrong.append(f"{name} is {found}, config.json says {shape}")
        for name in sorted(set(self.shape) - set(wanted)):
            if not name.startswith(model.others) and not name.endswith(".position_ids"):
                wrong.append(f"{name} is not known")
        if wrong:
            raise ValueError(f"{self.folder}: {wrong[0]} ({len(wrong)} tensors do not fit). "
                             "Another model?")

    def fill(self, model: Module, dtype):
        """Give `model` (checked, on the meta device) its weights, frozen; peaks a tensor above it.
        A number that is not finite is an error; other flipped bits are not seen: there is no
        checksum."""
        state = {}
        for name in model.state_dict():
            tensor = self.read[name](slice(None))
            if tensor.dtype not in (*DTYPES.values(), torch.float64):
                raise ValueError(f"{self.folder}: {name} is {tensor.dtype}. "
                                 "Quantised weights are not read")
            state[name] = tensor.to(dtype)
            if not torch.stack(state[name].aminmax()).isfinite().all():
                raise ValueError(f"{self.folder}: {name} is not finite in {dtype}. "
                                 "Download it again")
        model.load_state_dict(state, assign=True)
        if dtype == torch.bfloat16:
            model.wide = [kind for kind in ("cpu", "cuda") if imitates_bf16(kind)]
        return model.eval().requires_grad_(False)

    def digest(self, model, parts, also=()):
        """A hash of `parts` (slices) of the rows of each tensor, as float32, and of `also`."""
        result = sha256(repr(also).encode())
        for name in model.state_dict():
            for rows in parts:
                row = self.read[name](rows).float().contiguous()
                result.update(name.encode())
                result.update(row.flatten().numpy())
        return result.hexdigest()[:32]

    def whole_digest(self, model):
        """That of all rows, read once: kept in the user's cache folder until a file's path, size or
        time changes."""
        mark = list(model.state_dict())
        for path in self.files:
            state = path.stat()
            mark.append((os.path.abspath(path), state.st_size, state.st_mtime_ns))
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        kept = Path(home, "limn", sha256(repr(mark).encode()).hexdigest())

        with contextlib.suppress(OSError, ValueError):
            found = kept.read_text()
            if len(found) == 32:                # else it was torn
                return found
        found = self.digest(model, [slice(None)])
        with contextlib.suppress(OSError):      # no room for it: read again next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(found)
        return found


# ------------------------------------------------------------------------------------ text encoders
class TextEncoder(Module):
    """A reader and a tower: captions -> {"context", "mask", "pooled"}.

    tower: None where the reader looks up what it said. trainable: the weights train with the U-Net
    and belong into its checkpoint; else they stay in their folder, and the output has no gradient
    and ignores autocast. dim: D. pooled_dim: P. length: L. fingerprint: of weights and settings."""
    transcriber = None                          # the reader of a second stream, and its width, see Streams
    written_dim = 0

    def __init__(self, tower, reader: Reader, fingerprint: str, trainable: bool):
        super().__init__()
        self.tower = tower
        self.reader = reader
        self.dim = reader.dim
        self.pooled_dim = reader.pooled_dim
        self.length = reader.length
        self.fingerprint = fingerprint
        self.trainable = trainable
        if not trainable:
            self.__deepcopy__ = lambda memo: self       # the average of a network shares it

    def inputs(self, batch: dict, device, trim: bool = False):
        """What `forward` takes, on the device, of a batch of arrays or tensors, see Reader.batch;
        padded to `length`, so that shapes never change, or trimmed to the longest, see `padded`.
        Other names of the batch are passed over."""
        mask = batch["mask"]
        width = padded(int(mask.sum(1).max()), self.length) if trim else self.length
        more = width - mask.shape[1]                    # a negative number of tokens is cut off
        found = {}
        for name in ("mask", "ids", "context", "pooled"):
            if name in batch:
                x = torch.as_tensor(batch[name])
                if x.dtype == torch.uint16:
                    x = x.view(torch.bfloat16)
                x = x.to(device, non_blocking=torch.device(device).type != "mps")
                if name != "pooled":
                    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, more))
                found[name] = x
        return found

    def forward(self, mask, ids=None, context=None, pooled=None):
        """mask (B, L) with ids (B, L); or with what was looked up, context (B, L, D) and pooled
        (B, P), bfloat16 or its bits in uint16 -> {"context": (B, L, D), zero at padding, "mask",
        "pooled": (B, P), zero of an empty caption}."""
        if ids is None:
            context = context.view(torch.bfloat16).float()
            pooled = pooled.view(torch.bfloat16).float()
        elif self.trainable:
            context, pooled = self.tower(ids, mask)
        else:
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
                context, pooled = (x.float() for x in self.tower(ids, mask))
        return {"context": context * mask[..., None], "mask": mask, "pooled": pooled}

    def encode(self, captions: list[str], device):
        """The condition of captions, at full length, on the device."""
        batch = self.reader.batch([self.reader.read(caption) for caption in captions])
        return self(**self.inputs(batch, device))


class MultiEncoder(Module):
    """Several encoders side by side: their tokens in one row, each through its own projection, plus
    its type. Only what is learned is registered (projections, types, encoders trained along):
    parameters() and state_dict() leave the frozen ones out. context (B, sum of L, max of D), pooled
    (B, sum of P)."""
    transcriber = None
    written_dim = 0

    def __init__(self, encoders: list[TextEncoder]):
        super().__init__()
        self.encoders = tuple(encoders)
        self.reader = MultiReader([encoder.reader for encoder in encoders])
        self.dim = max(encoder.dim for encoder in encoders)
        self.pooled_dim = sum(encoder.pooled_dim for encoder in encoders)
        self.length = self.reader.length
        self.fingerprint = " + ".join(encoder.fingerprint for encoder in encoders)
        self.trainable = True

        self.trained = ModuleList(encoder for encoder in encoders if encoder.trainable)
        self.project = ModuleList(
            Linear(encoder.dim, self.dim, bias=False) for encoder in encoders)
        self.kind = torch.nn.Parameter(0.02 * torch.randn(len(encoders), self.dim))

    def _apply(self, fn, recurse=True):             # .to(device) moves the frozen ones, too
        for encoder in self.encoders:
            encoder._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def inputs(self, batch: dict, device, trim: bool = False):
        """What `forward` takes of all encoders, see `numbered` and TextEncoder.inputs."""
        found = {}
        for number, encoder in enumerate(self.encoders):
            found |= numbered(encoder.inputs(part_of(batch, number), device, trim), number)
        return found

    def forward(self, **inputs):
        """`mask.0`, `ids.0`, ... -> {"context", "mask", "pooled"}, see TextEncoder.forward."""
        said = []
        for number, encoder in enumerate(self.encoders):
            part = encoder(**part_of(inputs, number))
            part["context"] = self.project[number](part["context"]) + self.kind[number]
            said.append(part)

        whole = {name: torch.cat([part[name] for part in said], 1) for name in said[0]}
        whole["context"] = whole["context"] * whole["mask"][..., None]
        return whole

    encode = TextEncoder.encode


class WideEncoder(MultiEncoder):
    """Several frozen CLIPs that read the same captions, their widths side by side, as in SDXL (Podell
    et al. 2023, arXiv:2307.01952, section 2.1): context (B, L, sum of D), pooled (B, P) of the last."""
    def __init__(self, encoders: list[TextEncoder]):
        super().__init__(encoders)
        lengths = [encoder.length for encoder in encoders]
        if len(set(lengths)) > 1 or any("clip" not in encoder.fingerprint for encoder in encoders):
            raise ValueError(f"--text-padding makes one of several CLIPs of one length, not of {lengths} "
                             "tokens and others. Leave it away")
        self.dim = sum(encoder.dim for encoder in encoders)
        self.pooled_dim = encoders[-1].pooled_dim
        self.length = lengths[0]
        self.trainable = False
        del self.project, self.kind

    def forward(self, **inputs):
        said = [encoder(**part_of(inputs, number)) for number, encoder in enumerate(self.encoders)]
        context = torch.cat([part["context"] for part in said], 2)
        return said[-1] | {"context": context}


WRITTEN = "transcription_"      # before the names of what belongs to the second stream of text


def second(part: dict):
    """What an encoder takes or gives, by the names of the second stream."""
    return {WRITTEN + name: x for name, x in part.items()}


def parted(whole: dict):
    """What belongs to captions, and to the second stream, by its plain names."""
    first = {}
    other = {}
    for name, x in whole.items():
        part = other if name.startswith(WRITTEN) else first
        part[name.removeprefix(WRITTEN)] = x
    return first, other


class Streams(MultiEncoder):
    """Two streams of text with an encoder each: captions, and what is written in the pictures, whose names
    have WRITTEN before them."""
    def __init__(self, captions, transcription: TextEncoder):
        Module.__init__(self)
        self.encoders = captions, transcription
        self.reader = captions.reader
        self.transcriber = transcription.reader
        self.written_dim = transcription.dim
        self.dim = captions.dim
        self.pooled_dim = captions.pooled_dim
        self.length = captions.length
        self.fingerprint = f"{captions.fingerprint} + transcription {transcription.fingerprint}"
        self.trainable = True
        if captions.trainable:
            self.captions = captions
        self.transcription = transcription

    def inputs(self, batch: dict, device, trim: bool = False):
        """What `forward` takes of both encoders, see TextEncoder.inputs."""
        parts = []
        for encoder, part in zip(self.encoders, parted(batch)):
            parts.append(encoder.inputs(part, device, trim))
        return parts[0] | second(parts[1])

    def forward(self, **inputs):
        """{"context", "mask", "pooled"} of the captions, and the same of the second stream."""
        captions, transcription = self.encoders
        first, other = parted(inputs)
        return captions(**first) | second(transcription(**other))

    def encode(self, captions: list[str], device, transcriptions: list[str] | None = None):
        """The condition of captions and of what is to be written, by default nothing."""
        lines = transcriptions or [""] * len(captions)
        parts = [encoder.encode(texts, device) for encoder, texts in zip(self.encoders, (captions, lines))]
        return parts[0] | second(parts[1])


def encode_captions(encoder: TextEncoder, captions: list[str], batch_tokens=8192):
    """Yield (index, context (L, D), pooled (P)) in bf16, without padding, computed on the encoder's
    device: longest first, in batches of like length and about `batch_tokens` tokens."""
    device = next(encoder.parameters()).device
    entries = [encoder.reader.read(caption) for caption in captions]
    lengths = [len(entry["ids"]) for entry in entries]
    order = sorted(range(len(entries)), key=lengths.__getitem__, reverse=True)

    while order:
        width = padded(lengths[order[0]], encoder.length)
        rows = order[:max(1, batch_tokens // width)]
        order = order[len(rows):]

        batch = encoder.reader.batch([entries[row] for row in rows])
        with torch.no_grad():
            said = encoder(**encoder.inputs(batch, device, trim=True))
        context = said["context"].bfloat16().cpu()
        pooled = said["pooled"].bfloat16().cpu()
        for i, row in enumerate(rows):
            yield row, context[i, :lengths[row]], pooled[i]


# ----------------------------------------------------------------------------------------- loading
FINGERPRINT = re.compile(r"[^+]{0,255}?d=(\d+) length=(\d+) (\w{32})"
                         r"(?: p=(\d+) (\w{32}) tokens=([\d.]+))?")
OLD_TOKENS = "1.2000"       # of fingerprints that do not say it


def same_encoder(stored: str, own: str, tokens: bool = False):
    """Whether two fingerprints are of encoders with the same weights, pieces and settings.

    One says: kind and settings, width, length, a hash of first and last rows and files, P, a hash
    of all numbers, the version of the tokenizer with its limit in characters. Older ones begin with
    the name of a folder and end at the rows: then these decide. `tokens`: captions must be read
    alike, too, as for a cache. Several are joined by +; what is trained along must be equal."""
    if FINGERPRINT.sub("#", stored) != FINGERPRINT.sub("#", own):
        return False
    for a, b in zip(FINGERPRINT.finditer(stored), FINGERPRINT.finditer(own)):
        groups = (1, 2, 5) if a[5] and b[5] else (1, 2, 3)
        if a.group(*groups) != b.group(*groups):
            return False
        if tokens and (a[6] or OLD_TOKENS) != (b[6] or OLD_TOKENS):
            return False
    return True


def open_folder(name: str, config: TextConfig, tower: str):
    """The path of config.json, what it says (of CLIP: of this tower), the weights, still unread."""
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"--text-encoder or --rank {name} is no folder. "
                         "Name a published one, or bytes")
    path = folder / "config.json"
    inside = list(folder.glob("text_encoder*/config.json"))     # of a pipeline
    if len(inside) == 1 and not path.exists():
        path = inside[0]

    content = read_json(path)
    if content.get("model_type") == "clip":
        whole = content
        content = {"projection_dim": whole.get("projection_dim", 512)}
        with damaged(path):
            for end in ("config", "config_dict"):
                content = {**(whole.get(f"{tower}_{end}") or {}), **content}
        content["model_type"] = f"clip_{tower}_model"
    return path, content, Weights(path.parent, config.allow_bin)


def frozen_encoder(name: str, config: TextConfig):
    """The encoder of a published folder, still without weights, and what reads them, once."""
    path, content, weights = open_folder(name, config, "text")
    folder = path.parent.absolute()
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")       # in a pipeline
    find = partial(first_of, (path.parent, beside))
    length = config.text_length
    kind = content.get("model_type")
    with torch.device("meta"):
        if kind == "clip_text_model":
            shape = read_shape(CLIP_TEXT, content, path)
            projected = "text_projection.weight" in weights.shape
            tokenizer = ClipTokenizer(find(("vocab.json", "tokenizer.json")), shape.vocab_size)
            tower = CLIPTextEncoder(shape, projected, config.clip_layer, *tokenizer.suffix)
            length = min(length, shape.max_position_embeddings)
        else:
            feed = "relu" if kind == "t5" else "gated-gelu"
            shape = read_shape(T5_SHAPE, {"feed_forward_proj": feed} | content, path)
            tower = T5Encoder(shape)
            pieces = find(("spiece.model", "tokenizer.model", "tokenizer.json"))
            if shape.vocab_size == 384 and not pieces.exists():
                tokenizer = ByteTokenizer()
            else:
                tokenizer = SentencePieceTokenizer(pieces, shape.vocab_size)
    weights.check(tower)

    # What is the same in all copies of an encoder, whatever their folders and files.
    pad = tokenizer.pad if config.text_padding and kind == "clip_text_model" else None
    alone = len(config.text_encoder) == 1                       # SDXL says nothing of an empty caption
    reader = Reader(tokenizer, length, tower.dim, tower.pooled_dim, pad=pad,
                    empty=alone and pad is not None)
    settings = repr(shape), config.clip_layer, config.text_dtype
    if pad is not None:
        settings += (pad,)
    files = [sha256(file.read_bytes()).hexdigest() for file in tokenizer.files]
    first_and_last = slice(0, 1), slice(-1, None)
    ends = weights.digest(tower, first_and_last, (*settings, *files))
    content = (settings, tokenizer.content, weights.whole_digest(tower))
    digest = sha256(repr(content).encode()).hexdigest()[:32]
    fingerprint = (f"{kind} {config.text_dtype} {config.clip_layer} d={tower.dim} length={length} "
                   f"{ends} p={tower.pooled_dim} {digest} tokens={tokenizer.version}.{reader.limit}")

    encoder = TextEncoder(tower, reader, fingerprint, trainable=False)
    load = partial(weights.fill, tower, DTYPES[config.text_dtype])
    return encoder, cache(load)


def fingerprint_of(name: str, config: TextConfig):
    """That of the encoder in a published folder, or in one line why there is none."""
    try:
        return frozen_encoder(name, config)[0].fingerprint
    except ValueError as error:
        return str(error)


def fingerprints(stored: str):
    """Those of frozen encoders in what a checkpoint or a file of embeddings says of several."""
    return [match[0].strip(" +") for match in FINGERPRINT.finditer(stored)]


def locate(config: TextConfig, stored: str, near: list[Path], given: list[str]):
    """The configuration with the folders where the encoders of a fingerprint lie now: one of those
    `given`, that which it names, or one inside the folders `near`. ValueError if there is none."""
    wanted = fingerprints(stored)
    names = []
    for name in config.text_encoder:
        if name != "bytes":
            own = wanted.pop(0) if wanted else stored
            places = [*given, name]
            for folder in near:
                places.append(str(folder / Path(name).name))
                places += [str(path.parent) for path in sorted(folder.glob("*/config.json"))]
            said = fingerprint_of(places[0], config)
            same = (place for place in places if same_encoder(fingerprint_of(place, config), own))
            name = next(same, "")
            if not name:
                raise ValueError(f"the text encoder {own} is not in {places[0]} ({said}), nor near. "
                                 "Say where its folder is: --text-encoder DIR")
        names.append(name)
    return replace(config, text_encoder=names)


def embedded_encoder(name: str, config: TextConfig, stored: list[str], usual: str):
    """The encoder of embeddings, by their fingerprints, without its weights. Its folder need not be
    there: then it is the one that is `usual`, if that has the settings of the configuration."""
    own = fingerprint_of(name, config)
    if not FINGERPRINT.match(own):
        own = usual
    for part in stored:
        match = FINGERPRINT.match(part)
        dim, length, pooled = (int(number or match[1]) for number in match.group(1, 2, 4))
        fits = own != usual or length == min(config.text_length, 77 if "clip" in part else 4096)
        if match[5]:
            fits &= f" {config.text_dtype} {config.clip_layer} d=" in part
        if fits and same_encoder(part, own, tokens=True):
            return TextEncoder(None, Reader(None, length, dim, pooled), part, trainable=False)
    raise ValueError(f"the embeddings were made with {' + '.join(stored)}, not with {own or name}, "
                     f"--text-length {config.text_length}. Write the shards again")


def load_image_encoder(name: str, config: TextConfig) -> CLIPImageEncoder:
    """The picture tower of a CLIP folder, frozen; ValueError if unreadable."""
    path, content, weights = open_folder(name, config, "vision")
    with torch.device("meta"):
        tower = CLIPImageEncoder(read_shape(CLIP_VISION, content, path))
    weights.check(tower)
    return weights.fill(tower, DTYPES[config.text_dtype])


def byte_encoder(width: int, layers: int, length: int, letters: bool = False):
    """A small T5 v1.1 over bytes with fresh weights, to be trained along. letters: of a transcription, whose
    letters go around the blocks as well. Alone those learn in 300 steps to say of all letters the same, since
    at first it only matters that there are some (30 times what tells them apart)."""
    shape = {
        "vocab_size": 259, "d_model": width, "d_kv": 32, "d_ff": 2 * width,
        "num_heads": width // 32, "num_layers": layers,
        "feed_forward_proj": "gated-gelu", "model_type": "t5",
    }
    tower = T5Encoder(SimpleNamespace(**T5_SHAPE | shape))
    tower.shared = LetterEmbedding(width, length) if letters else ByteEmbedding(width)
    tower.around = letters
    reader = Reader(ByteTokenizer(), length, width, width)
    return TextEncoder(tower, reader, f"bytes {shape} {length}", trainable=True)


def load_text_encoder(config: TextConfig, cached: Callable | None = None, stored: str = "",
                      device: str = "cpu"):
    """The TextEncoder of a configuration, or several as a MultiEncoder; ValueError if unreadable.

    cached(number, encoder, load) -> lookup, see Reader: what a frozen encoder says is looked up and
    no weights are read; load() reads them into `encoder`, once, for encode_captions. stored: the
    fingerprints of embeddings that a file has of every caption: no folder is needed beside them.
    device: of the weights that train along, such as meta, which takes no memory."""
    parts = fingerprints(stored)
    frozen = [name for name in config.text_encoder if name != "bytes"]
    usual = dict(zip(frozen, parts)) if len(frozen) == len(parts) else {}
    encoders = []
    for number, name in enumerate(config.text_encoder):
        if name == "bytes":
            with torch.device(device):
                encoder = byte_encoder(config.byte_width, config.byte_layers, config.text_length)
        else:
            load = None
            if stored:
                encoder = embedded_encoder(name, config, parts, usual.get(name, ""))
            else:
                encoder, load = frozen_encoder(name, config)

            if cached:
                reader = replace(encoder.reader, lookup=cached(number, encoder, load))
                encoder = TextEncoder(None, reader, encoder.fingerprint, trainable=False)
            else:
                load()
        encoders.append(encoder)
    with torch.device(device):
        text = encoders[0]
        if len(encoders) > 1:
            text = WideEncoder(encoders) if config.text_padding else MultiEncoder(encoders)
        if not config.transcription:
            return text
        shape = config.transcription_width, config.transcription_layers, config.transcription_length
        return Streams(text, byte_encoder(*shape, letters=True))
