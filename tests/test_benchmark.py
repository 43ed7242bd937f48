"""The benchmark's tools: records of runs, statistics, comparisons, and the runner on tiny jobs."""

import contextlib
import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import plot
import run as runner

import happo_mamujoco as happo

pytestmark = pytest.mark.slow  # whole runs and processes

ROOT = runner.ROOT

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
    rng = np.random.default_rng(1)
    covered = 0
    for i in range(100):
        low, high = plot.confidence_interval(rng.normal(3, 2, 20), seed=i)
        covered += low < 3 < high
    assert 84 <= covered <= 99  # nominally 95; the percentile bootstrap of 20 is a little narrow


def test_intervals_over_tasks():
    """Of three runs on two tasks all resamples can be listed: their quantiles; pooled, the interval would be wider."""
    tasks = np.array([0.0, 0.1, 0.3]), np.array([0.7, 0.75, 1.0])
    resamples = product(product(tasks[0], repeat=3), product(tasks[1], repeat=3))
    means = [np.sort([*a, *b])[1:5].mean() for a, b in resamples]
    expected = np.percentile(means, [2.5, 97.5])
    np.testing.assert_allclose(plot.confidence_interval(*tasks), expected, atol=0.006)


def test_improvement():
    """The Mann-Whitney U of each task; the interval from the list of all resamples, which the pairs do not share."""
    tasks = [
        (np.array([1.0, 4.0]), np.array([2.0, 3.0, 4.0])),
        (np.array([5.0, 6.0]), np.array([1.0, 5.5])),
    ]
    p, low, high = plot.improvement(tasks)
    expected = [stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)) for x, y in tasks]
    assert p == pytest.approx(np.mean(expected))
    probabilities = []
    for x, y in tasks:
        resamples = product(product(x, repeat=len(x)), product(y, repeat=len(y)))
        above = [[(a > b) + (a == b) / 2 for a, b in product(xs, ys)] for xs, ys in resamples]
        probabilities.append(np.mean(above, axis=1))
    listed = [(a + b) / 2 for a, b in product(*probabilities)]
    np.testing.assert_allclose([low, high], np.percentile(listed, [2.5, 97.5]), atol=0.01)
    assert plot.improvement([(np.array([2.0, 2.0]), np.array([2.0]))]) == (0.5, 0.5, 0.5)


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


def write_log(
    run_dir: Path, start: int, end: int, offset: float = 0.0, speed: float = 1000.0
) -> None:
    """A run's log after `start` to `end` in iterations of 2,000 steps: return = step / 1,000."""
    with open(f"{run_dir}.jsonl", "a") as f:
        f.write(json.dumps({"command": ["x"], "commit": "abc", "args": {"seed": 1}}) + "\n")
    writer = SummaryWriter(str(run_dir), purge_step=start + 1)  # as in the scripts
    for step in range(start + 2000, end + 1, 2000):
        writer.add_scalar("charts/SPS", speed, step)  # since this start, as the scripts count it
        writer.add_scalar("charts/episodic_return", step / 1000 + offset, step)
        if step % 20_000 == 0:
            writer.add_scalar("eval/episodic_return", 2 * step / 1000 + offset, step)
    writer.close()


def test_record_of_a_resumed_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Killed at 30,000 after a checkpoint at 24,000, again at once, and at 40,000: no step or second counts twice."""
    run_dir = tmp_path / "runs" / "Ant-4x2__happo__1"
    run_dir.mkdir(parents=True)
    write_log(run_dir, 0, 30_000, offset=500)  # as if the repetition had other values
    time.sleep(1.1)  # event files are read in the order of their names, which have the second
    write_log(run_dir, 24_000, 24_000)
    time.sleep(1.1)
    write_log(run_dir, 24_000, 40_000, speed=500.0)
    time.sleep(1.1)
    write_log(run_dir, 40_000, 50_000, speed=250.0)
    plot.record(tmp_path / "runs", tmp_path / "results")
    (results,) = plot.load(tmp_path / "results").values()
    run = results[0]
    assert (run.env_id, run.algorithm, run.seed) == ("Ant-4x2", "happo", 1)
    np.testing.assert_array_equal(run.columns["step"], [10_000, 20_000, 30_000, 40_000, 50_000])
    np.testing.assert_allclose(run.columns["seconds"], [10, 20, 24 + 12, 24 + 32, 56 + 40])
    # Means of the five iterations of a bin; 22,000 and 24,000 are from before the kill.
    expected = [506, 516, (522 + 524 + 26 + 28 + 30) / 5, 36, 46]
    np.testing.assert_allclose(run.columns["train_return"], expected)
    np.testing.assert_allclose(run.columns["eval_return"], [np.nan, 540, np.nan, 80, np.nan])
    assert run.final_return == 80
    described = json.loads((tmp_path / "results" / "runs.jsonl").read_text())
    assert described["run"] == "Ant-4x2__happo__1"
    assert described["starts"] == 4 and described["commit"] == "abc"
    np.testing.assert_allclose(run.columns["steps_per_second"], [1000, 1000, 10_000 / 16, 500, 250])


def test_starts_of_a_run_of_the_script(tmp_path: Path):
    """What a script writes when it is started and when it is resumed."""
    args = {"env_id": "Reacher-2x1", "num_envs": 4, "num_steps": 32, "hidden_sizes": (8,)}
    args |= {"eval_episodes": 0, "num_threads": 1, "run_dir": str(tmp_path / "run")}
    happo.main(happo.Args(**args, total_timesteps=256))
    np.testing.assert_array_equal(plot.read_starts(tmp_path / "run"), [0])
    time.sleep(1.1)  # event files are read in the order of their names, which have the second
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    args["resume"] = args["run_dir"]
    happo.main(happo.Args(**args, total_timesteps=512), checkpoint)
    np.testing.assert_array_equal(plot.read_starts(tmp_path / "run"), [0, 256])


def test_long_runs_have_100_rows(tmp_path: Path):
    """Five million steps, logged every 20,000: rows of 50,000 steps; return = step / 1,000."""
    writer = SummaryWriter(str(tmp_path))
    for step in range(20_000, 5_000_001, 20_000):
        writer.add_scalar("charts/SPS", 500.0, step)
        writer.add_scalar("charts/episodic_return", step / 1000, step)
    writer.close()
    columns = plot.read_log(tmp_path)
    np.testing.assert_array_equal(columns["step"], 50_000 * np.arange(1, 101))
    np.testing.assert_allclose(columns["train_return"][:2], [(20 + 40) / 2, (60 + 80 + 100) / 3])
    assert np.isnan(columns["eval_return"]).all() and columns["seconds"][-1] == 10_000


def test_what_is_no_run_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Another name, no log, no directory at all; no runs at all leave earlier records alone."""
    runs, results = tmp_path / "runs", tmp_path / "results"
    runs.mkdir()
    write_log(runs / "Ant-4x2__happo__1", 0, 10_000)
    write_log(runs / "Ant-4x2__happo__1.1234", 0, 10_000)
    (runs / "Ant-4x2__happo__2").mkdir()
    (runs / "Ant-4x2__happo__2.jsonl").write_text("{}")
    (runs / "Ant-4x2__happo__3.jsonl").write_text("{}")
    plot.record(runs, results)
    err = capsys.readouterr().err.splitlines()
    assert [line.split(runs.name + "/")[1] for line in err] == [
        "Ant-4x2__happo__1.1234 is not named <env id>__<algorithm>__<seed>",
        "Ant-4x2__happo__2 has no log",
        "Ant-4x2__happo__3 has no log",
    ]
    assert [path.name for path in results.glob("*.csv")] == ["Ant-4x2__happo__1.csv"]
    plot.table(results)
    line = "| Ant-4x2 | HAPPO | 0 | not evaluated yet | | 1920 | 5800 to 5900 |"
    assert capsys.readouterr().out.splitlines()[2] == line
    before = (results / "runs.jsonl").read_text()
    with pytest.raises(SystemExit, match="2"):
        plot.record(tmp_path / "mistyped", results)
    assert capsys.readouterr().err == f"error: {tmp_path}/mistyped has no runs with a log\n"
    assert (results / "runs.jsonl").read_text() == before


