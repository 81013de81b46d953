"""Prompts to pictures: `python sample.py "a house"` draws from the newest run.

A checkpoint is all it needs: network, schedule and text encoder are rebuilt from its metadata. A picture
depends on its prompt, its seed and the settings, not on the others of its batch."""
import argparse
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import data
import diffusion
import model
import text_encoder

LISTS = {"guidance_scale": ("--guidance", float), "steps": ("--sample-steps", int), "seed": ("--seed", int),
    "sampler": ("--sampler", lambda word: diffusion.SAMPLERS[word] and word),      # 5,2: one for each stage
    "threshold": ("--threshold", lambda word: re.fullmatch(r"static|none|0?\.\d+|1(\.0*)?", word)[0])}
FIRST = ("autoguide", "init", "mask", "strength", "resample")  # settings of the first stage alone


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
    cached: Callable | None  # what frozen text encoders say, see reader
    schedule: diffusion.Schedule
    config: diffusion.DiffusionConfig
    data: data.DataConfig
    size: int  # side of the pictures [pixels]
    device: torch.device
    step: int  # of training [steps]
    digest: str  # checksum of the checkpoint


def unread(text: nn.Module, prompts: Iterable[str]) -> None:
    """Warn of what a text encoder cannot read of the prompts."""
    text.counts.clear()
    text.tokenize(prompts)
    if (n := text.counts)["unknown"] or n["cut"]:
        warn(f"{n['unknown']} of {n['tokens']} tokens unknown, {n['cut']:d} prompts cut to {text.length}")


def reader(prompts: list[str], device: torch.device) -> Callable:
    """For `load_stage`: a frozen text encoder reads the prompts and is freed, before a U-Net needs the room;
    stages share what it said. One prompt at a time: no picture depends on its neighbours."""
    texts, said = [text for text in dict.fromkeys(map(text_encoder.clean, prompts)) if text], {}

    def cached(_, encoder: nn.Module, load: Callable) -> Callable:
        if (key := encoder.fingerprint) not in said:
            load()
            unread(encoder, texts)
            said[key] = {text: entry for text in texts
                         for _, *entry in text_encoder.encode_captions(encoder.to(device), [text])}
            encoder.to("meta")                                 # frees the weights, whoever holds the encoder
        return lambda text: said[key][text_encoder.clean(text)]
    return cached


def load_stage(path: Path, device: torch.device, ema: float = 0.0, cached: Callable | None = None) -> Stage:
    """A stage from a run directory (its newest checkpoint that verifies), a checkpoint folder or a file.
    ema: width of another average of the weights, see model.reconstruct; 0 = the one in the checkpoint.
    cached: `reader` of all prompts; without it a frozen text encoder stays in memory, ready for any.
    Raises ValueError, one line, where there is no checkpoint, where it is damaged or of other code."""
    path, tensors, meta = model.read(path, warn)
    if ema:
        run = (path if path.is_dir() else path.parent) / "../.."
        tensors |= model.reconstruct((run / "profiles").resolve(), int(meta["step"]), ema, warn)
    try:
        stored = json.loads(meta["config"])
        shape = {name: tuple(v) if isinstance(v, list) else v for name, v in stored["ModelConfig"].items()}
        config = diffusion.DiffusionConfig(**stored["DiffusionConfig"])
        text = text_encoder.load_text_encoder(text_encoder.TextConfig(**stored["TextConfig"]), cached)
        pictures = data.DataConfig(**stored["DataConfig"])
        size, step = stored["TrainConfig"]["size"], int(meta["step"])
        planes, small = (len(data.MODES[mode]) for mode in (pictures.picture_mode, pictures.lowres_mode))
        unet = model.UNet(model.ModelConfig(**shape), size, text.dim, text.pooled_dim, planes,
                          small if pictures.lowres else 0, config.learn_sigma)
        unet.levels = [diffusion.make_schedule(config, side) for side in (size, pictures.lowres or size)]
        parts = nn.ModuleDict({"unet": unet} | ({"text_encoder": text} if text.trainable else {}))
        parts.load_state_dict({k: v for k, v in tensors.items() if k.split(".")[0] in parts})
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        if isinstance(e, torch.OutOfMemoryError): raise
        raise ValueError(f"{path} does not fit this code ({str(e)[:200]}). Use the code that wrote it") from e
    if meta["text"] != text.fingerprint:
        raise ValueError(f"{path} was trained with {meta['text']}, not with {text.fingerprint}. Put it there")
    unet, text = (part.to(device).eval().requires_grad_(False) for part in (unet, text))
    return Stage(unet, text, cached, unet.levels[0], config, pictures, size, device, step, meta["sha256"])


