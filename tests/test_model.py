"""model.py: what the network may and may not see, files that survive."""
import json
import math
import os
import random
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import model
from model import ModelConfig, UNet, load_checkpoint, load_tensors, save_tensors
from text_encoder import TextConfig, load_text_encoder

SMALL = ModelConfig(32, (1, 2), (1,), (8,), head_dim=16, patch=2)
WOVEN = replace(SMALL, weave_resolutions=(8, 4))
SIZE, L, D, P = 16, 12, 32, 20
streams = pytest.mark.parametrize("config", [SMALL, WOVEN, replace(WOVEN, weave_carried=True)])


def make_unet(config=SMALL, size=SIZE, seed=0, **options) -> UNet:
    """A network whose zero-initialised layers have been moved away from zero, as training does."""
    torch.manual_seed(seed)
    unet = UNet(config, size, D, P, **options)
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


def make_written(batch=3, tokens=(4, 0, 6), seed=5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"transcription_context": torch.randn(batch, 8, 64, generator=g),
            "transcription_mask": torch.arange(8) < torch.tensor(tokens[:batch])[:, None],
            "transcription_pooled": torch.randn(batch, 64, generator=g)}


def test_each_process_has_a_gpu_of_its_own_or_none_starts(monkeypatch):
    """Three by torchrun on two GPUs end alike, in a line, whether they train or draw."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    assert model.choose_device("") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert model.choose_device("") == torch.device("cuda:1")
    assert model.choose_device("cpu") == torch.device("cpu")
    for rank in "012":
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        with pytest.raises(ValueError, match=r"^3 ranks do not have a GPU each. Use --nproc-per-node 2$"):
            model.choose_device("cuda")


@pytest.mark.parametrize(("config", "size", "out"), [
    (SMALL, 16, 3), (ModelConfig(32, (1, 2), (1,), (16,), 16, 2), 32, 6),
    (ModelConfig(32, (1,), (1,), (), 32, 1), 8, 3), (ModelConfig(32, (1, 1, 2), (2,), (16, 4), 8, 1), 16, 3),
    (ModelConfig(128, (1, 1), (1,), (8,), 64, 4, 256), 64, 3)])
def test_shapes_are_those_of_the_docstring(config, size, out):
    y = make_unet(config, size, learn_sigma=out == 6)(**make_batch(2, size))
    assert y.shape == (2, out, size, size)
    assert y.dtype == torch.float32
    assert y.isfinite().all()


def test_output_is_zero_at_the_start():
    assert not UNet(SMALL, SIZE, D, P)(**make_batch()).any()


def test_time_embedding_is_bounded_and_tells_times_apart():
    t = torch.linspace(0, 1, 1001)
    e = model.waves(1000 * t, 64)
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
        condition = encoder.encode([prompts[i] for i in rows], torch.device("cpu"))
        return unet(noisy["x_t"][rows], noisy["t"][rows], **condition)

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
    captions = ["a red house left of a green tree", "a green tree left of a red house"]
    assert sorted(captions[0]) == sorted(captions[1])                 # the same letters
    a, b = unet(**noisy, **text.encode(captions, torch.device("cpu")))
    assert (a - b).abs().max() > 1e-2
    context, mask, pooled = text.encode(captions[:1], torch.device("cpu")).values()   # to the U-Net, a set
    order = torch.cat([torch.randperm(int(mask.sum())), torch.arange(int(mask.sum()), 40)])
    one = {k: v[:1] for k, v in noisy.items()}
    assert (unet(**one, context=context[:, order], mask=mask, pooled=pooled)
            - unet(**one, context=context, mask=mask, pooled=pooled)).abs().max() < 1e-5


@pytest.mark.parametrize("config", [SMALL, WOVEN])
def test_bfloat16_is_near_float32(config):
    unet, batch = make_unet(config, written_dim=64), make_batch() | make_written()
    plain = unet(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        low = unet(**batch)
        low.square().mean().backward()
    assert low.dtype == torch.float32
    assert (low - plain).square().mean().sqrt() < 0.03 * plain.std()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in unet.parameters())


@pytest.mark.parametrize("config", [SMALL, replace(WOVEN, weave_carried=True)])
def test_activation_checkpointing_gives_the_plain_gradient(config):
    unet, batch, gradients = make_unet(config, written_dim=64), make_batch() | make_written(), []
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
    config = replace(SMALL, weave_resolutions=(4,), weave_carried=True)
    compiled, counts = make_unet(config, written_dim=64), []

    def count(graph, inputs):
        counts.append(len(inputs))
        return graph

    torch._dynamo.reset()
    run = torch.compile(compiled, backend=count, fullgraph=True)
    for seed, tokens in enumerate([(5, 12, 1), (0, 0, 0), (12, 12, 12)]):
        run(**make_batch(tokens=tokens, seed=seed), **make_written(tokens=tokens)).sum().backward()
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
                                     "Choose from [16, 8]"),
    ({"weave_resolutions": (7,)}, 64, "--weave-resolutions 7 is not a side of a feature map here. "
                                      "Choose from [16, 8]"),
    ({"weave_resolutions": (8,), "conv_only": True}, 64,
     "--weave-resolutions (8,) is for whole pictures. Leave --conv-only away")])
def test_a_shape_that_cannot_be_built_is_named(options, size, message):
    with pytest.raises(ValueError) as e:
        UNet(ModelConfig(**{"channels": 64, "channel_mult": (1, 2), "patch": 4, **options}), size, D, P)
    assert str(e.value) == message


LOCAL = ModelConfig(32, (1, 2), (1, 2), (), head_dim=16, patch=2, efficient=True, conv_only=True)
def test_a_block_of_ones_own_is_told_what_residual_blocks_are(monkeypatch):
    """As the README says: a module that takes (x, emb), appended in UNet.stage."""
    class Doubled(torch.nn.Module):
        def forward(self, x, emb):
            assert emb.shape == (3, SMALL.emb_dim)
            return 2 * x

    real = UNet.stage

    def stage(self, *args, **named):
        blocks = real(self, *args, **named)
        blocks.append(Doubled())
        return blocks

    plain = make_unet()(**make_batch())
    monkeypatch.setattr(UNet, "stage", stage)
    assert not torch.allclose(make_unet()(**make_batch()), plain)
    clip = make_clip()
    assert clip(*[make_batch()[name] for name in ("x_t", "t")]).isfinite().all()


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
            batch = make_batch(1, 64) | make_lowres(1, 16)
            with FlopCounterMode(display=False) as counter:
                unet(**{k: v.to("meta") for k, v in batch.items()})
            flops.append(counter.get_total_flops())
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


META = {"config": "{}", "step": "5"}
def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
            "half": torch.randn(5).bfloat16(), "step": torch.tensor(7.0), "none": torch.zeros(0, 3),
            "flags": torch.tensor([True, False]), "counts": torch.arange(3),
            "odd": torch.tensor([math.nan, -0.0, math.inf])}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


def save_steps(run: Path, steps) -> None:
    for step in steps:
        folder = run / "checkpoints" / f"{step:06d}"
        folder.mkdir(parents=True)
        files = {"ema": {"a": torch.full((50,), float(step))}, "train": {"b": torch.ones(3)}}
        for name, tensors in files.items():
            save_tensors(folder / f"{name}.safetensors", tensors, META | {"step": str(step)})


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = some_tensors()
    save_tensors(tmp_path / "x.safetensors", tensors, META)
    back, meta = load_tensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[name], t) for name, t in tensors.items())
    assert meta == {"format": model.FORMAT, **META, "sha256": meta["sha256"]}


def test_network_comes_back_bit_for_bit_and_in_its_memory_layout(tmp_path):
    unet, other = make_unet(), UNet(SMALL, SIZE, D, P)
    save_tensors(tmp_path / "x.safetensors", unet.state_dict(), META)
    tensors, _ = load_tensors(tmp_path / "x.safetensors")
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
    with pytest.raises(ValueError, match=r"is no file\. Name a run directory, a checkpoint folder or a file"):
        load_tensors(tmp_path / "folder")


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


def test_files_of_different_steps_are_no_checkpoint(tmp_path):
    save_steps(tmp_path, [4, 6])
    newest = tmp_path / "checkpoints/000006"
    (newest / "train.safetensors").write_bytes((tmp_path / "checkpoints/000004/train.safetensors").read_bytes())  # noqa: E501
    lines = []
    folder, _, _ = load_checkpoint(tmp_path, ("train", "ema"), lines.append)
    assert folder.name == "000004"
    assert "000006 has files of different steps" in lines[0]


def test_checkpoints_that_may_not_be_looked_at_are_not_missing_ones(tmp_path, monkeypatch):
    save_steps(tmp_path, [4])

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(PermissionError):
        load_checkpoint(tmp_path)


# ---------------------------------------------------------------------------------------------------- CLIP


def make_clip(config=SMALL, size=SIZE) -> model.CLIP:
    """As make_unet."""
    torch.manual_seed(0)
    clip = model.CLIP(config, size, D, P)
    with torch.no_grad():
        for p in clip.parameters():
            p += 0.1 * torch.randn_like(p)
    return clip.requires_grad_(False)


@pytest.mark.parametrize(("config", "size"), [
    (SMALL, 16), (ModelConfig(32, (1, 2, 2), (1, 1, 2), (8,), 16, 1, efficient=True), 16),
    (ModelConfig(32, (1, 2), (1,), (8,), 16, 2, conv_only=True), 32)])
def test_both_towers_of_a_clip_give_features_of_unit_length(config, size):
    clip, batch = make_clip(config, size), make_batch(3, size)
    x_t, t = batch.pop("x_t"), batch.pop("t")
    seen, read = clip(x_t, t), clip.read(**batch)
    for features in (seen, read):
        assert (features.shape, features.dtype) == ((3, config.emb_dim), torch.float32)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
        assert torch.pdist(features).min() > 0.01
    assert (clip(x_t, 1 - t) - seen).norm(dim=1).min() > 0.01                 # it knows how noisy they are
    assert (clip(x_t.flip(3), t) - seen).norm(dim=1).min() > 0.001            # and where things are
    for i in range(3):
        torch.testing.assert_close(clip(x_t[i:i + 1], t[i:i + 1]), seen[i:i + 1], atol=1e-5, rtol=0)


def test_a_clip_reads_captions_without_their_padding_and_absent_ones_alike():
    clip, batch = make_clip(), make_batch()
    text = {name: batch[name] for name in ("context", "mask", "pooled")}
    read = clip.read(**text)
    hidden = text | {"context": torch.where(text["mask"][..., None], text["context"], 50.0)}
    torch.testing.assert_close(clip.read(**hidden), read, atol=1e-5, rtol=0)
    longer = {"context": torch.cat([text["context"], torch.randn(3, 8, D)], 1),
              "mask": torch.nn.functional.pad(text["mask"], (0, 8)), "pooled": text["pooled"]}
    torch.testing.assert_close(clip.read(**longer), read, atol=1e-5, rtol=0)
    absent = clip.read(**text | {"mask": torch.zeros(3, L, dtype=torch.bool)})
    assert absent.isfinite().all()
    torch.testing.assert_close(absent, absent[:1].expand(3, -1), atol=1e-5, rtol=0)


def test_the_scale_of_a_clip_starts_at_the_published_one_and_stays_below_100():
    clip = model.CLIP(SMALL, SIZE, D, P)
    assert clip.scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    for logit, scale in ((-9.0, 0.0123), (3.0, 95.26), (1e4, 100.0)):
        torch.nn.init.constant_(clip.scale_logit, logit)
        assert clip.scale().item() == pytest.approx(scale, rel=1e-2)


def test_the_tower_of_a_clip_is_the_unet_down_to_its_middle():
    """By name and shape: what it has beside it are the pools, the last norm and the scale."""
    of_unet, of_clip = (
        {name: tuple(value.shape) for name, value in net.state_dict().items()}
        for net in (UNet(SMALL, SIZE, D, P), model.CLIP(SMALL, SIZE, D, P)))
    own = {name.split(".")[0] for name in of_clip if of_clip[name] != of_unet.get(name)}
    assert own <= {"picture_pool", "text_pool", "norm_out", "scale_logit"}
    assert {name.split(".")[0] for name in of_unet.keys() - of_clip.keys()} == {"up", "conv_out"}
    assert not any("up." in name for name in of_clip)


def test_a_pool_is_attention_of_a_guess_to_all():
    """Against torch's own attention, of the same weights, whose answer is added to the guess."""
    torch.manual_seed(0)
    pool, theirs = model.AttentionPool(32, 16, 24, 8), torch.nn.MultiheadAttention(
        32, 2, kdim=24, vdim=24, batch_first=True)
    torch.nn.init.zeros_(theirs.in_proj_bias)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(pool.to_q.weight)
        theirs.k_proj_weight.copy_(pool.to_k.weight)
        theirs.v_proj_weight.copy_(pool.to_v.weight)
        theirs.out_proj.weight.copy_(pool.to_out[0].weight)
        theirs.out_proj.bias.copy_(pool.to_out[0].bias)
    guess, others = torch.randn(3, 32), torch.randn(3, 5, 24)
    hidden = torch.tensor([[False] * 5, [True] + [False] * 4, [False, False, True, True, False]])
    bias = torch.zeros(3, 1, 1, 5).masked_fill(hidden[:, None, None], -math.inf)
    answer, _ = theirs(guess[:, None], others, others, key_padding_mask=hidden)
    expected = torch.nn.functional.normalize(pool.head(guess + answer[:, 0]), dim=1)
    torch.testing.assert_close(pool(guess, others, bias), expected)


