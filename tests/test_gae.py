"""What the learner is fed: advantages, running normalisation, and the rollout as the main loop stores it."""

import itertools

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

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
    advantages, returns = script.compute_gae(*map(torch.tensor, problem), gamma, gae_lambda)
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
    column = [torch.tensor(c, dtype=torch.float64)[:, None] for c in ([1, 2], [3, 4], [4, 5], [0, 0], [0, 1])]
    truncated, _ = script.compute_gae(*column, 0.5, 0.5)
    assert truncated[:, 0].tolist() == [0.25 * 0.5, 0.5]  # deltas 1 + 2 - 3 = 0, 2 + 2.5 - 4 = 0.5
    column[3][1] = 1
    terminated, _ = script.compute_gae(*column, 0.5, 0.5)
    assert terminated[:, 0].tolist() == [0.25 * -2, -2]  # delta 2 - 4


# Running normalisation

OBS_DIM, LOW, HIGH = 6, np.float32([-1, -0.4, 0, -3, 2]), np.float32([1, 0.4, 2, 1, 2.5])
PARTITION = envs.Partition(
    obs_ids=(np.array([0, 2, 3]), np.array([1, 2, 4, 5])), act_ids=(np.array([3, 0]), np.array([4, 2, 1]))
)


class TapeVec:
    """A vector environment that plays known tables back; `ends[t, e]` adds 1 for a termination, 2 for a truncation."""

    unwrapped = property(lambda self: self)

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
            infos |= {"episode": {"r": np.full(self.num_envs, 7.0), "l": np.full(self.num_envs, 3)}, "_episode": done}
        return self.obs[t + 1].copy(), self.rewards[t].copy(), self.ends[t] % 2 > 0, self.ends[t] // 2 > 0, infos

    def close(self):
        pass


def mean_and_var(samples):
    """Mean and variance of all samples, to which the prior (mean 0, variance 1) counts as 1e-4 of a sample."""
    x = np.concatenate(samples)
    total = len(x) + 1e-4
    mean = x.sum(0) / total
    return mean, ((x**2).sum(0) + 1e-4) / total - mean**2


def expected_rollout(vec, gamma, clip):
    """What `NormalizedEnv` must make of the tables: obs [T + 1, ...], next_obs and rewards [T, ...]."""
    obs, next_obs, rewards, seen_returns = [], [], [], []
    discounted = np.zeros(vec.num_envs)
    for t in range(len(vec.rewards) + 1):
        mean, var = mean_and_var(list(vec.obs[: t + 1]))
        obs.append(np.clip((vec.obs[t] - mean) / np.sqrt(var + 1e-8), -clip, clip))
        if t == 0:
            continue
        done = vec.ends[t - 1] > 0
        led_to = np.where(done[:, None], vec.final_obs[t - 1], vec.obs[t])
        next_obs.append(np.clip((led_to - mean) / np.sqrt(var + 1e-8), -clip, clip))
        discounted = gamma * discounted + vec.rewards[t - 1]
        seen_returns.append(discounted[:, None])
        _, (var,) = mean_and_var(seen_returns)
        rewards.append(np.clip(vec.rewards[t - 1] / np.sqrt(var + 1e-8), -clip, clip))
        discounted = np.where(done, 0, discounted)
    return np.array(obs), np.array(next_obs), np.array(rewards)


