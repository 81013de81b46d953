"""Captions to tensors: every T5 in plain torch, and CLIP, for captions and for pictures.

    encoder = load_text_encoder(TextConfig())                           # bytes, trained along with the U-Net
    encoder = load_text_encoder(TextConfig(["t5-v1_1-xl"]))             # a folder as published, frozen
    context, mask, pooled = encoder(*encoder.tokenize(["a red house"]))
Letters: B batch, L text tokens, D text width, P pooled width, K heads, E head width, H W pixels."""
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import nn

MAX_CHARS = 2000    # a caption is cut here before it is tokenised: a megabyte of text would cost 0.1 s
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TextConfig:
    text_encoder: list[str] = field(default_factory=lambda: ["bytes"])  # bytes (trained along), or folders
    text_length: int = 128  # a caption is cut or padded to this length [tokens; of the byte encoder: bytes]
    text_dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights of frozen encoders
    text_cache: str = ""  # folder that keeps the embeddings of all captions; or "shards", which hold them
    text_shards: str = ""  # write the shards of --data with the embeddings of --text-cache here, then leave
    clip_layer: Literal["last", "penultimate"] = "last"  # of a CLIP text encoder, which gives the context
    allow_bin: bool = False  # read pytorch_model.bin by torch's restricted unpickler where no safetensors are
    byte_width: int = 128  # width of the byte encoder, a multiple of 32 [channels]
    byte_layers: int = 1  # layers of the byte encoder

    def __post_init__(self):
        if not 4 <= self.text_length <= 4096:
            raise ValueError(f"--text-length {self.text_length} is outside 4..4096. The default is 128")
        if self.byte_width < 32 or self.byte_width % 32 or not 1 <= self.byte_layers <= 100:
            raise ValueError(f"--byte-width {self.byte_width} is no multiple of 32, or --byte-layers is 0")


# ---------------------------------------------------------------------------------------------- tokenizers
def clean(text: str) -> str:
    """The start of a caption, without what no tokenizer reads: lone surrogates, NUL, byte order mark."""
    text = text[:MAX_CHARS].encode("utf-8", "replace").decode("utf-8")
    return text.replace("\0", " ").replace("\ufeff", "").strip()


class ByteTokenizer:
    """UTF-8 bytes as tokens (ByT5; Xue et al. 2021, arXiv:2105.13626): byte + 3, padding 0, end 1."""
    pad, prefix, suffix, unknown = 0, [], [1], 2

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]


class SentencePieceTokenizer:
    """The pieces of a `spiece.model` (Kudo & Richardson 2018, arXiv:1808.06226) as T5 uses them."""
    def __init__(self, path: Path, vocabulary: int):
        with damaged(path):
            model = SentencePieceProcessor(model_proto=path.read_bytes())
        pieces, end = model.get_piece_size(), model.eos_id()
        if not max(1, vocabulary - 512) <= pieces <= vocabulary or end < 0:     # tables are padded by < 512
            raise ValueError(f"{path} has {pieces} pieces and end token {end}, config.json says {vocabulary}")
        self.encode, self.unknown = model.encode, model.unk_id()
        self.pad, self.prefix, self.suffix = max(model.pad_id(), 0), [], [end]


@functools.lru_cache(1 << 16)
def letter_class(char: str) -> str:
    """An ASCII stand-in of the same class: itself, or a letter, digit, space or sign."""
    if char.isascii() and char.isprintable(): return char
    kind = "Z" if char in "\t\n\v\f\r\x85" else unicodedata.category(char)[0]
    return {"L": "a", "N": "1", "Z": " "}.get(kind, "!")


