"""Records that are conversations, for supervised finetuning."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.fields import key


@dataclass(frozen=True)
class ChatConfig:
    """A conversation for each record, and which of its tokens are trained on."""

    messages: str | None = key(
        None, "field with a list of {role, content}; null: the record has prompt and response"
    )
    prompt: str = key("prompt", "field with what is asked: a turn of the role user")
    response: str = key("response", "field with the answer: a turn of the role assistant")
    template: str = key(
        "plain",
        "plain: built in; tokenizer: the chat template beside it; or a file with a Jinja template",
    )
    train_on: str = key(
        "response",
        "response: turns of the role assistant; all: every token; roles: by role_weights",
        choices=("response", "all", "roles"),
    )
    role_weights: dict[str, float] = key(
        dict, "train_on roles: role: loss weight of its tokens; roles not named weigh 0", ge=0
    )
    window: int | None = key(
        None,
        "no conversation is cut: each lies whole in a sample of so many tokens, longer ones are "
        "dropped; null: cut wherever a sample ends",
        ge=2,
    )
    pack: bool = key(True, "window: several conversations to a sample; false: one, padded")
