"""Diffusion: schedules, targets, losses, guidance and samplers, by logsnr and (alpha_t, sigma_t).

    x_t = alpha_t x0 + sigma_t eps    logsnr = ln(alpha_t^2 / sigma_t^2)    t = 0 clean, 1 noise

A network is any `model(x_t, t, **condition)`, a denoiser any `denoise(x_t, t) -> x0`; nothing here
knows of U-Nets or text. Guidance and thresholds are functions that return a denoiser, which a
sampler uses.

Shapes: B batch, C channels, H W picture, h w picture at low resolution, N sampling steps.
x0, x_t, eps (B, C, H, W), or any (B, ...), float32; t, logsnr (B,) float32; times (N+1,) float64 on
the CPU.
"""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGSNR_SOFT = 16.0  # schedules bend here towards +-20, where sigma(0) = alpha(1) = 4.5e-5, not seen
TRAIN_STEPS = 1000  # of the discrete processes of the literature: step i is t = (i + 1) / 1000
Curve = Callable[[Tensor], Tensor]  # logsnr(t)
LossWeight = Literal["uniform", "min_snr", "soft_min_snr", "sigmoid", "p2", "edm", "learned"]


@dataclass
class DiffusionConfig:
    schedule: Literal["cosine", "linear", "scaled_linear", "sigmoid", "flow", "edm"] = "cosine"  # of noise
    shift_base: int = 64  # picture side at which the schedule is not shifted, 0 = never shift [pixels]
    size_shift: Literal["uniform", "interpolated"] = "uniform"  # interpolated: fades to no shift at t = 0
    zero_snr: bool = False  # rescale linear or scaled_linear so that no signal is left at t = 1
    prediction: Literal["v", "eps", "x0", "flow"] = "v"  # what the network predicts
    learn_sigma: bool = False  # predict the variance of a step too, for the ddpm sampler (twice the outputs)
    loss_weight: LossWeight = "uniform"  # by noise level; uniform: 1 on the error of what is predicted
    snr_gamma: float = 5.0  # ceiling of min_snr and soft_min_snr [signal-to-noise ratio]
    sigmoid_bias: float = 2.0  # middle of the sigmoid weight [-100..100 logsnr]
    t_density: Literal["uniform", "logit_normal", "log_normal", "importance"] = "uniform"  # density of t
    t_mean: float = 0.0  # of logit_normal, in logit t; log_normal, in ln sigma/alpha (EDM: -1.2) [-100..100]
    t_std: float = 1.0  # of logit_normal and log_normal (EDM: 1.2) [0..100]


