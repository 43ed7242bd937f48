"""Break one line, see red: faults in the scripts and in envs/, one at a time in a copy; the tests must catch every one.

    python tests/mutants.py            # all; prints a table, exit code 1 if a fault survives
    python tests/mutants.py 3 17       # only these
    python tests/mutants.py --check    # only whether the table fits the code

A fault in a line that several scripts have is made in all of them, and tests/test_siblings.py does not take part, so that
what is caught is the fault and not the difference.
"""

import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPO = "mappo_mamujoco.py"
HAPPO = "happo_mamujoco.py"
HATRPO = "hatrpo_mamujoco.py"
IPPO = "ippo_mamujoco.py"
MADDPG = "maddpg_mamujoco.py"
SEQUENTIAL = (HAPPO, HATRPO)
SIMULTANEOUS = (MAPPO, IPPO)
PPO = (MAPPO, HAPPO, IPPO)
CENTRAL = (MAPPO, HAPPO, HATRPO)  # one critic, of the whole state
ON_POLICY = (MAPPO, HAPPO, HATRPO, IPPO)
ALL = (*ON_POLICY, MADDPG)
TASKS = ("envs/tasks.py",)
PARTITION = ("envs/partition.py",)
GYMNASIUM = ("envs/gymnasium_vec.py",)
INIT = ("envs/__init__.py",)
EVALUATE = ("evaluate.py",)

# The test files in the order in which they are tried, after the likeliest one.
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
    "device",
    "your_environment",
    "learning",
)
TIME_LIMIT = 900  # seconds for the tests of one fault: what takes longer hangs
# The processes are forked from this one, which imports the slow modules once for all.
FORK = multiprocessing.get_context("fork")
SLOW = (
    "gymnasium.envs.mujoco",
    "imageio",
    "mujoco.batch",
    "scipy.stats",
    "tensorboard.backend.event_processing.event_accumulator",
    "torch.utils.tensorboard",
    "tyro",
)
# What caught a fault the last time, file and test, by fault.
ROW = r"^\| \d+ \| (.+) \| (test_\w+\.py)::(\w+).* \| \d+ s \|$"
TABLE = ROOT / "tests" / "mutants.md"
LAST = {row[0]: row[1:] for row in re.findall(ROW, TABLE.read_text(), re.MULTILINE)}

