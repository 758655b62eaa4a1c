"""Parity with the original PixArt code and diffusers, on stored inputs and outputs.

PIXART_GOLDEN_DIR names another set of fixtures with the same layout (default: tests/goldens).
"""

import math
import os
from pathlib import Path

import pytest
import torch
from goldens_cases import CHECKS, compare, lookup, read_cases

FOLDER = Path(os.environ.get("PIXART_GOLDEN_DIR") or Path(__file__).with_name("goldens"))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in read_cases(FOLDER)])
def test_golden_case_is_reproduced(case):
    check = lookup(CHECKS, case.name)
    assert check is not None, f"no check for the golden case {case.name}: add one to goldens_cases"
    failures, count = [], 0
    for name, ours, golden, *gain in check(case):
        error, allowed = compare(case.entry.get("tolerance"), name, ours, golden, *gain)
        count += 1
        if not error <= allowed:
            failures.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
    assert count, f"{case.name} was read but nothing was compared"
    assert not failures, "\n".join(failures)


def test_every_case_of_the_shipped_fixtures_has_an_owner():
    for case in read_cases(Path(__file__).with_name("goldens")):
        assert lookup(CHECKS, case.name) is not None, case.name


@pytest.mark.parametrize("name", ["transformer_alpha", "iddpm_training_loss", "noise_schedule"])
def test_a_wrong_number_would_be_noticed(name):
    """The comparison itself: a deviation above the tolerance fails in every kind of case."""
    case = next(case for case in read_cases(Path(__file__).with_name("goldens")) if case.name == name)
    for result, _, golden, *gain in lookup(CHECKS, name)(case):
        changed = golden.double() * (1 + 1e-2) + 1e-2
        error, allowed = compare(case.entry["tolerance"], result, changed, golden, *gain)
        assert error > allowed, result
    nothing = torch.full((2,), torch.nan)
    assert compare(1e-5, "x", nothing, torch.zeros(2))[0] == math.inf
    assert compare(1e-5, "x", torch.zeros(3), torch.zeros(2))[0] == math.inf
