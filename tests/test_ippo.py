"""IPPO: every agent learns as if it were alone."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import theta_of
from test_runs import differences, newest
from test_scripts import train
from torch import Tensor, nn
from torch.optim import SGD, Adam

import envs
import ippo_mamujoco as ippo
import mappo_mamujoco as mappo

# All gradients are clipped, so that a clipping of all agents together would show.
ARGS = ippo.Args(num_minibatches=2, update_epochs=3, hidden_sizes=(8,), max_grad_norm=0.01)


def test_one_agent_is_mappo(tmp_path: Path):
    """Alone, IPPO and MAPPO are the same PPO: networks, optimisers, statistics.

    Only the mean of the advantages is taken otherwise, of a matrix with one row: its last bit may differ. So after one
    iteration the actor may differ in its last bits, and all else is the same; the later ones carry that on.
    """
    for num_iterations in (1, 4):
        checkpoints = []
        for script in (ippo, mappo):
            run_dir = tmp_path / f"{script.__name__}_{num_iterations}"
            train(script, run_dir, env_id="Hopper-1x3", total_timesteps=128 * num_iterations)
            checkpoints.append(newest(run_dir))
        a, b = checkpoints
        a["critic"] = {name.removeprefix("0."): value for name, value in a["critic"].items()}
        a["script"] = b["script"]
        if num_iterations == 1:
            paths = differences(a, b)
            assert all(path.startswith(("/policy", "/actor_optimizer")) for path in paths)
        for name in ("policy", "actor_optimizer", "critic", "critic_optimizer"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(a["obs_rms"][0], b["obs_rms"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("agent", [0, 1, 2])
def test_an_update_takes_nothing_from_the_other_agents(agent: int):
    """An agent's new actor is the same bits whatever the others saw, did and expected; its own data do matter."""
    sizes = [(3, 2), (5, 1), (2, 3)]
    torch.manual_seed(0)
    obs = [torch.randn(16, obs_dim) for obs_dim, _ in sizes]
    actions = [torch.randn(16, act_dim) for _, act_dim in sizes]
    advantages = [torch.randn(16) for _ in sizes]
    batch = [obs, actions, advantages]

    def updated(batch: list[list[Tensor]]) -> Tensor:
        torch.manual_seed(1)
        actors = [ippo.Actor(obs_dim, act_dim, ARGS) for obs_dim, act_dim in sizes]
        optimizer = Adam(nn.ModuleList(actors).parameters(), lr=1e-2)
        ippo.ippo_update(actors, optimizer, *batch, ARGS)
        return theta_of(actors[agent])

    def replaced(agents: set[int]) -> list[list[Tensor]]:
        torch.manual_seed(2)
        return [
            [torch.randn_like(x) if i in agents else x for i, x in enumerate(xs)] for xs in batch
        ]

    alone = updated(batch)
    assert torch.equal(alone, updated(replaced({0, 1, 2} - {agent})))
    assert not torch.equal(alone, updated(replaced({agent})))


def test_the_critics_share_an_optimizer_and_nothing_else():
    """Three rounds of fits of three critics in one Adam: to the last bit what each with an Adam of its own does.

    The later rounds have momentum, which must not move the others; the last critic has enormous gradients.
    """
    args = ippo.Args(num_minibatches=2, critic_epochs=3, max_grad_norm=0.5)
    torch.manual_seed(0)
    critics = nn.ModuleList(ippo.mlp((obs_dim, 8, 1), 1.0) for obs_dim in (3, 5, 2))
    alone = copy.deepcopy(critics)
    start = copy.deepcopy(critics)
    optimizer = Adam(critics.parameters(), lr=1e-2, eps=1e-5, fused=True)
    optimizers = [Adam(critic.parameters(), lr=1e-2, eps=1e-5, fused=True) for critic in alone]
    for fit in range(3):
        for i, obs_dim in enumerate((3, 5, 2)):
            obs = torch.randn(16, obs_dim)
            returns = torch.randn(16) * (1e4 if i == 2 else 1)
            others = [theta_of(critic) for critic in critics]
            losses = []
            for critic, its_optimizer in ((critics[i], optimizer), (alone[i], optimizers[i])):
                torch.manual_seed(3 * fit + i)
                losses.append(ippo.critic_update(critic, its_optimizer, obs, returns, args))
            assert torch.equal(*losses)
            assert torch.equal(theta_of(critics[i]), theta_of(alone[i]))
            moved = [
                not torch.equal(theta_of(critic), before)
                for critic, before in zip(critics, others, strict=True)
            ]
            assert moved == [j == i for j in range(3)]
    for critic, first in zip(critics, start, strict=True):
        assert (theta_of(critic) - theta_of(first)).abs().max() > 0.01


