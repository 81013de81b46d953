"""model.py: the counts of the presets, what the network may and may not see, checkpoints that survive."""
import errno
import json
import math
import os
import random
import re
import resource
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import model
from model import PRESETS, ModelConfig, UNet, load_checkpoint, load_tensors, save_checkpoint, save_tensors
from text_encoder import TextConfig, load_text_encoder

SMALL = ModelConfig(32, (1, 2), (1,), (8,), head_dim=16, patch=2)
SIZE, L, D, P = 16, 12, 32, 20


class Cosine:
    alpha_sigma = staticmethod(lambda t: (torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)))


def make_unet(config=SMALL, size=SIZE, seed=0, **options) -> UNet:
    """A network whose zero-initialised layers have been moved away from zero, as training does."""
    torch.manual_seed(seed)
    unet = UNet(config, size, D, P, **options)
    unet.levels = Cosine, Cosine
    with torch.no_grad():
        for p in unet.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1)
    return unet


def make_batch(batch=3, size=SIZE, tokens=(5, 12, 1), seed=1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(L)[None] < torch.tensor(tokens[:batch])[:, None]
    return {"x_t": torch.randn(batch, 3, size, size, generator=g), "t": torch.rand(batch, generator=g),
            "context": torch.randn(batch, L, D, generator=g), "mask": mask,
            "pooled": torch.randn(batch, P, generator=g)}


# ----------------------------------------------------------------------------------------------- the U-Net


@pytest.mark.parametrize(("stage", "name"), PRESETS)
def test_parameters_and_flops_are_those_of_the_table(stage, name):
    source = Path(model.__file__).read_text()
    row = re.search(rf'^ *\({stage}, "{name}"\):.*#\s+([\d.]+) M\s+([\d.]+) G$', source, re.M)
    small = {64: 0, 256: 64, 1024: 256}[stage]
    with torch.device("meta"):
        unet = UNet(PRESETS[stage, name], stage, 128, 128, lowres=3 if small else 0)
        unet.levels = Cosine, Cosine
        lowres = {"lowres": torch.empty(1, 3, small, small), "lowres_t": torch.empty(1)} if small else {}
        flops = model.count_flops(unet, torch.empty(1, 3, stage, stage), torch.empty(1),
                                  torch.empty(1, 128, 128), torch.empty(1, 128, dtype=torch.bool),
                                  torch.empty(1, 128), **lowres)
    counted = sum(p.numel() for p in unet.parameters()) / 1e6, flops / 1e9
    for text, number in zip(row.groups(), counted):
        assert text == f"{number:.{len(text.partition('.')[2])}f}"


def test_flops_are_the_same_on_the_cpu_and_grow_with_the_batch():
    unet, batch = make_unet(), make_batch()
    with torch.device("meta"):
        shadow = UNet(SMALL, SIZE, D, P)
        empty = {k: torch.empty_like(v, device="meta") for k, v in batch.items()}
        expected = model.count_flops(shadow, **empty)
    assert model.count_flops(unet, **batch) == expected
    alone = model.count_flops(unet, **{k: v[:1] for k, v in batch.items()})    # the places are projected once
    assert expected == pytest.approx(3 * alone, rel=0.005)
    one = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert model.count_flops(one, torch.zeros(2, 3, 8, 8)) == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)


@pytest.mark.parametrize(("config", "size", "out"), [
    (SMALL, 16, 3), (ModelConfig(32, (1, 2), (1,), (16,), 16, 2), 32, 6),
    (ModelConfig(32, (1,), (1,), (), 32, 1), 8, 3), (ModelConfig(32, (1, 1, 2), (2,), (16, 4), 8, 1), 16, 3),
    (PRESETS[64, "tiny"], 64, 3)])
def test_shapes_are_those_of_the_docstring(config, size, out):
    y = make_unet(config, size, learn_sigma=out == 6)(**make_batch(2, size))
    assert y.shape == (2, out, size, size)
    assert y.dtype == torch.float32
    assert y.isfinite().all()


def test_output_is_zero_at_the_start():
    assert not UNet(SMALL, SIZE, D, P)(**make_batch()).any()


def test_time_embedding_is_bounded_and_tells_times_apart():
    t = torch.linspace(0, 1, 1001)
    e = model.timestep_embedding(t, 64)
    assert e.shape == (1001, 64)
    assert e.abs().max() <= 1
    assert torch.pdist(e).min() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("length", [12, 32, 128])
def test_padding_does_not_change_the_output(length):
    unet, batch = make_unet(), make_batch()
    plain = unet(**batch)
    more = length - L
    padded = batch | {"mask": torch.cat([batch["mask"], torch.zeros(3, more, dtype=torch.bool)], 1),
                      "context": torch.cat([batch["context"], 50 * torch.randn(3, more, D)], 1)}
    assert (unet(**padded) - plain).abs().max() < 1e-5
    assert plain.std() > 0.1
    for i in range(3):                                       # alone, and without its padding
        n = int(batch["mask"][i].sum())
        alone = {k: v[i:i + 1] for k, v in padded.items()}
        tight = alone | {"mask": alone["mask"][:, :n], "context": alone["context"][:, :n]}
        for single in (alone, tight):
            assert (unet(**single) - plain[i:i + 1]).abs().max() < 1e-5


