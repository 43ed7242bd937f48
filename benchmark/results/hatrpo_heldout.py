"""What an update of HATRPO is worth on batches that it was not made from, for several ways to make its steps.

    PYTHONPATH=. python benchmark/results/hatrpo_heldout.py RUN_DIR [NUMBER OF BATCHES]

RUN_DIR is a run of hatrpo_mamujoco.py with its checkpoint. The policy plays the batches without being updated. Then
each batch makes one update, from the checkpoint's policy, sums of gradients and radius, and the others judge it. All
ways have the radius of the checkpoint on average over the agents:

- the script: `hatrpo.trpo_step`
- no sum: along the gradient of this batch alone
- four steps: each a quarter as long, along the gradient at the parameters that the step before led to
- by need: agent i has a share of the joint radius in proportion to s' H^-1 s of its sum of gradients s, with M = A
- half: the batch's first half makes the step. It is kept if the surrogate rises on this half.
- half, judged: the same step is kept if the surrogate rises on the other half of the batch.

What is printed are means over the updates with standard errors (of gain, difference and KL the jackknife's over the
batches):

- gain: the other batches' mean of A (log(new / old) + KL(old || new)) of the joint policy, in thousandths. It is the
  surrogate gain to first order. The KL is that of the row's own distributions, so that the factor behind A has the mean
  0 for every observation. Without the KL, A would count where it is small on average and the policy changes much.
- beside the script's: the mean of its differences from the script's gain with the same batch
- own gain: the mean of A (new / old - 1) on the batch that made the update, in thousandths
- KL: the KL divergence of the joint policy, on the other batches
- accepted: the share of the agents' steps that were kept
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from happo_heldout import distributions, judge, log_probs, mean_and_error, play
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import envs
import hatrpo_mamujoco as hatrpo

WAYS = ("the script", "no sum", "four steps", "by need", "half", "half, judged")


def direction(actor: torch.nn.Module, data: tuple, old_sum: Tensor, args: hatrpo.Args) -> tuple:
    """The natural gradient x [P] of the decayed sum with this data's gradient, Hx [P], and the new sum [P]."""
    obs, actions, logprobs, M = data
    surrogate = ((actor(obs).log_prob(actions) - logprobs).exp() * M).mean()
    gradient_sum = args.momentum * old_sum + hatrpo.flat_gradient(surrogate, actor)
    H = hatrpo.fisher_vector_product(actor, obs)
    x, Hx = hatrpo.conjugate_gradient(H, gradient_sum, args.cg_damping, args.cg_iters)
    return x, Hx, gradient_sum


def take_steps(
    actor: torch.nn.Module,
    data: tuple,
    judge: tuple,
    old_sum: Tensor,
    delta: Tensor,
    parts: int,
    args: hatrpo.Args,
) -> bool:
    """Take `parts` steps of 1 / parts of the radius's length; keep them, shortened, if the judge's surrogate rises."""
    theta = parameters_to_vector(actor.parameters()).detach()
    new_actor = copy.deepcopy(actor)
    for _ in range(parts):
        x, Hx, _ = direction(new_actor, data, old_sum, args)
        beta = torch.sqrt(2 * delta / (x @ Hx).clamp(min=1e-12)) / parts
        with torch.no_grad():
            end = parameters_to_vector(new_actor.parameters()) + beta * x
            vector_to_parameters(end, new_actor.parameters())
    obs, actions, logprobs, M = judge
    with torch.no_grad():
        old_dist = actor(obs)
        for j in range(args.backtrack_iters + 1):
            new_theta = theta + args.backtrack_coeff**j * (end - theta)
            vector_to_parameters(new_theta, new_actor.parameters())
            new_dist = new_actor(obs)
            gain = (((new_dist.log_prob(actions) - logprobs).exp() - 1) * M).mean()
            if gain > 0 and kl_divergence(old_dist, new_dist).mean() <= delta:
                actor.load_state_dict(new_actor.state_dict())
                return True
    return False


def radii_by_need(
    policy: hatrpo.Policy, batch: tuple, region: hatrpo.TrustRegion, args: hatrpo.Args
) -> list[Tensor]:
    """Radii of the agents in proportion to s' H^-1 s, of the same sum as equal ones."""
    logprobs = log_probs(policy, batch)
    needs = []
    for i, actor in enumerate(policy.actors):
        data = (batch[0][i], batch[1][i], logprobs[i], batch[2])
        x, _, gradient_sum = direction(actor, data, region.gradient_sums[i], args)
        needs.append((x @ gradient_sum).detach())
    total = sum(needs)
    return [len(needs) * region.delta * need / total for need in needs]


