"""The scripts on a vector environment that has nothing to do with envs/: one line of a copied script changes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow  # whole runs and processes

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*_mamujoco.py"))
FLAGS = [
    "--num-envs",
    "4",
    "--num-steps",
    "50",
    "--hidden-sizes",
    "16",
    "--num-threads",
    "1",
    "--eval-interval",
    "2000",
]
MADDPG = ["--learning-starts", "400", "--batch-size", "128", "--buffer-size", "4000", "--updates-per-step", "0.5"]
# Two agents push a point along an axis each, towards the origin; float32 observations, no statistics, no saved state.
TOY = """
from types import SimpleNamespace

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

Partition = SimpleNamespace


class PointEnv(VectorEnv):
    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    partition = Partition(num_agents=2, obs_ids=2 * [np.array([0, 1])], act_ids=[np.array([1]), np.array([0])])

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = Box(-9, 9, (2,), np.float32), Box(-3, 5, (2,))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        self.rng, self.t = np.random.default_rng(seed), 0
        self.x = self.rng.uniform(-1, 1, (self.num_envs, 2)).astype(np.float32)
        return self.x.copy(), {}

    def step(self, actions):
        assert (actions >= -3).all() and (actions <= 5).all()
        self.x = (self.x + 0.2 * (actions - 1) / 4).astype(np.float32)
        self.t += 1
        rewards, done, infos = -(self.x**2).sum(1), np.full(self.num_envs, self.t % 20 == 0), {}
        if done.any():
            infos = {"final_obs": np.array([*self.x, None], dtype=object)[:-1], "_final_obs": done}
            self.x = self.rng.uniform(-1, 1, (self.num_envs, 2)).astype(np.float32)
        return self.x.copy(), rewards, np.zeros(self.num_envs, dtype=bool), done, infos


def make_vec(env_id, num_envs, agent_obsk, num_threads):
    return PointEnv(num_envs)
"""


def run(folder: Path, script: Path, *flags: object, toy: str = TOY) -> subprocess.CompletedProcess:
    """Run a copy of a script with `import toy as envs` in the place of `import envs`."""
    text = script.read_text()
    assert text.count("\nimport envs\n") == 1
    (folder / script.name).write_text(text.replace("\nimport envs\n", "\nimport toy as envs\n"))
    (folder / "toy.py").write_text(toy)
    flags = [*FLAGS, *(MADDPG if "maddpg" in script.stem else []), *map(str, flags)]
    command = [sys.executable, script.name, *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_copied_script_trains_and_resumes(script: Path, tmp_path: Path):
    """It learns, and goes on in new episodes, which it says once; the log has returns and lengths of episodes."""
    done = run(tmp_path, script, "--total-timesteps", 8000, "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    evals = [event.value for event in log.Scalars("eval/episodic_return")]
    assert evals[-1] > -4  # doing nothing has 20 steps * 2 axes * E[x^2] = -13.3
    assert {event.value for event in log.Scalars("charts/episodic_length")} == {20.0}
    assert -900 < min(event.value for event in log.Scalars("charts/episodic_return")) < 0

    done = run(tmp_path, script, "--resume", "run", "--total-timesteps", 10_000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("this environment has no get_state: new episodes start here") == 1
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 10_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_next_step_autoreset_is_refused(script: Path, tmp_path: Path):
    """It would make every last step of an episode wrong: one line, and nothing on disk."""
    toy = TOY.replace("AutoresetMode.SAME_STEP", "AutoresetMode.NEXT_STEP")
    done = run(tmp_path, script, "--run-dir", "run", toy=toy)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the vector environment's autoreset_mode must be SAME_STEP")
    assert not (tmp_path / "run").exists()
