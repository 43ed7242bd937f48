"""MAPPO on Multi-Agent MuJoCo: all agents update at once, with one critic.

    python mappo_mamujoco.py --env-id HalfCheetah-6x1
    tensorboard --logdir runs

"The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games"
(Yu et al., arXiv 2103.01955). Read the diff with happo_mamujoco.py.
"""

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
from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn.functional import mse_loss, pad
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

SCRIPT = Path(__file__).stem
KEPT = ("env_id", "seed", "agent_obsk", "num_envs", "hidden_sizes", "share_param")  # on --resume
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
    checkpoint_interval: PositiveInt = 20_000
    """environment steps between checkpoints"""
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
    """steps in each environment per iteration; the batch has num_envs * num_steps rows"""
    learning_rate: Rate = 5e-4
    """learning rate of the actors"""
    critic_learning_rate: Rate = 1e-3
    """learning rate of the critic"""
    anneal_lr: bool = False
    """learning rates decay linearly, to 0 at total_timesteps"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of the generalised advantage estimation"""
    update_epochs: PositiveInt = 5
    """passes of each actor over the batch per iteration"""
    critic_epochs: PositiveInt = 10
    """passes of the critic over the batch per iteration"""
    num_minibatches: PositiveInt = 2
    """minibatches per pass"""
    clip_coef: Fraction = 0.1
    """epsilon of the clipped objective"""
    ent_coef: Fraction = 0.0
    """coefficient of the entropy bonus"""
    max_grad_norm: PositiveFloat = 10.0
    """a gradient that Adam gets is clipped to this norm; inf never clips"""
    hidden_sizes: tuple[PositiveInt, ...] = (128, 128)
    """hidden layers of actors and critic"""
    log_std_init: FiniteFloat = -1.0
    """initial log standard deviation of the actions, which go from -1 to 1"""
    share_param: bool = False
    """ablation: one actor for all agents, with a one-hot agent id as further input"""


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
    """Gaussian policy of one agent; its standard deviations do not depend on the observation.

    Another policy is another `forward`: a distribution with one log-probability per row, such as
    Independent(Categorical(...), 1). Actions that are not from -1 to 1 need another `scale`, below.
    """

    def __init__(self, obs_dim: int, act_dim: int, args: Args) -> None:
        """Make the network from what the agent sees to the means of its actions."""
        super().__init__()
        self.net = mlp((obs_dim, *args.hidden_sizes, act_dim), 0.01)
        self.log_std = nn.Parameter(torch.full((act_dim,), args.log_std_init))

    def forward(self, obs: Tensor) -> Distribution:
        """Observations [B, obs_dim_i] to the distributions of B actions [act_dim_i]."""
        normal = Normal(self.net(obs), self.log_std.exp(), validate_args=False)
        return Independent(normal, 1, validate_args=False)  # an action's log-probability is a sum


# The algorithm


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    truncations: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) on the shared reward.

    All tensors are float, [T, num_envs]. `values` are V(s_t), `next_values` are V of the state that
    step t led to: the last one of the episode, if it ended. A termination (0 or 1) makes that value 0,
    a truncation (time limit) does not. Returns the advantages A_t, and A_t + V(s_t), the critic's
    targets.
    """
    deltas = rewards + gamma * (1 - terminations) * next_values - values
    not_done = (1 - terminations) * (1 - truncations)  # nothing crosses the end of an episode
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        last = deltas[t] + gamma * gae_lambda * not_done[t] * last
        advantages[t] = last
    return advantages, advantages + values


def approx_kl(logratio: Tensor) -> Tensor:
    """Estimate KL(old || new) from log(new / old) [B] of actions that old drew.

    This is the estimator k3 of http://joschu.net/blog/kl-approx.html, which is never negative.
    """
    return (logratio.exp() - 1 - logratio).mean()


def ppo_loss(
    actor: nn.Module, obs: Tensor, actions: Tensor, logprobs: Tensor, M: Tensor, args: Args
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss of one agent (Schulman et al. 2017, eq. 7), with M for the advantage.

    `logprobs` [B] are the log-probabilities of `actions` [B, act_dim_i] given `obs` [B, obs_dim_i]
    when they were drawn, M [B] is what the ratio is weighted with. `actor(obs)` is a distribution
    whose `log_prob` is [B]. Returns the loss to minimise, the log-ratio of new to old probability
    [B], and what is logged.
    """
    dist = actor(obs)
    logratio = dist.log_prob(actions) - logprobs
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * M, clipped_ratio * M).mean()
    entropy = dist.entropy().mean()
    stats = {
        "policy_loss": policy_loss,
        "entropy": entropy,
        "approx_kl": approx_kl(logratio),
        "clip_fraction": (ratio != clipped_ratio).float().mean(),
    }
    return policy_loss - args.ent_coef * entropy, logratio, stats


