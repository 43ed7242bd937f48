"""The updates of actors and critic against PPO and TRPO from scratch, and the factor M that links the agents."""

import inspect
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from conftest import mlp, update_of
from scipy import stats as scipy_stats
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import happo_mamujoco as happo
import hatrpo_mamujoco as hatrpo
import ippo_mamujoco as ippo
import mappo_mamujoco as mappo
from envs import Partition

pytestmark = pytest.mark.usefixtures("float64")
each_clipping = pytest.mark.parametrize("script", [mappo, happo, ippo], ids=["mappo", "happo", "ippo"])
each_sequential = pytest.mark.parametrize("script", [happo, hatrpo], ids=["happo", "hatrpo"])
each_split = pytest.mark.parametrize("num_minibatches", [1, 4])

SIZES = [(3, 2), (5, 1), (2, 3)]  # observation and action of three agents
HIDDEN = (6, 5)
BATCH = 32


# Oracles, on a network's vector theta


def gaussian(theta, obs, act_dim=None):
    """The policy of an MLP with ReLU; the first `act_dim` actions."""
    outputs = (len(theta) - (obs.shape[-1] + 1) * HIDDEN[0] - (HIDDEN[0] + 1) * HIDDEN[1]) // (HIDDEN[1] + 2)
    mean, log_std = mlp(theta, obs, (*HIDDEN, outputs))
    return Independent(Normal(mean[..., :act_dim], log_std[:act_dim].exp(), validate_args=False), 1)


def copies(modules):
    """The thetas of modules as plain tensors."""
    return [module.theta.detach().clone() for module in modules]


def assert_equal(modules, expected, tolerance=1e-9):
    """Assert that modules have these thetas."""
    torch.testing.assert_close(copies(modules), list(expected), rtol=tolerance, atol=tolerance)


def adam_step(adam, loss, max_grad_norm):
    """One step of Adam; a gradient longer than `max_grad_norm` is scaled down to it."""
    (theta,) = adam.param_groups[0]["params"]
    adam.zero_grad()
    loss.backward()
    norm = theta.grad.square().sum().sqrt()
    if norm > max_grad_norm:
        theta.grad *= max_grad_norm / (norm + 1e-6)  # PyTorch's 1e-6
    adam.step()
    return norm


def clipped_loss(dist, data, M, args):
    """PPO's loss, by its cases: a positive M earns up to 1 + epsilon, a negative one costs at least 1 - epsilon."""
    _, actions, logprobs = data
    ratio = (dist.log_prob(actions) - logprobs).exp()
    bounded = torch.where(M >= 0, ratio.clamp(max=1 + args.clip_coef), ratio.clamp(min=1 - args.clip_coef))
    return -(bounded * M).mean() - args.ent_coef * dist.entropy().mean()


def ppo(theta, data, M, args, batches, too_far=lambda theta, mb: False):
    """PPO of one agent on these minibatches, less those where its policy has come `too_far`; return the new theta."""
    theta = theta.clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=args.learning_rate, eps=1e-5, foreach=False, fused=False)
    for mb in batches:
        if too_far(theta.detach(), mb):
            continue
        own = [x[mb] for x in data]
        adam_step(adam, clipped_loss(gaussian(theta, own[0]), own, M[mb], args), args.max_grad_norm)
    return theta.detach()


def assert_stats_are_of(stats, theta, data, M, args):
    """What is logged of an agent is of the whole batch, and of its policy `theta`."""
    dist = gaussian(theta, data[0])
    logratio, entropy = dist.log_prob(data[1]) - data[2], dist.entropy().mean()
    expected = {
        "policy_loss": clipped_loss(dist, data, M, args) + args.ent_coef * entropy,
        "entropy": entropy,
        "approx_kl": (logratio.exp() - 1 - logratio).mean(),
        "clip_fraction": sum(abs(r - 1) > args.clip_coef for r in logratio.exp()) / len(M),
    }
    for key, value in expected.items():
        assert stats[key].item() == pytest.approx(value.item(), rel=1e-7, abs=1e-9), key
    assert not any(value.requires_grad for value in stats.values())


