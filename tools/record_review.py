"""What a reviewer asks of a record, as sections of its README: the tests against other entries, both timings, where
code and data are from, how much an audit saw, what differs from a baseline.

Used by tools/record.py.
"""

import hashlib
import math
import statistics
import subprocess
import textwrap
from pathlib import Path

from record_checks import LIMIT_SECONDS, PLACED, told_apart, verified_of
from run_log import ROOT, TITLES, Run, t
from runs import data_of
from sweep_results import spread

MARGIN = 0.005  # nats a token that the challenge asks a record to win by
# Claim, margin in nats a token, p below which it passes: what the challenge asks for, and what was applied to rows of
# the board at its end.
CLAIMS = ((f"the challenge's, strict: better by {MARGIN} nats/token", MARGIN, 0.01),
          ("as applied on the board: better", 0.0, 0.25))


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(t.one_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


# ---- the tests against other entries ---------------------------------------------------------------------------------


def welch(gains: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """t, degrees of freedom and one-sided p of a mean gain above 0 over seeds, by Welch's t test. `gains`: what each of
    our seeds wins over the mean of `theirs`, whose deviations are the seeds' of the other side. One value there counts
    as known, which makes it Student's test of one sample.

    Raises UserError where scipy is missing."""
    try:
        from scipy.special import stdtr
    except ImportError:
        raise t.UserError("scipy is missing, which the test against --reference-bpb needs; python -m pip install -r "
                          "tools/requirements.txt") from None
    parts = [statistics.variance(side) / len(side) if len(side) > 1 else 0.0 for side in (gains, theirs)]
    weights = [part**2 / (len(side) - 1) for part, side in zip(parts, (gains, theirs), strict=True) if len(side) > 1]
    mean, total = statistics.mean(gains), sum(parts)
    freedom = total**2 / sum(weights) if total else float(len(gains) - 1)
    value = mean / math.sqrt(total) if total else math.copysign(math.inf, mean)
    return value, freedom, float(stdtr(freedom, -value))


def small(p: float) -> str:
    return f"{p:.2g}" if p < 0.1 else f"{p:.3f}"


def against(runs: list[Run], scores: list[float], name: str) -> list[str]:
    """The comparison with an entry whose seeds have these BPB."""
    per_token = statistics.mean(math.log(2) * run.bytes / run.targets for run in runs)  # nats a token in a bit a byte
    theirs = [bpb * per_token for bpb in scores]
    losses, ours = [run.score.val_loss for run in runs], [run.score.val_bpb for run in runs]
    gains = [statistics.mean(theirs) - loss for loss in losses]
    gain = statistics.mean(scores) - statistics.mean(ours)
    rows = [[name, str(len(scores)), spread(scores), spread(theirs)],
            ["this", str(len(runs)), spread(ours), spread(losses)],
            ["gain", "", f"{gain:+.4f}", f"{statistics.mean(gains):+.4f}"]]
    lines = [f"## Against {name}", *table(["", "seeds", "BPB", "nats/token"], rows), ""]
    if data_of(runs[0]) != "fineweb10B_sp1024" or any("partial split" in c for run in runs for c in run.all_caveats):
        text = ("This was scored on other text than the challenge's split: the figures compare only if that entry was "
                "scored on the same targets.")
        lines += [paragraph(text), ""]
    if len(runs) < 2:
        return [*lines, "One seed: no test is possible.", ""]
    rows = []
    for claim, margin, level in CLAIMS:
        value, freedom, p = welch([g - margin for g in gains], theirs)
        rows.append([f"{claim}, p < {level}", f"{value:.2f}", f"{freedom:.2f}", small(p), "yes" if p < level else "no"])
    known = "Welch's t test, one-sided" if len(scores) > 1 else (
        "The entry's score counts as known, for its seeds were not given: Student's t test of one sample, one-sided")
    few = [f"Both are asked of three seeds; here are {len(runs)}."] if len(runs) < 3 else []
    return [*lines, paragraph(" ".join([f"{known}, in nats/token.", *few])), "",
            *table(["test", "t", "degrees of freedom", "p", "passed"], rows), ""]


# ---- both timings ----------------------------------------------------------------------------------------------------


def timings(runs: list[Run]) -> list[str]:
    """Seconds of training and evaluation as the challenge's text and as the field count them."""
    clocks = []
    for run in runs:
        inside, compiling = run.evaluation_seconds, run.spent.get("compile", 0.0)
        outside = None if inside is None else inside - compiling
        clocks.append([run.strict_training_seconds, run.training_seconds, inside, outside])
    rows = [[str(run.seed), *("-" if s is None else f"{s:,.1f}" for s in row)] for run, row in
            zip(runs, clocks, strict=True)]
    longest = [max((s for s in column if s is not None), default=math.nan) for column in zip(*clocks, strict=True)]
    within = {True: "yes", False: "no"}
    rows.append([f"within {LIMIT_SECONDS}", *("-" if s != s else within[s <= LIMIT_SECONDS] for s in longest)])
    heads = ["seed", "training, strict", "training, the field's", "evaluation, strict", "evaluation, the field's"]
    text = ("Seconds. Strict: all inside, the warm-up that compiles, too. The field's: compilation outside. Training "
            "has calibration and the search for the artifact in it, evaluation reading the artifact.")
    return ["## Timings", *table(heads, rows), "", paragraph(text), ""]


# ---- where code and data are from ------------------------------------------------------------------------------------


def commit_of(code: bytes) -> str:
    """The newest commit of this project whose train_gpt.py is this script, or packed became it, as far as the last 10
    tell; empty where none is."""
    def git(*words: str, given: bytes | None = None) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], input=given, capture_output=True)
        return done.stdout.decode().strip() if done.returncode == 0 else ""

    try:
        blob = git("hash-object", "--stdin", given=code)
        commits = git("log", "--format=%H", "--", "train_gpt.py").split()
        listed = git("cat-file", "--batch-check=%(objectname)", given="".join(f"{commit}:train_gpt.py\n" for commit in
                                                                            commits).encode())
    except OSError:  # no git here
        return ""
    same = [commit for commit, found in zip(commits, listed.split("\n"), strict=False) if found == blob]
    text = code.decode()
    if not same and t.lean(text) == text:
        same = [commit for commit in commits[:10] if t.lean(git("show", f"{commit}:train_gpt.py") + "\n") == text]
    return same[0] if same else ""


