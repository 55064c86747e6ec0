"""./run.sh check-record: folders as others leave them, with one thing wrong at a time."""

import json
import math
import shutil
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import check_record  # noqa: E402

EXAMPLE = "records/track_non_record_16mb/2026-11-24_ThreeSeeds_CPU_10min"
TARGETS = 62_021_632  # of the published split with 1,024 pieces
PER_BIT = math.log(2) * 151_470_000 / TARGETS  # nats a token in a bit a byte
SCORES = {1337: 1.1201, 42: 1.1195, 7: 1.1190}
FACTS = {"author": "a", "github_id": "a", "name": "n", "blurb": "b", "date": "2026-04-01", "val_loss": 1.89,
         "val_bpb": 1.11953, "bytes_total": 15_900_000}


def log_of(seed: int, bpb: float, tail: str = "", **changes) -> str:
    """A log in the form of the published ones: the script, then what it prints. `tail` comes before the last score."""
    v = {"training": 599_800, "evaluation": 85_000, "total": 15_900_000, "code": 70_000, "targets": TARGETS,
         "plain": 1.1430, "ratio": PER_BIT, "ranks": 8} | changes
    plain = f"val_loss:{v['plain'] * v['ratio']:.4f} val_bpb:{v['plain']:.4f}"
    return "\n".join([
        "import torch", 'print(f"final_int6_sliding_window val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:64")',
        "    for epoch in range(ttt_epochs): log(f'ttt_epoch:{epoch}/{n} loss:{loss}')", "=" * 100,
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model",
        f"val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{v['targets']}",
        f"world_size:{v['ranks']} grad_accum_steps:1", "|   0  NVIDIA H100 80GB HBM3          On  |", f"seed:{seed}",
        "step:4000/20000 val_loss:2.0422 val_bpb:1.2095 train_time:394089ms step_avg:98.52ms",
        f"stopping_early: wallclock_cap train_time:{v['training']}ms step:6087/20000",
        "Serialized model: 105783807 bytes", f"Code size: {v['code']} bytes",
        "Total submission size: 105853711 bytes", f"Serialized model int6+zstd: {v['total'] - v['code']} bytes",
        f"Total submission size int6+zstd: {v['total']} bytes",
        f"final_int6_roundtrip {plain} eval_time:2338ms", *tail.splitlines(),
        f"final_int6_sliding_window val_loss:{bpb * v['ratio']:.4f} val_bpb:{bpb:.4f} stride:64 "
        f"eval_time:{v['evaluation']}ms",
        f"final_int6_sliding_window_exact val_loss:{bpb * v['ratio']:.8f} val_bpb:{bpb:.8f}", ""])


@pytest.fixture
def folder(tmp_path):
    """folder(tail, facts, **changes) -> a record's folder, good but for the changes."""
    def make(tail="", facts=FACTS, script=70_000, scores=SCORES, **changes):
        shutil.rmtree(tmp_path / "record", ignore_errors=True)
        (tmp_path / "record").mkdir()
        for seed, bpb in scores.items():
            (tmp_path / "record" / f"train_seed{seed}.log").write_text(log_of(seed, bpb, tail, **changes))
        (tmp_path / "record" / "submission.json").write_text(json.dumps(facts))
        (tmp_path / "record" / "README.md").write_text("# n\n")
        (tmp_path / "record" / "requirements.txt").write_text("torch\n")
        (tmp_path / "record" / "train_gpt.py").write_text("#" * script)
        return tmp_path / "record"

    return make


def checked(folder, capsys, *options) -> tuple[int, str]:
    code = check_record.main([str(folder), *options])
    out, err = capsys.readouterr()
    assert not err, err
    return code, out


def test_a_good_folder(folder, capsys):
    code, out = checked(folder(), capsys)
    assert code == 0 and "3 log(s), 1.11953 BPB on average" in out, out
    assert not [line for line in out.splitlines() if line.startswith(("no:", "ask:"))], out
    assert out.count("\nunknown:") == 3 and out.endswith("verdict: no rule is seen to be broken\n")


