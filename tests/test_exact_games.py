"""The shipped updates on cooperative Markov games that are small enough to be solved exactly, by linear algebra.

Notation, from Kuba et al., arXiv 2109.11251: J is the expected discounted return from the initial distribution mu, rho
the unnormalised discounted visitation (it sums to 1 / (1 - gamma)). Arrays over states and joint actions are
[S, A_1, .., A_n], agent i has axis i + 1. Everything is float64. Nothing here is sampled: the batch is every
(state, joint action) once, and carries its probability, see `exact_batch`.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby, permutations, product
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.distributions import Categorical, register_kl
from torch.optim import SGD, Adam

import happo_mamujoco as happo
import hatrpo_mamujoco as hatrpo
import mappo_mamujoco as mappo

GAMMAS = (0.0, 0.01, 0.1, 0.3, 0.6, 0.9)

# Every hyperparameter that the updates read, so that the scripts' defaults may change: whole batches, no
# entropy bonus.
CLIPPED = {
    "num_minibatches": 1,
    "update_epochs": 2,
    "clip_coef": 0.2,
    "ent_coef": 0.0,
    "max_grad_norm": 10.0,
}
# The rows of an exact batch carry their probability: a plain mean of M over them means nothing.
HAPPO = CLIPPED | {"keep_mean": True}
TRUST_REGION = {
    "momentum": 0.0,
    "max_ratio": np.inf,
    "cg_iters": 10,
    "cg_damping": 0.01,
    "ent_coef": 0.0,
    "backtrack_coeff": 0.8,
    "backtrack_iters": 10,
    "accept_ratio": 0.5,
}


# Oracles: numpy only, from the definitions


class Game(NamedTuple):
    """A cooperative Markov game: transitions [S, A_1, .., A_n, S], rewards [S, A_1, .., A_n], mu [S], discount."""

    P: ndarray
    r: ndarray
    mu: ndarray
    gamma: float


class Solution(NamedTuple):
    """What a joint policy is worth: return, values [S], Q and advantages [S, A_1, .., A_n], visitation [S]."""

    J: float
    V: ndarray
    Q: ndarray
    A: ndarray
    rho: ndarray


def along(pi: ndarray, agent: int, n: int) -> ndarray:
    """One agent's policy [S, A_i], broadcastable to [S, A_1, .., A_n]."""
    return pi.reshape(len(pi), *(pi.shape[1] if j == agent else 1 for j in range(n)))


def joint(policies: Sequence[ndarray]) -> ndarray:
    """The joint policy [S, A_1, .., A_n]: the agents act independently."""
    out = np.ones(1)
    for i, pi in enumerate(policies):
        out = out * along(pi, i, len(policies))
    return out


def solve(game: Game, policies: Sequence[ndarray]) -> Solution:
    """V = (I - gamma P_pi)^-1 r_pi; Q = r + gamma P V; rho = (I - gamma P_pi^T)^-1 mu."""
    num_states = len(game.mu)
    prob = joint(policies)
    P = (prob[..., None] * game.P).reshape(num_states, -1, num_states).sum(1)
    inverse = np.linalg.inv(np.eye(num_states) - game.gamma * P)
    V = inverse @ (prob * game.r).reshape(num_states, -1).sum(1)
    Q = game.r + game.gamma * game.P @ V
    A = Q - V.reshape(-1, *[1] * len(policies))
    return Solution(game.mu @ V, V, Q, A, game.mu @ inverse)


def marginal_q(Q: ndarray, policies: Sequence[ndarray], known: Sequence[int]) -> ndarray:
    """Q^{known}(s, a^{known}) (definition 1): the other agents follow their policies; their axes have size 1."""
    for i in set(range(len(policies))) - set(known):
        Q = (Q * along(policies[i], i, len(policies))).sum(i + 1, keepdims=True)
    return Q


def agent_advantage(
    Q: ndarray, policies: Sequence[ndarray], before: Sequence[int], agent: int
) -> ndarray:
    """A^{agent}(s, a^{before}, a^{agent}) = Q^{before, agent} - Q^{before} (definition 1)."""
    return marginal_q(Q, policies, (*before, agent)) - marginal_q(Q, policies, before)


def agent_objective(
    Q: ndarray, old: Sequence[ndarray], new: Sequence[ndarray], before: Sequence[int], agent: int
) -> ndarray:
    """g(s, a^{agent}), [S, A_agent]: its advantage when `before` already follow their new policies."""
    g = agent_advantage(Q, old, before, agent)
    for j in before:
        g = (g * along(new[j], j, len(old))).sum(j + 1, keepdims=True)
    return g.reshape(len(g), -1)


def surrogates(
    sol: Solution, old: Sequence[ndarray], new: Sequence[ndarray], order: Sequence[int]
) -> list[float]:
    """L^{i_m} of every m (definition 2): rho and A of the old policy, actions of i_1..i_m of the new one."""
    gains = (agent_objective(sol.Q, old, new, order[:m], i) * new[i] for m, i in enumerate(order))
    return [sol.rho @ gain.sum(1) for gain in gains]


def kl(old: ndarray, new: ndarray) -> ndarray:
    """KL(old || new) in every state, [S]."""
    return (old * np.log(old / new)).sum(1)


