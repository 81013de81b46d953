"""The published U-Net here and in diffusers, with the same weights: python tests/bench_unet.py

Milliseconds of a forward pass and of one forward and backward, taken in turn in one process, by the seconds
of the processor on a CPU and by the clock elsewhere; the median of the rounds, and of their ratios. Then the
peak of the memory of a training step, each side in a process of its own. On a GPU:
--device cuda --dtype bf16 --compile --size 512 --batch-size 64 --width 1
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model

SIDES = ("ours", "diffusers")


def networks(args, sides=SIDES) -> dict:
    """A function of (x, t, context) for each side; both have the same weights where both are asked for."""
    config = dict(model.UNETS[args.model])
    config["block_out_channels"] = [int(args.width * width) for width in config["block_out_channels"]]
    torch.manual_seed(0)
    found, weights = {}, None
    if "ours" in sides:
        ours = model.UNet2DConditionModel(config).to(args.device)
        weights = ours.state_dict()
        mask = torch.ones(args.batch_size, 77, dtype=torch.bool, device=args.device)
        net = torch.compile(ours) if args.compile else ours
        found["ours"] = lambda x, t, context: net(x, (t + 1) / 1000, context, mask)
    if "diffusers" in sides:
        from diffusers import UNet2DConditionModel
        theirs = UNet2DConditionModel(**config).to(args.device)
        if args.channels_last:
            theirs = theirs.to(memory_format=torch.channels_last)
        if weights:
            theirs.load_state_dict(weights)
        net_of_theirs = torch.compile(theirs) if args.compile else theirs
        found["diffusers"] = lambda x, t, context: net_of_theirs(x, t, context).sample
    return found


def clock(args) -> float:
    if args.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def inputs(args):
    side = args.size // 8
    x = torch.randn(args.batch_size, 4, side, side, device=args.device)
    t = torch.randint(0, 1000, (args.batch_size,), device=args.device)
    width = model.UNETS[args.model]["cross_attention_dim"]
    context = torch.randn(args.batch_size, 77, width, device=args.device)
    return x, t, context


def step(network, batch, args, backward: bool) -> float:
    """Milliseconds of one pass."""
    start = clock(args)
    with torch.set_grad_enabled(backward), torch.autocast(args.device, torch.bfloat16, args.dtype == "bf16"):
        loss = network(*batch).float().square().mean()
    if backward:
        loss.backward()
    return 1e3 * (clock(args) - start)


def memory(args) -> float:
    """GiB at the peak of two training steps."""
    network = networks(args, [args.side])[args.side]
    batch = inputs(args)
    for _ in range(2):
        step(network, batch, args, True)
    if args.device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--model", default="sd15", choices=["sd15", "sd21"])
    p.add_argument("--width", type=float, default=0.5, help="of all levels, as a share of the published one")
    p.add_argument("--size", type=int, default=256, help="[pixels]")
    p.add_argument("--batch-size", type=int, default=2, help="[images]")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--compile", action="store_true")
    p.add_argument("--channels-last", action="store_true", help="diffusers, too")
    p.add_argument("--device", default="cpu")
    p.add_argument("--side", default="", choices=["", *SIDES], help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.side:
        print(json.dumps(memory(args)))
        return

    found, batch = networks(args), inputs(args)
    with torch.no_grad():
        said = [network(*batch) for network in found.values()]
    print(f"largest difference of the outputs {(said[0] - said[1]).abs().max():.1e}")
    for backward, what in ((False, "forward"), (True, "forward and backward")):
        times = {name: [] for name in found}
        for count in range(args.rounds + 1):
            for name in list(found)[::1 if count % 2 else -1]:
                took = step(found[name], batch, args, backward)
                if count:                                                     # the first one warms up
                    times[name].append(took)
        ratios = [b / a for a, b in zip(*times.values())]
        middle = [statistics.median(values) for values in times.values()]
        print(f"{what:21} ours {middle[0]:8.1f} ms  diffusers {middle[1]:8.1f} ms  "
              f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})  "
              f"{1e3 * args.batch_size / middle[0]:.2f} pictures/s", flush=True)
    del found
    for name in SIDES:
        command = [sys.executable, __file__, *argv, "--side", name]
        peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"peak of a training step, {name}: {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
