"""The judge: does a picture show the kind and the colour of thing that its prompt asks for?

    python tests/judge.py                              # trains the judge if needed, prints its own accuracy
    python tests/judge.py --ckpt runs/64 --n 200       # draws unseen prompts from a run and judges them
    python tests/judge.py --pictures DIR_OR_NPZ        # judges pictures by their captions
    python tests/judge.py --ckpt runs/64 --clip runs/clip-64 --clip-scale 2       # guided by a CLIP run
    python tests/judge.py --ckpt runs/64 --rank runs/clip-64 --best-of 8          # the best of eight by one
    python tests/judge.py --retrieve runs/clip-64 --n 256                         # how that CLIP finds pairs
    python tests/judge.py --read                       # trains the reader if needed, prints its own accuracy
    python tests/judge.py --read runs/words --n 200    # draws unseen words from a run and reads them back

A small network for 64-pixel pictures, trained on built-in pictures of one thing, blurred, shifted, noised and
tinted so that it judges drawn ones by what they show. Of two things each is judged where it has to be.
Training, testing and prompts use ranges of the built-in pictures that no run is trained on. What is written
in pictures of words is read letter by letter, where it has to be, by another one.
"""
import argparse
import hashlib
import inspect
import os
import sys
import time
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import diffusion

KINDS = [kind for kind in data.KINDS if kind != "sign"]
COLOURS = list(data.COLOURS)
TRAIN, TEST, PROMPTS = (data.ENDLESS * 2**i for i in (1, 2, 3))     # the first scene of each
BATCH, STEPS, RATE = 128, 450, 4e-3


