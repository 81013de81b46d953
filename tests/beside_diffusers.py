"""diffusers' U-Net by its own recipe, on the pictures and captions of a run of ours, to be scored beside it:

    OMP_NUM_THREADS=1 python tests/beside_diffusers.py --like runs/clipart --minutes 60 --npz theirs.npz
    python sample.py --ckpt runs/clipart --prompts runs/clipart --limit 500 --dtype bf16 --npz ours.npz
    python sample.py --score theirs.npz --against runs/clipart --features inception.pt

Trained on what the run trains on, and as long as is asked for: a UNet2DConditionModel on pixels with our byte
encoder, DDPM of 1,000 steps, AdamW, a rate that falls as a cosine, the average that its examples keep. All
that makes our own step fast on a processor is given to it as well. Then it draws the captions that the run
has held out, by DPM-Solver++ and guidance, guesses clipped as ours are. Each hundred steps a line.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import sample
import text_encoder


def networks(args, size: int) -> nn.ModuleDict:
    levels = len(args.widths)
    attends = [False] * (levels - 2) + [True] * 2
    text = text_encoder.load_text_encoder(text_encoder.TextConfig())
    unet = UNet2DConditionModel(
        sample_size=size, in_channels=3, out_channels=3, block_out_channels=args.widths,
        norm_num_groups=args.widths[0] // 4,                   # with 32 a group would be a single channel
        layers_per_block=args.layers, cross_attention_dim=text.dim, attention_head_dim=8,
        mid_block_type="UNetMidBlock2DCrossAttn",
        down_block_types=["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        up_block_types=["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)])
    return nn.ModuleDict({"unet": unet.to(memory_format=torch.channels_last), "text": text})


def predict(nets: nn.ModuleDict, x: torch.Tensor, t: torch.Tensor, condition: dict) -> torch.Tensor:
    """The first token is always seen, so that no row of the attention is empty."""
    mask = condition["mask"].clone()
    mask[:, 0] = True
    context = condition["context"] * condition["mask"][..., None]
    x = x.contiguous(memory_format=torch.channels_last)
    return nets["unet"](x, t, context, encoder_attention_mask=mask).sample


def train(args, nets: nn.ModuleDict, pictures: data.Pictures) -> EMAModel:
    noise = DDPMScheduler(1000, prediction_type=args.prediction)
    weights = list(nets.parameters())
    optimizer = torch.optim.AdamW(weights, args.lr, weight_decay=1e-2, fused=True)
    average = EMAModel(weights, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4, foreach=True)
    batches = data.loader(pictures, 0, 10**9, args.batch_size)

    start, step, losses = time.process_time(), 0, []
    while (done := (time.process_time() - start) / 60 / args.minutes) < 1:
        batch = next(batches)
        x = torch.as_tensor(batch["picture"]).float() / 127.5 - 1
        kept = torch.rand(len(x)) > 0.1
        captions = [caption if keep else "" for caption, keep in zip(batch["captions"], kept.tolist())]
        t = torch.randint(1000, (len(x),))
        eps = torch.randn_like(x)
        noisy = noise.add_noise(x, eps, t)
        target = eps if args.prediction == "epsilon" else noise.get_velocity(x, eps, t)
        with torch.autocast("cpu", torch.bfloat16, args.dtype == "bf16"):
            condition = nets["text"](**nets["text"].inputs(tokens(nets, captions), "cpu", trim=True))
            loss = F.mse_loss(predict(nets, noisy, t, condition).float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / args.warmup) * (1 + math.cos(math.pi * done)) / 2
        optimizer.step()
        optimizer.zero_grad()
        average.step(weights)

        losses.append(float(loss.detach()))
        if step % 100 == 0:
            minutes = (time.process_time() - start) / 60
            print(f"step {step}  loss {np.mean(losses[-100:]):.5f}  {minutes:.1f} minutes of the processor, "
                  f"{step * args.batch_size / 60 / minutes:.1f} pictures/s", flush=True)
    return average


def tokens(nets: nn.ModuleDict, captions: list[str]) -> dict:
    reader = nets["text"].reader
    return reader.batch([reader.read(caption) for caption in captions])


@torch.no_grad()
def draw(args, nets: nn.ModuleDict, captions: list[str], size: int) -> np.ndarray:
    """uint8 (N, size, size, 3), each from the noise of its own seed."""
    drawn = []
    for first in range(0, len(captions), args.batch_size):
        part = captions[first:first + args.batch_size]
        noises = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
        x = torch.cat([torch.randn(1, 3, size, size, generator=noise) for noise in noises])
        clipped = dict(thresholding=True, sample_max_value=1.0)
        scheduler = DPMSolverMultistepScheduler(1000, prediction_type=args.prediction, **clipped)
        scheduler.set_timesteps(args.sample_steps)
        both = nets["text"].encode([*part, *[""] * len(part)], "cpu")
        for t in scheduler.timesteps:
            with torch.autocast("cpu", torch.bfloat16, args.dtype == "bf16"):
                out = predict(nets, torch.cat([x, x]), t.expand(2 * len(x)), both).float()
            told, untold = out.chunk(2)
            x = scheduler.step(untold + args.guidance * (told - untold), t, x).prev_sample
        drawn.append(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        print(f"{first + len(part)} of {len(captions)} pictures", flush=True)
    return np.concatenate(drawn)


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--like", required=True, help="a run of ours, whose pictures are read")
    parser.add_argument("--minutes", type=float, default=60, help="of the processor [minutes]")
    parser.add_argument("--npz", required=True, help="what it draws")
    parser.add_argument("--limit", type=int, default=500, help="captions that are drawn")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 128], help="channels")
    parser.add_argument("--layers", type=int, default=1, help="residual blocks of a level")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=500, help="steps in which the rate rises")
    parser.add_argument("--prediction", choices=["epsilon", "v_prediction"], default="v_prediction")
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    fastest = "fp32" if text_encoder.imitates_bf16("cpu") else "bf16"
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default=fastest)
    args = parser.parse_args()

    torch.manual_seed(0)
    model.choose_device("cpu")
    torch.backends.cuda.enable_flash_sdp(False)                # as train.launch does
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    config, size = sample.recipe_of(Path(args.like))
    nets = networks(args, size)
    pictures = data.Pictures(config, size, 0)
    flops = count(nets, size)
    print(f"{len(pictures):,} pictures, {sum(p.numel() for p in nets.parameters()) / 1e6:.2f} M weights, "
          f"{flops / 1e9:.2f} GFLOPs a picture forward", flush=True)
    average = train(args, nets, pictures)
    average.copy_to(nets.parameters())

    held = sample.picture_set(args.like)
    captions = [held[i]["caption"] for i in range(len(held))[:args.limit]]
    np.savez(args.npz, arr_0=draw(args, nets, captions, size), captions=captions)
    print(args.npz)


def count(nets: nn.ModuleDict, size: int) -> float:
    """Operations of one picture's forward pass, without the text encoder."""
    from torch.utils.flop_counter import FlopCounterMode
    condition = nets["text"].encode(["a house"], "cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(nets, torch.zeros(1, 3, size, size), torch.zeros(1), condition)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
