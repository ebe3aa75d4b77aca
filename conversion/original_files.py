"""The original's tokenizer and generation files: copied for the way back, or made from what training saved."""

import json
import shutil
from pathlib import Path

from chat.messages import IMAGE_TOKEN


# A folder inside the converted one. What transformers 5 writes, the original's transformers may not read.
ORIGINAL_FILES = "original_files"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
FILE_NAMES = (*TOKENIZER_FILES, "generation_config.json")


def keep_original_files(source: Path, output: Path) -> None:
    """Copy the tokenizer's and generation's files of a checkpoint into its converted folder."""
    copy_files(source, output / ORIGINAL_FILES)


def hand_back_files(source: Path, output: Path) -> None:
    """Copy the files as they were. Training saves a model without them: then its tokenizer, without `<image>`."""
    if (source / ORIGINAL_FILES).is_dir():
        copy_files(source / ORIGINAL_FILES, output)
        return
    copy_files(source, output)
    if (output / "tokenizer.json").is_file():
        restore_tokenizer(output / "tokenizer.json")
    if (output / "tokenizer_config.json").is_file():
        restore_tokenizer_config(output / "tokenizer_config.json")
    (output / "added_tokens.json").unlink(missing_ok=True)  # tokenizer.json has them


def copy_files(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in FILE_NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def restore_tokenizer(path: Path) -> None:
    """Remove `<image>`: the original marks images by a number that is no token's."""
    tokenizer = json.loads(path.read_text())
    # Newer files have pairs, transformers 4.38 reads lines with a space between the two.
    merges = tokenizer["model"].get("merges", [])
    if all(isinstance(pair, list) and " " not in pair[0] + pair[1] for pair in merges) and merges:
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != IMAGE_TOKEN]
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False))


def restore_tokenizer_config(path: Path) -> None:
    """Write transformers 5's keys as 4.38 reads them."""
    config = json.loads(path.read_text())
    for key in ("backend", "is_local", "local_files_only", "processor_class"):
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokens = config.pop("extra_special_tokens", []) or config.get("additional_special_tokens", [])
    config["additional_special_tokens"] = [token for token in tokens if token != IMAGE_TOKEN]
    decoder = config.get("added_tokens_decoder", {})
    for token_id in [i for i, token in decoder.items() if token["content"] == IMAGE_TOKEN]:
        del decoder[token_id]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True))
