"""Prompts to pictures: `python sample.py "a house"` draws from the newest run, and what enlarges it.

A checkpoint is all it needs: network, schedule and text encoder are rebuilt from its metadata. A picture
depends on its prompt, its seed and the settings, not on the others of its batch."""
import argparse
import base64
import gc
import html
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)               # during the imports that take seconds
    gc.disable()                                               # for them it looks at all of torch in vain

import numpy as np
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


def die(message: object, status: int = 2) -> NoReturn:
    """The user's mistake in one line on standard error, exit status 2."""
    print(f"sample.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


def place() -> tuple[int, int]:
    """The number of this process among those that torchrun started, and how many they are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def warn(message: str) -> None:
    if place()[0] == 0:
        print(f"sample.py: warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------------------------- which runs, which weights
def cascade(root: Path, lowres: bool, stop_at: int) -> list[Path]:
    """The newest base run under `root`, the newest that enlarges its pictures, and so on up to `stop_at`
    pixels, 0 = as far as it goes; lowres: without a base, from the smallest pictures that are enlarged."""
    runs = [path.parent for path in root.glob("*/checkpoints") if model.checkpoint_folders(path.parent)]
    runs.sort(key=lambda run: model.checkpoint_folders(run)[-1].stat().st_mtime)

    # By the side that a run starts from: itself, and the side that it draws. The newest wins.
    ways = {}
    for run in runs:
        try:
            recipe = json.loads((run / "config.json").read_text("utf-8"))
            drawn = model.configured(data.DataConfig, recipe["DataConfig"])
            if recipe["TrainConfig"].get("objective") != "clip":                      # older ones do not say
                ways[drawn.lowres] = run, recipe["TrainConfig"]["size"]
        except (OSError, *model.UNFIT) as e:
            raise ValueError(f"{run}/config.json is damaged ({e}). Train on, or name runs by --ckpt") from e

    starts = [side for side in ways if bool(side) == lowres]
    side, path = min(starts, default=-1), []
    while side in ways and (side != stop_at or not path):
        run, side = ways[side]
        path.append(run)
    if not path:
        what, size = (" that enlarges pictures", 256) if lowres else ("", 64)
        raise ValueError(f"no checkpoint in {root}/{what}. Train one first: python train.py --size {size}")
    if stop_at not in (0, side):
        raise ValueError(f"--stop-at {stop_at}: the stages in {root}/ end at {side}")
    return path


def exponent(width: float) -> float:
    """The exponent gamma of the power function whose standard deviation is `width` of its length.
    Karras et al. 2023, arXiv:2312.02696, eq. 123: width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    ValueError outside of 0.01 to 0.28; at 0.289 the average is the plain one, gamma = 0."""
    if not 0.01 <= width <= 0.28:
        raise ValueError(f"width {width} of an average is outside 0.01 to 0.28. 0.05 to 0.20 is usual")
    a = width**-2
    return float(np.roots([1, 7, 16 - a, 12 - a]).real.max())


def reconstruct(folder: Path, step: int, width: float) -> model.Tensors:
    """The weights of `step` averaged with another width, from the snapshots in `folder`, by their names.
    The combination of snapshots whose weights of all updates come nearest to the wanted ones, by least
    squares (Karras et al. 2023, arXiv:2312.02696, section 3.2); with sums where they integrate, and shares
    that sum to 1, so that weights that stand still stay what they are. ValueError without a snapshot of that
    step; warns where the snapshots are too few."""
    files = {int(path.stem): path for path in folder.glob("[0-9]*.safetensors")}
    if step not in files:
        raise ValueError(f"{folder} has no snapshot of step {step}. Train with --profiles 8")

    # The averages, by the updates that they are of and their widths.
    averages = {}
    steps = [number for number in sorted(files) if number <= step]
    for number in steps:
        tensors, meta = model.load_tensors(files[number])
        for name, tensor in tensors.items():
            match = re.fullmatch(r"profile\.(0\.\d+)\.(.+)", name)
            if "updates" not in meta or not match:
                raise ValueError(f"{files[number]} is no snapshot of averages. Move it away")
            updates = int(meta["updates"])
            averages.setdefault((updates, float(match[1])), {})[match[2]] = tensor
    edges = np.linspace(0, updates, min(updates, 10000) + 1)

    def weights(n, width):
        return np.diff(np.minimum(edges / n, 1) ** (exponent(width) + 1))

    # A column for each: how much of it each update is. Shares sum to 1: fit those but the last one, by what
    # each has beyond the last one.
    columns = sorted(averages)
    table = np.stack([weights(*column) for column in columns], 1)
    wanted = weights(updates, width)
    last = table[:, -1:]
    beyond = table[:, :-1] - last
    shares = np.linalg.lstsq(beyond, wanted - last[:, 0])[0]
    shares = np.append(shares, 1 - shares.sum())
    miss = np.linalg.norm(table @ shares - wanted) / np.linalg.norm(wanted)
    if miss > 0.2:
        warn(f"{len(steps)} snapshots give the average of width {width} with an error of {miss:.0%}")

    total = {}
    for column, share in zip(columns, shares.tolist()):
        for name, tensor in averages[column].items():
            total[name] = total.get(name, 0) + share * tensor
    return total


# ------------------------------------------------------------------------------------- checkpoint to stage
CONFIGS = model.ModelConfig, diffusion.DiffusionConfig, data.DataConfig, text_encoder.TextConfig


@dataclass
class Stage:
    """What a checkpoint holds, ready to draw."""
    unet: nn.Module
    text: nn.Module
    load: Callable  # load_stage, for what goes with it: from the same places, to the same device
    schedule: diffusion.Schedule
    small_schedule: diffusion.Schedule  # of the pictures that it enlarges
    space: diffusion.Pixels | model.Latents
    config: diffusion.DiffusionConfig
    data: data.DataConfig
    size: int  # side of the pictures [pixels]
    device: torch.device
    step: int  # of training [steps]
    digest: str  # checksum of the checkpoint
    recipe: dict  # the configurations that it was trained by

    def network(self) -> Callable:
        """The U-Net, preconditioned around the small picture where there is one."""
        return diffusion.around(self.unet, self.schedule, self.small_schedule)


def reader(prompts: list[str], device: torch.device) -> Callable:
    """For `load_stage`: a frozen text encoder reads the prompts and is freed, before a U-Net needs the room;
    stages share what it said. One prompt at a time: no picture depends on its neighbours."""
    texts = dict.fromkeys(filter(None, map(text_encoder.clean, prompts)))
    said = {}

    def cached(_, encoder, load):
        key = encoder.fingerprint
        if key not in said:
            load()
            unread(encoder.reader, texts)
            encoder.to(device)
            said[key] = {}
            for text in ["", *texts] if encoder.reader.empty else texts:
                for _, *entry in text_encoder.encode_captions(encoder, [text]):
                    said[key][text] = entry
            encoder.to("meta")                                 # frees the weights, whoever holds the encoder
        return lambda text, beside: said[key][text_encoder.clean(text)]
    return cached


def unread(words: text_encoder.Reader, prompts: Iterable[str]) -> None:
    """Warn of what a text encoder cannot read of the prompts."""
    counts = words.counts
    counts.clear()
    for prompt in prompts:
        words.read(prompt)
    if counts["unknown"] or counts["cut"]:
        warn(f"{counts['unknown']} of {counts['tokens']} tokens unknown, {counts['cut']:d} prompts cut to "
             f"{words.length}")


def last_places(path: Path) -> tuple[list[str], str]:
    """Where the frozen text encoders and the VAE of a checkpoint lay when it was trained, if the config.json
    of its run is there."""
    for folder in [path, *path.absolute().parents][:4]:
        try:
            stored = model.read_config(folder)
            encoders = [str(name) for name in stored["TextConfig"]["text_encoder"] if name != "bytes"]
            return encoders, str(stored["ModelConfig"].get("vae", ""))
        except (OSError, *model.UNFIT):
            continue
    return [], ""


def load_pipeline(path: Path, device: torch.device, cached: Callable | None, ema: float) -> Stage:
    """A stage from the folder of a published pipeline: Stable Diffusion 1.x, 2.x or XL. ValueError, one line,
    where it is another one, or a part is missing."""
    if ema:
        raise ValueError(f"{path} is a published pipeline, without averages for --ema {ema}")
    said = model.open_pipeline(path)
    space = model.load_vae(said.pop("vae")).to(device)
    words = {name: said.pop(name) for name in list(said) if name.startswith(("text", "clip"))}
    text = text_encoder.load_text_encoder(text_encoder.TextConfig(**words), cached).to(device)
    config = diffusion.DiffusionConfig(**said)
    unet = model.load_unet(path / "unet").to(device).eval().requires_grad_(False)
    wanted = unet.config["in_channels"], unet.config["cross_attention_dim"], unet.pooled_width
    given = space.channels, text.dim, text.pooled_dim if unet.pooled_width else 0
    if wanted != given:
        raise ValueError(f"{path}: the U-Net reads {wanted} channels of latents, text and pooled text, its "
                         f"VAE and text encoder give {given}")

    side = unet.config.get("sample_size", 64)
    model.check(f"{path}/unet: sample_size", side, int, "[1..4096]")
    schedule = diffusion.make_schedule(config, side)
    load = partial(load_stage, device=device, cached=cached)
    return Stage(unet, text, load, schedule, schedule, space, config, data.DataConfig(), side * space.scale,
                 device, 0, model.checksum(unet.state_dict(), {}), {})


def load_stage(path: Path, device: torch.device, ema: float = 0.0, cached: Callable | None = None,
               encoders: Iterable[str] = (), vae: str = "", clip: bool = False) -> Stage:
    """A stage from a run directory (its newest checkpoint that verifies), a checkpoint folder or a file.
    ema: width of another average of the weights, see reconstruct; 0 = the one in the checkpoint.
    cached: `reader` of all prompts; without it a frozen text encoder stays in memory, ready for any.
    encoders, vae: folders where frozen ones lie now; else where they lay, beside the run, or in this folder.
    clip: whether it has to be a CLIP, or one that draws, as a published pipeline is, see load_pipeline.
    ValueError, one line, where there is no checkpoint, where it is damaged or of other code."""
    if (path / "model_index.json").is_file() and not clip:
        return load_pipeline(path, device, cached, ema)
    path, tensors, meta = model.read(path, warn)
    if ema:
        folder = path if path.is_dir() else path.parent
        tensors |= reconstruct((folder / "../../profiles").resolve(), int(meta["step"]), ema)
    with model.reading(path):
        stored = json.loads(meta["config"])
        shape, config, pictures, text = (model.configured(cls, stored[cls.__name__]) for cls in CONFIGS)
        size, step, made_with = stored["TrainConfig"]["size"], int(meta["step"]), meta["text"]
        made_in = meta["space"] if shape.vae else ""
        model.check("size", size, int, "[8..4096]")
    if (stored["TrainConfig"].get("objective") == "clip") != clip:
        raise ValueError(f"{path} {'draws, and is no CLIP' if clip else 'is a CLIP, for --clip or --rank'}")

    near = [*path.absolute().parents[:4], Path()]
    lay, vae_lay = last_places(path)
    text = text_encoder.locate(text, made_with, near, [*encoders, *lay])
    text = text_encoder.load_text_encoder(text, cached, device="meta")
    if not text_encoder.same_encoder(made_with, text.fingerprint):
        raise ValueError(f"{path} was trained with {made_with}, not with {text.fingerprint}. Put it there")

    space = diffusion.Pixels(len(data.MODES[pictures.picture_mode]))
    if shape.vae:
        places = [vae, vae_lay, shape.vae, *(folder / Path(shape.vae).name for folder in near)]
        space = model.find_vae(filter(None, places), made_in, shape.vae_dtype).to(device)
        if text_encoder.imitates_bf16(device.type):
            space.float()
    side = size // space.scale

    # Built without memory, and compared with the file, before anything is allocated.
    small = len(data.MODES[pictures.lowres_mode]) if pictures.lowres else 0
    widths = text.dim, text.pooled_dim, space.channels
    with model.reading(path):
        with torch.device("meta"):
            if "unet" in meta:
                unet = model.rebuild(json.loads(meta["unet"]), *widths[:2])
            elif clip:
                unet = model.CLIP(shape, side, *widths)
            else:
                unet = model.UNet(shape, side, *widths, small, config.learn_sigma, text.written_dim)
        parts = nn.ModuleDict({"unet": unet})
        if text.trainable:
            parts["text_encoder"] = text
        weights = {name: x for name, x in tensors.items() if name.split(".")[0] in parts}
        model.fill(parts, weights, device)
        schedule = diffusion.make_schedule(config, side)
        small_schedule = diffusion.make_schedule(config, pictures.lowres or side)
    text.to(device).eval().requires_grad_(False)
    load = partial(load_stage, device=device, cached=cached, encoders=encoders, vae=vae)
    return Stage(unet, text, load, schedule, small_schedule, space, config, pictures, size, device, step,
                 meta["sha256"], stored)


# -------------------------------------------------------------------------------------- prompts to pictures
@dataclass
class Settings:
    """How pictures are drawn: a field is a keyword of `generate`, a flag, and a note in the PNG."""
    guidance_scale: float = 3.0  # guidance scale, 1 = none; 5,2 = of two stages, 1 above [0..100]
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times at which there is guidance [0..1]
    guidance_rescale: float = 0.0  # share of the contrast it adds that is taken back [0..1]
    apg: float = 0.0  # adaptive projected guidance: its longest push, such as 15; 0 = plain [0..1e6]
    autoguide: str = ""  # a weaker checkpoint to move away from
    clip: str = ""  # a CLIP run that guides: a forward and backward pass a call; a,b: of two stages
    clip_scale: float = 1.0  # how strongly it does [0..1e6]
    negative: str = ""  # a prompt to move away from
    write: str = ""  # what is written in the pictures, lines by \n, by a run with --transcription
    write_guidance: float = -1.0  # guidance scale of --write, -1 = that of --guidance [-1..100]
    aug: float = 0.0  # noise on a low-resolution picture before it is enlarged, a time t [0..1]
    threshold: str = "static"  # predictions are clipped at 1 (static), a percentile of each (0..1], or none
    sampler: str = "dpmpp_2m"  # how the noise is removed
    steps: int = 25  # of the sampler; where not given 2 for a stage that enlarges [1..1000 steps]
    grid_times: str = "auto"  # in what steps are even: uniform (t), logsnr, karras; auto: by their number
    shift: float = 1.0  # above 1 more of the steps at the noisy end, below 1 at the clean one [0.01..100]
    respacing: str = ""  # these of 1000 steps instead: 250, 10,10,20 (of equal sections) or ddim25
    eta: float = -1.0  # fresh noise of a step, -1 = the sampler's own [-1..1]
    churn: float = 0.0  # fresh noise that heun adds in all its steps together [0..1000]
    init: str = ""  # a picture to start from, with --strength below 1 or --mask
    strength: float = 1.0  # how far it is noised [0.001..1]
    mask: str = ""  # a picture: black where --init stays, white where it is drawn anew, grey between
    trajectory: int = 0  # beside the picture, the x0 of every so many calls of the network [0..1000]
    resample: int = 1  # visits of every ten steps with --mask, so that its parts agree [1..1000]


# Settings of the first stage alone.
FIRST = ("autoguide", "init", "mask", "strength", "resample", "write_guidance")


def to_image(picture: Tensor, mode: str = "colour") -> Image.Image:
    """uint8 (3 or 1, H, W) -> a picture in colour or grey."""
    colour = picture.expand(3, -1, -1).permute(1, 2, 0)
    return Image.fromarray(colour.numpy()).convert(data.MODES[mode])


def resized(pictures: Iterable[Tensor], mode: str, size: int = 0) -> Tensor:
    """uint8 (N, 3 or 1, H, W) -> the same in colour or grey, and of `size` by the kernel of the data."""
    found = []
    for picture in pictures:
        image = to_image(picture, mode)
        found.append(torch.tensor(data.array(data.shrink(image, size or image.width))))
    return torch.stack(found)


def read_picture(path: str, size: int = 0) -> Tensor:
    """uint8 (3, size, size), as pictures are read in training; size 0: as large as it is. ValueError if it is
    none."""
    if not Path(path).is_file():
        raise ValueError(f"--init, --mask or --lowres {path} is no file")
    try:
        size = size or min(Image.open(path).size)
        return torch.from_numpy(data.decode(Path(path).read_bytes(), size))
    except Exception as e:                                     # of whichever decoder of Pillow
        raise ValueError(f"--init, --mask or --lowres {path} is no picture: {e}") from e


def read_mask(path: str, init: str, size: int) -> Tensor:
    """How much of --init stays at each pixel, (size, size) from 0 (white) to 1 (black), sharp where it is."""
    upright = (data.plain(Image.open(name), "RGB") for name in (init, path))
    whole, own = (f"{picture.width}x{picture.height}" for picture in upright)
    if whole != own:
        raise ValueError(f"--init is {whole} pixels, --mask {own}. Give both the same size")
    mask = read_picture(path).float().mean(0)
    return 1 - F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0] / 255


def companion(stage: Stage, settings: Settings, flag: str, times: Tensor) -> Stage | None:
    """The stage that a flag names, autoguide or clip, None without; ValueError where it does not fit."""
    name = getattr(settings, flag)
    if not name:
        return None
    other = stage.load(Path(name), clip=flag == "clip")

    def process(of):
        alpha, _ = of.schedule.alpha_sigma(times)
        return of.size, of.data.picture_mode, of.space.fingerprint, alpha.tolist()

    if process(other) != process(stage):
        raise ValueError(f"--{flag} needs a checkpoint of the same size and schedule, in the same space: "
                         f"{name} has {other.size} pixels and {other.config.schedule}, the stage "
                         f"{stage.size} and {stage.config.schedule}")
    against = settings.negative or settings.write_guidance >= 0
    if flag == "autoguide" and (against or other.data.lowres != stage.data.lowres):
        raise ValueError("--autoguide needs a checkpoint of the same --lowres, and no --negative nor "
                         "--write-guidance")
    return other


def noise_key(seed: int) -> int:
    return int(data.keyed(seed, "sample", 0).integers(2**63))


def small_condition(stage: Stage, pictures: Tensor, keys: Tensor, aug: float) -> dict[str, Tensor]:
    """What the network is told of pictures, uint8 (B, 3 or 1, h, w), that are to be enlarged."""
    small = resized(pictures, stage.data.lowres_mode).to(stage.device)
    small = stage.space.encode(small)
    eps = diffusion.noise_source(keys, small.shape[1:], stage.device)(-1)                 # no step's own
    return diffusion.augmented(small, eps, small.new_full((len(small),), aug), stage.small_schedule)


def sampler_of(s: Settings) -> Callable:
    """The sampler, with the fresh noise that is wanted; ValueError where it has none of that kind."""
    sampler = diffusion.SAMPLERS[s.sampler]
    takes = inspect.signature(sampler).parameters
    for name, value, others in (("eta", s.eta, "ddim or dpmpp_2m"), ("churn", s.churn or -1, "heun")):
        if value < 0:
            continue
        if name not in takes:
            raise ValueError(f"--{name} {value}: {s.sampler} has no fresh noise of that kind. Use "
                             f"--sampler {others}")
        sampler = partial(sampler, **{name: value})
    return sampler


def lines_of(stage: Stage, s: Settings, count: int) -> list[str]:
    """What is written in each of so many pictures; `write` may be a list of that. ValueError where the
    checkpoint does not read it."""
    lines = [s.write] * count if isinstance(s.write, str) else s.write
    if not stage.text.transcriber and (any(lines) or s.write_guidance >= 0):
        raise ValueError(f"--write {s.write} or --write-guidance needs a checkpoint that was trained with "
                         f"--transcription bytes, and this one of step {stage.step} was not")
    return lines


@torch.no_grad()
def generate(stage: Stage, prompts: list[str], seeds: list[int], batch_size: int = 16,
             dtype: torch.dtype = torch.float32, lowres: Tensor | None = None, kept=(),
             truth: Tensor | None = None, **settings) -> Tensor:
    """Draw one picture for each prompt from the noise of its seed: uint8 (N, 3 or 1, H, W) on the CPU.
    dtype: of the products; lowres: uint8 (N, 3 or 1, h, w) to enlarge; kept: gets each batch; and Settings.
    truth: pictures, uint8 (N, 3 or 1, H, W), of which it tells the bits per dimension (N,) instead.
    ValueError where these do not fit together, and when the network's output is not finite."""
    s, space = Settings(**settings), stage.space
    small_side = 0 if lowres is None else lowres.shape[-1]
    if stage.data.lowres != small_side:
        raise ValueError(f"a stage from {stage.data.lowres} to {stage.size} pixels was given {small_side}. "
                         "Name all stages in order by --ckpt, or give --lowres PICTURE to the first")
    alone = s.mask or s.strength != 1
    if bool(alone) != bool(s.init) or (s.resample > 1 and not s.mask):
        raise ValueError("--init needs --strength 0.7 or --mask, they need --init; --resample needs --mask")
    times = diffusion.sampling_times(stage.schedule, s.steps, s.grid_times, s.strength, s.shift)
    if s.respacing:
        times = s.strength * diffusion.respaced(s.respacing)
    side = stage.size // space.scale
    shape = (space.channels, side, side)
    if s.init:
        init = resized([read_picture(s.init, stage.size)], stage.data.picture_mode)
        known = space.encode(init.to(stage.device))                                   # (1, C, side, side)
    if s.mask:
        keep = read_mask(s.mask, s.init, side).to(stage.device)
    beside = [companion(stage, s, flag, times) for flag in ("autoguide", "clip")]
    lines = lines_of(stage, s, len(prompts))

    # The sampler, and the network that it asks.
    sampler = sampler_of(s) if truth is None else diffusion.nll
    learned = stage.config.learn_sigma and "variance" in inspect.signature(sampler).parameters
    network = diffusion.LearnedVariance(stage.network()) if learned else stage.network()

    keys = torch.tensor(list(map(noise_key, seeds)))
    drawn = [] if kept == () else kept
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        x = diffusion.gaussian(keys[part], shape, stage.device)
        noise = diffusion.noise_source(keys[part], shape, stage.device)
        small, guesses, run = {}, [], sampler
        if truth is not None:
            x = space.encode(truth[part].to(stage.device))
        if learned:                                            # what it said last of the prompts, first rows
            run = partial(sampler, variance=lambda x=x: network.fraction[:len(x)])
        if small_side:
            small = small_condition(stage, lowres[part], keys[part], s.aug)
        if s.init:
            x = diffusion.noised(known, x, times[:1].to(x), stage.schedule)
        if s.mask:
            run = partial(diffusion.inpaint, run, known=known.expand_as(x), keep=keep, resample=s.resample)
        with torch.autocast(stage.device.type, dtype, enabled=dtype != torch.float32):
            denoise = denoiser_of(stage, network, beside, s, prompts[part], small, lines[part])
            x = run(noted(denoise, s.trajectory, guesses), x, times, noise, stage.schedule)
        if not x.isfinite().all():
            raise ValueError(f"the network's output is not finite (checkpoint of step {stage.step}). "
                             "Try --dtype fp32, a lower --guidance or an earlier checkpoint")
        if truth is None:
            x = data.side_by_side(*map(space.decode, [*guesses, x]))
        drawn.append(x.cpu())
    return torch.cat(drawn)


def noted(denoise: Callable, every: int, guesses: list[Tensor]) -> Callable:
    """The denoiser, which keeps what it says each so many calls, 0 = never."""
    calls = itertools.count()

    def denoise_and_note(x_t, t):
        x0 = denoise(x_t, t)
        if next(calls) % every == 0:
            guesses.append(x0)
        return x0
    return denoise_and_note if every else denoise


def denoiser_of(stage: Stage, network: Callable, beside: list[Stage | None], s: Settings, prompts: list[str],
                small: dict[str, Tensor], lines: list[str]) -> Callable:
    """The denoiser of some prompts and of what is written: guidance and thresholds around the network.
    beside: those of --autoguide and --clip, see companion."""
    weak, clip = beside

    def condition(of, texts, *written):
        told = written if of.text.transcriber else ()
        return of.text.encode(texts, stage.device, *told) | small

    worse = None
    if weak:
        told = condition(weak, prompts, lines)
        worse = diffusion.denoiser(weak.network(), weak.schedule, weak.config, told)
    combine = diffusion.projected(s.apg) if s.apg else torch.lerp
    denoise = diffusion.guided(
        network, stage.schedule, stage.config, condition(stage, prompts, lines), s.guidance_scale,
        condition(stage, [s.negative] * len(prompts)), worse,
        None if s.write_guidance < 0 else s.write_guidance, interval=s.guidance_interval,
        combine=diffusion.rescaled(s.guidance_rescale, combine))
    if clip:
        said = clip.unet.read(**clip.text.encode(prompts, stage.device))

        def similarity(x_t, t):
            return clip.unet.scale() * (clip.unet(x_t, t) * said).sum(1)

        denoise = diffusion.classifier_guidance(denoise, similarity, stage.schedule, s.clip_scale,
                                                s.guidance_interval)
    if s.threshold == "none":
        return denoise
    percentile = None if s.threshold == "static" else float(s.threshold)
    return diffusion.threshold(denoise, percentile, stage.space.limit)


def clip_towers(name: str, device: torch.device, **places) -> tuple[Callable, Callable]:
    """What a CLIP, a published folder or a run at the clean end of its time, makes of pictures, uint8
    (B, 3 or 1, H, W), and of captions: (B, P) of length 1. places: encoders and vae of load_stage."""
    path = Path(name)
    if path.is_file() or (path / "ema.safetensors").exists() or (path / "checkpoints").is_dir():
        clip = load_stage(path, device, clip=True, **places)

        def see(pictures):
            small = resized(pictures, clip.data.picture_mode, clip.size).to(device)
            return clip.unet(clip.space.encode(small), torch.zeros(len(small), device=device))

        def read(captions):
            return clip.unet.read(**clip.text.encode(captions, device))
        return see, read

    config = text_encoder.TextConfig([name], text_dtype="fp32")
    tower = text_encoder.load_image_encoder(name, config).to(device)
    words = text_encoder.load_text_encoder(config).to(device)

    def see(pictures):
        return F.normalize(tower(pictures.expand(-1, 3, -1, -1).to(device)))

    def read(captions):
        return F.normalize(words.encode(captions, device)["pooled"])
    return see, read


def clip_score(seen: Tensor, said: Tensor) -> Tensor:
    """CLIP scores (N,) of pictures and their captions by their features (N, P), 0 to 2.5: 2.5 max(cosine, 0)
    (Hessel et al. 2021, arXiv:2104.08718, section 3; no "A photo depicts")."""
    return 2.5 * (seen.cpu() * said.cpu()).sum(1).clamp(min=0)


@torch.no_grad()
def clip_scores(name: str, pictures: Tensor, prompts: list[str], device: torch.device, batch_size: int = 16,
                **places) -> Tensor:
    """CLIP scores (N,) of pictures, uint8 (N, 3 or 1, H, W), with their prompts; for the rest see
    clip_towers."""
    see, read = clip_towers(name, device, **places)
    scores = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        scores.append(clip_score(see(pictures[part]), read(prompts[part])))
    return torch.cat(scores)


# -------------------------------------------------------------------------------------------------- scores
DRAWN = "what was drawn"  # as a set of pictures, and below FEW the Frechet distance is mostly their number
FEW = 2048
# How a TorchScript wants its pictures: side, and what is taken off and divided by, of 0 to 255.
INPUTS = {"inception": (299, 127.5, 127.5),
          "imagenet": (224, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))}


