"""The robots that Gymnasium does not have, as MaMuJoCo defines them, built with MuJoCo's `MjSpec`.

Each is one of Gymnasium's own environments with another model: weights, ranges and reset stay Gymnasium's. The models
follow Gymnasium-Robotics 1.4.2, envs/multiagent_mujoco (many_segment_swimmer.py, many_segment_ant.py,
coupled_half_cheetah.py and their assets); `tests/test_models.py` compares the compiled models with those.
"""

from pathlib import Path
from typing import Any

import gymnasium.envs.mujoco
import mujoco
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.swimmer_v5 import SwimmerEnv

ASSETS = Path(gymnasium.envs.mujoco.__file__).parent / "assets"
HINGE = mujoco.mjtJoint.mjJNT_HINGE
CAPSULE = mujoco.mjtGeom.mjGEOM_CAPSULE


def add_motor(spec: mujoco.MjSpec, joint: str) -> None:
    """Let a motor drive the joint of that name, with Gymnasium's gear and range."""
    motor = spec.add_actuator(trntype=mujoco.mjtTrn.mjTRN_JOINT, target=joint)
    motor.gear = [150, 0, 0, 0, 0, 0]  # a hinge has the first of the six directions
    motor.ctrllimited = True
    motor.ctrlrange = [-1, 1]


def many_segment_swimmer(num_segments: int) -> mujoco.MjModel:
    """Compile Gymnasium's Swimmer with `num_segments` actuated joints. Raises ValueError for fewer than 2."""
    if num_segments < 2:
        raise ValueError("ManySegmentSwimmer needs at least 2 segments")
    spec = mujoco.MjSpec.from_file(str(ASSETS / "swimmer.xml"))
    body = spec.body("back")
    for i in range(2, num_segments):
        # Every second axis points the other way, except that of the last segment, as in MaMuJoCo.
        sign = -1 if i % 2 == 0 and i < num_segments - 1 else 1
        body = body.add_body(name=f"back{i}", pos=[-1, 0, 0])
        body.add_geom(type=CAPSULE, fromto=[0, 0, 0, -1, 0, 0], size=[0.1, 0, 0], density=1000)
        body.add_joint(
            name=f"motor{i + 1}_rot", type=HINGE, axis=[0, 0, sign], limited=True, range=[-100, 100]
        )
        add_motor(spec, f"motor{i + 1}_rot")
    return spec.compile()


def many_segment_ant(num_segments: int) -> mujoco.MjModel:
    """Compile Gymnasium's Ant with a rigid spine of `num_segments` segments, each with a left and a right leg."""
    spec = mujoco.MjSpec.from_file(str(ASSETS / "ant.xml"))
    torso = spec.body("torso")
    for part in [*spec.actuators, *torso.bodies, *torso.geoms]:
        spec.delete(part)

    def add_leg(name: str, stub: list, out: list, ankle_axis: list, ankle_range: list) -> None:
        """Add a leg: a stub fixed to the torso, then hip and ankle; `stub` and `out` are vectors along the limbs."""
        leg = torso.add_body()
        leg.add_geom(type=CAPSULE, fromto=[0, 0, 0, *stub], size=[0.08, 0, 0])
        hip = leg.add_body(pos=stub)
        hip.add_joint(name=f"hip{name}", type=HINGE, axis=[0, 0, 1], range=[-30, 30])
        hip.add_geom(type=CAPSULE, fromto=[0, 0, 0, *out], size=[0.08, 0, 0])
        ankle = hip.add_body(pos=out)
        ankle.add_joint(name=f"ankle{name}", type=HINGE, axis=ankle_axis, range=ankle_range)
        shin = [2 * x for x in out]  # twice as long as the thigh
        ankle.add_geom(type=CAPSULE, fromto=[0, 0, 0, *shin], size=[0.08, 0, 0])
        add_motor(spec, f"hip{name}")
        add_motor(spec, f"ankle{name}")

    add_leg("1_0", [0.2, 0.2, 0], [0.2, 0.2, 0], [-1, 1, 0], [30, 70])
    add_leg("2_0", [0.2, -0.2, 0], [0.2, -0.2, 0], [1, 1, 0], [30, 70])
    for i in range(1, num_segments):
        torso = torso.add_body(name=f"torso_{i}", pos=[-1, 0, 0])
        torso.add_geom(type=CAPSULE, fromto=[1, 0, 0, 0, 0, 0], size=[0.1, 0, 0], density=100)
        add_leg(f"1_{i}", [0, 0.2, 0], [-0.2, 0.2, 0], [1, 1, 0], [-70, -30])
        add_leg(f"2_{i}", [0, -0.2, 0], [-0.2, -0.2, 0], [-1, 1, 0], [-70, -30])
    return spec.compile()


def coupled_half_cheetah() -> mujoco.MjModel:
    """Compile two of Gymnasium's HalfCheetahs side by side, their torsos tied by an elastic tendon."""
    asset = str(ASSETS / "half_cheetah.xml")
    spec = mujoco.MjSpec.from_file(asset)
    spec.delete(spec.body("torso"))
    tendon = spec.add_tendon(
        name="tendon0", limited=True, range=[1.5, 3.5], stiffness=[0.1, 0, 0], width=0.05
    )
    tendon.rgba = [0.95, 0.3, 0.3, 1]
    for i, y in enumerate((-1, 1)):
        torso = mujoco.MjSpec.from_file(asset).body("torso")
        torso.pos[1] = y
        torso.add_site(name="t", size=[0.1, 0.005, 0.005])
        spec.worldbody.add_frame().attach_body(torso, "", str(i))
        tendon.wrap_site(f"t{i}")
    return spec.compile()


class CustomModel:
    """Put before one of Gymnasium's environments: replaces its model, and keeps its weights, ranges and reset."""

    def __init__(self, model: mujoco.MjModel, **kwargs: Any) -> None:
        """Make the environment with the compiled model; `kwargs` are those of Gymnasium's class."""
        self._model = model
        super().__init__(**kwargs)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        return self._model, mujoco.MjData(self._model)


class ManySegmentSwimmerEnv(CustomModel, SwimmerEnv):
    """Swimmer-v5 with more segments."""


class ManySegmentAntEnv(CustomModel, AntEnv):
    """Ant-v5 with a spine of several segments."""


class CoupledHalfCheetahEnv(CustomModel, HalfCheetahEnv):
    """HalfCheetah-v5's weights and reset with the two tied cheetahs; the reward is in `tasks.py`."""