# ---------------------------------------------------------------------- published networks, against diffusers
ROOT = Path(model.__file__).parent
TAEF2 = ROOT.parent / "shared" / "data" / "taef2"
CLIPART = ROOT.parent / "shared" / "data" / "clipart"
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def shake(net: torch.nn.Module) -> torch.nn.Module:
    """Weights as large as trained ones, so that no branch is near zero."""
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape) / math.sqrt(p[0].numel()))
            else:
                p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def shapes_of(net: torch.nn.Module) -> dict:
    return {name: p.shape for name, p in net.state_dict().items()}


def random_unet(seed: int) -> dict:
    rng = random.Random(seed)
    levels = rng.randint(1, 4)
    cross = [rng.random() < 0.6 for _ in range(levels)]
    each = lambda values: rng.choice([rng.choice(values), [rng.choice(values) for _ in range(levels)]])
    groups = rng.choice([2, 4, 8])
    config = {
        "in_channels": rng.choice([4, 16]),
        "block_out_channels": [rng.choice([16, 24, 32]) for _ in range(levels)],
        "down_block_types": [(CROSS if c else PLAIN).format("Down") for c in cross],
        "up_block_types": [(CROSS if c else PLAIN).format("Up") for c in reversed(cross)],
        "layers_per_block": each([1, 2]), "attention_head_dim": each([1, 2, 4]),
        "transformer_layers_per_block": each([1, 2]), "cross_attention_dim": rng.choice([12, 20]),
        "use_linear_projection": rng.random() < 0.5, "norm_num_groups": groups,
        "norm_eps": rng.choice([1e-5, 1e-3]),
        "sample_size": 8, "upcast_attention": rng.random() < 0.5}
    config["out_channels"] = config["in_channels"]
    if rng.random() < 0.4:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                   "projection_class_embeddings_input_dim": 6 * 8 + 10}
    return config


