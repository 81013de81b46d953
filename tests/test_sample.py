"""sample.py, end to end: a tiny run is trained here, then drawn from by the command line."""
import base64
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import data
import diffusion
import model
import sample
import text_encoder
import train

PROGRAM = Path(sample.__file__)
RECIPE = ["--size=16", "--steps=2", "--batch-size=4", "--save-every=1", "--sample-every=0", "--val-every=0",
          "--device=cpu", "--no-compile", "--dtype=fp32", "--channels=32", "--channel-mult", "1", "2",
          "--attn-resolutions=4", "--num-res-blocks=1", "--patch=2", "--head-dim=16", "--prediction=v",
          "--byte-width=32", "--byte-layers=1", "--text-length=32"]


def recipe_without(name: str) -> list[str]:
    return [flag for flag in RECIPE if not flag.startswith(name)]


@contextlib.contextmanager
def training_in(folder: Path):
    """Work in a folder; afterwards in the one before, with the signal handlers that training replaced."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with runs/16, two steps old."""
    folder = tmp_path_factory.mktemp("trained")
    with training_in(folder):
        train.main(RECIPE)
    return folder


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory) -> Path:
    """The run of a CLIP, two steps old."""
    folder = tmp_path_factory.mktemp("clip")
    with training_in(folder):
        train.main([*RECIPE, "--objective=clip"])
    return folder / "runs" / "clip-16"


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> Path:
    """A working directory with that run in it."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the program as `python sample.py ARGUMENTS` does: (exit status, standard output, its errors)."""
    def run(*argv, steps=2):
        extra = [] if "--sample-steps" in argv or not steps else ["--sample-steps", str(steps)]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv), *extra])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()
    return run


@pytest.fixture(scope="module")
def stage(trained) -> sample.Stage:
    """The run's network with weights far enough from the start that the text matters."""
    stage = sample.load_stage(trained / "runs" / "16", torch.device("cpu"))
    torch.manual_seed(0)
    for p in stage.unet.parameters():
        p += 0.05 * torch.randn_like(p)
    return stage


def said_by(stage, prompts):
    """The condition of prompts."""
    return stage.text.encode(prompts, stage.device)


def draw(stage, prompts, seeds=None, **options) -> torch.Tensor:
    return sample.generate(stage, prompts, seeds or [0] * len(prompts), **{"steps": 3} | options)


def notes_of(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.info["limn"])


def checkpoint_of(folder: Path) -> Path:
    return model.checkpoint_folders(folder / "runs" / "16")[-1] / "ema.safetensors"


def earlier_of(folder: Path) -> Path:
    return model.checkpoint_folders(folder / "runs" / "16")[0]


def rewrite(path: Path, change) -> None:
    """Save a checkpoint again, whole, after change(tensors, config)."""
    tensors, meta = model.load_tensors(path)
    config = json.loads(meta["config"])
    change(tensors, config)
    del meta["sha256"]
    model.save_tensors(path, tensors, meta | {"config": json.dumps(config)})


# ------------------------------------------------------------------------------------------------ end to end


def test_a_prompt_becomes_a_picture_of_the_newest_run(here, cli):
    status, out, err = cli("a house")
    assert (status, out, err) == (0, "a-house.png\n", "")
    with Image.open(here / "a-house.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (16, 16))
        assert 5 < np.asarray(image).std() < 120
    assert sorted(p.name for p in here.iterdir()) == ["a-house.png", "runs", "temporary"]
    stage = sample.load_stage(here / "runs" / "16", torch.device("cpu"))
    drawn = draw(stage, ["a house"], steps=2)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(here / "a-house.png")), drawn)


def test_two_steps_of_training_leave_what_a_reader_expects(here):
    run = here / "runs" / "16"
    assert [p.name for p in model.checkpoint_folders(run)] == ["000001", "000002"]
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["step"], line["images"]) == (2, 8)
    assert 0.05 < line["raw_loss"] < 0.4                     # less than the variance of the pictures
    config = json.loads((run / "config.json").read_text())
    assert config["TrainConfig"]["size"] == 16
    assert Image.open(run / "first_batch.png").size[0] > 16


def test_what_is_named_by_a_prompt_is_never_overwritten(here, cli):
    first = [cli("a house", "--seed", 5)[1] for _ in range(3)]
    assert first == ["a-house.png\n", "a-house-2.png\n", "a-house-3.png\n"]
    before = (here / "a-house.png").read_bytes()
    assert cli("A house!", "--seed", 6)[1] == "a-house-4.png\n"
    assert (here / "a-house.png").read_bytes() == before
    assert (here / "a-house-2.png").read_bytes() == before   # same prompt, same seed, same bytes


def test_a_name_that_was_given_is_replaced(here, cli):
    assert cli("a house", "--seed", 5, "--out", "one.png")[1] == "one.png\n"
    before = (here / "one.png").read_bytes()
    assert cli("a house", "--seed", 6, "--out", "one.png")[1] == "one.png\n"
    assert (here / "one.png").read_bytes() != before
    assert cli("a house", "--n", 2, "--grid", "--out", "sheet.png")[1] == "sheet.png\n"
    assert cli("a house", "--n", 2, "--grid", "--out", "sheet.png")[1] == "sheet.png\n"
    assert not list(here.glob("*-2.png"))


def test_metadata_tells_how_the_picture_was_made_and_no_local_path(here, cli):
    prompt = "a house \U0001f3e0 \"quoted\""
    cli(prompt, "--seed", 7, "--guidance", 2.5, "--negative", "a car", "--sampler", "ddim", "--ckpt",
        here / "runs" / "16")
    digest = model.load_tensors(checkpoint_of(here))[1]["sha256"]
    assert notes_of(here / "a-house-quoted.png") == {
        **dataclasses.asdict(sample.Settings()), "guidance_interval": [0, 1],
        "prompt": prompt, "seed": 7, "guidance_scale": 2.5, "negative": "a car", "sampler": "ddim",
        "steps": 2, "ema": 0.0, "dtype": "fp32", "checkpoint": digest, "step": 2}
    content = (here / "a-house-quoted.png").read_bytes()
    assert str(here).encode() not in content
    assert b"runs" not in content


def test_n_pictures_have_the_next_seeds(here, cli):
    out = cli("a house", "--n", 3, "--seed", 4, "--batch-size", 2)[1].split()
    assert out == ["a-house.png", "a-house-2.png", "a-house-3.png"]
    assert [notes_of(Path(p))["seed"] for p in out] == [4, 5, 6]
    cli("a house", "--seed", 5, "--out", "one")
    a, b = (np.asarray(Image.open(p)).astype(int) for p in ("a-house-2.png", "one/a-house.png"))
    assert abs(a - b).max() <= 1


def test_a_file_of_prompts_gives_a_picture_a_line(here, cli):
    Path("list.txt").write_bytes("a house\n\n  a red car  \nein grünes Haus\n\xff\n".encode("latin-1"))
    _, out, err = cli("--prompts", "list.txt", "--out", "drawn/deep")
    out = out.split()
    assert err == "sample.py: warning: --prompts list.txt is not UTF-8; read as cp1252\n"
    assert out == [f"drawn/deep/{n}.png" for n in ("a-house", "a-red-car", "ein-gr-nes-haus", "picture")]
    assert notes_of(Path(out[1]))["prompt"] == "a red car"


def test_grid_is_one_sheet(here, cli):
    Path("list.txt").write_text("a house\na car\na tree")
    assert cli("--prompts", "list.txt", "--grid")[1] == "grid.png\n"
    assert cli("--prompts", "list.txt", "--grid", "--n", 2, "--out", "sheet.png")[1] == "sheet.png\n"
    assert [one["prompt"] for one in notes_of(Path("grid.png"))["pictures"]] == ["a house", "a car", "a tree"]
    assert [one["seed"] for one in notes_of(Path("sheet.png"))["pictures"]] == [0, 1] * 3
    assert Image.open("sheet.png").size[1] > Image.open("grid.png").size[1] > 16
    assert sorted(p.name for p in here.glob("*.png")) == ["grid.png", "sheet.png"]


def test_the_newest_run_is_the_one_whose_checkpoint_was_written_last(here):
    shutil.copytree("runs/16", "runs/other")
    (Path("runs") / "empty" / "checkpoints").mkdir(parents=True)
    for age, run in ((100, "16"), (50, "other")):
        newest = model.checkpoint_folders(Path("runs") / run)[-1]
        os.utime(newest, (newest.stat().st_mtime - age,) * 2)
    assert sample.cascade(Path("runs"), False, 0) == [Path("runs/other")]


def test_a_checkpoint_is_found_by_run_folder_or_file(here):
    file = checkpoint_of(here)
    (here / "alone").mkdir()
    shutil.copy(file, here / "alone")                        # nothing else of the run is needed
    shutil.copy(file, here / "renamed.safetensors")
    paths = [here / "runs" / "16", file.parent, file, here / "alone", here / "renamed.safetensors"]
    stages = [sample.load_stage(path, torch.device("cpu")) for path in paths]
    shutil.rmtree(here / "runs")
    assert {(s.digest, s.step, s.size) for s in stages} == {(stages[0].digest, 2, 16)}
    assert len({draw(s, ["a house"]).numpy().tobytes() for s in stages}) == 1


def test_the_stage_has_the_averaged_weights_of_training(here):
    stage = sample.load_stage(here / "runs" / "16", torch.device("cpu"))
    averaged, _ = model.load_tensors(checkpoint_of(here))
    for prefix, part in (("unet", stage.unet), ("text_encoder", stage.text)):
        for name, value in part.state_dict().items():
            assert torch.equal(averaged[f"{prefix}.{name}"], value)
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())
    assert stage.schedule.shift == diffusion.make_schedule(stage.config, 16).shift


# --------------------------------------------------------------------------------------------- what is drawn


def test_a_picture_does_not_depend_on_its_batch(stage):
    prompts = ["a red house", "", "a green tree left of a blue car", "a star", "a fish"]
    seeds = [3, 1, 4, 1, 5]
    together = draw(stage, prompts, seeds).int()
    for batch_size in (1, 2, 3):
        assert (draw(stage, prompts, seeds, batch_size=batch_size).int() - together).abs().max() <= 1
    backwards = draw(stage, prompts[::-1], seeds[::-1]).flip(0).int()
    assert (backwards - together).abs().max() <= 1
    assert together.float().std() > 20


def test_seed_prompt_guidance_and_negative_prompt_change_the_picture(stage):
    base = draw(stage, ["a red house"])
    assert torch.equal(base, draw(stage, ["a red house"], negative=""))
    others = [draw(stage, ["a red house"], [1]), draw(stage, ["a blue car"]), draw(stage, [""]),
              draw(stage, ["a red house"], guidance_scale=1), draw(stage, ["a red house"], guidance_scale=6),
              draw(stage, ["a red house"], negative="a blue car"), draw(stage, ["a red house"], steps=4)]
    pictures = [p.numpy().tobytes() for p in (base, *others)]
    assert len(set(pictures)) == len(pictures)


def test_guidance_one_calls_the_network_once_a_step_on_the_prompts_alone(stage, monkeypatch):
    rows, forward = [], stage.unet.forward

    def counted(x_t, *args, **condition):
        rows.append(len(x_t))
        return forward(x_t, *args, **condition)

    monkeypatch.setattr(stage.unet, "forward", counted)
    draw(stage, ["a", "b", "c"], guidance_scale=1.0, steps=4)
    assert rows == [3] * 4
    rows.clear()
    draw(stage, ["a", "b", "c"], guidance_scale=2.0, steps=4)
    assert rows == [6] * 4


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_every_sampler_draws(stage, sampler):
    both, again = (draw(stage, ["a red house", ""], sampler=sampler, steps=5) for _ in range(2))
    alone = draw(stage, ["a red house"], sampler=sampler, steps=5)
    assert (both.shape, both.dtype) == ((2, 3, 16, 16), torch.uint8)
    assert torch.equal(both, again)
    assert (both[:1].int() - alone.int()).abs().max() <= 1


@pytest.fixture
def pictures(tmp_path) -> dict[str, str]:
    """A grey picture to start from, and a mask whose left half stays."""
    Image.new("RGB", (40, 40), (200, 90, 30)).save(tmp_path / "init.png")
    mask = Image.new("L", (40, 40), 255)
    mask.paste(0, (0, 0, 20, 40))
    mask.save(tmp_path / "mask.png")
    return {name: str(tmp_path / f"{name}.png") for name in ("init", "mask")}


def test_every_setting_changes_the_picture(stage, trained, pictures, clip_run):
    earlier, clip = str(earlier_of(trained)), str(clip_run)
    changes = [{"guidance_interval": (0.5, 0.8)}, {"guidance_rescale": 0.7}, {"apg": 2.0},
               {"autoguide": earlier}, {"negative": "a car"}, {"threshold": "none"}, {"threshold": "0.8"},
               {"sampler": "heun"}, {"sampler": "heun", "churn": 4.0}, {"grid_times": "karras"},
               {"shift": 2.0},
               {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}, {"steps": 6},
               {"respacing": "2,2,4"}, {"init": pictures["init"], "strength": 0.5}, pictures,
               pictures | {"resample": 2}, {"apg": 2.0, "guidance_rescale": 0.7}, {"clip": clip},
               {"clip": clip, "clip_scale": 4.0}]
    drawn = [draw(stage, ["a red house"], **{"guidance_scale": 9.0, "steps": 12} | change).numpy().tobytes()
             for change in [{}, *changes]]
    assert len(set(drawn)) == len(drawn)
    assert {name for change in changes for name in change} == {
        field.name for field in dataclasses.fields(sample.Settings)} - {
            "guidance_scale", "aug", "trajectory", "write", "write_guidance"}


