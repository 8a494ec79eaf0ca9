"""transformers' Mistral4 as the oracle: greedy continuations and log probabilities of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch


class Oracle:
    """The reference model in float32, softmax scale as the real model has it."""

    def __init__(self, directory: Path) -> None:
        from transformers import Mistral4ForCausalLM

        model = Mistral4ForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model = model.eval()
        for layer in model.model.layers:
            # transformers multiplies in YaRN's mscale, which this model's checkpoints do not apply.
            layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
        """(tokens, log probabilities [num_tokens, V] of each step)."""
        ids, cache, tokens, logprobs = torch.tensor([prompt]), None, [], []
        for _ in range(num_tokens):
            out = self.model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logprobs.append(out.logits[0, -1].log_softmax(-1))
            tokens.append(int(logprobs[-1].argmax()))
            ids = torch.tensor([[tokens[-1]]])
        return tokens, torch.stack(logprobs)
