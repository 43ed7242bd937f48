"""Any Gymnasium `MujocoEnv` that has no class in `tasks.py`: Gymnasium's vectorisation, with a state to save."""

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from mujoco.batch import DATA_FIELDS


class GymnasiumVectorEnv(SyncVectorEnv):
    """`num_envs` environments of one Gymnasium id, stepped one after the other, with SAME_STEP autoreset."""

    def __init__(self, gym_id: str, num_envs: int) -> None:
        """Make the environments. Raises ValueError if the id has no time limit."""
        super().__init__(
            [lambda: gym.make(gym_id)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP
        )
        if _time_limit(self.envs[0]) is None:
            raise ValueError(f"{gym_id} has no time limit: register it with max_episode_steps")

    def get_state(self) -> list[dict[str, Any]]:
        """Return what the environments remember between two steps, as plain Python data.

        That is the simulation, the random generator and the steps of the running episode. It is all there is for a task
        that keeps nothing outside its `MjData`, as Gymnasium's (except the targets of Pusher and Reacher before v5).
        """
        state = []
        for env in self.envs:
            data = env.unwrapped.data
            saved = {
                "arrays": {name: array.tolist() for name, array in _arrays(data).items()},
                "time": data.time,
                "elapsed_steps": _time_limit(env)._elapsed_steps,
                "rng": env.unwrapped.np_random.bit_generator.state,
            }
            state.append(saved)
        return state

    def set_state(self, state: list[dict[str, Any]]) -> None:
        """Restore, after `reset`, what `get_state` returned. Raises ValueError for a state of other environments."""
        for env, saved in zip(self.envs, state, strict=True):
            for name, array in _arrays(env.unwrapped.data).items():
                array[:] = saved["arrays"][name]
            env.unwrapped.data.time = saved["time"]
            _time_limit(env)._elapsed_steps = saved["elapsed_steps"]
            env.unwrapped.np_random.bit_generator.state = saved["rng"]


def _time_limit(env: gym.Env) -> gym.wrappers.TimeLimit | None:
    """The wrapper that ends an episode after a number of steps; None if there is none."""
    while isinstance(env, gym.Wrapper) and not isinstance(env, gym.wrappers.TimeLimit):
        env = env.env
    return env if isinstance(env, gym.wrappers.TimeLimit) else None


def _arrays(data: mujoco.MjData) -> dict[str, np.ndarray]:
    """The arrays of an MjData that have a fixed size: the state, and what MuJoCo computes from it."""
    fields = {name: getattr(data, name) for name in sorted(DATA_FIELDS)}
    return {
        name: value
        for name, value in fields.items()
        if isinstance(value, np.ndarray) and value.size
    }
