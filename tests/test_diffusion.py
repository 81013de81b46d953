"""diffusion.py against closed forms (Gaussian data, a mixture of two) and the published implementations."""

import functools
import importlib
import math
import re
import warnings

import pytest
import torch

import diffusion
from diffusion import GRIDS, SAMPLERS, DiffusionConfig, expand, gaussian, make_schedule, sampling_times

F64 = torch.float64
SCHEDULES = ["cosine", "linear", "scaled_linear", "sigmoid", "flow", "edm"]
PREDICTIONS = ["v", "eps", "x0", "flow"]
SIZES = [64, 256, 1024]
ORDERS = {"heun": 2, "dpmpp_2m": 2, "dpmpp_2m_sde": 2, "unipc": 2, "plms": 4, "prk": 4}  # all but DDIM
WEIGHTS = ["uniform", "min_snr", "soft_min_snr", "sigmoid", "p2", "edm"]


def schedule_of(name="cosine", size=64, **options):
    return make_schedule(DiffusionConfig(schedule=name, **options), size)


def even(steps, start=1.0):
    """Times that are even in t, down to 0 itself: what published samplers take."""
    return torch.linspace(start, 0, steps + 1, dtype=F64)


def levels(schedule, t, x):
    """alpha and sigma of t, one or (B,), to multiply x (B, ...), in its precision."""
    return [expand(c.reshape(-1).to(x), x) for c in schedule.alpha_sigma(t)]


def gauss_denoiser(schedule, mean=0.3, std=0.5):
    """E[x0 | x_t] of x0 ~ N(mean, std^2), element by element."""
    def denoise(x_t, t):
        alpha, sigma = levels(schedule, t, x_t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
    return denoise


MIXTURE = (-0.6, 0.5), (0.15, 0.25), (0.4, 0.6)                               # means, deviations, weights


def mixture_denoiser(schedule, means=MIXTURE[0], stds=MIXTURE[1], weights=MIXTURE[2]):
    """E[x0 | x_t] of a mixture of two normals, element by element."""
    known = {}

    def at(x_t, t):
        """What does not depend on x_t, and is most of the work; samplers come to a time several times."""
        alpha, sigma = (c.unsqueeze(-1) for c in levels(schedule, t, x_t))
        m, s, w = (torch.tensor(v, dtype=x_t.dtype) for v in (means, stds, weights))
        var = alpha**2 * s**2 + sigma**2
        return m, alpha * m, alpha * s**2 / var, w.log() - 0.5 * var.log(), -0.5 / var

    def denoise(x_t, t):
        key = None if t.ndim else (t.item(), x_t.dtype, x_t.ndim)
        if key is None or key not in known:
            known[key] = at(x_t, t)
        m, centre, gain, share, sharpness = known[key]
        miss = x_t.unsqueeze(-1) - centre
        return (torch.softmax(share + sharpness * miss**2, -1) * (m + gain * miss)).sum(-1)
    return denoise


def carried(schedule, times, x, means=MIXTURE[0], stds=MIXTURE[1], weights=MIXTURE[2]):
    """Where ever more steps between the first and the last of the times take x, without a solver: in one
    dimension the flow keeps the share of the data that lies below. At t = 0 they jump from the last noise."""
    m, s, w = (torch.tensor(v, dtype=F64) for v in (means, stds, weights))

    def below(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return torch.special.ndtr((x.unsqueeze(-1) - alpha * m) / (alpha**2 * s**2 + sigma**2).sqrt()) @ w

    share, low, high = below(x, times[0]), torch.full_like(x, -9), torch.full_like(x, 9)
    for _ in range(60):
        middle = (low + high) / 2
        short = below(middle, times[-1]) < share
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    x = (low + high) / 2
    return x if times[-1] > 0 else mixture_denoiser(schedule, means, stds, weights)(x, times[-1])


def target(x0, eps, alpha, sigma, prediction):
    a, b = diffusion.TARGETS[prediction](alpha, sigma)
    return a * x0 + b * eps


def quantiles(n):
    """n points that stand for a standard normal."""
    return torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)


# Noise ---------------------------------------------------------------------------------------------------


def test_gaussian_has_the_moments_and_the_distribution_of_a_normal():
    x = gaussian(torch.arange(64), (3, 32, 32)).flatten().double()
    n = len(x)
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - expected) < 4 * math.sqrt(spread / n)
    cdf = torch.special.ndtr(x.sort().values)
    ks = (cdf - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n)
    assert ks < 1.63  # Kolmogorov's 1% point
    assert 4.2 < x.abs().max() < 6.8


def test_gaussian_is_independent_across_keys_elements_and_steps():
    base = gaussian(torch.arange(256), (1024,))
    keys = torch.arange(256)
    keys = torch.cat([base, gaussian(keys + 2**32, (1024,)), gaussian(-1 - keys, (1024,))])
    for x in (keys, base.T, diffusion.noise_source(torch.arange(256), (1024,))(0) * base,
              torch.cat([diffusion.noise_source(torch.arange(16), (1024,))(i) for i in range(-1, 15)])):
        unit = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        correlation = unit @ unit.T / unit.shape[1]
        correlation.fill_diagonal_(0)
        assert correlation.abs().max() * math.sqrt(unit.shape[1]) < 6.2
    squares = base**2 - 1  # Box-Muller pairs share a radius: their squares must not correlate
    assert abs((squares[:, :512] * squares[:, 512:]).mean()) < 4 * 2 / math.sqrt(256 * 512)


def test_gaussian_is_the_same_for_every_split_of_the_batch():
    keys = torch.tensor([5, -1, 2**62, 0, 17])
    whole = gaussian(keys, (3, 7, 5))
    assert all(torch.equal(whole[i:j], gaussian(keys[i:j], (3, 7, 5))) for i, j in ((0, 1), (1, 4), (3, 5)))
    assert whole.dtype == torch.float32
    assert whole.shape == (5, 3, 7, 5)
    noise = diffusion.noise_source(keys, (3, 7, 5))
    assert torch.equal(noise(3)[2:], diffusion.noise_source(keys[2:], (3, 7, 5))(3))


def test_gaussian_goldens():
    golden = torch.tensor([[-0.292032, 0.807785, 0.876792], [-1.212868, -1.477171, 1.111539]])
    torch.testing.assert_close(gaussian(torch.tensor([0, 2**40 + 1]), (3,)), golden, atol=2e-6, rtol=0)


# Pictures ------------------------------------------------------------------------------------------------


def test_every_eight_bit_picture_survives_the_space_of_pixels():
    space = diffusion.Pixels(1)
    pictures = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x0 = space.encode(pictures)
    assert x0.dtype == torch.float32
    assert (x0.min(), x0.max()) == (-space.limit, space.limit)
    assert torch.equal(space.decode(x0), pictures)
    assert torch.equal(space.decode(999 * x0), pictures.ge(128).to(torch.uint8) * 255)  # clipped
    assert (space.channels, space.scale, diffusion.Pixels().channels) == (1, 1, 3)


# Schedules -----------------------------------------------------------------------------------------------


def every_schedule(*kinds):
    """Each curve, size and kind of shift, with and without signal at t = 1."""
    for name in SCHEDULES:
        for size, base in ((64, 0), (16, 64), (256, 64), (1024, 64), (1024, 16)):
            for kind in kinds or ("uniform", "interpolated"):
                if base == 0 and kind == "interpolated":
                    continue                                                # no shift: it is the one before
                yield schedule_of(name, size, size_shift=kind, shift_base=base)
                if "linear" in name:
                    yield schedule_of(name, size, size_shift=kind, shift_base=base, zero_snr=True)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_logsnr_falls_strictly_from_its_first_to_its_last_time(dtype):
    for schedule in every_schedule():
        logsnr = schedule.logsnr(torch.linspace(0, 1, 1001, dtype=dtype))
        assert logsnr.dtype == dtype
        assert logsnr.abs().max() <= 20
        assert (logsnr.diff() < 0).all(), schedule
        alpha, sigma = schedule.alpha_sigma(torch.linspace(0, 1, 1001, dtype=dtype))
        assert (alpha > 4e-5).all()
        assert (sigma > 4e-5).all()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("size", [16, 64, 1024])
@pytest.mark.parametrize("kind", ["uniform", "interpolated"])
def test_logsnr_inverts_and_is_the_same_in_float32(name, size, kind):
    schedule = schedule_of(name, size, size_shift=kind)
    logsnr = schedule.logsnr(torch.linspace(0, 1, 4001))
    torch.testing.assert_close(logsnr.double(), schedule.logsnr(torch.linspace(0, 1, 4001, dtype=F64)),
                               atol=2e-3, rtol=0)
    t = torch.linspace(0.01, 0.9, 90, dtype=F64)
    torch.testing.assert_close(schedule.inverse(schedule.logsnr(t)), t, atol=1e-9, rtol=0)
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(2 * torch.log(alpha / sigma), schedule.logsnr(t))
    torch.testing.assert_close(alpha + sigma if name == "flow" else alpha**2 + sigma**2, torch.ones_like(t))


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_interpolated_shift_acts_at_one_end_and_loses_neither(name):
    t = torch.linspace(0, 1, 101, dtype=F64)
    plain, large, small = (schedule_of(name, size, size_shift="interpolated") for size in (64, 1024, 16))
    near = plain.logsnr(t).abs() < 10  # away from where schedules bend
    shift = 2 * math.log(16)
    torch.testing.assert_close((large.logsnr(t) - plain.logsnr(t))[near], (-shift * t)[near])
    near = (small.logsnr(t).abs() < 16) & near
    torch.testing.assert_close((small.logsnr(t) - plain.logsnr(t))[near], (shift / 2 * (1 - t))[near])
    assert large.logsnr(t)[0] == plain.logsnr(t)[0] > 12
    assert small.logsnr(t)[-1] == plain.logsnr(t)[-1]
    old = schedule_of(name, 1024)
    assert old.logsnr(t[1:2]) < plain.logsnr(t[1:2]) - 5 < large.logsnr(t[1:2]) - 4


def test_schedules_have_their_closed_forms():
    t = torch.linspace(0.02, 0.98, 49, dtype=F64)
    torch.testing.assert_close(schedule_of("cosine").alpha_sigma(t)[0], torch.cos(math.pi / 2 * t))
    torch.testing.assert_close(schedule_of("flow").alpha_sigma(t), (1 - t, t))
    low, high = torch.sigmoid(torch.tensor([-3.0, 3.0], dtype=F64))
    torch.testing.assert_close(schedule_of("sigmoid").alpha_sigma(t)[0] ** 2,
                               (high - torch.sigmoid(6 * t - 3)) / (high - low))
    sigma = torch.exp(-schedule_of("edm").logsnr(torch.tensor([0.0, 1.0], dtype=F64)) / 2)
    torch.testing.assert_close(sigma, torch.tensor([0.002, 80], dtype=F64))


