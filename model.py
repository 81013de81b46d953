"""The U-Net that predicts, its presets, and the files that hold its weights.

    net = UNet(PRESETS[64, "tiny"], size=64, text_dim=128, pooled_dim=128)
    out = net(x_t, t, context=context, mask=mask, pooled=pooled)

Letters: B batch, C channels of a feature map, H W its height and width, N = H*W positions, K heads,
L text tokens, D text width, P pooled text width, E width of the embedding.
"""
import copy
import ctypes
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
import textwrap
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class ModelConfig:
    channels: int = 32  # width of the first level, a multiple of 32 [channels]
    channel_mult: tuple[int, ...] = (1, 2, 4)  # width of each level, one number a level [times --channels]
    num_res_blocks: tuple[int, ...] = (1,)  # residual blocks of each level, or one number for all of them
    attn_resolutions: tuple[int, ...] = ()  # sides of the feature maps that have attention [pixels]
    head_dim: int = 32  # width of one attention head [channels]
    patch: int = 2  # side of the squares that are folded into channels at the border [pixels]
    emb_dim: int = 512  # width of the embedding of time and text [channels]
    efficient: bool = False  # sides double after the convolutions of a level: Imagen's Efficient U-Net
    conv_only: bool = False  # no place, norms of one position, attention to text alone: to train on crops


PIXEL, DETAIL = 0.3, 0.0025  # variance of pictures in [-1, 1], and of what is lost in a quarter of their size
# Stage (base, up to 256 pixels, above), --model. Of the U-Net alone, for one whole picture of 64, 256 or 1024
# pixels, of 64 or 256 below it, with 128 text tokens of width 128; a test counts them again.
PRESETS = {stage: ModelConfig(*row) for stage, row in {
    #                channels, levels, blocks, attention, head, patch, emb, eff., conv only weights, FLOPs
    (64, "tiny"):    (128, (1, 1),       (1,),         (8,),        64, 4, 256),             #   5.2 M  1.26 G
    (64, "small"):   (128, (1, 2, 2, 3), (2,),         (16, 8),     64, 1, 512),             #  62.8 M    50 G
    (64, "base"):    (192, (1, 2, 3, 4), (3,),         (32, 16, 8), 64, 1, 768),             #   306 M   202 G
    (64, "large"):   (384, (1, 2, 3, 4), (3,),         (32, 16, 8), 64, 1, 1536),            #  1221 M   779 G
    (256, "tiny"):   (32,  (1, 2, 4),    (1,),         (),          32, 2, 256, True, True), #   3.3 M  9.54 G
    (256, "small"):  (64,  (1, 2, 4, 8), (2, 4, 4, 4), (16,),       64, 2, 256, True),       #   104 M   119 G
    (256, "base"):   (128, (1, 2, 4, 8), (2, 4, 8, 8), (16,),       64, 2, 512, True),       #   718 M   694 G
    (256, "large"):  (192, (1, 2, 4, 8), (2, 4, 8, 8), (16,),       64, 2, 768, True),       #  1616 M  1555 G
    (1024, "tiny"):  (32,  (1, 2, 4),    (1,),         (),          32, 4, 256, True, True), #   3.3 M  42.2 G
    (1024, "small"): (64,  (1, 2, 4, 8), (2, 4, 4, 4), (),          64, 2, 256, True, True), #  92.0 M  1774 G
    (1024, "base"):  (128, (1, 2, 4, 8), (2, 4, 8, 8), (),          64, 2, 512, True, True), #   627 M 10300 G
    (1024, "large"): (192, (1, 2, 4, 8), (2, 4, 8, 8), (),          64, 2, 768, True, True), #  1410 M 23157 G
}.items()}
sides = lambda config, size: [size // max(1, config.patch) // 2**i for i in range(len(config.channel_mult))]


# ----------------------------------------------------------------------------------------------- the U-Net
class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu and He 2018, arXiv:1803.08494) in groups of 16 channels or more, float32 inside.
    local: over the channels of one position instead, so that a crop and its whole picture are alike."""
    local = False

    def __init__(self, channels: int):
        super().__init__(min(32, max(1, channels // 16)), channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.local: return super().forward(x)
        x = F.layer_norm(x.permute(0, 2, 3, 1), (self.num_channels,), self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) in the type of its input, summed in float32."""
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), 1e-6)


