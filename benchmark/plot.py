"""From runs to small CSV files, and from these to figures, tables and comparisons.

    python benchmark/plot.py record runs/halfcheetah benchmark/results/halfcheetah  # TensorBoard logs to CSV
    python benchmark/plot.py figure benchmark/results/halfcheetah                   # writes figure.png beside them
    python benchmark/plot.py table benchmark/results/halfcheetah                    # prints Markdown
    python benchmark/plot.py compare benchmark/results/halfcheetah MY_RESULTS       # do mine differ from the reference?

A run is a directory <env id>__<algorithm>__<seed>; its record is the CSV of that name, and a line in runs.jsonl.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLUMNS = "step", "seconds", "train_return", "eval_return"
BIN = 10_000  # training returns are averaged over that many steps
ALGORITHMS = "hatrpo", "happo", "mappo", "ippo", "maddpg"  # their order in figures and tables
RESAMPLES = 10_000


@dataclass
class Run:
    """What is recorded of a run; the columns are arrays of one length, NaN where nothing was measured."""

    env_id: str
    algorithm: str
    seed: int
    columns: dict[str, np.ndarray]

    @property
    def final_return(self) -> float:
        """Mean return of the last evaluation."""
        evaluations = self.columns["eval_return"]
        return float(evaluations[np.isfinite(evaluations)][-1])

    @property
    def seconds(self) -> float:
        """Duration of the training, without evaluations."""
        return float(self.columns["seconds"][-1])


def read_log(run_dir: Path) -> dict[str, np.ndarray]:
    """The columns of a run from its TensorBoard log: a row per `BIN` steps, at the bin's end.

    `seconds` is the time spent in training, from the step count and `charts/SPS`; it goes on where a run was resumed.
    """
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()

    def points(tag: str) -> tuple[np.ndarray, np.ndarray]:
        events = log.Scalars(tag) if tag in log.Tags()["scalars"] else []
        return np.array([e.step for e in events]), np.array([e.value for e in events])

    steps, speeds = points("charts/SPS")
    if not len(steps):
        raise ValueError(f"{run_dir} has no log")
    ends = np.unique(np.append(np.arange(BIN, steps[-1], BIN), steps[-1]))

    def binned(tag: str) -> np.ndarray:
        at, values = points(tag)
        bins = np.searchsorted(ends, at)
        return np.array([values[bins == b].mean() if (bins == b).any() else np.nan for b in range(len(ends))])

    seconds = np.interp(ends, steps, steps / speeds)
    columns = ends.astype(float), seconds, binned("charts/episodic_return"), binned("eval/episodic_return")
    return dict(zip(COLUMNS, columns, strict=True))


def record(runs: Path, results: Path) -> None:
    """Write the CSV of each run below a directory, and all their descriptions."""
    results.mkdir(parents=True, exist_ok=True)
    described = []
    for run_dir in sorted(path.parent for path in runs.glob("*/run.jsonl")):
        columns = read_log(run_dir)
        with open(results / f"{run_dir.name}.csv", "w", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(COLUMNS)
            rows = zip(*columns.values(), strict=True)
            writer.writerows([f"{x:.0f}" if i == 0 else f"{x:.1f}" for i, x in enumerate(row)] for row in rows)
        starts = [json.loads(line) for line in (run_dir / "run.jsonl").read_text().splitlines()]
        described.append({"run": run_dir.name, "starts": len(starts)} | starts[-1])
    (results / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in described))
    print(f"{len(described)} runs recorded in {results}")


def load(results: Path) -> dict[tuple[str, str], list[Run]]:
    """The recorded runs of a directory by environment and algorithm, in the order of the seeds."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for path in sorted(results.glob("*__*__*.csv")):
        env_id, algorithm, seed = path.stem.rsplit("__", 2)
        table = np.genfromtxt(path, delimiter=",", names=True)
        run = Run(env_id, algorithm, int(seed), {name: np.atleast_1d(table[name]) for name in COLUMNS})
        groups.setdefault((env_id, algorithm), []).append(run)
    if not groups:
        raise SystemExit(f"error: {results} has no recorded runs")
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], rank(item[0][1]))))


