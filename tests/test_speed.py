"""What keeps a GPU busy, shown without one: no wait for the device, one launch for many weights, nothing
compiled twice. A step on the meta device has shapes and no numbers, so whatever looks at a number fails."""
import json
import os
import subprocess
import sys
import types
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import text_encoder
import train

ROOT = Path(__file__).parent.parent
TINY = ["--size", "16", "--channels", "32", "--channel-mult", "1", "1", "--attn-resolutions", "8",
        "--patch", "1", "--head-dim", "16", "--emb-dim", "64", "--byte-width", "32", "--batch-size", "4",
        "--warmup", "0", "--cooldown", "0", "--device", "cpu", "--dtype", "fp32", "--workers", "0",
        "--val-every", "0", "--sample-every", "0", "--log-every", "0", "--save-every", "0"]
ENLARGES = ["--lowres", "4", "--prediction", "v", "--conv-only", "--crop", "8", "--efficient"]
META = torch.device("meta")


@pytest.fixture(autouse=True)
def own_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()


def flags(*changes):
    """TINY with some flags changed, each with its values."""
    argv = list(TINY)
    for word in changes:
        if word.startswith("--") and word in argv:
            start = end = argv.index(word)
            while end + 1 < len(argv) and not argv[end + 1].startswith("--"):
                end += 1
            del argv[start:end + 1]
    return [*argv, *changes]


def trainer_of(device, configs):
    """A trainer on a device, and its first batch, which lies on the host."""
    cfg, data_cfg, *_ = configs
    host = torch.device("cpu")
    ranks = train.Ranks()
    text, _ = train.load_text(configs, [], host, None, ranks)
    objective = train.build(configs, text, host).to(device)
    state = train.State(objective, cfg.weight_decay, cfg.clip, cfg.ema_decay, False, cfg.profiles, "",
                        objective.matrices() if cfg.optimizer == "muon" else None)
    trainer = train.Trainer(cfg, objective, state, device, ranks)
    pictures = data.Pictures(data_cfg, cfg.size, cfg.seed)
    pictures.draws = partial(train.draws, 0, "noise", 0.1, 0, cfg.batch_size)
    pictures.reader = text.reader
    batches = data.loader(pictures, 0, cfg.batch_size, cfg.batch_size, pin=device.type == "cuda")
    return trainer, next(batches)


# ------------------------------------------------------------------------------------ no wait for the device


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


