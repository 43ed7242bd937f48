"""The scripts are one text but for the algorithm, and short."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import SIBLINGS

ROOT = Path(__file__).parent.parent
PAIRS = [(sibling.differs_from, name) for name, sibling in SIBLINGS.items() if sibling.differs_from]
MAIN_LINES = 145

# Where the scripts may differ: from the line that matches the first pattern up to the line that matches the second.
ALGORITHM = (
    (r'^"""', r"^import "),  # module docstring
    (r"^from collections.abc", r"^from dataclasses"),  # an algorithm may import what only it needs
    (r"^    # Algorithm$", r"^# Environment$"),
    (r"^    def kl", r"^class Policy"),
    (r"^def minibatches", r"^def critic_update"),
    (r"^    # Actor optimizer$", r"^    # Storage$"),
    (r"learning_rate.*args.learning_rate$", r"^        # Critic update$"),
    (r"^        stats, M = hatrpo_update", r"^        # Critic update$"),
)
# IPPO's critics are part of its algorithm.
CRITICS = (
    (r"^    # Critic$", r"^    # Actor optimizer$"),
    (r"^        # Advantages$", r"^        agents_actions"),
    (r"^        # Critic update$", r"^        # Logging$"),
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
        if until is None and line.strip() not in {"", "@staticmethod"}:
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
    assert len(texts[0]) > 250  # the comparison has not shrunk to nothing


def functions(path: Path) -> dict[str, str]:
    """Top-level functions and classes of a script by name."""
    blocks = re.split(r"\n\n\n(?=(?:@\w+\n)?(?:def|class) )", path.read_text())
    return {re.search(r"(?:def|class) (\w+)", block)[1]: block.split("\n\n\n# ")[0].rstrip() for block in blocks[1:]}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_functions_of_one_name_are_one_text(first: str, second: str):
    """A function that two scripts have is the same in both, even inside the algorithm's section."""
    a, b = (functions(ROOT / f"{name}_mamujoco.py") for name in (first, second))
    common = (a.keys() & b.keys()) - {"Args", "main"} - ({"Actor"} if second == "hatrpo" else set())  # it has `kl`
    assert {"compute_gae", "minibatches", "critic_update", "NormalizedEnv", "MLP", "Policy", "evaluate"} <= common
    for name in common:
        assert a[name] == b[name], f"{name} differs between {first} and {second}"


def test_maddpg_has_the_others_plumbing():
    """What MADDPG has in common with the on-policy scripts is the same text there."""
    a, b = (functions(ROOT / f"{name}_mamujoco.py") for name in ("mappo", "maddpg"))
    for name in ("MLP", "fail", "parse_args", "save", "evaluate"):
        assert a[name] == b[name], name


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_diffs_stay_small(first: str, second: str):
    """`diff` of two siblings is short enough to be read as the algorithm."""
    a, b = ((ROOT / f"{name}_mamujoco.py").read_text().splitlines() for name in (first, second))
    changed = [line for line in difflib.ndiff(a, b) if line[0] in "+-"]
    assert len(changed) <= SIBLINGS[second].changed, f"{first} -> {second}: {len(changed)} changed lines"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*_mamujoco.py")), ids=lambda path: path.stem)
def test_scripts_stay_short(path: Path):
    """A script that outgrows its length by 5% must first lose something."""
    lines = path.read_text().splitlines()
    assert len(lines) <= 1.05 * SIBLINGS[path.stem.split("_")[0]].lines
    assert len(functions(path)["main"].split('if __name__ == "__main__"')[0].splitlines()) <= 1.05 * MAIN_LINES
