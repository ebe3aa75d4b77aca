"""`train.py --doctor`: is this machine ready to train this model? Each finding with its remedy.

Facts are gathered first (`look`), then judged (`findings`), so that tests can judge machines that are not at hand. A
`problem` would make training fail, and the exit code is 2. A `warning` costs speed or concerns something optional.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from data.dataset import open_dataset
from data.sharing import SHARED_MEMORY, SHARED_MEMORY_REMEDY
from models.family import is_mgm
from models.loading import is_preset, load_config
from training.config import TrainConfig
from training.disk_room import free_disk_bytes
from utils import GIB, UserError, counted, size


REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
MARKS = ("ok", "warning", "problem")
MIN_FREE_DISK_BYTES, MIN_FREE_HOST_BYTES = 5 * GIB, 8 * GIB  # checkpoints and caches; MGM-2B's weights and more
MIN_FREE_SHARED_BYTES = GIB // 2  # six batches of ten of MGM-2B's images, 8 MiB each
FLASH_HEAD_SIZE = 256  # the limit of PyTorch's flash kernel and of flash-attn 2
# Consumer cards: there PyTorch's flash kernel trains heads up to 192 and above 224, the latter without dropout, as
# MGM does (sdp_utils.cpp, check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120). flash-attn trains
# 256 there since 2.5.5 (its README).
CONSUMER = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
REFUSED_HEAD_SIZES = range(193, 225)
# training/doctor_machines.py asks for the same records again, and to look for each image takes long.
open_once = cache(open_dataset)


@dataclass(frozen=True)
class GpuFacts:
    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Facts:
    """A machine, and the model that is to be trained on it."""

    python: str  # the running interpreter
    accelerate: str | None  # the launcher that the shell finds
    packages: dict[str, tuple[str, str | None]]  # required and installed version
    torch_cuda: str | None  # the CUDA that torch was built with; None: a CPU build
    torch_architectures: tuple[str, ...]  # sm_80 ...
    driver_gpus: tuple[str, ...]  # what nvidia-smi lists
    gpus: tuple[GpuFacts, ...]  # what torch sees
    cuda_home: str | None
    toolkit: str | None  # nvcc's version
    compiler: str | None
    flash_attn: str | None
    head_sizes: dict[str, int]
    free_host_bytes: int
    free_disk_bytes: int
    free_shared_bytes: int | None  # None: no file system shows it


@dataclass(frozen=True)
class Finding:
    mark: str  # one of MARKS
    what: str
    remedy: str | None = None


def ok(what: str) -> Finding:
    return Finding("ok", what)


def warning(what: str, remedy: str) -> Finding:
    return Finding("warning", what, remedy)


def problem(what: str, remedy: str) -> Finding:
    return Finding("problem", what, remedy)


def run_doctor(config: TrainConfig) -> dict[str, Any]:
    """Print the findings; returns them for the last line, with `status`: ok, warning or problem.

    Raises:
        UserError: the model's config cannot be read.
    """
    return print_findings(findings_for(config))


def findings_for(config: TrainConfig) -> list[Finding]:
    """Of this machine, the model and the data. Raises UserError: the model's config cannot be read."""
    facts = look(load_config(config.model), Path(config.output_dir))
    return [*findings(facts), *judge_model(config.model), *judge_data(config)]


def print_findings(found: list[Finding]) -> dict[str, Any]:
    """Print them; returns them with the worst `status`."""
    for finding in found:
        print(f"{finding.mark:7}  {finding.what}")
        if finding.remedy:
            print(f"{'':7}  -> {finding.remedy}")
    status = max((finding.mark for finding in found), key=MARKS.index)
    return {"status": status, "findings": [vars(finding) for finding in found]}


def look(config: PreTrainedConfig, output_dir: Path) -> Facts:
    """The facts of this machine."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(cuda_home, "bin", "nvcc")) if cuda_home else "nvcc"
    toolkit = re.search(r"release ([\d.]+)", command_output(nvcc, "--version"))
    return Facts(
        python=sys.executable,
        accelerate=shutil.which("accelerate"),
        packages=required_packages(),
        torch_cuda=torch.version.cuda,
        torch_architectures=tuple(torch.cuda.get_arch_list()),
        driver_gpus=tuple(command_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()),
        gpus=tuple(look_at_gpu(index) for index in gpus),
        cuda_home=cuda_home,
        toolkit=toolkit[1] if toolkit else None,
        compiler=next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None),
        flash_attn=installed("flash_attn"),
        head_sizes=head_sizes(config),
        free_host_bytes=psutil.virtual_memory().available,
        free_disk_bytes=free_disk_bytes(output_dir),
        free_shared_bytes=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
    )


def look_at_gpu(index: int) -> GpuFacts:
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return GpuFacts(name, capability, free_bytes, total_bytes)


def command_output(*command: str) -> str:
    """What a command prints; nothing if it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def required_packages() -> dict[str, tuple[str, str | None]]:
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", REQUIREMENTS.read_text(), flags=re.M)
    return {name: (pinned, installed(name)) for name, pinned in pins}


