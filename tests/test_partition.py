"""Partitions: the graph and the observed entries against MaMuJoCo's, parsing, and what every partition keeps."""

import functools
import itertools
import json
import re
from collections.abc import Iterable
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium_robotics import mamujoco_v1
from gymnasium_robotics.envs.multiagent_mujoco import mujoco_multi
from gymnasium_robotics.envs.multiagent_mujoco.coupled_half_cheetah import CoupledHalfCheetahEnv
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from envs.partition import joint_bodies, joint_graph, make_partition

ALL_K = (0, 1, 2)

# Everything in which an agent's observation differs from MaMuJoCo's: (robot, partition, agents, agent_obsk, entries
# that only ours has, entries that only MaMuJoCo's has). Rows of the same agent add up; what is in no row is equal.
# Entries are written "field,field: joint or body, ...; ...". "body" is the fields cinert, cvel and cfrc_ext; legs_3 is
# the four joints of segment 3, hips_3 and ankles_3 two of them. docs/partitions.md has the reasons.
DEVIATIONS = [
    ("Pusher", "3p", (0, 1), ALL_K, "", "xpos: tips_arm"),
    # MaMuJoCo gives the speed of the front tip along x to the first joint's agent, along y to the second's.
    ("Swimmer", "2x1", [0], ALL_K, "qvel: slider2", ""),
    ("Swimmer", "2x1", [1], ALL_K, "qvel: slider1", ""),
    # MaMuJoCo shows the front segment, which is no joint's, to nobody.
    *(
        (
            "ManySegmentSwimmer",
            f"{n}x2",
            range(n),
            ALL_K,
            "qpos,qvel: free_body_rot; qvel: slider1 slider2",
            "",
        )
        for n in (10, 5)
    ),
    # MaMuJoCo's Humanoid: abdomen_x owns the thighs instead of the abdomen's own bodies, hips do not own the pelvis;
    # the joints of the abdomen are tied with each other, and all of them with all of the hips and shoulders.
    *(
        (robot, "9|8", *row)
        for robot in ("Humanoid", "HumanoidStandup")
        for row in (
            ([0], ALL_K, "", "body: right_thigh left_thigh"),
            ([0], [1], "", "qpos: right_hip_z right_hip_y left_hip_z left_hip_y"),
            ([0], [2], "", "qpos: right_hip_y right_knee left_hip_y left_knee"),
            ([1], ALL_K, "body: pelvis", ""),
            ([1], [1], "", "qpos: abdomen_z abdomen_y"),
            (
                [1],
                [2],
                "",
                "qpos: abdomen_z right_shoulder1 right_shoulder2 left_shoulder1 left_shoulder2",
            ),
        )
    ),
    # The same with one agent per joint, where MaMuJoCo also has the rows of abdomen_y and abdomen_z exchanged.
    *(
        (robot, "17x1", *row)
        for robot in ("Humanoid", "HumanoidStandup")
        for row in (
            (
                [0],
                [0],
                "qpos,qvel,qfrc_actuator: abdomen_y",
                "qpos,qvel,qfrc_actuator: abdomen_z; body: pelvis",
            ),
            (
                [1],
                [0],
                "qpos,qvel,qfrc_actuator: abdomen_z",
                "qpos,qvel,qfrc_actuator: abdomen_y; body: pelvis",
            ),
            ([2], [0], "body: lwaist", "body: right_thigh left_thigh"),
            ([3, 4, 5], [0], "body: pelvis", "body: right_shin"),
            ([6], [0], "body: right_thigh", ""),
            ([7, 8, 9], [0], "body: pelvis", "body: left_shin"),
            ([10], [0], "body: left_thigh", ""),
            ([11, 12], [0], "", "body: right_lower_arm"),
            ([13], [0], "body: right_upper_arm", ""),
            ([14, 15], [0], "", "body: left_lower_arm"),
            ([16], [0], "body: left_upper_arm", ""),
        )
    ),
    # A leg is a stub fixed to the torso, the hip, an upper leg (aux), the ankle, a lower leg. MaMuJoCo's hip owns the
    # torso and the stub but not the upper leg, its ankle owns all three of the leg.
    *(
        ("Ant", "8x1", *row)
        for i, (n, stub) in enumerate(
            [(4, "right_back"), (1, "front_left"), (2, "front_right"), (3, "back")]
        )
        for row in (
            ([2 * i], ALL_K, f"cfrc_ext: aux_{n}", ""),
            ([2 * i + 1], ALL_K, "", f"cfrc_ext: {stub}_leg"),
        )
    ),
    # The distance along z is not in the v5 observation; MaMuJoCo still shows it.
    ("Reacher", "2x1", [1], ALL_K, "", "outside: fingertip_z"),
    # Both of MaMuJoCo's cheetahs read the joints of the second.
    *(
        (
            "CoupledHalfCheetah",
            "1p1",
            [0],
            ALL_K,
            f"qpos,qvel: {cheetah.format(0)}",
            f"qpos,qvel: {cheetah.format(1)}",
        )
        for cheetah in ("bthigh{0} bshin{0} bfoot{0} fthigh{0} fshin{0} ffoot{0}",)
    ),
    # MaMuJoCo reads segment s of n, except the last, in the rows 4 (n - 2 - s) to 4 (n - 2 - s) + 3 of qpos and of
    # qvel: the segments in reverse order, beginning in the root. And its edges to the next segment tie copies of the
    # nodes, so that a segment has the one before it as a neighbour, but not the one after it, nor any further one.
    *(
        ("ManySegmentAnt", "2x3", *row)
        for row in (
            ([0], ALL_K, "qpos,qvel: hip1_0; qvel: ankle1_0", "qvel: hip1_3 ankle1_3"),
            ([0], [0], "", "qpos: hip1_3"),
            ([0], [1], "qpos: hip2_3 hips_4 hips_5", ""),
            ([0], [2], "qpos: ankle1_3 hip2_3 ankle2_3 legs_4 legs_5", ""),
            ([1], ALL_K, "qpos,qvel: legs_3 legs_4", "qvel: hip1_0 ankle1_0"),
            ([1], [0], "", "qpos: hip1_0"),
            ([1], [1], "qpos: hip2_0 hips_1 hips_2", "qpos: ankles_0"),
            ([1], [2], "qpos: hip2_0 legs_1 legs_2", ""),
        )
    ),
    *(
        ("ManySegmentAnt", "3x2", *row)
        for row in (
            (
                [0],
                ALL_K,
                "qpos,qvel: legs_0 hip1_1; qvel: ankle1_1",
                "qvel: legs_2 hip1_3 ankle1_3",
            ),
            ([0], [0], "", "qpos: legs_2 hip1_3"),
            ([0], [1], "qpos: hip2_3 hips_4 hips_5", "qpos: ankles_2"),
            ([0], [2], "qpos: ankle1_3 hip2_3 ankle2_3 legs_4 legs_5", ""),
            ([1], ALL_K, "qpos,qvel: legs_2 legs_3", "qvel: legs_0 hip1_1 ankle1_1"),
            ([1], [0], "", "qpos: legs_0 hip1_1"),
            ([1], [1], "qpos: hip2_1 hips_4 hips_5", "qpos: ankles_0 ankles_1"),
            ([1], [2], "qpos: hip2_1 legs_4 legs_5", ""),
            ([2], ALL_K, "qpos,qvel: legs_4", ""),
            ([2], [1], "qpos: hips_0 hips_1 hips_2 hips_3", ""),
            ([2], [2], "qpos: legs_0 legs_1 legs_2 legs_3", ""),
        )
    ),
]

