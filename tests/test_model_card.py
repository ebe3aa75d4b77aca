"""The card of a finished run: what the hub reads of it, what people read, and that it can be pushed."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, PreTrainedConfig, Qwen3VLConfig

from benchmarks.published import PUBLISHED
from mgm import MGMConfig
from training.model_card import build_model_card, hub_id


MGM = MGMConfig()
RUN = {
    "global_step": 88,
    "train_loss": 1.25,
    "total_params": 3_000_000_000,
    "trainable_params": 15_000_000,
    "peak": {"load": 2**30, "train": 3 * 2**30},
    "eval": {"exact_match_before": 0.07, "n": 256, "exact_match": 0.93},
    "config": {
        "model": "YanweiLi/MGM-2B",
        "dataset": "me/my-conversations",
        "eval_dataset": None,
        "output_dir": "outputs/mine",
        "lora_r": 16,
        "learning_rate": 2e-4,
    },
    "environment": {"device": "NVIDIA RTX 4090", "torch": "2.13.0"},
}


def load(run: dict, folder: Path, config: PreTrainedConfig = MGM) -> ModelCard:
    """The card as the hub would read it from the folder."""
    build_model_card(run, config).save(folder / "README.md")
    return ModelCard.load(folder / "README.md")


def test_metadata_is_what_the_hub_searches_by(tmp_path):
    """Base model, data set, library, task and score in the front matter."""
    card = load(RUN, tmp_path)
    assert card.data.base_model == "YanweiLi/MGM-2B"
    assert card.data.datasets == ["me/my-conversations"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "image-text-to-text")
    assert "lora" in card.data.tags
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == (
        "exact_match",
        0.93,
        "me/my-conversations",
    )


def test_benchmarks_of_mgm_alone(tmp_path):
    """One command; a tiny model and another family have no published scores to compare with."""
    adapter = load(RUN, tmp_path).content
    assert "benchmarks.published --model YanweiLi/MGM-2B --adapter outputs/mine --folder" in adapter
    full = load(RUN | {"config": RUN["config"] | {"lora_r": 0}}, tmp_path).content
    assert "benchmarks.published --model outputs/mine --folder" in full
    assert "56.2" in full and str(PUBLISHED["textvqa"]) == "56.2" and str(PUBLISHED["mmbench"]) == "59.8"
    for run, config in ((RUN | {"total_params": 10**7}, MGM), (RUN, Qwen3VLConfig())):
        assert "benchmarks.published" not in load(run, tmp_path, config).content


def test_folders_are_no_hub_ids(tmp_path, monkeypatch):
    """A local base model and data set stand in the text, not in the front matter, which takes hub ids alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mgm-2b").mkdir(parents=True)
    run = RUN | {"config": RUN["config"] | {"model": "models/mgm-2b", "dataset": "/data/my.json"}}
    card = load(run, tmp_path)
    assert card.data.base_model is None and card.data.datasets is None
    assert "models/mgm-2b" in card.text and "/data/my.json" in card.text
    assert hub_id("models/mgm-2b") is None and hub_id("elsewhere/mgm-2b") == "elsewhere/mgm-2b"


@pytest.mark.parametrize(
    "words",
    [
        "15,000,000 of 3,000,000,000 parameters (0.50%)",
        "7.0% before, 93.0% after (256 samples)",
        "train 3.00 GiB",
        "NVIDIA RTX 4090",
        "| learning_rate | 0.0002 |",
        '"outputs/mine"',
    ],
)
def test_text_tells_people(words, tmp_path):
    """Sizes, scores, memory, settings and how to load it."""
    assert words in load(RUN, tmp_path).text


def test_a_full_model_without_scores(tmp_path):
    """Full fine-tuning without evaluation: no PEFT, no score."""
    card = load(RUN | {"config": RUN["config"] | {"lora_r": 0}, "eval": {}}, tmp_path)
    assert card.data.library_name == "transformers" and card.data.eval_results is None
    assert "PeftModel" not in card.text and "Not evaluated." in card.text


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({"exact_match_before": 0.07, "n": 8}, "Held-out exact match: 7.0% before (8 samples)."),
        ({"exact_match": 0.93, "n": 8}, "Held-out exact match: 93.0% after (8 samples)."),
        (
            {"exact_match_before": 0.07, "n_before": 8, "exact_match": 0.93, "n": 16},
            "Held-out exact match: 7.0% before, 93.0% after (8 samples before, 16 after).",
        ),
    ],
)
def test_scores_of_a_run_resumed_with_other_samples(scores, words, tmp_path):
    """The card has the scores that there are."""
    assert words in load(RUN | {"eval": scores}, tmp_path).text


@pytest.fixture
def pushed(monkeypatch) -> dict[str, bytes | str]:
    """What the hub's client would send, by the file's name in the repository."""
    files = {}

    def create_commit(self, repo_id: str, operations: list, **kwargs) -> None:
        files.update({operation.path_in_repo: operation.path_or_fileobj for operation in operations})

    def no_card(*args, **kwargs) -> None:
        raise EntryNotFoundError("a new repository has none")

    url = RepoUrl("https://huggingface.co/me/mine")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: url)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", no_card)
    return files


def test_an_adapter_can_be_pushed(tiny_model, pushed):
    """PEFT's own push_to_hub sends the adapter that train.py makes."""
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    model.push_to_hub("me/mine")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= pushed.keys()


def test_samples_that_lost_their_end_are_told(tmp_path):
    """As many as run.json has; nothing is said of none."""
    run = RUN | {"cut_replies": 1234, "config": RUN["config"] | {"max_seq_len": 1024}}
    assert (
        "Samples cut off at 1024 tokens, so that the end of their replies was not learned: 1,234."
        in load(run, tmp_path).text
    )
    assert "cut off" not in load(RUN, tmp_path).text


@pytest.mark.parametrize(
    ("config", "words", "tag", "task"),
    [
        (Qwen3VLConfig(), "a vision-language model of the type `qwen3_vl`", "qwen3_vl", "image-text-to-text"),
        (LlamaConfig(), "a language model of the type `llama`", "llama", "text-generation"),
    ],
    ids=["qwen3_vl", "llama"],
)
@pytest.mark.parametrize("lora_r", [16, 0])
def test_other_families(
    tmp_path: Path, config: PreTrainedConfig, words: str, tag: str, task: str, lora_r: int
) -> None:
    """Their card does not speak of MGM, and transformers and PEFT alone load what it is about."""
    card = load(RUN | {"config": RUN["config"] | {"model": "a/b", "lora_r": lora_r}}, tmp_path, config)
    assert words in card.text and "mgm" not in card.content.lower().replace("mgm-2b", "")
    assert tag in card.data.tags and card.data.pipeline_tag == task
    assert "from transformers import Auto" in card.text and "models.loading" not in card.text
    assert ('from_pretrained(model, "outputs/mine")' in card.text) == bool(lora_r)
