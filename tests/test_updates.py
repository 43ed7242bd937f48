"""The updates of actors and critic against PPO and TRPO from scratch, and the factor M that links the agents."""

from collections import Counter
from itertools import pairwise, permutations
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import gaussian, mlp, set_theta, theta_of, update_of
from scipy import stats as scipy_stats
from torch import Tensor, nn
from torch.distributions import Categorical

import happo_mamujoco as happo
import hatrpo_mamujoco as hatrpo
import ippo_mamujoco as ippo
import mappo_mamujoco as mappo
from envs import Partition

HIDDEN = (6, 5)
BATCH = 32


# Policies, each a class for the scripts and an oracle by its formulas


class CategoricalActor(nn.Module):
    """Another kind of policy than the scripts': one of `num_actions` actions."""

    def __init__(self, script, obs_dim, num_actions):
        super().__init__()
        self.net = script.mlp((obs_dim, *HIDDEN, num_actions), 0.01)

    def forward(self, obs):
        return Categorical(logits=self.net(obs))


class GaussianOracle:
    """The diagonal Gaussians of an Actor with parameters theta, given observations."""

    def __init__(self, theta, obs, act_dim):
        self.mean, self.log_std = gaussian(theta, obs, HIDDEN, act_dim)

    def sample(self):
        """One action for each observation."""
        return self.mean + self.log_std.exp() * torch.randn(self.mean.shape)

    def log_prob_per_dimension(self, actions):
        """The log-density of each dimension of the actions."""
        z = (actions - self.mean) / self.log_std.exp()
        return -z.square() / 2 - self.log_std - np.log(2 * np.pi) / 2

    def log_prob(self, actions):
        """The joint log-density of the actions."""
        return self.log_prob_per_dimension(actions).sum(-1)

    def entropy(self):
        """The entropy for each observation, which is the same for all."""
        entropies = self.log_std + np.log(2 * np.pi * np.e) / 2
        return entropies.sum().expand(len(self.mean))

    def kl(self, new):
        """KL(self || new) for each observation."""
        variance_ratio = (2 * (self.log_std - new.log_std)).exp()
        distance = (self.mean - new.mean).square() / (2 * new.log_std).exp()
        return ((variance_ratio + distance - 1) / 2 + new.log_std - self.log_std).sum(-1)


class CategoricalOracle:
    """The categoricals of a CategoricalActor with parameters theta, given observations."""

    def __init__(self, theta, obs, num_actions):
        logits = mlp(theta, obs, (*HIDDEN, num_actions))
        self.probs = logits.exp() / logits.exp().sum(-1, keepdim=True)

    def sample(self):
        """One action for each observation."""
        return (torch.rand(len(self.probs), 1) > self.probs.cumsum(-1)[:, :-1]).sum(-1)

    def log_prob(self, actions):
        """The log-probabilities of the actions."""
        return self.probs[torch.arange(len(actions)), actions].log()

    def entropy(self):
        """The entropy for each observation."""
        return -(self.probs * self.probs.log()).sum(-1)

    def kl(self, new):
        """KL(self || new) for each observation."""
        return (self.probs * (self.probs / new.probs).log()).sum(-1)


class Agent(NamedTuple):
    """What an agent of a problem is."""

    obs_dim: int
    act_dim: int  # or the number of actions
    oracle: type = GaussianOracle

    def make_actor(self, script):
        """An actor as the script makes it, or as another kind of policy is made for it."""
        if self.oracle is CategoricalOracle:
            return CategoricalActor(script, self.obs_dim, self.act_dim)
        return script.Actor(self.obs_dim, self.act_dim, script.Args(hidden_sizes=HIDDEN))


GAUSSIANS = [Agent(3, 2), Agent(5, 1), Agent(2, 3)]
CATEGORICALS = [
    Agent(3, 4, CategoricalOracle),
    Agent(5, 2, CategoricalOracle),
    Agent(2, 3, CategoricalOracle),
]
MIXED = [Agent(3, 2), Agent(5, 3, CategoricalOracle)]

pytestmark = pytest.mark.usefixtures("float64")
each_clipping = pytest.mark.parametrize(
    "script", [mappo, happo, ippo], ids=["mappo", "happo", "ippo"]
)
each_simultaneous = pytest.mark.parametrize("script", [mappo, ippo], ids=["mappo", "ippo"])
each_sequential = pytest.mark.parametrize("script", [happo, hatrpo], ids=["happo", "hatrpo"])
each_split = pytest.mark.parametrize("num_minibatches", [1, 4, 5])  # 5 does not divide the batch
each_team = pytest.mark.parametrize(
    "team", [GAUSSIANS, CATEGORICALS, MIXED], ids=["gaussian", "categorical", "mixed"]
)
each_agent = pytest.mark.parametrize("agent", GAUSSIANS + CATEGORICALS, ids=str)


# Problems


