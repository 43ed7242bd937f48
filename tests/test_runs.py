"""Runs that are stopped, resumed, evaluated, filmed, shared, tracked, and that fail."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import imageio.v3 as imageio
import mujoco
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import ROOT, SMALL, run, train

import envs
from envs.video import Film, agent_colors, find_gl_backend, paint

ITERATION = 128  # environment steps, with the flags of SMALL and in `train`
TIMES = {"charts/SPS", "eval/seconds"}


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All points of a run's TensorBoard log but the measured times: (step, value) by tag."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = set(log.Tags()["scalars"]) - TIMES
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in tags}


def newest(run_dir: Path) -> dict:
    """The newest checkpoint of a run."""
    return torch.load(max(run_dir.glob("checkpoint_*.pt")), weights_only=True)


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Where two checkpoints differ, except in what belongs to the run and not to its state."""
    if path in {"/seconds", "/run_id", "/args"}:
        return []
    if isinstance(a, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


def resume(script: ModuleType, run_dir: Path, **changes: object) -> dict:
    """Continue a run in this process, as `--resume` with these flags does; return its model."""
    args = newest(run_dir)["args"] | {"resume": str(run_dir)} | changes
    script.main(script.Args(**args))
    return torch.load(run_dir / "model.pt", weights_only=True)


# Resuming


@pytest.mark.parametrize("env_id", [*envs.ENV_IDS, "Ant-v4-4x2", "InvertedDoublePendulum-v5-1x1"])
def test_environments_go_on_from_their_state(env_id: str):
    """Other environments, put into the saved state, do what the saved ones do: all results, resets, statistics."""
    rng = np.random.default_rng(0)
    vec, other = envs.make_vec(env_id, 3), envs.make_vec(env_id, 3)
    vec.reset(seed=1)
    other.reset(seed=2)
    limit = getattr(vec.unwrapped, "max_episode_steps", 1000)

    def actions() -> np.ndarray:
        return rng.uniform(vec.action_space.low, vec.action_space.high).astype(np.float32)

    for _ in range(7):
        vec.step(actions())
    state = envs.get_state(vec)
    if "elapsed_steps" in state:  # a time limit within reach
        state["elapsed_steps"] = vec.unwrapped._elapsed_steps[:] = [limit - 9, limit - 5, 7]
    envs.set_state(other, state)
    assert differences(envs.get_state(vec), envs.get_state(other)) == []
    ended = 0
    for _ in range(40):
        a = actions()
        (*results, infos), (*others, other_infos) = vec.step(a), other.step(a)
        for x, y in zip(results, others, strict=True):
            np.testing.assert_array_equal(x, y)
        if "episode" in infos:
            ended += infos["_episode"].sum()
            np.testing.assert_array_equal(infos["episode"]["r"], other_infos["episode"]["r"])
            np.testing.assert_array_equal(infos["episode"]["l"], other_infos["episode"]["l"])
    assert ended >= 2 or "elapsed_steps" not in state


@pytest.mark.parametrize("env_id", ["Ant-4x2", "Hopper-3x1"])
def test_resumed_run_is_the_uninterrupted_one(script: ModuleType, env_id: str, tmp_path: Path):
    """The whole state after 3 + 3 iterations is that after 6, bit for bit, and so is every point of the log."""
    total = {"total_timesteps": 6 * ITERATION, "eval_episodes": 2, "eval_interval": 300, "anneal_lr": False}
    train(script, tmp_path / "whole", env_id=env_id, **total)
    train(script, tmp_path / "parts", env_id=env_id, **total | {"total_timesteps": 3 * ITERATION})
    resume(script, tmp_path / "parts", total_timesteps=6 * ITERATION)
    assert differences(newest(tmp_path / "whole"), newest(tmp_path / "parts")) == []
    whole, parts = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    assert len(whole["losses/value_loss"]) == 6 and len(whole["eval/episodic_return"]) == 3
    # The first part ended, so it was evaluated there too.
    for tag in [tag for tag in parts if tag.startswith("eval/")]:
        parts[tag] = [point for point in parts[tag] if point[0] != 3 * ITERATION or point in whole[tag]]
    assert parts == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["sigint", "sigterm"])
def test_signals_save_and_stop(number: signal.Signals, tmp_path: Path):
    """The iteration is finished and saved, the exit code is 128 + the signal, and the run can go on."""
    import happo_mamujoco as script

    run_dir = tmp_path / "run"
    command = [sys.executable, script.__file__, *SMALL, "--total-timesteps", "1000000", "--run-dir", run_dir]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
    while not list(run_dir.glob("checkpoint_*.pt")):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    step = newest(run_dir)["iteration"] * ITERATION
    assert process.returncode == 128 + number
    assert error == f"stopped at step {step}; to go on: --resume {run_dir}\n"
    assert [s for s, _ in scalars(run_dir)["losses/value_loss"]] == list(range(ITERATION, step + 1, ITERATION))
    resume(script, run_dir, total_timesteps=step + ITERATION)
    assert scalars(run_dir)["losses/value_loss"][-1][0] == step + ITERATION


