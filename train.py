"""Train one stage: `python train.py --size 64`, with torchrun before it on several devices.

A checkpoint holds weights, their averages and the optimizer's moments, and of the data no more than how many
pictures were seen: every random choice in training is a function of (seed, purpose, position), where position
is the number of a picture in the stream. So the same command run again continues exactly."""
import argparse
import copy
import ctypes
import dataclasses
import difflib
import gc
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin, get_type_hints


def follow_parent() -> None:
    """From now on a rank whose torchrun is killed is told so, and Ctrl-C ends the program without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        first = Path("/proc/1/cmdline")                        # of a container it may be torchrun itself
        if os.getppid() == 1 and not (first.exists() and b"torch" in first.read_bytes()):
            raise SystemExit(1)                                # it was killed before


if __name__ == "__main__":
    follow_parent()                                            # before the imports that take seconds
    gc.disable()                                               # for them it looks at all of torch in vain

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import diffusion
import model
import text_encoder

Objective = Literal["denoise", "clip"]
Model = Literal["tiny", "small", "base", "large", "sd15", "sd21", "sdxl"]
SCORES = "frechet", "kernel", "cmmd", "precision", "recall", "clip_score"      # of sample.py


@dataclasses.dataclass
class TrainConfig:
    size: int = 64                # side of the pictures [8..4096 pixels]
    model: Model = "tiny"         # row of presets, small where there is CUDA; sd15, ...: published U-Nets
    pretrained: str = ""          # a published pipeline's folder: its U-Net, VAE, text encoder and noise
    objective: Objective = "denoise"  # clip: pictures and captions find each other, to guide and to rank
    out: str = ""                 # run directory, runs/SIZE when not given; the same command continues it
    init: str = ""                # a run, checkpoint or file whose averaged weights a new run starts from
    reinit: str = ""              # names, a regular expression, that --init or --pretrained leaves fresh
    train_only: str = ""          # train these weights alone: a regular expression of names
    steps: int = 5000             # updates of the whole run [1..1e9 steps]
    batch_size: int = 32          # pictures of one update, all ranks together [1..1048576 images]
    micro_batch: int = 0          # pictures of one forward pass on one rank, 0 = no accumulation [images]
    lr: float = 1e-3              # learning rate between warm-up and cooldown [1e-12..1]
    warmup: int = 100             # the rate rises linearly over the first so many steps [steps]
    cooldown: int = 1000          # and falls linearly to 0 over the last so many [steps]
    optimizer: Literal["adamw", "muon"] = "adamw"  # moves matrices inside the U-Net; all else AdamW
    weight_decay: float = 0.01    # decay of weight matrices; biases and gains have none [0..1]
    clip: float = 1.0             # largest norm of the gradient, 0 = no clipping
    ema_decay: float = 0.999      # of the averaged weights, plain up to 1 / (1 - it) updates [0..0.999999]
    profiles: int = 0             # snapshots kept of two more averages, for sample.py --ema; 0 = none [0..99]
    uncond_prob: float = 0.1      # share of the captions that are dropped, for guidance [0..1]
    transcription_drop: float = 0.1  # share of the transcriptions that are dropped [0..1]
    both_drop: float = 0.1        # with --transcription, share of the pictures that lose both texts [0..1]
    max_aug: float = 0.6          # the small pictures of --lowres are noised at times t of 0 to this [0..1]
    seed: int = 0                 # of every random choice [0..9223372036854775807]
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the matrix products; auto: the fastest here
    compile: bool | None = None   # torch.compile; on for CUDA when not given
    checkpointing: bool = False   # recompute activations in the backward pass: less memory, a third more work
    device: str = ""              # cuda, mps or cpu; the first of them there is when not given
    workers: int = -1             # processes that load pictures, a rank; -1: to 8 with CUDA, else 0 [-1..256]
    log_every: int = 50           # a line in metrics.jsonl, 0 = never [steps]
    log_to: list[Literal["tensorboard", "wandb"]] = dataclasses.field(default_factory=list)  # metrics, too
    check: int = 0                # tell what is in so many pictures of --data, then leave [0..1e9 images]
    plot: list[str] = dataclasses.field(default_factory=list)  # draw the curves of these runs, then leave
    sample_every: int = 1000      # a grid of samples, and one at the end, 0 = never [steps]
    prompts: str = ""             # a file of prompts for grids, one a line, from step 0; else held-out ones
    val_every: int = 1000         # validation, and once at the end, 0 = never [steps]
    val_images: int = 256         # pictures of the fixed validation set [2..1e6 images]
    save_every: int = 500         # a checkpoint, 0 = only at the end; now: touch OUT/save [steps]
    save_minutes: float = 0       # a checkpoint when the last is so old, 0 = never [0..1e6 minutes]
    keep: int = 2                 # checkpoints kept [1..99]
    score_every: int = 0          # save, and let sample.py score the averaged weights, 0 = never [steps]
    score: str = ""               # by its flags: --score="--features inception.pt --limit 500", see README
    keep_best: Literal["", "val_loss", "val_gap", *SCORES] = ""  # and as checkpoints/best the best by this
    timeout: float = 600          # how long to wait for another rank or a data worker [1..1e6 seconds]
    dry_run: bool = False         # measure memory, speed and time of this configuration, then leave


# What --size and --model move, by stage (base, up to 256 pixels, above) and size of the network. `weights`
# and `flops` are those of the U-Net for one whole picture of 64, 256 or 1024 pixels, of 64 or 256 below it,
# with 128 text tokens of width 128. tiny is for minutes on two CPU cores (NOTES.md).
LADDER = {256: 64, 1024: 256}                                                 # --size: --lowres
NEW = dict(size_shift="interpolated")                                         # else large pictures end soft
SMALL = dict(NEW, head_dim=64, steps=100000, batch_size=256, lr=3e-4, warmup=1000, cooldown=10000)
BASE = dict(
    NEW, head_dim=64, steps=300000, batch_size=512, lr=1e-4, warmup=1000, cooldown=30000, ema_decay=0.9999)
LARGE = dict(BASE, steps=500000, batch_size=1024, warmup=5000, cooldown=50000)
FROM_NOISE = dict(
    channel_mult=(1, 2, 3, 4), num_res_blocks=(3,), attn_resolutions=(32, 16, 8), patch=1)
ENLARGES = dict(channel_mult=(1, 2, 4, 8), num_res_blocks=(2, 4, 8, 8), efficient=True)
ENLARGES_CROPS = dict(ENLARGES, conv_only=True, crop=256)
TINY_ENLARGES = dict(
    NEW, channel_mult=(1, 2, 4), emb_dim=256, efficient=True, conv_only=True, loss_weight="learned",
    t_density="logit_normal", t_std=1.5, optimizer="muon", lr=1.5e-3, warmup=50, ema_decay=0.995)
PRESETS = {
    (64, "tiny"): dict(
        weights=5.21e6, flops=1.26e9, channels=128, channel_mult=(1, 1), attn_resolutions=(8,),
        head_dim=64, patch=4, emb_dim=256, prediction="x0", shift_base=32, loss_weight="learned",
        t_density="logit_normal", t_mean=1.0, t_std=1.5, optimizer="muon", max_aug=0.0,
        steps=1850, batch_size=40, lr=2.3e-3, warmup=50, cooldown=1300, ema_decay=0.995),
    (64, "small"): dict(
        SMALL, weights=62.8e6, flops=50.2e9, channels=128, channel_mult=(1, 2, 2, 3), num_res_blocks=(2,),
        attn_resolutions=(16, 8), patch=1, steps=50000, cooldown=5000),
    (64, "base"): dict(
        BASE | FROM_NOISE, weights=306e6, flops=202e9, channels=192, emb_dim=768, steps=200000,
        cooldown=20000),
    (64, "large"): dict(
        LARGE | FROM_NOISE, weights=1.22e9, flops=779e9, channels=384, emb_dim=1536),
    (256, "tiny"): dict(
        TINY_ENLARGES, weights=3.27e6, flops=9.54e9, crop=64, max_aug=0.2, t_mean=0.5,
        steps=3400, batch_size=16, cooldown=2000),
    (256, "small"): dict(
        SMALL | ENLARGES, weights=104e6, flops=119e9, channels=64, num_res_blocks=(2, 4, 4, 4),
        attn_resolutions=(16,), emb_dim=256),
    (256, "base"): dict(
        BASE | ENLARGES, weights=718e6, flops=694e9, channels=128, attn_resolutions=(16,)),
    (256, "large"): dict(
        LARGE | ENLARGES, weights=1.62e9, flops=1.55e12, channels=192, attn_resolutions=(16,), emb_dim=768),
    (1024, "tiny"): dict(
        TINY_ENLARGES, weights=3.3e6, flops=42.2e9, crop=256, patch=4, max_aug=0.05, steps=2900,
        batch_size=4, cooldown=1700),
    (1024, "small"): dict(
        SMALL | ENLARGES_CROPS, weights=92e6, flops=1.77e12, channels=64, num_res_blocks=(2, 4, 4, 4),
        emb_dim=256),
    (1024, "base"): dict(
        BASE | ENLARGES_CROPS, weights=627e6, flops=10.3e12, channels=128),
    (1024, "large"): dict(
        LARGE | ENLARGES_CROPS, weights=1.41e9, flops=23.2e12, channels=192, emb_dim=768),
}
# Published U-Nets: to go on with one, and from scratch.
FINETUNE = dict(steps=10000, batch_size=32, lr=1e-5, warmup=500, ema_decay=0.9999, shift_base=0)
PUBLISHED = dict(
    BASE, shift_base=0, schedule="scaled_linear", prediction="eps", cooldown=0, size_shift="uniform")
# A CLIP is the network of the stage that it guides, but sees whole pictures, at all times alike.
CLIP = dict(
    lowres=0, crop=0, conv_only=False, pretrained="", learn_sigma=False, loss_weight="uniform",
    t_density="uniform", uncond_prob=0.0, sample_every=0, score_every=0, transcription="")
# Flags that are free to change between starts, and those that must equal the checkpoint's; the rest is noted.
MACHINE = {"out", "micro_batch", "compile", "checkpointing", "device", "workers", "log_every", "sample_every",
           "val_every", "val_images", "save_every", "keep", "timeout", "dry_run", "max_bad", "log_to", "plot",
           "prompts", "check", "save_minutes", "keep_best", "score_every", "score",
           "text_cache", "text_shards", "latent_cache", "allow_bin", "shard_cache", "shard_cache_size",
           "text_encoder", "vae"}                              # the content of these is compared
SHAPE = {"size", "model", "pretrained", "objective", "optimizer", "profiles", "ModelConfig", "TextConfig",
         "schedule", "size_shift", "prediction", "learn_sigma", "picture_mode", "lowres", "lowres_mode"}
WITH_WEIGHTS = {"learned", "importance"}                       # values of other flags that bring weights
TOLD = {"uncaptioned": "has no caption and trains as unconditional",
        "overlong": "has a transcription that is cut, see --transcription-length",
        "recoded": "has a text that is not UTF-8 (read as cp1252 where that is printable)"}
COUNTED = ("replaced", *TOLD)                                  # pictures, in metrics.jsonl
BUCKETS = 8                                                    # of the noise levels, in metrics.jsonl
PROFILES = {0.05: 16.972198602303447, 0.1: 6.937203937601809}  # width of an average: its exponent
# What a checkpoint was written with: a run goes on with other versions, but not bit for bit.
VERSIONS = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
Configs = tuple[TrainConfig, data.DataConfig, model.ModelConfig, diffusion.DiffusionConfig,
                text_encoder.TextConfig]


# ------------------------------------------------------------------------------------------ flags and errors
def emit(message: str, stream) -> None:
    """Write a line. A closed pipe, a full disk or a terminal that is gone is no reason to stop training."""
    try:
        tqdm.write(message, file=stream)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        if stream is not None and not stream.closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(message: str) -> None:
    """One line on standard output, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        emit(message, sys.stdout)


def die(message: object, status: int = 2, everywhere: bool = False) -> NoReturn:
    """End the run with one line on standard error; exit status 2 is the user's mistake, 1 a failure.
    The first rank of a machine speaks, and torchrun ends the others, if they have failed alike; another one
    speaks where it is alone, and at once where that is known: `everywhere`."""
    rank = os.environ.get("RANK", "0")
    if not everywhere and os.environ.get("LOCAL_RANK", "0") != "0":
        on_signal(signal.SIG_DFL)
        time.sleep(2)
    who = "" if rank == "0" else f"rank {rank}: "
    line = " ".join(f"{who}{message}".split())
    emit(f"train.py: error: {line}", sys.stderr)
    raise SystemExit(status)