def test_earlier_records_stay(tmp_path: Path):
    """Runs of another day are recorded beside the earlier ones; the same run again takes its own place."""
    for seed, commit in ((2, "1st"), (1, "2nd"), (2, "3rd")):
        name = f"Ant-4x2__happo__{seed}"
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # of another machine
        (tmp_path / "runs").mkdir()
        write_log(tmp_path / "runs" / name, 0, 10_000)
        (tmp_path / "runs" / f"{name}.jsonl").write_text(json.dumps({"commit": commit}))
        plot.record(tmp_path / "runs", tmp_path / "results")
    described = map(json.loads, (tmp_path / "results" / "runs.jsonl").read_text().splitlines())
    assert [(line["run"], line["commit"]) for line in described] == [
        ("Ant-4x2__happo__1", "2nd"),
        ("Ant-4x2__happo__2", "3rd"),
    ]
    assert len(plot.load(tmp_path / "results")["Ant-4x2", "happo"]) == 2


def test_a_kill_in_mid_write(tmp_path: Path):
    """A log whose last event is torn is read up to there, and goes on where the run was resumed."""
    write_log(tmp_path / "run", 0, 20_000)
    (events,) = tmp_path.glob("run/events*")
    os.truncate(events, events.stat().st_size - 20)  # in the evaluation at 20,000
    assert np.isnan(plot.read_log(tmp_path / "run")["eval_return"]).all()
    time.sleep(1.1)
    write_log(tmp_path / "run", 10_000, 20_000)
    columns = plot.read_log(tmp_path / "run")
    np.testing.assert_allclose(columns["train_return"], [6, 16])
    np.testing.assert_allclose(columns["eval_return"], [np.nan, 40])


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Records of three seeds of two algorithms; returns end at 80 and 180, plus the seed."""
    (tmp_path / "runs").mkdir()
    for algorithm, offset in (("happo", 0), ("mappo", 100)):
        for seed in (1, 2, 3):
            write_log(tmp_path / "runs" / f"Ant-4x2__{algorithm}__{seed}", 0, 40_000, offset + seed)
    plot.record(tmp_path / "runs", tmp_path / "results")
    return tmp_path / "results"


def write_record(
    results: Path, run: str, evaluations: dict[int, float], steps: int, speed: float = 100.0
) -> None:
    """A record of rows of 10,000 steps; training returns are the step."""
    results.mkdir(exist_ok=True)
    rows = [",".join(plot.COLUMNS)]
    for s in range(10_000, steps + 1, 10_000):
        rows.append(f"{s},{s / speed},{s},{evaluations.get(s, np.nan)},{speed}")
    (results / f"{run}.csv").write_text("\n".join(rows))


def test_table(recorded: Path, capsys: pytest.CaptureFixture):
    """The table has the numbers of the records."""
    capsys.readouterr()
    plot.table(recorded)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| Ant-4x2 | HAPPO | 3 | 82 (81 to 83) | 40,000 | 1920 | 5800 to 5900 |",
        "| Ant-4x2 | MAPPO | 3 | 182 (181 to 183) | 40,000 | 775 | 5800 |",
    ]
    plot.table(recorded, steps=30_000)  # the evaluation at 20,000 steps is the last one before
    assert [row.split(" | ")[3:5] for row in capsys.readouterr().out.splitlines()[2:]] == [
        ["42 (41 to 43)", "30,000"],
        ["142 (141 to 143)", "30,000"],
    ]
    with pytest.raises(SystemExit, match="2"):
        plot.table(recorded, steps=5_000)
    assert "Ant-4x2__happo__1.csv begins after step 5,000\n" in capsys.readouterr().err
    path = recorded / "Ant-4x2__mappo__1.csv"
    path.rename(recorded / "Ant-4x2__mappo-shared__1.csv")
    plot.table(recorded)
    row = capsys.readouterr().out.splitlines()[4]
    assert row.endswith(" | 40,000 |  |  |")  # nothing is published of it


def test_published_returns_are_of_known_tasks():
    """The paper's figure 3 has all its tasks and algorithms; HARL's table has Hopper as well; no row is there twice."""
    with open(ROOT / "benchmark" / "published.csv", newline="") as f:
        rows = [(row["source"], row["task"], row["algorithm"]) for row in csv.DictReader(f)]
    assert len(set(rows)) == len(rows)
    expected = set(product(["ICLR 2022"], plot.TASKS, plot.ALGORITHMS))
    assert {row for row in rows if row[0] == "ICLR 2022"} == expected
    assert {task for source, task, _ in rows if source == "HARL"} - {*plot.TASKS} == {"Hopper-3x1"}


def test_seconds(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Training returns are the step: 15,000 is first passed at 20,000, at exactly 20,000 too; one seed never does."""
    for seed, speed in ((1, 100), (2, 50), (3, 400)):
        write_record(tmp_path, f"Ant-4x2__happo__{seed}", {}, 40_000, speed)
    for seed, steps in ((1, 30_000), (2, 10_000)):
        write_record(tmp_path, f"Ant-4x2__ippo__{seed}", {}, steps)
    for target in (15_000, 20_000):
        plot.seconds(tmp_path, "Ant-4x2", target)
        assert capsys.readouterr().out.splitlines() == ["HAPPO: 200 [50 to 400]", "IPPO: -"]
    with pytest.raises(SystemExit, match="2"):
        plot.seconds(tmp_path, "Ant-2x4", 1)
    assert capsys.readouterr().err == f"error: {tmp_path} has no runs of Ant-2x4\n"


