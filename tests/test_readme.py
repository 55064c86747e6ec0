"""The README's commands, in the order in which it gives them, in one copy of the project."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, clean_environment
from tooling import call, forked

sys.path.insert(0, str(ROOT / "tools"))
import audit  # noqa: E402
import bench  # noqa: E402
import check_record  # noqa: E402
import inspect_artifact  # noqa: E402
import measure  # noqa: E402
import pack  # noqa: E402
import record  # noqa: E402
import show  # noqa: E402
import step_cost  # noqa: E402
import sweep  # noqa: E402

TOOLS = {"bench": bench, "inspect": inspect_artifact, "measure": measure, "record": record, "show": show,
         "sweep": sweep, "check-record": check_record}
FAILS = ("measure", "check-record")  # tools that may end with 1: not all is done; a rule is broken
EXAMPLE = "records/track_non_record_16mb/2026-11-24_ThreeSeeds_CPU_10min"
NOT_RUN = {  # a command that begins so, and why
    "./run.sh test": "this test is a part of it",
    "pip ": "needs a package registry",
    "export ": "only sets variables for the machine without network",
}
SHORT = {  # what is added to a command that begins so
    "./run.sh bench": "--steps 1 --repeats 1 --windows 2 --ttt-tokens 64",
    "./run.sh measure --out gpu --stages": "--limit 12",  # which leaves no stage the time to begin
    "./run.sh measure --out gpu --report": "--records records",
    "./run.sh measure": "--steps 2 --seconds 1 --stages export",
    "./run.sh record": "--records records",
    "python tools/step_cost.py": "--tokens 512 NUM_LAYERS=2 MODEL_DIM=64 NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN=64 "
                                 "VOCAB_SIZE=256",
}
# Small and quick; the last two because of the published command: a stride of 64, and no compiler on a CPU.
SETTINGS = TINY | {"TTT_ENABLED": "1", "VAL_TOKEN_LIMIT": "300", "EVAL_SEQ_LEN": "64", "USE_COMPILE": "0"}


def commands() -> list[str]:
    """The lines of the ```sh blocks of the README and of docs, without comments."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))]
    blocks = re.findall(r"```sh\n(.*?)```", "".join(texts), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


class Clone:
    """A copy of the project with the tiny corpus in the place of the embedded one."""

    def __init__(self, folder, corpus, start):
        self.folder, self.corpus, self.start = folder, corpus, start
        self.environment = clean_environment() | SETTINGS | {"CUDA_VISIBLE_DEVICES": ""}
        shutil.copy(ROOT / "train_gpt.py", folder)
        shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("datasets", "tokenizers"))
        shutil.copytree(corpus, folder / "data" / "datasets" / "embedded_sp400")
        shutil.copytree(ROOT / EXAMPLE, folder / EXAMPLE)
        (folder / "other").mkdir()
        shutil.copy(ROOT / "train_gpt.py", folder / "other")
        documents = [json.dumps({"text": f"Document {i} of mine. " * 40}) for i in range(60)]
        (folder / "my.jsonl").write_text("\n".join(documents))

    def run(self, command: str):
        """As a user would, but that the script and what tools start are forks, tools are called in this process, and
        eight ranks are two. Fails where the command does."""
        short = next((words for begin, words in SHORT.items() if command.startswith(begin)), "")
        words = shlex.split(f"{command} {short}")
        variables = {}
        while "=" in words[0]:
            name, _, variables[name] = words.pop(0).partition("=")
        if words[:2] == ["./run.sh", "data"]:
            self.fetch()
        elif words[:2] == ["python", "tools/pack.py"]:
            assert call(pack.main, words[2:], self.environment, self.folder).code == 0, command
        elif words[:2] in (["python", "tools/step_cost.py"], ["python", "data/prepare.py"]) or words[0] == "tar":
            self.program(words, variables)
        elif words[0] == "./run.sh" and words[1:]:
            done = call(TOOLS[words[1]].main, words[2:], self.environment | variables, self.folder)
            allowed = (0, 1) if words[1] in FAILS else (0,)
            assert done.code in allowed and "error" not in done.err, (command, done)
        else:
            assert words[0] in ("./run.sh", "torchrun") or words[:2] == ["python", "train_gpt.py"], command
            self.script(command, words, variables)

    def fetch(self):
        """FineWeb's shards, as far as can be without a network."""
        data = self.folder / "data"
        shutil.copytree(self.corpus, data / "datasets" / "fineweb10B_sp1024", dirs_exist_ok=True)
        (data / "tokenizers").mkdir(exist_ok=True)
        shutil.copy(self.corpus / "tokenizer.model", data / "tokenizers" / "fineweb_1024_bpe.model")

    def program(self, words: list[str], variables: dict):
        if words[1] == "tools/step_cost.py":
            step_cost.main(words[2:])
            return
        words = [sys.executable if word == "python" else word for word in words]
        done = subprocess.run(words, env=self.environment | variables, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stdout, done.stderr)

    def script(self, command: str, words: list[str], variables: dict):
        audited = variables.pop("AUDIT", "0") == "1"
        before = set(self.folder.glob("logs/*"))
        options = words[words.index("train_gpt.py") + 1 :] if "train_gpt.py" in words else []
        given = SETTINGS | {"DATA_PATH": "UNSET", "RUN_ID": "UNSET", "LOG_DIR": "logs"} | variables
        run = self.start(script=self.folder / "train_gpt.py", cwd=self.folder, options=options,
                         ranks=2 if words[0] == "torchrun" else 1, **given | {"USE_COMPILE": "0"}).end()
        assert run.code == 0, (command, run.out, run.err)
        if audited:
            (new,) = set(self.folder.glob("logs/*")) - before
            done = call(audit.main, [new, "--tokens", "32"], self.environment, self.folder)
            assert done.code == 0, (command, done)


def test_the_commands_of_the_readme_run_in_order(start, corpus, tmp_path, monkeypatch):
    for tool in (bench, measure, sweep):
        monkeypatch.setattr(tool, "subprocess", forked)
    clone, ran = Clone(tmp_path, corpus, start), 0
    kept = sorted(ROOT.glob("records/*/*"))
    for command in commands():
        if not any(command.startswith(begin) for begin in NOT_RUN):
            clone.run(command)
            ran += 1
    assert ran > 25 and sorted(ROOT.glob("records/*/*")) == kept, "nothing is left in the project itself"
    assert (tmp_path / "logs" / "first" / "summary.json").exists() and (tmp_path / "gpu" / "measure.json").exists()
    tracks = sorted({path.parents[1].name for path in tmp_path.glob("records/*/*/README.md")})
    assert tracks == ["gpu", "track_non_record_16mb"]


@pytest.mark.parametrize("begin", [*NOT_RUN, *SHORT])
def test_what_is_said_of_a_command_is_of_one_in_the_readme(begin):
    assert any(command.startswith(begin) for command in commands())
