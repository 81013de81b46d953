"""Prompts to pictures: `python sample.py "a house"` draws from the newest run.

It needs nothing but a checkpoint: the network, the schedule and the text encoder are rebuilt from its
metadata. A picture depends on its prompt, its seed and the settings, not on the others of its batch.

Letters: B pictures of a batch, N pictures in all, H W their height and width.
"""
import argparse
import inspect
import itertools
import json
import math
import os
import re
import sys
import tempfile
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

import data
import diffusion
import model
import text_encoder

LISTS = {"guidance_scale": float, "steps": int, "sampler": str, "threshold": str, "seed": int}  # one a stage
FILES = ("autoguide", "init", "mask")


def die(message: object) -> typing.NoReturn:
    """The user's mistake in one line on standard error, exit status 2."""
    print(f"sample.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def warn(message: str) -> None:
    print(f"sample.py: warning: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------- checkpoint to stage
@dataclass
class Stage:
    """What a checkpoint holds, ready to draw."""
    unet: nn.Module
    text: nn.Module
    schedule: diffusion.Schedule
    config: diffusion.DiffusionConfig
    data: data.DataConfig
    size: int  # side of the pictures [pixels]
    device: torch.device
    step: int  # of training [steps]
    digest: str  # checksum of the checkpoint


def load_stage(path: Path, device: torch.device, ema: float = 0.0) -> Stage:
    """A stage from a run directory (its newest checkpoint that verifies), a checkpoint folder or a file.

    ema: width of another average of the weights, see model.reconstruct; 0 = the one in the checkpoint.
    Raises ValueError, one line, where there is no checkpoint, where it is damaged or of other code.
    """
    path, tensors, meta = model.read(path, warn)
    if ema:
        run = (path if path.is_dir() else path.parent) / "../.."
        tensors |= model.reconstruct((run / "profiles").resolve(), int(meta["step"]), ema, warn)
    try:
        stored = json.loads(meta["config"])
        shape = {name: tuple(v) if isinstance(v, list) else v for name, v in stored["ModelConfig"].items()}
        config = diffusion.DiffusionConfig(**stored["DiffusionConfig"])
        text = text_encoder.load_text_encoder(text_encoder.TextConfig(**stored["TextConfig"]))
        pictures = data.DataConfig(**stored["DataConfig"])
        size, step = stored["TrainConfig"]["size"], int(meta["step"])
        levels = [diffusion.make_schedule(config, side) for side in (size, pictures.lowres or size)]
        planes, small = (len(data.MODES[mode]) for mode in (pictures.picture_mode, pictures.lowres_mode))
        unet = model.UNet(model.ModelConfig(**shape), size, text.dim, text.pooled_dim, planes,
                          small if pictures.lowres else 0, config.learn_sigma)
        unet.levels = levels
        parts = nn.ModuleDict({"unet": unet} | ({"text_encoder": text} if text.trainable else {}))
        parts.load_state_dict({k: v for k, v in tensors.items() if k.split(".")[0] in parts})
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path} does not fit this code ({str(e)[:200]}). Use the code that wrote it") from e
    if meta["text"] != text.fingerprint:
        raise ValueError(f"the text encoder is {text.fingerprint}, {path} was trained with {meta['text']}. "
                         "Put that one in its place")
    unet, text = (part.to(device).eval().requires_grad_(False) for part in (unet, text))
    return Stage(unet, text, levels[0], config, pictures, size, device, step, digest=meta["sha256"])


# -------------------------------------------------------------------------------------- prompts to pictures
@dataclass
class Settings:
    """How pictures are drawn: a field is a keyword of `generate`, a flag, and a note in the PNG."""
    guidance_scale: float = 3.0  # guidance scale, 1 = none; 5,2 = of the base and the next stage, 1 above
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times at which there is guidance [0..1]
    guidance_rescale: float = 0.0  # share of the contrast it adds that is taken back [0..1]
    apg: float = 0.0  # adaptive projected guidance: its longest push, such as 15; 0 = plain guidance
    autoguide: str = ""  # a weaker checkpoint to move away from
    negative: str = ""  # a prompt to move away from
    aug: float = 0.0  # noise on a low-resolution picture before it is enlarged, a time t [0..1]
    threshold: str = "static"  # predictions are clipped at 1 (static), a percentile of each (0..1], or none
    sampler: str = "dpmpp_2m"  # how the noise is removed
    steps: int = 25  # of the sampler [steps]
    respacing: str = ""  # these of 1000 steps instead: 250, 10,10,20 (of equal sections) or ddim25
    eta: float = -1.0  # fresh noise of a step [0..1], -1 = the sampler's own
    init: str = ""  # a picture to start from
    strength: float = 1.0  # how far it is noised [0..1]
    mask: str = ""  # a picture that is black where --init stays
    resample: int = 1  # visits of every ten steps with --mask, so that its parts agree


def read_pictures(paths: list[str], size: int, mode: str = "colour") -> list[Tensor]:
    """Pictures that lie on one another, uint8 (3 or 1, size, size). ValueError where they cannot."""
    try:
        shapes = ["{}x{}".format(*Image.open(path).size) for path in paths]
        found = [torch.from_numpy(data.decode(Path(path).read_bytes(), size)) for path in paths]
    except Exception as e:                                     # of whichever decoder of Pillow
        raise ValueError(f"--init, --mask or --lowres is no picture: {e}") from e
    if len(set(shapes)) > 1:
        raise ValueError("--init is {} pixels, --mask {}. Give both the same size".format(*shapes))
    return [torch.tensor(data.array(to_image(picture, mode))) for picture in found]


def encode(stage: Stage, prompts: list[str]) -> dict[str, Tensor]:
    """Prompts -> the condition of the U-Net."""
    ids, mask = stage.text.tokenize(prompts)
    return dict(zip(("context", "mask", "pooled"), stage.text(ids.to(stage.device), mask.to(stage.device))))


def denoiser(stage: Stage, net: Callable, weak: Stage | None, prompts: list[str], s: Settings,
             small: dict[str, Tensor]) -> Callable:
    """denoise(x_t, t) -> x0 for these prompts: the network with guidance and a threshold."""
    combine = diffusion.rescaled(s.guidance_rescale, diffusion.projected(s.apg) if s.apg else torch.lerp)
    how = {"guidance_scale": s.guidance_scale, "interval": s.guidance_interval, "combine": combine}
    if weak:
        pair = [diffusion.denoiser(network, stage.schedule, of.config, encode(of, prompts) | small)
                for network, of in ((net, stage), (weak.unet, weak))]
        denoise = diffusion.guidance(lambda x_t, t: [one(x_t, t) for one in pair], **how)
    else:
        denoise = diffusion.guided(net, stage.schedule, stage.config, encode(stage, prompts) | small,
                                   negative=encode(stage, [s.negative] * len(prompts)) | small, **how)
    if s.threshold == "none":
        return denoise
    return diffusion.threshold(denoise, None if s.threshold == "static" else float(s.threshold))


@torch.no_grad()
def generate(stage: Stage, prompts: list[str], seeds: list[int], batch_size: int = 16,
             dtype: torch.dtype = torch.float32, lowres: Tensor | None = None, **settings) -> Tensor:
    """Draw one picture for each prompt from the noise of its seed: uint8 (N, 3 or 1, H, W) on the CPU.

    dtype: of the matrix products; lowres: uint8 (N, 3 or 1, h, w) to enlarge; settings: fields of
    Settings. Raises ValueError where these do not fit together, and when the network's output is not finite.
    """
    planes = len(data.MODES[stage.data.picture_mode])
    s, shape, done = Settings(**settings), (planes, stage.size, stage.size), []
    if stage.data.lowres != (found := 0 if lowres is None else lowres.shape[-1]):
        raise ValueError(f"a stage from {stage.data.lowres} to {stage.size} pixels was given {found}. "
                         "Name all stages in order by --ckpt, or give --lowres PICTURE to the first")
    times = s.strength * (diffusion.respaced(s.respacing) if s.respacing else diffusion.time_grid(s.steps))
    if (s.mask or s.strength != 1) and not s.init:
        raise ValueError("--mask and --strength need a picture to start from. Add --init PICTURE")
    given = read_pictures([path for path in (s.init, s.mask) if path], stage.size, stage.data.picture_mode)
    weak = load_stage(Path(s.autoguide), stage.device) if s.autoguide else None
    alike = lambda x: (x.size, x.data.lowres, x.data.picture_mode, x.schedule.alpha_sigma(times)[0].tolist())
    if weak and (s.negative or alike(weak) != alike(stage)):
        raise ValueError("--autoguide needs a checkpoint of the same size and schedule, and no --negative")
    net, sampler = stage.unet, diffusion.SAMPLERS[s.sampler]
    takes = inspect.signature(sampler).parameters
    if s.eta >= 0 and "eta" not in takes:
        raise ValueError(f"--eta {s.eta}: {s.sampler} has no fresh noise. Use --sampler ddim or dpmpp_2m")
    options = {"eta": s.eta} if s.eta >= 0 else {}
    if stage.config.learn_sigma and "variance" in takes:
        net = diffusion.LearnedVariance(net)
        options["variance"] = lambda: net.fraction[:len(batch)]               # the prompts' rows come first
    keys, small_keys = (torch.tensor([int(data.keyed(seed, purpose, 0).integers(2**63)) for seed in seeds])
                        for purpose in ("sample", "lowres"))
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        batch, x, small = prompts[part], diffusion.gaussian(keys[part], shape, stage.device), {}
        if found:
            clean, t = lowres[part].to(x) / 127.5 - 1, x.new_full((len(x),), s.aug)
            eps = diffusion.gaussian(small_keys[part], clean.shape[1:], stage.device)
            small = {"lowres": diffusion.noised(clean, eps, t, stage.unet.levels[1]), "lowres_t": t}
        noise = diffusion.noise_source(keys[part], shape, stage.device)
        run = partial(sampler, **options)
        if s.init:
            known = (given[0].to(x) / 127.5 - 1).expand_as(x)
            x = diffusion.noised(known, x, times[:1].to(x), stage.schedule)
        if s.mask:
            keep = (given[1].float().mean(0) < 127.5).to(x.device).expand(len(x), 1, -1, -1)
            run = partial(diffusion.inpaint, run, known=known, keep=keep, resample=s.resample)
        with torch.autocast(stage.device.type, dtype, enabled=dtype != torch.float32):
            x = run(denoiser(stage, net, weak, batch, s, small), x, times, noise, stage.schedule)
        if not x.isfinite().all():
            raise ValueError(f"the network's output is not finite (checkpoint of step {stage.step}). "
                             "Try --dtype fp32, a lower --guidance or an earlier checkpoint")
        done.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(done)


@torch.no_grad()
def clip_scores(clip: tuple[nn.Module, nn.Module], pictures: Tensor, prompts: list[str],
                device: torch.device, batch_size: int = 16) -> Tensor:
    """CLIP score of each picture, uint8 (N, 3 or 1, H, W), with its prompt: (N,), from 0 to 2.5, the better.

    2.5 max(cosine, 0) (Hessel et al. 2021, arXiv:2104.08718, section 3), without its "A photo depicts".
    clip: the encoders of pictures and of texts, of one checkpoint.
    """
    (tower, words), scores = (part.to(device) for part in clip), []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        ids, mask = words.tokenize(prompts[part])
        _, _, pooled = words(ids.to(device), mask.to(device))
        seen = tower(pictures[part].expand(-1, 3, -1, -1).to(device))                     # (B, P)
        scores.append(2.5 * torch.cosine_similarity(seen, pooled).clamp(min=0))
    return torch.cat(scores).cpu()


# --------------------------------------------------------------------------------------- pictures to files
def to_image(picture: Tensor, mode: str = "colour") -> Image.Image:
    """uint8 (3 or 1, H, W) -> a picture in colour or grey."""
    return Image.fromarray(picture.expand(3, -1, -1).permute(1, 2, 0).numpy()).convert(data.MODES[mode])


def file_name(prompt: str) -> str:
    """A safe name for a prompt: lower-case ASCII letters, digits and dashes, at most 80."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:80].strip("-") or "picture"


def save_png(image: Image.Image, path: Path, notes: dict) -> Path:
    """Write a picture with its notes inside, whole or not at all; to the temporary folder if `path` fails.
    As NAME, NAME-2, NAME-3, ..., the first that does not exist: nothing is overwritten."""
    info, spare = PngImagePlugin.PngInfo(), Path(tempfile.gettempdir(), path.name)
    info.add_itxt("limn", json.dumps(notes))
    names = itertools.chain([path], (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2)))
    target = next(name for name in names if not name.exists())
    part = target.with_name(f".{target.stem}.{os.getpid()}.part")
    try:
        image.save(part, "PNG", pnginfo=info)
        return part.replace(target)
    except OSError as e:
        if path == spare:
            raise
        warn(f"cannot write {path} ({e.strerror or e}); writing {spare} instead")
    finally:
        part.unlink(missing_ok=True)
    return save_png(image, spare, notes)


# ---------------------------------------------------------------------------------------- the command line
def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, checked; a mistake in it ends the program in one line."""
    p = argparse.ArgumentParser(prog="sample.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = die
    add = p.add_argument
    add("prompt", nargs="?", help="what to draw")
    add("--prompts", metavar="FILE", help="a file of prompts, one a line")
    add("--ckpt", default="", help="run, checkpoint or ema.safetensors; a,b: of stages; empty: the newest")
    add("--stop-at", type=int, default=0, help="the last stage, 0 = all there are [pixels]")
    add("--lowres", default="", metavar="PICTURE", help="enlarge this one instead of drawing the first")
    add("--keep-stages", action=argparse.BooleanOptionalAction, default=False, help="write those below, too")
    add("--ema", type=float, default=0.0, help="another width of the averaged weights, 0 = the run's own")
    add("--n", type=int, default=1, help="pictures of each prompt, seeds SEED, SEED + 1, ... [images]")
    add("--rank", default="", metavar="DIR", help="folder of a CLIP, whose score is noted in the PNG")
    add("--best", type=int, default=0, help="keep so many of --n by that score, best first, 0 = all [images]")
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Settings), re.MULTILINE))
    for f in fields(Settings):
        flag = {"guidance_scale": "guidance", "steps": "sample-steps"}.get(f.name, f.name.replace("_", "-"))
        two = {"nargs": 2} if isinstance(f.default, tuple) else {}
        kind = float if two else str if f.name in LISTS else type(f.default)
        add(f"--{flag}", dest=f.name, type=kind, default=f.default, help=helps[f.name], **two)
    add("--seed", default=0, help="of the noise")
    add("--out", default=".", help="a folder, or the name of a .png")
    add("--grid", action=argparse.BooleanOptionalAction, default=False, help="one sheet with captions")
    add("--batch-size", type=int, default=16, help="pictures drawn at once [images]")
    add("--device", default="", help="cuda, mps or cpu; the first of them there is when not given")
    add("--dtype", choices=list(text_encoder.DTYPES), default="fp32", help="of the matrix products")
    args = p.parse_args(argv)
    if (args.prompt is None) == (args.prompts is None):
        die('give a prompt, python sample.py "a house", or --prompts FILE')
    limits = {"guidance_scale": (0, 100), "guidance_rescale": (0, 1), "apg": (0, 1e6), "steps": (1, 1000),
              "ema": (0, 0.28), "eta": (-1, 1), "strength": (1e-3, 1), "resample": (1, 1000),
              "aug": (0, 1), "stop_at": (0, 4096), "seed": (0, 2**63 - 1), "n": (1, 10000),
              "best": (0, 10000), "batch_size": (1, 4096)}
    flags = {action.dest: flag for flag, action in p._option_string_actions.items()}
    for name, kind in LISTS.items():
        try:
            setattr(args, name, tuple(map(kind, str(getattr(args, name)).split(","))))
        except ValueError:
            die(f"{flags[name]} {getattr(args, name)} is not a number, or a number a stage such as 5,2")
    args.guidance_scale += (1.0,)                              # above the stages that it is given for
    if wrong := set(args.sampler) - set(diffusion.SAMPLERS):
        die(f"--sampler {wrong.pop()} is not one of {', '.join(diffusion.SAMPLERS)}")
    if wrong := [word for word in args.threshold if not re.fullmatch(r"static|none|0?\.\d+|1(\.0*)?", word)]:
        die(f"--threshold {wrong[0]} is not static, none or a percentile such as 0.995")
    for name, (least, most) in limits.items():
        for value in getattr(args, name) if name in LISTS else [getattr(args, name)]:
            if not least <= value <= most:                     # a nan is outside, too
                die(f"{flags[name]} {value} is outside {least} to {most}")
    if args.best > args.n or (args.best and not args.rank):
        die(f"--best {args.best} needs as many pictures, --n {args.n}, and scores, --rank DIR")
    if args.rank and not Path(args.rank).is_dir():
        die(f"--rank {args.rank} is not a folder. Name the folder of a CLIP, as published")
    args.wanted = [args.prompt]
    if args.prompts is not None:
        lines = Path(args.prompts).read_text(encoding="utf-8", errors="replace").splitlines()
        args.wanted = [line.strip() for line in lines if line.strip()] or die(
            f"--prompts {args.prompts} has no prompt in it. Write one a line")
    return args


