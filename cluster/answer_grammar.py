"""The grammar that holds an answer: the form it must have, the tools it may or must call.

mistral-common has a factory for such grammars. It is not used: its thinking is a part of the
grammar, which masks every thinking token and has no place for a budget that ends thinking before
its first token; only strict tools get their schemas; it takes no regular expression and no Lark.

Nothing reaches the cell that has not been compiled here, by the code and the tokenizer that the
shard compiles it with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec
from llguidance import LLMatcher

from ostro.actors.engine.answer_grammar import AnswerGrammar
from ostro.actors.engine.grammar import MAX_GRAMMAR_BYTES, GrammarCompiler, GrammarError
from ostro.actors.engine.request import GrammarParams
from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import (
    AnswerFormat,
    ChatGeneration,
    ChatMessage,
    Constraint,
    Tool,
    ToolChoice,
)
from ostro.cluster.model_card import ModelCard
from ostro.cluster.prompt import PromptBuilder, SpecialTokens
from ostro.cluster.refusals import refuse

_COMPILE_TIMEOUT_S = 10.0
# Blanks between the parts of JSON: one, or a new line and its indent. Were any allowed, a model
# that likes them would write nothing else.
_JSON_BLANKS = r" |\r?\n[ \t]{0,32}"
_ANY_OBJECT: dict[str, object] = {"type": "object"}
# Keywords of a schema that say themselves which further properties there may be.
_OPENS = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}

_FREE_TEXT = "TEXT: /(?s:.)+/"
_BLANKS = r"BLANKS: / |\n{1,2}/"  # what models put before JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One grammar among those that make up a request's.

    Attributes:
        name: Others refer to it as @name.
        body: llguidance's form of it, without the name.
        where: The public field that it came from.
        tool: Of a call's arguments: the tool's name.
    """

    name: str
    body: dict[str, object]
    where: str
    tool: str = ""


