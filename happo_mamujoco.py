"""HAPPO on Multi-Agent MuJoCo: the agents update one after the other, each knowing what the earlier ones changed.

    python happo_mamujoco.py --env-id HalfCheetah-6x1
    tensorboard --logdir runs

Kuba et al., "Trust Region Policy Optimisation in Multi-Agent Reinforcement Learning", arXiv 2109.11251, algorithm 3.
Next to it: `diff mappo_mamujoco.py happo_mamujoco.py`, and hatrpo_mamujoco.py, which takes trust-region steps instead.
"""

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
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
    checkpoint_interval: int = 20_000  # environment steps between checkpoints
    eval_interval: int = 100_000  # environment steps between evaluations
    eval_episodes: int = 10  # deterministic episodes per evaluation; 0 never evaluates
    cuda: bool = False  # train on the GPU, if there is one
    num_threads: int = 0  # CPU threads for PyTorch and for the physics each; 0 is one per core
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project_name: str = "mamujoco"  # Weights & Biases project

    # Algorithm
    num_envs: int = 20  # parallel environments
    num_steps: int = 100  # steps in each environment per iteration; the batch is num_envs * num_steps
    learning_rate: float = 5e-4  # of the actors
    critic_learning_rate: float = 1e-3  # of the critic
    anneal_lr: bool = False  # let both learning rates fall linearly, to 0 at total_timesteps
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimation
    update_epochs: int = 5  # passes of each actor over the batch per iteration
    critic_epochs: int = 10  # passes of the critic over the batch per iteration
    num_minibatches: int = 2  # minibatches per pass; must divide the batch
    clip_coef: float = 0.1  # epsilon of the clipped objective
    target_kl: float = 0.06  # how far the joint policy may move per iteration, mean KL in nats; each agent has a share
    ent_coef: float = 0.0  # coefficient of the entropy bonus
    max_grad_norm: float = 10.0  # largest norm of a network's gradient; longer ones are scaled down
    hidden_sizes: tuple[int, ...] = (128, 128)  # hidden layers of actors and critic
    log_std_init: float = -1.0  # log of the first standard deviation of the actions, which go from -1 to 1
    share_param: bool = False  # ablation: one network for all agents, which is told the agent's id
    fixed_order: bool = False  # ablation: update the agents in the order 0..n-1 instead of a fresh random one

    def __post_init__(self) -> None:
        """Name the run's directory; raise ValueError, which tyro shows, for a value that makes no sense."""
        name = f"{self.env_id}__{Path(__file__).stem}__{self.seed}__{time.time():.3f}"
        self.run_dir = self.run_dir or str(Path("runs", re.sub(r"[^\w.-]", "_", name)))
        for names, low, high in (
            ("num_envs num_steps update_epochs critic_epochs num_minibatches", 1, 10**5),
            ("hidden_sizes", 1, 10**4),
            ("checkpoint_interval eval_interval total_timesteps", 1, 10**12),
            ("seed num_threads eval_episodes", 0, 2**31),
            ("learning_rate critic_learning_rate max_grad_norm target_kl", 1e-12, 1e6),
            ("gamma gae_lambda clip_coef ent_coef", 0, 1),
            ("log_std_init", -10, 10),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not all(low <= x <= high for x in np.atleast_1d(value)) or value == ():
                    raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be from {low} to {high}")
        batch_size = self.num_envs * self.num_steps
        if batch_size % self.num_minibatches or batch_size < 2 * self.num_minibatches:
            raise ValueError(f"--num-minibatches {self.num_minibatches} does not divide a batch of {batch_size} steps")
        if self.total_timesteps < batch_size:
            raise ValueError(f"--total-timesteps {self.total_timesteps} is less than one batch of {batch_size} steps")
        if self.track and not find_spec("wandb"):
            raise ValueError("--track needs Weights & Biases: pip install wandb")


# Environment


class NormalizedEnv:
    """A vector environment in the learner's terms: standardised float32 observations, actions in [-1, 1].

    Rewards are divided by the running standard deviation of the discounted return.
    """

    def __init__(self, vec: gym.vector.VectorEnv, gamma: float, device: torch.device) -> None:
        """Wrap `vec`. Raises ValueError if a step that ends an episode does not start the next one (SAME_STEP)."""
        if vec.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.SAME_STEP:
            raise ValueError("the vector environment's autoreset_mode must be SAME_STEP")
        self.vec, self.gamma, self.device = vec, gamma, device
        self.obs_rms, self.return_rms = RunningMeanStd(shape=vec.single_observation_space.shape), RunningMeanStd()
        low, high = vec.single_action_space.low, vec.single_action_space.high
        self.action_mid, self.action_half = (low + high) / 2, (high - low) / 2
        self.sums = np.zeros((3, vec.num_envs))  # of each episode so far: discounted return, return, length
        self.episodes: list[list[float]] = []  # return and length of those that ended since this was last emptied

    def normalize(self, obs: np.ndarray) -> Tensor:
        """Standardise observations [..., obs_dim], clip them to [-10, 10] and put them on the device."""
        obs = (obs - self.obs_rms.mean) / np.sqrt(self.obs_rms.var + 1e-8)
        return torch.as_tensor(np.clip(obs, -10, 10), dtype=torch.float32, device=self.device)

    def scale(self, actions: Tensor) -> np.ndarray:
        """Clip actions [..., act_dim] to [-1, 1] and scale them to the actuators' range."""
        return self.action_mid + self.action_half * actions.clamp(-1, 1).cpu().numpy()

    def reset(self, seed: int) -> Tensor:
        """Start all episodes; return observations [num_envs, obs_dim]."""
        obs, _ = self.vec.reset(seed=seed)
        self.obs_rms.update(obs)
        self.obs = self.normalize(obs)
        return self.obs

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Apply actions [num_envs, act_dim]; return obs, next_obs, rewards, terminations, truncations, all float32.

        `obs` is where to act next, `next_obs` what the actions led to: they differ where an episode ended.
        """
        obs, rewards, terminations, truncations, infos = self.vec.step(self.scale(actions))
        self.obs_rms.update(obs)
        self.sums = self.sums * [[self.gamma], [1], [1]] + [rewards, rewards, np.ones_like(rewards)]
        self.return_rms.update(self.sums[0])
        self.obs = next_obs = self.normalize(obs)
        if (done := terminations | truncations).any():
            next_obs = self.obs.clone()
            next_obs[done] = self.normalize(np.stack(infos["final_obs"][done]))
            self.episodes += self.sums[1:, done].T.tolist()
            self.sums[:, done] = 0
        rewards = np.clip(rewards / np.sqrt(self.return_rms.var + 1e-8), -10, 10)
        packed = np.stack([rewards, terminations, truncations])
        return self.obs, next_obs, *torch.as_tensor(packed, dtype=torch.float32, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """Statistics, and what the environments remember if they have `get_state` and `set_state`."""
        rms = [[np.asarray(x).tolist() for x in (r.mean, r.var, r.count)] for r in (self.obs_rms, self.return_rms)]
        vec = self.vec.get_state() if hasattr(self.vec, "get_state") else None
        return {"rms": rms, "vec": vec, "sums": self.sums.tolist(), "obs": self.obs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, or in new episodes if that was not saved; `reset` comes first."""
        if np.shape(state["sums"]) != self.sums.shape:
            raise ValueError("another number of environments")
        for rms, saved in zip((self.obs_rms, self.return_rms), state["rms"], strict=True):
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
    """Diagonal Gaussian policy with a state-independent standard deviation.

    All that there is to know of a policy is here: another class with these methods is another kind of policy.
    """

    def __init__(self, obs_dim: int, act_dim: int, args: Args, generator: Generator) -> None:
        """Build the network from `obs_dim` inputs to the means of `act_dim` actions."""
        super().__init__((obs_dim, *args.hidden_sizes, act_dim), 0.01, generator)
        self.theta = nn.Parameter(torch.cat([self.theta.data, torch.full((act_dim,), args.log_std_init)]))
        self.sizes.append(act_dim)
        self.act_dim = self.max_act_dim = act_dim  # an agent with fewer actions than others uses the first `act_dim`

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations [..., B, obs_dim] to the distribution: mean [..., B, act_dim], log_std [..., 1, act_dim]."""
        log_std = self.theta[..., None, -self.max_act_dim :]
        return super().forward(obs)[..., : self.act_dim], log_std[..., : self.act_dim]

    @staticmethod
    def sample(dist: tuple[Tensor, Tensor], generator: Generator | None) -> Tensor:
        """Draw actions [..., B, act_dim]; without a generator the most likely ones."""
        mean, log_std = dist
        if generator is None:
            return mean
        return mean + log_std.exp() * torch.randn(mean.shape, generator=generator).to(mean)

    @staticmethod
    def log_prob(dist: tuple[Tensor, Tensor], actions: Tensor) -> Tensor:
        """Joint log-probability of actions [..., B, act_dim]: summed over the dimensions, [..., B]."""
        mean, log_std = dist
        z = (actions - mean) * torch.exp(-log_std)
        return -0.5 * z.square().sum(-1) - log_std.sum(-1) - 0.5 * np.log(2 * np.pi) * actions.shape[-1]

    @staticmethod
    def entropy(dist: tuple[Tensor, Tensor]) -> Tensor:
        """Differential entropy in nats, [..., 1]: it does not depend on the state."""
        log_std = dist[1]
        return log_std.sum(-1) + 0.5 * np.log(2 * np.pi * np.e) * log_std.shape[-1]


class Policy(nn.Module):
    """All the agents: `actors` one by one for their updates, `joint` all at once for a step, on the same parameters."""

    def __init__(
        self, partition: envs.Partition, obs_dim: int, args: Args, generator: Generator, device: torch.device
    ) -> None:
        """Build the actors, all for the longest observation and action: a shorter observation is padded with zeros."""
        super().__init__()
        self.act_ids = [ids.tolist() for ids in partition.act_ids]
        num_agents, act_dims = partition.num_agents, [len(ids) for ids in self.act_ids]
        obs_ids = np.full((num_agents, max(map(len, partition.obs_ids))), obs_dim)  # `observe` puts a 0 there
        action_ids = np.zeros(sum(act_dims), dtype=int)
        for i, ids in enumerate(partition.obs_ids):
            obs_ids[i, : len(ids)] = ids
            action_ids[partition.act_ids[i]] = i * max(act_dims) + np.arange(act_dims[i])
        if args.share_param:  # and a 1 behind it, for the one-hot agent id
            obs_ids = np.hstack([obs_ids, obs_dim + np.eye(num_agents, dtype=int)])
        self.register_buffer("zero_one", torch.tensor([0.0, 1.0]))
        self.register_buffer("obs_ids", torch.as_tensor(obs_ids))
        self.register_buffer("action_ids", torch.as_tensor(action_ids))
        size = obs_ids.shape[1], max(act_dims)
        self.joint, *self.actors = (Actor(*size, args, generator) for _ in range(1 + num_agents))
        if not args.share_param:
            self.joint.theta = nn.Parameter(torch.stack([actor.theta.data for actor in self.actors]))
        self.to(device)  # before anything refers to a part of theta
        for i, actor in enumerate(self.actors):
            actor.act_dim = act_dims[i]
            actor.theta = self.joint.theta if args.share_param else nn.Parameter(self.joint.theta.data[i])

    def observe(self, obs: Tensor) -> Tensor:
        """What each actor gets of flat observations [..., B, obs_dim]: [num_agents, ..., B, its inputs]."""
        return torch.cat([obs, self.zero_one.expand(*obs.shape[:-1], 2)], dim=-1)[..., self.obs_ids].movedim(-2, 0)

    @torch.inference_mode()
    def act(self, obs: Tensor, generator: Generator | None = None) -> Tensor:
        """Flat observations [B, obs_dim] to flat actions [B, act_dim]; without a generator the most likely ones."""
        actions = self.joint.sample(self.joint(self.observe(obs)), generator)
        return actions.movedim(0, -2).flatten(-2)[..., self.action_ids]

    def export(self) -> dict[str, Any]:
        """The policy as plain tensors and lists: agent i's network on obs[obs_ids[i]] gives actions[act_ids[i]]."""
        agents = [[tensor.detach().cpu() for tensor in actor.layers()] for actor in self.actors]
        return {"agents": agents, "obs_ids": self.obs_ids.tolist(), "act_ids": self.act_ids, "tanh": False}


# The algorithm


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, ends: tuple[Tensor, Tensor], gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) on the shared reward; all tensors [T, num_envs].

    `values` are V(s_t); `next_values` are V of the state that step t led to, the true last one where an episode ended;
    `ends` are terminations, which make that value 0, and truncations (time limit), which do not. Returns the advantages
    A_t, and A_t + V(s_t), the critic's targets.
    """
    terminations, truncations = ends
    deltas = rewards + gamma * (1 - terminations) * next_values - values
    carry = gamma * gae_lambda * (1 - terminations) * (1 - truncations)  # nothing crosses the end of an episode
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantages[t] = last = deltas[t] + carry[t] * last
    return advantages, advantages + values


def minibatches(batch_size: int, num_minibatches: int, generator: Generator) -> Iterator[Tensor | slice]:
    """Indices of one pass over the batch in random minibatches; the whole batch is one slice."""
    if num_minibatches == 1:
        return iter([slice(None)])
    return iter(torch.randperm(batch_size, generator=generator).view(num_minibatches, -1))


def ppo_loss(
    actor: Actor, obs: Tensor, actions: Tensor, logprobs: Tensor, M: Tensor, clip_coef: float, ent_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate loss of one agent (Schulman et al. 2017, eq. 7), with M in the place of the advantage.

    `logprobs` [B] are the joint log-probabilities of `actions` [B, act_dim_i] given `obs` [B, obs_dim_i] when they were
    drawn, M [B] is what the ratio is weighted with. Returns the loss to minimise, the log-ratio of new to old
    probability [B], and the mean entropy.
    """
    dist = actor(obs)
    logratio = actor.log_prob(dist, actions) - logprobs
    ratio = logratio.exp()
    policy_loss = -torch.min(ratio * M, ratio.clamp(1 - clip_coef, 1 + clip_coef) * M).mean()
    entropy = actor.entropy(dist).mean()
    return policy_loss - ent_coef * entropy, logratio, entropy


