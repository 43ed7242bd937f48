"""The scripts as a user runs them: log, model, determinism, bad input, every environment."""

import importlib
import importlib.metadata
import itertools
import os
import runpy
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from conftest import SCRIPTS, SIBLINGS, update_of
from gymnasium.vector import VectorEnv
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import envs

pytestmark = pytest.mark.slow  # whole runs and processes

ROOT = Path(__file__).parent.parent
HAPPO = ROOT / "happo_mamujoco.py"
SMALL = ["--num-envs", "4", "--num-steps", "32", "--hidden-sizes", "16", "16", "--num-threads", "1"]
TINY = [*SMALL, "--env-id", "Reacher-2x1", "--total-timesteps", "256", "--eval-episodes", "0"]


def run(script: Path, *flags: object, **options: object) -> subprocess.CompletedProcess:
    """Run a script in a process of its own; `options` are those of subprocess.run."""
    command = [sys.executable, str(script), *map(str, flags)]
    defaults = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run(command, **defaults | options)


def command_line(script: ModuleType | Path, *flags: object) -> None:
    """Run a script in this process, which has PyTorch loaded: seconds less."""
    path = script if isinstance(script, Path) else Path(script.__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path.name, *map(str, flags)])
        runpy.run_path(str(path), run_name="__main__")


def error_of(
    capsys: pytest.CaptureFixture, code: int, script: ModuleType | Path, *flags: object
) -> str:
    """Run the command line; it must exit with `code` and one line, or tyro's box, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command_line(script, *flags)
    out, error = capsys.readouterr()
    assert stop.value.code == code
    assert "Traceback" not in error
    assert code == 1 or out == ""  # bad input is refused before anything begins
    one_line = error.startswith("error: ") and error.count("\n") == 1
    assert one_line or "For full helptext" in error
    return error


def words(error: str) -> str:
    """The text of tyro's box: without the frame and the line breaks."""
    return " ".join(error.replace("│", " ").split())


def train(script: ModuleType, run_dir: Path, **args: object) -> dict:
    """Run a script's main in this process on a small budget; return its model."""
    defaults = {
        "env_id": "Reacher-2x1",
        "total_timesteps": 256,
        "num_envs": 4,
        "num_steps": 32,
        "hidden_sizes": (16, 16),
        "num_threads": 1,
        "eval_episodes": 0,
    }
    script.main(script.Args(**defaults | args, run_dir=str(run_dir)))
    return model_of(run_dir)