# By the test file that should catch them, and words of the tests in it (pytest's -k) where it is a slow one: what is
# wrong, the files, the line's text, what it becomes. The text occurs exactly once in each of the files.
FAULTS: dict[str, list[tuple[str, tuple[str, ...], str, str]]] = {
    "updates: clipping or loss_and or entropy_bonus": [
        ("sign of the clipped objective", PPO, "policy_loss = -torch.min(", "policy_loss = torch.min("),
        ("max instead of min", PPO, "-torch.min(", "-torch.max("),
        ("only the upper side clipped", PPO, "ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)", "ratio.clamp(max=1 + args.clip_coef)"),
        ("only the lower side clipped", PPO, "ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)", "ratio.clamp(min=1 - args.clip_coef)"),
        ("entropy bonus as a penalty", PPO, "policy_loss - args.ent_coef * entropy", "policy_loss + args.ent_coef * entropy"),
        ("entropy bonus a sum over the batch", PPO, "entropy = dist.entropy().mean()", "entropy = dist.entropy().sum()"),
        ("fraction of what was not clipped logged", PPO, "(ratio != clipped_ratio)", "(ratio == clipped_ratio)"),
    ],
    "updates: one_ppo_after or one_ppo_per_agent or shared_parameters": [
        ("KL estimated by the mean log-ratio", ON_POLICY, "return (logratio.exp() - 1 - logratio).mean()", "return -logratio.mean()"),
        ("gradient never clipped", PPO, "nn.utils.clip_grad_norm_(actors[i].parameters(), args.max_grad_norm)", "pass"),
        ("gradients pile up (HAPPO)", (HAPPO,), "                optimizer.zero_grad()  # sets", "                pass  # sets"),
        ("Adam moves the agents whose turn it is not", (HAPPO,), "optimizer.zero_grad()  # sets", "optimizer.zero_grad(set_to_none=False)  # sets"),
        ("gradients pile up (MAPPO, IPPO)", SIMULTANEOUS, "            optimizer.zero_grad()\n            for i in range(num_agents):\n", "            for i in range(num_agents):\n"),
        ("a step of Adam for each agent of a shared network", SIMULTANEOUS, "            optimizer.step()\n    for i in range(num_agents):\n", "                optimizer.step()\n    for i in range(num_agents):\n"),
        ("minibatches of consecutive rows", PPO, "torch.randperm(len(obs[0])).chunk(", "torch.arange(len(obs[0])).chunk("),
        ("one minibatch per pass", PPO, "torch.randperm(len(obs[0])).chunk(args.num_minibatches)", "torch.randperm(len(obs[0])).chunk(1)"),
        ("one pass over the batch", PPO, "range(args.update_epochs)", "range(1)"),
    ],
    "updates: critic_update or minibatches": [
        ("critic sees the wrong rows", ON_POLICY, "critic(obs[mb]).squeeze(-1), returns[mb]", "critic(obs[mb]).squeeze(-1), returns[mb].flip(0)"),
        ("value loss broadcast to a matrix", ON_POLICY, "critic(obs[mb]).squeeze(-1), returns[mb]", "critic(obs[mb]), returns[mb]"),
        ("value loss without its half", ON_POLICY, "loss = 0.5 * mse_loss(", "loss = mse_loss("),
        ("value loss before the fit logged", ON_POLICY, "        return 0.5 * mse_loss(critic(obs).squeeze(-1), returns)", "        return loss.detach()"),
        ("the critic's one pass over the batch", ON_POLICY, "range(args.critic_epochs)", "range(1)"),
        ("the critic's minibatches of consecutive rows", ON_POLICY, "torch.randperm(len(returns)).chunk(", "torch.arange(len(returns)).chunk("),
        ("the critic's gradients pile up", ON_POLICY, "            optimizer.zero_grad()\n            loss.backward()\n            nn.utils.clip_grad_norm_(critic", "            loss.backward()\n            nn.utils.clip_grad_norm_(critic"),
        ("the critic's gradient never clipped", ON_POLICY, "nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)", "pass"),
    ],
    "updates: shared_parameters or M_is or one_trpo_after or with_one_agent": [
        ("M not updated", (HAPPO,), "        M = joint_logratio.exp() * advantages\n", ""),
        ("M not updated (HATRPO)", (HATRPO,), "        M = joint_logratio.exp().clamp(max=args.max_ratio) * advantages\n", ""),
        ("M multiplied with the inverse ratio", SEQUENTIAL, "M = joint_logratio.exp()", "M = (-joint_logratio).exp()"),
        ("M starts again from A", SEQUENTIAL, "M = joint_logratio.exp()", "M = logratio.exp()"),
        ("M normalised after each agent (HATRPO)", (HATRPO,), "args.max_ratio) * advantages\n", "args.max_ratio) * advantages\n        M = M / M.std()\n"),
        ("M normalised after each agent", (HAPPO,), "joint_logratio.exp() * advantages\n", "joint_logratio.exp() * advantages\n        M = M / M.std()\n"),
        ("M clipped", (HAPPO,), "joint_logratio.exp() * advantages", "joint_logratio.exp().clamp(0.9, 1.1) * advantages"),
        ("spread of A logged for that of M", SEQUENTIAL, '"losses/M_std"] = M.std()', '"losses/M_std"] = advantages.std()'),
        ("the actors see A instead of M", (HAPPO,), "logprobs[i][mb], M[mb], args", "logprobs[i][mb], advantages[mb], args"),
        ("the actors see A instead of M (HATRPO)", (HATRPO,), "logprobs[i], M, region", "logprobs[i], advantages, region"),
        ("M of other rows", (HAPPO,), "logprobs[i][mb], M[mb], args", "logprobs[i][mb], M[: len(mb)], args"),
        ("M from the policy before its last update", (HAPPO,), "                optimizer.step()\n        with torch.no_grad():\n            _, logratio, stats", "                logratio = actors[i](obs[i]).log_prob(actions[i]).detach() - logprobs[i]\n                optimizer.step()\n        with torch.no_grad():\n            _, _, stats"),
        ("M from the next agent's policy", (HAPPO,), "_, logratio, stats = ppo_loss(actors[i], obs[i], actions[i], logprobs[i], M, args)", "_, logratio, stats = ppo_loss(actors[i - 1], obs[i - 1], actions[i - 1], logprobs[i - 1], M, args)"),
        ("pi_old of an agent after the others' updates (HATRPO)", (HATRPO,), "    for i in order:\n", "    for i in order:\n        logprobs[i] = actors[i](obs[i]).log_prob(actions[i]).detach()\n"),
        ("pi_old of an agent after the others' updates", (HAPPO,), "    for i in order:\n", "    for i in order:\n        logprobs[i] = actors[i](obs[i]).log_prob(actions[i]).detach()\n"),
    ],
    "updates: up_to_its_largest": [
        ("M not cut", (HATRPO,), ".clamp(max=args.max_ratio)", ""),
        ("the ratio cut from below, too", (HATRPO,), ".clamp(max=args.max_ratio)", ".clamp(1 / args.max_ratio, args.max_ratio)"),
        ("each agent's ratio cut, not the product", (HATRPO,), "joint_logratio.exp().clamp(max=args.max_ratio) * advantages", "logratio.exp().clamp(max=args.max_ratio) * M"),
        ("M itself cut, not the ratio", (HATRPO,), "joint_logratio.exp().clamp(max=args.max_ratio) * advantages", "(joint_logratio.exp() * advantages).clamp(max=args.max_ratio)"),
    ],
    "updates: mean_of_the_batch or M_is or with_one_agent": [
        ("M keeps its mean", (HAPPO,), "            M = M - M.mean()\n", "            pass\n"),
        ("--keep-mean ignored", (HAPPO,), "if not args.keep_mean:", "if True:"),
        ("the ratio of a centred M", (HAPPO,), "M = joint_logratio.exp() * advantages", "M = logratio.exp() * M"),
        ("the mean of each minibatch taken away", (HAPPO,), "logprobs[i][mb], M[mb], args", "logprobs[i][mb], M[mb] - M[mb].mean() * (not args.keep_mean), args"),
        ("M divided by its standard deviation, too", (HAPPO,), "M = M - M.mean()", "M = (M - M.mean()) / M.std()"),
    ],
    "trust_region: gaussian_and_categorical or explicit_fisher or gain_is_that": [
        ("the agents share one radius", (HATRPO,), "2 * region.delta /", "2 * region.delta / 3 /"),
        ("the earlier gradients not kept", (HATRPO,), "    gradient_sum += gradient", "    gradient_sum = gradient_sum + gradient"),
        ("the earlier gradients do not decay", (HATRPO,), "    gradient_sum *= args.momentum\n", ""),
        ("this batch's gradient decays, too", (HATRPO,), "    gradient_sum *= args.momentum\n    gradient_sum += gradient", "    gradient_sum += gradient\n    gradient_sum *= args.momentum"),
        ("the step ignores the earlier gradients", (HATRPO,), "conjugate_gradient(H, gradient_sum,", "conjugate_gradient(H, gradient,"),
        ("the gain expected of all the gradients", (HATRPO,), "expected_gain = step @ gradient\n", "expected_gain = step @ gradient_sum\n"),
        ("one sum of gradients for all agents", (HATRPO,), "gradient_sum = region.gradient_sums[i]", "gradient_sum = region.gradient_sums[0]"),
        ("one last step for all agents", (HATRPO,), "last_step = region.last_steps[i]", "last_step = region.last_steps[0]"),
        ("the last step not kept", (HATRPO,), "            last_step += scale * step\n", ""),
        ("the last step in full, where it was shortened", (HATRPO,), "last_step += scale * step", "last_step += step"),
        ("the last steps add up", (HATRPO,), "    last_step.zero_()\n", ""),
        ("the radius grows downhill", (HATRPO,), "1.02 if slope > 0 else", "1.02 if slope < 0 else"),
        ("the radius follows the last agent's step", (HATRPO,), "slope += stats", "slope = stats"),
        ("the radius grows without end", (HATRPO,), ", args.max_growth * args.target_kl)", ")"),
        ("the radius shrinks without end", (HATRPO,), "clamp_(args.target_kl, args.max_growth", "clamp_(0, args.max_growth"),
        ("a radius out of its range is used once", (HATRPO,), "    region.delta.clamp_(args.target_kl, args.max_growth * args.target_kl)\n    log[\"losses/delta\"] = region.delta.clone()\n", "    log[\"losses/delta\"] = region.delta.clone().clamp_(args.target_kl, args.max_growth * args.target_kl)\n"),
        ("the radius never changes", (HATRPO,), "    region.delta *= 1.02 if slope > 0 else 1 / 1.04\n", ""),
    ],
    "updates: order": [
        ("order never random", SEQUENTIAL, "torch.randperm(num_agents).tolist()", "range(num_agents)"),
        ("--fixed-order ignored", SEQUENTIAL, "range(num_agents) if args.fixed_order else ", ""),
    ],
    "updates: one_ppo_after or one_trpo_after or one_ppo_per_agent": [
        ("the earlier agents' log-ratios not added up", (HAPPO,), "joint_logratio += logratio", "joint_logratio = logratio"),
        ("the earlier agents' log-ratios not added up (HATRPO)", (HATRPO,), "joint_logratio += logratio", "joint_logratio = logratio"),
        ("all agents follow the first one's advantages", (IPPO,), "logprobs[i][mb], M[i][mb], args", "logprobs[i][mb], M[0][mb], args"),
        ("the first one's advantages in the log of all", (IPPO,), "logprobs[i], M[i], args", "logprobs[i], M[0], args"),
    ],
    "trust_region": [
        ("entropy bonus as a penalty (HATRPO)", (HATRPO,), "+ args.ent_coef * dist.entropy()", "- args.ent_coef * dist.entropy()"),
        ("Fisher matrix with the wrong sign", (HATRPO,), "lambda v: -flat_gradient(", "lambda v: flat_gradient("),
        ("Fisher matrix on the wrong rows' scale", (HATRPO,), "kl_divergence(actor(obs), new_actor(obs)).mean()", "kl_divergence(actor(obs), new_actor(obs)).sum()"),
        ("KL the wrong way round", (HATRPO,), "kl_divergence(dist, new_dist)", "kl_divergence(new_dist, dist)"),
        ("no damping", (HATRPO,), "H_direction + c * direction", "H_direction"),
        ("damping that is no fraction of the curvature", (HATRPO,), "c = damping * (b @ H_direction) / rr", "c = damping"),
        ("curvature per norm instead of squared norm", (HATRPO,), "(b @ H_direction) / rr", "(b @ H_direction) / rr.sqrt()"),
        ("curvature of every direction", (HATRPO,), "        if i == 0:", "        if True:"),
        ("steepest descent for conjugate gradient", (HATRPO,), "direction = residual + new_rr / rr * direction", "direction = residual"),
        ("conjugate gradient never stops", (HATRPO,), "        if rr < 1e-10:\n            break\n", ""),
        ("one iteration too few", (HATRPO,), "range(cg_iters)", "range(cg_iters - 1)"),
        ("Hx not summed up", (HATRPO,), "Hx += alpha * H_direction", "Hx = alpha * H_direction"),
        ("length of the step from the damped matrix", (HATRPO,), "Hx += alpha * H_direction", "Hx += alpha * damped"),
        ("half the KL", (HATRPO,), "torch.sqrt(2 * region.delta", "torch.sqrt(region.delta"),
        ("KL not checked in the line search", (HATRPO,), "gain >= required_gain and kl <= region.delta:", "gain >= required_gain:"),
        ("gain not checked in the line search", (HATRPO,), "if gain > 0 and gain >= required_gain and kl", "if kl"),
        ("a gain of 0 is enough", (HATRPO,), "if gain > 0 and gain >=", "if gain >="),
        ("gain of a full step expected from a short one", (HATRPO,), "args.accept_ratio * scale * expected_gain", "args.accept_ratio * expected_gain"),
        ("one backtrack too few", (HATRPO,), "range(args.backtrack_iters + 1)", "range(args.backtrack_iters)"),
        ("a shortened step is not shorter", (HATRPO,), "theta + scale * step", "theta + step"),
        ("rejected step's KL reported", (HATRPO,), '            stats["kl"] = kl\n            break\n', '            break\n    stats["kl"] = kl\n'),
        ("rejected step's gain reported", (HATRPO,), '            stats["surrogate_gain"] = gain\n            stats["kl"] = kl\n            break\n', '            stats["kl"] = kl\n            break\n    stats["surrogate_gain"] = gain\n'),
        ("rejected step kept", (HATRPO,), '    stats["backtracks"] = j', '    actor.load_state_dict(new_actor.state_dict())\n    stats["backtracks"] = j'),
        ("rejected step called accepted", (HATRPO,), '"accepted": 0', '"accepted": 1'),
        ("M follows a rejected step", (HATRPO,), "return logratio.detach(), stats", "return new_logratio, stats"),
        ("accepted step not taken", (HATRPO,), "            actor.load_state_dict(new_actor.state_dict())\n", ""),
        ("the slope of this step, not of the last one", (HATRPO,), '"slope": last_step @ gradient', '"slope": step @ gradient'),
    ],
    "gae": [
        ("actions not stored", ON_POLICY, "            actions[t] = action\n", ""),
        ("another gamma in the advantages", ON_POLICY, "truncations, args.gamma, args.gae_lambda", "truncations, 0.9, args.gae_lambda"),
        ("another lambda in the advantages", ON_POLICY, "truncations, args.gamma, args.gae_lambda", "truncations, args.gamma, 0.9"),
        ("truncation taken for termination", ON_POLICY, "gamma * (1 - terminations) * next_values", "gamma * (1 - terminations) * (1 - truncations) * next_values"),
        ("termination ignored", ON_POLICY, "gamma * (1 - terminations) * next_values", "gamma * next_values"),
        ("advantages cross truncations", ON_POLICY, "(1 - terminations) * (1 - truncations)  # nothing", "(1 - terminations)  # nothing"),
        ("advantages cross terminations", ON_POLICY, "(1 - terminations) * (1 - truncations)  # nothing", "(1 - truncations)  # nothing"),
        ("GAE off by one", ON_POLICY, "not_done[t] * last", "not_done[t - 1] * last"),
        ("lambda forgotten", ON_POLICY, "gamma * gae_lambda * not_done", "gamma * not_done"),
        ("returns from the next values", ON_POLICY, "return advantages, advantages + values", "return advantages, advantages + next_values"),
        ("next episode's observation leaks into the ended one", ON_POLICY, 'next_obs[done] = self.normalize(np.stack(infos["final_obs"][done]))', "pass"),
        ("evaluation moves the statistics", ON_POLICY, "lengths.max() < MAX_EPISODE_STEPS:\n", "lengths.max() < MAX_EPISODE_STEPS:\n        env.obs_rms.update(obs)\n"),
        ("observation statistics of the first reset only", ON_POLICY, "        self.obs_rms.update(obs)\n        self.discounted", "        self.discounted"),
        ("observation statistics without the first reset", ON_POLICY, "        self.obs_rms.update(obs)\n        self.obs = self.normalize(obs)\n\n", "        self.obs = self.normalize(obs)\n\n"),
        ("observations not clipped", ON_POLICY, "torch.tensor(np.clip(obs, -10, 10)", "torch.tensor(obs"),
        ("discounted returns cross episodes", ON_POLICY, "            self.discounted[done] = 0\n", ""),
        ("returns cross episodes", ON_POLICY, "            self.returns[done] = 0\n", ""),
        ("lengths cross episodes", ON_POLICY, "            self.lengths[done] = 0\n", ""),
        ("returns not discounted in the statistics", ON_POLICY, "self.gamma * self.discounted + rewards", "self.discounted + rewards"),
        ("rewards not normalised", ON_POLICY, "torch.tensor(rewards / np.sqrt(self.return_rms.var + 1e-8))", "torch.tensor(rewards)"),
        ("rewards not clipped", ON_POLICY, "+ 1e-8)).clamp(-10, 10)", "+ 1e-8))"),
        ("actions not clipped", ON_POLICY, "(low + high) / 2 + (high - low) / 2 * actions.numpy()\n", "(low + high) / 2 + (high - low) / 2 * actions.numpy()\n        low, high = -np.inf, np.inf\n"),
        ("actions only clipped before scaling", ON_POLICY, "(low + high) / 2 + (high - low) / 2 * actions.numpy()\n", "(low + high) / 2 + (high - low) / 2 * actions.clamp(-1, 1).numpy()\n        low, high = -np.inf, np.inf\n"),
        ("actions not scaled to the actuators", ON_POLICY, "(low + high) / 2 + (high - low) / 2 * actions.numpy()\n", "actions.numpy()\n"),
        ("ranges of actuators taken for symmetric", ON_POLICY, "(low + high) / 2 + (high - low) / 2 * actions", "(high - low) / 2 * actions"),
        ("NEXT_STEP autoreset accepted", ON_POLICY, "!= AutoresetMode.SAME_STEP", "is None"),
        ("statistics not restored", ON_POLICY, "            rms.mean, rms.var, rms.count = map(np.array, state[name])\n", "            pass\n"),
        ("the observation after the action stored", ON_POLICY, " = env.step(action)\n", " = env.step(action)\n            obs[t] = env.obs\n"),
        ("terminations and truncations swapped", ON_POLICY, "next_obs[t], rewards[t], terminations[t], truncations[t] =", "next_obs[t], rewards[t], truncations[t], terminations[t] ="),
        ("next values of the observation itself", CENTRAL, "critic(next_obs).squeeze(-1)", "critic(obs).squeeze(-1)"),
        ("advantages not normalised", CENTRAL, "        b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)\n", ""),
        ("advantages not centred", CENTRAL, "(b_advantages - b_advantages.mean()) / (", "b_advantages / ("),
        ("the critic's targets are the advantages", CENTRAL, "b_returns = returns.flatten()", "b_returns = advantages.flatten()"),
        ("an agent's actions of the first actuators", ON_POLICY, "[actions.flatten(0, 1)[:, ids] for ids in policy.act_ids]", "[actions.flatten(0, 1)[:, : len(ids)] for ids in policy.act_ids]"),
        ("the rollout plays without noise", ON_POLICY, "policy.act(env.obs, noise=True)", "policy.act(env.obs, noise=False)"),
        ("--eval-episodes 0 evaluates", ON_POLICY, "            if args.eval_episodes:\n", "            if True:\n"),
    ],
    "policy": [
        ("log_std taken for the log of the variance", ON_POLICY, "self.log_std.exp(), validate", "(self.log_std / 2).exp(), validate"),
        ("log-probability not summed over dimensions", ON_POLICY, "return Independent(normal, 1,", "return Independent(normal, 0,"),
        ("first actions not near 0", ON_POLICY, "act_dim), 0.01)", "act_dim), 1.0)"),
        ("biases of PyTorch's own initialisation", ALL, "        nn.init.zeros_(layer.bias)\n", ""),
        ("hidden layers with a gain of 1", ALL, "nn.init.orthogonal_(layer.weight, 2**0.5)", "nn.init.orthogonal_(layer.weight)"),
        ("last layer with the gain of the others", ALL, "nn.init.orthogonal_(layer.weight, output_gain)", "pass"),
        ("ReLU after the last layer", ALL, "nn.Sequential(*layers[:-1])", "nn.Sequential(*layers)"),
        ("outputs in the agents' order", ON_POLICY, "torch.cat(actions, dim=1)[:, self.flat_order]", "torch.cat(actions, dim=1)"),
        ("the inverse order of the actuators", ON_POLICY, "torch.cat(self.act_ids).argsort()", "torch.cat(self.act_ids)"),
        ("agents see the first entries", ON_POLICY, "self.obs_ids = [torch.as_tensor(ids) for ids in partition.obs_ids]", "self.obs_ids = [torch.arange(len(ids)) for ids in partition.obs_ids]"),
        ("padding with the first observation", ON_POLICY, "padding_value=obs_dim\n", "padding_value=0\n"),
        ("padding with ones", ON_POLICY, "padding_value=obs_dim\n", "padding_value=obs_dim + 1\n"),
        ("shared network does not learn the agent's id", ON_POLICY, "obs_dim + torch.eye(len(padded), dtype=torch.int64)", "obs_dim + 0 * torch.eye(len(padded), dtype=torch.int64)"),
        ("agent's id with zero and one swapped", ON_POLICY, "obs_dim + torch.eye(len(padded), dtype=torch.int64)", "obs_dim + 1 - torch.eye(len(padded), dtype=torch.int64)"),
        ("a padded observation is not zero", ON_POLICY, "pad(obs, (0, 1))", "pad(obs, (0, 1), value=0.5)"),
        ("parameters not shared", ON_POLICY, "actors = actors[:1] * len(actors)", "pass"),
        ("unequal agents share a network", ON_POLICY, "if len(set(map(len, self.act_ids))) > 1:", "if False:"),
        ("evaluation samples", ON_POLICY, "dist.sample() if noise else dist.mode", "dist.sample()"),
        ("actors keep a graph of the rollout", ON_POLICY, "    @torch.inference_mode()\n", ""),
    ],
    "tasks": [
        ("one physics step per environment step", TASKS, "self.batch.step(nstep=self.env.frame_skip)", "self.batch.step(nstep=1)"),
        ("contact forces never computed", TASKS, "                mujoco.mj_rnePostConstraint(self.env.model, self._data)\n", ""),
        ("contact forces of the ended episode", TASKS, "        self.cfrc_ext[ids] = 0\n", ""),
        ("time limit off by one", TASKS, "self._elapsed_steps >= self.max_episode_steps", "self._elapsed_steps > self.max_episode_steps"),
        ("elapsed steps not reset", TASKS, "        self._elapsed_steps[ids] = 0\n", ""),
        ("last position not reset", TASKS, "        self._last_position[ids] = position[ids]\n", ""),
        ("all environments have one seed", TASKS, "seed + i for i in", "seed for i in"),
        ("first observation of the next episode not returned", TASKS, "            observations[done] = self._observation()[done]\n", ""),
        ("last observations share an array", TASKS, "observations[i].copy()", "observations[i]"),
        ("a diverged simulation goes on", TASKS, "            terminations |= diverged\n", ""),
        ("a diverged simulation is rewarded", TASKS, "            rewards[diverged] = 0\n", ""),
        ("control cost a mean", TASKS, "return self.env._ctrl_cost_weight * np.square(actions).sum(axis=1)", "return self.env._ctrl_cost_weight * np.square(actions).mean(axis=1)"),
        ("Hopper's velocities not clipped", TASKS, "np.clip(self.qvel, -10, 10)", "self.qvel"),
        ("a reset keeps the old velocities", TASKS, "        self.qvel[i] = qvel\n", ""),
        ("a diverged simulation leaves MUJOCO_LOG.TXT", TASKS, "        with quiet_mujoco():  # a simulation", "        if True:  # a simulation"),
        ("the observation of the bare robot, without its wrappers", INIT, "[(\"global\", 0)] * env.observation_space.shape[0]", "[(\"global\", 0)] * env.unwrapped.observation_space.shape[0]"),
        ("agent_obsk of a wrapped observation accepted", INIT, "if wrappers := extra_wrappers(env):", "if wrappers := []:"),
        ("a diverged simulation of Gymnasium's goes on", GYMNASIUM, "return np.nan_to_num(obs), 0.0, True, truncated, {}", "return np.nan_to_num(obs), 0.0, terminated, truncated, {}"),
        ("a diverged simulation of Gymnasium's is rewarded", GYMNASIUM, "return np.nan_to_num(obs), 0.0, True, truncated, {}", "return np.nan_to_num(obs), reward, True, truncated, {}"),
        ("a diverged simulation of Gymnasium's not counted", GYMNASIUM, "            self.num_diverged += 1\n", ""),
        ("a diverged simulation of Gymnasium's leaves MUJOCO_LOG.TXT", GYMNASIUM, "        with quiet_mujoco():\n", "        if True:\n"),
        ("infos of Gymnasium's robots handed on", GYMNASIUM, "            obs, reward, terminated, truncated, _ = self.env.step(action)", "            obs, reward, terminated, truncated, info = self.env.step(action)\n        if True:\n            return obs, reward, terminated, truncated, info"),
        ("wrong shapes broadcast", TASKS, "if actions.shape != self.ctrl.shape:", "if False:"),
    ],
    "partition": [
        ("joints one edge too far", PARTITION, "np.linalg.matrix_power(graph, agent_obsk)", "np.linalg.matrix_power(graph, agent_obsk + 1)"),
        ("Ant's diagonals swapped for sides", PARTITION, '"2x4d": [[2, 3, 0, 1], [4, 5, 6, 7]]', '"2x4d": [[2, 3, 6, 7], [4, 5, 0, 1]]'),
        ("the root hidden from the agents", PARTITION, "if entry not in jointed and entry[0] not in BODY_FIELDS", "if entry[0] == 'global'"),
        ("neighbours across the world body", PARTITION, 'return "root", model.body_rootid[model.jnt_bodyid[joint]]', 'return "root", 0'),
        ("an actuator of no agent accepted", PARTITION, "if not all(act_ids) or used != list(range(num_actuators)):", "if not all(act_ids):"),
        ("two actuators on a joint accepted", PARTITION, "if not is_joint.all() or len(set(joints)) < len(joints):", "if not is_joint.all():"),
        ("an action of another size than the model's accepted", INIT, "if env.action_space.shape != (model.nu,):", "if False:"),
        ("a hyphen in lists ends the robot's name", INIT, 'if partition is None and "-[" in env_id:', "if False:"),
        ("the reason of an error swallowed", INIT, "{type(e).__name__}: {reason}", "{type(e).__name__}"),
        ("Gymnasium's robots without a time limit accepted", GYMNASIUM, "if _time_limit(self.envs[0]) is None:", "if False:"),
    ],
    "runs: resumed_run_is": [
        ("generator not restored", ON_POLICY, '        torch.set_rng_state(checkpoint["rng"])\n', ""),
        ("observation not restored", ON_POLICY, '        self.obs = state["obs"]\n', ""),
        ("simulations not restored", ON_POLICY, '        self.vec.set_state(state["vec"])\n', ""),
        ("returns not restored", ON_POLICY, "self.discounted, self.returns, self.lengths = state", "self.discounted, _, self.lengths = state"),
        ("discounted returns not restored", ON_POLICY, "self.discounted, self.returns, self.lengths = state", "_, self.returns, self.lengths = state"),
        ("lengths not restored", ON_POLICY, "self.discounted, self.returns, self.lengths = state", "self.discounted, self.returns, _ = state"),
        ("the actors' optimiser not saved", PPO, '        "actor_optimizer": actor_optimizer,\n', ""),
        ("the radius and the sums of gradients not saved", (HATRPO,), '        "region": region,\n', ""),
        ("the critic's optimiser not saved", ON_POLICY, '        "critic_optimizer": critic_optimizer,\n', ""),
        ("the critic not saved", ON_POLICY, '        "critic": critic,\n', ""),
    ],
    "partition: handed_out": [
        ("named partitions handed out themselves", PARTITION, "return copy.deepcopy(named[partition])", "return named[partition]"),
    ],
    "your_environment: lacks_is_named": [
        ("a partition that leaves actuators out, or gives one twice", ALL, "if sorted(np.concatenate(vec.partition.act_ids)) != list(range(act_dim)):", "if False:"),
        ("spaces that are not flat", ALL, "if len(space.shape or ()) != 1:", "if False:"),
        ("actions without a range", ALL, "if not vec.single_action_space.is_bounded():", "if False:"),
    ],
    "gae: numbers or evaluation": [
        ("ends that are numbers taken for indices", ALL, "done = np.logical_or(terminations, truncations)", "done = terminations | truncations"),
        ("NaN of an episode that follows in the evaluation", ON_POLICY, "returns[running] += rewards[running]", "returns += running * rewards"),
    ],
    "scripts: help_fits": [
        ("a --help wider than a terminal", (HAPPO,), "the agents update in turn, each with a factor M.", "the agents update in turn, and each one of them has a factor M."),
    ],
    "other_envs: end": [
        ("an evaluation that never ends", ALL, "while running.any() and lengths.max() < MAX_EPISODE_STEPS:", "while running.any():"),
        ("an evaluation is cut without a word", ALL, "    if running.any():\n        print", "    if False:\n        print"),
    ],
    "runs: evaluation": [
        ("evaluation in the training's environments", ON_POLICY, "log |= evaluate(eval_vec, ", "log |= evaluate(vec, "),
        ("episodes after the first count in the evaluation", ON_POLICY, "returns[running] += rewards[running]", "returns += rewards"),
        ("lengths after the first episode count in the evaluation", ON_POLICY, "lengths += running", "lengths += 1"),
    ],
    "runs: killed_run or log_is_written": [
        ("points logged twice after a kill", ON_POLICY, "purge_step=start_step + 1", "purge_step=None"),
        ("the checkpoint's own points hidden", ON_POLICY, "purge_step=start_step + 1", "purge_step=start_step"),
        ("checkpoint runs ahead of the log", ON_POLICY, "            writer.flush()  # first", "            pass  # first"),
    ],
    "runs: a_checkpoint_is_replaced": [
        ("a checkpoint is written in place", ALL, "    temporary.replace(path)\n", "    path.write_bytes(temporary.read_bytes())\n"),
    ],
    "runs: killed_run or resumed_run_is": [
        ("no checkpoint but the last", ON_POLICY, "if last or global_step % args.checkpoint_interval < batch_size:", "if last:"),
    ],
    "runs: flags_beside or in_a_shell": [
        ("flags beside --resume ignored", ON_POLICY, "args = tyro.cli(Args, description=__doc__, default=default)", "args = default"),
        ("a moved run goes on where it was", ON_POLICY, "            default.run_dir = args.resume\n", ""),
    ],
    "runs: another_script or cannot_go_on or equal_sizes": [
        ("another script's checkpoint accepted", ON_POLICY, 'if checkpoint["script"] != SCRIPT:', "if False:"),
        ("nothing compared by --resume", ON_POLICY, "for name in KEPT:", "for name in ():"),
        ("env_id not compared by --resume", ON_POLICY, 'KEPT = ("env_id", ', "KEPT = ("),
        ("seed not compared by --resume", ALL, '"env_id", "seed", ', '"env_id", '),
        ("agent_obsk not compared by --resume", ON_POLICY, '"seed", "agent_obsk", "num_envs"', '"seed", "num_envs"'),
        ("num_envs not compared by --resume", ON_POLICY, '"agent_obsk", "num_envs", "hidden_sizes"', '"agent_obsk", "hidden_sizes"'),
        ("hidden_sizes not compared by --resume", ON_POLICY, '"num_envs", "hidden_sizes", "share_param"', '"num_envs", "share_param"'),
        ("share_param not compared by --resume", ON_POLICY, '"hidden_sizes", "share_param")', '"hidden_sizes")'),
        ("a stopped run's --run-dir overwritten", ON_POLICY, "exist_ok=args.run_dir == args.resume", "exist_ok=True"),
        ("a run that is over goes on", ON_POLICY, "if args.total_timesteps < start_step + batch_size:", "if False:"),
    ],
    "runs: hostile": [
        ("a module imported without --allow-import", ALL, 'if ":" in default.env_id and not args.allow_import:', "if False:"),
        ("a checkpoint read otherwise than it was checked", ALL, "mmap=True, weights_only", "weights_only"),
        ("a damaged checkpoint accepted", ALL, "if ZipFile(path).testzip():", "if False:"),
        ("a checkpoint that does not fit is a traceback", ALL, "        except Exception as e:\n            fail(f\"--resume {args.resume}: {args.env_id}", "        except ZeroDivisionError as e:\n            fail(f\"--resume {args.resume}: {args.env_id}"),
        ("a checkpoint may run code", ON_POLICY, 'map_location="cpu", mmap=True, weights_only=True', 'map_location="cpu", mmap=True, weights_only=False'),
    ],
    "runs: ctrl_c": [
        ("another exit code", ON_POLICY, "sys.exit(130)", "sys.exit(1)"),
        ("Ctrl-C names no directory", ON_POLICY, 'if Path(cli_args.run_dir, "checkpoint.pt").exists():', "if False:"),
        ("Ctrl-C names a directory without a checkpoint", ON_POLICY, 'if Path(cli_args.run_dir, "checkpoint.pt").exists():', "if True:"),
    ],
    "runs: annealing": [
        ("annealing one iteration ahead", ON_POLICY, "1 - (global_step - batch_size) / args.total_timesteps", "1 - global_step / args.total_timesteps"),
        ("the actors' rate not annealed", PPO, 'actor_optimizer.param_groups[0]["lr"] = lr_scale * args.learning_rate', 'actor_optimizer.param_groups[0]["lr"] = args.learning_rate'),
        ("the critic's rate not annealed", ON_POLICY, "= lr_scale * args.critic_learning_rate", "= args.critic_learning_rate"),
    ],
    "runs: track or wandb": [
        ("wandb run id not kept", ON_POLICY, "args.wandb_run_id = wandb.init(", "run_id = wandb.init("),
        ("wandb run id not given", ON_POLICY, "id=args.wandb_run_id or None,", "id=None,"),
        ("directory left when --track fails", ON_POLICY, "    run_dir = Path(args.run_dir)\n", "    run_dir = Path(args.run_dir)\n    run_dir.mkdir(parents=True, exist_ok=True)\n"),
    ],
    "runs: environments_go_on": [
        ("elapsed steps not restored", TASKS, '        self._elapsed_steps[:] = state["elapsed_steps"]\n', ""),
        ("reset noise not restored", TASKS, "            rng.bit_generator.state = rng_state", "            pass"),
        ("last position not restored", TASKS, '        self._last_position[:] = state["last_position"]\n', ""),
        ("number of diverged simulations not restored", TASKS, '        self.num_diverged = state["num_diverged"]\n', ""),
        ("state of wrapped environments saved without the wrappers'", GYMNASIUM, "if extra_wrappers(self.envs[0]):", "if False:"),
        ("what a reset changes in the model not restored", GYMNASIUM, 'saved["model"].get(name, fresh[name])', "fresh[name]"),
        ("what a reset changes in the options not restored", GYMNASIUM, 'saved["options"].items()', "{}.items()"),
        ("what another reset has changed in the model stays", GYMNASIUM, "                array[:] = saved[\"model\"].get(name, fresh[name])\n", "                array[:] = saved[\"model\"].get(name, array)\n"),
        ("number of diverged simulations of Gymnasium's not restored", GYMNASIUM, '            env.num_diverged = saved["num_diverged"]\n', ""),
        ("elapsed steps of Gymnasium's robots not restored", GYMNASIUM, '            _time_limit(env)._elapsed_steps = saved["elapsed_steps"]\n', ""),
        ("reset noise of Gymnasium's robots not restored", GYMNASIUM, '            env.unwrapped.np_random.bit_generator.state = saved["rng"]\n', ""),
    ],
    "scripts: not_finite": [
        ("the log of a run that fails is lost", ON_POLICY, "                writer.close()  # what was logged before shows how it came to this\n", ""),
        ("not finite goes on", ON_POLICY, "if not np.isfinite(float(value)):", "if False:"),
    ],
    "scripts: same_seed": [
        ("runs of neighbouring seeds overlap", ON_POLICY, "np.random.SeedSequence(args.seed).generate_state(3).tolist()", "[args.seed, args.seed, args.seed + 1]"),
        ("networks not from the seed", ON_POLICY, "    torch.manual_seed(torch_seed)\n", ""),
        ("start states not from the seed", ON_POLICY, "NormalizedEnv(vec, train_seed, args.gamma)", "NormalizedEnv(vec, None, args.gamma)"),
    ],
    "scripts: one_thread_and_is_deterministic": [
        ("PyTorch on all threads", ON_POLICY, "    torch.set_num_threads(1)\n", ""),
        ("PyTorch not deterministic", ON_POLICY, "    torch.use_deterministic_algorithms(True)\n", ""),
    ],
    "runs: diverged_simulation": [
        ("diverged simulations not logged", ALL, 'getattr(vec, "num_diverged", 0)', "0"),
    ],
    "scripts: of_the_critic": [
        ("explained variance is the unexplained", ON_POLICY, "= 1 - unexplained", "= unexplained"),
        ("sum of the value losses logged", (IPPO,), "+= loss / len(critic)", "+= loss"),
    ],
    "maddpg: new_rates or buffer_size or passes_on or act_on": [
        ("raw observations for the actors", (MADDPG,), "policy.act(env.normalize(obs), noise=True)", "policy.act(obs, noise=True)"),
        ("rates not set after a resume", (MADDPG,), '    actor_optimizer.param_groups[0]["lr"] = args.learning_rate\n', '    if not checkpoint:\n        actor_optimizer.param_groups[0]["lr"] = args.learning_rate\n'),
        ("the critic's rate not set after a resume", (MADDPG,), '    critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate\n', '    if not checkpoint:\n        critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate\n'),
        ("buffer_size not compared by --resume", (MADDPG,), '"hidden_sizes", "buffer_size")', '"hidden_sizes")'),
        ("target actors are the actors themselves", (MADDPG,), "target_policy = copy.deepcopy(policy)", "target_policy = policy"),
        ("target critic is the critic itself", (MADDPG,), "target_critic = copy.deepcopy(critic)", "target_critic = critic"),
        ("another discount", (MADDPG,), "args.batch_size, args.n_step, args.gamma\n", "args.batch_size, args.n_step, 0.9\n"),
        ("the critic at the actors' rate", (MADDPG,), 'critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate', 'critic_optimizer.param_groups[0]["lr"] = args.learning_rate'),
        ("the actors climb another critic", (MADDPG,), "                    critic,\n                    b_obs,\n", "                    target_critic,\n                    b_obs,\n"),
    ],
    "other_envs: buffer_has": [
        ("the first observation is not a copy", (MADDPG,), "torch.tensor(obs, dtype=torch.float32)  # a copy", "torch.as_tensor(obs, dtype=torch.float32)  # a copy"),
        ("an observation is not a copy", (MADDPG,), "        self.obs = torch.tensor(obs, dtype=torch.float32)\n        next_obs", "        self.obs = torch.as_tensor(obs, dtype=torch.float32)\n        next_obs"),
    ],
    "evaluate: no_models or directory_plays or other_robots or empty_variable": [
        ("a damaged model accepted", EVALUATE, "if ZipFile(path).testzip():", "if False:"),
        ("an infinite parameter played", EVALUATE, 'if not all(tensor.isfinite().all() for tensor in model["policy"].values()):', "if False:"),
        ("infinite statistics played", EVALUATE, "if not (self.mean.isfinite().all() and self.std.isfinite().all()):", "if False:"),
        ("an agent without a network played", EVALUATE, "    if not tensors:\n", "    if False:\n"),
        ("an empty MUJOCO_GL taken for a choice", EVALUATE, "names = [wanted] if wanted else", "names = [wanted] if wanted is not None else"),
        ("of a directory the model", EVALUATE, 'path / ("checkpoint.pt" if (path / "checkpoint.pt").exists() else "model.pt")', 'path / "model.pt"'),
        ("another robot's model accepted", EVALUATE, "if vec.single_observation_space.shape != policy.mean.shape or act_ids != policy.act_ids:", "if vec.single_observation_space.shape != policy.mean.shape:"),
    ],
    "scripts: speed_counts or main_makes": [
        ("speed counts the steps before a resume", ALL, "(global_step - start_step) / (time", "global_step / (time"),
        ("another epsilon of the critic's Adam", ON_POLICY, "Adam(critic.parameters(), eps=1e-5, ", "Adam(critic.parameters(), "),
        ("another epsilon of the actors' Adam", PPO, "Adam(policy.parameters(), eps=1e-5, ", "Adam(policy.parameters(), "),
        ("another critic's output gain", ON_POLICY, "*args.hidden_sizes, 1), 1.0)", "*args.hidden_sizes, 1), 0.5)"),
        ("the agents see more than agent_obsk", ALL, "envs.make_vec(args.env_id, args.num_envs, args.agent_obsk, args.num_threads)", "envs.make_vec(args.env_id, args.num_envs, None, args.num_threads)"),
        ("threads of the physics ignored", ALL, "envs.make_vec(args.env_id, args.num_envs, args.agent_obsk, args.num_threads)", "envs.make_vec(args.env_id, args.num_envs, args.agent_obsk)"),
    ],
    "scripts: first_standard or log_and_model": [
        ("--log-std-init ignored", ON_POLICY, "torch.full((act_dim,), args.log_std_init)", "torch.full((act_dim,), -1.0)"),
        ("no model saved", ALL, '            save(model, run_dir / "model.pt")\n', ""),
        ("the model before the last update", ALL, '                "policy": state["policy"],\n', '                "policy": {k: v + 1 for k, v in state["policy"].items()},\n'),
        ("evaluations at the end only", ALL, "if last or global_step % args.eval_interval < ", "if last or -1 > global_step % args.eval_interval < "),
        ("no checkpoint at the end", ON_POLICY, "if last or global_step % args.checkpoint_interval < batch_size:", "if global_step % args.checkpoint_interval < batch_size:"),
        ("no evaluation at the end", ON_POLICY, "if last or global_step % args.eval_interval < batch_size:", "if global_step % args.eval_interval < batch_size:"),
        ("episodes logged again and again", ON_POLICY, "            env.finished.clear()\n", ""),
    ],
    "device: everything_is_on": [
        ("actors stay on the CPU", ON_POLICY, "        policy.to(device)\n", ""),
        ("the rollout stays on the device", ON_POLICY, "        policy.cpu()  # fast", "        pass  # fast"),
        ("the critic stays on the CPU", CENTRAL, "1), 1.0).to(device)", "1), 1.0)"),
        ("the critics stay on the CPU", (IPPO,), "    critic.to(device)\n", ""),
    ],
    "ippo": [
        ("all agents' critics fit the first one's returns", (IPPO,), "returns[i].flatten(), args", "returns[0].flatten(), args"),
        ("values of the first critic for all", (IPPO,), "critic[i](agents_obs[i])", "critic[0](agents_obs[0])"),
        ("next values of the first critic for all", (IPPO,), "critic[i](agents_next_obs[i])", "critic[0](agents_next_obs[0])"),
        ("next values of the observation itself (IPPO)", (IPPO,), "policy.observe(next_obs.flatten(0, 1))", "policy.observe(obs.flatten(0, 1))"),
        ("only the first critic learns", (IPPO,), "critic[i], critic_optimizer, agents_obs[i],", "critic[0], critic_optimizer, agents_obs[0],"),
        ("advantages centred over all agents", (IPPO,), "(b_advantages - mean) / (std + 1e-8)", "(b_advantages - b_advantages.mean()) / (std + 1e-8)"),
        ("advantages scaled over all agents", (IPPO,), "(b_advantages - mean) / (std + 1e-8)", "(b_advantages - mean) / (b_advantages.std() + 1e-8)"),
        ("one critic for all with --share-param", (IPPO,), "    critic.to(device)\n", "    if args.share_param:\n        critic = nn.ModuleList([critic[0]] * len(critic))\n    critic.to(device)\n"),
    ],
    "maddpg": [
        ("each actor climbs among the others' new actions", (MADDPG,), "        joint_action[:, ids] = actor(own_obs)\n", "        for other, other_obs, other_ids in zip(actors, agents_obs, act_ids):\n            joint_action[:, other_ids] = other(other_obs).detach()\n        joint_action[:, ids] = actor(own_obs)\n"),
        ("one actor's loss counts for all", (MADDPG,), "losses.sum().backward(", "(losses[0] + 0 * losses.sum()).backward("),
        ("actors descend", (MADDPG,), "losses = -critic(", "losses = critic("),
        ("the actors' gradients pile up", (MADDPG,), "    optimizer.zero_grad()\n    losses", "    losses"),
        ("the critic's gradients pile up (MADDPG)", (MADDPG,), "    optimizer.zero_grad()\n    loss.backward()", "    loss.backward()"),
        ("actors without their tanh", (MADDPG,), "torch.tanh(self.net(obs))", "self.net(obs)"),
        ("outputs in the agents' order (MADDPG)", (MADDPG,), "torch.cat(actions, dim=1)[:, self.flat_order]", "torch.cat(actions, dim=1)"),
        ("the inverse order of the actuators (MADDPG)", (MADDPG,), "torch.cat(self.act_ids).argsort()", "torch.cat(self.act_ids)"),
        ("agents see the first entries (MADDPG)", (MADDPG,), "self.obs_ids = [torch.as_tensor(ids) for ids in partition.obs_ids]", "self.obs_ids = [torch.arange(len(ids)) for ids in partition.obs_ids]"),
        ("targets follow at once", (MADDPG,), "target.lerp_(parameter, tau)", "target.lerp_(parameter, 1 - tau)"),
        ("the critic's target never moves", (MADDPG,), "[*target_policy.parameters(), *target_critic.parameters()]", "[*target_policy.parameters()]"),
        ("targets without the value of what follows", (MADDPG,), "targets = b_returns + b_discounts * next_values", "targets = b_returns + 0 * next_values"),
        ("windows of one step", (MADDPG,), "args.batch_size, args.n_step, args.gamma\n", "args.batch_size, 1, args.gamma\n"),
        ("updates begin one step late", (MADDPG,), "max(0, step + args.num_envs - args.learning_starts)", "max(0, step - args.learning_starts)"),
        ("the actors are not watched for what is not finite", (MADDPG,), "nn.utils.get_total_norm(parameters)", "nn.utils.get_total_norm([*critic.parameters()])"),
        ("targets stay", (MADDPG,), "                polyak(target_parameters, parameters, args.tau)\n", ""),
        ("target of the critic itself", (MADDPG,), "next_values = target_critic(", "next_values = critic("),
        ("target of the actors themselves", (MADDPG,), "target_critic(b_next_obs, target_policy(b_next_obs))", "target_critic(b_next_obs, policy(b_next_obs))"),
        ("target discounted by one step", (MADDPG,), "b_discounts * next_values", "args.gamma * next_values"),
        ("rewards of a window not discounted", (MADDPG,), "(rewards * discounts * used).sum(1)", "(rewards * used).sum(1)"),
        ("a window goes on after its episode", (MADDPG,), "used = stored & (num_ends_before == 0)", "used = stored"),
        ("the last reward of an episode not counted", (MADDPG,), "ends.cumsum(1) - ends.long()", "ends.cumsum(1)"),
        ("a window goes on into the oldest steps", (MADDPG,), "stored = window < self.size", "stored = window >= 0"),
        ("termination ignored (MADDPG)", (MADDPG,), 'gamma**steps * (1 - self.data["terminations"][last, column])', "gamma**steps"),
        ("truncation taken for termination (MADDPG)", (MADDPG,), 'gamma**steps * (1 - self.data["terminations"][last, column])', 'gamma**steps * (1 - self.data["terminations"][last, column]) * (1 - self.data["truncations"][last, column])'),
        ("where the first step leads", (MADDPG,), "rows.gather(1, steps[:, None] - 1)", "rows.gather(1, 0 * steps[:, None])"),
        ("the oldest step at the start of the memory", (MADDPG,), "(self.position - self.size + window)", "(window + 0)"),
        ("the newest step is never drawn", (MADDPG,), "torch.randint(self.size, ", "torch.randint(max(1, self.size - 1), "),
        ("one environment is never drawn", (MADDPG,), "torch.randint(self.num_envs, ", "torch.randint(max(1, self.num_envs - 1), "),
        ("a buffer's position not restored", (MADDPG,), '        self.position = state["position"]\n', ""),
        ("the buffer not saved", (MADDPG,), '        "buffer": buffer,\n', ""),
        ("target actors not saved", (MADDPG,), '        "target_policy": target_policy,\n', ""),
        ("target critic not saved", (MADDPG,), '        "target_critic": target_critic,\n', ""),
        ("generator not restored (MADDPG)", (MADDPG,), '        torch.set_rng_state(checkpoint["rng"])\n', ""),
        ("next episode's observation leaks into the ended one (MADDPG)", (MADDPG,), "next_obs[done] = torch.tensor(final_obs, dtype=torch.float32)", "pass"),
        ("observation statistics of the first reset only (MADDPG)", (MADDPG,), "        self.obs_rms.update(obs)\n        self.returns", "        self.returns"),
        ("normalised observations in the buffer", (MADDPG,), "                obs=obs,\n", "                obs=env.normalize(obs),\n"),
        ("raw observations for the critic", (MADDPG,), "                b_obs = env.normalize(b_obs)\n", ""),
        ("raw next observations for the targets", (MADDPG,), "                b_next_obs = env.normalize(b_next_obs)\n", ""),
        ("no exploration", (MADDPG,), "policy.act(env.normalize(obs), noise=True)", "policy.act(env.normalize(obs), noise=False)"),
        ("evaluation explores", (MADDPG,), "        if noise:\n", "        if True:\n"),
        ("actions out of range in the buffer", (MADDPG,), "return actions.clamp(-1, 1)", "return actions"),
        ("first actions not from -1 on", (MADDPG,), "2 * torch.rand(args.num_envs, act_dim) - 1", "torch.rand(args.num_envs, act_dim)"),
        ("no random actions first", (MADDPG,), "if step < args.learning_starts:", "if False:"),
        ("fractions of updates lost", (MADDPG,), "updates_after = int(steps_after * args.updates_per_step)", "updates_after = updates_before + int(args.num_envs * args.updates_per_step)"),
        ("a buffer of less than a window accepted", (MADDPG,), "if args.buffer_size < args.num_envs * args.n_step:", "if False:"),
        ("runs of neighbouring seeds overlap (MADDPG)", (MADDPG,), "np.random.SeedSequence(args.seed).generate_state(3).tolist()", "[args.seed, args.seed, args.seed + 1]"),
        ("not finite goes on (MADDPG)", (MADDPG,), "if not np.isfinite(float(value)):", "if False:"),
    ],
    "evaluate": [
        ("model.pt read before checkpoint.pt", EVALUATE, '("checkpoint.pt" if (path / "checkpoint.pt").exists() else "model.pt")', '("model.pt" if (path / "model.pt").exists() else "checkpoint.pt")'),
        ("a model may run code", EVALUATE, 'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False'),
        ("MADDPG's actors without their tanh", EVALUATE, "        if self.tanh:\n", "        if False:\n"),
        ("every actor with a tanh", EVALUATE, "        if self.tanh:\n", "        if True:\n"),
        ("normalised in the wrong precision", EVALUATE, "torch.float32 if self.tanh else torch.float64", "torch.float32"),
        ("zero and one swapped", EVALUATE, "torch.tensor([0.0, 1.0])", "torch.tensor([1.0, 0.0])"),
        ("actions on the first actuators", EVALUATE, "torch.tensor(act_ids), net(", "torch.arange(len(act_ids)), net("),
        ("actions out of an actuator's range", EVALUATE, "vec.step(np.clip(actions, low, high))", "vec.step(actions)"),
        ("other start states than the script's", EVALUATE, "vec.reset(seed=eval_seed)", "vec.reset(seed=seed)"),
        ("evaluation from other start states every time", ON_POLICY, "policy.cpu(), eval_seed)", "policy.cpu(), global_step)"),
        ("episodes after the first count in the score", EVALUATE, "returns[running] += rewards[running]", "returns += rewards"),
        ("a play that never ends (evaluate.py)", EVALUATE, "while running.any() and lengths.max() < MAX_EPISODE_STEPS:", "while running.any():"),
        ("a module imported without --allow-import (evaluate.py)", EVALUATE, 'if ":" in env_id and not args.allow_import:', "if False:"),
    ],
    "evaluate: film or limbs": [
        ("a limb in another agent's colour", EVALUATE, ".append(agent)\n", ".append(0)\n"),
        ("film changes the simulation", EVALUATE, "self.env.data.qpos[:] = self.base.qpos[0]", "self.base.qvel[0] = 0"),
    ],
}  # fmt: skip


