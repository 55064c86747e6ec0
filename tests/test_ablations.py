"""Ablations: runs of equal time, and a table of what they gave."""

import json
import re
import sys

import pytest
from conftest import ROOT, TINY, clean_environment
from tooling import call

sys.path.insert(0, str(ROOT / "tools"))
import ablations  # noqa: E402

LIST = """# name | settings | verdict
base | | as it was
slope | MLP_SLOPE=0.5 | kept
both | MLP_SLOPE=0.50 XSA_LAST_N=1 WARMDOWN_ITERS=8 |
"""


@pytest.fixture
def run(tmp_path):
    """run(*arguments, **variables): the tool in a folder of its own."""
    env = clean_environment() | {"LOG_DIR": str(tmp_path / "logs")}
    return lambda *words, **more: call(ablations.main, words, env | more, tmp_path)


@pytest.fixture
def planned(tmp_path, run):
    """A folder with the list and what `plan` made of it."""
    (tmp_path / "mine.txt").write_text(LIST)
    done = run("plan", "mine.txt", "--rounds", "1", **TINY)
    assert done.code == 0, done.err
    return tmp_path, done.out.splitlines()


def summary(folder, name, seed, bpb, overrides, cost):
    """A finished run's."""
    (folder / "logs" / "mine" / name).mkdir(parents=True)
    text = {"seed": seed, "preset": "demo", "overrides": overrides | {"ITERATIONS": cost["steps"]},
            "config": {"iterations": cost["steps"], "warmdown_iters": cost["warmdown"]},
            "eval": {"ttt": None, "sliding": {"val_bpb": bpb}}, "artifact": {"bytes_model": 1000 + seed}}
    (folder / "logs" / "mine" / name / "summary.json").write_text(json.dumps(text))


def test_plan_and_table(planned, run):
    """Steps in proportion to what a step costs; each run under its idea; differences on the same seed."""
    folder, lines = planned
    costs = json.loads((folder / "costs.json").read_text())["mine"]
    assert lines[0] == "ITERATIONS=12 WARMDOWN_ITERS=4 # base" and len(lines) == len(costs) == 3
    both = costs["MLP_SLOPE=0.50 XSA_LAST_N=1 WARMDOWN_ITERS=8"]
    assert both["steps"] == max(round(12 / both["ratio"]), 1) and both["warmdown"] == round(8 * both["steps"] / 12)
    assert {f"ITERATIONS={both['steps']}", f"WARMDOWN_ITERS={both['warmdown']}"} < set(lines[2].split())
    slope = costs["MLP_SLOPE=0.5"]
    summary(folder, "a", 1, 2.0, {}, costs[""])
    summary(folder, "b", 2, 2.2, {}, costs[""])
    summary(folder, "c", 1, 1.9, {"MLP_SLOPE": 0.5}, slope)
    summary(folder, "d", 2, 2.0, {"MLP_SLOPE": 0.5}, slope)
    summary(folder, "e", 1, 1.0, {"MLP_SLOPE": 0.5, "XSA_LAST_N": 2}, both)  # of no idea
    summary(folder, "f", 1, 2.5, {"MLP_SLOPE": 0.5, "XSA_LAST_N": 1}, both)
    for _ in "logs", "what was kept of them":
        assert run("table", "mine.txt").code == 0
        rows = [line.split(" | ") for line in (folder / "README.md").read_text().splitlines() if "of the" not in line]
        rows = {row[0].strip("| "): row for row in rows if re.match(r"\| (base|slope|both)", row[0])}
        assert rows["base"][6].startswith("2.1000 ± 0.1414") and rows["base"][5] == "1,002"
        assert rows["slope"][7].startswith("-0.1500 ± 0.0707") and rows["slope"][8].startswith("kept")
        assert rows["both"][7].startswith("+0.5000") and list(rows) == ["base", "slope", "both"]
        (folder / "logs").rename(folder / "gone") if (folder / "logs").exists() else None
    run("plan", "mine.txt", "--rounds", "1", **TINY).refused("mine.json holds runs of the costs beside it")


@pytest.mark.parametrize("text, words", [
    (None, "No such file"), ("# nothing\n", "no line in it"), ("base | SLOPE |\n", "'SLOPE'"),
    ("base | |\nodd | MLP_SLOPES=1 |\n", "MLP_SLOPE"), ("base | |\nodd | MLP_SLOPE=2 |\n", "MLP_SLOPE='2'")])
def test_bad_lists_are_refused(tmp_path, run, text, words):
    if text is not None:
        (tmp_path / "mine.txt").write_text(text)
    done = run("plan", "mine.txt", "--rounds", "1", **TINY)
    assert done.code == 2 and words in done.err.splitlines()[-1] and done.err.splitlines()[-1].startswith("error: ")


def test_a_table_needs_the_base(tmp_path, run):
    (tmp_path / "mine.txt").write_text(LIST)
    run("table", "mine.txt").refused("no finished run of the base")