class ClipTokenizer:
    """Byte pair encoding of `vocab.json` and `merges.txt` (Radford et al. 2021, arXiv:2103.00020)."""
    words = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")

    def __init__(self, folder: Path, vocabulary: int):
        self.vocab = read_json(folder / "vocab.json")
        with damaged(folder / "merges.txt"):
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        start, end = (self.vocab.get(f"<|{name}|>") for name in ("startoftext", "endoftext"))
        good = all(isinstance(i, int) and 0 <= i < vocabulary for i in (start, end, *self.vocab.values()))
        if not good or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{folder}: vocab.json or merges.txt is damaged, or does not fit config.json")
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        self.prefix, self.suffix, self.pad, self.unknown = [start], [end], end, end
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]     # the others are chr(256), ...
        hidden = [byte for byte in range(256) if byte not in visible]
        self.letter = dict(zip(visible + hidden, map(chr, visible + [*range(256, 324)])))
        self.word = functools.lru_cache(1 << 16)(self.merge)

    def merge(self, word: str) -> list[int]:
        """Merge the neighbours of lowest rank until none are left that merge."""
        parts = f" {' '.join(self.letter[byte] for byte in word.encode())}</w> "
        while True:
            pairs = itertools.pairwise(parts.split())
            pair = min(pairs, key=lambda pair: self.rank.get(pair, math.inf), default=None)
            if pair not in self.rank:
                return [self.vocab.get(part, self.unknown) for part in parts.split()]
            parts = parts.replace(f" {pair[0]} {pair[1]} ", f" {pair[0]}{pair[1]} ")

    def encode(self, text: str) -> list[int]:
        text = "".join(char.lower() for char in unicodedata.normalize("NFC", text))
        spans = (match.span() for match in self.words.finditer("".join(map(letter_class, text))))
        return [i for start, stop in spans for i in self.word(text[start:stop])]


# ------------------------------------------------------------------------------------------------------ T5
# What shapes a tower, by its name in config.json: the default, or all that is known here, that one first.
T5_SHAPE = {"vocab_size": None, "d_model": None, "d_kv": None, "d_ff": None, "num_layers": None,
            "num_heads": None, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6, "feed_forward_proj": ("relu", "gated-gelu"),
            "model_type": ("t5", "mt5", "umt5")}