def trpo(theta, data, M, args, policy=gaussian, agents=1, earlier=()):
    """TRPO of one agent with the explicit Hessian and a dense solver; return theta and j (None: rejected).

    It is one of so many `agents`; `earlier` are the log-ratios of those before it. The damping is a share of the
    Hessian's curvature along g; neither the KL nor what the batch says of the joint policy's may exceed its share.
    """
    delta = args.target_kl / agents
    obs, actions, logprobs = data
    rows = slice(None, None, args.fisher_stride)
    old, old_rows = policy(theta, obs), policy(theta, obs[rows])

    def objective(new):
        dist = policy(new, obs)
        return ((dist.log_prob(actions) - logprobs).exp() * M).mean() + args.ent_coef * dist.entropy().mean()

    def mean_kl(new):
        return kl_divergence(old_rows, policy(new, obs[rows])).mean()

    g = torch.autograd.functional.jacobian(objective, theta)
    H = torch.autograd.functional.hessian(mean_kl, theta)
    x = torch.linalg.solve(H + args.cg_damping * (g @ H @ g) / (g @ g) * torch.eye(len(theta)), g)
    beta = (2 * delta / (x @ H @ x)).sqrt()
    for j in range(args.backtrack_iters + 1):
        length = args.backtrack_coeff**j * beta
        new = theta + length * x
        kl = kl_divergence(old, policy(new, obs)).mean()
        ratio = torch.stack([*earlier, policy(new, obs).log_prob(actions) - logprobs]).sum(0).exp()
        close = kl <= delta and (ratio - 1 - ratio.log()).mean() <= (len(earlier) + 1) * delta
        if objective(new) - objective(theta) >= args.accept_ratio * length * (x @ g) and close:
            return new, j
    return theta, None


# Problems


class Problem:
    """Actors with random parameters, a batch that they drew, and random advantages."""

    def __init__(self, script, sizes=SIZES, batch=BATCH, seed=0):
        generator = torch.Generator().manual_seed(seed)
        args = script.Args(hidden_sizes=HIDDEN)
        self.script, self.actors = script, [script.Actor(o, a, args, generator) for o, a in sizes]
        for actor in self.actors:
            actor.theta.data.copy_(0.5 * torch.randn(actor.theta.shape, generator=generator))
        self.old = copies(self.actors)
        self.obs = [torch.randn(batch, o, generator=generator) for o, _ in sizes]
        dists = [gaussian(theta, obs) for theta, obs in zip(self.old, self.obs, strict=True)]
        self.actions = [d.mean + d.stddev * torch.randn(d.mean.shape, generator=generator) for d in dists]
        self.logprobs = [d.log_prob(a) for d, a in zip(dists, self.actions, strict=True)]
        self.advantages = torch.randn(batch, generator=generator)

    def data(self, i):
        """Observations, actions and log-probabilities of one agent."""
        return self.obs[i], self.actions[i], self.logprobs[i]

    def optimizer(self, args, kind=torch.optim.Adam, **changed):
        """An optimizer of all the agents, as in `main`."""
        settings = {"lr": args.learning_rate, "eps": 1e-5, "fused": True} if kind is torch.optim.Adam else {}
        return kind(torch.nn.ModuleList(self.actors).parameters(), **(settings | changed))

    def update(self, args, optimizer=None, generator=None, agents=slice(None)):
        """Call the script's update of (some of) the agents, in the order given; return what is logged, and M or A."""
        agents = range(len(self.actors))[agents] if isinstance(agents, slice) else agents
        update, lists = update_of(self.script), [self.actors, self.obs, self.actions]
        lists = [[x[i] for i in agents] for x in lists]
        if "optimizer" in inspect.signature(update).parameters:
            lists.insert(1, optimizer or self.optimizer(args))
        advantages = [self.advantages] * len(agents) if self.script is ippo else self.advantages
        result = update(*lists, advantages, args, generator or torch.Generator().manual_seed(0))
        return result if isinstance(result, tuple) else (result, self.advantages)

    def ratio(self, i):
        """What the agent's present policy makes of its actions, over the policy that drew them."""
        return (gaussian(*copies([self.actors[i]]), self.obs[i]).log_prob(self.actions[i]) - self.logprobs[i]).exp()


# Every setting that an update reads, so that the scripts' defaults may change; what a script does not know is left out.
SETTINGS = {
    **{"learning_rate": 0.01, "update_epochs": 3, "clip_coef": 0.2, "ent_coef": 0.01, "max_grad_norm": 10.0},
    **{"critic_learning_rate": 0.01, "critic_epochs": 2, "num_minibatches": 1, "fixed_order": False},
    **{"target_kl": 0.05, "backtrack_coeff": 0.8, "backtrack_iters": 10, "accept_ratio": 0.5},
    **{"cg_iters": 300, "cg_damping": 0.1, "fisher_stride": 1},
}


def make_args(script, **changed):
    """Arguments of a script: `SETTINGS`, but for what is changed, which may be out of range."""
    args = script.Args()
    unbounded = {"target_kl": 1e6} if script is happo else {}  # without its bound HAPPO is PPO on M
    for key, value in (SETTINGS | unbounded | changed).items():
        if hasattr(args, key):
            setattr(args, key, value)
    return args


def record_minibatches(monkeypatch, script):
    """Let `minibatches` leave what it yields on a list."""
    batches, shipped = [], script.minibatches

    def spy(*args):
        for mb in shipped(*args):
            batches.append(mb)
            yield mb

    monkeypatch.setattr(script, "minibatches", spy)
    return batches


