"""Several choices over HTTP, whole and streamed, as the openai and mistralai clients read them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from http_face import HELLO, face, mistral_client, openai_client, sse
from scripted_frontend import MODEL, THREE, WITH_LOGPROBS, ScriptedFrontend

from ostro.actors.errors import ShardLostError
from ostro.cluster.generation import TextDelta
from ostro.cluster.openai_answer import WholeChat
from ostro.cluster.openai_fields import AnswerStyle

ASKED = {"model": MODEL, "messages": HELLO, "n": 3}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
TWO_TEXTS = tuple(
    replace(event, **fields)
    for event in WITH_LOGPROBS
    for fields in (
        [{"num_choices": 2}]
        if event is WITH_LOGPROBS[0]
        else [{"choice": choice} for choice in (1, 0)]
    )
)
# Of its two last events the first is not the last.
TEXTS = (*TWO_TEXTS[:-2], replace(TWO_TEXTS[-2], is_last=False), TWO_TEXTS[-1])


def streamed(frontend: ScriptedFrontend, **fields) -> list[dict]:
    with face(frontend) as http:
        answer = http.post("/v1/chat/completions", json=ASKED | {"stream": True} | fields)
    return sse(answer.text)


def by_index(chunks) -> dict[int, list]:
    found = defaultdict(list)
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index].append(choice)
    return found


def test_openai_client_reads_whole_choices_in_their_order():
    frontend = ScriptedFrontend(*THREE)
    with face(frontend) as http, openai_client(http) as client:
        answer = client.chat.completions.create(**ASKED, **LOGPROBS)
    first, second, third = answer.choices
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "tool_calls", "length"]
    assert (first.message.content, first.message.reasoning_content) == ("Hello", "Let me see.")
    assert (second.message.content, second.message.reasoning_content) == (None, "Well")
    assert [call.id for call in second.message.tool_calls] == ["abcDEF123"]
    assert third.message.content == "Hello"
    assert [t.token_id for t in third.logprobs.content] == [5, 6]
    assert second.logprobs.content == []
    assert third.reasoning == {"effort": "low", "budget": 2048, "tokens": 5, "ended_by": "model"}
    assert answer.reasoning == third.reasoning | {"tokens": 15}
    assert answer.usage.completion_tokens == 11  # the last event's, which tells of all
    assert frontend.asked[0].options.num_choices == 3


def test_openai_client_reads_streamed_choices_and_the_usage_once():
    with face(ScriptedFrontend(*THREE)) as http, openai_client(http) as client:
        chunks = list(
            client.chat.completions.create(
                **ASKED, **LOGPROBS, stream=True, stream_options={"include_usage": True}
            )
        )
    choices = by_index(chunks)
    assert [choices[index][0].delta.role for index in range(3)] == ["assistant"] * 3
    content = {
        index: "".join(choice.delta.content or "" for choice in choices[index]) for index in choices
    }
    assert content == {0: "Hello", 1: "", 2: "Hello"}
    assert [choices[index][-1].finish_reason for index in range(3)] == [
        *("stop", "tool_calls", "length")
    ]
    assert [sum(bool(c.finish_reason) for c in choices[index]) for index in range(3)] == [1] * 3
    calls = [call for choice in choices[1] for call in choice.delta.tool_calls or ()]
    assert [call.id for call in calls] == ["abcDEF123"]
    tokens = [t for choice in choices[2] if choice.logprobs for t in choice.logprobs.content]
    assert [token.token for token in tokens] == ["Hel", "lo"]
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []


def test_openai_stream_helper_gathers_every_choice():
    # It raises at "length", so here the third answer just stops.
    events = [replace(e, reason="stop") if e == THREE[6] else e for e in THREE]
    with (
        face(ScriptedFrontend(*events)) as http,
        openai_client(http) as client,
        client.chat.completions.stream(**ASKED) as stream,
    ):
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hello", "", "Hello"]
    assert final.choices[1].message.tool_calls[0].function.name == "weather"
    assert final.usage.completion_tokens == 11


def test_mistral_client_reads_whole_choices():
    with face(ScriptedFrontend(*THREE)) as http, mistral_client(http) as client:
        answer = client.chat.complete(**ASKED)
    first, second, third = answer.choices
    assert [part.type for part in first.message.content] == ["thinking", "text"]
    assert [part.type for part in second.message.content] == ["thinking"]
    assert second.message.tool_calls[0].id == "abcDEF123"
    assert third.message.content == "Hello"


def test_mistral_client_reads_streamed_choices_each_with_its_own_thinking():
    with (
        face(ScriptedFrontend(*THREE)) as http,
        mistral_client(http) as client,
        client.chat.stream(**ASKED) as stream,
    ):
        choices = by_index(event.data for event in stream)
    parts = {
        index: [
            (part.type, getattr(part, "closed", None) or None)
            for choice in choices[index]
            if isinstance(choice.delta.content, list)
            for part in choice.delta.content
        ]
        for index in choices
    }
    think, closing, text = ("thinking", None), ("thinking", True), ("text", None)
    assert parts == {0: [think, think, closing, text], 1: [think, closing], 2: []}
    strings = [c.delta.content for c in choices[2] if isinstance(c.delta.content, str)]
    assert "".join(strings) == "Hello"
    assert [choices[index][-1].finish_reason for index in range(3)] == [
        *("stop", "tool_calls", "length")
    ]


def test_without_a_usage_chunk_the_last_finish_tells_it():
    finishes = [c for c in streamed(ScriptedFrontend(*THREE)) if c["choices"][0]["finish_reason"]]
    assert [("usage" in chunk) for chunk in finishes] == [False, False, True]
    assert all(chunk["reasoning"]["ended_by"] == "model" for chunk in finishes)


def test_plain_and_full_deltas_name_the_same_choices():
    plain = streamed(ScriptedFrontend(*THREE))
    full = streamed(ScriptedFrontend(*THREE), return_token_ids=True)
    for chunk in full:
        chunk["choices"][0].pop("token_ids", None)
    for chunk in (*plain, *full):
        chunk.pop("created")
    assert plain == full


def test_a_failure_ends_all_choices_that_were_open():
    frontend = ScriptedFrontend(*THREE[:-2], ShardLostError("attention-0 was lost"))
    last = streamed(frontend, reasoning_format="chunks")[-1]
    assert [(c["index"], c["finish_reason"]) for c in last["choices"]] == [
        *((0, "error"), (1, "error"))
    ]
    assert last["error"]["code"] == "shard_lost"


@pytest.mark.parametrize("stream", [False, True])
def test_text_completions_of_several_prompts_have_offsets_of_their_own(stream):
    frontend = ScriptedFrontend(*TEXTS)
    # Its type of a streamed text has no null finish_reason, which OpenAI itself sends.
    with face(frontend) as http, openai_client(http, strict=not stream) as client:
        answer = client.completions.create(
            model=MODEL, prompt=["a", "b"], logprobs=1, stream=stream
        )
        chunks = list(answer) if stream else [answer]
    assert frontend.asked[0].prompts == ("a", "b")
    choices = by_index(chunks)
    for index in range(2):
        assert "".join(choice.text for choice in choices[index]) == "Hello"
        logprobs = [choice.logprobs for choice in choices[index] if choice.logprobs]
        assert [offset for part in logprobs for offset in part.text_offset] == [0, 3]
        assert choices[index][-1].finish_reason == "stop"


def test_streamed_plain_texts_name_their_choice():
    with face(ScriptedFrontend(*TEXTS)) as http:
        body = {"model": MODEL, "prompt": ["a", "b"], "stream": True}
        chunks = sse(http.post("/v1/completions", json=body).text)
    told = [(c["choices"][0]["index"], c["choices"][0]["text"]) for c in chunks]
    assert told == [(1, "Hel"), (0, "Hel"), (1, "lo"), (0, "lo"), (1, ""), (0, "")]


def test_half_an_answer_is_never_told_as_whole():
    answer = WholeChat(AnswerStyle())
    for event in (THREE[0], TextDelta(text="a"), THREE[-1]):
        answer.add(event)
    with pytest.raises(Exception, match="without the end of choice 0"):
        answer.body()