class T5Block(nn.Module):
    """Attention, then gelu(wi_0 y) * wi_1 y (Shazeer 2020, arXiv:2002.05202) or, in v1.0, relu(wi y)."""
    def __init__(self, shape: SimpleNamespace, has_table: bool):
        super().__init__()
        self.heads, self.gated = shape.num_heads, shape.feed_forward_proj == "gated-gelu"
        width, inner, eps = shape.d_model, self.heads * shape.d_kv, shape.layer_norm_epsilon
        linear = functools.partial(nn.Linear, bias=False)
        attention = {name: linear(width, inner) for name in "qkv"} | {"o": linear(inner, width)}
        if has_table:
            buckets = shape.relative_attention_num_buckets
            attention["relative_attention_bias"] = nn.Embedding(buckets, self.heads)
        feed = {name: linear(width, shape.d_ff) for name in (["wi_0", "wi_1"] if self.gated else ["wi"])}
        feed["wo"] = linear(shape.d_ff, width)
        parts = {"SelfAttention": nn.ModuleDict(attention), "DenseReluDense": nn.ModuleDict(feed)}
        self.layer = nn.ModuleList(nn.ModuleDict({name: part, "layer_norm": nn.RMSNorm(width, eps)})
                                   for name, part in parts.items())

    def forward(self, x, bias):
        w, y = self.layer[0]["SelfAttention"], self.layer[0]["layer_norm"](x)
        q, k, v = (w[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=1.0)             # (B, K, L, E)
        x = x + w["o"](y.transpose(1, 2).flatten(2))                                         # (B, L, D)
        w, y = self.layer[1]["DenseReluDense"], self.layer[1]["layer_norm"](x)
        y = F.gelu(w["wi_0"](y), approximate="tanh") * w["wi_1"](y) if self.gated else F.relu(w["wi"](y))
        return x + w["wo"](y)


def relative_buckets(length: int, buckets: int, max_distance: int, device=None) -> torch.Tensor:
    """Bucket of each (query, key) pair, (L, L), by distance (Raffel et al. 2020, arXiv:1910.10683, 2.1): half
    of them for keys ahead; in each half one for every near offset, then wider ones up to max_distance."""
    place = torch.arange(length, device=device)
    offset = place[None, :] - place[:, None]
    half, exact = buckets // 2, buckets // 4
    far = torch.log(offset.abs().clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
    return half * (offset > 0) + torch.where(offset.abs() < exact, offset.abs(), far)


class ByteEmbedding(nn.Module):
    """Bytes, each with the hashed 3- to 8-grams that end there (Pagnoni et al. 2024, arXiv:2412.09871, 3.2):
    a word has a vector of its own from the first step. ids (B, L) -> (B, L, D)."""
    def __init__(self, width: int, buckets: int = 8192):
        super().__init__()
        self.bytes, self.grams = nn.Embedding(259, width), nn.EmbeddingBag(buckets, width, mode="sum")

    def forward(self, ids):
        grams = [ids]
        for _ in range(7):
            grams.append(F.pad(grams[-1][:, :-1], (1, 0)) * 1000003 + ids)                   # modulo 2^64
        bucket = (torch.stack(grams[2:], -1) * -0x61C8864680B583EB >> 32) % self.grams.num_embeddings
        return self.bytes(ids) + 0.4 * self.grams(bucket.flatten(0, 1)).view(*ids.shape, -1) # (B, L, D)


class T5Encoder(nn.Module):
    """The encoder of T5 v1.0 (Raffel et al. 2020, arXiv:1910.10683), v1.1, Flan, mT5, umT5, ByT5: pre-norm,
    no biases, q.k unscaled, one unscaled table of relative positions for all layers (umT5: one each). ids
    (B, L) int64, mask (B, L) bool -> context (B, L, D), its mean over the tokens (B, D); finite if empty."""
    def __init__(self, shape: SimpleNamespace):
        super().__init__()
        self.shape, self.dim, self.pooled_dim = shape, shape.d_model, shape.d_model
        self.shared, self.encoder = nn.Embedding(shape.vocab_size, shape.d_model), nn.Module()
        self.encoder.block = nn.ModuleList(T5Block(shape, i == 0 or shape.model_type == "umt5")
                                           for i in range(shape.num_layers))
        self.encoder.final_layer_norm = nn.RMSNorm(shape.d_model, shape.layer_norm_epsilon)

    def forward(self, ids, mask):
        shape, x = self.shape, self.shared(ids)                                              # (B, L, D)
        buckets = relative_buckets(ids.shape[1], shape.relative_attention_num_buckets,
                                   shape.relative_attention_max_distance, ids.device)
        for block in self.encoder.block:
            attention = block.layer[0]["SelfAttention"]
            if "relative_attention_bias" in attention:
                bias = attention["relative_attention_bias"](buckets).permute(2, 0, 1)        # (K, L, L)
                bias = torch.where(mask[:, None, None], bias, torch.finfo(bias.dtype).min)   # (B, K, L, L)
            x = block(x, bias)
        x = self.encoder.final_layer_norm(x)
        return x, (x.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


# ---------------------------------------------------------------------------------------------------- CLIP
CLIP_TEXT = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
             "num_attention_heads": 8, "projection_dim": 512, "max_position_embeddings": 77,
             "layer_norm_eps": 1e-5, "hidden_act": ("quick_gelu", "gelu"), "model_type": ("clip_text_model",)}
CLIP_VISION = CLIP_TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                           "image_size": 224, "patch_size": 32, "model_type": ("clip_vision_model",)}


class ClipLayer(nn.Module):
    def __init__(self, shape: SimpleNamespace):
        super().__init__()
        width, inner, self.heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
        self.quick, names = shape.hidden_act == "quick_gelu", ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, shape.layer_norm_eps) for _ in range(2))

    def forward(self, x, causal: bool):
        w, y = self.self_attn, self.layer_norm1(x)
        q, k, v = (w[f"{name}_proj"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)                        # (B, K, L, E)
        x = x + w["out_proj"](y.transpose(1, 2).flatten(2))                                  # (B, L, D)
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y))


class ClipTower(nn.ModuleDict):
    """What both towers of CLIP have (Radford et al. 2021, arXiv:2103.00020): embeddings, layers, norms."""
    def __init__(self, shape: SimpleNamespace, positions: int, norms: tuple[str, ...], **embeddings):
        embeddings["position_embedding"] = nn.Embedding(positions, shape.hidden_size)
        layers = nn.ModuleList(ClipLayer(shape) for _ in range(shape.num_hidden_layers))
        super().__init__({name: nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps) for name in norms})
        self.embeddings, self.encoder = nn.ModuleDict(embeddings), nn.ModuleDict({"layers": layers})