# -------------------------------------------------------------------------------------- prompts to pictures
@dataclass
class Settings:
    """How pictures are drawn: a field is a keyword of `generate`, a flag, and a note in the PNG."""
    guidance_scale: float = 3.0  # guidance scale, 1 = none; 5,2 = of two stages, 1 above [0..100]
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times at which there is guidance [0..1]
    guidance_rescale: float = 0.0  # share of the contrast it adds that is taken back [0..1]
    apg: float = 0.0  # adaptive projected guidance: its longest push, such as 15; 0 = plain [0..1e6]
    autoguide: str = ""  # a weaker checkpoint to move away from
    negative: str = ""  # a prompt to move away from
    aug: float = 0.0  # noise on a low-resolution picture before it is enlarged, a time t [0..1]
    threshold: str = "static"  # predictions are clipped at 1 (static), a percentile of each (0..1], or none
    sampler: str = "dpmpp_2m"  # how the noise is removed
    steps: int = 25  # of the sampler [1..1000 steps]
    respacing: str = ""  # these of 1000 steps instead: 250, 10,10,20 (of equal sections) or ddim25
    eta: float = -1.0  # fresh noise of a step, -1 = the sampler's own [-1..1]
    init: str = ""  # a picture to start from
    strength: float = 1.0  # how far it is noised [0.001..1]
    mask: str = ""  # a picture that is black where --init stays
    resample: int = 1  # visits of every ten steps with --mask, so that its parts agree [1..1000]


def resized(pictures: Iterable[Tensor], mode: str, size: int = 0) -> Tensor:
    """uint8 (N, 3 or 1, H, W) -> the same in colour or grey, and of `size` by the kernel of the data."""
    images = [to_image(picture, mode) for picture in pictures]
    return torch.stack([torch.tensor(data.array(data.shrink(i, size or i.width))) for i in images])


def read_pictures(paths: list[str], size: int) -> list[Tensor]:
    """Pictures that lie on one another, uint8 (3, size, size). ValueError where they cannot."""
    try:
        shapes = ["{}x{}".format(*Image.open(path).size) for path in paths]
        found = [torch.from_numpy(data.decode(Path(path).read_bytes(), size)) for path in paths]
    except Exception as e:                                     # of whichever decoder of Pillow
        raise ValueError(f"--init, --mask or --lowres is no picture: {e}") from e
    if len(set(shapes)) > 1:
        raise ValueError("--init is {} pixels, --mask {}. Give both the same size".format(*shapes))
    return found


def encode(stage: Stage, prompts: list[str]) -> dict[str, Tensor]:
    """Prompts -> the condition of the U-Net."""
    ids, mask = stage.text.tokenize(prompts)
    return dict(zip(("context", "mask", "pooled"), stage.text(ids.to(stage.device), mask.to(stage.device))))


