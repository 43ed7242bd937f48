"""README.md and docs/: the commands run, what they name exists, numbers are as recorded, no link is dead."""

import difflib
import importlib
import re
import shlex
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import plot
import run as runner
import throughput
from conftest import SIBLINGS

import evaluate

pytestmark = pytest.mark.slow  # whole runs and processes

ROOT = runner.ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Not run here: what .ci/run does, a server, another commit, and what other tests or half an hour are for.
ELSEWHERE = (
    "python3 -m venv",
    "tensorboard",
    "git ",
    "benchmark/throughput.py",
    "benchmark/plot.py record",
)
# A run's size, where a command does not give it.
SMALL = {
    "num_envs": 2,
    "num_steps": 16,
    "num_minibatches": 2,
    "total_timesteps": 64,
    "hidden_sizes": (8, 8),
    "update_epochs": 1,
    "critic_epochs": 1,
    "learning_starts": 16,
    "batch_size": 8,
    "buffer_size": 1000,
    "eval_episodes": 0,
    "num_threads": 1,
}


def commands() -> dict[str, Path]:
    """The commands in the pages' code blocks, each once, and a page that has it."""
    found = {}
    for page in PAGES:
        if page.name == "your_environment.md":  # tests/test_your_environment.py
            continue
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.replace(".venv/bin/", ""), comments=True)
                if words and not " ".join(words).removeprefix("python ").startswith(ELSEWHERE):
                    found.setdefault(shlex.join(words), page)
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the records to work in, with a run of HAPPO of 64 steps in RUN_DIR."""
    directory = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "benchmark", directory / "benchmark")
    shutil.copytree(ROOT / "benchmark" / "results" / "figure3", directory / "my_results")
    happo = importlib.import_module("happo_mamujoco")
    names = {field.name for field in fields(happo.Args)}
    small = {key: value for key, value in SMALL.items() if key in names}
    happo.main(happo.Args(**small, env_id="Hopper-3x1", run_dir=str(directory / "RUN_DIR")))
    return directory


def run_script(
    program: str, flags: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a script with the flags of a command, in the sizes of SMALL where it does not give them."""
    script = importlib.import_module(program.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [program, *flags])
    args, checkpoint = script.parse_args()
    given = {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    given -= {"buffer_size"}
    small = {key: value for key, value in SMALL.items() if hasattr(args, key) and key not in given}
    if checkpoint:
        small = {"total_timesteps": 2 * checkpoint["step"]}
    run_dir = args.resume or str(directory / "".join([program, *flags]))
    args = replace(args, **small, run_dir=run_dir)
    script.main(args, checkpoint)
    assert (Path(args.run_dir) / "model.pt").is_file()


@pytest.mark.parametrize("command", commands())
def test_commands_run(
    command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Scripts train for a moment; the runner prints its jobs; every row of a table is in the page."""
    page = commands()[command].read_text()
    _, program, *flags = shlex.split(command)
    monkeypatch.chdir(workplace)
    if program.endswith("_mamujoco.py"):
        run_script(program, flags, workplace, monkeypatch)
    elif program == "evaluate.py":
        args = tyro.cli(evaluate.Args, args=flags)
        evaluate.main(replace(args, video=""))  # test_evaluate.py films
        score = f"Hopper-3x1, {args.episodes} episodes, seed 0: return mean"
        assert score in capsys.readouterr().out
    elif program == "benchmark/run.py":
        with pytest.raises(SystemExit) as end:
            runner.main(
                replace(tyro.cli(runner.Args, args=flags), runs=workplace / "runs", dry_run=True)
            )
        assert not end.value.code and f"/runs/{Path(flags[0]).stem}/" in capsys.readouterr().out
    else:
        assert program == "benchmark/plot.py"
        monkeypatch.setattr(sys, "argv", [program, *flags])
        with pytest.raises(SystemExit) as end:
            plot.main()
        assert not end.value.code
        lines = capsys.readouterr().out.splitlines()
        if flags[0] in ("table", "aggregate", "noise"):
            rows = [line for line in lines if line.startswith("| ")]
            assert len(rows) > 1 and all(row in page for row in rows)
        elif flags[0] == "seconds":
            assert lines and all(line.split(": ")[1].removeprefix("-") in page for line in lines)


def test_readme_has_the_recorded_returns():
    """Every cell of the table of results: mean of the seeds' last evaluations (lowest to highest)."""
    section = (ROOT / "README.md").read_text().split("## Results")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    header, *rows = [[cell.strip() for cell in row.split("|")] for row in rows if "---" not in row]
    records = plot.load(ROOT / "benchmark" / "results" / "figure3")
    assert [row[0] for row in rows] == plot.TASKS
    for task, *cells in rows:
        for name, cell in zip(header[1:], cells, strict=True):
            scores = plot.final_returns(records[task, name.lower()])
            assert cell == f"{np.mean(scores):.0f} ({min(scores):.0f} to {max(scores):.0f})"


FIGURE3 = "HATRPO over HAPPO", "HAPPO over MAPPO", "HAPPO over IPPO"
FIGURE4 = tuple(
    f"{name}-{variant} over {name}"
    for variant in ("SHARED", "FIXED")
    for name in ("HATRPO", "HAPPO")
)


@pytest.mark.parametrize(
    ("page", "records", "algorithms", "pairs"),
    [
        ("README.md", "figure3", ("hatrpo", "happo", "mappo", "ippo"), FIGURE3),
        ("docs/zh.md", "figure3", ("hatrpo", "happo", "mappo", "ippo"), FIGURE3),
        ("docs/zh.md", "figure4", (), FIGURE4),
    ],
    ids=["README-figure3", "zh-figure3", "zh-figure4"],
)
def test_the_findings_are_what_the_records_say(
    page: str,
    records: str,
    algorithms: tuple[str, ...],
    pairs: tuple[str, ...],
    capsys: pytest.CaptureFixture,
):
    """The pages have the probabilities that one algorithm is above another, with their intervals."""
    plot.aggregate(ROOT / "benchmark" / "results" / records, algorithms)
    rows = capsys.readouterr().out.splitlines()
    for pair in pairs:
        (row,) = [row for row in rows if row.startswith(f"| {pair} |")]
        probability, low, high = re.findall(r"[01]\.\d\d", row)
        words = (ROOT / page).read_text()
        assert re.search(rf"{probability}.{{1,15}}{low}.{{1,4}}{high}\D", words, re.DOTALL)


def diff(first: str, second: str) -> list[str]:
    """The changed lines of two scripts, each with < or > in front, as the program diff prints them."""
    scripts = [(ROOT / name).read_text().splitlines() for name in (first, second)]
    signs = {"-": "<", "+": ">"}
    return [signs[line[0]] + line[1:] for line in difflib.ndiff(*scripts) if line[0] in signs]


def test_readme_shows_the_diff():
    """Every passage of the README's excerpt has lines that follow each other in the diff."""
    excerpt = (ROOT / "README.md").read_text().split("```diff\n")[1].split("```")[0]
    changed = diff("mappo_mamujoco.py", "happo_mamujoco.py")
    passages = re.split(r"^(?:---|\.\.\.)\n", excerpt, flags=re.MULTILINE)
    assert len(passages) > 2
    for passage in passages:
        in_order = "\n".join(line for line in changed if line[0] == passage[0])
        assert passage in in_order + "\n"


def test_diffs_have_as_many_lines_as_the_pages_say():
    """The numbers of changed lines, on every page that has one."""
    found = set()
    for page in PAGES:
        pattern = r"`diff (\S+) (\S+)`\D{1,5}(\d+)"
        for first, second, number in re.findall(pattern, page.read_text()):
            assert len(diff(first, second)) == int(number), (page.name, first, second)
            found.add((first, second))
    assert len(found) == 3


def known_flags() -> set[str]:
    """All flags of the scripts, and of the programs that play, run and measure them."""
    scripts = [importlib.import_module(f"{name}_mamujoco") for name in SIBLINGS]
    flags = set()
    for program in (*scripts, evaluate, runner, throughput):
        for field in fields(program.Args):
            flag = field.name.replace("_", "-")
            flags |= {f"--{flag}", f"--no-{flag}"}
    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path):
    """Flags, metrics, tests and functions are in the code; commands of another commit are ```text."""
    words = re.sub(r"```text\n.*?```", "", page.read_text(), flags=re.DOTALL)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", words))
    assert flags <= known_flags() | {"--help", "--logdir", "--target"}  # TensorBoard's, plot.py's

    source = "\n".join(path.read_text() for path in ROOT.glob("*_mamujoco.py"))
    metrics = set(re.findall(r"`((?:charts|losses|eval)/\w+)`", words))
    assert all(f'"{metric}"' in source for metric in metrics)
    of_an_agent = set(re.findall(r"`agent_0/(\w+)`", words))
    assert of_an_agent <= set().union(*(sibling.tags for sibling in SIBLINGS.values()))

    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("envs/*.py")):
        source += path.read_text()
    names = re.findall(r"`(test_\w+|[a-z]+_[a-z_]+|[A-Z]\w+\.[a-z_]+)`", words)
    assert all(re.search(rf"\b{name.split('.')[-1]}\b", source) for name in names)


def anchors(page: Path) -> set[str]:
    """The names under which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    """Every relative link is a file of the project, and its anchor a heading there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_page_has_the_defaults():
    """docs/README.md has the default of every flag of every algorithm; "-" where a script lacks the flag."""
    page = (ROOT / "docs" / "README.md").read_text()
    names = ["hatrpo", "happo", "mappo", "ippo", "maddpg"]
    defaults = [vars(importlib.import_module(f"{name}_mamujoco").Args()) for name in names]
    flags = [flag for of_script in defaults for flag in of_script]
    algorithm = flags[flags.index("num_envs") :]  # the fields after "# Algorithm"
    first = list(defaults[0])[: list(defaults[0]).index("num_envs")]
    for flag in {*algorithm} - {*first}:
        values = [of_script.get(flag, "-") for of_script in defaults]
        words = [" ".join(map(str, v)) if isinstance(v, tuple) else f"{v}" for v in values]
        if set(words) <= {"False", "-"}:
            continue  # a switch, and it is off
        row = f"| `--{flag.replace('_', '-')}` | {' | '.join(words)} |"
        assert row in page, row
