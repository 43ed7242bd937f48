"""MADDPG: replay, targets and updates against brute force; its runs resume, evaluate and fail like the others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mlp, set_theta, theta_of
from pydantic import ValidationError
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import differences, newest, resume, saved_files, scalars
from test_scripts import error_of

import envs
import maddpg_mamujoco as maddpg
from envs import tasks

SMALL = {
    "env_id": "Reacher-2x1",
    "total_timesteps": 512,
    "num_envs": 4,
    "num_steps": 32,
    "hidden_sizes": (16, 16),
    "num_threads": 1,
    "learning_starts": 64,
    "batch_size": 16,
    "buffer_size": 4000,
    "eval_episodes": 0,
}
CPU = torch.device("cpu")


def train(run_dir: Path, **args: object) -> dict:
    """Run main in this process on a small budget; return the model."""
    maddpg.main(maddpg.Args(**(SMALL | args), run_dir=str(run_dir)))
    return torch.load(run_dir / "model.pt", weights_only=True)


# Replay and targets


def filled(
    capacity: int, num_steps: int, num_envs: int = 3, seed: int = 0
) -> tuple[maddpg.ReplayBuffer, dict]:
    """A buffer after `num_steps` steps, and the whole history [num_steps, num_envs, ...] as NumPy arrays."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, (num_steps, num_envs), p=[0.7, 0.1, 0.1, 0.1])
    history = {
        "obs": rng.normal(size=(num_steps, num_envs, 2)),
        "next_obs": rng.normal(size=(num_steps, num_envs, 2)),
        "actions": rng.normal(size=(num_steps, num_envs, 1)),
        "rewards": rng.normal(size=(num_steps, num_envs)),
        "terminations": (kind % 2).astype(float),
        "truncations": (kind // 2).astype(float),
    }
    # An observation tells the step and the environment that its row is of.
    history["obs"][..., 0] = np.arange(num_steps)[:, None]
    history["obs"][..., 1] = np.arange(num_envs)
    buffer = maddpg.ReplayBuffer(capacity, num_envs, 2, 1, CPU)
    tensors = {name: torch.tensor(data, dtype=torch.float32) for name, data in history.items()}
    for t in range(num_steps):
        buffer.add(**{name: data[t] for name, data in tensors.items()})
    return buffer, history


@pytest.mark.parametrize("n_step", [1, 3, 8])
@pytest.mark.parametrize("num_steps", [5, 20, 33])
def test_samples_are_what_a_loop_over_the_history_gives(n_step: int, num_steps: int):
    """Before and after the buffer wraps: windows stop at ends of episodes and at the newest step, and never go on."""
    capacity = 20
    gamma = 0.9
    buffer, history = filled(capacity, num_steps)
    torch.manual_seed(1)
    obs, actions, returns, next_obs, discounts = buffer.sample(2000, n_step, gamma)
    seen = set()
    reasons = set()  # why windows stopped
    for row in range(2000):
        t = int(obs[row, 0])
        env = int(obs[row, 1])
        assert max(0, num_steps - capacity) <= t < num_steps
        np.testing.assert_allclose(actions[row], history["actions"][t, env], rtol=1e-6)
        total = 0.0
        steps = 0
        while True:
            total += gamma**steps * history["rewards"][t + steps, env]
            last = t + steps
            steps += 1
            ended = history["terminations"][last, env] or history["truncations"][last, env]
            if ended or steps == n_step or last == num_steps - 1:
                reasons.add("end" if ended else "n" if steps == n_step else "newest")
                break
        np.testing.assert_allclose(returns[row], total, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(next_obs[row], history["next_obs"][last, env], rtol=1e-6)
        # A truncation bootstraps.
        expected = 0.0 if history["terminations"][last, env] else gamma**steps
        assert discounts[row].item() == pytest.approx(expected, rel=1e-5)
        seen.add((t, env))
    assert len(seen) == min(capacity, num_steps) * 3
    assert "end" in reasons
    assert "n" in reasons or n_step == 8
    assert "newest" in reasons or n_step == 1


def test_sampling_is_uniform():
    """Every stored (step, environment) is equally likely, also after wrapping (chi-square)."""
    buffer, _ = filled(capacity=10, num_steps=17)
    torch.manual_seed(2)
    obs, *_ = buffer.sample(30_000, 3, 0.9)
    cells = ((obs[:, 0] - 7) * 3 + obs[:, 1]).long()
    assert stats.chisquare(np.bincount(cells, minlength=30)).pvalue > 0.01


def test_a_buffer_goes_through_a_checkpoint():
    """Its state is the buffer itself; what has loaded it draws the same, and is a copy."""
    buffer, _ = filled(capacity=10, num_steps=17)
    loaded, _ = filled(capacity=10, num_steps=3, seed=1)
    state = buffer.state_dict()
    assert all(state[name] is data for name, data in buffer.data.items())
    loaded.load_state_dict(state)

    def draw(buffer: maddpg.ReplayBuffer) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        return buffer.sample(100, 3, 0.9)

    before = draw(buffer)
    assert all(map(torch.equal, draw(loaded), before))
    for data in loaded.data.values():
        data.zero_()
    assert all(map(torch.equal, draw(buffer), before))


# Updates

HIDDEN = (6,)
# What the agents see overlaps; they have different numbers of actions, which are not neighbours.
PARTITION = envs.Partition(
    (np.array([0, 2]), np.array([1, 2, 0])), (np.array([2, 0]), np.array([1]))
)


@pytest.fixture
def problem() -> dict:
    """A policy and a critic with random parameters, and a batch."""
    torch.manual_seed(3)
    args = maddpg.Args(hidden_sizes=HIDDEN, exploration_noise=0.5)
    policy = maddpg.Policy(PARTITION, args, CPU)
    critic = maddpg.Critic(3, 3, args)
    for network in (*policy.actors, critic):
        set_theta(network, 0.5 * torch.randn_like(theta_of(network)))
    obs = torch.randn(10, 3)
    actions = torch.rand(10, 3) * 2 - 1
    return {"policy": policy, "critic": critic, "obs": obs, "actions": actions}


def own_actions(theta: torch.Tensor, obs: torch.Tensor, i: int) -> torch.Tensor:
    """What agent i of `PARTITION` does, by its theta."""
    own_obs = obs[:, PARTITION.obs_ids[i]]
    return torch.tanh(mlp(theta, own_obs, (*HIDDEN, len(PARTITION.act_ids[i]))))


def q_values(
    theta: torch.Tensor, obs: torch.Tensor, actions: torch.Tensor, hidden: tuple = HIDDEN
) -> torch.Tensor:
    """What the critic says, by its theta."""
    return mlp(theta, torch.cat([obs, actions], 1), (*hidden, 1))[:, 0]


def test_actions(problem: dict):
    """Each agent on its own entries, each action on its own actuators; with noise on top, clipped to [-1, 1]."""
    policy, obs = problem["policy"], problem["obs"]
    first = own_actions(theta_of(policy.actors[0]), obs, 0)
    second = own_actions(theta_of(policy.actors[1]), obs, 1)
    joint = torch.stack([first[:, 1], second[:, 0], first[:, 0]], dim=1)
    torch.testing.assert_close(policy.act(obs, noise=False), joint)
    torch.testing.assert_close(policy(obs), joint)
    torch.manual_seed(5)
    acted = policy.act(obs, noise=True)
    torch.manual_seed(5)
    noisy = joint + 0.5 * torch.randn(10, 3)
    torch.testing.assert_close(acted, noisy.clamp(-1, 1))
    assert noisy.abs().max() > 1


def test_targets_bootstrap_with_the_target_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In a run: y = R + discount Q'(s', mu'(s')), of normalised observations, when targets lag behind."""
    samples, rows, target_theta = [], [], []
    sample, update, polyak = maddpg.ReplayBuffer.sample, maddpg.critic_update, maddpg.polyak

    def recorded_sample(self: maddpg.ReplayBuffer, *args: object) -> tuple:
        result = sample(self, *args)
        # No episode of Reacher ends in 50 steps: all that was seen is stored, the newest as next_obs.
        seen = [*self.data["obs"][: self.size], self.data["next_obs"][self.size - 1]]
        samples.append((torch.cat(seen).double(), *result))
        return result

    def recorded_update(critic: maddpg.Critic, *args: object) -> dict:
        *_, targets = args
        assert not targets.requires_grad
        if target_theta:
            rows.append((samples[-1], targets.clone(), *target_theta))
        return update(critic, *args)

    def recorded_polyak(targets: list, *args: object) -> None:
        polyak(targets, *args)
        target_theta[:] = [torch.cat([target.flatten() for target in targets]).detach()]

    monkeypatch.setattr(maddpg.ReplayBuffer, "sample", recorded_sample)
    monkeypatch.setattr(maddpg, "critic_update", recorded_update)
    monkeypatch.setattr(maddpg, "polyak", recorded_polyak)
    # Two agents that see 10 entries and have an action each, and the critic of all 12.
    actor_size = 10 * 6 + 6 + 6 + 1
    critic_size = 12 * 6 + 6 + 6 + 1
    rates = {"learning_rate": 0.05, "critic_learning_rate": 0.05, "tau": 0.1}
    train(tmp_path / "run", total_timesteps=128, hidden_sizes=HIDDEN, **rates)

    assert len(rows) == 5  # 0.1 updates a step from step 64 on; the first has no target_theta yet
    all_discounts = set()
    for (seen, _, _, returns, next_obs, discounts), targets, theta in rows:
        mean = seen.sum(0) / (len(seen) + 1e-4)  # Gymnasium's statistics begin with 1e-4 rows
        var = (seen.square().sum(0) + 1e-4) / (len(seen) + 1e-4) - mean.square()
        next_obs = ((next_obs - mean) / (var + 1e-8).sqrt()).clamp(-10, 10).float()
        first, second, critic = theta.split([actor_size, actor_size, critic_size])
        actions = [torch.tanh(mlp(actor, next_obs, (*HIDDEN, 1))) for actor in (first, second)]
        y = returns + discounts * q_values(critic, next_obs, torch.cat(actions, 1))
        torch.testing.assert_close(targets, y, rtol=1e-4, atol=1e-4)
        all_discounts.update(discounts.tolist())
    assert len(all_discounts) > 1


def test_the_loop_passes_on_what_each_update_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sizes and discount of a sample; networks, rates, observations and actions of both updates; targets that lag."""
    sample = maddpg.ReplayBuffer.sample
    critic_update = maddpg.critic_update
    actor_update = maddpg.actor_update
    polyak = maddpg.polyak
    samples, critics, actors, targets = [], [], [], []

    def recorded_sample(self: maddpg.ReplayBuffer, *args: object) -> tuple:
        samples.append((args, sample(self, *args)))
        return samples[-1][1]

    def recorded_critic_update(*args: object) -> dict:
        critics.append((args, theta_of(args[0])))  # before the update
        return critic_update(*args)

    def recorded_actor_update(*args: object) -> dict:
        actors.append((args, [theta_of(actor) for actor in args[0]]))
        return actor_update(*args)

    def recorded_polyak(target: list, parameters: list, tau: float) -> None:
        before = torch.cat([tensor.detach().flatten() for tensor in target])
        polyak(target, parameters, tau)
        targets.append(
            (before, torch.cat([tensor.detach().flatten() for tensor in parameters]), tau)
        )

    monkeypatch.setattr(maddpg.ReplayBuffer, "sample", recorded_sample)
    monkeypatch.setattr(maddpg, "critic_update", recorded_critic_update)
    monkeypatch.setattr(maddpg, "actor_update", recorded_actor_update)
    monkeypatch.setattr(maddpg, "polyak", recorded_polyak)
    flags = {"gamma": 0.8, "n_step": 3, "tau": 0.1, "batch_size": 8}
    rates = {"learning_rate": 0.01, "critic_learning_rate": 0.02}
    train(tmp_path / "run", total_timesteps=128, **flags, **rates)

    assert len(samples) == len(critics) == len(actors) == len(targets) == 6
    partition = envs.make_vec("Reacher-2x1", 1).partition
    for number, ((sizes, drawn), (of_critic, _), (of_actors, _)) in enumerate(
        zip(samples, critics, actors)
    ):
        assert sizes == (8, 3, 0.8)
        _, actions, _, _, _ = drawn
        critic, critic_optimizer, obs, critic_actions, _ = of_critic
        policy, actor_optimizer, climbed, actor_obs, agents_obs, actor_actions, act_ids = of_actors
        assert climbed is critic
        (group,) = critic_optimizer.param_groups
        assert group["lr"] == 0.02
        assert list(map(id, group["params"])) == list(map(id, critic.parameters()))
        (group,) = actor_optimizer.param_groups
        assert group["lr"] == 0.01
        assert list(map(id, group["params"])) == list(map(id, policy.parameters()))
        assert torch.equal(critic_actions, actions) and torch.equal(actor_actions, actions)
        assert torch.equal(actor_obs, obs)
        for seen, ids in zip(agents_obs, partition.obs_ids, strict=True):
            assert torch.equal(seen, obs[:, ids])
        for own, ids in zip(act_ids, partition.act_ids, strict=True):
            assert own.tolist() == ids.tolist()
        before, after, tau = targets[number]
        assert tau == 0.1
        if number == 0:  # the targets begin as copies of the networks before their first update
            (_, critic_theta), (_, actors_theta) = critics[0], actors[0]
            expected = torch.cat([*actors_theta, critic_theta])
        torch.testing.assert_close(before, expected)
        assert not torch.equal(before, after)
        expected = 0.9 * before + 0.1 * after


