"""Latent consistency models (Luo et al. 2023): what an LCM computes, and what it is distilled from.

Constants and formulas of PixArt-alpha train_scripts/train_pixart_lcm.py. t (B,) are integer timesteps, latents
(B, 4, H, W), eps the network's noise. Guidance is ComfyUI's: 1 = off; the original's w is guidance - 1.
"""

import torch
from torch import Tensor

from .samplers import LCM_TIMESTEPS
from .schedule import NUM_TIMESTEPS, alphas_cumprod, predict_x0

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
GUIDANCE = 5.5  # what PixArt-LCM was distilled with: its cfg_scale 4.5 is w


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) like t: at t = 0 the consistency function is the latent itself, soon after it is x0."""
    scaled = TIMESTEP_SCALING * t
    squares = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / squares, scaled / squares**0.5


def consistency_function(x: Tensor, eps: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    """f(x, t) = c_skip x + c_out x0 for x (B, 4, H, W) at t; alphas (1000,) is the table of alphas_cumprod."""
    c_skip, c_out = (c.view(-1, 1, 1, 1).to(x) for c in boundary_scalings(t))
    return c_skip * x + c_out * predict_x0(x, eps, alphas[t])


class DDIMSolver:
    """The teacher's path, in equal steps from one of its timesteps to the next lower one, and from the lowest to 0."""

    def __init__(self, steps: int = LCM_TIMESTEPS, device=None):
        self.spacing = NUM_TIMESTEPS // steps
        self.timesteps = torch.arange(1, steps + 1, device=device) * self.spacing - 1  # (steps,) 19, 39, ..., 999
        self.alphas = alphas_cumprod().to(device)                                      # (1000,) float64

    def before(self, index: Tensor) -> Tensor:
        """The timesteps (B,) one step below timesteps[index]."""
        return (self.timesteps[index] - self.spacing).clamp(min=0)

    def step(self, x0: Tensor, eps: Tensor, index: Tensor) -> Tensor:
        """The latent at `before(index)` on the straight line that x0 and eps span (Song et al. 2021, eq. 12)."""
        a = self.alphas[self.before(index)].view(-1, 1, 1, 1)
        return a.sqrt().to(x0) * x0 + (1 - a).sqrt().to(x0) * eps


def guided_teacher_step(
    solver: DDIMSolver, x: Tensor, cond: Tensor, uncond: Tensor, index: Tensor, guidance: float | Tensor = GUIDANCE
) -> Tensor:
    """One DDIM step of the teacher with guidance: x at timesteps[index] -> x at before(index).

    cond and uncond are the teacher's noise for the caption and for the null caption; guidance a number or (B,).
    """
    guidance = torch.as_tensor(guidance, device=x.device, dtype=x.dtype).view(-1, 1, 1, 1)
    eps = cond + (guidance - 1) * (cond - uncond)
    return solver.step(predict_x0(x, eps, solver.alphas[solver.timesteps[index]]), eps, index)


def lcm_target(solver: DDIMSolver, network, x: Tensor, cond: Tensor, uncond: Tensor, index: Tensor, guidance=GUIDANCE):
    """What the student's f(x, timesteps[index]) shall be: the target network's f after one step of the teacher.

    network(latent, t) -> eps is the student's moving average, or for LCM-LoRA the student itself.
    """
    with torch.no_grad():
        x_before, t = guided_teacher_step(solver, x, cond, uncond, index, guidance), solver.before(index)
        return consistency_function(x_before, network(x_before, t), t, solver.alphas)
