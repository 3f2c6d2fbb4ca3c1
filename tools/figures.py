"""What every picture of runs needs: the events of a log, and a figure."""

from pathlib import Path

from run import UserError
from run.folder import read_log


def by_name(out_dir: Path, pruned: bool = False) -> dict[str, list[dict]]:
    """The events of a run, by name. Raises UserError."""
    events: dict[str, list[dict]] = {"step": [], "eval": [], "prune": []}
    for event in read_log(out_dir):
        events.setdefault(event["event"], []).append(event)
    if not (events["step"] and events["eval"]):
        raise UserError(f"{out_dir}: no run that was validated yet; nothing to draw")
    if pruned and not events["prune"]:
        raise UserError(f"{out_dir}: its log has no prune; nothing to draw")
    return events


def tokens(events: list[dict]) -> list[int]:
    return [e["tokens"] for e in events]


def widths(events: dict[str, list[dict]], kind: str) -> tuple[list[int], list[int]]:
    """The tokens from which on each width of this kind holds, and the width; the run's end last."""
    prunes = [e for e in events["prune"] if e["kind"] == kind]
    first = prunes[0]["width_before"] if prunes else events["step"][0][kind]
    y = [first, *(e["width_after"] for e in prunes)]
    return [0, *tokens(prunes), events["step"][-1]["tokens"]], [*y, y[-1]]


def open_figure(rows: int, columns: int, **settings):
    """A figure and its axes over tokens, (rows, columns). Raises UserError without matplotlib."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.ticker import EngFormatter
    except ModuleNotFoundError as error:
        raise UserError(f"no figure: {error}; pip install -r requirements-extra.txt") from error
    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 9})
    settings = {"sharex": "col", "squeeze": False, "constrained_layout": True} | settings
    figure, axes = plt.subplots(rows, columns, **settings)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, lw=0.5)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1M, 2M
    for panel in axes[-1]:
        panel.set_xlabel("training tokens")
    return figure, axes


def prunes_by_layer(log: dict[str, list[dict]]):
    """Each prune with two lists: the layer of each group that it cut, [0] for one group of all
    layers; and the layers that went. Layers keep the numbers that they had at first."""
    layers = list(range(widths(log, "n_layer")[1][0]))
    in_layers: dict[str, bool] = {}  # kind -> whether each layer has a group of it
    for e in log["prune"]:
        in_layers.setdefault(e["kind"], len(e["removed"]) == len(layers))
        gone = [layers[i] for i in e["removed"][0]] if e["kind"] == "n_layer" else []
        yield e, layers if in_layers[e["kind"]] else [0], gone
        layers = [layer for layer in layers if layer not in gone]
