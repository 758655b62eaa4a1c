"""The runs of tests/training, for those who start and watch them."""

from tests.training.conftest import fresh_accelerate, make_run

__all__ = ["fresh_accelerate", "make_run"]
