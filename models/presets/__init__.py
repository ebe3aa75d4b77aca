"""Models of the sizes that people use, by name: see preset.py."""

from models.presets import gemma, internvl, llava, mgm, ministral, paligemma, qwen, smolvlm
from models.presets.preset import Preset


FAMILIES = (mgm, qwen, gemma, paligemma, ministral, smolvlm, llava, internvl)
PRESETS: dict[str, Preset] = {name: preset for family in FAMILIES for name, preset in family.PRESETS.items()}
