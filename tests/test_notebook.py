"""docs/by_hand.ipynb as it is committed. After a change, write its outputs by

jupyter nbconvert --to notebook --execute --inplace --ClearMetadataPreprocessor.enabled=True \
    --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec docs/by_hand.ipynb
"""

import json
import re
from pathlib import Path

import pytest
from helpers import ROOT

TEXT = (ROOT / "docs/by_hand.ipynb").read_text(encoding="utf-8")
CELLS = [cell for cell in json.loads(TEXT)["cells"] if cell["cell_type"] == "code"]


def test_its_cells_run():
    pytest.importorskip("matplotlib").use("Agg")
    Path("train.py").touch()  # a cell looks for the project's folder by it
    names = {"__name__": "by_hand"}
    for cell in CELLS:
        code = "".join(cell["source"]).replace("%matplotlib inline", "")
        exec(code.replace('"--shorter=16"', '"--shorter=160", "--batch_size=2"'), names)
    for moments, is_same in (("sliced", True), ("fresh", False)):  # what it says of Muon
        for u, v in zip(names["updates"][moments], names["unpruned"]):
            assert ((u * v).sum() / (u.norm() * v.norm()) > 0.99) == is_same


def test_it_has_its_outputs_and_nothing_of_the_machine_that_made_them():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    shows = [cell for cell in CELLS if re.search(r"print\(|show\(", "".join(cell["source"]))]
    assert len(shows) > 10 and all(cell["outputs"] for cell in shows)
    assert not re.search('"output_type": "error"|"name": "stderr"', TEXT)
    assert not re.search(r"/(tmp|home|root|usr|Users)/| at 0x|iopub", TEXT)  # paths, times
