"""Runs as a film, from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] --animate"""

import math
from itertools import groupby
from pathlib import Path

import numpy as np

from run.report import compact
from tools.figures import by_name, open_figure, prunes_by_layer, tokens, widths

CAPTIONS = {"enlarged": "Train a large model", "prune": "Prune its weakest parts"}
CAPTIONS["recover"] = "Train the rest"
NAMES = {"d_ff": "neurons", "n_kv_head": "heads", "d_model": "channels", "n_layer": "layers"}
GONE, FADING, CHOSEN, USED = range(4)  # the states of a unit; their colours in the animation
GREY, FADED, RED, BLUE = (0.5, 0.5, 0.5, 0.25), (0.9, 0.3, 0.3, 0.5), "#e54c4c", "#4c8cd9"


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


def draw_moment(panels, name: str, log: dict, states: dict[str, np.ndarray], now: int) -> None:
    """Draw what a run is after `now` tokens. panels: a title, each kind of unit, loss and rate."""
    from matplotlib.colors import to_rgba_array

    title, *kinds, loss, rate = panels
    for panel in panels:
        panel.clear()
        panel.axis("off")
    for panel, (kind, units) in zip(kinds, states.items()):
        groups, width = units.shape
        rows = max(n for n in range(1, 9) if width % n == 0 and width >= 32 * (n - 1))
        cells = to_rgba_array((GREY, FADED, RED, BLUE))[units].reshape(groups, -1, rows, 4)
        cells = np.pad(cells.swapaxes(1, 2), ((0, 0), (0, 1), (0, 0), (0, 0)))  # a gap below each
        edges = {"edgecolors": panel.figure.get_facecolor(), "lw": 0.8}
        panel.pcolormesh(cells.reshape(-1, width // rows, 4)[::-1], **edges)
        where = NAMES.get(kind, kind) + " per layer" * (groups > 1)
        panel.set_title(f"{where}: {(units == USED).sum(1).max()} of {width}", loc="left")
    x, y, lr = (np.array([e[key] for e in log["step"]]) for key in ("tokens", "loss", "lr"))
    n, prunes = max(1, sum(x <= now)), [t for t in tokens(log["prune"]) if t <= now]
    phase = "prune" if now in prunes else log["step"][n - 1]["phase"]
    title.set_title(name + CAPTIONS[phase], loc="left", fontsize=24, weight="bold")
    after = min(n, len(x) - 1) if now in prunes else n - 1  # after a prune, the next line has it
    size = log["step"][after]["params"]
    kinds[0].set_title(f"{compact(size)} parameters", loc="right")
    loss.plot(x[:n], y[:n], color=BLUE)
    loss.plot(prunes, np.interp(prunes, x, y), "o", color=RED)
    loss.set_title("loss (red: prunes)", loc="left")
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
    kinds = max(len(film[0, 0]) for film in films)
    heights = [0.01, *[max(1.2, 2.8 / kinds)] * kinds, 1.1, 0.7]
    ink, paper, dpi = ("white", "#0d1117", 100) if moving else ("black", "white", 200)
    size = {"figsize": (7.2 * len(logs), 1.2 + sum(heights)), "height_ratios": heights, "dpi": dpi}
    figure, axes = open_figure(len(heights), len(logs), sharex=False, facecolor=paper, **size)
    from matplotlib import rc_context
    from PIL import Image

    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    style = {"text.color": ink, "axes.titlesize": 18, "lines.linewidth": 2.5, "lines.markersize": 8}
    steps = max((tokens(log["step"]) for log in logs), key=max)
    low = min(e["loss"] for log in logs for e in log["step"])
    few = {(t, 9) for t in steps[-1 :: -math.ceil(len(steps) / 60)]}  # 9: after all stages
    moments, images = sorted(few.union(*films), reverse=True), []
    for now in moments[:: math.ceil(len(moments) / 120) if moving else len(moments)]:
        for panels, out_dir, log, film in zip(axes.T, out_dirs, logs, films):
            name = f"{out_dir.name}: " if len(logs) > 1 else ""
            with rc_context(style):
                draw_moment(panels, name, log, film[max(m for m in film if m <= now)], now[0])
            panels[-2].set(xlim=(0, steps[-1]), ylim=(low - 0.1, low + 1.6))
            panels[-1].set(xlim=(0, steps[-1]), ylim=(0, None))
        figure.canvas.draw()
        figure.set_layout_engine("none")  # all moments keep the places of the last one
        images.insert(0, Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
    if not moving:
        return images
    dots = np.vstack([np.array(image)[::3, ::3] for image in images])  # they have all colours
    palette = Image.fromarray(dots).quantize(32, Image.Quantize.MAXCOVERAGE)
    return [image.quantize(palette=palette, dither=0) for image in images]  # one: a small file