@torch.no_grad()
def test_prompt_padded_to_32_or_128_tokens_gives_the_same_output_alone_or_in_a_batch():
    torch.manual_seed(0)
    encoders = [load_text_encoder(TextConfig(text_length=n, byte_width=D)) for n in (32, 128)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    unet, noisy = make_unet(SMALL), make_batch()
    unet.pooled = torch.nn.Sequential(torch.nn.LayerNorm(D), torch.nn.Linear(D, unet.config.emb_dim))
    prompts = ["a red house", "ein grünes Haus am Meer", ""]

    def draw(encoder, rows):
        context, mask, pooled = encoder(*encoder.tokenize([prompts[i] for i in rows]))
        return unet(noisy["x_t"][rows], noisy["t"][rows], context, mask, pooled)

    together = draw(encoders[0], [0, 1, 2])
    assert (draw(encoders[1], [0, 1, 2]) - together).abs().max() < 1e-5
    for encoder in encoders:
        for i in range(3):
            assert (draw(encoder, [i]) - together[i]).abs().max() < 1e-5


def test_padded_context_gets_no_gradient():
    unet, batch = make_unet(), make_batch()
    context = batch["context"].requires_grad_()
    unet(**batch).square().sum().backward()
    hidden = ~batch["mask"]
    assert not context.grad[hidden].any()
    assert context.grad[~hidden].abs().amax(-1).min() > 0


@torch.no_grad()
def test_row_without_tokens_is_the_unconditional_branch():
    unet, batch = make_unet(), make_batch()
    batch["mask"][1] = False
    out = unet(**batch)
    other = batch | {"context": batch["context"].clone(), "pooled": batch["pooled"].clone()}
    other["context"][1], other["pooled"][1] = 100.0, -7.0
    changed = unet(**other)
    assert out.isfinite().all()
    assert torch.equal(changed, out)
    with_text = unet(**(batch | {"mask": make_batch()["mask"]}))
    assert (with_text - out)[1].abs().max() > 1e-2
    assert (with_text - out)[[0, 2]].abs().max() < 1e-5


@torch.no_grad()
def test_context_and_pooled_reach_the_output():
    unet, batch = make_unet(), make_batch()
    out = unet(**batch)
    for key in ("context", "pooled", "t", "x_t"):
        moved = batch | {key: batch[key] + 0.5 * torch.randn(batch[key].shape)}
        assert ((unet(**moved) - out).flatten(1).abs().amax(1) > 1e-3).all(), key


@torch.no_grad()
def test_order_of_the_words_changes_the_output_through_the_encoder():
    torch.manual_seed(0)
    text = load_text_encoder(TextConfig(text_length=40, byte_width=D))
    unet = make_unet()
    unet.pooled = torch.nn.Sequential(torch.nn.LayerNorm(D), torch.nn.Linear(D, unet.config.emb_dim))
    noisy = {k: v[:1].expand(2, *v.shape[1:]) for k, v in make_batch().items() if k in ("x_t", "t")}
    ids, mask = text.tokenize(["a red house left of a green tree", "a green tree left of a red house"])
    assert ids[0].sort().values.equal(ids[1].sort().values)           # the same letters
    a, b = unet(**noisy, **dict(zip(("context", "mask", "pooled"), text(ids, mask))))
    assert (a - b).abs().max() > 1e-2
    context, mask, pooled = text(ids[:1], mask[:1])                   # to the U-Net itself, tokens are a set
    order = torch.cat([torch.randperm(int(mask.sum())), torch.arange(int(mask.sum()), 40)])
    one = {k: v[:1] for k, v in noisy.items()}
    assert (unet(**one, context=context[:, order], mask=mask, pooled=pooled)
            - unet(**one, context=context, mask=mask, pooled=pooled)).abs().max() < 1e-5


def test_bfloat16_is_near_float32():
    unet, batch = make_unet(), make_batch()
    plain = unet(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        low = unet(**batch)
        low.square().mean().backward()
    assert low.dtype == torch.float32
    assert (low - plain).square().mean().sqrt() < 0.03 * plain.std()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in unet.parameters())


def test_activation_checkpointing_gives_the_plain_gradient():
    unet, batch, gradients = make_unet(), make_batch(), []
    for unet.checkpointing in (False, True):
        unet.zero_grad()
        unet(**batch).square().sum().backward()
        gradients.append([p.grad.clone() for p in unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("tokens", [(5, 12, 1), (5, 0, 1), (0, 0, 0)])
def test_every_parameter_gets_a_gradient_with_or_without_text(tokens):
    unet = make_unet()
    unet(**make_batch(tokens=tokens)).square().sum().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None] == []
    silent = {name for name, p in unet.named_parameters() if not p.grad.any()}
    of_text = {"pooled.0.weight", "context.0.weight", "context.0.bias", "context.1.weight", "context.1.bias"}
    assert silent == (set() if any(tokens) else of_text)


def test_no_recompilation_between_calls():
    compiled, counts = make_unet(), []

    def count(graph, inputs):
        counts.append(len(inputs))
        return graph

    torch._dynamo.reset()
    run = torch.compile(compiled, backend=count)
    for seed, tokens in enumerate([(5, 12, 1), (0, 0, 0), (12, 12, 12)]):
        run(**make_batch(tokens=tokens, seed=seed)).sum().backward()
    assert len(counts) == 1                                  # one graph: no break, no second compilation
    torch._dynamo.reset()


@torch.no_grad()
def test_any_height_and_width_that_divide_are_legal():
    unet, wide = make_unet(), torch.randn(3, 3, 8, 24)
    out = unet(**(make_batch() | {"x_t": wide}))
    assert out.shape == wide.shape
    assert out.isfinite().all()


@pytest.mark.parametrize(("options", "size", "message"), [
    ({"patch": 0}, 64, "--patch 0 must be at least 1"),
    ({"channel_mult": ()}, 64, "--channel-mult () must be at least 1"),
    ({"channel_mult": (1, 0)}, 64, "--channel-mult (1, 0) must be at least 1"),
    ({"num_res_blocks": (-1,)}, 64, "--num-res-blocks (-1,) must be at least 1"),
    ({"num_res_blocks": (1, 2, 3)}, 64, "--num-res-blocks (1, 2, 3) must be one number, or 2 as "
                                         "--channel-mult"),
    ({}, 65, "--size 65 must be a multiple of 8 for this model. Try 64 or 72"),
    ({}, 4, "--size 4 must be a multiple of 8 for this model. Try 8 or 16"),
    ({"channels": 16}, 64, "--channels 16 must be a multiple of 32. Try 32"),
    ({"channels": 100}, 64, "--channels 100 must be a multiple of 32. Try 96"),
    ({"head_dim": 4}, 64, "--head-dim 4 must be 8 or more and divide --channels 64. Try 32"),
    ({"head_dim": 48}, 64, "--head-dim 48 must be 8 or more and divide --channels 64. Try 32"),
    ({"attn_resolutions": (7,)}, 64, "--attn-resolutions 7 is not a side of a feature map here. "
                                     "Choose from [16, 8]")])
def test_a_shape_that_cannot_be_built_is_named(options, size, message):
    with pytest.raises(ValueError) as e:
        UNet(ModelConfig(**{"channels": 64, "channel_mult": (1, 2), "patch": 4, **options}), size, D, P)
    assert str(e.value) == message


# ------------------------------------------------------------------------------------------ super-resolution

LOCAL = ModelConfig(32, (1, 2), (1, 2), (), head_dim=16, patch=2, efficient=True, conv_only=True)


def make_lowres(batch=3, side=4, seed=2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"lowres": torch.randn(batch, 3, side, side, generator=g),
            "lowres_t": torch.rand(batch, generator=g)}


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, LOCAL])
def test_text_and_low_resolution_picture_and_its_level_reach_the_output(config):
    unet, batch = make_unet(config, lowres=3), make_batch() | make_lowres()
    out = unet(**batch)
    assert out.shape == batch["x_t"].shape
    for key in ("context", "pooled", "t", "x_t", "lowres", "lowres_t"):
        moved = batch | {key: batch[key] + 0.5 * torch.randn(batch[key].shape)}
        assert ((unet(**moved) - out).flatten(1).abs().amax(1) > 1e-3).all(), key


