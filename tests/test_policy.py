"""The policies: densities against closed forms, acting together against each actor alone."""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import gaussian, mlp, set_theta, theta_of, update_of
from scipy import special, stats
from torch import nn
from torch.distributions import Categorical, Independent, kl_divergence

import envs

pytestmark = pytest.mark.usefixtures("float64")


def close(got, expected, tolerance=1e-12):
    """Assert equality of shape, and of values to `tolerance`."""
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape
    torch.testing.assert_close(got.detach(), expected, rtol=tolerance, atol=tolerance)


def randomize(module, seed):
    """Draw all parameters anew: no zero bias and no small output hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    set_theta(module, 0.5 * torch.randn(len(theta_of(module)), generator=generator))


# Densities

SHAPES = [(1, 1), (7, 1), (7, 3)]
each_shape = pytest.mark.parametrize("shape", SHAPES)


def random_gaussian(script, shape, seed):
    """What a random actor returns for B random observations; its means and standard deviations."""
    batch, act_dim = shape
    actor = script.Actor(5, act_dim, script.Args(hidden_sizes=(8,)))
    randomize(actor, seed)
    obs = torch.randn(batch, 5, generator=torch.Generator().manual_seed(0))
    mean, log_std = gaussian(theta_of(actor), obs, (8,), act_dim)
    return actor(obs), mean.numpy(), log_std.exp().numpy()


@each_shape
def test_log_prob_is_the_sum_over_the_actions_dimensions(script, shape):
    """One number [B] for each action: the logarithm of a product of normal densities."""
    dist, mean, std = random_gaussian(script, shape, 1)
    actions = np.random.default_rng(0).normal(0, 3, shape)
    expected = stats.norm.logpdf(actions, mean, std).sum(-1)
    assert expected.shape == shape[:1]
    close(dist.log_prob(torch.tensor(actions)), expected)


@each_shape
def test_entropy_is_the_sum_over_the_actions_dimensions(script, shape):
    """One number [B] for each observation, the same for all: the standard deviations are."""
    dist, mean, std = random_gaussian(script, shape, 1)
    expected = stats.norm.entropy(mean, std).sum(-1)
    assert expected.shape == shape[:1]
    close(dist.entropy(), expected)


@each_shape
def test_kl_is_the_closed_form_of_two_gaussians(script, shape):
    """KL(old || new) by kl_divergence, summed over the action's dimensions; 0 from a policy to itself."""
    old, old_mean, old_std = random_gaussian(script, shape, 1)
    new, new_mean, new_std = random_gaussian(script, shape, 2)
    terms = np.log(new_std / old_std) - 0.5
    terms = terms + (old_std**2 + (old_mean - new_mean) ** 2) / (2 * new_std**2)
    close(kl_divergence(old, new), terms.sum(-1))
    assert (kl_divergence(old, old) == 0).all()


@each_shape
def test_mode_is_the_mean_and_a_sample_is_a_constant(script, shape):
    """The likeliest action is the mean; no gradient goes through an action that was drawn."""
    dist, mean, _ = random_gaussian(script, shape, 1)
    close(dist.mode, mean)
    sample = dist.sample()
    assert sample.shape == shape
    assert not sample.requires_grad


# Networks


def test_initial_network(script):
    """Orthogonal weights of gain sqrt(2), 0.01 at the output; zero biases; log_std as asked for."""
    args = script.Args(hidden_sizes=(8, 4), log_std_init=-0.7)
    torch.manual_seed(1)
    actor = script.Actor(5, 3, args)
    torch.manual_seed(1)
    same = script.Actor(5, 3, args)
    linear_layers = [layer for layer in actor.net if isinstance(layer, nn.Linear)]
    shapes = [tuple(layer.weight.shape) for layer in linear_layers]
    assert shapes == [(8, 5), (4, 8), (3, 4)]
    for layer, gain in zip(linear_layers, (2**0.5, 2**0.5, 0.01), strict=True):
        singular_values = np.linalg.svd(layer.weight.detach(), compute_uv=False)
        np.testing.assert_allclose(singular_values, gain, rtol=1e-9)
        assert (layer.bias == 0).all()
    assert actor.log_std.tolist() == [-0.7] * 3
    assert len(theta_of(actor)) == (5 + 1) * 8 + (8 + 1) * 4 + (4 + 1) * 3 + 3
    assert torch.equal(theta_of(actor), theta_of(same))


