"""The policies: densities against torch.distributions, all the actors at once against each one alone."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Independent, Normal, kl_divergence

import envs
import hatrpo_mamujoco as hatrpo

either_sharing = pytest.mark.parametrize("share_param", [False, True], ids=["separate", "shared"])


@pytest.fixture(autouse=True, scope="module")
def float64():
    """Let everything here be made in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(got, expected, tolerance=1e-12):
    """Assert equality of shape, and of values to `tolerance`."""
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def gaussian(mean, log_std):
    """The same distribution by PyTorch."""
    return Independent(Normal(mean, log_std.exp()), 1)


# Densities

SHAPES = [(1,), (7, 1), (7, 3), (4, 5, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_equals_torch_distributions(script, shape):
    """The joint log-probability of the action: summed over its dimensions."""
    torch.manual_seed(0)
    mean, actions, log_std = torch.randn(shape), 3 * torch.randn(shape), torch.randn(shape[-1])
    close(script.Actor.log_prob((mean, log_std), actions), gaussian(mean, log_std).log_prob(actions))


@pytest.mark.parametrize("shape", SHAPES)
def test_entropy_equals_torch_distributions(script, shape):
    """Summed over the action's dimensions, and a scalar, as it is the same in every state."""
    torch.manual_seed(0)
    mean, log_std = torch.randn(shape), torch.randn(shape[-1])
    entropy = script.Actor.entropy((mean, log_std))
    assert entropy.shape == ()
    close(entropy.expand(shape[:-1]), gaussian(mean, log_std).entropy())


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_kl_equals_torch_distributions(shape):
    """KL(old || new) and not the reverse, summed over the action's dimensions; exactly 0 of a policy to itself."""
    torch.manual_seed(0)
    old, new = ((torch.randn(shape), torch.randn(shape[-1])) for _ in range(2))
    close(hatrpo.gaussian_kl(old, new), kl_divergence(gaussian(*old), gaussian(*new)))
    assert (hatrpo.gaussian_kl(old, old) == 0).all()


# Actors

# What the agents see overlaps, none drives neighbouring actuators, and no two have the same sizes.
OVERLAPPING = envs.Partition(
    obs_ids=(np.array([0, 2, 5]), np.array([4]), np.array([0, 1, 2, 3, 5])),
    act_ids=(np.array([3, 0]), np.array([5, 2, 4]), np.array([1])),
)
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


def make_actors(script, partition, share_param, seed=0, hidden_sizes=(8, 7)):
    """Actors whose parameters are all random: no zero bias and no small output hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    actors = script.make_actors(partition, hidden_sizes, share_param, generator)
    with torch.no_grad():
        for parameter in {id(p): p for actor in actors for p in actor.parameters()}.values():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return actors


def linear_layers(actor):
    """The actor's (weight, bias) pairs as NumPy arrays."""
    layers = [m for m in actor.net if isinstance(m, torch.nn.Linear)]
    return [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]


def test_initial_network(script):
    """Orthogonal weights of gain sqrt(2), 0.01 at the output; zero biases; log_std is -1; reproducible."""
    actor, same = (script.Actor(5, 3, (8, 4), torch.Generator().manual_seed(1)) for _ in range(2))
    layers = linear_layers(actor)
    assert [w.shape for w, _ in layers] == [(8, 5), (4, 8), (3, 4)]
    for (weight, bias), gain in zip(layers, (2**0.5, 2**0.5, 0.01), strict=True):
        np.testing.assert_allclose(np.linalg.svd(weight, compute_uv=False), gain, rtol=1e-9)
        assert (bias == 0).all()
    assert actor.log_std.tolist() == [-1.0] * 3
    assert all(torch.equal(p, q) for p, q in zip(actor.parameters(), same.parameters(), strict=True))


def test_actor_is_an_mlp_with_relu_and_a_free_log_std(script):
    """The mean by NumPy from the weights; log_std is a parameter that no observation changes."""
    actor = make_actors(script, OVERLAPPING, False)[0]
    obs = np.random.default_rng(0).normal(size=(5, 4, 3))
    h = obs
    for i, (weight, bias) in enumerate(linear_layers(actor)):
        h = np.einsum("...i,oi->...o", h if i == 0 else np.maximum(h, 0), weight) + bias
    mean, log_std = actor(torch.tensor(obs))
    np.testing.assert_allclose(mean.detach(), h, rtol=1e-12, atol=1e-12)
    assert torch.equal(log_std, actor.log_std)
    assert any(p is actor.log_std for p in actor.parameters())


@either_sharing
def test_agents_see_their_own_entries(script, share_param):
    """An agent's observation: its entries in their order; with sharing padded by zeros and followed by its id."""
    obs = torch.arange(12.0).reshape(2, 1, 6)
    expected = [
        [[0, 2, 5, 0, 0, 1, 0, 0], [4, 0, 0, 0, 0, 0, 1, 0], [0, 1, 2, 3, 5, 0, 0, 1]],
        [[6, 8, 11, 0, 0, 1, 0, 0], [10, 0, 0, 0, 0, 0, 1, 0], [6, 7, 8, 9, 11, 0, 0, 1]],
    ]
    for i, length in enumerate((3, 1, 5)):
        got = script.agent_obs(obs, OVERLAPPING, i, share_param)
        row = slice(None) if share_param else slice(length)
        close(got, torch.tensor([[expected[e][i][row]] for e in range(2)], dtype=torch.float64))


def test_shared_actors_are_one_network(script):
    """With sharing all the actors have the same parameter objects, without it none in common."""
    shared, separate = (make_actors(script, OVERLAPPING, share_param) for share_param in (True, False))
    assert len({tuple(id(p) for p in actor.parameters()) for actor in shared}) == 1
    assert len({id(p) for actor in separate for p in actor.parameters()}) == sum(
        len(list(a.parameters())) for a in separate
    )
    assert [actor.act_dim for actor in shared] == [actor.act_dim for actor in separate] == [2, 3, 1]
    with torch.no_grad():
        shared[0].log_std += 1
    assert torch.equal(shared[0].log_std, shared[2].log_std)


def test_the_id_reaches_the_shared_network(script):
    """The weights of one agent's id move that agent's actions and nobody else's, alone and in the joint policy."""
    obs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for changed in range(3):
        actors = make_actors(script, OVERLAPPING, True)

        def means(actors=actors):
            alone = [actor(script.agent_obs(obs, OVERLAPPING, i, True))[0] for i, actor in enumerate(actors)]
            joint = script.JointPolicy(actors, OVERLAPPING, 6, True).mean(obs)
            return [*alone, *(joint[:, act_ids] for act_ids in OVERLAPPING.act_ids)]

        before = means()
        with torch.no_grad():
            actors[0].net[0].weight[:, 5 + changed] += 1
        moved = [not torch.equal(a, b) for a, b in zip(before, means(), strict=True)]
        assert moved == 2 * [i == changed for i in range(3)]


def test_padding_does_not_leak(script):
    """Weights of inputs and outputs that an agent lacks do not move it, and get no gradient from it."""
    obs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    num_inputs, num_outputs = (3, 1, 5), (2, 3, 1)
    for i in range(3):
        actors = make_actors(script, OVERLAPPING, True)
        actor, seen = actors[i], script.agent_obs(obs, OVERLAPPING, i, True)

        def outputs(actors=actors, i=i, seen=seen):
            joint = script.JointPolicy(actors, OVERLAPPING, 6, True)
            act_ids = OVERLAPPING.act_ids[i]
            return *actors[i](seen), joint.mean(obs)[:, act_ids], joint.log_std[act_ids]

        before = [x.detach().clone() for x in outputs()]
        assert [x.shape[-1] for x in before] == [num_outputs[i]] * 4
        with torch.no_grad():
            actor.net[0].weight[:, num_inputs[i] : 5] += 1
            actor.net[-1].weight[num_outputs[i] :] += 1
            actor.net[-1].bias[num_outputs[i] :] += 1
            actor.log_std[num_outputs[i] :] += 1
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(), strict=True))

        dist = actor(seen)
        (actor.log_prob(dist, torch.ones(5, num_outputs[i])).sum() + actor.entropy(dist)).backward()
        gradients = actor.net[-1].weight.grad, actor.net[-1].bias.grad[:, None], actor.log_std.grad[:, None]
        for gradient in gradients:
            assert (gradient[num_outputs[i] :] == 0).all()
            assert (gradient[: num_outputs[i]] != 0).any(1).all()
        assert (actor.net[0].weight.grad[:, num_inputs[i] : 5] == 0).all()