def unet_inputs(config: dict, height: int = 16, width: int = 24, batch: int = 2) -> dict[str, torch.Tensor]:
    timestep = torch.tensor([999, 3][:batch])
    return {"x_t": torch.randn(batch, config["in_channels"], height, width), "t": (timestep + 1) / 1000,
            "context": torch.randn(batch, 7, config["cross_attention_dim"]),
            "mask": torch.ones(batch, 7, dtype=torch.bool), "pooled": torch.randn(batch, 10)}


def published_unet(theirs, inputs: dict, sizes=None) -> torch.Tensor:
    """What diffusers' U-Net says of the same."""
    x_t, timestep = inputs["x_t"], (1000 * inputs["t"] - 1).round().long()
    if sizes is None:
        sizes = torch.tensor([8 * n for n in x_t.shape[-2:]])
        sizes = torch.cat([sizes, torch.zeros(2), sizes]).repeat(len(x_t), 1)
    added = {"text_embeds": inputs["pooled"], "time_ids": sizes}
    return theirs(x_t, timestep, inputs["context"], added_cond_kwargs=added).sample


@torch.no_grad()
@pytest.mark.parametrize("seed", range(20))
def test_the_published_unet_says_what_diffusers_says_and_goes_there_and_back(tmp_path, seed):
    from diffusers import UNet2DConditionModel
    torch.manual_seed(seed)
    config = random_unet(seed)
    theirs = shake(UNet2DConditionModel(**config))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB" if seed % 4 == 0 else "1GB")
    ours = model.load_unet(tmp_path / "theirs")
    inputs = unet_inputs(config, *[(16, 24), (17, 9)][seed % 2])
    expected = published_unet(theirs, inputs)
    assert (ours(**inputs) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    assert expected.std() > 0.05

    model.save_published(tmp_path / "ours", ours)
    back = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(published_unet(back, inputs), expected)


@torch.no_grad()
def test_sizes_of_the_published_unet_are_those_of_diffusers():
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    config = {"block_out_channels": [16],
              "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
              "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 2,
              "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
              "projection_class_embeddings_input_dim": 58}
    theirs = shake(UNet2DConditionModel(**config))
    ours = model.UNet2DConditionModel(config)
    ours.load_state_dict(theirs.state_dict())
    inputs = unet_inputs(config | {"in_channels": 4})
    sizes = torch.tensor([[768., 1024, 0, 12, 512, 512], [64, 64, 3, 0, 64, 64]])
    outputs = [ours(**inputs, sizes=sizes), ours(**inputs)]
    assert (outputs[0] - published_unet(theirs, inputs, sizes)).abs().max() <= 1e-5
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "more"), [("sd15", {}), ("sd21", {"upcast_attention": True}), ("sdxl", {})])
def test_full_layouts_have_the_names_and_shapes_of_diffusers(name, more):
    from diffusers import UNet2DConditionModel
    config = model.UNETS[name] | {"addition_time_embed_dim": 256,
                                  "projection_class_embeddings_input_dim": 2816}
    with torch.device("meta"):
        ours, theirs = model.UNet2DConditionModel(config | more), UNet2DConditionModel(**config | more)
    assert shapes_of(ours) == shapes_of(theirs)
    assert all(number in (1, 2) for number in ours.matrices().values())


