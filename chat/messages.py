"""LLaVA turns to transformers' messages."""

import re

from transformers import ProcessorMixin

from chat.render import Messages


IMAGE_TOKEN = "<image>"  # where an image stands in a turn, whatever the model's own token is
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
# LLaVA's files put an image on a line of its own. That line's end belongs to the placeholder.
PLACEHOLDER = re.compile(rf"\n{IMAGE_TOKEN}\Z|{IMAGE_TOKEN}\n?")


def to_messages(conversation: list[dict[str, str]], images_first: bool = False) -> Messages:
    """LLaVA turns to transformers' messages, images where they stand. A first turn by the model is dropped.

    Args:
        images_first: move images to the front of their message, and strip its text, as LLaVA and MGM do.

    Raises:
        ValueError: an unknown speaker, two turns in a row by the same speaker, a system turn that is not the first, or
            an image that is not in a human turn.
    """
    messages: Messages = []
    for turn in conversation:
        role, value = ROLES.get(turn["from"]), turn["value"]
        if role is None:
            raise ValueError(f"a turn is from {turn['from']!r}: expected one of {', '.join(ROLES)}")
        if role == "system" and messages:
            raise ValueError(f"a turn from {turn['from']!r} comes after others: it must be the first")
        if role == "assistant" and all(message["role"] == "system" for message in messages):
            continue
        if messages and messages[-1]["role"] == role:
            raise ValueError(f"two turns in a row are from {turn['from']!r}: human and gpt must alternate")
        num_images = value.count(IMAGE_TOKEN)
        if num_images and role != "user":
            where = "a reply" if role == "assistant" else "a turn"
            raise ValueError(f"{where} by {turn['from']!r} contains {IMAGE_TOKEN}: images belong to human turns")
        if images_first:
            text = value.replace(IMAGE_TOKEN, "").strip() if num_images else value
            content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
        else:
            content = parts_in_place(value)
        messages.append({"role": role, "content": content})
    return messages


def messages_for(processor: ProcessorMixin, conversation: list[dict[str, str]]) -> Messages:
    """LLaVA turns to messages as the model's processor wants them.

    Raises:
        ValueError: as to_messages does, and for a system turn where the model knows none.
    """
    messages = to_messages(conversation, images_first=getattr(processor, "images_first", False))
    if messages[0]["role"] == "system" and not getattr(processor, "takes_system", True):
        reason = "a turn is from 'system', which this model does not know"
        raise ValueError(f"{reason}; move its text into the first human turn")
    return messages


def parts_in_place(value: str) -> list[dict[str, str]]:
    """The texts and images of a turn, in order. Empty texts are left out, but not all of a turn."""
    parts: list[dict[str, str]] = []
    for i, text in enumerate(PLACEHOLDER.split(value)):
        parts += [{"type": "image"}] * (i > 0)
        parts += [{"type": "text", "text": text}] * (text != "")
    return parts or [{"type": "text", "text": ""}]
