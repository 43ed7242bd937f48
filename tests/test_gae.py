"""What the learner is fed: advantages, running normalisation, and the rollout as the main loop stores it."""

import importlib
import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, gaussian, mlp, theta_of, update_of
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from scipy import stats

import envs
import evaluate
import hatrpo_mamujoco as hatrpo
import ippo_mamujoco as ippo


@pytest.fixture(params=SCRIPTS)
def any_script(request):
    """Each script, on-policy or not."""
    return importlib.import_module(request.param)


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


@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(0.99, 0.95), (0.7, 0.6), (1, 1), (0.9, 0), (0, 0.5)]
)
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
    # Where an episode goes on, the next state is the one that the next step acts in.
    goes_on = terminations[:-1] + truncations[:-1] == 0
    next_values[:-1][goes_on] = values[1:][goes_on]
    _, returns = shipped_gae(script, problem, gamma, 1.0)
    num_steps, num_envs = rewards.shape
    for t, e in itertools.product(range(num_steps), range(num_envs)):
        ends = [s for s in range(t, num_steps) if terminations[s, e] or truncations[s, e]]
        last = ends[0] if ends else num_steps - 1
        powers = gamma ** np.arange(last - t + 2)
        tail = 0.0 if terminations[last, e] else next_values[last, e]
        assert returns[t, e] == pytest.approx(
            powers @ [*rewards[t : last + 1, e], tail], rel=1e-12, abs=1e-12
        )


def test_gae_on_a_single_hand_computed_episode(script):
    """Two steps by hand: r = 1, 2; V = 3, 4; V' = 4, 5; gamma 0.5, lambda 0.5; truncated, then the same terminated."""
    columns = torch.tensor([[1, 2], [3, 4], [4, 5], [0, 0], [0, 1]], dtype=torch.float64)[..., None]
    truncated, _ = script.compute_gae(*columns, 0.5, 0.5)
    assert truncated[:, 0].tolist() == [0.25 * 0.5, 0.5]  # deltas 1 + 2 - 3 = 0, 2 + 2.5 - 4 = 0.5
    columns[3, 1] = 1
    terminated, _ = script.compute_gae(*columns, 0.5, 0.5)
    assert terminated[:, 0].tolist() == [0.25 * -2, -2]  # delta 2 - 4


# Running normalisation

OBS_DIM = 6
ACT_DIM = 6
LOW = np.float32([-1, -0.4, 0, -3, 2, -0.2])
HIGH = np.float32([1, 0.4, 2, 1, 2.5, 1])
PARTITION = envs.Partition(
    obs_ids=(np.array([0, 2, 3]), np.array([1, 2, 4, 5])),
    act_ids=(np.array([3, 0]), np.array([4, 2, 1, 5])),
)
EQUAL_PARTITION = envs.Partition(
    PARTITION.obs_ids, act_ids=(np.array([3, 0, 5]), np.array([4, 2, 1]))
)
NO_ACTIONS = torch.zeros(3, ACT_DIM)


