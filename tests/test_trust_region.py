"""HATRPO's trust region: Fisher matrix, conjugate gradient, and the step with its line search."""

import itertools
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import set_theta, theta_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    kl_divergence,
    register_kl,
)
from torch.func import functional_call

import hatrpo_mamujoco as hatrpo

pytestmark = pytest.mark.usefixtures("float64")


class Discrete(nn.Module):
    """A policy that chooses one of three settings for each actuator."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.net = hatrpo.mlp((obs_dim, *args.hidden_sizes, 3 * act_dim), 1.0)

    def forward(self, obs):
        logits = self.net(obs).view(len(obs), -1, 3)
        return Independent(Categorical(logits=logits, validate_args=False), 1, validate_args=False)


def make_actor(seed, kind=hatrpo.Actor, obs_dim=3, act_dim=2, hidden_sizes=(5, 4)):
    """An actor with all parameters random."""
    actor = kind(obs_dim, act_dim, hatrpo.Args(hidden_sizes=hidden_sizes))
    return randomize(actor, seed)


def randomize(actor, seed):
    """Draw all the parameters anew."""
    generator = torch.Generator().manual_seed(seed)
    set_theta(actor, 0.6 * torch.randn(len(theta_of(actor)), generator=generator))
    return actor


class Batch(NamedTuple):
    """Observations, actions drawn by an actor, their log-probabilities and weights M."""

    obs: Tensor
    actions: Tensor
    logprobs: Tensor
    M: Tensor


def make_batch(actor, seed, size=16):
    """A batch of an actor with random M."""
    torch.manual_seed(seed)
    obs = torch.randn(size, actor.net[0].in_features)
    with torch.no_grad():
        dist = actor(obs)
        actions = dist.sample()
        return Batch(obs, actions, dist.log_prob(actions), torch.randn(size))


def dist_at(actor, obs, theta):
    """The distribution of an actor with the parameters theta, differentiable in theta."""
    parameters = {}
    for name, parameter in actor.named_parameters():
        values, theta = theta.tensor_split([parameter.numel()])
        parameters[name] = values.view_as(parameter)
    assert len(theta) == 0
    return functional_call(actor, parameters, (obs,))


def k3(logratio):
    """KL(old || new) as a batch shows it, from log(new / old) of its rows."""
    ratio = logratio.exp()
    return (ratio - 1 - ratio.log()).mean()


def fisher_matrix(actor, obs):
    """The explicit Hessian of the mean KL(pi_old || pi) at pi_old."""
    theta = theta_of(actor)
    old = dist_at(actor, obs, theta)
    return hessian(lambda new: kl_divergence(old, dist_at(actor, obs, new)).mean(), theta)


def objective(dist, batch, ent_coef):
    """The surrogate that one agent's step is to raise."""
    ratio = (dist.log_prob(batch.actions) - batch.logprobs).exp()
    return (ratio * batch.M).mean() + ent_coef * dist.entropy().mean()


def matrix_of(product, dim):
    """The matrix of a linear map."""
    return torch.stack([product(e) for e in torch.eye(dim)], dim=1).detach()


def make_args(**changed):
    """Every setting that a step reads; without changes conjugate gradient converges here."""
    args = hatrpo.Args()
    args.cg_iters = 200
    args.cg_damping = 0.1
    for name, value in changed.items():
        setattr(args, name, value)  # also out of range
    return args


# Fisher matrix

ACTORS = {
    "two hidden layers": {},
    "one hidden layer": {"hidden_sizes": (6,), "obs_dim": 2, "act_dim": 3},
    "one actuator": {"act_dim": 1, "obs_dim": 4},
    "categorical": {"kind": Discrete},
    "categorical, one actuator": {"kind": Discrete, "act_dim": 1, "hidden_sizes": (4,)},
}
each_actor = pytest.mark.parametrize("sizes", ACTORS.values(), ids=ACTORS)


