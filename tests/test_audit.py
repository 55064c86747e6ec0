"""The audit: evaluations that cheat are rejected, honest ones pass; and what it needs of a run's folder."""

import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, SCRIPT, TINY, clean_environment
from forks import Launched
from test_parts import Lone, OneByte, model_of

sys.path.insert(0, str(ROOT / "tools"))
import audit  # noqa: E402

import train_gpt as t  # noqa: E402

MODES = [{"TTT_MODE": "lora", "TTT_LORA_LR": 0.1}, {"TTT_MODE": "full", "TTT_LR": 0.01, "TTT_PULL": 0.1},
         {"TTT_MODE": "full", "TTT_OPTIMIZER": "sgd", "TTT_LR": 0.1, "TTT_BATCH_SEQS": 1, "TTT_LR_END": 0}]
LORA, FULL, PLAIN = MODES[0], MODES[1], {"TTT_ENABLED": 0}
SMALL = {"TTT_ENABLED": 1, "TTT_CHUNK_TOKENS": 30, "TTT_LORA_CHUNK_TOKENS": 16, "EVAL_STRIDE": 16, "EVAL_SEQ_LEN": 32,
         "TTT_LORA_RANK": 4, "TTT_EPOCHS": 1, "VAL_BATCH_SIZE": 128, "VOCAB_SIZE": 40, "NUM_LAYERS": 1, "MODEL_DIM": 16,
         "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "SPARSE_HIDDEN_DIM": 0, "BIGRAM_VOCAB_SIZE": 0}


class OnePiece(OneByte):
    """A tokenizer of which every piece is "x", but for the BOS."""

    class sp:
        is_control = is_unknown = is_unused = is_byte = staticmethod(lambda i: False)
        id_to_piece = staticmethod(lambda i: "x")

        def __len__(self):
            return 40

    sp = sp()


def tokens():
    ids = np.random.default_rng(8).integers(2, 40, 180)
    ids[[0, 40, 45, 100]] = t.BOS_ID
    return ids


def subject(cfg, kind=None, ids=None, losses="no run to compare with", **more):
    """A run as the audit opens it, of a noisy model and the script that the tests import."""
    weights = model_of(cfg, noise=0.05).state_dict()
    stream = t.Stream(tokens() if ids is None else ids, OnePiece(), torch.device("cpu"))
    summary = {"eval": {"ttt": None}, "val_bpb": 1.0, "hardware": {"world_size": 1}}
    kind = kind or ("ttt" if cfg.ttt_enabled else "sliding")
    return audit.Subject(Path("x"), summary, b"", t, b"some artifact", weights, cfg, kind, losses, Lone(), OnePiece(),
                         stream, **more)


def failed(run, n=160):
    """Names of the checks that fail, and the audit's result."""
    result = audit.audit(run, n)
    names = {name for name in audit.CHECKS if not result[name]["ok"]}
    assert result["ok"] == (not names) and set(audit.CHECKS) < result.keys()
    return names, result


# ---- honest evaluations ----


@pytest.mark.parametrize("mode", [*MODES, PLAIN])
def test_the_audit_passes_what_is_honest(tiny, mode):
    run, record, lesson = subject(tiny(**SMALL | mode)), t.Evaluator.record, t.Evaluator.lesson
    names, result = failed(run)
    assert names == set(), result
    assert (t.Evaluator.record, t.Evaluator.lesson) == (record, lesson), "the script is as it was"
    if run.kind == "ttt":
        learnt = json.loads(re.search(r"the cuts: (\[.*?\])", result["causal"]["detail"])[1])
        assert sum(n >= 48 for n in learnt) >= 4, "several updates before most cuts"


def test_the_audit_passes_windows_side_by_side_and_a_single_target(tiny):
    assert failed(subject(tiny(**SMALL | PLAIN), kind="int6"))[0] == set()
    for mode in (*MODES[:2], PLAIN):
        assert failed(subject(tiny(**SMALL | mode), ids=np.array([1, 5])))[0] == set()


def test_the_audit_allows_for_rounding_where_batches_differ(tiny, monkeypatch):
    """As on a GPU, where a batch of another shape is computed in another order; and not for more than that."""
    def rounded(much):
        class Rounded(t.GPT):
            def forward(self, ids, *rest):
                return super().forward(ids, *rest) + much * ids.size(0)

        return Rounded

    build = t.build_model
    for much, broken in ((1e-5, set()), (1e-3, {"causal", "normalised"})):
        monkeypatch.setattr(t, "build_model", build)
        of_kind(monkeypatch, rounded(much))
        names, result = failed(subject(tiny(**SMALL | LORA)))
        assert names == broken, result


# ---- evaluations that cheat ----


def patched(monkeypatch, order):
    """test_time_train with a walk in full mode whose chunks do what `order` says."""
    def walk(cfg, process, log, model, stream):
        evaluator = t.Evaluator(cfg, process, model, stream, cfg.eval_stride)
        adapter = t.FullAdapter(cfg, process, model, evaluator)
        order(evaluator, lambda a, b: adapter.learn(a, b, cfg.ttt_lr, lambda: True), stream.targets)
        return evaluator, {}

    monkeypatch.setattr(t, "test_time_train", walk)


def adapt_first(evaluator, learn, n):
    learn(0, n)
    evaluator.score(0, n)


def last_epoch(evaluator, learn, n):
    for a in range(0, n, 16):
        learn(a, min(a + 16, n))
        evaluator.score(a, min(a + 16, n))


def tail_again(evaluator, learn, n):
    evaluator.score(0, n)
    learn(0, n)
    evaluator.score(n - 20, n)


def better_of_two(evaluator, learn, n):
    """Score everything, adapt, score again, keep the better loss of each target."""
    evaluator.score(0, n)
    first = evaluator.nats.clone()
    learn(0, n)
    evaluator.nats.zero_()
    evaluator.count.zero_()
    evaluator.score(0, n)
    evaluator.nats = torch.minimum(first, evaluator.nats)


@pytest.mark.parametrize("order, broken", [
    (adapt_first, {"causal", "score_before_update"}), (last_epoch, {"causal", "score_before_update"}),
    (tail_again, {"one_pass", "score_before_update"}), (better_of_two, {"causal", "one_pass", "score_before_update"}),
])
def test_the_audit_rejects_who_learns_too_early(tiny, monkeypatch, order, broken):
    patched(monkeypatch, order)
    names, result = failed(subject(tiny(**SMALL | FULL)))
    assert broken <= names, result


def test_the_audit_sees_early_learning_whose_books_are_not_kept(tiny, monkeypatch):
    """The audit keeps its own."""
    patched(monkeypatch, last_epoch)
    monkeypatch.setattr(t.Evaluator, "lesson", lambda self, positions, who=None: self.stream.tokens[positions])
    assert failed(subject(tiny(**SMALL | FULL)))[0] == {"causal", "score_before_update"}


def test_the_audit_sees_early_learning_that_is_not_declared(tiny, monkeypatch):
    """Plain steps on what is about to be scored, which no book of the script hears of."""
    def walk(cfg, process, log, model, stream):
        evaluator = t.Evaluator(cfg, process, model, stream, cfg.eval_stride)
        adam = torch.optim.Adam(model.parameters(), 0.01)
        for a in range(0, stream.targets, 16):
            b = min(a + 16, stream.targets)
            model(stream.tokens[None, a:b], stream.tokens[None, a + 1 : b + 1]).mean().backward()
            adam.step()
            evaluator.score(a, b)
        return evaluator, {}

    monkeypatch.setattr(t, "test_time_train", walk)
    assert failed(subject(tiny(**SMALL | FULL)))[0] == {"causal"}


class Blend(t.GPT):
    """Adds a hundredth to the probability of the target alone, as careless caches do."""

    def forward(self, ids, targets=None, *rest):
        nats = super().forward(ids, targets, *rest)
        return nats if torch.is_grad_enabled() else -torch.log(0.99 * torch.exp(-nats) + 0.01)


class Peek(t.GPT):
    """Knows the token that it has to predict: position i also reads token i+1."""

    def forward(self, ids, targets=None, rows=None, *rest):
        nats = super().forward(ids, targets, rows, *rest)
        follows = torch.roll(ids, -1, 1) if rows is None else torch.roll(ids, -1, 1).gather(1, rows)
        odd = (follows % 2 == targets % 2).float()
        return nats if torch.is_grad_enabled() else nats - torch.log(1.5 * odd + 0.5 * (1 - odd))


class SeldomPeek(Peek):
    def forward(self, ids, targets=None, rows=None, *rest):
        nats = t.GPT.forward(self, ids, targets, rows, *rest)
        return torch.where(rows % 8 == 3, Peek.forward(self, ids, targets, rows, *rest), nats)


def of_kind(monkeypatch, kind):
    """Let the script build models of this kind."""
    build = t.build_model

    def built(*arguments):
        model = build(*arguments)
        model.__class__ = kind
        return model

    monkeypatch.setattr(t, "build_model", built)


@pytest.mark.parametrize("mode", [LORA, FULL, PLAIN])
@pytest.mark.parametrize("kind, broken", [(Blend, "normalised"), (Peek, "causal")])
def test_the_audit_rejects_scores_that_are_no_probability_or_peek(tiny, monkeypatch, mode, kind, broken):
    of_kind(monkeypatch, kind)
    names, result = failed(subject(tiny(**SMALL | mode)))
    assert broken in names, result


def test_the_audit_rejects_a_rare_peek_into_the_next_token(tiny, monkeypatch):
    of_kind(monkeypatch, SeldomPeek)
    assert "causal" in failed(subject(tiny(**SMALL | PLAIN)))[0]


@pytest.mark.parametrize("ahead, places, shy, broken", [
    (1, range(16), False, "causal"), (10, [8], False, "causal"), (1, range(16), True, "normalised")])
def test_the_audit_rejects_an_oracle(tiny, monkeypatch, ahead, places, shy, broken):
    """Who is told of tokens to come outside of the inputs gives sound probabilities, and no later input changes them:
    the distribution at a cut shows it, or where it is told at few places, of tokens far ahead, the losses before; and
    where it hides that when asked for a distribution, the recorded loss is not the distribution's."""
    record = t.Evaluator.record

    class Told(t.GPT):
        def forward(self, ids, targets=None, rows=None, window=0):
            logits, more = super().forward(ids, None, rows, window), self.told.gather(1, rows)[..., None]
            hidden = shy and bool((rows == rows[:, :1]).all())
            logits = logits.scatter_add(2, more.relu(), (more >= 0).float() * (not hidden))
            return -logits.log_softmax(-1).gather(2, targets.long()[..., None])[..., 0]

    def telling(self, low, high, start):
        at = start[:, None] + torch.arange(self.window)
        told = self.stream.tokens[(at + ahead).clamp(max=self.stream.targets)].long()
        Told.told = torch.where(torch.isin(at % 16, torch.tensor(list(places))), told, -1)
        record(self, low, high, start)

    of_kind(monkeypatch, Told)
    monkeypatch.setattr(t.Evaluator, "record", telling)
    assert failed(subject(tiny(**SMALL | PLAIN)))[0] == {broken}


def test_the_audit_rejects_what_stands_around_the_model(tiny, monkeypatch):
    """The forward pass that is asked is the one that scores, whatever it is made of."""
    compiled = t.compiled

    def blended(model, cfg, process):
        forward = compiled(model, cfg, process)
        return lambda *asked: -torch.log(0.99 * torch.exp(-forward(*asked)) + 0.01)

    monkeypatch.setattr(t, "compiled", blended)
    assert "normalised" in failed(subject(tiny(**SMALL | PLAIN)))[0]


def test_the_audit_rejects_adapters_of_the_neighbour(tiny, monkeypatch):
    attach = t.LoraAdapters.attach

    def next_row(self, places, times=1):
        attach(self, places, times)
        for layer in self.layers:
            layer.adapter = layer.adapter[0], layer.adapter[1].roll(1, 0)

    monkeypatch.setattr(t.LoraAdapters, "attach", next_row)
    assert "causal" in failed(subject(tiny(**SMALL | LORA)))[0]


def test_the_audit_rejects_adapters_warmed_against_the_order_of_the_stream(tiny, monkeypatch):
    """Long documents are walked first, and the others begin with what those give."""
    split = t.split_documents

    def by_length(stream):
        documents = split(stream)
        return documents[np.argsort(documents[:, 0] - documents[:, 1], kind="stable")]

    monkeypatch.setattr(t, "split_documents", by_length)
    assert "causal" in failed(subject(tiny(**SMALL | LORA)))[0]


@pytest.mark.parametrize("places", [2, 3])
def test_the_audit_rejects_adapters_that_mix_while_documents_go_on(tiny, monkeypatch, places):
    """However few documents are side by side, or only from so many on, as in the run."""
    learn = t.learn_documents

    def mixed(walk, adapters, *more):
        learn(walk, adapters, *more)
        if len(adapters.ups) >= places:
            adapters.ups.lerp_(adapters.ups.mean(0, keepdim=True), 0.5)

    monkeypatch.setattr(t, "learn_documents", mixed)
    assert "causal" in failed(subject(tiny(**SMALL | LORA)))[0]


def test_the_audit_rejects_a_global_step_that_has_seen_a_later_document(tiny, monkeypatch):
    """Of a matrix that all documents share, on what was scored of those that stand side by side."""
    learn = t.learn_documents

    def both(walk, adapters, chunk, places, first, low, end):
        learn(walk, adapters, chunk, places, first, low, end)
        adapters.detach()
        model, at = walk.evaluator.forward, (low[:, None] + torch.arange(chunk + 1)).minimum(end[:, None])
        text, weight = walk.evaluator.stream.tokens[at], model.blocks[0].mlp.fc.weight.requires_grad_()
        grad, = torch.autograd.grad(model(text[:, :-1], text[:, 1:]).mean(), weight)
        weight.requires_grad_(False).sub_(0.3 * grad)

    monkeypatch.setattr(t, "learn_documents", both)
    assert "causal" in failed(subject(tiny(**SMALL | LORA)))[0]


def test_the_audit_rejects_an_alpha_that_a_document_s_score_has_chosen(tiny, monkeypatch):
    """Each chunk with its adapters at half and at double strength, and the better of the two is kept."""
    score = t.score_documents

    def chosen(walk, adapters, *more):
        forward = walk.evaluator.forward

        def better(*asked):
            nats, given = [], [layer.adapter for layer in adapters.layers]
            for alpha in (0.5, 2.0):
                for layer, (down, up) in zip(adapters.layers, given, strict=True):
                    layer.adapter = down, alpha * up
                nats.append(forward(*asked))
            for layer, adapter in zip(adapters.layers, given, strict=True):
                layer.adapter = adapter
            weak, strong = nats
            return torch.where((weak.sum(1) < strong.sum(1))[:, None], weak, strong)

        walk.evaluator.forward = better
        score(walk, adapters, *more)
        walk.evaluator.forward = forward

    monkeypatch.setattr(t, "score_documents", chosen)
    assert "causal" in failed(subject(tiny(**SMALL | LORA)))[0]


def test_the_audit_rejects_the_better_of_two_walks(tiny, monkeypatch):
    cfg, walk = tiny(**SMALL | FULL), t.test_time_train

    def both(cfg, process, log, model, stream):
        walks = [walk(dataclasses.replace(cfg, ttt_lr=lr), process, log, model, stream) for lr in (0.01, 0.02)]
        return min(walks, key=lambda found: float(found[0].nats.sum()))

    monkeypatch.setattr(t, "test_time_train", both)
    names, result = failed(subject(cfg))
    assert "one_pass" in names and "2 walk(s)" in result["one_pass"]["detail"]


@pytest.mark.parametrize("change", [lambda nats: nats * 0.99, lambda nats: nats - 0.0005])
def test_the_audit_rejects_losses_changed_after_the_fact(tiny, monkeypatch, change):
    walk = t.test_time_train

    def changed(*arguments):
        evaluator, details = walk(*arguments)
        evaluator.nats = change(evaluator.nats)
        return evaluator, details

    monkeypatch.setattr(t, "test_time_train", changed)
    assert failed(subject(tiny(**SMALL | FULL)))[0] == {"normalised"}


def test_the_audit_rejects_a_single_loss_changed_after_the_fact(tiny, monkeypatch):
    """Wherever it is: what is on record is held against what the model gave, at every target."""
    evaluate = t.evaluate

    def changed(*arguments):
        evaluator = evaluate(*arguments)
        evaluator.nats[evaluator.nats.argmax()] = 0.0
        return evaluator

    monkeypatch.setattr(t, "evaluate", changed)
    assert "normalised" in failed(subject(tiny(**SMALL | PLAIN)))[0]


def test_the_audit_rejects_scores_of_other_tokens(tiny, monkeypatch):
    """Losses of likelier tokens are honest losses, and not those of the stream."""
    record = t.Evaluator.record

    def easier(self, low, high, start):
        own = self.forward
        self.forward = lambda ids, targets, *rest: own(ids, targets.where(torch.arange(16) != 5, 0), *rest)
        record(self, low, high, start)
        self.forward = own

    monkeypatch.setattr(t.Evaluator, "record", easier)
    assert "normalised" in failed(subject(tiny(**SMALL | PLAIN)))[0]


def test_the_audit_rejects_a_walk_that_asks_no_model(tiny, monkeypatch):
    def walk(cfg, process, log, model, stream):
        evaluator = t.Evaluator(cfg, process, model, stream, cfg.eval_stride)
        evaluator.nats, evaluator.count = evaluator.nats + 1.0, evaluator.count + 1
        return evaluator, {}

    monkeypatch.setattr(t, "test_time_train", walk)
    assert {"causal", "normalised", "one_pass"} <= failed(subject(tiny(**SMALL | FULL)))[0]


def test_the_audit_rejects_bytes_that_are_not_there(tiny):
    run = subject(tiny(**SMALL | PLAIN))
    run.summary["eval"] = {"sliding": {"bytes": 179}}
    assert failed(run)[0] == set()
    run.summary["eval"] = {"sliding": {"bytes": 400}}
    assert failed(run)[0] == {"bytes"}
    run.summary["eval"], run.stream.bytes = {}, 400
    assert failed(run)[0] == {"bytes"}


def test_the_audit_rejects_a_smear_across_the_documents_of_a_batch(tiny, monkeypatch):
    """Under lora documents lie side by side; SmearGate must not take the last token of the one before."""
    run = subject(tiny(**SMALL | LORA | {"BOS_MASK": 0}))
    assert failed(run)[0] == set()

    def leaking(x, keep):
        y = torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
        y[1:, 0] = x[:-1, -1]
        return y * keep

    monkeypatch.setattr(t, "shift", leaking)
    assert "causal" in failed(run)[0]


@pytest.mark.parametrize("mode", [LORA, FULL, MODES[2]])
def test_what_was_run_is_what_is_tried(tiny, mode):
    """The run's own losses are met, as far as the excerpt decides them, and others are not."""
    cfg = tiny(**SMALL | mode)
    run = subject(cfg)
    model, log = t.build_model(cfg, run.weights, run.process), t.Log(run.process, Path("x")).silent()
    run.losses = t.test_time_train(cfg, run.process, log, model, run.stream)[0].result().nats[:64]
    ok, said = audit.is_what_ran(run, 64)
    assert ok and f"the mean of {30 if mode is MODES[2] else 64} losses differs by 0 nats" in said
    run.losses = run.losses - np.float32(0.02) * np.arange(64, dtype=np.float32) / 10
    ok, said = audit.is_what_ran(run, 64)
    assert not ok and "between the run and a trial" in said
    assert mode is not LORA or failed(run)[0] == {"causal"}


def test_bytes_from_decoded_pieces_are_the_table_s(corpus, monkeypatch):
    """And the published mistakes are not: spaces counted twice, byte pieces counted as three."""
    tokenizer = t.Tokenizer(corpus / "tokenizer.model", 400)
    ids = np.random.default_rng(0).integers(0, 400, 5000)
    text = tokenizer.sp.encode("caf\u00e9 \u4e16\u754c \U0001f600 and on\nwith it")
    for length in (2**22, 7):  # that are decoded at a time
        monkeypatch.setattr(audit, "DECODED", length)
        for stream in (ids, ids[1:], np.array([1, *text, 1, *text]), np.array([*text, 1]), np.array([2, 1])):
            assert audit.decoded_bytes(tokenizer.sp, stream) == tokenizer.target_bytes(stream).sum()
    assert any(tokenizer.sp.is_byte(i) for i in text)
    tokenizer.piece_bytes[tokenizer.spaced] += 1
    assert audit.decoded_bytes(tokenizer.sp, ids) < tokenizer.target_bytes(ids).sum()


def test_a_word_mark_spelt_in_bytes_is_one_space(tmp_path, monkeypatch):
    """As a tokenizer of whole words spells it, which the table takes for three bytes and train_gpt.py refuses."""
    words = ["one", "two", "three", "four"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)] * 20), model_writer=model, model_type="word", vocab_size=264,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_fallback=True, minloglevel=2)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    texts = ["one more word", "new", "two two \u96ea three"]
    ids = np.array([1, *sp.encode(texts[0]), 1, *sp.encode(texts[1]), 1, *sp.encode(texts[2])])
    assert {"<0xE2>", "<0x96>", "<0x81>"} <= {sp.id_to_piece(i) for i in ids.tolist()}
    for length in (2**22, 1, 2, 3, 7):
        monkeypatch.setattr(audit, "DECODED", length)
        assert audit.decoded_bytes(sp, ids) == sum(len(text.encode()) for text in texts), length


