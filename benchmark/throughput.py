"""How fast the scripts and the environments are, in ratios.

    python benchmark/throughput.py --csv throughput.csv                  # all parts, more than an hour
    python benchmark/throughput.py --parts scripts --against ../old      # made by `git worktree add ../old COMMIT`
    python benchmark/throughput.py --parts load                          # on an idle machine and on a busy one

The parts compare scripts with those of another checkout (scripts), with what their matrix products and the physics
alone would take (limit), and with themselves while other processes keep every core busy (load); and the environments
with those of other libraries (envs).

A machine's speed changes from hour to hour, so what is compared takes turns (A B A B ...), and a ratio is that of
neighbouring turns. Numbers are the median [lowest to highest] of the repeats. Run it on an idle machine.
"""

import contextlib
import csv
import io
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Literal, get_args

import gymnasium as gym
import mujoco
import torch
import tyro
from mujoco.batch import Batch
from run import processor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs  # noqa: E402

TURN_SECONDS = 0.5  # length of a turn that is not a whole run
NUM_ENVS = 20  # simulations at a time in such turns, as in the scripts
ENV_IDS = ("HalfCheetah-6x1", "Walker2d-2x3", "Ant-4x2", "Humanoid-9|8")  # of the part envs
# HARL's tuned values for HalfCheetah, as far as the work depends on them. It has no IPPO, which gets MAPPO's.
HARL_BATCH = "--num-envs 20 --num-steps 200 --hidden-sizes 128 128 128 --num-minibatches 1"
HARL_PPO = f"{HARL_BATCH} --update-epochs 15 --critic-epochs 15"
HARL = {
    "happo": HARL_PPO,
    "mappo": HARL_PPO,
    "ippo": HARL_PPO,
    # Its damping of 0.1, in the script's terms.
    "hatrpo": f"{HARL_BATCH} --critic-epochs 5 --cg-iters 10 --cg-damping 0.001 --target-kl 0.01 "
    "--momentum 0 --max-ratio inf",
    "maddpg": "--num-envs 10 --hidden-sizes 256 256 --batch-size 1000 --n-step 20 --updates-per-step 0.1",
}
PARTS = Literal["scripts", "limit", "envs", "load"]


@dataclass
class Args:
    """Command line."""

    parts: tuple[PARTS, ...] = get_args(PARTS)
    """what to measure"""
    algorithms: tuple[Literal["happo", "mappo", "ippo", "hatrpo", "maddpg"], ...] = tuple(HARL)
    """whose scripts"""
    against: Path | None = None
    """another checkout of this project: its scripts take turns with these"""
    env_id: str = "HalfCheetah-6x1"
    """what the scripts train on"""
    total_timesteps: int = 60_000
    """environment steps of a script's run"""
    repeats: int = 5
    """turns of each subject"""
    num_threads: int = 0
    """CPU threads of the physics, in older checkouts of PyTorch as well; 0 is one per core"""
    csv: Path | None = None
    """file to write every turn to"""

    def __post_init__(self) -> None:
        """Raise ValueError, which tyro shows, for a value that makes no sense."""
        if self.repeats < 1 or not self.algorithms:
            raise ValueError("--repeats and the number of --algorithms must be at least 1")
        if self.env_id.rpartition("-")[0] not in envs.ROBOTS:
            robots = ", ".join(envs.ROBOTS)
            raise ValueError(f"--env-id {self.env_id}: the robot must be one of {robots}")
        # It raises ValueError for a wrong partition or number of threads.
        envs.make_vec(self.env_id, 1, num_threads=self.num_threads)
        for algorithm in self.algorithms if self.against else ():
            if not (self.against / f"{algorithm}_mamujoco.py").is_file():
                raise ValueError(f"--against {self.against}: there is no {algorithm}_mamujoco.py")
        if self.csv and (self.csv.is_dir() or not os.access(self.csv.parent, os.W_OK)):
            raise ValueError(f"--csv {self.csv}: no file can be written there")

    def flags(self, settings: str = "") -> list[str]:
        """A script's flags; without `settings` only such as older commits know too."""
        flags = f"--total-timesteps {self.total_timesteps} --num-threads {self.num_threads}"
        flags += " --eval-episodes 0 --seed 1"
        return ["--env-id", self.env_id, *flags.split(), *settings.split()]