class CLIPTextEncoder(nn.Module):
    """The text tower of CLIP or OpenCLIP. ids (B, L) int64, mask (B, L) bool -> context (B, L, D), the last
    layer normalised or the penultimate as it is; pooled (B, P), the last layer at the end token, projected
    if the checkpoint has a projection."""
    def __init__(self, shape: SimpleNamespace, has_projection: bool, layer: str):
        super().__init__()
        self.dim, self.layer, length = shape.hidden_size, layer, shape.max_position_embeddings
        self.pooled_dim = shape.projection_dim if has_projection else self.dim
        self.text_model = ClipTower(shape, length, ("final_layer_norm",),
                                    token_embedding=nn.Embedding(shape.vocab_size, self.dim))
        projection = nn.Linear(self.dim, self.pooled_dim, bias=False)
        self.text_projection = projection if has_projection else nn.Identity()

    def forward(self, ids, mask):
        model = self.text_model
        place = model.embeddings.position_embedding.weight[:ids.shape[1]]
        x = before = model.embeddings.token_embedding(ids) + place                           # (B, L, D)
        for layer in model.encoder.layers:
            before, x = x, layer(x, causal=True)            # no token sees the padding behind it
        x = model.final_layer_norm(x)
        pooled = x[torch.arange(len(x), device=x.device), (mask.sum(1) - 1).clamp(min=0)]
        pooled = self.text_projection(pooled) * mask.any(1, keepdim=True)
        return before if self.layer == "penultimate" else x, pooled


