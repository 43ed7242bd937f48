"""Run the jobs of a figure: algorithms x environments x seeds, several at a time, resuming what is unfinished.

    python benchmark/run.py benchmark/halfcheetah.toml                          # here, a job per core
    python benchmark/run.py benchmark/halfcheetah.toml --slurm cpu --workers 64 # on a cluster, in the partition "cpu"

Runs go to runs/<job file>/<env id>__<algorithm>__<seed>. The same command again skips what is finished, resumes what
has a checkpoint, and starts the rest; so it is also how to go on after Ctrl-C, at which the jobs save and stop. Exits
with 1 if a job failed.
"""

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import submitit
import tyro

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {"algorithms", "env_ids", "seeds", "flags", "extra", "variants"}
VARIANT_FIELDS, EXTRA_FIELDS = {"name", "algorithm", "flags"}, {"algorithms", "env_ids", "flags"}


@dataclass
class Args:
    """Command line."""

    job_file: Annotated[Path, tyro.conf.Positional]
    """TOML file: algorithms, env_ids, seeds, flags of all, [[extra]] flags of some, [[variants]] of algorithms"""
    workers: int = os.cpu_count() or 1
    """jobs at a time; each has one thread"""
    slurm: str | None = None
    """Slurm partition to submit to; None runs here"""
    timeout_hours: float = 24
    """longest time of a job on a cluster"""
    runs: Path = ROOT / "runs"
    """where the runs go"""
    dry_run: bool = False
    """whether to only print the commands"""


def usage_error(message: object) -> None:
    """Say in one line what is wrong, and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_jobs(job_file: Path, runs: Path) -> list[tuple[Path, list[str]]]:
    """The run directory and the script with its flags of every job, in the order of the seeds.

    Exits with a usage error when the file is unreadable, has an unknown field, or names a script that does not exist.
    """
    try:
        spec: dict[str, Any] = tomllib.loads(job_file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as e:
        usage_error(f"{job_file}: {e}")
    variants = [{"name": name, "algorithm": name, "flags": ""} for name in spec.get("algorithms", [])]
    variants += [{"flags": ""} | variant for variant in spec.get("variants", [])]
    extras = spec.get("extra", [])
    tables = [(spec, FIELDS), *((v, VARIANT_FIELDS) for v in variants), *((e, EXTRA_FIELDS) for e in extras)]
    for table, known in tables:
        if unknown := table.keys() - known:
            usage_error(f"{job_file}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    jobs = []
    for seed in spec["seeds"]:
        for env_id in spec["env_ids"]:
            for variant in variants:
                algorithm = variant["algorithm"]
                script = ROOT / f"{algorithm}_mamujoco.py"
                if not script.exists():
                    usage_error(f"{job_file}: there is no {script.name}")
                extra = [
                    e["flags"]
                    for e in extras
                    if env_id in e.get("env_ids", [env_id]) and algorithm in e.get("algorithms", [algorithm])
                ]
                flags = shlex.split(" ".join([spec.get("flags", ""), *extra, variant["flags"]]))
                run_dir = runs / job_file.stem / f"{env_id.replace('|', 'p')}__{variant['name']}__{seed}"
                flags += ["--env-id", env_id, "--seed", str(seed), "--num-threads", "1"]
                jobs.append((run_dir, [str(script), *flags]))
    return jobs


def train(run_dir: Path, command: list[str]) -> tuple[int, str, float]:
    """Start or resume one run and wait for it; return its exit code, its last line, and how many seconds it took."""
    start = time.time()
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    resumable = any(run_dir.glob("checkpoint_*.pt"))
    if run_dir.exists() and not resumable:  # killed before its first checkpoint: out of the way, but kept
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.{time.time_ns()}"))
    where = ["--resume", str(run_dir)] if resumable else ["--run-dir", str(run_dir)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # the libraries' own threads would fight for the cores
    with open(run_dir.with_suffix(".log"), "a+") as log:
        process = subprocess.Popen([sys.executable, *command, *where], stdout=log, stderr=subprocess.STDOUT, env=env)
        for number in (signal.SIGINT, signal.SIGTERM):  # the script saves and stops
            signal.signal(number, lambda *_: process.send_signal(signal.SIGTERM))
        code = process.wait()
        log.seek(0)
        last_line = (log.read().strip().splitlines() or [""])[-1]
    if code == 0:
        (run_dir / "finished").write_text(json.dumps(command))
    return code, last_line, time.time() - start


def is_finished(run_dir: Path, command: list[str]) -> bool:
    """Whether `train` has finished this run with these flags."""
    marker = run_dir / "finished"
    return marker.exists() and json.loads(marker.read_text())[1:] == command[1:]


def main(args: Args) -> None:
    """Run all the jobs."""
    jobs = read_jobs(args.job_file, args.runs)
    waiting = [job for job in jobs if not is_finished(*job)]
    print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} finished before")
    if args.dry_run:
        print(*(shlex.join(["python", *command, "--run-dir", str(run_dir)]) for run_dir, command in waiting), sep="\n")
        return
    folder = args.runs / args.job_file.stem / "submitit"
    executor = submitit.AutoExecutor(folder, cluster="slurm" if args.slurm else "local")
    executor.update_parameters(timeout_min=int(60 * args.timeout_hours), cpus_per_task=1)
    if args.slurm:
        executor.update_parameters(slurm_partition=args.slurm)

    start, total, running, durations, failed = time.time(), len(waiting), {}, [], 0
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    while running or (waiting and not stop):
        while waiting and len(running) < args.workers and not stop:
            run_dir, command = waiting.pop(0)
            running[executor.submit(train, run_dir, command)] = run_dir
        for job in [job for job in running if job.done()]:
            run_dir = running.pop(job)
            try:
                code, last_line, seconds = job.result()
            except Exception as e:  # the cluster's: killed, out of time, node lost
                code, last_line, seconds = -1, str(e).strip().splitlines()[-1], 0.0
            durations += [seconds] if code == 0 else []
            failed += code != 0
            left = statistics.median(durations) * (len(waiting) + len(running)) / args.workers if durations else 0.0
            outcome = last_line if code == 0 else f"FAILED with {code}: {last_line} (see {run_dir.with_suffix('.log')})"
            count = f"{total - len(waiting) - len(running)}/{total}"
            print(f"{count} {run_dir.name}: {outcome}, {seconds / 60:.1f} min; {left / 60:.0f} min left", flush=True)
        if stop:
            for job in running:
                job.cancel(check=False)
            stop.clear()
            waiting.clear()
            print("stopping: the jobs save what they have; the same command goes on", flush=True)
        time.sleep(0.2)
    print(f"{total} jobs in {(time.time() - start) / 60:.1f} min, {failed} failed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
