"""Runs that are stopped, resumed, evaluated, shared, tracked, and that fail."""

import errno
import importlib
import io
import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from zipfile import ZipFile

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import (
    HAPPO,
    ROOT,
    SMALL,
    TINY,
    command_line,
    error_of,
    model_of,
    run,
    same,
    train,
    words,
)
from test_tasks import TWO_ARMS, TwoArmsEnv

import envs
import evaluate

pytestmark = pytest.mark.slow  # whole runs and processes

EVALUATE = ROOT / "evaluate.py"
ITERATION = 128  # environment steps, with the flags of SMALL and in `train`
TIMES = {"charts/SPS"}


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All points of a run's TensorBoard log but the measured times: (step, value) by tag."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = set(log.Tags()["scalars"]) - TIMES
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in tags}


def newest(run_dir: Path) -> dict:
    """The checkpoint of a run."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def saved_files(run_dir: Path) -> dict[Path, bytes]:
    """The bytes of the checkpoint and the model of a run."""
    return {file: file.read_bytes() for file in run_dir.glob("*.pt")}


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Where two checkpoints differ, except in what belongs to the run and not to its state."""
    if path == "/args":
        return []
    if isinstance(a, dict) and a.keys() == b.keys():
        pairs = [(key, a[key], b[key]) for key in a]
    elif isinstance(a, list) and len(a) == len(b):
        pairs = [(i, a[i], b[i]) for i in range(len(a))]
    else:
        equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        return [] if equal else [path]
    found = []
    for key, x, y in pairs:
        found += differences(x, y, f"{path}/{key}")
    return found


def next_second() -> None:
    """Wait until a new event file sorts behind the old: its name is the second, then the process."""
    time.sleep(1 - time.time() % 1)


def resume(script: ModuleType, run_dir: Path, **changes: object) -> dict:
    """Continue a run in this process, as `--resume` with these flags does; return its model."""
    next_second()
    checkpoint = newest(run_dir)
    changes = {"resume": str(run_dir), "run_dir": str(run_dir)} | changes
    script.main(script.Args(**checkpoint["args"] | changes), checkpoint)
    return model_of(run_dir)