@pytest.mark.parametrize("hidden_sizes", [(8, 4), (6,), ()])
def test_network_is_linear_layers_with_relu_between(script, hidden_sizes):
    """Also when there is none between; and no ReLU behind the last layer."""
    net = script.mlp((3, *hidden_sizes, 2), 1.0)
    randomize(net, 0)
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
    expected = mlp(theta_of(net), x, (*hidden_sizes, 2))
    assert (expected < 0).any()
    close(net(x), expected)


# Agents

# What the agents see overlaps, none drives neighbouring actuators, and no two have the same sizes.
UNEQUAL = envs.Partition(
    obs_ids=(np.array([0, 2, 5]), np.array([4]), np.array([0, 1, 2, 3, 5])),
    act_ids=(np.array([3, 0]), np.array([5, 2, 4]), np.array([1])),
)
# The same with equally many actuators, so that the agents can share an actor.
EQUAL = envs.Partition(
    obs_ids=UNEQUAL.obs_ids,
    act_ids=(np.array([3, 0]), np.array([5, 2]), np.array([1, 4])),
)
PARTITIONS = {
    "unequal": UNEQUAL,
    "equal": EQUAL,
    "HalfCheetah, obsk 0, unequal": ("HalfCheetah-[[5,0],[3],[1,4,2]]", 0),
    "HalfCheetah, obsk 0, equal": ("HalfCheetah-[[5,0],[3,1],[4,2]]", 0),
    "Walker2d-2x3": ("Walker2d-2x3", None),
    "Ant-2x4d, obsk 1": ("Ant-2x4d", 1),
}
OF_UNEQUAL_AGENTS = ("unequal", "HalfCheetah, obsk 0, unequal")
SEPARATE = [(name, False) for name in PARTITIONS]
SHARED = [(name, True) for name in PARTITIONS if name not in OF_UNEQUAL_AGENTS]
each_partition = pytest.mark.parametrize(("name", "share_param"), SEPARATE + SHARED)
each_small_one = pytest.mark.parametrize(
    ("name", "share_param"), [("unequal", False), ("equal", False), ("equal", True)]
)


@cache
def make_partition(name):
    """One of `PARTITIONS`, with the lengths of the flat observation and action."""
    partition = PARTITIONS[name]
    if isinstance(partition, envs.Partition):
        return partition, 6, 6
    env_id, agent_obsk = partition
    vec = envs.make_vec(env_id, 1, agent_obsk, 1)
    return vec.partition, vec.single_observation_space.shape[0], vec.single_action_space.shape[0]


def make_policy(script, name, share_param, seed=0, hidden_sizes=(8, 7)):
    """A policy whose parameters are all random."""
    partition, obs_dim, _ = make_partition(name)
    args = script.Args(hidden_sizes=hidden_sizes, share_param=share_param)
    policy = script.Policy(partition, obs_dim, args)
    randomize(policy, seed)
    return policy


def random_obs(size, obs_dim=6):
    """Flat observations."""
    return torch.randn(size, obs_dim, generator=torch.Generator().manual_seed(1))


def own_obs(partition, obs, i, share_param):
    """What actor i must get: its entries; with sharing zeros up to the longest agent's, and its id."""
    own = obs[:, partition.obs_ids[i]]
    if not share_param:
        return own
    longest = max(len(ids) for ids in partition.obs_ids)
    zeros = torch.zeros(len(obs), longest - own.shape[1])
    one_hot = torch.zeros(len(obs), partition.num_agents)
    one_hot[:, i] = 1
    return torch.cat([own, zeros, one_hot], dim=1)


def own_gaussian(policy, partition, obs, i, share_param, hidden_sizes=(8, 7)):
    """Means and log_std of agent i, from the parameters of its actor alone."""
    seen = own_obs(partition, obs, i, share_param)
    return gaussian(theta_of(policy.actors[i]), seen, hidden_sizes, len(partition.act_ids[i]))


def test_agents_see_their_own_entries(script):
    """An agent's observation has its entries in their order, and nothing else."""
    obs = torch.arange(12.0).reshape(2, 6)
    got = make_policy(script, "unequal", False).observe(obs)
    close(got[0], torch.tensor([[0.0, 2, 5], [6, 8, 11]]))
    close(got[1], torch.tensor([[4.0], [10]]))
    close(got[2], torch.tensor([[0.0, 1, 2, 3, 5], [6, 7, 8, 9, 11]]))
    assert len(got) == 3


