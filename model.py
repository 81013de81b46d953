"""The U-Net that predicts, published U-Nets and VAEs, and the files that hold weights and configurations.

    net = UNet(ModelConfig(), size=64, text_dim=128, pooled_dim=128)
    net = load_unet("stable-diffusion-v1-5/unet")              # or a published one, called alike
    out = net(x_t, t, context=context, mask=mask, pooled=pooled)
    space = load_vae("stable-diffusion-v1-5/vae")              # pictures <-> latents
    clip = CLIP(ModelConfig(), size=64, text_dim=128, pooled_dim=128)
    similarity = clip(x_t, t) @ clip.read(context, mask, pooled).T

Letters: B batch, C channels of a feature map, H W its height and width, N = H*W positions, K heads,
L text tokens, D text width, P pooled text width, E width of the embedding.
"""
import ctypes
import errno
import hashlib
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class ModelConfig:
    channels: int = 32  # width of the first level, a multiple of 32 [0..8192 channels]
    channel_mult: tuple[int, ...] = (1, 2, 4)  # width of each level, a number each [0..64 times --channels]
    num_res_blocks: tuple[int, ...] = (1,)  # residual blocks of each level, or one number for all [0..64]
    attn_resolutions: tuple[int, ...] = ()  # sides of the feature maps that have attention [1..4096 pixels]
    head_dim: int = 32  # width of one attention head [0..8192 channels]
    patch: int = 2  # side of the squares that are folded into channels at the border [0..64 pixels]
    emb_dim: int = 512  # width of the embedding of time and text [0..8192 channels]
    efficient: bool = False  # sides double after the convolutions of a level: Imagen's Efficient U-Net
    conv_only: bool = False  # no place, norms of one position, attention to text alone: to train on crops
    weave_resolutions: tuple[int, ...] = ()  # sides where a transcription reads the picture [1..4096 pixels]
    weave_carried: bool = False  # a transcription keeps what it read in one weave for the next
    vae: str = ""  # folder of a published VAE, in whose latents diffusion happens; pixels when not given
    vae_dtype: Literal["fp32", "bf16"] = "fp32"  # of the VAE's weights