class TapeVec:
    """A vector environment that plays known tables back; `ends[t, e]` adds 1 for a termination, 2 for a truncation."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    partition = PARTITION

    def __init__(self, num_steps, num_envs=3, seed=0, low=LOW, high=HIGH):
        rng = np.random.default_rng(seed)
        self.num_envs = num_envs
        self.single_observation_space = Box(-np.inf, np.inf, (OBS_DIM,), np.float64)
        self.single_action_space = Box(low, high)
        # obs[t + 1] is what step t returns.
        self.obs = rng.normal(2, 3, (num_steps + 1, num_envs, OBS_DIM))
        self.final_obs = rng.normal(-4, 20, (num_steps, num_envs, OBS_DIM))
        self.rewards = rng.normal(1, 2, (num_steps, num_envs))
        self.ends = rng.choice(4, (num_steps, num_envs), p=[0.55, 0.15, 0.15, 0.15])
        self.actions = []
        self.seeds = []
        self.t = 0

    def reset(self, *, seed=None):
        self.seeds.append(seed)
        self.t = 0
        return self.obs[0].copy(), {}

    def step(self, actions):
        t = self.t
        self.t += 1
        self.actions.append(np.array(actions))
        done = self.ends[t] > 0
        infos = {}
        if done.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            for e in np.flatnonzero(done):
                final_obs[e] = self.final_obs[t, e].copy()
            infos |= {"final_obs": final_obs, "_final_obs": done}
        terminations = self.ends[t] % 2 > 0
        truncations = self.ends[t] // 2 > 0
        return self.obs[t + 1].copy(), self.rewards[t].copy(), terminations, truncations, infos


def make_env(script, vec, gamma=0.9):
    """A script's NormalizedEnv with seed 5; MADDPG's has no discount."""
    if script.__name__.startswith("maddpg"):
        return script.NormalizedEnv(vec, 5)
    return script.NormalizedEnv(vec, 5, gamma)


def mean_and_var(samples):
    """Mean and variance of all samples, to which the prior (mean 0, variance 1) counts as 1e-4 of a sample."""
    x = np.concatenate(samples)
    total = len(x) + 1e-4
    mean = x.sum(0) / total
    return mean, ((x**2).sum(0) + 1e-4) / total - mean**2


def expected_rollout(vec, gamma):
    """What `NormalizedEnv` must make of the tables: obs [T + 1, ...], next_obs and rewards [T, ...]."""
    obs = []
    next_obs = []
    rewards = []
    seen_returns = []
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


def expected_episodes(vec, start, stop):
    """(return, length) of the episodes that end in steps start..stop - 1, if all begin anew at `start`."""
    episodes = []
    first = [start] * vec.num_envs
    for t in range(start, stop):
        for e in np.flatnonzero(vec.ends[t]):
            episodes.append((vec.rewards[first[e] : t + 1, e].sum(), t + 1 - first[e]))
            first[e] = t + 1
    return episodes


def test_step_returns_the_true_last_observation_and_the_next_first_one(script):
    """Observations, last observations and rewards, normalised with the statistics of all that came before and now."""
    vec = TapeVec(num_steps=60)
    vec.rewards[-2, 1] = 1e4  # is clipped, as some of the last observations are
    assert set(np.unique(vec.ends)) == {0, 1, 2, 3}
    obs, next_obs, rewards = expected_rollout(vec, 0.9)
    assert (np.abs(next_obs) == 10).any() and (rewards == 10).any()
    env = make_env(script, vec)
    assert vec.seeds == [5]
    np.testing.assert_allclose(env.obs, obs[0], atol=1e-5)
    for t in range(60):
        result = env.step(NO_ACTIONS)
        expected = next_obs[t], rewards[t], vec.ends[t] % 2, vec.ends[t] // 2
        assert result[0].dtype == torch.float32
        for got, value in zip(result, expected, strict=True):
            np.testing.assert_allclose(got, value, atol=1e-5)
        np.testing.assert_allclose(env.obs, obs[t + 1], atol=1e-5)


def test_episodes_are_added_up(any_script):
    """Undiscounted return and length of every episode that ended, in the order of the ends."""
    vec = TapeVec(num_steps=30)
    env = make_env(any_script, vec)
    for _ in range(30):
        env.step(NO_ACTIONS)
    np.testing.assert_allclose(env.finished, expected_episodes(vec, 0, 30), rtol=1e-12)


def test_ends_may_be_numbers(any_script):
    """Terminations and truncations that are 0 and 1, not bool, end the same episodes."""
    vec = TapeVec(num_steps=30)
    tape_step = vec.step

    def step(actions):
        obs, rewards, terminations, truncations, infos = tape_step(actions)
        return obs, rewards, terminations.astype(int), truncations.astype(int), infos

    vec.step = step
    env = make_env(any_script, vec)
    expected = make_env(any_script, TapeVec(num_steps=30))
    for _ in range(30):
        results = zip(env.step(NO_ACTIONS), expected.step(NO_ACTIONS), strict=True)
        assert all(torch.equal(a, b.to(a)) for a, b in results)
    assert len(env.finished) > 10 and env.finished == expected.finished


def test_statistics_go_through_a_checkpoint(script):
    """What has loaded another's state goes on like that, to the last bit, and gives the environments theirs."""
    vec = TapeVec(num_steps=40)
    env = make_env(script, vec)
    other = make_env(script, vec)
    for _ in range(20):
        env.step(NO_ACTIONS)
    states = []
    vec.get_state = lambda: {"t": vec.t}
    vec.set_state = states.append
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert states == [{"t": 20}]
    assert vec.seeds == [5, 5]
    assert torch.equal(env.obs, other.obs)
    env.finished.clear()
    for _ in range(20):
        expected = env.step(NO_ACTIONS)
        vec.t -= 1
        assert all(map(torch.equal, other.step(NO_ACTIONS), expected))
        assert torch.equal(env.obs, other.obs)
    assert len(env.finished) > 10 and env.finished == other.finished


