"""GRPO (https://arxiv.org/abs/2402.03300): the model's own answers, each compared with others to the same prompt by its rewards."""

from __future__ import annotations

import time
from types import MappingProxyType
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from exactune.data import Prepared, Rows
from exactune.data.prompts import prepare_prompts
from exactune.errors import ConfigError
from exactune.evaluate import Sample
from exactune.infer import generate
from exactune.train.objectives.base import Objective
from exactune.train.reference import drop_reference_copy
from exactune.train.rewards import reward_function
from exactune.train.run_folder import RunFolder
from exactune.train.scores import RewardScores
from exactune.train.trainer import InRunFolder


class PolicyTrainer(InRunFolder, GRPOTrainer):
    """TRL's GRPO trainer in a run folder."""

    token_masks = ("prompt_mask", "completion_mask")

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        drop_reference_copy(self)


class GRPO(Objective):
    """Earn rewards."""

    uses = ("beta", "reward_functions", "reward_weights", "num_generations", "max_completion_length", "temperature")
    asks_and_answers = True
    curve = MappingProxyType({"value": "reward", "label": "mean reward"})

    def check(self) -> None:
        super().check()
        config = self.config
        if not config.reward_functions:
            raise ConfigError(
                "objective grpo needs something to reward.", "Set reward_functions: valid_json, exact_match, or FILE.py:FUNCTION."
            )
        self.functions = [reward_function(name) for name in config.reward_functions]
        if config.reward_weights and len(config.reward_weights) != len(self.functions):
            raise ConfigError(
                f"reward_functions has {len(self.functions)} entries and reward_weights {len(config.reward_weights)}.", "Give one for each."
            )
        answers = config.per_device_train_batch_size * config.gradient_accumulation_steps
        if answers % config.num_generations:
            raise ConfigError(
                f"An update has {answers} answers (per_device_train_batch_size x gradient_accumulation_steps), which num_generations "
                f"{config.num_generations} does not divide.",
                "Let each prompt of an update have all of its answers in it.",
            )
        if config.max_completion_length >= config.max_seq_length:
            raise ConfigError(
                f"max_completion_length {config.max_completion_length} leaves no prompt room in max_seq_length {config.max_seq_length}.",
                "Lower the one, or raise the other.",
            )

    @property
    def weights(self) -> list[float]:
        return self.config.reward_weights or [1.0] * len(self.functions)

    def prepare(self, rows: Rows, tokenizer: Any) -> Prepared:
        config = self.config
        room = config.max_seq_length - config.max_completion_length
        return prepare_prompts(rows, tokenizer, max_length=room, format=config.format, skip_bad_rows=config.skip_bad_rows)

    def trainer(self, run: RunFolder, model: Any, tokenizer: Any, rows: Prepared, held_out: Prepared | None, callbacks: list[Any]) -> Any:
        config = self.config
        arguments = GRPOConfig(
            **self.common_arguments(run, model) | {"include_num_input_tokens_seen": "no"},
            beta=config.beta or 0.0,
            num_generations=config.num_generations,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            reward_weights=self.weights,
            # One generation for one update: the answers are the present model's own.
            steps_per_generation=config.gradient_accumulation_steps,
        )
        return PolicyTrainer(
            **self.run_arguments(run, model, tokenizer, held_out),
            model=model,
            reward_funcs=self.functions,
            args=arguments,
            train_dataset=rows.dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def watch(self, model: Any, tokenizer: Any, held_out: Prepared) -> dict[str, float]:
        return {"eval_reward": self.score(model, tokenizer, held_out).reward}

    def score(self, model: Any, tokenizer: Any, held_out: Prepared) -> RewardScores:
        config, start = self.config, time.perf_counter()
        rows = held_out.rows[: config.generate_rows] if config.generate_rows else held_out.rows
        prompts = [row["prompt"] for row in rows]
        batch = config.per_device_eval_batch_size
        answers = generate(model, tokenizer, prompts, max_new_tokens=config.max_completion_length, batch_size=batch)
        completions = [[{"role": "assistant", "content": answer}] for answer in answers]
        columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
        means = {}
        for name, function in zip(config.reward_functions, self.functions, strict=True):
            given = function(prompts=prompts, completions=completions, **columns)
            known = [value for value in given if value is not None]
            means[name] = sum(known) / len(known) if known else 0.0
        samples = [Sample(str(row["prompt"][-1]["content"]), str(row.get("answer", "")), answer) for row, answer in zip(rows, answers)]
        total = sum(weight * mean for weight, mean in zip(self.weights, means.values(), strict=True))
        return RewardScores(total, means, len(rows), samples[:8], time.perf_counter() - start)

    def scores_from(self, values: dict[str, Any]) -> RewardScores:
        return RewardScores(**{**values, "samples": [Sample(**sample) for sample in values["samples"]]})

    def rows_unit(self) -> str:
        return "answers"