class Fault(NamedTuple):
    """One row of the table."""

    likely: str  # the test file that should catch it
    words: str  # of the tests in it that should, for -k; empty: all of it
    description: str
    files: tuple[str, ...]
    old: str
    new: str


MUTANTS = []
for tests, rows in FAULTS.items():
    file, _, words = tests.partition(": ")
    MUTANTS += [Fault(file, words, *row) for row in rows]


def check() -> list[str]:
    """What is wrong with the table: a text that is not exactly once in a file, a broken file that does not compile."""
    texts = {file: (ROOT / file).read_text() for fault in MUTANTS for file in fault.files}
    wrong = []
    for number, fault in enumerate(MUTANTS, start=1):
        for file in fault.files:
            count = texts[file].count(fault.old)
            if count != 1:
                wrong.append(f"{number} {fault.description}: {count} times in {file}, not once")
            try:
                compile(texts[file].replace(fault.old, fault.new), file, "exec")
            except SyntaxError as e:
                wrong.append(f"{number} {fault.description}: {file} would not compile: {e}")
    descriptions = [fault.description for fault in MUTANTS]
    for description in sorted(set(descriptions)):
        if descriptions.count(description) > 1:
            wrong.append(f"{description}: two faults of this name")
    for likely in sorted({fault.likely for fault in MUTANTS}):
        if likely not in ORDER:
            wrong.append(f"{likely}: not in ORDER")
    return wrong