# The partitions of MaMuJoCo (get_parts_and_edges), and some that its documentation says how to make from its nodes.
OFFERED = [
    *(
        ("HalfCheetah", "2x3"),
        ("HalfCheetah", "6x1"),
        ("Ant", "2x4"),
        ("Ant", "2x4d"),
        ("Ant", "4x2"),
    ),
    *(
        ("Hopper", "3x1"),
        ("Humanoid", "9|8"),
        ("HumanoidStandup", "9|8"),
        ("Walker2d", "2x3"),
        ("Reacher", "2x1"),
    ),
    *(
        ("Pusher", "3p"),
        ("Swimmer", "2x1"),
        ("ManySegmentSwimmer", "10x2"),
        ("ManySegmentSwimmer", "5x2"),
    ),
    *(("ManySegmentAnt", "2x3"), ("ManySegmentAnt", "3x2"), ("CoupledHalfCheetah", "1p1")),
]
CUSTOM = [
    *(("HalfCheetah", "3x2", k) for k in ALL_K),
    *(("Walker2d", "3x2", k) for k in ALL_K),
    *(("Walker2d", "6x1", k) for k in ALL_K),
    *(("Ant", "8x1", k) for k in ALL_K),
    ("Humanoid", "17x1", 0),  # with k > 0, the graphs differ at every joint: see EDGES for ours
    ("HumanoidStandup", "17x1", 0),
]
# The number of actuators of the robots that MaMuJoCo also offers as a single agent.
NUM_ACTUATORS = {
    **{
        "HalfCheetah": 6,
        "Ant": 8,
        "Hopper": 3,
        "Walker2d": 6,
        "Humanoid": 17,
        "HumanoidStandup": 17,
        "Swimmer": 2,
    },
    **{"Reacher": 2, "Pusher": 7, "CoupledHalfCheetah": 12},
}