class ResBlock(nn.Module):
    """Residual block with scale-shift normalisation and resampling inside.
    Dhariwal and Nichol 2021, arXiv:2105.05233, section 3. resample: "down" halves, "up" doubles the sides
    before the first convolution, on both branches; "late" doubles them after the last. It takes `text` as
    Attention does, and does not use it."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, resample: str = ""):
        super().__init__()
        self.resample = resample
        self.norm1, self.conv1 = GroupNorm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * c_out)
        self.norm2, self.conv2 = GroupNorm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down": return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        h = self.conv1(self._resampled(F.silu(self.norm1(x))))                        # (B, c_out, H', W')
        scale, shift = self.emb(emb)[:, :, None, None].to(h.dtype).chunk(2, 1)        # (B, c_out, 1, 1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        h = self.skip(self._resampled(x)) + self.conv2(F.silu(h))
        return F.interpolate(h, scale_factor=2.0, mode="nearest") if self.resample == "late" else h


class Attention(nn.Module):
    """Self- and cross-attention in one call: keys of the picture, the text and the null token side by side.
    The text joins the keys as in Saharia et al. 2022, arXiv:2205.11487, section 2.3. Queries and keys are
    RMS-normalised per head with a learned gain (Dehghani et al. 2023, arXiv:2302.05442), which bounds the
    logits in bfloat16. local: no keys of the picture, and no places."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, local: bool = False):
        super().__init__()
        self.head_dim, self.norm = head_dim, GroupNorm(channels)
        self.qkv = nn.Linear(channels, channels if local else 3 * channels)
        self.text_kv = nn.Linear(context_dim, 2 * channels)
        self.q_norm, self.text_k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.k_norm, self.place = (None, None) if local else (RMSNorm(head_dim), nn.Linear(12, channels))
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, emb: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        context, hidden = text                                                        # (B, L+1, E), (B, L+1)
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)                # (B, N, C)
        k, v = self.text_kv(context).view(B, context.shape[1], 2, -1, self.head_dim).unbind(2)
        k = self.text_k_norm(k)                                                       # (B, L+1, K, head_dim)
        if self.place: tokens = tokens + self.place(places(H, W, x.device).flatten(1).T)
        q, *own = self.qkv(tokens).view(B, H * W, -1, C // self.head_dim, self.head_dim).unbind(2)
        if own:
            k, v = torch.cat([self.k_norm(own[0]), k], 1), torch.cat([own[1], v], 1)  # (B, N+L+1, K, ...)
            hidden = F.pad(hidden, (H * W, 0))
        q, k, v = (a.transpose(1, 2) for a in (self.q_norm(q), k, v))
        bias = hidden[:, None, None].to(v.dtype)                                      # (B, 1, 1, N+L+1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)                   # (B, K, N, head_dim)
        h = self.out(h.transpose(1, 2).reshape(B, H * W, C))
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Text-conditioned U-Net: the layout of Dhariwal and Nichol 2021, arXiv:2105.05233, text as extra keys.
    With config.efficient that of the Efficient U-Net (Saharia et al. 2022, arXiv:2205.11487, appendix B and
    figure A.30): sides halve before, double after the convolutions of a level; skips weigh 1/sqrt(2).
    size: side of the pictures [pixels]; text_dim, pooled_dim: D and P; planes: channels of a picture; lowres:
    of the low-resolution one, 0 for none; learn_sigma: predict a variance too, in twice the channels.
    Raises ValueError where the shape cannot be built, naming the flag. Set `checkpointing` to recompute
    activations in the backward pass; where there is lowres set `levels`, schedules of x_t and of lowres."""

    def __init__(self, config: ModelConfig, size: int, text_dim: int, pooled_dim: int, planes: int = 3,
                 lowres: int = 0, learn_sigma: bool = False):
        super().__init__()
        check_shape(config, size)
        self.config, self.checkpointing, self.levels = config, False, ()
        ch, emb, local = config.channels, config.emb_dim, config.conv_only
        self.time = nn.Sequential(nn.Linear(emb // 4, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.pooled = nn.Sequential(
            nn.LayerNorm(pooled_dim), nn.Linear(pooled_dim, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.context = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, emb))
        self.null = nn.Parameter(torch.zeros(1, 1, emb))                 # the key that is always visible
        if lowres:
            self.lowres_time = nn.Sequential(nn.Linear(emb // 4, emb), nn.SiLU(), nn.Linear(emb, emb))
        inside = (planes + lowres) * config.patch**2 + (0 if local else 12)           # 12: where it is
        self.conv_in = nn.Conv2d(inside, ch, 3, padding=1)

        def stage(c_in: int, c_out: int) -> nn.ModuleList:
            attends = side in config.attn_resolutions
            attention = [Attention(c_out, emb, config.head_dim, local)] if attends else []
            return nn.ModuleList([ResBlock(c_in, c_out, emb), *attention])

        blocks = np.broadcast_to(config.num_res_blocks, len(config.channel_mult)).tolist()
        c, side, skips = ch, size // config.patch, [ch]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, mult in enumerate(config.channel_mult):
            if level:
                side //= 2
                self.down.append(nn.ModuleList([ResBlock(c, c, emb, "down")]))
                skips.append(c)
            for _ in range(blocks[level]):
                self.down.append(stage(c, mult * ch))
                c = mult * ch
                skips.append(c)
        self.mid = nn.ModuleList([
            ResBlock(c, c, emb), Attention(c, emb, config.head_dim, local), ResBlock(c, c, emb)])
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for _ in range(blocks[level] + 1):
                self.up.append(stage(c + skips.pop(), mult * ch))
                c = mult * ch
            if level:                                          # to the next level's width, then its side
                side *= 2
                above = config.channel_mult[level - 1] * ch
                self.up[-1].append(ResBlock(c, above, emb, "late" if config.efficient else "up"))
                c = above
        self.norm_out = GroupNorm(c)
        self.conv_out = nn.Conv2d(c, planes * (1 + learn_sigma) * config.patch**2, 3, padding=1)
        self.init_weights()

    def init_weights(self) -> None:
        for m in self.modules():
            if isinstance(m, GroupNorm): m.local = self.config.conv_only
            if isinstance(m, nn.Conv2d | nn.Linear):           # keeps the variance of a unit input
                nn.init.trunc_normal_(m.weight, std=1 / math.sqrt(m.weight[0].numel()))
                nn.init.zeros_(m.bias)
        last = {ResBlock: "conv2", Attention: "out", UNet: "conv_out"}
        for m in self.modules():                               # blocks start as the identity, the output as 0
            if type(m) in last: nn.init.zeros_(getattr(m, last[type(m)]).weight)
        nn.init.normal_(self.null, std=0.5)
        self.to(memory_format=torch.channels_last)

    def _run(self, blocks: nn.ModuleList, h: Tensor, emb: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        for block in blocks:
            recompute = self.checkpointing and torch.is_grad_enabled()
            h = checkpoint(block, h, emb, text, use_reentrant=False) if recompute else block(h, emb, text)
        return h

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, mask: Tensor, pooled: Tensor,
                lowres: Tensor | None = None, lowres_t: Tensor | None = None) -> Tensor:
        """Predict the target of the diffusion at each pixel.
        x_t (B, planes, H, W) float32, the noisy picture; t (B,) float32 in [0, 1], 1 = pure noise; context
        (B, L, D); mask (B, L) bool, True = a token; pooled (B, P). A row of the mask without any True is the
        unconditional branch: its tokens and its pooled vector are not seen. Of a super-resolution stage,
        lowres (B, c, h, w) float32, the low-resolution picture, noised, at its own size (upsampled here);
        lowres_t (B,) float32 in [0, 1], how noisy it is. Returns (B, planes, H, W) float32, with learn_sigma
        twice the planes."""
        patch, B = self.config.patch, x_t.shape[0]
        pooled = torch.where(mask.any(1, keepdim=True), pooled, 0)                    # only the biases speak
        time = self.time(timestep_embedding(t, self.config.emb_dim // 4))
        if lowres is not None:
            time = time + self.lowres_time(timestep_embedding(lowres_t, self.config.emb_dim // 4))
        emb = F.silu(time + self.pooled(pooled))                                      # (B, E)
        context = self.context(context)
        context = torch.cat([context, self.null.expand(B, -1, -1).to(context.dtype)], 1)  # (B, L+1, E)
        hidden = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
        text = context, F.pad(hidden, (0, 1))                                         # (B, L+1), 0 = visible

        x = x_t
        if lowres is not None:
            lowres = F.interpolate(lowres, x_t.shape[-2:], mode="bicubic")            # (B, c, H, W)
            level, noise = (s.alpha_sigma(u) for s, u in zip(self.levels, (t, lowres_t)))
            x, known, gain = around(x_t, lowres, level, noise)
            x = torch.cat([x, lowres], 1)
        h = F.pixel_unshuffle(x, patch)
        if not self.config.conv_only:
            h = torch.cat([h, places(*h.shape[-2:], h.device).expand(B, -1, -1, -1)], 1)
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))             # (B, C, H', W')
        skips = [h]
        for blocks in self.down:
            h = self._run(blocks, h, emb, text)
            skips.append(h)
        h = self._run(self.mid, h, emb, text)
        for blocks in self.up:
            skip = skips.pop() * math.sqrt(0.5) if self.config.efficient else skips.pop()
            h = self._run(blocks, torch.cat([h, skip], 1), emb, text)
        h = self.conv_out(F.silu(self.norm_out(h)))
        out = F.pixel_shuffle(h, patch).float()                                       # (B, out, H, W)
        if lowres is None: return out
        return torch.cat([known + gain * out[:, :x_t.shape[1]], out[:, x_t.shape[1]:]], 1)


def around(x_t: Tensor, lowres: Tensor, level: tuple[Tensor, Tensor], noise: tuple[Tensor, Tensor]) -> tuple:
    """(input of unit variance, known, gain) where an upsampled picture is known: v = known + gain * output.
    As Karras et al. 2022, arXiv:2206.00364, section 5, for x0 normal around lowres instead of 0. An output of
    0 is the best linear guess: lowres at t = 1. level, noise: (alpha, sigma) (B,) of x_t and of lowres."""
    (alpha, sigma), (a, s) = ([c[:, None, None, None] for c in pair] for pair in (level, noise))
    plain = lowres if x_t.shape[1] >= lowres.shape[1] else lowres.mean(1, keepdim=True)
    guess, left = (c / (a**2 * PIXEL + s**2) for c in (a * PIXEL * plain, PIXEL * s**2))  # without its noise
    left, total = left + DETAIL, alpha**2 * (left + DETAIL) + sigma**2
    known = sigma * (alpha * (1 - left) * x_t - guess) / total
    return (x_t - alpha * guess) / total.sqrt(), known, (left / total).sqrt()


def places(height: int, width: int, device: torch.device) -> Tensor:
    """4 x sines and cosines of y and x, (12, H, W): half a period, one and two over the height and the width.
    Coordinates as channels (Liu et al. 2018, arXiv:1807.03247). 4, to be above the noise: the gap doubled."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in (height, width))
    plane = torch.stack(torch.meshgrid(y, x, indexing="ij"))                          # (2, H, W)
    angles = torch.cat([plane * math.pi / 2 * k for k in (1, 2, 4)])
    return 4 * torch.cat([angles.sin(), angles.cos()])


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Cosines and sines of 1000 t, t (B,) in [0, 1] -> (B, dim) float32.
    Vaswani et al. 2017, arXiv:1706.03762, section 3.5, with frequencies from 1 down to 1/10000."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = 1000 * t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


def check_shape(config: ModelConfig, size: int, crop: int = 0, lowres: int = 0) -> None:
    """Raise ValueError, one line with the flag and a value that works, where this U-Net cannot be built."""
    def must(right: bool, message: str) -> None:
        if not right: raise ValueError(f"--{message}")
    for name in ("patch", "channel_mult", "num_res_blocks"):
        value = getattr(config, name)
        must(min(np.atleast_1d(value), default=0) > 0, f"{name.replace('_', '-')} {value} must be at least 1")
    levels, ratio = len(config.channel_mult), max(1, size // (lowres or size))
    must(np.size(config.num_res_blocks) in (1, levels),
         f"num-res-blocks {config.num_res_blocks} must be one number, or {levels} as --channel-mult")
    step = config.patch * 2 ** (levels - 1)
    for flag, side in (("size", size), ("crop", crop or size)):
        near = max(step, side // step * step)
        must(side >= step and side % step == 0,
             f"{flag} {side} must be a multiple of {step} for this model. Try {near} or {near + step}")
    must(not lowres or (lowres < size and size % lowres == 0),
         f"size {size} is not a multiple of --lowres {lowres}. Try --lowres {size // 4}")
    must(not crop or config.conv_only, f"crop {crop} is for a network that sees no whole picture. Add "
         "--conv-only")
    must(crop <= size and crop % ratio == 0,
         f"crop {crop} is not a multiple of {ratio} up to {size}. Try {size // 4}")
    for name in ("channels", "emb_dim"):
        width = getattr(config, name)
        must(width >= 32 and width % 32 == 0, f"{name.replace('_', '-')} {width} must be a multiple of 32. "
             f"Try {max(32, width // 32 * 32)}")
    must(config.head_dim >= 8 and config.channels % config.head_dim == 0,
         f"head-dim {config.head_dim} must be 8 or more and divide --channels {config.channels}. Try 32")
    for n in config.attn_resolutions:
        must(n in (here := sides(config, size)),
             f"attn-resolutions {n} is not a side of a feature map here. Choose from {here}")


def count_flops(model: nn.Module, *args, **kwargs) -> int:
    """Floating-point operations (multiply and add are two) of the matrix products of one forward pass, with
    attention taken apart: the counter does not know its fused CPU kernel."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops()


def choose_device(name: str) -> torch.device:
    """The only place that knows devices: cuda, else mps, else cpu, or `name`. ValueError where it is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name or next(k for k, found in there.items() if found)
    if not there.get(kind):
        raise ValueError(f"--device {name} is not here. Choose from {[k for k in there if there[k]]}")
    if kind == "cpu" and sys.platform == "linux":              # malloc keeps what is freed: 7% faster
        for limit in ((-3, 2**25), (-1, 2**31 - 1)): ctypes.CDLL(None).mallopt(*limit)
    if kind != "cuda": return torch.device(kind)
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if (ranks := int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))) > count:         # on every rank alike
        raise ValueError(f"{ranks} ranks do not have a GPU each. Use --nproc-per-node {count}")
    return torch.device(kind, local)


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type != "cpu": getattr(torch, device.type).synchronize()
    return time.perf_counter()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """What a large square matrix product reaches here and now, the best of some [operations/second]."""
    n, best = 8192 if device.type == "cuda" else 1024, math.inf
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    for _ in range(8):
        start = clock(device)
        a @ b
        best = min(best, clock(device) - start)
    return 2 * n**3 / best


def memory_peak(device: torch.device) -> int:
    """The most memory that was in use up to now, of the GPU or else of this process [bytes]."""
    if device.type == "cuda": return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compiled(net: nn.Module, device: torch.device, wanted: bool | None, warn: Callable) -> nn.Module:
    """torch.compile(net), where that is wanted (on CUDA it is) and works, which is tried on one number."""
    if wanted is False or (wanted is None and device.type != "cuda"): return net
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(1, device=device))
    except Exception as e:                                     # of whatever compiler is or is not there
        reason = f"{type(e).__name__}: {str(e).splitlines()[0][:80]}"
        warn(f"warning: torch.compile is unavailable ({reason}); running uncompiled")
        return net
    return torch.compile(net)