def test_running_mean_std_equals_numpy_over_everything_seen(script):
    """Batches of different sizes, one of them a single sample; the prior counts as 1e-4 of a sample."""
    rng = np.random.default_rng(0)
    batches = [rng.normal([1, -5, 0], [2, 0.1, 3], (n, 3)) for n in (4, 1, 7, 1000, 3000)]
    rms = script.RunningMeanStd(3)
    for i, batch in enumerate(batches):
        rms.update(torch.tensor(batch))
        mean, var = mean_and_var(batches[: i + 1])
        np.testing.assert_allclose(rms.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(rms.var, var, rtol=1e-9)
        assert rms.count.item() == pytest.approx(sum(map(len, batches[: i + 1])) + 1e-4, abs=1e-9)
    everything = np.concatenate(batches)
    np.testing.assert_allclose(rms.mean, everything.mean(0), atol=1e-6)
    np.testing.assert_allclose(rms.var, everything.var(0), rtol=1e-4)
    assert set(rms.state_dict()) == {"mean", "var", "count"}
    assert all(value.dtype == torch.float64 for value in rms.state_dict().values())


@pytest.mark.parametrize("clip", [1.0, 10.0])
def test_step_returns_the_true_last_observation_and_the_next_first_one(script, clip):
    """Observations, last observations and rewards, normalised with the statistics of all that came before and now."""
    vec = TapeVec(num_steps=30)
    assert set(np.unique(vec.ends)) == {0, 1, 2, 3}
    obs, next_obs, rewards = expected_rollout(vec, 0.9, clip)
    assert (np.abs(next_obs) == clip).any() and (clip > 1 or (np.abs(rewards) == clip).any())
    env = script.NormalizedEnv(vec, 0.9, torch.device("cpu"), clip)
    np.testing.assert_allclose(env.reset(5), obs[0], atol=1e-5)
    assert vec.seed == 5
    for t in range(30):
        *result, infos = env.step(torch.zeros(3, 5))
        assert all(x.dtype == torch.float32 for x in result)
        for got, expected in zip(result, (obs[t + 1], next_obs[t], rewards[t]), strict=False):
            np.testing.assert_allclose(got, expected, atol=1e-5)
        assert (result[3].numpy() == vec.ends[t] % 2).all()
        assert (result[4].numpy() == vec.ends[t] // 2).all()
        assert ("_episode" in infos) == (vec.ends[t] > 0).any()


def test_statistics_are_frozen_when_not_training(script):
    """With training off nothing changes to the last bit, and what is seen is normalised with what was there."""
    vec = TapeVec(num_steps=20)
    env = script.NormalizedEnv(vec, 0.9, torch.device("cpu"))
    env.reset(0)
    for _ in range(10):
        env.step(torch.zeros(3, 5))
    mean, var = mean_and_var(list(vec.obs[:11]))
    return_std = env.return_rms.var.sqrt().item()
    buffers = [env.returns, *env.obs_rms.buffers(), *env.return_rms.buffers()]
    before = [b.clone() for b in buffers]

    env.training = False
    np.testing.assert_allclose(env.reset(0), (vec.obs[0] - mean) / np.sqrt(var), atol=1e-5)
    for t in range(20):
        obs, _, rewards, *_ = env.step(torch.zeros(3, 5))
        np.testing.assert_allclose(obs, (vec.obs[t + 1] - mean) / np.sqrt(var), atol=1e-5)
        np.testing.assert_allclose(rewards, vec.rewards[t] / return_std, atol=1e-5)
    after = [env.returns, *env.obs_rms.buffers(), *env.return_rms.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


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
        return x.clone() if isinstance(x, torch.Tensor) else [copied(y) for y in x] if isinstance(x, list) else x

    def spy_on(name, shipped):
        def spy(*args):
            calls.append(call := {"name": name, "args": [copied(x) for x in args]})
            if name == "critic_update":
                call["lr"] = args[1].param_groups[0]["lr"]
                call["critic"] = [p.detach().clone().double() for p in args[0].parameters()]
            if name.endswith("po_update"):
                call["actors"] = [[p.detach().clone().double() for p in actor.parameters()] for actor in args[0]]
                call["lr"] = [o.param_groups[0]["lr"] for o in args[1]] if len(args) == 8 else None
            call["result"] = shipped(*args)
            return call["result"]

        monkeypatch.setattr(script, name, spy)

    for name in names:
        spy_on(name, getattr(script, name))
    return calls


def forward(layers, x):
    """An MLP with ReLU from its [weight, bias, weight, bias, ...]."""
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        x = torch.relu(x @ weight.T + bias)
    return x @ layers[-2].T + layers[-1]


@pytest.mark.parametrize("share_param", [False, True], ids=["separate", "shared"])
def test_main_stores_and_passes_on_what_happened(script, share_param, monkeypatch, tmp_path):
    """Two iterations of `main` on known tables: everything that reaches GAE, the actors and the critic is right."""
    if script.__name__.startswith("ippo"):
        pytest.skip("its critics are another matter: test_ippo.py")
    num_steps, num_envs, gamma = 9, 3, 0.8
    vec = TapeVec(2 * num_steps)
    assert (vec.ends[:num_steps] == 3).any() and (vec.ends[num_steps - 1] > 0).any()
    monkeypatch.setattr(envs, "make_vec", lambda *_: vec)
    monkeypatch.setattr(envs, "get_state", lambda _: {})
    update = script.__name__.split("_")[0] + "_update"
    calls = record_calls(monkeypatch, script, ["compute_gae", update, "critic_update"])
    args = script.Args(env_id="Tape-2", run_dir=str(tmp_path / "run"), num_envs=num_envs, num_steps=num_steps)
    args.total_timesteps, args.gamma, args.gae_lambda = 2 * num_steps * num_envs, gamma, 0.7
    args.eval_episodes = 0
    args.share_param, args.hidden_sizes, args.anneal_lr, args.seed = share_param, (8, 7), True, 11
    args.num_minibatches, args.critic_epochs, args.critic_learning_rate = 3, 2, 0.01
    if script is hatrpo:  # steps so long that a second iteration with the first one's policy would show
        args.target_kl = 0.1
    else:
        args.learning_rate, args.update_epochs = 0.05, 3
    try:
        script.main(args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert vec.seed == 11
    assert [call["name"] for call in calls] == 2 * ["compute_gae", update, "critic_update"]

    obs, next_obs, rewards = expected_rollout(vec, gamma, 10.0)
    for iteration, (gae, actors, critic) in enumerate((calls[:3], calls[3:])):
        rows = slice(iteration * num_steps, (iteration + 1) * num_steps)
        b_obs = torch.tensor(obs[rows].reshape(-1, OBS_DIM))

        # Advantages: V of the true last observations, the flags apart from each other
        values = forward(critic["critic"], torch.tensor(obs[rows]))[..., 0]
        next_values = forward(critic["critic"], torch.tensor(next_obs[rows]))[..., 0]
        expected = rewards[rows], values, next_values, vec.ends[rows] % 2, vec.ends[rows] // 2
        assert gae["args"][5:] == [gamma, 0.7]
        for got, value in zip(gae["args"][:5], expected, strict=True):
            np.testing.assert_allclose(got, value, atol=1e-4)

        # Actors: own observations, own actions, own log-probabilities, one normalisation over the batch
        agents_obs, agents_actions, agents_logprobs, advantages = actors["args"][-6:-2]
        joint_actions = torch.zeros(num_steps * num_envs, 5)
        for i, (obs_ids, act_ids) in enumerate(zip(PARTITION.obs_ids, PARTITION.act_ids, strict=True)):
            seen = b_obs[:, obs_ids]
            if share_param:
                id_ = torch.eye(2)[i].expand(len(seen), 2)
                seen = torch.cat([seen, torch.zeros(len(seen), 4 - len(obs_ids)), id_], dim=1)
            np.testing.assert_allclose(agents_obs[i], seen, atol=1e-5)
            log_std, *layers = actors["actors"][i]
            n = len(act_ids)
            policy = torch.distributions.Normal(forward(layers, seen)[:, :n], log_std[:n].exp())
            np.testing.assert_allclose(agents_logprobs[i], policy.log_prob(agents_actions[i]).sum(1), atol=1e-4)
            joint_actions[:, act_ids] = agents_actions[i]
        applied = np.concatenate(vec.actions[rows])
        for a in range(5):
            np.testing.assert_allclose(
                applied[:, a], np.interp(joint_actions[:, a], [-1, 1], [LOW[a], HIGH[a]]), atol=1e-5
            )
        raw = gae["result"][0].double().flatten()
        np.testing.assert_allclose(advantages, (raw - raw.mean()) / raw.std(), atol=1e-5)

        # Critic: after the actors, the whole observation, the returns as they are
        np.testing.assert_allclose(critic["args"][2], b_obs, atol=1e-5)
        np.testing.assert_allclose(critic["args"][3], gae["result"][1].flatten(), atol=0)

        # Learning rates: 1, then 1/2
        assert critic["lr"] == pytest.approx(args.critic_learning_rate * (1 - iteration / 2))
        assert actors["lr"] is None or actors["lr"] == pytest.approx([0.05 * (1 - iteration / 2)] * 2)
