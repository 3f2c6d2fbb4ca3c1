"""Draw runs from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] [--to FILE]

Draws the loss, the widths and the learning rate over training tokens, with a colour for
each run. The picture is OUT_DIR/run.png, units.png or run.gif of the first OUT_DIR,
unless --to names another file. With --animate, a --to that is no .gif shows the end.
"""

import math
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from configs import compact, load_config, make_schedule
from data.command import UserError, command
from tools import expanded, read_log, run_name

LINES = ("-", "--", "-.", ":")  # one style per run, so that curves that coincide show
BLUE = "#2f6fb7"
RED = "#e5484d"
GREY = "#8b949e"
NAMES = {
    "d_ff": "neurons",
    "n_kv_head": "heads",
    "d_model": "channels",
    "n_layer": "layers",
}
CAPTIONS = {
    "enlarged": "A wide model trains",
    "prune": "Weak parts go",
    "recover": "It recovers",
}
# The states of a unit in a film, and their colours: light grey, BLUE and RED
REMOVED = 0
PRESENT = 1
GOING = 2
COLORS = np.array(
    [
        [230, 230, 230],
        [47, 111, 183],
        [229, 72, 77],
    ]
)


@dataclass
class Log:
    run: str  # its name in a picture
    steps: list[dict]  # its events, in order
    evals: list[dict]
    prunes: list[dict]

    def before(self, step: int) -> "Log":
        """The log without what happened at this step and after it."""
        return Log(
            self.run,
            events_before(self.steps, step),
            events_before(self.evals, step),
            events_before(self.prunes, step),
        )

    def kinds(self) -> list[str]:
        """The kinds of units that were pruned, in the order of their first prunes."""
        return list(dict.fromkeys(along(self.prunes, "kind")))

    def of_kind(self, kind: str) -> "Log":
        """The log with the prunes of one kind alone."""
        prunes = [prune for prune in self.prunes if prune["kind"] == kind]
        return replace(self, prunes=prunes)


def load_log(out_dir: Path, pruned: bool = False) -> Log:
    """The log of a run. Raises UserError if it lacks a step, an eval or, with `pruned`,
    a prune."""
    events = read_log(out_dir)
    needed = ["step", "eval"]
    if pruned:
        needed.append("prune")
    found = {"step": [], "eval": [], "prune": []}
    for event in events:
        if event["event"] in found:
            found[event["event"]].append(event)
    for name in needed:
        if not found[name]:
            raise UserError(f"{out_dir}: its log has no {name} yet; nothing to draw")
    return Log(
        run=run_name(out_dir),
        steps=found["step"],
        evals=found["eval"],
        prunes=found["prune"],
    )


def events_before(events: list[dict], step: int) -> list[dict]:
    """The events of earlier steps."""
    return [event for event in events if event["step"] < step]


def along(events: list[dict], key: str = "tokens") -> list:
    """The values of one field of events."""
    return [event[key] for event in events]


def rises(prunes: list[dict]) -> list[float]:
    """What each prune added to the loss, in nats per token."""
    return [prune["loss_after"] - prune["loss_before"] for prune in prunes]


def describe_costliest(logs: list[Log]) -> str | None:
    """Which prune of these runs raised the loss most. None if there are no prunes."""
    highest = -math.inf
    description = None
    for log in logs:
        for prune, rise in zip(log.prunes, rises(log.prunes)):
            if rise > highest:
                highest = rise
                name = NAMES.get(prune["kind"], prune["kind"])
                cut = f"{prune['width_before']} → {prune['width_after']} {name}"
                description = f"{log.run}: pruning {cut} cost most, {rise:.3f} nats"
    return description


def widths_after(log: Log, prunes: list[dict]) -> dict[str, int]:
    """Kind -> its width after these prunes, the first ones of a log."""
    widths = dict(log.steps[0])
    for prune in reversed(log.prunes):  # the first prune of a kind comes last, and wins
        widths[prune["kind"]] = prune["width_before"]
    for prune in prunes:
        widths[prune["kind"]] = prune["width_after"]
    return widths