@torch.no_grad()
def generate(stage: Stage, prompts: list[str], seeds: list[int], batch_size: int = 16,
             dtype: torch.dtype = torch.float32, lowres: Tensor | None = None, **settings) -> Tensor:
    """Draw one picture for each prompt from the noise of its seed: uint8 (N, 3 or 1, H, W) on the CPU.
    dtype: of the matrix products; lowres: uint8 (N, 3 or 1, h, w) to enlarge; settings: fields of Settings.
    Raises ValueError where these do not fit together, and when the network's output is not finite."""
    s, done, shape = Settings(**settings), [], (len(data.MODES[stage.data.picture_mode]), *[stage.size] * 2)
    if stage.data.lowres != (found := 0 if lowres is None else lowres.shape[-1]):
        raise ValueError(f"a stage from {stage.data.lowres} to {stage.size} pixels was given {found}. "
                         "Name all stages in order by --ckpt, or give --lowres PICTURE to the first")
    if (not s.init and (s.mask or s.strength != 1)) or (s.resample > 1 and not s.mask):
        raise ValueError("--mask and --strength have no effect without --init, nor --resample without --mask")
    times = s.strength * (diffusion.respaced(s.respacing) if s.respacing else diffusion.time_grid(s.steps))
    given = read_pictures([path for path in (s.init, s.mask) if path], stage.size)
    weak = load_stage(Path(s.autoguide), stage.device, cached=stage.cached) if s.autoguide else None
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
    keys = torch.tensor([int(data.keyed(seed, "sample", 0).integers(2**63)) for seed in seeds])
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        batch, x, small = prompts[part], diffusion.gaussian(keys[part], shape, stage.device), {}
        if found:
            t, low = x.new_full((len(x),), s.aug), resized(lowres[part], stage.data.lowres_mode).to(x)
            eps = diffusion.noise_source(keys[part], low.shape[1:], stage.device)(-1)    # no step's own
            small = {"lowres": diffusion.noised(low / 127.5 - 1, eps, t, stage.unet.levels[1]), "lowres_t": t}
        noise = diffusion.noise_source(keys[part], shape, stage.device)
        run = partial(sampler, **options)
        if s.init:
            known = (resized(given[:1], stage.data.picture_mode).to(x) / 127.5 - 1).expand_as(x)
            x = diffusion.noised(known, x, times[:1].to(x), stage.schedule)
        if s.mask:
            keep = (given[1].float().mean(0) < 127.5).to(x.device).expand(len(x), 1, -1, -1)
            run = partial(diffusion.inpaint, run, known=known, keep=keep, resample=s.resample)
        with torch.autocast(stage.device.type, dtype, enabled=dtype != torch.float32):
            says = lambda of, texts: encode(of, texts) | small
            worse = weak and diffusion.denoiser(weak.unet, weak.schedule, weak.config, says(weak, batch))
            push = diffusion.rescaled(s.guidance_rescale, diffusion.projected(s.apg) if s.apg else torch.lerp)
            guess = diffusion.guided(
                net, stage.schedule, stage.config, says(stage, batch), s.guidance_scale,
                says(stage, [s.negative] * len(batch)), worse, interval=s.guidance_interval, combine=push)
            if s.threshold != "none":
                guess = diffusion.threshold(guess, None if s.threshold == "static" else float(s.threshold))
            x = run(guess, x, times, noise, stage.schedule)
        if not x.isfinite().all():
            raise ValueError(f"the network's output is not finite (checkpoint of step {stage.step}). "
                             "Try --dtype fp32, a lower --guidance or an earlier checkpoint")
        done.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(done)


@torch.no_grad()
def clip_scores(folder: str, pictures: Tensor, prompts: list[str], device: torch.device,
                batch_size: int = 16) -> Tensor:
    """CLIP scores (N,) of pictures, uint8 (N, 3 or 1, H, W), with their prompts, 0 to 2.5: 2.5 max(cosine, 0)
    (Hessel et al. 2021, arXiv:2104.08718, section 3; no "A photo depicts"). folder: of the CLIP."""
    config, scores = text_encoder.TextConfig([folder], text_dtype="fp32"), [torch.empty(0, device=device)]
    tower = text_encoder.load_image_encoder(folder, config).to(device)
    words = text_encoder.load_text_encoder(config).to(device)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        pooled = words(*(x.to(device) for x in words.tokenize(prompts[part])))[2]
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