def run_stage(path: Path, i: int, args: argparse.Namespace, device: torch.device, prompts: list[str],
              below: Tensor | None) -> tuple[Tensor, list[int], dict]:
    """The pictures of the i-th stage, their seeds, and notes; `below`: the pictures of the stage before."""
    stage, first = load_stage(path, device, args.ema), i == bool(args.lowres)
    at = {name: values[min(i, len(values) - 1)] for name in LISTS for values in [getattr(args, name)]}
    settings = {f.name: at.get(f.name, getattr(args, f.name)) for f in fields(Settings)}
    if not first:                                              # these are of the first stage
        settings |= {f.name: f.default for f in fields(Settings) if f.name in (*FILES, "strength")}
    if settings["guidance_scale"] > 30:
        warn(f"--guidance {settings['guidance_scale']} is very high; 2 to 8 is usual")
    if first:
        counts = stage.text.counts
        stage.text.tokenize(prompts[::args.n])                 # counts what the text encoder cannot read
        if counts["unknown"]:
            warn(f"{counts['unknown']} of {counts['tokens']} tokens are unknown to the text encoder")
        if counts["cut"]:
            warn(f"a prompt was cut at {stage.text.length} tokens")
    if first and args.lowres:
        below = read_pictures([args.lowres], stage.data.lowres or stage.size) * len(prompts)
    if below is not None:
        images = [to_image(picture, stage.data.lowres_mode) for picture in below]
        below = torch.stack([torch.tensor(data.array(image)) for image in images])
    seeds = [at["seed"] + k % args.n for k in range(len(prompts))]
    pictures = generate(stage, prompts, seeds, args.batch_size, text_encoder.DTYPES[args.dtype], below,
                        **settings)
    for k, picture in enumerate(pictures, 1):
        if picture.float().std() < 1:
            warn(f"picture {k} is constant; the network is probably untrained, or --guidance is too high")
    notes = {name: Path(settings[name]).name for name in FILES} | {"ema": args.ema, "dtype": args.dtype}
    return pictures, seeds, settings | notes | {"checkpoint": stage.digest, "step": stage.step}