@each_actor
def test_fisher_vector_product_is_the_hessian_of_the_mean_kl(sizes):
    """Equal to the explicit Hessian in every entry; symmetric and positive semi-definite."""
    for seed in range(3):
        actor = make_actor(seed, **sizes)
        obs = make_batch(actor, seed).obs
        before = theta_of(actor)
        expected = fisher_matrix(actor, obs)
        H = matrix_of(hatrpo.fisher_vector_product(actor, obs), len(expected))
        torch.testing.assert_close(H, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(H, H.T, rtol=1e-10, atol=1e-12)
        eigenvalues = torch.linalg.eigvalsh(H)
        assert eigenvalues.min() > -1e-12 * eigenvalues.max()
        assert eigenvalues.max() > 1e-3
        assert torch.equal(theta_of(actor), before)


@each_actor
def test_fisher_vector_product_is_gauss_newton(sizes):
    """By hand: J^T F J, with J the Jacobian of what the network says and F that distribution's Fisher matrix.

    F of a Gaussian is diag(1 / sigma^2) in the mean and 2 in log_std, of a Categorical diag(p) - p p^T.
    """
    actor = make_actor(7, **sizes)
    obs = make_batch(actor, 7).obs
    theta = theta_of(actor)
    dist = actor(obs)
    H = matrix_of(hatrpo.fisher_vector_product(actor, obs), len(theta))
    if isinstance(actor, Discrete):
        J = jacobian(lambda new: dist_at(actor, obs, new).base_dist.logits, theta)
        p = dist.base_dist.probs.detach()
        fisher = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
        expected = torch.einsum("bkci,bkcd,bkdj->ij", J, fisher, J)
    else:
        J = jacobian(lambda new: dist_at(actor, obs, new).mean, theta)
        precision = dist.stddev.detach() ** -2
        expected = torch.einsum("bki,bk,bkj->ij", J, precision, J)
        act_dim = len(actor.log_std)  # log_std comes first in theta
        expected[:act_dim, :act_dim] += 2 * len(obs) * torch.eye(act_dim)
    torch.testing.assert_close(H, expected / len(obs), rtol=1e-10, atol=1e-12)


def test_log_std_is_in_the_trust_region():
    """The second derivative of a Gaussian's KL in log_std is 2, and does not depend on the mean."""
    actor = make_actor(0, act_dim=3)
    obs = make_batch(actor, 0).obs
    H = matrix_of(hatrpo.fisher_vector_product(actor, obs), len(theta_of(actor)))
    torch.testing.assert_close(H[:3, :3], 2 * torch.eye(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(H[:3, 3:], torch.zeros_like(H[:3, 3:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [hatrpo.Actor, Discrete])
def test_flat_gradient_is_in_the_order_of_the_parameters(kind):
    """The gradient of the entropy and a log-probability, by differences of theta."""
    actor = make_actor(1, kind)
    batch = make_batch(actor, 1)

    def value(theta):
        return objective(dist_at(actor, batch.obs, theta), batch, 0.3).item()

    got = hatrpo.flat_gradient(objective(actor(batch.obs), batch, 0.3), actor)
    theta = theta_of(actor)
    expected = []
    for e in 1e-6 * torch.eye(len(theta)):
        expected.append((value(theta + e) - value(theta - e)) / 2e-6)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-8)


# Conjugate gradient


def spd_system(rng, n):
    """A symmetric positive definite matrix of condition number up to 100, and a right-hand side."""
    Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return torch.tensor((Q * 10 ** rng.uniform(-1, 1, n)) @ Q.T), torch.tensor(rng.normal(size=n))


def damped(A, b, damping):
    """A + c I: c is a fraction of the curvature of A along b."""
    return A + damping * (b @ A @ b) / (b @ b) * torch.eye(len(b))


def krylov_solution(A, b, damping, k):
    """The minimum of x^T (A + c I) x / 2 - b^T x over the span of b, Ab, .., A^(k-1) b."""
    if k == 0:
        return torch.zeros_like(b)
    powers = [torch.linalg.matrix_power(A, p) @ b for p in range(k)]
    K, _ = torch.linalg.qr(torch.stack(powers, 1))
    return K @ torch.linalg.solve(K.T @ damped(A, b, damping) @ K, K.T @ b)


class Counted:
    """The map v -> Av, which counts its calls."""

    def __init__(self, A):
        self.A = A
        self.calls = 0

    def __call__(self, v):
        self.calls += 1
        return self.A @ v


def test_conjugate_gradient_solves_positive_definite_systems():
    """Against torch.linalg.solve, damped or not; the larger b is, the smaller the relative residual."""
    rng = np.random.default_rng(0)
    for n in [*range(1, 12), 40]:
        for damping in (0.0, 0.037, 1.0, 10.0):
            A, b = spd_system(rng, n)
            b = 1e6 * b
            x, Ax = hatrpo.conjugate_gradient(Counted(A), b, damping, 10 * n)
            expected = torch.linalg.solve(damped(A, b, damping), b)
            torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-4)
            torch.testing.assert_close(Ax, A @ expected, rtol=1e-8, atol=1e-4)


def test_conjugate_gradient_stops_at_a_small_residual():
    """After the first k products for which |(A + c I) x - b|^2 is below 1e-10, and not before."""
    rng = np.random.default_rng(2)
    stopped = set()
    for damping in (0.0, 0.37, 3.0):
        for scale in (1e-6, 1e-3, 1.0):
            A, b = spd_system(rng, 8)
            b = scale * b
            for k in range(8):
                x = krylov_solution(A, b, damping, k)
                if (damped(A, b, damping) @ x - b).square().sum() < 1e-10:
                    break
            else:
                continue
            H = Counted(A)
            x, Ax = hatrpo.conjugate_gradient(H, b, damping, 80)
            assert H.calls == k
            assert (damped(A, b, damping) @ x - b).square().sum() < 1e-10
            torch.testing.assert_close(Ax, A @ x, rtol=1e-9, atol=1e-12)
            stopped.add(k)
    assert len(stopped) >= 3


def test_conjugate_gradient_after_k_iterations_is_the_best_in_the_krylov_space():
    """After k products with A, neither more nor less."""
    rng = np.random.default_rng(1)
    for k, damping in itertools.product(range(6), (0.0, 0.37)):
        A, b = spd_system(rng, 8)
        H = Counted(A)
        x, Ax = hatrpo.conjugate_gradient(H, b, damping, k)
        expected = krylov_solution(A, b, damping, k)
        torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(Ax, A @ expected, rtol=1e-8, atol=1e-9)
        assert H.calls == k


def test_conjugate_gradient_by_hand():
    """Three times the identity along which c is 3 too: b / 6 after one product."""
    H = Counted(3 * torch.eye(3))
    x, Hx = hatrpo.conjugate_gradient(H, torch.tensor([6.0, 12.0, -6.0]), 1.0, 10)
    assert x.tolist() == [1, 2, -1]
    assert Hx.tolist() == [3, 6, -3]
    assert H.calls == 1


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_conjugate_gradient_of_zero_is_zero(damping):
    """No gradient, no step, no NaN, whatever the matrix."""
    for A in (torch.eye(3), torch.zeros(3, 3)):
        H = Counted(A)
        x, Hx = hatrpo.conjugate_gradient(H, torch.zeros(3), damping, 10)
        assert torch.equal(x, torch.zeros(3))
        assert torch.equal(Hx, torch.zeros(3))
        assert H.calls == 0


# Line search: a policy whose one parameter is the share of the full step that is tried, and whose
# gain, KL and log-ratios are given functions of that share.


class Dial(nn.Module):
    """The policy. The full step of `trpo_step` with radius `delta` is 1."""

    def __init__(self, gain, kl, logratio, slope, delta):
        super().__init__()
        self.share = nn.Parameter(torch.zeros(1))
        self.gain = gain
        self.kl = kl
        self.logratio = logratio
        self.slope = slope
        self.delta = delta

    def forward(self, obs):
        return Dialled(self)


class Dialled(Distribution):
    """What a `Dial` returns: the gain is one of its entropy, the weights M are 0."""

    arg_constraints = {}  # noqa: RUF012 (as in torch.distributions)

    def __init__(self, dial):
        super().__init__(validate_args=False)
        self.dial = dial
        self.share = dial.share

    def entropy(self):
        if self.share == 0:
            return self.dial.slope * self.share  # what the gradient sees
        return torch.tensor([float(self.dial.gain(self.share.item()))])

    def log_prob(self, actions):
        return torch.tensor(self.dial.logratio(self.share.item()))


@register_kl(Dialled, Dialled)
def kl_of_dials(old, new):
    """The KL of the share that is tried; at 0 with the curvature that makes the full step 1."""
    assert old.share == 0
    if new.share == 0:
        return old.dial.delta * (new.share - old.share) ** 2
    return torch.tensor([float(new.dial.kl(new.share.item()))])


def nothing(share):
    """A KL of 0, or no gain."""
    return 0.0


def all_of_it(share):
    """A gain as the gradient predicts it."""
    return share


def search(
    gain,
    kl,
    *,
    expected_gain=1.0,
    delta=0.5,
    coeff=0.5,
    iters=10,
    accept_ratio=0.5,
    logratio=lambda share: [0.0, 0.0],
    earlier_gradients=0.0,
):
    """Take a step with a `Dial`; check what it tried, kept and reported; return j, or None."""
    tried = []

    def recorded_kl(share):
        tried.append(share)
        return kl(share)

    dial = Dial(gain, recorded_kl, logratio, expected_gain, delta)
    args = make_args(backtrack_coeff=coeff, backtrack_iters=iters, accept_ratio=accept_ratio)
    args.target_kl = delta
    args.cg_damping = 0.0
    args.ent_coef = 1.0
    args.momentum = 0.5
    rows = torch.zeros(2)
    region = hatrpo.TrustRegion([dial], args)
    region.gradient_sums[0].fill_(earlier_gradients)
    region.last_steps[0].fill_(7.0)
    new_logratio, stats = hatrpo.trpo_step(dial, rows, rows, rows, rows, region, 0, args)
    gradient_sum = region.gradient_sums[0].item()
    assert gradient_sum == pytest.approx(0.5 * earlier_gradients + expected_gain)
    assert stats["slope"].item() == pytest.approx(7 * expected_gain)
    assert region.last_steps[0].item() == pytest.approx(dial.share.item())
    assert region.delta.item() == pytest.approx(delta)
    assert tried == pytest.approx([coeff**j for j in range(len(tried))])
    assert stats["expected_gain"].item() == pytest.approx(expected_gain)
    share = dial.share.item()
    assert new_logratio.tolist() == logratio(share)
    if stats["accepted"] == 0:
        assert len(tried) == iters + 1
        assert stats["backtracks"] == iters
        assert share == 0
        assert stats["surrogate_gain"] == 0
        assert stats["kl"] == 0
        return None
    assert stats["accepted"] == 1
    assert stats["backtracks"] == len(tried) - 1
    assert share == tried[-1]
    assert stats["surrogate_gain"].item() == gain(share)
    assert stats["kl"].item() == kl(share)
    return stats["backtracks"]


def test_line_search_finds_the_smallest_j():
    """The first step, a middle one, backtrack_iters itself, and none."""
    assert search(all_of_it, nothing) == 0
    assert search(all_of_it, lambda a: 2 * a**2) == 1
    assert search(all_of_it, lambda a: 0.5 * 1024 * a) == 10
    assert search(all_of_it, lambda a: 0.5 * 1025 * a) is None
    assert search(all_of_it, nothing, iters=0) == 0
    assert search(all_of_it, lambda a: a, iters=0) is None
    assert search(all_of_it, lambda a: a, iters=1) == 1
    # Good, bad and good again: the first one is taken.
    assert search(all_of_it, lambda a: 1.0 if a > 0.5 or a == 0.25 else 0.0) == 1


def test_line_search_tests_the_kl():
    """A KL of exactly the radius is inside, at every j; the gain alone does not help."""
    assert search(all_of_it, lambda a: 0.5 * a) == 0
    assert search(all_of_it, lambda a: 0.5000001 * a) == 1
    assert search(all_of_it, lambda a: 2.000001 * a**2) == 2
    assert search(all_of_it, lambda a: 0.6, iters=3) is None


def test_line_search_tests_the_gain():
    """At least accept_ratio of what the gradient predicts for a step of this length, not of the full one."""
    assert search(lambda a: 0.5 * a, nothing) == 0
    assert search(lambda a: 0.4999999 * a, nothing) is None
    assert search(lambda a: -a, nothing) is None
    assert search(lambda a: a - 4 * a**2, nothing) == 3  # a - 4 a^2 >= a / 2 from a = 1 / 8 on
    assert search(lambda a: 0.9 * a, nothing, accept_ratio=0.9) == 0
    assert search(lambda a: 0.8 * a, nothing, accept_ratio=0.9) is None
    assert search(lambda a: 2.0 * a, nothing, expected_gain=4.0) == 0
    assert search(lambda a: 1.9 * a, nothing, expected_gain=4.0) is None


@pytest.mark.parametrize("accept_ratio", [0.0, 0.5])
def test_a_gain_of_0_is_never_accepted(accept_ratio):
    """Not even where any gain would be enough."""
    assert search(nothing, nothing, accept_ratio=accept_ratio) is None
    assert search(lambda a: 0.0 if a > 0.2 else a, nothing, accept_ratio=accept_ratio) == 3
    assert search(lambda a: 1e-9 * a, nothing, accept_ratio=0.0) == 0
    assert search(lambda a: -1e-9 * a, nothing, accept_ratio=0.0) is None


def test_the_gain_is_that_of_this_batch():
    """Earlier gradients may turn the step against this batch's own gradient: then it is not taken.

    The step of a `Dial` has the length 1, whatever the size of the sum; here the sum's sign is the other one.
    """
    tried = []

    def gain(share):
        tried.append(share)
        return share

    dial = Dial(gain, nothing, lambda share: [0.0, 0.0], 1.0, 0.5)
    args = make_args(cg_damping=0.0, ent_coef=1.0, target_kl=0.5, momentum=0.9, backtrack_iters=2)
    args.backtrack_coeff = 0.5
    rows = torch.zeros(2)
    region = hatrpo.TrustRegion([dial], args)
    region.gradient_sums[0].fill_(-10.0)
    region.last_steps[0].fill_(-2.0)
    _, stats = hatrpo.trpo_step(dial, rows, rows, rows, rows, region, 0, args)
    assert tried == pytest.approx([-1.0, -0.5, -0.25])
    assert stats["expected_gain"].item() == pytest.approx(-1.0)
    assert stats["slope"].item() == pytest.approx(-2.0)
    assert stats["grad_norm"].item() == pytest.approx(1.0)
    assert stats["accepted"] == 0
    assert dial.share.item() == 0
    assert region.last_steps[0].item() == 0
    assert region.gradient_sums[0].item() == pytest.approx(-8.0)  # 0.9 times -10, plus 1
    # Where they point the same way, their size does not matter.
    assert search(all_of_it, nothing, earlier_gradients=100.0) == 0
    assert search(lambda a: 0.4999999 * a, nothing, earlier_gradients=100.0) is None


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    slope=st.floats(0.01, 100),
    curvature=st.floats(0, 1000),
    kl_curvature=st.floats(1e-4, 100),
    delta=st.floats(1e-4, 1),
    coeff=st.floats(0.1, 0.95),
    iters=st.integers(0, 20),
    accept_ratio=st.floats(0.05, 0.95),
)
def test_line_search_on_quadratic_models(
    slope, curvature, kl_curvature, delta, coeff, iters, accept_ratio
):
    """gain = s a - c a^2, KL = k a^2: the first alpha^j below min((1 - kappa) s / c, sqrt(delta / k))."""
    largest = math.sqrt(delta / kl_curvature)
    if curvature > 0:
        largest = min(largest, (1 - accept_ratio) * slope / curvature)
    j = max(0.0, math.log(largest) / math.log(coeff))
    assume(abs(j - round(j)) > 1e-6 or (j == 0 and largest > 1 + 1e-6))
    found = search(
        lambda a: slope * a - curvature * a**2,
        lambda a: kl_curvature * a**2,
        expected_gain=slope,
        delta=delta,
        coeff=coeff,
        iters=iters,
        accept_ratio=accept_ratio,
    )
    assert found == (math.ceil(j) if math.ceil(j) <= iters else None)


def test_line_search_never_accepts_what_is_not_finite():
    """A NaN in the gain, the KL or the ratios is a rejection, at every j; so is an infinite KL."""
    nan = math.nan

    def bad_ratios(value):
        return lambda share: [value, 0.0] if share > 0.2 else [0.0, 0.0]

    for bad in (nan, -math.inf):
        assert search(lambda a, bad=bad: bad, nothing) is None
        assert search(lambda a, bad=bad: bad if a > 0.2 else a, nothing) == 3
        assert search(all_of_it, lambda a, bad=bad: abs(bad)) is None
        assert search(all_of_it, lambda a, bad=bad: abs(bad) if a > 0.2 else 0.0) == 3
    assert search(lambda a: nan, lambda a: nan) is None
    assert search(all_of_it, nothing, logratio=bad_ratios(nan)) == 3
    assert search(all_of_it, nothing, logratio=bad_ratios(math.inf)) == 3


# The step


class Expected(NamedTuple):
    """What a step does, computed otherwise."""

    theta: Tensor
    logratio: Tensor
    stats: dict[str, float]


def gradient_of(actor, batch, args):
    """The gradient of the surrogate at the actor's parameters."""

    def objective_at(theta):
        return objective(dist_at(actor, batch.obs, theta), batch, args.ent_coef)

    return jacobian(objective_at, theta_of(actor))


def expected_step(actor, batch, gradient_sum, last_step, delta, args):
    """A trust-region step with the explicit Fisher matrix; all candidates are tried, the longest good one is kept.

    `gradient_sum` is the decaying sum of the gradients, this batch's included.
    """
    theta = theta_of(actor)
    old = dist_at(actor, batch.obs, theta)
    old_objective = objective(old, batch, args.ent_coef)
    gradient = gradient_of(actor, batch, args)
    H = fisher_matrix(actor, batch.obs)
    if args.cg_iters < 10:
        x = krylov_solution(H, gradient_sum, args.cg_damping, args.cg_iters)
    else:
        x = torch.linalg.solve(damped(H, gradient_sum, args.cg_damping), gradient_sum)
    step = x * torch.sqrt(2 * delta / (x @ H @ x))
    assert 0.5 * step @ H @ step == pytest.approx(delta, rel=1e-9)
    expected_gain = (step @ gradient).item()
    stats = {
        "policy_loss": -old_objective.item(),
        "entropy": old.entropy().mean().item(),
        "grad_norm": gradient.square().sum().sqrt().item(),
        "expected_gain": expected_gain,
        "slope": (last_step @ gradient).item(),
        "accepted": 0,
        "backtracks": args.backtrack_iters,
        "surrogate_gain": 0.0,
        "kl": 0.0,
    }
    kept = theta
    for j in reversed(range(args.backtrack_iters + 1)):
        scale = args.backtrack_coeff**j
        candidate = theta + scale * step
        dist = dist_at(actor, batch.obs, candidate)
        gain = (objective(dist, batch, args.ent_coef) - old_objective).item()
        kl = kl_divergence(old, dist).mean().item()
        if gain > 0 and gain >= args.accept_ratio * scale * expected_gain and kl <= delta:
            kept = candidate
            stats |= {"accepted": 1, "backtracks": j, "surrogate_gain": gain, "kl": kl}
    logratio = dist_at(actor, batch.obs, kept).log_prob(batch.actions) - batch.logprobs
    return Expected(kept, logratio, stats)


@pytest.mark.parametrize("kind", [hatrpo.Actor, Discrete])
@pytest.mark.parametrize("cg_iters", [2, 200])
@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_step_by_the_explicit_fisher_matrix(kind, cg_iters, ent_coef):
    """Gradient, damped natural gradient, length, line search, what is kept and what is logged."""
    backtracks = set()
    for seed in range(6):
        actor = make_actor(seed, kind)
        batch = make_batch(actor, seed)
        # The step does not depend on the size of the objective; relative to it conjugate gradient is exact.
        batch = batch._replace(M=1e4 * batch.M)
        args = make_args(ent_coef=1e4 * ent_coef, cg_iters=cg_iters, cg_damping=0.37)
        args.target_kl = (0.01, 0.1, 0.5)[seed % 3]
        args.accept_ratio = 0.8
        args.momentum = (0.0, 0.9)[seed % 2]
        gradient = gradient_of(actor, batch, args)
        gradient_sum = 0.5 * gradient.norm() * torch.randn(len(gradient)) / len(gradient) ** 0.5
        expected_sum = args.momentum * gradient_sum + gradient
        last_step = torch.randn(len(gradient))
        region = hatrpo.TrustRegion([actor, actor], args)
        region.gradient_sums[1].copy_(gradient_sum)
        region.last_steps[1].copy_(last_step)
        old_theta = theta_of(actor)
        expected = expected_step(actor, batch, expected_sum, last_step, args.target_kl, args)
        logratio, stats = hatrpo.trpo_step(actor, *batch, region, 1, args)
        torch.testing.assert_close(region.gradient_sums[1].data, expected_sum, rtol=1e-9, atol=1e-9)
        moved = expected.theta - old_theta
        torch.testing.assert_close(region.last_steps[1].data, moved, rtol=1e-6, atol=1e-8)
        assert not region.gradient_sums[0].any()
        assert not region.last_steps[0].any()
        assert {name: float(value) for name, value in stats.items()} == pytest.approx(
            expected.stats, rel=1e-6
        )
        torch.testing.assert_close(theta_of(actor), expected.theta, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(logratio, expected.logratio.detach(), rtol=1e-6, atol=1e-8)
        assert not logratio.requires_grad
        assert not any(torch.is_tensor(v) and v.requires_grad for v in stats.values())
        backtracks.add(stats["backtracks"] if stats["accepted"] else None)
    assert len(backtracks) >= 3


@pytest.mark.parametrize("share_param", [False, True])
def test_update_of_gaussian_and_categorical_agents(share_param):
    """Updates in a row of a list that mixes them: each step on its agent's own sum of gradients, M, and the radius.

    With shared parameters the second agent of a kind starts from what the first one left, and has a sum of its own.
    The radius is that of all agents: it follows what all their last steps are worth on the new batch.
    """
    actors = [make_actor(0), make_actor(1, Discrete), make_actor(2), make_actor(3, Discrete)]
    if share_param:
        actors[2] = actors[0]
        actors[3] = actors[1]
    distinct = actors[: 2 if share_param else 4]
    args = make_args(target_kl=0.1, max_growth=1.04, cg_damping=0.37, max_ratio=1.2, momentum=0.7)
    region = hatrpo.TrustRegion(actors, args)
    sums = [torch.zeros_like(theta_of(actor)) for actor in actors]
    last_steps = list(sums)
    delta = 0.1
    counted = Counter()
    for update in range(6):
        noise = 10 * (update // 3)  # three updates in a row want much the same
        batches = [make_batch(actor, noise + i) for i, actor in enumerate(actors)]
        advantages = 1e4 * batches[0].M
        start = [theta_of(actor) for actor in distinct]

        torch.manual_seed(update)
        order = torch.randperm(4).tolist()
        assert order != [0, 1, 2, 3]
        M = advantages
        joint_logratio = torch.zeros(16)
        stats = {}
        for i in order:
            batch = batches[i]._replace(M=M)
            sums[i] = 0.7 * sums[i] + gradient_of(actors[i], batch, args)
            theta = theta_of(actors[i])
            step = expected_step(actors[i], batch, sums[i], last_steps[i], delta, args)
            set_theta(actors[i], step.theta)
            last_steps[i] = step.theta - theta
            for name, value in step.stats.items():
                stats[f"agent_{i}/{name}"] = value
            counted["accepted"] += step.stats["accepted"]
            joint_logratio = joint_logratio + step.logratio.detach()
            ratio = joint_logratio.exp().numpy()
            M = advantages * torch.from_numpy(np.minimum(ratio, 1.2))
            counted["cut"] += (ratio > 1.2).sum()
        uphill = sum(stats[f"agent_{i}/slope"] for i in range(4)) > 0
        counted["uphill" if uphill else "downhill"] += 1
        stats["losses/delta"] = delta
        delta = min(delta * 1.02, 0.104) if uphill else max(delta / 1.04, 0.1)
        counted["at the largest"] += delta == 0.104
        stats["losses/M_std"] = M.std().item()
        stats["losses/joint_kl"] = k3(joint_logratio).item()
        expected = [theta_of(actor) for actor in distinct]

        for actor, theta in zip(distinct, start, strict=True):
            set_theta(actor, theta)
        torch.manual_seed(update)
        obs = [batch.obs for batch in batches]
        actions = [batch.actions for batch in batches]
        log = hatrpo.hatrpo_update(actors, region, obs, actions, advantages, args)
        assert {name: float(value) for name, value in log.items()} == pytest.approx(stats, rel=1e-4)
        for actor, theta in zip(distinct, expected, strict=True):
            torch.testing.assert_close(theta_of(actor), theta, rtol=1e-5, atol=1e-7)
            set_theta(actor, theta)  # so that the differences do not add up
        for got, total in zip(region.gradient_sums, sums, strict=True):
            torch.testing.assert_close(got.data, total, rtol=1e-5, atol=1e-3)
    assert counted["accepted"] >= 16
    assert counted["cut"] > 20
    assert min(counted["uphill"], counted["downhill"], counted["at the largest"]) >= 1


def test_a_radius_out_of_its_range_is_never_used():
    """A resumed run may have other limits than the run that it continues: the first step already keeps to them."""
    args = make_args(target_kl=0.001, max_growth=4.0)
    for saved, used in ((0.1, 0.004), (1e-6, 0.001)):
        actors = [make_actor(seed) for seed in (0, 1)]
        region = hatrpo.TrustRegion(actors, args)
        region.delta.fill_(saved)
        batches = [make_batch(actor, i) for i, actor in enumerate(actors)]
        obs = [batch.obs for batch in batches]
        actions = [batch.actions for batch in batches]
        log = hatrpo.hatrpo_update(actors, region, obs, actions, batches[0].M, args)
        assert float(log["losses/delta"]) == pytest.approx(used)
        for i in range(2):
            assert used / 4 < float(log[f"agent_{i}/kl"]) <= used * (1 + 1e-6)


def test_no_step_ever_leaves_the_trust_region():
    """Four hundred random problems: KLs within the radius, gain as promised, or nothing changed to the last bit."""
    rng = np.random.default_rng(0)
    outcomes = {0: 0, 1: 0}
    small = {"obs_dim": 2, "hidden_sizes": (3,)}
    actors = [make_actor(0, act_dim=act_dim, **small) for act_dim in (1, 2)]
    actors.append(make_actor(0, Discrete, act_dim=1, **small))
    for seed in range(400):
        actor = randomize(actors[seed % 3], seed)
        if seed % 3 < 2:
            with torch.no_grad():
                actor.log_std += float(rng.choice([-2, 0, 1]))
        batch = make_batch(actor, seed, 8)
        M = 10 ** rng.uniform(-4, 4) * batch.M + rng.choice([0, 1])
        batch = batch._replace(M=M)
        args = make_args(
            backtrack_iters=int(rng.choice([0, 1, 6])),
            accept_ratio=float(rng.uniform(0.05, 0.99)),
            cg_iters=int(rng.integers(1, 8)),
            cg_damping=10 ** rng.uniform(-6, 0),
            ent_coef=float(rng.choice([0, 0.01])),
            target_kl=10 ** rng.uniform(-4, 1.5),
        )
        old_theta = theta_of(actor)
        old = dist_at(actor, batch.obs, old_theta)
        region = hatrpo.TrustRegion([actor], args)
        earlier = float(rng.choice([0, 1])) * M.abs().mean() * torch.randn(len(old_theta))
        region.gradient_sums[0].copy_(earlier)
        logratio, stats = hatrpo.trpo_step(actor, *batch, region, 0, args)
        new = dist_at(actor, batch.obs, theta_of(actor))
        expected_logratio = new.log_prob(batch.actions) - batch.logprobs
        torch.testing.assert_close(logratio, expected_logratio)
        accepted = stats["accepted"]
        outcomes[accepted] += 1
        if not accepted:
            assert torch.equal(theta_of(actor), old_theta)
            assert stats["kl"] == 0
            assert stats["surrogate_gain"] == 0
            continue
        kl = kl_divergence(old, new).mean().item()
        assert kl <= args.target_kl * (1 + 1e-9)
        assert stats["kl"].item() == pytest.approx(kl, rel=1e-6, abs=1e-12)
        gain = objective(new, batch, args.ent_coef) - objective(old, batch, args.ent_coef)
        noise = 1e-12 * (1 + M.abs().max().item())
        assert stats["surrogate_gain"].item() == pytest.approx(gain.item(), rel=1e-6, abs=noise)
        assert stats["surrogate_gain"] > 0
        scale = args.backtrack_coeff ** stats["backtracks"]
        promised = args.accept_ratio * scale * stats["expected_gain"]
        assert gain.item() >= promised * (1 - 1e-6) - noise
    assert min(outcomes.values()) > 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rejected_step_changes_nothing(dtype):
    """Asked for more gain than there can be: parameters bit-identical, and what was kept is reported.

    `logprobs` are older than the parameters, as with shared ones: the log-ratio is that of both.
    """
    actor = make_actor(0).to(dtype)
    batch = Batch(*(x.to(dtype) for x in make_batch(make_actor(0), 0)))
    offset = torch.linspace(-0.1, 0.1, 16, dtype=dtype)
    batch = batch._replace(logprobs=batch.logprobs - offset)
    old = theta_of(actor)
    args = make_args(accept_ratio=1e6, target_kl=0.01)
    region = hatrpo.TrustRegion([actor], args)
    logratio, stats = hatrpo.trpo_step(actor, *batch, region, 0, args)
    assert not region.last_steps[0].any()
    assert torch.equal(theta_of(actor), old)
    assert theta_of(actor).dtype == dtype
    torch.testing.assert_close(logratio, offset, rtol=0, atol=1e-5)
    assert not logratio.requires_grad
    assert stats["accepted"] == 0
    assert stats["kl"] == 0
    assert stats["surrogate_gain"] == 0
    assert stats["backtracks"] == 10
    assert stats["expected_gain"] > 0


@pytest.mark.parametrize("kind", [hatrpo.Actor, Discrete])
def test_without_advantages_no_step_is_accepted(kind):
    """Nothing to gain: no step, `accepted` is 0, and every logged number is finite."""
    actor = make_actor(0, kind)
    batch = make_batch(actor, 0)
    batch = batch._replace(M=torch.zeros(16))
    old = theta_of(actor)
    region = hatrpo.TrustRegion([actor, actor], make_args())
    logratio, stats = hatrpo.trpo_step(actor, *batch, region, 0, make_args())
    assert torch.equal(theta_of(actor), old)
    assert (logratio == 0).all()
    assert all(math.isfinite(float(value)) for value in stats.values())
    assert stats["accepted"] == 0
    assert stats["kl"] == 0
    assert stats["surrogate_gain"] == 0
    assert stats["expected_gain"] == 0
    assert stats["grad_norm"] == 0

    log = hatrpo.hatrpo_update(
        [actor, actor], region, [batch.obs] * 2, [batch.actions] * 2, torch.zeros(16), make_args()
    )
    assert torch.equal(theta_of(actor), old)
    assert log["agent_0/accepted"] == log["agent_1/accepted"] == 0
    assert log["losses/M_std"] == 0
    assert log["losses/joint_kl"] == 0
