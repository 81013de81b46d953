"""text_encoder.py against the published implementations, and against what users and disks do to it."""

import copy as copies
import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import data
import text_encoder as T
from text_encoder import TextConfig, load_image_encoder, load_text_encoder

ROOT = Path(__file__).resolve().parent.parent
T5_MODEL = Path(os.environ.get("LIMN_DATA", ROOT.parent / "shared" / "data")) / "t5" / "spiece.model"
CAPTIONS = [
    "a red house",
    "",
    "two small green trees left of a big yellow sun on a blue sky",
    "car",
    "猫と犬 🐈 café",
]

# Twelve scripts, by the ranges of their letters; a text mixes words of one with some Latin and signs.
SCRIPTS = {
    "latin": "aàbcdéefghiïjklmnoöpqrsßtuüvwxyzæøåñçł",
    "greek": "αβγδεζηθικλμνξοπρστυφχψω",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщыьэюя",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשת",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "devanagari": "अआइईउऊकखगघचछजटडणतथदधनपफबभमयरलवशसहािीुूेैो्",
    "thai": "กขคงจฉชซญดตถทธนบปผฝพฟมยรลวศสหอะาิีึืุูเแโใไ่้",
    "hangul": "가나다라마바사아자차카타파하고노도로모보소",
    "kana": "あいうえおかきくけこさしすせそアイウエオカキクケコ",
    "han": "的一是不了人我在有他这为之大来以个中上们",
    "georgian": "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ",
    "armenian": "աբգդեզէըթժիլխծկհձղճմյնշոչպջռսվտրցւփքօֆ",
}
SIGNS = [
    ".",
    ",",
    "!",
    "?",
    "'s",
    "'",
    "-",
    "…",
    "(1)",
    "23",
    "½",
    "№",
    "\u3000",
    "\t",
    "  ",
    "🏠",
    "👩‍🚀",
    "“x”",
    "It's",
    "we'll",
    "ﬁ",
    "Ⅷ",
    "٣",
    "x²",
]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    names = list(SCRIPTS)

    def word(letters):
        text = "".join(rng.choice(letters) for _ in range(rng.randint(1, 9)))
        return rng.choice((text, text, text.capitalize(), text.upper()))

    def text(i):
        letters = SCRIPTS[names[i % len(names)]]
        return " ".join(
            word(letters) if rng.random() < 0.7 else rng.choice([*SIGNS, word(SCRIPTS["latin"])])
            for _ in range(rng.randint(1, 14))
        )

    return [text(i) for i in range(count)]


# ------------------------------------------------------------------------------------------ folders to load


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """What is kept in the user's cache folder is kept here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def spiece(tmp_path_factory) -> bytes:
    """A SentencePiece model of 400 pieces with T5's special ids, trained here."""
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(1500, 7)),
        model_writer=out,
        vocab_size=600,
        character_coverage=0.98,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