def test_shift_follows_the_picture_size():
    t = torch.linspace(0.1, 0.9, 9, dtype=F64)
    for name in SCHEDULES:
        gap = schedule_of(name, 256).logsnr(t) - schedule_of(name, 64).logsnr(t)
        torch.testing.assert_close(gap, torch.full_like(t, 2 * math.log(64 / 256)))
    unshifted = schedule_of("linear", 512, shift_base=0)
    assert torch.equal(unshifted.logsnr(t), schedule_of("linear", 64).logsnr(t))
    sigma = schedule_of("flow", 192).alpha_sigma(t)[1]  # the time shift 3 of Stable Diffusion 3
    torch.testing.assert_close(sigma, 3 * t / (1 + 2 * t))


def test_quadratic_and_unknown_schedules_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="scaled_linear"):
        schedule_of("quadratic")
    with pytest.raises(ValueError, match="cosine, linear"):
        schedule_of("cosin")
    with pytest.raises(ValueError, match="size 0"):
        schedule_of("cosine", 0)


def test_eps_is_refused_where_no_signal_is_left():
    for name in ("linear", "scaled_linear"):
        with pytest.raises(ValueError, match=r"eps .* zero_snr") as error:
            schedule_of(name, zero_snr=True, prediction="eps")
        assert "\n" not in str(error.value)
        schedule_of(name, zero_snr=True, prediction="v")
        schedule_of(name, prediction="eps")


def chosen(spec, steps=1000):
    return (diffusion.respaced(spec, steps) * steps - 1).round().int().tolist()[-2::-1]


def published(counts, steps=1000):
    """What the published code picks of each section, in exact steps of its running sum."""
    indices, first = [], 0
    for number, count in enumerate(counts):
        size = steps // len(counts) + (1 if number < steps % len(counts) else 0)
        stride = 1 if count <= 1 else (size - 1) / (count - 1)
        at = 0.0
        for _ in range(count):
            indices.append(first + round(at))
            at += stride
        first += size
    return indices


@pytest.mark.filterwarnings("ignore:respacing")
def test_respacing_picks_the_published_indices_of_the_same_schedule():
    assert (diffusion.respaced("1000") * 1000).tolist() == pytest.approx(list(range(1000, -1, -1)))
    for count in range(1, 1001):
        assert chosen(str(count)) == published([count]), count
    for spec in ("10,10,30", "1,1,1", "333,1,2", "334,333,333", "10,15,20", "7,7,7,7,7,7,7"):
        counts = [int(n) for n in spec.split(",")]
        assert chosen(spec) == published(counts), spec
        assert chosen(spec, 4001) == published(counts, 4001), spec
    fifty = chosen("10,10,30", 300)
    assert [sum(a <= i < a + 100 for i in fifty) for a in (0, 100, 200)] == [10, 10, 30]
    assert chosen("5") == [0, 250, 500, 749, 999]  # a tie is rounded by the running sum
    for bad in ("", "0", "a", "10,", "1001", "ddim10,10", "600,10", "ddim0", "10,0,10", "334,334,333"):
        with pytest.raises(ValueError, match="respacing"):
            diffusion.respaced(bad)


@pytest.mark.filterwarnings("ignore:respacing")
def test_ddim_respacing_is_an_integer_stride_or_is_refused_with_the_nearest_that_are():
    works = {len(range(0, 1000, stride)): stride for stride in range(999, 0, -1)}
    assert len(works) == 62
    for count in range(1, 1100):
        if count in works:
            assert chosen(f"ddim{count}") == list(range(0, 1000, works[count]))
        else:
            with pytest.raises(ValueError, match=r"ddim[0-9]+ and ddim[0-9]+ work") as error:
                diffusion.respaced(f"ddim{count}")
            near = [abs(int(n) - count) for n in re.findall("ddim([0-9]+)", str(error.value))[1:]]
            assert near == sorted(abs(n - count) for n in works)[:2]
    with pytest.raises(ValueError, match="ddim500 and ddim334"):
        diffusion.respaced("ddim430")


def test_a_respacing_that_does_not_start_from_noise_warns():
    for spec, steps in (("ddim3", 1000), ("1", 1000), ("ddim9", 1000)):
        with pytest.warns(UserWarning, match=f"respacing {spec} starts at t = 0"):
            diffusion.respaced(spec, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spec in ("2", "250", "ddim10", "ddim25", "10,10,20"):
            diffusion.respaced(spec)


# Targets, weights, losses --------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("flow", [False, True])
def test_targets_round_trip_in_float32_for_logsnr_between_minus_and_plus_20(prediction, flow):
    schedule = diffusion.Schedule(lambda t: 20 - 40 * t, flow=flow)
    t = torch.linspace(0, 1, 201)
    x0, eps = gaussian(torch.arange(201), (64,)), gaussian(torch.arange(201) + 999, (64,))
    alpha, sigma = (expand(c, x0) for c in schedule.alpha_sigma(t))
    x_t = alpha * x0 + sigma * eps
    output = target(x0, eps, alpha, sigma, prediction)
    x0_back, eps_back = diffusion.x0_eps(output, x_t, alpha, sigma, prediction)
    rounding = 1e-6  # float32 of x_t, times the conditioning of the target
    loss_x0 = {"eps": sigma / alpha}.get(prediction, torch.ones(1))
    loss_eps = {"x0": alpha / sigma}.get(prediction, torch.ones(1))
    assert ((x0_back - x0).abs() <= rounding * (1 + loss_x0)).all()
    assert ((eps_back - eps).abs() <= rounding * (1 + loss_eps)).all()
    again = target(x0_back, eps_back, alpha, sigma, prediction)
    torch.testing.assert_close(again, output, atol=5e-6, rtol=0)


def off_by(delta, x0, prediction, schedule):
    """A network whose x0 is wrong by delta, whatever it predicts."""
    def model(x_t, t):
        alpha, sigma = levels(schedule, t, x_t)
        guess = x0 + delta
        return target(guess, (x_t - alpha * guess) / sigma, alpha, sigma, prediction)
    return model


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_weights_mean_the_same_on_x0_for_every_target(weight, name):
    schedule = schedule_of(name)
    t = torch.linspace(0.02, 0.98, 33, dtype=F64)
    x0, eps = (gaussian(torch.arange(33) + k, (1, 4, 4)).double() for k in (0, 500))
    delta = 0.1 * gaussian(torch.arange(33) + 900, (1, 4, 4)).double()
    results = {}
    for prediction in PREDICTIONS:
        config = DiffusionConfig(schedule=name, prediction=prediction, loss_weight=weight)
        model = off_by(delta, x0, prediction, schedule)
        results[prediction] = diffusion.losses(model, x0, eps, t, schedule, config)
    x0_error, snr = delta.square().flatten(1).mean(1), torch.exp(schedule.logsnr(t))
    for weighted, raw in results.values():
        torch.testing.assert_close(raw, ((x0 + delta).clamp(-1, 1) - x0).square().flatten(1).mean(1),
                                   rtol=1e-4, atol=1e-7)
        if weight != "uniform":
            torch.testing.assert_close(weighted, results["x0"][0], rtol=1e-4, atol=1e-7)
    if weight == "min_snr":
        torch.testing.assert_close(results["v"][0], snr.clamp(max=5) * x0_error, rtol=1e-4, atol=1e-7)
    if weight == "uniform":
        torch.testing.assert_close(results["eps"][0], snr * x0_error, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_raw_loss_is_bounded_at_both_ends_whatever_is_predicted(prediction, name):
    """A prediction that is wrong by a hundredth of its unit: no end explodes, and the clean one is exact."""
    schedule = schedule_of(name)
    x0, eps = gaussian(torch.arange(64), (3, 8, 8)).clamp(-1, 1), gaussian(torch.arange(64) + 99, (3, 8, 8))
    t = torch.linspace(0, 1, 64)

    def wrong(x_t, t):
        return target(x0, eps, *(expand(c, x0) for c in schedule.alpha_sigma(t)), prediction) + 0.01

    raw = diffusion.losses(wrong, x0, eps, t, schedule, DiffusionConfig(prediction=prediction))[1]
    assert raw.max() <= (4 if prediction == "eps" else 1.1e-4 * 4)
    assert raw.min() >= 0
    assert raw[0] < 1.1e-4
    zero = diffusion.losses(lambda x_t, t: 0 * x_t, x0, eps, t, schedule, DiffusionConfig(prediction="x0"))[1]
    torch.testing.assert_close(zero, x0.square().flatten(1).mean(1))


def test_the_raw_loss_is_clipped_at_the_limit_of_the_space():
    schedule, config = schedule_of(), DiffusionConfig(prediction="x0")
    x0, eps = torch.full((2, 1, 2, 2), 3.0), torch.zeros(2, 1, 2, 2)
    for limit, guess in ((1.0, 1.0), (4.0, 4.0), (None, 9.0)):
        raw = diffusion.losses(lambda x_t, t: 9 + 0 * x_t, x0, eps, torch.full((2,), 0.5), schedule, config,
                               limit=limit)[1]
        assert torch.equal(raw, torch.full((2,), (guess - 3) ** 2))


def test_sigmoid_weight_does_not_depend_on_the_schedule():
    total = []
    for name in ("cosine", "flow"):
        schedule, t = schedule_of(name), (torch.arange(20000, dtype=F64) + 0.5) / 20000
        weight = diffusion.x0_weight(t, schedule, DiffusionConfig(schedule=name, loss_weight="sigmoid"))
        total.append((weight * torch.exp(-schedule.logsnr(t)) * torch.exp(-schedule.logsnr(t) ** 2)).mean())
    torch.testing.assert_close(*total, rtol=1e-4, atol=0)


def test_uncertainty_learns_the_logarithm_of_the_loss():
    schedule, head = schedule_of(), diffusion.Uncertainty()
    t = diffusion.stratify(torch.full((64,), 0.5), torch.arange(64), 64)
    x0 = gaussian(torch.arange(64), (3, 8, 8))
    zero = lambda x_t, t: torch.zeros_like(x_t)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    learned = DiffusionConfig(loss_weight="learned")
    plain, _ = diffusion.losses(zero, 0.3 * x0, x0.flip(0), t, schedule, DiffusionConfig())
    first = None
    for _ in range(400):
        loss, _ = diffusion.losses(zero, 0.3 * x0, x0.flip(0), t, schedule, learned)
        assert torch.equal(loss, plain)  # Importance takes it before u turns its preference round
        weighted = head.weigh(loss, schedule.logsnr(t))
        first = weighted if first is None else first
        optimizer.zero_grad()
        weighted.mean().backward()
        optimizer.step()
    torch.testing.assert_close(first, plain)  # it starts as the plain loss
    assert (head(schedule.logsnr(t)) - plain.log()).abs().mean() < 0.1
    torch.testing.assert_close(weighted, 1 + plain.log(), atol=0.3, rtol=0)


def test_loss_buckets_sum_to_the_whole():
    t = diffusion.stratify(torch.rand(256), torch.arange(256), 256)
    total, count = diffusion.loss_buckets(t, schedule_of().logsnr(t))
    assert count.tolist() == [32] * 8
    torch.testing.assert_close(total.sum(), t.sum())
    torch.testing.assert_close(total / count, (torch.arange(8) + 0.5) / 8, atol=2e-3, rtol=0)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "log_normal"])