def mappo_update(
    actors: Sequence[nn.Module],
    optimizer: Adam,
    obs: Sequence[Tensor],
    actions: Sequence[Tensor],
    advantages: Tensor,
    args: Args,
) -> dict[str, Tensor]:
    """Update all the actors at the same time, each on its own clipped objective.

    Per agent: `actors`, with the parameters that collected the batch, `obs` [B, obs_dim_i] and
    `actions` [B, act_dim_i]. `advantages` [B] are A(s, a), normalised. Returns what is logged, on
    the whole batch: each agent's statistics. `optimizer` has the parameters of all actors.
    """
    num_agents = len(actors)
    with torch.no_grad():  # before any update: with shared parameters it changes every agent
        logprobs = [actors[i](obs[i]).log_prob(actions[i]) for i in range(num_agents)]
    log = {}
    M = advantages
    for _ in range(args.update_epochs):
        for mb in torch.randperm(len(obs[0])).chunk(args.num_minibatches):
            optimizer.zero_grad()
            for i in range(num_agents):
                loss, _, _ = ppo_loss(
                    actors[i], obs[i][mb], actions[i][mb], logprobs[i][mb], M[mb], args
                )
                loss.backward()  # with shared parameters the agents' gradients add up
            for i in range(num_agents):
                nn.utils.clip_grad_norm_(actors[i].parameters(), args.max_grad_norm)
            optimizer.step()
    for i in range(num_agents):
        with torch.no_grad():
            _, logratio, stats = ppo_loss(actors[i], obs[i], actions[i], logprobs[i], M, args)
        for name, value in stats.items():
            log[f"agent_{i}/{name}"] = value
    return log


def critic_update(
    critic: nn.Module, optimizer: Adam, obs: Tensor, returns: Tensor, args: Args
) -> Tensor:
    """Fit V(s) on `obs` [B, obs_dim] to `returns` [B] by least squares; return the final loss."""
    for _ in range(args.critic_epochs):
        for mb in torch.randperm(len(returns)).chunk(args.num_minibatches):
            loss = 0.5 * mse_loss(critic(obs[mb]).squeeze(-1), returns[mb])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
            optimizer.step()
    with torch.no_grad():
        return 0.5 * mse_loss(critic(obs).squeeze(-1), returns)


# The agents and their environment


class Policy(nn.Module):
    """All the agents: what each sees of the flat observation, its actor, the actuators it drives."""

    def __init__(self, partition: envs.Partition, obs_dim: int, args: Args) -> None:
        """Make an actor for each agent, or with `share_param` one for all.

        Raises ValueError if agents that shall share an actor have different numbers of actuators.
        """
        super().__init__()
        self.obs_ids = [torch.as_tensor(ids) for ids in partition.obs_ids]
        self.act_ids = [torch.as_tensor(ids) for ids in partition.act_ids]
        self.flat_order = torch.cat(self.act_ids).argsort()  # from the agents' order to the robot's
        if args.share_param:
            if len(set(map(len, self.act_ids))) > 1:
                raise ValueError("--share-param needs agents with equally many actuators")
            # `observe` appends a 0, entry obs_dim, and a 1, entry obs_dim + 1. The 0 pads the shorter
            # observations, and rows of 0s and a 1 are the agents' one-hot ids.
            padded = nn.utils.rnn.pad_sequence(
                self.obs_ids, batch_first=True, padding_value=obs_dim
            )
            agent_ids = obs_dim + torch.eye(len(padded), dtype=torch.int64)
            self.obs_ids = list(torch.cat([padded, agent_ids], dim=1))
        actors = [Actor(len(o), len(a), args) for o, a in zip(self.obs_ids, self.act_ids)]
        if args.share_param:
            actors = actors[:1] * len(actors)  # one module, listed once for each agent
        self.actors = nn.ModuleList(actors)

    def observe(self, obs: Tensor) -> list[Tensor]:
        """Flat observations [B, obs_dim] to what each agent sees, [B, obs_dim_i]."""
        # A 0 and a 1 behind the observation are for `share_param`, see `__init__`.
        obs = pad(obs, (0, 1))
        obs = pad(obs, (0, 1), value=1.0)
        return [obs[:, ids] for ids in self.obs_ids]

    @torch.inference_mode()
    def act(self, obs: Tensor, *, noise: bool) -> Tensor:
        """Flat observations [B, obs_dim] to flat actions [B, act_dim], without noise the likeliest."""
        actions = []
        for actor, agent_obs in zip(self.actors, self.observe(obs)):
            dist = actor(agent_obs)
            actions.append(dist.sample() if noise else dist.mode)
        return torch.cat(actions, dim=1)[:, self.flat_order]


