"""From runs to small CSV files, and from these to figures, tables and comparisons.

    python benchmark/plot.py record runs/figure3 benchmark/results/figure3          # TensorBoard logs to CSV
    python benchmark/plot.py figure benchmark/results/figure3                       # writes figure.png, hours.png there
    python benchmark/plot.py table benchmark/results/figure3                        # prints Markdown
    python benchmark/plot.py aggregate benchmark/results/figure3                    # over tasks; the same
    python benchmark/plot.py compare benchmark/results/figure3 MY_RESULTS           # do mine differ from the reference?
    python benchmark/plot.py seconds benchmark/results/figure3 --env-id HalfCheetah-6x1 --target 3000
    python benchmark/plot.py models runs/figure3 benchmark/results/figure3 models   # copies the best ones

A run is a directory <env id>__<algorithm>__<seed>, beside which run.py wrote its starts (.jsonl); its record is the CSV
of that name, and a line in runs.jsonl.
Figures, tables and comparisons read only these records.
"""

import csv
import json
import re
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import tyro
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLUMNS = "step", "seconds", "train_return", "eval_return", "steps_per_second"
BIN, MAX_ROWS = 10_000, 200  # a row averages so many steps, or a multiple of them in runs that would need more rows
FIGURE3 = tomllib.loads(Path(__file__).with_name("figure3.toml").read_text())
TASKS, ALGORITHMS = FIGURE3["env_ids"], FIGURE3["algorithms"]  # their order in figures and tables
PAIRS = [("happo", "mappo"), ("hatrpo", "happo"), ("happo", "ippo")]  # is the first better?
RESAMPLES = 10_000
RUN_NAME = re.compile(r"((?:(?!__).)+)__((?:(?!__).)+)__(\d+)")
Directory = Annotated[Path, tyro.conf.Positional]