def model_of(run_dir: Path) -> dict:
    """The model of a run."""
    return torch.load(run_dir / "model.pt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    """Whether two models have the same networks and statistics to the last bit."""
    assert a["policy"].keys() == b["policy"].keys()
    equal = [torch.equal(a["policy"][name], b["policy"][name]) for name in a["policy"]]
    return all(equal) and a["obs_rms"] == b["obs_rms"]


def with_dependencies(lines: list[str]) -> set[str]:
    """The names of all packages that pip installs for these requirements."""
    needed = set()  # (name, extra)
    todo = list(lines)
    while todo:
        requirement = Requirement(todo.pop())
        extras = {"", *requirement.extras}
        new = {(canonicalize_name(requirement.name), extra) for extra in extras} - needed
        if not new:
            continue
        needed |= new
        for dependency in importlib.metadata.requires(requirement.name) or []:
            marker = Requirement(dependency).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(dependency)
    return {name for name, _ in needed}


def test_requirements_are_enough():
    """What the scripts import is in requirements.txt, or needed by what is; pyproject.toml agrees."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == lines
    needed = with_dependencies(lines) | {"setuptools"}
    program = f"import sys, evaluate, {', '.join(SCRIPTS)}; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    modules = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert {"torch", "gymnasium", "mujoco"} <= modules
    owners = importlib.metadata.packages_distributions()
    for module in modules & owners.keys():
        assert needed & {canonicalize_name(name) for name in owners[module]}, module


# Log and model


def test_log_and_model(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The command line trains, says so in plain lines, and logs what docs/usage.md explains."""
    flags = "--env-id", "Reacher-2x1", "--total-timesteps", 128 * 10, *SMALL
    run_dir = tmp_path / "run"
    command_line(script, *flags, "--run-dir", run_dir)
    out, error = capsys.readouterr()
    assert error == ""
    first, progress, final = out.splitlines()
    assert first == f"{run_dir}: from step 0 to 1280, cpu"
    assert progress.startswith("step 1280 charts/SPS ")
    assert "charts/episodic_return -" in progress
    assert "eval/episodic_return -" in progress
    assert final == f"finished; now: python evaluate.py {run_dir}"
    log = EventAccumulator(str(run_dir)).Reload()
    scalars = {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    tags = {
        f"charts/{tag}" for tag in ("episodic_return", "episodic_length", "num_diverged", "SPS")
    }
    tags |= {f"eval/episodic_{tag}" for tag in ("return", "return_std", "length")}
    tags |= {"losses/value_loss", "losses/explained_variance"}
    if script.__name__.startswith("ha"):
        tags |= {"losses/M_std", "losses/joint_kl"}
    if script.__name__ == "hatrpo_mamujoco":
        tags.add("losses/delta")
    assert {tag for tag in scalars if not tag.startswith("agent_")} == tags
    for agent in (0, 1):
        agent_tags = SIBLINGS[script.__name__.split("_")[0]].tags
        assert {f"agent_{agent}/{tag}" for tag in agent_tags} <= scalars.keys()
    assert set(scalars["charts/episodic_length"]) == {50.0}
    assert scalars["eval/episodic_length"] == [50.0]
    assert [event.step for event in log.Scalars("losses/value_loss")] == list(range(128, 1281, 128))
    model = model_of(run_dir)
    assert model["script"] == script.__name__
    assert model["args"]["env_id"] == "Reacher-2x1"
    # Reacher-2x1 with the whole state: both agents see all ten entries, and drive one joint each.
    assert model["obs_ids"] == [list(range(10))] * 2
    assert model["act_ids"] == [[0], [1]]
    shapes = {name: list(tensor.shape) for name, tensor in model["policy"].items()}
    own = {
        "log_std": [1],
        "net.0.weight": [16, 10],
        "net.0.bias": [16],
        "net.2.weight": [16, 16],
        "net.2.bias": [16],
        "net.4.weight": [1, 16],
        "net.4.bias": [1],
    }
    assert shapes == {f"actors.{i}.{name}": shape for i in (0, 1) for name, shape in own.items()}


# Determinism


def test_same_seed_same_run(script: ModuleType, tmp_path: Path):
    """The same command twice in one process gives the same bits; another seed does not.

    What was drawn before the run makes no difference, nor how many threads PyTorch has.
    """
    for name, seed, threads in (("a", 7, 1), ("b", 7, 2), ("c", 8, 1)):
        torch.set_num_threads(threads)
        torch.rand(threads)
        np.random.default_rng().random()
        # Large enough that two threads share the work, and give other bits.
        flags = "--seed", seed, "--env-id", "Reacher-2x1", "--total-timesteps", 2000
        flags += "--eval-episodes", 0, "--run-dir", tmp_path / name
        command_line(script, *flags)
    torch.set_num_threads(1)
    a, b, c = (model_of(tmp_path / name) for name in "abc")
    assert same(a, b)
    assert not same(a, c)


def test_the_machine_changes_nothing(tmp_path: Path):
    """The same command gives the same bits, whatever number of threads and cores there is."""

    def on_one_core() -> None:  # as `taskset -c 0`
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    flags = "--env-id", "Reacher-2x1", "--total-timesteps", "2000", "--eval-episodes", "0"
    environment = {name: value for name, value in os.environ.items() if "_NUM_THREADS" not in name}
    machines: list[tuple[str, list[str], dict, Callable | None]] = [
        ("two threads", ["--num-threads", "2"], {"OMP_NUM_THREADS": "2"}, None),
        ("all cores", [], {}, None),
        ("one core, one thread", ["--num-threads", "1"], {"OMP_NUM_THREADS": "1"}, on_one_core),
    ]
    for name, threads, variables, before in machines:
        command = *flags, *threads, "--run-dir", tmp_path / name
        done = run(HAPPO, *command, env=environment | variables, preexec_fn=before)
        assert done.returncode == 0, done.stderr
    command_line(HAPPO, *flags, "--run-dir", tmp_path / "this process")
    models = [model_of(run_dir) for run_dir in tmp_path.iterdir()]
    assert len(models) == 4
    for model in models[1:]:
        assert same(models[0], model)


@pytest.mark.parametrize("name", SCRIPTS)
def test_main_makes_what_the_flags_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both vector environments with agent_obsk and threads; Adam and the critic's last layer as docs/happo.md says."""
    script = importlib.import_module(name)
    made = []
    critics = []
    make_vec = envs.make_vec
    critic_update = script.critic_update

    def recorded_make_vec(*args: object) -> VectorEnv:
        made.append(args)
        return make_vec(*args)

    def recorded_critic_update(critic: nn.Module, optimizer: torch.optim.Adam, *args: object):
        network = critic.net if name == "maddpg_mamujoco" else critic
        critics.append((network[-1].weight.norm().item(), optimizer.param_groups[0]["eps"]))
        return critic_update(critic, optimizer, *args)

    monkeypatch.setattr(envs, "make_vec", recorded_make_vec)
    monkeypatch.setattr(script, "critic_update", recorded_critic_update)
    flags = {"learning_starts": 100, "batch_size": 8} if name == "maddpg_mamujoco" else {}
    train(script, tmp_path / "run", agent_obsk=1, num_threads=2, eval_episodes=3, **flags)
    assert made == [("Reacher-2x1", 4, 1, 2), ("Reacher-2x1", 3, 1, 2)]
    eps = 1e-8 if name == "maddpg_mamujoco" else 1e-5
    assert critics[0] == (pytest.approx(1.0), eps)  # orthogonal: a row of norm 1 times the gain
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    if name != "hatrpo_mamujoco":
        assert checkpoint["actor_optimizer"]["param_groups"][0]["eps"] == eps


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "maddpg_mamujoco"])
def test_what_is_logged_of_the_critic(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """1 - Var(R - V) / Var(R) of the returns R of all critics, and the mean of their losses after the fit."""
    script = importlib.import_module(name)
    compute_gae = script.compute_gae
    critic_update = script.critic_update
    estimates = []
    losses = []

    def recorded_gae(rewards: torch.Tensor, values: torch.Tensor, *args: object) -> tuple:
        advantages, returns = compute_gae(rewards, values, *args)
        estimates.append((returns, returns - values))
        return advantages, returns

    def recorded_critic_update(*args: object) -> torch.Tensor:
        losses.append(critic_update(*args))
        return losses[-1]

    monkeypatch.setattr(script, "compute_gae", recorded_gae)
    monkeypatch.setattr(script, "critic_update", recorded_critic_update)
    train(script, tmp_path / "run", total_timesteps=128)
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    assert len(estimates) == len(losses) == (2 if name == "ippo_mamujoco" else 1)
    returns, errors = (torch.stack(parts).numpy() for parts in zip(*estimates))
    (explained,) = log.Scalars("losses/explained_variance")
    assert explained.value == pytest.approx(1 - errors.var() / returns.var(), abs=1e-4)
    (loss,) = log.Scalars("losses/value_loss")
    assert loss.value == pytest.approx(np.mean([float(loss) for loss in losses]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_speed_counts_since_the_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps over seconds of this start: by a clock that ticks once an iteration, an iteration's steps."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "time", SimpleNamespace(time=itertools.count().__next__))
    train(script, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    args = checkpoint["args"] | {"total_timesteps": 512, "resume": str(tmp_path / "run")}
    time.sleep(1 - time.time() % 1)  # the event file's name is the second
    script.main(script.Args(**args), checkpoint)
    log = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("charts/SPS")
    assert [(event.step, event.value) for event in log] == [(128 * i, 128) for i in range(1, 5)]


def test_environment_threads_change_nothing(script: ModuleType, tmp_path: Path):
    """One, two or three threads in the physics: the same run to the last bit."""
    models = []
    for threads in (1, 2, 3):
        run_dir = tmp_path / str(threads)
        models.append(train(script, run_dir, env_id="Hopper-3x1", num_threads=threads))
    assert same(models[0], models[1])
    assert same(models[0], models[2])


@pytest.mark.parametrize("name", SCRIPTS)
def test_pytorch_has_one_thread_and_is_deterministic(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever its settings were before."""
    script = importlib.import_module(name)
    inside = set()
    step = script.NormalizedEnv.step

    def recorded(self, actions: torch.Tensor) -> tuple:
        inside.add((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
        return step(self, actions)

    monkeypatch.setattr(script.NormalizedEnv, "step", recorded)
    torch.set_num_threads(2)
    train(script, tmp_path / "run", total_timesteps=128)
    assert inside == {(1, True)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_falls_back(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """--cuda on a machine without one trains on the CPU and says so."""
    with_flag = train(script, tmp_path / "a", cuda=True)
    assert ", cpu" in capsys.readouterr().out.splitlines()[0]
    assert same(with_flag, train(script, tmp_path / "b"))


# Options


@pytest.mark.parametrize("flags", [{}, {"share_param": True}], ids=["separate", "shared"])
def test_first_standard_deviation(
    script: ModuleType, flags: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`--log-std-init` is that of the first actions."""
    drawn = []
    step = script.NormalizedEnv.step

    def recorded(self, actions: torch.Tensor) -> tuple:
        drawn.append(actions.clone())
        return step(self, actions)

    monkeypatch.setattr(script.NormalizedEnv, "step", recorded)
    steps = {"num_envs": 20, "num_steps": 100, "total_timesteps": 2000}
    train(script, tmp_path / "run", env_id="Hopper-3x1", log_std_init=-2.0, **steps, **flags)
    assert torch.stack(drawn).std().item() == pytest.approx(np.exp(-2.0), rel=0.05)


@pytest.mark.parametrize("env_id", envs.ENV_IDS)
def test_every_environment_of_the_papers(env_id: str, tmp_path: Path):
    """An iteration of HAPPO on each id, with partial observations: every agent's actor changes."""
    script = importlib.import_module("happo_mamujoco")
    sizes = {"env_id": env_id, "agent_obsk": 1, "num_envs": 2, "num_steps": 8}
    policy = train(script, tmp_path / "run", total_timesteps=16, **sizes)["policy"]
    num_agents = envs.make_vec(env_id, 1).partition.num_agents
    assert {name.split(".")[1] for name in policy} == {str(i) for i in range(num_agents)}
    for name in policy:
        if name.endswith("net.4.bias"):
            assert policy[name].all(), name  # it is made of zeros


# Hopper's observation has 11 entries, Walker2d's 17; a one-hot id of three or two comes on top. With
# k = 0 Hopper's agents see position and velocity of their joint, and five entries of the torso.
@pytest.mark.parametrize(
    ("env_id", "agent_obsk", "inputs"),
    [("Hopper-3x1", None, 11 + 3), ("Hopper-3x1", 0, 2 + 5 + 3), ("Walker2d-2x3", None, 17 + 2)],
)
def test_shared_parameters(
    script: ModuleType, env_id: str, agent_obsk: int | None, inputs: int, tmp_path: Path
):
    """`--share-param` gives all agents one network, before and after the updates."""
    flags = {"env_id": env_id, "agent_obsk": agent_obsk, "share_param": True}
    policy = train(script, tmp_path / "run", **flags)["policy"]
    assert policy["actors.0.net.0.weight"].shape == (16, inputs)
    for name, tensor in policy.items():
        _, agent, rest = name.split(".", 2)
        assert torch.equal(tensor, policy[f"actors.0.{rest}"]), agent


def test_without_sharing_the_agents_differ(script: ModuleType, tmp_path: Path):
    """Without the flag they start and stay different."""
    policy = train(script, tmp_path / "run", anneal_lr=True)["policy"]
    for layer in (0, 2, 4):
        weight = f"net.{layer}.weight"
        assert not torch.equal(policy[f"actors.0.{weight}"], policy[f"actors.1.{weight}"])


def test_no_hidden_layer_is_a_linear_policy(script: ModuleType, tmp_path: Path):
    """`--hidden-sizes` without a number leaves one layer, from the observation to the actions."""
    policy = train(script, tmp_path / "run", hidden_sizes=())["policy"]
    assert {name for name in policy if name.startswith("actors.0.net")} == {
        "actors.0.net.0.weight",
        "actors.0.net.0.bias",
    }
    assert policy["actors.0.net.0.weight"].shape == (1, 10)


# Bad input

BAD = [
    (["--env-id", "HalfCheeta-6x1"], "unknown env_id 'HalfCheeta-6x1'; did you mean HalfCheetah-"),
    (["--env-id", "HalfCheetah-4x2"], "its 6 actuators split as 1x6, 2x3, 3x2, 6x1"),
    (["--env-id", "Ant-[[0,1],[2,3]]"], "must use each actuator of Ant, 0 to 7, once"),
    (["--env-id", "Ant"], "unknown env_id 'Ant'; did you mean Ant-"),
    (["--env-id", ""], "unknown env_id ''"),
    (["--env-id", "A/../../x-2x1"], "unknown env_id 'A/../../x-2x1'"),
    (["--env-id", "Ant-[[0],[1,2,3,4,5,6,7]]", "--share-param"], "equally many actuators"),
    (["--agent-obsk", -1], "agent_obsk Input should be greater than or equal to 0"),
    (["--agent-obsk", "all"], "Error parsing --agent-obsk"),
    (["--seed", -1], "seed Input should be greater than or equal to 0"),
    (["--seed", "1.5"], "Error parsing --seed: invalid literal for int()"),
    (["--seed", ""], "Error parsing --seed: invalid literal for int()"),
    (["--total-timesteps", 100], "error: --total-timesteps 100 must be at least 128"),
    (["--total-timesteps", 0], "total_timesteps Input should be greater than 0"),
    (["--total-timesteps", "1e6"], "Error parsing --total-timesteps: invalid literal for int()"),
    (["--total-timesteps", "nan"], "Error parsing --total-timesteps: invalid literal for int()"),
    (["--checkpoint-interval", 0], "checkpoint_interval Input should be greater than 0"),
    (["--eval-interval", 0], "eval_interval Input should be greater than 0"),
    (["--eval-episodes", -1], "eval_episodes Input should be greater than or equal to 0"),
    (["--num-threads", -1], "num_threads Input should be greater than or equal to 0"),
    (["--num-envs", 0], "num_envs Input should be greater than 0"),
    (["--num-envs", 2**70], f"error: --total-timesteps 256 must be at least {2**75}"),
    (["--num-steps", -5], "num_steps Input should be greater than 0"),
    (["--learning-rate", "inf"], "learning_rate Input should be a finite number"),
    (["--learning-rate", "nan"], "learning_rate Input should be a finite number"),
    (["--learning-rate", 0], "learning_rate Input should be greater than 0"),
    (["--critic-learning-rate", -1e-3], "critic_learning_rate Input should be greater than 0"),
    (["--gamma", 1.5], "gamma Input should be less than or equal to 1"),
    (["--gamma", -0.1], "gamma Input should be greater than or equal to 0"),
    (["--gamma", "nan"], "gamma Input should be less than or equal to 1"),
    (["--gae-lambda", ""], "Error parsing --gae-lambda: could not convert string to float"),
    (["--gae-lambda", "inf"], "gae_lambda Input should be less than or equal to 1"),
    (["--update-epochs", 0], "update_epochs Input should be greater than 0"),
    (["--critic-epochs", -1], "critic_epochs Input should be greater than 0"),
    (["--num-minibatches", 0], "num_minibatches Input should be greater than 0"),
    (["--clip-coef", 2], "clip_coef Input should be less than or equal to 1"),
    (["--clip-coef", "nan"], "clip_coef Input should be less than or equal to 1"),
    (["--ent-coef", "inf"], "ent_coef Input should be less than or equal to 1"),
    (["--max-grad-norm", 0], "max_grad_norm Input should be greater than 0"),
    (["--max-grad-norm", "nan"], "max_grad_norm Input should be greater than 0"),
    (["--hidden-sizes", 64, 0], "hidden_sizes.1 Input should be greater than 0"),
    (["--log-std-init", "nan"], "log_std_init Input should be a finite number"),
    (["--log-std-init", "1e400"], "log_std_init Input should be a finite number"),
    (["--run-dir", "taken"], "error: --run-dir taken is taken or cannot be made"),
    (["--run-dir", "/proc/nowhere/run"], "--run-dir /proc/nowhere/run is taken or cannot be made"),
    (["--resume", "nowhere"], "--resume nowhere: no checkpoint can be read there"),
    (["--resume", "taken"], "--resume taken: no checkpoint can be read there"),
    (["--nonsense"], "Unrecognized options: --nonsense"),
    (["something"], "Unrecognized options: something"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(map(str, f)) for f, _ in BAD])
def test_bad_input_is_refused(
    flags: list, message: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """Exit code 2, what is wrong in one line or in tyro's box, no traceback, nothing on the disk."""
    (tmp_path / "taken").mkdir()
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, 2, HAPPO, *TINY, *flags)
    assert message in words(error)
    assert list(tmp_path.rglob("*")) == [tmp_path / "taken"]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "Antt-4x2"], "error: unknown env_id 'Antt-4x2'; did you mean Ant-4x2"),
        (["--gamma", "nan"], "gamma Input should be less than or equal to 1"),
        (["--num-threads", "-1"], "num_threads Input should be greater than or equal to 0"),
        (["--learning-rate", "1e999"], "learning_rate Input should be a finite number"),
        (["--total-timesteps", "127"], "error: --total-timesteps 127 must be at least 128"),
        (["--num-threads", 2**31], "error: num_threads is 2147483648: it must be 0 (one per CPU)"),
        (["--eval-episodes", 2**31], "error: num_envs is 2147483648: it must be 1 to 100000"),
        (["--resume", "nowhere"], "--resume nowhere: no checkpoint can be read there"),
    ],
)
def test_bad_input_of_every_script(
    name: str, flags: list, message: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """The same of every script."""
    if name == "hatrpo_mamujoco" and flags[0] == "--learning-rate":
        flags = ["--critic-learning-rate", "1e999"]
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, 2, ROOT / f"{name}.py", *TINY, *flags)
    assert message in words(error)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_huge_numbers_work_where_they_make_sense(name: str, tmp_path: Path, capsys):
    """A seed of 2**70 is one like all others, and so are intervals that never end."""
    script = ROOT / f"{name}.py"
    for seed in (2**70, 2**70 + 1):
        flags = "--seed", seed, "--eval-interval", 2**70, "--checkpoint-interval", 2**70
        command_line(script, *TINY, *flags, "--run-dir", tmp_path / str(seed))
    assert not same(model_of(tmp_path / str(2**70)), model_of(tmp_path / str(2**70 + 1)))


# Failing


def test_not_finite_stops_the_run(script: ModuleType, tmp_path: Path, monkeypatch):
    """NaN in one agent's parameters: the run names the agent and the step; the last model is finite."""
    update = update_of(script)
    calls = []

    def poisoned(actors, *args):
        """The second update leaves agent 1 broken, so that what is logged of it is NaN."""
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                actors[1].log_std[0] = torch.nan
        return update(actors, *args)

    monkeypatch.setattr(script, update.__name__, poisoned)
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run", checkpoint_interval=1)
    # Python prints a message of sys.exit and exits with code 1. It claims nothing about files.
    assert stop.value.code == "error: agent_1/policy_loss is nan at step 256"
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 128
    model = model_of(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in model["policy"].values())


def test_a_run_that_fails_keeps_its_log(tmp_path: Path):
    """The values before the one that is not finite are on disk, which the end of a process alone does not see to."""
    run_dir = tmp_path / "run"
    failed = run(HAPPO, *TINY, "--critic-learning-rate", 1e38, "--run-dir", run_dir)
    assert failed.returncode == 1
    assert failed.stderr == "error: losses/value_loss is nan at step 128\n"
    log = EventAccumulator(str(run_dir)).Reload()
    assert [event.step for event in log.Scalars("losses/joint_kl")] == [128]


@pytest.mark.parametrize("name", [*SCRIPTS, "evaluate"])
def test_help_fits_a_terminal(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The text of --help has lines of at most 80 characters, and a sentence for every flag."""
    module = importlib.import_module(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        tyro.cli(module.Args, description=module.__doc__)
    lines = capsys.readouterr().out.splitlines()
    assert "--env-id" in str(lines) or name == "evaluate"
    assert max(map(len, lines)) == 80