# The joint policy


@either_sharing
@each_partition
@pytest.mark.parametrize("hidden_sizes", [(8, 7), (5,)])
def test_joint_policy_is_each_actor_alone(script, share_param, name, hidden_sizes):
    """What an agent does alone on its own observation is what the joint policy does on that agent's actuators."""
    partition, obs_dim, act_dim = make_partition(name)
    assert sorted(np.concatenate(partition.act_ids)) == list(range(act_dim))
    actors = make_actors(script, partition, share_param, hidden_sizes=hidden_sizes)
    joint = script.JointPolicy(actors, partition, obs_dim, share_param)
    obs = torch.randn(9, obs_dim, generator=torch.Generator().manual_seed(1))
    mean = joint.mean(obs)
    assert mean.shape == (9, act_dim)
    for i, actor in enumerate(actors):
        own_mean, own_log_std = actor(script.agent_obs(obs, partition, i, share_param))
        assert own_mean.shape == (9, len(partition.act_ids[i]))
        for k, actuator in enumerate(partition.act_ids[i]):
            close(mean[:, actuator], own_mean[:, k].detach())
            close(joint.log_std[actuator], own_log_std[k].detach())


@either_sharing
@each_partition
def test_act_returns_each_agents_own_log_probability(script, share_param, name):
    """The log-probabilities of the drawn actions are the actors' own, so the first ratio of an update is 1."""
    partition, obs_dim, act_dim = make_partition(name)
    actors = make_actors(script, partition, share_param)
    obs = torch.randn(9, obs_dim, generator=torch.Generator().manual_seed(1))
    policy = script.JointPolicy(actors, partition, obs_dim, share_param)
    actions, logprobs = policy.act(obs, torch.Generator().manual_seed(2))
    assert actions.shape == (9, act_dim)
    assert logprobs.shape == (9, partition.num_agents)
    for i, actor in enumerate(actors):
        dist = actor(script.agent_obs(obs, partition, i, share_param))
        own_actions = actions[:, partition.act_ids[i]]
        close(logprobs[:, i], gaussian(*dist).log_prob(own_actions).detach(), 1e-11)
        close(logprobs[:, i], actor.log_prob(dist, own_actions).detach(), 1e-11)


def test_actions_are_independent_standard_normal_draws(script):
    """The noise has the actors' standard deviations, no correlation, and follows from the generator alone."""
    actors = make_actors(script, OVERLAPPING, False)
    policy = script.JointPolicy(actors, OVERLAPPING, 6, False)
    obs = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    actions, same, other = (policy.act(obs, torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(actions, same) and not torch.equal(actions, other)
    z = torch.empty(4000, 6)
    for i, actor in enumerate(actors):
        mean, log_std = actor(script.agent_obs(obs, OVERLAPPING, i, False))
        z[:, OVERLAPPING.act_ids[i]] = ((actions[:, OVERLAPPING.act_ids[i]] - mean) / log_std.exp()).detach()
    assert all(stats.kstest(z[:, a].numpy(), "norm").pvalue > 0.001 for a in range(6))
    assert torch.corrcoef(z.T).fill_diagonal_(0).abs().max() < 0.06