def usage_error(message: object) -> NoReturn:
    """Say in one line what is wrong, and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Run:
    """What is recorded of a run; the columns are arrays of one length, NaN where nothing was measured."""

    env_id: str
    algorithm: str
    seed: int
    columns: dict[str, np.ndarray]

    @property
    def final_return(self) -> float:
        """Mean return of the last evaluation, NaN if there was none."""
        evaluations = self.columns["eval_return"]
        return float(np.append(np.nan, evaluations[np.isfinite(evaluations)])[-1])


def read_log(run_dir: Path) -> dict[str, np.ndarray]:
    """The columns of a run from its TensorBoard log: a row per `BIN` steps, at the bin's end; ValueError without a log.

    `seconds` is the time spent in training, from `charts/SPS`, which counts steps and time since the latest start: it
    is summed over the starts, without what a kill undid. `steps_per_second` is the speed within the bin.
    """
    if not any(run_dir.glob("events*")):
        raise ValueError(f"{run_dir} has no log")
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0}).Reload()

    def points(tag: str) -> tuple[np.ndarray, np.ndarray]:
        events = log.Scalars(tag) if tag in log.Tags()["scalars"] else []
        return np.array([e.step for e in events]), np.array([e.value for e in events])

    steps, speeds = points("charts/SPS")
    if not len(steps):
        raise ValueError(f"{run_dir} has no log")
    width = BIN * int(np.ceil(steps[-1] / (BIN * MAX_ROWS)))
    ends = np.append(np.arange(width, steps[-1], width), steps[-1])

    def binned(tag: str) -> np.ndarray:
        at, values = points(tag)
        bins = np.searchsorted(ends, at)
        return np.array([values[bins == b].mean() if (bins == b).any() else np.nan for b in range(len(ends))])

    texts = log.Tensors("args/text_summary") if "args/text_summary" in log.Tags()["tensors"] else []
    starts = np.unique([0, *(text.step for text in texts)])  # the scripts log their arguments at every start
    last_start = starts[np.searchsorted(starts, steps) - 1]
    since = (steps - last_start) / speeds
    again = np.diff(last_start, prepend=last_start[0]) > 0
    seconds = np.interp(ends, steps, np.cumsum(np.diff(since, prepend=0) + again * np.roll(since, 1)))
    speed = np.diff(ends, prepend=0) / np.maximum(np.diff(seconds, prepend=0), 1e-9)
    columns = ends.astype(float), seconds, binned("charts/episodic_return"), binned("eval/episodic_return"), speed
    return dict(zip(COLUMNS, columns, strict=True))


def record(runs: Directory, results: Directory) -> None:
    """Write the CSV of each run below a directory and its description, beside those of earlier runs that are there.

    A usage error if there are no runs.
    """
    described = {}
    for path in sorted(runs.glob("*.jsonl")):
        run_dir = path.with_suffix("")
        try:
            if not RUN_NAME.fullmatch(run_dir.name):
                raise ValueError(f"{run_dir} is not named <env id>__<algorithm>__<seed>")
            columns = read_log(run_dir)
        except ValueError as e:
            print(f"left out: {e}", file=sys.stderr)
            continue
        results.mkdir(parents=True, exist_ok=True)
        with open(results / f"{run_dir.name}.csv", "w", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(COLUMNS)
            rows = zip(*columns.values(), strict=True)
            writer.writerows([f"{x:.0f}" if i == 0 else f"{x:.6g}" for i, x in enumerate(row)] for row in rows)
        starts = [json.loads(line) for line in path.read_text().splitlines()]
        described[run_dir.name] = json.dumps({"run": run_dir.name, "starts": len(starts)} | starts[-1])
    if not described:
        usage_error(f"{runs} has no runs with a log")
    lines = results.joinpath("runs.jsonl").read_text().splitlines() if (results / "runs.jsonl").exists() else []
    described = {json.loads(line)["run"]: line for line in lines} | described
    (results / "runs.jsonl").write_text("".join(line + "\n" for _, line in sorted(described.items())))
    print(f"{len(described)} runs are recorded in {results}")


def load(results: Path) -> dict[tuple[str, str], list[Run]]:
    """The recorded runs of a directory by environment and algorithm, in figure 3's order."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for path in sorted(results.glob("*.csv")):
        name = RUN_NAME.fullmatch(path.stem)
        if not name:
            continue
        env_id, algorithm, seed = name.groups()
        table = np.genfromtxt(path, delimiter=",", names=True)
        run = Run(env_id, algorithm, int(seed), {name: np.atleast_1d(table[name]) for name in table.dtype.names})
        groups.setdefault((env_id, algorithm), []).append(run)
    if not groups:
        usage_error(f"{results} has no recorded runs")
    return dict(sorted(groups.items(), key=lambda item: (rank(item[0][0]), rank(item[0][1]))))


def final_returns(runs: list[Run]) -> np.ndarray:
    """The last evaluations of the runs that had one."""
    scores = np.array([run.final_return for run in runs])
    return scores[np.isfinite(scores)]