def sides(config: ModelConfig, size: int) -> list[int]:
    """The side of each level's feature maps, for pictures of `size` pixels."""
    first = size // max(1, config.patch)
    return [first // 2**level for level in range(len(config.channel_mult))]


def check_shape(config: ModelConfig, size: int, crop: int = 0, lowres: int = 0, scale: int = 1) -> None:
    """Raise ValueError, one line with the flag and a value that works, where this U-Net cannot be built.
    scale: pixels of a picture per position of its latents."""
    def must(right, message):
        if not right:
            raise ValueError("--" + message.replace("_", "-"))

    for name in ("patch", "channel_mult", "num_res_blocks"):
        value = getattr(config, name)
        must(min(np.atleast_1d(value), default=0) > 0, f"{name} {value} must be at least 1")
    levels = len(config.channel_mult)
    must(np.size(config.num_res_blocks) in (1, levels),
         f"num-res-blocks {config.num_res_blocks} must be one number, or {levels} as --channel-mult")

    step = scale * config.patch * 2 ** (levels - 1)
    for flag, side in (("size", size), ("crop", crop or size)):
        near = max(step, side // step * step)
        must(side >= step and side % step == 0,
             f"{flag} {side} must be a multiple of {step} for this model. Try {near} or {near + step}")

    ratio = max(1, size // (lowres or size))
    divides = not lowres or (lowres < size and size % lowres == 0)
    must(divides, f"size {size} is not a multiple of --lowres {lowres}. Try --lowres {size // 4}")
    must(not crop or config.conv_only,
         f"crop {crop} is for a network that sees no whole picture. Add --conv-only")
    must(crop <= size and crop % ratio == 0,
         f"crop {crop} is not a multiple of {ratio} up to {size}. Try {size // 4}")

    for name in ("channels", "emb_dim"):
        width = getattr(config, name)
        near = max(32, width // 32 * 32)
        must(width >= 32 and width % 32 == 0, f"{name} {width} must be a multiple of 32. Try {near}")
    must(config.head_dim >= 8 and config.channels % config.head_dim == 0,
         f"head-dim {config.head_dim} must be 8 or more and divide --channels {config.channels}. Try 32")
    here = sides(config, size // scale)
    for name in ("attn_resolutions", "weave_resolutions"):
        for side in getattr(config, name):
            must(side in here, f"{name} {side} is not a side of a feature map here. Choose from {here}")
    must(not (config.conv_only and config.weave_resolutions),
         f"weave-resolutions {config.weave_resolutions} is for whole pictures. Leave --conv-only away")


# ----------------------------------------------------------------------------------- devices and processes
def choose_device(name: str) -> torch.device:
    """cuda, else mps, else cpu, or `name`, with what makes all of it faster or right. ValueError where it is
    not here, or where torchrun starts more processes than there are GPUs."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    kind = name or there[0]
    if kind not in there:
        raise ValueError(f"--device {name} is not here. Choose from {there}")

    if kind == "cpu" and sys.platform == "linux":              # malloc keeps what is freed: 7% faster
        for parameter, limit in ((-3, 2**25), (-1, 2**31 - 1)):
            ctypes.CDLL(None).mallopt(parameter, limit)
    if kind != "cuda":
        return torch.device(kind)
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    if ranks > count:                                          # on every rank alike
        raise ValueError(f"{ranks} ranks do not have a GPU each. Use --nproc-per-node {count}")
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)                # with masks it has had faults until 2.13
    return torch.device(kind, local)


def leave() -> None:
    """End one of several processes as the error in flight would, but at once: where Python ends by itself,
    threads of gloo may wait for the lock that it holds, or hold what it takes down, and it does not end or
    aborts (torch 2.13)."""
    if not dist.is_initialized():
        return
    error = sys.exc_info()[1]
    if error and not isinstance(error, SystemExit):
        traceback.print_exc()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit((getattr(error, "code", 1) or 0) if error else 0)


# ------------------------------------------------------------------------------------------ norms and blocks
class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu and He 2018, arXiv:1803.08494) in groups of 16 channels or more, float32 inside.
    local: over the channels of one position instead, so that a crop and its whole picture are alike."""

    def __init__(self, channels: int, local: bool = False):
        super().__init__(min(32, max(1, channels // 16)), channels)
        self.local = local

    def forward(self, x: Tensor) -> Tensor:
        if not self.local:
            return super().forward(x)
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, (self.num_channels,), self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) in the type of its input, summed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), 1e-6)


conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)


def positions(x: Tensor) -> Tensor:
    """A feature map (B, C, H, W) -> its positions, (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


class ResBlock(nn.Module):
    """Residual block with scale-shift normalisation and resampling inside.
    Dhariwal and Nichol 2021, arXiv:2105.05233, section 3. resample: "down" halves, "up" doubles the sides
    before the first convolution, on both branches; "late" doubles them after the last."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, local: bool, resample: str = ""):
        super().__init__()
        self.resample = resample
        self.norm1 = GroupNorm(c_in, local)
        self.conv1 = conv3(c_in, c_out)
        self.emb = nn.Linear(emb_dim, 2 * c_out)
        self.norm2 = GroupNorm(c_out, local)
        self.conv2 = conv3(c_out, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def _resampled(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return doubled(x)
        return x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        h = self.conv1(self._resampled(h))                                            # (B, c_out, H', W')

        scale_shift = self.emb(emb)[:, :, None, None].to(h.dtype)
        scale, shift = scale_shift.chunk(2, 1)                                        # (B, c_out, 1, 1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)

        h = self.skip(self._resampled(x)) + self.conv2(F.silu(h))
        return doubled(h) if self.resample == "late" else h


def normal(x: Tensor, std: float) -> None:
    """Fill with normal numbers; not on the meta device, where it would import the compiler, for seconds."""
    if not x.is_meta:
        nn.init.normal_(x, std=std)


def doubled(x: Tensor) -> Tensor:
    """A feature map at twice its sides."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Self- and cross-attention in one call: keys of the picture, the text and the null token side by side.
    The text joins the keys as in Saharia et al. 2022, arXiv:2205.11487, section 2.3. Queries and keys are
    RMS-normalised per head with a learned gain (Dehghani et al. 2023, arXiv:2302.05442), which bounds the
    logits in bfloat16. local: no keys of the picture, and no places."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, local: bool):
        super().__init__()
        self.head_dim = head_dim
        self.local = local
        self.norm = GroupNorm(channels, local)
        self.qkv = nn.Linear(channels, channels if local else 3 * channels)
        self.text_kv = nn.Linear(context_dim, 2 * channels)
        self.q_norm = RMSNorm(head_dim)
        self.text_k_norm = RMSNorm(head_dim)
        if not local:
            self.k_norm = RMSNorm(head_dim)
            self.place = nn.Linear(12, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor) -> Tensor:
        """x (B, C, H, W); context (B, L+1, E) and bias (B, 1, 1, L+1), as with_null gives them."""
        _, C, H, W = x.shape
        heads = C // self.head_dim
        tokens = positions(self.norm(x))                                              # (B, N, C)

        # Keys and values of the text.
        text = self.text_kv(context).unflatten(2, (2, heads, -1))
        k, v = text.unbind(2)                                                         # (B, L+1, K, head_dim)
        k = self.text_k_norm(k)

        # Queries, and before the text the picture's own keys and values.
        if not self.local:
            tokens = tokens + self.place(places(H, W, x.device).flatten(1).T)
        own = self.qkv(tokens).unflatten(2, (-1, heads, self.head_dim))
        q, *own = own.unbind(2)                                                       # each (B, N, K, ...)
        q = self.q_norm(q)
        if not self.local:
            k = torch.cat([self.k_norm(own[0]), k], 1)                                # (B, N+L+1, K, ...)
            v = torch.cat([own[1], v], 1)
            bias = F.pad(bias, (H * W, 0))                                            # (B, 1, 1, N+L+1)

        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)                   # (B, K, N, head_dim)
        h = self.out(h.transpose(1, 2).flatten(2))                                    # (B, N, C)
        return x + h.transpose(1, 2).view_as(x)


class Weave(nn.Module):
    """What is written in a picture reads it, then the picture reads what is written: the weave attention of
    nostalgebraist's fork of improved-diffusion (2022). Keys and queries of the picture are scaled and shifted
    by time, text and learned places, of its rows plus of its columns; each of three branches has a learned
    gain, exp(0) at first, and a feed-forward stands between the attentions. Unlike there the picture has one
    norm for both, and starts as it was. side: of the feature map; dim: D of the transcription, a multiple
    of 32; carried: the text goes on as it was read, else as it came."""

    def __init__(self, channels: int, side: int, dim: int, emb_dim: int, head_dim: int, carried: bool):
        super().__init__()
        self.carried = carried
        self.norm = GroupNorm(channels)
        self.emb = nn.Linear(emb_dim, 2 * channels)
        self.rows = nn.Parameter(torch.zeros(2 * channels, side))
        self.columns = nn.Parameter(torch.zeros(2 * channels, side))
        self.read_norm = nn.LayerNorm(dim)
        self.read = CrossAttention(dim, dim // 32, channels)
        self.feed = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 2 * dim),
            nn.SiLU(),
            nn.Linear(2 * dim, dim))
        self.write_norm = nn.LayerNorm(dim)
        self.null = nn.Parameter(torch.zeros(1, 1, dim))
        self.write = CrossAttention(channels, channels // head_dim, dim)
        self.gains = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W); y (B, L, D), of which mask (B, L) is there; emb (B, E). Returns both."""
        # Other sides than its own have places between its own.
        place = self.rows[:, :, None] + self.columns[:, None]                         # (2C, side, side)
        place = F.interpolate(place[None], x.shape[-2:], mode="bilinear")
        scale, shift = (self.emb(emb)[:, :, None, None] + place).chunk(2, 1)          # (B, C, H, W)
        tokens = positions(self.norm(x) * (1 + scale) + shift)                        # (B, N, C)

        reads, feeds, writes = self.gains.exp()
        read = y + reads * self.read(self.read_norm(y), tokens)                       # (B, L, D)
        read = read + feeds * self.feed(read)

        keys, bias = with_null(self.write_norm(read), self.null, mask)                # (B, L+1, D), ...
        h = self.write(tokens, keys, bias)                                            # (B, N, C)
        x = x + writes * h.transpose(1, 2).view_as(x)
        return x, read if self.carried else y


def places(height: int, width: int, device: torch.device) -> Tensor:
    """4 x sines and cosines of y and x, (12, H, W): half a period, one and two over the height and the width.
    Coordinates as channels (Liu et al. 2018, arXiv:1807.03247). Times 4, or the noise drowns them: it doubled
    the gap between right and wrong captions."""
    def centres(n):
        return (torch.arange(n, device=device) + 0.5) / n * 2 - 1

    grid = torch.meshgrid(centres(height), centres(width), indexing="ij")
    plane = torch.stack(grid)                                                         # (2, H, W)
    angles = torch.cat([plane * math.pi / 2 * k for k in (1, 2, 4)])
    return 4 * torch.cat([angles.sin(), angles.cos()])


def waves(numbers: Tensor, dim: int) -> Tensor:
    """Cosines and sines of numbers (n,) float32 -> (n, dim) float32.
    Vaswani et al. 2017, arXiv:1706.03762, section 3.5, with frequencies from 1 down to 1/10000."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=numbers.device) / half)
    angles = numbers[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


def timed(layers: nn.Sequential, t: Tensor) -> Tensor:
    """t (B,) in [0, 1] -> (B, E), what layers make of the waves of 1000 t."""
    return layers(waves(1000 * t.float(), layers[0].in_features))


def with_null(context: Tensor, null: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The keys of the text (B, L, E), behind them the null (1, 1, E) that is always visible; and what hides
    them (B, 1, 1, L+1), of their type: 0 = visible, -inf = not."""
    null = null.expand(len(context), -1, -1).to(context.dtype)
    context = torch.cat([context, null], 1)                                           # (B, L+1, E)
    hidden = torch.where(mask, 0.0, -math.inf)
    bias = F.pad(hidden, (0, 1))[:, None, None]
    return context, bias.to(context.dtype)


def embed_text(net: nn.Module, context: Tensor, mask: Tensor, pooled: Tensor) -> tuple:
    """What a network makes of text by its `context`, `null` and `pooled`: keys and what hides them, as
    with_null, and a vector (B, E), of zeros where there is no token; where it has no `pooled`, as it came."""
    if net.pooled is not None:
        pooled = net.pooled(torch.where(mask.any(1, keepdim=True), pooled, 0))
    return *with_null(net.context(context), net.null, mask), pooled


def called(block: nn.Module, recompute: bool, *inputs: Tensor | None) -> Tensor:
    """What a block says of its inputs; with `recompute` the backward pass runs it again and keeps nothing."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def matrices(net: nn.Module) -> dict[nn.Parameter, int]:
    """The weight matrices in the blocks of a U-Net, ours or a published one, and of how many each is made.
    Scale and shift (`emb`) are two, as are keys and values of the text, value and gate (`proj`)."""
    found = {}
    for name, p in net.named_parameters():
        if p.ndim > 1 and re.match("down|mid|up", name):
            found[p] = 2 if name.split(".")[-2] in ("emb", "text_kv", "proj") else 1
    return found


def mlp(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_out))


# ---------------------------------------------------------------------------------------------- the U-Net
class UNet(nn.Module):
    """Text-conditioned U-Net: the layout of Dhariwal and Nichol 2021, arXiv:2105.05233, text as extra keys.
    With config.efficient that of the Efficient U-Net (Saharia et al. 2022, arXiv:2205.11487, appendix B and
    figure A.30): sides halve before, double after the convolutions of a level; skips weigh 1/sqrt(2).
    size: side of the pictures [pixels]; text_dim, pooled_dim: D and P; planes: channels of a picture; lowres:
    of the low-resolution one, 0 for none; learn_sigma: predict a variance too, in twice the channels;
    written_dim: D and P of a second stream, of what is written in pictures, 0 for none.
    Raises ValueError where the shape cannot be built, naming the flag. Set `checkpointing` to recompute
    activations in the backward pass."""
    matrices = matrices

    def __init__(self, config: ModelConfig, size: int, text_dim: int, pooled_dim: int, planes: int = 3,
                 lowres: int = 0, learn_sigma: bool = False, written_dim: int = 0):
        super().__init__()
        check_shape(config, size)
        self.config = config
        self.checkpointing = False
        ch, emb, local = config.channels, config.emb_dim, config.conv_only

        # What the condition becomes: one vector, and the keys of the text.
        self.time = mlp(emb // 4, emb)
        self.pooled = nn.Sequential(nn.LayerNorm(pooled_dim), *mlp(pooled_dim, emb))
        self.context = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, emb))
        self.null = nn.Parameter(torch.zeros(1, 1, emb))                 # the key that is always visible
        if lowres:
            self.lowres_time = mlp(emb // 4, emb)

        inside = (planes + lowres) * config.patch**2 + (0 if local else 12)        # 12 of `places`
        self.conv_in = conv3(inside, ch)

        # Down: each stage leaves a skip.
        stage = partial(self.stage, written_dim=written_dim)
        num_blocks = np.broadcast_to(config.num_res_blocks, len(config.channel_mult)).tolist()
        c, side, skips = ch, size // config.patch, [ch]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, mult in enumerate(config.channel_mult):
            if level:
                side //= 2
                self.down.append(nn.ModuleList([ResBlock(c, c, emb, local, "down")]))
                skips.append(c)
            for _ in range(num_blocks[level]):
                self.down.append(stage(side, c, mult * ch))
                c = mult * ch
                skips.append(c)

        self.mid = nn.ModuleList([
            ResBlock(c, c, emb, local),
            Attention(c, emb, config.head_dim, local),
            ResBlock(c, c, emb, local)])

        # Up: each stage takes a skip; the last of a level goes to the next level's width, then to its side.
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for _ in range(num_blocks[level] + 1):
                self.up.append(stage(side, c + skips.pop(), mult * ch))
                c = mult * ch
            if level:
                side *= 2
                above = config.channel_mult[level - 1] * ch
                resample = "late" if config.efficient else "up"
                number = sum(type(block) is not Weave for block in self.up[-1])
                self.up[-1].add_module(str(number), ResBlock(c, above, emb, local, resample))
                c = above
        self.norm_out = GroupNorm(c, local)
        self.conv_out = conv3(c, planes * (1 + learn_sigma) * config.patch**2)
        if written_dim:
            self.transcription = TextAdapter(written_dim, emb, written_dim, emb)
        self.init_weights()

    def stage(self, side: int, c_in: int, c_out: int, written_dim: int) -> nn.ModuleList:
        """A residual block and the attentions behind it."""
        config = self.config
        blocks = nn.ModuleList([ResBlock(c_in, c_out, config.emb_dim, config.conv_only)])
        if side in config.attn_resolutions:
            blocks.append(Attention(c_out, config.emb_dim, config.head_dim, config.conv_only))
        if side in config.weave_resolutions:
            weave = Weave(c_out, side, written_dim, config.emb_dim, config.head_dim, config.weave_carried)
            blocks.add_module("weave", weave)              # the others are named as without it
        return blocks

    def init_weights(self) -> None:
        # Layers keep the variance of a unit input. Blocks start as the identity, the output as 0.
        for name, p in self.named_parameters():
            if p.ndim > 1 and name.endswith("weight"):
                nn.init.trunc_normal_(p, std=1 / math.sqrt(p[0].numel()))
            if re.search(r"bias|(conv2|\.out|conv_out|write\.to_out\.0)\.weight", name):
                nn.init.zeros_(p)
        normal(self.null, 0.5)
        self.to(memory_format=torch.channels_last)

    def _run(self, blocks, h, told):
        for block in blocks:
            kind = type(block)
            h = called(block, self.checkpointing, h, *told.get(kind, told[ResBlock]))
            if kind is Weave:
                h, told[kind][0] = h                           # the text, for the next one
        return h

    def _down(self, x, told):
        """The feature maps of a picture (B, planes, H, W) on its way down, which are the skips, and behind
        them that of the middle. told: what each kind of block is told beside them."""
        # The picture, in patches, and where each of them is.
        h = F.pixel_unshuffle(x, self.config.patch)
        if not self.config.conv_only:
            here = places(*h.shape[-2:], h.device)
            h = torch.cat([h, here.expand(len(h), -1, -1, -1)], 1)
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))             # (B, C, H', W')

        maps = [h]
        for blocks in (*self.down, self.mid):
            maps.append(self._run(blocks, maps[-1], told))
        return maps

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, mask: Tensor, pooled: Tensor,
                lowres: Tensor | None = None, lowres_t: Tensor | None = None, **written: Tensor) -> Tensor:
        """Predict the target of the diffusion at each pixel.
        x_t (B, planes, H, W) float32, the noisy picture; t (B,) float32 in [0, 1], 1 = pure noise; context
        (B, L, D); mask (B, L) bool, True = a token; pooled (B, P). A row of the mask without any True is the
        unconditional branch: its tokens and its pooled vector are not seen. Of a super-resolution stage,
        lowres (B, c, h, w) float32, the low-resolution picture, noised, upsampled here to H and W if it is
        smaller; lowres_t (B,) float32 in [0, 1], how noisy it is. written: transcription_context, _mask and
        _pooled, the same of what is written in the picture, whose keys join those of the text, and which
        weaves read. Returns (B, planes, H, W) float32, with learn_sigma twice the planes."""
        # The vector of time and text, and the keys: the tokens of the text that are there, and the null.
        time = timed(self.time, t)
        x = x_t
        if lowres is not None:
            time = time + timed(self.lowres_time, lowres_t)
            if lowres.shape[-2:] != x_t.shape[-2:]:
                lowres = F.interpolate(lowres, x_t.shape[-2:], mode="bicubic")        # (B, c, H, W)
            x = torch.cat([x, lowres], 1)
        context, bias, vector = embed_text(self, context, mask, pooled)               # (B, L+1, E), ...
        time = time + vector

        # Behind them those of what is written.
        parts = []
        if written:
            parts = [written[f"transcription_{name}"] for name in ("context", "mask", "pooled")]
            keys, more, vector = self.transcription(*parts)
            context = torch.cat([context, keys], 1)
            bias = torch.cat([bias, more], -1)
            time = time + vector
        emb = F.silu(time)                                                            # (B, E)
        told = {ResBlock: [emb], Attention: [context, bias], Weave: [*parts[:2], emb]}

        *skips, h = self._down(x, told)
        for blocks in self.up:
            skip = skips.pop()
            if self.config.efficient:
                skip = skip * math.sqrt(0.5)
            h = self._run(blocks, torch.cat([h, skip], 1), told)

        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.config.patch).float()                          # (B, out, H, W)


# --------------------------------------------------------------------------------------- published networks
# Fields of config.json as diffusers writes it, and their usual values: in a list where each level may have
# its own, in a tuple all that is known here, the usual one first; 0 where it must be given.
UNET_FIELDS = dict(
    block_out_channels=[0],
    down_block_types=[("CrossAttnDownBlock2D", "DownBlock2D")],
    up_block_types=[("CrossAttnUpBlock2D", "UpBlock2D")],
    in_channels=4,
    out_channels=4,
    layers_per_block=[2],
    attention_head_dim=[8],                                    # the number of heads is published as that
    transformer_layers_per_block=[1],
    cross_attention_dim=1280,
    use_linear_projection=(False, True),
    norm_num_groups=32,
    norm_eps=1e-5,
    addition_embed_type=(None, "text_time"),                   # of SDXL, as are the next two
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
KL_FIELDS = dict(
    block_out_channels=[0],
    down_block_types=[("DownEncoderBlock2D",)],
    up_block_types=[("UpDecoderBlock2D",)],
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=32,
    scaling_factor=0.18215,
    shift_factor=0.0,
    use_quant_conv=(True, False),
    use_post_quant_conv=(True, False),
    mid_block_add_attention=(True, False),
)
TINY_FIELDS = dict(
    num_encoder_blocks=[0],
    num_decoder_blocks=[0],
    block_out_channels=[(64,)],
    encoder_block_out_channels=[(64,)],
    decoder_block_out_channels=[(64,)],
    latent_channels=4,
    scaling_factor=1.0,
    shift_factor=0.0,
    act_fn=("relu",),
    pool=(False, True),                                        # TAEF2 alone; diffusers does not know it
)
FIXED = dict(  # other fields may say this, or nothing
    act_fn="silu",
    attention_type="default",
    conv_in_kernel=3,
    conv_out_kernel=3,
    downsample_padding=1,
    flip_sin_to_cos=True,
    in_channels=3,
    mid_block_scale_factor=1,
    mid_block_type="UNetMidBlock2DCrossAttn",
    out_channels=3,
    resnet_out_scale_factor=1,
    resnet_time_scale_shift="default",
    time_embedding_type="positional",
    upsample_fn="nearest",
    upsampling_scaling_factor=2,
)
WITHOUT_EFFECT = {"sample_size", "force_upcast", "upcast_attention", "addition_embed_type_num_heads",
                  "latent_magnitude", "latent_shift"}
TAEF2 = dict(num_encoder_blocks=[1, 3, 3, 3], num_decoder_blocks=[3, 3, 3, 1], latent_channels=32, pool=True)
SD15 = dict(
    block_out_channels=[320, 640, 1280, 1280],
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    cross_attention_dim=768,
)
SD21 = SD15 | dict(
    attention_head_dim=[5, 10, 20, 20],
    cross_attention_dim=1024,
    use_linear_projection=True,
)
SDXL = dict(
    block_out_channels=[320, 640, 1280],
    down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    attention_head_dim=[5, 10, 20],
    transformer_layers_per_block=[1, 2, 10],
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
)
UNETS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}             # published layouts, to build from scratch


def allowed(value, usual, most: int) -> bool:
    """Whether a value of a config.json is of the kind of the usual one; whole numbers from 1 to `most`."""
    if isinstance(usual, tuple):
        return value in usual
    if isinstance(usual, float):
        return type(value) in (int, float) and abs(value) < 1e6 and (value > 0 or usual == 0)
    return type(value) is int and 0 < value <= most


def read_fields(config: dict, table: dict) -> SimpleNamespace:
    """The fields of a table out of a config.json, lists with one value for each level; the first field says
    how many there are. Raises ValueError for a value that is missing, impossible or not known here."""
    for name, value in config.items():
        used = name in {*table, *WITHOUT_EFFECT} or name.startswith("_")
        if not used and value not in (None, FIXED.get(name, False)):
            raise ValueError(f"{name!r:.60} is {value!r:.60}, which is not known here")

    fields = {}
    levels = 0
    for name, usual in table.items():
        each = isinstance(usual, list)
        kind = usual[0] if each else usual
        value = config.get(name)
        if value is None:
            value = kind[0] if isinstance(kind, tuple) else kind
        values = value if each and isinstance(value, list) else [value]
        if len(values) == 1 and each:
            values = values * max(1, levels)
        levels = levels or len(values)

        most = 16 if "layers" in name or "blocks" in name else 10**5
        right = [allowed(one, kind, most) for one in values]
        if not all(right) or not 0 < levels <= 8 or len(values) not in (1, levels):
            known = kind if isinstance(kind, tuple) else f"a number up to {most}"
            raise ValueError(f"{name} is {value!r:.60}, it must be {known}, with up to 8 levels")
        fields[name] = values if each else value
    return SimpleNamespace(**fields)


class Residual(nn.Module):
    """Residual block (ResnetBlock2D). emb_dim: width of the vector that is added, 0 = none."""

    def __init__(self, c_in, c_out, groups, eps=1e-6, emb_dim=0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = conv3(c_in, c_out)
        if emb_dim:
            self.time_emb_proj = nn.Linear(emb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = conv3(c_out, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class CrossAttention(nn.Module):
    """Attention to a context, or without one to itself (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, channels, heads, context_dim, bias=False):
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention_head_dim {heads} (the number of heads) must divide {channels}")
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias)
        self.to_k = nn.Linear(context_dim, channels, bias)
        self.to_v = nn.Linear(context_dim, channels, bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x, context=None, bias=None):
        """x (B, N, C); context (B, L, D); bias (B, 1, 1, L) of the logits. Returns (B, N, C)."""
        keys = x if context is None else context
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)                       # (B, K, N, C/K)
            for part in (self.to_q(x), self.to_k(keys), self.to_v(keys)))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)                   # (B, K, N, C/K)
        return self.to_out[0](h.transpose(1, 2).flatten(2))


class PictureAttention(CrossAttention):
    """Attention of a feature map to itself in one head, in the middle of a VAE."""

    def __init__(self, channels, groups):
        super().__init__(channels, 1, channels, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, 1e-6)

    def forward(self, x):
        tokens = positions(self.group_norm(x))                                        # (B, N, C)
        return x + super().forward(tokens).transpose(1, 2).view_as(x)


class GEGLU(nn.Module):
    """Gated linear units with GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, channels, inner):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x):
        h, gate = self.proj(x).chunk(2, -1)
        return h * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Attention to the picture, attention to the text, feed-forward (BasicTransformerBlock)."""

    def __init__(self, channels, heads, text_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = CrossAttention(channels, heads, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, heads, text_dim)
        self.norm3 = nn.LayerNorm(channels)
        inner = 4 * channels
        net = nn.Sequential(GEGLU(channels, inner), nn.Identity(), nn.Linear(inner, channels))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x, context, bias):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, bias)
        return x + self.ff["net"](self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks on the positions of a feature map (Transformer2DModel)."""

    def __init__(self, channels, heads, depth, text_dim, groups, linear):
        super().__init__()
        project = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        blocks = [TransformerBlock(channels, heads, text_dim) for _ in range(depth)]
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = project(channels, channels)

    def forward(self, x, context, bias):
        def project(layer, tokens):                            # a convolution of one position is linear
            return F.linear(tokens, layer.weight.flatten(1), layer.bias)

        tokens = project(self.proj_in, positions(self.norm(x)))                       # (B, N, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, bias)
        return x + project(self.proj_out, tokens).transpose(1, 2).view_as(x)


class Level(nn.ModuleDict):
    """The blocks of one side, by their published names; those that it lacks are empty."""

    def __init__(self):
        names = ("resnets", "attentions", "downsamplers", "upsamplers")
        super().__init__({name: nn.ModuleList() for name in names})

    def add(self, resnet, attention=None):
        self["resnets"].append(resnet)
        if attention is not None:
            self["attentions"].append(attention)

    def resample(self, which, channels, stride=1, padding=1):
        conv = nn.Conv2d(channels, channels, 3, stride, padding)
        self[which].append(nn.ModuleDict({"conv": conv}))

    def forward(self, h, emb=None, text=(), leave=None, take=None, recompute=False):
        """leave: a list that gets each feature map, for the skips; take: the list to take them from."""
        for resnet, attention in zip_longest(self["resnets"], self["attentions"]):
            if take:
                h = torch.cat([h, take.pop()], 1)
            h = called(resnet, recompute, h, emb)
            if attention is not None:
                h = called(attention, recompute, h, *text)
            if leave is not None:
                leave.append(h)

        for part in self["downsamplers"]:
            if part["conv"].padding == (0, 0):                 # of VAEs: to the right and below alone
                h = F.pad(h, (0, 1, 0, 1))
            h = part["conv"](h)
            if leave is not None:
                leave.append(h)
        for part in self["upsamplers"]:
            h = F.interpolate(h, take[-1].shape[-2:], mode="nearest") if take else doubled(h)
            h = part["conv"](h)
        return h


def embedding_mlp(c_in: int, c_out: int) -> nn.Sequential:
    names = "linear_1", "act", "linear_2"
    return nn.Sequential(OrderedDict(zip(names, mlp(c_in, c_out))))


class TextAdapter(nn.Module):
    """What lets a published U-Net read another text encoder: projections to its widths, a learned null.
    text_dim, pooled_dim: D and P of that encoder; width, pooled_width: what the U-Net reads, 0 = none."""

    def __init__(self, text_dim: int, width: int, pooled_dim: int, pooled_width: int):
        super().__init__()
        self.context = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.null = nn.Parameter(torch.zeros(1, 1, width))
        normal(self.null, 0.5)
        self.pooled = nn.Linear(pooled_dim, pooled_width) if pooled_width else None
        normal(self.context[1].weight, 1 / math.sqrt(text_dim))

    forward = embed_text                                       # called with context, mask, pooled


class UNet2DConditionModel(nn.Module):
    """The U-Net of Stable Diffusion 1.x and 2.x (Rombach et al. 2021, arXiv:2112.10752) and XL (Podell et al.
    2023, arXiv:2307.01952), by the parameter names of diffusers. It attends to all positions of its own text
    encoder, as published; text_dim, pooled_dim: D and P of another one, see `adapt`.
    config: what config.json says, or a row of UNETS; ValueError where that cannot be built.
    Set `checkpointing` to recompute activations in the backward pass, and `empty` to (context (1, L, D),
    pooled (1, P)) of the empty prompt: it stands for captions that are not told."""
    matrices = matrices

    def __init__(self, config: dict, text_dim: int = 0, pooled_dim: int = 0):
        super().__init__()
        shape = read_fields(config, UNET_FIELDS)
        self.config = vars(shape) | config
        self.checkpointing = False
        self.empty = None
        if shape.in_channels != shape.out_channels:
            raise ValueError(f"in_channels {shape.in_channels} is not out_channels {shape.out_channels}: "
                             "U-Nets that see a second picture (inpainting, depth) are not read")

        # What the condition becomes: one vector.
        c = shape.block_out_channels[0]
        self.time_embedding = embedding_mlp(c, 4 * c)
        self.size_dim = 0                                      # of each of SDXL's six sizes
        self.pooled_width = 0
        if shape.addition_embed_type:
            inside = shape.projection_class_embeddings_input_dim
            self.size_dim = shape.addition_time_embed_dim
            self.pooled_width = inside - 6 * self.size_dim
            self.add_embedding = embedding_mlp(inside, 4 * c)
        if c % 2 or self.size_dim % 2 or self.pooled_width < 0:
            raise ValueError(f"widths of embeddings do not fit: {c}, {self.size_dim}, {self.pooled_width}")

        self.conv_in = conv3(shape.in_channels, c)
        self.add_levels(shape)
        self.conv_norm_out = nn.GroupNorm(shape.norm_num_groups, c, shape.norm_eps)
        self.conv_out = conv3(c, shape.out_channels)
        self.init_weights()
        self.adapter = None
        if text_dim:
            self.adapt(text_dim, pooled_dim)

    def add_levels(self, shape: SimpleNamespace) -> None:
        widths = shape.block_out_channels
        groups = shape.norm_num_groups

        def add(part, level, c_in, kind):
            c = widths[level]
            attention = None
            if "Attn" in kind:
                heads, depth = shape.attention_head_dim[level], shape.transformer_layers_per_block[level]
                attention = Transformer(c, heads, depth, shape.cross_attention_dim, groups,
                                        shape.use_linear_projection)
            part.add(Residual(c_in, c, groups, shape.norm_eps, 4 * widths[0]), attention)
            return c

        # Down: each residual block and each halving leaves a skip. Up takes them.
        self.down_blocks = nn.ModuleList(Level() for _ in widths)
        self.mid_block = Level()
        self.up_blocks = nn.ModuleList(Level() for _ in widths)
        last = len(widths) - 1
        c = widths[0]
        skips = [c]
        for level, part in enumerate(self.down_blocks):
            for _ in range(shape.layers_per_block[level]):
                c = add(part, level, c, shape.down_block_types[level])
                skips.append(c)
            if level < last:
                part.resample("downsamplers", c, stride=2)
                skips.append(c)
        for kind in ("Attn", ""):
            add(self.mid_block, last, c, kind)
        for part, kind in zip(self.up_blocks, shape.up_block_types):
            for _ in range(shape.layers_per_block[last] + 1):
                c = add(part, last, c + skips.pop(), kind)
            if last:
                part.resample("upsamplers", c)
            last -= 1

    def init_weights(self) -> None:
        # Blocks start as the identity, the output as 0, as in Rombach et al.; the rest as torch has it.
        for name, p in self.named_parameters():
            if re.search(r"(conv2|proj_out)\.weight|conv_out\.", name):
                nn.init.zeros_(p)
        if torch.cuda.is_available():                          # on a CPU 3% slower, tests/bench_unet.py
            self.to(memory_format=torch.channels_last)

    def adapt(self, text_dim: int, pooled_dim: int) -> None:
        """Read another text encoder, of widths D and P, from now on: masked, and with a learned null."""
        width = self.config["cross_attention_dim"]
        self.adapter = TextAdapter(text_dim, width, pooled_dim, self.pooled_width)

    def embedding(self, x_t: Tensor, t: Tensor, pooled: Tensor | None, sizes: Tensor | None) -> Tensor:
        """The vector of time, and in SDXL of pooled text and sizes, see `forward`."""
        timestep = (1000 * t.float() - 1).clamp(min=0)
        timestep = (1024 * timestep).round() / 1024            # whole steps are whole in float32 too
        emb = self.time_embedding(waves(timestep, self.conv_in.out_channels))
        if self.size_dim:
            if sizes is None:
                sizes = torch.zeros(len(x_t), 6, device=x_t.device)
                sizes[:, 0::4] = 8 * x_t.shape[-2]
                sizes[:, 1::4] = 8 * x_t.shape[-1]
            sizes = waves(sizes.flatten().float(), self.size_dim).view(len(x_t), -1)
            emb = emb + self.add_embedding(torch.cat([pooled, sizes], 1))
        return F.silu(emb)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, mask: Tensor, pooled: Tensor | None = None,
                sizes: Tensor | None = None) -> Tensor:
        """Predict the target of the diffusion at each position.
        x_t (B, C, H, W) float32, noisy latents; t (B,) float32, (timestep + 1) / 1000; context (B, L, D);
        mask (B, L) bool: a row without any True is the unconditional branch, else it counts with an adapter
        alone. Of SDXL, pooled (B, P) and sizes (B, 6) [pixels]: the picture's height and width, top and left
        of its crop, height and width of that; usually those of x_t at eight pixels a position, uncut.
        Returns (B, C, H, W) float32."""
        bias = None
        if self.adapter is not None:
            context, bias, pooled = self.adapter(context, mask, pooled)               # bias (B, 1, 1, L+1)
        elif self.empty is not None:
            told = mask.any(1, keepdim=True)
            context = torch.where(told[..., None], context, self.empty[0].to(context))
            if self.size_dim:
                pooled = torch.where(told, pooled, self.empty[1].to(pooled))
        emb = self.embedding(x_t, t, pooled, sizes)
        told = dict(emb=emb, text=(context, bias), recompute=self.checkpointing)

        layout = torch.channels_last if x_t.is_cuda else torch.contiguous_format
        h = self.conv_in(x_t.contiguous(memory_format=layout))                        # (B, C, H, W)
        skips = [h]
        for level in self.down_blocks:
            h = level(h, **told, leave=skips)
        h = self.mid_block(h, **told)
        for level in self.up_blocks:
            h = level(h, **told, take=skips)
        return self.conv_out(F.silu(self.conv_norm_out(h))).float()


class Latents(nn.Module):
    """The space of the latents of a frozen VAE: `mean` of a picture in [-1, 1], shifted and scaled; `picture`
    is the way back. channels: of a latent; scale: pixels of a picture per position; tile: side of the squares
    in which larger pictures are decoded where memory is short [pixels]; fingerprint: of weights and settings.
    """

    limit = None
    tile = 512
    fingerprint = ""

    def __deepcopy__(self, memo):
        return self                                            # the average of a network shares it

    def __init__(self, config: dict, table: dict):
        super().__init__()
        self.shape = read_fields(config, table)
        self.config = vars(self.shape) | config
        self.channels = self.shape.latent_channels
        levels = next(iter(vars(self.shape).values()))
        self.scale = 2 ** (len(levels) - 1)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, channels, H/scale, W/scale), on the same device. One picture at
        a time: sums round otherwise in batches, and a latent must be the same bits wherever it is made."""
        height, width = pictures.shape[-2:]
        if height % self.scale or width % self.scale:
            raise ValueError(f"pictures of {width}x{height} pixels: not multiples of {self.scale}")
        dtype = next(self.parameters()).dtype
        x = (pictures.float() / 127.5 - 1).to(dtype, memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):
            mean = torch.cat([self.mean(picture) for picture in x.split(1)]).float()
        return ((mean - self.shape.shift_factor) * self.shape.scaling_factor).contiguous()

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, channels, h, w) -> uint8 (B, 3, h * scale, w * scale), on the same device. Pictures that do
        not fit into memory together are decoded one by one, and one that does not, in tiles."""
        z = x0.float() / self.shape.scaling_factor + self.shape.shift_factor
        z = z.to(next(self.parameters()).dtype)
        with torch.autocast(z.device.type, enabled=False):
            try:
                x = self.picture(z).float()
            except torch.OutOfMemoryError:
                x = None
            if x is None:                                      # not inside: there the failed one holds memory
                if len(x0) > 1:
                    return torch.cat([self.decode(one) for one in x0.split(1)])
                x = self.tiles(z)
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def tiles(self, z: Tensor) -> Tensor:
        """Decode in squares that overlap by half and fade at their borders."""
        scale = self.scale
        side = max(2, self.tile // scale)

        def cut(whole):
            """Where the squares lie along one side, and how much each of a square's pixels weighs."""
            part = min(side, whole)
            starts = [*range(0, whole - part, part // 2), whole - part]
            place = (torch.arange(part * scale, device=z.device) + 0.5) / (part * scale)
            border = torch.minimum(place, 1 - place)                                  # 0 .. 0.5
            return [slice(start, start + part) for start in starts], (4 * border - 0.5).clamp(1e-4, 1)

        rows, down = cut(z.shape[-2])
        columns, across = cut(z.shape[-1])
        weight = down[:, None] * across
        whole = (scale * side for side in z.shape[-2:])
        total = weight.new_zeros(len(z), 4, *whole)
        for y in rows:
            for x in columns:
                part = self.picture(z[..., y, x]).float()
                here = total[..., scale * y.start:scale * y.stop, scale * x.start:scale * x.stop]
                here += F.pad(part, (0, 0, 0, 0, 0, 1), value=1) * weight
        return total[:, :3] / total[:, 3:]


class Coder(nn.Module):
    """The encoder or, up, the decoder of AutoencoderKL. c_in, c_out: channels of its input and output."""

    def __init__(self, shape, c_in, c_out, up):
        super().__init__()
        groups = shape.norm_num_groups
        deep = shape.block_out_channels[-1]
        widths = shape.block_out_channels[::-1] if up else shape.block_out_channels
        c = widths[0]
        self.conv_in = conv3(c_in, c)

        self.mid_block = Level()
        attention = PictureAttention(deep, groups) if shape.mid_block_add_attention else None
        self.mid_block.add(Residual(deep, deep, groups), attention)
        self.mid_block.add(Residual(deep, deep, groups))

        levels = nn.ModuleList(Level() for _ in widths)
        for level, width in zip(levels, widths):
            for _ in range(shape.layers_per_block + up):
                level.add(Residual(c, width, groups))
                c = width
            if level is levels[-1]:
                break
            if up:
                level.resample("upsamplers", c)
            else:
                level.resample("downsamplers", c, stride=2, padding=0)

        self.order = [self.mid_block, *levels] if up else [*levels, self.mid_block]
        self.add_module("up_blocks" if up else "down_blocks", levels)
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-6)
        self.conv_out = conv3(c, c_out)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.order:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class AutoencoderKL(Latents):
    """The VAE of Stable Diffusion, SDXL, SD3 and FLUX.1 (Rombach et al. 2021, arXiv:2112.10752, section 3.1),
    by the parameter names of diffusers. Of what it says of a picture only the mean is used."""

    def __init__(self, config: dict):
        super().__init__(config, KL_FIELDS)
        shape, c = self.shape, self.channels
        self.encoder = Coder(shape, 3, 2 * c, up=False)
        self.decoder = Coder(shape, c, 3, up=True)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if shape.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c, c, 1) if shape.use_post_quant_conv else nn.Identity()

    def mean(self, x):
        return self.quant_conv(self.encoder(x))[:, :self.channels]

    def picture(self, z):
        return self.decoder(self.post_quant_conv(z))


class TinyBlock(nn.Module):
    def __init__(self, pool):
        super().__init__()
        conv = partial(conv3, 64, 64)
        self.conv = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
        self.pool = None
        if pool:
            wide = nn.Conv2d(64, 256, 1, bias=False)
            narrow = nn.Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(wide, nn.GroupNorm(4, 256), nn.ReLU(), narrow)

    def forward(self, x):
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class AutoencoderTiny(Latents):
    """TAESD, TAESDXL, TAESD3 and TAEF1 (Bohan 2023, github.com/madebyollin/taesd) by the parameter names of
    diffusers; with `pool` in config TAEF2, where the blocks of the smallest side have one more branch."""

    def __init__(self, config: dict):
        super().__init__(config, TINY_FIELDS)
        pool = self.shape.pool

        def blocks(number, pool):
            return [TinyBlock(pool) for _ in range(number)]

        *numbers, last = self.shape.num_encoder_blocks
        layers = [conv3(3, 64)]
        for number in numbers:
            layers += [*blocks(number, False), conv3(64, 64, stride=2, bias=False)]
        layers += [*blocks(last, pool), conv3(64, self.channels)]
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*layers)})

        *numbers, last = self.shape.num_decoder_blocks
        layers = [conv3(self.channels, 64), nn.ReLU()]
        if pool:
            layers = [nn.Identity(), *layers]                  # TAEF2 counts the tanh as a layer
        for number in numbers:
            layers += [*blocks(number, pool), nn.Upsample(scale_factor=2), conv3(64, 64, bias=False)]
            pool = False
        layers += [*blocks(last, pool), conv3(64, 3)]
        self.decoder = nn.ModuleDict({"layers": nn.Sequential(*layers)})

    def mean(self, x):
        return self.encoder["layers"]((x + 1) / 2)

    def picture(self, z):
        return self.decoder["layers"](torch.tanh(z / 3) * 3) * 2 - 1


