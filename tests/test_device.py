"""CI has no GPU: the scripts run whole on PyTorch's `meta` device, which refuses what a GPU refuses.

A tensor on `meta` has a shape and no data, and does not mix with one on the CPU. So a tensor that the scripts forget to
put on the device, or a second way between the devices, fails here as it would on a GPU.
"""

from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_scripts import train
from torch import Tensor
from torch.overrides import TorchFunctionMode

META = torch.device("meta")


class Torch(ModuleType):
    """The module torch, whose devices are all `meta`."""

    device = staticmethod(lambda _: META)
    cuda = SimpleNamespace(is_available=lambda: True)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def on_cpu(state: Any) -> Any:
    """What a GPU's tensors are in a file; here they have no data."""
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    if isinstance(state, list):
        return [on_cpu(value) for value in state]
    return torch.zeros_like(state, device="cpu") if getattr(state, "device", None) == META else state


class Device(TorchFunctionMode):
    """Gives what is read off the device some value, and counts the transfers in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if func is torch.as_tensor and kwargs.get("device") == META:
            self.transfers["to the device"] += 1
        if x is not None and x.device == META:
            if func is Tensor.cpu:
                self.transfers["to the host"] += 1
                return torch.zeros(x.shape, dtype=x.dtype)
            if func is Tensor.item:
                return 1.0
            if func is Tensor.__bool__:
                return True
            if func is Tensor.tolist:
                return np.arange(x.numel()).reshape(x.shape).tolist()
        return func(*args, **kwargs)


def put_on_meta(script: ModuleType, patch: pytest.MonkeyPatch) -> ModuleType:
    """Let a script find a GPU, which is `meta`."""
    save = script.save
    patch.setattr(script, "torch", Torch("torch"))
    patch.setattr(script, "Adam", lambda params, fused, **kwargs: torch.optim.Adam(params, **kwargs))
    patch.setattr(script, "save", lambda state, path: save(on_cpu(state), path))
    return script


@pytest.fixture
def on_meta(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script that finds a GPU."""
    return put_on_meta(script, monkeypatch)


SIZES = {"num_steps": 30, "num_envs": 4, "eval_episodes": 1}


@pytest.mark.parametrize("flags", [{}, {"share_param": True, "agent_obsk": 0}], ids=["separate", "shared"])
def test_everything_is_on_the_device(on_meta: ModuleType, flags: dict, tmp_path: Path):
    """Rollout, update, evaluation, checkpoint: no tensor is left on the CPU.

    A step costs two transfers to the device beside the noise (observations; rewards and ends), and one to the host.
    """
    with (device := Device()):
        train(on_meta, tmp_path / "run", env_id="Pusher-3p", **SIZES, total_timesteps=240, cuda=True, **flags)
    # Training: reset and 60 steps, in which no episode ends. Evaluation: 100 steps. model.pt: 3 actors of 6 tensors.
    assert device.transfers == {"to the device": 1 + 2 * 60 + 100, "to the host": 60 + 100 + 18}


def test_what_a_gpu_saved_goes_on_without_one(script: ModuleType, tmp_path: Path):
    """The generator is the CPU's on every device: a run of a GPU goes on here, and back, drawing the same numbers."""
    with pytest.MonkeyPatch.context() as patch, Device():
        put_on_meta(script, patch)
        train(script, tmp_path / "gpu", env_id="Pusher-3p", **SIZES, total_timesteps=120, cuda=True)
    train(script, tmp_path / "cpu", env_id="Pusher-3p", **SIZES, total_timesteps=120)
    gpu, cpu = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("gpu", "cpu"))
    assert torch.equal(gpu["generator"], cpu["generator"])
    run_dir = str(tmp_path / "gpu")
    args = gpu["args"] | {"resume": run_dir, "run_dir": run_dir, "total_timesteps": 240, "cuda": False}
    script.main(script.Args(**args), gpu)
    assert torch.load(tmp_path / "gpu" / "checkpoint.pt", weights_only=True)["step"] == 240


def test_the_stand_in_finds_what_is_left_behind(on_meta: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rewards that stay on the CPU are found."""
    compute_gae = on_meta.compute_gae
    monkeypatch.setattr(on_meta, "compute_gae", lambda rewards, *args: compute_gae(torch.zeros(8, 4), *args))
    with Device(), pytest.raises(RuntimeError, match="device"):
        train(on_meta, tmp_path / "run", num_steps=8, total_timesteps=32, cuda=True)
