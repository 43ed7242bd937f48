"""The compiled models of envs/models.py against the XML files of Gymnasium-Robotics' MaMuJoCo."""

from collections.abc import Callable
from pathlib import Path

import mujoco
import numpy as np
import pytest
from gymnasium_robotics.envs.multiagent_mujoco import (
    coupled_half_cheetah,
    many_segment_ant,
    many_segment_swimmer,
)

from envs import models

COUPLED_XML = Path(coupled_half_cheetah.__file__).parent / "assets" / "coupled_half_cheetah.xml"

# What is not compared, by the beginning of its name. Names, and the sizes that count their characters: our joints and
# bodies continue Gymnasium's own names, MaMuJoCo has others.
NAMES = ("name", "nnames", "nbuffer")
# MaMuJoCo's Ant file declares an old fixed limit on the number of contacts, Gymnasium's Ant does not.
CONTACT_LIMIT = ("nconmax",)
# Attaching two robots copies Gymnasium's textures and materials once per robot, and the hash of the model counts them.
LOOKS = ("mat_", "nmat", "tex_", "ntex", "signature")


@pytest.fixture(autouse=True)
def _quiet_mujoco(monkeypatch, tmp_path):
    """Keep MuJoCo's warnings off the screen, and its log file out of the repository."""
    monkeypatch.chdir(tmp_path)
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    yield
    mujoco.set_mju_user_warning(handler)


def numbers(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """Every number and array of numbers of a model, its options and its statistics, by name."""
    found = {}
    for prefix, part in (("", model), ("opt.", model.opt), ("stat.", model.stat)):
        for name in dir(part):
            value = None if name.startswith("_") else getattr(part, name)
            if isinstance(value, int | float | np.ndarray):
                found[prefix + name] = np.asarray(value)
    return found


def assert_same_model(ours: mujoco.MjModel, theirs: mujoco.MjModel, skipped: tuple) -> None:
    """Equal to the last bit in every field that does not begin with one of `skipped`."""
    ours, theirs = numbers(ours), numbers(theirs)
    assert set(ours) == set(theirs)
    compared = [field for field in theirs if not field.startswith(skipped)]
    assert len(compared) > 400
    assert {
        "opt.timestep",
        "opt.integrator",
        "opt.viscosity",
        "stat.meaninertia",
        "actuator_gear",
    } < set(compared)
    for field in compared:
        assert ours[field].dtype == theirs[field].dtype, field
        assert ours[field].shape == theirs[field].shape, field
        np.testing.assert_array_equal(ours[field], theirs[field], err_msg=field)


@pytest.mark.parametrize(
    ("ours", "gen_asset", "num_segments", "skipped"),
    [
        *(
            (models.many_segment_swimmer, many_segment_swimmer.gen_asset, n, NAMES)
            for n in (2, 3, 6, 20)
        ),
        *(
            (models.many_segment_ant, many_segment_ant.gen_asset, n, (*NAMES, *CONTACT_LIMIT))
            for n in (1, 2, 6)
        ),
    ],
)
def test_many_segment_models_are_mamujocos(
    ours: Callable[[int], mujoco.MjModel],
    gen_asset: Callable,
    num_segments: int,
    skipped: tuple,
    tmp_path: Path,
) -> None:
    """The same physics, for the smallest robots and larger ones."""
    gen_asset(num_segments, str(tmp_path / "theirs.xml"))
    theirs = mujoco.MjModel.from_xml_path(str(tmp_path / "theirs.xml"))
    assert_same_model(ours(num_segments), theirs, skipped)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_coupled_half_cheetah_is_mamujocos():
    """The same physics, the scaling to one total mass included."""
    theirs = mujoco.MjModel.from_xml_path(str(COUPLED_XML))
    assert_same_model(models.coupled_half_cheetah(), theirs, (*NAMES, *LOOKS))


@pytest.mark.parametrize("num_segments", [-1, 0, 1])
def test_swimmer_needs_two_segments(num_segments):
    """Gymnasium's Swimmer, of two joints, is the smallest."""
    with pytest.raises(ValueError, match="at least 2 segments"):
        models.many_segment_swimmer(num_segments)


@pytest.mark.parametrize(
    ("env", "model", "num_actuators"),
    [
        (models.ManySegmentSwimmerEnv, models.many_segment_swimmer, 7),
        (models.ManySegmentAntEnv, models.many_segment_ant, 28),
    ],
)
def test_environments_have_the_segments_that_they_are_asked_for(env, model, num_actuators):
    """Seven segments: seven joints of a swimmer, four of each segment of an ant."""
    assert env(model(7)).model.nu == num_actuators
