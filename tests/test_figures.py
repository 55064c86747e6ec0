"""Pictures: colours that are told apart by everyone, short labels, panels that say something, nothing cut off."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import figures  # noqa: E402
import looks  # noqa: E402
import rate_distortion  # noqa: E402
import running_bpb  # noqa: E402
from run_log import Point, Run, Score  # noqa: E402

# What linear RGB becomes for those who lack a kind of cones (Machado, Oliveira and Fernandes, 2009).
SEEN = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(colour: str, kind: str) -> np.ndarray:
    """CIE L*, a* and b* of a colour such as #ff8000, as it is seen."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(SEEN[kind] @ linear, 0, 1) / (0.95047, 1, 1.08883)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def made(name: str, points: int = 60, validations: int = 1, seed: int = 1, folder: str = "logs", **given) -> Run:
    """A run with a score whose loss falls from 6, with noise."""
    run = Run(Path(folder, name), name, ours=True, seed=seed, own={"int6": Score((2.0, 1.25), 2.0, 1.25)})
    noise = np.random.default_rng(seed).normal(0, 0.2, points)
    run.train = [Point(i + 1, 0.1 * (i + 1), 6 - i / points + noise[i], rate=1.0) for i in range(points)]
    run.val = [Point(points - 10 * i, 1.0, 5.5, 3.0) for i in reversed(range(validations))]
    run.config = {"seed": seed} | {key.lower(): value for key, value in given.items()}
    run.overrides = {"SEED": seed} | given
    return run


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(runs) -> the figures that are made of them, by name, with their texts laid out."""
    kept = {}

    def keep(plt, figure, path):
        figure.canvas.draw()
        kept[path.name] = figure
        plt.close(figure)

    def draw(runs: list[Run]) -> dict:
        labels, title = figures.labels_of(runs)
        figures.pictures(runs, labels, tmp_path, title)
        return kept

    for module in (figures, running_bpb, rate_distortion):
        monkeypatch.setattr(module, "save", keep)
    draw.kept = kept
    return draw


def axes_of(figure) -> dict:
    return {axis.get_title().partition(" (")[0]: axis for axis in figure.axes}


def texts_of(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# ---- colours ----


@pytest.mark.parametrize("kind", SEEN)
def test_colours_are_told_apart(kind):
    """Those of two, three or four lines by lightness alone, also in greyscale."""
    seen = [lab(colour, kind) for colour in looks.COLOURS]
    assert len(seen) == 8 and all(colour[0] < 86 for colour in seen), "each stands out from white"
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(a - b) >= 20
        assert kind != "normal" or abs(a[0] - b[0]) >= 11
    for a, b in itertools.combinations(seen[:4], 2):
        assert abs(a[0] - b[0]) >= (23 if kind == "normal" else 17)
    for a, b in itertools.pairwise(seen):
        assert abs(a[0] - b[0]) >= (23 if kind == "normal" else 17)


def test_forty_lines_look_different():
    found = {tuple(str(looks.look(i)[key]) for key in ("color", "linestyle", "marker")) for i in range(40)}
    assert len(found) == 40
    for key in ("linestyle", "marker"):
        assert all(looks.look(i)[key] != looks.look(i + 8)[key] for i in range(32)), "of one colour"


def test_every_plot_of_lines_has_the_colours(drawn):
    training = drawn([made(f"run_{word}") for word in "abcd"])["training"]
    curve = axes_of(training)["learning rate of the matrices"].lines
    assert [line.get_color() for line in curve if not line.get_label().startswith("_")] == list(looks.COLOURS[:4])
    running_bpb.plot({word: np.ones(20) for word in "abcd"}, np.arange(20), Path("running"))
    rate_distortion.plot([{"run": "x", "rule": rule, "bits": bits, "bytes": 1e6, "loss_added": 0.1}
                          for rule, bits in rate_distortion.SETTINGS], Path("rates"))
    for name in ("running", "plot"):
        for axis in drawn.kept[name].axes:
            assert [line.get_color() for line in axis.lines] == list(looks.COLOURS[:4]), name


# ---- labels ----


@pytest.mark.parametrize("names, labels, shared", [
    (["wide_lr_seed1", "wide_lr_seed2"], ["seed1", "seed2"], "wide_lr"),
    (["a_lr1e-3_long", "a_lr1e-4_long"], ["lr1e-3", "lr1e-4"], "a"),
    (["lr1e-3_wd1", "lr1e-4_wd2"], ["lr1e-3_wd1", "lr1e-4_wd2"], ""),
    (["base", "base_wide"], ["base", "base_wide"], ""),
    (["demo-run-1", "demo-run-2"], ["run-1", "run-2"], "demo"),
    (["3_MATRIX_LR=0.1_SEED=1", "3_MATRIX_LR=0.2_SEED=1"], ["MATRIX_LR=0.1", "MATRIX_LR=0.2"], "3"),
    (["first", "second"], ["first", "second"], ""),
    (["_x", "x"], ["_x", "x"], ""),
    (["__", "x_y"], ["__", "x_y"], ""),
    (["first" * 20, "one", "last" * 20], ["firstfirstfirstfirstfirstfir … rstfirstfirstfirstfirstfirst", "one",
                                          "lastlastlastlastlastlastlast … lastlastlastlastlastlastlast"], ""),
    (["x" * 40 + mid + "x" * 40 for mid in "ab"], ["x" * 40 + mid + "x" * 40 for mid in "ab"], ""),
    (["alone" * 20], ["alone" * 20], ""),
    (["alone_by_itself"], ["alone_by_itself"], ""),
])
def test_labels_are_what_differs_in_names(names, labels, shared):
    assert figures.labels_of([made(name) for name in names]) == (labels, shared)


def test_labels_of_a_sweep_are_its_settings(tmp_path):
    folder = tmp_path / "rates"
    folder.mkdir()
    runs = [made(f"{i}_MATRIX_LR={lr}_EMA_DECAY=0.5_SEED={seed}", seed=seed, folder=folder, MATRIX_LR=lr, EMA_DECAY=0.5)
            for i, (lr, seed) in enumerate(itertools.product((0.01, 0.02), (1, 2)))]
    words, _ = figures.labels_of(runs)
    assert words[0] == "0_MATRIX_LR=0.01_EMA_DECAY=0.5_SEED=1", "no sweep so far, and the names share no beginning"
    (folder / "sweep.json").write_text(json.dumps({}))
    assert figures.labels_of(runs) == (["MATRIX_LR=0.01, SEED=1", "MATRIX_LR=0.01, SEED=2", "MATRIX_LR=0.02, SEED=1",
                                        "MATRIX_LR=0.02, SEED=2"], "rates")
    assert figures.labels_of(runs[:2]) == (["SEED=1", "SEED=2"], "rates")


def test_runs_without_a_name_are_told_by_their_settings_and_equal_names_by_their_folders():
    dated = [made(f"20260101-12000{i}_seed1", DATA_PATH=f"/long/way/{word}") for i, word in enumerate(("few", "many"))]
    assert figures.labels_of(dated) == (["DATA_PATH=few", "DATA_PATH=many"], "")
    same = [made("20260101-120000_seed1"), made("20260101-120001_seed1")]
    assert figures.labels_of(same)[0] == ["20260101-120000", "20260101-120001"], "of the same settings"
    assert figures.labels_of([made("run", folder="x/a"), made("run", folder="x/b")]) == (["a", "b"], "x")


def test_logs_of_a_record_are_titled_by_its_folder(tmp_path):
    runs = [made(f"train_seed{seed}.log", folder=tmp_path / "2026_name") for seed in (13, 1111)]
    (tmp_path / "2026_name").mkdir()
    for run in runs:
        run.path.touch()
        run.name = run.path.stem
    assert figures.labels_of(runs) == (["seed13", "seed1111"], "2026_name")


def test_a_legend_says_what_differs_and_the_score(drawn):
    runs = [made(f"wide_seed{seed}", seed=seed) for seed in (1, 2)]
    runs[1].own = {}
    figure = drawn(runs)["training"]
    assert texts_of(figure) == ["seed1: 1.2500 BPB", "seed2: no score yet"]
    assert figure.get_suptitle() == "wide: 2 runs"
    runs[1].own = {"int6": Score((2.0, 1.27), 2.0, 1.27)}
    assert drawn(runs)["training"].get_suptitle() == "wide: 1.2600 ± 0.0141 BPB, 2 seeds"
    runs[0].ours = False
    assert drawn(runs)["training"].get_suptitle() == "wide: 2 runs", "of published logs nobody knows"
    runs[0].ours, runs[1].config["matrix_lr"] = True, 0.5
    assert drawn(runs)["training"].get_suptitle() == "wide: 2 runs", "these differ in more than the seed"
    assert drawn(runs[:1])["training"].get_suptitle() == "wide_seed1: 1.2500 BPB, 60 steps"


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("name", ["it", "a_very_long_name_" * 9])
def test_nothing_is_cut_off(drawn, name, count):
    runs = [made(f"{i}_{name}{i}") for i in range(count)]
    for run in runs:
        run.total_bytes = 15_000_000
    for figure in drawn(runs).values():
        texts = [figure._suptitle, *figure.legends, *(axis.title for axis in figure.axes)]
        texts += [label for axis in figure.axes for label in axis.get_yticklabels()]
        for text in texts:
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1, text
        assert all(axis.get_window_extent().width > figure.bbox.x1 / 4 for axis in figure.axes), "room for the curves"


def test_long_names_beside_bars_do_not_lie_over_each_other(drawn, tmp_path):
    runs = [made(f"run{i}") for i in range(3)]
    for run in runs:
        run.total_bytes = 15_000_000
    for label in ("short", "a_very_long_name_" * 9):
        figures.pictures(runs, [f"{label}{i}" for i in range(3)], tmp_path, "")
        boxes = [text.get_window_extent() for text in drawn.kept["bytes"].axes[0].get_yticklabels()]
        assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))


# ---- panels ----


def test_a_part_keeps_its_colour_and_steps_are_whole(drawn, monkeypatch):
    """Whichever other parts there are."""
    colours = []
    for parts in ({"code": 5, "mlp": 5}, {"code": 4, "embed": 2, "attn": 2, "mlp": 2}):
        monkeypatch.setattr(figures, "byte_parts", lambda run, parts=parts: parts)
        run = made("a", points=20)  # where ticks would be at 2.5
        run.total_bytes = 10
        axis = drawn([run])["bytes"].axes[0]
        bars = {bars.get_label(): bars.patches[0].get_facecolor() for bars in axis.containers}
        assert list(bars) == list(parts)
        colours.append(bars["mlp"])
    assert colours[0] == colours[1]
    for axis in drawn.kept["training"].axes:
        assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_a_label_names_the_end_of_a_path(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    runs = [made(name, folder=tmp_path, DATA_PATH=f"/far/{name}") for name in "ab"]
    assert figures.labels_of(runs)[0] == ["DATA_PATH=a", "DATA_PATH=b"]


def test_few_validations_are_marks_beside_the_training_loss(drawn):
    axes = axes_of(drawn([made("a_run", validations=2), made("other", validations=1)])["training"])
    assert list(axes) == ["training loss", "learning rate of the matrices", "time of a step"]
    marks = [line for line in axes["training loss"].lines if line.get_markerfacecolor() == "none"]
    assert [list(line.get_xdata()) for line in marks] == [[50, 60], [60]] and marks[1].get_color() == looks.COLOURS[1]
    assert "hollow: validation" in axes["training loss"].get_title()


def test_a_mark_without_a_curve_is_in_the_legend(drawn):
    runs = [made("a_run"), made("other")]
    runs[1].train = []
    assert texts_of(drawn(runs)["training"]) == ["a_run: 1.2500 BPB", "other: 1.2500 BPB"]


def test_three_validations_are_a_curve(drawn):
    axes = axes_of(drawn([made("a_run", validations=3), made("other", validations=1)])["training"])
    assert list(axes)[1] == "validation, weights as trained" and len(axes) == 4
    assert not any(line.get_markerfacecolor() == "none" for line in axes["training loss"].lines)


def test_the_validation_before_training_is_no_mark_and_far_ones_are_within(drawn):
    run = made("run", points=400)
    run.val = [Point(0, 0.0, 7.0, 4.0), Point(400, 1.0, 9.5, 5.0)]
    run.train[0] = run.train[0]._replace(loss=50.0)
    axis = axes_of(drawn([run])["training"])["training loss"]
    (mark,) = (line for line in axis.lines if line.get_markerfacecolor() == "none")
    assert list(mark.get_xdata()) == [400] and axis.get_ylim()[1] > 9.5
    assert axis.get_ylim()[1] < 20, "the first points lie outside"


def test_a_noisy_curve_is_a_running_mean_over_all_points(drawn):
    many, few = made("many", points=200), made("few", points=20)
    lines = axes_of(drawn([many, few])["training"])["training loss"].lines
    mean, less, faint = lines[0], lines[2], lines[6]
    losses = [p.loss for p in many.train]
    assert list(faint.get_ydata()) == losses and faint.get_alpha() < 0.5 and len(lines) == 7
    assert mean.get_ydata()[100] == pytest.approx(np.mean(losses[92:109])) and mean.get_ydata()[0] == losses[0]
    assert np.std(np.diff(mean.get_ydata())[20:]) < np.std(np.diff(losses)) / 5
    assert list(less.get_ydata()) == [p.loss for p in few.train]


def test_points_do_not_widen_the_panel_and_are_left_out_of_many_runs(drawn):
    runs = [made(f"run_{word}", points=200) for word in "abcde"]
    runs[0].train[150] = runs[0].train[150]._replace(loss=99.0)
    for count in (4, 5):
        axis = axes_of(drawn(runs[:count])["training"])["training loss"]
        assert axis.get_ylim()[1] < 15 and sum(line.get_label() == "_each" for line in axis.lines) == 4 * (count == 4)


@pytest.mark.parametrize("text, width, lines", [
    ("one two three", 8, ["one two", "three"]),
    ("one_two_three: 4 BPB", 10, ["one_two_", "three: 4", "BPB"]),
    ("unbroken" * 2, 10, ["unbrokenun", "broken"]),
    ("short", 10, ["short"]),
])
def test_long_texts_are_broken_between_words(text, width, lines):
    assert looks.fold(text, width).split("\n") == lines


def test_what_is_not_finite_stays_a_gap():
    found = figures.smooth([1.0] * 50 + [math.nan, math.inf] + [1.0] * 50)
    assert math.isnan(found[50]) and math.isinf(found[51]) and found[49] == found[52] == 1.0