def rank(algorithm: str) -> tuple[int, str]:
    """Sorts algorithms as in `ALGORITHMS`; variants come after theirs."""
    name = algorithm.split("-")[0]
    return ALGORITHMS.index(name) if name in ALGORITHMS else len(ALGORITHMS), algorithm


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis (Agarwal et al. 2021, arXiv 2108.13264; `rliable`'s aggregate_iqm).

    A quarter of the scores, rounded down, goes at either end: of three or fewer none, so that it is their mean.
    """
    return stats.trim_mean(scores, 0.25, axis=-1)


def confidence_interval(scores: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of the interquartile mean over runs [n] (Agarwal et al. 2021)."""
    resampled = np.random.default_rng(seed).choice(scores, (RESAMPLES, len(scores)))
    low, high = np.percentile(interquartile_mean(resampled), [2.5, 97.5])
    return float(low), float(high)


def table(results: Path) -> None:
    """Print what the runs reached at their end."""
    print("| task | algorithm | seeds | mean | IQM (95% interval) | lowest, highest | steps | steps/s | hours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (env_id, algorithm), runs in load(results).items():
        scores = np.array([run.final_return for run in runs])
        low, high = confidence_interval(scores)
        steps = np.array([run.columns["step"][-1] for run in runs])
        seconds = np.array([run.seconds for run in runs])
        columns = [
            env_id,
            algorithm.upper(),
            str(len(runs)),
            f"{scores.mean():.0f}",
            f"{interquartile_mean(scores):.0f} ({low:.0f} to {high:.0f})",
            f"{scores.min():.0f}, {scores.max():.0f}",
            f"{np.median(steps):,.0f}",
            f"{np.median(steps / seconds):.0f}",
            f"{np.median(seconds) / 3600:.2f}",
        ]
        print(f"| {' | '.join(columns)} |")


def figure(results: Path) -> None:
    """Draw `figure.png`: training return against steps and hours; line: mean over seeds, band: lowest to highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = load(results)
    env_ids = list(dict.fromkeys(env_id for env_id, _ in groups))
    fig, axes = plt.subplots(len(env_ids), 2, figsize=(10, 3.6 * len(env_ids)), squeeze=False, layout="constrained")
    for (env_id, algorithm), runs in groups.items():
        row, color = axes[env_ids.index(env_id)], f"C{rank(algorithm)[0]}"
        steps = min((run.columns["step"] for run in runs), key=len)
        returns = np.array([np.interp(steps, *finite(run, "step", "train_return")) for run in runs])
        hours = np.mean([np.interp(steps, run.columns["step"], run.columns["seconds"]) for run in runs], axis=0) / 3600
        for ax, x in zip(row, (steps / 1e6, hours), strict=True):
            ax.plot(x, returns.mean(axis=0), color=color, label=f"{algorithm.upper()} ({len(runs)})")
            ax.fill_between(x, returns.min(axis=0), returns.max(axis=0), color=color, alpha=0.15, linewidth=0)
    for env_id, row in zip(env_ids, axes, strict=True):
        row[0].set(title=env_id, xlabel="million environment steps", ylabel="training return")
        row[1].set(title=env_id, xlabel="hours of training")
        row[0].legend(frameon=False)
        for ax in row:
            ax.grid(alpha=0.3)
    fig.savefig(results / "figure.png", dpi=110)
    print(results / "figure.png")


def finite(run: Run, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns where the second was measured."""
    there = np.isfinite(run.columns[y])
    return run.columns[x][there], run.columns[y][there]


def difference(reference: np.ndarray, mine: np.ndarray, seed: int = 0) -> tuple[float, float, float, float]:
    """Difference of two sets of scores [n], [m]: of the means, its 95% Welch interval, and the exact permutation p.

    With n = m = 3 there are 20 ways to split the scores, so that p is never below 0.1: such a comparison can only
    find that the sets do not overlap. The interval assumes normal scores.
    """
    welch = stats.ttest_ind(mine, reference, equal_var=False)
    interval = welch.confidence_interval(0.95)
    permutation = stats.permutation_test(
        (mine, reference), lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis), vectorized=True, rng=seed
    )
    return float(mine.mean() - reference.mean()), float(interval.low), float(interval.high), float(permutation.pvalue)


def compare(reference: Path, mine: Path) -> bool:
    """Print for what both sets have whether the final returns differ by more than the noise; return whether some do."""
    a, b, different = load(reference), load(mine), False
    common = [key for key in a if key in b]
    if not common:
        raise SystemExit("error: the two have no environment and algorithm in common")
    for key in common:
        scores = [np.array([run.final_return for run in runs]) for runs in (a[key], b[key])]
        if min(map(len, scores)) < 2:
            print(f"{' '.join(key)}: one run each says nothing about the noise: {scores[0]}, {scores[1]}")
            continue
        change, low, high, p = difference(*scores)
        beyond = low > 0 or high < 0
        different |= beyond
        words = "DIFFERENT" if beyond else "within the noise"
        n = " against ".join(str(len(s)) for s in reversed(scores))
        print(f"{' '.join(key)}: {words}: {change:+.0f} ({low:+.0f} to {high:+.0f}), permutation p {p:.2f}, {n} runs")
    return different


def main() -> None:
    """Command line; `compare` exits with 1 if something differs."""
    directory = Annotated[Path, tyro.conf.Positional]

    def record_command(runs: directory, results: directory) -> None:
        record(runs, results)

    def figure_command(results: directory) -> None:
        figure(results)

    def table_command(results: directory) -> None:
        table(results)

    def compare_command(reference: directory, mine: directory) -> None:
        sys.exit(compare(reference, mine))

    commands = {"record": record_command, "figure": figure_command, "table": table_command, "compare": compare_command}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)


if __name__ == "__main__":
    main()
