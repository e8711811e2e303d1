"""Fixtures for every test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests run in two processes on two cores


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights beside the checkout; the test is skipped where it is absent."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no shared/data beside the checkout")
    return path
