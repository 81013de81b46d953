"""Train one stage: `torchrun train.py --size 64`, or `python train.py --size 64` on one device.

Pictures seen so far are the only state beside the weights: every random choice is a function of (seed,
position), so the same command run again continues exactly where the last checkpoint stands."""
import argparse
import ctypes
import dataclasses
import difflib
import inspect
import json
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import data
import diffusion
import model
import text_encoder


@dataclasses.dataclass
class TrainConfig:
    size: int = 64                # side of the pictures [pixels]
    model: Literal["tiny", "small", "base", "large"] = "tiny"  # row of presets; small where there is a GPU
    out: str = ""                 # run directory, runs/SIZE when not given; the same command continues it
    init: str = ""                # a run, checkpoint or file whose averaged weights a new run starts from
    reinit: str = ""              # but not these: a regular expression of names
    train_only: str = ""          # train these weights alone: a regular expression of names
    steps: int = 5000             # updates of the whole run [steps]
    batch_size: int = 32          # pictures of one update, all ranks together [images]
    micro_batch: int = 0          # pictures of one forward pass on one rank, 0 = no accumulation [images]
    lr: float = 1e-3              # learning rate between warm-up and cooldown
    warmup: int = 100             # the rate rises linearly over the first so many steps [steps]
    cooldown: int = 1000          # and falls linearly to 0 over the last so many [steps]
    optimizer: Literal["adamw", "muon"] = "adamw"  # of the matrices inside the U-Net; AdamW of all else
    weight_decay: float = 0.01    # decay of weight matrices; biases and gains have none
    clip: float = 1.0             # largest norm of the gradient, 0 = no clipping
    ema_decay: float = 0.999      # of the averaged weights, after 1 / (1 - decay) updates averaged plainly
    profiles: int = 0             # snapshots kept of two more averages, for sample.py --ema; 0 = none
    uncond_prob: float = 0.1      # share of the captions that are dropped, for guidance [0..1]
    max_aug: float = 0.6          # the small pictures of --lowres are noised at times t of 0 to this
    seed: int = 0                 # of every random choice
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the matrix products; all else is float32
    compile: bool | None = None   # torch.compile; on for CUDA when not given
    checkpointing: bool = False   # recompute activations in the backward pass: less memory, a third more work
    device: str = ""              # cuda, mps or cpu; the first of them there is when not given
    workers: int = -1             # processes that load pictures, per rank; -1 = 8 beside a GPU, none without
    log_every: int = 50           # a line in metrics.jsonl, 0 = never [steps]
    sample_every: int = 1000       # a grid of samples, and one at the end, 0 = never [steps]
    val_every: int = 1000          # validation, and once at the end, 0 = never [steps]
    val_images: int = 256         # pictures of the fixed validation set [images]
    save_every: int = 500         # a checkpoint, 0 = only at the end [steps]
    keep: int = 2                 # checkpoints kept
    timeout: float = 600          # how long to wait for another rank or a data worker [seconds]
    dry_run: bool = False         # measure memory, speed and time of this configuration, then leave


# What --size and --model move beside the network's shape; tiny is for minutes on two CPU cores (NOTES.md).
LADDER = {256: 64, 1024: 256}                                                 # --size: --lowres
MOVED = ["steps", "batch_size", "lr", "warmup", "cooldown", "ema_decay", "prediction", "shift_base", "crop",
         "optimizer", "max_aug", "t_density", "t_mean", "t_std", "loss_weight"]       # a row may end early
PRESETS = {stage: dict(zip(MOVED, row)) for stage, row in {
    (64, "tiny"):   (1850,   40,  .0023, 50,   1300,  .995,  "x0", 32, 0, "muon", 0, "logit_normal", 1, 1.5,
                     "learned"),
    (64, "small"):  (50000,  256, 3e-4,  1000, 5000,  .999,  "v",  64, 0),
    (64, "base"):   (200000, 512, 1e-4,  1000, 20000, .9999, "v",  64, 0),
    (64, "large"):  (500000, 1024, 1e-4, 5000, 50000, .9999, "v",  64, 0),
    (256, "tiny"):  (3400,   16,  .0015, 50,   2000,  .995,  "v",  64, 64, "muon", .2, "logit_normal", 2.0),
    (256, "small"): (100000, 256, 3e-4,  1000, 10000, .999,  "v",  64, 0),
    (256, "base"):  (300000, 512, 1e-4,  1000, 30000, .9999, "v",  64, 0),
    (256, "large"): (500000, 1024, 1e-4, 5000, 50000, .9999, "v",  64, 0),
    (1024, "tiny"): (2900,   4,   .0015, 50,   1700,  .995,  "v",  64, 256, "muon", .05, "logit_normal", 2.0),
    (1024, "small"):(100000, 256, 3e-4,  1000, 10000, .999,  "v",  64, 256),
    (1024, "base"): (300000, 512, 1e-4,  1000, 30000, .9999, "v",  64, 256),
    (1024, "large"):(500000, 1024, 1e-4, 5000, 50000, .9999, "v",  64, 256),
}.items()}
# Flags that are free to change between starts, and those that must equal the checkpoint's; the rest is noted.
MACHINE = {"out", "micro_batch", "compile", "checkpointing", "device", "workers", "log_every", "sample_every",
           "val_every", "val_images", "save_every", "keep", "timeout", "dry_run", "max_bad",
           "text_cache", "text_shards", "allow_bin"}
