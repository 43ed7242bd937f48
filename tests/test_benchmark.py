"""The benchmark's tools: records of runs, statistics, comparisons, and the runner on tiny jobs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_scripts import ROOT
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import plot
import run as runner

# Statistics


def test_interquartile_mean():
    """The mean of the middle half: outer quarters, rounded down, do not count; of three scores all do."""
    assert plot.interquartile_mean(np.array([-1e9, 2.0, 4.0, 1e9])) == 3.0
    assert plot.interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3.0
    scores = np.random.default_rng(0).normal(size=(5, 11))
    expected = [np.sort(row)[2:9].mean() for row in scores]
    np.testing.assert_allclose(plot.interquartile_mean(scores), expected)


def test_confidence_interval():
    """Of two runs the resamples are known: a quarter low, a quarter high; of many normal ones it is the theory's."""
    assert plot.confidence_interval(np.array([0.0, 10.0])) == (0.0, 10.0)
    assert plot.confidence_interval(np.array([5.0, 5.0, 5.0])) == (5.0, 5.0)
    rng, covered = np.random.default_rng(1), 0
    for i in range(100):
        low, high = plot.confidence_interval(rng.normal(3, 2, 20), seed=i)
        covered += low < 3 < high
    assert 84 <= covered <= 99  # nominally 95; the percentile bootstrap of 20 is a little narrow


def test_difference():
    """Welch's interval and the exact permutation test, against their formulas."""
    a, b = np.array([1.0, 2.0, 3.0]), np.array([11.0, 12.5, 13.0])
    change, low, high, p = plot.difference(a, b)
    assert change == pytest.approx(b.mean() - a.mean())
    error = np.sqrt(a.var(ddof=1) / 3 + b.var(ddof=1) / 3)
    va, vb = a.var(ddof=1) / 3, b.var(ddof=1) / 3
    t = stats.t.ppf(0.975, (va + vb) ** 2 / (va**2 / 2 + vb**2 / 2))
    np.testing.assert_allclose([low, high], [change - t * error, change + t * error])
    assert p == pytest.approx(2 / 20)  # the two most extreme of 20 splits


# Records


def write_log(run_dir: Path, start: int, end: int, offset: float = 0.0, purge_step: int | None = None) -> None:
    """A run's log from `start` to `end` in iterations of 2,000 steps: 1,000 steps a second, return = step / 1,000."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "run.jsonl", "a") as f:
        f.write(json.dumps({"command": ["x"], "commit": "abc", "args": {"seed": 1}}) + "\n")
    writer = SummaryWriter(str(run_dir), purge_step=purge_step)
    for step in range(start, end + 1, 2000):
        writer.add_scalar("charts/SPS", 1000.0, step)
        writer.add_scalar("charts/episodic_return", step / 1000 + offset, step)
        if step % 20_000 == 0:
            writer.add_scalar("eval/episodic_return", 2 * step / 1000 + offset, step)
    writer.close()


def test_record_of_a_resumed_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Killed at 30,000 after a checkpoint at 24,000: what came after the checkpoint does not count twice."""
    run_dir = tmp_path / "runs" / "Ant-4x2__happo__1"
    write_log(run_dir, 2000, 30_000, offset=500)  # as if the repetition had other values
    time.sleep(1.1)  # event files are read in the order of their names, which have the second
    write_log(run_dir, 26_000, 50_000, purge_step=24_001)
    plot.record(tmp_path / "runs", tmp_path / "results")
    (results,) = plot.load(tmp_path / "results").values()
    run = results[0]
    assert (run.env_id, run.algorithm, run.seed) == ("Ant-4x2", "happo", 1)
    np.testing.assert_array_equal(run.columns["step"], [10_000, 20_000, 30_000, 40_000, 50_000])
    np.testing.assert_array_equal(run.columns["seconds"], [10, 20, 30, 40, 50])
    # Means of the five iterations of a bin; 22,000 and 24,000 are from before the kill.
    expected = [506, 516, (522 + 524 + 26 + 28 + 30) / 5, 36, 46]
    np.testing.assert_allclose(run.columns["train_return"], expected)
    np.testing.assert_allclose(run.columns["eval_return"], [np.nan, 540, np.nan, 80, np.nan])
    assert run.final_return == 80 and run.seconds == 50
    described = json.loads((tmp_path / "results" / "runs.jsonl").read_text())
    assert described["run"] == "Ant-4x2__happo__1" and described["starts"] == 2 and described["commit"] == "abc"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Records of three seeds of two algorithms; returns end at 80 and 180, plus the seed."""
    for algorithm, offset in (("happo", 0), ("mappo", 100)):
        for seed in (1, 2, 3):
            write_log(tmp_path / "runs" / f"Ant-4x2__{algorithm}__{seed}", 2000, 40_000, offset + seed)
    plot.record(tmp_path / "runs", tmp_path / "results")
    return tmp_path / "results"


def test_table_and_figure(recorded: Path, capsys: pytest.CaptureFixture):
    """The table has the numbers of the records, the figure is drawn from them."""
    capsys.readouterr()
    plot.table(recorded)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| Ant-4x2 | HAPPO | 3 | 82 | 82 (81 to 83) | 81, 83 | 40,000 | 1000 | 0.01 |"
    assert lines[3] == "| Ant-4x2 | MAPPO | 3 | 182 | 182 (181 to 183) | 181, 183 | 40,000 | 1000 | 0.01 |"
    plot.figure(recorded)
    assert (recorded / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_compare(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Equal sets are within the noise; a happo that is 100 better is different; a single run says nothing."""
    assert not plot.compare(recorded, recorded)
    assert "Ant-4x2 happo: within the noise: +0 (" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    for seed in (1, 2, 3):
        text = (recorded / f"Ant-4x2__mappo__{seed}.csv").read_text()
        (other / f"Ant-4x2__happo__{seed}.csv").write_text(text)
    assert plot.compare(recorded, other)
    assert (
        "Ant-4x2 happo: DIFFERENT: +100 (+98 to +102), permutation p 0.10, 3 against 3 runs" in capsys.readouterr().out
    )
    for seed in (2, 3):
        (other / f"Ant-4x2__happo__{seed}.csv").unlink()
    assert not plot.compare(recorded, other)
    assert "one run each says nothing" in capsys.readouterr().out


