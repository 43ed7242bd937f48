"""The tasks of envs/tasks.py against Gymnasium's own environments, and the promises of the vector environment."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeAwareObservation, TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from gymnasium_robotics.envs.multiagent_mujoco import many_segment_ant, many_segment_swimmer
from gymnasium_robotics.envs.multiagent_mujoco.coupled_half_cheetah import CoupledHalfCheetahEnv

import envs

# Robot -> (partition, environments, steps of the long run, endings that the long run must contain).
RUNS = {
    "HalfCheetah": ("6x1", 2, 1010, {"truncated"}),
    "Ant": ("4x2", 4, 400, {"terminated"}),
    "Hopper": ("3x1", 4, 250, {"terminated"}),
    "Walker2d": ("2x3", 4, 250, {"terminated"}),
    "Humanoid": ("9|8", 4, 120, {"terminated"}),
    "HumanoidStandup": ("17x1", 2, 120, set()),
    "Swimmer": ("2x1", 2, 1010, {"truncated"}),
    "Reacher": ("2x1", 4, 110, {"truncated"}),
    "Pusher": ("3p", 3, 210, {"truncated"}),
    "ManySegmentSwimmer": ("3x2", 3, 300, set()),
    "ManySegmentAnt": ("3x1", 4, 300, {"terminated"}),
    "CoupledHalfCheetah": ("1p1", 2, 1010, {"truncated"}),
}
ROBOTS = list(RUNS)
NUM_SEGMENTS = {"ManySegmentSwimmer": 6, "ManySegmentAnt": 3}
GYM_ID = {robot: f"{robot}-v5" for robot in ROBOTS}
GYM_ID |= {
    "ManySegmentSwimmer": "Swimmer-v5",
    "ManySegmentAnt": "Ant-v5",
    "CoupledHalfCheetah": "HalfCheetah-v5",
}
# np.linalg.norm sums another way over an axis than over a vector: only these rewards differ, in the last bits.
REWARD_RTOL = {"Reacher": 1e-10, "Pusher": 1e-10}

# Weights and ranges that are not Gymnasium's defaults: a task that ignores one of them gives other numbers.
OTHER_WEIGHTS = {
    "HalfCheetah": {
        "forward_reward_weight": 1.7,
        "ctrl_cost_weight": 0.3,
        "reset_noise_scale": 0.2,
        "frame_skip": 3,
    },
    "Ant": {
        "forward_reward_weight": 1.7,
        "ctrl_cost_weight": 0.3,
        "contact_cost_weight": 2e-3,
        "healthy_reward": 0.6,
        "healthy_z_range": (0.45, 0.9),
        "contact_force_range": (-2.0, 0.5),
        "main_body": 3,
        "frame_skip": 3,
    },
    "Hopper": {
        "forward_reward_weight": 1.7,
        "ctrl_cost_weight": 0.3,
        "healthy_reward": 0.6,
        "frame_skip": 3,
    },
    "Walker2d": {
        "forward_reward_weight": 1.7,
        "ctrl_cost_weight": 0.3,
        "healthy_reward": 0.6,
        "terminate_when_unhealthy": False,
        "frame_skip": 10,
    },
    "Humanoid": {
        "forward_reward_weight": 1.7,
        "ctrl_cost_weight": 0.3,
        "contact_cost_weight": 1e-4,
        "contact_cost_range": (0.1, 0.4),
        "healthy_reward": 0.6,
        "frame_skip": 3,
    },
    "HumanoidStandup": {
        "ctrl_cost_weight": 0.3,
        "impact_cost_weight": 1e-4,
        "impact_cost_range": (0.1, 0.4),
    },
    "Swimmer": {
        "forward_reward_weight": 1.7,
        "ctrl_cost_weight": 0.3,
        "reset_noise_scale": 0.2,
        "frame_skip": 3,
    },
    "Reacher": {"reward_dist_weight": 1.7, "reward_control_weight": 0.3, "frame_skip": 3},
    "Pusher": {
        "reward_near_weight": 0.9,
        "reward_dist_weight": 1.7,
        "reward_control_weight": 0.3,
        "frame_skip": 3,
    },
}


@pytest.fixture(autouse=True)
def _quiet_mujoco(monkeypatch, tmp_path):
    """Keep MuJoCo's warnings off the screen, and its log file out of the repository."""
    monkeypatch.chdir(tmp_path)
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    yield
    mujoco.set_mju_user_warning(handler)