def small_unet(**more) -> model.UNet2DConditionModel:
    config = {"block_out_channels": [16, 32],
              "down_block_types": [CROSS.format("Down"), PLAIN.format("Down")],
              "up_block_types": [PLAIN.format("Up"), CROSS.format("Up")], "layers_per_block": 1,
              "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 2}
    torch.manual_seed(0)
    return model.UNet2DConditionModel(config, **more)


def test_a_published_unet_from_scratch_predicts_zero_and_every_query_learns_after_a_step():
    net = small_unet()
    inputs = unet_inputs(net.config)
    assert not net(**inputs).any()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (net(**inputs) - inputs["x_t"]).square().mean().backward()
        optimizer.step()
    queries = [p.grad.abs().mean() for name, p in net.named_parameters() if "to_q" in name]
    assert min(queries) > 0


def test_checkpointing_a_published_unet_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        net = shake(small_unet())
        net.checkpointing = checkpointing
        net(**unet_inputs(net.config)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        torch.manual_seed(0)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients)


@torch.no_grad()
def test_captions_that_are_not_told_are_the_empty_prompt():
    net = shake(small_unet())
    inputs = unet_inputs(net.config)
    empty = torch.randn(1, 7, 12)
    plain, unconditional = net(**inputs), net(**inputs | {"context": empty.expand(2, -1, -1)})
    net.empty = empty, torch.zeros(1, 10)
    inputs["mask"][1] = False
    out = net(**inputs)
    assert torch.equal(out[0], plain[0])
    assert torch.equal(out[1], unconditional[1])


@torch.no_grad()
def test_an_adapter_to_another_text_encoder_masks_has_a_null_and_survives_the_export(tmp_path):
    from diffusers import UNet2DConditionModel
    net = shake(small_unet(text_dim=9, pooled_dim=5))
    inputs = unet_inputs(net.config) | {"context": torch.randn(2, 7, 9)}
    inputs["mask"][0, 4:] = False
    inputs["mask"][1] = False
    out = net(**inputs)
    padded = inputs["context"].clone()
    padded[0, 4:] = 50
    padded[1] = 50
    assert torch.equal(net(**inputs | {"context": padded}), out)
    padded[0, 3] = 50
    assert (net(**inputs | {"context": padded}) - out)[0].abs().max() > 1e-3

    model.save_published(tmp_path, net)
    back = model.load_unet(tmp_path, text_dim=9, pooled_dim=5)
    assert torch.equal(back(**inputs), out)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path)
    assert theirs.state_dict().keys() == {name for name in net.state_dict() if "adapter" not in name}
    with pytest.raises(ValueError, match="Name the text encoder that it was trained with, or move this file"):
        model.load_unet(tmp_path, text_dim=48)