def update(
    policy: hatrpo.Policy, region: hatrpo.TrustRegion, batch: tuple, way: str, args: hatrpo.Args
) -> tuple[Tensor, float]:
    """`hatrpo.hatrpo_update` in another way; return the joint log-ratio [B] and the share of accepted steps."""
    obs, actions, advantages = batch
    logprobs = log_probs(policy, batch)
    radii = [region.delta] * len(obs)
    if way == "by need":
        radii = radii_by_need(policy, batch, region, args)
    order = torch.randperm(len(obs)).tolist()
    half = len(advantages) // 2
    M = advantages
    joint_logratio = torch.zeros_like(M)
    accepted = 0
    for i in order:
        actor = policy.actors[i]
        data = (obs[i], actions[i], logprobs[i], M)
        old_sum = region.gradient_sums[i].clone()
        if way == "no sum":
            old_sum.zero_()
        if way == "the script":
            _, stats = hatrpo.trpo_step(actor, *data, region, i, args)
            accepted += stats["accepted"]
        elif way in ("half", "half, judged"):
            first = tuple(part[:half] for part in data)
            second = tuple(part[half:] for part in data)
            judge = first if way == "half" else second
            accepted += take_steps(actor, first, judge, old_sum, radii[i], 1, args)
        else:
            parts = 4 if way == "four steps" else 1
            accepted += take_steps(actor, data, data, old_sum, radii[i], parts, args)
        with torch.no_grad():
            joint_logratio += actor(obs[i]).log_prob(actions[i]) - logprobs[i]
        M = joint_logratio.exp().clamp(max=args.max_ratio) * advantages
    return joint_logratio, accepted / len(obs)


def main() -> None:
    """Print the table of one run."""
    torch.set_num_threads(1)
    run_dir = Path(sys.argv[1])
    num_batches = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    args = hatrpo.Args(**checkpoint["args"])
    torch.manual_seed(1)
    vec = envs.make_vec(args.env_id, args.num_envs, args.agent_obsk, 1)
    env = hatrpo.NormalizedEnv(vec, 1, args.gamma)
    (obs_dim,) = vec.single_observation_space.shape
    start = hatrpo.Policy(vec.partition, obs_dim, args)
    critic = hatrpo.mlp((obs_dim, *args.hidden_sizes, 1), 1.0)
    region = hatrpo.TrustRegion(start.actors, args)
    env.load_state_dict(checkpoint["env"])
    start.load_state_dict(checkpoint["policy"])
    critic.load_state_dict(checkpoint["critic"])
    region.load_state_dict(checkpoint["region"])
    batches = []
    for _ in range(num_batches):
        obs, actions, advantages = play(env, start, critic, args)
        rows = torch.randperm(len(advantages))  # so that the halves of a batch are random
        batches.append(([o[rows] for o in obs], [a[rows] for a in actions], advantages[rows]))
    before = [distributions(start, batch) for batch in batches]

    print(f"{args.env_id}, seed {args.seed}, step {checkpoint['step']}, {num_batches} batches")
    script_gains = None
    print("| way | gain | beside the script's | own gain | KL | gain / sqrt(2 KL) | accepted |")
    print("|---|---|---|---|---|---|---|")
    for way in WAYS:
        own_gains = []
        accepted_shares = []
        gains = torch.zeros(num_batches, num_batches)
        kls = torch.zeros(num_batches, num_batches)
        for k, batch in enumerate(batches):
            policy = copy.deepcopy(start)
            torch.manual_seed(k)
            joint_logratio, accepted = update(policy, copy.deepcopy(region), batch, way, args)
            gains[k], kls[k] = judge(policy, batches, before, k)
            own_gains.append(1000 * float(((joint_logratio.exp() - 1) * batch[2]).mean()))
            accepted_shares.append(accepted)
        gains *= 1000
        if script_gains is None:
            script_gains = gains
        gain, gain_error = mean_and_error(gains)
        difference, difference_error = mean_and_error(gains - script_gains)
        kl, kl_error = mean_and_error(kls)
        own_error = np.std(own_gains, ddof=1) / num_batches**0.5
        cells = [f"{gain:.2f} +- {gain_error:.2f}"]
        cells += [f"{difference:.2f} +- {difference_error:.2f}"]
        cells += [f"{np.mean(own_gains):.1f} +- {own_error:.1f}"]
        cells += [f"{kl:.4f} +- {kl_error:.4f}", f"{gain / (2 * kl) ** 0.5:.1f}"]
        cells += [f"{np.mean(accepted_shares):.2f}"]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
