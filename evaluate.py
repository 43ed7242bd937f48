"""Play a finished model without noise for a score, and film it.

    python evaluate.py runs/RUN_DIR --episodes 100
    python evaluate.py model.pt --video ant

A model is plain tensors: no training script is imported.

With the run's --seed and --eval-episodes the score is its last evaluation's.
"""

import colorsys
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn
from zipfile import ZipFile

import imageio
import mujoco
import numpy as np
import torch
import tyro
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium.vector import VectorEnv
from PIL import Image, ImageDraw
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn
from tqdm import tqdm

import envs
from envs.partition import actuated_joints
from envs.tasks import MujocoVectorEnv

GL_BACKENDS = "egl", "osmesa"  # that draw without a display, in the order of preference
MAX_EPISODE_STEPS = 100_000  # longer episodes are cut, as in the scripts
SIZE = 480  # pixels of the mp4
GIF_SIZE = 240  # pixels: the GIF is small, for a README
GIF_FPS = 20
GIF_FRAMES = 60


@dataclass
class Args:
    """Command line."""

    path: tyro.conf.Positional[Path]
    """a run's directory, or a checkpoint.pt or model.pt"""
    episodes: PositiveInt = 40
    """how many episodes to play, all at the same time"""
    seed: NonNegativeInt = 0
    """random seed of the start states"""
    video: str = ""
    """film one of the episodes: VIDEO.mp4, and its first seconds as VIDEO.gif (needs EGL or OSMesa)"""
    num_threads: NonNegativeInt = 0
    """CPU threads of the physics; 0 is one per core"""
    allow_import: bool = False
    """import the module that the model's env_id names; only for models that you trust"""


