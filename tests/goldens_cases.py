"""The golden cases, recomputed with this pack: every case yields (name, ours, golden[, gain]) for each stored result.

Configurations, inputs, scales and tolerances come from the fixtures' index, so that another set of fixtures runs
unchanged. Used by test_goldens.py and by tools/parity_table.py.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pixart_nodes.checkpoints import load_controlnet, load_transformer
from pixart_nodes.checkpoints.controlnet import base_of
from pixart_nodes.checkpoints.keys import POS_EMBED, Y_EMBEDDING, to_diffusers, to_native
from pixart_nodes.data.buckets import TABLES, TEST_TABLES, nearest, nearest_key
from pixart_nodes.diffusion import consistency, samplers, schedule
from pixart_nodes.diffusion.losses import GaussianPosterior, diffusion_loss, mean_flat, pseudo_huber
from pixart_nodes.model.embedders import ScalarEmbedder, timestep_embedding
from pixart_nodes.model.position import position_table
from pixart_nodes.text.captions import clean_caption, clean_caption_once, no_cleaning
from pixart_nodes.vae import exact_tiles as vae_tiles


@dataclass(frozen=True)
class Case:
    name: str
    entry: dict      # of the index
    folder: Path

    @property
    def config(self) -> dict:
        return self.entry["config"]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Those named `group.*`, without the group."""
        everything = load_file(self.folder / self.entry["file"])
        return {name[len(group) + 1 :]: t for name, t in everything.items() if name.startswith(group + ".")}

    def json(self):
        return json.loads((self.folder / self.entry["file"]).read_text(encoding="utf-8"))


def read_cases(folder: Path) -> list[Case]:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return [Case(name, entry, folder) for name, entry in index["cases"].items()]


def compare(tolerance, name: str, ours, golden, gain: float = 1.0) -> tuple[float, float]:
    """(error, what is allowed) by the index's tolerance: a number is absolute, words say "rel x [of max(1,max|out|)]".

    Without a tolerance, and for anything but tensors, only equality will do. gain: by how much the result multiplies
    the rounding of what the tolerance is about.
    """
    if tolerance is None or not isinstance(golden, Tensor):
        return (0.0 if ours == golden else math.inf), 0.0
    if ours.shape != golden.shape or not ours.isfinite().all():
        return math.inf, 0.0
    error, golden = (ours.double() - golden.double()).abs(), golden.double().abs()
    if not isinstance(tolerance, str):
        return error.max().item(), tolerance * gain
    limits = [float(number) for number in re.findall(r"rel (\d[\d.e-]*)", tolerance)]
    other = ("gradients" in tolerance and "grad" in name) or ("for fp32" in tolerance and ours.dtype == torch.float32)
    limit = limits[1] if other else limits[0]
    if "max(1" in tolerance:
        return error.max().item(), limit * max(1.0, golden.max().item()) * gain
    return (error / golden.clamp(min=1e-300)).where(error > 0, 0).max().item(), limit


def transformer(case: Case):
    weights, inputs = case.tensors("weights"), case.tensors("in")
    for name, golden in case.tensors("out").items():
        with torch.no_grad():
            ours = _transformer_output(case, name, weights, inputs)
        if name == "forward_with_cfg":
            # uncond + s (cond - uncond) adds the rounding of two passes up to 2 s - 1 times: in float64, too, this
            # network is 1.4e-5 from the shared fixture. Channels 3: are those of a single pass.
            yield f"{name} (guided)", ours[:, :3], golden[:, :3], 2 * _cfg_scale(case) - 1
            name, ours, golden = f"{name} (unguided)", ours[:, 3:], golden[:, 3:]
        yield name, ours, golden


def _cfg_scale(case: Case) -> float:
    return float(re.search(r"cfg_scale[= ]([\d.]*\d)", case.entry["outputs"]["out.forward_with_cfg"])[1])


def _transformer_output(case: Case, name: str, weights, inputs) -> Tensor:
    config = dict(case.config)
    if config["kv_compress_config"] is not None:  # one output per way of sampling, all from the same weights
        kv = {**config["kv_compress_config"], "sampling": name}
        config["kv_compress_config"] = None if name == "none" else kv
        name = "forward"
    if name == "diffusers_forward":
        family = config["family"].split()[0]
        weights, config = case.tensors("diffusers"), case.entry["diffusers_config"]
        model, _ = load_transformer(weights, config=config, family=family)
        return call(model, inputs)
    model, _ = load_transformer(weights, config=config)
    return OUTPUTS[name](model, inputs, case)


