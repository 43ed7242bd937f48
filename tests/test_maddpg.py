"""MADDPG: replay, targets and updates against brute force; its runs resume, evaluate and fail like the others."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mlp
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import differences, newest, resume, scalars

import envs
import maddpg_mamujoco as maddpg
from envs import tasks

SMALL = {"env_id": "Reacher-2x1", "num_envs": 4, "num_steps": 32, "hidden_sizes": (16, 16), "num_threads": 1}
SMALL |= {"learning_starts": 64, "batch_size": 16, "buffer_size": 4000, "eval_episodes": 0}
CPU = torch.device("cpu")


def train(run_dir: Path, **args: object) -> dict:
    """Run main in this process on a small budget; return the model."""
    maddpg.main(maddpg.Args(**(SMALL | {"total_timesteps": 512} | args), run_dir=str(run_dir)))
    return torch.load(run_dir / "model.pt", weights_only=True)


# Replay and targets


def filled(capacity: int, num_steps: int, num_envs: int = 3, seed: int = 0) -> tuple[maddpg.ReplayBuffer, dict]:
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
    history["obs"][..., 0] = np.arange(num_steps)[:, None]  # tells the step, and the environment, that a row is of
    history["obs"][..., 1] = np.arange(num_envs)
    buffer = maddpg.ReplayBuffer(capacity, num_envs, 2, 1, CPU)
    for t in range(num_steps):
        buffer.add(**{name: torch.tensor(value[t], dtype=torch.float32) for name, value in history.items()})
    return buffer, history


@pytest.mark.parametrize("n_step", [1, 3, 8])
@pytest.mark.parametrize("num_steps", [5, 20, 33])
def test_samples_are_what_a_loop_over_the_history_gives(n_step: int, num_steps: int):
    """Before and after the buffer wraps: windows stop at ends of episodes and at the newest step, and never go on."""
    capacity, gamma = 20, 0.9
    buffer, history = filled(capacity, num_steps)
    generator = torch.Generator().manual_seed(1)
    obs, actions, returns, next_obs, discounts = buffer.sample(2000, n_step, gamma, generator)
    seen, reasons = set(), set()
    for row in range(2000):
        t, env = int(obs[row, 0]), int(obs[row, 1])
        assert max(0, num_steps - capacity) <= t < num_steps
        np.testing.assert_allclose(actions[row], history["actions"][t, env], rtol=1e-6)
        total, steps = 0.0, 0
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
        expected = 0.0 if history["terminations"][last, env] else gamma**steps  # a truncation bootstraps
        assert discounts[row].item() == pytest.approx(expected, rel=1e-5)
        seen.add((t, env))
    assert len(seen) == min(capacity, num_steps) * 3
    assert reasons >= {"end"} | ({"n"} if n_step < 8 else set()) | ({"newest"} if n_step > 1 else set())


def test_sampling_is_uniform():
    """Every stored (step, environment) is equally likely, also after wrapping (chi-square)."""
    buffer, _ = filled(capacity=10, num_steps=17)
    obs, *_ = buffer.sample(30_000, 3, 0.9, torch.Generator().manual_seed(2))
    cells = ((obs[:, 0] - 7) * 3 + obs[:, 1]).long()
    assert stats.chisquare(np.bincount(cells, minlength=30)).pvalue > 0.01


def test_a_buffer_goes_through_a_checkpoint():
    """Its state is the buffer itself; what has loaded it draws the same, and is a copy."""
    buffer, _ = filled(capacity=10, num_steps=17)
    state, (loaded, _) = buffer.state_dict(), filled(capacity=10, num_steps=3, seed=1)
    assert all(state[name] is data for name, data in buffer.data.items())
    loaded.load_state_dict(state)

    def draw(buffer: maddpg.ReplayBuffer) -> tuple[torch.Tensor, ...]:
        return buffer.sample(100, 3, 0.9, torch.Generator().manual_seed(0))

    before = draw(buffer)
    assert all(map(torch.equal, draw(loaded), before))
    for data in loaded.data.values():
        data.zero_()
    assert all(map(torch.equal, draw(buffer), before))


# Updates

HIDDEN = (6,)
# What the agents see overlaps; they have different numbers of actions, which are not neighbours.
PARTITION = envs.Partition((np.array([0, 2]), np.array([1, 2, 0])), (np.array([2, 0]), np.array([1])))


@pytest.fixture
def problem() -> dict:
    """A policy and a critic with random parameters, and a batch."""
    generator, args = torch.Generator().manual_seed(3), maddpg.Args(hidden_sizes=HIDDEN)
    policy, critic = maddpg.Policy(PARTITION, 3, args, generator, CPU), maddpg.Critic(3, 3, args, generator)
    for network in (policy.joint, critic):
        network.theta.data.copy_(0.5 * torch.randn(network.theta.shape, generator=generator))
    obs, actions = torch.randn(10, 3, generator=generator), torch.rand(10, 3, generator=generator) * 2 - 1
    return {"policy": policy, "critic": critic, "obs": obs, "actions": actions}


def own_actions(theta: torch.Tensor, obs: torch.Tensor, i: int) -> torch.Tensor:
    """What agent i of `PARTITION` does, by its theta: its entries padded to 3, the first of 2 outputs."""
    own = torch.cat([obs[:, PARTITION.obs_ids[i]], torch.zeros(len(obs), 3 - len(PARTITION.obs_ids[i]))], 1)
    return torch.tanh(mlp(theta, own, (*HIDDEN, 2))[0][:, : len(PARTITION.act_ids[i])])


def q_values(theta: torch.Tensor, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """What the critic says, by its theta."""
    return mlp(theta, torch.cat([obs, actions], 1), (*HIDDEN, 1))[0][:, 0]


def test_actions_and_targets(problem: dict):
    """Each agent on its own entries, each action on its own actuators; y = R + discount Q'(s', mu'(s'))."""
    policy, critic, obs = problem["policy"], problem["critic"], problem["obs"]
    first, second = (own_actions(policy.joint.theta[i], obs, i) for i in range(2))
    joint = torch.stack([first[:, 1], second[:, 0], first[:, 0]], dim=1).detach()
    torch.testing.assert_close(policy.act(obs), joint)
    returns, discounts = torch.randn(10), torch.rand(10)
    y = maddpg.critic_targets(policy, critic, returns, obs, discounts)
    torch.testing.assert_close(y, returns + discounts * q_values(critic.theta, obs, joint).detach())
    assert not y.requires_grad


def test_export_is_the_policy(problem: dict):
    """In NumPy, as a user would: tanh of agent i's layers on its entries, of which the last is 0, gives its actions."""
    model, obs = problem["policy"].export(), problem["obs"]
    actions, padded = torch.full((10, 3), torch.nan), np.column_stack([obs, np.zeros(10)])
    for (w0, b0, w1, b1), obs_ids, act_ids in zip(model["agents"], model["obs_ids"], model["act_ids"], strict=True):
        x = np.maximum(padded[:, obs_ids] @ w0.numpy() + b0.numpy(), 0) @ w1.numpy() + b1.numpy()
        actions[:, act_ids] = torch.tensor(np.tanh(x)[:, : len(act_ids)], dtype=torch.float32)
    torch.testing.assert_close(problem["policy"].act(obs), actions)
    assert model["tanh"] is True


