"""Run the jobs of a figure: algorithms x environments x seeds, several at a time, resuming what is unfinished.

    python benchmark/run.py benchmark/figure3.toml                              # here, a job per core
    python benchmark/run.py benchmark/figure3.toml --slurm cpu --workers 64     # on a cluster, in the partition "cpu"
    python benchmark/run.py benchmark/figure3.toml --algorithms happo --compare benchmark/results/figure3

Runs go to runs/<job file>/<env id>__<algorithm>__<seed>; beside each are its output (.log), and a line of command,
commit, versions and machine per start (.jsonl). The same command again skips finished runs, resumes those that have a
checkpoint, and starts the rest; so it also continues after Ctrl-C. It exits with 1 if a job failed or the comparison
found a difference, with 2 if the job file or a flag is wrong, with 130 or 143 after Ctrl-C or SIGTERM.
"""

import contextlib
import fcntl
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import plot
import submitit
import torch
import tyro
from plot import usage_error

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts: they check their own flags
# Arguments that may differ from those with which a run was begun.
FREE = {"total_timesteps", "run_dir", "resume", "checkpoint_interval", "eval_interval"}
FREE |= {"eval_episodes", "num_threads", "cuda", "track", "wandb_run_id", "allow_import"}
# Flags that this file gives to every run.
OWN = {"--env-id", "--seed", "--num-threads", "--run-dir", "--resume"}
# macOS does not say which CPUs a process may use.
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Fields of a job file and their types; [str] is a list of strings.
FIELDS = {
    "algorithms": [str],
    "env_ids": [str],
    "seeds": [int],
    "flags": str,
    "extra": [dict],
    "variants": [dict],
}
VARIANT_FIELDS = {"name": str, "algorithm": str, "flags": str}
EXTRA_FIELDS = {"algorithms": [str], "env_ids": [str], "flags": str}


@dataclass
class Args:
    """Command line."""

    job_file: Annotated[Path, tyro.conf.Positional]
    """TOML file: algorithms, env_ids, seeds, flags of all jobs, [[extra]] flags of some jobs, [[variants]] of
    algorithms"""
    algorithms: tuple[str, ...] = ()
    """run only these of the file's algorithms and variants"""
    env_ids: tuple[str, ...] = ()
    """run only these of the file's environments"""
    seeds: tuple[int, ...] = ()
    """run only these of the file's seeds"""
    compare: Path | None = None
    """recorded results to compare with at the end; the runs are then recorded in <runs>/<job file>/results"""
    flags: str = ""
    """flags of all jobs, after the file's: --flags="--total-timesteps 5000000" makes runs longer"""
    workers: int = CPUS
    """jobs at a time, by default one per CPU that this process may use; each has one thread"""
    slurm: str | None = None
    """Slurm partition to submit to; None runs here"""
    timeout_hours: float = 24
    """longest time of a job on a cluster"""
    runs: Path = ROOT / "runs"
    """directory of the runs"""
    dry_run: bool = False
    """only print the commands"""


@dataclass
class Job:
    """A run to make: its directory, its script with flags, and the arguments that the script reads from them."""

    run_dir: Path
    command: list[str]
    args: Any

    def is_finished(self) -> bool:
        """Whether the run has all its steps.

        Raises ValueError if it was begun with other arguments, or its checkpoint cannot be read.
        """
        path = self.run_dir / "checkpoint.pt"
        if not path.exists():
            return False
        try:  # mmap: MADDPG's replay buffer is not read
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            step = checkpoint["step"]
            script = checkpoint["script"]
            before = checkpoint["args"]
        except Exception as e:  # torch.load raises whatever the bytes lead it to
            raise ValueError(f"{path} cannot be read ({type(e).__name__})") from None
        pairs = [("script", script, Path(self.command[0]).stem)]
        for f in fields(self.args):
            # A checkpoint from before there was this argument has its default.
            pairs.append((f.name, before.get(f.name, f.default), getattr(self.args, f.name)))
        for name, was, now in pairs:
            if was != now and name not in FREE:
                remedy = f"to start anew, move {self.run_dir} away"
                raise ValueError(f"begun with {name} {was}, not {now}; {remedy}")
        return self.args.total_timesteps < step + self.args.num_envs * self.args.num_steps


def parse_flags(algorithm: str, flags: list[str]) -> Any:
    """The script's arguments; raises ValueError with its complaint if it refuses the flags."""
    script = importlib.import_module(f"{algorithm}_mamujoco")
    complaint = io.StringIO()
    with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
        try:
            return tyro.cli(script.Args, args=flags)
        except SystemExit as e:
            if not e.code:  # it has printed its help, or a completion
                raise ValueError(f"{algorithm}: {shlex.join(flags)} starts no run") from None
            text = re.sub("[─│╭╮╰╯]+", " ", complaint.getvalue())  # tyro's box
            words = text.split("For full helptext")[0].split()
            raise ValueError(f"{algorithm}: {' '.join(words)}") from None