class Problem:
    """Actors with random parameters, a batch that they drew, and random advantages."""

    def __init__(self, script, team=GAUSSIANS, batch=BATCH, seed=0):
        torch.manual_seed(seed)
        self.script = script
        self.team = team
        self.actors = [agent.make_actor(script) for agent in team]
        for actor in self.actors:
            set_theta(actor, 0.5 * torch.randn(len(theta_of(actor))))
        self.old = thetas(self.actors)
        self.earlier_gradient = 0.0  # every entry of HATRPO's sums of gradients
        self.obs = [torch.randn(batch, agent.obs_dim) for agent in team]
        self.draw()
        # IPPO's agents have advantages of their own.
        self.advantages = torch.randn((len(team), batch) if script is ippo else (batch,))

    def draw(self):
        """Let the old policies draw the actions."""
        dists = [self.dist(i, theta) for i, theta in enumerate(self.old)]
        self.actions = [dist.sample() for dist in dists]
        self.logprobs = [dist.log_prob(a) for dist, a in zip(dists, self.actions)]

    def dist(self, i, theta, rows=slice(None)):
        """The policy of agent i with parameters theta, on rows of the batch."""
        agent = self.team[i]
        return agent.oracle(theta, self.obs[i][rows], agent.act_dim)

    def logratio(self, i, theta, rows=slice(None)):
        """Log of what theta makes of the actions of agent i, over the policy that drew them."""
        logprobs = self.dist(i, theta, rows).log_prob(self.actions[i][rows])
        return logprobs - self.logprobs[i][rows]

    def ratio(self, i):
        """What the agent's present policy makes of its actions, over the policy that drew them."""
        return self.logratio(i, theta_of(self.actors[i])).exp()

    def advantage(self, i):
        """The advantages that agent i is given."""
        return self.advantages[i] if self.script is ippo else self.advantages

    def optimizer(self, args, kind=torch.optim.Adam, **changed):
        """An optimizer of all the agents, as in `main`."""
        settings = {}
        if kind is torch.optim.Adam:
            settings = {"lr": args.learning_rate, "eps": 1e-5, "fused": True}
        return kind(nn.ModuleList(self.actors).parameters(), **(settings | changed))

    def update(self, args, optimizer=None, seed=0, agents=None):
        """Call the script's update of (some of) the agents, in the order given; return its log."""
        if agents is None:
            agents = range(len(self.actors))
        actors = [self.actors[i] for i in agents]
        obs = [self.obs[i] for i in agents]
        actions = [self.actions[i] for i in agents]
        torch.manual_seed(seed)
        update = update_of(self.script)
        if self.script is hatrpo:
            region = hatrpo.TrustRegion(actors, args).to(self.advantages.dtype)
            for gradient_sum in region.gradient_sums:
                gradient_sum.fill_(self.earlier_gradient)
            return update(actors, region, obs, actions, self.advantages, args)
        optimizer = optimizer or self.optimizer(args)
        return update(actors, optimizer, obs, actions, self.advantages, args)


# Every setting that an update reads, so that the scripts' defaults may change.
SETTINGS = {
    "learning_rate": 0.01,
    "update_epochs": 3,
    "critic_learning_rate": 0.01,
    "critic_epochs": 2,
    "num_minibatches": 1,
    "clip_coef": 0.2,
    "ent_coef": 0.01,
    "max_grad_norm": 10.0,
    "fixed_order": False,
    "target_kl": 0.02,
    "momentum": 0.9,
    "max_ratio": np.inf,
    "keep_mean": True,
    "backtrack_coeff": 0.8,
    "backtrack_iters": 10,
    "accept_ratio": 0.5,
    "cg_iters": 300,
    "cg_damping": 0.1,
}


def make_args(script, **changed):
    """Arguments of a script: `SETTINGS`, but for what is changed, which may be out of range.

    What the script does not know is left out.
    """
    args = script.Args()
    for key, value in (SETTINGS | changed).items():
        if hasattr(args, key):
            setattr(args, key, value)
    return args


def thetas(modules):
    """The parameters of modules, each as one vector."""
    return [theta_of(module) for module in modules]


def assert_equal(modules, expected, tolerance=1e-9):
    """Assert that modules have these parameters."""
    torch.testing.assert_close(thetas(modules), list(expected), rtol=tolerance, atol=tolerance)


def stats_of(log, i):
    """What is logged of one agent."""
    prefix = f"agent_{i}/"
    return {key.removeprefix(prefix): log[key] for key in log if key.startswith(prefix)}


def rows_of(x, batch):
    """The row of the batch that each row of x is."""
    same = (x[:, None] == batch).all(-1)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


class Call(NamedTuple):
    """A call of the function that computes one agent's loss or step."""

    agent: int
    rows: Tensor  # of the batch
    M: Tensor


def record_calls(monkeypatch, problem):
    """Let the function that computes an agent's loss or step leave its calls on a list."""
    calls = []
    script = problem.script
    name = "trpo_step" if script is hatrpo else "ppo_loss"
    shipped = getattr(script, name)

    def spy(actor, obs, actions, logprobs, M, *rest):
        for i, all_obs in enumerate(problem.obs):
            if actor is problem.actors[i] and (obs[0] == all_obs).all(1).any():
                calls.append(Call(i, rows_of(obs, all_obs), M.clone()))
        return shipped(actor, obs, actions, logprobs, M, *rest)

    monkeypatch.setattr(script, name, spy)
    return calls


def order_of(calls):
    """The agents in the order in which they were updated."""
    return list(dict.fromkeys(call.agent for call in calls))


def minibatches_of(calls, i):
    """The rows of the minibatches of one agent: its last call is for what is logged."""
    *minibatches, last = [call.rows for call in calls if call.agent == i]
    assert torch.equal(last, torch.arange(len(last)))
    return minibatches


# Oracles, on a network's vector theta


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


def clipped_loss(dist, actions, logprobs, M, args):
    """PPO's loss, by its cases: a positive M earns up to 1 + epsilon, a negative one costs at least 1 - epsilon."""
    ratio = (dist.log_prob(actions) - logprobs).exp()
    below = ratio.clamp(max=1 + args.clip_coef)
    above = ratio.clamp(min=1 - args.clip_coef)
    earned = torch.where(M >= 0, below, above) * M
    return -earned.mean() - args.ent_coef * dist.entropy().mean()


def agent_loss(problem, i, theta, M, args, rows=slice(None)):
    """PPO's loss of agent i with parameters theta, on rows of the batch."""
    dist = problem.dist(i, theta, rows)
    return clipped_loss(dist, problem.actions[i][rows], problem.logprobs[i][rows], M[rows], args)


