"""What an update of HAPPO is worth on batches that it was not made from, for several choices of M.

    PYTHONPATH=. python benchmark/results/happo_heldout.py RUN_DIR [NUMBER OF BATCHES]

RUN_DIR is a run of happo_mamujoco.py with its checkpoint. The policy plays the batches without being updated. Then each
batch makes one update, from the checkpoint's policy and optimizer, and the others judge it. What is printed are means
over the updates with standard errors (of gain and KL the jackknife's over the batches):

- gain: the other batches' mean of A (log(new / old) + KL(old || new)) of the joint policy, in thousandths. It is the
  surrogate gain to first order. The KL is that of the row's own distributions, so that the factor behind A has the mean
  0 for every observation. Without the KL, A would count where it is small on average and the policy changes much.
- own gain: the mean of A (new / old - 1) on the batch that made the update, in thousandths
- KL: the KL divergence of the joint policy, on the other batches
- log std: the change of the log standard deviation, mean over the actuators, in thousandths
- std of M: after the last agent
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.optim import Adam

import envs
import happo_mamujoco as happo

CHOICES = ("exact", "exact minus its mean", "cut at 2", "M = A")


def next_M(choice: str, exact: Tensor, joint_logratio: Tensor, advantages: Tensor) -> Tensor:
    """M for the next agent, from the exact one, the log-ratio of the agents before it, and A, all [B]."""
    if choice == "exact minus its mean":
        return exact - exact.mean()
    if choice == "cut at 2":
        return joint_logratio.exp().clamp(max=2) * advantages
    if choice == "M = A":
        return advantages
    return exact


def update(
    policy: happo.Policy, optimizer: Adam, batch: tuple, choice: str, args: happo.Args
) -> tuple[Tensor, Tensor]:
    """`happo.happo_update` with another choice of M; return M and the joint log-ratio after the last agent."""
    obs, actions, advantages = batch
    logprobs = log_probs(policy, batch)
    order = torch.randperm(len(obs)).tolist()
    M = advantages
    exact = advantages
    joint_logratio = torch.zeros_like(M)
    for i in order:
        actor = policy.actors[i]
        for _ in range(args.update_epochs):
            for mb in torch.randperm(len(obs[0])).chunk(args.num_minibatches):
                optimizer.zero_grad()
                loss, _, _ = happo.ppo_loss(
                    actor, obs[i][mb], actions[i][mb], logprobs[i][mb], M[mb], args
                )
                loss.backward()
                nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
                optimizer.step()
        with torch.no_grad():
            _, logratio, _ = happo.ppo_loss(actor, obs[i], actions[i], logprobs[i], M, args)
        joint_logratio += logratio
        exact = exact * logratio.exp()
        M = next_M(choice, exact, joint_logratio, advantages)
    return M, joint_logratio


def log_probs(policy: happo.Policy, batch: tuple) -> list[Tensor]:
    """The log-probabilities [B] of each agent's actions."""
    obs, actions, _ = batch
    with torch.no_grad():
        return [policy.actors[i](obs[i]).log_prob(actions[i]) for i in range(len(obs))]


def play(
    env: happo.NormalizedEnv, policy: happo.Policy, critic: nn.Module, args: happo.Args
) -> tuple:
    """One batch: each agent's observations and actions, and the normalised advantages."""
    obs = []
    actions = []
    steps = []
    for _ in range(args.num_steps):
        obs.append(env.obs)
        actions.append(policy.act(env.obs, noise=True))
        steps.append(env.step(actions[-1]))
    next_obs, rewards, terminations, truncations = [
        torch.stack(part).float() for part in zip(*steps)
    ]
    obs = torch.stack(obs)
    with torch.no_grad():
        values = critic(obs).squeeze(-1)
        next_values = critic(next_obs).squeeze(-1)
    advantages, _ = happo.compute_gae(
        rewards, values, next_values, terminations, truncations, args.gamma, args.gae_lambda
    )
    advantages = advantages.flatten()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    agents_actions = [torch.cat(actions)[:, ids] for ids in policy.act_ids]
    return policy.observe(obs.flatten(0, 1)), agents_actions, advantages