def agreed(value: float, world: int) -> float:
    """The largest value of all ranks. On the CPU, so that no GPU is waited for."""
    tensor = torch.tensor([value], dtype=torch.float64)
    if world > 1: dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def equal(value: float, world: int) -> bool:
    """Whether a number is finite, and the same on all ranks."""
    return agreed(value, world) == -agreed(-value, world) < math.inf


def leave() -> None:
    """End one of several ranks as the error in flight would, but at once: gloo's destructor waits for threads
    that may wait for the interpreter's lock, which it holds (torch 2.13; such a run never ended)."""
    error = sys.exc_info()[1]
    if error and not isinstance(error, SystemExit): traceback.print_exc()
    os._exit(getattr(error, "code", 1) if error else 0)


def side_by_side(*views: Tensor, lowres: Tensor | None = None, **_) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] in a row behind low-resolution ones, uint8; grey is repeated."""
    if lowres is not None: views = F.interpolate(lowres, views[0].shape[-2:]), *views
    row = torch.cat([view.expand(-1, max(v.shape[1] for v in views), -1, -1) for view in views], 3)
    return ((row.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def put(path: Path, content: dict | Image.Image, warn: Callable) -> None:
    """Append a line to a log, or write a picture. Training can do without: a full disk is a warning."""
    try:
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, Image.Image): return content.save(path)
        with open(path, "a", encoding="utf-8") as f: f.write(json.dumps(content) + "\n")
    except OSError as e:
        warn(f"warning: {path} not written ({e.strerror}); training continues")


def save_png(image: Image.Image, path: Path, notes: dict, warn: Callable) -> Path:
    """Write a picture with its notes inside, whole or not at all; to the temporary folder if `path` fails.
    As NAME, NAME-2, NAME-3, ..., the first that does not exist: nothing is overwritten."""
    info, spare = PngImagePlugin.PngInfo(), Path(tempfile.gettempdir(), path.name)
    info.add_itxt("limn", json.dumps(notes))
    for wanted in (path, spare):
        names = (wanted.with_stem(wanted.stem + f"-{n}" * (n > 1)) for n in range(1, sys.maxsize))
        target = next(name for name in names if not name.exists())
        part = target.with_name(f".{target.stem}.{os.getpid()}.part")
        try:
            image.save(part, "PNG", pnginfo=info)
            return part.replace(target)
        except OSError as e:
            if wanted == spare: raise
            warn(f"cannot write {path} ({e.strerror or e}); writing {spare} instead")
        finally:
            part.unlink(missing_ok=True)


def contact_sheet(pictures, captions: list[str], columns: int = 4) -> Image.Image:
    """One picture of many, uint8 (N, 3 or 1, H, W), each with its caption wrapped below it."""
    n, _, height, width = pictures.shape
    scale = max(1, 128 // height)                               # small pictures are shown larger
    columns, gap, text = min(columns, n), 8, ImageFont.load_default(11)
    lines = [textwrap.wrap(c, max(8, width * scale // 6))[:3] or ["(no caption)"] for c in captions]
    wide, high = width * scale + gap, height * scale + gap + 14 * max(map(len, lines))
    sheet = Image.new("RGB", (gap + columns * wide, gap + -(-n // columns) * high), "white")
    for i, tile in enumerate(np.broadcast_to(pictures, (n, 3, height, width)).transpose(0, 2, 3, 1)):
        at = gap + i % columns * wide, gap + i // columns * high
        sheet.paste(Image.fromarray(np.repeat(np.repeat(tile, scale, 0), scale, 1)), at)
        below = at[0], at[1] + height * scale + 1
        ImageDraw.Draw(sheet).text(below, "\n".join(lines[i]), "black", text, spacing=1)
    return sheet


# --------------------------------------------------------------------------------------------- checkpoints
FORMAT = "limn 1"
# What a checkpoint was written with: a run goes on with other versions, but not bit for bit.
VERSIONS = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
PROFILES = 0.05, 0.1  # the widths of the averages that snapshots hold (Karras et al. 2023, section 3.2)
# Three passes of x -> a x + b (x x^T) x + c (x x^T)^2 x bring singular values near 1: from 0.2 to 2.
PASSES = (8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518)
PARTS = {"emb": 2, "text_kv": 2}  # matrices of their own, so half the work: scale and shift, keys and values


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T of x (n, rows, columns), in bfloat16: Newton-Schulz, coefficients of
    Amsel et al. 2025, arXiv:2505.16932, algorithm 1, on x x^T (Zhang et al. 2026, Gram Newton-Schulz)."""
    if x.shape[1] > x.shape[2]: return orthogonal(x.mT).mT
    wide = (x := x.bfloat16()) / (1.01 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram, turn = wide @ wide.mT, torch.eye(wide.shape[1], device=x.device).to(wide).expand(len(x), -1, -1)
    for i, (a, b, c) in enumerate(PASSES):
        square = turn @ gram @ turn if i else gram             # from the start, so errors do not add up
        turn = torch.baddbmm(turn, torch.baddbmm(square, square, square, beta=b, alpha=c), turn, beta=a)
    return turn @ wide


def _apart(stacked: Tensor, group: list[Tensor]) -> list[Tensor]:
    """Views of a stack of matrices (n, rows, columns) in the shapes of the weights it is made of."""
    parts = stacked.flatten().split([p.numel() for p in group])
    return [part.view(len(p), *p.shape[2:], p.shape[1]).movedim(-1, 1) for part, p in zip(parts, group)]


class State:
    """What a checkpoint holds: trained weights, the average to sample from, the optimizer's moments.
    AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) decays matrices only. muon: the matrices inside the
    U-Net move by Muon instead (Jordan et al. 2024), as far as AdamW would move them (Liu et al. 2025,
    arXiv:2502.16982, eq. 4). clip: largest norm of the gradient, 0 = any. fp16: scale the loss. snapshots:
    how many are kept of the averages of PROFILES, from which `reconstruct` makes one of any width; 0 = none,
    which saves twice the weights. train_only: a pattern of names, the others never move; ValueError where
    there is none."""

    def __init__(self, net: nn.Module, weight_decay: float, clip: float, ema_decay: float, fp16: bool,
                 snapshots: int = 0, train_only: str = "", muon: bool = False):
        self.net, self.clip, self.snapshots = net, clip or math.inf, snapshots
        self.ema = copy.deepcopy(net).requires_grad_(False).eval()
        self.weights, self.frozen, self.matrices, matrices = list(net.parameters()), [], [], {}
        for name, p in net.named_parameters():
            if not re.search(train_only, name):
                self.frozen.append(p)
            elif muon and p.ndim > 1 and re.match(r"unet\.(down|mid|up)\.", name):
                rows = len(p) // PARTS.get(name.split(".")[-2], 1)
                matrices.setdefault((rows, p[0].numel()), []).append(p)
        if len(self.frozen) == len(self.weights):
            raise ValueError(f"--train-only {train_only} is no weight, as {next(iter(net.state_dict()))} is")
        self.updates = torch.zeros((), device=self.weights[0].device)         # without skipped ones
        self.profiles = {w: [p.detach().clone() for p in self.weights] for w in PROFILES if snapshots}
        self.averages = [(0.0, ema_decay, list(self.ema.parameters())),       # exponent, cap of the decay
                         *((exponent(width), 1.0, average) for width, average in self.profiles.items())]
        groups = [{"params": [p for p in self.weights if p.ndim > 1], "weight_decay": weight_decay},
                  {"params": [p for p in self.weights if p.ndim < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
        for shape, group in matrices.items():
            momentum = torch.cat([p.detach().flatten() for p in group]).view(-1, *shape).zero_()
            self.matrices.append((group, momentum))
            for p, own in zip(group, _apart(momentum, group)):
                self.optimizer.state[p]["momentum"] = own
        self.scaler = torch.amp.GradScaler(self.weights[0].device.type, enabled=fp16)

    @torch.no_grad()
    def update(self, lr: float) -> tuple[Tensor, Tensor]:
        """One step of the weights, and of the averages; neither moves where the gradient is not finite.
        The decay of an average at the n-th update is (1 - 1/n)^(exponent + 1), which makes it a power
        function of time (Karras et al. 2023, arXiv:2312.02696, section 3.1), but at most its cap: exponent 0
        is the plain average up to n = 1 / (1 - ema_decay), then the exponential one. Returns the gradient's
        norm before clipping, and 1.0 for an update that was skipped: nothing here waits for the device."""
        for p in self.frozen: p.grad = None
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.weights, self.clip)              # equal on all ranks
        bad = (~norm.isfinite()).float()
        if not self.scaler.is_enabled():                       # fused AdamW skips by what scalers use
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        for group in self.optimizer.param_groups: group["lr"] = lr
        for group, momentum in self.matrices: self._turn(group, momentum, lr * (1 - bad))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.updates += 1 - bad
        for power, cap, average in self.averages:
            weight = -torch.expm1((power + 1) * torch.log1p(-1 / self.updates.clamp(min=1)))  # 1 - decay
            weight = (1 - bad) * weight.clamp(min=1 - cap)
            torch._foreach_lerp_(average, self.weights, [weight] * len(average))
        return norm, bad

    def _turn(self, group: list[Tensor], momentum: Tensor, lr: Tensor) -> None:
        """Muon, of momentum (n, rows, columns); lr () 0: nothing moves. AdamW then finds no gradient here."""
        grads = torch.cat([p.grad.movedim(1, -1).flatten() for p in group]).view_as(momentum)
        momentum.lerp_(grads.nan_to_num_(0, 0, 0), 0.05 * (lr > 0))
        size = 0.2 * math.sqrt(max(grads.shape[1:])) * lr
        steps = (orthogonal(grads.lerp_(momentum, 0.95)) * size).float()      # Nesterov's
        torch._foreach_mul_(group, 1 - lr * self.optimizer.param_groups[0]["weight_decay"])
        torch._foreach_sub_(group, _apart(steps, group))
        for p in group: p.grad = None

    def size(self) -> float:
        """The sum of the norms of weights and averages: equal on all ranks, inf where one is not finite."""
        norms = torch._foreach_norm(sum((average for *_, average in self.averages), self.weights))
        total = float(sum(norm.detach().cpu().double() for norm in norms))
        return total if math.isfinite(total) else math.inf

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The two files of a checkpoint, {"ema", "train"}, under plain names."""
        train = {"updates": self.updates, **{f"weights.{k}": v for k, v in self.net.state_dict().items()}}
        for name, p in self.net.named_parameters():
            parts = self.optimizer.state.get(p, {})
            train |= {f"optimizer.{name}.{part}": value for part, value in parts.items()}
        return {"ema": self.ema.state_dict(), "train": train | self.snapshot()}

    def snapshot(self) -> dict[str, Tensor]:
        """The profiles under names "profile.WIDTH.NAME"."""
        return {f"profile.{width}.{name}": value for width, values in self.profiles.items()
                for (name, _), value in zip(self.net.named_parameters(), values)}

    def save(self, run: Path, step: int, meta: dict[str, str], keep: int) -> Path:
        """Write a snapshot of the profiles, of which the most even `snapshots` stay, then a checkpoint."""
        meta = {**meta, "step": str(step), "scaler": json.dumps(self.scaler.state_dict())}
        if self.profiles:
            save_snapshot(run / "profiles", step, self.snapshot(), int(self.updates), self.snapshots)
        return save_checkpoint(run, step, self.tensors(), meta, keep)

    def load(self, ema: dict[str, Tensor], train: dict[str, Tensor], scaler: dict) -> None:
        """The inverse of `tensors`, bit for bit, and the scaler's state. ValueError where they do not fit."""
        try:
            self.ema.load_state_dict(ema)
            self.net.load_state_dict({k[8:]: v for k, v in train.items() if k.startswith("weights.")})
        except RuntimeError as e:
            raise ValueError(f"the checkpoint does not fit these flags: {str(e)[:200]}") from e
        train.setdefault("updates", next((v for k, v in train.items() if k.endswith(".step")), self.updates))
        for name, value in [*self.snapshot().items(), ("updates", self.updates)]:
            value.copy_(train[name])
        named = dict(self.net.named_parameters())
        for key in [key for key in train if key.startswith("optimizer.")]:
            name, part = key[10:].rsplit(".", 1)               # moments in the memory layout of weights
            like = self.updates if part == "step" else named[name]
            self.optimizer.state[named[name]].setdefault(part, torch.empty_like(like)).copy_(train[key])
        if scaler and self.scaler.is_enabled(): self.scaler.load_state_dict(scaler)


@torch.no_grad()
def warm_start(net: nn.Module, tensors: dict[str, Tensor], reinit: str = "") -> str:
    """Copy weights by name, of those that changed size the common part; `reinit`: names to leave, a pattern.
    Returns a report: how many were copied, which were sliced, which are new, which had no place."""
    found = {"copied": [], "sliced": [], "new": []}
    for name, p in net.state_dict().items():
        old = tensors.get(name)
        if old is None or old.ndim != p.ndim or (reinit and re.search(reinit, name)):
            found["new"].append(name)
            continue
        part = tuple(slice(min(sides)) for sides in zip(old.shape, p.shape))
        p[part] = old[part].to(p)                              # a state_dict holds the weights themselves
        found["copied" if old.shape == p.shape else "sliced"].append(name)
    found["unused"] = sorted(tensors.keys() - net.state_dict().keys())
    names = {kind: " ".join(["", *(found[kind] if kind != "copied" else [])][:9]) for kind in found}
    return ", ".join(f"{len(found[kind])} {kind}{':' * bool(names[kind])}{names[kind]}" for kind in found)


def lock(run: Path) -> None:
    """Hold `run`/.lock until the process ends; remove what a killed save left. ValueError if it is in use."""
    run.mkdir(parents=True, exist_ok=True)
    fd = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o666)                # closed when the process ends
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)         # not inherited by data workers, as flock is
    except (BlockingIOError, PermissionError):                 # POSIX allows either
        owner = os.read(fd, 200).decode(errors="replace") or "another run"
        raise ValueError(f"{run} is in use by {owner}. Use another --out") from None
    os.truncate(fd, 0)
    os.write(fd, f"pid {os.getpid()} on {socket.gethostname()}".encode())
    for left in (run / "checkpoints").glob(".tmp-*"): shutil.rmtree(left)


def checksum(tensors: dict[str, Tensor], meta: dict[str, str]) -> str:
    """SHA-256 of the metadata and of each tensor's name, type, shape and bytes, in the order of names."""
    def one(name: str) -> bytes:
        t = tensors[name].detach().cpu().contiguous()
        h = hashlib.sha256(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(memoryview(t.reshape(-1).view(torch.uint8).numpy()))  # without the GIL: threads help
        return h.digest()

    with ThreadPoolExecutor() as pool: parts = list(pool.map(one, sorted(tensors)))
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode() + b"".join(parts)).hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try: os.fsync(fd)
    finally: os.close(fd)


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    """Write one safetensors file with `meta` and its own checksum, whole or not at all; it is on disk
    afterwards, else OSError."""
    meta, temp = {"format": FORMAT, **meta}, path.with_name(f".tmp-{os.getpid()}-{path.name}")
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(tensors, temp, metadata={**meta, "sha256": checksum(tensors, meta)})
    except SafetensorError as e:                               # a full disk, say
        temp.unlink(missing_ok=True)
        code = re.search(r"os error (\d+)", str(e))
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else OSError(str(e)) from e
    os.umask(umask := os.umask(0))
    os.chmod(temp, 0o666 & ~umask)                             # safetensors creates it 0600
    _fsync(temp)
    os.replace(temp, path)
    _fsync(path.parent)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read and verify a file of `save_tensors`: (tensors on the CPU, meta).
    Raises ValueError where it is missing, damaged or not ours. Nothing in a file is ever executed."""
    try:
        with safe_open(path, "pt") as f:
            meta, tensors = f.metadata() or {}, dict(zip(f.keys(), map(f.get_tensor, f.keys())))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing. Name a run directory, a checkpoint folder or a file") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged: {str(e).splitlines()[0][:100]}") from e
    if not (made := meta.get("format", "")).startswith("limn "):
        raise ValueError(f"{path} is not a checkpoint of limn (first tensor: {next(iter(tensors), 'none')}). "
                         "Name a file of runs/")
    if made != FORMAT:
        raise ValueError(f"{path} has format {made}, this code reads {FORMAT}. Update the code")
    if meta.get("sha256") != checksum(tensors, {k: v for k, v in meta.items() if k != "sha256"}):
        raise ValueError(f"{path} is damaged: checksum mismatch")
    return tensors, meta


class Cache:
    """What an encoder makes of texts, looked up: cache[text] -> its tensors, in bfloat16, as many as it has.
    A folder of safetensors files, which are mapped, or the content of one. The hash of a text and its encoder
    (fingerprint: which weights, which settings) names the tensors, and in the metadata their shapes and
    checksum. Raises ValueError for a file that is torn or of another encoder, and for a text that is not
    there: none gets another one's tensors."""

    def __init__(self, name: Path | str, fingerprint: str, content: bytes | None = None):
        self.name, self.fingerprint, self.found = name, fingerprint, {}      # hash -> function to read, mark
        self.fix = "Delete it or use another --text-cache" if content is None else "Write the shards again"
        for source in sorted(name.glob("*.safetensors")) if content is None else filter(None, [content]):
            self.open(source)

    def open(self, source: Path | bytes) -> None:
        try:
            if isinstance(source, bytes):
                marks = json.loads(source[8:8 + int.from_bytes(source[:8], "little")])["__metadata__"]
                read = load(source).__getitem__
            else:
                file = safe_open(source, "pt")
                marks, read = file.metadata(), file.get_tensor
            made_by = marks.pop("fingerprint")
        except Exception as e:                                 # safetensors raises nearly anything
            name = self.name if isinstance(source, bytes) else source
            raise ValueError(f"{name} is damaged: {' '.join(str(e).split())[:200]}. {self.fix}") from None
        if self.fingerprint not in made_by:
            raise ValueError(f"{self.name} was made with {made_by}, not {self.fingerprint}. {self.fix}")
        self.found |= {key: (read, mark) for key, mark in marks.items()}

    def key(self, text: str) -> str:
        return hashlib.blake2b(f"{self.fingerprint} {text}".encode(), digest_size=16).hexdigest()

    def mark(self, entry: tuple[Tensor, ...]) -> str:
        """The shapes of a text's tensors, and the checksum of their bytes."""
        content = torch.cat([x.flatten() for x in entry]).view(torch.int16).numpy()
        return " ".join([*("x".join(map(str, x.shape)) for x in entry), str(zlib.crc32(content))])

    def pack(self, entries: dict[str, tuple[Tensor, ...]], tensors: dict, meta: dict) -> None:
        """Add what texts have become to the tensors and the metadata of a file."""
        meta["fingerprint"] = f"{meta.get('fingerprint', '')} {self.fingerprint}".strip()
        for text, entry in entries.items():
            meta[self.key(text)] = self.mark(entry)
            tensors |= {f"{self.key(text)}.{i}": x.clone() for i, x in enumerate(entry)}

    def fill(self, texts: Iterable[str], encode: Callable[[list[str]], Iterable[tuple]], part: int = 8192):
        """Write what is missing, `part` texts to a file, and yield how many. encode(texts) yields (index,
        *tensors) in any order; what it leaves out stays missing. A file appears whole or not at all, named by
        its texts: a stopped run goes on where it was, two at once write the same."""
        missing = {key: text for text in texts if (key := self.key(text)) not in self.found}
        order = [missing[key] for key in sorted(missing)]
        for start in range(0, len(order), part):
            encoded = encode(order[start:start + part])
            self.pack({order[start + i]: entry for i, *entry in encoded}, tensors := {}, meta := {})
            if tensors:
                self.name.mkdir(parents=True, exist_ok=True)
                path = self.name / f"{self.key(' '.join(sorted(meta)))}.safetensors"
                save_tensors(path, tensors, meta)
                self.open(path)
            yield len(meta) - 1

    def __getitem__(self, text: str) -> tuple[Tensor, ...]:
        key = self.key(text)
        if key not in self.found:
            fix = self.fix.replace("Delete it", "Start again")
            raise ValueError(f"{self.name} has no embedding of {text[:80]!r}. {fix}")
        read, mark = self.found[key]
        try:
            entry = tuple(read(f"{key}.{i}") for i in range(mark.count(" ")))
            if self.mark(entry) != mark: raise ValueError("it does not match its checksum")
        except Exception as e:
            raise ValueError(f"{self.name} is damaged at {text[:80]!r}: {e}. {self.fix}") from None
        return entry


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    found = [p for p in (run / "checkpoints").glob("*") if re.fullmatch(r"\d{6,}", p.name)]
    return sorted(found, key=lambda p: int(p.name))


def save_checkpoint(run: Path, step: int, files: dict[str, dict], meta: dict[str, str], keep: int) -> Path:
    """Publish `run`/checkpoints/STEP with a file of tensors for each of `files`, all at once or not at all.
    Temporary folder, fsync of the files and the folder, rename, fsync of the parent; only then are older
    checkpoints pruned to the last `keep`. An OSError before that leaves everything as it was."""
    parent, target = run / "checkpoints", run / "checkpoints" / f"{step:06d}"
    temp = parent / f".tmp-{step:06d}"
    parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temp, ignore_errors=True)
    try:
        temp.mkdir()
        for name, tensors in files.items(): save_tensors(temp / f"{name}.safetensors", tensors, meta)
        if target.exists():                                    # of this step, and damaged: keep it aside
            os.replace(target, parent / f"{target.name}.damaged-{os.getpid()}")
        os.replace(temp, target)
        _fsync(parent)
    except OSError:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    for old in [p for p in checkpoint_folders(run) if int(p.name) <= step][:-keep]:
        os.replace(old, parent / f".tmp-{old.name}")           # never half a checkpoint under its name
        shutil.rmtree(parent / f".tmp-{old.name}", ignore_errors=True)        # lock() clears what stays
    return target