def ppo_stats(loss: Tensor, logratio: Tensor, entropy: Tensor, args: Args) -> dict[str, Tensor]:
    """What is logged of an update, from what `ppo_loss` returns of the whole batch after it."""
    ratio = logratio.exp()
    approx_kl = (ratio - 1 - logratio).mean()  # k3 of Schulman, http://joschu.net/blog/kl-approx.html
    clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
    policy_loss = loss + args.ent_coef * entropy
    return {"policy_loss": policy_loss, "entropy": entropy, "approx_kl": approx_kl, "clip_fraction": clip_fraction}


def happo_update(
    actors: Sequence[Actor],
    optimizer: Adam,
    obs: Sequence[Tensor],
    actions: Sequence[Tensor],
    advantages: Tensor,
    args: Args,
    generator: Generator,
) -> tuple[dict[int, dict[str, Tensor]], Tensor]:
    """Update the actors one after the other in random order, each on its clipped objective with the factor M.

    Per agent: `actors`, with the parameters that collected the batch; `obs` and `actions`, [B, ...]. `advantages`:
    A(s, a), normalised, [B]. `optimizer` has the parameters of all.
    Returns what is logged of each agent in the order of the updates, of the whole batch after its own; and the last M.
    """
    stats: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():  # of all before any changes: with shared parameters all would
        logprobs = [actor.log_prob(actor(o), a) for actor, o, a in zip(actors, obs, actions, strict=True)]
    order = torch.randperm(len(actors), generator=generator).tolist()
    M, joint_logratio = advantages, torch.zeros_like(advantages)
    for i in sorted(order) if args.fixed_order else order:
        radius = args.target_kl * (len(stats) + 1) / len(actors)  # the shares of the agents so far
        for _ in range(args.update_epochs):
            for mb in minibatches(len(advantages), args.num_minibatches, generator):
                batch = obs[i][mb], actions[i][mb], logprobs[i][mb], M[mb]
                loss, logratio, _ = ppo_loss(actors[i], *batch, args.clip_coef, args.ent_coef)
                joint = joint_logratio[mb] + logratio.detach()  # of the agents so far, who all push the same rows
                if (joint.exp() - 1 - joint).mean() > radius:  # k3 of the joint policy: M / A is exp(joint)
                    continue
                optimizer.zero_grad()  # of all: Adam leaves those without a gradient alone
                loss.backward()
                nn.utils.clip_grad_norm_(actors[i].parameters(), args.max_grad_norm)
                optimizer.step()
        with torch.no_grad():
            batch = obs[i], actions[i], logprobs[i], M
            loss, logratio, entropy = ppo_loss(actors[i], *batch, args.clip_coef, args.ent_coef)
            stats[i] = ppo_stats(loss, logratio, entropy, args) | {"M_std": M.std()}
            # M^{i_{m+1}} = pi_new^{i_m}(a|o) / pi_old^{i_m}(a|o) * M^{i_m}: the later agents see what this one changed.
            # A itself is not recomputed, M is neither normalised nor clipped.
            M = M * logratio.exp()
            joint_logratio += logratio
    return stats, M


