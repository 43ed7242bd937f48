"""Multi-Agent MuJoCo: a robot with a flat observation and action, which a partition splits among agents.

`make_vec("HalfCheetah-6x1", num_envs=16)` returns a `gymnasium.vector.VectorEnv` with a `.partition`.
"""

import difflib
import re
import warnings
from collections.abc import Callable, Sequence

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.vector import VectorEnv

from . import models, tasks
from .gymnasium_vec import GymnasiumVectorEnv, extra_wrappers
from .partition import (
    ACTUATORS_PER_SEGMENT,
    NAMED_PARTITIONS,
    Partition,
    make_partition,
    parse_actuator_lists,
    parse_partition,
)

__all__ = [
    "ENV_IDS",
    "NAMED_PARTITIONS",
    "ROBOTS",
    "Partition",
    "make_partition",
    "make_vec",
    "parse_partition",
]

# Robot: the id of Gymnasium's environment, which gives weights, ranges, reset and time limit, and the class that
# computes the same task on mujoco.batch.
ROBOTS: dict[str, tuple[str, type[tasks.MujocoVectorEnv]]] = {
    "HalfCheetah": ("HalfCheetah-v5", tasks.HalfCheetah),
    "Ant": ("Ant-v5", tasks.Ant),
    "Hopper": ("Hopper-v5", tasks.Hopper),
    "Walker2d": ("Walker2d-v5", tasks.Walker2d),
    "Humanoid": ("Humanoid-v5", tasks.Humanoid),
    "HumanoidStandup": ("HumanoidStandup-v5", tasks.HumanoidStandup),
    "Swimmer": ("Swimmer-v5", tasks.HalfCheetah),
    "Reacher": ("Reacher-v5", tasks.Reacher),
    "Pusher": ("Pusher-v5", tasks.Pusher),
    "ManySegmentSwimmer": ("Swimmer-v5", tasks.HalfCheetah),
    "ManySegmentAnt": ("Ant-v5", tasks.Ant),
    "CoupledHalfCheetah": ("HalfCheetah-v5", tasks.CoupledHalfCheetah),
}
# Robots with as many segments as the partition asks for: their environment, and what compiles its model.
SEGMENTED: dict[str, tuple[type[MujocoEnv], Callable[[int], mujoco.MjModel]]] = {
    "ManySegmentSwimmer": (models.ManySegmentSwimmerEnv, models.many_segment_swimmer),
    "ManySegmentAnt": (models.ManySegmentAntEnv, models.many_segment_ant),
}

# MuJoCo cannot compile 2,000. From 60 on, random actions make the swimmer's simulation diverge now and then.
MAX_SEGMENTS = 1000
# More would only exhaust the memory.
MAX_ENVS = 100_000
MAX_THREADS = 1000

# The environments of the papers' figures, and at least one of every other robot; any other partition works as well.
ENV_IDS = (
    "Ant-2x4",
    "Ant-2x4d",
    "Ant-4x2",
    "Ant-8x1",
    "HalfCheetah-2x3",
    "HalfCheetah-3x2",
    "HalfCheetah-6x1",
    "Hopper-3x1",
    "Walker2d-2x3",
    "Walker2d-3x2",
    "Walker2d-6x1",
    "Humanoid-17x1",
    "Humanoid-9|8",
    "HumanoidStandup-17x1",
    "ManySegmentSwimmer-10x2",
    "ManySegmentAnt-2x3",
    "Swimmer-2x1",
    "Reacher-2x1",
    "Pusher-3p",
    "CoupledHalfCheetah-1p1",
)


