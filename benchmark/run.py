"""Run the jobs of a figure: algorithms x environments x seeds, several at a time, resuming what is unfinished.

    python benchmark/run.py benchmark/halfcheetah.toml                          # here, a job per core
    python benchmark/run.py benchmark/halfcheetah.toml --slurm cpu --workers 64 # on a cluster, in the partition "cpu"
    python benchmark/run.py benchmark/halfcheetah.toml --algorithms happo --compare benchmark/results/halfcheetah

Runs go to runs/<job file>/<env id>__<algorithm>__<seed>. The same command again skips what is finished, resumes what
has a checkpoint, and starts the rest; so it is also how to go on after Ctrl-C, at which the jobs save and stop. Exits
with 1 if a job failed or the comparison found a difference, with 2 if the job file is wrong, with 130 or 143 after
Ctrl-C or SIGTERM.
"""

import contextlib
import fcntl
import importlib
import io
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import plot
import submitit
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts: they check their own flags
# Fields of a job file and their types; [str] is a list of strings.
FIELDS = {"algorithms": [str], "env_ids": [str], "seeds": [int], "flags": str, "extra": [dict], "variants": [dict]}
VARIANT_FIELDS = {"name": str, "algorithm": str, "flags": str}
EXTRA_FIELDS = {"algorithms": [str], "env_ids": [str], "flags": str}


@dataclass
class Args:
    """Command line."""

    job_file: Annotated[Path, tyro.conf.Positional]
    """TOML file: algorithms, env_ids, seeds, flags of all, [[extra]] flags of some, [[variants]] of algorithms"""
    algorithms: tuple[str, ...] = ()
    """run only these of the file's algorithms and variants"""
    env_ids: tuple[str, ...] = ()
    """run only these of the file's environments"""
    compare: Path | None = None
    """recorded results to compare with at the end; those of the runs are then recorded in <runs>/<job file>/results"""
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


def usage_error(message: object) -> NoReturn:
    """Say in one line what is wrong, and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Job:
    """A run to make: its directory, its script with flags, and what the script understands by them."""

    run_dir: Path
    command: list[str]
    args: Any

    def is_finished(self) -> bool:
        """Whether the run has all its steps, and had these arguments (else the script will say what contradicts)."""
        checkpoints = sorted(self.run_dir.glob("checkpoint_*.pt"))
        if not checkpoints:
            return False
        step = int(checkpoints[-1].stem.removeprefix("checkpoint_"))
        if self.args.total_timesteps >= step + self.args.num_envs * self.args.num_steps:
            return False
        before = json.loads((self.run_dir / "run.jsonl").read_text().splitlines()[-1])["args"]
        now = json.loads(json.dumps(asdict(self.args)))  # tuples become lists
        fixed = now.keys() - sys.modules[type(self.args).__module__].MAY_CHANGE
        return all(now[key] == before.get(key) for key in fixed)


def parse_flags(algorithm: str, flags: list[str]) -> Any:
    """The script's arguments; raises ValueError with its complaint if it refuses the flags."""
    script = importlib.import_module(f"{algorithm}_mamujoco")
    with contextlib.redirect_stderr(io.StringIO()) as complaint:
        try:
            args = tyro.cli(script.Args, args=flags)
            script.check_args(args, None)
        except SystemExit:
            words = re.sub("[─│╭╮╰╯]+", " ", complaint.getvalue()).split("For full helptext")[0].split()
            raise ValueError(f"{algorithm}: {' '.join(words).removeprefix('error: ')}") from None
    return args


def check_table(table: dict[str, Any], known: dict[str, Any], needed: tuple[str, ...]) -> None:
    """Raise ValueError if a table of the job file has unknown fields, lacks one, or has one of another type."""
    if unknown := table.keys() - known:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"{missing[0]} is missing")
    for name, value in table.items():
        kind, values, words = known[name], [value], ""
        if isinstance(kind, list):
            (kind,), values, words = kind, value if isinstance(value, list) else [None], "list of "
        if any(type(v) is not kind for v in values):
            raise ValueError(f"{name} is {value!r}: it must be a {words}{kind.__name__}")


