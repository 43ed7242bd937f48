"""MADDPG on Multi-Agent MuJoCo: deterministic actors, learnt off-policy through one critic of the joint action.

    python maddpg_mamujoco.py --env-id HalfCheetah-2x3
    tensorboard --logdir runs

Lowe et al., "Multi-Agent Actor-Critic for Mixed Cooperative-Competitive Environments", arXiv 1706.02275, algorithm 1,
for one shared reward: one critic instead of one per agent. Next to it: the on-policy scripts, whose form it has.
"""

import argparse
import copy
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from filelock import FileLock
from gymnasium.wrappers.utils import RunningMeanStd
from torch import Generator, Tensor, nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs


@dataclass
class Args:
    """Command line of the script."""

    # Experiment
    env_id: str = "HalfCheetah-6x1"
    """<Robot>-<partition>: HalfCheetah-6x1, Ant-4x2, "Walker2d-[[0,3],[1,4],[2,5]]", or <Gymnasium id>-<partition>"""
    agent_obsk: int | None = None  # what an agent sees: everything, or its own joints and positions up to k joints away
    seed: int = 1  # of everything random: environments, networks, action noise, minibatches, order of the agents
    total_timesteps: int = 1_000_000  # environment steps of the run, summed over the environments
    run_dir: str = ""  # where to write; must not exist; if not given, runs/<env_id>__<script>__<seed>__<time>
    resume: str = ""  # run directory to go on from: its arguments become the defaults of all the others
    checkpoint_interval: int = 200_000  # environment steps between checkpoints, which hold the replay buffer
    eval_interval: int = 100_000  # environment steps between evaluations
    eval_episodes: int = 10  # deterministic episodes per evaluation; 0 never evaluates
    cuda: bool = False  # train on the GPU, if there is one
    num_threads: int = 0  # CPU threads for PyTorch and for the physics each; 0 is one per core
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project_name: str = "mamujoco"  # Weights & Biases project

    # Algorithm
    num_envs: int = 20  # parallel environments
    num_steps: int = 100  # steps in each environment between two points of the log
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds; its memory is stated at the start
    learning_starts: int = 10_000  # environment steps with uniformly random actions, before the first update
    updates_per_step: float = 0.1  # updates per environment step; 0.1 is two for every step of 20 environments
    batch_size: int = 256  # transitions per update
    n_step: int = 5  # rewards in a target before it bootstraps; fewer where the episode ends
    learning_rate: float = 5e-4  # of the actors
    critic_learning_rate: float = 1e-3  # of the critic
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # share of the networks in their targets after an update (Polyak averaging)
    exploration_noise: float = 0.1  # standard deviation of the noise on actions, which go from -1 to 1
    hidden_sizes: tuple[int, ...] = (128, 128)  # hidden layers of actors and critic

    def __post_init__(self) -> None:
        """Name the run's directory; raise ValueError, which tyro shows, for a value that makes no sense."""
        name = f"{self.env_id}__{Path(__file__).stem}__{self.seed}__{time.time():.3f}"
        self.run_dir = self.run_dir or str(Path("runs", re.sub(r"[^\w.-]", "_", name)))
        for names, low, high in (
            ("num_envs num_steps n_step", 1, 10**5),
            ("hidden_sizes", 1, 10**4),
            ("checkpoint_interval eval_interval total_timesteps batch_size", 1, 10**12),
            ("seed num_threads eval_episodes learning_starts", 0, 2**31),
            ("learning_rate critic_learning_rate updates_per_step", 1e-12, 1e6),
            ("gamma tau exploration_noise", 0, 1),
            ("buffer_size", self.num_envs * self.n_step, 10**12),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not all(low <= x <= high for x in np.atleast_1d(value)) or value == ():
                    raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be from {low} to {high}")
        if self.total_timesteps < (step := self.num_envs * self.num_steps):
            raise ValueError(f"--total-timesteps {self.total_timesteps} is less than num_envs * num_steps, {step}")
        if self.track and not find_spec("wandb"):
            raise ValueError("--track needs Weights & Biases: pip install wandb")


# Environment


class NormalizedEnv:
    """A vector environment in the learner's terms: float32 tensors on its device, actions in [-1, 1].

    What goes to the replay buffer outlives the statistics: `step` leaves it raw, `normalize` takes the newest ones.
    """

    def __init__(self, vec: gym.vector.VectorEnv, device: torch.device) -> None:
        """Wrap `vec`. Raises ValueError if a step that ends an episode does not start the next one (SAME_STEP)."""
        if vec.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.SAME_STEP:
            raise ValueError("the vector environment's autoreset_mode must be SAME_STEP")
        self.vec, self.device = vec, device
        self.obs_rms = RunningMeanStd(shape=vec.single_observation_space.shape)
        low, high = vec.single_action_space.low, vec.single_action_space.high
        self.action_mid, self.action_half = (low + high) / 2, (high - low) / 2
        self.sums = np.zeros((2, vec.num_envs))  # of each episode so far: return, length
        self.episodes: list[list[float]] = []  # return and length of those that ended since this was last emptied

    def tensor(self, x: np.ndarray | Tensor) -> Tensor:
        """Put an array on the device as float32."""
        return torch.as_tensor(x, dtype=torch.float32, device=self.device)

    def normalize(self, obs: np.ndarray | Tensor) -> Tensor:
        """Standardise observations [..., obs_dim], clip them to [-10, 10]."""
        mean, std = self.tensor(self.obs_rms.mean), self.tensor(np.sqrt(self.obs_rms.var + 1e-8))
        return ((self.tensor(obs) - mean) / std).clamp(-10, 10)

    def scale(self, actions: Tensor) -> np.ndarray:
        """Clip actions [..., act_dim] to [-1, 1] and scale them to the actuators' range."""
        return self.action_mid + self.action_half * actions.clamp(-1, 1).cpu().numpy()

    def reset(self, seed: int) -> Tensor:
        """Start all episodes; return observations [num_envs, obs_dim]."""
        obs, _ = self.vec.reset(seed=seed)
        self.obs_rms.update(obs)
        self.obs = self.tensor(obs)
        return self.obs

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Apply actions [num_envs, act_dim]; return obs, next_obs, rewards, terminations, truncations, all float32.

        `obs` is where to act next, `next_obs` what the actions led to: they differ where an episode ended.
        """
        obs, rewards, terminations, truncations, infos = self.vec.step(self.scale(actions))
        self.obs_rms.update(obs)
        self.sums += [rewards, np.ones_like(rewards)]
        self.obs = next_obs = self.tensor(obs)
        if (done := terminations | truncations).any():
            next_obs = self.obs.clone()
            next_obs[done] = self.tensor(np.stack(infos["final_obs"][done]))
            self.episodes += self.sums[:, done].T.tolist()
            self.sums[:, done] = 0
        return self.obs, next_obs, *self.tensor(np.stack([rewards, terminations, truncations]))

    def state_dict(self) -> dict[str, Any]:
        """Statistics, and what the environments remember if they have `get_state` and `set_state`."""
        rms = [[np.asarray(x).tolist() for x in (r.mean, r.var, r.count)] for r in (self.obs_rms,)]
        vec = self.vec.get_state() if hasattr(self.vec, "get_state") else None
        return {"rms": rms, "vec": vec, "sums": self.sums.tolist(), "obs": self.obs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, or in new episodes if that was not saved; `reset` comes first."""
        if np.shape(state["sums"]) != self.sums.shape:
            raise ValueError("another number of environments")
        for rms, saved in zip((self.obs_rms,), state["rms"], strict=True):
            rms.mean, rms.var, rms.count = map(np.array, saved)
        if state["vec"] is None:
            return print("this environment has no get_state: new episodes start here")
        self.vec.set_state(state["vec"])
        self.sums, self.obs = np.array(state["sums"]), state["obs"].to(self.device)


# Networks


class MLP(nn.Module):
    """Linear layers with ReLU between, all parameters in one vector `theta` [P]; with theta [n, P] it is n networks."""

    def __init__(self, sizes: Sequence[int], output_gain: float, generator: Generator) -> None:
        """Orthogonal weights of gain sqrt(2), `output_gain` at the end; zero biases."""
        super().__init__()
        shapes, gains = list(pairwise(sizes)), [2**0.5] * (len(sizes) - 2) + [output_gain]
        layers = [[torch.empty(shape), torch.zeros(1, shape[1])] for shape in shapes]
        for (weight, _), gain in zip(layers, gains, strict=True):
            nn.init.orthogonal_(weight, gain, generator=generator)
        self.shapes = [tensor.shape for layer in layers for tensor in layer]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.theta = nn.Parameter(torch.cat([tensor.flatten() for layer in layers for tensor in layer]))

    def layers(self) -> list[Tensor]:
        """Views of theta: weight [..., fan_in, fan_out] and bias [..., 1, fan_out] of the first layer, the second..."""
        parts = self.theta.split(self.sizes, dim=-1)  # and what follows, if there is more
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=False)]

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., B, fan_in] to outputs [..., B, fan_out]."""
        *hidden, weight, bias = self.layers()
        for w, b in zip(hidden[::2], hidden[1::2], strict=True):
            x = (x @ w).add_(b).relu_()
        return x @ weight + bias


class Actor(MLP):
    """Deterministic policy."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args, generator: Generator) -> None:
        """Build the network from `obs_dim` inputs to `act_dim` actions."""
        super().__init__((obs_dim, *args.hidden_sizes, act_dim), 0.01, generator)

    def forward(self, obs: Tensor) -> Tensor:
        """Observations [..., B, obs_dim] to actions in [-1, 1], [..., B, act_dim]."""
        return torch.tanh(super().forward(obs))


