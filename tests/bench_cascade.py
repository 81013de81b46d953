"""A stage that enlarges pictures, measured.

    python tests/bench_cascade.py --ckpt runs/64,runs/256     # the last against bicubic, the best --aug
    python tests/bench_cascade.py --layout                    # efficient against ordinary layout

PSNR [dB] and the error of a picture's mean colour [1/255], on whole pictures of the run's validation set. For
pictures that the stages below draw there is no truth: what is made of them is made small again.
"""
import argparse
import dataclasses
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import diffusion
import model
import sample


def compare(name: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """Print, and return the PSNR: the mean over pictures, uint8 (N, C, H, W)."""
    error = (a.double() - b).square().mean((1, 2, 3)).clamp(min=1e-4)
    psnr = (10 * torch.log10(255**2 / error)).mean().item()
    colour = (a.double().mean((2, 3)) - b.double().mean((2, 3))).abs().mean()
    print(f"{name:14} PSNR {psnr:6.2f}  mean colour {colour:.2f}", flush=True)
    return psnr


def quality(args: argparse.Namespace, device: torch.device) -> None:
    *below, path = map(Path, args.ckpt.split(","))
    stage = sample.load_stage(path, device)
    if not stage.data.lowres:
        raise SystemExit(f"{path} enlarges nothing")
    uncut = dataclasses.replace(stage.data, crop=0)
    found = data.collect(data.Pictures(uncut, stage.size, 0, "val"), 0, args.n)
    truth, small = (torch.from_numpy(found[name]) for name in ("picture", "lowres"))
    prompts, seeds, own = found["captions"], range(args.n), None
    for run in below:
        own = sample.generate(sample.load_stage(run, device), prompts, seeds, args.batch_size, lowres=own)
    print(f"{path}: {stage.data.lowres} -> {stage.size}, step {stage.step}, {args.n} pictures, "
          f"{args.sampler} in {args.sample_steps} steps, guidance {args.guidance}")
    mode = stage.data.picture_mode
    bicubic, scores, started = sample.resized(small, mode, stage.size), {}, time.time()
    compare("bicubic", bicubic, truth)
    for aug in args.aug:
        draw = partial(sample.generate, stage, prompts, seeds, args.batch_size, aug=aug,
                       steps=args.sample_steps, sampler=args.sampler, guidance_scale=args.guidance)
        drawn = draw(lowres=small)
        scores[aug] = compare(f"aug {aug:4.2f}", drawn, truth)
        if scores[aug] == max(scores.values()):
            best = drawn
        if own is not None:
            again = sample.resized(draw(lowres=own), "colour", own.shape[-1])
            compare(f"own, aug {aug:4.2f}", again, sample.resized(own, "colour"))
    seconds = (time.time() - started) / (len(args.aug) * args.n * (1 if own is None else 2))
    print(f"best: --aug {max(scores, key=scores.get)}; {seconds:.1f} seconds a picture")
    if args.out:
        columns = [torch.cat(list(view[:4]), 2) for view in (bicubic, best, truth)]
        sample.to_image(torch.cat(columns, 1)).save(args.out)


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
    p.add_argument("--ckpt", default="runs/256", help="a stage that enlarges, behind those below: a,b")
    p.add_argument("--layout", nargs="?", const="both", choices=["both", "efficient", "ordinary"])
    p.add_argument("--n", type=int, default=16, help="pictures [images]")
    p.add_argument("--aug", type=float, nargs="*", default=[0.0, 0.05, 0.1, 0.2, 0.4])
    p.add_argument("--guidance", type=float, default=1.0)
    p.add_argument("--sampler", default="dpmpp_2m")
    p.add_argument("--sample-steps", type=int, default=8, help="[steps]")
    p.add_argument("--batch-size", type=int, default=8, help="[images]")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="")
    p.add_argument("--out", default="", help="a .png: bicubic, drawn with the best --aug, true")
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
