"""Every kind of batch against naive loops: several images in a row, text beside images, padding, HD crops, generation.

The oracle walks through a row token by token and through an image crop by crop and patch by patch, and hands the
embeddings it puts together to the language model, where no image is involved any more.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import aux_feature_map, norm_and_project
from transformers import AutoConfig

from layers.chunked_loss import IGNORE_INDEX
from mgm.configuration_mgm import MGMConfig
from mgm.modeling_mgm import MGMForConditionalGeneration
from models.loading import load_model


GRIDS = [(1, False), (2, False), (2, True)]  # image_grid, image_global
EXACT = {"rtol": 0, "atol": 2e-5}
NUM_IMAGES = [2, 0, 1]  # of each row of the batch


@pytest.fixture(params=GRIDS, ids=["whole", "crops", "crops+whole"])
def model(request, reference_model_folder) -> MGMForConditionalGeneration:
    """The reference checkpoint, in eval mode, looking at images in one of the three ways."""
    model = load_model(str(reference_model_folder), torch.float32, "sdpa")
    model.config.image_grid, model.config.image_global = request.param
    model.generation_config.eos_token_id = None
    return model


def views(model: MGMForConditionalGeneration, num_images: int) -> dict[str, torch.Tensor]:
    """Random pixels of both views."""
    generator = torch.Generator().manual_seed(0)
    crops = () if model.config.num_crops == 1 else (model.config.num_crops,)
    return {
        "pixel_values": torch.randn(num_images, *crops, 3, 56, 56, generator=generator),
        "pixel_values_aux": torch.randn(num_images, 3, 128, 128, generator=generator),
    }


def rows_of_ids(model: MGMForConditionalGeneration, num_text: int = 9) -> list[torch.Tensor]:
    """A row for each of NUM_IMAGES: images among text tokens, rows of different lengths."""
    generator = torch.Generator().manual_seed(1)
    image = torch.full((model.config.num_image_tokens,), model.config.image_token_id)
    rows = []
    for row, num_images in enumerate(NUM_IMAGES):
        parts = [torch.randint(6, 500, (num_text + row,), generator=generator)]
        for _ in range(num_images):
            parts += [image, torch.randint(6, 500, (3,), generator=generator)]
        rows.append(torch.cat(parts))
    return rows


def pad(rows: list[torch.Tensor], side: str, value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths to one tensor and its mask."""
    length = max(map(len, rows))

    def padded(row: torch.Tensor, fill: int) -> torch.Tensor:
        missing = length - len(row)
        return F.pad(row, (missing, 0) if side == "left" else (0, missing), value=fill)

    return torch.stack([padded(row, value) for row in rows]), torch.stack(
        [padded(torch.ones_like(row), 0) for row in rows]
    )


def naive_image_features(model: MGMForConditionalGeneration, pixels: torch.Tensor, aux: torch.Tensor) -> torch.Tensor:
    """One image's [K * P, D]: the whole image first, then crop by crop, each patch by itself."""
    config, inner = model.config, model.model
    grid, side = config.image_grid, config.patch_grid_size
    features_aux = aux_feature_map(model, aux[None])[0]  # [C_aux, H, W]
    size = features_aux.shape[-1] // grid
    looks = []  # what CLIP sees and the aux features under it
    for i in range(grid):
        for j in range(grid):
            crop = pixels[i * grid + j] if grid > 1 else pixels
            looks.append((crop, features_aux[:, i * size : (i + 1) * size, j * size : (j + 1) * size]))
    if config.image_global:
        small = F.interpolate(features_aux[None], size=(size, size), mode="bilinear", align_corners=False)[0]
        looks.insert(0, (pixels[-1], small))
    tokens = []
    for crop, under in looks:
        clip = inner.clip_features(crop[None])[0]
        step = under.shape[-1] // side
        for patch in range(side**2):
            top, left = patch // side * step, patch % side * step
            square = under[:, top : top + step, left : left + step].flatten(1).T  # [S, C_aux]
            query = inner.patch_info_mining.query_proj(clip[patch])
            key, value = (
                norm_and_project(projection, square)
                for projection in (inner.patch_info_mining.key_proj, inner.patch_info_mining.value_proj)
            )
            mined = clip[patch] + (key @ query / len(query) ** 0.5).softmax(0) @ value
            tokens.append(inner.multi_modal_projector(mined))
    return torch.stack(tokens)


def naive_embeds(
    model: MGMForConditionalGeneration, rows: list[torch.Tensor], images: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Each row's [T, D], token by token: the next feature of the next image, or the token's embedding."""
    features = iter(
        feature
        for pixels, aux in zip(images["pixel_values"], images["pixel_values_aux"], strict=True)
        for feature in naive_image_features(model, pixels, aux)
    )
    embedding = model.get_input_embeddings()
    is_gemma = model.config.text_config.model_type == "gemma"
    scale = embedding.weight.shape[1] ** 0.5 if is_gemma else 1.0  # Gemma scales whatever it embeds
    return [
        torch.stack(
            [
                next(features) * scale if token_id == model.config.image_token_id else embedding(token_id)
                for token_id in row
            ]
        )
        for row in rows
    ]


@torch.no_grad()
def test_image_features_are_the_naive_loops(model):
    """Two images in the order of their tokens, to 1e-5 of the largest feature."""
    images = views(model, 2)
    features = model.model.get_image_features(**images)
    assert features.shape == (2, model.config.num_image_tokens, 64)
    for n in range(2):
        expected = naive_image_features(model, images["pixel_values"][n], images["pixel_values_aux"][n])
        torch.testing.assert_close(features[n], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_mixed_batch_is_its_rows_put_together_by_hand(model, side):
    """Logits of rows with two images, none and one, padded, with those of each row's naive embeddings alone."""
    rows, images = rows_of_ids(model), views(model, sum(NUM_IMAGES))
    input_ids, attention_mask = pad(rows, side)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **images).logits
    for row, embeds in enumerate(naive_embeds(model, rows, images)):
        expected = model(inputs_embeds=embeds[None]).logits[0]
        torch.testing.assert_close(logits[row][attention_mask[row].bool()], expected, **EXACT)


