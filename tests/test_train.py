"""train.py: flags, formulas, the loop, resuming, signals, faults; in this process where that is possible."""
import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
import typing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import data
import diffusion
import model
import sample
import text_encoder
import train

ROOT = Path(__file__).parent.parent
TINY = [
    "--size", "16", "--channels", "32", "--channel-mult", "1", "1", "--attn-resolutions", "8", "--patch", "1",
    "--head-dim", "16", "--text-length", "32", "--byte-width", "32", "--byte-layers", "1", "--dtype", "fp32",
    "--batch-size", "8", "--steps", "12", "--warmup", "2", "--cooldown", "4", "--device", "cpu", "--workers",
    "0", "--lr", "1e-3", "--prediction", "v", "--val-every", "0", "--sample-every", "0",
    "--log-every", "0", "--save-every", "0"]


STARTED = []


def flags(out, *changes):
    """TINY with some flags changed: a name, then its values."""
    argv = [*TINY, "--out", str(out)]
    for change in changes:
        name, *values = change.split()
        if name in argv:
            start = argv.index(name)
            end = next((i for i in range(start + 1, len(argv)) if argv[i].startswith("--")), len(argv))
            del argv[start:end]
        argv += [name, *values]
    return argv


def run(out, *changes):
    train.main(flags(out, *changes))
    if (Path(out) / ".lock").exists():
        (Path(out) / ".lock").read_text()                                     # closing it frees the lock
    return out


def start(out, *changes, ranks=0, before=(), code="", **options):
    """A process that trains. ranks: of torchrun; before: the command around it; code: what runs ahead."""
    script = [str(ROOT / "train.py")]
    if code:
        driver = Path(out).with_suffix(".py")
        driver.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                          "import os, signal, torch, train, model, diffusion\n"
                          "train.matmul_peak = lambda *a: 1e11\n"
                          f"rank = int(os.environ.get('RANK', 0))\n{code}\ntrain.main(sys.argv[1:])\n")
        script = [str(driver)]
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                     *options.pop("torchrun", ())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [*before, *launcher, *script, *flags(out, *changes)]
    STARTED.append(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE, start_new_session=True, **options))
    return STARTED[-1]


def finish(process, timeout=600):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def wait_for(process, step, out):
    """Wait until metrics.jsonl has the line of a step."""
    for _ in range(12000):
        if any(line["step"] >= step for line in metrics(out)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in ten minutes")


def metrics(out):
    path = Path(out) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def digest(out):
    """The newest step, and one hash of everything that its checkpoint holds."""
    folder = model.checkpoint_folders(Path(out))[-1]
    tensors = [model.load_tensors(folder / f"{name}.safetensors")[0] for name in ("ema", "train")]
    return int(folder.name), *(model.checksum(t, {}) for t in tensors)


def during(monkeypatch, action, at=None):
    """Call `action(state)` before each update, or before the one of number `at` of this process."""
    real, count = train.State.update, [0]

    def update(state, lr):
        count[0] += 1
        if at is None or count[0] == at:
            action(state)
        return real(state, lr)

    monkeypatch.setattr(train.State, "update", update)


def dies(capfd, function, status):
    """The one line on standard error with which a run ends."""
    with pytest.raises(SystemExit) as end:
        function()
    err = capfd.readouterr().err
    assert end.value.code == status
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    return err


@pytest.fixture(autouse=True)
def own_process(monkeypatch, tmp_path):
    """Signal handlers and environment as they were; nothing slow is measured."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(train, "matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    while STARTED:                                                            # of a test that failed half-way
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)
    for number, handler in before.items():
        signal.signal(number, handler)


# TINY as a super-resolution stage, on crops, with blur.
UP = ("--lowres 8", "--crop 12", "--conv-only", "--efficient", "--patch 2", "--channel-mult 1",
      "--num-res-blocks 1", "--attn-resolutions", "--blur 0.5 0.4 0.6")


WRITES = ("--data words", "--transcription bytes", "--transcription-width 32", "--transcription-length 16")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The digest of twelve undisturbed steps, of two micro-batches each."""
    out = tmp_path_factory.mktemp("straight") / "run"
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    run(out, "--micro-batch 4")
    for number, handler in before.items():
        signal.signal(number, handler)
    return digest(out)


# --------------------------------------------------------------------------------------------------- formulas


def test_learning_rate_is_a_trapezium():
    cfg = train.TrainConfig(lr=2.0, steps=100, warmup=9, cooldown=19)
    rates = [train.rate(step, cfg) for step in range(101)]
    assert rates[:10] == pytest.approx([2.0 * (k + 1) / 10 for k in range(10)])
    assert rates[10:80] == [2.0] * 70
    assert rates[80:] == pytest.approx([2.0 * k / 20 for k in range(20, -1, -1)])
    assert train.rate(0, train.TrainConfig(lr=1.0, warmup=0, cooldown=0, steps=1)) == 1.0


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
def test_the_average_is_plain_and_then_exponential(decay):
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    state = train.State(net, 0.0, 0.0, decay, False)
    expected = None
    for n in range(1, 31):
        net(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
        state.update(0.1)
        weight = 1 / n if n < 1 / (1 - decay) else 1 - decay
        now = net.weight.detach().clone()
        expected = now if expected is None else expected + weight * (now - expected)
        assert torch.allclose(state.ema.weight, expected, atol=1e-6)
    if decay == 0.99:                                                         # 30 < 100: still the plain mean
        assert weight == 1 / 30


def test_adamw_is_the_published_one_and_decays_matrices_only():
    torch.manual_seed(0)
    net, lr, decay = nn.Linear(3, 2).double(), 0.01, 0.1
    state = train.State(net, decay, 0.0, 0.5, False)
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in values.items()} for _ in range(2))
    for n in range(1, 6):
        net(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
        for name, p in net.named_parameters():
            m[name] = 0.9 * m[name] + 0.1 * p.grad
            v[name] = 0.99 * v[name] + 0.01 * p.grad**2
            step = (m[name] / (1 - 0.9**n)) / ((v[name] / (1 - 0.99**n)).sqrt() + 1e-8)
            values[name] = values[name] * (1 - lr * (decay if p.ndim > 1 else 0)) - lr * step
        state.update(lr)
        for name, p in net.named_parameters():
            assert torch.allclose(p, values[name], atol=1e-9)


def test_the_norm_is_reported_before_it_is_clipped():
    net = nn.Linear(2, 1, bias=False)
    state = train.State(net, 0.0, 0.5, 0.5, False)
    net.weight.grad = torch.tensor([[3.0, 4.0]])
    norm, bad = state.update(0.0)
    assert norm == 5
    assert bad == 0
    moment = state.optimizer.state[net.weight]["exp_avg"]
    assert torch.allclose(moment, 0.1 * torch.tensor([[0.3, 0.4]]), atol=1e-6)


@pytest.mark.parametrize(("fp16", "muon"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_changes_nothing(value, fp16, muon):
    torch.manual_seed(0)
    twins = []
    for faults in (False, True):
        torch.manual_seed(1)
        net = nn.Module()
        net.unet = nn.Module()
        net.unet.mid = nn.ModuleList([layer := nn.Linear(3, 2)])
        state = train.State(net, 0.1, 1.0, 0.9, fp16, matrices={layer.weight: 1} if muon else None)
        for step in range(5):
            if faults and step in (0, 3):
                state.scaler.scale(torch.zeros(()))                           # as the loss would be
                before = {k: v.clone() for group in state.tensors().values() for k, v in group.items()}
                scale = state.scaler.get_scale()
                for p in net.parameters():
                    p.grad = torch.full_like(p, 1.0)
                layer.weight.grad[1, 2] = value
                norm, bad = state.update(0.1)
                assert bad == 1
                assert not norm.isfinite()
                after = {k: v for group in state.tensors().values() for k, v in group.items()}
                assert all(torch.equal(before[k], after[k]) for k in before)
                assert state.scaler.get_scale() == (scale / 2 if fp16 else 1)
            state.scaler.scale(layer(torch.full((4, 3), step + 1.0)).square().sum()).backward()
            assert state.update(0.1)[1] == 0
        twins.append(state.tensors())
    for name, group in twins[0].items():    # skipped ones do not count either
        assert all(torch.allclose(v, twins[1][name][k], atol=1e-5) for k, v in group.items())


@pytest.mark.parametrize("prob", [0.0, 0.1, 1.0])
def test_captions_are_dropped_at_the_rate_that_is_asked_for(prob):
    kept = train.draws(3, "noise", prob, 0, 1, range(20000))["kept"]
    assert float((~kept).mean()) == pytest.approx(prob, abs=0.0064 * (0 < prob < 1))


def test_texts_are_dropped_alone_and_together_at_the_rates_that_are_asked_for():
    found = train.draws(3, "noise", 0.1, 0, 1, range(20000), (0.3, 0.2))
    caption, written = ~found["kept"], ~found["transcription_kept"]
    both = 0.2 + 0.8 * 0.1 * 0.3
    assert float((caption & written).mean()) == pytest.approx(both, abs=0.012)
    assert float((caption & ~written).mean()) == pytest.approx(0.8 * 0.1 * 0.7, abs=0.01)
    assert float((written & ~caption).mean()) == pytest.approx(0.8 * 0.9 * 0.3, abs=0.012)
    alone = train.draws(3, "noise", 0.1, 0, 1, range(20000))
    assert alone["transcription_kept"].all()
    for name in ("u", "noise", "lowres_u", "lowres_noise"):
        assert np.array_equal(alone[name], found[name])
    assert float((~alone["kept"]).mean()) == pytest.approx(0.1, abs=0.0064)


def test_draws_depend_on_seed_purpose_and_position_alone():
    positions = range(2**40, 2**40 + 50)
    found = train.draws(1, "noise", 0.5, 0, 1, positions)
    for seed, purpose in ((2, "noise"), (1, "x")):
        other = train.draws(seed, purpose, 0.5, 0, 1, positions)
        assert not np.array_equal(found["noise"], other["noise"])
        assert not np.array_equal(found["u"], other["u"])
    again = [train.draws(1, "noise", 0.5, 0, 1, [p]) for p in reversed(positions)]
    for name, values in found.items():
        assert np.array_equal(np.concatenate([one[name] for one in reversed(again)]), values)
    assert found["u"].dtype == found["lowres_u"].dtype == np.float32
    assert found["u"].min() >= 0
    assert found["u"].max() <= 1
    assert len(set(found["noise"].tolist())) == 50
    assert set(found["noise"].tolist()).isdisjoint(found["lowres_noise"].tolist())


def test_times_lie_in_the_strata_of_batches_that_begin_anywhere():
    u = train.draws(0, "noise", 0.1, 24, 8, range(24, 40))["u"]
    assert (u * 8).astype(int).tolist() == [*range(8), *range(8)]
    parts = [train.draws(0, "noise", 0.1, 24, 8, range(p, p + 4))["u"] for p in range(24, 40, 4)]
    assert np.array_equal(np.concatenate(parts), u)


def test_times_of_a_batch_are_stratified(monkeypatch, tmp_path):
    seen, real = [], diffusion.losses

    def losses(net, x0, eps, t, *rest, **condition):
        seen.append(t)
        return real(net, x0, eps, t, *rest, **condition)

    monkeypatch.setattr(diffusion, "losses", losses)
    run(tmp_path / "run", "--steps 3", "--t-density uniform")
    for t in seen[-3:]:
        assert sorted((t * 8).long().tolist()) == list(range(8))


# ------------------------------------------------------------------------- what a step does with an objective


def test_a_meter_sums_values_and_pairs_and_starts_anew():
    meter, cpu = train.Meter(), torch.device("cpu")
    meter.add(loss=torch.tensor([1.0, 2.0]), norm=torch.tensor(5.0))
    meter.add(loss=torch.tensor([6.0]), norm=torch.tensor(3.0))
    for sums, counts in (([1.0, 2.0, 0.0], [1.0, 1.0, 0.0]), ([0.0, 2.0, 4.0], [0.0, 1.0, 2.0])):
        meter.add(buckets=(torch.tensor(sums), torch.tensor(counts)), replaced=(2, 1))
    sums, counts = meter.read(train.Ranks(), cpu)
    assert sums == {"loss": [9], "norm": [8], "buckets": [1, 4, 4], "replaced": [4]}
    assert counts == {"loss": [3], "norm": [2], "buckets": [1, 2, 2], "replaced": [2]}
    meter.add(loss=torch.tensor([0.5, 0.25]))
    assert meter.read(train.Ranks(), cpu) == ({"loss": [0.75]}, {"loss": [2]})


class Joining(nn.Module):
    """Pictures and captions that find each other among all of a batch (Radford et al. 2021, 2103.00020):
    symmetric cross-entropy of two linear towers, with a learned scale."""
    joins = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pictures, self.words = nn.Linear(12, 5), nn.Linear(7, 5)
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def inputs(self, part, device):
        return {name: torch.as_tensor(part[name], device=device) for name in ("picture", "words")}

    def forward(self, picture, words):
        seen, read = (nn.functional.normalize(x) for x in (self.pictures(picture), self.words(words)))
        return {"seen": seen, "read": read, "log_scale": self.log_scale.expand(len(seen))}

    def loss(self, given):
        logits = given["log_scale"].mean().exp() * given["seen"] @ given["read"].T
        right = torch.arange(len(logits))
        both = [nn.functional.cross_entropy(way, right, reduction="sum") for way in (logits, logits.T)]
        return (both[0] + both[1]) / 2

    def record(self, meter, inputs, given):
        meter.add(seen=given["seen"].detach().square().sum(1), words=inputs["words"][:, 0])

    def after_step(self, ranks):
        pass

    def matrices(self):
        return {}


def pairs(first=0, last=8):
    """Rows of a fixed batch of pictures and captions."""
    rng = np.random.default_rng(0)
    batch = {"picture": rng.normal(size=(8, 12)).astype(np.float32),
             "words": rng.normal(size=(8, 7)).astype(np.float32),
             "captions": [f"caption {i}" for i in range(8)], "cut": np.zeros(8, bool)}
    return {name: column[first:last] for name, column in batch.items()} | {
        "replaced": [], "uncaptioned": [], "recoded": [], "overlong": []}


def joined(micro, ranks, batch):
    """The gradients after the backward pass of a batch in parts, and what was recorded of it."""
    device = torch.device("cpu")
    cfg = train.TrainConfig(micro_batch=micro, batch_size=8, compile=False, dtype="fp32")
    objective = Joining()
    state = train.State(objective, 0.0, 0.0, 0.9, False)
    trainer = train.Trainer(cfg, objective, state, device, ranks)
    trainer.backward(train.parts_of(batch, micro), len(batch["captions"]))
    return {name: p.grad for name, p in objective.named_parameters()}, trainer.meter.read(ranks, device)


@pytest.fixture
def whole_batch():
    """The gradient of the mean loss of the whole batch, by one backward pass without any trainer."""
    objective = Joining()
    loss = objective.loss(objective(**objective.inputs(pairs(), torch.device("cpu")))) / 8
    loss.backward()
    found = {name: p.grad for name, p in objective.named_parameters()}
    assert min(gradient.abs().max() for gradient in found.values()) > 0.01
    return found


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_a_loss_that_joins_pictures_has_the_gradient_of_the_whole_batch_in_any_parts(micro, whole_batch):
    """Gao et al. 2021, arXiv:2101.06983; a mean over parts would not know the other parts' captions."""
    found, (sums, counts) = joined(micro, train.Ranks(), pairs())
    for name, gradient in whole_batch.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=0)
    assert counts == {"seen": [8], "words": [8], "loss": [8]}                   # each picture once
    assert sums["seen"] == pytest.approx([8], abs=1e-5)


def test_parts_that_do_not_know_each_other_would_have_another_gradient(whole_batch, monkeypatch):
    monkeypatch.setattr(Joining, "joins", False)
    found, _ = joined(2, train.Ranks(), pairs())
    assert (found["words.weight"] - whole_batch["words.weight"]).abs().max() > 0.01


def one_of_two(rank, micro, folder):
    """A rank of two, in a process of its own: half of the batch, in parts; of the toy and of a CLIP."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks = train.Ranks()
    torch.save(joined(micro, ranks, pairs(4 * rank, 4 * rank + 4)), folder / f"{rank}.pt")
    torch.save(clip_joined(micro, ranks), folder / f"clip-{rank}.pt")
    dist.barrier()
    os._exit(0)                                                               # as Ranks.leave does


@pytest.mark.parametrize("micro", [2, 4])
def test_a_loss_that_joins_pictures_has_the_same_gradient_on_two_ranks(micro, whole_batch, tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, micro, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    expected, mean = clip_expected()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        found, (sums, counts) = torch.load(tmp_path / f"clip-{rank}.pt")
        assert_gradients(found, expected)
        assert sums["loss"][0] / counts["loss"][0] == pytest.approx(mean, rel=1e-5)
        found, (sums, counts) = torch.load(tmp_path / f"{rank}.pt")
        for name, gradient in whole_batch.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=0)
        assert counts == {"seen": [8], "words": [8], "loss": [8]}               # of all ranks
        assert sums["words"] == pytest.approx([pairs()["words"][:, 0].sum()], abs=1e-5)


def clip_trainer(micro, ranks):
    """The trainer of a small CLIP, away from the zeros of its start, and a batch of eight pictures, of which
    the second and the seventh have one caption."""
    configs = train.parse(flags("unused", "--objective clip", f"--micro-batch {micro}", "--no-compile"))
    torch.manual_seed(0)
    device, text = torch.device("cpu"), text_encoder.load_text_encoder(configs[4])
    objective = train.build(configs, text, device)
    with torch.no_grad():
        for p in objective.parameters():
            p.copy_(0.05 * torch.randn_like(p) + p)
    pictures = data.Pictures(configs[1], 16, 0)
    pictures.draws, pictures.reader = partial(train.draws, 0, "noise", 0.0, 0, 8), text.reader
    items = [pictures[i] for i in range(8)]
    items[6] |= {name: items[1][name] for name in ("caption", "words")}
    half = slice(0, 8) if ranks.world == 1 else slice(4 * ranks.rank, 4 * ranks.rank + 4)
    state = train.State(objective, 0.0, 0.0, 0.9, False)
    return train.Trainer(configs[0], objective, state, device, ranks), pictures.batch(items[half])


def clip_joined(micro, ranks):
    """As `joined`, of the CLIP."""
    trainer, batch = clip_trainer(micro, ranks)
    trainer.backward(train.parts_of(batch, micro), len(batch["captions"]))
    gradients = {name: p.grad for name, p in trainer.objective.named_parameters()}
    return gradients, trainer.meter.read(ranks, trainer.device)


def clip_expected():
    """The gradients of the whole batch and its mean loss, both written out picture by picture."""
    trainer, batch = clip_trainer(8, train.Ranks())
    objective = trainer.objective
    inputs = objective.inputs(batch, trainer.device)
    x_t = diffusion.noised(inputs["x0"], inputs["eps"], inputs["t"], objective.schedule)
    condition = {name: inputs[name] for name in inputs if name in ("mask", "ids")}
    seen = objective.unet(x_t, inputs["t"])
    read = objective.unet.read(**objective.text(**condition))
    assert sorted(torch.floor(8 * inputs["t"]).tolist()) == list(range(8))    # uniform, one in each eighth
    loss = 0.0
    for i, caption in enumerate(batch["captions"]):
        against = [j for j, other in enumerate(batch["captions"]) if j == i or other != caption]
        assert len(against) == (7 if i in (1, 6) else 8)
        for ours, theirs in ((seen, read), (read, seen)):
            logits = objective.unet.scale() * theirs[against] @ ours[i]
            loss = loss - logits.log_softmax(0)[against.index(i)] / 16
    loss.backward()
    return {name: p.grad for name, p in objective.named_parameters()}, loss.item()


def assert_gradients(found, expected):
    """Equal at 1e-6, and each weight has one."""
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_a_clip_has_the_gradient_of_the_whole_batch_in_any_parts(micro):
    expected, mean = clip_expected()
    found, (sums, counts) = clip_joined(micro, train.Ranks())
    assert_gradients(found, expected)
    assert counts["loss"] == counts["scale"] == [8]
    assert sums["loss"] == pytest.approx([8 * mean], rel=1e-5)
    scale = clip_trainer(8, train.Ranks())[0].objective.unet.scale().item()
    assert sums["scale"] == pytest.approx([8 * scale])


def test_the_memory_of_a_joined_batch_is_that_of_a_part():
    """The most numbers kept for a backward pass: of four parts at most 1.3 times those of one alone."""
    def kept(micro, parts):
        trainer, batch = clip_trainer(2, train.Ranks())
        sizes, alive = [0], [0]

        def pack(tensor):
            alive[0] += tensor.numel()
            sizes.append(alive[0])
            return tensor

        real = torch.Tensor.backward

        def backward(tensor, *args, **kwargs):
            real(tensor, *args, **kwargs)
            alive[0] = 0

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with pytest.MonkeyPatch.context() as patch, hooks:
            patch.setattr(torch.Tensor, "backward", backward)
            trainer.backward(train.parts_of(batch, micro)[:parts], micro * parts)
        return max(sizes)

    assert kept(2, 4) < 1.3 * kept(2, 1) < kept(8, 1)


def test_other_pictures_of_the_same_caption_are_not_wrong_ones():
    trainer, _ = clip_trainer(8, train.Ranks())
    seen = read = torch.eye(3)[[0, 1, 1]]
    given = {"seen": seen, "read": read, "scale": torch.full((3,), 50.0)}
    given["caption"] = torch.tensor([5.0, 7.0, 7.0])
    assert trainer.objective.loss(given) == pytest.approx(0, abs=1e-6)
    given["caption"] = torch.tensor([5.0, 7.0, 8.0])
    assert trainer.objective.loss(given) == pytest.approx(2 * math.log(2), abs=1e-6)


def test_a_clip_validates_keeps_its_best_and_resumes_exactly(tmp_path, capsys, monkeypatch):
    changes = ("--objective clip", "--steps 6", "--val-every 2", "--val-images 12", "--log-every 3",
               "--save-every 3", "--micro-batch 4")
    whole = run(tmp_path / "whole", *changes)
    shown = capsys.readouterr().out
    assert re.search(r"^step 2  val_loss [\d.]+  text_at_1 \[[\d., ]+\]$", shown, re.MULTILINE)
    lines = [line for line in metrics(whole) if "val_loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    names = {f"{what}_at_{k}" for what in ("text", "picture") for k in (1, 5)}
    for line in lines:
        assert set(line) == {"step", "val_loss", *names}
        assert all(len(line[name]) == len(train.TIMES) for name in names)
        assert all(one <= five for one, five in zip(line["text_at_1"], line["text_at_5"]))
    assert {"loss", "scale"} <= set(next(line for line in metrics(whole) if "loss" in line))
    assert not (whole / "samples").exists()

    best = min(lines, key=lambda line: line["val_loss"])
    _, meta = model.load_tensors(whole / "checkpoints/best/ema.safetensors")
    assert (meta["step"], float(meta["val_loss"])) == (str(best["step"]), best["val_loss"])
    assert meta["images"] == str(8 * best["step"])

    during(monkeypatch, lambda state: os.kill(os.getpid(), signal.SIGTERM), at=5)
    parts = run(tmp_path / "parts", *changes)
    run(tmp_path / "parts", *changes)
    assert digest(parts) == digest(whole)
    kept = [model.load_tensors(out / "checkpoints/best/ema.safetensors")[0] for out in (whole, parts)]
    assert model.checksum(kept[0], {}) == model.checksum(kept[1], {})


@pytest.mark.slow
def test_a_clip_is_the_same_on_two_ranks_in_parts(tmp_path):
    """End to end, its best checkpoint, too; sums differ in their order, and AdamW's first steps by signs."""
    changes = ("--objective clip", "--steps 2", "--val-every 1", "--val-images 12", "--optimizer adamw")
    status, _, err = finish(start(tmp_path / "two", *changes, "--micro-batch 2", ranks=2))
    assert status == 0, err
    run(tmp_path / "one", *changes)
    for left in ("checkpoints/000002", "checkpoints/best"):
        paths = [tmp_path / name / left / "ema.safetensors" for name in ("one", "two")]
        one, two = (torch.cat([value.flatten() for value in model.load_tensors(path)[0].values()])
                    for path in paths)
        assert (one - two).abs().quantile(0.99) < 1e-6
    losses = [[line.get("val_loss", line.get("loss")) for line in metrics(tmp_path / name)]
              for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_retrieval_counts_equal_captions_as_right():
    """Towers that say the number of the picture: all are found, the twins by either; turned by one, none."""
    trainer, _ = clip_trainer(8, train.Ranks())
    net = trainer.objective
    marks = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]).float()
    eye = torch.eye(8)

    def answers(seen):
        class Fixed:
            joins = True
            inputs = staticmethod(lambda part, device: {"t": torch.zeros(len(part)), "rows": part})
            loss, compared = net.loss, net.compared

            def __call__(self, t, rows):
                return {"seen": seen[rows], "read": eye[rows], "scale": torch.full((len(rows),), 9.0),
                        "caption": marks[rows]}

        class Pictures(list):
            batch = staticmethod(lambda items: torch.tensor(items))
            fetch_ahead = staticmethod(lambda position: None)
        return train.retrieval(Fixed(), Pictures(range(8)), 100, trainer)

    right = answers(eye[[0, 1, 2, 3, 4, 5, 7, 6]])                            # the twins see each other
    assert right["text_at_1"] == right["picture_at_5"] == [1] * len(train.TIMES)
    wrong = answers(eye[[1, 2, 3, 4, 5, 0, 6, 7]])
    assert wrong["text_at_1"] == wrong["picture_at_1"] == [0.25] * len(train.TIMES)


def test_a_step_moves_by_the_gradient_of_a_loss_that_joins_pictures(whole_batch):
    """Through `step`: its norm is that of the whole batch's gradient, and all weights move."""
    device, objective = torch.device("cpu"), Joining()
    before = [p.detach().clone() for p in objective.parameters()]
    cfg = train.TrainConfig(micro_batch=2, batch_size=8, compile=False, dtype="fp32")
    state = train.State(objective, 0.0, 0.0, 0.9, False)
    trainer = train.Trainer(cfg, objective, state, device, train.Ranks())
    trainer.step(pairs(), 0.1)
    sums, counts = trainer.meter.read(train.Ranks(), device)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in whole_batch.values()))
    assert sums["grad_norm"] == pytest.approx([norm], rel=1e-5)
    assert counts["grad_norm"] == counts["skipped"] == counts["replaced"] == [1]
    assert not any(torch.equal(old, new) for old, new in zip(before, objective.parameters()))