def make_jobs(spec: dict[str, Any], folder: Path) -> list[Job]:
    """The jobs of a job file in the order of the seeds, with runs in `folder`; raises ValueError if it is wrong."""
    check_table(spec, FIELDS, ("env_ids", "seeds"))
    variants, extras = spec.get("variants", []), spec.get("extra", [])
    for variant in variants:
        check_table(variant, VARIANT_FIELDS, ("name", "algorithm"))
    variants = [{"name": name, "algorithm": name} for name in spec.get("algorithms", [])] + variants
    algorithms = [variant["algorithm"] for variant in variants]
    for name in algorithms:
        if not (ROOT / f"{name}_mamujoco.py").exists():
            raise ValueError(f"there is no {name}_mamujoco.py")
    for extra in extras:  # a misspelt one would change nothing, silently
        check_table(extra, EXTRA_FIELDS, ("flags",))
        known = {*algorithms, *spec["env_ids"]}
        if strange := {*extra.get("algorithms", []), *extra.get("env_ids", [])} - known:
            raise ValueError(f"extra is for {', '.join(sorted(strange))}, which no job has")
    jobs: dict[Path, Job] = {}
    for seed in spec["seeds"]:
        for env_id in spec["env_ids"]:
            for variant in variants:
                algorithm = variant["algorithm"]
                words = [spec.get("flags", "")]
                for extra in extras:
                    if env_id in extra.get("env_ids", [env_id]) and algorithm in extra.get("algorithms", [algorithm]):
                        words.append(extra["flags"])
                flags = shlex.split(" ".join([*words, variant.get("flags", "")]))
                flags += ["--env-id", env_id, "--seed", str(seed), "--num-threads", "1"]
                run_dir = folder / f"{env_id.replace('|', 'p').replace('/', '_')}__{variant['name']}__{seed}"
                if run_dir in jobs or run_dir.parent != folder or run_dir.name.count("__") != 2:
                    raise ValueError(f"{run_dir.name} is there twice, or no name for a run")
                command = [str(ROOT / f"{algorithm}_mamujoco.py"), *flags]
                jobs[run_dir] = Job(run_dir, command, parse_flags(algorithm, flags))
    return list(jobs.values())


def read_jobs(job_file: Path, runs: Path) -> list[Job]:
    """The jobs of a job file; exits with a usage error if it is unreadable or wrong (see `make_jobs`)."""
    try:
        return make_jobs(tomllib.loads(job_file.read_text()), runs / job_file.stem)
    except (OSError, ValueError) as e:
        usage_error(f"{job_file}: {getattr(e, 'strerror', None) or e}")


def select(jobs: list[Job], args: Args) -> list[Job]:
    """The jobs of the chosen algorithms and environments; exits with a usage error if there are none of one."""
    for at, chosen in ((1, args.algorithms), (0, args.env_ids)):
        names = [job.run_dir.name.split("__")[at] for job in jobs]
        if missing := [name for name in chosen if name not in names]:
            usage_error(f"{args.job_file} has no {missing[0]}, but {', '.join(dict.fromkeys(names))}")
        jobs = [job for job, name in zip(jobs, names, strict=True) if not chosen or name in chosen]
    return jobs


def place(run_dir: Path) -> list[str]:
    """The flag that starts a run in its directory, or resumes it there."""
    return ["--resume" if any(run_dir.glob("checkpoint_*.pt")) else "--run-dir", str(run_dir)]