def wait_for(file: Path, process: subprocess.Popen) -> None:
    """Return when a process has written a file."""
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come in the middle of that step of the training environments, counted from 1."""
    make_vec = envs.make_vec
    vecs = []

    def interrupted(*args: object):
        vec = make_vec(*args)
        vecs.append(vec)
        original = vec.unwrapped.step
        calls = []

        def counted(actions: np.ndarray):
            calls.append(1)
            if len(calls) == step and vec is vecs[0]:
                signal.raise_signal(signal.SIGINT)
            return original(actions)

        vec.unwrapped.step = counted
        return vec

    monkeypatch.setattr(envs, "make_vec", interrupted)


# Resuming


@pytest.mark.parametrize("env_id", [*envs.ENV_IDS, "Ant-v4-4x2", "InvertedDoublePendulum-v5-1x1"])
def test_environments_go_on_from_their_state(env_id: str):
    """Other environments, put into the saved state, do what the saved ones do, to the last bit."""
    rng = np.random.default_rng(0)
    vec = envs.make_vec(env_id, 3)
    other = envs.make_vec(env_id, 3)
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
        *results, infos = vec.step(a)
        *others, _ = other.step(a)
        for x, y in zip(results, others):
            np.testing.assert_array_equal(x, y)
        ended += infos["_final_obs"].sum() if "_final_obs" in infos else 0
    assert ended >= 2 or "elapsed_steps" not in state
    with pytest.raises(ValueError):
        envs.make_vec(env_id, 2).set_state(state)


class ShakenArmsEnv(TwoArmsEnv):
    """A robot whose resets change its model: gravity, the time step, and in half of them where the left arm is."""

    def reset_model(self) -> np.ndarray:
        self.model.opt.gravity[2] = -self.np_random.uniform(1, 20)
        self.model.opt.timestep = self.np_random.uniform(0.001, 0.02)
        if self.np_random.random() < 0.5:
            self.model.body_pos[2, 2] += 0.3
        return super().reset_model()

    def step(self, action: np.ndarray) -> tuple:
        obs, *_ = super().step(action)
        return obs, float(self.data.xpos[2, 2]), False, False, {}


@pytest.fixture
def shaken_arms(tmp_path: Path) -> Iterator[None]:
    """Register it for one test."""
    file = tmp_path / "two_arms.xml"
    file.write_text(TWO_ARMS)
    kwargs = {"xml_file": str(file)}
    gym.register("ShakenArms-v0", ShakenArmsEnv, max_episode_steps=7, kwargs=kwargs)
    yield
    del gym.registry["ShakenArms-v0"]


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
@pytest.mark.parametrize(
    "env_id", ["ShakenArms-v0-2x1", "gymnasium_robotics:AdroitHandDoor-v1-1x28"]
)
def test_what_resets_change_in_a_model_goes_on(env_id: str, shaken_arms: None):
    """Saved in its second episode, a robot with changing models goes on to the last bit, also in later episodes."""
    rng = np.random.default_rng(0)
    vec = envs.make_vec(env_id, 4)
    other = envs.make_vec(env_id, 4)

    def actions() -> np.ndarray:
        return rng.uniform(vec.action_space.low, vec.action_space.high).astype(np.float32)

    def check_that_both_go_on(steps: int) -> None:
        for _ in range(steps):
            a = actions()
            for x, y in zip(vec.step(a)[:4], other.step(a)[:4]):
                np.testing.assert_array_equal(x, y)

    vec.reset(seed=1)
    vec.step(actions())
    vec.reset()
    vec.step(actions())
    other.reset(seed=4)
    if env_id.startswith("Shaken"):
        moved = np.array([env.unwrapped.model.body_pos[2, 2] > 0 for env in vec.envs])
        others = np.array([env.unwrapped.model.body_pos[2, 2] > 0 for env in other.envs])
        # What the other's reset has changed has to be undone somewhere, and made elsewhere.
        assert (others & ~moved).any()
        assert (moved & ~others).any()
    file = io.BytesIO()
    torch.save(vec.get_state(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.set_state(state)
    assert differences(other.get_state(), state) == []
    check_that_both_go_on(10)
    np.testing.assert_array_equal(vec.reset()[0], other.reset()[0])
    check_that_both_go_on(5)
    assert differences(other.get_state(), vec.get_state()) == []


@pytest.mark.parametrize(
    ("env_id", "flags"),
    [
        ("Ant-4x2", {"eval_episodes": 0}),  # an Ant plays long
        ("Hopper-3x1", {"eval_episodes": 2, "share_param": True}),
    ],
)
def test_resumed_run_is_the_uninterrupted_one(
    script: ModuleType, env_id: str, flags: dict, tmp_path: Path
):
    """State and log after 3 + 3 iterations are those after 6, bit for bit."""
    flags = {"env_id": env_id, "eval_interval": 300, **flags}
    train(script, tmp_path / "whole", total_timesteps=6 * ITERATION, **flags)
    train(script, tmp_path / "parts", total_timesteps=3 * ITERATION, **flags)
    torch.rand(7)  # what is drawn between the parts makes no difference
    resume(script, tmp_path / "parts", total_timesteps=6 * ITERATION)
    assert differences(newest(tmp_path / "whole"), newest(tmp_path / "parts")) == []
    assert same(model_of(tmp_path / "whole"), model_of(tmp_path / "parts"))
    whole = scalars(tmp_path / "whole")
    parts = scalars(tmp_path / "parts")
    assert [step for step, _ in whole["losses/value_loss"]] == list(range(128, 769, 128))
    if flags["eval_episodes"]:
        assert [step for step, _ in whole["eval/episodic_return"]] == [384, 640, 768]
    assert parts == whole


def test_killed_run_resumes_without_a_trace(tmp_path: Path):
    """A run killed between two checkpoints: the log of the resumed one has each point once."""
    flags = [*SMALL, "--env-id", "Reacher-2x1", "--eval-episodes", "1"]
    flags += ["--total-timesteps", str(40 * ITERATION)]
    flags += ["--checkpoint-interval", str(7 * ITERATION)]
    script = ROOT / "mappo_mamujoco.py"
    killed = tmp_path / "killed"
    command_line(script, *flags, "--run-dir", tmp_path / "whole")
    command = [sys.executable, str(script), *flags, "--run-dir", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(killed / "checkpoint.pt", process)
    process.kill()
    process.wait()
    assert newest(killed)["step"] < 40 * ITERATION
    next_second()
    command_line(script, "--resume", killed)
    assert differences(newest(tmp_path / "whole"), newest(killed)) == []
    assert scalars(tmp_path / "whole") == scalars(killed)


def test_the_log_is_written_before_the_checkpoint(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A kill right after a checkpoint finds all the points up to it in the log."""
    logged = []
    save = script.save

    def recorded(state: dict, path: Path) -> None:
        logged.append((path.name, scalars(tmp_path / "run")["losses/value_loss"][-1][0]))
        save(state, path)

    monkeypatch.setattr(script, "save", recorded)
    train(script, tmp_path / "run", checkpoint_interval=1)
    files = "checkpoint.pt", "model.pt"
    assert logged == [(file, step) for step in (128, 256) for file in files]


