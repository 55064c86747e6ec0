"""Tools of tools/, called like programs within the process of the tests, which has imported torch already; and what
they start, by forks of such a process."""

import contextlib
import io
import os
import signal
import subprocess
import threading
from dataclasses import dataclass
from types import SimpleNamespace

from forks import Launched


@dataclass
class Called:
    """What a program left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    def refused(self, words: str):
        """That it ended with exit code 2 and one line, which holds `words`."""
        assert self.code == 2 and self.err.startswith("error: ") and self.err.count("\n") == 1, (self.code, self.err)
        assert words in self.err, self.err


def call(main, words, environment: dict[str, str], folder) -> Called:
    """main(words) with this environment alone, in this folder."""
    out, err, before, here = io.StringIO(), io.StringIO(), dict(os.environ), os.getcwd()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        try:
            code = main(list(map(str, words)))
        except SystemExit as end:
            code = end.code
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)
    return Called(code or 0, out.getvalue(), err.getvalue())


class Forked:
    """subprocess.Popen([python, script, ...]) as far as tools use it; output goes to the file given, or to `stdout`."""

    def __init__(self, command, env=None, cwd=None, stdout=None, **ignored):
        self.args, self.returncode = command, None
        self.launch = Launched(command[1:], dict(os.environ if env is None else env), cwd or os.getcwd())
        self.pid, self.stdout = self.launch.pid, self.launch.stdout
        number = None if stdout == subprocess.PIPE else os.dup(stdout.fileno())
        pipes = [self.launch.stderr] if number is None else [self.launch.stdout, self.launch.stderr]
        self.readers = [threading.Thread(target=self.copy, args=(pipe, number), daemon=True) for pipe in pipes]
        for reader in self.readers:
            reader.start()

    @staticmethod
    def copy(pipe, number: int | None):
        for line in pipe:
            if number is not None:
                os.write(number, line.encode())

    def poll(self) -> int | None:
        if self.returncode is None and self.launch.poll() is not None:
            return self.wait()
        return self.returncode

    def wait(self, seconds: float | None = None) -> int:
        self.returncode = self.launch.wait(seconds or 300)
        for reader in self.readers:
            reader.join(20)
        return self.returncode

    def terminate(self):
        self.launch.send_signal(signal.SIGTERM)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()


def run_forked(command, env=None, cwd=None, **ignored) -> subprocess.CompletedProcess:
    """subprocess.run([python, script, ...], capture_output=True, text=True)."""
    done = Launched(command[1:], dict(os.environ if env is None else env), cwd or os.getcwd())
    errors = []
    reader = threading.Thread(target=lambda: errors.append(done.stderr.read()), daemon=True)
    reader.start()
    said = done.stdout.read()
    code = done.wait(300)
    reader.join(20)
    return subprocess.CompletedProcess(command, code, said, "".join(errors))


# What a tool's module may have in place of subprocess.
forked = SimpleNamespace(**vars(subprocess) | {"Popen": Forked, "run": run_forked})