def make_vec(
    env_id: str,
    num_envs: int,
    agent_obsk: int | None = None,
    num_threads: int = 0,
    partition: str | Sequence[Sequence[int]] | None = None,
) -> VectorEnv:
    """Make `num_envs` environments of one robot, split among agents.

    Args:
        env_id: "<Robot>-<partition>", such as "HalfCheetah-6x1", "Ant-2x4d" or "Ant-[[0,1,2,3],[4,5,6,7]]". <Robot> is
            one of `ROBOTS`, or any Gymnasium id of a `MujocoEnv` ("Ant-v4", "my_module:MyRobot-v0"), which then runs on
            Gymnasium's own, slower vectorisation.
        num_envs: number of environments.
        agent_obsk: what an agent sees: None for the whole state, k >= 0 for its own joints, the root and the positions
            of joints up to k edges away.
        num_threads: threads that step the physics of a robot in `ROBOTS`, 0 for one per CPU (a Gymnasium id has one).
            Results do not depend on it.
        partition: the partition, when `env_id` is the robot alone.

    Returns:
        A vector environment over flat observations [num_envs, obs_dim] and actions [num_envs, act_dim], with SAME_STEP
        autoreset. Its `.partition` has the index arrays; `get_state` and `set_state` save and restore it exactly
        (`gymnasium_vec.py` says what of Gymnasium ids is not saved).

    Raises:
        ValueError: when something in the arguments is unknown or does not fit; the message is one line.
    """
    if not 1 <= num_envs <= MAX_ENVS:
        raise ValueError(f"num_envs is {num_envs}: it must be 1 to {MAX_ENVS}")
    if not 0 <= num_threads <= MAX_THREADS:
        raise ValueError(
            f"num_threads is {num_threads}: it must be 0 (one per CPU) to {MAX_THREADS}"
        )
    robot = env_id
    text = partition
    if partition is None and "-[" in env_id:  # lists may have hyphens: "Ant-[[0,-1]]"
        robot, text = env_id.split("-[", maxsplit=1)
        text = "[" + text
    elif partition is None:
        robot, _, text = env_id.rpartition("-")
    if robot not in ROBOTS:
        return _make_gymnasium_vec(robot, text, num_envs, agent_obsk)
    gym_id, task_class = ROBOTS[robot]
    # Gymnasium's model files have deprecated attributes, on which MuJoCo remarks.
    with tasks.quiet_mujoco(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        env = _make_task_env(robot, text)
    act_ids = parse_partition(robot, text, env.model.nu)
    vec = task_class(env, num_envs, gym.spec(gym_id).max_episode_steps, num_threads)
    vec.partition = make_partition(env.model, act_ids, vec.obs_entries, agent_obsk)
    return vec


def _make_task_env(robot: str, partition: str | Sequence[Sequence[int]]) -> MujocoEnv:
    """Make Gymnasium's environment object of one of `ROBOTS`, with the number of segments that the partition needs."""
    if robot == "CoupledHalfCheetah":
        return models.CoupledHalfCheetahEnv(models.coupled_half_cheetah())
    if robot not in SEGMENTED:
        return gym.make(ROBOTS[robot][0]).unwrapped
    if isinstance(partition, str) and (sizes := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", partition)):
        num_segments = int(sizes[1]) * int(sizes[2])
    else:
        num_actuators = sum(map(len, parse_actuator_lists(partition)))
        num_segments = num_actuators // ACTUATORS_PER_SEGMENT.get(robot, 1)
    if num_segments > MAX_SEGMENTS:
        raise ValueError(f"{robot} has at most {MAX_SEGMENTS} segments, not {num_segments}")
    make_env, make_model = SEGMENTED[robot]
    return make_env(make_model(num_segments))


def _make_gymnasium_vec(
    gym_id: str, partition: str | Sequence[Sequence[int]], num_envs: int, agent_obsk: int | None
) -> VectorEnv:
    """`make_vec` for any other Gymnasium MuJoCo environment, on Gymnasium's own vectorisation.

    Observations and actions are those of the environment as `gym.make` returns it, with its wrappers.

    Raises:
        ValueError: when it is unknown, cannot be made, is no `MujocoEnv`, has an observation that is not flat, or does
            not fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            env = gym.make(gym_id)
    except Exception as e:  # Gymnasium's, or whatever the environment's own code raises
        is_unknown = isinstance(e, gym.error.UnregisteredEnv) or type(e) is gym.error.Error
        if not is_unknown:
            reason = " ".join(str(e).split())
            raise ValueError(f"{gym_id} cannot be made: {type(e).__name__}: {reason}") from e
        env_id = f"{gym_id}-{partition}" if gym_id else str(partition)
        known_ids = [*ENV_IDS, *(f"{robot}-<partition>" for robot in ROBOTS)]
        by_lower = {known.lower(): known for known in known_ids}
        matches = difflib.get_close_matches(env_id.lower(), by_lower, n=4, cutoff=0.4)
        near = [by_lower[match] for match in matches] or ENV_IDS
        raise ValueError(f"unknown env_id {env_id[:80]!r}; did you mean {', '.join(near)}?") from e
    if not isinstance(env.unwrapped, MujocoEnv) or len(env.observation_space.shape or ()) != 1:
        raise ValueError(
            f"{gym_id} is not a Gymnasium MujocoEnv with a flat observation, so it cannot be partitioned"
        )
    model = env.unwrapped.model
    if not isinstance(env.action_space, gym.spaces.Box):
        raise ValueError(
            f"{gym_id} has actions {env.action_space}: it needs a Box with one entry for each actuator"
        )
    if env.action_space.shape != (model.nu,):
        raise ValueError(
            f"{gym_id} has {model.nu} actuators, but actions {env.action_space}: "
            "it needs one entry for each actuator"
        )
    act_ids = parse_partition(gym_id, partition, model.nu)
    entries = [("global", 0)] * env.observation_space.shape[0]  # every agent sees everything
    if agent_obsk is not None:
        if wrappers := extra_wrappers(env):
            raise ValueError(
                f"{gym_id}: agent_obsk must be None, because its observation is no longer the robot's own "
                f"behind {', '.join(wrappers)}"
            )
        entries = tasks.observation_entries(env.unwrapped)
    low = env.action_space.low
    high = env.action_space.high
    usable = np.isfinite(low) & np.isfinite(high) & (low < high)
    if not usable.all():
        raise ValueError(
            f"{gym_id}: the action range of actuator {usable.argmin()} must be finite, with low < high"
        )
    vec = GymnasiumVectorEnv(gym_id, num_envs)
    vec.partition = make_partition(model, act_ids, entries, agent_obsk)
    return vec