def test_agents_that_share_an_actor_see_padding_and_their_id(script):
    """The entries are followed by zeros up to the longest agent's, and by the one-hot id."""
    obs = torch.arange(12.0).reshape(2, 6)
    got = make_policy(script, "equal", True).observe(obs)
    close(got[0], torch.tensor([[0.0, 2, 5, 0, 0, 1, 0, 0], [6, 8, 11, 0, 0, 1, 0, 0]]))
    close(got[1], torch.tensor([[4.0, 0, 0, 0, 0, 0, 1, 0], [10, 0, 0, 0, 0, 0, 1, 0]]))
    close(got[2], torch.tensor([[0.0, 1, 2, 3, 5, 0, 0, 1], [6, 7, 8, 9, 11, 0, 0, 1]]))
    assert len(got) == 3


@each_partition
def test_observe_is_made_for_each_partition(script, name, share_param):
    """The same by the definition, on the robots' partitions; the sizes are those of the networks."""
    partition, obs_dim, _ = make_partition(name)
    policy = make_policy(script, name, share_param)
    obs = random_obs(4, obs_dim)
    got = policy.observe(obs)
    for i in range(partition.num_agents):
        close(got[i], own_obs(partition, obs, i, share_param))
        assert policy.actors[i].net[0].in_features == got[i].shape[1]
        assert policy.act_ids[i].tolist() == partition.act_ids[i].tolist()


def test_shared_actors_are_one_network(script):
    """With sharing all the actors are one module, whose parameters an optimiser gets once."""
    policy = make_policy(script, "equal", True)
    assert len(policy.actors) == 3
    assert all(actor is policy.actors[0] for actor in policy.actors)
    for got, own in zip(policy.parameters(), policy.actors[0].parameters(), strict=True):
        assert got is own
    assert len(theta_of(policy)) == (5 + 3 + 1) * 8 + (8 + 1) * 7 + (7 + 1) * 2 + 2


def test_separate_actors_are_networks_of_their_own_sizes(script):
    """Without sharing no parameter belongs to two agents, and none is padded."""
    policy = make_policy(script, "unequal", False)
    sizes = [len(theta_of(actor)) for actor in policy.actors]
    expected = [(3 + 1) * 8 + (7 + 1) * 2 + 2, (1 + 1) * 8 + (7 + 1) * 3 + 3]
    expected.append((5 + 1) * 8 + (7 + 1) * 1 + 1)
    assert sizes == [(8 + 1) * 7 + rest for rest in expected]
    assert len(theta_of(policy)) == sum(sizes)


def test_agents_begin_with_networks_of_their_own(script):
    """Without sharing every agent's first weights are its own draw, each layer orthogonal."""
    args = script.Args(hidden_sizes=(8, 7), log_std_init=-0.7)
    torch.manual_seed(0)
    policy = script.Policy(UNEQUAL, 6, args)
    hidden = []
    for actor in policy.actors:
        assert (actor.log_std == -0.7).all()
        for index, gain in ((0, 2**0.5), (2, 2**0.5), (4, 0.01)):
            weight = actor.net[index].weight.detach()
            singular_values = np.linalg.svd(weight, compute_uv=False)
            np.testing.assert_allclose(singular_values, gain, rtol=1e-9)
        hidden.append(actor.net[2].weight)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.isclose(hidden[i], hidden[j]).any()


@pytest.mark.parametrize("name", OF_UNEQUAL_AGENTS)
def test_agents_with_unequal_actuators_cannot_share_an_actor(script, name):
    """The message names the flag. Separate actors of the same partition are fine."""
    with pytest.raises(ValueError, match="share-param"):
        make_policy(script, name, True)
    make_policy(script, name, False)


def test_the_id_reaches_the_shared_network(script):
    """The weights of one agent's id move that agent's actions and nobody else's."""
    obs = random_obs(5)
    for changed in range(3):
        policy = make_policy(script, "equal", True)
        before = policy.act(obs, noise=False)
        with torch.no_grad():
            policy.actors[0].net[0].weight[:, 5 + changed] += 1
        moved = policy.act(obs, noise=False) != before
        for i, act_ids in enumerate(EQUAL.act_ids):
            assert moved[:, act_ids].any() == (i == changed)


def test_padding_does_not_leak(script):
    """Weights of inputs that an agent lacks do not move it, and get no gradient from it."""
    obs = random_obs(5)
    for i, num_inputs in enumerate((3, 1, 5)):
        policy = make_policy(script, "equal", True)
        actor = policy.actors[i]
        before = policy.act(obs, noise=False)[:, EQUAL.act_ids[i]]
        with torch.no_grad():
            actor.net[0].weight[:, num_inputs:5] += 1
        assert torch.equal(policy.act(obs, noise=False)[:, EQUAL.act_ids[i]], before)

        actor(policy.observe(obs)[i]).log_prob(torch.ones(5, 2)).sum().backward()
        gradient = actor.net[0].weight.grad
        assert (gradient[:, num_inputs:5] == 0).all()
        assert (gradient[:, :num_inputs] != 0).any()
        assert (gradient[:, 5 + i] != 0).any()