def check_table(table: dict[str, Any], known: dict[str, Any], needed: tuple[str, ...]) -> None:
    """Raise ValueError if a table of the job file has unknown fields, lacks one, or has one of another type."""
    if unknown := table.keys() - known:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"unknown {names}; known are {', '.join(sorted(known))}")
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"{missing[0]} is missing")
    for name, value in table.items():
        kind = known[name]
        values = [value]
        words = ""
        if isinstance(kind, list):
            (kind,) = kind
            values = value if isinstance(value, list) else [None]
            words = "list of "
        if any(type(v) is not kind for v in values):
            raise ValueError(f"{name} is {value!r}: it must be a {words}{kind.__name__}")


def task_name(env_id: str) -> str:
    """An environment in the name of a run: Humanoid-9|8 is Humanoid-9p8."""
    return env_id.replace("|", "p").replace("/", "_")


def make_jobs(spec: dict[str, Any], folder: Path, more: str = "") -> list[Job]:
    """The jobs of a job file in the order of the seeds, with runs in `folder`; raises ValueError if it is wrong.

    `more` are flags of all jobs. They come after the file's flags and override them.
    """
    check_table(spec, FIELDS, ("env_ids", "seeds"))
    variants = spec.get("variants", [])
    extras = spec.get("extra", [])
    for variant in variants:
        check_table(variant, VARIANT_FIELDS, ("name", "algorithm"))
    variants = [{"name": name, "algorithm": name} for name in spec.get("algorithms", [])] + variants
    algorithms = [variant["algorithm"] for variant in variants]
    for name in algorithms:
        if not (ROOT / f"{name}_mamujoco.py").exists():
            raise ValueError(f"there is no {name}_mamujoco.py")
    for extra in extras:  # a misspelt name would silently change nothing
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
                    env_ids = extra.get("env_ids", [env_id])
                    if env_id in env_ids and algorithm in extra.get("algorithms", [algorithm]):
                        words.append(extra["flags"])
                flags = shlex.split(" ".join([*words, variant.get("flags", ""), more]))
                for word in flags:
                    name = word.split("=")[0].replace("_", "-")
                    if name in OWN:
                        raise ValueError(f"flags have {name}, which run.py sets itself")
                flags += ["--env-id", env_id, "--seed", str(seed), "--num-threads", "1"]
                parts = task_name(env_id), variant["name"], str(seed)
                run_dir = folder / "__".join(parts)
                match = plot.RUN_NAME.fullmatch(run_dir.name)  # as `plot.record` will read it
                if run_dir in jobs or not match or match.groups() != parts:
                    raise ValueError(f"{run_dir.name} is there twice, or no name for a run")
                command = [str(ROOT / f"{algorithm}_mamujoco.py"), *flags]
                args = parse_flags(algorithm, [*flags, "--run-dir", str(run_dir)])
                jobs[run_dir] = Job(run_dir, command, args)
    if not jobs:
        raise ValueError("there are no jobs: name seeds, env_ids, and algorithms or variants")
    return list(jobs.values())


def read_jobs(job_file: Path, runs: Path, flags: str = "") -> list[Job]:
    """The jobs of a job file; exits with a usage error if it is unreadable or wrong (see `make_jobs`)."""
    try:
        return make_jobs(tomllib.loads(job_file.read_text()), runs / job_file.stem, flags)
    except (OSError, ValueError) as e:
        usage_error(f"{job_file}: {getattr(e, 'strerror', None) or e}")


def select(jobs: list[Job], args: Args) -> list[Job]:
    """The jobs of the chosen algorithms, environments and seeds; exits with a usage error if one of them has no job."""
    env_ids = [task_name(env_id) for env_id in args.env_ids]
    seeds = [str(seed) for seed in args.seeds]
    for at, chosen in ((1, args.algorithms), (0, env_ids), (2, seeds)):
        names = [job.run_dir.name.split("__")[at] for job in jobs]
        if missing := [name for name in chosen if name not in names]:
            known = ", ".join(dict.fromkeys(names))
            usage_error(f"{args.job_file} has no {missing[0]}, but {known}")
        jobs = [job for job, name in zip(jobs, names, strict=True) if not chosen or name in chosen]
    return jobs


def place(run_dir: Path) -> list[str]:
    """The flag that starts a run in its directory, or resumes it there."""
    if (run_dir / "checkpoint.pt").exists():
        # The job file names the module, if there is one: `Job.is_finished` compares env_id.
        return ["--resume", str(run_dir), "--allow-import"]
    return ["--run-dir", str(run_dir)]


def processor() -> str:
    """The name of this machine's processor: on another kind a run's last bits differ."""
    info = Path("/proc/cpuinfo")  # Linux
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return model[1] if model else platform.processor()