def test_an_actor_update_is_the_policy_gradient_of_each_actor(problem: dict):
    """dQ/da^i dmu^i/dtheta with the others' actions from the buffer, for each i; the critic stays as it is."""
    policy, critic, obs, actions = (problem[key] for key in ("policy", "critic", "obs", "actions"))
    old, critic_before, actions_before = policy.joint.theta.detach().clone(), critic.theta.clone(), actions.clone()
    logged = maddpg.actor_update(policy, torch.optim.SGD(policy.parameters(), lr=0.1), critic, obs, actions)

    # The chain rule by hand: first dQ/da at the joint action, then that times the actor's Jacobian.
    for i, act_ids in enumerate(PARTITION.act_ids):
        theta, joint = old[i].requires_grad_(), actions.clone()
        own = own_actions(theta, obs, i)
        joint[:, act_ids] = own.detach()
        q = q_values(critic_before, obs, joint.requires_grad_())
        dq_da = torch.autograd.grad(q.mean(), joint)[0][:, act_ids]
        (gradient,) = torch.autograd.grad(own, theta, grad_outputs=dq_da)
        torch.testing.assert_close(policy.joint.theta[i], theta + 0.1 * gradient)
        assert gradient.abs().max() > 1e-3
        assert logged[i]["policy_loss"].item() == pytest.approx(-q.mean().item(), rel=1e-5)
    assert torch.equal(critic.theta, critic_before) and critic.theta.grad is None
    assert torch.equal(actions, actions_before)


