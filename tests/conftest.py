"""Shared by the tests: the scripts as modules, and one thread, so that results do not depend on the machine."""

import importlib
from types import ModuleType

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(params=["mappo", "happo", "hatrpo", "ippo"])
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each on-policy script."""
    return importlib.import_module(f"{request.param}_mamujoco")