# ----------------------------------------------------------------------------------------------------- CLIP
class AttentionPool(CrossAttention):
    """One vector of many: a first guess asks them all once more (Radford et al. 2021, arXiv:2103.00020,
    section 2.3). channels: of the guess; context_dim: of the others; width: of what is returned."""

    def __init__(self, channels: int, head_dim: int, context_dim: int, width: int):
        super().__init__(channels, channels // head_dim, context_dim)
        self.head = nn.Linear(channels, width)

    def forward(self, guess: Tensor, others: Tensor, bias: Tensor | None = None) -> Tensor:
        """guess (B, C); others (B, N, context_dim); bias (B, 1, 1, N) of the logits. Returns (B, width) of
        unit length, float32."""
        guess = guess[:, None]
        found = guess + super().forward(guess, others, bias)
        return F.normalize(self.head(found[:, 0]).float(), dim=1)


class CLIP(UNet):
    """A CLIP (Radford et al. 2021, arXiv:2103.00020) whose pictures are noisy, to guide a sampler (Nichol et
    al. 2021, arXiv:2112.10741, section 2.4). The picture's tower is the U-Net down to its middle, without
    text, and a pool, as the classifier of Dhariwal and Nichol 2021, arXiv:2105.05233, section 4; the
    caption's is what the U-Net makes of text, and a pool. Both give features of config.emb_dim numbers.
    size, text_dim, pooled_dim, planes: as of the U-Net; ValueError where the shape cannot be built."""

    def __init__(self, config: ModelConfig, size: int, text_dim: int, pooled_dim: int, planes: int = 3):
        super().__init__(config, size, text_dim, pooled_dim, planes)
        self.up = nn.ModuleList()
        del self.conv_out
        c, emb = config.channels * config.channel_mult[-1], config.emb_dim
        self.norm_out = GroupNorm(c, config.conv_only)
        self.picture_pool = AttentionPool(c, config.head_dim, c, emb)
        self.text_pool = AttentionPool(emb, 32, emb, emb)      # a width that divides emb
        self.scale_logit = nn.Parameter(torch.tensor(-math.log(100 * 0.07 - 1)))

    def scale(self) -> Tensor:
        """What similarities are multiplied by, (): 1/0.07 at first, always below 100."""
        return 100 * torch.sigmoid(self.scale_logit)

    def read(self, context: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        """The features of captions, (B, E) float32 of unit length; arguments as of the U-Net's `forward`."""
        context, bias, vector = embed_text(self, context, mask, pooled)               # (B, L+1, E), ...
        return self.text_pool(vector, context, bias)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The features of noisy pictures x_t (B, planes, H, W) float32 at times t (B,) float32 in [0, 1]:
        (B, E) float32 of unit length."""
        time = timed(self.time, t)
        no_text = time.new_zeros(len(x_t), 0, self.config.emb_dim)
        context, bias = with_null(no_text, self.null, no_text[..., 0].bool())         # the null alone
        *_, h = self._down(x_t, {ResBlock: [F.silu(time)], Attention: [context, bias]})
        tokens = positions(self.norm_out(h))                                          # (B, N, C)
        return self.picture_pool(tokens.mean(1), tokens)


# -------------------------------------------------------------------------------------------- configurations
@cache
def helps(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass."""
    source = Path(inspect.getfile(cls)).read_text("utf-8")     # inspect.getsource would parse all of the file
    fields = re.search(rf"^class {cls.__name__}\b.*\n((?: .*\n|\n)*)", source, re.MULTILINE)[1]
    return dict(re.findall(r"^    (\w+): [\s\S]*?  # (.*)$", fields, re.MULTILINE))


def fits(value: object, kind: object) -> bool:
    """Whether a value is of a declared type: of a Literal, bool | None, list[str], tuple[int, ...], float."""
    members = get_args(kind)
    if get_origin(kind) is Literal:
        return value in members
    if get_origin(kind) in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(one, members[0]) for one in value)
    return isinstance(value, kind) or (kind is float and type(value) is int)


def check(name: str, value: object, kind: object, comment: str) -> None:
    """Raise ValueError, one line, where a value is not of its declared type, or outside of the limits in the
    comment, as in [0..1] or [1..99 steps]; without any, a number is one from 0 to a billion."""
    if not fits(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} is {str(value)[:80]!r}, not {getattr(kind, '__name__', kind)}")
    limits = re.search(r"\[(-?[\d.e-]+?)\.\.([\de.]+)", comment)
    least, most = map(float, limits.groups()) if limits else (0, 1e9)
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, int | float) and not least <= one <= most:         # a nan is outside, too
            raise ValueError(f"{name} {one} is outside {least:g} to {most:g}")