def test_t_densities_have_their_quantiles(density):
    config, schedule = DiffusionConfig(t_density=density, t_mean=-0.4, t_std=0.9), schedule_of("cosine", 128)
    u = (torch.arange(1000) + 0.5) / 1000
    t = diffusion.draw_t(u, config, schedule)
    assert t.dtype == torch.float32
    assert (t.diff() > 0).all()
    assert t.min() >= 0
    assert t.max() <= 1
    expected = {"uniform": 0.5, "logit_normal": torch.sigmoid(torch.tensor(-0.4)).item(),
                "log_normal": schedule.inverse(torch.tensor([0.8 + schedule.shift])).item()}[density]
    assert t.median().item() == pytest.approx(expected, abs=2e-3)
    ends = diffusion.draw_t(torch.tensor([0.0, 1 - 2**-24]), config, schedule)
    assert ends.isfinite().all()


def test_importance_draws_where_the_loss_is_and_stays_unbiased():
    importance = diffusion.Importance()
    u = (torch.arange(4000) + 0.5) / 4000
    t, weight = importance.draw(u)
    torch.testing.assert_close(t, u, atol=1e-5, rtol=0)
    for _ in range(50):
        t, weight = importance.draw(u)
        importance.update(*diffusion.bucket_sums((1 + 9 * t**2) ** 2, t, 100))
    assert (weight * t**2).mean().item() == pytest.approx(1 / 3, abs=1e-3)
    assert weight.mean().item() == pytest.approx(1, abs=1e-3)
    assert (1 / weight[t > 0.99]).mean().item() == pytest.approx(9.9 / 4, rel=0.03)
    state = importance.second_moment.clone()
    importance.update(torch.zeros(100), torch.zeros(100))
    assert torch.equal(state, importance.second_moment)


def test_importance_starts_from_the_first_losses_and_evenly_until_all_are_known():
    importance, u = diffusion.Importance(), (torch.arange(400) + 0.5) / 400
    half = u[:200]
    importance.update(*diffusion.bucket_sums((0.01 + half) ** 2, half, 100))
    torch.testing.assert_close(importance.draw(u)[0], u, atol=1e-5, rtol=0)   # half has no loss yet
    importance.update(*diffusion.bucket_sums((0.01 + u[200:]) ** 2, u[200:], 100))
    t, weight = importance.draw(u)
    centre = (torch.arange(100) + 0.5) / 100
    torch.testing.assert_close(importance.second_moment.sqrt(), 0.01 + centre, atol=1e-3, rtol=0)
    assert (1 / weight[t > 0.99]).mean().item() == pytest.approx(1.005 / 0.51, rel=0.02)
    importance.update(*diffusion.bucket_sums(torch.full((400,), 9.0), u, 100))
    gone = 0.98**4  # of four losses in each part
    torch.testing.assert_close(importance.second_moment, (0.01 + centre) ** 2 * gone + 9 * (1 - gone),
                               atol=1e-2, rtol=0)


# Learned variance and likelihood -------------------------------------------------------------------------


def product_grid(n=48):
    """x0 and eps as a product of quantiles, of variance 1: means over it are integrals."""
    z = quantiles(n)
    z = z / z.std(unbiased=False)
    return z.repeat_interleave(n).view(1, 1, n, n).float(), z.repeat(n).view(1, 1, n, n).float()