# Who is the neighbour of whom, written by hand: chains of joints, "a-b-c", and sets that are all tied, "(a b c)".
EDGES = {
    "HalfCheetah": "bfoot-bshin-bthigh-fthigh-fshin-ffoot",
    "Hopper": "thigh_joint-leg_joint-foot_joint",
    "Walker2d": "foot_joint-leg_joint-thigh_joint-thigh_left_joint-leg_left_joint-foot_left_joint",
    "Ant": "(hip_1 hip_2 hip_3 hip_4) hip_1-ankle_1 hip_2-ankle_2 hip_3-ankle_3 hip_4-ankle_4",
    "Swimmer": "motor1_rot-motor2_rot",
    "Pusher": "r_shoulder_pan_joint-r_shoulder_lift_joint-r_upper_arm_roll_joint-r_elbow_flex_joint"
    "-r_forearm_roll_joint-r_wrist_flex_joint-r_wrist_roll_joint",
    "Reacher": "joint0-joint1",
    "ManySegmentSwimmer": "motor1_rot-motor2_rot-motor3_rot-motor4_rot",
    # From here on, ours differs from MaMuJoCo's by design or because of a mistake there.
    "Humanoid": "(abdomen_z right_shoulder1 left_shoulder1) abdomen_z-abdomen_y-abdomen_x "
    "(abdomen_x right_hip_x left_hip_x) right_hip_x-right_hip_z-right_hip_y-right_knee "
    "left_hip_x-left_hip_z-left_hip_y-left_knee right_shoulder1-right_shoulder2-right_elbow "
    "left_shoulder1-left_shoulder2-left_elbow",
    "ManySegmentAnt": "(hip1_0 hip2_0 hip1_1 hip2_1 hip1_2 hip2_2) hip1_0-ankle1_0 hip2_0-ankle2_0 hip1_1-ankle1_1 "
    "hip2_1-ankle2_1 hip1_2-ankle1_2 hip2_2-ankle2_2",
    "CoupledHalfCheetah": "bfoot0-bshin0-bthigh0-fthigh0-fshin0-ffoot0 bfoot1-bshin1-bthigh1-fthigh1-fshin1-ffoot1",
}
EDGES["HumanoidStandup"] = EDGES["Humanoid"]
SAME_EDGES = {
    **{
        "HalfCheetah": "6x1",
        "Hopper": "3x1",
        "Walker2d": "2x3",
        "Ant": "4x2",
        "Swimmer": "2x1",
        "Pusher": "3p",
    },
    **{"Reacher": "2x1", "ManySegmentSwimmer": "2x2", "CoupledHalfCheetah": "1p1"},
}
SMALL = {
    "ManySegmentSwimmer": "2x2",
    "ManySegmentAnt": "3x1",
}  # partitions of the two robots of any length


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


@pytest.fixture(autouse=True)
def _quiet_mujoco(monkeypatch, tmp_path):
    """Keep MuJoCo's warnings off the screen, and its log file out of the repository."""
    monkeypatch.chdir(tmp_path)
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    yield
    mujoco.set_mju_user_warning(handler)


@pytest.fixture
def dense_tendons(monkeypatch):
    """Let MaMuJoCo's CoupledHalfCheetah run on MuJoCo 4."""
    build_obs = mujoco_multi.build_obs

    def dense_build_obs(data: mujoco.MjData, *args):
        return build_obs(
            DenseTendons(data.model, data) if isinstance(data, mujoco.MjData) else data, *args
        )

    monkeypatch.setattr(mujoco_multi, "CoupledHalfCheetahEnv", DenseCoupledHalfCheetah)
    monkeypatch.setattr(mujoco_multi, "build_obs", dense_build_obs)


@functools.cache
def physics(robot: str) -> tuple[mujoco.MjModel, list[tuple[str, int]]]:
    """A robot's model and the entries of its observation."""
    task = envs.make_vec(
        robot, 1, num_threads=1, partition=SMALL.get(robot) or f"1x{NUM_ACTUATORS[robot]}"
    )
    return task.env.model, task.obs_entries


def joint_names(model: mujoco.MjModel) -> list[str]:
    """The joint of every actuator, by the actuator's own transmission."""
    return [model.joint(model.actuator(a).trnid[0]).name for a in range(model.nu)]


def label(model: mujoco.MjModel, entry: tuple[str, int], index: int) -> str:
    """Name an entry of the observation, "field joint" or "field body"; the root's rows by their number."""
    field, row = entry
    if field == "global":
        return f"global {index}"
    if field in ("qpos", "qvel", "qfrc_actuator"):
        addresses = model.jnt_qposadr if field == "qpos" else model.jnt_dofadr
        joint = np.flatnonzero(addresses <= row)[-1]
        return f"{field} {model.joint(joint).name}" + (
            f"[{row}]" if model.jnt_type[joint] == 0 else ""
        )
    return f"{field} {model.body(row).name or row}"


def parse_entries(text: str) -> set[str]:
    """The labels that a text of `DEVIATIONS` stands for."""
    labels = set()
    for group in filter(None, text.split("; ")):
        fields, names = group.split(": ")
        for name in names.split():
            kind, _, segment = name.partition("_")
            limbs = {"legs": ("hip1", "ankle1", "hip2", "ankle2"), "hips": ("hip1", "hip2")}
            limbs["ankles"] = ("ankle1", "ankle2")
            members = [f"{limb}_{segment}" for limb in limbs[kind]] if kind in limbs else [name]
            labels |= {
                f"{field} {member}"
                for field in fields.replace("body", "cinert,cvel,cfrc_ext").split(",")
                for member in members
            }
    return labels


def expected_deviation(robot: str, partition: str, agent: int, k: int) -> tuple[set[str], set[str]]:
    """The entries of `DEVIATIONS` for one agent: only ours, only theirs."""
    rows = [r for r in DEVIATIONS if r[:2] == (robot, partition) and agent in r[2] and k in r[3]]
    return tuple(set().union(*(parse_entries(row[i]) for row in rows)) for i in (4, 5))


