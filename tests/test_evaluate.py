"""evaluate.py: the scores of finished models are those of the scripts; bad files; films."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio
import numpy as np
import pytest
import torch
from conftest import SIBLINGS
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box
from test_scripts import ROOT, command_line

import envs
import evaluate
from evaluate import Args, Film, find_gl_backend, paint

pytestmark = pytest.mark.slow  # whole runs and processes

SCRIPT = ROOT / "evaluate.py"
MADDPG = {"learning_starts": 100, "batch_size": 32, "buffer_size": 10_000}


def train(name: str, run_dir: Path, **args: object) -> dict[str, float]:
    """Run a script on a small budget in this process; return what its last evaluation gave."""
    script = importlib.import_module(f"{name}_mamujoco")
    defaults = {
        "env_id": "Reacher-2x1",
        "total_timesteps": 256,
        "num_envs": 4,
        "num_steps": 32,
        "num_threads": 1,
        "hidden_sizes": (16, 16),
        "eval_episodes": 3,
    }
    if name == "maddpg":
        defaults |= MADDPG
    evaluations = []
    play = script.evaluate

    def evaluate_and_keep(*args: object) -> dict[str, float]:
        evaluations.append(play(*args))
        return evaluations[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "evaluate", evaluate_and_keep)
        script.main(script.Args(**(defaults | args), run_dir=str(run_dir)))
    return evaluations[-1]


def play_kept(path: Path, **args: object) -> tuple[np.ndarray, np.ndarray]:
    """Run evaluate.py's main in this process; return the returns and lengths of the episodes."""
    kept = []
    play = evaluate.evaluate

    def play_and_keep(*args: object) -> tuple[np.ndarray, np.ndarray]:
        kept.append(play(*args))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate", play_and_keep)
        evaluate.main(Args(path, num_threads=1, **args))
    (results,) = kept
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on Reacher-2x1, whose episodes take 50 steps."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train("happo", run_dir)
    return run_dir


@pytest.fixture
def model(finished: Path) -> dict:
    """Its model, to change."""
    return torch.load(finished / "model.pt", weights_only=True)