def step_bits(schedule, s, t, fraction, std):
    """E[KL(q || p)] of one step for x0 ~ N(0, std^2) and the optimal denoiser, in float64 scalars."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (
        [c.item() for c in schedule.alpha_sigma(torch.tensor(v, dtype=F64))] for v in (s, t))
    forward = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
    small = forward * sigma_s**2 / sigma_t**2
    var = small ** (1 - fraction) * forward**fraction
    miss = (alpha_s * forward / sigma_t**2) ** 2 * std**2 * sigma_t**2 / (alpha_t**2 * std**2 + sigma_t**2)
    return 0.5 * (math.log(var / small) + (small + miss) / var - 1) / math.log(2)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_hybrid_loss_equals_the_integral_over_a_gaussian(fraction):
    schedule, std = schedule_of("linear"), 0.5
    denoise, (z, eps) = gauss_denoiser(schedule, 0.0, std), product_grid(160)

    def model(x_t, t):
        alpha, sigma = levels(schedule, t, x_t)
        x0 = denoise(x_t, t)
        v = target(x0, (x_t - alpha * x0) / sigma, alpha, sigma, "v")
        return torch.cat([v, torch.full_like(v, 2 * fraction - 1)], 1)

    for t in (0.05, 0.3, 0.7):
        args = std * z, eps, torch.tensor([t]), schedule
        plain = diffusion.losses(model, *args, DiffusionConfig(schedule="linear"))[0]
        hybrid = diffusion.losses(model, *args, DiffusionConfig(schedule="linear", learn_sigma=True))[0]
        expected = step_bits(schedule, t - 0.001, t, fraction, std)
        assert (hybrid - plain).item() == pytest.approx(expected, abs=1e-3)


def test_hybrid_loss_trains_the_variance_only_and_is_finite_everywhere():
    schedule, config = schedule_of(), DiffusionConfig(learn_sigma=True)
    t = torch.tensor([0.0, 1e-6, 1e-3, 0.5, 1.0])
    x0, eps = gaussian(torch.arange(5), (3, 4, 4)).clamp(-1, 1), gaussian(torch.arange(5) + 7, (3, 4, 4))
    output = torch.zeros(5, 6, 4, 4, requires_grad=True)
    weighted, _ = diffusion.losses(lambda x_t, t: output, x0, eps, t, schedule, config)
    grad = torch.autograd.grad(weighted.sum(), output)[0]
    assert grad.isfinite().all()
    assert weighted.isfinite().all()
    assert (grad[:, 3:] != 0).any()
    plain = torch.autograd.grad(
        diffusion.losses(lambda x_t, t: output, x0, eps, t, schedule, DiffusionConfig())[0].sum(), output)[0]
    torch.testing.assert_close(grad[:, :3], plain[:, :3])


@pytest.mark.parametrize("kind", ["uniform", "interpolated"])
def test_learned_variance_and_likelihood_are_finite_on_every_schedule(kind):
    t = torch.cat([torch.linspace(0, 1, 401), torch.tensor([1e-7, 1e-5, 0.9999, 0.99999])])
    x0, eps = (gaussian(torch.arange(len(t)) + k, (1, 2, 2)) for k in (0, 7))
    config = DiffusionConfig(learn_sigma=True)
    for schedule in every_schedule(kind):
        output = torch.zeros(len(t), 2, 2, 2, requires_grad=True)
        loss = diffusion.losses(lambda x_t, t: output, x0.clamp(-1, 1), eps, t, schedule, config)[0]
        assert loss.isfinite().all(), schedule
        assert torch.autograd.grad(loss.sum(), output)[0].isfinite().all(), schedule
        noise, denoise = diffusion.noise_source(torch.arange(4), (1, 2, 2)), gauss_denoiser(schedule)
        for times in (even(20), even(20, 0.5), sampling_times(schedule, 50)):
            bits = diffusion.nll(denoise, x0[:4].clamp(-1, 1), times, noise, schedule)
            assert bits.isfinite().all(), schedule


def test_the_decoder_keeps_its_tails_and_their_slope():
    x0, half = torch.tensor([0.1, 0.5, -0.3, 1.0, -1.0]), 1 / 255
    for std, miss in ((1 / 255, 7.0), (0.01, 5.0), (0.05, 3.0), (0.5, 0.0), (1e-4, 0.5), (0.003, 20.0)):
        for sign in (1, -1):
            mean = (x0 + sign * miss * std).requires_grad_()
            bits = diffusion.decoder_bits(x0, mean, torch.full_like(x0, 2 * math.log(std)))
            low, high = ((x0.double() - mean.double() + k) / std for k in (-half, half))
            low[4], high[3] = -math.inf, math.inf
            mirror = low > 0
            low, high = torch.where(mirror, -high, low), torch.where(mirror, -low, high)
            lower, upper = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
            exact = -(upper + torch.log1p(-torch.exp(lower - upper))) / math.log(2)
            torch.testing.assert_close(bits.double(), exact.detach(), rtol=2e-3, atol=2e-3)
            slope = torch.autograd.grad(bits.sum(), mean)[0]
            assert slope.isfinite().all()
            if miss * std > 1.2 * half:
                outwards = slope[:3] * sign
                assert (outwards > 0).all()
    log_var = torch.full((1,), -2 * math.log(255))
    at_six = diffusion.decoder_bits(torch.zeros(1), torch.full((1,), 7 / 255), log_var)
    assert at_six.item() == pytest.approx(-math.log2(9.866e-10 - 6.2e-16), abs=1e-3)        # 29.9 bits


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_nll_equals_the_integral_over_a_gaussian(fraction):
    schedule, std, steps = schedule_of("cosine"), 0.2, 100
    z, eps = product_grid(160)
    times = even(steps)
    denoise = gauss_denoiser(schedule, 0.0, std)
    bits = diffusion.nll(denoise, std * z, times, lambda i: eps, schedule, fraction)
    alpha, sigma = schedule.alpha_sigma(torch.tensor(1.0, dtype=F64))
    expected = 0.5 * ((alpha * std) ** 2 + sigma**2 - 1 - 2 * sigma.log()).item() / math.log(2)
    for t, s in zip(times[:-2].tolist(), times[1:-1].tolist()):
        expected += step_bits(schedule, s, t, fraction, std)
    # the decoder, integrated in float64: x0 given x_t is normal, and p is normal around its mean
    last, before = times[-2].item(), times[-3].item()
    (alpha, sigma), (alpha_2, sigma_2) = (
        [c.item() for c in schedule.alpha_sigma(torch.tensor(v, dtype=F64))] for v in (last, before))
    forward = sigma_2**2 - (alpha_2 / alpha) ** 2 * sigma**2
    var = (forward * sigma**2 / sigma_2**2) ** (1 - fraction) * sigma ** (2 * fraction)
    spread = std * sigma / math.sqrt(alpha**2 * std**2 + sigma**2)
    u = quantiles(20001)
    low, high = ((u * spread + k / 255) / math.sqrt(var) for k in (-1, 1))
    expected += -torch.log2(torch.special.ndtr(high) - torch.special.ndtr(low)).mean().item()
    assert bits.item() == pytest.approx(expected, abs=1e-3)


def test_nll_is_near_the_entropy_of_quantised_data():
    schedule, std = schedule_of("cosine"), 0.2
    x0 = (gaussian(torch.arange(16), (3, 32, 32)) * std).clamp(-1, 1)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    noise = diffusion.noise_source(torch.arange(16), (3, 32, 32))
    logsnr = torch.linspace(-8, 8, 300, dtype=F64)  # steps equal in t, doubling the noise, waste 2 bits
    times = torch.cat([torch.ones(1), schedule.inverse(logsnr), torch.zeros(1)])
    bits = diffusion.nll(gauss_denoiser(schedule, 0.0, std), x0, times, noise, schedule).mean().item()
    entropy = math.log2(std * 127.5 * math.sqrt(2 * math.pi * math.e))
    assert entropy - 0.01 < bits < entropy + 0.15


# Samplers: exact answers ---------------------------------------------------------------------------------


def correlated(schedule, n=192):
    """Gaussian data of 3x8x8 with a full covariance: its denoiser, mean and covariance."""
    basis, _ = torch.linalg.qr(gaussian(torch.arange(n), (n,)).double())
    var, mean = torch.logspace(-3, 0, n, dtype=F64), torch.linspace(-0.5, 0.5, n, dtype=F64)

    def denoise(x_t, t):
        alpha, sigma = levels(schedule, t, x_t.flatten(1))
        miss = (x_t.flatten(1) - alpha * mean) @ basis
        return (mean + (alpha * var / (alpha**2 * var + sigma**2) * miss) @ basis.T).view_as(x_t)

    return denoise, mean, basis * var @ basis.T


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "prk", "plms", "dpmpp_2m", "unipc"])
def test_deterministic_samplers_reproduce_mean_and_covariance(name):
    """On Gaussian data a sampler is an affine map of its noise, so its images of a basis tell."""
    schedule = schedule_of("cosine")
    denoise, mean, covariance = correlated(schedule)
    start = torch.cat([torch.zeros(1, 192, dtype=F64), torch.eye(192, dtype=F64)]).view(-1, 3, 8, 8)
    out = SAMPLERS[name](denoise, start, even(200), None, schedule).flatten(1)
    matrix = out[1:] - out[0]
    tolerance = 2e-2 if name in ("ddim", "euler") else 3e-3
    torch.testing.assert_close(out[0], mean, atol=tolerance, rtol=0)
    torch.testing.assert_close(matrix.T @ matrix, covariance, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "dpmpp_2m_sde"])
def test_stochastic_samplers_reproduce_mean_and_covariance(name):
    schedule = schedule_of("cosine")
    denoise, mean, covariance = correlated(schedule)
    noise = diffusion.noise_source(torch.arange(2000), (3, 8, 8))
    out = SAMPLERS[name](denoise, gaussian(torch.arange(2000), (3, 8, 8)).double(), even(60),
                         lambda i: noise(i).double(), schedule).flatten(1)
    assert (out.mean(0) - mean).abs().max() < 0.1
    error = (torch.cov(out.T) - covariance).norm() / covariance.norm()
    exact_draw = gaussian(torch.arange(2000) + 10**6, (192,)).double() @ torch.linalg.cholesky(covariance).T
    floor = (torch.cov(exact_draw.T) - covariance).norm() / covariance.norm()
    assert error < 1.3 * floor + 0.05


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("schedule_name", ["cosine", "flow", "linear"])
def test_every_sampler_draws_a_mixture_of_two_in_float32(name, schedule_name):
    schedule = schedule_of(schedule_name)
    x, noise = gaussian(torch.arange(4000), (1,)), diffusion.noise_source(torch.arange(4000), (1,))
    out = SAMPLERS[name](mixture_denoiser(schedule), x, even(101), noise, schedule)
    mean, var = 0.06, 0.4 * (0.36 + 0.0225) + 0.6 * (0.25 + 0.0625) - 0.06**2
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert out.mean().item() == pytest.approx(mean, abs=0.04)
    assert out.std().item() == pytest.approx(math.sqrt(var), abs=0.03)
    assert (out < 0).float().mean().item() == pytest.approx(0.4 + 0.6 * 0.0228, abs=0.03)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_draws_a_mixture_of_two_pictures(name):
    """Of 3x8x8, where all pixels together decide which of the two it is: shares, mean and covariance."""
    schedule, n, std, share = schedule_of(), 1000, 0.2, 0.3
    centres = 0.25 * gaussian(torch.arange(2) + 7, (192,))
    log_share = torch.tensor([share, 1 - share]).log()

    def denoise(x_t, t):
        flat = x_t.flatten(1)
        alpha, sigma = levels(schedule, t, flat)
        var = alpha**2 * std**2 + sigma**2
        gain = alpha * std**2 / var                            # |x_t|^2 is the same for both, and left out
        near = alpha * (flat @ centres.T - 0.5 * alpha * centres.square().sum(1)) / var
        centre = torch.softmax(log_share + near, 1) @ centres
        return (gain * flat + (1 - gain * alpha) * centre).view_as(x_t)

    x, noise = gaussian(torch.arange(n), (3, 8, 8)), diffusion.noise_source(torch.arange(n), (3, 8, 8))
    out = SAMPLERS[name](denoise, x, even(100), noise, schedule).flatten(1)
    first = (out[:, None] - centres).norm(dim=2).argmin(1) == 0
    assert first.float().mean().item() == pytest.approx(share, abs=0.05)
    for mode, centre in ((first, centres[0]), (~first, centres[1])):
        assert (out[mode].mean(0) - centre).norm() < 0.15 * (centres[0] - centres[1]).norm()
        assert out[mode].std(0).mean().item() == pytest.approx(std, rel=0.09)
        spread = torch.linalg.eigvalsh(torch.cov(out[mode].T)).flip(0)[0] / std**2        # of pure noise
        edge = (1 + math.sqrt(192 / mode.sum().item())) ** 2                              # Marchenko-Pastur
        assert spread < 1.2 * edge


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_end_at_a_clean_picture_for_every_step_count(name):
    schedule = schedule_of()
    x, noise = gaussian(torch.arange(4), (3, 4, 4)), diffusion.noise_source(torch.arange(4), (3, 4, 4))
    for steps in (1, 2, 3, 4, 5, 8, 13):
        seen = []
        denoise = lambda x_t, t: seen.append(t.clone()) or torch.full_like(x_t, 0.25)
        out = SAMPLERS[name](denoise, x, even(steps), noise, schedule)
        torch.testing.assert_close(out, torch.full_like(x, 0.25), atol=2e-6, rtol=0)
        assert all(t.shape == () and t > 0 for t in seen)  # never called where eps has no meaning


def slope(name, grid, steps, schedule):
    """The order by which the error of the mixture falls with the steps; the errors."""
    x, denoise = torch.linspace(-2.5, 2.5, 101, dtype=F64)[:, None], mixture_denoiser(schedule)
    reference = carried(schedule, grid(steps[0]), x)
    error = [(SAMPLERS[name](denoise, x, grid(n), None, schedule) - reference).square().mean().sqrt().item()
             for n in steps]
    return math.log2(error[-2] / error[-1]) / math.log2(steps[-1] / steps[-2]), error


@pytest.mark.parametrize(("name", "order"), [
    ("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2), ("plms", 4), ("prk", 4)])
def test_error_falls_with_the_order_of_the_sampler(name, order):
    """Steps equal in sigma / alpha between two inner times, where plms is a true Adams-Bashforth method."""
    schedule = schedule_of("cosine")
    grid = lambda n: schedule.inverse(-2 * torch.log(torch.linspace(3, 0.1, n + 1, dtype=F64)))
    steps = (40, 80) if name == "prk" else (240, 480)
    measured, _ = slope(name, grid, steps, schedule)
    gain = 1 if name == "unipc" else 0  # its corrector
    assert order - 0.25 < measured < order + gain + 0.3


@pytest.mark.parametrize(("name", "order"), [
    ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2), ("prk", 2)])
@pytest.mark.parametrize("schedule_name", ["cosine", "flow", "edm"])
def test_order_survives_both_ends(name, order, schedule_name):
    """From pure noise to exactly t = 0 no sampler falls below min(its order, 2), but for the logarithms of
    multi-step methods where the first steps double the noise level."""
    measured, error = slope(name, even, (200, 400), schedule_of(schedule_name))
    log_terms = name in ("dpmpp_2m", "unipc") and schedule_name != "edm"
    floor_reached = error[-1] < 1e-5
    assert floor_reached or measured > order - (0.6 if log_terms else 0.15)


def test_plms_at_50_evaluations_is_50_times_nearer_than_ddim():
    schedule = schedule_of("cosine")
    x = torch.linspace(-2.5, 2.5, 101, dtype=F64)[:, None]
    for toy in (MIXTURE, ((0.3,), (0.5,), (1.0,))):
        denoise, exact = mixture_denoiser(schedule, *toy), carried(schedule, even(50), x, *toy)
        plms, ddim = (SAMPLERS[name](denoise, x, even(50), None, schedule) - exact
                      for name in ("plms", "ddim"))
        assert ddim.norm() > 50 * plms.norm()


def test_ddim_with_eta_1_has_the_variance_of_ddpm():
    """DDIM's mean and variance of a step are those of the posterior q(x_s | x_t, x0)."""
    schedule = schedule_of("linear")
    s, t = torch.tensor([0.4, 0.8, 0.001], dtype=F64), torch.tensor([0.5, 1.0, 0.01], dtype=F64)
    of_x0, of_x_t, small, large = diffusion.posterior(schedule, s, t)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.alpha_sigma(s), schedule.alpha_sigma(t)
    fresh = sigma_s / sigma_t * torch.sqrt(1 - alpha_t**2 / alpha_s**2)  # 2010.02502, eq. 16
    torch.testing.assert_close(fresh**2, small.exp())
    torch.testing.assert_close(of_x_t, torch.sqrt(sigma_s**2 - fresh**2) / sigma_t)
    torch.testing.assert_close(of_x0, alpha_s - torch.sqrt(sigma_s**2 - fresh**2) * alpha_t / sigma_t)
    torch.testing.assert_close(large.exp(), sigma_t**2 - alpha_t**2 / alpha_s**2 * sigma_s**2)


@pytest.mark.parametrize("size", [64, 1024])
def test_churn_draws_the_same_distribution_with_fresh_noise(size):
    schedule = schedule_of("cosine", size, size_shift="interpolated")
    x, noise = gaussian(torch.arange(4000), (1,)).double(), diffusion.noise_source(torch.arange(4000), (1,))
    ends = []
    for churn in (0.0, 5.0, 1e9):
        out = diffusion.heun(mixture_denoiser(schedule), x, sampling_times(schedule, 100),
                             lambda i: noise(i).double(), schedule, churn=churn)
        var = 0.4 * (0.36 + 0.0225) + 0.6 * (0.25 + 0.0625) - 0.06**2
        assert out.mean().item() == pytest.approx(0.06, abs=0.04)
        assert out.std().item() == pytest.approx(math.sqrt(var), abs=0.03)
        assert (out < 0).double().mean().item() == pytest.approx(0.4 + 0.6 * 0.0228, abs=0.03)
        ends.append(out)
    for churned in ends[1:]:
        assert torch.corrcoef(torch.cat([ends[0], churned], 1).T)[0, 1] < 0.9
    still = diffusion.heun(mixture_denoiser(schedule), x, sampling_times(schedule, 100), None, schedule)
    assert torch.equal(still, ends[0])                                      # no noise is drawn


