"""LaCo on SmolLM2-135M: python -m studies.smollm2.laco

Blocks are pruned at once, by sensitivity, to 24 and to 19 of 30. They are dropped, as train.py
does, or folded into the block before them (LaCo, 2402.11187): it adds to its matrices what theirs
differ by. Prints the perplexities of studies.smollm2.table, computed in float32.
"""

import sys
from dataclasses import replace

import torch

import prune
from run.read_config import load_config
from studies.smollm2.table import CONFIG, ROOT, held_out_text, run_cell
from tools import command
from tools.evaluate import judge_text

drop_blocks = prune.drop_blocks  # main puts another in its place


@torch.no_grad()
def fold_blocks(model, optimizers: prune.Optimizers, group, keep) -> dict[str, str]:
    blocks = model.get_submodule(group.name)
    removed = (~keep).nonzero().squeeze(1).tolist()
    old = [[p.clone() for p in block.parameters()] for block in blocks]
    for unit in removed:
        before = max((i for i in range(unit) if i not in removed), default=None)
        if before is not None:
            for p, theirs, its in zip(blocks[before].parameters(), old[unit], old[before]):
                if p.dim() == 2:  # the matrices; norms stay
                    p += theirs - its
    return drop_blocks(model, optimizers, group, keep)


@command
def main(argv: list[str] | None = None) -> int:
    text, length = held_out_text(), load_config(str(CONFIG)).context_length

    def judge(trained) -> float:
        trained.model.initial_config = replace(trained.model.initial_config, context_length=length)
        return judge_text(trained, text)["perplexity per token"]

    for n_layer in (24, 19):
        for way in (drop_blocks, fold_blocks):
            prune.drop_blocks = way
            cell = ("oneshot", {"n_layer": n_layer}, "sensitivity")
            result = run_cell(cell, CONFIG, ROOT / "out" / "smollm2" / "laco", judge)
            print(f"{n_layer} layers, {way.__name__}: perplexity {result['pruned']:.1f}, recovered "
                  f"{result['recovered']:.1f}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
