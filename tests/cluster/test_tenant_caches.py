"""Tenants keep to caches of their own, unless the deployment lets them share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted_cell import CARD
from tokenizer_files import write_tokenizer

from ostro.actors.engine.request import (
    GenerationRequest,
    ImageInput,
    SamplingParams,
    StopParams,
)
from ostro.cluster.generation import GenerationOptions, TextGeneration
from ostro.cluster.prompt import PromptBuilder
from ostro.cluster.request_builder import RequestBuilder
from ostro.cluster.tenant_caches import with_own_caches
from ostro.configs.load import load_deployment
from ostro.configs.security import SecurityConfig


def request(tenant: str, salt: str = "") -> GenerationRequest:
    image = ImageInput(start=0, num_tokens=2, height=28, width=28, pixels=b"", digest=bytes(16))
    return GenerationRequest(
        request_id="r",
        prompt_token_ids=[1],
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=1),
        cache_salt=salt,
        tenant=tenant,
        images=(image,),
    )


def names(request: GenerationRequest) -> tuple[str, bytes]:
    return request.cache_salt, request.images[0].digest


def test_tenants_share_no_cache_with_each_other():
    mine, theirs = with_own_caches(request("acme")), with_own_caches(request("other"))
    assert mine.cache_salt != theirs.cache_salt
    assert mine.images[0].digest != theirs.images[0].digest
    assert len(mine.images[0].digest) == 16
    assert names(mine) == names(with_own_caches(request("acme")))


def test_no_word_of_a_caller_opens_the_cache_of_another_tenant():
    assert names(with_own_caches(request("acme", "x"))) != names(
        with_own_caches(request("acm", "e/x"))
    )


def test_without_a_tenant_nothing_changes():
    alone = request("", "salt")
    assert with_own_caches(alone) == alone


@pytest.mark.parametrize(("shares", "salt"), [(False, "acme/mine"), (True, "mine")])
def test_the_deployment_may_let_tenants_share(tmp_path, shares, salt):
    write_tokenizer(tmp_path)
    security = SecurityConfig(share_prefix_cache=shares)
    deployment = replace(load_deployment("laptop"), security=security)
    prompts = PromptBuilder(tmp_path, deployment.reasoning, deployment.serving)
    card = replace(CARD, vocab_size=len(prompts.table))
    options = GenerationOptions(tenant="acme", cache_key="mine")
    asked = TextGeneration(prompts=("Say",), options=options)
    (prepared,) = RequestBuilder(prompts, card, deployment).text(asked)
    assert (prepared.request.cache_salt, prepared.request.tenant) == (salt, "acme")