def head_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """The size of an attention head, for each part that has attention."""
    parts = {"language model": config.get_text_config(), "vision tower": getattr(config, "vision_config", None)}
    sizes = {}
    for name, part in parts.items():
        if hasattr(part, "num_attention_heads"):
            sizes[name] = getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
    return sizes


def findings(facts: Facts) -> list[Finding]:
    return [
        *judge_python(facts),
        *judge_packages(facts),
        *judge_cuda(facts),
        *(finding for gpu in facts.gpus for finding in judge_gpu(gpu, facts)),
        *judge_toolkit(facts),
        *judge_room(facts),
    ]


def judge_data(config: TrainConfig) -> list[Finding]:
    """Whether the data sets that are named can be read. data.check looks at each record."""
    found = []
    for path in filter(None, (config.dataset, config.eval_dataset)):
        try:
            records = open_once(path, config.image_folder, config.skips_bad_samples, config.follow_links).records
            found.append(ok(f"{counted(len(records), 'record')} in {path}"))
        except UserError as error:
            found.append(problem(str(error), "python -m data.check names every record that cannot be used"))
    return found


def judge_model(model: str) -> list[Finding]:
    if not is_preset(model):
        return []
    what = (
        f"{model} is a preset, which has neither weights nor a tokenizer: this machine can be checked, not trained on"
    )
    guide, other = f"get the folder {model} first: docs/gpu_guide.md", "give the model's folder or hub id"
    remedy = guide if is_mgm(load_config(model)) else other
    return [Finding("warning", what, remedy)]


def judge_python(facts: Facts) -> list[Finding]:
    found = [ok(f"Python {platform.python_version()} at {facts.python}")]
    if facts.accelerate is None:
        found.append(warning("no accelerate on the PATH", "activate the environment, or python -m accelerate"))
    elif Path(facts.accelerate).parent != Path(facts.python).parent:
        what = f"accelerate is another Python's: {facts.accelerate}"
        remedy = "activate this one's environment, or start with: python -m accelerate.commands.launch"
        found.append(problem(what, remedy))
    return found


def judge_packages(facts: Facts) -> list[Finding]:
    """Other versions than the pinned ones may work, but are not tested."""
    wrong = {name: pair for name, pair in facts.packages.items() if (pair[1] or "").partition("+")[0] != pair[0]}
    if not wrong:
        return [ok(f"all {len(facts.packages)} packages as in requirements.txt")]
    listed = ", ".join(f"{name} {has or 'missing'} (tested: {pinned})" for name, (pinned, has) in wrong.items())
    return [warning(f"other versions than tested: {listed}", "pip install -r requirements.txt")]


def judge_cuda(facts: Facts) -> list[Finding]:
    if facts.gpus:
        return [ok(f"{counted(len(facts.gpus), 'GPU')}, torch built with CUDA {facts.torch_cuda}")]
    if not facts.driver_gpus:
        return [ok("no GPU: training runs on the CPU, in fp32; memory_probe.py predicts for any card")]
    names = ", ".join(facts.driver_gpus)
    if facts.torch_cuda is None:
        return [problem(f"{names} is there, but torch is a CPU build", "install torch's CUDA build, see pytorch.org")]
    what = f"{names} is there, but torch (CUDA {facts.torch_cuda}) cannot use it"
    return [problem(what, "update the driver, or look at CUDA_VISIBLE_DEVICES")]