class AnswerGrammars:
    """Writes and checks the grammars of requests for one model. Thread-safe."""

    def __init__(self, prompts: PromptBuilder, card: ModelCard) -> None:
        self._prompts = prompts
        self._compiler = GrammarCompiler(prompts.model_dir, card.vocab_size)
        special = prompts.special
        # A model that thinks goes on to its answer by [/THINK] and nothing else.
        self._held_token_ids = (special.eos, *card.end_token_ids, special.tool_calls)

    def chat(self, chat: ChatGeneration) -> GrammarParams | None:
        """The grammar of an assistant turn; None leaves it free.

        Raises:
            InvalidRequestError: A schema, an expression, a grammar or the choice of tools makes no
                sense; `param` names it.
        """
        choice, answer = chat.tool_choice, chat.options.answer_format
        _check_choice(choice, chat.tools)
        if choice.mode == "required":
            answer = None  # all of the turn are calls
        parts = [] if answer is None else [_answer_part(answer)]
        calls = list(_call_parts(chat))
        parts += calls
        if not parts:
            return None
        rules = _rules(answer, calls, choice, self._prompts.special)
        params = GrammarParams(
            text=_joined(rules, parts),
            prefix_token_ids=() if answer is None else self._prefix(chat.messages),
            held_token_ids=self._held_token_ids,
        )
        self._check(params, parts)
        return params

    def text(self, answer: AnswerFormat | None) -> GrammarParams | None:
        """The grammar of a raw continuation; None leaves it free. Raises as `chat` does."""
        if answer is None:
            return None
        parts = [_answer_part(answer)]
        params = GrammarParams(text=_joined(_answer_rules(answer), parts))
        self._check(params, parts)
        return params

    def _prefix(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Tokens of the answer's beginning in the prompt, which has no blanks at its end."""
        last = messages[-1] if messages else None
        if last is None or not last.prefix:
            return ()
        return tuple(self._prompts.text(last.text.rstrip(" "), add_bos=False))

    def _check(self, params: GrammarParams, parts: Sequence[_Part]) -> None:
        try:
            matcher = self._compiled(params.text)
        except GrammarError as error:
            self._blame(parts)
            refuse(parts[0].where if len(parts) == 1 else "tools", error.message)
        try:
            AnswerGrammar(matcher, params)
        except GrammarError as error:
            raise InvalidRequestError(f"messages: {error.message}", param="messages") from error

    def _blame(self, parts: Sequence[_Part]) -> None:
        """Refuse the first part that does not compile alone, if there is one."""
        for part in parts:
            try:
                self._compiled(_joined([f"start: @{part.name}"], [part]))
            except GrammarError as error:
                refuse(part.where, error.message)

    def _compiled(self, text: str) -> LLMatcher:
        compiling: Future[LLMatcher] = self._compiler.compile(text)
        try:
            return compiling.result(_COMPILE_TIMEOUT_S)
        except TimeoutError:
            compiling.cancel()
            raise GrammarError(f"does not compile within {_COMPILE_TIMEOUT_S:g} s") from None


def _check_choice(choice: ToolChoice, tools: Sequence[Tool]) -> None:
    if choice.mode not in ("auto", "none", "required"):
        refuse("tool_choice", "must be 'auto', 'none', 'required' or a function")
    if choice.mode == "required" and not tools:
        refuse("tool_choice", "no tools are on offer that could be called")
    if choice.name is not None and choice.name not in {tool.name for tool in tools}:
        refuse("tool_choice", f"no tool on offer is named {choice.name[:100]!r}")


def _call_parts(chat: ChatGeneration) -> Iterator[_Part]:
    """The arguments of every tool that may be called; nothing where calls are free.

    They are free if any tool may be called any number of times with any arguments.
    """
    choice = chat.tool_choice
    must_call = choice.mode == "required"
    is_held = must_call or chat.options.answer_format or not choice.parallel
    if choice.mode == "none" or not (is_held or any(tool.strict for tool in chat.tools)):
        return
    for index, tool in enumerate(chat.tools):
        if choice.name in (None, tool.name):
            where = tool.where or f"tools[{index}].function.parameters"
            schema = _arguments_schema(tool, where) if tool.strict or must_call else _ANY_OBJECT
            body = _json_body(schema, where)
            yield _Part(name=f"arguments{index}", body=body, where=where, tool=tool.name)


def _rules(
    answer: AnswerFormat | None, calls: Sequence[_Part], choice: ToolChoice, special: SpecialTokens
) -> list[str]:
    """The Lark rules that join the parts."""
    if not calls and answer is not None:
        return _answer_rules(answer)
    begin, arguments = f"<[{special.tool_calls}]>", f"<[{special.arguments}]>"
    call = " | ".join(f'{begin} "{part.tool}" {arguments} @{part.name}' for part in calls)
    is_single = choice.name is not None or not choice.parallel
    rules = [f"calls: {'call' if is_single else 'call+'}", f"call: {call}"]
    if choice.mode == "required":
        return ["start: calls", *rules]
    if answer is None:
        return ["start: TEXT? calls?", _FREE_TEXT, *rules]
    return ["start: answer | calls", *_answer_rules(answer, "answer"), *rules]


def _answer_rules(answer: AnswerFormat, name: str = "start") -> list[str]:
    if answer.constraint in (Constraint.JSON_OBJECT, Constraint.JSON_SCHEMA):
        return [f"{name}: BLANKS? @answer", _BLANKS]
    return [f"{name}: @answer"]


def _answer_part(answer: AnswerFormat) -> _Part:
    where = answer.where
    if len(answer.text) > MAX_GRAMMAR_BYTES:
        refuse(where, f"takes at most {MAX_GRAMMAR_BYTES} bytes")
    match answer.constraint:
        case Constraint.JSON_OBJECT:
            body = _json_body(_ANY_OBJECT, where)
        case Constraint.JSON_SCHEMA:
            body = _json_body(_schema(answer.text, where), where)
        case Constraint.REGEX:
            body = _regex_body(answer.text, where)
        case Constraint.LARK:
            body = {"lark_grammar": answer.text}
    return _Part(name="answer", body=body, where=where)


def _schema(text: str, where: str) -> dict[str, object]:
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        refuse(where, f"must be a JSON Schema, an object of JSON ({str(error)[:100]})")


def _arguments_schema(tool: Tool, where: str) -> dict[str, object]:
    """A schema of arguments; those that it does not name are not taken, unless it says so."""
    schema = {"type": "object", **tool.parameters}
    if schema["type"] != "object":
        refuse(where, "must have type 'object'")
    return schema if _OPENS & schema.keys() else {**schema, "additionalProperties": False}


def _json_body(schema: dict[str, object], where: str) -> dict[str, object]:
    """A schema with our default for blanks; callers may set llguidance's options themselves."""
    options = schema.get("x-guidance", {})
    if not isinstance(options, dict):
        refuse(where, "x-guidance must be an object")
    return {
        "json_schema": {**schema, "x-guidance": {"whitespace_pattern": _JSON_BLANKS, **options}}
    }


def _regex_body(expression: str, where: str) -> dict[str, object]:
    try:
        (grammar,) = json.loads(LLMatcher.grammar_from_regex(expression))["grammars"]
    except UnicodeEncodeError:
        refuse(where, "is not valid Unicode text")
    return {"lark_grammar": grammar["lark_grammar"]}


def _joined(rules: Sequence[str], parts: Sequence[_Part]) -> str:
    lark: dict[str, object] = {"lark_grammar": "\n".join(rules)}
    try:
        return json.dumps({"grammars": [lark, *({"name": p.name, **p.body} for p in parts)]})
    except RecursionError:
        refuse(parts[0].where, "is too deep")
