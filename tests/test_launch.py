"""./run.sh as a launcher: terminals that close, nohup, a host without a name, several ranks; what it makes, and how to
go on after an end before the end."""

import contextlib
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_environment, patched
from tooling import call

import train_gpt as t

sys.path.insert(0, str(ROOT / "tools"))
import bench  # noqa: E402
import corpus as corpus_tool  # noqa: E402
import sweep  # noqa: E402

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


def test_a_torch_that_cannot_use_the_gpu_has_none(project, tmp_path):
    """Then the script, which does not ask torch, takes the demo; and ranks are counted by torch alone."""
    command, env = project(2)
    env.pop("CUDA_VISIBLE_DEVICES", None)
    stub = tmp_path / "python"
    shows = 'case "$*" in *train_gpt.py*) echo "$@: ${CUDA_VISIBLE_DEVICES-all}"; exit ;; esac\nexec "$REAL"'
    tells = shows.replace('"$@: ${CUDA_VISIBLE_DEVICES-all}"', '"$LAUNCHED_BY"')
    stub.write_text(TWO_GPUS.replace('exec "$REAL"', tells))
    done = subprocess.run(["bash", "run.sh"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"PYTHON={stub} bash run.sh"
    for gpus, shown in (("0", ": "), ("2", ": all")):
        stub.write_text(TWO_GPUS.replace("echo 2", f"echo {gpus}").replace('exec "$REAL"', shows))
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        checked, ran = done.stdout.splitlines()
        assert checked.endswith(f"--check --ranks {gpus if gpus == '2' else 1}{shown}") and ran.endswith(shown), done
        assert ("--nproc_per_node=2" in ran) == (gpus == "2")


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


# What stands for data/prepare.py: it notes that it was called, and copies a corpus.
MAKES = """import os, shutil, sys
open("made", "a").write(" ".join(sys.argv[1:]) + "\\n")
size = sys.argv[sys.argv.index("--vocab-size") + 1]
shutil.copytree(os.environ["CORPUS"], os.path.join(os.path.dirname(__file__), "datasets", f"embedded_sp{size}"))
"""


@pytest.fixture
def clone(tmp_path, corpus):
    """A clone without data, and the environment of a tiny run in it that names none."""
    for name in ("train_gpt.py", "run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prepare.py").write_text(MAKES)
    return tmp_path, clean_environment() | TINY | {"PYTHON": sys.executable, "CORPUS": str(corpus)}


def shell(command: str, folder: Path, environment: dict) -> subprocess.CompletedProcess:
    return subprocess.run(command, shell=True, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_corpus_is_made_once_and_only_for_a_run_that_needs_it(clone, monkeypatch):
    """Arguments and variables are judged before."""
    folder, env = clone
    done = shell("./run.sh", folder, env | {"TTT_LERNING": "1"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "TTT_LERNING: no such" in done.stderr, done.stderr
    done = shell("./run.sh sweep --help", folder, env)
    assert done.returncode == 0 and "VAR=a,b,c" in done.stdout
    made = folder / "made"
    monkeypatch.setattr(corpus_tool, "ROOT", folder)
    monkeypatch.setattr(t, "SCRIPT", folder / "train_gpt.py")  # above which data is sought
    for main, words, said in ((sweep.main, ["--help"], "usage: ./run.sh sweep"), (sweep.main, [], "nothing to run"),
                              (sweep.main, ["SEEED=1"], "did you mean SEED?"), (sweep.main, ["SEED=x"], "SEED='x'"),
                              (sweep.main, ["LR=1,2"], "LR: no such variable; did you mean MATRIX_LR?"),
                              (bench.main, ["--help"], "usage:"), (bench.main, ["--steps", "0"], "must be at least 1"),
                              (bench.main, [], "NUM_LAYERS='x'")):
        done = call(main, words, env | ({"NUM_LAYERS": "x"} if not words and main is bench.main else {}), folder)
        assert said in done.out + done.err and not made.exists(), (words, done)
    done = call(sweep.main, ["VOCAB_SIZE=400,401"], env | {"EVAL_STRIDE": "64"}, folder)
    assert done.code == 2 and not made.exists(), "a combination that cannot work"
    done = call(sweep.main, ["SEED=1"], env | {"VAL_TOKEN_LIMIT": "-1"}, folder)
    assert done.code == 2 and not made.exists()
    (folder / "logs").write_text("in the way")
    done = call(sweep.main, ["SEED=1"], env, folder)  # --check has the last word, with the data there
    assert done.code == 2 and "LOG_DIR=" in done.err and made.read_text() == "embedded --vocab-size 400\n", done.err
    shutil.rmtree(folder / "data" / "datasets")
    made.unlink()
    done = call(bench.main, [], env, folder)  # which writes there after it has data
    assert done.code == 2 and "logs" in done.err and made.read_text() == "embedded --vocab-size 400\n", done.err
    (folder / "logs").unlink()
    shutil.rmtree(folder / "data" / "datasets")
    made.unlink()
    done = shell("RUN_ID=a ./run.sh", folder, env | {"ITERATIONS": "2"})
    assert done.returncode == 0 and "using the embedded corpus" in done.stdout, done.stderr
    assert made.read_text() == "embedded --vocab-size 400\n"
    assert " bytes of data/datasets/embedded_sp400\n" in done.stdout and done.stderr == ""
    idle = {"ITERATIONS": "2", "TTT_LR": "1", "TTT_MODE": "lora", "TTT_ENABLED": "1"}
    done = shell("RUN_ID=b ./run.sh", folder, env | idle)
    assert done.returncode == 0 and made.read_text().count("\n") == 1
    assert "warning: TTT_LR: no effect with TTT_MODE=lora\n" in done.stderr


def test_help_needs_no_package_where_the_tool_needs_none(tmp_path):
    """Nothing is installed, and no environment made."""
    for name in ("data", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("datasets", "tokenizers"))
    for name in ("run.sh", "requirements.txt", "train_gpt.py"):
        shutil.copy(ROOT / name, tmp_path)
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\ncase "$*" in *find_spec* | *venv* | *pip*) echo "$@" >&2; exit 1 ;; esac\n'
                    'exec "$REAL" "$@"')
    stub.chmod(0o755)
    env = clean_environment() | {"PYTHON": str(stub), "REAL": sys.executable}
    for words, said in (("data --help", "--train-shards"), ("data -h", "--variant"), ("data --verify --help", "--jobs"),
                        ("measure --help", "--stages"), ("--help", "./run.sh sweep")):
        done = shell(f"./run.sh {words}", tmp_path, env)
        assert done.returncode == 0 and said in done.stdout and done.stderr == "", done


def test_a_run_that_is_cut_prints_the_command_that_goes_on_with_it(clone, corpus):
    """The same launcher and variables: pasted into a shell that has none of them it ends the run. No corpus is made for
    it, though the data was named in the environment."""
    folder, env = clone
    shutil.copytree(corpus, folder / "my data")
    own = env | LONG | {"DATA_PATH": "my data", "LOG_DIR": "lo gs", "RUN_ID": "cut", "ITERATIONS": "300", "AUDIT": "1",
                        "NLL_DUMP": "nats.npy", "EXPORT_ENABLED": "1", "FINAL_SLIDING_EVAL_ENABLE": "1"}
    with subprocess.Popen(["./run.sh"], env=own, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          start_new_session=True) as process:
        said = ""
        while not said.startswith("step:20/"):
            said = process.stdout.readline()
            assert said, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=60)
    last = errors.splitlines()[-1]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in errors, errors
    command = re.fullmatch(r"interrupted by SIGINT; to go on: (.*)", last)[1]
    words = shlex.split(command)
    assert words[-5:] == ["RUN_ID=cut", "RESUME=1", "AUDIT=1", f"PYTHON={sys.executable}", "./run.sh"], command
    assert "LOG_DIR=lo gs" in words, command
    bare = {name: env[name] for name in ("PATH", "OMP_NUM_THREADS", "HOME") if name in env}
    cut = t.json.loads((folder / "lo gs" / "cut" / "summary.json").read_text())
    done = shell(command, folder, bare)
    assert done.returncode == 0 and "valid: yes" in done.stdout and "audit causal: ok" in done.stdout, done.stderr
    assert not (folder / "made").exists() and (folder / "nats.npy").exists()
    summary = t.json.loads((folder / "lo gs" / "cut" / "summary.json").read_text())
    seconds = summary["seconds"]
    assert seconds["earlier"] == cut["seconds"]["total"] > 0 and summary["train"]["steps"] == 300
    assert seconds["total"] > seconds["earlier"] + seconds["search"] and seconds["total"] > summary["train"]["seconds"]


def test_the_launcher_is_told_as_it_was_used(monkeypatch, tmp_path):
    monkeypatch.delenv("LAUNCHED_BY", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "a b.py"])
    alone = shlex.join([sys.executable, "-X", "utf8", "a b.py"])
    assert t.launcher() == alone
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    torchrun = ["-c", "import sys; print(flush=True); sys.stdin.read()", "--nproc_per_node=2", "a b.py"]
    with subprocess.Popen([sys.executable, *torchrun], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        assert t.launcher() == shlex.join([sys.executable, *torchrun])
        parent.communicate()
    assert t.launcher() == alone, "where it cannot be told"
    monkeypatch.setenv("LAUNCHED_BY", "AUDIT=1 ./run.sh")
    assert t.launcher() == "AUDIT=1 ./run.sh"
