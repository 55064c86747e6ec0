"""Records and shows: figures from the logs, refusals, a folder that works, plots, old logs and the index."""

import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_environment

sys.path.insert(0, str(ROOT / "tools"))
import figures  # noqa: E402
import record  # noqa: E402
import record_text  # noqa: E402
import runs as reader  # noqa: E402
import show  # noqa: E402

import train_gpt as t  # noqa: E402

RUNS = "TTT_LR=1e-3 SEED=13\nTTT_LR=3e-3 SEED=13\nTTT_LR=3e-3 SEED=1111\n"
SETTINGS = {"TTT_ENABLED": "1", "TTT_MODE": "full", "TTT_CHUNK_TOKENS": "300", "TTT_EPOCHS": "1", "AUDIT": "1",
            "AUDIT_TOKENS": "48", "TRAIN_LOG_EVERY": "2", "VAL_LOSS_EVERY": "6"}


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


def forged(path, to, log=(), summary=()):
    """A copy of a run's folder with its log and its summary changed alike: pairs of pattern and replacement, and of
    place in the summary and value. Its artifact, which has the true figures, stays behind."""
    shutil.copytree(path, to, ignore=shutil.ignore_patterns("*.ptz"))
    head, end, body = (to / "train.log").read_text().partition("\n" + "=" * 100 + "\n")
    for pattern, replacement in log:
        body, n = re.subn(pattern, replacement, body, flags=re.M)
        assert n, pattern
    (to / "train.log").write_text(head + end + body)
    facts = json.loads((to / "summary.json").read_text())
    for place, value in summary:
        *way, last = place.split(".")
        inner = facts
        for name in way:
            inner = inner[name]
        inner[last] = value
    (to / "summary.json").write_text(json.dumps(facts))
    return str(to)


H100 = "NVIDIA H100 80GB HBM3"
CLEAN = {"log": [(r"^note: .*\n", ""), (r"^(hardware .*'name': )'[^']*'", rf"\1'{H100}'"),
                 (r"^(hardware .*'world_size': )1\b", r"\g<1>8")],
         "summary": [("caveats", []), ("hardware.name", H100), ("hardware.world_size", 8)]}


def clean(swept, folder, **more) -> list[str]:
    """Both seeds as if they had run where a record is run; the second one with `more` changes."""
    made = []
    same_rate = {"log": [(r'^(config .*"ttt_lr": )0.003', r"\g<1>0.001")], "summary": [("config.ttt_lr", 0.001)]}
    for i, (path, rate) in enumerate(((swept[0], {}), (swept[2], same_rate))):
        changes = {kind: CLEAN[kind] + rate.get(kind, []) + more.get(kind, []) * i for kind in ("log", "summary")}
        made.append(forged(path, folder / f"clean{i}", **changes))
    return made


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
        assert entry["wallclock_seconds"] == pytest.approx(maker["train"]["seconds"])
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
    assert (folder / "train_gpt.py").read_bytes() == t.SCRIPT.read_bytes()
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
    assert f"Mean difference {mean:+.5f} nats/token" in " ".join(readme.split())
    for claim, margin in (("better", 0.0), ("better by 0.005 nats/token, as a record must be", 0.005)):
        value = (mean - margin) / half
        p = 0.5 - math.atan(value) / math.pi
        assert f"| {claim} | {value:.2f} | {p:.2g} | {'yes' if p < 0.01 else 'no'} |" in readme


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
    found = record_text.significance(gains, margin)
    assert found == (pytest.approx(value, abs=1e-9), pytest.approx(p, abs=2e-5))


def test_a_record_where_nothing_speaks_against_it(swept, call, tmp_path):
    """Its logs are also rid of paths that no setting names, and of ones with spaces."""
    places = [(r'^(config .*"data_path": )"[^"]*"', r'\1"/a place/my data"'),
              (r"^train_loader:", "warning: checkpoint /mnt/disk-1/x/step_8.npz, of /a place/my data/y\ntrain_loader:")]
    runs = clean(swept, tmp_path, log=places, summary=[("config.data_path", "/a place/my data")])
    assert call(record, *runs, "--name", "other", "--author", "x")[2].startswith(
        "error: not a record: the runs differ in DATA_PATH")
    runs = [forged(runs[0], tmp_path / "same", log=places[:1], summary=[("config.data_path", "/a place/my data")]),
            runs[1]]
    code, out, err = call(record, *runs, "--name", "Clean", "--author", "someone")
    assert code == 0, err
    (folder,) = (tmp_path / "records" / "track_10min_16mb").glob("*_Clean")
    assert "checkpoint step_8.npz, of my data/y\n" in (folder / "train_seed1111.log").read_text()
    assert "Not a record" not in (folder / "README.md").read_text() and "no check speaks against it" in out
    assert json.loads((folder / "submission.json").read_text())["seed_results"]["13"]["hardware"] == f"8 x {H100}"
    assert (tmp_path / "records" / "README.md").read_text().splitlines()[-1].endswith("| yes |")