class Judge(nn.Module):
    """uint8 (B, 3, 64, 64) -> logits of the kind (B, 16) and of the colour (B, 10)."""

    def __init__(self):
        super().__init__()
        widths = (32, 64, 96, 96)
        self.first = nn.Conv2d(3, 32, 5, 2, padding=2, bias=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in (32, *widths[1:]))
        self.kind = nn.Linear(2 * 4 * 96, len(KINDS))
        self.colour = nn.Linear(2 * 4 * 96, len(COLOURS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(pictures.float() / 127.5 - 1)                            # (B, 32, 32, 32)
        x = F.max_pool2d(F.relu(self.norms[0](x)), 2)                           # (B, 32, 16, 16)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms[1:])):
            x = F.relu(norm(conv(x)))
            x = x if i else F.max_pool2d(x, 2)                                  # (B, 96, 8, 8)
        features = torch.cat([F.adaptive_avg_pool2d(x, 2), F.adaptive_max_pool2d(x, 2)], 1).flatten(1)
        return self.kind(features), self.colour(features)

    @torch.no_grad()
    def kinds_colours(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Indices into KINDS and COLOURS of what uint8 pictures (N, 3, 64, 64) show, int64 (N,)."""
        device = self.kind.weight.device
        parts = (self(part.to(device)) for part in pictures.split(256))
        found = [[logits.argmax(1).cpu() for logits in part] for part in parts]
        return tuple(torch.cat(part) for part in zip(*found))


# -------------------------------------------------------------------------------------------------- training

def scenes(first: int, things: int):
    """Scenes from an index on that show so many things, and no sign."""
    while True:
        shown = data.scene(first)
        if len(shown.things) == things and not shown.word:
            yield shown
        first += 1


def halves(picture: np.ndarray, shown: data.Scene) -> list[np.ndarray]:
    """The square around the place of each of two things, in their order, at the size of the whole picture."""
    half = picture.shape[1] // 2
    _, dx, dy = data.RELATIONS[shown.relation]
    parts = []
    for sign in (1, -1):
        left, top = (round(half / 2 + 0.24 * 2 * half * sign * step) for step in (dx, dy))
        part = picture[:, max(0, top):max(0, top) + half, max(0, left):max(0, left) + half]
        parts.append(part.repeat(2, 1).repeat(2, 2))
    return parts


def examples(first: int):
    """Pictures and their thing: four whole ones of one thing, then the two parts of one with two things."""
    one, two = scenes(first, 1), scenes(first, 2)
    while True:
        for _ in range(4):
            shown = next(one)
            yield data.draw(shown, 64), shown.things[0]
        shown = next(two)
        yield from zip(halves(data.draw(shown, 64), shown), shown.things)


def batches(first: int, size: int):
    source = examples(first)
    while True:
        drawn = [next(source) for _ in range(size)]
        yield (torch.from_numpy(np.stack([picture for picture, _ in drawn])),
               torch.tensor([KINDS.index(thing.kind) for _, thing in drawn]),
               torch.tensor([COLOURS.index(thing.colour) for _, thing in drawn]))


def disturb(pictures: Tensor) -> Tensor:
    """What a generated picture may differ in: its place, sharpness, brightness, tint and grain."""
    n = len(pictures)
    x = F.pad(pictures.float(), (4, 4, 4, 4), mode="replicate")
    left, top = torch.randint(0, 9, (2,)).tolist()
    x = x[:, :, top:top + 64, left:left + 64]
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, torch.rand(n, 1, 1, 1))
    x = x * (1 + 0.06 * torch.randn(n, 1, 1, 1)) + 6 * torch.randn(n, 3, 1, 1)
    return (x + 16 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)).clamp(0, 255)


def accuracy(judge: Judge, n: int = 2048) -> tuple[float, float]:
    """Shares of right kinds and colours on real pictures of one thing that the judge has not seen."""
    source = scenes(TEST, 1)
    shown = [next(source) for _ in range(n)]
    pictures = torch.from_numpy(np.stack([data.draw(scene, 64) for scene in shown]))
    kinds, colours = judge.kinds_colours(pictures)
    return (float(np.mean([KINDS[k] == s.things[0].kind for k, s in zip(kinds.tolist(), shown)])),
            float(np.mean([COLOURS[c] == s.things[0].colour for c, s in zip(colours.tolist(), shown)])))


def train(device: torch.device) -> Judge:
    torch.manual_seed(0)
    judge, source, start = Judge().to(device), batches(TRAIN, BATCH), time.time()
    optimizer = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(STEPS):
        pictures, kinds, colours = (part.to(device) for part in next(source))
        by_kind, by_colour = judge(disturb(pictures.cpu()).to(device))
        loss = F.cross_entropy(by_kind, kinds) + F.cross_entropy(by_colour, colours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"judge {step + 1}/{STEPS}, loss {loss:.3f}, {time.time() - start:.0f} s", flush=True)
    return judge.eval()


class Reader(nn.Module):
    """float (B, 1, 24, 24), a letter in the middle of two steps, see glimpses -> logits (B, 34)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 32, 5, 2, padding=2, bias=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, 64, 3, padding=1, bias=False) for a in (32, 64))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in (32, 64, 64))
        self.last = nn.Linear(64 * 6 * 6, len(data.ALPHABET))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.first(x)))                                # (B, 32, 12, 12)
        x = F.max_pool2d(F.relu(self.norms[1](self.convs[0](x))), 2)            # (B, 64, 6, 6)
        x = F.relu(self.norms[2](self.convs[1](x)))
        return self.last(x.flatten(1))


def lettered(first: int):
    """Scenes of words from an index on, but those without."""
    while True:
        shown = data.lettered(first)
        if shown.word:
            yield first, shown
        first += 1


def usual(shown: data.Scene) -> data.Scene:
    """The scene with its thing exactly in the middle, as its captions say."""
    things = [thing._replace(x=0.5, y=0.5, half=0.42) for thing in shown.things]
    return shown._replace(things=tuple(things))


