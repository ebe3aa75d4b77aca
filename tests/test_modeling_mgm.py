"""The model against the original's own numbers, and against itself where one answer can be had in two ways."""

import pytest
import torch
from conftest import aux_feature_map
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from layers.chunked_loss import IGNORE_INDEX
from mgm.configuration_mgm import mgm_2b
from mgm.modeling_mgm import MGMForConditionalGeneration
from models.loading import load_model
from utils import UserError


ORIGINAL_IMAGE_TOKEN = -200  # one id an image in the original's input_ids; ours has one a position
INTERMEDIATES = {
    "rtol": 1e-5,
    "atol": 1e-5,
}  # the language model's hidden states reach 400: absolute would be rounding
LOGITS = {"rtol": 0, "atol": 2e-5}


def to_our_inputs(reference: dict[str, torch.Tensor], case: str, image_token_id: int) -> dict[str, torch.Tensor]:
    """The original's collated case with every image token expanded to 16 positions, and its images."""
    ids, mask, labels = (reference[f"{case}.{name}"] for name in ("input_ids", "attention_mask", "labels"))
    length = reference[f"{case}.logits"].shape[1]
    ours = {
        "input_ids": torch.zeros(len(ids), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(ids), length, dtype=torch.long),
        "labels": torch.full((len(ids), length), IGNORE_INDEX),
    }
    for row in range(len(ids)):
        row_ids, row_labels = [], []
        for token_id, label in zip(ids[row][mask[row]].tolist(), labels[row][mask[row]].tolist(), strict=True):
            is_image = token_id == ORIGINAL_IMAGE_TOKEN
            row_ids += [image_token_id] * 16 if is_image else [token_id]
            row_labels += [IGNORE_INDEX] * 16 if is_image else [label]
        ours["input_ids"][row, : len(row_ids)] = torch.tensor(row_ids)
        ours["attention_mask"][row, : len(row_ids)] = 1
        ours["labels"][row, : len(row_ids)] = torch.tensor(row_labels)
    has_image = (ids == ORIGINAL_IMAGE_TOKEN).any(1)  # the original gives a text-only row a black image
    ours["pixel_values"] = reference[f"{case}.images"][has_image]
    ours["pixel_values_aux"] = reference[f"{case}.images_aux"][has_image]
    return ours


@pytest.fixture
def inputs(reference, reference_model) -> dict[str, torch.Tensor]:
    """Our form of the case `e2e`: two rows with an image, one without."""
    return to_our_inputs(reference, "e2e", reference_model.config.image_token_id)


