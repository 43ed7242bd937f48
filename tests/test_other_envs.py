"""The scripts on a vector environment that has nothing to do with envs/: one line of a copied script changes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import ROOT, command_line, error_of

pytestmark = pytest.mark.slow  # whole runs and processes

FLAGS = "--num-envs 4 --num-steps 50 --hidden-sizes 16 --num-threads 1 --eval-interval 2500"
MADDPG = "--learning-starts 400 --batch-size 128 --buffer-size 4000 --updates-per-step 0.25 --tau 0.02"
MADDPG += " --learning-rate 2e-3 --critic-learning-rate 4e-3"


class PointEnv(VectorEnv):
    """Two agents push a point along an axis each, to the origin; float32, no episode statistics, no saved state."""

    partition = SimpleNamespace(num_agents=2, obs_ids=2 * [np.array([0, 1])], act_ids=[np.array([1]), np.array([0])])

    def __init__(self, num_envs: int, autoreset_mode: AutoresetMode) -> None:
        self.num_envs, self.metadata = num_envs, {"autoreset_mode": autoreset_mode}
        self.single_observation_space, self.single_action_space = Box(-9, 9, (2,), np.float32), Box(-3, 5, (2,))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.rng, self.t = np.random.default_rng(seed), 0
        self.x = self.rng.uniform(-1, 1, (self.num_envs, 2)).astype(np.float32)
        return self.x.copy(), {}

    def step(self, actions: np.ndarray) -> tuple:
        assert (actions >= -3).all() and (actions <= 5).all()
        self.x = (self.x + 0.2 * (actions - 1) / 4).astype(np.float32)
        self.t += 1
        rewards, done, infos = -(self.x**2).sum(1), np.full(self.num_envs, self.t % 20 == 0), {}
        if done.any():
            infos = {"final_obs": np.array([*self.x, None], dtype=object)[:-1], "_final_obs": done}
            self.x = self.rng.uniform(-1, 1, (self.num_envs, 2)).astype(np.float32)
        return self.x.copy(), rewards, np.zeros(self.num_envs, dtype=bool), done, infos


def use(monkeypatch: pytest.MonkeyPatch, mode: AutoresetMode = AutoresetMode.SAME_STEP) -> None:
    """Make `import toy` find it."""
    toy = SimpleNamespace(Partition=SimpleNamespace, make_vec=lambda env_id, num_envs, *_: PointEnv(num_envs, mode))
    monkeypatch.setitem(sys.modules, "toy", toy)


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a script with `import toy as envs` in the place of `import envs`, in the working directory."""
    use(monkeypatch)
    script = ROOT / f"{request.param}.py"
    text = script.read_text()
    assert text.count("\nimport envs\n") == 1
    (tmp_path / script.name).write_text(text.replace("\nimport envs\n", "\nimport toy as envs\n"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / script.name


@pytest.mark.parametrize("copy", SCRIPTS, indirect=True)
def test_a_copied_script_trains_and_resumes(copy: Path, capsys: pytest.CaptureFixture):
    """It learns, and goes on in new episodes, which it says once; the log has returns and lengths of episodes."""
    flags = f"{FLAGS} {MADDPG if 'maddpg' in copy.stem else ''}".split()
    command_line(copy, *flags, "--total-timesteps", 5000, "--run-dir", "run")
    log = EventAccumulator("run").Reload()
    evals = [event.value for event in log.Scalars("eval/episodic_return")]
    assert evals[-1] > -6  # doing nothing has 20 steps * 2 axes * E[x^2] = -13.3
    assert {event.value for event in log.Scalars("charts/episodic_length")} == {20.0}
    assert -900 < min(event.value for event in log.Scalars("charts/episodic_return")) < 0

    capsys.readouterr()
    command_line(copy, "--resume", "run", "--total-timesteps", 5400)
    assert capsys.readouterr().out.count("this environment has no get_state: new episodes start here") == 1
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 5400


@pytest.mark.parametrize("copy", SCRIPTS, indirect=True)
def test_next_step_autoreset_is_refused(copy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """It would make every last step of an episode wrong: one line, and nothing on disk."""
    use(monkeypatch, AutoresetMode.NEXT_STEP)
    error = error_of(capsys, 2, copy, *FLAGS.split(), "--run-dir", "run")
    assert error.startswith("error: the vector environment's autoreset_mode must be SAME_STEP")
    assert not Path("run").exists()