def load_checkpoint(run: Path, files: tuple[str, ...] = ("ema",),
                    warn=print) -> tuple[Path, list[dict[str, Tensor]], dict[str, str]] | None:
    """The newest checkpoint of `run` whose `files` all verify: (folder, tensors of each file, meta), or None.
    Calls `warn` with one line for each damaged one it passes over; ValueError when all are damaged."""
    folders = checkpoint_folders(run)
    for folder in reversed(folders):
        try:
            loaded = [load_tensors(folder / f"{name}.safetensors") for name in files]
            return folder, [tensors for tensors, _ in loaded], loaded[0][1]
        except ValueError as e:
            warn(f"{e}; trying the checkpoint before it")
    if folders:
        raise ValueError(f"all {len(folders)} checkpoints in {run}/checkpoints are damaged. "
                         "Move them away to start anew")
    return None


def read(path: Path, warn=print) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """Path, weights and meta of a run (its newest checkpoint that verifies), a checkpoint or a file."""
    file = path / "ema.safetensors" if path.is_dir() else path
    if file.exists() or not path.is_dir(): return path, *load_tensors(file)
    if found := load_checkpoint(path, warn=warn): return found[0], found[1][0], found[2]
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise ValueError(f"{path} has no checkpoints/STEP/ema.safetensors (found: {inside}). Name a run")