def without_images(inputs: dict[str, torch.Tensor], row: int = 2) -> dict[str, torch.Tensor]:
    """The text-only row of the case `e2e`."""
    return {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_intermediates_are_the_originals(reference, reference_model_folder, attn_implementation):
    """Towers, mining and projector, stage by stage, with what hooks recorded in the original."""
    whole_model = load_model(str(reference_model_folder), torch.float32, attn_implementation)
    model = whole_model.model
    images, images_aux = reference["main.images"], reference["main.images_aux"]
    clip, stages = model.clip_features(images), model.convnext_stages(images_aux)
    mining = model.patch_info_mining
    mined = mining(clip, stages)
    found = {
        "clip_features": clip,
        "aux_stem": model.vision_tower_aux.embeddings(images_aux),
        "aux_features": aux_feature_map(whole_model, images_aux),
        "uni_query": mining.query_proj(clip),
        "resampler_output": mined - clip,
        "projector_input": mined,
        "projector_output": model.multi_modal_projector(mined),
        "encode_images": model.get_image_features(images, images_aux),
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, reference[f"main.{name}"], **INTERMEDIATES, msg=lambda m, n=name: n + m)


@torch.no_grad()
def test_aux_stages_are_the_originals(reference, reference_model):
    """Every ConvNeXt stage before it is brought to the first one's size."""
    tower = reference_model.model.vision_tower_aux
    features = tower.embeddings(reference["main.images_aux"])
    for i, stage in enumerate(tower.encoder.stages):
        features = stage(features)
        expected = reference[f"main.aux_stage_{i}"] if i else reference["main.aux_features"][:, : features.shape[1]]
        torch.testing.assert_close(features, expected, **INTERMEDIATES)


@pytest.mark.parametrize("case", ["main", "e2e"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_outputs_are_the_originals(reference, reference_model_folder, attn_implementation, case):
    """Hidden states, logits and loss with the original's, where the attention mask is 1."""
    model = load_model(str(reference_model_folder), torch.float32, attn_implementation)
    inputs = to_our_inputs(reference, case, model.config.image_token_id)
    output = model(**inputs, output_hidden_states=True)
    mask = inputs["attention_mask"].bool()
    assert mask.any(1).all()
    if case == "main":  # the original's hidden states were recorded for this case only
        assert torch.equal(mask, reference["main.mm_attention_mask"])
        assert torch.equal(inputs["labels"], reference["main.mm_labels"])
        assert len(output.hidden_states) == 3
        for i, hidden_states in enumerate(output.hidden_states):
            # These reach 400, where fp32 itself is only good to 3e-5: 1e-5 of a position's largest value, then.
            expected = reference[f"main.llm_hidden_{i}"][mask]
            scale = expected.abs().amax(-1, keepdim=True)
            torch.testing.assert_close(hidden_states[mask] / scale, expected / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.logits[mask], reference[f"{case}.logits"][mask], **LOGITS)
    assert output.loss.item() == pytest.approx(reference[f"{case}.loss"].item(), abs=1e-5)


def assert_logits_differ(model: MGMForConditionalGeneration, reference: dict[str, torch.Tensor]) -> None:
    inputs = to_our_inputs(reference, "e2e", model.config.image_token_id)
    mask = inputs["attention_mask"].bool()
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(model(**inputs).logits[mask], reference["e2e.logits"][mask], **LOGITS)


@pytest.mark.parametrize(
    ("part", "name", "wrong"), [("text_config", "rms_norm_eps", 1e-5), ("vision_config", "layer_norm_eps", 1e-6)]
)
@torch.no_grad()
def test_a_wrong_norm_epsilon_is_seen(reference, reference_model_folder, part, name, wrong):
    """The comparison above is sharp enough: one epsilon off by a factor of ten and the logits no longer agree."""
    config = AutoConfig.from_pretrained(reference_model_folder)
    assert getattr(getattr(config, part), name) != wrong
    setattr(getattr(config, part), name, wrong)
    assert_logits_differ(AutoModelForImageTextToText.from_pretrained(reference_model_folder, config=config), reference)


@torch.no_grad()
def test_a_wrong_convnext_epsilon_is_seen(reference, reference_model):
    """The same for ConvNeXt: its config's epsilon reaches every norm; transformers would leave them at 1e-6."""
    config = reference_model.config
    assert (
        {norm.eps for norm in convnext_norms(reference_model)} == {config.vision_config_aux.layer_norm_eps} == {1e-6}
    )
    config.vision_config_aux.layer_norm_eps = 1e-5  # the xxlarge form's
    wrong = MGMForConditionalGeneration(config).eval()
    wrong.load_state_dict(reference_model.state_dict())
    assert {norm.eps for norm in convnext_norms(wrong)} == {1e-5}
    assert_logits_differ(wrong, reference)


def convnext_norms(model: MGMForConditionalGeneration) -> list[torch.nn.LayerNorm]:
    return [module for module in model.model.vision_tower_aux.modules() if isinstance(module, torch.nn.LayerNorm)]


def test_mgm_2b_has_the_released_models_size():
    """Parameters and tensors of the preset, in all and by part, with those of the released model."""
    with torch.device("meta"):
        model = MGMForConditionalGeneration(mgm_2b())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == 3_019_166_144
    assert len(sizes) == 911
    parts = {
        "language_model": 2_506_172_416,
        "vision_tower": 303_507_456,
        "vision_tower_aux": 196_227_264,
        "multi_modal_projector": 6_295_552,
        "patch_info_mining": 6_963_456,
    }
    for part, size in parts.items():
        assert sum(n for name, n in sizes.items() if name.startswith(f"model.{part}.")) == size, part
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("give_positions", [False, True])
def test_count_mismatch_names_both_counts(reference_model, inputs, give_positions):
    """One image too few, and none: an error that names how many positions and how many features there are."""
    inputs.pop("labels")
    if give_positions:
        is_image = inputs["input_ids"] == reference_model.config.image_token_id
        inputs["image_positions"] = is_image.flatten().nonzero().squeeze(1)
    views = {name: inputs.pop(name)[:1] for name in ("pixel_values", "pixel_values_aux")}
    with pytest.raises(ValueError, match=r"32 image positions in input_ids but 16 image features \(1 images of 16\)"):
        reference_model(**inputs, **views)
    with pytest.raises(ValueError, match=r"32 image positions in input_ids but no pixel_values \(0 features\)"):
        reference_model(**inputs)


def test_more_images_than_positions_is_an_error(reference_model, inputs):
    """A text-only row with an image: nothing is dropped silently."""
    row = without_images(inputs)
    views = {name: inputs[name][:1] for name in ("pixel_values", "pixel_values_aux")}
    with pytest.raises(ValueError, match="0 image positions in input_ids but 16 image features"):
        reference_model(**row, **views)


def test_both_views_of_every_image_are_needed(reference_model, inputs):
    """pixel_values without pixel_values_aux, and one view too few, name both counts."""
    aux = inputs.pop("pixel_values_aux")
    with pytest.raises(ValueError, match="2 images in pixel_values but 0 in pixel_values_aux"):
        reference_model(**inputs)
    with pytest.raises(ValueError, match="2 images in pixel_values but 1 in pixel_values_aux"):
        reference_model(**inputs, pixel_values_aux=aux[:1])


@torch.no_grad()
def test_image_positions_are_what_would_be_looked_up(reference_model, inputs):
    """Logits with image_positions given, bit for bit, with those without."""
    positions = (inputs["input_ids"] == reference_model.config.image_token_id).flatten().nonzero().squeeze(1)
    given = reference_model(**inputs, image_positions=positions)
    assert torch.equal(given.logits, reference_model(**inputs).logits)


def test_training_returns_the_eval_loss_and_no_logits(reference_model, inputs):
    """The loss in training mode with that in eval mode: there is no dropout, and the towers stay in eval mode."""
    expected = reference_model(**inputs)
    reference_model.train()
    output = reference_model(**inputs)
    assert output.logits is None and expected.logits is not None
    assert output.past_key_values is None
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)  # summed in chunks
    assert reference_model.model.language_model.training
    assert not any(module.training for module in reference_model.model.vision_tower.modules())
    assert not any(module.training for module in reference_model.model.vision_tower_aux.modules())
    unlabelled = reference_model(**{name: value for name, value in inputs.items() if name != "labels"})
    assert unlabelled.loss is None and unlabelled.logits is not None


@torch.no_grad()
def test_num_items_in_batch_divides_the_summed_loss(reference_model, inputs):
    """The loss with num_items_in_batch with the mean loss times the label tokens over that number."""
    num_label_tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().item()
    mean = reference_model(**inputs).loss.item()
    for num_items in (num_label_tokens, 1000, torch.tensor(7)):
        loss = reference_model(**inputs, num_items_in_batch=num_items).loss.item()
        assert loss == pytest.approx(mean * num_label_tokens / float(num_items), rel=1e-5)


def test_a_text_only_batch_gives_the_vision_side_zero_gradients(reference_model, inputs):
    """Training on text alone: the loss of eval mode, where no dummy image is run, and gradients of 0, not None."""
    row = without_images(inputs)
    expected = reference_model(**row).loss.item()
    reference_model.train()
    reference_model.model.vision_tower.requires_grad_(False)
    reference_model.model.vision_tower_aux.requires_grad_(False)
    loss = reference_model(**row).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # summed in chunks
    for module in (reference_model.model.multi_modal_projector, reference_model.model.patch_info_mining):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name
    assert reference_model.get_input_embeddings().weight.grad.any()


def test_gradients_reach_trained_towers_only(reference_model, inputs):
    """A frozen tower has no gradients, a trained one has them; the projector has them either way."""
    reference_model.train()
    reference_model.model.vision_tower.requires_grad_(False)
    reference_model(**inputs).loss.backward()
    assert all(parameter.grad is None for parameter in reference_model.model.vision_tower.parameters())
    assert reference_model.model.vision_tower_aux.embeddings.patch_embeddings.weight.grad.any()
    assert all(parameter.grad.any() for parameter in reference_model.model.multi_modal_projector.parameters())


@torch.no_grad()
def test_greedy_generation_is_repeated_argmax(reference_model, inputs):
    """Generation with the KV cache, without it, and the argmax of a fresh forward for every token."""
    reference_model.generation_config.eos_token_id = None
    prompt = {name: inputs[name][:1] for name in ("pixel_values", "pixel_values_aux")}
    input_ids = inputs["input_ids"][:1, :40]
    with_cache = reference_model.generate(input_ids=input_ids, **prompt, max_new_tokens=12, do_sample=False)
    without = reference_model.generate(
        input_ids=input_ids, **prompt, max_new_tokens=12, do_sample=False, use_cache=False
    )
    for _ in range(12):
        next_id = reference_model(input_ids=input_ids, **prompt).logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, next_id], dim=1)
    assert with_cache.shape == (1, 52)
    assert torch.equal(with_cache, input_ids)
    assert torch.equal(without, input_ids)