def test_settings_are_those_of_the_functions_of_diffusion(stage, trained, pictures):
    """Each against its composition by hand; the rest is tested there."""
    earlier = sample.load_stage(earlier_of(trained), torch.device("cpu"))
    key = torch.tensor([int(sample.data.keyed(0, "sample", 0).integers(2**63))])
    x, noise = diffusion.gaussian(key, (3, 16, 16)), diffusion.noise_source(key, (3, 16, 16))
    cond, empty = said_by(stage, ["a star"]), said_by(stage, [""])
    net = stage.unet, stage.schedule, stage.config
    plain = diffusion.denoiser(*net, cond)
    weak = diffusion.denoiser(earlier.unet, *net[1:], said_by(earlier, ["a star"]))
    narrow = {"interval": (0.2, 0.6), "combine": diffusion.rescaled(0.5, diffusion.projected(3.0))}
    strong = diffusion.guided(*net, cond, 3.0, empty, **narrow)
    whole = diffusion.sampling_times(stage.schedule, 3)
    times = diffusion.sampling_times(stage.schedule, 3, start=0.4)
    known = torch.tensor([200, 90, 30]).view(1, 3, 1, 1).expand(1, 3, 16, 16) / 127.5 - 1
    start = diffusion.noised(known, x, torch.tensor([0.4]), stage.schedule)
    keep = (torch.arange(16) < 8).expand(1, 1, 16, 16)
    cases = [
        ({"guidance_interval": (0.2, 0.6), "guidance_rescale": 0.5, "apg": 3.0, "threshold": "0.9"},
         lambda: diffusion.dpmpp_2m(diffusion.threshold(strong, 0.9), x, whole, noise, stage.schedule)),
        ({"autoguide": str(earlier_of(trained)), "threshold": "none", "sampler": "ddim", "eta": 0.3},
         lambda: diffusion.ddim(diffusion.guidance(plain, lambda *a: (plain(*a), weak(*a)), 3.0), x, whole,
                                noise, stage.schedule, eta=0.3)),
        ({**pictures, "strength": 0.4, "resample": 2, "guidance_scale": 1.0},
         lambda: diffusion.inpaint(diffusion.dpmpp_2m, diffusion.threshold(plain), start, times, noise,
                                   stage.schedule, known, keep, 2))]
    for settings, by_hand in cases:
        with torch.no_grad():
            expected = ((by_hand().clamp(-1, 1) + 1) * 127.5).round()
        assert (draw(stage, ["a star"], **settings).int() - expected).abs().max() <= 1, settings


def similarity_of(clip: sample.Stage, prompt: str):
    """The logit of noisy pictures and a prompt, by a CLIP run."""
    said = clip.unet.read(**said_by(clip, [prompt]))
    return lambda x_t, t: clip.unet.scale() * torch.cosine_similarity(clip.unet(x_t, t), said)


@pytest.mark.parametrize("sampler", list(diffusion.SAMPLERS))
def test_the_gradient_of_a_clip_guides_every_sampler(stage, clip_run, sampler):
    """Around guidance without a classifier, in the threshold; and what it draws is nearer to the prompt."""
    clip = sample.load_stage(clip_run, torch.device("cpu"), clip=True)
    settings = {"sampler": sampler, "steps": 4, "clip": str(clip_run), "clip_scale": 2.0}
    similarity = similarity_of(clip, "a star")
    cond, empty = said_by(stage, ["a star"]), said_by(stage, [""])
    key = torch.tensor([int(sample.data.keyed(0, "sample", 0).integers(2**63))])
    x, noise = diffusion.gaussian(key, (3, 16, 16)), diffusion.noise_source(key, (3, 16, 16))
    denoise = diffusion.guided(stage.unet, stage.schedule, stage.config, cond, 3.0, empty)
    pushed = diffusion.classifier_guidance(denoise, similarity, stage.schedule, 2.0)
    times = diffusion.sampling_times(stage.schedule, 4)
    with torch.no_grad():
        drawn = diffusion.SAMPLERS[sampler](diffusion.threshold(pushed), x, times, noise, stage.schedule)
    expected = ((drawn.clamp(-1, 1) + 1) * 127.5).round()
    guided = draw(stage, ["a star"], **settings)              # --guidance 3 is the usual one
    assert (guided.int() - expected).abs().max() <= 1

    plain = draw(stage, ["a star"], **settings | {"clip": ""})
    assert torch.equal(draw(stage, ["a star"], **settings | {"clip_scale": 0.0}), plain)
    views = [stage.space.encode(picture) for picture in (guided, plain)]
    with torch.no_grad():
        near, far = (similarity(view, torch.zeros(1)).item() for view in views)
    assert near > far


def test_a_clip_guides_in_the_interval_of_guidance_alone(stage, clip_run):
    plain = {"guidance_scale": 1.0, "guidance_interval": (0.4, 0.6), "steps": 4}
    looks, found = [], []
    for clip in ("", str(clip_run)):
        found.append(draw(stage, ["a star"], **plain, clip=clip, clip_scale=5.0))
    assert not torch.equal(*found)
    real = model.CLIP.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.CLIP, "forward", lambda self, x, t: looks.append(t) or real(self, x, t))
        draw(stage, ["a star"], **plain, clip=str(clip_run))
    times = diffusion.sampling_times(stage.schedule, 4)[:-1]
    assert len(looks) == ((times >= 0.4) & (times <= 0.6)).sum() > 0


def test_a_mask_keeps_what_is_black_and_strength_the_rest_of_the_picture(stage, pictures):
    masked = draw(stage, ["a red house"], **pictures)[0]
    grey = torch.tensor([200, 90, 30]).view(3, 1, 1).expand(3, 16, 16)
    assert torch.equal(masked[..., :8].int(), grey[..., :8].int())
    assert (masked[..., 8:] != grey[..., 8:]).float().mean() > 0.9
    near, far = (draw(stage, ["a red house"], init=pictures["init"], strength=strength)[0].int() - grey
                 for strength in (0.05, 0.9))
    assert near.abs().float().mean() < far.abs().float().mean() / 2