@pytest.fixture(scope="session")
def clip_words() -> tuple[dict, list]:
    """vocab and merges as CLIP lays them out: the bytes, those that end a word, the merges, the two ends."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(68)]
    assert len(letters) == 256
    rng, parts, merges = random.Random(1), [*letters, *(letter + "</w>" for letter in letters)], []
    common = [bytes(text, "utf-8") for text in texts(300, 3)]
    shown = dict(zip([*visible, *(b for b in range(256) if b not in visible)], letters))
    words = [[shown[b] for b in word] for text in common for word in text.lower().split()]
    for word in words:
        word[-1] += "</w>"
    for _ in range(600):
        word = rng.choice(words)
        if len(word) > 1:
            i = rng.randrange(len(word) - 1)
            if (pair := (word[i], word[i + 1])) not in merges:
                merges.append(pair)
                parts.append("".join(pair))
            word[i : i + 2] = ["".join(pair)]
    vocab = {part: i for i, part in enumerate([*dict.fromkeys(parts), "<|startoftext|>", "<|endoftext|>"])}
    return vocab, merges


def write_t5(folder: Path, config, model, spiece: bytes | None = None, **save) -> Path:
    model.save_pretrained(folder, **save)
    if spiece:
        (folder / "spiece.model").write_bytes(spiece)
    return folder


def t5_model(kind: str, seed: int, **shape):
    transformers = pytest.importorskip("transformers")
    names = {"v1.0": "T5", "v1.1": "T5", "byt5": "T5", "mt5": "MT5", "umt5": "UMT5"}
    config = getattr(transformers, names[kind] + "Config")(
        feed_forward_proj="relu" if kind == "v1.0" else "gated-gelu",
        decoder_start_token_id=0,
        dropout_rate=0.0,
        **{"vocab_size": 384 if kind == "byt5" else 700} | shape,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, names[kind] + "ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():  # the usual initialisation would leave biases and norms untested
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    for module in model.modules():
        if hasattr(module, "relative_attention_bias"):
            torch.nn.init.normal_(module.relative_attention_bias.weight)
    return model


def t5_shape(rng) -> dict:
    return {
        "d_model": rng.choice([24, 36, 52]),
        "d_kv": rng.choice([5, 8, 12]),
        "num_heads": rng.choice([1, 2, 3, 5]),
        "d_ff": rng.choice([31, 64]),
        "num_layers": rng.randint(1, 4),
        "num_decoder_layers": 1,
        "relative_attention_num_buckets": rng.choice([8, 32]),
        "relative_attention_max_distance": rng.choice([20, 128]),
    }


def read(encoder, captions) -> dict:
    """The batch of some captions, as a loader makes it."""
    return encoder.reader.batch([encoder.reader.read(caption) for caption in captions])


def say(encoder, captions, **how) -> tuple:
    """context, mask, pooled of some captions."""
    condition = encoder(**encoder.inputs(read(encoder, captions), "cpu", **how))
    return condition["context"], condition["mask"], condition["pooled"]


def close(ours, theirs, mask, dtype):
    ours, theirs = ours.float()[mask], theirs.float()[mask]
    error = (ours - theirs).abs().max()
    assert error <= (1e-5 if dtype == "fp32" else 2e-2 * theirs.abs().max()), error


@pytest.mark.parametrize(
    ("kind", "seed"), [(kind, seed) for kind in ("v1.0", "v1.1", "mt5", "umt5", "byt5") for seed in range(3)]
)
def test_t5_equals_transformers(kind, seed, tmp_path, spiece):
    model = t5_model(kind, seed, **t5_shape(random.Random(seed * 7 + len(kind))))
    write_t5(tmp_path, model.config, model, None if kind == "byt5" else spiece)
    for dtype in ("fp32", "bf16"):
        encoder = load_text_encoder(TextConfig([str(tmp_path)], text_length=64, text_dtype=dtype))
        ids = encoder.inputs(read(encoder, CAPTIONS), "cpu")["ids"]
        context, mask, pooled = say(encoder, CAPTIONS)
        with torch.no_grad():
            theirs = (
                model.to(T.DTYPES[dtype]).encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            )
        close(context, theirs, mask, dtype)
        assert not context[~mask].any()
        assert not pooled[1].any()
        assert pooled.shape == (5, encoder.pooled_dim)


@pytest.mark.parametrize("kind", ["t5", "clip", "pictures"])
def test_where_bf16_is_imitated_its_weights_multiply_in_float32(kind, t5_folder, clip_folder, monkeypatch):
    def said(dtype):
        if kind == "pictures":
            tower = load_image_encoder(str(clip_folder), TextConfig(text_dtype=dtype))
            pictures = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32) % 251
            given = (pictures.byte(),)
        else:
            folder = t5_folder if kind == "t5" else clip_folder
            encoder = load_text_encoder(TextConfig([str(folder)], 32, text_dtype=dtype))
            batch = encoder.inputs(read(encoder, CAPTIONS), "cpu")
            tower, given = encoder.tower, (batch["ids"], batch["mask"])
        before = {name: weight.clone() for name, weight in tower.state_dict().items()}
        monkeypatch.setattr(torch.nn.functional, "linear", counted)
        results = tower(*given) if kind != "pictures" else (tower(*given),)
        monkeypatch.undo()
        for name, weight in tower.state_dict().items():
            assert weight.dtype == T.DTYPES[dtype]
            assert torch.equal(weight, before[name])
        rounded = tower.float()(*given)
        return results, rounded if kind != "pictures" else (rounded,)

    # CLIP adds its places, and what it reads, in the type of its weights.
    limit = {True: 1e-6 if kind == "t5" else 0.01, False: 0.05}
    used, linear = set(), torch.nn.functional.linear

    def counted(x, *weights):
        used.add(x.dtype)
        return linear(x, *weights)

    for imitated in (True, False):
        used.clear()
        monkeypatch.setattr(T, "imitates_bf16", lambda kind, imitated=imitated: imitated)
        results, exact = said("bf16")
        assert used == {torch.float32 if imitated else torch.bfloat16}
        for ours, theirs in zip(results, exact):
            error = (ours.float() - theirs).abs().max() / theirs.abs().max()
            assert error < limit[imitated]


def test_an_empty_caption_hides_no_key_from_the_kernels(t5_folder, monkeypatch):
    """Where all keys of a row are hidden some kernels say nan; what is said of nothing is zero anyhow."""
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, bias=None, **how):
        seen.append((bias > torch.finfo(bias.dtype).min / 2).any(-1).all())
        return attention(q, k, v, bias, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for name in ("bytes", str(t5_folder)):
        encoder = load_text_encoder(TextConfig([name], 32))
        context, mask, pooled = say(encoder, ["", "a house"])
        assert all(seen)
        assert not context[~mask].any()
        assert context[1].any()
        assert pooled[1].any()
        assert not pooled[0].any()
    assert len(seen) > 2


@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_layer_is_widened_in_parts(bias):
    layer = T.Linear(64, 2500, bias=bias).bfloat16()
    x = torch.randn(3, 64)
    exact = torch.nn.functional.linear(x, *[weight.float() for weight in layer.parameters()])
    assert torch.allclose(layer(x), exact, atol=1e-5)


def test_gpus_before_ampere_imitate_bf16_too(monkeypatch):
    monkeypatch.setattr(T, "imitates_bf16", T.imitates_bf16.__wrapped__)
    assert not T.imitates_bf16("mps")
    for there, multiplied in itertools.product((True, False), repeat=2):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, it=multiplied: it)
        assert T.imitates_bf16("cuda") == (there and not multiplied)


# -------------------------------------------------------------------------------------------------- tokens


def protobuf(data: bytes) -> dict:
    """The fields of a protocol buffer message by number, those with a length only."""
    fields, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 128:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 2:
            size = varint()
            fields.setdefault(tag >> 3, []).append(data[at : at + size])
            at += size
        else:
            at += {0: 0, 1: 8, 5: 4}[tag & 7]
            if tag & 7 == 0:
                varint()
    return fields


def same_ids_as_transformers(proto: bytes, path: Path):
    import sentencepiece

    transformers = pytest.importorskip("transformers")
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    theirs = transformers.T5Tokenizer(
        vocab=pieces, extra_ids=0, _spm_precompiled_charsmap=protobuf(protobuf(proto)[3][0])[2][0]
    )
    path.write_bytes(proto)
    ours = T.SentencePieceTokenizer(path, len(pieces) + 100)
    many = [T.clean(text) for text in texts(2000)]
    wrong = [
        (text, a, b)
        for text, a, b in zip(many, theirs(many)["input_ids"], map(ours.encode, many))
        if a != [*b, 1]
    ]
    assert not wrong, f"{len(wrong)} differ, such as {wrong[0]}"


def test_sentencepiece_ids_equal_transformers(spiece, tmp_path):
    same_ids_as_transformers(spiece, tmp_path / "spiece.model")


@pytest.mark.skipif(not T5_MODEL.exists(), reason=f"{T5_MODEL} is not there")
def test_t5_ids_equal_transformers(tmp_path):
    same_ids_as_transformers(T5_MODEL.read_bytes(), tmp_path / "spiece.model")


def test_byte_ids_equal_transformers():
    transformers = pytest.importorskip("transformers")
    theirs, many = transformers.ByT5Tokenizer(), [T.clean(text) for text in texts(2000)]
    assert theirs(many)["input_ids"] == [[*T.ByteTokenizer().encode(text), 1] for text in many]


def write_clip_words(folder: Path, clip_words):
    vocab, merges = clip_words
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
    )


def test_clip_ids_equal_transformers(clip_words, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_clip_words(tmp_path, clip_words)
    theirs = transformers.CLIPTokenizer(vocab=clip_words[0], merges=clip_words[1])
    ours, many = (
        T.ClipTokenizer(tmp_path / "vocab.json", 10**6),
        [T.clean(text) for text in [*texts(2000), "İstanbul ΟΔΟΣ ΑΣ. aaaa", "a<b>&#1"]],
    )
    wrong = [
        (text, a, b)
        for text, a, b in zip(many, theirs(many)["input_ids"], map(ours.encode, many))
        if a[1:-1] != b
    ]
    assert not wrong, f"{len(wrong)} differ, such as {wrong[0]}"


NASTY = [
    "",
    "   ",
    "\ud800 house",
    "a\0b",
    "\ufeffa house",
    "🏠" * 50,
    "\u202eabc שלום",
    "x" * 10**6,
    "a " * 10**6,
    "\x1b[31m\r\n",
    "<|endoftext|> a </s> <pad>",
    "\U0010ffff\ufffe",
]


@pytest.mark.parametrize("kind", ["bytes", "t5", "clip"])
def test_no_text_is_too_bad(kind, t5_folder, clip_folder):
    encoder = load_text_encoder(
        TextConfig([{"bytes": kind, "t5": str(t5_folder), "clip": str(clip_folder)}[kind]], 24)
    )
    batch = read(encoder, NASTY)
    condition = encoder(**encoder.inputs(batch, "cpu"))
    context, mask, pooled = condition["context"], condition["mask"], condition["pooled"]
    assert batch["ids"].shape == (len(NASTY), 24)
    assert batch["cut"].sum() == encoder.reader.counts["cut"]
    assert context.isfinite().all()
    assert not mask[:2].any()
    assert not pooled[:2].any()
    assert mask[2:].any(1).all()
    assert encoder.reader.counts["empty"] == 2
    assert encoder.reader.counts["cleaned"] >= 3
    assert encoder.reader.counts["cut"] >= 3


def test_counts_name_empty_cut_and_unknown_prompts(t5_folder):
    encoder = load_text_encoder(TextConfig([str(t5_folder)], 8))
    batch = read(encoder, ["  ", "🦀 🦀", "a red house left of a green tree", "car"])
    assert batch["cut"].tolist() == [False, False, True, False]
    assert encoder.reader.counts["empty"] == encoder.reader.counts["cut"] == 1
    assert encoder.reader.counts["unknown"] >= 2


# ------------------------------------------------------------------------------------------------------ CLIP


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, spiece):
    model = t5_model("v1.1", 0, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2)
    return write_t5(tmp_path_factory.mktemp("t5-tiny"), model.config, model, spiece)


def clip_pair(seed: int, words: int, act: str):
    transformers = pytest.importorskip("transformers")
    rng = random.Random(seed)
    width, heads = rng.choice([(24, 2), (36, 3), (40, 5)])
    text = {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": 50,
        "num_attention_heads": heads,
        "num_hidden_layers": rng.randint(1, 4),
        "hidden_act": act,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 70,
        "num_attention_heads": 4,
        "num_hidden_layers": rng.randint(1, 3),
        "hidden_act": act,
        "image_size": 32,
        "patch_size": rng.choice([8, 16]),
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=rng.choice([20, width])
    )
    torch.manual_seed(seed)
    model = transformers.CLIPModel(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
    return model


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, clip_words):
    folder = tmp_path_factory.mktemp("clip-tiny")
    clip_pair(0, len(clip_words[0]), "quick_gelu").save_pretrained(folder)
    write_clip_words(folder, clip_words)
    return folder


@pytest.mark.parametrize(
    ("seed", "act"), [(seed, act) for seed in range(3) for act in ("quick_gelu", "gelu")]
)
def test_clip_equals_transformers(seed, act, tmp_path, clip_words):
    model = clip_pair(seed, len(clip_words[0]), act)
    model.save_pretrained(tmp_path)
    write_clip_words(tmp_path, clip_words)
    for dtype, layer in itertools.product(("fp32", "bf16"), ("last", "penultimate")):
        config = TextConfig([str(tmp_path)], text_dtype=dtype, clip_layer=layer)
        encoder, model = load_text_encoder(config), model.to(T.DTYPES[dtype])
        assert encoder.length == 77
        ids = encoder.inputs(read(encoder, CAPTIONS), "cpu")["ids"]
        context, mask, pooled = say(encoder, CAPTIONS)
        with torch.no_grad():
            out = model.text_model(ids, mask.long(), output_hidden_states=True)
            theirs = out.last_hidden_state if layer == "last" else out.hidden_states[-2]
            close(context, theirs, mask, dtype)
            close(pooled, model.text_projection(out.pooler_output), mask.any(1), dtype)


@pytest.mark.parametrize(
    ("seed", "act"), [(seed, act) for seed in range(3) for act in ("quick_gelu", "gelu")]
)
def test_clip_pictures_equal_transformers(seed, act, tmp_path, clip_words):
    model = clip_pair(seed, len(clip_words[0]), act)
    model.save_pretrained(tmp_path)
    pictures = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    for dtype in ("fp32", "bf16"):
        ours = load_image_encoder(str(tmp_path), TextConfig(text_dtype=dtype))(pictures)
        with torch.no_grad():
            pixels = T.clip_pixels(pictures, 32).to(T.DTYPES[dtype])
            theirs = model.to(T.DTYPES[dtype]).get_image_features(pixels).pooler_output
        close(ours, theirs, slice(None), dtype)


@pytest.mark.parametrize("projected", [True, False])
def test_clip_text_tower_alone_loads(projected, tmp_path, clip_words):
    transformers = pytest.importorskip("transformers")
    whole = clip_pair(1, len(clip_words[0]), "gelu")
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    whole.config.text_config.projection_dim = whole.config.projection_dim
    alone = kind(whole.config.text_config).eval()
    alone.save_pretrained(tmp_path)
    write_clip_words(tmp_path, clip_words)
    encoder = load_text_encoder(TextConfig([str(tmp_path)], text_dtype="fp32"))
    inputs = encoder.inputs(read(encoder, CAPTIONS), "cpu")
    mask, pooled = inputs["mask"], encoder(**inputs)["pooled"]
    end = encoder.reader.tokenizer.suffix[0]  # where theirs looks for the end of a caption
    with torch.no_grad():
        out = alone(inputs["ids"].where(mask, end))
    close(pooled, out.text_embeds if projected else out.pooler_output, mask.any(1), "fp32")


@pytest.mark.parametrize("size", [(40, 40), (50, 73), (200, 64), (16, 21), (32, 32)])
def test_clip_pixels_equal_transformers(size):
    transformers = pytest.importorskip("transformers")
    process = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    noise = np.random.default_rng(0).integers(0, 256, (3, 5, 5), dtype=np.uint8)
    picture = F.interpolate(torch.tensor(noise)[None].float(), size, mode="bicubic").clamp(0, 255).byte()
    theirs = torch.tensor(process(picture[0].numpy())["pixel_values"][0])
    assert (
        T.clip_pixels(picture, 32)[0] - theirs
    ).abs().max() < 1.5 / 255 / 0.26  # one level of 256


# --------------------------------------------------------------------------------- what padding changes


@pytest.mark.parametrize("kind", ["bytes", "t5", "clip"])
def test_padding_and_neighbours_change_nothing(kind, t5_folder, clip_folder):
    name = {"bytes": kind, "t5": str(t5_folder), "clip": str(clip_folder)}[kind]
    torch.manual_seed(0)
    short, long = (load_text_encoder(TextConfig([name], length, "fp32")) for length in (40, 64))
    long.load_state_dict(short.state_dict())
    alone = say(short, CAPTIONS[:1])
    for encoder, trim in itertools.product((short, long), (False, True)):
        context, mask, pooled = say(encoder, [*CAPTIONS[1:], CAPTIONS[0]], trim=trim)
        count = int(mask[-1].sum())
        assert (context[-1, :count] - alone[0][0, :count]).abs().max() < 1e-5
        assert (pooled[-1] - alone[2][0]).abs().max() < 1e-5
        assert not context[~mask].any()


def test_the_order_of_the_words_matters():
    encoder = load_text_encoder(TextConfig())
    context, _, pooled = say(encoder, ["a red house and a green tree", "a green house and a red tree"])
    assert (context[0] - context[1]).abs().max() > 0.1
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_of_the_byte_encoder_learns(dtype):
    encoder = load_text_encoder(TextConfig())
    for captions in (CAPTIONS, [""]):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            context, _, pooled = say(encoder, captions)
        (context.square().sum() + pooled.square().sum()).backward()
        gradients = [parameter.grad for parameter in encoder.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert captions == [""] or all(gradient.any() for gradient in gradients)


def test_the_byte_encoder_compiles_once():
    encoder, count = load_text_encoder(TextConfig(text_length=32)), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(encoder, backend=count, fullgraph=True)
    for captions in (CAPTIONS, ["", "", "", "", "x" * 99], CAPTIONS[::-1]):
        inputs = encoder.inputs(read(encoder, captions), "cpu")
        assert torch.equal(compiled(**inputs)["context"], encoder(**inputs)["context"])
    assert count.frame_count == 1


def test_padding_joins_clips_alone(t5_folder, clip_folder):
    config = TextConfig([str(clip_folder), str(t5_folder)], text_padding=True)
    with pytest.raises(ValueError, match=r"--text-padding makes one of several CLIPs of one length, not of"):
        load_text_encoder(config)


def test_encoders_stand_side_by_side(t5_folder, clip_folder):
    config = TextConfig(["bytes", str(t5_folder), str(clip_folder)], text_length=24)
    both = load_text_encoder(config)
    batch = read(both, CAPTIONS)
    inputs = both.inputs(batch, "cpu")
    assert batch.keys() - inputs.keys() == {"cut"}
    assert {name for name in inputs if name.startswith("mask")} == {"mask.0", "mask.1", "mask.2"}
    context, mask, pooled = say(both, CAPTIONS)
    assert both.length == both.reader.length == mask.shape[1]
    assert context.shape == (5, 72, both.dim)
    assert pooled.shape == (5, both.pooled_dim)
    assert not context[1].any()
    assert not pooled[1].any()
    assert both.trainable
    assert both.reader.counts["empty"] == 6  # twice read by three
    (context.sum() + pooled.sum()).backward()
    assert all(parameter.grad is not None for parameter in both.parameters())
    names = {name.split(".")[0] for name in both.state_dict()}
    assert names == {"kind", "project", "trained"}  # the frozen ones are not stored
    again = load_text_encoder(config)
    again.load_state_dict(both.state_dict())
    assert torch.equal(again(**inputs)["context"], context)
    assert torch.equal(both.encode(CAPTIONS, "cpu")["context"], context)
    average = copies.deepcopy(both)
    assert average.encoders[1] is both.encoders[1]  # a copy shares what is frozen, and no other
    assert average.encoders[0] is average.trained[0] is not both.trained[0]
    assert average.reader.readers == both.reader.readers
    both.to(torch.device("meta"))
    assert all(parameter.is_meta for encoder in both.encoders for parameter in encoder.parameters())


# ----------------------------------------------------------------------------------------------- the cache

MANY = [
    f"a {size} {colour} {thing}"
    for size in ("small", "large")
    for colour in ("red", "green")
    for thing in ("house", "tree that stands on a hill")
]


class Lookup:
    """What a cache has of a caption; whatever lies beside the picture is passed over."""

    def __init__(self, cache):
        self.cache = cache

    def __call__(self, caption, beside):
        return self.cache[caption]


def cached(config, captions):
    """The encoder whose frozen parts read a cache, as train.py builds it."""

    def lookup(number, encoder, load):
        cache = data.Cache(Path(config.text_cache) / str(number), encoder.fingerprint)
        list(cache.fill(filter(None, captions), lambda texts: load() and T.encode_captions(encoder, texts)))
        return Lookup(cache)

    return load_text_encoder(config, lookup)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_the_cache_says_what_the_encoder_says(kind, t5_folder, clip_folder, tmp_path):
    config = TextConfig([str({"t5": t5_folder, "clip": clip_folder}[kind])], 32, text_cache=str(tmp_path))
    live, stored = load_text_encoder(config), cached(config, [*MANY, ""])
    captions = [MANY[3], "", MANY[0], MANY[3]]
    for ours, theirs in zip(say(stored, captions), say(live, captions)):
        assert ours.shape == theirs.shape
        assert (ours.float() - theirs.float()).abs().max() <= 2e-2 * theirs.float().abs().max()
    assert copies.deepcopy(stored) is stored
    assert not stored.trainable
    assert not list(stored.parameters())
    assert stored.tower is None
    inputs = stored.inputs(read(stored, captions), "cpu")
    inputs["mask"] &= torch.tensor([[True], [True], [False], [True]])  # dropped text
    context = stored(**inputs)["context"]
    assert context[0].any()
    assert not context[2].any()
    with pytest.raises(ValueError, match="has nothing of 'a cow'"):
        stored.reader.read("a cow")


def test_a_batch_answers_with_its_own_captions_whatever_was_read_since(t5_folder, tmp_path):
    stored = cached(TextConfig([str(t5_folder)], 32, text_cache=str(tmp_path)), MANY)
    before, after = read(stored, MANY[:2]), read(stored, MANY[2:4])
    first, second = (stored(**stored.inputs(batch, "cpu")) for batch in (before, after))
    both = say(stored, MANY[:4])
    for name, whole in zip(("context", "mask", "pooled"), both):
        assert torch.equal(torch.cat([first[name], second[name]]), whole)
    rows = {name: x[::-1].copy() for name, x in after.items()}
    assert torch.equal(stored(**stored.inputs(rows, "cpu"))["context"], second["context"].flip(0))


def test_what_lies_beside_a_picture_reaches_the_lookup(t5_folder):
    seen = []

    def lookup(caption, beside):
        seen.append((caption, beside))
        return torch.ones(3, 32).bfloat16(), torch.ones(32).bfloat16()

    stored = load_text_encoder(TextConfig([str(t5_folder)], 32), lambda number, encoder, load: lookup)
    batch = stored.reader.batch([stored.reader.read(text, b"7") for text in ("a house", " ")])
    assert seen == [("a house", b"7")]  # an empty caption is not looked up
    assert batch["mask"].sum(1).tolist() == [3, 0]
    assert batch["context"].dtype == batch["pooled"].dtype == np.uint16
    context, _, pooled = say(stored, ["a house", ""])
    assert context.shape == (2, 32, 32)
    assert (context[0, :3] == 1).all()
    assert not context[0, 3:].any()
    assert not context[1].any()
    assert not pooled[1].any()


# ------------------------------------------------------------------------------------------ what workers read


def kinds(t5_folder, clip_folder):
    def lookup(number, encoder, load):
        return Stored(encoder.dim, encoder.pooled_dim)

    yield load_text_encoder(TextConfig(["bytes"], 52))
    yield load_text_encoder(TextConfig([str(clip_folder)], 52))
    yield load_text_encoder(TextConfig([str(t5_folder)], 52), lookup)
    yield load_text_encoder(TextConfig(["bytes", str(t5_folder), str(clip_folder)], 52))
    yield load_text_encoder(TextConfig(["bytes", str(t5_folder), str(clip_folder)], 52), lookup)


class Stored:
    """Some embedding of any caption."""

    def __init__(self, dim, pooled_dim):
        self.dim, self.pooled_dim = dim, pooled_dim

    def __call__(self, caption, beside):
        context = torch.full((len(caption.split()), self.dim), float(len(caption)))
        return context.bfloat16(), torch.full((self.pooled_dim,), -float(len(caption))).bfloat16()


def test_a_reader_pickles_and_reads_the_same(t5_folder, clip_folder):
    for encoder in kinds(t5_folder, clip_folder):
        here, there = encoder.reader, pickle.loads(pickle.dumps(encoder.reader))
        batches = [reader.batch([reader.read(text) for text in CAPTIONS]) for reader in (here, there)]
        assert batches[0].keys() == batches[1].keys()
        for name, x in batches[0].items():
            assert isinstance(x, np.ndarray)
            assert x.dtype == batches[1][name].dtype
            assert (x == batches[1][name]).all()
        assert here.counts == there.counts


def test_a_batch_is_as_long_as_its_longest_caption_needs(t5_folder, clip_folder):
    expected = {1: 8, 7: 8, 8: 16, 15: 16, 40: 48, 51: 52, 99: 52}  # bytes, and the end token
    encoder = load_text_encoder(TextConfig(["bytes"], 52))
    for letters, width in expected.items():
        batch = read(encoder, ["", "x" * letters, "x"])
        assert batch["ids"].shape == batch["mask"].shape == (3, width)
        assert batch["ids"].dtype == np.int64
        assert batch["mask"].sum(1).tolist() == [0, min(52, letters + 1), 2]
        assert batch["cut"].tolist() == [False, letters > 51, False]
    for encoder in kinds(t5_folder, clip_folder):
        batch = read(encoder, [""])
        assert all(x.shape[1] == 8 for name, x in batch.items() if name.split(".")[0] in ("ids", "context"))


def test_a_part_of_a_batch_says_the_same_trimmed_or_whole(t5_folder, clip_folder):
    """As arrays and as tensors, beside whatever else a batch has; the static shape is the full length."""
    for encoder in kinds(t5_folder, clip_folder):
        batch = read(encoder, CAPTIONS) | {"picture": np.zeros((5, 3, 2, 2)), "captions": CAPTIONS}
        tensors = {name: torch.as_tensor(x) for name, x in batch.items() if isinstance(x, np.ndarray)}
        whole = encoder.inputs(batch, "cpu")
        assert all(x.shape[1] == 52 for name, x in whole.items() if not name.startswith("pooled"))
        context, mask, pooled = encoder(**whole).values()
        for rows, source in itertools.product((slice(0, 2), slice(3, 4)), (batch, tensors)):
            part = {name: x[rows] for name, x in source.items()}
            trimmed, full = encoder.inputs(part, "cpu", trim=True), encoder.inputs(part, "cpu")
            for name, x in full.items():
                assert torch.equal(x, whole[name][rows])
                if not name.startswith("pooled"):
                    assert trimmed[name].shape[1] < 52
                    assert torch.equal(trimmed[name], x[:, : trimmed[name].shape[1]])
            said = encoder(**trimmed)
            seen, expected = said["mask"], mask[rows]
            assert seen.sum() == expected.sum()
            assert (said["context"][seen] - context[rows][expected]).abs().max() < 2e-2 * context.abs().max()
            assert (said["pooled"] - pooled[rows]).abs().max() < 2e-2 * pooled.abs().max()


@pytest.mark.gpu
def test_looking_up_does_not_wait_for_the_gpu(t5_folder, tmp_path):
    stored = cached(TextConfig([str(t5_folder)], 32, text_cache=str(tmp_path)), MANY)
    expected = say(stored, MANY)
    batch = {name: torch.from_numpy(x).pin_memory() for name, x in read(stored, MANY).items()}
    stored(**stored.inputs(batch, "cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = stored(**stored.inputs(batch, "cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, found.values()))


def test_a_stale_cache_is_an_error(t5_folder, clip_folder, tmp_path, spiece):
    config = TextConfig([str(t5_folder)], 32, text_cache=str(tmp_path / "cache"))
    cached(config, MANY)
    same = t5_model("v1.1", 1, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2)  # other weights
    other = write_t5(tmp_path / "other", same.config, same, spiece)
    for name, length in ((other, 32), (clip_folder, 32), (t5_folder, 31)):
        with pytest.raises(
            ValueError,
            match=r"was made with t5 bf16 last d=32 length=32 .*, not .*Delete it or use another",
        ):
            cached(TextConfig([str(name)], length, text_cache=str(tmp_path / "cache")), MANY)


def test_a_torn_cache_is_an_error_and_never_a_wrong_caption(t5_folder, tmp_path):
    config = TextConfig([str(t5_folder)], 32, text_cache=str(tmp_path))
    good = cached(config, MANY)
    expected = [x.clone() for x in say(good, MANY)]
    (path,) = tmp_path.rglob("*.safetensors")
    content, rng, errors = path.read_bytes(), random.Random(0), 0
    for damage in range(200):
        broken = bytearray(content)
        if damage < 20:
            broken = broken[: rng.randrange(len(content))]
        else:
            broken[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            good.reader.lookup = Lookup(data.Cache(path.parent, good.fingerprint))
            found = say(good, MANY)
        except ValueError as error:
            assert re.search("damaged|was made with|has nothing", str(error))  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            errors += 1
        else:
            assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert errors > 190


def test_two_jobs_fill_one_cache(t5_folder, tmp_path):
    code = (
        "import text_encoder as T; from tests.test_text_encoder import MANY, cached;"
        f"cached(T.TextConfig([{str(t5_folder)!r}], 32, text_cache={str(tmp_path)!r}), MANY)"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    config = TextConfig([str(t5_folder)], 32, text_cache=str(tmp_path))
    stored, live = cached(config, MANY), load_text_encoder(config)
    assert (say(stored, MANY)[0] - say(live, MANY)[0]).abs().max() < 0.05
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".safetensors"]


# ------------------------------------------------------------------------------------------- bad folders


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit_config(**change):
    def edit(folder):
        content = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        safetensors.torch.save_file(change(dict(tensors)) or tensors, folder / "model.safetensors")

    return edit


def write(name, content):
    def edit(folder):
        (folder / name).write_bytes(
            content if isinstance(content, bytes) else content((folder / name).read_bytes())
        )

    return edit


def index(table):
    def edit(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(table))

    return edit


def remove(name):
    return lambda folder: (folder / name).unlink()


Q = "encoder.block.0.layer.0.SelfAttention.q.weight"
NORM = "encoder.final_layer_norm.weight"
BAD_FOLDERS = {
    "no spiece.model": (remove("spiece.model"), r"has no spiece.model \(found config.json"),
    "tokenizer.json only": (
        lambda f: (f / "spiece.model").rename(f / "tokenizer.json"),
        "tokenizer.json is damaged",
    ),
    "no config": (remove("config.json"), "has no config.json"),
    "no weights": (remove("model.safetensors"), "has no model.safetensors"),
    "lora": (
        lambda f: (f / "model.safetensors").rename(f / "adapter_model.safetensors"),
        "no model.safetensors .*adapter_model",
    ),
    "config not json": (write("config.json", b"{"), "config.json is damaged"),
    "config a list": (write("config.json", b"[]"), "config.json is damaged: not a JSON object"),
    "config not utf-8": (write("config.json", b"\xff\xfe{}"), "config.json is damaged"),
    "decoder only": (edit_config(model_type="gpt2"), "model_type is 'gpt2', which is not read here: t5, mt5, umt5"),  # noqa: E501
    "no model type": (edit_config(model_type=None), "model_type is None"),
    "no width": (edit_config(d_model=None), "d_model is None"),
    "width is text": (edit_config(d_model="wide"), "d_model is 'wide'"),
    "width negative": (edit_config(d_model=-3), "d_model is -3"),
    "a billion layers": (edit_config(num_layers=10**9), "num_layers is 1000000000"),
    "odd activation": (edit_config(feed_forward_proj="gated-silu"), "feed_forward_proj is 'gated-silu'"),
    "other width": (edit_config(d_model=48), r"is \(700, 32\), config.json says \(700, 48\)"),
    "more layers": (edit_config(num_layers=3), "encoder.block.2.*is missing"),
    "fewer layers": (edit_config(num_layers=1), "encoder.block.1.*is not known"),
    "tensor missing": (
        edit_tensors(lambda t: {name: tensor for name, tensor in t.items() if name != Q}),
        f"{Q} is missing",
    ),
    "tensor extra": (
        edit_tensors(lambda t: t | {"encoder.extra.lora": torch.zeros(2)}),
        "encoder.extra.lora is not known",
    ),
    "quantised": (edit_tensors(lambda t: t | {Q: t[Q].char()}), "is torch.int8. Quantised weights"),
    "not a number": (edit_tensors(lambda t: t | {Q: t[Q] * torch.nan}), f"{Q} is not finite in torch.bf"),
    "beyond bf16": (edit_tensors(lambda t: t | {Q: t[Q] * 0 + 3.4e38}), f"{Q} is not finite in torch.bf"),
    "spiece empty": (write("spiece.model", b""), "spiece.model is damaged|has 0 pieces"),
    "spiece garbage": (write("spiece.model", b"hello" * 99), "spiece.model is damaged"),
    "spiece cut": (write("spiece.model", lambda data: data[:999]), "spiece.model (is damaged|has .* pieces)"),
    "spiece of another": (edit_config(vocab_size=70000), "config.json says"),
    "index garbage": (index([]), "index.json is damaged"),
    "index empty": (index({"weight_map": 3}), "index.json is damaged"),
    "index of numbers": (index({"weight_map": {Q: 3}}), "lists 3, which is missing"),
    "shard missing": (
        index({"weight_map": {Q: "model-00002-of-00002.safetensors"}}),
        "damaged: it lists model-00002.*, which is missing. Down",
    ),
    "path traversal": (index({"weight_map": {Q: "../../x"}}), "lists a path outside the folder: '../../x'"),
    "absolute path": (index({"weight_map": {Q: "/etc/passwd"}}), "lists a path outside the folder"),
    "shard lacks some": (index({"weight_map": {Q: "config.json"}}), "config.json is damaged"),
    "weights empty": (write("model.safetensors", b""), "model.safetensors is damaged"),
    "weights are html": (
        write("model.safetensors", b"<html>404 Not Found</html>"),
        "model.safetensors is damaged",
    ),
    "weights cut": (write("model.safetensors", lambda data: data[:-1]), "model.safetensors is damaged"),
    "header only": (write("model.safetensors", lambda data: data[:8]), "model.safetensors is damaged"),
    "header beyond the file": (
        write("model.safetensors", lambda data: (2**40).to_bytes(8, "little") + data[8:]),
        "is damaged",
    ),
    "header huge": (write("model.safetensors", lambda data: b"\xff" * 8 + data[8:]), "is damaged"),
    "header zero": (write("model.safetensors", lambda data: bytes(8) + data[8:]), "is damaged"),
    "header not json": (write("model.safetensors", lambda data: data[:8] + b"!" + data[9:]), "is damaged"),
    "more behind the end": (write("model.safetensors", lambda data: data + b"x"), "is damaged"),
    "overlap": (
        write("model.safetensors", lambda data: data.replace(b'"data_offsets":[', b'"data_offsets":[1', 1)),
        "is damaged",
    ),
    "shape lies": (
        write("model.safetensors", lambda data: data.replace(b"[700,32]", b"[70,320]", 1)),
        "config.json says",
    ),
    "type lies": (write("model.safetensors", lambda data: data.replace(b'"F32"', b'"F16"', 1)), "is damaged"),
    "type unknown": (
        write("model.safetensors", lambda data: data.replace(b'"F32"', b'"Q32"', 1)),
        "is damaged",
    ),
    "doubled": (write("model.safetensors", lambda data: data * 2), "is damaged"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_ends_in_one_clear_line(name, t5_folder, tmp_path):
    edit, message = BAD_FOLDERS[name]
    folder = copy(t5_folder, tmp_path / "t5")
    edit(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_text_encoder(TextConfig([str(folder)]))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("vocab.json"), "has no vocab.json"),
        (remove("merges.txt"), "has no merges.txt"),
        (write("vocab.json", b"{}"), "vocab.json or merges.txt is damaged"),
        (write("vocab.json", b"[1"), "vocab.json is damaged"),
        (write("merges.txt", b"a b c\n"), "vocab.json or merges.txt is damaged"),
        (write("merges.txt", b"\xff"), "merges.txt is damaged"),
        (
            write("vocab.json", lambda data: data.replace(b": 3,", b": 99999,")),
            "vocab.json or merges.txt is damaged, or does not fit",
        ),
    ],
)
def test_a_bad_clip_folder_ends_in_one_clear_line(edit, message, clip_folder, tmp_path):
    folder = copy(clip_folder, tmp_path / "clip")
    edit(folder)
    with pytest.raises(ValueError, match=message):
        load_text_encoder(TextConfig([str(folder)]))


def test_no_folder_and_no_pictures_are_clear():
    with pytest.raises(ValueError, match="--text-encoder or --rank nowhere is no folder"):
        load_text_encoder(TextConfig(["nowhere"]))


def test_t5_has_no_pictures(t5_folder):
    with pytest.raises(ValueError, match="model_type is 't5', which is not read here: clip_vision_model"):
        load_image_encoder(str(t5_folder), TextConfig())


def test_flipped_bytes_of_weights_never_crash(t5_folder, tmp_path):
    """A flip in the header is an error or changes nothing. One in the numbers is an error where they are not
    finite any more; else it is not seen, as published weights carry no checksum, and one tensor differs."""
    folder = copy(t5_folder, tmp_path / "t5")
    path, rng, config = folder / "model.safetensors", random.Random(0), TextConfig([str(folder)])
    data, good = path.read_bytes(), load_text_encoder(config).state_dict()
    header = 8 + int.from_bytes(data[:8], "little")
    for number in range(200):
        broken, at = bytearray(data), rng.randrange(header if number % 2 else len(data))
        broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            state = load_text_encoder(config).state_dict()
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert all(tensor.isfinite().all() for tensor in state.values())
            changed = sum(not torch.equal(state[name], good[name]) for name in good)
            assert changed <= (at >= header)


# ------------------------------------------------------------------------------------ pickles, shards, memory


def as_bin(folder: Path, target: Path) -> Path:
    target = copy(folder, target)
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    torch.save(tensors, target / "pytorch_model.bin")
    return target


def test_pickles_are_read_only_when_asked(t5_folder, tmp_path):
    folder = as_bin(t5_folder, tmp_path / "bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is a pickle file. Convert it .* or pass --allow-bin"
    ):
        load_text_encoder(TextConfig([str(folder)]))
    ours = load_text_encoder(TextConfig([str(folder)], allow_bin=True)).state_dict()
    theirs = load_text_encoder(TextConfig([str(t5_folder)])).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_in_a_pickle_never_runs(zipped, t5_folder, tmp_path):
    folder, marker = as_bin(t5_folder, tmp_path / "bin"), tmp_path / "marker"
    torch.save({Q: Payload(marker)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged"):
        load_text_encoder(TextConfig([str(folder)], allow_bin=True))
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\x02", b"hello" * 50])
def test_a_damaged_pickle_is_one_line(content, t5_folder, tmp_path):
    folder = as_bin(t5_folder, tmp_path / "bin")
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged"):
        load_text_encoder(TextConfig([str(folder)], allow_bin=True))


@pytest.mark.parametrize(
    ("version", "works"), [("2.9.1+cu128", False), ("2.10.0", True), ("2.11.0+cu130", True), ("1.13", False)]
)
def test_old_torch_reads_no_pickle(version, works, t5_folder, tmp_path, monkeypatch):
    folder = as_bin(t5_folder, tmp_path / "bin")
    monkeypatch.setattr(torch, "__version__", version)
    if works:
        assert load_text_encoder(TextConfig([str(folder)], allow_bin=True)).dim == 32
    else:
        with pytest.raises(
            ValueError, match=r"or pass --allow-bin with torch >= 2.10 .this is .*CVE-2026-24747"
        ):
            load_text_encoder(TextConfig([str(folder)], allow_bin=True))


XXL = {
    "d_model": 40,
    "d_kv": 2,
    "num_heads": 64,
    "d_ff": 100,
    "num_layers": 24,
    "num_decoder_layers": 24,
}  # 4096, 64, 64, 10240


def test_xxl_names_in_five_shards_load_without_the_decoder(tmp_path, spiece):
    model = t5_model("v1.1", 0, **XXL)
    write_t5(
        tmp_path,
        model.config,
        model,
        spiece,
        max_shard_size=sum(p.numel() for p in model.parameters()) * 4 // 9 * 2,
    )
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) == 5
    encoder = load_text_encoder(TextConfig([str(tmp_path)], 32, "fp32"))
    context, mask, _ = say(encoder, CAPTIONS)
    ids = encoder.inputs(read(encoder, CAPTIONS), "cpu")["ids"]
    with torch.no_grad():
        theirs = model.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    close(context, theirs, mask, "fp32")
    assert not any("decoder" in name for name in encoder.state_dict())
    names = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"])
    assert len({name for name in names if name.startswith("encoder.block.23.")}) == 9
    shards[2].unlink()
    with pytest.raises(ValueError, match=f"lists {shards[2].name}, which is missing"):
        load_text_encoder(TextConfig([str(tmp_path)], 32))


def test_the_size_of_t5_xxl_is_stated_from_its_shapes():
    shape = T.T5_SHAPE | {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "model_type": "t5",
    }
    with torch.device("meta"):
        count = sum(p.numel() for p in T.T5Encoder(T.SimpleNamespace(**shape)).parameters())
    assert count == 4_762_310_656  # 9.5 GB in bf16, 19.0 GB in float32


def test_loading_peaks_at_the_size_of_the_encoder(tmp_path, spiece):
    model = t5_model(
        "v1.1", 0, d_model=512, d_kv=64, num_heads=8, d_ff=1024, num_layers=16, num_decoder_layers=16
    )
    write_t5(tmp_path, model.config, model, spiece)
    code = """if True:
        import sys, resource, torch, text_encoder as T
        peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
        config = T.TextConfig([sys.argv[1]], 32, sys.argv[2])
        encoder, load = T.frozen_encoder(sys.argv[1], config)
        torch.zeros(9) @ torch.zeros(9)
        before = peak(); load()
        print((peak() - before) * 1024 / sum(p.nbytes for p in encoder.parameters()))"""
    for dtype in ("bf16", "fp32"):
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), dtype],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
        assert float(run.stdout) < 1.6, dtype  # the encoder, one tensor of float32, the file's tables


# -------------------------------------------------------------------------- tokenizers as people have them

MARKS = ["\u0301", "\u0308\u0323", "\u200d", "\u200c", "\ufe0f", "\U0001f3fd", "\u094d", "\u0e33"]
SPECIAL = ["</s>", "<pad>", "<unk>", "<extra_id_0>", "<|endoftext|>", "<|startoftext|>"]


def nasty(count: int, seed: int = 1) -> list[str]:
    """Texts with signs of every plane, controls, marks, joiners, runs, and the names of special tokens."""
    rng = random.Random(seed)
    kinds = [
        lambda: chr(rng.choice([rng.randrange(1, 0x300), rng.randrange(0x2000, 0x3400)])),
        lambda: chr(rng.choice([rng.randrange(0xE000, 0x11000), rng.randrange(0x1F000, 0x1FB00)])),
        lambda: rng.choice("aexo.!?_-~ ") * rng.randint(1, 12),
        lambda: rng.choice("aeiounqk") + rng.choice(MARKS),
        lambda: rng.choice([*SIGNS, *SPECIAL]),
        lambda: rng.choice(["İ", "ß", "Å", "가", "각", "ﷺ", "①", "㎏", "\u00ad", "\u200b", "\u2028"]),
    ]
    many = [*texts(count // 4, seed)]
    while len(many) < count:
        many.append("".join(rng.choice(kinds)() for _ in range(rng.randint(1, 12))))
    return [T.clean(text) for text in many]


def transformers_t5(proto: bytes):
    import sentencepiece

    transformers = pytest.importorskip("transformers")
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    charsmap = protobuf(protobuf(proto)[3][0])[2][0]
    return transformers.T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=charsmap), len(pieces)


@pytest.mark.parametrize("real", [False, True])
def test_a_tokenizer_json_reads_as_the_pieces_it_was_made_of(real, spiece, tmp_path):
    """Equal to the spiece.model on every text; to transformers, too, where no letter has marks or joiners
    (it normalises a letter with them as a whole) and no special token is named (which is text here); but
    for ties between the orders of a run's pieces."""
    if real and not T5_MODEL.exists():
        pytest.skip(f"{T5_MODEL} is not there")
    proto = T5_MODEL.read_bytes() if real else spiece
    theirs, pieces = transformers_t5(proto)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(proto)
    ours = T.SentencePieceTokenizer(tmp_path / "tokenizer.json", pieces + 100)
    published = T.SentencePieceTokenizer(tmp_path / "spiece.model", pieces + 100)
    assert (ours.suffix, ours.unknown) == (published.suffix, published.unknown)
    assert ours.content == published.content
    odd, many = 0, nasty(2200)
    for text, ids in zip(many, theirs(many)["input_ids"]):
        assert ours.encode(text) == published.encode(text), text
        if ours.encode(text) != ids[:-1]:
            joined = re.search(r"[\u200c\u200d\ufe0f\u0e33]", text) or any(
                T.unicodedata.category(char)[0] == "M" or T.unicodedata.category(char) == "Sk" for char in text  # noqa: E501
            )
            tie = sorted(ours.encode(text)) == sorted(ids[:-1])     # a run, its pieces in another order
            assert tie or joined or any(name in text for name in SPECIAL), (text, ours.encode(text), ids)
            odd += 1
    assert odd < 0.5 * len(many)
    assert all(id not in ours.encode(name) for id, name in enumerate(("<pad>", "</s>")))


