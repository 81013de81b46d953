"""Prompts to pictures: `python sample.py "a house"` draws from the newest run.

Needs nothing but a checkpoint: the network, the schedule and the text encoder are rebuilt from its metadata. A picture depends on
its prompt, its seed and the settings, not on the other pictures of its batch.
"""
import argparse
import json
import math
import os
import re
import sys
import tempfile
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import PngImagePlugin
from torch import Tensor, nn

import data
import diffusion
import model
import text_encoder


def die(message: object) -> typing.NoReturn:
    """The user's mistake in one line on standard error, exit status 2."""
    print(f"sample.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def warn(message: str) -> None:
    print(f"sample.py: warning: {message}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------- checkpoint to stage


@dataclass
class Stage:
    """What a checkpoint holds, ready to draw."""
    unet: nn.Module
    text: nn.Module
    schedule: diffusion.Schedule
    config: diffusion.DiffusionConfig
    size: int             # side of the pictures [pixels]
    device: torch.device
    step: int             # of training
    digest: str           # checksum of the checkpoint


def newest_run(root: Path) -> Path:
    """The run under `root` whose checkpoint was written last."""
    runs = [p.parent for p in root.glob("*/checkpoints") if model.checkpoint_folders(p.parent)]
    if not runs:
        raise ValueError(f"no checkpoint in {root}/. Train one first: python train.py --size 64")
    return max(runs, key=lambda run: model.checkpoint_folders(run)[-1].stat().st_mtime)


def load_stage(path: Path, device: torch.device) -> Stage:
    """A stage from a run directory (its newest checkpoint that verifies), a checkpoint folder or an ema.safetensors file."""
    if path.is_dir() and not (path / "ema.safetensors").exists():
        found = model.load_checkpoint(path, warn=warn)
        if found is None:
            inside = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
            raise ValueError(f"{path} has no checkpoints/STEP/ema.safetensors (found: {inside}). Name a run directory")
        _, (tensors,), meta = found
    else:
        tensors, meta = model.load_tensors(path / "ema.safetensors" if path.is_dir() else path)
    try:
        stored = json.loads(meta["config"])
        configs = {cls: cls(**{k: tuple(v) if isinstance(v, list) and cls is model.ModelConfig else v
                               for k, v in stored[cls.__name__].items()})
                   for cls in (model.ModelConfig, diffusion.DiffusionConfig, text_encoder.TextConfig)}
        size = stored["TrainConfig"]["size"]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} has a configuration this code does not know ({e}). Use the code that wrote it") from e
    text = text_encoder.load_text_encoder(configs[text_encoder.TextConfig])
    config = configs[diffusion.DiffusionConfig]
    parts = nn.ModuleDict({"unet": model.UNet(configs[model.ModelConfig], size, text.dim, text.pooled_dim, 6 if config.learn_sigma else 3)})
    if text.trainable:
        parts["text_encoder"] = text
    parts.load_state_dict({k: v for k, v in tensors.items() if k.split(".")[0] in parts})
    return Stage(parts["unet"].to(device).eval().requires_grad_(False), text.to(device).eval().requires_grad_(False),
                 diffusion.make_schedule(config, size), config, size, device, int(meta["step"]), meta["sha256"])


# ------------------------------------------------------------------------------------------------ prompts to pictures


@torch.no_grad()
def generate(stage: Stage, prompts: list[str], seeds: list[int], guidance_scale: float = 3.0, negative: str = "",
             sampler: str = "dpmpp_2m", steps: int = 25, batch_size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw one picture for each prompt from the noise of its seed: uint8 (N, 3, H, W).

    guidance_scale 1 = none; negative: a prompt to move away from, in place of no prompt. Raises ValueError when the network's output
    is not finite.
    """
    shape, done = (3, stage.size, stage.size), []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        with torch.autocast(stage.device.type, dtype, enabled=dtype != torch.float32):
            condition, against = (encode(stage, texts) for texts in (prompts[rows], [negative] * len(prompts[rows])))
            denoise = diffusion.guided(stage.unet, stage.schedule, stage.config, condition, guidance_scale, against)
            keys = torch.tensor([int(data.keyed(seed, "sample", 0).integers(2**63)) for seed in seeds[rows]])
            x = diffusion.SAMPLERS[sampler](
                diffusion.threshold(denoise), diffusion.gaussian(keys, shape, stage.device), diffusion.time_grid(steps),
                diffusion.noise_source(keys, shape, stage.device), stage.schedule)
        if not x.isfinite().all():
            raise ValueError(f"the network's output is not finite (checkpoint of step {stage.step}). Try --dtype fp32, a lower "
                             "--guidance or an earlier checkpoint")
        done.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(done)


def encode(stage: Stage, prompts: list[str]) -> dict[str, Tensor]:
    """Prompts -> condition."""
    ids, mask = stage.text.tokenize(prompts)
    return dict(zip(("context", "mask", "pooled"), stage.text(ids.to(stage.device), mask.to(stage.device))))


# -------------------------------------------------------------------------------------------------- pictures to files


def file_name(prompt: str) -> str:
    """A safe name for a prompt: lower-case ASCII letters, digits and dashes, at most 80."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:80].strip("-") or "picture"


def free(path: Path) -> Path:
    """`path`, or the first of NAME-2, NAME-3, ... that does not exist: nothing is overwritten."""
    n, name = 1, path
    while name.exists():
        n += 1
        name = path.with_stem(f"{path.stem}-{n}")
    return name


def save_png(image, path: Path, notes: dict) -> Path:
    """Write a picture with its prompt, seed and settings inside, atomically; to the temporary folder if `path` fails."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("limn", json.dumps(notes, ensure_ascii=False))
    try:
        target = free(path)
        image.save(target, "PNG", pnginfo=info)
    except OSError as e:
        target = free(Path(tempfile.gettempdir()) / path.name)
        warn(f"cannot write {path} ({e.strerror}); writing {target} instead")
        image.save(target, "PNG", pnginfo=info)
    return target


def arguments(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="sample.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = die
    p.add_argument("prompt", nargs="?", help="what to draw")
    p.add_argument("--prompts", metavar="FILE", help="a file of prompts, one a line")
    p.add_argument("--ckpt", default="", help="a run directory, a checkpoint folder or an ema.safetensors; the newest run in runs/ if empty")
    p.add_argument("--n", type=int, default=1, help="pictures of each prompt, seeds SEED, SEED + 1, ... [images]")
    p.add_argument("--guidance", type=float, default=3.0, help="guidance scale, 1 = none")
    p.add_argument("--negative", default="", help="a prompt to move away from")
    p.add_argument("--sampler", choices=sorted(diffusion.SAMPLERS), default="dpmpp_2m", help="how the noise is removed")
    p.add_argument("--sample-steps", type=int, default=25, help="steps of the sampler [steps]")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--out", default=".", help="a folder, or the name of a .png")
    p.add_argument("--grid", action=argparse.BooleanOptionalAction, default=False, help="one sheet with captions, not a file a picture")
    p.add_argument("--batch-size", type=int, default=16, help="pictures drawn at once [images]")
    p.add_argument("--device", default="", help="cuda, mps or cpu; the first of them there is when not given")
    p.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the matrix products")
    args = p.parse_args(argv)
    if (args.prompt is None) == (args.prompts is None):
        die('give a prompt, python sample.py "a house", or --prompts FILE')
    for flag, least, most in (("guidance", 0, 100), ("sample_steps", 1, 1000), ("seed", 0, 2**63 - 1), ("n", 1, 10000), ("batch_size", 1, 4096)):
        if not least <= getattr(args, flag) <= most:                                      # a nan is outside, too
            die(f"--{flag.replace('_', '-')} {getattr(args, flag)} is outside {least} to {most}")
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = args.device or next(k for k, found in there.items() if found)
    if not there.get(kind):
        die(f"--device {args.device} is not here. Choose from {', '.join(k for k, found in there.items() if found)}")
    prompts = [args.prompt]
    if args.prompts is not None:
        prompts = [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if not prompts:
            die(f"--prompts {args.prompts} has no prompt in it. Write one a line")
    out = Path(args.out)
    folder = out.parent if out.suffix.lower() == ".png" else out
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        die(f"cannot write to --out {folder}. Name a folder that can be written")
    folder.mkdir(parents=True, exist_ok=True)

    stage = load_stage(Path(args.ckpt) if args.ckpt else newest_run(Path("runs")), torch.device(kind))
    if "" in prompts or args.prompt is not None and not args.prompt.strip():
        print("note: empty prompt, drawing without one")
    if args.guidance > 30:
        warn(f"--guidance {args.guidance} is very high; 2 to 8 is usual")
    seeds = [args.seed + i for _ in prompts for i in range(args.n)]
    prompts = [prompt for prompt in prompts for _ in range(args.n)]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    pictures = generate(stage, prompts, seeds, args.guidance, args.negative, args.sampler, args.sample_steps, args.batch_size, dtype)
    if cut := stage.text.counts["cut"]:
        warn(f"{cut} prompts were cut at {stage.text.length} tokens")

    notes = {"guidance": args.guidance, "negative": args.negative, "sampler": args.sampler, "sample_steps": args.sample_steps,
             "checkpoint": stage.digest, "step": stage.step}
    if args.grid:
        name = out if out.suffix.lower() == ".png" else folder / "grid.png"
        columns = min(8, max(2, args.n if args.n > 1 else math.isqrt(len(prompts) - 1) + 1))
        sheet = data.contact_sheet(pictures, prompts, columns)
        print(save_png(sheet, name, notes | {"prompts": prompts, "seeds": seeds}))
        return
    for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
        if float(pictures[i].float().std()) < 1:
            warn(f"picture {i + 1} is constant; the network is probably untrained or --guidance is too high")
        name = out if out.suffix.lower() == ".png" else folder / f"{file_name(prompt)}.png"
        image = data.Image.fromarray(pictures[i].permute(1, 2, 0).numpy())
        print(save_png(image, name, notes | {"prompt": prompt, "seed": seed}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        die(error)