# The runner

TINY = "--num-envs 4 --num-steps 32 --hidden-sizes 8 --eval-episodes 0 --checkpoint-interval 2"


def run_jobs(folder: Path, *flags: str, **options: object) -> subprocess.CompletedProcess:
    """The runner as a user runs it."""
    command = [
        sys.executable,
        str(ROOT / "benchmark" / "run.py"),
        str(folder / "job.toml"),
        "--runs",
        str(folder),
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def write_job(folder: Path, total: int, seeds: str = "[1]", more: str = "") -> None:
    """A job file for HAPPO on Reacher."""
    lines = [f'algorithms = ["happo"]\nenv_ids = ["Reacher-2x1"]\nseeds = {seeds}']
    lines += [f'flags = "{TINY} --total-timesteps {total}"', more]
    (folder / "job.toml").write_text("\n".join(lines))


def test_runner_finishes_skips_resumes_and_reports(tmp_path: Path):
    """Two jobs; again: both skipped; further: both resumed; a flag that the script refuses: its line, exit code 1."""
    write_job(tmp_path, 512, "[1, 2]")
    done = run_jobs(tmp_path, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 jobs, 0 finished before\n1/2 Reacher-2x1__happo__")
    runs = [tmp_path / "job" / f"Reacher-2x1__happo__{seed}" for seed in (1, 2)]
    starts = [json.loads((run / "run.jsonl").read_text()) for run in runs]
    assert [start["args"]["seed"] for start in starts] == [1, 2]
    assert all((run / "checkpoint_000000000512.pt").exists() for run in runs)

    done = run_jobs(tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("2 jobs, 2 finished before\n0 jobs in")

    write_job(tmp_path, 768, "[1, 2]")
    assert run_jobs(tmp_path).returncode == 0
    assert all(len((run / "run.jsonl").read_text().splitlines()) == 2 for run in runs)
    assert all((run / "checkpoint_000000000768.pt").exists() for run in runs)

    write_job(tmp_path, 768, "[3]", '[[extra]]\nflags = "--gamma 2"')
    done = run_jobs(tmp_path)
    assert done.returncode == 1
    assert "Reacher-2x1__happo__3: FAILED with 2: error: --gamma is 2.0: it must be from 0 to 1" in done.stdout


def test_runner_stops_and_goes_on(tmp_path: Path):
    """SIGTERM to the runner: the job saves and stops; a directory without a checkpoint is put aside, not lost."""
    write_job(tmp_path, 128 * 400)
    broken = tmp_path / "job" / "Reacher-2x1__happo__1"
    broken.mkdir(parents=True)
    (broken / "something").write_text("kept")
    command = [sys.executable, str(ROOT / "benchmark" / "run.py"), str(tmp_path / "job.toml"), "--runs", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not list(broken.glob("checkpoint_*.pt")):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopping: the jobs save what they have" in out
    assert [path.read_text() for path in tmp_path.glob("job/*/something")] == ["kept"]
    assert not (broken / "finished").exists()
    deadline = time.time() + 30  # the job itself may take a moment longer
    while "stopped at step" not in broken.with_suffix(".log").read_text():
        time.sleep(0.1)
        assert time.time() < deadline
    assert run_jobs(tmp_path).returncode == 0
    assert (broken / "checkpoint_000000051200.pt").exists()
    assert len((broken / "run.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('algorithms = ["sac"]\nenv_ids = ["Ant-4x2"]\nseeds = [1]', "there is no sac_mamujoco.py"),
        (
            'algorithm = ["happo"]\nenv_ids = ["Ant-4x2"]\nseeds = [1]',
            "unknown algorithm; known are algorithms, env_ids",
        ),
        ("algorithms = [", "Invalid value"),
    ],
)
def test_bad_job_files_are_one_line(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture):
    """Exit code 2, and what is wrong."""
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        runner.main(runner.Args(tmp_path / "job.toml", runs=tmp_path))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["halfcheetah", "walker_ant", "figure3", "figure4"])
def test_job_files_are_understood(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Every job of the published figures has flags that its script understands, and another directory."""
    import importlib

    jobs = runner.read_jobs(ROOT / "benchmark" / f"{name}.toml", tmp_path)
    assert len({run_dir for run_dir, _ in jobs}) == len(jobs) > 0
    for _, (script, *flags) in jobs:
        module = importlib.import_module(Path(script).stem)
        args = module.tyro.cli(module.Args, args=flags)
        assert args.total_timesteps >= 1_000_000 and args.num_threads == 1