def test_churn_is_the_published_step_back():
    """In sigma / alpha each level is raised by 1 + min(churn / N, sqrt 2 - 1) (2206.00364, algorithm 2)."""
    schedule, seen, times = schedule_of("cosine"), [], sampling_times(schedule_of("cosine"), 10)
    denoise = lambda x_t, t: seen.append(t) or 0.5 * x_t
    for churn, gamma in ((2.0, 0.2), (1e9, math.sqrt(2) - 1)):
        seen.clear()
        diffusion.heun(denoise, torch.ones(1, 1, dtype=F64), times, lambda i: 0, schedule, churn=churn)
        raised = torch.stack([t for t in seen if (t - times).abs().min() > 1e-12])
        assert len(raised) == 9                                             # t = 1 is not raised
        expected = schedule.logsnr(times[1:-1]) - 2 * math.log1p(gamma)
        torch.testing.assert_close(schedule.logsnr(raised), expected)


def test_a_sample_does_not_depend_on_its_neighbours():
    schedule, keys = schedule_of(), torch.arange(6)
    for name, sampler in SAMPLERS.items():
        run = lambda k: sampler(mixture_denoiser(schedule), gaussian(k, (3, 4, 4)), even(6),
                                diffusion.noise_source(k, (3, 4, 4)), schedule)
        torch.testing.assert_close(run(keys)[2:5], run(keys[2:5]), atol=1e-6, rtol=0, msg=name)


# Times of a sampler --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", list(GRIDS))
def test_times_fall_from_the_start_to_exactly_0_over_a_level_that_eight_bits_do_not_show(grid):
    for schedule in every_schedule():
        for steps, start, shift in ((1, 1.0, 1.0), (2, 1.0, 1.0), (25, 1.0, 3.0), (25, 1.0, 0.3),
                                    (9, 0.01, 1.0), (400, 1.0, 1.0)):
            times = sampling_times(schedule, steps, grid, start, shift)
            assert times.dtype == F64
            assert times.shape == (steps + 1,)
            assert (times[0], times[-1]) == (start, 0)
            assert (times.diff() < 0).all(), (schedule, steps, start, shift)
            logsnr = schedule.logsnr(times)
            assert (logsnr.diff() > 0).all(), (schedule, steps, start, shift)
            reached = logsnr[-2] > 2 * math.log(255)                        # half a step of eight bits
            lost = schedule.logsnr(torch.tensor(1e-7, dtype=F64)) < 2 * math.log(255)  # edm, shifted evenly
            assert reached or lost or steps == 1


def test_each_grid_is_even_in_what_it_says():
    schedule = schedule_of("cosine", 256, size_shift="interpolated")
    for grid, of in (("uniform", lambda t: t), ("logsnr", schedule.logsnr),
                     ("karras", lambda t: torch.exp(-schedule.logsnr(t) / 14))):
        inner = of(sampling_times(schedule, 20, grid)[1:-1])
        torch.testing.assert_close(inner.diff(), inner.diff()[:1].expand(18), rtol=1e-6, atol=1e-9)
    for steps in (20, 25):
        assert torch.equal(sampling_times(schedule, steps), sampling_times(schedule, steps, "logsnr"))
    for steps in (3, 12, 19):
        few = sampling_times(schedule, steps, "uniform", shift=0.5)
        assert torch.equal(sampling_times(schedule, steps), few)
    half = sampling_times(schedule, 21)[10]
    assert sampling_times(schedule, 21, shift=3.0)[10] > half > sampling_times(schedule, 21, shift=0.3)[10]
    flow = schedule_of("flow")
    t = sampling_times(flow, 20, "uniform")[1:-2]
    shifted = sampling_times(flow, 20, "uniform", shift=3.0)[1:-2]     # Stable Diffusion 3: 3 t / (1 + 2 t)
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["uniform", "interpolated"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(ORDERS))
def test_detail_survives_25_steps_at_every_size(name, size, kind):
    """What is left of the amplitude of Gaussian detail of deviation 0.05, with the exact denoiser."""
    for schedule_name in SCHEDULES:
        schedule = schedule_of(schedule_name, size, size_shift=kind)
        if schedule.logsnr(torch.zeros(1)) < 2 * math.log(255):
            continue                                                        # edm, shifted evenly, lost it
        noise = diffusion.noise_source(torch.arange(1), (4000,))
        x = quantiles(4000)[torch.randperm(4000, generator=torch.Generator().manual_seed(0))][None]
        denoise = gauss_denoiser(schedule, 0.0, 0.05)
        out = SAMPLERS[name](denoise, x, sampling_times(schedule, 25), lambda i: noise(i).double(), schedule)
        assert 0.93 < out.std().item() / 0.05 < 1.07, schedule_name


def test_the_default_grid_suits_every_sampler_better_than_even_times():
    """Error of 25 steps of the mixture and of the amplitude of detail, at 64 and 1024 pixels."""
    x = torch.linspace(-2.5, 2.5, 101, dtype=F64)[:, None]
    for name in ("dpmpp_2m", "unipc", "heun", "plms", "ddim"):
        for schedule_name, size in (("cosine", 64), ("cosine", 1024), ("scaled_linear", 64)):
            schedule = schedule_of(schedule_name, size, size_shift="interpolated")
            denoise, fine = mixture_denoiser(schedule), gauss_denoiser(schedule, 0.0, 0.05)
            reference = carried(schedule, even(1), x)
            error, detail = [], []
            for grid in GRIDS:
                times = sampling_times(schedule, 25, grid)
                out = SAMPLERS[name](denoise, x, times, None, schedule)
                error.append((out - reference).square().mean().sqrt().item())
                sharp = SAMPLERS[name](fine, torch.ones(1, 1, dtype=F64), times, None, schedule)
                detail.append(abs(math.log(sharp.item() / 0.05)))
            uniform, logsnr, karras = detail
            assert logsnr < min(uniform, karras), (name, schedule_name, size)
            if name in ("dpmpp_2m", "unipc"):
                assert error[1] < min(error[0], error[2]), (name, schedule_name, size)
            limit = {"dpmpp_2m": 0.014, "unipc": 0.006, "heun": 0.025, "plms": 0.007, "ddim": 0.07}[name]
            assert error[1] < limit, (name, schedule_name, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["ddim", *(n for n in ORDERS if n != "dpmpp_2m_sde")])
def test_order_is_kept_on_shifted_schedules_on_every_grid(name, size):
    """From pure noise to t = 0, but for the logarithm by which both ends move out with the steps."""
    schedule = schedule_of("cosine", size, size_shift="interpolated")
    for grid in GRIDS:
        times = lambda n, grid=grid: sampling_times(schedule, n, grid)
        measured, error = slope(name, times, (100, 200), schedule)
        order = 2 if name in ORDERS else 1
        assert measured > order - 0.36 or error[-1] < 1e-6, grid


# The published implementations ---------------------------------------------------------------------------

KINDS = {"linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
         "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}}


def oracle(name, **options):
    pytest.importorskip("diffusers")
    module = importlib.import_module("diffusers.schedulers")
    return getattr(module, name)(num_train_timesteps=1000, **options)


def leading(steps):
    """diffusers' default ("leading") timesteps k, as falling times (k + 1) / 1000 and 0."""
    return diffusion.respaced(f"ddim{steps}")


def run_oracle(scheduler, steps, x, schedule, denoise, variance_exploding=False, **options):
    """Its loop with our eps as the network; x and the result in our (variance preserving) scale."""
    if not options.pop("ready", False):
        scheduler.set_timesteps(steps)
    first = schedule.alpha_sigma(torch.tensor([(float(scheduler.timesteps[0]) + 1) / 1000], dtype=F64))[0]
    x = x / first if variance_exploding else x
    for timestep in scheduler.timesteps:
        t = ((timestep.double() + 1) / 1000).expand(len(x))
        alpha, sigma = levels(schedule, t, x)
        x_t = x * alpha if variance_exploding else x
        eps = (x_t - alpha * denoise(x_t, t)) / sigma
        x = scheduler.step(eps, timestep, x, **options).prev_sample
    return x


@pytest.fixture
def toy():
    return gaussian(torch.arange(8), (3, 8, 8)).double()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("zero_snr", [False, True])
def test_discrete_schedules_equal_those_published(kind, zero_snr):
    theirs = oracle("DDIMScheduler", rescale_betas_zero_snr=zero_snr, **KINDS[kind]).alphas_cumprod.double()
    schedule = schedule_of(kind, zero_snr=zero_snr)
    ours = schedule.alpha_sigma((torch.arange(1000, dtype=F64) + 1) / 1000)[0] ** 2
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    in_float32 = schedule.alpha_sigma((torch.arange(1000) + 1) / 1000)[0] ** 2
    torch.testing.assert_close(in_float32.double(), theirs, atol=2e-6, rtol=0)


def test_cosine_schedule_is_the_published_one_without_its_offset():
    scheduler = oracle("DDPMScheduler", beta_schedule="squaredcos_cap_v2")
    theirs = scheduler.alphas_cumprod[:990].double()  # its last betas are clipped
    t = ((torch.arange(-1, 990, dtype=F64) + 1) / 1000 + 0.008) / 1.008
    alpha = schedule_of("cosine").alpha_sigma(t)[0]
    torch.testing.assert_close((alpha[1:] / alpha[0]) ** 2, theirs, atol=1e-6, rtol=0)


def test_posterior_variances_equal_those_published():
    theirs = oracle("DDPMScheduler", **KINDS["linear"])
    t = (torch.arange(1000, dtype=F64) + 1) / 1000
    s = torch.arange(1000, dtype=F64) / 1000
    _, _, small, large = diffusion.posterior(schedule_of("linear"), s, t)
    expected = [theirs._get_variance(k, variance_type="fixed_small") for k in range(1000)]
    expected = torch.stack(expected).double()
    torch.testing.assert_close(small.exp()[1:], expected[1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(small[0], small[1])  # theirs clamps a zero instead
    torch.testing.assert_close(large.exp(), theirs.betas.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [8, 20, 50])
def test_ddim_and_euler_equal_those_published(toy, steps):
    schedule = schedule_of("scaled_linear")
    denoise = mixture_denoiser(schedule)
    ours = SAMPLERS["euler"](denoise, toy, leading(steps), None, schedule)
    ddim = oracle("DDIMScheduler", clip_sample=False, set_alpha_to_one=True, **KINDS["scaled_linear"])
    torch.testing.assert_close(run_oracle(ddim, steps, toy, schedule, denoise), ours, atol=1e-4, rtol=0)
    euler = oracle("EulerDiscreteScheduler", timestep_spacing="leading", **KINDS["scaled_linear"])
    theirs = run_oracle(euler, steps, toy, schedule, denoise, variance_exploding=True)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [10, 50])
def test_heun_equals_the_published_one(toy, steps):
    schedule = schedule_of("scaled_linear")
    denoise = mixture_denoiser(schedule)
    heun = oracle("HeunDiscreteScheduler", timestep_spacing="leading", **KINDS["scaled_linear"])
    theirs = run_oracle(heun, steps, toy, schedule, denoise, variance_exploding=True)
    ours = SAMPLERS["heun"](denoise, toy, leading(steps), None, schedule)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_multistep_solvers_equal_those_published(toy, steps, name):
    schedule = schedule_of("scaled_linear")
    denoise = mixture_denoiser(schedule)
    theirs = oracle({"dpmpp_2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}[name],
                    solver_order=2, timestep_spacing="leading", final_sigmas_type="zero",
                    **KINDS["scaled_linear"])
    theirs.set_timesteps(steps)
    times = torch.cat([(theirs.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=F64)])
    ours = SAMPLERS[name](denoise, toy, times, None, schedule)
    torch.testing.assert_close(run_oracle(theirs, steps, toy, schedule, denoise), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddpm small", "ddpm large", "ddim eta", "euler_ancestral", "dpmpp_2m_sde"])
def test_stochastic_samplers_equal_those_published(toy, name, monkeypatch):
    schedule, steps = schedule_of("linear"), 20
    denoise, source = mixture_denoiser(schedule), diffusion.noise_source(torch.arange(8), (3, 8, 8))
    noise, times = lambda i: source(i).double(), leading(steps)
    draws = iter(range(steps))
    theirs, module, ours = {
        "ddpm small": ("DDPMScheduler", "ddpm", SAMPLERS["ddpm"]),
        "ddpm large": ("DDPMScheduler", "ddpm", lambda *a: SAMPLERS["ddpm"](*a, variance=1.0)),
        "ddim eta": ("DDIMScheduler", "ddim", lambda *a: diffusion.ddim(*a, eta=0.6)),
        "euler_ancestral": ("EulerAncestralDiscreteScheduler", "euler_ancestral_discrete",
                            SAMPLERS["euler_ancestral"]),
        "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", "dpmsolver_multistep", SAMPLERS["dpmpp_2m_sde"]),
    }[name]
    options = {"ddpm small": {"clip_sample": False, "variance_type": "fixed_small"},
               "ddpm large": {"clip_sample": False, "variance_type": "fixed_large"},
               "ddim eta": {"clip_sample": False}, "euler_ancestral": {"timestep_spacing": "leading"},
               "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "leading"}}[name]
    scheduler = oracle(theirs, **KINDS["linear"], **options)
    if name == "dpmpp_2m_sde":
        scheduler.set_timesteps(steps)
        times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=F64)])
    monkeypatch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor",
                        lambda *a, **k: noise(next(draws)))
    eta = {"eta": 0.6} if name == "ddim eta" else {}
    exploding = name == "euler_ancestral"
    result = run_oracle(scheduler, steps, toy, schedule, denoise, variance_exploding=exploding, **eta)
    torch.testing.assert_close(result, ours(denoise, toy, times, noise, schedule), atol=1e-4, rtol=0)


