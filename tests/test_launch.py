"""./run.sh as a launcher: terminals that close, nohup, a host without a name, several ranks."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, TINY, clean_environment, patched

import train_gpt as t

LONG = {"ITERATIONS": "4000", "TRAIN_LOG_EVERY": "20", "EXPORT_ENABLED": "0", "FINAL_SLIDING_EVAL_ENABLE": "0"}
NAMELESS = ["unshare", "-r", "-u", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]

# A Python that says the machine has two GPUs, of which the ranks that run.sh then starts see none.
TWO_GPUS = """#!/bin/sh
case "$*" in *device_count*) echo 2; exit ;; esac
exec "$REAL" "$@"
"""


def can(command: list[str]) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return False


@pytest.fixture
def project(tmp_path, corpus):
    """project(ranks) -> run.sh on so many ranks, and the environment of a tiny run."""
    for name in ("train_gpt.py", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    stub = tmp_path / "python"
    stub.write_text(TWO_GPUS)
    stub.chmod(0o755)

    def make(ranks: int, **variables):
        text = (ROOT / "run.sh").read_text(encoding="utf-8")
        seen = text.replace("/dev/nvidiactl", "/dev/null") if ranks == 2 else text
        assert seen != text or ranks == 1
        (tmp_path / "run.sh").write_text(seen, encoding="utf-8")
        (tmp_path / "run.sh").chmod(0o755)
        python = {"PYTHON": str(stub), "REAL": sys.executable} if ranks == 2 else {"PYTHON": sys.executable}
        env = clean_environment() | TINY | python | {"DATA_PATH": str(corpus), "RUN_ID": "run"} | variables
        return [str(tmp_path / "run.sh")], env

    return make


@pytest.mark.parametrize("ranks", [1, 2])
def test_under_nohup_a_terminal_may_close_and_a_host_may_lack_a_name(project, corpus, tmp_path, ranks):
    """SIGHUP to run.sh, to torchrun and to every rank, in the middle of training; the host name resolves to nothing,
    and names are UTF-8 where the locale is not."""
    (tmp_path / "d\u00e4t\u00e4").symlink_to(corpus)
    strange = {"DATA_PATH": "d\u00e4t\u00e4", "LOG_DIR": "l\u00f6gs", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0",
               "PYTHONUTF8": "0"}
    command, env = project(ranks, ITERATIONS="300", TRAIN_LOG_EVERY="20", VAL_TOKEN_LIMIT="300", **strange)
    command = [*(NAMELESS if can(NAMELESS) else []), "nohup", *command]
    with subprocess.Popen(command, env=env, cwd=tmp_path, encoding="utf-8", stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
        killer = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("step:20/300 train_loss"):
                os.killpg(process.pid, signal.SIGHUP)
        killer.cancel()
    text = "".join(said)
    assert process.returncode == 0 and "valid: yes" in text and f"world_size:{ranks} " in text, text
    assert "Traceback" not in text and "summary: l\u00f6gs/run/summary.json" in text


def test_a_terminal_that_closes_leaves_a_run_that_can_go_on(project, tmp_path):
    command, env = project(1, **LONG)
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        os.chdir(tmp_path)
        os.execve(command[0], command, env)
    with open(terminal, "rb", buffering=0) as out:
        said = b""
        while not re.search(rb"^step:20/\d+ train_loss", said, re.M):
            said += out.read(1 << 16)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    (saved,) = t.checkpoints(tmp_path / "logs" / "run")
    assert int(saved.stem[5:]) >= 20


SLOW = """
honest_step, honest_complain = t.Trainer.step, t.complain
def slow(self, tokens, step, factor):
    time.sleep(step == 20)
    honest_step(self, tokens, step, factor)
def late(text):
    honest_complain(text)
    if text.startswith("interrupted"):
        os.kill(os.getpid(), 1)
t.Trainer.step, t.complain = slow, late
"""


def test_a_hangup_saves_and_several_are_one(start, tmp_path):
    """A shell sends its own beside that of the terminal, and a system that ends SIGTERM too, here all in one step; and
    one comes when all is saved."""
    cut = start(script=patched(tmp_path, SLOW), **LONG)
    cut.until("step:20/")
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
        cut.process.send_signal(number)
        time.sleep(0.2)
    assert cut.end(30).code == 128 + signal.SIGHUP
    assert cut.err.splitlines()[0].startswith("SIGHUP: finishing the step and saving")
    assert re.search(r"^interrupted by SIGHUP; to go on: .*RUN_ID=run RESUME=1 \S+ \S+\.py$", cut.err, re.M), cut.err
    assert len(t.checkpoints(cut.folder)) == 1
