"""How fast it is, and what the limit is: physics, rollout, update, whole scripts, and growth with the problem's size.

    python benchmark/throughput.py --parts env rollout update script growth --csv benchmark/results/throughput.csv

Each number is the median of repeated runs; parts that are compared with each other take turns in one process, so that
what else happens on the machine hits them alike. Run it on an idle machine.
"""

import csv
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro
from mujoco.batch import Batch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs  # noqa: E402

# HARL's tuned values for HalfCheetah: 20 x 200 steps, 3 x 128, 15 epochs on the whole batch (see peers in the docs).
HARL = {"num_envs": 20, "num_steps": 200, "hidden_sizes": (128, 128, 128), "critic_epochs": 15, "num_minibatches": 1}
HARL_PPO = HARL | {"update_epochs": 15, "clip_coef": 0.05}
SCRIPTS = ("mappo", "happo", "hatrpo")


@dataclass
class Args:
    """Command line."""

    parts: list[Literal["env", "rollout", "update", "script", "growth"]] = field(
        default_factory=lambda: ["env", "rollout", "update", "script", "growth"]
    )
    """what to measure"""
    repeats: int = 5
    """measurements per number; the median counts"""
    num_threads: int = 0
    """threads of PyTorch and of the physics each; 0: one per core"""
    csv: str | None = None
    """where to write the rows"""


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
    ctrl, step = batch.ctrl, iter(range(sys.maxsize))
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
    actions, step = actions.astype(np.float32), iter(range(sys.maxsize))
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


def measure_env(args: Args) -> list[dict]:
    """Steps per second of our environments, of bare physics, and of the alternatives."""
    rows = []
    mamujoco = {"HalfCheetah": "6x1", "Walker2d": "2x3", "Ant": "4x2", "Humanoid": "9|8"}
    for robot, partition in mamujoco.items():
        for num_envs in (16, 64):
            env_id = f"{robot}-{partition}"
            sync = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
            jobs = {
                "raw mujoco.batch": raw_stepper(env_id, num_envs, args.num_threads),
                "envs.make_vec": vec_stepper(envs.make_vec(env_id, num_envs, num_threads=args.num_threads)),
                "SyncVectorEnv": vec_stepper(gym.make_vec(f"{robot}-v5", num_envs, "sync", vector_kwargs=sync)),
                "mamujoco_v1": mamujoco_stepper(robot, partition),
            }
            for name, seconds in take_turns(jobs, args.repeats).items():
                steps = (1 if name == "mamujoco_v1" else num_envs) / seconds
                rows.append(
                    {"part": "env", "what": f"{env_id} x {num_envs}: {name}", "value": steps, "unit": "steps/s"}
                )
    return rows


def measure_rollout(args: Args) -> list[dict]:
    """HalfCheetah-6x1, 64 environments: everything that a script does per step, next to bare physics."""
    script = import_module("happo_mamujoco")
    vec = envs.make_vec("HalfCheetah-6x1", 64, num_threads=args.num_threads)
    env, generator = script.NormalizedEnv(vec, 0.99, torch.device("cpu")), torch.Generator().manual_seed(0)
    actors = script.make_actors(vec.partition, script.Args.hidden_sizes, False, generator)
    policy = script.JointPolicy(actors, vec.partition, 17, False)
    storage = [torch.zeros(64, 17), torch.zeros(64, 17), torch.zeros(64), torch.zeros(64), torch.zeros(64)]
    obs = env.reset(0)

    def step() -> None:
        nonlocal obs
        storage[0][:] = obs
        actions, _ = policy.act(obs, generator)
        obs, *rest, _ = env.step(actions)
        for buffer, value in zip(storage[1:], rest, strict=True):
            buffer[:] = value

    jobs = {"raw mujoco.batch": raw_stepper("HalfCheetah-6x1", 64, args.num_threads), "rollout": step}
    jobs["policy.act"] = lambda: policy.act(obs, generator)
    jobs["envs.make_vec"] = vec_stepper(envs.make_vec("HalfCheetah-6x1", 64, num_threads=args.num_threads))
    times = take_turns(jobs, args.repeats)
    return [
        {"part": "rollout", "what": f"HalfCheetah-6x1 x 64: {name}", "value": 64 / seconds, "unit": "steps/s"}
        for name, seconds in times.items()
    ]


