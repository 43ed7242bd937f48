"""The speed benchmark: who takes turns with whom, what a turn counts, the ratios, the limit, and its records."""

import csv
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import throughput
from throughput import ROOT, Args, Turn

pytestmark = pytest.mark.slow  # whole runs and processes


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_flops_of_a_run():
    """All the matrix products of two iterations of HAPPO, by hand: a pass is 2 FLOPs per weight and row."""
    flags = "--total-timesteps 20 --num-envs 2 --num-steps 5 --hidden-sizes 8 4 --num-minibatches 2 --eval-episodes 0"
    measured = throughput.count_flops("happo", [*flags.split(), "--update-epochs", "3", "--critic-epochs", "4"])
    first, weights, agents = 17 * 8, 17 * 8 + 8 * 4 + 4 * 1, 6
    forward, training = 2 * weights, 2 * (3 * weights - first)  # nobody needs the gradient in the observations
    actor = forward + forward + 3 * training + forward  # rollout, old log-probabilities, epochs, the ratio for M
    critic = 2 * forward + 4 * training + forward  # values of two states, epochs, the loss that is left
    assert measured == agents * actor + critic


def test_count_leaves_the_threads_alone():
    """The products are timed after a script has run in the same process, which has left PyTorch one thread."""
    torch.set_num_threads(2)
    flags = "--total-timesteps 20 --num-envs 2 --num-steps 5 --eval-episodes 0"
    throughput.count_flops("happo", flags.split())
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in all tests
    assert num_threads == 2


def test_subjects_take_turns():
    order = []
    subjects = {name: lambda name=name: order.append(name) or Turn(len(order), 1) for name in "ABC"}
    turns = throughput.take_turns(subjects, 2)
    assert "".join(order) == "ABCABC"
    assert {name: [turn.seconds for turn in turns[name]] for name in turns} == {"A": [1, 4], "B": [2, 5], "C": [3, 6]}


def test_ratios_are_of_neighbouring_turns():
    """A machine that gets four times slower in between: each pair's ratio stays, while the medians' would be 2."""
    here, there = [Turn(1, 100), Turn(4, 100), Turn(4, 100)], [Turn(3, 100), Turn(8, 100), Turn(16, 100)]
    ratios = throughput.ratios(throughput.speeds(here), throughput.speeds(there))
    assert ratios == [3, 2, 4]
    assert throughput.spread(ratios, ".2f") == "3.00 [2.00 to 4.00]"


def test_turn_lasts_its_time(monkeypatch: pytest.MonkeyPatch):
    """A look at the clock every 0.2 s: two calls fit into the half second, and what they took is divided by."""
    calls = []
    subject = throughput.repeat(lambda: calls.append(1), steps=20)
    monkeypatch.setattr(throughput.time, "perf_counter", (x / 5 for x in count()).__next__)
    turn = subject()
    assert (turn.seconds, turn.steps) == (pytest.approx(0.6), 40)
    assert len(calls) == 1 + 2  # the first warms up


@pytest.mark.parametrize(("env_id", "frame_skip"), [("HalfCheetah-6x1", 5), ("Walker2d-2x3", 4)])
def test_physics_of_an_environment_step(env_id: str, frame_skip: int, monkeypatch: pytest.MonkeyPatch):
    """Bare physics makes as many of MuJoCo's steps as an environment would, in episodes that start upright."""
    simulated = []

    class Batch(throughput.Batch):
        def step(self, nstep: int) -> None:
            if len(simulated) % 100 == 0:
                assert (self.qpos == self.qpos[0]).all()
            super().step(nstep=nstep)
            simulated.append(nstep * len(self.qpos))

    monkeypatch.setattr(throughput, "Batch", Batch)
    monkeypatch.setattr(throughput, "TURN_SECONDS", 0.05)
    subject = throughput.step_physics(env_id, num_threads=1)
    simulated.clear()  # the warm-up's
    assert subject().steps * frame_skip == sum(simulated) > 0


def test_script_of_the_other_checkout(tmp_path: Path, capsys: pytest.CaptureFixture):
    """It runs with its own modules, in a directory where nothing is; how it fails is told, with its exit code."""
    (tmp_path / "envs.py").write_text("STEPS = 60")
    script = tmp_path / "happo_mamujoco.py"
    script.write_text(
        "import envs, os, sys, time\n"
        "assert not os.listdir(), 'a file is here'\n"
        "time.sleep(0.3)\n"
        "print(f'run: from step 0 to {envs.STEPS}\\nstep 50 SPS 1\\nstep {envs.STEPS} episodic_return 2.5 SPS 40')\n"
        "sys.exit(' '.join(sys.argv[1:-2]) or 0)"
    )
    turn = throughput.run_script(tmp_path, "happo", [])
    assert (turn.steps, turn.training_seconds, turn.checkout) == (60, 1.5, tmp_path)
    assert 0.3 < turn.seconds < 5
    with pytest.raises(SystemExit, match="1"):
        throughput.run_script(tmp_path, "happo", ["error:", "so"])
    assert capsys.readouterr().err == "error: so\n"
    script.write_text("print('step by step')")
    with pytest.raises(SystemExit, match="1"):
        throughput.run_script(tmp_path, "happo", [])
    assert capsys.readouterr().err == f"error: {script} says no speed\n"


