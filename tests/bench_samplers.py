"""What samplers and guidance give on one checkpoint: python tests/bench_samplers.py --ckpt runs/64

Prints two markdown tables, made with the same prompts and the same start noise throughout:

1. Each sampler at a few step counts: the RMS distance of its pictures, in [-1, 1], to those of 1000 steps of
   DDPM and to those of 1000 steps of DDIM; then the share of right colours and kinds (tests/judge.py). DDPM
   draws fresh noise at each step, so another run of it, however fine, is as far away as another sample of the
   same prompt: only the distance to DDIM, whose picture the start alone decides, tells how exact a solver is.
   And the stochastic samplers do not go to that picture: there only colours and kinds count.
2. Ways of guidance: colours, kinds, and the share of numbers at the limits of 8 bits.
"""
import argparse
import sys
import time
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
import model
import sample
from tests import judge

REFERENCES = "ddpm", "ddim"


def same_samplers() -> dict[str, list[str]]:
    """The samplers, each with the other names it goes by: function and options are equal."""
    found: dict[tuple, list[str]] = {}
    for name, sampler in diffusion.SAMPLERS.items():
        function = getattr(sampler, "func", sampler)
        options = getattr(sampler, "keywords", {})
        found.setdefault((function, *options.items()), []).append(name)
    return {names[0]: names[1:] for names in found.values()}


def wrappers(ckpt: Path) -> dict[str, dict]:
    """Ways of guidance, as settings of sample.generate."""
    rows = {"none": {"guidance_scale": 1.0}}
    rows |= {f"guidance {scale}": {"guidance_scale": scale} for scale in (1.5, 3.0, 5.0, 8.0)}
    strong = {
        "times 0.2 to 0.8": {"guidance_interval": (0.2, 0.8)},
        "rescale 0.7": {"guidance_rescale": 0.7},
        "apg 15": {"apg": 15.0}, "apg 2": {"apg": 2.0},
        "threshold none": {"threshold": "none"}, "threshold 0.995": {"threshold": "0.995"}}
    rows |= {f"guidance 8.0, {name}": {"guidance_scale": 8.0} | change for name, change in strong.items()}
    if earlier := model.checkpoint_folders(ckpt)[:-1]:
        for scale in (2.0, 4.0):
            rows[f"autoguidance {scale} by step {int(earlier[0].name)}"] = {
                "guidance_scale": scale, "autoguide": str(earlier[0])}
    return rows


def distance(a: Tensor, b: Tensor) -> float:
    """RMS distance of uint8 pictures in units of [-1, 1]."""
    return float(((a.float() - b.float()) / 127.5).square().mean().sqrt())


def clipped(pictures: Tensor) -> float:
    return float(((pictures == 0) | (pictures == 255)).float().mean())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run or checkpoint")
    parser.add_argument("--n", type=int, default=64, help="prompts [images]")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50], help="[steps]")
    parser.add_argument("--reference", type=int, default=1000, help="steps of the two references [steps]")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale of the first table")
    parser.add_argument("--sample-steps", type=int, default=25, help="of the second table [steps]")
    parser.add_argument("--batch-size", type=int, default=32, help="[images]")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    args = parser.parse_args(argv)

    stage, critic = sample.load_stage(Path(args.ckpt), model.choose_device("")), judge.load()
    texts, kinds, colours = zip(*judge.prompts(args.n, args.seed))
    start = time.time()

    def draw(**settings) -> Tensor:
        pictures = sample.generate(stage, list(texts), list(range(args.seed, args.seed + args.n)),
                                   batch_size=args.batch_size, **settings)
        print(f"{time.time() - start:5.0f} s  {settings}", file=sys.stderr, flush=True)
        return pictures

    def right(pictures: Tensor) -> tuple[float, float]:
        scores = judge.judge_one(critic, judge.at_64(pictures), kinds, colours)
        return scores["colour"], scores["kind"]

    drawn = {name: draw(sampler=name, steps=args.reference, guidance_scale=args.guidance)
             for name in REFERENCES}

    def cell(pictures: Tensor) -> str:
        far = " / ".join(f"{distance(pictures, drawn[name]):.3f}" for name in REFERENCES)
        return far + ", " + " / ".join(f"{share:.0%}" for share in right(pictures))

    print(f"{args.ckpt}, step {stage.step}, {args.n} prompts of one thing, guidance {args.guidance}. "
          f"In a cell: RMS distance to {args.reference} steps of DDPM / of DDIM, right colours / kinds. "
          "The references: " + "; ".join(f"{name} {cell(drawn[name])}" for name in REFERENCES) + ".\n")
    print("| sampler | " + " | ".join(f"{n} steps" for n in args.steps) + " |")
    print("|---|" + "---|" * len(args.steps))
    for name, others in same_samplers().items():
        cells = [cell(draw(sampler=name, steps=n, guidance_scale=args.guidance)) for n in args.steps]
        print(f"| {', '.join([name, *others])} | " + " | ".join(cells) + " |", flush=True)

    print(f"\n{args.sample_steps} steps of dpmpp_2m.\n")
    print("| guidance | right colours | right kinds | clipped |\n|---|---|---|---|")
    for name, settings in wrappers(Path(args.ckpt)).items():
        pictures = draw(sampler="dpmpp_2m", steps=args.sample_steps, **settings)
        colour, kind = right(pictures)
        print(f"| {name} | {colour:.1%} | {kind:.1%} | {clipped(pictures):.1%} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
