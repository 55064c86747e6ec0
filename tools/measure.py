#!/usr/bin/env python3
"""All that a new machine, a GPU above all, can tell about train_gpt.py: eight minutes, most knowledge first.

    ./run.sh measure                                               the plan below, but for its last three stages
    ./run.sh measure --stages tests,step,export --limit 200 --out FOLDER      in two commands: the first three in three
    ./run.sh measure --stages ttt,audit,run --limit 320 --out FOLDER          minutes, and the next three in five
    ./run.sh measure --stages frontier,peers --against OTHER/train_gpt.py --out FOLDER      at a later hour
    ./run.sh measure --report --out FOLDER                         records/gpu/DATE_CARD: tables, plot, estimate;
                               with FOLDER/counts.json, of tools/step_cost.py --json, also where time goes beyond
                               what is counted; FOLDER/notes.md, in your own words, becomes a part of it

Each stage is a process with its own time limit, and each figure is in FOLDER/measure.json from the moment it is known.
A stage that fails or is killed leaves the figures it has; one that is done is not repeated in the same folder, unless
train_gpt.py has changed: then what it found before stays beside it.
The compiler's cache is kept in FOLDER too, in parts under 16 MiB, and taken up again from there, so a stage that was
killed while it compiled has less to do the next time. Nothing is fetched: torch, numpy, sentencepiece and zstandard
must be importable; pytest for the tests, matplotlib for the report's plot.

Data and variables are those of train_gpt.py (DATA_PATH, MODEL_DIM, ...) and win over a stage's own, but for those that
the stage is about (PRESET in frontier and presets). All stages take one vocabulary, of 1024 pieces unless VOCAB_SIZE is
given: VOCAB_SIZE=8192 is what PRESET=frontier was made for. Scripts of this field divide a step into 8 passes on one
GPU: TRAIN_BATCH_TOKENS=786432 MICRO_BATCH_SEQS=48 gives each pass what one of eight GPUs has, for ours too.

The plan, with seconds for one H100 whose cache is empty; those of step, export, ttt and audit are what they took there
and some to spare, the others are guessed:
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools")]

import corpus  # noqa: E402
import measure_book as book_of  # noqa: E402

TESTS = ROOT / "tests" / "test_cuda.py"
TOKENS = 98_304  # a step of each of eight GPUs
PLAN = {  # stage: (seconds, what it tells)
    "tests": (60, "the tests that need a GPU"),
    "step": (90, "a training step: first, median, tokens/s, share of the peak, memory, attention, kernels by class"),
    "export": (30, "calibration, a rounding, the whole search; loss added at the limit"),
    "ttt": (130, "test-time training at the shape of eight GPUs: graphs, ms an iteration, seconds for FineWeb"),
    "audit": (50, "a tiny whole run, not compiled, and its audit"),
    "run": (120, "PRESET=seed: training, export, read back, sliding evaluation"),
    "frontier": (180, "the same with PRESET=frontier"),
    "peers": (120, "for each --against SCRIPT: its step beside ours"),
    "presets": (600, "seed against frontier at equal seconds, in turn, until the time is up"),
}
USUAL = list(PLAN)[:6]
LATER = {"frontier", "presets"}  # always of a full-size preset
LOG, PART, PART_BYTES, PARTS = "measure.log", "cache.tar.zst", 15 * 2**20, 3
RESERVE = 5.0  # seconds of --limit for what comes after the stages
OWN = ("RESUME", "RUN_ID", "NLL_DUMP", "LOG_DIR")  # variables that stages have of their own
INTERMEDIATE = {".ttir", ".ttgir", ".llir", ".source", ".ptx"}  # of Triton: read by people only


def fail(problem: str):
    sys.stderr.write("error: " + " ".join(problem.splitlines()) + "\n")
    sys.exit(2)


def tell(text: str):
    print(text, flush=True)


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str):
        fail(f"{message}; --help says how")


# ---- the compiler's cache --------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where compiled code is kept: the same on each machine, since Triton's cache holds whole paths."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or
                Path(tempfile.gettempdir(), f"measure_cache_{os.getuid()}")).absolute()


def cached(cache: Path) -> list[Path]:
    """The files of the cache, those first that are worth most."""
    files = [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith((".lock", ".tmp"))]
    return sorted(files, key=lambda path: (path.suffix in INTERMEDIATE, path.stat().st_size, path))


class Parts:
    """A file written in parts of PART_BYTES."""

    def __init__(self, folder: Path):
        self.folder, self.total, self.file = folder, 0, None

    def write(self, data: bytes) -> int:
        data, size = memoryview(data), len(data)
        while data:
            if self.total % PART_BYTES == 0:
                self.close()
                self.file = open(self.folder / f"{PART}.{self.total // PART_BYTES}", "wb")
            done = self.file.write(data[: PART_BYTES - self.total % PART_BYTES])
            self.total, data = self.total + done, data[done:]
        return size

    def close(self):
        if self.file:
            self.file.close()


def keep_cache(cache: Path, out: Path, state: dict):
    """Write the cache into `out`, in parts; what would not fit is left out, and said. Nothing where it is unchanged."""
    import tarfile

    import zstandard

    files = cached(cache)
    now = len(files), sum(path.stat().st_size for path in files)
    if not files or state.get("cache") == now:
        return
    state["cache"], left = now, []
    for old in out.glob(f"{PART}.*"):
        old.unlink()
    parts = Parts(out)
    with zstandard.ZstdCompressor(level=6).stream_writer(parts, closefd=False) as packed:
        with tarfile.open(fileobj=packed, mode="w|", bufsize=512) as tar:
            for path in files:
                if parts.total + path.stat().st_size > PARTS * PART_BYTES - 2**16:  # as if it could not be compressed
                    left.append(path)
                    continue
                tar.add(path, path.relative_to(cache), recursive=False)
                packed.flush()  # so that the total is known
    parts.close()
    if left:
        tell(f"cache: {len(left)} of {len(files)} files do not fit {PARTS} parts and are left out")


def take_cache(out: Path, cache: Path):
    """Unpack what an earlier call left in `out`, unless the cache is there already."""
    import tarfile

    import zstandard

    parts = sorted(out.glob(f"{PART}.*"))
    if not parts or cached(cache):
        return
    cache.mkdir(parents=True, exist_ok=True)
    data = b"".join(part.read_bytes() for part in parts)
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
            tar.extractall(cache, filter="data")
        tell(f"cache: {len(cached(cache))} files taken up")
    except (zstandard.ZstdError, tarfile.TarError, OSError) as error:
        tell(f"cache: cannot be taken up ({' '.join(str(error).splitlines())}); it is made again")


# ---- one stage -------------------------------------------------------------------------------------------------------


def children(root: int) -> list[int]:
    """The processes that descend from `root`, in whatever group: a launcher gives its workers groups of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def end(process: subprocess.Popen):
    """Kill a stage and all that it started."""
    others = children(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for other in others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)
    process.wait()


