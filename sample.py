"""Prompts to pictures: `python sample.py "a house"` draws from the newest run.

A checkpoint is all it needs: network, schedule and text encoder are rebuilt from its metadata. A picture
depends on its prompt, its seed and the settings, not on the others of its batch."""
import argparse
import ctypes
import inspect
import json
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)               # during the imports that take seconds

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import data
import diffusion
import model
import text_encoder


def die(message: object, status: int = 2) -> NoReturn:
    """The user's mistake in one line on standard error, exit status 2."""
    print(f"sample.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


def warn(message: str) -> None:
    print(f"sample.py: warning: {message}", file=sys.stderr)


def choose_device(name: str) -> torch.device:
    """cuda, else mps, else cpu, or `name`. ValueError where it is not."""
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
    return torch.device(kind)


# ---------------------------------------------------------------------------------- which runs, which weights
def is_clip(recipe: dict) -> bool:
    """Whether the configuration of a run is that of a CLIP; older ones do not say."""
    return recipe["TrainConfig"].get("objective") == "clip"


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
            if not is_clip(recipe):
                ways[drawn.lowres] = run, recipe["TrainConfig"]["size"]
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
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
    found = []
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        if int(path.stem) <= step:
            found.append(path)
    if not found or int(found[-1].stem) != step:
        raise ValueError(f"{folder} has no snapshot of step {step}. Train with --profiles 8")

    # A column for each average in each file: how much of it each update is.
    columns, averages, loaded = [], [], {}
    for path in found:
        loaded[path], meta = model.load_tensors(path)
        profiles = {re.findall(r"^profile\.(0\.\d+)\.|$", name)[0] for name in loaded[path]}
        if "updates" not in meta or not profiles or "" in profiles:
            raise ValueError(f"{path} is no snapshot of averages. Move it away")
        updates = int(meta["updates"])
        for profile in sorted(profiles, key=float):
            columns.append((updates, float(profile)))
            averages.append((path, f"profile.{profile}."))
    edges = np.linspace(0, updates, min(updates, 10000) + 1)

    def weights(n: int, width: float) -> np.ndarray:
        return np.diff(np.minimum(edges / n, 1) ** (exponent(width) + 1))

    # Shares sum to 1: fit those but the last one, by what each has beyond the last one.
    table = np.stack([weights(*column) for column in columns], 1)
    wanted = weights(updates, width)
    last = table[:, -1:]
    beyond = table[:, :-1] - last
    shares = np.linalg.lstsq(beyond, wanted - last[:, 0])[0]
    shares = np.append(shares, 1 - shares.sum())
    miss = np.linalg.norm(table @ shares - wanted) / np.linalg.norm(wanted)
    if miss > 0.2:
        warn(f"{len(found)} snapshots give the average of width {width} with an error of {miss:.0%}")

    total: model.Tensors = {}
    for (path, start), share in zip(averages, shares.tolist()):
        for name, tensor in loaded[path].items():
            if name.startswith(start):
                name = name.removeprefix(start)
                total[name] = total.get(name, 0) + share * tensor
    return total


# ------------------------------------------------------------------------------------- checkpoint to stage
@dataclass
class Stage:
    """What a checkpoint holds, ready to draw."""
    unet: nn.Module
    text: nn.Module
    cached: Callable | None  # what frozen text encoders say, see reader
    schedule: diffusion.Schedule
    small_schedule: diffusion.Schedule  # of the pictures that it enlarges
    space: diffusion.Pixels | model.Latents
    config: diffusion.DiffusionConfig
    data: data.DataConfig
    size: int  # side of the pictures [pixels]
    device: torch.device
    step: int  # of training [steps]
    digest: str  # checksum of the checkpoint

    def network(self) -> Callable:
        """The U-Net, preconditioned around the small picture where there is one."""
        return diffusion.around(self.unet, self.schedule, self.small_schedule)


def reader(prompts: list[str], device: torch.device) -> Callable:
    """For `load_stage`: a frozen text encoder reads the prompts and is freed, before a U-Net needs the room;
    stages share what it said. One prompt at a time: no picture depends on its neighbours."""
    texts = [text for text in dict.fromkeys(map(text_encoder.clean, prompts)) if text]
    said: dict[str, dict] = {}

    def cached(_, encoder: nn.Module, load: Callable) -> Callable:
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
    words.counts.clear()
    for prompt in prompts:
        words.read(prompt)
    counts = words.counts
    if counts["unknown"] or counts["cut"]:
        warn(f"{counts['unknown']} of {counts['tokens']} tokens unknown, {counts['cut']:d} prompts cut to "
             f"{words.length}")


def last_places(path: Path) -> tuple[list[str], str]:
    """Where the frozen text encoders and the VAE of a checkpoint lay when it was trained, if the config.json
    of its run is there."""
    for folder in [path, *path.absolute().parents][:3]:
        try:
            stored = json.loads((folder / "config.json").read_text("utf-8"))
            encoders = [str(name) for name in stored["TextConfig"]["text_encoder"] if name != "bytes"]
            return encoders, str(stored["ModelConfig"].get("vae", ""))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue
    return [], ""


def load_pipeline(path: Path, device: torch.device, cached: Callable | None = None,
                  ema: float = 0.0) -> Stage:
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
    return Stage(unet, text, cached, schedule, schedule, space, config, data.DataConfig(), side * space.scale,
                 device, 0, model.checksum(unet.state_dict(), {}))


def load_stage(path: Path, device: torch.device, ema: float = 0.0, cached: Callable | None = None,
               encoders: Iterable[str] = (), vae: str = "", clip: bool = False) -> Stage:
    """A stage from a run directory (its newest checkpoint that verifies), a checkpoint folder or a file.
    ema: width of another average of the weights, see reconstruct; 0 = the one in the checkpoint.
    cached: `reader` of all prompts; without it a frozen text encoder stays in memory, ready for any.
    encoders, vae: folders where frozen ones lie now; else where they lay, beside the run, or in this folder.
    clip: whether it has to be a CLIP, or one that draws; a published pipeline is one too, see load_pipeline.
    Raises ValueError, one line, where there is no checkpoint, where it is damaged or of other code."""
    if (path / "model_index.json").is_file() and not clip:
        return load_pipeline(path, device, cached, ema)
    path, tensors, meta = model.read(path, warn)
    if ema:
        run = (path if path.is_dir() else path.parent) / "../.."
        tensors |= reconstruct((run / "profiles").resolve(), int(meta["step"]), ema)
    with model.reading(path):
        stored = json.loads(meta["config"])
        shape = model.configured(model.ModelConfig, stored["ModelConfig"])
        config = model.configured(diffusion.DiffusionConfig, stored["DiffusionConfig"])
        pictures = model.configured(data.DataConfig, stored["DataConfig"])
        text = model.configured(text_encoder.TextConfig, stored["TextConfig"])
        size, step, made_with = stored["TrainConfig"]["size"], int(meta["step"]), meta["text"]
        made_in = meta["space"] if shape.vae else ""
        model.check("size", size, int, "[8..4096]")
    if is_clip(stored) != clip:
        raise ValueError(f"{path} {'draws, and is no CLIP' if clip else 'is a CLIP, for --clip or --rank'}")

    near = [*path.absolute().parents][:4] + [Path()]
    lay, vae_lay = last_places(path)
    text = text_encoder.locate(text, made_with, near, [*encoders, *lay])
    text = text_encoder.load_text_encoder(text, cached, device="meta")
    if not text_encoder.same_encoder(made_with, text.fingerprint):
        raise ValueError(f"{path} was trained with {made_with}, not with {text.fingerprint}. Put it there")

    space = diffusion.Pixels(len(data.MODES[pictures.picture_mode]))
    if shape.vae:
        places = [vae, vae_lay, shape.vae, *(folder / Path(shape.vae).name for folder in near)]
        space = model.find_vae(filter(None, places), made_in, shape.vae_dtype).to(device)
    side = size // space.scale

    # Built without memory, and compared with the file, before anything is allocated.
    with model.reading(path), torch.device("meta"):
        small = len(data.MODES[pictures.lowres_mode]) if pictures.lowres else 0
        widths = text.dim, text.pooled_dim
        if "unet" in meta:
            unet = model.rebuild(json.loads(meta["unet"]), *widths)
        elif clip:
            unet = model.CLIP(shape, side, *widths, space.channels)
        else:
            unet = model.UNet(shape, side, *widths, space.channels, small, config.learn_sigma)
        parts = nn.ModuleDict({"unet": unet})
        if text.trainable:
            parts["text_encoder"] = text
    with model.reading(path):
        weights = {name: x for name, x in tensors.items() if name.split(".")[0] in parts}
        model.fill(parts, weights, device)
        schedule = diffusion.make_schedule(config, side)
        small_schedule = diffusion.make_schedule(config, pictures.lowres or side)
    text.to(device).eval().requires_grad_(False)
    return Stage(unet, text, cached, schedule, small_schedule, space, config, pictures, size, device, step,
                 meta["sha256"])


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
    aug: float = 0.0  # noise on a low-resolution picture before it is enlarged, a time t [0..1]
    threshold: str = "static"  # predictions are clipped at 1 (static), a percentile of each (0..1], or none
    sampler: str = "dpmpp_2m"  # how the noise is removed
    steps: int = 25  # of the sampler; where not given 2 for a stage that enlarges [1..1000 steps]
    grid_times: str = "auto"  # in what steps are even: uniform (t), logsnr, karras; auto: by their number
    shift: float = 1.0  # above 1 more of the steps at the noisy end, below 1 at the clean one [0.01..100]
    respacing: str = ""  # these of 1000 steps instead: 250, 10,10,20 (of equal sections) or ddim25
    eta: float = -1.0  # fresh noise of a step, -1 = the sampler's own [-1..1]
    churn: float = 0.0  # fresh noise that heun adds in all its steps together [0..1000]
    init: str = ""  # a picture to start from
    strength: float = 1.0  # how far it is noised [0.001..1]
    mask: str = ""  # a picture: black where --init stays, white where it is drawn anew, grey between
    resample: int = 1  # visits of every ten steps with --mask, so that its parts agree [1..1000]


FIRST = ("autoguide", "init", "mask", "strength", "resample")  # settings of the first stage alone


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
    shapes = [f"{width}x{height}" for width, height in (Image.open(name).size for name in (init, path))]
    if shapes[0] != shapes[1]:
        raise ValueError(f"--init is {shapes[0]} pixels, --mask {shapes[1]}. Give both the same size")
    mask = read_picture(path).float().mean(0)
    return 1 - F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0] / 255