def test_a_nul_is_a_space_and_special_tokens_are_text(t5_folder, clip_folder):
    for folder in (t5_folder, clip_folder):
        reader = load_text_encoder(TextConfig([str(folder)], 40)).reader
        ids = reader.read("a\0b")["ids"].tolist()
        assert ids == reader.read("a b")["ids"].tolist()
        special = {*reader.tokenizer.prefix, *reader.tokenizer.suffix}
        for name in SPECIAL:
            inner = reader.read(f"a {name} b")["ids"].tolist()[len(reader.tokenizer.prefix) : -1]
            assert not special & set(inner)


def test_a_clip_tokenizer_json_reads_as_transformers(clip_words, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer(vocab=clip_words[0], merges=clip_words[1])
    theirs.save_pretrained(tmp_path)
    write_clip_words(tmp_path, clip_words)
    ours = T.ClipTokenizer(tmp_path / "tokenizer.json", 10**6)
    assert ours.content == T.ClipTokenizer(tmp_path / "vocab.json", 10**6).content
    many = [text for text in nasty(2200) if not any(name in text.lower() for name in SPECIAL)]
    known = T.unicodedata.category                             # of this Python's Unicode, older than theirs
    many = [text for text in many if all(known(char) != "Cn" for char in text)]
    wrong = [
        (text, ours.encode(text), ids)
        for text, ids in zip(many, theirs(many)["input_ids"])
        if ours.encode(text) != ids[1:-1]
    ]
    assert not wrong, f"{len(wrong)} differ, such as {wrong[0]}"


def test_clip_merges_a_repeated_pair_everywhere_at_once(tmp_path):
    transformers = pytest.importorskip("transformers")
    parts = ["x", "x</w>", "xx", "xxxx", "xx</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {part: i for i, part in enumerate(parts)}
    merges = [("x", "x"), ("xx", "xx")]
    write_clip_words(tmp_path, (vocab, merges))
    ours = T.ClipTokenizer(tmp_path / "vocab.json", 10)
    theirs = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    assert [parts[i] for i in ours.encode("xxxxxx")] == ["xxxx", "x", "x</w>"]
    for count in range(1, 40):
        assert ours.encode("x" * count) == theirs("x" * count)["input_ids"][1:-1], count


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda j: j["model"].update(type="BPE"), "its model is not the unigrams of T5"),
        (lambda j: j["normalizer"].update(type="Lowercase"), "its normaliser Lowercase is not T5's"),
        (lambda j: j.pop("model"), "is damaged: 'model'"),
        (lambda j: j.update(model=[]), "is damaged"),
        (lambda j: j["model"].update(vocab={"a": 1}), "is damaged"),
        (lambda j: j["model"].update(vocab=[["a", "b"]] * 9), "is damaged"),
        (lambda j: j["model"].update(unk_id=10**9), "is damaged"),
        (lambda j: j["model"]["vocab"][9].__setitem__(1, 1e99), "is damaged"),
        (lambda j: j["normalizer"].update(precompiled_charsmap="AAAA"), "is damaged"),
        (lambda j: j.update(added_tokens=7), "is damaged"),
        (lambda j: j["model"].update(vocab=j["model"]["vocab"][:9]), "has 9 pieces"),
    ],
)
def test_a_bad_tokenizer_json_is_one_line(edit, message, t5_folder, spiece, tmp_path):
    folder = copy(t5_folder, tmp_path / "t5")
    transformers_t5(spiece)[0].save_pretrained(folder)
    (folder / "spiece.model").unlink()
    assert load_text_encoder(TextConfig([str(folder)]))
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_text_encoder(TextConfig([str(folder)]))
    assert "\n" not in str(caught.value)