def test_records_of_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Here and there in turns, with the same flags; a row per turn; the table from the whole processes' times."""
    runs = []

    def run_script(checkout: Path, algorithm: str, flags: list[str]) -> Turn:
        runs.append((checkout, algorithm, tuple(flags)))
        return Turn(10 * len(runs), 6000, 5 * len(runs), checkout)

    monkeypatch.setattr(throughput, "run_script", run_script)
    args = Args(("scripts",), ("happo", "maddpg"), against=ROOT / ".", repeats=2, csv=tmp_path / "speed.csv")
    throughput.main(args)
    assert [algorithm for _, algorithm, _ in runs] == ["happo", "happo", "maddpg", "maddpg"] * 2
    assert {flags for *_, flags in runs} == {tuple(args.flags())}
    rows = read_csv(args.csv)
    subjects = ["happo here"] * 2 + ["happo there"] * 2 + ["maddpg here"] * 2 + ["maddpg there"] * 2
    assert [row["subject"] for row in rows] == subjects
    assert [float(row["seconds"]) for row in rows] == [10, 50, 20, 60, 30, 70, 40, 80]
    assert [float(row["training_seconds"]) for row in rows] == [5, 25, 10, 30, 15, 35, 20, 40]
    assert {(row["part"], row["steps"], row["commit"]) for row in rows} == {
        ("scripts", "6000", throughput.commit_of(ROOT))
    }
    assert [row["repeat"] for row in rows] == ["0", "1"] * 4
    assert all(row["machine"] and row["date"] for row in rows)
    happo = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("happo"))
    assert " ".join(happo.split()) == "happo 360 [120 to 600] 720 [240 to 1,200] 1.60 [1.20 to 2.00]"


def test_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """10 ms of products and 30 ms of physics per step are a limit of 25 steps/s, of which 5 steps/s are a fifth."""
    flops_per_step, asked = 1e9, []

    def count_flops(algorithm: str, flags: list[str]) -> float:
        asked.append(" ".join([algorithm, *flags]))
        return flops_per_step

    # A product of 1024^2 with 1024^2 in so long that a GFLOP takes 10 ms.
    seconds = 2 * 1024**3 / flops_per_step * 0.01
    monkeypatch.setattr(throughput, "repeat", lambda call, steps: lambda: Turn(seconds, steps))
    monkeypatch.setattr(throughput, "step_physics", lambda *_: lambda: Turn(30, 1000))
    monkeypatch.setattr(throughput, "count_flops", count_flops)
    monkeypatch.setattr(throughput, "run_script", lambda *_: Turn(9000, 4000, 800))
    throughput.main(Args(("limit",), ("hatrpo",), repeats=2))
    *_, defaults, harl = capsys.readouterr().out.splitlines()
    shown = ["1000.00", "25", "[25", "to", "25]", "5", "[5", "to", "5]", "20%", "[20%", "to", "20%]"]
    assert defaults.split() == ["hatrpo,", "defaults", *shown]
    assert harl.split() == ["hatrpo,", "HARL's", "settings", *shown]
    assert "--cg-iters" not in asked[0] and "--cg-iters 10" in asked[1]


def test_bad_input_is_refused(tmp_path: Path):
    """With what is wrong; nothing is measured and nothing written."""
    for args, message in (
        ({"against": tmp_path}, "there is no happo_mamujoco.py"),
        ({"repeats": 0}, "--repeats and the number of --algorithms must be at least 1"),
        ({"env_id": "MyRobot-6x1"}, "the robot must be one of"),
        ({"env_id": "HalfCheetah-4x2"}, "its 6 actuators split as 1x6, 2x3, 3x2, 6x1"),
        ({"csv": tmp_path}, "no file can be written there"),
    ):
        with pytest.raises(ValueError, match=message):
            Args(**args)


def test_against_itself(tmp_path: Path):
    """Two real runs of this checkout, from the command line: a table, and a row for each."""
    command = [sys.executable, ROOT / "benchmark/throughput.py", "--parts", "scripts", "--algorithms", "mappo"]
    flags = ["--against", ROOT, "--repeats", "1", "--total-timesteps", "4000", "--csv", tmp_path / "speed.csv"]
    done = subprocess.run([*map(str, command + flags)], capture_output=True, text=True, check=True)
    assert f"times as fast as {ROOT}" in done.stdout
    here, there = read_csv(tmp_path / "speed.csv")
    rows = [(row["subject"], row["steps"]) for row in (here, there)]
    assert rows == [("mappo here", "4000"), ("mappo there", "4000")]
    ratio = float(there["seconds"]) / float(here["seconds"])
    assert f"{ratio:.2f} [" in done.stdout and float(here["training_seconds"]) < float(here["seconds"])