def random_vae(seed: int) -> dict:
    rng = random.Random(seed)
    levels = rng.randint(1, 3)
    return {"block_out_channels": [rng.choice([8, 16, 24]) for _ in range(levels)],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": rng.randint(1, 2), "latent_channels": rng.choice([4, 16]),
            "norm_num_groups": rng.choice([2, 4, 8]), "scaling_factor": rng.choice([0.18215, 1.5305]),
            "shift_factor": rng.choice([None, 0.0609]), "use_quant_conv": rng.random() < 0.5,
            "use_post_quant_conv": rng.random() < 0.5, "mid_block_add_attention": rng.random() < 0.8}


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def with_old_names(folder: Path) -> None:
    """The names that VAEs were saved with until 2023."""
    path = folder / "diffusion_pytorch_model.safetensors"
    with model.safe_open(path, "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}                   # noqa: SIM118
    for new, old in OLD.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)


def pictures_of_noise(batch=2, height=24, width=16) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(20))
def test_the_vae_says_what_diffusers_says(tmp_path, seed):
    from diffusers import AutoencoderKL
    torch.manual_seed(seed)
    config = random_vae(seed)
    theirs = shake(AutoencoderKL(**config))
    theirs.save_pretrained(tmp_path)
    if seed % 2:
        with_old_names(tmp_path)
    space = model.load_vae(tmp_path)
    assert (space.channels, space.limit) == (config["latent_channels"], None)
    assert space.scale == 2 ** (len(config["block_out_channels"]) - 1)
    assert not any(p.requires_grad for p in space.parameters())

    pictures = pictures_of_noise()
    shift, scaling = config["shift_factor"] or 0, config["scaling_factor"]
    mean = theirs.encode(pictures / 127.5 - 1).latent_dist.mean
    x0 = space.encode(pictures)
    assert (x0 - (mean - shift) * scaling).abs().max() <= 1e-5 * max(1, x0.abs().max())
    picture = theirs.decode(x0 / scaling + shift).sample
    assert (space.picture(x0 / scaling + shift) - picture).abs().max() <= 1e-5 * max(1, picture.abs().max())
    expected = ((picture.clamp(-1, 1) + 1) * 127.5).round()
    assert (space.decode(x0) - expected).abs().max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("channels", [4, 16])
def test_the_tiny_vae_says_what_diffusers_says(tmp_path, channels):
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    theirs = AutoencoderTiny(latent_channels=channels,
                             num_encoder_blocks=[1, 2, 1], num_decoder_blocks=[2, 1, 1],
                             encoder_block_out_channels=[64] * 3, decoder_block_out_channels=[64] * 3)
    theirs.save_pretrained(tmp_path)
    space = model.load_vae(tmp_path)
    pictures = pictures_of_noise()
    x0 = space.encode(pictures)
    assert (space.scale, x0.shape) == (4, (2, channels, 6, 4))
    assert (x0 - theirs.encode(pictures / 127.5 - 1).latents).abs().max() <= 1e-5
    assert (space.picture(x0) - theirs.decode(x0).sample).abs().max() <= 1e-5