def record_agents(monkeypatch, problem):
    """Let the function that updates one agent leave the agent's number and its M on a list."""
    calls, script = [], problem.script
    name = "trpo_step" if script is hatrpo else "ppo_loss"
    shipped = getattr(script, name)

    def spy(actor, obs, actions, logprobs, M, *rest):
        calls.append((next(i for i, a in enumerate(problem.actors) if a is actor), M.clone()))
        return shipped(actor, obs, actions, logprobs, M, *rest)

    monkeypatch.setattr(script, name, spy)
    return calls


# The clipped loss of one agent


@each_clipping
def test_clipping_by_its_four_cases(script):
    """The ratio counts within its bounds; beyond them only where it hurts: then there is a gradient, otherwise none."""
    problem = Problem(script, batch=1)
    actor, theta, (obs, actions, _) = problem.actors[0], problem.old[0].requires_grad_(), problem.data(0)
    cases = [  # M, ratio, what is earned, whether a gradient is left
        (1.0, 1.5, 1.2, False),
        (1.0, 1.1, 1.1, True),
        (1.0, 0.9, 0.9, True),
        (1.0, 0.5, 0.5, True),
        (-1.0, 1.5, -1.5, True),
        (-1.0, 1.1, -1.1, True),
        (-1.0, 0.9, -0.9, True),
        (-1.0, 0.5, -0.8, False),
        (3.0, 7.0, 3.6, False),
        (-3.0, 7.0, -21.0, True),
    ]
    for M, ratio, earned, moves in cases:
        logprob = gaussian(theta, obs).log_prob(actions)
        data = obs, actions, logprob.detach() - np.log(ratio)
        loss, logratio, entropy = script.ppo_loss(actor, *data, torch.tensor([M]), 0.2, 0.0)
        assert loss.item() == pytest.approx(-earned, rel=1e-12)
        assert logratio.item() == pytest.approx(np.log(ratio), rel=1e-12)
        stats = script.ppo_stats(loss, logratio, entropy, make_args(script, clip_coef=0.2))
        assert stats["approx_kl"].item() == pytest.approx(ratio - 1 - np.log(ratio), rel=1e-12)
        assert stats["clip_fraction"].item() == (abs(ratio - 1) > 0.2)
        (gradient,) = torch.autograd.grad(loss, actor.theta)
        expected = -M * ratio * moves * torch.autograd.grad(logprob, theta)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@each_clipping
def test_ratio_is_joint_over_the_action_dimensions(script):
    """One dimension twice, the other half as likely: the action's ratio is 1 and nothing is clipped; 4/3 twice is."""
    problem = Problem(script, batch=1)
    actor, (obs, actions, _) = problem.actors[0], problem.data(0)
    per_dimension = gaussian(problem.old[0], obs).base_dist.log_prob(actions)
    for ratios, earned in (((2.0, 0.5), 1.0), ((4 / 3, 4 / 3), 1.5), ((0.5, 0.5), 0.25)):
        logprobs = (per_dimension - torch.tensor([ratios]).log()).sum(-1)
        loss, logratio, _ = script.ppo_loss(actor, obs, actions, logprobs, torch.ones(1), 0.5, 0.0)
        assert loss.item() == pytest.approx(-earned, rel=1e-12)
        assert logratio.exp().item() == pytest.approx(np.prod(ratios), rel=1e-12)


@each_clipping
def test_loss_and_its_gradient_on_a_batch(script):
    """Against the loss written by cases, on a batch in which all of them occur; what is logged against NumPy."""
    problem, args = Problem(script, batch=200), make_args(script, clip_coef=0.3, ent_coef=0.07)
    for i, actor in enumerate(problem.actors):
        obs, actions, logprobs = problem.data(i)
        logprobs = logprobs + 0.5 * torch.randn(200, generator=torch.Generator().manual_seed(i))
        M = problem.advantages
        loss, got, mean_entropy = script.ppo_loss(actor, obs, actions, logprobs, M, args.clip_coef, args.ent_coef)
        stats = script.ppo_stats(loss, got, mean_entropy, args)
        theta = problem.old[i].requires_grad_()
        dist = gaussian(theta, obs)
        expected = clipped_loss(dist, (obs, actions, logprobs), M, args)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(loss, actor.theta), torch.autograd.grad(expected, theta))
        logratio = (dist.log_prob(actions) - logprobs).detach().numpy()
        entropy = dist.entropy()[0].item()
        assert stats["policy_loss"].item() == pytest.approx(expected.item() + 0.07 * entropy, rel=1e-12)
        assert stats["entropy"].item() == pytest.approx(entropy, rel=1e-12)
        assert stats["approx_kl"].item() == pytest.approx(np.mean(np.exp(logratio) - 1 - logratio), rel=1e-10)
        assert stats["clip_fraction"].item() == pytest.approx(np.mean(np.abs(np.exp(logratio) - 1) > 0.3))
        assert 0.1 < stats["clip_fraction"] < 0.9
        np.testing.assert_allclose(got.detach(), logratio, rtol=1e-12, atol=1e-15)


