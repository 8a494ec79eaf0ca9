"""Image embeddings of a shard: encoded once, kept while they fit, put in the place of `[IMG]`.

Shape letters: T tokens of a micro-batch, I image tokens, D hidden.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from ostro.actors.engine.request import ImageInput
from ostro.actors.model.batch import ImageSpan
from ostro.actors.model.vision import VisionTower


class ImageFeatures:
    """The most recently used embeddings, by the image's digest.

    Attributes:
        num_encoded: Images that went through the tower.
    """

    def __init__(self, tower: VisionTower, max_bytes: int) -> None:
        """`max_bytes` bounds what is kept, but for the image used last."""
        self._tower = tower
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._kept_bytes = 0
        self.num_encoded = 0

    def place(self, hidden_TD: torch.Tensor, span: ImageSpan) -> None:
        """Overwrite the embeddings of a span's image tokens with the image's."""
        num_columns = span.image.width // self._tower.vision.token_side()
        rows, image_rows = rows_of_image_tokens(span, num_columns)
        if rows:
            index = torch.tensor([rows, image_rows], device=hidden_TD.device)
            hidden_TD.index_copy_(0, index[0], self.features(span.image).index_select(0, index[1]))

    def features(self, image: ImageInput) -> torch.Tensor:
        """The image's embeddings [I, D]; the caller must not change them."""
        found = self._kept.get(image.digest)
        if found is not None:
            self._kept.move_to_end(image.digest)
            return found
        features_ID = self._tower.encode(_pixels(image))
        self.num_encoded += 1
        self._kept[image.digest] = features_ID
        self._kept_bytes += features_ID.nbytes
        while self._kept_bytes > self._max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes
        return features_ID


def rows_of_image_tokens(span: ImageSpan, num_columns: int) -> tuple[list[int], list[int]]:
    """(rows of the micro-batch that hold `[IMG]`, the image token of each).

    The token after every row of `num_columns` image tokens is `[IMG_BREAK]` or `[IMG_END]`.

    Example:
        An image of 2 columns, whose tokens from the second on stand in rows 5, 6, 7:
        ([5, 7], [1, 2]).
    """
    rows, image_rows = [], []
    for row in range(span.rows.start, span.rows.stop):
        line, column = divmod(span.first + row - span.rows.start, num_columns + 1)
        if column < num_columns:
            rows.append(row)
            image_rows.append(line * num_columns + column)
    return rows, image_rows


def _pixels(image: ImageInput) -> torch.Tensor:
    values = torch.frombuffer(bytearray(image.pixels), dtype=torch.float16)
    return values.view(-1, image.height, image.width)