def test_learned_variance_equals_the_published_one(toy, monkeypatch):
    schedule, steps = schedule_of("linear"), 20
    source, draws = diffusion.noise_source(torch.arange(8), (3, 8, 8)), iter(range(steps))
    noise = lambda i: source(i).double()
    denoise, head = mixture_denoiser(schedule), lambda x_t: torch.sin(3 * x_t)
    scheduler = oracle("DDPMScheduler", clip_sample=False, variance_type="learned_range", **KINDS["linear"])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor",
                        lambda *a, **k: noise(next(draws)))
    scheduler.set_timesteps(steps)
    x = toy
    for timestep in scheduler.timesteps:
        t = ((timestep.double() + 1) / 1000).expand(8)
        alpha, sigma = levels(schedule, t, x)
        eps = (x - alpha * denoise(x, t)) / sigma
        x = scheduler.step(torch.cat([eps, head(x)], 1), timestep, x).prev_sample
    seen = []
    remember = lambda x_t, t: seen.append(x_t) or denoise(x_t, t)
    ours = SAMPLERS["ddpm"](remember, toy, leading(steps), noise, schedule,
                            variance=lambda: (head(seen[-1]) + 1) / 2)
    torch.testing.assert_close(x, ours, atol=1e-4, rtol=0)


def test_plms_equals_the_published_one_after_its_start(toy):
    """Theirs starts with a doubled step: it gets our first three eps and goes on from the fourth level."""
    schedule, steps = schedule_of("scaled_linear"), 20
    denoise, times = mixture_denoiser(schedule), leading(steps)
    history = []

    def record(x_t, t):
        alpha, sigma = levels(schedule, t, x_t)
        history.append((x_t - alpha * denoise(x_t, t)) / sigma)
        return denoise(x_t, t)

    x = SAMPLERS["plms"](record, toy, times[:4], None, schedule)
    scheduler = oracle("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=True, **KINDS["scaled_linear"])
    scheduler.set_timesteps(steps)
    scheduler.ets, scheduler.counter = list(history), 4
    scheduler.timesteps = (times[3:-1] * 1000 - 1).round().long()
    theirs = run_oracle(scheduler, steps, x, schedule, denoise, ready=True)
    ours = SAMPLERS["plms"](denoise, toy, times, None, schedule)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


def test_flow_matching_equals_the_published_one(toy):
    scheduler = oracle("FlowMatchEulerDiscreteScheduler", shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.05, 20).tolist())
    schedule = schedule_of("flow", 192)
    denoise, times = mixture_denoiser(schedule), even(20)
    torch.testing.assert_close(schedule.alpha_sigma(times)[1], scheduler.sigmas.double(), atol=5e-5, rtol=0)
    x = toy
    for i, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = (expand(c, x) for c in schedule.alpha_sigma(times[i].expand(8)))
        x = scheduler.step((x - denoise(x, times[i].expand(8))) / sigma, timestep, x).prev_sample if i else \
            scheduler.step(x - denoise(x, times[i].expand(8)), timestep, x).prev_sample
    torch.testing.assert_close(x, SAMPLERS["euler"](denoise, toy, times, None, schedule), atol=1e-4, rtol=0)


# Around a known picture ----------------------------------------------------------------------------------


def recording(seen):
    """A network whose v is 0, with two planes of variance behind it."""
    def network(x_t, t, lowres, **condition):
        seen.update(x=x_t, lowres=lowres, **condition)
        return torch.cat([0 * x_t, torch.sin(x_t[:, :2])], 1)
    return network


def test_an_untrained_stage_says_the_picture_it_was_given():
    """Its guess is the linear one: for x0 normal around lowres, the error of v has the variance gain^2."""
    schedule, seen, n = schedule_of(), {}, 200
    small = gaussian(torch.arange(2), (3, 16, 16)).clamp(-1, 1)
    noise = gaussian(torch.arange(2) + 9, (3, 64, 64))
    network = diffusion.around(recording(seen), schedule, schedule)
    out = network(noise, torch.ones(2), lowres=small, lowres_t=torch.zeros(2))
    bicubic = torch.nn.functional.interpolate(small, (64, 64), mode="bicubic")
    alpha, sigma = schedule.alpha_sigma(torch.ones(2), noise)
    assert (out[:, :3] - (alpha * noise - sigma * bicubic)).abs().max() < 1e-5   # v of x0 = bicubic
    assert torch.equal(out[:, 3:], torch.sin(seen["x"][:, :2]))
    assert torch.equal(seen["lowres"], bicubic)
    for time, level in ((0.02, 0.0), (0.3, 0.4), (0.7, 0.1), (0.98, 0.6)):
        t, lowres_t = torch.tensor([time]), torch.tensor([level])
        below, detail, eps, other = gaussian(torch.arange(4) + 70, (1, 3, n, n))
        below = diffusion.PIXEL**0.5 * below
        x0 = below + diffusion.DETAIL**0.5 * detail
        lowres = diffusion.augmented(below, other, lowres_t, schedule)    # of its own size: not enlarged
        known = network(diffusion.noised(x0, eps, t, schedule), t, **lowres)[:, :3]
        alpha, sigma = schedule.alpha_sigma(t, x0)
        a, s = schedule.alpha_sigma(lowres_t, x0)
        left = diffusion.PIXEL * s**2 / (a**2 * diffusion.PIXEL + s**2) + diffusion.DETAIL
        gain = (left / (alpha**2 * left + sigma**2)).sqrt()
        assert seen["x"].std() == pytest.approx(1, abs=0.02)
        assert ((alpha * eps - sigma * x0 - known) / gain).std() == pytest.approx(1, abs=0.02)


def test_what_a_stage_learns_is_scaled_by_what_the_small_picture_leaves_open():
    schedule, condition = schedule_of(), {"lowres": torch.zeros(1, 3, 2, 2), "lowres_t": torch.zeros(1)}
    x, t = gaussian(torch.arange(1), (3, 8, 8)), torch.tensor([0.5])
    zero, one = (diffusion.around(lambda x, t, lowres, lowres_t, v=v: v + 0 * x, schedule, schedule)
                 (x, t, **condition) for v in (0.0, 1.0))
    alpha, sigma = (c.item() for c in schedule.alpha_sigma(t))
    gain = math.sqrt(diffusion.DETAIL / (alpha**2 * diffusion.DETAIL + sigma**2))
    torch.testing.assert_close(one - zero, torch.full_like(x, gain), atol=1e-4, rtol=0)


def test_grey_stages_know_the_grey_of_colours_and_plain_networks_are_left_alone():
    schedule, seen = schedule_of(), {}
    for planes, small in ((1, 3), (3, 1), (1, 1)):
        network = diffusion.around(recording(seen), schedule, schedule)
        lowres = gaussian(torch.arange(2), (small, 8, 8))
        out = network(torch.zeros(2, planes, 8, 8), torch.ones(2), lowres=lowres, lowres_t=torch.zeros(2))
        plain = lowres.mean(1, keepdim=True) if small > planes else lowres
        torch.testing.assert_close(out[:, :planes], -plain.expand(2, planes, 8, 8), atol=1e-5, rtol=0)
        assert seen["lowres"].shape == (2, small, 8, 8)
    alone = diffusion.around(lambda x_t, t, mask, lowres=None: 2 * x_t, schedule, schedule)
    x = gaussian(torch.arange(2), (3, 8, 8))
    assert torch.equal(alone(x, None, mask=1), 2 * x)
    assert torch.equal(alone(x, None, mask=1, lowres=None), 2 * x)


