"""HATRPO's trust region: Fisher matrix, conjugate gradient, line search and the step that they make."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence
from torch.func import functional_call, grad, jacrev

import hatrpo_mamujoco as hatrpo

pytestmark = pytest.mark.usefixtures("float64")


def make_actor(seed, obs_dim=3, act_dim=2, max_act_dim=None, hidden_sizes=(5, 4)):
    """An actor with all parameters random, which uses the first `act_dim` of `max_act_dim` outputs."""
    generator = torch.Generator().manual_seed(seed)
    actor = hatrpo.Actor(obs_dim, max_act_dim or act_dim, hatrpo.Args(hidden_sizes=hidden_sizes), generator)
    actor.act_dim = act_dim
    return randomize(actor, generator)


def randomize(actor, generator):
    """Draw all the parameters anew."""
    actor.theta.data.copy_(0.6 * torch.randn(actor.theta.shape, generator=generator))
    return actor


def make_batch(actor, seed, size=16):
    """Observations, actions drawn by the actor, their log-probabilities and random weights M."""
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(size, actor.shapes[0][0], generator=generator)
    dist = policy(actor, obs)
    actions = dist.mean + dist.stddev * torch.randn(dist.mean.shape, generator=generator)
    return obs, actions, dist.log_prob(actions), torch.randn(size, generator=generator)


def flatten(actor):
    """A copy of all parameters."""
    return actor.theta.detach().clone()


def policy(actor, obs, theta=None):
    """The actor's distribution as PyTorch's, at its own parameters or at others."""
    theta = flatten(actor) if theta is None else theta
    mean, log_std = functional_call(actor, {"theta": theta}, (obs,))
    return Independent(Normal(mean, log_std.exp(), validate_args=False), 1, validate_args=False)


def joint_kl(dist, batch, earlier):
    """What a batch says of KL(old || new) of the joint policy: this agent's ratio times those of the earlier ones."""
    _, actions, logprobs, _ = batch
    ratio = torch.stack([*earlier, dist.log_prob(actions) - logprobs]).sum(0).exp()
    return (ratio - 1 - ratio.log()).mean().item()


def fisher_matrix(actor, obs):
    """The explicit Hessian of the mean KL(pi_old || pi) at pi_old."""
    old = policy(actor, obs)
    return jacrev(grad(lambda flat: kl_divergence(old, policy(actor, obs, flat)).mean()))(flatten(actor))


def objective(dist, batch, ent_coef):
    """The surrogate that one agent's step is to raise."""
    _, actions, logprobs, M = batch
    return ((dist.log_prob(actions) - logprobs).exp() * M).mean() + ent_coef * dist.entropy().mean()


def matrix_of(product, dim):
    """The matrix of a linear map."""
    return torch.stack([product(e) for e in torch.eye(dim)], dim=1).detach()


# Fisher matrix

ACTORS = {
    "two hidden layers": {},
    "one hidden layer": {"hidden_sizes": (6,), "obs_dim": 2, "act_dim": 3},
    "fewer actions than others": {"act_dim": 1, "max_act_dim": 3, "obs_dim": 4},
}
each_actor = pytest.mark.parametrize("sizes", ACTORS.values(), ids=ACTORS)