def die_of(error: Exception, micro: int) -> None:
    """End the run with one line if the error is a lack of memory, or of another rank."""
    text = str(error)
    reason = re.sub(r"\[\S+\] ", "", text.partition("\n")[0])[:100]           # without where in its source
    if isinstance(error, dist.DistError) or "/gloo/" in text:
        die(f"another rank has ended or is late ({reason}). Run the same command to continue", status=1,
            everywhere=True)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        less = max((n for n in range(1, micro) if micro % n == 0), default=0)
        fix = f"--micro-batch {less}, which gives the same result, or " if less else ""
        die(f"out of memory at --micro-batch {micro} ({reason}). Try {fix}--checkpointing", status=1,
            everywhere=True)


def progress(ranks: "Ranks", **options) -> tqdm:
    """A bar on a terminal, of rank 0."""
    hidden = ranks.rank > 0 or sys.stderr is None
    return tqdm(disable=hidden or None, **options)             # None: where there is no terminal


def on_signal(handler) -> None:
    """What SIGTERM and SIGINT do from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


class Stopped(Exception):
    """A signal arrived before the first step."""


class Signals:
    """SIGTERM and SIGINT: at once the end of the program, or remembered where somebody looks at `arrived`."""
    arrived = awaited = False

    def arrive(self, number: int, frame) -> None:
        on_signal(signal.SIG_IGN)                              # a terminal and torchrun send it twice
        self.arrived = True
        if not self.awaited:
            raise Stopped


@contextmanager
def starting(cfg: "TrainConfig", ranks: "Ranks") -> Iterator[Signals]:
    """Around all that comes before the loop: a signal ends it at once, what is no bug in one line."""
    try:
        signals = Signals()
        on_signal(signals.arrive)
        yield signals
    except Stopped:
        say("stopping before the first step; run the same command to continue")
        alone = ranks.world > 1 and not signals.awaited        # torchrun ends the others where one fails
        raise SystemExit(143 if alone else 0) from None
    except (MemoryError, RuntimeError) as e:
        signals.awaited = True
        die_of(e, cfg.micro_batch or cfg.batch_size // ranks.world)
        raise


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            hint = f"Did you mean {near[0]}?" if near else "See --help"
            message = f"unknown flag {unknown[1]}. {hint}"
        die(message)


def flag_options(kind: type) -> dict:
    """How argparse reads a field of a type."""
    members = get_args(kind)
    if bool in (kind, *members):
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": members}
    if get_origin(kind) in (list, tuple):
        return flag_options(members[0]) | {"nargs": "*"}
    return {"type": kind}


def preset(known: argparse.Namespace, pipeline: dict) -> dict:
    """The flags that --model, --size, --lowres, --vae, --pretrained (a pipeline) and --objective move."""
    if pipeline:
        return FINETUNE | pipeline
    if known.model in model.UNETS:
        return PUBLISHED
    stage = 64
    if known.lowres:
        stage = 256 if known.size <= 256 else 1024
    row = dict(PRESETS[stage, known.model])                    # weights and flops are no flags: not read
    if known.vae:                                              # latents say more at each place than pixels
        row["patch"] = max(1, row.get("patch", model.ModelConfig.patch) // 2)
    if known.objective == "clip":                              # which overfits, and needs wrong captions
        row |= CLIP | {"keep_best": "val_loss", "batch_size": max(128, row["batch_size"])}
    return row


def is_published(cfg: TrainConfig) -> bool:
    """Whether the U-Net is one that others publish."""
    return bool(cfg.pretrained) or cfg.model in model.UNETS


def parse(argv: list[str]) -> Configs:
    """The dataclasses from the command line: a field is a flag, the comment behind it the help."""
    about = __doc__.splitlines()[0] + " Defaults are those of the --size and --model before --help."
    parser = Parser(prog="train.py", allow_abbrev=False, description=about,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for cls in get_args(Configs):
        group = parser.add_argument_group(cls.__name__)
        comments = model.helps(cls)
        for name, kind in get_type_hints(cls).items():
            group.add_argument(f"--{name.replace('_', '-')}", default=getattr(cls(), name),
                               help=comments[name].replace("%", "%%"), **flag_options(kind))

    # --size and --model choose the row of presets, which moves the other defaults.
    parser.set_defaults(model="", lowres=-1)
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    usual = "small" if model.choose_device(known.device).type == "cuda" else "tiny"
    known.model = known.model or usual
    pipeline = model.open_pipeline(known.pretrained) if known.pretrained else {}
    known.vae = known.vae or pipeline.get("vae", "")
    scale = model.open_vae(known.vae)[0].scale if known.vae else 1
    if known.lowres < 0:
        known.lowres = 0 if known.vae else LADDER.get(known.size, 0)
    row = preset(known, pipeline)
    least = known.size if known.lowres or known.vae else 8
    parser.set_defaults(model=known.model, lowres=known.lowres, min_size=least)
    parser.set_defaults(**row)

    given = [word.split("=")[0] for word in argv if word.startswith("--")]
    twice = [flag for flag in given if given.count(flag) > 1]
    if twice:
        die(f"{twice[0]} is given twice. Give all of its values once")
    args = parser.parse_args(argv)
    kind = "clip-" if args.objective == "clip" else ""
    args.out = args.out or f"runs/{kind}{args.size}"
    for name in ("warmup", "cooldown"):                        # a preset's shrink with fewer steps
        if f"--{name}" not in given:
            scaled = row.get(name, 0) * args.steps // row["steps"]
            setattr(args, name, min(getattr(args, name), scaled))
    if args.attn_resolutions is row.get("attn_resolutions"):   # a preset's: where they occur
        here = model.sides(args, args.size // scale)
        args.attn_resolutions = [side for side in args.attn_resolutions if side in here]

    configs = []
    for cls in get_args(Configs):
        values = {name: getattr(args, name) for name in get_type_hints(cls)}
        configs.append(model.configured(cls, values))
    check(*configs, scale)
    return tuple(configs)


def check_caches(data_cfg, model_cfg, text_cfg) -> None:
    """Raise ValueError where what frozen networks say cannot be kept."""
    names = [data.parse_source(entry)[0] for entry in data_cfg.data]
    endless = not names or any(getattr(data.SOURCES.get(name), "endless", False) for name in names)
    ends = data_cfg.limit or not endless
    if text_cfg.text_cache and not ends:
        raise ValueError(f"--text-cache {text_cfg.text_cache} needs captions that end: add --data or --limit")
    if text_cfg.text_cache and data_cfg.shuffle_tags:
        raise ValueError(f"--text-cache {text_cfg.text_cache} cannot keep the captions of --shuffle-tags, "
                         "which are new in each pass. Drop one")
    if not data_cfg.latent_cache:
        return
    if not (ends and model_cfg.vae):
        raise ValueError(f"--latent-cache {data_cfg.latent_cache} needs --vae, and pictures that end: add "
                         "--data or --limit")
    if data_cfg.min_crop < 1 and not data_cfg.crops:
        raise ValueError(f"--latent-cache cannot keep the crops of --min-crop {data_cfg.min_crop}, which are "
                         "new in each pass. Add --crops 4")
    if data_cfg.flip:
        raise ValueError(f"--latent-cache cannot keep what --flip {data_cfg.flip} mirrors. Drop one")


def check(cfg: TrainConfig, data_cfg, model_cfg, diff_cfg, text_cfg, scale: int) -> None:
    """Raise ValueError for what is wrong, before any work is done: one line with the value and the limit. The
    values of each field alone are right already. scale: pixels of a picture per position of its latents."""
    clip = cfg.objective == "clip"
    for config in (cfg, data_cfg, model_cfg, diff_cfg, text_cfg):
        for name, value in vars(config).items():
            if clip and CLIP.get(name, value) != value:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {value} is for what draws, not for --objective clip. Leave it")
    if clip and (cfg.batch_size < 2 or cfg.model in model.UNETS):
        raise ValueError(f"--objective clip compares the pictures of a batch by a network of limn's own: use "
                         f"--batch-size 2 or more, not {cfg.batch_size}, and --model small, not {cfg.model}")

    check_caches(data_cfg, model_cfg, text_cfg)
    world = Ranks().world
    unit = world * (cfg.micro_batch or 1)
    if cfg.batch_size % unit:
        near = max(1, cfg.batch_size // unit) * unit
        raise ValueError(f"--batch-size {cfg.batch_size} does not divide over {world} ranks x micro-batch "
                         f"{cfg.micro_batch or 1}. Try {near} or {near + unit}")
    for flag, pattern in {"reinit": cfg.reinit, "train-only": cfg.train_only}.items():
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(f"--{flag} {pattern} is no regular expression: {e}") from None
    if cfg.warmup + cfg.cooldown > cfg.steps:
        say(f"warning: --warmup {cfg.warmup} and --cooldown {cfg.cooldown} do not fit into --steps "
            f"{cfg.steps}: the rate never reaches --lr")
    can_score = cfg.score_every and "--features" in str(shlex.split(cfg.score)) and not data_cfg.lowres
    if (cfg.score_every or cfg.keep_best in SCORES) and not can_score:
        raise ValueError(f"--score-every {cfg.score_every} --score '{cfg.score}' --keep-best {cfg.keep_best} "
                         "scores a stage that draws every so many steps by --score '--features FILE'")
    if cfg.reinit and not (cfg.init or cfg.pretrained):
        raise ValueError(f"--reinit {cfg.reinit} has no effect without --init or --pretrained")
    if model_cfg.weave_resolutions and not text_cfg.transcription:
        raise ValueError(f"--weave-resolutions {model_cfg.weave_resolutions} is for what --transcription "
                         "reads. Add --transcription bytes")
    if data_cfg.lowres and (diff_cfg.prediction != "v" or diff_cfg.schedule == "flow"):
        raise ValueError("--lowres needs --prediction v and a --schedule other than flow")
    if model_cfg.vae and (data_cfg.lowres or data_cfg.picture_mode != "colour"):
        raise ValueError(f"--vae {model_cfg.vae} is for pictures in colour, and without --lowres")
    if cfg.prompts and data_cfg.lowres:
        raise ValueError(f"--prompts {cfg.prompts} is for a stage that draws, and this one enlarges pictures")
    if Path(cfg.out).exists() and not Path(cfg.out).is_dir():
        raise ValueError(f"--out {cfg.out} is a file. Name a directory")
    if not cfg.out.isprintable():
        raise ValueError(f"--out {cfg.out!a} has bytes that are no text. Name another directory")
    if is_published(cfg):
        if not model_cfg.vae or diff_cfg.learn_sigma or data_cfg.crop or text_cfg.transcription:
            raise ValueError("a published U-Net needs --vae, and no --learn-sigma, --crop or --transcription")
        if cfg.size % scale:
            near = cfg.size // scale * scale
            raise ValueError(f"--size {cfg.size} must be a multiple of {scale}. Try {near}")
    else:
        model.check_shape(model_cfg, cfg.size, data_cfg.crop, data_cfg.lowres, scale)
    diffusion.make_schedule(diff_cfg, cfg.size // scale)


# ----------------------------------------------------------------------------------------- devices and ranks
class Ranks:
    """The processes that train together, as torchrun started them; one alone without it."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))

    def agreed(self, value: float) -> float:
        """The largest value of all ranks. On the CPU, so that no GPU is waited for."""
        tensor = torch.tensor([value], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor)

    def equal(self, value: float) -> bool:
        """Whether a number is finite, and the same on all ranks."""
        most, least = self.agreed(value), -self.agreed(-value)
        return most == least and math.isfinite(most)

    def start(self, backend: str, seconds: float) -> None:
        """Meet the others, who wait for one another at most so long, but for a grid as long as it takes.
        Until then a signal ends the process without Python, which learns of none while it waits there."""
        if self.world > 1:
            before = signal.getsignal(signal.SIGTERM)
            on_signal(signal.SIG_DFL)
            dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            on_signal(before)

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier(self.patient)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, own: Tensor) -> Tensor:
        """Rows (B, ...) of all ranks in their order, those of this rank with their gradient."""
        if self.world == 1:
            return own
        rows = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(rows, own.detach().contiguous())
        rows[self.rank] = own
        return torch.cat(rows)


