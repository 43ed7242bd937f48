"""Films of an episode, off screen, with each agent's limbs in its own colour."""

import colorsys
import os
import subprocess
import sys
from pathlib import Path

import imageio
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium.vector import VectorEnv
from PIL import Image, ImageDraw

from envs.partition import Partition, actuated_joints
from envs.tasks import MujocoVectorEnv

BACKENDS = "egl", "osmesa"  # that draw without a display, in the order of preference
SIZE = 480  # of the picture, in pixels
GIF_SECONDS, GIF_FPS, GIF_SIZE = 3, 20, 240  # small enough for a README


def agent_colors(num_agents: int) -> np.ndarray:
    """Colours as far apart as can be, RGB in [0, 1], [num_agents, 3]."""
    return np.array([colorsys.hsv_to_rgb(i / num_agents, 0.85, 0.95) for i in range(num_agents)])


def paint(model: mujoco.MjModel, partition: Partition) -> None:
    """Colour the geoms of a model by the agent that moves them, in place.

    A limb belongs to the joints of its body, or of the nearest body above it that has an actuated joint; where several
    agents drive these, it gets the mean of their colours. What no agent moves keeps its looks.
    """
    joints, colors = actuated_joints(model), agent_colors(partition.num_agents)
    agents_of: dict[int, list[int]] = {}
    for agent, actuators in enumerate(partition.act_ids):
        for joint in joints[actuators]:
            agents_of.setdefault(int(model.jnt_bodyid[joint]), []).append(agent)
    for geom in range(model.ngeom):
        body = model.geom_bodyid[geom]
        while body and body not in agents_of:
            body = model.body_parentid[body]
        if body:
            model.geom_rgba[geom, :3] = colors[agents_of[body]].mean(axis=0)
            model.geom_matid[geom] = -1  # a material would hide the colour


def find_gl_backend() -> str:
    """The library that can draw without a display here: MUJOCO_GL if set, else EGL or OSMesa, whichever works.

    Raises:
        RuntimeError: in one line, when neither does.
    """
    if "MUJOCO_GL" in os.environ:
        return os.environ["MUJOCO_GL"]
    for name in BACKENDS:
        # In a process of its own: a failed attempt leaves OpenGL half loaded.
        program = f"from mujoco.{name} import GLContext; GLContext(8, 8).make_current()"
        env = os.environ | {"MUJOCO_GL": name}
        if subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=False).returncode == 0:
            return name
    raise RuntimeError("no off-screen OpenGL: install EGL (apt install libegl1) or OSMesa (apt install libosmesa6)")


class Film:
    """Films the first of a batch of environments into an mp4, and its first seconds into a GIF."""

    def __init__(self, vec: VectorEnv) -> None:
        """Prepare to film `vec`, which `make_vec` made.

        Raises:
            RuntimeError: in one line, when nothing can draw without a display here.
        """
        os.environ["MUJOCO_GL"] = find_gl_backend()
        self.base, self.partition = vec.unwrapped, vec.partition
        self.env = self.base.env if isinstance(self.base, MujocoVectorEnv) else self.base.envs[0].unwrapped
        paint(self.env.model, self.partition)
        config, model = self.env.mujoco_renderer.default_cam_config, self.env.model
        tracks = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track") >= 0  # follows a robot that walks
        camera = {"camera_name": "track"} if tracks else {}
        self.renderer = MujocoRenderer(model, self.env.data, config, SIZE, SIZE, **camera)
        try:
            self._draw()
        except Exception as e:  # the libraries below raise whatever they like
            raise RuntimeError(f"MUJOCO_GL={os.environ['MUJOCO_GL']} cannot draw here: {e}") from e

    def open(self, path: Path) -> None:
        """Start a film: `<path>.mp4`, a frame per step of the environment, and `<path>.gif`."""
        self.path, self.num_frames = path, 0
        self.gif: list[Image.Image] = []
        self.mp4 = imageio.get_writer(path.with_suffix(".mp4"), fps=round(1 / self.env.dt))

    def _draw(self) -> np.ndarray:
        """The first environment as it is now, RGB [height, width, 3]."""
        if isinstance(self.base, MujocoVectorEnv):
            self.env.data.qpos[:], self.env.data.qvel[:] = self.base.qpos[0], self.base.qvel[0]
            mujoco.mj_forward(self.env.model, self.env.data)
        return self.renderer.render("rgb_array")

    def capture(self) -> None:
        """Add a frame."""
        image = Image.fromarray(self._draw())
        draw, size, num_agents = ImageDraw.Draw(image), SIZE // 30, self.partition.num_agents
        draw.rectangle((0, 0, 7 * size, size * (1 + 3 * num_agents) // 2 + size // 2), fill=(40, 40, 40))
        for agent, color in enumerate(agent_colors(num_agents)):
            y = size * (1 + 3 * agent) // 2
            draw.rectangle((size // 2, y, size * 3 // 2, y + size), fill=tuple(int(255 * c) for c in color))
            draw.text((2 * size, y), f"agent {agent}", fill=(255, 255, 255), font_size=size)
        self.mp4.append_data(np.asarray(image))
        if self.num_frames % max(1, round(1 / self.env.dt / GIF_FPS)) == 0 and len(self.gif) < GIF_SECONDS * GIF_FPS:
            self.gif.append(image.resize((GIF_SIZE, GIF_SIZE)).quantize(128, Image.Quantize.MAXCOVERAGE))
        self.num_frames += 1

    def close(self) -> None:
        """Finish both files."""
        self.mp4.close()
        path, first, rest = self.path.with_suffix(".gif"), self.gif[0], self.gif[1:]
        first.save(path, save_all=True, append_images=rest, duration=1000 // GIF_FPS, loop=0)
        self.renderer.close()
        del self.renderer  # now, not later: it takes the current OpenGL context with it
