"""CI has no GPU: the scripts run whole on PyTorch's `meta` device, which stands in for one.

A tensor on `meta` has a shape and no data. Whatever PyTorch computes goes through `Device`, which refuses to mix
devices where a GPU would, counts the transfers, and makes up the values that are read. So a tensor that the scripts
forget to put on the device, or a transfer too many, fails here as it would on a GPU, or is counted.
"""

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from test_runs import newest
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import evaluate

CPU = torch.device("cpu")
META = torch.device("meta")
aten = torch.ops.aten

# Loading what has data into what has none.
pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")


class Device(TorchDispatchMode):
    """Lets `meta` be to the CPU what a GPU is, and counts the transfers in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: Counter[str] = Counter()
        self.rng = np.random.default_rng(0)

    def count(self, source: torch.device, target: torch.device) -> None:
        """Count a transfer, if it is one."""
        if source != target:
            self.transfers[f"{source.type} to {target.type}"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device == META:
            # Whether a KL is too large: both branches are taken.
            return bool(self.rng.integers(2)) if args[0].dtype == torch.bool else 1.0
        if func is aten._to_copy.default:
            source, target = args[0].device, kwargs.get("device", args[0].device)
            self.count(source, target)
            if (source, target) == (META, CPU):
                return torch.zeros_like(args[0], device=CPU)
            return func(*args, **kwargs)
        if func is aten.copy_.default:
            target, source = args[0].device, args[1].device
            self.count(source, target)
            return args[0].zero_() if (source, target) == (META, CPU) else func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func in (aten.index.Tensor, aten.index_put_.default) and args[0].device == META:
            indices = [id(x) for x in args[1] if x is not None and x.device == CPU]
            tensors = [x for x in tensors if id(x) not in indices]  # they may be on the CPU
        devices = {x.device.type for x in tensors}
        if len(devices) > 1:
            raise RuntimeError(f"{func} of tensors on more than one device: {sorted(devices)}")
        if func is aten._fused_adam_.default and devices == {"meta"}:
            return None  # `meta` has no such kernel
        return func(*args, **kwargs)


class Torch(ModuleType):
    """The module torch on a machine with a GPU, which is `meta`."""

    cuda = SimpleNamespace(is_available=lambda: True)

    @staticmethod
    def device(name: str) -> torch.device:
        return META if name == "cuda" else torch.device(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each script, also MADDPG."""
    return importlib.import_module(request.param)


def in_place(move: Callable) -> Callable:
    """A method that moves a module, such that its parameters stay the same objects."""

    def moved(*args: Any) -> nn.Module:
        torch.__future__.set_swap_module_params_on_conversion(True)
        module = move(*args)
        torch.__future__.set_swap_module_params_on_conversion(False)
        return module

    return moved


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch treat `meta` like a GPU also where it does not ask `Device`."""
    # Adam's fused kernel.
    supported = ["cpu", "meta"]
    optimizers = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: supported)
    # Module.to and Module.cpu change the parameters in place; on their own they would make new ones.
    for name in ("to", "cpu"):
        monkeypatch.setattr(nn.Module, name, in_place(getattr(nn.Module, name)))
    # A file from a GPU needs `map_location` to be read.
    load = torch.load

    def mapped(path: Path, map_location: str | None = None, **kwargs: Any) -> dict:
        state = load(path, **kwargs)
        return tree_map(on_cpu, state) if map_location == "cpu" else state

    monkeypatch.setattr(torch, "load", mapped)


def on_cpu(x: Any) -> Any:
    """What a tensor of the GPU is on the CPU; it has no data here, so it is zeros."""
    return torch.zeros_like(x, device=CPU) if isinstance(x, Tensor) and x.device == META else x


@pytest.fixture
def devices_of_adam() -> Iterator[list]:
    """At each step of an Adam the devices of its parameters and of its state."""
    steps = []

    def hook(optimizer: torch.optim.Adam, *_: Any) -> None:
        [group] = optimizer.param_groups
        state = tree_leaves(list(optimizer.state.values()))
        steps.append({x.device for x in group["params"]} | {x.device for x in state})

    handle = register_optimizer_step_pre_hook(hook)
    yield steps
    handle.remove()


def sizes_of(script: ModuleType) -> dict:
    """Two iterations of 40 steps; MADDPG begins to learn after 20 steps."""
    sizes = {"env_id": "Pusher-3p", "num_steps": 10, "num_envs": 4, "total_timesteps": 80}
    sizes |= {"hidden_sizes": (16, 16), "num_threads": 1, "eval_episodes": 0}
    if script.__name__ == "maddpg_mamujoco":
        return sizes | {"learning_starts": 20, "batch_size": 8, "buffer_size": 400}
    sizes |= {"num_minibatches": 2, "critic_epochs": 2}
    if script.__name__ == "hatrpo_mamujoco":
        return sizes
    return sizes | {"update_epochs": 2}


def run(script: ModuleType, run_dir: Path, **args: object) -> None:
    """A run on the CPU, or with `cuda` on the device."""
    script.main(script.Args(**sizes_of(script) | {"run_dir": str(run_dir)} | args))


def resume(script: ModuleType, run_dir: Path, *flags: object) -> dict:
    """Continue a run from the command line; return its checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, "--resume", str(run_dir), *map(str, flags)])
        script.main(*script.parse_args())
    return newest(run_dir)


