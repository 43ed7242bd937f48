"""MADDPG on Multi-Agent MuJoCo: deterministic actors and one off-policy critic.

    python maddpg_mamujoco.py --env-id HalfCheetah-6x1
    tensorboard --logdir runs

"Multi-Agent Actor-Critic for Mixed Cooperative-Competitive Environments"
(Lowe et al., arXiv 1706.02275, alg. 1).

The agents share the reward, so there is one critic, not one for each agent.
"""

import copy
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NoReturn
from zipfile import ZipFile

import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

SCRIPT = Path(__file__).stem
KEPT = ("env_id", "seed", "agent_obsk", "num_envs", "hidden_sizes", "buffer_size")  # on --resume
MAX_EPISODE_STEPS = 100_000  # an evaluation cuts longer episodes
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass
class Args:
    """Command line. A value outside its type's range is refused."""

    # Experiment
    env_id: str = "HalfCheetah-6x1"
    """<Robot>-<partition>, such as Ant-4x2 or "Ant-[[0,3],[1,2]]", or <Gymnasium id>-<partition>"""
    agent_obsk: NonNegativeInt | None = None
    """None: agents see the whole state; k: the root, their joints, positions up to k joints away"""
    seed: NonNegativeInt = 1
    """random seed of the environments, networks, actions and updates"""
    total_timesteps: PositiveInt = 1_000_000
    """environment steps of the run, summed over the environments"""
    run_dir: str = ""
    """new directory for log, checkpoint and model; "": runs/<env id>__<script>__<seed>__<time>"""
    resume: str = ""
    """continue the run in this directory; flags that are not given keep that run's values"""
    allow_import: bool = False
    """let --resume import the module that the run's env_id names, if you trust the run"""
    checkpoint_interval: PositiveInt = 200_000
    """environment steps between checkpoints, which hold the replay buffer"""
    eval_interval: PositiveInt = 100_000
    """environment steps between evaluations"""
    eval_episodes: NonNegativeInt = 10
    """episodes per evaluation, played without noise; 0 never evaluates"""
    cuda: bool = False
    """train on the GPU, if there is one"""
    num_threads: NonNegativeInt = 0
    """CPU threads of the physics; 0 is one per core"""
    track: bool = False
    """log to Weights & Biases as well (pip install wandb), in the project WANDB_PROJECT"""
    wandb_run_id: str = ""
    """Weights & Biases run to continue; a resumed run continues its own"""

    # Algorithm
    num_envs: PositiveInt = 20
    """parallel environments"""
    num_steps: PositiveInt = 100
    """steps in each environment between two points of the log"""
    buffer_size: PositiveInt = 1_000_000
    """transitions in the replay buffer"""
    learning_starts: NonNegativeInt = 10_000
    """environment steps with uniformly random actions, before the first update"""
    updates_per_step: Rate = 0.1
    """updates per environment step; 0.1 is two for every step of 20 environments"""
    batch_size: PositiveInt = 256
    """transitions per update"""
    n_step: PositiveInt = 5
    """rewards in a target before it bootstraps (fewer at an episode's end); the paper has 1"""
    learning_rate: Rate = 5e-4
    """learning rate of the actors"""
    critic_learning_rate: Rate = 1e-3
    """learning rate of the critic"""
    gamma: Fraction = 0.99
    """discount factor"""
    tau: Fraction = 0.005
    """fraction of the way that the target networks move to the networks per update"""
    exploration_noise: Fraction = 0.1
    """standard deviation of the noise on the actions, which go from -1 to 1"""
    hidden_sizes: tuple[PositiveInt, ...] = (128, 128)
    """hidden layers of actors and critic"""


# Networks


