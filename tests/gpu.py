"""What a GPU reaches, in one Markdown table for the README: bash tests/gpu.sh [--train FOLDER] [--minutes 9]

    the tests marked gpu; steps of small and base, in bf16 and compiled, beside the U-Nets of diffusers and
    of imagen-pytorch of like width, each in a process of its own; T5 beside transformers; --dry-run of every
    preset (pictures/s, share of a matrix product, memory) with the largest of --batches whose step takes at
    most --work and that fits. --train: also ten minutes of small on the pictures in FOLDER.

Exits with 1 where a figure is missing: that stands in the table, and why on standard error. A package that is
not installed is named and is no failure. --shrink: all of it small, to show on any machine that it runs.
One side of one preset, also on a CPU: python tests/gpu.py --device cpu --preset tiny --batches 40 --of limn
"""
import argparse
import importlib.util
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
THEIRS = {"diffusers": "diffusers", "imagen-pytorch": "imagen_pytorch"}          # name: module
SHRINK = ["--channels", "32", "--channel-mult", "1", "1", "--num-res-blocks", "1", "--attn-resolutions",
          "--head-dim", "16", "--emb-dim", "64", "--byte-width", "32"]
TEXT, TOKENS = 128, 128                                        # width and number of the text's tokens


class Missing(Exception):
    """A figure that could not be measured, and why."""


class Figures:
    """Rows of the table; what takes too long or fails is a row without a figure."""

    def __init__(self, seconds: float):
        self.rows, self.missing = [], 0
        self.end = time.monotonic() + seconds

    def run(self, command: list[str], most: float = 240) -> str:
        """What a command of python prints. Missing where it fails or is late."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise Missing("no time left, see --minutes")
        try:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                                  timeout=min(most, left))
        except subprocess.TimeoutExpired:
            raise Missing(f"not done after {min(most, left):.0f} s") from None
        if done.returncode:
            raise Missing((done.stderr.strip() or done.stdout.strip() or "failed").splitlines()[-1])
        return done.stdout

    def add(self, what: str, measure, *args) -> None:
        try:
            figure = measure(self, *args)
        except Missing as e:
            print(f"gpu.py: {what}: {e}", file=sys.stderr, flush=True)
            figure = "**missing**"
            self.missing += 1
        self.rows.append((what, figure))
        print(f"{what}: {figure}", file=sys.stderr, flush=True)

    def table(self, title: str) -> str:
        lines = [f"| {title} | reached |", "|---|---|"]
        lines += [f"| {what} | {figure} |" for what, figure in self.rows]
        return "\n".join(lines)


def found(pattern: str, text: str) -> re.Match:
    match = re.search(pattern, text, re.MULTILINE)
    if not match:
        raise Missing(f"no {pattern} in what was printed: {text[-200:]}")
    return match


def marked_tests(figures: Figures, args) -> str:
    only = ["tests/test_speed.py"] if args.shrink else []
    counted = ["--collect-only"] if args.device == "cpu" else []
    printed = figures.run(["-m", "pytest", "-n", "0", "-m", "gpu", *counted, *only])
    number = len(re.findall("::", printed)) if counted else int(found(r"(\d+) passed", printed)[1])
    if not number:
        raise Missing("there is no test")
    return f"{number} {'found' if counted else 'passed'}"


def dry_run(figures: Figures, args, size: int, name: str) -> str:
    """Of the largest batch whose step is not too much work, and that fits."""
    import train
    row = train.PRESETS[size, name]
    work = 3 * row["flops"] * (row.get("crop", size) / size) ** 2
    batches = [batch for batch in args.batches if batch * work <= 1e12 * args.work] or args.batches[-1:]
    for batch in batches:
        command = ["train.py", "--size", str(size), "--model", name, "--batch-size", str(batch),
                   "--device", args.device, "--no-compile", "--dry-run", *args.smaller]
        try:
            printed = figures.run(command)
        except Missing as e:
            if "memory" not in str(e) and "GiB" not in str(e):
                raise
            continue
        memory = found(r"^memory +(\S+ GiB)", printed)[1]
        speed = found(r"^speed +(\S+) pictures/s", printed)[1]
        share, peak = found(r"^used .*, (\S+%) of the (\d+) of", printed).groups()
        whole = int(peak) / 1000
        return (f"batch {batch}, not compiled: {speed} pictures/s, {share} of the {whole:.1f} TFLOP/s "
                f"of a matrix product, {memory}")
    return f"no batch of {batches} fits"


def settings(args, name: str):
    """The configuration of a preset, compiled on a GPU, in the fastest type."""
    import train
    compiles = ["--compile" if args.device == "cuda" else "--no-compile"]
    return train.parse(["--size", "16" if args.shrink else "64", "--model", name, "--device", args.device,
                        *compiles, "--batch-size", str(args.batches[-1]), *args.smaller])


def ours(args, name: str):
    """A step of limn and a pass as when drawing, the operations of one picture's pass, and the weights."""
    from functools import partial

    import torch

    import data
    import text_encoder
    import train

    configs = cfg, data_cfg, *_, text_cfg = settings(args, name)
    device, ranks = train.launch(cfg, train.Ranks()), train.Ranks()
    text = text_encoder.load_text_encoder(text_cfg).to(device)
    objective = train.build(configs, text, device)
    state = train.State(objective, cfg.weight_decay, cfg.clip, cfg.ema_decay, False,
                        matrices=objective.matrices() if cfg.optimizer == "muon" else None)
    trainer = train.Trainer(cfg, objective, state, device, ranks)
    pictures = data.Pictures(data_cfg, cfg.size, cfg.seed)
    pictures.reader = text.reader
    pictures.draws = partial(train.draws, cfg.seed, "noise", cfg.uncond_prob, 0, cfg.batch_size)
    trainer.measure(data.collect(pictures, 0, 1))
    batch = next(data.loader(pictures, 0, cfg.batch_size, cfg.batch_size, pin=device.type == "cuda"))

    given = objective.inputs(batch, device)
    with torch.no_grad(), trainer.autocast:
        told = objective.encode(**objective.condition(batch, device))

    def draw():
        with trainer.autocast:
            objective.network()(given["x0"], given["t"], **told)

    return lambda: trainer.step(batch, 1e-4), draw, trainer.flops, state.count()


