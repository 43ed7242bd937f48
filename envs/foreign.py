"""Any other Gymnasium `MujocoEnv`, on Gymnasium's own vectorisation, with a state that can be saved."""

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from mujoco.batch import DATA_FIELDS


class ForeignVectorEnv(SyncVectorEnv):
    """`num_envs` environments of one Gymnasium id, stepped one after the other, with SAME_STEP autoreset."""

    def __init__(self, gym_id: str, num_envs: int) -> None:
        """Make the environments. Raises ValueError if the id has no time limit."""
        super().__init__([lambda: gym.make(gym_id)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
        if _time_limit(self.envs[0]) is None:
            raise ValueError(f"{gym_id} has no time limit: register it with max_episode_steps")

    def get_state(self) -> list[dict[str, Any]]:
        """Return what the environments remember between two steps, as plain Python data.

        That is the simulation, the generator and the time limit: exact for a task that keeps all it knows in its
        `MjData`, as Gymnasium's do (but Pusher's and Reacher's targets before v5).
        """
        return [
            {
                "arrays": {name: array.tolist() for name, array in _arrays(env.unwrapped.data).items()},
                "time": env.unwrapped.data.time,
                "elapsed_steps": _time_limit(env)._elapsed_steps,
                "rng": env.unwrapped.np_random.bit_generator.state,
            }
            for env in self.envs
        ]

    def set_state(self, state: list[dict[str, Any]]) -> None:
        """Go on from what `get_state` returned, after a reset. Raises ValueError for a state of other environments."""
        for env, saved in zip(self.envs, state, strict=True):
            for name, array in _arrays(env.unwrapped.data).items():
                array[:] = saved["arrays"][name]
            env.unwrapped.data.time = saved["time"]
            _time_limit(env)._elapsed_steps = saved["elapsed_steps"]
            env.unwrapped.np_random.bit_generator.state = saved["rng"]


def _time_limit(env: gym.Env) -> gym.wrappers.TimeLimit | None:
    """The wrapper that counts the steps of an episode, if there is one."""
    while isinstance(env, gym.Wrapper) and not isinstance(env, gym.wrappers.TimeLimit):
        env = env.env
    return env if isinstance(env, gym.wrappers.TimeLimit) else None


def _arrays(data: mujoco.MjData) -> dict[str, np.ndarray]:
    """The arrays of an MjData whose size does not change: the state, and what is derived from it."""
    fields = {name: getattr(data, name) for name in sorted(DATA_FIELDS)}
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray) and value.size}
