"""The scripts on vector environments that have nothing to do with envs/: one line of a copied script changes."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import newest, resume
from test_scripts import ROOT, command_line, error_of, train
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import envs
import evaluate

pytestmark = pytest.mark.slow  # whole runs and processes

FLAGS = "--num-envs 4 --num-steps 50 --hidden-sizes 16 --num-threads 1 --eval-interval 2500"
MADDPG = (
    "--learning-starts 400 --batch-size 128 --buffer-size 4000 --updates-per-step 0.25 --tau 0.02"
)
MADDPG += " --learning-rate 2e-3 --critic-learning-rate 4e-3"


class PointEnv(VectorEnv):
    """Two agents push a point along an axis each, to the origin; float32, no episode statistics, no saved state."""

    partition = SimpleNamespace(
        num_agents=2, obs_ids=2 * [np.array([0, 1])], act_ids=[np.array([1]), np.array([0])]
    )

    def __init__(self, num_envs: int, autoreset_mode: AutoresetMode) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": autoreset_mode}
        self.single_observation_space = Box(-9, 9, (2,), np.float32)
        self.single_action_space = Box(-3, 5, (2,))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        self.rng = np.random.default_rng(seed)
        self.t = 0
        self.x = self.rng.uniform(-1, 1, (self.num_envs, 2)).astype(np.float32)
        return self.x.copy(), {}

    def step(self, actions: np.ndarray) -> tuple:
        assert (actions >= -3).all() and (actions <= 5).all()
        self.x = (self.x + 0.2 * (actions - 1) / 4).astype(np.float32)
        self.t += 1
        rewards = -(self.x**2).sum(1)
        done = np.full(self.num_envs, self.t % 20 == 0)
        infos = {}
        if done.any():
            infos = {"final_obs": np.array([*self.x, None], dtype=object)[:-1], "_final_obs": done}
            self.x = self.rng.uniform(-1, 1, (self.num_envs, 2)).astype(np.float32)
        return self.x.copy(), rewards, np.zeros(self.num_envs, dtype=bool), done, infos


def use(monkeypatch: pytest.MonkeyPatch, mode: AutoresetMode = AutoresetMode.SAME_STEP) -> None:
    """Make `import toy` find it."""
    toy = SimpleNamespace(
        Partition=SimpleNamespace, make_vec=lambda env_id, num_envs, *_: PointEnv(num_envs, mode)
    )
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
    notice = "this environment's state cannot be saved: new episodes start here"
    assert capsys.readouterr().out.count(notice) == 1
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 5400


@pytest.mark.parametrize("copy", SCRIPTS, indirect=True)
def test_next_step_autoreset_is_refused(
    copy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """It would make every last step of an episode wrong: one line, and nothing on disk."""
    use(monkeypatch, AutoresetMode.NEXT_STEP)
    error = error_of(capsys, 2, copy, *FLAGS.split(), "--run-dir", "run")
    assert error.startswith("error: the vector environment's autoreset_mode must be SAME_STEP")
    assert not Path("run").exists()


class EndlessEnv(PointEnv):
    """Step t gives environment i a reward of (i + 1) t; the first one's episodes have 3 steps, the others never end."""

    def step(self, actions: np.ndarray) -> tuple:
        obs, *_ = super().step(actions)
        assert self.t < 1000, "nothing ends the evaluation"
        rewards = self.t * np.arange(1.0, self.num_envs + 1)
        ended = np.arange(self.num_envs) == 0
        ended &= self.t % 3 == 0
        infos = {"final_obs": np.array([*obs, None], dtype=object)[:-1], "_final_obs": ended}
        never = np.zeros(self.num_envs, dtype=bool)
        return obs, rewards, ended, never, infos if ended.any() else {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_evaluation_ends_where_episodes_do_not(
    name: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """After MAX_EPISODE_STEPS: the terminal says how many were cut, the returns are those of the steps until then."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 7)
    monkeypatch.setattr(
        envs, "make_vec", lambda env_id, num_envs, *_: EndlessEnv(num_envs, AutoresetMode.SAME_STEP)
    )
    train(script, tmp_path / "run", total_timesteps=128, eval_episodes=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("evaluation: 3 episodes were cut after 7 steps") == 1
    returns = [1 + 2 + 3, 2 * 28, 3 * 28, 4 * 28]  # 1 + 2 + ... + 7 = 28
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    logged = {tag: log.Scalars(f"eval/episodic_{tag}")[-1].value for tag in ("return", "length")}
    assert logged == {"return": sum(returns) / 4, "length": (3 + 7 + 7 + 7) / 4}
    (std,) = log.Scalars("eval/episodic_return_std")
    assert std.value == np.float32(np.std(returns))


def test_evaluate_ends_where_episodes_do_not(capsys, monkeypatch: pytest.MonkeyPatch):
    """evaluate.py likewise: three of four episodes are cut after 7 steps, and count until then."""
    monkeypatch.setattr(evaluate, "MAX_EPISODE_STEPS", 7)
    vec = EndlessEnv(4, AutoresetMode.SAME_STEP)
    still = np.zeros((4, *vec.single_action_space.shape), dtype=np.float32)
    returns, lengths = evaluate.evaluate(vec, lambda obs: still, seed=0)
    assert capsys.readouterr().out == "3 episodes were cut after 7 steps\n"
    assert returns.tolist() == [1 + 2 + 3, 2 * 28, 3 * 28, 4 * 28]
    assert lengths.tolist() == [3, 7, 7, 7]


def test_envs_can_be_a_package_inside_another(tmp_path: Path):
    """A copy of envs/ as rl/envs/ makes environments, without a module `envs`."""
    shutil.copytree(ROOT / "envs", tmp_path / "rl" / "envs")
    (tmp_path / "rl" / "__init__.py").touch()
    program = [
        "import sys",
        "import rl.envs",
        "vec = rl.envs.make_vec('Hopper-3x1', 2, num_threads=1)",
        "obs, _ = vec.reset(seed=0)",
        "obs, *_ = vec.step(vec.action_space.sample())",
        "print(obs.shape, vec.partition.num_agents, 'envs' in sys.modules)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "; ".join(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == "(2, 11) 3 False\n"


# An environment that hands out the same array every step


class Pendulums(SyncVectorEnv):
    """Pendulum-v1 of one agent, whose observations are always in the same float32 array; remembers what they were."""

    partition = SimpleNamespace(num_agents=1, obs_ids=[np.arange(3)], act_ids=[np.arange(1)])

    def __init__(self, num_envs: int) -> None:
        pendulums = num_envs * [lambda: gymnasium.make("Pendulum-v1", max_episode_steps=7)]
        super().__init__(pendulums, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        self.seen: list[np.ndarray] = []  # where the agents act
        self.led_to: list[np.ndarray] = []  # what their actions lead to

    def reset(self, **kwargs: object) -> tuple[np.ndarray, dict]:
        obs, infos = super().reset(**kwargs)
        self.array = obs
        self.seen.append(obs.copy())
        return obs, infos

    def step(self, actions: np.ndarray) -> tuple:
        obs, rewards, terminations, truncations, infos = super().step(actions)
        assert obs is self.array and obs.dtype == np.float32
        self.seen.append(obs.copy())
        final = np.stack(infos["final_obs"]) if truncations.all() else obs
        assert truncations.all() == truncations.any()  # the time limit ends all at once
        self.led_to.append(final.copy())
        return obs, rewards, terminations, truncations, infos


@pytest.fixture
def pendulums(monkeypatch: pytest.MonkeyPatch) -> list[Pendulums]:
    """What the scripts make: the environments of the training, those of the evaluation, and after a resume again."""
    made: list[Pendulums] = []

    def make_vec(env_id: str, num_envs: int, *_: object) -> Pendulums:
        made.append(Pendulums(num_envs))
        return made[-1]

    monkeypatch.setattr(envs, "make_vec", make_vec)
    return made


def assert_told_apart(obs: np.ndarray, next_obs: np.ndarray) -> None:
    """No observation is the one that followed it: a pendulum never rests."""
    assert not (obs == next_obs).all(-1).any()


def test_the_buffer_has_what_was_seen(pendulums: list[Pendulums], tmp_path: Path):
    """MADDPG, also in the first step, at the ends of episodes and after a resume."""
    maddpg = importlib.import_module("maddpg_mamujoco")
    sizes = {"num_envs": 4, "num_steps": 10, "hidden_sizes": (16,), "buffer_size": 1000}
    sizes |= {"learning_starts": 40, "batch_size": 8, "eval_episodes": 1, "eval_interval": 1}
    maddpg.main(maddpg.Args(total_timesteps=120, run_dir=str(tmp_path / "run"), **sizes))
    resume(maddpg, tmp_path / "run", total_timesteps=200)

    buffer = newest(tmp_path / "run")["buffer"]
    first, _, second, _ = pendulums
    assert len(first.led_to) == 30 and len(second.led_to) == 20
    # Without saved simulations the resumed run resets twice: to make them, and to start.
    seen = np.stack(first.seen[:-1] + second.seen[1:-1])
    led_to = np.stack(first.led_to + second.led_to)
    obs = buffer["obs"][: buffer["size"]].numpy()
    next_obs = buffer["next_obs"][: buffer["size"]].numpy()
    np.testing.assert_array_equal(obs, seen)
    np.testing.assert_array_equal(next_obs, led_to)
    assert_told_apart(obs, next_obs)


def normalised(vec: Pendulums) -> tuple[np.ndarray, np.ndarray]:
    """What was seen and what followed, by the statistics of all that was seen until then (Gymnasium: and 1e-4 rows)."""
    obs, next_obs = [], []
    for t, seen in enumerate(vec.seen):
        rows = np.concatenate(vec.seen[: t + 1]).astype(np.float64)
        count = len(rows) + 1e-4
        mean = rows.sum(0) / count
        std = np.sqrt(((rows**2).sum(0) + 1e-4) / count - mean**2 + 1e-8)
        obs.append(((seen - mean) / std).clip(-10, 10))
        if t > 0:
            next_obs.append(((vec.led_to[t - 1] - mean) / std).clip(-10, 10))
    return np.stack(obs[:-1]), np.stack(next_obs)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "maddpg_mamujoco"])
def test_the_storage_has_what_was_seen(
    name: str, pendulums: list[Pendulums], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The on-policy scripts: what the critic values, in both iterations."""
    script = importlib.import_module(name)
    inputs, stored = [], []
    compute_gae = script.compute_gae

    def keep_input(module: nn.Module, args: tuple) -> None:
        if isinstance(module, nn.Sequential):  # a network, not one of its layers
            inputs.append(args[0])

    def recorded_gae(*args: object) -> tuple:
        # The critic has just valued what is stored: obs, then next_obs.
        stored.append([x.reshape(10, 4, 3).numpy().copy() for x in inputs[-2:]])
        return compute_gae(*args)

    monkeypatch.setattr(script, "compute_gae", recorded_gae)
    sizes = {"num_envs": 4, "num_steps": 10, "hidden_sizes": (16,)}
    sizes |= {"eval_episodes": 1, "eval_interval": 1}
    handle = register_module_forward_pre_hook(keep_input)
    script.main(script.Args(total_timesteps=80, run_dir=str(tmp_path / "run"), **sizes))
    handle.remove()

    assert len(stored) == 2
    obs, next_obs = (np.concatenate(parts) for parts in zip(*stored))
    expected_obs, expected_next_obs = normalised(pendulums[0])
    np.testing.assert_allclose(obs, expected_obs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(next_obs, expected_next_obs, rtol=1e-4, atol=1e-4)
    assert_told_apart(obs, next_obs)