def test_a_caption_is_cut_by_its_tokens(t5_folder):
    """Whatever the length: characters are cut only where they cannot become tokens that are kept."""
    caption = " ".join(f"house {number}" for number in range(500))[:5000]
    for length in (77, 128, 1024, 4096):
        reader = load_text_encoder(TextConfig([str(t5_folder)], length)).reader
        tokens = reader.tokenizer.encode(caption)
        entry = reader.read(caption)
        assert entry["cut"] == (len(tokens) > length - 1)
        assert entry["ids"].tolist() == [*tokens[: length - 1], 1]
        assert reader.counts["cleaned"] == 0
    assert len(load_text_encoder(TextConfig(text_length=4096)).reader.read("x" * 10**6)["ids"]) == 4096


# ------------------------------------------------------------------------------------- layouts, other models


def fingerprint(folder, **config) -> str:
    return load_text_encoder(TextConfig([str(folder)], 32, **config)).fingerprint


def test_the_folder_of_a_pipeline_or_its_parts_may_be_named(t5_folder, clip_folder, tmp_path):
    alone = copy(clip_folder, tmp_path / "alone")
    for number, folder in enumerate((clip_folder, t5_folder)):
        end = f"_{number + 1}" if number else ""
        part = copy(folder, (tmp_path / "pipe").joinpath(f"text_encoder{end}")) if number else None
        if not number:
            (tmp_path / "pipe").mkdir()
            part = copy(folder, tmp_path / "pipe" / "text_encoder")
        words = tmp_path / "pipe" / f"tokenizer{end}"
        words.mkdir()
        for name in ("vocab.json", "merges.txt", "spiece.model"):
            if (part / name).exists():
                (part / name).rename(words / name)
        (part / "model.safetensors").rename(part / "model.fp16.safetensors")
        if not number:
            assert fingerprint(tmp_path / "pipe") == fingerprint(alone)
    assert fingerprint(tmp_path / "pipe/text_encoder") == fingerprint(alone)
    assert fingerprint(tmp_path / "pipe/text_encoder_2") == fingerprint(t5_folder)
    with pytest.raises(ValueError, match=r"pipe has no config.json \(found text_encoder, text_encoder_2, tok"):  # noqa: E501
        fingerprint(tmp_path / "pipe")


