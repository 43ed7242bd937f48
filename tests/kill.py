"""Kill runs at random moments, resume them, and compare with the run that was left alone.

    python tests/kill.py --kills 20 > tests/kill.md

Every script is killed (SIGKILL) that often in one run, at a moment drawn uniformly from the time in which it trains and
saves (a checkpoint every iteration, so that many kills hit a file that is being written). The last checkpoint and every
point of the log must be those of the uninterrupted run. Exits with 1 if they are not. About 3 minutes a script.
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


@dataclass
class Args:
    """Command line."""

    scripts: tuple[str, ...] = tuple(SIBLINGS)  # which scripts
    kills: int = 20  # how often each is killed
    seconds: float = 2.0  # kills come up to so long after training has begun
    seed: int = 1  # of the moments


def start(script: str, flags: list[str]) -> subprocess.Popen:
    """Start a script; return when it says that it begins to train, or has ended."""
    command = [sys.executable, str(ROOT / f"{script}_mamujoco.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def finish(script: str, flags: list[str]) -> None:
    """Run a script to its end."""
    process = start(script, flags)
    _, err = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{script} failed: {err}")


def flags_of(script: str) -> list[str]:
    """The flags of a script's runs."""
    return FLAGS + MADDPG if script == "maddpg" else FLAGS


def newest(run_dir: Path) -> dict[str, Any]:
    """The checkpoint of a run, without what depends on its directory."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    args = {key: value for key, value in checkpoint["args"].items() if key not in ("run_dir", "resume")}
    return checkpoint | {"args": args}


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of everything that a run logged, as a reader sees it; without the speed."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = set(log.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(point.step, point.value) for point in log.Scalars(tag)] for tag in tags}


def differences(a: Any, b: Any, name: str = "checkpoint") -> list[str]:
    """Names of the parts of two nested values that are not the same to the last bit."""
    if type(a) is not type(b):
        return [name]
    if isinstance(a, dict):
        a, b = ({str(key): value for key, value in x.items()} for x in (a, b))
        unlike = sorted(f"{name}.{key}" for key in a.keys() ^ b.keys())
        return unlike + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple):
        pairs = enumerate(zip(a, b, strict=False))
        return [name] * (len(a) != len(b)) + [line for i, (x, y) in pairs for line in differences(x, y, f"{name}.{i}")]
    if isinstance(a, torch.Tensor):
        x, y = ((t.dtype, t.shape, t.contiguous().numpy().tobytes()) for t in (a, b))
        return [name] * (x != y)
    return [name] * (repr(a) != repr(b))  # -0.0 is not 0.0, and nan is nan


def kill_and_resume(script: str, run_dir: Path, kills: int, seconds: float, rng: random.Random) -> tuple[int, set[int]]:
    """Kill a run `kills` times, then let it finish; return how many kills left half a file, and where they came."""
    half_files, steps = 0, set()
    for _ in range(kills):
        resumed = (run_dir / "checkpoint.pt").exists()
        if not resumed:
            shutil.rmtree(run_dir, ignore_errors=True)
        flags = ["--resume", str(run_dir)] if resumed else [*flags_of(script), "--run-dir", str(run_dir)]
        process = start(script, flags)
        time.sleep(rng.uniform(0, seconds))
        if process.poll() is not None:
            raise SystemExit(f"{script} ended before {kills} kills: {process.stderr.read()}")
        process.kill()
        process.communicate()
        half_files += any(run_dir.glob("*.tmp"))
        if (run_dir / "checkpoint.pt").exists():
            steps.add(newest(run_dir)["step"])
    finish(script, ["--resume", str(run_dir)])
    return half_files, steps


def main(args: Args) -> None:
    """Kill and compare."""
    rng, failed = random.Random(args.seed), False
    print(f"`python tests/kill.py {' '.join(sys.argv[1:])}`\n".replace(" `", "`"))
    print("| script | kills | at different checkpoints | while a file was written | different at the end | log |")
    print("|---|---|---|---|---|---|")
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            whole, killed = Path(folder, "whole"), Path(folder, "killed")
            finish(script, [*flags_of(script), "--run-dir", str(whole)])
            half_files, steps = kill_and_resume(script, killed, args.kills, args.seconds, rng)
            different, same_log = differences(newest(whole), newest(killed)), scalars(whole) == scalars(killed)
            failed |= bool(different) or not same_log
            numbers = f"{args.kills} | {len(steps)} | {half_files} | {', '.join(different) or 'nothing'}"
            print(f"| {script} | {numbers} | {'each point once' if same_log else 'DIFFERENT'} |", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
