"""Train one stage: `torchrun train.py --size 64`, or `python train.py --size 64` on one device.

Pictures seen so far are the only state beside the weights: every random choice is a function of (seed, position), so the same
command run again continues exactly where the last checkpoint stands.
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import fcntl
import inspect
import json
import math
import os
import platform
import re
import resource
import signal
import socket
import sys
import time
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import diffusion
import model
import text_encoder


@dataclass
class TrainConfig:
    size: int = 64                # side of the pictures [pixels]
    model: Literal["tiny", "small", "base", "large"] = "tiny"  # row of model presets; small where there is a GPU
    out: str = ""                 # run directory, runs/SIZE when not given; the same command continues it
    steps: int = 5000             # updates of the whole run [steps]
    batch_size: int = 32          # pictures of one update, all ranks together [images]
    micro_batch: int = 0          # pictures of one forward pass on one rank, 0 = no accumulation [images]
    lr: float = 1e-3              # learning rate between warm-up and cooldown
    warmup: int = 100             # the rate rises linearly over the first so many steps [steps]
    cooldown: int = 1000          # and falls linearly to 0 over the last so many [steps]
    weight_decay: float = 0.01    # AdamW's decay of weight matrices; biases and gains have none
    clip: float = 1.0             # largest norm of the gradient, 0 = no clipping
    ema_decay: float = 0.999      # decay of the averaged weights, once 1 / (1 - decay) updates have been averaged plainly
    uncond_prob: float = 0.1      # captions that are dropped, for guidance [0..1]
    seed: int = 0                 # of every random choice
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the matrix products; weights, norms and loss are float32
    compile: bool | None = None   # torch.compile; on for CUDA when not given
    checkpointing: bool = False   # recompute activations in the backward pass: less memory, a third more work
    device: str = ""              # cuda, mps or cpu; the first of them there is when not given
    workers: int = -1             # processes that load pictures, per rank; -1 = none on a CPU, up to 8 beside a GPU
    log_every: int = 50           # a line in metrics.jsonl, 0 = never [steps]
    sample_every: int = 500       # a grid of samples, and one at the end, 0 = never [steps]
    val_every: int = 500          # validation, and once at the end, 0 = never [steps]
    val_images: int = 256         # pictures of the fixed validation set [images]
    save_every: int = 500         # a checkpoint, 0 = only at the end [steps]
    keep: int = 2                 # checkpoints kept
    timeout: float = 600          # how long to wait for another rank or a data worker [seconds]
    dry_run: bool = False         # measure memory, speed and time of this configuration, then leave


# What --model moves beside the shape of the network.                                    Chosen for: tiny ten minutes on two CPU cores
PRESETS = {
    "tiny":  {"steps": 5000,   "batch_size": 32,  "lr": 1e-3, "warmup": 100,  "cooldown": 1000,  "ema_decay": 0.998},
    "small": {"steps": 50000,  "batch_size": 256, "lr": 3e-4, "warmup": 1000, "cooldown": 5000,  "ema_decay": 0.999},
    "base":  {"steps": 200000, "batch_size": 512, "lr": 1e-4, "warmup": 1000, "cooldown": 20000, "ema_decay": 0.9999},
    "large": {"steps": 500000, "batch_size": 1024, "lr": 1e-4, "warmup": 5000, "cooldown": 50000, "ema_decay": 0.9999},
}
MACHINE = {"out", "micro_batch", "compile", "checkpointing", "device", "workers", "log_every", "sample_every", "val_every",
           "val_images", "save_every", "keep", "timeout", "dry_run", "max_bad"}           # free to change between starts
SHAPE = {"size", "model", "ModelConfig", "TextConfig", "schedule", "prediction"}          # must equal the checkpoint's
BUCKETS = 8
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Configs = tuple[TrainConfig, data.DataConfig, model.ModelConfig, diffusion.DiffusionConfig, text_encoder.TextConfig]


# ------------------------------------------------------------------------------------------------- flags and errors


def say(message: str) -> None:
    """One line on standard output, from rank 0; a closed pipe is no reason to stop training."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(BrokenPipeError):
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()


