"""The pictures of docs/report.md, README.md and docs/, as SVG files for a light page and for a dark one.

Each is drawn from results/ alone, by benchmarks/charts.py and benchmarks/architecture.py, and without a background.
A page shows the one that its reader's theme asks for:

    <picture>
      <source media="(prefers-color-scheme: dark)" srcset="pictures/ladder-dark.svg">
      <img alt="..." src="pictures/ladder.svg">
    </picture>
"""

from collections.abc import Callable, Iterable
from io import BytesIO

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import charts
from benchmarks.architecture import architecture_picture
from benchmarks.rows import ROOT
from utils import write_whole


FOLDER = ROOT / "docs/pictures"
PICTURES: dict[str, Callable[[], Figure]] = {
    "architecture": architecture_picture,
    "ladder": charts.ladder_chart,
    "prediction": charts.prediction_chart,
    "speed": charts.speed_chart,
    "retention": charts.retention_chart,
    "front": charts.front_chart,
}
# By the end of a file's name: what is written, and what is drawn thin.
SCHEMES = {"": ("#1f2328", "#59636e"), "-dark": ("#f0f6fc", "#9198a1")}
LOOK = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # the reader's own letters: small files, and text that can be searched
    "svg.hashsalt": "report",  # else ids are random
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def write_pictures(names: Iterable[str] = PICTURES) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        for scheme in SCHEMES:
            write_whole(FOLDER / f"{name}{scheme}.svg", picture(name, scheme))


def picture(name: str, scheme: str) -> bytes:
    """The SVG of a picture; `scheme` is a key of SCHEMES."""
    text, thin = SCHEMES[scheme]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), text)
    colours |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), thin)
    with rc_context(LOOK | colours):
        file = BytesIO()
        PICTURES[name]().savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