@each_actor
def test_fisher_vector_product_is_the_hessian_of_the_mean_kl(sizes):
    """Equal to the explicit Hessian in every entry, log_std's included; symmetric and positive semi-definite."""
    for seed in range(4):
        actor = make_actor(seed, **sizes)
        obs, *_ = make_batch(actor, seed)
        expected = fisher_matrix(actor, obs)
        H = matrix_of(hatrpo.fisher_vector_product(actor, obs), len(expected))
        torch.testing.assert_close(H, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(H, H.T, rtol=1e-10, atol=1e-12)
        eigenvalues = torch.linalg.eigvalsh(H)
        assert eigenvalues.min() > -1e-12 * eigenvalues.max()
        own, n = actor.act_dim, actor.max_act_dim  # log_std comes last; a Gaussian KL's second derivative in it is 2
        block = torch.diag(torch.tensor([2.0] * own + [0.0] * (n - own)))
        torch.testing.assert_close(H[-n:, -n:], block, rtol=0, atol=1e-12)


@each_actor
def test_fisher_vector_product_is_gauss_newton(sizes):
    """At pi_old the Hessian is J^T diag(1 / sigma^2, 2) J with J the Jacobian of mean and log_std."""
    actor = make_actor(7, **sizes)
    obs, *_ = make_batch(actor, 7)

    def mean_and_log_std(flat):
        dist = policy(actor, obs, flat)
        return dist.mean, dist.stddev.log()

    J_mean, J_log_std = jacrev(mean_and_log_std)(flatten(actor))
    precision = policy(actor, obs).stddev ** -2
    expected = torch.einsum("bki,bk,bkj->ij", J_mean, precision, J_mean)
    expected += 2 * torch.einsum("bki,bkj->ij", J_log_std, J_log_std)
    expected /= len(obs)
    H = matrix_of(hatrpo.fisher_vector_product(actor, obs), len(expected))
    torch.testing.assert_close(H, expected, rtol=1e-10, atol=1e-12)


# Conjugate gradient


def spd_system(rng, n):
    """A random symmetric positive definite matrix of condition number up to 100, and a right-hand side."""
    Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return torch.tensor((Q * 10 ** rng.uniform(-1, 1, n)) @ Q.T), torch.tensor(rng.normal(size=n))


def test_conjugate_gradient_solves_positive_definite_systems():
    """Against torch.linalg.solve, damped or not; the default tolerance keeps |(A + c I) x - b|^2 under 1e-10."""
    rng = np.random.default_rng(0)
    for n in [*range(1, 12), 40]:
        for damping in (0.0, 0.37, 10.0):
            A, b = spd_system(rng, n)
            damped = A + damping * torch.eye(n)
            x, Ax = hatrpo.conjugate_gradient(lambda v, A=A: A @ v, b, damping, 10 * n, 1e-24)
            torch.testing.assert_close(x, torch.linalg.solve(damped, b), rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(Ax, A @ x, rtol=1e-9, atol=1e-10)
            x, Ax = hatrpo.conjugate_gradient(lambda v, A=A: A @ v, b, damping, 10 * n)
            assert (damped @ x - b).square().sum() < 1.01e-10
            torch.testing.assert_close(Ax, A @ x, rtol=1e-9, atol=1e-10)


def test_conjugate_gradient_after_k_iterations_is_the_best_in_the_krylov_space():
    """After k products with A: the minimum of x^T (A + c I) x / 2 - b^T x over the span of b, Ab, .., A^(k-1) b."""
    rng = np.random.default_rng(1)
    for k, damping in itertools.product(range(6), (0.0, 0.37)):
        A, b = spd_system(rng, 8)
        K = torch.stack([torch.linalg.matrix_power(A, p) @ b for p in range(k)], 1) if k else torch.zeros(8, 0)
        K, _ = torch.linalg.qr(K)
        expected = K @ torch.linalg.solve(K.T @ (A + damping * torch.eye(8)) @ K, K.T @ b)
        products = []
        count = lambda v, A=A, products=products: products.append(v) or A @ v  # noqa: E731
        x, Ax = hatrpo.conjugate_gradient(count, b, damping, k)
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(Ax, A @ expected, rtol=1e-9, atol=1e-10)
        assert len(products) == k


def test_conjugate_gradient_of_zero_is_zero():
    """No gradient, no step, no NaN, whatever the matrix; and nothing goes on after an exact solution."""
    for A in (torch.eye(3), torch.zeros(3, 3)):
        x, Ax = hatrpo.conjugate_gradient(lambda v, A=A: A @ v, torch.zeros(3), 0.0, 10)
        assert torch.equal(x, torch.zeros(3))
        assert torch.equal(Ax, torch.zeros(3))
    x, Ax = hatrpo.conjugate_gradient(lambda v: 3 * v, torch.tensor([4.0, 8.0, -4.0]), 1.0, 10)
    assert x.tolist() == [1, 2, -1]
    assert Ax.tolist() == [3, 6, -3]


# Line search

PARAMS, STEP = torch.tensor([[0, -2.3], [1, 0]], dtype=torch.float64)  # the first number is the share of the step


def search(gain, kl, expected_gain=1.0, target_kl=0.01, coeff=0.5, iters=10, accept_ratio=0.5):
    """Run `line_search` on functions of the share of the step; check what it tried; return that share or None."""
    tried = []

    def evaluate(new_params):
        share = new_params[0].item()
        tried.append(share)
        return torch.tensor(float(gain(share))), torch.tensor(float(kl(share)))

    args = make_args(backtrack_coeff=coeff, backtrack_iters=iters, accept_ratio=accept_ratio)
    new_params, stats = hatrpo.line_search(evaluate, PARAMS, STEP, torch.tensor(expected_gain), target_kl, args)
    assert tried == pytest.approx([coeff**j for j in range(len(tried))])
    assert set(stats) == {"backtracks", "accepted", "surrogate_gain", "kl"}
    if stats["accepted"] == 0:
        assert len(tried) == iters + 1
        assert torch.equal(new_params, PARAMS)
        assert stats["surrogate_gain"] == 0 and stats["kl"] == 0
        return None
    assert stats["accepted"] == 1
    assert stats["backtracks"] == len(tried) - 1
    torch.testing.assert_close(new_params, PARAMS + tried[-1] * STEP)
    assert stats["surrogate_gain"] == pytest.approx(gain(tried[-1]))
    assert stats["kl"] == pytest.approx(kl(tried[-1]))
    return int(stats["backtracks"])


def test_line_search_on_known_answers():
    """j = 0, a middle one, backtrack_iters itself, and none; each condition alone can reject."""
    good, none = lambda a: a, lambda a: 0.0
    assert search(good, none) == 0
    assert search(good, lambda a: 0.01 * a) == 0  # a KL of exactly the radius is inside
    assert search(lambda a: 0.5 * a, none) == 0  # a gain of exactly kappa of the expected is enough
    assert search(good, lambda a: 0.04 * a**2) == 1  # only the KL fails at first
    assert search(good, lambda a: 0.0401 * a**2) == 2
    assert search(lambda a: a - 4 * a**2, none) == 3  # only the gain fails: a - 4 a^2 >= a / 2 from a = 1 / 8 on
    assert search(good, lambda a: 0.01 * (a * 1024)) == 10
    assert search(good, lambda a: 0.01 * (a * 1025)) is None
    assert search(good, lambda a: 0.02, iters=3) is None
    assert search(lambda a: 0.49 * a, none) is None
    assert search(lambda a: -a, none) is None
    assert search(good, none, iters=0) == 0
    assert search(good, lambda a: 0.02 * a, iters=0) is None
    assert search(lambda a: 0.9 * a, none, accept_ratio=0.9, coeff=0.8) == 0
    assert search(lambda a: 0.8 * a, none, accept_ratio=0.9, coeff=0.8) is None


@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    slope=st.floats(0.01, 100),
    curvature=st.floats(0, 1000),
    kl_curvature=st.floats(1e-4, 100),
    target_kl=st.floats(1e-4, 1),
    coeff=st.floats(0.1, 0.95),
    iters=st.integers(0, 20),
    accept_ratio=st.floats(0.05, 0.95),
)
def test_line_search_on_quadratic_models(slope, curvature, kl_curvature, target_kl, coeff, iters, accept_ratio):
    """gain = s a - c a^2 and KL = k a^2: the first power of alpha below min((1 - kappa) s / c, sqrt(delta / k))."""
    largest = math.sqrt(target_kl / kl_curvature)
    if curvature > 0:
        largest = min(largest, (1 - accept_ratio) * slope / curvature)
    j = max(0.0, math.log(largest) / math.log(coeff))
    assume(abs(j - round(j)) > 1e-6 or (j == 0 and largest > 1 + 1e-6))
    found = search(
        lambda a: slope * a - curvature * a**2,
        lambda a: kl_curvature * a**2,
        expected_gain=slope,
        target_kl=target_kl,
        coeff=coeff,
        iters=iters,
        accept_ratio=accept_ratio,
    )
    assert found == (math.ceil(j) if math.ceil(j) <= iters else None)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_line_search_never_accepts_what_is_not_finite(bad):
    """A NaN in the gain or in the KL is a rejection, at every j."""
    assert search(lambda a: bad, lambda a: 0.0) is None
    assert search(lambda a: a, lambda a: abs(bad)) is None
    assert search(lambda a: bad if a > 0.2 else a, lambda a: 0.0) == 3
    assert search(lambda a: a, lambda a: abs(bad) if a > 0.2 else 0.0) == 3
    assert search(lambda a: math.nan, lambda a: math.nan) is None


# The step


def make_args(**changed):
    """Every setting that a step reads; conjugate gradient runs to convergence on these small networks."""
    search = {"target_kl": 0.01, "backtrack_coeff": 0.8, "backtrack_iters": 10, "accept_ratio": 0.5}
    solver = {"cg_iters": 200, "cg_damping": 0.1, "fisher_stride": 1, "ent_coef": 0.0}
    args = hatrpo.Args()
    vars(args).update(search | solver | changed)  # also out of range
    return args


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
@pytest.mark.parametrize("stride", [1, 3])
def test_step_is_built_from_gradient_and_damped_fisher_matrix(ent_coef, stride, monkeypatch):
    """What conjugate gradient and line search get: g, H, a share of g'Hg / g'g, a step on the model's boundary."""
    actor = make_actor(3)
    batch = make_batch(actor, 3)
    batch[3].mul_(1e4)  # the step does not depend on M's size, but relative to it conjugate gradient is exact
    args, old = make_args(ent_coef=ent_coef, fisher_stride=stride, cg_damping=0.37, cg_iters=77), flatten(actor)
    H = fisher_matrix(actor, batch[0][::stride])
    gradient = grad(lambda flat: objective(policy(actor, batch[0], flat), batch, ent_coef))(old)
    absolute = 0.37 * (gradient @ H @ gradient / (gradient @ gradient)).item()
    earlier = [0.1 * torch.randn(len(batch[0])), 0.2 * torch.randn(len(batch[0]))]
    seen = {}

    def solve(product, b, damping, cg_iters):
        torch.testing.assert_close(matrix_of(product, len(b)), H, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(b, gradient, rtol=1e-10, atol=1e-12)
        assert damping == pytest.approx(absolute, rel=1e-9) and cg_iters == 77
        x = torch.linalg.solve(H + damping * torch.eye(len(b)), b)
        return x, H @ x

    def line_search(evaluate, params, step, expected_gain, *settings_):
        assert settings_ == (0.01, args)
        assert torch.equal(params, old)
        x = torch.linalg.solve(H + absolute * torch.eye(len(old)), gradient)
        torch.testing.assert_close(step, x * torch.sqrt(0.02 / (x @ H @ x)), rtol=1e-8, atol=1e-12)
        assert 0.5 * step @ H @ step == pytest.approx(0.01, rel=1e-8)
        seen["larger"] = set()
        for scale in (1, 3, -1e-3):  # the gain is of the objective, and both KLs are on the whole batch
            gain, kl = evaluate(params + scale * step)
            flat = params + scale * step
            before, after = policy(actor, batch[0], params), policy(actor, batch[0], flat)
            expected = objective(after, batch, ent_coef) - objective(before, batch, ent_coef)
            assert gain == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
            kls = kl_divergence(before, after).mean().item(), joint_kl(after, batch, earlier) / 3
            assert kl == pytest.approx(max(kls), rel=1e-9)
            seen["larger"].add(kls.index(max(kls)))
        assert seen["larger"] == {0, 1}
        h = 1e-6
        dists = (policy(actor, batch[0], params + sign * h * step) for sign in (1, -1))
        up, down = (objective(dist, batch, ent_coef) for dist in dists)
        assert expected_gain == pytest.approx((up - down).item() / (2 * h), rel=1e-6)
        seen["expected_gain"] = expected_gain
        return params + 0.5 * step, {"kl": torch.tensor(0.123)}

    monkeypatch.setattr(hatrpo, "conjugate_gradient", solve)
    monkeypatch.setattr(hatrpo, "line_search", line_search)
    before = objective(policy(actor, batch[0]), batch, ent_coef)
    entropy = policy(actor, batch[0]).entropy().mean().item()
    stats = hatrpo.trpo_step(actor, *batch, earlier, 0.01, args)
    assert 0.5 * (flatten(actor) - old) @ H @ (flatten(actor) - old) == pytest.approx(0.0025, rel=1e-8)
    assert stats["kl"] == 0.123  # the line search's word is passed on
    assert stats["expected_gain"] == seen["expected_gain"]
    assert stats["policy_loss"] == pytest.approx(-before.item())
    assert stats["grad_norm"] == pytest.approx(gradient.square().sum().sqrt().item())
    assert stats["entropy"] == pytest.approx(entropy)
    x = torch.linalg.solve(H + absolute * torch.eye(len(old)), gradient)
    assert stats["step_cosine"] == pytest.approx(torch.cosine_similarity(x, gradient, dim=0).item())


def test_no_step_ever_leaves_the_trust_region():
    """Six hundred random problems: KL within the radius, gain as promised, or nothing changed to the last bit."""
    rng = np.random.default_rng(0)
    outcomes = {0: 0, 1: 0}
    actors = [make_actor(0, obs_dim=2, act_dim=act_dim, hidden_sizes=(3,)) for act_dim in (1, 2)]
    for seed in range(600):
        actor = randomize(actors[seed % 2], torch.Generator().manual_seed(seed))
        with torch.no_grad():
            actor.theta[-actor.act_dim :].add_(float(rng.choice([-2, 0, 1])))
        batch = make_batch(actor, seed, 8)
        batch[3].mul_(10 ** rng.uniform(-4, 4)).add_(rng.choice([0, 1]))
        args = make_args(
            target_kl=10 ** rng.uniform(-4, 1.5),
            backtrack_iters=int(rng.choice([0, 1, 6])),
            accept_ratio=float(rng.uniform(0.05, 0.99)),
            cg_iters=int(rng.integers(1, 8)),
            cg_damping=10 ** rng.uniform(-6, 0),
            ent_coef=float(rng.choice([0, 0.01])),
        )
        old_params, old = flatten(actor), policy(actor, batch[0])
        earlier = [0.1 * torch.randn(8)] * int(rng.integers(0, 3))
        stats = hatrpo.trpo_step(actor, *batch, earlier, args.target_kl, args)
        new, accepted = policy(actor, batch[0]), int(stats["accepted"])
        outcomes[accepted] += 1
        if not accepted:
            assert torch.equal(flatten(actor), old_params)
            assert stats["kl"] == 0 and stats["surrogate_gain"] == 0
            continue
        kl = max(kl_divergence(old, new).mean().item(), joint_kl(new, batch, earlier) / (len(earlier) + 1))
        gain = (objective(new, batch, args.ent_coef) - objective(old, batch, args.ent_coef)).item()
        assert kl <= args.target_kl * (1 + 1e-9)
        assert stats["kl"].item() == pytest.approx(kl, rel=1e-6, abs=1e-12)
        noise = 1e-12 * (1 + batch[3].abs().max().item())
        assert stats["surrogate_gain"].item() == pytest.approx(gain, rel=1e-6, abs=noise)
        promised = args.accept_ratio * args.backtrack_coeff ** int(stats["backtracks"]) * stats["expected_gain"]
        assert promised > 0
        assert gain >= promised * (1 - 1e-6) - noise
    assert min(outcomes.values()) > 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rejected_step_changes_nothing(dtype):
    """Asked for more gain than there can be: parameters bit-identical; KL and gain of what was kept, which are 0."""
    actor = make_actor(0).to(dtype)
    batch = [x.to(dtype) for x in make_batch(make_actor(0), 0)]
    old = flatten(actor)
    stats = hatrpo.trpo_step(actor, *batch, [], 0.01, make_args(accept_ratio=1e6))
    assert torch.equal(actor.theta, old) and actor.theta.dtype == dtype
    assert (stats["accepted"], stats["kl"], stats["surrogate_gain"], stats["backtracks"]) == (0, 0, 0, 10)
    assert stats["expected_gain"] > 0


def test_zero_M_makes_no_nan():
    """Nothing to gain: no step, and every logged number is finite."""
    actor = make_actor(0)
    obs, actions, logprobs, _ = make_batch(actor, 0)
    old = flatten(actor)
    stats = hatrpo.trpo_step(actor, obs, actions, logprobs, torch.zeros(len(obs)), [], 0.01, make_args())
    assert torch.equal(flatten(actor), old)
    assert all(torch.isfinite(value) for value in stats.values())
