#!/usr/bin/env python3
"""Check a record's folder, of anybody's script, before it is submitted.

    ./run.sh check-record FOLDER...                                       what speaks against it, and what is unknown
    ./run.sh check-record FOLDER --reference-bpb 1.0611,1.0607,1.0614     and tests against another entry's seeds

It reads what lies in the folder: files, submission.json, the sizes, seeds, times and scores that the logs print, and
the leaks that a log shows. Three kinds of lines: "no" is a rule that is broken, "ask" is what a reviewer will ask, and
"unknown" is what files cannot tell. Of a folder that ./run.sh record has made, all that it demands is checked again.
Exit codes: 0 no rule is seen to be broken; 1 one is; 2 something to mend.
"""

import argparse
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import record_review as review  # noqa: E402
import runs as reader  # noqa: E402
from command_line import Parser, answer  # noqa: E402
from record import scores  # noqa: E402
from record_checks import LIMIT_SECONDS, check_submission, reasons_against  # noqa: E402
from record_text import SEEDS, submitted  # noqa: E402
from run_checks import is_number  # noqa: E402
from run_log import LIMIT_BYTES, read_text, t  # noqa: E402

LAST_STEP = 1.0  # seconds that a training may go on after its cap: the step in progress is finished
SPLIT_BYTES = (149.5e6, 153.0e6)  # of FineWeb's validation text; the published tokenizers count 151.1 to 151.5 million
SPLIT_DOCUMENTS = 50_000
LEAP = 0.1  # BPB; sliding windows and test-time training have won 0.04 at most
LONGEST_WINDOW = 16_384  # an evaluation may drop the tail of the split, up to a window
PUBLISHED = {"fineweb_1024_bpe": 1024, "fineweb_8192_bpe.model": 8192}  # tokenizer -> key of t.PUBLISHED_TARGETS
UNKNOWN = [
    "whether validation documents are in the training data (./run.sh data --verify tells it where the data is)",
    "whether the evaluation peeks, or learns from a token before it is scored, where no log shows it (./run.sh audit "
    "tries it, of runs of this script)",
    "whether the logs are of this script and as they were left"]

N = r"(-?\d{1,9}(?:\.\d{1,30})?|nan)"
SCORE = re.compile(rf"(?!step:)([A-Za-z][^{{}}\"']{{,200}}?)[: ]+val_loss[:=] ?{N} +val_bpb[:=] ?{N}(.*)")
SECONDS = re.compile(r"\b(?:eval_)?time:(\d{1,12}(?:\.\d+)?)(ms|s)\b")
TRAINED = re.compile(r"train_time: ?(\d{1,12}(?:\.\d+)?)(ms|s|m)\b")
TOTAL = re.compile(r"(?:Total submission size \S+: (\d{1,15}) bytes|budget:(\d{1,15})/16000000)")
PLAIN_TOTAL = re.compile(r"Total submission size: (1\d{7}|\d{1,7}) bytes")  # other scripts print the model's own so
MODEL = re.compile(r"Serialized model \S+: (\d{1,15}) bytes")
TARGETS = re.compile(r"(?:val_loader:.*?tokens:|val_tokens: ?)(\d{1,15})\b")
DOCUMENTS = re.compile(r"\w+: ?total_docs:(\d{1,15})\b")
SEED = re.compile(r"(?:\s+|.*\b)?seed[:=] ?(\d{1,12})\b")
RANKS = re.compile(r"\s*world_size: ?(\d{1,6})\b")
# Passes over the validation text that end before the score: tokens are learnt first and scored later.
ADAPTED = re.compile(r"(\w*ttt\w*)[:_ ]+epoch[: ] ?(\d{1,6})/(\d{1,6})\b|(ttt_adapt)_time:")


@dataclass
class Facts:
    """What one log shows; None where it does not."""

    path: Path
    seed: int | None = None  # by its lines
    named: int | None = None  # by the file's name
    loss: float | None = None
    bpb: float | None = None
    plain: float | None = None  # the worst of its final scores, which is that without what its evaluation adds
    evaluation: float | None = None  # seconds
    training: float | None = None
    total: int | None = None  # bytes
    model: int | None = None
    targets: int | None = None
    documents: int | None = None
    tokenizer: str = ""
    ranks: int | None = None
    card: str = ""
    adapted: dict[str, int] = field(default_factory=dict)  # passes over the validation text before the score, by name


@dataclass
class Found:
    """What speaks against a folder."""

    no: list[str] = field(default_factory=list)
    ask: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def seconds_of(number: str, unit: str) -> float:
    return float(number) * {"ms": 0.001, "s": 1.0, "m": 60.0}[unit]


