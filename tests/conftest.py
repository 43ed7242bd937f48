"""Shared by the tests: the scripts as modules, and one thread, so that results do not depend on the machine."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

SCRIPTS = sorted(path.stem for path in Path(__file__).parent.parent.glob("*_mamujoco.py"))
PPO_TAGS = {"policy_loss", "entropy", "approx_kl", "clip_fraction"}
TRPO_TAGS = {"kl", "surrogate_gain", "expected_gain", "step_cosine", "backtracks", "accepted", "grad_norm", "entropy"}


class Sibling(NamedTuple):
    """What the tests must be told of a script; all else they find out."""

    lines: int  # what a reader has to read in one sitting; 5% more fail
    tags: set[str]  # what is logged of each agent, among others
    differs_from: str = ""  # the script that it is to be read beside
    changed: int = 0  # lines of that diff at most


# A new script is registered here.
SIBLINGS = {
    "mappo": Sibling(590, PPO_TAGS),
    "happo": Sibling(595, PPO_TAGS | {"M_std"}, "mappo", 58),
    "hatrpo": Sibling(680, TRPO_TAGS | {"M_std", "policy_loss"}, "happo", 220),
    "ippo": Sibling(600, PPO_TAGS, "mappo", 55),
    "maddpg": Sibling(580, {"policy_loss"}),
}
ON_POLICY = [name.removesuffix("_mamujoco") for name in SCRIPTS if name != "maddpg_mamujoco"]


@pytest.fixture(params=ON_POLICY)
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each on-policy script."""
    return importlib.import_module(f"{request.param}_mamujoco")


@pytest.fixture
def float64() -> Iterator[None]:
    """Let everything be made in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def update_of(script: ModuleType) -> Callable:
    """The function of an on-policy script that updates its actors: <algorithm>_update."""
    return getattr(script, script.__name__.replace("_mamujoco", "_update"))


def mlp(theta: Tensor, x: Tensor, fan_outs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """An MLP with ReLU from its vector theta: the outputs, and what theta has behind the layers.

    Layer by layer theta holds the weight, [fan_in, fan_out] row by row, and the bias.
    """
    for i, fan_out in enumerate(fan_outs):
        weight, bias, theta = theta.tensor_split([x.shape[-1] * fan_out, (x.shape[-1] + 1) * fan_out])
        x = (x.relu() if i else x) @ weight.reshape(-1, fan_out) + bias
    return x, theta