def test_without_saved_simulations_new_episodes_start_with_the_restored_statistics(
    any_script, capsys
):
    """Their first observation is normalised with what the other had seen; returns and lengths begin at 0."""
    vec = TapeVec(num_steps=20)
    env = make_env(any_script, vec)
    for _ in range(20):
        env.step(NO_ACTIONS)
    assert any(vec.ends[-1] == 0)  # an episode is under way, which must not go on
    new_vec = TapeVec(num_steps=20, seed=1)
    new_env = make_env(any_script, new_vec)
    new_vec.obs[0] += 1  # the next episodes begin otherwise
    state = env.state_dict()
    assert state["vec"] is None
    new_env.load_state_dict(state)
    assert "new episodes start" in capsys.readouterr().out
    assert new_vec.seeds == [5, None]  # not the first episodes of the run once more

    mean, var = mean_and_var(list(vec.obs))
    expected = np.clip((new_vec.obs[0] - mean) / np.sqrt(var + 1e-8), -10, 10)
    fresh_mean, fresh_var = mean_and_var([new_vec.obs[0]])
    fresh = (new_vec.obs[0] - fresh_mean) / np.sqrt(fresh_var + 1e-8)
    assert np.abs(expected - fresh).max() > 0.5
    is_raw = any_script.__name__.startswith("maddpg")  # normalised when it is used
    first_obs = new_env.normalize(new_env.obs) if is_raw else new_env.obs
    np.testing.assert_allclose(first_obs, expected, atol=1e-5)
    if is_raw:
        np.testing.assert_allclose(new_env.obs, new_vec.obs[0], rtol=1e-6)

    for _ in range(20):
        new_env.step(NO_ACTIONS)
    np.testing.assert_allclose(new_env.finished, expected_episodes(new_vec, 0, 20), rtol=1e-12)


def test_discounted_returns_begin_anew_without_saved_simulations(script):
    """The first reward after the resume is divided by the deviation of the restored returns and these rewards."""
    gamma = 0.9
    vec = TapeVec(num_steps=20)
    env = make_env(script, vec, gamma)
    seen_returns = []
    discounted = np.zeros(3)
    for t in range(20):
        env.step(NO_ACTIONS)
        discounted = gamma * discounted + vec.rewards[t]
        seen_returns.append(discounted[:, None])
        discounted = np.where(vec.ends[t] > 0, 0, discounted)
    assert any(discounted != 0)
    new_vec = TapeVec(num_steps=1, seed=1)
    new_env = make_env(script, new_vec, gamma)
    new_env.load_state_dict(env.state_dict())
    _, rewards, _, _ = new_env.step(NO_ACTIONS)
    _, (var,) = mean_and_var([*seen_returns, new_vec.rewards[0][:, None]])
    np.testing.assert_allclose(rewards, new_vec.rewards[0] / np.sqrt(var + 1e-8), rtol=1e-5)


