"""Records and shows: figures from the logs, refusals, a folder that works, plots, old logs and the index."""

import ast
import fcntl
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_environment

sys.path.insert(0, str(ROOT / "tools"))
import audit  # noqa: E402
import check_record  # noqa: E402
import figures  # noqa: E402
import record  # noqa: E402
import record_checks  # noqa: E402
import record_review  # noqa: E402
import record_text  # noqa: E402
import runs as reader  # noqa: E402
import show  # noqa: E402
from run_log import Point, Run  # noqa: E402

import train_gpt as t  # noqa: E402

RUNS = "TTT_LR=1e-3 SEED=13\nTTT_LR=3e-3 SEED=13\nTTT_LR=3e-3 SEED=1111\n"
SETTINGS = {"TTT_ENABLED": "1", "TTT_MODE": "full", "TTT_CHUNK_TOKENS": "300", "TTT_EPOCHS": "1",
            "TRAIN_LOG_EVERY": "2", "VAL_LOSS_EVERY": "6", "CODE_BYTES": "packed"}


@pytest.fixture(scope="module")
def swept(corpus, tmp_path_factory):
    """Three runs of a sweep: a whole one, one of the same seed that starts from its artifact, one of another seed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "records"  # made once for all workers
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "two" / "results.csv").exists():
            make(folder, corpus)
    return sorted(str(path) for path in (folder / "two").glob("*/"))


def make(folder, corpus):
    (folder / "list").write_text(RUNS)
    env = clean_environment() | TINY | SETTINGS | {"DATA_PATH": str(corpus), "LOG_DIR": str(folder)}
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), "--list", "list", "--name", "two", "--jobs", "2"]
    done = subprocess.run(command, env=env, cwd=folder, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr + done.stdout
    assert audit.main([*map(str, (folder / "two").glob("*/")), "--tokens", "32"]) == 0


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(tool, *arguments) -> exit code, stdout, stderr of a tool in this process; records go to tmp_path."""
    monkeypatch.chdir(tmp_path)

    def go(tool, *arguments):
        extra = ["--records", str(tmp_path / "records")] if tool is record else []
        code = tool.main([*map(str, arguments), *extra])
        return code, *capsys.readouterr()

    return go


def refused(outcome, *words) -> str:
    """That a tool ended with exit code 2 and one line, which holds all `words`."""
    code, out, err = outcome
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and all(w in err for w in words), err
    return err


def forged(path, to, log=(), summary=(), audit=()):
    """A copy of a run's folder with its log, its summary and its audit changed alike: pairs of pattern and replacement,
    and of place in the summary or the audit and value. Its artifact, which has the true figures, stays behind."""
    shutil.copytree(path, to, ignore=shutil.ignore_patterns("*.ptz"))
    head, end, body = (to / "train.log").read_text().partition("\n" + "=" * 100 + "\n")
    for pattern, replacement in log:
        body, n = re.subn(pattern, replacement, body, flags=re.M)
        assert n, pattern
    (to / "train.log").write_text(head + end + body)
    for name, changes in (("summary.json", summary), ("audit.json", audit)):
        facts = json.loads((to / name).read_text())
        for place, value in changes:
            *way, last = place.split(".")
            inner = facts
            for step in way:
                inner = inner[step]
            inner[last] = value
        (to / name).write_text(json.dumps(facts))
    return str(to)


H100 = "NVIDIA H100 80GB HBM3"