@torch.no_grad()
def test_left_padded_generation_is_generation_alone(reference_model, inputs):
    """A padded batch of a row with an image and one without, with each row generated alone."""
    reference_model.generation_config.eos_token_id = None
    views = {name: inputs[name][:1] for name in ("pixel_values", "pixel_values_aux")}
    rows = [inputs["input_ids"][0, :39], inputs["input_ids"][2, :20]]
    alone = [
        reference_model.generate(input_ids=row[None], max_new_tokens=8, do_sample=False, **kwargs)[0, len(row) :]
        for row, kwargs in zip(rows, (views, {}), strict=True)
    ]
    padding = torch.zeros(19, dtype=torch.long)
    batch = torch.stack([rows[0], torch.cat([padding, rows[1]])])
    mask = torch.stack([torch.ones(39, dtype=torch.long), torch.cat([padding, torch.ones(20, dtype=torch.long)])])
    together = reference_model.generate(
        input_ids=batch, attention_mask=mask, max_new_tokens=8, do_sample=False, **views
    )[:, 39:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flash_attention_2"])
@torch.no_grad()
def test_attn_implementation_reaches_the_backbone(monkeypatch, inputs, reference_model_folder, attn_implementation):
    """What was asked for with what the parts' configs say, and with the function that every layer calls."""
    # Nothing here runs flash-attn: this is about which implementation is asked for, not about the kernel.
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, *_, **__: name)
    model = load_model(str(reference_model_folder), torch.float32, attn_implementation)
    assert model.model.language_model.config._attn_implementation == attn_implementation
    assert model.model.vision_tower.config._attn_implementation == attn_implementation
    if attn_implementation == "eager":  # no entry of its own in the table of functions
        return
    sdpa, callers = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def spy(module, *args, **kwargs):
        callers.append(module)
        return sdpa(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attn_implementation, spy)
    model(**{name: value[:1] for name, value in inputs.items() if name not in ("labels", "attention_mask")})
    assert [layer.self_attn for layer in model.model.language_model.layers] == callers[-2:]


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed and usable here")
def test_missing_flash_attention_is_a_user_error(reference_model_folder):
    """flash_attention_2 without the package: one line that names it, not a fallback."""
    with pytest.raises(UserError, match="(?i)flash"):
        load_model(str(reference_model_folder), torch.float32, "flash_attention_2")


@torch.no_grad()
def test_save_and_load_again(reference_model, processor, inputs, tmp_path):
    """A model saved and loaded through the Auto classes: its tensors bit for bit, its logits within rounding (where in
    memory tensors lie may change the order of sums), and its processor's ids."""
    reference_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, MGMForConditionalGeneration)
    states = loaded.state_dict(), reference_model.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    torch.testing.assert_close(loaded(**inputs).logits, reference_model(**inputs).logits)
    turns = [{"from": "human", "value": "<image>\nWhat is written on the sign?"}, {"from": "gpt", "value": "STOP"}]
    assert AutoProcessor.from_pretrained(tmp_path).tokenize(turns) == processor.tokenize(turns)
