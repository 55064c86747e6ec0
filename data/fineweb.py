"""prepare.py fineweb: the published FineWeb shards and their tokenizer, from the hub."""

import argparse
import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from errors import PrepareError, first_line
from shards import DATA_ROOT, as_json, print_command, sha256_file, shard_fault, shard_name
from texts import TRAIN, VAL
from tokenizer import Tokenizer

REPOS = {  # variant -> dataset repository on the hub
    "sp1024": "willdepueoai/parameter-golf",
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
}


class Hub:
    """One revision, the newest, of a dataset repository on the hub, below a prefix.

    With `local_dir` the hub client writes into `staging` and nowhere else; the chunk cache that it would also fill is
    turned off, so that each byte is on the disk once.
    """

    def __init__(self, repo: str, prefix: str, staging: Path):
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")  # read when the client is imported
        import huggingface_hub
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # its warnings about retries would break up the bars
        self._client, self.repo, self._prefix, self._staging = huggingface_hub, repo, prefix, staging
        self.revision = None
        print(f"asking the hub for {repo}", flush=True)
        self.revision = self._metadata("manifest.json").commit_hash

    def read(self, path: str) -> Path:
        """Downloads a file; returns where it lies. Raises PrepareError."""
        with self._explained(path) as remote:
            return Path(self._client.hf_hub_download(
                self.repo, remote, repo_type="dataset", revision=self.revision, local_dir=str(self._staging)))

    def sha256(self, path: str) -> str:
        """SHA-256 of a file of the size of a shard, as the hub states it. Raises PrepareError."""
        return self._metadata(path).etag

    def _metadata(self, path: str):
        with self._explained(path) as remote:
            url = self._client.hf_hub_url(self.repo, remote, repo_type="dataset", revision=self.revision)
            return self._client.get_hf_file_metadata(url)

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[str]:
        """The path in the repository; what goes wrong with it becomes a PrepareError."""
        remote = f"{self._prefix}/{path}".lstrip("/")
        try:
            yield remote
        except Exception as error:  # the client's three transports each raise errors of their own
            reason = first_line(error.__cause__ or error)
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise PrepareError(f"disk full at {remote}; free some space and run again") from error
            raise PrepareError(f"cannot download {remote} of {self.repo} ({reason}); {self._remedy(error)}") from error

    def _remedy(self, error: Exception) -> str:
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = status in (401, 403) or isinstance(error, UnicodeEncodeError)  # no header can hold such a token
        if refused and self._client.get_token():
            return "the hub does not accept HF_TOKEN or the saved login; renew it, or unset it for public data"
        if "NotFound" in type(error).__name__ and "Local" not in type(error).__name__:
            return "check MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX and HF_TOKEN"
        return "check the network and HF_ENDPOINT, run again: shards already here are kept"


def fineweb_plan(manifest_path: Path, name: str, train_shards: int) -> tuple[list[str], str, set[str]]:
    """Shard file names to fetch, the tokenizer's path and the names of all shards there are, from the hub's manifest.
    Raises PrepareError."""
    remedy = "check MATCHED_FINEWEB_REPO_ID"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
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

    def names(split: str, count: int) -> list[str]:
        return [shard_name(split, number) for number in range(count)]

    val = names(VAL, val_shards)
    return val + names(TRAIN, train_shards), model, {*val, *names(TRAIN, available)}


def read_tokenizer(hub: Hub, remote: str, variant: str) -> Tokenizer:
    """Downloads the tokenizer. Raises PrepareError where it is not the variant's."""
    tokenizer = Tokenizer(hub.read(remote).read_bytes(), remote)
    if variant != f"sp{tokenizer.vocab_size}":
        fault = f"{remote} has {tokenizer.vocab_size} pieces, not those of {variant}"
        raise PrepareError(f"{fault}; check MATCHED_FINEWEB_REPO_ID")
    return tokenizer


def write_whole(target: Path, data: bytes) -> None:
    """Writes a file that has its name only when it is whole. Raises OSError, and leaves nothing."""
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def fetch_shards(hub: Hub, remote: str, folder: Path, names: list[str], compare: bool) -> None:
    """Downloads the shards that are missing or broken in `folder`, or with `compare` differ from the hub's; checks
    each before it gets its name."""
    from tqdm.auto import tqdm

    def here(name: str) -> bool:
        path = folder / name
        whole = path.is_file() and not shard_fault(path)
        return whole and (not compare or sha256_file(path) == hub.sha256(f"{remote}/{name}"))

    missing = [name for name in names if not here(name)]
    print(f"{len(names) - len(missing)} of {len(names)} shards are here already", flush=True)
    # `disable=None` hides the bar where stderr is no terminal; a line a shard takes its place there.
    with tqdm(desc="shards", total=len(names), initial=len(names) - len(missing), disable=None) as bar:
        for name in missing:
            path = hub.read(f"{remote}/{name}")
            if fault := shard_fault(path):
                raise PrepareError(f"{name} from the hub is broken ({fault}); report it to the repository")
            os.replace(path, folder / name)
            bar.update()
            if bar.disable:
                print(f"{name}: downloaded", flush=True)


def origin_of(folder: Path) -> dict:
    """What the folder's manifest says of where its shards are from; {} where it says nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["origin"])
    return {}


def fetch(hub: Hub, root: Path, folder: Path, variant: str, train_shards: int) -> tuple[Path, Tokenizer]:
    """Makes `folder` one revision's shards, with a manifest that says which and what tokenizer cut them.

    Shards from elsewhere are kept where they are the same. Until all are, the manifest names no origin: train_gpt.py
    refuses such a folder, and the next launch compares again.
    """
    shards, model_path, available = fineweb_plan(hub.read("manifest.json"), folder.name, train_shards)
    tokenizer = read_tokenizer(hub, model_path, variant)
    present = sorted(path.name for path in folder.glob("fineweb_*.bin"))
    origin = {"repository": hub.repo, "revision": hub.revision}
    compare = bool(present) and origin_of(folder) != origin
    if compare:
        was = " at ".join(map(str, origin_of(folder).values())) or "unknown origin"
        print(f"the shards here are of {was}; comparing them with {hub.repo} at {hub.revision}", flush=True)
        if foreign := sorted(set(present) - available):
            raise PrepareError(f"{folder} holds {foreign[0]}, which {hub.repo} does not have; move it away")
        shards = [*shards, *sorted(set(present) - set(shards))]
    facts = {"kind": "fineweb", "tokenizer": tokenizer.facts()}
    write_whole(folder / "manifest.json", as_json(facts | {"origin": {} if compare else origin}))
    fetch_shards(hub, f"datasets/{folder.name}", folder, shards, compare)
    model = root / "tokenizers" / Path(model_path).name
    write_whole(model, tokenizer.model)
    write_whole(folder / "manifest.json", as_json(facts | {"origin": origin}))
    return model, tokenizer


def run_fineweb(args: argparse.Namespace) -> None:
    """Downloads the shards and their tokenizer. Raises PrepareError."""
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID") or REPOS[args.variant]
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    root = (args.out or DATA_ROOT).resolve()
    folder = root / "datasets" / f"fineweb10B_{args.variant}"
    staging = folder / ".download"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        hub = Hub(repo, prefix, staging)
        model, tokenizer = fetch(hub, root, folder, args.variant, args.train_shards)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing came
    print_command(folder, model, tokenizer.vocab_size)
