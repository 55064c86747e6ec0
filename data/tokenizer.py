"""The tokenizer: a SentencePiece model that is given, or trained on the training split."""

import hashlib
import heapq
import io
import os
from collections.abc import Iterable, Iterator

from errors import PrepareError, first_line
from texts import text_hash

BOS = 1
MAX_VOCAB = 65535  # a token is a uint16
SAMPLE_BYTES = 64_000_000  # text a new tokenizer is trained on: seconds, and under 1 GB of memory
SPACE = "\u2581"  # how a piece writes a space


class Tokenizer:
    """A SentencePiece model and, per token id, what that token counts for in bytes."""

    def __init__(self, model: bytes, source: str):
        """`model`: a file's bytes; `source` names it in errors and the manifest. PrepareError where it cannot serve."""
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise PrepareError(f"{source}: not a SentencePiece model; give a .model file") from error
        size, bos = pieces.vocab_size(), pieces.bos_id()
        if not 0 < size <= MAX_VOCAB:
            raise PrepareError(f"{source}: {size} pieces, shards hold at most {MAX_VOCAB}; use a smaller one")
        if bos != BOS:
            raise PrepareError(f"{source}: BOS id is {bos}, shards need {BOS}; use a tokenizer with bos_id={BOS}")
        if "<0xE2>" in pieces.encode("\u0378 \U0010fffd", out_type=str):  # as model_type="word" does
            fault = f"spells a space as the three bytes of {SPACE}, not as one"
            raise PrepareError(f"{source}: {fault}; use a tokenizer with a piece for it")
        self.model, self.source, self.pieces, self.vocab_size = model, source, pieces, size
        self._tabulate()

    def _tabulate(self) -> None:
        """Notes of each token its bytes, whether a space leads it, and whether it is a boundary."""
        import numpy as np

        self._bytes = np.zeros(self.vocab_size, np.int64)
        self._spaced = np.zeros(self.vocab_size, bool)
        self._boundary = np.zeros(self.vocab_size, bool)
        for token in range(self.vocab_size):
            piece = self.pieces.id_to_piece(token)
            if self.pieces.is_control(token) or self.pieces.is_unknown(token) or self.pieces.is_unused(token):
                self._boundary[token] = True
            elif self.pieces.is_byte(token):
                self._bytes[token] = 1
            elif SPACE in piece[1:]:  # the canonical count knows one space, at the start
                fault = f"piece {piece!r} marks a space past its start"
                raise PrepareError(f"{self.source}: {fault}; use a tokenizer without such")
            else:
                self._spaced[token] = piece.startswith(SPACE)
                self._bytes[token] = len(piece.removeprefix(SPACE).encode())

    def facts(self) -> dict:
        """What a manifest says of it."""
        return {"vocab_size": self.vocab_size, "sha256": hashlib.sha256(self.model).hexdigest(), "source": self.source}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without BOS."""
        return self.pieces.encode(texts, num_threads=os.cpu_count() or 1)

    def lost_bytes(self, text: str, encoded: list[int]) -> int:
        """UTF-8 bytes of the characters in `text` that are unknown, for which BPB counts nothing."""
        unknown = self.pieces.unk_id()
        if unknown not in encoded:
            return 0
        spelt = zip(encoded, self.pieces.encode(text, out_type=str), strict=True)
        lost = sum(len(piece.replace(SPACE, " ").encode()) for token, piece in spelt if token == unknown)
        return min(lost, len(text.encode()))  # normalisation may have written them out

    def counted_bytes(self, tokens) -> int:
        """Canonical BPB bytes of an array of tokens that begins with BOS.

        Each target counts its piece without the leading space mark, and one byte for that space unless the token
        before is a boundary (control, unknown, unused): there the mark is the tokenizer's own addition. A byte piece
        counts 1, a boundary 0.
        """
        previous, target = tokens[:-1], tokens[1:]
        spaces = self._spaced[target] & ~self._boundary[previous]
        return int(self._bytes[target].sum() + spaces.sum())


def sample_texts(texts: Iterable[str], budget: int) -> list[str]:
    """Texts of at most about `budget` UTF-8 bytes, drawn evenly in one pass, the same ones each time.

    Keeps the texts with the smallest hashes: that needs no knowledge of how many there will be.
    """
    heap, held = [], 0  # largest hash on top, negated
    for text in texts:
        rank = int.from_bytes(text_hash(text)[8:16], "big")
        heapq.heappush(heap, (-rank, text))
        held += len(text.encode())
        while held > budget and len(heap) > 1:
            held -= len(heapq.heappop(heap)[1].encode())
    return [text for _, text in sorted(heap, reverse=True)]


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines of the texts in pieces of at most 1000 characters: SentencePiece drops any above 4192 bytes."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), 1000):
                if (piece := line[start : start + 1000].strip()) and "\0" not in piece:
                    yield piece


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A new BPE tokenizer of `vocab_size` pieces. Raises PrepareError."""
    import sentencepiece

    lines = list(sentences(sample_texts(texts, SAMPLE_BYTES)))
    if not lines:
        raise PrepareError("no training text to make a tokenizer from; give more documents")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size, pad_id=0,
            bos_id=BOS, eos_id=2, unk_id=3, byte_fallback=True, minloglevel=3,
            normalization_rule_name="identity", remove_extra_whitespaces=False,  # text is kept as it is
            num_threads=1)  # written into the model, so the machine's core count would change its bytes
    except RuntimeError as error:
        reason = first_line(error).rsplit("] ", 1)[-1].rstrip(".")
        raise PrepareError(f"cannot train a tokenizer of {vocab_size} pieces on this text ({reason}); "
                           "choose another --vocab-size or give more text") from error
    return Tokenizer(model.getvalue(), "trained on the training split")