# ---- through the command line ----

RUN = TINY | {"NUM_LAYERS": "1", "SPARSE_START_LAYER": "0", "TRAIN_SEQ_LEN": "16", "TRAIN_BATCH_TOKENS": "64",
              "ITERATIONS": "4", "WARMDOWN_ITERS": "2", "VAL_TOKEN_LIMIT": "301", "EVAL_STRIDE": "16",
              "TTT_CHUNK_TOKENS": "50", "TTT_LORA_CHUNK_TOKENS": "16", "CALIBRATION_TOKENS": "64",
              "FINAL_EVAL_ENABLE": "0"}
AGAIN = {"TRAIN_ENABLED": "0", "FINAL_SLIDING_EVAL_ENABLE": "0", "TTT_ENABLED": "1"}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """runs(name, ranks=1, script=SCRIPT, **variables) -> the folder of a finished run, on the artifact of the first."""
    folder = tmp_path_factory.mktemp("audited")

    def go(name="a", ranks=1, script=SCRIPT, **variables):
        if (folder / name).exists():
            return folder / name
        env = clean_environment() | RUN | {"DATA_PATH": str(corpus), "LOG_DIR": str(folder), "RUN_ID": name}
        if name != "a":
            env |= AGAIN | {"MODEL_PATH": str(go() / t.ARTIFACT_NAME)}
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        launch = Launched([*command, str(script)], env | {k: str(v) for k, v in variables.items()}, folder)
        code = launch.wait(200)
        assert code == 0, launch.stdout.read() + launch.stderr.read()
        return folder / name

    return go


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(*arguments) -> exit code, stdout, stderr of the tool, called in this process."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        code = audit.main([str(word) for word in arguments])
        return code, *capsys.readouterr()

    return go