def test_a_grey_picture_can_be_made_of_colours_and_colours_of_grey():
    for planes, small in ((1, 3), (3, 1), (1, 1)):
        unet = make_unet(LOCAL, planes=planes, lowres=small)
        batch = make_batch() | make_lowres()
        batch["x_t"], batch["lowres"] = batch["x_t"][:, :planes], batch["lowres"][:, :small]
        assert unet(**batch).shape == batch["x_t"].shape


@torch.no_grad()
def test_an_untrained_stage_says_the_picture_it_was_given():
    """Its guess is the linear one: for x0 normal around lowres, the error of v has the variance gain^2."""
    unet = UNet(LOCAL, 64, D, P, lowres=3)
    unet.levels = Cosine, Cosine
    batch = make_batch(2, 64) | make_lowres(2, 16)
    batch |= {"t": torch.ones(2), "lowres_t": torch.zeros(2), "lowres": batch["lowres"].clamp(-1, 1)}
    bicubic = torch.nn.functional.interpolate(batch["lowres"], (64, 64), mode="bicubic")
    assert (unet(**batch) + bicubic).abs().max() < 1e-5      # v = -x0 at t = 1
    g = torch.Generator().manual_seed(0)
    for t, level in ((0.02, 0.0), (0.3, 0.4), (0.7, 0.1), (0.98, 0.6)):
        (alpha, sigma), (a, s) = ([c[None] for c in Cosine.alpha_sigma(torch.tensor(u))] for u in (t, level))
        below = model.PIXEL**0.5 * torch.randn(1, 3, 200, 200, generator=g)
        x0 = below + model.DETAIL**0.5 * torch.randn(1, 3, 200, 200, generator=g)
        eps = torch.randn(1, 3, 200, 200, generator=g)
        noisy = a * below + s * torch.randn(1, 3, 200, 200, generator=g)
        x, known, gain = model.around(alpha * x0 + sigma * eps, noisy, (alpha, sigma), (a, s))
        assert x.std() == pytest.approx(1, abs=0.02)
        assert ((alpha * eps - sigma * x0 - known) / gain).std() == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_a_local_network_draws_a_crop_as_it_draws_the_whole():
    """No grid: away from the border of a crop, what is outside it does not count."""
    config = ModelConfig(32, (1,), (1,), (), head_dim=16, patch=4, efficient=True, conv_only=True)
    unet = make_unet(config, 256, lowres=3)
    batch = make_batch(1, 256) | make_lowres(1, 64)
    whole = unet(**batch)
    part = batch | {"x_t": batch["x_t"][..., 16:240, 16:240], "lowres": batch["lowres"][..., 4:60, 4:60]}
    inside = (unet(**part)[..., 96:128, 96:128] - whole[..., 112:144, 112:144]).abs().max()
    assert inside < 1e-4 < whole.std()
    plain = make_unet(ModelConfig(32, (1,), (1,), (), 16, 4, efficient=True), 256, lowres=3)
    far = (plain(**part)[..., 96:128, 96:128] - plain(**batch)[..., 112:144, 112:144]).abs().max()
    assert far > 1e-3                                        # norms, places and attention see the whole


