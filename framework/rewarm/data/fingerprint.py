"""A cheap identity of a token range that goes by content, not by path."""

from __future__ import annotations

import hashlib
import os

from rewarm.data.indexed import IndexedTokens

ALGORITHM = "rewarm-tokens-1"
_BLOCK = 4096
_TOKEN_BLOCKS = 32
_INDEX_BLOCKS = 8


def range_fingerprint(tokens: IndexedTokens, start: int, stop: int, content_hash: str | None = None) -> str:
    """Hash the sizes, the type and a spread of blocks of a token range and of its index.

    32 blocks of 4 KiB evenly over the range, its first and last bytes included, and 8 over the index. A change that
    alters a size, the order of files, the tokenizer or the shuffle of the source cannot pass; one edited token
    between two blocks of a large file can, unless it changed the hash of the whole content that is given. Reading all
    here is no way out: every rank asks, before the ranks can share the work, and it takes about a second per GB.

    Args:
        tokens: the open pair.
        start: first token of the range.
        stop: end of the range.
        content_hash: hash of the whole range, as ``rewarm data build`` records it.

    Returns:
        32 hexadecimal digits.
    """
    item = tokens.dtype.itemsize
    digest = hashlib.blake2b(digest_size=16)
    sizes = (ALGORITHM, tokens.dtype.str, start, stop, tokens.num_bytes, tokens.header.size, tokens.num_documents)
    digest.update(repr((*sizes, content_hash or "")).encode())
    _hash_blocks(digest, str(tokens.bin_path), start * item, stop * item, _TOKEN_BLOCKS)
    _hash_blocks(digest, str(tokens.idx_path), 0, tokens.header.size, _INDEX_BLOCKS)
    return digest.hexdigest()


def _hash_blocks(digest: hashlib.blake2b, path: str, start: int, stop: int, count: int) -> None:
    last = max(start, stop - _BLOCK)
    with open(path, "rb") as stream:
        for block in range(count):
            offset = start + (last - start) * block // (count - 1)
            digest.update(os.pread(stream.fileno(), min(_BLOCK, stop - offset), offset))
