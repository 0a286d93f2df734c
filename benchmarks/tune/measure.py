"""Runs a sweep: reads prompts for the overlap, then asks the engine once per candidate."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.quality.ask import Prompt
from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.encode import LocalEncoder, encoded
from vllm_kvcompress.bench.quality.phases import Options, Policies, phases
from vllm_kvcompress.bench.quality.rows import PLAIN, Row, cells
from vllm_kvcompress.bench.quality.run import Plan, run
from vllm_kvcompress.bench.quality.store import Store
from vllm_kvcompress.bench.quality.tasks import make_cases
from vllm_kvcompress.bench.tune.asked import Asked
from vllm_kvcompress.bench.tune.reading import Reader
from vllm_kvcompress.bench.tune.show import Tried, tried
from vllm_kvcompress.bench.tune.sweeps import Sweep, overlaps

READ = 16  # prompts, for the overlap
AT_ONCE = 64


class Cases:
    """The needles of a run, as text and as tokens.

    Raises:
        BenchError: there is no such model, or no case fits into its context.
        ValueError: an unknown task, or a length too short for it.
    """

    def __init__(self, asked: Asked) -> None:
        encoder = LocalEncoder(asked.model)
        made = make_cases(
            asked.own_tasks,
            [asked.length],
            [],
            asked.n,
            asked.seed,
            lambda text: len(encoder.plain_ids(text, False)),
        )
        self.cases: list[Case]
        self.prompts: Mapping[str, Prompt]
        self.cases, self.prompts, self.longest = encoded(made, encoder)
        if not self.cases:
            raise BenchError("no prompt fits into the model's context: give a shorter --length")


def layers_of(model: str) -> int:
    """Raises BenchError where the model cannot be read."""
    try:
        return int(AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers)
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot load {model!r}: {str(error).splitlines()[0]}") from None


def read_overlaps(asked: Asked, sweep: Sweep, found: Cases) -> Tensor:
    """`sweeps.overlaps`, averaged over some prompts spread over the cases."""
    torch.set_num_threads(asked.engine_threads)
    reader = Reader(asked.model, asked.engine_dtype)
    some = found.cases[:: max(1, len(found.cases) // READ)][:READ]
    seen = []
    for case in tqdm(some, desc="overlap of selections", unit="prompt"):
        layers = reader.read(found.prompts[case.key].token_ids, asked.preset.window_tokens)
        chosen = [sweep.choose(obs, layer) for layer, obs in enumerate(layers)]
        seen.append(overlaps(chosen).cpu())
    return torch.stack(seen).mean(dim=0)


def try_all(
    asked: Asked, sweep: Sweep, found: Cases, agree: Tensor, answers: Path, fresh: bool
) -> list[Tried]:
    """Every candidate, and the full cache, asked the same prompts in the running engine.

    Args:
        agree: from `read_overlaps`.
        answers: a file where they are kept; what is in it already is not asked again.

    Raises:
        BenchError: the engine cannot start, or there is nothing to compare.
    """
    candidates = sweep.candidates()
    presets = {each.label: each.of(asked.preset) for each in candidates}
    named = {preset.name: preset for preset in presets.values()}
    options = Options(
        model=asked.model,
        dtype=asked.engine_dtype,
        threads=asked.engine_threads,
        at_once=AT_ONCE,
        block_tokens=asked.block_tokens,
        policies=Policies([asked.budget], named, named),
    )
    plan = Plan(found.cases, found.prompts, [False], asked.block_tokens, named)
    todo = phases(options, None, found.longest)
    with Store(answers, asked.subject(), fresh) as store:
        run(plan, todo, store)
        outcomes = list(store.outcomes.values())
    plain = Row(PLAIN, "plain")
    out = []
    for each in candidates:
        rows = [plain, Row(presets[each.label].name, "preset", asked.budget)]
        out.append(tried(each, agree, cells(found.cases, rows, [False], outcomes, {})))
    if not all(each.against_full for each in out):
        raise BenchError(
            f"pages of {asked.block_tokens} tokens cannot hold {asked.budget:.1%} of prompts of "
            f"{asked.length} tokens: give a longer --length"
        )
    if not out[0].full:
        raise BenchError("the model answers none of these prompts with its full cache")
    return out
