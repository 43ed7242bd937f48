"""IPPO: every agent learns as if it were alone."""

from pathlib import Path

import pytest
import torch
from test_runs import differences, newest
from test_scripts import train
from torch import Tensor

import envs
import ippo_mamujoco as ippo
import mappo_mamujoco as mappo

ARGS = {"num_minibatches": 2, "update_epochs": 3, "hidden_sizes": (8,)}


def noise(like: Tensor) -> Tensor:
    """Something else of the same shape."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(99))


def test_one_agent_is_mappo(tmp_path: Path):
    """Alone, IPPO and MAPPO are the same PPO: networks, optimisers, statistics, to the last bit."""
    for script in (ippo, mappo):
        train(script, tmp_path / script.__name__, env_id="Hopper-1x3", total_timesteps=512)
    a, b = newest(tmp_path / "ippo_mamujoco"), newest(tmp_path / "mappo_mamujoco")
    a["critic"] = {"theta": a.pop("critics")["0.theta"]}
    a["critic_optimizer"], a["script"] = a.pop("critic_optimizer_0"), b["script"]
    assert differences(a, b) == []


@pytest.mark.parametrize("agent", [0, 1, 2])
def test_an_update_takes_nothing_from_the_other_agents(agent: int):
    """An agent's new actor is the same bits whatever the others saw, did and expected; its own data do matter."""
    sizes, generator = [(3, 2), (5, 1), (2, 3)], torch.Generator().manual_seed(0)
    batch = [
        [torch.randn(16, o, generator=generator) for o, _ in sizes],
        [torch.randn(16, a, generator=generator) for _, a in sizes],
        [torch.randn(16, generator=generator) for _ in sizes],
    ]

    def updated(batch: list[list[Tensor]]) -> Tensor:
        init = torch.Generator().manual_seed(1)
        actors = [ippo.Actor(o, a, ippo.Args(**ARGS), init) for o, a in sizes]
        optimizer = torch.optim.Adam(torch.nn.ModuleList(actors).parameters(), lr=1e-2)
        ippo.ippo_update(actors, optimizer, *batch, ippo.Args(**ARGS), torch.Generator().manual_seed(2))
        return actors[agent].theta.detach()

    def replaced(of_agents: set[int]) -> list[list[Tensor]]:
        return [[noise(x) if i in of_agents else x for i, x in enumerate(xs)] for xs in batch]

    alone, others = updated(batch), updated(replaced({0, 1, 2} - {agent}))
    assert torch.equal(alone, others)
    assert not torch.equal(alone, updated(replaced({agent})))


@pytest.mark.parametrize("share_param", [False, True])
def test_each_critic_sees_what_its_agent_sees(share_param: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With partial observations: V^i is a function of o^i, its GAE uses its own values, and it is fit to these."""
    gaes, fits, seen = [], [], []
    compute_gae, critic_update, ippo_update = ippo.compute_gae, ippo.critic_update, ippo.ippo_update

    def recorded_gae(*args: object) -> tuple[Tensor, Tensor]:
        gaes.append((args[0].clone(), args[1].clone(), compute_gae(*args)))
        return gaes[-1][2]

    def recorded_fit(critic: torch.nn.Module, optimizer: object, obs: Tensor, returns: Tensor, *args: object) -> Tensor:
        fits.append((obs, returns, critic(obs).squeeze(-1).detach()))
        return critic_update(critic, optimizer, obs, returns, *args)

    def recorded_update(actors: object, optimizer: object, obs: Tensor, *args: object) -> object:
        seen.append((obs, args[1]))
        return ippo_update(actors, optimizer, obs, *args)

    monkeypatch.setattr(ippo, "compute_gae", recorded_gae)
    monkeypatch.setattr(ippo, "critic_update", recorded_fit)
    monkeypatch.setattr(ippo, "ippo_update", recorded_update)
    train(ippo, tmp_path / "run", env_id="Pusher-3p", agent_obsk=0, share_param=share_param, total_timesteps=128)
    partition = envs.make_vec("Pusher-3p", 1, 0).partition
    widths = [len(ids) for ids in partition.obs_ids]
    assert len(set(widths)) > 1
    ((agents_obs, agents_advantages),) = seen
    assert len(gaes) == len(fits) == 3
    for i, ((rewards, values, (advantages, returns)), (obs, targets, fitted)) in enumerate(
        zip(gaes, fits, strict=True)
    ):
        own, padding, id_ = obs.tensor_split([widths[i], max(widths)], dim=1)
        assert own.std(0).min() > 0 and not padding.any()
        assert torch.equal(id_, torch.eye(3)[[i] * len(obs)] if share_param else obs[:, :0])
        assert torch.equal(obs, agents_obs[i]) and torch.equal(targets, returns.flatten())
        assert torch.equal(rewards, gaes[0][0])  # the shared reward
        if i == 0 or not share_param:  # shared critics have been fit to the agents before
            torch.testing.assert_close(values.flatten(), fitted, rtol=1e-5, atol=1e-6)
        flat = advantages.flatten()
        torch.testing.assert_close(agents_advantages[i], (flat - flat.mean()) / flat.std(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(gaes[0][1], gaes[1][1])


def test_own_advantages_are_used():
    """Each agent's first step goes along the gradient of its own A^i."""
    generator = torch.Generator().manual_seed(0)
    obs, actions = torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator)
    args = ippo.Args(num_minibatches=1, update_epochs=1, hidden_sizes=(8,))
    start, *actors = (ippo.Actor(3, 1, args, torch.Generator().manual_seed(1)) for _ in range(3))
    optimizer = torch.optim.SGD(torch.nn.ModuleList(actors).parameters(), lr=1e-3)
    advantages = torch.randn(16, generator=generator)
    batch = [obs, obs], [actions, actions], [advantages, -advantages]
    ippo.ippo_update(actors, optimizer, *batch, args, generator)
    objective = (advantages * start.log_prob(start(obs), actions)).mean()  # its gradient is that of the ratio times A
    (gradient,) = torch.autograd.grad(objective, start.theta)
    for actor, sign in zip(actors, (1, -1), strict=True):
        torch.testing.assert_close(actor.theta - start.theta, sign * 1e-3 * gradient, rtol=1e-3, atol=1e-7)
    assert gradient.abs().max() > 0.01
