"""Runs as a film, from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] --animate"""

import math
from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np

from run.report import compact
from tools.figures import RED, along, by_name, draw_jumps, open_figure, prunes_by_layer, widths

CAPTIONS = {"enlarged": "Train a large model", "prune": "Prune its weakest parts"}
CAPTIONS["recover"] = "Train the rest"
NAMES = {"d_ff": "neurons", "n_kv_head": "heads", "d_model": "channels", "n_layer": "layers"}
GONE, FADING, CHOSEN, USED = range(4)  # the states of a unit; their colours in the animation
GREY, FADED, BLUE = (0.5, 0.5, 0.5, 0.25), (0.9, 0.3, 0.3, 0.5), "#4c8cd9"


def unit_states(log: dict[str, list[dict]]) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """(tokens, stage of a prune) -> kind -> the states of its units from then on, (groups, width at
    first). Units go where they stand; then the others close up."""
    n_layer, states = widths(log, "n_layer")[1][0], {}
    for e, layers, _ in prunes_by_layer(log):
        shape = 1 if layers == [0] else n_layer, e["width_before"]
        states.setdefault(e["kind"], np.full(shape, USED))
    moments = {(0, 0): states}
    for now, prunes in groupby(prunes_by_layer(log), lambda prune: prune[0]["tokens"]):
        states = {kind: units.copy() for kind, units in states.items()}
        for e, layers, gone in prunes:
            for layer, removed in zip(layers, e["removed"]):
                states[e["kind"]][layer, removed] = CHOSEN
            for units in (u for u in states.values() if len(u) > 1):
                units[gone] = np.minimum(units[gone], CHOSEN)  # a layer goes with its units
        for stage, state in enumerate((CHOSEN, CHOSEN, FADING, GONE)):
            moments[now, stage] = {k: np.where(u == CHOSEN, state, u) for k, u in states.items()}
        states = {kind: -np.sort(-units) for kind, units in moments[now, stage].items()}
        moments[now, stage + 1] = states
    return moments


def lines_of(units: np.ndarray) -> np.ndarray:
    """Where the lines of cells begin and end, (lines + 1,), for units (groups, width): those of a
    group stand in up to 8 lines, of about 64 cells if that divides, and below it is a gap."""
    groups, width = units.shape
    lines = min((n for n in range(1, 9) if width % n == 0), key=lambda n: abs(width / n - 64))
    return np.cumsum([0, *([0.6] + [1] * lines) * groups])


