"""Imported first by the scripts, before torch and PEFT: keeps warnings from users that they can do nothing about."""

import logging
import os


# On some CPUs bitsandbytes, which PEFT imports, warns of a kernel that nobody wants.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Without a network it tells of each new attempt; the error at the end says enough.
logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
# torch's profiler warns of memory that was allocated before it began.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
