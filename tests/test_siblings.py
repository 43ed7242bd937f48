"""The scripts are one text but for the algorithm, short, and not dense."""

import ast
import difflib
import importlib
import io
import re
import subprocess
import tokenize
from collections.abc import Sequence
from math import inf
from pathlib import Path

import pytest
from conftest import SCRIPTS, SIBLINGS

ROOT = Path(__file__).parent.parent
PAIRS = [(sibling.differs_from, name) for name, sibling in SIBLINGS.items() if sibling.differs_from]
each_pair = pytest.mark.parametrize(("first", "second"), PAIRS)
each_script = pytest.mark.parametrize("name", SIBLINGS)

# Where the scripts may differ: from the line that matches the first pattern up to the line that matches
# the second; "" matches the very next line.
ALGORITHM = (
    (r'^"""', r"^import os"),  # docstring; an algorithm may import what only it needs
    (r"^from collections.abc", r"^from dataclasses"),
    (r"^from torch.distributions", r"^from torch.nn.functional"),
    (r"^from torch.nn.utils", r""),
    (r"^    # Algorithm$", r"^# Networks$"),
    (r"^def (ppo_loss|flat_gradient)\b", r"^def critic_update\b"),
    (r"^    (actor_optimizer|region) = ", r""),
    (r'^        "(actor_optimizer|region)": ', r""),
    (r"^        actor_optimizer.param_groups", r""),
    (r"^        log = \w+_update\(", r"^        # Critic update$"),
)
# IPPO's critics are part of its algorithm.
CRITICS = (
    (r"^    critics? = ", r"^    critic_optimizer = "),
    (r"^        # Advantages$", r"^        # Actor update$"),
    (r"^        agents_obs = policy.observe\(b_obs\)$", r""),
    (r"^        # Critic update$", r"^        # Logging$"),
)
# What two scripts may set to different defaults, and explain differently.
OWN_DEFAULTS = {"num_minibatches"}


def read(name: str) -> str:
    """The text of a script."""
    return (ROOT / f"{name}_mamujoco.py").read_text()


def assert_same(a: Sequence[str], b: Sequence[str], what: str) -> None:
    """Compare lines; show the difference."""
    hunk = "\n".join(difflib.unified_diff(a, b, lineterm="", n=1))
    assert not hunk, f"{what}:\n{hunk}"


# One text


def shared_text(text: str, sections: Sequence[tuple[str, str]]) -> list[str]:
    """The lines of a script outside the sections that may differ."""
    shared = []
    remaining = list(sections)
    until = None
    for line in text.splitlines():
        if until is not None and re.search(until, line):
            until = None
        for section in remaining:
            if until is None and re.search(section[0], line):
                until = section[1]
                remaining.remove(section)
                break
        if until is None and line.strip():
            shared.append(line)
    assert until is None
    return shared


@each_pair
def test_scripts_differ_only_in_the_algorithm(first: str, second: str):
    """Outside docstring, Args, the algorithm's functions and their calls they are equal to the letter."""
    sections = [*ALGORITHM, *CRITICS] if second == "ippo" else ALGORITHM
    a, b = shared_text(read(first), sections), shared_text(read(second), sections)
    assert_same(a, b, f"{first} and {second} differ outside the algorithm")
    assert len(a) > 350  # the comparison has not shrunk to nothing


def functions(text: str) -> dict[str, str]:
    """The top-level functions and classes of a script, and the methods as Class.method, by name."""
    lines = text.splitlines()
    found = {}

    def add(node: ast.AST, prefix: str) -> None:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        found[prefix + node.name] = "\n".join(lines[first - 1 : node.end_lineno])

    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            add(node, "")
        if isinstance(node, ast.ClassDef):
            add(node, "")
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    add(method, f"{node.name}.")
    return found


@each_pair
def test_functions_of_one_name_are_one_text(first: str, second: str):
    """A function that two scripts have is the same in both, even inside the algorithm's section."""
    a, b = functions(read(first)), functions(read(second))
    common = (a.keys() & b.keys()) - {"Args", "main"}
    assert {"mlp", "Actor", "compute_gae", "approx_kl", "critic_update", "Policy"} <= common
    assert {"NormalizedEnv", "evaluate", "fail", "parse_args", "save"} <= common
    if second != "hatrpo":
        assert "ppo_loss" in common
    for name in common:
        what = f"{name} differs between {first} and {second}"
        assert_same(a[name].splitlines(), b[name].splitlines(), what)


def test_maddpg_has_the_others_plumbing():
    """What MADDPG has in common with the on-policy scripts is the same text there."""
    a, b = functions(read("mappo")), functions(read("maddpg"))
    names = ["mlp", "evaluate", "fail", "parse_args", "save"]
    for name in [*names, "NormalizedEnv.scale"]:
        what = f"{name} differs between mappo and maddpg"
        assert_same(a[name].splitlines(), b[name].splitlines(), what)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (r"^    # Log$", r"^    steps = "),
        (r'^        log\["charts/SPS"\]', r"^                log .= evaluate"),
        (r"^            summary = ", r"^        # Checkpoint$"),
        (r"^        # Checkpoint$", r"\Z"),
        (r"^import shlex$", r"^from pydantic import"),
        (r"^Fraction = ", r"^    checkpoint_interval"),
        (r"^    eval_interval", r"^    # Algorithm$"),
    ],
)
def test_maddpg_runs_logs_and_saves_as_the_others(start: str, end: str):
    """The sections of `main` and of Args that do not depend on the algorithm, to the letter."""
    pattern = re.compile(f"(?:{start})(.*?)(?={end})", re.MULTILINE | re.DOTALL)
    mappo = pattern.search(read("mappo"))[0]
    maddpg = pattern.search(read("maddpg"))[0].replace("iteration_steps", "batch_size")
    assert len(mappo.splitlines()) > 5
    assert_same(mappo.splitlines(), maddpg.splitlines(), "mappo and maddpg differ")


