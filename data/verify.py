"""prepare.py verify: whether a folder of shards is what it says, and whether its validation split is held out.

What is checked: each shard's header and size; the numbering; token ids against the tokenizer; the tokenizer, tokens,
documents and sha256 of manifest.json, where it says them; of a folder called fineweb10B_sp<V> the published figures;
which documents and runs of 64 tokens of validation stand in training too (see overlap.py).

Each of these that is wrong is a fault. A validation document that is equal to one of training is a fault too, but not
in published data: where manifest.json names one of fineweb.REPOS and a revision, as `./run.sh data` writes it. There,
equal documents are the published split's own. Nobody has published how many it has, and it could not be measured where
this was written. So such a folder's are counted and named, and none is refused. Shared runs are counted and named in
every folder: texts of the web repeat each other.

A document's length counts its BOS. Positions in a shard are tokens from 0, its header apart. Documents are numbered
from 0. The tokens before a split's first BOS belong to no document.

What is not seen: a cut within the last validation document that leaves as many whole blocks of 2,048 targets; text that
both splits have with other tokens, or in runs under 64 tokens.

What it finds is written to FOLDER/verified.json, which train_gpt.py reads. It is stale where a shard came or went, or
one's size or time of change is another:

    date
    files: name, tokens (null where the header is wrong), bytes, mtime (whole seconds) and sha256 of each shard
    tokenizer: name and sha256, or null
    splits: tokens and documents of each, and targets of val (tokens - 1); null where there is none
    published: whether manifest.json names a published repository
    faults, notes: sentences
    equal_documents, of which equal_short have fewer than 64 tokens; shared_documents, with shared_tokens in such runs
    named: the first 20 equal documents, and of the others the 20 with most shared tokens: kind ("equal", "shared"),
        document, shard, offset, tokens, train_shard and train_offset (of a shared run: of its beginning), text (how it
        begins, "" without tokenizer) and shared_tokens
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path

from errors import PrepareError
from fineweb import REPOS, origin_of, write_whole
from shards import DATA_ROOT, HEADER_BYTES, as_json, sha256_file, shard_fault, shard_name
from texts import TRAIN, VAL
from tokenizer import Tokenizer

RESULT = "verified.json"
NAMED = 20  # documents that are named, of each kind
SHOWN = 60  # characters of a document that are shown
SHORT = 64  # tokens; an equal document with fewer may well be chance

# The challenge's validation split: the first 50,000 documents of FineWeb. Scripts of this field cut its targets down to
# a multiple of 2,048 and print what is left, by vocabulary; of other vocabularies nobody printed it.
PUBLISHED = {"documents": 50_000, "targets": {1024: 62_021_632, 8192: 40_540_160}, "multiple": 2048}


def shard_paths(folder: Path, split: str) -> list[Path]:
    """A split's shards, in the order in which train_gpt.py reads them."""
    return sorted(folder.glob(f"fineweb_{split}_*.bin"))


def vocabulary_of(folder: Path) -> int | None:
    """V of a folder called ..._sp<V>."""
    found = re.search(r"_sp(\d+)$", folder.name)
    return int(found[1]) if found else None


def remedy_for(folder: Path, names: str) -> str:
    """What to do about shards with these `names`. A fetch keeps shards whose headers are right, so they have to go."""
    variant = f"sp{vocabulary_of(folder)}"
    if not folder.name.startswith("fineweb10B_") or variant not in REPOS:
        return "make the shards again, with data/prepare.py if it made them"
    option = "" if variant == "sp1024" else f" --variant {variant}"
    return f"remove {names} there and fetch again with ./run.sh data{option}"


def numbering_faults(folder: Path, split: str) -> list[str]:
    """Shards that are missing between others, and names of another form."""
    names = {path.name for path in shard_paths(folder, split)}
    form = re.compile(rf"fineweb_{split}_(\d{{6}})\.bin")
    numbers = sorted(int(found[1]) for found in map(form.fullmatch, names) if found)
    missing = sorted(set(range(numbers[-1] if numbers else 0)) - set(numbers))
    faults = [f"{name} is no name of a shard, and would be read as one; move it away"
              for name in sorted(names - {shard_name(split, number) for number in numbers})]
    if missing:
        are = f" and {len(missing) - 1:,} more are" if len(missing) > 1 else " is"
        faults.append(f"{shard_name(split, missing[0])}{are} missing before {shard_name(split, numbers[-1])}; "
                      "fetch or make the shards again")
    return faults