def glimpses(pictures: Tensor, shown: list[data.Scene], shift: Tensor) -> tuple[Tensor, list[int]]:
    """Each letter of pictures, uint8 (N, 3, 64, 64), where a scene has it, moved by a shift (N, 2) of its
    step: two steps around it, in grey, of mean 0 and deviation 1 in the middle, (letters, 1, 24, 24); and in
    which picture."""
    grey = pictures.float().mean(1, keepdim=True)
    owners, thetas = [], []
    for i, scene in enumerate(shown):
        for _, x, y, step in data.letters(scene):
            right, down = (step * shift[i]).tolist()
            owners.append(i)
            thetas.append([[2 * step, 0, 2 * (x + right) - 1], [0, 2 * step, 2 * (y + down) - 1]])
    grid = F.affine_grid(torch.tensor(thetas), (len(owners), 1, 24, 24), align_corners=False)
    parts = F.grid_sample(grey[owners], grid, padding_mode="border", align_corners=False)
    middle = parts[:, :, 4:20, 4:20]
    parts = (parts - middle.mean((2, 3), keepdim=True)) / (middle.std((2, 3), keepdim=True) + 4)
    return parts.clamp(-4, 4), owners


@torch.no_grad()
def read(reader: Reader, pictures: Tensor, shown: list[data.Scene]) -> list[str]:
    """What pictures say where scenes have letters, without line breaks. Each picture is read at the shift at
    which the reader is surest of what it sees, whatever that is."""
    best = [(-1e9, "")] * len(shown)
    for shift in product((-0.4, -0.2, 0.0, 0.2, 0.4), (-0.3, 0.0, 0.3)):
        parts, owners = glimpses(pictures, shown, torch.tensor([shift] * len(shown)))
        sure, letters = reader(parts.to(reader.last.weight.device)).log_softmax(1).max(1)
        said = [(0.0, "")] * len(shown)
        for owner, one, letter in zip(owners, sure.tolist(), letters.tolist()):
            total, text = said[owner]
            said[owner] = total + one, text + data.ALPHABET[letter]
        best = list(map(max, best, said))
    return [text for _, text in best]