def test_a_critic_update_is_a_gradient_step_on_the_squared_error(problem: dict):
    """And the actors stay as they are."""
    policy, critic, obs, actions = (problem[key] for key in ("policy", "critic", "obs", "actions"))
    targets, theta, actors = torch.randn(10), critic.theta.detach().clone().requires_grad_(), policy.joint.theta.clone()
    logged = maddpg.critic_update(critic, torch.optim.SGD(critic.parameters(), lr=0.05), obs, actions, targets)
    values = q_values(theta, obs, actions)
    loss = sum((v - y) ** 2 for v, y in zip(values, targets, strict=True)) / 10
    torch.testing.assert_close(critic.theta, theta - 0.05 * torch.autograd.grad(loss, theta)[0])
    assert logged["q_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert logged["q_value"].item() == pytest.approx(values.mean().item(), rel=1e-4)
    assert torch.equal(policy.joint.theta, actors)


def test_polyak_averaging():
    """After k updates towards a fixed network the target is (1 - tau)^k of itself; with tau 1 it is the network."""
    args, generator = maddpg.Args(hidden_sizes=HIDDEN), torch.Generator().manual_seed(0)
    network, target = (maddpg.Critic(2, 1, args, generator) for _ in range(2))
    start, end = target.theta.clone(), network.theta.clone()
    for _ in range(7):
        maddpg.polyak([target], [network], 0.1)
    torch.testing.assert_close(target.theta, 0.9**7 * start + (1 - 0.9**7) * end)
    maddpg.polyak([target], [network], 1.0)
    assert torch.equal(target.theta, end) and torch.equal(network.theta, end)


# The main loop


def test_what_reaches_buffer_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Uniform actions first; then the policy plus noise of the given size, clipped; true last observations are kept."""
    steps, updates, infos = [], [], []
    add, step, vec_step = maddpg.ReplayBuffer.add, maddpg.NormalizedEnv.step, tasks.MujocoVectorEnv.step
    critic_update = maddpg.critic_update

    def recorded_add(self: maddpg.ReplayBuffer, **data: torch.Tensor) -> None:
        steps.append({name: value.clone() for name, value in data.items()} | {"updates": len(updates)})
        add(self, **data)

    def recorded_step(self: maddpg.NormalizedEnv, actions: torch.Tensor) -> tuple:
        result = step(self, actions)
        assert actions.abs().max() <= 1
        steps.append({"acted": actions.clone(), "result": result})
        return result

    def recorded_vec_step(self: tasks.MujocoVectorEnv, actions: np.ndarray) -> tuple:
        result = vec_step(self, actions)
        infos.append(result[-1])
        return result

    monkeypatch.setattr(tasks.MujocoVectorEnv, "step", recorded_vec_step)
    monkeypatch.setattr(maddpg.ReplayBuffer, "add", recorded_add)
    monkeypatch.setattr(maddpg.NormalizedEnv, "step", recorded_step)
    monkeypatch.setattr(maddpg, "critic_update", lambda *args: updates.append(args) or critic_update(*args))
    train(tmp_path / "run", total_timesteps=1024, learning_starts=512, updates_per_step=0.125, exploration_noise=0.2)
    taken, stored = steps[::2], steps[1::2]
    assert len(stored) == 256
    for i, (a, b) in enumerate(zip(taken, stored, strict=True)):
        obs, next_obs, rewards, _, truncations = a["result"]
        assert torch.equal(a["acted"], b["actions"]) and torch.equal(rewards, b["rewards"])
        assert torch.equal(next_obs, b["next_obs"]) and torch.equal(truncations, b["truncations"])
        if "final_obs" in infos[i]:  # Reacher's episodes end all at once, by the time limit
            final = torch.tensor(np.stack(list(infos[i]["final_obs"])), dtype=torch.float32)
            torch.testing.assert_close(b["next_obs"], final)
            assert not torch.equal(obs, next_obs) and truncations.all()
        if i + 1 < len(stored):
            assert torch.equal(stored[i + 1]["obs"], obs)
    random = torch.stack([b["actions"] for b in stored[:128]]).flatten()
    assert stats.kstest(random.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    early = torch.stack([b["actions"] for b in stored[128:140]]).flatten()  # the policy's own actions are small still
    assert early.std().item() == pytest.approx(0.2, rel=0.3) and abs(early.mean().item()) < 0.1
    # 0.125 updates a step, 4 environments: one every other step, after the first 512 environment steps.
    assert [b["updates"] for b in stored[126:134]] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert len(updates) == 64
    # What is learnt from is normalised, what is stored is not: targets are within 0.2 metres.
    learnt, raw = torch.cat([args[2] for args in updates]), torch.cat([b["obs"] for b in stored])
    assert raw.std(0).min() < 0.2 and learnt.mean(0).abs().max() < 0.3 and (learnt.std(0) - 1).abs().max() < 0.4


def test_log_and_model(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Memory is stated first; the log has what the documentation explains; the model has no buffer."""
    model = train(tmp_path / "run", eval_episodes=2)
    # float32: observation twice, 10 each; 2 actions; reward, termination, truncation
    assert capsys.readouterr().out.startswith(f"replay buffer: {4000 * 4 * 25 / 2**20:.0f} MiB for 4000 transitions\n")
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = {"losses/q_loss", "losses/q_value", "losses/parameter_norm", "agent_0/policy_loss", "agent_1/policy_loss"}
    assert tags | {"charts/episodic_return", "charts/SPS", "eval/episodic_return"} <= set(log.Tags()["scalars"])
    assert set(model) == {"agents", "obs_ids", "act_ids", "tanh", "obs_rms", "args"}
    checkpoint = newest(tmp_path / "run")
    stored = checkpoint["buffer"]["obs"][: checkpoint["buffer"]["size"]]  # raw, and all of it: nothing gave way
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
    assert a["losses/q_loss"] == b["losses/q_loss"] and a["charts/episodic_return"] == b["charts/episodic_return"]


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
    assert "/critic/theta" in differences(newest(tmp_path / "a"), newest(tmp_path / "c"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"n_step": 0}, "--n-step is 0: it must be from 1 to 100000"),
        ({"tau": 1.5}, "--tau is 1.5: it must be from 0 to 1"),
        ({"num_envs": 4, "buffer_size": 19, "n_step": 5}, "--buffer-size is 19: it must be from 20 to 1000000000000"),
        ({"num_envs": 4, "num_steps": 32, "total_timesteps": 127}, "--total-timesteps 127 is less than num_envs * num"),
    ],
)
def test_bad_input_is_refused(args: dict, message: str):
    """With what would be right."""
    with pytest.raises(ValueError, match=re.escape(message)):
        maddpg.Args(**args)