def test_models(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The best seed by the last evaluation, of HAPPO and HATRPO only; a missing model is one line."""
    results = tmp_path / "results"
    runs = tmp_path / "runs"
    models = tmp_path / "to" / "models"
    evaluations = {1: {10_000: 99, 20_000: 7}, 2: {20_000: 8}, 3: {}, 4: {10_000: 1}}
    for algorithm in ("happo", "mappo", "hatrpo", "happo-shared"):
        for seed, scores in evaluations.items():
            name = f"Ant-4x2__{algorithm}__{seed}"
            write_record(results, name, scores if algorithm != "hatrpo" else {}, 20_000)
            run_dir = runs / name
            run_dir.mkdir(parents=True)
            (run_dir / "model.pt").write_text(f"{algorithm} {seed}" + "x" * 2000)
    write_record(results, "Ant-2x4__happo__5", {10_000: -3}, 10_000)
    (runs / "Ant-2x4__happo__5").mkdir()
    (runs / "Ant-2x4__happo__5" / "model.pt").write_text("x" * 500)
    plot.models(runs, results, models)
    assert capsys.readouterr().out.splitlines() == [
        f"{models}/happo-Ant-2x4.pt: return -3, seed 5, 500 bytes",
        f"{models}/happo-Ant-4x2.pt: return 8, seed 2, 2,007 bytes",
        "2,507 bytes in all",
    ]
    assert len(list(models.iterdir())) == 2
    assert (models / "happo-Ant-2x4.pt").read_text() == "x" * 500
    assert (models / "happo-Ant-4x2.pt").read_text().startswith("happo 2")
    (runs / "Ant-4x2__happo__2" / "model.pt").unlink()
    with pytest.raises(SystemExit, match="2"):
        plot.models(runs, results, models)
    copied = f"{runs}/Ant-4x2__happo__2/model.pt to {models}/happo-Ant-4x2.pt"
    assert capsys.readouterr().err == f"error: {copied}: No such file or directory\n"


def test_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Panels in figure 3's order, a curve per algorithm of the points measured, to where its shortest run ends."""
    figures = {}
    save = Figure.savefig

    def save_and_keep(fig: Figure, path: Path) -> None:
        figures[path.stem] = fig
        save(fig, path)

    monkeypatch.setattr(Figure, "savefig", save_and_keep)
    write_record(tmp_path, "Walker2d-2x3__happo__1", {20_000: 10, 40_000: 20, 60_000: 90}, 60_000)
    shorter = {10_000: 1, 20_000: 20, 40_000: 40}
    write_record(tmp_path, "Walker2d-2x3__happo__2", shorter, 50_000, speed=300)
    write_record(tmp_path, "Walker2d-2x3__happo-shared__1", {30_000: 7}, 30_000)
    write_record(tmp_path, "Walker2d-2x3__ippo__1", {}, 30_000)  # without an evaluation
    for env_id in ("Hopper-3x1", "Ant-4x2", "Coupled-1x1"):
        write_record(tmp_path, f"{env_id}__hatrpo__1", {10_000: 5}, 10_000)
    plot.figure(tmp_path)
    hours = [(200 + 200 / 3) / 7200, (400 + 400 / 3) / 7200]
    for name, x in (("figure", [0.02, 0.04]), ("hours", hours)):
        fig = figures[name]
        titles = [ax.get_title() for ax in fig.axes]
        assert titles == ["Ant-4x2", "Walker2d-2x3", "Coupled-1x1", "Hopper-3x1"]
        happo, shared = fig.axes[1].lines
        np.testing.assert_allclose(happo.get_xydata().T, [x, [15, 30]])
        assert (happo.get_color(), happo.get_linestyle()) == ("C1", "-")
        assert (shared.get_color(), shared.get_linestyle()) == ("C1", "--")
        band = fig.axes[1].collections[0].get_paths()[0].vertices
        expected = {(x[0], 10), (x[0], 20), (x[1], 20), (x[1], 40)}
        assert {(round(a, 9), b) for a, b in band} == {(round(a, 9), b) for a, b in expected}
        (legend,) = fig.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert names == ["HATRPO", "HAPPO", "HAPPO-SHARED"]
        assert "mean over 1 to 2 seeds; band: lowest to highest seed" in fig.get_supxlabel()


def test_figure_of_twelve_tasks_is_small(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Of five algorithms and jagged curves, less than 300 kB each."""
    rng = np.random.default_rng(0)
    for env_id in plot.TASKS:
        for algorithm in plot.ALGORITHMS:
            for seed in (1, 2, 3):
                steps = range(50_000, 1_000_001, 50_000)
                scores = {step: rng.normal(step / 1000, 300) for step in steps}
                write_record(tmp_path, f"{env_id}__{algorithm}__{seed}", scores, 1_000_000)
    plot.figure(tmp_path)
    files = [tmp_path / "figure.png", tmp_path / "hours.png"]
    assert capsys.readouterr().out.splitlines() == [str(file) for file in files]
    for file in files:
        assert file.stat().st_size < 300_000
        width, height = plt.imread(file).shape[1::-1]
        assert 1000 <= width <= 1300 and 1000 <= height <= 1300


def test_aggregate(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Scores are scaled by a task's extremes; a task counts for the algorithms and pairs with equally many seeds."""
    returns = {
        "Ant-4x2": {"happo": [0, 50, 100], "mappo": [40, 60, 20], "happo-shared": [10, 10, 30]},
        "Walker2d-2x3": {"happo": [300] * 3, "mappo": [300] * 3, "happo-shared": [300] * 3},
        "Humanoid-17x1": {"happo": [900, 800], "mappo": [100, 850]},
        "Ant-8x1": {"happo": [1, 2, 3], "mappo": [4], "happo-shared": [5, 6, 7]},
        "Ant-2x4": {"happo": [1], "mappo": [4], "happo-shared": [5]},
    }
    for env_id, algorithms in returns.items():
        for algorithm, scores in algorithms.items():
            write_record(tmp_path, f"{env_id}__{algorithm}__9", {}, 20_000)  # not evaluated yet
            for seed, score in enumerate(scores):
                name = f"{env_id}__{algorithm}__{seed}"
                write_record(tmp_path, name, {10_000: score}, 10_000 * (seed + 1))
    plot.aggregate(tmp_path)
    out = capsys.readouterr().out
    tasks = "tasks, those with equally many seeds of all"
    assert out.startswith(f"Over 2 of 5 {tasks}: Ant-4x2, Walker2d-2x3.")
    cells = {row.split(" | ")[0]: row.split(" | ")[1:] for row in out.splitlines()}
    # Of six scores the middle four: of 0, 0, 0, 0, 0.5, 1 they are 0, 0, 0, 0.5.
    for name, mean in (("HAPPO", 0.125), ("HAPPO-SHARED", 0.05), ("MAPPO", (0.2 + 0.4) / 4)):
        assert cells[f"| {name}"][:2] == ["6", "20,000"]
        assert float(cells[f"| {name}"][2].split()[0]) == pytest.approx(mean, abs=0.006)
    assert cells["| HAPPO over MAPPO"][0] == "3"
    assert cells["| HAPPO over MAPPO"][1].startswith(f"{np.mean([5 / 9, 1 / 2, 3 / 4]):.2f} (")
    assert cells["| HAPPO-SHARED over HAPPO"][:1] == ["3"] and "| HATRPO over HAPPO" not in cells
    # The pairs of a task, counted: 50 and 100 are above 40 and 20, 100 above 60 as well; ties count half.
    assert cells["| task"] == ["HAPPO over MAPPO", "HAPPO-SHARED over HAPPO |"]
    assert cells["| Ant-4x2"] == ["5 of 9", "3 of 9 |"]
    assert cells["| Walker2d-2x3"] == ["4.5 of 9", "4.5 of 9 |"]
    assert cells["| Humanoid-17x1"] == ["3 of 4", "- |"]
    plot.aggregate(tmp_path, ("happo", "mappo"))
    assert capsys.readouterr().out.startswith(f"Over 3 of 5 {tasks}: Ant-4x2, Walk")
    write_record(tmp_path / "late", "Ant-4x2__happo__1", {10_000: 1, 20_000: 9}, 20_000)
    write_record(tmp_path / "late", "Ant-4x2__happo__2", {10_000: 2, 20_000: 9}, 20_000)
    write_record(tmp_path / "late", "Ant-4x2__mappo__1", {10_000: 3, 20_000: 8}, 20_000)
    write_record(tmp_path / "late", "Ant-4x2__mappo__2", {10_000: 4, 20_000: 8}, 20_000)
    for steps, probability in ((10_000, "0.00"), (20_000, "1.00")):
        plot.aggregate(tmp_path / "late", steps=steps)
        assert f"| HAPPO over MAPPO | 1 | {probability} (" in capsys.readouterr().out
    for path in tmp_path.glob("*__mappo__*"):
        name = path.name.replace("mappo", "ippo").replace("Ant", "Reacher").replace("Walk", "Run")
        path.rename(path.with_name(name))
    with pytest.raises(SystemExit, match="2"):
        plot.aggregate(tmp_path)
    assert "two or more, of happo, happo-shared, ippo\n" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        plot.aggregate(tmp_path, ("happo", "hatrpo"))
    assert "of hatrpo, happo\n" in capsys.readouterr().err


def test_seeds_needed():
    """The sizes of Cohen's table 2.4.1 for a two-sided test at 5%, and of 95% power."""
    assert [plot.seeds_needed(effect) for effect in (0.2, 0.5, 0.8, 1.0)] == [394, 64, 26, 17]
    assert plot.seeds_needed(0.5, power=0.95) == 105


def test_noise(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The deviation is pooled within the algorithms; a difference of half the mean is one of 5 deviations here."""
    scores = {"happo": [900, 1000, 1100], "mappo": [900, 1000, 1100], "maddpg": [0, 50, 7]}
    for algorithm, returns in scores.items():
        for seed, score in enumerate(returns):
            write_record(tmp_path, f"Ant-4x2__{algorithm}__{seed}", {10_000: score}, 10_000)
    write_record(tmp_path, "Ant-8x1__happo__1", {10_000: 5}, 10_000)  # one run does not scatter
    plot.noise(tmp_path, ("happo", "mappo"), 0.5)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [f"| Ant-4x2 | 6 | 1000 | 100 | {plot.seeds_needed(5)} |"]
    plot.noise(tmp_path)
    (row,) = capsys.readouterr().out.splitlines()[2:]
    pooled = np.sqrt((1e4 + 1e4 + np.var([0, 50, 7], ddof=1)) / 3)
    assert f"| 9 | {(6000 + 57) / 9:.0f} | {pooled:.0f} |" in row
    with pytest.raises(SystemExit, match="2"):
        plot.noise(tmp_path, ("ippo",))
    assert "no two evaluated runs" in capsys.readouterr().err


def test_compare(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Equal sets are within the noise; a happo that is 100 better is different; one run or half a run fails."""
    assert not plot.compare(recorded, recorded)
    out = capsys.readouterr().out
    same = "Ant-4x2 happo: within the noise: +0 (-2 to +2, noise +-2)"
    assert f"{same}, permutation p 1.00, 3 against 3 runs\n" in out
    assert out.endswith("0 of 2 differ; by chance alone about 0.1 would\n")
    other = tmp_path / "other"
    other.mkdir()
    for seed in (1, 2, 3):
        text = (recorded / f"Ant-4x2__mappo__{seed}.csv").read_text()
        (other / f"Ant-4x2__happo__{seed}.csv").write_text(text)
    assert plot.compare(recorded, other)
    higher = "Ant-4x2 happo: DIFFERENT: +100 (+98 to +102, noise +-2)"
    assert f"{higher}, permutation p 0.10, 3 against 3 runs\n" in capsys.readouterr().out
    for seed in (2, 3):
        (other / f"Ant-4x2__happo__{seed}.csv").unlink()
    assert plot.compare(recorded, other)
    few = "Ant-4x2 happo: fewer than two runs say nothing about the noise: [81. 82. 83.], [181.]\n"
    assert few + "nothing could be compared\n" in capsys.readouterr().out
    path = other / "Ant-4x2__happo__1.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    assert plot.compare(recorded, other)
    shorter = "Ant-4x2 happo: not compared: the runs have from 30,000 to 40,000 steps\n"
    assert shorter + "nothing could be compared\n" in capsys.readouterr().out


@pytest.fixture
def run_plot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """plot.py with a command line: its exit code, and the lines of its output and of its complaint."""

    def run(*words: object) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            plot.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out.splitlines(), captured.err.splitlines()

    return run


def test_exit_code_of_compare(tmp_path: Path, run_plot):
    """It is 0 within the noise, 1 if something differs or nothing can be compared, 2 without a common task."""
    reference = tmp_path / "reference"
    mine = tmp_path / "mine"
    for seed in (1, 2):
        write_record(reference, f"Ant-4x2__happo__{seed}", {20_000: seed}, 20_000)
        write_record(mine, f"Ant-4x2__happo__{seed}", {20_000: seed}, 20_000)
    code, lines, _ = run_plot("compare", reference, mine)
    assert code == 0 and len(lines) == 1 and "within the noise" in lines[0]
    for seed in (1, 2):
        write_record(mine, f"Ant-4x2__happo__{seed}", {20_000: seed + 100}, 20_000)
    code, lines, _ = run_plot("compare", reference, mine)
    assert code == 1 and len(lines) == 1 and "DIFFERENT" in lines[0]
    write_record(reference, "Ant-4x2__mappo__1", {20_000: 1}, 20_000)
    write_record(mine, "Ant-4x2__mappo__1", {20_000: 1}, 20_000)
    for seed in (1, 2):
        write_record(mine, f"Ant-4x2__happo__{seed}", {20_000: seed}, 20_000)
    code, lines, _ = run_plot("compare", reference, mine)
    assert code == 0 and "fewer than two runs" in lines[1]  # the other row could be compared

    nothing = [1, "nothing could be compared"]
    write_record(mine, "Ant-4x2__happo__2", {20_000: 2}, 30_000)
    code, lines, _ = run_plot("compare", reference, mine)
    assert [code, lines[-1]] == nothing and "from 20,000 to 30,000 steps" in lines[0]
    write_record(mine, "Ant-4x2__happo__2", {}, 20_000)  # not evaluated
    for few, enough in ((mine, reference), (reference, mine)):
        code, lines, _ = run_plot("compare", few, enough)
        assert [code, lines[-1]] == nothing and "fewer than two runs" in lines[0]

    for path in mine.glob("*.csv"):
        path.rename(path.with_name(path.name.replace("Ant-4x2", "Ant-2x4")))
    complaint = "error: the two have no environment and algorithm in common"
    assert run_plot("compare", reference, mine) == (2, [], [complaint])
    missing = tmp_path / "missing"
    complaint = f"error: {missing} has no recorded runs"
    for pair in ((reference, missing), (missing, mine)):
        assert run_plot("compare", *pair) == (2, [], [complaint])


HEADER = ",".join(plot.COLUMNS).encode() + b"\n"


DAMAGED = {
    "empty": (b"", "its columns are not step, "),
    "other columns": (b"step,return\n1,2\n", "its columns are not step, "),
    "no header": (b"1,2,3,4,5\n2,3,4,5,6\n", "its columns are not step, "),
    "only a header": (HEADER, "it has no rows, or one without 5 numbers"),
    "cut": (HEADER + b"1,2,3,4,5\n2,3", "it has no rows, or one without 5 numbers"),
    "too wide": (HEADER + b"1,2,3,4,5,6\n", "it has no rows, or one without 5 numbers"),
    "garbled": (b"\xff\xfe\x00", "can't decode byte 0xff"),
    "garbled later": (HEADER + b"1,2,3,4,5\n2,\xff,3,4,5\n", "can't decode byte 0xff"),
    "a word": (HEADER + b"1,2,3,4,5\n2,3,none,4,5\n", "could not convert string to float"),
    "a gap": (HEADER + b"1,2,3,4,\n", "could not convert string to float"),
    "a step is nan": (HEADER + b"nan,2,3,4,5\n", "its steps do not ascend"),
    "a step is inf": (HEADER + b"1,2,3,4,5\ninf,2,3,4,5\n", "its steps do not ascend"),
    "steps descend": (HEADER + b"2,1,3,4,5\n1,2,3,4,5\n", "its steps do not ascend"),
    "a long line": (HEADER + b"1" * 200_000, "field larger than field limit"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_records_are_one_line(tmp_path: Path, damage: str, run_plot):
    """Every command that reads records names the damaged file, prints nothing else, and exits with 2."""
    content, complaint = DAMAGED[damage]
    for seed in (1, 2, 3):
        write_record(tmp_path, f"Ant-4x2__happo__{seed}", {20_000: seed}, 20_000)
    path = tmp_path / "Ant-4x2__happo__2.csv"
    path.write_bytes(content)
    commands = [["table", tmp_path], ["figure", tmp_path], ["compare", tmp_path, tmp_path]]
    commands += [["aggregate", tmp_path], ["models", tmp_path, tmp_path, tmp_path / "models"]]
    commands += [["seconds", tmp_path, "--env-id", "Ant-4x2", "--target", 1]]
    for command in commands:
        code, out, err = run_plot(*command)
        assert (code, out, len(err)) == (2, [], 1)
        assert err[0].startswith(f"error: {path} is no record of a run: ") and complaint in err[0]
    assert len(list(tmp_path.iterdir())) == 3


def files_in(folder: Path) -> dict[Path, bytes | None]:
    """The bytes of all files below a directory; None stands for directories."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_damaged_descriptions_are_left_out(tmp_path: Path, run_plot):
    """A run whose .jsonl is damaged gets a line with the file's name; the others are recorded."""
    runs = tmp_path / "runs"
    runs.mkdir()
    good = '{"command": ["x"]}\n'
    damaged = [b'{"a": 1}\n{"comm', b"", b"5\n", good.encode() + b"5\n", b"[]\n", b"\xff\n"]
    for seed, content in enumerate([*damaged, None, None, good.encode()]):
        run = runs / f"Ant-4x2__happo__{seed}"
        write_log(run, 0, 10_000)
        path = Path(f"{run}.jsonl")
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    (runs / "Ant-4x2__happo__6.jsonl").mkdir()
    (runs / "Ant-4x2__happo__7.jsonl").symlink_to("nowhere")
    write_log(runs / "Ant-4x2__happo__9", 0, 10_000)
    code, out, err = run_plot("record", runs, tmp_path / "results")
    assert (code, out) == (0, [f"2 runs are recorded in {tmp_path / 'results'}"])
    assert len(err) == 8 and all(line.startswith("left out: ") for line in err)
    for seed, line in enumerate(err):
        assert f"{runs}/Ant-4x2__happo__{seed}.jsonl" in line
    lines = (tmp_path / "results" / "runs.jsonl").read_text().splitlines()
    names = ["Ant-4x2__happo__8", "Ant-4x2__happo__9"]
    assert [json.loads(line)["run"] for line in lines] == names
    assert sorted(path.stem for path in tmp_path.glob("results/*.csv")) == names


@pytest.mark.parametrize(
    "content",
    [
        b'{"run": "Ant-4x2__happo__7"}\n{"run": "Ant-4',
        b"\xff",
        b"5\n",
        b"{}\n",
        b'{"run": 5}\n',
        b'{"run": null}\n',
        b'{"run": "x"}\n',
        None,
    ],
)
def test_a_damaged_list_of_records_stays(tmp_path: Path, content: bytes | None, run_plot):
    """With a runs.jsonl that is cut, garbled or a directory, `record` says so in one line, and changes nothing."""
    (tmp_path / "runs").mkdir()
    write_log(tmp_path / "runs" / "Ant-4x2__happo__1", 0, 10_000)
    results = tmp_path / "results"
    results.mkdir()
    file = results / "runs.jsonl"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    before = files_in(tmp_path)
    complaint = (
        f"{file}: Is a directory" if content is None else f"{file} has a line that describes no run"
    )
    assert run_plot("record", tmp_path / "runs", results) == (2, [], [f"error: {complaint}"])
    assert files_in(tmp_path) == before


def test_records_that_cannot_be_written(tmp_path: Path, run_plot):
    """Results that are a file or lie below one, or a CSV that is a directory: one line with the path, exit code 2."""
    runs = tmp_path / "runs"
    runs.mkdir()
    write_log(runs / "Ant-4x2__happo__1", 0, 10_000)
    (tmp_path / "file").write_text("x")
    csv_file = tmp_path / "results" / "Ant-4x2__happo__1.csv"
    csv_file.mkdir(parents=True)
    before = files_in(tmp_path)
    for results, complaint in (
        (tmp_path / "file", f"{tmp_path}/file: File exists"),
        (tmp_path / "file" / "x", f"{tmp_path}/file/x: Not a directory"),
        (tmp_path / "results", f"{csv_file}: Is a directory"),
    ):
        assert run_plot("record", runs, results) == (2, [], [f"error: {complaint}"])
    code, out, (err,) = run_plot("table", tmp_path / "results")
    assert (code, out) == (2, []) and err.startswith(f"error: {csv_file} is no record of a run: ")
    assert files_in(tmp_path) == before


# The runner

TINY = "--num-envs 4 --num-steps 32 --hidden-sizes 8 --eval-episodes 0 --checkpoint-interval 256"


cloudpickle.register_pickle_by_value(runner)  # jobs find it in a script, but not beside a test


@pytest.fixture
def run_jobs(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The runner on job.toml: its exit code, and the lines that it printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(**chosen: object) -> tuple[int, list[str]]:
        with pytest.raises(SystemExit) as stop:
            runner.main(runner.Args(tmp_path / "job.toml", runs=tmp_path, workers=2, **chosen))
        return int(stop.value.code), capsys.readouterr().out.splitlines()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write_job(folder: Path, total: int, env_ids: str = '["Reacher-2x1"]', more: str = "") -> None:
    """A job file for HAPPO on Reacher."""
    lines = [f'algorithms = ["happo"]\nenv_ids = {env_ids}\nseeds = [1]']
    lines += [f'flags = "{TINY} --total-timesteps {total}"', more]
    (folder / "job.toml").write_text("\n".join(lines))


def starts(run: Path) -> list[dict]:
    """What the runner wrote down of a run's starts."""
    return [json.loads(line) for line in Path(f"{run}.jsonl").read_text().splitlines()]


def step_of(run: Path) -> int:
    """How far the checkpoint of a run is."""
    return torch.load(run / "checkpoint.pt", weights_only=True)["step"]


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Wait for the lock of a run, as a script holds it that writes its output; hold it."""
    with open(f"{run}.log", "a") as log:
        end = time.monotonic() + 30
        while True:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < end
                time.sleep(0.05)
        yield


def test_runner_finishes_skips_resumes_and_reports(tmp_path: Path, run_jobs):
    """Two jobs, one of which fails; again without it: skipped; further: resumed; taken by another process: failed."""
    write_job(tmp_path, 512, env_ids='["Reacher-2x1", "Reacher-3x1"]')
    code, lines = run_jobs()
    run = tmp_path / "job" / "Reacher-2x1__happo__1"
    assert code == 1 and lines[0] == "2 jobs, 0 finished before"
    assert lines[-1].startswith("1 of 2 jobs in ") and lines[-1].endswith(" min, 1 failed")
    (done,) = [line for line in lines if f"{run.name}: step 512 charts/SPS " in line]
    assert " charts/SPS " in done and " min" in done
    (failed,) = [line for line in lines if "Reacher-3x1__happo__1: FAILED with 2: error: " in line]
    assert f"(see {tmp_path}/job/Reacher-3x1__happo__1.log)" in failed
    (start,) = starts(run)
    assert start["command"][-2:] == ["--run-dir", str(run)] and start["args"]["run_dir"] == str(run)
    assert start["args"]["num_envs"] == 4 and start["args"]["gamma"] == 0.99
    assert start["machine"]["threads"] == 1
    if sys.platform == "linux":
        models = re.findall(
            r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        assert start["machine"]["processor"] == models[0]
    # The version of a CUDA build ends in "+cu130" in one of the two only.
    assert start["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout
    assert (start["commit"] or "").removesuffix("-dirty") == commit.strip()

    write_job(tmp_path, 512)
    assert run_jobs() == (0, ["1 jobs, 1 finished before", "0 of 0 jobs in 0.0 min, 0 failed"])

    longer = {"flags": "--total-timesteps 768"}  # the file still says 512
    with locked(run):  # as by a script that has outlived its runner
        code, lines = run_jobs(**longer)
    assert code == 1 and f"{run.name}: FAILED with 1: another process is at work on it" in lines[1]
    assert step_of(run) == 512 and len(starts(run)) == 1
    assert run_jobs(**longer)[0] == 0
    assert run_jobs()[1][0] == "1 jobs, 1 finished before"  # longer than the file says
    (line, *_) = run_jobs(flags="--gamma 0.9")[1]
    assert line.startswith(f"{run.name}: FAILED: begun with gamma 0.99, not 0.9")
    assert step_of(run) == 768
    assert [start["command"][-2] for start in starts(run)] == ["--run-dir", str(run)]
    points = EventAccumulator(str(run)).Reload().Scalars("charts/SPS")
    speeds = {point.step: point.value for point in points}
    assert plot.read_log(run)["seconds"] == pytest.approx([512 / speeds[512] + 256 / speeds[768]])


def test_other_arguments_are_a_failure(tmp_path: Path, run_jobs):
    """A run that was begun with other arguments is neither finished nor resumed; some may change, or be missing."""
    run = tmp_path / "job" / "Reacher-2x1__happo__1"
    run.mkdir(parents=True)
    write_job(tmp_path, 512)
    (job,) = runner.read_jobs(tmp_path / "job.toml", tmp_path)
    args = asdict(job.args) | {"checkpoint_interval": 7, "run_dir": "elsewhere", "cuda": True}
    args["wandb_run_id"] = "abc"
    del args["log_std_init"]  # a checkpoint from before there was this argument had its default
    state = {"step": 512, "script": "happo_mamujoco", "args": args | {"what_was_once": 1}}
    torch.save(state, run / "checkpoint.pt")
    assert job.is_finished()
    torch.save(state | {"step": 384}, run / "checkpoint.pt")
    assert not job.is_finished()  # one more iteration fits
    torch.save(state | {"script": "mappo_mamujoco"}, run / "checkpoint.pt")
    with pytest.raises(ValueError, match="begun with script mappo_mamujoco, not happo_mamujoco"):
        job.is_finished()
    torch.save(state, run / "checkpoint.pt")
    before = (run / "checkpoint.pt").read_bytes()
    for total in (512, 1024):
        write_job(tmp_path, total, more='[[extra]]\nflags = "--gamma 0.9"')
        code, lines = run_jobs()
        remedy = f"to start anew, move {run} away"
        assert code == 1 and lines == [
            f"{run.name}: FAILED: begun with gamma 0.99, not 0.9; {remedy}",
            "1 jobs, 0 finished before",
            "0 of 0 jobs in 0.0 min, 1 failed",
        ]
    write_job(tmp_path, 512, more='[[extra]]\nflags = "--agent-obsk 1"')
    (line, *_) = run_jobs()[1]
    assert line == f"{run.name}: FAILED: begun with agent_obsk None, not 1; {remedy}"
    assert (run / "checkpoint.pt").read_bytes() == before
    assert list(run.iterdir()) == [run / "checkpoint.pt"]
    (run / "checkpoint.pt").write_bytes(before[:100])
    (line, *_) = run_jobs()[1]
    assert line == f"{run.name}: FAILED: {run}/checkpoint.pt cannot be read (RuntimeError)"


def test_a_run_has_one_thread_and_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The libraries of a script have one thread; its output is locked, until it ends."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run = tmp_path / "runs" / "Ant-4x2__happo__1"
    script = tmp_path / "script.py"
    script.write_text(
        "import fcntl, os, sys, torch\n"
        "print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], torch.get_num_threads())\n"
        "log = open(sys.argv[2] + '.log')\n"
        "try:\n"
        "    fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)\n"
        "except BlockingIOError:\n"
        "    print('locked')\n"
        "print('the last line')\n"
    )
    handler = signal.getsignal(signal.SIGTERM)
    code, line, seconds = runner.train(run, [str(script)], {"num_threads": 1})
    signal.signal(signal.SIGTERM, handler)
    assert (code, line) == (0, "locked") and 0 < seconds < 60
    first = Path(f"{run}.log").read_text().splitlines()[0]
    assert first == f"['--run-dir', '{run}'] 1 1"
    with locked(run):
        pass


@pytest.mark.parametrize("how", ["SIGTERM to the runner", "Ctrl-C in the terminal"])
def test_runner_stops_and_goes_on(tmp_path: Path, how: str, run_jobs):
    """The scripts end with it; a directory without a checkpoint is moved aside; the next runner finishes the run."""
    write_job(tmp_path, 128 * 100_000)
    run = tmp_path / "job" / "Reacher-2x1__happo__1"
    run.mkdir(parents=True)
    (run / "something").write_text("kept")
    command = [sys.executable, ROOT / "benchmark" / "run.py", tmp_path / "job.toml"]
    command += ["--runs", tmp_path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, process_group=0)
    while not (run / "checkpoint.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None
    if how == "SIGTERM to the runner":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (143 if how == "SIGTERM to the runner" else 130) and err == ""
    assert out.splitlines()[1:] == ["stopped; the same command goes on from the latest checkpoints"]
    with locked(run):  # the script has ended
        stopped_at = step_of(run)
    assert [path.read_text() for path in tmp_path.glob("job/*/something")] == ["kept"]
    if how == "SIGTERM to the runner":
        write_job(tmp_path, stopped_at + 128)
        code, lines = run_jobs()
        assert code == 0 and f"{run.name}: step {stopped_at + 128} " in lines[1]
        assert len(starts(run)) == 2


def test_runner_runs_one_row_and_compares_it(
    tmp_path: Path, run_jobs, capsys: pytest.CaptureFixture
):
    """Only what is chosen runs; against itself it is within the noise, and against other returns it is not."""
    write_job(tmp_path, 384, env_ids='["Reacher-2x1", "Reacher-1x2"]')
    text = (tmp_path / "job.toml").read_text().replace("[1]", "[1, 2]")
    (tmp_path / "job.toml").write_text(text.replace("--eval-episodes 0", "--eval-episodes 1"))
    with pytest.raises(SystemExit, match="2"):
        runner.main(runner.Args(tmp_path / "job.toml", runs=tmp_path, algorithms=("mappo",)))
    assert "has no mappo, but happo" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        runner.main(runner.Args(tmp_path / "job.toml", runs=tmp_path, seeds=(2, 3)))
    assert "has no 3, but 1, 2" in capsys.readouterr().err

    (line, *_) = run_jobs(env_ids=("Reacher-1x2",), seeds=(2,))[1]
    assert line == "1 jobs, 0 finished before"
    (line, *_) = run_jobs(env_ids=("Reacher-1x2",), algorithms=("happo",))[1]
    assert line == "2 jobs, 1 finished before"
    reference = tmp_path / "reference"
    plot.record(tmp_path / "job", reference)
    names = {path.name for path in reference.glob("*.csv")}
    assert names == {"Reacher-1x2__happo__1.csv", "Reacher-1x2__happo__2.csv"}
    code, lines = run_jobs(env_ids=("Reacher-1x2",), compare=reference)
    assert code == 0 and lines[-1].startswith("Reacher-1x2 happo: within the noise: +0 ")
    for path in reference.glob("*.csv"):
        *rows, last = path.read_text().splitlines()
        columns = last.split(",")
        columns[3] = str(float(columns[3]) + 1000)
        path.write_text("\n".join([*rows, ",".join(columns)]))
    code, lines = run_jobs(env_ids=("Reacher-1x2",), compare=reference)
    assert code == 1 and lines[-1].startswith("Reacher-1x2 happo: DIFFERENT: -1000 ")
    assert len(list(tmp_path.glob("job/results/*.csv"))) == 2


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The one line with which the runner refuses job.toml; it makes no file, and could not start a run."""
    monkeypatch.setattr(runner.submitit, "AutoExecutor", None)

    def run(**chosen: object) -> str:
        before = files_in(tmp_path)
        with pytest.raises(SystemExit) as stop:
            runner.main(runner.Args(tmp_path / "job.toml", **{"runs": tmp_path} | chosen))
        captured = capsys.readouterr()
        assert stop.value.code == 2 and re.fullmatch("error: [^\n]+\n", captured.err)
        assert re.fullmatch(r"(\d+ jobs, \d+ finished before\n)?", captured.out)
        assert files_in(tmp_path) == before
        return captured.err.removeprefix("error: ").strip()

    return run


GOOD = 'env_ids = ["Ant-4x2"]\nseeds = [1]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + 'algorithms = ["sac"]', "there is no sac_mamujoco.py"),
        (GOOD + 'algorithm = ["happo"]', "unknown algorithm; known are algorithms, env_ids"),
        (GOOD + 'algorithms = "happo"', "algorithms is 'happo': it must be a list of str"),
        (GOOD + 'algorithms = ["happo", "happo"]', "Ant-4x2__happo__1 is there twice"),
        (GOOD + 'algorithms = ["happo"]\nflags = "--seeed 1"', "Unrecognized options: --seeed"),
        (
            GOOD + 'algorithms = ["happo"]\nflags = "--gamma 2"',
            "gamma Input should be less than or equal to 1",
        ),
        (
            GOOD + 'algorithms = ["happo"]\n[[extra]]\nenv_ids = ["Ant-2x4"]\nflags = ""',
            "Ant-2x4, which no job has",
        ),
        (GOOD + '[[variants]]\nname = "x"', "algorithm is missing"),
        (GOOD, "there are no jobs: name seeds, env_ids, and algorithms or variants"),
        (GOOD + "algorithms = []\nvariants = []", "there are no jobs"),
        ('env_ids = []\nseeds = [1]\nalgorithms = ["happo"]', "there are no jobs"),
        ('env_ids = ["Ant-4x2"]\nseeds = []\nalgorithms = ["happo"]', "there are no jobs"),
        (
            'env_ids = ["Ant-4x2"]\nseeds = []\n[[variants]]\nname = "x"\nalgorithm = "happo"',
            "no jobs",
        ),
        (
            GOOD + '[[variants]]\nname = ""\nalgorithm = "happo"',
            "Ant-4x2____1 is there twice, or no",
        ),
        (
            GOOD + '[[variants]]\nname = "x_"\nalgorithm = "happo"',
            "Ant-4x2__x___1 is there twice, or",
        ),
        (GOOD + '[[variants]]\nname = "a/b"\nalgorithm = "happo"', "or no name for a run"),
        ('env_ids = ["Ant_"]\nseeds = [1]\nalgorithms = ["happo"]', "or no name for a run"),
        ('env_ids = ["A\\nt"]\nseeds = [1]\nalgorithms = ["happo"]', "or no name for a run"),
        ('env_ids = ["m__n:A-2x1"]\nseeds = [1]\nalgorithms = ["happo"]', "or no name for a run"),
        ('env_ids = ["Ant-4x2"]\nseeds = [-1]\nalgorithms = ["happo"]', "or no name for a run"),
        ('env_ids = ["Ant-4x2"]', "seeds is missing"),
        ("algorithms = [", "Invalid value"),
    ],
)
def test_bad_job_files_are_one_line(tmp_path: Path, text: str, message: str, refused):
    """Exit code 2, and what is wrong."""
    (tmp_path / "job.toml").write_text(text)
    assert message in refused()


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--seed 9", "--seed"),
        ("--seed=9", "--seed"),
        ("--gamma 0.9 '--seed' 9", "--seed"),
        ("--env-id X", "--env-id"),
        ("--env_id=X", "--env-id"),
        ("--num-threads 2", "--num-threads"),
        ("--num_threads=2", "--num-threads"),
        ("--run-dir x", "--run-dir"),
        ("--resume x", "--resume"),
    ],
)
def test_flags_that_the_runner_sets(tmp_path: Path, flag: str, name: str, refused):
    """Neither the command line nor flags, extra or variants of the job file may name what the runner sets itself."""
    job = 'env_ids = ["Ant-4x2", "Ant-2x4"]\nseeds = [1]\nalgorithms = ["happo"]\n'
    (tmp_path / "job.toml").write_text(job)
    message = f"{tmp_path}/job.toml: flags have {name}, which run.py sets itself"
    assert refused(flags=flag) == message
    for text in (
        f'flags = "{flag}"',
        f'[[extra]]\nenv_ids = ["Ant-2x4"]\nflags = "{flag}"',
        f'[[variants]]\nname = "x"\nalgorithm = "mappo"\nflags = "{flag}"',
    ):
        (tmp_path / "job.toml").write_text(job + text)
        assert refused() == message


@pytest.mark.parametrize("flag", ["--help", "-h", "--tyro-print-completion bash"])
def test_flags_that_start_no_run(tmp_path: Path, flag: str, refused):
    """A script that would print its help instead of training is refused, and its help not printed."""
    (tmp_path / "job.toml").write_text(GOOD + 'algorithms = ["happo"]')
    message = refused(flags=flag)
    assert message.startswith(f"{tmp_path}/job.toml: happo: {flag} --env-id Ant-4x2 --seed 1 ")
    assert message.endswith(" starts no run")


def test_the_runner_without_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Slurm is asked for where there is none: one line, exit code 2."""
    monkeypatch.setenv("PATH", str(tmp_path))
    write_job(tmp_path, 512)
    with pytest.raises(SystemExit, match="2"):
        runner.main(runner.Args(tmp_path / "job.toml", runs=tmp_path, slurm="cpu"))
    err = capsys.readouterr().err
    assert err.startswith('error: --slurm cpu: Could not detect "srun"') and err.count("\n") == 1


def test_names_of_environments(tmp_path: Path):
    """A run has no "|" in its name, but the command line knows the environment by both names."""
    write_job(tmp_path, 512, env_ids='["Humanoid-9|8", "Ant-4x2"]')
    jobs = runner.read_jobs(tmp_path / "job.toml", tmp_path)
    for env_id in ("Humanoid-9|8", "Humanoid-9p8"):
        args = runner.Args(tmp_path / "job.toml", env_ids=(env_id,))
        (job,) = runner.select(jobs, args)
        assert job.run_dir.name == "Humanoid-9p8__happo__1" and job.args.env_id == "Humanoid-9|8"


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_runs_in_a_file(tmp_path: Path, below: str, refused):
    """The directory of the runs is a file or lies below one: one line that names it, and nothing is started."""
    write_job(tmp_path, 512)
    (tmp_path / "file").write_text("x")
    runs = tmp_path / "file" / below
    assert refused(runs=runs) == f"--runs {runs}: {runs}/job: Not a directory"


def test_runs_where_a_file_is(tmp_path: Path, refused):
    """The job's own directory is a file, or submitit's."""
    write_job(tmp_path, 512)
    (tmp_path / "job").write_text("x")
    assert refused() == f"--runs {tmp_path}: {tmp_path}/job: File exists"
    (tmp_path / "job").unlink()
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "submitit").write_text("x")
    assert refused() == f"--runs {tmp_path}: {tmp_path}/job/submitit: File exists"


@pytest.mark.parametrize(
    ("records", "chosen", "complaint"),
    [
        (None, (), "reference has no recorded runs"),
        ([], (), "reference has no recorded runs"),
        (["Reacher-2x1__happo"], (), "reference has no recorded runs"),
        (["Ant-4x2__happo__1"], (), "has no environment and algorithm of these jobs"),
        (["Reacher-2x1__ippo__1"], (), "has no environment and algorithm of these jobs"),
        (["Reacher-2x1__mappo__1"], ("happo",), "has no environment and algorithm of these jobs"),
        (["Reacher-2x1__happo__1", "damaged"], (), "Ant-4x2__happo__1.csv is no record of a run: "),
    ],
)
def test_nothing_runs_that_cannot_be_compared(
    tmp_path: Path, records: list[str] | None, chosen: tuple[str, ...], complaint: str, refused
):
    """No directory, no records in it, none of the jobs' tasks or algorithms, a damaged one: refused before training."""
    write_job(tmp_path, 512, more='[[variants]]\nname = "mappo"\nalgorithm = "mappo"')
    reference = tmp_path / "reference"
    if records is not None:
        reference.mkdir()
        for run in records:
            write_record(reference, run, {20_000: 1}, 20_000)
        if "damaged" in records:
            (reference / "Ant-4x2__happo__1.csv").write_text("x")
    assert complaint in refused(compare=reference, algorithms=chosen)


def test_runner_compares_finished_runs(tmp_path: Path, run_jobs):
    """It exits with 1 if another number of steps, or fewer than two runs, leave nothing to compare."""
    write_job(tmp_path, 10_000)
    path = tmp_path / "job.toml"
    path.write_text(path.read_text().replace("seeds = [1]", "seeds = [1, 2]"))
    reference = tmp_path / "reference"
    for job in runner.read_jobs(path, tmp_path):
        job.run_dir.mkdir(parents=True)
        write_log(job.run_dir, 0, 20_000, offset=job.args.seed)
        state = {"step": 20_000, "script": "happo_mamujoco", "args": asdict(job.args)}
        torch.save(state, job.run_dir / "checkpoint.pt")
        write_record(reference, job.run_dir.name, {20_000: 40 + job.args.seed}, 20_000)
    code, lines = run_jobs(compare=reference)
    assert code == 0 and lines[-1].startswith("Reacher-2x1 happo: within the noise: +0 ")
    (reference / "Reacher-2x1__happo__2.csv").unlink()
    code, lines = run_jobs(compare=reference)
    assert code == 1 and lines[-1] == "nothing could be compared"
    assert lines[-2].startswith("Reacher-2x1 happo: fewer than two runs ")
    for seed in (1, 2):
        write_record(reference, f"Reacher-2x1__happo__{seed}", {20_000: 40}, 30_000)
    code, lines = run_jobs(compare=reference)
    assert code == 1 and lines[-1] == "nothing could be compared"
    assert lines[-2] == "Reacher-2x1 happo: not compared: the runs have from 20,000 to 30,000 steps"


WORKERS = """
import importlib, os, sys

sys.path.insert(0, sys.argv[1])
import run

print(run.Args("x").workers)
os.sched_setaffinity(0, [int(sys.argv[2])])
print(importlib.reload(run).Args("x").workers)
del os.sched_getaffinity
print(importlib.reload(run).Args("x").workers)
"""


def test_default_number_of_workers():
    """A job per CPU that the process may use; where the system does not say which, per CPU of the machine."""
    cpus = os.sched_getaffinity(0)
    command = [sys.executable, "-c", WORKERS, ROOT / "benchmark", str(min(cpus))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(cpus)), "1", str(os.cpu_count())]


MINE = """
import gymnasium

entry_point = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"
gymnasium.register("Mine-v0", entry_point, max_episode_steps=100)
"""


def test_runs_of_an_environment_with_a_module(
    tmp_path: Path, run_jobs, run_plot, monkeypatch: pytest.MonkeyPatch
):
    """Only a resumed run gets --allow-import; it goes on, is finished then, and its record has the module's name."""
    (tmp_path / "some_module.py").write_text(MINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write_job(tmp_path, 256, env_ids='["some_module:Mine-v0-3x1"]')
    run = tmp_path / "job" / "some_module:Mine-v0-3x1__happo__1"
    code, lines = run_jobs()
    assert code == 0 and f"{run.name}: step 256 " in lines[1] and step_of(run) == 256
    code, lines = run_jobs(flags="--total-timesteps 384")
    assert code == 0 and f"{run.name}: step 384 " in lines[1] and step_of(run) == 384
    first, second = [start["command"] for start in starts(run)]
    assert first[-2:] == ["--run-dir", str(run)] and "--allow-import" not in first
    assert second[-3:] == ["--resume", str(run), "--allow-import"] and "--run-dir" not in second
    assert run_jobs()[1][0] == "1 jobs, 1 finished before"
    assert run_plot("record", run.parent, tmp_path / "results")[::2] == (0, [])
    assert list(plot.load(tmp_path / "results")) == [("some_module:Mine-v0-3x1", "happo")]


@pytest.mark.parametrize("env_id", ["other_module:Mine-v0-3x1", "Ant-4x2"])
def test_another_module_is_not_imported(
    tmp_path: Path, env_id: str, run_jobs, monkeypatch: pytest.MonkeyPatch
):
    """A checkpoint in a run's place that names a module, but not the job's, is a failure and never resumed."""
    for module in ("some_module", "other_module"):
        text = f"open({str(tmp_path / 'imported')!r}, 'w')\n" + MINE
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write_job(tmp_path, 512, env_ids=f'["{env_id}"]')
    (job,) = runner.read_jobs(tmp_path / "job.toml", tmp_path)
    job.run_dir.mkdir(parents=True)
    args = asdict(job.args) | {"env_id": "some_module:Mine-v0-3x1"}
    state = {"step": 128, "script": "happo_mamujoco", "args": args}
    torch.save(state, job.run_dir / "checkpoint.pt")
    code, lines = run_jobs()
    begun = f"begun with env_id some_module:Mine-v0-3x1, not {env_id}; "
    assert code == 1 and lines[0].startswith(f"{job.run_dir.name}: FAILED: {begun}")
    assert not (tmp_path / "imported").exists()
    assert not Path(f"{job.run_dir}.jsonl").exists()


@pytest.mark.parametrize("name", ["figure3", "figure4"])
def test_job_files_are_understood(name: str, tmp_path: Path):
    """Every job of the published figures has flags that its script understands, and another directory."""
    job_file = ROOT / "benchmark" / f"{name}.toml"
    jobs = runner.read_jobs(job_file, tmp_path)
    sizes = {"figure3": 5 * 12 * 3, "figure4": 6 * 3 * 3}
    assert len({job.run_dir for job in jobs}) == len(jobs) == sizes[name]
    for job in jobs:
        algorithm = Path(job.command[0]).stem.split("_")[0]
        shared, fixed = (f"__{algorithm}-{v}__" in job.run_dir.name for v in ("shared", "fixed"))
        assert getattr(job.args, "share_param", False) == shared
        assert getattr(job.args, "fixed_order", False) == fixed
        steps = 500_000 if (name, algorithm) == ("figure3", "maddpg") else 1_000_000
        assert job.args.total_timesteps == steps and job.args.num_threads == 1
        assert job.args.eval_interval == 50_000 and job.args.eval_episodes == 20
    # The tutorial's length, in a comment; these flags of all jobs override [[extra]].
    (flags,) = re.findall('--flags="(.+)"', job_file.read_text())
    for job in runner.read_jobs(job_file, tmp_path, flags):
        assert job.args.total_timesteps == 10_000_000
        assert job.args.eval_interval == 100_000 and job.args.eval_episodes == 40