def test_a_published_full_vae_has_the_names_of_diffusers():
    from diffusers import AutoencoderKL
    config = {"block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
              "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2}
    with torch.device("meta"):
        ours, theirs = model.AutoencoderKL(config), AutoencoderKL(**config)
    assert shapes_of(ours) == shapes_of(theirs)


def test_a_vae_in_bfloat16_is_near_and_has_another_fingerprint(tmp_path):
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    AutoencoderTiny(num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1], encoder_block_out_channels=[64] * 2,
                    decoder_block_out_channels=[64] * 2).save_pretrained(tmp_path, variant="fp16")
    spaces = [model.load_vae(tmp_path, dtype) for dtype in ("fp32", "bf16")]
    x0, near = (space.encode(pictures_of_noise()) for space in spaces)
    assert near.dtype == torch.float32
    assert spaces[0].fingerprint != spaces[1].fingerprint
    torch.manual_seed(0)
    assert spaces[0].decode(x0).dtype == torch.uint8
    with pytest.raises(ValueError, match="17x16 pixels: not multiples of 2"):
        spaces[0].encode(pictures_of_noise(1, 16, 17))


@pytest.mark.skipif(not (TAEF2.exists() and CLIPART.exists()), reason="the real TAEF2 is not there")
def test_taef2_gives_real_pictures_back_and_tiles_leave_no_seam():
    import io
    import tarfile

    import numpy as np
    from PIL import Image
    with tarfile.open(sorted(CLIPART.glob("*.tar"))[0]) as tar:
        names = [name for name in tar.getnames() if name.endswith(".webp")][:8]
        opened = [Image.open(io.BytesIO(tar.extractfile(name).read())).convert("RGB") for name in names]
    pictures = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in opened])
    space = model.load_vae(TAEF2)
    x0 = space.encode(pictures)
    back = space.decode(x0)
    assert x0.shape == (8, 32, 32, 32)
    assert 0.5 < x0.std() < 0.9
    error = (back.double() - pictures).square().mean((1, 2, 3)) / 255**2
    assert (-10 * error.log10()).mean() > 34                  # dB

    whole = space.picture
    space.tile = 192
    space.picture = short_of_memory(whole, 192 * 192)
    tiled = space.decode(x0[:2])
    difference = (tiled.double() - back[:2]).abs()
    assert tiled.shape == back[:2].shape
    assert difference.mean() < 2                              # its norms see a tile alone
    steps = []
    for picture in (tiled.double(), back[:2].double()):
        steps.append((picture[..., 1:] - picture[..., :-1]).abs().mean((0, 1, 2)))
    borders = [63, 191]                                       # where the squares begin and end
    assert (steps[0] - steps[1])[borders].max() < 0.3         # no column jumps more than before


def short_of_memory(picture, pixels):
    """The way back of a VAE where no more than so many pixels at eight a position fit into memory."""
    def short(z):
        if len(z) * z.shape[-1] * z.shape[-2] * 64 > pixels:
            raise torch.OutOfMemoryError("no room")
        return picture(z)
    return short


@pytest.mark.parametrize("room", [1, 2, 8])
def test_what_does_not_fit_into_memory_is_decoded_one_by_one_then_in_tiles(tmp_path, room):
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    AutoencoderTiny(num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1], encoder_block_out_channels=[64] * 2,
                    decoder_block_out_channels=[64] * 2).save_pretrained(tmp_path)
    space = model.load_vae(tmp_path)
    z = torch.randn(2, 4, 60, 60)
    whole = space.decode(z)
    calls = []
    inside = short_of_memory(space.picture, room * 64 * 48 * 48)

    def picture(part):
        calls.append(tuple(part.shape[::2]))
        return inside(part)

    space.picture, space.tile = picture, 80
    assert (space.decode(z).int() - whole.int()).abs().max() <= 1
    alone = [(2, 60), (1, 60), (1, 60)]
    tiles = [(1, 40)] * 4
    assert calls == {1: [(2, 60), (1, 60), *tiles, (1, 60), *tiles], 2: alone, 8: [(2, 60)]}[room]