def write(pictures: Tensor, found: list[dict], n: int, args: argparse.Namespace, notes: dict) -> None:
    """Pictures, or one sheet of them, into the folder or under the name of --out. found: the prompt and seed
    of each, noted beside `notes`; n: how many there are of a prompt."""
    file = Path(args.out) if Path(args.out).suffix.lower() == ".png" else None
    if args.grid:
        columns = min(8, max(2, n if n > 1 else math.isqrt(len(found) - 1) + 1))
        sheet = model.contact_sheet(pictures, [one["prompt"] for one in found], columns)
        notes = notes | {f"{name}s": [one[name] for one in found] for name in found[0]}
        print(save_png(sheet, file or Path(args.out, "grid.png"), notes))
        return
    for picture, one in zip(pictures, found):
        name = file or Path(args.out, f"{file_name(one['prompt'])}.png")
        print(save_png(to_image(picture), name, notes | one))


def main(argv: list[str]) -> None:
    args = arguments(argv)
    device, out = model.choose_device(args.device), Path(args.out)
    folder = out.parent if out.suffix.lower() == ".png" else out
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"cannot write to --out {folder}. Name a folder that can be written")
    folder.mkdir(parents=True, exist_ok=True)                  # before the work, so that none is lost
    if args.rank:                                              # read before the work, too
        config = text_encoder.TextConfig([args.rank], text_dtype="fp32")
        clip = text_encoder.load_image_encoder(args.rank, config), text_encoder.load_text_encoder(config)
    paths = [Path(path) for path in args.ckpt.split(",") if path]
    paths = paths or model.cascade(Path("runs"), bool(args.lowres), args.stop_at)
    if not all(prompt.strip() for prompt in args.wanted):
        print("note: empty prompt, drawing without one")
    prompts, pictures, notes = [prompt for prompt in args.wanted for _ in range(args.n)], None, {}
    for i, path in enumerate(paths, start=bool(args.lowres)):
        below = {"below": notes} if notes else {}
        pictures, seeds, notes = run_stage(path, i, args, device, prompts, pictures)
        found, n = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds)], args.n
        if args.rank and path == paths[-1]:
            n, scores = args.best or n, clip_scores(clip, pictures, prompts, device, args.batch_size)
            best = scores.view(-1, args.n).topk(n).indices + torch.arange(0, len(scores), args.n)[:, None]
            found = [found[k] | {"clip_score": round(scores[k].item(), 4)} for k in best.flatten().tolist()]
            pictures = pictures[best.flatten()]
        if args.keep_stages or path == paths[-1]:
            write(pictures, found, n, args, notes | below)
        notes |= {"seeds": seeds, **below}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except torch.OutOfMemoryError:
        die("out of GPU memory. Try a lower --batch-size")
    except (ValueError, OSError) as error:
        die(error)
