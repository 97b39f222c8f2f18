"""Words of tables and of messages, made and read as docs/sync.md and `lplb_triton._layout` say."""

import numpy as np
import torch

from lplb_triton._layout import FIELD_BITS, GATHERED_HEADER_WORDS, HEADER_WORDS

NUMBER_BITS = 32
# Words of a message's header.
VERSION_WORD, CALL_WORD = range(HEADER_WORDS)
# Words of the header of a gathered row; the others are 0.
GATHERED_VERSION, GATHERED_SIZE = 1, 2


def message_word(epoch, number):
    """Word of a message: the epoch above, 32 bits of the number (or of each number) below."""
    return (epoch << NUMBER_BITS) + (number & ((1 << NUMBER_BITS) - 1))


def gathered_rows(version, counts):
    """Rows of another library's gather, int32, for the counts [n_ranks, n] of all ranks."""
    n_ranks, n = counts.shape
    rows = torch.zeros(n_ranks, GATHERED_HEADER_WORDS + n, dtype=torch.int32)
    rows[:, GATHERED_VERSION], rows[:, GATHERED_SIZE] = version, n
    rows[:, GATHERED_HEADER_WORDS:] = counts
    return rows


def fields_of(words):
    """Fields of the words of ``edges`` or ``pairs``, [n_words, 4], the lowest first."""
    fields = np.ascontiguousarray(words).view(f"u{FIELD_BITS // 8}")
    return fields.reshape(-1, words.itemsize * 8 // FIELD_BITS)
