"""Train BenchMARL's MAPPO on PettingZoo's simple_spread: what docs/your_environment.md compares this project with.

BenchMARL wants an older PettingZoo than this project, so it has a virtual environment of its own:

    python3 -m venv benchmarl
    benchmarl/bin/pip install benchmarl==1.5.2 torchrl==0.11.1 torch==2.13.0 "pettingzoo[mpe]==1.24.3"
    benchmarl/bin/python benchmark/benchmarl_spread.py --seed 101 --run-dir runs/benchmarl-101

The hyperparameters are BenchMARL's defaults. The last line that is printed has the steps per second of collection and
training, without the evaluations, then mean and standard deviation of the returns of 100 episodes, played without noise
after the last step. A return is the sum over the steps and the three agents.
"""

import argparse
import csv
from pathlib import Path

import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.environments import PettingZooTask
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig


class LastEvaluation(Callback):
    """The returns of the last evaluation."""

    def on_evaluation_end(self, rollouts: list) -> None:
        """Sum up the rewards, [25 steps, 3 agents, 1], of each episode."""
        rewards = [rollout["next", "agent", "reward"] for rollout in rollouts]
        self.returns = torch.stack([reward.sum() for reward in rewards])


def seconds(run_dir: Path, timer: str) -> float:
    """Sum of a timer over the iterations, from BenchMARL's own log."""
    (path,) = run_dir.rglob(f"timers_{timer}_time.csv")
    return sum(float(value) for _, value in csv.reader(path.open()))


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--total-timesteps", type=int, default=504_000, help="a multiple of 6,000")
    args = parser.parse_args()

    torch.set_num_threads(1)
    args.run_dir.mkdir(parents=True)
    config = ExperimentConfig.get_from_yaml()
    config.prefer_continuous_actions = True
    config.max_n_frames = args.total_timesteps
    config.evaluation_interval = args.total_timesteps
    config.evaluation_episodes = 100
    config.render = False
    config.loggers = ["csv"]
    config.save_folder = str(args.run_dir)
    task = PettingZooTask.SIMPLE_SPREAD.get_from_yaml()
    task.config["max_cycles"] = 25  # PettingZoo's default; BenchMARL's is 100
    evaluation = LastEvaluation()
    experiment = Experiment(
        task=task,
        algorithm_config=MappoConfig.get_from_yaml(),
        model_config=MlpConfig.get_from_yaml(),
        critic_model_config=MlpConfig.get_from_yaml(),
        seed=args.seed,
        config=config,
        callbacks=[evaluation],
    )
    experiment.run()

    speed = args.total_timesteps / (
        seconds(args.run_dir, "collection") + seconds(args.run_dir, "training")
    )
    returns = evaluation.returns
    print(
        f"seed {args.seed}, {args.total_timesteps} steps: {speed:.0f} steps/s, "
        f"return {returns.mean():.2f}, std {returns.std(correction=0):.2f}"
    )


if __name__ == "__main__":
    main()