def observed_by_mamujoco(multi: mamujoco_v1.parallel_env) -> list[tuple[set[int], set[str]]]:
    """What each of MaMuJoCo's agents observes: entries of the flat observation, and values that are not in it."""
    mapping = multi.create_observation_mapping()
    if mapping is not None:
        return [
            (set(mapping[agent].astype(int).tolist()), set()) for agent in multi.possible_agents
        ]
    # It does not say which entries it shows: look for their values, all different, at a random state.
    env, rng = multi.single_agent_env.unwrapped, np.random.default_rng(0)
    env.set_state(rng.uniform(-0.2, 0.2, env.model.nq), rng.uniform(-0.2, 0.2, env.model.nv))
    index = {value: i for i, value in enumerate(env._get_obs())}
    assert len(index) == env.observation_space.shape[0]
    outside = {}
    if "fingertip" in [env.model.body(b).name for b in range(env.model.nbody)]:
        outside[env.data.body("fingertip").xpos[2] - env.data.body("target").xpos[2]] = (
            "outside fingertip_z"
        )
    observed = [set(multi._get_obs_agent(i).tolist()) for i in range(multi.num_agents)]
    return [
        ({index[v] for v in values & set(index)}, {outside[v] for v in values - set(index)})
        for values in observed
    ]


def assert_differs_as_listed(
    multi: mamujoco_v1.parallel_env, robot: str, partition: str, k: int
) -> None:
    """The same actuators per agent, and observations that differ by exactly what `DEVIATIONS` lists."""
    vec = envs.make_vec(f"{robot}-{partition}", 1, agent_obsk=k, num_threads=1)
    labels = [label(vec.env.model, entry, i) for i, entry in enumerate(vec.obs_entries)]
    ours = {frozenset(ids.tolist()): i for i, ids in enumerate(vec.partition.act_ids)}
    theirs = [frozenset(node.act_ids for node in part) for part in multi.agent_action_partitions]
    assert set(ours) == set(theirs)
    # The first of four legs is the front left one in MaMuJoCo, and the back right one, the actuators' first, here.
    if (robot, partition) != ("Ant", "4x2"):
        assert [ours[part] for part in theirs] == list(range(len(theirs)))
    for part, (their_ids, outside) in zip(theirs, observed_by_mamujoco(multi), strict=True):
        agent = ours[part]
        only_ours, only_theirs = expected_deviation(robot, partition, agent, k)
        assert only_ours | only_theirs - outside <= set(labels), "a deviation that names no entry"
        our_ids = set(vec.partition.obs_ids[agent].tolist())
        assert our_ids - their_ids == {i for i, name in enumerate(labels) if name in only_ours}, (
            f"agent {agent}"
        )
        assert their_ids - our_ids == {i for i, name in enumerate(labels) if name in only_theirs}, (
            f"agent {agent}"
        )
        assert outside == only_theirs - set(labels)


@pytest.mark.parametrize("k", ALL_K)
@pytest.mark.parametrize(("robot", "partition"), OFFERED)
def test_observations_are_mamujocos(robot, partition, k, dense_tendons):
    """Every partition that MaMuJoCo has by name."""
    assert_differs_as_listed(
        mamujoco_v1.parallel_env(robot, partition, agent_obsk=k), robot, partition, k
    )


@pytest.mark.parametrize(("robot", "partition", "k"), CUSTOM)
def test_observations_are_mamujocos_with_its_nodes(robot, partition, k):
    """Partitions that the papers use and MaMuJoCo builds from its own nodes, as its documentation shows."""
    named = {"HalfCheetah": "6x1", "Walker2d": "2x3", "Ant": "4x2"}.get(robot, "9|8")
    parts, edges, globals_ = mamujoco_v1.get_parts_and_edges(robot, named)
    nodes = sorted(itertools.chain(*parts), key=lambda node: node.act_ids)
    size = len(nodes) // int(partition.split("x")[0])
    parts = [tuple(nodes[i : i + size]) for i in range(0, len(nodes), size)]
    factorization = {"partition": parts, "edges": edges, "globals": globals_}
    multi = mamujoco_v1.parallel_env(robot, named, agent_obsk=k, agent_factorization=factorization)
    assert_differs_as_listed(multi, robot, partition, k)


@pytest.mark.parametrize("k", ALL_K)
@pytest.mark.parametrize("robot", NUM_ACTUATORS)
def test_single_agent_sees_everything_as_in_mamujoco(robot, k, dense_tendons):
    """MaMuJoCo's `agent_conf=None`: with all the joints its own, an agent sees the whole state at any `agent_obsk`."""
    multi = mamujoco_v1.parallel_env(robot, None, agent_obsk=k)
    assert multi.action_space("agent_0").shape == (NUM_ACTUATORS[robot],)
    vec = envs.make_vec(f"{robot}-1x{NUM_ACTUATORS[robot]}", 1, agent_obsk=k, num_threads=1)
    size = multi.observation_space("agent_0").shape[0]
    assert [ids.tolist() for ids in vec.partition.obs_ids] == [list(range(size))]
    assert vec.partition.num_agents == multi.num_agents == 1


def test_every_deviation_belongs_to_a_compared_partition():
    """A row that no test looks at would not be checked."""
    compared = {(robot, partition, k) for robot, partition in OFFERED for k in ALL_K} | set(CUSTOM)
    assert {(row[0], row[1], k) for row in DEVIATIONS for k in row[3]} <= compared


def parse_edges(text: str) -> set[frozenset[str]]:
    """Pairs of joints from a text of `EDGES`."""
    pairs = set()
    for group in re.findall(r"\(.*?\)|\S+", text):
        names = re.split(r"[- ()]+", group.strip("()"))
        pairs |= {
            frozenset(p)
            for p in (
                itertools.combinations(names, 2) if "(" in group else itertools.pairwise(names)
            )
        }
    return pairs