def test_evaluation_plays_first_episodes_and_changes_no_statistics(script):
    """Without noise, normalised with what was there, each environment until its first end; nothing is changed by it."""
    vec = TapeVec(num_steps=10)
    eval_vec = TapeVec(num_steps=40, seed=1)
    env = make_env(script, vec)
    for _ in range(10):
        env.step(NO_ACTIONS)
    mean, var = mean_and_var(list(vec.obs))
    before = env.state_dict()
    last = [int(np.flatnonzero(eval_vec.ends[:, e])[0]) for e in range(3)]
    for e in range(3):
        eval_vec.rewards[last[e] + 1 :, e] = np.nan  # of the episodes that follow
    seen = []

    def act(obs, *, noise):
        assert noise is False
        seen.append(obs)
        return torch.full((3, ACT_DIM), -0.5)

    result = script.evaluate(eval_vec, env, SimpleNamespace(act=act), 7)
    assert eval_vec.seeds == [7]
    assert len(set(last)) > 1 and len(seen) == max(last) + 1
    normalized = np.clip((eval_vec.obs[: len(seen)] - mean) / np.sqrt(var + 1e-8), -10, 10)
    np.testing.assert_allclose(torch.stack(seen), normalized, atol=1e-5)
    applied = np.broadcast_to(0.75 * LOW + 0.25 * HIGH, (len(seen), 3, ACT_DIM))
    np.testing.assert_allclose(eval_vec.actions, applied, rtol=1e-6)
    returns = [eval_vec.rewards[: t + 1, e].sum() for e, t in enumerate(last)]
    expected = {
        "eval/episodic_return": np.mean(returns),
        "eval/episodic_return_std": np.std(returns),
        "eval/episodic_length": np.mean(last) + 1,
    }
    assert result == pytest.approx(expected)
    after = env.state_dict()
    for name in ("obs", "episodes"):
        assert torch.equal(before.pop(name), after.pop(name))
    assert before == after


def test_only_one_kind_of_autoreset_is_taken(any_script):
    """With another, the first observation of an episode would be taken for the last of the one before."""
    vec = TapeVec(num_steps=1)
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED, None):
        vec.metadata = {"autoreset_mode": mode}
        with pytest.raises(ValueError, match="SAME_STEP"):
            make_env(any_script, vec)


# Actions


def test_actions_are_clipped_and_scaled_to_the_actuators_range(any_script):
    """From -1 to 1 runs linearly from each actuator's own low to its high; beyond, it stays there."""
    vec = TapeVec(num_steps=1)
    env = make_env(any_script, vec)
    rng = np.random.default_rng(0)
    actions = torch.tensor(rng.normal(0, 1.5, (3, ACT_DIM)), dtype=torch.float32)
    assert (actions < -1).any() and (actions > 1).any()
    env.step(actions)
    for a in range(ACT_DIM):
        expected = np.interp(actions[:, a], [-1, 1], [LOW[a], HIGH[a]])
        np.testing.assert_allclose(vec.actions[0][:, a], expected, rtol=1e-6, atol=1e-6)


def one_decimal_ranges():
    """All ranges between two numbers of one decimal from -3 to 3, such as (-0.2, 1): their lows and highs, float32."""
    ranges = list(itertools.combinations(range(-30, 31), 2))
    low, high = np.float32(np.array(ranges).T / 10)
    assert len(low) == 61 * 60 // 2 and (low < high).all()
    return low, high


def assert_inside(actions, space, inputs):
    """Actions [B, act_dim] lie in the space, bounds included, where `inputs` [B] in [-1, 1] lead to."""
    assert len(actions) == len(inputs)
    for action, x in zip(actions, inputs, strict=True):
        assert space.contains(action)
        expected = space.low + (space.high - space.low) * np.float64(x + 1) / 2
        np.testing.assert_allclose(action, expected, rtol=0, atol=2e-6)


def test_no_action_leaves_an_asymmetric_range(any_script):
    """With a range from -0.2 to 1 rounding would map the lowest action to -0.20000002, outside the space."""
    low, high = one_decimal_ranges()
    env = make_env(any_script, TapeVec(num_steps=1, low=low, high=high))
    inputs = np.float32([-2, -1, -0.5, 0, 0.7, 1, 2])
    actions = torch.tensor(inputs)[:, None].repeat(1, len(low))
    space = env.vec.single_action_space
    assert_inside(env.scale(actions), space, inputs.clip(-1, 1))