def call(model, inputs, **changes) -> Tensor:
    """The network on the inputs of a fixture, all its output channels."""
    i = {**inputs, **changes}
    return model(
        i["x"], i["timestep"], i["y"].squeeze(1), i["mask"], i.get("img_hw"), i.get("aspect_ratio"),
        i.get("control"), learned_variance=True,
    )  # fmt: skip


def controlnet(case: Case):
    """The original's file with both halves, with a control latent and without."""
    weights, inputs = case.tensors("weights"), case.tensors("in")
    model, _ = load_transformer(base_of(weights), config=case.config)
    net, _ = load_controlnet(weights, config=case.config)
    branch = {"branches": [net.branch(inputs["c"])]}
    controls = {"with_c": branch, "forward_with_dpmsolver": branch, "c_none": None}
    for name, golden in case.tensors("out").items():
        with torch.no_grad():
            ours = call(model, inputs, control=controls[name])
        yield name, ours[:, : model.params.in_channels] if "dpmsolver" in name else ours, golden


def _with_cfg(model, inputs, case: Case) -> Tensor:
    """The original's forward_with_cfg: caption and null caption in one batch under the caption's mask (alpha's
    multi-scale class forgets it), guidance on three of the four noise channels, the rest unguided."""
    twice = {name: torch.cat([inputs[name]] * 2) for name in inputs}
    null = model.y_embedder.y_embedding.expand_as(inputs["y"])
    if case.config["micro_condition"]:
        twice["mask"] = None
    out = call(model, {**twice, "y": torch.cat([inputs["y"], null])})
    cond, uncond = out[:, :3].chunk(2)
    guided = uncond + _cfg_scale(case) * (cond - uncond)
    return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)


OUTPUTS = {
    "forward": lambda model, i, case: call(model, i),
    "forward_nomask": lambda model, i, case: call(model, i, mask=None),
    "forward_mask_holes": lambda model, i, case: call(model, i, mask=i["mask"].flip(1)),
    "forward_mask_bcast": lambda model, i, case: call(model, i, mask=i["mask"][:1]),
    "forward_data_bcast": lambda model, i, case: call(
        model, i, img_hw=i["img_hw"][:1], aspect_ratio=i["aspect_ratio"][:1]
    ),
    "forward_with_dpmsolver": lambda model, i, case: call(model, i)[:, : model.params.in_channels],
    "forward_with_cfg": _with_cfg,
}


def key_map(case: Case):
    """The map, value by value, on every fixture that holds both spellings of the same weights."""
    golden = case.json()
    dropped = set(golden["dropped_original_keys"])
    yield "dropped", {POS_EMBED, Y_EMBEDDING}, dropped
    for other in read_cases(case.folder):
        if "diffusers_config" not in other.entry:
            continue
        native, theirs = other.tensors("weights"), other.tensors("diffusers")
        ours = to_diffusers(native)
        yield f"{other.name}.names", set(ours), set(theirs)
        yield f"{other.name}.native_names", set(to_native(theirs)), set(native) - dropped
        for row in golden["map"]:
            name, (part, parts) = row["diffusers"], row.get("chunk_dim0", (0, 1))
            if row["original"] in native:
                expected = native[row["original"]].chunk(parts)[part]
                yield f"{other.name}.{name}", ours[name].tolist(), expected.tolist()
                yield f"{other.name}.{name} (diffusers)", theirs[name].tolist(), expected.tolist()
        for name, tensor in to_native(theirs).items():
            yield f"{other.name}.{name}", tensor.tolist(), native[name].tolist()


def pos_embed_tables(case: Case):
    for name, golden in case.tensors("out").items():
        c = case.entry["combos"][name.split(".")[0]]
        rows, cols = c["grid_size"] if isinstance(c["grid_size"], list) else [c["grid_size"]] * 2
        yield name, position_table(rows, cols, c["embed_dim"], c["base_size"], c["scale"])[0], golden


