"""Is the file the model? Asked of llama.cpp: the same ids, the same stops, the same rendered conversations, the same logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from exactune.errors import ArtefactError
from exactune.export.gguf import engine
from exactune.export.gguf.behaviour import agreement
from exactune.export.gguf.levels import activation_rounding
from exactune.export.gguf.plan import Plan
from exactune.export.gguf.rotation import as_in_llama_cpp, differs
from exactune.export.gguf.vocabulary import stop_ids
from exactune.export.template_guard import CONVERSATIONS, has_template, render
from exactune.export.verify import SLACK, Agreement, compare, logits_of, prompts_for, rounding_noise

_NOT_NAMED = "Such a file is not given its name."


@dataclasses.dataclass(frozen=True)
class Examiner:
    """Holds what the model in memory says to `prompts`, and compares files with it.

    `wanted`: its logits; `computable`: the same as far as llama.cpp can compute them (see `rotation`).
    """

    model: Any
    plan: Plan
    prompts: Sequence[Sequence[int]]
    wanted: Sequence[torch.Tensor]
    computable: Sequence[torch.Tensor]

    @classmethod
    def of(cls, model: Any, plan: Plan, held_out: Sequence[str]) -> Examiner:
        prompts = [ids[: plan.window] for ids in prompts_for(plan.tokenizer, plan.vocabulary_rows, plan.job.trained_ids(), held_out)]
        wanted = logits_of(model, prompts)
        with as_in_llama_cpp(plan.job.base):
            computable = logits_of(model, prompts) if differs(plan.job.base.config.get_text_config()) else wanted
        return cls(model, plan, prompts, wanted, computable)

    def prove(self, path: Path, level: str, weight_error: float, *, lora: Path | None = None) -> tuple[Agreement, float, int]:
        """Compare the file in llama.cpp with the model; returns the agreement, its bound on the relative error, and the checks passed.

        `weight_error`: ||rounded - exact|| / ||exact|| of the file's weights. `lora`: an adapter to put on the file.

        Raises:
            ArtefactError: says which check failed.
        """
        context = max(64, *(len(ids) for ids in self.prompts))
        with engine.opened(path, context=context, lora=lora) as loaded:
            checks = prove_behaviour(loaded, self.plan.tokenizer, self.plan.generation)
            found = engine.logits_of(loaded, self.prompts)
        result, judged = compare(found, self.wanted), compare(found, self.computable)
        bound = SLACK * rounding_noise(self.model, self.prompts, self.wanted, self._unit(level, weight_error))
        if not judged.relative_error <= bound:
            raise ArtefactError(
                f"Logits in llama.cpp are off by {judged.relative_error:.3g} (relative; KL {judged.kl:.3g}), where rounding to {level} "
                f"explains {bound:.3g}.",
                _NOT_NAMED,
            )
        # at coarse levels the bound grows past what would be noticed: the file must at least know more than nothing
        ignorant = compare([torch.zeros_like(logits) for logits in self.computable], self.computable).kl
        if not judged.kl < ignorant:
            raise ArtefactError(
                f"At {level} the file knows no more than chance: KL {judged.kl:.3g}, of a blank one {ignorant:.3g}.", _NOT_NAMED
            )
        return result, bound, checks + 1

    def _unit(self, level: str, weight_error: float) -> float:
        """The relative rounding that one product of the file is off by: its weights, llama.cpp's activations, the model's own dtype."""
        activations = max(activation_rounding(level, self.plan.family.float16_activation), self.plan.job.activation_rounding)
        computed_in = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return math.sqrt(3 * weight_error**2 + activations**2 + (torch.finfo(computed_in).eps / 2) ** 2)


def prove_behaviour(loaded: Any, tokenizer: Any, generation: Any) -> int:
    """Ask that the loaded file encodes, stops and renders as `tokenizer` does; returns how many checks were equal.

    Raises:
        ArtefactError: says which did not.
    """
    checks, fault = agreement(loaded, tokenizer)
    if fault:
        raise ArtefactError(f"Tokenisation in llama.cpp differs: {fault}.", _NOT_NAMED)
    for index in stop_ids(generation, tokenizer):
        checks += 1
        if not engine.is_stop(loaded, index):
            token = tokenizer.convert_ids_to_tokens(index)
            raise ArtefactError(f"llama.cpp would not stop at {token!r}, at which the model's generation ends.", _NOT_NAMED)
    return checks + _same_template(loaded, tokenizer)


def _same_template(loaded: Any, tokenizer: Any) -> int:
    if not has_template(tokenizer):
        return 0
    if "tokenizer.chat_template" not in loaded.metadata:
        raise ArtefactError("The file has no chat template, and the model has one.", _NOT_NAMED)
    for name, conversation in CONVERSATIONS.items():
        wanted = render(tokenizer, *conversation)
        try:
            found = engine.render(loaded, *conversation)
        except Exception as error:  # a template refuses with whatever it likes; then the original has to refuse as well
            found = f"<the template refuses: {error}>"
        refused = wanted.startswith("<the template refuses") and found.startswith("<the template refuses")
        if found != wanted and not refused:
            raise ArtefactError(f"The file's chat template renders {name!r} as {found!r}, not {wanted!r}.", _NOT_NAMED)
    return len(CONVERSATIONS)
