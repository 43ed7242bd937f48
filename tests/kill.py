"""Kill runs at random moments, resume them, and compare with the run that was left alone.

    python tests/kill.py --kills 20 > tests/kill.md

Every script is killed (SIGKILL) that often in one run, at a moment drawn uniformly from the time in which
it trains and saves: a checkpoint every iteration, so that many kills hit a file that is being written.
The last checkpoint, the last model and every point of the log must be those of the uninterrupted run.
Exits with 1 if they are not. About 3 minutes a script.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from conftest import SIBLINGS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--env-id", "Hopper-3x1", "--num-envs", "4", "--num-steps", "32", "--num-threads", "1"]
FLAGS += ["--total-timesteps", "102400", "--checkpoint-interval", "1"]
FLAGS += ["--eval-interval", "20000", "--eval-episodes", "2"]
MADDPG = ["--learning-starts", "500", "--batch-size", "32", "--buffer-size", "10000"]
HEADER = [
    "script",
    "kills",
    "at different checkpoints",
    "while a file was written",
    "different at the end",
    "log",
]


@dataclass
class Args:
    """Command line."""

    scripts: tuple[str, ...] = tuple(SIBLINGS)
    """which scripts"""
    kills: int = 20
    """how often each is killed"""
    seconds: float = 2.0
    """kills come up to so long after training has begun"""
    seed: int = 1
    """random seed of the moments"""


def start(script: str, flags: list[str]) -> subprocess.Popen:
    """Start a script; return when it says that it begins to train, or has ended."""
    command = [sys.executable, str(ROOT / f"{script}_mamujoco.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if ": from step " in line:
            break
    return process


def finish(script: str, flags: list[str]) -> None:
    """Run a script to its end."""
    process = start(script, flags)
    _, error = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{script} failed: {error}")


def flags_of(script: str) -> list[str]:
    """The flags of a script's runs."""
    return FLAGS + MADDPG if script == "maddpg" else FLAGS


def load(file: Path) -> dict[str, Any]:
    """A checkpoint or a model, without what depends on the run's directory."""
    state = torch.load(file, weights_only=True)
    del state["args"]["run_dir"]
    del state["args"]["resume"]
    return state


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of everything that a run logged, as a reader sees it; without the speed."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = set(log.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(point.step, point.value) for point in log.Scalars(tag)] for tag in tags}


def differences(a: Any, b: Any, name: str) -> list[str]:
    """Names of the parts of two nested values that are not the same to the last bit."""
    if type(a) is not type(b):
        return [name]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and a.numpy().tobytes() == b.numpy().tobytes() else [name]
    if isinstance(a, list | tuple) and len(a) == len(b):
        a = dict(enumerate(a))
        b = dict(enumerate(b))
    if isinstance(a, dict) and a.keys() == b.keys():
        lines = []
        for key in a:
            lines += differences(a[key], b[key], f"{name}.{key}")
        return lines
    return [] if repr(a) == repr(b) else [name]  # -0.0 is not 0.0, and nan is nan


def kill_and_resume(
    script: str, run_dir: Path, kills: int, seconds: float, rng: random.Random
) -> tuple[int, int]:
    """Kill a run `kills` times, then let it finish.

    Returns how many kills left half a file, and after how many different checkpoints they came.
    """
    checkpoint = run_dir / "checkpoint.pt"
    half_files = 0
    steps = set()
    for _ in range(kills):
        if checkpoint.exists():
            flags = ["--resume", str(run_dir)]
        else:
            shutil.rmtree(run_dir, ignore_errors=True)
            flags = [*flags_of(script), "--run-dir", str(run_dir)]
        process = start(script, flags)
        time.sleep(rng.uniform(0, seconds))
        if process.poll() is not None:
            raise SystemExit(f"{script} ended before {kills} kills: {process.stderr.read()}")
        process.kill()
        process.communicate()
        half_files += any(run_dir.glob("*.tmp"))
        if checkpoint.exists():
            steps.add(load(checkpoint)["step"])
    finish(script, ["--resume", str(run_dir)])
    return half_files, len(steps)


def main(args: Args) -> None:
    """Kill and compare."""
    rng = random.Random(args.seed)
    failed = False
    print(f"`{' '.join(['python tests/kill.py', *sys.argv[1:]])}`\n")
    print(f"| {' | '.join(HEADER)} |")
    print("|---" * len(HEADER) + "|", flush=True)
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder, "whole")
            killed = Path(folder, "killed")
            finish(script, [*flags_of(script), "--run-dir", str(whole)])
            half_files, moments = kill_and_resume(script, killed, args.kills, args.seconds, rng)
            different = []
            for file in ("checkpoint.pt", "model.pt"):
                different += differences(load(whole / file), load(killed / file), file)
            same_log = scalars(whole) == scalars(killed)
        failed |= bool(different) or not same_log
        row = [script, args.kills, moments, half_files, ", ".join(different) or "nothing"]
        row += ["each point once" if same_log else "DIFFERENT"]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