@pytest.mark.parametrize("share_param", [False, True])
def test_each_critic_sees_what_its_agent_sees(
    share_param: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With partial observations: V^i is a function of o^i, its GAE uses its own values, and it is fit to these.

    Also with a shared actor every agent has a critic of its own, and a fit moves this one alone.
    """
    gaes = []
    fits = []
    updates = []
    compute_gae = ippo.compute_gae
    critic_update = ippo.critic_update
    ippo_update = ippo.ippo_update

    def recorded_gae(*args: object) -> tuple[Tensor, Tensor]:
        result = compute_gae(*args)
        gaes.append([arg.clone() for arg in (*args[:5], *result)])
        return result

    def recorded_fit(
        critic: nn.Module, optimizer: Adam, obs: Tensor, returns: Tensor, args: ippo.Args
    ) -> Tensor:
        with torch.no_grad():
            fitted = critic(obs).squeeze(-1)
        own = {id(parameter) for parameter in critic.parameters()}
        parameters = optimizer.param_groups[0]["params"]
        before = [parameter.detach().clone() for parameter in parameters]
        loss = critic_update(critic, optimizer, obs, returns, args)
        for parameter, old in zip(parameters, before, strict=True):
            assert torch.equal(parameter, old) == (id(parameter) not in own)
        fits.append((critic, obs.clone(), returns.clone(), fitted))
        return loss

    def recorded_update(
        actors: object, optimizer: Adam, obs: list, actions: list, advantages: Tensor, *args: object
    ) -> dict:
        updates.append((obs, advantages.clone()))
        return ippo_update(actors, optimizer, obs, actions, advantages, *args)

    monkeypatch.setattr(ippo, "compute_gae", recorded_gae)
    monkeypatch.setattr(ippo, "critic_update", recorded_fit)
    monkeypatch.setattr(ippo, "ippo_update", recorded_update)
    env_id = "Reacher-2x1" if share_param else "Pusher-3p"  # sharing needs equally many actuators
    sizes = {"num_envs": 4, "num_steps": 32, "total_timesteps": 256}
    train(ippo, tmp_path / "run", env_id=env_id, agent_obsk=0, share_param=share_param, **sizes)
    widths = [len(ids) for ids in envs.make_vec(env_id, 1, 0).partition.obs_ids]
    n = len(widths)
    assert len(set(widths)) > 1
    assert len(updates) == 2 and len(gaes) == len(fits) == 2 * n
    assert len({id(critic) for critic, *_ in fits}) == n

    for k in range(2 * n):
        i = k % n
        agents_obs, agents_advantages = updates[k // n]
        rewards, values, next_values, terminations, truncations, advantages, returns = gaes[k]
        critic, obs, targets, fitted = fits[k]
        assert critic is fits[i][0]
        own, padding, agent_id = obs.tensor_split([widths[i], max(widths)], dim=1)
        if share_param:
            assert padding.shape[1] == max(widths) - widths[i] and not padding.any()
            assert torch.equal(agent_id, torch.eye(n)[[i] * len(obs)])
        else:
            assert obs.shape[1] == widths[i]
        assert own.std(0).min() > 0
        assert torch.equal(obs, agents_obs[i]) and torch.equal(targets, returns.flatten())
        assert torch.equal(rewards, gaes[k - i][0])  # the shared reward
        torch.testing.assert_close(values.flatten(), fitted, rtol=1e-5, atol=1e-6)
        goes_on = terminations[:-1] + truncations[:-1] == 0
        assert goes_on.any()
        torch.testing.assert_close(
            next_values[:-1][goes_on], values[1:][goes_on], rtol=1e-5, atol=1e-6
        )
        flat = advantages.flatten()
        normalized = (flat - flat.mean()) / flat.std()
        torch.testing.assert_close(agents_advantages[i], normalized, rtol=1e-4, atol=1e-5)
    for k in (0, n):
        assert not torch.equal(gaes[k][1], gaes[k + 1][1])


def test_own_advantages_are_used():
    """Each agent's first step goes along the gradient of its own A^i."""
    args = ippo.Args(num_minibatches=1, update_epochs=1, hidden_sizes=(8,))
    torch.manual_seed(0)
    obs = torch.randn(16, 3)
    actions = torch.randn(16, 1)
    advantages = torch.randn(16)
    start = ippo.Actor(3, 1, args)
    actors = [copy.deepcopy(start), copy.deepcopy(start)]
    optimizer = SGD(nn.ModuleList(actors).parameters(), lr=1e-3)
    batch = [obs, obs], [actions, actions], [advantages, -advantages]
    ippo.ippo_update(actors, optimizer, *batch, args)
    # The gradient of log-probability times A is that of the ratio times A.
    objective = (advantages * start(obs).log_prob(actions)).mean()
    gradients = torch.autograd.grad(objective, list(start.parameters()))
    gradient = torch.cat([x.flatten() for x in gradients])
    assert gradient.abs().max() > 0.01
    for actor, sign in zip(actors, (1, -1), strict=True):
        step = theta_of(actor) - theta_of(start)
        torch.testing.assert_close(step, sign * 1e-3 * gradient, rtol=1e-3, atol=1e-7)
