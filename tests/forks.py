"""Launches from a process that has imported torch already: a fork takes the place of a start and that import, which
would be most of a tiny run's time. What a launch sees is its own: arguments, environment, folder, output, signals."""

import os
import runpy
import subprocess
import sys
import types
from multiprocessing import forkserver, get_context
from pathlib import Path

import numpy  # noqa: F401
import sentencepiece  # noqa: F401
import torch._dynamo  # noqa: F401  (torch's optimizers import it)
import zstandard  # noqa: F401

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
SOURCE = SCRIPT.read_bytes()
CODE = compile(SOURCE, SCRIPT, "exec")
FORKS = get_context("forkserver")


def child(arguments: list[str], env: dict[str, str], cwd: str, out, err):
    """In the fork: become `python arguments...`."""
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        return runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    sys.argv, main = arguments, types.ModuleType("__main__")
    sys.path[0], sys.modules["__main__"], main.__file__ = str(Path(arguments[0]).parent), main, arguments[0]
    source = Path(arguments[0]).read_bytes()
    exec(CODE if source == SOURCE else compile(source, arguments[0], "exec"), main.__dict__)


class Launched:
    """What subprocess.Popen([python, *arguments], stdout=PIPE, stderr=PIPE, text=True, ...) gives, as far as it is
    used here."""

    def __init__(self, arguments: list[str], env: dict[str, str], cwd):
        (out, out_there), (err, err_there) = FORKS.Pipe(duplex=False), FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=child, args=(arguments, env, str(cwd), out_there, err_there))
        self.process.start()
        self.pid = self.process.pid
        for pipe in (out_there, err_there):
            pipe.close()
        self.stdout, self.stderr = (open(os.dup(pipe.fileno()), errors="replace") for pipe in (out, err))
        for pipe in (out, err):
            pipe.close()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, seconds: float):
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("the launch", seconds)
        return self.process.exitcode

    def send_signal(self, number: int):
        if self.poll() is None:
            os.kill(self.pid, number)


def prepare():
    """Start the process that forks; it imports this module, and so torch and its compiler, once."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), before["PYTHONPATH"]]))  # where packages may be
    os.environ |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    FORKS.set_forkserver_preload(["forks"])
    forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name)
        os.environ |= {name: value} if value is not None else {}