@each_clipping
@pytest.mark.parametrize("batch", [1, 10, 1000])
def test_entropy_bonus_is_a_mean_over_the_batch(script, batch):
    """It is worth ent_coef times the entropy of one action, however large the batch."""
    problem = Problem(script, batch=batch)
    actor, data = problem.actors[2], problem.data(2)
    losses = [script.ppo_loss(actor, *data, torch.zeros(batch), 0.2, c)[0] for c in (0.0, 0.5)]
    entropy = sum(0.5 * np.log(2 * np.pi * np.e * np.exp(2 * s)) for s in actor.theta[-3:].tolist())
    assert losses[0] == 0
    assert losses[1].item() == pytest.approx(-0.5 * entropy, rel=1e-12)
    (gradient,) = torch.autograd.grad(losses[1], actor.theta)
    torch.testing.assert_close(gradient[-3:], torch.full((3,), -0.5))


# Minibatches


def test_minibatches_split_the_batch_anew_in_every_pass(script):
    """Equal parts that together are every index once; another split in the next pass; one part is the batch itself."""
    generator, same = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    passes = [list(script.minibatches(20, 4, generator)) for _ in range(50)]
    assert all(map(torch.equal, passes[0], script.minibatches(20, 4, same)))
    assert all([len(mb) for mb in one_pass] == [5] * 4 for one_pass in passes)
    orders = [torch.cat(one_pass).tolist() for one_pass in passes]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 50
    (whole,) = script.minibatches(20, 1, generator)
    assert torch.equal(torch.arange(20)[whole], torch.arange(20))


# Limits


@each_clipping
@each_split
@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
@pytest.mark.parametrize("size", SIZES)
def test_with_one_agent_happo_and_mappo_are_ppo(script, num_minibatches, max_grad_norm, size, monkeypatch):
    """Parameter for parameter after several epochs, with and without minibatches, gradients clipped and not."""
    problem = Problem(script, [size])
    args = make_args(script, num_minibatches=num_minibatches, max_grad_norm=max_grad_norm, update_epochs=4)
    batches = record_minibatches(monkeypatch, script)
    problem.update(args)
    assert len(batches) == 4 * num_minibatches
    expected = ppo(problem.old[0], problem.data(0), problem.advantages, args, batches)
    assert_equal(problem.actors, [expected])
    assert ((expected - problem.old[0]).abs() > 1e-3).any()
    assert (problem.ratio(0) - 1).abs().max() > args.clip_coef  # clipping was felt


@pytest.mark.parametrize("changed", [{}, {"ent_coef": 0.0}, {"fisher_stride": 3}, {"cg_damping": 1e-3}], ids=str)
def test_with_one_agent_hatrpo_is_trpo(changed):
    """Parameter for parameter, whether the first, a later or no step of the line search is good enough."""
    found = []
    for size in SIZES:
        for target_kl, accept_ratio in ((1e-5, 0.5), (1e-3, 0.5), (0.05, 0.5), (1.0, 0.7), (20.0, 0.9)):
            args = make_args(hatrpo, target_kl=target_kl, accept_ratio=accept_ratio, backtrack_iters=9, **changed)
            problem = Problem(hatrpo, [size])
            # The step does not depend on A's size; relative to a large one, conjugate gradient's tolerance is nothing.
            problem.advantages *= 1e4
            args.ent_coef *= 1e4
            stats = problem.update(args)[0][0]
            expected, j = trpo(problem.old[0], problem.data(0), problem.advantages, args)
            assert_equal(problem.actors, [expected], 1e-7)
            assert stats["accepted"] == (j is not None)
            assert stats["backtracks"] == (args.backtrack_iters if j is None else j)
            found.append(j)
    assert None in found and len(set(found)) >= 4


@each_split
@pytest.mark.parametrize("script", [mappo, ippo], ids=["mappo", "ippo"])
def test_mappo_and_ippo_are_one_ppo_per_agent(script, num_minibatches, monkeypatch):
    """Every agent gets the advantages as they are, on the same minibatches, and its own clipping of the gradient."""
    problem = Problem(script)
    args = make_args(script, num_minibatches=num_minibatches, max_grad_norm=0.3)
    batches = record_minibatches(monkeypatch, script)
    stats, _ = problem.update(args)
    assert len(batches) == args.update_epochs * num_minibatches
    expected = [ppo(problem.old[i], problem.data(i), problem.advantages, args, batches) for i in range(3)]
    assert_equal(problem.actors, expected)
    for i in range(3):
        assert_stats_are_of(stats[i], expected[i], problem.data(i), problem.advantages, args)