def judge_gpu(gpu: GpuFacts, facts: Facts) -> list[Finding]:
    architecture = "sm_{}{}".format(*gpu.capability)
    found = [
        ok(f"{gpu.name}, {architecture}, {size(gpu.free_bytes)} of {size(gpu.total_bytes)} free"),
        ok("bf16: yes" if gpu.capability >= (8, 0) else "no bf16 units: auto chooses fp16"),
    ]
    majors = {name.partition("_")[2][:-1] for name in facts.torch_architectures}
    if facts.torch_architectures and str(gpu.capability[0]) not in majors:
        what = f"torch has no kernels for {architecture}, only for {', '.join(facts.torch_architectures)}"
        found.append(problem(what, "install a torch build for this card"))
    if gpu.free_bytes < 0.9 * gpu.total_bytes:
        used = size(gpu.total_bytes - gpu.free_bytes)
        found.append(warning(f"{used} of {gpu.name} are in use already", "nvidia-smi tells by what; end it"))
    found += [judge_attention(name, head_size, gpu, facts) for name, head_size in facts.head_sizes.items()]
    return found


def judge_attention(part: str, head_size: int, gpu: GpuFacts, facts: Facts) -> Finding:
    """Which attention kernels can train heads of this size on this card."""
    what = f"{part}, heads of {head_size}: "
    if gpu.capability < (8, 0):
        return ok(what + "sdpa without flash kernels, which need Ampere or newer")
    if head_size > FLASH_HEAD_SIZE:
        return ok(what + "too large for flash kernels; sdpa takes others")
    is_consumer = gpu.capability in CONSUMER
    kernel = "sdpa trains with its flash kernel, or where a batch is padded with its memory-efficient one"
    if is_consumer and head_size in REFUSED_HEAD_SIZES:
        kernel = "sdpa trains with its memory-efficient kernel"
    if facts.flash_attn is None:
        return ok(f"{what}{kernel}; flash-attn is not installed, and not needed")
    is_old = tuple(map(int, re.findall(r"\d+", facts.flash_attn)[:3])) < (2, 5, 5)
    if is_consumer and is_old and head_size >= REFUSED_HEAD_SIZES.start:
        remedy = "pip install --no-build-isolation -r requirements-gpu.txt, or --attn_implementation sdpa"
        return warning(f"{what}flash-attn {facts.flash_attn} cannot train them here; {kernel}", remedy)
    return ok(f"{what}{kernel}; flash-attn {facts.flash_attn} can train them")


def judge_toolkit(facts: Facts) -> list[Finding]:
    """A toolkit is needed only to compile flash-attn or DeepSpeed's own optimizers; the launch configs use neither."""
    found = []
    if facts.compiler is None:
        what = "no C++ compiler: DeepSpeed (zero2.yaml, zero3.yaml) compiles an operator at its first start on a CPU"
        judge = warning if facts.gpus else problem
        found.append(judge(what, "install one (Debian, Ubuntu: apt install g++), or use single.yaml"))
    else:
        found.append(ok(f"C++ compiler: {facts.compiler}"))
    if facts.torch_cuda is None:
        return found
    needed = f"only to compile flash-attn, and then of CUDA {facts.torch_cuda}"
    if facts.cuda_home and facts.toolkit is None:
        found.append(warning(f"CUDA_HOME={facts.cuda_home} has no bin/nvcc", "point it at a toolkit or unset it"))
    elif facts.toolkit is None:
        found.append(ok(f"no CUDA toolkit: needed {needed}"))
    elif facts.toolkit.split(".")[0] != facts.torch_cuda.split(".")[0]:
        what = f"CUDA toolkit {facts.toolkit}, but torch has {facts.torch_cuda}: what is compiled will not load"
        found.append(warning(what, f"set CUDA_HOME to a toolkit {facts.torch_cuda}; needed {needed}"))
    else:
        found.append(ok(f"CUDA toolkit {facts.toolkit} fits torch's {facts.torch_cuda}"))
    return found


def judge_room(facts: Facts) -> list[Finding]:
    shared = f"shared memory ({SHARED_MEMORY}), through which data workers hand over their batches"
    host_remedy = "close programs; zero3.yaml keeps the weights there"
    disk_remedy = "make room, or choose another --output_dir"
    room = [
        ("host memory", facts.free_host_bytes, MIN_FREE_HOST_BYTES, host_remedy),
        ("disk for --output_dir", facts.free_disk_bytes, MIN_FREE_DISK_BYTES, disk_remedy),
        (shared, facts.free_shared_bytes, MIN_FREE_SHARED_BYTES, SHARED_MEMORY_REMEDY),
    ]
    found = []
    for what, free_bytes, least_bytes, remedy in room:
        if free_bytes is not None:
            text = f"{size(free_bytes)} free {what}"
            found.append(warning(text, remedy) if free_bytes < least_bytes else ok(text))
    return found