# Turns and ratios


@dataclass
class Turn:
    """One measurement of one subject."""

    seconds: float  # wall time; of a script that of its process, from start to exit
    steps: float  # environment steps
    training_seconds: float = float("nan")  # of a script's training loop alone, by its own clock
    checkout: Path = ROOT  # whose code it is


def take_turns(subjects: dict[str, Callable[[], Turn]], repeats: int) -> dict[str, list[Turn]]:
    """Measure the subjects one after the other, `repeats` times; return the turns of each."""
    turns: dict[str, list[Turn]] = {name: [] for name in subjects}
    for name in tqdm([*subjects] * repeats, leave=False, disable=None):
        turns[name].append(subjects[name]())
    return turns


def speeds(
    turns: Sequence[Turn], clock: Literal["seconds", "training_seconds"] = "seconds"
) -> list[float]:
    """Steps per second of each turn."""
    return [turn.steps / getattr(turn, clock) for turn in turns]


def ratios(speeds: Sequence[float], others: Sequence[float]) -> list[float]:
    """How many times as fast, turn by turn, so that what slows the machine down for both cancels."""
    return [speed / other for speed, other in zip(speeds, others, strict=True)]


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Median [lowest to highest]."""
    return f"{statistics.median(values):{form}} [{min(values):{form}} to {max(values):{form}}]"


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a title, and rows in columns; the first row is the header."""
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip(), flush=True)


# Subjects