@each_split
def test_mappo_does_not_depend_on_the_order_of_the_agents(num_minibatches):
    """The agents in another order: the same parameters to the last bit."""
    args = make_args(mappo, num_minibatches=num_minibatches)
    one = Problem(mappo)
    one.update(args)
    for order in permutations(range(3)):
        other = Problem(mappo)
        other.update(args, agents=order)
        assert_equal(one.actors, copies(other.actors), 0)


def shared_problem(script):
    """Two agents that share one network, of which the second uses two of three outputs."""
    problem = Problem(script, [(4, 3), (4, 3)])
    partition = Partition(obs_ids=(np.arange(2),) * 2, act_ids=(np.arange(3), np.arange(3, 5)))
    args = script.Args(hidden_sizes=HIDDEN, share_param=True)
    policy = script.Policy(partition, 2, args, torch.Generator(), torch.device("cpu"))
    policy.joint.theta.data.copy_(problem.old[0])
    problem.actors = policy.actors
    problem.actions[1] = problem.actions[1][:, :2]
    for i, act_dim in enumerate((3, 2)):
        problem.logprobs[i] = gaussian(problem.old[0], problem.obs[i], act_dim).log_prob(problem.actions[i])
    return problem


@each_clipping
@each_split
@pytest.mark.parametrize("max_grad_norm", [0.3, 1e3])
def test_shared_parameters_have_one_adam(script, num_minibatches, max_grad_norm, monkeypatch):
    """With one network for all: MAPPO steps on the sum of the agents' losses, HAPPO on one after the other's.

    The ratios are over the policies before any update, although one agent's update changes the others' policy.
    """
    problem = shared_problem(script)
    args = make_args(script, num_minibatches=num_minibatches, max_grad_norm=max_grad_norm, fixed_order=True)
    batches = record_minibatches(monkeypatch, script)
    _, got_M = problem.update(args)
    theta = problem.old[0].clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=args.learning_rate, eps=1e-5, fused=False)
    norms, M = [], problem.advantages
    for agents in ([0], [1]) if script is happo else ([0, 1],):
        for _ in range(args.update_epochs * num_minibatches):
            mb, loss = batches.pop(0), 0.0
            for i in agents:
                own = [x[mb] for x in problem.data(i)]
                loss += clipped_loss(gaussian(theta, own[0], (3, 2)[i]), own, M[mb], args)
            norms.append(adam_step(adam, loss, max_grad_norm))
        if script is happo:
            (i,) = agents
            logprobs = gaussian(theta, problem.obs[i], (3, 2)[i]).log_prob(problem.actions[i]).detach()
            M = M * (logprobs - problem.logprobs[i]).exp()
    assert not batches
    assert_equal(problem.actors, [theta.detach()] * 2)
    assert (max(norms) > max_grad_norm) == (max_grad_norm < 1)
    torch.testing.assert_close(got_M, M, rtol=1e-8, atol=1e-8)