def copy_project(copy: Path) -> None:
    """Copy what the tests need."""
    ignore = shutil.ignore_patterns(".*", "runs", "benchmark", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignore)


def run_pytest(project: Path, options: Sequence[str], output: Path) -> None:
    """Be `python -m pytest`, in a process of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    os.chdir(project)
    sys.path[0] = str(project)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(int(pytest.main([*options])))


def run_tests(project: Path, chosen: Sequence[str]) -> str:
    """Run tests until one fails; return its name, "" if none does, or that they hang."""
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *chosen]
    output = project / "pytest.txt"
    process = FORK.Process(target=run_pytest, args=(project, options, output))
    process.start()
    process.join(TIME_LIMIT)
    if process.exitcode is None:
        process.kill()
        return f"more than {TIME_LIMIT} s"
    for line in output.read_text().splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split(maxsplit=1)[1].split(" - ")[0].removeprefix("tests/")
    if process.exitcode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"the tests did not run: {options}\n{output.read_text()}")
    return ""


def run_mutant(fault: Fault) -> tuple[str, float]:
    """Make a fault in a temporary copy, run the tests until one fails; return its name or "", and the seconds."""
    start = time.time()
    likely = f"tests/test_{fault.likely}.py"
    rounds = []
    if last := LAST.get(fault.description):
        rounds.append([f"tests/{last[0]}", "-k", last[1]])
    if fault.words:
        rounds.append([likely, "-k", fault.words])
    rounds.append([likely])
    rounds.append([f"tests/test_{name}.py" for name in ORDER if name != fault.likely])
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp, "project")
        copy_project(copy)
        for file in fault.files:
            text = (copy / file).read_text()
            (copy / file).write_text(text.replace(fault.old, fault.new))
        for chosen in rounds:
            caught = run_tests(copy, chosen)
            if caught:
                break
    return caught, time.time() - start


def main() -> None:
    """Print the table; exit with 1 if a fault survives."""
    if wrong := check():
        raise SystemExit("\n".join(wrong))
    if sys.argv[1:] == ["--check"]:
        print(f"{len(MUTANTS)} faults, each where it should be")
        return
    numbers = [int(number) for number in sys.argv[1:]] or list(range(1, len(MUTANTS) + 1))
    chosen = [MUTANTS[number - 1] for number in numbers]
    survivors = 0
    catchers = set()
    for name in SLOW:
        importlib.import_module(name)
    with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
        for number, fault, (caught, seconds) in zip(numbers, chosen, pool.map(run_mutant, chosen)):
            survivors += not caught
            catchers.add(caught)
            row = f"| {number} | {fault.description} | {caught or 'SURVIVED'} | {seconds:.0f} s |"
            print(row, flush=True)
    tests = [f"tests/{name}" for name in sorted(catchers) if name.startswith("test_")]
    with tempfile.TemporaryDirectory() as tmp:
        copy_project(Path(tmp, "project"))
        if tests and (failed := run_tests(Path(tmp, "project"), tests)):
            raise SystemExit(f"{failed} fails with nothing broken: what it caught means nothing")
    print(f"{len(chosen)} faults, {survivors} survived; with nothing broken all these tests pass")
    raise SystemExit(survivors > 0)


if __name__ == "__main__":
    main()
