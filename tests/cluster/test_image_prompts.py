"""Conversations with images: the library's own prompt, its pixels, and refusals by place."""

from __future__ import annotations

import base64
import io
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from tokenizer_files import IMAGE, write_tokenizer

from ostro.actors.errors import InvalidRequestError
from ostro.cluster import image_encoding
from ostro.cluster.generation import ChatMessage, ImageFile, ToolCall
from ostro.cluster.images import read_image
from ostro.cluster.openai_request import chat_messages
from ostro.cluster.openai_schema import Message
from ostro.cluster.prompt import PromptBuilder
from ostro.configs.deployment import ServingConfig
from ostro.configs.errors import ConfigError
from ostro.configs.reasoning import ReasoningConfig
from ostro.configs.vision import VisionConfig

TOWER = VisionConfig(
    num_layers=1,
    hidden_size=8,
    num_heads=2,
    head_dim=4,
    intermediate_size=8,
    patch_size=14,
    image_size=1540,
    num_channels=3,
    rope_theta=10000.0,
    hidden_act="silu",
    spatial_merge_size=2,
    image_token_id=10,
)


@pytest.fixture(scope="module")
def library(model_dir: Path) -> MistralTokenizer:
    return MistralTokenizer.from_file(model_dir / "tekken.json", mode=ValidationMode.serving)


def png(width: int, height: int, seed: int = 0, mode: str = "RGB") -> bytes:
    rows = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rows).convert(mode).save(file, "PNG")
    return file.getvalue()


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(*size: int, **options: object) -> dict:
    uri = "data:image/png;base64," + base64.b64encode(png(*size, **options)).decode()
    return {"type": "image_url", "image_url": {"url": uri}}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


