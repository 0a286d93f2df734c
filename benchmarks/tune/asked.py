"""What a sweep is asked to do."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vllm_kvcompress.bench.engine import MODEL
from vllm_kvcompress.bench.harness import model_name
from vllm_kvcompress.presets import Preset, load_preset, shipped_presets


@dataclass(frozen=True)
class Asked:
    """What a user asked for, and what follows from it.

    preset_name: of a shipped preset, or the file of one.
    tasks: of `bench quality`; when empty, needles that the model can read.
    block_tokens: B.
    dtype, threads: empty and 0 for what suits model and machine.
    """

    model: str
    preset_name: str
    tasks: Sequence[str]
    length: int
    n: int
    seed: int
    block_tokens: int
    dtype: str
    threads: int

    @cached_property
    def preset(self) -> Preset:
        """As it serves needles, whose answers stand in one place of the prompt.

        Raises:
            ValueError: `preset_name` is neither a shipped preset nor the file of one.
        """
        shipped = shipped_presets()
        named = shipped.get(self.preset_name) or load_preset(self.preset_name)
        return named.for_task("localization") if named.tasks else named

    @property
    def budget(self) -> float:
        """Share of a prompt that the preset holds."""
        if self.preset.budget_tokens is not None:
            return min(1.0, self.preset.budget_tokens / self.length)
        return 1 / self.preset.rate

    @property
    def own_tasks(self) -> Sequence[str]:
        return self.tasks or ["needle" if self.model == str(MODEL) else "niah-number"]

    @property
    def engine_dtype(self) -> str:
        return self.dtype or ("float32" if self.model == str(MODEL) else "auto")

    @property
    def engine_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    def subject(self) -> dict[str, object]:
        """What must be equal for answers of an earlier run to count."""
        return {
            "model": model_name(self.model),
            "dtype": self.engine_dtype,
            "block_tokens": self.block_tokens,
            "preset": self.preset.model_dump(mode="json"),
        }
