"""The formulas behind LCM distillation, on a teacher that is right by construction."""

import pytest
import torch

from pixart_nodes.diffusion.consistency import (
    DDIMSolver,
    boundary_scalings,
    consistency_function,
    guided_teacher_step,
    lcm_target,
)
from pixart_nodes.diffusion.losses import pseudo_huber
from pixart_nodes.diffusion.schedule import add_noise


@pytest.fixture
def solver():
    return DDIMSolver()


def pair(batch=3):
    return torch.randn(2, batch, 4, 6, 5, generator=torch.Generator().manual_seed(1))


def test_at_time_zero_the_consistency_function_is_the_latent_and_later_it_is_x0(solver):
    x0, eps = pair()
    t = torch.tensor([0, 19, 999])
    x = add_noise(x0, eps, solver.alphas[t])
    out = consistency_function(x, eps, t, solver.alphas)
    assert torch.equal(out[0], x[0])
    assert torch.allclose(out[1:], x0[1:], atol=2e-4)
    c_skip, c_out = boundary_scalings(t.double())
    assert torch.allclose(c_skip[1:], torch.tensor([6.925e-6, 2.505e-9]).double(), rtol=1e-3)
    assert torch.allclose(c_skip / 0.25, (1 - c_out**2) / 0.25, atol=1e-9)


def test_a_ddim_step_keeps_picture_and_noise_and_lowers_the_timestep(solver):
    x0, eps = pair()
    index = torch.tensor([0, 12, 49])
    assert solver.timesteps[index].tolist() == [19, 259, 999]
    assert solver.before(index).tolist() == [0, 239, 979]
    expected = add_noise(x0, eps, solver.alphas[solver.before(index)])
    assert torch.allclose(solver.step(x0, eps, index), expected, atol=1e-6)


def test_guidance_one_is_the_caption_alone_and_may_differ_from_sample_to_sample(solver):
    (x0, cond), (_, uncond) = pair(), pair().flip(0)
    index = torch.tensor([3, 20, 30])
    x = add_noise(x0, cond, solver.alphas[solver.timesteps[index]])
    alone = guided_teacher_step(solver, x, cond, uncond, index, guidance=1.0)
    assert torch.allclose(alone, solver.step(x0, cond, index), atol=1e-4)
    by_default = guided_teacher_step(solver, x, cond, uncond, index)
    mixed = guided_teacher_step(solver, x, cond, uncond, index, guidance=torch.tensor([1.0, 5.5, 1.0]))
    assert torch.equal(mixed[[0, 2]], alone[[0, 2]]) and torch.equal(mixed[1], by_default[1])
    assert not torch.allclose(by_default, alone, atol=1e-2)


def test_a_student_that_knows_the_path_meets_its_target(solver):
    x0, eps = pair()
    index = torch.tensor([5, 20, 40])
    t = solver.timesteps[index]
    x = add_noise(x0, eps, solver.alphas[t])
    target = lcm_target(solver, lambda x, t: eps, x, eps, eps, index)
    assert torch.allclose(consistency_function(x, eps, t, solver.alphas), target, atol=1e-3)
    assert pseudo_huber(target, x0).max() < 1e-3


def test_no_gradient_flows_into_the_target(solver):
    x0, eps = pair()
    weight = torch.ones((), requires_grad=True)
    target = lcm_target(solver, lambda x, t: weight * x, x0, eps, eps, torch.tensor([0, 1, 2]))
    assert not target.requires_grad


def test_pseudo_huber_is_a_parabola_near_zero_and_the_distance_far_away():
    near, far = torch.full((1, 4, 2, 2), 1e-4), torch.full((1, 4, 2, 2), 10.0)
    zero = torch.zeros_like(near)
    assert pseudo_huber(near, zero, c=0.01).item() == pytest.approx(1e-8 / 0.02, rel=0.02)
    assert pseudo_huber(far, zero, c=0.01).item() == pytest.approx(10 - 0.01, rel=1e-5)
    assert pseudo_huber(torch.cat([near, far]), torch.cat([zero, zero])).shape == (2,)