def read_manifest(folder: Path) -> tuple[dict, list[str]]:
    """manifest.json, {} without one, and what is wrong with it."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, RecursionError):
        return {}, ["manifest.json cannot be read; fetch or make the data again"]
    if manifest.get("origin") == {}:
        return manifest, ["fetching was cut short and the shards may be of several sources; run ./run.sh data again"]
    return manifest, []


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer that lies beside the shards, else FineWeb's for the folder's vocabulary."""
    name = f"fineweb_{vocabulary_of(folder)}_bpe.model"
    places = (folder / "tokenizer.model", folder.parent.parent / "tokenizers" / name, DATA_ROOT / "tokenizers" / name)
    return next((path for path in places if path.is_file()), None)


def load_tokenizer(path: Path | None, manifest: dict) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer, None where there is none that serves, and what is wrong with it."""
    if path is None:
        return None, []
    try:
        tokenizer = Tokenizer(path.read_bytes(), path.name)
    except PrepareError as error:
        return None, [str(error)]
    said, own = manifest.get("tokenizer"), tokenizer.facts()["sha256"]
    if isinstance(said, dict) and said.get("sha256", own) != own:
        return tokenizer, [f"{path.name} is not the tokenizer that cut the shards, by manifest.json; fetch or make "
                           "both again"]
    return tokenizer, []


def id_faults(folder: Path, files: list[dict], highest: dict[str, int], tokenizer: Tokenizer | None) -> list[str]:
    """Shards with token ids that the tokenizer does not have, or the vocabulary that the folder's name tells."""
    size = tokenizer.vocab_size if tokenizer else vocabulary_of(folder)
    beyond = [file["name"] for file in files if size and highest.get(file["name"], 0) >= size]
    return [f"{name} holds token id {highest[name]:,}, the vocabulary has {size:,}; {remedy_for(folder, name)}"
            for name in beyond]


def manifest_faults(folder: Path, manifest: dict, result: dict) -> list[str]:
    """Where the splits are not what manifest.json says of them. A manifest of fetched shards says nothing of them."""
    if "splits" not in manifest:
        return []
    faults, remedy = [], remedy_for(folder, "all")
    try:
        for split, figures in manifest["splits"].items():
            files = {f["name"]: f for f in result["files"] if f["name"].startswith(f"fineweb_{split}_")}
            said = {file["name"]: file["sha256"] for file in figures["files"]}
            lost = [name for name in said if name not in files]
            faults += [f"{name} is named in manifest.json and not there; {remedy}" for name in lost]
            for name, file in files.items():
                if name not in said:
                    faults.append(f"{name} is not named in manifest.json; move it away")
                elif file["sha256"] != said[name]:
                    faults.append(f"the sha256 of {name} is not the one in manifest.json; {remedy}")
            for what in ("tokens", "documents"):
                found = (result["splits"].get(split) or {}).get(what, 0)
                if found != figures[what]:
                    faults.append(f"the {split} split has {found:,} {what}, manifest.json says {figures[what]:,}; "
                                  f"{remedy}")
    except (KeyError, TypeError, AttributeError, ValueError):
        faults.append("manifest.json does not say of its splits what prepare.py writes; make the data again")
    return faults


def published_faults(folder: Path, val: dict | None) -> list[str]:
    """Where the validation split of a folder called as published data has not the published figures."""
    if val is None or not re.fullmatch(r"fineweb10B_sp\d+", folder.name):
        return []
    faults, remedy = [], remedy_for(folder, "fineweb_val_*.bin")
    targets, multiple = PUBLISHED["targets"].get(vocabulary_of(folder)), PUBLISHED["multiple"]
    whole = val["targets"] // multiple * multiple
    if targets and whole != targets:
        faults.append(f"the validation split has {whole:,} targets, the published one {targets:,}: both cut down to a "
                      f"multiple of {multiple:,}; {remedy}")
    if val["documents"] != PUBLISHED["documents"]:
        faults.append(f"the validation split has {val['documents']:,} documents, the published one "
                      f"{PUBLISHED['documents']:,}; {remedy}")
    return faults


def beginning(tokens: list[int], tokenizer: Tokenizer | None) -> str:
    """How a document begins, on one line. `tokens`: from its BOS on."""
    if tokenizer is None:
        return ""
    text = tokenizer.pieces.decode([token for token in tokens[1:] if token < tokenizer.vocab_size])
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else "\ufffd" for c in words[:SHOWN])


