"""Runs that are stopped, resumed, evaluated, shared, tracked, and that fail."""

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import ROOT, SMALL, command_line, error_of, train

import envs

pytestmark = pytest.mark.slow  # whole runs and processes

ITERATION = 128  # environment steps, with the flags of SMALL and in `train`
TIMES = {"charts/SPS"}
HAPPO = ROOT / "happo_mamujoco.py"


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All points of a run's TensorBoard log but the measured times: (step, value) by tag."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = set(log.Tags()["scalars"]) - TIMES
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in tags}


def newest(run_dir: Path) -> dict:
    """The checkpoint of a run."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Where two checkpoints differ, except in what belongs to the run and not to its state."""
    if path == "/args":
        return []
    if isinstance(a, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


def next_second() -> None:
    """Wait until a new event file sorts behind the old: its name is the second, then the number of the process."""
    time.sleep(1 - time.time() % 1)


def resume(script: ModuleType, run_dir: Path, **changes: object) -> dict:
    """Continue a run in this process, as `--resume` with these flags does; return its model."""
    next_second()
    checkpoint = newest(run_dir)
    script.main(
        script.Args(**checkpoint["args"] | {"resume": str(run_dir), "run_dir": str(run_dir)} | changes), checkpoint
    )
    return torch.load(run_dir / "model.pt", weights_only=True)


# Resuming


@pytest.mark.parametrize("env_id", [*envs.ENV_IDS, "Ant-v4-4x2", "InvertedDoublePendulum-v5-1x1"])
def test_environments_go_on_from_their_state(env_id: str):
    """Other environments, put into the saved state, do what the saved ones do: all results, resets, statistics."""
    rng = np.random.default_rng(0)
    vec, other = envs.make_vec(env_id, 3), envs.make_vec(env_id, 3)
    vec.reset(seed=1)
    other.reset(seed=2)
    limit = getattr(vec, "max_episode_steps", 1000)

    def actions() -> np.ndarray:
        return rng.uniform(vec.action_space.low, vec.action_space.high).astype(np.float32)

    for _ in range(7):
        vec.step(actions())
    state = vec.get_state()
    if "elapsed_steps" in state:  # a time limit within reach
        state["elapsed_steps"] = vec._elapsed_steps[:] = [limit - 9, limit - 5, 7]
    other.set_state(state)
    assert differences(vec.get_state(), other.get_state()) == []
    ended = 0
    for _ in range(40):
        a = actions()
        (*results, infos), (*others, _) = vec.step(a), other.step(a)
        for x, y in zip(results, others, strict=True):
            np.testing.assert_array_equal(x, y)
        ended += infos["_final_obs"].sum() if "_final_obs" in infos else 0
    assert ended >= 2 or "elapsed_steps" not in state
    with pytest.raises(ValueError):
        envs.make_vec(env_id, 2).set_state(state)


@pytest.mark.parametrize(("env_id", "eval_episodes"), [("Ant-4x2", 0), ("Hopper-3x1", 2)])  # an Ant plays long
def test_resumed_run_is_the_uninterrupted_one(script: ModuleType, env_id: str, eval_episodes: int, tmp_path: Path):
    """The whole state after 3 + 3 iterations is that after 6, bit for bit, and so is every point of the log."""
    total = {"total_timesteps": 6 * ITERATION, "eval_episodes": eval_episodes, "eval_interval": 300}
    train(script, tmp_path / "whole", env_id=env_id, **total)
    train(script, tmp_path / "parts", env_id=env_id, **total | {"total_timesteps": 3 * ITERATION})
    resume(script, tmp_path / "parts", total_timesteps=6 * ITERATION)
    assert differences(newest(tmp_path / "whole"), newest(tmp_path / "parts")) == []
    whole, parts = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    assert len(whole["losses/value_loss"]) == 6
    assert not eval_episodes or len(whole["eval/episodic_return"]) == 3
    # The first part ended, so it was evaluated there too.
    for tag in [tag for tag in parts if tag.startswith("eval/")]:
        parts[tag] = [point for point in parts[tag] if point[0] != 3 * ITERATION or point in whole[tag]]
    assert parts == whole


def test_killed_run_resumes_without_a_trace(tmp_path: Path):
    """A run killed between two checkpoints: the log of the resumed one has each point once (tests/kill.py does 100)."""
    import mappo_mamujoco as script

    flags = [*SMALL, "--total-timesteps", str(40 * ITERATION), "--checkpoint-interval", str(7 * ITERATION)]
    command_line(script, *flags, "--run-dir", tmp_path / "whole")
    command = [sys.executable, script.__file__, *flags, "--run-dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert newest(tmp_path / "killed")["step"] < 40 * ITERATION
    next_second()
    command_line(script, "--resume", tmp_path / "killed")
    assert differences(newest(tmp_path / "whole"), newest(tmp_path / "killed")) == []
    assert scalars(tmp_path / "whole") == scalars(tmp_path / "killed")


def test_the_log_is_written_before_the_checkpoint(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill right after a checkpoint finds all the points up to it in the log."""
    order, flush, save = [], script.SummaryWriter.flush, script.save
    monkeypatch.setattr(script.SummaryWriter, "flush", lambda self: order.append("log") or flush(self))
    monkeypatch.setattr(script, "save", lambda state, path: order.append(path.name[:5]) or save(state, path))
    train(script, tmp_path / "run", checkpoint_interval=1)
    assert [x for x in order if x != "model"][:4] == ["log", "check", "log", "check"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of HAPPO on Reacher-2x1: 4 iterations, evaluated."""
    import happo_mamujoco as script

    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(script, run_dir, total_timesteps=4 * ITERATION, checkpoint_interval=2 * ITERATION, eval_episodes=3)
    return run_dir


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to play with."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_torn_checkpoint_is_refused(copied: Path, capsys: pytest.CaptureFixture):
    """Half a file, an empty one, one with a hole: one line, and nothing is touched."""
    file = copied / "checkpoint.pt"
    whole = file.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", whole[:1000] + bytes(1000) + whole[2000:]):
        file.write_bytes(torn)
        error = error_of(capsys, 2, HAPPO, "--resume", copied, "--total-timesteps", 6 * ITERATION)
        assert f"--resume {copied}: no checkpoint can be read there" in error
        assert file.read_bytes() == torn


def test_foreign_checkpoints_are_refused(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A hostile pickle runs nothing; another script's checkpoint is refused by that script's name."""
    bait, file = tmp_path / "bait", copied / "checkpoint.pt"

    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(bait),)

    original = newest(copied)
    torch.save({"script": "happo_mamujoco", "args": Hostile()}, file)
    assert "no checkpoint can be read there" in error_of(capsys, 2, HAPPO, "--resume", copied)
    assert not bait.exists()
    torch.load(file, weights_only=False)  # the bait works
    assert bait.exists()
    torch.save(original | {"script": "mappo_mamujoco"}, file)
    assert "mappo_mamujoco.py made it" in error_of(capsys, 2, HAPPO, "--resume", copied)
    for nothing in (tmp_path, tmp_path / "nowhere"):
        assert f"--resume {nothing}: no checkpoint can be read there" in error_of(capsys, 2, HAPPO, "--resume", nothing)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "Ant-4x2"], "robot, agents, networks and num_envs must stay"),
        (["--env-id", "Reacher-[[1],[0]]"], "robot, agents, networks and num_envs must stay"),
        (["--hidden-sizes", 8], "robot, agents, networks and num_envs must stay"),
        (["--num-envs", 5], "robot, agents, networks and num_envs must stay"),
        (["--num-envs", 1], "robot, agents, networks and num_envs must stay"),
        (["--total-timesteps", 512], "--total-timesteps 512: the run has 512 already, raise it to go on"),
        (["--gamma", 2], "--gamma is 2.0: it must be from 0 to 1"),
        (["--run-dir", "tests"], "--run-dir tests is taken or cannot be made"),
    ],
)
def test_what_cannot_go_on_is_refused(copied: Path, flags: list, message: str, capsys, monkeypatch):
    """And nothing in the run's directory changes."""
    monkeypatch.chdir(ROOT)
    before = {file: file.read_bytes() for file in copied.iterdir()}
    error = error_of(capsys, 2, HAPPO, "--resume", copied, "--total-timesteps", 9999, *flags)
    assert message in " ".join(error.replace("│", " ").split())
    assert {file: file.read_bytes() for file in copied.iterdir()} == before


def test_flags_beside_resume_replace_the_runs(copied: Path, tmp_path: Path):
    """The rate of the last two iterations is the new one; the rest, and what an older checkpoint lacks, is kept."""
    file, checkpoint = copied / "checkpoint.pt", newest(copied)
    assert checkpoint["args"].pop("share_param") is False and checkpoint["args"]["hidden_sizes"] == (16, 16)
    torch.save(checkpoint, file)
    other = tmp_path / "other"
    before = {file: file.read_bytes() for file in copied.glob("*.pt")}
    command_line(HAPPO, "--resume", copied, "--total-timesteps", 768, "--learning-rate", 1e-5, "--run-dir", other)
    assert {file: file.read_bytes() for file in copied.glob("*.pt")} == before  # --run-dir: the old run stays
    assert newest(other)["args"]["hidden_sizes"] == (16, 16) and newest(other)["args"]["share_param"] is False
    rates = scalars(other)["charts/learning_rate"]
    assert [step for step, _ in rates] == [640, 768] and all(rate == pytest.approx(1e-5) for _, rate in rates)


def test_annealing_follows_the_total_in_force(tmp_path: Path):
    """The rate falls linearly to 0 at --total-timesteps; a run that is extended takes the line to its new end."""
    import happo_mamujoco as script

    train(script, tmp_path / "run", total_timesteps=2 * ITERATION, anneal_lr=True)
    resume(script, tmp_path / "run", total_timesteps=4 * ITERATION)
    rates = [rate / script.Args().learning_rate for _, rate in scalars(tmp_path / "run")["charts/learning_rate"]]
    np.testing.assert_allclose(rates, [1, 1 / 2, 1 / 2, 1 / 4], rtol=1e-6)


def test_a_directory_has_one_run_at_a_time(copied: Path, capsys: pytest.CaptureFixture):
    """A second process is refused in one line while the first holds the lock, which ends with it."""
    program = (
        "import sys, filelock, time; a = filelock.FileLock(sys.argv[1]); a.acquire(); print(flush=True); time.sleep(99)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, copied / "lock"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    error = error_of(capsys, 2, HAPPO, "--resume", copied, "--total-timesteps", 5 * ITERATION)
    assert f"--run-dir {copied} is taken" in error
    holder.kill()
    holder.wait()
    command_line(HAPPO, "--resume", copied, "--total-timesteps", 5 * ITERATION)
    assert newest(copied)["step"] == 5 * ITERATION


def test_ctrl_c_names_the_directory(tmp_path: Path):
    """One line says how to go on, and that works."""
    import happo_mamujoco as script

    run_dir = tmp_path / "run"
    flags = [*SMALL, "--checkpoint-interval", "1", "--total-timesteps", "1000000", "--run-dir", str(run_dir)]
    process = subprocess.Popen([sys.executable, script.__file__, *flags], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not (run_dir / "checkpoint.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == f"error: stopped; to go on: --resume {run_dir}\n"
    step = newest(run_dir)["step"]
    resume(script, run_dir, total_timesteps=step + ITERATION)
    points = [at for at, _ in scalars(run_dir)["losses/value_loss"]]
    assert points == list(range(ITERATION, step + 2 * ITERATION, ITERATION))


# Evaluation, sharing


def test_evaluation_does_not_disturb_the_training(script: ModuleType, tmp_path: Path):
    """With evaluation every iteration, and without any: the same state to the last bit."""
    train(script, tmp_path / "with", env_id="Hopper-3x1", eval_interval=1, eval_episodes=3)
    train(script, tmp_path / "without", env_id="Hopper-3x1", eval_episodes=0)
    assert differences(newest(tmp_path / "with"), newest(tmp_path / "without")) == []
    assert len(scalars(tmp_path / "with")["eval/episodic_return"]) == 2
    assert "eval/episodic_return" not in scalars(tmp_path / "without")


def test_evaluation_counts_the_first_episode_of_each_environment(script: ModuleType):
    """Environments whose episodes take 2, 3 and 7 steps: the short ones' later episodes do not count."""
    lengths, t = np.array([2, 3, 7]), [0]

    def step(actions: np.ndarray) -> tuple:
        t[0] += 1
        rewards = t[0] * np.ones(3)
        return np.zeros((3, 1)), rewards, t[0] % lengths == 0, np.zeros(3, dtype=bool), {}

    vec = SimpleNamespace(num_envs=3, reset=lambda seed: (np.zeros((3, 1)), {}), step=step)
    env = SimpleNamespace(normalize=lambda obs: obs, scale=lambda actions: actions)
    log = script.evaluate(vec, env, SimpleNamespace(act=lambda obs: obs), 0)
    returns = lengths * (lengths + 1) / 2
    assert t[0] == 7 and log["eval/episodic_length"] == 4
    assert log["eval/episodic_return"] == returns.mean() and log["eval/episodic_return_std"] == returns.std()
    assert (log["eval/episodic_return_min"], log["eval/episodic_return_max"]) == (3, 28)


@pytest.mark.parametrize("flags", [{}, {"agent_obsk": 0}], ids=["full", "partial"])
def test_shared_policy_scores_in_gymnasium_what_was_logged(script: ModuleType, flags: dict, tmp_path: Path):
    """docs/usage.md's lines load a model and play Gymnasium's own Hopper-v5: return and length are those of the log."""
    args = {"env_id": "Hopper-3x1", "total_timesteps": 4 * ITERATION, "eval_episodes": 4}
    train(script, tmp_path / "run", **args, **flags)
    names: dict = {}
    lines = (ROOT / "docs/usage.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines.replace("MODEL", str(tmp_path / "run" / "model.pt")), names)
    env, episodes = gym.make("Hopper-v5"), []
    for i in range(4):
        obs, _ = env.reset(seed=1 + 1_000_000 + i)
        rewards, over = [], False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(names["policy"](obs))
            rewards.append(reward)
            over = terminated or truncated
        episodes.append((sum(rewards), len(rewards)))
    returns, lengths = np.transpose(episodes)
    expected = {"": returns.mean(), "_std": returns.std(), "_min": returns.min(), "_max": returns.max()}
    log = scalars(tmp_path / "run")
    for suffix, value in expected.items():
        np.testing.assert_allclose(log[f"eval/episodic_return{suffix}"][-1][1], value, rtol=1e-4)
    assert log["eval/episodic_length"][-1][1] == lengths.mean()


# Records


def test_wandb_gets_the_same_offline(tmp_path: Path):
    """`--track` without a network: Weights & Biases' own file has the configuration and the metrics."""
    import happo_mamujoco as script

    pytest.importorskip("wandb")
    flags = [*SMALL, "--env-id", "Reacher-2x1", "--total-timesteps", 256, "--eval-episodes", 1, "--track"]
    command = [sys.executable, script.__file__, *map(str, flags), "--run-dir", str(tmp_path / "run")]
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    for words in (b"episodic_return", b"value_loss", b"Reacher-2x1", b"clip_coef"):
        assert words in content


# Failing


def test_full_disk_loses_nothing(copied: Path):
    """No file may grow beyond 20 kB: the next checkpoint cannot be written, the last ones stay and lead on."""
    import happo_mamujoco as script

    before = {file: file.read_bytes() for file in copied.glob("*.pt")}
    command = [sys.executable, script.__file__, "--resume", copied, "--total-timesteps", str(6 * ITERATION)]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **limit)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert {file: file.read_bytes() for file in copied.glob("*.pt")} == before
    resume(script, copied, total_timesteps=6 * ITERATION)
    points = scalars(copied)["losses/value_loss"]
    assert [step for step, _ in points] == [ITERATION * i for i in range(1, 7)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_stops_a_large_checkpoint_is_told(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PyTorch makes a RuntimeError of what a file raises in the middle; the old file stays."""
    import happo_mamujoco as script

    class Disk(io.BytesIO):
        def write(self, data: bytes) -> int:
            if self.tell() > 2**16:
                raise error
            return super().write(data)

    script.save({"step": 1}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr("builtins.open", lambda *_: Disk())
    with pytest.raises(type(error)) as raised:
        script.save({"step": 2, "buffer": torch.zeros(2**16)}, tmp_path / "checkpoint.pt")
    monkeypatch.undo()
    assert raised.value is error and newest(tmp_path) == {"step": 1}


def test_a_checkpoint_is_replaced_never_written_to(script: ModuleType, tmp_path: Path):
    """Who has the old file open reads the old state to its end: there is no moment with half of the new one."""
    script.save({"step": 1}, tmp_path / "checkpoint.pt")
    (tmp_path / "open.pt").hardlink_to(tmp_path / "checkpoint.pt")
    script.save({"step": 2}, tmp_path / "checkpoint.pt")
    assert torch.load(tmp_path / "open.pt") == {"step": 1} and newest(tmp_path) == {"step": 2}
    assert {path.name for path in tmp_path.iterdir()} == {"open.pt", "checkpoint.pt"}


def test_deleted_run_directory_is_one_line(tmp_path: Path):
    """Somebody deletes the directory of a running run."""
    import hatrpo_mamujoco as script

    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        script.__file__,
        *SMALL,
        "--total-timesteps",
        "1000000",
        "--checkpoint-interval",
        "1",
        "--run-dir",
        str(run_dir),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (run_dir / "model.pt").exists():
        time.sleep(0.05)
    run_dir.rename(tmp_path / "gone")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("error: [Errno 2] No such file or directory") and error.count("\n") == 1


def test_read_only_disk_is_one_line(copied: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """The file system turns read-only: what was saved stays."""

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(copied))

    before = {file: file.read_bytes() for file in copied.glob("*.pt")}
    monkeypatch.setattr(torch, "save", read_only)
    error = error_of(capsys, 1, HAPPO, "--resume", copied, "--total-timesteps", 5 * ITERATION)
    assert error == f"error: [Errno 30] Read-only file system: '{copied}'; {copied} has what was saved before\n"
    assert {file: file.read_bytes() for file in copied.glob("*.pt")} == before


def test_diverged_simulation_is_counted(script: ModuleType, tmp_path: Path, monkeypatch):
    """A simulation that blows up ends its episode; the run goes on, and its log says so."""
    make_vec = envs.make_vec

    def unstable(*args: object):
        vec = make_vec(*args)
        step, calls = vec.unwrapped.step, []

        def poisoned(actions: np.ndarray):
            calls.append(1)
            if len(calls) == 10:
                vec.unwrapped.qvel[1] = 1e12
            return step(actions)

        vec.unwrapped.step = poisoned
        return vec

    monkeypatch.setattr(envs, "make_vec", unstable)
    train(script, tmp_path / "run", env_id="HalfCheetah-6x1")
    assert scalars(tmp_path / "run")["charts/num_diverged"] == [(ITERATION, 1.0), (2 * ITERATION, 1.0)]
