"""How fast it is, and what the limit is: physics, rollout, update, scripts, phases, time to a return, growth with size.

    python benchmark/throughput.py --csv benchmark/results/throughput.csv              # everything, half an hour
    python benchmark/throughput.py --parts script phases --repeats 3                   # some of it

Each number is the median of repeated runs; parts that are compared with each other take turns in one process, so that
what else happens on the machine hits them alike. Run it on an idle machine.
"""

import contextlib
import csv
import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro
from mujoco.batch import Batch
from torch.utils.tensorboard import FileWriter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs  # noqa: E402
from envs.tasks import MujocoVectorEnv  # noqa: E402

# HARL's tuned values for HalfCheetah: 20 x 200 steps, 3 x 128, 15 epochs on the whole batch (see peers in the docs).
HARL = {"num_envs": 20, "num_steps": 200, "hidden_sizes": (128, 128, 128), "critic_epochs": 15, "num_minibatches": 1}
HARL_PPO = HARL | {"update_epochs": 15, "clip_coef": 0.05}
SCRIPTS = ("mappo", "happo", "hatrpo")


@dataclass
class Args:
    """Command line."""

    parts: list[Literal["env", "rollout", "update", "script", "phases", "return", "growth"]] = field(
        default_factory=lambda: ["env", "rollout", "update", "script", "phases", "return", "growth"]
    )
    """what to measure"""
    repeats: int = 5
    """measurements per number; the median counts"""
    num_threads: int = 0
    """threads of PyTorch and of the physics each; 0: one per core"""
    csv: Path | None = None
    """where to write the rows, and beside them growth.png; rows of parts that are not measured stay"""


def take_turns(jobs: dict[str, Callable[[], object]], repeats: int, seconds: float = 0.5) -> dict[str, float]:
    """Seconds per call of each job: the median over `repeats` rounds in which every job runs for about `seconds`."""
    calls = {}
    for name, job in jobs.items():
        job()  # warm up
        start = time.perf_counter()
        job()
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                job()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def raw_stepper(env_id: str, num_envs: int, num_threads: int) -> Callable[[], None]:
    """Bare `mujoco.batch` on the model of an environment: random controls, no observation, reward or reset."""
    env = envs.make_vec(env_id, 1).unwrapped.env
    batch = Batch(env.model, num_envs, num_threads)
    low, high = env.action_space.low, env.action_space.high
    controls = np.random.default_rng(0).uniform(low, high, (100, num_envs, env.model.nu))
    ctrl, step = batch.ctrl, count()
    batch.reset()

    def run() -> None:
        t = next(step)
        if t % 100 == 0:  # a robot that has fallen for good costs other time than one that runs
            batch.reset(stage=mujoco.mjtStage.mjSTAGE_NONE)
        ctrl[:] = controls[t % 100]
        batch.step(nstep=env.frame_skip)

    return run


def vec_stepper(vec: gym.vector.VectorEnv) -> Callable[[], None]:
    """Steps of a vector environment with random actions."""
    vec.reset(seed=0)
    space = vec.single_action_space
    actions = np.random.default_rng(0).uniform(space.low, space.high, (100, *vec.action_space.shape))
    actions, step = actions.astype(np.float32), count()
    return lambda: vec.step(actions[next(step) % 100])


def mamujoco_stepper(robot: str, partition: str) -> Callable[[], None]:
    """Steps of one Gymnasium-Robotics MaMuJoCo environment."""
    from gymnasium_robotics import mamujoco_v1

    env = mamujoco_v1.parallel_env(robot, partition, agent_obsk=0)
    env.reset(seed=0)
    actions = {agent: env.action_space(agent).sample() for agent in env.possible_agents}

    def run() -> None:
        _, _, terminations, truncations, _ = env.step(actions)
        if any(terminations.values()) or any(truncations.values()):
            env.reset()

    return run