class DenseTendons:
    """An mjData whose tendon Jacobian is a dense matrix, as it was before MuJoCo 4."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self.data = data
        self.ten_J = np.zeros((model.ntendon, model.nv))
        for row, start, count in zip(
            self.ten_J, model.ten_J_rowadr, model.ten_J_rownnz, strict=True
        ):
            row[model.ten_J_colind[start : start + count]] = data.ten_J[start : start + count]

    def __getattr__(self, name: str) -> np.ndarray:
        return getattr(self.data, name)


class DenseCoupledHalfCheetah(CoupledHalfCheetahEnv):
    """Gymnasium-Robotics' environment; its observation reads a dense tendon Jacobian."""

    def _get_obs(self) -> np.ndarray:
        return CoupledHalfCheetahEnv._get_obs(
            SimpleNamespace(data=DenseTendons(self.model, self.data))
        )


def make_oracle(robot: str, num_envs: int, folder: Path, **kwargs) -> VectorEnv:
    """Gymnasium's own vectorisation of a robot; `kwargs` go to `gymnasium.make`."""
    if robot == "CoupledHalfCheetah":
        limit = kwargs.get("max_episode_steps", 1000)
        make = [lambda: TimeLimit(DenseCoupledHalfCheetah(), limit)] * num_envs
        return RecordEpisodeStatistics(SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP))
    if robot in NUM_SEGMENTS:
        kwargs["xml_file"] = str(folder / f"{robot}.xml")
        module = many_segment_swimmer if robot == "ManySegmentSwimmer" else many_segment_ant
        module.gen_asset(NUM_SEGMENTS[robot], kwargs["xml_file"])
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
    return RecordEpisodeStatistics(
        gym.make_vec(GYM_ID[robot], num_envs, "sync", vector_kwargs=same_step, **kwargs)
    )


def make_ours(robot: str, num_envs: int, num_threads: int = 1) -> VectorEnv:
    """Our environment of a robot through the front door."""
    return RecordEpisodeStatistics(
        envs.make_vec(f"{robot}-{RUNS[robot][0]}", num_envs, num_threads=num_threads)
    )


def make_task(
    robot: str, num_envs: int, max_episode_steps: int, num_threads: int, **kwargs
) -> VectorEnv:
    """Our task class itself, with another time limit and, for Gymnasium's robots, other weights."""
    env = (
        gym.make(GYM_ID[robot], **kwargs).unwrapped if kwargs else make_ours(robot, 1).unwrapped.env
    )
    return RecordEpisodeStatistics(
        envs.ROBOTS[robot][1](env, num_envs, max_episode_steps, num_threads)
    )


def random_actions(
    space: Box, steps: int, num_envs: int, seed: int = 0, dtype: type = np.float32
) -> np.ndarray:
    """Uniform actions up to 30% outside the range, [steps, num_envs, act_dim]."""
    actions = np.random.default_rng(seed).uniform(-1.3, 1.3, (steps, num_envs, *space.shape))
    return (actions * space.high).astype(dtype)


def record(
    vec: VectorEnv, seed: int, actions: np.ndarray, reset_before: int | None = None
) -> list[tuple]:
    """Everything that `reset` and `step` return, not copied: a later step must not change what was returned."""
    run = [vec.reset(seed=seed)]
    for t, action in enumerate(actions):
        if t == reset_before:
            run.append(vec.reset())
        run.append(vec.step(action))
    return run


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal in type, shape and every bit (-0.0 is not 0.0)."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours, theirs)
    assert ours.tobytes() == theirs.tobytes()


def assert_same_run(ours: list[tuple], theirs: list[tuple], reward_rtol: float = 0) -> None:
    """The same observations, rewards, endings, final observations and episode statistics, step by step."""
    same_reward = assert_same_bits
    if reward_rtol:
        same_reward = functools.partial(np.testing.assert_allclose, rtol=reward_rtol)
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert_same_bits(our[0], their[0])
        assert np.isfinite(our[0]).all()
        if len(our) == 2:  # a reset
            continue
        same_reward(our[1], their[1])
        assert_same_bits(our[2], their[2])
        assert_same_bits(our[3], their[3])
        our_info, their_info = our[4], their[4]
        done = our[2] | our[3]
        assert set(our_info) == (
            {"final_obs", "_final_obs", "episode", "_episode"} if done.any() else set()
        )
        assert set(our_info) <= set(their_info)
        if done.any():
            assert_same_bits(our_info["_final_obs"], their_info["_final_obs"])
            assert_same_bits(our_info["_episode"], their_info["_episode"])
            assert_same_bits(our_info["episode"]["l"], their_info["episode"]["l"])
            same_reward(our_info["episode"]["r"], their_info["episode"]["r"])
            for i in range(len(done)):
                if done[i]:
                    assert_same_bits(our_info["final_obs"][i], their_info["final_obs"][i])
                else:
                    assert our_info["final_obs"][i] is None


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """The oracle's long run of a robot, made once: (actions, run)."""
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    folder = tmp_path_factory.mktemp("assets")

    @functools.cache
    def run_oracle(robot: str) -> tuple[np.ndarray, list[tuple]]:
        _, num_envs, steps, _ = RUNS[robot]
        oracle = make_oracle(robot, num_envs, folder)
        actions = random_actions(oracle.single_action_space, steps, num_envs)
        return actions, record(oracle, 1, actions)

    yield run_oracle
    mujoco.set_mju_user_warning(handler)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("robot", ROBOTS)
