"""Diffusion: noise schedules, targets, losses, guidance and samplers, all in terms of logsnr and (alpha_t, sigma_t).

    x_t = alpha_t x0 + sigma_t eps,     logsnr = ln(alpha_t^2 / sigma_t^2),     t = 0 clean, t = 1 pure noise

Knows nothing of U-Nets or text: a network is any `model(x_t, t, **condition)`, a denoiser any `denoise(x_t, t) -> x0`.

Shapes: B batch, C channels, H W picture.  x0, x_t, eps (B, C, H, W) or any (B, ...) float32;  t, logsnr (B,) float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LOGSNR_MAX = 20.0  # schedules are clamped to +-20: sigma(t = 0) = alpha(t = 1) = 4.5e-5, far below 1/255 and safe in float32
GOLDEN, MIX_1, MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64, as int64


@dataclass
class DiffusionConfig:
    schedule: Literal["cosine", "flow"] = "cosine"  # noise schedule: logsnr as a function of t
    shift_base: int = 64  # picture side at which the schedule is not shifted, 0 = never shift [pixels]
    prediction: Literal["v", "eps", "x0", "flow"] = "v"  # what the network predicts
    loss_weight: Literal["uniform", "min_snr"] = "uniform"  # weight of the loss; uniform = 1 on the predicted quantity
    snr_gamma: float = 5.0  # ceiling of the min_snr weight [signal-to-noise ratio]


# ---------------------------------------------------------------------------------------------------------------------
# Noise: a pure function of (key, element)


def mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of int64 whose output bits look independent."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * MIX_1  # torch shifts arithmetically: the mask makes it logical
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def gaussian(keys: Tensor, shape: tuple[int, ...], device: torch.device | str | None = None) -> Tensor:
    """Standard normal noise that depends on (key, element index) only: not on the batch, its split, or a generator.

    Counter-based (Salmon et al. 2011, "Random numbers: as easy as 1, 2, 3"): splitmix64 of key and counter, then
    Box-Muller, two normals from the two 32-bit halves of each hash.
    keys (B,) int64, shape without B -> (B, *shape) float32 within +-6.8. Devices agree up to the rounding of log and cos.
    """
    device = device or keys.device
    n = math.prod(shape)
    counter = torch.arange(1, (n + 1) // 2 + 1, device=device) * GOLDEN
    bits = mix(mix(keys.to(device) + GOLDEN)[:, None] + counter)                                  # (B, ceil(n/2)) int64
    radius = torch.sqrt(-2 * torch.log((((bits >> 32) & 0xFFFFFFFF).float() + 0.5) * 2.0**-32))
    angle = ((bits & 0xFFFFFFFF) >> 8).float() * (2 * math.pi * 2.0**-24)
    pair = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)             # (B, 2, ceil(n/2))
    return pair.flatten(1)[:, :n].reshape(-1, *shape)


def noise_source(keys: Tensor, shape: tuple[int, ...], device: torch.device | str | None = None) -> Callable:
    """noise(step_index) -> (B, *shape) for the samplers, a new independent draw for each index and none equal to gaussian(keys)."""
    return lambda step: gaussian(mix(keys + (step + 1) * MIX_1), shape, device)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: t -> logsnr -> (alpha, sigma)


class Schedule:
    """A falling function logsnr(t), shifted by the picture's size and clamped to +-LOGSNR_MAX.

    Variance preserving: alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr).
    Flow:                alpha = sigmoid(logsnr/2) = 1 - t, sigma = sigmoid(-logsnr/2) = t when unshifted.
    Both describe the same family of paths: x_t of one is x_t of the other times a number (Kingma & Gao 2023, 2303.00848).
    """

    def __init__(self, curve: Callable[[Tensor], Tensor], shift: float = 0.0, flow: bool = False):
        self.curve, self.shift, self.flow = curve, shift, flow

    def logsnr(self, t: Tensor) -> Tensor:
        return (self.curve(t) + self.shift).clamp(-LOGSNR_MAX, LOGSNR_MAX)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        logsnr = self.logsnr(t)
        if self.flow:
            return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)
        return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()

    def inverse(self, logsnr: Tensor) -> Tensor:
        """The t of a logsnr, by bisection: exact to the last bits of the dtype, any device, no host synchronisation."""
        low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
        for _ in range(52 if logsnr.dtype == torch.float64 else 30):
            middle = (low + high) / 2
            noisier = self.logsnr(middle) < logsnr
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return (low + high) / 2


def cosine(t: Tensor) -> Tensor:
    """alpha = cos(pi t / 2) (Nichol & Dhariwal 2021, 2102.09672, eq. 17 without the offset; logsnr as in 2301.11093)."""
    angle = t * (math.pi / 2)
    return 2 * (torch.log(torch.cos(angle).clamp(min=1e-9)) - torch.log(torch.sin(angle).clamp(min=1e-9)))


def flow(t: Tensor) -> Tensor:
    """alpha = 1 - t, sigma = t (Liu et al. 2022, 2209.03003; Lipman et al. 2022, 2210.02747)."""
    return 2 * (torch.log((1 - t).clamp(min=1e-9)) - torch.log(t.clamp(min=1e-9)))


CURVES = {"cosine": cosine, "flow": flow}


def make_schedule(config: DiffusionConfig, size: int) -> Schedule:
    """The schedule for pictures of `size` pixels, shifted by 2 ln(shift_base / size).

    Larger pictures hide less under the same noise (Hoogeboom et al. 2023, 2301.11093, eq. 4; for flow the same shift is
    Esser et al. 2024, 2403.03206, eq. 23). Raises ValueError on an unknown name or a size below 1.
    """
    if config.schedule not in CURVES:
        raise ValueError(f"schedule {config.schedule!r} is not one of {', '.join(CURVES)}")
    if size < 1 or config.shift_base < 0:
        raise ValueError(f"picture size {size} and shift_base {config.shift_base} must be at least 1 and 0 pixels")
    shift = 2 * math.log(config.shift_base / size) if config.shift_base else 0.0
    return Schedule(CURVES[config.schedule], shift, flow=config.schedule == "flow")


# ---------------------------------------------------------------------------------------------------------------------
# Targets


def expand(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to multiply x (B, ...)."""
    return value.view(-1, *[1] * (x.ndim - 1))


