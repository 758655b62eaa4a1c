"""Noise schedule, training losses and distillation."""

import math

import torch
from torch import Tensor

from pixart_nodes.checkpoints import load_transformer
from pixart_nodes.diffusion import consistency, schedule
from pixart_nodes.diffusion.losses import GaussianPosterior, diffusion_loss, mean_flat, pseudo_huber

from .case import Case
from .network import call


def float32_alphas_cumprod() -> Tensor:
    """As diffusers' schedulers compute it; 1 - alphas_cumprod at the first timesteps shows the rounding."""
    b = torch.linspace(schedule.BETA_START, schedule.BETA_END, schedule.NUM_TIMESTEPS)
    return (1 - b).cumprod(0)


def noise_schedule(case: Case):
    """Everything that follows from betas, alphas_cumprod, sigmas, snr and the posterior's tables.

    The respaced ancestral sampler and min-SNR for v-prediction are not part of the pack: their numbers are derived
    here from ours. `space_timesteps` is only an input to them.
    """
    golden = case.json()
    at = golden["indices"]
    b, a, sigma = schedule.betas(), schedule.alphas_cumprod(), schedule.sigmas()
    a_prev = torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])
    snr = schedule.snr(float32_alphas_cumprod())
    kept = snr.clamp(max=5)
    posterior = GaussianPosterior().tables
    ours = {
        "betas": b, "alphas_cumprod_float64": a, "alphas_cumprod_diffusers_fp32": a.float(),
        "k_diffusion_sigma": sigma, "log_sigma": sigma.log(), "snr": snr,
        "min_snr_gamma5_weight_eps": kept / snr, "min_snr_gamma5_weight_v": kept / (snr + 1),
        "min_snr_gamma5_weight_v_repo_variant": (snr + 1).clamp(max=5) / (snr + 1),
        "posterior_variance": b * (1 - a_prev) / (1 - a), "posterior_log_variance_clipped": posterior["log_min"],
        "posterior_mean_coef1": posterior["mean_x0"], "posterior_mean_coef2": posterior["mean_x"],
    }  # fmt: skip
    for name, table in ours.items():
        yield name, table[at], torch.tensor(golden[name], dtype=torch.float64)
    yield "sigma_min", sigma[:1], torch.tensor([golden["sigma_min"]], dtype=torch.float64)
    yield "sigma_max", sigma[-1:], torch.tensor([golden["sigma_max"]], dtype=torch.float64)
    for row in golden["t_to_sigma_log_linear"]:
        low = math.floor(row["t"])
        between = torch.lerp(sigma.log()[low], sigma.log()[math.ceil(row["t"])], row["t"] - low).exp()
        yield f"sigma at {row['t']}", between, torch.tensor(row["sigma"], dtype=torch.float64)
    for name in (name for name in golden if name.startswith("respaced_")):
        kept_a = a[golden[name]["timestep_map"]]
        respaced = 1 - kept_a / torch.cat([torch.ones(1, dtype=a.dtype), kept_a[:-1]])
        yield name, respaced, torch.tensor(golden[name]["betas"], dtype=torch.float64)


def noise_schedule_full(case: Case):
    snr = schedule.snr(float32_alphas_cumprod())
    a = schedule.alphas_cumprod()
    ours = {
        "alphas_cumprod": a, "alphas_cumprod_diffusers": a, "k_sigmas": schedule.sigmas(),
        "min_snr5_eps": snr.clamp(max=5) / snr,
    }  # fmt: skip
    for name, golden in case.tensors("out").items():
        yield name, ours[name].float(), golden


def iddpm_training_loss(case: Case):
    """The training loss with learned variance, its parts and its gradients."""
    inputs, golden = case.tensors("in"), case.tensors("out")
    model, _ = load_transformer(case.tensors("weights"), config=case.config)
    posterior, x0, noise, t = GaussianPosterior(), inputs["x_start"], inputs["noise"], inputs["t"]
    x_t = posterior.add_noise(x0, noise, t)
    output = call(model, {**inputs, "x": x_t, "timestep": t.float()})
    mse, vb = diffusion_loss(posterior, output, x0, noise, x_t, t)
    (mse + vb).mean().backward()
    with torch.no_grad():
        eps, interpolation = output.chunk(2, dim=1)
        pred_x0 = posterior.predict_x0(x_t, eps, t)
        log_variance = posterior.learned_log_variance(interpolation, t)
        snr_mse = torch.where(t > 249, mse, (x0 - pred_x0).square().flatten(1).mean(1))  # its snr=True variant
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        ours = {
            "loss_terms.mse": mse, "loss_terms.vb": vb, "loss_terms.loss": mse + vb, "x_t": x_t,
            "loss_terms_snr.mse": snr_mse, "loss_terms_snr.vb": vb, "loss_terms_snr.loss": snr_mse + vb,
            "model_output": output, "p_mean_variance.mean": posterior.mean(pred_x0, x_t, t),
            "p_mean_variance.variance": log_variance.exp(), "p_mean_variance.log_variance": log_variance,
            "p_mean_variance.pred_xstart": pred_x0, "q_posterior.mean": posterior.mean(x0, x_t, t),
            "q_posterior.log_variance_clipped": posterior.at("log_min", t, x0).expand_as(x0),
            "grad_norm_all": torch.stack([g.norm() for g in gradients.values()]).norm(),
        }  # fmt: skip
        ours |= {f"grad.{name}": gradient for name, gradient in gradients.items()}
        for name in golden:
            yield name, ours[name].detach(), golden[name]