def test_long_run_is_gymnasiums(robot, num_threads, long_run):
    """Whole runs under the registered time limit, through terminations, truncations and autoresets."""
    actions, theirs = long_run(robot)
    steps = theirs[1:]
    seen = {"terminated"} if np.any([step[2] for step in steps]) else set()
    seen |= {"truncated"} if np.any([step[3] for step in steps]) else set()
    assert seen == RUNS[robot][3], "the oracle's run does not have the endings that it is here for"
    ours = record(make_ours(robot, RUNS[robot][1], num_threads), 1, actions)
    assert_same_run(ours, theirs, REWARD_RTOL.get(robot, 0))


@pytest.mark.parametrize(
    ("num_envs", "num_threads", "dtype"), [(1, 1, np.float64), (3, 2, np.float32)]
)
@pytest.mark.parametrize("robot", ROBOTS)
def test_other_weights_and_time_limit_are_gymnasiums(robot, num_envs, num_threads, dtype, tmp_path):
    """Weights and ranges come from the environment object; the time limit holds, also after a reset in mid-episode."""
    kwargs, limit = OTHER_WEIGHTS.get(robot, {}), 17
    oracle = make_oracle(robot, num_envs, tmp_path, max_episode_steps=limit, **kwargs)
    actions = random_actions(oracle.single_action_space, 45, num_envs, 3, dtype)
    theirs = record(oracle, 2, actions, reset_before=21)
    assert np.any([step[3] for step in theirs if len(step) > 2])
    ours = record(
        make_task(robot, num_envs, limit, num_threads, **kwargs), 2, actions, reset_before=21
    )
    assert_same_run(ours, theirs, REWARD_RTOL.get(robot, 0))


# States at both sides of every limit of the tasks that have some, one per environment: (field, index, value), ...
EXTREME_STATES = {
    "Hopper": [
        *((("qpos", 1, z),) for z in (0.6, 0.8, 9.0)),
        *((("qpos", 2, angle),) for angle in (-0.3, -0.15, 0.15, 0.3)),
        *((("qvel", 5, speed),) for speed in (-400.0, -12.0, 12.0, 400.0)),
        *(
            (("qpos", 1, 3.0), ("qvel", 0, speed)) for speed in (-101.0, -99.0, 99.0, 101.0)
        ),  # in flight
    ],
    "Walker2d": [
        *((("qpos", 1, z),) for z in (0.7, 0.9, 1.9, 2.1)),
        *((("qpos", 2, angle),) for angle in (-1.1, -0.9, 0.9, 1.1)),
        *((("qvel", 5, speed),) for speed in (-30.0, 30.0)),
    ],
    "Ant": [(("qpos", 2, z),) for z in (0.1, 0.15, 0.4, 0.95, 1.1)],
    "Humanoid": [*((("qpos", 2, z),) for z in (0.9, 1.1, 1.95, 2.1)), (("qvel", 2, -60.0),)],
    "HumanoidStandup": [*((("qpos", 2, z),) for z in (0.9, 2.1)), (("qvel", 2, -60.0),)],
}


@pytest.mark.parametrize("robot", EXTREME_STATES)
def test_extreme_states_are_gymnasiums(robot, tmp_path):
    """Limits of health, clipped velocities and clipped contact costs, at states that random actions do not reach."""
    states = EXTREME_STATES[robot]
    ours, oracle = make_ours(robot, len(states)), make_oracle(robot, len(states), tmp_path)
    ours.reset(seed=5)
    oracle.reset(seed=5)
    for i, changes in enumerate(states):
        env = oracle.env.envs[i].unwrapped
        state = {"qpos": env.data.qpos.copy(), "qvel": env.data.qvel.copy()}
        for field, index, value in changes:
            state[field][index] = value
            getattr(ours.unwrapped.batch, field)[i, index] = value
        env.set_state(**state)
    ours.unwrapped.batch.forward()
    actions = np.zeros(oracle.action_space.shape, np.float32)
    theirs = [oracle.step(actions) for _ in range(2)]
    if robot == "HumanoidStandup":
        assert (
            theirs[0][4]["reward_impact"].min() == -10
        )  # the upper end of the range of the impact cost
    else:
        assert theirs[0][2].any()
        assert not theirs[0][2].all()
    if robot == "Humanoid":
        assert theirs[0][4]["final_info"]["reward_contact"].min() == -10
    assert_same_run([ours.step(actions) for _ in range(2)], theirs)


