"""Break one line, see red: faults in the scripts and in envs/, one at a time in a copy; the tests must catch every one.

    python tests/mutants.py            # all, prints a table, exit code 1 if one survives
    python tests/mutants.py 3 17       # only these

A fault in a line that several scripts have is made in all of them (in ippo_mamujoco.py where mappo_mamujoco.py has it),
and tests/test_siblings.py does not take part, so that what is caught is the fault and not the difference.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("mappo_mamujoco.py", "happo_mamujoco.py", "hatrpo_mamujoco.py")
# What caught a fault the last time is tried first: file and test by fault.
ROW = r"^\| \d+ \| (.+) \| (test_\w+\.py)::(\w+).* \| \d+ s \|$"
LAST = {row[0]: row[1:] for row in re.findall(ROW, (ROOT / "tests/mutants.md").read_text(), re.MULTILINE)}
ORDER = (
    "gae",
    "policy",
    "trust_region",
    "updates",
    "exact_games",
    "partition",
    "models",
    "tasks",
    "ippo",
    "maddpg",
    "runs",
    "scripts",
    "other_envs",
    "evaluate",
    "learning",
)

# What is wrong, the files, the line's text, what it becomes.
MUTANTS: list[tuple[str, tuple[str, ...], str, str]] = [
    ("sign of the clipped objective", SCRIPTS[:2], "policy_loss = -torch.min(", "policy_loss = torch.min("),
    ("max instead of min", SCRIPTS[:2], "-torch.min(", "-torch.max("),
    ("only the upper side clipped", SCRIPTS[:2], "ratio.clamp(1 - clip_coef, 1 + clip_coef)", "ratio.clamp(max=1 + clip_coef)"),
    ("only the lower side clipped", SCRIPTS[:2], "ratio.clamp(1 - clip_coef, 1 + clip_coef)", "ratio.clamp(min=1 - clip_coef)"),
    ("entropy bonus as a penalty", SCRIPTS[:2], "policy_loss - ent_coef * entropy", "policy_loss + ent_coef * entropy"),
    ("entropy bonus as a penalty (HATRPO)", SCRIPTS[2:], "+ args.ent_coef * actor.entropy", "- args.ent_coef * actor.entropy"),
    ("log-probability not summed over dimensions", SCRIPTS, "-0.5 * z.square().sum(-1)", "-0.5 * z.square().mean(-1)"),
    ("log_std taken for a variance", SCRIPTS, "z = (actions - mean) * torch.exp(-log_std)", "z = (actions - mean) * torch.exp(-log_std / 2)"),
    ("gradient never clipped", SCRIPTS[1:2], "nn.utils.clip_grad_norm_(actors[i].parameters(), args.max_grad_norm)", "pass"),
    ("M not updated", SCRIPTS[1:2], "            M = M * logratio.exp()\n", "            pass\n"),
    ("joint policy not bounded", SCRIPTS[1:2], "(joint.exp() - 1 - joint).mean() > radius", "False"),
    ("every agent may use the whole radius", SCRIPTS[1:2], "args.target_kl * (len(stats) + 1) / len(actors)", "args.target_kl"),
    ("every agent gets the first one's share", SCRIPTS[1:2], "args.target_kl * (len(stats) + 1) / len(actors)", "args.target_kl / len(actors)"),
    ("one agent bounded, not the joint policy", SCRIPTS[1:2], "joint = joint_logratio[mb] + logratio", "joint = logratio"),
    ("M not updated (HATRPO)", SCRIPTS[2:], "M = M * logratios[-1].exp()", "pass"),
    ("M multiplied with the inverse ratio", SCRIPTS[1:2], "M = M * logratio.exp()", "M = M / logratio.exp()"),
    ("M multiplied with the inverse ratio (HATRPO)", SCRIPTS[2:], "M = M * logratios[-1].exp()", "M = M / logratios[-1].exp()"),
    ("M starts again from A", SCRIPTS[1:2], "M = M * logratio.exp()", "M = advantages * logratio.exp()"),
    ("M starts again from A (HATRPO)", SCRIPTS[2:], "M = M * logratios[-1].exp()", "M = advantages * logratios[-1].exp()"),
    ("M normalised after each agent", SCRIPTS[1:], "    return stats, M\n", "    return stats, M / M.std()\n"),
    ("the actors see A instead of M", SCRIPTS[1:2], "logprobs[i][mb], M[mb]", "logprobs[i][mb], advantages[mb]"),
    ("order never random", SCRIPTS[1:], "if args.fixed_order else order:", "if args.fixed_order else sorted(order):"),
    ("KL the wrong way round", SCRIPTS[2:], "(old_mean, old_log_std), (mean, log_std) = old, new", "(old_mean, old_log_std), (mean, log_std) = new, old"),
    ("no damping", SCRIPTS[2:], "H_direction + damping * direction", "H_direction"),
    ("pi_old of an agent after the others' updates", SCRIPTS[1:2], "batch = obs[i][mb], actions[i][mb], logprobs[i][mb], M[mb]", "batch = obs[i][mb], actions[i][mb], actors[i].log_prob(actors[i](obs[i][mb]), actions[i][mb]).detach(), M[mb]"),
    ("half the step length", SCRIPTS[2:], "torch.sqrt(2 * delta", "torch.sqrt(delta"),
    ("KL not checked in the line search", SCRIPTS[2:], "expected_gain and kl <= delta", "expected_gain"),
    ("gain not checked in the line search", SCRIPTS[2:], "gain >= args.accept_ratio * scale * expected_gain and kl", "kl"),
    ("gain of a full step expected from a short one", SCRIPTS[2:], "args.accept_ratio * scale * expected_gain", "args.accept_ratio * expected_gain"),
    ("one backtrack too few", SCRIPTS[2:], "range(args.backtrack_iters + 1)", "range(args.backtrack_iters)"),
    ("rejected step's KL and gain reported", SCRIPTS[2:], "new_theta, gain, kl = theta, torch.zeros_like(gain), torch.zeros_like(kl)", "new_theta = theta"),
    ("rejected step kept", SCRIPTS[2:], "    actor.theta.data.copy_(theta)\n    stats |=", "    stats |="),
    ("steepest descent for conjugate gradient", SCRIPTS[2:], "direction = residual + rr / old_rr * direction", "direction = residual"),
    ("conjugate gradient never stops", SCRIPTS[2:], "        if rr < tolerance:\n            break\n", ""),
    ("Fisher matrix on the wrong rows' scale", SCRIPTS[2:], "for d in dist], new).mean(), new, create", "for d in dist], new).sum(), new, create"),
    ("damping that is no share of the curvature", SCRIPTS[2:], "args.cg_damping * curvature", "args.cg_damping"),
    ("curvature per norm instead of squared norm", SCRIPTS[2:], "/ (gradient @ gradient)", "/ gradient.norm()"),
    ("every agent gets the joint policy's radius", SCRIPTS[2:], "args.target_kl / len(actors)", "args.target_kl"),
    ("the batch's KL of one agent, not of the joint policy", SCRIPTS[2:], "sampled_kl(sum(logratios, actor", "sampled_kl(sum([], actor"),
    ("the batch's KL not checked", SCRIPTS[2:], "torch.maximum(actor.kl(old_dist, dist).mean(), joint_kl / (len(logratios) + 1))", "actor.kl(old_dist, dist).mean()"),
    ("the batch's KL gets one share for all agents", SCRIPTS[2:], "joint_kl / (len(logratios) + 1)", "joint_kl"),
    ("only the batch's KL checked", SCRIPTS[2:], "torch.maximum(actor.kl(old_dist, dist).mean(), joint_kl / (len(logratios) + 1))", "joint_kl / (len(logratios) + 1)"),
    ("length of the step from the damped matrix", SCRIPTS[2:], "Hx + alpha * H_direction", "Hx + alpha * damped"),
    ("truncation taken for termination", SCRIPTS, "gamma * (1 - terminations) * next_values", "gamma * (1 - terminations) * (1 - truncations) * next_values"),
    ("termination ignored", SCRIPTS, "gamma * (1 - terminations) * next_values", "gamma * next_values"),
    ("advantages cross truncations", SCRIPTS, "(1 - terminations) * (1 - truncations)  # nothing", "(1 - terminations)  # nothing"),
    ("GAE off by one", SCRIPTS, "deltas[t] + carry[t] * last", "deltas[t] + carry[t - 1] * last"),
    ("lambda forgotten", SCRIPTS, "carry = gamma * gae_lambda *", "carry = gamma *"),
    ("next episode's observation leaks into the ended one", SCRIPTS, 'next_obs[done] = self.normalize(np.stack(infos["final_obs"][done]))', "pass"),
    ("evaluation moves the statistics", SCRIPTS, "    while running.any():\n", "    while running.any():\n        env.obs_rms.update(obs)\n"),
    ("observation statistics of the first reset only", SCRIPTS, "        self.obs_rms.update(obs)\n        self.sums", "        self.sums"),
    ("returns cross episodes", SCRIPTS, "self.sums[:, done] = 0", "pass"),
    ("returns not discounted in the statistics", SCRIPTS, "[[self.gamma], [1], [1]]", "[[1], [1], [1]]"),
    ("actions not clipped", SCRIPTS, "actions.clamp(-1, 1).cpu()", "actions.cpu()"),
    ("actions not scaled to the actuators", SCRIPTS, "self.action_mid + self.action_half * actions", "actions"),
    ("outputs in agent order, not on the actuators", SCRIPTS, "action_ids[partition.act_ids[i]] =", "action_ids[np.sort(partition.act_ids[i])] ="),
    ("agents see the first entries", SCRIPTS, "obs_ids[i, : len(ids)] = ids", "obs_ids[i, : len(ids)] = np.arange(len(ids))"),
    ("shared network does not learn the agent's id", SCRIPTS, "obs_dim + np.eye(num_agents, dtype=int)", "obs_dim + 0 * np.eye(num_agents, dtype=int)"),
    ("a padded observation is not zero", SCRIPTS, "torch.tensor([0.0, 1.0])", "torch.tensor([0.5, 1.0])"),
    ("parameters not shared", SCRIPTS, "actor.theta = self.joint.theta if args.share_param", "actor.theta = nn.Parameter(self.joint.theta.data.clone()) if args.share_param"),
    ("the rollout keeps the first parameters", SCRIPTS, "nn.Parameter(self.joint.theta.data[i])", "nn.Parameter(self.joint.theta.data[i].clone())"),
    ("minibatches not from the seed", SCRIPTS, "torch.randperm(batch_size, generator=generator)", "torch.randperm(batch_size)"),
    ("critic sees the wrong rows", SCRIPTS, "critic(obs[mb]).squeeze(-1) - returns[mb]", "critic(obs[mb]).squeeze(-1) - returns[mb].flip(0)"),
    ("value loss broadcast to a matrix", SCRIPTS, "critic(obs[mb]).squeeze(-1) - returns[mb]", "critic(obs[mb]) - returns[mb]"),
    ("one physics step per environment step", ("envs/tasks.py",), "self.batch.step(nstep=self.env.frame_skip)", "self.batch.step(nstep=1)"),
    ("contact forces never computed", ("envs/tasks.py",), "                mujoco.mj_rnePostConstraint(self.env.model, self._data)\n", ""),
    ("time limit off by one", ("envs/tasks.py",), "self._elapsed_steps >= self.max_episode_steps", "self._elapsed_steps > self.max_episode_steps"),
    ("elapsed steps not reset", ("envs/tasks.py",), "        self._elapsed_steps[ids] = 0\n", ""),
    ("all environments have one seed", ("envs/tasks.py",), "seed + i for i in", "seed for i in"),
    ("first observation of the next episode not returned", ("envs/tasks.py",), "            observations[done] = self._observation()[done]\n", ""),
    ("a diverged simulation goes on", ("envs/tasks.py",), "            terminations |= diverged\n", ""),
    ("control cost a mean", ("envs/tasks.py",), "np.square(actions).sum(axis=1)\n\n\nclass HalfCheetah", "np.square(actions).mean(axis=1)\n\n\nclass HalfCheetah"),
    ("Hopper's velocities not clipped", ("envs/tasks.py",), "np.clip(self.qvel, -10, 10)", "self.qvel"),
    ("joints one edge too far", ("envs/partition.py",), "np.linalg.matrix_power(graph, agent_obsk)", "np.linalg.matrix_power(graph, agent_obsk + 1)"),
    ("Ant's diagonals swapped for sides", ("envs/partition.py",), '"2x4d": [[2, 3, 0, 1], [4, 5, 6, 7]]', '"2x4d": [[2, 3, 6, 7], [4, 5, 0, 1]]'),
    ("the root hidden from the agents", ("envs/partition.py",), "if entry not in jointed and entry[0] not in BODY_FIELDS", "if entry[0] == 'global'"),
    ("neighbours across the world body", ("envs/partition.py",), 'return "root", model.body_rootid[model.jnt_bodyid[joint]]', 'return "root", 0'),
    # Runs
    ("generator not restored", SCRIPTS, 'generator.set_state(checkpoint["generator"])', "pass"),
    ("observation not restored", SCRIPTS, 'obs, start_step = env.obs, checkpoint["step"]', 'start_step = checkpoint["step"]'),
    ("returns not restored", SCRIPTS, 'self.sums, self.obs = np.array(state["sums"]), state', 'self.obs = state'),
    ("the actors' optimiser not saved", SCRIPTS[:2], 'saved["actor_optimizer"] = actor_optimizer =', "actor_optimizer ="),
    ("evaluation samples", SCRIPTS, "policy.act(env.normalize(obs))", "policy.act(env.normalize(obs), Generator())"),
    ("short episodes counted twice", SCRIPTS, "returns + running * rewards", "returns + rewards"),
    ("points logged twice after a kill", SCRIPTS, "purge_step=start_step + 1 if checkpoint else None", "purge_step=None"),
    ("checkpoint runs ahead of the log", SCRIPTS, "writer.flush()  # first", "pass  # first"),
    ("a checkpoint is written in place", SCRIPTS, '    path.with_suffix(".tmp").replace(path)\n', '    path.write_bytes(path.with_suffix(".tmp").read_bytes())\n'),
    ("flags beside --resume ignored", SCRIPTS, "    return tyro.cli(Args, description=__doc__, default=default), checkpoint", "    return default, checkpoint"),
    ("a stopped run's --run-dir overwritten", SCRIPTS, "exist_ok=args.run_dir == args.resume", "exist_ok=True"),
    ("no lock", SCRIPTS, "        lock.acquire(blocking=False)\n", ""),
    ("a checkpoint may run code", SCRIPTS, 'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False'),
    ("another exit code", SCRIPTS, "code=130", "code=1"),
    ("NEXT_STEP autoreset accepted", SCRIPTS, "!= gym.vector.AutoresetMode.SAME_STEP", "is None"),
    ("not finite goes on", SCRIPTS, "if not np.isfinite(value):", "if False:"),
    ("elapsed steps not restored", ("envs/tasks.py",), 'self._elapsed_steps[:] = state["elapsed_steps"]', "pass"),
    ("reset noise not restored", ("envs/tasks.py",), "            rng.bit_generator.state = rng_state", "            pass"),
    ("last position not restored", ("envs/tasks.py",), 'self._last_position[:] = state["last_position"]', "pass"),
    ("a limb in another agent's colour", ("evaluate.py",), ".append(agent)\n", ".append(0)\n"),
    ("film changes the simulation", ("evaluate.py",), "self.env.data.qpos[:], self.env.data.qvel[:] = self.base.qpos[0], self.base.qvel[0]", "self.base.qvel[0] = 0"),
    # IPPO
    ("all agents follow the first one's advantages", ("ippo_mamujoco.py",), "logprobs[i][mb], M[i][mb]", "logprobs[i][mb], M[0][mb]"),
    ("all agents' critics fit the first one's returns", ("ippo_mamujoco.py",), "b_returns, b_advantages = returns.flatten(1),", "b_returns, b_advantages = returns[:1].expand_as(returns).flatten(1),"),
    ("advantages of the first critic for all", ("ippo_mamujoco.py",), "[advantages.flatten() for advantages, _ in gaes]", "[gaes[0][0].flatten() for _ in gaes]"),
    # Later
    ("a reset keeps the old velocities", ("envs/tasks.py",), "self.qpos[i], self.qvel[i] = qpos, qvel", "self.qpos[i] = qpos"),
    ("each actor climbs among the others' new actions", ("maddpg_mamujoco.py",), "torch.where(policy.drives[:, None], policy(obs), actions)", "policy(obs).expand(len(policy.drives), -1, -1)"),
    ("one actor's loss counts for all", ("maddpg_mamujoco.py",), "losses.sum(), policy.joint", "losses[0] + 0 * losses.sum(), policy.joint"),
]  # fmt: skip


def run_mutant(description: str, files: tuple[str, ...], old: str, new: str) -> tuple[str, float]:
    """Make the fault in a temporary copy, run the tests until one fails; return its name or "", and the seconds."""
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "benchmark", "__pycache__"))
        if "mappo_mamujoco.py" in files and (copy / "ippo_mamujoco.py").read_text().count(old) == 1:
            files = (*files, "ippo_mamujoco.py")
        for file in files:
            text = (copy / file).read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{description}: {old!r} occurs {text.count(old)} times in {file}, not once")
            (copy / file).write_text(text.replace(old, new))
        tests = [[f"tests/test_{name}.py" for name in ORDER]]
        if last := LAST.get(description):
            tests.insert(0, [f"tests/{last[0]}", "-k", last[1]])
        for chosen in tests:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *chosen]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
            if done.returncode not in (0, 1, 5):  # passed, failed, none of that name
                raise SystemExit(f"{description}: the tests did not run\n{done.stdout}{done.stderr}")
            failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR "))]
            if failed:
                break
    return (failed[0].removeprefix("tests/") if failed else ""), time.time() - start


def main() -> None:
    """Print the table; exit with 1 if a mutant survives."""
    numbers = [int(number) for number in sys.argv[1:]] or range(len(MUTANTS) + 1)
    chosen = [MUTANTS[number - 1] if number else ("nothing", (), "", "") for number in numbers]
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda mutant: run_mutant(*mutant), chosen)
        for number, mutant, (caught, seconds) in zip(numbers, chosen, results, strict=True):
            if caught and not number:
                pool.shutdown(cancel_futures=True)
                raise SystemExit(f"{caught} fails with nothing broken: what the others catch would mean nothing")
            if number:
                survivors += not caught
                print(f"| {number} | {mutant[0]} | {caught or 'SURVIVED'} | {seconds:.0f} s |", flush=True)
    print(f"{len(chosen) - (0 in numbers)} mutants, {survivors} survived")
    raise SystemExit(survivors > 0)


if __name__ == "__main__":
    main()