def cascade(root: Path, lowres: bool, stop_at: int) -> list[Path]:
    """The newest base run under `root`, the newest that enlarges its pictures, and so on up to `stop_at`
    pixels, 0 = as far as it goes; lowres: without a base, from the smallest pictures that are enlarged."""
    runs, ways = [p.parent for p in root.glob("*/checkpoints") if checkpoint_folders(p.parent)], {}
    for run in sorted(runs, key=lambda run: checkpoint_folders(run)[-1].stat().st_mtime):
        try:
            recipe = json.loads((run / "config.json").read_text("utf-8"))
            ways[recipe["DataConfig"].get("lowres", 0)] = run, recipe["TrainConfig"]["size"] # the newest wins
        except (OSError, ValueError, KeyError) as e:
            raise ValueError(f"{run}/config.json is damaged ({e}). Train on, or name runs by --ckpt") from e
    path, at = [], min((below for below in ways if bool(below) == lowres), default=-1)
    while at in ways and (at != stop_at or not path):
        run, at = ways[at]
        path.append(run)
    if not path:
        raise ValueError(f"no checkpoint in {root}/{' that enlarges pictures' * lowres}. Train one first: "
                         f"python train.py --size {256 if lowres else 64}")
    if stop_at not in (0, at):
        raise ValueError(f"--stop-at {stop_at}: the stages in {root}/ end at {at}")
    return path