def rank(name: str) -> tuple[int, str]:
    """Sorts algorithms as in `ALGORITHMS`, variants after theirs, and tasks as in `TASKS`; others come last."""
    known = [*ALGORITHMS, *TASKS]
    base = name if name in TASKS else name.split("-")[0]
    return known.index(base) if base in known else len(known), name


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis (Agarwal et al. 2021, arXiv 2108.13264; `rliable`'s aggregate_iqm).

    A quarter of the scores, rounded down, goes at either end: of three or fewer none, so that it is their mean.
    """
    return stats.trim_mean(scores, 0.25, axis=-1)


def confidence_interval(*tasks: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval, stratified by task, of the interquartile mean over runs [n] (Agarwal et al. 2021).

    With few runs it is too narrow: of normal scores on one task, 95% intervals of 3, 5 and 10 runs contain the true
    mean in 76%, 90% and 93% of the cases.
    """
    rng = np.random.default_rng(seed)
    resampled = np.concatenate([rng.choice(scores, (RESAMPLES, len(scores))) for scores in tasks], axis=-1)
    low, high = np.percentile(interquartile_mean(resampled), [2.5, 97.5])
    return float(low), float(high)


def improvement(tasks: list[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> tuple[float, float, float]:
    """Probability that a run of x [n] is above one of y [m], mean over tasks, and its 95% interval (Agarwal et al.).

    A tie counts half. The bootstrap is stratified by task and algorithm; of runs that do not overlap it gives a point.
    """

    def above(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return 0.5 + np.sign(x[..., :, None] - y[..., None, :]).mean(axis=(-2, -1)) / 2

    rng = np.random.default_rng(seed)
    resampled = [above(*(rng.choice(scores, (RESAMPLES, len(scores))) for scores in task)) for task in tasks]
    low, high = np.percentile(np.mean(resampled, axis=0), [2.5, 97.5])
    return float(np.mean([above(*task) for task in tasks])), float(low), float(high)


def table(results: Directory) -> None:
    """Print what the runs reached at their end, and what `published.csv` has of their task and algorithm.

    The paper's returns are read off its plot; both are at 10 million steps of the v2 tasks, which differ from v5, those
    of Ant and Humanoid most. A range is as given; "shared" are parameters.
    """
    with open(Path(__file__).with_name("published.csv"), newline="") as f:
        published = {(row["task"], row["algorithm"], row["source"]): row["return"] for row in csv.DictReader(f)}
    print("| task | algorithm | seeds | mean | IQM (95% interval) | lowest, highest | steps ", end="")
    print("| ICLR 2022, 10M steps, v2 | HARL, 10M steps, v2 |\n" + "|---" * 9 + "|")
    for (env_id, algorithm), runs in load(results).items():
        scores, words = final_returns(runs), "0 | not evaluated yet" + " |" * 3
        if len(scores):
            low, high = confidence_interval(scores)
            steps = np.median([run.columns["step"][-1] for run in runs])
            words = f"{len(scores)} | {scores.mean():.0f} | {interquartile_mean(scores):.0f} ({low:.0f} to {high:.0f})"
            words += f" | {scores.min():.0f}, {scores.max():.0f} | {steps:,.0f}"
        paper, harl = (published.get((env_id, algorithm, source), "") for source in ("ICLR 2022", "HARL"))
        print(f"| {env_id} | {algorithm.upper()} | {words} | {paper} | {harl} |")


def seconds(results: Directory, env_id: str, target: float) -> None:
    """Print at how many seconds the training return of a row first is a target: median [lowest to highest seed].

    "-" if a seed never gets there.
    """
    groups = {algorithm: runs for (task, algorithm), runs in load(results).items() if task == env_id}
    if not groups:
        usage_error(f"{results} has no runs of {env_id}")
    for algorithm, runs in groups.items():
        there = [run.columns["seconds"][run.columns["train_return"] >= target] for run in runs]
        first = [at[0] for at in there if len(at)]
        words = f"{np.median(first):.0f} [{min(first):.0f} to {max(first):.0f}]" if len(first) == len(runs) else "-"
        print(f"{algorithm.upper()}: {words}")


def models(runs: Directory, results: Directory, directory: Directory) -> None:
    """Copy model.pt of HAPPO's and HATRPO's best seeds, by their recorded last evaluation: <algorithm>-<env id>.pt."""
    total = 0
    for (env_id, algorithm), group in load(results).items():
        best = max(group, key=lambda run: np.nan_to_num(run.final_return, nan=-np.inf))
        if algorithm not in ("happo", "hatrpo") or np.isnan(best.final_return):
            continue
        source, target = runs / f"{env_id}__{algorithm}__{best.seed}/model.pt", directory / f"{algorithm}-{env_id}.pt"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except OSError as e:
            usage_error(f"{source} to {target}: {e.strerror}")
        total += (size := target.stat().st_size)
        print(f"{target}: return {best.final_return:.0f}, seed {best.seed}, {size:,} bytes")
    print(f"{total:,} bytes in all")


def aggregate(results: Directory, algorithms: tuple[str, ...] = ()) -> None:
    """Print what Agarwal et al. (2021, arXiv 2108.13264) take over tasks, of the last evaluations of all `algorithms`.

    For the interquartile mean, 0 and 1 are the lowest and the highest of a task's recorded runs. Their `rliable` 1.2.0
    does the same, but the `arch` that it needs cannot be imported beside pandas 3.
    """
    groups = load(results)
    scores = {key: final_returns(runs) for key, runs in groups.items() if len(final_returns(runs))}
    env_ids = list(dict.fromkeys(env_id for env_id, _ in scores))
    names = sorted(algorithms or {algorithm for _, algorithm in scores}, key=rank)

    def with_equal_seeds(*names: str) -> list[str]:  # and more than one
        seeds = {env_id: [len(scores.get((env_id, name), ())) for name in names] for env_id in env_ids}
        return [env_id for env_id, (first, *others) in seeds.items() if first > 1 and {first} >= set(others)]

    if not (common := with_equal_seeds(*names)):
        usage_error(f"{results} has no task with equally many evaluated seeds, two or more, of {', '.join(names)}")
    every = {env_id: np.concatenate([scores[env_id, name] for name in names]) for env_id in common}
    print(f"Over {len(common)} of {len(env_ids)} tasks, those with equally many seeds of all: {', '.join(common)}.")
    print("Scores: last evaluations, scaled per task: of all its runs the lowest has 0 and the highest 1.\n")
    print("| algorithm | runs | median steps | IQM (95% interval) |\n|---|---|---|---|")
    for name in names:
        scaled = [(scores[e, name] - every[e].min()) / (np.ptp(every[e]) or 1) for e in common]
        mean, (low, high) = interquartile_mean(np.concatenate(scaled)), confidence_interval(*scaled)
        steps = np.median([run.columns["step"][-1] for e in common for run in groups[e, name]])
        words = f"{sum(map(len, scaled))} | {steps:,.0f} | {mean:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {name.upper()} | {words} |")
    print("\n| | tasks with both | probability of improvement (95% interval) |\n|---|---|---|")
    for x, y in PAIRS + [(name, name.split("-")[0]) for name in names if "-" in name]:
        if tasks := [(scores[e, x], scores[e, y]) for e in with_equal_seeds(x, y)]:
            p, low, high = improvement(tasks)
            print(f"| {x.upper()} over {y.upper()} | {len(tasks)} | {p:.2f} ({low:.2f} to {high:.2f}) |")


def curve(runs: list[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Million steps [n], mean hours [n] and evaluation returns [seeds, n] where the shortest run was evaluated."""
    both = [np.array([run.columns["step"], run.columns["eval_return"]]) for run in runs]
    points = [columns[:, np.isfinite(columns[1])] for columns in both]
    steps = min((x for x, _ in points), key=lambda x: x[-1])
    steps = steps[steps >= max(x[0] for x, _ in points)]
    seconds = [np.interp(steps, run.columns["step"], run.columns["seconds"]) for run in runs]
    return steps / 1e6, np.mean(seconds, axis=0) / 3600, np.array([np.interp(steps, x, y) for x, y in points])


def figure(results: Directory) -> None:
    """Draw the evaluation return of each task: against steps in `figure.png`, against hours in `hours.png`.

    Colours are algorithms; variants of one (<algorithm>-<variant>) differ in their dashes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    groups = {key: runs for key, runs in load(results).items() if len(final_returns(runs)) == len(runs)}
    if not groups:
        usage_error(f"{results} has no evaluations")
    env_ids = list(dict.fromkeys(env_id for env_id, _ in groups))
    names = sorted({algorithm for _, algorithm in groups}, key=rank)
    seeds = " to ".join(str(n) for n in sorted({f(map(len, groups.values())) for f in (min, max)}))
    columns = min(3, len(env_ids))
    rows = -(-len(env_ids) // columns)
    for axis, (file, label) in enumerate({"figure": "million environment steps", "hours": "hours of training"}.items()):
        size = 2 + 3.2 * columns, 1.5 + 2.4 * rows
        fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        lines = {}
        for (env_id, algorithm), runs in groups.items():
            ax, color = axes.flat[env_ids.index(env_id)], f"C{rank(algorithm)[0]}"
            siblings = [name for name in names if rank(name)[0] == rank(algorithm)[0]]
            style = ("-", "--", ":", "-.")[siblings.index(algorithm) % 4]
            *xs, returns = curve(runs)
            (lines[algorithm],) = ax.plot(xs[axis], returns.mean(axis=0), style, color=color)
            ax.fill_between(xs[axis], returns.min(axis=0), returns.max(axis=0), color=color, alpha=0.15, linewidth=0)
            ax.set_title(env_id, fontsize="medium")
            ax.grid(alpha=0.3)
        for ax in axes.flat[len(env_ids) :]:
            ax.remove()
        fig.supylabel("return of deterministic evaluation", fontsize="medium")
        fig.supxlabel(f"{label}\n(line: mean over {seeds} seeds; band: lowest to highest seed)", fontsize="medium")
        handles, labels = [lines[name] for name in names], [name.upper() for name in names]
        fig.legend(handles, labels, loc="outside upper center", ncols=2 * columns, frameon=False)
        fig.savefig(path := results / f"{file}.png")
        Image.open(path).convert("RGB").quantize(128).save(path)  # a third of the bytes
        print(path)


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


def compare(reference: Directory, mine: Directory) -> bool:
    """Print for what both sets have whether the final returns differ by more than the noise; return whether some do.

    Decided by Welch's interval of the means (of three runs the interquartile mean is the same): between twice three
    equal normal scores it sees a difference in 3% of the cases, the bootstrap's interval in 18%.
    """
    a, b, verdicts = load(reference), load(mine), []
    common = [key for key in a if key in b]
    if not common:
        usage_error("the two have no environment and algorithm in common")
    for key in common:
        scores, name = [final_returns(runs) for runs in (a[key], b[key])], " ".join(key)
        if len(steps := {int(run.columns["step"][-1]) for run in a[key] + b[key]}) > 1:
            print(f"{name}: not compared: the runs have from {min(steps):,} to {max(steps):,} steps")
            continue
        if min(map(len, scores)) < 2:
            print(f"{name}: fewer than two runs say nothing about the noise: {scores[0]}, {scores[1]}")
            continue
        change, low, high, p = difference(*scores)
        verdicts.append(low > 0 or high < 0)
        words = "DIFFERENT" if verdicts[-1] else "within the noise"
        n = " against ".join(str(len(s)) for s in reversed(scores))
        # With so many runs, a difference smaller than half the interval's width is not seen.
        noise = f"noise +-{(high - low) / 2:.0f}"
        print(f"{name}: {words}: {change:+.0f} ({low:+.0f} to {high:+.0f}, {noise}), permutation p {p:.2f}, {n} runs")
    if len(verdicts) > 1:
        print(f"{sum(verdicts)} of {len(verdicts)} differ; by chance alone about {0.05 * len(verdicts):.1f} would")
    return any(verdicts)


def main() -> None:
    """Command line; `compare` exits with 1 if something differs."""
    commands = record, figure, table, seconds, aggregate, compare, models
    names = {command.__name__: command for command in commands}
    sys.exit(tyro.extras.subcommand_cli_from_dict(names, description=__doc__))


if __name__ == "__main__":
    main()
