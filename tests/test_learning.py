"""The scripts learn, and it is the factor M, or the advantage in MAPPO, that they learn from."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import update_of

pytestmark = pytest.mark.slow  # whole runs and processes


def final_return(script: ModuleType, steps: int, run_dir: Path, capsys: pytest.CaptureFixture) -> float:
    """Mean return of the training episodes that end in the last of the iterations of 1,000 steps on Hopper-3x1."""
    args = {"total_timesteps": steps, "num_steps": 50, "num_threads": 1, "eval_episodes": 0}
    script.main(script.Args(env_id="Hopper-3x1", run_dir=str(run_dir), **args))
    return float(re.findall(r"charts/episodic_return (\S+)", capsys.readouterr().out)[-1])


def test_learns_what_a_policy_without_m_does_not(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """20,000 steps of Hopper-3x1 pass a return of 120; with M = 0 the policy is still random at 6,000, below 50."""
    learned = final_return(script, 20_000, tmp_path / "learned", capsys)
    update = update_of(script)

    def with_zero_m(*args: object):
        *batch, advantages, hyperparameters, generator = args
        zeros = [torch.zeros_like(a) for a in advantages] if script.__name__.startswith("ippo") else 0 * advantages
        return update(*batch, zeros, hyperparameters, generator)

    monkeypatch.setattr(script, update.__name__, with_zero_m)
    random = final_return(script, 6_000, tmp_path / "random", capsys)
    assert learned > 120
    assert random < 50