def timestep_size_embeddings(case: Case):
    weights, inputs, c = case.tensors("weights"), case.tensors("in"), case.config

    def embed(name, width, values):                                           # values (B, n)
        embedder = ScalarEmbedder(width, operations=nn)
        embedder.load_state_dict({k.removeprefix(name + "."): v for k, v in weights.items() if k.startswith(name)})
        with torch.no_grad():
            return embedder(values.reshape(-1), torch.float32).reshape(values.shape[0], -1)

    t, hw, ar = inputs["t"], inputs["hw"], inputs["ar"]
    for name, golden in case.tensors("out").items():
        if name == "t_embedder":
            ours = embed("t_embedder", c["hidden"], t[:, None])
        elif name.startswith("size_embedder"):
            values = ar if name == "size_embedder_ar" else hw
            if "bcast" in name:
                values = hw[:1].repeat(int(name.split("bcast")[1]), 1)
            ours = embed("size_embedder", c["size_hidden"], values)
        else:
            kind, width = re.fullmatch(r"timestep_embedding_(?:(hw|ar)_)?(\d+)", name).groups()
            ours = timestep_embedding({None: t, "hw": hw, "ar": ar}[kind].reshape(-1), int(width))
        yield name, ours, golden


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


def caption_cleaning(case: Case):
    cleaners = {
        "original": clean_caption, "original_single_pass": clean_caption_once, "no_cleaning": no_cleaning,
        "diffusers_alpha": clean_caption, "diffusers_sigma": clean_caption, "diffusers_no_cleaning": no_cleaning,
    }  # fmt: skip
    for row in case.json():
        for kind, clean in cleaners.items():
            yield f"{kind}: {row['input'][:30]!r}", clean(row["input"]), row[kind]


def bucket_table(name: str):
    """Our table for the original's and diffusers' names: "alpha.ASPECT_RATIO_512_TEST"."""
    _, size, kind = re.fullmatch(r"(\w+)\.ASPECT_RATIO_(\d+)_?(TEST|BIN)?", name).groups()
    return TEST_TABLES[size] if kind == "TEST" or (kind == "BIN" and size != "2048") else TABLES[size]


def aspect_ratios(case: Case):
    """Tables and nearest buckets. Of the app's prompt flags only the choice of the bucket concerns us (--ar h:w)."""
    golden = case.json()
    for name, table in golden["tables"].items():
        ours = {float(ratio): [float(side) for side in size] for ratio, size in bucket_table(name).items()}
        yield name, ours, {float(ratio): size for ratio, size in table.items()}
    for row in golden["closest_ratio_examples"]:
        key, *size = nearest(bucket_table(row["table"]), row["height"], row["width"])
        name = f"{row['table']} {row['height']}x{row['width']}"
        yield name, (size, key), (row["bin"], row.get("ratio_key", key))
        if "pipeline_aspect_ratio_input" in row:
            yield f"{name} ratio", size[0] / size[1], row["pipeline_aspect_ratio_input"]
    for row in golden["prompt_examples"]:
        flag = re.search(r"--(?:ar|aspect_ratio) (\d+):(\d+)", row["prompt"])
        table = bucket_table(row["table"])
        key = nearest_key(table, int(flag[1]) / int(flag[2]) if flag else 1.0)
        ratio = torch.tensor(key).item()                                      # the original keeps it in float32
        yield row["prompt"], ([list(table[key])], [[ratio]]), (row["hw"], row["ar"])


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


def fake_eps(kind: str, x: Tensor, t: Tensor, cond: Tensor | float = 0.0) -> Tensor:
    """The stand-ins for a network with which the schedulers' golden trajectories were made; t broadcasts to x."""
    if kind == "tanh":
        return torch.tanh(0.8 * x + 0.5 * t / 1000 + 0.3 * cond)
    tau = t / 1000 + 0.001
    log_alpha = -(0.05 * tau + 4.975 * tau**2)
    x0 = torch.tanh(0.6 * x - 0.4 * t / 1000 + 0.3 * cond)
    return (x - log_alpha.exp() * x0) / (-torch.expm1(2 * log_alpha)).sqrt()