def read_facts(path: Path) -> Facts:
    """The facts of a log; of several launches the last one counts. UserError where it cannot be read."""
    facts = Facts(path)
    named = re.search(r"seed[_-]?(\d{1,12})|^log_(\d{1,12})$", path.stem)
    passes: dict[str, int] = {}  # over the validation text, so far
    for line in read_text(path).split("\n"):
        line = re.sub(r"^\d{9,}\.\d+ ", "", line)  # a time stamp
        if m := SCORE.match(line):
            facts.loss, facts.bpb, took = float(m[2]), float(m[3]), SECONDS.search(m[4])
            facts.plain = max(facts.bpb, facts.plain or 0.0)
            facts.evaluation = seconds_of(*took.groups()) if took else facts.evaluation
            facts.adapted |= passes
        elif m := ADAPTED.match(line):
            passes[m[1] or m[4]] = int(m[2] or 1)
        elif m := re.match(r"total_eval_time: ?([\d.]+)s", line):
            facts.evaluation = max(float(m[1]), facts.evaluation or 0.0)
        elif m := TRAINED.search(line):
            facts.training = seconds_of(*m.groups())
        elif m := TOTAL.match(line):
            facts.total = int(m[1] or m[2])
        elif m := PLAIN_TOTAL.match(line):
            facts.total = facts.total or int(m[1])
        else:
            add_fact(facts, line)
    facts.named = int(named[1] or named[2]) if named else None
    return facts


def add_fact(facts: Facts, line: str):
    """Take in a line that tells one of the plain facts."""
    for pattern, name in ((MODEL, "model"), (TARGETS, "targets"), (DOCUMENTS, "documents"), (RANKS, "ranks"),
                          (SEED, "seed")):
        if m := pattern.match(line):
            setattr(facts, name, int(m[1]))
            return
    if m := re.search(r"tokenizer_path[:=] ?(\S+)", line):
        facts.tokenizer = Path(m[1]).name
    elif m := re.search(r"NVIDIA (?!System|UNIX|-SMI)([A-Z]\w+)", line):
        facts.card = m[1]


def find_logs(folder: Path) -> list[Path]:
    """What may be the logs of a folder: text files, also in logs/."""
    patterns = ("*.log", "*.txt", "logs/*.log", "logs/*.txt")
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def scored_logs(folder: Path) -> list[Facts]:
    """The facts of each log with a score; a run whose log lies there twice counts once."""
    found = {}
    for log in map(read_facts, find_logs(folder)):
        if log.bpb is not None:
            found.setdefault((log.named if log.named is not None else log.seed, log.bpb, log.loss, log.training), log)
    return list(found.values())


# ---- rules -----------------------------------------------------------------------------------------------------------


def check_files(folder: Path, logs: list[Facts], found: Found):
    for name in ("README.md", "submission.json", "train_gpt.py"):
        if not (folder / name).is_file():
            found.ask.append(f"no {name}")
    if not logs:
        found.no.append("no log with a score in it: nothing shows that it was reached")


def check_facts(facts: dict, logs: list[Facts], found: Found):
    """submission.json against the logs."""
    missing = [key for key in ("author", "github_id", "name", "date", "val_bpb") if key not in facts]
    odd = [key for key in ("author", "name", "date") if not isinstance(facts.get(key, ""), str)]
    odd += [key for key in ("val_bpb", "val_loss", "bytes_total") if not is_number(facts.get(key, 0), -1e15, 1e15)]
    if odd:
        found.ask.append(f"submission.json: {', '.join(odd)} is not of its kind")
    missing += ["bytes_total"] if not {"bytes_total", "artifact_bytes", "artifact_bytes_max"} & facts.keys() else []
    if missing:
        found.ask.append(f"submission.json has no {', '.join(missing)}")
    told, shown = facts.get("val_bpb"), [log.bpb for log in logs if log.bpb is not None]
    if not is_number(told, -1e15, 1e15) or not shown:
        return
    mean = statistics.mean(shown)
    if abs(told - mean) > 0.0005:
        found.ask.append(f"submission.json says {told:.5f} BPB; its logs {mean:.5f} on average, {min(shown):.5f} at "
                         "best")


def check_sizes(folder: Path, logs: list[Facts], found: Found):
    """Bytes of each log; where a log counts too much, what the script in the folder makes of it."""
    script = folder / "train_gpt.py"
    here = script.stat().st_size if script.is_file() else None
    for log in logs:
        if log.total is None:
            found.unknown.append(f"{log.path.name}: how many bytes the submission has")
        elif log.total > LIMIT_BYTES:
            smaller = log.model + here if log.model and here else log.total
            if smaller <= LIMIT_BYTES:
                found.ask.append(f"{log.path.name}: counts {log.total:,} bytes, over {LIMIT_BYTES:,}; with the "
                                 f"train_gpt.py that lies here {smaller:,}")
            else:
                found.no.append(f"{log.path.name}: {log.total:,} bytes, over {LIMIT_BYTES:,}")
        elif log.model and here and log.model + here > LIMIT_BYTES:
            found.ask.append(f"{log.path.name}: counts {log.total:,} bytes with {log.total - log.model:,} of code; "
                             f"the train_gpt.py that lies here has {here:,}, with which it is over the limit")


