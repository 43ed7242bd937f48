"""What the learner is fed: advantages, running normalisation, and the rollout as the main loop stores it."""

import itertools

import numpy as np
import pytest
import torch
from conftest import mlp, update_of
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from scipy import stats

import envs
import hatrpo_mamujoco as hatrpo

# Generalised advantage estimation


def gae_problem():
    """Five steps in which each of 4^5 environments has another pattern of nothing, termination, truncation, both."""
    ends = np.array(list(itertools.product(range(4), repeat=5))).T
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, *ends.shape))
    return rewards, values, next_values, ends % 2 * 1.0, ends // 2 * 1.0


def shipped_gae(script, problem, gamma, gae_lambda):
    """Run `compute_gae` in float64; return NumPy arrays."""
    rewards, values, next_values, *ends = map(torch.tensor, problem)
    advantages, returns = script.compute_gae(rewards, values, next_values, tuple(ends), gamma, gae_lambda)
    assert advantages.dtype == returns.dtype == torch.float64
    return advantages.numpy(), returns.numpy()


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.7, 0.6), (1, 1), (0.9, 0), (0, 0.5)])
def test_gae_is_the_sum_of_discounted_td_errors(script, gamma, gae_lambda):
    """Every pattern of ends: A_t is the sum of (gamma lambda)^k delta_{t+k} up to the end of its own episode."""
    rewards, values, next_values, terminations, truncations = problem = gae_problem()
    advantages, returns = shipped_gae(script, problem, gamma, gae_lambda)
    num_steps, num_envs = rewards.shape
    for t, e in itertools.product(range(num_steps), range(num_envs)):
        total = 0.0
        for k in range(num_steps - t):
            s = t + k
            after = 0.0 if terminations[s, e] else next_values[s, e]
            total += (gamma * gae_lambda) ** k * (rewards[s, e] + gamma * after - values[s, e])
            if terminations[s, e] or truncations[s, e]:
                break
        assert advantages[t, e] == pytest.approx(total, rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(returns, advantages + values, rtol=0, atol=1e-12)


def test_gae_with_lambda_1_is_the_discounted_return(script):
    """With lambda = 1 the critic's target is the rewards to the episode's end, then V there unless it terminated."""
    gamma = 0.9
    rewards, values, next_values, terminations, truncations = problem = gae_problem()
    goes_on = terminations[:-1] + truncations[:-1] == 0  # there the next state is the one that the next step acts in
    next_values[:-1][goes_on] = values[1:][goes_on]
    _, returns = shipped_gae(script, problem, gamma, 1.0)
    num_steps, num_envs = rewards.shape
    for t, e in itertools.product(range(num_steps), range(num_envs)):
        ends = [s for s in range(t, num_steps) if terminations[s, e] or truncations[s, e]]
        last = ends[0] if ends else num_steps - 1
        powers = gamma ** np.arange(last - t + 2)
        tail = 0.0 if terminations[last, e] else next_values[last, e]
        assert returns[t, e] == pytest.approx(powers @ [*rewards[t : last + 1, e], tail], rel=1e-12, abs=1e-12)


def test_gae_on_a_single_hand_computed_episode(script):
    """Two steps by hand: r = 1, 2; V = 3, 4; V' = 4, 5; gamma 0.5, lambda 0.5; truncated, then the same terminated."""
    columns = [1, 2], [3, 4], [4, 5], [0, 0], [0, 1]
    *column, terminations, truncations = (torch.tensor(c, dtype=torch.float64)[:, None] for c in columns)
    ends = terminations, truncations
    truncated, _ = script.compute_gae(*column, ends, 0.5, 0.5)
    assert truncated[:, 0].tolist() == [0.25 * 0.5, 0.5]  # deltas 1 + 2 - 3 = 0, 2 + 2.5 - 4 = 0.5
    terminations[1] = 1
    terminated, _ = script.compute_gae(*column, ends, 0.5, 0.5)
    assert terminated[:, 0].tolist() == [0.25 * -2, -2]  # delta 2 - 4


# Running normalisation

OBS_DIM, LOW, HIGH = 6, np.float32([-1, -0.4, 0, -3, 2]), np.float32([1, 0.4, 2, 1, 2.5])
PARTITION = envs.Partition(
    obs_ids=(np.array([0, 2, 3]), np.array([1, 2, 4, 5])), act_ids=(np.array([3, 0]), np.array([4, 2, 1]))
)


class TapeVec:
    """A vector environment that plays known tables back; `ends[t, e]` adds 1 for a termination, 2 for a truncation."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_steps, num_envs=3, seed=0):
        rng = np.random.default_rng(seed)
        self.num_envs, self.partition = num_envs, PARTITION
        self.single_observation_space = Box(-np.inf, np.inf, (OBS_DIM,), np.float64)
        self.single_action_space = Box(LOW, HIGH)
        self.obs = rng.normal(2, 3, (num_steps + 1, num_envs, OBS_DIM))  # [t + 1] is what step t returns
        self.final_obs = rng.normal(-4, 20, (num_steps, num_envs, OBS_DIM))
        self.rewards = rng.normal(1, 2, (num_steps, num_envs))
        self.ends = rng.choice(4, (num_steps, num_envs), p=[0.55, 0.15, 0.15, 0.15])
        self.actions, self.t = [], 0

    def reset(self, *, seed):
        self.t, self.seed = 0, seed
        return self.obs[0].copy(), {}

    def step(self, actions):
        t, self.t = self.t, self.t + 1
        self.actions.append(np.array(actions))
        done, infos = self.ends[t] > 0, {}
        if done.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            for e in np.flatnonzero(done):
                final_obs[e] = self.final_obs[t, e].copy()
            infos |= {"final_obs": final_obs, "_final_obs": done}
        return self.obs[t + 1].copy(), self.rewards[t].copy(), self.ends[t] % 2 > 0, self.ends[t] // 2 > 0, infos


def mean_and_var(samples):
    """Mean and variance of all samples, to which the prior (mean 0, variance 1) counts as 1e-4 of a sample."""
    x = np.concatenate(samples)
    total = len(x) + 1e-4
    mean = x.sum(0) / total
    return mean, ((x**2).sum(0) + 1e-4) / total - mean**2


def expected_rollout(vec, gamma):
    """What `NormalizedEnv` must make of the tables: obs [T + 1, ...], next_obs and rewards [T, ...]."""
    obs, next_obs, rewards, seen_returns = [], [], [], []
    discounted = np.zeros(vec.num_envs)
    for t in range(len(vec.rewards) + 1):
        mean, var = mean_and_var(list(vec.obs[: t + 1]))
        obs.append(np.clip((vec.obs[t] - mean) / np.sqrt(var + 1e-8), -10, 10))
        if t == 0:
            continue
        done = vec.ends[t - 1] > 0
        led_to = np.where(done[:, None], vec.final_obs[t - 1], vec.obs[t])
        next_obs.append(np.clip((led_to - mean) / np.sqrt(var + 1e-8), -10, 10))
        discounted = gamma * discounted + vec.rewards[t - 1]
        seen_returns.append(discounted[:, None])
        _, (var,) = mean_and_var(seen_returns)
        rewards.append(np.clip(vec.rewards[t - 1] / np.sqrt(var + 1e-8), -10, 10))
        discounted = np.where(done, 0, discounted)
    return np.array(obs), np.array(next_obs), np.array(rewards)


def tape_with_outliers(num_steps):
    """Tables in which one reward is so large that it is clipped, as some of the last observations are."""
    vec = TapeVec(num_steps)
    vec.rewards[-2, 1] = 1e4
    return vec


def test_step_returns_the_true_last_observation_and_the_next_first_one(script):
    """Observations, last observations and rewards, normalised with the statistics of all that came before and now."""
    vec = tape_with_outliers(num_steps=60)
    assert set(np.unique(vec.ends)) == {0, 1, 2, 3}
    obs, next_obs, rewards = expected_rollout(vec, 0.9)
    assert (np.abs(next_obs) == 10).any() and (rewards == 10).any()
    env = script.NormalizedEnv(vec, 0.9, torch.device("cpu"))
    np.testing.assert_allclose(env.reset(5), obs[0], atol=1e-5)
    assert vec.seed == 5
    for t in range(60):
        result = env.step(torch.zeros(3, 5))
        assert all(x.dtype == torch.float32 for x in result)
        expected = obs[t + 1], next_obs[t], rewards[t], vec.ends[t] % 2, vec.ends[t] // 2
        for got, value in zip(result, expected, strict=True):
            np.testing.assert_allclose(got, value, atol=1e-5)
        assert env.obs is result[0]


def test_episodes_are_added_up(script):
    """Undiscounted return and length of every episode that ended, in the order of the ends."""
    vec = TapeVec(num_steps=30)
    env = script.NormalizedEnv(vec, 0.9, torch.device("cpu"))
    env.reset(0)
    expected, first = [], [0] * 3
    for t in range(30):
        env.step(torch.zeros(3, 5))
        for e in np.flatnonzero(vec.ends[t]):
            expected.append([vec.rewards[first[e] : t + 1, e].sum(), t + 1 - first[e]])
            first[e] = t + 1
    np.testing.assert_allclose(env.episodes, expected, rtol=1e-12)


def test_statistics_go_through_a_checkpoint(script):
    """What has loaded another's state goes on like that, to the last bit, and gives the environments theirs."""
    vec = TapeVec(num_steps=40)
    env, other = (script.NormalizedEnv(vec, 0.9, torch.device("cpu")) for _ in range(2))
    env.reset(0)
    for _ in range(20):
        env.step(torch.zeros(3, 5))
    vec.get_state, states = (lambda: {"t": vec.t}), []
    vec.set_state = states.append
    other.load_state_dict(env.state_dict())
    assert states == [{"t": 20}] and torch.equal(env.obs, other.obs)
    for _ in range(20):
        expected = env.step(torch.zeros(3, 5))
        vec.t -= 1
        assert all(map(torch.equal, other.step(torch.zeros(3, 5)), expected))
    with pytest.raises(ValueError):
        script.NormalizedEnv(TapeVec(1, num_envs=2), 0.9, torch.device("cpu")).load_state_dict(env.state_dict())


def test_evaluation_plays_first_episodes_and_changes_no_statistics(script):
    """Without noise, normalised with what was there, each environment until its first end; nothing is changed by it."""
    vec, eval_vec = TapeVec(num_steps=10), TapeVec(num_steps=40, seed=1)
    env, seen = script.NormalizedEnv(vec, 0.9, torch.device("cpu")), []
    env.reset(0)
    for _ in range(10):
        env.step(torch.zeros(3, 5))
    mean, var = mean_and_var(list(vec.obs))
    before = env.state_dict()

    class Policy:
        def act(self, obs, generator=None):
            assert generator is None
            seen.append(obs)
            return torch.full((3, 5), -0.5)

    result = script.evaluate(eval_vec, env, Policy(), 7)
    assert eval_vec.seed == 1_000_007
    last = [int(np.flatnonzero(eval_vec.ends[:, e])[0]) for e in range(3)]
    assert len(set(last)) > 1 and len(seen) == max(last) + 1
    normalized = np.clip((eval_vec.obs[: len(seen)] - mean) / np.sqrt(var + 1e-8), -10, 10)
    np.testing.assert_allclose(torch.stack(seen), normalized, atol=1e-5)
    np.testing.assert_allclose(eval_vec.actions, 0.75 * LOW + 0.25 * HIGH + np.zeros((len(seen), 3, 5)), rtol=1e-6)
    returns = [eval_vec.rewards[: t + 1, e].sum() for e, t in enumerate(last)]
    expected = {"": np.mean(returns), "_std": np.std(returns), "_min": min(returns), "_max": max(returns)}
    expected = {f"eval/episodic_return{key}": value for key, value in expected.items()}
    assert result == pytest.approx(expected | {"eval/episodic_length": np.mean(last) + 1})
    after = env.state_dict()
    assert torch.equal(before.pop("obs"), after.pop("obs")) and before == after


def test_only_one_kind_of_autoreset_is_taken(script):
    """With another, the first observation of an episode would be taken for the last of the one before."""
    vec = TapeVec(num_steps=1)
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED, None):
        vec.metadata = {"autoreset_mode": mode}
        with pytest.raises(ValueError, match="SAME_STEP"):
            script.NormalizedEnv(vec, 0.9, torch.device("cpu"))