def ppo(problem, i, M, args, minibatches):
    """PPO of agent i on these minibatches; return the new theta."""
    theta = problem.old[i].clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=args.learning_rate, eps=1e-5, foreach=False, fused=False)
    for rows in minibatches:
        adam_step(adam, agent_loss(problem, i, theta, M, args, rows), args.max_grad_norm)
    return theta.detach()


def k3(logratio):
    """The mean of r - 1 - log r."""
    return sum(np.exp(x) - 1 - x for x in logratio.tolist()) / len(logratio)


def assert_ppo_stats(log, problem, i, theta, M, args, tolerance=1e-7):
    """What is logged of an agent is of the whole batch, and of its policy `theta`."""
    stats = stats_of(log, i)
    logratio = problem.logratio(i, theta)
    entropy = problem.dist(i, theta).entropy().mean().item()
    clipped = [abs(r - 1) > args.clip_coef for r in logratio.exp().tolist()]
    loss = agent_loss(problem, i, theta, M, args).item()
    expected = {
        "policy_loss": loss + args.ent_coef * entropy,
        "entropy": entropy,
        "approx_kl": k3(logratio),
        "clip_fraction": sum(clipped) / len(M),
    }
    assert set(stats) == set(expected)
    for key, value in expected.items():
        assert stats[key].item() == pytest.approx(value, rel=tolerance, abs=1e-9), key
        assert not stats[key].requires_grad


def trpo(problem, i, M, args, theta=None):
    """TRPO of agent i with the explicit Hessian and a dense solver; return theta and j (None: rejected).

    The damping is a share of the Hessian's curvature along g.
    """
    theta = problem.old[i] if theta is None else theta
    delta = args.target_kl
    old = problem.dist(i, theta)

    def objective(new):
        entropy = problem.dist(i, new).entropy().mean()
        return (problem.logratio(i, new).exp() * M).mean() + args.ent_coef * entropy

    def mean_kl(new):
        return old.kl(problem.dist(i, new)).mean()

    g = torch.autograd.functional.jacobian(objective, theta)
    H = torch.autograd.functional.hessian(mean_kl, theta)
    damping = args.cg_damping * (g @ H @ g) / (g @ g)
    x = torch.linalg.solve(H + damping * torch.eye(len(theta)), g)
    beta = (2 * delta / (x @ H @ x)).sqrt()
    for j in range(args.backtrack_iters + 1):
        length = args.backtrack_coeff**j * beta
        new = theta + length * x
        gain = objective(new) - objective(theta)
        if mean_kl(new) <= delta and gain >= args.accept_ratio * length * (x @ g):
            return new, j
    return theta, None


# The clipped loss of one agent


@each_clipping
def test_clipping_by_its_four_cases(script):
    """The ratio counts within its bounds; beyond them only where it hurts: then there is a gradient, otherwise none."""
    problem = Problem(script, batch=1)
    args = make_args(script, clip_coef=0.2, ent_coef=0.0)
    actor = problem.actors[0]
    obs = problem.obs[0]
    actions = problem.actions[0]
    theta = problem.old[0].requires_grad_()
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
        logprob = problem.dist(0, theta).log_prob(actions)
        logprobs = logprob.detach() - np.log(ratio)
        loss, logratio, stats = script.ppo_loss(
            actor, obs, actions, logprobs, torch.tensor([M]), args
        )
        assert loss.item() == pytest.approx(-earned, rel=1e-12)
        assert logratio.item() == pytest.approx(np.log(ratio), rel=1e-12)
        assert stats["policy_loss"].item() == pytest.approx(-earned, rel=1e-12)
        assert stats["approx_kl"].item() == pytest.approx(ratio - 1 - np.log(ratio), rel=1e-12)
        assert stats["clip_fraction"].item() == (abs(ratio - 1) > 0.2)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, actor.parameters())])
        expected = -M * ratio * moves * torch.autograd.grad(logprob, theta)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@each_clipping
def test_ratio_is_joint_over_the_action_dimensions(script):
    """One dimension twice, the other half as likely: the action's ratio is 1 and nothing is clipped; 4/3 twice is."""
    problem = Problem(script, batch=1)
    args = make_args(script, clip_coef=0.5, ent_coef=0.0)
    actions = problem.actions[0]
    per_dimension = problem.dist(0, problem.old[0]).log_prob_per_dimension(actions)
    for ratios, earned in (((2.0, 0.5), 1.0), ((4 / 3, 4 / 3), 1.5), ((0.5, 0.5), 0.25)):
        logprobs = (per_dimension - torch.tensor([ratios]).log()).sum(-1)
        loss, logratio, stats = script.ppo_loss(
            problem.actors[0], problem.obs[0], actions, logprobs, torch.ones(1), args
        )
        assert loss.item() == pytest.approx(-earned, rel=1e-12)
        assert logratio.exp().item() == pytest.approx(np.prod(ratios), rel=1e-12)
        assert stats["clip_fraction"].item() == (abs(np.prod(ratios) - 1) > 0.5)