# ---------------------------------------------------------------------------------------- the command line
def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, checked: [1..9] in a help are limits. A mistake ends the program in one line."""
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
    add("--rank", default="", metavar="DIR", help="folder of a CLIP, whose score is noted in the PNG")
    add("--best", type=int, default=0, help="keep so many of --n by that score, 0 = all [0..10000 images]")
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Settings), re.MULTILINE))
    helps["sampler"] += ": " + ", ".join(diffusion.SAMPLERS)
    for f in fields(Settings):
        two = {"nargs": 2} if isinstance(f.default, tuple) else {}
        kind = float if two else str if f.name in LISTS else type(f.default)
        flag = LISTS[f.name][0] if f.name in LISTS else "--" + f.name.replace("_", "-")
        add(flag, dest=f.name, type=kind, default=f.default, help=helps[f.name], **two)
    add("--seed", default=0, help="of the noise [0..9223372036854775807]")
    add("--out", default=".", help="a folder, or the name of a .png")
    add("--grid", **switch, help="one sheet with captions")
    add("--batch-size", type=int, default=16, help="pictures drawn at once [1..4096 images]")
    add("--device", default="", help="cuda, mps or cpu; the first of them there is when not given")
    add("--dtype", choices=list(text_encoder.DTYPES), default="fp32", help="of the matrix products")
    args = p.parse_args(argv)
    if (args.prompt is None) == (args.prompts is None):
        die('give a prompt, python sample.py "a house", or --prompts FILE')
    args.usual = args.guidance_scale == Settings.guidance_scale               # what is given is still text
    for action in p._actions:
        given, flag = getattr(args, action.dest, None), "".join(action.option_strings[:1])
        if action.dest in LISTS:
            try:
                given = tuple(map(LISTS[action.dest][1], str(given).split(",")))
            except (KeyError, TypeError, ValueError):
                die(f"{flag} {given} is none of: {action.help}; or of these one a stage, a,b")
            setattr(args, action.dest, given)
        for least, most in re.findall(r"\[(-?[\de.]+?)\.\.([\de.]+)", action.help):
            for value in given if isinstance(given, list | tuple) else [given]:
                if not float(least) <= value <= float(most):   # a nan is outside, too
                    die(f"{flag} {value} is outside {least} to {most}")
    if args.best > args.n or (args.best and not args.rank):
        die(f"--best {args.best} needs as many pictures, --n {args.n}, and scores, --rank DIR")
    args.wanted = [args.prompt]
    if args.prompts is not None:
        lines = Path(args.prompts).read_text(encoding="utf-8", errors="replace").splitlines()
        args.wanted = [line.strip() for line in lines if line.strip()]
        if not args.wanted: die(f"--prompts {args.prompts} has no prompt in it. Write one a line")
    return args


def validate(stage: Stage, draw: Callable, held: dict, prompts: list[str], seeds, below: Tensor) -> None:
    """Print how near a stage comes to held-out pictures that were made small, over levels of --aug, and the
    best. Of pictures that the stage below drew there is no truth: they are made small again."""
    truth, small = (torch.from_numpy(held[name]) for name in ("picture", "lowres"))
    best, mode = (0.0, ""), max(stage.data.picture_mode, stage.data.lowres_mode)      # grey, if one is
    rows = [("bicubic", resized(small, stage.data.picture_mode, stage.size), truth)]
    for aug in (0.0, 0.05, 0.1, 0.2, 0.4):
        again = partial(draw, aug=aug, init="", mask="", strength=1.0, resample=1)
        rows.append((f"--aug {aug}", again(held["captions"], range(len(truth)), lowres=small), truth))
        drawn = resized(again(prompts, seeds, lowres=below), mode, below.shape[-1])
        rows.append((f"--aug {aug}, below", drawn, resized(below, mode)))
    for name, a, b in rows:
        error = (a.double() - b).flatten(2)                                           # (N, C, H * W)
        psnr = (10 * torch.log10(255**2 / error.square().mean((1, 2)).clamp(min=1e-4))).mean().item()
        print(f"{name:17}  PSNR {psnr:5.2f} dB  mean colour {error.mean(2).abs().mean():5.2f}/255")
        best = max(best, (psnr, name)) if b is truth else best
    print(f"best of {len(truth)} pictures: {best[1]}")


def run_stage(stage: Stage, i: int, args: argparse.Namespace, prompts: list[str], below, held: dict):
    """The pictures of the i-th stage and the notes of each; `below`: the pictures of the stage before."""
    scale = (1.0,) if args.usual and stage.data.lowres else (*args.guidance_scale, 1.0)
    given = {name: getattr(args, name) for name in LISTS} | {"guidance_scale": scale}
    at = {name: values[min(i, len(values) - 1)] for name, values in given.items()}
    settings = {f.name: at.get(f.name, f.default if i and f.name in FIRST else getattr(args, f.name))
                for f in fields(Settings)}
    if settings["guidance_scale"] > 30:
        warn(f"--guidance {settings['guidance_scale']} is very high; 2 to 8 is usual")
    unread(stage.text, prompts[::args.n])
    if args.lowres and not i:
        below = torch.stack(read_pictures([args.lowres], stage.data.lowres or stage.size) * len(prompts))
    seeds, dtype = [at["seed"] + k % args.n for k in range(len(prompts))], text_encoder.DTYPES[args.dtype]
    draw = partial(generate, stage, batch_size=args.batch_size, dtype=dtype, **settings)
    pictures = draw(prompts, seeds, lowres=below)
    if held: validate(stage, draw, held, prompts, seeds, below)
    for k, picture in enumerate(pictures, 1):
        if picture.float().std() < 1:
            warn(f"picture {k} is constant; the network is probably untrained, or --guidance is too high")
    notes = settings | {name: Path(settings[name]).name for name in ("autoguide", "init", "mask")}
    notes |= {"ema": args.ema, "dtype": args.dtype, "checkpoint": stage.digest, "step": stage.step}
    return pictures, [notes | {"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds)]


def write(pictures: Tensor, made: list[dict], n: int, args: argparse.Namespace) -> None:
    """Pictures, n of a prompt, with their notes, or a sheet of them: into the folder or the file --out."""
    file = Path(args.out) if Path(args.out).suffix.lower() == ".png" else None
    images, names = map(to_image, pictures), [file_name(one["prompt"]) for one in made]
    if args.grid:
        columns = min(8, max(2, n if n > 1 else round(len(made) ** 0.5)))
        images = [model.contact_sheet(pictures, [one["prompt"] for one in made], columns)]
        names, made = ["grid"], [{"pictures": made}]
    for image, name, notes in zip(images, names, made):
        print(model.save_png(image, file or Path(args.out, f"{name}.png"), notes, warn))


def main(argv: list[str]) -> None:
    args = arguments(argv)
    device, out = model.choose_device(args.device), Path(args.out)
    (out.parent if out.suffix.lower() == ".png" else out).mkdir(parents=True, exist_ok=True)  # at once
    if args.rank: clip_scores(args.rank, torch.empty(0), [], device)          # its faults come early
    paths = [Path(path) for path in args.ckpt.split(",") if path]
    paths = paths or model.cascade(Path("runs"), bool(args.lowres), args.stop_at)
    for name in LISTS:
        if len(paths) < len(given := getattr(args, name)):
            raise ValueError(f"{LISTS[name][0]} has {len(given)} values for {len(paths)} stage(s)")
    if not all(prompt.strip() for prompt in args.wanted): print("note: empty prompt, drawing without one")
    prompts, pictures = [prompt for prompt in args.wanted for _ in range(args.n)], None
    held = {}
    if args.validate:                                          # before any work
        stored = json.loads(model.read(paths[-1], warn)[2]["config"])
        whole = data.DataConfig(**stored["DataConfig"] | {"crop": 0})
        val = data.Pictures(whole, stored["TrainConfig"]["size"], 0, "val")
        held = data.collect(val, 0, min(args.validate, len(val)))
        for line in [*val.warnings, *held["replaced"]]: warn(line)
        if "lowres" not in held: die(f"--validate checks a stage that enlarges, and {paths[-1]} is a base")
    words = [*prompts, *held.get("captions", ()), args.negative]
    load = partial(load_stage, device=device, cached=reader(words, device))
    if args.autoguide: load(Path(args.autoguide))              # its words first, too
    made = [{"lowres": Path(args.lowres).name}] * len(prompts) if args.lowres else []
    for i, path in enumerate(paths):
        check = held if path == paths[-1] else {}
        pictures, notes = run_stage(load(path, ema=args.ema), i, args, prompts, pictures, check)
        made, n = [one | {"below": below} for one, below in zip(notes, made)] or notes, args.n
        if args.rank and path == paths[-1]:
            n, scores = args.best or n, clip_scores(args.rank, pictures, prompts, device, args.batch_size)
            best = scores.view(-1, args.n).topk(n).indices + torch.arange(0, len(scores), args.n)[:, None]
            pictures = pictures[best.flatten()]
            made = [made[k] | {"clip_score": round(scores[k].item(), 4)} for k in best.flatten().tolist()]
        if args.keep_stages or path == paths[-1]: write(pictures, made, n, args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except torch.OutOfMemoryError:
        die("out of GPU memory. Try a lower --batch-size")
    except (ValueError, OSError) as error:
        die(error)
