"""The model without a cell: one process, a simple page allocator, experts in pieces, an oracle.

`ModelRig` runs requests through decoder and experts as a shard would; `load_oracle` gives the
transformers model of the same checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pictures
import torch

from ostro.actors.engine.request import (
    GenerationRequest,
    ImageInput,
    RequestProgress,
    SamplingParams,
    StopParams,
)
from ostro.actors.engine.step import ScheduledRequest
from ostro.actors.model.batch import build_batches
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.decoder import Decoder
from ostro.actors.model.experts import LocalExperts
from ostro.actors.model.latent_cache import LatentCache
from ostro.actors.model.weights import load_attention_weights, load_expert_weights
from ostro.configs.model import load_model_config
from ostro.configs.quantization import WeightFormat
from ostro.kernels.combine import combine


def make_progress(
    request_id: str,
    prompt: Sequence[int],
    *,
    sampling: SamplingParams | None = None,
    output: Sequence[int] = (),
    images: tuple[ImageInput, ...] = (),
) -> RequestProgress:
    """A request as the scheduler would hold it."""
    request = GenerationRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling=sampling or SamplingParams(),
        stop=StopParams(max_tokens=1_000_000),
        images=images,
    )
    return RequestProgress(request, arrived_s=0.0, output_token_ids=output)


class InProcessExchange:
    """Experts in this process, cut into shards that each hold a part of them."""

    def __init__(self, shards: Sequence[tuple[LocalExperts, torch.Tensor]]) -> None:
        self._shards = shards
        self._under_way: dict[tuple[int, int], torch.Tensor] = {}
        self.num_dispatches = 0

    def dispatch(
        self,
        layer: int,
        micro_batch: int,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> None:
        assert (layer, micro_batch) not in self._under_way
        self.num_dispatches += 1
        parts = [
            experts.forward(layer, x_TD, local_of_logical[expert_TK], weight_TK)
            for experts, local_of_logical in self._shards
        ]
        self._under_way[layer, micro_batch] = combine(parts)

    def combine(self, layer: int, micro_batch: int) -> torch.Tensor:
        return self._under_way.pop((layer, micro_batch))


class ModelRig:
    """Decoder, experts and pages of one checkpoint.

    The cache starts as NaN, so reading what nobody wrote shows.
    """

    def __init__(
        self,
        directory: Path,
        *,
        page_size: int = 16,
        num_pages: int = 256,
        num_expert_shards: int = 1,
        num_micro_batches: int = 1,
        position_offset: int = 0,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        precision: WeightFormat = WeightFormat.PLAIN,
        device: str = "cpu",
        image_cache_bytes: int = 2**20,
    ) -> None:
        self.config = load_model_config(directory)
        reader = CheckpointReader(directory)
        self.cache = LatentCache(
            self.config,
            num_pages=num_pages,
            page_size=page_size,
            device=device,
            dtype=cache_dtype or dtype,
        )
        for layer_NSW in self.cache.layers:
            layer_NSW.view(torch.uint8).fill_(0xFF)  # NaN in every dtype
        weights = load_attention_weights(
            reader, self.config, device=device, dtype=dtype, precision=precision
        )
        self.decoder = Decoder(
            self.config, weights, self.cache, image_cache_bytes=image_cache_bytes
        )
        self.exchange = InProcessExchange(
            [
                self._load_experts(
                    reader, shard, num_expert_shards, device, dtype=dtype, precision=precision
                )
                for shard in range(num_expert_shards)
            ]
        )
        self._num_micro_batches = num_micro_batches
        self._position_offset = position_offset
        # A fixed shuffle: pages of a request are neither consecutive nor ascending.
        generator = torch.Generator().manual_seed(5)
        self._free_pages: list[int] = torch.randperm(num_pages, generator=generator).tolist()

    def _load_experts(
        self,
        reader: CheckpointReader,
        shard: int,
        num_shards: int,
        device: str,
        **held: Any,
    ) -> tuple[LocalExperts, torch.Tensor]:
        mine = list(range(shard, self.config.num_experts, num_shards))
        weights = load_expert_weights(reader, self.config, mine, device=device, **held)
        local_of_logical = torch.full((self.config.num_experts,), -1, device=device)
        local_of_logical[mine] = torch.arange(len(mine), device=device)
        return LocalExperts(self.config, weights), local_of_logical

    def entry(self, progress: RequestProgress, num_tokens: int) -> ScheduledRequest:
        """The request's next `num_tokens` tokens, with the pages they need."""
        start = progress.num_computed_tokens
        stop = start + num_tokens
        while len(progress.pages) * self.cache.page_size < stop:
            progress.pages.append(self._free_pages.pop())
        progress.num_computed_tokens = stop
        tokens = [progress.token_at(position) for position in range(start, stop)]
        samples = stop == progress.num_tokens
        return ScheduledRequest(progress, start, num_tokens, tokens, progress.pages, samples)

    def step(self, entries: Sequence[ScheduledRequest]) -> torch.Tensor:
        """Logits of the entries that sample, [B, V]."""
        return torch.cat(self._forward(entries, all_rows=False))

    def step_all_rows(self, entries: Sequence[ScheduledRequest]) -> torch.Tensor:
        """Logits of every token of the step, [T, V]."""
        return torch.cat(self._forward(entries, all_rows=True))

    def _forward(self, entries: Sequence[ScheduledRequest], *, all_rows: bool) -> list[Any]:
        batches = build_batches(
            entries,
            page_size=self.cache.page_size,
            num_micro_batches=self._num_micro_batches,
            position_offset=self._position_offset,
        )
        if all_rows:
            batches = [
                replace(batch, sample_rows=torch.arange(batch.num_tokens)) for batch in batches
            ]
        return self.decoder.forward(batches, self.exchange)

    def logits_in_chunks(
        self, tokens: Sequence[int], chunk: int, images: tuple[ImageInput, ...] = ()
    ) -> torch.Tensor:
        """Logits after every token of one request that is computed `chunk` tokens at a time."""
        progress = make_progress("r", tokens, images=images)
        parts = []
        for start in range(0, len(tokens), chunk):
            count = min(chunk, len(tokens) - start)
            parts.append(self.step_all_rows([self.entry(progress, count)]))
        return torch.cat(parts)