def test_killed_run_resumes_without_a_trace(tmp_path: Path):
    """A run killed between two checkpoints: the log of the resumed one has each point once (tests/kill.py does 60)."""
    import mappo_mamujoco as script

    total = ["--total-timesteps", 40 * ITERATION, "--checkpoint-interval", 7]
    assert run(script, *SMALL, *total, "--run-dir", tmp_path / "whole").returncode == 0
    command = [sys.executable, script.__file__, *SMALL, *map(str, total), "--run-dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "killed").glob("checkpoint_*.pt"))) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert newest(tmp_path / "killed")["iteration"] < 40
    assert run(script, "--resume", tmp_path / "killed").returncode == 0
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
    """A finished run of HAPPO on Reacher-2x1: 4 iterations, checkpoints at 2 and 4, evaluated."""
    import happo_mamujoco as script

    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(script, run_dir, total_timesteps=4 * ITERATION, checkpoint_interval=2, eval_episodes=3)
    return run_dir


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to play with."""
    return shutil.copytree(finished, tmp_path / "run")


def error_of(capsys: pytest.CaptureFixture, code: int, args: Sequence[object]) -> str:
    """Run HAPPO's command line in this process; it must exit with `code` and one line, which is returned."""
    import happo_mamujoco as script

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["happo_mamujoco.py", *map(str, args)])
        script.main(script.parse_args())
    error = capsys.readouterr().err
    assert stop.value.code == code and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_the_last_two_checkpoints_are_kept_and_a_torn_one_refused(copied: Path, capsys: pytest.CaptureFixture):
    """A torn file is named, with the one before it; that one leads to the same bits."""
    import happo_mamujoco as script

    files = sorted(copied.glob("checkpoint_*.pt"))
    assert [file.name for file in files] == ["checkpoint_000000000256.pt", "checkpoint_000000000512.pt"]
    expected, points, whole = newest(copied), scalars(copied), files[1].read_bytes()
    for torn in (whole[: len(whole) // 2], b"", whole[:1000] + bytes(1000) + whole[2000:]):
        files[1].write_bytes(torn)
        error = error_of(capsys, 2, ["--resume", copied, "--total-timesteps", 6 * ITERATION])
        assert f"{files[1]} is torn, missing, or no checkpoint of happo_mamujoco.py; the one before it is" in error
        assert f"--resume {files[0]}" in error
    script.main(script.Args(**expected["args"] | {"resume": str(files[0])}))
    assert differences(expected, newest(copied)) == [] and scalars(copied) == points


def test_foreign_checkpoints_are_refused(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A hostile pickle runs nothing; another script's checkpoint, a model, an empty directory are not accepted."""
    bait = tmp_path / "bait"

    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(bait),)

    file = copied / "checkpoint_000000000999.pt"
    torch.save({"script": "happo_mamujoco", "args": Hostile()}, file)
    assert "checkpoint_000000000999.pt is torn, missing, or no checkpoint" in error_of(capsys, 2, ["--resume", file])
    assert not bait.exists()
    with pytest.raises(Exception, match="unsupported GLOBAL"):
        torch.load(file, weights_only=True)
    torch.load(file, weights_only=False)  # the bait works
    assert bait.exists()
    file.unlink()
    torch.save(newest(copied) | {"script": "mappo_mamujoco"}, file)
    assert "no checkpoint of happo_mamujoco.py" in error_of(capsys, 2, ["--resume", file])
    assert "no checkpoint of happo_mamujoco.py" in error_of(capsys, 2, ["--resume", copied / "model.pt"])
    assert "there is no checkpoint in it" in error_of(capsys, 2, ["--resume", tmp_path])
    assert "missing" in error_of(capsys, 2, ["--resume", tmp_path / "nowhere.pt"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clip-coef", 0.3], "--clip-coef 0.3 contradicts the run to resume, which has 0.1"),
        (["--env-id", "Ant-4x2"], "--env-id Ant-4x2 contradicts the run to resume, which has Reacher-2x1"),
        (["--seed", 5], "--seed 5 contradicts the run to resume, which has 1"),
        (["--total-timesteps", 512], "--total-timesteps 512: the run has 512 already, raise it to go on"),
    ],
)
def test_contradicting_arguments_are_refused_by_name(copied: Path, flags: list, message: str, capsys):
    """And nothing in the run's directory changes."""
    before = {file: file.read_bytes() for file in copied.iterdir()}
    assert message in error_of(capsys, 2, ["--resume", copied, *flags])
    assert {file: file.read_bytes() for file in copied.iterdir()} == before


# Evaluation, films, sharing


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

    def step(actions: torch.Tensor) -> tuple:
        t[0] += 1
        done = t[0] % lengths == 0
        number = t[0] // lengths  # of the episode that ends: later ones would be worth more
        infos = {"_episode": done, "episode": {"r": lengths * number**2 * 1.0, "l": lengths}} if done.any() else {}
        return torch.zeros(3, 1), None, None, None, None, infos

    env = SimpleNamespace(vec=SimpleNamespace(num_envs=3), reset=lambda seed: torch.zeros(3, 1), step=step)
    log = script.evaluate(env, SimpleNamespace(mean=lambda obs: obs), 0)
    assert t[0] == 7
    assert log["eval/episodic_return"] == log["eval/episodic_length"] == 4
    assert (log["eval/episodic_return_min"], log["eval/episodic_return_max"]) == (2, 7)
    assert log["eval/episodic_return_std"] == pytest.approx(np.std(lengths))


def readme_block(word: str) -> str:
    """The Python block of the README that contains `word`."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    return next(block.split("```")[0] for block in blocks if word in block.split("```")[0])


@pytest.mark.parametrize("flags", [{}, {"agent_obsk": 0}], ids=["full", "partial"])
def test_shared_policy_scores_in_gymnasium_what_was_logged(script: ModuleType, flags: dict, tmp_path: Path):
    """README's lines load a model and play Gymnasium's own Hopper-v5: return and length are those of the log."""
    args = {"env_id": "Hopper-3x1", "total_timesteps": 4 * ITERATION, "eval_episodes": 4}
    train(script, tmp_path / "run", **args, **flags)
    names: dict = {}
    exec(readme_block("def policy").replace("MODEL", str(tmp_path / "run" / "model.pt")), names)
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


def test_eval_only_repeats_the_last_evaluation(copied: Path, capsys: pytest.CaptureFixture):
    """`--resume RUN --eval-only` prints what was logged at the end, and writes nothing."""
    import happo_mamujoco as script

    before = {file: file.read_bytes() for file in copied.iterdir()}
    resume(script, copied, eval_only=True)
    logged = scalars(copied)["eval/episodic_return"][-1][1]
    assert capsys.readouterr().out.startswith(f"eval/episodic_return {logged:.1f} eval/episodic_return_std ")
    assert {file: file.read_bytes() for file in copied.iterdir()} == before


def gl_works() -> bool:
    """Whether this machine can draw."""
    try:
        find_gl_backend()
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not gl_works(), reason="no EGL or OSMesa here")
def test_film(copied: Path):
    """An mp4 with a frame per step, a GIF of the first seconds; both move and show the legend's colours."""
    import happo_mamujoco as script

    resume(script, copied, eval_only=True, capture_video=True)
    video, gif = imageio.imread(copied / "video_512.mp4"), imageio.imread(copied / "video_512.gif")
    assert video.shape == (50, 480, 480, 3) and len(gif) == 25  # 50 steps in 1 s, 20 or more pictures a second
    assert (video[0] != video[25]).any()
    for agent, color in enumerate(agent_colors(2)):
        square = video[10, 12 + 24 * agent, 12]  # the middle of its square in the legend
        np.testing.assert_allclose(square, 255 * color, atol=25)  # lossy


@pytest.mark.parametrize(
    ("env_id", "agent_of_body"),
    [
        # From the XML: the hips' bodies aux_1 to aux_4 are driven by agents 1, 2, 3, 0 (actuators 2, 4, 6, 0); what
        # lies between them and the torso belongs to nobody.
        ("Ant-4x2", {"aux_1": 1, "aux_2": 2, "aux_3": 3, "aux_4": 0, "front_left_leg": None, "torso": None}),
        ("HalfCheetah-6x1", {"bthigh": 0, "bshin": 1, "bfoot": 2, "fthigh": 3, "fshin": 4, "ffoot": 5, "torso": None}),
    ],
)
def test_limbs_have_their_agents_colour(env_id: str, agent_of_body: dict[str, int | None]):
    """Each geom of a limb has the colour of the agent that drives the limb; torso and floor keep theirs."""
    vec = envs.make_vec(env_id, 1)
    model = vec.unwrapped.env.model
    before = model.geom_rgba.copy()
    paint(model, vec.partition)
    for name, agent in agent_of_body.items():
        for geom in np.flatnonzero(model.geom_bodyid == model.body(name).id):
            expected = before[geom, :3] if agent is None else agent_colors(vec.partition.num_agents)[agent]
            np.testing.assert_allclose(model.geom_rgba[geom, :3], expected, rtol=1e-6)
    assert (model.geom_rgba[model.geom_bodyid == 0] == before[model.geom_bodyid == 0]).all()


def test_no_display_says_what_to_install(copied: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Before anything is made or trained."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr("envs.video.BACKENDS", ("nonsense",))
    before = sorted(copied.iterdir())
    error = error_of(capsys, 2, ["--resume", copied, "--eval-only", "--capture-video"])
    assert "--capture-video: no off-screen OpenGL: install EGL (apt install libegl1) or OSMesa" in error
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    error = error_of(capsys, 2, ["--resume", copied, "--eval-only", "--capture-video"])
    assert "--capture-video: MUJOCO_GL=nonsense cannot draw here" in error
    assert sorted(copied.iterdir()) == before


def test_filming_leaves_the_physics_alone():
    """A film is drawn from a copy of the state."""
    if not gl_works():
        pytest.skip("no EGL or OSMesa here")
    vec, other = envs.make_vec("Ant-4x2", 2), envs.make_vec("Ant-4x2", 2)
    vec.reset(seed=0)
    other.reset(seed=0)
    film = Film(vec)
    for _ in range(20):
        film._draw()
        actions = np.full(vec.action_space.shape, 0.3, dtype=np.float32)
        for x, y in zip(vec.step(actions)[:4], other.step(actions)[:4], strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.skipif(not gl_works(), reason="no EGL or OSMesa here")
@pytest.mark.parametrize(
    "env_id", ["HalfCheetah-6x1", "Ant-4x2", "Hopper-3x1", "Walker2d-6x1", "Humanoid-17x1", "ManySegmentSwimmer-10x2"]
)
def test_the_camera_follows_the_robot(env_id: str):
    """After 20 metres the robot is still in the picture: as many pixels of the agents' bright colours as before."""
    vec = envs.make_vec(env_id, 1)
    vec.reset(seed=0)
    film, pixels = Film(vec), []
    for _ in range(2):
        picture = film._draw().astype(int)
        pixels.append((picture.max(axis=-1) - picture.min(axis=-1) > 80).sum())
        vec.unwrapped.qpos[0, 0] += 20
    film.renderer.close()
    assert pixels[0] > 100 and 0.5 < pixels[1] / pixels[0] < 2


# Records


def test_what_is_recorded_of_a_run(copied: Path):
    """run.jsonl has what it takes to repeat the run, a line per start."""
    import happo_mamujoco as script

    resume(script, copied, total_timesteps=5 * ITERATION)
    first, second = map(json.loads, (copied / "run.jsonl").read_text().splitlines())
    assert first["args"]["total_timesteps"] == 512 and second["args"]["total_timesteps"] == 640
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"]["mujoco"] == mujoco.__version__
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (first["commit"] or "").startswith(head.stdout.strip())
    assert first["command"] == sys.argv and first["machine"]["threads"] == 1


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


def test_deleted_run_directory_is_one_line(tmp_path: Path):
    """Somebody deletes the directory of a running run."""
    import hatrpo_mamujoco as script

    run_dir = tmp_path / "run"
    command = [sys.executable, script.__file__, *SMALL, "--total-timesteps", "1000000", "--run-dir", str(run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not list(run_dir.glob("model.pt")):
        time.sleep(0.05)
    run_dir.rename(tmp_path / "gone")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("error: [Errno 2] No such file or directory") and error.count("\n") == 1


def test_read_only_disk_is_one_line(copied: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """The file system turns read-only: what was saved stays."""
    import errno
    import runpy

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(copied))

    before = {file: file.read_bytes() for file in copied.glob("*.pt")}
    monkeypatch.setattr(torch, "save", read_only)
    monkeypatch.setattr(sys, "argv", ["happo", "--resume", str(copied), "--total-timesteps", str(5 * ITERATION)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "happo_mamujoco.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error == f"error: [Errno 30] Read-only file system: '{copied}'\n"
    assert {file: file.read_bytes() for file in copied.glob("*.pt")} == before


def test_diverged_simulation_is_counted_and_shown(script: ModuleType, tmp_path: Path, capsys, monkeypatch):
    """A simulation that blows up ends its episode; the run goes on, and says so in its line and its log."""
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
    assert "diverged simulations 1 SPS" in capsys.readouterr().out
    assert scalars(tmp_path / "run")["charts/num_diverged"] == [(ITERATION, 1.0), (2 * ITERATION, 1.0)]