def refused(outcome, *words):
    """That the tool ended with exit code 2 and one line, which holds all `words`."""
    code, _, err = outcome
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and all(w in err for w in words), err


def cheat(folder, text, put):
    """A copy of the script where `put` stands for a text."""
    source = SCRIPT.read_text()
    assert source.count(text) == 1, "the script has changed; mend the test"
    folder.mkdir(exist_ok=True)
    (folder / "train_gpt.py").write_text(source.replace(text, put))
    return folder / "train_gpt.py"


def test_an_audit_of_a_run(runs, call):
    """Of one that trained, and by its name; its figures are in audit.json, its script was imported by itself."""
    folder, evaluator = runs(), t.Evaluator.record
    code, out, err = call(folder)
    assert code == 0 and not err, out + err
    lines = out.splitlines()
    assert [line.split(",")[0] for line in lines[:6]] == [f"audit {name}: ok" for name in audit.CHECKS]
    result, summary = json.loads((folder / "audit.json").read_text()), json.loads((folder / "summary.json").read_text())
    heads = ["ok", "seconds", "artifact_sha256", "code_sha256", "val_bpb", "targets", "of"]
    assert list(result) == [*heads, *audit.CHECKS] and (result["targets"], result["of"]) == (64, 301)
    assert result["ok"] and 0 < result["seconds"] < 100 and result["val_bpb"] == summary["val_bpb"]
    assert result["artifact_sha256"] == summary["artifact"]["sha256"]
    assert result["code_sha256"] == t.hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert "the mean of 64 losses differs by" in result["causal"]["detail"]
    assert t.Evaluator.record is evaluator and any(name.startswith("audited_") for name in sys.modules)
    assert not [path for path in folder.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("ranks, mode", [
    (1, {"TTT_MODE": "lora", "TTT_LORA_LR": 0.05}), (2, {"TTT_MODE": "full", "TTT_LR": 0.05, "TTT_PULL": 0,
                                                          "TTT_BATCH_SEQS": 1, "TTT_CHUNK_TOKENS": 32})])
def test_an_audit_of_a_run_on_another_s_artifact_and_on_two_ranks(runs, call, monkeypatch, ranks, mode):
    """By its RUN_ID. Of two ranks, each of which took a sequence a step, one rank takes two."""
    folder = runs(f"ranks{ranks}", ranks, **mode)
    monkeypatch.setenv("LOG_DIR", str(folder.parent))
    code, out, err = call(folder.name, "--tokens", 60)
    assert code == 0, out + err
    assert "the mean of 60 losses differs by" in out and "0 tokens were learnt" not in out


def test_a_failed_audit(runs, call, tmp_path):
    """A copy of the script whose evaluation learns before it scores; the run before it is audited all the same."""
    line = "        with walk.scored(end - begin):\n            evaluator.score(begin, end)\n"
    script = cheat(tmp_path, line, "        adapter.learn(begin, end, cfg.ttt_lr, lambda: True)\n" + line)
    folder = runs("early", script=cheat_without_books(script), TTT_MODE="full")
    code, out, err = call(folder)
    result = json.loads((folder / "audit.json").read_text())
    assert code == 1 and not err and not result["ok"], out
    assert not result["causal"]["ok"] and not result["score_before_update"]["ok"] and result["bytes"]["ok"]
    assert "audit causal: FAILED, " in out and "optimizer steps had seen" in out


def cheat_without_books(script):
    """So that the run itself finds nothing to say against its score."""
    text = script.read_text()
    line = "        self.early += torch.where(scored, self.learnt[targets + 1], 0).sum()\n"
    assert text.count(line) == 1
    script.write_text(text.replace(line, ""))
    return script


def test_an_audit_is_of_what_was_run(runs, call, tmp_path):
    """A copy of the script that walks twice, the second time on weights that have learnt everything."""
    line = "    evaluator, details = test_time_train(cfg, process, log, model, stream, spent)\n"
    folder = runs("twice", script=cheat(tmp_path, line, line + line), TTT_MODE="full", TTT_LR=0.01)
    code, out, err = call(folder)
    assert code == 1 and out.count("FAILED") == 1, out + err
    assert re.search(r"audit causal: FAILED, .*between the run and a trial", out)


@pytest.mark.parametrize("honest, false", [
    ("        total = float(nats.double().sum())\n", "        total = 0.9 * float(nats.double().sum())\n"),
    ("(self.stream.bytes or math.nan)", "(self.stream.bytes * 1.1)"),
    ("""    more = "".join(""", """    score.val_bpb *= 0.9\n    more = "".join("""),
    ("summary[\"val_bpb\"], nats = scores[-1].val_bpb,", "summary[\"val_bpb\"], nats = scores[-1].val_bpb - 0.01,"),
])
def test_a_figure_that_is_not_that_of_the_losses(runs, call, tmp_path, honest, false):
    folder = runs(tmp_path.name, script=cheat(tmp_path, honest, false), TTT_MODE="full")
    code, out, err = call(folder, "--tokens", 16)
    assert code == 1 and out.count("FAILED") == 1 and re.search(r"audit figures: FAILED, .*val_bpb", out), out + err


def test_sums_that_do_not_fit_the_figures_or_the_excerpt(runs, call, tmp_path):
    sums = np.load(runs() / "sums.npy")
    for number, false in enumerate((sums * 0.9, np.append(sums, 0.0), sums[::-1].copy())):
        folder = copy_of(runs(), tmp_path / str(number))
        np.save(folder / "sums.npy", false)
        code, out, err = call(folder, "--tokens", 16)
        assert code == 1 and out.count("FAILED") == 1 and "audit figures: FAILED" in out, out + err


def test_an_audit_without_an_evaluation_and_one_that_was_stopped(runs, call):
    """Every score switched off: what would be behind val_bpb is audited all the same."""
    code, out, err = call(runs("none", TTT_ENABLED=0), "--tokens", 16)
    assert code == 0 and "it had no final evaluation" in out and "tokens were learnt" in out, err
    stopped = copy_of(runs("ranks1", TTT_MODE="lora", TTT_LORA_LR=0.05), Path("stopped"))
    change(stopped, lambda s: s["eval"]["ttt"].update(stopped_by_budget=1))
    (stopped / "excerpt.npy").write_bytes(b"")
    code, out, err = call(stopped, "--tokens", 16)
    assert code == 0 and "EVAL_MAX_SECONDS stopped its adaptation" in out, err


def copy_of(folder, to):
    shutil.copytree(folder, to)
    (to / "audit.json").unlink(missing_ok=True)
    return to


def change(folder, what):
    """Change a run's summary."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    what(summary)
    path.write_text(json.dumps(summary))


def edited(folder):
    """As if its script had lost a few bytes."""
    log = folder / "train.log"
    log.write_bytes(log.read_bytes().replace(b"import math\n", b"import m", 1))


def older(folder):
    """As if its script did not have what is called."""
    script = SCRIPT.read_bytes().replace(b"def build_model(", b"def building(")
    log = (folder / "train.log").read_bytes()
    (folder / "train.log").write_bytes(script + log[len(SCRIPT.read_bytes()) :])
    change(folder, lambda s: s["artifact"].update(bytes_source=len(script)))


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "summary.json").unlink(), ["no summary.json there; give the folder of a finished run"]),
    (lambda f: (f / "summary.json").write_text("{"), ["not the summary of a run"]),
    (lambda f: (f / "summary.json").write_text("[]"), ["not the summary of a run"]),
    (lambda f: change(f, lambda s: s.pop("config")), ["has no config"]),
    (lambda f: change(f, lambda s: s.update(finished=False)), ["has not finished; to go on: LOG_DIR=", "=1 ./run.sh"]),
    (lambda f: change(f, lambda s: s.update(artifact=None)), ["no artifact in its summary.json"]),
    (lambda f: change(f, lambda s: s["artifact"].update(path="/nowhere/x")) or (f / t.ARTIFACT_NAME).unlink(),
     ["no artifact, neither", "/nowhere/x is there; put it back"]),
    (lambda f: (f / t.ARTIFACT_NAME).write_bytes(b"x"), ["not the artifact of summary.json"]),
    (lambda f: change(f, lambda s: s["config"].update(rope_base=7.0)), ["ROPE_BASE is another in summary.json"]),
    (lambda f: change(f, lambda s: s["config"].update(colour=7)), ["its settings are not those of its script"]),
    (lambda f: change(f, lambda s: s["config"].update(data_path="/nowhere")), ["DATA_PATH=/nowhere, is not there"]),
    (lambda f: (f / "train.log").unlink(), ["no script in a train.log"]),
    (edited, ["the script in it is not of the", "bytes that summary.json counts"]),
    (older, ["its script has no build_model; it is older or another"]),
    (lambda f: (f / "excerpt.npy").unlink(), ["no excerpt.npy"]),
    (lambda f: (f / "excerpt.npy").write_bytes(b"x"), ["excerpt.npy: cannot be read"]),
    (lambda f: np.save(f / "excerpt.npy", np.zeros(3)), ["excerpt.npy: holds no losses"]),
    (lambda f: (f / "sums.npy").unlink(), ["no sums.npy"]),
])
def test_what_cannot_be_audited_is_one_line(runs, call, tmp_path, damage, words):
    folder = copy_of(runs(), tmp_path / "run")
    damage(folder)
    refused(call(folder), "run", *words)
    assert not (folder / "audit.json").exists()


def test_bad_arguments_and_runs_after_a_bad_one(runs, call, tmp_path):
    refused(call(), "RUN")
    refused(call("nowhere"), "nowhere: no such folder")
    refused(call(runs(), "--tokens", "-1"), "--tokens -1")
    refused(call(runs(), "--tokens", "x"), "--tokens")
    refused(call(ROOT), "no summary.json there")
    code, out, err = call("nowhere", runs(), "--tokens", 16)
    assert code == 2 and err.count("\n") == 1 and "audit bytes: ok" in out


def test_the_script_of_a_log_is_that_of_its_last_launch(tmp_path):
    line = b"=" * 100 + b"\n"
    log = tmp_path / "train.log"
    log.write_bytes(b"RESUME=1: a note\nx = 1\n" + line + b"python 3\nresumed\nx = 22\n" + line + b"valid: yes\n")
    assert audit.find_script(tmp_path, 7) == (b"x = 22\n", ROOT / "train_gpt.py")
    for size in (6, 8, 400):
        with pytest.raises(audit.AuditError, match="the script in it is not of the"):
            audit.find_script(tmp_path, size)
    log.write_bytes(b"x = 1\n" + line)
    assert audit.find_script(tmp_path, 6)[0] == b"x = 1\n"
    (tmp_path / "logs" / "run").mkdir(parents=True)  # in a record's folder
    (tmp_path / "train_gpt.py").write_bytes(b"x = 3\n")
    assert audit.find_script(tmp_path / "logs" / "run", 6) == (b"x = 3\n", tmp_path / "train_gpt.py")
    with pytest.raises(audit.AuditError, match="summary.json counts 7"):
        audit.find_script(tmp_path / "logs" / "run", 7)


STUB = """#!/usr/bin/env bash
case "$*" in
  *--check*) ;;
  *train_gpt.py*)
    echo "ran $RUN_ID, AUDIT is ${AUDIT-gone}"
    mkdir -p "logs/$RUN_ID"
    stop() { kill $!; echo "stopped by $1"; exit "$2"; }
    trap 'stop TERM 143' TERM
    trap 'stop HUP 129' HUP
    [ "$RAN" = signalled ] && { echo ready; sleep 60 >/dev/null & wait; }
    echo '  "finished": '$FINISHED, >"logs/$RUN_ID/summary.json"
    exit "$RAN" ;;
  *tools/audit.py*)
    echo "audited $2"
    exit "$FOUND" ;;
  *) exec "$REAL" "$@" ;;