def companions(stage: Stage, settings: Settings, times: Tensor) -> list[Stage | None]:
    """The stage that --autoguide names and that of --clip; ValueError where one does not fit."""
    found = []
    for flag in ("autoguide", "clip"):
        name = getattr(settings, flag)
        if not name:
            found.append(None)
            continue
        other = load_stage(Path(name), stage.device, cached=stage.cached, clip=flag == "clip")

        def process(of: Stage) -> tuple:
            alpha, _ = of.schedule.alpha_sigma(times)
            return of.size, of.data.picture_mode, of.space.fingerprint, alpha.tolist()

        if process(other) != process(stage):
            raise ValueError(f"--{flag} needs a checkpoint of the same size and schedule, in the same space: "
                             f"{name} has {other.size} pixels and {other.config.schedule}, the stage "
                             f"{stage.size} and {stage.config.schedule}")
        found.append(other)

    weak, _ = found
    if weak and (settings.negative or weak.data.lowres != stage.data.lowres):
        raise ValueError("--autoguide needs a checkpoint of the same --lowres, and no --negative")
    return found


def noise_key(seed: int) -> int:
    return int(data.keyed(seed, "sample", 0).integers(2**63))


def small_condition(stage: Stage, pictures: Tensor, keys: Tensor, aug: float) -> dict[str, Tensor]:
    """What the network is told of pictures, uint8 (B, 3 or 1, h, w), that are to be enlarged."""
    small = resized(pictures, stage.data.lowres_mode).to(stage.device)
    small = stage.space.encode(small)
    eps = diffusion.noise_source(keys, small.shape[1:], stage.device)(-1)                 # no step's own
    return diffusion.augmented(small, eps, small.new_full((len(small),), aug), stage.small_schedule)