@pytest.mark.parametrize("log, summary, reason", [
    ([(r'^(config .*"matrix_lr": )0.025', r"\g<1>0.5")], [("config.matrix_lr", 0.5)],
     "the runs differ in MATRIX_LR: 0.025 (seed 13), 0.5 (seed 1111)"),
    ([(r"'torch': '[^']*'", "'torch': '1.0'")], [], "the runs differ in the version of torch"),
    ([(r"^audit .*\n", "")], [("audit", None)], "seed 1111: no audit (AUDIT=1)"),
    ([(r"^audit bytes: ok", "audit bytes: FAILED")], [("audit.bytes.ok", False)],
     "seed 1111: the audit of bytes failed"),
    ([(r"^(Serialized model int6\+zstd: )\d+", r"\g<1>16000000"),
      (r"^(Total submission size int6\+zstd: )\d+", rf"\g<1>{16_000_000 + t.SCRIPT.stat().st_size}")],
     [("artifact.bytes_model", 16_000_000), ("artifact.bytes_total", 16_000_000 + t.SCRIPT.stat().st_size)],
     "bytes, over 750,000"),
    ([(r"^(seconds: .*search )[\d.]+", r"\g<1>700.0")], [("seconds.search", 700.0)], "seed 1111: training took 700."),
    ([(r"^(seconds: read )[\d.]+", r"\g<1>700.0")], [("seconds.read", 700.0)], "seed 1111: evaluation took 700."),
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


def test_nothing_half_written_stays(swept, call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "training.png")

    monkeypatch.setattr(figures, "pictures", full)
    refused(call(record, swept[0], "--name", "x", "--author", "x", "--non-record"), "No space left")
    assert list((tmp_path / "records").glob("*/*")) == list((tmp_path / "records").glob("*/.*")) == []


# ---- what is refused ----


@pytest.mark.parametrize("name, words", [
    ("a/b", "--name 'a/b': must be the name of a folder, without slashes"), ("..", "--name '..'"), ("", "--name ''")])
def test_a_name_is_a_folder(swept, call, name, words):
    refused(call(record, swept[0], "--name", name, "--author", "x"), words)


def test_bad_input_is_one_line(swept, call, tmp_path):
    one = swept[0]
    name = ("--name", "x", "--author", "x")
    other = forged(one, tmp_path / "other")
    for tool, extra in ((show, ()), (record, name)):
        refused(call(tool, tmp_path / "nowhere", *extra), "nowhere: no such run")
        refused(call(tool, tmp_path, *extra), "holds no run")
        refused(call(tool, one, one, *extra), "given twice")
    refused(call(record, one, other, *name), "1_TTT_LR=1e-3_SEED=13 and other: both have seed 13")
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
    ("train.seconds", 9.5, "training seconds"), ("seconds.search", 9.5, "seconds of search"), ("seed", 8, "seed"),
    ("config.matrix_lr", 0.5, "MATRIX_LR"), ("audit.causal.ok", False, "audit causal"), ("caveats", [], "the caveats"),
    ("valid", False, "valid"), ("hardware.name", "H100", "hardware"),
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
])
def test_an_edited_log_is_found(swept, call, tmp_path, pattern, replacement, figure):
    path = forged(swept[0], tmp_path / "edited", log=[(pattern, replacement)])
    refused(call(show, path), figure, "edited")


def test_cut_and_broken_files(swept, call, tmp_path):
    path = forged(swept[0], tmp_path / "cut")
    log, metrics, summary = (tmp_path / "cut" / name for name in ("train.log", "metrics.jsonl", "summary.json"))
    for file, broken, words in ((log, log.read_text()[:-9], "train.log is cut in its last line"),
                                (log, re.sub(r"^(step:2/12 train_lo).*", r"\1", log.read_text(), flags=re.M),
                                 "cut or edited, 'step:2/12 train_lo'"),
                                (metrics, metrics.read_text()[:-9], "metrics.jsonl is cut in its last line"),
                                (metrics, "{}\n" + metrics.read_text(), "metrics.jsonl:1: not a line of a run"),
                                (summary, summary.read_text()[:-9], "summary.json is broken"),
                                (summary, "{}", "summary.json is not that of a run"),
                                (summary, "[]", "summary.json is not that of a run")):
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
    assert f"{summary['val_bpb']:.4f} BPB, {summary['artifact']['bytes_total']:,} bytes, 12 steps" in svg


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


def test_the_index_finds_an_edited_submission(swept, call, tmp_path):
    assert call(record, swept[0], "--name", "a", "--author", "x", "--non-record")[0] == 0
    (path,) = (tmp_path / "records").glob("*/*/submission.json")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"val_bpb": facts["val_bpb"] - 0.1}))
    refused(call(record, "--index"), "submission.json says", "one of them was edited")
