"""Chat templates: a conversation as one text, and which of its characters are trained on.

Templates are those of Hugging Face tokenizers (Jinja, run in a sandbox as ``transformers`` does),
or ``plain``. Where a turn begins and ends is found by rendering the conversation up to there: a
template that writes earlier turns differently once later ones follow cannot be trained on by turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.chat import ChatConfig
from llmtrain.config.schema import PrepareConfig, TokenizerConfig
from llmtrain.data.sources.base import Bad, Document
from llmtrain.data.sources.conversation import ANSWERS
from llmtrain.data.tokenizer import CONFIG_FILE, TEMPLATE_FILE, Tokenizer
from llmtrain.errors import DataError

# What ``plain`` writes, for tools that read templates.
PLAIN = (
    "{% for message in messages %}{{ '\\n\\n' if not loop.first }}"
    "{{ '### ' + message['role'] | capitalize + '\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n' if messages }}{{ '### Assistant\\n' }}{% endif %}"
)

Messages = Sequence[dict[str, Any]]
Write = Callable[[Messages, bool], str]  # messages, whether the opening of an answer follows


def weight_table(chat: ChatConfig) -> list[float]:
    """The loss weights that a token may have, ascending; 0 is the first."""
    given = chat.role_weights.values() if chat.train_on == "roles" else (1.0,)
    return sorted({0.0, *map(float, given)})


def template_text(chat: ChatConfig, tokenizer: TokenizerConfig) -> str | None:
    """The Jinja text that ``chat.template`` means, None for plain. DataError if there is none."""
    if chat.template == "plain":
        return None
    if chat.template != "tokenizer":
        return _read(Path(chat.template).expanduser())
    folder = Path(str(tokenizer.path)).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    if (folder / TEMPLATE_FILE).is_file():
        return _read(folder / TEMPLATE_FILE)
    found = _tokenizer_config(folder).get("chat_template")
    if isinstance(found, list):  # several by name
        found = {one.get("name"): one.get("template") for one in found}.get("default")
    if not isinstance(found, str):
        raise DataError(
            f"chat.template: neither {folder / TEMPLATE_FILE} nor a chat_template in "
            f"{folder / CONFIG_FILE}; write plain, or the path of a template"
        )
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(
            f"chat.template: {path} cannot be read ({reason}); write plain, tokenizer or the path "
            "of a Jinja template"
        ) from error


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def special_names(tokenizer: TokenizerConfig, eos_token: str) -> dict[str, str]:
    """bos_token, eos_token and the like, which templates write by name."""
    found: dict[str, str] = {}
    if tokenizer.path:
        folder = Path(tokenizer.path).expanduser()
        folder = folder if folder.is_dir() else folder.parent
        for name, value in _tokenizer_config(folder).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found | {"eos_token": eos_token}


def shared_template(cfg: PrepareConfig) -> str | None:
    """The Jinja text by which all conversations of a corpus are written; None if there are none,
    or if there are several."""
    chats = [source.chat for source in cfg.sources.values() if source.chat is not None]
    texts = {template_text(chat, cfg.tokenizer) or PLAIN for chat in chats}
    return texts.pop() if len(texts) == 1 else None


def _plain(eos_token: str) -> Write:
    """``### Role``, the text, and eos after an answer; a blank line between turns."""

    def write(messages: Messages, opened: bool) -> str:
        turns = []
        for message in messages:
            role, end = message["role"], eos_token if message["role"] == ANSWERS else ""
            turns.append(f"### {role.capitalize()}\n{message['content']}{end}")
        text = "\n\n".join(turns)
        if opened:
            text += ("\n\n" if turns else "") + f"### {ANSWERS.capitalize()}\n"
        return text

    return write


def _jinja(text: str, names: dict[str, str]) -> Write:
    """A Hugging Face template. Without ``strftime_now``: the same data give the same corpus on
    every day, and templates have a fixed date for it."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The ``generation`` block, which marks answers; turns are found without it."""

        tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **more)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    try:
        compiled = environment.from_string(text)
    except TemplateError as error:
        raise DataError(f"chat.template is no valid Jinja template ({error}); repair it") from error

    def write(messages: Messages, opened: bool) -> str:
        given = {"tools": None, "documents": None, **names}
        return compiled.render(messages=list(messages), add_generation_prompt=opened, **given)

    return write


