"""The speed benchmark: who takes turns with whom, what a turn counts, the ratios, the limit, the load, the records."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import throughput
from throughput import ROOT, Args, Turn

pytestmark = pytest.mark.slow  # whole runs and processes


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def cells(line: str) -> list[str]:
    """The cells of a printed row."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_flops_of_a_run():
    """All the matrix products of two iterations of HAPPO, by hand."""
    flags = "--total-timesteps 20 --num-envs 2 --num-steps 5 --hidden-sizes 8 4 --num-minibatches 2"
    flags += " --eval-episodes 0 --update-epochs 3 --critic-epochs 4"
    measured = throughput.count_flops("happo", flags.split())
    first = 17 * 8
    weights = 17 * 8 + 8 * 4 + 4 * 1
    forward = 2 * weights  # a multiplication and an addition per weight and row
    # Nobody needs the gradient in the observations.
    training = forward + 2 * weights + 2 * (weights - first)
    # Rollout, old log-probabilities, epochs, the ratio for M.
    actor = forward + forward + 3 * training + forward
    # Values of two states, epochs, the loss after the fit.
    critic = 2 * forward + 4 * training + forward
    assert measured == 6 * actor + critic


def test_subjects_take_turns():
    order = []
    subjects = {name: lambda name=name: order.append(name) or Turn(len(order), 1) for name in "ABC"}
    turns = throughput.take_turns(subjects, 2)
    assert "".join(order) == "ABCABC"
    assert {name: [turn.seconds for turn in turns[name]] for name in turns} == {
        "A": [1, 4],
        "B": [2, 5],
        "C": [3, 6],
    }


def test_ratios_are_of_neighbouring_turns():
    """The machine gets four times slower on the way; the ratio of the medians would be 2."""
    here = [Turn(1, 100), Turn(4, 100), Turn(4, 100)]
    there = [Turn(3, 100), Turn(8, 100), Turn(16, 100)]
    ratios = throughput.ratios(throughput.speeds(here), throughput.speeds(there))
    assert ratios == [3, 2, 4]
    assert throughput.spread(ratios, ".2f") == "3.00 [2.00 to 4.00]"


def test_turn_lasts_its_time(monkeypatch: pytest.MonkeyPatch):
    """The clock is at 0, 0.2, 0.4...: two calls until half a second is over, and what they took is what counts."""
    calls = []
    subject = throughput.repeat(lambda: calls.append("call"), steps=20)
    assert len(calls) == 1  # to warm up
    monkeypatch.setattr(throughput.time, "perf_counter", (0.2 * x for x in count()).__next__)
    turn = subject()
    assert (turn.seconds, turn.steps, len(calls)) == (pytest.approx(0.6), 40, 3)


@pytest.mark.parametrize(("env_id", "frame_skip"), [("HalfCheetah-6x1", 5), ("Walker2d-2x3", 4)])
def test_physics_of_an_environment_step(
    env_id: str, frame_skip: int, monkeypatch: pytest.MonkeyPatch
):
    """Bare physics makes as many of MuJoCo's steps as the environments; every 100 they stand upright again."""
    made = []
    same = []

    class Batch(throughput.Batch):
        def step(self, nstep: int) -> None:
            same.append((self.qpos == self.qpos[0]).all())
            super().step(nstep=nstep)
            made.append(nstep * len(self.qpos))

    monkeypatch.setattr(throughput, "Batch", Batch)
    monkeypatch.setattr(throughput, "TURN_SECONDS", 0.05)
    subject = throughput.step_physics(env_id, num_threads=1)
    made.clear()  # the warm-up's
    same.clear()
    assert subject().steps * frame_skip == sum(made)
    assert [i for i, x in enumerate(same) if x] == list(range(0, len(made), 100))