def check_fields(config: object) -> None:
    """`check` of each field of a dataclass, named as its flag."""
    comments, kinds = helps(type(config)), get_type_hints(type(config))
    for name, comment in comments.items():
        check(f"--{name.replace('_', '-')}", getattr(config, name), kinds[name], comment)


def configured(cls: type, stored: dict):
    """The dataclass of what a file says of it, with the usual values of what it does not say. Raises
    ValueError or TypeError where a name, a type or a limit is not that of the flags."""
    values = {}
    for name, value in stored.items():
        values[name] = tuple(value) if isinstance(getattr(cls, name, 0), tuple) else value
    config = cls(**values)
    check_fields(config)
    return config


# What a configuration or weights of other code, or crafted ones, may raise.
UNFIT = ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError


@contextmanager
def reading(path: Path, hint: str = "Use the code that wrote it"):
    """Turn what is UNFIT into one line."""
    try:
        yield
    except UNFIT as e:
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"{path} does not fit this code ({reason}). {hint}") from e


def fill(net: nn.Module, tensors: "Tensors", device: torch.device) -> None:
    """Give a network on the meta device its weights, in its own types and layout, without gradients.
    ValueError, before any memory is taken, where names or shapes are others."""
    wanted = net.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        shapes = [tuple(group[name].shape) if name in group else "missing" for group in (tensors, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]}, the configuration has {shapes[1]}")

    weights = {}
    for name, like in wanted.items():
        weights[name] = torch.empty_like(like, device=device).copy_(tensors[name])
    net.load_state_dict(weights, assign=True)
    net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ files of weights