def origin(runs: list[Run]) -> list[str]:
    """Commit, and sha256 of code, data and tokenizer; how much of the split each audit saw."""
    run = runs[0]
    commit, script = commit_of(run.code), hashlib.sha256(run.code).hexdigest()
    source = "train_gpt_readable.py" if run.packed else "train_gpt.py"
    lines = [f"- `{source}`: {len(run.code):,} bytes, sha256 {script}; " + (f"that of commit {commit}" if commit else
             "no commit of the project that made this record has it")]
    if run.packed:
        lines.append(f"- `train_gpt.py`: the same packed, {run.code_file[0]:,} bytes, sha256 {run.code_file[1]}")
    tokenizer, found = run.about_data.get("tokenizer_sha256"), verified_of(run)
    lines.append(f"- Tokenizer: sha256 {tokenizer or 'not known'}")
    if found:
        lines.append(f"- Data: verified on {found['date']}, sha256 {found['sha256']} (`sha256sum fineweb_*.bin | "
                     f"sha256sum`); {found['equal_documents']:,} validation documents are in the training data too; "
                     f"{found['shared_tokens']:,} validation tokens of {found['shared_documents']:,} documents are in "
                     "runs of 64 and more that both have")
    else:
        lines.append("- Data: not verified, its sha256 not known (`./run.sh data --verify`)")
    for each in runs:
        saw = each.audit_saw
        share = f"{saw[0]:,} of {saw[1]:,} targets ({saw[0] / saw[1]:.2%})" if saw else "how much it saw is not said"
        said = ", ".join(f"{name} {'ok' if ok else 'FAILED'}" for name, ok in each.audits.items())
        lines.append(f"- Audit, seed {each.seed}: " + (f"{said}; on an excerpt, {share}" if said else "none"))
    return ["## Origin", *lines, ""]


# ---- the difference to a baseline ------------------------------------------------------------------------------------


def baseline(runs: list[Run], base: Run) -> list[str]:
    """In what settings and figures these runs differ from another one."""
    run, name = runs[0], base.path.stem if base.path.is_file() else base.name
    named = [{key: Path(str(value)).name if key in PLACED else value for key, value in each.settings.items()}
             for each in (base, run)]
    apart = told_apart(named) if base.config else {}
    lines = [f"## Against the baseline {name}"]
    lines += table(["setting", "baseline", "this"], [[key, *values] for key, values in apart.items()]) if apart else [
        "The settings are the same." if base.config else "Its log does not tell the settings."]
    if base.code and base.code != run.code:
        lines += ["", f"It ran another script, sha256 {hashlib.sha256(base.code).hexdigest()}."]
    rows = []
    for key, title in TITLES.items():
        ours = [r.scores[key].bpb for r in runs if key in r.scores]
        if ours and key in base.scores:
            theirs = base.scores[key].bpb
            rows.append([f"{title}, BPB", f"{theirs:.4f}", spread(ours), f"{statistics.mean(ours) - theirs:+.4f}"])
    figures = [("steps", lambda r: r.trainer.steps, "{:,.0f}"), ("bytes", lambda r: r.total_bytes, "{:,.0f}"),
               ("ms a step", lambda r: r.trainer.step_ms, "{:,.1f}")]
    for title, figure, form in figures:
        ours, theirs = [x for x in map(figure, runs) if x is not None], figure(base)
        if ours and theirs is not None:
            mean = statistics.mean(ours)
            rows.append([title, form.format(theirs), form.format(mean), ("+" if mean >= theirs else "") +
                         form.format(mean - theirs)])
    return [*lines, "", *table(["", "baseline", "this", "difference"], rows), ""]