@dataclass(eq=False)
class Drawn(data.Source):
    """Pictures that were drawn, uint8 (N, 3, H, W), with their prompts, if they are known."""
    pictures: np.ndarray
    prompts: list[str]
    name: str

    def __len__(self):
        return len(self.pictures)

    def sample(self, i):
        return data.Sample(self.pictures[i], self.prompts[i:i + 1], {})

    def fingerprint(self):
        return self.pictures.tobytes()


def save_npz(path: str, pictures: Tensor, prompts: list[str]) -> None:
    """Pictures, uint8 (N, 3 or 1, H, W), as the evaluation of Dhariwal and Nichol 2021 reads them: "arr_0",
    uint8 (N, H, W, 3); and "captions". Whole or not at all."""
    colour = pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=colour.numpy(), captions=np.array(prompts))
    data.write(Path(path), buffer.getbuffer())


def read_npz(path: str, size: int) -> Drawn:
    """The pictures of an .npz in their own size, see save_npz. ValueError where it has none."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            pictures = stored["arr_0"].transpose(0, 3, 1, 2)
            prompts = stored["captions"].tolist() if "captions" in stored else []
        if pictures.dtype != np.uint8 or pictures.shape[1] != 3 or not pictures.size:
            raise ValueError(f"{pictures.dtype} {pictures.shape}")
    except Exception as e:                                     # zip files raise nearly anything on garbage
        raise ValueError(f"{path} has no arr_0 of uint8 (N, H, W, 3) ({e})") from e
    return Drawn(pictures, prompts, path)


def recipe_of(run: Path) -> tuple[data.DataConfig, int]:
    """What a run was trained on, whole pictures, and their side."""
    with model.reading(run / "config.json"):
        stored = json.loads((run / "config.json").read_text("utf-8"))
        whole = model.configured(data.DataConfig, stored["DataConfig"] | {"crop": 0})
        size = stored["TrainConfig"]["size"]
        model.check("size", size, int, "[8..4096]")
    return whole, size


def side_of(source: data.Source) -> int:
    """The short side of the first picture that can be read [pixels]. ValueError where there is none."""
    for i in range(len(source)):
        try:
            return min(data.lazy(source.sample(i).picture).size)
        except Exception:                                      # decoders raise nearly anything on garbage
            continue
    raise ValueError(f"{source.name} has no picture that can be read")


def picture_set(name: str | Path) -> data.Pictures:
    """The pictures that a run keeps for validation, those of an .npz, or all that --data reads."""
    if Path(name, "config.json").is_file():
        return data.Pictures(*recipe_of(Path(name)), 0, "val")
    if name.endswith(".npz"):
        data.SOURCES[name] = partial(read_npz, name)
    pictures = data.Pictures(data.DataConfig([name], held_out=0, max_bad=1.0), 8, 0, "val")
    pictures.size = side_of(pictures.sources[0])
    return pictures


def feature_network(name: str, how: str, device: torch.device, **places) -> Callable:
    """What turns pictures, uint8 (B, 3, H, W), into features (B, F): a TorchScript, or a CLIP's folder or
    run. how: a row of INPUTS, or bytes, for one that resizes by itself; auto: by its parameters. ValueError
    where it is none, or does not take the pictures. A TorchScript is a program: use one that you trust."""
    if Path(name).is_dir():
        return clip_towers(name, device, **places)[0]
    try:
        net = torch.jit.load(name, map_location=device).eval()
        named = "return_features" in str(net.forward.schema)   # the published Inception
    except (RuntimeError, ValueError, AttributeError) as e:
        raise ValueError(f"--features {name} is no TorchScript, nor the folder of a CLIP ({e!s:.100})") from e
    if how == "auto":
        how = "bytes" if named else "inception"

    def see(pictures):
        x = pictures.to(device)
        if how != "bytes":
            side, *moments = INPUTS[how]
            mean, deviation = (x.new_tensor(moment, dtype=torch.float32).view(-1, 1, 1) for moment in moments)
            x = F.interpolate(x.float(), side, mode="bilinear", antialias=True)
            x = (x - mean) / deviation
        try:
            return net(x, return_features=True) if named else net(x)
        except RuntimeError as e:
            reason = str(e).strip().splitlines()[-1][:100]
            raise ValueError(f"--features {name} fails at {how} {tuple(x.shape)} ({reason}). Try another "
                             "--feature-input") from e
    return see


@torch.no_grad()
def features_of(pictures: data.Pictures, see: Callable, args: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """What a network sees in the first --limit of a set, (N, F), float64, and their captions; kept in the
    folder --keep-features, and read from there."""
    count = min(len(pictures), args.limit or math.inf)
    if count < 8:
        raise ValueError(f"{pictures.summary}: scores need 8 or more")
    file = Path(args.features).absolute()
    if (file / "checkpoints").is_dir():                        # of a run, its newest weights
        file = model.checkpoint_folders(file)[-1]
    network = file, data.state(file), args.feature_input
    mark = repr((pictures.fingerprint, pictures.config, pictures.size, count, network))
    kept = Path(args.keep_features, f"{data.hash_of(mark.encode())}.safetensors")
    if args.keep_features and kept.exists():
        stored, notes = model.load_tensors(kept)
        return stored["features"].double(), json.loads(notes["captions"])

    workers = min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0
    batches = data.loader(pictures, 0, count, args.batch_size, workers=workers)
    bar = tqdm(batches, pictures.sources[0].name, math.ceil(count / args.batch_size), disable=None)
    rows, captions, replaced = [], [], []
    for batch in bar:
        seen = see(batch["picture"].expand(-1, 3, -1, -1))
        rows.append(seen.flatten(1).float().cpu())
        captions += batch["captions"]
        replaced += batch["replaced"]
    for line in [*pictures.warnings, *replaced[:10]]:
        warn(line)
    if replaced:
        warn(f"{len(replaced)} pictures could not be read and are replaced by others")
    features = torch.cat(rows)
    if args.keep_features:
        kept.parent.mkdir(parents=True, exist_ok=True)
        model.save_tensors(kept, {"features": features}, {"captions": json.dumps(captions)})
    return features.double(), captions


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of means and covariances of features (N, F), float64
    (Heusel et al. 2017, arXiv:1706.08500). With C = R^T R the trace of the last root is the sum of the
    singular values of R_a R_b^T: exact where a product of covariances would lose half of the digits."""
    roots = []
    for x in (a, b):
        centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
        roots.append(torch.linalg.qr(centred, mode="r").R)
    shift = (a.mean(0) - b.mean(0)).square().sum()
    spread = sum(root.square().sum() for root in roots)
    common = torch.linalg.svdvals(roots[0] @ roots[1].mT).sum()
    return float((shift + spread - 2 * common).clamp(min=0))