@dataclass
class Pixels:
    """The space in which pictures themselves are diffused: [-1, 1], `channels` of them.
    scale: pixels of a picture per position; limit: what a prediction is clipped to, None = not
    clipped; fingerprint: of a network that encodes, here none."""

    channels: int = 3
    scale = 1
    limit = 1.0
    fingerprint = ""

    def encode(self, pictures: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 in [-1, 1], on the same device."""
        return pictures.float() / 127.5 - 1

    def decode(self, x0: Tensor) -> Tensor:
        """x0 -> uint8 (B, C, H, W), clipped to [-1, 1], on the same device."""
        values = (x0.clamp(-1, 1) + 1) * 127.5
        return values.round().to(torch.uint8)


# Noise: a pure function of (key, element) ---------------------------------------------------------

GOLDEN = -0x61C8864680B583EB  # the constants of splitmix64, as int64
MIX_1 = -0x40A7B892E31B1A47
MIX_2 = -0x6B2FB644ECCEEE15


def mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of int64."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * MIX_1  # the mask makes torch's arithmetic shift logical
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def gaussian(keys: Tensor, shape: tuple[int, ...], device=None) -> Tensor:
    """Standard normal noise from (key, element index) alone, so it is the same for every split of
    the batch. Counter-based (Salmon et al. 2011): splitmix64 of key and counter, then Box-Muller,
    two normals a hash. keys (B,) int64, shape without B -> (B, *shape) float32 within +-6.8.
    Devices agree but for rounding."""
    keys = keys.to(device)
    count = math.prod(shape)
    half = (count + 1) // 2
    counter = torch.arange(1, half + 1, device=keys.device) * GOLDEN
    bits = mix(mix(keys + GOLDEN)[:, None] + counter)                       # (B, half) int64

    high = (bits >> 32) & 0xFFFFFFFF
    radius = torch.sqrt(-2 * torch.log((high.float() + 0.5) * 2.0**-32))
    low = (bits & 0xFFFFFFFF) >> 8
    angle = low.float() * (2 * math.pi * 2.0**-24)
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return normal[:, :count].reshape(-1, *shape)


def noise_source(keys: Tensor, shape: tuple[int, ...], device=None) -> Callable:
    """noise(step) -> (B, *shape) for samplers: independent for each step, and of gaussian(keys)."""
    keys = mix(keys.to(device))  # once: a copy in a sampler's loop stops the device
    return lambda step: gaussian(keys + step, shape)


# Schedules: t -> logsnr -> (alpha, sigma) ---------------------------------------------------------

def expand(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...); one number for all stays as it is."""
    ones = [1] * (x.ndim - 1)
    return value.view(-1, *ones) if value.ndim else value


def inner(x: Tensor) -> tuple[int, ...]:
    """The dimensions of x (B, ...) inside a batch."""
    return tuple(range(1, x.ndim))


@dataclass
class Schedule:
    """A falling function logsnr(t): a curve, shifted by the picture's size, within +-20.
    An interpolated shift fades towards the end that it would cut off: a negative one to 0 at t = 0,
    a positive one to 0 at t = 1 (Hoogeboom et al. 2023, 2301.11093, section 3.2), and so falls.
    Variance preserving: alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr).
    Flow: alpha = sigmoid(logsnr/2), sigma = sigmoid(-logsnr/2), so 1 - t and t where not shifted.
    At equal logsnr the x_t of the two differ by a factor only (Kingma & Gao 2023, 2303.00848,
    section 2)."""

    curve: Curve
    shift: float = 0.0
    flow: bool = False
    interpolated: bool = False

    def logsnr(self, t: Tensor) -> Tensor:
        shift = self.shift
        if self.interpolated:
            shift = max(shift, 0) - abs(shift) * t
        logsnr = self.curve(t) + shift

        straight = logsnr.clamp(-LOGSNR_SOFT, LOGSNR_SOFT)
        return straight + 4 * torch.tanh((logsnr - straight) / 4)

    def alpha_sigma(self, t: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of t (B,): (B,) each, or (B, 1, ..., 1) where x (B, ...) is what they multiply."""
        logsnr = self.logsnr(t)
        return self.scales(logsnr if x is None else expand(logsnr, x))

    def scales(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of a logsnr, exactly (1, 0) where it is infinite."""
        if self.flow:
            return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)
        return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()

    def inverse(self, logsnr: Tensor) -> Tensor:
        """The t of a logsnr, by bisection to the last bits of the dtype, without reading back."""
        low = torch.zeros_like(logsnr)
        high = torch.ones_like(logsnr)
        for _ in range(52):
            middle = (low + high) / 2
            noisier = self.logsnr(middle) < logsnr
            low = torch.where(noisier, low, middle)
            high = torch.where(noisier, middle, high)
        return (low + high) / 2


def betas(first: float, last: float, power: int) -> Curve:
    """logsnr of a process of 1000 steps whose betas have a linear `power`-th root, continued
    between them. alpha_t^2 = prod_{j < 1000 t} (1 - beta_j) (Ho et al. 2020, 2006.11239, eq. 4);
    the sum of log(1 - beta_j) as an integral over j from -1/2 to 1000 t - 1/2, by Gauss-Legendre:
    within 1e-6 of the product."""
    low = first ** (1 / power)
    rise = (last ** (1 / power) - low) / (TRAIN_STEPS - 1)
    nodes = [(-0.7745966692414834, 5), (0.0, 8), (0.7745966692414834, 5)]

    def curve(t):
        mean = 0.0
        for node, weight in nodes:
            j = TRAIN_STEPS * t * ((1 + node) / 2) - 0.5
            beta = (low + rise * j) ** power
            mean = mean + weight / 18 * torch.log1p(-beta)
        return -log(torch.expm1(-TRAIN_STEPS * t * mean))

    return curve


def log(x: Tensor) -> Tensor:
    return torch.log(x.clamp(min=1e-9))


CURVES = {  # name: logsnr(t), before shift and limits
    "cosine": lambda t: 2 * (log(torch.cos(t * math.pi / 2)) - log(torch.sin(t * math.pi / 2))),  # 2102.09672
    "linear": betas(1e-4, 0.02, 1),             # Ho et al. 2020, 2006.11239
    "scaled_linear": betas(0.00085, 0.012, 2),  # Stable Diffusion (Rombach et al. 2021, 2112.10752)
    "sigmoid": lambda t: log(torch.sinh(3 - 3 * t)) - log(torch.sinh(3 * t)),  # alpha^2 of 2212.11972
    "flow": lambda t: 2 * (log(1 - t) - log(t)),  # alpha = 1 - t, sigma = t: Liu et al. 2022, 2209.03003
    "edm": lambda t: -14 * torch.log(0.002 ** (1 / 7) * (1 - t) + 80 ** (1 / 7) * t),  # 2206.00364, eq. 5
}


def zero_terminal_snr(curve: Curve) -> Curve:
    """alpha shifted and scaled to be 0 at t = 1, the same at step 1 (Lin et al. 2023, 2305.08891,
    alg. 1)."""
    ends = curve(torch.tensor([1 / TRAIN_STEPS, 1.0], dtype=torch.float64))
    first, last = torch.sigmoid(ends).sqrt().tolist()
    gain = first / (first - last)

    def rescaled_curve(t):
        logsnr = curve(t)
        alpha = torch.sigmoid(logsnr).sqrt()
        variance = torch.sigmoid(-logsnr)
        lost = gain * variance / (1 + alpha)
        lost = (1 - gain * (1 - last)) + lost  # 1 - the new alpha, without cancellation
        lost = torch.maximum(lost, variance / 1000).clamp(max=1 - 1e-7)  # falls before step 1 too
        return 2 * torch.log(1 - lost) - torch.log(lost * (2 - lost))

    return rescaled_curve


def make_schedule(config: DiffusionConfig, size: int) -> Schedule:
    """The schedule for pictures of `size` pixels, shifted by 2 ln(shift_base / size).
    The same noise hides less of a large picture (Hoogeboom et al. 2023, 2301.11093, eq. 4; for
    flow, Esser et al. 2024, 2403.03206, eq. 23). Raises ValueError on an unknown name or an
    impossible size."""
    if config.schedule not in CURVES:
        raise ValueError(f"schedule {config.schedule!r} is not one of {', '.join(CURVES)}."
                         " Quadratic leaves 3% of the signal at t = 1: use scaled_linear, zero_snr")
    if config.zero_snr and config.prediction == "eps":
        raise ValueError("prediction eps says nothing at t = 1 without signal: use v with zero_snr")
    if size < 1 or config.shift_base < 0:
        raise ValueError(f"picture size {size} or shift_base {config.shift_base} is too small")

    curve = CURVES[config.schedule]
    if config.zero_snr:
        curve = zero_terminal_snr(curve)
    shift = 2 * math.log(config.shift_base / size) if config.shift_base else 0.0
    return Schedule(curve, shift, config.schedule == "flow", config.size_shift == "interpolated")


# Targets and the posterior ------------------------------------------------------------------------

def noised(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps."""
    alpha, sigma = schedule.alpha_sigma(t, x0)
    return alpha * x0 + sigma * eps


TARGETS = {  # name: (a, b) of a x0 + b eps, what the network should say, from (alpha, sigma)
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "v": lambda alpha, sigma: (-sigma, alpha),      # Salimans & Ho 2022, 2202.00512, section 4
    "flow": lambda alpha, sigma: (-1.0, 1.0),       # the velocity of Liu et al. 2022, 2209.03003
}


def x0_eps(
    output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: str,
) -> tuple[Tensor, Tensor]:
    """(x0, eps) that an output means: the solution of alpha x0 + sigma eps = x_t, a x0 + b eps =
    output. v and flow are well conditioned at every logsnr; x0 from eps loses a factor sigma /
    alpha, eps from x0 the inverse."""
    a, b = TARGETS[prediction](alpha, sigma)
    determinant = alpha * b - sigma * a
    x0 = (b * x_t - sigma * output) / determinant
    eps = (alpha * output - a * x_t) / determinant
    return x0, eps


def posterior(schedule: Schedule, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """q(x_s | x_t, x0), s < t (2107.00630, eq. 25) as (of_x0, of_x_t, log_small, log_large).
    Mean of_x0 x0 + of_x_t x_t, log variance log_small; log_large is that of q(x_t | x_s), an upper
    bound. The variance is 0 at s = 0, where that of the step before, from 2t to t, stands in (as in
    2102.09672)."""
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    logsnr = schedule.logsnr(t)
    lost = -torch.expm1(logsnr - schedule.logsnr(s))  # 1 - SNR_t / SNR_s
    log_large = torch.log(sigma_t**2 * lost)

    before = schedule.logsnr((2 * t).clamp(max=1))
    variance = torch.where(s == 0, -sigma_t**2 * torch.expm1(before - logsnr), sigma_s**2 * lost)
    log_small = torch.log(variance)
    return alpha_s * lost, alpha_s / alpha_t * (1 - lost), log_small, log_large


# Likelihood in bits per dimension -----------------------------------------------------------------

def decoder_bits(x0: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log2 of a normal's mass in the bin of an 8-bit x0, outer bins open (2006.11239, eq. 13)."""
    half = 1 / 255
    std = torch.exp(log_var / 2)
    def log_ndtr(x):  # keeps the tails, and their slope; MPS has none
        return torch.special.log_ndtr(x.cpu() if x.is_mps else x).to(x.device)

    outer = log_ndtr((half - x0.sign() * (x0 - mean)) / std)

    centre = -(x0 - mean).abs()  # by symmetry in the lower tail, where there are digits
    upper = log_ndtr((centre + half) / std)
    share = -torch.expm1(log_ndtr((centre - half) / std) - upper)
    inside = upper + torch.log(share.clamp(min=1e-12))
    nats = torch.where(x0.abs() > 0.999, outer, inside)
    return -nats / math.log(2)


def variational_bits(
    x0: Tensor, x_t: Tensor, guess: Tensor, fraction: Tensor | float,
    s: Tensor, t: Tensor, schedule: Schedule,
) -> Tensor:
    """One term of the variational bound, bits per dimension (B,) (Ho et al. 2020, 2006.11239, eq.
    5). KL(q(x_s | x_t, x0) || p(x_s | x_t)) or the decoder where s = 0. p has q's mean with `guess`
    for x0 and a log variance between that of q (fraction 0) and of the forward step (1)
    (2102.09672, eq. 15)."""
    step = [expand(value, x0) for value in posterior(schedule, s, t)]
    of_x0, of_x_t, small, large = step
    log_var = small + fraction * (large - small)

    miss = (of_x0 * (x0 - guess)).square()
    nats = log_var - small + torch.exp(small - log_var) - 1 + miss * torch.exp(-log_var)
    kl = 0.5 * nats / math.log(2)
    decoder = decoder_bits(x0, of_x0 * guess + of_x_t * x_t, log_var)
    bits = torch.where(expand(s, x0) == 0, decoder, kl)
    return bits.mean(inner(x0))


# Training: noise levels, weights, losses ----------------------------------------------------------

def stratify(u: Tensor, index: Tensor, total: int) -> Tensor:
    """Uniform u (B,) of items `index` (B,) of a batch of `total` -> one in each `total`th."""
    return (index + u) / total


def draw_t(u: Tensor, config: DiffusionConfig, schedule: Schedule) -> Tensor:
    """t (B,) float32 from u (B,) in [0, 1), by the inverse distribution function of the density.
    logit_normal: Esser et al. 2024, 2403.03206, eq. 19. log_normal: ln(sigma / alpha) is normal,
    shifted as the schedule (Karras et al. 2022, 2206.00364, table 1). importance has a state: class
    Importance."""
    normal = config.t_mean + config.t_std * torch.special.ndtri(u.float())
    match config.t_density:
        case "uniform":
            return u.float()
        case "logit_normal":
            return torch.sigmoid(normal)
        case "log_normal":
            return Schedule(schedule.curve).inverse(-2 * normal)
    raise ValueError(f"t_density {config.t_density!r} is not uniform, logit_normal or log_normal")


class Importance(nn.Module):
    """t in proportion to the root of the loss's second moment (Nichol & Dhariwal 2021, 2102.09672,
    eq. 18). A running second moment for each of `buckets` equal parts of t. `update` takes the sums
    over all ranks of `bucket_sums(loss**2, t, buckets)`, so the state depends neither on their
    number nor on the order: of the loss before Uncertainty.weigh, whose u would turn the preference
    round. It starts from the first losses, and draws evenly until every part has one."""

    def __init__(self, buckets: int = 100, decay: float = 0.98):
        super().__init__()
        self.decay = decay  # per sample
        self.register_buffer("second_moment", torch.zeros(buckets))

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (B,) in [0, 1) -> t (B,), and what its loss weighs: 1 / density keeps the mean."""
        root = self.second_moment.sqrt()
        root = torch.where((root > 0).all(), root, 1.0)
        density = 0.999 * root / root.mean() + 0.001                        # (buckets,), of mean 1
        buckets = len(density)
        edges = torch.cumsum(density, 0) / buckets

        bucket = torch.searchsorted(edges, u.float().contiguous(), right=True)
        bucket = bucket.clamp(max=buckets - 1)
        height = density[bucket]
        t = (bucket + 1) / buckets - (edges[bucket] - u) / height
        return t.clamp(0, 1), 1 / height

    def update(self, square: Tensor, count: Tensor) -> None:
        mean = square / count.clamp(min=1)
        new = torch.where(self.second_moment > 0, 1 - self.decay**count, 1.0)
        self.second_moment.lerp_(mean, new)


class Uncertainty(nn.Module):
    """u(logsnr), the learned log variance of the loss (Karras et al. 2023, 2312.02696, eq. 21)."""

    def __init__(self, features: int = 128):
        super().__init__()
        waves = gaussian(torch.tensor([0, 1]), (features,))
        self.register_buffer("waves", 2 * math.pi * waves)
        self.weight = nn.Parameter(torch.zeros(features))  # training starts from the plain loss

    def forward(self, logsnr: Tensor) -> Tensor:
        frequency, phase = self.waves
        wave = torch.cos(logsnr[:, None] / 8 * frequency + phase)           # (B, features)
        return (self.weight * wave).sum(1)

    def weigh(self, loss: Tensor, logsnr: Tensor) -> Tensor:
        """What is minimised instead of losses (B,): it weighs them by the inverse of their mean."""
        u = self(logsnr)
        return loss * torch.exp(-u) + u


def x0_weight(t: Tensor, schedule: Schedule, config: DiffusionConfig) -> Tensor:
    """Weight (B,) of the squared error of x0, the same whatever is predicted; SNR is a weight of 1
    on eps. min_snr: Hang et al. 2023, 2303.09556. soft_min_snr: Crowson et al. 2024, 2401.11605.
    sigmoid: times -dlogsnr/dt / 2 pi, so that it does not depend on the schedule (Kingma & Gao
    2023, 2303.00848). p2: Choi et al. 2022, 2204.00227, k = gamma = 1. edm: Karras et al. 2022,
    2206.00364, table 1."""
    logsnr = schedule.logsnr(t)
    snr = torch.exp(logsnr)
    match config.loss_weight:
        case "min_snr":
            return snr.clamp(max=config.snr_gamma)
        case "soft_min_snr":
            return snr * config.snr_gamma / (snr + config.snr_gamma)
        case "sigmoid":
            with torch.enable_grad():
                t = t.detach().requires_grad_()
                slope = torch.autograd.grad(schedule.logsnr(t).sum(), t)[0]
            weight = snr * torch.sigmoid(config.sigmoid_bias - logsnr)
            return weight * slope / (-2 * math.pi)
        case "p2":
            return torch.sigmoid(logsnr)
        case "edm":
            return snr + 4  # 4 = 1 / sigma_data^2, sigma_data = 0.5 for pictures in [-1, 1]
    raise ValueError(f"loss_weight {config.loss_weight!r} is unknown")


def losses(
    model: Callable, x0: Tensor, eps: Tensor, t: Tensor,
    schedule: Schedule, config: DiffusionConfig, limit: float | None = 1.0, **condition,
) -> tuple[Tensor, Tensor]:
    """Per-sample losses, (weighted (B,), raw (B,)) float32: to be minimised, and to be compared.
    raw is the mean squared error of the x0 that is meant, clipped to +-limit as samplers do (None:
    not): one unit for all targets and schedules, at most 4 limit^2. Unclipped, eps would divide by
    alpha at the noisy end; the error of v or eps multiplies that of x0 by 1 + SNR at the clean one.
    uniform and learned weigh the prediction's error by 1; what is learned is Uncertainty.weigh's.
    learn_sigma adds the variational term of a step of 1/1000 in bits per dimension, which trains
    the variance only (Nichol & Dhariwal 2021, 2102.09672, eq. 16, lambda 1/1000)."""
    channels = x0.shape[1]
    alpha, sigma = schedule.alpha_sigma(t, x0)
    x_t = alpha * x0 + sigma * eps                                          # (B, C, H, W)
    output = model(x_t, t, **condition).float()                             # (B, C or 2C, H, W)
    head = output[:, channels:]
    output = output[:, :channels]

    a, b = TARGETS[config.prediction](alpha, sigma)
    target = a * x0 + b * eps
    guess = x0_eps(output.detach(), x_t, alpha, sigma, config.prediction)[0]
    clipped = guess if limit is None else guess.clamp(-limit, limit)
    raw = (clipped - x0).square().mean(inner(x0))

    weighted = (output - target).square().mean(inner(x0))
    if config.loss_weight not in ("uniform", "learned"):
        scale = sigma / (alpha * b - sigma * a)  # of an error, to that of x0 at the same x_t
        weight = scale.flatten() ** 2 * x0_weight(t, schedule, config)
        weighted = weighted * weight
    if config.learn_sigma:
        end = t.clamp(min=1 / TRAIN_STEPS)
        start = end - 1 / TRAIN_STEPS
        fraction = (head + 1) / 2
        bits = variational_bits(x0, x_t, guess, fraction, start, end, schedule)
        weighted = weighted + bits
    return weighted, raw


def bucket_sums(value: Tensor, where: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Sums and counts (buckets,) of value (B,) by where (B,) in [0, 1]; no host synchronisation."""
    bucket = (where * buckets).long().clamp(max=buckets - 1)
    number = torch.arange(buckets, device=value.device)
    member = (bucket[:, None] == number).float()                            # (B, buckets)
    sums = value.float()[:, None] * member
    return sums.sum(0), member.sum(0)


def loss_buckets(loss: Tensor, logsnr: Tensor, buckets: int = 8) -> tuple[Tensor, Tensor]:
    """Sums and counts (buckets,) of per-sample losses by noise level, clean first.
    Buckets are equal parts of the angle atan(sigma / alpha), so of t on the unshifted cosine
    schedule."""
    angle = torch.atan(torch.exp(-logsnr / 2))
    return bucket_sums(loss, angle * (2 / math.pi), buckets)


# Around a known picture: networks that enlarge one ------------------------------------------------

PIXEL = 0.3  # variance of pictures in [-1, 1]
DETAIL = 0.0025  # variance of what is lost in a quarter of their size


def augmented(small: Tensor, eps: Tensor, t: Tensor, small_schedule: Schedule) -> dict:
    """The condition of a small picture (B, c, h, w): noised, t (B,), by the schedule of its size,
    so that the network forgives the errors of the stage below (Ho et al. 2021, 2106.15282, section
    4.2)."""
    return {"lowres": noised(small, eps, t, small_schedule), "lowres_t": t}


def around(network: Callable, schedule: Schedule, small_schedule: Schedule) -> Callable:
    """The network for v where a small picture is known, preconditioned around it; else the network
    as it is. As Karras et al. 2022, 2206.00364, section 5, for x0 normal around lowres instead of
    0: its input has unit variance and v = known + gain * output, so an output of 0 is the best
    linear guess: lowres at t = 1. The condition has lowres (B, c, h, w) at its own size, noised to
    lowres_t (B,); the network gets it enlarged to (B, c, H, W)."""
    def aware(x_t, t, **condition):
        if condition.get("lowres") is None:
            return network(x_t, t, **condition)
        lowres = F.interpolate(condition["lowres"], x_t.shape[-2:], mode="bicubic")
        plain = lowres
        if lowres.shape[1] > x_t.shape[1]:
            plain = lowres.mean(1, keepdim=True)

        # what the small picture says: x0 is normal around `guess`, with variance `left`
        alpha, sigma = small_schedule.alpha_sigma(condition["lowres_t"], x_t)
        power = alpha**2 * PIXEL + sigma**2
        guess = alpha * PIXEL * plain / power
        left = PIXEL * sigma**2 / power + DETAIL

        alpha, sigma = schedule.alpha_sigma(t, x_t)
        total = alpha**2 * left + sigma**2
        known = sigma * (alpha * (1 - left) * x_t - guess) / total
        gain = (left / total).sqrt()

        condition["lowres"] = lowres
        x = (x_t - alpha * guess) / total.sqrt()
        output = network(x, t, **condition)
        channels = x_t.shape[1]
        v = known + gain * output[:, :channels]
        return torch.cat([v, output[:, channels:]], 1)

    return aware


# Denoisers: denoise(x_t (B, ...), t) -> x0 (B, ...) float32 ---------------------------------------
# t is one for all rows and 0-dimensional on the CPU, so that looking at it never stops the device.

def per_row(t: Tensor, x: Tensor) -> Tensor:
    """One t for all, on the CPU -> (B,) on the device of x, without a copy that is waited for."""
    return x.new_zeros(len(x)) + t


def denoiser(
    model: Callable, schedule: Schedule, config: DiffusionConfig, condition: dict,
) -> Callable:
    """The network as a denoiser under one condition; channels beyond those of x_t are left out."""
    def denoise(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t, x_t)
        output = model(x_t, per_row(t, x_t), **condition).float()
        output = output[:, :x_t.shape[1]]
        return x0_eps(output, x_t, alpha, sigma, config.prediction)[0]

    return denoise


@dataclass
class LearnedVariance:
    """A network with learn_sigma that remembers its variance: `ddim(..., variance=lambda:
    net.fraction[:B])`. The condition's rows come first in a guided batch, so guidance never
    extrapolates a variance."""

    model: Callable
    fraction: Tensor | None = None

    def __call__(self, x_t, t, **condition):
        output = self.model(x_t, t, **condition)
        head = output[:, x_t.shape[1]:]
        self.fraction = (head.float() + 1) / 2
        return output


def unconditional(condition: dict, end: str = "mask") -> dict:
    """The condition with its texts hidden (masks all False), or those whose masks' names end so;
    the low-resolution picture stays."""
    hidden = {name: torch.zeros_like(x) for name, x in condition.items() if name.endswith(end)}
    return condition | hidden


def branches(
    model: Callable, schedule: Schedule, config: DiffusionConfig,
    conditions: list[dict], weights: list[float], negative: dict,
) -> Callable:
    """pair(x_t, t) -> (cond, uncond) in one network call; cond = uncond + sum of weight_k (cond_k -
    uncond). Several conditions with a weight each: Liu et al. 2022, 2206.01714, eq. 11."""
    every = [*conditions, negative]
    rows = len(every)
    stacked = {}
    for key, value in negative.items():
        if value is not None:
            value = torch.cat([condition[key] for condition in every])
        stacked[key] = value
    together = denoiser(model, schedule, config, stacked)

    def pair(x_t, t):
        x0 = together(torch.cat([x_t] * rows), t)
        *conds, uncond = x0.chunk(rows)
        cond = sum(weight * each for weight, each in zip(weights, conds))
        return cond + (1 - sum(weights)) * uncond, uncond

    return pair


def guidance(
    alone: Callable, pair: Callable, guidance_scale: float,
    interval: tuple[float, float] = (0.0, 1.0), combine: Callable = torch.lerp,
) -> Callable:
    """x0 = uncond + w (cond - uncond) where t is in the interval, else cond.
    `alone(x_t, t)` -> cond, `pair(x_t, t)` -> (cond, uncond): `branches` (classifier-free, Ho &
    Salimans 2022, 2207.12598, eq. 6) or of two denoisers, a good and a bad one (autoguidance,
    Karras et al. 2024, 2406.02507). Outside the interval (Kynkaanniemi et al. 2024, 2404.07724)
    uncond is not computed. `combine(uncond, cond, w)` is torch.lerp, rescaled(phi) or
    projected(...)."""
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale {guidance_scale} is not finite and at least 0 (1 = none)")
    first, last = interval
    if not 0 <= first < last <= 1:
        raise ValueError(f"guidance interval {interval} is not two rising times within 0 and 1")

    def denoise(x_t, t):
        if not first <= t <= last:
            return alone(x_t, t)
        cond, uncond = pair(x_t, t)
        return combine(uncond, cond, guidance_scale)

    return denoise


def guided(
    model: Callable, schedule: Schedule, config: DiffusionConfig, condition: dict,
    guidance_scale: float, negative: dict | None = None, weak: Callable | None = None,
    written_scale: float | None = None, **options,
) -> Callable:
    """Guidance of one condition: one call, of 2B rows, or B where there is nothing to guide.
    `negative`, the condition of a negative prompt, replaces the empty one; `weak`, a denoiser, both
    (autoguidance). `written_scale`, for what is written, in 3B rows: x0 = uncond + w (caption -
    uncond) + written_scale (both - caption), so that 1 and 1 are the condition (Brooks et al. 2022,
    2211.09800, eq. 3), by weights of eq. 11 in `branches`. options: guidance's."""
    good = denoiser(model, schedule, config, condition)
    conditions = [condition]
    weights = [1.0]
    if written_scale not in (None, guidance_scale):
        if not guidance_scale:
            raise ValueError("a scale for what is written needs a guidance_scale above 0")
        share = written_scale / guidance_scale
        conditions.append(unconditional(condition, "transcription_mask"))
        weights = [share, 1 - share]
    if guidance_scale == 1 and len(weights) == 1:
        return good

    def good_and_weak(x_t, t):
        return good(x_t, t), weak(x_t, t)

    negative = negative or unconditional(condition)
    empty = branches(model, schedule, config, conditions, weights, negative)
    return guidance(good, good_and_weak if weak else empty, guidance_scale, **options)


def rescaled(phi: float = 0.7, pushed: Callable = torch.lerp) -> Callable:
    """x0 of `pushed` rescaled by phi to the deviation of cond (2305.08891, eq. 15-16, for v)."""
    def combine(uncond, cond, w):
        x0 = pushed(uncond, cond, w)
        deviation = x0.std(inner(x0), keepdim=True).clamp(min=1e-6)
        ratio = cond.std(inner(x0), keepdim=True) / deviation
        return x0 * (1 + phi * (ratio - 1))

    return combine


def projected(limit: float = 15.0, parallel: float = 0.0, momentum: float = -0.5) -> Callable:
    """Adaptive projected guidance (Sadat et al. 2024, 2410.02416, algorithm 1): strong without
    saturation. The part of the push along cond is scaled by `parallel`, its norm is at most
    `limit`, it has a negative momentum from step to step: make a new one for each run of a
    sampler."""
    average = 0.0

    def norm(x):
        length = torch.linalg.vector_norm(x, dim=inner(x), keepdim=True)
        return length.clamp(min=1e-6)

    def combine(uncond, cond, w):
        nonlocal average
        average = cond - uncond + momentum * average
        push = average * (limit / norm(average)).clamp(max=1)
        unit = cond / norm(cond)
        along = (push * unit).sum(inner(unit), keepdim=True) * unit
        return cond + (w - 1) * (push - along + parallel * along)

    return combine


def classifier_guidance(
    denoise: Callable, log_prob: Callable, schedule: Schedule, scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable:
    """x0 + scale sigma^2 / alpha grad log p(y | x_t) (Dhariwal & Nichol 2021, 2105.05233, algorithm
    2) where t is in the interval, else x0. `log_prob(x_t, t)` -> (B,), t (B,). The true gradient
    shrinks as alpha does near t = 1, and a network's does not: so, unlike there, alpha counts as 0.1
    at least. Put a threshold around it."""
    first, last = interval

    def pushed(x_t, t):
        if not first <= t <= last:
            return denoise(x_t, t)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            total = log_prob(x, per_row(t, x)).sum()
            gradient = torch.autograd.grad(total, x)[0]
        alpha, sigma = schedule.alpha_sigma(t, x_t)
        return denoise(x_t, t) + scale * sigma**2 / alpha.clamp(min=0.1) * gradient

    return pushed


def threshold(
    denoise: Callable, percentile: float | None = None, limit: float | None = 1.0,
) -> Callable:
    """x0 clipped to +-s, over s / limit: s = limit, or max(limit, percentile of |x0|) of each
    picture (2205.11487, 2.3). limit None: the denoiser as it is. The percentile is in (0, 1]."""
    if limit is None:
        return denoise
    if percentile is None:
        return lambda x_t, t: denoise(x_t, t).clamp(-limit, limit)
    if not 0 < percentile <= 1:
        raise ValueError(f"threshold percentile {percentile} is not in (0, 1]")

    def thresholded(x_t, t):
        x0 = denoise(x_t, t)
        s = [row.quantile(percentile) for row in x0.abs().flatten(1)]
        s = expand(torch.stack(s).clamp(min=limit), x0)
        return x0.clamp(-s, s) / (s / limit)

    return thresholded


# Times of a sampler: falling, in [0, 1] -----------------------------------------------------------

NOISY = 80  # sigma / alpha after pure noise, before the shift (Karras et al. 2022, table 1)
CLEAN = 300  # alpha / sigma before t = 0; from 255 on the noise is below half a step of 8 bits
FEW = 20  # steps of a sampler
GRIDS = {  # name: what is even between the two, from logsnr, and back
    "uniform": (Schedule.inverse, Schedule.logsnr),                         # t
    "logsnr": (lambda schedule, logsnr: logsnr, lambda schedule, logsnr: logsnr),
    "karras": (lambda schedule, logsnr: torch.exp(-logsnr / 14),            # 2206.00364, eq. 5
               lambda schedule, root: -14 * torch.log(root)),
}


def sampling_times(
    schedule: Schedule, steps: int, grid: str = "auto", start: float = 1.0, shift: float = 1.0,
) -> Tensor:
    """Falling times (steps + 1,) from `start` over a last level where eight bits show no noise to
    exactly 0. grid: of GRIDS, or auto: logsnr, the best measured for every sampler; below FEW steps
    uniform with half the shift, since the middle of the noise, where colours are decided, then gets
    more of them. A shift above 1 moves them to the noisy end, below 1 to the clean one (Esser et
    al. 2024, 2403.03206, eq. 23, of the share of steps)."""
    if steps < 1 or not 0 < start <= 1 or not 0 < shift < math.inf:
        raise ValueError(f"{steps} steps (at least 1), start {start} (0..1) or shift {shift} (> 0)")
    if grid == "auto":
        grid = "logsnr"
        if steps < FEW:
            grid = "uniform"
            shift = shift / 2
    u = torch.linspace(1, 0, steps, dtype=torch.float64)
    u = shift * u / (1 + (shift - 1) * u)

    # both ends move out with the steps, so that what they leave falls as their square
    reach = max(1, steps / 25)
    noisy, cleanest = schedule.logsnr(u.new_tensor([start, 1e-7]))
    noisy = noisy.clamp(min=schedule.shift - 2 * math.log(NOISY * reach))
    clean = (noisy + 1).clamp(min=2 * math.log(CLEAN * reach))
    clean = min(clean, cleanest)

    forth, back = GRIDS[grid]
    even = torch.lerp(forth(schedule, clean), forth(schedule, noisy), u)
    times = schedule.inverse(back(schedule, even))
    times[0] = start
    return F.pad(times, (0, 1))


def respaced(spec: str, steps: int = TRAIN_STEPS) -> Tensor:
    """Falling times (i + 1) / steps of some steps i of a process of `steps`, then 0 (2102.09672,
    section 4). "250": evenly spaced; "10,10,20": so many in each equal section; "ddim25": an
    integer stride that gives so many. Warns where the first time is far below 1."""
    if not re.fullmatch(r"ddim[1-9][0-9]*|[1-9][0-9]*(,[1-9][0-9]*)*", spec):
        raise ValueError(f"respacing {spec!r} is not like 250, 10,10,20 or ddim25")
    counts = [int(number) for number in spec.removeprefix("ddim").split(",")]

    strided = spec.startswith("ddim")
    if strided:
        possible = {len(range(0, steps, stride)) for stride in range(1, steps)}
        a, b, *_ = sorted(possible, key=lambda count: abs(count - counts[0]))
        if a != counts[0]:
            raise ValueError(f"respacing {spec!r}: no stride gives it; ddim{a} and ddim{b} work")

    chosen = []
    first = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if count > size:
            raise ValueError(f"respacing {spec!r}: section {section + 1} has only {size} steps")
        stride = math.ceil(size / count) if strided else (size - 1) / max(1, count - 1)
        for step in accumulate([stride] * (count - 1), initial=0.0):
            chosen.append(first + round(step))
        first += size
    times = [(i + 1) / steps for i in reversed(chosen)]
    if times[0] < 0.9:
        warnings.warn(f"respacing {spec} starts at t = {times[0]}, not from noise", stacklevel=2)
    return torch.tensor([*times, 0.0], dtype=torch.float64)


# Samplers: (denoise, x at times[0], times, noise, schedule) -> x at times[-1], at t = 0 an x0 -----

class Level:
    """A noise level of a sampler, in numbers: nothing is copied or waited for inside its loop.
    index: of its step; t: 0-dimensional, on the CPU. t = 0 is exactly clean."""

    def __init__(self, index, t, schedule):
        logsnr = schedule.logsnr(t) if t > 0 else torch.tensor(math.inf)
        alpha, sigma = schedule.scales(logsnr)
        self.index = index
        self.t = t
        self.logsnr = logsnr.item()
        self.alpha = alpha.item()
        self.sigma = sigma.item()
        self.ratio = self.sigma / self.alpha

    def look(self, denoise, x):
        """(x0, eps) of an x at this level."""
        x0 = denoise(x, self.t)
        return x0, (x - self.alpha * x0) / self.sigma

    def follow(self, there, x0, eps, turn=0):
        """x at `there` from (x0, eps) here, along d(x/alpha) / d(sigma/alpha) = eps + turn
        (2202.09778, eq. 11). The turn is added to the DDIM step, instead of to x, since x / alpha
        has no digits near t = 1."""
        length = there.sigma - there.alpha * self.ratio
        return there.alpha * x0 + there.sigma * eps + length * turn

    def relax(self, there, x, x0, eta=0.0):
        """x at `there` from x here, exact for an x0 that stays (2211.01095, eq. 9; by eta, 18)."""
        h = (there.logsnr - self.logsnr) / 2
        x = there.sigma / self.sigma * math.exp(-eta * h) * x
        return x - there.alpha * math.expm1(-(1 + eta) * h) * x0

    def back(self, there, x, noise):
        """x at a noisier level, by the forward process."""
        gain = there.alpha / self.alpha
        variance = there.sigma**2 - (gain * self.sigma) ** 2
        return gain * x + math.sqrt(max(0, variance)) * noise

    def blind(self, there):
        """Whether the step must be an Euler step: eps has no value at t = 0, and from pure noise
        sigma / alpha falls a thousandfold at once, where only the first slope is any good."""
        leap = self.ratio > 10 * there.ratio
        return there.sigma == 0 or (self.index == 0 and leap)


def noise_levels(times: Tensor, schedule: Schedule) -> list[Level]:
    """One for each of the times. Raises ValueError where they do not fall within 1 and 0."""
    times = times.to("cpu", torch.float64)
    row = times.ndim == 1 and len(times) >= 2
    falls = row and bool((times.diff() < 0).all())
    if not falls or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times {times.tolist()[:8]} do not fall, or not within 1 and 0")
    return [Level(index, t, schedule) for index, t in enumerate(times)]


def levels_at(logsnr: list[float], schedule: Schedule) -> list[Level]:
    """One for each of some logsnr, between the times of a sampler."""
    times = schedule.inverse(torch.tensor(logsnr, dtype=torch.float64))
    return [Level(index, t, schedule) for index, t in enumerate(times)]


def nll(
    denoise: Callable, x0: Tensor, times: Tensor, noise: Callable, schedule: Schedule,
    variance: float | Callable = 0.0,
) -> Tensor:
    """Upper bound of -log2 p(x0) in bits per dimension (B,): prior, steps and decoder (2006.11239,
    eq. 5). Let the noise before t = 0 be about 1/255: below it each halving costs a bit, unless the
    network knows of the 256 values."""
    levels = noise_levels(times, schedule)
    alpha, sigma = schedule.alpha_sigma(levels[0].t)
    prior = (alpha * x0) ** 2 + sigma**2 - 1 - 2 * torch.log(sigma)
    total = (0.5 * prior / math.log(2)).mean(inner(x0))
    for here, there in pairwise(levels):
        x_t = noised(x0, noise(here.index), here.t, schedule)
        guess = denoise(x_t, here.t)
        fraction = variance() if callable(variance) else variance
        total = total + variational_bits(x0, x_t, guess, fraction, there.t, here.t, schedule)
    return total


def ddim(denoise, x, times, noise, schedule, eta=0.0, variance=0.0):
    """DDIM (Song et al. 2020, 2010.02502, eq. 12 and 16): eta 0 is deterministic, eta 1 is
    ancestral DDPM. variance: where the log variance of the fresh noise is between the posterior's
    (0, "small") and the forward step's (1, "large"), or a function that tells it after each call,
    see LearnedVariance."""
    for here, there in pairwise(noise_levels(times, schedule)):
        x0, eps = here.look(denoise, x)
        lost = -math.expm1(here.logsnr - there.logsnr)
        fresh = eta * there.sigma * math.sqrt(lost)
        x = there.alpha * x0 + math.sqrt(there.sigma**2 - fresh**2) * eps
        if fresh:
            fraction = variance() if callable(variance) else variance
            x = x + fresh * (here.sigma / there.sigma) ** fraction * noise(here.index)
    return x


def heun(denoise, x, times, noise, schedule, churn=0.0):
    """Heun in sigma / alpha (Karras et al. 2022, 2206.00364, alg. 1): order 2, two calls a step.
    churn: how much fresh noise all steps add, each going back a little before it is taken (alg. 2,
    there S_churn; at most 0.41 of sigma / alpha a step)."""
    levels = noise_levels(times, schedule)
    gamma = min(churn / (len(levels) - 1), 2**0.5 - 1)
    raised = [level.logsnr - 2 * math.log1p(gamma) for level in levels]
    for here, up, there in zip(levels, levels_at(raised, schedule), levels[1:]):
        if gamma:
            x = here.back(up, x, noise(here.index))
            here = up
        x0, eps = here.look(denoise, x)
        x = here.follow(there, x0, eps)
        if not here.blind(there):
            _, ahead = there.look(denoise, x)
            x = here.follow(there, x0, eps, turn=(ahead - eps) / 2)
    return x


def prk(denoise, x, times, noise, schedule):
    """Pseudo Runge-Kutta (Liu et al. 2022, 2202.09778, eq. 14): fourth order, four calls a step.
    The middle of a step is halfway in sigma / alpha: halfway in t the order would be 2."""
    levels = noise_levels(times, schedule)
    steps = list(pairwise(levels))
    halfway = [-2 * math.log((here.ratio + there.ratio) / 2) for here, there in steps]
    for (here, there), middle in zip(steps, levels_at(halfway, schedule)):
        x0, e1 = here.look(denoise, x)
        if here.blind(there):
            x = here.follow(there, x0, e1)
            continue
        x = here.follow(middle, x0, e1)
        _, e2 = middle.look(denoise, x)
        x = here.follow(middle, x0, e1, turn=e2 - e1)
        _, e3 = middle.look(denoise, x)
        x = here.follow(there, x0, e1, turn=e3 - e1)
        _, e4 = there.look(denoise, x)
        mean = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        x = here.follow(there, x0, e1, turn=mean - e1)
    return x


ADAMS_BASHFORTH = [
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
]


def plms(denoise, x, times, noise, schedule):
    """Pseudo linear multi-step (Liu et al. 2022, 2202.09778, eq. 12): Adams-Bashforth on eps, a
    call a step. The order rises from 1 to 4 over the first steps, so no other method is needed.
    Fourth order where steps are equal in sigma / alpha, second elsewhere. The last step returns the
    x0 of the combined eps."""
    history = []
    for here, there in pairwise(noise_levels(times, schedule)):
        x0, eps = here.look(denoise, x)
        history = [eps, *history[:3]]
        weights = ADAMS_BASHFORTH[len(history) - 1]
        combined = sum(weight * each for weight, each in zip(weights, history))
        x = here.follow(there, x0, eps, turn=combined - eps)
    return x


def dpmpp_2m(denoise, x, times, noise, schedule, eta=0.0):
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2): second order, one call a step.
    eta 1 is SDE-DPM-Solver++(2M) (eq. 18). The first step and the last one, to t = 0, are of first
    order."""
    before = h_before = None
    for here, there in pairwise(noise_levels(times, schedule)):
        x0 = denoise(x, here.t)
        if there.sigma == 0:
            return x0

        h = there.logsnr - here.logsnr
        rise = (x0 - before) * (h / 2 / h_before) if h_before else 0.0
        x = here.relax(there, x, x0 + rise, eta)
        if eta:
            fresh = there.sigma * math.sqrt(-math.expm1(-eta * h))
            x = x + fresh * noise(here.index)
        before = x0
        h_before = h
    return x


def unipc(denoise, x, times, noise, schedule):
    """UniPC-2, B(h) = e^h - 1 (Zhao et al. 2023, 2302.04867, alg. 5-8): DPM-Solver++(2M) with a
    corrector. The call at the predicted x serves its correction and the next prediction, so it is
    one a step."""
    start = before = last = None  # of the last step: x, x0 and the level where it began,
    rise = h = ratio = 0.0  # how x0 was to rise, its h, and the h before it over h
    for here, there in pairwise(noise_levels(times, schedule)):
        x0 = denoise(x, here.t)
        if there.sigma == 0:
            return x0

        if last:  # correct x: the last step again, now knowing x0 at its end
            phi_1 = math.expm1(-h)
            phi_2 = phi_1 / -h - 1
            b1 = phi_2 / phi_1
            b2 = 2 * (phi_2 / -h - 0.5) / phi_1
            gap = x0 - before
            bend = ((b1 - b2) * 2 * rise + (b1 * ratio + b2) * gap) / (1 + ratio)
            if ratio == 0:
                bend = gap / 2
            x = last.relax(here, start, before + bend)

        ratio = h
        h = (there.logsnr - here.logsnr) / 2
        ratio = ratio / h
        if last:
            rise = (x0 - before) / (2 * ratio)
        last = here
        start = x
        before = x0
        x = here.relax(there, x, x0 + rise)
    return x


# Euler in sigma / alpha or in t of flow is DDIM; with eta 1, DDPM (2006.11239) and Euler ancestral.
ddpm = partial(ddim, eta=1.0)
SAMPLERS = {
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0),
    "unipc": unipc,
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": ddim,
    "euler_ancestral": ddpm,
    "heun": heun,
    "plms": plms,
    "prk": prk,
}


# Editing, with any sampler ------------------------------------------------------------------------
# Image to image (SDEdit, 2108.01073) is a sampler from noised(x0, eps, t, ...), on times from t.

def inpaint(
    sampler: Callable, denoise: Callable, x: Tensor, times: Tensor, noise: Callable,
    schedule: Schedule, known: Tensor, keep: Tensor, resample: int = 1, jump: int = 10,
) -> Tensor:
    """Fill in a picture: known (B, C, H, W) stays where keep (B, 1, H, W) is 1 or True; where it is
    between 0 and 1, until t falls to 1 - keep of the first time (Levin & Fried 2023, 2306.00950).
    The denoiser says the known x0, so under any sampler x_t there follows the forward process of
    the picture. With `resample` above 1 every `jump` steps are taken so many times, going back by
    the forward process in between, so that both parts agree (RePaint: Lugmayr et al. 2022,
    2201.09865, algorithm 1)."""
    if known.shape != x.shape or keep.shape[-2:] != x.shape[-2:]:
        raise ValueError(f"mask {[*keep.shape]} or {[*known.shape]} does not fit {[*x.shape]}")
    if resample < 1 or jump < 1:
        raise ValueError(f"resample {resample} and jump {jump} must be at least 1")
    if resample == 1:
        jump = len(times)  # in one go: a new start would take a multistep sampler its history

    def anchored(x_t, t):
        return torch.where(keep > 1 - t / times[0], known, denoise(x_t, t))

    drawn = 0
    for first in range(0, len(times) - 1, jump):
        part = times[first:first + jump + 1]
        high, *_, low = noise_levels(part, schedule)
        for visit in range(resample):
            if visit > 0:
                x = low.back(high, x, noise(drawn - 1))
            x = sampler(anchored, x, part, lambda i, drawn=drawn: noise(drawn + i), schedule)
            drawn += len(part)
    return torch.where(keep >= 1, known, x) if times[-1] == 0 else x
