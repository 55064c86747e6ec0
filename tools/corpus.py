"""Make the embedded corpus where a run would find no other data: for ./run.sh, its jobs and tools/measure.py.

    python tools/corpus.py 1024        with a vocabulary of so many pieces

data/prepare.py makes it, beside where FineWeb's shards would be. A folder that is there is taken as it is.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make(pieces: int | str) -> Path:
    """Make the corpus, and say so. Returns its folder; ends the process where it cannot be made."""
    print(f"no FineWeb shards here (./run.sh data --variant sp{pieces} fetches them, where they are published): using "
          "the embedded corpus", flush=True)
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "embedded", "--vocab-size", str(pieces)]
    if code := subprocess.run(command).returncode:
        sys.exit(code)
    return ROOT / "data" / "datasets" / f"embedded_sp{pieces}"


def provide(cfg):
    """Make the corpus for a run of this configuration of train_gpt.py that names no data and would find none."""
    import train_gpt as t  # here, as it brings torch

    try:
        t.find_data(cfg)
    except t.UserError:
        if cfg.data_path:
            raise
        make(cfg.vocab_size)


if __name__ == "__main__":
    make(sys.argv[1])