def physics_share(env_id: str, num_envs: int, num_threads: int) -> float:
    """Share of an environment's time that is spent within `mujoco.batch`: the same states, unlike bare stepping."""
    vec = envs.make_vec(env_id, num_envs, num_threads=num_threads)
    step, batch, inside = vec_stepper(vec), vec.unwrapped.batch, 0.0

    def timed_step(**kwargs: int) -> None:
        nonlocal inside
        start = time.perf_counter()
        Batch.step(batch, **kwargs)
        inside += time.perf_counter() - start

    batch.step = timed_step
    start = time.perf_counter()
    for _ in range(6400 // num_envs):
        step()
    return inside / (time.perf_counter() - start)


def row(part: str, what: str, value: float, unit: str) -> dict:
    """One line of the table."""
    return {"part": part, "what": what, "value": f"{value:.4g}", "unit": unit}


def measure_env(args: Args) -> list[dict]:
    """Steps per second of our environments, of bare physics, and of the alternatives."""
    rows = []
    for robot, partition in {"HalfCheetah": "6x1", "Walker2d": "2x3", "Ant": "4x2", "Humanoid": "9|8"}.items():
        for num_envs in (16, 64):
            env_id, same_step = f"{robot}-{partition}", {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
            jobs = {
                "raw mujoco.batch": raw_stepper(env_id, num_envs, args.num_threads),
                "envs.make_vec": vec_stepper(envs.make_vec(env_id, num_envs, num_threads=args.num_threads)),
                "SyncVectorEnv": vec_stepper(gym.make_vec(f"{robot}-v5", num_envs, "sync", vector_kwargs=same_step)),
                "mamujoco_v1": mamujoco_stepper(robot, partition),
            }
            for name, seconds in take_turns(jobs, args.repeats).items():
                steps = (1 if name == "mamujoco_v1" else num_envs) / seconds
                rows.append(row("env", f"{env_id} x {num_envs}: {name}", steps, "steps/s"))
            share = statistics.median(physics_share(env_id, num_envs, args.num_threads) for _ in range(args.repeats))
            rows.append(row("env", f"{env_id} x {num_envs}: mujoco.batch's share of make_vec", 100 * share, "%"))
    return rows


def measure_rollout(args: Args) -> list[dict]:
    """HalfCheetah-6x1, 64 environments: everything that a script does per step, next to bare physics."""
    script = import_module("happo_mamujoco")
    vec = envs.make_vec("HalfCheetah-6x1", 64, num_threads=args.num_threads)
    env, generator = script.NormalizedEnv(vec, 0.99, torch.device("cpu")), torch.Generator().manual_seed(0)
    policy = script.Policy(vec.partition, 17, script.Args(), generator, env.device)
    obs_buf, next_obs_buf, (rewards, terminations, truncations) = *torch.zeros(2, 64, 17), torch.zeros(3, 64)
    actions = torch.zeros(64, 6)
    obs = env.reset(0)

    def step() -> None:
        nonlocal obs
        obs_buf[:] = obs
        actions[:] = policy.act(obs, generator)
        obs, next_obs_buf[:], rewards[:], terminations[:], truncations[:] = env.step(actions)

    jobs = {
        "raw mujoco.batch": raw_stepper("HalfCheetah-6x1", 64, args.num_threads),
        "envs.make_vec": vec_stepper(envs.make_vec("HalfCheetah-6x1", 64, num_threads=args.num_threads)),
        "policy alone": lambda: policy.act(obs, generator),
        "whole rollout": step,
    }
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the scripts do while they act
    times = take_turns(jobs, args.repeats)
    torch.set_num_threads(num_threads)
    return [row("rollout", f"HalfCheetah-6x1 x 64: {name}", 64 / times[name], "steps/s") for name in jobs]


def make_update(name: str, agents: int, rows: int, **hyperparameters: object) -> tuple[Callable[[], object], float]:
    """One update of all the actors of a script and of its critic, on random data; and the FLOPs of its products."""
    script = import_module(f"{name}_mamujoco")
    known = script.Args.__dataclass_fields__
    args = script.Args(**{key: value for key, value in hyperparameters.items() if key in known})
    generator = torch.Generator().manual_seed(0)
    actors = [script.Actor(17, 1, args, generator) for _ in range(agents)]
    critic = script.MLP((17, *args.hidden_sizes, 1), 1.0, generator)
    obs, actions = torch.randn(rows, 17, generator=generator), torch.randn(rows, 1, generator=generator)
    advantages = torch.randn(rows, generator=generator)
    adam = [torch.optim.Adam(net.parameters(), lr=1e-6, fused=True) for net in (*actors, critic)]
    batch = [obs] * agents, [actions] * agents, advantages, args, generator
    first = (actors,) if name == "hatrpo" else (actors, adam[:-1])

    def run() -> None:
        getattr(script, f"{name}_update")(*first, *batch)
        script.critic_update(critic, adam[-1], obs, advantages, args, generator)

    sizes = (17, *args.hidden_sizes, 1)
    forward = 2 * rows * sum(a * b for a, b in pairwise(sizes))
    # A pass is a forward, and a backward of twice its cost. A Fisher product, Jv and then J^T u, costs four forwards.
    # HATRPO: gradient, graphs of the Fisher product, products, one try of the line search, old log-probabilities, M.
    if name == "hatrpo":
        per_agent = 3 + (3 + 4 * args.cg_iters) / args.fisher_stride + 1 + 1 + 1
    else:
        per_agent = 3 * args.update_epochs + 1 + 1  # old log-probabilities; what is logged
    return run, forward * (agents * per_agent + 3 * args.critic_epochs + 1)


def measure_update(args: Args) -> list[dict]:
    """The update of six actors and a critic at HARL's settings, and what its matrix products alone would cost."""
    rows, size = [], 1024
    a, b = torch.randn(2, size, size)
    for name in SCRIPTS:
        run, flops = make_update(name, 6, 4000, **HARL_PPO)
        times = take_turns({"update": run, "product": lambda: a @ b}, args.repeats)
        arithmetic = flops / (2 * size**3) * times["product"]
        rows.append(row("update", f"{name}: update", times["update"], "s"))
        rows.append(row("update", f"{name}: its matrix products alone", arithmetic, "s"))
        rows.append(row("update", f"{name}: ratio", times["update"] / arithmetic, ""))
    return [*rows, row("update", "rate of a large matrix product", 2 * size**3 / times["product"] / 1e9, "GFLOP/s")]


@dataclass
class Outcome:
    """What a script printed of each iteration: step, mean return of the episodes that ended, speed; its memory."""

    points: list[tuple[int, float, float]]
    megabytes: float

    @property
    def steps_per_second(self) -> float:
        """The speed after the first iterations: from the first point that was printed to the last."""
        (first, _, first_speed), (last, _, last_speed) = self.points[0], self.points[-1]
        return (last - first) / (last / last_speed - first / first_speed)


def run_script(name: str, flags: dict[str, object], until: float = np.inf) -> Outcome:
    """Run a script in a process of its own, to its end or to a return."""
    program = (
        "import sys, resource, tyro, {0}_mamujoco as script; script.main(tyro.cli(script.Args));"
        "print('MB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    with tempfile.TemporaryDirectory() as tmp:
        words = [f"--run-dir={tmp}/run", "--eval-interval=1"]  # a line per iteration
        for key, value in flags.items():
            words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
        command = [sys.executable, "-c", program.format(name), *words]
        outcome = Outcome([], np.nan)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            for line in process.stdout:
                if point := re.match(r"step (\d+)(?: charts/episodic_return (\S+))? charts/SPS (\S+)", line):
                    outcome.points.append((int(point[1]), float(point[2] or "nan"), float(point[3])))
                    if outcome.points[-1][1] >= until:
                        process.kill()
                        break
                elif memory := re.match(r"MB (.*)", line):
                    outcome.megabytes = float(memory[1])
        if process.returncode and until == np.inf:
            raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}")
    return outcome


def measure_script(args: Args) -> list[dict]:
    """Whole scripts on HalfCheetah-6x1, at the project's defaults and at HARL's tuned settings; they take turns."""
    runs: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.repeats):
        for setting, flags in (("defaults", {}), ("HARL's settings", HARL_PPO)):
            for name in SCRIPTS:
                known = import_module(f"{name}_mamujoco").Args.__dataclass_fields__
                chosen = {key: value for key, value in flags.items() if key in known}
                chosen |= {"total_timesteps": 60_000, "num_threads": args.num_threads, "eval_episodes": 0}
                runs.setdefault((name, setting), []).append(run_script(name, chosen).steps_per_second)
    return [
        row("script", f"{name}, {setting}", statistics.median(sps), "steps/s") for (name, setting), sps in runs.items()
    ]


def measure_phases(args: Args) -> list[dict]:
    """Where the time of a script goes, per environment step at the defaults, without setup: a profile by phase."""
    rows = []
    for name in SCRIPTS:
        script = import_module(f"{name}_mamujoco")
        phases = {
            "physics and task": [(MujocoVectorEnv, "step")],
            "normalisation": [(script.NormalizedEnv, "step")],
            "inference": [(script.Policy, "act")],
            "GAE": [(script, "compute_gae")],
            "actors": [(script, f"{name}_update")],
            "critic": [(script, "critic_update")],
            "logging, progress bar": [(FileWriter, "add_summary"), (script.tqdm, "update")],
            "checkpoint": [(script, "save")],
            "setup": [(script.envs, "make_vec"), (script.SummaryWriter, "__init__")],
            "storage and the rest": [(script, "main")],
        }
        runs = [profile(script, phases, args.num_threads) for _ in range(1 + args.repeats)][1:]  # the first warms up
        for phase in phases.keys() - {"setup"}:
            rows.append(row("phases", f"{name}: {phase}", statistics.median(run[phase] for run in runs), "us/step"))
    return sorted(rows, key=lambda line: (SCRIPTS.index(line["what"].split(":")[0]), -float(line["value"])))


def profile(script: ModuleType, phases: dict[str, list[tuple[Any, str]]], num_threads: int) -> dict[str, float]:
    """Run a script in this process; return microseconds per environment step in each phase, less what it calls."""
    seconds, inner, num_steps = dict.fromkeys(phases, 0.0), [0.0], 40_000

    def timed(function: Callable, phase: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            duration = time.perf_counter() - start
            seconds[phase] += duration - inner.pop()
            inner[-1] += duration
            return result

        return call

    with tempfile.TemporaryDirectory() as tmp, contextlib.ExitStack() as stack:
        for phase, places in phases.items():
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), phase)))
        flags = {"total_timesteps": num_steps, "num_threads": num_threads, "eval_episodes": 0, "run_dir": f"{tmp}/run"}
        with contextlib.redirect_stdout(io.StringIO()):
            script.main(script.Args(**flags))
    return {phase: 1e6 * value / num_steps for phase, value in seconds.items()}


