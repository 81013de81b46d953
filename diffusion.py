"""Diffusion: noise schedules, targets, losses, guidance, samplers, in terms of logsnr and (alpha_t, sigma_t).

    x_t = alpha_t x0 + sigma_t eps      logsnr = ln(alpha_t^2 / sigma_t^2)      t = 0 clean, t = 1 pure noise

A network is any `model(x_t, t, **condition)`, a denoiser any `denoise(x_t, t) -> x0`; nothing here knows of
U-Nets or text. Guidance and thresholds are functions that return a denoiser, which a sampler uses.

Shapes: B batch, C channels, H W picture, N sampling steps.
x0, x_t, eps (B, C, H, W), or any (B, ...), float32; t, logsnr (B,) float32; times (N+1,) float64 on the CPU.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

LOGSNR_MAX = 20.0  # schedules are clamped to +-20, where sigma(0) = alpha(1) = 4.5e-5: far below 1/255
TRAIN_STEPS = 1000  # of the discrete processes of the literature: their step i is t = (i + 1) / 1000
GOLDEN, MIX_1, MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64, as int64
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
    sigmoid_bias: float = 2.0  # middle of the sigmoid weight [logsnr]
    t_density: Literal["uniform", "logit_normal", "log_normal", "importance"] = "uniform"  # density of t
    t_mean: float = 0.0  # of logit_normal [logit t] and log_normal [ln sigma/alpha, EDM: -1.2]
    t_std: float = 1.0  # of logit_normal and log_normal (EDM: 1.2)


# Noise: a pure function of (key, element) ------------------------------------------------------------------

def mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of int64."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * MIX_1  # the mask makes torch's arithmetic shift logical
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def gaussian(keys: Tensor, shape: tuple[int, ...], device: torch.device | str | None = None) -> Tensor:
    """Standard normal noise from (key, element index) alone, so it is the same for every split of the batch.
    Counter-based (Salmon et al. 2011): splitmix64 of key and counter, then Box-Muller, two normals a hash.
    keys (B,) int64, shape without B -> (B, *shape) float32 within +-6.8. Devices agree but for rounding."""
    device, n = device or keys.device, math.prod(shape)
    counter = torch.arange(1, (n + 1) // 2 + 1, device=device) * GOLDEN
    bits = mix(mix(keys.to(device) + GOLDEN)[:, None] + counter)                        # (B, ceil(n/2)) int64
    radius = torch.sqrt(-2 * torch.log((((bits >> 32) & 0xFFFFFFFF).float() + 0.5) * 2.0**-32))
    angle = ((bits & 0xFFFFFFFF) >> 8).float() * (2 * math.pi * 2.0**-24)
    pair = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)   # (B, 2, ceil(n/2))
    return pair.flatten(1)[:, :n].reshape(-1, *shape)


def noise_source(keys: Tensor, shape: tuple[int, ...], device: torch.device | str | None = None) -> Callable:
    """noise(step) -> (B, *shape) for the samplers: independent for each step, and of gaussian(keys)."""
    keys = mix(keys.to(device or keys.device))  # once: a copy inside a sampler's loop would stop the device
    return lambda step: gaussian(keys + step, shape)


# Schedules: t -> logsnr -> (alpha, sigma) ------------------------------------------------------------------

class Schedule:
    """A falling function logsnr(t): a curve, shifted by the picture's size and clamped to +-LOGSNR_MAX.
    Variance preserving: alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr).
    Flow:                alpha = sigmoid(logsnr/2) = 1 - t, sigma = sigmoid(-logsnr/2) = t when not shifted.
    At equal logsnr the x_t of the two differ by a factor only (Kingma & Gao 2023, 2303.00848, section 2)."""

    def __init__(self, curve: Callable[[Tensor], Tensor], shift: float = 0.0, flow: bool = False):
        self.curve, self.shift, self.flow = curve, shift, flow

    def logsnr(self, t: Tensor) -> Tensor:
        return (self.curve(t) + self.shift).clamp(-LOGSNR_MAX, LOGSNR_MAX)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        logsnr = self.logsnr(t)
        if self.flow: return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)
        return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()

    def inverse(self, logsnr: Tensor) -> Tensor:
        """The t of a logsnr, by bisection to the last bits of the dtype; no host synchronisation."""
        low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
        for _ in range(52 if logsnr.dtype == torch.float64 else 30):
            middle = (low + high) / 2
            noisier = self.logsnr(middle) < logsnr
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return (low + high) / 2


def betas(first: float, last: float, power: int) -> Callable[[Tensor], Tensor]:
    """logsnr of a process of 1000 steps whose betas have a linear `power`-th root, continued between them.
    alpha_t^2 = prod_{j < 1000 t} (1 - beta_j) (Ho et al. 2020, 2006.11239, eq. 4); the sum of log(1 - beta_j)
    as an integral over j from -1/2 to 1000 t - 1/2, by Gauss-Legendre: within 1e-6 of the product."""
    low, high = first ** (1 / power), last ** (1 / power)
    gauss = (-0.7745966692414834, 5 / 18), (0.0, 8 / 18), (0.7745966692414834, 5 / 18)

    def curve(t: Tensor) -> Tensor:
        mean = 0.0
        for node, weight in gauss:
            j = TRAIN_STEPS * t * ((1 + node) / 2) - 0.5
            mean = mean + weight * torch.log1p(-(low + (high - low) / (TRAIN_STEPS - 1) * j) ** power)
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


def zero_terminal_snr(curve: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """alpha shifted and scaled to be 0 at t = 1, the same at step 1 (Lin et al. 2023, 2305.08891, alg. 1)."""
    ends = curve(torch.tensor([1 / TRAIN_STEPS, 1.0], dtype=torch.float64))
    first, last = torch.sigmoid(ends).sqrt().tolist()
    gain = first / (first - last)

    def rescaled(t: Tensor) -> Tensor:
        alpha, variance = torch.sigmoid(curve(t)).sqrt(), torch.sigmoid(-curve(t))
        lost = (1 - gain * (1 - last)) + gain * variance / (1 + alpha)  # 1 - new alpha, without cancellation
        lost = lost.clamp(1e-9, 1 - 1e-9)
        return 2 * torch.log(1 - lost) - torch.log(lost * (2 - lost))
    return rescaled


def make_schedule(config: DiffusionConfig, size: int) -> Schedule:
    """The schedule for pictures of `size` pixels, shifted by 2 ln(shift_base / size).
    The same noise hides less of a large picture (Hoogeboom et al. 2023, 2301.11093, eq. 4; for flow, Esser et
    al. 2024, 2403.03206, eq. 23). Raises ValueError on an unknown name or an impossible size."""
    if config.schedule == "quadratic":
        raise ValueError("schedule 'quadratic' leaves 3% of the signal at t = 1: use scaled_linear "
                         "(the same formula) with zero_snr")
    if config.schedule not in CURVES:
        raise ValueError(f"schedule {config.schedule!r} is not one of {', '.join(CURVES)}")
    if size < 1 or config.shift_base < 0:
        raise ValueError(f"picture size {size} (at least 1) or shift_base {config.shift_base} (at least 0)")
    shift = 2 * math.log(config.shift_base / size) if config.shift_base else 0.0
    curve = CURVES[config.schedule]
    return Schedule(zero_terminal_snr(curve) if config.zero_snr else curve, shift, config.schedule == "flow")


# Targets and the posterior ---------------------------------------------------------------------------------

def expand(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    return value.view(-1, *[1] * (x.ndim - 1))


def noised(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps."""
    alpha, sigma = schedule.alpha_sigma(t)
    return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


