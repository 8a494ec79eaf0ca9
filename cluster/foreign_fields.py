"""Fields of OpenAI and of other servers that ask for another answer than the one to be had here.

They are refused with the way out. What is unknown besides only gets named to the caller.
"""

from __future__ import annotations

from ostro.cluster.openai_schema import CompletionFields
from ostro.cluster.refusals import refuse

_EFFORT = "use reasoning_effort"
_BUDGET = "use thinking_token_budget"
_TEMPLATE = "chats have the model's own form; use reasoning_effort, or send a prompt to completions"
_WAYS_OUT = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "web_search_options": "nothing is looked up; offer a search in tools",
    "documents": "put them into a message",
    "audio": "answers are text",
    "moderation": "not served",
    "reasoning": _EFFORT,
    "thinking": _EFFORT,
    "enable_thinking": _EFFORT,
    "thinking_budget": _BUDGET,
    "thinking_budget_tokens": _BUDGET,
    "reasoning_budget_tokens": _BUDGET,
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "allowed_token_ids": "use logit_bias",
    "bad_words": "use logit_bias",
    "guided_json": "use structured_outputs.json",
    "guided_regex": "use structured_outputs.regex",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
    "guided_json_object": "use structured_outputs.json_object",
}


def refuse_foreign_fields(body: CompletionFields) -> None:
    """Let no field pass that asks for another answer.

    Raises:
        InvalidRequestError: There is one; `param` names it.
    """
    for name, value in (body.model_extra or {}).items():
        asks_nothing = value is None or value in ([], {})
        if name in _WAYS_OUT and not asks_nothing:
            refuse(name, _WAYS_OUT[name])