def lcm_train_pieces(case: Case):
    """Boundary scalings, the DDIM solver and x0. The pack has no v-prediction; that number is derived here."""
    inputs, solver = case.tensors("in"), consistency.DDIMSolver(case.config["num_ddim_timesteps"])
    a = float32_alphas_cumprod()[inputs["timesteps"]]
    sample, output, index = inputs["sample"], inputs["model_output"], torch.arange(len(solver.timesteps))
    c_skip, c_out = consistency.boundary_scalings(inputs["t"])
    ours = {
        "c_skip": c_skip, "c_out": c_out, "ddim_timesteps": solver.timesteps,
        "ddim_alpha_cumprods": solver.alphas[solver.timesteps],
        "ddim_alpha_cumprods_prev": solver.alphas[solver.before(index)],
        "ddim_step": solver.step(inputs["pred_x0"], inputs["pred_noise"], inputs["index"]),
        "predicted_origin_epsilon": schedule.predict_x0(sample, output, a),
        "predicted_origin_v": a.view(-1, 1, 1, 1).sqrt() * sample - (1 - a).view(-1, 1, 1, 1).sqrt() * output,
    }  # fmt: skip
    for name, golden in case.tensors("out").items():
        # x0 divides by sqrt(a), 0.0064 at t = 999, where math libraries round sqrt(1 - a) up or down.
        gain = float(1 / a.min().sqrt()) if name == "predicted_origin_epsilon" else 1.0
        yield name, ours[name], golden, gain


def lcm_distill_loss(case: Case):
    """Whole distillation steps, with all that happens on the way, and the student's gradients."""
    golden, inputs = case.tensors("out"), case.tensors("in")
    for run, settings in case.entry["runs"].items():
        ours = _distillation(case, inputs, run, settings)
        for name in (name for name in golden if name.startswith(run + ".")):
            yield name, ours[name.removeprefix(run + ".")].detach(), golden[name]


def _distillation(case: Case, inputs, run: str, settings) -> dict[str, Tensor]:
    load = {"student": None, "ema": None, "teacher": None}
    for role in load:
        load[role], _ = load_transformer(case.tensors(settings[role]), config=case.config)

    def eps(role, x, t, caption=None):
        return call(load[role], inputs, x=x, timestep=t.float(), **caption or {})[:, :4]

    solver = consistency.DDIMSolver(case.config["num_ddim_timesteps"])
    index, w = inputs[f"{run}.index"], settings["cfg_scale"]
    w = inputs[w.removeprefix("in.")] if isinstance(w, str) else torch.full((len(index),), float(w))
    start, before = solver.timesteps[index], solver.before(index)
    x = schedule.add_noise(inputs["latents"], inputs["noise"], solver.alphas[start])
    prediction = consistency.consistency_function(x, eps("student", x, start), start, solver.alphas)
    null = load["teacher"].y_embedder.y_embedding.expand_as(inputs["y"])
    with torch.no_grad():
        cond, uncond = eps("teacher", x, start), eps("teacher", x, start, {"y": null})
        x_prev = consistency.guided_teacher_step(solver, x, cond, uncond, index, w + 1)
        ema_eps = eps("ema", x_prev, before)
    target = consistency.lcm_target(solver, lambda x, t: eps("ema", x, t), x, cond, uncond, index, w + 1)
    if settings["loss_type"] == "huber":
        loss = pseudo_huber(prediction, target, settings["huber_c"]).mean()
    else:
        loss = mean_flat((prediction - target) ** 2).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in load["student"].named_parameters() if p.grad is not None}
    guided, at_start = cond + w.view(-1, 1, 1, 1) * (cond - uncond), solver.alphas[start]
    scalings = {f"{c}{at}": value.view(-1, 1, 1, 1) for at, t in (("_start", start), ("", before))
                for c, value in zip(("c_skip", "c_out"), consistency.boundary_scalings(t), strict=True)}  # fmt: skip
    return {
        "start_timesteps": start, "timesteps": before, "w": w.view(-1, 1, 1, 1), "noisy_model_input": x,
        "model_pred": prediction, "cond_teacher_output": cond, "uncond_teacher_output": uncond,
        "cond_pred_x0": schedule.predict_x0(x, cond, at_start), "pred_noise": guided,
        "uncond_pred_x0": schedule.predict_x0(x, uncond, at_start),
        "pred_x0": schedule.predict_x0(x, guided, at_start), "x_prev": x_prev, "target": target, "loss": loss,
        "ema_pred_x0": schedule.predict_x0(x_prev, ema_eps, solver.alphas[before]),
        "grad_norm_all": torch.stack([g.norm() for g in gradients.values()]).norm(),
        **scalings, **{f"grad.{name}": gradient for name, gradient in gradients.items()},
    }  # fmt: skip