class Critic(MLP):
    """Q(s, a^1..a^n): the value of the joint action in the full state."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args, generator: Generator) -> None:
        """Build the network for flat observations and actions."""
        super().__init__((obs_dim + act_dim, *args.hidden_sizes, 1), 1.0, generator)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Flat observations [..., obs_dim] and actions [..., act_dim] to values [...]."""
        return super().forward(torch.cat([obs, actions], dim=-1)).squeeze(-1)


class Policy(nn.Module):
    """All the actors at once: `joint` has a row of parameters for each."""

    def __init__(
        self, partition: envs.Partition, obs_dim: int, args: Args, generator: Generator, device: torch.device
    ) -> None:
        """Build the actors, all for the longest observation and action: a shorter observation is padded with zeros."""
        super().__init__()
        self.act_ids = [ids.tolist() for ids in partition.act_ids]
        num_agents, act_dims = partition.num_agents, [len(ids) for ids in self.act_ids]
        obs_ids = np.full((num_agents, max(map(len, partition.obs_ids))), obs_dim)  # `observe` puts a 0 there
        action_ids, agent_of = np.zeros((2, sum(act_dims)), dtype=int)
        for i, ids in enumerate(partition.obs_ids):
            obs_ids[i, : len(ids)] = ids
            action_ids[partition.act_ids[i]] = i * max(act_dims) + np.arange(act_dims[i])
            agent_of[partition.act_ids[i]] = i
        self.register_buffer("obs_ids", torch.as_tensor(obs_ids))
        self.register_buffer("action_ids", torch.as_tensor(action_ids))
        self.register_buffer("drives", torch.as_tensor(agent_of == np.arange(num_agents)[:, None]))
        self.joint, *actors = (Actor(obs_ids.shape[1], max(act_dims), args, generator) for _ in range(1 + num_agents))
        self.joint.theta = nn.Parameter(torch.stack([actor.theta.data for actor in actors]))
        self.to(device)

    def forward(self, obs: Tensor) -> Tensor:
        """Flat observations [B, obs_dim] to flat actions [B, act_dim]."""
        own = torch.cat([obs, torch.zeros_like(obs[..., :1])], dim=-1)[..., self.obs_ids].movedim(-2, 0)
        return self.joint(own).movedim(0, -2).flatten(-2)[..., self.action_ids]

    act = torch.no_grad()(forward)

    def export(self) -> dict[str, Any]:
        """The policy as plain tensors and lists: agent i's network on obs[obs_ids[i]] gives actions[act_ids[i]]."""
        agents = [[tensor.detach()[i].cpu() for tensor in self.joint.layers()] for i in range(len(self.act_ids))]
        return {"agents": agents, "obs_ids": self.obs_ids.tolist(), "act_ids": self.act_ids, "tanh": True}


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
        device = self.data["obs"].device
        start = torch.randint(self.size, (batch_size, 1), generator=generator).to(device)  # 0 is the oldest step
        env = torch.randint(self.num_envs, (batch_size, 1), generator=generator).to(device)
        window = start + torch.arange(n_step, device=device)
        stored = window < self.size  # a window ends at the newest step, not at the oldest one behind it
        at = (self.position - self.size + window) % self.capacity
        rewards, terminations, truncations = (self.data[key][at, env] for key in list(self.data)[3:])
        returns, steps = n_step_returns(rewards, (terminations + truncations) > 0, stored, gamma)
        first, last, env = at[:, 0], at.gather(1, steps[:, None] - 1)[:, 0], env[:, 0]
        discounts = gamma**steps * (1 - self.data["terminations"][last, env])
        obs, actions = self.data["obs"][first, env], self.data["actions"][first, env]
        return obs, actions, returns, self.data["next_obs"][last, env], discounts

    def state_dict(self) -> dict[str, Any]:
        """What is stored, without a copy."""
        return self.data | {"position": self.position, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what was stored in a buffer of the same capacity."""
        self.position, self.size = state["position"], state["size"]
        for name, value in self.data.items():
            value.copy_(state[name])


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
def critic_targets(policy: Policy, critic: Critic, returns: Tensor, next_obs: Tensor, discounts: Tensor) -> Tensor:
    """y = R + discount * Q'(s', mu'^1(o'^1)..mu'^n(o'^n)) with the target networks (Lowe et al., eq. 6), [B]."""
    return returns + discounts * critic(next_obs, policy(next_obs))


def critic_update(critic: Critic, optimizer: Adam, obs: Tensor, actions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Take one step of Q(s, a) towards the targets [B] by least squares; return what is logged."""
    values = critic(obs, actions)
    loss = (values - targets).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"q_loss": loss.detach(), "q_value": values.detach().mean()}