# ------------------------------------------------------------------------------------------------------ flags


def test_help_shows_every_field_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--model", "small", "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for cls in typing.get_args(train.Configs):
        source = (ROOT / f"{cls.__module__}.py").read_text()
        for f in dataclasses.fields(cls):
            comment = re.search(rf"^    {f.name}: [\s\S]*?  # (.*)$", source, re.MULTILINE)[1]
            assert " ".join(comment.split()) in shown, f.name
            assert f"--{f.name.replace('_', '-')} " in shown
    assert "(default: 50000)" in shown
    assert "(default: cosine)" in shown


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
@pytest.mark.parametrize("size", [64, 256, 1024])
def test_a_preset_moves_the_defaults_and_a_flag_moves_the_preset(size, name):
    cfg, _, shape, *_ = configs = train.parse(["--size", str(size), "--model", name])
    assert cfg.model == name
    found = {key: value for config in configs for key, value in vars(config).items()}
    moved = dict(train.PRESETS[size, name])
    del moved["weights"], moved["flops"]
    assert {key: found[key] for key in moved} == moved
    assert (cfg.out, found["lowres"]) == (f"runs/{size}", {64: 0, 256: 64, 1024: 256}[size])
    assert found["min_size"] == (size if size > 64 else 8)
    cfg, _, shape, *_ = train.parse(["--size", str(size), "--model", name, "--lr", "0.5", "--channels", "96",
                                     "--head-dim", "32"])
    assert cfg.lr == 0.5
    assert shape.channels == 96
    assert cfg.steps == train.PRESETS[size, name]["steps"]


@pytest.mark.parametrize("size", [64, 256])
def test_a_clip_has_the_noise_of_the_denoiser_of_its_size_and_nothing_that_is_for_drawing(size):
    for name in ("tiny", "small"):
        wanted, found = (
            {key: value for config in train.parse(["--size", str(size), "--model", name, *extra])
             for key, value in vars(config).items()}
            for extra in ([], ["--objective", "clip"]))
        changed = {key for key in wanted if wanted[key] != found[key]}
        assert changed <= {*train.CLIP, "objective", "out", "keep_best", "batch_size"}
        assert {key: found[key] for key in train.CLIP} == train.CLIP
        assert found["out"] == f"runs/clip-{size}"
        assert found["batch_size"] == max(128, wanted["batch_size"])


def test_a_clip_starts_from_a_denoiser_and_goes_on_as_none(tmp_path, capsys):
    run(tmp_path / "run", "--steps 1")
    capsys.readouterr()
    run(tmp_path / "clip", "--steps 1", "--objective clip", f"--init {tmp_path / 'run'}")
    said = capsys.readouterr().out
    new = re.search(r"new: (.*?), \d+ unused", said)[1].split()
    assert all("_pool." in name or name == "unet.scale_logit" for name in new)
    with pytest.raises(ValueError, match="the checkpoint has --objective denoise, not clip"):
        run(tmp_path / "run", "--steps 2", "--objective clip")


def test_a_preset_has_attention_where_its_sides_occur_and_a_flag_is_taken_at_its_word():
    for name, size, sides in (("small", 64, (16, 8)), ("small", 128, (16,)), ("base", 32, (32, 16, 8))):
        assert train.parse(["--model", name, "--size", str(size)])[2].attn_resolutions == sides
    assert train.parse(["--model", "small", "--attn-resolutions", "8"])[2].attn_resolutions == (8,)
    with pytest.raises(ValueError, match="--attn-resolutions 8 is not a side"):
        train.parse(["--model", "small", "--size", "128", "--attn-resolutions", "8"])


def test_flags_have_the_types_of_their_fields():
    cfg, pictures, shape, noise, text = train.parse(
        ["--no-compile", "--channel-mult", "1", "2", "--attn-resolutions", "16", "--patch", "4",
         "--data", "a:1", "b:2",
         "--text-encoder", "bytes", "--lr", "1e-4"])
    assert cfg.compile is False
    assert shape.channel_mult == (1, 2)
    assert pictures.data == ["a:1", "b:2"]
    assert text.text_encoder == ["bytes"]
    assert cfg.lr == 1e-4
    assert train.parse([])[0].compile is None


def folder_of(path, count, size=20):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((size, size, 3), 8 * i, np.uint8)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"grey {i}")
    return path


BAD_TRAIN = {
    "--stesp 5": "unknown flag --stesp. Did you mean --steps?",
    "--frobnicate": "unknown flag --frobnicate",
    "stray": "unknown flag stray",
    "--step 5": "unknown flag --step",                                        # no abbreviations
    "--steps": "expected one argument",
    "--steps five": "invalid int value: 'five'",
    "--steps 1.5": "invalid int",
    "--steps 0": "--steps 0 is outside",
    "--steps -1": "--steps -1 is outside",
    "--batch-size 0": "--batch-size 0 is outside",
    "--batch-size 100 --micro-batch 8": "Try 96 or 104",
    "--micro-batch -1": "--micro-batch -1",
    "--lr nan": "--lr nan is outside",
    "--lr inf": "--lr inf is outside",
    "--lr -1": "--lr -1.0 is outside",
    "--lr 0": "--lr 0.0 is outside",
    "--clip nan": "--clip nan is outside",
    "--ema-decay 1": "--ema-decay 1.0 is outside",
    "--uncond-prob 1.5": "--uncond-prob 1.5 is outside",
    "--seed -1": "--seed -1 is outside",
    "--seed 99999999999999999999999": "is outside",
    "--size 65": "--size 65",
    "--size 4": "--size 4 is outside",
    "--size 64 --size 32": "--size is given twice",
    "--channels 33": "--channels 33",
    "--objective clip --batch-size 1": "--batch-size 2 or more, not 1",
    "--objective clip --sample-every 9": "--sample-every 9 is for what draws",
    "--objective clip --lowres 32": "--lowres 32 is for what draws",
    "--objective clip --loss-weight learned": "--loss-weight learned is for what draws",
    "--objective clip --model sd15": "is for what draws",
    "--head-dim 7": "--head-dim 7",
    "--channel-mult 0": "--channel-mult",
    "--attn-resolutions 7": "--attn-resolutions 7",
    "--model huge": "invalid choice: 'huge'",
    "--dtype int8": "invalid choice: 'int8'",
    "--schedule wavy": "invalid choice",
    "--t-std nan": "--t-std nan",
    "--device tpu": "--device tpu is not here",
    "--device cuda": "--device cuda is not here",
    "--text-encoder nowhere": "nowhere",
    "--text-length 1": "--text-length 1",
    "--byte-width 33": "--byte-width 33",
    "--keep 0": "--keep 0 is outside",
    "--workers -2": "--workers -2 is outside",
    "--timeout 0": "--timeout 0.0 is outside",
    "--profiles -1": "--profiles -1 is outside",
    "--min-crop 0": "--min-crop 0",
    "--size 256 --lowres 60": "--size 256 is not a multiple of --lowres 60. Try --lowres 64",
    "--size 256 --crop 62": "--crop 62 must be a multiple of 8",
    "--size 256 --crop 512": "--crop 512 is not a multiple of 4 up to 256",
    "--crop 32": "--crop 32 is for a network that sees no whole picture. Add --conv-only",
    "--size 256 --blur 2 0 1": "--blur (2.0, 0.0, 1.0) is not a share",
    "--size 256 --max-aug 2": "--max-aug 2.0 is outside 0 to 1",
    "--lowres -3": "--lowres -3 is outside",
    "--train-only (": "--train-only ( is no regular expression",
    "--train-only xyz": "--train-only xyz is no weight",
    "--train-only x{99999999999}": "is no regular expression",
    f"--train-only {'(' * 5000}": "is no regular expression",
    "--channels 1000000": "--channels 1000000 is outside 0 to 8192",
    "--emb-dim 1000000": "--emb-dim 1000000 is outside",
    "--head-dim 1000000": "--head-dim 1000000 is outside",
    "--byte-width 1000000": "--byte-width 1000000 is outside 32 to 2048",
    "--num-res-blocks 1000000": "--num-res-blocks 1000000 is outside 0 to 64",
    "--channels 8192": "weights and its pictures needs",
    "--batch-size 1048576 --size 4096": "weights and its pictures needs",
    "--lowres 1000000": "--lowres 1000000 is outside 0 to 4096",
    "--transcription bytes --objective clip --size 64": "--transcription bytes is for what draws",
    "--transcription bytes --transcription-width 40": "--transcription-width 40 is no multiple of 32",
    "--transcription letters": "invalid choice: 'letters'",
    "--weave-resolutions 8": "--weave-resolutions (8,) is for what --transcription reads",
    "--text-crop 2": "--text-crop 2.0 is outside 0 to 1",
    "--data nowhere": "nowhere",
    "--data empty": "empty",
    "--data notes": "no pictures in notes",
    "--data grey:1 grey2": "give all a weight",
    "--data broken": "broken",
    "--out file": "--out file is a file",
    "--out file/run": "file/run",
    "--out foreign": "damaged",
    "--out other-format": "damaged",
}


