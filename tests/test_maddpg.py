"""MADDPG: replay, targets and updates against brute force; its runs resume, evaluate and fail like the others."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import differences, newest, scalars
from test_siblings import functions

import envs
import maddpg_mamujoco as maddpg

ROOT = Path(maddpg.__file__).parent
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


def test_targets():
    """y = R + discount Q'(s', mu'(s')), each agent on its own entries, each action on its own actuators."""
    partition = envs.Partition((np.array([0, 2]), np.array([1])), (np.array([2, 0]), np.array([1])))
    generator = torch.Generator().manual_seed(0)
    actors = [maddpg.Actor(2, 2, (5,), generator), maddpg.Actor(1, 1, (5,), generator)]
    critic = maddpg.Critic(3, 3, (7,), generator)
    for p in [p for net in (*actors, critic) for p in net.parameters()]:
        p.data = torch.randn(p.shape, generator=generator)
    obs, returns, discounts = torch.randn(6, 3), torch.randn(6), torch.rand(6)
    y = maddpg.critic_targets(maddpg.JointPolicy(actors, partition), critic, returns, obs, discounts)

    def net(params: list, x: torch.Tensor) -> torch.Tensor:
        w0, b0, w1, b1 = params
        return (x @ w0.T + b0).clamp(min=0) @ w1.T + b1

    first = torch.tanh(net(list(actors[0].parameters()), obs[:, [0, 2]]))
    second = torch.tanh(net(list(actors[1].parameters()), obs[:, [1]]))
    joint = torch.stack([obs[:, 0], obs[:, 1], obs[:, 2], first[:, 1], second[:, 0], first[:, 0]], dim=1)
    torch.testing.assert_close(y, returns + discounts * net(list(critic.parameters()), joint)[:, 0])


# Updates


@pytest.fixture
def problem() -> dict:
    """Two actors, a critic, and a batch."""
    generator = torch.Generator().manual_seed(3)
    partition = envs.Partition((np.array([0, 1, 2]), np.array([1, 2])), (np.array([1]), np.array([0, 2])))
    actors = [maddpg.Actor(3, 1, (6,), generator), maddpg.Actor(2, 2, (6,), generator)]
    critic = maddpg.Critic(3, 3, (6,), generator)
    obs, actions = torch.randn(10, 3, generator=generator), torch.rand(10, 3, generator=generator) * 2 - 1
    return {"partition": partition, "actors": actors, "critic": critic, "obs": obs, "actions": actions}


def params_of(*networks: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for network in networks for p in network.parameters()]


def test_an_actor_update_is_the_policy_gradient_of_each_actor(problem: dict):
    """dQ/da^i dmu^i/dtheta with the others' actions from the buffer, for each i; the critic stays as it is."""
    actors, critic, partition = problem["actors"], problem["critic"], problem["partition"]
    obs, actions = problem["obs"], problem["actions"]
    replicas, critic_before, actions_before = copy.deepcopy(actors), params_of(critic), actions.clone()
    optimizer = torch.optim.SGD([p for actor in actors for p in actor.parameters()], lr=0.1)
    logged = maddpg.actor_update(maddpg.JointPolicy(actors, partition), optimizer, critic, obs, actions)

    # The chain rule by hand: first dQ/da at the joint action, then that times the actor's Jacobian.
    for i, (obs_ids, act_ids) in enumerate(zip(partition.obs_ids, partition.act_ids, strict=True)):
        joint = actions.clone()
        joint[:, act_ids] = replicas[i](obs[:, obs_ids]).detach()
        joint.requires_grad_()
        q = critic(obs, joint)
        dq_da = torch.autograd.grad(q.mean(), joint)[0][:, act_ids]
        params = list(replicas[i].parameters())
        gradients = torch.autograd.grad(replicas[i](obs[:, obs_ids]), params, grad_outputs=dq_da)
        expected = [p + 0.1 * g for p, g in zip(params, gradients, strict=True)]
        torch.testing.assert_close(params_of(actors[i]), expected)
        assert any((a - b).abs().max() > 1e-6 for a, b in zip(expected, params, strict=True))
        assert logged[i]["policy_loss"].item() == pytest.approx(-q.mean().item(), rel=1e-5)
    assert all(map(torch.equal, params_of(critic), critic_before))
    assert all(p.grad is None for p in critic.parameters())
    assert torch.equal(actions, actions_before)