def critic_update(
    critic: nn.Module, optimizer: Adam, obs: Tensor, returns: Tensor, args: Args, generator: Generator
) -> Tensor:
    """Fit V(s) to the returns [B] by least squares on observations [B, obs_dim]; return the loss that is left."""
    for _ in range(args.critic_epochs):
        for mb in minibatches(len(returns), args.num_minibatches, generator):
            loss = 0.5 * (critic(obs[mb]).squeeze(-1) - returns[mb]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
            optimizer.step()
    with torch.no_grad():
        return 0.5 * (critic(obs).squeeze(-1) - returns).square().mean()


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


def main(args: Args, checkpoint: dict[str, Any] | None = None) -> None:
    """Train."""
    # Setup
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA need it
    torch.use_deterministic_algorithms(True)
    num_threads = args.num_threads or torch.get_num_threads()
    generator = Generator().manual_seed(args.seed)  # on the CPU: every device gets the same draws
    try:
        sizes = args.num_envs, max(1, args.eval_episodes)
        vec, eval_vec = (envs.make_vec(args.env_id, n, args.agent_obsk, args.num_threads) for n in sizes)
        env = NormalizedEnv(vec, args.gamma, device)
    except ValueError as e:
        fail(e)
    partition = vec.partition
    obs_dim, act_dim = vec.single_observation_space.shape[0], vec.single_action_space.shape[0]
    policy = Policy(partition, obs_dim, args, generator, device)
    actors = policy.actors

    # Critic
    critic = MLP((obs_dim, *args.hidden_sizes, 1), 1.0, generator).to(device)
    critic_optimizer = Adam(critic.parameters(), lr=args.critic_learning_rate, eps=1e-5, fused=True)
    saved = {"env": env, "policy": policy, "critic": critic, "critic_optimizer": critic_optimizer}

    # Actor optimizer
    thetas = nn.ModuleList(actors).parameters()  # each once: they may share one
    saved["actor_optimizer"] = actor_optimizer = Adam(thetas, lr=args.learning_rate, eps=1e-5, fused=True)

    # Storage
    shape, batch_size = (args.num_steps, args.num_envs), args.num_envs * args.num_steps
    obs_buf, next_obs_buf = torch.zeros(2, *shape, obs_dim, device=device)
    actions = torch.zeros(*shape, act_dim, device=device)
    rewards, terminations, truncations = torch.zeros(3, *shape, device=device)

    # Resume
    obs, start_step, run_dir = env.reset(args.seed), 0, Path(args.run_dir)
    if checkpoint:
        try:
            if args.env_id != checkpoint["args"]["env_id"]:  # its sizes may be the same
                raise ValueError
            for name, part in saved.items():
                part.load_state_dict(checkpoint[name])
        except (KeyError, RuntimeError, ValueError) as e:
            fail(f"--resume {args.resume}: robot, agents, networks and num_envs must stay ({type(e).__name__})")
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
    # PyTorch's threads are for the updates: while they wait for more they spin, on the cores that the physics needs.
    torch.set_num_threads(1)

    for global_step in range(start_step + batch_size, args.total_timesteps + 1, batch_size):
        lr_scale = 1 - (global_step - batch_size) / args.total_timesteps if args.anneal_lr else 1.0
        last = global_step + batch_size > args.total_timesteps
        log: dict[str, float] = {}

        # Rollout
        for t in range(args.num_steps):
            obs_buf[t] = obs
            actions[t] = policy.act(obs, generator)
            obs, next_obs_buf[t], rewards[t], terminations[t], truncations[t] = env.step(actions[t])

        # Advantages
        torch.set_num_threads(num_threads)
        with torch.no_grad():
            values, next_values = critic(obs_buf).squeeze(-1), critic(next_obs_buf).squeeze(-1)
        ends = terminations, truncations
        advantages, returns = compute_gae(rewards, values, next_values, ends, args.gamma, args.gae_lambda)
        b_obs, b_returns, b_advantages = obs_buf.flatten(0, 1), returns.flatten(), advantages.flatten()
        b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)

        # Actor update
        agents_obs = policy.observe(b_obs).contiguous()
        agents_actions = [actions.flatten(0, 1)[:, act_ids] for act_ids in partition.act_ids]
        log["charts/learning_rate"] = lr_scale * args.learning_rate
        actor_optimizer.param_groups[0]["lr"] = log["charts/learning_rate"]
        stats, M = happo_update(actors, actor_optimizer, agents_obs, agents_actions, b_advantages, args, generator)
        log |= {f"agent_{i}/{key}": value.item() for i, agent in stats.items() for key, value in agent.items()}
        log["losses/M_std"] = M.std().item()

        # Critic update
        log["charts/critic_learning_rate"] = lr_scale * args.critic_learning_rate
        critic_optimizer.param_groups[0]["lr"] = log["charts/critic_learning_rate"]
        value_loss = critic_update(critic, critic_optimizer, b_obs, b_returns, args, generator)

        # Logging
        torch.set_num_threads(1)
        log["losses/value_loss"] = value_loss.item()
        log["losses/explained_variance"] = (1 - (returns - values).var() / returns.var().clamp(min=1e-8)).item()
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