@pytest.mark.parametrize("robot", ROBOTS)
def test_resets_are_gymnasiums(robot, tmp_path):
    """An int, no seed and a list of seeds give Gymnasium's initial states, all of them different."""
    ours, oracle = make_ours(robot, 3), make_oracle(robot, 3, tmp_path)
    seen = []
    for seed in (11, None, None, [5, 2, 11], None):
        seen.append(ours.reset(seed=seed)[0])
        assert_same_bits(seen[-1], oracle.reset(seed=seed)[0])
    same = [
        (a, b) for a, b in itertools.combinations(np.concatenate(seen), 2) if np.array_equal(a, b)
    ]
    assert len(same) == 2  # seed 11 is used twice, and its stream goes on the same way both times
    np.testing.assert_array_equal(seen[3][2], seen[0][0])
    np.testing.assert_array_equal(seen[4][2], seen[1][0])


def test_unseeded_resets_differ():
    """Without any seed, environments and vector environments start in different states."""
    a, b = (make_ours("Hopper", 2).reset()[0] for _ in range(2))
    assert len({row.tobytes() for row in (*a, *b)}) == 4


@pytest.mark.parametrize("robot", ["Hopper", "Ant", "Reacher"])
def test_environment_i_of_seed_s_is_environment_0_of_seed_s_plus_i(robot):
    """An environment's run depends on its own seed and actions only, through autoresets as well."""
    actions = random_actions(make_ours(robot, 1).single_action_space, 60, 3)
    together = record(make_ours(robot, 3), 20, actions)
    for i in range(3):
        alone = record(make_ours(robot, 1), 20 + i, actions[:, i : i + 1])
        for ours, one in zip(together, alone, strict=True):
            for field in range(min(len(ours) - 1, 4)):
                assert_same_bits(ours[field][i : i + 1], one[field])


@pytest.mark.parametrize("robot", ROBOTS)
def test_results_do_not_depend_on_threads(robot):
    """One, two and three threads give the same bits, for any number of environments per thread."""
    actions = random_actions(make_ours(robot, 1).single_action_space, 30, 5)
    one = record(make_ours(robot, 5, 1), 6, actions)
    for num_threads in (2, 3):
        vec = make_ours(robot, 5, num_threads)
        assert vec.unwrapped.batch.nthread == num_threads
        assert_same_run(record(vec, 6, actions), one)


@pytest.mark.parametrize(
    ("field", "value"), [("qvel", np.nan), ("qvel", 1e11), ("qvel", 1e9), ("qpos", np.inf)]
)
@pytest.mark.parametrize("robot", ROBOTS)
def test_diverged_simulation_ends_alone(robot, field, value):
    """It ends as terminated, finite and counted, starts anew from its own stream, and touches no other simulation."""
    vec, untouched = make_ours(robot, 3, 2), make_ours(robot, 3, 2)
    actions = random_actions(vec.single_action_space, 8, 3)
    second_start = make_ours(robot, 3)
    second_start.reset(seed=30)
    second_start = second_start.reset()[0]
    vec.reset(seed=30)
    untouched.reset(seed=30)
    for t, action in enumerate(actions):
        if t in (2, 5):
            getattr(vec.unwrapped.batch, field)[1] = value
        obs, rewards, terminations, truncations, infos = vec.step(action)
        expected = untouched.step(action)
        for i in (0, 2):
            assert_same_bits(obs[i], expected[0][i])
            assert rewards[i] == expected[1][i]
            assert (
                (terminations[i], truncations[i])
                == (expected[2][i], expected[3][i])
                == (False, False)
            )
        assert np.isfinite(obs).all()
        assert np.isfinite(rewards).all()
        assert terminations[1] == (t in (2, 5))
        assert not truncations[1]
        assert vec.env.num_diverged == (t >= 2) + (t >= 5)
        if t in (2, 5):
            assert rewards[1] == 0
            assert infos["_final_obs"].tolist() == [False, True, False]
            assert np.isfinite(infos["final_obs"][1]).all()
            assert infos["episode"]["l"].tolist() == [0, 3, 0]
        if t == 2:
            assert_same_bits(obs[1], second_start[1])
    assert untouched.env.num_diverged == 0