class Policy:
    """All the agents of a model, in the arithmetic of the scripts to the last bit."""

    def __init__(self, model: dict[str, Any]) -> None:
        """Take what a script saved; raises whatever another file leads to."""
        if not all(tensor.isfinite().all() for tensor in model["policy"].values()):
            raise ValueError("a parameter is not finite")
        self.obs_ids = [torch.tensor(ids) for ids in model["obs_ids"]]
        self.act_ids = model["act_ids"]
        self.nets = [
            make_net(model["policy"], f"actors.{i}.net.") for i in range(len(self.act_ids))
        ]
        self.tanh = "log_std_init" not in model["args"]  # MADDPG's actors end in a tanh
        self.dtype = torch.float32 if self.tanh else torch.float64  # of the scripts' normalisation
        mean, var, _ = model["obs_rms"]
        self.mean = torch.tensor(mean, dtype=self.dtype)
        self.std = torch.tensor(np.sqrt(np.array(var) + 1e-8), dtype=self.dtype)
        if not (self.mean.isfinite().all() and self.std.isfinite().all()):
            raise ValueError("the statistics of the observations are not finite")
        self(np.zeros((1, len(mean))))  # check that the shapes fit

    @torch.inference_mode()
    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Flat observations [B, obs_dim] to the likeliest flat actions, float32 [B, act_dim]."""
        obs = (torch.as_tensor(obs, dtype=self.dtype) - self.mean) / self.std
        obs = obs.clamp(-10, 10).float()
        # A shared actor's obs_ids point to these two constants, for padding and the one-hot agent id.
        obs = torch.cat([obs, torch.tensor([0.0, 1.0]).expand(len(obs), 2)], dim=1)
        actions = torch.zeros(len(obs), sum(map(len, self.act_ids)))
        for net, obs_ids, act_ids in zip(self.nets, self.obs_ids, self.act_ids, strict=True):
            actions.index_copy_(1, torch.tensor(act_ids), net(obs[:, obs_ids]))  # no broadcast
        if self.tanh:
            actions = actions.tanh()
        return actions.numpy()


def make_net(state: dict[str, torch.Tensor], prefix: str) -> nn.Sequential:
    """Build the network whose layers are `<prefix>0.weight`, `<prefix>0.bias`, `<prefix>2.weight`..."""
    tensors = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    if not tensors:
        raise ValueError(f"there is no {prefix}")
    layers: list[nn.Module] = []
    for name, weight in tensors.items():
        if name.endswith("weight"):
            fan_out, fan_in = weight.shape
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    net.load_state_dict(tensors)
    return net


def evaluate(
    vec: VectorEnv, policy: Policy, seed: int, film: "Film | None" = None
) -> tuple[np.ndarray, np.ndarray]:
    """Play one episode in each environment of `vec`; return their returns and lengths [num_envs]."""
    low = vec.single_action_space.low
    high = vec.single_action_space.high
    _, _, eval_seed = np.random.SeedSequence(seed).generate_state(3).tolist()  # as in the scripts
    obs, _ = vec.reset(seed=eval_seed)
    returns = np.zeros(vec.num_envs)
    lengths = np.zeros(vec.num_envs)
    running = np.ones(vec.num_envs, dtype=bool)
    while running.any() and lengths.max() < MAX_EPISODE_STEPS:
        if film and running[0]:
            film.capture()
        actions = (low + high) / 2 + (high - low) / 2 * policy(obs)
        obs, rewards, terminations, truncations, _ = vec.step(np.clip(actions, low, high))
        returns[running] += rewards[running]  # an episode that follows does not count
        lengths += running
        running &= ~(terminations | truncations)
    if running.any():
        print(f"{running.sum()} episodes were cut after {MAX_EPISODE_STEPS} steps")
    return returns, lengths


# Film


def paint(model: mujoco.MjModel, partition: envs.Partition) -> np.ndarray:
    """Colour the geoms of a model by the agent that moves them, in place; return the colours, RGB [num_agents, 3].

    That is who drives the joints of its body, or of the nearest body above it that has an actuated joint: the mean of
    the colours of several agents. What no agent moves keeps its looks. Raises ValueError where an actuator has no joint
    of its own.
    """
    hues = np.arange(partition.num_agents) / partition.num_agents  # as far apart as can be
    colors = np.array([colorsys.hsv_to_rgb(hue, 0.85, 0.95) for hue in hues])
    agents_of = defaultdict(list)  # by body
    for agent, actuators in enumerate(partition.act_ids):
        for body in model.jnt_bodyid[actuated_joints(model)[actuators]]:
            agents_of[body].append(agent)
    for geom, body in enumerate(model.geom_bodyid):
        while body and body not in agents_of:
            body = model.body_parentid[body]
        if body:
            model.geom_rgba[geom, :3] = colors[agents_of[body]].mean(axis=0)
            model.geom_matid[geom] = -1  # a material would hide the colour
    return colors


def find_gl_backend() -> str:
    """What can draw without a display here: MUJOCO_GL if set, else EGL or OSMesa. Raises RuntimeError if none can."""
    wanted = os.environ.get("MUJOCO_GL")  # also empty
    names = [wanted] if wanted else GL_BACKENDS
    for name in names:
        # In a process of its own: a failed attempt leaves OpenGL half loaded.
        program = f"from mujoco.{name} import GLContext; GLContext(8, 8).make_current()"
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, capture_output=True, check=False)
        if result.returncode == 0:
            return name
    raise RuntimeError(f"{' and '.join(names)} cannot draw here: apt install libegl1 or libosmesa6")


class Film:
    """Films the first of a batch of environments into an mp4, and its first seconds into a GIF."""

    def __init__(self, vec: VectorEnv, name: str) -> None:
        """Prepare `<name>.mp4`, with a picture per step, and `<name>.gif`; draw once to see whether that works.

        Raises:
            OSError, RuntimeError, ValueError: the files exist, nothing can draw here, the robot cannot be painted.
        """
        self.paths = [Path(f"{name.removesuffix('.mp4')}{suffix}") for suffix in (".mp4", ".gif")]
        if taken := [path for path in self.paths if path.exists()]:
            raise FileExistsError(f"{taken[0]} exists already")
        self.base = vec.unwrapped
        self.env = (
            self.base.env if isinstance(self.base, MujocoVectorEnv) else self.base.envs[0].unwrapped
        )
        self.colors = paint(self.env.model, vec.partition)
        os.environ["MUJOCO_GL"] = find_gl_backend()
        model = self.env.model
        config = self.env.mujoco_renderer.default_cam_config
        # The camera "track", if the robot has one, follows it.
        tracks = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track") >= 0
        camera = {"camera_name": "track"} if tracks else {}
        try:
            self.renderer = MujocoRenderer(model, self.env.data, config, SIZE, SIZE, **camera)
            self.draw()
        except Exception as e:  # the libraries below raise whatever they like
            raise RuntimeError(f"{os.environ['MUJOCO_GL']} cannot draw here: {e}") from e
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)
        self.mp4 = imageio.get_writer(self.paths[0], fps=round(1 / self.env.dt))
        self.gif = []
        self.num_frames = 0
        self.bar = tqdm(
            total=getattr(self.base, "max_episode_steps", None),
            desc="film",
            unit="frame",
            disable=None,
        )

    def draw(self) -> np.ndarray:
        """The first environment as it is now, RGB [height, width, 3]."""
        if isinstance(self.base, MujocoVectorEnv):
            # `env` is not one of the simulations: show the first one's state with it.
            self.env.data.qpos[:] = self.base.qpos[0]
            self.env.data.qvel[:] = self.base.qvel[0]
            mujoco.mj_forward(self.env.model, self.env.data)
        return self.renderer.render("rgb_array")

    def capture(self) -> None:
        """Add a picture, with a legend of the agents' colours."""
        image = Image.fromarray(self.draw())
        legend = ImageDraw.Draw(image)
        for agent, color in enumerate(self.colors):
            y = 24 * agent
            fill = tuple(int(255 * x) for x in color)
            legend.rectangle((0, y, 90, y + 23), fill)
            legend.text(
                (10, y + 3),
                f"agent {agent}",
                "white",
                font_size=16,
                stroke_width=1,
                stroke_fill="black",
            )
        self.mp4.append_data(np.asarray(image))
        frames_apart = max(1, round(1 / self.env.dt / GIF_FPS))
        if self.num_frames % frames_apart == 0 and len(self.gif) < GIF_FRAMES:
            small = image.resize((GIF_SIZE, GIF_SIZE))
            self.gif.append(small.quantize(128, Image.Quantize.MAXCOVERAGE))
        self.num_frames += 1
        self.bar.update()

    def close(self) -> None:
        """Finish both files."""
        self.mp4.close()
        self.bar.close()
        self.gif[0].save(
            self.paths[1],
            save_all=True,
            append_images=self.gif[1:],
            duration=1000 // GIF_FPS,
            loop=0,
        )
        self.renderer.close()
        del self.renderer  # now, not later: it takes the current OpenGL context with it


