"""Kill runs at random moments, resume them, and compare with the run that was left alone.

    python tests/kill.py --kills 20 > tests/kill.md

Every script is killed (SIGKILL) that often in one run, at a moment drawn uniformly from the time in which it trains and
saves (a checkpoint every iteration, so that many kills hit a file that is being written). The state at the end and
every point of the log must be those of the uninterrupted run. Exits with 1 if they are not. About 3 minutes a script.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_runs import differences, newest, scalars  # noqa: E402

FLAGS = ["--env-id", "Hopper-3x1", "--num-envs", "4", "--num-steps", "32", "--num-threads", "1"]
FLAGS += ["--total-timesteps", "102400", "--checkpoint-interval", "1"]
FLAGS += ["--eval-interval", "20000", "--eval-episodes", "2"]
MADDPG = ["--learning-starts", "500", "--batch-size", "32", "--buffer-size", "10000"]


@dataclass
class Args:
    """Command line."""

    scripts: tuple[str, ...] = ("mappo", "happo", "hatrpo", "ippo", "maddpg")
    """which scripts"""
    kills: int = 20
    """how often each is killed"""
    seconds: float = 2.0
    """kills come up to so long after training has begun"""
    seed: int = 1
    """of the moments"""


def start(script: str, flags: list[str]) -> subprocess.Popen:
    """Start a script."""
    command = [sys.executable, str(ROOT / f"{script}_mamujoco.py"), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def flags_of(script: str) -> list[str]:
    """The flags of a script's runs."""
    return FLAGS + MADDPG if script == "maddpg" else FLAGS


def starts(run_dir: Path) -> int:
    """How often a run has begun to train: a line of its record each."""
    record = run_dir / "run.jsonl"
    return len(record.read_text().splitlines()) if record.exists() else 0


def kill_and_resume(script: str, run_dir: Path, kills: int, seconds: float, rng: random.Random) -> tuple[int, set[int]]:
    """Kill a run `kills` times, then let it finish; return how many kills left half a file, and where they came."""
    half_files, iterations, flags = 0, set(), flags_of(script)
    for _ in range(kills):
        while True:
            resumed = run_dir.exists() and any(run_dir.glob("checkpoint_*.pt"))
            if not resumed:
                shutil.rmtree(run_dir, ignore_errors=True)
            before = starts(run_dir)
            process = start(script, ["--resume", str(run_dir)] if resumed else [*flags, "--run-dir", str(run_dir)])
            while starts(run_dir) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, seconds))
            if process.poll() is None:
                break
            raise SystemExit(f"{script} ended before {kills} kills: {process.stderr.read()}")
        process.kill()
        process.wait()
        half_files += any(run_dir.glob("*.tmp"))
        if any(run_dir.glob("checkpoint_*.pt")):
            iterations.add(newest(run_dir)["iteration"])
    process = start(script, ["--resume", str(run_dir)])
    if process.wait() != 0:
        raise SystemExit(f"{script} failed: {process.stderr.read()}")
    return half_files, iterations


def main(args: Args) -> None:
    """Kill and compare."""
    rng, failed = random.Random(args.seed), False
    print(f"`python tests/kill.py {' '.join(sys.argv[1:])}`\n".replace(" `", "`"))
    print("| script | kills | at different checkpoints | while a file was written | different at the end | log |")
    print("|---|---|---|---|---|---|")
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            whole, killed = Path(folder, "whole"), Path(folder, "killed")
            process = start(script, [*flags_of(script), "--run-dir", str(whole)])
            if process.wait() != 0:
                raise SystemExit(f"{script} failed: {process.stderr.read()}")
            half_files, iterations = kill_and_resume(script, killed, args.kills, args.seconds, rng)
            different, same_log = differences(newest(whole), newest(killed)), scalars(whole) == scalars(killed)
            failed |= bool(different) or not same_log
            numbers = f"{args.kills} | {len(iterations)} | {half_files} | {', '.join(different) or 'nothing'}"
            print(f"| {script} | {numbers} | {'each point once' if same_log else 'DIFFERENT'} |", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
