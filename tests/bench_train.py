"""How near a training step comes to what the machine can do: python tests/bench_train.py [flags of train.py]

In one process, in turn: a bare 3x3 convolution, forward and backward, of each width and side of the network,
and training steps (pictures, noise, forward, backward, clipping, optimizer, average). Prints both rates,
their ratio, and where the time goes by the profiler.
"""
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import diffusion
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
        start = model.clock(device)
        y = F.conv2d(x, w, padding=1)
        torch.autograd.grad(y, (x, w), y.detach())
        best = min(best, model.clock(device) - start)
    return 3 * 2 * 9 * batch * channels**2 * side**2 / best


def main(argv: list[str]) -> None:
    configs = cfg, data_cfg, model_cfg, *_ = train.parse(argv)
    (device, _), dtype = train.launch(cfg, 1, writes=False), text_encoder.DTYPES[cfg.dtype]
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_DFL)      # as before
    pictures = data.Pictures(data_cfg, cfg.size, cfg.seed)
    text, net = train.build(configs, device)
    state = model.State(net, cfg.weight_decay, cfg.clip, cfg.ema_decay, cfg.dtype == "fp16",
                        muon=cfg.optimizer == "muon")
    autocast = torch.autocast(device.type, dtype, enabled=cfg.dtype != "fp32")
    run, batch, step = model.compiled(net, device, cfg.compile, print), cfg.micro_batch or cfg.batch_size, 0
    with autocast:
        one = train.scaled(data.collect(pictures, 0, 1)["picture"], device)
        condition = train.condition_of(net, text, data.collect(pictures, 0, 1), device)
        flops = model.count_flops(net, one, one, one[:, 0, 0, 0], **condition)

    def update() -> tuple[float, float]:
        """Seconds of a step, and of drawing its pictures."""
        nonlocal step
        start = model.clock(device)
        found = data.collect(pictures, step * batch, (step + 1) * batch)
        drawing = model.clock(device) - start
        u, kept, keys = train.draws(cfg.seed, "noise", found["positions"], cfg.uncond_prob)
        x0 = train.scaled(found["picture"], device)
        eps = diffusion.gaussian(keys, x0.shape[1:], device)
        t, weight = net.draw_t(u.to(device))
        with autocast:
            loss, _ = run(x0, eps, t, **train.condition_of(net, text, found, device, 0, kept))
        (weight * loss).mean().backward()
        state.update(1e-4)
        step += 1
        return model.clock(device) - start, drawing

    for _ in range(3):
        update()
    sides = model.sides(model_cfg, one.shape[-1])
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
