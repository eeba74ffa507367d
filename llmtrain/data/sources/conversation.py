"""Conversations in records: prompt and response, or a list of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.config.chat import ChatConfig
from llmtrain.data.sources.base import Bad, Document

ANSWERS = "assistant"  # the role of a response


def chat_fields(chat: ChatConfig) -> list[str]:
    """The fields of a record that hold the conversation."""
    return [chat.messages] if chat.messages is not None else [chat.prompt, chat.response]


def from_conversation(
    record: Mapping[str, Any], chat: ChatConfig, path: str, number: int
) -> Document | Bad:
    """The conversation in ``record`` as a document, or what is wrong with it.

    The document's text is that of the turns alone. What precedes the first answer decides about
    the held-out split, so that a question is never on both sides.
    """
    for field in chat_fields(chat):
        if record.get(field) is None:
            have = "null" if field in record else "has " + ", ".join(list(record)[:8])
            return Bad("missing field", path, number, f"{field!r}: {have}")
    if chat.messages is None:
        pairs = (("user", record[chat.prompt]), (ANSWERS, record[chat.response]))
        messages: Any = [{"role": role, "content": content} for role, content in pairs]
    else:
        messages = record[chat.messages]
    if not isinstance(messages, list | tuple) or not messages:
        what = f"{chat.messages!r} is a {type(messages).__name__}, not a list of messages"
        return Bad("wrong type", path, number, what) if messages else Bad("empty", path, number)
    turns = []
    for index, message in enumerate(messages):
        if wrong := _fault(message, index):
            return Bad(*wrong[:1], path, number, wrong[1])
        turns.append({k: v for k, v in message.items() if v is not None})
    answers = [i for i, turn in enumerate(turns) if turn["role"] == ANSWERS]
    first = answers[0] if answers else len(turns)
    asked = "\n".join(turn["content"] for turn in turns[:first])
    text = "\n".join(turn["content"] for turn in turns)
    return Document(text, path, number, asked or text, tuple(turns))


def _fault(message: Any, index: int) -> tuple[str, str] | None:
    """(kind, detail) of what is wrong with a message."""
    if not isinstance(message, Mapping):
        return "wrong type", f"message {index} is a {type(message).__name__}, not an object"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role.strip():
        return "no role", f"message {index} has no role"
    if not isinstance(content, str):
        kind = "null" if content is None else f"a {type(content).__name__}"
        return "no content", f"the content of message {index} ({role}) is {kind}, not text"
    if role == ANSWERS and not content.strip():
        return "empty response", f"message {index}"
    return None