def test_actors_act_on_normalised_observations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the policy gets in the rollout has a spread of about 1, where raw entries have less than 0.2."""
    act = maddpg.Policy.act
    seen = []

    def recorded(self: maddpg.Policy, obs: torch.Tensor, *, noise: bool) -> torch.Tensor:
        assert noise
        seen.append(obs)
        return act(self, obs, noise=noise)

    monkeypatch.setattr(maddpg.Policy, "act", recorded)
    train(tmp_path / "run")
    buffer = newest(tmp_path / "run")["buffer"]
    assert buffer["obs"][: buffer["size"]].flatten(0, 1).std(0).min() < 0.2
    assert torch.cat(seen).std(0).min() > 0.5


def test_a_resumed_run_takes_new_rates(tmp_path: Path):
    """The optimisers' saved states do not bring the old ones back."""
    train(tmp_path / "run")
    rates = {"learning_rate": 0.01, "critic_learning_rate": 0.02}
    resume(maddpg, tmp_path / "run", total_timesteps=640, **rates)
    checkpoint = newest(tmp_path / "run")
    assert checkpoint["actor_optimizer"]["param_groups"][0]["lr"] == 0.01
    assert checkpoint["critic_optimizer"]["param_groups"][0]["lr"] == 0.02


def test_a_resumed_run_keeps_its_buffer_size(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Another size is refused, and nothing is written."""
    train(tmp_path / "run")
    before = saved_files(tmp_path / "run")
    script = Path(maddpg.__file__)
    error = error_of(capsys, 2, script, "--resume", tmp_path / "run", "--buffer-size", 2000)
    assert error == f"error: --resume {tmp_path / 'run'}: buffer_size must stay 4000\n"
    assert saved_files(tmp_path / "run") == before


def test_the_saved_policy_is_the_policy(tmp_path: Path):
    """In NumPy, as a user would: tanh of agent i's layers on its entries gives its actions."""
    model = train(tmp_path / "run", env_id="Pusher-3p", agent_obsk=0)
    assert set(model) == {"script", "args", "obs_rms", "obs_ids", "act_ids", "policy"}
    assert model["script"] == "maddpg_mamujoco"
    vec = envs.make_vec("Pusher-3p", 1, 0)
    policy = maddpg.Policy(vec.partition, maddpg.Args(hidden_sizes=(16, 16)), CPU)
    policy.load_state_dict(model["policy"])
    obs = torch.randn(10, vec.single_observation_space.shape[0])
    actions = torch.full((10, vec.single_action_space.shape[0]), torch.nan)
    weights = {name: tensor.numpy() for name, tensor in model["policy"].items()}
    assert len(model["obs_ids"]) == len(model["act_ids"]) == 3
    for i, (obs_ids, act_ids) in enumerate(zip(model["obs_ids"], model["act_ids"])):
        x = obs.numpy()[:, obs_ids]
        for layer in (0, 2, 4):  # ReLU between them
            x = np.maximum(x, 0) if layer else x
            name = f"actors.{i}.net.{layer}"
            x = x @ weights.pop(f"{name}.weight").T + weights.pop(f"{name}.bias")
        actions[:, act_ids] = torch.tensor(np.tanh(x))
    assert weights == {}
    torch.testing.assert_close(policy.act(obs, noise=False), actions)


def test_an_actor_update_is_the_policy_gradient_of_each_actor(problem: dict):
    """dQ/da^i dmu^i/dtheta with the others' actions from the buffer, for each i; the critic stays as it is."""
    policy, critic, obs, actions = problem.values()
    old = [theta_of(actor) for actor in policy.actors]
    critic_before = theta_of(critic)
    actions_before = actions.clone()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    logged = maddpg.actor_update(
        policy.actors, optimizer, critic, obs, policy.observe(obs), actions, policy.act_ids
    )

    # The chain rule by hand: first dQ/da at the joint action, then that times the actor's Jacobian.
    for i, act_ids in enumerate(PARTITION.act_ids):
        theta = old[i].requires_grad_()
        joint = actions.clone()
        own = own_actions(theta, obs, i)
        joint[:, act_ids] = own.detach()
        q = q_values(critic_before, obs, joint.requires_grad_())
        dq_da = torch.autograd.grad(q.mean(), joint)[0][:, act_ids]
        (gradient,) = torch.autograd.grad(own, theta, grad_outputs=dq_da)
        torch.testing.assert_close(theta_of(policy.actors[i]), theta.detach() + 0.1 * gradient)
        assert gradient.abs().max() > 1e-3
        loss = logged[f"agent_{i}/policy_loss"]
        assert loss.item() == pytest.approx(-q.mean().item(), rel=1e-5)
    assert torch.equal(theta_of(critic), critic_before)
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert torch.equal(actions, actions_before)


def test_a_critic_update_is_a_gradient_step_on_the_squared_error(problem: dict):
    """And the actors stay as they are."""
    policy, critic, obs, actions = problem.values()
    targets = torch.randn(10)
    theta = theta_of(critic).requires_grad_()
    actors = theta_of(policy)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    logged = maddpg.critic_update(critic, optimizer, obs, actions, targets)
    values = q_values(theta, obs, actions)
    loss = sum((v - y) ** 2 for v, y in zip(values, targets)) / 10
    (gradient,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(theta_of(critic), theta.detach() - 0.05 * gradient)
    assert logged["losses/q_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert logged["losses/q_value"].item() == pytest.approx(values.mean().item(), rel=1e-4)
    assert torch.equal(theta_of(policy), actors)


def test_an_update_starts_from_its_own_gradient(problem: dict):
    """What earlier updates left in `.grad` does not count: twice the same step of SGD with rate 0."""
    policy, critic, obs, actions = problem.values()
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.0) for network in (policy, critic)]
    gradients = []
    for _ in range(2):
        maddpg.critic_update(critic, optimizers[1], obs, actions, torch.ones(10))
        maddpg.actor_update(
            policy.actors, optimizers[0], critic, obs, policy.observe(obs), actions, policy.act_ids
        )
        parameters = [*policy.parameters(), *critic.parameters()]
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    assert torch.equal(*gradients)


def test_polyak_averaging():
    """After k updates towards a fixed network the target is (1 - tau)^k of itself; with tau 1 it is the network."""
    torch.manual_seed(0)
    network, target = (maddpg.Critic(2, 1, maddpg.Args(hidden_sizes=HIDDEN)) for _ in range(2))
    start = theta_of(target)
    end = theta_of(network)
    lists = list(target.parameters()), list(network.parameters())
    for _ in range(7):
        maddpg.polyak(*lists, 0.1)
    torch.testing.assert_close(theta_of(target), 0.9**7 * start + (1 - 0.9**7) * end)
    maddpg.polyak(*lists, 1.0)
    assert torch.equal(theta_of(target), end)
    assert torch.equal(theta_of(network), end)


# The main loop


def test_what_reaches_buffer_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Uniform actions first; then the policy plus noise of the given size, clipped; true last observations are kept."""
    taken, stored, updates, infos = [], [], [], []
    add = maddpg.ReplayBuffer.add
    step = maddpg.NormalizedEnv.step
    vec_step = tasks.MujocoVectorEnv.step
    critic_update = maddpg.critic_update

    def recorded_add(self: maddpg.ReplayBuffer, **data: torch.Tensor) -> None:
        row = {name: value.clone() for name, value in data.items()}
        stored.append(row | {"updates": len(updates)})
        add(self, **data)

    def recorded_step(self: maddpg.NormalizedEnv, actions: torch.Tensor) -> tuple:
        assert actions.abs().max() <= 1
        result = step(self, actions)
        kinds = "next_obs", "rewards", "terminations", "truncations"
        taken.append({"actions": actions.clone(), "obs_after": self.obs.clone()})
        taken[-1] |= {name: value.clone() for name, value in zip(kinds, result, strict=True)}
        return result

    def recorded_vec_step(self: tasks.MujocoVectorEnv, actions: np.ndarray) -> tuple:
        result = vec_step(self, actions)
        infos.append(result[-1])
        return result

    def recorded_update(*args: object) -> dict:
        updates.append(args)
        return critic_update(*args)

    monkeypatch.setattr(tasks.MujocoVectorEnv, "step", recorded_vec_step)
    monkeypatch.setattr(maddpg.ReplayBuffer, "add", recorded_add)
    monkeypatch.setattr(maddpg.NormalizedEnv, "step", recorded_step)
    monkeypatch.setattr(maddpg, "critic_update", recorded_update)
    train(
        tmp_path / "run",
        total_timesteps=1024,
        learning_starts=512,
        updates_per_step=0.125,
        exploration_noise=0.2,
    )
    assert len(stored) == len(taken) == 256
    ends = 0
    for i, (a, b) in enumerate(zip(taken, stored)):
        for name in ("actions", "next_obs", "rewards", "terminations", "truncations"):
            assert torch.equal(a[name], b[name])
        if "final_obs" in infos[i]:  # Reacher's episodes end all at once, by the time limit
            ends += 1
            final = torch.tensor(np.stack(list(infos[i]["final_obs"])), dtype=torch.float32)
            assert torch.equal(b["next_obs"], final)
            assert not torch.equal(a["obs_after"], final)
            assert b["truncations"].all() and not b["terminations"].any()
        else:
            assert torch.equal(a["obs_after"], b["next_obs"])
            assert not b["truncations"].any()
        if i + 1 < len(stored):
            assert torch.equal(stored[i + 1]["obs"], a["obs_after"])
    assert ends == 256 // 50
    random = torch.stack([b["actions"] for b in stored[:128]]).flatten()
    assert stats.kstest(random.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    # The policy's own actions are small still.
    early = torch.stack([b["actions"] for b in stored[128:140]]).flatten()
    assert early.std().item() == pytest.approx(0.2, rel=0.3)
    assert abs(early.mean().item()) < 0.1
    # 0.125 updates a step, 4 environments: one every other step, after the first 512 environment steps.
    assert [b["updates"] for b in stored[126:134]] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert len(updates) == 64
    # What is learnt from is normalised, what is stored is not: targets are within 0.2 metres.
    learnt = torch.cat([args[2] for args in updates])
    raw = torch.cat([b["obs"] for b in stored])
    assert raw.std(0).min() < 0.2
    assert learnt.mean(0).abs().max() < 0.3
    assert (learnt.std(0) - 1).abs().max() < 0.4


def test_log_and_model(tmp_path: Path):
    """The log has what the documentation explains; the model has no buffer."""
    model = train(tmp_path / "run", eval_episodes=2)
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = {
        "losses/q_loss",
        "losses/q_value",
        "losses/parameter_norm",
        "agent_0/policy_loss",
        "agent_1/policy_loss",
    }
    assert tags | {"charts/episodic_return", "charts/SPS", "eval/episodic_return"} <= set(
        log.Tags()["scalars"]
    )
    checkpoint = newest(tmp_path / "run")
    # The raw observations, and all of them: none has been overwritten.
    stored = checkpoint["buffer"]["obs"][: checkpoint["buffer"]["size"]]
    seen = torch.cat([stored.flatten(0, 1), checkpoint["env"]["obs"]]).double()
    mean, var, count = model["obs_rms"]
    np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(var, seen.var(0, correction=0), rtol=1e-3, atol=1e-4)
    assert count == pytest.approx(512 + 4, abs=0.01)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path):
    """With the buffer, which wraps here: the same state and the same log, bit for bit."""
    args = {"buffer_size": 600, "eval_episodes": 2, "eval_interval": 256}
    train(tmp_path / "whole", total_timesteps=8 * 128, **args)
    train(tmp_path / "parts", total_timesteps=5 * 128, **args)
    resume(maddpg, tmp_path / "parts", total_timesteps=8 * 128)
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert whole["buffer"]["size"] == 150 and whole["buffer"]["position"] == 256 - 150
    assert differences(whole, parts) == []
    a, b = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    assert a["losses/q_loss"] == b["losses/q_loss"]
    assert a["charts/episodic_return"] == b["charts/episodic_return"]


def test_evaluation_does_not_disturb_the_training(tmp_path: Path):
    """The same state, to the last bit, with an evaluation after every iteration and without."""
    train(tmp_path / "run", eval_episodes=3, eval_interval=1)
    train(tmp_path / "without")
    assert differences(newest(tmp_path / "run"), newest(tmp_path / "without")) == []
    assert len(scalars(tmp_path / "run")["eval/episodic_return"]) == 4


def test_same_seed_same_run(tmp_path: Path):
    """The same arguments give the same bits; another seed does not."""
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(tmp_path / name, seed=seed)
    assert differences(newest(tmp_path / "a"), newest(tmp_path / "b")) == []
    assert "/critic/net.0.weight" in differences(newest(tmp_path / "a"), newest(tmp_path / "c"))


@pytest.mark.parametrize(
    "args", [{"n_step": 0}, {"tau": 1.5}, {"exploration_noise": -0.1}, {"updates_per_step": 0}]
)
def test_a_value_out_of_range_is_refused(args: dict):
    """By its type, which says whose value it is."""
    with pytest.raises(ValidationError, match=f"1 validation error for Args\n{next(iter(args))}"):
        maddpg.Args(**args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"buffer_size": 19, "n_step": 5}, "--buffer-size 19 must be at least 20"),
        ({"total_timesteps": 127}, "--total-timesteps 127 must be at least 128"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(
    args: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """With what would be right, before anything is on disk."""
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", **args)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "run").exists()


def test_the_smallest_buffer_trains(tmp_path: Path):
    """One window of five steps of four environments."""
    train(tmp_path / "run", buffer_size=20)
    assert newest(tmp_path / "run")["buffer"]["size"] == 5


def test_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NaN in one actor, in the very last update before it is logged; the last checkpoint stays."""
    update = maddpg.actor_update
    calls = []

    def poisoned(actors: torch.nn.ModuleList, *args: object) -> dict:
        calls.append(1)
        logged = update(actors, *args)
        # 0.1 updates a step after the first 64: the 19th is the last before step 256.
        if len(calls) == 19:
            actors[1].net[0].bias.data[0] = torch.nan
        return logged

    monkeypatch.setattr(maddpg, "actor_update", poisoned)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", checkpoint_interval=1)
    assert len(calls) == 19
    # The exit code of a message is 1.
    assert stop.value.code == "error: losses/parameter_norm is nan at step 256"
    checkpoint = newest(tmp_path / "run")
    assert checkpoint["step"] == 128
    assert all(tensor.isfinite().all() for tensor in checkpoint["policy"].values())
