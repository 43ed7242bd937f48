"""How much of a batch's policy gradient is signal, with the policy and the critic of a checkpoint.

    PYTHONPATH=. python benchmark/results/gradient_signal.py RUN_DIR [NUMBER OF BATCHES]

RUN_DIR is a run of mappo_, happo_ or hatrpo_mamujoco.py with its checkpoint. The policy plays the batches without being
updated. Each batch has a gradient: that of the mean of A log pi in the parameters of all agents. The gradients of two
batches share only the signal, so the mean of their product is the squared norm of the true gradient. What is printed is
this mean over all pairs of batches, divided by the mean squared norm of a batch's gradient, in percent: 100 would be a
gradient without noise. The standard error is the jackknife's, which leaves out one batch after the other.
"""

import sys
from pathlib import Path

import torch
from happo_heldout import play
from torch import Tensor

import envs
import hatrpo_mamujoco as hatrpo


def signal_share(products: Tensor) -> Tensor:
    """The share of signal, in percent, from the products [N, N] of the batches' gradients."""
    n = len(products)
    squared_norm = products.trace() / n
    signal = (products.sum() - products.trace()) / (n * (n - 1))
    return 100 * signal / squared_norm


def main() -> None:
    """Print the share of one run."""
    torch.set_num_threads(1)
    run_dir = Path(sys.argv[1])
    num_batches = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    shared = hatrpo.Args.__dataclass_fields__.keys() & checkpoint["args"].keys()
    args = hatrpo.Args(**{name: checkpoint["args"][name] for name in shared})
    torch.manual_seed(1)
    vec = envs.make_vec(args.env_id, args.num_envs, args.agent_obsk, 1)
    env = hatrpo.NormalizedEnv(vec, 1, args.gamma)
    (obs_dim,) = vec.single_observation_space.shape
    policy = hatrpo.Policy(vec.partition, obs_dim, args)
    critic = hatrpo.mlp((obs_dim, *args.hidden_sizes, 1), 1.0)
    env.load_state_dict(checkpoint["env"])
    policy.load_state_dict(checkpoint["policy"])
    critic.load_state_dict(checkpoint["critic"])
    gradients = []
    for _ in range(num_batches):
        obs, actions, advantages = play(env, policy, critic, args)
        parts = []
        for i, actor in enumerate(policy.actors):
            objective = (actor(obs[i]).log_prob(actions[i]) * advantages).mean()
            parts.append(hatrpo.flat_gradient(objective, actor))
        gradients.append(torch.cat(parts))
    gradients = torch.stack(gradients).double()
    products = gradients @ gradients.T
    left_out = []
    for k in range(num_batches):
        others = torch.arange(num_batches) != k
        left_out.append(signal_share(products[others][:, others]))
    left_out = torch.stack(left_out)
    n = num_batches
    error = ((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()).sqrt()
    name = f"{run_dir.name}, step {checkpoint['step']}, {n} batches"
    print(f"{name}: {signal_share(products):.2f} +- {error:.2f} %")


if __name__ == "__main__":
    main()
