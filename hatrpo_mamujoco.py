"""HATRPO on Multi-Agent MuJoCo: the agents take trust-region steps one after the other, as in HAPPO with TRPO for PPO.

    python hatrpo_mamujoco.py --env-id HalfCheetah-6x1
    tensorboard --logdir runs

Kuba et al., "Trust Region Policy Optimisation in Multi-Agent Reinforcement Learning", arXiv 2109.11251, algorithm 2.
Next to it: `diff happo_mamujoco.py hatrpo_mamujoco.py`.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Generator, Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
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
    checkpoint_interval: int = 10
    """iterations between checkpoints, of which the last two are kept; 0 saves at the end only"""
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
    num_steps: int = 50
    """steps in each environment per iteration; the batch is num_envs * num_steps"""
    critic_learning_rate: float = 1e-3
    """learning rate of the critic"""
    anneal_lr: bool = False
    """whether learning rates fall linearly to 0 over the run"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimation"""
    critic_epochs: int = 10
    """passes of the critic over the batch per iteration"""
    num_minibatches: int = 4
    """minibatches per pass; must divide the batch"""
    target_kl: float = 0.005
    """delta: radius of the trust region of one agent's step, mean KL in nats"""
    backtrack_coeff: float = 0.8
    """alpha: what a rejected step is multiplied with"""
    backtrack_iters: int = 10
    """L: how often, before the agent keeps its old policy"""
    accept_ratio: float = 0.5
    """kappa: least share of the gain expected by the gradient that a step must achieve"""
    cg_iters: int = 4
    """iterations of the conjugate gradient"""
    cg_damping: float = 10.0
    """what is added to the Fisher matrix's diagonal in the conjugate gradient; little lets a step fit single samples"""
    fisher_stride: int = 1
    """the Fisher matrix is taken on every n-th row of the batch; the line search's KL always on all"""
    ent_coef: float = 0.0
    """coefficient of the entropy bonus, a part of the objective"""
    max_grad_norm: float = 10.0
    """largest norm of a network's gradient; longer ones are scaled down"""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """sizes of the hidden layers of actors and critic"""
    log_std_init: float = -1.0
    """log of the first standard deviation of the actions, which go from -1 to 1"""
    share_param: bool = False
    """ablation: one network for all agents, which is told the agent's id"""
    fixed_order: bool = False
    """ablation: update the agents in the order 0..n-1 instead of a fresh random one"""


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
    """Diagonal Gaussian policy with a state-independent standard deviation.

    The update functions use nothing else of a policy: another class with these methods gives another kind of policy.
    """

    def __init__(
        self, obs_dim: int, act_dim: int, hidden_sizes: Sequence[int], generator: Generator, log_std_init: float = -1.0
    ) -> None:
        """Build the network from `obs_dim` inputs to the means of `act_dim` actions."""
        super().__init__()
        self.act_dim = act_dim
        self.net = mlp((obs_dim, *hidden_sizes, act_dim), 0.01, generator)
        self.log_std = nn.Parameter(torch.full((act_dim,), log_std_init))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations [..., obs_dim] to the distribution: mean [..., act_dim] and log standard deviation [act_dim]."""
        return self.net(obs)[..., : self.act_dim], self.log_std[: self.act_dim]

    @staticmethod
    def log_prob(dist: tuple[Tensor, Tensor], actions: Tensor) -> Tensor:
        """Joint log-probability of actions [..., act_dim]: summed over the dimensions, [...]."""
        mean, log_std = dist
        z = (actions - mean) * torch.exp(-log_std)
        return -0.5 * z.square().sum(-1) - log_std.sum(-1) - 0.5 * np.log(2 * np.pi) * actions.shape[-1]

    @staticmethod
    def entropy(dist: tuple[Tensor, Tensor]) -> Tensor:
        """Differential entropy in nats, a scalar: it does not depend on the state."""
        log_std = dist[1]
        return log_std.sum(-1) + 0.5 * np.log(2 * np.pi * np.e) * log_std.shape[-1]


def make_actors(
    partition: envs.Partition,
    hidden_sizes: Sequence[int],
    share_param: bool,
    generator: Generator,
    log_std_init: float = -1.0,
) -> list[Actor]:
    """One actor per agent; with `share_param` they are views of one network (see `agent_obs` for its input)."""
    obs_dims, act_dims = [len(ids) for ids in partition.obs_ids], [len(ids) for ids in partition.act_ids]
    if not share_param:
        return [Actor(o, a, hidden_sizes, generator, log_std_init) for o, a in zip(obs_dims, act_dims, strict=True)]
    shared = Actor(max(obs_dims) + partition.num_agents, max(act_dims), hidden_sizes, generator, log_std_init)
    actors = [copy.copy(shared) for _ in act_dims]  # shallow: the parameters are the same objects
    for actor, act_dim in zip(actors, act_dims, strict=True):
        actor.act_dim = act_dim
    return actors


def agent_obs(obs: Tensor, partition: envs.Partition, agent: int, share_param: bool) -> Tensor:
    """What one agent's actor gets of flat observations [..., obs_dim].

    Its own entries; with `share_param` padded with zeros to the longest agent's, and followed by the one-hot agent id.
    """
    own = obs[..., partition.obs_ids[agent]]
    if not share_param:
        return own
    padding = max(len(ids) for ids in partition.obs_ids) - own.shape[-1]
    one_hot = F.one_hot(torch.tensor(agent), partition.num_agents).to(obs)
    return torch.cat([F.pad(own, (0, padding)), one_hot.expand(*obs.shape[:-1], -1)], dim=-1)


class JointPolicy:
    """All the actors as one: batched products over stacked weights, so that a step in the environments loops over none.

    The partition is folded into the weights: each first layer is spread over the flat observation, each output lands on
    the agent's own actuators. Built anew after every update.
    """

    @torch.no_grad()
    def __init__(self, actors: Sequence[Actor], partition: envs.Partition, obs_dim: int, share_param: bool) -> None:
        """Stack the weights of the actors."""
        layers = [[layer for layer in actor.net if isinstance(layer, nn.Linear)] for actor in actors]
        weights = [[layer.weight for layer in net] for net in layers]
        biases = [[layer.bias for layer in net] for net in layers]
        num_agents, max_act_dim = len(actors), max(actor.act_dim for actor in actors)
        act_dim, device = sum(actor.act_dim for actor in actors), biases[0][0].device
        self.log_std = torch.zeros(act_dim, device=device)
        self.agent_of = torch.zeros(act_dim, num_agents, device=device)  # one-hot: which agent drives an actuator
        self.output_ids = torch.zeros(act_dim, dtype=torch.long, device=device)
        for i, (obs_ids, act_ids) in enumerate(zip(partition.obs_ids, partition.act_ids, strict=True)):
            first = torch.zeros(len(biases[i][0]), obs_dim, device=device)
            first[:, obs_ids] = weights[i][0][:, : len(obs_ids)]
            if share_param:  # the one-hot id is constant, its weights are part of the bias
                biases[i][0] = biases[i][0] + weights[i][0][:, i - num_agents]
            weights[i][0] = first
            missing = max_act_dim - len(biases[i][-1])
            weights[i][-1] = F.pad(weights[i][-1], (0, 0, 0, missing))
            biases[i][-1] = F.pad(biases[i][-1], (0, missing))
            self.log_std[act_ids] = actors[i].log_std[: len(act_ids)]
            self.agent_of[act_ids, i] = 1
            self.output_ids[act_ids] = i * max_act_dim + torch.arange(len(act_ids), device=device)
        self.std = self.log_std.exp()
        self.weights = [torch.stack(w).mT for w in zip(*weights, strict=True)]  # [num_agents, fan_in, fan_out]
        self.biases = [torch.stack(b)[:, None] for b in zip(*biases, strict=True)]  # [num_agents, 1, fan_out]

    def mean(self, obs: Tensor) -> Tensor:
        """Flat observations [n, obs_dim] to the means of the flat action [n, act_dim]."""
        h = obs.expand(len(self.weights[0]), -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = torch.baddbmm(bias, h, weight).relu_()
        h = torch.baddbmm(self.biases[-1], h, self.weights[-1])
        return h.transpose(0, 1).flatten(1)[:, self.output_ids]

    def act(self, obs: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw flat actions [n, act_dim]; return them and each agent's joint log-probability [n, num_agents]."""
        mean = self.mean(obs)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        logprobs = -0.5 * noise.square() - self.log_std - 0.5 * np.log(2 * np.pi)
        return mean + noise * self.std, logprobs @ self.agent_of


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
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) on the shared reward; all tensors [T, num_envs].

    `values` are V(s_t); `next_values` are V of the state that step t led to, the true last one where an episode ended.
    A termination makes that value 0; a truncation (time limit) does not. Returns the advantages A_t, and A_t + V(s_t),
    the critic's targets.
    """
    deltas = rewards + gamma * (1 - terminations) * next_values - values
    carry = gamma * gae_lambda * (1 - terminations) * (1 - truncations)  # nothing crosses the end of an episode
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantages[t] = last = deltas[t] + carry[t] * last
    return advantages, advantages + values


def minibatches(batch_size: int, num_minibatches: int, generator: Generator) -> Iterator[Tensor | slice]:
    """Indices of one pass over the batch in random minibatches; the whole batch is one slice."""
    if num_minibatches == 1:
        return iter([slice(None)])
    return iter(torch.randperm(batch_size, generator=generator, device=generator.device).view(num_minibatches, -1))


def gaussian_kl(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """KL(old || new) in nats of diagonal Gaussians (mean [..., act_dim], log_std [act_dim]), summed over dimensions."""
    (old_mean, old_log_std), (mean, log_std) = old, new
    variance_ratio = torch.exp(2 * (old_log_std - log_std))
    z = (old_mean - mean) * torch.exp(-log_std)
    return (log_std - old_log_std + 0.5 * (variance_ratio + z.square() - 1)).sum(-1)


def fisher_vector_product(actor: Actor, obs: Tensor) -> Callable[[Tensor], Tensor]:
    """The map v -> Hv, with H the Hessian of the mean KL(pi_old || pi) at pi_old, in all of the actor's parameters.

    H = J^T K J (Gauss-Newton), with J the Jacobian of the distribution's parameters, here mean and log_std, and K the
    Hessian of the mean KL in these; exact because the KL's gradient in these is 0 at pi_old. (For a categorical that
    holds for logits, not for log-probabilities.) The graphs are built once and serve every product.
    """
    grad, params, dist = torch.autograd.grad, list(actor.parameters()), actor(obs)
    new = [d.detach().requires_grad_() for d in dist]
    kl_gradient = grad(gaussian_kl(tuple(d.detach() for d in dist), new).mean(), new, create_graph=True)
    u = [torch.zeros_like(d, requires_grad=True) for d in new]
    JTu = grad(dist, params, u, create_graph=True)  # linear in u: its gradient in u gives Jv
    sizes = [p.numel() for p in params]

    def product(v: Tensor) -> Tensor:
        Jv = grad(JTu, u, [x.view_as(p) for x, p in zip(v.split(sizes), params, strict=True)], retain_graph=True)
        KJv = grad(kl_gradient, new, Jv, retain_graph=True)
        return parameters_to_vector(grad(dist, params, KJv, retain_graph=True))

    return product


def conjugate_gradient(
    H: Callable[[Tensor], Tensor], b: Tensor, damping: float, cg_iters: int, tolerance: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """Solve (H + damping I) x = b for a positive semidefinite H, given as the map x -> Hx; return x and Hx.

    Stops at |residual|^2 < tolerance. Hx is the sum of the products on the way, so it costs no further one.
    """
    x, Hx, residual, direction = torch.zeros_like(b), torch.zeros_like(b), b, b
    rr = residual @ residual
    for _ in range(cg_iters):
        if rr < tolerance:
            break
        H_direction = H(direction)
        damped = H_direction + damping * direction
        alpha = rr / (direction @ damped)
        x, Hx = x + alpha * direction, Hx + alpha * H_direction
        residual = residual - alpha * damped
        rr, old_rr = residual @ residual, rr
        direction = residual + rr / old_rr * direction
    return x, Hx


def line_search(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    params: Tensor,
    step: Tensor,
    expected_gain: Tensor,
    target_kl: float,
    backtrack_coeff: float,
    backtrack_iters: int,
    accept_ratio: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Find the smallest j in 0..backtrack_iters for which params + backtrack_coeff^j * step is good enough.

    `evaluate` maps parameters to the gain of the objective over `params` and the mean KL from there. Good enough is a
    gain of at least accept_ratio * backtrack_coeff^j * expected_gain, and a KL of at most `target_kl`.

    Returns:
        The new parameters, and what is logged. If no j is good enough: `params`, and a gain and KL of 0.
    """
    for j in range(backtrack_iters + 1):
        scale = backtrack_coeff**j
        new_params = params + scale * step
        gain, kl = evaluate(new_params)
        if gain >= accept_ratio * scale * expected_gain and kl <= target_kl:
            break
    else:
        new_params, gain, kl = params, torch.zeros_like(gain), torch.zeros_like(kl)
    accepted = new_params is not params
    stats = {"backtracks": torch.tensor(float(j)), "accepted": torch.tensor(float(accepted))}
    return new_params, stats | {"surrogate_gain": gain, "kl": kl}


