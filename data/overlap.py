"""What a folder of shards holds, and which text of its validation split stands in its training split too.

Two kinds of such text are looked for:

Equal documents. A document of training is held against those of validation that have its length, its first and its last
four tokens; where there are any, by a BLAKE2 hash of 128 bits of all its tokens.

Shared runs. A window is any 64 tokens that follow each other in a document, also over the border of two shards. Each
window of training that validation has too is found. Cut a shard into blocks of 32 tokens: every window holds a
whole one. So only the blocks of training are looked up among all runs of 32 tokens of validation, one look-up in 32
tokens. Around a block that may be there, the 32 windows that hold it are looked up among all windows of validation.
The look-ups go by hashes of 64 bits, behind a bitmap that sorts out nearly all. No window is missed. Two that differ
count as equal where their hashes collide: with 8 billion training and 62 million validation tokens 0.03 such cases are
to be expected.

Memory of a validation token: 2 bytes for itself, 8 for a window's hash, 8 to 16 for two bitmaps, 8 while the tables
are made. Where training has the window 8 more, and up to 24 when all is read. With 60 million validation tokens that
was 1.7 GB where 3% of them are shared, 3.4 GB where all are. A job takes 30 MB more. A document that is hashed is held
in memory whole. A training token that is shared costs some 500 nanoseconds, any other some 20.

Imports numpy at once, so it is imported late.
"""

import dataclasses
import hashlib
import random
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
from errors import PrepareError
from shards import HEADER_BYTES
from texts import TRAIN, VAL
from tokenizer import BOS

WINDOW = 64  # tokens of a shared run
BLOCK = WINDOW // 2
WORD = 4  # tokens hashed at a time, as one uint64
CHUNK = 1 << 19  # tokens read at a time, a multiple of BLOCK
MARGIN = BLOCK  # tokens read before and behind a chunk
BATCH = 1 << 12  # blocks around which windows are looked up at a time
SLICE = 1 << 16  # validation tokens hashed at a time, few enough for the processor's cache
BITS_EACH = 32  # bits of a bitmap for each hash in it: one foreign hash in 32 passes
NEVER = np.iinfo(np.int64).max