def test_script_of_another_checkout(tmp_path: Path, capsys: pytest.CaptureFixture):
    """It runs with its own modules in an empty directory; where it fails, its message and exit code are ours."""
    (tmp_path / "envs.py").write_text("STEPS = 60")
    script = tmp_path / "happo_mamujoco.py"
    script.write_text(
        "import envs, os, sys, time\n"
        "if '--bad' in sys.argv:\n"
        "    print('error: --bad', file=sys.stderr)\n"
        "    sys.exit(2)\n"
        "assert not os.listdir()\n"
        "time.sleep(0.3)\n"
        "print(f'from step 0 to {envs.STEPS}\\nstep 50 SPS 9\\nstep {envs.STEPS} charts/episodic_return 2.5 SPS 40.0')"
    )
    turn = throughput.run_script(tmp_path, "happo", [])
    assert (turn.steps, turn.training_seconds, turn.checkout) == (60, 1.5, tmp_path)
    assert 0.3 < turn.seconds < 20
    with pytest.raises(SystemExit, match="2"):
        throughput.run_script(tmp_path, "happo", ["--bad"])
    assert capsys.readouterr().err == "error: --bad\n"
    script.write_text("print('step by step')")
    with pytest.raises(SystemExit, match="1"):
        throughput.run_script(tmp_path, "happo", [])
    assert capsys.readouterr().err == f"error: {script} says no speed\n"


def test_records_of_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Here and there in turns, with the same flags; a row per turn; ratios of the whole processes' times."""
    there = tmp_path / "there"
    runs = []
    there.mkdir()
    for name in ("happo", "maddpg"):
        (there / f"{name}_mamujoco.py").touch()

    def run_script(checkout: Path, algorithm: str, flags: list[str]) -> Turn:
        runs.append((checkout, algorithm, flags))
        return Turn(10 * len(runs), 6000, 2 * len(runs), checkout)

    monkeypatch.setattr(throughput, "run_script", run_script)
    args = Args(("scripts",), ("happo", "maddpg"), there, repeats=2, csv=tmp_path / "speed.csv")
    args.num_threads = 3
    throughput.main(args)
    places = [(ROOT, "happo"), (there, "happo"), (ROOT, "maddpg"), (there, "maddpg")]
    assert runs == [(*place, args.flags()) for place in places * 2]
    assert " ".join(args.flags()).count("--num-threads 3") == 1
    commits = {"here": throughput.commit_of(ROOT), "there": ""}  # which is outside git
    turns = {
        "happo here": (1, 5),
        "happo there": (2, 6),
        "maddpg here": (3, 7),
        "maddpg there": (4, 8),
    }
    expected = []
    for subject, numbers in turns.items():
        commit = commits[subject.split()[1]]
        for i, n in enumerate(numbers):
            seconds = f"{10 * n}.0000", f"{2 * n}.0000"
            expected.append(["scripts", subject, str(i), *seconds, "6000", commit])
    rows = [list(row.values()) for row in read_csv(args.csv)]
    assert [[*row[:6], row[-1]] for row in rows] == expected
    assert len({tuple(row[6:8]) for row in rows}) == 1 and all(rows[0][6:8])  # machine and date
    shown = ["happo", "360 [120 to 600]", "1,800 [600 to 3,000]", "1.60 [1.20 to 2.00]"]
    assert shown in [cells(line) for line in capsys.readouterr().out.splitlines()]


def test_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """10 ms of products and 30 ms of physics per step are a limit of 25 steps/s, of which 5 steps/s are a fifth."""
    counted = []
    run = []
    seconds_of_a_product = 2 * 1024**3 / 1e9 * 0.01

    def count_flops(algorithm: str, flags: list[str]) -> float:
        counted.append((algorithm, flags))
        return 1e9  # per step

    def run_script(checkout: Path, algorithm: str, flags: list[str]) -> Turn:
        run.append((algorithm, flags))
        return Turn(9000, 4000, 800)

    monkeypatch.setattr(throughput, "count_flops", count_flops)
    monkeypatch.setattr(throughput, "run_script", run_script)
    monkeypatch.setattr(
        throughput, "repeat", lambda call, steps: lambda: Turn(seconds_of_a_product, steps)
    )
    monkeypatch.setattr(throughput, "step_physics", lambda *_: lambda: Turn(30, 1000))
    args = Args(("limit",), ("hatrpo",), repeats=1)
    throughput.main(args)
    *_, defaults, harl = (cells(line) for line in capsys.readouterr().out.splitlines())
    shown = ["1000.00", "25 [25 to 25]", "5 [5 to 5]", "20% [20% to 20%]"]
    assert defaults == ["hatrpo, defaults", *shown]
    assert harl == ["hatrpo, HARL's settings", *shown]
    settings = [args.flags(), [*args.flags(), *throughput.HARL["hatrpo"].split()]]
    assert run == counted == [("hatrpo", flags) for flags in settings]


