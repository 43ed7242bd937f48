"""No GPU is at hand: the scripts run whole on PyTorch's `meta` device, which refuses what a GPU refuses.

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
    load, save = staticmethod(torch.load), staticmethod(lambda *_: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class OnDevice(torch.Generator):
    """A generator that says it is on the device."""

    device = META


def make_generator(device: torch.device | None = None) -> torch.Generator:
    """What the scripts know as `Generator`: that of the networks' first weights is on the CPU."""
    return OnDevice() if device == META else torch.Generator()


class Device(TorchFunctionMode):
    """Gives what is read off the device some value, and counts the transfers in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("generator"), OnDevice):
            kwargs |= {"generator": None, "device": META}
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


@pytest.fixture
def on_meta(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script that finds a GPU, which is `meta`."""
    monkeypatch.setattr(script, "torch", Torch("torch"))
    monkeypatch.setattr(script, "Generator", make_generator)
    monkeypatch.setattr(script, "Adam", lambda params, fused, **kwargs: torch.optim.Adam(params, **kwargs))
    return script


@pytest.mark.parametrize("flags", [{}, {"share_param": True, "agent_obsk": 0}], ids=["separate", "shared"])
def test_everything_is_on_the_device(on_meta: ModuleType, flags: dict, tmp_path: Path):
    """Rollout with the ends of episodes, update, evaluation, checkpoint: no tensor is left on the CPU.

    A step costs one transfer each way (and two to the device when an episode ends: its last observation, and where).
    """
    device = Device()
    with device:
        train_args = {"num_steps": 30, "num_envs": 4, "total_timesteps": 240, "eval_episodes": 1, "cuda": True} | flags
        with pytest.raises(EOFError):  # after the run: no model can be saved from `meta`
            train(on_meta, tmp_path / "run", env_id="Pusher-3p", **train_args)
    # Training: reset and 60 steps. Evaluation: reset, 100 steps, the end of an episode (in training none ends).
    assert device.transfers == {"to the device": 61 + 101 + 2, "to the host": 60 + 100}


def test_the_stand_in_finds_what_is_left_behind(on_meta: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rewards that stay on the CPU are found."""
    compute_gae = on_meta.compute_gae
    monkeypatch.setattr(on_meta, "compute_gae", lambda rewards, *args: compute_gae(torch.zeros(8, 4), *args))
    with Device(), pytest.raises(RuntimeError, match="device"):
        train(on_meta, tmp_path / "run", num_steps=8, total_timesteps=32, cuda=True)
