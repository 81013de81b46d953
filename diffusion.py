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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGSNR_MAX = 20.0  # schedules are clamped to +-20: sigma(0) = alpha(1) = 4.5e-5, far below 1/255
TRAIN_STEPS = 1000  # of the discrete processes of the literature: step i is t = (i + 1) / 1000
Curve = Callable[[Tensor], Tensor]  # logsnr(t)
LossWeight = Literal["uniform", "min_snr", "soft_min_snr", "sigmoid", "p2", "edm", "learned"]


@dataclass
class DiffusionConfig:
    schedule: Literal["cosine", "linear", "scaled_linear", "sigmoid", "flow", "edm"] = "cosine"  # of noise
    shift_base: int = 64  # picture side at which the schedule is not shifted, 0 = never shift [pixels]
    zero_snr: bool = False  # rescale linear or scaled_linear so that no signal is left at t = 1
    prediction: Literal["v", "eps", "x0", "flow"] = "v"  # what the network predicts
    learn_sigma: bool = False  # predict the variance of a step too, for the ddpm sampler (twice the outputs)
    loss_weight: LossWeight = "uniform"  # by noise level; uniform: 1 on the error of what is predicted
    snr_gamma: float = 5.0  # ceiling of min_snr and soft_min_snr [signal-to-noise ratio]
    sigmoid_bias: float = 2.0  # middle of the sigmoid weight [-100..100 logsnr]
    t_density: Literal["uniform", "logit_normal", "log_normal", "importance"] = "uniform"  # density of t
    t_mean: float = 0.0  # of logit_normal, in logit t; of log_normal, in ln sigma/alpha (EDM: -1.2) [-100..100]
    t_std: float = 1.0  # of logit_normal and log_normal (EDM: 1.2) [0..100]


class Pixels:
    """The space in which pictures themselves are diffused: [-1, 1], `channels` of them.
    scale: pixels of a picture per position; limit: what a prediction is clipped to, None = not
    clipped."""

    scale = 1
    limit = 1.0

    def __init__(self, channels: int = 3):
        self.channels = channels

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


Device = torch.device | str | None


def gaussian(keys: Tensor, shape: tuple[int, ...], device: Device = None) -> Tensor:
    """Standard normal noise from (key, element index) alone, so it is the same for every split of
    the batch. Counter-based (Salmon et al. 2011): splitmix64 of key and counter, then Box-Muller,
    two normals a hash. keys (B,) int64, shape without B -> (B, *shape) float32 within +-6.8.
    Devices agree but for rounding."""
    keys = keys.to(device or keys.device)
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


def noise_source(keys: Tensor, shape: tuple[int, ...], device: Device = None) -> Callable:
    """noise(step) -> (B, *shape) for samplers: independent for each step, and of gaussian(keys)."""
    keys = mix(keys.to(device or keys.device))  # once: a copy in a sampler's loop stops the device
    return lambda step: gaussian(keys + step, shape)


# Schedules: t -> logsnr -> (alpha, sigma) ---------------------------------------------------------