def test_a_buffer_that_does_not_fit_is_refused(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """With what is needed, what there is, and a size that would fit."""
    monkeypatch.setattr(maddpg, "available_memory", lambda _: 2**20)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", buffer_size=100_000)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert error == f"error: the replay buffer needs 10 MiB, 1 are free: --buffer-size {2**19 // 100}\n"


def test_available_memory_is_the_least_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What Linux and the container's cgroup say in their files, made up here; without them there is no limit."""
    assert 2**26 < maddpg.available_memory(CPU) < 2**50  # of this machine
    monkeypatch.setattr(maddpg, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert maddpg.available_memory(CPU) == 2**63
    cgroup = tmp_path / "sys/fs/cgroup"
    for folder in (tmp_path / "proc", cgroup):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n")
    assert maddpg.available_memory(CPU) == 5000 * 1024
    (cgroup / "memory.current").write_text("1000000\n")
    for limit, available in (("max", 5_120_000), ("9000000", 5_120_000), ("3000000", 2_000_000)):
        (cgroup / "memory.max").write_text(f"{limit}\n")
        assert maddpg.available_memory(CPU) == available


def test_not_finite_stops_the_run(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """NaN in one actor, in the very last update before it is logged; the last checkpoint stays."""
    update, calls = maddpg.actor_update, []

    def poisoned(policy: maddpg.Policy, *args: object) -> list[dict]:
        calls.append(1)
        logged = update(policy, *args)
        if len(calls) == 19:  # 0.1 updates a step after the first 64, so that is all before step 256
            policy.joint.theta.data[1, 0] = torch.nan
        return logged

    monkeypatch.setattr(maddpg, "actor_update", poisoned)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", checkpoint_interval=1)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and len(calls) == 19
    assert error == f"error: losses/parameter_norm is nan at step 256; {tmp_path / 'run'} has what was saved before\n"
    assert newest(tmp_path / "run")["step"] == 128
    assert newest(tmp_path / "run")["policy"]["joint.theta"].isfinite().all()