SHAPE = {"size", "model", "optimizer", "profiles", "ModelConfig", "TextConfig", "schedule", "prediction",
         "learn_sigma", "picture_mode", "lowres", "lowres_mode"}
LIMITS = {"size": (8, 4096), "steps": (1, 10**9), "batch_size": (1, 2**20), "lr": (1e-12, 1), "keep": (1, 99),
          "weight_decay": (0, 1), "ema_decay": (0, 0.999999), "uncond_prob": (0, 1), "seed": (0, 2**63 - 1),
          "workers": (-1, 256), "val_images": (2, 10**6), "timeout": (1, 10**6), "profiles": (0, 99),
          "max_aug": (0, 1), "min_size": (1, 2**16), "min_crop": (0.01, 1)}
BUCKETS, TEXT = 8, ("context", "mask", "pooled")
number = lambda x: float(f"{float(x):.6g}")                                   # enough digits for a log
Configs = tuple[TrainConfig, data.DataConfig, model.ModelConfig, diffusion.DiffusionConfig,
                text_encoder.TextConfig]


# ------------------------------------------------------------------------------------------- flags and errors
def say(message: str) -> None:
    """One line on standard output, from rank 0; a closed pipe is no reason to stop training."""
    if os.environ.get("RANK", "0") == "0":
        try:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def die(message: object, status: int = 2, everywhere: bool = False) -> NoReturn:
    """End the run with one line on standard error; exit status 2 is the user's mistake, 1 a failure.
    The first rank of a machine speaks, and the others give it time; `everywhere`: of one rank alone."""
    rank = os.environ.get("RANK", "0")
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        message = " ".join((f"rank {rank}: " * (rank != "0") + str(message)).split())
        print(f"train.py: error: {message}", file=sys.stderr, flush=True)
    else: time.sleep(2)
    raise SystemExit(status)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if unknown := re.search(r"unrecognized arguments: (\S+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message = f"unknown flag {unknown[1]}. " + (f"Did you mean {near[0]}?" if near else "See --help")
        die(message)


def parse(argv: list[str]) -> Configs:
    """The dataclasses from the command line: a field is a flag, the comment behind it the help."""
    parser = Parser(prog="train.py", allow_abbrev=False, description=__doc__.splitlines()[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for cls in get_args(Configs):
        group, usual = parser.add_argument_group(cls.__name__), vars(cls())
        helps = dict(re.findall(r"^    (\w+): [\s\S]*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
        for name, kind in get_type_hints(cls).items():
            members = [a for a in get_args(kind) if a is not type(None)]
            options = ({"action": argparse.BooleanOptionalAction} if bool in (kind, *members) else
                       {"choices": members} if get_origin(kind) is Literal else
                       {"type": members[0], "nargs": "*"} if get_origin(kind) in (list, tuple) else
                       {"type": kind})
            group.add_argument(f"--{name.replace('_', '-')}", default=usual[name], **options,
                               help=helps[name].replace("%", "%%"))

    parser.set_defaults(model="", lowres=-1)                                  # of these the defaults move
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    name = known.model or ("small" if model.choose_device(known.device).type == "cuda" else "tiny")
    lowres = LADDER.get(known.size, 0) if known.lowres < 0 else known.lowres
    row = (64 if not lowres else 256 if known.size <= 256 else 1024), name
    parser.set_defaults(**vars(model.PRESETS[row]), **PRESETS[row], model=name, lowres=lowres,
                        min_size=known.size if lowres else 8)
    if twice := [flag for flag in argv if flag.startswith("--") and argv.count(flag) > 1]:
        die(f"{twice[0]} is given twice. Give all of its values once")
    values = vars(args := parser.parse_args(argv))
    values["out"] = values["out"] or f"runs/{values['size']}"
    if (at := values["attn_resolutions"]) is model.PRESETS[row].attn_resolutions:     # where they occur
        values["attn_resolutions"] = [n for n in at if n in model.sides(args, args.size)]
    configs = tuple(cls(**{f.name: tuple(values[f.name]) if isinstance(f.default, tuple) else values[f.name]
                           for f in dataclasses.fields(cls)}) for cls in get_args(Configs))
    check(*configs)
    return configs


def check(cfg: TrainConfig, data_cfg, model_cfg, diff_cfg, text_cfg) -> None:
    """Raise ValueError for what is wrong, before any work is done: one line with the value and the limit."""
    for config, usual in ((cfg, (0, 10**9)), (data_cfg, (0, 10**9)), (diff_cfg, (-10**9, 10**9))):
        for name, value in vars(config).items():
            least, most = LIMITS.get(name, usual)
            if isinstance(value, int | float) and not least <= value <= most:     # a nan is outside, too
                raise ValueError(f"--{name.replace('_', '-')} {value} is outside {least} to {most}")
    if text_cfg.text_cache and not (data_cfg.data or data_cfg.limit):
        raise ValueError(f"--text-cache {text_cfg.text_cache} needs captions that end: add --data or --limit")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    unit = world * (cfg.micro_batch or 1)
    if cfg.batch_size % unit:
        near = max(1, cfg.batch_size // unit) * unit
        raise ValueError(f"--batch-size {cfg.batch_size} does not divide over {world} ranks x micro-batch "
                         f"{cfg.micro_batch or 1}. Try {near} or {near + unit}")
    for flag, pattern in {"reinit": cfg.reinit, "train-only": cfg.train_only}.items():
        try: re.compile(pattern)
        except re.error as e: raise ValueError(f"--{flag} {pattern} is no regular expression: {e}") from None
    if data_cfg.lowres and (diff_cfg.prediction != "v" or diff_cfg.schedule == "flow"):
        raise ValueError("--lowres needs --prediction v and a --schedule other than flow")
    if Path(cfg.out).exists() and not Path(cfg.out).is_dir():
        raise ValueError(f"--out {cfg.out} is a file. Name a directory")
    model.check_shape(model_cfg, cfg.size, data_cfg.crop, data_cfg.lowres)
    diffusion.make_schedule(diff_cfg, cfg.size)


# --------------------------------------------------------------------------------------------- parts of a run
class Net(nn.Module):
    """What is trained, as one module for DDP and torch.compile: U-Net, text encoder, and the loss."""
    def __init__(self, unet: nn.Module, text: nn.Module, config, size: int, lowres: int, max_aug: float):
        super().__init__()
        self.unet, self.config, self.max_aug, sizes = unet, config, max_aug, (size, lowres or size)
        unet.levels = self.schedule, self.small_schedule = [diffusion.make_schedule(config, n) for n in sizes]
        if text.trainable: self.text_encoder = text
        self.uncertainty = diffusion.Uncertainty() if config.loss_weight == "learned" else None
        self.importance = diffusion.Importance() if config.t_density == "importance" else None

    def forward(self, x0: Tensor, eps: Tensor, t: Tensor, **condition) -> tuple[Tensor, Tensor]:
        """Losses (weighted (B,), raw (B,)) of pictures x0 noised by eps at t, see diffusion.losses."""
        return diffusion.losses(self.unet, x0, eps, t, self.schedule, self.config, self.uncertainty,
                                **self.encode(**condition))

    def draw_t(self, u: Tensor) -> tuple[Tensor, Tensor | float]:
        """Times t (B,) of uniform u (B,), and what their losses weigh."""
        if self.importance: return self.importance.draw(u)
        return diffusion.draw_t(u, self.config, self.schedule), 1.0

    def encode(self, ids: Tensor | None = None, **condition) -> dict[str, Tensor]:
        """The condition of the U-Net, from token ids where the text encoder trains along."""
        if ids is not None:
            condition |= zip(TEXT, self.text_encoder(ids, condition["mask"]))
        return condition

    def augment(self, small: Tensor, u: Tensor, _, keys: Tensor) -> dict[str, Tensor]:
        """The low-resolution condition: pictures (B, c, h, w) noised at t = max_aug u by the schedule of
        their size (Ho et al. 2021, arXiv:2106.15282, section 4.2). u, keys: see `draws`."""
        t, eps = self.max_aug * u.to(small.device), diffusion.gaussian(keys, small.shape[1:], small.device)
        return {"lowres": diffusion.noised(small, eps, t, self.small_schedule), "lowres_t": t}


def rate(step: int, cfg: TrainConfig) -> float:
    """The learning rate of a step: linear warm-up, constant, linear cooldown to 0."""
    return cfg.lr * max(0.0, min(1.0, (step + 1) / (cfg.warmup + 1), (cfg.steps - step) / (cfg.cooldown + 1)))


def resume(out: Path, state: model.State, configs: Configs, pictures, text) -> tuple[int, int]:
    """(steps, pictures) of the newest checkpoint that verifies, loaded into `state`; (0, 0) without one."""
    found = model.load_checkpoint(out, ("ema", "train"), lambda line: say(f"warning: {line}"))
    if found is None: return 0, 0
    folder, tensors, meta = found
    stored = json.loads(meta["config"])
    for config in configs:                                    # shape must match, the rest is noted
        for name, value in dataclasses.asdict(config).items():
            group, flag = type(config).__name__, f"--{name.replace('_', '-')}"
            old = stored.get(group, {}).get(name, getattr(type(config)(), name))
            if name in MACHINE or json.dumps(old) == json.dumps(value): continue
            if name in SHAPE or group in SHAPE or {"learned", "importance"} & {str(old), str(value)}:
                raise ValueError(f"the checkpoint has {flag} {old}, not {value}. Use that, or another --out")
            say(f"note: {flag} {old} -> {value} (checkpoint -> this run)")
    state.load(*tensors, scaler=json.loads(meta["scaler"]))
    if meta["text"] != text.fingerprint:
        raise ValueError(f"the text encoder is {text.fingerprint}, not {meta['text']}. Use another --out")
    if meta["data"] != pictures.fingerprint:
        say("warning: the pictures are not those of the checkpoint: their order differs from here")
    if json.loads(meta["versions"]) != model.VERSIONS:
        say(f"note: {meta['versions']} -> {json.dumps(model.VERSIONS)}: it continues, but not bit for bit")
    say(f"resumed from step {meta['step']} ({folder})")
    return int(meta["step"]), int(meta["images"])


def publish(out: Path, step: int, state: model.State, meta: dict[str, str], keep: int, last: bool) -> None:
    """Write a checkpoint. Training survives a disk that is full, unless this is the last one."""
    try:
        say(f"saved {state.save(out, step, meta, keep)}")
    except OSError as e:
        if last:
            die(f"the last checkpoint, step {step}, could not be written: {e}", status=1)
        say(f"warning: checkpoint at step {step} not written ({e}); training continues")


def draws(seed: int, purpose: str, positions: Iterable[int], uncond_prob=0.0) -> tuple[Tensor, ...]:
    """Of each position: uniform for t (B,) float32, caption kept (B,) bool, key of the noise (B,) int64."""
    generators = [data.keyed(seed, purpose, p) for p in positions]
    rows = [(g.random(), g.random() >= uncond_prob, int(g.integers(2**63))) for g in generators]
    return tuple(map(torch.tensor, zip(*rows)))


def scaled(pictures: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) on the CPU -> float32 in [-1, 1] on the device."""
    return torch.as_tensor(pictures).to(device, non_blocking=True).float() / 127.5 - 1


@torch.no_grad()
def condition_of(net: Net, text: nn.Module, batch: dict, device, seed=0, kept: Tensor | bool = True) -> dict:
    """The condition of a batch: token ids, or what a frozen encoder makes of them; noised small pictures."""
    ids, mask = text.tokenize(batch["captions"])
    if text.counts["cut"] > 1 and not text.counts["said"]:                    # once, of more than an example
        text.counts["said"] = 1
        say(f"note: {text.counts['cut']} of {text.counts['captions']} captions are cut. See --text-length")
    if device.type == "cpu" and type(text) is text_encoder.TextEncoder:       # padding costs time there only
        longest = -(-max(1, int(mask.sum(1).max())) // 8) * 8
        ids, mask = ids[:, :longest], mask[:, :longest]
    ids, mask = (x.to(device, non_blocking=True) for x in (ids, mask & torch.as_tensor(kept).view(-1, 1)))
    condition = {"ids": ids, "mask": mask} if text.trainable else dict(zip(TEXT, text(ids, mask)))
    if "lowres" in batch:
        condition |= net.augment(scaled(batch["lowres"], device), *draws(seed, "lowres", batch["positions"]))
    return condition


# --------------------------------------------------------------------------------------- what a user looks at
@torch.no_grad()
def validate(step: int, net: Net, text: nn.Module, fixed, n: int, device, rank: int, world: int) -> dict:
    """Losses on n fixed pictures, times and noise, a line for metrics.jsonl. Ranks share the work.
    val_gap = loss with the next picture's caption - loss with the right one: above 0 the text is used."""
    n, batch, sums = min(n, len(fixed)), 32, torch.zeros(2 * BUCKETS + 1, dtype=torch.float64)
    for start in range(rank * batch, n, world * batch):
        right = data.collect(fixed, start, min(start + batch, n))
        positions, captions = right["positions"], right["captions"]
        wrong = right | {"captions": [*captions[1:], fixed[(positions[-1] + 1) % n]["caption"]]}
        x0 = scaled(right["picture"], device)
        eps = diffusion.gaussian(draws(0, "validation", positions)[2], x0.shape[1:], device)
        t = torch.tensor([(p * 0.6180339887 + 0.5) % 1 for p in positions], device=device)    # even for any n
        loss, other = (net(x0, eps, t, **condition_of(net, text, b, device))[1] for b in (right, wrong))
        buckets = diffusion.loss_buckets(loss, net.schedule.logsnr(t), BUCKETS)
        sums += torch.cat([*buckets, (other - loss).sum()[None]]).cpu()
    if world > 1: dist.all_reduce(sums)
    total, count, gap = sums.split([BUCKETS, BUCKETS, 1])
    return {"step": step, "val_loss": number(total.sum() / n), "val_gap": number(gap / n),
            "val_buckets": [number(x) for x in total / count.clamp(min=1)]}


@torch.no_grad()
def sample_grid(net: Net, text: nn.Module, shown: dict, device: torch.device) -> Image.Image:
    """Pictures of fixed prompts with fixed noise; beside an enlarged one what it was, and the truth."""
    condition = net.encode(**condition_of(net, text, shown, device))
    guidance, truth = (1.0, [scaled(shown["picture"], device)]) if "lowres" in condition else (3.0, [])
    denoise = diffusion.threshold(diffusion.guided(net.unet, net.schedule, net.config, condition, guidance))
    keys, shape = draws(0, "samples", shown["positions"])[2], shown["picture"].shape[1:]
    x, noise = diffusion.gaussian(keys, shape, device), diffusion.noise_source(keys, shape, device)
    drawn = diffusion.dpmpp_2m(denoise, x, diffusion.time_grid(20), noise, net.schedule)
    return model.contact_sheet(model.side_by_side(drawn, *truth, **condition), shown["captions"])


def first_batch(x0: Tensor, x_t: Tensor, t: Tensor, batch: dict, kept: Tensor, condition) -> Image.Image:
    """Exactly what the network sees: small picture, if any, picture, noisy version; below, t and caption."""
    notes = [f"t {time:.2f}: {caption if keep else '(dropped)'}"
             for time, caption, keep in zip(t.tolist(), batch["captions"], kept.tolist())]
    return model.contact_sheet(model.side_by_side(x0, x_t, **condition)[:16], notes[:16])


def log_line(tally: Tensor, step: int, images: int, seconds: float, lr: float, world: int) -> dict:
    """What metrics.jsonl says of the steps since its last line: means over pictures, buckets clean first."""
    sums, counts, rest = tally.cpu().double().split([BUCKETS, BUCKETS, 6])
    loss, norm, clipped, skipped, steps, replaced = rest.tolist()
    line = {"loss": loss / counts.sum(), "raw_loss": sums.sum() / counts.sum(), "grad_norm": norm / steps,
            "clipped": clipped / steps, "pictures/s": counts.sum() / seconds, "lr": lr}
    return {"step": step, "images": images, **{k: number(v) for k, v in line.items()},
            "skipped": int(skipped / world), "replaced": int(replaced),
            "buckets": [number(x) for x in sums / counts.clamp(min=1)]}


def report(configs: Configs, parameters: int, flops: float, speed: float, peak: float, device) -> None:
    """The configuration, what it costs here, measured on real steps, and the time the run would take."""
    steps, batch_size, used = configs[0].steps, configs[0].batch_size, 3 * flops * speed
    say("\n".join(map(repr, configs)) + f"""
parameters  {parameters / 1e6:.1f} M
forward     {flops / 1e9:.3f} GFLOPs a picture
memory      {model.memory_peak(device) / 2**30:.2f} GiB at its peak
speed       {speed:.1f} pictures/s
used        {used / 1e9:.0f} GFLOP/s, {used / peak:.0%} of the {peak / 1e9:.0f} of a matrix product
time        {steps * batch_size / speed / 3600:.2f} hours for {steps} steps of {batch_size} pictures""")


# --------------------------------------------------------------------------------------------------- the loop
def launch(cfg: TrainConfig, world: int, writes: bool) -> tuple[torch.device, list[int]]:
    """Take the run directory, start the ranks, seed. Returns the device, and a list of arriving signals."""
    if writes: model.lock(Path(cfg.out))
    device = model.choose_device(cfg.device)
    if world > 1:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)                        # torchrun leaves no orphans
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=cfg.timeout))
    torch.manual_seed(cfg.seed)
    stop: list[int] = []                                                      # read once the loop runs
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: stop.append(got) or signal.signal(got, signal.SIG_IGN))  # once
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        if cfg.dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            say("note: no bf16 on this GPU, using fp16 with loss scaling")
            cfg.dtype = "fp16"
    elif device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)           # its backward pass is slow on a CPU (NOTES.md)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)          # its parts in bfloat16, too
        if not cfg.device: say(f"note: no GPU found, using the CPU and --model {cfg.model}")
    return device, stop


def build(configs: Configs, device: torch.device, sets=(), stop=(), rank: int = 0, world: int = 1) -> tuple:
    """The text encoder, and the Net that is trained; the ranks put the captions of `sets` in --text-cache."""
    cfg, data_cfg, model_cfg, diff_cfg, text_cfg = configs
    caches, until_stop = [], lambda items: takewhile(lambda _: not stop, items)

    def cached(number: int, encoder: nn.Module, load: Callable) -> Callable:
        if cfg.dry_run:                                       # as large as can be, and nothing is written
            return lambda _: (torch.zeros(encoder.length, encoder.dim), torch.zeros(encoder.pooled_dim))
        if text_cfg.text_cache == "shards":
            return lambda caption: model.Cache(caption.key, encoder.fingerprint, caption.embeddings)[caption]
        cache = model.Cache(Path(text_cfg.text_cache, str(number)), encoder.fingerprint)
        ours = (c for pictures in sets for c in pictures.captions() if zlib.crc32(c.encode()) % world == rank)
        filling = cache.fill(until_stop(ours), lambda texts: load() and until_stop(
            text_encoder.encode_captions(encoder.to(device), texts)), 1024)   # the ranks meet after each part
        while model.agreed(next(filling, 0), world) and not model.agreed(len(stop), world): pass
        if model.agreed(len(stop), world):
            raise SystemExit(say("stopping before the first step; run the same command to continue"))
        caches.append(model.Cache(cache.name, encoder.fingerprint))
        return caches[-1].__getitem__

    def beside(texts: list[str]) -> bytes:                    # of a picture, from all encoders
        tensors, meta = {}, {}
        for cache in caches:
            cache.pack({text: cache[text] for text in texts}, tensors, meta)
        return safetensors.torch.save(tensors, meta)

    for pictures in sets: pictures.embedded = text_cfg.text_cache == "shards"
    if text_cfg.text_shards:                                  # before the cache is filled
        shards = [Path(s.files[i][0]) for s in sets[0].sources for i in np.unique(s.rows[:, 0, 0])]
        damaged = [line for line in sets[0].warnings if "damaged after" in line]
        apart = len({path.name for path in shards if path.suffix == ".tar"}) == len(shards) > 0
        frozen = text_cfg.text_cache not in ("", "shards") and set(text_cfg.text_encoder) != {"bytes"}
        if not frozen or not apart or data_cfg.limit or damaged:
            raise ValueError(f"--text-shards {text_cfg.text_shards} needs a folder as --text-cache, a frozen "
                             "--text-encoder, no --limit, and --data of nothing but whole tar shards with "
                             f"names of their own. {' '.join(damaged)}".rstrip())
    text = text_encoder.load_text_encoder(text_cfg, cached if text_cfg.text_cache else None).to(device)
    if text_cfg.text_shards and not cfg.dry_run:
        os.makedirs(text_cfg.text_shards, exist_ok=True)
        for path in until_stop(shards[rank::world]):
            target = Path(text_cfg.text_shards, path.name)
            if fresh := not target.exists(): data.copy_shard(str(path), str(target), beside)
            say(f"wrote {target}" if fresh else f"kept {target}, which was there")
        raise SystemExit(say("stopping; run the same command to continue") if stop else None)
    planes, small = (len(data.MODES[mode]) for mode in (data_cfg.picture_mode, data_cfg.lowres_mode))
    unet = model.UNet(model_cfg, cfg.size, text.dim, text.pooled_dim, planes, small if data_cfg.lowres else 0,
                      diff_cfg.learn_sigma)
    unet.checkpointing = cfg.checkpointing
    net = Net(unet, text, diff_cfg, cfg.size, data_cfg.lowres, cfg.max_aug).to(device)
    if cfg.init and not model.checkpoint_folders(Path(cfg.out)):
        say(f"from {cfg.init}: " + model.warm_start(net, model.read(Path(cfg.init))[1], cfg.reinit))
    return text, net


def main(argv: list[str]) -> None:
    configs = cfg, data_cfg, *_ = parse(argv)
    # Who and where: ranks, device, run directory, signals.
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    out, writes = Path(cfg.out), rank == 0 and not cfg.dry_run
    device, stop = launch(cfg, world, writes)

    # What is trained, on what; where it stands.
    train_set, val_set = (data.Pictures(data_cfg, cfg.size, cfg.seed, split) for split in ("train", "val"))
    uncut = data.Pictures(dataclasses.replace(data_cfg, crop=0), cfg.size, cfg.seed, "val")
    text, net = build(configs, device, (train_set, val_set, uncut), stop, rank, world)
    state = model.State(net, cfg.weight_decay, cfg.clip, cfg.ema_decay, cfg.dtype == "fp16", cfg.profiles,
                        cfg.train_only, cfg.optimizer == "muon")
    first, images = (0, 0) if cfg.dry_run else resume(out, state, configs, train_set, text)
    if not model.equal(zlib.crc32(f"{first} {configs}".encode()), world):
        raise ValueError(f"ranks differ in flags, or not all see the same --out {out} (here: step {first})")
    if first >= cfg.steps:
        return say(f"note: step {first} of {cfg.steps} reached; nothing to do. Raise --steps to go on")
    parameters = sum(p.numel() for p in state.weights)
    say("".join(f"warning: {warning}\n" for warning in train_set.warnings) + f"{train_set.summary}\n"
        f"{cfg.model}: {parameters / 1e6:.1f} M parameters, steps {first} to {cfg.steps} of {cfg.batch_size} "
        f"pictures, {out}")

    # How it runs: data workers, compiled or not, ranks side by side.
    per_rank, micro = cfg.batch_size // world, cfg.micro_batch or cfg.batch_size // world
    workers = cfg.workers if cfg.workers >= 0 else min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    batches = data.loader(train_set, images, images + (cfg.steps - first) * cfg.batch_size, cfg.batch_size,
                          rank, world, workers, cfg.timeout, device.type == "cuda")
    autocast = torch.autocast(device.type, text_encoder.DTYPES[cfg.dtype], enabled=cfg.dtype != "fp32")
    shown = data.collect(uncut, 0, max(2, 1024 // cfg.size) if data_cfg.lowres else 16)
    with autocast:
        example = data.collect(val_set, 0, 1)
        one = scaled(example["picture"], device)
        flops = model.count_flops(net, one, one, one[:, 0, 0, 0], **condition_of(net, text, example, device))
    peak = model.matmul_peak(device, text_encoder.DTYPES[cfg.dtype])
    parallel = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net
    run = model.compiled(parallel, device, cfg.compile, say)
    recipe, software = {type(c).__name__: dataclasses.asdict(c) for c in configs}, model.VERSIONS
    meta = {"config": json.dumps(recipe), "data": train_set.fingerprint, "text": text.fingerprint,
            "versions": json.dumps(software)}
    if writes:
        (out / "config.json").write_text(json.dumps({**recipe, "versions": software}, indent=1), "utf-8")
    put = lambda name, content: writes and model.put(out / name, content, say)
    tally = torch.zeros(2 * BUCKETS + 6, device=device)       # what log_line reads
    squares = torch.zeros(2, 100, device=device)              # sums and counts for --t-density importance
    in_a_row = torch.zeros((), device=device)                 # updates that were skipped, up to now
    replaced, since = 0, model.clock(device)
    bar = tqdm(total=cfg.steps, initial=first, unit="step", disable=rank > 0 or not sys.stderr.isatty())
    try:
        for step in range(first, cfg.steps + 1):
            leaving = model.agreed(bool(stop), world) > 0
            last = leaving or step == cfg.steps
            log, save, val, sample = (
                step > first and every > 0 and (step % every == 0 or step == cfg.steps)
                for every in (cfg.log_every, cfg.save_every, cfg.val_every, cfg.sample_every))

            # Log: the only place where the host waits for the device.
            if step > first and (log or last or (cfg.dry_run and step in (2, 6))):
                if world > 1: dist.all_reduce(tally)
                line = log_line(tally, step, images, model.clock(device) - since, rate(step - 1, cfg), world)
                line["share_of_peak"] = number(3 * flops * line["pictures/s"] / world / peak)
                since = model.clock(device)
                tally.zero_()
                if in_a_row >= 20:
                    die(f"{in_a_row:.0f} updates in a row were not finite, stopped at step {step}. The last "
                        "checkpoint is good; try a lower --lr or --dtype fp32", status=1)
                if line["skipped"]:
                    say(f"warning: step {step}: {line['skipped']} updates were not finite and were skipped")
                brief = {k: line[k] for k in ("loss", "raw_loss", "pictures/s")}
                bar.set_postfix(brief)
                if bar.disable: say("  ".join(f"{k} {v}" for k, v in ({"step": step} | brief).items()))
                put("metrics.jsonl", line)
                if cfg.dry_run and (last or step == 6):
                    return report(configs, parameters, flops, line["pictures/s"], peak, device)

            # Save: only what is finite and the same on every rank.
            began = model.clock(device) if save or val or sample else since
            if step > first and (save or last) and not cfg.dry_run:
                if not model.equal(state.size(), world):
                    die(f"the weights of step {step} are not finite, or differ between ranks: not saved. "
                        "The same command goes on from the last checkpoint", status=1)
                if writes:
                    publish(out, step, state, meta | {"images": str(images)}, cfg.keep, last)
            if leaving: return say(f"stopping at step {step}; run the same command to continue")

            # Validate and draw samples with the averaged weights.
            if val and not cfg.dry_run:
                with autocast:
                    line = validate(step, state.ema, text, val_set, cfg.val_images, device, rank, world)
                say(f"step {step}  val_loss {line['val_loss']}  val_gap {line['val_gap']}")
                put("metrics.jsonl", line)
            if sample and writes:
                with autocast:
                    put(f"samples/{step:06d}.png", sample_grid(state.ema, text, shown, device))
            since += model.clock(device) - began if save or val or sample else 0
            if last: return

            # One update: micro-batches, their exact mean over the ranks, the finite gate, the average.
            batch = next(batches)
            for note in batch["replaced"]:
                replaced += 1
                if replaced <= 10 or replaced % 1000 == 0:
                    say(f"warning: {note}; replaced")
            for start in range(0, per_rank, micro):
                part = {name: value[start:start + micro] for name, value in batch.items()}
                u, kept, keys = draws(cfg.seed, "noise", part["positions"], cfg.uncond_prob)
                x0 = scaled(part["picture"], device)
                eps = diffusion.gaussian(keys, x0.shape[1:], device)
                u = diffusion.stratify(u, torch.tensor(part["positions"]) - images, cfg.batch_size).to(device)
                t, weight = net.draw_t(u)
                condition = condition_of(net, text, part, device, cfg.seed, kept)
                if step == 0 and start == 0 and writes:
                    x_t = diffusion.noised(x0, eps, t, net.schedule)
                    put("first_batch.png", first_batch(x0, x_t, t, part, kept, condition))
                with parallel.no_sync() if world > 1 and start + micro < per_rank else nullcontext():
                    with autocast:
                        loss, raw = run(x0, eps, t, **condition)
                    state.scaler.scale((weight * loss).sum() / per_rank).backward()
                loss, raw = loss.detach().nan_to_num(0, 0, 0), raw.detach().nan_to_num(0, 0, 0)
                squares += torch.stack(diffusion.bucket_sums(loss.square(), t, squares.shape[1]))
                sums, counts = diffusion.loss_buckets(raw, net.schedule.logsnr(t), BUCKETS)
                tally += F.pad(torch.cat([sums, counts, loss.sum()[None]]), (0, 5))
            if net.importance:
                if world > 1: dist.all_reduce(squares)
                net.importance.update(*squares)
            squares.zero_()
            norm, bad = state.update(rate(step, cfg))
            in_a_row = (in_a_row + 1) * bad
            clipped, one, others = (norm > state.clip).float(), torch.ones_like(bad), len(batch["replaced"])
            tally[-5:] += torch.stack([norm.nan_to_num(0, 0, 0), clipped, bad, one, others * one])
            images += cfg.batch_size
            bar.update()
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(e):
            die(f"out of memory at --micro-batch {micro} ({str(e).splitlines()[0][:100]}). Try --micro-batch "
                f"{micro // 2 or 1}, which gives the same result, or --checkpointing", 1, everywhere=True)
        raise
    except (ValueError, OSError) as e:                                        # of the data, maybe of one rank
        die(e, status=2 if isinstance(e, ValueError) else 1, everywhere=True)
    finally:
        bar.close()
        batches.close()
        if world > 1: model.leave()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        die(error)