def polynomial(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT / a.shape[-1] + 1) ** 3


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(a, b).square() / 200)


def kernel_distance(a: Tensor, b: Tensor, kernel: Callable = polynomial) -> float:
    """Squared maximum mean discrepancy of features (N, F), float64, unbiased (Gretton et al. 2012, eq. 3);
    with the polynomial kernel the KID of Binkowski et al. 2018, arXiv:1801.01401; with the Gaussian one, of
    CLIP's features and times 1000, the CMMD of Jayasumana et al. 2024, arXiv:2401.09603."""
    means = []
    for x, y in ((a, a), (b, b), (a, b)):
        total = sum(kernel(part, y).sum() for part in x.split(1024))
        pairs = len(x) * len(y)
        if x is y:                                             # no picture is compared with itself
            total -= kernel(x[:, None], x[:, None]).sum()
            pairs -= len(x)
        means.append(float(total) / pairs)
    return means[0] + means[1] - 2 * means[2]


def share_near(a: Tensor, b: Tensor) -> float:
    """Share of the features a (N, F) that are as near to one of b as its third nearest neighbour in b is,
    the fourth with itself: precision where b is real, recall where a is (Kynkaanniemi et al. 2019,
    arXiv:1904.06991, eq. 1, 2)."""
    radii = torch.cat([
        torch.cdist(part, b).kthvalue(4).values for part in b.split(1024)])
    near = [(torch.cdist(part, b) <= radii).any(1) for part in a.split(1024)]
    return float(torch.cat(near).double().mean())


