"""Turns and labels of every family of language models, with templates of ours and of the tokenizers."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from chat import render
from chat.expansion import rendered
from chat.messages import messages_for
from layers.chunked_loss import IGNORE_INDEX
from mgm.chat_templates import VICUNA_SYSTEM, chat_template_for
from mgm.processing_mgm import MGMProcessor


CONVERSATION = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "How old?"},
    {"from": "gpt", "value": "Two years, I think."},
]
IMAGE = "<image>" * 4
PROMPT = [{"from": "human", "value": "What is it?"}]

# What each family reads; "[...]" around what carries labels.
VICUNA = (
    f"<s>{VICUNA_SYSTEM} USER: {IMAGE}\nWhat is it? ASSISTANT:[ A cat.</s>]"
    "USER: How old? ASSISTANT:[ Two years, I think.</s>]"
)
MISTRAL = f"<s>[INST] {IMAGE}\nWhat is it? [/INST][ A cat.</s>][INST] How old? [/INST][ Two years, I think.</s>]"
LLAMA_3 = (
    f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{IMAGE}\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[A cat.<|eot_id|>]"
    "<|start_header_id|>user<|end_header_id|>\n\nHow old?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[Two years, I think.<|eot_id|>]"
)
CHATML = (
    f"<|im_start|>user\n{IMAGE}\nWhat is it?<|im_end|>\n<|im_start|>assistant\n[A cat.<|im_end|>]\n"
    "<|im_start|>user\nHow old?<|im_end|>\n<|im_start|>assistant\n[Two years, I think.<|im_end|>]\n"
)
GEMMA = (
    f"<bos><start_of_turn>user\n{IMAGE}\nWhat is it?<end_of_turn>\n<start_of_turn>model\n[A cat.<end_of_turn>\n<eos>]"
    "<start_of_turn>user\nHow old?<end_of_turn>\n<start_of_turn>model\n[Two years, I think.<end_of_turn>\n<eos>]"
)
SPECIAL_TOKENS = {
    "vicuna": ["<s>", "</s>", "<unk>"],
    "mistral": ["<s>", "</s>", "<unk>", "[INST]", "[/INST]"],
    "llama_3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "chatml": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
}
EXPECTED = {"vicuna": VICUNA, "mistral": MISTRAL, "llama_3": LLAMA_3, "chatml": CHATML, "gemma": GEMMA}
# Written as tokenizers have them: for strings alone, without marks for the replies.
OWN_TEMPLATES = {
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + eos_token }}"
        "{% endfor %}"
    ),
    "llama_3": (
        "{% for m in messages %}{{ bos_token if loop.first }}"
        r"{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "chatml": (
        r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


def make_tokenizer(family: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A small tokenizer of the family's kind: SentencePiece's spaces for Vicuna, Mistral, Gemma; bytes for others."""
    special_tokens = SPECIAL_TOKENS[family]
    if family in ("vicuna", "mistral", "gemma"):
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = []
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [turn["value"] for turn in CONVERSATION] + [
        VICUNA_SYSTEM,
        "USER: ASSISTANT: user\nassistant\nmodel [I/NST]",
    ]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special_tokens, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special_tokens[0], eos_token=special_tokens[1], chat_template=chat_template
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, **kwargs) -> MGMProcessor:
    """An image takes 2 x 2 positions."""
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return MGMProcessor(image_processor, tokenizer, image_size=28, **kwargs)


def marked(processor: MGMProcessor, input_ids: list[int], labels: list[int]) -> str:
    """The text of a row, with brackets around each run of labels."""
    runs = []
    for token_id, label in zip(input_ids, labels, strict=True):
        assert label in (IGNORE_INDEX, token_id)
        is_target = label != IGNORE_INDEX
        if not runs or runs[-1][0] != is_target:
            runs.append((is_target, []))
        runs[-1][1].append(token_id)
    texts = [(is_target, processor.tokenizer.decode(ids, skip_special_tokens=False)) for is_target, ids in runs]
    return "".join(f"[{text}]" if is_target else text for is_target, text in texts)


@pytest.mark.parametrize("family", EXPECTED)
def test_turns_and_labels_of_each_family(family):
    """A tokenizer without a template: the family is told by its tokens, replies and ends of turn carry labels."""
    processor = make_processor(make_tokenizer(family))
    assert marked(processor, *processor.tokenize(CONVERSATION)) == EXPECTED[family]


@pytest.mark.parametrize("family", OWN_TEMPLATES)
def test_turns_and_labels_of_a_tokenizers_own_template(family):
    """A template that marks no reply gives the same row and labels as ours."""
    processor = make_processor(make_tokenizer(family, OWN_TEMPLATES[family]))
    assert OWN_TEMPLATES[family] in processor.chat_template
    assert marked(processor, *processor.tokenize(CONVERSATION)) == EXPECTED[family]


@pytest.mark.parametrize("family", EXPECTED)
def test_generation_prompt_is_how_a_reply_is_begun(family):
    """The prompt for a reply with the row of the whole conversation up to its first label."""
    for own_template in filter(None, [None, OWN_TEMPLATES.get(family)]):
        processor = make_processor(make_tokenizer(family, own_template))
        prompt, labels = processor.tokenize(CONVERSATION[:1], add_generation_prompt=True)
        row, row_labels = processor.tokenize(CONVERSATION)
        first = next(i for i, label in enumerate(row_labels) if label != IGNORE_INDEX)
        assert prompt == row[:first]
        assert set(labels) == {IGNORE_INDEX}


