"""Who is asked what, in which order: fills a `Store`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from vllm_kvcompress.bench.quality.ask import Answer, Answerer, Ask, Prompt, held_tokens
from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.rows import Outcome, Row
from vllm_kvcompress.bench.quality.scoring import score
from vllm_kvcompress.bench.quality.show import so_far
from vllm_kvcompress.bench.quality.store import Store
from vllm_kvcompress.presets import OFF, Preset

CASES_AT_ONCE = 16


@dataclass(frozen=True)
class Phase:
    """Rows that one answerer answers; it is opened when there is something left to ask."""

    rows: Sequence[Row]
    open: Callable[[], Answerer]


@dataclass(frozen=True)
class Plan:
    """All that a run asks.

    modes: question seen (False), unseen (True), or both.
    """

    cases: Sequence[Case]
    prompts: Mapping[str, Prompt]
    modes: Sequence[bool]
    block_tokens: int
    presets: Mapping[str, Preset]

    def ask(self, case: Case, row: Row, unseen: bool) -> Ask | None:
        """None where the row's budget cannot be reached."""
        prompt = self.prompts[case.key]
        question = prompt.question_tokens if unseen else 0
        context = len(prompt.token_ids) - question
        if row.budget is None:
            return Ask(prompt, OFF, question, context)
        held = held_tokens(context, row.budget, self.block_tokens, self.presets.get(row.policy))
        if row.kind == "peer" and held is None:
            held = max(1, int(row.budget * context))
        return None if held is None else Ask(prompt, row.policy, question, held)


def run(plan: Plan, phases: Sequence[Phase], store: Store) -> dict[str, str]:
    """Ask what is not in the store yet, phase by phase.

    Returns:
        Why a policy could not run, for phases whose answerer would not open.

    Raises:
        BenchError: an answerer that had begun, or the disk, gave up.
    """
    absent = {}
    for phase in phases:
        todo = list(_todo(plan, phase.rows, store))
        label = ", ".join(dict.fromkeys(row.policy for row in phase.rows))
        if not todo:
            continue
        with tqdm(total=len(todo), desc=label[:40], unit="answer") as bar:
            try:
                answerer = phase.open().__enter__()
            except CannotOpen as error:
                absent |= {row.policy: str(error) for row in phase.rows}
                continue
            try:
                _ask_all(plan, todo, answerer, store, bar)
            finally:
                answerer.__exit__(None, None, None)
    return absent


class CannotOpen(Exception):
    """This row cannot be had here, and why; the others can."""


_Todo = tuple[Case, Row, bool]


def _todo(plan: Plan, rows: Sequence[Row], store: Store) -> Iterator[_Todo]:
    for case in plan.cases:
        asked = {(row, row.asks_unseen(unseen)): None for unseen in plan.modes for row in rows}
        for row, unseen in asked:
            if (case.key, row.key, unseen) not in store.outcomes:
                yield case, row, unseen


def _ask_all(
    plan: Plan, todo: Sequence[_Todo], answerer: Answerer, store: Store, bar: "tqdm[None]"
) -> None:
    scores: dict[str, list[float]] = {}
    size = CASES_AT_ONCE * len({(row, unseen) for _, row, unseen in todo})
    for part in (todo[start : start + size] for start in range(0, len(todo), size)):
        asks = [plan.ask(*each) for each in part]
        answers = answerer.answers([ask for ask in asks if ask is not None])
        for (case, row, unseen), ask in zip(part, asks, strict=True):
            if ask is None:
                store.add(Outcome(case.key, row.key, unseen, held_share=None))
            else:
                outcome = _outcome(case, row, unseen, ask, next(answers))
                store.add(outcome)
                scores.setdefault(row.key, []).append(outcome.score)
            bar.update()
        bar.set_postfix_str(so_far(scores))


def _outcome(case: Case, row: Row, unseen: bool, ask: Ask, answer: Answer) -> Outcome:
    held = ask.held_tokens if answer.held_tokens is None else answer.held_tokens
    return Outcome(
        case.key,
        row.key,
        unseen,
        answer.text,
        0.0 if answer.error else score(case, answer.text),
        held / ask.context_tokens,
        answer.error,
    )