def trajectory(sampler, eps_at, to_denoised, x: Tensor, sigmas: Tensor, timesteps, **options):
    """Runs a k-diffusion sampler from the unit Gaussian x -> (the latents before each step, the predictions, the end).

    eps_at(latent, t) -> noise; to_denoised(latent, eps, t) -> what the sampler's model returns. Latents are scaled to
    the variance of the original's, not to k-diffusion's: in float64, because x0 at t = 999 multiplies the rounding of
    going there and back by 157. The network and its x0 are float32, as in the fixture.
    """
    calls, timesteps = [], iter(timesteps)
    x, sigmas = x.double(), sigmas.double()

    def model(scaled, sigma):
        t = next(timesteps)
        latent = scaled / (1 + sigma[0] ** 2).sqrt()
        calls.append((latent, to_denoised(latent.float(), eps_at(latent.float(), t), t)))
        return calls[-1][1]

    end = sampler(model, x * (1 + sigmas[0] ** 2).sqrt(), sigmas, disable=True, **options)
    latents, predictions = zip(*calls, strict=True)
    return latents, torch.stack(predictions), end / (1 + sigmas[-1] ** 2).sqrt()


def lcm_scheduler(case: Case):
    """Both grids. The original adds noise after the last step, too; its result is the last prediction, as ours.

    The predictions of "vp" stay below 1, but what the division by 0.0064 at t = 999 multiplies is the rounding of x_T,
    and math libraries round sqrt(1 - a) up or down there: that much more is allowed.
    """
    inputs, golden = case.tensors("in"), case.tensors("out")
    alphas, levels = float32_alphas_cumprod(), schedule.sigmas()
    for name, expected in golden.items():
        if name.startswith("timesteps."):
            _, grid, steps = name.split(".")
            yield name, torch.tensor(samplers.lcm_timesteps(int(steps), grid)), expected
            continue
        grid, kind, steps, what = name.split(".")
        timesteps = samplers.lcm_timesteps(int(steps), grid)
        noise = iter(inputs["noise"])
        before, denoised, end = trajectory(
            samplers.sample_lcm,
            lambda x, t, kind=kind: fake_eps(kind, x, torch.tensor(float(t))),
            lambda x, eps, t: consistency.consistency_function(x, eps, torch.full((len(x),), t), alphas),
            inputs["x_T"], torch.tensor([*levels[timesteps], 0.0]), timesteps,
            noise_sampler=lambda *_, noise=noise: next(noise),
        )  # fmt: skip
        gain = max(1.0, inputs["x_T"].abs().max().item()) if kind == "vp" else 1.0
        if what == "denoised":
            yield name, denoised, expected, gain
        else:
            after = torch.stack([*before[1:], end])
            compared = len(after) if grid == "diffusers" or len(after) == 1 else len(after) - 1
            yield name, after[:compared], expected[:compared], gain


def dpm_solver(case: Case):
    """DPM-Solver++ 2M on the grids of both repositories and of diffusers, and the schedule between two timesteps."""
    inputs, golden = case.tensors("in"), case.tensors("out")
    table = 0.5 * schedule.alphas_cumprod().log()
    for name, expected in golden.items():
        if name.startswith("noise_schedule."):
            yield name, _noise_schedule_vp(table, name.split(".")[1], inputs["t_continuous"].double()), expected
        elif name.startswith("original_"):
            yield name, _dpm_original(table, inputs, *name.removeprefix("original_").split(".", 1)), expected
        elif name.startswith("diffusers_"):
            variant, *rest = name.removeprefix("diffusers_").split(".")
            ours = _dpm_diffusers(inputs, golden[f"diffusers.{rest[-2]}.timesteps"], variant, rest)
            yield name, ours, expected
        else:                                  # diffusers' timesteps are the original's, rounded to the nearest
            steps = int(name.split(".")[1])
            yield name, samplers.original_timesteps(steps)[:-1].round().long(), expected
    for steps, row in case.entry["steps"].items():
        ours = samplers.original_timesteps(int(steps))[:-1]
        yield f"{steps} timesteps", ours, torch.tensor(row["original_model_timesteps"])


def _noise_schedule_vp(table, quantity: str, time: Tensor) -> Tensor:
    """The original's functions of continuous time, 0.001 to 1."""
    log_alpha = schedule.log_alpha_at(table, 1000 * time - 1)
    log_sigma = 0.5 * torch.log(-torch.expm1(2 * log_alpha))
    return {
        "log_alpha": log_alpha, "sigma": log_sigma.exp(), "lambda": log_alpha - log_sigma,
        "inverse_lambda_of_lambda": (schedule.timestep_at(table, log_alpha) + 1) / 1000,
    }[quantity]  # fmt: skip