def launch(cfg: TrainConfig, ranks: Ranks) -> torch.device:
    """Start the ranks, choose the device and what it computes with, seed."""
    device = model.choose_device(cfg.device)
    ranks.start("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", cfg.timeout)
    torch.manual_seed(cfg.seed)

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if cfg.dtype == "auto":
        cfg.dtype = fastest_dtype(device)
    if device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)           # its backward pass is slow on a CPU (NOTES.md)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)          # its parts in bfloat16, too
        if not cfg.device:
            say(f"note: no GPU found, using the CPU, --model {cfg.model} and --dtype {cfg.dtype}")
    return device


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def fastest_dtype(device: torch.device) -> str:
    """bf16, but on a GPU without it fp16, with loss scaling, and on a processor without it fp32."""
    if not text_encoder.imitates_bf16(device.type):
        return "bf16"
    return "fp32" if device.type == "cpu" else "fp16"


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """What a large square matrix product reaches here and now, the best of some [operations/second]."""
    n = 8192 if device.type == "cuda" else 1024
    x = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(20):
        start = clock(device)
        x @ x
        best = min(best, clock(device) - start)
    return 2 * n**3 / best


def memory_peak(device: torch.device) -> int:
    """The most memory that was in use up to now, of the GPU or else of this process [bytes]."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                        # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_there(device: torch.device) -> float:
    """What the GPU, or this machine, has in all [bytes]; inf where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):                       # Windows
        return math.inf


def memory_needed(cfg: TrainConfig, crop: int, shape: model.ModelConfig, weights: int) -> int:
    """A training step takes more than this: so many weights with gradient, average and momentum, the pictures
    of the step, and of a part of it noise, x_t and the first feature map [bytes]."""
    side = 0 if shape.vae else crop or cfg.size
    pictures = cfg.batch_size // Ranks().world
    part = cfg.micro_batch or pictures
    first = 2 * shape.channels * (side // shape.patch) ** 2
    return 16 * weights + 3 * side**2 * pictures + (24 * side**2 + first) * part


def count_flops(network: nn.Module, *args, **kwargs) -> int:
    """Floating-point operations (multiply and add are two) of the matrix products of one forward pass, with
    attention taken apart: the counter does not know its fused CPU kernel."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*args, **kwargs)
    return counter.get_total_flops()


def compiled(net: nn.Module, device: torch.device, wanted: bool | None) -> nn.Module:
    """torch.compile(net), where that is wanted (on CUDA it is) and works, which is tried on one number."""
    if wanted is False or (wanted is None and device.type != "cuda"):
        return net
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except Exception as e:                                     # of whatever compiler is or is not there
        reason = f"{type(e).__name__}: {str(e)[:80]}".partition("\n")[0]
        say(f"warning: torch.compile is unavailable ({reason}); running uncompiled")
        return net
    return torch.compile(net)


# ------------------------------------------------------------------------------------------------ objectives
# An objective is a module with
#     inputs(part, device) -> what its forward takes, of a part of a batch;
#     forward(**inputs)    -> a dict of tensors, a row for each picture;
#     loss(given)          -> the sum of the losses of all pictures, from what forward gave of them;
#     joins                   whether the loss of one picture depends on the others (see `backward`);
#     record(meter, inputs, given), after_step(ranks): what it counts and learns beside the gradient;
#     matrices()           -> the weights that Muon may move, and of how many matrices each is made.
# Beside them a run asks for what `Denoising` has (text, space, schedule, config, network, condition, encode,
# and in what forward gives "raw"), so that another objective is best a class derived from it.


def draws(seed: int, purpose: str, uncond_prob: float, first: int, batch_size: int,
          positions: Iterable[int], drops: tuple[float, float] = (0.0, 0.0)) -> dict[str, np.ndarray]:
    """The random numbers of each position, in a data worker: "u", uniform within the picture's own stratum
    of its batch (the batches of `batch_size` start at `first`), "kept", whether it keeps its caption,
    "noise", the key of its noise; "lowres_u" and "lowres_noise", the same of its small picture;
    "transcription_kept". drops: shares of pictures that lose their transcription, and both texts."""
    def columns(purpose):
        rows = []
        for position in positions:
            rng = data.keyed(seed, purpose, position)
            u = np.float32(rng.random())
            rows.append((u, rng.random(), rng.integers(2**63)))
        return [np.array(column) for column in zip(*rows)]

    u, caption_u, noise = columns(purpose)
    lowres_u, _, lowres_noise = columns("lowres")
    told = written = np.ones(len(u), bool)
    if any(drops):                                             # else it would take half as long again
        written_u, both_u, _ = columns(f"{purpose} transcription")
        told = both_u >= drops[1]
        written = told & (written_u >= drops[0])
    index = (np.array(positions) - first) % batch_size
    u = diffusion.stratify(u, index.astype(np.float32), batch_size)
    return {"u": u, "kept": told & (caption_u >= uncond_prob), "noise": noise, "lowres_u": lowres_u,
            "lowres_noise": lowres_noise, "transcription_kept": written}


def finite(x: Tensor) -> Tensor:
    """x without its gradient, and with 0 for what is not finite."""
    return x.detach().nan_to_num(0, 0, 0)


def sent(numbers, device: torch.device) -> Tensor:
    """An array or a tensor, on the device; the host does not wait for it."""
    return torch.as_tensor(numbers).to(device, non_blocking=device.type != "mps")


class Denoising(nn.Module):
    """The objective of diffusion: U-Net, text encoder and loss as one module, for DDP and torch.compile.
    space: where diffusion happens; size, lowres: sides of what is diffused and of small pictures."""
    joins = False

    def __init__(self, unet: nn.Module, text: nn.Module, config: diffusion.DiffusionConfig, space, size: int,
                 lowres: int, max_aug: float):
        super().__init__()
        self.unet, self.config, self.max_aug = unet, config, max_aug
        self.schedule = diffusion.make_schedule(config, size)
        self.small_schedule = diffusion.make_schedule(config, lowres or size)
        vars(self).update(space=space, text=text)              # not registered: no part of the checkpoint
        if text.trainable:
            self.text_encoder = text
        self.uncertainty = diffusion.Uncertainty() if config.loss_weight == "learned" else None
        self.importance = diffusion.Importance() if config.t_density == "importance" else None
        self.squares = 0                                       # its sums since the last step

    def network(self):
        """The U-Net, preconditioned around the small picture where there is one."""
        return diffusion.around(self.unet, self.schedule, self.small_schedule)

    def matrices(self) -> dict[nn.Parameter, int]:
        return self.unet.matrices()

    @torch.no_grad()
    def condition(self, part: dict, device: torch.device) -> model.Tensors:
        """All that the network is told beside x_t and t. Where the text encoder trains along, the text is
        still token ids, see `encode`."""
        words = self.text.inputs(part, device, trim=device.type == "cpu")     # padding costs time there only
        for name in words:
            stream, mask, _ = name.partition("mask")           # of captions, or transcription_
            if mask:
                words[name] = words[name] & sent(part[f"{stream}kept"], device)[:, None]
        condition = words if self.text.trainable else self.text(**words)
        if "lowres" not in part:
            return condition

        small = self.space.encode(sent(part["lowres"], device))
        t = self.max_aug * sent(part["lowres_u"], device)
        eps = diffusion.gaussian(sent(part["lowres_noise"], device), small.shape[1:])
        return condition | diffusion.augmented(small, eps, t, self.small_schedule)

    def encode(self, **condition) -> model.Tensors:
        """The condition of the network, from token ids where the text encoder trains along."""
        if not self.text.trainable:
            return condition
        small = {name: condition.pop(name) for name in ("lowres", "lowres_t") if name in condition}
        return self.text_encoder(**condition) | small

    @torch.no_grad()
    def inputs(self, part: dict, device: torch.device) -> model.Tensors:
        x0 = sent(part["picture"], device)
        if x0.dtype == torch.uint8:                            # else latents, out of a cache
            x0 = self.space.encode(x0)
        eps = diffusion.gaussian(sent(part["noise"], device), x0.shape[1:])
        u = torch.as_tensor(part["u"])
        if self.importance:
            t, weight = self.importance.draw(sent(u, device))
        else:
            t = sent(diffusion.draw_t(u, self.config, self.schedule), device)
            weight = torch.ones_like(t)
        return {"x0": x0, "eps": eps, "t": t, "weight": weight, **self.condition(part, device)}

    def forward(self, x0: Tensor, eps: Tensor, t: Tensor, weight: Tensor, **condition) -> model.Tensors:
        """Losses (B,) of pictures x0 noised by eps at t, see diffusion.losses: "weighted" is minimised."""
        plain, raw = diffusion.losses(self.network(), x0, eps, t, self.schedule, self.config,
                                      limit=self.space.limit, **self.encode(**condition))
        loss = plain
        if self.uncertainty:
            loss = self.uncertainty.weigh(plain, self.schedule.logsnr(t))
        return {"weighted": weight * loss, "loss": loss, "plain": plain, "raw": raw}

    def loss(self, given: model.Tensors) -> Tensor:
        return given["weighted"].sum()

    def record(self, meter: "Meter", inputs: model.Tensors, given: model.Tensors) -> None:
        raw = finite(given["raw"])
        buckets = diffusion.loss_buckets(raw, self.schedule.logsnr(inputs["t"]), BUCKETS)
        meter.add(loss=given["loss"], raw_loss=raw, buckets=buckets)
        if self.importance:
            square = finite(given["plain"]).square()
            sums = diffusion.bucket_sums(square, inputs["t"], len(self.importance.second_moment))
            self.squares += torch.stack(sums)

    def after_step(self, ranks: Ranks) -> None:
        if self.importance:
            self.importance.update(*ranks.sum_(self.squares))
            self.squares = 0


class Contrastive(Denoising):
    """The objective of a CLIP on noised pictures: picture and caption find each other among all of a batch
    (Radford et al. 2021, arXiv:2103.00020, figure 3). unet: a model.CLIP; the others as of Denoising."""
    joins = True

    @torch.no_grad()
    def inputs(self, part: dict, device: torch.device) -> model.Tensors:
        marks = [zlib.crc32(caption.encode()) % 2**24 for caption in part["captions"]]   # exact in float32
        return super().inputs(part, device) | {"caption": sent(torch.tensor(marks), device).float()}

    def forward(self, x0: Tensor, eps: Tensor, t: Tensor, weight: Tensor, caption: Tensor,
                **condition) -> model.Tensors:
        """Features (B, E) of pictures x0 noised by eps at t and of their captions, what similarities are
        multiplied by, (B,), and hashes of the captions (B,)."""
        x_t = diffusion.noised(x0, eps, t, self.schedule)
        return {"seen": self.unet(x_t, t), "read": self.unet.read(**self.encode(**condition)),
                "scale": self.unet.scale().expand(len(t)), "caption": caption}

    def compared(self, given: model.Tensors) -> tuple[Tensor, Tensor]:
        """Logits (N, N) of pictures (rows) and captions, float32; whether captions are the same, (N, N)."""
        with torch.autocast(given["seen"].device.type, enabled=False):
            logits = given["scale"].mean() * given["seen"] @ given["read"].T
        caption = given["caption"]
        return logits, caption[:, None] == caption

    def loss(self, given: model.Tensors) -> Tensor:
        """Cross-entropy of the right caption for each picture and of the right picture for each caption, the
        mean of both; other pictures with the same caption are not counted as wrong."""
        logits, same = self.compared(given)
        right = torch.arange(len(logits), device=logits.device)
        others = same & (right[:, None] != right)
        logits = logits.masked_fill(others, -math.inf)
        both = [nn.functional.cross_entropy(way, right, reduction="sum") for way in (logits, logits.T)]
        return sum(both) / 2

    def record(self, meter: "Meter", inputs: model.Tensors, given: model.Tensors) -> None:
        meter.add(scale=given["scale"])


# ------------------------------------------------------------------------------------- optimizer and averages
# Three passes of x -> a x + b (x x^T) x + c (x x^T)^2 x bring singular values near 1: from 0.2 to 2.
PASSES = (8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518)
TOGETHER = 4                                                   # matrices in a product: it rounds by how many


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T of x (n, rows, columns), in bfloat16 or, where that is not the
    fastest, in float32: Newton-Schulz, coefficients of Amsel et al. 2025, arXiv:2505.16932, algorithm 1, on
    x x^T (Zhang et al. 2026, Gram Newton-Schulz)."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    if fastest_dtype(x.device) == "bf16":
        x = x.bfloat16()
    x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)

    gram = x @ x.mT                                                                   # (n, rows, rows)
    rotation = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
    rotation = rotation.expand(len(x), -1, -1)
    square = gram
    for number, (a, b, c) in enumerate(PASSES):
        if number:                                             # from the start, so errors do not add up
            square = rotation @ gram @ rotation
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        rotation = torch.baddbmm(rotation, polynomial, rotation, beta=a)
    return rotation @ x


def unstacked(stacked: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Views of a stack of matrices (n, rows, columns) in the shapes of the weights it is made of."""
    parts = stacked.flatten().split([p.numel() for p in weights])
    views = []
    for part, p in zip(parts, weights):
        last = part.view(len(p), *p.shape[2:], p.shape[1])     # channels last, as the weights lie
        views.append(last.movedim(-1, 1))
    return views


def matching(pattern: str, names: Iterable[str]) -> set[str]:
    """The names in which a regular expression finds something. ValueError where it looks for over 10 s."""
    def late(*_):
        raise ValueError(f"the pattern {pattern} needs over 10 s for the names of weights. Use a simpler one")

    if hasattr(signal, "setitimer"):                           # Windows has none
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 10)
    found = {name for name in names if re.search(pattern, name)}
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    return found