def trpo_step(actor: Actor, obs: Tensor, actions: Tensor, logprobs: Tensor, M: Tensor, args: Args) -> dict[str, Tensor]:
    """Take one trust-region step on the whole batch with one agent (Kuba et al., algorithm 2, lines 11 to 13).

    Args:
        actor: the agent's policy, changed in place; a rejected step leaves it as it was to the last bit.
        obs: what the agent saw, [B, obs_dim_i].
        actions: what it did, [B, act_dim_i].
        logprobs: the joint log-probability of that under the policy that collected the batch, [B].
        M: what the ratio is weighted with, [B].
        args: hyperparameters.

    Returns:
        What is logged.
    """
    params = list(actor.parameters())
    old_params = parameters_to_vector(params).detach()

    def objective(dist: tuple[Tensor, Tensor]) -> Tensor:
        ratio = torch.exp(actor.log_prob(dist, actions) - logprobs)
        return (ratio * M).mean() + args.ent_coef * actor.entropy(dist).mean()

    @torch.no_grad()
    def evaluate(new_params: Tensor) -> tuple[Tensor, Tensor]:
        vector_to_parameters(new_params, params)
        dist = actor(obs)
        return objective(dist) - old_objective, gaussian_kl(old_dist, dist).mean()

    dist = actor(obs)
    old_dist, old_objective = tuple(d.detach() for d in dist), objective(dist)
    gradient = parameters_to_vector(torch.autograd.grad(old_objective, params))
    H = fisher_vector_product(actor, obs[:: args.fisher_stride])
    x, Hx = conjugate_gradient(H, gradient, args.cg_damping, args.cg_iters)
    # beta = sqrt(2 delta / x^T H x): the step at which the quadratic model of the KL reaches delta (x = 0 gives 0)
    step = torch.sqrt(2 * args.target_kl / (x @ Hx).clamp(min=1e-12)) * x
    expected_gain = step @ gradient
    search = args.target_kl, args.backtrack_coeff, args.backtrack_iters, args.accept_ratio
    new_params, stats = line_search(evaluate, old_params, step, expected_gain, *search)
    vector_to_parameters(new_params, params)
    losses = {"policy_loss": -old_objective.detach(), "entropy": actor.entropy(old_dist).mean()}
    return stats | losses | {"expected_gain": expected_gain, "grad_norm": gradient.norm()}