FORMAT = "limn 1"
Tensors = dict[str, Tensor]                                    # by name


def checksum(tensors: Tensors, meta: dict[str, str]) -> str:
    """SHA-256 of the metadata and of each tensor's name, type, shape and bytes, in the order of names."""
    def digest(name):
        tensor = tensors[name].detach().cpu().contiguous()
        content = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # hashlib lets other threads run meanwhile.
        content.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        return content.digest()

    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(digest, sorted(tensors)))
    head = json.dumps(meta, sort_keys=True).encode()
    return hashlib.sha256(head + b"".join(parts)).hexdigest()


def fsync(path: Path) -> None:
    """Have a file on disk, or the names in a folder, where the system can: Windows opens no folders, and
    some disks of a network know nothing of it."""
    folder = path.is_dir()
    try:
        fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        if not folder or e.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def write_tensors(path: Path, tensors: Tensors, meta: dict[str, str]) -> None:
    """Write one safetensors file, whole or not at all; it is on disk afterwards, else OSError."""
    temp = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, temp, metadata=meta)
    except SafetensorError as e:                               # a full disk, say
        temp.unlink(missing_ok=True)
        code = re.search(r"os error (\d+)", str(e))
        if code is None:
            raise OSError(str(e)) from e
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(path)) from e

    # safetensors creates its files for the owner alone. To read the umask is to set it.
    umask = os.umask(0)
    os.umask(umask)
    with suppress(PermissionError):                            # a disk that keeps no rights
        os.chmod(temp, 0o666 & ~umask)
    fsync(temp)
    os.replace(temp, path)
    fsync(path.parent)