@pytest.mark.parametrize("command", BAD_TRAIN)
def test_a_bad_command_ends_in_one_line(command, tmp_path, capfd, monkeypatch):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folder_of(tmp_path / "grey", 3)
    folder_of(tmp_path / "grey2", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.docx").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    for i in range(30):
        (tmp_path / f"broken/{i}.png").write_text("<html>")
    for name, meta in (("foreign", {}), ("other-format", {"format": "limn 99"})):
        folder = tmp_path / f"{name}/checkpoints/000005"
        folder.mkdir(parents=True)
        for part in ("ema", "train"):
            save_file({"transformer.h.0": torch.zeros(3)}, folder / f"{part}.safetensors", meta)
    argv = flags("run", command) if command.startswith(("--data", "--out", "--device")) else command.split()
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    err = dies(capfd, lambda: runpy.run_path(str(ROOT / "train.py"), run_name="__main__"), 2)
    assert err.startswith("train.py: error: ")
    assert BAD_TRAIN[command] in err


def test_more_ranks_than_the_batch_divides_over_is_an_error_of_rank_zero(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"--batch-size 8 does not divide over 3 ranks.*Try 6 or 9"):
        train.parse(flags("run"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    waited = []
    monkeypatch.setattr(train.time, "sleep", lambda seconds: waited.append(capfd.readouterr().err))
    with pytest.raises(SystemExit):
        train.die("the same on all ranks")
    assert waited == [""]                                      # until torchrun ends it, see below
    capfd.readouterr()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        train.die("of this\nrank", everywhere=True)
    assert capfd.readouterr().err == "train.py: error: rank 1: of this rank\n"


# ------------------------------------------------------------------------------ networks, states, checkpoints

UNET = model.ModelConfig(32, (1, 2), (1,), (8,), head_dim=16, patch=2)
META = {"config": "{}", "step": "5"}


def make_unet(config=UNET, seed=0, **options) -> model.UNet:
    torch.manual_seed(seed)
    return model.UNet(config, 16, 32, 20, **options)


def make_batch(batch=3) -> dict[str, torch.Tensor]:
    mask = torch.arange(12)[None] < torch.tensor((5, 12, 1)[:batch])[:, None]
    return {"x_t": torch.randn(batch, 3, 16, 16), "t": torch.rand(batch), "mask": mask,
            "context": torch.randn(batch, 12, 32), "pooled": torch.randn(batch, 20)}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


def save_steps(run: Path, steps, keep=9) -> None:
    for step in steps:
        files = {"ema": {"a": torch.full((50,), float(step))}, "train": {"b": torch.ones(3)}}
        train.save_checkpoint(run, step, files, META | {"step": str(step)}, keep)


@pytest.mark.parametrize(("stage", "name"), train.PRESETS)
def test_parameters_and_flops_are_those_of_the_table(stage, name):
    row, small = train.PRESETS[stage, name], {64: 0, 256: 64, 1024: 256}[stage]
    fields = [field.name for field in dataclasses.fields(model.ModelConfig)]
    config = model.ModelConfig(**{key: row[key] for key in fields if key in row})
    with torch.device("meta"):
        unet = model.UNet(config, stage, 128, 128, lowres=3 if small else 0)
        lowres = {"lowres": torch.empty(1, 3, small, small), "lowres_t": torch.empty(1)} if small else {}
        flops = train.count_flops(unet, torch.empty(1, 3, stage, stage), torch.empty(1),
                                  torch.empty(1, 128, 128), torch.empty(1, 128, dtype=torch.bool),
                                  torch.empty(1, 128), **lowres)
    weights = sum(p.numel() for p in unet.parameters())
    assert row["weights"] == float(f"{weights:.3g}")
    assert row["flops"] == float(f"{flops:.3g}")


def test_flops_are_the_same_on_the_cpu_and_grow_with_the_batch():
    unet, batch = make_unet(), make_batch()
    with torch.device("meta"):
        shadow = make_unet()
        empty = {k: torch.empty_like(v, device="meta") for k, v in batch.items()}
        expected = train.count_flops(shadow, **empty)
    assert train.count_flops(unet, **batch) == expected
    alone = train.count_flops(unet, **{k: v[:1] for k, v in batch.items()})    # the places are projected once
    assert expected == pytest.approx(3 * alone, rel=0.005)
    one = nn.Conv2d(3, 5, 3, padding=1)
    assert train.count_flops(one, torch.zeros(2, 3, 8, 8)) == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
    C, D, E, N, L = 32, 64, 48, 16, 6
    weave = model.Weave(C, 4, D, E, head_dim=16, carried=False)
    mask = torch.ones(1, L, dtype=torch.bool)
    given = torch.zeros(1, C, 4, 4), torch.zeros(1, L, D), mask, torch.zeros(1, E)
    reads = 2 * L * D * D + 2 * N * C * D + 2 * L * N * D
    writes = 2 * N * C * C + 2 * (L + 1) * D * C + 2 * N * (L + 1) * C
    assert train.count_flops(weave, *given) == 2 * (E * 2 * C + reads + 2 * L * D * 2 * D + writes)


def test_a_warm_start_copies_slices_and_reports():
    wider = model.ModelConfig(32, (1, 4), (1,), (8,), 16, 2)
    old, new = make_unet(seed=3), make_unet(wider, lowres=3, seed=4)
    tensors = old.state_dict() | {"gone": torch.zeros(2)}
    before = {name: p.clone() for name, p in new.state_dict().items()}
    report = train.warm_start(new, tensors, reinit="^null$")
    assert torch.equal(new.time[0].weight, old.time[0].weight)
    assert torch.equal(new.conv_in.weight[:, :24], old.conv_in.weight[:, :24])
    assert torch.equal(new.conv_in.weight[:, 24:], before["conv_in.weight"][:, 24:])
    assert torch.equal(new.null, before["null"])
    assert torch.equal(new.lowres_time[0].weight, before["lowres_time.0.weight"])
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (copied|sliced|new|unused)", report)}
    assert counts["copied"] + counts["sliced"] + counts["new"] == len(before)
    assert counts["unused"] == 1
    assert "unused: gone" in report


def test_an_encoder_of_captions_is_found_with_and_without_others_beside_it():
    """A transcription's, or one more in a row; that of the transcription is another one."""
    def encoder_of(**options):
        net = nn.Module()
        net.text = text_encoder.load_text_encoder(text_encoder.TextConfig(byte_width=32, **options))
        return net

    row, written = {"text_encoder": ["bytes", "bytes"]}, {"transcription": "bytes"}
    kinds = {"": {}, "captions.": written, "trained.0.": row, "captions.trained.0.": row | written}
    for (old, source), (new, wanted) in itertools.product(kinds.items(), repeat=2):
        tensors, net = encoder_of(**source).state_dict(), encoder_of(**wanted)
        before = {name: p.clone() for name, p in net.state_dict().items()}
        train.warm_start(net, tensors)
        after = net.state_dict()
        own = f"text.{old}tower."
        inside = [name.removeprefix(f"text.{old}") for name in tensors if name.startswith(own)]
        assert len(inside) > 8
        assert all(torch.equal(after[f"text.{new}{name}"], tensors[f"text.{old}{name}"]) for name in inside)
        second = "text.transcription.tower.shared.bytes.weight"
        if second in after:
            assert torch.equal(after[second], (tensors if second in tensors else before)[second])


def make_state(muon: bool = False) -> train.State:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 3))
    inside = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Linear(2, 5))
    inside.emb, inside.text_kv = nn.Linear(6, 8), nn.Linear(6, 12)
    net.unet = nn.ModuleDict({"mid": inside})
    net.to(memory_format=torch.channels_last)
    parts = {inside[0].weight: 1, inside[1].weight: 1, inside.emb.weight: 2, inside.text_kv.weight: 2}
    return train.State(net, weight_decay=0.1, clip=1.0, ema_decay=0.75, fp16=False,
                       matrices=parts if muon else None)


def update(state: train.State, step: int) -> None:
    g = torch.Generator().manual_seed(step)
    for p in state.weights:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g))
    state.update(0.05)


@pytest.mark.parametrize("muon", [False, True])
def test_training_goes_on_bit_for_bit_from_a_checkpoint(tmp_path, muon):
    straight, resumed = make_state(muon), make_state(muon)
    for step in range(6):
        if step == 3:
            train.save_checkpoint(tmp_path, step, resumed.tensors(), META, keep=1)
            resumed = make_state(muon)
            with torch.no_grad():
                resumed.weights[0].zero_()
            _, (weights, ema), _ = model.load_checkpoint(tmp_path, ("train", "ema"))
            resumed.load(ema, weights, {})
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
    turned = train.orthogonal(x).float()
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    new = torch.linalg.svdvals(turned)
    assert (s[:, -1] < 0.5 * s[:, 0]).all()
    assert turned.shape == x.shape
    assert new.max() < most
    assert (new[:, -1] > 0.08 * new[:, 0]).all()
    assert (torch.cosine_similarity(turned.flatten(1), (u @ vt).flatten(1)) > 0.85).all()
    exact = s.double() / (1.01 * s.double().norm(dim=1, keepdim=True))         # what the passes make of each
    for a, b, c in train.PASSES:
        exact = a * exact + b * exact**3 + c * exact**5
    exact = u.double() * exact[:, None] @ vt.double()
    assert (turned - exact).norm() < 0.1 * exact.norm()                        # in bfloat16
    assert not train.orthogonal(torch.zeros(shape)).any()