@pytest.mark.parametrize("algorithm", throughput.HARL)
def test_settings_are_understood(algorithm: str):
    """HARL's settings are flags that the script has."""
    script = importlib.import_module(f"{algorithm}_mamujoco")
    flags = Args(num_threads=1).flags(throughput.HARL[algorithm])
    args = tyro.cli(script.Args, args=flags)
    assert (args.env_id, args.total_timesteps) == ("HalfCheetah-6x1", 60_000)
    assert (args.eval_episodes, args.num_threads, args.seed) == (0, 1, 1)
    assert args.hidden_sizes in {(128, 128, 128), (256, 256)}


def test_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Alone and beside busy cores in turns, with the same flags; ratios of the training loops' speeds."""
    runs = []
    loaded_seconds = {"happo": iter((20, 50)), "ippo": iter((10, 8))}
    busy = []

    class Process:
        """Stands for a busy process."""

        def __init__(self, command: list[str]) -> None:
            busy.append(self)

        def kill(self) -> None:
            busy.remove(self)

        def wait(self) -> None:
            assert self not in busy

    def run_script(checkout: Path, algorithm: str, flags: list[str]) -> Turn:
        assert (checkout, flags) == (ROOT, args.flags())
        runs.append((algorithm, len(busy)))
        seconds = next(loaded_seconds[algorithm]) if busy else 10
        return Turn(1000, 6000, seconds, checkout)

    monkeypatch.setattr(throughput.subprocess, "Popen", Process)
    monkeypatch.setattr(throughput, "run_script", run_script)
    monkeypatch.setattr(throughput, "commit_of", lambda _: "abc")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    args = Args(("load",), ("happo", "ippo"), repeats=2, csv=tmp_path / "speed.csv")
    throughput.main(args)
    assert runs == [("happo", 0), ("happo", 3), ("ippo", 0), ("ippo", 3)] * 2
    assert busy == []
    happo, ippo = (cells(line) for line in capsys.readouterr().out.splitlines()[-2:])
    alone = "600 [600 to 600]"
    assert happo == ["happo", alone, "210 [120 to 300]", "0.35 [0.20 to 0.50]"]
    assert ippo == ["ippo", alone, "675 [600 to 750]", "1.12 [1.00 to 1.25]"]
    rows = [(row["part"], row["subject"], row["training_seconds"]) for row in read_csv(args.csv)]
    assert rows == [
        ("load", "happo alone", "10.0000"),
        ("load", "happo alone", "10.0000"),
        ("load", "happo loaded", "20.0000"),
        ("load", "happo loaded", "50.0000"),
        ("load", "ippo alone", "10.0000"),
        ("load", "ippo alone", "10.0000"),
        ("load", "ippo loaded", "10.0000"),
        ("load", "ippo loaded", "8.0000"),
    ]


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def wait_for(condition: Callable[[], bool]) -> None:
    """Fail if it is not so within a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_busy_processes_are_busy_and_end(monkeypatch: pytest.MonkeyPatch):
    """Each computes, and is gone after the block, though it failed, and though not all could be started."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    started = []
    popen = subprocess.Popen

    def start(command: list[str]) -> subprocess.Popen:
        if len(started) == limit:
            raise OSError("no more processes")
        started.append(popen(command))
        return started[-1]

    monkeypatch.setattr(throughput.subprocess, "Popen", start)
    limit = 2
    with pytest.raises(ZeroDivisionError), throughput.busy_cores():
        assert len(started) == 2
        for process in started:
            wait_for(lambda pid=process.pid: cpu_seconds(pid) > 0.3)
            assert process.poll() is None
        raise ZeroDivisionError
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    limit = 3
    with pytest.raises(OSError, match="no more processes"), throughput.busy_cores():
        pytest.fail("only one process was started")
    assert started[2].returncode == -signal.SIGKILL


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_busy_processes_end_if_the_benchmark_is_killed():
    """SIGKILL leaves it no time to end them; they see that their parent has gone."""
    program = """
import throughput, subprocess, time
popen = subprocess.Popen
def start(command):
    process = popen(command)
    print(process.pid, flush=True)
    return process
subprocess.Popen = start
with throughput.busy_cores():
    time.sleep(600)
"""
    folder = ROOT / "benchmark"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE)
    pids = [int(parent.stdout.readline()) for _ in range(os.cpu_count())]
    assert all(cpu_seconds(pid) >= 0 for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for pid in pids:
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists())