def arguments(text: str) -> dict[str, str]:
    """The declarations and docstrings of the fields of Args by name."""
    tree = ast.parse(text)
    body = next(node.body for node in tree.body if getattr(node, "name", "") == "Args")
    fields = {}
    for field, docstring in zip(body[1::2], body[2::2], strict=True):
        fields[field.target.id] = f"{ast.unparse(field)}: {docstring.value.value}"
    return fields


@each_pair
def test_arguments_of_one_name_are_one_text(first: str, second: str):
    """With the same type, default and explanation, but for those that an algorithm has of its own."""
    a, b = arguments(read(first)), arguments(read(second))
    common = a.keys() & b.keys()
    assert len(common) > 20
    for name in common:
        if second != "hatrpo" or name not in OWN_DEFAULTS:
            assert a[name] == b[name]
    order = [name for name in a if name in common]
    assert order == [name for name in b if name in common]


@each_pair
def test_diffs_stay_small(first: str, second: str):
    """`diff` of two siblings is short enough to be read as the algorithm."""
    names = [f"{name}_mamujoco.py" for name in (first, second)]
    diff = subprocess.run(["diff", *names], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = [line for line in diff.stdout.splitlines() if line[0] in "<>"]
    assert 0 < len(changed) <= SIBLINGS[second].changed


# Length and density


def code_tokens(text: str) -> list[tokenize.TokenInfo]:
    """The tokens of a Python text without comments, docstrings and layout."""
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    layout += (tokenize.COMMENT, tokenize.ENCODING, tokenize.ENDMARKER)
    tokens = []
    begins_statement = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in layout:
            if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                begins_statement = True
            continue
        docstring = token.type == tokenize.STRING and begins_statement
        begins_statement = False
        if not docstring:
            tokens.append(token)
    return tokens


def test_tokens_are_counted_without_comments_and_docstrings():
    """By hand: `def f ( x ) :` and `return x + 1` are ten tokens on two lines."""
    text = (
        '"""A module."""\n\n\ndef f(x):  # comment\n    """A\n    docstring."""\n    return x + 1\n'
    )
    tokens = code_tokens(text)
    assert [token.string for token in tokens] == [
        "def",
        "f",
        "(",
        "x",
        ")",
        ":",
        "return",
        "x",
        "+",
        "1",
    ]
    assert {token.start[0] for token in tokens} == {4, 7}
    assert len(code_tokens('x = "a string"\n')) == 3


@each_script
def test_scripts_stay_short(name: str):
    """A script that outgrows its tokens must first lose something."""
    assert len(code_tokens(read(name))) <= SIBLINGS[name].tokens


@each_script
def test_scripts_are_not_dense(name: str):
    """At most 11 tokens in a line of code, and few lines that are wide."""
    tokens = code_tokens(read(name))
    lines = {token.start[0] for token in tokens}
    assert len(tokens) <= 11 * len(lines)
    wide = [line for line in read(name).splitlines() if len(line) > 100]
    assert len(wide) <= 20


@each_script
def test_the_algorithm_comes_early_and_stands_alone(name: str):
    """Docstring, Args, networks, the algorithm, the agents and their environment, run: in this order."""
    lines = read(name).splitlines()
    headings = ["# Networks", "# The algorithm", "# The agents and their environment", "# Run"]
    assert [line for line in lines if re.match(r"# [A-Z]", line)] == headings
    assert lines.index("# The algorithm") + 1 <= 164
    # A reader of the algorithm needs nothing that stands below it.
    below = set()
    for later in functions("\n".join(lines[lines.index(headings[2]) :])):
        below.add(later.split(".")[0])
    assert {"Policy", "NormalizedEnv", "evaluate", "main"} <= below
    algorithm = lines[lines.index(headings[1]) : lines.index(headings[2])]
    names = {token.string for token in code_tokens("\n".join(algorithm))}
    assert not names & below


def test_all_scripts_are_registered():
    """A script of which the tests know nothing would not be compared with any."""
    assert [f"{name}_mamujoco" for name in sorted(SIBLINGS)] == SCRIPTS


# What is not in the paper

OFF = {
    "mappo": {},
    "happo": {"--keep-mean": ("keep_mean", True)},
    "hatrpo": {
        "--cg-damping 0": ("cg_damping", 0),
        "--momentum 0": ("momentum", 0),
        "--max-ratio inf": ("max_ratio", inf),
        "--max-growth 1": ("max_growth", 1),
    },
    "ippo": {},
    "maddpg": {"--n-step 1": ("n_step", 1)},
}


@each_script
def test_what_is_not_in_the_paper_names_the_flag_that_switches_it_off(name: str, monkeypatch):
    """Each mark has the flags in brackets; they change one argument, which is on by default."""
    text = read(name)
    marks = re.findall(r"# Not in the paper \((--.+?)\): ", text)
    assert marks == list(OFF[name])
    assert len(marks) == len(re.findall(r"not in the paper", text, re.IGNORECASE))
    script = importlib.import_module(f"{name}_mamujoco")
    default = vars(script.Args())
    for flags, (switch, off) in OFF[name].items():
        monkeypatch.setattr("sys.argv", [f"{name}_mamujoco.py", *flags.split()])
        args, _ = script.parse_args()
        changed = {key: value for key, value in vars(args).items() if value != default[key]}
        del changed["run_dir"]  # has the time in it
        assert changed == {switch: off}
