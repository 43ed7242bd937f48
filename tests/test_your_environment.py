"""docs/your_environment.md: its files and diffs, applied to fresh copies, train, evaluate and resume."""

import csv
import importlib
import re
import shutil
from functools import cache
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from conftest import SCRIPTS
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TransformAction, TransformObservation
from test_runs import differences, newest, next_second, scalars
from test_scripts import ROOT, command_line, error_of

import envs
from envs import Partition

pytestmark = pytest.mark.slow  # whole runs

PAGE = (ROOT / "docs" / "your_environment.md").read_text()
SMALL = [
    "--num-envs",
    "4",
    "--num-steps",
    "25",
    "--hidden-sizes",
    "16",
    "--num-threads",
    "1",
    "--eval-episodes",
    "4",
]


def blocks(language: str) -> list[str]:
    """The page's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def diffs() -> dict[str, tuple[str, str]]:
    """The name of each script that the page makes: the name of the script that it changes, and the diff's hunks."""
    found = {}
    for block in blocks("diff"):
        before, after, hunks = block.split("\n", 2)
        names = zip(before.split()[1:], after.split()[1:], strict=True)
        for old, new in names:
            found[new] = (old, hunks)
    return found


def apply(hunks: str, text: str) -> str:
    """Change a text as the hunks say; what a hunk takes away is in the text exactly once."""
    for hunk in hunks.split("@@\n"):
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -") + "\n"
        new = "\n".join(line[1:] for line in lines if line[0] in " +") + "\n"
        assert text.count("\n" + old) == 1, old
        text = text.replace("\n" + old, "\n" + new)
    return text


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a new user has after following the page."""
    directory = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "envs", directory / "envs")
    for path in [*ROOT.glob("*_mamujoco.py"), ROOT / "evaluate.py"]:
        shutil.copy(path, directory)
    for block in blocks("python"):
        name = block.split("\n")[0].removeprefix("# ")
        (directory / name).write_text(block)
    (xml,) = blocks("xml")
    (directory / "cart.xml").write_text(xml)
    for new, (old, hunks) in diffs().items():
        (directory / new).write_text(apply(hunks, (ROOT / old).read_text()))
    return directory


@pytest.fixture
def here(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory, with the page's modules at hand."""
    monkeypatch.syspath_prepend(workplace)
    monkeypatch.chdir(tmp_path)
    return workplace


def test_the_table_counts_the_changed_lines():
    """The page says of each diff how many lines it adds to the script or changes."""
    rows = re.findall(r"\]\((#.*?)\) \| (\d+) \|", PAGE)
    counted = {}
    for section in PAGE.split("\n## ")[1:]:
        title = section.split("\n")[0]
        anchor = "#" + title.lower().replace(" ", "-")
        first = re.search(r"```diff\n.*?\n.*?\n(.*?)```", section, re.DOTALL)
        counted[anchor] = len(re.findall(r"^\+", first[1], re.MULTILINE)) if first else 0
    assert len(rows) == 6
    assert {anchor: int(count) for anchor, count in rows} == {a: counted[a] for a, _ in rows}


