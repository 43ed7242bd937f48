"""MADDPG on Multi-Agent MuJoCo: deterministic actors, learnt off-policy through one critic of the joint action.

    python maddpg_mamujoco.py --env-id HalfCheetah-2x3
    tensorboard --logdir runs

Lowe et al., "Multi-Agent Actor-Critic for Mixed Cooperative-Competitive Environments", arXiv 1706.02275, algorithm 1,
for one shared reward: one critic instead of one per agent. Next to it: the on-policy scripts, whose form it has.
"""

import copy
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Generator, Tensor, nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs
from envs.video import Film


@dataclass
class Args:
    """Command line of the script."""

    # Experiment
    exp_name: str = Path(__file__).stem
    """name of the experiment"""
    env_id: str = "HalfCheetah-6x1"
    """<Robot>-<partition>: HalfCheetah-6x1, Ant-4x2, "Walker2d-[[0,3],[1,4],[2,5]]", or <Gymnasium id>-<partition>"""
    agent_obsk: int | None = None
    """what an agent sees: None the whole state, k its own joints and the positions of those up to k joints away"""
    seed: int = 1
    """seed of everything random: environments, networks, action noise, minibatches, order of the agents"""
    total_timesteps: int = 1_000_000
    """environment steps of the run, summed over the environments"""
    run_dir: str | None = None
    """where to write the log and the model; None is runs/<env_id>__<exp_name>__<seed>__<time>; must not exist"""
    resume: str | None = None
    """run directory (or a checkpoint in it) to continue with its arguments; --total-timesteps may be raised"""
    checkpoint_interval: int = 100
    """iterations between checkpoints (with the replay buffer), of which the last two are kept; 0: at the end only"""
    eval_interval: int = 100_000
    """environment steps between evaluations; 0 evaluates at the end only"""
    eval_episodes: int = 10
    """deterministic episodes per evaluation; 0 never evaluates"""
    eval_only: bool = False
    """with --resume: evaluate the run instead of continuing it"""
    capture_video: bool = False
    """whether to film a deterministic episode at the end: video_<step>.mp4 and .gif in the run's directory"""
    cuda: bool = False
    """whether to train on the GPU; without one it falls back to the CPU and says so"""
    torch_deterministic: bool = True
    """whether PyTorch may only use deterministic kernels"""
    num_threads: int = 0
    """CPU threads for PyTorch and for the physics each; 0 leaves it to them (one per core)"""
    track: bool = False
    """whether to log to Weights & Biases too (pip install wandb)"""
    wandb_project_name: str = "mamujoco"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases entity (team)"""

    # Algorithm
    num_envs: int = 20
    """number of parallel environments"""
    num_steps: int = 100
    """steps in each environment per iteration, that is between two points of the log"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds; its memory is stated at the start"""
    learning_starts: int = 10_000
    """environment steps with uniformly random actions, before the first update"""
    updates_per_step: float = 0.1
    """updates of critic and actors per environment step; 0.1 is two for every step of 20 environments"""
    batch_size: int = 256
    """transitions per update"""
    n_step: int = 5
    """rewards in a target before it bootstraps; fewer where the episode ends"""
    learning_rate: float = 5e-4
    """learning rate of the actors"""
    critic_learning_rate: float = 1e-3
    """learning rate of the critic"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """share of the networks in their targets after an update (Polyak averaging)"""
    exploration_noise: float = 0.1
    """standard deviation of the noise on actions, which go from -1 to 1"""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """sizes of the hidden layers of actors and critic"""


# Running normalisation


class RunningMeanStd(nn.Module):
    """Mean and variance of all samples seen so far, per feature (Chan et al. 1979, parallel update)."""

    def __init__(self, dim: int) -> None:
        """Statistics of vectors of length `dim`."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Add samples [n, dim]."""
        var, mean = torch.var_mean(x, 0, correction=0)
        self.count += x.shape[0]
        weight, delta = x.shape[0] / self.count, mean - self.mean  # of what is new
        self.var.lerp_(var + (1 - weight) * delta.square(), weight)
        self.mean.lerp_(mean, weight)