# What the runs below have in common: their parts and the whole are the same run.
FINISHED = {"checkpoint_interval": 2 * ITERATION, "eval_episodes": 3, "eval_interval": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of HAPPO on Reacher-2x1: 4 iterations, each evaluated."""
    script = importlib.import_module("happo_mamujoco")
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(script, run_dir, total_timesteps=4 * ITERATION, **FINISHED)
    return run_dir


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, of 6 iterations without a pause."""
    script = importlib.import_module("happo_mamujoco")
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(script, run_dir, total_timesteps=6 * ITERATION, **FINISHED)
    return run_dir


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to play with; its path has to be quoted for a shell."""
    return shutil.copytree(finished, tmp_path / "my first run's copy")


def check_that_it_leads_on(run_dir: Path, whole: Path) -> None:
    """Resume the run until it has 6 iterations: state and log are those of the whole one."""
    next_second()
    command_line(HAPPO, "--resume", run_dir, "--total-timesteps", 6 * ITERATION)
    assert differences(newest(whole), newest(run_dir)) == []
    assert scalars(whole) == scalars(run_dir)
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["half", "empty", "hole"])
def test_a_torn_checkpoint_is_refused(damage: str, copied: Path, capsys: pytest.CaptureFixture):
    """One line, and nothing is touched."""
    file = copied / "checkpoint.pt"
    intact = file.read_bytes()
    torn = {
        "half": intact[: len(intact) // 2],
        "empty": b"",
        "hole": intact[:1000] + bytes(1000) + intact[2000:],
    }[damage]
    file.write_bytes(torn)
    before = {path: path.read_bytes() for path in copied.iterdir()}
    error = error_of(capsys, 2, HAPPO, "--resume", copied, "--total-timesteps", 6 * ITERATION)
    reason = "checkpoint.pt is damaged" if damage == "hole" else "no checkpoint can be read there"
    assert f"error: --resume {copied}: {reason}" in error
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


def test_a_flipped_bit_is_refused_or_means_nothing(
    copied: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """At 30 places: `--resume` and evaluate.py say so in one line, or have read what the intact file has."""
    script = importlib.import_module("happo_mamujoco")
    file = copied / "checkpoint.pt"
    intact = newest(copied)
    intact["args"]["run_dir"] = "run"  # the same places whatever the directory is
    torch.save(intact, file)
    content = file.read_bytes()
    read = []
    load_model = evaluate.load_model
    monkeypatch.setattr(
        evaluate, "load_model", lambda path: read.append(load_model(path)) or read[-1]
    )
    monkeypatch.setattr(sys, "argv", ["happo_mamujoco.py", "--resume", str(copied)])
    rng = np.random.default_rng(0)
    refused = []
    for place in rng.integers(len(content), size=30):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        file.unlink()  # the last one may still be mapped into the memory
        file.write_bytes(damaged)
        for program in ("--resume", "evaluate.py"):
            capsys.readouterr()
            try:
                if program == "--resume":
                    read.append(script.parse_args()[1])
                else:
                    evaluate.main(evaluate.Args(copied, episodes=1, num_threads=1))
            except SystemExit as stop:
                error = capsys.readouterr().err
                assert stop.code == 2
                assert error.startswith("error: ") and error.count("\n") == 1
                refused.append(program)
            else:
                assert differences(read[-1], intact) == []
                assert read[-1]["args"] == intact["args"]
    assert 15 <= refused.count("--resume") == refused.count("evaluate.py") < 30


def test_a_directory_flag_changes_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch):
    """Bit 4 of a tensor's external attributes in the zip file makes PyTorch read no bytes, unless it maps the file."""
    script = importlib.import_module("happo_mamujoco")
    file = copied / "checkpoint.pt"
    intact = newest(copied)
    damaged = bytearray(file.read_bytes())
    with ZipFile(file) as archive:
        entry = archive.start_dir
        for info in archive.infolist():
            size = 46 + sum(struct.unpack_from("<HHH", damaged, entry + 28))
            if "/data/" in info.filename:
                damaged[entry + 38] ^= 1 << 4
            entry += size
    file.write_bytes(damaged)
    monkeypatch.setattr(sys, "argv", ["happo_mamujoco.py", "--resume", str(copied)])
    assert differences(script.parse_args()[1], intact) == []
    assert differences(evaluate.load_model(copied), intact) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_without_a_network_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """One agent's network is not there: one line, and nothing is touched."""
    run_dir = tmp_path / "run"
    flags = {"buffer_size": 1000} if name == "maddpg_mamujoco" else {}
    train(importlib.import_module(name), run_dir, **flags)
    checkpoint = newest(run_dir)
    policy = checkpoint["policy"].items()
    checkpoint["policy"] = {key: x for key, x in policy if not key.startswith("actors.1.")}
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    before = {file: file.read_bytes() for file in run_dir.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command_line(ROOT / f"{name}.py", "--resume", run_dir, "--total-timesteps", 4 * ITERATION)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: --resume {run_dir}: Reacher-2x1 or the script has changed: ")
    assert "actors.1.log_std" in error or "actors.1.net.0.weight" in error  # what is missing
    assert {file: file.read_bytes() for file in run_dir.iterdir()} == before


def test_a_hostile_checkpoint_runs_nothing(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A pickle that would make a directory does not."""
    bait = tmp_path / "bait"

    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(bait),)

    file = copied / "checkpoint.pt"
    torch.save({"script": "happo_mamujoco", "args": Hostile()}, file)
    assert "no checkpoint can be read there" in error_of(capsys, 2, HAPPO, "--resume", copied)
    assert not bait.exists()
    torch.load(file, weights_only=False)  # the bait works
    assert bait.exists()


MODULE = """
import pathlib

import gymnasium as gym

pathlib.Path(__file__).with_name("bait").touch()
gym.register("Mine-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv", max_episode_steps=9)
"""


def forget(bait: Path) -> None:
    """Make as if some_module had never been imported."""
    bait.unlink(missing_ok=True)
    sys.modules.pop("some_module", None)
    gym.registry.pop("Mine-v0", None)


@pytest.fixture
def bait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is there as soon as some_module, which registers a robot, is imported."""
    (tmp_path / "some_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "bait"
    forget(tmp_path / "bait")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_imports_a_module_only_if_allowed(
    name: str, bait: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The user's --env-id may import one; what a checkpoint or a model names needs --allow-import, every time."""
    script = ROOT / f"{name}.py"
    env_id = "some_module:Mine-v0-3x1"
    run_dir = tmp_path / "run"
    files = run_dir, run_dir / "checkpoint.pt", run_dir / "model.pt"
    command_line(script, *TINY, "--env-id", env_id, "--run-dir", run_dir)
    assert bait.exists()
    for step in (384, 512):  # the second time, the arguments in the checkpoint allow it
        resumed = "--resume", run_dir, "--total-timesteps", step
        forget(bait)
        before = {file: file.read_bytes() for file in run_dir.iterdir()}
        error = error_of(capsys, 2, script, *resumed)
        assert (
            error == f"error: --resume {run_dir}: {env_id} imports a module, see --allow-import\n"
        )
        for file in files:
            error = error_of(capsys, 2, EVALUATE, file, "--episodes", 2)
            assert error.startswith(f"error: {file}: {env_id} imports a module; ")
            assert error.endswith(" add --allow-import\n")
        assert not bait.exists()
        assert {file: file.read_bytes() for file in run_dir.iterdir()} == before
        command_line(script, *resumed, "--allow-import")
        assert bait.exists()
        assert newest(run_dir)["step"] == step
    for file in files:
        forget(bait)
        capsys.readouterr()
        command_line(EVALUATE, file, "--episodes", 2, "--allow-import")
        assert capsys.readouterr().out.startswith(f"{env_id}, 2 episodes, seed 0: return mean ")
        assert bait.exists()


@pytest.mark.parametrize("content", [{}, [], 7, {"script": "happo_mamujoco"}, torch.zeros(3)])
def test_what_is_no_checkpoint_is_refused(
    content: object, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A file of PyTorch with something else in it."""
    torch.save(content, tmp_path / "checkpoint.pt")
    error = error_of(capsys, 2, HAPPO, "--resume", tmp_path)
    assert f"error: --resume {tmp_path}: no checkpoint can be read there" in error


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_of_another_script_is_refused(
    name: str, copied: Path, capsys: pytest.CaptureFixture
):
    """By the name of the script that made it."""
    maker = "mappo_mamujoco" if name == "happo_mamujoco" else "happo_mamujoco"
    checkpoint = newest(copied) | {"script": maker}
    torch.save(checkpoint, copied / "checkpoint.pt")
    error = error_of(capsys, 2, ROOT / f"{name}.py", "--resume", copied)
    assert error == f"error: --resume {copied}: {maker}.py made it, use that\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "Ant-4x2"], "env_id must stay Reacher-2x1"),
        (["--env-id", "Reacher-[[1],[0]]"], "env_id must stay Reacher-2x1"),
        (["--seed", 2], "seed must stay 1"),
        (["--agent-obsk", 0], "agent_obsk must stay None"),
        (["--hidden-sizes", 8], "hidden_sizes must stay (16, 16)"),
        (["--num-envs", 5], "num_envs must stay 4"),
        (["--num-envs", 1], "num_envs must stay 4"),
        (["--share-param"], "share_param must stay False"),
        (["--total-timesteps", 512], "error: --total-timesteps 512 must be at least 640"),
        (["--total-timesteps", 256], "error: --total-timesteps 256 must be at least 640"),
        (["--gamma", 2], "gamma Input should be less than or equal to 1"),
        (["--learning-rate", "nan"], "learning_rate Input should be a finite number"),
        (["--run-dir", "tests"], "error: --run-dir tests is taken or cannot be made"),
    ],
)
def test_what_cannot_go_on_is_refused(
    flags: list, message: str, copied: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """And nothing in the run's directory changes."""
    monkeypatch.chdir(ROOT)
    before = {file: file.read_bytes() for file in copied.iterdir()}
    error = error_of(capsys, 2, HAPPO, "--resume", copied, "--total-timesteps", 9999, *flags)
    assert message in words(error)
    assert {file: file.read_bytes() for file in copied.iterdir()} == before


def test_equal_sizes_are_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Networks of equal sizes whose inputs mean something else: what must stay is compared by name."""
    script = importlib.import_module("happo_mamujoco")
    longest = []
    for agent_obsk in (1, 2):
        partition = envs.make_vec("Hopper-3x1", 1, agent_obsk).partition
        longest.append(max(map(len, partition.obs_ids)))
    assert longest[0] == longest[1]  # with --share-param, the network has as many inputs
    train(script, tmp_path / "run", env_id="Hopper-3x1", agent_obsk=1, share_param=True)
    flags = "--resume", tmp_path / "run", "--total-timesteps", 512
    error = error_of(capsys, 2, HAPPO, *flags, "--agent-obsk", 2)
    assert error == f"error: --resume {tmp_path / 'run'}: agent_obsk must stay 1\n"
    command_line(HAPPO, *flags, "--agent-obsk", 1)
    assert newest(tmp_path / "run")["step"] == 512


def test_flags_beside_resume_replace_the_runs(copied: Path, tmp_path: Path):
    """The rate of the last two iterations is the new one; what an older checkpoint lacks is the default."""
    checkpoint = newest(copied)
    assert checkpoint["args"].pop("ent_coef") == 0.0
    assert checkpoint["args"]["hidden_sizes"] == (16, 16)
    torch.save(checkpoint, copied / "checkpoint.pt")
    other = tmp_path / "other"
    before = saved_files(copied)
    flags = "--total-timesteps", 768, "--learning-rate", 1e-5, "--run-dir", other
    command_line(HAPPO, "--resume", copied, *flags)
    assert saved_files(copied) == before  # with --run-dir the old run stays as it is
    args = newest(other)["args"]
    assert args["hidden_sizes"] == (16, 16)
    assert args["ent_coef"] == 0.0
    assert args["learning_rate"] == 1e-5
    assert args["critic_learning_rate"] == checkpoint["args"]["critic_learning_rate"]
    assert [step for step, _ in scalars(other)["losses/value_loss"]] == [640, 768]
    assert newest(other)["actor_optimizer"]["param_groups"][0]["lr"] == 1e-5


def test_annealing_follows_the_total_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The rates fall to 0 at --total-timesteps; an extended run takes the line to its new end."""
    script = importlib.import_module("happo_mamujoco")
    rates = {"happo_update": [], "critic_update": []}

    def record(name: str) -> None:
        update = getattr(script, name)

        def recorded(network: object, optimizer: torch.optim.Adam, *args: object) -> object:
            rates[name].append(optimizer.param_groups[0]["lr"])
            return update(network, optimizer, *args)

        monkeypatch.setattr(script, name, recorded)

    record("happo_update")
    record("critic_update")
    train(script, tmp_path / "run", total_timesteps=2 * ITERATION, anneal_lr=True)
    resume(script, tmp_path / "run", total_timesteps=4 * ITERATION)
    shares = np.array([1, 1 / 2, 1 / 2, 1 / 4])
    np.testing.assert_allclose(rates["happo_update"], shares * script.Args().learning_rate)
    np.testing.assert_allclose(rates["critic_update"], shares * script.Args().critic_learning_rate)


# Stopping


def stopped_with(capsys: pytest.CaptureFixture, script: Path, *flags: object) -> str:
    """Run a command line that Ctrl-C stops; return what it says of that."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command_line(script, *flags)
    assert stop.value.code == 130
    return capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_before_the_first_checkpoint(
    name: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """Exit code 130, and one line says that nothing was saved."""
    interrupt_at(40, monkeypatch)  # in the second iteration
    error = stopped_with(capsys, ROOT / f"{name}.py", *TINY, "--run-dir", tmp_path / "run")
    assert error == "stopped; nothing was saved\n"
    assert not list(tmp_path.rglob("*.pt"))


def test_ctrl_c_after_a_checkpoint_names_what_works(
    whole: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """The flags that it prints, read as a shell reads them, continue the run."""
    run_dir = tmp_path / "my run's directory"
    flags = [*TINY, "--total-timesteps", 6 * ITERATION, "--checkpoint-interval", 2 * ITERATION]
    flags += ["--eval-episodes", 3, "--eval-interval", 1, "--run-dir", run_dir]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(32 * 2 + 5, patch)  # in the third iteration
        error = stopped_with(capsys, HAPPO, *flags)
    assert error.startswith("stopped; continue with --resume ")
    assert error.count("\n") == 1
    assert newest(run_dir)["step"] == 2 * ITERATION
    next_second()
    command_line(HAPPO, *shlex.split(error.partition(" with ")[2]))
    assert differences(newest(whole), newest(run_dir)) == []
    assert scalars(whole) == scalars(run_dir)


def test_ctrl_c_in_a_process(tmp_path: Path):
    """The same with a signal from outside, at any moment: the log of the run goes on where it was."""
    script = importlib.import_module("happo_mamujoco")
    run_dir = tmp_path / "run"
    flags = [*TINY, "--total-timesteps", "1000000", "--checkpoint-interval", "1"]
    command = [sys.executable, str(HAPPO), *flags, "--run-dir", str(run_dir)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(run_dir / "checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == f"stopped; continue with --resume {run_dir}\n"
    step = newest(run_dir)["step"]
    resume(script, run_dir, total_timesteps=step + ITERATION)
    points = [at for at, _ in scalars(run_dir)["losses/value_loss"]]
    assert points == list(range(ITERATION, step + 2 * ITERATION, ITERATION))


@pytest.mark.parametrize("args", [{"num_envs": "many"}, 7])
def test_arguments_of_another_version_are_refused(
    args: object, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A checkpoint of this script, with arguments that it cannot take."""
    torch.save({"script": "happo_mamujoco", "args": args}, tmp_path / "checkpoint.pt")
    error = error_of(capsys, 2, HAPPO, "--resume", tmp_path)
    assert f"error: --resume {tmp_path}: " in error


@pytest.mark.parametrize("redirection", [">&-", "<&- >&-"])
def test_closed_streams_do_not_end_the_run(redirection: str, finished: Path, tmp_path: Path):
    """Without an output, without output and input: the same state and log.

    Without an error output the import of glfw, which Gymnasium needs, fails before a script begins.
    """
    flags = [*TINY, "--total-timesteps", 4 * ITERATION, "--run-dir", tmp_path / "run"]
    flags += ["--checkpoint-interval", 2 * ITERATION, "--eval-episodes", 3, "--eval-interval", 1]
    command = shlex.join([sys.executable, str(HAPPO), *map(str, flags)])
    done = subprocess.run(["bash", "-c", f"{command} {redirection}"], timeout=120, check=False)
    assert done.returncode == 0
    assert differences(newest(finished), newest(tmp_path / "run")) == []
    assert scalars(finished) == scalars(tmp_path / "run")


def test_printed_hints_work_in_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A directory whose name has spaces and more: the printed commands are quoted."""
    script = importlib.import_module("happo_mamujoco")
    run_dir = tmp_path / "my run's $(touch bait) directory"
    train(script, run_dir)
    final = capsys.readouterr().out.splitlines()[-1]
    assert final.startswith("finished; now: python evaluate.py ")
    evaluation = final.removeprefix("finished; now: ")
    assert shlex.split(evaluation) == ["python", "evaluate.py", str(run_dir)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    done = subprocess.run(
        evaluation, shell=True, cwd=ROOT, env=os.environ | {"PATH": path}, **options
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Reacher-2x1, 40 episodes, seed 0: return mean -")
    assert not (ROOT / "bait").exists()


# Evaluation, sharing


def test_evaluation_does_not_disturb_the_training(script: ModuleType, tmp_path: Path):
    """With evaluation every iteration, and without any: the same state to the last bit."""
    train(script, tmp_path / "with", env_id="Hopper-3x1", eval_interval=1, eval_episodes=3)
    train(script, tmp_path / "without", env_id="Hopper-3x1", eval_episodes=0)
    assert differences(newest(tmp_path / "with"), newest(tmp_path / "without")) == []
    assert len(scalars(tmp_path / "with")["eval/episodic_return"]) == 2
    assert not [tag for tag in scalars(tmp_path / "without") if tag.startswith("eval/")]


def test_evaluation_counts_the_first_episode_of_each_environment(script: ModuleType):
    """Episodes of 2, 3 and 7 steps: the short environments' later episodes do not count."""
    lengths = np.array([2, 3, 7])
    t = [0]
    seeds = []

    def reset(seed: int) -> tuple:
        seeds.append(seed)
        return np.zeros((3, 1)), {}

    def step(actions: np.ndarray) -> tuple:
        t[0] += 1
        assert t[0] <= 7  # all have ended by then
        rewards = t[0] * np.ones(3)
        ends = t[0] % lengths == 0
        # The second environment ends by truncation, the others by termination.
        second = np.array([False, True, False])
        return np.zeros((3, 1)), rewards, ends & ~second, ends & second, {}

    def act(obs: np.ndarray, noise: bool) -> np.ndarray:
        assert not noise
        return obs

    vec = SimpleNamespace(num_envs=3, reset=reset, step=step)
    env = SimpleNamespace(normalize=lambda obs: obs, scale=lambda actions: actions)
    log = script.evaluate(vec, env, SimpleNamespace(act=act), 12345)
    returns = lengths * (lengths + 1) / 2
    assert seeds == [12345]
    assert t[0] == 7
    assert log == {
        "eval/episodic_return": returns.mean(),
        "eval/episodic_return_std": returns.std(),
        "eval/episodic_length": 4.0,
    }


@pytest.mark.parametrize("flags", [{}, {"agent_obsk": 0}], ids=["full", "partial"])
def test_shared_policy_scores_in_gymnasium_what_was_logged(
    script: ModuleType, flags: dict, tmp_path: Path
):
    """docs/usage.md's lines load a model and play Gymnasium's own Hopper-v5 as the log says."""
    args = {"env_id": "Hopper-3x1", "total_timesteps": 4 * ITERATION, "eval_episodes": 4}
    train(script, tmp_path / "run", **args, **flags)
    names: dict = {}
    lines = (ROOT / "docs/usage.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines.replace("MODEL", str(tmp_path / "run" / "model.pt")), names)
    env = gym.make("Hopper-v5")
    # The third number of the seed's sequence is the evaluation's; environment i adds i.
    eval_seed = int(np.random.SeedSequence(1).generate_state(3)[2])
    returns = []
    lengths = []
    for i in range(4):
        obs, _ = env.reset(seed=eval_seed + i)
        rewards = []
        over = False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(names["policy"](obs))
            rewards.append(reward)
            over = terminated or truncated
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    expected = {
        "eval/episodic_return": np.mean(returns),
        "eval/episodic_return_std": np.std(returns),
        "eval/episodic_length": np.mean(lengths),
    }
    log = scalars(tmp_path / "run")
    for tag, value in expected.items():
        np.testing.assert_allclose(log[tag][-1][1], value, rtol=1e-4)


# Weights & Biases


class FakeWandb(ModuleType):
    """What `import wandb` finds: its init keeps the arguments that it is called with."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls = []

    def init(self, **arguments: object) -> SimpleNamespace:
        self.calls.append(arguments)
        return SimpleNamespace(id=arguments["id"] or "chosen-by-wandb")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tracked_run_keeps_its_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A resumed run continues the Weights & Biases run that it was, or none with --no-track."""
    script = ROOT / f"{name}.py"
    run_dir = tmp_path / "run"
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    command_line(script, *TINY, "--track", "--run-dir", run_dir)
    command_line(script, "--resume", run_dir, "--total-timesteps", 384)
    assert [call["id"] for call in wandb.calls] == [None, "chosen-by-wandb"]
    for call in wandb.calls:
        assert call["resume"] == "allow"
        assert call["sync_tensorboard"] is True
        assert call["name"] == "run"
        assert call["config"]["env_id"] == "Reacher-2x1"
    monkeypatch.setitem(sys.modules, "wandb", None)  # `import wandb` raises ImportError
    command_line(script, "--resume", run_dir, "--total-timesteps", 512, "--no-track")
    assert newest(run_dir)["step"] == 512
    assert newest(run_dir)["args"]["wandb_run_id"] == "chosen-by-wandb"
    assert newest(run_dir)["args"]["track"] is False


@pytest.mark.parametrize("name", SCRIPTS)
def test_track_without_wandb_is_refused(
    name: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """One line, exit code 2; a new run leaves no directory, a resumed one stays as it was."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    script = ROOT / f"{name}.py"
    old = tmp_path / "old"
    command_line(script, *TINY, "--run-dir", old)
    before = {file: file.read_bytes() for file in old.iterdir()}
    new = [*TINY, "--run-dir", tmp_path / "new"]
    resumed = ["--resume", old, "--total-timesteps", 512]
    for flags in (new, resumed):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command_line(script, *flags, "--track")
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: --track needs `pip install wandb` and `wandb login`: ")
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [old]
    assert {file: file.read_bytes() for file in old.iterdir()} == before


def wandb_environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """The environment of somebody who has never used Weights & Biases."""
    environment = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    return environment | {"HOME": str(home), "WANDB_DIR": str(tmp_path), **variables}


def test_track_without_a_login_is_refused(tmp_path: Path):
    """One line, exit code 2 and no directory where nobody has logged in, and nobody can be asked."""
    pytest.importorskip("wandb")
    options = {"env": wandb_environment(tmp_path), "stdin": subprocess.DEVNULL}
    done = run(HAPPO, *TINY, "--track", "--run-dir", tmp_path / "run", **options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --track needs `pip install wandb` and `wandb login`: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_same_offline(tmp_path: Path):
    """Without a network Weights & Biases' own files have the configuration, the metrics, one id."""
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    options = {"env": wandb_environment(tmp_path, **quiet)}
    flags = [*TINY, "--eval-episodes", 1, "--run-dir", run_dir, "--track"]
    done = run(HAPPO, *flags, **options)
    assert done.returncode == 0, done.stderr
    (first,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = first.read_bytes()
    for name in (b"episodic_return", b"value_loss", b"Reacher-2x1", b"clip_coef"):
        assert name in content
    run_id = newest(run_dir)["args"]["wandb_run_id"]
    assert first.name == f"run-{run_id}.wandb"


# Failing


def test_a_failed_write_loses_nothing(copied: Path, whole: Path):
    """No file may grow beyond 20 kB: the next checkpoint fails, the last one stays and leads on."""
    before = saved_files(copied)
    assert len(before[copied / "checkpoint.pt"]) > 20_000

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run(HAPPO, "--resume", copied, "--total-timesteps", 6 * ITERATION, preexec_fn=limit)
    assert done.returncode not in (0, 2)
    assert saved_files(copied) == before
    check_that_it_leads_on(copied, whole)


def torn_save(file: str, error: BaseException) -> Callable:
    """A torch.save that fails on that file with half of it written."""
    save = torch.save

    def failing(state: dict, path: Path) -> None:
        save(state, path)
        if path.stem == file:
            path.write_bytes(path.read_bytes()[:5000])
            raise error

    return failing


@pytest.mark.parametrize("file", ["checkpoint", "model"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("PytorchStreamWriter failed writing file"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_while_it_is_written_was_not_touched(
    file: str, error: Exception, copied: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    """An error of torch.save in the middle: the old file stays, and the run can be resumed."""
    before = saved_files(copied)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn_save(file, error))
        with pytest.raises(type(error)):
            command_line(HAPPO, "--resume", copied, "--total-timesteps", 6 * ITERATION)
    after = saved_files(copied)
    assert after[copied / f"{file}.pt"] == before[copied / f"{file}.pt"]
    assert newest(copied)["step"] == (6 if file == "model" else 4) * ITERATION
    if file == "checkpoint":
        assert after == before
        check_that_it_leads_on(copied, whole)


def test_ctrl_c_while_a_checkpoint_is_written(
    copied: Path, whole: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """The old one stays, and it is what the message names."""
    before = saved_files(copied)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn_save("checkpoint", KeyboardInterrupt()))
        flags = "--resume", copied, "--total-timesteps", 6 * ITERATION
        error = stopped_with(capsys, HAPPO, *flags)
    assert shlex.split(error) == ["stopped;", "continue", "with", "--resume", str(copied)]
    assert saved_files(copied) == before
    check_that_it_leads_on(copied, whole)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_is_replaced_never_written_to(name: str, tmp_path: Path):
    """Who has the old file open reads the old state to its end: no moment has half of the new one."""
    script = importlib.import_module(name)
    script.save({"step": 1}, tmp_path / "checkpoint.pt")
    (tmp_path / "open.pt").hardlink_to(tmp_path / "checkpoint.pt")
    script.save({"step": 2}, tmp_path / "checkpoint.pt")
    assert torch.load(tmp_path / "open.pt") == {"step": 1}
    assert newest(tmp_path) == {"step": 2}
    assert {path.name for path in tmp_path.iterdir()} == {"open.pt", "checkpoint.pt"}


def test_a_deleted_run_directory_is_a_failure(tmp_path: Path):
    """Somebody moves the directory of a running run: it does not exit with 0, and what it saved is whole."""
    script = importlib.import_module("hatrpo_mamujoco")
    run_dir = tmp_path / "run"
    flags = [*TINY, "--total-timesteps", "1000000", "--checkpoint-interval", "1"]
    command = [sys.executable, script.__file__, *flags, "--run-dir", str(run_dir)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **streams)
    wait_for(run_dir / "model.pt", process)
    gone = run_dir.rename(tmp_path / "gone")
    assert process.wait(timeout=60) not in (0, 2, 130)
    assert not run_dir.exists()
    step = newest(gone)["step"]
    resume(script, gone, total_timesteps=step + ITERATION)
    assert newest(gone)["step"] == step + ITERATION


def test_diverged_simulation_is_counted(script: ModuleType, tmp_path: Path, monkeypatch):
    """A simulation that blows up ends its episode; the run goes on, and its log says so."""
    make_vec = envs.make_vec

    def unstable(*args: object):
        vec = make_vec(*args)
        step = vec.unwrapped.step
        calls = []

        def poisoned(actions: np.ndarray):
            calls.append(1)
            if len(calls) == 10:
                vec.unwrapped.qvel[1] = 1e12
            return step(actions)

        vec.unwrapped.step = poisoned
        return vec

    monkeypatch.setattr(envs, "make_vec", unstable)
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log of it
    train(script, tmp_path / "run", env_id="HalfCheetah-6x1")
    diverged = scalars(tmp_path / "run")["charts/num_diverged"]
    assert diverged == [(ITERATION, 1.0), (2 * ITERATION, 1.0)]
