"""The scripts as a user runs them: log, model, determinism, bad input, failure, and every environment of the papers."""

import importlib.metadata
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, SIBLINGS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs

pytestmark = pytest.mark.slow  # whole runs and processes

ROOT = Path(__file__).parent.parent
SMALL = ["--num-envs", "4", "--num-steps", "32", "--hidden-sizes", "16", "16", "--num-threads", "1"]


def run(script: ModuleType, *flags: object) -> subprocess.CompletedProcess:
    """Run a script from the command line, in the project's root."""
    command = [sys.executable, script.__file__, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def command_line(script: ModuleType | Path, *flags: object) -> None:
    """The same in this process, which has PyTorch loaded: seconds less."""
    path = script if isinstance(script, Path) else Path(script.__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path.name, *map(str, flags)])
        runpy.run_path(str(path), run_name="__main__")


def error_of(capsys: pytest.CaptureFixture, code: int, script: ModuleType | Path, *flags: object) -> str:
    """Run the command line; it must exit with `code` and one line, or tyro's box, which is returned."""
    with pytest.raises(SystemExit) as stop:
        command_line(script, *flags)
    out, error = capsys.readouterr()
    assert stop.value.code == code and "Traceback" not in error
    assert code == 1 or out == ""  # bad input is refused before anything begins
    assert (error.startswith("error: ") and error.count("\n") == 1) or "For full helptext" in error
    return error


