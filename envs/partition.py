"""Which actuators each agent drives, and which entries of the flat observation it sees.

A partition is index arrays and nothing else: agent i sees `obs[:, partition.obs_ids[i]]` and writes
`actions[:, partition.act_ids[i]]`. Both are derived from the compiled `mjModel`.
"""

import copy
import json
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

# What one entry of a flat observation is: the mjData field that it is read from and the row there (a coordinate, a
# degree of freedom or a body), e.g. ("qvel", 3). ("global", 0) belongs to no joint: every agent sees it.
ObsEntry = tuple[str, int]
# How many entries of qpos and of qvel a free, ball, slide and hinge joint has (the order of mjtJoint).
COORDINATES = (7, 4, 1, 1)
DOFS = (6, 3, 1, 1)
BODY_FIELDS = ("cinert", "cvel", "cfrc_ext", "xpos")  # the fields whose rows are bodies

# Partitions that are not "N agents, each with M consecutive actuators". Those of Ant, Humanoid and Pusher follow
# MaMuJoCo (Gymnasium-Robotics 1.4.2, envs/multiagent_mujoco/obsk.py, get_parts_and_edges). Ant's actuators are, in
# order, the hip and the ankle of the back right, front left, front right and back left leg.
NAMED_PARTITIONS: dict[str, dict[str, list[list[int]]]] = {
    "Ant": {
        "2x4": [[2, 3, 4, 5], [6, 7, 0, 1]],  # front legs, back legs
        "2x4d": [[2, 3, 0, 1], [4, 5, 6, 7]],  # the two diagonals
    },
    "Humanoid": {
        "9|8": [[0, 1, 2, 11, 12, 13, 14, 15, 16], [3, 4, 5, 6, 7, 8, 9, 10]],  # upper, lower body
    },
    "Pusher": {"3p": [[0, 1, 2], [3], [4, 5, 6]]},  # shoulder, elbow, wrist
    "CoupledHalfCheetah": {"1p1": [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]},  # one cheetah each
}
# The same under a name that needs no quotes in a shell.
NAMED_PARTITIONS["Humanoid"]["9p8"] = NAMED_PARTITIONS["Humanoid"]["9|8"]
NAMED_PARTITIONS["HumanoidStandup"] = NAMED_PARTITIONS["Humanoid"]

# In NxM, M counts actuators, except for these robots, where it counts segments of this many actuators.
ACTUATORS_PER_SEGMENT = {"ManySegmentAnt": 4}


@dataclass(frozen=True)
class Partition:
    """The split of one robot among agents, as index arrays.

    Attributes:
        obs_ids: for each agent, the entries of the flat observation that it sees, ascending, int64 [obs_dim_i].
        act_ids: for each agent, the actuators that it drives, in the order of its own action vector, int64 [act_dim_i].
    """

    obs_ids: tuple[np.ndarray, ...]
    act_ids: tuple[np.ndarray, ...]

    @property
    def num_agents(self) -> int:
        """Number of agents."""
        return len(self.act_ids)


def parse_partition(
    robot: str, partition: str | Sequence[Sequence[int]], num_actuators: int
) -> list[list[int]]:
    """Turn a partition, written as text or as lists, into one list of actuator indices per agent.

    Args:
        robot: the robot's name, also with a Gymnasium version (Ant-v5), for the named partitions.
        partition: "NxM", a name in `NAMED_PARTITIONS`, or lists such as [[0, 3], [1, 2]] (also as JSON text).
        num_actuators: number of actuators of the compiled model.

    Raises:
        ValueError: when the partition is unknown, or does not use every actuator exactly once.
    """
    named = NAMED_PARTITIONS.get(re.sub(r"-v\d+$", "", robot), {})  # Ant-v4 and Ant-v5 are Ant
    if not isinstance(partition, str) or partition.startswith("["):
        act_ids = parse_actuator_lists(partition)
        used = sorted(a for agent in act_ids for a in agent)
        if not all(act_ids) or used != list(range(num_actuators)):
            raise ValueError(
                f"partition {partition} must use each actuator of {robot}, 0 to {num_actuators - 1}, once"
            )
        return act_ids
    if partition in named:
        return copy.deepcopy(named[partition])  # the table stays as it is
    size = ACTUATORS_PER_SEGMENT.get(robot, 1)
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", partition)
    if match is None or int(match[1]) * int(match[2]) * size != num_actuators:
        count = num_actuators // size
        fitting = [f"{n}x{count // n}" for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"{robot} has no partition {partition!r}: its {num_actuators} actuators split as "
            f"{', '.join(dict.fromkeys([*fitting, *named]))} or as a list of actuator lists"
        )
    agents, per_agent = int(match[1]), int(match[2]) * size
    return np.arange(num_actuators).reshape(agents, per_agent).tolist()


def parse_actuator_lists(partition: str | Sequence[Sequence[int]]) -> list[list[int]]:
    """Turn [[0, 3], [1, 2]], or the same as JSON text, into lists of ints. Raises ValueError for anything else."""
    try:
        lists = json.loads(partition) if isinstance(partition, str) else partition
        return [[operator.index(a) for a in agent] for agent in lists]
    except (json.JSONDecodeError, TypeError, RecursionError) as e:
        shown = str(partition)[:80]
        raise ValueError(
            f"partition {shown!r} is neither NxM nor actuator lists such as [[0,1],[2]]"
        ) from e