def command_of(name: str, options: argparse.Namespace, work: Path, seconds: float) -> list[str]:
    """What runs a stage. Raises BookError, with the reason, where it cannot run here."""
    if name != "tests":
        order = {"out": str(options.out), "work": str(work), "tokens": options.tokens, "steps": options.steps,
                 "train_seconds": options.seconds, "limit": seconds, "rounds": options.rounds,
                 "against": list(map(str, options.against))}
        return [sys.executable, str(ROOT / "tools" / "measure_stages.py"), name, json.dumps(order)]
    for holds, why in ((importlib.util.find_spec("pytest"), "pytest is not installed here"),
                       (TESTS.is_file(), f"no {TESTS.parent.name}/{TESTS.name} here")):
        if not holds:
            raise book_of.BookError(why)
    return [sys.executable, "-m", "pytest", "-q", "-p", "measure_book", "-p", "no:cacheprovider",
            "--rootdir", str(TESTS.parent.parent), str(TESTS)]  # by which tests are named


def last_words(log: Path, begin: int) -> str:
    """The last line that a stage printed."""
    with open(log, "rb") as file:
        file.seek(max(begin, log.stat().st_size - 4000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def attempt(name: str, seconds: float, options: argparse.Namespace, work: Path) -> tuple[str, str]:
    """Run a stage for at most so long. Returns its status and, unless it is done, why."""
    log, work = options.out / LOG, work / name
    work.mkdir(exist_ok=True)
    try:
        command = command_of(name, options, work, seconds)
    except book_of.BookError as problem:
        return "failed", str(problem)
    environment = {n: v for n, v in os.environ.items() if n not in OWN} | {
        book_of.FOLDER_VARIABLE: str(options.out), "LOG_DIR": str(work), "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache_folder()), "TRITON_CACHE_DIR": str(cache_folder() / "triton")}
    if name == "tests":  # which look for the plugin
        path = [environment.get("PYTHONPATH"), str(ROOT / "tools")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    with open(log, "ab") as out:
        out.write(f"\n==== {name}, at most {seconds:.0f} s\n".encode())
        out.flush()
        begin = out.tell()
        process = subprocess.Popen(  # in a group of its own, not a session: who ends this one's session ends all
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=work, preexec_fn=os.setpgrp)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "killed", f"at its limit of {seconds:.0f} s"
        finally:
            end(process)
    if code == 0 or (name == "tests" and code == 1):  # tests that failed have told what they had to
        return "done", ""
    return "failed", f"exit code {code}: {last_words(log, begin)}"


def stage(name: str, seconds: float, options: argparse.Namespace, work: Path):
    """Run a stage and enter how it went. What an earlier attempt had found stays beside it."""
    book = book_of.read(options.out)
    before = book["stages"].get(name, {})
    earlier = before.pop("earlier", []) + ([before] if before.get("figures") else [])
    book["stages"][name] = {"status": "running", "began": time.strftime("%Y-%m-%d %H:%M:%S"), "limit": seconds,
                            "script": options.script, "cached_files": len(cached(cache_folder())),
                            **({"earlier": earlier} if earlier else {})}
    book_of.write(options.out, book)
    began, (status, why) = time.monotonic(), ("killed", "with the whole call")
    try:
        status, why = attempt(name, seconds, options, work)
    finally:
        book = book_of.read(options.out)
        entry = book["stages"][name]
        entry |= {"status": status, "took": round(time.monotonic() - began, 2)} | ({"why": why} if why else {})
        book_of.write(options.out, book)
    tell(f"== {name}: {status}{f', {why}' if why else ''}; {entry['took']:.1f} s")
    for key, value in entry.get("figures", {}).items():
        why = entry.get("missing", {}).get(key)
        tell(f"  {key}: {f'none, {why}' if why else brief(value)}")


def brief(value) -> str:
    """A figure in a line."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {brief(entry)}" for key, entry in value.items())[:400]
    return (", ".join(map(brief, value)) if isinstance(value, list) else str(value))[:400]


# ---- the whole -------------------------------------------------------------------------------------------------------


def has_gpu() -> bool:
    """As train_gpt.py tells it without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "any").strip() in ("", "-1")
    return not hidden and any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def find_data():
    """Data for the stages, which run in other folders: DATA_PATH, else FineWeb's shards, else the embedded corpus, here
    or in the project, as train_gpt.py seeks them."""
    named, vocabulary = os.environ.get("DATA_PATH"), os.environ.setdefault("VOCAB_SIZE", "1024")
    places = [Path("data").absolute(), ROOT / "data"]
    folders = [place / "datasets" / f"{kind}_sp{vocabulary}" for kind in ("fineweb10B", "embedded") for place in places]
    folder = Path(named) if named else next((f for f in folders if f.is_dir()), None)
    if named and not folder.is_dir():
        fail(f"DATA_PATH={named}: no such folder; unset it or make it with data/prepare.py")
    folder = folder or corpus.make(vocabulary)
    os.environ["DATA_PATH"] = str(folder.absolute())
    models = [place / "tokenizers" / f"fineweb_{vocabulary}_bpe.model" for place in places]
    model = os.environ.get("TOKENIZER_PATH") or next((m for m in models if m.exists()), None)
    if model and (os.environ.get("TOKENIZER_PATH") or not (folder / "tokenizer.model").exists()):
        os.environ["TOKENIZER_PATH"] = str(Path(model).absolute())


def check(options: argparse.Namespace):
    """Refuse in one line what train_gpt.py would refuse; enter what runs, and with which variables."""
    environment = {"VAL_TOKEN_LIMIT": "1024"} | {n: v for n, v in os.environ.items() if n not in OWN}
    if options.tokens:
        environment.setdefault("TRAIN_BATCH_TOKENS", str(options.tokens))
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), "--check"], env=environment,
                          capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        problems = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        fail(problems[0].removeprefix("error: ") if problems else f"train_gpt.py --check: exit code {done.returncode}")
    with open(options.out / LOG, "a", encoding="utf-8") as log:
        log.write(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} train_gpt.py --check\n{done.stdout}")


def undone(options: argparse.Namespace, names: list[str]) -> list[str]:
    """Those of the stages that are not done yet with this train_gpt.py."""
    entries = book_of.read(options.out)["stages"]
    return [name for name in names if name not in entries or entries[name]["status"] != "done"
            or entries[name].get("script") != options.script]


def allowance(name: str, options: argparse.Namespace) -> float:
    """Seconds that a stage may take: the plan's, and what --limit leaves beside the stages after it; 0 where it no
    longer fits."""
    if not options.limit:
        return options.budget[name]
    left = options.limit - RESERVE - (time.monotonic() - options.began)
    if name == "presets":
        return left if left >= 1 else 0.0
    spare = left - sum(options.budget[n] for n in undone(options, options.stages[options.stages.index(name) :]))
    return options.budget[name] + max(spare, 0.0) if left >= options.budget[name] else 0.0


def skip(name: str, options: argparse.Namespace):
    """Say, and enter, that a stage no longer fits."""
    left = options.limit - RESERVE - (time.monotonic() - options.began)
    why = f"needs {options.budget[name]:.0f} s where {max(left, 0):.0f} s of --limit {options.limit:g} are left"
    book = book_of.read(options.out)
    book["stages"][name] = book["stages"].get(name, {}) | {"status": "skipped", "why": why}
    book_of.write(options.out, book)
    tell(f"== {name}: skipped, {why}")


def run_stages(options: argparse.Namespace, work: Path) -> int:
    """The stages that were asked for, as far as time allows. Returns the exit code."""
    state = {}
    for name in options.stages:
        if not undone(options, [name]):
            tell(f"== {name}: done before, not repeated")
        elif seconds := allowance(name, options):
            stage(name, seconds, options, work)
            keep_cache(cache_folder(), options.out, state)
        else:
            skip(name, options)
    if bad := undone(options, options.stages):
        sys.stderr.write(f"not done: {', '.join(bad)}; the same command again tries these only\n")
    return int(bool(bad))


def trim_log(path: Path):
    """Keep the log under the size of a part: its beginning and its end."""
    if path.exists() and path.stat().st_size > PART_BYTES:
        text = path.read_bytes()
        path.write_bytes(text[: 2**20] + b"\n[...]\n" + text[2**20 - PART_BYTES + 100 :])


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line. Ends the process, in one line, where it makes no sense."""
    plan = "\n".join(f"    {name:10}{seconds:4}  {text}" for name, (seconds, text) in PLAN.items())
    parser = Parser(prog="./run.sh measure", description=__doc__ + plan, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(USUAL), metavar="A,B", help="which, in the order of the plan "
                        "(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where all of it goes (LOG_DIR/measure)")
    parser.add_argument("--limit", type=float, default=0.0, metavar="SECONDS", help="of the whole command: what no "
                        "longer fits is skipped, what is spare is given to the stage that needs it (none)")
    parser.add_argument("--budget", action="append", default=[], metavar="STAGE=SECONDS", help="other seconds for a "
                        "stage than the plan's")
    parser.add_argument("--against", action="append", default=[], type=Path, metavar="SCRIPT", help="another script of "
                        "this field, for the stage peers; may be repeated")
    parser.add_argument("--tokens", type=int, help=f"a training step ({TOKENS}; without a GPU the preset's)")
    parser.add_argument("--steps", type=int, default=20, help="training steps that are timed (%(default)s)")
    parser.add_argument("--seconds", type=float, default=45.0, help="training of each whole run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="of presets, each a run of both, at most (%(default)s)")
    parser.add_argument("--report", action="store_true", help="make records/gpu/DATE_CARD of --out, and nothing else")
    parser.add_argument("--records", type=Path, default=ROOT / "records", metavar="FOLDER", help="records/ of this "
                        "project")
    options = parser.parse_args(argv)
    options.out = (options.out or Path(os.environ.get("LOG_DIR") or "logs", "measure")).absolute()
    return options if options.report else checked(options)


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options, in the form that the stages take them; one line where they make no sense."""
    named = [name for name in options.stages.split(",") if name]
    for name in [*named, *(entry.partition("=")[0] for entry in options.budget)]:
        if name not in PLAN:
            fail(f"{name[:80]}: no such stage; the stages are {', '.join(PLAN)}")
    options.stages = [name for name in PLAN if name in named]
    options.budget = {name: float(seconds) for name, (seconds, _) in PLAN.items()} | budgets(options.budget)
    options.against = [path.absolute() for path in options.against]
    if "peers" in options.stages:
        options.budget["peers"] *= max(len(options.against), 1)
    if not named:
        fail("--stages: name at least one")
    for holds, problem in (
            (options.tokens is None or options.tokens > 0, "--tokens must be at least 1"),
            (options.steps >= 2, "--steps must be at least 2"),
            (options.rounds >= 1, "--rounds must be at least 1"),
            (0 < options.seconds < 1e6, "--seconds must be above 0"),
            (0 <= options.limit < 1e6, "--limit must be above 0"),
            (options.against or "peers" not in named, "--stages peers: name the scripts with --against"),
            (not options.against or "peers" in named, "--against: is for the stage peers; name it with --stages"),
            (has_gpu() or "MODEL_DIM" in os.environ or not LATER & set(named), f"--stages {named[-1]}: no GPU here; "
             "set MODEL_DIM, NUM_HEADS, TRAIN_SEQ_LEN and TRAIN_BATCH_TOKENS to a size for this CPU")):
        if not holds:
            fail(problem)
    for path in options.against:
        if not path.is_file():
            fail(f"--against {path}: no such file")
    options.tokens = options.tokens or (TOKENS if has_gpu() else None)
    return options


def budgets(entries: list[str]) -> dict[str, float]:
    """Seconds by stage, of STAGE=SECONDS."""
    found = {}
    for entry in entries:
        name, _, seconds = entry.partition("=")
        try:
            found[name] = float(seconds)
        except ValueError:
            found[name] = 0.0
        if not 0 < found[name] < 1e6:
            fail(f"--budget {entry[:80]}: give STAGE=SECONDS")
    return found


def launched(argv: list[str]) -> int:
    """One call. Returns the exit code: 0 all is done, 1 something is not."""
    began = time.monotonic()
    options = read_arguments(argv)
    options.began = began
    book_of.read(options.out)
    if options.report:
        import measure_report

        return measure_report.make(options.out, options.records)
    options.out.mkdir(parents=True, exist_ok=True)
    lock = open(options.out / LOG, "a", encoding="utf-8")  # held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{options.out}: another call measures into it, and both would be slower; wait for it or choose another "
             "--out")
    find_data()
    options.script = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    check(options)
    take_cache(options.out, cache_folder())
    work = Path(tempfile.mkdtemp(prefix="measure_"))
    try:
        code = run_stages(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        trim_log(options.out / LOG)
        for partial in options.out.glob(f".{book_of.NAME}.*"):  # of a stage that was killed while it wrote
            partial.unlink()
    tell(f"all of it: {options.out}, {time.monotonic() - began:.0f} s")
    return code


def main(argv: list[str]) -> int:
    try:
        return launched(argv)
    except book_of.BookError as problem:
        fail(str(problem))
    except OSError as problem:
        fail(f"{problem.filename or 'output'}: {problem.strerror}; mend the path or make room")


if __name__ == "__main__":
    for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as an exception, so that no stage is left running
        if caught != signal.SIGHUP or signal.getsignal(caught) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(caught, lambda number, frame: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
