"""Check that each reply of the training data ends with a token that stops generation: else a model would not learn to
end its turn."""

from typing import Any

from transformers import GenerationConfig, ProcessorMixin

from chat.encoding import learned_tokens
from chat.messages import messages_for
from models.loading import load_config


MAX_SHOWN = 80  # characters of a reply in a message


def missing_turn_end(model: str, processor: ProcessorMixin, record: dict[str, Any]) -> str | None:
    """None if each reply of `record` has an end of turn, else a line that says what is wrong and shows a reply."""
    stops = stop_token_ids(model, processor)
    replies = learned_tokens(processor, messages_for(processor, record["conversations"]))
    if replies and all(stops.intersection(reply) for reply in replies):
        return None
    lacking = next((reply for reply in replies if not stops.intersection(reply)), [])
    shown = its_end(processor.tokenizer.decode(lacking))
    names = ", ".join(map(str, processor.tokenizer.convert_ids_to_tokens(sorted(stops)))) or "none"
    return (
        f"--model {model}: its chat template writes no end of turn into the replies (generation stops at {names}), so "
        f"the model would not learn to stop; of record {record['id']} it would learn {shown!r}"
    )


def stop_token_ids(model: str, processor: ProcessorMixin) -> set[int]:
    """The tokens that stop generation: those of generation_config.json, else of config.json, else <eos>."""
    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:  # there is none
        config = GenerationConfig.from_model_config(load_config(model))
    stops = config.eos_token_id if config.eos_token_id is not None else processor.tokenizer.eos_token_id
    return {stops} if isinstance(stops, int) else set(stops or [])


def its_end(text: str) -> str:
    """A text's last characters."""
    return text if len(text) <= MAX_SHOWN else "... " + text[-MAX_SHOWN:]