@pytest.mark.parametrize("robot", ["HalfCheetah", "Ant"])
def test_divergence_is_finite_without_mujocos_own_reset(robot):
    """A model may tell MuJoCo to leave a diverged state alone: what is returned is finite all the same."""
    env = gym.make(GYM_ID[robot]).unwrapped
    env.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
    vec = RecordEpisodeStatistics(envs.ROBOTS[robot][1](env, 2, 1000, 1))
    vec.reset(seed=0)
    vec.unwrapped.batch.qvel[1] = np.nan
    for t in range(3):
        obs, rewards, terminations, _, infos = vec.step(
            np.zeros(vec.action_space.shape, np.float32)
        )
        assert terminations.tolist() == [False, t == 0]
        assert np.isfinite(obs).all()
        assert np.isfinite(rewards).all()
        if t == 0:
            assert np.isfinite(infos["final_obs"][1]).all()
    assert vec.env.num_diverged == 1


@pytest.mark.parametrize("shape", [(3, 2), (3, 4), (1, 3), (2, 3), (3,), (9,), ()])
def test_wrong_action_shape_is_an_error(shape):
    """Also a shape that NumPy would broadcast."""
    vec = make_ours("Hopper", 3)
    vec.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must have shape \(3, 3\)"):
        vec.step(np.zeros(shape))


def test_step_leaves_the_actions_alone():
    """The caller may use its actions again, and may change them afterwards."""
    vec, other = make_ours("Ant", 2), make_ours("Ant", 2)
    vec.reset(seed=0)
    other.reset(seed=0)
    actions = random_actions(vec.single_action_space, 1, 2)[0]
    before = actions.copy()
    first = vec.step(actions)[0]
    assert_same_bits(actions, before)
    assert_same_bits(first, other.step(before)[0])
    actions[:] = 0
    assert_same_bits(vec.step(before)[0], other.step(before)[0])


@pytest.mark.parametrize("robot", ROBOTS)
def test_spaces_and_time_limit_are_gymnasiums(robot, tmp_path):
    """The spaces and the limit of the registered task; what comes back is in the spaces."""
    ours, oracle = make_ours(robot, 2), make_oracle(robot, 2, tmp_path)
    for space in (
        "observation_space",
        "single_observation_space",
        "action_space",
        "single_action_space",
    ):
        assert getattr(ours, space) == getattr(oracle, space)
    assert ours.num_envs == 2
    assert ours.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert ours.env.max_episode_steps == gym.spec(GYM_ID[robot]).max_episode_steps
    ours.action_space.seed(0)
    obs, _ = ours.reset(seed=0)
    assert obs in ours.observation_space
    obs, rewards, terminations, truncations, _ = ours.step(ours.action_space.sample())
    assert obs in ours.observation_space
    assert (rewards.dtype, terminations.dtype, truncations.dtype) == (
        np.float64,
        np.bool_,
        np.bool_,
    )
    assert rewards.shape == terminations.shape == truncations.shape == (2,)


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
@pytest.mark.parametrize(
    ("gym_id", "partition"), [("Ant-v4", "4x2"), ("InvertedPendulum-v5", "1x1")]
)
def test_any_gymnasium_robot_works(gym_id, partition):
    """Gymnasium's other MuJoCo environments run on its own vectorisation, through autoresets."""
    vec = envs.make_vec(f"{gym_id}-{partition}", 2)
    oracle = gym.make_vec(
        gym_id, 2, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
    )
    actions = random_actions(oracle.single_action_space, 100, 2)
    ours, theirs = record(vec, 7, actions), record(RecordEpisodeStatistics(oracle), 7, actions)
    assert np.any([step[2] for step in ours[1:]])
    for our, their in zip(ours, theirs, strict=True):
        for field in range(len(our) - 1):
            assert_same_bits(our[field], their[field])
        assert (
            "episode" not in our[-1]
            or our[-1]["episode"]["l"].tolist() == their[-1]["episode"]["l"].tolist()
        )
    assert sorted(np.concatenate(vec.partition.act_ids)) == list(
        range(oracle.single_action_space.shape[0])
    )
    assert all(
        len(ids) == oracle.single_observation_space.shape[0] for ids in vec.partition.obs_ids
    )


TWO_ARMS = """
<mujoco>
  <worldbody>
    <body name="cart">
      <joint name="slide" type="slide" axis="1 0 0"/>
      <geom size="0.1"/>
      <body name="left" pos="0 -0.5 0"><joint name="left" axis="0 1 0"/><geom size="0.1" pos="0 0 -0.5"/></body>
      <body name="right" pos="0 0.5 0"><joint name="right" axis="0 1 0"/><geom size="0.1" pos="0 0 -0.5"/></body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="right" ctrlrange="-2 2" ctrllimited="true"/>
    <motor joint="left" ctrlrange="-2 2" ctrllimited="true"/>
  </actuator>
</mujoco>
"""


