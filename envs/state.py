"""What a vector environment remembers between two steps, as plain data: save it and go on from there, bit for bit."""

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import VectorEnv
from mujoco.batch import DATA_FIELDS

from envs.tasks import MujocoVectorEnv

STATISTICS = "episode_returns", "episode_lengths"  # of Gymnasium's RecordEpisodeStatistics


def get_state(vec: VectorEnv) -> dict[str, Any]:
    """Return the state of what `make_vec` made: simulations, random generators, episode statistics.

    It is plain Python data (lists, numbers, strings), which `torch.load(weights_only=True)` reads. Of an environment
    on Gymnasium's own vectorisation it has the simulation, the generator and the time limit: exact for a task that
    keeps all it knows in its `MjData`, as Gymnasium's do (but Pusher's and Reacher's targets before v5).
    """
    state = {name: getattr(vec, name).tolist() for name in STATISTICS}
    base = vec.unwrapped
    if isinstance(base, MujocoVectorEnv):
        return state | base.get_state()
    return state | {"envs": [_get_env_state(env) for env in base.envs]}


def set_state(vec: VectorEnv, state: dict[str, Any]) -> None:
    """Put `vec`, made with the same arguments, into a state that `get_state` returned. It must have been reset once.

    Raises:
        ValueError: when the state is of other environments.
    """
    for name in STATISTICS:
        getattr(vec, name)[:] = state[name]
    base = vec.unwrapped
    if isinstance(base, MujocoVectorEnv):
        base.set_state(state)
    else:
        for env, env_state in zip(base.envs, state["envs"], strict=True):
            _set_env_state(env, env_state)


def _time_limit(env: gym.Env) -> gym.wrappers.TimeLimit | None:
    """The wrapper that counts the steps of an episode, if there is one."""
    while isinstance(env, gym.Wrapper):
        if isinstance(env, gym.wrappers.TimeLimit):
            return env
        env = env.env
    return None


def _arrays(data: mujoco.MjData) -> dict[str, np.ndarray]:
    """The arrays of an MjData whose size does not change: the state, and what is derived from it."""
    fields = {name: getattr(data, name) for name in sorted(DATA_FIELDS)}
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray) and value.size}


def _get_env_state(env: gym.Env) -> dict[str, Any]:
    """The state of one Gymnasium `MujocoEnv`."""
    limit = _time_limit(env)
    return {
        "arrays": {name: array.tolist() for name, array in _arrays(env.unwrapped.data).items()},
        "time": env.unwrapped.data.time,
        "elapsed_steps": None if limit is None else limit._elapsed_steps,
        "rng": env.unwrapped.np_random.bit_generator.state,
    }


def _set_env_state(env: gym.Env, state: dict[str, Any]) -> None:
    """Put one Gymnasium `MujocoEnv` into a state."""
    arrays = _arrays(env.unwrapped.data)
    for name, array in state["arrays"].items():
        arrays[name][:] = array
    env.unwrapped.data.time = state["time"]
    if (limit := _time_limit(env)) is not None:
        limit._elapsed_steps = state["elapsed_steps"]
    env.unwrapped.np_random.bit_generator.state = state["rng"]
