"""MGM (Mini-Gemini, arXiv:2403.18814) in transformers' form. Importing it registers MGM with the Auto classes."""

from mgm.configuration_mgm import PRESETS, MGMConfig
from mgm.modeling_mgm import MGMForConditionalGeneration
from mgm.processing_mgm import MGMProcessor


__all__ = ["PRESETS", "MGMConfig", "MGMForConditionalGeneration", "MGMProcessor"]
