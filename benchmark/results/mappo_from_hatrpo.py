"""Turn the checkpoint of a run of HATRPO into one that MAPPO continues, with a fresh optimizer of the actors.

    PYTHONPATH=. python benchmark/results/mappo_from_hatrpo.py RUN_DIR NEW_DIR
    python mappo_mamujoco.py --resume NEW_DIR --total-timesteps 1300000

Environment, policy, critic, critic's optimizer and random generator are the run's. Flags that both scripts have keep
the run's values, but for `--num-minibatches`, which in MAPPO is the actors' as well: it has MAPPO's default.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch.optim import Adam

import envs
import mappo_mamujoco as mappo

run_dir, new_dir = map(Path, sys.argv[1:])
checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
shared = mappo.Args.__dataclass_fields__.keys() & checkpoint["args"].keys()
shared.remove("num_minibatches")
args = mappo.Args(**{name: checkpoint["args"][name] for name in shared})
vec = envs.make_vec(args.env_id, args.num_envs, args.agent_obsk, 1)
(obs_dim,) = vec.single_observation_space.shape
policy = mappo.Policy(vec.partition, obs_dim, args)
optimizer = Adam(policy.parameters(), eps=1e-5, fused=True)
del checkpoint["region"]
checkpoint["script"] = mappo.SCRIPT
checkpoint["args"] = asdict(args)
checkpoint["actor_optimizer"] = optimizer.state_dict()
new_dir.mkdir(parents=True)
torch.save(checkpoint, new_dir / "checkpoint.pt")
