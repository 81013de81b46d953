"""The U-Net that predicts, and the files that hold weights and configurations.

    net = UNet(ModelConfig(), size=64, text_dim=128, pooled_dim=128)
    out = net(x_t, t, context=context, mask=mask, pooled=pooled)

Letters: B batch, C channels of a feature map, H W its height and width, N = H*W positions, K heads,
L text tokens, D text width, P pooled text width, E width of the embedding.
"""
import hashlib
import inspect
import json
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
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


def sides(config: ModelConfig, size: int) -> list[int]:
    """The side of each level's feature maps, for pictures of `size` pixels."""
    first = size // max(1, config.patch)
    return [first // 2**level for level in range(len(config.channel_mult))]


def check_shape(config: ModelConfig, size: int, crop: int = 0, lowres: int = 0) -> None:
    """Raise ValueError, one line with the flag and a value that works, where this U-Net cannot be built."""
    def must(right: bool, message: str) -> None:
        if not right:
            raise ValueError(f"--{message}")

    for name in ("patch", "channel_mult", "num_res_blocks"):
        value = getattr(config, name)
        flag = name.replace("_", "-")
        must(min(np.atleast_1d(value), default=0) > 0, f"{flag} {value} must be at least 1")
    levels = len(config.channel_mult)
    must(np.size(config.num_res_blocks) in (1, levels),
         f"num-res-blocks {config.num_res_blocks} must be one number, or {levels} as --channel-mult")

    step = config.patch * 2 ** (levels - 1)
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
        flag = name.replace("_", "-")
        near = max(32, width // 32 * 32)
        must(width >= 32 and width % 32 == 0, f"{flag} {width} must be a multiple of 32. Try {near}")
    must(config.head_dim >= 8 and config.channels % config.head_dim == 0,
         f"head-dim {config.head_dim} must be 8 or more and divide --channels {config.channels}. Try 32")
    here = sides(config, size)
    for side in config.attn_resolutions:
        must(side in here,
             f"attn-resolutions {side} is not a side of a feature map here. Choose from {here}")


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


class ResBlock(nn.Module):
    """Residual block with scale-shift normalisation and resampling inside.
    Dhariwal and Nichol 2021, arXiv:2105.05233, section 3. resample: "down" halves, "up" doubles the sides
    before the first convolution, on both branches; "late" doubles them after the last."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, local: bool, resample: str = ""):
        super().__init__()
        self.resample = resample
        self.norm1 = GroupNorm(c_in, local)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * c_out)
        self.norm2 = GroupNorm(c_out, local)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def _resampled(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        """x (B, C, H, W); context (B, L+1, E), text and null; hidden (B, L+1), 0 = visible, -inf = not."""
        B, C, H, W = x.shape
        heads = C // self.head_dim
        tokens = self.norm(x).flatten(2).transpose(1, 2)                              # (B, N, C)

        # Keys and values of the text.
        text = self.text_kv(context).view(B, -1, 2, heads, self.head_dim)
        k, v = text.unbind(2)                                                         # (B, L+1, K, head_dim)
        k = self.text_k_norm(k)

        # Queries, and before the text the picture's own keys and values.
        if not self.local:
            tokens = tokens + self.place(places(H, W, x.device).flatten(1).T)
        own = self.qkv(tokens).view(B, H * W, -1, heads, self.head_dim)
        own = own.unbind(2)                                                           # each (B, N, K, ...)
        q = self.q_norm(own[0])
        if not self.local:
            k = torch.cat([self.k_norm(own[1]), k], 1)                                # (B, N+L+1, K, ...)
            v = torch.cat([own[2], v], 1)
            hidden = F.pad(hidden, (H * W, 0))

        bias = hidden[:, None, None].to(v.dtype)                                      # (B, 1, 1, N+L+1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)                   # (B, K, N, head_dim)
        h = self.out(h.transpose(1, 2).reshape(B, H * W, C))
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


def places(height: int, width: int, device: torch.device) -> Tensor:
    """4 x sines and cosines of y and x, (12, H, W): half a period, one and two over the height and the width.
    Coordinates as channels (Liu et al. 2018, arXiv:1807.03247). Times 4, or the noise drowns them: it doubled
    the gap between right and wrong captions."""
    def centres(n: int) -> Tensor:
        return (torch.arange(n, device=device) + 0.5) / n * 2 - 1

    y, x = torch.meshgrid(centres(height), centres(width), indexing="ij")
    plane = torch.stack([y, x])                                                       # (2, H, W)
    angles = torch.cat([plane * math.pi / 2 * k for k in (1, 2, 4)])
    return 4 * torch.cat([angles.sin(), angles.cos()])


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Cosines and sines of 1000 t, t (B,) in [0, 1] -> (B, dim) float32.
    Vaswani et al. 2017, arXiv:1706.03762, section 3.5, with frequencies from 1 down to 1/10000."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = 1000 * t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


def mlp(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_out))


# ---------------------------------------------------------------------------------------------- the U-Net
class UNet(nn.Module):
    """Text-conditioned U-Net: the layout of Dhariwal and Nichol 2021, arXiv:2105.05233, text as extra keys.
    With config.efficient that of the Efficient U-Net (Saharia et al. 2022, arXiv:2205.11487, appendix B and
    figure A.30): sides halve before, double after the convolutions of a level; skips weigh 1/sqrt(2).
    size: side of the pictures [pixels]; text_dim, pooled_dim: D and P; planes: channels of a picture; lowres:
    of the low-resolution one, 0 for none; learn_sigma: predict a variance too, in twice the channels.
    Raises ValueError where the shape cannot be built, naming the flag. Set `checkpointing` to recompute
    activations in the backward pass."""

    def __init__(self, config: ModelConfig, size: int, text_dim: int, pooled_dim: int, planes: int = 3,
                 lowres: int = 0, learn_sigma: bool = False):
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
        self.conv_in = nn.Conv2d(inside, ch, 3, padding=1)

        def stage(c_in: int, c_out: int) -> nn.ModuleList:
            blocks = nn.ModuleList([ResBlock(c_in, c_out, emb, local)])
            if side in config.attn_resolutions:
                blocks.append(Attention(c_out, emb, config.head_dim, local))
            return blocks

        # Down: each stage leaves a skip.
        num_blocks = np.broadcast_to(config.num_res_blocks, len(config.channel_mult)).tolist()
        c, side, skips = ch, size // config.patch, [ch]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, mult in enumerate(config.channel_mult):
            if level:
                side //= 2
                self.down.append(nn.ModuleList([ResBlock(c, c, emb, local, "down")]))
                skips.append(c)
            for _ in range(num_blocks[level]):
                self.down.append(stage(c, mult * ch))
                c = mult * ch
                skips.append(c)

        self.mid = nn.ModuleList([
            ResBlock(c, c, emb, local),
            Attention(c, emb, config.head_dim, local),
            ResBlock(c, c, emb, local)])

        # Up: each stage takes a skip; the last of a level goes to the next level's width, then to its side.
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for _ in range(num_blocks[level] + 1):
                self.up.append(stage(c + skips.pop(), mult * ch))
                c = mult * ch
            if level:
                side *= 2
                above = config.channel_mult[level - 1] * ch
                resample = "late" if config.efficient else "up"
                self.up[-1].append(ResBlock(c, above, emb, local, resample))
                c = above
        self.norm_out = GroupNorm(c, local)
        outside = planes * (1 + learn_sigma) * config.patch**2
        self.conv_out = nn.Conv2d(c, outside, 3, padding=1)
        self.init_weights()

    def init_weights(self) -> None:
        # Layers keep the variance of a unit input.
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                inputs = m.weight[0].numel()
                nn.init.trunc_normal_(m.weight, std=1 / math.sqrt(inputs))
                nn.init.zeros_(m.bias)

        # Blocks start as the identity, the output as 0.
        nn.init.zeros_(self.conv_out.weight)
        for m in self.modules():
            if isinstance(m, ResBlock):
                nn.init.zeros_(m.conv2.weight)
            if isinstance(m, Attention):
                nn.init.zeros_(m.out.weight)

        if not self.null.is_meta:                  # there it would import the compiler, which takes seconds
            nn.init.normal_(self.null, std=0.5)
        self.to(memory_format=torch.channels_last)

    def matrices(self) -> dict[nn.Parameter, int]:
        """The weight matrices of the blocks, and of how many each is made: scale and shift (`emb`), keys
        and values of the text are two."""
        found = {}
        for part in (self.down, self.mid, self.up):
            for name, p in part.named_parameters():
                if p.ndim > 1:
                    found[p] = 2 if name.split(".")[-2] in ("emb", "text_kv") else 1
        return found

    def _run(self, blocks: nn.ModuleList, h: Tensor, emb: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        for block in blocks:
            condition = (context, hidden) if isinstance(block, Attention) else (emb,)
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, *condition, use_reentrant=False)
            else:
                h = block(h, *condition)
        return h

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, mask: Tensor, pooled: Tensor,
                lowres: Tensor | None = None, lowres_t: Tensor | None = None) -> Tensor:
        """Predict the target of the diffusion at each pixel.
        x_t (B, planes, H, W) float32, the noisy picture; t (B,) float32 in [0, 1], 1 = pure noise; context
        (B, L, D); mask (B, L) bool, True = a token; pooled (B, P). A row of the mask without any True is the
        unconditional branch: its tokens and its pooled vector are not seen. Of a super-resolution stage,
        lowres (B, c, h, w) float32, the low-resolution picture, noised, upsampled here to H and W if it is
        smaller; lowres_t (B,) float32 in [0, 1], how noisy it is. Returns (B, planes, H, W) float32, with
        learn_sigma twice the planes."""
        B, patch = x_t.shape[0], self.config.patch

        # The vector of time and text. Without text the vector is that of zero.
        time = self.time(timestep_embedding(t, self.config.emb_dim // 4))
        if lowres is not None:
            time = time + self.lowres_time(timestep_embedding(lowres_t, self.config.emb_dim // 4))
        pooled = torch.where(mask.any(1, keepdim=True), pooled, 0)
        emb = F.silu(time + self.pooled(pooled))                                      # (B, E)

        # The keys: the tokens of the text that are there, and the null.
        context = self.context(context)
        null = self.null.expand(B, -1, -1).to(context.dtype)
        context = torch.cat([context, null], 1)                                       # (B, L+1, E)
        hidden = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
        hidden = F.pad(hidden, (0, 1))                                                # (B, L+1), 0 = visible

        # The picture, in patches, and where each of them is.
        x = x_t
        if lowres is not None:
            if lowres.shape[-2:] != x_t.shape[-2:]:
                lowres = F.interpolate(lowres, x_t.shape[-2:], mode="bicubic")        # (B, c, H, W)
            x = torch.cat([x, lowres], 1)
        h = F.pixel_unshuffle(x, patch)
        if not self.config.conv_only:
            here = places(*h.shape[-2:], h.device)
            h = torch.cat([h, here.expand(B, -1, -1, -1)], 1)
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))             # (B, C, H', W')

        skips = [h]
        for blocks in self.down:
            h = self._run(blocks, h, emb, context, hidden)
            skips.append(h)
        h = self._run(self.mid, h, emb, context, hidden)
        for blocks in self.up:
            skip = skips.pop()
            if self.config.efficient:
                skip = skip * math.sqrt(0.5)
            h = self._run(blocks, torch.cat([h, skip], 1), emb, context, hidden)

        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, patch).float()                                      # (B, out, H, W)


# -------------------------------------------------------------------------------------------- configurations
def helps(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass."""
    return dict(re.findall(r"^    (\w+): [\s\S]*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))


def fits(value: object, kind: object) -> bool:
    """Whether a value is of a declared type: of a Literal, bool | None, list[str], tuple[int, ...], float."""
    members = get_args(kind)
    if get_origin(kind) is Literal:
        return value in members
    if get_origin(kind) in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(one, members[0]) for one in value)
    if members:
        return any(fits(value, member) for member in members)
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


@contextmanager
def reading(path: Path):
    """Turn what a configuration or weights of other code, or crafted ones, raise into one line."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"{path} does not fit this code ({reason}). Use the code that wrote it") from e


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
    def digest(name: str) -> bytes:
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
    """Have a file, or the names in a folder, on disk."""
    if os.name == "nt" and path.is_dir():                      # Windows opens no folders
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save_tensors(path: Path, tensors: Tensors, meta: dict[str, str]) -> None:
    """Write one safetensors file with `meta` and its own checksum, whole or not at all; it is on disk
    afterwards, else OSError."""
    meta = {"format": FORMAT, **meta}
    temp = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, temp, metadata={**meta, "sha256": checksum(tensors, meta)})
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
    os.chmod(temp, 0o666 & ~umask)
    fsync(temp)
    os.replace(temp, path)
    fsync(path.parent)


def load_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read and verify a file of `save_tensors`: (tensors on the CPU, meta).
    Raises ValueError where it is missing, damaged or not ours. Nothing in a file is ever executed."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file. Name a run directory, a checkpoint folder or a file")
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path} is missing. Name a run directory, a checkpoint folder or a file") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged: {str(e).splitlines()[0][:100]}") from e

    made_by = meta.get("format", "")
    if not made_by.startswith("limn "):
        first = next(iter(tensors), "none")
        raise ValueError(f"{path} is not a checkpoint of limn (first tensor: {first}). Name a file of runs/")
    if made_by != FORMAT:
        raise ValueError(f"{path} has format {made_by}, this code reads {FORMAT}. Update the code")
    rest = {name: value for name, value in meta.items() if name != "sha256"}
    if meta.get("sha256") != checksum(tensors, rest):
        raise ValueError(f"{path} is damaged: checksum mismatch")
    return tensors, meta


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
        meta = loaded[0][1]
        return folder, [tensors for tensors, _ in loaded], meta
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
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise ValueError(f"{path} has no checkpoints/STEP/ema.safetensors (found: {inside}). Name a run")