def die(message: object, status: int = 2) -> typing.NoReturn:
    """What ends the run, in one line on standard error, from rank 0; exit status 2 is the user's mistake, 1 a failure."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


def describe(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass: its help."""
    return dict(re.findall(r"^    (\w+): [\s\S]*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))


def parse(argv: list[str]) -> Configs:
    """The dataclasses of the leaves and TrainConfig from the command line: a field is a flag, its comment the help.

    --model, and the device that stands for it when it is not given, first move the defaults to their row of the presets.
    """
    classes = typing.get_args(Configs)
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags = {}
    for cls in classes:
        group, hints, helps = parser.add_argument_group(cls.__name__), typing.get_type_hints(cls), describe(cls)
        for f in dataclasses.fields(cls):
            kind = hints[f.name]
            members = [a for a in typing.get_args(kind) if a is not type(None)]
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            options = {"default": default, "help": helps[f.name].replace("%", "%%")}
            if bool in (kind, *members):
                options["action"] = argparse.BooleanOptionalAction
            elif typing.get_origin(kind) is Literal:
                options["choices"] = members
            elif typing.get_origin(kind) in (list, tuple):
                options |= {"nargs": "*", "type": members[0]}
            else:
                options["type"] = kind
            group.add_argument(f"--{f.name.replace('_', '-')}", **options)
            flags[f.name] = options.get("choices")

    def wrong(message: str) -> typing.NoReturn:
        if unknown := re.search(r"unrecognized arguments: (\S+)", message):
            near = difflib.get_close_matches(unknown[1], parser._option_string_actions, 1)
            message = f"unknown flag {unknown[1]}. " + (f"Did you mean {near[0]}?" if near else "See --help")
        die(message)

    parser.error = wrong
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("model", "device"):
        early.add_argument(f"--{name}", default="")
    early.error = wrong
    known, _ = early.parse_known_args(argv)
    row = known.model if known.model in PRESETS else ("small" if choose_device(known.device).type == "cuda" else "tiny")
    parser.set_defaults(**{**vars(model.PRESETS[row]), **PRESETS[row], "model": row})
    values = vars(parser.parse_args(argv))
    configs = tuple(cls(**{f.name: tuple(v) if isinstance(f.default, tuple) else v for f in dataclasses.fields(cls)
                           for v in [values[f.name]]}) for cls in classes)
    check(*configs)
    return configs


def choose_device(name: str) -> torch.device:
    """The only place that knows devices: cuda, else mps, else cpu, or the one that is named if it is there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name or next(k for k, found in there.items() if found)
    if not there.get(kind):
        raise ValueError(f"--device {name} is not here. Choose from {', '.join(k for k, found in there.items() if found)}")
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)


def check(cfg: TrainConfig, *leaves) -> None:
    """Raise ValueError for what is wrong before any work is done: one line with the value, the limit and a fix."""
    for config in (cfg, *leaves):
        for name, value in vars(config).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name.replace('_', '-')} {value} is not a finite number")
    at_least = {"size": 8, "steps": 1, "batch_size": 1, "micro_batch": 0, "warmup": 0, "cooldown": 0, "weight_decay": 0, "clip": 0,
                "log_every": 0, "sample_every": 0, "val_every": 0, "val_images": 2, "save_every": 0, "keep": 1, "workers": -1,
                "seed": 0, "timeout": 1}
    for name, least in at_least.items():
        if getattr(cfg, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is below its least value {least}")
    if not 0 < cfg.lr <= 1:
        raise ValueError(f"--lr {cfg.lr} must be above 0 and at most 1. Try 1e-4")
    if not 0 <= cfg.ema_decay < 1 or not 0 <= cfg.uncond_prob <= 1:
        raise ValueError(f"--ema-decay {cfg.ema_decay} and --uncond-prob {cfg.uncond_prob} must lie in [0, 1)")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    unit = world * (cfg.micro_batch or 1)
    if cfg.batch_size % unit:
        near = max(1, cfg.batch_size // unit) * unit
        raise ValueError(f"--batch-size {cfg.batch_size} does not divide over {world} ranks x micro-batch {cfg.micro_batch or 1}. "
                         f"Try {near} or {near + unit}")
    if Path(cfg.out or ".").exists() and not Path(cfg.out or ".").is_dir():
        raise ValueError(f"--out {cfg.out} is a file. Name a directory")
    model.check_shape(leaves[1], cfg.size)
    diffusion.make_schedule(leaves[2], cfg.size)


def differences(stored: dict, configs: Configs) -> None:
    """Compare a checkpoint's configuration with the command line's: shape must match, recipe may change and is noted."""
    for config in configs:
        for name, value in dataclasses.asdict(config).items():
            name_of_class, flag = type(config).__name__, f"--{name.replace('_', '-')}"
            old = stored.get(name_of_class, {}).get(name, value)
            if name in MACHINE or json.dumps(old) == json.dumps(value):
                continue
            if name in SHAPE or name_of_class in SHAPE:
                raise ValueError(f"checkpoint has {flag} {old}, command line says {value}. Drop the flag or use another --out")
            say(f"note: {flag} {old} -> {value} (checkpoint -> command line)")


# ---------------------------------------------------------------------------------------------------- parts of a run


class Net(nn.Module):
    """What is trained, as one module for DDP and torch.compile: the U-Net, what trains along with it, and the loss."""

    def __init__(self, unet: model.UNet, text: nn.Module, schedule: diffusion.Schedule, config: diffusion.DiffusionConfig):
        super().__init__()
        self.unet, self.schedule, self.config = unet, schedule, config
        if text.trainable:
            self.text_encoder = text
        self.uncertainty = diffusion.Uncertainty() if config.loss_weight == "learned" else None
        self.importance = diffusion.Importance() if config.t_density == "importance" else None

    def forward(self, x0: Tensor, eps: Tensor, t: Tensor, **condition) -> tuple[Tensor, Tensor]:
        """Losses (weighted (B,), raw (B,)) of pictures x0 noised by eps at t, see diffusion.losses."""
        return diffusion.losses(self.unet, x0, eps, t, self.schedule, self.config, self.uncertainty, **self.encode(**condition))

    def encode(self, ids: Tensor | None = None, **condition) -> dict[str, Tensor]:
        """The condition of the U-Net, from token ids where the text encoder trains along."""
        if ids is None:
            return condition
        return dict(zip(("context", "mask", "pooled"), self.text_encoder(ids, condition["mask"])))


def rate(step: int, cfg: TrainConfig) -> float:
    """The learning rate of a step: linear warm-up, constant, linear cooldown to 0."""
    return cfg.lr * max(0.0, min(1.0, (step + 1) / (cfg.warmup + 1), (cfg.steps - step) / (cfg.cooldown + 1)))


@torch.no_grad()
def average(ema: list[Tensor], weights: list[Tensor], weight: Tensor) -> None:
    """ema += weight (weights - ema), in a few kernels for all tensors."""
    delta = torch._foreach_sub(weights, ema)
    torch._foreach_mul_(delta, weight)
    torch._foreach_add_(ema, delta)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """What a large square matrix product reaches here and now, the best of some [operations/second]."""
    n = 8192 if device.type == "cuda" else 1024
    a, b, best = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype), math.inf
    for _ in range(8):
        start = clock(device)
        for _ in range(4):
            a @ b
        best = min(best, (clock(device) - start) / 4)
    return 2 * n**3 / best


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, found out on one number rather than at the first step."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(1, device=device))
    except Exception as e:
        say(f"warning: torch.compile is unavailable ({type(e).__name__}: {str(e).splitlines()[0][:80]}); running uncompiled")
        return False
    return True


def lock(out: Path):
    """Hold `out`/.lock until the process ends. ValueError when another run holds it."""
    out.mkdir(parents=True, exist_ok=True)
    handle = open(out / ".lock", "a+", encoding="utf-8")                                 # closed by the end of the process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        raise ValueError(f"{out} is in use by {handle.read().strip() or 'another run'}. Use another --out") from None
    handle.truncate(0)
    handle.write(f"pid {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle


def draws(seed: int, positions: Iterable[int], cfg: TrainConfig, purpose: str = "noise") -> tuple[Tensor, Tensor, Tensor]:
    """For each position its own (uniform for t (B,) float32, caption kept (B,) bool, key of the noise (B,) int64)."""
    rows = [(g.random(), g.random() >= cfg.uncond_prob, int(g.integers(2**63)))
            for g in (data.keyed(seed, purpose, p) for p in positions)]
    u, kept, keys = zip(*rows)
    return torch.tensor(u), torch.tensor(kept), torch.tensor(keys)


def scaled(pictures: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) on the CPU -> float32 in [-1, 1] on the device."""
    return pictures.to(device, non_blocking=True).float() / 127.5 - 1


@torch.no_grad()
def condition_of(text: nn.Module, captions: list[str], kept: Tensor | bool, device: torch.device) -> dict[str, Tensor]:
    """The condition of a batch: token ids for an encoder that trains along, its frozen outputs otherwise; dropped rows have no token."""
    ids, mask = text.tokenize(captions)
    ids, mask = ids.to(device, non_blocking=True), (mask & torch.as_tensor(kept).view(-1, 1)).to(device, non_blocking=True)
    return {"ids": ids, "mask": mask} if text.trainable else dict(zip(("context", "mask", "pooled"), text(ids, mask)))


# --------------------------------------------------------------------------------------------- what a user looks at


@torch.no_grad()
def validate(net: Net, text: nn.Module, fixed: data.Pictures, cfg: TrainConfig, device: torch.device, rank: int, world: int) -> dict:
    """Loss of the averaged weights on fixed pictures, times and noise, by noise bucket; and what the right caption is worth.

    Ranks share the pictures. gap = loss with the next picture's caption - loss with the right one; above 0 the text is used.
    """
    n, batch = min(cfg.val_images, len(fixed)), 32
    sums = torch.zeros(2 * BUCKETS + 1, dtype=torch.float64, device=device)
    for start in range(rank * batch, n, world * batch):
        positions = range(start, min(start + batch, n))
        items = [fixed[p] for p in positions]
        right, wrong = [i["caption"] for i in items], [fixed[(p + 1) % n]["caption"] for p in positions]
        x0 = scaled(torch.from_numpy(np.stack([i["picture"] for i in items])), device)
        eps = diffusion.gaussian(draws(0, positions, cfg, "validation")[2], x0.shape[1:], device)
        t = torch.tensor([(p * 0.6180339887 + 0.5) % 1 for p in positions], device=device)      # golden ratio: even for any n
        loss, other = (net(x0, eps, t, **condition_of(text, captions, True, device))[1] for captions in (right, wrong))
        sums += torch.cat([*diffusion.loss_buckets(loss, net.schedule.logsnr(t), BUCKETS), (other - loss).sum()[None]])
    if world > 1:
        dist.all_reduce(sums)
    total, count, gap = sums.cpu().split([BUCKETS, BUCKETS, 1])
    return {"val_loss": number(total.sum() / n), "val_gap": number(gap / n), "val_buckets": [number(x) for x in total / count.clamp(min=1)]}


@torch.no_grad()
def sample_grid(net: Net, text: nn.Module, prompts: list[str], cfg: TrainConfig, device: torch.device) -> Tensor:
    """Pictures of fixed prompts with fixed noise, uint8 (N, 3, H, W)."""
    condition = net.encode(**condition_of(text, prompts, True, device))
    denoise = diffusion.threshold(diffusion.guided(net.unet, net.schedule, net.config, condition, 3.0))
    keys, shape = draws(0, range(len(prompts)), cfg, "samples")[2], (3, cfg.size, cfg.size)
    return pictures(diffusion.dpmpp_2m(denoise, diffusion.gaussian(keys, shape, device), diffusion.time_grid(20),
                                       diffusion.noise_source(keys, shape, device), net.schedule))


def pictures(x: Tensor) -> Tensor:
    """float in [-1, 1] (B, 3, H, W) -> uint8 on the CPU, clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def first_batch(path: Path, x0: Tensor, x_t: Tensor, t: Tensor, captions: list[str], kept: Tensor) -> None:
    """Exactly what the network sees: each picture, beside it its noisy version, below them t and the caption or that it is dropped."""
    pairs = torch.cat([x0, x_t], 3)[:16]
    notes = [f"t {time:.2f}: {caption if keep else '(dropped)'}" for time, caption, keep in zip(t.tolist(), captions, kept.tolist())]
    data.contact_sheet(pictures(pairs), notes[:16]).save(path)


def log_line(tally: Tensor, step: int, images: int, seconds: float, replaced: int, lr: float) -> dict:
    """What metrics.jsonl says of the steps since the last line; losses are means over pictures, `buckets` from clean to noise."""
    sums, counts, (loss, norm, clipped, skipped, steps) = tally.double().cpu().split([BUCKETS, BUCKETS, 5])
    line = {"loss": loss / counts.sum(), "raw_loss": sums.sum() / counts.sum(), "grad_norm": norm / steps, "clipped": clipped / steps,
            "pictures/s": counts.sum() / seconds, "lr": lr}
    return {"step": step, "images": images, **{k: number(v) for k, v in line.items()}, "skipped": int(skipped),
            "replaced": replaced, "buckets": [number(x) for x in sums / counts.clamp(min=1)]}


def number(x: Tensor | float) -> float:
    """Six digits are enough for a log."""
    return float(f"{float(x):.6g}")


def write(path: Path, text: str) -> None:
    """Replace a text file in one rename."""
    path.with_suffix(".tmp").write_text(text + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def report(cfg: TrainConfig, parameters: int, flops: float, speed: float, peak: float, device: torch.device) -> None:
    """What the configuration costs here, from real steps, and how long the whole run would take."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    used = 3 * flops * speed                                                             # backward costs twice the forward
    say(f"parameters           {parameters / 1e6:.1f} M\n"
        f"forward              {flops / 1e9:.3f} GFLOPs a picture\n"
        f"memory               {memory / 2**30:.2f} GiB at its peak, on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device}\n"
        f"speed                {speed:.1f} pictures/s\n"
        f"used                 {used / 1e9:.0f} GFLOP/s, {used / peak:.0%} of the {peak / 1e9:.0f} that a {cfg.dtype} matrix product reaches\n"
        f"time                 {cfg.steps * cfg.batch_size / speed / 3600:.2f} hours for {cfg.steps} steps of {cfg.batch_size} pictures")


# ------------------------------------------------------------------------------------------------------- saved state


def pack(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments under plain names."""
    tensors = {f"weights.{name}": p for name, p in net.state_dict().items()}
    for name, p in net.named_parameters():
        tensors |= {f"optimizer.{name}.{part}": value for part, value in optimizer.state.get(p, {}).items()}
    return tensors


def unpack(tensors: dict[str, Tensor], net: Net, optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `pack`, bit for bit; moments take the memory layout of their weights."""
    net.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    for name, p in net.named_parameters():
        parts = {part: tensors.get(f"optimizer.{name}.{part}") for part in ("step", "exp_avg", "exp_avg_sq")}
        if parts["step"] is not None:
            optimizer.state[p] = {part: value.to(p.device) if part == "step" else torch.empty_like(p).copy_(value)
                                  for part, value in parts.items()}


def agreed(flag: float, world: int, op=dist.ReduceOp.MAX) -> float:
    """The same value on all ranks: the largest, or what `op` says. On the CPU, so that no GPU is waited for."""
    value = torch.tensor([float(flag)], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(value, op)
    return float(value)


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


# ---------------------------------------------------------------------------------------------------------- the loop


def main(argv: list[str]) -> None:
    configs = cfg, data_cfg, model_cfg, diff_cfg, text_cfg = parse(argv)

    # Who and where: ranks, device, run directory, signals.
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device, out = choose_device(cfg.device), Path(cfg.out or f"runs/{cfg.size}")
    held = lock(out) if rank == 0 and not cfg.dry_run else None
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: stop.append(got))
    if world > 1:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)                                   # no orphans when torchrun is killed
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=cfg.timeout))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif not cfg.device:
        say(f"note: no GPU found, using {device.type} and --model {cfg.model}")

    # What is trained, on what, and the averaged copy that samples are drawn from.
    torch.manual_seed(cfg.seed)
    train_set, val_set = (data.Pictures(data_cfg, cfg.size, cfg.seed, split) for split in ("train", "val"))
    for warning in train_set.warnings:
        say(f"warning: {warning}")
    text = text_encoder.load_text_encoder(text_cfg).to(device)
    unet = model.UNet(model_cfg, cfg.size, text.dim, text.pooled_dim, out_channels=6 if diff_cfg.learn_sigma else 3)
    net = Net(unet, text, diffusion.make_schedule(diff_cfg, cfg.size), diff_cfg).to(device)
    net.unet.checkpointing = cfg.checkpointing
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    weights, averages = list(net.parameters()), list(ema.parameters())
    groups = [{"params": [p for p in weights if p.ndim > 1], "weight_decay": cfg.weight_decay},
              {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.99), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    parameters = sum(p.numel() for p in weights)

    # Where it stands: the newest checkpoint that verifies, else step 0.
    first = images = 0
    if not cfg.dry_run and (found := model.load_checkpoint(out, ("train", "ema"), lambda line: say(f"warning: {line}"))):
        folder, (state, averaged), meta = found
        differences(json.loads(meta["config"]), configs)
        unpack(state, net, optimizer)
        ema.load_state_dict(averaged)
        scaler.load_state_dict(json.loads(meta["scaler"]))
        first, images = int(meta["step"]), int(meta["images"])
        if meta["data"] != train_set.fingerprint:
            say("warning: the pictures are not those of the checkpoint: their order differs from here")
        say(f"resumed from step {first} ({folder})")
    if agreed(first, world) != agreed(first, world, dist.ReduceOp.MIN):
        raise ValueError(f"rank {rank} sees step {first} in {out}, another rank another one. Put --out on a disk that all share")
    if first >= cfg.steps:
        return say(f"note: step {first} of {cfg.steps} reached; nothing to do. Raise --steps to go on")
    say(f"{train_set.summary}\n{cfg.model}: {parameters / 1e6:.1f} M parameters, {cfg.steps} steps of {cfg.batch_size} pictures to {out}")

    # How it runs: data workers, compiled or not, ranks side by side.
    per_rank = cfg.batch_size // world
    micro = cfg.micro_batch or per_rank
    workers = cfg.workers if cfg.workers >= 0 else min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    batches = data.loader(train_set, images, images + (cfg.steps - first) * cfg.batch_size, cfg.batch_size, rank, world,
                          workers, cfg.timeout, pin=device.type == "cuda")
    autocast = torch.autocast(device.type, DTYPES[cfg.dtype], enabled=cfg.dtype != "fp32")
    with autocast:
        one = torch.zeros(1, 3, cfg.size, cfg.size, device=device)
        flops = model.count_flops(net, one, one, one[:, 0, 0, 0], **condition_of(text, ["a"], True, device))
    peak = matmul_peak(device, DTYPES[cfg.dtype])
    parallel = DistributedDataParallel(net, [device] if device.type == "cuda" else None, broadcast_buffers=False) if world > 1 else net
    compiled = (device.type == "cuda" if cfg.compile is None else cfg.compile) and can_compile(device)
    run = torch.compile(parallel) if compiled else parallel
    recipe = json.dumps({type(c).__name__: dataclasses.asdict(c) for c in configs})
    writes = rank == 0 and not cfg.dry_run
    if writes:
        write(out / "config.json", json.dumps({**json.loads(recipe), "versions": versions()}, indent=1))
    fixed = [val_set[p]["caption"] for p in range(16)]
    tally = torch.zeros(2 * BUCKETS + 5, device=device)       # bucket sums and counts, loss, norm, clipped, skipped, steps
    in_a_row = torch.zeros((), device=device)                 # updates that were not finite, up to now
    squares = torch.zeros(2, 100, device=device)              # sums and counts for --t-density importance
    replaced, paused, since, saved = 0, 0.0, clock(device), first
    bar = tqdm(total=cfg.steps, initial=first, unit="step", disable=rank > 0 or not sys.stderr.isatty())

    try:
        for step in range(first, cfg.steps + 1):
            leaving = agreed(bool(stop), world) > 0
            last = leaving or step == cfg.steps

            def due(every: int) -> bool:
                return every > 0 and step > first and (step % every == 0 or step == cfg.steps)

            # Log: the only place where the host waits for the device.
            if step > first and (due(cfg.log_every) or last or cfg.dry_run and step == first + 5):
                if world > 1:
                    dist.all_reduce(tally)
                seconds, since, paused = clock(device) - since - paused, clock(device), 0.0
                line = log_line(tally, step, images, seconds, int(agreed(replaced, world, dist.ReduceOp.SUM)), rate(step, cfg))
                line["share_of_peak"] = round(3 * flops * line["pictures/s"] / world / peak, 4)
                tally.zero_()
                if int(in_a_row) >= 20:
                    die(f"{int(in_a_row)} updates in a row were not finite, stopped at step {step}. Last good checkpoint: step "
                        f"{saved}. Try a lower --lr or --dtype fp32", status=1)
                if line["replaced"] > max(20, data_cfg.max_bad * images):
                    raise ValueError(f"{line['replaced']} of {images} pictures could not be read. Use a --max-bad above "
                                     f"{data_cfg.max_bad} to go on")
                if writes:
                    with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
                        f.write(json.dumps(line) + "\n")
                bar.set_postfix({"loss": f"{line['loss']:.4f}", "pictures/s": f"{line['pictures/s']:.0f}"})
                if bar.disable:
                    say("  ".join(f"{k} {line[k]}" for k in ("step", "loss", "grad_norm", "pictures/s", "skipped", "replaced")))
            if cfg.dry_run and step == first + 5:
                return report(cfg, parameters, flops, line["pictures/s"], peak, device)

            # Save: only what is finite and the same on every rank.
            began = clock(device) if due(cfg.val_every) or due(cfg.sample_every) or due(cfg.save_every) or last else 0.0
            if step > saved and (due(cfg.save_every) or last) and not cfg.dry_run:
                size = float(sum(norm.detach().double() for norm in torch._foreach_norm(weights + averages)))
                if not math.isfinite(agreed(size, world)) or agreed(size, world) != agreed(size, world, dist.ReduceOp.MIN):
                    die(f"weights of step {step} are not finite, or not the same on all ranks: not saved. Resume from step "
                        f"{saved} with the same command", status=1)
                meta = {"config": recipe, "step": str(step), "images": str(images), "scaler": json.dumps(scaler.state_dict()),
                        "data": train_set.fingerprint, "text": text.fingerprint, "versions": json.dumps(versions())}
                try:
                    if writes:
                        files = {"ema": ema.state_dict(), "train": pack(net, optimizer)}
                        folder = model.save_checkpoint(out, step, files, meta, cfg.keep)
                        if last:
                            say(f"{'stopping at' if leaving else 'finished'} step {step}: saved {folder}"
                                + ("; run the same command to continue" if leaving else ""))
                    saved = step
                except OSError as e:
                    if last:
                        die(f"the last checkpoint, step {step}, could not be written: {e}", status=1)
                    say(f"warning: checkpoint at step {step} not written ({e.strerror}); training continues")
            if leaving:
                return

            # Validate and draw samples with the averaged weights.
            if due(cfg.val_every) and not cfg.dry_run:
                with autocast:
                    line = {"step": step} | validate(ema, text, val_set, cfg, device, rank, world)
                say("  ".join(f"{k} {v}" for k, v in line.items() if k != "val_buckets"))
                if writes:
                    with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
                        f.write(json.dumps(line) + "\n")
            if due(cfg.sample_every) and writes:
                with autocast:
                    grid = sample_grid(ema, text, fixed, cfg, device)
                (out / "samples").mkdir(exist_ok=True)
                data.contact_sheet(grid, fixed).save(out / "samples" / f"{step:06d}.png")
            paused += clock(device) - began if began else 0.0
            if last:
                return

            # One update: micro-batches, their exact mean over the ranks, the finite gate, the average.
            batch = next(batches)
            for note in batch["replaced"]:
                replaced += 1
                if replaced <= 10 or replaced % 1000 == 0:
                    say(f"warning: {note}; replaced")
            for group in optimizer.param_groups:
                group["lr"] = rate(step, cfg)
            for start in range(0, per_rank, micro):
                rows = slice(start, start + micro)
                positions, captions = batch["positions"][rows], batch["captions"][rows]
                u, kept, keys = draws(cfg.seed, positions, cfg)
                x0 = scaled(batch["picture"][rows], device)
                eps = diffusion.gaussian(keys, x0.shape[1:], device)
                u = diffusion.stratify(u, torch.tensor(positions) - images, cfg.batch_size).to(device)
                t, weight = net.importance.draw(u) if net.importance else (diffusion.draw_t(u, diff_cfg, net.schedule), 1.0)
                condition = condition_of(text, captions, kept, device)
                if step == 0 and start == 0 and writes:
                    first_batch(out / "first_batch.png", x0, diffusion.noised(x0, eps, t, net.schedule), t, captions, kept)
                with contextlib.nullcontext() if world == 1 or start + micro >= per_rank else parallel.no_sync():
                    with autocast:
                        loss, raw = run(x0, eps, t, **condition)
                    scaler.scale((weight * loss).sum() / per_rank).backward()
                if net.importance:
                    squares += torch.stack(diffusion.bucket_sums(loss.detach().square(), t, squares.shape[1]))
                sums, counts = diffusion.loss_buckets(raw.detach(), net.schedule.logsnr(t), BUCKETS)
                tally += torch.cat([sums, counts, F.pad(loss.detach().sum()[None], (0, 4))]).nan_to_num(0, 0, 0)
            if net.importance:
                if world > 1:
                    dist.all_reduce(squares)
                net.importance.update(*squares)
                squares.zero_()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(weights, cfg.clip or math.inf)                # before clipping, equal on all ranks
            bad = (~norm.isfinite()).float()
            if not scaler.is_enabled():                                                   # fused AdamW skips the update on the device
                optimizer.grad_scale, optimizer.found_inf = None, bad
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            updates = optimizer.state[weights[0]]["step"].clamp(min=1)
            average(averages, weights, (1 - bad) * (1 / updates).clamp(min=1 - cfg.ema_decay))
            in_a_row = (in_a_row + 1) * bad
            tally[-4:] += torch.stack([norm.nan_to_num(0, 0, 0), (norm > (cfg.clip or math.inf)).float(), bad, torch.ones_like(bad)])
            images += cfg.batch_size
            bar.update()
    except torch.OutOfMemoryError as e:
        die(f"out of memory at --micro-batch {micro} ({str(e).splitlines()[0][:100]}). Try --micro-batch {max(1, micro // 2)}: "
            "same result, more steps of accumulation", status=1)
    finally:
        bar.close()
        batches.close()
        if world > 1 and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        die(error)