def penalty(game: Game, sol: Solution, old: Sequence[ndarray], new: Sequence[ndarray]) -> float:
    """C times the sum of the agents' largest KL(old || new); C = 4 gamma max|A| / (1 - gamma)^2 (lemma 2)."""
    C = 4 * game.gamma * np.abs(sol.A).max() / (1 - game.gamma) ** 2
    return C * sum(kl(p, q).max() for p, q in zip(old, new, strict=True))


def softmax(logits: ndarray) -> ndarray:
    """Rows of logits to rows of probabilities."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def random_game(rng: np.random.Generator, gamma: float) -> tuple[Game, list[ndarray]]:
    """A game of 2-4 states, 2-3 agents and 2-3 actions for each of them; and logits for everyone."""
    S, n = rng.integers(2, 5), rng.integers(2, 4)
    sizes = rng.integers(2, 4, size=n)
    P = rng.dirichlet(np.full(S, 0.5), size=(S, *sizes))
    game = Game(P, rng.normal(size=(S, *sizes)), rng.dirichlet(np.ones(S)), gamma)
    return game, [rng.normal(size=(S, a)) for a in sizes]


# The shipped updates on an exact batch


class WeightedCategorical(Categorical):
    """Categorical distributions [B] with a weight each; actions are [B, 1].

    The weight is a factor of entropy and KL, so that their mean over rows is an expectation over states.
    """

    def __init__(self, logits: Tensor, weights: Tensor) -> None:
        """Make the distributions from logits [B, A] and weights [B]."""
        super().__init__(logits=logits, validate_args=False)
        self.weights = weights

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of actions [B, 1], without the weight, which the advantages carry."""
        return super().log_prob(actions.squeeze(1))

    def entropy(self) -> Tensor:
        """Entropy in nats, times the weight, [B]."""
        return self.weights * super().entropy()


@register_kl(WeightedCategorical, WeightedCategorical)
def weighted_kl(old: WeightedCategorical, new: WeightedCategorical) -> Tensor:
    """KL(old || new) in nats, times the weight, [B]."""
    return new.weights * (old.probs * (old.logits - new.logits)).sum(-1)


class TabularActor(nn.Module):
    """A softmax policy with one row of logits per state; the observation is (state, weight of the row)."""

    def __init__(self, logits: ndarray) -> None:
        """Start from these logits, [S, A]."""
        super().__init__()
        self.table = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, obs: Tensor) -> WeightedCategorical:
        """Observations [B, 2] to the distributions of B actions."""
        return WeightedCategorical(self.table[obs[:, 0].long()], obs[:, 1])

    def logits(self) -> ndarray:
        """A copy of the logits, [S, A]."""
        return self.table.detach().numpy().copy()

    def policy(self) -> ndarray:
        """The probabilities, [S, A]."""
        return softmax(self.logits())


def exact_batch(
    game: Game, policies: Sequence[ndarray], order: Sequence[int]
) -> tuple[Any, Any, Tensor]:
    """Observations, actions (lists, in the order given) and advantages of every (s, a), B rows.

    The advantages are B rho(s) pi(a|s) A(s, a), so that the mean over the batch of ratio * M is the sum over s of
    rho(s) times the expectation over pi. The clipped objective is positively homogeneous in M and the update of M
    multiplicative, so both are exact. The weight of a row in a KL or an entropy is B (1 - gamma) rho(s) pi(a|s).
    """
    sol, prob = solve(game, policies), joint(policies)
    rows = np.indices(game.r.shape).reshape(
        game.r.ndim, -1
    )  # state, then the action of every agent
    weight = rows.shape[1] * (sol.rho.reshape(-1, *[1] * len(policies)) * prob).ravel()
    obs = torch.tensor(np.column_stack((rows[0], (1 - game.gamma) * weight)))
    actions = [torch.tensor(rows[i + 1][:, None]) for i in order]
    return [obs] * len(order), actions, torch.tensor(weight * sol.A.ravel())


def run_happo(
    actors: Sequence[TabularActor],
    batch: tuple,
    args: happo.Args,
    optimizer: Callable = Adam,
) -> dict[str, Tensor]:
    """The shipped HAPPO."""
    one = optimizer(nn.ModuleList(actors).parameters(), lr=args.learning_rate)
    return happo.happo_update(actors, one, *batch, args)


def run_hatrpo(
    actors: Sequence[TabularActor], batch: tuple, args: hatrpo.Args
) -> dict[str, Tensor | float]:
    """The shipped HATRPO, without what earlier updates leave behind."""
    return hatrpo.hatrpo_update(actors, hatrpo.TrustRegion(actors, args).double(), *batch, args)


def run_mappo(actors: Sequence[TabularActor], batch: tuple, args: mappo.Args) -> None:
    """The shipped MAPPO."""
    optimizer = Adam(nn.ModuleList(actors).parameters(), lr=args.learning_rate)
    mappo.mappo_update(actors, optimizer, *batch, args)


class Call(NamedTuple):
    """One call of `ppo_loss` or `trpo_step`: the agent, and what the update passes on for each row."""

    agent: int
    logprobs: Tensor
    M: Tensor