def draw_units(panel, kind: str, units: np.ndarray) -> None:
    """units: states, (groups, width)."""
    from matplotlib.colors import to_rgba_array

    groups, width = units.shape
    ends = lines_of(units)
    lines = (len(ends) - 1) // groups - 1
    cells = to_rgba_array((GREY, FADED, RED, BLUE))[units].reshape(groups, width // lines, lines, 4)
    cells = np.pad(cells.swapaxes(1, 2), ((0, 0), (1, 0), (0, 0), (0, 0)))  # the gap
    size = panel.get_window_extent()
    cell = min(size.width * lines / width, size.height / ends[-1]) * 72 / panel.figure.dpi  # points
    panel.pcolormesh(
        np.arange(width // lines + 1), ends, cells.reshape(len(ends) - 1, -1, 4),
        edgecolors=panel.figure.get_facecolor(), lw=min(0.8, 0.15 * cell),
    )  # fmt: skip
    panel.set_ylim(ends[-1], 0.6)
    where = NAMES.get(kind, kind) + " per layer" * (groups > 1)
    panel.set_title(f"{where}: {(units == USED).sum(1).max()} of {width}", loc="left")


def draw_moment(panels, name: str, log: dict, states: dict[str, np.ndarray], now: int) -> None:
    """Draw what a run is after `now` tokens. panels: a title, each kind of unit, loss and rate."""
    title, *kinds, loss, jumps, rate = panels
    for panel in panels:
        panel.clear()
        panel.axis("off")
    for panel, (kind, units) in zip(kinds, states.items()):
        draw_units(panel, kind, units)
    x, lr = along(log["step"]), along(log["step"], "lr")
    n = max(1, sum(t <= now for t in x))
    pruning = now in along(log["prune"])
    phase = "prune" if pruning else log["step"][n - 1]["phase"]
    title.set_title(name + CAPTIONS.get(phase, phase), loc="left", fontsize=24, weight="bold")
    after = min(n, len(x) - 1) if pruning else n - 1  # after a prune, the next line has it
    kinds[0].set_title(f"{compact(log['step'][after]['params'])} parameters", loc="right")
    y = along(log["step"], "loss")
    loss.plot(x[:n], y[:n], color=BLUE)
    prunes = [e for e in log["prune"] if e["tokens"] <= now]
    loss.plot(along(prunes), np.interp(along(prunes), x, y), "o", color=RED)
    loss.set_title("loss (red: prunes)", loc="left")
    draw_jumps(jumps, log, BLUE, now)
    cost = sum(e["loss_after"] - e["loss_before"] for e in prunes)
    jumps.set_title("a prune hurts, then it heals", loc="left")
    jumps.set_title(f"prunes added {cost:.2f}", loc="right")
    for e in (e for e in log["eval"] if e["tokens"] <= now):
        loss.set_title(f"on new text: {e['val_loss']:.2f}", loc="right")
    rate.plot(x, lr, color=GREY)
    rate.plot(x[:n], lr[:n], "o-", markevery=[-1], color=BLUE, clip_on=False)
    rate.set_title("learning rate", loc="left")


def draw_film(out_dirs: list[Path], moving: bool) -> list:
    """Images of runs as they go on, a column each, on black; or only the last one, on white. Raises
    UserError."""
    logs = [by_name(out_dir, pruned=True) for out_dir in out_dirs]
    films = [unit_states(log) for log in logs]
    lines = ([lines_of(units)[-1] for units in film[0, 0].values()] for film in films)
    units = [min(4, max(0.3, 0.08 * max(n))) for n in zip_longest(*lines, fillvalue=0)]
    heights = [0.01, *units, 0.8, 1.9, 0.5]  # inches
    ink, paper, dpi = ("white", "#0d1117", 100) if moving else ("black", "white", 200)
    size = {"figsize": (7.2 * len(logs), 1.2 + sum(heights)), "height_ratios": heights, "dpi": dpi}
    figure, axes = open_figure(len(heights), len(logs), sharex=False, facecolor=paper, **size)
    from matplotlib import rc_context
    from PIL import Image

    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    style = {"text.color": ink, "axes.titlesize": 18, "lines.linewidth": 2.5, "lines.markersize": 8}
    steps = max((along(log["step"]) for log in logs), key=max)
    low = min(e["loss"] for log in logs for e in log["step"])
    few = {(t, 9) for t in steps[-1 :: -math.ceil(len(steps) / 60)]}  # 9: after all stages
    moments, images = sorted(few.union(*films), reverse=True), []
    for now in moments[:: math.ceil(len(moments) / 120) if moving else len(moments)]:
        for panels, out_dir, log, film in zip(axes.T, out_dirs, logs, films):
            name = f"{out_dir.name}: " if len(logs) > 1 else ""
            with rc_context(style):
                draw_moment(panels, name, log, film[max(m for m in film if m <= now)], now[0])
            panels[-3].set(xlim=(0, steps[-1]), ylim=(low - 0.1, low + 1.6))
            panels[-1].set(xlim=(0, steps[-1]), ylim=(0, None))
        figure.canvas.draw()
        figure.set_layout_engine("none")  # all moments keep the places of the last one
        images.insert(0, Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
    if not moving:
        return images
    dots = np.vstack([np.array(image)[::3, ::3] for image in images])  # they have all colours
    palette = Image.fromarray(dots).quantize(32, Image.Quantize.MAXCOVERAGE)
    return [image.quantize(palette=palette, dither=0) for image in images]  # one: a small file