def test_both_layouts_have_the_same_weights_and_the_efficient_one_less_work():
    shapes, flops = [], []
    for efficient in (False, True):
        with torch.device("meta"):
            config = ModelConfig(32, (1, 2, 4), (1, 2, 3), (), 32, 2, efficient=efficient)
            unet = UNet(config, 64, D, P, lowres=3)
            unet.levels, batch = (Cosine, Cosine), make_batch(1, 64) | make_lowres(1, 16)
            flops.append(model.count_flops(unet, **{k: v.to("meta") for k, v in batch.items()}))
        shapes.append({name: p.shape for name, p in unet.named_parameters()})
    assert shapes[0] == shapes[1]
    assert flops[1] < 0.95 * flops[0]


@pytest.mark.parametrize(("crop", "lowres", "local", "message"), [
    (0, 48, True, "--size 64 is not a multiple of --lowres 48. Try --lowres 16"),
    (0, 64, True, "--size 64 is not a multiple of --lowres 64. Try --lowres 16"),
    (32, 16, False, "--crop 32 is for a network that sees no whole picture. Add --conv-only"),
    (30, 16, True, "--crop 30 must be a multiple of 4 for this model. Try 28 or 32"),
    (128, 16, True, "--crop 128 is not a multiple of 4 up to 64. Try 16"),
    (36, 8, True, "--crop 36 is not a multiple of 8 up to 64. Try 16")])
def test_a_stage_that_cannot_be_is_named(crop, lowres, local, message):
    with pytest.raises(ValueError) as e:
        model.check_shape(ModelConfig(32, (1, 2), (1,), (), 16, 2, conv_only=local), 64, crop, lowres)
    assert str(e.value) == message


def test_a_warm_start_copies_slices_and_reports():
    wider = ModelConfig(32, (1, 4), (1,), (8,), 16, 2)
    old, new = make_unet(SMALL, seed=3), make_unet(wider, lowres=3, seed=4)
    tensors = old.state_dict() | {"gone": torch.zeros(2)}
    before = {name: p.clone() for name, p in new.state_dict().items()}
    report = model.warm_start(new, tensors, reinit="^null$")
    assert torch.equal(new.time[0].weight, old.time[0].weight)
    assert torch.equal(new.conv_in.weight[:, :24], old.conv_in.weight[:, :24])
    assert torch.equal(new.conv_in.weight[:, 24:], before["conv_in.weight"][:, 24:])
    assert torch.equal(new.null, before["null"])
    assert torch.equal(new.lowres_time[0].weight, before["lowres_time.0.weight"])
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (copied|sliced|new|unused)", report)}
    assert counts["copied"] + counts["sliced"] + counts["new"] == len(before)
    assert counts["unused"] == 1
    assert "unused: gone" in report


# --------------------------------------------------------------------------------------------- checkpoints

META = {"config": "{}", "step": "5"}


def make_state(muon: bool = False) -> model.State:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(2, 3))
    inside = torch.nn.Sequential(torch.nn.Conv2d(6, 4, 3), torch.nn.Linear(2, 5))
    inside.emb, inside.text_kv = torch.nn.Linear(6, 8), torch.nn.Linear(6, 12)
    net.unet = torch.nn.ModuleDict({"mid": inside})
    net.to(memory_format=torch.channels_last)
    return model.State(net, weight_decay=0.1, clip=1.0, ema_decay=0.75, fp16=False, muon=muon)