def load_oracle(directory: Path) -> Any:
    """The transformers model in float32, with the softmax scale that the real model has.

    transformers 5.23 multiplies it by YaRN's mscale squared, which this checkpoint family does not
    ask for.
    """
    from transformers import Mistral4ForCausalLM

    oracle = Mistral4ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = oracle.config
    for layer in oracle.model.layers:
        layer.self_attn.scaling = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    return oracle


def load_image_oracle(directory: Path) -> Any:
    """As `load_oracle`, of a checkpoint with a vision tower."""
    from transformers import Mistral3ForConditionalGeneration

    oracle = Mistral3ForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = oracle.config.text_config
    for layer in oracle.model.language_model.layers:
        layer.self_attn.scaling = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    return oracle


@torch.no_grad()
def oracle_image_logits(
    oracle: Any, tokens: Sequence[int], images: Sequence[ImageInput]
) -> torch.Tensor:
    """Logits after every token of a prompt with images, [T, V]."""
    logits: torch.Tensor = _run_with_images(oracle, tokens, images).logits[0]
    return logits


@torch.no_grad()
def oracle_image_states(
    oracle: Any, tokens: Sequence[int], images: Sequence[ImageInput]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(embeddings with the images' in their places, hidden states after the final norm), [T, D]."""
    states = _run_with_images(oracle, tokens, images, output_hidden_states=True).hidden_states
    return states[0][0], states[-1][0]


def _run_with_images(
    oracle: Any, tokens: Sequence[int], images: Sequence[ImageInput], **options: bool
) -> Any:
    height = max(image.height for image in images)
    width = max(image.width for image in images)
    pixels = torch.zeros(len(images), 3, height, width)
    for place, image in zip(pixels, images, strict=True):
        place[:, : image.height, : image.width] = pictures.pixel_values(image)
    return oracle(
        input_ids=torch.tensor([list(tokens)]),
        pixel_values=pixels,
        image_sizes=torch.tensor([[image.height, image.width] for image in images]),
        use_cache=False,
        **options,
    )


@torch.inference_mode()
def oracle_greedy(
    oracle: Any, prompt: Sequence[int], num_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """(greedy tokens, log probabilities [num_tokens, V] of each step)."""
    ids, cache, tokens, logprobs = torch.tensor([list(prompt)]), None, [], []
    for _ in range(num_tokens):
        out = oracle(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logprobs.append(out.logits[0, -1].log_softmax(-1))
        tokens.append(int(logprobs[-1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(logprobs)


@torch.no_grad()
def oracle_logits(oracle: Any, tokens: Sequence[int], position_offset: int = 0) -> torch.Tensor:
    """Logits after every token, [T, V]."""
    positions = torch.arange(position_offset, position_offset + len(tokens))
    logits: torch.Tensor = oracle(
        input_ids=torch.tensor([list(tokens)]), position_ids=positions[None], use_cache=False
    ).logits[0]
    return logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())
