"""The scripts learn, from the factor M, or the advantage in MAPPO and IPPO, and at the rates that they are given."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import SCRIPTS, update_of
from test_runs import newest
from test_scripts import ROOT, SMALL, command_line
from torch.optim import Adam
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

pytestmark = pytest.mark.slow  # whole runs and processes


def final_return(
    script: ModuleType, steps: int, run_dir: Path, capsys: pytest.CaptureFixture
) -> float:
    """Mean return of the training episodes that end in the last of the iterations of 1,000 steps on Hopper-3x1."""
    args = {"total_timesteps": steps, "num_steps": 50, "num_threads": 1, "eval_episodes": 0}
    script.main(script.Args(env_id="Hopper-3x1", run_dir=str(run_dir), **args))
    return float(re.findall(r"charts/episodic_return (\S+)", capsys.readouterr().out)[-1])


def test_learns_what_a_policy_without_m_does_not(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """20,000 steps of Hopper-3x1 pass a return of 120; with M = 0 the policy is still random at 6,000, below 50."""
    learned = final_return(script, 20_000, tmp_path / "learned", capsys)
    update = update_of(script)

    def with_zero_m(*args: object):
        *batch, advantages, hyperparameters = args
        return update(*batch, torch.zeros_like(advantages), hyperparameters)

    monkeypatch.setattr(script, update.__name__, with_zero_m)
    random = final_return(script, 6_000, tmp_path / "random", capsys)
    assert learned > 120
    assert random < 50


class Steps:
    """While it is open: the first step of each Adam, as its parameters, gradients and new parameters."""

    def __enter__(self) -> "Steps":
        self.first: dict[int, list[tuple]] = {}
        self.before: list[tuple] = []
        pre = register_optimizer_step_pre_hook(self.begin)
        self.handles = pre, register_optimizer_step_post_hook(self.end)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def begin(self, optimizer: Adam, *_: object) -> None:
        self.before = []
        for parameter in optimizer.param_groups[0]["params"]:
            gradient = None if parameter.grad is None else parameter.grad.clone()
            self.before.append((parameter.detach().clone(), gradient))

    def end(self, optimizer: Adam, *_: object) -> None:
        parameters = optimizer.param_groups[0]["params"]
        after = [parameter.detach().clone() for parameter in parameters]
        step = [(*before, new) for before, new in zip(self.before, after)]
        self.first.setdefault(id(optimizer), step)


def adam_step(
    parameter: torch.Tensor, gradient: torch.Tensor, state: dict, rate: float, eps: float
) -> torch.Tensor:
    """The new parameter: Kingma and Ba 2015, algorithm 1, in float64."""
    gradient = gradient.double()
    t = state["step"].item() + 1
    m = 0.9 * state["exp_avg"].double() + 0.1 * gradient
    v = 0.999 * state["exp_avg_sq"].double() + 0.001 * gradient**2
    return parameter.double() - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps)


@pytest.mark.parametrize(
    ("name", "rates", "scale"),
    [(name, rates, 1.0) for name in SCRIPTS for rates in ((), (3e-3, 7e-4))]
    + [(name, (3e-3, 7e-4), 0.5) for name in SCRIPTS if name != "maddpg_mamujoco"],
)
def test_a_resumed_run_steps_at_its_rates(
    name: str, rates: tuple[float, ...], scale: float, tmp_path: Path
):
    """Those of the flags, or those of before: not what Adam's state remembers. Annealed, half of them at half time."""
    off_policy = name == "maddpg_mamujoco"
    has_rate = name != "hatrpo_mamujoco"  # of the actors
    flags = [*SMALL, "--eval-episodes", 0, "--total-timesteps", 128, "--critic-learning-rate", 2e-3]
    if has_rate:
        flags += ["--learning-rate", 1e-3]
    if off_policy:
        flags += ["--learning-starts", 64, "--batch-size", 16, "--buffer-size", 400]
    if scale < 1:
        flags += ["--anneal-lr"]
    script = ROOT / f"{name}.py"
    command_line(script, "--env-id", "Reacher-2x1", *flags, "--run-dir", tmp_path / "run")
    checkpoint = newest(tmp_path / "run")

    flags = ["--resume", tmp_path / "run", "--total-timesteps", 256]
    actor_rate, critic_rate = rates or (1e-3, 2e-3)
    if rates:
        flags += ["--critic-learning-rate", critic_rate]
    if rates and has_rate:
        flags += ["--learning-rate", actor_rate]
    with Steps() as steps:
        command_line(script, *flags)

    expected = {"critic_optimizer": scale * critic_rate}
    if has_rate:
        expected["actor_optimizer"] = scale * actor_rate
    assert len(steps.first) == len(expected)
    checked = set()
    for step in steps.first.values():
        # It is the optimiser of the critic, or of the actors, that has seen these parameters.
        networks = {"critic_optimizer": "critic", "actor_optimizer": "policy"}
        saved = {key: list(checkpoint[networks[key]].values()) for key in expected}
        [key] = [
            key
            for key, tensors in saved.items()
            if len(tensors) == len(step)
            and all(map(torch.equal, tensors, [old for old, *_ in step]))
        ]
        checked.add(key)
        state = checkpoint[key]["state"]
        eps = 1e-8 if off_policy else 1e-5
        with_gradient = 0
        for i, (old, gradient, new) in enumerate(step):
            if gradient is None:
                assert torch.equal(new, old)
                continue
            with_gradient += 1
            oracle = adam_step(old, gradient, state[i], expected[key], eps)
            # The step itself is compared: it is small beside the parameter.
            change = oracle - old.double()
            torch.testing.assert_close(new.double() - old.double(), change, rtol=1e-3, atol=3e-7)
            assert change.abs().max() > 1e-5
        assert with_gradient >= 6
    assert checked == expected.keys()