def describe_run(command: list[str], args: dict[str, Any]) -> dict[str, Any]:
    """What it takes to repeat a run: command, arguments, commit, versions, machine."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "mujoco", "gymnasium"):
        versions[package] = importlib.metadata.version(package)
    machine = {
        "system": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": args["num_threads"],
    }
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "args": args,
        "commit": described.stdout.strip() or None,
        "versions": versions,
        "machine": machine,
    }


def train(run_dir: Path, command: list[str], args: dict[str, Any]) -> tuple[int, str, float]:
    """Start or resume one run and wait for it; return its exit code, its last line, and how many seconds it took."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it
    start = time.time()
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run_dir}.log", "a+") as log:
        try:
            # The script inherits the lock with its output: it lasts until both have ended.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a script that has outlived its runner
            return 1, "another process is at work on it", 0.0
        where = place(run_dir)
        if where[0] == "--run-dir" and run_dir.exists():  # killed before its first checkpoint
            run_dir.rename(f"{run_dir}.{time.time_ns()}")
        with open(f"{run_dir}.jsonl", "a" if where[0] == "--resume" else "w") as f:
            f.write(json.dumps(describe_run([*command, *where], args)) + "\n")
        command = [sys.executable, *command, *where]
        # The threads of the libraries would fight for the cores.
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        script = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        signal.signal(signal.SIGTERM, lambda *_: script.terminate())
        code = script.wait()
        log.seek(0)
        lines = ["", "", *log.read().strip().splitlines()]
    # The last line of a finished run says only how to look at it.
    return code, lines[-1 if code else -2], time.time() - start


def main(args: Args) -> None:
    """Run all the jobs."""
    if args.workers < 1:
        usage_error(f"--workers is {args.workers}: it must be greater than 0")
    jobs = select(read_jobs(args.job_file, args.runs, args.flags), args)
    waiting = []
    running = {}
    durations = []
    failed = 0
    for job in jobs:
        try:
            if not job.is_finished():
                waiting.append(job)
        except ValueError as e:
            print(f"{job.run_dir.name}: FAILED: {e}")
            failed += 1
    folder = args.runs / args.job_file.stem
    if args.compare:
        recorded = ["__".join(key) for key in plot.load(args.compare)]
        if not any(job.run_dir.name.rpartition("__")[0] in recorded for job in jobs):
            usage_error(f"--compare {args.compare} has no environment and algorithm of these jobs")
    start = time.time()
    total = len(waiting)
    print(f"{len(jobs)} jobs, {len(jobs) - total - failed} finished before", flush=True)
    if args.dry_run:
        for job in waiting:
            print(shlex.join(["python", *job.command, *place(job.run_dir)]))
        raise SystemExit(failed > 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "submitit").mkdir(exist_ok=True)
    except OSError as e:
        usage_error(f"--runs {args.runs}: {e.filename}: {e.strerror}")
    cluster = "slurm" if args.slurm else "local"
    try:
        executor = submitit.AutoExecutor(folder / "submitit", cluster=cluster)
    except RuntimeError as e:
        usage_error(f"--slurm {args.slurm}: {e}")
    # Here a job may take a year: submitit's end of time would orphan the script.
    minutes = int(60 * args.timeout_hours) if args.slurm else 525_600
    executor.update_parameters(timeout_min=minutes, cpus_per_task=1, slurm_partition=args.slurm)

    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    while (running or waiting) and not stop:
        while waiting and len(running) < args.workers and not stop:
            job = waiting.pop(0)
            # The mask is inherited: at Ctrl-C in the terminal, which goes to all processes, only this one acts.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            submitted = executor.submit(train, job.run_dir, job.command, asdict(job.args))
            running[submitted] = job.run_dir
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for job in [job for job in running if job.done()]:
            run_dir = running.pop(job)
            try:
                code, last_line, seconds = job.result()
            except Exception as e:  # the cluster's: killed, out of time, node lost
                code = -1
                last_line = ("\n" + str(e).strip()).splitlines()[-1]
            if code:
                failed += 1
                outcome = f"FAILED with {code}: {last_line} (see {run_dir}.log)"
            else:
                durations.append(seconds)
                outcome = f"{last_line}, {seconds / 60:.1f} min"
            if durations:
                left = statistics.median(durations) * (len(waiting) + len(running)) / args.workers
                outcome += f"; {left / 60:.0f} min left"
            done = total - len(waiting) - len(running)
            print(f"{done}/{total} {run_dir.name}: {outcome}", flush=True)
        time.sleep(0.2)
    if stop:
        for job in running:
            if args.slurm:
                job.cancel(check=False)
            else:  # not `cancel`: it sends SIGINT, which is masked; `train` passes SIGTERM on
                os.kill(int(job.job_id), signal.SIGTERM)
        print("stopped; the same command goes on from the latest checkpoints")
        raise SystemExit(128 + stop[0])
    minutes = (time.time() - start) / 60
    print(f"{len(durations)} of {total} jobs in {minutes:.1f} min, {failed} failed")
    if args.compare and not failed:
        plot.record(folder, folder / "results")
        failed = plot.compare(args.compare, folder / "results")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