def follow(averages: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """averages += share (weights - averages); share () lies beside them, and is not read."""
    if share.is_cpu:                                           # one pass over memory
        torch._foreach_lerp_(averages, weights, [share] * len(averages))
        return
    steps = torch._foreach_sub(weights, averages)              # shares in a list are a launch each
    torch._foreach_mul_(steps, share)
    torch._foreach_add_(averages, steps)


class State:
    """What a checkpoint holds: trained weights, the average to sample from, the optimizer's moments.
    AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) decays matrices only. matrices: weights that move by
    Muon instead (Jordan et al. 2024), as far as AdamW would move them (Liu et al. 2025, arXiv:2502.16982,
    eq. 4), and of how many matrices each is made. clip: largest norm of the gradient, 0 = any. fp16: scale
    the loss. snapshots: how many are kept of the averages of PROFILES, from which sample.py makes one of any
    width; 0 = none, which saves twice the weights. train_only: a pattern of names, the others never move;
    ValueError where there is none."""

    def __init__(self, net: nn.Module, weight_decay: float, clip: float, ema_decay: float, fp16: bool,
                 snapshots: int = 0, train_only: str = "", matrices: dict[nn.Parameter, int] | None = None):
        self.net, self.clip, self.snapshots = net, clip or math.inf, snapshots
        self.ema = copy.deepcopy(net).requires_grad_(False).eval()
        self.weights = list(net.parameters())
        device = self.weights[0].device
        self.updates = torch.zeros((), device=device)          # without skipped ones
        self.skipped = torch.zeros((), device=device)          # in a row, up to now

        # Who moves by what.
        self.frozen, stacks = [], {}
        named = dict(net.named_parameters())
        trained = matching(train_only, named)
        if not trained:
            raise ValueError(f"--train-only {train_only} is no weight, as {next(iter(net.state_dict()))} is")
        for name, p in named.items():
            if name not in trained:
                self.frozen.append(p)
            elif matrices and p in matrices:
                shape = len(p) // matrices[p], p[0].numel()
                stacks.setdefault(shape, []).append(p)
        decayed = {"params": [p for p in self.weights if p.ndim > 1], "weight_decay": weight_decay}
        others = {"params": [p for p in self.weights if p.ndim < 2], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([decayed, others], betas=(0.9, 0.99), fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.stacks = []
        for shape, group in stacks.items():
            count = sum(matrices[p] for p in group)
            momentum = torch.zeros(count, *shape, device=device)
            self.stacks.append((group, momentum))
            for p, own in zip(group, unstacked(momentum, group)):
                self.optimizer.state[p]["momentum"] = own

        # Averages: exponent, cap of the decay, weights.
        self.averages = [(0.0, ema_decay, list(self.ema.parameters()))]
        self.profiles = {}
        for width, exponent in PROFILES.items() if snapshots else ():
            self.profiles[width] = [p.detach().clone() for p in self.weights]
            self.averages.append((exponent, 1.0, self.profiles[width]))

    @torch.no_grad()
    def update(self, lr: float) -> tuple[Tensor, Tensor]:
        """One step of the weights, and of the averages; neither moves where the gradient is not finite.
        The decay of an average at the n-th update is (1 - 1/n)^(exponent + 1), which makes it a power
        function of time (Karras et al. 2023, arXiv:2312.02696, section 3.1), but at most its cap: exponent 0
        is the plain average up to n = 1 / (1 - ema_decay), then the exponential one. Returns the gradient's
        norm before clipping, and 1.0 for an update that was skipped: nothing here waits for the device."""
        for p in self.frozen:
            p.grad = None
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.weights, self.clip)              # equal on all ranks
        bad = (~norm.isfinite()).float()
        if not self.scaler.is_enabled():                       # fused AdamW skips by what scalers use
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stacks:
            self.muon(lr * (1 - bad))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

        self.updates += 1 - bad
        self.skipped = (self.skipped + 1) * bad
        for exponent, cap, average in self.averages:
            log_decay = torch.log1p(-1 / self.updates.clamp(min=1))
            weight = -torch.expm1((exponent + 1) * log_decay)                 # 1 - decay
            weight = (1 - bad) * weight.clamp(min=1 - cap)
            follow(average, self.weights, weight)
        return norm, bad

    def muon(self, lr: Tensor) -> None:
        """Muon; lr () 0: nothing moves. Ranks deal out the passes, TOGETHER matrices at a time, so that one
        rank computes the same bits, and meet once. AdamW then finds no gradient here."""
        ranks, dealt = Ranks(), itertools.count()
        sizes = [momentum.numel() for _, momentum in self.stacks]
        turned = torch.zeros(sum(sizes), dtype=torch.bfloat16, device=lr.device)
        stacks = list(zip(self.stacks, turned.split(sizes)))
        for (weights, momentum), part in stacks:
            grads = torch.cat([p.grad.movedim(1, -1).flatten() for p in weights])
            grads = grads.view_as(momentum)
            momentum.lerp_(grads.nan_to_num_(0, 0, 0), 0.05 * (lr > 0))
            ahead = grads.lerp_(momentum, 0.95)                               # Nesterov's
            for some, result in zip(ahead.split(TOGETHER), part.view_as(ahead).split(TOGETHER)):
                if next(dealt) % ranks.world == ranks.rank:
                    result.copy_(orthogonal(some))
            for p in weights:
                p.grad = None

        ranks.sum_(turned)                                     # of each matrix all ranks but one have 0
        decay = self.optimizer.param_groups[0]["weight_decay"]
        for (weights, momentum), part in stacks:
            size = 0.2 * math.sqrt(max(momentum.shape[1:])) * lr
            torch._foreach_mul_(weights, 1 - lr * decay)
            torch._foreach_sub_(weights, unstacked((part * size).float(), weights))

    def count(self) -> int:
        """Parameters, text encoder and all."""
        return sum(p.numel() for p in self.weights)

    def size(self) -> float:
        """The sum of the norms of weights and averages: equal on all ranks, inf where one is not finite."""
        tensors = list(self.weights)
        for _, _, average in self.averages:
            tensors += average
        norms = torch._foreach_norm(tensors)
        total = float(torch.stack(norms).detach().cpu().double().sum())
        return total if math.isfinite(total) else math.inf

    def tensors(self) -> dict[str, model.Tensors]:
        """The two files of a checkpoint, {"ema", "train"}, under plain names."""
        train = {"updates": self.updates}
        for name, value in self.net.state_dict().items():
            train[f"weights.{name}"] = value
        for name, p in self.net.named_parameters():
            for part, value in self.optimizer.state.get(p, {}).items():
                train[f"optimizer.{name}.{part}"] = value
        return {"ema": self.ema.state_dict(), "train": train | self.snapshot()}

    def snapshot(self) -> model.Tensors:
        """The profiles under names "profile.WIDTH.NAME"."""
        found = {}
        for width, values in self.profiles.items():
            for (name, _), value in zip(self.net.named_parameters(), values):
                found[f"profile.{width}.{name}"] = value
        return found

    def load(self, ema: model.Tensors, train: model.Tensors, scaler: dict) -> None:
        """The inverse of `tensors`, bit for bit, and the scaler's state. ValueError where they do not fit."""
        parts = defaultdict(dict)
        for key, value in train.items():
            kind, _, name = key.partition(".")
            parts[kind][name] = value
        named = dict(self.net.named_parameters())
        updates = self.updates
        try:
            self.ema.load_state_dict(ema)
            self.net.load_state_dict(parts["weights"])
            for key, value in parts["optimizer"].items():
                name, _, part = key.rpartition(".")
                like = named[name]                             # moments in the memory layout of weights
                if part == "step":
                    like = self.updates
                    updates = value
                moment = self.optimizer.state[named[name]].setdefault(part, torch.empty_like(like))
                moment.copy_(value)

            self.updates.copy_(train.get("updates", updates))  # of before Muon: AdamW counted them
            for name, value in self.snapshot().items():
                value.copy_(train[name])
        except (RuntimeError, LookupError, ValueError) as e:
            raise ValueError(f"the checkpoint does not fit these flags: {str(e)[:200]}") from e
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)


def rate(step: int, cfg: TrainConfig) -> float:
    """The learning rate of a step: linear warm-up, constant, linear cooldown to 0."""
    rising = (step + 1) / (cfg.warmup + 1)
    falling = (cfg.steps - step) / (cfg.cooldown + 1)
    return cfg.lr * min(1.0, rising, falling)


# ---------------------------------------------------------------------------------- checkpoints and their run
def lock(run: Path) -> None:
    """Hold `run`/.lock until the process ends; remove what a killed save left. ValueError if it is in use."""
    run.mkdir(parents=True, exist_ok=True)
    follows = getattr(os, "O_NOFOLLOW", 0)                     # a link: it would empty what it leads to
    fd = os.open(run / ".lock", os.O_RDWR | os.O_CREAT | follows, 0o666)      # closed when the process ends
    try:
        try:
            import fcntl
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)     # not inherited by data workers, as flock is
        except ImportError:                                    # Windows
            import msvcrt
            os.lseek(fd, 1000, os.SEEK_SET)                    # behind the text, which others read
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(fd, 0, os.SEEK_SET)
    except (BlockingIOError, PermissionError):                 # POSIX allows either
        owner = os.read(fd, 200).decode(errors="replace") or "another run"
        raise ValueError(f"{run} is in use by {owner}. Use another --out") from None
    except OSError as e:
        say(f"warning: {run} is on a disk without locks ({e.strerror}): let no other run write there")
    os.truncate(fd, 0)
    os.write(fd, f"pid {os.getpid()} on {socket.gethostname()}".encode())
    for left in [*run.glob(".tmp-*"), *run.glob("*/.tmp-*"), *run.glob("*/best/.tmp-*")]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def save_checkpoint(run: Path, step: int, files: dict, meta: dict, keep: int, own: dict | None = None):
    """Publish `run`/checkpoints/STEP with a file of tensors for each of `files`, all at once or not at all;
    `own`: what the metadata of some of them says otherwise.
    Temporary folder, fsync of the files and the folder, rename, fsync of the parent; only then are older
    checkpoints pruned to the last `keep`. An OSError before that leaves everything as it was."""
    parent = run / "checkpoints"
    target = parent / f"{step:06d}"
    temp = parent / f".tmp-{step:06d}"
    shutil.rmtree(temp, ignore_errors=True)
    try:
        temp.mkdir(parents=True)
        for name, tensors in files.items():
            model.save_tensors(temp / f"{name}.safetensors", tensors, meta | (own or {}).get(name, {}))
        if target.exists():                                    # of this step, and damaged: keep it aside
            os.replace(target, parent / f"{target.name}.damaged-{os.getpid()}")
        os.replace(temp, target)
        model.fsync(parent)
    except OSError:
        shutil.rmtree(temp, ignore_errors=True)
        raise

    older = [path for path in model.checkpoint_folders(run) if int(path.name) <= step]
    for path in older[:-keep]:                                 # never half a checkpoint under its name
        doomed = parent / f".tmp-{path.name}"
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)              # lock() clears what stays
    return target


