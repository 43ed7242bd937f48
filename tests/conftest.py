"""Shared by the tests: the scripts as modules, and networks from vectors of parameters."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)  # also for fixtures that are made before `settings_of_pytorch`

SCRIPTS = sorted(path.stem for path in Path(__file__).parent.parent.glob("*_mamujoco.py"))
PPO_TAGS = {"policy_loss", "entropy", "approx_kl", "clip_fraction"}
TRPO_TAGS = {"policy_loss", "entropy", "kl", "surrogate_gain", "expected_gain", "slope"}
TRPO_TAGS |= {"backtracks", "accepted", "grad_norm"}


class Sibling(NamedTuple):
    """What the tests must be told of a script; all else they find out."""

    tokens: int  # at most so many tokens, comments and docstrings not counted
    tags: set[str]  # what is logged of each agent, among others
    differs_from: str = ""  # the script that it is to be read beside
    changed: int = 0  # lines of that diff at most


# A new script is registered here.
SIBLINGS = {
    "mappo": Sibling(4400, PPO_TAGS),
    "happo": Sibling(4400, PPO_TAGS, "mappo", 47),
    "hatrpo": Sibling(5000, TRPO_TAGS, "happo", 233),
    "ippo": Sibling(4400, PPO_TAGS, "mappo", 55),
    "maddpg": Sibling(4400, {"policy_loss"}),
}
ON_POLICY = [name.removesuffix("_mamujoco") for name in SCRIPTS if name != "maddpg_mamujoco"]


@pytest.fixture(params=ON_POLICY)
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each on-policy script."""
    return importlib.import_module(f"{request.param}_mamujoco")


@pytest.fixture(autouse=True)
def settings_of_pytorch() -> None:
    """Start every test with one thread, and not deterministic: a script's `main` changes both."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def float64() -> Iterator[None]:
    """Let everything be made in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def update_of(script: ModuleType) -> Callable:
    """The function of an on-policy script that updates its actors: <algorithm>_update."""
    return getattr(script, script.__name__.replace("_mamujoco", "_update"))


def theta_of(module: nn.Module) -> Tensor:
    """A copy of all the parameters of a module as one vector; of an Actor `log_std` comes first."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def set_theta(module: nn.Module, theta: Tensor) -> None:
    """Copy a vector as `theta_of` returns it into the parameters of a module."""
    with torch.no_grad():
        for parameter in module.parameters():
            values, theta = theta.tensor_split([parameter.numel()])
            parameter.copy_(values.view_as(parameter))
    assert len(theta) == 0


def mlp(theta: Tensor, x: Tensor, fan_outs: Sequence[int]) -> Tensor:
    """The outputs of an MLP with ReLU from its vector of parameters.

    Layer by layer theta holds the weight, [fan_out, fan_in] row by row, and the bias.
    """
    for i, fan_out in enumerate(fan_outs):
        sizes = [x.shape[-1] * fan_out, (x.shape[-1] + 1) * fan_out]
        weight, bias, theta = theta.tensor_split(sizes)
        x = (x.relu() if i else x) @ weight.reshape(fan_out, -1).T + bias
    assert len(theta) == 0
    return x


def gaussian(
    theta: Tensor, obs: Tensor, hidden: Sequence[int], act_dim: int
) -> tuple[Tensor, Tensor]:
    """The means [B, act_dim] and log standard deviations [act_dim] of an Actor, from its vector."""
    return mlp(theta[act_dim:], obs, (*hidden, act_dim)), theta[:act_dim]