def test_the_small_picture_is_noised_by_the_schedule_of_its_own_size():
    small, eps = (gaussian(torch.arange(2) + k, (3, 4, 4)) for k in (0, 5))
    t = torch.rand(2)
    schedule = schedule_of("cosine", 256)
    condition = diffusion.augmented(small, eps, t, schedule)
    assert torch.equal(condition["lowres"], diffusion.noised(small, eps, t, schedule))
    assert torch.equal(condition["lowres_t"], t)


# Denoisers -----------------------------------------------------------------------------------------------


class Net:
    """v = a mix of x_t and of the text's visible mean; counts its calls and rows."""

    def __init__(self, channels=3, learn_sigma=False):
        self.calls, self.rows, self.channels, self.learn_sigma = 0, 0, channels, learn_sigma

    def __call__(self, x_t, t, context, mask, pooled=None, lowres=None, lowres_t=None):
        self.calls, self.rows = self.calls + 1, len(x_t)
        visible = (context * mask[..., None]).sum((1, 2)) / mask.sum(1).clamp(min=1)
        v = 0.5 * x_t + expand(visible - 0.3, x_t) * expand(t + 0.5, x_t)
        return torch.cat([v, expand(visible, x_t) + 0 * v], 1) if self.learn_sigma else v


def condition_of(b=4, seed=0):
    mask = torch.arange(5) < torch.full((b, 1), 3)
    context = gaussian(torch.arange(b) + seed, (5, 2))
    return {"context": context, "mask": mask, "pooled": None, "lowres": None, "lowres_t": None}


@pytest.fixture
def setting():
    schedule, config = schedule_of(), DiffusionConfig()
    t = torch.tensor(0.4, dtype=F64)  # as a sampler gives it
    return schedule, config, condition_of(), gaussian(torch.arange(4), (3, 8, 8)), t


def test_guidance_of_1_is_the_conditional_output_in_one_call_of_b_rows(setting):
    schedule, config, condition, x, t = setting
    net = Net()
    out = diffusion.guided(net, schedule, config, condition, 1.0)(x, t)
    assert net.calls == 1
    assert net.rows == 4
    assert torch.equal(out, diffusion.denoiser(Net(), schedule, config, condition)(x, t))


def test_guidance_of_0_is_the_unconditional_output_and_any_other_is_on_the_line(setting):
    schedule, config, condition, x, t = setting
    null = diffusion.denoiser(Net(), schedule, config, diffusion.unconditional(condition))(x, t)
    cond = diffusion.denoiser(Net(), schedule, config, condition)(x, t)
    net = Net()
    torch.testing.assert_close(diffusion.guided(net, schedule, config, condition, 0.0)(x, t), null)
    assert net.calls == 1
    assert net.rows == 8
    four = diffusion.guided(net, schedule, config, condition, 4.0)(x, t)
    torch.testing.assert_close(four, null + 4 * (cond - null))
    other = condition_of(seed=50)
    negative = diffusion.guided(net, schedule, config, condition, 0.0, negative=other)(x, t)
    torch.testing.assert_close(negative, diffusion.denoiser(Net(), schedule, config, other)(x, t))
    assert not diffusion.unconditional(condition)["mask"].any()
    assert condition["mask"].any()


def test_guidance_interval_is_plain_outside_and_costs_nothing_there(setting):
    schedule, config, condition, x, t = setting
    cond = diffusion.denoiser(Net(), schedule, config, condition)(x, t)
    weak = diffusion.denoiser(Net(), schedule, config, condition_of(seed=9))
    outside, around = ((0.5, 1.0), (0.0, 0.3)), ((0.2, 0.6), (0.4, 1.0))
    for interval in outside + around:
        inside = interval in around
        for other, rows in ((None, 8), (weak, 4)):
            net = Net()
            out = diffusion.guided(net, schedule, config, condition, 5.0, interval=interval, weak=other)(x, t)
            assert torch.equal(out, cond) != inside
            assert (net.calls, net.rows) == (1, rows if inside else 4)


def test_several_conditions_each_with_a_weight(setting):
    schedule, config, one, x, t = setting
    two, null = condition_of(seed=9), diffusion.unconditional(one)
    a, b, zero = (diffusion.denoiser(Net(), schedule, config, c)(x, t) for c in (one, two, null))
    net = Net()
    pair = diffusion.branches(net, schedule, config, [one, two], [0.7, -0.2], null)
    out = diffusion.guidance(None, pair, 3.0)(x, t)
    assert net.calls == 1
    assert net.rows == 12
    torch.testing.assert_close(out, zero + 3 * (0.7 * (a - zero) - 0.2 * (b - zero)))


class Reads(Net):
    """Net that adds the visible mean of what is written, and of both together their product."""

    def __call__(self, x_t, t, transcription_context, transcription_mask, **condition):
        v = super().__call__(x_t, t, **condition)
        seen = (transcription_context * transcription_mask[..., None]).sum((1, 2))
        both = seen * condition["mask"].any(1)
        return v + expand(seen + 2 * both, x_t)


@pytest.mark.parametrize("write", [0.0, 2.0, 7.0])
def test_caption_and_transcription_have_a_scale_each_and_at_1_and_1_are_the_condition(setting, write):
    schedule, config, caption, x, t = setting
    both = caption | {"transcription_context": caption["context"] + 1, "transcription_mask": caption["mask"]}
    told = diffusion.unconditional(both, "transcription_mask")
    assert torch.equal(told["mask"], both["mask"])
    assert not told["transcription_mask"].any()
    null = diffusion.unconditional(both)
    assert not null["mask"].any()
    assert not null["transcription_mask"].any()
    every, alone, zero = (diffusion.denoiser(Reads(), schedule, config, c)(x, t) for c in (both, told, null))
    for scale in (1.0, 3.0):
        net = Reads()
        out = diffusion.guided(net, schedule, config, both, scale, written_scale=write)(x, t)
        assert (net.calls, net.rows) == (1, 12)
        torch.testing.assert_close(out, zero + scale * (alone - zero) + write * (every - alone))
    net = Reads()
    plain = diffusion.guided(net, schedule, config, both, 1.0, written_scale=1.0)(x, t)
    assert net.rows == 4
    assert torch.equal(plain, every)
    with pytest.raises(ValueError, match="needs a guidance_scale above 0"):
        diffusion.guided(net, schedule, config, both, 0.0, written_scale=2.0)


def test_autoguidance_extrapolates_from_the_weaker_model():
    good, bad = (lambda x, t: x + 1), (lambda x, t: x + 0.5)
    denoise = diffusion.guidance(good, lambda x, t: (good(x, t), bad(x, t)), 2.0)
    out = denoise(torch.zeros(2, 3), torch.tensor(0.5))
    torch.testing.assert_close(out, torch.full((2, 3), 1.5))


def test_rescaled_guidance_keeps_the_deviation_of_the_conditional_prediction(setting):
    schedule, config, condition, x, t = setting
    cond = diffusion.denoiser(Net(), schedule, config, condition)(x, t)
    out = diffusion.guided(Net(), schedule, config, condition, 8.0, combine=diffusion.rescaled(1.0))(x, t)
    torch.testing.assert_close(out.flatten(1).std(1), cond.flatten(1).std(1))
    plain = diffusion.guided(Net(), schedule, config, condition, 8.0)(x, t)
    torch.testing.assert_close(diffusion.guided(Net(), schedule, config, condition, 8.0,
                                                combine=diffusion.rescaled(0.0))(x, t), plain)
    projected = diffusion.guided(Net(), schedule, config, condition, 8.0, combine=diffusion.projected(2.0))
    both = diffusion.guided(Net(), schedule, config, condition, 8.0,
                            combine=diffusion.rescaled(0.0, diffusion.projected(2.0)))(x, t)
    assert torch.equal(both, projected(x, t))
    assert not torch.allclose(both, plain)


def test_projected_guidance_is_orthogonal_bounded_and_has_momentum():
    cond, uncond = (gaussian(torch.arange(4) + k, (3, 8, 8)) for k in (0, 40))
    w = 5.0
    push = diffusion.projected(limit=1e9)(uncond, cond, w) - cond
    assert (push * cond).flatten(1).sum(1).abs().max() < 1e-3
    full = diffusion.projected(limit=1e9, parallel=1.0)(uncond, cond, w)
    torch.testing.assert_close(full, uncond + 5 * (cond - uncond), atol=1e-4, rtol=0)
    bounded = diffusion.projected(limit=2.0, parallel=1.0)(uncond, cond, w) - cond
    torch.testing.assert_close(bounded.flatten(1).norm(dim=1), torch.full((4,), 8.0))
    combine = diffusion.projected(limit=1e9, parallel=1.0, momentum=-0.5)
    first, second = combine(uncond, cond, w) - cond, combine(uncond, cond, w) - cond
    torch.testing.assert_close(second, first / 2, atol=1e-4, rtol=0)


def test_classifier_guidance_draws_the_posterior():
    """Data N(0, 0.5^2), classifier p(y | x_t) of y = x0 + noise: the guided sampler draws p(x0 | y)."""
    schedule, std, noise_std, y = schedule_of(), 0.5, 0.3, 0.6
    prior = gauss_denoiser(schedule, 0.0, std)

    def log_prob(x_t, t):
        alpha, sigma = levels(schedule, t, x_t)
        var = std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2) + noise_std**2
        return (-0.5 * (y - prior(x_t, t)) ** 2 / var - 0.5 * torch.log(var)).flatten(1).sum(1)

    denoise = diffusion.classifier_guidance(prior, log_prob, schedule, 1.0)
    x, t = quantiles(500)[:, None], torch.full((500,), 0.5, dtype=F64)
    lean = x + 1e-3 * (denoise(x, t[0]) - prior(x, t))
    assert (log_prob(lean, t) > log_prob(x, t)).all()
    there, elsewhere = (diffusion.classifier_guidance(prior, log_prob, schedule, 1.0, interval)(x, t[0])
                        for interval in ((0.5, 1.0), (0.0, 0.499)))
    assert torch.equal(elsewhere, prior(x, t[0]))
    assert torch.equal(there, denoise(x, t[0]))
    end = torch.ones((), dtype=F64)                            # there sigma^2 / alpha is beyond all bounds
    steep = diffusion.classifier_guidance(prior, lambda x, t: 7 * x.flatten(1).sum(1), schedule, 1.0)
    torch.testing.assert_close(steep(x, end) - prior(x, end), torch.full_like(x, 70))
    out = diffusion.heun(denoise, x, even(200), None, schedule)
    var = 1 / (1 / std**2 + 1 / noise_std**2)
    assert out.mean().item() == pytest.approx(var * y / noise_std**2, abs=0.01)
    assert out.std().item() == pytest.approx(math.sqrt(var), abs=0.01)