@pytest.mark.parametrize("robot", EDGES)
def test_joint_graph_is_the_hand_written_one(robot):
    """The graph that is derived from the model, by joint names."""
    model, _ = physics(robot)
    names, graph = joint_names(model), joint_graph(model)
    np.testing.assert_array_equal(graph, graph.T)
    assert not graph.diagonal().any()
    assert {
        frozenset((names[a], names[b])) for a, b in zip(*np.nonzero(graph), strict=True)
    } == parse_edges(EDGES[robot])


@pytest.mark.parametrize("robot", SAME_EDGES)
def test_joint_graph_is_mamujocos(robot):
    """MaMuJoCo's sets of tied joints, by the actuators' numbers."""
    _, edges, _ = mamujoco_v1.get_parts_and_edges(robot, SAME_EDGES[robot])
    theirs = {
        frozenset(p)
        for e in edges
        for p in itertools.combinations([node.act_ids for node in e.nodes], 2)
    }
    graph = joint_graph(physics(robot)[0])
    assert {frozenset((int(a), int(b))) for a, b in zip(*np.nonzero(graph), strict=True)} == theirs


TREE = """
<mujoco>
  <worldbody>
    <body name="root"><freejoint/><geom size="0.1"/>
      <body name="arm"><joint name="pan"/><joint name="lift"/><geom size="0.1"/>
        <body name="plate"><geom size="0.1"/>
          <body name="passive"><joint name="passive"/><geom size="0.1"/>
            <body name="hand"><joint name="wrist"/><geom size="0.1"/><body name="nail"><geom size="0.1"/></body></body>
          </body>
        </body>
      </body>
      <body name="tail"><joint name="tail"/><geom size="0.1"/></body>
    </body>
    <body name="other"><joint name="other"/><geom size="0.1"/></body>
  </worldbody>
  <actuator>
    <motor joint="other"/><position joint="wrist"/><motor jointinparent="tail"/>
    <motor joint="pan"/><motor joint="lift"/>
  </actuator>
</mujoco>
"""


def test_a_tree_with_everything_in_it():
    """Joints of one body, a joint without a motor in between, a body without joints, a branch, a second robot."""
    model = mujoco.MjModel.from_xml_string(TREE)
    names, graph = joint_names(model), joint_graph(model)
    edges = {frozenset((names[a], names[b])) for a, b in zip(*np.nonzero(graph), strict=True)}
    assert edges == parse_edges("pan-lift-wrist pan-tail")
    bodies = {
        name: {model.body(b).name for b in joint_bodies(model, model.joint(name).id)}
        for name in names
    }
    assert bodies == {
        "other": {"other"},
        "wrist": {"hand", "nail", "passive"},
        "tail": {"tail", "root"},
        "pan": {"arm", "plate", "root"},
        "lift": {"arm", "plate", "root"},
    }
    # qpos of the root's 7 rows, then pan, lift, passive, wrist, tail, other.
    entries = [("qpos", i) for i in range(13)]
    parts = make_partition(model, [[0], [1], [2], [3, 4]], entries, 0).obs_ids
    everyones = [*range(7), 9]
    assert [sorted(set(ids) - set(everyones)) for ids in parts] == [[12], [10], [11], [7, 8]]
    assert all(set(everyones) <= set(ids) for ids in parts)


@pytest.mark.parametrize(
    "actuators",
    [
        '<motor joint="pan"/><motor joint="pan"/>',
        '<motor joint="pan"/><motor site="tip"/>',
    ],
)
def test_actuators_must_drive_joints_of_their_own(actuators):
    """Another model can only be split with the whole state for everyone."""
    joint = '<body><joint name="pan"/><geom size="0.1"/><site name="tip"/></body>'
    xml = f"<mujoco><worldbody>{joint}</worldbody><actuator>{actuators}</actuator></mujoco>"
    model = mujoco.MjModel.from_xml_string(xml)
    with pytest.raises(ValueError, match="every actuator drives a joint of its own"):
        make_partition(model, [[0], [1]], [("qpos", 0)], 0)
    assert [
        ids.tolist() for ids in make_partition(model, [[0], [1]], [("qpos", 0)], None).obs_ids
    ] == [[0], [0]]


# Parsing


@pytest.mark.parametrize("num_actuators", [1, 2, 6, 7, 12, 17])
def test_every_division_is_a_partition(num_actuators):
    """NxM is N agents of M consecutive actuators for every N x M that fits, and only for these."""
    for agents, size in itertools.product(range(1, num_actuators + 2), repeat=2):
        text = f"{agents}x{size}"
        if agents * size == num_actuators:
            expected = [list(range(i * size, (i + 1) * size)) for i in range(agents)]
            assert envs.parse_partition("AnyRobot", text, num_actuators) == expected
        else:
            with pytest.raises(
                ValueError, match=f"no partition '{text}': its {num_actuators} actuators"
            ):
                envs.parse_partition("AnyRobot", text, num_actuators)


def test_segments_of_many_segment_ant_have_four_actuators():
    """There, M counts segments; the robot is as long as the partition asks for."""
    assert envs.parse_partition("ManySegmentAnt", "2x1", 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="its 8 actuators split as 1x2, 2x1 or"):
        envs.parse_partition("ManySegmentAnt", "8x1", 8)
    assert envs.make_vec("ManySegmentAnt-2x3", 1).single_action_space.shape == (24,)
    assert envs.make_vec("ManySegmentAnt-[[0,1,2,3,4,5,6],[7]]", 1).single_action_space.shape == (
        8,
    )
    assert envs.make_vec("ManySegmentSwimmer-5x2", 1).single_action_space.shape == (10,)
    assert envs.make_vec("ManySegmentSwimmer-[[2],[0,1]]", 1).single_action_space.shape == (3,)