def save_tensors(path: Path, tensors: Tensors, meta: dict[str, str]) -> None:
    """Write one safetensors file with `meta` and its own checksum, see `write_tensors`."""
    meta = {"format": FORMAT} | meta
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}        # once, of a GPU
    write_tensors(path, tensors, meta | {"sha256": checksum(tensors, meta)})


@contextmanager
def damaged(path: Path, hint: str = "Name a run directory, a checkpoint folder or a file"):
    """Turn what a file that is missing or damaged raises into one line."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file. {hint}")
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} is missing. {hint}") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged: {str(e).splitlines()[0][:100]}") from e


def load_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read and verify a file of `save_tensors`: (tensors on the CPU, meta).
    Raises ValueError where it is missing, damaged or not ours. Nothing in a file is ever executed."""
    with damaged(path), safe_open(path, "pt") as f:
        meta = f.metadata() or {}
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118

    made_by = meta.get("format", "")
    if not made_by.startswith("limn "):
        first = next(iter(tensors), "none")
        raise ValueError(f"{path} is not a checkpoint of limn (first tensor: {first}). Name a file of runs/")
    if made_by != FORMAT:
        raise ValueError(f"{path} has format {made_by}, this code reads {FORMAT}. Update the code")
    rest = dict(meta)
    if rest.pop("sha256", "") != checksum(tensors, rest):
        raise ValueError(f"{path} is damaged: checksum mismatch")
    return tensors, meta