def update(state: model.State, step: int) -> None:
    g = torch.Generator().manual_seed(step)
    for p in state.weights:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g))
    state.update(0.05)


@pytest.mark.parametrize("muon", [False, True])
def test_training_goes_on_bit_for_bit_from_a_checkpoint(tmp_path, muon):
    straight, resumed = make_state(muon), make_state(muon)
    for step in range(6):
        if step == 3:
            save_checkpoint(tmp_path, step, resumed.tensors(), META, keep=1)
            resumed = make_state(muon)
            with torch.no_grad():
                resumed.weights[0].zero_()
            _, (train, ema), _ = load_checkpoint(tmp_path, ("train", "ema"))
            resumed.load(ema, train, {})
        for state in (straight, resumed):
            update(state, step)
    assert straight.tensors()["train"].keys() == resumed.tensors()["train"].keys()
    for name, tensors in straight.tensors().items():
        assert all(same_bits(t.detach(), resumed.tensors()[name][key].detach()) for key, t in tensors.items())
    for p, q in zip(straight.weights, resumed.weights):
        moments = [{x.stride() for x in state.optimizer.state[w].values() if x.ndim}
                   for state, w in ((straight, p), (resumed, q))]
        assert moments == [{p.stride()}] * 2


@pytest.mark.parametrize(("shape", "most"), [
    ((3, 32, 288), 2.1), ((2, 128, 512), 2.1), ((1, 40, 64), 2.1), ((2, 288, 32), 2.6)])   # last: skewed
def test_orthogonal_keeps_the_directions_and_evens_the_singular_values(shape, most):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(0, -1.5, shape[2])
    turned = model.orthogonal(x).float()
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    new = torch.linalg.svdvals(turned)
    assert (s[:, -1] < 0.5 * s[:, 0]).all()
    assert turned.shape == x.shape
    assert new.max() < most
    assert (new[:, -1] > 0.08 * new[:, 0]).all()
    assert (torch.cosine_similarity(turned.flatten(1), (u @ vt).flatten(1)) > 0.85).all()
    exact = s.double() / (1.01 * s.double().norm(dim=1, keepdim=True))         # what the passes make of each
    for a, b, c in model.PASSES:
        exact = a * exact + b * exact**3 + c * exact**5
    exact = u.double() * exact[:, None] @ vt.double()
    assert (turned - exact).norm() < 0.1 * exact.norm()                        # in bfloat16
    assert not model.orthogonal(torch.zeros(shape)).any()


def test_muon_moves_the_matrices_inside_the_unet_as_the_published_one(monkeypatch):
    monkeypatch.setattr(model, "PASSES", [(3.4445, -4.7750, 2.0315)] * 3)     # those of torch.optim.Muon
    state = make_state(muon=True)
    inside = {name: p for name, p in state.net.named_parameters() if name.startswith("unet.") and p.ndim > 1}
    assert set(inside) == {f"unet.mid.{name}.weight" for name in ("0", "1", "emb", "text_kv")}
    parts = {"unet.mid.emb.weight": 2, "unet.mid.text_kv.weight": 2}       # scale and shift; keys and values
    flat = lambda name, x: x.movedim(1, -1).flatten(1).chunk(parts.get(name, 1))
    twins = {name: [torch.nn.Parameter(part.detach().clone()) for part in flat(name, p)]
             for name, p in inside.items()}
    assert len(twins["unet.mid.text_kv.weight"]) == 2
    every = [twin for found in twins.values() for twin in found]
    muon = torch.optim.Muon(every, 0.05, weight_decay=0.1, ns_steps=3, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        update(state, step)                                    # of gradients of norm 1, after clipping
        g = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=g) for p in state.weights]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for p, grad in zip(state.weights, grads):
            for name in inside:
                if inside[name] is p:
                    for twin, part in zip(twins[name], flat(name, grad)):
                        twin.grad = part / norm
        muon.step()
    for name, p in inside.items():
        twin = torch.cat(list(twins[name]))
        assert (torch.cat(flat(name, p)) - twin).norm() / twin.norm() < 0.02, name    # bfloat16 inside


def test_size_tells_states_apart_and_is_infinite_where_one_weight_is_not_finite():
    state, other = make_state(), make_state()
    assert state.size() == other.size() < math.inf
    with torch.no_grad():
        other.weights[1][0] += 1e-3
        assert other.size() != state.size()
        other.averages[0][2][0][0, 0] = math.nan
    assert other.size() == math.inf


# ------------------------------------------------------------------------ averages, chosen after training