def mean_and_error(gains: Tensor) -> tuple[float, float]:
    """Mean of the gains [N, N], of update k by batch j, without the diagonal; and its standard error.

    The error is the jackknife's, which leaves out a batch both as an update and as a judge: all updates have the same
    judges, so their gains are not independent.
    """
    n = len(gains)
    gains = gains.clone().fill_diagonal_(0)
    total = gains.sum()
    without_k = (total - gains.sum(0) - gains.sum(1)) / ((n - 1) * (n - 2))
    error = ((n - 1) / n * ((without_k - without_k.mean()) ** 2).sum()).sqrt()
    return float(total / (n * (n - 1))), float(error)


def judge(
    policy: nn.Module, batches: list[tuple], before: list[list[Distribution]], update: int
) -> tuple[Tensor, Tensor]:
    """Gain and KL [N] of an updated policy on each batch, and 0 on the batch that made the update.

    The gain is the mean of A (log(new / old) + KL(old || new)); `before` are the old distributions of a batch's agents.
    """
    gains = torch.zeros(len(batches))
    kls = torch.zeros(len(batches))
    for j, (obs, actions, advantages) in enumerate(batches):
        if j == update:
            continue
        logratio = torch.zeros_like(advantages)
        kl = torch.zeros_like(advantages)
        for i, actor in enumerate(policy.actors):
            with torch.no_grad():
                old = before[j][i]
                new = actor(obs[i])
                kl += kl_divergence(old, new)
                logratio += new.log_prob(actions[i]) - old.log_prob(actions[i])
        gains[j] = ((logratio + kl) * advantages).mean()
        kls[j] = kl.mean()
    return gains, kls


def distributions(policy: nn.Module, batch: tuple) -> list[Distribution]:
    """What each agent draws its actions from, for the observations of a batch."""
    with torch.no_grad():
        return [actor(agent_obs) for actor, agent_obs in zip(policy.actors, batch[0])]


def main() -> None:
    """Print the table of one run."""
    torch.set_num_threads(1)
    run_dir = Path(sys.argv[1])
    num_batches = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    args = happo.Args(**checkpoint["args"])
    torch.manual_seed(1)
    vec = envs.make_vec(args.env_id, args.num_envs, args.agent_obsk, 1)
    env = happo.NormalizedEnv(vec, 1, args.gamma)
    (obs_dim,) = vec.single_observation_space.shape
    start = happo.Policy(vec.partition, obs_dim, args)
    critic = happo.mlp((obs_dim, *args.hidden_sizes, 1), 1.0)
    env.load_state_dict(checkpoint["env"])
    start.load_state_dict(checkpoint["policy"])
    critic.load_state_dict(checkpoint["critic"])
    batches = [play(env, start, critic, args) for _ in range(num_batches)]
    before = [distributions(start, batch) for batch in batches]

    print(f"{args.env_id}, step {checkpoint['step']}, {num_batches} batches")
    print("| M | gain | own gain | KL | log std | std of M, median and largest |")
    print("|---|---|---|---|---|---|")
    for choice in CHOICES:
        rows = []
        gains = torch.zeros(num_batches, num_batches)
        kls = torch.zeros(num_batches, num_batches)
        for k, batch in enumerate(batches):
            policy = copy.deepcopy(start)
            optimizer = Adam(policy.parameters(), eps=1e-5, fused=True)
            optimizer.load_state_dict(copy.deepcopy(checkpoint["actor_optimizer"]))
            torch.manual_seed(k)
            M, joint_logratio = update(policy, optimizer, batch, choice, args)
            gains[k], kls[k] = judge(policy, batches, before, k)
            own_gain = ((joint_logratio.exp() - 1) * batch[2]).mean()
            changes = [new.log_std - old.log_std for new, old in zip(policy.actors, start.actors)]
            log_std = torch.cat(changes).mean().detach()
            rows.append([1000 * own_gain, 1000 * log_std, M.std()])
        rows = torch.tensor(rows, dtype=torch.float64).numpy()
        mean = rows.mean(0)
        error = rows.std(0, ddof=1) / num_batches**0.5
        gain, gain_error = mean_and_error(1000 * gains)
        kl, kl_error = mean_and_error(kls)
        cells = [f"{gain:.1f} +- {gain_error:.1f}", f"{mean[0]:.0f} +- {error[0]:.0f}"]
        cells += [f"{kl:.3f} +- {kl_error:.3f}", f"{mean[1]:.2f} +- {error[1]:.2f}"]
        cells += [f"{np.median(rows[:, 2]):.2f}, {rows[:, 2].max():.2f}"]
        print(f"| {choice} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
