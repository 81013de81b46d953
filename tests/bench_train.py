"""How near a training step comes to what the machine can do: python tests/bench_train.py [flags of train.py]

In one process, in turn: a bare 3x3 convolution, forward and backward, of each width and side of the network,
and training steps (pictures, noise, forward, backward, clipping, optimizer, average). Prints both rates,
their ratio, and where the time goes by the profiler.
"""
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import text_encoder
import train

ROUNDS, STEPS = 3, 6


def convolution(device: torch.device, dtype: torch.dtype, batch: int, channels: int, side: int, times: int):
    """Operations/second of a bare convolution and its two gradients, channels last."""
    x, w = (torch.randn(*shape, device=device).to(dtype, memory_format=torch.channels_last).requires_grad_()
            for shape in ((batch, channels, side, side), (channels, channels, 3, 3)))
    best = float("inf")
    for _ in range(times):
        start = train.clock(device)
        y = F.conv2d(x, w, padding=1)
        torch.autograd.grad(y, (x, w), y.detach())
        best = min(best, train.clock(device) - start)
    return 3 * 2 * 9 * batch * channels**2 * side**2 / best


def main(argv: list[str]) -> None:
    configs = cfg, data_cfg, model_cfg, _, text_cfg = train.parse(argv)
    ranks = train.Ranks()
    device, dtype = train.launch(cfg, ranks), text_encoder.DTYPES[cfg.dtype]
    pictures = data.Pictures(data_cfg, cfg.size, cfg.seed)
    text = text_encoder.load_text_encoder(text_cfg).to(device)
    objective = train.build(configs, text, device)
    state = train.State(objective, cfg.weight_decay, cfg.clip, cfg.ema_decay, cfg.dtype == "fp16",
                        matrices=objective.matrices() if cfg.optimizer == "muon" else None)
    trainer = train.Trainer(cfg, objective, state, device, ranks)
    batch, step = trainer.micro, 0
    pictures.reader = text.reader
    pictures.draws = partial(train.draws, cfg.seed, "noise", cfg.uncond_prob, 0, batch)
    trainer.measure(data.collect(pictures, 0, 1))
    flops = trainer.flops

    def update() -> tuple[float, float]:
        """Seconds of a step, and of drawing its pictures."""
        nonlocal step
        start = train.clock(device)
        found = data.collect(pictures, step * batch, (step + 1) * batch)
        drawing = train.clock(device) - start
        trainer.step(found, 1e-4)
        step += 1
        return train.clock(device) - start, drawing

    for _ in range(3):
        update()
    sides = model.sides(model_cfg, data_cfg.crop or cfg.size)
    widths = [model_cfg.channels * mult for mult in model_cfg.channel_mult]
    best, rates = (float("inf"), 0.0), dict.fromkeys(zip(widths, sides), 0.0)
    for _ in range(ROUNDS):
        for width, side in rates:
            found = convolution(device, dtype, batch, width, side, 5)
            rates[width, side] = max(rates[width, side], found)
        best = min([best, *(update() for _ in range(STEPS))])
    best, drawing = best
    used = 3 * flops * batch / best
    print(f"{cfg.model} at {cfg.size} pixels, batch {batch}, {cfg.dtype}, {device}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads, {flops / 1e9:.3f} GFLOPs a picture")
    for (width, side), rate in rates.items():
        print(f"bare convolution, {width} channels at {side}x{side}: {rate / 1e9:6.0f} GFLOP/s; "
              f"the step reaches {used / rate:.0%} of it")
    print(f"training step: {1e3 * best:.1f} ms, {batch / best:.1f} pictures/s, {used / 1e9:.0f} GFLOP/s; "
          f"{1e3 * drawing:.1f} ms to draw the pictures, {used / 1e9 * best / (best - drawing):.0f} without")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        update()
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda e: getattr(e, name), reverse=True)
    total = sum(getattr(e, name) for e in events)
    shares = (f"{e.key.removeprefix('aten::')} {getattr(e, name) / total:.0%}" for e in events[:12])
    print("where the time goes: " + ", ".join(shares))


if __name__ == "__main__":
    main(sys.argv[1:])
