"""The golden cases, recomputed with this pack: every case yields (name, ours, golden[, gain]) for each stored result.

Configurations, inputs, scales and tolerances come from the fixtures' index, so that another set of fixtures runs
unchanged. Used by test_goldens.py and by tools/parity_table.py.
"""

from .case import Case, compare, read_cases
from .data import aspect_ratios, caption_cleaning
from .diffusion import iddpm_training_loss, lcm_distill_loss, lcm_train_pieces, noise_schedule, noise_schedule_full
from .network import autoencoder_kl, controlnet, key_map, pos_embed_tables, timestep_size_embeddings, transformer
from .sampling import dpm_solver, fake_eps, lcm_scheduler

__all__ = ["CHECKS", "Case", "compare", "fake_eps", "lookup", "read_cases"]

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