def names_in(folder: Path) -> str:
    """The first names in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return f"found: {', '.join(names[:5]) or 'nothing'}"


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first. Raises OSError where they may not be looked at."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    steps = [name for name in names if re.fullmatch(r"\d{6,}", name)]
    return [folder / name for name in sorted(steps, key=int)]


def load_checkpoint(run: Path, files: tuple[str, ...] = ("ema",), warn: Callable = print,
                    ) -> tuple[Path, list[Tensors], dict[str, str]] | None:
    """The newest checkpoint of `run` whose `files` all verify: (folder, tensors of each file, meta), or None.
    Calls `warn` with one line for each damaged one it passes over; ValueError when all are damaged."""
    folders = checkpoint_folders(run)
    for folder in reversed(folders):
        try:
            loaded = [load_tensors(folder / f"{name}.safetensors") for name in files]
            if len({meta.get("step") for _, meta in loaded}) > 1:
                raise ValueError(f"{folder} has files of different steps")
        except ValueError as e:
            warn(f"{e}; trying the checkpoint before it")
            continue
        return folder, [tensors for tensors, _ in loaded], loaded[0][1]
    if folders:
        raise ValueError(f"all {len(folders)} checkpoints in {run}/checkpoints are damaged. "
                         "Move them away to start anew")
    return None


def read(path: Path, warn: Callable = print) -> tuple[Path, Tensors, dict[str, str]]:
    """Path, averaged weights and meta of a run (its newest checkpoint that verifies), a checkpoint or a file.
    Raises ValueError, one line, where there is none."""
    file = path / "ema.safetensors" if path.is_dir() else path
    if file.exists() or not path.is_dir():
        return path, *load_tensors(file)
    found = load_checkpoint(path, warn=warn)
    if found:
        folder, (tensors,), meta = found
        return folder, tensors, meta
    raise ValueError(f"{path} has no checkpoints/STEP/ema.safetensors ({names_in(path)}). Name a run")


# ----------------------------------------------------------------------------------------- published folders
WEIGHTS = "diffusion_pytorch_model"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of VAEs until 2023
TEXT_FILE = "limn_text.safetensors"                            # a TextAdapter, beside what others read
VAE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
published = partial(reading, hint="Is it of another model, or damaged?")


def read_config(folder: Path, name: str = "config.json") -> dict:
    """The config.json of a published folder. ValueError, one line, where there is none."""
    path = folder / name
    with damaged(path, "Name a folder as diffusers saves it"), published(path):
        config = json.loads(path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
        config.pop("_name_or_path", None)                      # a folder of another machine
    return config


def build(folder: Path, config: dict, *classes: type) -> nn.Module:
    """The network of a config.json on the meta device, without memory. ValueError, one line, for another
    architecture and for values that cannot be."""
    said = config.get("_class_name")
    names = [c.__name__ for c in classes]
    if said not in names:
        raise ValueError(f"{folder} holds {said!r:.60}, not {' or '.join(names)}")
    with published(folder / "config.json"), torch.device("meta"):
        net = classes[names.index(said)](config)
    if isinstance(net, Latents):
        net.to(memory_format=torch.channels_last)
    return net


def weight_files(folder: Path) -> dict[Path, str]:
    """The file with a folder's weights, or its parts, and what their names lack. ValueError without any."""
    for end in ("", "-*-of-*", ".fp16", ".fp16-*-of-*"):
        found = sorted(folder.glob(f"{WEIGHTS}{end}.safetensors"))
        if found:
            return dict.fromkeys(found, "")
    raise ValueError(f"{folder} has no {WEIGHTS}.safetensors ({names_in(folder)}). Convert what it has")