NAMED = {
    ("Ant", "2x4"): ["hip_1 ankle_1 hip_2 ankle_2", "hip_3 ankle_3 hip_4 ankle_4"],
    ("Ant", "2x4d"): ["hip_1 ankle_1 hip_4 ankle_4", "hip_2 ankle_2 hip_3 ankle_3"],
    ("Humanoid", "9p8"): [
        "abdomen_y abdomen_z abdomen_x right_shoulder1 right_shoulder2 right_elbow left_shoulder1 left_shoulder2 "
        "left_elbow",
        "right_hip_x right_hip_z right_hip_y right_knee left_hip_x left_hip_z left_hip_y left_knee",
    ],
    ("Pusher", "3p"): [
        "r_shoulder_pan_joint r_shoulder_lift_joint r_upper_arm_roll_joint",
        "r_elbow_flex_joint",
        "r_forearm_roll_joint r_wrist_flex_joint r_wrist_roll_joint",
    ],
}
NAMED["HumanoidStandup", "9p8"] = NAMED["Humanoid", "9|8"] = NAMED["HumanoidStandup", "9|8"] = (
    NAMED["Humanoid", "9p8"]
)


@pytest.mark.parametrize(("robot", "name"), NAMED)
def test_named_partitions_by_joint_names(robot, name):
    """Who drives what, in words."""
    names = joint_names(physics(robot)[0])
    parsed = envs.parse_partition(robot, name, len(names))
    assert [{names[a] for a in agent} for agent in parsed] == [
        set(text.split()) for text in NAMED[robot, name]
    ]


def test_the_same_partition_in_every_spelling():
    """In the id, as an argument, as lists, arrays, tuples, and as JSON text; the order within an agent is kept."""
    lists = [[5, 3], [0, 1, 2], [4]]
    spellings = [
        envs.make_vec(f"HalfCheetah-{json.dumps(lists)}", 1),
        envs.make_vec("HalfCheetah", 1, partition=json.dumps(lists)),
        envs.make_vec("HalfCheetah", 1, partition=lists),
        envs.make_vec("HalfCheetah", 1, partition=tuple(map(np.array, lists))),
        envs.make_vec("InvertedPendulum-v5", 1, partition=[[0]]),
    ]
    for vec in spellings[:-1]:
        assert [ids.tolist() for ids in vec.partition.act_ids] == lists
        assert vec.partition.num_agents == 3
    assert [ids.tolist() for ids in spellings[-1].partition.act_ids] == [[0]]
    named = envs.make_vec("Ant", 1, partition="2x4d").partition
    assert [set(ids.tolist()) for ids in named.act_ids] == [{0, 1, 2, 3}, {4, 5, 6, 7}]


@pytest.mark.parametrize(
    ("env_id", "partition", "says"),
    [
        ("HalfCheetah-4x2", None, "6 actuators split as 1x6, 2x3, 3x2, 6x1 or as a list"),
        ("HalfCheetah-0x6", None, "split as 1x6"),
        ("HalfCheetah-2x3d", None, "split as 1x6"),
        ("HalfCheetah-", None, "split as 1x6"),
        ("Ant-4x2d", None, "8 actuators split as 1x8, 2x4, 4x2, 8x1, 2x4d or"),
        ("Humanoid-8|9", None, "17 actuators split as 1x17, 17x1, 9|8, 9p8 or"),
        ("Pusher-4p", None, "split as 1x7, 7x1, 3p or"),
        ("CoupledHalfCheetah-2p2", None, "12x1, 1p1 or"),
        ("ManySegmentSwimmer-2p2", None, "neither NxM nor actuator lists such as"),
        ("ManySegmentSwimmer-1x1", None, "at least 2 segments"),
        (
            "HalfCheetah-[[0,1,2],[3,4]]",
            None,
            "must use each actuator of HalfCheetah, 0 to 5, once",
        ),
        ("HalfCheetah-[[0,1,2],[3,4,4]]", None, "0 to 5, once"),
        ("HalfCheetah-[[0,1,2],[3,4,6]]", None, "0 to 5, once"),
        ("HalfCheetah-[[0,1,2,3,4,5],[]]", None, "0 to 5, once"),
        ("HalfCheetah-[[0,1,2],[3,4,5]", None, "neither NxM nor actuator lists such as"),
        ("HalfCheetah-[0,1,2]", None, "neither NxM nor actuator lists such as"),
        ("HalfCheetah", [[0, 1, 2], [3, 4, 0.5]], "neither NxM nor actuator lists such as"),
        ("HalfCheetah", [["0", 1, 2], [3, 4, 5]], "neither NxM nor actuator lists such as"),
        ("HalfCheetah", 6, "neither NxM nor actuator lists such as"),
    ],
)
def test_wrong_partitions_are_errors(env_id, partition, says):
    """One line that says what would be right."""
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        envs.make_vec(env_id, 1, partition=partition)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("env_id", "near"),
    [
        ("HalfCheeta-6x1", "HalfCheetah-6x1"),
        ("halfcheetah-6x1", "HalfCheetah-6x1"),
        ("Walker-2x3", "Walker2d-2x3"),
        ("ManyAgentSwimmer-10x2", "ManySegmentSwimmer-10x2"),
        ("Ants-4x2", "Ant-4x2"),
        ("HalfCheetah", "HalfCheetah-6x1"),
        ("Hopper-v99-3x1", "Hopper-3x1"),
        ("", "Ant-2x4"),
    ],
)
def test_unknown_ids_are_errors_that_name_near_ones(env_id, near):
    """One line with the id that was probably meant."""
    with pytest.raises(ValueError, match="unknown env_id") as error:
        envs.make_vec(env_id, 1)
    assert near in re.split(r"[ ,?]+", str(error.value).split("did you mean")[1])
    assert "\n" not in str(error.value)