def test_gradients_are_those_of_the_naive_loops(model):
    """Of the summed loss over a mixed batch: mining, projector and language model, each relative to its largest (a
    softmax does not feel a shift of its keys: the gradients of their biases are rounding)."""
    rows, images = rows_of_ids(model), views(model, sum(NUM_IMAGES))
    labels = [torch.where(row == model.config.image_token_id, IGNORE_INDEX, row) for row in rows]
    input_ids, attention_mask = pad(rows, "right")
    model.model.vision_tower.requires_grad_(False)
    model.model.vision_tower_aux.requires_grad_(False)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    model.train()
    batch_labels = pad(labels, "right", value=IGNORE_INDEX)[0]
    loss = model(
        input_ids=input_ids, attention_mask=attention_mask, labels=batch_labels, num_items_in_batch=1, **images
    ).loss
    found = torch.autograd.grad(loss, [p for _, p in trained])

    expected_loss = 0.0
    for embeds, row_labels in zip(naive_embeds(model, rows, images), labels, strict=True):
        hidden = model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
        expected_loss = expected_loss + F.cross_entropy(
            model.lm_head(hidden)[:-1], row_labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
        )
    expected = torch.autograd.grad(expected_loss, [p for _, p in trained])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for part in ("patch_info_mining", "multi_modal_projector", "language_model"):
        indices = [i for i, (name, _) in enumerate(trained) if f"model.{part}." in name]
        largest = max(expected[i].abs().max() for i in indices)
        for i in indices:
            error = (found[i] - expected[i]).abs().max() / largest
            assert error < 2e-5, f"{trained[i][0]}: {error}"


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "use_cache": False},
        {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
    ],
    ids=["greedy", "greedy, no cache", "beams", "two of three beams, no cache", "sampled twice"],
)
@torch.no_grad()
def test_generation_is_that_from_the_naive_embeddings(model, how):
    """A left-padded batch of rows with two images, none and one: the same tokens as from embeddings made by hand."""
    rows, images = rows_of_ids(model), views(model, sum(NUM_IMAGES))
    input_ids, attention_mask = pad(rows, "left")
    torch.manual_seed(0)
    generated = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, **images, max_new_tokens=6, min_new_tokens=6, **how
    )
    length = input_ids.shape[1]
    embeds = torch.stack([F.pad(row, (0, 0, length - len(row), 0)) for row in naive_embeds(model, rows, images)])
    torch.manual_seed(0)
    expected = model.generate(
        inputs_embeds=embeds, attention_mask=attention_mask, max_new_tokens=6, min_new_tokens=6, **how
    )
    assert torch.equal(generated[:, length:], expected)
    assert len(generated) == len(rows) * how.get("num_return_sequences", 1)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
def test_other_language_models(model_type, reference_model):
    """Llama, Qwen2 and Mistral in Gemma's place, heads tied or not: logits and greedy tokens of a mixed batch with
    those from the naive embeddings, which nothing scales."""
    text_config = AutoConfig.for_model(
        model_type,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=model_type == "qwen2",
    )
    torch.manual_seed(0)
    model = MGMForConditionalGeneration(
        MGMConfig(
            text_config=text_config,
            vision_config=reference_model.config.vision_config,
            vision_config_aux=reference_model.config.vision_config_aux,
            image_token_id=300,  # inside the vocabulary, as Qwen2's spare rows are
        )
    ).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (model_type == "qwen2")
    model.generation_config.eos_token_id = None
    rows, images = rows_of_ids(model), views(model, sum(NUM_IMAGES))
    input_ids, attention_mask = pad(rows, "left")
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask, **images).logits
        naive = naive_embeds(model, rows, images)
        for row, embeds in enumerate(naive):
            expected = model(inputs_embeds=embeds[None]).logits[0]
            torch.testing.assert_close(logits[row][attention_mask[row].bool()], expected, **EXACT)
        embeds = torch.stack([F.pad(row, (0, 0, input_ids.shape[1] - len(row), 0)) for row in naive])
        how = {"attention_mask": attention_mask, "max_new_tokens": 6, "do_sample": False}
        generated = model.generate(input_ids=input_ids, **images, **how)
        assert torch.equal(generated[:, input_ids.shape[1] :], model.generate(inputs_embeds=embeds, **how))


@pytest.mark.parametrize("shape", [(1, 3, 56, 56), (1, 4, 3, 56, 56), (1, 5, 1, 56, 56)])
def test_crops_that_do_not_fit_the_config_are_named(model, shape):
    """The error has the shape that came and the one that is expected."""
    images = {"pixel_values": torch.zeros(shape), "pixel_values_aux": torch.zeros(1, 3, 128, 128)}
    expected = (1, model.config.num_crops, 3) if model.config.num_crops > 1 else (1, 3)
    if shape[:-2] == expected:
        assert model.model.get_image_features(**images).shape[:2] == (1, model.config.num_image_tokens)
        return
    with pytest.raises(ValueError, match=r"pixel_values is \[1, .*expected \[1, .*image_grid"):
        model.model.get_image_features(**images)


def test_training_on_text_alone_runs_the_vision_side(model):
    """A text-only batch in training: zero gradients for projector and mining, whatever an image's crops."""
    input_ids = torch.arange(6, 20)[None]
    model.train()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    for parameter in model.model.patch_info_mining.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