def train(script: ModuleType, run_dir: Path, **args: object) -> dict:
    """Run a script's main in this process on a small budget; return its model."""
    defaults = {"env_id": "Reacher-2x1", "total_timesteps": 256, "num_envs": 4, "num_steps": 32}
    defaults |= {"hidden_sizes": (16, 16), "num_threads": 1, "num_minibatches": 2, "eval_episodes": 0}
    script.main(script.Args(**(defaults | args), run_dir=str(run_dir)))
    return torch.load(run_dir / "model.pt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    """Whether two models have the same networks and statistics to the last bit."""
    pairs = [pair for agents in zip(a["agents"], b["agents"], strict=True) for pair in zip(*agents, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs) and a["obs_rms"] == b["obs_rms"]


def test_requirements_are_enough():
    """Whatever package the scripts import is in requirements.txt or needed by what is: the tests' are not enough."""
    needed, todo = set(), [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] == todo
    while todo:
        requirement = Requirement(todo.pop())
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        if not (new := {(name, extra) for extra in extras} - needed):
            continue
        needed |= new
        for dependency in importlib.metadata.requires(name) or []:
            marker = Requirement(dependency).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(dependency)
    program = f"import sys, evaluate, {', '.join(SCRIPTS)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    owners = importlib.metadata.packages_distributions()
    needed_names = {name for name, _ in needed} | {"setuptools"}
    modules = {module: {canonicalize_name(name) for name in owners.get(module, [])} for module in loaded.stdout.split()}
    assert {"torch", "gymnasium", "mujoco"} <= modules.keys()
    assert [module for module, names in modules.items() if names and not names & needed_names] == []


def test_log_and_model(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The command line trains, says so in plain lines, and logs what the README explains."""
    flags = "--env-id", "Reacher-2x1", "--total-timesteps", 128 * 10, *SMALL
    command_line(script, *flags, "--run-dir", tmp_path / "run")
    first, line, final = capsys.readouterr().out.splitlines()  # where it is, how it goes, where it was
    assert first.startswith(f"{tmp_path / 'run'}: from step 0 to 1280") and final.startswith(str(tmp_path / "run"))
    assert line.startswith("step 1280 charts/episodic_return -") and "eval/episodic_return -" in line
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    scalars = {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    charts = {"episodic_return", "episodic_length", "SPS", "critic_learning_rate"}
    charts |= set() if "hatrpo" in script.__name__ else {"learning_rate"}
    assert {f"charts/{tag}" for tag in charts} | {"losses/value_loss", "losses/explained_variance"} <= scalars.keys()
    for agent in (0, 1):
        tags = SIBLINGS[script.__name__.split("_")[0]].tags
        assert {f"agent_{agent}/{tag}" for tag in tags} <= scalars.keys()
    assert scalars["charts/episodic_length"] == [50.0] * len(scalars["charts/episodic_length"])
    assert [event.step for event in log.Scalars("losses/value_loss")] == list(range(128, 1281, 128))


def test_same_seed_same_run(script: ModuleType, tmp_path: Path):
    """The same command in two processes, this one and a new one, gives the same bits; another seed does not."""
    flags = "--total-timesteps", 384, *SMALL
    done = run(script, "--seed", 7, *flags, "--run-dir", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    for seed in (7, 8):
        command_line(script, "--seed", seed, *flags, "--run-dir", tmp_path / str(seed))
    new, again, other = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("new", "7", "8"))
    assert same(new, again)
    assert not same(new, other)


def test_environment_threads_change_nothing(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One, two or three threads in the physics: the same run to the last bit."""
    models, make_vec = [], envs.make_vec
    for threads in (1, 2, 3):
        monkeypatch.setattr(envs, "make_vec", lambda *args, n=threads: make_vec(*args[:3], n))
        models.append(train(script, tmp_path / str(threads), env_id="Hopper-3x1"))
    assert same(models[0], models[1]) and same(models[0], models[2])


@pytest.mark.parametrize("flags", [{}, {"share_param": True}], ids=["separate", "shared"])
def test_first_standard_deviation(script: ModuleType, flags: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`--log-std-init` is that of the first actions."""
    drawn, step = [], script.NormalizedEnv.step
    monkeypatch.setattr(script.NormalizedEnv, "step", lambda self, a: drawn.append(a.clone()) or step(self, a))
    steps = {"num_envs": 20, "num_steps": 100, "total_timesteps": 2000}
    train(script, tmp_path / "run", env_id="Hopper-3x1", log_std_init=-2.0, **steps, **flags)
    assert torch.stack(drawn).std().item() == pytest.approx(np.exp(-2.0), rel=0.05)


@pytest.mark.parametrize("env_id", envs.ENV_IDS)
def test_every_environment_of_the_papers(env_id: str, tmp_path: Path):
    """Two iterations of HAPPO on each id, with partial observations: every agent's actor changes."""
    import happo_mamujoco as script

    models = [
        train(
            script, tmp_path / str(steps), env_id=env_id, total_timesteps=steps, num_envs=2, num_steps=8, agent_obsk=1
        )
        for steps in (16, 32)
    ]
    before, after = (model["agents"] for model in models)
    assert len(before) == envs.make_vec(env_id, 1).partition.num_agents
    assert not any(torch.equal(a[-1], b[-1]) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("flags", [{"share_param": True}, {"share_param": True, "agent_obsk": 0}, {"anneal_lr": True}])
def test_options_train(script: ModuleType, flags: dict, tmp_path: Path):
    """Shared parameters (agents of different sizes) and annealing run; sharing gives all agents one set."""
    first, _, third = train(script, tmp_path / "run", env_id="Pusher-3p", **flags)["agents"]
    if "share_param" in flags:
        assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
        inputs = (23 if flags.get("agent_obsk") is None else 15) + 3  # longest observation, and the agent's id
        assert first[0].shape == (inputs, 16)
    else:
        assert not torch.equal(first[2], third[2])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "HalfCheeta-6x1"], "unknown env_id 'HalfCheeta-6x1'; did you mean HalfCheetah-6x1"),
        (["--env-id", "HalfCheetah-4x2"], "its 6 actuators split as 1x6, 2x3, 3x2, 6x1"),
        (["--env-id", "Ant-[[0,1],[2,3]]"], "must use each actuator of Ant, 0 to 7, once"),
        (["--agent-obsk", -1], "agent_obsk is -1: it must be 0 or more"),
        (["--num-minibatches", 3], "--num-minibatches 3 does not divide a batch of 128 steps"),
        (["--num-envs", 0], "--num-envs is 0: it must be from 1 to 100000"),
        (["--num-steps", -5], "--num-steps is -5: it must be from 1 to 100000"),
        (["--hidden-sizes", 64, 0], "--hidden-sizes is (64, 0): it must be from 1 to 10000"),
        (["--hidden-sizes"], "--hidden-sizes is (): it must be from 1 to 10000"),
        (["--gamma", 1.5], "--gamma is 1.5: it must be from 0 to 1"),
        (["--learning-rate", "inf"], "--learning-rate is inf: it must be from 1e-12 to 1000000.0"),
        (["--log-std-init", "nan"], "--log-std-init is nan: it must be from -10 to 10"),
        (["--seed", 2**64], "--seed is 18446744073709551616: it must be from 0 to"),
        (["--num-envs", 1, "--num-steps", 1], "does not divide a batch of 1 steps"),
        (["--total-timesteps", 100], "--total-timesteps 100 is less than one batch of 128 steps"),
        (["--track"], "--track needs Weights & Biases: pip install wandb"),
        (["--run-dir", "tests"], "--run-dir tests is taken or cannot be made"),
        (["--run-dir", "/proc/nowhere/run"], "--run-dir /proc/nowhere/run is taken or cannot be made"),
    ],
)
def test_bad_input_is_shown_with_exit_code_2(flags: list, message: str, capsys, monkeypatch):
    """What is wrong and what would be right, in one line or in tyro's box, without a traceback."""
    import happo_mamujoco as script

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["happo_mamujoco.py", *SMALL, *map(str, flags)])
    before = sorted(ROOT.joinpath("tests").iterdir())
    with pytest.raises(SystemExit) as stop:
        script.main(*script.parse_args())
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error and "Traceback" not in error
    assert sorted(ROOT.joinpath("tests").iterdir()) == before