def actor_update(
    policy: Policy, optimizer: Adam, critic: Critic, obs: Tensor, actions: Tensor
) -> list[dict[str, Tensor]]:
    """Take one step of every actor up Q(s, a^1.., mu^i(o^i), ..a^n) (Lowe et al., eq. 5); return what is logged.

    The other agents' actions are those of the buffer [B, act_dim]. So no two terms have an actor in common, and the
    gradient of their sum is each actor's own. The critic only passes it on.
    """
    joint_actions = torch.where(policy.drives[:, None], policy(obs), actions)  # [num_agents, B, act_dim]
    losses = -critic(obs.expand(len(joint_actions), -1, -1), joint_actions).mean(1)  # one per agent
    policy.joint.theta.grad = torch.autograd.grad(losses.sum(), policy.joint.theta)[0]
    optimizer.step()
    return [{"policy_loss": loss} for loss in losses.detach()]


@torch.no_grad()
def polyak(targets: Iterable[nn.Module], networks: Iterable[nn.Module], tau: float) -> None:
    """Move target networks towards the networks: target = (1 - tau) * target + tau * network."""
    for target, network in zip(targets, networks, strict=True):
        for target_param, param in zip(target.parameters(), network.parameters(), strict=True):
            target_param.lerp_(param, tau)