def check_seeds(logs: list[Facts], found: Found):
    for log in logs:
        if log.seed is None:
            found.ask.append(f"{log.path.name}: does not say its seed")
        elif log.named not in (None, log.seed):
            found.ask.append(f"{log.path.name}: is of seed {log.seed}, by its lines")
    same = [log.path.name for log in logs if [other.loss for other in logs].count(log.loss) > 1]
    if same:
        found.ask.append(f"{', '.join(same)}: the same loss to the last digit; are they runs of their own?")
    seeds = [log.seed for log in logs if log.seed is not None]
    if len(set(seeds) or logs) < SEEDS:
        found.ask.append(f"{len(set(seeds) or logs)} seed(s); a record is shown with {SEEDS}")
    if doubled := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        found.ask.append(f"several logs of seed {', '.join(map(str, doubled))}: which one counts?")


def check_times(logs: list[Facts], found: Found):
    for log in logs:
        if log.training is None:
            found.unknown.append(f"{log.path.name}: how long training took")
        elif log.training * (log.ranks or 8) / 8 > LIMIT_SECONDS + LAST_STEP:  # fewer GPUs may take longer
            found.no.append(f"{log.path.name}: training took {log.training:.1f} s, over {LIMIT_SECONDS}")
        if log.evaluation is None:
            found.unknown.append(f"{log.path.name}: how long its evaluation took")
        elif log.evaluation > LIMIT_SECONDS:
            found.no.append(f"{log.path.name}: evaluation took {log.evaluation:.1f} s, over {LIMIT_SECONDS}")
        if (log.ranks not in (None, 8)) or (log.card and "H100" not in log.card):
            found.ask.append(f"{log.path.name}: not 8 x H100: {log.ranks or '?'} x {log.card or '?'}")


def check_scores(logs: list[Facts], found: Found):
    """Leaks and what BPB divides by, as far as a log shows them."""
    for log in logs:
        if not 0 < log.bpb < 100:
            found.no.append(f"{log.path.name}: {log.bpb:g} BPB is no score")
            continue
        if log.adapted:
            passes = ", ".join(f"{count} passes of {name}" for name, count in log.adapted.items())
            found.no.append(f"{log.path.name}: learns the validation text before it is scored ({passes})")
        if log.plain - log.bpb > LEAP:
            found.no.append(f"{log.path.name}: its evaluation takes {log.plain:.4f} BPB to {log.bpb:.4f}, which no "
                            "valid one has come near: are all its probabilities a distribution over tokens, fixed "
                            "before the token is looked at? a hashed n-gram cache's are not")
        published = next((t.PUBLISHED_TARGETS[key] for name, key in PUBLISHED.items() if name in log.tokenizer), None)
        scored = f"{log.path.name}: scored {log.targets or 0:,} tokens"
        if log.targets is None:
            found.unknown.append(f"{log.path.name}: how many tokens were scored")
        elif published and log.targets < published - LONGEST_WINDOW:
            found.no.append(f"{scored}, the published split has about {published:,}")
        elif published and log.targets >= published + 2048:
            found.ask.append(f"{scored}, the published split has about {published:,}: an older one?")
        if log.documents not in (None, SPLIT_DOCUMENTS):
            found.no.append(f"{log.path.name}: scored {log.documents:,} of the split's {SPLIT_DOCUMENTS:,} documents")
        if published:
            counted = published * log.loss / math.log(2) / log.bpb  # of the published split
            if not SPLIT_BYTES[0] <= counted <= SPLIT_BYTES[1]:
                found.no.append(f"{log.path.name}: by val_loss and val_bpb the published split has {counted / 1e6:.1f} "
                                "million bytes, where its text has about 151 million: bytes are counted wrongly")
        elif log.targets:
            counted = log.targets * log.loss / math.log(2) / log.bpb
            if not SPLIT_BYTES[0] <= counted <= SPLIT_BYTES[1]:
                found.ask.append(f"{log.path.name}: val_loss and val_bpb come to {counted / 1e6:.1f} million bytes; "
                                 "the split's text has about 151 million")