def mlp(sizes: Sequence[int], output_gain: float) -> nn.Sequential:
    """Linear layers with ReLU between them; orthogonal weights, zero biases (as in CleanRL)."""
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        layer = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(layer.weight, 2**0.5)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU(inplace=True)]
    nn.init.orthogonal_(layer.weight, output_gain)  # the last layer has a gain of its own
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Deterministic policy of one agent."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args) -> None:
        """Make the network from what the agent sees to its actions."""
        super().__init__()
        self.net = mlp((obs_dim, *args.hidden_sizes, act_dim), 0.01)

    def forward(self, obs: Tensor) -> Tensor:
        """Observations [B, obs_dim_i] to actions in [-1, 1], [B, act_dim_i]."""
        return torch.tanh(self.net(obs))


class Critic(nn.Module):
    """Q(s, a^1..a^n): the value of the joint action in the full state."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args) -> None:
        """Make the network for flat observations and actions."""
        super().__init__()
        self.net = mlp((obs_dim + act_dim, *args.hidden_sizes, 1), 1.0)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Flat observations [..., obs_dim] and actions [..., act_dim] to values [...]."""
        return self.net(torch.cat([obs, actions], dim=-1)).squeeze(-1)


# The algorithm


def n_step_returns(
    rewards: Tensor, ends: Tensor, stored: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Sum up discounted rewards over windows of n steps, until the episode ends or the data do.

    `rewards` [B, n] are of the steps of a window, `ends` [B, n] says whether a step ended the episode,
    `stored` [B, n] which steps are in the buffer: the first always is, and no step after one that is
    not. Returns the sums [B], and how many steps each has, int [B].
    """
    num_ends_before = ends.cumsum(1) - ends.long()
    used = stored & (num_ends_before == 0)
    discounts = gamma ** torch.arange(rewards.shape[1], device=rewards.device)
    return (rewards * discounts * used).sum(1), used.sum(1)


class ReplayBuffer:
    """The last steps of all environments, in tensors that are allocated once."""

    def __init__(
        self, capacity: int, num_envs: int, obs_dim: int, act_dim: int, device: torch.device
    ) -> None:
        """Allocate [capacity, num_envs, ...] for each kind of data."""
        shape = (capacity, num_envs)
        self.data = {
            "obs": torch.zeros(*shape, obs_dim, device=device),
            "next_obs": torch.zeros(*shape, obs_dim, device=device),
            "actions": torch.zeros(*shape, act_dim, device=device),
            "rewards": torch.zeros(shape, device=device),
            "terminations": torch.zeros(shape, device=device),
            "truncations": torch.zeros(shape, device=device),
        }
        self.capacity = capacity
        self.num_envs = num_envs
        self.device = device
        self.position = 0  # where the next step goes
        self.size = 0

    def add(self, **step: Tensor) -> None:
        """Store one step of all environments, [num_envs, ...] of each kind, over the oldest one."""
        for name, value in step.items():
            self.data[name][self.position] = value
        self.position = (self.position + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size: int, n_step: int, gamma: float) -> tuple[Tensor, ...]:
        """Draw transitions of up to `n_step` steps, uniformly over all that is stored.

        Returns the observations and actions [B, ...] where the windows start; the discounted sums of
        the windows' rewards [B]; the observations [B, obs_dim] that the windows lead to, the last one
        of an episode that ended; and the discounts [B] of their values: gamma^steps, or 0 after a
        termination.
        """
        age = torch.randint(self.size, (batch_size, 1)).to(self.device)  # 0 is the oldest step
        column = torch.randint(self.num_envs, (batch_size, 1)).to(self.device)  # which environment
        window = age + torch.arange(n_step, device=self.device)  # [B, n]
        stored = window < self.size  # a window ends at the newest step
        rows = (self.position - self.size + window) % self.capacity
        terminations = self.data["terminations"][rows, column]
        ends = (terminations + self.data["truncations"][rows, column]) > 0
        # Not in the paper (--n-step 1): targets of more than one reward.
        returns, steps = n_step_returns(self.data["rewards"][rows, column], ends, stored, gamma)
        first = rows[:, 0]
        last = rows.gather(1, steps[:, None] - 1).squeeze(1)  # row of the window's last step
        column = column.squeeze(1)  # [B]
        discounts = gamma**steps * (1 - self.data["terminations"][last, column])
        obs = self.data["obs"][first, column]
        actions = self.data["actions"][first, column]
        next_obs = self.data["next_obs"][last, column]
        return obs, actions, returns, next_obs, discounts

    def state_dict(self) -> dict:
        """What is stored, without a copy."""
        return self.data | {"position": self.position, "size": self.size}

    def load_state_dict(self, state: dict) -> None:
        """Restore what was stored in a buffer of the same capacity."""
        self.position = state["position"]
        self.size = state["size"]
        for name, value in self.data.items():
            value.copy_(state[name])


def critic_update(
    critic: Critic, optimizer: Adam, obs: Tensor, actions: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Take one step of Q(s, a) towards the targets [B] by least squares; return what is logged."""
    values = critic(obs, actions)
    loss = mse_loss(values, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"losses/q_loss": loss.detach(), "losses/q_value": values.detach().mean()}


def actor_update(
    actors: Sequence[Actor],
    optimizer: Adam,
    critic: Critic,
    obs: Tensor,
    agents_obs: Sequence[Tensor],
    actions: Tensor,
    act_ids: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Take one step of every actor up Q(s, a^1.., mu^i(o^i), ..a^n) (Lowe et al., eq. 5).

    Agent i sees `agents_obs[i]` [B, obs_dim_i] of `obs` [B, obs_dim] and acts on the entries
    `act_ids[i]` of `actions` [B, act_dim]; the others' actions stay those of the replay buffer. Each
    loss depends on one actor, so the gradient of their sum is each actor's own. Returns what is
    logged.
    """
    joint_actions = []
    for actor, own_obs, ids in zip(actors, agents_obs, act_ids):
        joint_action = actions.clone()
        joint_action[:, ids] = actor(own_obs)
        joint_actions.append(joint_action)
    obs = obs.expand(len(joint_actions), -1, -1)
    losses = -critic(obs, torch.stack(joint_actions)).mean(1)  # one for each agent
    optimizer.zero_grad()
    losses.sum().backward(inputs=optimizer.param_groups[0]["params"])  # the critic gets no gradient
    optimizer.step()
    return {f"agent_{i}/policy_loss": loss for i, loss in enumerate(losses.detach())}


@torch.no_grad()
def polyak(targets: Sequence[Tensor], parameters: Sequence[Tensor], tau: float) -> None:
    """Move target parameters towards others: target = (1 - tau) * target + tau * parameter."""
    for target, parameter in zip(targets, parameters):
        target.lerp_(parameter, tau)


# The agents and their environment


class Policy(nn.Module):
    """All the agents: what each sees of the flat observation, its actor, the actuators it drives."""

    def __init__(self, partition: envs.Partition, args: Args, device: torch.device) -> None:
        """Make an actor for each agent, on the device."""
        super().__init__()
        self.device = device
        self.exploration_noise = args.exploration_noise
        self.obs_ids = [torch.as_tensor(ids) for ids in partition.obs_ids]
        self.act_ids = [torch.as_tensor(ids) for ids in partition.act_ids]
        self.flat_order = torch.cat(self.act_ids).argsort()  # from the agents' order to the robot's
        actors = [Actor(len(o), len(a), args) for o, a in zip(self.obs_ids, self.act_ids)]
        self.actors = nn.ModuleList(actors).to(device)

    def observe(self, obs: Tensor) -> list[Tensor]:
        """Flat observations [B, obs_dim] to what each agent sees, [B, obs_dim_i]."""
        return [obs[:, ids] for ids in self.obs_ids]

    def forward(self, obs: Tensor) -> Tensor:
        """Flat observations [B, obs_dim] to flat actions [B, act_dim] in [-1, 1]."""
        actions = [actor(own_obs) for actor, own_obs in zip(self.actors, self.observe(obs))]
        return torch.cat(actions, dim=1)[:, self.flat_order]

    @torch.no_grad()
    def act(self, obs: Tensor, *, noise: bool) -> Tensor:
        """Flat observations to flat actions on the CPU, with exploration noise or without."""
        actions = self(obs.to(self.device)).cpu()
        if noise:
            actions += self.exploration_noise * torch.randn(actions.shape)
        return actions.clamp(-1, 1)


class NormalizedEnv:
    """A vector environment with statistics of its observations, and actions in [-1, 1].

    The replay buffer stores raw observations; they are normalised when they are used.
    """

    def __init__(self, vec: VectorEnv, seed: int) -> None:
        """Start all episodes. Raises ValueError if `vec` is not as docs/your_environment.md says."""
        if vec.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError("the vector environment's autoreset_mode must be SAME_STEP")
        for space in (vec.single_observation_space, vec.single_action_space):
            if len(space.shape or ()) != 1:
                raise ValueError(f"the vector environment's spaces must be flat, not {space}")
        if not vec.single_action_space.is_bounded():
            raise ValueError("the vector environment's actions must have finite ranges")
        self.vec = vec
        self.obs_rms = RunningMeanStd(shape=vec.single_observation_space.shape)
        self.returns = np.zeros(vec.num_envs)  # of the running episodes
        self.lengths = np.zeros(vec.num_envs)
        self.finished = []  # (return, length) of finished episodes, until they are logged
        obs, _ = vec.reset(seed=seed)
        self.obs_rms.update(obs)
        self.obs = torch.tensor(obs, dtype=torch.float32)  # a copy: `vec` may use the array again

    def normalize(self, obs: np.ndarray | Tensor) -> Tensor:
        """Standardise observations [..., obs_dim] and clip them to [-10, 10]."""
        obs = torch.as_tensor(obs, dtype=torch.float32)
        mean = torch.tensor(self.obs_rms.mean).to(obs)
        std = torch.tensor(np.sqrt(self.obs_rms.var + 1e-8)).to(obs)
        return ((obs - mean) / std).clamp(-10, 10)

    def scale(self, actions: Tensor) -> np.ndarray:
        """Scale actions [..., act_dim] from [-1, 1] to the range of the actuators; clip them to it."""
        low = self.vec.single_action_space.low
        high = self.vec.single_action_space.high
        actions = (low + high) / 2 + (high - low) / 2 * actions.numpy()
        return np.clip(actions, low, high)  # samples can lie outside, and so can rounded values

    def step(self, actions: Tensor) -> tuple[Tensor, ...]:
        """Apply actions [num_envs, act_dim]; return next_obs, rewards, terminations, truncations.

        `next_obs` [num_envs, obs_dim] is what the actions led to, `self.obs` is where to act next.
        They differ where an episode ended: its last observation, and the first one of the next.
        """
        obs, rewards, terminations, truncations, infos = self.vec.step(self.scale(actions))
        self.obs_rms.update(obs)
        self.returns += rewards
        self.lengths += 1
        self.obs = torch.tensor(obs, dtype=torch.float32)
        next_obs = self.obs.clone()
        done = np.logical_or(terminations, truncations)
        if done.any():
            final_obs = np.stack(infos["final_obs"][done])
            next_obs[done] = torch.tensor(final_obs, dtype=torch.float32)
            self.finished += zip(self.returns[done], self.lengths[done])
            self.returns[done] = 0
            self.lengths[done] = 0
        rewards = torch.tensor(rewards)
        return next_obs, rewards, torch.tensor(terminations), torch.tensor(truncations)

    def state_dict(self) -> dict:
        """The statistics, and the simulations if `vec` can save them (`get_state`, `set_state`)."""
        episodes = np.stack([self.returns, self.lengths])
        state = {"obs": self.obs, "episodes": torch.tensor(episodes), "vec": None}
        rms = self.obs_rms
        state["obs_rms"] = [rms.mean.tolist(), rms.var.tolist(), float(rms.count)]
        if hasattr(self.vec, "get_state"):
            state["vec"] = self.vec.get_state()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned; without saved simulations new episodes start."""
        rms = self.obs_rms
        rms.mean, rms.var, rms.count = map(np.array, state["obs_rms"])
        if state["vec"] is None:
            print("this environment's state cannot be saved: new episodes start here")
            obs, _ = self.vec.reset()
            self.obs = torch.tensor(obs, dtype=torch.float32)
            return
        self.vec.set_state(state["vec"])
        self.obs = state["obs"]
        self.returns, self.lengths = state["episodes"].numpy()


def evaluate(vec: VectorEnv, env: NormalizedEnv, policy: Policy, seed: int) -> dict[str, float]:
    """Play one episode without noise in each environment of `vec`, with the statistics of `env`."""
    obs, _ = vec.reset(seed=seed)  # the same start states every time
    returns = np.zeros(vec.num_envs)
    lengths = np.zeros(vec.num_envs)
    running = np.full(vec.num_envs, True)
    while running.any() and lengths.max() < MAX_EPISODE_STEPS:
        actions = policy.act(env.normalize(obs), noise=False)
        obs, rewards, terminations, truncations, _ = vec.step(env.scale(actions))
        returns[running] += rewards[running]  # an episode that follows does not count
        lengths += running
        running &= ~(terminations | truncations)
    if running.any():
        print(f"evaluation: {running.sum()} episodes were cut after {MAX_EPISODE_STEPS} steps")
    return {
        "eval/episodic_return": returns.mean(),
        "eval/episodic_return_std": returns.std(),
        "eval/episodic_length": lengths.mean(),
    }


# Run


def fail(message: object) -> NoReturn:
    """Say in one line what is wrong with the arguments; exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args() -> tuple[Args, dict | None]:
    """Read the command line; return the arguments and, with --resume, the run's checkpoint.

    Flags that are not given beside --resume keep that run's values.
    """
    args = tyro.cli(Args, description=__doc__)
    checkpoint = None
    if args.resume:
        try:
            path = Path(args.resume, "checkpoint.pt")
            if ZipFile(path).testzip():
                fail(f"--resume {args.resume}: checkpoint.pt is damaged, a checksum is wrong")
            # Without mmap a changed flag in a zip header, which no checksum covers, changes the data.
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if checkpoint["script"] != SCRIPT:
                fail(f"--resume {args.resume}: {checkpoint['script']}.py made it, use that")
            default = Args(**checkpoint["args"])
            default.run_dir = args.resume
            default.resume = args.resume
        except Exception as e:  # torch.load raises whatever the bytes lead it to
            fail(f"--resume {args.resume}: no checkpoint can be read there ({type(e).__name__})")
        if ":" in default.env_id and not args.allow_import:
            fail(f"--resume {args.resume}: {default.env_id} imports a module, see --allow-import")
        args = tyro.cli(Args, description=__doc__, default=default)  # again, with the run's values
        for name in KEPT:
            if getattr(args, name) != getattr(default, name):
                fail(f"--resume {args.resume}: {name} must stay {getattr(default, name)}")
    if not args.run_dir:
        args.run_dir = f"runs/{args.env_id}__{SCRIPT}__{args.seed}__{time.time():.3f}"
    return args, checkpoint


def save(state: dict, path: Path) -> None:
    """Write a file whole or not at all: after a kill the old one is still there."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def main(args: Args, checkpoint: dict | None = None) -> None:
    """Train, from the checkpoint on if there is one."""
    # Setup
    # PyTorch's threads spin while they wait for each other, which is slow on a busy machine, and the
    # last bits of a result depend on their number: so PyTorch has one.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA's matrix products need it
    iteration_steps = args.num_envs * args.num_steps
    start_step = checkpoint["step"] if checkpoint else 0
    if args.total_timesteps < start_step + iteration_steps:
        fail(
            f"--total-timesteps {args.total_timesteps} must be at least {start_step + iteration_steps}"
        )
    if args.buffer_size < args.num_envs * args.n_step:
        fail(f"--buffer-size {args.buffer_size} must be at least {args.num_envs * args.n_step}")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    # `vec` seeds environment i with train_seed + i: with --seed itself two runs would share some.
    torch_seed, train_seed, eval_seed = np.random.SeedSequence(args.seed).generate_state(3).tolist()
    torch.manual_seed(torch_seed)
    try:
        vec = envs.make_vec(args.env_id, args.num_envs, args.agent_obsk, args.num_threads)
        eval_vec = envs.make_vec(
            args.env_id, max(1, args.eval_episodes), args.agent_obsk, args.num_threads
        )
        env = NormalizedEnv(vec, train_seed)
        (obs_dim,) = vec.single_observation_space.shape
        (act_dim,) = vec.single_action_space.shape
        if sorted(np.concatenate(vec.partition.act_ids)) != list(range(act_dim)):
            raise ValueError("the partition must give each entry of the action to one agent")
        policy = Policy(vec.partition, args, device)
    except ValueError as e:  # such as a partition that the robot does not have
        fail(e)
    critic = Critic(obs_dim, act_dim, args).to(device)
    target_policy = copy.deepcopy(policy)
    target_critic = copy.deepcopy(critic)
    parameters = [*policy.parameters(), *critic.parameters()]
    target_parameters = [*target_policy.parameters(), *target_critic.parameters()]
    actor_optimizer = Adam(policy.parameters(), fused=True)  # the rates are set below
    critic_optimizer = Adam(critic.parameters(), fused=True)

    # Storage
    buffer = ReplayBuffer(
        args.buffer_size // args.num_envs, args.num_envs, obs_dim, act_dim, device
    )

    # Resume
    saved = {
        "env": env,
        "policy": policy,
        "target_policy": target_policy,
        "actor_optimizer": actor_optimizer,
        "critic": critic,
        "target_critic": target_critic,
        "critic_optimizer": critic_optimizer,
        "buffer": buffer,
    }
    if checkpoint:
        try:
            for name, part in saved.items():
                part.load_state_dict(checkpoint[name])
        except Exception as e:
            fail(f"--resume {args.resume}: {args.env_id} or the script has changed: {e}")
        torch.set_rng_state(checkpoint["rng"])
    actor_optimizer.param_groups[0]["lr"] = args.learning_rate
    critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate

    # Log
    run_dir = Path(args.run_dir)
    if args.track:
        try:
            import wandb

            args.wandb_run_id = wandb.init(
                name=run_dir.name,
                id=args.wandb_run_id or None,
                resume="allow",
                config=asdict(args),
                sync_tensorboard=True,
            ).id
        except Exception as e:  # wandb is missing, or nobody has logged in
            fail(f"--track needs `pip install wandb` and `wandb login`: {e}")
    try:
        run_dir.mkdir(parents=True, exist_ok=args.run_dir == args.resume)
    except OSError as e:
        fail(f"--run-dir {run_dir} is taken or cannot be made: {e}")
    # The steps after the checkpoint are logged again: purge_step hides what was logged before.
    writer = SummaryWriter(run_dir, purge_step=start_step + 1)
    steps = range(start_step + iteration_steps, args.total_timesteps + 1, iteration_steps)
    print(f"{run_dir}: from step {start_step} to {steps[-1]}, {device.type}", flush=True)
    start_time = time.time()
    for global_step in tqdm(steps, disable=None):
        last = global_step == steps[-1]

        # Rollout, with updates between the steps
        log = {}
        for step in range(global_step - iteration_steps, global_step, args.num_envs):
            obs = env.obs
            if step < args.learning_starts:
                actions = 2 * torch.rand(args.num_envs, act_dim) - 1
            else:
                actions = policy.act(env.normalize(obs), noise=True)
            next_obs, rewards, terminations, truncations = env.step(actions)
            buffer.add(
                obs=obs,
                next_obs=next_obs,
                actions=actions,
                rewards=rewards,
                terminations=terminations,
                truncations=truncations,
            )

            # Updates: their number after s steps of learning is int(s * updates_per_step)
            steps_before = max(0, step - args.learning_starts)
            steps_after = max(0, step + args.num_envs - args.learning_starts)
            updates_before = int(steps_before * args.updates_per_step)
            updates_after = int(steps_after * args.updates_per_step)
            for _ in range(updates_after - updates_before):
                b_obs, b_actions, b_returns, b_next_obs, b_discounts = buffer.sample(
                    args.batch_size, args.n_step, args.gamma
                )
                b_obs = env.normalize(b_obs)
                b_next_obs = env.normalize(b_next_obs)
                with torch.no_grad():
                    # y = R + discount * Q'(s', mu'^1(o'^1)..mu'^n(o'^n)) (Lowe et al., eq. 6)
                    next_values = target_critic(b_next_obs, target_policy(b_next_obs))
                    targets = b_returns + b_discounts * next_values
                log |= critic_update(critic, critic_optimizer, b_obs, b_actions, targets)
                log |= actor_update(
                    policy.actors,
                    actor_optimizer,
                    critic,
                    b_obs,
                    policy.observe(b_obs),
                    b_actions,
                    policy.act_ids,
                )
                polyak(target_parameters, parameters, args.tau)

        # Logging
        log["losses/parameter_norm"] = nn.utils.get_total_norm(parameters)
        log["charts/SPS"] = (global_step - start_step) / (time.time() - start_time)
        log["charts/num_diverged"] = getattr(vec, "num_diverged", 0)
        if env.finished:
            episodic_return, episodic_length = np.mean(env.finished, axis=0)
            log["charts/episodic_return"] = episodic_return
            log["charts/episodic_length"] = episodic_length
            env.finished.clear()
        if last or global_step % args.eval_interval < iteration_steps:
            if args.eval_episodes:
                log |= evaluate(eval_vec, env, policy, eval_seed)
            summary = f"step {global_step}"
            for name in ("charts/SPS", "charts/episodic_return", "eval/episodic_return"):
                if name in log:
                    summary += f" {name} {log[name]:.1f}"
            with tqdm.external_write_mode():
                print(summary, flush=True)
        for name, value in log.items():
            if not np.isfinite(float(value)):
                writer.close()  # what was logged before shows how it came to this
                sys.exit(f"error: {name} is {float(value)} at step {global_step}")
            writer.add_scalar(name, value, global_step)

        # Checkpoint
        if last or global_step % args.checkpoint_interval < iteration_steps:
            writer.flush()  # first: a checkpoint never runs ahead of the log
            state = {name: part.state_dict() for name, part in saved.items()}
            model = {
                "script": SCRIPT,
                "args": asdict(args),
                "obs_rms": state["env"]["obs_rms"],
                "obs_ids": [ids.tolist() for ids in policy.obs_ids],
                "act_ids": [ids.tolist() for ids in policy.act_ids],
                "policy": state["policy"],
            }
            state |= model | {"step": global_step, "rng": torch.get_rng_state()}
            save(state, run_dir / "checkpoint.pt")
            save(model, run_dir / "model.pt")

    writer.close()
    print(f"finished; now: python evaluate.py {shlex.quote(args.run_dir)}")


if __name__ == "__main__":
    cli_args, cli_checkpoint = parse_args()
    try:
        main(cli_args, cli_checkpoint)
    except KeyboardInterrupt:
        hint = "nothing was saved"
        if Path(cli_args.run_dir, "checkpoint.pt").exists():
            hint = f"continue with --resume {shlex.quote(cli_args.run_dir)}"
        print(f"stopped; {hint}", file=sys.stderr)
        sys.exit(130)