def test_actions_are_clipped_and_scaled_to_the_actuators_range(script):
    """From -1 to 1 runs linearly from each actuator's own low to its high; beyond, it stays there."""
    vec = TapeVec(num_steps=1)
    env = script.NormalizedEnv(vec, 0.9, torch.device("cpu"))
    env.reset(0)
    actions = torch.tensor(np.random.default_rng(0).normal(0, 1.5, (3, 5)), dtype=torch.float32)
    assert (actions < -1).any() and (actions > 1).any()
    env.step(actions)
    for a in range(5):
        expected = np.interp(actions[:, a], [-1, 1], [LOW[a], HIGH[a]])
        np.testing.assert_allclose(vec.actions[0][:, a], expected, rtol=1e-6, atol=1e-6)


# The main loop


def record_calls(monkeypatch, script, names):
    """Let the named functions of a script leave on a list what they got, what they gave, and the networks before."""
    calls = []

    def copied(x):  # the loop writes over its buffers
        return x.clone() if isinstance(x, torch.Tensor) else tuple(map(copied, x)) if isinstance(x, tuple) else x

    def spy_on(name, shipped):
        def spy(*args):
            calls.append(call := {"name": name, "args": [copied(x) for x in args]})
            if name != "compute_gae":
                networks = args[0] if isinstance(args[0], list) else [args[0]]
                call["thetas"] = [network.theta.detach().clone().double() for network in networks]
                optimizers = [arg for arg in args if isinstance(arg, torch.optim.Optimizer)]
                call["lr"] = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
            call["result"] = shipped(*args)
            return call["result"]

        monkeypatch.setattr(script, name, spy)

    for name in names:
        spy_on(name, getattr(script, name))
    return calls


