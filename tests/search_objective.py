"""Which objective trains best here: python tests/search_objective.py --minutes 3 --seeds 2

Trains `tiny` on the built-in pictures for the same number of steps, one factor at a time changed from its
preset: what is predicted, the loss weight, the density of t, the shift of the noise. The steps are what
--minutes give at the speed that is measured first; warm-up and cooldown keep their share of the preset. Each
run is judged by its pictures of unseen prompts (tests/judge.py) and by its error of x0 (`raw` of
diffusion.losses) on fixed pictures, at noise levels that are the same for all. Prints a markdown table.

--jobs run side by side on their share of the cores. The same command again goes on, and skips what is in
OUT/results.jsonl.
"""
import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import diffusion
import model
import sample
import train
from tests import judge

FACTORS = "prediction", "loss_weight", "t_density"
SHIFTS = 16, 32, 64, 128


def variants() -> dict[str, list[str]]:
    """Names and the flags that they change in the preset."""
    config = train.parse(["--model", "tiny"])[3]
    hints = typing.get_type_hints(diffusion.DiffusionConfig)
    choices = {name: typing.get_args(hints[name]) for name in FACTORS} | {"shift_base": SHIFTS}
    changes = [(name, value) for name, values in choices.items() for value in values
               if value != getattr(config, name)]
    return {"preset": []} | {f"{name} {value}": [f"--{name.replace('_', '-')}", str(value)]
                             for name, value in changes}


def command(out: Path, *flags: str) -> list[str]:
    return [sys.executable, train.__file__, "--model", "tiny", "--out", str(out), "--sample-every", "0",
            "--val-every", "0", "--save-every", "0", *flags]


def measured_speed(out: Path) -> float:
    """Pictures/s of the preset here, the median of some lines of its log [images/second]."""
    shutil.rmtree(out / "speed", ignore_errors=True)
    done = subprocess.run(command(out / "speed", "--steps", "70", "--log-every", "10"), check=True,
                          capture_output=True, text=True)
    lines = re.findall(r"pictures/s ([\d.]+)", done.stdout)
    return float(np.median([float(speed) for speed in lines[1:]]))


@torch.no_grad()
def error(stage: sample.Stage, n: int) -> float:
    """Mean squared error of x0 on n held-out pictures, at noise levels that do not depend on the schedule.

    They are even in the angle atan(sigma / alpha), as the buckets of diffusion.loss_buckets are.
    """
    pictures, total = data.Pictures(data.DataConfig(), stage.size, 0, "val"), 0.0
    plain = dataclasses.replace(stage.config, loss_weight="uniform", learn_sigma=False)
    for start in range(0, n, 32):
        items = [pictures[p] for p in range(start, min(start + 32, n))]
        shown = torch.from_numpy(np.stack([item["picture"] for item in items]))
        x0 = stage.space.encode(shown.to(stage.device))
        angle = (torch.arange(start, start + len(items)) * 0.6180339887 + 0.5) % 1 * (math.pi / 2)
        t = stage.schedule.inverse(-2 * torch.log(torch.tan(angle)).to(stage.device))
        eps = diffusion.gaussian(torch.arange(start, start + len(items)), x0.shape[1:], stage.device)
        condition = stage.text.encode([item["caption"] for item in items], stage.device)
        _, raw = diffusion.losses(stage.network(), x0, eps, t, stage.schedule, plain, **condition)
        total += float(raw.sum())
    return total / n


def score(run: Path, referee: judge.Judge, n: int, guidance: float) -> dict:
    """Shares of right colours and kinds of n prompts, and the error of x0."""
    stage = sample.load_stage(run, model.choose_device(""))
    texts, kinds, colours = zip(*judge.prompts(n))
    drawn = sample.generate(stage, list(texts), list(range(n)), batch_size=32, guidance_scale=guidance)
    scores = judge.judge_one(referee, judge.at_64(drawn), kinds, colours)
    return {"colour": scores["colour"], "kind": scores["kind"], "error": error(stage, 512)}


def table(results: list[dict]) -> str:
    """A row for each variant: means over the seeds, and in brackets how far they lie apart."""
    rows = ["| changed | seeds | right colours | right kinds | error of x0 | seconds |",
            "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(result["variant"] for result in results):
        found = [result for result in results if result["variant"] == name]
        column = {key: [result[key] for result in found] for key in ("colour", "kind", "error", "seconds")}
        shares = [f"{np.mean(column[key]):.1%} ({np.ptp(column[key]):.1%})" for key in ("colour", "kind")]
        rows.append(f"| {name} | {len(found)} | {' | '.join(shares)} | {np.mean(column['error']):.4f} "
                    f"({np.ptp(column['error']):.4f}) | {np.mean(column['seconds']):.0f} |")
    return "\n".join(rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="of each run [minutes]")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each variant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time")
    parser.add_argument("--only", nargs="+", choices=variants(), help="these variants instead of all")
    parser.add_argument("--out", default="runs/search", help="where runs and results lie")
    parser.add_argument("--n", type=int, default=200, help="prompts of the judge [images]")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale of their pictures")
    args = parser.parse_args(argv)

    torch.set_num_threads(max(1, os.cpu_count() // args.jobs))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())              # of the runs
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    plan, kept = out / "steps.json", out / "results.jsonl"
    preset = train.parse(["--model", "tiny"])[0]
    if not plan.exists():                                      # once: all runs are equally long
        speed = measured_speed(out)
        steps = max(10, round(args.minutes * 60 * speed / preset.batch_size))
        plan.write_text(json.dumps({"minutes": args.minutes, "pictures/s": speed, "steps": steps}))
    planned = json.loads(plan.read_text())
    if planned["minutes"] != args.minutes:
        parser.error(f"{plan} is of --minutes {planned['minutes']}. Use that, or another --out")
    steps, results = planned["steps"], []
    print(f"{planned['pictures/s']:.0f} pictures/s: {steps} steps in {args.minutes} minutes", file=sys.stderr)
    fit = ["--steps", str(steps)]
    for flag in ("warmup", "cooldown"):
        fit += [f"--{flag}", str(round(getattr(preset, flag) * steps / preset.steps))]
    if kept.exists():
        results = [json.loads(line) for line in kept.read_text().splitlines()]
    done = {(result["variant"], result["seed"]) for result in results}
    referee = judge.load()

    def one(task: tuple[str, int]) -> None:
        name, seed = task
        run, start = out / f"{name.replace(' ', '-')}-{seed}", time.time()
        subprocess.run(command(run, "--seed", str(seed), *fit, *variants()[name]), check=True,
                       stdout=subprocess.DEVNULL)
        seconds = time.time() - start
        found = score(run, referee, args.n, args.guidance)
        results.append({"variant": name, "seed": seed, **found, "seconds": seconds})
        with kept.open("a") as f:
            f.write(json.dumps(results[-1]) + "\n")
        print(results[-1], file=sys.stderr, flush=True)

    tasks = [(name, seed) for name in args.only or variants() for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, [task for task in tasks if task not in done]))
    shown = [result for result in results if result["variant"] in (args.only or variants())]
    print(f"`tiny`, {steps} steps of {preset.batch_size} pictures, {args.n} prompts, "
          f"guidance {args.guidance}.\n")
    print(table(sorted(shown, key=lambda result: list(variants()).index(result["variant"]))))


if __name__ == "__main__":
    main(sys.argv[1:])