@each_clipping
@each_team
def test_loss_and_its_gradient_on_a_batch(script, team):
    """Against the loss written by cases, on a batch in which all of them occur; what is logged against NumPy."""
    problem = Problem(script, team, batch=200)
    args = make_args(script, clip_coef=0.3, ent_coef=0.07)
    for i, actor in enumerate(problem.actors):
        obs = problem.obs[i]
        actions = problem.actions[i]
        logprobs = problem.logprobs[i] + 0.5 * torch.randn(200)
        M = problem.advantage(i)
        loss, got, stats = script.ppo_loss(actor, obs, actions, logprobs, M, args)
        theta = problem.old[i].requires_grad_()
        dist = problem.dist(i, theta)
        expected = clipped_loss(dist, actions, logprobs, M, args)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, actor.parameters())])
        (expected_gradient,) = torch.autograd.grad(expected, theta, retain_graph=True)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
        logratio = (dist.log_prob(actions) - logprobs).detach().numpy()
        entropy = dist.entropy().mean().item()
        kl = np.mean(np.exp(logratio) - 1 - logratio)
        clip_fraction = np.mean(np.abs(np.exp(logratio) - 1) > 0.3)
        policy_loss = expected.item() + 0.07 * entropy
        assert stats["policy_loss"].item() == pytest.approx(policy_loss, rel=1e-10)
        assert stats["entropy"].item() == pytest.approx(entropy, rel=1e-12)
        assert stats["approx_kl"].item() == pytest.approx(kl, rel=1e-10)
        assert stats["clip_fraction"].item() == pytest.approx(clip_fraction)
        assert 0.1 < stats["clip_fraction"] < 0.9
        np.testing.assert_allclose(got.detach(), logratio, rtol=1e-12, atol=1e-15)


@each_clipping
@pytest.mark.parametrize("batch", [1, 10, 1000])
def test_entropy_bonus_is_a_mean_over_the_batch(script, batch):
    """It is worth ent_coef times the entropy of one action, however large the batch."""
    problem = Problem(script, batch=batch)
    actor = problem.actors[2]
    losses = []
    for ent_coef in (0.0, 0.5):
        args = make_args(script, ent_coef=ent_coef)
        loss, _, _ = script.ppo_loss(
            actor,
            problem.obs[2],
            problem.actions[2],
            problem.logprobs[2],
            torch.zeros(batch),
            args,
        )
        losses.append(loss)
    log_stds = actor.log_std.tolist()
    assert len(log_stds) == 3
    entropy = sum(0.5 * np.log(2 * np.pi * np.e * np.exp(2 * s)) for s in log_stds)
    assert losses[0] == 0
    assert losses[1].item() == pytest.approx(-0.5 * entropy, rel=1e-12)
    (gradient,) = torch.autograd.grad(losses[1], actor.log_std)
    torch.testing.assert_close(gradient, torch.full((3,), -0.5))


# Minibatches

# The sizes of the parts of 20 rows: all but the last are equal.
SPLITS = {1: [20], 3: [7, 7, 6], 4: [5] * 4, 7: [3] * 6 + [2], 30: [1] * 20}
PASSES = 3


def assert_split_anew(batches, num_minibatches):
    """Assert that each pass has every row once, in parts of these sizes, and that no two are the same."""
    assert [len(rows) for rows in batches] == SPLITS[num_minibatches] * PASSES
    orders = torch.cat(batches).view(PASSES, 20).tolist()
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == PASSES
    assert list(range(20)) not in orders


@each_clipping
@pytest.mark.parametrize("num_minibatches", SPLITS)
def test_actors_split_the_batch_anew_in_every_pass(script, num_minibatches, monkeypatch):
    """Every row once a pass, in another order; seeded; HAPPO's agents have splits of their own."""
    args = make_args(script, num_minibatches=num_minibatches, update_epochs=PASSES)
    taken = []
    for seed in (0, 0, 1):
        problem = Problem(script, batch=20)
        with monkeypatch.context() as nested:
            calls = record_calls(nested, problem)
            problem.update(args, seed=seed)
        batches = [minibatches_of(calls, i) for i in range(3)]
        for i in range(3):
            assert_split_anew(batches[i], num_minibatches)
            same = torch.equal(torch.cat(batches[i]), torch.cat(batches[0]))
            assert same == (i == 0 or script is not happo)
        taken.append(torch.cat(batches[0]))
    assert torch.equal(taken[0], taken[1])
    assert not torch.equal(taken[0], taken[2])


def record_rows(critic, obs):
    """Let a critic leave the rows of each of its calls on a list."""
    calls = []
    critic.register_forward_pre_hook(lambda _, inputs: calls.append(rows_of(inputs[0], obs)))
    return calls


@pytest.mark.parametrize("num_minibatches", SPLITS)
def test_critic_splits_the_batch_anew_in_every_pass(script, num_minibatches):
    """Every row once a pass, in another order; seeded."""
    args = make_args(script, num_minibatches=num_minibatches, critic_epochs=PASSES)
    taken = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        critic = script.mlp((4, *HIDDEN, 1), 1.0)
        obs = torch.randn(20, 4)
        calls = record_rows(critic, obs)
        optimizer = torch.optim.Adam(critic.parameters())
        script.critic_update(critic, optimizer, obs, torch.randn(20), args)
        *batches, whole = calls
        assert torch.equal(whole, torch.arange(20))  # the loss after the fit
        assert_split_anew(batches, num_minibatches)
        taken.append(torch.cat(batches))
    assert torch.equal(taken[0], taken[1])
    assert not torch.equal(taken[0], taken[2])


# Limits


@each_clipping
@each_split
@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
@each_agent
def test_with_one_agent_happo_and_mappo_are_ppo(
    script, num_minibatches, max_grad_norm, agent, monkeypatch
):
    """Parameter for parameter after several epochs, with and without minibatches, gradients clipped and not.

    Alone, an agent has no M to take the mean of.
    """
    problem = Problem(script, [agent])
    args = make_args(
        script,
        num_minibatches=num_minibatches,
        max_grad_norm=max_grad_norm,
        update_epochs=4,
        keep_mean=False,
    )
    calls = record_calls(monkeypatch, problem)
    log = problem.update(args)
    minibatches = minibatches_of(calls, 0)
    assert len(minibatches) == 4 * num_minibatches
    A = problem.advantage(0)
    expected = ppo(problem, 0, A, args, minibatches)
    assert_equal(problem.actors, [expected])
    assert_ppo_stats(log, problem, 0, expected, A, args)
    assert ((expected - problem.old[0]).abs() > 1e-3).any()


