"""Render conversations by a chat template, and find the replies in the text, which are learned."""

import re
from collections.abc import Callable
from functools import lru_cache

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template


Messages = list[dict]  # transformers' form: {"role": ..., "content": a string or a list of image and text parts}
Span = tuple[int, int]  # [begin, end) characters of a rendered conversation
RenderPlain = Callable[[list[Messages], bool], list[str]]  # conversations, and whether to ask for a reply

TEMPLATE_ERRORS = (ValueError, TypeError, TemplateError)  # of rendering a conversation
MANY_REPLIES = 8  # rendering a conversation up to each of its replies takes quadratic time


def render(
    conversations: list[Messages],
    chat_template: str,
    special_tokens: dict[str, str],
    add_generation_prompt: bool = False,
) -> tuple[list[str], list[list[Span]]]:
    """The text of each conversation, and the spans of its replies, with their end of turn.

    Raises:
        ValueError: the template does not mark replies, and rewrites earlier turns when a later one is added.
    """

    def render_plain(conversations: list[Messages], add_generation_prompt: bool) -> list[str]:
        return render_jinja_template(
            conversations, chat_template=chat_template, add_generation_prompt=add_generation_prompt, **special_tokens
        )[0]

    if "endgeneration" not in chat_template:
        texts = render_plain(conversations, add_generation_prompt)
        return texts, [_reply_spans(*pair, render_plain) for pair in zip(conversations, texts, strict=True)]
    return render_jinja_template(
        conversations,
        chat_template=chat_template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **special_tokens,
    )


def _reply_spans(messages: Messages, text: str, render_plain: RenderPlain) -> list[Span]:
    """The text that each reply adds to its prompt. Whitespace after the end of turn belongs to the next turn."""
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(replies) >= MANY_REPLIES and (spans := _spans_turn_by_turn(messages, text, render_plain)):
        return spans
    prompts = render_plain([messages[:i] for i in replies], True)
    throughs = render_plain([messages[: i + 1] for i in replies], False)
    spans = []
    for prompt, through in zip(prompts, map(str.rstrip, throughs), strict=True):
        if not (through.startswith(prompt) and text.startswith(through)):
            raise ValueError(
                "the chat template rewrites earlier turns, so replies cannot be told apart: "
                "mark them in it with {% generation %}"
            )
        spans.append((len(prompt), len(through)))
    return spans


def _spans_turn_by_turn(messages: Messages, text: str, render_plain: RenderPlain) -> list[Span] | None:
    """The same in linear time: each question and reply is rendered after the first question and reply only.

    None if the pieces do not add up to `text`, because a turn depends on more of the conversation.
    """
    first = messages[:2]
    starts = range(0, len(messages) - 1, 2)  # of a question and its reply
    before = [first if i else [] for i in starts]
    prompts = render_plain([head + messages[i : i + 1] for head, i in zip(before, starts, strict=True)], True)
    throughs = render_plain([head + messages[i : i + 2] for head, i in zip(before, starts, strict=True)], False)
    spans, pieces, position, known = [], [], 0, ""
    for prompt, through in zip(prompts, throughs, strict=True):
        end = through.rstrip()
        if not (prompt.startswith(known) and end.startswith(prompt)):
            return None
        shift = position - len(known)
        spans.append((shift + len(prompt), shift + len(end)))
        pieces.append(through[len(known) :])
        position += len(pieces[-1])
        known = throughs[0]
    return spans if text.startswith("".join(pieces).rstrip()) else None


@lru_cache
def takes_parts(chat_template: str) -> bool:
    """Whether the template takes a message's content as a list of parts. Those of language models take strings."""
    texts = {"user": "question?", "assistant": "answer!"}
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
    try:
        (rendered,), _ = render_jinja_template([messages], chat_template=chat_template, bos_token="", eos_token="")
    except TEMPLATE_ERRORS:
        return False
    return all(text in rendered for text in texts.values()) and not re.search("""['"]type['"]""", rendered)


def as_strings(messages: Messages, image_token: str | None) -> Messages:
    """The messages with strings for content, an image's token where it stands."""

    def text(part: dict[str, str]) -> str:
        return part["text"] if part["type"] == "text" else image_token or ""

    return [message | {"content": "".join(map(text, message["content"]))} for message in messages]
