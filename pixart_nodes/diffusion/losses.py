"""Training losses of the original (PixArt-alpha diffusion/model/gaussian_diffusion.py:681-814)."""

import math

import torch
from torch import Tensor

from .schedule import alphas_cumprod, betas, snr


def mean_flat(x: Tensor) -> Tensor:
    """Mean over everything but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) in nats, element by element."""
    return 0.5 * (-1.0 + logvar2 - logvar1 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-likelihood of x, 8-bit values in -1..1, under N(mean, exp(2 log_scale)), in nats (Ho et al. 2020)."""
    centred, inverse_scale = x - mean, (-log_scale).exp()
    above = approx_standard_normal_cdf(inverse_scale * (centred + 1.0 / 255.0))
    below = approx_standard_normal_cdf(inverse_scale * (centred - 1.0 / 255.0))
    log_above, log_not_below = above.clamp(min=1e-12).log(), (1.0 - below).clamp(min=1e-12).log()
    inside = (above - below).clamp(min=1e-12).log()
    return torch.where(x < -0.999, log_above, torch.where(x > 0.999, log_not_below, inside))


class GaussianPosterior:
    """q(x_{t-1} | x_t, x0) and the learned p(x_{t-1} | x_t), for the 1000 steps of the schedule."""

    def __init__(self, device=None):
        b, a = betas(), alphas_cumprod()
        a_prev = torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])
        variance = b * (1 - a_prev) / (1 - a)
        tables = {
            "sqrt_a": a.sqrt(), "sqrt_one_minus_a": (1 - a).sqrt(),
            "x0_from_x": (1 / a).sqrt(), "x0_from_eps": (1 / a - 1).sqrt(),
            "mean_x0": b * a_prev.sqrt() / (1 - a), "mean_x": (1 - a_prev) * (1 - b).sqrt() / (1 - a),
            "log_min": torch.cat([variance[1:2], variance[1:]]).log(),  # variance[0] = 0: the original repeats [1]
            "log_max": b.log(), "snr": snr(a),
        }  # fmt: skip
        self.tables = {name: table.float().to(device) for name, table in tables.items()}

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        return self.tables[name][t].view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.at("sqrt_a", t, x0) * x0 + self.at("sqrt_one_minus_a", t, x0) * noise

    def predict_x0(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.at("x0_from_x", t, x) * x - self.at("x0_from_eps", t, x) * eps

    def mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.at("mean_x0", t, x) * x0 + self.at("mean_x", t, x) * x

    def learned_log_variance(self, interpolation: Tensor, t: Tensor) -> Tensor:
        """The last channels, in about -1..1, choose between the two bounds (Nichol & Dhariwal 2021, eq. 15)."""
        f = (interpolation + 1) / 2
        return f * self.at("log_max", t, f) + (1 - f) * self.at("log_min", t, f)

    def variational_bound(self, x0: Tensor, x: Tensor, t: Tensor, eps: Tensor, interpolation: Tensor) -> Tensor:
        """Bits per dimension of one step, (B,); at t = 0 the likelihood of x0 instead of the divergence."""
        mean = self.mean(self.predict_x0(x, eps, t), x, t)
        log_variance = self.learned_log_variance(interpolation, t)
        kl = normal_kl(self.mean(x0, x, t), self.at("log_min", t, x), mean, log_variance)
        nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 0.001) -> Tensor:
    """sqrt(d^2 + c^2) - c, (B,): like d^2 near zero, like |d| beyond c (PixArt-alpha train_pixart_lcm.py:226-229)."""
    return mean_flat(((prediction - target) ** 2 + c**2).sqrt() - c)


def min_snr_weight(snr: Tensor, gamma: float) -> Tensor:
    """Loss weight min(snr, gamma) / snr of a noise predictor, (B,) (Hang et al. 2023)."""
    return snr.clamp(max=gamma) / snr


def diffusion_loss(posterior: GaussianPosterior, output: Tensor, x0: Tensor, noise: Tensor, x: Tensor, t: Tensor):
    """Noise MSE plus the learned-variance term, each (B,); the variance term does not move the noise estimate.

    output (B, 8, H, W) is the network's at x = add_noise(x0, noise, t), t (B,) integer timesteps.
    """
    eps, interpolation = output.chunk(2, dim=1)
    mse = mean_flat((noise - eps) ** 2)
    return mse, posterior.variational_bound(x0, x, t, eps.detach(), interpolation)