@pytest.mark.parametrize(
    "flags",
    [{}, {"env_id": "Reacher-2x1", "agent_obsk": 0, "share_param": True}],
    ids=["separate", "shared"],
)
def test_everything_is_on_the_device(
    script: ModuleType,
    flags: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices_of_adam: list,
):
    """Rollout, update, evaluation, checkpoint: no tensor is left behind, and none is moved without need."""
    off_policy = script.__name__ == "maddpg_mamujoco"
    if off_policy and flags:
        pytest.skip("MADDPG does not share parameters")
    monkeypatch.setattr(script, "torch", Torch("torch"))
    with Device() as device:
        run(script, tmp_path / "run", cuda=True, eval_episodes=1, **flags)
    # The actors of three agents, or one for all: three layers, and if they are stochastic log_std.
    networks = (6 if off_policy else 7) * (1 if flags else 3)
    critics = 1
    if script.__name__ == "ippo_mamujoco":
        critics = 2 if flags else 3
    to_device = networks + 6 * critics  # when they are made
    to_device += script.__name__ == "hatrpo_mamujoco"  # its radius
    to_device += 6 * 20  # what is stored, in 20 steps
    if off_policy:
        # The policy acts on the device: in 15 steps of the training, and in the 100 of an episode.
        to_host = 15 + 100
        to_device += 15 + 100
        # 6 updates: two random indices, and two normalisations with mean and standard deviation.
        to_device += 6 * 6
    else:
        # The policy acts on the CPU: it goes there for two rollouts and the evaluation, and comes
        # back for two updates. From the first update on some parameters have gradients, which go
        # with them: all of them, or those of the agent that HAPPO has updated last, or none.
        gradients = {"happo_mamujoco": 7, "hatrpo_mamujoco": 0}.get(script.__name__, networks)
        to_host = 3 * networks + 2 * gradients
        to_device += 2 * networks + gradients
    assert device.transfers == {"cpu to meta": to_device, "meta to cpu": to_host}
    assert len(devices_of_adam) >= 8
    assert all(devices == {META} for devices in devices_of_adam)


def test_without_cuda_everything_is_on_the_cpu(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices_of_adam: list
):
    """On a machine with a GPU, too."""
    monkeypatch.setattr(script, "torch", Torch("torch"))
    with Device() as device:
        run(script, tmp_path / "run")
    assert device.transfers == {}
    assert all(devices == {CPU} for devices in devices_of_adam)


