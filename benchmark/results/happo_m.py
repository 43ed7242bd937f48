"""Are HAPPO's runs better without the mean of M, and with M cut at 2? The last evaluations of happo_m.csv.

    python benchmark/results/happo_m.py

Prints, for both changes, the means of each task, and the probability that a run with the change is above a run of the
same task without it, averaged over the tasks: with a bootstrap interval and a permutation test, both within the tasks.
"""

import csv
from pathlib import Path

import numpy as np

EXACT = "exact"
CENTRED = "exact, minus its mean"
CUT = "cut at 2, minus its mean"


def probability(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    """Mean over the tasks of the share of pairs of runs in which `after` is above; no two are equal."""
    shares = [np.mean(b[:, None] > a) for a, b in zip(before, after)]
    return float(np.mean(shares))


def compare(before: list[np.ndarray], after: list[np.ndarray]) -> tuple[float, float, float, float]:
    """The probability that `after` is above, its 95% interval, and the p of a two-sided permutation test."""
    rng = np.random.default_rng(0)
    resampled = []  # each task's runs drawn again, with replacement
    permuted = []  # each task's runs dealt to the two sides at random, as if the change did nothing
    for _ in range(10_000):
        before_draw = [rng.choice(runs, len(runs)) for runs in before]
        after_draw = [rng.choice(runs, len(runs)) for runs in after]
        resampled.append(probability(before_draw, after_draw))
        before_dealt = []
        after_dealt = []
        for a, b in zip(before, after):
            mixed = rng.permutation(np.concatenate([a, b]))
            before_dealt.append(mixed[: len(a)])
            after_dealt.append(mixed[len(a) :])
        permuted.append(probability(before_dealt, after_dealt))
    measured = probability(before, after)
    low, high = np.percentile(resampled, [2.5, 97.5])
    as_far_from_half = np.abs(np.array(permuted) - 0.5) >= abs(measured - 0.5) - 1e-12
    return measured, low, high, as_far_from_half.mean()


returns = {EXACT: {}, CENTRED: {}, CUT: {}}
with (Path(__file__).parent / "happo_m.csv").open() as file:
    for row in csv.DictReader(file):
        if row["M"] in returns and row["until_step"] == "1000000":
            returns[row["M"]].setdefault(row["env_id"], []).append(float(row["eval_return"]))
tasks = sorted(returns[CUT])
for before, after in ((EXACT, CENTRED), (CENTRED, CUT)):
    print(f'M "{after}" beside M "{before}"')
    runs_before = [np.array(returns[before][task]) for task in tasks]
    runs_after = [np.array(returns[after][task]) for task in tasks]
    for task, a, b in zip(tasks, runs_before, runs_after):
        print(f"  {task}: {b.mean():.0f} ({len(b)} runs) beside {a.mean():.0f} ({len(a)})")
    measured, low, high, p = compare(runs_before, runs_after)
    print(
        f"  above with probability {measured:.2f} (95% interval {low:.2f} to {high:.2f}), p = {p:.2f}"
    )