EXAMPLES = {
    "happo_swimmer.py": ["--eval-episodes", "1"],  # of 1,000 steps
    "happo_spread.py": [],
    "happo_discrete.py": [],
    "mappo_discrete.py": [],
    "hatrpo_discrete.py": [],
    "happo_mixed.py": [],
    "ippo_rewards.py": [],
    "happo_mamujoco.py": ["--env-id", "cart:Cart-v0-3x1", "--agent-obsk", "0"],
    "mappo_mamujoco.py": ["--env-id", "cart:Cart-v0-[[0],[1,2]]"],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_evaluates_and_resumes(
    name: str, here: Path, capsys: pytest.CaptureFixture
):
    """Half a run, resumed, is the whole one to the last bit; a wrapper hides the state, so there new episodes start."""
    flags = [*SMALL, *EXAMPLES[name], "--eval-interval", 200]
    command_line(here / name, *flags, "--total-timesteps", 400, "--run-dir", "whole")
    command_line(here / name, *flags, "--total-timesteps", 200, "--run-dir", "half")
    capsys.readouterr()
    next_second()
    command_line(here / name, "--resume", "half", "--total-timesteps", 400, "--allow-import")
    notice = "this environment's state cannot be saved: new episodes start here"
    assert (notice in capsys.readouterr().out) == ("swimmer" in name)
    log = scalars(Path("half"))
    assert [step for step, _ in log["eval/episodic_return"]] == [200, 400]
    if "swimmer" not in name:
        assert differences(newest(Path("whole")), newest(Path("half"))) == []
        assert scalars(Path("whole")) == log


@pytest.mark.parametrize("name", ["happo_spread", "happo_discrete"])
def test_evaluate_plays_the_examples(name: str, here: Path, capsys: pytest.CaptureFixture):
    """The score is that of the run's last evaluation."""
    command_line(here / f"{name}.py", *SMALL, "--total-timesteps", 100, "--run-dir", "run")
    program = here / "evaluate_discrete.py"
    if name == "happo_spread":
        program = here / "evaluate_spread.py"
        text = (here / "evaluate.py").read_text()
        program.write_text(text.replace("\nimport envs\n", "\nimport spread as envs\n"))
    capsys.readouterr()
    command_line(program, "run", "--seed", 1, "--episodes", 4)
    _, score = scalars(Path("run"))["eval/episodic_return"][-1]
    assert f"return mean {score:.2f}," in capsys.readouterr().out


# The adapter


def test_the_adapter_is_the_environment(here: Path):
    """Observations, rewards and ends are those of PettingZoo's own environment, with the agents side by side."""
    spread = importlib.import_module("spread")
    vec = spread.make_vec("simple_spread", 2)
    obs, _ = vec.reset(seed=7)
    seeds = np.random.default_rng(7)
    env = spread.simple_spread_v3.parallel_env(continuous_actions=True)
    env.reset(seed=int(seeds.integers(2**31, size=2)[1]))
    rng = np.random.default_rng(0)
    assert [ids.tolist() for ids in vec.partition.act_ids] == [
        list(range(5)),
        list(range(5, 10)),
        list(range(10, 15)),
    ]
    for t in range(1, 26):
        actions = rng.uniform(0, 1, (2, 15)).astype(np.float32)
        obs, rewards, terminations, truncations, infos = vec.step(actions)
        own = {f"agent_{i}": actions[1, 5 * i : 5 * i + 5] for i in range(3)}
        own_obs, own_rewards, _, _, _ = env.step(own)
        side_by_side = np.concatenate([own_obs[f"agent_{i}"] for i in range(3)])
        seen = infos["final_obs"][1] if t == 25 else obs[1]
        np.testing.assert_array_equal(seen, side_by_side)
        assert rewards[1] == sum(own_rewards.values())
        assert truncations.tolist() == [t == 25, t == 25] and not terminations.any()
    assert vec.episodes[1][1] == [] and not np.array_equal(obs[1], side_by_side)


def test_the_first_of_the_mixed_agents_chooses(here: Path):
    """Its choice k is the k-th continuous action at full strength."""
    mixed = importlib.import_module("spread_mixed").make_vec("simple_spread_mixed", 1)
    plain = importlib.import_module("spread").make_vec("simple_spread", 1)
    mixed.reset(seed=3)
    plain.reset(seed=3)
    others = np.random.default_rng(0).uniform(0, 1, 10).astype(np.float32)
    for choice in range(5):
        obs, rewards, *_ = mixed.step(np.concatenate([[choice], others])[None].astype(np.float32))
        one_hot = np.eye(5, dtype=np.float32)[choice]
        expected, expected_rewards, *_ = plain.step(np.concatenate([one_hot, others])[None])
        np.testing.assert_array_equal(obs, expected)
        assert rewards[0] == expected_rewards[0]


# Learning

LEARN = [
    "--num-envs",
    10,
    "--num-steps",
    50,
    "--gamma",
    0.95,
    "--num-threads",
    1,
    "--eval-episodes",
    100,
]


@cache
def random_returns(module: str) -> np.ndarray:
    """Returns of a uniformly random policy in an example's environment, 200 episodes."""
    vec = importlib.import_module(module).make_vec("", 100)
    rng = np.random.default_rng(1)
    vec.reset(seed=1)
    returns = np.zeros((2, 100))
    for t in range(50):
        actions = rng.uniform(size=(100, 15)).astype(np.float32)
        if module == "spread_discrete":
            actions = rng.integers(5, size=(100, 3))
        returns[t // 25] += vec.step(actions)[1]
    return returns.ravel()


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("happo_spread", ["--total-timesteps", 12_000, "--learning-rate", 4e-3]),
        ("happo_discrete", ["--total-timesteps", 6_000, "--learning-rate", 4e-3]),
        ("mappo_discrete", ["--total-timesteps", 6_000, "--learning-rate", 4e-3]),
        ("hatrpo_discrete", ["--total-timesteps", 7_000]),
    ],
)
def test_an_example_learns(name: str, flags: list, here: Path):
    """Better than a random policy by more than three standard errors of the difference."""
    command_line(here / f"{name}.py", *LEARN, *flags, "--run-dir", "run")
    log = scalars(Path("run"))
    mean = log["eval/episodic_return"][-1][1]
    std = log["eval/episodic_return_std"][-1][1]
    by_chance = random_returns("spread" if name == "happo_spread" else "spread_discrete")
    error = np.sqrt(std**2 / 100 + by_chance.var() / 200)
    assert mean > by_chance.mean() + 3 * error


