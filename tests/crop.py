"""What the stages that enlarge make of an unseen picture: a crop at full size, beside bicubic and the truth.

    python tests/crop.py --ckpt runs/256,runs/1024 --out assets/crop.png

A built-in picture that no run is trained on is made small (64 pixels for these two), enlarged by each stage
in turn, told its caption, and cut: from the left bicubic, the stages, the truth.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import sample


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", default="runs/256,runs/1024", help="stages, a,b")
    p.add_argument("--picture", type=int, default=1, help="number of the unseen picture")
    p.add_argument("--crop", type=int, nargs=3, default=(520, 300, 320), help="left, top and side [pixels]")
    p.add_argument("--out", default="crop.png")
    args = p.parse_args()

    stages = [sample.load_stage(Path(path), torch.device("cpu")) for path in args.ckpt.split(",")]
    scene = data.scene(data.ENDLESS + args.picture)
    caption = data.captions(scene)[-1]
    truth = torch.from_numpy(data.draw(scene, stages[-1].size))[None]

    small = sample.resized(truth, "colour", stages[0].data.lowres)
    enlarged = small
    for stage in stages:
        enlarged = sample.generate(stage, [caption], [0], lowres=enlarged, guidance_scale=1.0, steps=2)

    left, top, side = args.crop
    views = []
    for picture in (sample.resized(small, "colour", stages[-1].size), enlarged, truth):
        views.append(picture[..., top:top + side, left:left + side])
    sample.to_image(data.side_by_side(*views)[0]).save(args.out)
    error = (enlarged.double() - truth).square().mean()
    share = sample.detail(enlarged, small.shape[-1]) / sample.detail(truth, small.shape[-1])
    print(f"{args.out}: {caption}; PSNR {10 * torch.log10(255**2 / error):.2f} dB, detail {share:.2f}")


if __name__ == "__main__":
    main()
