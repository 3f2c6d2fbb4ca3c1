"""What the README says about the project holds for the files as they are."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# The shipped configs, by the README's table: configs/ may also hold a reader's own.
CONFIGS = re.findall(r"^\| `([\w.]+)` \|", README.partition("\n## Configs\n")[2], re.M)


def test_the_two_commands_are_the_ones_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    for block in blocks[:2]:
        install, run = block.strip().split(" && ")
        assert install in ci and run in ci, block


def test_every_line_that_the_tour_quotes_stands_in_its_file():
    quotes = re.findall(r"^\| [^|`]+ \| `(.+)` \| `(\w+\.py)` \|$", README, re.M)
    assert len(quotes) >= 6
    for line, file in quotes:
        assert line in (ROOT / file).read_text(), (file, line)


def test_every_named_file_is_there():
    assert len(CONFIGS) >= 12
    for config in CONFIGS:
        assert (ROOT / "configs" / f"{config}.py").exists(), config
    for path in re.findall(r"`((?:configs/|data/|results/|run/)?\w+\.(?:py|md))`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((results/[^)]+)\)", README):
        assert (ROOT / path).stat().st_size < 300_000


def test_what_a_reader_adds_breaks_no_test(tmp_path):
    """Configs of their own, also as arms, and results, all of them too odd for our tests."""
    copy = tmp_path / "project"
    for folder in ("configs", "experiments", "results", "run", "tests", "tools", ".ci"):
        shutil.copytree(ROOT / folder, copy / folder)
    for file in (*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "pyproject.toml"):
        shutil.copy(file, copy)
    (copy / "data").symlink_to(ROOT / "data")
    for folder in ("configs", "configs/compare", "configs/ablations", "configs/compare_gpu"):
        (copy / folder / "mine.py").write_text("n_layer = 3\n")
    (copy / "results" / "mine").mkdir()
    (copy / "results" / "mine" / "runs.csv").write_text("arm\nmine\n")
    tests = [f"tests/test_{name}.py" for name in ("readme", "config", "compare")]
    chosen = "every_named or every_config or every_laboratory or committed"
    command = [sys.executable, "-m", "pytest", "-q", *tests, "-k", chosen]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
