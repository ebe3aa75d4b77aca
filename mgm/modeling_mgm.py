"""MGM in transformers' form: embed the text, encode and project the images, insert their features, decode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, Cache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from layers.chunked_loss import LanguageModelHead
from layers.model_loss import own_loss
from mgm.configuration_mgm import MGMConfig
from mgm.patch_info_mining import MGMPatchInfoMining


class MGMProjector(nn.Module):
    """Two linear layers from CLIP's width to the language model's."""

    def __init__(self, config: MGMConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class MGMPreTrainedModel(PreTrainedModel):
    config_class = MGMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True


class MGMModel(MGMPreTrainedModel):
    """The two towers, patch info mining, the projector and the language model without its head."""

    def __init__(self, config: MGMConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # A ConvNeXt has no attention, and refuses every implementation but the default.
        self.vision_tower_aux = AutoModel.from_config(config.vision_config_aux, attn_implementation="eager")
        self.vision_tower_aux.layernorm = nn.Identity()  # the classifier's norm; MGM reads the stages before it
        for module in self.vision_tower_aux.modules():
            if isinstance(module, nn.LayerNorm):  # transformers ignores the config's eps in all norms but that one
                module.eps = config.vision_config_aux.layer_norm_eps
        self.patch_info_mining = MGMPatchInfoMining(config)
        self.multi_modal_projector = MGMProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def train(self, mode: bool = True) -> "MGMModel":
        """The towers stay in eval mode: a frozen tower's dropout would only add noise to its features."""
        super().train(mode)
        self.vision_tower.eval()
        self.vision_tower_aux.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def embed_text(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """[B, T] ids to [B, T, D]. The image token has no embedding; token 0's is used until features replace it."""
        return self.get_input_embeddings()(input_ids.masked_fill(input_ids == self.config.image_token_id, 0))

    @property
    def num_clip_layers(self) -> int:
        """The number of CLIP's layers up to the features."""
        return self.config.vision_feature_layer % (len(self.vision_tower.encoder.layers) + 1)

    def unused_modules(self) -> list[nn.Module]:
        """CLIP's layers after the features. The loss does not depend on them, so they cannot be trained."""
        tower = self.vision_tower
        return [*tower.encoder.layers[self.num_clip_layers :], tower.post_layernorm]

    def clip_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] to patch features [N, P, C] of the layer that the config names, without CLS and final norm."""
        tower = self.vision_tower
        with _no_grad_if_frozen(tower):
            hidden_states = tower.pre_layrnorm(tower.embeddings(pixel_values.to(tower.dtype)))
            for layer in tower.encoder.layers[: self.num_clip_layers]:
                hidden_states = layer(hidden_states, attention_mask=None)
        return hidden_states[:, 1:]

    def convnext_stages(self, pixel_values_aux: torch.Tensor) -> list[torch.Tensor]:
        """[N, 3, S, S] to the features of all four stages: [N, C_i, S / 4, S / 4], then half the size each time."""
        tower = self.vision_tower_aux
        stages = []
        with _no_grad_if_frozen(tower):
            features = tower.embeddings(pixel_values_aux.to(tower.dtype))
            for stage in tower.encoder.stages:
                features = stage(features)
                stages.append(features)
        return stages

    def get_image_features(self, pixel_values: torch.Tensor, pixel_values_aux: torch.Tensor) -> torch.Tensor:
        """N images to [N, K * P, D], to be inserted among the token embeddings (before their scaling).

        Args:
            pixel_values: [N, 3, H, W]; with `image_grid` > 1 [N, K, 3, H, W]: an image's crops in reading order and,
                with `image_global`, the whole image last. The features begin with the whole image's.
            pixel_values_aux: [N, 3, S, S].
        """
        self._check_views(pixel_values, pixel_values_aux)
        features = self.clip_features(pixel_values.flatten(0, -4))  # [N * K, P, C]
        if self.config.image_global:
            by_image = features.unflatten(0, (len(pixel_values), -1))
            features = torch.cat([by_image[:, -1:], by_image[:, :-1]], dim=1).flatten(0, 1)
        features = self.patch_info_mining(
            features, self.convnext_stages(pixel_values_aux), self.config.image_grid, self.config.image_global
        )
        return self.multi_modal_projector(features).reshape(len(pixel_values), -1, self.config.text_config.hidden_size)

    def _check_views(self, pixel_values: torch.Tensor, pixel_values_aux: torch.Tensor | None) -> None:
        if pixel_values_aux is None or len(pixel_values) != len(pixel_values_aux):
            num_aux = 0 if pixel_values_aux is None else len(pixel_values_aux)
            raise ValueError(f"{len(pixel_values)} images in pixel_values but {num_aux} in pixel_values_aux")
        *expected, _, _ = self.config.view_shapes(len(pixel_values))[0]
        if list(pixel_values.shape[:-2]) != expected:
            raise ValueError(
                f"pixel_values is {list(pixel_values.shape)}, expected {[*expected, 'height', 'width']} "
                f"(image_grid {self.config.image_grid}, image_global {self.config.image_global})"
            )

    def place_image_features(
        self, inputs_embeds: torch.Tensor, image_features: torch.Tensor, image_positions: torch.LongTensor
    ) -> torch.Tensor:
        """[N, P, D] features into [B, T, D] embeddings, in reading order, at flat positions [N * P] of B * T."""
        num_tokens, num_features = image_positions.numel(), image_features.shape[0] * image_features.shape[1]
        if num_tokens != num_features:
            raise ValueError(
                f"{num_tokens} image positions in input_ids but {num_features} image features "
                f"({image_features.shape[0]} images of {image_features.shape[1]})"
            )
        # Gemma scales its embeddings inside the embedding module; the original scales image features too.
        scale = getattr(self.get_input_embeddings(), "embed_scale", None)
        if scale is not None:
            image_features = image_features * scale.to(image_features.dtype)
        image_features = image_features.flatten(0, 1).to(inputs_embeds.dtype)
        return inputs_embeds.flatten(0, 1).index_copy(0, image_positions, image_features).view_as(inputs_embeds)

    def dummy_image_features(self) -> torch.Tensor:
        """Features of one black image. A process whose batch has no image must run the vision side as well: under
        ZeRO-3 and DDP the others wait for it, and its trained parameters need gradients of 0, not None."""
        return self.get_image_features(*(torch.zeros(x, device=self.device) for x in self.config.view_shapes(1)))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_aux: torch.FloatTensor | None = None,
        image_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        if not is_prefill:
            image_positions = None  # generation passes the prompt's positions to every step
        if inputs_embeds is None:
            inputs_embeds = self.embed_text(input_ids)  # [B, T, D]
        if image_positions is None and input_ids is not None and is_prefill:
            image_positions = (input_ids == self.config.image_token_id).flatten().nonzero().squeeze(1)

        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, pixel_values_aux)  # [N, P, D]
            inputs_embeds = self.place_image_features(inputs_embeds, image_features, image_positions)
        elif image_positions is not None and image_positions.numel():
            raise ValueError(
                f"{image_positions.numel()} image positions in input_ids but no pixel_values (0 features)"
            )
        elif is_prefill and (self.training or is_deepspeed_zero3_enabled()):
            inputs_embeds = inputs_embeds + 0 * self.dummy_image_features().sum().to(inputs_embeds.dtype)

        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class MGMForConditionalGeneration(MGMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MGMConfig) -> None:
        super().__init__(config)
        self.model = MGMModel(config)
        self.lm_head = LanguageModelHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.chunked_loss = True  # in training; False computes the logits of all positions
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        """Repeat each row with all of its images. The default would repeat image by image, which mixes up the rows."""
        if expand_size > 1:
            model_kwargs.pop("image_positions", None)  # of the rows before they are repeated
        names = [name for name in ("pixel_values", "pixel_values_aux") if model_kwargs.get(name) is not None]
        images = {name: model_kwargs.pop(name) for name in names}
        if images and expand_size > 1:
            num_images = (input_ids == self.config.image_token_id).sum(1) // self.config.num_image_tokens
            rows = torch.arange(len(images["pixel_values"]), device=input_ids.device).split(num_images.tolist())
            order = torch.cat([row.repeat(expand_size) for row in rows])
            images = {name: views[order] for name, views in images.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    @own_loss
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_aux: torch.FloatTensor | None = None,
        image_positions: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """`loss` if there are labels; `logits` [B, T, vocab] except in training with labels.

        `image_positions` are the flat positions (row * T + column) of the image tokens. Without them they are looked
        up in `input_ids`, which makes the CPU wait for the GPU. `label_positions` and `num_items_in_batch` are
        `own_loss`'s.
        """
        if self.training:
            kwargs["use_cache"] = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_aux=pixel_values_aux,
            image_positions=image_positions,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@contextmanager
def _no_grad_if_frozen(tower: nn.Module) -> Iterator[None]:
    """A frozen tower runs without a graph and in its own dtype: under autocast its norms would return fp32, and so all
    layers after them."""
    if any(parameter.requires_grad for parameter in tower.parameters()):
        yield
    else:
        with torch.no_grad(), torch.autocast(tower.device.type, enabled=False):
            yield


AutoModelForImageTextToText.register(MGMConfig, MGMForConditionalGeneration)
