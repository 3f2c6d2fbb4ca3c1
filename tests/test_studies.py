"""The studies: their scripts import, their arms are configs, what their pages name is there."""

import importlib
import re

from helpers import ROOT

from run.read_config import load_config
from tools.compare import read_arms

FILES = sorted((ROOT / "studies").rglob("*.py"))
ARMS = [path for path in FILES if re.search("^arms = ", path.read_text(), re.M)]


def test_every_script_imports():
    for path in [path for path in FILES if path not in ARMS]:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_every_arm_is_a_config_that_train_takes():
    arms = [arm for path in ARMS for arm in read_arms(str(path)).values()]
    assert len(arms) > 60 and all(load_config(*arm) for arm in arms)


def test_links_and_the_files_of_commands_are_there():
    for page in (ROOT / "studies").rglob("README.md"):
        text = page.read_text(encoding="utf-8")
        paths = [page.parent / path for path in re.findall(r"\]\((?!http|#)([^)#]+)", text)]
        files = re.findall(r"(?<!:)(?:configs|studies)/[\w/.]+\.py", text)  # not of COMMIT:PATH
        paths += [ROOT / path for path in files]
        assert all(path.exists() for path in paths), (page, paths)