def response(updates, width):
    """What each update weighs in the power average: the power function between one and the next."""
    return np.diff((np.arange(updates + 1) / updates) ** (model.exponent(width) + 1))


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
    state = model.State(torch.nn.Linear(6, 5), 0.0, 0.0, 0.9, False, snapshots)
    history = []
    for step in range(1, updates + 1):
        for p in state.weights:
            p.grad = torch.randn_like(p) + 0.3 * math.sin(step / 20)
        state.update(0.02)
        history.append(state.net.weight.detach().double().clone())
        if step % every == 0:
            state.save(folder, step, {"config": "{}"}, keep=2)
    weight = lambda width: torch.from_numpy(response(updates, width))
    return state, lambda width: torch.einsum("n,nij->ij", weight(width), torch.stack(history))


def test_profiles_are_the_power_averages_of_all_updates(tmp_path):
    state, by_hand = drifting(tmp_path, every=1000)
    for width, average in state.profiles.items():
        torch.testing.assert_close(average[0].double(), by_hand(width), atol=2e-6, rtol=0)


WIDTHS = [(0.05, 1e-6), (0.1, 1e-6), (0.075, 0.01), (0.15, 0.02), (0.2, 0.05)]


@pytest.mark.parametrize(("width", "most"), WIDTHS)
def test_an_average_of_any_width_is_reconstructed_after_training(tmp_path, width, most):
    """Near the one that is tracked, compared with how far the others are from it."""
    state, by_hand = drifting(tmp_path)
    found, exact = model.reconstruct(tmp_path / "profiles", 200, width), by_hand(width)
    assert found.keys() == dict(state.net.named_parameters()).keys()
    assert not any(value.requires_grad for value in found.values())
    others = [(by_hand(other) - exact).norm() for other in (0.05, 0.1, 0.25) if other != width]
    assert (found["weight"] - exact).norm() < most * min(others) + 1e-6


def test_weights_that_stand_still_are_their_own_average(tmp_path):
    state = model.State(torch.nn.Linear(3, 2), 0.0, 0.0, 0.9, False, snapshots=4)
    for step in range(1, 41):
        for p in state.weights:
            p.grad = torch.zeros_like(p)
        state.update(0.1)
        if step % 5 == 0:
            state.save(tmp_path, step, {"config": "{}"}, keep=1)
    for width in (0.05, 0.08, 0.2):
        found = model.reconstruct(tmp_path / "profiles", 40, width, warn=lambda line: None)
        torch.testing.assert_close(found["weight"], state.net.weight.detach(), rtol=1e-5, atol=1e-6)


def test_snapshots_stay_few_and_even_and_the_newest_is_there(tmp_path):
    for step in range(10, 410, 10):
        model.save_snapshot(tmp_path, step, {"a": torch.zeros(1)}, step, most=5)
        kept = sorted(int(path.stem) for path in tmp_path.glob("*.safetensors"))
        assert len(kept) == min(5, step // 10)
        assert kept[-1] == step
        assert max(np.diff([0, *kept])) <= 3 * max(10, step / 5)
    assert [path.name for path in tmp_path.glob(".*")] == []
    model.save_snapshot(tmp_path, 200, {"a": torch.ones(1)}, 200, most=5)     # of a run that went back
    assert (tmp_path / "000400.safetensors").exists()


def test_an_average_that_cannot_be_made_is_one_line(tmp_path):
    drifting(tmp_path, snapshots=1, every=100)
    for folder, step, width in (("profiles", 199, 0.1), ("nowhere", 200, 0.1), ("profiles", 200, 0.3),
                                ("profiles", 200, 0.0), ("profiles", 200, math.nan)):
        with pytest.raises(ValueError) as error:
            model.reconstruct(tmp_path / folder, step, width)
        assert "\n" not in str(error.value)
    lines = []
    model.reconstruct(tmp_path / "profiles", 200, 0.02, lines.append)
    assert "1 snapshots give the average of width 0.02 with an error of" in lines[0]
    damaged = tmp_path / "profiles" / "000200.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"oops")
    with pytest.raises(ValueError, match="damaged"):
        model.reconstruct(tmp_path / "profiles", 200, 0.1)


def test_why_nothing_can_be_compiled_is_one_line(monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", broken)
    lines, net = [], torch.nn.Linear(2, 2)
    assert model.compiled(net, torch.device("cpu"), True, lines.append) is net
    assert lines == ["warning: torch.compile is unavailable (RuntimeError: no compiler); running uncompiled"]


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
            "half": torch.randn(5).bfloat16(), "step": torch.tensor(7.0), "none": torch.zeros(0, 3),
            "flags": torch.tensor([True, False]), "counts": torch.arange(3),
            "odd": torch.tensor([math.nan, -0.0, math.inf])}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


def save_steps(run: Path, steps, keep=9, **options) -> None:
    for step in steps:
        files = {"ema": {"a": torch.full((50,), float(step))}, "train": {"b": torch.ones(3)}}
        save_checkpoint(run, step, files, META | {"step": str(step)}, keep, **options)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = some_tensors()
    save_tensors(tmp_path / "x.safetensors", tensors, META)
    back, meta = load_tensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[name], t) for name, t in tensors.items())
    assert meta == {"format": model.FORMAT, **META, "sha256": meta["sha256"]}