def process(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run evaluate.py as a user does; `command_line` does it in this process, seconds faster."""
    command = [sys.executable, str(SCRIPT), *map(str, args), "--num-threads", "1"]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | (env or {}),
    )


def error_of(capsys: pytest.CaptureFixture, path: Path, **args: object) -> str:
    """Run evaluate.py in this process; it must exit with 2 and one line, without having played; return the line."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("it has played"))
        evaluate.main(Args(path, episodes=2, num_threads=1, **args))
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# Scores


CASES = [
    ("Hopper-3x1", {}),  # episodes of different lengths
    ("Reacher-2x1", {"eval_episodes": 1, "seed": 7}),
    ("Hopper-v5-3x1", {"eval_episodes": 1}),  # on Gymnasium's vectorisation
    ("Pusher-3p", {"agent_obsk": 1}),  # agents of 3, 1 and 3 actuators; action range -2 to 2
    ("Humanoid-9|8", {"agent_obsk": 1}),
    ("Hopper-3x1", {"agent_obsk": 1, "share_param": True}),  # two observations are padded
    ("Pusher-7x1", {"agent_obsk": 1, "share_param": True}),
]


@pytest.mark.parametrize(
    ("env_id", "flags"), CASES, ids=[f"{env_id} {' '.join(flags)}" for env_id, flags in CASES]
)
@pytest.mark.parametrize("name", SIBLINGS)
def test_the_score_is_that_of_the_script(
    name: str, env_id: str, flags: dict, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The run's last evaluation to the last bit, from directory, checkpoint.pt and model.pt; and it is printed."""
    if name == "maddpg" and "share_param" in flags:
        pytest.skip("MADDPG has no --share-param")
    run_dir = tmp_path / "run"
    expected = train(name, run_dir, env_id=env_id, **flags)
    episodes = flags.get("eval_episodes", 3)
    seed = flags.get("seed", 1)
    for path in (run_dir, run_dir / "checkpoint.pt", run_dir / "model.pt"):
        capsys.readouterr()
        returns, lengths = play_kept(path, episodes=episodes, seed=seed)
        assert returns.shape == lengths.shape == (episodes,)
        assert expected == {
            "eval/episodic_return": returns.mean(),
            "eval/episodic_return_std": returns.std(),
            "eval/episodic_length": lengths.mean(),
        }
        score = f"mean {returns.mean():.2f}, std {returns.std():.2f}"
        score += f", min {min(returns):.2f}, max {max(returns):.2f}"
        assert capsys.readouterr().out == (
            f"{env_id}, {episodes} episodes, seed {seed}: return {score}; "
            f"mean length {lengths.mean():.1f}\n"
        )


def test_a_directory_plays_its_newest_state(finished: Path, tmp_path: Path):
    """A kill between the two files leaves a model.pt behind its checkpoint; without a checkpoint it is played."""
    expected = train("happo", tmp_path / "longer", total_timesteps=1024)
    old = play_kept(finished, episodes=3, seed=1)[0].mean()
    assert old != expected["eval/episodic_return"]
    shutil.copy(finished / "model.pt", tmp_path / "longer")
    newest = play_kept(tmp_path / "longer", episodes=3, seed=1)[0].mean()
    assert newest == expected["eval/episodic_return"]
    (tmp_path / "longer" / "checkpoint.pt").unlink()
    assert play_kept(tmp_path / "longer", episodes=3, seed=1)[0].mean() == old


def test_a_run_without_a_model_plays_its_checkpoint(tmp_path: Path):
    """A kill before the first model.pt: the score is that of the whole run."""
    expected = train("happo", tmp_path / "run")
    (tmp_path / "run" / "model.pt").unlink()
    returns, _ = play_kept(tmp_path / "run", episodes=3, seed=1)
    assert returns.mean() == expected["eval/episodic_return"]


MODELS = sorted((ROOT / "benchmark/models").glob("*.pt"))


@pytest.mark.parametrize("path", MODELS[::5], ids=lambda path: path.stem)  # playing all takes long
def test_trained_models_have_their_recorded_score(
    path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """That of the best seed's last evaluation in figure 3, from its start states.

    Only nearly: another machine and another order of the products round differently, and where one of twenty robots
    falls for that, their mean return changes by up to 5%. The scripts that made the records seeded their evaluations
    with 1,000,000 + seed.
    """
    algorithm, env_id = path.stem.split("-", 1)
    records = (ROOT / "benchmark/results/figure3").glob(f"{env_id}__{algorithm}__*.csv")
    scores = {}
    for file in records:
        evaluations = np.genfromtxt(file, delimiter=",", names=True)["eval_return"]
        scores[int(file.stem.split("__")[2])] = evaluations[-1]
    seed = max(scores, key=scores.get)
    recorded_seed = 1_000_000 + seed
    make_vec = envs.make_vec

    def make_vec_seeded(*args: object, **kwargs: object) -> gym.vector.VectorEnv:
        vec = make_vec(*args, **kwargs)
        reset = vec.reset
        monkeypatch.setattr(vec, "reset", lambda seed: reset(seed=recorded_seed))
        return vec

    monkeypatch.setattr(envs, "make_vec", make_vec_seeded)
    evaluate.main(Args(path, episodes=20, seed=seed, num_threads=1))
    numbers = rf"{env_id}, 20 episodes, seed {seed}: return mean ([-\d.]+), std ([\d.]+)"
    mean, std = map(float, re.match(numbers, capsys.readouterr().out).groups())
    assert mean == pytest.approx(scores[seed], abs=max(0.05 * scores[seed], 4 * std / 20**0.5))


@pytest.mark.parametrize("tanh", [False, True])
def test_actions_are_the_networks_outputs(model: dict, tanh: bool):
    """Networks whose outputs are 3 and -5: these actions, and their hyperbolic tangents for MADDPG."""
    policy = {name: torch.zeros_like(tensor) for name, tensor in model["policy"].items()}
    policy["actors.0.net.4.bias"] += 3
    policy["actors.1.net.4.bias"] -= 5
    args = model["args"].copy()
    if tanh:
        del args["log_std_init"]  # MADDPG has none
    actions = evaluate.Policy(model | {"policy": policy, "args": args})(np.zeros((2, 10)))
    np.testing.assert_allclose(actions, [np.tanh([3, -5]) if tanh else [3, -5]] * 2, rtol=1e-6)
    assert actions.dtype == np.float32


def test_actions_are_scaled_into_asymmetric_ranges():
    """The actions -1, 0, 1 become the lower end, the middle and the upper end; rounding leads out of no range."""
    low = -np.linspace(0.01, 1, 200, dtype=np.float32)
    high = np.ones(200, dtype=np.float32)
    center = (low + high) / 2
    half = (high - low) / 2
    assert (center - half < low).any()  # so rounding alone would lead out
    space = Box(low, high)
    applied = []

    def step(actions: np.ndarray) -> tuple:
        applied.append(actions)
        ended = np.array([len(applied) == 3])
        return np.zeros((1, 1)), np.ones(1), ended, ~ended & False, {}

    def reset(seed: int) -> tuple:
        return np.zeros((1, 1)), {}

    vec = SimpleNamespace(num_envs=1, single_action_space=space, reset=reset, step=step)
    wanted = iter((-1.0, 0.0, 1.0))
    returns, lengths = evaluate.evaluate(
        vec, lambda obs: np.full((1, 200), next(wanted), dtype=np.float32), seed=0
    )
    for actions, expected in zip(applied, (low, center, high), strict=True):
        assert all(action in space for action in actions)
        np.testing.assert_allclose(actions[0], expected, atol=1e-6)
    assert (returns, lengths) == (3, 3)


def test_command_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """One line for a run's directory; the same for its model alone, elsewhere; other start states for another seed."""
    shutil.copy(finished / "model.pt", tmp_path / "shared.bin")
    before = {file: file.read_bytes() for file in finished.iterdir()}
    done = process(finished, "--episodes", 5)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("Reacher-2x1, 5 episodes, seed 0: return mean -")
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith("; mean length 50.0\n")
    command_line(SCRIPT, tmp_path / "shared.bin", "--episodes", 5)
    assert capsys.readouterr().out == done.stdout
    command_line(SCRIPT, finished, "--episodes", 5, "--seed", 1)
    assert capsys.readouterr().out.replace("seed 1", "seed 0") != done.stdout
    assert {file: file.read_bytes() for file in finished.iterdir()} == before


def test_no_script_is_imported():
    """A model can be played without the code that trained it."""
    program = "import evaluate, sys; print([name for name in sys.modules if 'mamujoco' in name])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# Bad input


@pytest.mark.parametrize(
    ("flag", "value", "least"),
    [
        ("--episodes", 0, "greater than 0"),
        ("--seed", -1, "greater than or equal to 0"),
        ("--num-threads", -1, "greater than or equal to 0"),
    ],
)
def test_bad_numbers_are_shown_in_a_box(
    finished: Path, flag: str, value: int, least: str, capsys: pytest.CaptureFixture
):
    """Exit code 2, and what would be right."""
    with pytest.raises(SystemExit, match="2"):
        command_line(SCRIPT, finished, flag, value)
    out, error = capsys.readouterr()
    words = " ".join(error.replace("│", " ").split())
    name = flag.removeprefix("--").replace("-", "_")
    assert f"{name} Input should be {least}" in words and f"input_value={value}" in words
    assert out == "" and "Traceback" not in error


def test_files_that_are_no_models(
    finished: Path, model: dict, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Nothing, text, half a file, a model with a part missing or of the wrong size: one line each."""
    file = tmp_path / "model.pt"
    assert f"{file}: no model can be read there (FileNotFoundError)" in error_of(capsys, file)
    missing = f"{tmp_path}: no model can be read there (FileNotFoundError)"
    assert missing in error_of(capsys, tmp_path)
    whole = (finished / "model.pt").read_bytes()
    for content in (b"", b"not a model\n", whole[: len(whole) // 2]):
        for name in ("model.pt", "checkpoint.pt"):
            path = tmp_path / name
            path.write_bytes(content)
            for place in (tmp_path, path):
                assert f"{place}: no model can be read there (" in error_of(capsys, place)
            assert path.read_bytes() == content
            path.unlink()
    policy = model["policy"]
    weight, bias = policy["actors.1.net.2.weight"], policy["actors.1.net.4.bias"]
    mean, var, count = model["obs_rms"]
    nan = float("nan")
    without_second = {name: x for name, x in policy.items() if not name.startswith("actors.1.")}
    changes = [
        {"obs_ids": model["obs_ids"][:1]},
        {"obs_ids": [*model["obs_ids"], [0]]},
        {"obs_ids": [[float(i) for i in ids] for ids in model["obs_ids"]]},
        {"act_ids": [["0"], ["1"]]},
        {"act_ids": "01"},
        {"act_ids": [[0.0], [1.0]]},
        {"obs_rms": [[*mean[:-1], nan], var, count]},
        {"obs_rms": [mean, [*var[:-1], nan], count]},
        {"obs_rms": [mean, [*var[:-1], float("inf")], count]},
        {"policy": policy | {"actors.1.net.2.weight": weight * nan}},
        {"policy": policy | {"actors.0.log_std": torch.tensor([torch.inf])}},
        {"obs_ids": [[0, 99], [1, 2]]},
        {"obs_ids": [[0], [1]]},
        {"act_ids": [[0], [7]]},
        {"args": {}},
        {"obs_rms": [[0.0], [1.0], 1.0]},
        {"policy": 3},
        {"policy": {}},
        {"policy": without_second, "obs_ids": [model["obs_ids"][0], [0]]},  # as many as actions
        {"policy": without_second},
        {"policy": {name: x for name, x in policy.items() if name != "actors.1.net.4.bias"}},
        {"policy": policy | {"actors.1.net.2.weight": weight[:, :-1]}},
        {"policy": policy | {"actors.1.net.4.bias": bias.repeat(2)}},
        {"policy": policy | {"actors.1.net.4.bias": "zero"}},
    ]
    broken = [model | change for change in changes]
    for key in ("args", "obs_rms", "obs_ids", "act_ids", "policy"):
        broken.append({name: value for name, value in model.items() if name != key})
    for state in broken:
        torch.save(state, file)
        assert f"{file}: no model can be read there (" in error_of(capsys, file)
    file.write_text("not a model")
    done = process(file)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        rf"error: {re.escape(str(file))}: no model can be read there \(\w+\)\n", done.stderr
    )


def test_a_hostile_file_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A pickle that would make a directory does not make it."""
    bait, file = tmp_path / "bait", tmp_path / "model.pt"

    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(bait),)

    torch.save({"policy": Hostile()}, file)
    assert "no model can be read there (UnpicklingError)" in error_of(capsys, file)
    assert not bait.exists()
    torch.load(file, weights_only=False)  # the bait works
    assert bait.exists()


def test_models_of_other_robots(model: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A robot that is not there, or that has another size or partition by now."""
    file = tmp_path / "model.pt"
    for env_id, message in (
        ("Nothing-v0-2x1", "unknown env_id 'Nothing-v0-2x1'"),
        (7, "unknown env_id '7'"),
        (None, "unknown env_id 'None'"),
        (["Reacher-2x1"], "unknown env_id "),
        (["module:Reacher-2x1"], "['module:Reacher-2x1'] imports a module"),
        ("Reacher-9x9", "Reacher has no partition '9x9'"),
        ("Swimmer-2x1", "Swimmer-2x1 has changed since this model was made"),
        ("Reacher-[[1],[0]]", "Reacher-[[1],[0]] has changed since this model was made"),
    ):
        torch.save(model | {"args": model["args"] | {"env_id": env_id}}, file)
        assert f"{file}: {message}" in error_of(capsys, file)


# Films


def gl_works() -> bool:
    """Whether this machine can draw."""
    try:
        find_gl_backend()
    except RuntimeError:
        return False
    return True


needs_gl = pytest.mark.skipif(not gl_works(), reason="no EGL or OSMesa here")


def robot(vec: gym.vector.VectorEnv) -> MujocoEnv:
    """Gymnasium's environment object in one of ours."""
    return vec.unwrapped.env


def hues(colors: np.ndarray) -> np.ndarray:
    """Colours without brightness and whiteness, [..., 3] from 0 to 1; NaN where they are nearly grey."""
    colors = np.asarray(colors, dtype=float)
    low = colors.min(axis=-1, keepdims=True)
    high = colors.max(axis=-1, keepdims=True)
    return np.where(high - low > 0.3 * high, (colors - low) / np.maximum(high - low, 1e-9), np.nan)


@needs_gl
def test_film(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """An mp4 with a frame per step, a GIF of the first seconds; both move; the legend has the agents' colours."""
    name = tmp_path / "new" / "film_0.5"  # not a suffix
    done = process(finished, "--video", f"{name}.mp4", "--episodes", 2)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    films, score = done.stdout.splitlines()
    assert films.startswith(f"{name}.mp4 and {name}.gif: the first episode, return -")
    command_line(SCRIPT, finished, "--episodes", 2)
    assert score == capsys.readouterr().out.strip()  # filming does not disturb the evaluation
    video = imageio.mimread(f"{name}.mp4", memtest=False)
    gif = imageio.mimread(f"{name}.gif")
    # 50 steps take 1 s, at 20 or more pictures a second.
    assert np.shape(video) == (50, 480, 480, 3) and len(gif) == 25
    assert (video[0] != video[25]).any() and (gif[0] != gif[12]).any()
    vec = envs.make_vec("Reacher-2x1", 1)
    for agent, color in enumerate(paint(robot(vec).model, vec.partition)):
        np.testing.assert_allclose(video[10][12 + 24 * agent, 4], 255 * color, atol=25)  # lossy
        # A limb in light and shadow; the goal is red as well, but has only some 60 pixels.
        limb = np.abs(hues(video[10][120:]) - hues(color)).max(axis=-1) < 0.2
        assert 150 < limb.sum() < 1000


@needs_gl
def test_film_of_gymnasiums_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An environment on Gymnasium's vectorisation: a frame per step of the first of the episodes, and no more."""
    monkeypatch.setattr(evaluate, "SIZE", 64)
    train("mappo", tmp_path / "run", env_id="Hopper-v5-3x1", total_timesteps=128)
    policy = evaluate.Policy(torch.load(tmp_path / "run" / "model.pt", weights_only=True))
    vec = envs.make_vec("Hopper-v5-3x1", 3)
    for seed in range(100):
        _, expected = evaluate.evaluate(vec, policy, seed)
        if expected[0] < expected.max():
            break
    film = Film(vec, str(tmp_path / "film"))
    _, lengths = evaluate.evaluate(vec, policy, seed, film)
    film.close()
    np.testing.assert_array_equal(lengths, expected)
    assert lengths[0] < lengths.max()
    video = imageio.mimread(tmp_path / "film.mp4", memtest=False)
    assert len(video) == lengths[0] and (video[0] != video[-1]).any()


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_films_are_not_overwritten(
    finished: Path, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """One line, before anything is played."""
    (tmp_path / f"film{suffix}").write_text("mine")
    error = error_of(capsys, finished, video=str(tmp_path / "film"))
    assert f"--video {tmp_path / 'film'}: {tmp_path / 'film'}{suffix} exists already" in error
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("names", [("egl", "osmesa"), ("nonsense", "rubbish")], ids=" ".join)
def test_an_empty_variable_is_none(names: tuple, monkeypatch: pytest.MonkeyPatch):
    """With MUJOCO_GL="" the same is found, or not found, as without it."""
    monkeypatch.setattr(evaluate, "GL_BACKENDS", names)
    found = []
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("MUJOCO_GL", raising=False)
        else:
            monkeypatch.setenv("MUJOCO_GL", value)
        try:
            found.append(find_gl_backend())
        except RuntimeError as e:
            found.append(str(e))
    assert found[0] == found[1]
    assert found[1] in names or found[1].startswith(f"{names[0]} and {names[1]} cannot draw here")


def test_no_display_says_what_to_install(
    finished: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """Before anything is played or made."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(evaluate, "GL_BACKENDS", ("nonsense", "rubbish"))
    error = error_of(capsys, finished, video=str(tmp_path / "film"))
    assert "film: nonsense and rubbish cannot draw here: apt install libegl1 or libosmesa6" in error
    done = process(finished, "--video", tmp_path / "film", env={"MUJOCO_GL": "disable"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.endswith(
        "film: disable cannot draw here: apt install libegl1 or libosmesa6\n"
    )
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@needs_gl
def test_drawing_is_tried_before_playing(
    finished: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the renderer raises is one line, and nothing is made."""

    def draw(_: Film) -> None:
        raise OverflowError("no\nframebuffer")

    monkeypatch.setattr(Film, "draw", draw)
    error = error_of(capsys, finished, video=str(tmp_path / "film"))
    assert "cannot draw here: no framebuffer\n" in error and list(tmp_path.iterdir()) == []


@needs_gl
def test_a_directory_that_cannot_be_made(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A file is in the way."""
    (tmp_path / "file").touch()
    assert "Not a directory" in error_of(
        capsys, finished, video=str(tmp_path / "file" / "films" / "film")
    )


TWINS = """
<mujoco>
  <worldbody><body><joint name="hinge" axis="0 1 0"/><geom size="0.1"/></body></worldbody>
  <actuator>
    <motor joint="hinge" ctrlrange="-1 1" ctrllimited="true"/>
    <motor joint="hinge" ctrlrange="-1 1" ctrllimited="true"/>
  </actuator>
</mujoco>
"""


class TwinsEnv(MujocoEnv):
    """A user's robot, with two actuators on one joint."""

    def __init__(self, xml_file: str) -> None:
        super().__init__(xml_file, 2, Box(-np.inf, np.inf, (2,), np.float64))

    def step(self, action: np.ndarray) -> tuple:
        self.do_simulation(action, self.frame_skip)
        return self.state_vector(), float(self.data.qpos[0]), False, False, {}

    def reset_model(self) -> np.ndarray:
        return self.state_vector()


def test_two_actuators_on_a_joint_have_no_colour(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Such a robot can be evaluated, but not filmed."""
    (tmp_path / "twins.xml").write_text(TWINS)
    gym.register(
        "Twins-v0", TwinsEnv, max_episode_steps=9, kwargs={"xml_file": str(tmp_path / "twins.xml")}
    )
    try:
        train("maddpg", tmp_path / "run", env_id="Twins-v0-2x1")
        error = error_of(capsys, tmp_path / "run", video=str(tmp_path / "film"))
        assert (
            "film: a partition needs a model in which every actuator drives a joint of its own"
            in error
        )
        evaluate.main(Args(tmp_path / "run", episodes=2))
        assert capsys.readouterr().out.endswith("mean length 9.0\n")
    finally:
        del gym.registry["Twins-v0"]


@pytest.mark.parametrize(
    ("env_id", "agents_of_body"),
    [
        # From the XML: the hips' bodies aux_1 to aux_4 are driven by agents 1, 2, 3, 0 (actuators 2, 4, 6, 0); what
        # lies between them and the torso belongs to nobody.
        (
            "Ant-4x2",
            {
                "aux_1": [1],
                "aux_2": [2],
                "aux_3": [3],
                "aux_4": [0],
                "front_left_leg": [],
                "torso": [],
            },
        ),
        (
            "HalfCheetah-6x1",
            {"bthigh": [0], "bshin": [1], "bfoot": [2], "fthigh": [3], "ffoot": [5], "torso": []},
        ),
        # abdomen_y, abdomen_x: the two joints of one body, of different agents.
        ("Humanoid-17x1", {"lwaist": [0, 1], "pelvis": [2], "torso": []}),
    ],
)
def test_limbs_have_their_agents_colour(env_id: str, agents_of_body: dict[str, list[int]]):
    """Each geom of a limb has the colour of the agents that drive the limb; torso and floor keep theirs."""
    vec = envs.make_vec(env_id, 1)
    model = robot(vec).model
    before = model.geom_rgba.copy()
    colors = paint(model, vec.partition)
    assert colors.shape == (vec.partition.num_agents, 3)
    assert min(np.abs(a - b).max() for i, a in enumerate(colors) for b in colors[:i]) > 0.1
    for name, agents in agents_of_body.items():
        for geom in np.flatnonzero(model.geom_bodyid == model.body(name).id):
            expected = colors[agents].mean(axis=0) if agents else before[geom, :3]
            np.testing.assert_allclose(model.geom_rgba[geom, :3], expected, rtol=1e-6)
            assert model.geom_matid[geom] == -1 or not agents
    assert (model.geom_rgba[model.geom_bodyid == 0] == before[model.geom_bodyid == 0]).all()


@needs_gl
def test_filming_leaves_the_physics_alone(tmp_path: Path):
    """A film is drawn from a copy of the state."""
    vec, other = envs.make_vec("Ant-4x2", 2), envs.make_vec("Ant-4x2", 2)
    vec.reset(seed=0)
    other.reset(seed=0)
    film = Film(vec, str(tmp_path / "film"))
    for _ in range(20):
        film.draw()
        actions = np.full(vec.action_space.shape, 0.3, dtype=np.float32)
        for x, y in zip(vec.step(actions)[:4], other.step(actions)[:4], strict=True):
            np.testing.assert_array_equal(x, y)
    film.renderer.close()
    del film.renderer


@needs_gl
@pytest.mark.parametrize(
    "env_id",
    [
        "HalfCheetah-6x1",
        "Ant-4x2",
        "Hopper-3x1",
        "Walker2d-6x1",
        "Humanoid-17x1",
        "ManySegmentSwimmer-10x2",
    ],
)
def test_the_camera_follows_the_robot(env_id: str, tmp_path: Path):
    """After 20 metres the robot is still in the picture: as many pixels of the agents' bright colours as before."""
    vec = envs.make_vec(env_id, 1)
    vec.reset(seed=0)
    film, pixels = Film(vec, str(tmp_path / "film")), []
    for _ in range(2):
        picture = film.draw().astype(int)
        pixels.append((picture.max(axis=-1) - picture.min(axis=-1) > 80).sum())
        vec.unwrapped.qpos[0, 0] += 20
    film.renderer.close()
    del film.renderer
    assert pixels[0] > 100 and 0.5 < pixels[1] / pixels[0] < 2