def noised(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps."""
    alpha, sigma = schedule.alpha_sigma(t)
    return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


def target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """What the network should say: v = alpha eps - sigma x0 (Salimans & Ho 2022, 2202.00512, section 4); flow = eps - x0."""
    match prediction:
        case "x0": return x0
        case "eps": return eps
        case "v": return alpha * eps - sigma * x0
        case "flow": return eps - x0
    raise ValueError(f"prediction {prediction!r} is not one of v, eps, x0, flow")


def x0_eps(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(x0, eps) that a network output means, so that alpha x0 + sigma eps = x_t; the inverse of `target`.

    v and flow are well conditioned at every logsnr; x0 from eps loses a factor sigma/alpha, eps from x0 alpha/sigma.
    """
    match prediction:
        case "x0": return output, (x_t - alpha * output) / sigma
        case "eps": return (x_t - sigma * output) / alpha, output
        case "v":
            norm = alpha**2 + sigma**2  # 1 when variance preserving
            return (alpha * x_t - sigma * output) / norm, (sigma * x_t + alpha * output) / norm
        case "flow": return (x_t - sigma * output) / (alpha + sigma), (x_t + alpha * output) / (alpha + sigma)
    raise ValueError(f"prediction {prediction!r} is not one of v, eps, x0, flow")


# ---------------------------------------------------------------------------------------------------------------------
# Training loss


def stratify(u: Tensor, index: Tensor, total: int) -> Tensor:
    """Uniform u (B,) of items `index` (B,) of a global batch of `total` -> one point in each of `total` equal strata of [0, 1)."""
    return (index + u) / total


def draw_t(u: Tensor, config: DiffusionConfig, schedule: Schedule) -> Tensor:
    """Noise levels t (B,) float32 from uniforms u (B,) in [0, 1), by the inverse of the density's distribution function."""
    return u.float()


def x0_error_scale(logsnr: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The factor from the squared error of a prediction to the squared error of x0, at fixed x_t."""
    match prediction:
        case "x0": return torch.ones_like(logsnr)
        case "eps": return torch.exp(-logsnr)
        case "v": return (sigma / (alpha**2 + sigma**2)) ** 2
        case "flow": return (sigma / (alpha + sigma)) ** 2
    raise ValueError(f"prediction {prediction!r} is not one of v, eps, x0, flow")


def losses(model: Callable, x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule, config: DiffusionConfig,
           **condition) -> tuple[Tensor, Tensor]:
    """Per-sample training loss: (weighted (B,), raw (B,)) float32.

    `weighted` is what is minimised; `raw` is the mean squared error of v = alpha eps - sigma x0 of the variance-preserving
    process whatever the network predicts, so raw losses of different targets, weights and schedules can be compared.
    """
    alpha, sigma = schedule.alpha_sigma(t)
    logsnr = schedule.logsnr(t)
    x_t = noised(x0, eps, t, schedule)
    output = model(x_t, t, **condition).float()
    goal = target(x0, eps, expand(alpha, x0), expand(sigma, x0), config.prediction)
    error = (output - goal).square().flatten(1).mean(1)                                           # (B,)
    scale = x0_error_scale(logsnr, alpha, sigma, config.prediction)
    raw = error * scale * (1 + torch.exp(logsnr))
    if config.loss_weight == "min_snr":  # Hang et al. 2023, 2303.09556: min(SNR, gamma) on x0, whatever is predicted
        return error * scale * torch.exp(logsnr).clamp(max=config.snr_gamma), raw
    return error, raw


def loss_buckets(loss: Tensor, logsnr: Tensor, buckets: int = 8) -> tuple[Tensor, Tensor]:
    """Sums and counts (buckets,) of per-sample losses by noise level, clean first; no host synchronisation.

    Buckets are equal parts of the angle atan(sigma/alpha), which are equal parts of t on the unshifted cosine schedule;
    edges for 8: logsnr 3.23, 1.76, 0.81, 0, ... and their negatives.
    """
    angle = torch.atan(torch.exp(-logsnr / 2)) * (2 / math.pi)
    member = (angle * buckets).long().clamp(max=buckets - 1)[:, None] == torch.arange(buckets, device=loss.device)
    return loss.float() @ member.float(), member.sum(0).float()


# ---------------------------------------------------------------------------------------------------------------------
# Denoisers: denoise(x_t, t) -> x0, and functions from denoiser to denoiser


def denoiser(model: Callable, schedule: Schedule, config: DiffusionConfig, condition: dict) -> Callable:
    """denoise(x_t (B, ...), t (B,)) -> x0 (B, ...) float32 of a network under a condition."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(c, x_t) for c in schedule.alpha_sigma(t))
        output = model(x_t, t, **condition).float()
        return x0_eps(output, x_t, alpha, sigma, config.prediction)[0]

    return denoise


def unconditional(condition: dict) -> dict:
    """The same condition with the text hidden: mask all False. The low-resolution picture stays."""
    return {**condition, "mask": torch.zeros_like(condition["mask"])}


def stack(conditions: list[dict]) -> dict:
    """One condition of the rows of several, key by key; a key is None in all of them or in none."""
    return {key: None if value is None else torch.cat([c[key] for c in conditions]) for key, value in conditions[0].items()}


def guided(model: Callable, schedule: Schedule, config: DiffusionConfig, condition: dict, guidance_scale: float,
           negative: dict | None = None) -> Callable:
    """Classifier-free guidance, x0 = uncond + w (cond - uncond) (Ho & Salimans 2022, 2207.12598, eq. 6 with w = 1 for none).

    One network call: of B rows when w = 1, else of 2B. `negative` takes the place of the empty prompt.
    """
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale {guidance_scale} is not a finite number of at least 0 (1 = none)")
    if guidance_scale == 1:
        return denoiser(model, schedule, config, condition)
    both = denoiser(model, schedule, config, stack([condition, negative or unconditional(condition)]))

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        cond, uncond = both(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
        return torch.lerp(uncond, cond, guidance_scale)

    return denoise


def static_threshold(denoise: Callable) -> Callable:
    """x0 clipped to the range of pictures, [-1, 1]."""
    return lambda x_t, t: denoise(x_t, t).clamp(-1, 1)


def dynamic_threshold(denoise: Callable, percentile: float = 0.995) -> Callable:
    """x0 clipped to +-s and divided by s, s = max(1, percentile of |x0|) of each picture (Saharia et al. 2022, 2205.11487, 2.3).

    The percentile interpolates linearly like torch.quantile, which refuses more than 16 million numbers.
    """
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


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: (denoise, x, times, noise, schedule) -> x at times[-1]


def time_grid(steps: int, start: float = 1.0) -> Tensor:
    """Falling times (steps + 1,) float64 from `start` to exactly 0, uniform in t."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: at least 1 is needed")
    if not 0 < start <= 1:
        raise ValueError(f"start time {start} is not in (0, 1]")
    return torch.linspace(start, 0, steps + 1, dtype=torch.float64)


def levels(x: Tensor, times: Tensor, schedule: Schedule) -> tuple[Tensor, list[float], list[float], list[float]]:
    """t (N+1, B) on the device of x; alpha, sigma, logsnr as N+1 host floats each, computed in float64 before the loop.

    t = 0 is exactly clean: alpha 1, sigma 0, logsnr inf. Python floats travel as kernel arguments: nothing is copied or waited for.
    """
    times = times.detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all() or not 0 <= times[-1] < times[0] <= 1:
        raise ValueError(f"times {times.tolist()[:8]} must be 1-D, at least 2, falling, within [0, 1]")
    alpha, sigma, logsnr = *schedule.alpha_sigma(times), schedule.logsnr(times)
    if times[-1] == 0:
        alpha[-1], sigma[-1], logsnr[-1] = 1, 0, math.inf
    return times.to(x)[:, None].expand(-1, len(x)), alpha.tolist(), sigma.tolist(), logsnr.tolist()


def ddim(denoise: Callable, x: Tensor, times: Tensor, noise: Callable, schedule: Schedule, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2020, 2010.02502, eq. 12 and 16). eta 0 is deterministic, eta 1 is ancestral DDPM."""
    t, alpha, sigma, logsnr = levels(x, times, schedule)
    for i in range(len(t) - 1):
        x0 = denoise(x, t[i])
        if sigma[i + 1] == 0:
            return x0
        fresh = eta * sigma[i + 1] * math.sqrt(-math.expm1(logsnr[i] - logsnr[i + 1]))
        eps = (x - alpha[i] * x0) / sigma[i]
        x = alpha[i + 1] * x0 + math.sqrt(sigma[i + 1] ** 2 - fresh**2) * eps
        if fresh:
            x = x + fresh * noise(i)
    return x


def dpmpp_2m(denoise: Callable, x: Tensor, times: Tensor, noise: Callable, schedule: Schedule) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2): second order, one evaluation a step.

    The first step, and the last one when it ends at t = 0, are of first order.
    """
    t, alpha, sigma, logsnr = levels(x, times, schedule)
    before = None
    for i in range(len(t) - 1):
        x0 = denoise(x, t[i])
        if sigma[i + 1] == 0:
            return x0
        h = (logsnr[i + 1] - logsnr[i]) / 2
        d = x0
        if before is not None:
            d = x0 + (x0 - before) * (h / (logsnr[i] - logsnr[i - 1]))
        x = (sigma[i + 1] / sigma[i]) * x - (alpha[i + 1] * math.expm1(-h)) * d
        before = x0
    return x


SAMPLERS = {"dpmpp_2m": dpmpp_2m, "ddim": ddim}
