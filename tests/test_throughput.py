"""The speed benchmark: who takes turns with whom, what a turn counts, the ratios, the limit, and its records."""

import csv
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
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
    """All the matrix products of two iterations of HAPPO, by hand; and PyTorch has as many threads as before."""
    flags = "--total-timesteps 20 --num-envs 2 --num-steps 5 --hidden-sizes 8 4 --num-minibatches 2 --eval-episodes 0"
    torch.set_num_threads(2)
    measured = throughput.count_flops("happo", [*flags.split(), "--update-epochs", "3", "--critic-epochs", "4"])
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in all tests
    first, weights, agents = 17 * 8, 17 * 8 + 8 * 4 + 4 * 1, 6
    forward = 2 * weights  # a multiplication and an addition per weight and row
    training = forward + 2 * weights + 2 * (weights - first)  # nobody needs the gradient in the observations
    actor = forward + forward + 3 * training + forward  # rollout, old log-probabilities, epochs, the ratio for M
    critic = 2 * forward + 4 * training + forward  # values of two states, epochs, the loss that is left
    assert measured == agents * actor + critic
    assert num_threads == 2


def test_subjects_take_turns():
    order = []
    subjects = {name: lambda name=name: order.append(name) or Turn(len(order), 1) for name in "ABC"}
    turns = throughput.take_turns(subjects, 2)
    assert "".join(order) == "ABCABC"
    assert {name: [turn.seconds for turn in turns[name]] for name in turns} == {"A": [1, 4], "B": [2, 5], "C": [3, 6]}


def test_ratios_are_of_neighbouring_turns():
    """The machine gets four times slower on the way; the ratio of the medians would be 2."""
    here, there = [Turn(1, 100), Turn(4, 100), Turn(4, 100)], [Turn(3, 100), Turn(8, 100), Turn(16, 100)]
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
def test_physics_of_an_environment_step(env_id: str, frame_skip: int, monkeypatch: pytest.MonkeyPatch):
    """Bare physics makes as many of MuJoCo's steps as the environments; every 100 they stand upright again."""
    made, same = [], []

    class Batch(throughput.Batch):
        def step(self, nstep: int) -> None:
            same.append((self.qpos == self.qpos[0]).all())
            super().step(nstep=nstep)
            made.append(nstep * len(self.qpos))

    monkeypatch.setattr(throughput, "Batch", Batch)
    monkeypatch.setattr(throughput, "TURN_SECONDS", 0.05)
    subject = throughput.step_physics(env_id, num_threads=1)
    made.clear(), same.clear()  # the warm-up's
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


def test_records_of_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Here and there in turns, with the same flags; a row per turn; ratios of the whole processes' times."""
    there, runs = tmp_path / "there", []
    there.mkdir()
    for name in ("happo", "maddpg"):
        (there / f"{name}_mamujoco.py").touch()

    def run_script(checkout: Path, algorithm: str, flags: list[str]) -> Turn:
        runs.append((checkout, algorithm, flags))
        return Turn(10 * len(runs), 6000, 2 * len(runs), checkout)

    monkeypatch.setattr(throughput, "run_script", run_script)
    args = Args(("scripts",), ("happo", "maddpg"), against=there, repeats=2, csv=tmp_path / "speed.csv")
    throughput.main(args)
    places = [(checkout, algorithm) for algorithm in ("happo", "maddpg") for checkout in (ROOT, there)]
    assert runs == [(*place, args.flags()) for place in places * 2]
    commits = {"here": throughput.commit_of(ROOT), "there": ""}  # which is outside git
    turns = {"happo here": (1, 5), "happo there": (2, 6), "maddpg here": (3, 7), "maddpg there": (4, 8)}
    expected = [
        ["scripts", subject, str(i), f"{10 * n}.0000", f"{2 * n}.0000", "6000", commits[subject.split()[1]]]
        for subject, numbers in turns.items()
        for i, n in enumerate(numbers)
    ]
    rows = [list(row.values()) for row in read_csv(args.csv)]
    assert [[*row[:6], row[-1]] for row in rows] == expected
    assert len({tuple(row[6:8]) for row in rows}) == 1 and all(rows[0][6:8])  # machine and date
    shown = ["happo", "360 [120 to 600]", "1,800 [600 to 3,000]", "1.60 [1.20 to 2.00]"]
    assert shown in [cells(line) for line in capsys.readouterr().out.splitlines()]


def test_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """10 ms of products and 30 ms of physics per step are a limit of 25 steps/s, of which 5 steps/s are a fifth."""
    flags = []
    monkeypatch.setattr(throughput, "count_flops", lambda *args: flags.append(args[1]) or 1e9)  # per step
    seconds_of_a_product = 2 * 1024**3 / 1e9 * 0.01
    monkeypatch.setattr(throughput, "repeat", lambda call, steps: lambda: Turn(seconds_of_a_product, steps))
    monkeypatch.setattr(throughput, "step_physics", lambda *_: lambda: Turn(30, 1000))
    monkeypatch.setattr(throughput, "run_script", lambda *args: flags.append(args[2]) or Turn(9000, 4000, 800))
    args = Args(("limit",), ("hatrpo",), repeats=1)
    throughput.main(args)
    *_, defaults, harl = (cells(line) for line in capsys.readouterr().out.splitlines())
    shown = ["1000.00", "25 [25 to 25]", "5 [5 to 5]", "20% [20% to 20%]"]
    assert defaults == ["hatrpo, defaults", *shown]
    assert harl == ["hatrpo, HARL's settings", *shown]
    both = [args.flags(), [*args.flags(), *throughput.HARL["hatrpo"].split()]]
    assert flags == both * 2  # what is counted is what is run


def test_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
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
        assert shown == pytest.approx([ours, *(ours / speed[f"{env_id}: {name}"] for name in names)], rel=0.02, abs=0.5)


def test_against_itself(tmp_path: Path):
    """The command line, with this project as the other checkout: two processes that train."""
    flags = ["--parts", "scripts", "--algorithms", "mappo", "--against", ".", "--total-timesteps", "4500"]
    flags += ["--repeats", "1", "--num-threads", "1", "--csv", str(tmp_path / "speed.csv")]
    out = subprocess.check_output([sys.executable, "benchmark/throughput.py", *flags], text=True, cwd=ROOT)
    here, there = read_csv(tmp_path / "speed.csv")
    assert (here["subject"], there["subject"]) == ("mappo here", "mappo there")
    assert here["steps"] == there["steps"] == "4000"  # of whole iterations
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
def test_bad_input(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        tyro.cli(Args, args=flags)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
