"""From runs to small CSV files, and from these to figures, tables and comparisons.

    python benchmark/plot.py record runs/figure3 benchmark/results/figure3          # TensorBoard logs to CSV
    python benchmark/plot.py figure benchmark/results/figure3                       # writes figure.png, hours.png there
    python benchmark/plot.py table benchmark/results/figure3                        # prints Markdown
    python benchmark/plot.py aggregate benchmark/results/figure3                    # the same, over tasks
    python benchmark/plot.py compare benchmark/results/figure3 MY_RESULTS           # do mine differ from the reference?
    python benchmark/plot.py noise benchmark/results/figure3                        # how many seeds a comparison needs
    python benchmark/plot.py seconds benchmark/results/figure3 --env-id HalfCheetah-6x1 --target 3000
    python benchmark/plot.py models runs/figure3 benchmark/results/figure3 models   # copies the best ones

A run is a directory <env id>__<algorithm>__<seed>, beside which run.py wrote its starts (.jsonl); its record is the CSV
of that name, and a line in runs.jsonl. Figures, tables and comparisons read only these records.
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
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

COLUMNS = "step", "seconds", "train_return", "eval_return", "steps_per_second"
BIN = 10_000  # steps that a row averages; in a run that would need more than MAX_ROWS a multiple of it
MAX_ROWS = 100
FIGURE3 = tomllib.loads(Path(__file__).with_name("figure3.toml").read_text())
TASKS, ALGORITHMS = FIGURE3["env_ids"], FIGURE3["algorithms"]  # their order in figures and tables
PAIRS = [("happo", "mappo"), ("hatrpo", "happo"), ("happo", "ippo")]  # is the first better?
RESAMPLES = 10_000
RUN_NAME = re.compile(r"((?:(?!__).)+)__((?:(?!__).)+)__(\d+)")
Directory = Annotated[Path, tyro.conf.Positional]


def usage_error(message: object) -> NoReturn:
    """Say in one line what is wrong, and exit with code 2."""
    words = " ".join(str(message).splitlines())
    print(f"error: {words}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Run:
    """The record of a run; the columns are arrays of one length, NaN where nothing was measured."""

    env_id: str
    algorithm: str
    seed: int
    columns: dict[str, np.ndarray]

    @property
    def final_return(self) -> float:
        """Mean return of the last evaluation, NaN if there was none."""
        evaluations = self.columns["eval_return"]
        return float(np.append(np.nan, evaluations[np.isfinite(evaluations)])[-1])


def read_starts(run_dir: Path) -> np.ndarray:
    """The steps, ascending, at which a run was started or resumed.

    Each start has an event file, in which the script's SummaryWriter first writes its `purge_step`: one step later.
    """
    starts = {0}
    for path in run_dir.glob("events*"):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log"):
                starts.add(event.step - 1)
                break
    return np.array(sorted(starts))


def read_log(run_dir: Path) -> dict[str, np.ndarray]:
    """The columns of a run from its TensorBoard log, a row per `BIN` steps, at the bin's end.

    `seconds` is the time spent in training, from `charts/SPS`, which counts steps and time since the latest start: it
    is summed over the starts, without the steps that a kill undid. `steps_per_second` is the speed within the bin.
    Raises ValueError without a log.
    """
    if not any(run_dir.glob("events*")):
        raise ValueError(f"{run_dir} has no log")
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()

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
        means = np.full(len(ends), np.nan)
        for b in np.unique(bins):
            means[b] = values[bins == b].mean()
        return means

    starts = read_starts(run_dir)
    last_start = starts[np.searchsorted(starts, steps) - 1]
    since = (steps - last_start) / speeds
    again = np.diff(last_start, prepend=last_start[0]) > 0
    taken = np.diff(since, prepend=0) + again * np.roll(since, 1)
    seconds = np.interp(ends, steps, np.cumsum(taken))
    return {
        "step": ends.astype(float),
        "seconds": seconds,
        "train_return": binned("charts/episodic_return"),
        "eval_return": binned("eval/episodic_return"),
        "steps_per_second": np.diff(ends, prepend=0)
        / np.maximum(np.diff(seconds, prepend=0), 1e-9),
    }


def read_descriptions(path: Path) -> list[dict]:
    """What `run.py` wrote of each start of a run; raises ValueError if a line is cut or there is none."""
    try:
        starts = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as e:
        raise ValueError(f"{path} has a line that cannot be read: {e}") from None
    if not starts or not all(isinstance(start, dict) for start in starts):
        raise ValueError(f"{path} describes no start of a run")
    return starts


def record(runs: Directory, results: Directory) -> None:
    """Write the CSV and the description of each run in a directory; the records of other runs stay.

    Exits with a usage error, before it writes anything, if there are no runs or runs.jsonl is damaged.
    """
    file = results / "runs.jsonl"
    try:
        lines = file.read_text().splitlines() if file.exists() else []
        described = {RUN_NAME.fullmatch(json.loads(line)["run"])[0]: line for line in lines}
    except OSError as e:
        usage_error(f"{file}: {e.strerror}")
    except (KeyError, TypeError, ValueError):
        usage_error(f"{file} has a line that describes no run")
    found = {}
    for path in sorted(runs.glob("*.jsonl")):
        run_dir = path.with_suffix("")
        try:
            if not RUN_NAME.fullmatch(run_dir.name):
                raise ValueError(f"{run_dir} is not named <env id>__<algorithm>__<seed>")
            found[run_dir.name] = read_descriptions(path), read_log(run_dir)
        except (OSError, ValueError) as e:
            print(f"left out: {e}", file=sys.stderr)
    if not found:
        usage_error(f"{runs} has no runs with a log")
    try:
        results.mkdir(parents=True, exist_ok=True)
        for name, (starts, columns) in found.items():
            with open(results / f"{name}.csv", "w", newline="") as f:
                writer = csv.writer(f, lineterminator="\n")
                writer.writerow(COLUMNS)
                for step, *others in zip(*columns.values(), strict=True):
                    writer.writerow([f"{step:.0f}", *(f"{x:.6g}" for x in others)])
            description = {"run": name, "starts": len(starts)} | starts[-1]
            described[name] = json.dumps(description)
        file.write_text("".join(line + "\n" for _, line in sorted(described.items())))
    except OSError as e:
        usage_error(f"{e.filename}: {e.strerror}")
    print(f"{len(described)} runs are recorded in {results}")


def read_record(path: Path) -> dict[str, np.ndarray]:
    """The columns of a CSV file that `record` wrote; raises ValueError for another file."""
    with open(path, newline="") as f:
        header, *rows = list(csv.reader(f)) or [[]]
    if tuple(header) != COLUMNS:
        raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
    if not rows or any(len(row) != len(COLUMNS) for row in rows):
        raise ValueError(f"it has no rows, or one without {len(COLUMNS)} numbers")
    table = np.array(rows, dtype=float)
    steps = table[:, 0]
    if not np.isfinite(steps).all() or (np.diff(steps, prepend=0) <= 0).any():
        raise ValueError("its steps do not ascend from 0")
    return dict(zip(COLUMNS, table.T, strict=True))


def load(results: Path, steps: float = np.inf) -> dict[tuple[str, str], list[Run]]:
    """The recorded runs of a directory by environment and algorithm, in figure 3's order; of each its first `steps`."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for path in sorted(results.glob("*.csv")):
        name = RUN_NAME.fullmatch(path.stem)
        if not name:
            continue
        env_id, algorithm, seed = name.groups()
        try:
            columns = read_record(path)
        except (OSError, ValueError, csv.Error) as e:
            usage_error(f"{path} is no record of a run: {e}")
        early = columns["step"] <= steps
        if not early.any():
            usage_error(f"{path} begins after step {steps:,.0f}")
        columns = {name: values[early] for name, values in columns.items()}
        run = Run(env_id, algorithm, int(seed), columns)
        groups.setdefault((env_id, algorithm), []).append(run)
    if not groups:
        usage_error(f"{results} has no recorded runs")
    return dict(sorted(groups.items(), key=lambda item: (rank(item[0][0]), rank(item[0][1]))))