def test_pieces_under_another_name_are_the_same_encoder(t5_folder, clip_folder, spiece, clip_words, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = copy(t5_folder, tmp_path / "t5")
    (folder / "spiece.model").rename(folder / "tokenizer.model")
    assert fingerprint(folder) == fingerprint(t5_folder)
    (folder / "tokenizer.model").unlink()
    transformers_t5(spiece)[0].save_pretrained(folder)
    assert T.same_encoder(fingerprint(folder), fingerprint(t5_folder), tokens=True)
    folder = copy(clip_folder, tmp_path / "clip")
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    transformers.CLIPTokenizer(vocab=clip_words[0], merges=clip_words[1]).save_pretrained(folder)
    assert T.same_encoder(fingerprint(folder), fingerprint(clip_folder), tokens=True)


@pytest.mark.parametrize(
    "kind", ["gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "llama", "t5gemma", "siglip", "siglip_text_model"]  # noqa: E501
)
def test_other_models_are_named_by_their_type(kind, t5_folder, tmp_path):
    folder = copy(t5_folder, tmp_path / "other")
    sizes = {"hidden_size": 2048, "vocab_size": 256000, "num_hidden_layers": 26}
    (folder / "config.json").write_text(json.dumps(sizes | {"model_type": kind}))
    with pytest.raises(ValueError, match=f"model_type is '{kind}', which is not read here"):
        load_text_encoder(TextConfig([str(folder)]))


CRAFTED = [None, [], {}, "x", -1, 0, 10**30, 1e300, True, [[]] * 9, {"a": {"b": []}}]


@pytest.mark.parametrize("value", CRAFTED, ids=range(len(CRAFTED)))
def test_a_crafted_config_is_one_line(value, t5_folder, clip_folder, tmp_path):
    for number, (source, names) in enumerate(
        [(t5_folder, [*T.T5_SHAPE]), (clip_folder, [*T.CLIP_TEXT, "text_config", "text_config_dict"])]
    ):
        folder = copy(source, tmp_path / str(number))
        good = json.loads((folder / "config.json").read_text())
        for name in names:
            for place in (good, good.get("text_config")):
                if place is None:
                    continue
                content = copies.deepcopy(good)
                (content if place is good else content["text_config"])[name] = value
                (folder / "config.json").write_text(json.dumps(content))
                try:
                    load_text_encoder(TextConfig([str(folder)]))
                except ValueError as error:
                    assert "\n" not in str(error)  # noqa: PT017
                    assert str(folder) in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "change",
    [
        {"relative_attention_num_buckets": 3},
        {"relative_attention_max_distance": 8},
        {"d_model": 499_999, "d_kv": 499_999, "num_heads": 499_999, "d_ff": 499_999, "vocab_size": 499_999},
        {"num_layers": 999},
    ],
)
def test_sizes_are_compared_with_the_file_before_anything_is_allocated(change, t5_folder, tmp_path):
    folder = copy(t5_folder, tmp_path / "t5")
    edit_config(**change)(folder)
    with pytest.raises(ValueError, match=r"config.json"):
        load_text_encoder(TextConfig([str(folder)]))


def test_a_deep_config_is_one_line(t5_folder, tmp_path):
    folder = copy(t5_folder, tmp_path / "t5")
    (folder / "config.json").write_text('{"a":' * 10**5)
    with pytest.raises(ValueError, match="config.json is damaged"):  # noqa: RUF043
        load_text_encoder(TextConfig([str(folder)]))


def test_a_pickle_that_lies_about_its_size_is_refused(t5_folder, tmp_path):
    folder = as_bin(t5_folder, tmp_path / "bin")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(tensors | {Q: torch.zeros(1, 1).expand(32, 32)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is larger than what is stored of it"):
        load_text_encoder(TextConfig([str(folder)], allow_bin=True))


def test_flags_have_limits_that_a_reader_of_the_fields_finds():
    source = Path(T.__file__).read_text(encoding="utf-8")
    for name, limits in {
        "text_length": "[4..4096 tokens]",
        "byte_width": "[32..2048 channels]",
        "byte_layers": "[1..24 layers]",
    }.items():
        (line,) = re.findall(rf"^    {name}: .*$", source, re.MULTILINE)
        assert line.endswith(limits)
    with pytest.raises(ValueError, match=r"--text-encoder has no value. Give bytes, or folders$"):
        TextConfig([])


# -------------------------------------------------------------- an encoder belongs to a checkpoint by content


def old_fingerprint(folder: Path, name: str, length: int, dtype="bf16") -> str:
    """As it was written before all bytes were hashed: the folder's name, the first and last rows."""
    encoder, _ = T.frozen_encoder(str(folder), TextConfig([str(folder)], length, dtype))
    tower, weights = encoder.tower, T.Weights(folder, False)
    files = [folder / file for file in ("spiece.model", "vocab.json", "merges.txt")]
    words = [T.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()]
    content = json.loads((folder / "config.json").read_text())
    shape = {"model_type": "t5"} if content["model_type"] == "t5" else {}
    table = T.T5_SHAPE if shape else T.CLIP_TEXT
    content = content.get("text_config", content) | {"model_type": (*shape.values(), "clip_text_model")[0]}
    content["projection_dim"] = json.loads((folder / "config.json").read_text()).get("projection_dim", 512)
    shape = T.read_shape(table, content, folder)
    result = T.sha256(repr((repr(shape), "last", dtype, *words)).encode())
    for tensor in tower.state_dict():
        for rows in (slice(0, 1), slice(-1, None)):
            row = weights.read[tensor](rows).float().numpy()
            result.update(tensor.encode() + row.tobytes())
    return f"{name} d={encoder.dim} length={encoder.length} {result.hexdigest()[:32]}"


def test_old_fingerprints_go_on_being_accepted(t5_folder, clip_folder, tmp_path):
    t5 = fingerprint(t5_folder)
    old = old_fingerprint(t5_folder, "my t5 (old)", 32)
    assert T.same_encoder(old, t5)
    assert T.same_encoder(t5, old)
    assert T.same_encoder(old, t5, tokens=True)
    clip = fingerprint(clip_folder)
    old_clip = old_fingerprint(clip_folder, "clip", 32)
    assert T.same_encoder(old_clip, clip)
    assert not T.same_encoder(old_clip, clip, tokens=True)  # which merged repeated pairs otherwise
    both = load_text_encoder(TextConfig(["bytes", str(t5_folder), str(clip_folder)], 32)).fingerprint
    start = both.split(" + ")[0]
    assert T.same_encoder(f"{start} + {old} + {old_clip}", both)
    for other in (f"{start} + {old_clip} + {old}", f"{start} + {old}", old, "", f"{start}1 + {old} + {old_clip}"):  # noqa: E501
        assert not T.same_encoder(other, both)
    assert T.fingerprints(f"{old} {t5}") == [old, t5]  # as a file of embeddings has several
    assert T.fingerprints(both) == both.split(" + ")[1:]
    long = load_text_encoder(TextConfig([str(t5_folder)], 1024)).fingerprint
    older = old_fingerprint(t5_folder, "t5", 1024)
    assert T.same_encoder(older, long)
    assert not T.same_encoder(older, long, tokens=True)  # which cut at 2,000 characters


def test_every_number_counts_and_the_name_of_the_folder_does_not(t5_folder, tmp_path):
    folder = copy(t5_folder, tmp_path / "some name d=3")
    before = fingerprint(t5_folder)
    assert fingerprint(folder) == before == fingerprint(f"{folder}/")

    def scale(tensors):
        tensors[Q][1:-1] *= 3

    edit_tensors(scale)(folder)
    after = fingerprint(folder)
    assert not T.same_encoder(after, before)
    assert not T.same_encoder(fingerprint(t5_folder, text_dtype="fp32"), before)


def test_weights_are_hashed_once_for_each_file(t5_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder, reads, digest = copy(t5_folder, tmp_path / "t5"), [], T.Weights.digest

    def counted(self, model, parts, also=()):
        reads.append(parts == [slice(None)])
        return digest(self, model, parts, also)

    monkeypatch.setattr(T.Weights, "digest", counted)
    before = [fingerprint(folder) for _ in range(3)]
    assert (len(set(before)), sum(reads)) == (1, 1)
    (kept,) = (tmp_path / "home" / "limn").iterdir()
    kept.write_text("torn")
    assert fingerprint(folder) == before[0]
    assert sum(reads) == 2
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))
    assert fingerprint(folder) == before[0]
    assert sum(reads) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # no room for it
    assert fingerprint(folder) == before[0]


def test_an_encoder_is_found_by_its_content(t5_folder, clip_folder, tmp_path, monkeypatch):
    config = TextConfig(["bytes", "old/place/t5", "clip/"], 32)
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir()
    beside.mkdir()
    monkeypatch.chdir(here)
    t5, clip = copy(t5_folder, beside / "renamed"), copy(clip_folder, here / "clip")
    copy(clip_folder, beside / "t5")  # the name of another
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text("{}")
    places = ["bytes", str(t5), str(clip)]
    stored = load_text_encoder(TextConfig(places, 32)).fingerprint
    near = [beside, Path()]
    found = T.locate(config, stored, near, [])
    assert found.text_encoder == ["bytes", str(t5), "clip/"]
    assert load_text_encoder(found).fingerprint == stored
    old = f"{stored.split(' + ')[0]} + {old_fingerprint(t5, 't5', 32)} + {old_fingerprint(clip, 'clip', 32)}"
    assert T.locate(config, old, near, []).text_encoder == found.text_encoder
    t5.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"the text encoder t5 bf16 last d=32 .* is not in old/place/t5 .*is no "  # noqa: E501
                                         r"folder.* nor near. Say where its folder is: --text-encoder DIR$"):
        T.locate(config, stored, near, [])
    with pytest.raises(ValueError, match=r"is not in clip \(clip_text_model bf16 last d=.*--text-encoder DIR$"):  # noqa: E501
        T.locate(config, stored, near, ["clip"])
    found = T.locate(config, stored, near, [str(tmp_path / "elsewhere")])
    assert found.text_encoder == ["bytes", str(tmp_path / "elsewhere"), "clip/"]
    assert T.locate(TextConfig(), "bytes {}", near, []) == TextConfig()


def test_embeddings_in_shards_need_no_folder_beside_them(t5_folder, clip_folder, tmp_path):
    """Neither weights nor tokenizer; but where the folder is there, it must be theirs."""
    places = [str(t5_folder), "bytes", str(clip_folder)]
    live = load_text_encoder(TextConfig(places, 32))
    stored = " ".join(encoder.fingerprint for encoder in live.encoders if not encoder.trainable)

    def lookup(number, encoder, load):
        assert load is None
        return Stored(encoder.dim, encoder.pooled_dim)

    for names in (["gone", "bytes", "away"], places):
        inside = load_text_encoder(TextConfig(names, 32), lookup, stored)
        assert inside.fingerprint == live.fingerprint
        assert (inside.dim, inside.pooled_dim, inside.length) == (live.dim, live.pooled_dim, live.length)
        assert [e.length for e in inside.encoders] == [e.length for e in live.encoders]
        assert say(inside, CAPTIONS)[0].shape == say(live, CAPTIONS)[0].shape
    alone = load_text_encoder(TextConfig([str(clip_folder)], 32), lookup, stored)
    assert alone.fingerprint == live.encoders[2].fingerprint  # one of several
    old = old_fingerprint(t5_folder, "t5-tiny", 32)
    for name in ("gone", str(t5_folder)):
        inside = load_text_encoder(TextConfig([name], 32), lookup, old)
        assert inside.fingerprint == old  # by which the embeddings are looked up
        assert (inside.dim, inside.pooled_dim) == (32, 32)
    for config in (
        TextConfig(["gone"], 32),  # which of the two?
        TextConfig(["gone", "away"], 31),
        TextConfig(["gone", "away"], 64),
        TextConfig(["gone", "away"], 32, "fp32"),
        TextConfig([str(t5_folder), "away"], 32, "fp32"),
        TextConfig([str(clip_folder), str(clip_folder)], 32, clip_layer="penultimate"),
    ):
        with pytest.raises(ValueError, match=r"the embeddings were made with t5 bf16.*Write the shards again"):  # noqa: E501
            load_text_encoder(config, lookup, stored)


# ------------------------------------------------------------------------------ what is written in pictures


def streams(**options):
    torch.manual_seed(0)
    return load_text_encoder(TextConfig(transcription="bytes", transcription_width=32, **options))


def spoken(encoder, captions, lines, **how):
    """What both streams say of captions and lines that are read apart, as in training."""
    batch = read(encoder, captions)
    letters = encoder.transcriber.batch([encoder.transcriber.read(text) for text in lines])
    batch |= {f"transcription_{name}": x for name, x in letters.items()}
    return encoder(**encoder.inputs(batch, "cpu", **how))


@torch.no_grad()
def test_two_streams_say_what_each_says_alone_whatever_stands_beside_it():
    encoder = streams()
    lines = ["TAXI\nGO", "", "X"]
    for trim in (False, True):
        said = spoken(encoder, ["a", "a red house", ""], lines, trim=trim)
        assert said.keys() == {f"{stream}{name}" for stream in ("", "transcription_")
                               for name in ("context", "mask", "pooled")}
        assert said["transcription_mask"].sum(1).tolist() == [8, 0, 2]
        assert not said["transcription_context"][~said["transcription_mask"]].any()
        assert not said["transcription_pooled"][1].any()
        for i, line in enumerate(lines):
            alone = encoder.encode([""], "cpu", [line])
            count = int(alone["transcription_mask"].sum())
            apart = alone["transcription_context"][0, :count] - said["transcription_context"][i, :count]
            assert not count or apart.abs().max() < 1e-5
    captions, other = encoder.encode(["a red house"], "cpu"), encoder.encode(["a red house"], "cpu", ["TAXI"])
    assert torch.equal(captions["context"], other["context"])
    assert not captions["transcription_mask"].any()


@torch.no_grad()
@pytest.mark.parametrize(("a", "b"), [
    ("TAXI", "TAIX"), ("AA", "AAA"), ("AB\nCD", "CD\nAB"), ("AB\nCD", "ABCD")])
def test_the_order_and_the_lines_of_letters_matter(a, b):
    said = streams().encode(["", ""], "cpu", [a, b])
    assert (said["transcription_context"][0] - said["transcription_context"][1]).abs().max() > 0.1
    assert (said["transcription_pooled"][0] - said["transcription_pooled"][1]).abs().max() > 1e-3


@torch.no_grad()
def test_letters_stand_at_their_place_in_their_line_from_both_ends():
    torch.manual_seed(0)
    letters = T.LetterEmbedding(8, 16)
    encode = T.ByteTokenizer().encode
    a, b, _, again, after, _, end, *_ = letters(torch.tensor([[*encode("AB\nABC"), 1, 0, 0]]))[0]
    line, place = letters.line.weight, letters.place.weight
    lines_left, places_left = letters.lines_left.weight, letters.places_left.weight
    moved = line[1] - line[0] + place[1] - place[0] + lines_left[0] - lines_left[1]
    torch.testing.assert_close(again - a, moved + places_left[3] - places_left[2])
    torch.testing.assert_close(after - b, line[1] - line[0] + place[2] - place[1]
                               + lines_left[0] - lines_left[1] + places_left[2] - places_left[1])
    last = lines_left[0] + places_left[0]
    torch.testing.assert_close(end, letters.bytes.weight[1] + line[1] + place[4] + last)
    short = letters(torch.tensor([[*encode("AB\nABC"), 1]]))[0]
    torch.testing.assert_close(short, letters(torch.tensor([[*encode("AB\nABC"), 1, 0, 0]]))[0, :7])


@torch.no_grad()
def test_blocks_that_say_of_all_letters_the_same_do_not_silence_them():
    """What training does to them first: a vector that all share grew to 30 times what tells letters apart."""
    encoder = streams()
    common = 30 * torch.randn(32)
    last = encoder.transcription.tower.encoder.block[-1]
    last.register_forward_hook(lambda block, given, said: said + common)
    said = encoder.encode([""] * 26, "cpu", [chr(65 + i) for i in range(26)])
    letters = said["transcription_context"][:, 0]
    assert letters.std(0).mean() > 0.3 * letters.square().mean().sqrt()
    pooled = said["transcription_pooled"]
    assert pooled.std(0).mean() > 0.15 * pooled.square().mean().sqrt()


def test_every_weight_of_both_streams_learns_and_without_text_has_a_gradient():
    encoder = streams(text_length=32)
    for captions, lines in ((["a red house"], ["TAXI\nGO"]), ([""], [""])):
        encoder.zero_grad()
        said = spoken(encoder, captions, lines)
        sum(said[name].square().sum() for name in said if "mask" not in name).backward()
        gradients = [p.grad for p in encoder.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert captions == [""] or all(gradient.any() for gradient in gradients)


def test_a_frozen_encoder_of_captions_stays_outside_of_what_is_trained(t5_folder):
    encoder = load_text_encoder(TextConfig([str(t5_folder)], transcription="bytes", transcription_width=32))
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"transcription"}
    said = spoken(encoder, ["a red house"], ["TAXI"])
    sum(x.float().sum() for x in said.values()).backward()
    alone = load_text_encoder(TextConfig([str(t5_folder)]))
    context, *_ = say(alone, ["a red house"])
    torch.testing.assert_close(said["context"], context)
    assert T.same_encoder(encoder.fingerprint, encoder.fingerprint)
    assert not T.same_encoder(encoder.fingerprint, alone.fingerprint)
    assert T.fingerprints(encoder.fingerprint) == [alone.fingerprint]