class Watch(TorchDispatchMode):
    """Keeps the calls on the device; AssertionError for those that wait for it: what depends on numbers, what
    comes to the host, and what goes to the device while the host waits."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(tensors_in([*args, *kwargs.values()]))
        here = any(x.device == self.device for x in given)
        looks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        if function is torch.ops.aten.index.Tensor:            # by numbers, not by a mask, its shape is known
            looks = any(x.dtype == torch.bool for x in given[1:])
        assert not (here and looks), f"{function} looks at numbers of the device"
        try:
            found = function(*args, **kwargs)
        except NotImplementedError as e:
            raise AssertionError(f"{function} copies to the host: {e}") from e
        there = list(tensors_in([found]))
        assert not here or all(x.device == self.device for x in there), f"{function} copies to the host"
        sent = any(x.device == self.device for x in there) and any(x.device != self.device for x in given)
        if sent and function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            assert kwargs.get("non_blocking") or args[2:3] == (True,), f"{function} waits for the device"
        if here:
            self.calls.append((function, args, kwargs))
        return found


@pytest.fixture
def on_meta(monkeypatch):
    """Trainer and batch of some flags on the meta device, which has no autocast and no clock, and is told to
    have kernels over many tensors, as CUDA has."""
    optimizers = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(sys.modules["torch.nn.utils.clip_grad"], "_has_foreach_support", lambda *a: True)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())
    monkeypatch.setattr(train, "clock", lambda device: 0.0)
    return lambda *changes: trainer_of(META, train.parse(flags(*changes)))


@pytest.mark.parametrize("changes", [
    [], ["--optimizer", "muon", "--micro-batch", "2"], ["--t-density", "importance"], ENLARGES,
    ["--loss-weight", "learned", "--profiles", "3"], ["--t-density", "log_normal", "--learn-sigma"]])
def test_a_step_does_not_wait_for_the_device(on_meta, changes):
    trainer, batch = on_meta(*changes)
    for _ in range(2):
        with Watch(META) as watch:
            trainer.step(batch, 0.1)
        assert len(watch.calls) > 500


@pytest.mark.parametrize(("look", "why"), [
    (lambda x: x.sum().item(), "looks at numbers"),
    (lambda x: x.tolist(), "copies to the host|looks at numbers"),
    (lambda x: bool(x.any()), "looks at numbers"),
    (lambda x: x[x > 0], "looks at numbers"),
    (lambda x: x.nonzero(), "looks at numbers"),
    (lambda x: x.cpu(), "copies to the host"),
    (lambda x: torch.ones(4).to(x.device), "waits for the device"),
    (lambda x: x.copy_(torch.ones(4)), "waits for the device")])
def test_what_waits_for_the_device_is_seen(on_meta, monkeypatch, look, why):
    trainer, batch = on_meta()
    record = train.Denoising.record

    def looking(self, meter, inputs, given):
        record(self, meter, inputs, given)
        look(given["loss"].detach())

    monkeypatch.setattr(train.Denoising, "record", looking)
    with Watch(META), pytest.raises(AssertionError, match=why):
        trainer.step(batch, 0.1)


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_a_program_starts_without_a_walk_over_all_that_torch_has_made(program):
    """The garbage collector took 0.8 of the 2.4 seconds of --help: during the imports, and at the end."""
    code = ("import gc, runpy, sys\n"
            f"sys.argv = ['{program}', '--help']\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit:\n    walks = gc.get_stats()[2]['collections']\n"
            "    print(walks, gc.isenabled(), len(gc.get_objects()) < 0.1 * gc.get_freeze_count())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: {program}")
    assert done.stdout.splitlines()[-1] == "0 True True"


# ------------------------------------------------------------------------------ one launch for many weights


def layout(x):
    return x.shape, [stride for size, stride in zip(x.shape, x.stride()) if size > 1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_kernels_over_many_weights_stay_on_their_fast_path(on_meta, optimizer):
    """On CUDA a launch takes many weights only where they lie alike in all lists; else each takes its own."""
    trainer, batch = on_meta("--optimizer", optimizer, "--profiles", "3", "--channel-mult", "1", "2")
    with Watch(META) as watch:
        trainer.step(batch, 0.1)
    seen = set()
    for function, args, _ in watch.calls:
        name = function.overloadpacket.__name__
        if name.startswith(("_foreach", "_fused")):
            seen.add(name.strip("_"))
            lists = [x for x in args if isinstance(x, list) and x and isinstance(x[0], torch.Tensor)]
            counters = 1 if name.startswith("_fused") else 0                  # of AdamW, one number each
            for several in zip(*lists[:len(lists) - counters]):
                assert all(layout(x) == layout(several[0]) for x in several), (name, *map(layout, several))
    assert seen >= {"foreach_sub", "foreach_mul", "foreach_add", "foreach_norm", "fused_adamw"}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("changes", [["--channel-mult", "1", "2"], ENLARGES, ["--checkpointing"]])
def test_gradients_lie_as_their_weights(on_meta, monkeypatch, device, changes):
    """DDP warns where they do not, and copies them."""
    seen = {}

    def update(self, lr):
        for name, p in self.net.named_parameters():
            seen[name] = p.grad.stride() == p.stride()
        return torch.zeros(2, device=device)

    monkeypatch.setattr(train.State, "update", update)
    trainer, batch = trainer_of(torch.device(device), train.parse(flags(*changes)))
    trainer.step(batch, 0.1)
    assert len(seen) > 50
    assert [name for name, alike in seen.items() if not alike] == []


def test_launches_of_an_update_do_not_grow_with_the_weights(on_meta):
    counts = []
    for layers in (2, 20):
        net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers))).to(META)
        state = train.State(net, 0.1, 1.0, 0.99, False, snapshots=3)
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        state.update(0.1)
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        with Watch(META) as watch:
            state.update(0.1)
        counts.append(len(watch.calls))
    assert counts[0] == counts[1] > 10


class Elsewhere(torch.Tensor):
    """A number on the host that says it is on a device."""
    is_cpu = False


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_averages_follow_alike_on_all_devices(share):
    torch.manual_seed(0)
    weights = [torch.randn(30, 3), torch.randn(5)]
    here, there = ([torch.zeros(30, 3).add(2.0), -torch.ones(5)] for _ in range(2))
    before = [x.clone() for x in here]
    train.follow(here, weights, torch.tensor(share))
    train.follow(there, weights, torch.tensor(share).as_subclass(Elsewhere))
    for old, w, a, b in zip(before, weights, here, there):
        assert torch.allclose(a, old + share * (w - old), atol=1e-6)
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
        if not share:                                          # of an update that was skipped
            assert torch.equal(a, old)
            assert torch.equal(b, old)


# ------------------------------------------------------------------------------- one graph, compiled once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of frozen encoders as they are published, small, with random weights."""
    torch.manual_seed(0)
    t5 = tmp_path_factory.mktemp("t5")
    shape = {"vocab_size": 384, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3,
             "model_type": "t5", "feed_forward_proj": "gated-gelu"}
    (t5 / "config.json").write_text(json.dumps(shape))
    tower = text_encoder.T5Encoder(types.SimpleNamespace(**text_encoder.T5_SHAPE | shape))
    save_file(tower.state_dict(), t5 / "model.safetensors")

    clip = tmp_path_factory.mktemp("clip")
    letters = list(text_encoder.letters_of_bytes().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    transformers.CLIPTextModelWithProjection(config).save_pretrained(clip)
    (clip / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (clip / "merges.txt").write_text("#version: 0.2\n")
    return {"bytes": "bytes", "t5": str(t5), "clip": str(clip)}


@pytest.fixture
def graphs(monkeypatch):
    """What train.py compiles, as on CUDA: whole, with texts padded to one length, and an error for a second
    time. The list gets each graph."""
    found = []

    def backend(module, inputs):
        found.append(module)
        return module.forward

    for kind in (text_encoder.TextEncoder, text_encoder.MultiEncoder):
        real = kind.inputs
        monkeypatch.setattr(kind, "inputs", lambda self, batch, device, trim=False, real=real:
                            real(self, batch, device))
    monkeypatch.setattr(train, "compiled", lambda net, device, wanted:
                        torch.compile(net, backend=backend, fullgraph=True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield found


def small_of(stage, name):
    """The kind of network that a preset is: two of its levels, few channels, and pictures of few pixels."""
    row = train.PRESETS[stage, name]
    size = {64: ["--size", "16"], 256: ["--size", "16", "--lowres", "4"],
            1024: ["--size", "512", "--lowres", "128"]}[stage]
    crop = ["--crop", "8"] if row.get("crop") else []
    attention = ["8"] if row.get("attn_resolutions") else []
    return [*size, *crop, "--model", name, "--channel-mult", "1", "2", "--num-res-blocks", "1",
            "--attn-resolutions", *attention, "--patch", str(min(2, row.get("patch", 2))), "--channels", "32",
            "--head-dim", "16", "--emb-dim", "64", "--byte-width", "32", "--batch-size", "2",
            "--device", "cpu", "--dtype", "fp32", "--steps", "9"]


KINDS = {}
for preset in train.PRESETS:
    small = small_of(*preset)
    own = {name: train.PRESETS[preset].get(name) for name in ("efficient", "conv_only", "prediction",
                                                              "loss_weight", "t_density", "size_shift")}
    small[small.index("--model") + 1] = ""
    KINDS.setdefault(f"{small} {own}", preset)


@pytest.mark.parametrize("preset", [
    preset if preset in ((64, "tiny"), (256, "small")) else pytest.param(preset, marks=pytest.mark.slow)
    for preset in KINDS.values()])
def test_every_kind_of_preset_is_one_graph_in_training_and_in_sampling(preset, graphs):
    trainer, batch = trainer_of(torch.device("cpu"), train.parse(small_of(*preset)))
    for _ in range(2):
        trainer.step(batch, 1e-3)
    assert len(graphs) == 1

    network = torch.compile(trainer.state.ema.network(), fullgraph=True, backend=lambda m, _: m.forward)
    with torch.no_grad():
        inputs = trainer.objective.inputs(batch, torch.device("cpu"))
        given = {name: inputs[name] for name in inputs if name not in ("x0", "eps", "t", "weight")}
        condition = trainer.state.ema.encode(**given)
        for t in (0.9, 0.3):
            out = network(inputs["x0"], torch.full((2,), t), **condition)
    assert out.shape == inputs["x0"].shape


@pytest.mark.parametrize("encoders", [
    "bytes t5 clip", "t5 cached", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "clip"))])
def test_every_text_encoder_trains_in_one_graph(encoders, folders, graphs, tmp_path):
    names = [folders[name] for name in encoders.split() if name in folders]
    cache = ["--text-cache", str(tmp_path / "cache"), "--limit", "4"] if "cached" in encoders else []
    train.main(flags("--steps", "3", "--text-encoder", *names, *cache))
    assert len(graphs) == 1


def test_nothing_is_compiled_again_between_captions_of_all_lengths_validation_and_previews(
        graphs, monkeypatch, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        data.save_png(data.Image.new("RGB", (16, 16), (6 * i, 99, 0)), folder / f"{i}.png", {}, print)
        (folder / f"{i}.txt").write_text("x" * (4 * i))
    widths = []
    real = train.Denoising.record
    monkeypatch.setattr(train.Denoising, "record", lambda self, meter, inputs, given: (
        widths.append(int(inputs["mask"].sum(1).max())), real(self, meter, inputs, given)))
    train.main(flags("--steps", "20", "--data", str(folder), "--val-every", "7", "--sample-every", "12",
                     "--micro-batch", "2", "--log-every", "3", "--save-every", "8", "--val-images", "8",
                     "--held-out", "0"))
    assert len(set(widths)) > 5
    assert len(graphs) == 1


def test_a_graph_that_breaks_and_one_that_changes_are_seen(graphs, monkeypatch):
    trainer, batch = trainer_of(torch.device("cpu"), train.parse(flags()))
    trainer.step(batch, 1e-3)
    with pytest.raises(torch._dynamo.exc.RecompileError):
        trainer.step({name: value[:2] for name, value in batch.items()}, 1e-3)
    real = train.Denoising.encode
    monkeypatch.setattr(train.Denoising, "encode", lambda self, mask, **other: (
        print(mask.sum().item()), real(self, mask=mask, **other))[1])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        trainer.step(batch, 1e-3)


# ----------------------------------------------------------------------------- the training thread launches


def test_the_training_thread_does_not_move_the_data_itself():
    """100 ms of the processor a step before a thread received them, of which 0.1 is left."""
    command = [sys.executable, str(ROOT / "tests" / "bench_loop.py"), "--device", "cpu", "--batch", "128",
               "--steps", "6", "--workers", "1", "--pause", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {}
    for line in done.stdout.splitlines():
        if line.startswith("| "):
            name, *values = line.strip("| ").split(" | ")
            rows[name] = values
    assert len(rows) == 6
    assert float(rows["a batch from the workers"][2]) < 5
    assert float(rows["**together**"][2]) < 8


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_on_a_gpu_does_not_wait_for_it(optimizer):
    argv = [*flags("--optimizer", optimizer, "--micro-batch", "2"), "--no-compile"]
    argv[argv.index("--device") + 1] = "cuda"
    trainer, batch = trainer_of(torch.device("cuda"), train.parse(argv))
    trainer.step(batch, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batch, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_compiled_run_on_a_gpu_falls_on_no_error():
    argv = flags("--steps", "4", "--val-every", "2", "--sample-every", "4", "--val-images", "4")
    argv[argv.index("--device") + 1] = "cuda"
    train.main(argv)


@pytest.fixture
def gpu_script():
    """Runs tests/gpu.sh on the CPU, with all of it small."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                   "OMP_NUM_THREADS": "1"}
    script = ["bash", str(ROOT / "tests" / "gpu.sh"), "--device", "cpu", "--shrink", "--batches", "2",
              "--step-batch", "2"]
    return lambda *more: subprocess.run([*script, *more], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_one_command_for_gpus_prints_every_figure(gpu_script, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        data.save_png(data.Image.new("RGB", (16, 16), (60 * i, 99, 0)), folder / f"{i}.png", {}, print)
    done = gpu_script("--train", str(folder), "--train-minutes", "5", "--minutes", "20")
    assert done.returncode == 0, done.stderr
    title, line, *rows = done.stdout.splitlines()
    assert title.startswith("| CPU, torch")
    assert line == "|---|---|"
    names = " ".join(row.split(" | ")[0] for row in rows)
    for part in ("tests marked gpu", "`small`", "`base`", "diffusers", "imagen-pytorch", "T5", "--size 64"):
        assert part in names
    figures = "found", "pictures/s", "captions/s", "GiB", "raw loss"
    for row in rows:
        assert "not installed" in row or any(figure in row for figure in figures), row


def test_the_one_command_for_gpus_fails_where_figures_are_missing(gpu_script):
    late = gpu_script("--minutes", "0")
    assert late.returncode == 1
    assert late.stdout.count("**missing**") >= 6
    assert "no time left, see --minutes" in late.stderr
    assert "figures are missing" in late.stderr