def expand(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    ones = [1] * (x.ndim - 1)
    return value.view(-1, *ones)


class Schedule:
    """A falling function logsnr(t): a curve, shifted by the picture's size, within +-LOGSNR_MAX.
    Variance preserving: alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr).
    Flow: alpha = sigmoid(logsnr/2), sigma = sigmoid(-logsnr/2), so 1 - t and t where not shifted.
    At equal logsnr the x_t of the two differ by a factor only (Kingma & Gao 2023, 2303.00848,
    section 2)."""

    def __init__(self, curve: Curve, shift: float = 0.0, flow: bool = False):
        self.curve = curve
        self.shift = shift
        self.flow = flow

    def logsnr(self, t: Tensor) -> Tensor:
        logsnr = self.curve(t) + self.shift
        return logsnr.clamp(-LOGSNR_MAX, LOGSNR_MAX)

    def alpha_sigma(self, t: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of t (B,): (B,) each, or (B, 1, ..., 1) where x (B, ...) is what they multiply."""
        logsnr = self.logsnr(t)
        if x is not None:
            logsnr = expand(logsnr, x)
        if self.flow:
            return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)
        alpha = torch.sigmoid(logsnr).sqrt()
        sigma = torch.sigmoid(-logsnr).sqrt()
        return alpha, sigma

    def inverse(self, logsnr: Tensor) -> Tensor:
        """The t of a logsnr, by bisection to the last bits of the dtype, without reading back."""
        low = torch.zeros_like(logsnr)
        high = torch.ones_like(logsnr)
        halvings = 52 if logsnr.dtype == torch.float64 else 30
        for _ in range(halvings):
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
    nodes = [
        (-0.7745966692414834, 5 / 18),
        (0.0, 8 / 18),
        (0.7745966692414834, 5 / 18),
    ]

    def curve(t):
        mean = 0.0
        for node, weight in nodes:
            j = TRAIN_STEPS * t * ((1 + node) / 2) - 0.5
            beta = (low + rise * j) ** power
            mean = mean + weight * torch.log1p(-beta)
        return -log(torch.expm1(-TRAIN_STEPS * t * mean))

    return curve


def log(x: Tensor) -> Tensor:
    return torch.log(x.clamp(min=1e-9))


CURVES = {  # name: logsnr(t), before shift and clamp
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
        lost = lost.clamp(1e-9, 1 - 1e-9)
        return 2 * torch.log(1 - lost) - torch.log(lost * (2 - lost))

    return rescaled_curve


def make_schedule(config: DiffusionConfig, size: int) -> Schedule:
    """The schedule for pictures of `size` pixels, shifted by 2 ln(shift_base / size).
    The same noise hides less of a large picture (Hoogeboom et al. 2023, 2301.11093, eq. 4; for
    flow, Esser et al. 2024, 2403.03206, eq. 23). Raises ValueError on an unknown name or an
    impossible size."""
    if config.schedule == "quadratic":
        raise ValueError("schedule 'quadratic' leaves 3% of the signal at t = 1: use scaled_linear "
                         "(the same formula) with zero_snr")
    if config.schedule not in CURVES:
        raise ValueError(f"schedule {config.schedule!r} is not one of {', '.join(CURVES)}")
    if size < 1 or config.shift_base < 0:
        raise ValueError(f"picture size {size} or shift_base {config.shift_base} is too small")

    curve = CURVES[config.schedule]
    if config.zero_snr:
        curve = zero_terminal_snr(curve)
    shift = 2 * math.log(config.shift_base / size) if config.shift_base else 0.0
    return Schedule(curve, shift, flow=config.schedule == "flow")


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


def posterior(schedule: Schedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q(x_s | x_t, x0), s < t (2107.00630, eq. 25) as (of_x0, of_x_t, log_small, log_large).
    Mean of_x0 x0 + of_x_t x_t, log variance log_small; log_large is that of q(x_t | x_s), an upper
    bound. The variance is 0 at s = 0, where that of the step before, from 2t to t, stands in (as in
    2102.09672)."""
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    before = (2 * t).clamp(max=1)
    logsnr = schedule.logsnr(t)
    lost = -torch.expm1(logsnr - schedule.logsnr(s))  # 1 - SNR_t / SNR_s
    lost_before = -torch.expm1(schedule.logsnr(before) - logsnr)

    log_large = 2 * torch.log(sigma_t) + torch.log(lost)
    log_before = 2 * torch.log(sigma_t) + torch.log(lost_before)
    log_small = 2 * torch.log(sigma_s) + torch.log(lost)
    log_small = torch.where(s == 0, log_before, log_small)
    return alpha_s * lost, alpha_s / alpha_t * (1 - lost), log_small, log_large


# Likelihood in bits per dimension -----------------------------------------------------------------

def decoder_bits(x0: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log2 of a normal's mass in the bin of an 8-bit x0, outer bins open (2006.11239, eq. 13)."""
    half = 1 / 255
    std = torch.exp(log_var / 2)
    ndtr = torch.special.ndtr
    below = ndtr((x0 + half - mean) / std)
    above = ndtr((mean - x0 + half) / std)
    sign = torch.where(x0 > mean, -1, 1)
    centre = (x0 - mean) * sign  # the lower tail is where float32 keeps small masses
    mass = ndtr((centre + half) / std) - ndtr((centre - half) / std)
    mass = torch.where(x0 < -0.999, below, mass)
    mass = torch.where(x0 > 0.999, above, mass)
    return -torch.log2(mass.clamp(min=1e-12))


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
    return bits.flatten(1).mean(1)


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
            return schedule.inverse(schedule.shift - 2 * normal)
    raise ValueError(f"t_density {config.t_density!r} is not uniform, logit_normal or log_normal")


class Importance(nn.Module):
    """t in proportion to the root of the loss's second moment (Nichol & Dhariwal 2021, 2102.09672,
    eq. 18). A running second moment for each of `buckets` equal parts of t. `update` takes the sums
    over all ranks of `bucket_sums(loss**2, t, buckets)`, so the state depends neither on their
    number nor on the order."""

    def __init__(self, buckets: int = 100, decay: float = 0.98):
        super().__init__()
        self.decay = decay  # per sample
        self.register_buffer("second_moment", torch.ones(buckets))

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (B,) in [0, 1) -> t (B,), and what its loss weighs: 1 / density keeps the mean."""
        root = self.second_moment.sqrt()
        density = 0.999 * root / root.mean() + 0.001                        # (buckets,), of mean 1
        buckets = len(density)
        edges = torch.cumsum(density, 0) / buckets

        bucket = torch.searchsorted(edges, u.float().contiguous(), right=True)
        bucket = bucket.clamp(max=buckets - 1)
        height = density[bucket]
        inside = 1 - (edges[bucket] - u) * buckets / height
        t = (bucket + inside) / buckets
        return t.clamp(0, 1), 1 / height

    def update(self, square: Tensor, count: Tensor) -> None:
        mean = square / count.clamp(min=1)
        self.second_moment.lerp_(mean, 1 - self.decay**count)


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
                total = schedule.logsnr(t).sum()
                slope = torch.autograd.grad(total, t)[0]
            weight = snr * torch.sigmoid(config.sigmoid_bias - logsnr)
            return weight * slope / (-2 * math.pi)
        case "p2":
            return torch.sigmoid(logsnr)
        case "edm":
            return snr + 4  # 4 = 1 / sigma_data^2, sigma_data = 0.5 for pictures in [-1, 1]
    raise ValueError(f"loss_weight {config.loss_weight!r} is unknown")


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over all but the batch, (B,)."""
    return (a - b).square().flatten(1).mean(1)


def losses(
    model: Callable, x0: Tensor, eps: Tensor, t: Tensor,
    schedule: Schedule, config: DiffusionConfig,
    uncertainty: Uncertainty | None = None, limit: float | None = 1.0,
    **condition,
) -> tuple[Tensor, Tensor]:
    """Per-sample loss, (weighted (B,), raw (B,)) float32: one to be minimised, one to be compared.
    raw is the mean squared error of the x0 that is meant, clipped to +-limit as samplers do (None:
    not): one unit for all targets and schedules, at most 4 limit^2. Unclipped, eps would divide by
    alpha at the noisy end; the error of v or eps multiplies that of x0 by 1 + SNR at the clean one.
    uniform weighs the prediction's error by 1, learned by e^-u, plus u. learn_sigma adds the
    variational term of a step of 1/1000 in bits per dimension, which trains the variance only
    (Nichol & Dhariwal 2021, 2102.09672, eq. 16, lambda 1/1000)."""
    channels = x0.shape[1]
    alpha, sigma = schedule.alpha_sigma(t, x0)
    x_t = alpha * x0 + sigma * eps                                          # (B, C, H, W)
    output = model(x_t, t, **condition).float()                             # (B, C or 2C, H, W)
    head = output[:, channels:]
    output = output[:, :channels]

    a, b = TARGETS[config.prediction](alpha, sigma)
    target = x0
    guess = output.detach()
    if config.prediction != "x0":  # where it is the same, with more passes over the pictures
        target = a * x0 + b * eps
        guess = x0_eps(guess, x_t, alpha, sigma, config.prediction)[0]
    clipped = guess if limit is None else guess.clamp(-limit, limit)
    raw = squared_error(clipped, x0)

    weighted = squared_error(output, target)
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
    if config.loss_weight == "learned":
        u = uncertainty(schedule.logsnr(t))
        weighted = weighted * torch.exp(-u) + u
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


# Denoisers: denoise(x_t (B, ...), t (B,)) -> x0 (B, ...) float32 ----------------------------------

def denoiser(
    model: Callable, schedule: Schedule, config: DiffusionConfig, condition: dict,
) -> Callable:
    """The network as a denoiser under one condition; channels beyond those of x_t are left out."""
    def denoise(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t, x_t)
        output = model(x_t, t, **condition).float()
        output = output[:, :x_t.shape[1]]
        return x0_eps(output, x_t, alpha, sigma, config.prediction)[0]

    return denoise


class LearnedVariance:
    """A network with learn_sigma that remembers its variance: `ddim(..., variance=lambda:
    net.fraction[:B])`. The condition's rows come first in a guided batch, so guidance never
    extrapolates a variance."""

    def __init__(self, model: Callable):
        self.model = model
        self.fraction = None

    def __call__(self, x_t: Tensor, t: Tensor, **condition) -> Tensor:
        output = self.model(x_t, t, **condition)
        head = output[:, x_t.shape[1]:]
        self.fraction = (head.float() + 1) / 2
        return output


def unconditional(condition: dict) -> dict:
    """The condition with its text hidden (mask all False); the low-resolution picture stays."""
    return {**condition, "mask": torch.zeros_like(condition["mask"])}


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
        x0 = together(torch.cat([x_t] * rows), torch.cat([t] * rows))
        *conds, uncond = x0.chunk(rows)
        cond = sum(weight * each for weight, each in zip(weights, conds))
        return cond + (1 - sum(weights)) * uncond, uncond

    return pair


def guidance(
    pair: Callable, guidance_scale: float,
    interval: tuple[float, float] = (0.0, 1.0), combine: Callable = torch.lerp,
) -> Callable:
    """x0 = uncond + w (cond - uncond), w = guidance_scale where t is in the interval, else 1.
    `pair(x_t, t)` -> (cond, uncond): `branches` (classifier-free, Ho & Salimans 2022, 2207.12598,
    eq. 6) or `lambda x_t, t: (good(x_t, t), bad(x_t, t))` (autoguidance, Karras et al. 2024,
    2406.02507). The interval (Kynkaanniemi et al. 2024, 2404.07724) saves no call: looking at t
    would stop the device. `combine(uncond, cond, w)` is torch.lerp, rescaled(phi) or
    projected(...)."""
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale {guidance_scale} is not finite and at least 0 (1 = none)")
    first, last = interval
    if not 0 <= first < last <= 1:
        raise ValueError(f"guidance interval {interval} is not two rising times within 0 and 1")

    def denoise(x_t, t):
        cond, uncond = pair(x_t, t)
        inside = (t >= first) & (t <= last)
        w = torch.where(inside, guidance_scale, 1.0).to(cond)
        return combine(uncond, cond, expand(w, cond))

    return denoise


def guided(
    model: Callable, schedule: Schedule, config: DiffusionConfig, condition: dict,
    guidance_scale: float, negative: dict | None = None, weak: Callable | None = None,
    **options,
) -> Callable:
    """Guidance of one condition: one call, of B rows when guidance_scale is 1, else 2B. `negative`,
    that of a negative prompt, replaces the empty one; `weak`, a denoiser, both (autoguidance).
    options: guidance's."""
    good = denoiser(model, schedule, config, condition)
    if guidance_scale == 1:
        return good

    def beside_weak(x_t, t):
        return good(x_t, t), weak(x_t, t)

    negative = negative or unconditional(condition)
    empty = branches(model, schedule, config, [condition], [1.0], negative)
    return guidance(beside_weak if weak else empty, guidance_scale, **options)


def rescaled(phi: float = 0.7, inner: Callable = torch.lerp) -> Callable:
    """x0 of `inner` rescaled by phi to the deviation of cond (2305.08891, eq. 15-16, for v)."""
    def combine(uncond, cond, w):
        x0 = inner(uncond, cond, w)
        deviation = x0.flatten(1).std(1).clamp(min=1e-6)
        ratio = cond.flatten(1).std(1) / deviation
        return x0 * expand(1 + phi * (ratio - 1), x0)

    return combine


def projected(limit: float = 15.0, parallel: float = 0.0, momentum: float = -0.5) -> Callable:
    """Adaptive projected guidance (Sadat et al. 2024, 2410.02416, algorithm 1): strong without
    saturation. The part of the push along cond is scaled by `parallel`, its norm is at most
    `limit`, it has a negative momentum from step to step: make a new one for each run of a
    sampler."""
    average = 0.0

    def norm(x):
        length = x.flatten(1).norm(dim=1)
        return expand(length, x).clamp(min=1e-6)

    def combine(uncond, cond, w):
        nonlocal average
        average = cond - uncond + momentum * average
        push = average * (limit / norm(average)).clamp(max=1)
        unit = cond / norm(cond)
        length = (push * unit).flatten(1).sum(1)
        along = expand(length, cond) * unit
        return cond + (w - 1) * (push - along + parallel * along)

    return combine


def classifier_guidance(
    denoise: Callable, log_prob: Callable, schedule: Schedule, scale: float,
) -> Callable:
    """x0 + scale sigma^2 / alpha grad log p(y | x_t) (Dhariwal & Nichol 2021, 2105.05233, algorithm
    2). `log_prob(x_t, t)` -> (B,). The factor is large near t = 1: put a threshold around it."""
    def pushed(x_t, t):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            total = log_prob(x, t).sum()
            gradient = torch.autograd.grad(total, x)[0]
        alpha, sigma = schedule.alpha_sigma(t, x_t)
        return denoise(x_t, t) + scale * sigma**2 / alpha * gradient

    return pushed


def threshold(
    denoise: Callable, percentile: float | None = None, limit: float | None = 1.0,
) -> Callable:
    """x0 clipped to +-s, over s / limit: s = limit, or max(limit, percentile of |x0|) of each
    picture (2205.11487, 2.3). limit None: the denoiser as it is. The percentile, in (0, 1], is that
    of torch.quantile, which refuses more than 16 million numbers."""
    if limit is None:
        return denoise
    if percentile is None:
        return lambda x_t, t: denoise(x_t, t).clamp(-limit, limit)
    if not 0 < percentile <= 1:
        raise ValueError(f"threshold percentile {percentile} is not in (0, 1]")

    def thresholded(x_t, t):
        x0 = denoise(x_t, t)
        ranked = x0.flatten(1).abs().sort(dim=1).values
        rank = percentile * (ranked.shape[1] - 1)
        below = ranked[:, math.floor(rank)]
        above = ranked[:, math.ceil(rank)]
        s = torch.lerp(below, above, rank - math.floor(rank))
        s = expand(s.clamp(min=limit), x0)
        return x0.clamp(-s, s) / (s / limit)

    return thresholded


# Times of a sampler: falling, in [0, 1] -----------------------------------------------------------

def time_grid(steps: int, start: float = 1.0) -> Tensor:
    """Falling times (steps + 1,) from `start` to exactly 0, uniform in t."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: at least 1 is needed")
    if not 0 < start <= 1:
        raise ValueError(f"start time {start} is not in (0, 1]")
    return torch.linspace(start, 0, steps + 1, dtype=torch.float64)


def logsnr_grid(steps: int, schedule: Schedule, start: float = 1.0) -> Tensor:
    """Falling times (steps + 1,) from `start` to exactly 0, uniform in logsnr within +-8 before the
    shift. For dpmpp_2m and unipc, which are polynomials in logsnr; ddim and plms do better on
    `time_grid`. At logsnr 8 the noise is 2.3 of 255."""
    times = time_grid(steps, start)
    first = schedule.logsnr(times[:1]).clamp(min=schedule.shift - 8)
    last = (first + 1).clamp(min=schedule.shift + 8)
    inner = torch.lerp(first, last, 1 - time_grid(steps)[1:-1])
    return torch.cat([times[:1], schedule.inverse(inner), times[-1:]])


def respaced(spec: str, steps: int = TRAIN_STEPS) -> Tensor:
    """Falling times (i + 1) / steps of some steps i of a process of `steps`, then 0 (2102.09672,
    section 4). "250": evenly spaced; "10,10,20": so many in each equal section; "ddim25": an
    integer stride."""
    if not re.fullmatch(r"ddim[0-9]+|[0-9]+(,[0-9]+)*", spec):
        raise ValueError(f"respacing {spec!r} is not like 250, 10,10,20 or ddim25")
    counts = [int(number) for number in spec.removeprefix("ddim").split(",")]
    sections = len(counts)

    chosen = []
    for section, count in enumerate(counts):
        first = steps * section // sections
        size = steps * (section + 1) // sections - first
        if not 1 <= count <= size:
            raise ValueError(f"respacing {spec!r} takes 0 or too many of {steps}/{sections} steps")
        for i in range(count):
            step = round(i * (size - 1) / max(1, count - 1))
            if spec.startswith("ddim"):
                step = i * (size // count)
            chosen.append(first + step)
    times = [(i + 1) / steps for i in reversed(chosen)]
    return torch.tensor([*times, 0.0], dtype=torch.float64)


# Samplers: (denoise, x at times[0], times, noise, schedule) -> x at times[-1], at t = 0 an x0 -----

@dataclass
class Level:
    """A noise level of a sampler, in numbers: nothing is copied or waited for inside its loop."""

    index: int
    t: Tensor  # (B,) on the device of x
    alpha: float
    sigma: float
    logsnr: float

    def look(self, denoise, x):
        """(x0, eps) of an x at this level."""
        x0 = denoise(x, self.t)
        return x0, (x - self.alpha * x0) / self.sigma

    def follow(self, there, x0, eps, turn=0):
        """x at `there` from (x0, eps) here, along d(x/alpha) / d(sigma/alpha) = eps + turn
        (2202.09778, eq. 11). The turn is added to the DDIM step, instead of to x, since x / alpha
        has no digits near t = 1."""
        length = there.sigma - there.alpha * self.sigma / self.alpha
        return there.alpha * x0 + there.sigma * eps + length * turn

    def relax(self, there, x, x0, eta=0.0):
        """x at `there` from x here, exact for an x0 that stays (2211.01095, eq. 9; by eta, 18)."""
        h = (there.logsnr - self.logsnr) / 2
        x = there.sigma / self.sigma * math.exp(-eta * h) * x
        return x - there.alpha * math.expm1(-(1 + eta) * h) * x0

    def blind(self, there):
        """Whether the step must be an Euler step: eps has no value at t = 0, and from pure noise
        sigma / alpha falls a thousandfold at once, where only the first slope is any good."""
        leap = self.sigma * there.alpha > 10 * there.sigma * self.alpha
        return there.sigma == 0 or (self.index == 0 and leap)


def noise_levels(x: Tensor, times: Tensor, schedule: Schedule) -> list[Level]:
    """One for each of the times; t = 0 is exactly clean: alpha 1, sigma 0, logsnr inf.
    Raises ValueError where the times are not a row that falls within 1 and 0."""
    times = times.detach().to("cpu", torch.float64)
    row = times.ndim == 1 and len(times) >= 2
    falling = row and bool((times.diff() < 0).all())
    if not falling or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times {times.tolist()[:8]} do not fall, or not within 1 and 0")

    alpha, sigma = schedule.alpha_sigma(times)
    logsnr = schedule.logsnr(times)
    if times[-1] == 0:
        alpha[-1] = 1
        sigma[-1] = 0
        logsnr[-1] = math.inf

    t = times.to(x)[:, None].expand(-1, len(x))
    rows = zip(t, alpha.tolist(), sigma.tolist(), logsnr.tolist())
    return [Level(index, *row) for index, row in enumerate(rows)]


def nll(
    denoise: Callable, x0: Tensor, times: Tensor, noise: Callable, schedule: Schedule,
    variance: float | Callable = 0.0,
) -> Tensor:
    """Upper bound of -log2 p(x0) in bits per dimension (B,): prior, steps and decoder (2006.11239,
    eq. 5)."""
    levels = noise_levels(x0, times, schedule)
    alpha, sigma = schedule.alpha_sigma(levels[0].t, x0)
    prior = (alpha * x0) ** 2 + sigma**2 - 1 - 2 * torch.log(sigma)
    total = (0.5 * prior / math.log(2)).flatten(1).mean(1)
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
    for here, there in pairwise(noise_levels(x, times, schedule)):
        x0, eps = here.look(denoise, x)
        lost = -math.expm1(here.logsnr - there.logsnr)
        fresh = eta * there.sigma * math.sqrt(lost)
        x = there.alpha * x0 + math.sqrt(there.sigma**2 - fresh**2) * eps
        if fresh:
            fraction = variance() if callable(variance) else variance
            x = x + fresh * (here.sigma / there.sigma) ** fraction * noise(here.index)
    return x


def heun(denoise, x, times, noise, schedule):
    """Heun in sigma / alpha (Karras et al. 2022, 2206.00364, alg. 1): order 2, two calls a step."""
    for here, there in pairwise(noise_levels(x, times, schedule)):
        x0, eps = here.look(denoise, x)
        x = here.follow(there, x0, eps)
        if not here.blind(there):
            _, ahead = there.look(denoise, x)
            x = here.follow(there, x0, eps, turn=(ahead - eps) / 2)
    return x


def prk(denoise, x, times, noise, schedule):
    """Pseudo Runge-Kutta (Liu et al. 2022, 2202.09778, eq. 14): fourth order, four calls a step.
    The middle of a step is halfway in sigma / alpha: halfway in t the order would be 2."""
    ratio = [level.sigma / level.alpha for level in noise_levels(x, times, schedule)]
    times = times.to("cpu", torch.float64)
    halfway = times.new_tensor([(a + b) / 2 for a, b in pairwise(ratio)])
    halfway = schedule.inverse(-2 * torch.log(halfway))
    times = torch.cat([times, halfway]).sort(descending=True).values

    levels = noise_levels(x, times, schedule)
    for (here, there), middle in zip(pairwise(levels[::2]), levels[1::2]):
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
    for here, there in pairwise(noise_levels(x, times, schedule)):
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
    for here, there in pairwise(noise_levels(x, times, schedule)):
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
    for here, there in pairwise(noise_levels(x, times, schedule)):
        x0 = denoise(x, here.t)
        if there.sigma == 0:
            return x0

        if last:  # correct x: the last step again, now knowing x0 at its end
            phi_1 = math.expm1(-h)
            phi_2 = phi_1 / -h - 1
            b1 = phi_2 / phi_1
            b2 = 2 * (phi_2 / -h - 0.5) / phi_1
            behind = (b1 - b2) / (1 + ratio)
            front = (b1 * ratio + b2) / (1 + ratio) if ratio else 0.5
            bend = behind * 2 * rise + front * (x0 - before)
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
SAMPLERS = {
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0),
    "unipc": unipc,
    "ddim": ddim,
    "ddpm": partial(ddim, eta=1.0),
    "euler": ddim,
    "euler_ancestral": partial(ddim, eta=1.0),
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
    """Fill in a picture: known (B, C, H, W) stays where keep (B, 1, H, W) bool is True.
    The denoiser says the known x0, so under any sampler x_t there follows the forward process of
    the picture. Every `jump` steps are taken `resample` times, going back by the forward process in
    between, so that both parts agree (RePaint: Lugmayr et al. 2022, 2201.09865, algorithm 1)."""
    if known.shape != x.shape or keep.shape[-2:] != x.shape[-2:]:
        sizes = f"{[*keep.shape]} or picture {[*known.shape]} does not fit {[*x.shape]}"
        raise ValueError(f"mask {sizes}")
    if resample < 1 or jump < 1:
        raise ValueError(f"resample {resample} and jump {jump} must be at least 1")

    def anchored(x_t, t):
        return torch.where(keep, known, denoise(x_t, t))

    drawn = 0
    for first in range(0, len(times) - 1, jump):
        part = times[first:first + jump + 1]
        high, *_, low = noise_levels(x, part, schedule)
        back = high.alpha / low.alpha
        spread = math.sqrt(high.sigma**2 - (back * low.sigma) ** 2)
        for visit in range(resample):
            if visit > 0:
                x = back * x + spread * noise(drawn - 1)
            x = sampler(anchored, x, part, lambda i, drawn=drawn: noise(drawn + i), schedule)
            drawn += len(part)
    return torch.where(keep, known, x) if times[-1] == 0 else x
