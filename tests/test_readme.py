"""What the README says about the project holds for the files as they are."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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


def test_every_config_is_listed_and_every_named_file_is_there():
    for config in (ROOT / "configs").glob("*.py"):
        assert f"`{config.stem}`" in README, config
    for path in re.findall(r"`((?:configs/|data/|results/)?\w+\.(?:py|md))`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((results/[^)]+)\)", README):
        assert (ROOT / path).stat().st_size < 300_000