_drawn = random.Random(WINDOW)
FACTORS = np.array([_drawn.getrandbits(64) | 1 for _ in range(BLOCK // WORD)], np.uint64)
MIX, MIX_AGAIN, STEP, BY_LENGTH = (np.uint64(_drawn.getrandbits(64) | 1) for _ in range(4))


def mixed(words: np.ndarray) -> np.ndarray:
    """A hash of each word, another one for another word. uint64, the shape of `words`"""
    out = words >> np.uint64(32)
    out ^= words
    out *= MIX
    out ^= out >> np.uint64(29)
    out *= MIX_AGAIN
    return out


def block_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hash of each block, as run_hashes has it. `tokens`: uint16 [n * 32], in one piece. uint64 [n]"""
    return mixed(tokens.view(np.uint64)).reshape(-1, len(FACTORS)) @ FACTORS


def run_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hash of each run of 32 tokens. `tokens`: uint16 [..., n + 31]. uint64 [..., n]"""
    wide, count = tokens.astype(np.uint64), tokens.shape[-1] - BLOCK + 1
    words = wide[..., : count + BLOCK - WORD].copy()
    for i in range(1, WORD):
        words |= wide[..., i : i + words.shape[-1]] << np.uint64(16 * i)
    words = mixed(words)
    return sum(words[..., WORD * i : WORD * i + count] * factor for i, factor in enumerate(FACTORS))


def window_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hash of each window. `tokens`: uint16 [..., n + 63]. uint64 [..., n]"""
    halves = run_hashes(tokens)
    return halves[..., :-BLOCK] * STEP + halves[..., BLOCK:]


def words_at(tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The four tokens from each place on as one word. uint64 [places]"""
    words = np.zeros(len(places), np.uint64)
    for i in range(WORD):
        words |= tokens[places + i].astype(np.uint64) << np.uint64(16 * i)
    return words


class Split:
    """The shards of one split in order of name, read as one stream of tokens.

    `begins`: position in the stream of each shard's first token, and the end of the last. The headers are to be right.
    """

    def __init__(self, paths: list[Path]):
        counts = [(path.stat().st_size - HEADER_BYTES) // 2 for path in paths]
        self.paths, self.begins = paths, [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self.begins[-1]

    def place(self, position: int) -> tuple[str, int]:
        """Name of the shard that a position lies in, and the token's number in it, from 0."""
        index = bisect_right(self.begins, position) - 1
        return self.paths[index].name, position - self.begins[index]

    def read(self, begin: int, count: int) -> np.ndarray:
        """`count` tokens from position `begin`; zeros before and behind the stream. uint16 [count].
        OSError where a shard cannot be read, PrepareError where it is shorter than it was."""
        tokens = np.zeros(count, "<u2")
        at, end = max(begin, 0), min(begin + count, len(self))
        while at < end:
            index = bisect_right(self.begins, at) - 1
            stop = min(end, self.begins[index + 1])
            self._fill(tokens[at - begin : stop - begin], index, at - self.begins[index])
            at = stop
        return tokens

    def _fill(self, tokens: np.ndarray, index: int, offset: int) -> None:
        wanted = memoryview(tokens).cast("B")
        with open(self.paths[index], "rb", buffering=0) as file:
            file.seek(HEADER_BYTES + 2 * offset)
            while wanted and (got := file.readinto(wanted)):
                wanted = wanted[got:]
        if wanted:
            raise PrepareError(f"{self.paths[index]}: became shorter while it was read; run again when nothing writes "
                               "there")


class Bitmap:
    """A set of hashes that may take others for its own, about one in 32."""

    def __init__(self, ordered: np.ndarray):
        """`ordered`: the hashes in rising order, uint64 [n]."""
        log = max(16, (BITS_EACH * len(ordered) - 1).bit_length())
        self._shift, step = np.uint64(64 - log), min(1 << log, 1 << 24)
        edges = (np.arange((1 << log) // step, dtype=np.uint64) * np.uint64(step)) << self._shift
        cuts = [*np.searchsorted(ordered, edges).tolist(), len(ordered)]
        self._bytes = np.empty((1 << log) // 8, np.uint8)
        for i in range(len(edges)):
            flags = np.zeros(step, bool)
            flags[(ordered[cuts[i] : cuts[i + 1]] >> self._shift) - np.uint64(i * step)] = True
            self._bytes[i * step // 8 : (i + 1) * step // 8] = np.packbits(flags, bitorder="little")

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Whether each may be in the set; False is certain. bool, the shape of `hashes`"""
        bits = hashes >> self._shift
        found = self._bytes[bits >> np.uint64(3)]
        found >>= (bits & np.uint64(7)).astype(np.uint8)
        return (found & 1).astype(bool)


class Hashes:
    """A set of hashes, uint64 [n] in rising order, some maybe more than once."""

    def __init__(self, ordered: np.ndarray):
        self.ordered, self._bitmap = ordered, Bitmap(ordered)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of `hashes` are in the set, and the number in it of the first that is equal. int64 [found] twice"""
        which = np.flatnonzero(self._bitmap.holds(hashes))
        which = which[np.argsort(hashes[which])]  # look-ups in order find their way in the cache
        numbers = np.searchsorted(self.ordered, hashes[which])
        numbers[numbers == len(self.ordered)] = 0
        same = self.ordered[numbers] == hashes[which]
        return which[same], numbers[same]


class Runs:
    """The windows of the validation split, and which of them training has.

    `tokens`: the split, uint16 [n], at least 64. `total`: the training tokens. `pool` hashes.
    """

    def __init__(self, tokens: np.ndarray, total: int, pool: ThreadPoolExecutor):
        self.tokens, self._total, self._lock = tokens, total, threading.Lock()
        self._blocks = Bitmap(self._ordered(run_hashes, BLOCK, pool))
        self._windows = Hashes(self._ordered(window_hashes, WINDOW, pool))
        # Training tokens from the first equal window on; 0 where there is none, which takes no memory yet.
        self._first = np.zeros(len(self._windows.ordered), np.int64)

    def _ordered(self, hashes_of: Callable, length: int, pool: ThreadPoolExecutor) -> np.ndarray:
        """The hashes of all runs of `length` tokens, in rising order."""
        hashes = np.empty(len(self.tokens) - length + 1, np.uint64)

        def fill(begin: int) -> None:
            part = hashes[begin : begin + SLICE]
            part[:] = hashes_of(self.tokens[begin : begin + len(part) + length - 1])

        list(pool.map(fill, range(0, len(hashes), SLICE)))
        hashes.sort()
        return hashes

    def look_up(self, at: int, tokens: np.ndarray) -> None:
        """Notes the windows of training that begin among a chunk's tokens, but for the last 31, or up to 31 before.

        `at`: the chunk's position; `tokens`: uint16, whole blocks with MARGIN before and behind.
        """
        found = np.flatnonzero(self._blocks.holds(block_hashes(tokens[MARGIN:-MARGIN])))
        for i in range(0, len(found), BATCH):
            first = BLOCK * found[i : i + BATCH, None] + np.arange(1 - BLOCK, 1)  # windows that hold the block
            around = first[:, :1] + np.arange(MARGIN, MARGIN + BLOCK + WINDOW - 1)
            hashes, first = window_hashes(tokens[around]), first + at
            inside = (first >= 0) & (first <= self._total - WINDOW)
            which, numbers = self._windows.find(hashes[inside])
            with self._lock:
                np.maximum.at(self._first, numbers, self._total - first[inside][which])

    def shared(self) -> np.ndarray:
        """Where in validation the windows of one document begin that training has, in rising order. int64 [windows]"""
        common = self._windows.ordered[self._first > 0]
        found, known = [np.empty(0, np.int64)], Hashes(common) if len(common) else None
        for begin in range(0, len(self._first) if known else 0, SLICE):
            tokens = self.tokens[begin : begin + SLICE + WINDOW - 1]
            which, _ = known.find(window_hashes(tokens))
            documents = np.append(0, np.cumsum(tokens == BOS))  # that begin before each token
            which = which[documents[which + WINDOW] == documents[which + 1]]
            found.append(np.sort(which) + begin)
        return np.concatenate(found)

    def first_in_training(self, begin: int) -> int:
        """Training's first position of the window that begins at a position of validation, which is shared."""
        _, numbers = self._windows.find(window_hashes(self.tokens[begin : begin + WINDOW]))
        return self._total - int(self._first[numbers[0]])


def digest_of(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens, digest_size=16).digest()


def document_keys(lengths: np.ndarray, heads: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """A hash of each document's length and outer tokens.

    `lengths`: tokens, int64 [n]; `heads` and `tails`: the four tokens from its beginning and before its end as words,
    uint64 [n], also where it has fewer. uint64 [n]
    """
    short = lengths < WORD
    inside = (np.uint64(1) << (np.uint64(16) * np.minimum(lengths, WORD - 1).astype(np.uint64))) - np.uint64(1)
    heads, tails = np.where(short, heads & inside, heads), np.where(short, np.uint64(0), tails)
    return mixed(mixed(heads) + mixed(tails) * STEP + lengths.astype(np.uint64) * BY_LENGTH)


class Documents:
    """The documents of the validation split, and which of them training has.

    `begins`, `lengths`: of each in the split, int64 [n]; `first`: the position of the first equal one in training,
    NEVER where there is none, int64 [n].
    """

    def __init__(self, tokens: np.ndarray, begins: np.ndarray, lengths: np.ndarray, keys: np.ndarray):
        self.begins, self.lengths, self._tokens, self._lock = begins, lengths, tokens, threading.Lock()
        self.first = np.full(len(begins), NEVER)
        self._order = np.argsort(keys, kind="stable")
        self._keys, self._cuts = np.unique(keys[self._order], return_index=True)
        self._cuts = np.append(self._cuts, len(keys))
        self._settled = np.full(len(self._keys), NEVER)  # the last of `first` of a key's documents
        self._by_digest = {}  # of the keys that training has: number of a key -> digest -> documents

    def look_up(self, train: Split, begins: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> None:
        """Notes which documents of training validation has too; the arrays tell of one each, in rising order."""
        if not len(self._keys):
            return
        numbers = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        new = np.flatnonzero((self._keys[numbers] == keys) & (self._settled[numbers] > begins))
        for i in new.tolist():
            if self._settled[numbers[i]] > begins[i]:
                self._note(int(numbers[i]), int(begins[i]), digest_of(train.read(int(begins[i]), int(lengths[i]))))

    def _note(self, number: int, begin: int, digest: bytes) -> None:
        alike = self._order[self._cuts[number] : self._cuts[number + 1]]
        with self._lock:
            if number not in self._by_digest:
                self._by_digest[number] = {}
                for i in alike.tolist():
                    own = digest_of(self._tokens[self.begins[i] : self.begins[i] + self.lengths[i]])
                    self._by_digest[number].setdefault(own, []).append(i)
            equal = self._by_digest[number].get(digest, [])
            self.first[equal] = np.minimum(self.first[equal], begin)
            self._settled[number] = self.first[alike].max()


@dataclasses.dataclass
class Shard:
    """What a reading of one shard told: `sha256` of the file, the `highest` token id, and of each document that begins
    in it the position in the split (int64 [n]), the length (int64 [n]) and the key (uint64 [n])."""

    sha256: str
    highest: int
    begins: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray


def scan(split: Split, index: int, look: Callable[[int, int, np.ndarray], None]) -> Shard:
    """Reads one shard. `look` is called with the position of each chunk, its tokens' count and its tokens: whole blocks
    with MARGIN before and behind, in which the neighbouring shards' tokens stand. Raises what Split.read does."""
    begin, end = split.begins[index], split.begins[index + 1]
    with open(split.paths[index], "rb") as file:
        digest = hashlib.sha256(file.read(HEADER_BYTES))
    highest, parts = 0, []
    for at in range(begin, end, CHUNK):
        count = min(CHUNK, end - at)
        tokens = split.read(at - MARGIN, -(-count // BLOCK) * BLOCK + 2 * MARGIN)
        own = tokens[MARGIN : MARGIN + count]
        digest.update(own)
        highest = max(highest, int(own.max()))
        places = np.flatnonzero(own == BOS) + MARGIN
        parts.append((places + (at - MARGIN), words_at(tokens, places), words_at(tokens, places - WORD)))
        look(at, count, tokens)
    begins, heads, tails = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if len(begins):  # the last one ends where the next begins, maybe some shards further on
        last = next_document(split, end)
        ends = np.append(begins[1:], last)
        tails = np.append(tails[1:], words_at(split.read(last - WORD, WORD), np.zeros(1, int)))
        lengths = ends - begins
        return Shard(digest.hexdigest(), highest, begins, lengths, document_keys(lengths, heads, tails))
    return Shard(digest.hexdigest(), highest, begins, begins, heads)


def next_document(split: Split, begin: int) -> int:
    """The position of the first BOS from `begin` on, the split's end where there is none."""
    step = 1 << 12
    while begin < len(split):
        found = np.flatnonzero(split.read(begin, step) == BOS)
        if len(found):
            return begin + int(found[0])
        begin, step = begin + step, min(2 * step, CHUNK)
    return len(split)


class Progress:
    """Prints every `every` seconds how far a reading is. `total`: tokens."""

    def __init__(self, what: str, total: int, every: float = 10.0):
        self._what, self._total, self._every, self._lock = what, total, every, threading.Lock()
        self._done, self._begun = 0, time.monotonic()
        self._said = self._begun

    def add(self, tokens: int) -> None:
        with self._lock:
            self._done += tokens
            now = time.monotonic()
            if now - self._said < self._every:
                return
            self._said, rate = now, self._done / (now - self._begun)
            print(f"  {self._what}: {self._done:,} of {self._total:,} tokens, {rate / 1e6:.1f} million/s, "
                  f"{(self._total - self._done) / rate:.0f} s left", flush=True)


class Workers:
    """A number of threads. Where one item fails, or Ctrl-C comes, the others end soon."""

    def __init__(self, jobs: int):
        self.pool, self._stop = ThreadPoolExecutor(jobs), threading.Event()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.pool.shutdown(cancel_futures=True)

    def scan(self, split: Split, what: str, look: Callable, see: Callable | None = None) -> list[Shard]:
        """Reads all shards, as scan() does; `see` gets each one's figures. The figures, in order. Raises what
        Split.read does."""
        progress = Progress(what, len(split))

        def watched(at: int, count: int, tokens: np.ndarray) -> None:
            if self._stop.is_set():
                raise PrepareError("stopped; run again")
            look(at, count, tokens)
            progress.add(count)

        def one(index: int) -> Shard:
            shard = scan(split, index, watched)
            if see:
                see(shard)
            return shard

        return list(self.pool.map(one, range(len(split.paths))))


@dataclasses.dataclass
class Overlap:
    """What validation shares with training.

    `documents`: the equal ones. `windows`: where training has a shared one; None where a split is shorter than one.
    `starts`: where in validation the shared windows begin, in rising order, int64 [w]. `runs`: where the runs that they
    make up begin and end, which neither overlap nor touch, int64 [r, 2]. `shared`: tokens of each document in them,
    int64 [n].
    """

    documents: Documents
    windows: Runs | None
    starts: np.ndarray
    runs: np.ndarray
    shared: np.ndarray

    def in_training(self, begin: int, end: int) -> int:
        """Where training has the first window of the longest run in a document that shares some; its position.
        `begin`, `end`: the document's in validation."""
        within = np.minimum(self.runs[:, 1], end) - np.maximum(self.runs[:, 0], begin)
        run = self.runs[within.argmax()]
        index = int(np.searchsorted(self.starts, max(run[0], begin)))
        return self.windows.first_in_training(int(self.starts[index]))


def merged(starts: np.ndarray) -> np.ndarray:
    """Beginning and end of the runs that windows with these beginnings, in rising order, make up. int64 [runs, 2]"""
    apart = np.flatnonzero(np.diff(starts) > WINDOW)
    first, last = np.append(0, apart + 1), np.append(apart, len(starts) - 1)
    return np.stack([starts[first], starts[last] + WINDOW], 1) if len(starts) else np.empty((0, 2), np.int64)


def covered(runs: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """How many tokens before each position lie in runs. int64 [positions]"""
    before = np.append(0, np.cumsum(runs[:, 1] - runs[:, 0]))
    index = np.searchsorted(runs[:, 0], positions, "right")
    ends = np.append(0, runs[:, 1])[index]
    return before[index] - np.maximum(ends - positions, 0)


@dataclasses.dataclass
class Survey:
    """A folder's whole shards, by split, what a reading told of them, and what the splits share, if there are two."""

    splits: dict[str, Split]
    shards: dict[str, list[Shard]]
    overlap: Overlap | None

    def tokens(self, split: str) -> int:
        return len(self.splits[split])

    def documents(self, split: str) -> int:
        return sum(len(shard.begins) for shard in self.shards[split])

    def begins_with_document(self, split: str) -> bool:
        return int(self.splits[split].read(0, 1)[0]) == BOS


def survey(paths: dict[str, Iterable[Path]], jobs: int) -> Survey:
    """Reads the shards of each split, on `jobs` threads. Splits without shards are left out. Raises what Split.read
    does."""
    splits = {name: Split(list(found)) for name, found in paths.items() if found}
    if VAL not in splits:
        with Workers(jobs) as workers:
            return Survey(splits, {n: workers.scan(s, n, lambda *_: None) for n, s in splits.items()}, None)
    val, train = splits[VAL], splits.get(TRAIN)
    tokens = np.empty(len(val), np.uint16)

    def keep(at: int, count: int, chunk: np.ndarray) -> None:
        tokens[at : at + count] = chunk[MARGIN : MARGIN + count]

    with Workers(jobs) as workers:
        shards = {VAL: workers.scan(val, VAL, keep)}
        if train is None:
            return Survey(splits, shards, None)
        documents = Documents(tokens, *(np.concatenate([getattr(shard, name) for shard in shards[VAL]])
                                        for name in ("begins", "lengths", "keys")))
        runs = Runs(tokens, len(train), workers.pool) if min(len(train), len(val)) >= WINDOW else None
        shards[TRAIN] = workers.scan(
            train, TRAIN, lambda at, count, chunk: runs and runs.look_up(at, chunk),
            lambda shard: documents.look_up(train, shard.begins, shard.lengths, shard.keys))
    starts = runs.shared() if runs else np.empty(0, np.int64)
    together = merged(starts)
    ends = documents.begins + documents.lengths
    shared = covered(together, ends) - covered(together, documents.begins)
    return Survey(splits, shards, Overlap(documents, runs, starts, together, shared))