def train_reader(device: torch.device) -> Reader:
    torch.manual_seed(0)
    reader, source, steps, start = Reader().to(device), lettered(TRAIN), 500, time.time()
    mean = torch.optim.swa_utils.AveragedModel(
        reader, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.97), use_buffers=True)
    optimizer = torch.optim.AdamW(reader.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        shown = [next(source)[1] for _ in range(48)]
        pictures = torch.from_numpy(np.stack([data.draw(scene, 64) for scene in shown])).float()
        x = torch.lerp(pictures, F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False),
                       torch.rand(48, 1, 1, 1))                                 # softer, and with grain
        x = x + 16 * torch.rand(48, 1, 1, 1) * torch.randn_like(x)
        parts, _ = glimpses(x, shown, 0.6 * torch.rand(48, 2) - 0.3)
        right = [data.ALPHABET.index(letter) for scene in shown for letter, *_ in data.letters(scene)]
        loss = F.cross_entropy(reader(parts.to(device)), torch.tensor(right, device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean.update_parameters(reader)
        if step % 50 == 49:
            print(f"reader {step + 1}/{steps}, loss {loss:.3f}, {time.time() - start:.0f} s", flush=True)
    return mean.module.eval()


# What the judge and the reader come from: they are trained anew when one of these changes.
MAKES = {Judge: (Judge, scenes, halves, examples, batches, disturb, train),
         Reader: (Reader, lettered, glimpses, train_reader)}


def load(device: torch.device | None = None, kind: type = Judge) -> nn.Module:
    """The judge or the reader, trained once for these built-in pictures and what makes it, then kept
    in the user's cache."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mark = hashlib.blake2b(digest_size=16)
    for part in MAKES[kind]:
        mark.update(inspect.getsource(part).encode())
    for i in range(64):
        shown = data.scene(i) if kind is Judge else data.lettered(i)
        mark.update(data.draw(shown, 64).tobytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limn"
    kept = folder / f"{kind.__name__.lower()}-{mark.hexdigest()}.safetensors"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        trained = train(device) if kind is Judge else train_reader(device)
        temporary = kept.with_suffix(f".{os.getpid()}")
        safetensors.torch.save_file(trained.cpu().state_dict(), temporary)
        os.replace(temporary, kept)
    judge = kind().to(device).eval()
    judge.load_state_dict(safetensors.torch.load_file(kept))
    return judge.to(device)


def kinds_colours(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return load().kinds_colours(pictures)


# ---------------------------------------------------------------------------------------- prompts and scores

def prompts(n: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Prompts of unseen scenes with one thing, as (prompt, kind, colour), in styles that name its colour."""
    source, rng = scenes(PROMPTS + seed * 10**6, 1), data.keyed(seed, "judge", 1)
    shown = [next(source) for _ in range(n)]
    return [(str(rng.choice(data.captions(s)[1:])), s.things[0].kind, s.things[0].colour) for s in shown]


def two_prompts(n: int, seed: int = 0) -> list[tuple[str, data.Scene]]:
    """Prompts of unseen scenes with two things, with what they have to show."""
    source, rng = scenes(PROMPTS + seed * 10**6, 2), data.keyed(seed, "judge", 2)
    return [(str(rng.choice(data.captions(s)[1:])), s) for s in (next(source) for _ in range(n))]


def read_prompt(text: str) -> tuple[str, str]:
    """The kind and the colour of the thing that a caption names first; empty for what it does not name."""
    words = text.lower().replace(",", " ").split()
    first = lambda names: next((word for word in words if word in names), "")
    return first(KINDS), first(COLOURS)


def judge_one(judge: Judge, pictures: Tensor, kinds: list[str], colours: list[str]) -> dict:
    """Shares of right kinds and colours, and by kind what it was taken for."""
    found_kinds, found_colours = judge.kinds_colours(pictures)
    right_kind = np.array([KINDS[i] == kind for i, kind in zip(found_kinds.tolist(), kinds)])
    right_colour = np.array([COLOURS[i] == colour for i, colour in zip(found_colours.tolist(), colours)])
    table = {}
    for kind in KINDS:
        rows = [i for i, wanted in enumerate(kinds) if wanted == kind]
        if rows:
            taken = Counter(KINDS[found_kinds[i]] for i in rows if not right_kind[i]).most_common(3)
            table[kind] = (len(rows), right_kind[rows].mean(), right_colour[rows].mean(), taken)
    return {"n": len(pictures), "kind": right_kind.mean(), "colour": right_colour.mean(),
            "both": (right_kind & right_colour).mean(), "table": table}


def judge_two(judge: Judge, pictures: Tensor, wanted: list[data.Scene]) -> dict:
    """Shares of things right in kind and colour where they have to be, and of pictures all right."""
    parts = [torch.from_numpy(part) for picture, shown in zip(pictures.numpy(), wanted)
             for part in halves(picture, shown)]
    things = [thing for shown in wanted for thing in shown.things]
    kinds, colours = judge.kinds_colours(torch.stack(parts))
    kind = np.array([KINDS[i] == thing.kind for i, thing in zip(kinds.tolist(), things)]).reshape(-1, 2)
    colour = np.array([COLOURS[i] == thing.colour for i, thing in zip(colours.tolist(), things)])
    colour = colour.reshape(-1, 2)
    right = (kind & colour).all(1)
    return {"n": len(pictures), "kind": kind.mean(), "colour": colour.mean(), "all": right.mean()}


def print_one(scores: dict) -> None:
    print(f"{scores['n']} pictures of one thing: colour {scores['colour']:.1%}, kind {scores['kind']:.1%}, "
          f"both {scores['both']:.1%}")
    print(f"{'kind':<12}{'n':>4}{'kind':>7}{'colour':>8}   taken for")
    for kind, (n, right_kind, right_colour, taken) in scores["table"].items():
        others = ", ".join(f"{name} {times}" for name, times in taken)
        print(f"{kind:<12}{n:>4}{right_kind:>7.0%}{right_colour:>8.0%}   {others}")


def print_two(scores: dict) -> None:
    print(f"{scores['n']} pictures of two things in their relation: colour {scores['colour']:.1%}, "
          f"kind {scores['kind']:.1%} of the things, all right in {scores['all']:.1%} of the pictures")


def at_64(pictures: Tensor) -> Tensor:
    """Pictures of any size at the judge's, by the project's kernel."""
    if pictures.shape[-1] == 64:
        return pictures
    images = [data.Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in pictures]
    small = np.stack([np.asarray(data.shrink(image, 64)) for image in images])
    return torch.from_numpy(small).permute(0, 3, 1, 2).contiguous()


def read_pictures(path: str) -> tuple[Tensor, list[str]]:
    """Pictures and captions of an .npz (pictures uint8 (N, 3, H, W), captions), or of a --data source."""
    if path.endswith(".npz"):
        with np.load(path, allow_pickle=False) as stored:
            return at_64(torch.from_numpy(stored["pictures"])), stored["captions"].tolist()
    source = data.Pictures(data.DataConfig(data=[path], held_out=0), 64, 0)
    items = [source[i] for i in range(len(source))]
    pictures = torch.from_numpy(np.stack([item["picture"] for item in items]))
    return pictures, [item["caption"] for item in items]


def draw_prompts(args: argparse.Namespace, texts: list[str]) -> Tensor:
    """The prompts drawn by the run at --ckpt, uint8 (N, 3, 64, 64); of --best-of that which --rank likes."""
    import sample
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = sample.load_stage(Path(args.ckpt), device)
    every = [text for text in texts for _ in range(args.best_of)]
    seeds = list(range(args.seed, args.seed + len(every)))
    drawn = sample.generate(stage, every, seeds, guidance_scale=args.guidance, sampler=args.sampler,
                            steps=args.sample_steps, batch_size=args.batch_size, clip=args.clip,
                            clip_scale=args.clip_scale, guidance_interval=args.guidance_interval)
    if args.rank:
        scores = sample.clip_scores(args.rank, drawn, every, device, args.batch_size)
        best = scores.view(-1, args.best_of).argmax(1)
        drawn = drawn[torch.arange(0, len(every), args.best_of) + best]
    return at_64(drawn)


@torch.no_grad()
def retrieve(run: str, n: int, seed: int) -> None:
    """Print how often a CLIP run finds, among n unseen pictures of one thing and their full captions, the
    caption of each picture and the picture of each caption, by noise; equal captions are as good."""
    import sample
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip = sample.load_stage(Path(run), device, clip=True)
    source = scenes(PROMPTS + seed * 10**6, 1)
    shown = [next(source) for _ in range(n)]
    texts = [data.captions(scene)[-1] for scene in shown]
    same = torch.tensor([[one == other for other in texts] for one in texts])
    x0 = clip.space.encode(torch.from_numpy(np.stack([data.draw(scene, clip.size) for scene in shown])))
    x0 = x0.to(device)
    eps = diffusion.gaussian(torch.arange(n), x0.shape[1:], device)
    read = torch.cat([clip.unet.read(**clip.text.encode(texts[i:i + 32], device)) for i in range(0, n, 32)])
    print(f"{n} pairs, {len(set(texts))} captions; chance {same.float().mean():.2%}")
    for t in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
        times = torch.full((n,), t, device=device)
        x_t = diffusion.noised(x0, eps, times, clip.schedule) if t else x0
        seen = torch.cat([clip.unet(part, times[:len(part)]) for part in x_t.split(32)])
        logits, shares = (seen @ read.T).cpu(), []
        for ways in (logits, logits.T):
            shares += [same.gather(1, ways.topk(k).indices).any(1).float().mean() for k in (1, 5)]
        told = [f"{share:.1%}" for share in shares]
        print(f"t {t}: caption at 1 {told[0]}, at 5 {told[1]}, picture at 1 {told[2]}, at 5 {told[3]}")


def public_ocr(pictures: Tensor, shown: list[data.Scene]) -> list[str]:
    """What rapidocr-onnxruntime reads in pictures enlarged to 256 pixels, where scenes have letters, in their
    order and as the alphabet of built-in pictures has them. Raises ImportError where it is not installed."""
    from rapidocr_onnxruntime import RapidOCR
    engine = RapidOCR(intra_op_num_threads=torch.get_num_threads(), inter_op_num_threads=1)
    said = []
    for picture, scene in zip(pictures, shown):
        image = data.Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        large = np.asarray(image.resize((256, 256), data.Image.BICUBIC))
        boxes, _ = engine(large[..., ::-1].copy())                              # it reads blue, green, red
        places = np.array([place for _, *place in data.letters(scene)])         # x, y and step of each letter
        found = []
        for corners, text, _ in boxes or []:
            away = np.hypot(*(places[:, :2] - np.mean(corners, 0) / 256).T)
            if away.min() < places[0, 2]:                                       # no handle of a cup
                found.append((away.argmin(), text))
        text = "".join(text for _, text in sorted(found)).upper().replace("0", "O").replace("1", "I")
        said.append("".join(letter for letter in text if letter in data.ALPHABET))
    return said


def read_scores(said: list[str], wanted: list[str]) -> str:
    """Characters right by position, and words of 3 characters and of any length that are wholly right."""
    plain = [word.replace("\n", "") for word in wanted]
    right = [a == b for one, word in zip(said, plain) for a, b in zip(one.ljust(len(word)), word)]
    whole = np.array([one == word for one, word in zip(said, plain)])
    short = np.array([len(word) == 3 and "\n" not in word for word in wanted])
    three = "none"
    if short.any():
        three = f"{whole[short].mean():.1%} of {short.sum()} words of 3 characters"
    return f"characters {np.mean(right):.1%} of {len(right)}, wholly right {three}, {whole.mean():.1%} of all"


def by_length(said: list[str], wanted: list[str]) -> str:
    """Characters right by position, for each length of the longest line."""
    right = {}
    for one, word in zip(said, wanted):
        plain = word.replace("\n", "")
        hits = right.setdefault(max(map(len, word.split("\n"))), [])
        hits.extend(a == b for a, b in zip(one.ljust(len(plain)), plain))
    return "by the longest line: " + ", ".join(f"{n} {np.mean(right[n]):.1%}" for n in sorted(right))


def say_read(name: str, reader: Reader, pictures: Tensor, shown: list[data.Scene], ocr: bool) -> None:
    """Print what the reader reads in pictures of scenes, and a public OCR where it is installed."""
    wanted = [scene.word for scene in shown]
    places = [usual(scene) for scene in shown]
    said = read(reader, pictures, places)
    print(f"{name}: {read_scores(said, wanted)}\n  {by_length(said, wanted)}", flush=True)
    if not ocr:
        return
    try:
        said = public_ocr(pictures, places)
    except ImportError:
        print("  no public OCR: pip install rapidocr-onnxruntime==1.4.4")
        return
    print(f"  a public OCR at 256 pixels: {read_scores(said, wanted)}", flush=True)


def swapped(shown: list[data.Scene]) -> list[data.Scene]:
    """The same scenes, each with what is written in another one that shows the same kind of thing."""
    kinds = {}
    for i, scene in enumerate(shown):
        kinds.setdefault(tuple(thing.kind for thing in scene.things), []).append(i)
    found = list(shown)
    for rows in kinds.values():
        for row, other in zip(rows, rows[1:] + rows[:1]):
            found[row] = shown[row]._replace(word=shown[other].word)
    return found


def read_back(args: argparse.Namespace) -> None:
    """Print how well the reader reads unseen real pictures of words, and those that a run draws: of the words
    of their scenes, and with the words of other scenes of the same kind; and whether the thing and its colour
    are right all the same. A run without a second stream is told the words in its captions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = load(device, Reader)
    source = lettered(TEST)
    real = [next(source)[1] for _ in range(200)]
    pictures = torch.from_numpy(np.stack([data.draw(scene, 64) for scene in real]))
    say_read("real", reader, pictures, real, args.ocr)
    if not args.read:
        return

    import sample
    stage = sample.load_stage(Path(args.read), device)
    judge, streams = load(device), stage.text.transcriber is not None
    source, rng = lettered(PROMPTS + args.seed * 10**6), data.keyed(args.seed, "judge", 3)
    rows, own = zip(*(next(source) for _ in range(args.n)))
    styles = rng.integers(1, 5, args.n).tolist()                                # those that name the colour
    for name, shown in (("drawn", own), ("drawn with the words of others", swapped(own))):
        wanted = [scene.word for scene in shown]
        texts = []
        for row, style, word in zip(rows, styles, wanted):
            plain = data.Words(64).captions(row)
            text = plain[style % len(plain)]
            texts.append(text if streams else text + data.QuotedWords.said.format(word.replace("\n", " ")))
        told = {"write": wanted, "write_guidance": args.write_guidance} if streams else {}
        drawn = sample.generate(stage, texts, range(args.seed, args.seed + args.n), args.batch_size,
                                guidance_scale=args.guidance, sampler=args.sampler, steps=args.sample_steps,
                                **told)
        drawn = at_64(drawn)
        say_read(name, reader, drawn, shown, args.ocr)
        judged = [i for i, scene in enumerate(shown) if scene.things and scene.things[0].kind in KINDS]
        things = [shown[i].things[0] for i in judged]
        scores = judge_one(judge, drawn[judged], [t.kind for t in things], [t.colour for t in things])
        print(f"  {len(judged)} cups and balloons: colour {scores['colour']:.1%}, kind {scores['kind']:.1%}")
        if args.save:
            path = Path(args.save)
            path = path.with_stem(f"{path.stem}-{name.split()[-1]}")
            np.savez(path, pictures=drawn.numpy(), captions=np.array(data.labels(texts, wanted)))
            data.contact_sheet(drawn[:32], data.labels(texts, wanted)[:32], 8).save(path.with_suffix(".png"))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", help="run or checkpoint to judge")
    parser.add_argument("--pictures", nargs="+", default=[], help="folders or .npz files with captions")
    parser.add_argument("--n", type=int, default=200, help="prompts with one thing")
    parser.add_argument("--two", type=int, default=-1, help="prompts with two things, -1 = half as many")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale, 1 = none")
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--sample-steps", type=int, default=25, help="[steps]")
    parser.add_argument("--batch-size", type=int, default=32, help="[images]")
    parser.add_argument("--clip", default="", help="a CLIP run that guides")
    parser.add_argument("--clip-scale", type=float, default=1.0, help="how strongly it does")
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), help="its times")
    parser.add_argument("--rank", default="", help="a CLIP, published or a run, that ranks")
    parser.add_argument("--best-of", type=int, default=1, help="pictures of a prompt, for --rank [images]")
    parser.add_argument("--retrieve", default="", help="a CLIP run to look for --n pairs with")
    parser.add_argument("--read", nargs="?", const="", help="a run with words to read back; none: the reader")
    parser.add_argument("--ocr", action=argparse.BooleanOptionalAction, default=True,
                        help="of --read: by a public OCR, too, if it is installed (0.3 s a picture)")
    parser.add_argument("--write-guidance", type=float, default=-1.0, help="of --read, -1 = as --guidance")
    parser.add_argument("--save", help=".npz to write the drawn pictures and their captions to")
    args = parser.parse_args(argv)

    if args.retrieve:
        return retrieve(args.retrieve, args.n, args.seed)
    if args.read is not None:
        return read_back(args)
    judge = load()
    kind, colour = accuracy(judge)
    print(f"the judge on unseen real pictures: colour {colour:.2%}, kind {kind:.2%}")
    for path in args.pictures:
        pictures, texts = read_pictures(path)
        print_one(judge_one(judge, pictures, *zip(*map(read_prompt, texts))))
    if args.ckpt:
        start, several = time.time(), args.n // 2 if args.two < 0 else args.two
        one, two = prompts(args.n, args.seed), two_prompts(several, args.seed)
        texts = [text for text, *_ in one] + [text for text, _ in two]
        pictures = draw_prompts(args, texts)
        print(f"{len(texts)} pictures in {time.time() - start:.0f} s: {args.sampler}, "
              f"{args.sample_steps} steps, guidance {args.guidance}")
        if args.clip or args.rank:
            print(f"--clip {args.clip} --clip-scale {args.clip_scale}, best of {args.best_of} by {args.rank}")
        if args.save:
            np.savez(args.save, pictures=pictures.numpy(), captions=np.array(texts))
        if one:
            print_one(judge_one(judge, pictures[:args.n], *list(zip(*one))[1:]))
        if two:
            print_two(judge_two(judge, pictures[args.n:], [shown for _, shown in two]))


if __name__ == "__main__":
    main(sys.argv[1:])
