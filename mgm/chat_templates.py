"""How each family of language models that MGM is built on marks its turns.

A tokenizer's own chat template is used if it has one. Gemma is the exception: MGM was trained with an <eos> after
every reply. The contents of {% generation %} carry labels.
"""

from transformers import GenerationConfig, PreTrainedTokenizerBase


# Templates of text models take strings only: images go to the front of their message, one per line.
FLATTEN = (
    "{% set flat = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% set content = namespace(images='', text='') %}"
    "{% if message['content'] is string %}{% set content.text = message['content'] %}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set content.images = content.images + '<image>\n' %}"
    "{% else %}{% set content.text = content.text + part['text'] %}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% set turn = {'role': message['role'], 'content': content.images + content.text} %}"
    "{% set flat.messages = flat.messages + [turn] %}"
    "{% endfor %}"
    "{% set messages = flat.messages %}"
)


def _turns(
    start: str, user: str, reply_header: str, reply: str, after_reply: str = "''", system: str | None = None
) -> str:
    """A template from the jinja expressions of its parts; `content` is the message's text."""
    system_turn = system or "raise_exception('this model knows no system messages')"
    return (
        f"{{{{ {start} }}}}"
        "{% for message in messages %}"
        "{% set content = message['content'] %}"
        "{% if message['role'] == 'assistant' %}"
        f"{{{{ {reply_header} }}}}{{% generation %}}{{{{ {reply} }}}}{{% endgeneration %}}"
        f"{{{{ {after_reply} }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {user} }}}}"
        f"{{% else %}}{{{{ {system_turn} }}}}{{% endif %}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {reply_header} }}}}{{% endif %}}"
    )


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
GEMMA = _turns(
    start="bos_token",
    user=r"'<start_of_turn>user\n' + content + '<end_of_turn>\n'",
    reply_header=r"'<start_of_turn>model\n'",
    reply=r"content + '<end_of_turn>\n' + eos_token",
)
VICUNA_V1 = _turns(
    start=f'bos_token + "{VICUNA_SYSTEM} "',
    user="'USER: ' + content + ' '",
    reply_header="'ASSISTANT:'",
    reply="' ' + content + eos_token",
)
LLAMA_3 = _turns(
    start="bos_token",
    user=r"'<|start_header_id|>user<|end_header_id|>\n\n' + content + '<|eot_id|>'",
    reply_header=r"'<|start_header_id|>assistant<|end_header_id|>\n\n'",
    reply="content + '<|eot_id|>'",
    system=r"'<|start_header_id|>system<|end_header_id|>\n\n' + content + '<|eot_id|>'",
)
CHATML = _turns(
    start="''",
    user=r"'<|im_start|>user\n' + content + '<|im_end|>\n'",
    reply_header=r"'<|im_start|>assistant\n'",
    reply="content + '<|im_end|>'",
    after_reply=r"'\n'",
    system=r"'<|im_start|>system\n' + content + '<|im_end|>\n'",
)
MISTRAL = _turns(
    start="bos_token",
    user="'[INST] ' + content + ' [/INST]'",
    reply_header="''",
    reply="' ' + content + eos_token",
)
# The token in its vocabulary by which a family is recognized.
BY_TOKEN = {"<|start_header_id|>": LLAMA_3, "<|im_start|>": CHATML, "[INST]": MISTRAL}
END_OF_TURN_TOKENS = ("<end_of_turn>", "<|eot_id|>", "<|im_end|>")


def chat_template_for(tokenizer: PreTrainedTokenizerBase, model_type: str | None = None) -> str:
    """The template for a language model: MGM's own for Gemma, else the tokenizer's, else its family's.

    Args:
        model_type: of the text config. Mistral's vocabulary may lack [INST], and then looks like Vicuna's.
    """
    vocabulary = tokenizer.get_vocab()
    if "<start_of_turn>" in vocabulary:
        return FLATTEN + GEMMA
    if tokenizer.chat_template is not None:
        return FLATTEN + tokenizer.get_chat_template()
    if model_type == "mistral":
        return FLATTEN + MISTRAL
    return FLATTEN + next((template for token, template in BY_TOKEN.items() if token in vocabulary), VICUNA_V1)


def build_generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Generation stops at <eos> and at the tokenizer's end of turn, such as <end_of_turn>."""
    vocabulary = tokenizer.get_vocab()
    end_of_turn = [vocabulary[token] for token in END_OF_TURN_TOKENS if token in vocabulary]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys([tokenizer.eos_token_id, *end_of_turn])),
        pad_token_id=tokenizer.pad_token_id,
    )