class NormalizedEnv:
    """A vector environment in the learner's terms: normalised float32 tensors on its device, actions in [-1, 1].

    Observations are standardised, rewards are divided by the standard deviation of the discounted return. The running
    statistics of both change only while `training` is set.
    """

    def __init__(self, vec: gym.vector.VectorEnv, gamma: float, device: torch.device, clip: float = 10.0) -> None:
        """Wrap `vec`; what is normalised is clipped to [-clip, clip]."""
        self.vec, self.gamma, self.device, self.clip, self.training = vec, gamma, device, clip, True
        self.obs_rms = RunningMeanStd(vec.single_observation_space.shape[0]).to(device)
        self.return_rms = RunningMeanStd(1).to(device)
        self.returns = torch.zeros(vec.num_envs, dtype=torch.float64, device=device)
        low, high = vec.single_action_space.low, vec.single_action_space.high
        self.action_mid, self.action_half = (low + high) / 2, (high - low) / 2

    def normalize_obs(self, obs: Tensor) -> Tensor:
        """Normalise observations [..., obs_dim]."""
        obs = (obs - self.obs_rms.mean) * torch.rsqrt(self.obs_rms.var + 1e-8)
        return obs.clamp(-self.clip, self.clip).float()

    def reset(self, seed: int) -> Tensor:
        """Start all episodes; return observations [num_envs, obs_dim]."""
        obs = torch.as_tensor(self.vec.reset(seed=seed)[0], device=self.device)
        self.returns = torch.zeros_like(self.returns)
        if self.training:
            self.obs_rms.update(obs)
        return self.normalize_obs(obs)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, dict]:
        """Apply actions [num_envs, act_dim], clipped to [-1, 1] and scaled to the actuators' range.

        Returns:
            obs: where to act next, [num_envs, obs_dim]; after an episode's end the first of the next episode.
            next_obs: the state that the actions led to; the same, but after an episode's end its true last one.
            rewards, terminations, truncations: float32, [num_envs].
            infos: Gymnasium's.
        """
        scaled = self.action_mid + self.action_half * actions.clamp(-1, 1).cpu().numpy()
        obs, rewards, terminations, truncations, infos = self.vec.step(scaled)
        # One transfer to the device for everything.
        packed = torch.as_tensor(np.column_stack((obs, rewards, terminations, truncations)), device=self.device)
        obs, (rewards, terminations, truncations) = packed[:, :-3], packed[:, -3:].T
        if self.training:
            self.obs_rms.update(obs)
            self.returns = self.returns * self.gamma + rewards
            self.return_rms.update(self.returns[:, None])
        obs = next_obs = self.normalize_obs(obs)
        if "_final_obs" in infos:
            done = torch.as_tensor(infos["_final_obs"], device=self.device)
            final_obs = torch.as_tensor(np.stack(infos["final_obs"][infos["_final_obs"]]), device=self.device)
            next_obs = obs.clone()
            next_obs[done] = self.normalize_obs(final_obs)
            self.returns[done] = 0
        rewards = (rewards * torch.rsqrt(self.return_rms.var + 1e-8)).clamp(-self.clip, self.clip)
        return obs, next_obs, rewards.float(), terminations.float(), truncations.float(), infos

    def state_dict(self) -> dict[str, Any]:
        """The running statistics, and all that the environments remember."""
        rms = {"obs_rms": self.obs_rms.state_dict(), "return_rms": self.return_rms.state_dict()}
        return rms | {"returns": self.returns, "vec": envs.get_state(self.vec)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; `vec` must have been reset once."""
        self.obs_rms.load_state_dict(state["obs_rms"])
        self.return_rms.load_state_dict(state["return_rms"])
        self.returns = state["returns"].to(self.device)
        envs.set_state(self.vec, state["vec"])


# Networks


def mlp(sizes: Sequence[int], output_gain: float, generator: Generator) -> nn.Sequential:
    """Linear layers with ReLU between; orthogonal weights of gain sqrt(2), `output_gain` at the end; zero biases."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        layer = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(layer.weight, output_gain if last else 2**0.5, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer] if last else [layer, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """Deterministic policy."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: Sequence[int], generator: Generator) -> None:
        """Build the network from `obs_dim` inputs to `act_dim` actions."""
        super().__init__()
        self.net = mlp((obs_dim, *hidden_sizes, act_dim), 0.01, generator)

    def forward(self, obs: Tensor) -> Tensor:
        """Observations [..., obs_dim] to actions in [-1, 1], [..., act_dim]."""
        return torch.tanh(self.net(obs))


class Critic(nn.Module):
    """Q(s, a^1..a^n): the value of the joint action in the full state."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: Sequence[int], generator: Generator) -> None:
        """Build the network for flat observations and actions."""
        super().__init__()
        self.net = mlp((obs_dim + act_dim, *hidden_sizes, 1), 1.0, generator)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Flat observations [..., obs_dim] and actions [..., act_dim] to values [...]."""
        return self.net(torch.cat([obs, actions], dim=-1)).squeeze(-1)


class JointPolicy:
    """All the actors as one: flat observations to flat actions."""

    def __init__(self, actors: Sequence[Actor], partition: envs.Partition) -> None:
        """Keep the actors, whose updates it follows, and the partition on their device."""
        self.actors, device = actors, next(actors[0].parameters()).device
        self.obs_ids = [torch.as_tensor(ids, device=device) for ids in partition.obs_ids]
        self.act_ids = [torch.as_tensor(ids, device=device) for ids in partition.act_ids]
        self.order = torch.cat(self.act_ids).argsort()  # from the agents' order to the actuators'

    @torch.no_grad()
    def mean(self, obs: Tensor) -> Tensor:
        """Flat observations [..., obs_dim] to the flat action [..., act_dim]."""
        actions = [actor(obs[..., ids]) for actor, ids in zip(self.actors, self.obs_ids, strict=True)]
        return torch.cat(actions, dim=-1)[..., self.order]


# Replay buffer


class ReplayBuffer:
    """The last `capacity` steps of all environments, in tensors that are allocated once."""

    def __init__(self, capacity: int, num_envs: int, obs_dim: int, act_dim: int, device: torch.device) -> None:
        """Allocate [capacity, num_envs, ...] for each kind of data."""
        shape = capacity, num_envs
        self.data = {
            "obs": torch.zeros(*shape, obs_dim, device=device),
            "next_obs": torch.zeros(*shape, obs_dim, device=device),
            "actions": torch.zeros(*shape, act_dim, device=device),
            "rewards": torch.zeros(*shape, device=device),
            "terminations": torch.zeros(*shape, device=device),
            "truncations": torch.zeros(*shape, device=device),
        }
        self.capacity, self.num_envs, self.position, self.size = capacity, num_envs, 0, 0

    def add(self, **step: Tensor) -> None:
        """Store one step of all environments, [num_envs, ...] of each kind; the oldest step gives way."""
        for name, value in step.items():
            self.data[name][self.position] = value
        self.position = (self.position + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size: int, n_step: int, gamma: float, generator: Generator) -> tuple[Tensor, ...]:
        """Draw transitions of up to `n_step` steps, uniformly over all that is stored.

        Returns:
            obs, actions: where they start, [batch_size, ...].
            returns: discounted sum of their rewards, [batch_size].
            next_obs: where they lead, the true last observation if the episode ended.
            discounts: what the value of that counts, gamma^steps, and 0 after a termination.
        """
        kwargs = {"generator": generator, "device": generator.device}
        start = torch.randint(self.size, (batch_size, 1), **kwargs)  # 0 is the oldest step
        env = torch.randint(self.num_envs, (batch_size, 1), **kwargs)
        window = start + torch.arange(n_step, device=generator.device)
        stored = window < self.size  # a window ends at the newest step, not at the oldest one behind it
        at = (self.position - self.size + window) % self.capacity
        rewards, terminations, truncations = (self.data[key][at, env] for key in list(self.data)[3:])
        returns, steps = n_step_returns(rewards, (terminations + truncations) > 0, stored, gamma)
        first, last, env = at[:, 0], at.gather(1, steps[:, None] - 1)[:, 0], env[:, 0]
        discounts = gamma**steps * (1 - self.data["terminations"][last, env])
        obs, actions = self.data["obs"][first, env], self.data["actions"][first, env]
        return obs, actions, returns, self.data["next_obs"][last, env], discounts

    def state_dict(self) -> dict[str, Any]:
        """What is stored, without the empty part."""
        data = {name: value[: self.size] for name, value in self.data.items()}
        if self.size < self.capacity:  # a view would be saved with all it is a view of
            data = {name: value.clone() for name, value in data.items()}
        return data | {"position": self.position, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what was stored in a buffer of the same capacity."""
        self.position, self.size = state["position"], state["size"]
        for name, value in self.data.items():
            value[: self.size] = state[name]


# The algorithm


def n_step_returns(rewards: Tensor, ends: Tensor, stored: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Sum up discounted rewards over windows of n steps, until the episode ends or the data do.

    Args:
        rewards: of the steps of a window, [B, n].
        ends: whether the step ended the episode, bool [B, n].
        stored: whether the step exists, bool [B, n]; the first always does, and none does after one that does not.
        gamma: discount factor.

    Returns:
        The sums [B], and how many steps each has, int [B].
    """
    ended_before = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=1).cumsum(1) > 0
    counts = stored & ~ended_before
    discounts = gamma ** torch.arange(rewards.shape[1], device=rewards.device)
    return (rewards * discounts * counts).sum(1), counts.sum(1)


@torch.no_grad()
def critic_targets(policy: JointPolicy, critic: Critic, returns: Tensor, next_obs: Tensor, discounts: Tensor) -> Tensor:
    """y = R + discount * Q'(s', mu'^1(o'^1)..mu'^n(o'^n)) with the target networks (Lowe et al., eq. 6), [B]."""
    return returns + discounts * critic(next_obs, policy.mean(next_obs))


def critic_update(critic: Critic, optimizer: Adam, obs: Tensor, actions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Take one step of Q(s, a) towards the targets [B] by least squares; return what is logged."""
    values = critic(obs, actions)
    loss = (values - targets).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"q_loss": loss.detach(), "q_value": values.detach().mean()}


def actor_update(
    policy: JointPolicy, optimizer: Adam, critic: Critic, obs: Tensor, actions: Tensor
) -> list[dict[str, Tensor]]:
    """Take one step of every actor up Q(s, a^1.., mu^i(o^i), ..a^n) (Lowe et al., eq. 5); return what is logged.

    The other agents' actions are those of the buffer [B, act_dim]. So no two terms have an actor in common, and the
    gradient of their sum is each actor's own. The critic only passes it on.
    """
    joint_actions = []
    for actor, obs_ids, act_ids in zip(policy.actors, policy.obs_ids, policy.act_ids, strict=True):
        joint_actions.append(actions.clone())
        joint_actions[-1][:, act_ids] = actor(obs[:, obs_ids])
    losses = -critic(obs.expand(len(joint_actions), -1, -1), torch.stack(joint_actions)).mean(1)  # one per agent
    params = [param for actor in policy.actors for param in actor.parameters()]
    for param, gradient in zip(params, torch.autograd.grad(losses.sum(), params), strict=True):
        param.grad = gradient
    optimizer.step()
    return [{"policy_loss": loss} for loss in losses.detach()]


@torch.no_grad()
def polyak(targets: Iterable[nn.Module], networks: Iterable[nn.Module], tau: float) -> None:
    """Move target networks towards the networks: target = (1 - tau) * target + tau * network."""
    for target, network in zip(targets, networks, strict=True):
        for target_param, param in zip(target.parameters(), network.parameters(), strict=True):
            target_param.lerp_(param, tau)


# Main

# What a resumed run may do otherwise than before. (Other --num-threads or --cuda: other last bits.)
MAY_CHANGE = {
    *("total_timesteps", "run_dir", "resume", "checkpoint_interval", "eval_interval", "eval_episodes", "eval_only"),
    *("capture_video", "num_threads", "cuda", "track", "wandb_project_name", "wandb_entity"),
}


def usage_error(message: object) -> NoReturn:
    """Say in one line what is wrong with the command, and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args, checkpoint: dict[str, Any] | None) -> None:
    """Exit with a usage error if a value makes no sense, or contradicts the checkpoint to resume from."""
    sizes = "total_timesteps", "num_envs", "num_steps", "buffer_size", "batch_size", "n_step", "updates_per_step"
    counts = "seed", "num_threads", "checkpoint_interval", "eval_interval", "eval_episodes", "learning_starts"
    rules = (
        ((*sizes, "learning_rate", "critic_learning_rate", "hidden_sizes"), lambda x: np.min(x) > 0, "greater than 0"),
        ((*counts, "exploration_noise"), lambda x: x >= 0, "0 or greater"),
        (("gamma", "tau"), lambda x: 0 <= x <= 1, "from 0 to 1"),
    )
    for names, holds, words in rules:
        for name in names:
            if not np.size(getattr(args, name)) or not holds(getattr(args, name)):
                usage_error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be {words}")
    batch_size = args.num_envs * args.num_steps
    if args.buffer_size < args.num_envs * args.n_step:
        usage_error(f"--buffer-size {args.buffer_size} is less than --n-step {args.n_step} steps of all environments")
    if args.total_timesteps < batch_size:
        usage_error(f"--total-timesteps {args.total_timesteps} is less than one iteration of {batch_size} steps")
    if args.eval_only and not args.resume:
        usage_error("--eval-only needs --resume RUN_DIR: there is no model to evaluate")
    if checkpoint:
        for name in asdict(args).keys() - MAY_CHANGE:
            value, before = getattr(args, name), checkpoint["args"][name]
            if value != before:
                usage_error(f"--{name.replace('_', '-')} {value} contradicts the run to resume, which has {before}")
        step = checkpoint["iteration"] * batch_size
        if args.total_timesteps < step + batch_size and not args.eval_only:
            usage_error(f"--total-timesteps {args.total_timesteps}: the run has {step} already, raise it to go on")


def parse_args() -> Args:
    """Read the command line; with --resume, what it leaves out is as in the checkpoint."""
    args = tyro.cli(Args, description=__doc__)
    if not args.resume:
        return args
    return tyro.cli(Args, description=__doc__, default=Args(**load_checkpoint(args.resume)["args"]))


def make_run_dir(args: Args) -> Path:
    """Create the run's directory; exit with a usage error if it exists or cannot be written."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.run_dir or Path("runs", re.sub(r"[^\w.-]", "_", name)))
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        usage_error(f"--run-dir {run_dir} exists already: choose another, or --resume it; nothing in it was touched")
    except OSError as e:
        usage_error(f"--run-dir {run_dir} cannot be made: {e.strerror}")
    return run_dir


def save(state: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all: a kill or a full disk leaves what was there before."""
    with open(path.with_suffix(".tmp"), "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(resume: str) -> dict[str, Any]:
    """Read a checkpoint, of a run directory the newest; exit with a usage error if it is none of this script's.

    Nothing in the file is executed (weights_only).
    """
    path = Path(resume)
    files = sorted(path.glob("checkpoint_*.pt")) if path.is_dir() else [path]
    if not files:
        usage_error(f"--resume {path}: there is no checkpoint in it")
    try:
        checkpoint = torch.load(files[-1], map_location="cpu", weights_only=True)
        if checkpoint["script"] != Path(__file__).stem or checkpoint["args"].keys() != asdict(Args()).keys():
            raise ValueError
    except Exception:  # torch.load raises whatever the bytes lead it to
        hint = f"; the one before it is --resume {files[-2]}" if len(files) > 1 else ""
        usage_error(f"--resume {files[-1]} is torn, missing, or no checkpoint of {Path(__file__).name}{hint}")
    return checkpoint


def describe_run(args: Args) -> dict[str, Any]:
    """What it takes to repeat a run: command, arguments, commit, versions, machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    packages = "torch", "numpy", "mujoco", "gymnasium"
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "args": asdict(args),
        "commit": commit,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def evaluate(env: NormalizedEnv, policy: JointPolicy, seed: int, film: Film | None = None) -> dict[str, float]:
    """Play one episode with the means of the policy in each environment; return what is logged.

    The start states are the same every time. The training does not notice: its generators and statistics stay.
    """
    start, episodes, unfinished = time.time(), [], np.ones(env.vec.num_envs, dtype=bool)
    obs = env.reset(seed + 1_000_000)  # far from the training's seeds
    while unfinished.any():
        if film and unfinished[0]:
            film.capture()
        obs, *_, infos = env.step(policy.mean(obs))
        if "_episode" in infos:
            done, episode = infos["_episode"] & unfinished, infos["episode"]
            episodes += zip(episode["r"][done].tolist(), episode["l"][done].tolist(), strict=True)
            unfinished &= ~done  # the first episode of each counts: short ones must not crowd out long ones
    returns, lengths = np.transpose(episodes)
    stats = {"": returns.mean(), "_std": returns.std(), "_min": returns.min(), "_max": returns.max()}
    log = {f"eval/episodic_return{suffix}": float(value) for suffix, value in stats.items()}
    return log | {"eval/episodic_length": float(lengths.mean()), "eval/seconds": time.time() - start}


def available_memory(device: torch.device) -> int:
    """Bytes of memory that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")  # Linux; elsewhere all of the memory
    if meminfo.exists():
        return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text())[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main(args: Args) -> None:
    """Train."""
    # Setup
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    check_args(args, checkpoint)
    use_cuda = args.cuda and torch.cuda.is_available()
    if args.cuda and not use_cuda:
        print("--cuda: PyTorch finds no GPU, training on the CPU", file=sys.stderr)
    device = torch.device("cuda" if use_cuda else "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA need it
    torch.use_deterministic_algorithms(args.torch_deterministic)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    generator = Generator(device).manual_seed(args.seed)
    try:
        sizes = args.num_envs, max(1, args.eval_episodes)
        vec, eval_vec = (envs.make_vec(args.env_id, n, args.agent_obsk, args.num_threads) for n in sizes)
    except ValueError as e:
        usage_error(e)
    # What is in the buffer outlives the statistics: `env` leaves it raw, and what is drawn is normalised by the newest.
    env, eval_env = NormalizedEnv(vec, args.gamma, device, float("inf")), NormalizedEnv(eval_vec, args.gamma, device)
    env.training = eval_env.training = False
    obs_rms, normalize_obs = eval_env.obs_rms, eval_env.normalize_obs
    partition, num_agents = vec.partition, vec.partition.num_agents
    obs_dim, act_dim = vec.single_observation_space.shape[0], vec.single_action_space.shape[0]

    init_generator = Generator().manual_seed(args.seed)  # on the CPU: the same networks on every device
    sizes = [(len(o), len(a)) for o, a in zip(partition.obs_ids, partition.act_ids, strict=True)]
    actors = [Actor(*size, args.hidden_sizes, init_generator).to(device) for size in sizes]
    critic = Critic(obs_dim, act_dim, args.hidden_sizes, init_generator).to(device)
    target_actors, target_critic = copy.deepcopy(actors), copy.deepcopy(critic)
    policy, target_policy = JointPolicy(actors, partition), JointPolicy(target_actors, partition)
    actor_params = [param for actor in actors for param in actor.parameters()]
    actor_optimizer = Adam(actor_params, lr=args.learning_rate, fused=True)
    critic_optimizer = Adam(critic.parameters(), lr=args.critic_learning_rate, fused=True)
    networks = {f"agent_{i}": actor for i, actor in enumerate(actors)} | {"critic": critic}
    saved = networks | {f"target_agent_{i}": actor for i, actor in enumerate(target_actors)}
    saved |= {"target_critic": target_critic, "env": env, "obs_rms": obs_rms}
    saved |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}

    # Storage
    if not args.eval_only:
        bytes_per_step = 4 * (2 * obs_dim + act_dim + 3)
        needed, available = args.buffer_size * bytes_per_step, available_memory(device)
        mib = f"{needed / 2**20:.0f} MiB"
        if needed > available:
            fits = int(0.5 * available / bytes_per_step)
            usage_error(f"the replay buffer needs {mib}, {available / 2**20:.0f} are free: --buffer-size {fits}")
        print(f"replay buffer: {mib} for {args.buffer_size} transitions", flush=True)
        buffer = ReplayBuffer(args.buffer_size // args.num_envs, args.num_envs, obs_dim, act_dim, device)
        saved |= {"buffer": buffer}

    # Resume
    obs, start_iteration, start_time, run_id = env.reset(args.seed), 0, time.time(), f"{time.time_ns():x}"
    last_returns: deque[float] = deque(maxlen=20)
    if checkpoint:
        for name, part in saved.items():
            part.load_state_dict(checkpoint.pop(name))  # and let go of it: the buffer is large
        generator.set_state(checkpoint["generator"])
        obs, start_iteration, run_id = checkpoint["obs"].to(device), checkpoint["iteration"], checkpoint["run_id"]
        start_time -= checkpoint["seconds"]
        last_returns.extend(checkpoint["last_returns"])

    # Log
    batch_size = args.num_envs * args.num_steps
    start_step, num_iterations = start_iteration * batch_size, args.total_timesteps // batch_size
    if args.eval_only:
        num_iterations = start_iteration
    if args.track and importlib.util.find_spec("wandb") is None:
        usage_error("--track needs Weights & Biases: pip install wandb")
    try:
        film = Film(eval_vec) if args.capture_video else None
    except RuntimeError as e:
        usage_error(f"--capture-video: {e}")
    run_dir = Path(args.resume) if args.resume else make_run_dir(args)
    run_dir = run_dir.parent if run_dir.is_file() else run_dir
    if not args.eval_only:
        description = describe_run(args)
        with open(run_dir / "run.jsonl", "a") as f:  # a line per start
            f.write(json.dumps(description) + "\n")
        if args.track:
            import wandb

            project, entity = args.wandb_project_name, args.wandb_entity
            wandb_args = {"id": run_id, "resume": "allow", "name": run_dir.name, "config": description}
            wandb.init(project=project, entity=entity, sync_tensorboard=True, **wandb_args)
        # What was logged after the checkpoint will be logged again: purge_step makes readers forget the first time.
        writer = SummaryWriter(str(run_dir), purge_step=start_step + 1 if checkpoint else None)
        writer.add_text("args", "\n".join(f"- {key}: {value}" for key, value in asdict(args).items()), start_step)
    signals: list[int] = []

    def finish_iteration(number: int, _: object) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    signal.signal(signal.SIGINT, finish_iteration)
    signal.signal(signal.SIGTERM, finish_iteration)
    total = num_iterations * batch_size
    bar = tqdm(total=total, initial=start_step, unit="step", disable=args.eval_only or not sys.stderr.isatty())

    for iteration in range(start_iteration + 1, num_iterations + 1):
        global_step = iteration * batch_size
        log: dict[str, float] = {}

        # Rollout, with updates between the steps
        episodes: list[tuple[float, int]] = []
        critic_stats: dict[str, Tensor] = {}
        stats: list[dict[str, Tensor]] = [{} for _ in actors]
        for step in range(global_step - batch_size, global_step, args.num_envs):
            obs_rms.update(obs.double())
            shape = args.num_envs, act_dim
            if step < args.learning_starts:
                actions = 2 * torch.rand(shape, generator=generator, device=device) - 1
            else:
                noise = torch.randn(shape, generator=generator, device=device)
                actions = (policy.mean(normalize_obs(obs)) + args.exploration_noise * noise).clamp(-1, 1)
            last_obs = obs
            obs, next_obs, rewards, terminations, truncations, infos = env.step(actions)
            transition = {"obs": last_obs, "next_obs": next_obs, "actions": actions, "rewards": rewards}
            buffer.add(**transition, terminations=terminations, truncations=truncations)
            if "_episode" in infos:
                done, episode = infos["_episode"], infos["episode"]
                episodes += zip(episode["r"][done].tolist(), episode["l"][done].tolist(), strict=True)

            # Updates: as many as are due
            before, after = (s - args.learning_starts for s in (step, step + args.num_envs))
            due = int(max(0, after) * args.updates_per_step) - int(max(0, before) * args.updates_per_step)
            for _ in range(due):
                sample = buffer.sample(args.batch_size, args.n_step, args.gamma, generator)
                b_obs, b_actions, b_returns, b_next_obs, b_discounts = sample
                b_obs, b_next_obs = normalize_obs(b_obs), normalize_obs(b_next_obs)
                targets = critic_targets(target_policy, target_critic, b_returns, b_next_obs, b_discounts)
                critic_stats = critic_update(critic, critic_optimizer, b_obs, b_actions, targets)
                stats = actor_update(policy, actor_optimizer, critic, b_obs, b_actions)
                polyak([*target_actors, target_critic], [*actors, critic], args.tau)

        # Evaluation
        last = iteration == num_iterations
        interval = args.eval_interval or args.total_timesteps
        if args.eval_episodes and (last or global_step % interval < batch_size):
            log |= evaluate(eval_env, policy, args.seed)
            start_time += log["eval/seconds"]  # SPS is the speed of training

        # Logging
        log |= {f"losses/{key}": value.item() for key, value in critic_stats.items()}
        log["charts/SPS"] = global_step / (time.time() - start_time)
        log |= {f"agent_{i}/{key}": value.item() for i in range(num_agents) for key, value in stats[i].items()}
        if episodes:
            log["charts/episodic_return"], log["charts/episodic_length"] = np.mean(episodes, axis=0).tolist()
            last_returns.extend(episode_return for episode_return, _ in episodes)
        if num_diverged := getattr(vec.unwrapped, "num_diverged", 0):  # rare: shown once there is one
            log["charts/num_diverged"] = num_diverged
        # All in one event: `add_scalar` for each takes 15 times as long.
        values = [Summary.Value(tag=key, simple_value=value) for key, value in log.items()]
        writer.file_writer.add_summary(Summary(value=values), global_step)
        shown = f"episodic_return {np.mean(last_returns) if last_returns else np.nan:.1f}"
        shown += f" diverged simulations {num_diverged}" if num_diverged else ""
        bar.set_postfix_str(shown, refresh=False)
        bar.update(batch_size)
        if bar.disable and (iteration % 10 == 0 or last):
            print(f"step {global_step} {shown} SPS {log['charts/SPS']:.0f}", flush=True)

        # Checkpoint
        finite = {key: np.isfinite(value) for key, value in log.items()}
        states = {name: net.state_dict() for name, net in networks.items()}
        finite |= {f"{net}/{key}": p.isfinite().all() for net, params in states.items() for key, p in params.items()}
        if not all(finite.values()):
            writer.close()
            save(states, run_dir / "not_finite.pt")
            bad = ", ".join(key for key, is_finite in finite.items() if not is_finite)
            print(f"error: not finite at step {global_step}: {bad}; {run_dir} has all up to there", file=sys.stderr)
            raise SystemExit(1)
        stopped = last or signals
        if stopped or iteration % (args.checkpoint_interval or num_iterations) == 0:
            writer.flush()  # first: a checkpoint never runs ahead of the log
            state = {name: part.state_dict() for name, part in saved.items()} | {"generator": generator.get_state()}
            state |= {"obs": obs, "iteration": iteration, "seconds": time.time() - start_time, "run_id": run_id}
            state |= {"last_returns": list(last_returns), "script": Path(__file__).stem, "args": asdict(args)}
            save(state, run_dir / f"checkpoint_{global_step:012}.pt")
            for old in sorted(run_dir.glob("checkpoint_*.pt"))[:-2]:
                old.unlink()
            ids = {"obs_ids": partition.obs_ids, "act_ids": partition.act_ids}
            model = states | {key: [i.tolist() for i in value] for key, value in ids.items()}
            save(model | {"obs_rms": obs_rms.state_dict(), "args": asdict(args)}, run_dir / "model.pt")
        if stopped:
            writer.close()
            bar.close()
        if signals and not last:
            print(f"stopped at step {global_step}; to go on: --resume {run_dir}", file=sys.stderr)
            raise SystemExit(128 + signals[0])

    if args.eval_only or film:
        if film:
            film.open(run_dir / f"video_{num_iterations * batch_size}")
        result = evaluate(eval_env, policy, args.seed, film)
        print(" ".join(f"{key} {value:.1f}" for key, value in result.items()))
        if film:
            film.close()
    vec.close()
    eval_vec.close()


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's thread fails quietly: its error is raised again here
    try:
        main(parse_args())
    except OSError as e:  # a full or read-only disk, a deleted directory: what was saved before is whole
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None
