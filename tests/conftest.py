"""What the tests share: a tiny real corpus, a tiny model's variables, and ways to launch the script."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forks import Launched, free_port, prepare

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
sys.path.insert(0, str(ROOT))

# A model and a run that take a second; fp32, so that comparisons do not hang on rounding.
TINY = {
    "PRESET": "demo", "NUM_LAYERS": "3", "MODEL_DIM": "32", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "MLP_MULT": "2",
    "ROPE_DIMS": "4", "BIGRAM_VOCAB_SIZE": "64", "BIGRAM_DIM": "8", "SPARSE_START_LAYER": "1",
    "SPARSE_HIDDEN_DIM": "4", "LOOP_START": "1", "LOOP_END": "2",
    "VOCAB_SIZE": "400", "TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "256",
    "ITERATIONS": "12", "MAX_WALLCLOCK_SECONDS": "0", "WARMDOWN_ITERS": "4", "QUANT_MIN_NUMEL": "100",
    "VAL_TOKEN_LIMIT": "1001", "EVAL_STRIDE": "8", "COMPUTE_DTYPE": "fp32", "EMA_DECAY": "0.5",
    "TTT_ENABLED": "0", "EXPORT_FILL": "0", "CALIBRATION_TOKENS": "2048",
    "CODE_BYTES": "raw",  # packing is a third of a second of each of many launches
}


def clean_environment() -> dict[str, str]:
    """The caller's environment without this script's variables, on one thread a process."""
    import train_gpt

    ours = {f.name.upper() for f in train_gpt.VARIABLES}
    ours.add("LAUNCHED_BY")
    kept = {n: v for n, v in os.environ.items() if n not in ours and not n.startswith(train_gpt.FAMILIES)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Launch:
    """A launch of the script on the tiny corpus that can be watched, signalled and killed while it runs.

    `ranks` above 1 are forks that see what torchrun would tell them; `torchrun`: options of torchrun itself, which then
    launches them; `node`: which of how many machines, and their port; `prefix`: a command before a Python of its own.
    """

    def __init__(self, home: Path, corpus: Path, ranks=1, script=SCRIPT, options=(), cwd=None, torchrun=(), restarts=0,
                 node=None, prefix=(), stdout=None, limits=None, **variables):
        env = clean_environment() | TINY | {"DATA_PATH": str(corpus), "LOG_DIR": str(home / "logs"), "RUN_ID": "run"}
        env |= {k: str(v) for k, v in variables.items()}
        env = {k: v for k, v in env.items() if v != "UNSET"}
        command, nodes, cwd = [str(script), *options], None, cwd or home
        if torchrun:
            command = ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={ranks}", *command]
        elif ranks > 1 or restarts or node:
            index, count, port = node or (0, 1, free_port())
            nodes = {"ranks": ranks, "world": ranks * count, "first": ranks * index, "port": port, "restarts": restarts}
        if prefix:
            self.process = subprocess.Popen([*prefix, sys.executable, *command], env=env, cwd=cwd, text=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        else:
            self.process = Launched(command, env, cwd, nodes, stdout, limits)
        self.folder = Path(cwd, env["LOG_DIR"], env.get("RUN_ID", ""))
        self.lines = {"out": [], "err": []}
        self.readers = [threading.Thread(target=self._read, args=(name, pipe), daemon=True) for name, pipe in
                        (("out", self.process.stdout), ("err", self.process.stderr))]
        for reader in self.readers:
            reader.start()

    def _read(self, name, pipe):
        for line in pipe:
            self.lines[name].append(line)

    def until(self, pattern: str, seconds: float = 120) -> str:
        """Wait for a line of stdout that matches."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = self.process.poll() is not None and not self.readers[0].is_alive()
            if found := next((x for x in list(self.lines["out"]) if re.search(pattern, x)), None):
                return found
            if ended:
                break
            time.sleep(0.005)
        raise AssertionError(f"no line like {pattern!r}: {self.lines}")

    def until_files(self, pattern: str, count: int = 1, seconds: float = 120):
        """Wait for that many files in the run's folder."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if len(list(self.folder.glob(pattern))) >= count:
                return
            time.sleep(0.005)
        raise AssertionError(f"no {count} files like {pattern}: {self.lines}")

    def workers(self) -> list[int]:
        """Process numbers of the ranks, where there are several."""
        done = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(x) for x in done.stdout.split()]

    def kill(self):
        """SIGKILL for the launcher and all its ranks."""
        for pid in [self.process.pid, *self.workers()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.end()

    def end(self, seconds: float = 300):
        """Wait for the end; then `code`, `out` and `err` are known."""
        self.process.wait(seconds)
        for reader in self.readers:
            reader.join(20)
        self.code, self.out, self.err = self.process.returncode, "".join(self.lines["out"]), "".join(self.lines["err"])
        return self

    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def refused(self, *words: str) -> str:
        """The one line of a refused launch: exit code 2, no traceback, all `words` in the line."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = self.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert all(word in lines[0] for word in words), lines[0]
        return lines[0]

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def artifact(self) -> bytes:
        return (self.folder / "final_model.int6.ptz").read_bytes()