class NormalizedEnv:
    """A vector environment with normalised observations and rewards, and actions in [-1, 1].

    Observations are standardised, rewards divided by the standard deviation of the discounted
    return, with running statistics, and both clipped to [-10, 10]: common practice, no part of the
    algorithm. (Gymnasium's NormalizeObservation refuses SAME_STEP autoreset.)
    """

    def __init__(self, vec: VectorEnv, seed: int, gamma: float) -> None:
        """Start all episodes. Raises ValueError if `vec` is not as docs/your_environment.md says."""
        if vec.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError("the vector environment's autoreset_mode must be SAME_STEP")
        for space in (vec.single_observation_space, vec.single_action_space):
            if len(space.shape or ()) != 1:
                raise ValueError(f"the vector environment's spaces must be flat, not {space}")
        if not vec.single_action_space.is_bounded():
            raise ValueError("the vector environment's actions must have finite ranges")
        self.vec = vec
        self.gamma = gamma
        self.obs_rms = RunningMeanStd(shape=vec.single_observation_space.shape)
        self.return_rms = RunningMeanStd()
        self.discounted = np.zeros(vec.num_envs)  # discounted returns of the running episodes
        self.returns = np.zeros(vec.num_envs)
        self.lengths = np.zeros(vec.num_envs)
        self.finished = []  # (return, length) of finished episodes, until they are logged
        obs, _ = vec.reset(seed=seed)
        self.obs_rms.update(obs)
        self.obs = self.normalize(obs)

    def normalize(self, obs: np.ndarray) -> Tensor:
        """Standardise observations [..., obs_dim] and clip them to [-10, 10]."""
        obs = (obs - self.obs_rms.mean) / np.sqrt(self.obs_rms.var + 1e-8)
        return torch.tensor(np.clip(obs, -10, 10), dtype=torch.float32)

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
        self.discounted = self.gamma * self.discounted + rewards
        self.return_rms.update(self.discounted)
        self.returns += rewards
        self.lengths += 1
        self.obs = self.normalize(obs)
        next_obs = self.obs.clone()
        done = np.logical_or(terminations, truncations)
        if done.any():
            next_obs[done] = self.normalize(np.stack(infos["final_obs"][done]))
            self.finished += zip(self.returns[done], self.lengths[done])
            self.discounted[done] = 0
            self.returns[done] = 0
            self.lengths[done] = 0
        rewards = torch.tensor(rewards / np.sqrt(self.return_rms.var + 1e-8)).clamp(-10, 10)
        return next_obs, rewards, torch.tensor(terminations), torch.tensor(truncations)

    def state_dict(self) -> dict:
        """The statistics, and the simulations if `vec` can save them (`get_state`, `set_state`)."""
        episodes = np.stack([self.discounted, self.returns, self.lengths])
        state = {"obs": self.obs, "episodes": torch.tensor(episodes), "vec": None}
        for name in ("obs_rms", "return_rms"):
            rms = getattr(self, name)
            state[name] = [rms.mean.tolist(), rms.var.tolist(), float(rms.count)]
        if hasattr(self.vec, "get_state"):
            state["vec"] = self.vec.get_state()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned; without saved simulations new episodes start."""
        for name in ("obs_rms", "return_rms"):
            rms = getattr(self, name)
            rms.mean, rms.var, rms.count = map(np.array, state[name])
        if state["vec"] is None:
            print("this environment's state cannot be saved: new episodes start here")
            obs, _ = self.vec.reset()
            self.obs = self.normalize(obs)
            return
        self.vec.set_state(state["vec"])
        self.obs = state["obs"]
        self.discounted, self.returns, self.lengths = state["episodes"].numpy()


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
    batch_size = args.num_envs * args.num_steps
    start_step = checkpoint["step"] if checkpoint else 0
    if args.total_timesteps < start_step + batch_size:
        fail(f"--total-timesteps {args.total_timesteps} must be at least {start_step + batch_size}")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    # `vec` seeds environment i with train_seed + i: with --seed itself two runs would share some.
    torch_seed, train_seed, eval_seed = np.random.SeedSequence(args.seed).generate_state(3).tolist()
    torch.manual_seed(torch_seed)
    try:
        vec = envs.make_vec(args.env_id, args.num_envs, args.agent_obsk, args.num_threads)
        eval_vec = envs.make_vec(
            args.env_id, max(1, args.eval_episodes), args.agent_obsk, args.num_threads
        )
        env = NormalizedEnv(vec, train_seed, args.gamma)
        (obs_dim,) = vec.single_observation_space.shape
        (act_dim,) = vec.single_action_space.shape
        if sorted(np.concatenate(vec.partition.act_ids)) != list(range(act_dim)):
            raise ValueError("the partition must give each entry of the action to one agent")
        policy = Policy(vec.partition, obs_dim, args).to(device)
    except ValueError as e:  # such as a partition that the robot does not have
        fail(e)
    critic = mlp((obs_dim, *args.hidden_sizes, 1), 1.0).to(device)
    critic_optimizer = Adam(critic.parameters(), eps=1e-5, fused=True)  # its rate is set below
    actor_optimizer = Adam(policy.parameters(), eps=1e-5, fused=True)

    # Storage
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(*shape, obs_dim, device=device)
    next_obs = torch.zeros_like(obs)
    actions = torch.zeros(*shape, act_dim, device=device)
    rewards = torch.zeros(shape, device=device)
    terminations = torch.zeros_like(rewards)
    truncations = torch.zeros_like(rewards)

    # Resume
    saved = {
        "env": env,
        "policy": policy,
        "actor_optimizer": actor_optimizer,
        "critic": critic,
        "critic_optimizer": critic_optimizer,
    }
    if checkpoint:
        try:
            for name, part in saved.items():
                part.load_state_dict(checkpoint[name])
        except Exception as e:
            fail(f"--resume {args.resume}: {args.env_id} or the script has changed: {e}")
        torch.set_rng_state(checkpoint["rng"])

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
    steps = range(start_step + batch_size, args.total_timesteps + 1, batch_size)
    print(f"{run_dir}: from step {start_step} to {steps[-1]}, {device.type}", flush=True)
    start_time = time.time()
    for global_step in tqdm(steps, disable=None):
        last = global_step == steps[-1]

        # Rollout
        policy.cpu()  # fast for small networks, and every device gets the same draws
        for t in range(args.num_steps):
            obs[t] = env.obs
            action = policy.act(env.obs, noise=True)
            actions[t] = action
            next_obs[t], rewards[t], terminations[t], truncations[t] = env.step(action)

        # Advantages
        with torch.no_grad():
            values = critic(obs).squeeze(-1)
            next_values = critic(next_obs).squeeze(-1)
        advantages, returns = compute_gae(
            rewards, values, next_values, terminations, truncations, args.gamma, args.gae_lambda
        )
        b_obs = obs.flatten(0, 1)
        b_returns = returns.flatten()
        b_advantages = advantages.flatten()
        b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)

        # Actor update
        lr_scale = 1 - (global_step - batch_size) / args.total_timesteps if args.anneal_lr else 1.0
        actor_optimizer.param_groups[0]["lr"] = lr_scale * args.learning_rate
        policy.to(device)
        agents_obs = policy.observe(b_obs)
        agents_actions = [actions.flatten(0, 1)[:, ids] for ids in policy.act_ids]
        log = mappo_update(
            policy.actors, actor_optimizer, agents_obs, agents_actions, b_advantages, args
        )

        # Critic update
        critic_optimizer.param_groups[0]["lr"] = lr_scale * args.critic_learning_rate
        log["losses/value_loss"] = critic_update(critic, critic_optimizer, b_obs, b_returns, args)

        # Logging
        unexplained = advantages.var() / (returns.var() + 1e-8)  # A = return - value
        log["losses/explained_variance"] = 1 - unexplained
        log["charts/SPS"] = (global_step - start_step) / (time.time() - start_time)
        log["charts/num_diverged"] = getattr(vec, "num_diverged", 0)
        if env.finished:
            episodic_return, episodic_length = np.mean(env.finished, axis=0)
            log["charts/episodic_return"] = episodic_return
            log["charts/episodic_length"] = episodic_length
            env.finished.clear()
        if last or global_step % args.eval_interval < batch_size:
            if args.eval_episodes:
                log |= evaluate(eval_vec, env, policy.cpu(), eval_seed)
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
        if last or global_step % args.checkpoint_interval < batch_size:
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
