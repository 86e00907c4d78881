"""One method with one learning rate and one seed: built, trained and evaluated."""

import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainingArguments, set_seed

from benchmarks.environment import describe_machine, list_versions
from benchmarks.peak_memory import read_peak_memory, reset_peak_memory
from benchmarks.quality.initial_tokens import write_initial_text
from benchmarks.quality.method_results import DEV
from benchmarks.quality.methods import AppliedMethod, build_method
from benchmarks.quality.results_file import SETTING, Run
from benchmarks.quality.segment_scores import is_finite, score_records
from benchmarks.quality.tasks import Task


@dataclass
class Trial:
    """A model that a method was applied to, and what it is trained with.

    Attributes:
        method (`dict`): the method's settings in the experiment.
        learning_rate (`float`): of this trial.
        seed (`int`): of this trial.
        applied ([`AppliedMethod`]): the model with the method.
        task ([`Task`]): whose prompts may be the method's own.
        examples (`list`): the training set of the seed.
    """

    method: dict[str, Any]
    learning_rate: float
    seed: int
    applied: AppliedMethod
    task: Task
    examples: list[Any]

    def train(self, arguments: dict[str, Any]) -> Run:
        """Train the method.

        Args:
            arguments (`dict`): fields of `TrainingArguments`; the method's own take their place.

        Returns:
            `Run`: the method's settings, and what the training cost.
        """
        with tempfile.TemporaryDirectory() as directory:
            training_arguments = TrainingArguments(
                output_dir=directory,
                learning_rate=self.learning_rate,
                seed=self.seed,
                report_to="none",
                save_strategy="no",
                logging_steps=20,
                disable_tqdm=True,
                **(arguments | self.method.get("training", {})),
            )
            rows, collator = self.task.tokenize(self.examples), self.task.collator
            trainer = Trainer(self.applied.model, training_arguments, train_dataset=rows, data_collator=collator)
            reset_peak_memory()
            start = time.process_time()
            loss = trainer.train().training_loss
            seconds, peak = time.process_time() - start, read_peak_memory()
        return {name: self.method[name] for name in SETTING if name in self.method} | {
            "trainable_parameters": self.applied.count_parameters(),
            "adapter_bytes": self.applied.measure_bytes(),
            "train_loss": loss if is_finite(loss) else None,
            "train_cpu_seconds": round(seconds, 1),
            "peak_memory_mib": None if peak is None else peak // 2**20,
            "machine": describe_machine(),
            "versions": list_versions(),
        }


def build_trial(experiment: dict[str, Any], task: Task, name: str, learning_rate: float, seed: int) -> Trial:
    """Apply a method of an experiment to the base model of its task.

    Args:
        experiment (`dict`): see [`load_experiment`].
        task ([`Task`]): its task.
        name (`str`): of the method.
        learning_rate (`float`), seed (`int`): of the trial.

    Returns:
        [`Trial`]: ready to be trained.
    """
    method, init_text = experiment["methods"][name], experiment["task"].get("init_text", "")
    examples = task.draw_examples(seed)
    # A prefix that starts from examples starts from other ones for every seed.
    start = random.Random(seed).sample(examples, len(examples))
    if "prompt" in method:
        task = task.prompted(write_initial_text(method["prompt"], task.model, task.tokenizer, init_text, start))
    set_seed(seed)
    applied = build_method(
        method["peft_type"], method["config"], task.model, task.tokenizer, init_text, start, task.task_type
    )
    return Trial(method, learning_rate, seed, applied, task, examples)


def evaluate(applied: AppliedMethod, task: Task, evaluations: Iterable[str]) -> Run:
    """Measure a model on some evaluation sets.

    Args:
        applied ([`AppliedMethod`]): the model.
        task ([`Task`]): that has the sets.
        evaluations (`Iterable[str]`): their names.

    Returns:
        `Run`: its scores and records, and samples of `dev`; none of them if it has diverged.
    """
    evaluated: Run = {"diverged": False, "scores": {}, "records": {}}
    for name in evaluations:
        records, samples = task.evaluate(applied.model, name)
        if not is_finite(records["loss"]):
            return {"diverged": True, "scores": {}, "records": {}}
        evaluated["scores"][name] = score_records(records)
        evaluated["records"][name] = records
        if name == DEV:
            evaluated["samples"] = samples
    return evaluated
