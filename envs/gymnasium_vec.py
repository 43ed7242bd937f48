"""Any Gymnasium `MujocoEnv` that has no class in `tasks.py`: Gymnasium's vectorisation, with a state to save."""

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from mujoco.batch import DATA_FIELDS

from .tasks import DIVERGED, quiet_mujoco


class EndDiverged(gym.Wrapper):
    """Ends an episode, with a reward of 0, when MuJoCo declares the simulation unstable, and counts these episodes.

    It hands on no infos: Gymnasium's vectorisation cannot stack arrays whose lengths change.
    """

    num_diverged = 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        obs, _ = self.env.reset(**kwargs)
        return obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply an action. MuJoCo puts a simulation that diverged back into its default pose."""
        warnings = self.unwrapped.data.warning
        before = warnings.number[DIVERGED].copy()
        with quiet_mujoco():
            obs, reward, terminated, truncated, _ = self.env.step(action)
        if (warnings.number[DIVERGED] > before).any():
            self.num_diverged += 1
            return np.nan_to_num(obs), 0.0, True, truncated, {}
        return obs, reward, terminated, truncated, {}


class GymnasiumVectorEnv(SyncVectorEnv):
    """`num_envs` environments of one Gymnasium id, stepped one after the other, with SAME_STEP autoreset."""

    def __init__(self, gym_id: str, num_envs: int) -> None:
        """Make the environments. Raises ValueError if the id has no time limit."""
        super().__init__(
            [lambda: EndDiverged(gym.make(gym_id))] * num_envs,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        if _time_limit(self.envs[0]) is None:
            raise ValueError(f"{gym_id} has no time limit: register it with max_episode_steps")
        self._fresh_model = gym.make(gym_id).unwrapped.model

    @property
    def num_diverged(self) -> int:
        """How many simulations MuJoCo has declared unstable so far."""
        return sum(env.num_diverged for env in self.envs)

    def get_state(self) -> list[dict[str, Any]] | None:
        """Return what the environments remember between two steps, as plain Python data.

        That is the simulation, what a reset has changed in its model, the random generator and the steps of the running
        episode. It is all there is for a task that keeps nothing else in attributes of its own, as Gymnasium's (except
        the targets of Pusher and Reacher before v5). Of environments with wrappers, which may remember something too,
        it is None.
        """
        if extra_wrappers(self.envs[0]):
            return None
        state = []
        for env in self.envs:
            data = env.unwrapped.data
            saved = {
                "arrays": {name: array.tolist() for name, array in _arrays(data).items()},
                "model": _changes(env.unwrapped.model, self._fresh_model),
                "options": _options(env.unwrapped.model),
                "time": data.time,
                "elapsed_steps": _time_limit(env)._elapsed_steps,
                "rng": env.unwrapped.np_random.bit_generator.state,
                "num_diverged": env.num_diverged,
            }
            state.append(saved)
        return state

    def set_state(self, state: list[dict[str, Any]]) -> None:
        """Restore, after `reset`, what `get_state` returned. Raises ValueError for a state of other environments."""
        for env, saved in zip(self.envs, state, strict=True):
            model = env.unwrapped.model
            fresh = _arrays(self._fresh_model)
            for name, array in _arrays(model).items():
                array[:] = saved["model"].get(name, fresh[name])
            for name, value in saved["options"].items():
                setattr(model.opt, name, value)
            for name, array in _arrays(env.unwrapped.data).items():
                array[:] = saved["arrays"][name]
            env.unwrapped.data.time = saved["time"]
            _time_limit(env)._elapsed_steps = saved["elapsed_steps"]
            env.unwrapped.np_random.bit_generator.state = saved["rng"]
            env.num_diverged = saved["num_diverged"]


def extra_wrappers(env: gym.Env) -> list[str]:
    """The names of an environment's wrappers, without those that `gym.make` puts around every environment."""
    names = []
    while isinstance(env, gym.Wrapper):
        if not isinstance(env, EndDiverged | TimeLimit | OrderEnforcing | PassiveEnvChecker):
            names.append(type(env).__name__)
        env = env.env
    return names


def _time_limit(env: gym.Env) -> TimeLimit | None:
    """The wrapper that ends an episode after a number of steps; None if there is none."""
    while isinstance(env, gym.Wrapper) and not isinstance(env, TimeLimit):
        env = env.env
    return env if isinstance(env, TimeLimit) else None


def _arrays(struct: mujoco.MjData | mujoco.MjModel) -> dict[str, np.ndarray]:
    """The arrays that can change: of a model, or of an MjData those of a fixed size, its state and what follows."""
    names = DATA_FIELDS if isinstance(struct, mujoco.MjData) else dir(struct)
    arrays = {}
    for name in sorted(names):
        value = getattr(struct, name)
        if isinstance(value, np.ndarray) and value.size and value.flags.writeable:
            arrays[name] = value
    return arrays


def _changes(model: mujoco.MjModel, fresh: mujoco.MjModel) -> dict[str, list]:
    """The arrays of a model that differ from those of a fresh one, as lists."""
    before = _arrays(fresh)
    changes = {}
    for name, array in _arrays(model).items():
        if not np.array_equal(array, before[name]):
            changes[name] = array.tolist()
    return changes


def _options(model: mujoco.MjModel) -> dict[str, Any]:
    """The options of a model, such as gravity and time step, as numbers and lists."""
    options = {}
    for name in dir(model.opt):
        value = getattr(model.opt, name)
        if not name.startswith("_"):
            options[name] = value.tolist() if isinstance(value, np.ndarray) else value
    return options
