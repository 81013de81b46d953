"""A stage that enlarges pictures, measured.

    python tests/bench_cascade.py --ckpt runs/256 --base runs/64    # against bicubic, the best --aug
    python tests/bench_cascade.py --layout                          # efficient against ordinary layout

PSNR [dB] and the error of a picture's mean colour [1/255], on whole pictures of the run's validation set. For
pictures that --base draws there is no truth: what is made of them is made small again and compared with them.
"""
import argparse
import dataclasses
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import diffusion
import model
import sample


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over pictures (N, C, H, W) of 0 to 255."""
    error = np.square(a.astype(float) - b).mean((1, 2, 3)).clip(1e-4)
    return float(np.mean(10 * np.log10(255**2 / error)))


def colour(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float).mean((2, 3)) - b.astype(float).mean((2, 3))).mean())


def resized(pictures: np.ndarray, size: int) -> np.ndarray:
    """By the kernel of the data: the mean of blocks downwards, bicubic upwards."""
    mode = "RGB" if pictures.shape[1] == 3 else "L"
    images = [sample.to_image(torch.from_numpy(p)).convert(mode) for p in pictures]
    return np.stack([data.array(data.shrink(image, size)) for image in images])


def quality(args: argparse.Namespace, device: torch.device) -> None:
    stage = sample.load_stage(Path(args.ckpt), device)
    uncut = dataclasses.replace(stage.data, crop=0)
    found = data.collect(data.Pictures(uncut, stage.size, 0, "val"), 0, args.n)
    truth, small, seeds = found["picture"], found["lowres"], list(range(args.n))

    def draw(lowres: np.ndarray, aug: float) -> np.ndarray:
        return sample.generate(stage, found["captions"], seeds, args.batch_size, aug=aug,
                               lowres=torch.from_numpy(lowres), steps=args.sample_steps,
                               sampler=args.sampler, guidance_scale=args.guidance).numpy()

    print(f"{args.ckpt}: {stage.data.lowres} -> {stage.size}, step {stage.step}, {args.n} pictures, "
          f"{args.sampler} in {args.sample_steps} steps, guidance {args.guidance}")
    if small.shape[1] == truth.shape[1]:
        bicubic = resized(small, stage.size)
        print(f"bicubic    PSNR {psnr(bicubic, truth):6.2f}  mean colour {colour(bicubic, truth):.2f}")
    scores, started = {}, time.time()
    for aug in args.aug:
        drawn = draw(small, aug)
        scores[aug] = psnr(drawn, truth)
        print(f"aug {aug:4.2f}   PSNR {scores[aug]:6.2f}  mean colour {colour(drawn, truth):.2f}", flush=True)
    seconds = (time.time() - started) / (len(args.aug) * args.n)
    print(f"best: --aug {max(scores, key=scores.get)}; {seconds:.1f} seconds a picture")
    columns = [view for view in (resized(small, stage.size), drawn, truth) if view.shape[1] == 3]
    sheet = np.concatenate([np.concatenate(list(view[:4]), 2) for view in columns], 1)
    if args.out:
        Image.fromarray(sheet.transpose(1, 2, 0)).save(args.out)
    if args.base:
        base = sample.load_stage(Path(args.base), device)
        own = sample.generate(base, found["captions"], seeds, args.batch_size).numpy()
        for aug in args.aug:
            again = resized(draw(own, aug), own.shape[-1])
            print(f"own, aug {aug:4.2f}  PSNR {psnr(again, own):6.2f}  mean colour {colour(again, own):.2f}")


def step(layout: str, args: argparse.Namespace, device: torch.device) -> None:
    """Milliseconds of a training step and the peak of the memory, in a process of its own."""
    config = model.ModelConfig(64, (1, 2, 4), (2, 4, 6), patch=2, efficient=layout == "efficient")
    torch.manual_seed(0)
    unet = model.UNet(config, 128, 128, 128, lowres=3).to(device)
    unet.levels = [diffusion.make_schedule(diffusion.DiffusionConfig(), side) for side in (128, 32)]
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    x, batch = torch.randn(args.batch_size, 3, 128, 128, device=device), args.batch_size
    condition = {"context": torch.randn(batch, 64, 128), "mask": torch.ones(batch, 64, dtype=torch.bool),
                 "pooled": torch.randn(batch, 128), "lowres": x.cpu()[..., ::4, ::4],
                 "lowres_t": torch.rand(batch)}
    condition = {name: value.to(device) for name, value in condition.items()}
    schedule, noise = diffusion.make_schedule(diffusion.DiffusionConfig(), 128), diffusion.DiffusionConfig()
    for _ in range(args.rounds):
        best = float("inf")
        for _ in range(3):
            start = model.clock(device)
            with torch.autocast(device.type, torch.bfloat16):
                t = torch.rand(batch, device=device)
                loss, _ = diffusion.losses(unet, x, torch.randn_like(x), t, schedule, noise, **condition)
                loss = loss.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            best = min(best, model.clock(device) - start)
    weights = sum(p.numel() for p in unet.parameters()) / 1e6
    flops = model.count_flops(unet, x[:1], x[:1, 0, 0, 0], **{k: v[:1] for k, v in condition.items()}) / 1e9
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**30
    print(f"{layout:9s}  {weights:6.2f} M weights  {flops:7.2f} GFLOPs  step {1e3 * best:7.1f} ms  "
          f"{peak:.2f} GiB", flush=True)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--ckpt", default="runs/256")
    p.add_argument("--base", default="", help="a base stage, to enlarge what it draws")
    p.add_argument("--layout", nargs="?", const="both", choices=["both", "efficient", "ordinary"])
    p.add_argument("--n", type=int, default=16, help="pictures [images]")
    p.add_argument("--aug", type=float, nargs="*", default=[0.0, 0.05, 0.1, 0.2, 0.4])
    p.add_argument("--guidance", type=float, default=1.0)
    p.add_argument("--sampler", default="dpmpp_2m")
    p.add_argument("--sample-steps", type=int, default=8, help="[steps]")
    p.add_argument("--batch-size", type=int, default=8, help="[images]")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="")
    p.add_argument("--out", default="", help="a .png: bicubic, drawn, true")
    args = p.parse_args(argv)
    device = model.choose_device(args.device)
    if args.layout == "both":
        for layout in ("ordinary", "efficient", "ordinary", "efficient"):
            subprocess.run([sys.executable, __file__, *argv, "--layout", layout], check=True)
    elif args.layout:
        step(args.layout, args, device)
    else:
        quality(args, device)


if __name__ == "__main__":
    main(sys.argv[1:])
