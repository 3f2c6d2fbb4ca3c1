"""One kind after another: python -m studies.units.turns KIND,KIND,... CONFIG [...]

As train.py, but each kind of unit is pruned in a part of the window of its own. The parts are
equally long, and in the order given.
"""

import sys
from dataclasses import replace

import schedule
import train
from run import UserError
from run.read_config import load_config
from schedule import Schedule, make_schedule
from tools import command


class InTurn(Schedule):
    order: list[str] = []

    def width(self, step: int, kind: str) -> int:
        first, last = self.window
        turn, turns = self.order.index(kind), len(self.order)
        begin, end = (first + (last - first) * i // turns for i in (turn, turn + 1))
        return Schedule.width(replace(self, window=(begin, end)), step, kind)

    def prune_steps(self) -> list[int]:
        return [step for step in range(2, self.max_steps + 1) if self.new_widths(step)]


@command
def main(argv: list[str] | None = None) -> int:
    order, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    kinds = make_schedule(load_config(rest[0], rest[1:])).widths if rest else {}
    if not rest or set(order.split(",")) != set(kinds):
        raise UserError("usage: studies.units.turns KIND,KIND,... CONFIG [...], all its kinds")
    InTurn.order = order.split(",")
    schedule.Schedule = InTurn
    return train.main(rest)


if __name__ == "__main__":
    sys.exit(main())