@pytest.mark.parametrize(
    ("program", "name"),
    [("BenchMARL", "BenchMARL's MAPPO"), ("mappo_spread.py", "`mappo_spread.py`")],
)
def test_the_comparison_is_as_recorded(program: str, name: str):
    """The table beside BenchMARL has every run of the records."""
    with (ROOT / "benchmark" / "results" / "simple_spread.csv").open() as file:
        runs = [run for run in csv.DictReader(file) if run["program"] == program]
    speeds = [run["steps_per_second"] for run in runs if run["steps"] != "504000"]
    returns = [f"{float(run['eval_return']):.1f}" for run in runs if run["steps"] == "504000"]
    assert len(speeds) == len(returns) == 3
    assert f"| {name} | {', '.join(speeds)} | {', '.join(returns)} |" in PAGE


# What is missing


def pendulums(
    num_envs: int, mode: AutoresetMode = AutoresetMode.SAME_STEP, wrap=None
) -> SyncVectorEnv:
    """Pendulum-v1 with a partition for its one agent; `wrap` changes a single environment."""

    def make_env() -> gymnasium.Env:
        env = gymnasium.make("Pendulum-v1")
        return wrap(env) if wrap else env

    vec = SyncVectorEnv([make_env] * num_envs, autoreset_mode=mode)
    vec.partition = Partition((np.arange(3),), (np.arange(1),))
    return vec


def with_an_actuator_twice(num_envs: int) -> SyncVectorEnv:
    """Two agents that drive the one actuator."""
    vec = pendulums(num_envs)
    vec.partition = Partition((np.arange(3), np.arange(3)), (np.arange(1), np.arange(1)))
    return vec


def with_an_actuator_too_few(num_envs: int) -> SyncVectorEnv:
    """One agent for two actuators, of which it drives one."""
    space = Box(-2, 2, (2,))
    vec = pendulums(num_envs, wrap=lambda env: TransformAction(env, lambda a: a[:1], space))
    return vec


def with_next_step(num_envs: int) -> SyncVectorEnv:
    """Gymnasium's default, which makes the last step of an episode wrong."""
    return pendulums(num_envs, AutoresetMode.NEXT_STEP)


def with_endless_range(num_envs: int) -> SyncVectorEnv:
    """Actions that nothing bounds."""
    space = Box(-np.inf, np.inf, (1,))
    return pendulums(num_envs, wrap=lambda env: TransformAction(env, lambda action: action, space))


def with_pictures(num_envs: int) -> SyncVectorEnv:
    """Observations [num_envs, 3, 1]."""
    space = Box(-np.inf, np.inf, (3, 1))
    return pendulums(
        num_envs, wrap=lambda env: TransformObservation(env, lambda obs: obs[:, None], space)
    )


def with_choices(num_envs: int) -> SyncVectorEnv:
    """A Discrete action, which the scripts do not know."""
    torques = np.linspace(-2, 2, 3)[:, None]
    return pendulums(
        num_envs, wrap=lambda env: TransformAction(env, lambda k: torques[k], Discrete(3))
    )


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_an_actuator_twice, "the partition must give each entry of the action to one agent"),
        (with_an_actuator_too_few, "the partition must give each entry of the action to one agent"),
        (with_next_step, "the vector environment's autoreset_mode must be SAME_STEP"),
        (with_endless_range, "the vector environment's actions must have finite ranges"),
        (
            with_pictures,
            "the vector environment's spaces must be flat, not Box(-inf, inf, (3, 1), float32)",
        ),
        (with_choices, "the vector environment's spaces must be flat, not Discrete(3)"),
    ],
)
def test_what_a_vector_environment_lacks_is_named(
    make, message: str, name: str, here: Path, monkeypatch, capsys: pytest.CaptureFixture
):
    """In one line, with exit code 2, before anything is written."""
    monkeypatch.setattr(envs, "make_vec", lambda env_id, num_envs, *_: make(num_envs))
    error = error_of(capsys, 2, ROOT / f"{name}.py", "--run-dir", "run")
    assert error == f"error: {message}\n"
    assert not list(Path().iterdir())
