"""A run as a film, from its log: python -m tools.plot OUT_DIR --animate"""

import math
from itertools import groupby
from pathlib import Path

import numpy as np

from run.out_dir import compact
from tools.figures import along, by_name, open_figure, prunes_by_layer, rises, widths

CAPTIONS = {"enlarged": "A large model trains", "prune": "Its weakest parts go"}
CAPTIONS["recover"] = "What is left recovers"
NAMES = {"d_ff": "neurons", "n_kv_head": "heads", "d_model": "channels", "n_layer": "layers"}
GONE, CHOSEN, USED, GAP = range(4)  # the states of a unit; a gap is between two groups
GREY, BLUE, RED = (0.5, 0.5, 0.5, 0.25), "#4c8cd9", "#e54c4c"


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
        moments[now, 0] = moments[now, 1] = states
        moments[now, 2] = states = {k: np.where(u == CHOSEN, GONE, u) for k, u in states.items()}
        moments[now, 3] = states = {k: -np.sort(-u) for k, u in states.items()}
    return moments


def draw_units(panel, kind: str, units: np.ndarray) -> None:
    """units: states, (groups, width)."""
    from matplotlib.colors import to_rgba_array

    groups, width = units.shape
    lines = math.gcd(width, 8) if width > 64 else 1  # of cells, for each group
    cells = units.reshape(groups, -1, lines).swapaxes(1, 2)  # (groups, lines, cells of a line)
    cells = np.pad(cells, ((0, 0), (0, 1), (0, 0)), constant_values=GAP)
    colors = to_rgba_array((GREY, RED, BLUE, "none"))[cells.reshape(-1, width // lines)]
    x, y = np.arange(width // lines + 1), np.cumsum([0, *([1] * lines + [0.6]) * groups])
    edges = min(0.8, 60 / len(x), 25 / len(y))  # points: a small part of a cell
    panel.pcolormesh(x, y, colors, edgecolors=panel.figure.get_facecolor(), lw=edges)
    panel.set_ylim(y[-2], 0)
    where = NAMES.get(kind, kind) + f", {(units == USED).any(1).sum()} layers" * (groups > 1)
    panel.set_title(f"{where}: {(units == USED).sum(1).max()} of {width}")


def draw_loss(panel, cost, log: dict[str, list[dict]], past: dict[str, list[dict]]) -> None:
    """Of the past: losses of training, at prunes, and then on the whole split; below, the rises."""
    losses = [e[key] for e in log["prune"] for key in ("loss_before", "loss_after")]
    x, added, so_far = along(past["prune"]), rises(log["prune"]), rises(past["prune"])
    evals = [e for e in past["eval"] if e["tokens"] > log["prune"][-1]["tokens"]]
    panel.plot(along(past["step"]), along(past["step"], "loss"), color=GREY, label="training")
    y = losses[: 2 * len(x)] + along(evals, "val_loss")
    label = f"validation: {y[-1]:.2f}" if y else "validation"
    panel.plot([*np.repeat(x, 2), *along(evals)], y, color=BLUE, label=label)
    panel.set_ylim(min(losses + along(log["step"], "loss")) - 0.05, max(losses) + 0.35)
    panel.legend(frameon=False, loc="upper right", handlelength=1, fontsize=15)
    cost.vlines(x, 0, so_far, color=RED, lw=5)
    cost.set(ylim=(min(0, *added), 1.1 * max(0.01, *added)), xlabel="training tokens →")
    words = f"prunes change the loss: {round(sum(so_far), 2) + 0.0:+.2f}"  # no -0
    for p, title, n in ((panel, "loss, nats", 4), (cost, words, 2)):
        p.set(title=title, xlim=(0, log["step"][-1]["tokens"]))
        p.axis("on")
        p.spines[:].set_visible(False)
        p.set_facecolor("none")
        p.locator_params(axis="y", nbins=n)
        p.tick_params(colors=p.title.get_color(), labelsize=14, length=0, labelbottom=False)


def draw_moment(panels, log: dict, states: dict[str, np.ndarray], now: int) -> None:
    """Draw a run after `now` tokens. panels: a title, each kind of unit, rate, loss and rises."""
    title, *kinds, rate, loss, cost = panels
    for panel in panels:
        panel.clear()
        panel.axis("off")
    for panel, (kind, units) in zip(kinds, states.items()):
        draw_units(panel, kind, units)
    past = {name: [e for e in log[name] if e["tokens"] <= now] for name in log}
    x, lr = (along(log["step"], key) for key in ("tokens", "lr"))
    n, prunes = max(1, len(past["step"])), along(past["prune"])
    phase = "prune" if now in prunes else log["step"][n - 1]["phase"]
    title.set_title(CAPTIONS.get(phase, phase), fontsize=24, weight="bold")
    title.set_title(f"{compact(now)} tokens", loc="right")
    # Of a step with these widths: at a prune, the last step was wider
    shape = {kind: (units == USED).sum(1).max() for kind, units in states.items()}
    sizes = [e["params"] for e in log["step"] if all(e[kind] == shape[kind] for kind in shape)]
    kinds[0].set_title(f"{compact(sizes[0])} parameters" if sizes else "", loc="right")
    rate.plot(x, lr, color=GREY)
    rate.plot(x[:n], lr[:n], "o-", markevery=[-1], color=BLUE, clip_on=False)
    rate.set(xlim=(0, x[-1]), ylim=(0, None), title="learning rate")
    draw_loss(loss, cost, log, past)
    rate.vlines(prunes, 0, 1, color=RED, lw=1.5, zorder=0, transform=rate.get_xaxis_transform())


def draw_film(out_dir: Path, moving: bool) -> list:
    """Images of a run as it goes on, on black; or only the last one, on white. Raises UserError."""
    log = by_name(out_dir, pruned=True)
    states = unit_states(log)
    heights = [0.01, *(min(4, 0.5 * len(u)) for u in states[0, 0].values()), 0.6, 1.8, 0.8]
    ink, paper, dpi = ("white", "#0d1117", 100) if moving else ("black", "white", 200)
    size = {"figsize": (7.2, 1.2 + sum(heights)), "height_ratios": heights, "dpi": dpi}
    figure, axes = open_figure(len(heights), 1, sharex=False, facecolor=paper, **size)
    from matplotlib import rc_context
    from PIL import Image

    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    style = {"text.color": ink, "axes.labelcolor": ink, "axes.titlesize": 18, "axes.labelsize": 14}
    style |= {"axes.titlelocation": "left", "lines.linewidth": 2.5, "lines.markersize": 8}
    steps = along(log["step"])
    few = {(tokens, 9) for tokens in steps[-1 :: -math.ceil(len(steps) / 60)]}  # 9: all stages over
    moments, images = sorted(few | states.keys(), reverse=True), []
    for now in moments if moving else moments[:1]:
        with rc_context(style):
            draw_moment(axes[:, 0], log, states[max(m for m in states if m <= now)], now[0])
        figure.canvas.draw()
        figure.set_layout_engine("none")  # all moments keep the places of the last one
        images.insert(0, Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
    if moving:  # one palette for all: a small file
        palette = images[-1].quantize(64, Image.Quantize.MAXCOVERAGE)
        images = [image.quantize(palette=palette, dither=0) for image in images]
    return images
