"""The on-policy scripts are one text but for the algorithm."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAIRS = [("mappo", "happo"), ("happo", "hatrpo"), ("mappo", "ippo")]

# Where the scripts may differ: from the line that matches the first pattern up to the line that matches the second.
ALGORITHM = (
    (r'^"""', r"^import "),  # module docstring
    (r"^(from|import) ", r"^import envs$"),  # an algorithm may import what only it needs
    (r"^class Args", r"^# Running normalisation$"),
    (r"^# The algorithm$", r"^def compute_gae"),
    (r"^def minibatches", r"^def critic_update"),
    (r"^    # Actor optimizers$", r"^    # Storage$"),
    (r"^        # Actor update$", r"^        # Critic update$"),
)
# IPPO's critics are part of its algorithm.
CRITICS = (
    (r"^    # Critic$", r"^    # Actor optimizers$"),
    (r"^        # Advantages$", r"^        agents_actions"),
    (r"^        # Critic update$", r"^        # Evaluation$"),
)


def shared_text(path: Path, sections: Sequence[tuple[str, str]]) -> list[str]:
    """The lines of a script outside the sections that may differ."""
    shared, sections, until = [], list(sections), None
    for line in path.read_text().splitlines():
        if until and re.search(until, line):
            until = None
        for section in sections:
            if until is None and re.search(section[0], line):
                until = section[1]
                sections.remove(section)
                break
        if until is None:
            shared.append(line)
    assert until is None
    return shared


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_scripts_differ_only_in_the_algorithm(first: str, second: str):
    """Outside docstring, Args, the algorithm's functions and the actor update, siblings are the same to the letter."""
    paths = [ROOT / f"{name}_mamujoco.py" for name in (first, second)]
    sections = [*ALGORITHM, *CRITICS] if second == "ippo" else ALGORITHM
    texts = [shared_text(path, sections) for path in paths]
    hunk = "\n".join(difflib.unified_diff(*texts, *(path.name for path in paths), lineterm="", n=1))
    assert not hunk, f"not the algorithm, but different:\n{hunk}"
    assert len(texts[0]) > 300  # the comparison has not shrunk to nothing


def functions(path: Path) -> dict[str, str]:
    """Top-level functions and classes of a script by name."""
    blocks = re.split(r"\n\n\n(?=(?:@\w+\n)?(?:def|class) )", path.read_text())
    return {re.search(r"(?:def|class) (\w+)", block)[1]: block.split("\n\n\n# ")[0].rstrip() for block in blocks[1:]}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_functions_of_one_name_are_one_text(first: str, second: str):
    """A function that two scripts have is the same in both, even inside the algorithm's section."""
    a, b = (functions(ROOT / f"{name}_mamujoco.py") for name in (first, second))
    common = (a.keys() & b.keys()) - {"Args", "main"}
    assert {"compute_gae", "minibatches", "critic_update", "NormalizedEnv", "JointPolicy"} <= common
    for name in common:
        assert a[name] == b[name], f"{name} differs between {first} and {second}"


def test_diffs_stay_small():
    """`diff` of two siblings is short enough to be read as the algorithm."""
    for first, second, most in (("mappo", "happo", 60), ("happo", "hatrpo", 210), ("mappo", "ippo", 70)):
        a, b = ((ROOT / f"{name}_mamujoco.py").read_text().splitlines() for name in (first, second))
        changed = [line for line in difflib.ndiff(a, b) if line[0] in "+-"]
        assert len(changed) <= most, f"{first} -> {second}: {len(changed)} changed lines"