def save_snapshot(folder: Path, step: int, tensors: model.Tensors, updates: int, most: int) -> None:
    """Write `folder`/STEP.safetensors, whole or not at all; of all of them the newest and most even stay."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_tensors(folder / f"{step:06d}.safetensors", tensors, {"updates": str(updates)})
    there = sorted(int(path.stem) for path in folder.glob("[0-9]*.safetensors"))
    steps = [0, *(number for number in there if number <= step)]
    while len(steps) > most + 1:
        gaps = [after - before for before, after in zip(steps, steps[2:])]
        crowded = 1 + gaps.index(min(gaps))                    # its neighbours are nearest
        (folder / f"{steps.pop(crowded):06d}.safetensors").unlink()


def without_folders(config: str) -> str:
    """A configuration, JSON, for the file that is shared: without where things lie on this machine."""
    recipe = json.loads(config)
    for group in recipe.values():
        for name in ("out", "init", "pretrained", "data", "text_cache", "text_shards", "latent_cache",
                     "prompts", "score", "class_names", "shard_cache"):
            group.pop(name, None)
    names = [Path(name).name for name in recipe["TextConfig"]["text_encoder"]]
    recipe["TextConfig"]["text_encoder"] = names
    recipe["ModelConfig"]["vae"] = Path(recipe["ModelConfig"]["vae"]).name
    return json.dumps(recipe)


def save(journal, step: int, state: State, meta: dict, keep: int, last: bool, ranks: Ranks) -> None:
    """Publish a checkpoint of what is the same on every rank, else the run ends, and a snapshot of the
    profiles, if any. Training survives a disk that is full, unless this is the last one."""
    if not ranks.equal(state.size()):
        die(f"the weights of step {step} are not finite, or differ between ranks: not saved. "
            "The same command goes on from the last checkpoint", status=1)
    out = journal.out
    if not out:
        return

    meta = {**meta, "step": str(step), "scaler": json.dumps(state.scaler.state_dict())}
    shared = {"ema": {"config": without_folders(meta["config"])}}
    try:
        if state.profiles:
            save_snapshot(out / "profiles", step, state.snapshot(), int(state.updates), state.snapshots)
        say(f"saved {save_checkpoint(out, step, state.tensors(), meta, keep, shared)}")
    except OSError as e:
        if last:
            die(f"the last checkpoint, step {step}, could not be written: {e}", status=1)
        say(f"warning: checkpoint at step {step} not written ({e}); training continues")
    journal.saved = time.monotonic()
    (out / "save").unlink(missing_ok=True)


def keep_best(out: Path, state: State, meta: dict, line: dict, name: str) -> None:
    """Write `out`/checkpoints/best/ema.safetensors, the averaged weights, if `name` is the best so far in
    a line. Training survives a disk that is full, and a damaged old file."""
    path = out / "checkpoints/best/ema.safetensors"
    own = {name: str(line[name]) for name in ("step", name)}
    own["config"] = without_folders(meta["config"])
    sign = -1 if name in ("val_gap", "precision", "recall", "clip_score") else 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = model.load_tensors(path)[1].get(name, "nan") if path.exists() else "nan"
        if math.isfinite(line[name]) and not sign * float(before) <= sign * line[name]:
            model.save_tensors(path, state.ema.state_dict(), meta | own)
    except (OSError, ValueError) as e:
        say(f"warning: {path} not written ({e}); training continues")


def resume(out: Path, state: State, configs: Configs, pictures: data.Pictures, net: Denoising) -> tuple:
    """(steps, pictures) of the newest checkpoint that verifies, loaded into `state`; (0, 0) without one."""
    found = model.load_checkpoint(out, ("train", "ema"), lambda line: say(f"warning: {line}"))
    if found is None:
        return 0, 0
    folder, (train, ema), meta = found

    with model.reading(folder):
        stored = {group: dict(fields) for group, fields in json.loads(meta["config"]).items()}
        step, images = int(meta["step"]), int(meta["images"])
        scaler, made_on = dict(json.loads(meta["scaler"])), json.loads(meta["versions"])
        made_with = meta["text"]
        model.check("step", step, int, "[0..1e9]")
        model.check("images", images, int, "[0..1e15]")

    # Shape must match, the rest is noted.
    for config in configs:
        group = type(config).__name__
        for name, value in dataclasses.asdict(config).items():
            flag = f"--{name.replace('_', '-')}"
            old = stored.get(group, {}).get(name, getattr(type(config)(), name))
            moved = name == "pretrained" and old and value
            if name in MACHINE or moved or json.dumps(old) == json.dumps(value):
                continue
            if name in SHAPE or group in SHAPE or WITH_WEIGHTS & {str(old), str(value)}:
                raise ValueError(f"the checkpoint has {flag} {old}, not {value}. Use that, or another --out")
            say(f"note: {flag} {old} -> {value} (checkpoint -> this run)")

    if not text_encoder.same_encoder(made_with, net.text.fingerprint):
        raise ValueError(f"the text encoder is {net.text.fingerprint}, not {made_with}. Use another --out")
    if meta.get("space", "") != net.space.fingerprint:
        old = stored["ModelConfig"].get("vae", "")
        raise ValueError(f"the checkpoint has --vae {old!r}, not {configs[2].vae!r}. Use another --out")
    if meta.get("data") != pictures.fingerprint:
        say("warning: the pictures or captions are not those of the checkpoint: they differ from here on")
    if made_on != VERSIONS:
        say(f"note: {made_on} -> {VERSIONS}: it continues, but not bit for bit")
    state.load(ema, train, scaler)
    say(f"resumed from step {step} ({folder})")
    return step, images


def alone(name: str) -> str:
    """The name of a weight where its text encoder is the only one."""
    return re.sub(r"^text\.(captions\.)?(trained\.\d+\.)?", "text.", name)


@torch.no_grad()
def warm_start(net: nn.Module, tensors: model.Tensors, reinit: str = "") -> str:
    """Copy weights by name, of those that changed size the common part; `reinit`: names to leave, a pattern.
    An encoder of captions is the same with others beside it. Returns a report: how many were copied, which
    were sliced, which are new, which had no place."""
    found = {"copied": [], "sliced": [], "new": []}
    weights = net.state_dict()                                 # which holds the weights themselves
    left = matching(reinit, weights) if reinit else ()
    names = {alone(name): name for name in sorted(tensors, reverse=True)}
    unused = set(tensors)
    for name, p in weights.items():
        source = name if name in tensors else names.get(alone(name))
        unused.discard(source)
        old = tensors.get(source)
        if old is None or old.ndim != p.ndim or name in left:
            found["new"].append(name)
            continue
        common = tuple(slice(min(lengths)) for lengths in zip(old.shape, p.shape))
        p[common] = old[common].to(p)
        found["copied" if old.shape == p.shape else "sliced"].append(name)
    found["unused"] = sorted(unused)

    report = []
    for kind, names in found.items():
        shown = "" if kind == "copied" else " ".join(names[:8])
        report.append(f"{len(names)} {kind}: {shown}".rstrip(": "))
    return ", ".join(report)


# --------------------------------------------------------------------------------------------- parts of a run
def no_embedding(reader: text_encoder.Reader, caption: str, beside: bytes) -> tuple:
    """A dry run's: as large as can be, and nothing is computed."""
    return torch.zeros(reader.length, reader.dim).bfloat16(), torch.zeros(reader.pooled_dim).bfloat16()


def no_latent(channels: int, side: int) -> tuple:
    """A dry run's."""
    return torch.zeros(channels, side, side),


def embedding_inside(fingerprint: str, caption: str, beside: bytes) -> tuple:
    return data.Cache("its .t5.safetensors", fingerprint, beside)[caption]


def prompts_of(cfg: TrainConfig) -> list[str]:
    """The prompts of grids, if they are given."""
    content = Path(cfg.prompts).read_bytes() if cfg.prompts else b""
    text, _ = data.read_text(content)
    lines = map(data.clean, text.splitlines())
    return [line for line in lines if line]


def embedding_of(cache: data.Cache, caption: str, beside: bytes) -> tuple:
    return cache[caption]


def embedded_by(pictures: data.Pictures) -> str:
    """What made the embeddings inside shards, by the first that there are, "" without any."""
    for source in pictures.sources:
        source.embedded = True
        for i in range(min(len(source), 100)):
            content = source.sample(i).meta.get("embeddings")
            if content:
                size = int.from_bytes(content[:8], "little")
                header = json.loads(content[8:8 + size])
                return header.get("__metadata__", {}).get("fingerprint", "")
    return ""


def say_cut(cut: int, captions: int) -> None:
    say(f"note: {cut} of {captions} captions are cut. See --text-length")


def filled(cache: data.Cache, texts: Iterable[str], encode, part: int, signals: Signals, ranks: Ranks,
           what: str) -> data.Cache:
    """A cache with what the ranks put into it, each of its own `texts`, `part` of them to a file.
    Raises Stopped where a signal arrives; what was computed until then is kept."""
    def until_signal(items):
        return itertools.takewhile(lambda _: not signals.arrived, items)

    # A part each, then the ranks meet, until none of them has any left.
    ours = filter(lambda text: zlib.crc32(text.encode()) % ranks.world == ranks.rank, texts)
    parts = cache.fill(until_signal(ours), lambda texts: until_signal(encode(texts)), part)
    signals.awaited = True
    with progress(ranks, desc=what) as bar:
        for written in itertools.chain(parts, itertools.repeat(0)):
            bar.update(written)
            more = ranks.agreed(written)
            if ranks.agreed(signals.arrived):
                raise Stopped
            if not more:
                break
    signals.awaited = False
    return data.Cache(cache.name, cache.fingerprint)           # with what the others wrote


def load_latents(configs: Configs, sets: list[data.Pictures], net: "Denoising", device: torch.device,
                 signals: Signals, ranks: Ranks) -> data.Cache | dict:
    """The cache of what the VAE makes of the pictures of `sets`; in a dry run all are zeros. Those that
    cannot be read are left out: they are replaced, and counted, when drawn. Raises Stopped, see `filled`."""
    cfg, data_cfg, *_ = configs
    if cfg.dry_run:
        side = sets[0].size // net.space.scale
        return defaultdict(partial(no_latent, net.space.channels, side))
    left_out = []
    readers = {}
    for pictures in sets:
        readers.update(pictures.squares())

    def encode(texts):
        for i, text in enumerate(texts):
            try:
                picture = readers[text]()
            except Exception as e:                             # decoders raise nearly anything on garbage
                left_out.append(f"{text}: {e}")
                continue
            yield i, net.space.encode(torch.from_numpy(picture)[None].to(device))[0].cpu()

    cache = data.Cache(Path(data_cfg.latent_cache), f"{net.space.fingerprint} {sets[0].size}")
    cache = filled(cache, readers, encode, 256, signals, ranks, "latents")
    if left_out:
        say(f"warning: {len(left_out)} pictures have no latents and are replaced, the first {left_out[0]}")
    return cache


def load_text(configs: Configs, sets: list[data.Pictures], device: torch.device, signals: Signals,
              ranks: Ranks) -> tuple[nn.Module, list[data.Cache]]:
    """The text encoder, and the caches of its frozen ones, in which the ranks put the captions of `sets`.
    Raises Stopped, see `filled`."""
    cfg, *_, text_cfg = configs
    caches = []

    def look_up(number, encoder, load):
        if cfg.dry_run:
            return partial(no_embedding, encoder.reader)
        if text_cfg.text_cache == "shards":
            return partial(embedding_inside, encoder.fingerprint)

        def encode(texts):
            load()
            return text_encoder.encode_captions(encoder.to(device), texts)

        cache = data.Cache(Path(text_cfg.text_cache, str(number)), encoder.fingerprint)
        empty = [""] if encoder.reader.empty else []
        captions = itertools.chain(empty, prompts_of(cfg), *(pictures.captions() for pictures in sets))
        cache = filled(cache, captions, encode, 1024, signals, ranks, "captions")
        counts = encoder.reader.counts
        if counts["cut"]:
            say_cut(counts["cut"], counts["captions"])
        caches.append(cache)
        return partial(embedding_of, cache)

    stored = embedded_by(sets[0]) if text_cfg.text_cache == "shards" and not cfg.dry_run else ""
    text = text_encoder.load_text_encoder(text_cfg, look_up if text_cfg.text_cache else None, stored)
    return text.to(device), caches