def clip_pixels(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """CLIP's pre-processing, uint8 (B, 3, H, W) -> float32 (B, 3, size, size): the short side is resized
    (bicubic, antialiased, rounded to 256 levels), the middle cut out, CLIP's mean taken off."""
    shape = [size * side // min(pictures.shape[-2:]) for side in pictures.shape[-2:]]
    top, left = ((side - size) // 2 for side in shape)
    x = F.interpolate(pictures.float(), shape, mode="bicubic", antialias=True)
    x = x[..., top:top + size, left:left + size].round().clamp(0, 255) / 255                 # (B, 3, H, W)
    mean, deviation = x.new_tensor([[0.48145466, 0.4578275, 0.40821073],
                                    [0.26862954, 0.26130258, 0.27577711]]).view(2, 3, 1, 1)
    return (x - mean) / deviation


class CLIPImageEncoder(nn.Module):
    """The picture tower: uint8 (B, 3, H, W) -> (B, P) float32, in the space of its text tower's pooled."""
    def __init__(self, shape: SimpleNamespace):
        super().__init__()
        self.size, width, patch = shape.image_size, shape.hidden_size, shape.patch_size
        norms, patches = ("pre_layrnorm", "post_layernorm"), nn.Conv2d(3, width, patch, patch, bias=False)
        self.vision_model = ClipTower(shape, (self.size // patch) ** 2 + 1, norms, patch_embedding=patches)
        self.vision_model.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.visual_projection = nn.Linear(width, shape.projection_dim, bias=False)

    def forward(self, pictures):
        model, embed = self.vision_model, self.vision_model.embeddings
        x = embed.patch_embedding(clip_pixels(pictures, self.size).to(embed.class_embedding.dtype))
        first = embed.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x.flatten(2).transpose(1, 2)], 1)                              # (B, L, D)
        x = model.pre_layrnorm(x + embed.position_embedding.weight)
        for layer in model.encoder.layers:
            x = layer(x, causal=False)
        return self.visual_projection(model.post_layernorm(x[:, 0])).float()                 # (B, P)


# --------------------------------------------------------------------------------------- published weights
@contextlib.contextmanager
def damaged(path: Path, fix: str = "Download it again"):
    """Turn whatever a reader throws at a missing or broken file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in path.parent.glob("*"))[:8]) or "nothing"
        raise ValueError(f"{path.parent} has no {path.name} (found {found}). {fix}") from None
    except Exception as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}. {fix}") from None


def read_json(path: Path) -> dict:
    with damaged(path):
        if not isinstance(content := json.loads(path.read_text(encoding="utf-8")), dict):
            raise TypeError("not a JSON object")
        return content


def read_shape(table: dict, config: dict, path: Path) -> SimpleNamespace:
    """The fields of `table` out of a config.json; ValueError for one that is missing or impossible."""
    shape = {}
    for name, usual in table.items():
        choice, limit = isinstance(usual, tuple), 1000 if "layers" in name else 10 ** 7
        value = shape[name] = config.get(name, usual[0] if choice else usual)
        number = type(value) is (float if isinstance(usual, float) else int) and 0 < value < limit
        if not (value in usual if choice else number):
            known = f"one of {', '.join(usual)}" if choice else f"a number below {limit}"
            raise ValueError(f"{path}: {name} is {value!r}, it must be {known}")
    if shape.get("hidden_size", 0) % shape.get("num_attention_heads", 1):
        raise ValueError(f"{path}: hidden_size is no multiple of num_attention_heads")
    return SimpleNamespace(**shape)


def weight_files(folder: Path, allow_bin: bool) -> list[Path]:
    """The file with a folder's weights, or the shards that its index lists."""
    names = itertools.product(("model.safetensors", "pytorch_model.bin"), ("", ".index.json"))
    paths = [folder / "".join(name) for name in names]
    path = next((path for path in paths if path.exists()), paths[0])
    recent = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
    if ".bin" in path.name and not (allow_bin and recent):
        raise ValueError(f"{path} is a pickle file. Convert it to safetensors, or pass --allow-bin with "
                         f"torch >= 2.10 (this is {torch.__version__}; CVE-2026-24747)")
    if path.suffix != ".json":
        return [path]
    with damaged(path):
        shards = sorted(set(map(str, read_json(path)["weight_map"].values())))
    for name in shards:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"{path} lists a path outside the folder: {name!r}")
        if not (folder / name).exists():
            raise ValueError(f"{path} lists {name}, which is missing. Incomplete download?")
    return [folder / name for name in shards]


def read_slice(path: Path, name: str, rows: slice) -> torch.Tensor:
    with damaged(path), safetensors.safe_open(path, "pt") as file:
        return file.get_slice(name)[rows].clone()               # leaving unmaps the file: it holds no memory


class Weights:
    """The tensors of a folder by their published names; each is read when asked for, and only then."""
    def __init__(self, folder: Path, allow_bin: bool):
        self.folder, self.shape, self.read = folder, {}, {}     # read: name -> function of the rows to read
        for path in weight_files(folder, allow_bin):
            with damaged(path):
                if path.suffix == ".bin":
                    found = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
                    found = {name: (tensor.shape, tensor.__getitem__) for name, tensor in found.items()}
                else:
                    with safetensors.safe_open(path, "pt") as file:
                        found = {name: (file.get_slice(name).get_shape(), functools.partial(
                            read_slice, path, name)) for name in list(file.keys())}
            for name, (shape, read) in found.items():
                name = "shared.weight" if name == "encoder.embed_tokens.weight" else name       # one matrix
                if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
                    name = f"text_model.{name}"             # CLIP's text tower as transformers >= 5 saves it
                self.shape[name], self.read[name] = tuple(shape), read

    def check(self, model: nn.Module, others: tuple[str, ...]):
        """ValueError unless these are the tensors of `model`, but for names that start by `others`."""
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        extra = [name for name in sorted(set(self.shape) - set(wanted)) if not name.startswith(others)]
        wrong = [f"{name} is missing" for name in wanted if name not in self.shape]
        wrong += [f"{name} is {self.shape[name]}, config.json says {shape}" for name, shape in wanted.items()
                  if self.shape.get(name, shape) != shape]
        wrong += [f"{name} is not known" for name in extra if not name.endswith(".position_ids")]
        if wrong:
            raise ValueError(f"{self.folder}: {wrong[0]} ({len(wrong)} tensors do not fit). Another model?")

    def fill(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Give `model` (checked, on the meta device) its weights, frozen; peaks one tensor above them. A
        number that is not finite is an error; other flipped bits are not seen: there is no checksum."""
        state = {}
        for name in model.state_dict():
            tensor = self.read[name](slice(None))
            if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                raise ValueError(f"{self.folder}: {name} is {tensor.dtype}. Quantised weights are not read")
            state[name] = tensor.to(dtype)
            if not torch.stack(state[name].aminmax()).isfinite().all():
                raise ValueError(f"{self.folder}: {name} is not finite in {dtype}. Download it again")
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)

    def digest(self, model: nn.Module, *also: str) -> str:
        """Which weights these are: a hash of the first and last row of each tensor, and of `also`."""
        result = hashlib.sha256(repr(also).encode())
        for name, rows in itertools.product(model.state_dict(), (slice(0, 1), slice(-1, None))):
            result.update(name.encode() + self.read[name](rows).float().numpy().tobytes())
        return result.hexdigest()[:32]


# ------------------------------------------------------------------------------------------- text encoders
class TextEncoder(nn.Module):
    """A tokenizer and a tower: captions -> (ids, mask) -> (context, mask, pooled); dim = D, pooled_dim = P.
    trainable: the weights train with the U-Net and belong into its checkpoint; else they stay in their
    folder, and the output has no gradient and ignores autocast. counts: how many captions so far were empty,
    cut or cleaned, and how many of the tokens were unknown."""
    def __init__(self, tower: nn.Module, tokenizer, length: int, fingerprint: str, trainable: bool):
        super().__init__()
        self.tower, self.tokenizer, self.length, self.fingerprint = tower, tokenizer, length, fingerprint
        self.dim, self.pooled_dim, self.trainable = tower.dim, tower.pooled_dim, trainable
        self.counts = Counter()
        if not trainable: self.__deepcopy__ = lambda memo: self     # the average of a network shares it

    def tokenize(self, captions: list[str]):
        """Captions -> ids (B, L) int64 and mask (B, L) bool, True at tokens; an empty caption has none."""
        prefix, suffix = self.tokenizer.prefix, self.tokenizer.suffix
        ids = torch.full((len(captions), self.length), self.tokenizer.pad)
        mask, room = torch.zeros(ids.shape, dtype=torch.bool), self.length - len(prefix) - len(suffix)
        for row, caption in enumerate(captions):
            text = clean(caption)
            tokens = self.tokenizer.encode(text) if text else []
            self.counts.update(captions=1, empty=not tokens,
                               cut=len(tokens) > room or len(caption) > MAX_CHARS,
                               cleaned=text != caption[:MAX_CHARS].strip(), tokens=len(tokens),
                               unknown=tokens.count(self.tokenizer.unknown))
            if tokens := tokens and [*prefix, *tokens[:room], *suffix]:
                ids[row, :len(tokens)], mask[row, :len(tokens)] = torch.tensor(tokens), True
        return ids, mask

    def forward(self, ids, mask):
        """ids, mask (B, L) -> context (B, L, D), zero at padding; mask; pooled (B, P), zero if empty."""
        if self.trainable:
            context, pooled = self.tower(ids, mask)
        else:
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
                context, pooled = (x.float() for x in self.tower(ids, mask))
        return context * mask[..., None], mask, pooled


class MultiEncoder(nn.Module):
    """Several encoders side by side: their tokens in one row, each through its own projection, plus its type.
    Only what is learned is registered (projections, types, encoders trained along): parameters() and
    state_dict() leave the frozen ones out. context (B, sum of L, max of D), pooled (B, sum of P)."""
    def __init__(self, encoders: list[TextEncoder]):
        super().__init__()
        self.encoders, self.lengths = tuple(encoders), [encoder.length for encoder in encoders]
        self.dim, self.length = max(encoder.dim for encoder in encoders), sum(self.lengths)
        self.pooled_dim = sum(encoder.pooled_dim for encoder in encoders)
        self.fingerprint = " + ".join(encoder.fingerprint for encoder in encoders)
        self.trained = nn.ModuleList(encoder for encoder in encoders if encoder.trainable)
        self.project = nn.ModuleList(nn.Linear(encoder.dim, self.dim, bias=False) for encoder in encoders)
        self.trainable, self.counts = True, sum((encoder.counts for encoder in encoders), Counter())
        for encoder in encoders: encoder.counts = self.counts
        self.kind = nn.Parameter(0.02 * torch.randn(len(encoders), self.dim))

    def _apply(self, fn, recurse=True):             # .to(device) moves the frozen ones, too
        for encoder in self.encoders:
            encoder._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def tokenize(self, captions: list[str]):
        ids, masks = zip(*(encoder.tokenize(captions) for encoder in self.encoders))
        return torch.cat(ids, 1), torch.cat(masks, 1)

    def forward(self, ids, mask):
        parts = zip(self.encoders, ids.split(self.lengths, 1), mask.split(self.lengths, 1))
        contexts, _, pooled = zip(*(encoder(*part) for encoder, *part in parts))
        context = [project(x) + kind for project, x, kind in zip(self.project, contexts, self.kind)]
        return torch.cat(context, 1) * mask[..., None], mask, torch.cat(pooled, 1)


def open_folder(name: str, config: TextConfig, tower: str) -> tuple[Path, dict, Weights]:
    """Where config.json lies, what it says (of CLIP's towers: of this one), and the weights, still unread."""
    path = Path(name) / "config.json"
    if not path.parent.is_dir():
        raise ValueError(f"--text-encoder or --rank {name} is no folder. Name a published one, or bytes")
    content = read_json(path)
    if content.get("model_type") == "clip":
        half = (content.get(f"{tower}_config") or {}) | (content.get(f"{tower}_config_dict") or {})
        width, kind = content.get("projection_dim", 512), f"clip_{tower}_model"
        content = half | {"projection_dim": width, "model_type": kind}
    return path, content, Weights(path.parent, config.allow_bin)


def frozen_encoder(name: str, config: TextConfig) -> tuple[TextEncoder, Callable[[], nn.Module]]:
    """The encoder of a published folder, still without weights, and the function that reads them once."""
    path, content, weights = open_folder(name, config, "text")
    folder, length, kind = path.parent, config.text_length, content.get("model_type")
    with torch.device("meta"):
        if kind == "clip_text_model":
            shape = read_shape(CLIP_TEXT, content, path)
            tower = CLIPTextEncoder(shape, "text_projection.weight" in weights.shape, config.clip_layer)
            others, length = ("vis", "logit_scale"), min(length, shape.max_position_embeddings)
            tokenizer = ClipTokenizer(folder, shape.vocab_size)
        else:
            usual = {"model_type": None, "feed_forward_proj": "relu" if kind == "t5" else "gated-gelu"}
            shape = read_shape(T5_SHAPE, usual | content, path)
            tower, others = T5Encoder(shape), ("decoder.", "lm_head.")
            pieces, vocabulary = folder / "spiece.model", shape.vocab_size
            byt5 = vocabulary == 384 and not pieces.exists()
            tokenizer = ByteTokenizer() if byt5 else SentencePieceTokenizer(pieces, vocabulary)
    weights.check(tower, others)
    words = [folder / file for file in ("spiece.model", "vocab.json", "merges.txt")]
    words = [hashlib.sha256(file.read_bytes()).hexdigest() for file in words if file.exists()]
    digest = weights.digest(tower, repr(shape), config.clip_layer, config.text_dtype, *words)
    fingerprint = f"{folder.name} d={tower.dim} length={length} {digest}"
    return (TextEncoder(tower, tokenizer, length, fingerprint, False),
            functools.cache(functools.partial(weights.fill, tower, DTYPES[config.text_dtype])))


def load_image_encoder(name: str, config: TextConfig) -> CLIPImageEncoder:
    """The picture tower of a CLIP folder, frozen; ValueError if unreadable."""
    path, content, weights = open_folder(name, config, "vision")
    with torch.device("meta"):
        tower = CLIPImageEncoder(read_shape(CLIP_VISION, content, path))
    weights.check(tower, ("text_", "logit_scale"))
    return weights.fill(tower, DTYPES[config.text_dtype])


def byte_encoder(config: TextConfig) -> TextEncoder:
    """A small T5 v1.1 over bytes with fresh weights, to be trained along."""
    width, length = config.byte_width, config.text_length
    shape = {"vocab_size": 259, "d_model": width, "d_kv": 32, "d_ff": 2 * width, "num_heads": width // 32,
             "num_layers": config.byte_layers, "feed_forward_proj": "gated-gelu", "model_type": "t5"}
    tower = T5Encoder(SimpleNamespace(**T5_SHAPE | shape))
    tower.shared = ByteEmbedding(width)
    return TextEncoder(tower, ByteTokenizer(), length, f"bytes {shape} {length}", True)


def load_text_encoder(config: TextConfig, cached: Callable | None = None) -> nn.Module:
    """The text encoder of a configuration, or several side by side; ValueError if unreadable. `cached`: look
    up what a frozen one says in what cached(number, encoder, load) returns; load() reads its weights."""
    encoders = []
    for number, name in enumerate(config.text_encoder):
        encoder, load = (byte_encoder(config), None) if name == "bytes" else frozen_encoder(name, config)
        if load and cached:
            encoder = CachedEncoder(encoder, cached(number, encoder, load))
        elif load:
            load()
        encoders.append(encoder)
    return encoders[0] if len(encoders) == 1 else MultiEncoder(encoders)


# --------------------------------------------------------------------------------------------------- cache
def encode_captions(encoder: TextEncoder, captions: list[str], batch_tokens: int = 8192) -> Iterator[tuple]:
    """Yield (index, context (L, D), pooled (P)) in bf16, without padding, computed on the encoder's device:
    longest first, in batches of like length and about `batch_tokens` tokens."""
    device = next(encoder.parameters()).device
    ids, mask = encoder.tokenize(captions)
    lengths = mask.sum(1)
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        width = min(encoder.length, max(8, -(-int(lengths[order[0]]) // 8) * 8))
        rows, order = order.tensor_split([max(1, batch_tokens // width)])
        with torch.no_grad():
            context, _, pooled = encoder(ids[rows, :width].to(device), mask[rows, :width].to(device))
        context, pooled = context.bfloat16().cpu(), pooled.bfloat16().cpu()
        yield from ((row, context[i, :lengths[row]], pooled[i]) for i, row in enumerate(rows.tolist()))


class CachedEncoder(TextEncoder):
    """A frozen encoder whose output tokenize() looks up: lookup(caption) -> context (L, D), pooled (P), or a
    ValueError. forward() waits for no device, and says nan of captions not of the last tokenize()."""
    def __init__(self, encoder: TextEncoder, lookup: Callable[[str], tuple[torch.Tensor, torch.Tensor]]):
        super().__init__(encoder.tower, encoder.tokenizer, encoder.length, encoder.fingerprint, False)
        self.tower, self.lookup, self.counts = None, lookup, encoder.counts
        self.first, self.found = 0, torch.zeros(2, 0)
        self.forward = torch.compiler.disable(self.forward)

    def tokenize(self, captions: list[str]):
        none = torch.zeros(0, self.dim), torch.zeros(self.pooled_dim)
        found = [self.lookup(caption) if clean(caption) else none for caption in captions]
        rows = [torch.cat([F.pad(x, (0, 0, 0, self.length - len(x))).flatten(), y]) for x, y in found]
        self.first += len(self.found) - 2                       # the number of the nan before the rows
        self.found = F.pad(torch.stack(rows).bfloat16(), (0, 0, 1, 1), value=math.nan)
        ids = self.first + torch.arange(1, len(rows) + 1)[:, None].repeat(1, self.length)
        return ids, torch.arange(self.length) < torch.tensor([[len(x)] for x, _ in found])

    def forward(self, ids, mask):
        found = self.found.pin_memory() if ids.is_cuda else self.found
        rows = (ids[:, 0] - self.first).clamp(0, len(found) - 1)
        found = found.to(ids.device, non_blocking=True)[rows].float()
        context, pooled = found.tensor_split([self.length * self.dim], 1)
        return context.unflatten(1, (self.length, self.dim)) * mask[..., None], mask, pooled
