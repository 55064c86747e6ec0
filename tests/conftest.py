"""What the tests share: a tiny real corpus, a tiny model's variables, and ways to launch the script."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import Launched, prepare

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
sys.path.insert(0, str(ROOT))

# A model and a run that take a second; fp32, so that comparisons do not hang on rounding.
TINY = {
    "PRESET": "demo", "NUM_LAYERS": "3", "MODEL_DIM": "32", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "MLP_MULT": "2",
    "ROPE_DIMS": "4", "BIGRAM_VOCAB_SIZE": "64", "BIGRAM_DIM": "8", "SPARSE_START_LAYER": "1",
    "SPARSE_HIDDEN_DIM": "4", "VOCAB_SIZE": "400", "TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "256",
    "ITERATIONS": "12", "MAX_WALLCLOCK_SECONDS": "0", "WARMDOWN_ITERS": "4", "QUANT_MIN_NUMEL": "100",
    "VAL_TOKEN_LIMIT": "1001", "EVAL_STRIDE": "8", "COMPUTE_DTYPE": "fp32", "EMA_DECAY": "0.5",
    "TTT_ENABLED": "0", "EXPORT_FILL": "0", "CALIBRATION_TOKENS": "2048",
}


def clean_environment() -> dict[str, str]:
    """The caller's environment without this script's variables, on one thread a process."""
    import train_gpt

    ours = {f.name.upper() for f in train_gpt.VARIABLES}
    kept = {n: v for n, v in os.environ.items() if n not in ours and not n.startswith(train_gpt.FAMILIES)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass
class Outcome:
    """A finished launch."""

    code: int
    out: str
    err: str
    folder: Path  # LOG_DIR/RUN_ID

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def refused(self, *words: str) -> str:
        """The one line of a refused launch: exit code 2, no traceback, all `words` in the line."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = self.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert all(word in lines[0] for word in words), lines[0]
        return lines[0]


@pytest.fixture(scope="session", autouse=True)
def forks():
    prepare()


@pytest.fixture
def launch(tmp_path, corpus):
    """launch(ranks=1, options=(), script=SCRIPT, run_id="run", **variables): run the script on the tiny corpus."""

    def go(ranks=1, options=(), script=SCRIPT, run_id="run", cwd=None, **variables) -> Outcome:
        env = clean_environment() | TINY | {"DATA_PATH": str(corpus), "LOG_DIR": str(tmp_path / "logs")}
        env |= {"RUN_ID": run_id} | {k: str(v) for k, v in variables.items()}
        env = {k: v for k, v in env.items() if v != "UNSET"}
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        done = Launched([*command, str(script), *options], env, cwd or tmp_path)
        said = {}
        readers = [threading.Thread(target=lambda pipe=pipe: said.update({pipe: pipe.read()}), daemon=True)
                   for pipe in (done.stdout, done.stderr)]
        for reader in readers:
            reader.start()
        code = done.wait(300)
        for reader in readers:
            reader.join(20)
        return Outcome(code, said[done.stdout], said[done.stderr], tmp_path / "logs" / run_id)

    return go


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


@pytest.fixture
def tiny():
    """tiny(**variables) -> the configuration of the tiny model."""
    import train_gpt

    def make(**variables):
        cfg, problems, _ = train_gpt.load_config(TINY | {k: str(v) for k, v in variables.items()})
        assert not problems, problems
        return cfg

    return make