class TwoArmsEnv(MujocoEnv):
    """A user's robot: two arms on a cart, the actuators in the other order than the joints."""

    def __init__(self, xml_file: str, describe: bool = True) -> None:
        super().__init__(xml_file, 2, Box(-np.inf, np.inf, (6,), np.float64))
        if describe:
            self.observation_structure = {"skipped_qpos": 0, "qpos": 3, "qvel": 3}

    def step(self, action: np.ndarray) -> tuple:
        self.do_simulation(action, self.frame_skip)
        return self.state_vector(), float(self.data.qpos[0]), False, False, {}

    def reset_model(self) -> np.ndarray:
        self.set_state(self.np_random.uniform(size=3), self.np_random.uniform(size=3))
        return self.state_vector()


@pytest.fixture
def register_arms(tmp_path):
    """Register the user's robot for one test: as it is, or with another class, XML or wrappers."""

    def register(make: Callable = TwoArmsEnv, xml: str = TWO_ARMS, **spec: object) -> str:
        file = tmp_path / "two_arms.xml"
        file.write_text(xml)
        kwargs = {"xml_file": str(file)}
        gym.register("TwoArms-v0", make, max_episode_steps=7, kwargs=kwargs, **spec)
        return "TwoArms-v0"

    yield register
    gym.registry.pop("TwoArms-v0", None)


@pytest.fixture
def two_arms(register_arms):
    """The user's robot as it is."""
    return register_arms()


def assert_like_gym_make(vec: VectorEnv, gym_id: str) -> None:
    """The second of two environments does what `gym.make` gives, through the end of an episode after 7 steps."""
    obs, _ = vec.reset(seed=8)
    single = gym.make(gym_id)
    expected, _ = single.reset(seed=9)
    for t in range(1, 10):
        assert_same_bits(obs[1], expected)
        obs, rewards, terminations, truncations, infos = vec.step(
            np.full((2, 2), t / 10, np.float32)
        )
        expected, reward, _, truncated, _ = single.step(np.full(2, t / 10, np.float32))
        assert rewards[1] == reward
        assert terminations.tolist() == [False, False]
        assert truncations.tolist() == [t == 7] * 2 == [truncated] * 2
        if truncated:
            assert_same_bits(infos["final_obs"][1], expected)
            expected, _ = single.reset()