def load_published(net: nn.Module, files: dict[Path, str]) -> None:
    """Give a network on the meta device the weights in some files, whose names there lack a prefix.
    ValueError, one line, for a weight that is missing, unknown, of another shape, or not finite."""
    tensors = {}
    for path, prefix in files.items():
        with damaged(path), safe_open(path, "pt") as f:
            for inside in f.keys():  # noqa: SIM118
                parts = [OLD_NAMES.get(part, part) for part in inside.split(".")]
                tensors[prefix + ".".join(parts)] = tensor = f.get_tensor(inside)     # in the file until used
                known = tensor.is_floating_point() and tensor.itemsize > 1            # not of 8 bits
                if not (known and tensor.isfinite().all()):
                    raise ValueError(f"{path}: {inside!r:.80} is not finite or quantised. Download it again")
    with published(path):
        fill(net, tensors, torch.device("cpu"))


def open_vae(folder: str | Path) -> tuple[Latents, dict[Path, str]]:
    """A published VAE on the meta device, and the files with its weights, as `weight_files`."""
    folder = Path(folder)
    files = {folder / f"{part}.safetensors": f"{part}.layers." for part in ("encoder", "decoder")}
    if all(path.is_file() for path in files):
        config = TAEF2 | {"_class_name": "AutoencoderTiny"}
    else:
        config = read_config(folder)
        files = weight_files(folder)
    return build(folder, config, AutoencoderKL, AutoencoderTiny), files


PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012)}


def open_pipeline(folder: str | Path) -> dict:
    """What the folder of a published pipeline (Stable Diffusion 1.x, 2.x, XL) says of noise, text and VAE, as
    flags by name. ValueError, one line, for what is not known here."""
    folder = Path(folder)
    encoders = sorted(str(path) for path in folder.glob("text_encoder*"))
    wide = len(encoders) > 1
    whole = read_config(folder, "model_index.json")
    if len(encoders) > 2 or (wide and whole.get("force_zeros_for_empty_prompt") is False):
        raise ValueError(f"{folder} has {len(encoders)} text encoders, or two that read empty prompts. Known "
                         "here: Stable Diffusion 1.x, 2.x and XL")
    said = read_config(folder / "scheduler", "scheduler_config.json")
    said = dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02) | said
    start, end = BETAS.get(str(said["beta_schedule"]), (0, 0))
    known = dict(beta_schedule=list(BETAS), beta_start=[start], beta_end=[end], trained_betas=[None],
                 num_train_timesteps=[1000], prediction_type=list(PREDICTIONS))
    for name, values in known.items():                         # the usual one first
        if said.setdefault(name, values[0]) not in values:
            listed = ", ".join(map(str, values))
            raise ValueError(f"{folder}/scheduler: {name} is {said[name]!r:.60}; known here: {listed}")
    return dict(
        schedule=said["beta_schedule"], prediction=PREDICTIONS[said["prediction_type"]], shift_base=0,
        zero_snr=bool(said.get("rescale_betas_zero_snr")), vae=str(folder / "vae"), text_dtype="fp32",
        text_encoder=encoders or [str(folder / "text_encoder")], text_length=77, text_padding=True,
        clip_layer="penultimate" if wide else "last")


def load_vae(folder: str | Path, dtype: str = "fp32") -> Latents:
    """The space of a published VAE, frozen: AutoencoderKL or AutoencoderTiny as diffusers saves it, or TAEF2
    as it is published. dtype: fp32 or bf16 (in fp16 that of SDXL is not finite). Raises ValueError, one
    line."""
    vae, files = open_vae(folder)
    load_published(vae.to(VAE_DTYPES[dtype]), files)
    vae.fingerprint = checksum(vae.state_dict(), {"config": json.dumps(vars(vae.shape))})
    return vae


def find_vae(places: Iterable[str | Path], fingerprint: str, dtype: str = "fp32") -> Latents:
    """The VAE of a fingerprint, in the first of some folders that holds it. ValueError if none does."""
    said = []
    for place in places:
        try:
            vae = load_vae(place, dtype)
        except (ValueError, OSError) as e:
            said.append(str(e))
            continue
        if vae.fingerprint == fingerprint:
            return vae
        said.append(f"{place} holds {vae.fingerprint[:8]}")
    raise ValueError(f"the VAE {fingerprint[:8]} is not there: {said[0]}. Say where its folder is: --vae DIR")


def load_unet(folder: str | Path, text_dim: int = 0, pooled_dim: int = 0) -> UNet2DConditionModel:
    """A published U-Net in float32, to train or to draw with. text_dim, pooled_dim: D and P of a text encoder
    other than its own, 0 = its own; what `save_published` wrote of one is read. ValueError, one line."""
    folder = Path(folder)
    net = build(folder, read_config(folder), UNet2DConditionModel)
    load_published(net, weight_files(folder))
    if text_dim:
        net.adapt(text_dim, pooled_dim)
        beside = folder / TEXT_FILE
        if beside.exists():
            with reading(beside, "Name the text encoder that it was trained with, or move this file away"):
                fill(net.adapter, load_tensors(beside)[0], torch.device("cpu"))
    return net.train().requires_grad_(True)


def rebuild(config: dict, text_dim: int, pooled_dim: int) -> UNet2DConditionModel:
    """The U-Net of what a checkpoint says of it: `config`, with `_adapter` where it reads an encoder of
    widths D and P that is not its own."""
    config = dict(config)
    widths = (text_dim, pooled_dim) if config.pop("_adapter", False) else (0, 0)
    return UNet2DConditionModel(config, *widths)


def save_published(folder: str | Path, net: UNet2DConditionModel | Latents) -> None:
    """Write a folder that diffusers reads, and beside it the adapter to another text encoder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = net.state_dict()
    adapter = {}
    for name in list(tensors):
        if name.startswith("adapter."):
            adapter[name.removeprefix("adapter.")] = tensors.pop(name)
    write_tensors(folder / f"{WEIGHTS}.safetensors", tensors, {"format": "pt"})
    if adapter:
        save_tensors(folder / TEXT_FILE, adapter, {})
    config = net.config | {"_class_name": type(net).__name__}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
