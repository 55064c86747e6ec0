"""Launches from a process that has imported torch already: a fork takes the place of a start and that import, which
would be most of a tiny run's time. What a launch sees is its own: arguments, environment, folder, output, signals."""

import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import traceback
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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(arguments: list[str], env: dict[str, str], cwd: str, out, err, nodes: dict | None, limits: dict):
    """In the fork: become `python arguments...`, on several ranks where `nodes` says so."""
    for number, pipe in ((1, out), (2, err)):
        os.dup2(os.open(pipe, os.O_WRONLY) if isinstance(pipe, str) else pipe.fileno(), number)
        if not isinstance(pipe, str):
            pipe.close()
    for what, most in limits.items():
        resource.setrlimit(what, (most, resource.getrlimit(what)[1]))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    if nodes is None:
        become(arguments)
    else:
        sys.exit(launch_ranks(arguments, **nodes))


def become(arguments: list[str]):
    sys.orig_argv = [sys.executable, *arguments]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        return runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    sys.argv, main = arguments, types.ModuleType("__main__")
    sys.path[0], sys.modules["__main__"], main.__file__ = str(Path(arguments[0]).parent), main, arguments[0]
    source = Path(arguments[0]).read_bytes()
    exec(CODE if source == SOURCE else compile(source, arguments[0], "exec"), main.__dict__)


def launch_ranks(arguments: list[str], ranks: int, world: int, first: int, port: int, restarts: int = 0) -> int:
    """What torchrun does for `ranks` ranks of one machine, of `world` in all: start them, wait, end all when one has
    failed, and start them again `restarts` times. Returns the exit code."""
    for count in range(restarts + 1):
        living = set()
        for local in range(ranks):
            pid = os.fork()
            if pid == 0:
                os.environ |= {
                    "RANK": str(first + local), "LOCAL_RANK": str(local), "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + count),
                    "TORCHELASTIC_RUN_ID": "forks", "TORCHELASTIC_RESTART_COUNT": str(count)}
                code = 1
                try:
                    become(arguments)
                except SystemExit as end:
                    code = end.code
                except BaseException:
                    traceback.print_exc()
                os._exit(code)
            living.add(pid)
        failed = False
        while living:
            pid, status = os.wait()
            living.discard(pid)
            if status and not failed:
                failed = True
                for other in living:
                    os.kill(other, signal.SIGTERM)
        if not failed:
            return 0
    return 1


class Launched:
    """What subprocess.Popen([python, *arguments], stdout=PIPE, stderr=PIPE, text=True, ...) gives, as far as it is
    used here. `nodes`: what `launch_ranks` takes; `stdout`: a file that takes its place; `limits`: as of setrlimit."""

    def __init__(self, arguments: list[str], env: dict[str, str], cwd, nodes=None, stdout=None, limits=None):
        (out, out_there), (err, err_there) = FORKS.Pipe(duplex=False), FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=child, args=(arguments, env, str(cwd), stdout or out_there, err_there,
                                                         nodes, limits or {}))
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