def test_muon_moves_the_matrices_inside_the_unet_as_the_published_one(monkeypatch):
    monkeypatch.setattr(train, "PASSES", [(3.4445, -4.7750, 2.0315)] * 3)     # those of torch.optim.Muon
    state = make_state(muon=True)
    inside = {name: p for name, p in state.net.named_parameters() if name.startswith("unet.") and p.ndim > 1}
    assert set(inside) == {f"unet.mid.{name}.weight" for name in ("0", "1", "emb", "text_kv")}
    parts = {"unet.mid.emb.weight": 2, "unet.mid.text_kv.weight": 2}       # scale and shift; keys and values
    flat = lambda name, x: x.movedim(1, -1).flatten(1).chunk(parts.get(name, 1))
    twins = {name: [nn.Parameter(part.detach().clone()) for part in flat(name, p)]
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


def test_snapshots_stay_few_and_even_and_the_newest_is_there(tmp_path):
    for step in range(10, 410, 10):
        train.save_snapshot(tmp_path, step, {"a": torch.zeros(1)}, step, most=5)
        kept = sorted(int(path.stem) for path in tmp_path.glob("*.safetensors"))
        assert len(kept) == min(5, step // 10)
        assert kept[-1] == step
        assert max(np.diff([0, *kept])) <= 3 * max(10, step / 5)
    assert [path.name for path in tmp_path.glob(".*")] == []
    train.save_snapshot(tmp_path, 200, {"a": torch.ones(1)}, 200, most=5)     # of a run that went back
    assert (tmp_path / "000400.safetensors").exists()


def test_why_nothing_can_be_compiled_is_one_line(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", broken)
    net = nn.Linear(2, 2)
    assert train.compiled(net, torch.device("cpu"), True) is net
    assert capsys.readouterr().out == (
        "warning: torch.compile is unavailable (RuntimeError: no compiler); running uncompiled\n")


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_checkpoint_is_published_in_the_order_that_survives_a_power_cut(tmp_path, monkeypatch):
    save_steps(tmp_path, [1], keep=1)
    calls, real_fsync, real_replace, real_rmtree = [], os.fsync, os.replace, train.shutil.rmtree

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
    monkeypatch.setattr(train.shutil, "rmtree", rmtree)
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


def test_leftovers_of_a_killed_save_are_ignored_and_replaced(tmp_path):
    save_steps(tmp_path, [1])
    leftover = tmp_path / "checkpoints" / ".tmp-000002"
    leftover.mkdir()
    (leftover / "ema.safetensors").write_bytes(b"half")
    (leftover / "other").write_bytes(b"")
    assert model.load_checkpoint(tmp_path)[0].name == "000001"
    save_steps(tmp_path, [2])
    assert not leftover.exists()
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "000002").iterdir()) == [
        "ema.safetensors", "train.safetensors"]


def test_saving_a_step_again_keeps_the_damaged_one_aside(tmp_path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "checkpoints" / "000002" / "ema.safetensors").write_bytes(b"torn")
    save_steps(tmp_path, [2])
    assert model.load_checkpoint(tmp_path)[0].name == "000002"
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
    assert model.load_checkpoint(tmp_path)[0].name == "000003"


def test_a_real_limit_of_the_file_size_leaves_everything_as_it_was(tmp_path):
    save_steps(tmp_path, [1])
    before, limits = listing(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    files = {"train": {"a": torch.ones(10)}, "ema": {"a": torch.ones(9999)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            train.save_checkpoint(tmp_path, 2, files, META, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) == before


# ------------------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_what_the_design_promises(tmp_path, capsys):
    out = run(tmp_path / "run", "--steps 4", "--log-every 2", "--val-every 2", "--val-images 40",
              "--sample-every 4", "--save-every 2", "--keep 1")
    assert {p.name for p in out.iterdir()} == {".lock", "checkpoints", "config.json", "first_batch.png",
                                               "metrics.jsonl", "samples"}
    assert [p.name for p in out.glob("samples/*")] == ["000004.png"]
    assert [p.name for p in out.glob("checkpoints/*")] == ["000004"]
    assert {p.name for p in out.glob("checkpoints/000004/*")} == {"ema.safetensors", "train.safetensors"}
    for picture in (out / "first_batch.png", out / "samples/000004.png"):
        Image.open(picture).load()
    stored = json.loads((out / "config.json").read_text())
    _, meta = model.load_tensors(out / "checkpoints/000004/train.safetensors")
    assert {k: stored[k] for k in json.loads(meta["config"])} == json.loads(meta["config"])
    _, meta = model.load_tensors(out / "checkpoints/000004/ema.safetensors")
    for group, values in json.loads(meta["config"]).items():                  # what is shared: less of it
        assert values == {name: stored[group][name] for name in values}
    assert {f.name for f in dataclasses.fields(train.TrainConfig)} == set(stored["TrainConfig"])
    assert (meta["step"], meta["images"]) == ("4", "32")
    logs, validations = metrics(out)[::2], metrics(out)[1::2]
    assert [line["step"] for line in metrics(out)] == [2, 2, 4, 4]
    named = {name for name in logs[0] if not name.startswith(("weights/", "gradients/"))}
    assert named == {"step", "images", "loss", "raw_loss", "grad_norm", "clipped", "pictures/s", "lr",
                     "skipped", "replaced", "uncaptioned", "recoded", "overlong", "buckets", "share_of_peak"}
    assert set(validations[0]) == {"step", "val_loss", "val_gap", "val_buckets"}
    assert all(len(line["buckets"]) == 8 and all(map(math.isfinite, line["buckets"])) for line in logs)
    assert logs[0]["images"] == 16
    assert validations[0]["val_loss"] == pytest.approx(0.2, abs=0.1)
    cfg = train.parse(flags(out, "--steps 4"))[0]
    assert [line["lr"] for line in logs] == pytest.approx([train.rate(1, cfg), train.rate(3, cfg)], rel=1e-5)


def test_dry_run_prints_the_cost_and_leaves_nothing(tmp_path, capsys):
    run(tmp_path / "run", "--dry-run")
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for word in ("parameters ", "forward ", "memory ", "speed ", "used ", "time ", "GFLOPs", "DataConfig(",
                 "TrainConfig(size=16", "ModelConfig(channels=32", "DiffusionConfig(", "TextConfig("):
        assert word in shown, word
    run(tmp_path / "run", "--dry-run", "--steps 1")
    assert "parameters " in capsys.readouterr().out


def test_eight_pictures_are_learned_by_heart(tmp_path):
    out = run(tmp_path / "run", "--limit 8", "--steps 120", "--lr 3e-3", "--log-every 30", "--val-every 120",
              "--val-images 8", "--ema-decay 0.9")
    *logs, validation = metrics(out)
    assert logs[-1]["raw_loss"] < 0.5 * logs[0]["raw_loss"]
    assert validation["val_loss"] < 0.08


@pytest.mark.parametrize("changes", [
    ("--t-density importance", "--loss-weight min_snr", "--checkpointing"),
    ("--loss-weight learned", "--learn-sigma", "--dtype bf16", "--t-density logit_normal"),
    ("--prediction flow", "--schedule flow", "--dtype fp16"), ("--optimizer adamw",),
    ("--clip 0", "--warmup 0", "--cooldown 0", "--ema-decay 0", "--weight-decay 0", "--profiles 4"),
    (*UP, "--micro-batch 4"), (*UP, "--picture-mode grey", "--train-only ^unet.(mid|up)"),
    (*UP, "--lowres-mode grey", "--checkpointing"), (*UP, *WRITES),
    (*WRITES, "--micro-batch 4", "--weave-resolutions 8", "--weave-carried")])
def test_options_train_and_resume_exactly(tmp_path, monkeypatch, changes):
    whole = digest(run(tmp_path / "whole", "--steps 4", *changes))
    during(monkeypatch, lambda state: os.kill(os.getpid(), signal.SIGTERM), at=2)
    run(tmp_path / "parts", "--steps 4", *changes)
    assert digest(tmp_path / "parts")[0] == 2
    run(tmp_path / "parts", "--steps 4", *changes)
    assert digest(tmp_path / "parts") == whole
    snapshots = [sorted((tmp_path / name).glob("profiles/*")) for name in ("whole", "parts")]
    assert [path.name for path in snapshots[1]] == ["000002.safetensors", "000004.safetensors"] * any(
        "--profiles" in change for change in changes)
    for paths in zip(*(found[-1:] for found in snapshots)):
        one, other = (model.load_tensors(path) for path in paths)
        assert model.checksum(one[0], one[1]) == model.checksum(other[0], other[1])


# --------------------------------------------------------------------------------------------------- resuming


def test_an_enlarging_stage_is_the_same_on_two_ranks_with_workers_and_in_parts(tmp_path):
    whole = digest(run(tmp_path / "whole", "--steps 4", "--micro-batch 4", *UP, "--val-every 4",
                       "--val-images 8", "--sample-every 4", "--log-every 4"))
    status, _, err = finish(start(tmp_path / "two", "--steps 4", "--workers 1", *UP, ranks=2))
    assert status == 0, err
    assert digest(tmp_path / "two") == whole
    for name in ("first_batch.png", "samples/000004.png"):
        Image.open(tmp_path / "whole" / name).load()
    assert metrics(tmp_path / "whole")[-1]["val_loss"] < 2


def test_the_low_resolution_picture_is_noised_at_levels_up_to_the_limit(tmp_path, monkeypatch):
    seen, real = [], diffusion.losses

    def losses(net, *args, **condition):
        seen.append(condition)
        return real(net, *args, **condition)

    monkeypatch.setattr(diffusion, "losses", losses)
    for name, limit in (("a", 0.6), ("b", 0.6), ("c", 0.0)):
        run(tmp_path / name, "--steps 2", *UP, f"--max-aug {limit}")
    runs = [seen[k:k + len(seen) // 3] for k in range(0, len(seen), len(seen) // 3)]
    first, second, clean = ([condition for condition in one if len(condition["lowres"]) == 8] for one in runs)
    levels = torch.cat([condition["lowres_t"] for condition in first])
    assert 0 <= levels.min() < 0.2
    assert 0.4 < levels.max() <= 0.6
    assert first[0]["lowres"].shape == (8, 3, 6, 6)
    assert all(torch.equal(a["lowres"], b["lowres"]) for a, b in zip(first, second, strict=True))
    assert not torch.cat([condition["lowres_t"] for condition in clean]).any()
    assert clean[0]["lowres"].abs().max() < 1.001


def test_a_run_starts_from_the_weights_of_another_one(tmp_path, capsys):
    run(tmp_path / "base", "--steps 1", "--patch 2", "--channel-mult 1", "--num-res-blocks 1",
        "--attn-resolutions")
    run(tmp_path / "up", "--steps 1", *UP, f"--init {tmp_path / 'base'}", "--reinit ^unet.null$")
    shown = capsys.readouterr().out
    found = re.search(r"base: (\d+) copied, (\d+) sliced: (.*), (\d+) new: (.*), (\d+) unused: ", shown)
    assert found, shown
    assert int(found[1]) > 10
    assert int(found[2]) > 0
    assert "unet.null" in found[5]
    with pytest.raises(ValueError, match="nowhere is missing"):
        run(tmp_path / "other", "--steps 1", "--init nowhere")


def test_weights_that_are_not_named_stay_as_they_are(tmp_path):
    run(tmp_path / "run", "--steps 1", "--train-only ^unet.mid")
    before, _ = model.load_tensors(tmp_path / "run/checkpoints/000001/train.safetensors")
    run(tmp_path / "run", "--steps 3", "--train-only ^unet.mid")
    after, _ = model.load_tensors(tmp_path / "run/checkpoints/000003/train.safetensors")
    moved = {name for name in before
             if name.startswith("weights.") and not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("weights.unet.mid") for name in moved)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopping_three_times_changes_no_bit(tmp_path, monkeypatch, straight, workers, capsys):
    during(monkeypatch, lambda state: os.kill(os.getpid(), signal.SIGTERM), at=1)
    run(tmp_path / "run", "--micro-batch 4", f"--workers {workers}")
    assert digest(tmp_path / "run")[0] == 1
    for stop in (5, 11):
        monkeypatch.undo()
        monkeypatch.setattr(train, "matmul_peak", lambda device, dtype: 1e11)
        steps = stop - digest(tmp_path / "run")[0]
        during(monkeypatch, lambda state: os.kill(os.getpid(), signal.SIGINT), at=steps)
        run(tmp_path / "run", "--micro-batch 4", f"--workers {2 - workers}")
        assert digest(tmp_path / "run")[0] == stop
    monkeypatch.undo()
    run(tmp_path / "run", "--micro-batch 4", f"--workers {workers}")
    assert digest(tmp_path / "run") == straight
    shown = capsys.readouterr().out
    assert shown.count("stopping at step") == 3
    assert "stopping at step 11; run the same command" in shown
    assert all(f"resumed from step {step} " in shown for step in (1, 5, 11))
    assert not multiprocessing.active_children()


def test_looking_at_a_run_does_not_change_it(tmp_path, straight):
    run(tmp_path / "run", "--micro-batch 4", "--log-every 1", "--val-every 5", "--val-images 8",
        "--sample-every 6", "--save-every 2")
    assert digest(tmp_path / "run") == straight


def gradients(monkeypatch, out, *changes):
    found = []
    during(monkeypatch, lambda state: found.extend(p.grad.clone() for p in state.weights), at=2)
    run(out, "--steps 2", *changes)
    return found


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch):
    whole = gradients(monkeypatch, tmp_path / "whole", "--lr 1e-9")
    for micro in (1, 2, 4):
        parts = gradients(monkeypatch, tmp_path / f"micro{micro}", "--lr 1e-9", f"--micro-batch {micro}")
        for a, b in zip(whole, parts, strict=True):
            assert float((a - b).norm()) <= 3e-5 * float(a.norm()) + 1e-9


def test_a_new_batch_size_neither_repeats_nor_skips_a_picture(tmp_path, monkeypatch, capsys):
    seen, real = [], train.draws

    def draws(seed, purpose, uncond_prob, first, batch_size, positions, **drops):
        seen.extend(positions if purpose == "noise" else ())
        return real(seed, purpose, uncond_prob, first, batch_size, positions)

    monkeypatch.setattr(train, "draws", draws)
    run(tmp_path / "run", "--steps 3")
    run(tmp_path / "run", "--steps 5", "--batch-size 16", "--lr 5e-4")
    assert seen == list(range(3 * 8 + 2 * 16))
    shown = capsys.readouterr().out
    for note in ("--steps 3 -> 5", "--batch-size 8 -> 16", "--lr 0.001 -> 0.0005"):
        assert f"note: {note} (checkpoint -> this run)" in shown
    assert shown.count("note: --") == 3


@pytest.mark.parametrize(("change", "message"), [
    ("--channels 64", "--channels 32, not 64"), ("--size 64,--patch 4", "--size 16, not 64"),
    ("--prediction eps", "--prediction v, not eps"), ("--byte-width 64", "--byte-width 32, not 64"),
    ("--learn-sigma", "--learn-sigma False, not True"), ("--profiles 4", "--profiles 0, not 4"),
    ("--loss-weight uniform", "--loss-weight learned, not uniform"),
    ("--t-density importance", "--t-density logit_normal, not importance")])
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, change, message):
    before = digest(run(tmp_path / "run", "--steps 1"))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", "--steps 2", *change.split(","))
    assert digest(tmp_path / "run") == before


def test_other_weights_of_the_text_encoder_are_refused(tmp_path, monkeypatch):
    run(tmp_path / "run", "--steps 1")
    load = text_encoder.load_text_encoder

    def other(*args):
        encoder = load(*args)
        encoder.fingerprint = "another one"
        return encoder

    monkeypatch.setattr(text_encoder, "load_text_encoder", other)
    with pytest.raises(ValueError, match="the text encoder is another one, not bytes"):
        run(tmp_path / "run", "--steps 2")


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    run(tmp_path / "run", "--steps 2")
    def times():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file() and p.suffix}

    before = times()
    run(tmp_path / "run", "--steps 2")
    assert "is at step 2 of 2; raise --steps, or name another --out" in capsys.readouterr().out
    assert times() == before


def test_changed_pictures_are_a_warning(tmp_path, capsys):
    source = folder_of(tmp_path / "grey", 5)
    run(tmp_path / "run", "--steps 2", f"--data {source}")
    run(tmp_path / "run", "--steps 3", f"--data {source}")
    assert "not those of the checkpoint" not in capsys.readouterr().out
    folder_of(source, 7)
    run(tmp_path / "run", "--steps 4", f"--data {source}")
    assert "warning: the pictures or captions are not those of the checkpoint" in capsys.readouterr().out


def test_other_versions_are_noted(tmp_path, monkeypatch, capsys):
    run(tmp_path / "run", "--steps 1")
    monkeypatch.setattr(train, "VERSIONS", {"torch": "99"})
    run(tmp_path / "run", "--steps 2")
    assert "not bit for bit" in capsys.readouterr().out


def test_loss_scaling_continues_and_may_come_and_go(tmp_path, monkeypatch):
    def scale(out):
        _, meta = model.load_tensors(model.checkpoint_folders(out)[-1] / "train.safetensors")
        return json.loads(meta["scaler"])

    run(tmp_path / "run", "--steps 1", "--dtype fp16")
    during(monkeypatch, lambda state: state.scaler.update(32.0), at=1)
    run(tmp_path / "run", "--steps 2", "--dtype fp16")
    assert scale(tmp_path / "run")["scale"] == 32
    run(tmp_path / "run", "--steps 3", "--dtype fp16")
    assert scale(tmp_path / "run")["scale"] == 32
    assert scale(tmp_path / "run")["_growth_tracker"] > 0
    run(tmp_path / "run", "--steps 4", "--dtype fp32")
    run(tmp_path / "run", "--steps 5", "--dtype fp16")
    assert scale(tmp_path / "run")["scale"] == 65536


def test_a_wrapped_network_is_saved_under_plain_names(tmp_path, monkeypatch):
    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self._orig_mod, self.forward = net, net.forward

    monkeypatch.setattr(train, "compiled", lambda net, *rest: Wrapped(net))
    whole = digest(run(tmp_path / "run", "--steps 2"))
    monkeypatch.undo()
    assert digest(run(tmp_path / "plain", "--steps 2")) == whole


# ----------------------------------------------------------------------------------------------------- faults


def test_twenty_bad_updates_in_a_row_end_the_run(tmp_path, monkeypatch, capfd):
    out, real = tmp_path / "run", diffusion.gaussian
    calls = []

    def gaussian(keys, shape, device=None):
        calls.append(1)
        return real(keys, shape, device) * (math.nan if len(calls) > 5 else 1)     # after two of looking

    monkeypatch.setattr(diffusion, "gaussian", gaussian)
    err = dies(capfd, lambda: run(out, "--steps 60", "--log-every 5", "--save-every 5",
                                  "--loss-weight uniform"), 1)          # a learned one starts from noise, too
    assert "updates in a row were not finite, stopped at step 25" in err
    assert 15 <= digest(out)[0] <= 20
    assert metrics(out)[-1]["skipped"] == 5
    assert metrics(out)[0]["skipped"] == 2
    tensors, _ = model.load_tensors(model.checkpoint_folders(out)[-1] / "ema.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capfd):
    during(monkeypatch, lambda state: state.averages[0][2][3].data.fill_(math.nan), at=3)
    err = dies(capfd, lambda: run(tmp_path / "run", "--save-every 2"), 1)
    assert "the weights of step 4 are not finite" in err
    assert digest(tmp_path / "run")[0] == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "zero", "empty", "gone"])
def test_a_damaged_checkpoint_costs_its_steps_only(tmp_path, damage, capsys):
    whole = digest(run(tmp_path / "run", "--save-every 2", "--steps 4"))
    path = tmp_path / "run/checkpoints/000004/train.safetensors"
    content = bytearray(path.read_bytes())
    match damage:
        case "cut":
            content = content[:len(content) // 2]
        case "flip":
            content[len(content) // 2] ^= 1
        case "zero":
            content[-4096:] = bytes(4096)
        case "empty":
            content = b""
    path.write_bytes(content)
    if damage == "gone":
        path.unlink()
    run(tmp_path / "run", "--save-every 2", "--steps 4")
    shown = capsys.readouterr().out
    assert "warning: " in shown
    assert "000004/train.safetensors" in shown
    assert "resumed from step 2" in shown
    assert digest(tmp_path / "run") == whole


def test_with_all_checkpoints_damaged_nothing_is_started_anew(tmp_path):
    run(tmp_path / "run", "--steps 1")
    (tmp_path / "run/checkpoints/000001/ema.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        run(tmp_path / "run", "--steps 2")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["000001"]


def test_a_full_disk_is_survived_but_for_the_last_save(tmp_path, monkeypatch, capfd):
    real, calls = model.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) in (1, 4, 5):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(model, "save_file", full)
    run(tmp_path / "run", "--save-every 2", "--steps 4")
    assert "warning: checkpoint at step 2 not written ([Errno 28] No space left" in capfd.readouterr().out
    assert digest(tmp_path / "run")[0] == 4
    err = dies(capfd, lambda: run(tmp_path / "run", "--save-every 2", "--steps 6"), 1)
    assert "the last checkpoint, step 6, could not be written" in err
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["000004"]


def test_logs_and_pictures_are_optional_on_a_full_disk(tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").mkdir()                                  # cannot be opened
    run(tmp_path / "run", "--steps 2", "--log-every 1", "--sample-every 2")
    shown = capsys.readouterr().out
    assert digest(tmp_path / "run")[0] == 2
    assert all(f"{name} not written" in shown for name in ("metrics.jsonl", "first_batch.png", "000002.png"))


def test_a_second_run_in_one_directory_is_refused(tmp_path, capfd):
    ready, pid = tmp_path / "ready", os.fork()
    if not pid:
        train.lock(tmp_path / "run")
        ready.touch()
        time.sleep(60)
        os._exit(0)
    try:
        while not ready.exists():
            time.sleep(0.01)
        with pytest.raises(ValueError, match=f"run is in use by pid {pid} on .*Use another --out"):
            run(tmp_path / "run")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    train.lock(tmp_path / "run")


def test_what_a_killed_save_left_is_removed(tmp_path):
    left = tmp_path / "run/checkpoints/.tmp-000007"
    left.mkdir(parents=True)
    (left / ".tmpAbc").write_text("x")
    run(tmp_path / "run", "--steps 1")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["000001"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                                   MemoryError("Unable to allocate 1 TiB")])
def test_no_memory_is_one_line_with_a_smaller_micro_batch(tmp_path, monkeypatch, capfd, error):
    def fails(state):
        raise error

    during(monkeypatch, fails, at=2)
    err = dies(capfd, lambda: run(tmp_path / "run", "--workers 1"), 1)
    assert "out of memory at --micro-batch 8" in err
    assert "Try --micro-batch 4" in err
    assert not multiprocessing.active_children()


def test_other_errors_are_tracebacks_and_leave_no_process(tmp_path, monkeypatch):
    def fails(state):
        raise RuntimeError("a bug")

    during(monkeypatch, fails, at=2)
    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path / "run", "--workers 2")
    assert not multiprocessing.active_children()


def test_a_killed_data_worker_is_one_line(tmp_path, monkeypatch, capfd):
    def kill(state):
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)

    during(monkeypatch, kill, at=2)
    err = dies(capfd, lambda: run(tmp_path / "run", "--workers 2", "--steps 100"), 1)
    assert "a data worker died" in err
    assert "--workers" in err


def test_unreadable_pictures_are_replaced_and_counted(tmp_path, capsys):
    source = folder_of(tmp_path / "grey", 30)
    (source / "7.png").write_text("<html>")
    out = run(tmp_path / "run", "--steps 10", f"--data {source}", "--log-every 10")
    assert "7: " in capsys.readouterr().out
    assert 1 <= metrics(out)[0]["replaced"] <= 5


# -------------------------------------------------------------------------------------------- other processes


SLOW = """
import time
real_update = train.State.update
def slow(*args):
    time.sleep(0.2)
    return real_update(*args)
train.State.update = slow
"""


def test_signals_to_a_whole_group_lose_no_step(tmp_path, straight):
    out, changes = tmp_path / "run", ("--micro-batch 4", "--log-every 1", "--workers 2")
    process = start(out, *changes, code=SLOW)
    wait_for(process, 2, out)
    os.killpg(process.pid, signal.SIGTERM)                                    # the data workers, too
    status, shown, err = finish(process)
    assert (status, err) == (0, "")
    stopped = digest(out)[0]
    assert f"stopping at step {stopped}; run the same command" in shown
    assert metrics(out)[-1]["step"] == stopped < 12
    process = start(out, *changes, code=SLOW)
    wait_for(process, stopped + 2, out)
    os.killpg(process.pid, signal.SIGINT)                                     # a terminal and torchrun: twice
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    status, shown, err = finish(process)
    assert (status, err) == (0, "")
    assert stopped < digest(out)[0] < 12
    run(out, *changes)
    assert digest(out) == straight


def test_two_ranks_are_one_and_may_come_and_go(tmp_path, monkeypatch, straight):
    out = tmp_path / "run"
    code = f"{SLOW}\nopen(f'{out}.pid{{rank}}', 'w').write(str(os.getpid()))"
    changes = ("--log-every 1", "--micro-batch 4")
    process = start(out, *changes, ranks=2, code=code)
    wait_for(process, 3, out)
    os.kill(int(Path(f"{out}.pid1").read_text()), signal.SIGTERM)             # reaches rank 1 only
    status, shown, err = finish(process)
    assert (status, "Traceback" in err) == (0, False), err
    stopped = digest(out)[0]
    assert 3 <= stopped < 9
    assert shown.count(f"stopping at step {stopped};") == 1
    during(monkeypatch, lambda state: os.kill(os.getpid(), signal.SIGTERM), at=2)
    run(out, *changes)                                                        # one rank
    assert digest(out)[0] == stopped + 2
    status, shown, err = finish(start(out, *changes, ranks=2))
    assert status == 0, err
    assert digest(out) == straight


def test_two_ranks_share_the_passes_of_muon_and_are_one_bit_for_bit(tmp_path):
    """And each of them turns about half of the matrices. One rank in its own process: of one thread."""
    code = ("real = train.orthogonal\n"
            "def orthogonal(x):\n    if x.shape[1] <= x.shape[2]:\n"             # else it turns x.mT
            "        print(len(x), file=open(f'{sys.argv[-1]}.{rank}', 'a'))\n"
            "    return real(x)\ntrain.orthogonal = orthogonal")
    changes = ("--steps 24", "--channel-mult 1 2", "--optimizer muon", "--micro-batch 4", "--lr 3e-3")
    runs = {tmp_path / "one": 0, tmp_path / "two": 2}
    started = [start(out, *changes, f"--out {out}", ranks=ranks, code=code) for out, ranks in runs.items()]
    for process in started:
        status, _, err = finish(process)
        assert (status, err) == (0, "")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    counts = [path.read_text().split() for path in sorted(tmp_path.glob("*.[01]"))]
    alone, first, second = (sum(map(int, count)) for count in counts)
    assert first + second == alone
    assert 0.4 * alone < first < 0.6 * alone


def test_two_ranks_are_warned_of_nothing(tmp_path):
    process = start(tmp_path / "run", "--steps 2", "--channel-mult 1 2", "--optimizer muon", ranks=2)
    status, _, err = finish(process)
    assert (status, err) == (0, "")


def test_ranks_skip_a_bad_gradient_together_and_notice_when_they_drift_apart(tmp_path):
    out = tmp_path / "run"
    code = ("calls, real, update = [], diffusion.gaussian, train.State.update\n"
            "def gaussian(*a):\n    calls.append(1)\n"
            "    return real(*a) * (float('nan') if rank == 1 and len(calls) == 4 else 1)\n"
            "def drift(state, lr):\n    found = update(state, lr)\n"
            "    state.weights[0].data += 1e-3 * rank * (len(calls) == 7)\n    return found\n"
            "diffusion.gaussian, train.State.update = gaussian, drift")
    changes = ("--steps 8", "--log-every 1", "--save-every 5", "--loss-weight uniform")
    status, shown, err = finish(start(out, *changes, ranks=2, code=code))
    assert [line["skipped"] for line in metrics(out)] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert "warning: step 3: 1 updates were not finite and were skipped" in shown
    tensors, _ = model.load_tensors(out / "checkpoints/000005/train.safetensors")  # saved, so equal
    assert all(t.isfinite().all() for t in tensors.values())
    assert {int(v) for k, v in tensors.items() if k.endswith(".step")} == {4}
    assert status == 1
    assert "train.py: error: the weights of step 8 are not finite, or differ between ranks: not saved" in err
    assert digest(out)[0] == 5


def strace(rule):
    """The command that injects a fault into a system call; skipped, aloud, where it is not allowed."""
    command = ["strace", "-f", "-qq", "-o", "/dev/null"]
    if not shutil.which("strace") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("strace is missing, or ptrace is forbidden")
    return [*command, "-e", f"trace={rule.split(':')[0]}", "-e", f"inject={rule}"]


def killed_and_continued(out, rule, straight):
    status, _, err = finish(start(out, "--micro-batch 4", "--save-every 3", before=strace(rule)))
    assert status in (-9, 137), err
    folders = model.checkpoint_folders(out)
    for folder in folders:          # whatever has its final name is whole
        assert model.load_tensors(folder / "ema.safetensors")
        assert model.load_tensors(folder / "train.safetensors")
    run(out, "--micro-batch 4", "--save-every 3")
    assert digest(out) == straight
    assert not list((out / "checkpoints").glob(".tmp-*"))


def test_a_kill_in_the_middle_of_a_save_changes_nothing(tmp_path, straight):
    killed_and_continued(tmp_path / "run", "fsync:signal=SIGKILL:when=6", straight)      # of the second save


@pytest.mark.slow
@pytest.mark.parametrize(("call", "when"), [(call, when) for call, count in {
    "mkdir": 4, "ftruncate": 4, "renameat": 4, "chmod": 4, "fsync": 8, "rename": 4, "unlinkat": 4, "rmdir": 2,
}.items() for when in range(1, count + 1)])
def test_a_kill_at_any_system_call_changes_nothing(tmp_path, straight, call, when):
    killed_and_continued(tmp_path / "run", f"{call}:signal=SIGKILL:when={when}", straight)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fsync:error=EIO:when=1", "fsync:error=ENOSPC:when=3",
                                  "rename:error=EIO:when=1", "fsync:error=EIO:when=2..3"])