class MissingFile:
    """An environment whose model file is not there."""

    def __init__(self) -> None:
        raise OSError("File /nowhere/robot.xml\ndoes not exist")


@pytest.mark.parametrize(
    ("env_id", "reason"),
    [
        (
            "Pusher-v4-7x1",
            "Pusher-v4 cannot be made: ImportError: `Pusher-v4` is only supported on `mujoco<3`",
        ),
        ("Ant-v9-4x2", "Ant-v9 cannot be made: ImportError: moved elsewhere"),
        (
            "NoFile-v0-1x1",
            "NoFile-v0 cannot be made: OSError: File /nowhere/robot.xml does not exist",
        ),
        (
            "no_such_module:Mine-v0-2x1",
            "no_such_module:Mine-v0 cannot be made: ModuleNotFoundError: No module named",
        ),
        (
            "broken_module:Mine-v0-2x1",
            "broken_module:Mine-v0 cannot be made: ModuleNotFoundError: No module named 'nonsense'",
        ),
        (".a:X-v0-2x1", ".a:X-v0 cannot be made: TypeError: the 'package' argument is required"),
    ],
)
def test_an_environment_that_cannot_be_made_is_an_error(env_id, reason, tmp_path, monkeypatch):
    """The reason that Gymnasium or the environment itself gives, in one line."""

    def moved() -> None:
        raise ImportError("moved\nelsewhere")

    (tmp_path / "broken_module.py").write_text("import nonsense\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = gym.envs.registration.EnvSpec
    monkeypatch.setitem(gym.registry, "Ant-v9", spec("Ant-v9", moved))
    monkeypatch.setitem(gym.registry, "NoFile-v0", spec("NoFile-v0", MissingFile))
    with pytest.raises(ValueError) as error:
        envs.make_vec(env_id, 1)
    assert str(error.value).startswith(reason)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("env_id", "reason"),
    [
        ("Walker2d-[[0,-1],[1,2,3,4,5]]", "must use each actuator of Walker2d, 0 to 5, once"),
        ("Ant-[[0],[1],[2],[3]", "is neither NxM nor actuator lists"),
        ("Ant-" + 100_000 * "[", "is neither NxM nor actuator lists"),
        ("Ant-v5-" + 100_000 * "[", "is neither NxM nor actuator lists"),
    ],
)
def test_lists_that_are_no_partition_are_errors(env_id, reason):
    """A wrong list is not taken for an unknown robot, and the message stays short."""
    with pytest.raises(ValueError, match=reason) as error:
        envs.make_vec(env_id, 1)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("env_id", ["HalfCheetah-6x1", "InvertedPendulum-v5-1x1"])
def test_negative_agent_obsk_is_an_error(env_id):
    """Also for Gymnasium's other robots."""
    with pytest.raises(ValueError, match="agent_obsk is -1: it must be 0 or more edges, or None"):
        envs.make_vec(env_id, 1, agent_obsk=-1)


# What every partition keeps


@st.composite
def partitions(draw) -> tuple[str, list[list[int]]]:
    """A robot, and its actuators in any order, cut anywhere."""
    robot = draw(st.sampled_from(list(EDGES)))
    actuators = draw(st.permutations(range(physics(robot)[0].nu)))
    cuts = sorted(draw(st.sets(st.integers(1, len(actuators) - 1), max_size=5)))
    return robot, [actuators[a:b] for a, b in itertools.pairwise([0, *cuts, len(actuators)])]


def as_sets(obs_ids: Iterable[np.ndarray]) -> list[set[int]]:
    """Index arrays as sets."""
    return [set(ids.tolist()) for ids in obs_ids]


@settings(max_examples=60, deadline=None)
@given(partitions(), st.integers(0, 60))
def test_what_every_partition_keeps(drawn, k):
    """Actuators are split; what is seen is sorted, unique, in range, grows with k, and is the union of its joints'."""
    robot, act_lists = drawn
    model, entries = physics(robot)
    everything = make_partition(model, act_lists, entries, None)
    assert [ids.tolist() for ids in everything.act_ids] == act_lists
    assert [ids.tolist() for ids in everything.obs_ids] == [list(range(len(entries)))] * len(
        act_lists
    )
    near, far = (make_partition(model, act_lists, entries, reach) for reach in (k, k + 1))
    assert sorted(np.concatenate(near.act_ids).tolist()) == list(range(model.nu))
    for ids in near.obs_ids:
        assert ids.dtype == np.int64
        assert ids.tolist() == sorted(set(ids.tolist()) & set(range(len(entries))))
    assert all(a <= b for a, b in zip(as_sets(near.obs_ids), as_sets(far.obs_ids), strict=True))
    alone = as_sets(make_partition(model, [[a] for a in range(model.nu)], entries, k).obs_ids)
    assert as_sets(near.obs_ids) == [set().union(*(alone[a] for a in agent)) for agent in act_lists]


