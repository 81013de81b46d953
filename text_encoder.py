"""Captions to tensors: T5 over bytes, trained along with the U-Net.

    encoder = load_text_encoder(TextConfig())
    context, mask, pooled = encoder(*encoder.tokenize(["a red house"]))

Letters: B batch, L text tokens, D text width, P pooled width, K heads, E head width, F feed-forward width.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

MAX_CHARS = 2000    # a caption is cut here before it is tokenised: a megabyte of text would cost 0.1 s


@dataclass
class TextConfig:
    """What turns a caption into tensors."""

    text_encoder: list[str] = field(default_factory=lambda: ["bytes"])  # bytes (trained along), or folders
    text_length: int = 128  # a caption is cut or padded to this length [tokens; of the byte encoder: bytes]
    byte_width: int = 128  # width of the byte encoder [channels]
    byte_layers: int = 2  # layers of the byte encoder
    byte_heads: int = 4  # attention heads of the byte encoder

    def __post_init__(self):
        if not 2 <= self.text_length <= 4096:
            raise ValueError(f"--text-length {self.text_length} is outside 2..4096. The default is 128")
        if min(self.byte_width, self.byte_layers, self.byte_heads) < 1 or self.byte_width % self.byte_heads:
            raise ValueError(f"--byte-width {self.byte_width} must be a positive multiple of --byte-heads "
                             f"{self.byte_heads}, and --byte-layers {self.byte_layers} at least 1")


# ---------------------------------------------------------------------------------------------- tokenizers

def clean(text: str) -> str:
    """The start of a caption, without what no tokenizer reads: lone surrogates, NUL, byte order mark."""
    text = text[:MAX_CHARS].encode("utf-8", "replace").decode("utf-8")
    return text.replace("\0", " ").replace("\ufeff", "").strip()


class ByteTokenizer:
    """UTF-8 bytes as tokens (ByT5; Xue et al. 2021, arXiv:2105.13626): byte + 3, padding 0, end 1."""

    pad, prefix, suffix, vocabulary = 0, [], [1], 259

    def __call__(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]


# ------------------------------------------------------------------------------------------------------ T5

@dataclass
class T5Shape:
    """The fields of a T5 `config.json` that shape its encoder, by their published names."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 whatever x is (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class T5Attention(nn.Module):
    def __init__(self, shape: T5Shape, has_table: bool):
        super().__init__()
        self.heads, inner = shape.num_heads, shape.num_heads * shape.d_kv
        self.q, self.k, self.v = (nn.Linear(shape.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, shape.d_model, bias=False)
        if has_table:
            self.relative_attention_bias = nn.Embedding(shape.relative_attention_num_buckets, shape.num_heads)

    def forward(self, x, bias):
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)   # (B, K, L, E)
        return self.o(y.transpose(1, 2).flatten(2))                                          # (B, L, D)


