"""Models of the sizes that people use, by name: see preset.py."""

from models.presets import mgm
from models.presets.preset import Preset


PRESETS: dict[str, Preset] = mgm.PRESETS
