"""Is HAPPO with M cut at 2 above HAPPO without the cut? The last evaluations of happo_m.csv, task by task.

    python benchmark/results/happo_cut.py

Prints the means, and the probability that a run with the cut is above a run of the same task without it, averaged over
the tasks: with a bootstrap interval and a permutation test, both within the tasks.
"""

import csv
from pathlib import Path

import numpy as np

UNCUT = "exact, minus its mean"
CUT = "cut at 2, minus its mean"


def probability(uncut: list[np.ndarray], cut: list[np.ndarray]) -> float:
    """Mean over the tasks of the share of pairs of runs in which the cut is above; no two are equal."""
    shares = [np.mean(a[:, None] > b) for a, b in zip(cut, uncut)]
    return float(np.mean(shares))


returns = {UNCUT: {}, CUT: {}}
with (Path(__file__).parent / "happo_m.csv").open() as file:
    for row in csv.DictReader(file):
        if row["M"] in returns and row["until_step"] == "1000000":
            returns[row["M"]].setdefault(row["env_id"], []).append(float(row["eval_return"]))
tasks = sorted(returns[CUT])
uncut = [np.array(returns[UNCUT][task]) for task in tasks]
cut = [np.array(returns[CUT][task]) for task in tasks]
for task, a, b in zip(tasks, uncut, cut):
    print(f"{task}: without {a.mean():.0f} ({len(a)} runs), with the cut {b.mean():.0f} ({len(b)})")

rng = np.random.default_rng(0)
resampled = []  # each task's runs drawn again, with replacement
permuted = []  # each task's runs dealt to the two sides at random, as if the cut did nothing
for _ in range(10_000):
    uncut_draw = [rng.choice(runs, len(runs)) for runs in uncut]
    cut_draw = [rng.choice(runs, len(runs)) for runs in cut]
    resampled.append(probability(uncut_draw, cut_draw))
    uncut_dealt = []
    cut_dealt = []
    for a, b in zip(uncut, cut):
        mixed = rng.permutation(np.concatenate([a, b]))
        uncut_dealt.append(mixed[: len(a)])
        cut_dealt.append(mixed[len(a) :])
    permuted.append(probability(uncut_dealt, cut_dealt))
measured = probability(uncut, cut)
low, high = np.percentile(resampled, [2.5, 97.5])
as_far_from_half = np.abs(np.array(permuted) - 0.5) >= abs(measured - 0.5) - 1e-12
p = as_far_from_half.mean()
print(
    f"the cut is above with probability {measured:.2f} (95% interval {low:.2f} to {high:.2f}), p = {p:.2f}"
)