def measure_return(args: Args) -> list[dict]:
    """Seconds of training until HalfCheetah-6x1 returns 3,000 with the defaults: mean of the latest 20 episodes."""
    rows = []
    for name in SCRIPTS:
        times = []
        for seed in (1, 2, 3):
            flags = {"total_timesteps": 500_000, "seed": seed, "num_threads": args.num_threads, "eval_episodes": 0}
            step, value, steps_per_second = run_script(name, flags, until=3000).points[-1]
            step = step if value >= 3000 else np.inf
            times.append(step / steps_per_second)
            rows.append(row("return", f"{name}, seed {seed}: steps to a return of 3,000", step, "steps"))
            rows.append(row("return", f"{name}, seed {seed}: time to a return of 3,000", times[-1], "s"))
        rows.append(row("return", f"{name}: median time to a return of 3,000", statistics.median(times), "s"))
    return rows


def measure_growth(args: Args) -> list[dict]:
    """Steps per second and memory as agents, environments and the batch grow (HAPPO, else its defaults)."""
    cases = [("agents", f"HalfCheetah-{p}", 20, 100) for p in ("1x6", "2x3", "3x2", "6x1")]
    cases += [("agents", "Humanoid-17x1", 20, 100)]
    cases += [("environments", "HalfCheetah-6x1", num_envs, 4096 // num_envs) for num_envs in (4, 16, 64, 256)]
    cases += [("batch", "HalfCheetah-6x1", 32, batch // 32) for batch in (1024, 4096, 16384, 65536)]
    rows = []
    for what, env_id, num_envs, num_steps in cases:
        flags = {"env_id": env_id, "num_envs": num_envs, "num_steps": num_steps, "num_threads": args.num_threads}
        batch = num_envs * num_steps
        flags |= {"total_timesteps": batch * max(2, 30_000 // batch), "eval_episodes": 0}
        runs = [run_script("happo", flags) for _ in range(args.repeats)]
        name = f"{what}: {env_id}, {num_envs} envs x {num_steps}"
        speed = statistics.median(run.points[-1][2] for run in runs)  # with the start: few iterations of the largest
        memory = statistics.median(run.megabytes for run in runs)
        rows += [row("growth", name, speed, "steps/s"), row("growth", name, memory, "MB")]
    return rows


def draw_growth(rows: list[dict], path: Path) -> None:
    """Draw the rows of the part `growth`: steps per second, and memory, against agents, environments and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for ax, what in zip(axes, ("agents", "environments", "batch"), strict=True):
        points: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for line in rows:
            name = re.fullmatch(rf"{what}: (\w+)-(\d+)x\d+, (\d+) envs x (\d+)", line["what"])
            if name:
                robot, agents, num_envs, num_steps = name[1], *map(int, name.groups()[1:])
                x = {"agents": agents, "environments": num_envs, "batch": num_envs * num_steps}[what]
                points.setdefault((robot, line["unit"]), []).append((x, float(line["value"])))
        memory = ax.twinx()
        for (robot, unit), values in points.items():
            where, color = (memory, "C1") if unit == "MB" else (ax, "C0")
            where.plot(*zip(*values, strict=True), "o-" if robot == "HalfCheetah" else "s", color=color)
        ax.set(xlabel=what + (" (square: Humanoid-17x1)" if what == "agents" else ""), xscale="log", ylim=0)
        ax.set_ylabel("steps/s", color="C0")
        memory.set_ylabel("memory of the process, MB", color="C1")
        memory.set_ylim(0)
        ax.set_xticks(sorted({x for values in points.values() for x, _ in values}))
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.xaxis.set_minor_formatter("")
    fig.suptitle("HAPPO on HalfCheetah-6x1, defaults but for what varies", fontsize="small")
    fig.savefig(path, dpi=110)


def main(args: Args) -> None:
    """Measure, print and write."""
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    mujoco.set_mju_user_warning(lambda _: None)  # Gymnasium's own model files have deprecated attributes
    measures = {"env": measure_env, "rollout": measure_rollout, "update": measure_update, "script": measure_script}
    measures |= {"phases": measure_phases, "return": measure_return, "growth": measure_growth}
    rows: list[dict] = []
    if args.csv and args.csv.exists():
        with open(args.csv, newline="") as file:
            rows = [line for line in csv.DictReader(file) if line["part"] not in args.parts]
    for part in args.parts:
        for line in measures[part](args):
            print(f"{line['part']:8} {line['what']:56} {line['value']:>10} {line['unit']}", flush=True)
            rows.append(line)
        if args.csv:  # after every part: an interrupted run keeps what it has
            args.csv.parent.mkdir(parents=True, exist_ok=True)
            rows.sort(key=lambda line: list(measures).index(line["part"]))
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            draw_growth(rows, args.csv.with_name("growth.png"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
