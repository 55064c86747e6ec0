"""prepare.py embedded: a corpus of what is installed anyway, the docstrings of Python, torch and numpy."""

import argparse
import ast
import inspect
import json
import platform
import warnings
from pathlib import Path

from errors import PrepareError, first_line
from shards import DATA_ROOT, SHARD_TOKENS, check_replaceable, sha256_file, write_corpus
from texts import TRAIN, VAL, split_of, text_hash
from tokenizer import train_tokenizer

RECIPE = 2  # part of the corpus's identity: raise it whenever the way the corpus is made changes
MIN_DOCSTRING_CHARS = 64  # shorter ones say little more than the name they belong to
VAL_FRACTION = 0.05
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor"}


def parse_quietly(path: Path) -> ast.Module:
    """Syntax tree of a Python file, which is not run. Raises SyntaxError or ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in other people's strings
        return ast.parse(path.read_bytes())


def docstrings(path: Path) -> str:
    """A Python file's docstrings in the order they stand in it, joined into one document; "" if none.

    One document a file, not one a docstring: a single docstring is mostly too short (a few hundred bytes) for a
    language model to use what came before, and those of one file are about one thing.
    """
    try:
        tree = parse_quietly(path)
    except (SyntaxError, ValueError):  # a template, or code for another Python version
        return ""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= MIN_DOCSTRING_CHARS:
                found.append((getattr(node, "lineno", 0), text))
    found.sort(key=lambda item: item[0])
    return "\n\n".join(text for _, text in found)


def language_reference(stdlib: Path) -> list[str]:
    """The topics of the language reference that `help()` shows, each one document. Raises PrepareError."""
    path = stdlib / "pydoc_data" / "topics.py"
    try:
        for node in parse_quietly(path).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
                return [inspect.cleandoc(text) for text in ast.literal_eval(node.value).values()]
        reason = "no `topics` in it"
    except (OSError, ValueError, SyntaxError) as error:
        reason = first_line(error)
    raise PrepareError(f"cannot read {path} ({reason}); install the complete Python standard library")


def embedded_texts(roots: list[Path]) -> list[str]:
    """The documents, without duplicates, in an order that mixes the sources. The first root is the standard library."""
    files = [path for root in roots for path in sorted(root.rglob("*.py"))
             if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])]
    by_hash = {}
    for text in [*language_reference(roots[0]), *map(docstrings, files)]:
        text = text.encode(errors="ignore").decode()  # a docstring may hold half a surrogate pair
        if text.strip():
            by_hash[text_hash(text)] = text
    return [by_hash[digest] for digest in sorted(by_hash, key=lambda digest: digest[8:])]


def find_sources() -> tuple[dict[str, str], list[Path]]:
    """The versions that decide what the corpus holds, and the folders it is made of. Raises PrepareError."""
    import importlib.metadata
    import importlib.util
    import sysconfig

    versions = {"recipe": str(RECIPE), "python": platform.python_version()}
    roots = [Path(sysconfig.get_path("stdlib"))]
    try:
        for package in ("torch", "numpy", "sentencepiece"):
            versions[package] = importlib.metadata.version(package)
        for package in ("torch", "numpy"):
            roots.append(Path(importlib.util.find_spec(package).origin).parent)  # found without importing it
    except importlib.metadata.PackageNotFoundError as error:
        raise PrepareError(f"{error.name} is not installed; install it, the corpus is made of it") from error
    return versions, roots


def finished_corpus(out: Path, versions: dict[str, str], vocab_size: int) -> bool:
    """Whether `out` is a whole embedded corpus of these versions. PrepareError if it is none at all."""
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        if manifest["kind"] != "embedded":
            raise ValueError("another kind")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrepareError(f"{out} is no embedded corpus; remove it or choose another --out") from error
    try:
        if manifest["versions"] != versions or manifest["tokenizer"]["vocab_size"] != vocab_size:
            return False
        hashes = {"tokenizer.model": manifest["tokenizer"]["sha256"]}
        for split in (TRAIN, VAL):
            hashes |= {file["name"]: file["sha256"] for file in manifest["splits"][split]["files"]}
        return all(sha256_file(out / name) == digest for name, digest in hashes.items())
    except (OSError, KeyError, TypeError):
        return False


def run_embedded(args: argparse.Namespace) -> None:
    """Builds the corpus unless it is there already. Raises PrepareError."""
    out = (args.out or DATA_ROOT / "datasets" / f"embedded_sp{args.vocab_size}").resolve()
    versions, roots = find_sources()
    if out.exists():
        if finished_corpus(out, versions, args.vocab_size):
            print(f"{out} is complete and up to date")
            return
        check_replaceable(out)
    print("reading the docstrings of Python, torch and numpy", flush=True)
    documents = [(split_of(text, VAL_FRACTION), text) for text in embedded_texts(roots)]
    tokenizer = train_tokenizer((text for split, text in documents if split == TRAIN), args.vocab_size)
    write_corpus(documents, out, tokenizer, SHARD_TOKENS, {"kind": "embedded", "versions": versions})