def check_makers(folder: Path, logs: list[Facts], found: Found):
    """What the scripts that make the data do by default: a shorter validation split leaves the rest in training."""
    for path in sorted(path for path in folder.glob("*.py") if path.is_file()):
        m = re.search(r"val[-_]docs\b[^\n]*(?:\n[^\n]*)?\bdefault\s*=\s*(\d[\d_]{0,12})", read_text(path))
        count = int(m[1].replace("_", "")) if m else SPLIT_DOCUMENTS
        if count < SPLIT_DOCUMENTS and any(log.targets or log.documents for log in logs):
            found.ask.append(f"{path.name} makes {count:,} validation documents by default and training data of the "
                             f"rest, of which {SPLIT_DOCUMENTS - count:,} are validation documents of the published "
                             f"split: was it called with --val-docs {SPLIT_DOCUMENTS}?")


def check_ours(folder: Path, found: Found) -> bool:
    """All that ./run.sh record demands, of a folder with a log of this script. Whether it is one."""
    if not any(re.search(r"^(config \{|preset:\w+ seed:|code counted: )", read_text(path), re.M) for path in
               find_logs(folder)):
        return False
    try:
        runs = reader.read_all([str(folder)])
        found.no += reasons_against(runs)
        if facts := submitted(folder):
            check_submission(runs, facts, folder)
    except t.UserError as problem:
        found.no.append(str(problem).replace(f"{folder}/", ""))
    return True


# ---- the command line ------------------------------------------------------------------------------------------------


def check(folder: Path) -> tuple[Found, list[Facts]]:
    """All rules on a folder. UserError where it is none, or its submission.json is broken."""
    t.require(folder.is_dir(), f"{folder}: no such folder; give that of a record")
    facts, found = {}, Found()
    if (folder / "submission.json").is_file():
        try:
            facts = json.loads(read_text(folder / "submission.json"))
            t.require(isinstance(facts, dict), f"{folder / 'submission.json'}: not an object; mend it")
        except (ValueError, RecursionError) as error:
            raise t.UserError(f"{folder / 'submission.json'}: broken JSON ({t.one_line(error)}); mend it") from None
    logs = scored_logs(folder)
    check_files(folder, logs, found)
    if facts:
        check_facts(facts, logs, found)
    if not check_ours(folder, found):
        check_sizes(folder, logs, found)
        check_times(logs, found)
        check_scores(logs, found)
        check_makers(folder, logs, found)
    check_seeds(logs, found)
    found.unknown += UNKNOWN
    return found, logs


def tests(logs: list[Facts], theirs: list[float]) -> list[str]:
    """The challenge's test and the board's against another entry, a line each."""
    ours = [log for log in logs if log.bpb]
    if len(ours) < 2:
        return ["one seed: no test is possible"]
    nats = statistics.mean(log.loss / log.bpb for log in ours)  # a token in a bit a byte
    gains = [(statistics.mean(theirs) - log.bpb) * nats for log in ours]
    lines = []
    for claim, margin, level in review.CLAIMS:
        value, freedom, p = review.welch([gain - margin for gain in gains], [score * nats for score in theirs])
        lines.append(f"{claim}, p < {level}: {'passed' if p < level else 'not passed'} (t {value:.2f}, {freedom:.2f} "
                     f"degrees of freedom, p {review.small(p)})")
    return lines


def report(folder: Path, entries: list[list[float]]) -> int:
    """Print what was found. The exit code: 1 where a rule is seen to be broken."""
    try:
        found, logs = check(folder)
    except t.UserError:
        raise
    except (*t.UNREADABLE, MemoryError) as error:  # whatever lies there
        said = f"{type(error).__name__}: {t.one_line(error)[:200]}"
        raise t.UserError(f"{folder}: cannot be checked ({said}); mend its files") from None
    scored = [log.bpb for log in logs]
    mean = f", {statistics.mean(scored):.5f} BPB on average" if scored else ""
    t.show(f"---- {folder}: {len(logs)} log(s){mean}")
    for kind in ("no", "ask", "unknown"):
        for line in dict.fromkeys(getattr(found, kind)):
            t.show(f"{kind + ':':9}{t.one_line(line)}")
    for line in [line for theirs in entries for line in tests(logs, theirs)]:
        t.show(f"{'test:':9}{line}")
    said = "a rule is broken" if found.no else "no rule is seen to be broken"
    t.show(f"{'verdict:':9}{said}" + (f"; {len(set(found.ask))} to ask" if found.ask else ""))
    return int(bool(found.no))


def launched(argv: list[str]) -> int:
    parser = Parser(prog="./run.sh check-record", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of a record")
    parser.add_argument("--reference-bpb", type=scores, action="append", default=[], metavar="X[,X...]",
                        help="scores of an entry to test against, one a seed; may be given again for another entry")
    options = parser.parse_args(argv)
    codes = [answer(lambda folder: report(Path(folder[0]), options.reference_bpb), [folder], "mend the path")
             for folder in options.folders]
    return max(codes)


def main(argv: list[str]) -> int:
    return answer(launched, argv, "mend the path")


if __name__ == "__main__":
    t.leave(main(sys.argv[1:]))