def hatrpo_update(
    actors: Sequence[Actor],
    obs: Sequence[Tensor],
    actions: Sequence[Tensor],
    logprobs: Sequence[Tensor],
    advantages: Tensor,
    args: Args,
    generator: Generator,
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Update the actors one after the other in random order, each by one trust-region step with the factor M.

    Args:
        actors: one per agent.
        obs: per agent [B, obs_dim_i].
        actions: per agent [B, act_dim_i].
        logprobs: per agent, the joint log-probability of its action when it was drawn, [B].
        advantages: A(s, a), normalised, [B].
        args: hyperparameters.
        generator: source of all that is random here.

    Returns:
        For each agent what is logged.
        M after the last agent.
    """
    stats: list[dict[str, Tensor]] = [{} for _ in actors]
    order = torch.randperm(len(actors), generator=generator, device=generator.device).tolist()
    with torch.no_grad():  # as after a step, not as in the rollout: a rejected step leaves M as it is to the last bit
        old_logprobs = [actor.log_prob(actor(o), a) for actor, o, a in zip(actors, obs, actions, strict=True)]
    M = advantages
    for i in sorted(order) if args.fixed_order else order:
        stats[i] = {"M_std": M.std(), "first_ratio": torch.exp(old_logprobs[i] - logprobs[i]).mean()}
        stats[i] |= trpo_step(actors[i], obs[i], actions[i], old_logprobs[i], M, args)
        with torch.no_grad():
            # M^{i_{m+1}} = pi_new^{i_m}(a|o) / pi_old^{i_m}(a|o) * M^{i_m}: the later agents see what this one changed.
            # A itself is not recomputed, M is neither normalised nor clipped.
            M = M * torch.exp(actors[i].log_prob(actors[i](obs[i]), actions[i]) - old_logprobs[i])
    return stats, M


def critic_update(
    critic: nn.Module, optimizer: Adam, obs: Tensor, returns: Tensor, args: Args, generator: Generator
) -> Tensor:
    """Fit V(s) to the returns [B] by least squares on observations [B, obs_dim]; return the last minibatch's loss."""
    for _ in range(args.critic_epochs):
        for mb in minibatches(len(returns), args.num_minibatches, generator):
            loss = 0.5 * (critic(obs[mb]).squeeze(-1) - returns[mb]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
            optimizer.step()
    return loss.detach()


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
    sizes = "total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "critic_epochs"
    rates = "learning_rate", "critic_learning_rate", "max_grad_norm", "target_kl", "cg_iters", "fisher_stride"
    counts = "seed", "num_threads", "checkpoint_interval", "eval_interval", "eval_episodes", "backtrack_iters"
    rules = (
        ((*sizes, *rates, "hidden_sizes"), lambda x: np.size(x) and np.min(x) > 0, "greater than 0"),
        ((*counts, "ent_coef", "cg_damping"), lambda x: x >= 0, "0 or greater"),
        (("gamma", "gae_lambda"), lambda x: 0 <= x <= 1, "from 0 to 1"),
        (("clip_coef", "backtrack_coeff", "accept_ratio"), lambda x: 0 < x < 1, "between 0 and 1"),
    )
    for names, holds, words in rules:
        for name in names:
            if hasattr(args, name) and not holds(getattr(args, name)):
                usage_error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be {words}")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        usage_error(f"--num-minibatches {args.num_minibatches} does not divide the batch of {batch_size} steps")
    if args.total_timesteps < batch_size:
        usage_error(f"--total-timesteps {args.total_timesteps} is less than one batch of {batch_size} steps")
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
    env, eval_env = (NormalizedEnv(v, args.gamma, device) for v in (vec, eval_vec))
    eval_env.obs_rms, eval_env.training = env.obs_rms, False
    partition, num_agents = vec.partition, vec.partition.num_agents
    obs_dim, act_dim = vec.single_observation_space.shape[0], vec.single_action_space.shape[0]

    init_generator = Generator().manual_seed(args.seed)  # on the CPU: the same networks on every device
    actors = make_actors(partition, args.hidden_sizes, args.share_param, init_generator, args.log_std_init)
    actors = [actor.to(device) for actor in actors]
    adam = partial(Adam, eps=1e-5, fused=True)

    # Critic
    critic = mlp((obs_dim, *args.hidden_sizes, 1), 1.0, init_generator).to(device)
    critic_optimizer = adam(critic.parameters(), lr=args.critic_learning_rate)
    networks = {f"agent_{i}": actor for i, actor in enumerate(actors)} | {"critic": critic}
    saved = networks | {"critic_optimizer": critic_optimizer, "env": env}

    # Storage
    shape = (args.num_steps, args.num_envs)
    obs_buf, next_obs_buf = torch.zeros(2, *shape, obs_dim, device=device)
    actions = torch.zeros(*shape, act_dim, device=device)
    logprobs = torch.zeros(*shape, num_agents, device=device)
    rewards, terminations, truncations = torch.zeros(3, *shape, device=device)

    # Resume
    obs, start_iteration, start_time, run_id = env.reset(args.seed), 0, time.time(), f"{time.time_ns():x}"
    last_returns: deque[float] = deque(maxlen=20)
    if checkpoint:
        for name, part in saved.items():
            part.load_state_dict(checkpoint[name])
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
    # PyTorch's threads are for the updates: while they wait for more they spin, on the cores that the physics needs.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    for iteration in range(start_iteration + 1, num_iterations + 1):
        global_step = iteration * batch_size
        lr_scale = 1 - (iteration - 1) / num_iterations if args.anneal_lr else 1.0
        log: dict[str, float] = {}

        # Rollout
        policy = JointPolicy(actors, partition, obs_dim, args.share_param)
        episodes: list[tuple[float, int]] = []
        for t in range(args.num_steps):
            obs_buf[t] = obs
            actions[t], logprobs[t] = policy.act(obs, generator)
            obs, next_obs_buf[t], rewards[t], terminations[t], truncations[t], infos = env.step(actions[t])
            if "_episode" in infos:
                done, episode = infos["_episode"], infos["episode"]
                episodes += zip(episode["r"][done].tolist(), episode["l"][done].tolist(), strict=True)

        # Advantages
        torch.set_num_threads(num_threads)
        with torch.no_grad():
            values, next_values = critic(obs_buf).squeeze(-1), critic(next_obs_buf).squeeze(-1)
        ends = terminations, truncations
        advantages, returns = compute_gae(rewards, values, next_values, *ends, args.gamma, args.gae_lambda)
        b_obs, b_returns, b_advantages = obs_buf.flatten(0, 1), returns.flatten(), advantages.flatten()
        b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)

        # Per agent
        agents_obs = [agent_obs(obs_buf, partition, i, args.share_param).flatten(0, 1) for i in range(num_agents)]
        agents_actions = [actions.flatten(0, 1)[:, act_ids] for act_ids in partition.act_ids]
        agents_logprobs = list(logprobs.flatten(0, 1).T)

        # Actor update
        log["charts/learning_rate"] = lr_scale * args.critic_learning_rate  # the only one
        batch = agents_obs, agents_actions, agents_logprobs, b_advantages
        stats, M = hatrpo_update(actors, *batch, args, generator)
        log["losses/M_std"] = M.std().item()

        # Critic update
        log["charts/critic_learning_rate"] = lr_scale * args.critic_learning_rate
        critic_optimizer.param_groups[0]["lr"] = lr_scale * args.critic_learning_rate
        value_loss = critic_update(critic, critic_optimizer, b_obs, b_returns, args, generator)

        # Evaluation
        torch.set_num_threads(1)
        last = iteration == num_iterations
        interval = args.eval_interval or args.total_timesteps
        if args.eval_episodes and (last or global_step % interval < batch_size):
            policy = JointPolicy(actors, partition, obs_dim, args.share_param)
            log |= evaluate(eval_env, policy, args.seed)
            start_time += log["eval/seconds"]  # SPS is the speed of training

        # Logging
        log["losses/value_loss"] = value_loss.item()
        log["losses/explained_variance"] = (1 - (returns - values).var() / returns.var().clamp(min=1e-8)).item()
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
            save(model | {"obs_rms": env.obs_rms.state_dict(), "args": asdict(args)}, run_dir / "model.pt")
        if stopped:
            writer.close()
            bar.close()
        if signals and not last:
            print(f"stopped at step {global_step}; to go on: --resume {run_dir}", file=sys.stderr)
            raise SystemExit(128 + signals[0])

    if args.eval_only or film:
        policy = JointPolicy(actors, partition, obs_dim, args.share_param)
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