def variance_of(network: diffusion.LearnedVariance, rows: int) -> Tensor:
    """What the network said last of the prompts, whose rows come first."""
    return network.fraction[:rows]


@torch.no_grad()
def generate(stage: Stage, prompts: list[str], seeds: list[int], batch_size: int = 16,
             dtype: torch.dtype = torch.float32, lowres: Tensor | None = None, kept=(), **settings) -> Tensor:
    """Draw one picture for each prompt from the noise of its seed: uint8 (N, 3 or 1, H, W) on the CPU.
    dtype: of the products; lowres: uint8 (N, 3 or 1, h, w) to enlarge; kept: gets each batch; and Settings.
    Raises ValueError where these do not fit together, and when the network's output is not finite."""
    s, space = Settings(**settings), stage.space
    small_side = 0 if lowres is None else lowres.shape[-1]
    if stage.data.lowres != small_side:
        raise ValueError(f"a stage from {stage.data.lowres} to {stage.size} pixels was given {small_side}. "
                         "Name all stages in order by --ckpt, or give --lowres PICTURE to the first")
    alone = s.mask or s.strength != 1
    if (alone and not s.init) or (s.resample > 1 and not s.mask):
        raise ValueError("--mask and --strength have no effect without --init, nor --resample without --mask")
    times = diffusion.sampling_times(stage.schedule, s.steps, s.grid_times, s.strength, s.shift)
    if s.respacing:
        times = s.strength * diffusion.respaced(s.respacing)
    init = read_picture(s.init, stage.size)[None] if s.init else None
    shape = (space.channels, stage.size // space.scale, stage.size // space.scale)
    keep = read_mask(s.mask, s.init, shape[-1]) if s.mask else None
    beside = companions(stage, s, times)

    # The sampler, and the network that it asks.
    network, sampler = stage.network(), diffusion.SAMPLERS[s.sampler]
    takes = inspect.signature(sampler).parameters
    for name, value, others in (("eta", s.eta, "ddim or dpmpp_2m"), ("churn", s.churn or -1, "heun")):
        if value >= 0 and name not in takes:
            raise ValueError(f"--{name} {value}: {s.sampler} has no fresh noise of that kind. Use "
                             f"--sampler {others}")
        if value >= 0:
            sampler = partial(sampler, **{name: value})
    learned = stage.config.learn_sigma and "variance" in takes
    if learned:
        network = diffusion.LearnedVariance(network)

    keys = torch.tensor([noise_key(seed) for seed in seeds])
    drawn = [] if kept == () else kept
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        x = diffusion.gaussian(keys[part], shape, stage.device)
        noise = diffusion.noise_source(keys[part], shape, stage.device)
        small, run = {}, sampler
        if learned:
            run = partial(sampler, variance=partial(variance_of, network, len(x)))
        if small_side:
            small = small_condition(stage, lowres[part], keys[part], s.aug)
        if s.init:
            known = resized(init, stage.data.picture_mode).to(stage.device)
            known = space.encode(known).expand_as(x)
            x = diffusion.noised(known, x, times[:1].to(x), stage.schedule)
        if s.mask:
            stays = keep.to(x.device).expand(len(x), 1, -1, -1)
            run = partial(diffusion.inpaint, run, known=known, keep=stays, resample=s.resample)
        with torch.autocast(stage.device.type, dtype, enabled=dtype != torch.float32):
            denoise = denoiser_of(stage, network, beside, s, prompts[part], small)
            x = run(denoise, x, times, noise, stage.schedule)
        if not x.isfinite().all():
            raise ValueError(f"the network's output is not finite (checkpoint of step {stage.step}). "
                             "Try --dtype fp32, a lower --guidance or an earlier checkpoint")
        drawn.append(space.decode(x).cpu())
    return torch.cat(drawn)


def denoiser_of(stage: Stage, network: Callable, beside: list[Stage | None], s: Settings, prompts: list[str],
                small: dict[str, Tensor]) -> Callable:
    """The denoiser of some prompts: guidance and thresholds around the network. beside: see companions."""
    weak, clip = beside

    def condition(of: Stage, texts: list[str]) -> dict[str, Tensor]:
        return of.text.encode(texts, stage.device) | small

    worse = None
    if weak:
        worse = diffusion.denoiser(weak.network(), weak.schedule, weak.config, condition(weak, prompts))
    combine = diffusion.projected(s.apg) if s.apg else torch.lerp
    denoise = diffusion.guided(
        network, stage.schedule, stage.config, condition(stage, prompts), s.guidance_scale,
        condition(stage, [s.negative] * len(prompts)), worse, interval=s.guidance_interval,
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


@torch.no_grad()
def clip_scores(folder: str, pictures: Tensor, prompts: list[str], device: torch.device,
                batch_size: int = 16, encoders: Iterable[str] = ()) -> Tensor:
    """CLIP scores (N,) of pictures, uint8 (N, 3 or 1, H, W), with their prompts, 0 to 2.5: 2.5 max(cosine, 0)
    (Hessel et al. 2021, arXiv:2104.08718, section 3; no "A photo depicts"). folder: of a published CLIP, or a
    run, at the clean end of its time; encoders: as of load_stage."""
    path = Path(folder)
    if path.is_file() or (path / "ema.safetensors").exists() or (path / "checkpoints").is_dir():
        clip = load_stage(path, device, encoders=encoders, clip=True)

        def see(part: Tensor) -> Tensor:
            small = resized(part, clip.data.picture_mode, clip.size).to(device)
            return clip.unet(clip.space.encode(small), torch.zeros(len(small), device=device))

        def read(part: list[str]) -> Tensor:
            return clip.unet.read(**clip.text.encode(part, device))
    else:
        config = text_encoder.TextConfig([folder], text_dtype="fp32")
        tower = text_encoder.load_image_encoder(folder, config).to(device)
        words = text_encoder.load_text_encoder(config).to(device)

        def see(part: Tensor) -> Tensor:
            return tower(part.expand(-1, 3, -1, -1).to(device))                           # (B, P)

        def read(part: list[str]) -> Tensor:
            return words.encode(part, device)["pooled"]                                   # (B, P)

    scores = [torch.empty(0, device=device)]
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        cosine = torch.cosine_similarity(see(pictures[part]), read(prompts[part]))
        scores.append(2.5 * cosine.clamp(min=0))
    return torch.cat(scores).cpu()


# ---------------------------------------------------------------------------------------- the command line
def sampler_name(word: str) -> str:
    if word not in diffusion.SAMPLERS:
        raise ValueError
    return word


def threshold_name(word: str) -> str:
    if not re.fullmatch(r"static|none|0?\.\d+|1(\.0*)?", word):
        raise ValueError
    return word


# Settings that take a value for each stage, 5,2: the flag and the type of a value.
LISTS = {"guidance_scale": ("--guidance", float), "steps": ("--sample-steps", int), "seed": ("--seed", int),
         "sampler": ("--sampler", sampler_name), "threshold": ("--threshold", threshold_name),
         "clip": ("--clip", str), "clip_scale": ("--clip-scale", float)}


def parser() -> argparse.ArgumentParser:
    """The flags: those of the program, and each field of Settings. [1..9] in a help are limits."""
    p = argparse.ArgumentParser(prog="sample.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = die
    add, switch = p.add_argument, {"action": argparse.BooleanOptionalAction, "default": False}
    add("prompt", nargs="?", help="what to draw")
    add("--prompts", metavar="FILE", help="a file of prompts, one a line")
    which = p.add_mutually_exclusive_group().add_argument
    which("--ckpt", default="", help="run, checkpoint or ema.safetensors; a,b: of stages; empty: the newest")
    which("--stop-at", type=int, default=0, help="the last stage, 0 = all there are [0..4096 pixels]")
    add("--lowres", default="", metavar="PICTURE", help="enlarge this one instead of drawing the first")
    add("--keep-stages", **switch, help="write those below, too")
    add("--validate", type=int, default=0, metavar="N", help="first compare N held-out pictures, made small, "
        "with what the last stage makes of them, over levels of --aug [0..10000 images]")
    add("--ema", type=float, default=0.0, help="another width of the averaged weights, 0 = own [0..0.28]")
    add("--n", type=int, default=1, help="pictures of a prompt, seeds SEED, SEED + 1, ... [1..10000 images]")
    add("--text-encoder", nargs="*", default=[], metavar="DIR", help="where frozen text encoders lie now")
    add("--vae", default="", metavar="DIR", help="where the VAE of the latents lies now")
    add("--export", default="", metavar="DIR", help="write a run's published U-Net for diffusers, then leave")
    add("--rank", default="", metavar="DIR", help="a CLIP, published or a run, whose score is noted")
    add("--best", type=int, default=0, help="keep so many of --n by that score, 0 = all [0..10000 images]")

    helps = model.helps(Settings)
    helps["sampler"] += ": " + ", ".join(diffusion.SAMPLERS)
    for field in fields(Settings):
        options = {"dest": field.name, "default": field.default, "help": helps[field.name]}
        if field.name in LISTS:                                # read by `arguments`
            add(LISTS[field.name][0], **options)
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.name == "grid_times":
            options["choices"] = ["auto", *diffusion.GRIDS]
        if isinstance(field.default, tuple):
            add(flag, type=float, nargs=2, **options)
        else:
            add(flag, type=type(field.default), **options)

    add("--seed", default=0, help="of the noise [0..9223372036854775807]")
    add("--out", default=".", help="a folder, or the name of a .png")
    add("--grid", **switch, help="one sheet with captions")
    add("--batch-size", type=int, default=16, help="pictures drawn at once [1..4096 images]")
    add("--device", default="", help="cuda, mps or cpu; the first of them there is when not given")
    add("--dtype", choices=list(text_encoder.DTYPES), default="fp32", help="of the matrix products")
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
    if not args.export and (args.prompt is None) == (args.prompts is None):
        die('give a prompt, python sample.py "a house", or --prompts FILE')
    args.usual = set()                                         # what is given is still text
    for name in ("guidance_scale", "steps"):
        if getattr(args, name) == getattr(Settings, name):
            args.usual.add(name)

    for action in p._actions:
        values = getattr(args, action.dest, None)
        flag = "".join(action.option_strings[:1])
        if action.dest in LISTS:
            _, kind = LISTS[action.dest]
            try:
                values = tuple(kind(word) for word in str(values).split(","))
            except ValueError:
                die(f"{flag} {values} is none of: {action.help}; or of these one a stage, a,b")
            setattr(args, action.dest, values)
        model.check(flag, values, object, action.help)

    if args.best > args.n or (args.best and not args.rank):
        die(f"--best {args.best} needs as many pictures, --n {args.n}, and scores, --rank DIR")
    if args.clip_scale != (Settings.clip_scale,) and not any(args.clip):
        die(f"--clip-scale {args.clip_scale[0]} has no effect without --clip RUN")
    args.wanted = [args.prompt or ""]
    if args.prompts is not None:
        lines = read_lines(args.prompts)
        args.wanted = [line.strip() for line in lines if line.strip()]
        if not args.wanted:
            die(f"--prompts {args.prompts} has no prompt in it. Write one a line")
    return args


def settings_of(args: argparse.Namespace, i: int, stage: Stage) -> dict:
    """The settings of the i-th stage that is drawn, and its seed: a list's last value counts for the rest."""
    chosen = {}
    for field in fields(Settings):
        value = getattr(args, field.name)
        if field.name in LISTS:
            value = value[min(i, len(value) - 1)]
        if field.name in FIRST and i > 0:
            value = field.default
        chosen[field.name] = value
    if (stage.data.lowres and "guidance_scale" in args.usual) or i >= len(args.guidance_scale):
        chosen["guidance_scale"] = 1.0
    if i >= len(args.clip):
        chosen["clip"] = ""
    if stage.data.lowres and "steps" in args.usual:            # the small picture says most of it
        chosen["steps"] = 2
    chosen["seed"] = args.seed[min(i, len(args.seed) - 1)]
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
        again = partial(draw, aug=aug, init="", mask="", strength=1.0, resample=1)
        enlarged = again(held["captions"], range(len(truth)), lowres=small)
        rows.append((f"--aug {aug}", enlarged, truth))
        drawn = resized(again(prompts, seeds, lowres=below), mode, below.shape[-1])
        rows.append((f"--aug {aug}, below", drawn, resized(below, mode)))

    best = (0.0, "")
    for name, made, wanted in rows:
        error = (made.double() - wanted).flatten(2)                                   # (N, C, H * W)
        power = error.square().mean((1, 2)).clamp(min=1e-4)
        psnr = 10 * torch.log10(255**2 / power)
        psnr, shift = psnr.mean().item(), error.mean(2).abs().mean()
        line = f"{name:17}  PSNR {psnr:5.2f} dB  mean colour {shift:5.2f}/255"
        if wanted is truth:
            share = detail(made, small.shape[-1]) / detail(truth, small.shape[-1])
            line += f"  detail {share:.2f}"
            best = max(best, (psnr, name))
        print(line)
    print(f"best of {len(truth)} pictures: {best[1]}")


def run_stage(stage: Stage, i: int, args: argparse.Namespace, prompts: list[str], below, held: dict):
    """The pictures of the i-th stage and the notes of each; `below`: the pictures of the stage before."""
    settings = settings_of(args, i, stage)
    seed = settings.pop("seed")
    if settings["guidance_scale"] > 30:
        warn(f"--guidance {settings['guidance_scale']} is very high; 2 to 8 is usual")
    unread(stage.text.reader, prompts[::args.n])
    if args.lowres and i == 0:
        picture = read_picture(args.lowres, stage.data.lowres or stage.size)
        below = torch.stack([picture] * len(prompts))

    seeds = [seed + k % args.n for k in range(len(prompts))]
    dtype = text_encoder.DTYPES[args.dtype]
    draw = partial(generate, stage, batch_size=args.batch_size, dtype=dtype, **settings)
    kept = []
    try:
        pictures = draw(prompts, seeds, lowres=below, kept=kept)
    except KeyboardInterrupt:                                  # what is drawn is kept, see main
        if not kept:
            raise
        pictures, held = torch.cat(kept), {}
    if held:
        validate(stage, draw, held, prompts, seeds, below)
    for k, picture in enumerate(pictures, 1):
        if picture.float().std() < 1:
            warn(f"picture {k} is constant; the network is probably untrained, or --guidance is too high")

    common = settings | {"ema": args.ema, "dtype": args.dtype}
    common |= {"checkpoint": stage.digest, "step": stage.step}
    for name in ("autoguide", "clip", "init", "mask"):         # no folders of this machine
        common[name] = Path(common[name]).name
    return pictures, [common | {"prompt": prompt, "seed": k} for prompt, k in zip(prompts, seeds)]


def file_name(prompt: str) -> str:
    """A safe name for a prompt: lower-case ASCII letters, digits and dashes, at most 80."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:80].strip("-") or "picture"


def write(pictures: Tensor, made: list[dict], n: int, args: argparse.Namespace) -> None:
    """Pictures, n of a prompt, with their notes, or a sheet of them: into the folder or the file --out."""
    prompts = [one["prompt"] for one in made]
    file = Path(args.out) if Path(args.out).suffix.lower() == ".png" else None
    if args.grid:
        columns = n if n > 1 else round(len(made) ** 0.5)
        sheet = data.contact_sheet(pictures, prompts, min(8, max(2, columns)))
        path = file or Path(args.out, "grid.png")
        print(data.save_png(sheet, path, {"pictures": made}, warn, replace=file is not None))
        return
    for picture, prompt, notes in zip(pictures, prompts, made):
        path = file or Path(args.out, f"{file_name(prompt)}.png")
        replace = file is not None and len(made) == 1
        print(data.save_png(to_image(picture), path, notes, warn, replace))


def held_out(path: Path, count: int) -> dict:
    """Up to `count` pictures that a run keeps for validation, and their small versions."""
    runs = [folder for folder in (path, *path.parents) if (folder / "config.json").is_file()]
    if not runs:
        die(f"--validate needs the config.json of the run of {path}, which says where its pictures are")
    with model.reading(runs[0] / "config.json"):
        stored = json.loads((runs[0] / "config.json").read_text("utf-8"))
        whole = model.configured(data.DataConfig, stored["DataConfig"] | {"crop": 0})
        size = stored["TrainConfig"]["size"]
        model.check("size", size, int, "[8..4096]")
    pictures = data.Pictures(whole, size, 0, "val")
    held = data.collect(pictures, 0, min(count, len(pictures)))
    for line in [*pictures.warnings, *held["replaced"]]:
        warn(line)
    if "lowres" not in held:
        die(f"--validate checks a stage that enlarges, and {path} is a base")
    return held


def main(argv: list[str]) -> None:
    args = arguments(argv)
    warnings.showwarning = lambda message, *where: warn(str(message))
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)           # data.py has a lower limit
    device, out = choose_device(args.device), Path(args.out)
    folder = out.parent if out.suffix.lower() == ".png" else out
    if folder.exists() and not folder.is_dir():                # what is wrong comes before any work
        raise ValueError(f"--out {out}: {folder} is a file. Name a folder, or a .png in one")
    folder.mkdir(parents=True, exist_ok=True)
    if args.rank:
        clip_scores(args.rank, torch.empty(0), [], device, encoders=args.text_encoder)
    paths = [Path(path) for path in args.ckpt.split(",") if path]
    paths = paths or cascade(Path("runs"), bool(args.lowres), args.stop_at)
    for name, (flag, _) in LISTS.items():
        given = len(getattr(args, name))
        if given > len(paths):
            raise ValueError(f"{flag} has {given} values for {len(paths)} stage(s)")
    if args.export:
        stage = load_stage(paths[-1], device, args.ema, encoders=args.text_encoder, vae=args.vae)
        if not isinstance(stage.unet, model.UNet2DConditionModel):
            raise ValueError(f"--export is for published U-Nets, and {paths[-1]} is of limn's own")
        model.save_published(Path(args.export, "unet"), stage.unet)
        return print(Path(args.export, "unet"))
    if not all(prompt.strip() for prompt in args.wanted):
        print("note: empty prompt, drawing without one")
    held = held_out(paths[-1], args.validate) if args.validate else {}

    # Frozen text encoders read everything first.
    prompts = [prompt for prompt in args.wanted for _ in range(args.n)]
    words = [*prompts, *held.get("captions", ()), args.negative]
    load = partial(load_stage, device=device, cached=reader(words, device), encoders=args.text_encoder,
                   vae=args.vae)
    if args.autoguide:
        load(Path(args.autoguide))
    for name in filter(None, args.clip):
        load(Path(name), clip=True)

    pictures = None
    made = [{"lowres": Path(args.lowres).name}] * len(prompts) if args.lowres else []
    for i, path in enumerate(paths):
        last = path == paths[-1]
        check = held if last else {}
        pictures, notes = run_stage(load(path, ema=args.ema), i, args, prompts, pictures, check)
        if made:
            notes = [note | {"below": below} for note, below in zip(notes, made)]
        made, n = notes, args.n
        if len(pictures) < len(prompts):
            write(pictures, made[:len(pictures)], n, args)
            die(f"stopped after {len(pictures)} of {len(prompts)} pictures of {path}", 130)
        if args.rank and last:
            n = args.best or n
            scores = clip_scores(args.rank, pictures, prompts, device, args.batch_size, args.text_encoder)
            first = torch.arange(0, len(scores), args.n)[:, None]
            best = (scores.view(-1, args.n).topk(n).indices + first).flatten()
            pictures = pictures[best]
            for note, score in zip(made, scores.tolist()):
                note["clip_score"] = round(score, 4)
            made = [made[k] for k in best.tolist()]
        if args.keep_stages or last:
            write(pictures, made, n, args)


if __name__ == "__main__":
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