@pytest.mark.parametrize("robot", EDGES)
def test_a_far_sight_shows_every_position_of_the_own_robot(robot):
    """With more edges than joints, all its positions, and no more velocities or forces than with none."""
    model, entries = physics(robot)
    joints = [model.actuator(a).trnid[0] for a in range(model.nu)]
    roots = model.body_rootid[model.jnt_bodyid[joints]]
    own = [[a] for a in range(model.nu)]
    far, near = (as_sets(make_partition(model, own, entries, k).obs_ids) for k in (1000, 0))
    for a in range(model.nu):
        rows = {
            ("qpos", model.jnt_qposadr[j])
            for j, root in zip(joints, roots, strict=True)
            if root == roots[a]
        }
        assert far[a] == near[a] | {i for i, entry in enumerate(entries) if entry in rows}


@pytest.mark.parametrize("agent_obsk", [None, 0, 1])
@pytest.mark.parametrize(
    "env_id",
    [
        *envs.ENV_IDS,
        *(f"{robot}-1x{num_actuators}" for robot, num_actuators in NUM_ACTUATORS.items()),
        *("ManySegmentSwimmer-1x20", "ManySegmentAnt-1x6"),
    ],
)
def test_every_environment_runs(env_id, agent_obsk):
    """Each can be made, reset and stepped through its partition."""
    vec = envs.make_vec(env_id, 2, agent_obsk, num_threads=1)
    text = env_id.split("-")[1]
    assert vec.partition.num_agents == (
        {"9|8": 2, "3p": 3, "1p1": 2}.get(text) or int(text.split("x")[0])
    )
    obs, _ = vec.reset(seed=0)
    actions = np.full(vec.action_space.shape, np.nan, np.float32)
    for obs_ids, act_ids in zip(vec.partition.obs_ids, vec.partition.act_ids, strict=True):
        assert obs[:, obs_ids].shape == (2, len(obs_ids))
        assert len(obs_ids) > 0
        actions[:, act_ids] = vec.single_action_space.high[act_ids] / 2
    assert np.isfinite(actions).all()
    obs, rewards, *_ = vec.step(actions)
    assert np.isfinite(obs).all()
    assert np.isfinite(rewards).all()


@pytest.mark.parametrize("version", ["v4", "v5"])
def test_named_partitions_hold_for_versions_of_a_robot(version):
    """Ant-v5-2x4 is Ant-2x4 (front and back legs), not the diagonals that consecutive actuators would make."""
    versioned, named = (
        envs.make_vec(f"{robot}-2x4", 1).partition for robot in (f"Ant-{version}", "Ant")
    )
    assert [ids.tolist() for ids in versioned.act_ids] == [ids.tolist() for ids in named.act_ids]
    assert named.act_ids[0].tolist() == [2, 3, 4, 5]


def test_ball_joints_belong_to_their_agent_whole():
    """A ball joint has 4 positions and 3 velocities: its agent sees all of them, the other none of the velocities."""
    limb = '<body pos="{}"><joint name="{}" type="{}"/><geom size=".1"/></body>'
    motors = '<motor joint="a" gear="1 0 0"/><motor joint="b"/>'
    bodies = limb.format("0 0 0", "a", "ball") + limb.format("1 0 0", "b", "hinge")
    model = mujoco.MjModel.from_xml_string(
        f"<mujoco><worldbody>{bodies}</worldbody><actuator>{motors}</actuator></mujoco>"
    )
    entries = [("qpos", i) for i in range(5)] + [("qvel", i) for i in range(4)]
    ball, hinge = envs.make_partition(model, [[0], [1]], entries, 0).obs_ids
    assert ball.tolist() == [0, 1, 2, 3, 5, 6, 7] and hinge.tolist() == [4, 8]


def test_too_many_segments_are_refused_at_once():
    """Before MuJoCo is asked to compile them."""
    with pytest.raises(ValueError, match="at most 1000 segments, not 30000"):
        envs.make_vec("ManySegmentSwimmer-30000x1", 1)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (-np.inf, np.inf)])
def test_action_ranges_must_be_finite(low, high, monkeypatch):
    """An empty or infinite range is refused by the actuator's number."""
    env = gym.make("Hopper-v5").unwrapped
    env.action_space = gym.spaces.Box(
        np.array([-1, low, -1.0]), np.array([1, high, 1.0]), dtype=np.float64
    )
    monkeypatch.setattr(envs.gym, "make", lambda _: env)
    with pytest.raises(ValueError, match="actuator 1 must be finite"):
        envs.make_vec("Hopper-v4-3x1", 1)


def test_an_environment_without_a_time_limit_is_refused():
    """Its evaluation would never end."""
    if "Endless-v0" not in gym.registry:
        gym.register("Endless-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv")
    with pytest.raises(ValueError, match="max_episode_steps"):
        envs.make_vec("Endless-v0-3x1", 1)


def test_named_partitions_are_handed_out_as_copies():
    """Who changes the lists that came back does not change the partition of that name."""
    envs.parse_partition("Ant", "2x4d", 8)[0][0] = 99
    assert envs.parse_partition("Ant", "2x4d", 8) == [[2, 3, 0, 1], [4, 5, 6, 7]]