@pytest.fixture(scope="session", autouse=True)
def forks():
    prepare()


@pytest.fixture
def start(tmp_path, corpus):
    """start(ranks=1, script=SCRIPT, **variables) -> Launch; whatever still runs at the end is killed."""
    launches = []

    def go(**options) -> Launch:
        launches.append(Launch(tmp_path, corpus, **options))
        return launches[-1]

    go.home = tmp_path
    yield go
    for launch in launches:
        if launch.process.poll() is None:
            launch.kill()


@pytest.fixture
def launch(start):
    """launch(ranks=1, options=(), script=SCRIPT, run_id="run", **variables): run the script on the tiny corpus."""
    return lambda ranks=1, run_id="run", **options: start(ranks=ranks, RUN_ID=run_id, **options).end()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, corpus) -> Launch:
    """A whole run with every stage, for tests that only look at it or score its artifact. Its losses: nats.npy."""
    home = tmp_path_factory.mktemp("finished")
    run = Launch(home, corpus, RUN_ID="finished", ITERATIONS=40, TRAIN_LOG_EVERY=10, VAL_LOSS_EVERY=20, TTT_ENABLED=1,
                 NLL_DUMP=home / "nats.npy", CODE_BYTES="packed").end()
    assert run.code == 0, run.err
    run.nats = home / "nats.npy"
    return run


def patched(tmp_path: Path, change: str) -> Path:
    """A script that runs the product with one thing changed: `change` stands before its last lines and calls it t."""
    path = tmp_path / f"patched{len(list(tmp_path.glob('patched*')))}.py"
    path.write_text(f"import sys, os, time, runpy\nsys.path.insert(0, {str(ROOT)!r})\nimport builtins\n"
                    f"source = open({str(SCRIPT)!r}).read()\n"
                    f"head, tail = source.rsplit('if __name__ == \"__main__\":', 1)\n"
                    "class Names:\n    __getattr__ = lambda self, n: globals()[n]\n"
                    "    __setattr__ = lambda self, n, v: globals().__setitem__(n, v)\n"
                    f"__file__ = {str(SCRIPT)!r}\nexec(compile(head, __file__, 'exec'), globals())\nt = Names()\n"
                    f"{change}\nexec(compile('if True:' + tail, __file__, 'exec'), globals())\n")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Shards and a 400-piece tokenizer with byte fallback, made by data/prepare.py from the language reference."""
    import pydoc_data.topics

    folder = tmp_path_factory.mktemp("corpus")
    with open(folder / "topics.jsonl", "w") as file:
        for _, text in sorted(pydoc_data.topics.topics.items()):
            file.write(json.dumps({"text": text}) + "\n")
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "docs", str(folder / "topics.jsonl"), "--vocab-size",
               "400", "--val-fraction", "0.1", "--out", str(folder / "tiny")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "tiny"


@pytest.fixture(scope="session")
def embedded(tmp_path_factory) -> Path:
    """The embedded corpus with 1,024 pieces, made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / "embedded.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "embedded").exists():
            # without what needs a /dev/shm that can be written to
            hide = "import runpy, sys; sys.modules['_multiprocessing'] = None; del sys.argv[0]; " \
                   "sys.path[0] = '.'; runpy.run_path('prepare.py', run_name='__main__')"
            command = [sys.executable, "-c", hide, "prepare.py", "embedded", "--out", str(base / "embedded")]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT / "data",
                           env=os.environ | {"PYTHONHASHSEED": "1"})
    return base / "embedded"


@pytest.fixture
def tiny():
    """tiny(**variables) -> the configuration of the tiny model."""
    import train_gpt

    def make(**variables):
        cfg, problems, _ = train_gpt.load_config(TINY | {k: str(v) for k, v in variables.items()})
        assert not problems, problems
        return cfg

    return make