def check_pictures(configs: Configs) -> int:
    """`data.py --check` of --data, with the tokens of its captions and what --text-cache lacks of them."""
    cfg, data_cfg, *_, text_cfg = configs
    readers = []

    def look_up(_, encoder, load):
        cache = None
        if text_cfg.text_cache not in ("", "shards"):
            cache = data.Cache(Path(text_cfg.text_cache, str(len(readers))), encoder.fingerprint)
        readers.append((encoder.reader, cache))

    for name in text_cfg.text_encoder:
        alone = dataclasses.replace(text_cfg, text_encoder=[name], transcription="")
        text = text_encoder.load_text_encoder(alone, look_up)
        if name == "bytes":
            readers.append((text.reader, None))
    return data.report(data_cfg, cfg.check, readers)


def check_text_shards(pictures: data.Pictures, text_cfg: text_encoder.TextConfig) -> list[str]:
    """The shards that --text-shards copies; ValueError where that cannot be, before any work."""
    try:
        shards = pictures.shards()
        if text_cfg.text_cache in ("", "shards") or set(text_cfg.text_encoder) == {"bytes"}:
            raise ValueError("")
    except ValueError as e:
        raise ValueError(f"--text-shards {text_cfg.text_shards} needs a folder as --text-cache, a frozen "
                         "--text-encoder, no --limit or --filter, and --data of nothing but whole tar shards "
                         f"with names of their own. {e}".rstrip()) from None
    return shards


def write_text_shards(shards: list[str], folder: Path, caches: list[data.Cache], config: data.DataConfig,
                      ranks: Ranks) -> None:
    """Copies of this rank's share of shards, with what the caches have of each caption beside its picture."""
    def beside(texts):
        tensors, meta = {}, {}
        for cache in caches:
            more, marks = cache.pack({text: cache[text] for text in texts}, meta)
            tensors |= more
            meta |= marks
        return safetensors.torch.save(tensors, meta)

    folder.mkdir(parents=True, exist_ok=True)
    for path in shards[ranks.rank::ranks.world]:
        target = folder / Path(path).name
        if target.exists():
            say(f"kept {target}, which was there")
            continue
        data.copy_shard(path, str(target), beside, config)
        say(f"wrote {target}")


def published(configs: Configs, text: nn.Module, space) -> model.UNet2DConditionModel:
    """The U-Net of --pretrained, to go on with, or of --model from scratch, as is what --reinit matches, and
    all of a folder with nothing but a config.json. ValueError where it does not fit the VAE."""
    cfg, *_, text_cfg = configs
    folder = Path(cfg.pretrained, "unet")
    widths = text.dim, text.pooled_dim
    if cfg.pretrained and text_cfg.text_encoder == model.open_pipeline(cfg.pretrained)["text_encoder"]:
        if text_cfg.text_cache == "shards" or not text_cfg.text_padding:
            raise ValueError("a pipeline's own text encoder needs --text-padding, and no --text-cache shards")
        widths = 0, 0                                          # its own

    if not cfg.pretrained:
        config = model.UNETS[cfg.model] | dict.fromkeys(("in_channels", "out_channels"), space.channels)
        unet = model.UNet2DConditionModel(config, *widths)
    elif [*folder.glob("*")] == [folder / "config.json"]:
        say(f"note: {folder} has no weights, so it starts from scratch")
        unet = model.UNet2DConditionModel(model.read_config(folder), *widths)
    else:
        unet = model.load_unet(folder, *widths)
        if cfg.reinit and not cfg.init:
            fresh = model.UNet2DConditionModel(unet.config, *widths)
            say(f"from {folder}: {warm_start(fresh, unet.state_dict(), cfg.reinit)}")
            unet = fresh
    channels = unet.config["in_channels"]
    if channels != space.channels:
        raise ValueError(f"the U-Net reads {channels} channels, the VAE gives {space.channels}. Use its own")
    return unet


def build(configs: Configs, text: nn.Module, device: torch.device) -> Denoising:
    """What is trained, from the flags; weights of --init where the run is new."""
    cfg, data_cfg, model_cfg, diff_cfg, _ = configs
    space = diffusion.Pixels(len(data.MODES[data_cfg.picture_mode]))
    if model_cfg.vae:
        space = model.load_vae(model_cfg.vae, model_cfg.vae_dtype).to(device)
    small = len(data.MODES[data_cfg.lowres_mode]) if data_cfg.lowres else 0
    side = cfg.size // space.scale
    kind = Contrastive if cfg.objective == "clip" else Denoising
    if is_published(cfg):
        unet = published(configs, text, space)
    else:
        shape = model_cfg, side, text.dim, text.pooled_dim, space.channels
        make = partial(model.UNet, *shape, small, diff_cfg.learn_sigma, text.written_dim)
        if kind is Contrastive:
            make = partial(model.CLIP, *shape)
        with torch.device("meta"):
            count = sum(p.numel() for p in make().parameters())
        needed, there = memory_needed(cfg, data_cfg.crop, model_cfg, count), memory_there(device)
        if needed > there:
            gib = f"{needed / 2**30:.0f} GiB or more, of {there / 2**30:.0f}"
            raise ValueError(f"a step of {count / 1e6:.0f} M weights and its pictures needs {gib}. Use a "
                             "smaller --model, --batch-size or --micro-batch")
        unet = make()
    unet.checkpointing = cfg.checkpointing
    objective = kind(unet, text, diff_cfg, space, side, data_cfg.lowres, cfg.max_aug).to(device)
    if cfg.init and not model.checkpoint_folders(Path(cfg.out)):
        _, weights, _ = model.read(Path(cfg.init))
        say(f"from {cfg.init}: {warm_start(objective, weights, cfg.reinit)}")
    if is_published(cfg) and unet.adapter is None:             # what it is told of captions that are dropped
        said = text.encode([""], device)
        unet.empty = said["context"], said["pooled"]
    return objective


def parts_of(batch: dict, size: int) -> list[dict]:
    """A batch, whose first entry has a row for each picture, in parts of up to `size` pictures."""
    first, *_ = batch.values()
    parts = []
    for start in range(0, len(first), size):
        parts.append({name: value[start:start + size] for name, value in batch.items()})
    return parts


# -------------------------------------------------------------------------------------- what a user looks at
def number(x: float) -> float:
    """With enough digits for a log."""
    return float(f"{float(x):.6g}")


class Meter:
    """Named sums on the device: `add` waits for nothing, `read` is where the host waits."""

    def __init__(self):
        self.sums = {}                                         # by name: (sums, counts)

    def add(self, **values) -> None:
        """Count values, a tensor of one for each picture or update, 0 for what is not finite; or (sums,
        counts) of several."""
        for name, value in values.items():
            if not isinstance(value, tuple):
                value = finite(value).sum(), value.numel()
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + value[0], count + value[1]

    def read(self, ranks: Ranks, device: torch.device) -> tuple[dict, dict]:
        """(sums, counts) of all ranks by name, each a list of numbers; starts anew."""
        columns = []
        for value in itertools.chain(*self.sums.values()):
            columns.append(torch.as_tensor(value, device=device).float().flatten())
        numbers = ranks.sum_(torch.cat(columns)).cpu().double()               # MPS has no double
        values = [part.tolist() for part in numbers.split([len(column) for column in columns])]
        names = list(self.sums)
        self.sums = {}
        return dict(zip(names, values[::2])), dict(zip(names, values[1::2]))


def flat(line: dict) -> dict[str, float]:
    """A line of metrics.jsonl with its lists as NAME/0, NAME/1, ..."""
    found = {}
    for name, value in line.items():
        if isinstance(value, list):
            found |= {f"{name}/{i}": one for i, one in enumerate(value)}
        else:
            found[name] = value
    return found