@pytest.mark.parametrize("changes, words", [
    ({"tail": "ttt_epoch:1/20 loss:1.93 lr:0.0005 time:19.1s\nttt_epoch:20/20 loss:1.79 time:380.0s"},
     "learns the validation text before it is scored (20 passes of ttt)"),
    ({"tail": "prequant_ttt:epoch 21/21 time=25.0s lr=0.000050"}, "(21 passes of prequant_ttt)"),
    ({"tail": "ttt_adapt_time:70848ms"}, "(1 passes of ttt_adapt)"),
    ({"plain": 1.2300}, "its evaluation takes 1.2300 BPB to 1.1201, which no valid one has come near"),
    ({"total": 16_122_757, "script": 90_000}, "train_seed1337.log: 16,122,757 bytes, over 16,000,000"),
    ({"training": 688_000}, "train_seed42.log: training took 688.0 s, over 600"),
    ({"training": 2_500_000, "ranks": 2}, "training took 2500.0 s"),
    ({"evaluation": 688_000}, "evaluation took 688.0 s, over 600"),
    ({"targets": TARGETS - 40_000}, "scored 61,981,632 tokens, the published split has about 62,021,632"),
    ({"ratio": PER_BIT * 1.17}, "the published split has 177.2 million bytes, where its text has about 151 million"),
    ({"ratio": PER_BIT * 1.04}, "has 157.5 million bytes"),
    ({"tail": "ttt_phased: total_docs:10000 prefix_docs:2500"}, "scored 10,000 of the split's 50,000 documents"),
    ({"scores": {}}, "no log with a score in it"),
])
def test_a_broken_rule_is_named(folder, capsys, changes, words):
    code, out = checked(folder(**changes), capsys)
    lines = [line for line in out.splitlines() if line.startswith("no:")]
    assert code == 1 and any(words in line for line in lines), out
    assert len({line.split(".log: ")[-1] for line in lines}) <= 3, "nothing else is broken"
    assert "verdict: a rule is broken" in out


@pytest.mark.parametrize("changes, words", [
    ({"scores": {1337: 1.11953}}, "1 seed(s); a record is shown with 3"),
    ({"facts": FACTS | {"val_bpb": 1.1150}},
     "submission.json says 1.11500 BPB; its logs 1.11953 on average, 1.11900 at best"),
    ({"facts": {"val_bpb": 1.1195}}, "submission.json has no author, github_id, name, date, bytes_total"),
    ({"total": 16_004_026, "script": 20_000}, "over 16,000,000; with the train_gpt.py that lies here 15,954,026"),
    ({"total": 15_990_000, "script": 190_000},
     "counts 15,990,000 bytes with 70,000 of code; the train_gpt.py that lies"),
    ({"training": 2_400_000, "ranks": 2}, "not 8 x H100: 2 x H100"),
    ({"targets": TARGETS + 1_000_000}, "scored 63,021,632 tokens, the published split has about 62,021,632: an older"),
])
def test_what_a_reviewer_asks_is_named(folder, capsys, changes, words):
    code, out = checked(folder(**changes), capsys)
    assert code == 0 and any(words in line for line in out.splitlines() if line.startswith("ask:")), out


def test_files_and_doubled_logs(folder, capsys):
    path = folder()
    shutil.copy(path / "train_seed42.log", path / "train.log")
    (path / "logs").mkdir()
    (path / "logs" / "train_seed3.txt").write_text(
        "".join(f"1776144156.849 {line}\n" for line in log_of(3, 1.1196).splitlines()))
    assert "4 log(s)" in checked(path, capsys)[1], "what lies there twice counts once, and logs/ is looked into"
    (path / "train_seed42_again.log").write_text(log_of(42, 1.1193))
    (path / "README.md").unlink()
    (path / "prepare_data.py").write_text('p.add_argument(\n    "--val-docs", type=int,\n    default=10_000)\n')
    code, out = checked(path, capsys)
    assert code == 0 and "ask:     several logs of seed 42: which one counts?" in out and "ask:     no README.md" in out
    assert "prepare_data.py makes 10,000 validation documents by default" in out and "40,000 are validation" in out