# ------------------------------------------------------------------------- averages, chosen after training
def exponent(width: float) -> float:
    """The exponent gamma of the power function whose standard deviation is `width` of its length.
    Karras et al. 2023, arXiv:2312.02696, eq. 123: width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    ValueError outside of 0.01 to 0.28; at 0.289 the average is the plain one, gamma = 0."""
    if not 0.01 <= width <= 0.28:
        raise ValueError(f"width {width} of an average is outside 0.01 to 0.28. 0.05 to 0.20 is usual")
    a = width**-2
    return float(np.roots([1, 7, 16 - a, 12 - a]).real.max())


def save_snapshot(folder: Path, step: int, tensors: dict[str, Tensor], updates: int, most: int) -> None:
    """Write `folder`/STEP.safetensors, whole or not at all; of all of them the newest and most even stay."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / f"{step:06d}.safetensors", tensors, {"updates": str(updates)})
    steps = [0, *sorted(int(path.stem) for path in folder.glob("*.safetensors") if int(path.stem) <= step)]
    while len(steps) > most + 1:
        crowded = min(range(1, len(steps) - 1), key=lambda i: steps[i + 1] - steps[i - 1])
        (folder / f"{steps.pop(crowded):06d}.safetensors").unlink()


def reconstruct(folder: Path, step: int, width: float, warn=print) -> dict[str, Tensor]:
    """The weights of `step` averaged with another width, from the snapshots in `folder`, by their names.
    The combination of snapshots whose weights of all updates come nearest to the wanted ones, by least
    squares (Karras et al. 2023, arXiv:2312.02696, section 3.2); with sums where they integrate, and shares
    that sum to 1, so that weights that stand still stay what they are. ValueError without a snapshot of that
    step; calls `warn` where the snapshots are too few."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if int(path.stem) <= step]
    if not found or int(found[-1].stem) != step:
        raise ValueError(f"{folder} has no snapshot of step {step}. Train with --profiles 8")
    counts = []
    for path in found:
        with safe_open(path, "pt") as f: counts.append(int(f.metadata()["updates"]))
    edges = np.linspace(0, counts[-1], min(counts[-1], 10000) + 1)
    weigh = lambda n, width: np.diff(np.minimum(edges / n, 1) ** (exponent(width) + 1))      # of n updates
    columns, wanted = np.stack([weigh(n, p) for n in counts for p in PROFILES], 1), weigh(counts[-1], width)
    last = columns[:, -1:]                                     # shares sum to 1: fit what is not the last
    shares = np.linalg.lstsq(columns[:, :-1] - last, wanted - last[:, 0])[0]
    shares = np.append(shares, 1 - shares.sum())
    miss = np.linalg.norm(columns @ shares - wanted) / np.linalg.norm(wanted)
    if miss > 0.2:
        warn(f"{len(found)} snapshots give the average of width {width} with an error of {miss:.0%}")
    total: dict[str, Tensor] = {}
    for path, row in zip(found, shares.reshape(len(found), -1).tolist()):
        tensors, _ = load_tensors(path)
        for start, share in zip((f"profile.{profile}." for profile in PROFILES), row):
            for name in (name.removeprefix(start) for name in tensors if name.startswith(start)):
                total[name] = total.get(name, 0) + share * tensors[start + name]
    return total
