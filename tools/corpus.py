"""The embedded corpus, which ./run.sh and its jobs make where a run would find no other data.

data/prepare.py makes it, beside where FineWeb's shards would be. A folder that is there is taken as it is.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import train_gpt as t  # noqa: E402


def provide(cfg: t.Config):
    """Make the corpus for a run that names no data and would find none. Ends the process where it cannot be made."""
    try:
        t.find_data(cfg)
    except t.UserError:
        if cfg.data_path:
            raise
        print("no FineWeb shards here (./run.sh data fetches them): using the embedded corpus", flush=True)
        command = [sys.executable, str(ROOT / "data" / "prepare.py"), "embedded", "--vocab-size", str(cfg.vocab_size)]
        if code := subprocess.run(command).returncode:
            sys.exit(code)