def test_the_tests_against_another_entry(folder, capsys):
    pytest.importorskip("scipy")
    code, out = checked(folder(), capsys, "--reference-bpb", "1.1233,1.1235,1.1240", "--reference-bpb", "1.0")
    strict, board, *others = (line for line in out.splitlines() if line.startswith("test:"))
    assert "strict: better by 0.005 nats/token, p < 0.01: not passed" in strict
    assert "on the board: better, p < 0.25: passed" in board and len(others) == 2 and "not passed" in others[1]
    code, out = checked(folder(scores={1: 1.12}), capsys, "--reference-bpb", "1.2")
    assert "one seed: no test is possible" in out


def test_our_records_are_held_against_what_record_demands(capsys):
    """As the index does: what keeps these folders from being records is said."""
    code, out = checked(ROOT / EXAMPLE, capsys)
    assert code == 1 and "no:      partial split: its first 131072 targets" in out and "not 8 x H100" in out


def test_what_cannot_be_checked_is_one_line(folder, capsys):
    path = folder()
    (path / "submission.json").write_text("{")
    for word, said in ((path, "broken JSON"), (path / "nowhere", "no such folder; give that of a record")):
        assert check_record.main([str(word), str(ROOT / EXAMPLE)]) == 2, "the worst of all"
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err and EXAMPLE in out


def test_doubtful_logs_and_figures(folder, capsys):
    """One log under three names, names that lie, figures that are none, numbers beyond all bounds."""
    path = folder(scores={1337: 1.12})
    for name in ("train_seed5", "train_seed6"):
        shutil.copy(path / "train_seed1337.log", path / f"{name}.log")
    code, out = checked(path, capsys)
    assert "ask:     train_seed5.log: is of seed 1337, by its lines" in out and "1 seed(s); a record is shown" in out
    assert "train_seed1337.log, train_seed5.log, train_seed6.log: the same loss to the last digit" in out
    path = folder(scores={1: 0.0, 2: 1.12})
    code, out = checked(path, capsys)
    assert code == 1 and "no:      train_seed1.log: 0 BPB is no score" in out
    path = folder(facts=FACTS | {"val_bpb": "1.1", "author": 3})
    assert "ask:     submission.json: author, val_bpb is not of its kind" in checked(path, capsys)[1]
    nines = "9" * 5000
    lines = [f"seed:{nines}", f"Total submission size int6+zstd: {nines} bytes", f"ttt_epoch:1/{nines} loss:1",
             f"Code size: {nines} bytes"]
    path = folder(facts=FACTS | {"val_bpb": int("9" * 400)}, tail="\n".join(lines))
    (path / "prepare.py").write_text('add("--val-docs", default=_)\nadd("--val-docs", default=' + nines + ")\n")
    (path / "dangling.log").symlink_to(path / "nowhere")
    (path / "zero.txt").symlink_to("/dev/zero")
    (path / "folder.log").mkdir()
    code, out = checked(path, capsys)
    assert "submission.json: val_bpb is not of its kind" in out and "3 log(s)" in out
    path = folder(total=13_978_063)
    for log in path.glob("*.log"):  # as some print it
        log.write_text(log.read_text().replace("Total submission size int6+zstd: ", "Total submission size: "))
    assert "how many bytes" not in checked(path, capsys)[1]


def test_our_record_with_a_damaged_file_stays_ours(tmp_path, capsys):
    """What cannot be read of it is a rule broken, not a reason to demand less."""
    path = tmp_path / "ours"
    shutil.copytree(ROOT / EXAMPLE, path)
    log = next(path.glob("train_seed*.log"))
    log.write_text(log.read_text().replace("val_bpb:1", "val_bpb:2", 1))
    code, out = checked(path, capsys)
    assert code == 1 and f"no:      {log.name}: " in out and "one of them was edited" in out
