"""What the layout of a stage that enlarges costs: python tests/bench_layout.py

A training step of the Efficient U-Net beside the ordinary one, of equal weights: time and memory, each in a
process of its own, in turn, twice.
"""
import argparse
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
import model
import train


def step(layout: str, args: argparse.Namespace, device: torch.device) -> None:
    """Milliseconds of a training step and the peak of the memory, in a process of its own."""
    config = model.ModelConfig(64, (1, 2, 4), (2, 4, 6), patch=2, efficient=layout == "efficient")
    torch.manual_seed(0)
    unet = model.UNet(config, 128, 128, 128, lowres=3).to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    x, batch = torch.randn(args.batch_size, 3, 128, 128, device=device), args.batch_size
    condition = {"context": torch.randn(batch, 64, 128), "mask": torch.ones(batch, 64, dtype=torch.bool),
                 "pooled": torch.randn(batch, 128), "lowres": x.cpu()[..., ::4, ::4],
                 "lowres_t": torch.rand(batch)}
    condition = {name: value.to(device) for name, value in condition.items()}
    noise = diffusion.DiffusionConfig()
    schedule, small = (diffusion.make_schedule(noise, side) for side in (128, 32))
    network = diffusion.around(unet, schedule, small)
    for _ in range(args.rounds):
        best = float("inf")
        for _ in range(3):
            start = train.clock(device)
            with torch.autocast(device.type, torch.bfloat16, train.fastest_dtype(device) == "bf16"):
                t = torch.rand(batch, device=device)
                loss, _ = diffusion.losses(network, x, torch.randn_like(x), t, schedule, noise, **condition)
                loss = loss.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            best = min(best, train.clock(device) - start)
    weights = sum(p.numel() for p in unet.parameters()) / 1e6
    one = {name: value[:1] for name, value in condition.items()}
    flops = train.count_flops(network, x[:1], x[:1, 0, 0, 0], **one) / 1e9
    print(f"{layout:9s}  {weights:6.2f} M weights  {flops:7.2f} GFLOPs  step {1e3 * best:7.1f} ms  "
          f"{train.memory_peak(device) / 2**30:.2f} GiB", flush=True)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--layout", default="both", choices=["both", "efficient", "ordinary"])
    p.add_argument("--batch-size", type=int, default=8, help="[images]")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="")
    args = p.parse_args(argv)
    if args.layout == "both":
        for layout in ("ordinary", "efficient", "ordinary", "efficient"):
            subprocess.run([sys.executable, __file__, *argv, "--layout", layout], check=True)
    else:
        step(args.layout, args, model.choose_device(args.device))


if __name__ == "__main__":
    main(sys.argv[1:])