def test_shared_parameters_take_one_trust_region_step_after_the_other():
    """HATRPO: each step from where the last one ended, the ratios over the policies before any update."""
    problem, args = shared_problem(hatrpo), make_args(hatrpo, fixed_order=True, ent_coef=0.0)
    problem.advantages *= 1e4
    _, got_M = problem.update(args)
    theta, M, logratios = problem.old[0], problem.advantages, []
    for i in range(2):

        def policy(theta, obs, act_dim=(3, 2)[i]):
            return gaussian(theta, obs, act_dim)

        theta, j = trpo(theta, problem.data(i), M, args, policy, 2, logratios)
        assert j is not None
        logratios.append(policy(theta, problem.obs[i]).log_prob(problem.actions[i]) - problem.logprobs[i])
        M = M * logratios[-1].exp()
    assert_equal(problem.actors, [theta] * 2, 1e-7)
    torch.testing.assert_close(got_M, M, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("agents", [1, 3])
def test_happo_without_clipping_follows_the_policy_gradient(agents):
    """One epoch of plain gradient descent, epsilon very large: each agent moves by the mean of M * grad log pi."""
    problem = Problem(happo, SIZES[:agents])
    args = make_args(happo, clip_coef=1e9, update_epochs=1, ent_coef=0.0, max_grad_norm=1e9, fixed_order=True)
    problem.update(args, problem.optimizer(args, torch.optim.SGD, lr=0.5))
    M = problem.advantages
    for i in range(agents):
        theta = problem.old[i].clone().requires_grad_()
        logprob = gaussian(theta, problem.obs[i]).log_prob(problem.actions[i])
        gradients = [torch.autograd.grad(logprob[b], theta, retain_graph=True)[0] for b in range(BATCH)]
        gradient = sum(M[b] * gradients[b] for b in range(BATCH)) / BATCH
        assert_equal([problem.actors[i]], [problem.old[i] + 0.5 * gradient], 1e-11)
        M = M * problem.ratio(i)


def test_happo_with_unchanged_earlier_agents_is_mappo():
    """Where the agents before do not move, M stays A and the last agent's update is MAPPO's."""
    for last in range(3):
        args = make_args(happo, num_minibatches=1, fixed_order=True)
        one, two = Problem(happo), Problem(mappo)
        order = [i for i in range(3) if i != last] + [last]
        optimizer = torch.optim.Adam(one.actors[last].parameters(), lr=args.learning_rate, eps=1e-5)
        one.update(args, optimizer, agents=order)
        two.update(make_args(mappo, num_minibatches=1))
        assert_equal(one.actors[last : last + 1], copies(two.actors[last : last + 1]), 1e-11)
        assert_equal([one.actors[i] for i in order[:-1]], [one.old[i] for i in order[:-1]], 0)


# The factor M


@each_split
@pytest.mark.parametrize("target_kl", [1e6, 0.02])
@pytest.mark.parametrize("seed", range(4))
def test_happo_is_one_ppo_after_the_other_on_M(num_minibatches, target_kl, seed, monkeypatch):
    """From scratch, agent by agent in the order taken: PPO on M, M times the agent's own ratio, the next agent.

    A minibatch is left out where the joint policy of the m agents so far has moved by more than m / n of the radius.
    """
    problem, skipped = Problem(happo), []
    args = make_args(happo, num_minibatches=num_minibatches, max_grad_norm=0.5, target_kl=target_kl)
    batches, calls = record_minibatches(monkeypatch, happo), record_agents(monkeypatch, problem)
    stats, M = problem.update(args, generator=torch.Generator().manual_seed(seed))
    order = list(stats)
    steps = args.update_epochs * num_minibatches
    assert [i for i, _ in calls] == [i for i in order for _ in range(steps + 1)]  # the last one is for what is logged
    expected_M = problem.advantages
    for i in order:
        own, batches = batches[:steps], batches[steps:]
        for mb, (_, got) in zip([*own, slice(None)], calls[: steps + 1], strict=True):
            torch.testing.assert_close(got, expected_M[mb], rtol=1e-9, atol=1e-9)
        calls = calls[steps + 1 :]

        def too_far(theta, mb, i=i, A=problem.advantages, M=expected_M):
            new = gaussian(theta, problem.obs[i][mb]).log_prob(problem.actions[i][mb])
            R = M[mb] / A[mb] * torch.exp(new - problem.logprobs[i][mb])  # of the joint policies
            kls = R - 1 - torch.log(R)
            skipped.append(sum(kls) / len(kls) > target_kl * (order.index(i) + 1) / 3)
            return skipped[-1]

        theta = ppo(problem.old[i], problem.data(i), expected_M, args, own, too_far)
        assert_equal([problem.actors[i]], [theta], 1e-8)
        assert stats[i]["M_std"].item() == pytest.approx(expected_M.std().item(), rel=1e-8)
        assert_stats_are_of(stats[i], theta, problem.data(i), expected_M, args)
        ratio = (gaussian(theta, problem.obs[i]).log_prob(problem.actions[i]) - problem.logprobs[i]).exp()
        expected_M = expected_M * ratio
    torch.testing.assert_close(M, expected_M, rtol=1e-8, atol=1e-8)
    assert any(skipped) == (target_kl < 1) and not all(skipped)


@pytest.mark.parametrize("seed", range(4))
def test_hatrpo_is_one_trpo_after_the_other_on_M(seed, monkeypatch):
    """From scratch, agent by agent in the order taken: TRPO on M, M times the agent's own ratio, the next agent."""
    problem, args = Problem(hatrpo), make_args(hatrpo, target_kl=0.03, ent_coef=0.0)
    problem.advantages *= 1e4
    calls = record_agents(monkeypatch, problem)
    stats, M = problem.update(args, generator=torch.Generator().manual_seed(seed))
    assert sorted(stats) == [0, 1, 2] and [i for i, _ in calls] == list(stats)
    expected_M, logratios = problem.advantages, []
    for i, got in calls:
        torch.testing.assert_close(got, expected_M, rtol=1e-6, atol=1e-6)
        theta, _ = trpo(problem.old[i], problem.data(i), expected_M, args, agents=3, earlier=logratios)
        assert_equal([problem.actors[i]], [theta], 1e-7)
        assert stats[i]["M_std"].item() == pytest.approx(expected_M.std().item(), rel=1e-6)
        logratios.append(gaussian(theta, problem.obs[i]).log_prob(problem.actions[i]) - problem.logprobs[i])
        expected_M = expected_M * logratios[-1].exp()
    torch.testing.assert_close(M, expected_M, rtol=1e-6, atol=1e-6)


class CategoricalActor(hatrpo.MLP):
    """Another kind of policy: one of `num_actions` actions."""

    def __init__(self, obs_dim, num_actions, generator):
        super().__init__((obs_dim, *HIDDEN, num_actions), 1.0, generator)

    def forward(self, obs):
        return (super().forward(obs),)

    def log_prob(self, dist, actions):
        return torch.log_softmax(dist[0], -1).gather(-1, actions[:, None])[:, 0]

    def entropy(self, dist):
        return -(torch.softmax(dist[0], -1) * torch.log_softmax(dist[0], -1)).sum(-1)

    def kl(self, old, new):
        old, new = (torch.log_softmax(dist[0], -1) for dist in (old, new))
        return (old.exp() * (old - new)).sum(-1)


def test_hatrpo_with_categorical_policies():
    """The class is all that changes; against TRPO with the explicit Hessian of PyTorch's KL between categoricals."""
    args, generator = make_args(hatrpo, ent_coef=0.0, fixed_order=True), torch.Generator().manual_seed(0)
    sizes = [(3, 4), (5, 2), (2, 3)]
    actors = [CategoricalActor(*size, generator) for size in sizes]
    obs = [torch.randn(BATCH, o, generator=generator) for o, _ in sizes]
    actions = [torch.randint(a, (BATCH,), generator=generator) for _, a in sizes]
    old, advantages = copies(actors), 1e4 * torch.randn(BATCH, generator=generator)
    stats, got_M = hatrpo.hatrpo_update(actors, obs, actions, advantages, args, generator)
    M, logratios = advantages, []
    for i, (_, num_actions) in enumerate(sizes):

        def policy(theta, obs, num_actions=num_actions):
            return Categorical(logits=mlp(theta, obs, (*HIDDEN, num_actions))[0])

        before = policy(old[i], obs[i])
        data = obs[i], actions[i], before.log_prob(actions[i])
        theta, j = trpo(old[i], data, M, args, policy, len(sizes), logratios)
        assert_equal([actors[i]], [theta], 1e-7)
        after = policy(actors[i].theta.detach(), obs[i])
        logratios.append(after.log_prob(actions[i]) - before.log_prob(actions[i]))
        ratio, joint = logratios[-1].exp(), sum(logratios)
        gain, kl = ((ratio - 1) * M).mean().item(), kl_divergence(before, after).mean().item()
        assert stats[i]["accepted"] == 1 and stats[i]["backtracks"] == j
        assert stats[i]["surrogate_gain"].item() == pytest.approx(gain, rel=1e-6) and gain > 0
        kl = max(kl, (joint.exp() - 1 - joint).mean().item() / (i + 1))
        assert stats[i]["kl"].item() == pytest.approx(kl, rel=1e-6) and 0 < kl <= args.target_kl / 3
        assert stats[i]["entropy"].item() == pytest.approx(before.entropy().mean().item(), rel=1e-9)
        M = M * ratio
    torch.testing.assert_close(got_M, M, rtol=1e-9, atol=1e-9)


@each_sequential
@pytest.mark.parametrize("agents", [1, 2, 3])
@pytest.mark.parametrize("fixed_order", [False, True])
def test_M_is_A_times_the_ratio_of_the_joint_policies_so_far(script, agents, fixed_order, monkeypatch):
    """For every prefix i_1..i_m of the order, from the policies before and after; at the end, of all the agents."""
    problem, args = Problem(script), make_args(script, fixed_order=fixed_order)
    calls = record_agents(monkeypatch, problem)
    _, M = problem.update(args, agents=slice(agents), generator=torch.Generator().manual_seed(5))
    order = list(dict.fromkeys(i for i, _ in calls))
    assert sorted(order) == list(range(agents))
    ratios = torch.stack([problem.ratio(i) for i in range(3)])
    assert all((ratios[i] - 1).abs().max() > 0.1 for i in order)
    assert all((ratios[i] == 1).all() for i in range(3) if i not in order)
    for i, got in calls:
        before = order[: order.index(i)]
        torch.testing.assert_close(got, problem.advantages * ratios[before].prod(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(M, problem.advantages * ratios[order].prod(0), rtol=1e-10, atol=1e-12)


@each_sequential
def test_M_is_not_normalised_and_not_clipped(script):
    """A has a mean and a size of its own, ratios go far beyond the clipping: M keeps all of it."""
    problem = Problem(script, seed=2)
    problem.advantages = 10 + 50 * problem.advantages
    args = make_args(script, learning_rate=0.1, update_epochs=10, target_kl=0.5 if script is hatrpo else 1e6)
    _, M = problem.update(args)
    ratio = M / problem.advantages
    assert ratio.max() > 1.5 and ratio.min() < 0.5
    torch.testing.assert_close(ratio, problem.ratio(0) * problem.ratio(1) * problem.ratio(2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_minibatches", [1, 2, 32])
def test_M_of_agents_that_stay_is_A_to_the_last_bit(num_minibatches):
    """HAPPO without a learning rate: M is A, however the batch is split."""
    problem, args = Problem(happo), make_args(happo, num_minibatches=num_minibatches, learning_rate=0.0)
    _, M = problem.update(args)
    assert torch.equal(M, problem.advantages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rejected_steps_leave_M_and_the_parameters_to_the_last_bit(dtype):
    """HATRPO asked for more gain than there can be: M is A, nothing has moved, KL and gain are 0."""
    problem, args = Problem(hatrpo), make_args(hatrpo, accept_ratio=1e6)
    for actor in problem.actors:
        actor.to(dtype)
    old = copies(problem.actors)
    for name in ("obs", "actions"):
        setattr(problem, name, [x.to(dtype) for x in getattr(problem, name)])
    problem.advantages = problem.advantages.to(dtype)
    stats, M = problem.update(args)
    assert torch.equal(M, problem.advantages)
    assert_equal(problem.actors, old, 0)
    assert all(s["accepted"] == s["kl"] == s["surrogate_gain"] == 0 for s in stats.values())


def test_zero_advantages_change_nothing(script):
    """No NaN, no step."""
    problem = Problem(script)
    problem.advantages = torch.zeros(BATCH)
    stats, M = problem.update(make_args(script, ent_coef=0.0))
    assert_equal(problem.actors, problem.old, 0)
    assert torch.equal(M, torch.zeros(BATCH))
    assert len(stats) == 3 and all(torch.isfinite(value) for s in stats.values() for value in s.values())


# The order of the agents


def orders_taken(script, monkeypatch, updates, fixed_order, agents):
    """The orders of many updates in which nothing is computed."""
    problem = Problem(script, [(1, 1)] * agents, batch=2)

    def do_nothing(actor, *_):
        return {} if script is hatrpo else (actor.theta.sum() * 0, torch.zeros(2), torch.zeros(()))

    monkeypatch.setattr(script, "trpo_step" if script is hatrpo else "ppo_loss", do_nothing)
    calls = record_agents(monkeypatch, problem)
    args = make_args(script, update_epochs=1, fixed_order=fixed_order)
    optimizer = None if script is hatrpo else problem.optimizer(args, torch.optim.SGD, lr=0.0)
    generator, taken = torch.Generator().manual_seed(0), []
    for _ in range(updates):
        stats, _ = problem.update(args, optimizer, generator)
        assert list(dict.fromkeys(i for i, _ in calls)) == list(stats)  # what is logged comes in the order taken
        taken.append(tuple(stats))
        calls.clear()
    return taken


@each_sequential
def test_order_is_a_fresh_uniform_permutation(script, monkeypatch):
    """Chi-square over the six orders of three agents, and over the pairs of consecutive first agents; seeded."""
    taken = orders_taken(script, monkeypatch, 600, False, 3)
    with monkeypatch.context() as nested:
        assert orders_taken(script, nested, 20, False, 3) == taken[:20]
    counts = Counter(taken)
    assert set(counts) == set(permutations(range(3)))
    assert scipy_stats.chisquare(list(counts.values())).pvalue > 0.01
    pairs = Counter((a[0], b[0]) for a, b in pairwise(taken))
    assert len(pairs) == 9
    assert scipy_stats.chisquare(list(pairs.values())).pvalue > 0.01


@each_sequential
def test_fixed_order_is_0_to_n(script, monkeypatch):
    """The ablation updates the agents as they are numbered, every time."""
    assert set(orders_taken(script, monkeypatch, 20, True, 5)) == {(0, 1, 2, 3, 4)}


# The critic


@each_split
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e3])
def test_critic_update_is_least_squares(script, num_minibatches, max_grad_norm, monkeypatch):
    """From scratch: several epochs of Adam on half the mean squared error, parameter for parameter."""
    generator = torch.Generator().manual_seed(3)
    critic = script.MLP((4, *HIDDEN, 1), 1.0, generator)
    obs, returns = torch.randn(BATCH, 4, generator=generator), 3 * torch.randn(BATCH, generator=generator)
    args = make_args(script, num_minibatches=num_minibatches, max_grad_norm=max_grad_norm)
    theta = critic.theta.detach().clone().requires_grad_()
    batches = record_minibatches(monkeypatch, script)
    optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_learning_rate, eps=1e-5, fused=True)
    loss = script.critic_update(critic, optimizer, obs, returns, args, generator)
    assert len(batches) == 2 * num_minibatches

    def half_mse(mb):
        values = mlp(theta, obs[mb], (*HIDDEN, 1))[0][:, 0]
        return sum((v - r) ** 2 for v, r in zip(values, returns[mb], strict=True)) / (2 * len(values))

    adam = torch.optim.Adam([theta], lr=args.critic_learning_rate, eps=1e-5, fused=False)
    for mb in batches:
        assert (adam_step(adam, half_mse(mb), max_grad_norm) > max_grad_norm) == (max_grad_norm < 1)
    assert_equal([critic], [theta.detach()])
    assert loss.item() == pytest.approx(half_mse(slice(None)).item(), rel=1e-9)
    assert not loss.requires_grad