def name_documents(found, tokenizer: Tokenizer | None) -> list[dict]:
    """The documents that are named in the result, of a Survey `found`."""
    import numpy as np

    overlap, (val, train) = found.overlap, (found.splits[split] for split in (VAL, TRAIN))
    documents, shared = overlap.documents, overlap.shared
    is_equal = documents.first < len(train)
    most = np.lexsort((np.arange(len(shared)), -shared))
    most = [i for i in most[: NAMED + int(is_equal.sum())].tolist() if shared[i] and not is_equal[i]]
    kinds = [("equal", i) for i in np.flatnonzero(is_equal)[:NAMED].tolist()] + [("shared", i) for i in most[:NAMED]]
    named = []
    for kind, i in kinds:
        begin, length = int(documents.begins[i]), int(documents.lengths[i])
        at = int(documents.first[i]) if kind == "equal" else overlap.in_training(begin, begin + length)
        (shard, offset), (train_shard, train_offset) = val.place(begin), train.place(at)
        text = beginning(val.read(begin, min(length, 4 * SHOWN)).tolist(), tokenizer)
        named.append({"kind": kind, "document": i, "shard": shard, "offset": offset, "tokens": length,
                      "train_shard": train_shard, "train_offset": train_offset, "text": text,
                      "shared_tokens": int(shared[i])})
    return named


def overlap_facts(found, tokenizer: Tokenizer | None) -> dict:
    """The result's entries about what the splits share; zeros where one is missing."""
    if found.overlap is None:
        counts = ("equal_documents", "equal_short", "shared_tokens", "shared_documents")
        return dict.fromkeys(counts, 0) | {"named": []}
    documents, runs = found.overlap.documents, found.overlap.runs
    is_equal = documents.first < found.tokens(TRAIN)
    return {
        "equal_documents": int(is_equal.sum()),
        "equal_short": int((is_equal & (documents.lengths < SHORT)).sum()),
        "shared_tokens": int((runs[:, 1] - runs[:, 0]).sum()),
        "shared_documents": int((found.overlap.shared > 0).sum()),
        "named": name_documents(found, tokenizer),
    }


def list_files(folder: Path) -> tuple[list[dict], dict[str, list[Path]], list[str]]:
    """The result's entries of all shards, without sha256; the whole ones' paths by split; what is wrong with others."""
    files, whole, faults = [], {TRAIN: [], VAL: []}, []
    for split, paths in whole.items():
        for path in shard_paths(folder, split):
            state, fault = path.stat(), shard_fault(path)
            tokens = None if fault else (state.st_size - HEADER_BYTES) // 2
            files.append({"name": path.name, "tokens": tokens, "bytes": state.st_size, "mtime": int(state.st_mtime)})
            if fault:
                faults.append(f"{path.name}: {fault}; {remedy_for(folder, path.name)}")
            else:
                paths.append(path)
    return files, whole, faults


def split_notes(found) -> tuple[list[str], list[str]]:
    """Faults and notes about the splits of a Survey as such."""
    faults, notes = [], []
    for split in (TRAIN, VAL):
        if split not in found.splits:
            faults.append(f"no whole shard of the {split} split, so what the other shares with it is unknown; give the "
                          "folder that is trained on")
        elif not found.begins_with_document(split):
            said = f"the {split} split does not begin with BOS, so not with a document"
            if split == TRAIN:
                notes.append(said)
            else:
                faults.append(f"{said}; fetch or make its shards again")
    return faults, notes


def equal_faults(result: dict) -> list[str]:
    """The fault that equal documents are, outside of published data."""
    equal = result["equal_documents"]
    if not equal or result["published"]:
        return []
    short = f", {result['equal_short']:,} of them under {SHORT} tokens" if result["equal_short"] else ""
    are = "document is" if equal == 1 else "documents are"
    return [f"{equal:,} validation {are} in the training split too{short}; take them out of one of the two, or fetch "
            "published shards with ./run.sh data"]


def check(folder: Path, jobs: int) -> dict:
    """What verified.json is to say of a folder. OSError or PrepareError where it cannot be checked."""
    from overlap import survey

    manifest, faults = read_manifest(folder)
    path = find_tokenizer(folder)
    tokenizer, more = load_tokenizer(path, manifest)
    files, whole, broken = list_files(folder)
    found = survey(whole, jobs)
    shards = {path.name: shard for split, all_of_it in found.shards.items()
              for path, shard in zip(whole[split], all_of_it, strict=True)}
    for file in files:
        file["sha256"] = shards[file["name"]].sha256 if file["name"] in shards else sha256_file(folder / file["name"])
    splits = dict.fromkeys((TRAIN, VAL))
    for split in found.splits:
        splits[split] = {"tokens": found.tokens(split), "documents": found.documents(split)}
    if splits[VAL]:
        splits[VAL]["targets"] = splits[VAL]["tokens"] - 1
    origin = origin_of(folder)
    result = {
        "date": time.strftime("%Y-%m-%d"), "files": files,
        "tokenizer": tokenizer and {"name": path.name, "sha256": tokenizer.facts()["sha256"]}, "splits": splits,
        "published": origin.get("repository") in REPOS.values() and bool(origin.get("revision")),
    } | overlap_facts(found, tokenizer)
    more_faults, notes = split_notes(found)
    result["faults"] = [
        *faults, *more, *broken, *(fault for split in whole for fault in numbering_faults(folder, split)), *more_faults,
        *id_faults(folder, files, {name: shard.highest for name, shard in shards.items()}, tokenizer),
        *manifest_faults(folder, manifest, result), *published_faults(folder, splits[VAL]), *equal_faults(result)]
    result["notes"] = notes + ([] if tokenizer else ["no tokenizer is known, so no text is shown"])
    return result