def to_tensorboard(out: Path, recipe: dict) -> tuple[Callable, Callable]:
    """Functions that log (step, numbers by name, pictures by name), and that end it. ImportError without
    it."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(out / "tensorboard"))
    writer.add_text("config", json.dumps(recipe, indent=1))

    def log(step, numbers, pictures):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        for name, picture in pictures.items():
            writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    return log, writer.close


def to_wandb(out: Path, recipe: dict) -> tuple[Callable, Callable]:
    """The same of Weights and Biases."""
    import wandb
    board = wandb.init(project="limn", name=out.name, dir=str(out), config=recipe)

    def log(step, numbers, pictures):
        images = {name: wandb.Image(picture) for name, picture in pictures.items()}
        board.log(numbers | images, step=step)
    return log, board.finish


BOARDS = {"tensorboard": to_tensorboard, "wandb": to_wandb}    # what --log-to names: (log, close)


class Journal:
    """What a run tells beside its checkpoints: metrics.jsonl and pictures, and the same to --log-to. Nothing
    where `out` is None, on other ranks."""

    def __init__(self, out: Path | None, names: list[str], recipe: dict):
        self.out, self.boards, self.saved = out, [], time.monotonic()
        for name in names if out else []:
            try:
                self.boards.append(BOARDS[name](out, recipe))
            except ImportError as e:
                say(f"note: --log-to {name} is not installed ({e}); metrics.jsonl has every number")

    def put(self, step: int, name: str, content: dict | Image.Image) -> None:
        """Write a line or a picture, by its name in the run."""
        if not self.out:
            return
        data.put(self.out / name, content, say)
        for log, _ in self.boards:
            if isinstance(content, dict):
                log(step, flat(content), {})
            else:
                log(step, {}, {name.split("/")[0]: content})

    def wants_save(self, minutes: float) -> bool:
        """Whether somebody touched OUT/save, or the last checkpoint is so old, 0 = any age will do."""
        late = minutes and time.monotonic() > self.saved + 60 * minutes
        return bool(self.out and (late or (self.out / "save").exists()))

    def close(self) -> None:
        for _, close in self.boards:
            close()


PANELS = ["raw_loss", "val_loss", "buckets", "val_buckets", "val_gap", "grad_norm", "pictures/s", "lr"]
INKS = "royalblue", "crimson", "seagreen", "darkorange", "purple", "sienna"   # of the runs


def curves_of(run: str) -> dict[str, dict[int, float]]:
    """By name, what metrics.jsonl of a run says at each step, the last time it does."""
    path = Path(run, "metrics.jsonl")
    if not path.is_file():
        raise ValueError(f"--plot {run}: {path} is not there. Name a run that has been trained")
    curves = {}
    for text in path.read_text("utf-8").splitlines():
        try:
            line = flat(json.loads(text))
        except ValueError:                                     # torn: being written, or the disk was full
            continue
        for name, value in line.items():
            if value:                                          # of a noise level without a picture it is 0
                curves.setdefault(name, {})[line["step"]] = value
    return curves


def draw_panel(pen: ImageDraw.ImageDraw, left: int, top: int, name: str, runs: list[dict]) -> None:
    """A name's curves in 480 x 200 pixels, by their logarithm where all are above 0: an ink for each run, and
    at their ends the numbers of noise levels."""
    lines = []
    for ink, curves in zip(itertools.cycle(INKS), runs):
        for key, curve in curves.items():
            level = key.removeprefix(name)
            if re.fullmatch(r"(/\d+)?", level):
                lines.append((ink, level, np.array(sorted(curve.items()))))
    if not lines:
        return

    steps, values = np.concatenate([line for *_, line in lines]).T
    least, most = values.min(), values.max()
    scale = np.log10 if least > 0 else np.positive
    ends = scale([least, most])
    for ink, level, line in lines:
        x = np.interp(line[:, 0], (0, steps.max()), (left, left + 480))
        y = np.interp(scale(line[:, 1]), ends, (top + 192, top + 28))
        pen.line([*zip(x, y), (x[-1], y[-1])], ink, 2)
        pen.text((x[-1] + 2, y[-1] - 6), level[1:], ink)
    pen.rectangle((left, top + 20, left + 480, top + 200), outline="grey")
    title = f"{name}: {least:.4g} to {most:.4g}, {steps.max():.0f} steps"
    pen.text((left, top + 4), title, "black")


def plot(names: list[str]) -> None:
    """Draw what metrics.jsonl of some runs says into the first one's folder."""
    runs = [curves_of(name) for name in names]
    high = 20 + 15 * len(names)
    sheet = Image.new("RGB", (1020, high + 210 * len(PANELS) // 2), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, ink) in enumerate(zip(names, itertools.cycle(INKS))):
        pen.text((20, 10 + 15 * i), name, ink)
    for i, name in enumerate(PANELS):
        draw_panel(pen, 20 + i % 2 * 500, high + i // 2 * 210, name, runs)
    path = Path(names[0], "curves.png")
    sheet.save(path)
    say(str(path))


TIMES = 0.1, 0.3, 0.5, 0.7, 0.9                                # of noise, at which a CLIP is tested


@torch.no_grad()
def retrieval(net: Contrastive, fixed: data.Pictures, n: int, trainer: "Trainer") -> dict:
    """How a CLIP does among n fixed pairs, a line for metrics.jsonl, for each of TIMES: how often a picture's
    own caption, or one that is equal, is the nearest, and among the nearest 5 ("text_at_1", "text_at_5"), the
    same of a caption's pictures; and the mean loss. Every rank does all of it."""
    n, most = min(n, len(fixed)), min(32, trainer.micro)
    line = {"val_loss": 0.0}
    given = {t: [] for t in TIMES}
    for start in range(0, n, most):
        batch = data.collect(fixed, start, min(start + most, n))
        inputs = net.inputs(batch, trainer.device)
        for t, parts in given.items():
            parts.append(net(**inputs | {"t": torch.full_like(inputs["t"], t)}))

    for parts in given.values():
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        line["val_loss"] += float(net.loss(whole)) / n / len(TIMES)
        logits, same = net.compared(whole)
        for name, ways in (("text", logits), ("picture", logits.T)):
            for k in (1, 5):
                nearest = ways.topk(min(k, n)).indices
                found = same.gather(1, nearest).any(1).float().mean()
                line.setdefault(f"{name}_at_{k}", []).append(number(found))
    return line | {"val_loss": number(line["val_loss"])}


@torch.no_grad()
def validate(net: Denoising, fixed: data.Pictures, n: int, trainer: "Trainer") -> dict:
    """Losses on n fixed pictures, times and noise, a line for metrics.jsonl; ranks share the work, in parts
    as the trainer's, of up to 32. val_gap = loss with the next picture's caption - loss with the right one:
    above 0 the text is used. Of a CLIP see retrieval."""
    if net.joins:
        return retrieval(net, fixed, n, trainer)
    n, most = min(n, len(fixed)), min(32, trainer.micro)
    device, ranks = trainer.device, trainer.ranks
    sums = torch.zeros(2 * BUCKETS + 1, dtype=torch.float64)
    for start in range(ranks.rank * most, n, ranks.world * most):
        stop = min(start + most, n)
        items = [fixed[position] for position in (*range(start, stop), stop % n)]
        others = [item | {"words": after["words"]} for item, after in itertools.pairwise(items)]
        right, wrong = fixed.batch(items[:-1]), fixed.batch(others)

        even = [(position * 0.6180339887 + 0.5) % 1 for position in right["positions"]]       # for any n
        inputs = net.inputs(right, device) | {"t": torch.tensor(even, device=device)}
        loss = net(**inputs)["raw"]
        other = net(**inputs | net.condition(wrong, device))["raw"]
        buckets = diffusion.loss_buckets(loss, net.schedule.logsnr(inputs["t"]), BUCKETS)
        sums += torch.cat([*buckets, (other - loss).sum()[None]]).cpu()

    total, count, gap = ranks.sum_(sums).split([BUCKETS, BUCKETS, 1])
    return {"val_loss": number(total.sum() / n), "val_gap": number(gap / n),
            "val_buckets": [number(x) for x in total / count.clamp(min=1)]}


def scored(step: int, cfg: TrainConfig) -> dict:
    """What sample.py says of the checkpoint of this step, a line for metrics.jsonl: of pictures of held-out
    captions, from seeds that stay, against held-out pictures, unless --score says otherwise."""
    command = [
        sys.executable, str(Path(__file__).with_name("sample.py")), f"--device={cfg.device}",
        f"--prompts={cfg.out}", f"--against={cfg.out}", f"--npz={cfg.out}/scored.npz",
        f"--ckpt={cfg.out}/checkpoints/{step:06d}", *shlex.split(cfg.score)]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}           # not a rank of torchrun
    torch.cuda.empty_cache()                                   # for that process
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        say(f"warning: no score of step {step}, see above; training continues")
        return {}
    words = done.stdout.splitlines()[-1].split()               # name value  name value
    return dict(zip(words[::2], map(float, words[1::2])))


def shown_batch(pictures: data.Pictures, size: int, prompts: list[str]) -> dict:
    """What grids are drawn of: held-out pictures, with their own captions or with prompts."""
    count = max(2, 1024 // size) if pictures.config.lowres else len(prompts) or 16
    items = [pictures[position] for position in range(count)]
    for item, prompt in zip(items, prompts):
        item |= pictures.texts(prompt)
    return pictures.batch(items)


def described(pictures: Tensor) -> str:
    """Mean and deviation of pictures, uint8 (N, C, H, W), and how many are all white, black or grey, or are
    noise: pixels that differ from the next one as from any other."""
    pictures = pictures.float()
    kinds = []
    for picture in pictures:
        mean, deviation = picture.mean(), picture.std()
        if deviation < 5:
            kinds.append("white" if mean > 250 else "black" if mean < 5 else "grey")
        elif picture.diff().square().mean() > 1.6 * deviation.square():
            kinds.append("noise")
    named = [f"{kinds.count(kind)} of {len(pictures)} {kind}" for kind in dict.fromkeys(kinds)]
    numbers = f"mean {pictures.mean():.1f}, deviation {pictures.std():.1f}"
    return ", ".join([numbers, *named])


@torch.no_grad()
def sample_grid(net: Denoising, shown: dict, most: int, device: torch.device) -> Image.Image:
    """Pictures of fixed prompts with fixed noise, `most` at once; beside an enlarged one what it was, and the
    truth."""
    rows = []
    for part in parts_of(shown, most):
        condition = net.encode(**net.condition(part, device))
        enlarges = "lowres" in condition
        scale = 1.0 if enlarges else 3.0
        denoise = diffusion.guided(net.network(), net.schedule, net.config, condition, scale)
        denoise = diffusion.threshold(denoise, limit=net.space.limit)

        keys = sent(part["noise"], device)
        side = part["picture"].shape[-1] // net.space.scale
        shape = (net.space.channels, side, side)
        x = diffusion.gaussian(keys, shape)
        noise = diffusion.noise_source(keys, shape)
        times = diffusion.sampling_times(net.schedule, 2 if enlarges else 20)
        drawn = diffusion.dpmpp_2m(denoise, x, times, noise, net.schedule)
        views = [net.space.decode(drawn)]
        if enlarges:
            views = [net.space.decode(condition["lowres"]), *views, torch.as_tensor(part["picture"])]
        rows.append(data.side_by_side(*views))
    pictures = torch.cat(rows)
    say(f"samples: {described(pictures)}")
    return data.contact_sheet(pictures, data.labels(shown["captions"], shown["transcriptions"]))


def first_batch(net: Denoising, part: dict, device: torch.device) -> Image.Image:
    """Exactly what the network sees: small picture, if any, picture, noisy version; below, t and caption."""
    inputs = net.inputs(part, device)
    x_t = diffusion.noised(inputs["x0"], inputs["eps"], inputs["t"], net.schedule)
    views = [inputs[name] for name in ("lowres", "x0") if name in inputs]
    views = [net.space.decode(view[:16]) for view in (*views, x_t)]
    notes = []
    for t, caption, kept in zip(inputs["t"].tolist(), part["captions"], part["kept"]):
        notes.append(f"t {t:.2f}: {caption if kept else '(dropped)'}")
    written = [text if kept else ""
               for text, kept in zip(part["transcriptions"], part["transcription_kept"])]
    return data.contact_sheet(data.side_by_side(*views), data.labels(notes[:16], written))


# --------------------------------------------------------------------------------------------------- the loop
class Trainer:
    """What makes updates: the objective, as DDP and torch.compile run it, and what is counted of them."""

    def __init__(self, cfg: TrainConfig, objective: nn.Module, state: State, device, ranks: Ranks):
        self.cfg, self.objective, self.state = cfg, objective, state
        self.device, self.ranks = device, ranks
        self.micro = cfg.micro_batch or cfg.batch_size // ranks.world
        self.dtype = text_encoder.DTYPES[cfg.dtype]
        self.autocast = torch.autocast(device.type, self.dtype, enabled=cfg.dtype != "fp32")
        self.parallel = objective
        if ranks.world > 1:
            self.parallel = nn.parallel.DistributedDataParallel(objective, forward_sync_buffers=False)
        self.run = compiled(self.parallel, device, cfg.compile)
        self.meter = Meter()
        self.queries = [p for name, p in objective.named_parameters() if re.search(r"to_[qk]\.weight", name)]
        self.parts = {}                                        # of the network, two names deep
        for name, p in objective.named_parameters():
            part = ".".join(name.split(".")[:2])
            self.parts.setdefault(part, []).append(p)
        self.replaced = self.cut = self.captions = 0
        self.told = set()
        self.marks = []                                        # when the first updates were done

    def batches(self, pictures: data.Pictures, first: int, images: int) -> Iterator[dict]:
        """The batches of the steps from `first`, of this rank, whose first picture is number `images`."""
        cfg, cuda = self.cfg, self.device.type == "cuda"
        workers = cfg.workers
        if workers < 0:
            workers = min(8, os.cpu_count() or 1) if cuda else 0
        stop = images + (cfg.steps - first) * cfg.batch_size
        return data.loader(pictures, images, stop, cfg.batch_size, self.ranks.rank, self.ranks.world, workers,
                           cfg.timeout, pin=cuda)

    def measure(self, example: dict) -> None:
        """Operations of one picture's forward pass, and what a matrix product reaches beside it."""
        with self.autocast:
            self.flops = count_flops(self.objective, **self.objective.inputs(example, self.device))
        self.peak = matmul_peak(self.device, self.dtype)
        self.since = clock(self.device)

    def step(self, batch: dict, lr: float, number: int = 0) -> None:
        """One update: micro-batches, their exact mean over the ranks, the finite gate, the average. Of the
        last before a line, by its number, the norms of weights and gradients by parts of the network, too."""
        self.tell(batch)
        self.backward(parts_of(batch, self.micro), len(batch["captions"]))
        self.objective.after_step(self.ranks)
        watched = self.cfg.log_every and number and number % self.cfg.log_every == 0
        one = torch.ones((), device=self.device)
        scale = self.state.scaler.scale(one)                   # of fp16's gradients, else 1
        for part, weights in self.parts.items() if watched else ():
            gradients = [p.grad for p in weights if p.grad is not None]
            steepness = nn.utils.get_total_norm(gradients) / scale
            length = nn.utils.get_total_norm(weights)
            self.meter.add(**{f"gradients/{part}": steepness, f"weights/{part}": length})
        if self.queries:                                       # in a network that learns nothing it goes to 0
            sums = sum(torch._foreach_norm([p.grad for p in self.queries], 1))
            self.meter.add(qk_grad=(finite(sums / scale), sum(p.numel() for p in self.queries)))
        norm, bad = self.state.update(lr)
        clipped = (norm > self.state.clip).float()
        self.meter.add(grad_norm=norm, clipped=clipped, skipped=bad)
        for name in COUNTED:
            self.meter.add(**{name: (len(batch[name]), 1)})
        if number and len(self.marks) < 3:
            self.marks.append(clock(self.device))
            if len(self.marks) == 3:                           # the first may have compiled
                seconds = self.marks[2] - self.marks[1]
                left = tqdm.format_interval(seconds * (self.cfg.steps - number))
                say(f"about {left} to go, {seconds:.2f} s a step")

    def tell(self, batch: dict) -> None:
        """Name what was replaced, the first ten pictures and each thousandth, and each shard that is away;
        once that captions are cut."""
        for note in batch["replaced"]:
            self.replaced += 1
            _, _, reason = note.partition(": ")
            named = self.replaced <= 10 or self.replaced % 1000 == 0
            if "://" in reason:
                named = reason not in self.told
                self.told.add(reason)
            if named:
                say(f"warning: {note}; replaced")
        for name, what in TOLD.items():
            if batch[name] and name not in self.told:
                self.told.add(name)
                say(f"warning: {batch[name][0]} {what}; others of its kind are not named")
        before = self.cut
        self.cut += int(batch["cut"].sum())
        self.captions += len(batch["captions"])
        if before <= 1 < self.cut:
            say_cut(self.cut, self.captions)

    def backward(self, parts: list[dict], total: int) -> None:
        """Add the gradient of the mean loss over the pictures of all ranks, `total` of them here."""
        shares = [None] * len(parts)
        if self.objective.joins and len(parts) > 1:
            shares = self.shares(parts, total)
        for number, (part, share) in enumerate(zip(parts, shares), 1):
            inputs = self.objective.inputs(part, self.device)
            alone = self.ranks.world > 1 and number < len(parts)     # the ranks meet after the last part
            with self.parallel.no_sync() if alone else nullcontext():
                with self.autocast:
                    given = self.run(**inputs)
                if share is None:
                    loss = self.loss(given, total)
                else:
                    loss = sum((given[name] * gradient).sum() for name, gradient in share.items())
                self.state.scaler.scale(loss).backward()
            self.objective.record(self.meter, inputs, given)

    def loss(self, given: model.Tensors, total: int) -> Tensor:
        """The loss of what forward gave of `total` pictures here, whose gradients DDP averages over ranks:
        their mean, or where the objective joins pictures, the sum of all ranks' by `total`."""
        if not self.objective.joins:
            return self.objective.loss(given) / total
        gathered = {name: self.ranks.gathered(rows) for name, rows in given.items()}
        loss = self.objective.loss(gathered)
        self.meter.add(loss=(finite(loss) / self.ranks.world, total))
        return loss / total

    def shares(self, parts: list[dict], total: int) -> list[model.Tensors]:
        """Gradients of a loss that joins pictures, by what forward gives of each part (gradient caching,
        Gao et al. 2021, arXiv:2101.06983): of all parts and ranks, without graphs, so memory is a part's."""
        with torch.no_grad(), self.autocast:
            given = [self.run(**self.objective.inputs(part, self.device)) for part in parts]

        leaves = {}
        for name in given[0]:
            leaves[name] = torch.cat([one[name] for one in given]).requires_grad_()
        loss = self.loss(leaves, total)
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

        return parts_of(dict(zip(leaves, gradients)), len(parts[0]["captions"]))

    def line(self, step: int, images: int) -> dict:
        """What metrics.jsonl says of the steps since its last line: means over pictures, buckets clean first.
        Here the host waits for the device."""
        sums, counts = self.meter.read(self.ranks, self.device)
        began = self.since
        self.since = clock(self.device)
        line = {"step": step, "images": images}
        for name, totals in sums.items():
            means = [number(total / max(1, count)) for total, count in zip(totals, counts[name])]
            line[name] = means if len(means) > 1 else means[0]

        # These are counted, not averaged; loss has a value for each picture.
        line["skipped"] = round(sums["skipped"][0] / self.ranks.world)
        for name in COUNTED:
            line[name] = round(sums[name][0])
        speed = counts["loss"][0] / (self.since - began)
        line["pictures/s"] = number(speed)
        line["share_of_peak"] = number(3 * self.flops * speed / self.ranks.world / self.peak)
        line["lr"] = number(rate(step - 1, self.cfg))
        return line


def gist(line: dict) -> str:
    """What of a line is for the eye."""
    names = "step", "loss", "raw_loss", "pictures/s", "val_loss", "val_gap", "text_at_1", *SCORES
    return "  ".join(f"{name} {line[name]}" for name in names if name in line)


def tell(line: dict, bar: tqdm) -> None:
    """The gist of a line, on the bar or, without a terminal, below the one before."""
    bar.set_postfix_str(gist(line))
    if bar.disable:
        say(gist(line))
    if line["skipped"]:
        say(f"warning: step {line['step']}: {line['skipped']} updates were not finite and were skipped")


def dry_run(trainer: Trainer, batches: Iterable[dict], configs: Configs) -> None:
    """The configuration, and what it costs here: measured on real updates, without the first two."""
    cfg = configs[0]
    for step in range(min(6, cfg.steps)):
        if step in (0, 2):
            began, pictures = clock(trainer.device), 0
        trainer.step(next(batches), rate(step, cfg))
        pictures += cfg.batch_size
    speed = pictures / (clock(trainer.device) - began)
    used, peak = 3 * trainer.flops * speed, trainer.peak
    hours = cfg.steps * cfg.batch_size / speed / 3600
    say("\n".join(map(repr, configs)))
    say(f"""
parameters  {trainer.state.count() / 1e6:.1f} M
forward     {trainer.flops / 1e9:.3f} GFLOPs a picture
memory      {memory_peak(trainer.device) / 2**30:.2f} GiB at its peak
speed       {speed:.1f} pictures/s
used        {used / 1e9:.0f} GFLOP/s, {used / peak:.0%} of the {peak / 1e9:.0f} of a matrix product
time        {hours:.2f} hours for {cfg.steps} steps of {cfg.batch_size} pictures""")


def pictures_of(configs: Configs) -> list[data.Pictures]:
    """Those to train on, to validate on, and to show: whole ones."""
    cfg, data_cfg, *_, text_cfg = configs
    whole = dataclasses.replace(data_cfg, crop=0)
    sets = []
    for config, split in ((data_cfg, "train"), (data_cfg, "val"), (whole, "val")):
        pictures = data.Pictures(config, cfg.size, cfg.seed, split)
        pictures.embedded = text_cfg.text_cache == "shards"
        sets.append(pictures)
    return sets


def attach(sets: list[data.Pictures], text: nn.Module, cfg: TrainConfig, images: int) -> None:
    """What data workers add to the pictures of `pictures_of`: what is read of texts, and random numbers."""
    for pictures, purpose in zip(sets, ("noise", "validation", "samples")):
        pictures.reader = text.reader
        pictures.transcriber = text.transcriber
        pictures.draws = partial(draws, 0, purpose, 0.0, 0, 1)
    drops = (cfg.transcription_drop, cfg.both_drop) if text.transcriber else (0.0, 0.0)
    sets[0].draws = partial(
        draws, cfg.seed, "noise", cfg.uncond_prob, images, cfg.batch_size, drops=drops)


def announce(cfg: TrainConfig, pictures: data.Pictures, state: State, first: int) -> None:
    """What is about to be trained on what, and what is wrong with it."""
    for warning in pictures.warnings:
        say(f"warning: {warning}")
    say(pictures.summary)
    say(f"{cfg.model}: {state.count() / 1e6:.1f} M parameters, steps {first} to {cfg.steps} of "
        f"{cfg.batch_size} pictures, {cfg.out}")


def describe(configs: Configs, pictures: data.Pictures, objective: Denoising, out: Path | None) -> dict:
    """What is written into every checkpoint, and into `out`/config.json."""
    recipe = {type(config).__name__: dataclasses.asdict(config) for config in configs}
    if out:
        content = json.dumps({**recipe, "versions": VERSIONS}, indent=1)
        (out / "config.json").write_text(content, "utf-8")
    meta = {
        "config": json.dumps(recipe), "data": pictures.fingerprint, "text": objective.text.fingerprint,
        "space": objective.space.fingerprint, "versions": json.dumps(VERSIONS)}
    if isinstance(objective.unet, model.UNet2DConditionModel):
        adapted = {"_adapter": objective.unet.adapter is not None}
        meta["unet"] = json.dumps(objective.unet.config | adapted)
    return meta


def main(argv: list[str]) -> int | None:
    configs = cfg, data_cfg, _, _, text_cfg = parse(argv)
    if cfg.plot or cfg.check:                                  # nothing is trained
        return plot(cfg.plot) if cfg.plot else check_pictures(configs)
    out, ranks = Path(cfg.out), Ranks()
    own = None if ranks.rank or cfg.dry_run else out           # the run, where this rank writes it
    with starting(cfg, ranks) as signals:
        if own:
            lock(out)
        device = launch(cfg, ranks)

        # What is trained, on what; where it stands.
        train_set, val_set, shown_set = sets = pictures_of(configs)
        shards = check_text_shards(train_set, text_cfg) if text_cfg.text_shards else []
        text, caches = load_text(configs, sets, device, signals, ranks)
        if shards and not cfg.dry_run:
            return write_text_shards(shards, Path(text_cfg.text_shards), caches, data_cfg, ranks)
        objective = build(configs, text, device)
        state = State(objective, cfg.weight_decay, cfg.clip, cfg.ema_decay, cfg.dtype == "fp16", cfg.profiles,
                      cfg.train_only, objective.matrices() if cfg.optimizer == "muon" else None)
        first, images = (0, 0) if cfg.dry_run else resume(out, state, configs, train_set, objective)
        if not ranks.equal(zlib.crc32(f"{first} {configs} {train_set.fingerprint}".encode())):
            raise ValueError(f"ranks differ in flags or pictures, or not all see the same --out {out} "
                             f"(step {first})")
        if first >= cfg.steps:
            return say(f"note: {out} is at step {first} of {cfg.steps}; raise --steps, or name another --out")
        announce(cfg, train_set, state, first)
        if data_cfg.latent_cache:
            latents = load_latents(configs, sets[:2], objective, device, signals, ranks)
            train_set.latents = val_set.latents = latents

        # How it runs: what the data workers add to the pictures, compiled or not, ranks side by side.
        attach(sets, text, cfg, images)
        shown = shown_batch(shown_set, cfg.size, prompts_of(cfg))
        meta = describe(configs, train_set, objective, own)
        journal = Journal(own, cfg.log_to, json.loads(meta["config"]))
        trainer = Trainer(cfg, objective, state, device, ranks)
        trainer.measure(data.collect(val_set, 0, 1))
        batches = trainer.batches(train_set, first, images)
        signals.awaited = True

    def due(every):
        return step > first and every and (step % every == 0 or step == cfg.steps)

    bar = progress(ranks, total=cfg.steps, initial=first, unit="step")
    try:
        if cfg.dry_run:
            return dry_run(trainer, batches, configs)
        for step in range(first, cfg.steps + 1):
            wish = ranks.agreed(2 * signals.arrived or journal.wants_save(cfg.save_minutes))  # 2 stop, 1 save
            last = wish == 2 or step == cfg.steps

            if step > first and (last or due(cfg.log_every)):
                line = trainer.line(step, images)
                journal.put(step, "metrics.jsonl", line)
                tell(line, bar)
                if state.skipped >= 20:
                    die(f"{state.skipped:.0f} updates in a row were not finite, stopped at step {step}, not "
                        "saved. Try a lower --lr or --dtype fp32; the last checkpoint, if any, is good", 1)

            # Time from here on is not that of training.
            drawing = due(cfg.sample_every) or (step == 0 and cfg.prompts and cfg.sample_every)
            saving = step > first and (last or wish or due(cfg.save_every) or due(cfg.score_every))
            looking = saving or drawing or due(cfg.val_every)
            began = clock(device) if looking else 0.0
            if saving:
                save(journal, step, state, meta, cfg.keep, last, ranks)
                ranks.wait()                                   # a large one takes longer than --timeout
            if wish == 2:
                return say(f"stopping at step {step}; run the same command to continue")

            # Validate, score and draw samples with the averaged weights.
            with trainer.autocast:
                line = {}
                if due(cfg.val_every):
                    line = validate(state.ema, val_set, cfg.val_images, trainer)
                if due(cfg.score_every) and own:
                    line |= scored(step, cfg)
                if line:
                    line = {"step": step} | line
                    say(gist(line))
                    journal.put(step, "metrics.jsonl", line)
                    if own and cfg.keep_best in line:
                        keep_best(own, state, meta, line, cfg.keep_best)
                if drawing and own:
                    sheet = sample_grid(state.ema, shown, trainer.micro, device)
                    journal.put(step, f"samples/{step:06d}.png", sheet)
            if looking:
                ranks.wait()
                trainer.since += clock(device) - began
            if last:
                return

            batch = next(batches)
            if step == 0 and own:
                sheet = first_batch(objective, parts_of(batch, trainer.micro)[0], device)
                journal.put(step, "first_batch.png", sheet)
            trainer.step(batch, rate(step, cfg), step + 1)
            images += cfg.batch_size
            meta["images"] = str(images)
            bar.update()
    except (MemoryError, RuntimeError) as e:
        die_of(e, trainer.micro)
        raise
    except (ValueError, OSError) as e:                                        # of the data, maybe of one rank
        die(e, status=2 if isinstance(e, ValueError) else 1, everywhere=True)
    finally:
        bar.close()
        journal.close()
        batches.close()


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")      # a name that the terminal cannot show
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        die(error)
    finally:
        model.leave()