# Acting


def assert_policy_is_each_actor_alone(policy, name, obs, share_param, hidden_sizes=(8, 7)):
    """Without noise the means of agent i are on agent i's actuators, and so are its distributions."""
    partition, _, act_dim = make_partition(name)
    actions = policy.act(obs, noise=False)
    assert actions.shape == (len(obs), act_dim)
    for i, act_ids in enumerate(partition.act_ids):
        mean, log_std = own_gaussian(policy, partition, obs, i, share_param, hidden_sizes)
        close(actions[:, act_ids], mean)
        dist = policy.actors[i](policy.observe(obs)[i])
        close(dist.mean, mean)
        close(dist.stddev, log_std.exp().expand_as(mean))


@each_partition
@pytest.mark.parametrize("hidden_sizes", [(8, 7), (5,)])
def test_policy_is_each_actor_alone(script, name, share_param, hidden_sizes):
    """What an agent does alone on its own observation is what it does on its own actuators."""
    partition, obs_dim, act_dim = make_partition(name)
    assert sorted(np.concatenate(partition.act_ids)) == list(range(act_dim))
    policy = make_policy(script, name, share_param, hidden_sizes=hidden_sizes)
    obs = random_obs(9, obs_dim)
    assert_policy_is_each_actor_alone(policy, name, obs, share_param, hidden_sizes)


@each_small_one
def test_policy_stays_each_actor_alone(script, name, share_param):
    """After a step of one agent's optimizer, which moves no other but with sharing all."""
    partition, *_ = make_partition(name)
    policy = make_policy(script, name, share_param)
    obs = random_obs(9)
    before = policy.act(obs, noise=False)
    actor = policy.actors[1]
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1, fused=True)
    seen = policy.observe(obs)[1]
    actor(seen).log_prob(torch.ones(9, len(partition.act_ids[1]))).sum().backward()
    optimizer.step()
    moved = (policy.act(obs, noise=False) != before).any(0)
    expected = torch.zeros(6, dtype=torch.bool)
    expected[partition.act_ids[1]] = True
    assert torch.equal(moved, expected | share_param)
    assert_policy_is_each_actor_alone(policy, name, obs, share_param)


@each_small_one
def test_state_dict_round_trip(script, name, share_param):
    """A policy that loads another's state acts like it to the last bit; and is no view of it."""
    policy = make_policy(script, name, share_param)
    other = make_policy(script, name, share_param, seed=1)
    obs = random_obs(9)
    assert not torch.equal(policy.act(obs, noise=False), other.act(obs, noise=False))
    policy.load_state_dict(other.state_dict())
    expected = other.act(obs, noise=False)
    assert torch.equal(policy.act(obs, noise=False), expected)
    assert torch.equal(theta_of(policy), theta_of(other))
    assert_policy_is_each_actor_alone(policy, name, obs, share_param)
    set_theta(policy, theta_of(policy) + 1)
    assert torch.equal(other.act(obs, noise=False), expected)


@each_partition
def test_state_dict_is_the_policy(script, name, share_param):
    """In NumPy, as a user would: agent i's layers on its entries, behind which are a 0 and a 1."""
    _, obs_dim, act_dim = make_partition(name)
    policy = make_policy(script, name, share_param)
    state = {key: value.numpy() for key, value in policy.state_dict().items()}
    obs = np.random.default_rng(0).normal(size=(9, obs_dim))
    zero_one = np.tile([0.0, 1.0], (9, 1))
    actions = np.full((9, act_dim), np.nan)
    for i, act_ids in enumerate(policy.act_ids):
        x = np.hstack([obs, zero_one])[:, policy.obs_ids[i].numpy()]
        for layer in (0, 2, 4):
            weight = state[f"actors.{i}.net.{layer}.weight"]
            x = x @ weight.T + state[f"actors.{i}.net.{layer}.bias"]
            if layer < 4:
                x = np.maximum(x, 0)
        actions[:, act_ids.numpy()] = x
        assert state[f"actors.{i}.log_std"].shape == (len(act_ids),)
    close(policy.act(torch.tensor(obs), noise=False), actions)


