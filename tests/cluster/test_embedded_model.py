"""The embedded model: made once, whole or not at all, and mistral-common reads its tokenizer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from mistral_common.exceptions import InvalidRequestException
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ostro.actors.model.weights import check_checkpoint
from ostro.cluster.embedded_model import default_cache_dir, ensure_embedded_model, write_tekken


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_embedded_model(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> MistralTokenizer:
    return MistralTokenizer.from_file(str(directory / "tekken.json"))


def _encode(tokenizer: MistralTokenizer, text: str, effort: str | None) -> tuple[str, list[int]]:
    request = ChatCompletionRequest(
        messages=[UserMessage(content=text)], reasoning_effort=effort, model="m"
    )
    tokens = tokenizer.encode_chat_completion(request).tokens
    text = tokenizer.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)
    return text, list(tokens)


def test_embedded_model_is_a_checkpoint_like_any_other(
    directory: Path, tokenizer: MistralTokenizer
) -> None:
    config = check_checkpoint(directory)
    assert (config.num_experts, config.num_experts_per_token) == (128, 4)
    assert config.vocab_size == tokenizer.instruct_tokenizer.tokenizer.n_words


def test_embedded_model_is_made_once(directory: Path) -> None:
    before = (directory / "model.safetensors").stat()
    assert ensure_embedded_model(directory.parents[1]) == directory
    assert (directory / "model.safetensors").stat() == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


@pytest.mark.parametrize("name", ["model.safetensors", "tekken.json", "config.json"])
def test_embedded_model_is_made_again_when_a_file_is_lost(tmp_path: Path, name: str) -> None:
    directory = ensure_embedded_model(tmp_path)
    (directory / name).unlink()
    assert ensure_embedded_model(tmp_path) == directory
    assert (directory / name).is_file()


def test_embedded_model_is_made_again_when_it_is_truncated(tmp_path: Path) -> None:
    weights = ensure_embedded_model(tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    ensure_embedded_model(tmp_path)
    assert weights.read_bytes() == whole


def test_embedded_model_survives_being_made_by_many_at_once(tmp_path: Path) -> None:
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda: made.append(ensure_embedded_model(tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1
    assert len(made) == 4
    check_checkpoint(made[0])
    assert list(made[0].parent.iterdir()) == [made[0]]


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "ostro"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "ostro"


def test_tokenizer_is_v15_with_the_usual_special_ids(tokenizer: MistralTokenizer) -> None:
    tekken = tokenizer.instruct_tokenizer.tokenizer
    assert tekken.version.value == "v15"
    ids = {"<s>": 1, "</s>": 2, "[INST]": 3, "[TOOL_CALLS]": 9, "<pad>": 11, "[ARGS]": 32}
    ids |= {"[THINK]": 34, "[/THINK]": 35, "[MODEL_SETTINGS]": 36, "[/MODEL_SETTINGS]": 37}
    assert {text: tekken.get_special_token(text) for text in ids} == ids


@pytest.mark.parametrize(
    ("effort", "written"), [(None, "none"), ("none", "none"), ("high", "high")]
)
def test_chat_says_the_effort(
    tokenizer: MistralTokenizer, effort: str | None, written: str
) -> None:
    text, tokens = _encode(tokenizer, "Hi", effort)
    assert text == (
        f'<s>[MODEL_SETTINGS]{{"reasoning_effort": "{written}"}}[/MODEL_SETTINGS][INST]Hi[/INST]'
    )
    assert tokens[:2] == [1, 36]
    assert tokens[-1] == 4
    assert max(tokens) < 4096


def test_effort_that_the_tokenizer_does_not_declare_is_refused(
    tokenizer: MistralTokenizer,
) -> None:
    with pytest.raises(InvalidRequestException, match="none"):
        _encode(tokenizer, "Hi", "low")


@pytest.mark.parametrize(
    "text", ["Hello, world!", "caf\u00e9 \u4f60\u597d \U0001f600", "a\n\n  b\t1234"]
)
def test_any_text_survives_the_cut_vocabulary(tokenizer: MistralTokenizer, text: str) -> None:
    tekken = tokenizer.instruct_tokenizer.tokenizer
    assert tekken.decode(tekken.encode(text, bos=False, eos=False)) == text


@pytest.mark.parametrize(("vocab_size", "num_special"), [(300, 64), (1024, 20), (10**6, 1000)])
def test_write_tekken_refuses_a_vocabulary_that_cannot_be(
    tmp_path: Path, vocab_size: int, num_special: int
) -> None:
    with pytest.raises(ValueError, match="no tokenizer has"):
        write_tekken(tmp_path / "tekken.json", vocab_size, num_special)


def test_write_tekken_can_give_the_real_ids(tmp_path: Path) -> None:
    write_tekken(tmp_path / "tekken.json", 32768, num_special=1000)
    tokenizer = MistralTokenizer.from_file(str(tmp_path / "tekken.json"))
    tokens = tokenizer.instruct_tokenizer.tokenizer.encode("Hello, world!", bos=True, eos=False)
    assert tokens == [1, 22177, 1044, 4304, 1033]