@each_clipping
def test_with_one_agent_clipping_is_felt(script):
    """In the test above ratios do leave their bounds."""
    for agent in GAUSSIANS:
        problem = Problem(script, [agent])
        args = make_args(script, num_minibatches=4, update_epochs=4)
        problem.update(args)
        assert (problem.ratio(0) - 1).abs().max() > args.clip_coef


@pytest.mark.parametrize(
    ("team", "changed"),
    [
        (GAUSSIANS, {}),
        (GAUSSIANS, {"ent_coef": 0.0}),
        (GAUSSIANS, {"max_ratio": 1e-9}),
        (GAUSSIANS, {"cg_damping": 1e-3}),
        (CATEGORICALS, {}),
    ],
    ids=["default", "ent_coef", "max_ratio", "cg_damping", "categorical"],
)
def test_with_one_agent_hatrpo_is_trpo(team, changed):
    """Parameter for parameter, whether the first, a later or no step of the line search is good enough.

    So is its first update with any momentum, and every update without. Alone, an agent has no M to cut.
    """
    settings = [(1e-5, 0.5), (1e-3, 0.5), (0.05, 0.5), (1.0, 0.7), (20.0, 0.9)]
    found = []
    for agent in team:
        for target_kl, accept_ratio in settings:
            problem = Problem(hatrpo, [agent])
            first = len(found) % 2 == 0
            if not first:
                problem.earlier_gradient = 1e4
            args = make_args(
                hatrpo,
                target_kl=target_kl,
                momentum=0.9 if first else 0.0,
                accept_ratio=accept_ratio,
                backtrack_iters=9,
                **changed,
            )
            # The step does not depend on A's size; relative to a large one, conjugate gradient's tolerance is nothing.
            problem.advantages *= 1e4
            args.ent_coef *= 1e4
            stats = stats_of(problem.update(args), 0)
            expected, j = trpo(problem, 0, problem.advantages, args)
            assert_equal(problem.actors, [expected], 1e-7)
            assert stats["accepted"] == (j is not None)
            assert stats["backtracks"] == (9 if j is None else j)
            found.append(j)
    assert None in found
    assert len(set(found)) >= 4


@each_split
@each_simultaneous
@each_team
def test_mappo_and_ippo_are_one_ppo_per_agent(script, num_minibatches, team, monkeypatch):
    """Every agent gets its advantages as they are, on the same minibatches, and its own clipping of the gradient."""
    problem = Problem(script, team)
    args = make_args(script, num_minibatches=num_minibatches, max_grad_norm=0.3)
    calls = record_calls(monkeypatch, problem)
    log = problem.update(args)
    for i in range(len(team)):
        minibatches = minibatches_of(calls, i)
        assert len(minibatches) == args.update_epochs * num_minibatches
        assert all(map(torch.equal, minibatches, minibatches_of(calls, 0)))
        A = problem.advantage(i)
        expected = ppo(problem, i, A, args, minibatches)
        assert_equal([problem.actors[i]], [expected])
        assert ((expected - problem.old[i]).abs() > 1e-3).any()
        assert_ppo_stats(log, problem, i, expected, A, args)


@each_split
def test_mappo_does_not_depend_on_the_order_of_the_agents(num_minibatches):
    """The agents in another order: the same parameters to the last bit."""
    args = make_args(mappo, num_minibatches=num_minibatches)
    one = Problem(mappo)
    one.update(args)
    for order in permutations(range(3)):
        other = Problem(mappo)
        other.update(args, agents=order)
        assert_equal(one.actors, thetas(other.actors), 0)


def shared_problem(script, seed=0):
    """Two agents that share one network."""
    problem = Problem(script, [Agent(4, 2), Agent(4, 2)], seed=seed)
    partition = Partition(
        obs_ids=(np.arange(2), np.arange(2)), act_ids=(np.arange(2), np.arange(2, 4))
    )
    policy = script.Policy(partition, 2, script.Args(hidden_sizes=HIDDEN, share_param=True))
    assert policy.actors[0] is policy.actors[1]
    set_theta(policy.actors[0], problem.old[0])
    problem.actors = list(policy.actors)
    problem.old[1] = problem.old[0]
    problem.draw()
    return problem