# Run


def fail(message: object, code: int = 2) -> NoReturn:
    """Say in one line what is wrong, and exit."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def parse_args() -> tuple[Args, dict[str, Any] | None]:
    """Read the command line; with --resume, what it leaves out is as in the checkpoint, which is returned as well."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", default="")
    if not (run_dir := parser.parse_known_args()[0].resume):
        return tyro.cli(Args, description=__doc__), None
    try:
        checkpoint = torch.load(Path(run_dir, "checkpoint.pt"), map_location="cpu", weights_only=True)
        script, saved = checkpoint["script"], checkpoint["args"]
    except Exception as e:  # torch.load raises whatever the bytes lead it to
        fail(f"--resume {run_dir}: no checkpoint can be read there ({type(e).__name__})")
    if script != Path(__file__).stem:
        fail(f"--resume {run_dir}: {script}.py made it, use that")
    saved = {field.name: saved[field.name] for field in fields(Args) if field.name in saved}
    default = Args(**saved | {"run_dir": run_dir, "resume": run_dir})
    return tyro.cli(Args, description=__doc__, default=default), checkpoint


def save(state: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all: a kill or a full disk leaves what was there before."""
    try:
        with open(path.with_suffix(".tmp"), "wb") as file:
            torch.save(state, file)
    except RuntimeError as e:  # PyTorch's word for whatever stopped the file from being written
        raise e.__context__ or e from None
    path.with_suffix(".tmp").replace(path)


def evaluate(vec: gym.vector.VectorEnv, env: NormalizedEnv, policy: Policy, seed: int) -> dict[str, float]:
    """Play one episode without noise in each environment of `vec`, from the same start states every time."""
    obs, _ = vec.reset(seed=seed + 1_000_000)  # far from the training's seeds
    returns, lengths, running = np.zeros(vec.num_envs), np.zeros(vec.num_envs), np.ones(vec.num_envs, dtype=bool)
    while running.any():
        obs, rewards, terminations, truncations, _ = vec.step(env.scale(policy.act(env.normalize(obs))))
        returns, lengths = returns + running * rewards, lengths + running
        running &= ~(terminations | truncations)
    stats = {"": returns.mean(), "_std": returns.std(), "_min": returns.min(), "_max": returns.max()}
    return {f"eval/episodic_return{key}": x for key, x in stats.items()} | {"eval/episodic_length": lengths.mean()}


def available_memory(device: torch.device) -> int:
    """Bytes of memory that are free on the device; on the CPU, of the machine (Linux) and of the container (cgroup)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    free = [2**63]
    if meminfo.exists():
        free.append(1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text())[1]))
    if (limit := group / "memory.max").exists() and limit.read_text().strip() != "max":
        free.append(int(limit.read_text()) - int((group / "memory.current").read_text()))
    return min(free)


