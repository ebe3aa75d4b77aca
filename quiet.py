"""Imported first by the scripts: PEFT imports bitsandbytes, which on some CPUs warns of a kernel that nobody wants."""

import logging


logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
