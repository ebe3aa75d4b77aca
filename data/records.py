"""Check a record of conversations, LLaVA turns or transformers' messages. Each problem is named in one line."""

import os
from reprlib import repr as brief
from typing import Any

from chat.messages import IMAGE_TOKEN, to_messages
from utils import UserError


class Malformed(str):
    """In place of a record that could not be parsed: what is wrong, and where."""


IMAGE_COLUMNS, TURN_COLUMNS = ("images", "image"), ("conversations", "messages")
VIDEO_TOKEN = "<video>"
EMBEDDED = object()  # in place of a file name: the image is inside the source


def check_record(record: Any, index: int, path: str) -> dict[str, Any]:
    """One LLaVA record in the form of `FEATURES`. Raises UserError naming the record and what is wrong with it."""
    where = f"data set {path}, record {index}"
    if isinstance(record, Malformed):
        raise UserError(record)
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with 'conversations', found {type(record).__name__}")
    record_id = index if record.get("id") is None else record["id"]
    if isinstance(record_id, bool) or not (isinstance(record_id, int) or _is_text(record_id)):
        raise UserError(f"{where}: 'id' must be a string or a whole number, found {brief(record_id)}")
    where += f" (id {record_id})"

    images = _check_names(record, where)
    is_messages = record.get("conversations") is None and "messages" in record
    turns = to_turns(record["messages"], where) if is_messages else record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'conversations' must be a list of turns, found {brief(turns)}")
    for turn in turns:
        if not isinstance(turn, dict) or not all(_is_text(turn.get(key)) for key in ("from", "value")):
            raise UserError(f"{where}: every turn needs the strings 'from' and 'value', found {brief(turn)}")
    if is_video(record, turns):
        raise UserError(f"{where}: it asks about a video, and MGM sees images alone; leave the record out")
    try:
        messages = to_messages(turns)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[:2] != ["user", "assistant"]:
        raise UserError(f"{where}: expected a turn from human and a reply from gpt")
    num_placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_placeholders != len(images):
        raise UserError(f"{where}: {num_placeholders} {IMAGE_TOKEN} placeholders but {len(images)} images")
    conversations = [{"from": turn["from"], "value": turn["value"]} for turn in turns]
    names = [None if name is EMBEDDED else name for name in images]
    return {"id": str(record_id), "images": names, "conversations": conversations}


def is_video(record: dict[str, Any], turns: list[dict[str, str]]) -> bool:
    """Whether there is a video, or `<video>` where LLaVA puts it. Elsewhere `<video>` is text, such as an HTML tag."""
    values = [turn["value"].strip() for turn in turns]
    is_asked_for = any(value.startswith(VIDEO_TOKEN) or value.endswith("\n" + VIDEO_TOKEN) for value in values)
    return is_asked_for or bool(record.get("video") or record.get("videos"))


def _check_names(record: dict[str, Any], where: str) -> list[Any]:
    """The record's image names, EMBEDDED for those inside the data set."""
    key = "images" if record.get("image") is None and "images" in record else "image"
    images = [] if record.get(key) is None else record[key]
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(name is EMBEDDED or _is_text(name) and name for name in images):
        raise UserError(f"{where}: '{key}' must be a file name or a list of them, found {brief(images)}")
    for name in images:
        if name is not EMBEDDED:
            _check_inside(name, where)
    return images


def to_turns(messages: Any, where: str) -> list[dict[str, Any]]:
    """transformers' messages to LLaVA turns. Raises UserError for what is neither text nor an image."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of messages, found {brief(messages)}")
    turns, num_images = [], 0
    for message in messages:
        if not isinstance(message, dict) or not _is_text(message.get("role")):
            raise UserError(f"{where}: every message needs 'role' and 'content', found {brief(message)}")
        parts = message.get("content")
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        if not isinstance(parts, list):
            raise UserError(f"{where}: 'content' must be a string or a list of parts, found {brief(parts)}")
        values = []
        for part in parts:
            values.append(_part_value(part, num_images, where))
            num_images += isinstance(part, dict) and part.get("type") == "image"
        turns.append({"from": message["role"], "value": "".join(values)})
    return turns


def _part_value(part: Any, num_images: int, where: str) -> str:
    """A part's text, or an image's placeholder. `num_images`: how many came before."""
    if isinstance(part, dict) and part.get("type") == "text" and _is_text(part.get("text")):
        return part["text"]
    if isinstance(part, dict) and part.get("type") == "image":
        if part.get("index") not in (None, num_images):
            raise UserError(f"{where}: image {part['index']} is asked for out of turn; put the images in order")
        return IMAGE_TOKEN + "\n"
    raise UserError(f"{where}: a part of 'content' must be of type text, with a 'text', or image, found {brief(part)}")


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can encode. JSON may escape half a surrogate pair, which Arrow refuses."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _check_inside(name: str, where: str) -> None:
    """A data set may not read files outside its image folder. Links are checked when the file is opened."""
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == ".." or "\0" in name:
        raise UserError(f"{where}: image {name} leaves the image folder; use paths inside it")
