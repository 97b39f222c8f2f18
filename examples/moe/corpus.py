"""Read the text to train on, tokenise it and divide it among the source ranks."""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe.settings import BYTES, Config

# A piece is a run of letters, a line break with its indentation, a run of spaces, or one byte.
_PIECE = re.compile(rb"[A-Za-z]+|\n *| +|.", re.DOTALL)


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, one stretch per source rank.

    Parameters
    ----------
    tokens
        int64 [total tokens], the ranks' streams one after the other.
    starts, lengths
        int64 [sources], where each rank's stream begins in ``tokens`` and how long it is.
    digest
        SHA-256 of the text that was tokenised, as hexadecimal digits.
    size
        Bytes of that text.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    digest: str
    size: int


def read_documents(text: str | None, limit: int, seed: int) -> list[bytes]:
    """Collect the files to train on, in an order that depends on ``seed`` only.

    Parameters
    ----------
    text
        A file, a folder (every file below it), or None for the standard library's sources.
    limit
        Stop after this many bytes.
    seed
        Seed of the shuffle.

    Returns
    -------
    list of bytes
        Contents of the files; the last one is cut where ``limit`` is reached.

    Raises
    ------
    FileNotFoundError
        If ``text`` names nothing that exists, or the standard library's sources are not installed.
    """
    if text is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        # Installed packages live below the standard library's folder but are not part of it.
        paths = [
            path
            for path in root.rglob("*.py")
            if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)
        ]
        if not paths:
            raise FileNotFoundError("text: the standard library's sources are missing; name a file")
    else:
        root = Path(text)
        if not root.exists():
            raise FileNotFoundError(f"text: no such file or folder: {text!r}")
        paths = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    random.Random(seed).shuffle(paths)
    documents: list[bytes] = []
    for path in paths:
        content = path.read_bytes()[:limit]
        limit -= len(content)
        if content:
            documents.append(content)
        if limit == 0:
            break
    return documents


def build_corpus(config: Config) -> Corpus:
    """Read the text, tokenise it and divide it among the source ranks.

    The vocabulary has the 256 bytes and the most frequent longer pieces (words, indentation); a
    piece outside it is spelt in bytes. Whole files go to the source rank with the fewest tokens so
    far; only files that are too long for an even division are cut.

    Parameters
    ----------
    config
        Settings; those for text, vocabulary, sources and seed are used.

    Returns
    -------
    Corpus
        On the CPU.

    Raises
    ------
    FileNotFoundError
        See `read_documents`.
    ValueError
        If there is too little text for the source ranks.
    """
    documents = read_documents(config.text, config.text_bytes, config.seed)
    size = sum(map(len, documents))
    digest = hashlib.sha256(b"".join(documents)).hexdigest()

    frequency: Counter[bytes] = Counter()
    for document in documents:
        frequency.update(_PIECE.findall(document))
    longer = sorted(
        (piece for piece in frequency if len(piece) > 1),
        key=lambda piece: (-frequency[piece], piece),
    )
    known = {bytes([value]): [value] for value in range(BYTES)}
    for index, piece in enumerate(longer[: config.vocab - BYTES]):
        known[piece] = [BYTES + index]

    encoded = []
    for document in documents:
        ids: list[int] = []
        for piece in _PIECE.findall(document):
            ids.extend(known.get(piece) or piece)
        encoded.append(np.array(ids, dtype=np.int64))

    total = sum(map(len, encoded))
    longest = max(config.seq_len + 1, total // (4 * config.sources))
    streams: list[list[np.ndarray]] = [[] for _ in range(config.sources)]
    lengths = [0] * config.sources
    for ids_of_document in encoded:
        for begin in range(0, len(ids_of_document), longest):
            part = ids_of_document[begin : begin + longest]
            rank = lengths.index(min(lengths))
            streams[rank].append(part)
            lengths[rank] += len(part)
    if min(lengths) < config.seq_len + 1:
        raise ValueError(
            f"text must give each of the {config.sources} sources at least seq_len + 1 = "
            f"{config.seq_len + 1} tokens, got {total} tokens in all"
        )
    joined = np.concatenate([part for stream in streams for part in stream])
    ends = np.cumsum(lengths)
    return Corpus(
        tokens=torch.from_numpy(joined),
        starts=torch.from_numpy(ends - np.array(lengths)),
        lengths=torch.tensor(lengths),
        digest=digest,
        size=size,
    )


def draw_begins(config: Config, corpus: Corpus) -> Tensor:
    """Draw where every sequence of the run begins.

    The draw is on the CPU, so that every device gets the same batches.

    Parameters
    ----------
    config
        Settings.
    corpus
        The text.

    Returns
    -------
    Tensor
        int64 [steps, sources, sequences of a source in a batch], positions in ``corpus.tokens``.
    """
    sequences = config.tokens_per_source // config.seq_len
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.rand(
        (config.steps, config.sources, sequences), dtype=torch.float64, generator=generator
    )
    last = (corpus.lengths - config.seq_len).view(-1, 1)
    return corpus.starts.view(-1, 1) + (drawn * last).to(torch.int64)