def open_figure(rows: int, columns: int, **settings):
    """A figure and its axes, (rows, columns). Their x counts tokens or FLOPs."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 9})
    settings |= {"squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, **settings)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, lw=0.5)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1M, 2M
    return figure, axes


# Curves of one or more runs


def draw(out_dirs: list[Path], x: str = "tokens"):
    """A figure with the curves of runs. Raises UserError.

    x: what they are drawn over, "tokens" or "flops".
    """
    logs = [load_log(out_dir) for out_dir in out_dirs]
    several = len(logs) > 1
    all_kinds = []
    for log in logs:
        all_kinds += [kind for kind in log.kinds() if kind not in all_kinds]
    names = ["loss, nats per token"]
    if several and x == "tokens":  # runs seldom validate after equal FLOPs
        names.append("minus the first run")
    names += [*all_kinds, "learning rate"]
    heights = [3] + [1.2] * (len(names) - 1)
    figure, axes = open_figure(
        len(names),
        1,
        sharex=True,
        figsize=(8.3, 1.1 * sum(heights)),
        height_ratios=heights,
    )
    panels = dict(zip(names, axes[:, 0]))
    loss_panel = panels["loss, nats per token"]
    rate_panel = panels["learning rate"]
    for i, log in enumerate(logs):
        style = {"color": f"C{i}", "ls": LINES[i % 4]}
        bar_color = style["color"] if several else RED
        cost = describe_cost(log)
        draw_losses(loss_panel, log, x, bar_color, cost, **style)
        if i > 0 and "minus the first run" in panels:
            draw_difference(panels["minus the first run"], log, logs[0], **style)
        for kind in all_kinds:
            draw_widths(panels[kind], log, kind, x, **style)
        draw_rate(rate_panel, log, out_dirs[i], x, **style)
    for name, panel in panels.items():
        panel.set_ylabel(NAMES.get(name, name))
        panel.axhline(0, color="0.8", lw=1, zorder=0)
    loss_panel.set_ylim(loss_limits(logs))
    explained = {  # in the legend, by the width of a line
        1: "training (dots: validation)",
        5: "before and after a prune (small sample)",
    }
    for line_width, label in explained.items():
        loss_panel.plot([], [], color="0.7", lw=line_width, label=label)
    loss_panel.set_title(describe_costliest(logs))
    loss_panel.legend(loc="upper right", edgecolor="none")
    rate_panel.set_xlabel("training FLOPs" if x == "flops" else "training tokens")
    return figure


def describe_cost(log: Log) -> str:
    """What all prunes of a run cost together, to follow its loss in the legend."""
    if not log.prunes:
        return ""
    cost = round(sum(rises(log.prunes)), 2) + 0.0  # 0.0 makes 0.00 of -0.00
    return f", prunes cost {cost:.2f}"


def draw_losses(
    panel, log: Log, x: str, bar_color: str, more: str = "", **style
) -> None:
    """Draw the losses of a run. A legend can show its last validation.

    bar_color: of a bar from the loss before a prune to the loss after it. more: ends
    the label.
    """
    label = ""
    if log.evals:
        last_loss = log.evals[-1]["val_loss"]
        label = f"{log.run} at {last_loss:.3f}{more}"
    panel.plot(
        along(log.steps, x),
        along(log.steps, "loss"),
        lw=1,
        color=style["color"],
        alpha=0.4,
    )
    panel.plot(
        along(log.evals, x),
        along(log.evals, "val_loss"),
        marker="o",
        ms=3.5,
        label=label,
        **style,
    )
    panel.vlines(
        along(log.prunes, x),
        along(log.prunes, "loss_before"),
        along(log.prunes, "loss_after"),
        color=bar_color,
        lw=3,
        zorder=3,
    )


def loss_limits(logs: list[Log]) -> tuple[float, float]:
    """The range of losses to draw: all prunes, and all validations after the first
    tenth of a run."""
    losses = []
    for log in logs:
        losses += along(log.prunes, "loss_before")
        losses += along(log.prunes, "loss_after")
        first_tenth = log.steps[-1]["tokens"] / 10
        late = [event for event in log.evals if event["tokens"] > first_tenth]
        losses += along(late, "val_loss")
    return min(losses) - 0.1, max(losses) + 0.1


def draw_difference(panel, log: Log, first: Log, **style) -> None:
    """Draw the validation loss minus the first run's, where both were validated.

    There is nothing between validations: a curve bends more there than runs differ.
    """
    known = {event["tokens"]: event["val_loss"] for event in first.evals}
    tokens = []
    differences = []
    for event in log.evals:
        if event["tokens"] in known:
            tokens.append(event["tokens"])
            differences.append(event["val_loss"] - known[event["tokens"]])
    panel.plot(tokens, differences, marker="o", ms=3.5, **style)


def draw_widths(panel, log: Log, kind: str, x: str, **style) -> None:
    """Draw how the width of one kind falls."""
    prunes = log.of_kind(kind).prunes
    enlarged = widths_after(log, [])
    last_step = log.steps[-1]
    places = [0]
    widths = [enlarged[kind]]
    for event in prunes:
        places.append(event[x])
        widths.append(event["width_after"])
    places.append(last_step[x])
    widths.append(last_step[kind])
    panel.step(places, widths, where="post", **style)


def draw_rate(panel, log: Log, out_dir: Path, x: str, **style) -> None:
    """Draw the learning rate. Before the first step in the log, the schedule gives it,
    because the warm-up may be over by then."""
    config, _ = load_config(str(out_dir))
    schedule = make_schedule(config)
    first = log.steps[0]
    places = []
    rates = []
    for step in range(1, first["step"]):
        places.append(step * first[x] / first["step"])
        rates.append(schedule.learning_rate(step))
    places += along(log.steps, x)
    rates += along(log.steps, "lr")
    panel.plot(places, rates, **style)


# What prunes cost, and the scores that chose


def draw_units(out_dir: Path):
    """A figure: for each kind, what its prunes cost, and scores. Raises UserError."""
    log = load_log(out_dir, pruned=True)
    kinds = log.kinds()
    size = (11, 3.5 * len(kinds))
    figure, axes = open_figure(len(kinds), 2, figsize=size)
    for kind, (cost_panel, score_panel) in zip(kinds, axes):
        draw_costs(cost_panel, log.of_kind(kind), kind)
        draw_scores(score_panel, log.of_kind(kind), kind)
    return figure


def draw_costs(panel, log: Log, kind: str) -> None:
    """Draw a bar for each prune: the rise of the loss."""
    places = range(len(log.prunes))
    bars = panel.bar(places, rises(log.prunes), 0.5, color=RED)
    panel.bar_label(bars, fmt="%.3f", padding=2)
    panel.set_xticks(places, along(log.prunes, "width_after"))
    panel.set_xlabel(f"{NAMES.get(kind, kind)} left after each prune")
    panel.set_ylabel("rise of the loss, nats per token")
    panel.set_title(describe_costliest([log]))


def draw_scores(panel, log: Log, kind: str) -> None:
    """Draw the sorted scores at the first and at the last prune, a line per layer."""
    name = NAMES.get(kind, kind)
    shown = [("last", log.prunes[-1], BLUE)]
    if len(log.prunes) > 1:
        shown.insert(0, ("first", log.prunes[0], GREY))
    for when, prune, color in shown:
        layers = prune["scores"]
        for scores in layers:  # quantiles at 0, 5, ... 100%
            percents = np.linspace(0, 100, len(scores))
            panel.plot(percents, scores, color=color)
        if len(layers) > 1:
            beside = {"ha": "right", "va": "center", "color": color}
            panel.text(-1, layers[0][0], "layer 1", **beside)
            panel.text(-1, layers[-1][0], f"layer {len(layers)}", **beside)
        removed = 100 * (1 - prune["width_after"] / prune["width_before"])
        label = f"{when} prune: the {name} left of this line go"
        panel.axvline(removed, color=color, ls="--", label=label)
    panel.legend(frameon=False)
    panel.set(xlim=(-12, 104), yscale="log", ylabel="score")
    panel.set_xlabel(f"% of the {name}, weakest first")


# A film of one run


def draw_moment(panels, log: Log, step: int, other: Log | None = None) -> None:
    """Draw a run just before a step, and in red what this step removes.

    panels: for the caption, for each kind of unit, and for the loss. other: a run whose
    validations are drawn, too.
    """
    past = log.before(step)
    caption_panel, *unit_panels, loss_panel = panels
    numbers = loss_panel.xaxis.get_major_formatter()  # clear() forgets it
    for panel in panels:
        panel.clear()
        panel.set_axis_off()
    events = past.prunes + past.steps  # a prune comes before its step
    events.sort(key=lambda event: event["step"])
    last = events[-1] if events else log.steps[0]
    caption = CAPTIONS[phase_before(log, step)]
    caption_panel.set_title(caption, loc="left", size=12, weight="bold")
    size = f"{compact(last['params'])} parameters"
    caption_panel.set_title(size, loc="right")
    for panel, kind in zip(unit_panels, log.kinds()):
        draw_unit_states(panel, log, kind, step)

    loss_panel.set_axis_on()
    draw_losses(loss_panel, past, "tokens", RED, color=BLUE)
    if other:
        theirs = replace(other.before(step), steps=[], prunes=[])
        draw_losses(loss_panel, theirs, "tokens", GREY, color=GREY, ls="--")
    if past.evals:
        plain = {"frameon": False, "borderpad": 0}
        loss_panel.legend(loc="upper right", labelcolor="linecolor", **plain)
    loss_panel.set_xlim(0, 1.01 * log.steps[-1]["tokens"])
    loss_panel.set_ylim(loss_limits([log]))
    loss_panel.xaxis.set_major_formatter(numbers)
    loss_panel.set_title(f"loss at {compact(last['tokens'])} tokens", loc="left")


def phase_before(log: Log, step: int) -> str:
    """The phase of a run just before a step, by its prunes."""
    steps = along(log.prunes, "step")
    if step > steps[-1]:
        return log.steps[-1]["phase"]  # no recovery, if the run was stopped too early
    if step >= steps[0]:
        return "prune"
    return "enlarged"


def draw_unit_states(panel, log: Log, kind: str, step: int) -> None:
    """Draw each unit of a kind as a cell, in a row for each layer."""
    enlarged = widths_after(log, [])
    now = widths_after(log, log.before(step).prunes)
    prunes = log.of_kind(kind).prunes
    per_layer = any(len(prune["removed"]) > 1 for prune in prunes)
    rows = enlarged["n_layer"] if per_layer else 1
    states = np.full((rows, enlarged[kind]), REMOVED)
    states[: now["n_layer"], : now[kind]] = PRESENT
    for prune in prunes:
        if prune["step"] == step:
            for layer, removed in enumerate(prune["removed"]):
                states[layer, removed] = GOING
    panel.imshow(COLORS[states], aspect="auto", interpolation="nearest")
    between_rows = np.arange(0.5, rows - 1)
    panel.hlines(between_rows, *panel.get_xlim(), color="w", lw=2 / rows)
    name = NAMES.get(kind, kind)
    if per_layer:
        name += " per layer"
    panel.set_title(f"{name}: {now[kind]} of {enlarged[kind]}", loc="left")


def draw_film(out_dir: Path, to: Path, other_dir: Path | None = None) -> None:
    """Save a GIF of a run as it trains. Another kind of file shows its end.

    other_dir: a run whose validations are drawn, too. Raises UserError.
    """
    log = load_log(out_dir, pruned=True)
    other = load_log(other_dir) if other_dir else None
    heights = [0.01] + [0.5] * len(log.kinds()) + [1]
    size = (3.6, 0.9 + sum(heights))
    figure, axes = open_figure(len(heights), 1, figsize=size, height_ratios=heights)
    from matplotlib.animation import PillowWriter

    moments = moments_of(log)
    if to.suffix != ".gif":
        moments = moments[-1:]
    film = PillowWriter(fps=6)
    with film.saving(figure, to, dpi=150):
        for step in moments:
            draw_moment(axes[:, 0], log, step, other)
            film.grab_frame()


def moments_of(log: Log) -> list[int]:
    """The step before which each frame of a film shows a run. The last frame stays."""
    steps = along(log.steps, "step")
    every = math.ceil(len(steps) / 30)
    moments = [step + 1 for step in steps[::-every]]
    for step in along(log.prunes, "step"):
        moments += [step, step, step + 1]  # two frames show what goes
    moments.sort()
    return moments + 9 * moments[-1:]


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out_dirs", type=expanded, nargs="+", metavar="OUT_DIR")
    parser.add_argument("--to", type=expanded)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--flops", action="store_true", help="over training FLOPs instead of tokens")
    add("--units", action="store_true", help="what the prunes of the first run cost")
    add("--animate", action="store_true", help="a film of the first run, and a second")
    args = parser.parse_args(argv)
    first, *others = args.out_dirs
    name = "run.png"
    if args.units:
        name = "units.png"
    if args.animate:
        name = "run.gif"
    to = args.to or first
    if to.is_dir():
        to = to / name
    elif not to.suffix:
        to = to.with_suffix(Path(name).suffix)
    # Renamed in the end, so that a link at this place is replaced, not followed
    temporary = to.with_name(f".{to.name}")
    temporary.unlink(missing_ok=True)
    try:
        if args.animate:
            draw_film(first, temporary, others[0] if others else None)
        elif args.units:
            draw_units(first).savefig(temporary, dpi=130)
        else:
            x = "flops" if args.flops else "tokens"
            draw(args.out_dirs, x).savefig(temporary, dpi=130)
        temporary.replace(to)
    except (LookupError, TypeError, ValueError) as error:
        causes = "a log that is damaged or of an older version, or a wrong file name"
        problem = f"cannot be drawn to {to} ({causes}): {error!r}"
        raise UserError(f"{first}: {problem}") from error
    print(to)


if __name__ == "__main__":
    raise SystemExit(main())