def compared(drawn: Tensor, real: Tensor) -> dict[str, float]:
    """Scores of features (N, F), float64, against others. "kernel_deviation" is that over 20 random subsets,
    of up to 1000 or half of them; below FEW "frechet_floor" is how far parts of the real ones are apart."""
    few = min(len(drawn), len(real))
    found = {"frechet": frechet_distance(drawn, real), "kernel": kernel_distance(drawn, real)}
    size, values = min(1000, few // 2), []
    for number in range(20):
        rng = data.keyed(0, "subset", number)
        some = [x[rng.permutation(len(x))[:size]] for x in (drawn, real)]
        values.append(kernel_distance(*some))
    found["kernel_deviation"] = float(np.std(values))
    found["precision"] = share_near(drawn, real)
    found["recall"] = share_near(real, drawn)

    if few < FEW:
        part = min(len(drawn), len(real) // 2)
        order = data.keyed(0, "floor", 0).permutation(len(real))
        floor = frechet_distance(real[order[:part]], real[order[part:]])
        warn(f"under {FEW} pictures the Frechet distance is too high: {part} of the real ones are "
             f"{floor:.4g} away from the other {len(real) - part}. Compare it with that of as many only")
        found["frechet_floor"] = floor
    return found


@torch.no_grad()
def score(drawn: data.Pictures, args: argparse.Namespace, device: torch.device) -> None:
    """Print the scores of some pictures against those of --against."""
    see = feature_network(args.features, args.feature_input, device, **args.places)
    sets = [drawn, picture_set(args.against)]
    side = args.score_size or min(pictures.size for pictures in sets)
    seen, captions = [], []
    for pictures in sets:
        pictures.size = side
        features, texts = features_of(pictures, see, args)
        seen.append(features.to(device if device.type == "cuda" else "cpu"))
        captions.append(texts)
    print(f"{len(seen[0]):,} pictures of {args.score or DRAWN} against {len(seen[1]):,} of {args.against}, "
          f"{side} pixels, {seen[0].shape[1]} features of {args.features}")

    found = compared(*seen)
    if Path(args.features).is_dir():
        found["cmmd"] = 1000 * kernel_distance(*seen, gaussian)
        if all(captions[0]):
            _, read = clip_towers(args.features, device, **args.places)
            said = [read([caption]) for caption in captions[0]]
            found["clip_score"] = clip_score(seen[0], torch.cat(said)).mean()
    print("  ".join(f"{name} {value:.5g}" for name, value in found.items()))


# ---------------------------------------------------------------------------------------- the command line
def sampler_name(word: str) -> str:
    if word not in diffusion.SAMPLERS:
        raise ValueError
    return word


def threshold_name(word: str) -> str:
    if not re.fullmatch(r"static|none|0?\.\d+|1(\.0*)?", word):
        raise ValueError
    return word


# Fields that take a value for each stage, 5,2: the type of a value.
LISTS = {"guidance_scale": float, "steps": int, "seed": int, "sampler": sampler_name,
         "threshold": threshold_name, "clip": str, "clip_scale": float}


@dataclass
class Flags:
    """What the command line takes beside the prompt and Settings: a field is a flag."""
    interactive: bool = False  # ask for prompts, and draw each
    prompts: str | None = None  # a file of prompts, one a line, or a run: its held-out captions
    ckpt: str = ""  # run, checkpoint or ema.safetensors; a,b: of stages; empty: the newest
    stop_at: int = 0  # side of the last stage that is drawn, 0 = all there are [0..4096 pixels]
    lowres: str = ""  # a picture: enlarge this one instead of drawing the first
    keep_stages: bool = False  # write those below, too
    validate: int = 0  # first compare held-out pictures with what is made of them, by --aug [0..10000 images]
    nll: int = 0  # print the bits per dimension of held-out pictures, over --sample-steps [0..1000000 images]
    compare: tuple[str, ...] = ()  # draw from each of these runs, side by side: compare.html
    ema: float = 0.0  # another width of the averaged weights, 0 = own [0..0.28]
    n: int = 1  # pictures of a prompt, seeds SEED, SEED + 1, ...; in a set all differ [1..10000 images]
    text_encoder: tuple[str, ...] = ()  # folders where frozen text encoders lie now
    vae: str = ""  # folder where the VAE of the latents lies now
    export: str = ""  # write a run's published U-Net for diffusers into this folder, then leave
    rank: str = ""  # a CLIP, published or a run, whose score is noted
    best: int = 0  # keep so many of --n by that score, 0 = all [0..10000 images]
    score: str = ""  # score a set: .npz, folder, shards, or a run's held-out pictures
    against: str = ""  # the set to compare with; without --score what is drawn is scored
    features: str = ""  # a TorchScript file (a program: use one that you trust), or CLIP's folder
    feature_input: str = "auto"  # how it takes pictures
    score_size: int = 0  # side of both, 0 = of the smaller [0..4096 pixels]
    keep_features: str = ""  # a folder that keeps the features, for the next score
    limit: int = 0  # the first so many of each of these, 0 = all [images]
    seed: int = 0  # of the noise [0..9223372036854775807]
    out: str = "."  # a folder, or the name of a .png
    grid: bool = False  # one sheet with captions
    npz: str = ""  # all pictures in this file, and PNG with --grid only
    batch_size: int = 16  # pictures drawn at once [1..4096 images]
    device: str = ""  # cuda, mps or cpu; the first of them there is when not given
    dtype: str = "fp32"  # of the matrix products


def flag_of(name: str) -> str:
    """The flag of a field."""
    name = {"guidance_scale": "guidance", "steps": "sample-steps"}.get(name, name)
    return "--" + name.replace("_", "-")


def parser() -> argparse.ArgumentParser:
    """The flags: each field of Flags and of Settings. [1..9] in a help are limits."""
    p = argparse.ArgumentParser(prog="sample.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = die
    p.add_argument("prompt", nargs="?", help="what to draw")
    which = p.add_mutually_exclusive_group()

    choices = {"grid_times": ["auto", *diffusion.GRIDS], "feature_input": ["auto", "bytes", *INPUTS],
               "dtype": text_encoder.DTYPES}
    helps = model.helps(Flags) | model.helps(Settings)
    helps["sampler"] += ": " + ", ".join(diffusion.SAMPLERS)
    usual = vars(Flags()) | vars(Settings())
    for name, default in usual.items():
        options = {"dest": name, "default": default, "help": helps[name]}
        if name in choices:
            options["choices"] = choices[name]
        elif isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options |= {"nargs": len(default) or "*", "type": float if default else str}
        elif isinstance(default, int | float) and name not in LISTS:          # those `arguments` reads
            options["type"] = type(default)
        short = ["-i"] if name == "interactive" else []
        group = which if name in ("ckpt", "stop_at") else p
        group.add_argument(*short, flag_of(name), **options)
    return p


def read_lines(path: str) -> list[str]:
    """Those of a text file, see data.read_text; ValueError if it is none, or has over a mebibyte."""
    if not Path(path).is_file():
        raise ValueError(f"--prompts {path} is no file")
    with open(path, "rb") as file:
        content = file.read(data.MAX_TEXT + 1)
    text, guessed = data.read_text(content)
    if (guessed and "\ufffd" in text) or "\0" in text:
        raise ValueError(f"--prompts {path} is no text in UTF-8. Save it as that")
    if guessed:
        warn(f"--prompts {path} is not UTF-8; read as cp1252")
    if len(content) > data.MAX_TEXT:
        raise ValueError(f"--prompts {path} has over {data.MAX_TEXT >> 20} MiB. Draw it in parts")
    return text.splitlines()


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. A mistake ends the program in one line."""
    p = parser()
    args = p.parse_args(argv)
    if (args.score or args.against) and not (args.against and args.features):
        die(f"a score of {args.score or DRAWN} needs --against SET and --features FILE")
    promptless = args.export or args.score or args.interactive or args.nll
    if not promptless and (args.prompt is None) == (args.prompts is None):
        die('give a prompt, python sample.py "a house", or --prompts FILE')
    args.places = {"encoders": args.text_encoder, "vae": args.vae}
    args.usual = set()
    for action in p._actions:
        values = getattr(args, action.dest, None)
        flag = flag_of(action.dest)
        if action.dest in LISTS:
            if values == action.default:                       # what is given is still text
                args.usual.add(action.dest)
            try:
                values = tuple(map(LISTS[action.dest], str(values).split(",")))
            except ValueError:
                die(f"{flag} {values} is none of: {action.help}; or of these one a stage, a,b")
            setattr(args, action.dest, values)
        model.check(flag, values, object, action.help)

    if args.best > args.n or (args.best and not args.rank):
        die(f"--best {args.best} needs as many pictures, --n {args.n}, and scores, --rank DIR")
    if args.clip_scale != (Settings.clip_scale,) and not any(args.clip):
        die(f"--clip-scale {args.clip_scale[0]} has no effect without --clip RUN")
    if args.interactive and (args.prompt or args.prompts or args.compare or args.validate):
        die("-i asks for prompts and draws them: leave PROMPT, --prompts, --compare and --validate away")
    args.write = data.transcribed({"transcription": args.write.replace("\\n", "\n")})
    args.wanted = [args.prompt or ""]
    if args.npz and args.keep_stages:
        die("--npz is for the pictures of the last stage, without --keep-stages")
    if (args.trajectory or args.compare) and (args.npz or args.against or args.rank):
        die("--npz, --against and --rank are for single pictures, without --trajectory and --compare")
    if args.interactive and place()[1] > 1:
        die("-i asks on one terminal: start it without torchrun")
    if args.prompts is not None:
        if Path(args.prompts, "config.json").is_file():
            held = picture_set(args.prompts)
            lines = [held[i]["caption"] for i in range(len(held))[:args.limit or None]]
        else:
            lines = read_lines(args.prompts)
        args.wanted = list(filter(None, map(str.strip, lines)))
        if not args.wanted:
            die(f"--prompts {args.prompts} has no prompt in it. Write one a line")
    return args


def settings_of(args: argparse.Namespace, i: int, stage: Stage) -> dict:
    """The settings of the i-th stage that is drawn, and its seed: a list's last value counts for the rest,
    but above those that are named nothing is guided."""
    chosen = {}
    for name, usual in {"seed": 0, **vars(Settings())}.items():
        value = getattr(args, name)
        if name in LISTS:
            value = value[min(i, len(value) - 1)]
        if name in FIRST and i > 0:
            value = usual
        chosen[name] = value
    if (stage.data.lowres and "guidance_scale" in args.usual) or i >= len(args.guidance_scale):
        chosen["guidance_scale"] = 1.0
    if i >= len(args.clip):
        chosen["clip"] = ""
    if stage.data.lowres and "steps" in args.usual:            # the small picture says most of it
        chosen["steps"] = 2
    return chosen


def detail(pictures: Tensor, small_side: int) -> Tensor:
    """The power of pictures (N, C, H, W) above half of what a picture of `small_side` can show: at
    frequencies of more than a quarter of its pixels to the side."""
    side = pictures.shape[-1]
    power = torch.fft.rfft2(pictures.double()).abs().square()
    y, x = torch.fft.fftfreq(side) * side, torch.fft.rfftfreq(side) * side
    return power[..., torch.hypot(y[:, None], x) > small_side / 4].sum()


def validate(stage: Stage, draw: Callable, held: dict, prompts: list[str], seeds, below) -> None:
    """Print how near a stage comes to held-out pictures that were made small, over levels of --aug, and the
    best: PSNR, mean colour, and their detail as a share of the truth's. Of pictures that the stage below drew
    there is no truth: they are made small again."""
    truth, small = (torch.from_numpy(held[name]) for name in ("picture", "lowres"))
    mode = "grey" if "grey" in (stage.data.picture_mode, stage.data.lowres_mode) else "colour"
    rows = [("bicubic", resized(small, stage.data.picture_mode, stage.size), truth)]
    for aug in (0.0, 0.05, 0.1, 0.2, 0.4):
        again = partial(draw, aug=aug, init="", mask="", strength=1.0, resample=1, trajectory=0)
        told = {"write": held["transcriptions"]} if stage.text.transcriber else {}
        enlarged = again(held["captions"], range(len(truth)), lowres=small, **told)
        rows.append((f"--aug {aug}", enlarged, truth))
        drawn = resized(again(prompts, seeds, lowres=below), mode, below.shape[-1])
        rows.append((f"--aug {aug}, below", drawn, resized(below, mode)))

    side = small.shape[-1]
    best = (0.0, "")
    for name, made, wanted in rows:
        error = (made.double() - wanted).flatten(2)                                   # (N, C, H * W)
        power = error.square().mean((1, 2)).clamp(min=1e-4)
        psnr = 10 * torch.log10(255**2 / power)
        psnr, shift = psnr.mean().item(), error.mean(2).abs().mean()
        line = f"{name:17}  PSNR {psnr:5.2f} dB  mean colour {shift:5.2f}/255"
        if wanted is truth:
            share = detail(made, side) / detail(truth, side)
            line += f"  detail {share:.2f}"
            best = max(best, (psnr, name))
        print(line)
    print(f"best of {len(truth)} pictures: {best[1]}")


def shared(draw: Callable, prompts: list[str], seeds: list[int], lowres: Tensor | None, kept) -> Tensor:
    """What `draw` makes of all prompts, of which each process of torchrun draws as many: where they do not
    divide, the last one some of the first again."""
    rank, world = place()
    if world == 1:
        return draw(prompts, seeds, lowres=lowres, kept=kept)
    share = math.ceil(len(prompts) / world)
    own = [i % len(prompts) for i in range(rank * share, (rank + 1) * share)]
    below = None if lowres is None else lowres[own]
    drawn = draw(
        [prompts[i] for i in own],
        [seeds[i] for i in own],
        lowres=below).contiguous()
    parts = [torch.empty_like(drawn) for _ in range(world)]
    dist.all_gather(parts, drawn)
    return torch.cat(parts)[:len(prompts)]


def run_stage(stage: Stage, i: int, args: argparse.Namespace, prompts: list[str], below, held: dict):
    """The pictures of the i-th stage and the notes of each; `below`: the pictures of the stage before."""
    settings = settings_of(args, i, stage)
    seed = settings.pop("seed")
    if below is not None:                                      # of a --trajectory its end
        below = below[..., -below.shape[-2]:]
    if settings["guidance_scale"] > 30:
        warn(f"--guidance {settings['guidance_scale']} is very high; 2 to 8 is usual")
    unread(stage.text.reader, prompts[::args.n])
    if stage.text.transcriber:
        unread(stage.text.transcriber, [settings["write"]])
    elif i and settings["write"]:
        warn(f"the stage of {stage.size} pixels was trained without --transcription: it goes by the small "
             "picture")
        settings["write"] = ""
    if args.lowres and i == 0:
        picture = read_picture(args.lowres, stage.data.lowres or stage.size)
        below = torch.stack([picture] * len(prompts))

    turn = len(prompts) if args.npz or args.against else args.n                     # a set has no noise twice
    seeds = [seed + k % turn for k in range(len(prompts))]
    draw = partial(generate, stage, batch_size=args.batch_size, dtype=text_encoder.DTYPES[args.dtype],
                   **settings)
    kept = []
    try:
        pictures = shared(draw, prompts, seeds, below, kept)
    except KeyboardInterrupt:                                  # what is drawn is kept, see main
        if not kept:
            raise
        pictures, held = torch.cat(kept), {}
    if held:
        validate(stage, draw, held, prompts, seeds, below)
    for k, picture in enumerate(pictures, 1):
        if picture.float().std() < 1:
            warn(f"picture {k} is constant; the network is probably untrained, or --guidance is too high")

    common = settings | {"ema": args.ema, "dtype": args.dtype, "checkpoint": stage.digest, "step": stage.step}
    for name in ("autoguide", "clip", "init", "mask"):         # no folders of this machine
        common[name] = Path(common[name]).name
    return pictures, [common | {"prompt": prompt, "seed": k} for prompt, k in zip(prompts, seeds)]


def file_name(prompt: str) -> str:
    """A safe name for a prompt: lower-case ASCII letters, digits and dashes, at most 80."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:80].strip("-") or "picture"


def write(pictures: Tensor, made: list[dict], n: int, args: argparse.Namespace) -> None:
    """Pictures, n of a prompt, with their notes, or a sheet of them: into the folder or the file --out."""
    prompts = [one["prompt"] for one in made]
    if args.npz:
        save_npz(args.npz, pictures, prompts)
        print(args.npz)
        if not args.grid:
            return
    file = Path(args.out) if Path(args.out).suffix.lower() == ".png" else None
    if args.grid:
        columns = n if n > 1 else round(len(made) ** 0.5)
        below = data.labels(prompts, [one["write"] for one in made])
        sheet = data.contact_sheet(pictures, below, min(8, max(2, columns)))
        pictures, prompts = [torch.from_numpy(data.array(sheet))], ["grid"]
        made = [{"pictures": made}]
    for picture, prompt, notes in zip(pictures, prompts, made):
        path = file or Path(args.out, f"{file_name(prompt)}.png")
        replace = file and len(made) == 1 and not (args.keep_stages or args.interactive)
        print(data.save_png(to_image(picture), path, notes, warn, replace))


def ranked(pictures: Tensor, made: list[dict], n: int, args: argparse.Namespace, device) -> list[int]:
    """Which of the pictures are the best n of each prompt by CLIP score, which their notes get."""
    prompts = [note["prompt"] for note in made]
    scores = clip_scores(args.rank, pictures, prompts, device, args.batch_size, **args.places)
    for note, value in zip(made, scores.tolist()):
        note["clip_score"] = round(value, 4)
    first = torch.arange(0, len(scores), args.n)[:, None]
    return (scores.view(-1, args.n).topk(n).indices + first).flatten().tolist()


def held_out(path: Path, count: int) -> dict:
    """Up to `count` pictures that a run keeps for validation, and their small versions, if it enlarges."""
    runs = [folder for folder in (path, *path.parents) if (folder / "config.json").is_file()]
    if not runs:
        die(f"--validate or --nll needs the config.json of the run of {path}, which names its pictures")
    pictures = picture_set(runs[0])
    held = data.collect(pictures, 0, min(count, len(pictures)))
    for line in [*pictures.warnings, *held["replaced"]]:
        warn(line)
    return held


def print_bits(stage: Stage, held: dict, args: argparse.Namespace) -> None:
    """Print an upper bound of the bits per dimension of held-out pictures, with their captions, see
    diffusion.nll. ValueError for latents."""
    if stage.space.fingerprint:
        raise ValueError("--nll is for runs that draw pixels; bits of latents are not those of pictures")
    settings = settings_of(args, 0, stage) | {"guidance_scale": 1.0}
    if stage.text.transcriber:
        settings["write"] = held["transcriptions"]
    del settings["seed"]
    small, truth = (torch.from_numpy(held[name]) if name in held else None for name in ("lowres", "picture"))
    bits = generate(stage, held["captions"], held["positions"], args.batch_size, lowres=small, truth=truth,
                    **settings)
    error = bits.std() / len(bits) ** 0.5
    print(f"{bits.mean():.4f} +- {error:.4f} bits per dimension at most, of {len(bits)} held-out pictures "
          f"in {settings['steps']} steps")


PAGE = """<!doctype html><meta charset="utf-8"><title>limn</title>
<style>body {font: 14px sans-serif} td {padding: 4px; max-width: 256px} th {text-align: left}
img {width: 256px; image-rendering: pixelated}</style><table>"""


def cell(content: str | Tensor) -> str:
    """Text, or a picture, uint8 (3 or 1, H, W), in a page that needs no other file."""
    if isinstance(content, str):
        return f"<td>{html.escape(content)}</td>"
    buffer = io.BytesIO()
    to_image(content).save(buffer, "PNG")
    return f'<td><img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"></td>'


def compare(paths: list[Path], load: Callable, args: argparse.Namespace, prompts: list[str]) -> None:
    """Draw the same prompts and seeds from several runs: compare.png, and compare.html with what differs in
    their configurations."""
    columns, recipes = [], []
    for path in paths:
        stage = load(path)
        pictures, _ = run_stage(stage, 0, args, prompts, None, {})
        if len(pictures) < len(prompts):
            told = f"stopped after {len(pictures)} of {len(prompts)} pictures of {path}"
            die(f"{told}: nothing to compare", 130)
        columns.append(pictures)
        recipe = {"step": stage.step}
        for group in stage.recipe.values():
            recipe |= group
        recipes.append(recipe)
    names = list(map(str, paths))
    below = data.labels(prompts, [args.write] * len(prompts))
    sheet = data.contact_sheet(data.side_by_side(*columns), below, 2)
    print(data.save_png(sheet, Path(args.out, "compare.png"), {"runs": names}, warn, replace=True))

    rows = [["", *names], *zip(prompts, *columns)]
    for name in dict.fromkeys(itertools.chain(*recipes)):
        values = [str(recipe.get(name, "")) for recipe in recipes]
        if len(set(values)) > 1:
            rows.append([name, *values])
    lines = ["<tr>" + "".join(map(cell, row)) for row in rows]
    page = Path(args.out, "compare.html")
    data.write(page, "\n".join([PAGE, *lines, "</table>"]).encode())
    print(page)


def export(path: Path, load: Callable, args: argparse.Namespace) -> None:
    """Write the published U-Net of a run. ValueError where it has limn's own."""
    stage = load(path)
    if not isinstance(stage.unet, model.UNet2DConditionModel):
        raise ValueError(f"--export is for published U-Nets, and {path} is of limn's own")
    model.save_published(Path(args.export, "unet"), stage.unet)
    print(Path(args.export, "unet"))


def check_places(args: argparse.Namespace, device: torch.device) -> None:
    """ValueError where what is drawn cannot be written or judged, before any work."""
    out = Path(args.out)
    folder = out.parent if out.suffix.lower() == ".png" else out
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {out}: {folder} is a file. Name a folder, or a .png in one")
    for needed in (folder, Path(args.npz).parent):
        needed.mkdir(parents=True, exist_ok=True)
    if args.rank:
        clip_towers(args.rank, device, **args.places)
    if args.against:
        picture_set(args.against)
        feature_network(args.features, args.feature_input, device, **args.places)


def draw(paths: list[Path], load: Callable, args, device, prompts: list[str], held: dict) -> None:
    """Draw through all stages, write, and score where that is wanted."""
    pictures = None
    made = [{"lowres": Path(args.lowres).name}] * len(prompts) if args.lowres else []
    for i, path in enumerate(paths):
        last = path == paths[-1]
        pictures, notes = run_stage(load(path), i, args, prompts, pictures, held if last else {})
        if made:
            notes = [note | {"below": below} for note, below in zip(notes, made)]
        made, n = notes, args.n
        if len(pictures) < len(prompts):
            write(pictures, made[:len(pictures)], n, args)
            die(f"stopped after {len(pictures)} of {len(prompts)} pictures of {path}", 130)
        if args.rank and last:
            n = args.best or n
            best = ranked(pictures, made, n, args, device)
            pictures, made = pictures[best], [made[k] for k in best]
        if (args.keep_stages or last) and place()[0] == 0:
            write(pictures, made, n, args)

    if args.against and place()[0] == 0:
        drawn = pictures.expand(-1, 3, -1, -1).numpy()
        data.SOURCES[DRAWN] = lambda side: Drawn(drawn, [note["prompt"] for note in made], DRAWN)
        score(picture_set(DRAWN), args, device)


def main(argv: list[str]) -> None:
    args = arguments(argv)
    warnings.showwarning = lambda message, *where: warn(str(message))
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)           # data.py has a lower limit
    warnings.filterwarnings("ignore", "`torch.jit")            # what others publish is TorchScript
    device = model.choose_device(args.device)
    rank, world = place()
    if world > 1:
        dist.init_process_group("gloo")
        if rank:                                               # one tells it all
            sys.stdout = io.StringIO()
    if args.score:
        return score(picture_set(args.score), args, device)
    check_places(args, device)
    paths = [Path(path) for path in args.compare or args.ckpt.split(",") if path]
    paths = paths or cascade(Path("runs"), bool(args.lowres), args.stop_at)
    for name in LISTS:
        given = len(getattr(args, name))
        if given > len(paths):
            raise ValueError(f"{flag_of(name)} has {given} values for {len(paths)} stage(s)")
    plain = partial(load_stage, device=device, ema=args.ema, **args.places)
    if args.export:
        return export(paths[-1], plain, args)
    if args.nll:
        return print_bits(plain(paths[-1]), held_out(paths[-1], args.nll), args)
    if args.interactive:
        plain = cache(plain)
        while True:
            try:
                prompt = input("prompt: ")
            except (EOFError, KeyboardInterrupt):
                return
            draw(paths, plain, args, device, [prompt] * args.n, {})
    if not all(map(str.strip, args.wanted)):
        print("note: empty prompt, drawing without one")
    held = held_out(paths[-1], args.validate) if args.validate else {}
    if held and "lowres" not in held:
        die(f"--validate checks a stage that enlarges, and {paths[-1]} is a base")

    # Frozen text encoders read everything first.
    prompts = [prompt for prompt in args.wanted for _ in range(args.n)]
    words = [*prompts, *held.get("captions", ()), args.negative]
    load = partial(plain, cached=reader(words, device))
    for name in filter(None, (args.autoguide, *args.clip)):
        load(Path(name), ema=0, clip=name in args.clip)
    if args.compare:
        return compare(paths, load, args, prompts)
    draw(paths, load, args, device, prompts, held)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")          # a name that the terminal cannot show
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        die("stopped before a picture was drawn", 130)
    except torch.OutOfMemoryError:
        die("out of GPU memory. Try a lower --batch-size")
    except (ValueError, OSError) as error:
        die(error)
    finally:
        model.leave()