def test_thresholds(setting):
    _, _, _, x, t = setting
    assert torch.equal(diffusion.threshold(lambda x, t: 3 * x)(x, t), (3 * x).clamp(-1, 1))
    for percentile in (0.9, 0.995, 1.0):
        s = torch.quantile((3 * x).flatten(1).abs(), percentile, dim=1).clamp(min=1).view(-1, 1, 1, 1)
        out = diffusion.threshold(lambda x, t: 3 * x, percentile)(x, t)
        torch.testing.assert_close(out, (3 * x).clamp(-s, s) / s)
    small = diffusion.threshold(lambda x, t: 0.1 * x, 0.995)(x, t)
    assert torch.equal(small, 0.1 * x)  # pictures within the range are left alone


def test_thresholds_keep_to_the_limit_of_the_space(setting):
    _, _, _, x, t = setting
    triple = lambda x, t: 3 * x
    assert torch.equal(diffusion.threshold(triple, limit=2.0)(x, t), (3 * x).clamp(-2, 2))
    assert torch.equal(diffusion.threshold(triple, 0.9, limit=None)(x, t), 3 * x)
    wide = diffusion.threshold(triple, 0.9, limit=2.0)(x, t)
    torch.testing.assert_close(wide, 2 * diffusion.threshold(lambda x, t: 1.5 * x, 0.9)(x, t))


def test_learned_variance_is_never_extrapolated_by_guidance():
    schedule, config, condition = schedule_of(), DiffusionConfig(learn_sigma=True), condition_of()
    x, noise = gaussian(torch.arange(4), (3, 8, 8)), diffusion.noise_source(torch.arange(4), (3, 8, 8))
    seen = {}
    for scale in (1.0, 9.0):
        net, fractions = diffusion.LearnedVariance(Net(learn_sigma=True)), []
        denoise = diffusion.guided(net, schedule, config, condition, scale)
        variance = lambda: fractions.append(net.fraction[:4]) or fractions[-1]
        SAMPLERS["ddpm"](denoise, x, even(5), noise, schedule, variance=variance)
        seen[scale] = torch.stack(fractions)
    assert torch.equal(seen[1.0], seen[9.0])  # this network's variance depends on the text only


# Editing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_inpainting_keeps_what_is_known_and_fills_in_the_rest(name):
    schedule = schedule_of()
    known, keep = torch.full((64, 1, 4, 4), 0.9), torch.zeros(64, 1, 4, 4, dtype=torch.bool)
    keep[..., :2] = True

    def denoise(x_t, t):
        """Pictures of one grey value N(0, 0.5^2): what is known says everything about the rest."""
        alpha, sigma = levels(schedule, t, x_t)
        grey = x_t.mean((1, 2, 3), keepdim=True)
        return (alpha * 0.25 / (alpha**2 * 0.25 + sigma**2 / 16) * grey).expand_as(x_t)

    x, noise = gaussian(torch.arange(64), (1, 4, 4)), diffusion.noise_source(torch.arange(64), (1, 4, 4))
    errors = []
    for resample in (1, 8):
        out = diffusion.inpaint(SAMPLERS[name], denoise, x, even(24), noise, schedule, known, keep,
                                resample, jump=4)
        assert torch.equal(out[keep], known[keep])
        errors.append((out[~keep] - 0.9).abs().mean())
    assert errors[1] < 0.2
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_inpainting_in_one_go_is_the_sampler_itself(name):
    """No restart, which would take a multistep sampler its history; all of the picture is free."""
    schedule, x = schedule_of(), gaussian(torch.arange(4), (1, 4, 4))
    noise, times = diffusion.noise_source(torch.arange(4), (1, 4, 4)), sampling_times(schedule, 25)
    denoise, free = mixture_denoiser(schedule), torch.zeros(4, 1, 4, 4)
    out = diffusion.inpaint(SAMPLERS[name], denoise, x, times, noise, schedule, x, free)
    assert torch.equal(out, SAMPLERS[name](denoise, x, times, noise, schedule))


@pytest.mark.parametrize("name", ["dpmpp_2m", "ddim", "heun", "ddpm"])
def test_a_grey_mask_holds_a_pixel_until_its_time(name):
    """Of `keep` 1 stays, 0 is free; what is held to t = 1 - keep is drawn from there, given the known one."""
    schedule, n, std = schedule_of(), 2000, 0.5
    grey = [0.0, 0.5, 0.8, 1.0]
    keep = torch.tensor(grey).expand(n, 1, 1, 4)
    known, noise = torch.full((n, 1, 1, 4), 0.1), diffusion.noise_source(torch.arange(n), (1, 1, 4))
    x, denoise = gaussian(torch.arange(n), (1, 1, 4)), gauss_denoiser(schedule, 0.0, std)
    run = functools.partial(diffusion.inpaint, SAMPLERS[name], denoise, x, even(200), noise, schedule, known)
    out = run(keep)
    assert torch.equal(out[..., 3], known[..., 3])
    assert torch.equal(out[..., 0], run(0 * keep)[..., 0])
    for column in range(3):                                                 # x_t ~ N(alpha known, sigma^2)
        alpha, sigma = schedule.alpha_sigma(torch.tensor(1 - grey[column], dtype=F64))
        power = alpha**2 * std**2 + sigma**2
        spread = (std**2 * sigma**2 / power + (alpha * std**2 * sigma / power) ** 2).sqrt().item()
        if name != "ddpm":                                                  # the path from x_t is one
            spread = (std * sigma / power.sqrt()).item()
        assert out[..., column].std().item() == pytest.approx(spread, rel=0.06)
    assert torch.equal(run(keep > 0.7), run((keep > 0.7).float()))


def test_image_to_image_moves_further_with_strength():
    schedule, init = schedule_of(), torch.full((256, 1), 0.45)
    eps, distance = gaussian(torch.arange(256), (1,)), []
    for strength in (0.1, 0.5, 1.0):
        start = diffusion.noised(init, eps, torch.full((256,), strength), schedule)
        times = sampling_times(schedule, 20, start=strength)
        out = diffusion.dpmpp_2m(mixture_denoiser(schedule), start, times, None, schedule)
        distance.append((out - init).abs().mean())
    assert distance[0] < 0.1 < distance[1] < distance[2]


# Bad input, host and compiler ----------------------------------------------------------------------------


def test_bad_input_is_one_clear_line():
    schedule, config, x = schedule_of(), DiffusionConfig(), torch.zeros(2, 3, 8, 8)
    denoise = gauss_denoiser(schedule)
    inpainting = diffusion.ddim, denoise, x, even(4), None, schedule
    cases = [
        lambda: sampling_times(schedule, 0), lambda: sampling_times(schedule, -3),
        lambda: sampling_times(schedule, 5, start=0.0), lambda: sampling_times(schedule, 5, start=math.nan),
        lambda: sampling_times(schedule, 5, shift=0.0), lambda: sampling_times(schedule, 5, shift=math.inf),
        lambda: diffusion.guided(Net(), schedule, config, condition_of(2), math.nan),
        lambda: diffusion.guided(Net(), schedule, config, condition_of(2), -1.0),
        lambda: diffusion.guided(Net(), schedule, config, condition_of(2), math.inf),
        lambda: diffusion.guided(Net(), schedule, config, condition_of(2), 3.0, interval=(0.7, 0.2)),
        lambda: diffusion.threshold(denoise, 1.5), lambda: diffusion.threshold(denoise, math.nan),
        lambda: diffusion.inpaint(*inpainting, x, x[..., :4] > 0),
        lambda: diffusion.inpaint(*inpainting, x[..., :4], x > 0),
        lambda: diffusion.inpaint(*inpainting, x, x > 0, resample=0),
        lambda: diffusion.draw_t(torch.rand(3), DiffusionConfig(t_density="importance"), schedule)]
    for times in ([0.0, 0.5], [1.0], [1.0, 0.5, 0.5, 0.0], [1.2, 0.0], [1.0, -0.1], [math.nan, 0.0],
                  [[1.0], [0.0]]):
        cases.append(lambda times=times: diffusion.ddim(denoise, x, torch.tensor(times), None, schedule))
    for case in cases:
        with pytest.raises(ValueError) as error:
            case()
        assert len(str(error.value)) < 160
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"churn": 5.0}])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_no_sampler_looks_at_the_device_inside_its_loop(name, options):
    """A tensor on the meta device has no values: whoever wants to read one back, fails."""
    if options and name != "heun":
        return
    schedule, x = schedule_of(), torch.empty(2, 3, 4, 4, device="meta")
    times = sampling_times(schedule, 7)
    out = SAMPLERS[name](lambda x_t, t: 0.5 * x_t, x, times, lambda i: x, schedule, **options)
    assert out.is_meta
    keep = torch.empty(2, 1, 4, 4, device="meta")
    half = lambda x_t, t: 0.5 * x_t
    out = diffusion.inpaint(SAMPLERS[name], half, x, times, lambda i: x, schedule, x, keep)
    assert out.is_meta


def test_no_guidance_looks_at_the_device_and_all_stay_in_float32(setting):
    schedule, config, condition, x, t = setting

    def denoisers(condition, other):
        net = diffusion.LearnedVariance(Net(learn_sigma=True))
        plain = diffusion.denoiser(net, schedule, config, condition)
        log_prob = lambda x, t: -x.square().flatten(1).sum(1) * t
        yield from (plain, diffusion.threshold(plain), diffusion.threshold(plain, 0.99),
                    diffusion.classifier_guidance(plain, log_prob, schedule, 2.0),
                    diffusion.guidance(plain, lambda x, t: (plain(x, t), 0.5 * plain(x, t)), 2.0))
        for options in ({"interval": (0.2, 0.7)}, {"combine": diffusion.rescaled(0.5)},
                        {"interval": (0.5, 0.7)},
                        {"combine": diffusion.rescaled(0.5, diffusion.projected(2.0))}):
            yield diffusion.guided(net, schedule, config, condition, 4.0, other, **options)

    for denoise in denoisers(condition, condition_of(seed=9)):
        x0 = denoise(x, t)
        assert x0.dtype == torch.float32
        assert x0.isfinite().all()
    meta = {"context": x.new_empty(4, 5, 2, device="meta"), "mask": torch.ones(4, 5, device="meta") > 0}
    for denoise in denoisers(meta, meta):
        assert denoise(x.to("meta"), t).is_meta


@pytest.mark.parametrize("name", ["dpmpp_2m", "ddim", "heun", "ddpm"])
def test_a_compiled_network_does_not_recompile_between_steps(name):
    torch._dynamo.reset()
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    schedule, config, condition = schedule_of(), DiffusionConfig(), condition_of()
    net = lambda x_t, t, context, mask, **_: torch.tanh(x_t) * expand(t + context.mean() * mask.sum(), x_t)
    x, noise = gaussian(torch.arange(4), (3, 8, 8)), diffusion.noise_source(torch.arange(4), (3, 8, 8))
    net = torch.compile(net, backend=backend)
    SAMPLERS[name](diffusion.guided(net, schedule, config, condition, 3.0), x, even(6), noise, schedule)
    assert len(graphs) == 1