def test_every_device_gets_the_same_draws(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All random numbers come from the CPU's generator, which is in the same state after two iterations."""
    run(script, tmp_path / "cpu")
    monkeypatch.setattr(script, "torch", Torch("torch"))
    with Device():
        run(script, tmp_path / "gpu", cuda=True)
    gpu = newest(tmp_path / "gpu")
    assert torch.equal(gpu["rng"], newest(tmp_path / "cpu")["rng"])


def test_a_run_changes_between_the_devices(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    devices_of_adam: list,
):
    """What a GPU has saved goes on without one and is evaluated there, and goes back: also the state of Adam."""
    with monkeypatch.context() as patch, Device():
        patch.setattr(script, "torch", Torch("torch"))
        run(script, tmp_path / "run", cuda=True)
    devices_of_adam.clear()

    evaluate.main(evaluate.Args(path=tmp_path / "run", episodes=1, num_threads=1))
    with Device() as device:
        checkpoint = resume(script, tmp_path / "run", "--total-timesteps", 120)
    assert "from step 80 to 120, cpu" in capsys.readouterr().out
    assert checkpoint["step"] == 120
    assert device.transfers == {}
    assert len(devices_of_adam) >= 4
    assert all(devices == {CPU} for devices in devices_of_adam)
    devices_of_adam.clear()

    monkeypatch.setattr(script, "torch", Torch("torch"))
    with Device():
        checkpoint = resume(script, tmp_path / "run", "--total-timesteps", 160, "--cuda")
    assert checkpoint["step"] == 160
    assert len(devices_of_adam) >= 4
    assert all(devices == {META} for devices in devices_of_adam)


# The stand-in


def adam_with_state_on(device: torch.device) -> None:
    """A step of an Adam for parameters on `meta`."""
    parameter = nn.Parameter(torch.zeros(2, device=META))
    optimizer = torch.optim.Adam([parameter], fused=True)
    for _ in range(2):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = optimizer.state[parameter]
        state["exp_avg"] = state["exp_avg"].to(device)


@pytest.mark.parametrize(
    "mix",
    [
        lambda cpu, gpu: cpu + gpu,
        lambda cpu, gpu: gpu @ cpu,
        lambda cpu, gpu: cpu @ gpu,
        lambda cpu, gpu: torch.cat([gpu, cpu]),
        lambda cpu, gpu: gpu.gather(1, cpu.long()),
        lambda cpu, gpu: cpu[gpu.long()],
        lambda cpu, gpu: gpu.lerp_(cpu, 0.1),
        lambda cpu, gpu: nn.functional.mse_loss(gpu, cpu),
        lambda cpu, gpu: nn.Linear(2, 2).to(META)(cpu),
        lambda cpu, gpu: adam_with_state_on(CPU),
    ],
)
def test_the_stand_in_refuses_what_a_gpu_refuses(mix: Callable):
    """Tensors on two devices."""
    with (
        Device(),
        pytest.raises(RuntimeError, match="on more than one device"),
    ):
        mix(torch.zeros(2, 2), torch.zeros(2, 2, device=META))


def test_the_stand_in_allows_what_a_gpu_allows():
    """Copies between the devices, indices on the CPU, modules that move and keep their parameters and gradients."""
    with Device() as device:
        gpu = torch.zeros(3, 2, device=META)
        gpu[0] = torch.ones(2)
        assert gpu[torch.tensor([0, 2])].device == META
        gpu[:, torch.tensor([1])] = torch.zeros(3, 1, device=META)
        assert gpu.cpu().device == CPU
        assert device.transfers == {"cpu to meta": 1, "meta to cpu": 1}
        adam_with_state_on(META)

        linear = nn.Linear(2, 1).to(META)
        weight = linear.weight
        linear(gpu).sum().backward()
        linear.cpu()
    assert linear.weight is weight
    assert weight.device == weight.grad.device == CPU
    assert device.transfers == {"cpu to meta": 1 + 2, "meta to cpu": 1 + 2 * 2}


def test_the_stand_in_finds_what_a_script_leaves_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rewards that stay on the CPU."""
    import happo_mamujoco as happo

    compute_gae = happo.compute_gae
    monkeypatch.setattr(happo, "torch", Torch("torch"))
    monkeypatch.setattr(
        happo, "compute_gae", lambda _, *args: compute_gae(torch.zeros(10, 4), *args)
    )
    with Device(), pytest.raises(RuntimeError, match="device"):
        run(happo, tmp_path / "run", cuda=True)