def record_calls(
    patch: pytest.MonkeyPatch,
    script: ModuleType,
    name: str,
    actors: Sequence[TabularActor],
    agents: Sequence[int],
) -> list[Call]:
    """Let a function of a script that takes (actor, obs, actions, logprobs, M, ...) leave its calls on a list."""
    shipped = getattr(script, name)
    calls = []

    def spy(actor: TabularActor, *args: Any) -> tuple:
        (agent,) = (i for i, other in zip(agents, actors, strict=True) if other is actor)
        _, _, logprobs, M, *_ = args
        calls.append(Call(agent, logprobs.clone(), M.clone()))
        return shipped(actor, *args)

    patch.setattr(script, name, spy)
    return calls


class Update(NamedTuple):
    """One shipped sequential update: from where, in which order, what it logged.

    M[m] [B] is the M^{i_{m+1}} that it used, and `last_M_std` what it logged of the one after the last agent.
    """

    algorithm: str
    game: Game
    sol: Solution
    old: list[ndarray]
    new: list[ndarray]
    order: list[int]
    M: list[Tensor]
    log: dict[str, Tensor]
    radius: float


def run_and_record(
    algorithm: str,
    game: Game,
    logits: Sequence[ndarray],
    agents: Sequence[int],
    args: happo.Args | hatrpo.Args,
) -> tuple[list[TabularActor], dict[str, Tensor], list[Call]]:
    """Update these agents alone, by the shipped HAPPO or HATRPO; return the actors, the log and the calls."""
    actors = [TabularActor(logits[i]) for i in agents]
    batch = exact_batch(game, [softmax(rows) for rows in logits], agents)
    randperm = torch.randperm

    def in_order(size: int) -> Tensor:
        """A random order of the agents, but the rows as they are."""
        return torch.arange(size) if size == len(batch[-1]) else randperm(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", in_order)
        if algorithm == "happo":
            calls = record_calls(patch, happo, "ppo_loss", actors, agents)
            log = run_happo(actors, batch, args)
        else:
            calls = record_calls(patch, hatrpo, "trpo_step", actors, agents)
            log = run_hatrpo(actors, batch, args)
    return actors, log, calls


def random_update(seed: int) -> Update:
    """HAPPO or HATRPO on a random game, in the order that it draws itself, with steps from tiny to far too large.

    The order and M are read off the calls of `ppo_loss` and `trpo_step`: an agent must be done before the next one
    starts. Nothing may come from later agents: the first ones alone must end up with the same policies.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    algorithm = ("happo", "hatrpo")[seed % 2]
    game, logits = random_game(rng, GAMMAS[seed // 2 % len(GAMMAS)])
    n = len(logits)
    size = 10 ** rng.uniform(-4, -0.5)
    epochs = int(rng.integers(1, 5))
    if algorithm == "happo":
        sizes = {"update_epochs": epochs, "learning_rate": 5 * size}
        args = happo.Args(**HAPPO | sizes)
    else:
        args = hatrpo.Args(**TRUST_REGION, target_kl=size)
    actors, log, calls = run_and_record(algorithm, game, logits, range(n), args)
    order = [i for i, _ in groupby(call.agent for call in calls)]
    assert sorted(order) == list(range(n))

    old = [softmax(rows) for rows in logits]
    new = [actor.policy() for actor in actors]
    rows = np.indices(game.r.shape).reshape(game.r.ndim, -1)
    M = {}
    for call in calls:
        logprobs = np.log(old[call.agent])[rows[0], rows[call.agent + 1]]
        np.testing.assert_allclose(call.logprobs, logprobs, rtol=0, atol=1e-12)
        assert torch.equal(call.M, M.setdefault(call.agent, call.M))  # the same in every epoch

    args.fixed_order = True
    for m in range(1, n):
        first, _, first_calls = run_and_record(algorithm, game, logits, order[:m], args)
        assert [i for i, _ in groupby(call.agent for call in first_calls)] == order[:m]
        for i, actor in zip(order[:m], first, strict=True):
            assert torch.equal(actor.table, actors[i].table)
    return Update(
        algorithm, game, solve(game, old), old, new, order, [M[i] for i in order], log, size
    )


@pytest.fixture(scope="module")
def updates() -> list[Update]:
    """Many of them, half by HAPPO and half by HATRPO, for 2 and for 3 agents."""
    return [random_update(seed) for seed in range(240)]


# The oracles themselves


def test_solution_is_the_sum_over_time():
    """J and rho by their definitions: sums over t of gamma^t times expected reward and state distribution at time t."""
    rng = np.random.default_rng(0)
    for gamma in GAMMAS:
        game, logits = random_game(rng, gamma)
        policies = [softmax(rows) for rows in logits]
        sol, state, J, rho = solve(game, policies), game.mu, 0.0, 0.0
        for t in range(400):  # 0.9^400 < 1e-18
            flow = state.reshape(-1, *[1] * len(policies)) * joint(policies)
            J, rho = J + gamma**t * (flow * game.r).sum(), rho + gamma**t * state
            state = (flow[..., None] * game.P).reshape(-1, len(state)).sum(0)
        np.testing.assert_allclose(sol.J, J, rtol=0, atol=1e-12)
        np.testing.assert_allclose(sol.rho, rho, rtol=0, atol=1e-12)


def test_q_of_some_agents_is_the_return_after_forcing_their_actions():
    """Q^{known}(s, a^{known}): start in a copy of s, where `known` must play their actions, and which never comes back.

    This uses neither Q nor a marginalisation: only the return of a larger game.
    """
    rng = np.random.default_rng(1)
    for gamma in GAMMAS:
        game, logits = random_game(rng, gamma)
        policies, S, n = [softmax(rows) for rows in logits], len(game.mu), len(logits)
        Q = solve(game, policies).Q
        known = list(rng.permutation(n)[: rng.integers(0, n + 1)])
        q = np.broadcast_to(marginal_q(Q, policies, known), Q.shape)
        for s, *actions in product(range(S), *(range(rows.shape[1]) for rows in logits)):
            P = np.concatenate((game.P, game.P[s : s + 1]))
            P = np.concatenate((P, np.zeros_like(P[..., :1])), -1)
            larger = Game(P, np.concatenate((game.r, game.r[s : s + 1])), np.eye(S + 1)[S], gamma)
            first = [
                np.eye(pi.shape[1])[actions[i]] if i in known else pi[s]
                for i, pi in enumerate(policies)
            ]
            forced = [np.vstack((pi, row)) for pi, row in zip(policies, first, strict=True)]
            np.testing.assert_allclose(solve(larger, forced).J, q[s, *actions], rtol=0, atol=1e-12)


# (a) The multi-agent advantage decomposition


def test_advantage_decomposition():
    """A(s, a) = sum over m of A^{i_m}(s, a^{i_1..i_{m-1}}, a^{i_m}), for every permutation (lemma 1)."""
    rng = np.random.default_rng(2)
    naive_errors = []
    for k in range(60):
        game, logits = random_game(rng, GAMMAS[k % len(GAMMAS)])
        policies = [softmax(rows) for rows in logits]
        sol = solve(game, policies)
        for order in permutations(range(len(policies))):
            parts = [agent_advantage(sol.Q, policies, order[:m], i) for m, i in enumerate(order)]
            np.testing.assert_allclose(sum(parts) + np.zeros_like(sol.A), sol.A, rtol=0, atol=1e-12)
            for i, part in zip(order, parts, strict=True):
                # An advantage is 0 on average over its own agent's action.
                mean = (part * along(policies[i], i, len(policies))).sum(i + 1)
                np.testing.assert_allclose(mean, 0, rtol=0, atol=1e-12)
        naive = sum(agent_advantage(sol.Q, policies, (), i) for i in range(len(policies)))
        naive_errors.append(np.abs(naive - sol.A).max())
    assert min(naive_errors) > 0.1  # without the earlier agents' actions it adds up in no game


# (b) The lower bound


def test_agents_update_in_every_order(updates: list[Update]):
    """All 2 and all 6 orders are drawn, none of the 6 more than twice as often as it should be."""
    for algorithm in ("happo", "hatrpo"):
        for n in (2, 3):
            chosen = [u for u in updates if u.algorithm == algorithm and len(u.old) == n]
            orders = Counter(tuple(u.order) for u in chosen)
            assert set(orders) == set(permutations(range(n)))
            assert max(orders.values()) < 2 * orders.total() / len(orders)


def test_M_is_what_the_surrogate_needs(updates: list[Update]):
    """E over pi_old of (r^{i_m} - 1) M^{i_m} = L^{i_m}, for the new policy and for any other (proposition 2).

    The right-hand side knows nothing of ratios: it is the expectation of A^{i_m} over new policies. After the last
    agent, M is A times the ratio of the joint policies: its standard deviation is logged.
    """
    differences = []
    for k, u in enumerate(updates):
        rng = np.random.default_rng(k)
        scale = np.abs(u.sol.A).max() * u.sol.rho.sum()
        rows = np.indices(u.game.r.shape).reshape(u.game.r.ndim, -1)
        for m, i in enumerate(u.order):
            other = rng.dirichlet(np.ones(u.old[i].shape[1]), size=len(u.old[i]))
            for candidate in (u.new[i], other):
                ratio = (candidate / u.old[i])[rows[0], rows[i + 1]]
                gain = ((ratio - 1) * u.M[m].numpy()).mean()
                new = [candidate if j == i else pi for j, pi in enumerate(u.new)]
                L = surrogates(u.sol, u.old, new, u.order)[m]
                np.testing.assert_allclose(gain, L, rtol=0, atol=1e-12 * scale)
            differences.append(abs(gain - ((ratio - 1) * u.M[0].numpy()).mean()) / scale)
        last_M = (joint(u.new) / joint(u.old)).ravel() * exact_batch(u.game, u.old, u.order)[
            -1
        ].numpy()
        np.testing.assert_allclose(u.log["losses/M_std"], last_M.std(ddof=1), rtol=1e-10)
    assert np.mean(np.array(differences) > 1e-3) > 0.3  # with A in the place of M it would fail


def test_hatrpo_reports_the_exact_surrogate_and_kl(updates: list[Update]):
    """Its gain is L^{i_m}; its KL is KL(old || new) averaged over the discounted visitation, and within the radius."""
    accepted = []
    for u in (u for u in updates if u.algorithm == "hatrpo"):
        scale = np.abs(u.sol.A).max() * u.sol.rho.sum()
        for i, L in zip(u.order, surrogates(u.sol, u.old, u.new, u.order), strict=True):
            gain = u.log[f"agent_{i}/surrogate_gain"]
            np.testing.assert_allclose(gain, L, rtol=0, atol=1e-12 * scale)
            mean_kl = (1 - u.game.gamma) * u.sol.rho @ kl(u.old[i], u.new[i])
            np.testing.assert_allclose(u.log[f"agent_{i}/kl"], mean_kl, rtol=1e-9, atol=1e-14)
            assert mean_kl <= np.float32(u.radius) * (1 + 1e-9)
            accepted.append(u.log[f"agent_{i}/accepted"])
            assert L > 0 or not accepted[-1]
    assert np.mean(accepted) > 0.95


def bound_errors(
    game: Game, sol: Solution, old: list[ndarray], new: list[ndarray], order: Sequence[int]
) -> ndarray:
    """J(new) - J(old) - sum of L^{i_m}; the same if every agent's L ignores the others' updates; the penalty."""
    gain = solve(game, new).J - sol.J
    alone = sum(surrogates(sol, old, new, [i])[0] for i in order)
    return np.array(
        [gain - sum(surrogates(sol, old, new, order)), gain - alone, penalty(game, sol, old, new)]
    )


def assert_bound(errors: ndarray) -> None:
    """The bound, both sides (the proof bounds the absolute value); and that each part of it is needed."""
    error, alone, slack = errors.T
    assert np.all(np.abs(error) <= slack + 1e-11)
    assert np.mean(error < -1e-9) > 0.2  # without the penalty it would not hold
    # Nor would it hold with surrogates that ignore the agents already updated.
    assert np.mean(alone < -slack - 1e-9) > 0.02


def test_lower_bound_for_random_policies():
    """J(new) - J(old) >= sum over m of L^{i_m} - C max-KL^{i_m} (lemma 2), every order, near and far policies."""
    rng = np.random.default_rng(3)
    errors = []
    for k in range(300):
        game, logits = random_game(rng, GAMMAS[k % len(GAMMAS)])
        old = [softmax(rows) for rows in logits]
        size = 10 ** rng.uniform(-2, 0.5)
        new = [softmax(rows + size * rng.normal(size=rows.shape)) for rows in logits]
        sol = solve(game, old)
        errors += [
            bound_errors(game, sol, old, new, order) for order in permutations(range(len(old)))
        ]
    assert_bound(np.array(errors))


@pytest.mark.parametrize("algorithm", ["happo", "hatrpo"])
def test_lower_bound_for_shipped_updates(updates: list[Update], algorithm: str):
    """The same for the policies that the shipped sequential updates make, in their order."""
    chosen = [u for u in updates if u.algorithm == algorithm]
    assert_bound(np.array([bound_errors(u.game, u.sol, u.old, u.new, u.order) for u in chosen]))


def test_without_a_future_the_shipped_surrogates_add_up_to_the_gain(updates: list[Update]):
    """gamma = 0 makes C = 0, so the bound is an equation: J(new) - J(old) is the sum of the shipped (r - 1) M."""
    myopic = [u for u in updates if u.game.gamma == 0]
    for u in myopic:
        rows = np.indices(u.game.r.shape).reshape(u.game.r.ndim, -1)
        ratios = [(u.new[i] / u.old[i])[rows[0], rows[i + 1]] for i in u.order]
        gains = [((ratio - 1) * M.numpy()).mean() for ratio, M in zip(ratios, u.M, strict=True)]
        np.testing.assert_allclose(sum(gains), solve(u.game, u.new).J - u.sol.J, rtol=0, atol=1e-12)
    assert len(myopic) == 40


@pytest.mark.parametrize("algorithm", ["happo", "hatrpo"])
def test_return_rises_as_long_as_the_bound_is_positive(algorithm: str):
    """Iterate: halve the size of the shipped update until the bound is positive; then J rises by at least the bound."""
    refused = taken = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        game, logits = random_game(rng, (0.3, 0.6, 0.8, 0.9)[seed % 4])
        actors = [TabularActor(rows) for rows in logits]
        first_J = solve(game, [actor.policy() for actor in actors]).J
        size = 0.1
        for _ in range(10):
            old = [actor.policy() for actor in actors]
            sol, order = solve(game, old), rng.permutation(len(old))
            while True:
                tried = [copy.deepcopy(actor) for actor in actors]
                in_order, batch = [tried[i] for i in order], exact_batch(game, old, order)
                if algorithm == "happo":
                    args = happo.Args(**HAPPO, fixed_order=True, learning_rate=size)
                    run_happo(in_order, batch, args)
                else:
                    run_hatrpo(
                        in_order,
                        batch,
                        hatrpo.Args(**TRUST_REGION, fixed_order=True, target_kl=size**2),
                    )
                new = [actor.policy() for actor in tried]
                bound = sum(surrogates(sol, old, new, order)) - penalty(game, sol, old, new)
                if bound > 0:
                    break
                refused += 1
                size /= 2
                assert size > 1e-5
            gain = solve(game, new).J - sol.J
            assert gain >= bound
            actors = tried
            taken += 1
            size *= 1.5
        total = solve(game, new).J - first_J
        assert total > 1e-4
    assert refused > 8
    assert taken == 80


# The updates against closed forms for tabular softmax policies


@pytest.mark.parametrize("epsilon", [1e9, 0.2, 0.05])
def test_happo_is_gradient_ascent_on_the_clipped_surrogate(epsilon: float):
    """dL^{i_m} / dlogits(s, a) = rho(s) pi(a|s) (g(s, a) - E_pi g); SGD, up to 5 epochs, parameter for parameter.

    g(s, a^{i_m}) is the expectation of A(s, a) over the others' actions, new policies before i_m and old ones after it.
    With clipping, a joint action no longer counts once its ratio has gone beyond 1 + epsilon (if A > 0) or 1 - epsilon
    (if A < 0). Without, this g is `agent_objective` up to a constant per state.
    """
    rng = np.random.default_rng(4)
    clipped = []
    for k in range(60):
        game, logits = random_game(rng, GAMMAS[k % len(GAMMAS)])
        n, lr = len(logits), 10 ** rng.uniform(-1, 0.5)
        old, order = [softmax(rows) for rows in logits], list(rng.permutation(n))
        sol, new = solve(game, old), list(old)
        actors = [TabularActor(rows) for rows in logits]
        args = happo.Args(fixed_order=True, learning_rate=lr)
        changes = {"update_epochs": k % 5 + 1, "clip_coef": epsilon, "max_grad_norm": np.inf}
        for name, value in (HAPPO | changes).items():
            setattr(args, name, value)  # of the constructor an epsilon above 1 would be refused
        run_happo([actors[i] for i in order], exact_batch(game, old, order), args, optimizer=SGD)
        for m, i in enumerate(order):
            weighted = (
                joint([np.ones_like(pi) if j == i else pi for j, pi in enumerate(new)]) * sol.A
            )
            expected = logits[i].copy()
            for _ in range(args.update_epochs):
                pi = softmax(expected)
                ratio = along(pi / old[i], i, n)
                counts = np.where(sol.A > 0, ratio < 1 + epsilon, ratio > 1 - epsilon)
                clipped.append(np.mean(~counts))
                g = np.moveaxis(weighted * counts, i + 1, 1).reshape(*pi.shape, -1).sum(-1)
                expected += lr * sol.rho[:, None] * pi * (g - (pi * g).sum(1, keepdims=True))
            np.testing.assert_allclose(actors[i].logits(), expected, rtol=0, atol=1e-11)
            if epsilon == 1e9:
                objective = agent_objective(sol.Q, old, new, order[:m], i)
                np.testing.assert_allclose(np.ptp(g - objective, axis=1), 0, rtol=0, atol=1e-11)
            new[i] = softmax(expected)
    assert (np.mean(np.array(clipped) > 0) > 0.2) == (epsilon < 1)


def test_hatrpo_step_is_the_natural_gradient():
    """The natural gradient of L^{i_m} in the logits is g = `agent_objective` itself, up to a constant per state.

    (Kakade 2001.) With H = sum over s of d(s) (diag(pi) - pi pi^T), d = (1 - gamma) rho, no damping, an exact solve:
    logits += alpha^j sqrt(2 delta / (sum over s of d(s) E_pi g^2)) (g - mean over a of g), with the first alpha^j that
    makes the gain at least kappa times the linear one, and the KL at most delta. Radii from tiny to absurd.
    """
    rng = np.random.default_rng(5)
    reasons = Counter()
    for k in range(90):
        game, logits = random_game(rng, GAMMAS[k % len(GAMMAS)])
        # Far above the absolute tolerance of the conjugate gradient
        game = game._replace(r=1e6 * game.r)
        old, order = [softmax(rows) for rows in logits], list(rng.permutation(len(logits)))
        sol, new = solve(game, old), list(old)
        actors = [TabularActor(rows) for rows in logits]
        exact_solve = TRUST_REGION | {"cg_damping": 0.0, "cg_iters": 100, "backtrack_iters": 5}
        args = hatrpo.Args(**exact_solve, fixed_order=True, target_kl=10 ** rng.uniform(-4, 1))
        run_hatrpo([actors[i] for i in order], exact_batch(game, old, order), args)
        for m, i in enumerate(order):
            g, d = agent_objective(sol.Q, old, new, order[:m], i), (1 - game.gamma) * sol.rho
            step = np.sqrt(2 * args.target_kl / (d @ (old[i] * g**2).sum(1))) * (
                g - g.mean(1, keepdims=True)
            )
            for scale in [*args.backtrack_coeff ** np.arange(6), 0.0]:
                candidate = softmax(logits[i] + scale * step)
                gain, linear = (
                    sol.rho @ (g * x).sum(1) for x in (candidate, scale * old[i] * step)
                )
                too_little, too_far = (
                    gain < args.accept_ratio * linear,
                    d @ kl(old[i], candidate) > args.target_kl,
                )
                if scale == 0 or not (too_little or too_far):
                    break
                reasons[too_little, too_far] += 1
            reasons[scale] += 1
            moved = actors[i].logits() - logits[i]
            np.testing.assert_allclose(moved, scale * step, rtol=0, atol=1e-6 * np.abs(step).max())
            new[i] = candidate
    # Full steps, rejected updates, and steps that only one of the two conditions refuses.
    assert min(reasons[1.0], reasons[0.0], reasons[True, False], reasons[False, True]) > 8


# A game in which simultaneous updates do harm, and sequential ones do not

JUNCTION_GAMMA = 0.9
JUNCTION_GO = (0.10, 0.35, 0.40)  # how likely each agent goes, at first


def junction() -> Game:
    """Three agents at a junction (state 0), all may wait (0) or go (1). Exactly one goes: reward 1.

    Two or three go: no reward, and a jam (state 1), which clears with probability 1/2 per step, whatever they do.
    Found by a search over the first policies, the probability of clearing and the size of the update.
    """
    P, r = np.zeros((2, 2, 2, 2, 2)), np.zeros((2, 2, 2, 2))
    P[1] = 0.5
    for actions in product((0, 1), repeat=3):
        P[0, *actions, int(sum(actions) >= 2)] = 1
        r[0, *actions] = sum(actions) == 1
    return Game(P, r, np.array([1.0, 0.0]), JUNCTION_GAMMA)


def junction_return(p1: float, p2: float, p3: float) -> float:
    """J = e / ((1 - gamma) (1 + kappa c)), kappa = 2 gamma / (2 - gamma); e: exactly one goes, c: more than one.

    From V0 = e + gamma ((1 - c) V0 + c V1) and V1 = gamma (V0 + V1) / 2. At the first policies all three dJ/dp are
    negative: each agent alone does well to wait more often. If all do, too often nobody goes. One after the other, the
    last of them to move (or the last but one) sees that the others wait more, and goes more often instead.
    """
    e = p1 * (1 - p2) * (1 - p3) + p2 * (1 - p1) * (1 - p3) + p3 * (1 - p1) * (1 - p2)
    c = p1 * p2 + p1 * p3 + p2 * p3 - 2 * p1 * p2 * p3
    return e / ((1 - JUNCTION_GAMMA) * (1 + 2 * JUNCTION_GAMMA / (2 - JUNCTION_GAMMA) * c))


def junction_actors(agents: Sequence[int]) -> list[TabularActor]:
    """The agents' first policies; what they do in the jam does not matter."""
    return [
        TabularActor(np.log([[1 - JUNCTION_GO[i], JUNCTION_GO[i]], [0.5, 0.5]])) for i in agents
    ]


def outcome(actors: Sequence[TabularActor], order: Sequence[int]) -> tuple[float, ndarray]:
    """What the update changed: the return, relative to the first policies', and how often each agent goes."""
    policies = [
        actor.policy()
        for _, actor in sorted(zip(order, actors, strict=True), key=lambda pair: pair[0])
    ]
    p = [pi[0, 1] for pi in policies]
    np.testing.assert_allclose(solve(junction(), policies).J, junction_return(*p), rtol=1e-12)
    return junction_return(*p) / junction_return(*JUNCTION_GO) - 1, np.array(p) - JUNCTION_GO


def test_alone_every_agent_should_wait_more():
    """dJ/dp of the closed form by central differences."""
    for step in 1e-5 * np.eye(3):
        slope = (
            junction_return(*(JUNCTION_GO + step)) - junction_return(*(JUNCTION_GO - step))
        ) / 2e-5
        assert slope < -0.1


@pytest.mark.parametrize(
    ("algorithm", "loss", "gain"), [("happo", 0.03, 0.08), ("hatrpo", 0.08, 0.14)]
)
def test_simultaneous_updates_lower_the_return_and_sequential_ones_raise_it(
    algorithm: str, loss: float, gain: float
):
    """MAPPO against HAPPO in every order: the same policies, batch, learning rate, epochs and epsilon.

    And HATRPO in every order against the same trust-region steps, each taken as if its agent were the first.
    """
    size = CLIPPED | {"learning_rate": 0.03, "update_epochs": 10, "clip_coef": 0.3}
    radius = hatrpo.Args(**TRUST_REGION, fixed_order=True, target_kl=0.05)
    game, old = junction(), [actor.policy() for actor in junction_actors(range(3))]
    together = junction_actors(range(3))
    if algorithm == "happo":
        run_mappo(together, exact_batch(game, old, range(3)), mappo.Args(**size))
    else:
        for i, actor in enumerate(together):
            run_hatrpo([actor], exact_batch(game, old, [i]), radius)
    change, moved = outcome(together, range(3))
    assert change < -loss
    assert max(moved) < -0.03
    for order in permutations(range(3)):
        actors = junction_actors(order)
        if algorithm == "happo":
            run_happo(
                actors,
                exact_batch(game, old, order),
                happo.Args(**HAPPO | size, fixed_order=True),
            )
        else:
            run_hatrpo(actors, exact_batch(game, old, order), radius)
        change, moved = outcome(actors, order)
        assert change > gain
        assert moved[order[0]] < -0.03
        assert max(moved) > 0.1
        alone = junction_actors(range(3))
        alone[order[0]] = actors[0]
        assert outcome(alone, range(3))[0] > 0.003  # a step of this size by one agent does no harm


def junction_sample() -> tuple[list[ndarray], ndarray]:
    """The actions and advantages of 1,000 visits to the junction, each joint action as often as it is expected.

    The first policies go in tenths and twentieths, so that all the counts are whole. In the jam A is 0.
    """
    game, old = junction(), [actor.policy() for actor in junction_actors(range(3))]
    prob = joint(old)[0]
    counts = np.rint(1000 * prob).astype(int)
    np.testing.assert_allclose(counts, 1000 * prob, rtol=0, atol=1e-9)
    joint_actions = np.indices(prob.shape).reshape(3, -1)
    A = solve(game, old).A[0]
    actions = np.repeat(joint_actions, counts.ravel(), axis=1)
    return list(actions), np.repeat(A.ravel(), counts.ravel())


def run_happo_on_sample(
    order: Sequence[int], changed: dict[str, Any], optimizer: Callable = Adam
) -> list[TabularActor]:
    """HAPPO's update of the first policies with the sample, where a row is a visit; the advantages are normalised."""
    actions, A = junction_sample()
    obs = torch.tensor([[0.0, 1.0]]).double().expand(len(A), 2)
    in_order = [torch.tensor(actions[i][:, None]) for i in order]
    advantages = torch.tensor(A / A.std())
    args = happo.Args(fixed_order=True)
    settings = {**CLIPPED, "update_epochs": 10, **changed}
    for name, value in settings.items():
        setattr(args, name, value)
    actors = junction_actors(order)
    run_happo(actors, ([obs] * 3, in_order, advantages), args, optimizer)
    return actors


def test_M_without_its_mean_raises_the_return_as_well():
    """HAPPO as it is by default, where simultaneous updates lower the return: see the test above."""
    for order in permutations(range(3)):
        actors = run_happo_on_sample(order, {"learning_rate": 0.03, "clip_coef": 0.3})
        change, moved = outcome(actors, order)
        assert change > 0.08
        assert moved[order[0]] < -0.03
        assert max(moved) > 0.1


def test_the_mean_of_M_does_not_matter_where_the_batch_is_as_expected():
    """A constant times the mean ratio: that is 1 for any policy, on a batch with each action as often as expected."""
    size = {"learning_rate": 0.3, "clip_coef": 1e9}
    for order in permutations(range(3)):
        with_mean = run_happo_on_sample(order, {**size, "keep_mean": True}, SGD)
        without = run_happo_on_sample(order, {**size, "keep_mean": False}, SGD)
        for m, i in enumerate(order):
            policy = with_mean[m].policy()
            np.testing.assert_allclose(without[m].policy(), policy, rtol=0, atol=1e-12)
            assert abs(policy[0, 1] - JUNCTION_GO[i]) > 0.003


# (c) Shared parameters


def split(n: int) -> Game:
    """One state, one step: reward 1 if the first half of the agents plays 0 and the second 1, or the reverse."""
    r = np.zeros((1, *[2] * n))
    r[(0, *[0] * (n // 2), *[1] * (n // 2))] = r[(0, *[1] * (n // 2), *[0] * (n // 2))] = 1
    return Game(np.ones((*r.shape, 1)), r, np.ones(1), 0.0)


def train_on_split(n: int, actors: Sequence[TabularActor], lr: float) -> list[float]:
    """40 iterations of HAPPO on exact advantages; the return before each of them and at the end."""
    optimizer = Adam(nn.ModuleList(actors).parameters(), lr=lr)
    args = happo.Args(**HAPPO)
    torch.manual_seed(0)
    game = split(n)
    returns = []
    for _ in range(40):
        policies = [actor.policy() for actor in actors]
        returns.append(solve(game, policies).J)
        batch = exact_batch(game, policies, range(n))
        happo.happo_update(actors, optimizer, *batch, args)
    return [*returns, solve(game, [actor.policy() for actor in actors]).J]


@pytest.mark.parametrize("n", [2, 4, 6])
def test_shared_parameters_reach_two_to_the_minus_n_of_what_separate_ones_reach(n: int):
    """With one policy for all, J = 2 p^(n/2) (1 - p)^(n/2) <= 2 / 2^n (Kuba et al., proposition 1); else J = 1."""
    best = 2 / 2**n
    p = np.linspace(0, 1, 101)
    closed_form = 2 * p ** (n // 2) * (1 - p) ** (n // 2)
    exact = [solve(split(n), [np.array([[1 - q, q]])] * n).J for q in p]
    np.testing.assert_allclose(exact, closed_form, rtol=0, atol=1e-15)
    assert np.argmax(closed_form) == 50
    assert closed_form[50] == best
    for seed in range(3):
        rng = np.random.default_rng(seed)
        shared = train_on_split(n, [TabularActor(np.array([[0, rng.uniform(1, 2)]]))] * n, lr=0.03)
        assert max(shared) <= best * (1 + 1e-12)
        assert shared[0] < 0.8 * best
        assert shared[-1] > 0.95 * best
        separate = train_on_split(
            n, [TabularActor(rng.normal(size=(1, 2))) for _ in range(n)], lr=0.1
        )
        assert separate[0] < 0.6
        assert separate[-1] > 0.99