class T5FeedForward(nn.Module):
    def __init__(self, shape: T5Shape):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(shape.d_model, shape.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5Layer(nn.Module):
    """One residual branch; `name` is the published name of the module inside."""

    def __init__(self, shape: T5Shape, name: str, module: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, module)
        self.layer_norm = RMSNorm(shape.d_model, shape.layer_norm_epsilon)

    def forward(self, x, *args):
        return x + getattr(self, self.name)(self.layer_norm(x), *args)


class T5Block(nn.Module):
    def __init__(self, shape: T5Shape, has_table: bool):
        super().__init__()
        self.layer = nn.ModuleList([T5Layer(shape, "SelfAttention", T5Attention(shape, has_table)),
                                    T5Layer(shape, "DenseReluDense", T5FeedForward(shape))])


def relative_buckets(length: int, buckets: int, max_distance: int, device=None) -> torch.Tensor:
    """Bucket of each (query, key) pair, (L, L): half for keys behind, half for keys ahead; in each half one for
    every near offset, then wider ones by the logarithm up to max_distance (Raffel et al. 2020, section 2.1)."""
    place = torch.arange(length, device=device)
    offset = place[None, :] - place[:, None]
    half, exact = buckets // 2, buckets // 4
    far = torch.log(offset.abs().clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
    return half * (offset > 0) + torch.where(offset.abs() < exact, offset.abs(), far)


class T5Encoder(nn.Module):
    """The encoder of T5 v1.1 (Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020, arXiv:2002.05202).

    Pre-norm, no biases, no scaling of q.k, one unscaled table of relative positions for all layers.
    ids (B, L) int64, mask (B, L) bool -> (B, L, D); without meaning at padding, finite in an empty row.
    """

    def __init__(self, shape: T5Shape):
        super().__init__()
        self.shape = shape
        self.shared = nn.Embedding(shape.vocab_size, shape.d_model)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(T5Block(shape, i == 0) for i in range(shape.num_layers))
        self.encoder.final_layer_norm = RMSNorm(shape.d_model, shape.layer_norm_epsilon)

    def initialise(self) -> "T5Encoder":
        """Draw the weights as T5 does, 1/sqrt(E) of the attention in q; but let head h look at its own neighbour.

        The head's bias starts at 4 for the key 1, -1, 2, -2, ... tokens away and at 0 elsewhere, so that letters
        meet as words from the first step: naming colour and kind in a caption took 150 steps instead of 600.
        """
        shape, inner = self.shape, self.shape.num_heads * self.shape.d_kv
        std = {"shared": 1.0, "q": (shape.d_model * shape.d_kv) ** -0.5, "o": inner ** -0.5,
               "wo": shape.d_ff ** -0.5}
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=std.get(name.split(".")[-2], shape.d_model ** -0.5))
        table, half = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, 16
        nn.init.zeros_(table)
        with torch.no_grad():
            for head in range(min(shape.num_heads, half)):
                table[(1 - head % 2) * half + head // 2 + 1, head] = 4.0
        return self

    def bias(self, block: T5Block, mask):
        """Bias of the relative position, and the lowest finite number at padded keys: (B, K, L, L)."""
        shape, table = self.shape, block.layer[0].SelfAttention.relative_attention_bias.weight
        buckets = relative_buckets(mask.shape[1], shape.relative_attention_num_buckets,
                                   shape.relative_attention_max_distance, mask.device)
        bias = F.embedding(buckets, table).permute(2, 0, 1)[None]                            # (1, K, L, L)
        return torch.where(mask[:, None, None, :], bias, torch.finfo(bias.dtype).min)

    def forward(self, ids, mask):
        x = self.shared(ids)                                                                 # (B, L, D)
        bias = self.bias(self.encoder.block[0], mask)
        for block in self.encoder.block:
            x = block.layer[1](block.layer[0](x, bias))
        return self.encoder.final_layer_norm(x)


# ------------------------------------------------------------------------------------------- text encoders

class TextEncoder(nn.Module):
    """A tokenizer and a tower: captions -> (ids, mask) -> (context, mask, pooled).

    dim = D, pooled_dim = P. trainable: the weights train with the U-Net and belong into its checkpoint.
    counts: how many captions were empty, cut at `length`, or changed by `clean`.
    """

    def __init__(self, tower: nn.Module, tokenizer, dim: int, length: int, trainable: bool, fingerprint: str):
        super().__init__()
        self.tower, self.tokenizer, self.dim, self.pooled_dim = tower, tokenizer, dim, dim
        self.length, self.trainable, self.fingerprint, self.counts = length, trainable, fingerprint, Counter()

    def tokenize(self, captions: list[str]):
        """Captions -> ids (B, L) int64 and mask (B, L) bool, True at tokens; an empty caption has none."""
        ids = torch.full((len(captions), self.length), self.tokenizer.pad, dtype=torch.int64)
        mask = torch.zeros(len(captions), self.length, dtype=torch.bool)
        room = self.length - len(self.tokenizer.prefix) - len(self.tokenizer.suffix)
        for row, caption in enumerate(captions):
            text = clean(caption)
            tokens = self.tokenizer(text) if text else []
            self.counts.update(empty=not text, cut=len(tokens) > room or len(caption) > MAX_CHARS,
                               cleaned=text != caption[:MAX_CHARS].strip())
            if tokens:
                tokens = [*self.tokenizer.prefix, *tokens[:room], *self.tokenizer.suffix]
                ids[row, :len(tokens)] = torch.tensor(tokens)
                mask[row, :len(tokens)] = True
        return ids, mask

    def forward(self, ids, mask):
        """ids, mask (B, L) -> context (B, L, D), zero at padding; mask; pooled (B, P), the mean of it."""
        context = self.tower(ids, mask) * mask[..., None]                                    # (B, L, D)
        pooled = context.float().sum(1) / mask.sum(1, keepdim=True).clamp(min=1)             # (B, P)
        return context, mask, pooled.to(context.dtype)


def load_text_encoder(config: TextConfig) -> nn.Module:
    """The text encoder that `config.text_encoder` names, with fresh weights when it is trained along."""
    if config.text_encoder != ["bytes"]:
        raise ValueError(f"--text-encoder {' '.join(config.text_encoder)}: only bytes is known")
    shape = T5Shape(ByteTokenizer.vocabulary, config.byte_width, config.byte_width // config.byte_heads,
                    2 * config.byte_width, config.byte_layers, config.byte_heads)
    fingerprint = hashlib.sha256(f"bytes {shape} {config.text_length}".encode()).hexdigest()
    return TextEncoder(T5Encoder(shape).initialise(), ByteTokenizer(), config.byte_width, config.text_length,
                       True, fingerprint)