def test_gemma_keeps_the_template_that_mgm_trained():
    """Gemma's tokenizer has a template too; MGM's puts <eos> after every reply."""
    tokenizer = make_tokenizer("gemma", chat_template="{{ 'not this one' }}")
    assert chat_template_for(tokenizer) == chat_template_for(make_tokenizer("gemma"))


def test_mistral_without_its_tokens_is_told_by_its_config():
    """The first Mistral's vocabulary is like Llama's: the model type decides between [INST] and Vicuna's turns."""
    tokenizer = make_tokenizer("vicuna")
    assert "[INST]" in chat_template_for(tokenizer, "mistral")
    assert "ASSISTANT" in chat_template_for(tokenizer, "llama")


def test_a_template_that_marks_replies_is_believed():
    """What stands inside {% generation %} carries labels, nothing else."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}:{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %};{% endif %}{% endfor %}"
    )
    processor = make_processor(make_tokenizer("chatml", template))
    expected = f"{IMAGE}\nWhat is it?:[A cat.];How old?:[Two years, I think.];"
    assert marked(processor, *processor.tokenize(CONVERSATION)) == expected


def test_a_template_that_rewrites_earlier_turns_is_refused():
    """Replies that vanish once the conversation goes on cannot be labelled; the remedy is named."""
    template = "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }};{% endif %}{% endfor %}"
    processor = make_processor(make_tokenizer("chatml", template))
    with pytest.raises(ValueError, match="mark them in it with {% generation %}"):
        processor.tokenize(CONVERSATION)


@pytest.mark.parametrize("family", ["vicuna", "gemma"])
def test_a_family_without_system_messages_says_so(family):
    processor = make_processor(make_tokenizer(family))
    with pytest.raises(Exception, match="knows no system messages"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}], tokenize=False)


def test_parts_of_a_message_reach_a_template_for_strings():
    """transformers' list of parts with LLaVA's turns: images go first, a line each."""
    processor = make_processor(make_tokenizer("chatml", OWN_TEMPLATES["chatml"]))
    parts = [{"type": "text", "text": "Which is older?"}, {"type": "image"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert text == "<|im_start|>user\n<image>\n<image>\nWhich is older?<|im_end|>\n"


def test_a_tokenizer_without_padding_gets_some():
    """Llama's has no pad token: a batch can be padded all the same, and its mask leaves the padding out."""
    processor = make_processor(make_tokenizer("llama_3"))
    conversations = [PROMPT, PROMPT + CONVERSATION[1:2]]
    batch = processor(conversations=conversations, images=[[], []])
    lengths = [len(processor.tokenize(conversation)[0]) for conversation in conversations]
    assert lengths[0] < lengths[1]
    assert batch["attention_mask"].sum(1).tolist() == lengths


def test_the_template_survives_saving(tmp_path):
    """A saved and loaded processor renders as it did."""
    processor = make_processor(make_tokenizer("llama_3", OWN_TEMPLATES["llama_3"]))
    processor.save_pretrained(tmp_path)
    loaded = MGMProcessor.from_pretrained(tmp_path)
    assert loaded.tokenize(CONVERSATION) == processor.tokenize(CONVERSATION)


NUMBERED = (  # a turn depends on how many came before it
    "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ messages | length + 1 }} assistant: {% endif %}"
)


def long_conversation(num_replies: int) -> list[dict[str, str]]:
    turns = [
        ({"from": "human", "value": f" What is {i}?\n"}, {"from": "gpt", "value": f" {i}. "})
        for i in range(num_replies)
    ]
    return [turn for pair in turns for turn in pair] + [{"from": "human", "value": "Thanks."}]


@pytest.mark.parametrize("template", [*OWN_TEMPLATES.values(), NUMBERED], ids=[*OWN_TEMPLATES, "numbered"])
def test_many_replies_are_told_apart_as_few_are(template, monkeypatch):
    """The quick way for long conversations gives the spans of the plain one, or leaves the template to it."""
    processor = make_processor(make_tokenizer("chatml", template))
    conversation = long_conversation(12)
    messages = [messages_for(processor, conversation)]
    spans = rendered(processor, messages)
    monkeypatch.setattr(render, "MANY_REPLIES", 1000)
    assert spans == rendered(processor, messages)
    assert len(spans[1][0]) == 12


def test_many_replies_are_rendered_in_linear_time(monkeypatch):
    """At most nine messages are rendered for each reply of a conversation, however long it is."""
    processor = make_processor(make_tokenizer("chatml", OWN_TEMPLATES["chatml"]))
    num_rendered, render_template = 0, render.render_jinja_template

    def counted(conversations, **kwargs):
        nonlocal num_rendered
        num_rendered += sum(map(len, conversations))
        return render_template(conversations, **kwargs)

    monkeypatch.setattr(render, "render_jinja_template", counted)
    (_, (spans,)) = rendered(processor, [messages_for(processor, long_conversation(500))])
    assert len(spans) == 500 and num_rendered <= 9 * 500 + 1


@pytest.mark.parametrize("family", ["gemma", "llama_3", "chatml"])
def test_a_leading_newline_that_merges_with_the_headers(family):
    """That token is the prompt's, as in the original, which masks as many tokens as the header alone has."""
    tokenizer = make_tokenizer(family)
    tokenizer.add_tokens(["\n\n", "\n\n\n"])
    processor = make_processor(tokenizer)
    conversation = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "\nA cat."}]
    row, labels = processor.tokenize(conversation)
    header = len(processor.tokenize(conversation[:1], add_generation_prompt=True)[0])
    assert tokenizer.decode(row[header - 1]) in ("\n\n", "\n\n\n")
    assert set(labels[:header]) == {IGNORE_INDEX} and labels[header:-1] == row[header:-1]
    assert IGNORE_INDEX not in labels[header:-1]