@each_clipping
@each_split
@pytest.mark.parametrize("max_grad_norm", [0.3, 1e3])
def test_shared_parameters_have_one_adam(script, num_minibatches, max_grad_norm, monkeypatch):
    """With one network for all: MAPPO steps on the sum of the agents' losses, HAPPO on one after the other's.

    The ratios are over the policies before any update, although one agent's update changes the others' policy.
    """
    problem = shared_problem(script)
    args = make_args(
        script, num_minibatches=num_minibatches, max_grad_norm=max_grad_norm, fixed_order=True
    )
    calls = record_calls(monkeypatch, problem)
    log = problem.update(args)
    theta = problem.old[0].clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=args.learning_rate, eps=1e-5, fused=False)
    norms = []
    M = [problem.advantage(0), problem.advantage(1)]
    for agents in ([0], [1]) if script is happo else ([0, 1],):
        minibatches = minibatches_of(calls, agents[0])
        assert len(minibatches) == args.update_epochs * num_minibatches
        for rows in minibatches:
            loss = sum(agent_loss(problem, i, theta, M[i], args, rows) for i in agents)
            norms.append(adam_step(adam, loss, max_grad_norm))
        for i in agents:
            assert_ppo_stats(log, problem, i, theta.detach(), M[i], args, 1e-5)
        if script is happo:
            M[1] = M[1] * problem.logratio(agents[0], theta.detach()).exp()
    # MAPPO and IPPO clip the shared gradient once for each agent, every time with PyTorch's 1e-6.
    assert_equal(problem.actors, [theta.detach()] * 2, 1e-7)
    assert (max(norms) > max_grad_norm) == (max_grad_norm < 1)
    if script is happo:
        assert log["losses/M_std"].item() == pytest.approx(M[1].std().item(), rel=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_shared_parameters_take_one_trust_region_step_after_the_other(seed, monkeypatch):
    """HATRPO: each step from where the last one ended, the ratios over the policies before any update."""
    problem = shared_problem(hatrpo, seed)
    problem.advantages *= 1e4
    args = make_args(hatrpo, fixed_order=True, ent_coef=0.0)
    calls = record_calls(monkeypatch, problem)
    log = problem.update(args)
    theta = problem.old[0]
    M = problem.advantages
    for i in range(2):
        torch.testing.assert_close(calls[i].M, M, rtol=1e-6, atol=1e-6)
        theta, j = trpo(problem, i, M, args, theta)
        assert j is not None
        M = M * problem.logratio(i, theta).exp()
    assert_equal(problem.actors, [theta] * 2, 1e-7)
    assert log["losses/M_std"].item() == pytest.approx(M.std().item(), rel=1e-6)


@pytest.mark.parametrize("agents", [1, 3])
def test_happo_without_clipping_follows_the_policy_gradient(agents):
    """One epoch of plain gradient descent, epsilon very large: each agent moves by the mean of M * grad log pi."""
    problem = Problem(happo, GAUSSIANS[:agents])
    args = make_args(
        happo,
        clip_coef=1e9,
        update_epochs=1,
        ent_coef=0.0,
        max_grad_norm=1e9,
        fixed_order=True,
    )
    problem.update(args, problem.optimizer(args, torch.optim.SGD, lr=0.5))
    M = problem.advantages
    for i in range(agents):
        theta = problem.old[i].clone().requires_grad_()
        logprob = problem.dist(i, theta).log_prob(problem.actions[i])
        gradient = torch.zeros_like(theta)
        for b in range(BATCH):
            gradient += M[b] * torch.autograd.grad(logprob[b], theta, retain_graph=True)[0] / BATCH
        assert_equal([problem.actors[i]], [problem.old[i] + 0.5 * gradient], 1e-11)
        M = M * problem.ratio(i)


def test_happo_with_unchanged_earlier_agents_is_mappo():
    """Where the agents before do not move, M stays A and the last agent's update is MAPPO's."""
    for last in range(3):
        args = make_args(happo, num_minibatches=1, fixed_order=True)
        one = Problem(happo)
        two = Problem(mappo)
        order = [i for i in range(3) if i != last] + [last]
        optimizer = torch.optim.Adam(one.actors[last].parameters(), lr=args.learning_rate, eps=1e-5)
        one.update(args, optimizer, agents=order)
        two.update(make_args(mappo, num_minibatches=1))
        assert_equal([one.actors[last]], [theta_of(two.actors[last])], 1e-11)
        assert_equal([one.actors[i] for i in order[:-1]], [one.old[i] for i in order[:-1]], 0)


# The factor M


@each_split
@each_team
@pytest.mark.parametrize("seed", range(4))
def test_happo_is_one_ppo_after_the_other_on_M(num_minibatches, team, seed, monkeypatch):
    """From scratch, agent by agent in the order taken: PPO on M, M times the agent's own ratio, the next agent."""
    problem = Problem(happo, team)
    args = make_args(
        happo,
        num_minibatches=num_minibatches,
        max_grad_norm=0.5,
        learning_rate=0.02,
    )
    calls = record_calls(monkeypatch, problem)
    log = problem.update(args, seed=seed)
    order = order_of(calls)
    assert sorted(order) == list(range(len(team)))
    M = problem.advantages
    logratios = []
    for i in order:
        own = [call for call in calls if call.agent == i]
        calls = calls[len(own) :]
        assert not any(call.agent == i for call in calls)
        minibatches = minibatches_of(own, i)
        assert len(minibatches) == args.update_epochs * num_minibatches
        for call in own:
            torch.testing.assert_close(call.M, M[call.rows], rtol=1e-9, atol=1e-9)

        theta = ppo(problem, i, M, args, minibatches)
        assert_equal([problem.actors[i]], [theta], 1e-8)
        assert_ppo_stats(log, problem, i, theta, M, args)
        logratios.append(problem.logratio(i, theta))
        M = M * logratios[-1].exp()
    assert not calls
    assert log["losses/M_std"].item() == pytest.approx(M.std().item(), rel=1e-8)
    assert log["losses/joint_kl"].item() == pytest.approx(k3(sum(logratios)), rel=1e-8)


@each_team
@pytest.mark.parametrize("seed", range(4))
def test_hatrpo_is_one_trpo_after_the_other_on_M(team, seed, monkeypatch):
    """From scratch, agent by agent in the order taken: TRPO on M, M times the agent's own ratio, the next agent."""
    problem = Problem(hatrpo, team)
    problem.advantages *= 1e4
    args = make_args(hatrpo, target_kl=0.01, ent_coef=0.0)
    calls = record_calls(monkeypatch, problem)
    log = problem.update(args, seed=seed)
    assert sorted(call.agent for call in calls) == list(range(len(team)))
    M = problem.advantages
    logratios = []
    for i, rows, got in calls:
        assert torch.equal(rows, torch.arange(BATCH))
        torch.testing.assert_close(got, M, rtol=1e-6, atol=1e-6)
        theta, j = trpo(problem, i, M, args)
        assert_equal([problem.actors[i]], [theta], 1e-7)
        before = problem.dist(i, problem.old[i])
        kl = before.kl(problem.dist(i, theta)).mean().item()
        logratios.append(problem.logratio(i, theta))
        gain = ((logratios[-1].exp() - 1) * M).mean().item()
        stats = stats_of(log, i)
        assert stats["accepted"] == 1
        assert stats["backtracks"] == j
        assert stats["surrogate_gain"].item() == pytest.approx(gain, rel=1e-6)
        assert gain > 0
        assert stats["kl"].item() == pytest.approx(kl, rel=1e-6)
        assert 0 < kl <= args.target_kl
        assert stats["entropy"].item() == pytest.approx(before.entropy().mean().item(), rel=1e-9)
        M = M * logratios[-1].exp()
    assert log["losses/M_std"].item() == pytest.approx(M.std().item(), rel=1e-6)
    assert log["losses/joint_kl"].item() == pytest.approx(k3(sum(logratios)), rel=1e-6)


@each_sequential
@pytest.mark.parametrize("agents", [1, 2, 3])
@pytest.mark.parametrize("fixed_order", [False, True])
def test_M_is_A_times_the_ratio_of_the_joint_policies_so_far(
    script, agents, fixed_order, monkeypatch
):
    """For every prefix i_1..i_m of the order, from the policies before and after; at the end, of all the agents."""
    problem = Problem(script)
    args = make_args(script, fixed_order=fixed_order)
    calls = record_calls(monkeypatch, problem)
    log = problem.update(args, agents=range(agents), seed=5)
    order = order_of(calls)
    assert sorted(order) == list(range(agents))
    ratios = torch.stack([problem.ratio(i) for i in range(3)])
    for i in range(3):
        if i in order:
            assert (ratios[i] - 1).abs().max() > 0.1
        else:
            assert (ratios[i] == 1).all()
    for i, rows, got in calls:
        before = order[: order.index(i)]
        M = problem.advantages * ratios[before].prod(0)
        torch.testing.assert_close(got, M[rows], rtol=1e-10, atol=1e-12)
    M = problem.advantages * ratios.prod(0)
    assert log["losses/M_std"].item() == pytest.approx(M.std().item(), rel=1e-10)


@each_sequential
def test_M_is_not_normalised_and_not_clipped(script, monkeypatch):
    """A has a mean and a size of its own, ratios go far beyond the clipping: M keeps all of it."""
    problem = Problem(script, seed=2)
    problem.advantages = 10 + 50 * problem.advantages
    args = make_args(script, learning_rate=0.1, update_epochs=10, target_kl=0.2)
    calls = record_calls(monkeypatch, problem)
    log = problem.update(args)
    *earlier, _ = order_of(calls)
    ratios = torch.stack([problem.ratio(i) for i in range(3)])
    got = calls[-1].M / problem.advantages
    assert got.max() > 1.5
    assert got.min() < 0.5
    torch.testing.assert_close(got, ratios[earlier].prod(0), rtol=1e-9, atol=1e-12)
    M = problem.advantages * ratios.prod(0)
    assert log["losses/M_std"].item() == pytest.approx(M.std().item(), rel=1e-9)


@pytest.mark.parametrize("max_ratio", [0.8, 1.3, 2.0])
def test_hatrpo_counts_the_joint_ratio_up_to_its_largest(max_ratio, monkeypatch):
    """M = A min(R, c), R the ratio of the joint policies of all agents so far: not each agent's ratio is cut.

    The first agent gets A as it is, and so does every row whose R is within the bound: there M is exact.
    """
    problem = Problem(hatrpo, batch=300, seed=2)
    calls = record_calls(monkeypatch, problem)
    log = problem.update(make_args(hatrpo, target_kl=0.2, max_ratio=max_ratio))
    order = order_of(calls)
    ratios = torch.stack([problem.ratio(i) for i in range(3)]).numpy()
    A = problem.advantages.numpy()
    assert torch.equal(calls[0].M, problem.advantages)
    rows = Counter()
    for m in (1, 2, 3):
        R = ratios[order[:m]].prod(0)
        cut = max_ratio < R
        expected = A * np.where(cut, max_ratio, R)
        rows["cut"] += cut.sum()
        rows["exact"] += (~cut).sum()
        rows["one agent's ratio is larger"] += (~cut & (ratios[order[:m]].max(0) > max_ratio)).sum()
        if m < 3:
            np.testing.assert_allclose(calls[m].M.numpy(), expected, rtol=1e-10)
        else:
            assert log["losses/M_std"].item() == pytest.approx(np.std(expected, ddof=1), rel=1e-10)
    assert min(rows.values()) > 0 and len(rows) == 3
    assert log["losses/joint_kl"].item() == pytest.approx((R - 1 - np.log(R)).mean(), rel=1e-8)


def test_happo_takes_the_mean_of_the_batch_from_M(monkeypatch):
    """Of the whole batch, not of a minibatch, and only once; the first agent gets A with its mean."""
    problem = Problem(happo, batch=300, seed=2)
    problem.advantages += 0.7
    calls = record_calls(monkeypatch, problem)
    problem.update(make_args(happo, num_minibatches=4, keep_mean=False))
    order = order_of(calls)
    ratios = torch.stack([problem.ratio(i) for i in range(3)]).numpy()
    A = problem.advantages.numpy()
    expected = {order[0]: A}
    for m in (1, 2):
        exact = A * ratios[order[:m]].prod(0)
        assert exact.mean() > 0.1
        expected[order[m]] = exact - exact.mean()
    for i, rows, M in calls:
        np.testing.assert_allclose(M.numpy(), expected[i][rows.numpy()], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_minibatches", [1, 2, 5, 32])
def test_M_of_agents_that_stay_is_A_to_the_last_bit(num_minibatches, monkeypatch):
    """HAPPO without a learning rate: M is A, however the batch is split."""
    problem = Problem(happo)
    args = make_args(happo, num_minibatches=num_minibatches, learning_rate=0.0)
    calls = record_calls(monkeypatch, problem)
    log = problem.update(args)
    assert_equal(problem.actors, problem.old, 0)
    assert len(order_of(calls)) == 3
    assert all(torch.equal(M, problem.advantages[rows]) for _, rows, M in calls)
    assert log["losses/M_std"] == problem.advantages.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_team
def test_rejected_steps_leave_M_and_the_parameters_to_the_last_bit(dtype, team, monkeypatch):
    """HATRPO asked for more gain than there can be: M is A, nothing has moved, KL and gain are 0."""
    problem = Problem(hatrpo, team)
    args = make_args(hatrpo, accept_ratio=1e6)
    for actor in problem.actors:
        actor.to(dtype)
    old = thetas(problem.actors)
    problem.obs = [obs.to(dtype) for obs in problem.obs]
    problem.actions = [a.to(dtype) if a.is_floating_point() else a for a in problem.actions]
    problem.advantages = problem.advantages.to(dtype)
    calls = record_calls(monkeypatch, problem)
    log = problem.update(args)
    assert len(calls) == len(team)
    assert all(torch.equal(M, problem.advantages) for _, _, M in calls)
    assert log["losses/M_std"] == problem.advantages.std()
    assert all(map(torch.equal, thetas(problem.actors), old))
    for i in range(len(team)):
        stats = stats_of(log, i)
        assert stats["accepted"] == stats["kl"] == stats["surrogate_gain"] == 0


@each_team
def test_zero_advantages_change_nothing(script, team, monkeypatch):
    """No NaN, no step, M stays 0."""
    problem = Problem(script, team)
    problem.advantages = torch.zeros_like(problem.advantages)
    calls = record_calls(monkeypatch, problem)
    log = problem.update(make_args(script, ent_coef=0.0))
    assert_equal(problem.actors, problem.old, 0)
    assert len(order_of(calls)) == len(team)
    assert all((call.M == 0).all() for call in calls)
    assert all(stats_of(log, i) for i in range(len(team)))
    assert all(np.isfinite(float(value)) for value in log.values())
    assert log.get("losses/M_std", 0) == 0


# The order of the agents


def orders_taken(script, monkeypatch, updates, fixed_order, agents):
    """The orders of many updates in which nothing is computed."""
    problem = Problem(script, [Agent(1, 1)] * agents, batch=2)

    def do_nothing(actor, *_):
        if script is hatrpo:
            return torch.zeros(2), {"slope": 0.0}
        return actor.log_std.sum() * 0, torch.zeros(2), {}

    monkeypatch.setattr(script, "trpo_step" if script is hatrpo else "ppo_loss", do_nothing)
    calls = record_calls(monkeypatch, problem)
    args = make_args(script, update_epochs=1, fixed_order=fixed_order)
    optimizer = None if script is hatrpo else problem.optimizer(args, torch.optim.SGD, lr=0.0)
    taken = []
    for seed in range(updates):
        problem.update(args, optimizer, seed)
        taken.append(tuple(order_of(calls)))
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
def test_critic_update_is_least_squares(script, num_minibatches, max_grad_norm):
    """From scratch: several epochs of Adam on half the mean squared error, parameter for parameter."""
    torch.manual_seed(3)
    critic = script.mlp((4, *HIDDEN, 1), 1.0)
    obs = torch.randn(BATCH, 4)
    returns = 3 * torch.randn(BATCH)
    args = make_args(script, num_minibatches=num_minibatches, max_grad_norm=max_grad_norm)
    theta = theta_of(critic).requires_grad_()
    calls = record_rows(critic, obs)
    optimizer = torch.optim.Adam(
        critic.parameters(), lr=args.critic_learning_rate, eps=1e-5, fused=True
    )
    loss = script.critic_update(critic, optimizer, obs, returns, args)
    *minibatches, _ = calls
    assert len(minibatches) == 2 * num_minibatches

    def half_mse(rows):
        values = mlp(theta, obs[rows], (*HIDDEN, 1))[:, 0]
        squares = [(v - r) ** 2 for v, r in zip(values, returns[rows])]
        return sum(squares) / (2 * len(squares))

    adam = torch.optim.Adam([theta], lr=args.critic_learning_rate, eps=1e-5, fused=False)
    for rows in minibatches:
        norm = adam_step(adam, half_mse(rows), max_grad_norm)
        assert (norm > max_grad_norm) == (max_grad_norm < 1)
    assert_equal([critic], [theta.detach()])
    assert loss.item() == pytest.approx(half_mse(slice(None)).item(), rel=1e-9)
    assert not loss.requires_grad


# Another forward


def test_another_forward_is_another_policy(script):
    """An Actor with another `forward`, which leaves `log_std` unused, moves as the same network alone."""

    class DiscreteActor(script.Actor):
        def forward(self, obs):
            return Categorical(logits=self.net(obs))

    args = make_args(script)
    problem = Problem(script, CATEGORICALS)
    before = [theta_of(actor) for actor in problem.actors]
    others = []
    for agent, actor in zip(CATEGORICALS, problem.actors):
        other = DiscreteActor(agent.obs_dim, agent.act_dim, args)
        sizes = (agent.obs_dim, *HIDDEN, agent.act_dim)
        other.net = script.mlp(sizes, 0.01)
        other.net.load_state_dict(actor.net.state_dict())
        others.append(other)
    problem.update(args)
    expected = [theta_of(actor) for actor in problem.actors]
    problem.actors = others
    problem.update(args)
    for old, new, other in zip(before, expected, others):
        assert not torch.equal(old, new)
        torch.testing.assert_close(theta_of(other.net), new, rtol=0, atol=1e-6)
        assert (other.log_std == args.log_std_init).all()
