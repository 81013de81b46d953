"""What the training thread does in a step beside forward, backward and update: python tests/bench_loop.py

    [--batch 256 --size 64 --width 2048 --tokens 25 --length 128 --workers 2 --steps 20 --pause 0.3]
    [--latents 32]

Workers send pictures and the cached embeddings of captions, as many and as large as the flags say; network
and update are stand-ins that cost nothing. --latents: channels of the latents of a cache, at an eighth of the
side, instead of pictures. Without a GPU the kernels of a step run on the CPU for one picture of the batch, so
that little is left but to launch them. Between two steps the thread sleeps for --pause
seconds, the time of a network, in which batches may arrive. Prints a table of the best and the middle of all
steps, by the clock and by the processor (of this thread, which holds on a machine that is shared), and what
a worker does for one batch.
"""
import argparse
import statistics
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import text_encoder
import train


def embedding(tokens: int, width: int, caption: str, beside: bytes) -> tuple:
    return torch.ones(tokens, width).bfloat16(), torch.ones(width).bfloat16()


class Watch:
    """Seconds of named parts, by the clock and by the processor."""

    def __init__(self):
        self.parts = {}

    def timed(self, name: str, function):
        def run(*args, **kwargs):
            start, worked = time.perf_counter(), time.thread_time()
            found = function(*args, **kwargs)
            spent = time.perf_counter() - start, time.thread_time() - worked
            self.parts.setdefault(name, []).append(spent)
            return found
        return run


def trainer_of(args, watch: Watch):
    """A trainer whose network and update cost nothing, and the pictures it trains on."""
    device = model.choose_device(args.device)
    configs = cfg, data_cfg, *_ = train.parse([
        "--size", str(args.size), "--model", "small", "--batch-size", str(args.batch),
        "--device", device.type, "--dtype", "fp32", "--workers", str(args.workers),
        "--steps", str(args.steps), "--warmup", "0", "--cooldown", "0", "--no-compile"])
    reader = text_encoder.Reader(None, args.length, args.width, args.width,
                                 partial(embedding, args.tokens, args.width))
    text = text_encoder.TextEncoder(torch.nn.Identity(), reader, "none", False)
    with torch.device("meta"):
        objective = train.build(configs, text, torch.device("meta"))       # its weights are never used

    def update(lr):
        return torch.zeros(2, device=device)

    scaler = torch.amp.GradScaler(device.type, enabled=False)
    state = argparse.Namespace(update=update, clip=1.0, scaler=scaler)
    trainer = train.Trainer(cfg, objective, state, device, train.Ranks())
    weight = torch.zeros((), device=device, requires_grad=True)

    def run(x0, **inputs):
        loss = weight * x0[:, 0, 0, 0]
        return {"weighted": loss, "loss": loss, "plain": loss, "raw": loss}

    def inputs(part, device):
        if device.type == "cpu":
            part = train.parts_of(part, 1)[0]
        return real(part, device)

    trainer.run = run
    real = watch.timed("noise, times, captions: to the device and padded", objective.inputs)
    objective.inputs = inputs
    objective.record = watch.timed("losses counted", objective.record)
    trainer.tell = watch.timed("pictures told of", trainer.tell)
    pictures = data.Pictures(data_cfg, cfg.size, cfg.seed)
    pictures.reader = reader
    if args.latents:
        pictures.latents = defaultdict(partial(train.no_latent, args.latents, args.size // 8))
    pictures.draws = partial(train.draws, cfg.seed, "noise", cfg.uncond_prob, 0, cfg.batch_size)
    return trainer, pictures


def main(argv: list[str]) -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    for name, value in dict(batch=256, size=64, width=2048, tokens=25, length=128, workers=2, steps=20,
                            pause=0.3).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--latents", type=int, default=0, help="channels, 0 = pictures")
    parser.add_argument("--device", default="", help="cuda or cpu; the first of them there is")
    args = parser.parse_args(argv)

    watch = Watch()
    trainer, pictures = trainer_of(args, watch)
    made = watch.timed("a worker makes a batch", data.collect)(pictures, 0, args.batch)
    worker = watch.parts.pop("a worker makes a batch")[0]
    data.collect = lambda *_: made                             # workers that always keep up
    batches = trainer.batches(pictures, 0, 0)
    receive = watch.timed("a batch from the workers", lambda: next(batches))
    try:
        for _ in range(args.steps):
            time.sleep(args.pause)
            batch = receive()
            trainer.step(batch, 1e-3)
    finally:
        batches.close()

    size = sum(x.nbytes for x in made.values() if hasattr(x, "nbytes"))
    print(f"batch {args.batch} at {args.size} pixels, captions of {args.tokens} tokens, {args.width} wide, "
          f"in {args.length}: {size / 2**20:.1f} MiB; {args.workers} workers, device {trainer.device}\n")
    print("| ms a step | best | middle | of the processor, middle |\n|---|---|---|---|")
    totals = [0.0, 0.0, 0.0]
    for name, spent in watch.parts.items():
        clock, busy = zip(*spent[2:])                          # the first ones warm up
        row = min(clock), statistics.median(clock), statistics.median(busy)
        totals = [total + value for total, value in zip(totals, row)]
        print(f"| {name} | " + " | ".join(f"{1e3 * value:.2f}" for value in row) + " |")
    print("| **together** | " + " | ".join(f"{1e3 * value:.2f}" for value in totals) + " |")
    print(f"\na worker makes a batch in {1e3 * worker[0]:.0f} ms ({1e3 * worker[1]:.0f} of the processor)")


if __name__ == "__main__":
    main(sys.argv[1:])