def test_an_error_of_the_disk_costs_one_checkpoint(tmp_path, straight, rule):
    changes = ("--micro-batch 4", "--save-every 3")
    status, shown, err = finish(start(tmp_path / "run", *changes, before=strace(rule)))
    assert status == 0, err
    assert "not written" in shown
    assert digest(tmp_path / "run") == straight


def test_a_file_limit_ends_a_run_in_one_line_and_without_remains(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    status, shown, err = finish(start(tmp_path / "run", "--steps 3", "--save-every 2", preexec_fn=limit))
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "the last checkpoint, step 3, could not be written" in err
    assert "warning: checkpoint at step 2 not written" in shown
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_killed_trainer_frees_its_directory_at_once(tmp_path):
    process = start(tmp_path / "run", "--steps 1000", "--log-every 1", "--workers 2")
    wait_for(process, 1, tmp_path / "run")
    with pytest.raises(ValueError, match=f"in use by pid {process.pid}"):
        train.lock(tmp_path / "run")
    process.kill()
    process.wait()
    train.lock(tmp_path / "run")                            # though its workers may still live
    for _ in range(100):
        alive = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(f"workers {alive} outlived their trainer")


def test_where_nothing_compiles_a_run_is_not_compiled(tmp_path, monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    run(tmp_path / "run", "--steps 1", "--compile")
    assert "warning: torch.compile is unavailable (RuntimeError: no compiler)" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_compiler_a_run_is_not_compiled(tmp_path):
    env = {"CXX": "/nowhere/g++", "PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    status, shown, err = finish(start(tmp_path / "run", "--steps 1", "--compile", env=env))
    assert status == 0, err
    assert "warning: torch.compile is unavailable (" in shown
    assert digest(tmp_path / "run")[0] == 1


@pytest.mark.slow
def test_a_compiled_run_stops_and_resumes_exactly(tmp_path, monkeypatch):
    whole = digest(run(tmp_path / "whole", "--steps 4", "--compile"))
    during(monkeypatch, lambda state: os.kill(os.getpid(), signal.SIGTERM), at=2)
    run(tmp_path / "parts", "--steps 4", "--compile")
    run(tmp_path / "parts", "--steps 4", "--compile")
    assert digest(tmp_path / "parts") == whole


def test_a_closed_pipe_and_a_poor_environment_do_not_end_a_run(tmp_path):
    odd = tmp_path / "a b"
    odd.mkdir()
    command = [sys.executable, str(ROOT / "train.py"), *flags("run c", "--log-every 1")]
    process = subprocess.Popen(command, cwd=odd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={"LANG": "C", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"})
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(600) == 0
    assert process.stderr.read() == ""
    assert digest(odd / "run c")[0] == 12


def test_without_a_gpu_the_cpu_is_used_and_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    argv = flags(tmp_path / "run", "--steps 1")
    at = argv.index("--device")
    train.main(argv[:at] + argv[at + 2:])
    assert "note: no GPU found, using the CPU, --model tiny and --dtype fp32" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_rank_is_restarted_by_torchrun(tmp_path, straight):
    out = tmp_path / "run"
    code = ("real = train.State.update\n"
            f"def update(*a):\n    if rank == 1 and not os.path.exists({str(out)!r} + '.died') and "
            f"os.path.exists({str(out / 'checkpoints/000003')!r}):\n"
            f"        open({str(out)!r} + '.died', 'w'); os.kill(os.getpid(), 9)\n    return real(*a)\n"
            "train.State.update = update")
    process = start(out, "--save-every 3", ranks=2, code=code, torchrun=["--max-restarts=2"])
    status, shown, err = finish(process)
    assert status == 0, err
    assert digest(out) == straight


@pytest.mark.slow
def test_a_killed_rank_is_restarted_by_a_loop_in_the_shell(tmp_path, straight):
    """That of the README, `until torchrun ...; do sleep 10; done`; a rank is killed in each of two starts."""
    out = tmp_path / "run"
    code = ("real = train.State.update\n"
            "def update(*a):\n"
            f"    for step in ('000003', '000006'):\n"
            f"        died = {str(out)!r} + step\n"
            f"        if rank == 1 and not os.path.exists(died) and "
            f"os.path.exists({str(out)!r} + '/checkpoints/' + step):\n"
            f"            open(died, 'w'); os.kill(os.getpid(), 9)\n    return real(*a)\n"
            "train.State.update = update")
    loop = ["bash", "-c", 'until "$@"; do sleep 1; done', "loop"]
    status, _, err = finish(start(out, "--save-every 3", ranks=2, code=code, before=loop))
    assert status == 0, err
    assert Path(f"{out}000003").exists()
    assert Path(f"{out}000006").exists()
    assert digest(out) == straight


@pytest.mark.slow
def test_no_rank_outlives_a_killed_torchrun(tmp_path):
    process = start(tmp_path / "run", "--steps 100000", "--log-every 1", ranks=2)
    wait_for(process, 2, tmp_path / "run")
    process.kill()
    process.wait()
    for _ in range(200):
        if not subprocess.run(["pgrep", "-f", str(tmp_path / "run")], capture_output=True).stdout:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("orphans")
    assert digest(tmp_path / "run")[0] >= 2                                   # and what they had was saved


# ------------------------------------------------------------------------------------ frozen encoders, cached


@pytest.fixture
def byt5(tmp_path) -> Path:
    """A folder as ByT5 is published, small, with random weights."""
    folder, shape = tmp_path / "byt5", {
        "vocab_size": 384, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 3,
        "model_type": "t5", "feed_forward_proj": "gated-gelu"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    torch.manual_seed(0)
    tower = text_encoder.T5Encoder(types.SimpleNamespace(**text_encoder.T5_SHAPE | shape))
    save_file(tower.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("beside", ["", "bytes "])
def test_training_from_the_text_cache_never_reads_the_encoder(byt5, tmp_path, monkeypatch, beside):
    same = [f"--text-encoder {beside}{byt5}", "--limit 16", "--steps 2"]
    live = run(tmp_path / "live", *same)
    cached = [*same, f"--text-cache {tmp_path / 'cache'}"]
    run(tmp_path / "first", *cached)
    reads = []
    monkeypatch.setattr(text_encoder.Weights, "fill", lambda *a: reads.append(a))
    again = run(tmp_path / "again", *cached)
    assert not reads
    first, again, live = (model.load_checkpoint(tmp_path / name)[1][0] for name in ("first", "again", "live"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], live[name]) for name in live)       # bf16 in the cache
    assert all((first[name] - live[name]).abs().max() < 5e-3 for name in live)
    assert not any("layer.0.SelfAttention" in name and "trained" not in name for name in first)
    monkeypatch.undo()
    assert sample.load_stage(tmp_path / "again", torch.device("cpu")).text.dim == (32 if beside else 24)
    (byt5 / "config.json").write_text((byt5 / "config.json").read_text().replace("t5", "mt5"))
    with pytest.raises(ValueError, match=r"was made with t5 bf16 .*, not mt5 bf16 .*Delete it"):
        run(tmp_path / "other", *cached)


def test_the_check_counts_tokens_and_what_the_cache_lacks(byt5, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = shards_of(tmp_path / "before")
    same = [f"--text-encoder {byt5}", "--text-length 64", f"--text-cache {tmp_path / 'cache'}"]
    run(tmp_path / "run", *same, f"--data {before}", "--steps 1", "--held-out 0")
    said = sorted(caption for i in range(48) for caption in data.captions(data.scene(i)))
    more = tmp_path / "more"
    more.mkdir()
    for name, caption in (("a", said[0]), ("b", "never seen " * 9)):
        Image.new("RGB", (16, 16), "red").save(more / f"{name}.png")
        (more / f"{name}.txt").write_text(caption)
    capsys.readouterr()

    def check(*flags):
        status = train.main(["--check", "1000", "--data", *" ".join(map(str, flags)).split()])
        return status, json.loads(Path("check.json").read_text())["table"]

    status, table = check(before, *same)
    lengths = [len(caption) + 1 for caption in said]                          # bytes, and the end
    assert (status, table["tokens"]) == (0, [len(said), min(lengths), sum(lengths), max(lengths)])
    assert [table[name][2] for name in ("unknown tokens", "captions cut", "not in the cache")] == [0, 0, 0]
    count, least, total, _ = table["deviation in the cache"]
    assert count == len(said)
    assert 0 < least < total / count
    assert "captions cut" in capsys.readouterr().out

    status, table = check(more, *same)
    assert table["tokens"] == [2, len(said[0]) + 1, len(said[0]) + 1 + 64, 64]
    assert table["captions cut"] == table["not in the cache"] == [2, 0, 1, 1]
    assert table["deviation in the cache"][0] == 1

    _, table = check(more, f"--text-encoder {byt5} {byt5}", "--text-length 32")
    assert table["captions cut of encoder 2"][2] == 1 + (len(said[0]) > 31)
    _, table = check(more, f"--text-encoder bytes {byt5}", f"--text-cache {tmp_path / 'other'}")
    assert table["tokens of encoder 1"] == [2, len(said[0]) + 1, len(said[0]) + 1 + 99, 99]
    assert "not in the cache of encoder 1" not in table
    assert table["not in the cache of encoder 2"] == [2, 1, 2, 1]
    with pytest.raises(ValueError, match=r"was made with .*length=64.*, not .*length=32.* Delete it"):
        check(more, same[0], same[2], "--text-length 32")
    assert not (tmp_path / "runs").exists()


def shards_of(folder, count=2, size=24):
    """Shards of built-in pictures, each with all of its captions."""
    folder.mkdir()
    for shard in range(count):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(shard * size, shard * size + size):
                shown, captions = data.draw(data.scene(i), 16), data.captions(data.scene(i))
                stream = io.BytesIO()
                Image.fromarray(shown.transpose(1, 2, 0)).save(stream, "PNG")
                for suffix, content in (("png", stream.getvalue()), ("txt", "\n".join(captions).encode())):
                    member = tarfile.TarInfo(f"{i:04}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def unread(*_):
    raise AssertionError("the encoder is read")


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.mark.parametrize("beside", ["", "bytes ", "bytes again "])
def test_training_from_embeddings_inside_shards(byt5, tmp_path, monkeypatch, beside, capsys):
    """The same weights as from a cache; the encoder is never read, and the pictures are as they were."""
    if "again" in beside:                                                     # another frozen encoder
        shutil.copytree(byt5, tmp_path / "again")
        (tmp_path / "again/config.json").write_text(
            (byt5 / "config.json").read_text().replace('"t5"', '"mt5"'))
    before = shards_of(tmp_path / "before")
    same = [f"--text-encoder {beside}{byt5}", "--steps 2", "--sample-every 2", "--val-every 2",
            "--val-images 3", "--held-out 6", "--text-length 64"]
    cached = [*same, f"--data {before}", f"--text-cache {tmp_path / 'cache'}"]
    for _ in range(2):
        run(tmp_path / "writer", *cached, "--text-shards after")
    assert re.findall(r"wrote (.*)", capsys.readouterr().out) == ["after/00000.tar", "after/00001.tar"]
    for path in before.iterdir():
        old, new = members(path), members(tmp_path / "after" / path.name)
        assert {name: new[name] for name in old} == old
        assert [name for name in new if name not in old] == [f"{name[:4]}.t5.safetensors" for name in old
                                                             if name.endswith("png")]
        assert [name[4:] for name in list(new)[:3]] == [".png", ".t5.safetensors", ".txt"]
    run(tmp_path / "folder", *cached)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(text_encoder.Weights, "fill", unread)
    run(tmp_path / "inside", *same, "--data after", "--text-cache shards", "--workers 2")
    assert not (tmp_path / "shards").exists()
    folder, inside = (model.load_checkpoint(tmp_path / name) for name in ("folder", "inside"))
    assert folder[2]["data"] == inside[2]["data"]                             # the same pictures
    assert all(torch.equal(folder[1][0][name], inside[1][0][name]) for name in folder[1][0])
    lines = [[{key: value for key, value in line.items() if key not in ("pictures/s", "share_of_peak")}
              for line in metrics(name)]
             for name in ("folder", "inside")]
    assert lines[0] == lines[1]


def test_a_run_goes_on_with_its_own_optimizer_alone(tmp_path):
    run(tmp_path / "run", "--steps 1", "--optimizer adamw")
    with pytest.raises(ValueError, match="the checkpoint has --optimizer adamw, not muon"):
        run(tmp_path / "run", "--steps 2", "--optimizer muon")


def test_a_checkpoint_of_before_muon_counts_its_updates_by_its_steps():
    net = nn.Linear(3, 2)
    state, other = (train.State(net, 0.1, 1.0, 0.9, False) for _ in range(2))
    for _ in range(3):
        net(torch.randn(4, 3)).sum().backward()
        state.update(0.1)
    tensors = {key: value.clone() for key, value in state.tensors()["train"].items() if key != "updates"}
    other.load(state.tensors()["ema"], tensors, {})
    assert other.updates == state.updates == 3


@pytest.mark.parametrize("wrong", [
    "--text-cache cache --limit 8", "--text-cache cache --data loose", "--data before",
    "--text-cache cache --data before --limit 2", "--text-cache cache --data torn",
    "--text-cache cache --data before before", "--text-cache cache --data before --text-encoder bytes"])
def test_shards_that_cannot_be_written_are_an_error(byt5, tmp_path, wrong):
    shards_of(tmp_path / "before", 1, 4)
    folder_of(tmp_path / "loose", 4)
    torn = shards_of(tmp_path / "torn", 1, 4) / "00000.tar"
    torn.write_bytes(torn.read_bytes()[:5000])
    named = r".* 00000.tar: damaged after \d pictures \(.*\); using those" if "torn" in wrong else ""
    with pytest.raises(ValueError, match="--text-shards after needs a folder as --text-cache, a fr" + named):
        run("run", f"--text-encoder {byt5}", "--text-shards after", "--text-length 64",
            *(f"--{change}".strip() for change in wrong.split("--")[1:]))
    assert not Path("after").exists()
    assert not Path("cache/0").exists()                       # said before any work


def test_stale_torn_and_missing_embeddings_are_replaced_and_end_training_where_all_are(byt5, tmp_path, capfd):
    """Each as an unreadable picture is, and never with another caption's embedding."""
    before = shards_of(tmp_path / "before", 1)
    same = [f"--text-encoder {byt5}", "--steps 2", "--text-length 64"]
    run("writer", *same, f"--data {before}", "--text-cache cache", "--text-shards after")
    capfd.readouterr()
    inside = [*same, "--data after", "--text-cache shards"]
    with pytest.raises(ValueError, match=r"^the embeddings were made with t5 bf16 .*length=64 .*, not with "
                                         r"t5 bf16 .*length=32 .*\. Write the shards again$"):
        run("stale", *inside, "--text-length 32")
    with pytest.raises(ValueError, match=r"last 00000/\d{4}: .* has nothing of 'a .*'. Write the sha"):
        run("missing", *same, f"--data {before}", "--text-cache shards")
    path = tmp_path / "after/00000.tar"
    whole = path.read_bytes()
    torn = bytearray(whole)
    with tarfile.open(path) as tar:
        parts = [member for member in tar if member.name.endswith(".safetensors")]
    for member in parts:
        torn[member.offset_data + member.size - 1] ^= 1                       # of one of its captions
    path.write_bytes(torn)
    run("torn", *inside, "--steps 9")
    shown = capfd.readouterr().out
    assert re.search(r"warning: 00000/\d{4}: .* is damaged at 'a .*Write the shards again; replaced", shown)
    path.write_bytes(whole.replace(b"a red", b"a sad").replace(b"a blue", b"a good"))     # captions changed
    run("other", *inside, "--steps 9")
    found = re.findall(r"warning: 00000/\d{4}: .* has nothing of '(.*)'", capfd.readouterr().out)
    assert found
    assert all("sad" in caption or "good" in caption for caption in found)


def test_a_dry_run_does_not_fill_the_cache(byt5, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_encoder.Weights, "fill", unread)
    run("run", f"--text-encoder bytes {byt5}", "--limit 16", "--text-cache cache", "--dry-run", "--steps 7")
    assert "pictures/s" in capsys.readouterr().out
    assert not list(Path("cache").glob("[0-9]*"))


def test_a_dry_run_encodes_no_picture_where_latents_will_be_kept(tmp_path, monkeypatch, capsys):
    vae, pictures = small_vae(tmp_path / "vae"), few_pictures(tmp_path / "pictures")
    encoded, encode = [], model.Latents.encode
    monkeypatch.setattr(model.Latents, "encode", lambda self, x: encoded.append(x) or encode(self, x))
    plain = ("--size 32", f"--vae {vae}", f"--data {pictures}", "--held-out 2", "--dry-run")
    run(tmp_path / "run", *plain, f"--latent-cache {tmp_path / 'cache'}")
    assert "pictures/s" in capsys.readouterr().out
    assert not encoded
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    run(tmp_path / "run", *plain)
    assert encoded


def test_an_unreadable_caption_is_replaced_beside_a_cache_too(byt5, tmp_path, monkeypatch, capsys):
    folder, real = folder_of(tmp_path / "pictures", 8), data.Files.texts

    def texts(self, read, row):
        keys = [self.key(i) for i in range(len(self))]
        if row == self.row(keys.index("3"))[1]:
            raise OSError(5, "Input/output error")
        return real(self, read, row)

    monkeypatch.setattr(data.Files, "texts", texts)
    run("run", f"--text-encoder {byt5}", "--text-cache cache", f"--data {folder}", "--steps 2",
        "--held-out 0")
    assert "warning: 3: [Errno 5] Input/output error; replaced" in capsys.readouterr().out


def test_a_remote_shard_that_is_away_is_named_once(capsys):
    trainer = types.SimpleNamespace(replaced=0, cut=0, captions=0, told=set())
    batch = {name: [] for name in train.TOLD} | {"cut": torch.zeros(4), "captions": ["a"] * 4}
    notes = [f"{i}: broken" for i in range(20)]
    for url in ("s3://a/0.tar: HTTP Error 404", "s3://a/1.tar: HTTP Error 404"):
        notes += [f"00/{i}: {url}" for i in range(20)]
    for start in range(0, len(notes), 4):
        train.Trainer.tell(trainer, batch | {"replaced": notes[start:start + 4]})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"warning: {note}; replaced" for note in [*notes[:10], notes[20], notes[40]]]


def test_captions_that_are_cut_are_said_once(byt5, tmp_path, capsys):
    for i, cache in enumerate(((), ("--text-cache cache",))):
        run(f"run{i}", f"--text-encoder {byt5}", "--limit 64", "--text-length 8", *cache)
        ((cut, seen),) = re.findall(r"note: (\d+) of (\d+) captions are cut. See --text-length",
                                    capsys.readouterr().out)
        assert 1 < int(cut) <= int(seen)
    run("long", f"--text-encoder {byt5}", "--limit 16", "--text-length 128")
    assert "are cut" not in capsys.readouterr().out


SLOW = """import text_encoder, time
real = text_encoder.encode_captions
def slow(*args):
    for row in real(*args):
        time.sleep(0.2)
        print("one", flush=True)
        yield row
text_encoder.encode_captions = slow"""


def test_a_signal_ends_the_filling_of_the_cache_and_the_same_command_goes_on(byt5, tmp_path):
    flags = f"--text-encoder {byt5}", "--limit 200", f"--text-cache {tmp_path / 'cache'}", "--text-length 64"
    process = start(tmp_path / "run", *flags, code=SLOW)
    assert [process.stdout.readline() for _ in range(20)].count("one\n") >= 10
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert time.monotonic() - began < 60
    assert (status, err) == (0, "")
    assert "stopping before the first step; run the same command to continue" in out
    assert not (tmp_path / "run/checkpoints").exists()
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")                      # no half a file beside it
    before = kept.stat().st_mtime_ns
    run(tmp_path / "run", *flags, "--steps 1")
    assert digest(tmp_path / "run")[0] == 1
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 2
    assert kept.stat().st_mtime_ns == before


def test_two_ranks_share_the_filling_of_the_cache(byt5, tmp_path):
    flags = f"--text-encoder {byt5}", "--limit 40", f"--text-cache {tmp_path / 'cache'}", "--steps 1"
    status, out, err = finish(start(tmp_path / "two", *flags, ranks=2))
    assert status == 0, err
    sizes = []
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes.append(len(file.metadata()) - 1)             # without the fingerprint
    captions = {c for i in range(40) for c in data.captions(data.scene(i))}
    assert len(sizes) == 2
    assert sum(sizes) == len(captions)


# --------------------------------------------------------------------- output, signals, flags, other machines


@pytest.mark.parametrize("output", ["> /dev/full 2> /dev/full", ">&- 2>&-"])
def test_output_is_no_reason_to_stop_or_not_to_save(tmp_path, output):
    words = [sys.executable, str(ROOT / "train.py"), *flags(tmp_path / "run", "--log-every 1")]
    command = " ".join([*words, output])
    done = subprocess.run(["bash", "-c", command], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0
    assert digest(tmp_path / "run")[0] == 12


def test_what_a_killed_save_of_a_snapshot_left_is_no_snapshot_and_is_removed(tmp_path):
    changes = ("--profiles 4", "--save-every 2")
    whole = digest(run(tmp_path / "whole", "--steps 4", *changes))
    run(tmp_path / "run", "--steps 2", *changes)
    left = tmp_path / "run/profiles/.tmp-99-000004.safetensors"
    left.write_bytes(b"half")
    run(tmp_path / "run", "--steps 4", *changes)
    assert not left.exists()
    assert digest(tmp_path / "run")[0] == whole[0]


@pytest.mark.parametrize(("command", "message"), [
    ("--seed=1 --seed=2", "--seed is given twice"), ("--seed 1 --seed=2", "--seed is given twice"),
    ("--reinit x", "--reinit x has no effect without --init"),
    ("--train-only x{99999999999}", "is no regular expression"),
    ("--text-cache c --limit 2 --shuffle-tags", "cannot keep the captions of --shuffle-tags"),
    ("--flip 2", "--flip 2.0 is outside 0 to 1"), ("--limit 2 --filter a", "--filter 'a' is no filter"),
    ("--out run\udcff", "has bytes that are no text"), ("--t-mean 1000", "--t-mean 1000.0 is outside -100"),
    ("--zero-snr --schedule linear --prediction eps", "prediction eps")])
def test_a_flag_that_makes_no_sense_is_one_line(tmp_path, capfd, monkeypatch, command, message):
    monkeypatch.setattr(sys, "argv", ["train.py", *command.split()])
    err = dies(capfd, lambda: runpy.run_path(str(ROOT / "train.py"), run_name="__main__"), 2)
    assert message in err


def test_warm_up_and_cooldown_of_a_preset_go_with_the_steps_and_given_ones_that_do_not_fit_warn(capsys):
    cfg = train.parse(["--model", "tiny", "--steps", "185"])[0]
    assert (cfg.warmup, cfg.cooldown) == (5, 130)
    assert train.rate(30, cfg) == cfg.lr
    assert train.parse(["--model", "tiny", "--steps", "5000"])[0].cooldown == 1300
    assert capsys.readouterr().out == ""
    cfg = train.parse(["--model", "tiny", "--steps", "100", "--cooldown", "1300"])[0]
    assert cfg.cooldown == 1300
    assert "do not fit into --steps 100: the rate never reaches --lr" in capsys.readouterr().out


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    """Lustre without -o flock, and some disks of a network."""
    def fails(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", fails)
    run(tmp_path / "run", "--steps 2")
    said = capsys.readouterr().out
    assert "run is on a disk without locks (Function not implemented): let no other run write there" in said


@pytest.mark.parametrize("call", ["chmod", "fsync"])
def test_a_disk_that_keeps_no_rights_or_no_names_still_keeps_checkpoints(tmp_path, monkeypatch, call):
    """/mnt/c of WSL and exFAT say EPERM to chmod, some disks of a network EINVAL to the fsync of a folder."""
    real, refused = getattr(os, call), []

    def fails(what, *rest):
        if call == "chmod" or os.path.isdir(f"/proc/self/fd/{what}"):
            refused.append(what)
            raise OSError(errno.EPERM if call == "chmod" else errno.EINVAL, "refused")
        return real(what, *rest)

    monkeypatch.setattr(os, call, fails)
    run(tmp_path / "run", "--steps 2")
    assert refused
    assert model.load_checkpoint(tmp_path / "run", ("train", "ema"))


def test_a_file_that_is_not_on_disk_is_an_error(tmp_path, monkeypatch):
    def fails(fd):
        raise OSError(errno.EINVAL, "refused")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="refused"):
        model.write_tensors(tmp_path / "a.safetensors", {}, {})


def test_times_are_drawn_on_the_processor_and_sums_made_double_there(tmp_path, monkeypatch):
    """MPS has neither the inverse of the normal distribution nor float64."""
    class Lacking(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            given = [x for x in args if isinstance(x, torch.Tensor)]
            meta = any(x.is_meta for x in given)
            assert not (meta and "ndtri" in str(function)), function
            assert not (meta and (kwargs or {}).get("dtype") == torch.float64), function
            return function(*args, **(kwargs or {}))

    configs = train.parse(flags(tmp_path / "run", "--t-density logit_normal"))
    device = torch.device("meta")
    text = text_encoder.load_text_encoder(configs[-1]).to(device)
    objective = train.build(configs, text, device)
    part = train.draws(0, "noise", 0.1, 0, 2, [0, 1]) | {"picture": np.zeros((2, 3, 16, 16), np.uint8)}
    monkeypatch.setattr(objective, "condition", lambda part, device: {})
    with Lacking():
        assert objective.inputs(part, device)["t"].is_meta
        meter = train.Meter()
        meter.add(loss=torch.zeros(3, device=device))
        state = train.State(objective, 0.0, 0.0, 0.9, False)
        for look in (lambda: meter.read(train.Ranks(), device), state.size):
            with pytest.raises(NotImplementedError, match="meta"):     # it has no numbers to bring
                look()


def test_a_lock_is_no_link_to_something_else(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("a thesis")
    (tmp_path / "run/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        train.lock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "a thesis"


@pytest.mark.parametrize(("micro", "fix"), [
    (28, "--micro-batch 14, which gives the same result, or --checkpointing"),
    (7, "--micro-batch 1, which"), (9, "--micro-batch 3, which"), (1, "--checkpointing")])
def test_the_advice_where_memory_is_short_is_a_part_of_the_batch(capfd, micro, fix):
    assert f"Try {fix}" in dies(capfd, lambda: train.die_of(MemoryError("no 2 GiB"), micro), 1)


def test_no_memory_before_the_loop_is_one_line_too(tmp_path, monkeypatch, capfd):
    def fails(*args, **options):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    monkeypatch.setattr(train, "count_flops", fails)
    assert "out of memory at --micro-batch 8" in dies(capfd, lambda: run(tmp_path / "run"), 1)


@pytest.mark.parametrize(("cause", "status"), [(None, 143), (MemoryError("no 2 GiB"), 1), (RuntimeError(
    "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8"), 1)])
def test_one_of_several_ranks_ends_with_a_status_and_without_a_traceback(monkeypatch, capfd, cause, status):
    """After a status of 0 torchrun lets the others wait for this rank."""
    def begin():
        with train.starting(train.TrainConfig(micro_batch=4), train.Ranks()):
            if cause:
                raise cause
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        begin()
    assert end.value.code == status
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    if cause is None:
        assert out == "stopping before the first step; run the same command to continue\n"
    elif "gloo" in str(cause):
        assert "another rank has ended or is late (Connection closed by peer" in err
    else:
        assert "out of memory at --micro-batch 4" in err


@pytest.mark.parametrize(("error", "status"), [
    (None, 0), (SystemExit(None), 0), (SystemExit(0), 0), (SystemExit(2), 2), (KeyError("a bug"), 1)])
def test_one_of_several_processes_leaves_at_once(monkeypatch, capfd, error, status):
    """Where gloo is told to end by the interpreter it may wait for ever, or abort."""
    def leave(code):
        raise InterruptedError(code)                                          # instead of the end of pytest

    def end():
        try:
            if error:
                raise error
        finally:
            model.leave()

    monkeypatch.setattr(model.os, "_exit", leave)
    monkeypatch.setattr(model.dist, "is_initialized", lambda: True)
    with pytest.raises(InterruptedError) as left:
        end()
    assert left.value.args == (status,)
    assert ("a bug" in capfd.readouterr().err) == (status == 1)


@pytest.mark.parametrize("ended", [True, False])
def test_a_rank_that_fails_alone_says_why(ended):
    """torchrun ends those that fail as the first does, before they speak, and without another word."""
    code = "import train\ntrain.on_signal(train.Signals().arrive)\nprint(flush=True)\ntrain.die('no room', 1)"
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    if ended:
        time.sleep(0.5)
        process.terminate()
    _, err = process.communicate()
    assert (process.returncode, err) == ((-signal.SIGTERM, "") if ended else
                                         (1, "train.py: error: rank 1: no room\n"))


def test_a_rank_whose_torchrun_is_the_first_process_starts(monkeypatch):
    """As in a container: what has number 1 has not adopted it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(train.sys, "platform", "linux")
    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: types.SimpleNamespace(prctl=lambda *a: None))
    monkeypatch.setattr(train.os, "getppid", lambda: 1)
    monkeypatch.setattr(train.Path, "exists", lambda path: True)
    monkeypatch.setattr(train.Path, "read_bytes", lambda path: b"python\0/usr/bin/torchrun\0train.py")
    train.follow_parent()
    monkeypatch.setattr(train.Path, "read_bytes", lambda path: b"/sbin/init\0")
    with pytest.raises(SystemExit):
        train.follow_parent()


def test_a_signal_before_the_loop_ends_the_program_at_once(tmp_path, monkeypatch, capsys):
    def waits(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(train, "pictures_of", waits)
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run")
    assert end.value.code == 0
    assert time.monotonic() - began < 2
    assert "stopping before the first step; run the same command to continue" in capsys.readouterr().out


def test_bf16_is_taken_where_it_is_faster_than_float32(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(text_encoder, "imitates_bf16", lambda kind: False)
    assert train.fastest_dtype(cpu) == "bf16"
    monkeypatch.setattr(text_encoder, "imitates_bf16", lambda kind: True)
    assert train.fastest_dtype(cpu) == "fp32"


def test_how_long_a_run_will_take_is_said_once_and_before_its_first_line(tmp_path, capsys, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(train, "clock", lambda device: 1000.0 * next(ticks))
    run(tmp_path / "run", "--steps 9", "--log-every 4")
    said = capsys.readouterr().out
    assert said.count("to go") == 1
    assert said.index("about 1:40:00 to go, 1000.00 s a step\n") < said.index("step 4 ")
    run(tmp_path / "short", "--steps 2")
    assert "to go" not in capsys.readouterr().out


@pytest.mark.parametrize("imitated", [True, False])
def test_muon_multiplies_what_the_processor_multiplies(monkeypatch, imitated):
    monkeypatch.setattr(text_encoder, "imitates_bf16", lambda kind: imitated)
    turned = train.orthogonal(torch.randn(3, 32, 48))
    assert turned.dtype == (torch.float32 if imitated else torch.bfloat16)


def test_without_bf16_instructions_float32_is_chosen_and_said(tmp_path):
    imitated = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    argv = flags(tmp_path / "run", "--steps 1", "--dtype auto")
    at = argv.index("--device")
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *argv[:at], *argv[at + 2:]], text=True,
                          env={**os.environ, **imitated, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert "using the CPU, --model tiny and --dtype fp32" in done.stdout


def test_nothing_is_bound_to_one_platform_at_import(tmp_path):
    """Without the modules that Windows does not have; the lock is that of msvcrt there."""
    code = ("import sys, types, torch, safetensors.torch, multiprocessing.connection\n"
            "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
            "calls = []\n"
            "where = lambda fd, *a: calls.append(__import__('os').lseek(fd, 0, 1))\n"
            "sys.modules['msvcrt'] = types.SimpleNamespace(LK_NBLCK=1, locking=where)\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            "import train, sample\n"
            "from pathlib import Path\n"
            f"train.lock(Path({str(tmp_path / 'run')!r}))\n"
            f"assert Path({str(tmp_path / 'run/.lock')!r}).read_text().startswith('pid ')\n"
            "assert calls == [1000] and train.memory_peak(torch.device('cpu')) == 0\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_file_that_is_shared_names_no_folder_of_this_machine(tmp_path):
    source = folder_of(tmp_path / "secret place", 8)
    out = tmp_path / "run"
    train.main([*flags(out, "--steps 1"), "--data", str(source)])
    folder = model.checkpoint_folders(out)[-1]
    assert b"secret place" not in (folder / "ema.safetensors").read_bytes()
    assert b"secret place" in (folder / "train.safetensors").read_bytes()
    assert str(tmp_path).encode() not in (folder / "ema.safetensors").read_bytes()


def test_a_grid_may_take_longer_than_the_ranks_wait_for_one_another(tmp_path):
    code = ("import time\nreal = train.sample_grid\n"
            "def slow(*a):\n    time.sleep(5)\n    return real(*a)\n"
            "train.sample_grid = slow")
    changes = ("--steps 2", "--sample-every 2", "--timeout 3")
    status, shown, err = finish(start(tmp_path / "run", *changes, ranks=2, code=code))
    assert status == 0, err
    assert digest(tmp_path / "run")[0] == 2


def test_a_pattern_that_never_ends_is_one_line(monkeypatch):
    monkeypatch.setattr(train.signal, "setitimer", lambda which, seconds, set=signal.setitimer:
                        set(which, seconds / 20))
    with pytest.raises(ValueError, match=r"needs over 10 s for the names of weights\. Use a simpler"):
        train.matching(r"(\w+\.?)+!", ["unet.down.0.blocks.1.conv1.weight.of.a.long.name"])
    assert train.matching("conv", ["a.conv", "b"]) == {"a.conv"}
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_step_takes_more_memory_than_is_told():
    configs = cfg, pictures, shape, *_ = train.parse(["--size=64", "--model=tiny", "--batch-size=8"])
    weights = int(train.PRESETS[64, "tiny"]["weights"])
    told = train.memory_needed(cfg, pictures.crop, shape, weights)
    assert 16 * weights < told < 2**30
    half = dataclasses.replace(configs[0], micro_batch=4)
    assert told / 2 < train.memory_needed(half, 0, shape, weights) < told


@pytest.mark.parametrize(("name", "value"), [
    ("config", "[]"), ("config", "null"), ("config", "x"), ("config", '{"TrainConfig": 7}'), ("step", "x"),
    ("step", "-1"), ("images", "1" * 30), ("scaler", "7"), ("versions", "x"), ("text", None),
    ("images", None)])
def test_crafted_metadata_of_a_run_is_one_line(tmp_path, name, value, capfd):
    run(tmp_path / "run", "--steps 1")
    folder = model.checkpoint_folders(tmp_path / "run")[-1]
    for file in ("ema", "train"):
        tensors, meta = model.load_tensors(folder / f"{file}.safetensors")
        del meta["sha256"], meta[name]
        changed = meta if value is None else meta | {name: value}
        model.save_tensors(folder / f"{file}.safetensors", tensors, changed)
    with pytest.raises(ValueError, match="does not fit this code") as error:
        run(tmp_path / "run", "--steps 2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    lambda train: train.pop("updates") and train.update(updates=torch.zeros(3)),
    lambda train: train.update({"optimizer.nobody.exp_avg": torch.zeros(1)}),
    lambda train: train.pop(next(name for name in train if name.startswith("weights.")))])
def test_a_crafted_state_is_one_line(tmp_path, change):
    run(tmp_path / "run", "--steps 1")
    path = model.checkpoint_folders(tmp_path / "run")[-1] / "train.safetensors"
    tensors, meta = model.load_tensors(path)
    change(tensors)
    del meta["sha256"]
    model.save_tensors(path, tensors, meta)
    with pytest.raises(ValueError, match="the checkpoint does not fit these flags"):
        run(tmp_path / "run", "--steps 2")


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path):
    folder_of(tmp_path / "画", 4)
    command = [sys.executable, str(ROOT / "train.py"), *flags(tmp_path / "run", "--steps 1", "--data 画")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u753b: 3 pictures" in done.stdout


# ---------------------------------------------------------------------------------------------------- latents
def small_vae(folder: Path, seed: int = 0) -> Path:
    """A published folder: a VAE of two pixels a position, four channels."""
    torch.manual_seed(seed)
    model.save_published(folder, model.AutoencoderTiny({
        "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1], "latent_channels": 4}))
    return folder


def test_latents_are_trained_on_as_pixels_are_and_go_on_bit_for_bit(tmp_path, capsys):
    vae = small_vae(tmp_path / "vae")
    latents = ("--size 32", f"--vae {vae}", "--val-every 4", "--val-images 4", "--sample-every 4",
               "--log-every 2", "--save-every 2", "--steps 4")
    whole = run(tmp_path / "whole", *latents)
    shutil.copytree(whole, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "000004")
    run(tmp_path / "parts", *latents)
    ours, theirs = (model.read(path)[1] for path in (whole, tmp_path / "parts"))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert ours["unet.conv_in.weight"].shape[1] == 4 + 12
    assert not [name for name in ours if "coder" in name.split(".")[0] and name[:4] != "text"]

    # Previews and validation are there, and the sheets show pictures at full size.
    lines = metrics(whole)
    assert [line["step"] for line in lines if "val_loss" in line] == [4]
    sheets = [Image.open(whole / name) for name in ("first_batch.png", "samples/000004.png")]
    assert min(sheet.width for sheet in sheets) >= 4 * 32

    # A moved folder is the same VAE; other weights are another one.
    vae.rename(tmp_path / "moved")
    run(whole, "--size 32", f"--vae {tmp_path / 'moved'}", "--steps 5")
    other = small_vae(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"the checkpoint has --vae .*Use another --out"):
        train.main(flags(whole, "--size 32", f"--vae {other}", "--steps 6"))
    capsys.readouterr()


def test_latents_are_what_the_vae_says_of_the_pictures(tmp_path):
    vae = small_vae(tmp_path / "vae")
    configs = train.parse(flags(tmp_path / "run", "--size 32", f"--vae {vae}"))
    text = text_encoder.load_text_encoder(configs[4])
    objective = train.build(configs, text, torch.device("cpu"))
    shown = train.pictures_of(configs)[1]
    shown.reader = text.reader
    shown.draws = partial(train.draws, 0, "validation", 0.0, 0, 1)
    batch = data.collect(shown, 0, 3)
    x0 = objective.inputs(batch, torch.device("cpu"))["x0"]
    assert x0.shape == (3, 4, 16, 16)
    assert torch.equal(x0, model.load_vae(vae).encode(torch.as_tensor(batch["picture"])))
    assert objective.space.limit is None


def few_pictures(folder: Path, count: int = 8) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def test_cached_latents_are_those_that_are_encoded_as_it_goes(tmp_path, capsys, monkeypatch):
    vae, pictures = small_vae(tmp_path / "vae"), few_pictures(tmp_path / "pictures")
    (pictures / "bad.png").write_bytes(b"no picture")
    latents = ("--size 32", f"--vae {vae}", f"--data {pictures}", "--held-out 2", "--min-crop 0.5",
               "--crops 2", "--steps 4", "--val-every 4", "--val-images 2", "--log-every 2", "--max-bad 1",
               "--min-size 8")
    plain = run(tmp_path / "plain", *latents)
    capsys.readouterr()
    cache = tmp_path / "cache"
    cached = run(tmp_path / "cached", *latents, f"--latent-cache {cache}")
    ours, theirs = (model.read(path)[1] for path in (plain, cached))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    times = ("pictures/s", "share_of_peak")
    lines = []
    for path in (plain, cached):
        lines.append([{k: v for k, v in line.items() if k not in times} for line in metrics(path)])
    assert lines[0] == lines[1]
    out = capsys.readouterr().out
    warned = re.search(r"2 pictures have no latents and are replaced, the first (.*)", out)
    assert "pictures bad, 10 bytes" in warned[1]              # of both crops
    assert "not a whole picture" in warned[1]

    # Another run of the same pictures encodes none, wherever their folder lies.
    def never(*_):
        raise AssertionError("encoded again")

    (tmp_path / "moved").mkdir()
    pictures.rename(tmp_path / "moved" / "pictures")
    monkeypatch.setattr(model.Latents, "encode", never)
    moved = [change.replace(str(pictures), str(tmp_path / "moved" / "pictures")) for change in latents]
    run(tmp_path / "again", *moved, f"--latent-cache {cache}")

    # Another VAE or size is an error.
    for name, more in (("vae", f"--vae {small_vae(tmp_path / 'other', seed=1)}"), ("size", "--size 16")):
        with pytest.raises(ValueError, match="was made with"):
            train.main(flags(tmp_path / name, *moved, f"--latent-cache {cache}", more))


def test_a_picture_that_is_too_small_for_latents_is_replaced_and_counted(tmp_path, capsys):
    vae, pictures = small_vae(tmp_path / "vae"), few_pictures(tmp_path / "pictures")
    Image.new("RGB", (24, 24)).save(pictures / "small.png")
    latents = ("--size 32", f"--vae {vae}", f"--data {pictures}", "--held-out 0", "--steps 2", "--max-bad 1",
               "--log-every 1")
    for cache in ((), (f"--latent-cache {tmp_path / 'cache'}",)):
        out = run(tmp_path / f"run{len(cache)}", *latents, *cache)
        assert sum(line["replaced"] for line in metrics(out)) > 0
        assert re.search(r"small.*24", capsys.readouterr().out)


def test_a_signal_ends_the_filling_of_the_latents_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    vae, pictures = small_vae(tmp_path / "vae"), few_pictures(tmp_path / "pictures")
    command = ("--size 32", f"--vae {vae}", f"--data {pictures}", "--held-out 2", "--steps 1",
               f"--latent-cache {tmp_path / 'cache'}")
    encode, encoded = model.Latents.encode, []

    def encode_and_stop(self, x):
        encoded.append(x)
        if len(encoded) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, x)

    monkeypatch.setattr(model.Latents, "encode", encode_and_stop)
    with pytest.raises(SystemExit) as e:
        run(tmp_path / "run", *command)
    assert e.value.code == 0
    assert "run the same command to continue" in capsys.readouterr().out
    assert len(encoded) <= 4
    run(tmp_path / "run", *command)
    assert 8 <= len(encoded) <= 8 + 1                          # what was encoded is kept


@pytest.mark.slow
def test_five_kills_while_the_latents_are_filled_and_two_runs_at_once_change_nothing(tmp_path):
    vae, pictures = small_vae(tmp_path / "vae"), few_pictures(tmp_path / "pictures")
    plain = ("--size 32", f"--vae {vae}", f"--data {pictures}", "--held-out 2", "--steps 2")
    command = (*plain, f"--latent-cache {tmp_path / 'cache'}")
    code = """
import data
kill = os.environ["KILL"].split()
count, encode, fill, fsync = 0, model.Latents.encode, data.Cache.fill, os.fsync
def struck(name):
    global count
    count += kill[0] == name
    if kill == [name, str(count)]:
        os.kill(os.getpid(), signal.SIGKILL)
def encode_or_die(self, x):
    struck("encode")
    return encode(self, x)
def fsync_or_die(file):
    struck("fsync")
    return fsync(file)
model.Latents.encode, os.fsync = encode_or_die, fsync_or_die
data.Cache.fill = lambda self, texts, encode, part: fill(self, texts, encode, 2)
"""
    kept = 0
    for kill in ("encode 1", "encode 3", "fsync 1", "encode 2", "encode 4"):
        process = start(tmp_path / "run", *command, code=code, env={"KILL": kill})
        assert finish(process)[0] == -signal.SIGKILL
        files = len(list((tmp_path / "cache").glob("[!.]*.safetensors")))
        assert files >= kept
        kept = files
    assert kept == 2

    both = [start(tmp_path / name, *command, code=code, env={"KILL": "none"}) for name in ("run", "other")]
    for process in both:
        status, _, error = finish(process)
        assert status == 0, error
    run(tmp_path / "plain", *plain)
    want = model.read(tmp_path / "plain")[1]
    for name in ("run", "other"):
        ours = model.read(tmp_path / name)[1]
        assert [key for key in want if not torch.equal(want[key], ours[key])] == []


def test_two_ranks_share_the_latents(tmp_path):
    vae, pictures = small_vae(tmp_path / "vae"), few_pictures(tmp_path / "pictures")
    command = ("--size 32", f"--vae {vae}", f"--data {pictures}", "--held-out 2", "--steps 2")
    cache = tmp_path / "cache"
    status, _, error = finish(start(tmp_path / "two", *command, f"--latent-cache {cache}", ranks=2))
    assert status == 0, error
    files = list(cache.glob("*.safetensors"))
    assert len(files) == 2                                     # each rank its own
    names = []
    for path in files:
        with safe_open(path, "pt") as f:
            names += f.keys()
    assert len(names) == len(set(names)) == 8


@pytest.mark.parametrize(("changes", "words"), [
    (("--latent-cache c",), "--latent-cache c needs --vae, and pictures that end"),
    (("--latent-cache c", "--data words"), "--latent-cache c needs --vae, and pictures that end"),
    (("--latent-cache c", "--data pictures built-in:2"), "pictures that end: add --data or --limit"),
    (("--text-cache c", "--data quoted-words"), "--text-cache c needs captions that end"),
    (("--latent-cache c", "--limit 9", "--min-crop 0.5"), "Add --crops 4"),
    (("--latent-cache c", "--limit 9", "--flip 0.5"), "--latent-cache cannot keep what --flip 0.5 mirrors"),
    (("--size 18",), "size 18 must be a multiple of 4 for this model"),
    (("--lowres 16",), "is for pictures in colour, and without --lowres"),
    (("--picture-mode grey",), "is for pictures in colour"),
    (("--vae nothing",), "nothing/config.json is missing"),
])
def test_what_does_not_go_with_latents_is_one_line(tmp_path, changes, words):
    vae = small_vae(tmp_path / "vae")
    with pytest.raises(ValueError, match=re.escape(words)):
        train.parse(flags(tmp_path / "run", "--size 32", f"--vae {vae}", *changes))


def test_a_stage_of_latents_has_a_network_of_their_size(tmp_path):
    vae = small_vae(tmp_path / "vae")
    cfg, data_cfg, shape, *_ = train.parse(["--size", "256", "--vae", str(vae), "--device", "cpu"])
    assert (data_cfg.lowres, shape.patch, data_cfg.min_size) == (0, 2, 256)
    assert shape.attn_resolutions == ()                        # its levels have 64 and 32 a side


def test_a_shared_checkpoint_says_the_name_of_its_vae_alone(tmp_path):
    vae = small_vae(tmp_path / "vae")
    run(tmp_path / "run", "--size 32", f"--vae {vae}", "--steps 1")
    _, _, meta = model.read(tmp_path / "run")
    assert json.loads(meta["config"])["ModelConfig"]["vae"] == "vae"
    assert str(tmp_path) not in json.dumps(meta)


# ------------------------------------------------------------------------------------------ published U-Nets
@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A small published pipeline of random weights, see tests/test_sample.py."""
    from test_sample import write_pipeline
    folder = tmp_path_factory.mktemp("published") / "pipeline"
    write_pipeline(folder)
    return folder


def finetune(out, pipeline, *changes):
    """Train on from a pipeline, by its own text encoder, U-Net, VAE and noise."""
    usual = ["--size=16", f"--pretrained={pipeline}", f"--out={out}", "--device=cpu", "--dtype=fp32",
             "--limit=8", "--batch-size=4", "--steps=3", "--warmup=0", "--lr=1e-3", "--sample-every=0",
             "--val-every=0", "--log-every=1", "--no-compile"]
    given = [change.split("=")[0] for change in changes]
    train.main([flag for flag in usual if flag.split("=")[0] not in given] + [*changes])
    return Path(out)


def exported(run, to):
    sample.main(["--export", str(to), "--ckpt", str(run), "--device", "cpu"])
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel.from_pretrained(to / "unet")


@torch.no_grad()
def same_unet(theirs, ours, pipeline) -> float:
    """The largest difference of what two U-Nets say, one of them as limn calls it."""
    torch.manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 16)
    timestep = torch.tensor([999, 3])
    said = ours(x, (timestep + 1) / 1000, context, torch.ones(2, 77, dtype=torch.bool))
    return (theirs(x, timestep, context).sample - said).abs().max().item()


def test_a_published_unet_is_trained_on_and_given_back(pipeline, tmp_path, capsys):
    run = finetune(tmp_path / "run", pipeline, "--sample-every=3", "--val-every=3", "--val-images=2")
    cfg = json.loads((run / "config.json").read_text())
    assert cfg["DiffusionConfig"]["schedule"] == "scaled_linear"
    assert (cfg["DiffusionConfig"]["prediction"], cfg["DiffusionConfig"]["shift_base"]) == ("eps", 0)
    assert all(line["qk_grad"] > 0 for line in metrics(run) if "loss" in line)
    assert Image.open(run / "samples" / "000003.png").width >= 16

    theirs = exported(run, tmp_path / "out")
    stage = sample.load_stage(run, torch.device("cpu"))
    assert same_unet(theirs, stage.unet, pipeline) < 1e-5
    assert "_adapter" not in json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    start = model.load_unet(pipeline / "unet")
    assert same_unet(theirs, start, pipeline) > 1e-4             # it has learned something

    # Its weights and metadata name no folder, and it draws.
    _, _, meta = model.read(run)
    assert str(tmp_path) not in meta["config"] + meta["unet"]
    pictures = sample.generate(stage, ["a red house"], [0], steps=2)
    assert pictures.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("how", ["no weights", "reinit"])
def test_a_published_unet_starts_from_scratch_where_that_is_wanted(pipeline, tmp_path, capsys, how):
    shutil.copytree(pipeline, tmp_path / "copy")
    flag = "--reinit=."
    if how == "no weights":
        (tmp_path / "copy" / "unet" / f"{model.WEIGHTS}.safetensors").unlink()
        flag = "--keep=2"
    run = finetune(tmp_path / "run", tmp_path / "copy", flag, "--steps=1", "--lr=1e-12", "--warmup=0")
    said = "unet has no weights, so it starts from scratch" if how == "no weights" else "0 copied"
    assert said in capsys.readouterr().out
    weights, published = model.read(run)[1], model.load_unet(pipeline / "unet").state_dict()
    assert weights["unet.conv_out.weight"].abs().max() < 1e-6 < published["conv_out.weight"].abs().max()
    assert not torch.equal(weights["unet.conv_in.weight"], published["conv_in.weight"])


def test_a_published_unet_goes_on_bit_for_bit_with_a_text_cache_too(pipeline, tmp_path):
    more = ("--save-every=2", f"--text-cache={tmp_path / 'cache'}", "--uncond-prob=0.5")
    whole = finetune(tmp_path / "whole", pipeline, *more)
    shutil.copytree(whole, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "000003")
    parts = finetune(tmp_path / "parts", pipeline, *more)
    ours, theirs = (model.read(path)[1] for path in (whole, parts))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_published_unet_of_sdxl_is_trained_on_by_both_of_its_encoders(tmp_path):
    from test_sample import write_pipeline
    write_pipeline(tmp_path / "xl", xl=True)
    more = ("--save-every=1", f"--text-cache={tmp_path / 'cache'}", "--uncond-prob=0.5", "--keep=5")
    whole = finetune(tmp_path / "whole", tmp_path / "xl", *more)
    parts = finetune(tmp_path / "parts", tmp_path / "xl", *more)
    shutil.rmtree(parts / "checkpoints" / "000003")
    parts = finetune(tmp_path / "parts", tmp_path / "xl", *more)
    ours, again = (model.read(path)[1] for path in (whole, parts))
    assert [name for name in ours if not torch.equal(ours[name], again[name])] == []

    # Given back, it says what the run says of a caption, with its pooled text and sizes.
    theirs = exported(whole, tmp_path / "out")
    stage = sample.load_stage(whole, torch.device("cpu"))
    said = stage.text.encode(["a red house"], "cpu")
    assert said["context"].shape == (1, 77, 16 + 24)
    x, timestep = torch.randn(1, 4, 8, 8), torch.tensor([600])
    beside = {"text_embeds": said["pooled"], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    with torch.no_grad():
        want = theirs(x, timestep, said["context"], added_cond_kwargs=beside).sample
        assert (stage.unet(x, (timestep + 1) / 1000, **said) - want).abs().max() < 1e-5
    start = model.load_unet(tmp_path / "xl" / "unet")
    assert (want - start(x, (timestep + 1) / 1000, **said)).abs().max() > 1e-4


def test_a_published_unet_goes_on_wherever_its_pipeline_lies_but_not_without_it(pipeline, tmp_path):
    run = finetune(tmp_path / "run", pipeline, "--steps=1")
    shutil.copytree(pipeline, tmp_path / "moved")
    finetune(run, tmp_path / "moved", "--steps=2")
    assert metrics(run)[-1]["step"] == 2
    with pytest.raises(ValueError, match=r"the checkpoint has --pretrained .*, not . Use that"):
        train.main(["--size=16", f"--out={run}", "--limit=8", "--device=cpu", f"--vae={pipeline / 'vae'}"])


def test_captions_that_are_dropped_are_the_empty_prompt_of_the_pipeline(pipeline, tmp_path):
    configs = train.parse(["--size=16", f"--pretrained={pipeline}", "--limit=8", "--device=cpu"])
    text = text_encoder.load_text_encoder(configs[4])
    objective = train.build(configs, text, torch.device("cpu"))
    torch.manual_seed(0)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    said, empty = (text.encode([caption], torch.device("cpu")) for caption in ("a house", ""))
    assert empty["mask"].all()
    dropped = said | {"mask": torch.zeros_like(said["mask"])}
    assert torch.equal(objective.unet(x, t, **dropped), objective.unet(x, t, **empty))
    assert not torch.equal(objective.unet(x, t, **said), objective.unet(x, t, **empty))


def test_a_published_unet_reads_another_encoder_through_a_projection(pipeline, tmp_path):
    words = ("--text-encoder", "bytes", "--byte-width=32", "--byte-layers=1")
    run = finetune(tmp_path / "run", pipeline, *words)
    stage = sample.load_stage(run, torch.device("cpu"))
    assert stage.unet.adapter is not None
    pictures = sample.generate(stage, ["a red house"], [0], steps=2)
    assert pictures.shape == (1, 3, 16, 16)
    exported(run, tmp_path / "out")
    back = model.load_unet(tmp_path / "out" / "unet", text_dim=32, pooled_dim=32)
    ours = stage.unet.state_dict()
    assert all(torch.equal(p, ours[name]) for name, p in back.state_dict().items())


@pytest.mark.parametrize(("changes", "words"), [
    (("--size=16", "--learn-sigma"), "needs --vae, and no --learn-sigma, --crop or --transcription"),
    (("--size=17",), "--size 17 must be a multiple of 2. Try 16"),
    (("--size=16", "--lowres=8", "--prediction=v"), "without --lowres"),
])
def test_what_does_not_go_with_a_published_unet_is_one_line(pipeline, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        train.parse([f"--pretrained={pipeline}", "--limit=8", "--device=cpu", *changes])


def test_a_published_unet_starts_from_another_run_too(pipeline, tmp_path, capsys):
    first = finetune(tmp_path / "first", pipeline)
    capsys.readouterr()
    second = finetune(tmp_path / "second", pipeline, f"--init={first}", "--steps=1", "--lr=1e-12")
    assert "0 sliced, 0 new" in capsys.readouterr().out
    ours, theirs = (model.read(path)[1] for path in (first, second))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    with pytest.raises(ValueError, match="own text encoder needs --text-padding"):
        finetune(tmp_path / "third", pipeline, "--no-text-padding")


def test_published_layouts_from_scratch_fit_the_latents_and_the_text(pipeline, monkeypatch, tmp_path):
    small = json.loads((pipeline / "unet" / "config.json").read_text())
    small = {name: value for name, value in small.items() if name in model.UNET_FIELDS}
    monkeypatch.setitem(model.UNETS, "sd15", small)
    vae = small_vae(tmp_path / "vae")
    run = finetune(tmp_path / "run", "", "--model=sd15", f"--vae={vae}")
    stage = sample.load_stage(run, torch.device("cpu"))
    assert isinstance(stage.unet, model.UNet2DConditionModel)
    assert (stage.config.schedule, stage.config.prediction) == ("scaled_linear", "eps")
    with pytest.raises(ValueError, match="a published U-Net needs --vae"):
        train.parse(["--size=16", "--model=sd15", "--device=cpu"])


def test_only_published_unets_are_exported(tmp_path):
    run(tmp_path / "run", "--steps 1")
    with pytest.raises(ValueError, match="--export is for published U-Nets"):
        sample.main(["--export", str(tmp_path), "--ckpt", str(tmp_path / "run"), "--device", "cpu"])


# ----------------------------------------------------------------------------------------- logs and curves


@pytest.fixture
def boards(monkeypatch):
    """What is logged, by stand-ins for both packages: {"tensorboard", "wandb"}: (name, value, step), ..."""
    logged = {"tensorboard": [], "wandb": []}

    class SummaryWriter:
        def __init__(self, folder):
            logged["folder"] = folder

        def add_text(self, name, text):
            logged["config"] = json.loads(text)

        def add_scalar(self, name, value, step):
            logged["tensorboard"].append((name, value, step))

        def add_image(self, name, picture, step, dataformats):
            assert (picture.dtype, picture.shape[2], dataformats) == (np.uint8, 3, "HWC")
            logged["tensorboard"].append((name, picture.shape, step))

        def close(self):
            logged["closed"] = logged.get("closed", 0) + 1

    class Board:
        def log(self, values, step):
            logged["wandb"] += [(name, value, step) for name, value in values.items()]

        def finish(self):
            logged["finished"] = True

    def init(**options):
        logged["options"] = options
        return Board()

    wandb = types.SimpleNamespace(init=init, Image=lambda picture: np.asarray(picture).shape)
    tensorboard = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return logged


def test_every_number_and_grid_goes_to_the_boards_under_plain_names(tmp_path, boards):
    out = run(tmp_path / "run", "--steps 4", "--log-every 2", "--val-every 4", "--val-images 4",
              "--sample-every 4", "--log-to tensorboard wandb")
    lines = metrics(out)
    expected = [(name, value, line["step"]) for line in lines for name, value in train.flat(line).items()]
    names = {name for name, *_ in expected}
    assert {"val_buckets/7", "val_gap", "pictures/s", "weights/unet.down", "lr"} <= names
    for name in ("tensorboard", "wandb"):
        numbers = [one for one in boards[name] if not isinstance(one[1], tuple)]
        assert numbers == expected
        pictures = [(name, step) for name, shape, step in boards[name] if isinstance(shape, tuple)]
        assert pictures == [("first_batch.png", 0), ("samples", 4)]
    assert boards["folder"] == str(out / "tensorboard")
    assert boards["config"]["TrainConfig"]["steps"] == 4
    assert boards["options"]["config"] == boards["config"]
    assert (boards["closed"], boards["finished"]) == (1, True)


def test_a_board_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = run(tmp_path / "run", "--steps 1", "--log-to wandb")
    said = [line for line in capsys.readouterr().out.splitlines() if "--log-to" in line]
    assert len(said) == 1
    assert said[0].startswith("note: --log-to wandb is not installed (")
    assert metrics(out)


def test_norms_of_weights_and_gradients_are_told_by_parts(tmp_path, monkeypatch):
    """The weights' are those of the step before; all parts together have the norm of the whole gradient."""
    weights = {}

    def note(state):
        weights["up"] = train.nn.utils.get_total_norm(list(state.net.unet.up.parameters())).item()
    during(monkeypatch, note, at=2)
    out = run(tmp_path / "run", "--steps 3", "--log-every 2", "--clip 0")
    first, last = (line for line in metrics(out) if "loss" in line)
    parts = {name: value for name, value in first.items() if name.startswith("gradients/")}
    assert {name.replace("gradients", "weights") for name in parts} <= set(first)
    assert first["weights/unet.up"] == pytest.approx(weights["up"], rel=1e-4)
    assert not any("/unet" in name for name in last)                          # of a step that nobody watched
    whole = math.hypot(*parts.values())
    assert whole > 0
    assert {"gradients/unet.down", "gradients/text_encoder.tower"} <= set(parts)


def test_parts_have_the_gradient_norm_of_the_whole(tmp_path):
    out = run(tmp_path / "run", "--steps 1", "--log-every 1")
    line = next(line for line in metrics(out) if "loss" in line)
    parts = [value for name, value in line.items() if name.startswith("gradients/")]
    assert math.hypot(*parts) == pytest.approx(line["grad_norm"], rel=1e-4)


def test_curves_of_runs_are_drawn_into_the_first(tmp_path, capsys, monkeypatch):
    for name, factor in (("a", 1), ("b", 3)):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "raw_loss": factor / step, "buckets": [0.1 / step, 1.0], "pictures/s": 9.0,
                  "lr": 0.0} for step in range(1, 50)]
        lines += [{"step": 50, "val_loss": 0.1, "val_gap": -factor}, {"step": 49, "raw_loss": factor}]
        text = "\n".join(map(json.dumps, lines))
        (tmp_path / name / "metrics.jsonl").write_text('{"step": {"step": 9}\n' + text + '\n{"step": 9')
    assert train.curves_of(tmp_path / "a")["raw_loss"][49] == 1               # what was said last counts
    train.main(["--plot", str(tmp_path / "a"), str(tmp_path / "b")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "a" / "curves.png")
    sheet = np.asarray(Image.open(tmp_path / "a" / "curves.png"))
    for ink in ((65, 105, 225), (220, 20, 60)):
        assert (sheet == ink).all(2).sum() > 500
    assert not (tmp_path / "b" / "curves.png").exists()


def test_a_curve_falls_where_its_values_do():
    pen = types.SimpleNamespace(rectangle=lambda *a, **k: None, text=lambda *a: None, line=None)
    lines = []
    pen.line = lambda points, *_: lines.append(points)
    train.draw_panel(pen, 0, 0, "raw_loss", [{"raw_loss": {1: 1.0, 2: 0.1, 4: 0.01}, "raw_loss/s": {1: 1}}])
    (x, y), = ([*zip(*points)] for points in lines)
    assert x[:3] == (120, 240, 480)
    assert y[1] - y[0] == pytest.approx(y[2] - y[1])                          # by its logarithm
    assert y[1] > y[0]


@pytest.mark.parametrize(("command", "words"), [
    (["--plot", "nowhere"], "--plot nowhere: nowhere/metrics.jsonl is not there"),
    (["--log-to", "paper"], "--log-to: invalid choice: 'paper'"),
])
def test_a_log_that_cannot_be_is_one_line(command, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError)) as e:
        train.main([*command, "--device", "cpu"])
    assert words in f"{e.value} {capsys.readouterr().err}"


def test_grids_are_drawn_of_a_file_of_prompts_at_step_0_too(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red house\n\n  a  blue car \na cat\n")
    seen = []
    real = train.sample_grid

    def noted(net, shown, *rest):
        seen.append(shown)
        return real(net, shown, *rest)
    monkeypatch.setattr(train, "sample_grid", noted)
    out = run(tmp_path / "run", "--steps 2", "--sample-every 2", f"--prompts {tmp_path / 'prompts.txt'}")
    assert sorted(path.name for path in out.glob("samples/*")) == ["000000.png", "000002.png"]
    for shown in seen:
        assert shown["captions"] == ["a red house", "a blue car", "a cat"]
        assert shown["picture"].shape[0] == 3
    reader = text_encoder.load_text_encoder(train.parse(flags(out))[4]).reader
    assert np.array_equal(shown["ids"][0][:5], reader.read("a red house", b"")["ids"][:5])
    _, meta = model.load_tensors(out / "checkpoints/000002/ema.safetensors")
    assert "prompts.txt" not in meta["config"]


def test_a_file_named_save_and_minutes_save_now(tmp_path, monkeypatch):
    out = tmp_path / "run"
    during(monkeypatch, lambda state: (out / "save").touch(), at=2)
    run(out, "--steps 4", "--save-every 0", "--keep 9", "--save-minutes 1000")
    assert [path.name for path in model.checkpoint_folders(out)] == ["000002", "000004"]
    assert not (out / "save").exists()
    out = run(tmp_path / "fast", "--steps 2", "--save-every 0", "--save-minutes 1e-9")
    assert [path.name for path in model.checkpoint_folders(out)] == ["000001", "000002"]


def test_pictures_that_show_nothing_are_named():
    rng = np.random.default_rng(0)
    plain = [torch.full((3, 16, 16), value, dtype=torch.uint8) for value in (255, 0, 127)]
    noise = torch.from_numpy(rng.integers(0, 256, (3, 16, 16), np.uint8))
    picture = torch.arange(0, 256, 16, dtype=torch.uint8).expand(3, 16, 16)
    assert train.described(torch.stack([*plain, noise, noise, picture])).split(", ")[2:] == [
        "1 of 6 white", "1 of 6 black", "1 of 6 grey", "2 of 6 noise"]
    drawn = train.described(torch.stack([torch.from_numpy(data.draw(data.scene(i), 64)) for i in range(32)]))
    assert re.fullmatch(r"mean \d+\.\d, deviation \d+\.\d", drawn)


@pytest.mark.parametrize(("name", "values", "best"), [
    ("val_loss", [0.5, 0.3, 0.4], 2), ("val_gap", [0.1, 0.2, 0.3], 3), ("val_loss", [0.5, 0.3, math.nan], 2)])
def test_the_weights_that_were_best_are_kept(tmp_path, monkeypatch, name, values, best):
    """Through a restart, too."""
    real, ema = train.validate, {}

    def validate(net, *rest):
        step = len(ema) + 1
        ema[step] = {name: p.clone() for name, p in net.state_dict().items()}
        return real(net, *rest) | {name: values[step - 1]}
    monkeypatch.setattr(train, "validate", validate)
    flag = f"--keep-best {name}"
    for steps in (2, 3):
        out = run(tmp_path / "run", f"--steps {steps}", "--val-every 1", "--val-images 2", flag)
    _, tensors, meta = model.read(out / "checkpoints/best")
    assert meta["step"] == str(best)
    assert all(torch.equal(p, tensors[name]) for name, p in ema[best].items())
    assert sample.load_stage(out / "checkpoints/best", torch.device("cpu")).step == best


def test_a_run_is_scored_while_it_trains_and_goes_on_where_it_is_not(tmp_path, monkeypatch, capfd):
    torch.jit.script(nn.AvgPool2d(60)).save("see.pt")
    during(monkeypatch, lambda state: Path("see.pt").unlink(), at=2)
    score = "--features see.pt --limit 8 --sample-steps 2"
    argv = [*flags(tmp_path / "run", "--steps 2", "--score-every 1", "--keep-best kernel"), "--score", score]
    train.main(argv)
    shown, err = capfd.readouterr()
    assert "error: --features see.pt is no TorchScript" in err.splitlines()[-1]
    assert "warning: no score of step 2, see above; training continues" in shown

    first, of_losses = metrics(tmp_path / "run")
    assert first["step"] == 1
    assert set(first) > {"frechet", "kernel", "precision", "recall"}
    assert "frechet" not in of_losses
    _, meta = model.load_tensors(tmp_path / "run/checkpoints/best/ema.safetensors")
    assert (meta["step"], meta["kernel"]) == ("1", str(first["kernel"]))
    assert "see.pt" not in meta["config"]

    held_out = data.Pictures(train.parse(argv)[1], 16, 0, "val")
    captions = np.load("run/scored.npz")["captions"].tolist()
    assert captions == [held_out[i]["caption"] for i in range(8)]


@pytest.mark.parametrize("command", [
    "--score-every 5", "--score-every 5 --score=--limit", "--keep-best kernel",
    "--keep-best frechet --score=--features", "--score-every 5 --score=--features --lowres 8"])
def test_a_score_that_cannot_be_is_one_line(command):
    with pytest.raises(ValueError, match="scores a stage that draws"):
        train.parse([*flags("run"), *command.split()])


# ------------------------------------------------------------------------------ what is written in pictures


def test_what_is_written_trains_alike_on_two_ranks_with_workers_and_in_parts(tmp_path, capsys):
    more = ("--val-every 2", "--val-images 4", "--sample-every 2", "--log-every 2",
            "--transcription-length 6")
    whole = digest(run(tmp_path / "whole", "--steps 2", *WRITES[:-1], *more, "--micro-batch 4"))
    assert "has a transcription that is cut, see --transcription-length" in capsys.readouterr().out
    assert any(line.get("overlong") for line in metrics(tmp_path / "whole"))
    assert not [line for line in metrics(tmp_path / "whole") if line.get("replaced")]
    status, _, err = finish(start(tmp_path / "two", "--steps 2", "--workers 1", *WRITES[:-1], *more[-1:],
                                  ranks=2))
    assert status == 0, err
    assert digest(tmp_path / "two") == whole
    for name in ("first_batch.png", "samples/000002.png"):
        Image.open(tmp_path / "whole" / name).load()


def test_a_transcription_that_is_dropped_is_not_seen():
    """Neither by the network nor on the sheet, and what is kept does reach the loss."""
    configs = train.parse(flags("unused", *WRITES, "--no-compile"))
    torch.manual_seed(0)
    text = text_encoder.load_text_encoder(configs[4])
    net = train.build(configs, text, torch.device("cpu"))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    sets = [data.Pictures(configs[1], 16, 0) for _ in range(3)]
    for share, seen in ((0.0, True), (1.0, False)):
        cfg = dataclasses.replace(configs[0], transcription_drop=share, both_drop=0.0)
        train.attach(sets, text, cfg, 0)
        items = [sets[0][i] for i in range(8)]
        others = [item | {name: after[name] for name in ("transcription", "letters")}
                  for item, after in zip(items, items[1:] + items[:1])]
        with torch.no_grad():
            one, two = (net(**net.inputs(sets[0].batch(some), torch.device("cpu")))["raw"]
                        for some in (items, others))
        changed = [a["transcription"] != b["transcription"] for a, b in zip(items, others)]
        assert (one != two).tolist() == [seen and different for different in changed]


def test_old_checkpoints_without_the_fields_of_a_second_stream_go_on(tmp_path):
    run(tmp_path / "run", "--steps 2")
    folder = model.checkpoint_folders(tmp_path / "run")[-1]
    for name in ("ema", "train"):
        tensors, meta = model.load_tensors(folder / f"{name}.safetensors")
        recipe = json.loads(meta["config"])
        for group in recipe.values():
            for field in list(group):
                if re.match(r"transcription|both_drop|txt|text_(crop|area)|weave", field):
                    del group[field]
        meta = {key: value for key, value in meta.items() if key not in ("format", "sha256")}
        model.save_tensors(folder / f"{name}.safetensors", tensors, meta | {"config": json.dumps(recipe)})
    sample.load_stage(tmp_path / "run", torch.device("cpu"))
    run(tmp_path / "run", "--steps 4")
    assert digest(tmp_path / "run")[0] == 4