def train(run_dir: Path, command: list[str]) -> tuple[int, str, float]:
    """Start or resume one run and wait for it; return its exit code, its last line, and how many seconds it took.

    SIGTERM, and SIGUSR2 with which a cluster announces that time is up, let the script save and stop.
    """
    start, scripts, signals = time.time(), [], []

    def stop(number: int, _: object) -> None:
        signals.append(number)
        for script in scripts:  # Slurm sends SIGTERM to the script too; a second one would stop it without saving
            script.send_signal(signal.SIGINT)

    def set_signals() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR2, stop)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # the libraries' own threads would fight for the cores
    with open(f"{run_dir}.log", "a+") as log:
        try:  # the script inherits the lock: it holds as long as anyone writes there, even after a kill of this process
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 1, "another process is at work on it", 0.0
        where = place(run_dir)
        if run_dir.exists() and where[0] == "--run-dir":  # killed before its first checkpoint: out of the way, but kept
            run_dir.rename(f"{run_dir}.{time.time_ns()}")
        words, out = [sys.executable, *command, *where], {"stdout": log, "stderr": subprocess.STDOUT}
        # In a session of its own it does not hear Ctrl-C in the terminal twice.
        scripts.append(subprocess.Popen(words, **out, env=env, start_new_session=True, preexec_fn=set_signals))
        if signals:
            scripts[0].send_signal(signal.SIGINT)
        code = scripts[0].wait()
        log.seek(0)
        last_line = (log.read().strip().splitlines() or [""])[-1]
    return code, last_line, time.time() - start


def main(args: Args) -> None:
    """Run all the jobs."""
    if args.workers < 1:
        usage_error(f"--workers is {args.workers}: it must be greater than 0")
    jobs = select(read_jobs(args.job_file, args.runs), args)
    waiting = [job for job in jobs if not job.is_finished()]
    print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} finished before", flush=True)
    if args.dry_run:
        print(*(shlex.join(["python", *job.command, *place(job.run_dir)]) for job in waiting), sep="\n")
        return
    folder = args.runs / args.job_file.stem / "submitit"
    executor = submitit.AutoExecutor(folder, cluster="slurm" if args.slurm else "local")
    # Here a job may take a year: submitit's end of time would orphan the script.
    executor.update_parameters(timeout_min=int(60 * args.timeout_hours) if args.slurm else 525_600, cpus_per_task=1)
    if args.slurm:
        executor.update_parameters(slurm_partition=args.slurm)

    start, total, running, durations, ended, failed = time.time(), len(waiting), {}, [], 0, 0
    stop: list[int] = []
    stopped = 0  # by which signal
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    while running or waiting:
        while waiting and len(running) < args.workers and not stop:
            job = waiting.pop(0)
            # Inherited by submitit's processes, which would kill the job at Ctrl-C in the terminal before it can save.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            running[executor.submit(train, job.run_dir, job.command)] = job.run_dir
            signal.signal(signal.SIGINT, handler)
        for job in [job for job in running if job.done()]:
            run_dir = running.pop(job)
            try:
                code, last_line, seconds = job.result()
            except Exception as e:  # the cluster's: killed, out of time, node lost
                code, last_line, seconds = -1, (str(e).strip().splitlines() or [""])[-1], 0.0
            durations += [seconds] if code == 0 else []
            outcome = f"{last_line}, {seconds / 60:.1f} min"
            if code != 0 and stopped and (code < 0 or code in (130, 143)):
                outcome = f"stopped: {last_line}"
            elif code != 0:
                failed += 1
                outcome = f"FAILED with {code}: {last_line} (see {run_dir}.log)"
            if durations and not stopped:
                left = statistics.median(durations) * (len(waiting) + len(running)) / args.workers
                outcome += f"; {left / 60:.0f} min left"
            ended += 1
            print(f"{ended}/{total} {run_dir.name}: {outcome}", flush=True)
        if stop:
            stopped = stop.pop()
            for job in running:
                if args.slurm:
                    job.cancel(check=False)
                else:  # not `cancel`, which gives a job one second: its id is the process that passes SIGTERM on
                    os.kill(int(job.job_id), signal.SIGTERM)
            waiting.clear()
            print("stopping: the jobs save what they have; the same command goes on", flush=True)
        time.sleep(0.2)
    print(f"{len(durations)} of {total} jobs in {(time.time() - start) / 60:.1f} min, {failed} failed")
    differs = False
    if args.compare and not stopped and not failed:
        folder = args.runs / args.job_file.stem
        plot.record(folder, folder / "results")
        differs = plot.compare(args.compare, folder / "results")
    raise SystemExit(128 + stopped if stopped else failed > 0 or differs)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