def actuated_joints(model: mujoco.MjModel) -> np.ndarray:
    """Return the joint that each actuator drives, int [num_actuators] (`actuator_trnid`).

    Raises:
        ValueError: when an actuator drives something else than a joint, or two drive the same one.
    """
    is_joint = np.isin(
        model.actuator_trntype, (mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_JOINTINPARENT)
    )
    joints = model.actuator_trnid[:, 0]
    if not is_joint.all() or len(set(joints)) < len(joints):
        raise ValueError(
            "a partition needs a model in which every actuator drives a joint of its own"
        )
    return joints


def joint_graph(model: mujoco.MjModel) -> np.ndarray:
    """Return whether the joints of two actuators are neighbours, bool [num_actuators, num_actuators], symmetric.

    They are when no other actuated joint lies between them on the kinematic tree. Two robots in one world, with nothing
    but the world body in common, are not connected.
    """
    joints = actuated_joints(model)
    actuator_of = {j: a for a, j in enumerate(joints)}

    def joint_above(joint: int) -> tuple[str, int]:
        """The nearest actuated joint between `joint` and the root, or the root body if there is none."""
        body = model.jnt_bodyid[joint]
        above = range(model.body_jntadr[body], joint)  # those of one body are chained in order
        while body != 0:
            for j in reversed(above):
                if j in actuator_of:
                    return "joint", actuator_of[j]
            body = model.body_parentid[body]
            above = range(
                model.body_jntadr[body], model.body_jntadr[body] + model.body_jntnum[body]
            )
        return "root", model.body_rootid[model.jnt_bodyid[joint]]

    above = [joint_above(j) for j in joints]
    n = len(joints)
    graph = np.array(
        [[above[a] == above[b] or above[a] == ("joint", b) for b in range(n)] for a in range(n)]
    )
    return (graph | graph.T) & ~np.eye(n, dtype=bool)


def joint_bodies(model: mujoco.MjModel, joint: int) -> set[int]:
    """Return the bodies that a joint connects: who drives it sees their inertias, velocities and contact forces.

    These are the rigid link that the joint moves (its body and what is welded to it), and the bodies above it, up to
    and including the first that has a joint of its own or more than one child.
    """
    body = model.jnt_bodyid[joint]
    bodies = set(np.flatnonzero(model.body_weldid == model.body_weldid[body]))
    while True:
        body = model.body_parentid[body]
        if body == 0:
            return bodies
        bodies.add(body)
        if model.body_jntnum[body] > 0 or np.sum(model.body_parentid == body) > 1:
            return bodies


def make_partition(
    model: mujoco.MjModel,
    act_ids: Sequence[Sequence[int]],
    obs_entries: Sequence[ObsEntry],
    agent_obsk: int | None = None,
) -> Partition:
    """Build the index arrays of a partition from the compiled model.

    Args:
        model: the compiled robot.
        act_ids: the actuators of each agent (see `parse_partition`).
        obs_entries: what each entry of the flat observation is; its length is the observation's.
        agent_obsk: None: every agent sees everything. k >= 0: an agent sees every term of its own joints, the
            positions of joints up to k edges away on the joint graph, and all that belongs to no actuated joint
            (the root, objects, targets), as in MaMuJoCo.

    Raises:
        ValueError: when `agent_obsk` is negative.
    """
    act_ids = tuple(np.asarray(a, dtype=np.int64) for a in act_ids)
    if agent_obsk is None:
        return Partition(tuple(np.arange(len(obs_entries)) for _ in act_ids), act_ids)
    if agent_obsk < 0:
        raise ValueError(
            f"agent_obsk is {agent_obsk}: it must be 0 or more edges, or None for the whole state"
        )
    joints = actuated_joints(model)
    # Boolean: integers would count the paths between two joints, and overflow.
    graph = joint_graph(model) | np.eye(len(joints), dtype=bool)
    reach = np.linalg.matrix_power(graph, agent_obsk)  # [a, b]: at most agent_obsk edges apart

    def positions(joint: int) -> set[ObsEntry]:
        """The coordinates of a joint."""
        qpos = model.jnt_qposadr[joint]
        return {("qpos", i) for i in range(qpos, qpos + COORDINATES[model.jnt_type[joint]])}

    def joint_terms(joint: int) -> set[ObsEntry]:
        """The coordinates, velocities and actuator forces of a joint."""
        dof = model.jnt_dofadr[joint]
        dofs = range(dof, dof + DOFS[model.jnt_type[joint]])
        return positions(joint) | {(field, i) for i in dofs for field in ("qvel", "qfrc_actuator")}

    jointed = set().union(*map(joint_terms, joints))
    for_all = {
        entry for entry in obs_entries if entry not in jointed and entry[0] not in BODY_FIELDS
    }
    obs_ids = []
    for actuators in act_ids:
        own = joints[actuators]
        seen = for_all.union(*map(joint_terms, own))
        for joint in own:
            for body in joint_bodies(model, joint):
                seen |= {(field, body) for field in BODY_FIELDS}
        near = joints[reach[actuators].any(axis=0)]
        seen = seen.union(*map(positions, near))
        ids = [i for i, entry in enumerate(obs_entries) if entry in seen]
        obs_ids.append(np.array(ids, dtype=np.int64))
    return Partition(tuple(obs_ids), act_ids)
