"""docs/one_file.py on the command line."""

from dataclasses import fields

import pytest

from docs import one_file

WRONG = (
    "--criterio=no",
    "--criterion=no",
    "--max_steps=ten",
    "--max_steps",
    "--d_ff_target=300",
    "--round_to=0",
    "--prune_end=0.0",
    "max_steps=10",
)


@pytest.mark.parametrize("knob", WRONG)
def test_a_knob_that_makes_no_run_is_refused(knob, refused):
    refused(f"error: {knob}: ", knob, main=one_file.main)


def test_help_lists_every_knob_with_its_default(capsys):
    assert one_file.main(["--help"]) == 0
    text = capsys.readouterr().out
    for field in fields(one_file.Config):
        assert f" {field.name}: {field.type.__name__} = " in text
