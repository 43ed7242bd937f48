"""The benchmark's arithmetic: operations of an update, time by phase, the share of the physics."""

import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import throughput

pytestmark = pytest.mark.slow  # whole runs and processes


class CountFlops(TorchDispatchMode):
    """Adds up what PyTorch says its matrix products cost."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("settings", [{}, throughput.HARL_PPO, {"fisher_stride": 4}], ids=["", "HARL", "stride"])
@pytest.mark.parametrize("name", throughput.SCRIPTS)
def test_flops_of_an_update(name: str, settings: dict):
    """Within 8% of what is executed: the formula also counts the gradient in the observations, which nobody needs."""
    run, flops = throughput.make_update(name, 2, 400, **settings)
    with CountFlops() as counted:
        run()
    assert counted.flops == pytest.approx(flops, rel=0.08)
    assert counted.flops < flops or name == "hatrpo"  # whose line search may try more than once


def test_profile_gives_each_phase_its_own_time(monkeypatch: pytest.MonkeyPatch):
    """Each look at the clock takes a second: a phase has its calls' time less that of the phases that it calls."""
    script = ModuleType("script")
    script.Args = SimpleNamespace
    script.inner = lambda x: x + 1
    script.outer = lambda: script.inner(1) + script.inner(2)
    script.main = lambda args: script.outer() + script.inner(args.total_timesteps)
    before: list[Callable] = [script.inner, script.outer, script.main]
    monkeypatch.setattr(throughput.time, "perf_counter", count().__next__)
    phases = {"a": [(script, "inner")], "b": [(script, "outer")], "rest": [(script, "main")]}
    seconds = {"a": 3 * 1, "b": 5 - 2, "rest": 9 - 5 - 1}
    measured = throughput.profile(script, phases, num_threads=1)
    assert {phase: value * 0.04 for phase, value in measured.items()} == pytest.approx(seconds)
    assert [script.inner, script.outer, script.main] == before


def test_physics_share():
    """Most of the time of Ant's steps is in the physics, and not all."""
    assert 0.5 < throughput.physics_share("Ant-4x2", 8, num_threads=1) < 1