CALLS = [
    {"id": f"callNumb{i}", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    for i in range(2)
]


def result(call: dict, *parts: dict) -> dict:
    return {"role": "tool", "tool_call_id": call["id"], "content": list(parts)}


CONVERSATIONS = {
    "image first": [user(image(100, 60), text("What is this?"))],
    "image last": [user(text("What"), text(" is"), image(100, 60))],
    "image alone": [user(image(30, 30))],
    "in the middle": [user(text("Is"), image(57, 29), text("like"), image(28, 28, seed=1))],
    "side by side": [user(image(20, 300), image(20, 300), image(300, 20, seed=1))],
    "large": [user(image(2000, 900), text("?"))],
    "one pixel": [user(image(1, 1), text("?"))],
    "a strip": [user(image(2000, 10), text("?"))],
    "transparent": [user(image(64, 64, mode="RGBA"), text("?"))],
    "grey": [user(image(64, 64, mode="L"), text("?"))],
    "two turns": [
        user(text("One"), image(50, 50)),
        {"role": "assistant", "content": "a cat"},
        user(image(80, 50, seed=1), text("Two")),
    ],
    "user after user": [user(text("One"), image(50, 50)), user(image(80, 50, seed=1), text("Two"))],
    "after a system prompt": [{"role": "system", "content": "Be brief."}, user(image(40, 40))],
    "tool results out of order": [
        user(text("Look")),
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        result(CALLS[1], text("second"), image(30, 60)),
        result(CALLS[0], image(90, 30, seed=1), text("first")),
    ],
    "names of control tokens": [user(text("[IMG][IMG_END]"), image(40, 40), text("[IMG_BREAK]"))],
}


def test_one_image_at_a_time_is_decoded(
    prompts: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[weakref.ref[Image.Image]] = []

    def read(file: ImageFile, serving: ServingConfig) -> Image.Image:
        assert [ref for ref in decoded if ref() is not None] == []
        picture = read_image(file, serving)
        decoded.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(image_encoding, "read_image", read)
    files = tuple(ImageFile(data=png(300, 200, seed), where="") for seed in range(4))
    message = ChatMessage(role="user", text="?", images=files)
    assert len(prompts.chat([message], [], "none").images) == len(decoded) == 4


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_tokens_and_pixels_are_the_librarys(
    prompts: PromptBuilder, library: MistralTokenizer, conversation: list[dict]
) -> None:
    ours = prompts.chat(
        chat_messages([Message.model_validate(message) for message in conversation]), (), "none"
    )
    expected = library.encode_chat_completion(
        ChatCompletionRequest.from_openai(messages=conversation, model="served")
    )
    assert ours.token_ids == expected.tokens
    assert len(ours.images) == len(expected.images)
    end = 0
    for found, pixels in zip(ours.images, expected.images, strict=True):
        assert (found.height, found.width) == pixels.shape[1:]
        values = np.frombuffer(found.pixels, dtype="<f2").reshape(pixels.shape)
        assert np.array_equal(values, pixels.astype(np.float16))
        rows, columns = found.height // 28, found.width // 28
        span = ([10] * columns + [12]) * rows
        assert found.start >= end
        end = found.start + found.num_tokens
        assert ours.token_ids[found.start : end] == [*span[:-1], 13]


def test_a_prompt_without_images_has_none(prompts: PromptBuilder) -> None:
    assert prompts.chat([ChatMessage(role="user", text="[IMG]")], (), "none").images == ()


def with_image(role: str = "user", data: bytes | str = b"", **fields: object) -> ChatMessage:
    file = ImageFile(data=data or png(30, 30), where="messages[0].content[0]")
    return ChatMessage(role=role, images=(file,), **fields)


def refusal(prompts: PromptBuilder, *messages: ChatMessage) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        prompts.chat(messages, (), "none")
    return caught.value


def test_a_tokenizer_without_images_refuses_them_by_place(tmp_path: Path) -> None:
    prompts = PromptBuilder(write_tokenizer(tmp_path, image=None), ReasoningConfig())
    error = refusal(prompts, with_image())
    assert error.param == "messages[0].content[0]"
    assert "this model reads no images" in error.message
    assert not prompts.takes_images


def test_an_older_tokenizer_refuses_images_in_tool_results(model_dir: Path, tmp_path: Path) -> None:
    tekken = json.loads((model_dir / "tekken.json").read_text())
    tekken["config"]["version"] = "v13"
    del tekken["model_settings_builder"]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    prompts = PromptBuilder(tmp_path, ReasoningConfig())
    asked = ChatMessage(role="user", text="Look")
    call = ToolCall(call_id="callNumb0", name="look", arguments="{}")
    calling = ChatMessage(role="assistant", tool_calls=(call,))
    error = refusal(prompts, asked, calling, with_image("tool", tool_call_id="callNumb0"))
    assert error.param == "messages[0].content[0]"
    assert len(prompts.chat([with_image()], (), "none").images) == 1


def test_a_broken_file_is_refused_by_place(prompts: PromptBuilder) -> None:
    error = refusal(prompts, with_image(data=png(90, 90)[:200]))
    assert (error.param, error.code) == ("messages[0].content[0]", "invalid_image")


def test_limits_are_the_deployments(model_dir: Path) -> None:
    serving = ServingConfig(max_images=1, max_image_pixels=899)
    prompts = PromptBuilder(model_dir, ReasoningConfig(), serving)
    assert refusal(prompts, with_image()).code == "image_too_large"
    assert refusal(prompts, with_image(), with_image()).code == "too_many_images"


# ---- tokenizer and tower


def test_images_are_served_where_tokenizer_and_tower_agree(prompts: PromptBuilder) -> None:
    assert prompts.serves_images(TOWER)
    assert not prompts.serves_images(None)


def test_images_are_not_served_where_the_tokenizer_has_no_place_for_them(tmp_path: Path) -> None:
    prompts = PromptBuilder(write_tokenizer(tmp_path, image=None), ReasoningConfig())
    assert not prompts.serves_images(TOWER)


@pytest.mark.parametrize(
    "change", [{"patch_size": 16}, {"spatial_merge_size": 1}, {"image_token_id": 11}]
)
def test_a_tower_for_other_images_is_refused(prompts: PromptBuilder, change: dict) -> None:
    with pytest.raises(ConfigError, match="do not belong together"):
        prompts.serves_images(replace(TOWER, **change))


def test_a_tower_for_smaller_images_is_refused(tmp_path: Path) -> None:
    larger = write_tokenizer(tmp_path, image={**IMAGE, "max_image_size": 1568})
    with pytest.raises(ConfigError, match="up to 1568"):
        PromptBuilder(larger, ReasoningConfig()).serves_images(TOWER)