def theirs(args, name: str):
    """The same of a U-Net of another package, of the width and depth of one of our presets, with levels of
    half the width in place of its patches: forward, mean squared error, backward, clipping and fused AdamW;
    no average, no text encoder."""
    import torch

    import text_encoder
    import train

    cfg, _, shape, *_ = settings(args, name)
    device, batch = train.launch(cfg, train.Ranks()), cfg.batch_size
    finer = [shape.channels // share for share in (8, 4, 2) if share <= shape.patch]
    widths = [*finer, *(shape.channels * mult for mult in shape.channel_mult)]
    sides = [cfg.size // 2**level for level in range(len(widths))]
    attends = [side in shape.attn_resolutions for side in sides]
    x = torch.randn(batch, 3, cfg.size, cfg.size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    context = torch.randn(batch, TOKENS, TEXT, device=device)
    t = torch.rand(batch, device=device)
    if args.of == "diffusers":
        from diffusers import UNet2DConditionModel
        net = UNet2DConditionModel(
            sample_size=cfg.size, in_channels=3, out_channels=3, block_out_channels=widths,
            layers_per_block=shape.num_res_blocks[0], cross_attention_dim=TEXT, norm_num_groups=16,
            attention_head_dim=shape.head_dim, mid_block_type="UNetMidBlock2DCrossAttn",
            down_block_types=["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
            up_block_types=["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)])
        run = lambda net, x, t, context: net(x, 1000 * t, context).sample
    else:
        from imagen_pytorch import Unet
        net = Unet(dim=shape.channels, dim_mults=shape.channel_mult,
                   num_resnet_blocks=shape.num_res_blocks[0], layer_attns=tuple(attends),
                   layer_cross_attns=tuple(attends), text_embed_dim=TEXT, attn_dim_head=shape.head_dim)
        run = lambda net, x, t, context: net(x, t, text_embeds=context)
    net = net.to(device, memory_format=torch.channels_last)
    flops = train.count_flops(lambda *given: run(net, *given), x[:1], t[:1], context[:1])
    weights = list(net.parameters())
    optimizer = torch.optim.AdamW(weights, 1e-4, fused=True)
    compiled = train.compiled(net, device, cfg.compile)

    def step():
        with torch.autocast(device.type, text_encoder.DTYPES[cfg.dtype], cfg.dtype != "fp32"):
            out = run(compiled, x, t, context)
        (out.float() - x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def draw():                                                # not compiled, as ours
        with torch.autocast(device.type, text_encoder.DTYPES[cfg.dtype], cfg.dtype != "fp32"):
            run(net, x, t, context)

    return step, draw, flops, sum(p.numel() for p in weights)


def speed_of(args, name: str) -> None:
    """In a process of its own: a JSON line of what one side reaches, training and drawing."""
    import torch

    import model
    import train
    step, draw, flops, weights = ours(args, name) if args.of == "limn" else theirs(args, name)
    device = model.choose_device(args.device)
    times = 1 if args.shrink else 5

    def speed(work) -> float:
        for _ in range(times if device.type == "cuda" else 1):
            work()
        best = float("inf")
        for _ in range(3):
            start = train.clock(device)
            for _ in range(times):
                work()
            best = min(best, (train.clock(device) - start) / times)
        return args.batches[-1] / best

    trained = speed(step)
    memory = train.memory_peak(device) / 2**30
    with torch.no_grad():
        drawn = speed(draw)
    reached = {"speed": trained, "drawn": drawn, "flops": flops, "weights": weights, "memory": memory}
    print(json.dumps(reached))


def steps_of(figures: Figures, args, name: str, side: str) -> str:
    if side in THEIRS and not importlib.util.find_spec(THEIRS[side]):
        return f"{side} is not installed"
    printed = figures.run(["tests/gpu.py", "--of", side, "--preset", name, "--device", args.device,
                           "--batches", str(args.step_batch), *(["--shrink"] if args.shrink else [])], 200)
    row = json.loads(printed.splitlines()[-1])
    work = row["flops"] / 1e12                                 # of a picture's pass [TFLOP]
    return (f"batch {args.step_batch}: {row['speed']:.1f} pictures/s, {row['weights'] / 1e6:.1f} M weights, "
            f"{1000 * work:.2f} GFLOPs a picture, {3 * work * row['speed']:.3g} TFLOP/s, "
            f"{row['memory']:.2f} GiB; a pass of drawing {row['drawn']:.1f} pictures/s, "
            f"{work * row['drawn']:.3g} TFLOP/s")


def text_speed(figures: Figures, args) -> str:
    shape = ["--width", "64", "--layers", "1", "--captions", "16", "--rounds", "1"] if args.shrink else [
        "--width", "2048", "--layers", "24", "--captions", "4096", "--batch", "256", "--dtype", "bf16"]
    printed = figures.run(["tests/bench_text_encoder.py", "--device", args.device, *shape])
    rate = found(r"^ours +(\S+) captions/s", printed)[1]
    times = re.findall(r"^ours / (.*): speed (\S+),", printed, re.MULTILINE)
    if len(times) != 2:
        raise Missing(printed[-200:])
    return f"{rate} captions/s; " + "; ".join(f"{factor} times {name}" for name, factor in times)


def training(figures: Figures, args) -> str:
    """Minutes of small, ended by SIGTERM, which saves; what its log says last."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = 60 * args.train_minutes
        command = [sys.executable, "train.py", "--size", "16" if args.shrink else "64", "--model", "small",
                   "--data", args.train, "--device", args.device, "--out", folder, "--log-every",
                   "1" if args.shrink else "50", "--steps", "3" if args.shrink else "1000000", *args.smaller]
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=120)
        log = Path(folder, "metrics.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        lines = [line for line in lines if "loss" in line]
        if process.returncode or not lines:
            raise Missing(printed.strip().splitlines()[-1] if printed.strip() else "nothing was logged")
        last = lines[-1]
        return f"{last['step']} steps, {last['pictures/s']} pictures/s, raw loss {last['raw_loss']}"


def main(argv: list[str]) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --shrink")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 64, 16, 4], help="[images]")
    parser.add_argument("--step-batch", type=int, default=32, help="of the steps beside others [images]")
    parser.add_argument("--work", type=float, default=60, help="most of a step of --dry-run [TFLOP]")
    parser.add_argument("--minutes", type=float, default=9, help="for all but --train [minutes]")
    parser.add_argument("--train", metavar="FOLDER", default="", help="train small on these pictures, too")
    parser.add_argument("--train-minutes", type=float, default=10)
    parser.add_argument("--shrink", action="store_true", help="all of it small")
    parser.add_argument("--of", choices=["limn", *THEIRS], help="only the steps of this side")
    parser.add_argument("--preset", default="small", help="of --of")
    args = parser.parse_args(argv)
    args.smaller = SHRINK if args.shrink else []
    if args.of:
        speed_of(args, args.preset)
        return 0

    import torch

    import train
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: no GPU is here; --device cpu --shrink shows that it runs", file=sys.stderr)
        return 1
    figures = Figures(60 * args.minutes)
    figures.add("tests marked gpu", marked_tests, args)
    for name in ("small", "base"):
        for side in ("limn", *THEIRS):
            how = "compiled" if args.device == "cuda" else "not compiled"
            figures.add(f"a step like `{name}`, {how}: {side}", steps_of, args, name, side)
    figures.add("captions by T5-XL's encoder", text_speed, args)
    for size, name in [(64, "small")] if args.shrink else train.PRESETS:
        figures.add(f"`--size {size} --model {name}`", dry_run, args, size, name)
    if args.train:
        figures.add(f"`small` for {args.train_minutes:g} minutes on {args.train}", training, args)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    shrunk = ", shrunk: these figures say nothing" if args.shrink else ""
    print(figures.table(f"{name}, torch {torch.__version__}{shrunk}"))
    if figures.missing:
        print(f"gpu.py: {figures.missing} figures are missing", file=sys.stderr)
    return 1 if figures.missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