def test_a_record_is_utf_8_in_a_locale_without_it(swept, tmp_path):
    """Python then takes files and output for ASCII, unless it is told."""
    bare = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, str(ROOT / "tools" / "record.py"), swept[0], "--records", str(tmp_path), "--name", "Two",
               "--author", "S\u00f8ren \u0141", "--non-record", "--reference-bpb", "4", "--reference-name", "\u0141's"]
    done = subprocess.run(command, env=clean_environment() | bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("track_non_record_16mb/*_Two")
    assert json.loads((folder / "submission.json").read_bytes())["author"] == "S\u00f8ren \u0141"
    assert "\u0141's" in (folder / "README.md").read_text(encoding="utf-8")
    assert "\u00b1" in (tmp_path / "README.md").read_text(encoding="utf-8")


def opens_text(call: ast.Call) -> bool:
    """Whether it opens a text file or a text pipe."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "open":
        modes = [a.value for a in (*call.args[:2], *given.values()) if isinstance(a, ast.Constant)]
        low_level = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in ("os", "tarfile")
        return not low_level and not any(isinstance(m, str) and re.fullmatch("[rwax+]*b[rwax+]*", m) for m in modes)
    method = isinstance(call.func, ast.Attribute)
    return method and name in ("read_text", "write_text") or "text" in given or "universal_newlines" in given


@pytest.mark.parametrize("path", sorted(p for folder in (".", "tools", "data") for p in (ROOT / folder).glob("*.py")),
                         ids=lambda path: path.name)
def test_every_text_file_says_its_encoding(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    unsaid = [ast.unparse(call) for call in calls
              if opens_text(call) and "encoding" not in {keyword.arg for keyword in call.keywords}]
    assert not unsaid


def moved(path: str) -> dict:
    """Changes that say that the data was at `path`."""
    return {"log": [(r'^(config .*"data_path": )"[^"]*"', rf'\1"{path}"'),
                    (r'^(preset:.*"DATA_PATH": )"[^"]*"', rf'\1"{path}"'),
                    (r"^(train_loader:dataset:)[^:]+(?= train_shards)", rf"\g<1>{Path(path).name}")],
            "summary": [("config.data_path", path), ("overrides.DATA_PATH", path)]}


def in_all(*changes: dict) -> dict:
    return {kind: [change for c in changes for change in c.get(kind, ())] for kind in ("log", "summary", "audit")}


VERIFIED = {"date": "2026-01-02", "equal_documents": 3, "shared_documents": 70, "shared_tokens": 8000,
            "sha256": "ab" * 32, "faults": 0}
CODE = len(t.pack_script(t.SCRIPT.read_bytes()))


def knows_of_data(verified: dict | None, state: str = "0") -> dict:
    """Changes by which a run knew that of its data, and had shards in this state."""
    return {"log": [(r'^(data \{.*"verified": ).*$', rf'\g<1>{json.dumps(verified)}, "state_sha256": "{state}"}}')],
            "summary": [("data.verified", verified), ("data.state_sha256", state)]}


CLEAN = in_all(moved("/data/fineweb10B_sp1024"), knows_of_data(VERIFIED), {
    "log": [(r"^note: .*\n", ""), (r"^(hardware .*'name': )'[^']*'", rf"\1'{H100}'"),
            (r"^(hardware .*'world_size': )1\b", r"\g<1>8"), (r"^world_size:1\b", "world_size:8"),
            (r'^(config .*"val_token_limit": )1001', r"\g<1>0"), (r'^(preset:.*), "VAL_TOKEN_LIMIT": 1001', r"\1")],
    "summary": [("caveats", []), ("hardware.name", H100), ("hardware.world_size", 8), ("config.val_token_limit", 0),
                ("overrides.VAL_TOKEN_LIMIT", None)]})
SAME_RATE = {"log": [(r'^(config .*"ttt_lr": )0.003', r"\g<1>0.001"), (r'^(preset:.*"TTT_LR": )0.003', r"\g<1>0.001")],
             "summary": [("config.ttt_lr", 0.001), ("overrides.TTT_LR", 0.001)]}
NONE = {"log": [], "summary": []}


def clean(swept, folder, **more) -> list[str]:
    """Both seeds as if they had run where a record is run; the second one with `more` changes."""
    return [forged(swept[0], folder / "clean0", **CLEAN),
            forged(swept[2], folder / "clean1", **in_all(CLEAN, SAME_RATE, NONE | more))]


# ---- records ----


def test_a_record_of_runs_that_share_their_training(swept, call, tmp_path, corpus):
    """Its figures are the summaries', no path of this machine is in it, and its own command gives its score again."""
    code, out, err = call(record, *swept[1:], "--name", "Two", "--author", "someone", "--github-id", "some1",
                          "--non-record", "--reference-bpb", "4.5", "--reference-name", "the one before")
    assert code == 0, err
    (folder,) = (tmp_path / "records" / "track_non_record_16mb").glob("*_Two")
    first, second, third = (json.loads((Path(path) / "summary.json").read_text()) for path in swept)
    assert second["train"] is None and second["eval"]["sliding"] is None, "it shares the first run's training"
    facts, readme = json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()
    assert list(facts) == ["author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb", "val_loss_std",
                           "val_bpb_std", "seeds", "seed_results", "bytes_total", "bytes_code", "bytes_model_int6_zstd"]
    assert facts["seeds"] == [13, 1111] and facts["github_id"] == "some1"
    for s, maker in ((second, first), (third, third)):
        entry = facts["seed_results"][str(s["seed"])]
        assert entry["val_bpb"] == pytest.approx(s["val_bpb"], abs=6e-9) and entry["step_stop"] == 12
        assert entry["val_loss"] == pytest.approx(s["eval"]["ttt"]["val_loss"], abs=6e-9)
        assert entry["bytes_total"] == s["artifact"]["bytes_total"]
        trained = maker["train"]["seconds"] + maker["seconds"]["search"]
        assert entry["wallclock_seconds"] == pytest.approx(trained)
        assert f" | {trained:,.1f} | " in next(row for row in readme.splitlines() if row.startswith(f"| {s['seed']} |"))
        cells = [f"{(s['eval'][key] or maker['eval'][key])['val_bpb']:.4f}" for key in ("int6", "sliding", "ttt")]
        assert f"| {s['seed']} | 12 | {' | '.join(cells)} | " in readme
    assert facts["val_bpb"] == pytest.approx(sum(e["val_bpb"] for e in facts["seed_results"].values()) / 2)
    assert facts["bytes_total"] == facts["bytes_code"] + facts["bytes_model_int6_zstd"]
    top = readme.split("## ")[0]
    assert "Not a record: " in top and "not 8 x H100" in top and "partial split" in top
    logs = {path.name for path in folder.glob("*.log")}
    assert logs == {"train_seed13.log", "eval_seed13.log", "train_seed1111.log"}
    for path in folder.iterdir():
        places = first["config"]["data_path"], str(Path(swept[0]).parent), str(ROOT)
        assert path.suffix == ".png" or not any(place in path.read_text() for place in places), path
    assert (folder / "train_gpt_readable.py").read_bytes() == t.SCRIPT.read_bytes()
    assert (folder / "train_gpt.py").read_bytes() == t.pack_script(t.SCRIPT.read_bytes())
    assert facts["bytes_code"] == (folder / "train_gpt.py").stat().st_size
    assert f"torch=={t.torch.__version__.partition('+')[0]}\n" in (folder / "requirements.txt").read_text()
    for stem in ("training", "running_bpb", "bytes"):
        assert (folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG") and f"({stem}.png)" in readme
        assert "<svg" in (folder / f"{stem}.svg").read_text()
    check_test(readme, facts, third)
    run_again(folder, readme, facts, tmp_path / "project", corpus)
    index = (tmp_path / "records" / "README.md").read_text()
    assert f"[Two](track_non_record_16mb/{folder.name})" in index and f"{facts['val_bpb']:.4f} ± " in index
    refused(call(record, *swept[1:], "--name", "Two", "--author", "x", "--non-record"), "no record is overwritten")


def check_test(readme, facts, summary):
    """The README's test, by Student's t with one degree of freedom, whose distribution has a closed form."""
    score = summary["eval"]["ttt"]
    reference = 4.5 * math.log(2) * score["bytes"] / score["tokens"]
    gains = [reference - entry["val_loss"] for entry in facts["seed_results"].values()]
    mean, half = sum(gains) / 2, abs(gains[0] - gains[1]) / 2  # half the distance: deviation by sqrt(2)
    part = readme.split("## Against the one before\n")[1].split("\n## ")[0]
    assert f"| {mean:+.4f} |" in part and "its seeds were not given" in part and "three seeds; here are 2." in part
    for claim, margin, level in (("as applied on the board: better", 0.0, 0.25),
                                 ("the challenge's, strict: better by 0.005 nats/token", 0.005, 0.01)):
        value = (mean - margin) / half
        p = 0.5 - math.atan(value) / math.pi
        shown = f"{p:.2g}" if p < 0.1 else f"{p:.3f}"
        row = f"| {claim}, p < {level} | {value:.2f} | 1.00 | {shown} | {'yes' if p < level else 'no'} |"
        assert row in part, (row, part)


def run_again(folder, readme, facts, project, corpus):
    """Run the README's command, for one seed, in a copy of the record inside a copy of the project's folders."""
    place = project / "records" / folder.parent.name / folder.name
    shutil.copytree(folder, place)
    shutil.copytree(corpus, project / "data" / "datasets" / corpus.name)
    command = re.search(r"```sh\n(.*?)```", readme, re.S)[1].replace("for seed in 13 1111", "for seed in 13")
    env = clean_environment() | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", command], env=env, cwd=project, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    summary = json.loads((place / "logs" / "seed13" / "summary.json").read_text())
    assert summary["val_bpb"] == pytest.approx(facts["seed_results"]["13"]["val_bpb"], abs=6e-9)


@pytest.mark.parametrize("gains, margin, value, p", [  # from tables of Student's t
    ([1.0, 2.0, 3.0], 2.0 - 6.965 / 3**0.5, 6.965, 0.01), ([1.0, 2.0, 3.0], 2.0 - 2.920 / 3**0.5, 2.920, 0.05),
    ([1.0, 1.0, 3.0, 3.0, 2.0], 2.0 - 3.747 / 5**0.5, 3.747, 0.01), ([1.0, 2.0, 3.0], 2.0, 0.0, 0.5),
    ([1.0, 1.0], 2.0, -math.inf, 1.0),
])
def test_student(gains, margin, value, p):
    found = record_review.welch([gain - margin for gain in gains], [0.0])
    assert found == (pytest.approx(value, abs=1e-9), len(gains) - 1, pytest.approx(p, abs=2e-5))


def test_welch():
    """By the closed form of two degrees of freedom, and by another's figures for unequal deviations."""
    value, freedom, p = record_review.welch([1.0, 3.0], [0.5, 2.5])  # deviations alike: Student's with 2 + 2 - 2
    assert (value, freedom) == (pytest.approx(2 / 2**0.5), pytest.approx(2.0))
    assert p == pytest.approx(0.5 - value / (2 * (2 + value**2) ** 0.5))
    scipy_stats = pytest.importorskip("scipy.stats")
    ours, theirs = [1.0611, 1.0607, 1.0615], [1.0632, 1.0618, 1.0640, 1.0629]
    mean = sum(theirs) / 4
    found = record_review.welch([mean - score for score in ours], theirs)
    other = scipy_stats.ttest_ind(theirs, ours, equal_var=False, alternative="greater")
    assert found == (pytest.approx(other.statistic), pytest.approx(other.df), pytest.approx(other.pvalue))


def test_a_record_where_nothing_speaks_against_it(swept, call, tmp_path):
    """Its logs are also rid of paths that no setting names, and of ones with spaces."""
    place = moved("/a place/fineweb10B data")
    line = (r"^train_loader:", "warning: checkpoint /mnt/disk-1/x/step_8.npz, of /a place/fineweb10B data/y\n"
            "train_loader:")
    runs = clean(swept, tmp_path, log=[*place["log"], line], summary=place["summary"])
    refused_all = call(record, *runs, "--name", "other", "--author", "x")[2]
    assert refused_all.startswith("error: not a record: the runs differ in DATA_PATH")
    runs = [forged(runs[0], tmp_path / "same", **place), runs[1]]
    code, out, err = call(record, *runs, "--name", "Clean", "--author", "someone")
    assert code == 0, err
    (folder,) = (tmp_path / "records" / "track_10min_16mb").glob("*_Clean")
    assert "checkpoint step_8.npz, of fineweb10B data/y\n" in (folder / "train_seed1111.log").read_text()
    readme = (folder / "README.md").read_text()
    assert "Not a record" not in readme and "no check speaks against it" in out
    assert "Caution: 2 seeds; a record is usually shown with 3" in readme.split("## ")[0]
    assert "parameters" not in readme.split("## ")[0], "which only an artifact tells beside the log, and there is none"
    assert json.loads((folder / "submission.json").read_text())["seed_results"]["13"]["hardware"] == f"8 x {H100}"
    assert (tmp_path / "records" / "README.md").read_text().splitlines()[-1].endswith("| yes |")


@pytest.mark.parametrize("log, summary, reason", [
    ([(r'^(config .*"matrix_lr": )0.025', r"\g<1>0.5")], [("config.matrix_lr", 0.5)],
     "the runs differ in MATRIX_LR: 0.025 (seed 13), 0.5 (seed 1111)"),
    ([(r"'torch': '[^']*'", "'torch': '1.0'")], [], "the runs differ in the version of torch"),
    ([(r"^(Serialized model int6\+zstd: )\d+", r"\g<1>16000000"),
      (r"^(Total submission size int6\+zstd: )\d+", rf"\g<1>{16_000_000 + CODE}")],
     [("artifact.bytes_model", 16_000_000), ("artifact.bytes_total", 16_000_000 + CODE)],
     "bytes, over 750,000"),
    ([], [("seconds.search", 700.0)], "seed 1111: training took 70"),
    ([(r"^(evaluation clocks: .* \(reading )[\d.]+", r"\g<1>700.0")], [("seconds.read", 700.0)],
     "seed 1111: evaluation took 70"),
    ([(r"^valid: yes", "valid: yes\nnote: resumed 1 times")], [("caveats", ["resumed 1 times"])],
     "seed 1111: resumed 1 times"),
    ([(r"^valid: yes", "valid: NO, int6: a target was scored twice")],
     [("valid", False), ("reasons", ["int6: a target was scored twice"])],
     "seed 1111: int6: a target was scored twice"),
])
def test_each_reason_is_named(swept, call, tmp_path, monkeypatch, log, summary, reason):
    monkeypatch.setattr(figures, "pictures", lambda *_: [])
    runs = clean(swept, tmp_path, log=log, summary=summary)
    code, out, err = call(record, *runs, "--name", "no", "--author", "x")
    lines = err.splitlines()
    assert code == 2 and len(lines) == 2 and all(line.startswith("error: ") for line in lines), err
    assert f"not a record: {reason}" in lines[0] or reason in lines[0] and "not a record" in lines[0], err
    assert not (tmp_path / "records").exists()
    code, out, err = call(record, *runs, "--name", "yes", "--author", "x", "--non-record")
    assert code == 0, err
    (readme,) = (tmp_path / "records" / "track_non_record_16mb").glob("*_yes/README.md")
    assert reason in " ".join(readme.read_text().split("## ")[0].split())


def test_what_counts_must_be_what_ran(swept, call, tmp_path, monkeypatch):
    """The packed file of each run: there, of the counted bytes, and the script of its log."""
    options = "--name", "no", "--author", "x", "--non-record"
    folder = Path(forged(swept[0], tmp_path / "run"))
    path = folder / t.PACKED_NAME
    packed = path.read_bytes()
    path.unlink()
    refused(call(record, folder, *options), "has no train_gpt.packed.py, which its bytes count")
    path.write_bytes(packed + b"#")
    refused(call(record, folder, *options), f"has {len(packed) + 1} bytes and sha256", f"counts {len(packed)} and")
    path.write_bytes(packed.replace(b'PACKED="', b'PACKED="0', 1)[:-1])
    refused(call(record, folder, *options), f"has {len(packed)} bytes and sha256")
    folder = counting(swept[0], tmp_path / "other", len(packed), t.pack_script(b"x = 1\n"))
    refused(call(record, folder, *options), "does not unpack to the script in its train.log")
    text = t.base64.b85encode(t.lzma.compress(t.unpack_script(packed), preset=0)).decode()  # by another lzma
    folder = counting(swept[2], tmp_path / "again", len(packed), (t.UNPACKER % text).encode())
    assert call(record, folder, *options)[0] == 0
    refused(call(record, swept[0], folder, *options[2:], "--name", "two"), "counted another packed script than 1_")
    monkeypatch.setattr(record, "packs", lambda *_: False)
    refused(call(record, swept[0], *options[2:], "--name", "three"), "does not unpack to the script in its train.log")


def test_a_record_of_float_weights_has_the_packed_script_too(launch, call, monkeypatch):
    """Without an artifact no bytes are counted; the script is packed all the same."""
    monkeypatch.setattr(figures, "pictures", lambda *_: [])
    run = launch(EXPORT_ENABLED=0, CODE_BYTES="packed", ITERATIONS=2)
    code, out, err = call(record, run.folder, "--name", "float", "--author", "x", "--non-record")
    assert code == 0, err
    (folder,) = Path("records").glob("*/*_float")
    assert t.unpack_script((folder / "train_gpt.py").read_bytes()) == t.lean(t.SCRIPT.read_text()).encode()
    assert (folder / "train_gpt_readable.py").read_bytes() == t.SCRIPT.read_bytes()


def test_a_record_whose_script_does_more_is_found(swept, call, tmp_path, monkeypatch):
    """Though its size and sha256 are those that its logs name."""
    monkeypatch.setattr(figures, "pictures", lambda *_: [])
    assert call(record, swept[0], "--name", "a", "--author", "x", "--non-record")[0] == 0
    (folder,) = (tmp_path / "records").glob("*/*_a")
    honest = (folder / "train_gpt.py").read_bytes()
    other = honest.replace(b"exec(compile(UNPACKED,", b"exec(compile(UNPACKED+'',")
    (folder / "train_gpt.py").write_bytes(other)
    told = f"code counted: {len(other)} bytes, sha256 {t.hashlib.sha256(other).hexdigest()}"
    for log in folder.glob("*.log"):
        text = re.sub(r"^code counted: .*", told, log.read_text(), flags=re.M)
        text = re.sub(r"^(Code size .compressed.: )\d+", rf"\g<1>{len(other)}", text, flags=re.M)
        log.write_text(re.sub(r"^(Total submission size int6\+zstd: )(\d+)", lambda m: f"{m[1]}{int(m[2]) + 3}", text,
                              flags=re.M))
    facts = json.loads((folder / "submission.json").read_text())
    facts["bytes_total"] += 3
    facts["seed_results"]["13"]["bytes_total"] += 3
    (folder / "submission.json").write_text(json.dumps(facts))
    code, out, err = call(check_record, folder)
    assert code == 1 and "train_gpt.py does something else than to run train_gpt_readable.py" in out, out


def counting(path, to, before: int, packed: bytes) -> Path:
    """A copy of a run's folder that counts another file, of `before` bytes before."""
    told = [(r"^code counted: .*", f"code counted: {len(packed)} bytes, sha256 {t.hashlib.sha256(packed).hexdigest()}"),
            (r"^(Code size .compressed.: )\d+", rf"\g<1>{len(packed)}"),
            (r"^(Total submission size int6\+zstd: )(\d+)", lambda m: f"{m[1]}{int(m[2]) - before + len(packed)}")]
    folder = Path(forged(path, to, log=told))
    facts = json.loads((folder / "summary.json").read_text())
    facts["artifact"] |= {"bytes_code": len(packed), "bytes_total": facts["artifact"]["bytes_model"] + len(packed)}
    (folder / "summary.json").write_text(json.dumps(facts))
    (folder / t.PACKED_NAME).write_bytes(packed)
    return folder


def test_the_data_must_have_been_verified(swept, call, tmp_path, monkeypatch, corpus):
    """Before a run, which then knows of it, or before the record; what was found is in its README."""
    monkeypatch.setattr(figures, "pictures", lambda *_: [])
    data = tmp_path / "fineweb10B_sp1024"
    shutil.copytree(corpus, data)
    names = sorted(path.name for path in data.glob("fineweb_*.bin"))
    files = [{"name": name, "bytes": (data / name).stat().st_size, "mtime": int((data / name).stat().st_mtime),
              "sha256": t.hashlib.sha256((data / name).read_bytes()).hexdigest()} for name in names]
    told = {key: value for key, value in VERIFIED.items() if key != "sha256"} | {"files": files, "faults": []}

    def of(verified, state=None) -> list[str]:
        changes = in_all(moved(str(data)), knows_of_data(verified, state or t.state_of(data)))
        return [forged(path, tmp_path / f"{len(list(tmp_path.iterdir()))}", **changes) for path in runs]

    runs = clean(swept, tmp_path)
    options = "--author", "x", "--name"
    said = call(record, *of(None), *options, "a")[2]
    assert "error: not a record: data not verified (./run.sh data --verify)" in said
    (data / "verified.json").write_text(json.dumps(told | {"faults": ["two"]}))
    assert "not a record: verified data has 1 faults" in call(record, *of(None), *options, "a")[2]
    (data / "verified.json").write_text(json.dumps(told | {"files": files[:1]}))
    assert "not a record: data not verified" in call(record, *of(None), *options, "a")[2], "a shard came since"
    (data / "verified.json").write_text(json.dumps(told))
    said = call(record, *of(None, "ab"), *options, "a")[2]
    assert "error: not a record: data not verified" in said, "it had other shards than those that were verified"
    code, out, err = call(record, *of(None), *options, "later")
    assert code == 0, err
    (folder,) = (tmp_path / "records").glob("*/*_later")
    shell = ["bash", "-c", "sha256sum fineweb_*.bin | sha256sum"]
    shown = subprocess.run(shell, cwd=data, capture_output=True, text=True)
    assert f"sha256 {shown.stdout.split()[0]} (" in (folder / "README.md").read_text()
    shutil.rmtree(data)
    assert record.main(["--index", "--records", str(tmp_path / "records")]) == 0
    assert (tmp_path / "records" / "README.md").read_text().splitlines()[-1].endswith("| yes |"), "data.json tells it"
    (folder / "data.json").unlink()
    record.main(["--index", "--records", str(tmp_path / "records")])
    assert "not a record: data not verified" in (tmp_path / "records" / "README.md").read_text()
    assert call(record, *of(VERIFIED), *options, "before")[0] == 0
    (folder,) = (tmp_path / "records").glob("*/*_before")
    assert not (folder / "data.json").exists() and "ab" * 32 in (folder / "README.md").read_text()


def test_a_readme_has_what_a_reviewer_asks(swept, call, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "pictures", lambda *_: [])
    (tmp_path / "idea.md").write_text("We **round** once.\n\nThen we stop.\n")
    warm = {"log": [(r"^(warm-up: )[\d.]+", r"\g<1>61.5")], "summary": [("seconds.warm_up", 61.5)]}
    first, second = clean(swept, tmp_path, **warm)
    slow = {"log": [(r"^(evaluation clocks: .* compiling )[\d.]+", r"\g<1>601.0")],
            "summary": [("seconds.compile", 601.0)]}
    second = forged(second, tmp_path / "slow", **slow)
    entries = ["--reference-bpb", "4.9,4.8,5.0", "--reference-name", "PR 1",
               "--reference-bpb", "9", "--reference-name", "PR 2"]
    code, out, err = call(record, first, second, "--name", "a", "--author", "x", "--non-record", "--idea",
                          tmp_path / "idea.md", "--baseline", swept[1], *entries)
    assert code == 0, err
    readme = next((tmp_path / "records").glob("*/*_a/README.md")).read_text()
    assert "\n## Idea\nWe **round** once.\n\nThen we stop.\n" in readme
    summaries = [json.loads((Path(path) / "summary.json").read_text()) for path in (first, second)]
    timing = readme.split("## Timings\n")[1].split("## ")[0]
    for seed, s, strict in (13, summaries[0], False), (1111, summaries[1], True):
        trained = s["train"]["seconds"] + s["seconds"]["search"]
        walk = s["eval"]["ttt"]["seconds"] + s["seconds"]["read"]
        cells = [trained + s["seconds"]["warm_up"] * strict, trained, walk + s["seconds"]["compile"], walk]
        if not strict:  # as its warm-up was nothing
            assert s["seconds"]["warm_up"] < 0.05
        assert f"| {seed} | {' | '.join(f'{x:,.1f}' for x in cells)} |" in timing, timing
    assert "| within 600 | yes | yes | no | yes |" in timing and "evaluation took 60" in readme.split("## ")[0]
    origin = readme.split("## Origin\n")[1].split("\n## ")[0]
    source, packed = t.SCRIPT.read_bytes(), t.pack_script(t.SCRIPT.read_bytes())
    digests = [t.hashlib.sha256(x).hexdigest() for x in (source, packed)]
    assert f"`train_gpt_readable.py`: {len(source):,} bytes, sha256 {digests[0]}" in origin
    assert f"`train_gpt.py`: the same packed, {len(packed):,} bytes, sha256 {digests[1]}" in origin
    assert f"Tokenizer: sha256 {summaries[0]['data']['tokenizer_sha256']}" in origin
    assert "3 validation documents are in the training data too; 8,000 validation tokens of 70 documents" in origin
    assert "causal ok" in origin and f"on an excerpt, 32 of 1,001 targets ({32 / 1001:.2%})" in origin
    assert "## Against PR 1\n" in readme and "Welch's t test" in readme and "## Against PR 2\n" in readme
    base = readme.split("## Against the baseline 2_TTT_LR=3e-3_SEED=13\n")[1].split("\n## ")[0]
    assert "| TTT_LR | 0.003 | 0.001 |" in base and "| steps | 12 | 12 | +0 |" in base and "another script" not in base
    theirs = json.loads((Path(swept[1]) / "summary.json").read_text())["val_bpb"]
    ours = sum(s["val_bpb"] for s in summaries) / 2
    row = next(line for line in base.splitlines() if line.startswith("| TTT score-first, BPB |"))
    assert row.startswith(f"| TTT score-first, BPB | {theirs:.4f} | {ours:.4f} ± ")
    assert row.endswith(f" | {ours - theirs:+.4f} |") and "| DATA_PATH | tiny | fineweb10B_sp1024 |" in base
    for words, said in ((["--idea", tmp_path / "none.md"], "none.md: cannot be read"),
                        (["--reference-bpb", "1.0"] * 2, "a --reference-name for each --reference-bpb"),
                        (["--reference-bpb", "1.0,x"], "--reference-bpb"), (["--baseline", "nowhere"], "no such run")):
        refused(call(record, first, "--name", "b", "--author", "x", "--non-record", *words), said)


def test_the_commit_of_a_script_is_found():
    git = ["git", "-C", str(ROOT), "log", "-2", "--format=%H", "--", "train_gpt.py"]
    shown = subprocess.run(git, capture_output=True, text=True).stdout.split()
    if not shown:
        pytest.skip("not a clone of the project")
    for commit in shown:
        code = subprocess.run(["git", "-C", str(ROOT), "show", f"{commit}:train_gpt.py"], capture_output=True).stdout
        assert record_review.commit_of(code) == record_review.commit_of(t.lean(code.decode()).encode()) == commit
    assert record_review.commit_of(b"x = 1\n") == ""


@pytest.mark.parametrize("changes, reason", [
    ([("bytes.ok", False), ("ok", False)], "the audit of bytes failed"),
    ([("ok", False)], "the audit of causal failed"), ([("causal", None)], "no audit of causal"),
    ([("artifact_sha256", "0")], "its audit is of another artifact (./run.sh audit)"),
    ([("code_sha256", "0")], "its audit is of another train_gpt.py (./run.sh audit)"),
    ([("val_bpb", 1.0)], "its audit is of another score (./run.sh audit)"), (None, "no audit (./run.sh audit)"),
])
def test_an_audit_is_demanded(swept, call, tmp_path, monkeypatch, changes, reason):
    """Of this artifact, this script and this score; what a log says is none. The index asks for it too."""
    monkeypatch.setattr(figures, "pictures", lambda *_: [])
    runs = clean(swept, tmp_path, audit=changes or [], log=[(r"^valid: yes", "audit causal: ok, it says\nvalid: yes")])
    if changes is None:
        Path(runs[1], "audit.json").unlink()
    err = call(record, *runs, "--name", "no", "--author", "x")[2]
    assert f"error: not a record: seed 1111: {reason}\n" in err, err
    if changes is None:
        code, _, err = call(record, *clean(swept, tmp_path / "b"), "--name", "yes", "--author", "x")
        (folder,) = (tmp_path / "records" / "track_10min_16mb").glob("*_yes")
        assert code == 0 and json.loads((folder / "audit_seed1111.json").read_text())["ok"], err
        index = tmp_path / "records" / "README.md"
        assert index.read_text().splitlines()[-1].endswith("| yes |")
        (folder / "audit_seed1111.json").unlink()
        assert call(record, "--index")[0] == 0
        assert "| not a record: seed 1111: no audit (./run.sh audit) |" in index.read_text()


def test_a_broken_audit_is_said(swept, call, tmp_path):
    path = forged(swept[0], tmp_path / "x")
    for text in ("{", "[]", "{}", '{"code_sha256": 1, "causal": {}}'):
        Path(path, "audit.json").write_text(text)
        refused(call(show, path), "audit.json is not that of an audit")


def test_nothing_half_written_stays(swept, call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "training.png")

    monkeypatch.setattr(figures, "pictures", full)
    refused(call(record, swept[0], "--name", "x", "--author", "x", "--non-record"), "No space left")
    assert list((tmp_path / "records").glob("*/*")) == list((tmp_path / "records").glob("*/.*")) == []


# ---- what is refused ----


@pytest.mark.parametrize("name, words", [
    ("a/b", "--name 'a/b': give letters, digits and . _ - only"), ("..", "--name '..'"), ("", "--name ''"),
    ("a b", "--name 'a b'"), ("$(x)", "--name '$(x)'"), ("-n", "--name"), ("é", "--name 'é'")])
def test_a_name_is_a_folder(swept, call, name, words):
    refused(call(record, swept[0], "--name", name, "--author", "x"), words)


def test_runs_of_several_settings_are_told_apart(swept, call, tmp_path, monkeypatch):
    """The settings in which they differ are named, and each command that is printed makes a record."""
    words = ("--name", "x", "--author", "a b", "--non-record")
    monkeypatch.setenv("LAUNCHED_BY", "./run.sh")
    code, out, err = call(record, *swept, *words)
    said, *commands = err.splitlines()
    assert code == 2 and said.startswith("error: the runs differ in TTT_LR, not in the seed alone"), err
    assert len(commands) == 2 and sum(command.count("SEED=13") for command in commands) == 2
    for command in commands:
        assert command.startswith("./run.sh record ") and "'a b'" in command and command.count("--name") == 1
        arguments = shlex.split(command)[2:]
        name = arguments[-1]
        assert name.startswith("x_0.00")
        code, out, err = call(record, *arguments)
        assert code == 0 and f"_{name}\n" in out, err
    monkeypatch.setenv("LAUNCHED_BY", "bash run.sh")
    assert "\nbash run.sh record " in call(record, *swept, *words)[2]


def test_bad_input_is_one_line(swept, call, tmp_path):
    one = swept[0]
    name = ("--name", "x", "--author", "x")
    other = forged(one, tmp_path / "other")
    for tool, extra in ((show, ()), (record, name)):
        refused(call(tool, tmp_path / "nowhere", *extra), "nowhere: no such run")
        refused(call(tool, tmp_path, *extra), "holds no run")
        refused(call(tool, one, one, *extra), "given twice")
    refused(call(record, one, other, *name), "1_TTT_LR=1e-3_SEED=13 and other: have the same seed, 13, and settings")
    refused(call(record, one), "give the runs, --name and --author")
    refused(call(record, one, *name, "--reference-bpb", "-1"), "--reference-bpb")
    (tmp_path / "text.log").write_text("nothing of a run\n")
    refused(call(show, tmp_path / "text.log"), "not a log of this field")
    (tmp_path / "old.log").write_text(published())
    refused(call(record, tmp_path / "old.log", *name), "not a run's folder")
    edited = (tmp_path / "other" / "train.log").read_text()
    (tmp_path / "other" / "train.log").write_text(edited.replace("import math", "import  math", 1))
    refused(call(record, other, *name), "the size of the script is")


@pytest.mark.parametrize("place, value, figure", [
    ("eval.ttt.val_bpb", 1.0, "val_bpb of ttt"), ("eval.sliding.val_loss", 1.0, "val_loss of sliding"),
    ("eval.int6", None, "the int6 score"), ("val_bpb", 1.0, "val_bpb"), ("eval.ttt.tokens", 7, "targets of ttt"),
    ("artifact.bytes_total", 7, "bytes_total"), ("artifact.bytes_code", 7, "bytes_code"), ("train.steps", 13, "steps"),
    ("train.seconds", 9.5, "training seconds"), ("seconds.read", 9.5, "seconds of read"), ("seed", 8, "seed"),
    ("config.matrix_lr", 0.5, "MATRIX_LR"), ("caveats", [], "the caveats"),
    ("valid", False, "valid"), ("hardware.name", "H100", "hardware"), ("artifact.bytes_source", 7, "bytes_source"),
    ("data.verified", VERIFIED, "verified of its data"), ("data.tokenizer_sha256", "0", "tokenizer_sha256 of its data"),
])
def test_an_edited_summary_is_found(swept, call, tmp_path, place, value, figure):
    path = forged(swept[0], tmp_path / "edited", summary=[(place, value)])
    refused(call(show, path), f"{figure} is ", "summary.json", "one of them was edited")


@pytest.mark.parametrize("pattern, replacement, figure", [
    (r"^legal_ttt_exact val_loss:\S+", "legal_ttt_exact val_loss:1.00000000", "val_loss of ttt"),
    (r"^(legal_ttt_exact .*val_bpb:)\S+", r"\g<1>1.00000000", "val_bpb of ttt"),
    (r"^(step:6/12 train_loss:)\S+", r"\g<1>1.0000", "train_loss of step 6"),
    (r"^(step:12/12 val_loss:\S+ val_bpb:)\S+", r"\g<1>1.0000", "val_bpb of step 12"),
    (r"^(ttt_chunk \[2/4\] bpb=)\S+", r"\g<1>1.000000", "bpb of chunk 2"),
    (r"^step:8/12 train_loss.*\n", "", "lines of train_loss"),
    (r"^Serialized model int6\+zstd: \d+", "Serialized model int6+zstd: 5", "the size is"),
    (r"^note: partial split", "note: whole split", "the caveats"),
    (r"^note: partial split: its first 1001", "note: partial split: its first 9999", "what was scored is"),
    (r"^Code size .compressed.: .*\n", "", "the log has no line 'Code size' beside the other sizes"),
    (r"^(Code size .uncompressed.: )\d+", r"\g<1>7", "the size of the script"),
    (r"^(code counted: )\d+", r"\g<1>7", "the size of the code that counts"),
    (r"^Serialized model int6.*\n", "", "the log has no line 'Serialized model int6' beside"),
    (r"^config .*\n", "", "train.log has no line 'config'"),
    (r"^(?:config|preset).*\n", "", "train.log has no line of config"),
    (r"^hardware .*\n", "", "train.log has no line 'hardware'"),
    (r"^hardware .*", "hardware {'device'}", "cut or edited, \"hardware {'device'}\""),
    (r"^python .*\n", "", "train.log has no line 'python'"),
    (r"^(config .*\"matrix_lr\": )[\d.]+", r"\1[]", "cut or edited, 'config"),
    (r"^config .*", "config " + '{"a":' * 9999 + "}" * 9999, "cut or edited, 'config"),
    (r"^preset:demo", "preset:seed", "the preset is seed in its own line"),
    (r'^(preset:.*"MODEL_DIM": )32', r"\g<1>33", "MODEL_DIM is 33 in the preset line"),
    (r"^train_loader:dataset:tiny", "train_loader:dataset:fineweb10B_sp1024", "the data is fineweb10B_sp1024"),
    (r"^world_size:1 ", "world_size:8 ", "world_size is 8"),
    (r"^( *ttt_chunk \[)1/4\]", r"\g<1>1/0]", "cut or edited, '"),
    (r"^step:2/12 ", "step:30/0 ", "cut or edited, 'step:30/0"),
    (r"^(step:2/12 .*train_time:)\d+", r"\g<1>" + "9" * 400, "cut or edited, 'step:2/12"),
])
def test_an_edited_log_is_found(swept, call, tmp_path, pattern, replacement, figure):
    path = forged(swept[0], tmp_path / "edited", log=[(pattern, replacement)])
    refused(call(show, path), figure, "give ")


@pytest.mark.parametrize("log, summary, words", [
    ([(r"^note: not 8.*\n", "")], [("caveats", (0, 1, 3))], "its lines show 'not 8 x H100: 1 x "),
    ([(r"^note: not the challenge.*\n", "")], [("caveats", (0, 2, 3))],
     "its lines show \"not the challenge's data: tiny\""),
    ([(r"^train_loader:", "resumed from its artifact, scored so far: int6\ntrain_loader:")], [],
     "its lines show 'resumed'"),
    ([(r"^train_loader:", "a loss is not finite; the step is dropped, 1 in a row\ntrain_loader:")], [],
     "its lines show 'steps that were not finite were dropped'"),
    ([(r'^(preset:.*"EMA_DECAY": )0.5', r"\g<1>0.9"), (r'^(config .*"ema_decay": )0.5', r"\g<1>0.9")],
     [("config.ema_decay", 0.9)], "EMA_DECAY is 0.9 in train.log and 0.5 in summary.json"),
    ([(r"^preset:demo", "preset:seed"), (r'^(config .*"preset": )"demo"', r'\1"seed"')], [("config.preset", "seed")],
     "the preset is seed in train.log and demo in summary.json"),
])
def test_what_was_edited_in_two_places_is_found_in_a_third(swept, call, tmp_path, log, summary, words):
    caveats = json.loads(Path(swept[0], "summary.json").read_text())["caveats"]
    summary = [(place, [caveats[i] for i in value] if place == "caveats" else value) for place, value in summary]
    refused(call(show, forged(swept[0], tmp_path / "edited", log=log, summary=summary)), words)


def test_a_cut_split_is_said_by_the_run(swept, call, tmp_path):
    """Where its data has the name of published shards, its notes say that it is cut."""
    pieces = {"log": [(r'^(config .*"vocab_size": )400', r"\g<1>1024"),
                      (r'^(preset:.*"VOCAB_SIZE": )400', r"\g<1>1024")],
              "summary": [("config.vocab_size", 1024), ("overrides.VOCAB_SIZE", 1024)]}
    path = forged(swept[0], tmp_path / "cut", **in_all(CLEAN, pieces))
    refused(call(show, path), "its lines show 'not the published split: 1001 targets, there about 62021632', its notes")


def test_the_artifact_and_the_sweep_tell_more(swept, call, tmp_path, monkeypatch):
    """The artifact has the parameters, and sweep.json the script's sha256; else that must at least compile."""
    name = ("--name", "x", "--author", "x", "--non-record")
    path = forged(swept[0], tmp_path / "edited", log=[(r"^model_params:", "model_params:9")])
    shutil.copy(Path(swept[0], t.ARTIFACT_NAME), path)
    refused(call(show, path), "model_params is 9")
    path = forged(swept[0], tmp_path / Path(swept[0]).name)
    log = Path(path, "train.log")
    whole = log.read_text()
    log.write_text(whole.replace("import math", "import =ath", 1))
    refused(call(record, path, *name), "does not compile")
    log.write_text(whole.replace(" the ", " teh ", 1))  # of its docstring
    shutil.copy(Path(swept[0]).with_name("sweep.json"), tmp_path)
    refused(call(record, path, *name), "is not that of its sweep.json")
    log.write_text(whole)
    Path(path, "metrics.jsonl").unlink()
    refused(call(record, path, *name), "has no metrics.jsonl")
    Path(path, "summary.json").unlink()
    refused(call(record, path, *name), "has not finished; to go on: the same sweep again")
    (tmp_path / "sweep.json").unlink()
    monkeypatch.setenv("LAUNCHED_BY", "../run.sh")
    hint = f"has not finished; to go on: LOG_DIR={tmp_path} RUN_ID={Path(path).name} RESUME=1 ../run.sh"
    refused(call(record, path, *name), hint)


def test_cut_and_broken_files(swept, call, tmp_path):
    path = forged(swept[0], tmp_path / "cut")
    log, metrics, summary = (tmp_path / "cut" / name for name in ("train.log", "metrics.jsonl", "summary.json"))
    for file, broken, words in ((log, log.read_text()[:-9], "train.log is cut in its last line"),
                                (log, re.sub(r"^(step:2/12 train_lo).*", r"\1", log.read_text(), flags=re.M),
                                 "cut or edited, 'step:2/12 train_lo'"),
                                (metrics, metrics.read_text()[:-9], "metrics.jsonl is cut in its last line"),
                                (metrics, "{}\n" + metrics.read_text(), "metrics.jsonl:1: not a line of a run"),
                                *((metrics, re.sub(r'"rate_factor": [\d.]+', f'"rate_factor": {odd}',
                                                   metrics.read_text()), "not a line of a run") for odd in
                                  ('"x"', "1.5", "-1", "NaN", "[]")),
                                (metrics, metrics.read_text().replace('"chunks": 4', '"chunks": 0'),
                                 "not a line of a run"),
                                (summary, summary.read_text()[:-9], "summary.json is broken"),
                                (summary, "{}", "summary.json is not that of a run"),
                                (summary, "[]", "summary.json is ")):
        whole_text = file.read_text()
        file.write_text(broken)
        refused(call(show, path), words)
        refused(call(record, path, "--name", "x", "--author", "x"), words)
        file.write_text(whole_text)
    assert call(show, path)[0] == 0


# ---- show ----


def published(seed=7, ttt="") -> str:
    """A log in the line formats of the field's published ones; with `ttt` lines of PR 549, else of the seed."""
    lines = ["val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=/root/data/tokenizers/x.model",
             "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
             "val_loader:shards pattern=/root/data/fineweb_val_*.bin tokens:62021632", "model_params:26823545",
             "world_size:8 grad_accum_steps:1", f"seed:{seed}", "warmup_step:20/20",
             "step:0/9000 val_loss:6.9300 val_bpb:4.1040 train_time:0ms step_avg:0.01ms",
             *(f"step:{i}/9000 train_loss:{9 - i / 10:.4f} train_time:{100 * i}ms step_avg:100.00ms"
               for i in range(1, 11)),
             "step:5000/9000 train_loss:2.0000 train_time:500000ms step_avg:100.00ms",
             "step:5900/9000 val_loss:1.9400 val_bpb:1.1500 train_time:596010ms step_avg:101.02ms",
             "stopping_early: wallclock_cap train_time:596010ms step:5900/9000",
             "peak memory allocated: 20779 MiB reserved: 20916 MiB", "ema:applying EMA weights"]
    lines += ["DIAGNOSTIC post_ema val_loss:1.9300 val_bpb:1.1400 eval_time:2000ms"] if ttt else []
    coder = "lzma" if ttt else "zstd"
    lines += ["Serialized model: 105887627 bytes", "Code size: 80000 bytes", f"Serialized model int6+{coder}: 15800000 "
              "bytes", f"Total submission size int6+{coder}: 15880000 bytes"]
    lines += [] if ttt else ["ttt:start lr=0.0005 momentum=0.9 epochs=2 freeze_blocks=0",
                             "ttt_epoch:1/2 loss:1.9500 time:16.5s", "ttt_epoch:2/2 loss:1.9300 lr:0.000020 time:32.7s",
                             "ttt:done elapsed=32.7s", "ttt:elapsed=32.7s"]
    lines += ["final_int6_roundtrip val_loss:1.9000 val_bpb:1.1253 eval_time:2238ms",
              "final_int6_roundtrip_exact val_loss:1.90000000 val_bpb:1.12530000",
              "final_int6_sliding_window val_loss:1.8800 val_bpb:1.1134 stride:64 eval_time:84830ms",
              "final_int6_sliding_window_exact val_loss:1.88000000 val_bpb:1.11340000"]
    lines += ttt.splitlines()
    return "\n".join(lines) + "\n"


PR549 = """ttt_sliding:start chunks=21 chunk_tokens=32768 total_windows=969088 stride=64 ttt_lr=0.002 ttt_epochs=3
  ttt_chunk [1/21] bpb=1.160000 time=0.5s
  ttt_chunk [11/21] bpb=1.140000 time=2.7s
  ttt_chunk [21/21] bpb=1.111000 time=4.8s
ttt_sliding:done val_loss=1.876000 val_bpb=1.111000 elapsed=4.8s
legal_ttt val_loss:1.8760 val_bpb:1.1110 eval_time:4900ms
legal_ttt_exact val_loss:1.87600000 val_bpb:1.11100000"""


def test_show_beside_published_logs(swept, call, tmp_path, monkeypatch):
    """The seed's log holds two launches, of which the last counts, and its adaptation on the split is said."""
    monkeypatch.setenv("LOG_DIR", str(Path(swept[0]).parents[1]))
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "seed.log").write_text("code\n" + "=" * 100 + "\n" + published(5, PR549) + published(6))
    (tmp_path / "pr549.log").write_text(published(7, PR549))
    code, out, err = call(show, "two/1_TTT_LR=1e-3_SEED=13", "seed.log", "pr549.log", "--out", "plots")
    assert code == 0, err
    head, ours, seed, legal = (re.split(r"  +", line.strip()) for line in out.splitlines()[:4])
    summary = json.loads(Path(swept[0], "summary.json").read_text())
    assert dict(zip(head, ours, strict=True))["TTT score-first BPB"] == f"{summary['val_bpb']:.4f}"
    expected = {"seed": "6", "steps": "5,900", "loss": "2.0000", "val BPB": "1.1500", "int6 standard BPB": "1.1253",
                "int6 sliding BPB": "1.1134", "TTT score-first BPB": "-", "bytes": "15,880,000", "training s": "596.0",
                "evaluation s": "117.5", "valid": "no", "float BPB": "-", "run": "seed"}
    assert dict(zip(head, seed, strict=True)) == expected
    assert "not valid: 2 epochs of test-time training on the split before its score (seed)" in out
    assert {"float BPB": "1.1400", "TTT score-first BPB": "1.1110", "valid": "not said"}.items() <= dict(
        zip(head, legal, strict=True)).items()
    for stem in ("training", "running_bpb", "bytes"):
        assert (tmp_path / "plots" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "plots" / "training.svg").read_text()
    for label in (f"1_TTT_LR=1e-3_SEED=13: {summary['val_bpb']:.4f} BPB", "seed: 1.1134 BPB", "3 runs"):
        assert f"<!-- {label} -->" in svg


def test_show_a_run_and_a_sweep(swept, call):
    """The figures of one run are its title; runs of a sweep are told apart by their settings."""
    summary = json.loads(Path(swept[0], "summary.json").read_text())
    told = f"{summary['val_bpb']:.4f} BPB, {summary['artifact']['bytes_total']:,} bytes, 12 steps"
    assert call(show, swept[0], "--out", "one")[0] == call(show, Path(swept[0]).parent, "--out", "all")[0] == 0
    assert f"<!-- {Path(swept[0]).name}: {told} -->" in Path("one", "training.svg").read_text()
    svg = Path("all", "training.svg").read_text()
    for label in (f"TTT_LR=0.001, SEED=13: {summary['val_bpb']:.4f} BPB", "two: 3 runs"):
        assert f"<!-- {label} -->" in svg
    assert "TTT_LR=0.003, SEED=1111" in Path("all", "bytes.svg").read_text()


def test_a_published_log_of_another_form_or_edited(call, tmp_path, monkeypatch):
    """Neither is it called unfinished, nor is its contradiction shown as a score."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(figures, "pictures", lambda *_: [])
    (tmp_path / "other.log").write_text(published().partition("DIAGNOSTIC")[0].partition("ttt:start")[0])
    code, out, err = call(show, "other.log")
    assert code == 0 and "form not known, read as far as possible: step 5900 of 9000" in out and "unfinished" not in out
    (tmp_path / "edited.log").write_text(published(7, PR549.replace("legal_ttt val_loss:1.8760 val_bpb:1.1110",
                                                                    "legal_ttt val_loss:1.8760 val_bpb:1.0110")))
    refused(call(show, "edited.log"), "val_bpb of ttt is 1.011 in its line and 1.111 in its exact line")
    (tmp_path / "size.log").write_text(published().replace("Code size: 80000 bytes\n", ""))
    assert call(show, "size.log")[0] == 0, "a published log need not say all"


def test_single_and_last_points_are_drawn_and_a_run_keeps_its_looks(swept, tmp_path):
    plt = figures.pyplot("x")
    figure, axis = plt.subplots()
    figures.draw(axis, [([], []), ([5], [1.0]), (list(range(50)), [1.0] * 50)], ["a", "b", "c"], "t", "u", "step")
    lone, _, _, last = axis.lines
    assert lone.get_marker() == figures.look(1)["marker"] and lone.get_markevery() == 1
    assert last.get_marker() == figures.look(2)["marker"] and list(last.get_xdata()) == [49]
    assert len(axis.get_legend_handles_labels()[1]) == 2
    plt.close(figure)


def test_a_terminal_of_ascii(swept, monkeypatch):
    """Without matplotlib the curves come in signs that it knows."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert show.main([swept[0]]) == 0
    show.tell("1 ± 2")
    said = sys.stdout.buffer.getvalue().decode("ascii")
    assert "no plots" in said and re.search(r"5\.\d+ [_.,~+*#-]{3,} ", said) and said.endswith("1 ? 2\n")


def test_a_published_log_cut_in_a_line(call, tmp_path):
    for cut in ("val_bpb:1.1", "_time:84", "train_lo"):
        text = published()
        (tmp_path / "cut.log").write_text(text[: text.rindex(cut) + len(cut)])
        refused(call(show, "cut.log"), "cut in its last line")


def test_show_a_running_run_without_matplotlib(swept, call, tmp_path, monkeypatch):
    """A run that has not ended, and curves as text."""
    path = forged(swept[0], tmp_path / "going")
    (tmp_path / "going" / "summary.json").unlink()
    for name, last in (("train.log", "step:8/12 train_loss"), ("metrics.jsonl", '"step": 8, "train_loss"')):
        text = (tmp_path / "going" / name).read_text()
        at = text.index("\n", text.rindex(last)) + 1
        (tmp_path / "going" / name).write_text(text[:at])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = call(show, path)
    assert code == 0 and "unfinished: step 8 of 12" in out and not (tmp_path / "logs").exists(), err
    assert "no plots: matplotlib is missing" in out and re.search(r"training loss.*\n +going 5\.\d+ [▁▂▃▄▅▆▇█]+ ", out)
    refused(call(record, path, "--name", "x", "--author", "x", "--non-record"), "has not finished")


def test_bytes_by_part_add_up(swept):
    for path in swept:
        run = reader.read(Path(path))
        parts = reader.byte_parts(run)
        assert sum(parts.values()) == run.total_bytes and {"code", "attn", "mlp", "embed", "fp16"} <= parts.keys()


# ---- the index ----


def test_the_index_is_not_stale():
    assert (ROOT / "records" / "README.md").read_text() == record_text.index(ROOT / "records"), (
        "./run.sh record --index")


def test_the_index_is_made_of_the_logs(swept, call, tmp_path, monkeypatch):
    """Neither submission.json nor the README's words are taken on trust, and what is broken is said in its row."""
    monkeypatch.setattr(figures, "pictures", lambda *_: [])
    assert call(record, swept[0], "--name", "a", "--author", "x", "--non-record")[0] == 0
    index = tmp_path / "records" / "README.md"
    (path,) = (tmp_path / "records").glob("*/*/submission.json")
    readme, log, whole = path.with_name("README.md"), path.with_name("train_seed13.log"), path.read_text()
    facts = json.loads(whole)
    readme.write_text(readme.read_text().replace("Not a record", "A record"))
    assert call(record, "--index")[0] == 0 and "| not a record: partial split" in index.read_text()
    readme.unlink()
    assert call(record, "--index")[0] == 0 and "| not a record: partial split" in index.read_text()
    for broken, words in ((facts | {"val_bpb": facts["val_bpb"] - 0.1}, "submission.json says"),
                          (facts | {"bytes_total": 5}, "bytes_total is"), ([], "has not the keys"),
                          ({"val_bpb": "x"}, "has not the keys"), (facts | {"val_bpb": "x"}, "is not of its kind"),
                          (facts | {"seed_results": {"7": {}}}, "is of the seeds 7, its logs of 13")):
        path.write_text(json.dumps(broken))
        refused(call(record, "--index"), words)
        assert words in index.read_text()
    path.write_text(whole)
    edited = log.read_text().replace("legal_ttt_exact val_loss:", "legal_ttt_exact val_loss:9")
    log.write_text(edited)
    refused(call(record, "--index"), "train_seed13.log cannot be read: val_loss of ttt is")
    assert "train_seed13.log cannot be read" in index.read_text()
    (tmp_path / "records" / "track_non_record_16mb" / "empty").mkdir()
    code, out, err = call(record, swept[0], "--name", "b", "--author", "x", "--non-record")
    assert code == 0 and err.startswith("warning: ") and "train_seed13.log cannot be read" in err
    assert "| no README.md; not a record: no submission.json |" in index.read_text()


# ---- of parts, by runs that are made up ----


def made_up(seed=13, **more) -> Run:
    """A finished run as far as the functions that judge it look."""
    run = Run(Path("x"), "x", ours=True, seed=seed, preset="demo", hardware={"world_size": 8, "name": H100})
    for name, value in more.items():
        setattr(run, name, value)
    return run


def test_a_command_for_each_setting():
    runs = [made_up(seed, config={"matrix_lr": rate}, overrides={"MATRIX_LR": rate}) for seed, rate in
            ((1, 0.1), (2, 0.2), (3, 0.1))]
    said = record_text.command(runs, "a/b")
    assert "for seed in 1 3; do\n  SEED=$seed RUN_ID=seed$seed \\\n  PRESET=demo MATRIX_LR=0.1 " in said
    assert "for seed in 2; do\n  SEED=$seed RUN_ID=seed$seed \\\n  PRESET=demo MATRIX_LR=0.2 " in said


@pytest.mark.parametrize("seconds, stop, over", [(600.0, None, False), (600.2, None, True), (600.2, True, False),
                                                 (601.2, True, True)])
def test_training_may_end_the_step_in_progress(seconds, stop, over):
    run = made_up(train=[Point(600, seconds, 1.0)], stop=stop and (600, seconds))
    assert any("training took" in reason for reason in record_checks.problems(run)) == over


def test_the_same_data_by_another_path_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    runs = [made_up(i, config={"data_path": path}) for i, path in enumerate(("data", str(tmp_path / "data")))]
    assert record_checks.differences(runs) == [] and record_checks.settings_apart(runs) == {}


def test_a_model_of_one_layer_has_one():
    for layers, said in ((1, "1 layer, "), (2, "2 layers, ")):
        assert record_text.blurb([made_up(config={"num_layers": layers})]).startswith(said)


@pytest.mark.parametrize("path, said", [
    ("data/datasets/embedded_sp1024", "DATA_PATH=../../../data/datasets/embedded_sp1024 "),
    (str(ROOT / "data" / "datasets" / "embedded_sp1024"), "DATA_PATH=../../../data/datasets/embedded_sp1024 "),
    ("data/datasets/fineweb10B_sp1024", None)])
def test_a_command_names_data_that_a_run_would_not_find_first(path, said):
    """Also where nobody named it: elsewhere there may be FineWeb."""
    command = record_text.command([made_up(config={"data_path": path})], "a/b")
    assert said in command if said else "DATA_PATH" not in command


def test_what_a_sweep_printed_stands_for_its_run(swept):
    for words in ([swept[0], str(Path(swept[0])) + ".out"], [str(Path(swept[0])) + ".out"]):
        assert [run.name for run in reader.read_all(words)] == [Path(swept[0]).name]


def test_a_limit_that_may_have_cut_the_split_is_a_reason():
    for limit, cut in ((5, True), (6, False), (0, False)):
        reasons = record_checks.problems(made_up(config={"val_token_limit": limit}, targets=5))
        assert any(reason.startswith(f"VAL_TOKEN_LIMIT={limit}, and as many") for reason in reasons) == cut
