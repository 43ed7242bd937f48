"""Gymnasium's MuJoCo v5 tasks, many simulations at a time, on `mujoco.batch`.

Each class computes with NumPy, for all the simulations at once, what one file of Gymnasium adds to
the physics: observation, reward and termination. Weights, ranges and the random draws of a reset
come from Gymnasium's environment object, so that they cannot drift from it, and the arithmetic has
Gymnasium's order, so that results are bit-identical.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from mujoco.batch import Batch

from .partition import ObsEntry

# The warnings that MuJoCo counts when a simulation diverges; their numbers are consecutive.
DIVERGED = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADQACC) + 1)


@contextlib.contextmanager
def quiet_mujoco() -> Iterator[None]:
    """Let MuJoCo show no warnings, and write none to MUJOCO_LOG.TXT, a file that it makes in the working directory."""
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(handler)


def observation_entries(env: MujocoEnv) -> list[ObsEntry]:
    """Say what each entry of a Gymnasium v5 observation is, from the environment's `observation_structure`.

    Raises:
        ValueError: when the environment does not describe its observation that way.
    """
    structure = getattr(env, "observation_structure", {})
    model = env.model
    skipped = structure.get("skipped_qpos", 0)
    entries = [("qpos", i) for i in range(skipped, model.nq)]
    entries += [("qvel", i) for i in range(model.nv)]
    # Then fields with `width` entries per row. Gymnasium leaves out the world body, and the actuator forces on the
    # root's six degrees of freedom.
    for field, width in (("cinert", 10), ("cvel", 6), ("qfrc_actuator", 1), ("cfrc_ext", 6)):
        if structure.get(field):
            rows = range(6, model.nv) if field == "qfrc_actuator" else range(1, model.nbody)
            entries += [(field, i) for i in rows for _ in range(width)]
    if not structure or len(entries) != env.observation_space.shape[0]:
        raise ValueError(
            "agent_obsk needs an environment whose observation_structure describes its whole observation"
        )
    return entries


class MujocoVectorEnv(VectorEnv):
    """`num_envs` simulations of one Gymnasium MuJoCo task, stepped on a thread pool. Base class of the tasks.

    Same-step autoreset: the step that ends an episode returns the first observation of the next one, and the last one
    of the ended episode in `infos["final_obs"]`, masked by `infos["_final_obs"]`, as in Gymnasium.

    Attributes:
        env: Gymnasium's own environment object, the source of weights, ranges, reset noise and model.
        batch: the `mujoco.batch.Batch` that holds the simulations.
        obs_entries: what each entry of the observation is (see `envs.partition`).
        num_diverged: how many simulations MuJoCo has declared unstable so far.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.SAME_STEP}
    # The mjData fields, beside the state, that the task reads.
    derived_fields: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, env: MujocoEnv, num_envs: int, max_episode_steps: int, num_threads: int = 0
    ) -> None:
        """Build the batch. `num_threads` 0 is one thread per CPU; results do not depend on it."""
        self.env = env
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.obs_entries = self._obs_entries()
        # MuJoCo's step computes no contact forces: that takes the whole MjData, which only a persistent batch keeps.
        self.has_contact_forces = ("cfrc_ext", 1) in self.obs_entries
        self.batch = Batch(env.model, num_envs, num_threads, persistent=self.has_contact_forces)
        self.qpos = self.batch.qpos
        self.qvel = self.batch.qvel
        self.ctrl = self.batch.ctrl
        self._warnings = self.batch.warning[:, DIVERGED]
        self._dt = env.dt
        # Before the first reset: a field is only filled after it is bound.
        for field in self.derived_fields:
            self.batch.bind(field)
        self.cfrc_ext = np.zeros((num_envs, env.model.nbody, 6))
        self._data = mujoco.MjData(env.model)
        self._rngs: list[np.random.Generator] = []
        self._elapsed_steps = np.zeros(num_envs, dtype=np.int64)
        # `_position` before the next step, for the speed; the first reset makes it.
        self._last_position: np.ndarray | None = None
        self.num_diverged = 0
        self.render_mode = None
        self.spec = env.spec
        self.single_observation_space = Box(-np.inf, np.inf, (len(self.obs_entries),), np.float64)
        self.single_action_space = env.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    # What a task defines

    def _obs_entries(self) -> list[ObsEntry]:
        return observation_entries(self.env)

    def _observation(self) -> np.ndarray:
        """The observations of all the simulations, float64 [num_envs, obs_dim]."""
        skipped = self.env.observation_structure["skipped_qpos"]
        return np.concatenate([self.qpos[:, skipped:], self.qvel], axis=1)

    def _position(self) -> np.ndarray:
        """The coordinate whose speed the reward counts, in metres, [num_envs]."""
        return self.qpos[:, 0].copy()

    def _healthy(self) -> np.ndarray:
        """Whether the robot is healthy in Gymnasium's sense, bool [num_envs]: most tasks terminate when it is not."""
        return np.ones(self.num_envs, dtype=bool)

    def _reward(
        self, actions: np.ndarray, x_velocity: np.ndarray, healthy: np.ndarray
    ) -> np.ndarray:
        """The rewards of one step, [num_envs]; `x_velocity` is the speed of `_position`, in m/s."""
        raise NotImplementedError

    # The vector environment

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start all episodes. An int seeds environment i with `seed + i`, as Gymnasium's vector environments do.

        Raises:
            ValueError: when there are options; a mask of environments to reset is not supported.
        """
        if options:
            raise ValueError(f"reset takes no options, not {options}")
        if seed is not None or not self._rngs:
            if seed is None:
                seeds = [None] * self.num_envs
            elif np.ndim(seed) == 0:
                seeds = [seed + i for i in range(self.num_envs)]
            else:
                seeds = seed
            self._rngs = [np_random(s)[0] for s in seeds]
        self._reset_simulations(np.arange(self.num_envs))
        return self._observation(), {}

    def _reset_simulations(self, ids: np.ndarray) -> None:
        """Put simulations into new initial states, drawn by Gymnasium's own `reset_model`."""
        self.batch.reset(ids, stage=mujoco.mjtStage.mjSTAGE_NONE)
        for i in ids:
            self.env.np_random = self._rngs[i]
            # Gymnasium's own set_state would write into, and run forward, the MjData of `env`.
            self.env.set_state = partial(self._put_state, i)
            self.env.reset_model()
        self.batch.forward(ids)
        self.cfrc_ext[ids] = 0
        self._elapsed_steps[ids] = 0
        position = self._position()
        if self._last_position is None:
            self._last_position = position
        self._last_position[ids] = position[ids]

    def _put_state(self, i: int, qpos: np.ndarray, qvel: np.ndarray) -> None:
        self.qpos[i] = qpos
        self.qvel[i] = qvel

    def get_state(self) -> dict[str, Any]:
        """Everything the simulations remember between two steps, as plain Python data."""
        return {
            "simulations": self.batch.state.tolist(),
            "last_position": self._last_position.tolist(),
            "elapsed_steps": self._elapsed_steps.tolist(),
            "rngs": [rng.bit_generator.state for rng in self._rngs],
            "num_diverged": int(self.num_diverged),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore, after `reset`, what `get_state` returned. Raises ValueError for a state of other environments."""
        if np.shape(state["simulations"]) != self.batch.state.shape:
            raise ValueError(f"the state is not one of {self.num_envs} simulations of this robot")
        self.batch.state[:] = state["simulations"]
        self._last_position[:] = state["last_position"]
        self._elapsed_steps[:] = state["elapsed_steps"]
        self._rngs = [np_random(0)[0] for _ in state["rngs"]]
        for rng, rng_state in zip(self._rngs, state["rngs"], strict=True):
            rng.bit_generator.state = rng_state
        self.num_diverged = state["num_diverged"]

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Apply actions [num_envs, act_dim] for one environment step; the class describes the autoreset.

        Raises:
            ValueError: when the actions have another shape.
        """
        actions = np.asarray(actions)
        if actions.shape != self.ctrl.shape:
            raise ValueError(f"actions must have shape {self.ctrl.shape}, not {actions.shape}")
        self.ctrl[:] = actions
        with quiet_mujoco():  # a simulation that diverges is counted below
            self.batch.step(nstep=self.env.frame_skip)
        if self.has_contact_forces:
            for i in range(self.num_envs):
                self.batch.get_data(i, self._data)
                mujoco.mj_rnePostConstraint(self.env.model, self._data)
                self.cfrc_ext[i] = self._data.cfrc_ext
        self._elapsed_steps += 1

        healthy = self._healthy()
        observations = self._observation()
        position = self._position()
        rewards = self._reward(actions, (position - self._last_position) / self._dt, healthy)
        self._last_position = position
        terminations = ~healthy & getattr(self.env, "_terminate_when_unhealthy", False)
        truncations = self._elapsed_steps >= self.max_episode_steps
        infos: dict[str, Any] = {}

        # MuJoCo has put a simulation that diverged back into its default pose, so its reward means nothing. The reset
        # below clears the warnings.
        if self._warnings.any():
            diverged = self._warnings.any(axis=(1, 2))
            self.num_diverged += diverged.sum()
            terminations |= diverged
            rewards[diverged] = 0
            observations[diverged] = np.nan_to_num(observations[diverged])

        done = terminations | truncations
        if done.any():
            infos["final_obs"] = np.full(self.num_envs, None, dtype=object)
            infos["_final_obs"] = done
            for i in np.flatnonzero(done):
                infos["final_obs"][i] = observations[i].copy()
            self._reset_simulations(np.flatnonzero(done))
            observations[done] = self._observation()[done]
        return observations, rewards, terminations, truncations, infos

    def _control_cost(self, actions: np.ndarray) -> np.ndarray:
        return self.env._ctrl_cost_weight * np.square(actions).sum(axis=1)


class HalfCheetah(MujocoVectorEnv):
    """HalfCheetah-v5 (half_cheetah_v5.py) and Swimmer-v5 (swimmer_v5.py): speed minus control cost."""

    def _reward(
        self, actions: np.ndarray, x_velocity: np.ndarray, healthy: np.ndarray
    ) -> np.ndarray:
        return self.env._forward_reward_weight * x_velocity - self._control_cost(actions)


class Walker2d(MujocoVectorEnv):
    """Walker2d-v5 (walker2d_v5.py): terminates when it falls."""

    def _observation(self) -> np.ndarray:
        skipped = self.env.observation_structure["skipped_qpos"]
        return np.concatenate([self.qpos[:, skipped:], np.clip(self.qvel, -10, 10)], axis=1)

    def _healthy(self) -> np.ndarray:
        z_low, z_high = self.env._healthy_z_range
        angle_low, angle_high = self.env._healthy_angle_range
        z = self.qpos[:, 1]
        angle = self.qpos[:, 2]
        return (z_low < z) & (z < z_high) & (angle_low < angle) & (angle < angle_high)

    def _reward(
        self, actions: np.ndarray, x_velocity: np.ndarray, healthy: np.ndarray
    ) -> np.ndarray:
        rewards = self.env._forward_reward_weight * x_velocity + healthy * self.env._healthy_reward
        return rewards - self._control_cost(actions)


class Hopper(Walker2d):
    """Hopper-v5 (hopper_v5.py): Walker2d's reward; the rest of the state, without x and z, has a healthy range too."""

    def _healthy(self) -> np.ndarray:
        low, high = self.env._healthy_state_range
        state = np.concatenate([self.qpos, self.qvel], axis=1)[:, 2:]
        return super()._healthy() & ((low < state) & (state < high)).all(axis=1)


class Ant(MujocoVectorEnv):
    """Ant-v5 (ant_v5.py): speed of the torso, alive bonus, control and contact costs."""

    derived_fields = ("xpos",)

    def _contact_forces(self) -> np.ndarray:
        return np.clip(self.cfrc_ext, *self.env._contact_force_range)

    def _observation(self) -> np.ndarray:
        forces = self._contact_forces()[:, 1:].reshape(self.num_envs, -1)
        return np.concatenate([super()._observation(), forces], axis=1)

    def _position(self) -> np.ndarray:
        return self.batch.xpos[:, self.env._main_body, 0].copy()

    def _healthy(self) -> np.ndarray:
        low, high = self.env._healthy_z_range
        finite = np.isfinite(self.qpos).all(axis=1) & np.isfinite(self.qvel).all(axis=1)
        return finite & (low <= self.qpos[:, 2]) & (self.qpos[:, 2] <= high)

    def _reward(
        self, actions: np.ndarray, x_velocity: np.ndarray, healthy: np.ndarray
    ) -> np.ndarray:
        rewards = x_velocity * self.env._forward_reward_weight + healthy * self.env._healthy_reward
        forces = np.square(self._contact_forces()).reshape(self.num_envs, -1)
        contact_cost = self.env._contact_cost_weight * forces.sum(axis=1)
        return rewards - (self._control_cost(actions) + contact_cost)


class HumanoidStandup(MujocoVectorEnv):
    """HumanoidStandup-v5 (humanoidstandup_v5.py): height, control and impact costs; never terminates."""

    derived_fields = ("cinert", "cvel", "qfrc_actuator")

    def _observation(self) -> np.ndarray:
        rows = (self.num_envs, -1)
        terms = [
            super()._observation(),
            self.batch.cinert[:, 1:].reshape(rows),
            self.batch.cvel[:, 1:].reshape(rows),
            self.batch.qfrc_actuator[:, 6:],
            self.cfrc_ext[:, 1:].reshape(rows),
        ]
        return np.concatenate(terms, axis=1)

    def _contact_cost(self, weight: float, cost_range: tuple[float, float]) -> np.ndarray:
        forces = np.square(self.cfrc_ext).reshape(self.num_envs, -1)
        return np.clip(weight * forces.sum(axis=1), *cost_range)

    def _reward(
        self, actions: np.ndarray, x_velocity: np.ndarray, healthy: np.ndarray
    ) -> np.ndarray:
        up = self.qpos[:, 2] / self.env.model.opt.timestep
        impact_cost = self._contact_cost(self.env._impact_cost_weight, self.env._impact_cost_range)
        return up - self._control_cost(self.ctrl) - impact_cost + 1


class Humanoid(HumanoidStandup):
    """Humanoid-v5 (humanoid_v5.py): HumanoidStandup's observation; the speed is that of the centre of mass."""

    derived_fields = (*HumanoidStandup.derived_fields, "xipos")

    def _position(self) -> np.ndarray:
        mass = self.env.model.body_mass
        return np.einsum("b,nb->n", mass, self.batch.xipos[:, :, 0]) / mass.sum()

    def _healthy(self) -> np.ndarray:
        low, high = self.env._healthy_z_range
        return (low < self.qpos[:, 2]) & (self.qpos[:, 2] < high)

    def _reward(
        self, actions: np.ndarray, x_velocity: np.ndarray, healthy: np.ndarray
    ) -> np.ndarray:
        rewards = self.env._forward_reward_weight * x_velocity + healthy * self.env._healthy_reward
        contact_cost = self._contact_cost(
            self.env._contact_cost_weight, self.env._contact_cost_range
        )
        return rewards - (self._control_cost(self.ctrl) + contact_cost)


class Reacher(MujocoVectorEnv):
    """Reacher-v5 (reacher_v5.py): distance of the fingertip to a random target."""

    derived_fields = ("xpos",)

    def _obs_entries(self) -> list[ObsEntry]:
        fingertip = ("xpos", self.env.model.body("fingertip").id)
        angles = [("qpos", 0), ("qpos", 1)]
        target = [("qpos", 2), ("qpos", 3)]
        velocities = [("qvel", 0), ("qvel", 1)]
        return [*angles, *angles, *target, *velocities, fingertip, fingertip]

    def _to_target(self) -> np.ndarray:
        return self.batch.body("fingertip").xpos - self.batch.body("target").xpos

    def _observation(self) -> np.ndarray:
        theta = self.qpos[:, :2]
        terms = [
            np.cos(theta),
            np.sin(theta),
            self.qpos[:, 2:],
            self.qvel[:, :2],
            self._to_target()[:, :2],
        ]
        return np.concatenate(terms, axis=1)

    def _reward(
        self, actions: np.ndarray, x_velocity: np.ndarray, healthy: np.ndarray
    ) -> np.ndarray:
        reward_dist = -np.linalg.norm(self._to_target(), axis=1) * self.env._reward_dist_weight
        return reward_dist - np.square(actions).sum(axis=1) * self.env._reward_control_weight


class Pusher(MujocoVectorEnv):
    """Pusher-v5 (pusher_v5.py): push an object to a goal; the hand should stay near the object."""

    derived_fields = ("xpos",)

    def _obs_entries(self) -> list[ObsEntry]:
        hand = ("xpos", self.env.model.body("tips_arm").id)
        positions = [("qpos", i) for i in range(7)]
        velocities = [("qvel", i) for i in range(7)]
        object_and_goal = 6 * [("global", 0)]
        return positions + velocities + 3 * [hand] + object_and_goal

    def _observation(self) -> np.ndarray:
        coms = [self.batch.body(name).xpos for name in ("tips_arm", "object", "goal")]
        return np.concatenate([self.qpos[:, :7], self.qvel[:, :7], *coms], axis=1)

    def _reward(
        self, actions: np.ndarray, x_velocity: np.ndarray, healthy: np.ndarray
    ) -> np.ndarray:
        hand, thing, goal = (self.batch.body(name).xpos for name in ("tips_arm", "object", "goal"))
        reward_near = -np.linalg.norm(thing - hand, axis=1) * self.env._reward_near_weight
        reward_dist = -np.linalg.norm(thing - goal, axis=1) * self.env._reward_dist_weight
        reward_ctrl = -np.square(actions).sum(axis=1) * self.env._reward_control_weight
        return reward_dist + reward_ctrl + reward_near


class CoupledHalfCheetah(MujocoVectorEnv):
    """MaMuJoCo's CoupledHalfCheetah (coupled_half_cheetah.py): the mean of two HalfCheetahs' rewards."""

    derived_fields = ("ten_J", "ten_length", "ten_velocity")

    def _obs_entries(self) -> list[ObsEntry]:
        positions = [("qpos", i) for i in (*range(1, 9), *range(10, 18))]
        velocities = [("qvel", i) for i in range(18)]
        tendon = 6 * [("global", 0)]
        return positions + velocities + tendon

    def _observation(self) -> np.ndarray:
        # MuJoCo 4 stores the tendon's Jacobian sparsely, as six columns: x, z and angle of the first root, then of the
        # second. MaMuJoCo shows x and z.
        tendon = [self.batch.ten_J[:, [0, 1, 3, 4]], self.batch.ten_length, self.batch.ten_velocity]
        return np.concatenate([self.qpos[:, 1:9], self.qpos[:, 10:18], self.qvel, *tendon], axis=1)

    def _position(self) -> np.ndarray:
        """x of both torsos, in metres, [num_envs, 2]."""
        return self.qpos[:, [0, 9]]

    def _reward(
        self, actions: np.ndarray, x_velocity: np.ndarray, healthy: np.ndarray
    ) -> np.ndarray:
        forward_reward = (
            self.env._forward_reward_weight * (x_velocity[:, 0] + x_velocity[:, 1]) / 2.0
        )
        costs = self._control_cost(actions[:, :6]) + self._control_cost(actions[:, 6:])
        return forward_reward - costs / 2.0