@pytest.mark.parametrize(
    ("agent_obsk", "obs_ids"),
    [
        (None, [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
        (0, [[0, 2, 3, 5], [0, 1, 3, 4]]),  # the right arm, the left arm, and the cart for both
        (1, [[0, 1, 2, 3, 5], [0, 1, 2, 3, 4]]),
    ],
)
def test_a_users_robot_works(two_arms, agent_obsk, obs_ids):
    """A registered environment with its own XML steps, truncates, resets and is partitioned by its kinematic tree."""
    vec = envs.make_vec(f"{two_arms}-2x1", 2, agent_obsk)
    assert [ids.tolist() for ids in vec.partition.act_ids] == [[0], [1]]
    assert [ids.tolist() for ids in vec.partition.obs_ids] == obs_ids
    assert_like_gym_make(vec, two_arms)


def test_a_users_robot_is_found_in_its_module(tmp_path, monkeypatch):
    """ "module:id" imports the module that registers the robot."""
    register = (
        'gym.register("Mine-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv", max_episode_steps=3)'
    )
    (tmp_path / "my_robots.py").write_text(f"import gymnasium as gym\n{register}\n")
    monkeypatch.syspath_prepend(tmp_path)
    vec = envs.make_vec("my_robots:Mine-v0-3x1", 2, 0)
    hopper = envs.make_vec("Hopper-3x1", 2, 0, num_threads=1)
    for mine, its in zip(vec.partition.obs_ids, hopper.partition.obs_ids, strict=True):
        np.testing.assert_array_equal(mine, its)
    actions = random_actions(vec.single_action_space, 3, 2)
    ours, theirs = record(vec, 9, actions), record(hopper, 9, actions)
    for mine, its in zip(ours[:3], theirs[:3], strict=True):
        assert_same_bits(mine[0], its[0])
    assert ours[3][3].tolist() == [True, True]
    del gym.registry["Mine-v0"]


def test_a_users_robot_must_describe_its_observation_to_be_split(two_arms, tmp_path):
    """Without `observation_structure`, only the whole state can be shown; other things than robots are refused."""
    gym.registry[two_arms].kwargs["describe"] = False
    assert envs.make_vec(f"{two_arms}-2x1", 1).partition.num_agents == 2
    with pytest.raises(ValueError, match="observation_structure"):
        envs.make_vec(f"{two_arms}-2x1", 1, agent_obsk=0)
    with pytest.raises(ValueError, match="CartPole-v1 is not a Gymnasium MujocoEnv"):
        envs.make_vec("CartPole-v1-1x1", 1)


# A user's robot behind wrappers, and with other spaces


class FirstFour(gym.ObservationWrapper):
    """A wrapper that a user writes: the first four entries of the observation."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = Box(-np.inf, np.inf, (4,), np.float64)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[:4]


class OtherActions(gym.ActionWrapper):
    """A wrapper that a user writes: both arms do the same, whatever the space of the actions."""

    def __init__(self, env: gym.Env, space: Space) -> None:
        super().__init__(env)
        self.action_space = space

    def action(self, action: np.ndarray) -> np.ndarray:
        return np.full(2, np.sum(action))


@pytest.mark.parametrize(
    ("wrapper", "size"), [("TimeAwareObservation", 7), ("FirstFour", 4)], ids=["more", "less"]
)
def test_what_a_wrapper_shows_is_what_agents_see(register_arms, wrapper, size):
    """Every agent sees all that gym.make's environment shows, whose entries are no longer known and state not saved."""
    if wrapper == "FirstFour":
        robot = register_arms(lambda **kwargs: FirstFour(TwoArmsEnv(**kwargs)))
    else:
        robot = register_arms(additional_wrappers=(TimeAwareObservation.wrapper_spec(),))
    vec = envs.make_vec(f"{robot}-2x1", 2)
    assert vec.single_observation_space.shape == (size,)
    assert [ids.tolist() for ids in vec.partition.obs_ids] == [list(range(size))] * 2
    assert_like_gym_make(vec, robot)
    assert vec.get_state() is None
    message = f"^{robot}: agent_obsk must be None, .* no longer the robot's own behind {wrapper}$"
    with pytest.raises(ValueError, match=message):
        envs.make_vec(f"{robot}-2x1", 2, agent_obsk=0)


def test_the_wrappers_of_gym_make_hide_nothing(two_arms):
    """Without further wrappers the robot is its own, and its state can be saved."""
    vec = envs.make_vec(f"{two_arms}-2x1", 2, agent_obsk=0)
    vec.reset(seed=0)
    assert len(vec.get_state()) == 2


@pytest.mark.parametrize(
    "space",
    [Box(-1, 1, (1,)), Box(-1, 1, (3,)), Box(-1, 1, (2, 1)), Discrete(2), MultiDiscrete([3, 3])],
    ids=str,
)
def test_a_wrapper_that_changes_the_actions_is_refused(register_arms, space):
    """An agent's actuators are entries of the action: one line says what the actions are."""
    robot = register_arms(lambda **kwargs: OtherActions(TwoArmsEnv(**kwargs), space))
    with pytest.raises(ValueError) as error:
        envs.make_vec(f"{robot}-2x1", 2)
    message = f"{robot} has 2 actuators, but actions {space}: it needs one entry for each actuator"
    if not isinstance(space, Box):
        message = f"{robot} has actions {space}: it needs a Box with one entry for each actuator"
    assert str(error.value) == message


def test_a_robot_whose_action_is_not_its_actuators_is_refused(register_arms):
    """Three actuators, which the environment's own step drives with one number."""

    class OneActionEnv(TwoArmsEnv):
        def __init__(self, **kwargs: object) -> None:
            super().__init__(**kwargs)
            self.action_space = Box(-1, 1, (1,))

    motor = '<motor joint="slide" ctrlrange="-2 2" ctrllimited="true"/>'
    robot = register_arms(OneActionEnv, TWO_ARMS.replace("</actuator>", f"{motor}</actuator>"))
    for partition in ("1x1", "3x1"):
        with pytest.raises(ValueError, match=r"has 3 actuators, but actions .*\(1,\).*") as error:
            envs.make_vec(f"{robot}-{partition}", 2)
        assert str(error.value).endswith(": it needs one entry for each actuator")


def test_infos_of_any_length_do_no_harm(register_arms):
    """Arrays that grow from step to step, which Gymnasium's vectorisation cannot stack."""

    class TalkativeArmsEnv(TwoArmsEnv):
        def step(self, action: np.ndarray) -> tuple:
            self.told += 1
            return *super().step(action)[:4], {"trail": np.arange(self.told), "t": self.told}

        def _get_reset_info(self) -> dict:
            self.told = self.np_random.integers(5)
            return {"trail": np.arange(self.told)}

    robot = register_arms(TalkativeArmsEnv)
    assert_like_gym_make(envs.make_vec(f"{robot}-2x1", 2), robot)


# A user's robot that diverges


@pytest.mark.parametrize("way", ["gear", "speed", "nan"])
def test_diverged_users_robot_ends_alone(register_arms, way):
    """When MuJoCo warns: a reward of 0, terminated, counted, a new episode of its own stream; no other is touched."""

    class PaidArmsEnv(TwoArmsEnv):
        def step(self, action: np.ndarray) -> tuple:
            obs, reward, *rest = super().step(action)
            return obs, reward + 5, *rest  # also in MuJoCo's default pose

    gear = 300_000 if way == "gear" else 1
    xml = TWO_ARMS.replace("<motor ", f'<motor gear="{gear}" ')
    robot = register_arms(PaidArmsEnv, xml)
    vec, untouched = envs.make_vec(f"{robot}-2x1", 3), envs.make_vec(f"{robot}-2x1", 3)
    single = gym.make(robot)  # what the second environment does, until it diverges
    warnings = single.unwrapped.data.warning
    obs, _ = vec.reset(seed=20)
    untouched.reset(seed=20)
    expected, _ = single.reset(seed=21)
    actions = np.zeros((3, 2), np.float32)
    actions[1] = 1
    diverged = 0
    for t in range(6):
        assert_same_bits(obs[1], expected)
        if way != "gear" and t in (2, 4):
            for env in (vec.envs[1], single):
                env.unwrapped.data.qvel[:] = 1e12 if way == "speed" else np.nan
        obs, rewards, terminations, truncations, infos = vec.step(actions)
        others = untouched.step(0 * actions)
        for i in (0, 2):
            assert_same_bits(obs[i], others[0][i])
            assert rewards[i] == others[1][i]
        expected, reward, *_ = single.step(actions[1])
        unstable = any(warning.number for warning in warnings)
        diverged += unstable
        assert terminations.tolist() == [False, unstable, False]
        assert not truncations.any()
        assert rewards[1] == (0 if unstable else reward)
        assert vec.num_diverged == diverged
        if unstable:
            assert infos["_final_obs"].tolist() == [False, True, False]
            assert np.isfinite(infos["final_obs"][1]).all()
            expected, _ = single.reset()
    assert diverged == 2
    assert untouched.num_diverged == 0


def diverge(vec: VectorEnv, i: int) -> None:
    """Let one of the simulations be unstable in the next step."""
    if hasattr(vec, "batch"):
        vec.batch.qvel[i] = 1e12
    else:
        vec.envs[i].unwrapped.data.qvel[:] = 1e12


@pytest.mark.parametrize("env_id", ["HalfCheetah-6x1", "Ant-4x2", "TwoArms-v0-2x1"])
def test_divergence_is_silent_and_its_count_is_saved(env_id, two_arms, tmp_path, capfd):
    """No word on the screen, no MUJOCO_LOG.TXT; environments that go on from the state go on counting."""
    mujoco.set_mju_user_warning(None)
    handler = mujoco.get_mju_user_warning()
    vec, other = envs.make_vec(env_id, 3), envs.make_vec(env_id, 3)
    vec.reset(seed=0)
    other.reset(seed=1)
    for i in (0, 2):
        diverge(vec, i)
    *_, terminations, _, _ = vec.step(np.zeros(vec.action_space.shape, np.float32))
    assert terminations.tolist() == [True, False, True]
    assert vec.num_diverged == 2
    assert mujoco.get_mju_user_warning() is handler
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["two_arms.xml"]
    other.set_state(vec.get_state())
    assert other.num_diverged == 2
    diverge(other, 1)
    other.step(np.zeros(vec.action_space.shape, np.float32))
    assert (other.num_diverged, vec.num_diverged) == (3, 2)


@pytest.mark.parametrize(
    ("kwargs", "wrong"),
    [
        ({"num_envs": 0}, "num_envs is 0: it must be 1 to 100000$"),
        ({"num_envs": 2**31}, "num_envs is 2147483648: it must be 1 to 100000$"),
        ({"num_threads": -1}, "num_threads is -1: it must be 0"),
        (
            {"num_threads": 2**31},
            r"num_threads is 2147483648: it must be 0 \(one per CPU\) to 1000$",
        ),
    ],
)
def test_wrong_sizes_are_errors(kwargs, wrong):
    """One line that says what would be right."""
    with pytest.raises(ValueError, match=wrong) as error:
        envs.make_vec("Hopper-3x1", **{"num_envs": 1, **kwargs})
    assert "\n" not in str(error.value)


def test_making_a_robot_is_silent(tmp_path, capfd):
    """MuJoCo's remarks on the model files reach neither the screen nor a log file; the handler is put back."""
    mujoco.set_mju_user_warning(None)
    handler = mujoco.get_mju_user_warning()
    envs.make_vec("CoupledHalfCheetah-1p1", 1, num_threads=1)
    assert mujoco.get_mju_user_warning() is handler
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