def _dpm_original(table, inputs, repository: str, what: str) -> Tensor:
    kind, steps, result = re.fullmatch(r"(.+)\.(\d+)\.(\w+)", what).groups()
    kind, _, scale = kind.partition("_cfg")
    timesteps = samplers.original_timesteps(int(steps))
    # In float32, as the original: 1 - alphas_cumprod loses four digits at t = 0, which guidance makes visible.
    alpha = schedule.log_alpha_at(table.float(), timesteps).exp()
    sigmas = (1 - alpha**2).sqrt() / alpha

    def eps_at(x, t):
        eps = fake_eps(kind, x, t)
        return eps + float(scale) * (fake_eps(kind, x, t, inputs["cond"]) - eps) if scale else eps

    first_order = samplers.lower_order_final(repository, int(steps))
    latents = _dpm_latents(eps_at, inputs["x_T"], sigmas, timesteps[:-1].float(), first_order)
    return latents[-1] if result == "final" else latents


def _dpm_diffusers(inputs, timesteps, variant: str, rest) -> Tensor:
    """diffusers' grid and its last step: of first order below 15 steps and to sigma 0."""
    levels = schedule.sigmas()
    sigmas = torch.tensor([*levels[timesteps], 0.0 if variant == "zero" else levels[0]])
    if rest[-1] == "sigmas":
        return sigmas
    return _dpm_latents(
        lambda x, t: fake_eps(rest[0], x, t), inputs["x_T"], sigmas, timesteps.float(), len(timesteps) < 15
    )


def _dpm_latents(eps_at, x, sigmas, timesteps, first_order: bool) -> Tensor:
    """The latents after each step."""
    level = dict(zip(timesteps.tolist(), sigmas, strict=False))
    before, _, end = trajectory(
        samplers.sample_dpmpp_2m, eps_at,
        lambda x, eps, t: x * (1 + level[float(t)] ** 2).sqrt() - level[float(t)] * eps,
        x, sigmas, timesteps, lower_order_final=first_order,
    )  # fmt: skip
    return torch.stack([*before[1:], end])


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


def autoencoder_kl(case: Case):
    """Decode and encode in tiles, against diffusers' in one piece; tiles of several sizes, none of which divides."""
    from diffusers import AutoencoderKL

    levels = len(case.config["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    vae = AutoencoderKL.from_config({**case.config, **blocks}).eval()
    vae.load_state_dict(case.tensors("weights"))
    inputs, golden = case.tensors("in"), case.tensors("out")
    for tile in (40, 72, 512):
        mean, log_variance = vae_tiles.encode(vae, inputs["image"], tile=tile).chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        ours = {
            "decode": vae_tiles.decode(vae, inputs["z"], tile=tile), "encode_mean": mean,
            "encode_logvar": log_variance,
            "encode_sample": mean + (0.5 * log_variance).exp() * inputs["posterior_eps"],
        }  # fmt: skip
        for name in golden:
            yield f"{name}, tile {tile}", ours[name], golden[name]


# By the beginning of a case's name; the longest that fits counts.
CHECKS = {
    "transformer": transformer,
    "controlnet": controlnet,
    "key_map": key_map,
    "pos_embed_tables": pos_embed_tables,
    "timestep_size_embeddings": timestep_size_embeddings,
    "noise_schedule": noise_schedule,
    "noise_schedule_full": noise_schedule_full,
    "caption_cleaning": caption_cleaning,
    "aspect_ratios": aspect_ratios,
    "iddpm_training_loss": iddpm_training_loss,
    "lcm_scheduler": lcm_scheduler,
    "dpm_solver": dpm_solver,
    "lcm_train_pieces": lcm_train_pieces,
    "lcm_distill_loss": lcm_distill_loss,
    "autoencoder_kl": autoencoder_kl,
}


def lookup(table: dict, name: str):
    """The entry for a case's name, None if there is none."""
    fitting = [prefix for prefix in table if name == prefix or name.startswith(prefix + "_")]
    return table[max(fitting, key=len)] if fitting else None