class Chat:
    """Turns conversations into texts with weights; see ``ChatConfig``.

    specials: texts of the tokenizer's special tokens, which a template may write and a record may
    not.
    """

    def __init__(self, chat: ChatConfig, wanted: TokenizerConfig, tokenizer: Tokenizer) -> None:
        """wanted: the section of the tokenizer, beside whose file the template is looked for."""
        self.cfg = chat
        self.table = weight_table(chat)
        self.specials = tokenizer.special_texts
        text = template_text(chat, wanted)
        names = special_names(wanted, tokenizer.eos_token)
        self._write = _plain(tokenizer.eos_token) if text is None else _jinja(text, names)
        self._eos = tokenizer.eos_token

    def __call__(self, document: Document) -> Document | Bad:
        """The document with its text as the template writes it and ``spans`` of weight codes."""
        assert document.messages is not None
        for turn in document.messages:
            if found := next((s for s in self.specials if s in turn["content"]), None):
                what = f"{found!r} in the turn of {turn['role']}"
                return Bad("special token in a turn", document.path, document.line, what)
        try:
            text, spans = self._render(document.messages)
        except _Unstable as error:
            return Bad("template rewrites turns", document.path, document.line, str(error))
        except Exception as error:  # a template can raise what it likes
            reason = " ".join(str(error).split())[:200]
            return Bad("refused by the template", document.path, document.line, reason)
        if not any(code for _, code in spans):
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in document.messages))
            return Bad("nothing to train on", document.path, document.line, f"roles: {roles}")
        return document._replace(text=text, spans=tuple(spans))

    def code(self, role: str) -> int:
        """Index in ``table`` of the weight of a turn."""
        weights = {ANSWERS: 1.0} if self.cfg.train_on == "response" else self.cfg.role_weights
        return self.table.index(float(weights.get(role, 0.0)))

    def _render(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The text, and (end, code) of its stretches of one weight.

        The opening of an answer belongs to what is before it; blanks after the token that ends a
        turn are not trained on, since generation stops there.
        """
        whole = self._write(messages, False)
        if self.cfg.train_on == "all":
            return self._ended(whole, [(len(whole), 1)])
        spans: list[tuple[int, int]] = []
        done = 0
        for i, turn in enumerate(messages):
            code = self.code(turn["role"])
            if not code:
                continue
            begin = self._prefix(whole, messages[:i], turn["role"] == ANSWERS)
            end = self._prefix(whole, messages[: i + 1], False)
            if begin > done:
                spans.append((begin, 0))
            spans += self._closed(whole, begin, end, code)
            done = end
        if done < len(whole):
            spans.append((len(whole), 0))
        return self._ended(whole, spans)

    def _prefix(self, whole: str, messages: Messages, opened: bool) -> int:
        """Characters of ``whole`` that these messages, the first of it, take."""
        if not messages and not opened:
            return 0
        text = self._write(messages, opened)
        if not whole.startswith(text):
            raise _Unstable(f"the first {len(messages)} differ when others follow")
        return len(text)

    def _closed(self, whole: str, begin: int, end: int, code: int) -> list[tuple[int, int]]:
        """A trained stretch, without the blanks after its last special token."""
        kept = whole[begin:end].rstrip()
        if len(kept) < end - begin and kept.endswith(self.specials):
            return [(begin + len(kept), code), (end, 0)]
        return [(end, code)]

    def _ended(self, whole: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """With eos where the template ends in no special token, trained as the last turn is."""
        if whole.rstrip().endswith(self.specials):
            return whole, spans
        return whole + self._eos, [*spans, (len(whole) + len(self._eos), spans[-1][1])]


class _Unstable(Exception):
    """A template writes earlier turns differently when later ones follow."""