def make_update(name: str, agents: int, rows: int, **hyperparameters: object) -> tuple[Callable[[], object], float]:
    """One update of all the actors of a script and of its critic, on random data; and the FLOPs of its products."""
    script = import_module(f"{name}_mamujoco")
    known = script.Args.__dataclass_fields__
    args = script.Args(**{key: value for key, value in hyperparameters.items() if key in known})
    generator = torch.Generator().manual_seed(0)
    actors = [script.Actor(17, 1, args.hidden_sizes, generator) for _ in range(agents)]
    critic = script.mlp((17, *args.hidden_sizes, 1), 1.0, generator)
    obs, actions = torch.randn(rows, 17, generator=generator), torch.randn(rows, 1, generator=generator)
    advantages = torch.randn(rows, generator=generator)
    with torch.no_grad():
        logprobs = [actor.log_prob(actor(obs), actions) for actor in actors]
    adam = [torch.optim.Adam(net.parameters(), lr=1e-6, fused=True) for net in (*actors, critic)]
    batch = [obs] * agents, [actions] * agents, logprobs, advantages, args, generator
    first = (actors,) if name == "hatrpo" else (actors, adam[:-1])

    def run() -> None:
        getattr(script, f"{name}_update")(*first, *batch)
        script.critic_update(critic, adam[-1], obs, advantages, args, generator)

    sizes = (17, *args.hidden_sizes, 1)
    forward = 2 * rows * sum(a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))
    # A pass is a forward and a backward of twice its cost. A Fisher product goes backwards through both: six forwards.
    if name == "hatrpo":
        per_agent = 3 + 3 + 2 + 6 * (args.cg_iters + 1) / args.fisher_stride
    else:
        per_agent = 3 * args.update_epochs + (name == "happo")
    return run, forward * (agents * per_agent + 3 * args.critic_epochs)


def measure_update(args: Args) -> list[dict]:
    """All six actors' and the critic's update at HARL's tuned settings, and what its matrix products alone would cost."""
    rows, size = [], 1024
    a, b = torch.randn(2, size, size)
    for name in SCRIPTS:
        run, flops = make_update(name, 6, 4000, **HARL_PPO)
        times = take_turns({"update": run, "product": lambda: a @ b}, args.repeats)
        rate = 2 * size**3 / times["product"]
        rows += [
            {"part": "update", "what": f"{name}: update", "value": times["update"], "unit": "s"},
            {"part": "update", "what": f"{name}: its arithmetic", "value": flops / rate, "unit": "s"},
            {"part": "update", "what": f"{name}: ratio", "value": times["update"] * rate / flops, "unit": ""},
        ]
    return [*rows, {"part": "update", "what": "matrix product", "value": rate / 1e9, "unit": "GFLOP/s"}]


def run_script(name: str, steps: int, num_threads: int, flags: list[str], run_dir: Path) -> float:
    """Environment steps per second that a script reports at the end of a run."""
    command = [sys.executable, str(ROOT / f"{name}_mamujoco.py"), "--total-timesteps", str(steps), *flags]
    command += ["--num-threads", str(num_threads), "--run-dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(re.findall(r"SPS (\d+)", done.stdout)[-1])


def measure_script(args: Args) -> list[dict]:
    """Whole scripts on HalfCheetah-6x1, at the project's defaults and at HARL's tuned settings."""
    import tempfile

    rows = []
    harl = {**HARL_PPO, "num_envs": 20}
    for setting in ("defaults", "HARL's settings"):
        for name in SCRIPTS:
            known = import_module(f"{name}_mamujoco").Args.__dataclass_fields__
            flags = []
            for key, value in harl.items() if setting != "defaults" else ():
                if key in known:
                    flags += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
            with tempfile.TemporaryDirectory() as tmp:
                runs = [
                    run_script(name, 40_000, args.num_threads, flags, Path(tmp, str(i))) for i in range(args.repeats)
                ]
            rows.append(
                {"part": "script", "what": f"{name}, {setting}", "value": statistics.median(runs), "unit": "steps/s"}
            )
    return rows


def measure_growth(args: Args) -> list[dict]:
    """Steps per second and memory as agents, environments and the batch grow (HAPPO, defaults otherwise)."""
    cases = [("HalfCheetah", p, 20, 100) for p in ("1x6", "2x3", "3x2", "6x1")] + [("Humanoid", "17x1", 20, 100)]
    cases += [("HalfCheetah", "6x1", n, max(1, 4096 // n)) for n in (4, 16, 64, 256)]
    cases += [("HalfCheetah", "6x1", 32, n // 32) for n in (1024, 4096, 16384, 65536)]
    rows = []
    for robot, partition, num_envs, num_steps in cases:
        code = (
            "import sys, resource, happo_mamujoco as s; t = sys.argv;"
            "s.main(s.Args(env_id=t[1], num_envs=int(t[2]), num_steps=int(t[3]), total_timesteps=3 * int(t[2]) * int(t[3]),"
            "run_dir=t[4], num_threads=int(t[5]), num_minibatches=1));"
            "print('MB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        import tempfile

        with tempfile.TemporaryDirectory() as tmp:
            argv = [f"{robot}-{partition}", num_envs, num_steps, f"{tmp}/run", args.num_threads]
            command = [sys.executable, "-c", code, *map(str, argv)]
            out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        what = f"{robot}-{partition}, {num_envs} envs x {num_steps}"
        rows.append(
            {"part": "growth", "what": what, "value": float(re.findall(r"SPS (\d+)", out)[-1]), "unit": "steps/s"}
        )
        rows.append({"part": "growth", "what": what, "value": float(re.findall(r"MB (.*)", out)[-1]), "unit": "MB"})
    return rows
