"""transformers on the same checkpoint: what the engine's figures are ratios to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from ostro.actors.model.device import torch_dtype
from ostro.cluster.bench_workload import DecodeSample, Workload


class TransformersEngine:
    """transformers decoding a batch with its own cache."""

    def __init__(self, model: Path, dtype: str, num_threads: int) -> None:
        from transformers import Mistral4ForCausalLM

        torch.set_num_threads(num_threads)
        self._model = Mistral4ForCausalLM.from_pretrained(
            model, dtype=torch_dtype(dtype), local_files_only=True
        ).eval()
        for layer in self._model.model.layers:
            # The real model does not apply YaRN's mscale; transformers 5.15 and later do.
            layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5

    def run(self, workload: Workload, token_ids: Sequence[list[int]]) -> DecodeSample:
        """As `bench_engine.run_workload`, one batch from prefill to the last token."""
        times: list[float] = []
        with torch.inference_mode():
            began_s = time.perf_counter()
            ids, cache = torch.tensor(token_ids), None
            for _ in range(workload.new_tokens):
                out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
                times.append(time.perf_counter())
        gaps = [later - earlier for earlier, later in pairwise(times)]
        step_s = statistics.median(gaps) if gaps else None
        return DecodeSample(step_s, times[0] - began_s, {}, workload.new_tokens)