def test_no_action_of_evaluate_py_leaves_an_asymmetric_range():
    """The same for what it applies to its environments."""
    low, high = one_decimal_ranges()
    inputs = np.float32([-1, 0.7, 1])
    vec = TapeVec(num_steps=40, low=low, high=high)
    evaluate.evaluate(vec, lambda obs: inputs[:, None].repeat(len(low), axis=1), 0)
    assert len(vec.actions) > 1
    for actions in vec.actions:
        assert_inside(actions, vec.single_action_space, inputs)


# Seeds


def start_states(script, seed, monkeypatch, run_dir):
    """Train for two tiny iterations; the first observations of the training and of both evaluations."""
    starts = []
    make_vec = envs.make_vec

    def recording_make_vec(*args):
        vec = make_vec(*args)
        reset = vec.reset

        def recorded_reset(**kwargs):
            obs, infos = reset(**kwargs)
            starts.append(obs.copy())
            return obs, infos

        vec.reset = recorded_reset
        return vec

    monkeypatch.setattr(envs, "make_vec", recording_make_vec)
    sizes = {"num_envs": 20, "num_steps": 2, "total_timesteps": 80, "hidden_sizes": (4,)}
    args = script.Args(
        **sizes,
        env_id="Hopper-3x1",
        eval_episodes=20,
        eval_interval=40,
        num_threads=1,
        seed=seed,
        run_dir=str(run_dir),
    )
    script.main(args)
    monkeypatch.undo()
    return starts


def test_neighbouring_seeds_share_no_environments(any_script, monkeypatch, tmp_path):
    """Environment i of a run is seeded with a number plus i: that of --seed 1 must be far from that of --seed 2."""
    all_starts = []
    for seed in (1, 2):
        starts = start_states(any_script, seed, monkeypatch, tmp_path / str(seed))
        training, first_evaluation, second_evaluation = starts
        np.testing.assert_array_equal(first_evaluation, second_evaluation)
        all_starts += [training, first_evaluation]
    all_starts = np.concatenate(all_starts)
    assert len(all_starts) == len(np.unique(all_starts, axis=0)) == 80


# The main loop