def share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.2%})" if whole else f"{part:,}"


def report(result: dict) -> None:
    """Prints a result for people, but for its faults."""
    for split, figures in result["splits"].items():
        if figures:
            count = sum(file["name"].startswith(f"fineweb_{split}_") for file in result["files"])
            targets = f", {figures['targets']:,} targets" if "targets" in figures else ""
            print(f"  {split}: {count:,} shard{'s' * (count != 1)}, {figures['tokens']:,} tokens{targets}, "
                  f"{figures['documents']:,} documents")
    if all(result["splits"].values()):
        val = result["splits"][VAL]
        whose = "; the data is the published split, so they are its own" if result["published"] else ""
        print(f"  validation documents that training has too: {share(result['equal_documents'], val['documents'])}, "
              f"{result['equal_short']:,} of them under {SHORT} tokens{whose}")
        report_named(result, "equal")
        print(f"  validation tokens in runs of 64 or more that training has too: "
              f"{share(result['shared_tokens'], val['tokens'])}, in "
              f"{share(result['shared_documents'], val['documents'])} documents")
        report_named(result, "shared")
    for note in result["notes"]:
        print(f"  note: {note}")


def report_named(result: dict, kind: str) -> None:
    named = [entry for entry in result["named"] if entry["kind"] == kind]
    if kind == "shared" and named:
        print(f"  most of them{', equal documents apart' * bool(result['equal_documents'])}:")
    for entry in named:
        what = f"{entry['shared_tokens']:,} of " if kind == "shared" else ""
        text = f": {entry['text']}" if entry["text"] else ""
        print(f"    document {entry['document']:,} ({entry['shard']} at {entry['offset']:,}, {what}{entry['tokens']:,} "
              f"tokens), {entry['train_shard']} at {entry['train_offset']:,}{text}")


def verify(folder: Path, jobs: int) -> bool:
    """Checks a folder, prints what it is and writes verified.json. Whether nothing is wrong. PrepareError"""
    print(folder, flush=True)
    try:
        before = list_files(folder)[0]
        result = check(folder, jobs)
        if before != list_files(folder)[0]:
            raise PrepareError(f"{folder} changed while it was read; run again when nothing writes there")
    except OSError as error:
        raise PrepareError(f"{error.filename or folder}: cannot be read ({error.strerror or error}); mend its "
                           "permissions or the disk") from error
    report(result)
    try:
        write_whole(folder / RESULT, as_json(result))
    except OSError as error:
        print(f"warning: {folder / RESULT} cannot be written ({error.strerror or error})", file=sys.stderr)
    sys.stdout.flush()
    for fault in result["faults"]:
        print(f"error: {folder}: {fault}", file=sys.stderr)
    count = len(result["faults"])
    print(f"  {count:,} fault{'s' * (count != 1)}" if count else "  nothing is wrong", flush=True)
    return not result["faults"]


def holds_shards(folder: Path) -> bool:
    return any(shard_paths(folder, split) for split in (TRAIN, VAL))


def folders_to_check(given: list[Path]) -> list[Path]:
    """The folders given, else the one of DATA_PATH, else those that lie beside this script. PrepareError where there is
    none, or one without shards."""
    named = os.environ.get("DATA_PATH")
    folders, source = given or ([Path(named)] if named else []), "" if given else "DATA_PATH="
    for folder in folders:
        if not folder.is_dir():
            raise PrepareError(f"{source}{folder}: no such folder; name one that holds shards")
        if not holds_shards(folder):
            raise PrepareError(f"{source}{folder} holds no shards; name a folder that does, or fetch them with "
                               "./run.sh data")
    datasets = DATA_ROOT / "datasets"
    folders = folders or sorted(path for path in datasets.glob("*") if path.is_dir() and holds_shards(path))
    if not folders:
        raise PrepareError(f"no shards in {datasets}; fetch them with ./run.sh data, or name a folder")
    return [Path(os.path.abspath(folder)) for folder in folders]  # so that "." has a name


def run_verify(args: argparse.Namespace) -> int:
    """Checks each folder. 0: nothing is wrong; 1: something is; 2: one could not be checked. PrepareError"""
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # documents may hold any character
    code = 0
    for folder in folders_to_check(args.folders):
        try:
            code = max(code, 0 if verify(folder, args.jobs) else 1)
        except PrepareError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            code = 2
    return code