def test_a_critic_update_is_a_gradient_step_on_the_squared_error(problem: dict):
    """And the actors stay as they are."""
    critic, obs, actions, targets = problem["critic"], problem["obs"], problem["actions"], torch.randn(10)
    replica, actors = copy.deepcopy(critic), params_of(*problem["actors"])
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    logged = maddpg.critic_update(critic, optimizer, obs, actions, targets)
    values = replica.net(torch.cat([obs, actions], 1))[:, 0]
    loss = sum((v - y) ** 2 for v, y in zip(values, targets, strict=True)) / 10
    gradients = torch.autograd.grad(loss, list(replica.parameters()))
    expected = [p - 0.05 * g for p, g in zip(replica.parameters(), gradients, strict=True)]
    torch.testing.assert_close(params_of(critic), expected)
    assert logged["q_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert logged["q_value"].item() == pytest.approx(values.mean().item(), rel=1e-4)
    assert all(map(torch.equal, params_of(*problem["actors"]), actors))


def test_polyak_averaging():
    """After k updates towards a fixed network the target is (1 - tau)^k of itself; with tau 1 it is the network."""
    generator = torch.Generator().manual_seed(0)
    network, target = (maddpg.Critic(2, 1, (4,), generator) for _ in range(2))
    start, end = params_of(target), params_of(network)
    for _ in range(7):
        maddpg.polyak([target], [network], 0.1)
    share = 0.9**7
    torch.testing.assert_close(
        params_of(target), [share * s + (1 - share) * e for s, e in zip(start, end, strict=True)]
    )
    maddpg.polyak([target], [network], 1.0)
    assert all(map(torch.equal, params_of(target), end))
    assert all(map(torch.equal, params_of(network), end))


# The main loop


def test_what_reaches_buffer_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Uniform actions first; then the policy plus noise of the given size, clipped; true last observations are kept."""
    steps, updates = [], []
    add, step = maddpg.ReplayBuffer.add, maddpg.NormalizedEnv.step
    critic_update = maddpg.critic_update

    def recorded_add(self: maddpg.ReplayBuffer, **data: torch.Tensor) -> None:
        steps.append({name: value.clone() for name, value in data.items()} | {"updates": len(updates)})
        add(self, **data)

    def recorded_step(self: maddpg.NormalizedEnv, actions: torch.Tensor) -> tuple:
        result = step(self, actions)
        assert actions.abs().max() <= 1
        steps.append({"acted": actions.clone(), "result": result})
        return result

    monkeypatch.setattr(maddpg.ReplayBuffer, "add", recorded_add)
    monkeypatch.setattr(maddpg.NormalizedEnv, "step", recorded_step)
    monkeypatch.setattr(maddpg, "critic_update", lambda *args: updates.append(args) or critic_update(*args))
    train(tmp_path / "run", total_timesteps=1024, learning_starts=512, updates_per_step=0.125, exploration_noise=0.2)
    taken, stored = steps[::2], steps[1::2]
    assert len(stored) == 256
    for i, (a, b) in enumerate(zip(taken, stored, strict=True)):
        obs, next_obs, rewards, _, truncations, infos = a["result"]
        assert torch.equal(a["acted"], b["actions"]) and torch.equal(rewards, b["rewards"])
        assert torch.equal(next_obs, b["next_obs"]) and torch.equal(truncations, b["truncations"])
        if "final_obs" in infos:  # Reacher's episodes end all at once, by the time limit
            final = torch.tensor(np.stack(list(infos["final_obs"])), dtype=torch.float32)
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
    tags = {"losses/q_loss", "losses/q_value", "agent_0/policy_loss", "agent_1/policy_loss", "charts/SPS"}
    assert tags | {"charts/episodic_return", "eval/episodic_return"} <= set(log.Tags()["scalars"])
    assert set(model) == {"agent_0", "agent_1", "critic", "obs_ids", "act_ids", "obs_rms", "args"}
    stored = newest(tmp_path / "run")["buffer"]["obs"].double().flatten(0, 1)  # raw, and all of it: nothing gave way
    torch.testing.assert_close(model["obs_rms"]["mean"], stored.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model["obs_rms"]["var"], stored.var(0, correction=0), rtol=1e-3, atol=1e-4)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path):
    """With the buffer, which wraps here: the same state and the same log, bit for bit."""
    args = {"buffer_size": 600, "eval_episodes": 2, "eval_interval": 256, "checkpoint_interval": 3}
    train(tmp_path / "whole", total_timesteps=8 * 128, **args)
    train(tmp_path / "parts", total_timesteps=5 * 128, **args)
    saved = newest(tmp_path / "parts")["args"]
    maddpg.main(maddpg.Args(**saved | {"resume": str(tmp_path / "parts"), "total_timesteps": 8 * 128}))
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert whole["buffer"]["size"] == 150 and whole["buffer"]["position"] == 256 - 150
    assert differences(whole, parts) == []
    a, b = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    assert a["losses/q_loss"] == b["losses/q_loss"] and a["charts/episodic_return"] == b["charts/episodic_return"]


def test_eval_only_repeats_the_last_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture):
    """With the frozen statistics of the checkpoint; evaluation does not disturb the training."""
    train(tmp_path / "run", eval_episodes=3, eval_interval=1)
    train(tmp_path / "without")
    assert differences(newest(tmp_path / "run"), newest(tmp_path / "without")) == []
    capsys.readouterr()
    maddpg.main(maddpg.Args(**newest(tmp_path / "run")["args"] | {"resume": str(tmp_path / "run"), "eval_only": True}))
    logged = scalars(tmp_path / "run")["eval/episodic_return"]
    assert len(logged) == 4 and capsys.readouterr().out.startswith(f"eval/episodic_return {logged[-1][1]:.1f} ")


def test_same_seed_same_run(tmp_path: Path):
    """The same arguments give the same bits; another seed does not."""
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(tmp_path / name, seed=seed)
    assert differences(newest(tmp_path / "a"), newest(tmp_path / "b")) == []
    assert "/critic/net.0.weight" in differences(newest(tmp_path / "a"), newest(tmp_path / "c"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"n_step": 0}, "--n-step is 0: it must be greater than 0"),
        ({"tau": 1.5}, "--tau is 1.5: it must be from 0 to 1"),
        ({"buffer_size": 10, "n_step": 5}, "--buffer-size 10 is less than --n-step 5 steps of all environments"),
        ({"total_timesteps": 100}, "--total-timesteps 100 is less than one iteration of 128 steps"),
    ],
)
def test_bad_input_is_one_line(args: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Exit code 2, and what would be right."""
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", **args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_buffer_that_does_not_fit_is_refused(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """With what is needed, what there is, and a size that would fit."""
    monkeypatch.setattr(maddpg, "available_memory", lambda _: 2**20)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", buffer_size=100_000)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert error == f"error: the replay buffer needs 10 MiB, 1 are free: --buffer-size {2**19 // 100}\n"
    monkeypatch.undo()
    train(tmp_path / "run", buffer_size=600)
    args = newest(tmp_path / "run")["args"] | {"resume": str(tmp_path / "run"), "eval_only": True, "eval_episodes": 1}
    monkeypatch.setattr(maddpg, "available_memory", lambda _: 0)
    maddpg.main(maddpg.Args(**args))  # an evaluation needs no buffer
    monkeypatch.undo()
    assert 2**26 < maddpg.available_memory(CPU) < 2**50


def test_not_finite_names_agent_and_step(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """NaN in one actor stops the run; the last checkpoint stays."""
    update, calls = maddpg.actor_update, []

    def poisoned(policy: maddpg.JointPolicy, *args: object) -> list[dict]:
        calls.append(1)
        logged = update(policy, *args)
        if len(calls) == 10:
            policy.actors[1].net[0].bias.data[0] = torch.nan
        return logged

    monkeypatch.setattr(maddpg, "actor_update", poisoned)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", checkpoint_interval=1)
    assert stop.value.code == 1 and "agent_1/net.0.bias" in capsys.readouterr().err
    assert newest(tmp_path / "run")["agent_1"]["net.0.bias"].isfinite().all()


def test_shared_functions_are_the_siblings():
    """What MADDPG has in common with HAPPO is the same text."""
    mine, happo = (functions(ROOT / f"{name}_mamujoco.py") for name in ("maddpg", "happo"))
    own = {"Args", "Actor", "JointPolicy", "critic_update", "check_args", "main"}
    common = (mine.keys() & happo.keys()) - own
    assert {"RunningMeanStd", "NormalizedEnv", "mlp", "evaluate", "save", "load_checkpoint", "describe_run"} <= common
    assert [name for name in common if mine[name] != happo[name]] == []