def copied(x):
    """A copy of tensors and of sequences of them: the loop writes over its buffers."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    return [copied(y) for y in x] if isinstance(x, list | tuple) else x


def record_calls(monkeypatch, script, names):
    """Let the named functions of a script leave on a list what they got, what they gave, and the networks before."""
    calls = []

    def spy_on(name, shipped):
        def spy(*args):
            call = {"name": name, "args": [copied(x) for x in args]}
            calls.append(call)
            if name != "compute_gae":
                networks = args[0] if isinstance(args[0], torch.nn.ModuleList) else [args[0]]
                call["thetas"] = [theta_of(network).double() for network in networks]
                optimizers = [arg for arg in args if isinstance(arg, torch.optim.Optimizer)]
                groups = [group for optimizer in optimizers for group in optimizer.param_groups]
                call["lr"] = [group["lr"] for group in groups]
            call["result"] = shipped(*args)
            return call["result"]

        monkeypatch.setattr(script, name, spy)

    for name in names:
        spy_on(name, getattr(script, name))
    return calls


@pytest.mark.parametrize("share_param", [False, True], ids=["separate", "shared"])
def test_main_stores_and_passes_on_what_happened(script, share_param, monkeypatch, tmp_path):
    """Two iterations of `main` on known tables: everything that reaches GAE, the actors and the critic is right."""
    if script is ippo:
        pytest.skip("its critics are another matter: test_ippo.py")
    num_steps = 9
    num_envs = 3
    gamma = 0.8
    vec = TapeVec(2 * num_steps)
    if share_param:  # needs equally many actuators
        vec.partition = EQUAL_PARTITION
    obs_ids, act_ids = vec.partition.obs_ids, vec.partition.act_ids
    assert (vec.ends[:num_steps] == 3).any() and (vec.ends[num_steps - 1] > 0).any()
    monkeypatch.setattr(envs, "make_vec", lambda *_: vec)
    update = update_of(script).__name__
    calls = record_calls(monkeypatch, script, ["compute_gae", update, "critic_update"])
    settings = {
        "env_id": "Tape-2",
        "run_dir": str(tmp_path / "run"),
        "num_envs": num_envs,
        "num_steps": num_steps,
        "total_timesteps": 2 * num_steps * num_envs,
        "num_minibatches": 3,
        "critic_epochs": 2,
        "hidden_sizes": (8, 7),
        "eval_episodes": 0,
        "gamma": gamma,
        "gae_lambda": 0.7,
        "critic_learning_rate": 0.01,
        "anneal_lr": True,
        "seed": 11,
        "share_param": share_param,
    }
    # Steps so long that a second iteration with the first one's policy would show.
    args = script.Args(**settings)
    for name, value in {"target_kl": 0.1, "learning_rate": 0.05, "update_epochs": 3}.items():
        if hasattr(args, name):
            setattr(args, name, value)
    script.main(args)
    _, train_seed, _ = np.random.SeedSequence(11).generate_state(3)
    assert vec.seeds == [train_seed]
    assert [call["name"] for call in calls] == 2 * ["compute_gae", update, "critic_update"]

    obs, next_obs, rewards = expected_rollout(vec, gamma)
    for iteration, (gae, actors, critic) in enumerate((calls[:3], calls[3:])):
        rows = slice(iteration * num_steps, (iteration + 1) * num_steps)
        b_obs = torch.tensor(obs[rows].reshape(-1, OBS_DIM))

        # Advantages: V of the true last observations, the flags apart from each other
        (theta,) = critic["thetas"]
        inputs = torch.tensor(np.stack([obs[:-1], next_obs])[:, rows])
        values = mlp(theta, inputs, (8, 7, 1))[..., 0]
        expected = rewards[rows], *values, vec.ends[rows] % 2, vec.ends[rows] // 2
        assert gae["args"][5:] == [gamma, 0.7]
        for got, value in zip(gae["args"][:5], expected, strict=True):
            np.testing.assert_allclose(got, value, atol=1e-4)

        # Actors: own observations, own actions, drawn by the policy before its update, one normalisation over the batch
        agents_obs, agents_actions, advantages = actors["args"][-4:-1]
        joint_actions = torch.zeros(num_steps * num_envs, ACT_DIM)
        noise = []
        for i in range(2):
            seen = b_obs[:, obs_ids[i]]
            if share_param:
                padding = torch.zeros(len(seen), 4 - len(obs_ids[i]))
                seen = torch.cat([seen, padding, torch.eye(2)[[i] * len(seen)]], dim=1)
            np.testing.assert_allclose(agents_obs[i], seen, atol=1e-5)
            mean, log_std = gaussian(actors["thetas"][i], seen, (8, 7), len(act_ids[i]))
            noise.append((agents_actions[i] - mean) / log_std.exp())
            joint_actions[:, act_ids[i]] = agents_actions[i]
        assert stats.kstest(torch.cat(noise, 1).flatten(), "norm").pvalue > 0.01
        applied = np.concatenate(vec.actions[rows])
        for a in range(ACT_DIM):
            expected = np.interp(joint_actions[:, a], [-1, 1], [LOW[a], HIGH[a]])
            np.testing.assert_allclose(applied[:, a], expected, atol=1e-5)
        raw = gae["result"][0].double().flatten()
        np.testing.assert_allclose(advantages, (raw - raw.mean()) / raw.std(), atol=1e-5)

        # Critic: after the actors, the whole observation, the returns as they are
        np.testing.assert_allclose(critic["args"][2], b_obs, atol=1e-5)
        np.testing.assert_allclose(critic["args"][3], gae["result"][1].flatten(), atol=0)

        # Learning rates: 1, then 1/2
        assert critic["lr"] == pytest.approx([args.critic_learning_rate * (1 - iteration / 2)])
        if script is not hatrpo:
            assert actors["lr"] == pytest.approx([0.05 * (1 - iteration / 2)])
