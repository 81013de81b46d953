"""Captions per second and peak memory of text_encoder.py and of transformers: same weights, one run.

    python tests/bench_text_encoder.py [--width 512 --layers 6 --captions 256 --device cpu --compile]

transformers gets the captions in batches padded to their longest, once as they come and once sorted by
length, as ours sorts them (`encode_captions`): like with like is the second. Each runs in its own process,
`--rounds` times; the best round counts. By the clock, and by the seconds of the processor, which hold on a
machine that is shared with others, too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("ours", "transformers", "transformers, sorted")


def captions(count: int) -> list[str]:
    """Captions whose lengths spread like those of the web: most short, some very long."""
    import random

    rng = random.Random(0)
    words = ["a", "the", "red", "green", "house", "tree", "boat", "with", "of", "near", "two", "old", "sky"]
    return [
        " ".join(rng.choice(words) for _ in range(min(60, max(2, int(rng.lognormvariate(2.3, 0.7))))))
        for _ in range(count)
    ]


def write_folder(folder: Path, args):
    """A T5 v1.1 of the given shape with random weights and byte tokens, as transformers saves it."""
    import transformers

    config = transformers.T5Config(
        vocab_size=384,
        d_model=args.width,
        d_kv=64,
        num_heads=args.width // 64,
        d_ff=args.width * 5 // 2 // 64 * 64,
        num_layers=args.layers,
        num_decoder_layers=1,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    transformers.T5EncoderModel(config).to(
        torch.bfloat16 if args.dtype == "bf16" else torch.float32
    ).save_pretrained(folder)


def measure(args) -> dict:
    """One side, in this process: captions per second (best round), peak memory [MiB], a sum to compare."""
    sys.path.insert(0, str(ROOT))
    import text_encoder as T

    config = T.TextConfig([args.folder], 192, args.dtype)
    many = captions(args.captions)
    if args.side == "ours":
        encoder = T.load_text_encoder(config).to(args.device)
        if args.compile:
            encoder.tower.compile(dynamic=True)

        def encode():
            return {i: pooled for i, _, pooled in T.encode_captions(encoder, many, args.batch * 64)}
    else:
        import transformers

        encoder, _ = T.frozen_encoder(args.folder, config)
        model = (
            transformers.T5EncoderModel.from_pretrained(args.folder, dtype=T.DTYPES[args.dtype])
            .to(args.device)
            .eval()
        )
        if args.compile:
            model.compile(dynamic=True)

        def encode():
            found = {}
            order = list(range(len(many)))
            if args.side == "transformers, sorted":
                order.sort(key=lambda i: len(many[i]), reverse=True)
            for start in range(0, len(many), args.batch):
                rows = order[start : start + args.batch]
                entries = [encoder.reader.read(many[i]) for i in rows]
                batch = encoder.reader.batch(entries)
                width = int(batch["mask"].sum(1).max())
                ids, mask = (
                    torch.from_numpy(batch[name][:, :width]).to(args.device) for name in ("ids", "mask")
                )
                with torch.no_grad():
                    context = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
                pooled = (context * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                found |= dict(zip(rows, pooled.bfloat16().cpu()))
            return found

    seconds, busy = [], []
    for _ in range(args.rounds + 1):  # the first warms up
        start, worked = time.perf_counter(), time.process_time()
        found = encode()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - worked)
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) / 2**10
    return {
        "rate": len(many) / min(seconds[1:]),
        "work": len(many) / min(busy[1:]),
        "peak": peak,
        "sum": sum(found[i].float().abs().sum().item() for i in found),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512, help="d_model, a multiple of 64 [channels]")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="captions of 64 tokens in a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), args)
        found = {}
        for side in SIDES:
            run = subprocess.run(
                [sys.executable, *sys.argv, "--side", side, "--folder", folder],
                capture_output=True,
                text=True,
            )
            if run.returncode:
                sys.exit(run.stderr)
            found[side] = json.loads(run.stdout.splitlines()[-1])
    for side, row in found.items():
        print(
            f"{side:21s} {row['rate']:8.1f} captions/s  {row['work']:8.1f} a processor second  "
            f"peak memory {row['peak']:6.0f} MiB"
        )
    ours = found["ours"]
    for side in SIDES[1:]:
        theirs = found[side]
        print(
            f"ours / {side}: speed {ours['rate'] / theirs['rate']:.2f}, by the processor "
            f"{ours['work'] / theirs['work']:.2f}, peak memory {ours['peak'] / theirs['peak']:.2f}, "
            f"relative difference of the sums {abs(ours['sum'] / theirs['sum'] - 1):.1e}"
        )


if __name__ == "__main__":
    main()
