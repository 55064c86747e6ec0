"""How all plots look: colours, lines and markers, titles and legends. Used by every tool that draws lines."""

import re
import textwrap
from pathlib import Path

# Eight colours that differ in lightness, so that they are told apart in greyscale and by the colour-blind: of the 100
# units of CIE L* each has 23 to the next, any of the first four 23 to the others, and any two 11.
COLOURS = ("#000000", "#ac6300", "#033386", "#67c695", "#410040", "#bd82b4", "#0b6536", "#ebd346")
MARKERS = "osD^vP*X"
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":")
FEW = 9  # a line of fewer points has a marker at each
NO_PLOT = "matplotlib is missing; python -m pip install -r tools/requirements.txt, and the same command again"


def look(i: int, points: int = 1) -> dict:
    """How line i is drawn. Dashes and markers are a second sign beside the colour, and tell apart what has the same
    one. Markers are evenly far apart, or at each of few points."""
    return {"color": COLOURS[i % 8], "linestyle": LINES[i % 5], "linewidth": 1.6, "marker": MARKERS[(i + i // 8) % 8],
            "markersize": 5, "markevery": 1 if points < FEW else (0.03 * (i % 4), 0.12)}


def pyplot(salt: str):
    """matplotlib.pyplot without a screen, None where it is missing; with the same `salt` and figures an SVG is the
    same file."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    plt.rcParams["svg.hashsalt"] = salt
    return plt


def fold(text: str, width: int) -> str:
    """The text on lines of that many signs, broken at spaces and within names at _ where that is possible."""
    lines = [""]
    for word in re.findall(r"[^\s_]+[\s_]*|[\s_]+", text):
        if lines[-1] and len(lines[-1] + word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(textwrap.fill(line, width) for line in lines)


def entitle(figure, text: str, **more):
    """A title above all panels, on as many lines as it needs."""
    figure.suptitle(fold(text, int(9.5 * figure.get_figwidth())), **more)


def legend_below(figure, found: dict, **more):
    """One legend below all panels, of handles by their label: as many columns as fit, and labels that are wider than
    the figure on several lines."""
    signs = int(13 * figure.get_figwidth())  # of small print, beside the line and its margin
    labels = [fold(label, signs - 12) for label in found]
    widest = max(len(line) for label in labels for line in label.split("\n"))
    figure.legend(found.values(), labels, loc="outside lower center", ncols=max(1, min(4, signs // (widest + 10))),
                  frameon=False, fontsize="small", **more)


def bare(axis):
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save(plt, figure, path: Path):
    """Write PNG and SVG, without dates, and forget the figure."""
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
