"""model.py: what the network may and may not see, files that survive."""
import json
import math
import os
import random
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import model
from model import ModelConfig, UNet, load_checkpoint, load_tensors, save_tensors
from text_encoder import TextConfig, load_text_encoder

SMALL = ModelConfig(32, (1, 2), (1,), (8,), head_dim=16, patch=2)
SIZE, L, D, P = 16, 12, 32, 20


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
    with pytest.raises(ValueError, match="is no file. Name a run directory, a checkpoint folder or a file"):
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