def test_bad_input_from_the_command_line(script: ModuleType, capsys: pytest.CaptureFixture):
    """The same of every script, from what starts it."""
    error = error_of(capsys, 2, script, "--env-id", "Antt-4x2")
    assert error.startswith("error: unknown env_id 'Antt-4x2'; did you mean Ant-4x2")


def test_more_memory_than_there_is_is_one_line(script: ModuleType, capsys: pytest.CaptureFixture):
    """A batch of 557 GB: what could not be had, and no traceback."""
    sizes = "--num-envs", 2000, "--num-steps", 100_000, "--total-timesteps", 10**12
    assert re.match(
        "error: .*memory.*556800000000 bytes", error_of(capsys, 1, script, "--env-id", "Humanoid-17x1", *sizes)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_falls_back(script: ModuleType, tmp_path: Path, capsys):
    """--cuda on a machine without one trains on the CPU and says so."""
    with_flag, without = train(script, tmp_path / "a", cuda=True), train(script, tmp_path / "b")
    assert "on the cpu" in capsys.readouterr().out.splitlines()[0]
    assert same(with_flag, without)


def test_not_finite_stops_the_run(script: ModuleType, tmp_path: Path, capsys, monkeypatch):
    """NaN in one agent's parameters: the run stops, names the agent and the step, and keeps the last finite model."""
    algorithm = script.__name__.split("_")[0]
    name = "trpo_step" if algorithm == "hatrpo" else "ppo_loss"
    function, poisoned_actors = getattr(script, name), []

    def poisoned(actor, obs, *args):
        """From the second iteration on, the agent that was the last of the first is broken."""
        if len(poisoned_actors) < 1 and calls[0] == 1:
            poisoned_actors.append(actor)
        if actor in poisoned_actors:
            actor.theta.data[0] = torch.nan
        return function(actor, obs, *args)

    update, calls = getattr(script, f"{algorithm}_update"), [-1]

    def counted(actors, *args):
        calls[0] += 1
        names.update({actor: i for i, actor in enumerate(actors)})
        return update(actors, *args)

    names: dict = {}
    monkeypatch.setattr(script, name, poisoned)
    monkeypatch.setattr(script, f"{algorithm}_update", counted)
    with pytest.raises(SystemExit) as stop:
        train(script, tmp_path / "run", checkpoint_interval=1)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: agent_{names[poisoned_actors[0]]}/") and error.count("\n") == 1
    assert f"at step 256; {tmp_path / 'run'} has what was saved before" in error
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 128
    model = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for agent in model["agents"] for tensor in agent)