TARGETS = {  # name: (a, b) of a x0 + b eps, what the network should say, from (alpha, sigma)
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "v": lambda alpha, sigma: (-sigma, alpha),      # Salimans & Ho 2022, 2202.00512, section 4
    "flow": lambda alpha, sigma: (-1.0, 1.0),       # the velocity of Liu et al. 2022, 2209.03003
}


def x0_eps(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> list[Tensor]:
    """(x0, eps) that an output means: the solution of alpha x0 + sigma eps = x_t, a x0 + b eps = output.
    v and flow are well conditioned at every logsnr; x0 from eps loses a factor sigma / alpha, eps from x0 the
    inverse."""
    a, b = TARGETS[prediction](alpha, sigma)
    return [y / (alpha * b - sigma * a) for y in (b * x_t - sigma * output, alpha * output - a * x_t)]


def posterior(schedule: Schedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q(x_s | x_t, x0), s < t (2107.00630, eq. 25) as (of_x0, of_x_t, log_small, log_large).
    Mean of_x0 x0 + of_x_t x_t, log variance log_small; log_large is that of q(x_t | x_s), an upper bound. The
    variance is 0 at s = 0, where that of the step before, from 2t to t, stands in (as in 2102.09672)."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.alpha_sigma(s), schedule.alpha_sigma(t)
    logsnr_s, logsnr_t, logsnr_2t = (schedule.logsnr(u) for u in (s, t, (2 * t).clamp(max=1)))
    lost = -torch.expm1(logsnr_t - logsnr_s)                     # 1 - SNR_t / SNR_s
    log_small = 2 * torch.log(sigma_s) + torch.log(lost)
    before = 2 * torch.log(sigma_t) + torch.log(-torch.expm1(logsnr_2t - logsnr_t))
    return (alpha_s * lost, alpha_s / alpha_t * (1 - lost), torch.where(s == 0, before, log_small),
            2 * torch.log(sigma_t) + torch.log(lost))


# Training: noise levels, weights, losses -------------------------------------------------------------------

def stratify(u: Tensor, index: Tensor, total: int) -> Tensor:
    """Uniform u (B,) of the items `index` (B,) of a batch of `total` -> one in each of `total` strata."""
    return (index + u) / total


def draw_t(u: Tensor, config: DiffusionConfig, schedule: Schedule) -> Tensor:
    """t (B,) float32 from u (B,) in [0, 1), by the inverse distribution function of the density.
    logit_normal: Esser et al. 2024, 2403.03206, eq. 19. log_normal: ln(sigma / alpha) is normal, shifted
    as the schedule (Karras et al. 2022, 2206.00364, table 1). importance has a state: class Importance."""
    normal = config.t_mean + config.t_std * torch.special.ndtri(u.float())
    match config.t_density:
        case "uniform": return u.float()
        case "logit_normal": return torch.sigmoid(normal)
        case "log_normal": return schedule.inverse(schedule.shift - 2 * normal)
    raise ValueError(f"t_density {config.t_density!r} is not uniform, logit_normal or log_normal")


class Importance(nn.Module):
    """t in proportion to the root of the loss's second moment (Nichol & Dhariwal 2021, 2102.09672, eq. 18).
    A running second moment for each of `buckets` equal parts of t. `update` takes the sums over all ranks of
    `bucket_sums(loss**2, t, buckets)`, so the state depends neither on their number nor on the order."""

    def __init__(self, buckets: int = 100, decay: float = 0.98):
        super().__init__()
        self.decay = decay  # per sample
        self.register_buffer("second_moment", torch.ones(buckets))

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (B,) in [0, 1) -> t (B,), and 1 / density (B,) for its loss, which keeps the expectation."""
        root = self.second_moment.sqrt()
        density = 0.999 * root / root.mean() + 0.001                                      # (buckets,) mean 1
        edges = torch.cumsum(density, 0) / len(density)
        bucket = torch.searchsorted(edges, u.float().contiguous(), right=True).clamp(max=len(density) - 1)
        inside = 1 - (edges[bucket] - u) * len(density) / density[bucket]
        return ((bucket + inside) / len(density)).clamp(0, 1), 1 / density[bucket]

    def update(self, square: Tensor, count: Tensor) -> None:
        self.second_moment.lerp_(square / count.clamp(min=1), 1 - self.decay**count)


class Uncertainty(nn.Module):
    """u(logsnr), the learned log variance of the loss (Karras et al. 2023, 2312.02696, eq. 21)."""

    def __init__(self, features: int = 128):
        super().__init__()
        self.register_buffer("waves", 2 * math.pi * gaussian(torch.tensor([0, 1]), (features,)))
        self.weight = nn.Parameter(torch.zeros(features))  # zero: training starts from the plain loss

    def forward(self, logsnr: Tensor) -> Tensor:
        return (self.weight * torch.cos(logsnr[:, None] / 8 * self.waves[0] + self.waves[1])).sum(1)


def x0_weight(t: Tensor, schedule: Schedule, config: DiffusionConfig) -> Tensor:
    """Weight (B,) of the squared error of x0, the same whatever is predicted; SNR is a weight of 1 on eps.
    min_snr: Hang et al. 2023, 2303.09556. soft_min_snr: Crowson et al. 2024, 2401.11605. sigmoid: times
    -dlogsnr/dt / 2 pi, so that it does not depend on the schedule (Kingma & Gao 2023, 2303.00848).
    p2: Choi et al. 2022, 2204.00227, k = gamma = 1. edm: Karras et al. 2022, 2206.00364, table 1."""
    logsnr = schedule.logsnr(t)
    snr = torch.exp(logsnr)
    match config.loss_weight:
        case "min_snr": return snr.clamp(max=config.snr_gamma)
        case "soft_min_snr": return snr * config.snr_gamma / (snr + config.snr_gamma)
        case "sigmoid":
            with torch.enable_grad():
                t = t.detach().requires_grad_()
                slope = torch.autograd.grad(schedule.logsnr(t).sum(), t)[0]
            return snr * torch.sigmoid(config.sigmoid_bias - logsnr) * slope / (-2 * math.pi)
        case "p2": return torch.sigmoid(logsnr)
        case "edm": return snr + 4  # 4 = 1 / sigma_data^2, sigma_data = 0.5 for pictures in [-1, 1]
    raise ValueError(f"loss_weight {config.loss_weight!r} is unknown")


def losses(model: Callable, x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule, config: DiffusionConfig,
           uncertainty: Uncertainty | None = None, **condition) -> tuple[Tensor, Tensor]:
    """Per-sample loss, (weighted (B,), raw (B,)) float32: one to be minimised, one to be compared.
    raw is the mean squared error of the x0 that is meant, clipped to [-1, 1] as samplers do: one unit for all
    targets and schedules, at most 4. Unclipped, eps would divide by alpha at the noisy end; the error of v or
    eps multiplies that of x0 by 1 + SNR at the clean one. uniform weighs the prediction's error by 1, learned
    by e^-u, plus u. learn_sigma adds the variational term of a step of 1/1000 in bits per dimension, which
    trains the variance only (Nichol & Dhariwal 2021, 2102.09672, eq. 16, lambda 1/1000)."""
    alpha, sigma = (expand(c, x0) for c in schedule.alpha_sigma(t))
    x_t = alpha * x0 + sigma * eps                                                        # (B, C, H, W)
    output = model(x_t, t, **condition).float()                                           # (B, C or 2C, H, W)
    output, head = output[:, :x0.shape[1]], output[:, x0.shape[1]:]
    a, b = TARGETS[config.prediction](alpha, sigma)
    target, guess = x0, output.detach()
    if config.prediction != "x0":  # where it is the same, with more passes over the pictures
        target, guess = a * x0 + b * eps, x0_eps(guess, x_t, alpha, sigma, config.prediction)[0]
    error = (output - target).square().flatten(1).mean(1)                                 # (B,)
    raw = (guess.clamp(-1, 1) - x0).square().flatten(1).mean(1)
    weighted = error
    if config.loss_weight not in ("uniform", "learned"):
        scale = (sigma / (alpha * b - sigma * a)).flatten() ** 2  # to the error of x0 at the same x_t
        weighted = error * (scale * x0_weight(t, schedule, config))
    if config.learn_sigma:
        end = t.clamp(min=1 / TRAIN_STEPS)
        s = end - 1 / TRAIN_STEPS
        weighted = weighted + variational_bits(x0, x_t, guess, (head + 1) / 2, s, end, schedule)
    if config.loss_weight == "learned":
        u = uncertainty(schedule.logsnr(t))
        weighted = weighted * torch.exp(-u) + u
    return weighted, raw


def bucket_sums(value: Tensor, where: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Sums and counts (buckets,) of value (B,) by where (B,) in [0, 1]; no host synchronisation."""
    bucket = (where * buckets).long().clamp(max=buckets - 1)
    member = (bucket[:, None] == torch.arange(buckets, device=value.device)).float()      # (B, buckets)
    return (value.float()[:, None] * member).sum(0), member.sum(0)


def loss_buckets(loss: Tensor, logsnr: Tensor, buckets: int = 8) -> tuple[Tensor, Tensor]:
    """Sums and counts (buckets,) of per-sample losses by noise level, clean first.
    Buckets are equal parts of the angle atan(sigma / alpha), so of t on the unshifted cosine schedule."""
    return bucket_sums(loss, torch.atan(torch.exp(-logsnr / 2)) * (2 / math.pi), buckets)


# Likelihood in bits per dimension --------------------------------------------------------------------------

def decoder_bits(x0: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log2 of the normal's mass in the bin of the 8-bit x0, the outer bins open (2006.11239, eq. 13)."""
    half, std = 1 / 255, torch.exp(log_var / 2)
    centre = (x0 - mean) * torch.where(x0 > mean, -1, 1)  # the lower tail is where float32 keeps small masses
    mass = torch.special.ndtr((centre + half) / std) - torch.special.ndtr((centre - half) / std)
    mass = torch.where(x0 < -0.999, torch.special.ndtr((x0 + half - mean) / std), mass)
    mass = torch.where(x0 > 0.999, torch.special.ndtr((mean - x0 + half) / std), mass)
    return -torch.log2(mass.clamp(min=1e-12))


def variational_bits(x0: Tensor, x_t: Tensor, guess: Tensor, fraction: Tensor | float, s: Tensor, t: Tensor,
                     schedule: Schedule) -> Tensor:
    """One term of the variational bound, bits per dimension (B,) (Ho et al. 2020, 2006.11239, eq. 5).
    KL(q(x_s | x_t, x0) || p(x_s | x_t)) or the decoder where s = 0. p has q's mean with `guess` for x0 and
    a log variance between that of q (fraction 0) and of the forward step (1) (2102.09672, eq. 15)."""
    of_x0, of_x_t, small, large = (expand(c, x0) for c in posterior(schedule, s, t))
    log_var = small + fraction * (large - small)
    miss = (of_x0 * (x0 - guess)).square()
    kl = 0.5 * (log_var - small + torch.exp(small - log_var) - 1 + miss * torch.exp(-log_var)) / math.log(2)
    bits = torch.where(expand(s, x0) == 0, decoder_bits(x0, of_x0 * guess + of_x_t * x_t, log_var), kl)
    return bits.flatten(1).mean(1)


def nll(denoise: Callable, x0: Tensor, times: Tensor, noise: Callable, schedule: Schedule,
        variance: float | Callable = 0.0) -> Tensor:
    """Upper bound of -log2 p(x0) in bits per dimension (B,): prior, steps and decoder (2006.11239, eq. 5)."""
    steps = levels(x0, times, schedule)[0]                                                # (N+1, B)
    alpha, sigma = (expand(c, x0) for c in schedule.alpha_sigma(steps[0]))
    prior = 0.5 * ((alpha * x0) ** 2 + sigma**2 - 1 - 2 * torch.log(sigma)) / math.log(2)
    total = prior.flatten(1).mean(1)
    for i in range(len(times) - 1):
        x_t = noised(x0, noise(i), steps[i], schedule)
        guess = denoise(x_t, steps[i])
        fraction = variance() if callable(variance) else variance
        total = total + variational_bits(x0, x_t, guess, fraction, steps[i + 1], steps[i], schedule)
    return total


# Denoisers: denoise(x_t (B, ...), t (B,)) -> x0 (B, ...) float32 -------------------------------------------

def denoiser(model: Callable, schedule: Schedule, config: DiffusionConfig, condition: dict) -> Callable:
    """The network as a denoiser under one condition; channels beyond those of x_t (the variance) are left."""
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(c, x_t) for c in schedule.alpha_sigma(t))
        output = model(x_t, t, **condition).float()[:, :x_t.shape[1]]
        return x0_eps(output, x_t, alpha, sigma, config.prediction)[0]
    return denoise


class LearnedVariance:
    """A network with learn_sigma that remembers its variance: `ddim(..., variance=lambda: net.fraction[:B])`.
    The condition's rows come first in a guided batch, so guidance never extrapolates a variance."""

    def __init__(self, model: Callable):
        self.model, self.fraction = model, None

    def __call__(self, x_t: Tensor, t: Tensor, **condition) -> Tensor:
        output = self.model(x_t, t, **condition)
        self.fraction = (output[:, x_t.shape[1]:].float() + 1) / 2
        return output


def unconditional(condition: dict) -> dict:
    """The same condition with its text hidden (mask all False); the low-resolution picture stays."""
    return {**condition, "mask": torch.zeros_like(condition["mask"])}


def branches(model: Callable, schedule: Schedule, config: DiffusionConfig, conditions: list[dict],
             weights: list[float], negative: dict) -> Callable:
    """pair(x_t, t) -> (cond, uncond) in one network call; cond = uncond + sum of weight_k (cond_k - uncond).
    Several conditions with a weight each: Liu et al. 2022, 2206.01714, eq. 11."""
    rows = len(conditions) + 1
    stacked = {key: None if value is None else torch.cat([*(c[key] for c in conditions), value])
               for key, value in negative.items()}
    together = denoiser(model, schedule, config, stacked)

    def pair(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        *conds, uncond = together(torch.cat([x_t] * rows), torch.cat([t] * rows)).chunk(rows)
        return sum(w * cond for w, cond in zip(weights, conds)) + (1 - sum(weights)) * uncond, uncond
    return pair


def guidance(pair: Callable, guidance_scale: float, interval: tuple[float, float] = (0.0, 1.0),
             combine: Callable = torch.lerp) -> Callable:
    """x0 = uncond + w (cond - uncond), w = guidance_scale where t is in the interval, else 1.
    `pair(x_t, t)` -> (cond, uncond): `branches` (classifier-free, Ho & Salimans 2022, 2207.12598, eq. 6) or
    `lambda x_t, t: (good(x_t, t), bad(x_t, t))` (autoguidance, Karras et al. 2024, 2406.02507). The interval
    (Kynkaanniemi et al. 2024, 2404.07724) saves no call: looking at t would stop the device.
    `combine(uncond, cond, w)` is torch.lerp, rescaled(phi) or projected(...)."""
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale {guidance_scale} is not a finite number of at least 0 (1 = none)")
    if not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance interval {interval} is not two rising times within 0 and 1")

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        cond, uncond = pair(x_t, t)
        w = torch.where((t >= interval[0]) & (t <= interval[1]), guidance_scale, 1.0).to(cond)
        return combine(uncond, cond, expand(w, cond))
    return denoise


def guided(model: Callable, schedule: Schedule, config: DiffusionConfig, condition: dict,
           guidance_scale: float, negative: dict | None = None, weak: Callable | None = None,
           **options) -> Callable:
    """Guidance of one condition: one call, of B rows when guidance_scale is 1, else 2B. `negative`, that of a
    negative prompt, replaces the empty one; `weak`, a denoiser, both (autoguidance). options: guidance's."""
    good = denoiser(model, schedule, config, condition)
    if guidance_scale == 1: return good
    pair = branches(model, schedule, config, [condition], [1.0], negative or unconditional(condition))
    both = (lambda x_t, t: (good(x_t, t), weak(x_t, t))) if weak else pair
    return guidance(both, guidance_scale, **options)


def rescaled(phi: float = 0.7, inner: Callable = torch.lerp) -> Callable:
    """x0 of `inner` rescaled by phi to the deviation of cond (2305.08891, eq. 15-16, there of v)."""
    def combine(uncond: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        x0 = inner(uncond, cond, w)
        ratio = cond.flatten(1).std(1) / x0.flatten(1).std(1).clamp(min=1e-6)
        return x0 * expand(1 + phi * (ratio - 1), x0)
    return combine


def projected(limit: float = 15.0, parallel: float = 0.0, momentum: float = -0.5) -> Callable:
    """Adaptive projected guidance (Sadat et al. 2024, 2410.02416, algorithm 1): strong without saturation.
    The part of the push along cond is scaled by `parallel`, its norm is at most `limit`, it has a negative
    momentum from step to step: make a new one for each run of a sampler."""
    average = 0.0

    def combine(uncond: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        nonlocal average
        average = cond - uncond + momentum * average
        push = average * (limit / expand(average.flatten(1).norm(dim=1), cond).clamp(min=1e-6)).clamp(max=1)
        unit = cond / expand(cond.flatten(1).norm(dim=1), cond).clamp(min=1e-6)
        along = expand((push * unit).flatten(1).sum(1), cond) * unit
        return cond + (w - 1) * (push - along + parallel * along)
    return combine


def classifier_guidance(denoise: Callable, log_prob: Callable, schedule: Schedule, scale: float) -> Callable:
    """x0 + scale sigma^2 / alpha grad log p(y | x_t) (Dhariwal & Nichol 2021, 2105.05233, algorithm 2).
    `log_prob(x_t, t)` -> (B,). The factor is large near t = 1: put a threshold around it."""
    def guided_denoise(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            gradient = torch.autograd.grad(log_prob(x, t).sum(), x)[0]
        alpha, sigma = schedule.alpha_sigma(t)
        return denoise(x_t, t) + expand(scale * sigma**2 / alpha, x_t) * gradient
    return guided_denoise


def threshold(denoise: Callable, percentile: float | None = None) -> Callable:
    """x0 clipped to +-s, over s: s = 1, or max(1, percentile of |x0|) of each picture (2205.11487, 2.3).
    The percentile, in (0, 1], is that of torch.quantile, which refuses more than 16 million numbers."""
    if percentile is None:
        return lambda x_t, t: denoise(x_t, t).clamp(-1, 1)
    if not 0 < percentile <= 1:
        raise ValueError(f"threshold percentile {percentile} is not in (0, 1]")

    def thresholded(x_t: Tensor, t: Tensor) -> Tensor:
        x0 = denoise(x_t, t)
        ranked = x0.flatten(1).abs().sort(dim=1).values
        rank = percentile * (ranked.shape[1] - 1)
        s = torch.lerp(ranked[:, math.floor(rank)], ranked[:, math.ceil(rank)], rank - math.floor(rank))
        s = expand(s.clamp(min=1), x0)
        return x0.clamp(-s, s) / s
    return thresholded


# Time grids ------------------------------------------------------------------------------------------------

def time_grid(steps: int, start: float = 1.0) -> Tensor:
    """Falling times (steps + 1,) from `start` to exactly 0, uniform in t."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: at least 1 is needed")
    if not 0 < start <= 1:
        raise ValueError(f"start time {start} is not in (0, 1]")
    return torch.linspace(start, 0, steps + 1, dtype=torch.float64)


def logsnr_grid(steps: int, schedule: Schedule, start: float = 1.0) -> Tensor:
    """Falling times (steps + 1,) from `start` to exactly 0, uniform in logsnr within +-8 before the shift.
    For dpmpp_2m and unipc, which are polynomials in logsnr; ddim and plms do better on `time_grid`.
    At logsnr 8 the noise is 2.3 of 255."""
    first = schedule.logsnr(torch.tensor([start], dtype=torch.float64)).clamp(min=schedule.shift - 8)
    inner = torch.lerp(first, (first + 1).clamp(min=schedule.shift + 8), 1 - time_grid(steps)[1:-1])
    return torch.cat([first.new_tensor([start]), schedule.inverse(inner), first.new_zeros(1)])


def respaced(spec: str, steps: int = TRAIN_STEPS) -> Tensor:
    """Falling times (i + 1) / steps of some steps i of a process of `steps`, then 0 (2102.09672, section 4).
    "250": evenly spaced; "10,10,20": so many in each equal section; "ddim25": an integer stride."""
    if not re.fullmatch(r"ddim[0-9]+|[0-9]+(,[0-9]+)*", spec):
        raise ValueError(f"respacing {spec!r} is not like 250, 10,10,20 or ddim25")
    counts = [int(n) for n in spec.removeprefix("ddim").split(",")]
    ends = [steps * i // len(counts) for i in range(len(counts) + 1)]
    if not all(1 <= count <= b - a for count, a, b in zip(counts, ends, ends[1:])):
        raise ValueError(f"respacing {spec!r} asks a section of {steps} / {len(counts)} for 0 or too many")
    if spec.startswith("ddim"):
        chosen = range(0, steps, steps // counts[0])[:counts[0]]
    else:
        chosen = [a + round(i * (b - a - 1) / max(1, n - 1))
                  for n, a, b in zip(counts, ends, ends[1:]) for i in range(n)]
    return torch.tensor([(i + 1) / steps for i in reversed(chosen)] + [0.0], dtype=torch.float64)


# Samplers: (denoise, x at times[0], times, noise, schedule) -> x at times[-1]; at t = 0 that is an x0 ------

def levels(x: Tensor, times: Tensor, schedule: Schedule) -> tuple[Tensor, list, list, list]:
    """t (N+1, B) on the device of x; alpha, sigma, logsnr as N+1 numbers each, so that nothing is copied or
    waited for inside a loop. t = 0 is exactly clean: alpha 1, sigma 0, logsnr inf."""
    times = times.detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all() or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times {times.tolist()[:8]} must be a row of at least 2, falling, within 1 and 0")
    alpha, sigma, logsnr = *schedule.alpha_sigma(times), schedule.logsnr(times)
    if times[-1] == 0:
        alpha[-1], sigma[-1], logsnr[-1] = 1, 0, math.inf
    return times.to(x)[:, None].expand(-1, len(x)), alpha.tolist(), sigma.tolist(), logsnr.tolist()


def ddim(denoise: Callable, x: Tensor, times: Tensor, noise: Callable, schedule: Schedule, eta: float = 0.0,
         variance: float | Callable = 0.0) -> Tensor:
    """DDIM (Song et al. 2020, 2010.02502, eq. 12 and 16): eta 0 is deterministic, eta 1 is ancestral DDPM.
    variance: where the log variance of the fresh noise is between the posterior's (0, "small") and the
    forward step's (1, "large"), or a function that tells it after each call, see LearnedVariance."""
    t, alpha, sigma, logsnr = levels(x, times, schedule)
    for i in range(len(t) - 1):
        x0 = denoise(x, t[i])
        eps = (x - alpha[i] * x0) / sigma[i]
        fresh = eta * sigma[i + 1] * math.sqrt(-math.expm1(logsnr[i] - logsnr[i + 1]))
        x = alpha[i + 1] * x0 + math.sqrt(sigma[i + 1] ** 2 - fresh**2) * eps
        if fresh:
            fraction = variance() if callable(variance) else variance
            x = x + fresh * (sigma[i] / sigma[i + 1]) ** fraction * noise(i)
    return x


def transfer(x0: Tensor, eps: Tensor, alpha: list, sigma: list, i: int, j: int, turn: Tensor | int = 0):
    """x at level j from (x0, eps) at i, along d(x/alpha) / d(sigma/alpha) = eps + turn (2202.09778, eq. 11).
    The turn is added to the DDIM step, instead of to x, since x / alpha has no digits left near t = 1."""
    return alpha[j] * x0 + sigma[j] * eps + (sigma[j] - alpha[j] * sigma[i] / alpha[i]) * turn


def blind(alpha: list[float], sigma: list[float], i: int, j: int) -> bool:
    """Whether the step from i to j must be an Euler step: eps has no value at t = 0, and from pure noise
    sigma / alpha falls a thousandfold at once, where only the first slope is any good."""
    return sigma[j] == 0 or (i == 0 and sigma[0] * alpha[j] > 10 * sigma[j] * alpha[0])


def heun(denoise: Callable, x: Tensor, times: Tensor, noise: Callable, schedule: Schedule) -> Tensor:
    """Heun in sigma / alpha (Karras et al. 2022, 2206.00364, algorithm 1): second order, two calls a step."""
    t, alpha, sigma, _ = levels(x, times, schedule)
    for i in range(len(t) - 1):
        x0 = denoise(x, t[i])
        eps = (x - alpha[i] * x0) / sigma[i]
        x = transfer(x0, eps, alpha, sigma, i, i + 1)
        if not blind(alpha, sigma, i, i + 1):
            ahead = (x - alpha[i + 1] * denoise(x, t[i + 1])) / sigma[i + 1]
            x = transfer(x0, eps, alpha, sigma, i, i + 1, turn=(ahead - eps) / 2)
    return x


def prk(denoise: Callable, x: Tensor, times: Tensor, noise: Callable, schedule: Schedule) -> Tensor:
    """Pseudo Runge-Kutta (Liu et al. 2022, 2202.09778, eq. 14): fourth order, four calls a step.
    The middle of a step is halfway in sigma / alpha whatever the times: halfway in t the order is 2."""
    _, alpha, sigma, _ = levels(x, times, schedule)
    ratio = torch.tensor([s / a for s, a in zip(sigma, alpha)], dtype=torch.float64)
    middle = schedule.inverse(-2 * torch.log((ratio[1:] + ratio[:-1]) / 2))
    both = torch.stack([times[:-1].to(middle), middle], dim=1).flatten()
    t, alpha, sigma, _ = levels(x, torch.cat([both, times[-1:].to(middle)]), schedule)
    for i in range(0, len(t) - 1, 2):
        x0 = denoise(x, t[i])
        e1 = (x - alpha[i] * x0) / sigma[i]
        if blind(alpha, sigma, i, i + 2):
            x = transfer(x0, e1, alpha, sigma, i, i + 2)
            continue
        x = transfer(x0, e1, alpha, sigma, i, i + 1)
        e2 = (x - alpha[i + 1] * denoise(x, t[i + 1])) / sigma[i + 1]
        x = transfer(x0, e1, alpha, sigma, i, i + 1, turn=e2 - e1)
        e3 = (x - alpha[i + 1] * denoise(x, t[i + 1])) / sigma[i + 1]
        x = transfer(x0, e1, alpha, sigma, i, i + 2, turn=e3 - e1)
        e4 = (x - alpha[i + 2] * denoise(x, t[i + 2])) / sigma[i + 2]
        x = transfer(x0, e1, alpha, sigma, i, i + 2, turn=(e1 + 2 * e2 + 2 * e3 + e4) / 6 - e1)
    return x


ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Callable, x: Tensor, times: Tensor, noise: Callable, schedule: Schedule) -> Tensor:
    """Pseudo linear multi-step (Liu et al. 2022, 2202.09778, eq. 12): Adams-Bashforth on eps, a call a step.
    The order rises from 1 to 4 over the first steps, so no other method is needed. Fourth order where steps
    are equal in sigma / alpha, second elsewhere. The last step returns the x0 of the combined eps."""
    t, alpha, sigma, _ = levels(x, times, schedule)
    history: list[Tensor] = []
    for i in range(len(t) - 1):
        x0 = denoise(x, t[i])
        eps = (x - alpha[i] * x0) / sigma[i]
        history = [eps, *history[:3]]
        combined = sum(c * e for c, e in zip(ADAMS_BASHFORTH[len(history) - 1], history))
        x = transfer(x0, eps, alpha, sigma, i, i + 1, turn=combined - eps)
    return x


def dpmpp_2m(denoise: Callable, x: Tensor, times: Tensor, noise: Callable, schedule: Schedule,
             eta: float = 0.0) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2): second order, one call a step.
    eta 1 is SDE-DPM-Solver++(2M) (eq. 18). The first step and the last one, to t = 0, are of first order."""
    t, alpha, sigma, logsnr = levels(x, times, schedule)
    before = None
    for i in range(len(t) - 1):
        x0 = denoise(x, t[i])
        if sigma[i + 1] == 0:
            return x0
        h = (logsnr[i + 1] - logsnr[i]) / 2
        rise = 0.0 if before is None else (x0 - before) * (h / (logsnr[i] - logsnr[i - 1]))
        x = (sigma[i + 1] / sigma[i] * math.exp(-eta * h)) * x
        x = x - alpha[i + 1] * math.expm1(-(1 + eta) * h) * (x0 + rise)
        if eta:
            x = x + sigma[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * noise(i)
        before = x0
    return x


def unipc(denoise: Callable, x: Tensor, times: Tensor, noise: Callable, schedule: Schedule) -> Tensor:
    """UniPC-2, B(h) = e^h - 1 (Zhao et al. 2023, 2302.04867, alg. 5-8): DPM-Solver++(2M) with a corrector.
    The call at the predicted x serves its correction and the next prediction, so it is one a step."""
    t, alpha, sigma, logsnr = levels(x, times, schedule)
    start, x0, rise, h, r = x, None, 0.0, 0.0, 0.0  # x, x0, rise and h of the last step; the h before it / h
    for i in range(len(t) - 1):
        ahead = denoise(x, t[i])
        if sigma[i + 1] == 0:
            return ahead
        if i > 0:  # correct x: the step from i - 1 to i again, now knowing x0 at its end
            phi_1 = math.expm1(-h)
            b1, b2 = (phi_1 / -h - 1) / phi_1, 2 * ((phi_1 / -h - 1) / -h - 0.5) / phi_1
            behind, front = (0.0, 0.5) if i == 1 else ((b1 - b2) / (1 + r), (b1 * r + b2) / (1 + r))
            bend = behind * 2 * rise + front * (ahead - x0)
            x = sigma[i] / sigma[i - 1] * start - alpha[i] * phi_1 * (x0 + bend)
        last, h = h, (logsnr[i + 1] - logsnr[i]) / 2
        r = last / h
        rise = 0.0 if i == 0 else (ahead - x0) / (2 * r)
        start, x0 = x, ahead
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * (x0 + rise)
    return x


# Euler in sigma / alpha or in t of flow is DDIM; with eta 1 it is DDPM (2006.11239) and Euler ancestral.
SAMPLERS = {"dpmpp_2m": dpmpp_2m, "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0), "unipc": unipc, "ddim": ddim,
            "ddpm": partial(ddim, eta=1.0), "euler": ddim, "euler_ancestral": partial(ddim, eta=1.0),
            "heun": heun, "plms": plms, "prk": prk}


# Editing, with any sampler ---------------------------------------------------------------------------------
# Image to image (SDEdit, 2108.01073) is sampler(denoise, noised(x0, eps, t, schedule), times from t, ...).


def inpaint(sampler: Callable, denoise: Callable, x: Tensor, times: Tensor, noise: Callable,
            schedule: Schedule, known: Tensor, keep: Tensor, resample: int = 1, jump: int = 10) -> Tensor:
    """Fill in a picture: known (B, C, H, W) stays where keep (B, 1, H, W) bool is True.
    The denoiser says the known x0, so under any sampler x_t there follows the forward process of the picture.
    Every `jump` steps are taken `resample` times, going back by the forward process in between, so that both
    parts agree (RePaint: Lugmayr et al. 2022, 2201.09865, algorithm 1)."""
    if known.shape != x.shape or keep.shape[-2:] != x.shape[-2:]:
        raise ValueError(f"mask {[*keep.shape]} or picture {[*known.shape]} does not fit {[*x.shape]}")
    if resample < 1 or jump < 1:
        raise ValueError(f"resample {resample} and jump {jump} must be at least 1")
    anchored = lambda x_t, t: torch.where(keep, known, denoise(x_t, t))
    draws = 0
    for first in range(0, len(times) - 1, jump):
        part = times[first:first + jump + 1]
        _, alpha, sigma, _ = levels(x, part, schedule)
        back = alpha[0] / alpha[-1]
        for visit in range(resample):
            x = sampler(anchored, x, part, lambda i: noise(draws + i), schedule)
            draws += len(part)
            if visit < resample - 1:
                x = back * x + math.sqrt(sigma[0] ** 2 - (back * sigma[-1]) ** 2) * noise(draws - 1)
    return torch.where(keep, known, x) if times[-1] == 0 else x