@pytest.mark.parametrize("guidance_scale", [1.0, 8.0])
def test_a_learned_variance_is_that_of_the_prompt(trained, guidance_scale, monkeypatch, tmp_path):
    """Of the prompts' rows, whatever is added to them for guidance, in batches of any size."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.main([*recipe_without("--steps"), "--learn-sigma", "--schedule=linear", "--steps=1"])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    stage, seen = sample.load_stage(Path("runs/16"), torch.device("cpu")), []
    real = diffusion.ddim

    def forward(x_t, t, context, mask, pooled):
        fraction = mask.float().mean(1).view(-1, 1, 1, 1).expand_as(x_t)      # tells the rows apart
        return torch.cat([0 * x_t, 2 * fraction - 1], 1)

    def ddpm(*args, variance, eta=1.0):
        return real(*args, eta, variance=lambda: seen.append(variance()) or seen[-1])

    monkeypatch.setattr(stage.unet, "forward", forward)
    monkeypatch.setitem(diffusion.SAMPLERS, "ddpm", ddpm)
    prompts = ["a", "a red house", "a cat"]
    draw(stage, prompts, sampler="ddpm", guidance_scale=guidance_scale, batch_size=2)
    expected = said_by(stage, prompts)["mask"].float().mean(1)
    assert [len(fraction) for fraction in seen] == [2, 2, 1, 1]
    torch.testing.assert_close(torch.cat([seen[0], seen[2]])[:, 0, 0, 0], expected)
    assert len(draw(stage, prompts, sampler="dpmpp_2m")) == 3


def test_a_guide_of_another_size_or_schedule_is_refused(stage, trained, clip_run):
    other = dataclasses.replace(stage, schedule=diffusion.make_schedule(stage.config, 32))
    for wrong in (other, dataclasses.replace(stage, size=32)):
        with pytest.raises(ValueError, match="same size and schedule"):
            draw(wrong, ["a house"], autoguide=str(earlier_of(trained)))
        with pytest.raises(ValueError, match=r"--clip needs a checkpoint of the same size and schedule"):
            draw(wrong, ["a house"], clip=str(clip_run))


def test_settings_are_noted_without_local_paths(here, cli, pictures):
    status, _, err = cli("a", "--init", pictures["init"], "--mask", pictures["mask"], "--strength", 0.5,
                         "--autoguide", here / "runs" / "16", "--guidance-interval", 0.1, 0.9, "--apg", 5,
                         "--guidance-rescale", 0.5, "--threshold", 0.99, "--sampler", "ddpm", "--eta", 0.9,
                         "--respacing", "4", "--resample", 2)
    assert (status, err) == (0, "")
    notes = notes_of(here / "a.png")
    assert {name: notes[name] for name in ("init", "mask", "autoguide", "guidance_interval", "threshold",
                                           "eta", "respacing", "strength")} == {
        "init": "init.png", "mask": "mask.png", "autoguide": "16", "guidance_interval": [0.1, 0.9],
        "threshold": "0.99", "eta": 0.9, "respacing": "4", "strength": 0.5}
    assert str(here).encode() not in (here / "a.png").read_bytes()


def test_another_average_is_drawn_from(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.main([*recipe_without("--steps"), "--profiles=2", "--steps=8", "--lr=0.01", "--warmup=0", "--cooldown=0"])  # noqa: E501
    for number, handler in handlers.items():
        signal.signal(number, handler)
    cpu = torch.device("cpu")
    own, wide, narrow = (sample.load_stage(Path("runs/16"), cpu, ema) for ema in (0, 0.1, 0.05))
    stored, _ = model.load_tensors(Path("runs/16/profiles/000008.safetensors"))
    for width, stage in ((0.1, wide), (0.05, narrow)):
        for name, part in (("unet", stage.unet), ("text_encoder", stage.text)):
            for key, value in part.named_parameters():
                torch.testing.assert_close(value, stored[f"profile.{width}.{name}.{key}"], atol=1e-5, rtol=0)
    assert not torch.equal(own.unet.null, wide.unet.null)
    assert not torch.allclose(narrow.unet.null, wide.unet.null, atol=1e-4)
    file = Path("runs/16/checkpoints/000008/ema.safetensors")
    assert cli("a", "--ckpt", file, "--ema", 0.1)[0] == 0
    assert notes_of(Path("a.png"))["ema"] == 0.1
    shutil.rmtree("runs/16/profiles")
    status, _, err = cli("a", "--ema", 0.1)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "has no snapshot of step 8. Train with --profiles 8" in err


def test_bfloat16_draws_nearly_the_same(stage):
    low = draw(stage, ["a red house"], dtype=torch.bfloat16).float()
    full = draw(stage, ["a red house"], dtype=torch.float32).float()
    assert (low - full).square().mean().sqrt() < 8


def test_an_empty_prompt_is_drawn_without_one(here, cli, stage):
    status, out, err = cli("  ")
    assert (status, err) == (0, "")
    assert out.splitlines() == ["note: empty prompt, drawing without one", "picture.png"]
    unconditional = draw(stage, [""], guidance_scale=1)
    assert torch.equal(draw(stage, [""], guidance_scale=5), unconditional)


def test_a_long_prompt_and_a_high_guidance_are_warned_of(here, cli):
    status, _, err = cli("a house " * 20, "--guidance", 50)
    assert status == 0
    assert err.splitlines() == ["sample.py: warning: --guidance 50.0 is very high; 2 to 8 is usual",
                                "sample.py: warning: 0 of 159 tokens unknown, 1 prompts cut to 32"]


def test_what_the_text_encoder_cannot_read_is_warned_of(here, cli, monkeypatch):
    monkeypatch.setattr(text_encoder.ByteTokenizer, "unknown", 3 + ord("h"))
    status, _, err = cli("a house", "--n", 2)
    assert (status, err) == (0, "sample.py: warning: 1 of 7 tokens unknown, 0 prompts cut to 32\n")


@pytest.mark.parametrize("grid", [[], ["--grid"]])
def test_a_constant_picture_is_warned_of_and_kept(here, capsys, monkeypatch, grid):
    monkeypatch.setattr(sample, "generate", lambda *a, **b: torch.full((1, 3, 16, 16), 9, dtype=torch.uint8))
    sample.main(["a house", *grid])
    out, err = capsys.readouterr()
    assert "sample.py: warning: picture 1 is constant" in err
    assert Path(out.strip()).exists()


# ----------------------------------------------------------------------------------------------- the cascade


@pytest.fixture(scope="module")
def ladder(trained, tmp_path_factory) -> Path:
    """runs/16, runs/32 and runs/64, each enlarging the one before."""
    folder = tmp_path_factory.mktemp("ladder")
    shutil.copytree(trained / "runs", folder / "runs")
    moved = ("--size", "--attn", "--channel-mult", "1", "2")
    recipe = [flag for flag in RECIPE if not flag.startswith(moved)]
    up = ["--crop=16", "--conv-only", "--efficient", "--channel-mult", "1"]
    with training_in(folder):
        train.main([*recipe, *up, "--size=32", "--lowres=16"])
        train.main([*recipe, *up, "--size=64", "--lowres=32", "--lowres-mode=grey"])
    return folder


@pytest.fixture
def up(ladder, tmp_path, monkeypatch) -> Path:
    shutil.copytree(ladder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_newest_run_of_each_size_is_joined(up, cli):
    status, out, err = cli("a house", "--keep-stages", "--guidance", "5,2", "--seed", "7,8")
    assert (status, err) == (0, "")
    names = out.split()
    assert [Image.open(name).size[0] for name in names] == [16, 32, 64]
    notes = notes_of(Path(names[-1]))
    assert (notes["guidance_scale"], notes["seed"], notes["steps"]) == (1.0, 8, 2)
    assert (notes["below"]["guidance_scale"], notes["below"]["below"]["guidance_scale"]) == (2.0, 5.0)
    assert (notes["below"]["seed"], notes["below"]["below"]["seed"]) == (8, 7)
    again = cli("a house", "--ckpt", "runs/16,runs/32,runs/64", "--guidance", "5,2",
                "--seed", "7,8")[1].split()
    assert np.array_equal(np.asarray(Image.open(again[0])), np.asarray(Image.open(names[-1])))


def test_a_mask_over_a_picture_that_a_telephone_turned_is_as_large_as_it_is_shown(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.jpg", exif=turned)
    mask = Image.new("L", (30, 40))
    mask.paste(255, (0, 0, 30, 20))
    mask.save(tmp_path / "mask.png")
    keep = sample.read_mask(str(tmp_path / "mask.png"), str(tmp_path / "photo.jpg"), 10)
    assert keep[:5].eq(0).all()
    assert keep[5:].eq(1).all()
    mask.resize((40, 30)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="--init is 30x40 pixels, --mask 40x30"):
        sample.read_mask(str(tmp_path / "mask.png"), str(tmp_path / "photo.jpg"), 10)


def test_a_trajectory_goes_through_a_cascade_and_stages_do_not_overwrite_one_another(up, cli):
    plain = cli("a house", "--stop-at", 32, "--keep-stages", "--out", "x.png")[1].split()
    assert [Image.open(name).size for name in plain] == [(16, 16), (32, 32)]
    status, out, err = cli("a house", "--stop-at", 32, "--keep-stages", "--trajectory", 1, "--out", "rows")
    assert status == 0, err
    for name, row in zip(plain, out.split()):                  # two steps and the picture
        side = Image.open(name).height
        assert np.array_equal(np.asarray(Image.open(row))[:, 2 * side:], np.asarray(Image.open(name)))


def test_a_cascade_stops_where_it_is_told_and_starts_from_a_picture(up, cli):
    assert Image.open(cli("a house", "--stop-at", 32)[1].strip()).size == (32, 32)
    assert Image.open(cli("a house", "--stop-at", 16)[1].strip()).size == (16, 16)
    Image.new("RGB", (40, 40), (200, 90, 30)).save("given.png")
    drawn = [cli("a house", "--lowres", "given.png", "--aug", aug, "--out", f"{aug}.png")[1].strip()
             for aug in (0, 0.1)]
    assert [Image.open(name).size for name in drawn] == [(64, 64)] * 2
    assert Path(drawn[0]).read_bytes() != Path(drawn[1]).read_bytes()
    notes = notes_of(Path(drawn[0]))
    assert (notes["guidance_scale"], notes["below"]["guidance_scale"]) == (1.0, 1.0)
    assert notes["below"]["below"] == {"lowres": "given.png"}
    own = cli("a house", "--lowres", "given.png", "--guidance", 5, "--sample-steps", "3,2", "--keep-stages")
    assert [(notes_of(Path(name))["guidance_scale"], notes_of(Path(name))["steps"])
            for name in own[1].split()] == [(5.0, 3), (1.0, 2)]


def test_a_stage_is_compared_with_held_out_pictures_over_levels_of_aug(up, cli):
    drawn = cli("a house", "--stop-at", 32, "--n", 2)[1].split()
    status, out, err = cli("a house", "--stop-at", 32, "--n", 2, "--validate", 3)
    *rows, best, one, other = out.splitlines()                # and the pictures are those without it
    assert (status, err) == (0, "")
    assert [Path(name).read_bytes() for name in (one, other)] == [Path(name).read_bytes() for name in drawn]
    found = {row.split("  ")[0]: [float(n) for n in re.findall(r"[\d.]+(?= dB|/255)", row)] for row in rows}
    levels = ("0.0", "0.05", "0.1", "0.2", "0.4")
    assert list(found) == ["bicubic", *(f"--aug {aug}{kind}" for aug in levels for kind in ("", ", below"))]
    best_of = max((row for row in found if "below" not in row), key=lambda row: found[row][0])
    assert best == f"best of 3 pictures: {best_of}"

    stage = sample.load_stage(Path("runs/32"), torch.device("cpu"))
    held = data.collect(data.Pictures(data.DataConfig(lowres=16), 32, 0, "val"), 0, 3)
    drawn = sample.generate(stage, held["captions"], [0, 1, 2], lowres=torch.from_numpy(held["lowres"]),
                            steps=2, guidance_scale=1.0, aug=0.1)
    wide = [Image.fromarray(small.transpose(1, 2, 0)).resize((32, 32), Image.Resampling.BICUBIC)
            for small in held["lowres"]]
    for name, pictures in (("--aug 0.1", drawn), ("bicubic", [data.array(image) for image in wide])):
        error = np.stack(pictures).astype(float) - held["picture"]
        psnr = np.mean([10 * np.log10(255**2 / (one**2).mean()) for one in error])
        assert found[name] == pytest.approx([psnr, abs(error.mean((2, 3))).mean()], abs=0.006)


def test_a_stage_is_gone_before_the_next_one_is_made(up, cli, monkeypatch):
    made, alive, build = [], [], model.UNet.__init__

    def init(self, *args, **options):
        alive.append(sum(unet() is not None for unet in made))
        made.append(weakref.ref(self))
        build(self, *args, **options)

    monkeypatch.setattr(model.UNet, "__init__", init)
    assert cli("a house", "--validate", 1)[0] == 0
    assert alive == [0, 0, 0]


def test_each_stage_says_what_it_cannot_read(up, cli):
    status, _, err = cli("a house " * 9, "--stop-at", 32)
    assert (status, err) == (0, "sample.py: warning: 0 of 71 tokens unknown, 1 prompts cut to 32\n" * 2)


def test_a_clip_guides_the_first_stage_of_a_cascade_unless_another_is_named(up, cli, clip_run):
    shutil.copytree(clip_run, up / "runs" / "clip-16")
    assert cli("a", "--stop-at", 32, "--out", "plain.png")[0] == 0
    assert cli("a", "--stop-at", 32, "--out", "guided.png", "--clip", "runs/clip-16")[0] == 0
    notes = notes_of(up / "guided.png")
    assert (notes["clip"], notes["below"]["clip"]) == ("", "clip-16")
    status, _, err = cli("a", "--stop-at", 32, "--clip", "runs/clip-16,runs/clip-16")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "--clip needs a checkpoint of the same size" in err
    assert "has 16 pixels and cosine, the stage 32 and cosine" in err


def test_a_damaged_config_is_named(up, cli):
    (up / "runs/32/config.json").write_text("{")
    status, out, err = cli("a house")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "runs/32/config.json is damaged" in err
    assert cli("a house", "--ckpt", "runs/16")[0] == 0


@pytest.mark.parametrize(("argv", "words"), [
    (["a", "--ckpt", "runs/16", "--autoguide", "runs/32"], "--autoguide needs a checkpoint of the same size"),
    (["a", "--clip", "runs/16"], "draws, and is no CLIP"),
    (["a", "--clip", "runs/16,,runs/16,"], "--clip has 4 values for 3 stage(s)"),
    (["a", "--ckpt", "runs/16/checkpoints/000002/ema.safetensors", "--ema", "0.1"], "has no snapshot of"),
    (["a", "--stop-at", "33"], "--stop-at 33: the stages in runs/ end at 64"),
    (["a", "--ckpt", "runs/32"], "a stage from 16 to 32 pixels was given 0. Name all stages"),
    (["a", "--ckpt", "runs/16,runs/64"], "a stage from 32 to 64 pixels was given 16"),
    (["a", "--guidance", "5,x"], "--guidance 5,x is none of: guidance scale, 1 = none"),
    (["a", "--guidance", "5,2,1,1"], "--guidance has 4 values for 3 stage(s)"),
    (["a", "--seed", "1,2", "--ckpt", "runs/16"], "--seed has 2 values for 1 stage(s)"),
    (["a", "--stop-at", "32", "--sampler", "ddim,ddim,heun"], "--sampler has 3 values for 2 stage(s)"),
    (["a", "--stop-at", "16", "--ckpt", "runs/16,runs/32"], "--ckpt: not allowed with argument --stop-at"),
    (["a", "--guidance", "5,-1"], "--guidance -1.0 is outside"),
    (["a", "--lowres", "nowhere.png"], "--init, --mask or --lowres nowhere.png is no file"),
    (["a", "--stop-at", "16", "--validate", "2"], "--validate checks a stage that enlarges, and runs/16 is"),
    (["a", "--validate", "-1"], "--validate -1 is outside"),
    (["a", "--aug", "2"], "--aug 2.0 is outside")])
def test_bad_input_for_a_cascade_is_one_line(up, cli, argv, words):
    status, out, err = cli(*argv)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert words in err


# ------------------------------------------------------------------------------------ frozen text encoders


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Path:
    """runs/16, trained with a frozen encoder, runs/32 with the same beside bytes, runs/other with another."""
    folder, towers = tmp_path_factory.mktemp("frozen"), {}
    for seed, name in enumerate(("byt5", "wide")):
        towers[name] = {"vocab_size": 384, "d_model": 24 + 8 * seed, "d_kv": 8, "d_ff": 32, "num_layers": 1,
                        "num_heads": 3, "model_type": "t5", "feed_forward_proj": "gated-gelu"}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(towers[name]))
        torch.manual_seed(seed)
        tower = text_encoder.T5Encoder(types.SimpleNamespace(**text_encoder.T5_SHAPE | towers[name]))
        save_file(tower.state_dict(), folder / name / "model.safetensors")
    moved = ("--size", "--attn", "--channel-mult", "1", "2")
    up = [flag for flag in RECIPE if not flag.startswith(moved)]
    up += ["--crop=16", "--conv-only", "--efficient", "--channel-mult", "1", "--size=32", "--lowres=16"]
    with training_in(folder):
        train.main([*RECIPE, "--text-encoder", "wide", "--out", "runs/other"])
        train.main([*RECIPE, "--text-encoder", "byt5"])
        train.main([*up, "--text-encoder", "bytes", "byt5"])
    return folder


@pytest.fixture
def watched(frozen, monkeypatch) -> list[str]:
    """What happens, in order: an encoder's weights are read, a U-Net is made; no encoder is alive by then."""
    monkeypatch.chdir(frozen)
    events, weights, fill, build = [], [], text_encoder.Weights.fill, model.UNet.__init__

    def read(self, tower, dtype):
        filled = fill(self, tower, dtype)
        weights.extend(weakref.ref(p) for p in filled.parameters())
        events.append(self.folder.name)
        return filled

    def made(self, *args, **options):
        assert weights
        assert not any(weight() is not None for weight in weights)
        events.append("unet")
        build(self, *args, **options)

    monkeypatch.setattr(text_encoder.Weights, "fill", read)
    monkeypatch.setattr(model.UNet, "__init__", made)
    return events


def test_a_frozen_text_encoder_is_freed_before_the_unet_is_made(watched, cli, tmp_path):
    """Once for all stages, and before any of them, also that of a guide; beside one that is trained along."""
    status, out, err = cli("a house", "--negative", "a car", "--out", tmp_path)
    assert (status, len(out.splitlines()), err) == (0, 1, "")
    assert watched == ["byt5", "unet", "unet"]
    watched.clear()
    assert cli("a", "--ckpt", "runs/16", "--autoguide", "runs/other", "--out", tmp_path)[0] == 0
    assert watched.index("unet") > watched.index("wide")


def test_what_a_frozen_text_encoder_said_is_what_it_says(frozen, monkeypatch):
    """All but the rounding to bf16; and the same, whatever other prompts there are."""
    monkeypatch.chdir(frozen)
    cpu, prompts = torch.device("cpu"), ["a house", "", "a red car " * 9, "a fish"]
    for run in ("runs/16", "runs/32"):
        live = sample.load_stage(Path(run), cpu)
        kept = sample.load_stage(Path(run), cpu, cached=sample.reader(prompts, cpu))
        alone = sample.load_stage(Path(run), cpu, cached=sample.reader(prompts[:1], cpu))
        with torch.no_grad():
            said, expected, one = (said_by(stage, texts) for stage, texts in (
                (kept, prompts), (live, prompts), (alone, prompts[:1])))
        assert torch.equal(said.pop("mask"), expected["mask"])
        for name, value in said.items():
            assert (value - expected[name]).abs().max() <= 1e-2 * expected[name].abs().max(), name
            assert torch.allclose(value[:1], one[name], atol=1e-6), name
        assert said["context"].abs().max() > 0.1