def test_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """All of them can be stepped; the table has the ratios of what the rows have."""
    monkeypatch.setattr(throughput, "TURN_SECONDS", 0.02)
    throughput.main(Args(("envs",), repeats=1, num_threads=1, csv=tmp_path / "speed.csv"))
    lines = capsys.readouterr().out.splitlines()[-4:]
    rows = read_csv(tmp_path / "speed.csv")
    speed = {row["subject"]: float(row["steps"]) / float(row["seconds"]) for row in rows}
    names = "SyncVectorEnv", "mujoco.batch alone", "one mamujoco_v1"
    assert len(rows) == 4 * (1 + len(names))
    for env_id, line in zip(throughput.ENV_IDS, lines, strict=True):
        ours = speed[f"{env_id}: envs.make_vec"]
        shown = [float(cell.split()[0].replace(",", "")) for cell in cells(line)[1:]]
        expected = [ours, *(ours / speed[f"{env_id}: {name}"] for name in names)]
        assert shown[0] == pytest.approx(expected[0], rel=0.02, abs=0.5)
        assert shown[1:] == pytest.approx(expected[1:], rel=0.02, abs=0.006)


def test_against_itself(tmp_path: Path):
    """The command line, with this project as the other checkout: two processes that train."""
    flags = "--parts scripts --algorithms mappo --against . --total-timesteps 2500 --repeats 1"
    command = [sys.executable, "benchmark/throughput.py", *flags.split(), "--num-threads", "1"]
    command += ["--csv", str(tmp_path / "speed.csv")]
    out = subprocess.check_output(command, text=True, cwd=ROOT)
    here, there = read_csv(tmp_path / "speed.csv")
    assert (here["subject"], there["subject"]) == ("mappo here", "mappo there")
    assert here["steps"] == there["steps"] == "2000"  # of whole iterations
    assert 0 < float(here["training_seconds"]) < float(here["seconds"])
    ratio = f"{float(there['seconds']) / float(here['seconds']):.2f}"
    assert cells(out.splitlines()[-1])[-1] == f"{ratio} [{ratio} to {ratio}]"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--against", "docs"], "--against docs: there is no happo_mamujoco.py"),
        (["--algorithms", "ddpg"], "ddpg"),
        (["--repeats", "0"], "--repeats"),
        (["--env-id", "Cow-2x2"], "--env-id Cow-2x2: the robot must be one of"),
        (["--env-id", "Ant-3x3"], "3x3"),
        (["--num-threads", "-1"], "num_threads is -1"),
        (["--csv", "no/such/directory/speed.csv"], "no file can be written there"),
        (["--csv", "docs"], "no file can be written there"),
    ],
)
def test_bad_input(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        tyro.cli(Args, args=flags)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