def main(args: Args, checkpoint: dict[str, Any] | None = None) -> None:
    """Train."""
    # Setup
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA need it
    torch.use_deterministic_algorithms(True)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    generator = Generator().manual_seed(args.seed)  # on the CPU: every device gets the same draws
    try:
        sizes = args.num_envs, max(1, args.eval_episodes)
        vec, eval_vec = (envs.make_vec(args.env_id, n, args.agent_obsk, args.num_threads) for n in sizes)
        env = NormalizedEnv(vec, device)
    except ValueError as e:
        fail(e)
    partition, num_agents = vec.partition, vec.partition.num_agents
    obs_dim, act_dim = vec.single_observation_space.shape[0], vec.single_action_space.shape[0]
    policy = Policy(partition, obs_dim, args, generator, device)
    critic = Critic(obs_dim, act_dim, args, generator).to(device)
    target_policy, target_critic = copy.deepcopy(policy), copy.deepcopy(critic)
    actor_optimizer = Adam(policy.parameters(), lr=args.learning_rate, fused=True)
    critic_optimizer = Adam(critic.parameters(), lr=args.critic_learning_rate, fused=True)
    saved = {"env": env, "policy": policy, "critic": critic, "target_policy": target_policy}
    saved |= {"target_critic": target_critic, "actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}

    # Storage
    bytes_per_step = 4 * (2 * obs_dim + act_dim + 3)
    needed, available = args.buffer_size * bytes_per_step, available_memory(device)
    if needed > available:
        fits = f"--buffer-size {available // 2 // bytes_per_step}"
        fail(f"the replay buffer needs {needed / 2**20:.0f} MiB, {available / 2**20:.0f} are free: {fits}")
    print(f"replay buffer: {needed / 2**20:.0f} MiB for {args.buffer_size} transitions", flush=True)
    buffer = ReplayBuffer(args.buffer_size // args.num_envs, args.num_envs, obs_dim, act_dim, device)
    saved |= {"buffer": buffer}

    # Resume
    obs, start_step, run_dir = env.reset(args.seed), 0, Path(args.run_dir)
    if checkpoint:
        try:
            if args.env_id != checkpoint["args"]["env_id"]:  # its sizes may be the same
                raise ValueError
            for name, part in saved.items():
                part.load_state_dict(checkpoint.pop(name))  # and let go of it: the buffer is large
        except (KeyError, RuntimeError, ValueError) as e:
            fail(f"--resume {args.resume}: robot, agents, networks, buffer and num_envs must stay ({type(e).__name__})")
        generator.set_state(checkpoint["generator"])
        obs, start_step = env.obs, checkpoint["step"]
        if args.total_timesteps < start_step + args.num_envs * args.num_steps:
            fail(f"--total-timesteps {args.total_timesteps}: the run has {start_step} already, raise it to go on")
    try:
        run_dir.mkdir(parents=True, exist_ok=args.run_dir == args.resume)
        lock = FileLock(run_dir / "lock")  # goes with the process
        lock.acquire(blocking=False)
    except OSError as e:
        fail(f"--run-dir {run_dir} is taken or cannot be made: {e}")

    # Log
    print(f"{run_dir}: from step {start_step} to {args.total_timesteps} on the {device.type}", flush=True)
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, name=run_dir.name, config=asdict(args), sync_tensorboard=True)
    # What was logged after the checkpoint will be logged again: purge_step makes readers forget the first time.
    writer = SummaryWriter(str(run_dir), purge_step=start_step + 1 if checkpoint else None)
    writer.add_text("args", "\n".join(f"- {key}: {value}" for key, value in asdict(args).items()), start_step)
    bar = tqdm(total=args.total_timesteps, initial=start_step, unit="step", disable=not sys.stderr.isatty())
    start_time = time.time()
    batch_size = args.num_envs * args.num_steps

    for global_step in range(start_step + batch_size, args.total_timesteps + 1, batch_size):
        last = global_step + batch_size > args.total_timesteps
        log: dict[str, float] = {}

        # Rollout, with updates between the steps
        critic_stats: dict[str, Tensor] = {}
        stats: list[dict[str, Tensor]] = [{} for _ in range(num_agents)]
        for step in range(global_step - batch_size, global_step, args.num_envs):
            shape = args.num_envs, act_dim
            if step < args.learning_starts:
                actions = 2 * torch.rand(shape, generator=generator).to(device) - 1
            else:
                noise = torch.randn(shape, generator=generator).to(device)
                actions = (policy.act(env.normalize(obs)) + args.exploration_noise * noise).clamp(-1, 1)
            last_obs = obs
            obs, next_obs, rewards, terminations, truncations = env.step(actions)
            transition = {"obs": last_obs, "next_obs": next_obs, "actions": actions, "rewards": rewards}
            buffer.add(**transition, terminations=terminations, truncations=truncations)

            # Updates: as many as are due
            before, after = (s - args.learning_starts for s in (step, step + args.num_envs))
            due = int(max(0, after) * args.updates_per_step) - int(max(0, before) * args.updates_per_step)
            for _ in range(due):
                sample = buffer.sample(args.batch_size, args.n_step, args.gamma, generator)
                b_obs, b_actions, b_returns, b_next_obs, b_discounts = sample
                b_obs, b_next_obs = env.normalize(b_obs), env.normalize(b_next_obs)
                targets = critic_targets(target_policy, target_critic, b_returns, b_next_obs, b_discounts)
                critic_stats = critic_update(critic, critic_optimizer, b_obs, b_actions, targets)
                stats = actor_update(policy, actor_optimizer, critic, b_obs, b_actions)
                polyak([target_policy, target_critic], [policy, critic], args.tau)

        # Logging
        log |= {f"losses/{key}": value.item() for key, value in critic_stats.items()}
        log["losses/parameter_norm"] = (policy.joint.theta.norm() + critic.theta.norm()).item()
        log |= {f"agent_{i}/{key}": value.item() for i in range(num_agents) for key, value in stats[i].items()}
        log["charts/SPS"] = (global_step - start_step) / (time.time() - start_time)
        log["charts/num_diverged"] = getattr(vec, "num_diverged", 0)
        if env.episodes:
            log["charts/episodic_return"], log["charts/episodic_length"] = np.mean(env.episodes, axis=0)
            bar.set_postfix_str(f"episodic_return {log['charts/episodic_return']:.1f}", refresh=False)
            env.episodes.clear()
        if last or global_step % args.eval_interval < batch_size:
            log |= evaluate(eval_vec, env, policy, args.seed) if args.eval_episodes else {}
            shown = "charts/episodic_return", "eval/episodic_return", "charts/SPS"
            tqdm.write(f"step {global_step} " + " ".join(f"{key} {log[key]:.1f}" for key in shown if key in log))
            sys.stdout.flush()
        for key, value in log.items():
            if not np.isfinite(value):
                fail(f"{key} is {value} at step {global_step}; {run_dir} has what was saved before", code=1)
            writer.add_scalar(key, value, global_step)
        bar.update(batch_size)

        # Checkpoint
        if last or global_step % args.checkpoint_interval < batch_size:
            writer.flush()  # first: a checkpoint never runs ahead of the log
            state = {name: part.state_dict() for name, part in saved.items()}
            state |= {"script": Path(__file__).stem, "args": asdict(args), "step": global_step}
            save(state | {"generator": generator.get_state()}, run_dir / "checkpoint.pt")
            save(policy.export() | {"obs_rms": state["env"]["rms"][0], "args": asdict(args)}, run_dir / "model.pt")

    writer.close()
    bar.close()
    print(f"{run_dir} is finished; now: tensorboard --logdir {run_dir.parent}, or python evaluate.py {run_dir}")


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's thread fails quietly: `flush` raises its error again
    cli_args, cli_checkpoint = parse_args()
    try:
        main(cli_args, cli_checkpoint)
    except KeyboardInterrupt:
        fail(f"stopped; to go on: --resume {cli_args.run_dir}", code=130)
    except (OSError, RuntimeError) as e:  # a full or read-only disk, a deleted directory, not enough memory
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        fail(f"{e}; {cli_args.run_dir} has what was saved before", code=1)