# Run


def fail(message: object) -> NoReturn:
    """Say in one line what is wrong, and exit with code 2."""
    print("error:", *str(message).split(), file=sys.stderr)
    sys.exit(2)


def load_model(path: Path) -> dict[str, Any]:
    """Read a model; of a run's directory the checkpoint, which is never older than model.pt."""
    if path.is_dir():
        path = path / ("checkpoint.pt" if (path / "checkpoint.pt").exists() else "model.pt")
    if ZipFile(path).testzip():
        raise ValueError("it is damaged: a checksum is wrong")
    # mmap: a checkpoint may hold a large replay buffer. weights_only: no code in the file is run.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def main(args: Args) -> None:
    """Load, play, and say how it went."""
    file = args.path
    try:
        model = load_model(file)
        env_id = str(model["args"]["env_id"])
        policy = Policy(model)
    except Exception as e:  # torch.load raises whatever the bytes lead it to
        reason = str(e) if isinstance(e, ValueError) else type(e).__name__
        fail(f"{file}: no model can be read there ({reason})")
    if ":" in env_id and not args.allow_import:
        fail(f"{file}: {env_id} imports a module; if you trust this file, add --allow-import")
    try:
        # The policy knows what the agents see: no agent_obsk.
        vec = envs.make_vec(env_id, args.episodes, num_threads=args.num_threads)
    except ValueError as e:
        fail(f"{file}: {e}")
    act_ids = [ids.tolist() for ids in vec.partition.act_ids]
    if vec.single_observation_space.shape != policy.mean.shape or act_ids != policy.act_ids:
        fail(f"{file}: {env_id} has changed since this model was made")
    try:
        film = Film(vec, args.video) if args.video else None
    except (OSError, RuntimeError, ValueError) as e:
        fail(f"--video {args.video}: {e}")
    returns, lengths = evaluate(vec, policy, args.seed, film)
    if film:
        film.close()
        print(f"{film.paths[0]} and {film.paths[1]}: the first episode, return {returns[0]:.2f}")
    score = f"mean {returns.mean():.2f}, std {returns.std():.2f}, min {returns.min():.2f}, max {returns.max():.2f}"
    print(
        f"{env_id}, {args.episodes} episodes, seed {args.seed}: return {score}; mean length {lengths.mean():.1f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in the scripts
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
