"""What ./run.sh check-record says of published entries, beside what reviewers said of them.

    git clone https://github.com/openai/parameter-golf && cd parameter-golf
    git fetch origin 'refs/pull/*/head:refs/pull/*/head' && cd ..
    python verdicts.py parameter-golf

The entries that were merged are those of records/track_10min_16mb. What was said of the others stands in their threads.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3] / "tools")]
import check_record  # noqa: E402

TRACK = "records/track_10min_16mb/"
ADAPTS, CACHE = "adapts before scoring", "hashed n-gram cache"
SAID = {  # pull request -> what reviewers, or the author after them, said
    150: ADAPTS, 406: ADAPTS, 555: ADAPTS, 672: ADAPTS, 1376: ADAPTS, 1482: ADAPTS, 1485: ADAPTS, 1487: ADAPTS,
    1488: ADAPTS, 1517: ADAPTS, 1539: ADAPTS, 1972: ADAPTS,
    758: CACHE, 763: CACHE, 769: CACHE, 770: CACHE, 777: CACHE, 779: CACHE, 797: CACHE, 948: CACHE,
    581: ADAPTS, 2018: "validation documents in training", 2130: "validation documents in training",
    1945: "stands", 1953: "stands", 2014: "stands", 2135: "stands"}
FOLDERS = {150: "2026-03-20_11L_SmearGate_OrthoInit_SWA_TTT",  # of those that have several
           1945: "2026-04-30_V19_PR1908_AsymLogit_WD2",
           2130: "2026-04-24_PR1797Base_QKGainSched_OptRot_AdamHD_LaCT"}


def git(clone: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", str(clone), *words], check=True, capture_output=True).stdout


def names(clone: Path, tree: str) -> list[str]:
    return git(clone, "ls-tree", "-r", "-z", "--name-only", tree, TRACK).decode().split("\0")


def folders(clone: Path, tree: str) -> dict[str, list[str]]:
    """The texts of each record's folder."""
    found: dict[str, list[str]] = {}
    for name in names(clone, tree):
        if name.endswith((".log", ".txt", ".json", ".py", ".md")):
            found.setdefault(name.removeprefix(TRACK).partition("/")[0], []).append(name)
    return found


def taken_out(clone: Path, tree: str, files: list[str], to: Path):
    for name in files:
        path = to / Path(name).relative_to(TRACK)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(git(clone, "show", f"{tree}:{name}"))


def entries(clone: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """Whose, tree, folder and files of each entry."""
    merged = folders(clone, "HEAD")
    for folder, files in merged.items():
        yield "merged", "HEAD", folder, files
    for number in SAID:
        tree = f"refs/pull/{number}/head"
        base = folders(clone, git(clone, "merge-base", "HEAD", tree).decode().strip())
        own = {name: files for name, files in folders(clone, tree).items() if name not in {*base, *merged}}
        folder = FOLDERS.get(number) or max(own, key=lambda name: f"{TRACK}{name}/submission.json" in own[name])
        yield f"PR {number}", tree, folder, own[folder]


def main(clone: Path):
    few, readable, leaps = set(), set(), {"accepted": [], CACHE: []}
    for whose, tree, folder, files in entries(clone):
        with tempfile.TemporaryDirectory() as place:
            taken_out(clone, tree, files, Path(place))
            found, logs = check_record.check(Path(place, folder))
        said = "accepted" if whose == "merged" else SAID[int(whose[3:])]
        kinds = [re.sub(r" \([^)]*\)|, .*", "", re.sub(r"\d[\d.,]*\d", "N", line)) for line in found.no]
        reasons = {kind.partition(": ")[2] or kind for kind in kinds}
        broken = "; ".join(sorted(reasons)) or "nothing broken"
        print(f"{whose:8} {folder[:56]:56} {len(logs)} logs | {said} | {broken} | {len(set(found.ask))} to ask")
        if whose == "merged":
            few |= {folder for line in found.ask if "seed(s); a record is shown" in line}
            readable |= {folder for line in found.ask if "with which it is over the limit" in line}
        if said in leaps:
            leaps[said] += [log.plain - log.bpb for log in logs]
    cached = min(leap for leap in leaps[CACHE] if leap > check_record.LEAP)
    print(f"merged: {len(few)} with fewer than three seeds, {len(readable)} with a readable script for a packed one")
    print(f"evaluations of those gain {max(leaps['accepted']):.4f} BPB at most, with a cache {cached:.4f} or more")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