esac
"""


@pytest.fixture
def runner(tmp_path):
    """runner(ran, found, finished="true", **variables) -> run.sh with a Python whose runs and audits end so."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def go(ran, found, finished="true", **variables):
        env = clean_environment() | {"PYTHON": str(stub), "REAL": sys.executable, "DATA_PATH": str(tmp_path), "RAN":
                                     str(ran), "FOUND": str(found), "FINISHED": finished, "AUDIT": "1"}
        return subprocess.Popen([str(tmp_path / "run.sh")], env=env | variables, cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(
                                    signal.SIGHUP, signal.SIG_DFL))  # the tests themselves may run under nohup

    return go


@pytest.mark.parametrize("ran, found, finished, code", [
    (0, 0, "true", 0), (0, 1, "true", 1), (1, 0, "true", 1), (1, 2, "true", 2), (1, None, "false", 1)])
def test_an_audit_follows_a_run(runner, ran, found, finished, code):
    """AUDIT=1 ./run.sh names the run's folder, keeps AUDIT from it, and ends with the worse of both exit codes."""
    process = runner(ran, found, finished, SEED="7")
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and not err, out + err
    name = re.search(r"^ran (\S+_seed7_\d+), AUDIT is gone$", out, re.M)[1]
    assert (f"audited logs/{name}\n" in out) == (finished == "true")


@pytest.mark.parametrize("name", ["TERM", "HUP"])
def test_a_signal_reaches_the_run_that_is_to_be_audited(runner, name):
    process = runner("signalled", 0, RUN_ID="mine")
    assert process.stdout.readline() == "ran mine, AUDIT is gone\n" and process.stdout.readline() == "ready\n"
    number = getattr(signal, f"SIG{name}")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and out == f"stopped by {name}\n"


def test_run_sh_knows_the_audit(runner):
    out, err = runner(0, 0, AUDIT="0").communicate(timeout=60)
    assert "AUDIT is gone" in out and "audited" not in out
    out, err = runner(0, 0, AUDIT="yes").communicate(timeout=60)
    assert err == "error: AUDIT=yes: accepts 0 or 1\n"
    said = subprocess.run([str(ROOT / "run.sh"), "help"], text=True, capture_output=True).stdout
    assert "./run.sh audit RUN" in said and "./run.sh record" in said and said.strip().endswith("./run.sh")
