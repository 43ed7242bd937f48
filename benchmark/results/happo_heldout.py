"""What an update of HAPPO is worth on batches that it was not made from, for several choices of M.

    PYTHONPATH=. python benchmark/results/happo_heldout.py RUN_DIR [NUMBER OF BATCHES]

RUN_DIR is a run of happo_mamujoco.py with its checkpoint. The policy plays the batches without being updated. Then each
batch makes one update, from the checkpoint's policy and optimizer, and the others judge it. What is printed are means
over the updates with their standard errors:

- gain: the other batches' mean of A log(new / old) of the joint policy, in thousandths (the surrogate gain to first
  order)
- own gain: the mean of A (new / old - 1) on the batch that made the update, in thousandths
- KL: the KL divergence of the joint policy, estimated on the other batches
- log std: the change of the log standard deviation, mean over the actuators, in thousandths
- std of M: after the last agent
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
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
    before = [log_probs(start, batch) for batch in batches]

    print(f"{args.env_id}, step {checkpoint['step']}, {num_batches} batches")
    print("| M | gain | own gain | KL | log std | std of M, median and largest |")
    print("|---|---|---|---|---|---|")
    for choice in CHOICES:
        rows = []
        for k, batch in enumerate(batches):
            policy = copy.deepcopy(start)
            optimizer = Adam(policy.parameters(), eps=1e-5, fused=True)
            optimizer.load_state_dict(copy.deepcopy(checkpoint["actor_optimizer"]))
            torch.manual_seed(k)
            M, joint_logratio = update(policy, optimizer, batch, choice, args)
            gains = []
            kls = []
            for j, other in enumerate(batches):
                if j != k:
                    after = log_probs(policy, other)
                    logratio = torch.stack(after).sum(0) - torch.stack(before[j]).sum(0)
                    gains.append((logratio * other[2]).mean())
                    kls.append(happo.approx_kl(logratio))
            own_gain = ((joint_logratio.exp() - 1) * batch[2]).mean()
            changes = [new.log_std - old.log_std for new, old in zip(policy.actors, start.actors)]
            log_std = torch.cat(changes).mean().detach()
            rows.append(
                [1000 * np.mean(gains), 1000 * own_gain, np.mean(kls), 1000 * log_std, M.std()]
            )
        rows = torch.tensor(rows, dtype=torch.float64).numpy()
        mean = rows.mean(0)
        error = rows.std(0, ddof=1) / num_batches**0.5
        cells = [f"{mean[0]:.1f} +- {error[0]:.1f}", f"{mean[1]:.0f} +- {error[1]:.0f}"]
        cells += [f"{mean[2]:.3f} +- {error[2]:.3f}", f"{mean[3]:.2f} +- {error[3]:.2f}"]
        cells += [f"{np.median(rows[:, 4]):.2f}, {rows[:, 4].max():.2f}"]
        print(f"| {choice} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