def final_returns(runs: list[Run]) -> np.ndarray:
    """The last evaluations of the runs that had one."""
    scores = np.array([run.final_return for run in runs])
    return scores[np.isfinite(scores)]


def rank(name: str) -> tuple[int, str]:
    """Sort key: algorithms as in `ALGORITHMS`, a variant after its algorithm, tasks as in `TASKS`; others come last."""
    known = [*ALGORITHMS, *TASKS]
    base = name if name in TASKS else name.split("-")[0]
    return known.index(base) if base in known else len(known), name


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis (Agarwal et al. 2021, arXiv 2108.13264; `rliable`'s aggregate_iqm).

    A quarter of the scores, rounded down, is left out at either end. Of three or fewer that is none: it is their mean.
    """
    return stats.trim_mean(scores, 0.25, axis=-1)


def confidence_interval(*tasks: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval, stratified by task, of the interquartile mean over runs [n] (Agarwal et al. 2021).

    With few runs it is too narrow: of normal scores on one task, 95% intervals of 3, 5 and 10 runs contain the true
    mean in 76%, 90% and 93% of the cases.
    """
    rng = np.random.default_rng(seed)
    resampled = [rng.choice(scores, (RESAMPLES, len(scores))) for scores in tasks]
    means = interquartile_mean(np.concatenate(resampled, axis=-1))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def share_above(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of the pairs of a score of x [..., n] and one of y [..., m] in which x's is higher; a tie counts half."""
    return 0.5 + np.sign(x[..., :, None] - y[..., None, :]).mean(axis=(-2, -1)) / 2


def improvement(
    tasks: list[tuple[np.ndarray, np.ndarray]], seed: int = 0
) -> tuple[float, float, float]:
    """Probability that a run of x [n] is above one of y [m], mean over tasks, and its 95% interval (Agarwal et al.).

    The bootstrap is stratified by task and algorithm; if the runs do not overlap, the interval is a point.
    """
    rng = np.random.default_rng(seed)
    resampled = []
    for x, y in tasks:
        xs = rng.choice(x, (RESAMPLES, len(x)))
        ys = rng.choice(y, (RESAMPLES, len(y)))
        resampled.append(share_above(xs, ys))
    low, high = np.percentile(np.mean(resampled, axis=0), [2.5, 97.5])
    probability = np.mean([share_above(x, y) for x, y in tasks])
    return float(probability), float(low), float(high)


def table(results: Directory, steps: float = np.inf) -> None:
    """Print the last evaluations of the runs, and what `published.csv` has of their task and algorithm.

    With `steps` they are the last ones up to that step.
    The paper's returns are read off its plot; both sources have 10 million steps of the v2 tasks, which differ from v5,
    most on Ant and Humanoid. A range is as published; "shared" means shared parameters.
    """
    groups = load(results, steps)
    published = {}
    with open(Path(__file__).with_name("published.csv"), newline="") as f:
        for row in csv.DictReader(f):
            published[row["task"], row["algorithm"], row["source"]] = row["return"]
    header = "| task | algorithm | seeds | mean (lowest to highest) | steps "
    print(header + "| ICLR 2022, 10M steps, v2 | HARL, 10M steps, v2 |")
    print("|---" * 7 + "|")
    for (env_id, algorithm), runs in groups.items():
        scores = final_returns(runs)
        words = "0 | not evaluated yet |"
        if len(scores):
            end = np.median([run.columns["step"][-1] for run in runs])
            words = f"{len(scores)} | {scores.mean():.0f} ({scores.min():.0f} to {scores.max():.0f}) | {end:,.0f}"
        paper = published.get((env_id, algorithm, "ICLR 2022"), "")
        harl = published.get((env_id, algorithm, "HARL"), "")
        print(f"| {env_id} | {algorithm.upper()} | {words} | {paper} | {harl} |")


def seconds(results: Directory, env_id: str, target: float) -> None:
    """Print after how many seconds a row's training return first reaches the target: median [lowest to highest seed].

    It is "-" if a seed never gets there.
    """
    groups = load(results)
    of_task = {algorithm: runs for (task, algorithm), runs in groups.items() if task == env_id}
    if not of_task:
        usage_error(f"{results} has no runs of {env_id}")
    for algorithm, runs in of_task.items():
        there = [run.columns["seconds"][run.columns["train_return"] >= target] for run in runs]
        words = "-"
        if all(map(len, there)):
            first = [at[0] for at in there]
            words = f"{np.median(first):.0f} [{min(first):.0f} to {max(first):.0f}]"
        print(f"{algorithm.upper()}: {words}")


def models(runs: Directory, results: Directory, directory: Directory) -> None:
    """Copy model.pt of HAPPO's and HATRPO's best seeds, by their recorded last evaluation: <algorithm>-<env id>.pt."""
    total = 0
    for (env_id, algorithm), group in load(results).items():
        best = max(group, key=lambda run: np.nan_to_num(run.final_return, nan=-np.inf))
        if algorithm not in ("happo", "hatrpo") or np.isnan(best.final_return):
            continue
        source = runs / f"{env_id}__{algorithm}__{best.seed}/model.pt"
        target = directory / f"{algorithm}-{env_id}.pt"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except OSError as e:
            usage_error(f"{source} to {target}: {e.strerror}")
        size = target.stat().st_size
        total += size
        print(f"{target}: return {best.final_return:.0f}, seed {best.seed}, {size:,} bytes")
    print(f"{total:,} bytes in all")


def aggregate(results: Directory, algorithms: tuple[str, ...] = (), steps: float = np.inf) -> None:
    """Print the statistics over tasks of Agarwal et al. (2021, arXiv 2108.13264), from the runs' last evaluations.

    Of `algorithms`, or of all that have runs; with `steps` from the last evaluations up to that step. For the
    interquartile mean, 0 and 1 are the lowest and the highest score of a task. Their `rliable` 1.2.0 does the same, but
    the `arch` that it needs cannot be imported beside pandas 3.
    """
    groups = load(results, steps)
    scores = {key: final_returns(runs) for key, runs in groups.items() if len(final_returns(runs))}
    env_ids = list(dict.fromkeys(env_id for env_id, _ in scores))
    names = sorted(algorithms or {algorithm for _, algorithm in scores}, key=rank)

    def with_equal_seeds(*names: str) -> list[str]:
        found = []
        for env_id in env_ids:
            seeds = {len(scores.get((env_id, name), ())) for name in names}
            if len(seeds) == 1 and min(seeds) > 1:
                found.append(env_id)
        return found

    common = with_equal_seeds(*names)
    if not common:
        what = "no task with equally many evaluated seeds, two or more, of"
        usage_error(f"{results} has {what} {', '.join(names)}")
    every = {env_id: np.concatenate([scores[env_id, name] for name in names]) for env_id in common}
    tasks = f"{len(common)} of {len(env_ids)} tasks, those with equally many seeds of all"
    print(f"Over {tasks}: {', '.join(common)}.")
    print("Scores are last evaluations, scaled so that a task's lowest is 0 and its highest 1.\n")
    print("| algorithm | runs | median steps | IQM (95% interval) |\n|---|---|---|---|")
    for name in names:
        scaled = [(scores[e, name] - every[e].min()) / (np.ptp(every[e]) or 1) for e in common]
        mean = interquartile_mean(np.concatenate(scaled))
        low, high = confidence_interval(*scaled)
        end = np.median([run.columns["step"][-1] for e in common for run in groups[e, name]])
        words = f"{sum(map(len, scaled))} | {end:,.0f} | {mean:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {name.upper()} | {words} |")
    print("\n| | tasks with both | probability of improvement (95% interval) |\n|---|---|---|")
    compared = []
    for x, y in PAIRS + [(name, name.split("-")[0]) for name in names if "-" in name]:
        if pairs := [(scores[e, x], scores[e, y]) for e in with_equal_seeds(x, y)]:
            compared.append((x, y))
            p, low, high = improvement(pairs)
            words = f"{len(pairs)} | {p:.2f} ({low:.2f} to {high:.2f})"
            print(f"| {x.upper()} over {y.upper()} | {words} |")
    header = " | ".join(f"{x.upper()} over {y.upper()}" for x, y in compared)
    print(f"\nPairs of runs in which the first is above the second:\n\n| task | {header} |")
    print("|---" * (1 + len(compared)) + "|")
    for env_id in env_ids:
        cells = []
        for x, y in compared:
            cell = "-"
            if env_id in with_equal_seeds(x, y):
                count = len(scores[env_id, x]) * len(scores[env_id, y])
                won = count * share_above(scores[env_id, x], scores[env_id, y])
                cell = f"{won:g} of {count}"
            cells.append(cell)
        print(f"| {env_id} | {' | '.join(cells)} |")


def seeds_needed(effect: float, power: float = 0.8) -> int:
    """The smallest n for which a two-sided t-test at 5% of n against n scores finds an effect with this power.

    `effect` is the difference of the means in standard deviations (Cohen 1988, ch. 2: 0.8 needs 26, 0.5 needs 64).
    """
    n = 1
    found = 0.0
    while found < power:
        n += 1
        limit = stats.t.ppf(0.975, 2 * n - 2)
        shift = effect * np.sqrt(n / 2)
        found = stats.nct.sf(limit, 2 * n - 2, shift) + stats.nct.cdf(-limit, 2 * n - 2, shift)
    return n


def noise(
    results: Directory, algorithms: tuple[str, ...] = (), difference_of_means: float = 0.25
) -> None:
    """Print how far the last evaluations of a task's runs scatter, and how many seeds a comparison needs.

    The standard deviation is that of the runs around their algorithm's mean, pooled over `algorithms`, or over all.
    The seeds are those with which a difference of this share of the mean over all runs is found in 80% of the cases.
    """
    of_task: dict[str, list[np.ndarray]] = {}
    for (env_id, algorithm), runs in load(results).items():
        scores = final_returns(runs)
        if len(scores) > 1 and (not algorithms or algorithm in algorithms):
            of_task.setdefault(env_id, []).append(scores)
    if not of_task:
        usage_error(f"{results} has no two evaluated runs of one task and algorithm")
    header = f"seeds of each algorithm for a difference of {difference_of_means:.0%}"
    print(
        f"| task | runs | mean | standard deviation over seeds | {header} |\n|---|---|---|---|---|"
    )
    for env_id, groups in of_task.items():
        count = sum(map(len, groups))
        mean = np.concatenate(groups).mean()
        squares = sum(((scores - scores.mean()) ** 2).sum() for scores in groups)
        deviation = np.sqrt(squares / (count - len(groups)))
        needed = seeds_needed(difference_of_means * abs(mean) / deviation)
        print(f"| {env_id} | {count} | {mean:.0f} | {deviation:.0f} | {needed} |")


def curve(runs: list[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Million steps [n], mean hours [n] and evaluation returns [seeds, n] where the shortest run was evaluated."""
    both = [np.array([run.columns["step"], run.columns["eval_return"]]) for run in runs]
    points = [columns[:, np.isfinite(columns[1])] for columns in both]
    steps = min((x for x, _ in points), key=lambda x: x[-1])
    steps = steps[steps >= max(x[0] for x, _ in points)]
    seconds = [np.interp(steps, run.columns["step"], run.columns["seconds"]) for run in runs]
    returns = [np.interp(steps, x, y) for x, y in points]
    return steps / 1e6, np.mean(seconds, axis=0) / 3600, np.array(returns)


def figure(results: Directory) -> None:
    """Draw the evaluation return of each task: against steps in `figure.png`, against hours in `hours.png`.

    Colours are algorithms; variants of one (<algorithm>-<variant>) differ in their dashes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    groups = load(results)
    groups = {key: runs for key, runs in groups.items() if len(final_returns(runs)) == len(runs)}
    if not groups:
        usage_error(f"{results} has no evaluations")
    env_ids = list(dict.fromkeys(env_id for env_id, _ in groups))
    names = sorted({algorithm for _, algorithm in groups}, key=rank)
    numbers = [len(runs) for runs in groups.values()]
    seeds = " to ".join(map(str, sorted({min(numbers), max(numbers)})))
    columns = min(3, len(env_ids))
    rows = -(-len(env_ids) // columns)
    labels = {"figure": "million environment steps", "hours": "hours of training"}
    for axis, (file, label) in enumerate(labels.items()):
        size = 2 + 3.2 * columns, 1.5 + 2.4 * rows
        fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        lines = {}
        for (env_id, algorithm), runs in groups.items():
            ax = axes.flat[env_ids.index(env_id)]
            color = f"C{rank(algorithm)[0]}"
            siblings = [name for name in names if rank(name)[0] == rank(algorithm)[0]]
            style = ("-", "--", ":", "-.")[siblings.index(algorithm) % 4]
            *xs, returns = curve(runs)
            x = xs[axis]
            (lines[algorithm],) = ax.plot(x, returns.mean(axis=0), style, color=color)
            low, high = returns.min(axis=0), returns.max(axis=0)
            ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            ax.set_title(env_id, fontsize="medium")
            ax.grid(alpha=0.3)
        for ax in axes.flat[len(env_ids) :]:
            ax.remove()
        fig.supylabel("return of deterministic evaluation", fontsize="medium")
        band = f"(line: mean over {seeds} seeds; band: lowest to highest seed)"
        fig.supxlabel(f"{label}\n{band}", fontsize="medium")
        handles = [lines[name] for name in names]
        words = [name.upper() for name in names]
        fig.legend(handles, words, loc="outside upper center", ncols=2 * columns, frameon=False)
        path = results / f"{file}.png"
        fig.savefig(path)
        Image.open(path).convert("RGB").quantize(128).save(path)  # a third of the bytes
        print(path)


def difference(
    reference: np.ndarray, mine: np.ndarray, seed: int = 0
) -> tuple[float, float, float, float]:
    """Difference of two sets of scores [n], [m]: of the means, its 95% Welch interval, and the exact permutation p.

    With n = m = 3 there are 20 ways to split the scores, so that p is never below 0.1: such a comparison can only
    find that the sets do not overlap. The interval assumes normal scores.
    """
    welch = stats.ttest_ind(mine, reference, equal_var=False)
    interval = welch.confidence_interval(0.95)

    def change(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis=axis) - b.mean(axis=axis)

    sets = (mine, reference)
    p = stats.permutation_test(sets, change, vectorized=True, rng=seed).pvalue
    return float(change(*sets, axis=0)), float(interval.low), float(interval.high), float(p)


def compare(reference: Directory, mine: Directory) -> bool:
    """Print for each task and algorithm of both sets whether the final returns differ by more than the noise.

    Returns whether some do, or nothing could be compared. Welch's interval of the means decides (of three runs the
    interquartile mean is the same): between twice three scores of one normal distribution it sees a difference in 3% of
    the cases, the bootstrap's interval in 18%.
    """
    a = load(reference)
    b = load(mine)
    verdicts = []
    common = [key for key in a if key in b]
    if not common:
        usage_error("the two have no environment and algorithm in common")
    for key in common:
        name = " ".join(key)
        theirs, ours = final_returns(a[key]), final_returns(b[key])
        steps = {int(run.columns["step"][-1]) for run in a[key] + b[key]}
        if len(steps) > 1:
            span = f"from {min(steps):,} to {max(steps):,} steps"
            print(f"{name}: not compared: the runs have {span}")
            continue
        if min(len(theirs), len(ours)) < 2:
            print(f"{name}: fewer than two runs say nothing about the noise: {theirs}, {ours}")
            continue
        change, low, high, p = difference(theirs, ours)
        verdicts.append(low > 0 or high < 0)
        verdict = "DIFFERENT" if verdicts[-1] else "within the noise"
        # With so many runs, a difference smaller than half the interval's width is not seen.
        interval = f"{low:+.0f} to {high:+.0f}, noise +-{(high - low) / 2:.0f}"
        words = f"permutation p {p:.2f}, {len(ours)} against {len(theirs)} runs"
        print(f"{name}: {verdict}: {change:+.0f} ({interval}), {words}")
    if len(verdicts) > 1:
        by_chance = f"by chance alone about {0.05 * len(verdicts):.1f} would"
        print(f"{sum(verdicts)} of {len(verdicts)} differ; {by_chance}")
    if not verdicts:
        print("nothing could be compared")
    return any(verdicts) or not verdicts


def main() -> None:
    """Command line; `compare` exits with 1 if something differs."""
    commands = record, figure, table, seconds, aggregate, compare, noise, models
    names = {command.__name__: command for command in commands}
    sys.exit(tyro.extras.subcommand_cli_from_dict(names, description=__doc__))


if __name__ == "__main__":
    main()
