"""The tokenizer's images, read one at a time: a prompt of many is no larger than its largest.

mistral-common takes images that are decoded, all of a prompt's at once: eight photographs of 20
megapixels hold half a gigabyte before the first one is scaled down to what the model sees. Here the
files travel through it, and each is decoded when its tokens are made and then let go of.
"""

from __future__ import annotations

import numpy as np
from mistral_common.protocol.instruct.chunk import ImageChunk, ImageURLChunk
from mistral_common.tokens.tokenizers.image import ImageEncoder, ImageEncoding
from PIL import Image

from ostro.cluster.generation import ImageFile
from ostro.cluster.images import read_image
from ostro.configs.deployment import ServingConfig


class UnreadImage(Image.Image):
    """Stands for an image whose file has not been read, where the library asks for an image."""

    def __init__(self, file: ImageFile) -> None:
        super().__init__()
        self.file = file


class OneByOneEncoder(ImageEncoder):
    """What the library's encoder makes, of files and in half precision, as it travels to shards.

    Args:
        encoder: The library's own.
        serving: Limits of images.
    """

    def __init__(self, encoder: ImageEncoder, serving: ServingConfig) -> None:
        super().__init__(encoder.image_config, encoder.special_ids)
        self._serving = serving

    def __call__(self, content: ImageChunk | ImageURLChunk) -> ImageEncoding:
        """Called by the library, once for each image in the order of the prompt.

        Raises:
            InvalidRequestError: The file is too large, of no known format, or broken.
        """
        assert isinstance(content, ImageChunk)  # noqa: S101  # `prompt_messages` makes no other
        assert isinstance(content.image, UnreadImage)  # noqa: S101
        image = read_image(content.image.file, self._serving)
        encoding = super().__call__(ImageChunk(image=image))
        return ImageEncoding(encoding.tokens, encoding.image.astype(np.float16))