@each_small_one
def test_actions_are_independent_normal_draws(script, name, share_param):
    """The noise has the actors' standard deviations and no correlation, within an agent or across."""
    partition, *_ = make_partition(name)
    policy = make_policy(script, name, share_param)
    obs = random_obs(4000)
    torch.manual_seed(3)
    actions = policy.act(obs, noise=True)
    z = torch.full((4000, 6), torch.nan)
    for i, act_ids in enumerate(partition.act_ids):
        mean, log_std = own_gaussian(policy, partition, obs, i, share_param)
        z[:, act_ids] = (actions[:, act_ids] - mean) / log_std.exp()
    for actuator in range(6):
        assert stats.kstest(z[:, actuator].numpy(), "norm").pvalue > 0.001
    assert torch.corrcoef(z.T).fill_diagonal_(0).abs().max() < 0.06


@each_small_one
def test_the_global_generator_says_it_all(script, name, share_param):
    """One seed, the same actions; further draws are others; without noise nothing is drawn."""
    policy = make_policy(script, name, share_param)
    obs = random_obs(20)
    torch.manual_seed(3)
    first = policy.act(obs, noise=True)
    second = policy.act(obs, noise=True)
    torch.manual_seed(3)
    assert torch.equal(policy.act(obs, noise=True), first)
    assert (first != second).all()

    state = torch.get_rng_state()
    best = policy.act(obs, noise=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(policy.act(obs, noise=False), best)
    assert (first != best).all()
    assert not first.requires_grad
    assert not best.requires_grad


# Another policy


class CategoricalActor(nn.Module):
    """Each actuator has one of four settings: another `forward` is all that it needs."""

    NUM_SETTINGS = 4

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.net = nn.Linear(obs_dim, act_dim * self.NUM_SETTINGS)

    def forward(self, obs):
        logits = self.net(obs).view(len(obs), -1, self.NUM_SETTINGS)
        return Independent(Categorical(logits=logits), 1)


@each_small_one
def test_another_forward_is_another_policy(script, name, share_param, monkeypatch):
    """With Categorical actors `Policy.act` puts each agent's settings on its own actuators."""
    monkeypatch.setattr(script, "Actor", CategoricalActor)
    partition, *_ = make_partition(name)
    policy = make_policy(script, name, share_param)
    assert isinstance(policy.actors[0], CategoricalActor)
    obs = random_obs(1).repeat(4000, 1)
    best = policy.act(obs, noise=False)
    torch.manual_seed(0)
    drawn = policy.act(obs, noise=True)
    assert best.shape == drawn.shape == (4000, 6)
    for i, act_ids in enumerate(partition.act_ids):
        weight, bias = policy.actors[i].net.parameters()
        logits = own_obs(partition, obs[:1], i, share_param) @ weight.T + bias
        logits = logits.detach().view(len(act_ids), 4).numpy()
        for actuator, row in zip(act_ids, logits, strict=True):
            assert (best[:, actuator] == row.argmax()).all()
            counts = np.bincount(drawn[:, actuator].numpy(), minlength=4)
            assert stats.chisquare(counts, 4000 * special.softmax(row)).pvalue > 0.001
        log_prob = policy.actors[i](policy.observe(obs)[i]).log_prob(drawn[:, act_ids])
        columns = np.arange(len(act_ids))
        expected = special.log_softmax(logits, axis=1)[columns, drawn[:, act_ids]].sum(-1)
        close(log_prob, expected)


def test_another_forward_learns(script):
    """Categorical actors whose first setting is rewarded choose it more often after the update."""
    args = script.Args()
    torch.manual_seed(0)
    actors = [CategoricalActor(3, 2, args) for _ in range(2)]
    obs = [torch.randn(200, 3) for _ in range(2)]
    with torch.no_grad():
        actions = [actor(own).sample() for actor, own in zip(actors, obs, strict=True)]
    good = [(a == 0).double().mean(1) for a in actions]
    advantages = (good[0] + good[1]) / 2
    advantages = (advantages - advantages.mean()) / advantages.std()

    def share_of_first():
        shares = []
        for actor, own in zip(actors, obs, strict=True):
            shares.append(actor(own).base_dist.probs[..., 0].mean().item())
        return np.array(shares)

    before = share_of_first()
    update = update_of(script)
    parameters = [*actors[0].parameters(), *actors[1].parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    name = script.__name__
    if name == "hatrpo_mamujoco":
        region = script.TrustRegion(actors, args)
        log = update(actors, region, obs, actions, advantages, args)
    elif name == "ippo_mamujoco":
        log = update(actors, optimizer, obs, actions, [advantages, advantages], args)
    else:
        log = update(actors, optimizer, obs, actions, advantages, args)
    assert (share_of_first() > before).all()
    assert all(np.isfinite(float(value)) for value in log.values())
