"""The prefix cache: full pages found again by what they, and all pages before them, contain.

A page's hash covers its tokens, the images that these stand for and its parent's hash, so equal
hashes mean equal prefixes. The pool keeps the pages and their order of eviction; this file knows
what they mean.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

from ostro.actors.engine.page_pool import PageLeakError, PagePool
from ostro.actors.engine.request import ImageInput

_HASH_BYTES = 8
_IMAGE_KEY_BYTES = 32


def page_hashes(
    token_ids: Sequence[int], page_size: int, salt: str, images: Sequence[ImageInput] = ()
) -> list[int]:
    """Hash chain of the full pages of a prompt, one 64-bit number a page."""
    hashes: list[int] = []
    extend_page_hashes(hashes, token_ids, page_size, salt, images)
    return hashes


def extend_page_hashes(
    hashes: list[int],
    token_ids: Sequence[int],
    page_size: int,
    salt: str,
    images: Sequence[ImageInput] = (),
) -> None:
    """Append the hashes of the full pages of `token_ids`, which follow the pages of `hashes`."""
    num_pages, first_page = len(token_ids) // page_size, len(hashes)
    packed = struct.pack(f"<{num_pages * page_size}I", *token_ids[: num_pages * page_size])
    parent = (hashes[-1] if hashes else 0).to_bytes(_HASH_BYTES, "little")
    salt_bytes, page_bytes = salt.encode(), 4 * page_size
    keys = _image_keys(images, page_size) if images else {}
    for index in range(num_pages):
        content = parent + salt_bytes + packed[index * page_bytes : (index + 1) * page_bytes]
        key = keys.get(first_page + index, b"")
        parent = blake2b(content, digest_size=_HASH_BYTES, key=key).digest()
        hashes.append(int.from_bytes(parent, "little"))


def _image_keys(images: Sequence[ImageInput], page_size: int) -> dict[int, bytes]:
    """What each page that has tokens of images is hashed with, by its index.

    Tokens of an image say nothing of what is on it: its digest and the place where it starts do.
    """
    found: dict[int, list[bytes]] = {}
    for image in images:
        name = struct.pack("<q", image.start) + image.digest
        for page in range(
            image.start // page_size, -(-(image.start + image.num_tokens) // page_size)
        ):
            found.setdefault(page, []).append(name)
    return {
        page: blake2b(b"".join(names), digest_size=_IMAGE_KEY_BYTES).digest()
        for page, names in found.items()
    }


class PrefixCache:
    """Which page holds which content. One owner for a pool."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: dict[int, int] = {}
        self._hash_of: dict[int, int] = {}
        self._is_new: dict[int, bool] = {}
        pool.watch_evictions(self._forget)

    def match(self, hashes: Sequence[int]) -> list[int]:
        """Pages of the longest cached prefix of a hash chain; the caller now holds them."""
        pages: list[int] = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            self._pool.acquire(page)
            pages.append(page)
        return pages

    def insert(self, page_hash: int, page: int) -> bool:
        """Offer a referenced page; False if the content was known.

        Its latents are in place by the time that whoever matches it from now on reads them.
        """
        if page_hash in self._page_of:
            return False
        self._page_of[page_hash] = page
        self._hash_of[page] = page_hash
        self._pool.keep(page)
        self._note(page_hash, is_new=True)
        return True

    def discard(self, page: int) -> None:
        """Have a page's content found no more, if it could be."""
        if page in self._hash_of:
            self._pool.stop_keeping(page)
            self._forget(page)

    def tell_all(self) -> None:
        """Have the next `drain_changes` tell of everything, to somebody who knows nothing yet."""
        self._is_new = dict.fromkeys(self._page_of, True)

    def drain_changes(self) -> tuple[list[int], list[int]]:
        """(hashes added, hashes dropped) since the last call, each at most once in one of them."""
        changes, self._is_new = self._is_new, {}
        added = [page_hash for page_hash, is_new in changes.items() if is_new]
        dropped = [page_hash for page_hash, is_new in changes.items() if not is_new]
        return added, dropped

    def check(self) -> None:
        """Compare with the pool.

        Raises:
            PageLeakError: The pool keeps other pages than this cache knows; the message names them.
        """
        if {page: page_hash for page_hash, page in self._page_of.items()} != self._hash_of:
            raise PageLeakError("two hashes name one page, or two pages one hash")
        if strays := self._pool.kept_pages() ^ self._hash_of.keys():
            raise PageLeakError(f"pages {sorted(strays)[:16]}: kept without a hash, or the reverse")

    def _forget(self, page: int) -> None:
        page_hash = self._hash_of.pop(page)
        del self._page_of[page_hash]
        self._note(page_hash, is_new=False)

    def _note(self, page_hash: int, *, is_new: bool) -> None:
        if self._is_new.pop(page_hash, is_new) == is_new:
            self._is_new[page_hash] = is_new
