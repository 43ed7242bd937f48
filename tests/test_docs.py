"""README.md and docs/: their commands run, what they print is what the pages say, and no link leads nowhere."""

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

import evaluate

pytestmark = pytest.mark.slow  # whole runs and processes

ROOT = runner.ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Not run here: what .ci/run does, a server, and what other tests or half an hour are for.
ELSEWHERE = ("python3 -m venv", "tensorboard", "git worktree", "benchmark/throughput.py", "benchmark/plot.py record")
# A run's size, where a command says nothing of it.
SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 64, "hidden_sizes": (8, 8)}
SMALL |= {"update_epochs": 1, "critic_epochs": 1, "learning_starts": 16, "batch_size": 8, "buffer_size": 1000}
SMALL |= {"eval_episodes": 0, "num_threads": 1}


def commands() -> dict[str, Path]:
    """The commands in the pages' code blocks, each once, and a page that has it."""
    found = {}
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.replace(".venv/bin/", ""), comments=True)
                if words and not " ".join(words).removeprefix("python ").startswith(ELSEWHERE):
                    found.setdefault(shlex.join(words), page)
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like the project's, to write to: with the records, and a run of HAPPO of 64 steps in RUN_DIR."""
    directory = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "benchmark", directory / "benchmark")
    shutil.copytree(ROOT / "benchmark" / "results" / "figure3", directory / "my_results")
    happo = importlib.import_module("happo_mamujoco")
    small = {key: value for key, value in SMALL.items() if key in {field.name for field in fields(happo.Args)}}
    happo.main(happo.Args(**small, env_id="Hopper-3x1", run_dir=str(directory / "RUN_DIR")))
    return directory


def run_script(program: str, flags: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script with the flags of a command, small where the command says nothing."""
    script = importlib.import_module(program.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [program, *flags])
    args, checkpoint = script.parse_args()
    said = {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    small = {key: value for key, value in SMALL.items() if hasattr(args, key) and key not in said - {"buffer_size"}}
    if checkpoint:
        small = {"total_timesteps": 2 * checkpoint["step"]}
    args = replace(args, **small, run_dir=args.resume or str(directory / "".join([program, *flags])))
    script.main(args, checkpoint)
    assert (Path(args.run_dir) / "model.pt").is_file()


@pytest.mark.parametrize("command", commands())
def test_commands_run(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Scripts train for a moment, the runner says what it would run, tables have the rows that are in the page."""
    page, (_, program, *flags) = commands()[command].read_text(), shlex.split(command)
    monkeypatch.chdir(workplace)
    if program.endswith("_mamujoco.py"):
        run_script(program, flags, workplace, monkeypatch)
    elif program == "evaluate.py":
        args = tyro.cli(evaluate.Args, args=flags)
        evaluate.main(replace(args, video=None))  # test_evaluate.py films
        assert f"Hopper-3x1, {args.episodes} episodes, seed 0: return mean" in capsys.readouterr().out
    elif program == "benchmark/run.py":
        with pytest.raises(SystemExit) as end:
            runner.main(replace(tyro.cli(runner.Args, args=flags), runs=workplace / "runs", dry_run=True))
        assert not end.value.code and f"/runs/{Path(flags[0]).stem}/" in capsys.readouterr().out
    else:
        assert program == "benchmark/plot.py"
        monkeypatch.setattr(sys, "argv", [program, *flags])
        with pytest.raises(SystemExit) as end:
            plot.main()
        assert not end.value.code
        lines = capsys.readouterr().out.splitlines()
        if flags[0] in ("table", "aggregate"):
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
FIGURE4 = tuple(f"{name}-{variant} over {name}" for variant in ("SHARED", "FIXED") for name in ("HATRPO", "HAPPO"))


@pytest.mark.parametrize("page", ["README.md", "docs/zh.md"])
@pytest.mark.parametrize(
    ("records", "algorithms", "pairs"),
    [("figure3", ("hatrpo", "happo", "mappo", "ippo"), FIGURE3), ("figure4", (), FIGURE4)],
    ids=["figure3", "figure4"],
)
def test_the_findings_are_what_the_records_say(
    page: str, records: str, algorithms: tuple[str, ...], pairs: tuple[str, ...], capsys: pytest.CaptureFixture
):
    """Both pages have the probabilities that one algorithm is above another, with their intervals."""
    plot.aggregate(ROOT / "benchmark" / "results" / records, algorithms)
    rows = capsys.readouterr().out.splitlines()
    for pair in pairs:
        (row,) = [row for row in rows if row.startswith(f"| {pair} |")]
        probability, low, high = re.findall(r"[01]\.\d\d", row)
        words = (ROOT / page).read_text()
        assert re.search(rf"{probability}.{{1,15}}{low}.{{1,4}}{high}\D", words, re.DOTALL)


def test_readme_shows_the_diff():
    """Every line of the README's excerpt is one of the diff's."""
    scripts = [(ROOT / f"{name}_mamujoco.py").read_text().splitlines() for name in ("mappo", "happo")]
    diff = [line for line in difflib.ndiff(*scripts) if line[0] in "-+"]
    excerpt = (ROOT / "README.md").read_text().split("```diff\n")[1].split("```")[0].splitlines()
    changed = [line.translate(str.maketrans("<>", "-+", "")) for line in excerpt if line[0] in "<>"]
    assert len(changed) > 5 and set(changed) <= set(diff)


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