@pytest.mark.parametrize("share_param", [False, True], ids=["separate", "shared"])
def test_main_stores_and_passes_on_what_happened(script, share_param, monkeypatch, tmp_path):
    """Two iterations of `main` on known tables: everything that reaches GAE, the actors and the critic is right."""
    if script.__name__.startswith("ippo"):
        pytest.skip("its critics are another matter: test_ippo.py")
    num_steps, num_envs, gamma = 9, 3, 0.8
    vec = TapeVec(2 * num_steps)
    assert (vec.ends[:num_steps] == 3).any() and (vec.ends[num_steps - 1] > 0).any()
    monkeypatch.setattr(envs, "make_vec", lambda *_: vec)
    update = update_of(script).__name__
    calls = record_calls(monkeypatch, script, ["compute_gae", update, "critic_update"])
    sizes = {"num_envs": num_envs, "num_steps": num_steps, "total_timesteps": 2 * num_steps * num_envs}
    sizes |= {"num_minibatches": 3, "critic_epochs": 2, "hidden_sizes": (8, 7), "eval_episodes": 0}
    settings = {"gamma": gamma, "gae_lambda": 0.7, "critic_learning_rate": 0.01, "anneal_lr": True, "seed": 11}
    args = script.Args(**sizes, **settings, share_param=share_param, env_id="Tape-2", run_dir=str(tmp_path / "run"))
    for key, value in {"target_kl": 0.1, "learning_rate": 0.05, "update_epochs": 3}.items():
        if hasattr(args, key):  # steps so long that a second iteration with the first one's policy would show
            setattr(args, key, value)
    try:
        script.main(args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert vec.seed == 11
    assert [call["name"] for call in calls] == 2 * ["compute_gae", update, "critic_update"]

    obs, next_obs, rewards = expected_rollout(vec, gamma)
    for iteration, (gae, actors, critic) in enumerate((calls[:3], calls[3:])):
        rows = slice(iteration * num_steps, (iteration + 1) * num_steps)
        b_obs = torch.tensor(obs[rows].reshape(-1, OBS_DIM))

        # Advantages: V of the true last observations, the flags apart from each other
        (theta,), inputs = critic["thetas"], torch.tensor(np.stack([obs[:-1], next_obs])[:, rows])
        values = mlp(theta, inputs, (8, 7, 1))[0][..., 0]
        expected = rewards[rows], *values, vec.ends[rows] % 2, vec.ends[rows] // 2
        assert gae["args"][4:] == [gamma, 0.7]
        for got, value in zip((*gae["args"][:3], *gae["args"][3]), expected, strict=True):
            np.testing.assert_allclose(got, value, atol=1e-4)

        # Actors: own observations, own actions, drawn by the policy before its update, one normalisation over the batch
        agents_obs, agents_actions, advantages = actors["args"][-5:-2]
        joint_actions, noise = torch.zeros(num_steps * num_envs, 5), []
        for i, (obs_ids, act_ids) in enumerate(zip(PARTITION.obs_ids, PARTITION.act_ids, strict=True)):
            seen = torch.zeros(len(b_obs), 4, dtype=torch.float64)
            seen[:, : len(obs_ids)] = b_obs[:, obs_ids]
            if share_param:
                seen = torch.cat([seen, torch.eye(2)[[i] * len(seen)]], dim=1)
            np.testing.assert_allclose(agents_obs[i], seen, atol=1e-5)
            mean, log_std = mlp(actors["thetas"][i], seen, (8, 7, 3))
            n = len(act_ids)
            noise.append((agents_actions[i] - mean[:, :n]) / log_std[:n].exp())
            joint_actions[:, act_ids] = agents_actions[i]
        assert stats.kstest(torch.cat(noise, 1).flatten(), "norm").pvalue > 0.01
        applied = np.concatenate(vec.actions[rows])
        for a in range(5):
            expected = np.interp(joint_actions[:, a], [-1, 1], [LOW[a], HIGH[a]])
            np.testing.assert_allclose(applied[:, a], expected, atol=1e-5)
        raw = gae["result"][0].double().flatten()
        np.testing.assert_allclose(advantages, (raw - raw.mean()) / raw.std(), atol=1e-5)

        # Critic: after the actors, the whole observation, the returns as they are
        np.testing.assert_allclose(critic["args"][2], b_obs, atol=1e-5)
        np.testing.assert_allclose(critic["args"][3], gae["result"][1].flatten(), atol=0)

        # Learning rates: 1, then 1/2
        assert critic["lr"] == pytest.approx([args.critic_learning_rate * (1 - iteration / 2)])
        assert actors["lr"] == pytest.approx([0.05 * (1 - iteration / 2)] * (script is not hatrpo))