def test_a_frozen_text_encoder_reads_the_captions_of_held_out_pictures(watched, cli, tmp_path):
    status, out, err = cli("a house", "--validate", 2, "--out", tmp_path)
    assert (status, len(out.splitlines())) == (0, 13)
    assert err == "sample.py: warning: 0 of 52 tokens unknown, 1 prompts cut to 32\n"     # not of "a house"
    assert watched == ["byt5", "unet", "unet"]


def test_what_a_frozen_text_encoder_cannot_read_is_warned_of_once(frozen, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(frozen)
    status, _, err = cli("a house " * 9, "--ckpt", "runs/16", "--n", 2, "--out", tmp_path)
    assert (status, err) == (0, "sample.py: warning: 0 of 71 tokens unknown, 1 prompts cut to 32\n")


# ------------------------------------------------------------------------------------------------- the files


NASTY = [
    "../../x", "-rf", "/etc/passwd", ".hidden", "..", ".", "", " ", "a" * 5000, "a/b\\c", "x\0y", "CON", "~",
    "a\nb\rc\td", "$HOME", "`ls`", "*?[]", "a;b|c&d", "'\"", "\U0001f3e0", "房子", "بيت", "Ünïcödé", "\ud800",
    "\u202egnp.x", "%00%2e", "{a,b}", "--out", "a" * 79 + "/b", "İstanbul", "nul.png", "<svg>"]


@pytest.mark.parametrize("prompt", NASTY, ids=range(len(NASTY)))
def test_a_file_name_is_safe_whatever_the_prompt(prompt):
    name = sample.file_name(prompt)
    assert 1 <= len(name) <= 80
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name.strip("-") == name


@pytest.mark.parametrize("prompt", ["\ud800 house", "房子\u202e", "a\tb\nc", "x" * 3000])
def test_nasty_prompts_are_drawn_and_noted(here, cli, prompt):
    for grid in ([], ["--grid"]):
        status, out, _ = cli(prompt, *grid)
        assert status == 0
        kept = notes_of(Path(out.split()[-1]))
        assert kept.get("pictures", [kept])[0]["prompt"] == prompt


# ---------------------------------------------------------------------------- averages, chosen after training


def response(updates, width):
    """What each update weighs in the power average: the power function between one and the next."""
    return np.diff((np.arange(updates + 1) / updates) ** (sample.exponent(width) + 1))


@pytest.mark.parametrize("width", [0.05, 0.1, 0.15, 0.25])
def test_a_power_average_has_the_standard_deviation_of_its_name(width):
    """Karras et al. 2023, section 3.1: the deviation of the weights over time, as a share of the length."""
    weights, middle = response(20000, width), (np.arange(20000) + 0.5) / 20000
    assert weights.sum() == pytest.approx(1)
    mean = (weights * middle).sum()
    assert np.sqrt((weights * (middle - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)


def drifting(folder, snapshots=8, every=25, updates=200, width=None):
    """A State whose weights wander, saved every so often; and averages by hand of all it went through."""
    torch.manual_seed(3)
    state = train.State(nn.Linear(6, 5), 0.0, 0.0, 0.9, False, snapshots)
    history = []
    for step in range(1, updates + 1):
        for p in state.weights:
            p.grad = torch.randn_like(p) + 0.3 * math.sin(step / 20)
        state.update(0.02)
        history.append(state.net.weight.detach().double().clone())
        if step % every == 0:
            train.save_snapshot(folder / "profiles", step, state.snapshot(), int(state.updates), snapshots)

    def by_hand(width):
        return torch.einsum("n,nij->ij", torch.from_numpy(response(updates, width)), torch.stack(history))

    return state, by_hand


def test_profiles_are_the_power_averages_of_all_updates(tmp_path):
    state, by_hand = drifting(tmp_path, every=1000)
    for width, average in state.profiles.items():
        torch.testing.assert_close(average[0].double(), by_hand(width), atol=2e-6, rtol=0)


WIDTHS = [(0.05, 1e-6), (0.1, 1e-6), (0.075, 0.01), (0.15, 0.02), (0.2, 0.05)]


@pytest.mark.parametrize(("width", "most"), WIDTHS)
def test_an_average_of_any_width_is_reconstructed_after_training(tmp_path, width, most):
    """Near the one that is tracked, compared with how far the others are from it."""
    state, by_hand = drifting(tmp_path)
    found, exact = sample.reconstruct(tmp_path / "profiles", 200, width), by_hand(width)
    assert found.keys() == dict(state.net.named_parameters()).keys()
    assert not any(value.requires_grad for value in found.values())
    others = [(by_hand(other) - exact).norm() for other in (0.05, 0.1, 0.25) if other != width]
    assert (found["weight"] - exact).norm() < most * min(others) + 1e-6


def test_weights_that_stand_still_are_their_own_average(tmp_path):
    state = train.State(nn.Linear(3, 2), 0.0, 0.0, 0.9, False, snapshots=4)
    for step in range(1, 41):
        for p in state.weights:
            p.grad = torch.zeros_like(p)
        state.update(0.1)
        if step % 5 == 0:
            train.save_snapshot(tmp_path / "profiles", step, state.snapshot(), int(state.updates), 4)
    for width in (0.05, 0.08, 0.2):
        found = sample.reconstruct(tmp_path / "profiles", 40, width)
        torch.testing.assert_close(found["weight"], state.net.weight.detach(), rtol=1e-5, atol=1e-6)


def test_an_average_that_cannot_be_made_is_one_line(tmp_path, capsys):
    drifting(tmp_path, snapshots=1, every=100)
    for folder, step, width in (("profiles", 199, 0.1), ("nowhere", 200, 0.1), ("profiles", 200, 0.3),
                                ("profiles", 200, 0.0), ("profiles", 200, math.nan)):
        with pytest.raises(ValueError) as error:
            sample.reconstruct(tmp_path / folder, step, width)
        assert "\n" not in str(error.value)
    sample.reconstruct(tmp_path / "profiles", 200, 0.02)
    assert "1 snapshots give the average of width 0.02 with an error of" in capsys.readouterr().err
    damaged = tmp_path / "profiles" / "000200.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"oops")
    with pytest.raises(ValueError, match="damaged"):
        sample.reconstruct(tmp_path / "profiles", 200, 0.1)


def test_the_exponents_of_the_snapshots_are_those_of_their_widths():
    assert {width: sample.exponent(width) for width in train.PROFILES} == train.PROFILES


# ------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def clip(here):
    """A small CLIP with random weights by the published implementation, and in the folder `clip`."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    ends = {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    torch.manual_seed(1)
    published = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=tower | ends, vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=16)).eval()
    for p in published.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    published.save_pretrained(here / "clip")
    (here / "clip" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (here / "clip" / "merges.txt").write_text("#version: 0.2\n")
    return published


def test_the_best_by_clip_score_are_kept(here, cli, clip):
    status, out, err = cli("a house", "--n", "8", "--seed", "5", "--out", "all")
    assert status == 0
    drawn = {notes_of(path)["seed"]: path.read_bytes() for path in Path("all").iterdir()}
    pixels = {seed: torch.from_numpy(np.array(Image.open(io.BytesIO(png)))).permute(2, 0, 1)
              for seed, png in drawn.items()}
    scores = {}
    for seed, picture in pixels.items():
        x = text_encoder.clip_pixels(picture[None], 32)
        words = text_encoder.load_text_encoder(text_encoder.TextConfig(["clip"]))
        ids = torch.from_numpy(words.reader.read("a house")["ids"])[None]
        with torch.no_grad():
            cosine = clip(input_ids=ids, pixel_values=x).logits_per_image
        scores[seed] = 2.5 * max(0.0, cosine.item() / clip.logit_scale.exp().item())
    best = sorted(scores, key=scores.get, reverse=True)[:3]
    assert scores[best[0]] > 0, scores
    ranked = ["--best", "3", "--rank", "clip", "--out", "best"]
    status, out, err = cli("a house", "--n", "8", "--seed", "5", *ranked)
    assert (status, len(out.splitlines()), err) == (0, 3, "")
    for seed, path in zip(best, out.splitlines()):
        assert notes_of(path)["seed"] == seed
        assert notes_of(path)["clip_score"] == pytest.approx(scores[seed], abs=2e-4)
        assert np.array_equal(np.asarray(Image.open(path)).transpose(2, 0, 1), pixels[seed])
    Path("two.txt").write_text("a house\na car\n")
    status, out, err = cli("--prompts", "two.txt", "--n", "3", "--best", "2", "--rank", "clip", "--grid")
    assert (status, out) == (0, "grid.png\n"), err
    notes = notes_of(here / "grid.png")["pictures"]
    assert [one["prompt"] for one in notes] == ["a house"] * 2 + ["a car"] * 2
    assert [a["clip_score"] >= b["clip_score"] for a, b in (notes[:2], notes[2:])] == [True, True]
    assert {one["seed"] for one in notes} <= {0, 1, 2}


def test_of_a_cascade_what_the_last_stage_drew_is_ranked(here, cli, clip):
    own = {"--size=16": "--size=32", "--attn-resolutions=4": "--attn-resolutions=8"}
    with training_in(here):
        train.main([*(own.get(flag, flag) for flag in RECIPE), "--lowres=16", "--picture-mode=grey",
                    "--no-efficient", "--no-conv-only", "--crop=0"])
    Path("two.txt").write_text("a house\na car\n")
    two = ["--prompts", "two.txt", "--n", "3", "--guidance", "3,2"]
    status, out, err = cli(*two, "--out", "all", "--rank", "clip")
    assert (status, len(out.splitlines()), err) == (0, 6, "")
    every = [notes_of(Path(path)) | {"bytes": Image.open(path).tobytes()} for path in out.splitlines()]
    status, out, err = cli(*two, "--out", "best", "--rank", "clip", "--best", "2", "--keep-stages")
    below, best = out.splitlines()[:6], out.splitlines()[6:]
    assert (status, len(best), err) == (0, 4, "")
    assert {Image.open(path).size for path in below} == {(16, 16)}
    assert not any("clip_score" in notes_of(Path(path)) for path in below)
    for path, expected in zip(best, [*every[:2], *every[3:5]]):               # each prompt's, best first
        notes = notes_of(Path(path))
        assert (Image.open(path).size, notes["guidance_scale"], notes["below"]["seed"]) == (
            (32, 32), 2.0, notes["seed"])
        assert notes | {"bytes": Image.open(path).tobytes()} == expected
    Image.new("RGB", (40, 40), (200, 90, 30)).save("given.png")
    grey = ("--ckpt", "runs/32", "--lowres", "given.png", "--init", "given.png", "--strength", "0.7")
    assert (cli("a house", *grey)[0], notes_of(Path("a-house.png"))["init"]) == (0, "given.png")
    scores = [notes["clip_score"] for notes in every]
    assert scores == sorted(scores[:3], reverse=True) + sorted(scores[3:], reverse=True)
    assert len(set(scores)) > 1


def test_a_run_of_a_clip_ranks_at_the_clean_end_of_its_time_and_draws_nothing(here, cli, clip_run):
    shutil.copytree(clip_run, here / "runs" / "clip-16")                      # the newest, and passed over
    status, out, err = cli("a house", "--n", "4", "--out", "all", "--rank", "runs/clip-16")
    assert (status, len(out.splitlines()), err) == (0, 4, "")
    similarity = similarity_of(sample.load_stage(clip_run, torch.device("cpu"), clip=True), "a house")
    scores = {}
    for path in out.splitlines():
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        with torch.no_grad():
            logit = similarity(pixels.float() / 127.5 - 1, torch.zeros(1))
        scores[notes_of(path)["seed"]] = notes_of(path)["clip_score"]
        assert notes_of(path)["clip_score"] == pytest.approx(2.5 * max(0.0, logit.item() * 0.07), abs=1e-2)
    status, out, err = cli("a house", "--n", "4", "--best", "1", "--out", "best.png", "--rank",
                           "runs/clip-16/checkpoints/000002")
    assert notes_of(here / "best.png")["seed"] == max(scores, key=scores.get)
    status, out, err = cli("a house", "--clip", "runs/clip-16", "--clip-scale", "3")
    assert (status, err) == (0, "")
    assert {"clip": "clip-16", "clip_scale": 3.0}.items() <= notes_of(here / "a-house.png").items()
    for argv, words in ((["--ckpt", "runs/clip-16"], "is a CLIP, for --clip or --rank"),
                        (["--clip", "runs/16"], "draws, and is no CLIP"),
                        (["--rank", "runs/16"], "draws, and is no CLIP"),
                        (["--clip-scale", "-1"], "--clip-scale -1.0 is outside"),
                        (["--clip-scale", "2"], "--clip-scale 2.0 has no effect without --clip")):
        status, out, err = cli("a house", *argv)
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert words in err


BAD = [
    ([], "give a prompt"),
    (["a", "b"], "unrecognized arguments: b"),
    (["a", "--prompts", "blank.txt"], "give a prompt"),
    (["a", "--n", "0"], "--n 0 is outside 1 to 10000"),
    (["a", "--n", "1000000"], "--n 1000000 is outside"),
    (["a", "--n", "2.5"], "--n"),
    (["a", "--guidance", "nan"], "--guidance nan is outside 0 to 100"),
    (["a", "--guidance", "inf"], "--guidance inf is outside"),
    (["a", "--guidance=-1"], "--guidance -1.0 is outside"),
    (["a", "--guidance", "1e9"], "is outside"),
    (["a", "--sample-steps", "0"], "--sample-steps 0 is outside 1 to 1000"),
    (["a", "--sample-steps", "many"], "--sample-steps"),
    (["a", "--seed", "-1"], "--seed -1 is outside"),
    (["a", "--seed", str(2**70)], "is outside 0 to"),
    (["a", "--batch-size", "0"], "--batch-size 0 is outside"),
    (["a", "--sampler", "magic"], "--sampler magic is none of: how the noise is removed: dpmpp_2m, "),
    (["a", "--sampler", "heun", "--eta", "0.5"], "--eta 0.5: heun has no fresh noise of that kind. Use"),
    (["a", "--eta", "nan"], "--eta nan is outside"),
    (["a", "--guidance-interval", "0.9", "0.1"], "guidance interval [0.9, 0.1]"),
    (["a", "--guidance-interval", "nan", "1"], "--guidance-interval nan is outside 0 to 1"),
    (["a", "--guidance-interval", "0.5"], "expected 2 arguments"),
    (["a", "--guidance-rescale", "2"], "--guidance-rescale 2.0 is outside"),
    (["a", "--ema", "0.5"], "--ema 0.5 is outside 0 to 0.28"),
    (["a", "--apg", "nan"], "--apg nan is outside"),
    (["a", "--autoguide", "nowhere"], "nowhere is missing"),
    (["a", "--autoguide", "runs/16", "--negative", "b"], "and no --negative"),
    (["a", "--write", "TAXI"], "--write TAXI or --write-guidance needs a checkpoint that was trained with "),
    (["a", "--write-guidance", "2"], "--write-guidance needs a checkpoint that was trained with --transc"),
    (["a", "--write-guidance", "101"], "--write-guidance 101.0 is outside -1 to 100"),
    (["a", "--autoguide", "runs/16", "--write-guidance", "2"], "and no --negative nor --write-guidance"),
    (["a", "--threshold", "dynamic"], "--threshold dynamic is none of: predictions are clipped at"),
    (["a", "--threshold", "1.5"], "--threshold 1.5 is none of: predictions"),
    (["a", "--threshold", "0.0"], "threshold percentile 0.0 is not in (0, 1]"),
    (["a", "--respacing", "10,x"], "respacing '10,x' is not like 250"),
    (["a", "--init", "nowhere.png", "--strength", "0.5"], "--lowres nowhere.png is no file"),
    (["a", "--init", "blank.txt", "--strength", "0.5"], "--lowres blank.txt is no picture: not a whole"),
    (["a", "--init", "half.webp", "--strength", "0.5"], "--init, --mask or --lowres half.webp is no picture"),
    (["a", "--init", "small.webp", "--mask", "big.webp"], "--init is 20x30 pixels, --mask 30x20. Give both"),
    (["a", "--mask", "small.webp"], "--init needs --strength 0.7 or --mask, they need --init"),
    (["a", "--strength", "0.5"], "--init needs --strength 0.7 or --mask, they need --init"),
    (["a", "--init", "small.webp"], "--init needs --strength 0.7 or --mask, they need --init"),
    (["a", "--init", "small.webp", "--strength", "0.5", "--resample", "5"], "--resample needs --mask"),
    (["a", "--ckpt", "runs/16", "--stop-at", "16"], "--stop-at: not allowed with argument --ckpt"),
    (["a", "--init", "small.webp", "--strength", "0"], "--strength 0.0 is outside 0.001 to 1"),
    (["a", "--init", "small.webp", "--strength", "1.5"], "--strength 1.5 is outside"),
    (["a", "--init", "small.webp", "--strength", "nan"], "--strength nan is outside"),
    (["a", "--init", "small.webp", "--mask", "small.webp", "--resample", "0"], "--resample 0 is outside"),
    (["a", "--trajectory", "2", "--npz", "a.npz"], "are for single pictures, without --trajectory"),
    (["a", "--compare", "runs/16", "--rank", "c"], "are for single pictures, without --trajectory and"),
    (["a", "-i"], "leave PROMPT, --prompts, --compare and --validate away"),
    (["-i", "--compare", "runs/16", "runs/16"], "leave PROMPT, --prompts, --compare and --validate away"),
    (["a", "--dtype", "int8"], "--dtype"),
    (["a", "--device", "tpu"], "--device tpu is not here. Choose from"),
    (["a", "--guid", "3"], "unrecognized arguments: --guid"),
    (["a", "--nonsense"], "unrecognized arguments: --nonsense"),
    (["--prompts", "nowhere.txt"], "--prompts nowhere.txt is no file"),
    (["--prompts", "blank.txt"], "--prompts blank.txt has no prompt in it. Write one a line"),
    (["--prompts", "runs"], "--prompts runs is no file"),
    (["--prompts", "/dev/zero"], "--prompts /dev/zero is no file"),
    (["--prompts", "pipe"], "--prompts pipe is no file"),
    (["--prompts", "chinese.txt"], "--prompts chinese.txt is no text in UTF-8. Save it as that"),
    (["--prompts", "torn.safetensors"], "--prompts torn.safetensors is no text in UTF-8"),
    (["--prompts", "long.txt"], "--prompts long.txt has over 1 MiB. Draw it in parts"),
    (["a", "--ckpt", "pipe"], "pipe is no file. Name a run"),
    (["a", "--ckpt", "/dev/zero"], "/dev/zero is no file. Name a run"),
    (["a", "--init", "pipe", "--strength", "0.5"], "--lowres pipe is no file"),
    (["a", "--init", "bomb.gif", "--strength", "0.5"], "12000x12000 is over 64 megapixels"),
    (["a", "--out", "n" * 300], "File name too long"),
    (["a", "--ckpt", "n" * 300], "File name too long"),
    (["a", "--out", "blank.txt"], "--out blank.txt: blank.txt is a file. Name a folder"),
    (["a", "--out", "blank.txt/x.png"], "--out blank.txt/x.png: blank.txt is a file. Name"),
    (["a", "--out", "blank.txt/folder"], "Not a directory"),
    (["a", "--n", "8", "--best", "9", "--rank", "runs"], "--best 9 needs as many pictures, --n 8,"),
    (["a", "--n", "8", "--best", "2"], "--best 2 needs as many pictures, --n 8, and scores, --rank DIR"),
    (["a", "--best", "-1"], "--best -1 is outside 0 to 10000"),
    (["a", "--rank", "nowhere"], "--rank nowhere is no folder"),
    (["a", "--rank", "runs"], "runs has no config.json (found 16)"),
    (["a", "--ckpt", "nowhere"], "nowhere is missing"),
    (["a", "--ckpt", "temporary"], "temporary has no checkpoints/STEP/ema.safetensors (found: nothing)"),
    (["a", "--ckpt", "runs"], "(found: 16). Name a run"),
    (["a", "--ckpt", "blank.txt"], "blank.txt is damaged"),
    (["a", "--ckpt", "foreign.safetensors"], "not a checkpoint of limn (first tensor: transformer.h.0)"),
    (["a", "--ckpt", "torn.safetensors"], "torn.safetensors is damaged: checksum mismatch"),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=[" ".join(argv)[:40] or "nothing" for argv, _ in BAD])
def test_bad_input_ends_in_one_line_with_status_2(here, cli, argv, words):
    Path("blank.txt").write_text(" \n\n")
    Path("chinese.txt").write_bytes("一座红色的房子\n房子\x81".encode("gbk", "ignore") + b"\x81\n")
    Path("long.txt").write_text("a house\n" * 2**18)
    os.mkfifo("pipe")
    if "bomb.gif" in argv:
        Image.new("1", (12000, 12000)).save("bomb.gif")
    save_file({"transformer.h.0": torch.zeros(2)}, "foreign.safetensors")
    content = bytearray(checkpoint_of(here).read_bytes())
    content[-9] ^= 1
    Path("torn.safetensors").write_bytes(content)
    Image.new("RGB", (20, 30)).save("small.webp", lossless=True)
    Image.new("RGB", (30, 20)).save("big.webp", lossless=True)
    Path("half.webp").write_bytes(Path("big.webp").read_bytes()[:-30])
    status, out, err = cli(*argv, steps=0)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("sample.py: error: ")
    assert words in err
    assert not list(here.glob("*.png"))


def test_without_a_checkpoint_the_line_says_how_to_train_one(tmp_path):
    done = subprocess.run([sys.executable, PROGRAM, "a house"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("sample.py: error: no checkpoint in runs/. Train one first: "
                           "python train.py --size 64\n")


def test_weights_that_are_not_finite_end_in_an_error_and_no_file(here, cli):
    rewrite(checkpoint_of(here), lambda tensors, _: tensors["unet.conv_out.bias"].fill_(torch.nan))
    status, out, err = cli("a house")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "the network's output is not finite (checkpoint of step 2)" in err
    assert not list(here.glob("*.png"))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(here, cli):
    checkpoint_of(here).write_bytes(b"torn")
    status, _, err = cli("a house")
    assert (status, len(err.splitlines())) == (0, 1)
    assert err.startswith("sample.py: warning: runs/16/checkpoints/000002/ema.safetensors is damaged")
    assert notes_of(Path("a-house.png"))["step"] == 1


@pytest.mark.parametrize("change", [
    lambda tensors, config: config["ModelConfig"].update(wings=2),
    lambda tensors, config: config["DiffusionConfig"].update(schedule="magic"),
    lambda tensors, config: config.pop("TextConfig"),
    lambda tensors, config: config["ModelConfig"].update(channels=64),
    lambda tensors, config: config["ModelConfig"].update(channels=33),
    lambda tensors, config: tensors.pop("unet.null"),
    lambda tensors, config: tensors.update({"unet.wings": torch.zeros(2)}),
    lambda tensors, config: tensors.update({"unet.null": torch.zeros(2)})])
def test_a_checkpoint_of_other_code_is_one_line(here, cli, change):
    rewrite(checkpoint_of(here), change)
    status, out, err = cli("a house")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "does not fit this code" in err
    assert len(err) < 500


NO_NUMBERS = {"null": None, "a list": [[1]], "a word": "x", "10^30": 10**30, "nan": math.nan, "below 0": -5,
              "true": True}
CRAFTED = {
    "no object": lambda config: [],
    "null": lambda config: None,
    "nested": lambda config: json.loads("[" * 500 + "]" * 500),
    **{f"{group} is {what}": lambda config, group=group, value=value: config | {group: value}
       for group in ("ModelConfig", "DiffusionConfig", "DataConfig", "TextConfig", "TrainConfig")
       for what, value in {"null": None, "a list": [1], "a number": 7}.items()},
    **{f"{field} is {what}": lambda config, group=group, field=field, value=value:
       config | {group: config[group] | {field: value}}
       for group, field in (
           ("ModelConfig", "channels"), ("ModelConfig", "num_res_blocks"), ("TrainConfig", "size"),
           ("DiffusionConfig", "shift_base"), ("DataConfig", "lowres"), ("TextConfig", "byte_width"))
       for what, value in NO_NUMBERS.items()},
    **{f"{field} is {value}": lambda config, group=group, field=field, value=value:
       config | {group: config[group] | {field: value}}
       for group, field, value in (
           ("ModelConfig", "num_res_blocks", [10**6]), ("ModelConfig", "channels", 2**20),
           ("ModelConfig", "channels", 8192), ("ModelConfig", "emb_dim", 2**20), ("ModelConfig", "patch", 0),
           ("TextConfig", "byte_width", 2**20), ("TextConfig", "byte_width", 2048),
           ("TextConfig", "byte_layers", 10**6), ("TextConfig", "byte_layers", 24),
           ("TrainConfig", "size", 0), ("TrainConfig", "size", 10**6),
           ("DiffusionConfig", "prediction", "magic"),
           ("TextConfig", "text_encoder", [None]), ("DataConfig", "picture_mode", "infrared"))},
}


@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_configuration_is_one_line_and_takes_no_memory(here, what):
    path = checkpoint_of(here)
    tensors, meta = model.load_tensors(path)
    del meta["sha256"]
    config = CRAFTED[what](json.loads(meta["config"]))
    model.save_tensors(path, tensors, meta | {"config": json.dumps(config)})
    before = train.memory_peak(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"does not fit this code|was trained with|nor near") as error:
        sample.load_stage(path, torch.device("cpu"))
    assert "\n" not in str(error.value)
    assert train.memory_peak(torch.device("cpu")) - before < 2**27


@pytest.mark.parametrize("name", ["text", "step", "config"])
def test_metadata_that_is_missing_is_one_line(here, name):
    path = checkpoint_of(here)
    tensors, meta = model.load_tensors(path)
    del meta["sha256"], meta[name]
    model.save_tensors(path, tensors, meta)
    with pytest.raises(ValueError, match=f"does not fit this code .'{name}'.. Use the code"):
        sample.load_stage(path, torch.device("cpu"))


@pytest.mark.parametrize("content", [
    "[]", "null", '{"DataConfig": []}', '{"DataConfig": {"lowres": "x"}}', "[" * 9999])
def test_a_crafted_config_of_a_run_is_one_line(here, cli, content):
    (here / "runs/16/config.json").write_text(content)
    status, out, err = cli("a house")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "config.json is damaged" in err


def test_ctrl_c_keeps_the_pictures_that_are_drawn(here, cli, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return gaussian(*args, **kwargs)
    gaussian = diffusion.gaussian
    monkeypatch.setattr(diffusion, "gaussian", interrupted)
    status, out, err = cli("a house", "--n", "8", "--batch-size", "2")
    assert (status, len(out.splitlines()), len(list(here.glob("*.png")))) == (130, 4, 4)
    assert err == "sample.py: error: stopped after 4 of 8 pictures of runs/16\n"
    calls[:] = [0, 0]
    status, out, err = cli("a house")
    assert (status, out, err) == (130, "", "sample.py: error: stopped before a picture was drawn\n")
    calls[:] = [0]
    status, out, err = cli("a house", "--n", "4", "--batch-size", "2", "--compare", "runs/16", "runs/16")
    told = "sample.py: error: stopped after 2 of 4 pictures of runs/16: nothing to compare\n"
    assert (status, out, err) == (130, "", told)


def test_a_name_that_the_terminal_cannot_show_is_escaped(here):
    done = subprocess.run([sys.executable, PROGRAM, "a house", "--out", "画/b.png", "--sample-steps", "1"],
                          capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u753b/b.png\n", "")
    assert (here / "画/b.png").is_file()


def test_prompts_with_a_byte_order_mark_are_read(here, cli):
    Path("wide.txt").write_text("a house\na café\n", encoding="utf-16")
    status, out, _ = cli("--prompts", "wide.txt")
    assert (status, len(out.splitlines())) == (0, 2)
    assert notes_of(here / "a-caf.png")["prompt"] == "a café"


def test_help_names_every_flag_with_its_default(cli):
    status, out, _ = cli("--help", steps=0)
    assert status == 0
    words = " ".join(out.split())
    assert "[1..10000 images] (default: 1)" in words
    assert f"how the noise is removed: {', '.join(diffusion.SAMPLERS)} (default: dpmpp_2m)" in words


# ---------------------------------------------------------------------------------------------------- latents
@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """A folder with a VAE of two pixels a position, and a run on its latents."""
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    model.save_published(folder / "vae", model.AutoencoderTiny({
        "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1], "latent_channels": 4}))
    with training_in(folder):
        train.main([*RECIPE, "--vae=vae"])
    return folder


@pytest.mark.parametrize(("place", "flags"), [
    ("latents", ["--vae=vae"]), ("frozen", ["--text-encoder", "byt5"])])
def test_a_clip_sees_latents_and_reads_by_a_frozen_encoder(
        place, flags, request, tmp_path, monkeypatch, cli):
    folder = shutil.copytree(request.getfixturevalue(place), tmp_path / "here")
    with training_in(folder):
        train.main([*RECIPE, *flags, "--objective=clip"])
    monkeypatch.chdir(folder)
    flag, moved = flags[-1].split("=") if place == "latents" else flags
    Path(moved).rename("moved")
    see_by = ["--against", "runs/16", "--features", "runs/clip-16", "--limit", "8", "--rank", "runs/clip-16"]
    status, out, err = cli("a house", "--n=8", "--clip=runs/clip-16", *see_by, flag, "moved")
    assert status == 0, err
    assert "clip_score" in out
    Path("moved").rename(moved)
    names = model.read(Path("runs/clip-16"))[1].keys()
    assert any("text_encoder" in name for name in names) == (place == "latents")    # bytes train along
    assert "unet.text_pool.head.weight" in names
    cpu = torch.device("cpu")
    stage = sample.load_stage(Path("runs/16"), cpu)
    plain = draw(stage, ["a house"])
    assert not torch.equal(draw(stage, ["a house"], clip="runs/clip-16", clip_scale=50.0), plain)
    score = sample.clip_scores("runs/clip-16", plain, ["a house"], cpu)
    assert score.shape == (1,)
    assert 0 <= score <= 2.5


def test_a_clip_of_pixels_does_not_guide_latents(latents, clip_run):
    stage = sample.load_stage(latents / "runs" / "16", torch.device("cpu"), vae=str(latents / "vae"))
    with pytest.raises(ValueError, match="in the same space"):
        draw(stage, ["a house"], clip=str(clip_run))


def test_pictures_are_drawn_from_latents_wherever_the_vae_lies(latents, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(latents, "here")
    monkeypatch.chdir("here")
    assert cli("a house", "--out=a.png")[0] == 0
    assert Image.open("a.png").size == (16, 16)

    Path("vae").rename("elsewhere")
    status, _, error = cli("a house", "--out=b.png")
    assert status == 2
    assert len(error.splitlines()) == 1
    assert "is not there: vae/config.json is missing" in error
    assert error.strip().endswith("--vae DIR")
    assert cli("a house", "--out=b.png", "--vae=elsewhere")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    guides = ["--autoguide", model.checkpoint_folders(Path("runs/16"))[0]]
    assert cli("a house", "--out=c.png", "--vae=elsewhere", *guides) == (0, "c.png\n", "")
    weights = model.checkpoint_folders(Path("runs/16"))[-1] / "ema.safetensors"
    Path("elsewhere").rename("vae")
    shutil.copytree("vae", "far/vae")
    shutil.rmtree("vae")
    config = Path("runs/16/config.json")
    config.write_text(config.read_text().replace('"vae": "vae"', '"vae": "far/vae"'))
    assert cli("a house", "--out=d.png", "--ckpt", weights) == (0, "d.png\n", "")


@pytest.mark.parametrize("name", diffusion.SAMPLERS)
def test_every_sampler_draws_latents_and_nothing_clips_them(latents, name):
    stage = sample.load_stage(latents / "runs" / "16", torch.device("cpu"), vae=str(latents / "vae"))
    assert stage.space.limit is None
    pictures = sample.generate(stage, ["a house"], [0], sampler=name, steps=2, threshold="0.9")
    assert (pictures.shape, pictures.dtype) == ((1, 3, 16, 16), torch.uint8)


def test_a_latent_does_not_change_with_its_batch(latents):
    stage = sample.load_stage(latents / "runs" / "16", torch.device("cpu"), vae=str(latents / "vae"))
    prompts = ["a house", "a red star", "a fish"]
    both = sample.generate(stage, prompts, [1, 2, 3], steps=2)
    alone = sample.generate(stage, prompts[1:2], [2], steps=2)
    assert (both[1:2].int() - alone.int()).abs().max() <= 1


def test_a_picture_is_changed_where_its_mask_is_white_in_latents_too(latents, tmp_path):
    stage = sample.load_stage(latents / "runs" / "16", torch.device("cpu"), vae=str(latents / "vae"))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "init.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = {"init": str(tmp_path / "init.png"), "mask": str(tmp_path / "mask.png")}
    drawn = sample.generate(stage, ["a house"], [0], steps=4, **files)
    back = stage.space.decode(stage.space.encode(sample.read_picture(files["init"], 16)[None]))
    change = (drawn.int() - back.int()).abs().float().mean((0, 1, 2))
    assert change[:3].max() <= 0.5                             # beyond the reach of the decoder
    assert change[8:].mean() > 1


# --------------------------------------------------------------------------------------- published pipelines
WORDS = ["<|startoftext|>", "<|endoftext|>", "!", "a</w>", "house</w>", "red</w>", "h", "o", "u", "s",
         "e</w>", "ho", "us", "hous", "r", "e", "d</w>", "re"]
NOISE = "scheduler/scheduler_config.json"
MERGES = ["h o", "u s", "ho us", "hous e</w>", "r e", "re d</w>"]


def write_pipeline(folder: Path, pad: str = "<|endoftext|>", xl: bool = False, **scheduler) -> dict:
    """A small published pipeline of random weights, of Stable Diffusion 1.x or XL; its networks."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    more = {}
    if xl:
        more = {"cross_attention_dim": 16 + 24, "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4, "use_linear_projection": True,
                "projection_class_embeddings_input_dim": 6 * 4 + 20}
    parts = {
        "unet": diffusers.UNet2DConditionModel(**{
            "sample_size": 8, "block_out_channels": [16, 32], "norm_num_groups": 4, "cross_attention_dim": 16,
            "attention_head_dim": 2, "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]} | more),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4, sample_size=16,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=WORDS.index(pad))),
        "scheduler": diffusers.DDIMScheduler(**{
            "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
            "set_alpha_to_one": False, "steps_offset": 1} | scheduler),
    }
    if xl:
        parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=24, intermediate_size=32, num_hidden_layers=3,
            hidden_act="gelu", num_attention_heads=3, projection_dim=20, bos_token_id=0, eos_token_id=1))
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for name, fill in (("tokenizer", pad), ("tokenizer_2", "!"))[:1 + xl]:
        tokenizer = folder / name
        tokenizer.mkdir()
        (tokenizer / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
        (tokenizer / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
        own = {"pad_token": fill, "added_tokens_decoder": {}}
        other = {"pad_token": "<|endoftext|>"}
        if name == "tokenizer":                                # of before 2023, as that of Stable Diffusion 2
            own, other = other, {"pad_token": {"content": fill, "lstrip": False}}
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(own))
        (tokenizer / "special_tokens_map.json").write_text(json.dumps(other))
    (folder / "model_index.json").write_text("{}")
    noise = parts.pop("scheduler").alphas_cumprod
    return {name: part.eval() for name, part in parts.items()} | {"noise": noise}


@torch.no_grad()
@pytest.mark.parametrize(("pad", "prediction"), [("<|endoftext|>", "epsilon"), ("!", "v_prediction")])
def test_a_published_pipeline_denoises_as_diffusers_does(tmp_path, pad, prediction):
    theirs = write_pipeline(tmp_path, pad, prediction_type=prediction)
    stage = sample.load_stage(tmp_path, torch.device("cpu"))
    assert (stage.size, stage.space.scale, stage.unet.training) == (16, 2, False)
    start, end, fill = 0, 1, WORDS.index(pad)
    ids = {"a red house": [start, 3, 5, 4, end], "": [start, end]}
    ids = torch.tensor([row + [fill] * (77 - len(row)) for row in ids.values()])
    said = theirs["text_encoder"](ids).last_hidden_state
    assert (said_by(stage, ["a red house", ""])["context"] - said).abs().max() < 1e-5

    # One guided step of DDIM, from timestep 599 to 399, as their scheduler makes it.
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(5)
    x = torch.randn(1, 4, 8, 8)
    right, without = theirs["unet"](x.expand(2, -1, -1, -1), 599, said).sample.split(1)
    expected = scheduler.step(without + 7.5 * (right - without), 599, x).pred_original_sample
    settings = sample.Settings(guidance_scale=7.5)
    denoise = sample.denoiser_of(stage, stage.network(), [None, None], settings, ["a red house"], {}, [""])
    x0 = denoise(x, torch.tensor([0.6]))
    assert (x0 - expected).abs().max() < 1e-4 * expected.abs().max()

    # Its VAE gives the picture back.
    picture = (theirs["vae"].decode(x0 / 0.18215).sample / 2 + 0.5).clamp(0, 1) * 255
    assert (stage.space.decode(x0) - picture).abs().max() <= 1


@torch.no_grad()
def test_a_published_pipeline_of_sdxl_denoises_as_diffusers_does(tmp_path, cli, monkeypatch):
    theirs = write_pipeline(tmp_path / "xl", xl=True)
    stage = sample.load_stage(tmp_path / "xl", torch.device("cpu"))
    ids = torch.tensor([[0, 3, 5, 4, 1] + [1] * 72, [0, 3, 5, 4, 1] + [WORDS.index("!")] * 72])
    narrow = theirs["text_encoder"](ids[:1], output_hidden_states=True).hidden_states[-2]
    wide = theirs["text_encoder_2"](ids[1:], output_hidden_states=True)
    context = torch.cat([narrow, wide.hidden_states[-2]], 2)
    said = said_by(stage, ["a red house"])
    assert (said["context"] - context).abs().max() < 1e-5
    assert (said["pooled"] - wide.text_embeds).abs().max() < 1e-5

    # Without a prompt it is told zeros, as force_zeros_for_empty_prompt says.
    x, sizes = torch.randn(1, 4, 8, 8), torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    right, without = (
        theirs["unet"](x, 599, context * told, added_cond_kwargs={
            "text_embeds": wide.text_embeds * told, "time_ids": sizes}).sample for told in (1, 0))
    alpha = theirs["noise"][599].sqrt()
    eps = without + 7.5 * (right - without)
    expected = (x - (1 - alpha ** 2).sqrt() * eps) / alpha
    settings = sample.Settings(guidance_scale=7.5)
    denoise = sample.denoiser_of(stage, stage.network(), [None, None], settings, ["a red house"], {}, [""])
    assert (denoise(x, torch.tensor([0.6])) - expected).abs().max() < 1e-4 * expected.abs().max()

    monkeypatch.chdir(tmp_path)
    status, _, _ = cli("a red house", "--ckpt=xl", "--out=drawn", "--negative=house", "--sample-steps=2")
    assert status == 0
    (tmp_path / "xl" / "model_index.json").write_text('{"force_zeros_for_empty_prompt": false}')
    status, _, error = cli("a red house", "--ckpt=xl", "--out=drawn")
    assert status == 2
    assert "or two that read empty prompts" in error


@pytest.mark.parametrize("pad", [["!"], {"content": ["!"]}, 3, None, "unknown"])
def test_a_pipeline_whose_padding_is_not_told_pads_with_the_end(tmp_path, pad):
    write_pipeline(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
    (tmp_path / "tokenizer" / "special_tokens_map.json").unlink()
    stage = sample.load_stage(tmp_path, torch.device("cpu"))
    assert stage.text.reader.read("a")["ids"].tolist() == [0, 3] + [1] * 75


def test_a_published_pipeline_draws_by_the_command_line(tmp_path, cli, monkeypatch):
    write_pipeline(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    status, out, _ = cli("a red house", "--ckpt=pipeline", "--n=2", "--out=drawn", "--negative=house")
    assert status == 0
    assert len(out.splitlines()) == 2
    assert Image.open("drawn/a-red-house.png").size == (16, 16)
    status, _, error = cli("a red house", "--ckpt", "pipeline", "--ema", 0.1)
    assert status == 2
    assert "pipeline is a published pipeline, without averages for --ema 0.1" in error


@pytest.mark.parametrize(("change", "words"), [
    ({NOISE: {"beta_end": 0.02}}, "beta_end is 0.02; known here: 0.012"),
    ({NOISE: {"prediction_type": "flow"}}, "prediction_type is 'flow'; known here: epsilon, v_prediction"),
    ({NOISE: {"num_train_timesteps": 10}}, "num_train_timesteps is 10; known here: 1000"),
    ({"unet/config.json": {"in_channels": 9}}, "inpainting"),
    ({"unet/config.json": {"sample_size": [8, 9]}}, "sample_size is"),
    ({"vae/config.json": {"_class_name": "VQModel"}}, "not AutoencoderKL or AutoencoderTiny"),
    ({"text_encoder_2/config.json": {}, "text_encoder_3/config.json": {}}, "has 3 text encoders"),
    ({NOISE: None}, "scheduler_config.json is missing"),
])
def test_a_pipeline_that_is_not_read_is_one_line(tmp_path, cli, monkeypatch, change, words):
    write_pipeline(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    for name, changed in change.items():
        path = tmp_path / "pipeline" / name
        path.parent.mkdir(exist_ok=True)
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | (changed or {})))
        if changed is None:
            path.unlink()
    status, _, error = cli("a red house", "--ckpt", "pipeline")
    assert status == 2
    assert len(error.splitlines()) == 1
    assert words in error


# ---------------------------------------------------------------------------------------------------- scores


class See(nn.Module):
    """Features (B, 27, 1, 1): the mean colours of nine fields."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, [3, 3]).flatten(1)[:, :, None, None]


class Published(nn.Module):
    """As the published Inception: bytes of any size, and a keyword."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        assert img.dtype == torch.uint8
        return nn.functional.adaptive_avg_pool2d(img.float(), [3, 3]).flatten(1) / 127.5 - 1


@pytest.fixture
def sets(tmp_path, monkeypatch) -> Path:
    """Two sets of 40 random pictures of 24 pixels, a.npz and the folder b, and a network: see.pt."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    flat = rng.integers(60, 200, (80, 3, 3, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    pictures = (flat + rng.integers(-20, 20, flat.shape)).astype(np.uint8)
    sample.save_npz("a.npz", torch.from_numpy(pictures[:40]).permute(0, 3, 1, 2), ["a house"] * 40)
    Path("b").mkdir()
    for i, picture in enumerate(pictures[40:]):
        Image.fromarray(picture).save(f"b/{i:02d}.png")
    torch.jit.script(See()).save("see.pt")
    return tmp_path


SCORE = ["--score", "b", "--against", "a.npz", "--features"]


def scores_of(out: str) -> dict[str, float]:
    """The numbers of the last line."""
    words = out.splitlines()[-1].split()
    return dict(zip(words[::2], map(float, words[1::2])))


def test_an_npz_holds_the_pictures_and_captions_in_the_fields_format(here, cli):
    Path("two.txt").write_text("a house\na red car\n")
    assert cli("a house", "--n", "2", "--out", "png")[0] == 0
    assert cli("a red car", "--n", "2", "--seed", "2", "--out", "png")[0] == 0    # no noise comes twice
    status, out, err = cli("--prompts", "two.txt", "--n", "2", "--npz", "new/s.npz", "--grid")
    assert (status, out, err) == (0, "new/s.npz\ngrid.png\n", "")
    stored = np.load("new/s.npz", allow_pickle=False)
    assert (stored["arr_0"].dtype, stored["arr_0"].shape) == (np.uint8, (4, 16, 16, 3))
    assert stored["captions"].tolist() == ["a house"] * 2 + ["a red car"] * 2
    names = ["a-house", "a-house-2", "a-red-car", "a-red-car-2"]
    assert np.array_equal(stored["arr_0"], [np.asarray(Image.open(f"png/{name}.png")) for name in names])
    status, out, err = cli("a house", "--npz", "new/s.npz")
    assert (status, out, err, len(np.load("new/s.npz")["arr_0"])) == (0, "new/s.npz\n", "", 1)
    assert "without --keep-stages" in cli("a house", "--npz", "s.npz", "--keep-stages")[2]


def test_two_sets_are_scored_by_the_features_of_a_torchscript(sets, cli):
    status, out, err = cli("--score", "a.npz", "--against", "b", "--features", "see.pt", steps=0)
    assert status == 0, err
    assert out.startswith("40 pictures of a.npz against 40 of b, 24 pixels, 27 features of see.pt\n")
    found = scores_of(out)
    assert "under 2048 pictures the Frechet distance is too high: 20 of the real ones are" in err

    # The same by hand, from what is in the files.
    features = []
    drawn = np.load("a.npz")["arr_0"]
    real = np.stack([np.asarray(Image.open(f"b/{i:02d}.png")) for i in range(40)])
    for pictures in (drawn, real):
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        x = nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
        features.append(See()(x).flatten(1).double().numpy())
    expected = {"frechet": frechet_by_definition(*features), "kernel": kid_by_definition(*features)}
    expected["precision"], expected["recall"] = precision_recall_by_definition(*features)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert 0 < found["kernel_deviation"] < 1
    assert found["frechet_floor"] > 0


def frechet_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """The published formula, the root by eigenvalues: those of a product of covariances are not negative."""
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real.sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c) + np.trace(d) - 2 * root


def kid_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    def mean(x, y):
        values = []
        for i, one in enumerate(x):
            for j, other in enumerate(y):
                if x is not y or i != j:
                    values.append((one @ other / len(one) + 1) ** 3)
        return np.mean(values)
    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def precision_recall_by_definition(a: np.ndarray, b: np.ndarray) -> list[float]:
    shares = []
    for points, others in ((a, b), (b, a)):
        inside = 0
        for point in points:
            for other in others:
                third = sorted(np.linalg.norm(others - other, axis=1))[3]
                if np.linalg.norm(point - other) <= third:
                    inside += 1
                    break
        shares.append(inside / len(points))
    return shares


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    """Features whose mean and covariance are exactly those wanted; covariances that do not commute."""
    torch.manual_seed(0)
    sets, moments = [], []
    for size in (400, 300):
        raw = torch.randn(size, 12, dtype=torch.float64)
        white = torch.linalg.qr(raw - raw.mean(0)).Q * (size - 1) ** 0.5       # covariance 1, mean 0
        mix, mean = torch.randn(2, 12, 12, dtype=torch.float64)
        sets.append(white @ mix + mean[0])
        moments.append((mean[0], mix.T @ mix))
    (m, c), (n, d) = moments
    w, v = torch.linalg.eigh(c)
    half = v * w.sqrt() @ v.T
    root = torch.linalg.eigvalsh(half @ d @ half).sqrt().sum()
    expected = (m - n).square().sum() + c.trace() + d.trace() - 2 * root
    assert sample.frechet_distance(*sets) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("count", [30, 300])
def test_identical_sets_have_a_frechet_distance_of_0(count):
    """Of fewer pictures than features, too, whose covariance has no full rank."""
    x = 3 * torch.randn(count, 128, dtype=torch.float64) + 1
    assert sample.frechet_distance(x, x.clone()) < 1e-6
    assert sample.frechet_distance(x, x.flip(0)) < 1e-6
    assert (sample.share_near(x, x), sample.kernel_distance(x, x.flip(0)) <= 0) == (1, True)


def test_the_kernel_distance_has_no_bias_and_its_deviation_is_that_of_subsets():
    """The mean over many draws from one distribution is 0 within its error, and the deviation is theirs."""
    torch.manual_seed(0)
    values = [sample.kernel_distance(*torch.randn(2, 20, 8, dtype=torch.float64)) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 300**0.5
    found = sample.compared(*torch.randn(2, 40, 8, dtype=torch.float64))       # subsets of 20
    assert 0.3 < found["kernel_deviation"] / np.std(values) < 2


def test_the_published_inception_gets_bytes_of_their_own_size(sets, cli):
    torch.jit.script(Published()).save("published.pt")
    status, out, err = cli(*SCORE, "published.pt", steps=0)
    assert (status, "24 pixels, 27 features" in out) == (0, True), err
    x = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    cpu = torch.device("cpu")
    assert sample.feature_network("published.pt", "auto", cpu)(x).eq(1).all()
    torch.jit.script(nn.Flatten()).save("flat.pt")
    white = sample.feature_network("flat.pt", "imagenet", cpu)(x).view(2, 3, 224, 224)[0, :, 0, 0]
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    assert torch.allclose(white, (1 - mean) / deviation)


def test_sets_are_brought_to_the_smaller_side_and_cut_by_limit_and_what_is_torn_is_named(sets, cli):
    for path in Path("b").iterdir():
        Image.open(path).resize((48, 48), Image.Resampling.NEAREST).save(path)
    status, out, err = cli(*SCORE, "see.pt", "--limit", "9", steps=0)
    assert out.startswith("9 pictures of b against 9 of a.npz, 24 pixels"), err
    Path("b/00.png").write_bytes(b"torn")
    status, out, err = cli(*SCORE, "see.pt", steps=0)
    assert (status, "00: not a whole picture of" in err) == (0, True), err


def test_what_is_drawn_is_scored_against_what_the_run_held_out(here, cli):
    torch.jit.script(See()).save("see.pt")
    held_out = ["--limit", "8", "--against", "runs/16", "--features", "see.pt"]
    status, out, err = cli("--prompts", "runs/16", *held_out, "--npz", "s.npz")
    assert status == 0, err
    assert "8 pictures of what was drawn against 8 of runs/16, 16 pixels" in out
    held = sample.picture_set("runs/16")
    assert np.load("s.npz")["captions"].tolist() == [held[i]["caption"] for i in range(8)]
    assert len({*np.load("s.npz")["captions"].tolist()}) > 4
    status, again, err = cli("--score", "s.npz", *held_out, steps=0)
    assert again.splitlines()[-1] == out.splitlines()[-1], err


@pytest.mark.parametrize(("argv", "words"), [
    (["--score", "a.npz"], "a score of a.npz needs --against SET and --features FILE"),
    (["a house", "--against", "a.npz"], "a score of what was drawn needs --against SET and --fe"),
    (["--against", "b", "--features", "see.pt", "--score", "torn.npz"], "torn.npz has no arr_0 of uint8 (N,"),
    (["--against", "b", "--features", "see.pt", "--score", "float.npz"], "float.npz has no arr_0 of uint8"),
    (["--against", "b", "--features", "see.pt", "--score", "pickle.npz"], "pickle.npz has no arr_0 of uint8"),
    (["--against", "b", "--features", "see.pt", "--score", "nowhere"], "nowhere is not on a local disk"),
    ([*SCORE, "a.npz"], "a.npz is no TorchScript, nor the folder of a CLIP"),
    ([*SCORE, "none.pt"], "none.pt is no TorchScript, nor the folder of a CLIP"),
    ([*SCORE, "flat.pt"], "flat.pt fails at inception (16, 3, 299, 299)"),
    ([*SCORE, "see.pt", "--limit", "3"], "scores need 8 or more"),
])
def test_a_set_that_cannot_be_scored_is_one_line(sets, cli, argv, words):
    Path("torn.npz").write_bytes(Path("a.npz").read_bytes()[:5000])
    np.savez("float.npz", arr_0=np.zeros((9, 8, 8, 3)))
    np.savez("pickle.npz", arr_0=np.array([None] * 9))
    torch.jit.script(nn.Linear(7, 7)).save("flat.pt")
    status, out, err = cli(*argv, steps=0)
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert words in err


def test_features_that_are_kept_are_read_again(sets, cli):
    status, out, err = cli(*SCORE, "see.pt", "--keep-features", "kept", steps=0)
    files = sorted(Path("kept").iterdir())
    before = [path.read_bytes() for path in files]
    assert (status, len(files)) == (0, 2)
    assert cli(*SCORE, "see.pt", "--keep-features", "kept", steps=0)[1] == out
    assert [path.read_bytes() for path in sorted(Path("kept").iterdir())] == before
    for path, content in zip(files, before):
        path.write_bytes(content[:-1] + b"!")
    assert "is damaged: checksum mismatch" in cli(*SCORE, "see.pt", "--keep-features", "kept", steps=0)[2]

    # Of other pictures, another size, number or network, others are made.
    Image.new("RGB", (24, 24)).save("b/00.png")
    assert cli(*SCORE, "see.pt", "--keep-features", "kept", steps=0)[0] == 2    # a.npz is the same
    for path in files:
        path.unlink()
    assert cli(*SCORE, "see.pt", "--keep-features", "kept", steps=0)[1] != out
    for more in (["--score-size", "12"], ["--limit", "20"], ["--feature-input", "imagenet"]):
        count = len(list(Path("kept").iterdir()))
        assert cli(*SCORE, "see.pt", "--keep-features", "kept", *more, steps=0)[0] == 0
        assert len(list(Path("kept").iterdir())) == count + 2, more


def test_features_of_a_clip_that_trained_on_are_made_anew(here, clip_run, cli):
    shutil.copytree(clip_run, "runs/clip-16")
    last = model.checkpoint_folders(Path("runs/clip-16"))[-1]
    last.rename("later")
    argv = ["--score", "runs/16", "--against", "runs/16", "--limit", "8", "--features", "runs/clip-16",
            "--keep-features", "kept"]
    assert cli(*argv, steps=0)[0] == 0
    assert len(list(Path("kept").iterdir())) == 1
    assert cli(*argv, steps=0)[0] == 0
    assert len(list(Path("kept").iterdir())) == 1
    Path("later").rename(last)
    assert cli(*argv, steps=0)[0] == 0
    assert len(list(Path("kept").iterdir())) == 2


@torch.no_grad()
def test_by_a_clip_the_cmmd_and_the_mean_clip_score_are_told(here, clip, cli):
    held_out = ["--limit", "10", "--against", "runs/16", "--features", "clip"]
    status, out, err = cli("--prompts", "runs/16", *held_out, "--npz", "s.npz")
    assert status == 0, err
    assert "10 of runs/16, 16 pixels, 16 features of clip" in out
    found = scores_of(out)
    real = sample.picture_set("runs/16")
    features = []
    for pictures in (np.load("s.npz")["arr_0"].transpose(0, 3, 1, 2), data.collect(real, 0, 10)["picture"]):
        seen = clip.get_image_features(text_encoder.clip_pixels(torch.from_numpy(pictures), 32))
        seen = getattr(seen, "pooler_output", seen)
        features.append((seen / seen.norm(dim=1, keepdim=True)).double())
    x, y = features
    similar = [torch.exp(-torch.cdist(a, b).square() / 200) for a, b in ((x, x), (y, y), (x, y))]
    within = [(one.sum() - 10) / 90 for one in similar[:2]]
    assert found["cmmd"] == pytest.approx(1000 * (sum(within) - 2 * similar[2].mean()).item(), rel=1e-3)

    words = text_encoder.load_text_encoder(text_encoder.TextConfig(["clip"], text_dtype="fp32"))
    captions = np.load("s.npz")["captions"].tolist()
    pooled = torch.nn.functional.normalize(words.encode(captions, torch.device("cpu"))["pooled"])
    expected = 2.5 * (x * pooled).sum(1).clamp(min=0).mean()
    assert found["clip_score"] == pytest.approx(expected.item(), rel=1e-3)


# ------------------------------------------------------------------ trajectories, bits, comparison, processes


def test_a_trajectory_shows_what_the_network_said_and_ends_in_the_picture(stage):
    alone = draw(stage, ["a star", "a car"], steps=5, sampler="ddim")
    rows = draw(stage, ["a star", "a car"], steps=5, sampler="ddim", trajectory=2)
    assert rows.shape == (2, 3, 16, 4 * 16)                                   # calls 0, 2, 4 and the picture
    assert torch.equal(rows[..., 48:], alone)
    assert torch.equal(rows[..., 32:48], alone)                               # the last step leaves no noise
    assert not torch.equal(rows[..., :16], rows[..., 16:32])


def test_bits_per_dimension_of_held_out_pictures_are_those_of_diffusion(here, cli):
    status, out, err = cli("--nll", "6", "--batch-size", "4", "--ckpt", "runs/16", "--sample-steps", "9")
    assert status == 0, err
    told = re.fullmatch(r"([\d.]+) \+- ([\d.]+) bits per dimension at most, of 6 .* in 9 steps\n", out)
    stage = sample.load_stage(here / "runs/16", torch.device("cpu"))
    real = sample.picture_set("runs/16")
    bits = []
    for position in range(6):                                                 # one by one
        batch = data.collect(real, position, position + 1)
        keys = torch.tensor([sample.noise_key(position)])
        noise = diffusion.noise_source(keys, (3, 16, 16))
        x0 = torch.from_numpy(batch["picture"]) / 127.5 - 1
        said = said_by(stage, batch["captions"])
        denoise = diffusion.threshold(diffusion.denoiser(stage.unet, stage.schedule, stage.config, said))
        times = diffusion.sampling_times(stage.schedule, 9)
        with torch.no_grad():
            bits.append(diffusion.nll(denoise, x0, times, noise, stage.schedule).item())
    assert float(told[1]) == pytest.approx(np.mean(bits), abs=1e-3)
    assert float(told[2]) == pytest.approx(np.std(bits, ddof=1) / 6**0.5, abs=1e-3)


def test_runs_are_compared_on_one_page_that_needs_nothing_beside_it(here, cli, capsys):
    shutil.copytree("runs/16", "runs/other <b>")
    shutil.rmtree(model.checkpoint_folders(Path("runs/other <b>"))[-1])       # step 1 is left
    Path("two.txt").write_text("a house\na <red> car & more\n")
    both = ["--compare", "runs/16", "runs/other <b>"]
    status, out, err = cli("--prompts", "two.txt", *both, "--out", "page")
    assert (status, out) == (0, "page/compare.png\npage/compare.html\n"), err
    assert len(notes_of(Path("page/compare.png"))["runs"]) == 2
    page = Path("page/compare.html").read_text()
    assert "<b>" not in page
    assert "src=\"http" not in page
    rows = page.split("<tr>")[1:]
    assert [re.findall(r"<td>([^<]*)</td>", row) for row in rows] == [
        ["", "runs/16", "runs/other &lt;b&gt;"], ["a house"], ["a &lt;red&gt; car &amp; more"],
        ["step", "2", "1"]]
    for row, prompt in zip(rows[1:3], ("a house", "a <red> car & more")):
        for code, run in zip(re.findall(r'base64,([^"]*)', row), both[1:], strict=True):
            drawn = Image.open(io.BytesIO(base64.b64decode(code)))
            assert cli(prompt, "--ckpt", run, "--out", "one.png")[0] == 0
            assert np.array_equal(drawn, np.asarray(Image.open("one.png")))


def test_a_run_is_compared_with_a_published_pipeline(here, cli):
    write_pipeline(here / "published")
    status, _, err = cli("a house", "--compare", "published", "runs/16", "--out", "page")
    assert status == 0, err
    page = Path("page/compare.html").read_text()
    assert "<td>step</td><td>0</td><td>2</td>" in page


BROWSER = """
import sys
from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEngineProfile, QWebEngineUrlRequestInterceptor
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

class Requests(QWebEngineUrlRequestInterceptor):
    def interceptRequest(self, info):
        print(info.requestUrl().scheme(), flush=True)

app = QApplication(sys.argv[:1])
requests, view = Requests(), QWebEngineView()
QWebEngineProfile.defaultProfile().setUrlRequestInterceptor(requests)
view.resize(1200, 900)
view.show()
shot = lambda: (view.grab().save(sys.argv[2]), app.quit())
view.loadFinished.connect(lambda ok: QTimer.singleShot(1500, shot))
view.load(QUrl.fromLocalFile(sys.argv[1]))
sys.exit(app.exec())
"""


@pytest.mark.slow
def test_a_browser_shows_the_page_of_a_comparison_without_a_network(here, cli):
    """Chromium, as PyQt6-WebEngine carries it: `pip install PyQt6-WebEngine`."""
    pytest.importorskip("PyQt6.QtWebEngineCore")
    assert cli("a house", "--compare", "runs/16", "runs/16", "--out", "page")[0] == 0
    headless = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu"}
    page = Path("page/compare.html").absolute()
    done = subprocess.run([sys.executable, "-c", BROWSER, str(page), "shot.png"], capture_output=True,
                          text=True, env=os.environ | headless, timeout=120)
    assert (done.returncode, done.stdout) == (0, "file\n"), done.stderr                 # nothing but the page

    shown = np.asarray(Image.open("shot.png").convert("RGB")).astype(int)
    code = re.findall(r'base64,([^"]*)', page.read_text())[0]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))).astype(int)
    enlarged = drawn.repeat(256 // len(drawn), 0).repeat(256 // len(drawn), 1)
    rows, columns = np.nonzero((shown[:-255, :-255] == enlarged[0, 0]).all(-1))
    errors = [abs(shown[y:y + 256, x:x + 256] - enlarged).max() for y, x in zip(rows, columns)]
    assert errors.count(0) == 2                                # both columns, to the bit


def test_prompts_are_asked_for(here, cli, monkeypatch):
    loaded = []
    real = model.read
    monkeypatch.setattr(model, "read", lambda *rest: loaded.append(rest) or real(*rest))
    monkeypatch.setattr("sys.stdin", io.StringIO("a house\na car\n"))
    status, out, err = cli("-i", "--n", "2")
    names = out.replace("prompt: ", "").splitlines()
    assert (status, names) == (0, ["a-house.png", "a-house-2.png", "a-car.png", "a-car-2.png"]), err
    assert len(loaded) == 1

    def interrupted(said):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert cli("-i")[0] == 0                                   # what was drawn is there
    assert cli("a house", "--out", "alone")[0] == 0
    assert Path("alone/a-house.png").read_bytes() == Path("a-house.png").read_bytes()


def test_several_processes_draw_a_share_each_and_give_the_same_file(here, cli):
    """Three pictures by two processes: one is drawn twice, and left out. None waits for Python to end by
    itself, where threads of gloo now and then abort it: here that is always so."""
    Path("sitecustomize.py").write_text(
        "import atexit, os\n'RANK' in os.environ and atexit.register(os.abort)\n")
    Path("three.txt").write_text("a house\na car\na star\n")
    assert cli("--prompts", "three.txt", "--npz", "one.npz")[0] == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", PROGRAM]
    done = subprocess.run(
        [*torchrun, "--prompts", "three.txt", "--npz", "two.npz", "--sample-steps", "2", "--device", "cpu"],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."})
    assert (done.returncode, done.stdout) == (0, "two.npz\n"), done.stderr
    assert Path("two.npz").read_bytes() == Path("one.npz").read_bytes()


# ------------------------------------------------------------------------------ what is written in pictures


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The run of a stage that reads what is written, two steps old, its weights moved away from the start."""
    folder = tmp_path_factory.mktemp("written")
    with training_in(folder):
        train.main([*RECIPE, "--data", "words", "--transcription", "bytes", "--transcription-width", "32",
                    "--transcription-length", "12", "--transcription-layers", "1"])
    path = checkpoint_of(folder)
    tensors, meta = model.load_tensors(path)
    torch.manual_seed(0)
    tensors = {name: x + 0.05 * torch.randn_like(x) for name, x in tensors.items()}
    del meta["sha256"], meta["format"]
    model.save_tensors(path, tensors, meta)
    return folder


def test_what_is_written_is_drawn_noted_and_stands_below_the_prompt(written, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["--ckpt", written / "runs" / "16"]
    lines = ["--write", "TAXI\\nGO", "--write-guidance", "6"]
    status, _, err = cli("a blue sign", *run, *lines, "--out", "a.png")
    assert status == 0, err
    assert notes_of(Path("a.png"))["write"] == "TAXI\nGO"
    assert notes_of(Path("a.png"))["write_guidance"] == 6
    for name, more in (("b.png", ["--write", "BUS"]), ("c.png", [])):
        assert cli("a blue sign", *run, *more, "--out", name)[0] == 0
    assert len({Path(name).read_bytes() for name in ("a.png", "b.png", "c.png")}) == 3
    _, _, err = cli("a blue sign", *run, "--write", "MUCH TOO LONG", "--out", "d.png")
    assert "0 of 13 tokens unknown, 1 prompts cut to 12" in err
    for name, more in (("plain.png", []), ("lines.png", ["--write", "A\\nB"])):
        cli("a sign", *run, *more, "--grid", "--out", name)
    assert Image.open("lines.png").height == Image.open("plain.png").height + 28


def test_each_picture_of_a_batch_has_its_own_words_and_scales_are_those_of_diffusion(written):
    stage = sample.load_stage(written / "runs" / "16", torch.device("cpu"))
    whole = draw(stage, ["a sign"] * 3, write=["TAXI", "", "GO"], write_guidance=5.0)
    swapped = draw(stage, ["a sign"] * 3, write=["GO", "", "TAXI"], write_guidance=5.0)
    assert (whole[[0, 1, 2]].int() - swapped[[2, 1, 0]]).abs().max() <= 1       # one seed
    assert (whole[0].int() - whole[2]).abs().max() > 1
    alone = draw(stage, ["a sign"], write="TAXI", write_guidance=5.0)
    assert (alone[0].int() - whole[0]).abs().max() <= 1
    equal = draw(stage, ["a sign"], write="TAXI", write_guidance=3.0)
    assert torch.equal(equal, draw(stage, ["a sign"], write="TAXI"))
    with pytest.raises(ValueError, match="needs a guidance_scale above 0"):
        draw(stage, ["a sign"], write="TAXI", write_guidance=3.0, guidance_scale=0.0)


def test_a_stage_that_does_not_read_it_goes_by_the_small_picture(written, ladder, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = f"{written / 'runs' / '16'},{ladder / 'runs' / '32'}"
    status, _, err = cli("a sign", "--ckpt", pair, "--write", "TAXI", "--out", "a.png")
    assert status == 0, err
    assert "was trained without --transcription: it goes by the small picture" in err
