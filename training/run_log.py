"""What a run reports while it trains and at its end: progress bar, TensorBoard, run.json, model card."""

import hashlib
import json
import time
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from data.batch import Batch
from data.dataset import ConversationDataset
from data.worst_case import Row
from evaluation.held_out import Prediction, exact_match
from evaluation.pictures import caption, captioned
from models.lora import count_parameters
from training.checkpoint_files import remove_temporaries
from training.config import TrainConfig
from training.machine import memory_bytes, peak_bytes, reset_peak, run_environment
from training.model_card import build_model_card
from training.previous_run import CARD, RUN_JSON, TENSORBOARD, PreviousRun
from training.run_forecast import RunForecast
from utils import GIB, markdown_table


LOG_VALUES = ("totals", "last_loss", "eval", "peak", "window_label_tokens", "num_skipped_updates", "bad_samples")
NUM_PICTURES = 4


class RunLog:
    """Collects what the training loop reports. Sums stay on the device until `logging_steps` updates have passed.

    A context: if the run ends before its first update, everything it has written is removed. An earlier run in the
    same folder is removed after the first update.
    A run resumed after `start_step` updates continues its log.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        num_steps: int,
        longest_row: Row,
        start_step: int,
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.model_config = accelerator.unwrap_model(model).config
        self.total_params, self.trainable_params = count_parameters(model)
        self.num_steps = num_steps
        self.global_step = self.start_step = start_step
        self.num_skipped_updates = 0
        self.num_cut_replies = 0  # samples whose end --max_seq_len cuts off
        self.num_left_out = 0  # samples left out when the data set was read
        self.bad_samples: list[int] = []  # indices of samples found bad since then
        self.forecast: RunForecast | None = None  # the main process's
        self.peak = {"load": peak_bytes()}
        self.eval: dict[str, float] = {}
        self.last_loss = float("nan")
        self.totals = {"loss": 0.0, "label_tokens": 0, "tokens": 0, "samples": 0, "seconds": 0.0}
        self.window = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # loss, tokens, samples
        self.update_loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self.window_label_tokens = 0
        self.window_start = self.elapsed = 0.0

        self.progress = None
        self.has_trained = False
        self.previous = PreviousRun(self.output_dir)
        if accelerator.is_main_process:
            remove_temporaries(self.output_dir)
        # A killed run has logged updates after its last checkpoint; they are logged again.
        purge = {"tensorboard": {"purge_step": start_step + 1}} if start_step else {}
        accelerator.init_trackers(TENSORBOARD, init_kwargs=purge)
        if accelerator.is_main_process:
            self.writer.add_text("config", markdown_table(["flag", "value"], asdict(config).items()))
            self.forecast = RunForecast(accelerator, config, model, optimizer, longest_row, self.writer)
            share = self.trainable_params / self.total_params
            print(f"Training {self.trainable_params:,} of {self.total_params:,} parameters ({share:.2%})", flush=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_) -> None:
        if self.progress is not None:
            self.progress.close()  # or an error's line would begin where the bar ends
        if self.forecast is not None:
            self.forecast.stop()
        if exception_type is not None and not self.has_trained and self.accelerator.is_main_process:
            self.writer.close()
            self.previous.restore()

    @property
    def writer(self) -> SummaryWriter:
        return self.accelerator.get_tracker("tensorboard", unwrap=True)

    @property
    def num_bad_samples(self) -> int:
        """Samples left out when the data set was read, or found bad since then."""
        return self.num_left_out + len(self.bad_samples)

    def start(self) -> None:
        """Start the clock that throughput is measured by."""
        reset_peak()
        if self.start_step == self.num_steps:  # the resumed run had all its updates
            self._take_over()
        bar = {"total": self.num_steps, "initial": self.start_step, "disable": not self.accelerator.is_main_process}
        self.progress = tqdm(**bar, desc="Training", unit="step", mininterval=1)
        self.window_start = time.perf_counter() - self.elapsed
        if self.forecast is not None:
            self.forecast.start()

    def micro_batch(self, batch: Batch, loss: torch.Tensor) -> None:
        """`loss` is the micro-batch's share of its update's loss."""
        self.update_loss += loss
        self.window[1] += batch.num_tokens
        self.window[2] += batch.num_samples
        if self.forecast is not None:
            self.forecast.micro_batch(batch.inputs)

    def update(
        self,
        global_step: int,
        num_items_in_batch: int,
        learning_rate: float,
        grad_norm: float,
        loss_scale: float | None = None,
        is_skipped: bool = False,
    ) -> None:
        """After an update whose loss was the mean over `num_items_in_batch` label tokens of all processes.

        `loss_scale`: fp16's. A skipped update's loss may be NaN and is not counted.
        """
        self.global_step = global_step
        if self.forecast is not None:
            self.forecast.update()
        if not (is_skipped or self.has_trained):
            self._take_over()
        if is_skipped:
            self.num_skipped_updates += 1
            self.update_loss.zero_()
        else:
            self.window[0] += self.update_loss * num_items_in_batch
            self.window_label_tokens += num_items_in_batch
        if global_step % self.config.logging_steps == 0 or global_step == self.num_steps:
            self._close_window(global_step, learning_rate, grad_norm, loss_scale)
        self.update_loss.zero_()
        self.progress.update()
        if global_step == self.num_steps:
            self.progress.close()
            self.peak["train"] = peak_bytes()

    def _take_over(self) -> None:
        """From now on the output folder is this run's."""
        self.has_trained = True
        if self.config.overwrite_output_dir and self.accelerator.is_main_process:
            self.previous.remove()

    def _close_window(
        self, global_step: int, learning_rate: float, grad_norm: float, loss_scale: float | None
    ) -> None:
        """Log the updates since the last point, and start to collect anew."""
        sums = torch.cat([self.window, self.update_loss[None]])
        loss_sum, tokens, samples, self.last_loss = self.accelerator.reduce(sums, "sum").tolist()
        seconds = time.perf_counter() - self.window_start
        window = (loss_sum, self.window_label_tokens, tokens, samples, seconds)
        self.totals = {name: total + new for (name, total), new in zip(self.totals.items(), window, strict=True)}
        loss, tokens_per_second = loss_sum / max(self.window_label_tokens, 1), tokens / seconds
        memory = memory_bytes()
        self.accelerator.log(
            {
                "train/loss": loss,
                "train/learning_rate": learning_rate,
                "train/grad_norm": grad_norm,
                "train/tokens_per_second": tokens_per_second,
                "train/skipped_updates": self.num_skipped_updates,
                "data/bad_samples": self.num_bad_samples,
                **({} if loss_scale is None else {"train/loss_scale": loss_scale}),
                **{f"memory/{name}": value for name, value in memory.items()},
            },
            step=global_step,
        )
        if self.forecast is not None:
            self.forecast.log(global_step)
        used_gib = next(iter(memory.values())) / GIB
        self.progress.set_postfix_str(
            f"loss {loss:.3f}, lr {learning_rate:.1e}, {tokens_per_second:.0f} tokens/s, {used_gib:.2f} GiB"
        )
        self.window.zero_()
        self.window_label_tokens = 0
        self.window_start = time.perf_counter()

    def state(self) -> tuple[dict[str, Any], torch.Tensor]:
        """The log after an update, for a checkpoint. Cheap: does not wait for a GPU."""
        values = {name: copy(getattr(self, name)) for name in LOG_VALUES}
        return values | {"elapsed": time.perf_counter() - self.window_start}, self.window.clone()

    def state_dict(self, state: tuple[dict[str, Any], torch.Tensor]) -> dict[str, Any]:
        """What `state` returned, summed over the processes, for JSON."""
        values, window = state
        return values | {"window": self.accelerator.reduce(window, "sum").tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in LOG_VALUES:
            setattr(self, name, state_dict[name])
        self.elapsed = state_dict["elapsed"]
        if self.accelerator.is_main_process:  # one process holds the sum: sums are over all processes
            self.window += torch.tensor(state_dict["window"], dtype=self.window.dtype, device=self.window.device)

    def evaluation(self, global_step: int, predictions: list[Prediction], dataset: ConversationDataset | None) -> None:
        """Held-out answers, before training (step 0) or after it."""
        if not predictions:
            return
        score = exact_match(predictions)
        name = "exact_match" if global_step else "exact_match_before"
        num_cut = sum(prediction.is_cut for prediction in predictions)
        questions = digest_questions(predictions)
        if global_step and self.eval.get("questions", questions) != questions:  # resumed with other questions
            if self.eval["n"] == len(predictions):
                del self.eval["exact_match_before"]  # with the same number of questions nobody would notice
            else:
                self.eval["n_before"] = self.eval["n"]
        self.eval |= {name: score, "n": len(predictions), "num_cut": num_cut, "questions": questions}
        self.accelerator.log({"eval/exact_match": score}, step=global_step)
        if self.accelerator.is_main_process:
            when = "after" if global_step else "before"
            cut = f"; {num_cut} answers were cut off: see --max_new_tokens" if num_cut else ""
            print(f"Held-out exact match {when} training: {score:.1%} of {len(predictions)}{cut}", flush=True)
            self._show_predictions(global_step, predictions[:NUM_PICTURES], dataset)

    def _show_predictions(self, global_step: int, predictions: list[Prediction], dataset: ConversationDataset) -> None:
        for i, prediction in enumerate(predictions):
            for image in dataset[prediction.index]["images"][:1]:
                mark = "exact" if prediction.is_exact else "not exact"
                lines = caption(prediction.question, [prediction.answer], prediction.prediction, mark)
                picture = np.asarray(captioned(image, lines))
                self.writer.add_image(f"eval/sample_{i}", picture, global_step, dataformats="HWC")
        rows = [(p.question, p.answer, p.prediction, "yes" if p.is_exact else "no") for p in predictions]
        table = markdown_table(["question", "answer", "prediction", "exact"], rows)
        self.writer.add_text("eval/predictions", table, global_step)

    def finish(self, global_step: int, data: dict[str, Any]) -> dict | None:
        """Write run.json, the model card and hparams. Returns run.json's content on the main process.

        `data`: the training data's digest.
        """
        self.peak["eval"] = peak_bytes()
        totals = self.totals
        result = {
            "status": "done",
            "global_step": global_step,
            "train_loss": totals["loss"] / max(totals["label_tokens"], 1),
            "last_loss": self.last_loss,
            "total_params": self.total_params,
            "trainable_params": self.trainable_params,
            "samples_per_second": totals["samples"] / totals["seconds"],
            "tokens_per_second": totals["tokens"] / totals["seconds"],
            "skipped_updates": self.num_skipped_updates,
            "bad_samples": self.num_bad_samples,
            "cut_replies": self.num_cut_replies,
            "peak": self.peak,
            "eval": self.eval,
            "data": data,
            "config": asdict(self.config),
            "environment": run_environment(self.accelerator),
        }
        if self.accelerator.is_main_process:
            result |= self.forecast.finish(self.peak["train"])
            hparams = {k: v for k, v in result["config"].items() if isinstance(v, (bool, int, float, str))}
            # Other names than the curves': TensorBoard would add these values to them.
            metrics = {"hparams/train_loss": result["train_loss"]}
            if "exact_match" in self.eval:
                metrics["hparams/exact_match"] = self.eval["exact_match"]
            self.writer.add_hparams(hparams, metrics, run_name=".", global_step=global_step)
            (self.output_dir / RUN_JSON).write_text(json.dumps(result, indent=2) + "\n")
            card = build_model_card(result, self.model_config)
            card.save(self.output_dir / CARD)  # replaces PEFT's empty one
            print(f"Saved to {self.output_dir}", flush=True)
        self.accelerator.end_training()
        return result if self.accelerator.is_main_process else None


def digest_questions(predictions: list[Prediction]) -> str:
    """A hash of questions and references."""
    asked = [(prediction.question, prediction.answer) for prediction in predictions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