def run_script(checkout: Path, algorithm: str, flags: Sequence[str]) -> Turn:
    """Run a checkout's script to its end, in a process and a directory of its own."""
    with tempfile.TemporaryDirectory() as tmp:
        script = str(checkout / f"{algorithm}_mamujoco.py")
        command = [sys.executable, script, *flags, "--run-dir", f"{tmp}/run"]
        start = time.perf_counter()
        process = subprocess.run(command, cwd=tmp, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
    points = re.findall(r"^step (\d+) .*SPS ([\d.]+)", process.stdout, re.MULTILINE)
    if process.returncode or not points:
        print(process.stderr.strip() or f"error: {script} says no speed", file=sys.stderr)
        raise SystemExit(process.returncode or 1)
    steps, steps_per_second = map(float, points[-1])
    return Turn(seconds, steps, steps / steps_per_second, checkout)


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with one process; they end with the block, and if this process is killed."""
    program = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"
    command = [sys.executable, "-c", program, str(os.getpid())]
    processes = []
    try:
        for _ in range(os.cpu_count() or 1):
            processes.append(subprocess.Popen(command))
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_script_beside_busy_cores(algorithm: str, flags: Sequence[str]) -> Turn:
    """Run a script of this checkout while every core is busy."""
    with busy_cores():
        return run_script(ROOT, algorithm, flags)


def repeat(call: Callable[[], object], steps: float) -> Callable[[], Turn]:
    """A subject that makes as many calls, each worth `steps` environment steps, as fit into a turn."""
    call()  # warm up

    def turn() -> Turn:
        calls = 0
        start = time.perf_counter()
        while (seconds := time.perf_counter() - start) < TURN_SECONDS:
            call()
            calls += 1
        return Turn(seconds, calls * steps)

    return turn


def step_vec(vec: gym.vector.VectorEnv) -> Callable[[], Turn]:
    """Steps of a vector environment with random actions."""
    vec.reset(seed=0)
    vec.action_space.seed(0)
    actions = cycle([vec.action_space.sample() for _ in range(100)])
    return repeat(lambda: vec.step(next(actions)), vec.num_envs)


def step_mamujoco(env_id: str) -> Callable[[], Turn]:
    """Steps of one environment of Gymnasium-Robotics with random actions."""
    from gymnasium_robotics import mamujoco_v1

    env = mamujoco_v1.parallel_env(*env_id.split("-"), agent_obsk=0)
    env.reset(seed=0)
    spaces = {agent: env.action_space(agent) for agent in env.possible_agents}
    space = gym.spaces.Dict(spaces, seed=0)
    actions = cycle([space.sample() for _ in range(100)])

    def step() -> None:
        _, _, terminations, truncations, _ = env.step(next(actions))
        if any(terminations.values()) or any(truncations.values()):
            env.reset()

    return repeat(step, 1)


def step_physics(env_id: str, num_threads: int) -> Callable[[], Turn]:
    """Steps of bare `mujoco.batch` with random controls: no observations, no rewards.

    Its episodes are short: a robot that has fallen for good costs other time than one that runs.
    """
    vec = envs.make_vec(env_id, NUM_ENVS)
    vec.action_space.seed(0)
    controls = [vec.action_space.sample() for _ in range(100)]
    env = vec.unwrapped.env
    batch = Batch(env.model, NUM_ENVS, num_threads)
    batch_ctrl = batch.ctrl

    def episode() -> None:
        batch.reset(stage=mujoco.mjtStage.mjSTAGE_NONE)
        for ctrl in controls:
            batch_ctrl[:] = ctrl
            batch.step(nstep=env.frame_skip)

    return repeat(episode, len(controls) * NUM_ENVS)


def count_flops(algorithm: str, flags: Sequence[str]) -> float:
    """Make a script's run in this process; return the FLOPs of all its matrix products per environment step."""
    script = import_module(f"{algorithm}_mamujoco")
    with tempfile.TemporaryDirectory() as tmp:
        args = tyro.cli(script.Args, args=[*flags, "--run-dir", f"{tmp}/run"])
        with contextlib.redirect_stdout(io.StringIO()), FlopCounterMode(display=False) as counter:
            script.main(args)
    iteration = args.num_envs * args.num_steps
    return counter.get_total_flops() / (args.total_timesteps // iteration * iteration)


# Parts: each prints its table and returns its turns


def measure_scripts(args: Args) -> dict[str, list[Turn]]:
    """Whole runs at the default settings, here and in the other checkout."""
    there = args.against and args.against.resolve()
    subjects = {}
    for algorithm in args.algorithms:
        subjects[f"{algorithm} here"] = partial(run_script, ROOT, algorithm, args.flags())
        if there:
            subjects[f"{algorithm} there"] = partial(run_script, there, algorithm, args.flags())
    turns = take_turns(subjects, args.repeats)
    header = ["", "process, steps/s", "training loop, steps/s"]
    rows = [[*header, f"times as fast as {there}" if there else ""]]
    for algorithm in args.algorithms:
        here = turns[f"{algorithm} here"]
        row = [algorithm, spread(speeds(here)), spread(speeds(here, "training_seconds")), ""]
        if there:
            others = turns[f"{algorithm} there"]
            row[-1] = spread(ratios(speeds(here), speeds(others)), ".2f")
        rows.append(row)
    print_table(f"Scripts: {args.total_timesteps:,} steps of {args.env_id}", rows)
    return turns


def measure_limit(args: Args) -> dict[str, list[Turn]]:
    """Training loops against all their matrix products at the rate of a large one, plus bare physics.

    The products have one thread, as in the scripts.
    """
    torch.set_num_threads(1)
    a, b, out = torch.randn(3, 1024, 1024)
    subjects = {}
    flops = {}
    for algorithm in args.algorithms:
        settings = {"defaults": "", "HARL's settings": HARL[algorithm]}
        for title, more in settings.items():
            name = f"{algorithm}, {title}"
            flags = args.flags(more)
            flops[name] = count_flops(algorithm, flags)
            # How many environment steps a large product is worth; MADDPG's first 10,000 have none.
            worth = 2 * 1024**3 / max(1, flops[name])
            subjects[f"{name}: products"] = repeat(partial(torch.mm, a, b, out=out), worth)
            subjects[f"{name}: physics"] = step_physics(args.env_id, args.num_threads)
            subjects[f"{name}: script"] = partial(run_script, ROOT, algorithm, flags)
    turns = take_turns(subjects, args.repeats)
    rows = [["", "MFLOP/step", "limit, steps/s", "training loop, steps/s", "share of the limit"]]
    for name in flops:
        products = speeds(turns[f"{name}: products"])
        physics = speeds(turns[f"{name}: physics"])
        training = speeds(turns[f"{name}: script"], "training_seconds")
        limit = [1 / (1 / x + 1 / y) for x, y in zip(products, physics, strict=True)]
        share = spread(ratios(training, limit), ".0%")
        rows.append([name, f"{flops[name] / 1e6:.2f}", spread(limit), spread(training), share])
    title = f"Limit: {args.env_id}, nothing but matrix products on one thread and physics"
    print_table(title, rows)
    return turns


def measure_envs(args: Args) -> dict[str, list[Turn]]:
    """`envs.make_vec` against Gymnasium's and Gymnasium-Robotics' environments, and against bare physics."""
    turns = {}
    rows = []
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    for env_id in ENV_IDS:
        gym_id = envs.ROBOTS[env_id.split("-")[0]][0]
        ours = step_vec(envs.make_vec(env_id, NUM_ENVS, num_threads=args.num_threads))
        sync = gym.make_vec(gym_id, NUM_ENVS, "sync", vector_kwargs=same_step)
        others = {
            "SyncVectorEnv": step_vec(sync),
            "mujoco.batch alone": step_physics(env_id, args.num_threads),
        }
        if find_spec("gymnasium_robotics"):
            others["one mamujoco_v1"] = step_mamujoco(env_id)
        of_env = take_turns({"envs.make_vec": ours} | others, args.repeats)
        speed = speeds(of_env["envs.make_vec"])
        row = [env_id, spread(speed)]
        row += [spread(ratios(speed, speeds(of_env[name])), ".2f") for name in others]
        rows.append(row)
        turns |= {f"{env_id}: {name}": values for name, values in of_env.items()}
    header = ["", "envs.make_vec, steps/s", *(f"times as fast as {name}" for name in others)]
    print_table(f"Environments: {NUM_ENVS} at a time, random actions", [header, *rows])
    return turns


def measure_load(args: Args) -> dict[str, list[Turn]]:
    """Training loops at the default settings, alone and beside one busy process per core.

    With two processes for each core a script can expect half of its speed.
    """
    subjects = {}
    for algorithm in args.algorithms:
        flags = args.flags()
        subjects[f"{algorithm} alone"] = partial(run_script, ROOT, algorithm, flags)
        loaded = partial(run_script_beside_busy_cores, algorithm, flags)
        subjects[f"{algorithm} loaded"] = loaded
    turns = take_turns(subjects, args.repeats)
    rows = [["", "alone, steps/s", "beside busy cores, steps/s", "times as fast as alone"]]
    for algorithm in args.algorithms:
        alone = speeds(turns[f"{algorithm} alone"], "training_seconds")
        loaded = speeds(turns[f"{algorithm} loaded"], "training_seconds")
        rows.append(
            [algorithm, spread(alone), spread(loaded), spread(ratios(loaded, alone), ".2f")]
        )
    title = f"Load: training loops on {args.env_id}, alone and beside a busy process per core"
    print_table(title, rows)
    return turns


# Records


@cache
def commit_of(checkout: Path) -> str:
    """The commit of a checkout, `-dirty` if files differ from it; empty outside git."""
    git = f"git -C {shlex.quote(str(checkout))}"
    return subprocess.getoutput(f"{git} describe --always --dirty 2>/dev/null")


def main(args: Args) -> None:
    """Measure, print and write."""
    # Gymnasium's own model files have deprecated attributes, of which MuJoCo warns.
    mujoco.set_mju_user_warning(lambda _: None)
    machine = f"{processor()}, {os.cpu_count()} cores"
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    measures = {
        "scripts": measure_scripts,
        "limit": measure_limit,
        "envs": measure_envs,
        "load": measure_load,
    }
    numbers = f"median [lowest to highest] of {args.repeats}"
    print(f"{machine}; commit {commit_of(ROOT)}; {date}; {numbers}", flush=True)
    with open(args.csv or os.devnull, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        file.write("part,subject,repeat,seconds,training_seconds,steps,machine,date,commit\n")
        for part in args.parts:
            for subject, turns in measures[part](args).items():
                for i, turn in enumerate(turns):
                    seconds = f"{turn.seconds:.4f}", f"{turn.training_seconds:.4f}"
                    steps = round(turn.steps)
                    commit = commit_of(turn.checkout)
                    writer.writerow([part, subject, i, *seconds, steps, machine, date, commit])
            file.flush()  # an interrupted run keeps what it has


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
