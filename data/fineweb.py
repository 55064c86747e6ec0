"""prepare.py fineweb: the published FineWeb shards and their tokenizer, from the hub."""

import argparse
import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from errors import PrepareError, first_line
from shards import DATA_ROOT, print_command, shard_fault, shard_name
from texts import TRAIN, VAL
from tokenizer import Tokenizer

REPOS = {  # variant -> dataset repository on the hub
    "sp1024": "willdepueoai/parameter-golf",
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
}


def hub_reader(repo: str, prefix: str, staging: Path) -> Callable[[str], Path]:
    """A function that downloads one file below the repository's `prefix` and returns where in `staging` it lies.

    With `local_dir` the hub client writes there and nowhere else; the chunk cache that it would also fill is turned
    off, so that each byte is on the disk once.
    """
    os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")  # read when the client is imported
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings about retries would break up the bars

    def read(path: str) -> Path:
        remote = f"{prefix}/{path}".lstrip("/")
        try:
            return Path(huggingface_hub.hf_hub_download(repo, remote, repo_type="dataset", local_dir=str(staging)))
        except Exception as error:  # the client's three transports each raise errors of their own
            reason = first_line(error.__cause__ or error)
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise PrepareError(f"disk full at {remote}; free some space and run again") from error
            if "NotFound" in type(error).__name__ and "Local" not in type(error).__name__:
                remedy = "check MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX and HF_TOKEN"
            else:
                remedy = "check the network and HF_ENDPOINT, run again: shards already here are kept"
            raise PrepareError(f"cannot download {remote} of {repo} ({reason}); {remedy}") from error

    return read


def fineweb_plan(manifest_path: Path, name: str, train_shards: int) -> tuple[list[str], str]:
    """Shard file names to fetch and the tokenizer's path, from the hub's manifest. Raises PrepareError."""
    remedy = "check MATCHED_FINEWEB_REPO_ID"
    try:
        manifest = json.loads(manifest_path.read_text())
        dataset = next((entry for entry in manifest["datasets"] if entry["name"] == name), None)
        if dataset is None:
            raise PrepareError(f"the repository has no data set {name}; {remedy}")
        available, val_shards = int(dataset["stats"]["files_train"]), int(dataset["stats"]["files_val"])
        model = next(entry.get("model_path") or entry["path"] for entry in manifest["tokenizers"]
                     if entry["name"] == dataset["tokenizer_name"])
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise PrepareError(f"manifest.json does not describe {name} as expected; {remedy}") from error
    if train_shards > available:
        raise PrepareError(f"{name} has {available} training shards; lower --train-shards {train_shards}")
    counts = ((VAL, val_shards), (TRAIN, train_shards))
    return [shard_name(split, number) for split, count in counts for number in range(count)], model


def fetch_tokenizer(read: Callable[[str], Path], remote: str, folder: Path, variant: str) -> tuple[Path, int]:
    """Downloads the tokenizer into `folder`; returns its file and number of pieces. Raises PrepareError."""
    model = read(remote).read_bytes()
    vocab_size = Tokenizer(model, remote).vocab_size
    if variant != f"sp{vocab_size}":
        fault = f"{remote} has {vocab_size} pieces, not those of {variant}"
        raise PrepareError(f"{fault}; check MATCHED_FINEWEB_REPO_ID")
    target = folder / Path(remote).name
    folder.mkdir(exist_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.write_bytes(model)
    partial.replace(target)
    return target, vocab_size


def fetch_shards(read: Callable[[str], Path], remote: str, folder: Path, names: list[str]) -> None:
    """Downloads the shards that are missing or broken in `folder`; checks each before it gets its name."""
    from tqdm.auto import tqdm

    missing = [name for name in names if not (folder / name).is_file() or shard_fault(folder / name)]
    print(f"{len(names) - len(missing)} of {len(names)} shards are here already", flush=True)
    # `disable=None` hides the bar where stderr is no terminal; a line a shard takes its place there.
    with tqdm(desc="shards", total=len(names), initial=len(names) - len(missing), disable=None) as bar:
        for name in missing:
            path = read(f"{remote}/{name}")
            if fault := shard_fault(path):
                raise PrepareError(f"{name} from the hub is broken ({fault}); report it to the repository")
            os.replace(path, folder / name)
            bar.update()
            if bar.disable:
                print(f"{name}: downloaded", flush=True)


def run_fineweb(args: argparse.Namespace) -> None:
    """Downloads the shards and their tokenizer. Raises PrepareError."""
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID") or REPOS[args.variant]
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    name = f"fineweb10B_{args.variant}"
    root = (args.out or DATA_ROOT).resolve()
    folder, staging = root / "datasets" / name, root / "datasets" / name / ".download"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        read = hub_reader(repo, prefix, staging)
        print(f"asking the hub for {repo}", flush=True)  # without a network it retries for half a minute
        shards, model_path = fineweb_plan(read("manifest.json"), name, args.train_shards)
        model, vocab_size = fetch_tokenizer(read, model_path, root / "tokenizers", args.variant)
        fetch_shards(read, f"datasets/{name}", folder, shards)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing came
    print_command(folder, model, vocab_size)
