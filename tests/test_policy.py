"""The policies: densities against torch.distributions, all the actors at once against each one alone."""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import mlp
from scipy import stats
from torch.distributions import Independent, Normal, kl_divergence

import envs
import hatrpo_mamujoco as hatrpo

pytestmark = pytest.mark.usefixtures("float64")
either_sharing = pytest.mark.parametrize("share_param", [False, True], ids=["separate", "shared"])
CPU = torch.device("cpu")


def close(got, expected, tolerance=1e-12):
    """Assert equality of shape, and of values to `tolerance`."""
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# Densities

SHAPES = [(1, 1), (7, 1), (7, 3), (4, 5, 6)]


def random_dist(shape):
    """Mean and log_std of a policy, and the same distribution by PyTorch."""
    mean, log_std = torch.randn(shape), torch.randn(*shape[:-2], 1, shape[-1])
    return (mean, log_std), Independent(Normal(mean, log_std.exp()), 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_equals_torch_distributions(script, shape):
    """The joint log-probability of the action: summed over its dimensions."""
    torch.manual_seed(0)
    (dist, expected), actions = random_dist(shape), 3 * torch.randn(shape)
    close(script.Actor.log_prob(dist, actions), expected.log_prob(actions))


@pytest.mark.parametrize("shape", SHAPES)
def test_entropy_equals_torch_distributions(script, shape):
    """Summed over the action's dimensions, and one number per network, as it is the same in every state."""
    torch.manual_seed(0)
    dist, expected = random_dist(shape)
    entropy = script.Actor.entropy(dist)
    assert entropy.shape == (*shape[:-2], 1)
    close(entropy.expand(shape[:-1]), expected.entropy())


@pytest.mark.parametrize("shape", SHAPES)
def test_kl_equals_torch_distributions(shape):
    """KL(old || new) and not the reverse, summed over the action's dimensions; exactly 0 of a policy to itself."""
    torch.manual_seed(0)
    (old, expected_old), (new, expected_new) = random_dist(shape), random_dist(shape)
    close(hatrpo.Actor.kl(old, new), kl_divergence(expected_old, expected_new))
    assert (hatrpo.Actor.kl(old, old) == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_the_mean_plus_noise_of_the_generator(script, shape):
    """log_std is a logarithm, the generator says it all, and without one there is no noise."""
    torch.manual_seed(0)
    (mean, log_std), _ = random_dist(shape)
    sample = script.Actor.sample((mean, log_std), torch.Generator().manual_seed(5))
    close(sample, mean + log_std.exp() * torch.randn(shape, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(script.Actor.sample((mean, log_std), None), mean)


# Networks


def test_initial_network(script):
    """Orthogonal weights of gain sqrt(2), 0.01 at the output; zero biases; log_std as asked for; reproducible."""
    args = script.Args(hidden_sizes=(8, 4), log_std_init=-0.7)
    actor, same = (script.Actor(5, 3, args, torch.Generator().manual_seed(1)) for _ in range(2))
    layers = [layer.detach() for layer in actor.layers()]
    assert [w.shape for w in layers] == [(5, 8), (1, 8), (8, 4), (1, 4), (4, 3), (1, 3)]
    for weight, bias, gain in zip(layers[::2], layers[1::2], (2**0.5, 2**0.5, 0.01), strict=True):
        np.testing.assert_allclose(np.linalg.svd(weight, compute_uv=False), gain, rtol=1e-9)
        assert (bias == 0).all()
    assert actor.theta[-3:].tolist() == [-0.7] * 3
    assert len(actor.theta) == sum(w.numel() for w in layers) + 3
    assert [p is actor.theta for p in actor.parameters()] == [True]
    assert torch.equal(actor.theta, same.theta)


def test_rows_of_theta_are_networks(script):
    """Theta [n, P]: each row is a network of its own; theta [P] is one. With ReLU between the layers, none behind."""
    networks = script.MLP((3, 8, 4, 2), 1.0, torch.Generator())
    theta = torch.randn(4, len(networks.theta))
    x = torch.randn(4, 5, 3)
    networks.theta = torch.nn.Parameter(theta)
    outputs = networks(x)
    for i in range(4):
        expected, rest = mlp(theta[i], x[i], (8, 4, 2))
        close(outputs[i].detach(), expected)
        assert len(rest) == 0
    networks.theta = torch.nn.Parameter(theta[2])
    close(networks(x).detach(), torch.stack([mlp(theta[2], row, (8, 4, 2))[0] for row in x]))


# Actors

# What the agents see overlaps, none drives neighbouring actuators, and no two have the same sizes.
OVERLAPPING = envs.Partition(
    obs_ids=(np.array([0, 2, 5]), np.array([4]), np.array([0, 1, 2, 3, 5])),
    act_ids=(np.array([3, 0]), np.array([5, 2, 4]), np.array([1])),
)
OBS_DIMS, ACT_DIMS = (3, 1, 5), (2, 3, 1)
PARTITIONS = {
    "overlapping": None,
    "HalfCheetah, obsk 0, permuted": ("HalfCheetah-[[5,0],[3],[1,4,2]]", 0),
    "Walker2d-2x3": ("Walker2d-2x3", None),
    "Ant-2x4d, obsk 1": ("Ant-2x4d", 1),
}
each_partition = pytest.mark.parametrize("name", PARTITIONS)


@cache
def make_partition(name):
    """One of `PARTITIONS`, with the lengths of the flat observation and action."""
    if PARTITIONS[name] is None:
        return OVERLAPPING, 6, 6
    env_id, agent_obsk = PARTITIONS[name]
    vec = envs.make_vec(env_id, 1, agent_obsk, 1)
    return vec.partition, vec.single_observation_space.shape[0], vec.single_action_space.shape[0]


def make_policy(script, share_param, name="overlapping", seed=0, hidden_sizes=(8, 7)):
    """A policy whose parameters are all random: no zero bias and no small output hides a mistake."""
    partition, obs_dim, _ = make_partition(name)
    generator = torch.Generator().manual_seed(seed)
    args = script.Args(hidden_sizes=hidden_sizes, share_param=share_param)
    policy = script.Policy(partition, obs_dim, args, generator, CPU)
    policy.joint.theta.data.copy_(0.5 * torch.randn(policy.joint.theta.shape, generator=generator))
    return policy


def own_obs(partition, obs, i, share_param):
    """What actor i must get: its entries, zeros up to the longest agent's, and with sharing its one-hot id."""
    own = torch.zeros(len(obs), max(map(len, partition.obs_ids)))
    own[:, : len(partition.obs_ids[i])] = obs[:, partition.obs_ids[i]]
    return torch.cat([own, torch.eye(partition.num_agents)[[i] * len(obs)]], 1) if share_param else own


def own_dist(policy, partition, obs, i, share_param, hidden_sizes=(8, 7)):
    """Mean and log_std of agent i, from its actor's theta alone."""
    num_outputs, act_dim = max(map(len, partition.act_ids)), len(partition.act_ids[i])
    theta, seen = policy.actors[i].theta.detach(), own_obs(partition, obs, i, share_param)
    mean, log_std = mlp(theta, seen, (*hidden_sizes, num_outputs))
    assert len(log_std) == num_outputs
    return mean[:, :act_dim], log_std[None, :act_dim]


@either_sharing
def test_agents_see_their_own_entries(script, share_param):
    """An agent's observation: its entries in their order; padded by zeros; with sharing followed by its id."""
    obs = torch.arange(12.0).reshape(2, 1, 6)
    expected = torch.tensor([
        [[0, 2, 5, 0, 0, 1, 0, 0], [6, 8, 11, 0, 0, 1, 0, 0]],
        [[4, 0, 0, 0, 0, 0, 1, 0], [10, 0, 0, 0, 0, 0, 1, 0]],
        [[0, 1, 2, 3, 5, 0, 0, 1], [6, 7, 8, 9, 11, 0, 0, 1]],
    ])[:, :, None]  # fmt: skip
    got = make_policy(script, share_param).observe(obs)
    close(got, expected[..., : 8 if share_param else 5].double())


def test_shared_actors_are_one_network(script):
    """With sharing all the actors have the same parameter, without it a row each of the joint policy's."""
    shared, separate = (make_policy(script, share_param) for share_param in (True, False))
    assert all(actor.theta is shared.joint.theta for actor in shared.actors)
    theta = separate.joint.theta.detach().clone()
    assert theta.shape == (3, *shared.actors[0].theta.shape[:-1], (5 + 1) * 8 + (8 + 1) * 7 + (7 + 1) * 3 + 3)
    with torch.no_grad():
        separate.actors[1].theta += 1
    close(separate.joint.theta.detach() - theta, torch.tensor([[0.0], [1], [0]]).expand(theta.shape))
    for policy in (shared, separate):
        assert [actor.act_dim for actor in policy.actors] == list(ACT_DIMS)
        assert [p is policy.joint.theta for p in policy.parameters()] == [True]


def test_agents_begin_with_networks_of_their_own(script):
    """Without sharing every agent's first weights are its own draw, each layer orthogonal."""
    args = script.Args(hidden_sizes=(8, 7), log_std_init=-0.7)
    policy = script.Policy(OVERLAPPING, 6, args, torch.Generator().manual_seed(0), CPU)
    for weight, gain in zip(policy.joint.layers()[::2], (2**0.5, 2**0.5, 0.01), strict=True):
        np.testing.assert_allclose(np.linalg.svd(weight.detach(), compute_uv=False), gain, rtol=1e-9)
        assert all(not torch.isclose(weight[i], weight[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    assert (policy.joint.theta[:, -3:] == -0.7).all()


def test_the_id_reaches_the_shared_network(script):
    """The weights of one agent's id move that agent's actions and nobody else's, alone and in the joint policy."""
    obs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for changed in range(3):
        policy = make_policy(script, True)

        def means(policy=policy):
            alone = [actor(seen)[0] for actor, seen in zip(policy.actors, policy.observe(obs), strict=True)]
            joint = policy.act(obs)
            return [*alone, *(joint[:, act_ids] for act_ids in OVERLAPPING.act_ids)]

        before = means()
        with torch.no_grad():
            policy.actors[0].layers()[0][5 + changed] += 1
        moved = [not torch.equal(a, b) for a, b in zip(before, means(), strict=True)]
        assert moved == 2 * [i == changed for i in range(3)]


def weights_at_the_ends(actor, theta):
    """Views of a theta, or its gradient: weights of the inputs, a row each; of the outputs, with bias and log_std."""
    return theta[: actor.shapes[0].numel()].view(actor.shapes[0]), theta[-(7 + 1 + 1) * 3 :].view(9, 3)


@either_sharing
def test_padding_does_not_leak(script, share_param):
    """Weights of inputs and outputs that an agent lacks do not move it, and get no gradient from it."""
    obs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for i, (num_inputs, num_outputs) in enumerate(zip(OBS_DIMS, ACT_DIMS, strict=True)):
        policy = make_policy(script, share_param)
        actor, seen = policy.actors[i], policy.observe(obs)[i]

        def outputs(policy=policy, i=i, seen=seen):
            return *policy.actors[i](seen), policy.act(obs)[:, OVERLAPPING.act_ids[i]]

        before = [x.detach().clone() for x in outputs()]
        assert [x.shape[-1] for x in before] == [num_outputs] * 3
        first, last = weights_at_the_ends(actor, actor.theta.data)
        first[num_inputs:5] += 1
        last[:, num_outputs:] += 1
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(), strict=True))

        dist = actor(seen)
        (actor.log_prob(dist, torch.ones(5, num_outputs)).sum() + actor.entropy(dist)).backward()
        first, last = weights_at_the_ends(actor, actor.theta.grad)
        assert (first[num_inputs:5] == 0).all() and (last[:, num_outputs:] == 0).all()
        assert (first[:num_inputs] != 0).any() and (last[-2:, :num_outputs] != 0).all()


# The joint policy


def assert_joint_is_each_alone(policy, partition, obs, share_param, hidden_sizes=(8, 7)):
    """A row of the joint policy's distribution is an agent's, by its actor and by its theta; and so are the actions."""
    mean, log_std = policy.joint(policy.observe(obs))
    best = policy.act(obs)
    assert best.shape == (len(obs), sum(map(len, partition.act_ids)))
    for i, (actor, act_ids) in enumerate(zip(policy.actors, partition.act_ids, strict=True)):
        dist = own_dist(policy, partition, obs, i, share_param, hidden_sizes)
        alone = actor(own_obs(partition, obs, i, share_param))
        row = mean[i, :, : len(act_ids)], (log_std if share_param else log_std[i])[:, : len(act_ids)]
        for got, expected in zip((*row, *alone), 2 * dist, strict=True):
            close(got.detach(), expected)
        close(best[:, act_ids], dist[0])


@either_sharing
@each_partition
@pytest.mark.parametrize("hidden_sizes", [(8, 7), (5,)])
def test_joint_policy_is_each_actor_alone(script, share_param, name, hidden_sizes):
    """What an agent does alone on its own observation is what the joint policy does on that agent's actuators."""
    partition, obs_dim, act_dim = make_partition(name)
    assert sorted(np.concatenate(partition.act_ids)) == list(range(act_dim))
    policy = make_policy(script, share_param, name, hidden_sizes=hidden_sizes)
    obs = torch.randn(9, obs_dim, generator=torch.Generator().manual_seed(1))
    assert_joint_is_each_alone(policy, partition, obs, share_param, hidden_sizes)


@either_sharing
def test_joint_policy_stays_each_actor_alone(script, share_param):
    """After a step of one agent's optimizer, which moves no other (but with sharing all), and after loading a state."""
    policy, other = make_policy(script, share_param), make_policy(script, share_param, seed=1)
    obs = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    before, actor = policy.act(obs), policy.actors[1]
    optimizer = torch.optim.Adam(actor.parameters(), lr=0.1, fused=True)
    actor.log_prob(actor(policy.observe(obs)[1]), torch.ones(9, 3)).sum().backward()
    optimizer.step()
    moved = (policy.act(obs) != before).any(0)
    assert moved.tolist() == [share_param or a in OVERLAPPING.act_ids[1] for a in range(6)]
    assert_joint_is_each_alone(policy, OVERLAPPING, obs, share_param)

    policy.load_state_dict(other.state_dict())
    assert torch.equal(policy.act(obs), other.act(obs))
    for a, b in zip(policy.actors, other.actors, strict=True):
        assert torch.equal(a.theta, b.theta)
    assert_joint_is_each_alone(policy, OVERLAPPING, obs, share_param)
    actor.theta.data.add_(1)  # a view still
    assert not torch.equal(policy.act(obs), other.act(obs))


@either_sharing
def test_actions_are_independent_standard_normal_draws(script, share_param):
    """The noise has the actors' standard deviations, no correlation, and follows from the generator alone."""
    policy = make_policy(script, share_param)
    obs = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    actions, same, other = (policy.act(obs, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(actions, same) and not torch.equal(actions, other)
    z = torch.empty(4000, 6)
    for i, act_ids in enumerate(OVERLAPPING.act_ids):
        mean, log_std = own_dist(policy, OVERLAPPING, obs, i, share_param)
        z[:, act_ids] = (actions[:, act_ids] - mean) / log_std.exp()
    assert all(stats.kstest(z[:, a].numpy(), "norm").pvalue > 0.001 for a in range(6))
    assert torch.corrcoef(z.T).fill_diagonal_(0).abs().max() < 0.06


@either_sharing
@each_partition
def test_export_is_the_policy(script, share_param, name):
    """In NumPy, as a user would: agent i's layers on its entries, of which the last two are 0 and 1, give its means."""
    _, obs_dim, act_dim = make_partition(name)
    policy = make_policy(script, share_param, name)
    obs = np.random.default_rng(0).normal(size=(9, obs_dim))
    model, actions = policy.export(), np.full((9, act_dim), np.nan)
    for layers, obs_ids, act_ids in zip(model["agents"], model["obs_ids"], model["act_ids"], strict=True):
        x = np.column_stack([obs, np.zeros(9), np.ones(9)])[:, obs_ids]
        for i, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
            x = (np.maximum(x, 0) if i else x) @ weight.numpy() + bias.numpy()
        actions[:, act_ids] = x[:, : len(act_ids)]
    close(policy.act(torch.tensor(obs)), torch.tensor(actions))
    assert model["tanh"] is False