def test_network_comes_back_bit_for_bit_and_in_its_memory_layout(tmp_path):
    unet, other = make_unet(), UNet(SMALL, SIZE, D, P)
    save_checkpoint(tmp_path, 5, {"ema": unet.state_dict()}, META, keep=1)
    _, (tensors,), _ = load_checkpoint(tmp_path)
    other.load_state_dict(tensors)
    for a, b in zip(unet.parameters(), other.parameters()):
        assert same_bits(a.detach(), b.detach())
        assert a.stride() == b.stride()
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(unet(**make_batch()), other(**make_batch()))


def test_checksum_covers_names_types_shapes_bytes_and_metadata():
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    variants = [base | {"a": torch.tensor([0, 0, 0, 1e-45])}, base | {"a": torch.zeros(2, 2)},
                base | {"a": torch.zeros(4, dtype=torch.int32)}, {"c": base["a"], "b": base["b"]},
                {"a": base["a"]}]
    sums = [model.checksum(tensors, META) for tensors in [base, *variants]]
    sums.append(model.checksum(base, META | {"step": "6"}))
    assert len(set(sums)) == len(sums)
    assert model.checksum(dict(reversed(base.items())), META) == sums[0]


def mutations(good: bytes) -> dict[str, bytes]:
    n = int.from_bytes(good[:8], "little")
    header = json.loads(good[8:8 + n])

    def rebuilt(**changes) -> bytes:
        text = json.dumps(header | changes).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + n:]

    weight = header["weight"]
    return {
        "empty": b"", "half": good[:len(good) // 2], "one byte": good[:1], "last byte missing": good[:-1],
        "appended": good + b"\0", "header longer than the file": (10**6).to_bytes(8, "little") + good[8:],
        "huge header": (2**62).to_bytes(8, "little") + good[8:], "zeroed end": good[:-64] + bytes(64),
        "overlapping": rebuilt(half=header["half"] | {"data_offsets": weight["data_offsets"]}),
        "huge shape": rebuilt(weight=weight | {"shape": [2**40, 2**20]}),
        "another type": rebuilt(weight=weight | {"dtype": "I32"}),
        "offsets outside": rebuilt(weight=weight | {"data_offsets": [0, 2**50]}),
        "not JSON": good[:8] + b"x" * n + good[8 + n:], "a picture": b"\x89PNG\r\n\x1a\n" + good,
        "swapped names": good.replace(b'"odd"', b'"ddo"'),
        "another step": good.replace(b'"step":"5"', b'"step":"6"'),
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "x.safetensors"
    save_tensors(path, some_tensors(), META)
    return path.read_bytes()


def refuse(path: Path, content: bytes) -> str:
    """The one line that loading `content` ends in."""
    path.write_bytes(content)
    with pytest.raises(ValueError) as e:
        load_tensors(path)
    assert len(str(e.value).splitlines()) == 1
    assert str(e.value).startswith(str(path))
    return str(e.value)


def test_a_mutated_file_is_refused_in_one_line(tmp_path, good):
    cases = mutations(good)
    assert len(cases) >= 12
    for name, content in cases.items():
        assert content != good, name
        line = refuse(tmp_path / "x.safetensors", content)
        assert "is damaged: " in line or "is not a checkpoint" in line, name


def test_a_flipped_bit_anywhere_is_refused_in_one_line(tmp_path, good):
    rng = random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    for i in range(200):                                     # half of them in the header
        content = bytearray(good)
        content[rng.randrange(header) if i % 2 else rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        refuse(tmp_path / "x.safetensors", bytes(content))


def test_missing_foreign_and_newer_files_are_named(tmp_path):
    save_file({"transformer.h.0": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "newer.safetensors", metadata={"format": "limn 99"})
    (tmp_path / "folder").mkdir()
    lines = {"foreign": "not a checkpoint of limn (first tensor: transformer.h.0)", "gone": "is missing",
             "newer": "has format limn 99, this code reads limn 1. Update the code"}
    for name, words in lines.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            load_tensors(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        load_tensors(tmp_path / "folder")


def test_a_checkpoint_is_published_in_the_order_that_survives_a_power_cut(tmp_path, monkeypatch):
    save_steps(tmp_path, [1], keep=1)
    calls, real_fsync, real_replace, real_rmtree = [], os.fsync, os.replace, model.shutil.rmtree

    def fsync(fd):
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        real_fsync(fd)

    def replace(a, b):
        calls.append(f"rename {Path(a).name} {Path(b).name}")
        real_replace(a, b)

    def rmtree(path, **options):
        calls.extend([f"rmtree {Path(path).name}"] * Path(path).exists())
        real_rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(model.shutil, "rmtree", rmtree)
    save_steps(tmp_path, [2], keep=1)
    part = f".tmp-{os.getpid()}-"
    assert calls == [*(call for name in ("ema.safetensors", "train.safetensors") for call in
                       (f"fsync {part}{name}", f"rename {part}{name} {name}", "fsync .tmp-000002")),
                     "rename .tmp-000002 000002", "fsync checkpoints", "rename 000001 .tmp-000001",
                     "rmtree .tmp-000001"]


def test_pruning_keeps_the_last_ones_and_none_of_a_later_run(tmp_path):
    save_steps(tmp_path, [10, 20, 30, 1000000], keep=2)
    assert [p.name for p in model.checkpoint_folders(tmp_path)] == ["000030", "1000000"]
    save_steps(tmp_path, [40, 50], keep=2)                   # behind 1000000: that one is not ours to remove
    assert [p.name for p in model.checkpoint_folders(tmp_path)] == ["000040", "000050", "1000000"]


def test_the_newest_checkpoint_that_verifies_is_chosen_and_damaged_ones_are_named(tmp_path):
    assert load_checkpoint(tmp_path) is None
    save_steps(tmp_path, [1, 2, 3, 4])
    checkpoints, lines = tmp_path / "checkpoints", []
    (checkpoints / "000004" / "ema.safetensors").unlink()
    damaged = checkpoints / "000003" / "train.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    folder, tensors, meta = load_checkpoint(tmp_path, ("train", "ema"), lines.append)
    assert (folder.name, meta["step"], tensors[1]["a"][0]) == ("000002", "2", 2)
    assert [line for line in lines if "\n" in line] == []
    assert "000004/ema.safetensors is missing" in lines[0]
    assert "000003/train.safetensors is damaged" in lines[1]
    assert load_checkpoint(tmp_path, ("ema",), lines.append)[0].name == "000003"     # its other file is whole


def test_all_damaged_is_an_error_and_no_new_start(tmp_path):
    save_steps(tmp_path, [1, 2])
    for path in tmp_path.rglob("ema.safetensors"):
        path.write_bytes(b"")
    lines = []
    with pytest.raises(ValueError, match=r"all 2 checkpoints in .* are damaged. Move them away"):
        load_checkpoint(tmp_path, warn=lines.append)
    assert len(lines) == 2


def test_leftovers_of_a_killed_save_are_ignored_and_replaced(tmp_path):
    save_steps(tmp_path, [1])
    leftover = tmp_path / "checkpoints" / ".tmp-000002"
    leftover.mkdir()
    (leftover / "ema.safetensors").write_bytes(b"half")
    (leftover / "other").write_bytes(b"")
    assert load_checkpoint(tmp_path)[0].name == "000001"
    save_steps(tmp_path, [2])
    assert not leftover.exists()
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "000002").iterdir()) == [
        "ema.safetensors", "train.safetensors"]


def test_saving_a_step_again_keeps_the_damaged_one_aside(tmp_path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "checkpoints" / "000002" / "ema.safetensors").write_bytes(b"torn")
    save_steps(tmp_path, [2])
    assert load_checkpoint(tmp_path)[0].name == "000002"
    aside, = (tmp_path / "checkpoints").glob("000002.damaged-*")
    assert (aside / "ema.safetensors").read_bytes() == b"torn"


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace", "mkdir", "second file"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch, where):
    save_steps(tmp_path, [1, 2], keep=1)
    before = listing(tmp_path)
    real, count, words = model.save_file, [], "I/O error: No space left on device (os error 28)"

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rust(tensors, path, metadata):                       # what safetensors raises, and no OSError
        count.append(path)
        if where == "second file" and len(count) == 1:
            return real(tensors, path, metadata)
        Path(path).write_bytes(b"half")
        raise model.SafetensorError(f"Error while serializing: {words}")

    with monkeypatch.context() as m:
        if where in ("save_file", "second file"):
            m.setattr(model, "save_file", rust)
        else:
            m.setattr(Path if where == "mkdir" else os, where, full)
        with pytest.raises(OSError) as e:
            save_steps(tmp_path, [3], keep=1)
    assert e.value.errno == errno.ENOSPC
    assert e.value.strerror == "No space left on device"
    assert listing(tmp_path) == before
    save_steps(tmp_path, [3], keep=1)
    assert load_checkpoint(tmp_path)[0].name == "000003"


def test_a_real_limit_of_the_file_size_leaves_everything_as_it_was(tmp_path):
    save_steps(tmp_path, [1])
    before, limits = listing(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    files = {"train": {"a": torch.ones(10)}, "ema": {"a": torch.ones(9999)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, 2, files, META, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_mode_follows_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, META)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~umask


def test_there_is_no_pickle():
    for name in ("train", "sample", "model", "diffusion", "data", "text_encoder"):
        source = (Path(model.__file__).parent / f"{name}.py").read_text()
        source = source.replace('torch.load(path, "cpu", weights_only=True, ', "")   # --allow-bin
        source = source.replace("safetensors.torch.", "")
        found = re.findall(r"pickle\.|import pickle|torch\.(load|save)\(|weights_only|allow_pickle=T", source)
        assert found == [], name