def test_tiles_give_the_whole_where_nothing_is_global(tmp_path):
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    AutoencoderTiny(num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1], encoder_block_out_channels=[64] * 2,
                    decoder_block_out_channels=[64] * 2).save_pretrained(tmp_path)
    space = model.load_vae(tmp_path)
    z = torch.randn(1, 4, 50, 70)
    whole = space.picture(z)
    space.tile = 80
    assert (space.tiles(z) - whole).abs().max() < 1e-3 < whole.std()
    space.tile = 1000
    assert (space.tiles(z) - whole).abs().max() < 1e-5


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Folders of a small U-Net and a small VAE."""
    root = tmp_path_factory.mktemp("published")
    model.save_published(root / "unet", small_unet())
    config = random_vae(3)
    model.save_published(root / "vae", model.AutoencoderKL(config))
    return root


def edit_config(folder: Path, to: Path, change) -> Path:
    """A folder like another, with config.json changed: a dict is merged, text replaces it."""
    to.mkdir()
    weights = next(folder.glob("*.safetensors"))
    (to / weights.name).symlink_to(weights)
    text = change
    if isinstance(change, dict):
        text = json.dumps(json.loads((folder / "config.json").read_text()) | change)
    (to / "config.json").write_text(text)
    return to


WRONG_UNETS = [
    ({"_class_name": "ControlNetModel"}, "'ControlNetModel', not UNet2DConditionModel"),
    ({"_class_name": ["x"]}, "not UNet2DConditionModel"),
    ({"in_channels": 9}, "inpainting"),
    ({"block_out_channels": [16, 10**30]}, "block_out_channels is"),
    ({"block_out_channels": [[16], 32]}, "block_out_channels is"),
    ({"block_out_channels": []}, "block_out_channels is"),
    ({"block_out_channels": None}, "block_out_channels is"),
    ({"block_out_channels": [17, 32]}, "config.json does not fit this code (widths"),
    ({"block_out_channels": [16] * 9}, "block_out_channels is"),
    ({"down_block_types": ["DownBlock2D"]}, "does not fit"),
    ({"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "KDownBlock2D"),
    ({"layers_per_block": 10**6}, "layers_per_block is 1000000"),
    ({"layers_per_block": True}, "layers_per_block is True"),
    ({"transformer_layers_per_block": [[1], [1]]}, "transformer_layers_per_block is"),
    ({"attention_head_dim": 3}, "(the number of heads) must divide"),
    ({"norm_num_groups": "4"}, "norm_num_groups is '4'"),
    ({"norm_eps": float("nan")}, "norm_eps is nan"),
    ({"cross_attention_dim": 0}, "cross_attention_dim is 0"),
    ({"cross_attention_dim": 13}, "does not fit"),
    ({"encoder_hid_dim": 7}, "'encoder_hid_dim' is 7"),
    ({"class_embed_type": "timestep"}, "'class_embed_type' is 'timestep'"),
    ({"flip_sin_to_cos": False}, "'flip_sin_to_cos' is False"),
    ({"act_fn": "mish"}, "'act_fn' is 'mish'"),
    ({"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
    ({"a\nb": 1}, r"'a\nb' is 1"),
    ("[1]", "not an object"), ("[" * 10**5, "does not fit"), ("{", "does not fit"), ("\x00", "does not fit"),
    ('{"_class_name": 1' + "0" * 5000 + "}", "does not fit"),
]


@pytest.mark.parametrize(("change", "words"), WRONG_UNETS)
def test_a_config_that_cannot_be_is_one_line(tmp_path, published, change, words):
    folder = edit_config(published / "unet", tmp_path / "x", change)
    with pytest.raises(ValueError) as e:
        model.load_unet(folder)
    assert words in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 400 + len(str(folder))


@pytest.mark.parametrize(("change", "words"), [
    ({"_class_name": "AsymmetricAutoencoderKL"}, "not AutoencoderKL or AutoencoderTiny"),
    ({"latent_channels": -4}, "latent_channels is -4"), ({"scaling_factor": 0}, "scaling_factor is 0"),
    ({"latents_mean": [0, 1]}, "'latents_mean' is [0, 1]"), ({"in_channels": 4}, "'in_channels' is 4"),
    ({"use_quant_conv": "yes"}, "use_quant_conv is 'yes'")])
def test_a_vae_config_that_cannot_be_is_one_line(tmp_path, published, change, words):
    with pytest.raises(ValueError) as e:
        model.load_vae(edit_config(published / "vae", tmp_path / "x", change))
    assert words in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_weights_that_do_not_fit_are_one_line(tmp_path, published):
    source = published / "unet"
    with model.safe_open(next(source.glob("*.safetensors")), "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}                   # noqa: SIM118
    name, weight = "conv_in.weight", tensors["conv_in.weight"]
    cases = {
        "missing": ({n: t for n, t in tensors.items() if n != name}, "conv_in.weight is missing"),
        "extra": (tensors | {"lora\nup": weight}, "lora up is (16, 4, 3, 3), the configuration has missing"),
        "shape": (tensors | {name: weight[:8].clone()},
                  "conv_in.weight is (8, 4, 3, 3), the configuration has (16, 4"),
        "finite": (tensors | {name: weight / 0}, "is not finite or quantised"),
        "quantised": (tensors | {name: weight.to(torch.int8)}, "is not finite or quantised"),
        "of 8 bits": (tensors | {name: weight.to(torch.float8_e4m3fn)}, "is not finite or quantised"),
    }
    for case, (changed, words) in cases.items():
        folder = tmp_path / case
        folder.mkdir()
        (folder / "config.json").write_text((source / "config.json").read_text())
        path = folder / "diffusion_pytorch_model.safetensors"
        save_file({n: t.clone() for n, t in changed.items()}, path)
        with pytest.raises(ValueError) as e:
            model.load_unet(folder)
        assert words in str(e.value), case
        assert len(str(e.value).splitlines()) == 1
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged"):
        model.load_unet(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model.* \(found: config.json\)"):
        model.load_unet(folder)
    with pytest.raises(ValueError, match=r"config\.json is"):
        model.load_unet(tmp_path)


def test_a_huge_config_costs_no_memory(tmp_path, published):
    huge = {"block_out_channels": [64000, 64000], "cross_attention_dim": 64000}
    with pytest.raises(ValueError, match="does not fit"):
        model.load_unet(edit_config(published / "unet", tmp_path / "x", huge))


# ------------------------------------------------------------------------------ what is written in pictures


@streams
@torch.no_grad()
def test_padding_and_neighbours_of_what_is_written_change_nothing(config):
    unet, batch, written = make_unet(config, written_dim=64), make_batch(), make_written()
    whole = unet(**batch, **written)
    hidden = ~written["transcription_mask"][..., None]
    other = written | {"transcription_context": written["transcription_context"] + 9 * hidden}
    assert (unet(**batch, **other) - whole).abs().max() < 1e-5
    for i in range(3):
        alone = {name: x[i:i + 1] for name, x in (batch | written).items()}
        count = max(1, int(alone["transcription_mask"].sum()))                # as short as it can be
        for name in ("transcription_context", "transcription_mask"):
            alone[name] = alone[name][:, :count]
        assert (unet(**alone)[0] - whole[i]).abs().max() < 1e-5


@streams
def test_what_is_written_reaches_the_output_and_its_padding_gets_no_gradient(config):
    unet, batch, written = make_unet(config, written_dim=64), make_batch(), make_written()
    context = written["transcription_context"].requires_grad_()
    unet(**batch, **written).square().sum().backward()
    mask = written["transcription_mask"]
    assert not context.grad[~mask].any()
    assert context.grad[mask].abs().sum(-1).min() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())
    with torch.no_grad():
        other = written | {"transcription_context": context.flip(0)}
        changed = (unet(**batch, **written) - unet(**batch, **other)).flatten(1).abs().amax(1)
    assert (changed > 1e-4).tolist() == [True, False, True]                   # the second has no text


@streams
@torch.no_grad()
def test_order_of_what_is_written_changes_the_output_through_the_encoder(config):
    unet = make_unet(config, written_dim=64)
    text = load_text_encoder(TextConfig(transcription="bytes", transcription_width=64))
    said = text.encode(["a sign"] * 2, torch.device("cpu"), ["ABC", "CBA"])
    written = {name: x for name, x in said.items() if name.startswith("transcription_")}
    one, other = unet(**{name: x[[0, 0]] for name, x in make_batch().items()}, **written)
    assert (one - other).abs().max() > 1e-3


def test_a_weave_starts_as_the_network_without_it_and_all_of_it_learns():
    plain, woven = make_unet(written_dim=64), UNet(WOVEN, SIZE, D, P, written_dim=64)
    missing, unexpected = woven.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    batch, written = make_batch(), make_written()
    with torch.no_grad():
        assert (woven(**batch, **written) - plain(**batch, **written)).abs().max() < 1e-6
    woven(**batch, **written).square().sum().backward()
    weights = dict(woven.named_parameters())
    silent = {name for name in missing if not weights[name].grad.any()}
    assert silent
    assert not any("to_out.0.weight" in name and "write" in name for name in silent)
    woven = make_unet(WOVEN, written_dim=64)                  # as after the first steps
    woven(**batch, **written).square().sum().backward()
    assert [name for name, p in woven.named_parameters() if not p.grad.any()] == []


@torch.no_grad()
def test_a_weave_reads_the_picture_where_it_is_and_may_carry_on_what_it_read():
    torch.manual_seed(0)
    weave = model.Weave(32, 4, 64, 48, head_dim=16, carried=True)
    for p in weave.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 48)
    y, mask = torch.randn(2, 6, 64), torch.arange(6) < torch.tensor([[6], [3]])
    _, read = weave(x, y, mask, emb)
    _, turned = weave(x.flip(3), y, mask, emb)
    assert (read - turned).abs().max() > 1e-3                 # a set of places would be read alike
    _, own = weave(x, y[:, [1, 0, 2, 3, 4, 5]], mask, emb)
    assert (own - read[:, [1, 0, 2, 3, 4, 5]]).abs().max() < 1e-5
    assert weave(torch.randn(2, 32, 6, 8), y, mask, emb)[0].shape == (2, 32, 6, 8)
    weave.carried = False
    assert torch.equal(weave(x, y, mask, emb)[1], y)
    first, second = (make_unet(replace(WOVEN, weave_carried=carried), written_dim=64)
                     for carried in (False, True))
    batch = make_batch() | make_written()
    assert (first(**batch) - second(**batch)).abs().max() > 1e-4


def test_the_two_streams_have_nulls_of_their_own_and_the_others_weights_are_those_of_before():
    plain, both = UNet(SMALL, SIZE, D, P).state_dict(), UNet(SMALL, SIZE, D, P, written_dim=64).state_dict()
    assert {name.split(".")[0] for name in both.keys() - plain.keys()} == {"transcription"}
    assert {name: x.shape for name, x in both.items() if name in plain} == {
        name: x.shape for name, x in plain.items()}
    assert not torch.equal(both["null"], both["transcription.null"])
