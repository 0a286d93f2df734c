"""What the two generations of vLLM's model runner offer, asked in one way.

They are told apart by what they have, not by a version. Neither is changed: the first keeps its
batch in `input_batch` and its requests in `requests`, the second hands each step's batch to the
`prepare_attn` of its model state.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from vllm_kvcompress.engine.stats import WorkerStats

FULL = frozenset({CUDAGraphMode.FULL})
ANY = frozenset({CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE})


class Runner(ABC):
    """A model runner as the worker sees it."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    @abstractmethod
    def begin_step(self, step: SchedulerOutput) -> None:
        """Follow a step whose arenas have been taken off."""

    @abstractmethod
    def request_ids(self, num_reqs: int) -> Sequence[str]:
        """The batch's requests, row by row; padding rows have none."""

    @abstractmethod
    def block_ids(self, request_id: str) -> list[int]:
        """Natural block ids of a request, arena excluded."""

    @abstractmethod
    def without_graphs(self, barred: Set[CUDAGraphMode]) -> AbstractContextManager[None]:
        """Keep the steps inside out of captured graphs: those of attention (`FULL`) or `ANY`."""

    @abstractmethod
    def send(self, stats: WorkerStats) -> None:
        """Report with the step's output; a connector's own statistics ride along.

        They do so in every step, for vLLM adds up ranks' statistics of one type only.
        """

    @abstractmethod
    def complete(self, output: Any) -> None:
        """Add to a step's output, in place, what is still to be reported."""


class FirstRunner(Runner):
    """`vllm.v1.worker.gpu_model_runner.GPUModelRunner` and its CPU subclass."""

    def begin_step(self, step: SchedulerOutput) -> None:
        """It keeps its own account."""

    def request_ids(self, num_reqs: int) -> Sequence[str]:
        return self._runner.input_batch.req_ids[:num_reqs]

    def block_ids(self, request_id: str) -> list[int]:
        return self._runner.requests[request_id].block_ids[0]

    def without_graphs(self, barred: Set[CUDAGraphMode]) -> AbstractContextManager[None]:
        dispatcher = self._runner.cudagraph_dispatcher
        original = dispatcher.dispatch

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            modes = set(kwargs.pop("invalid_modes", None) or ()) | barred
            return original(*args, **kwargs, invalid_modes=modes)

        return _dispatching(dispatcher, dispatch)

    def send(self, stats: WorkerStats) -> None:
        self._runner.kv_connector_output = _around(self._runner.kv_connector_output, stats)

    def complete(self, output: Any) -> None:
        """It has taken all with `kv_connector_output`."""


class SecondRunner(Runner):
    """`vllm.v1.worker.gpu.model_runner.GPUModelRunner` and its CPU subclass."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._request_ids: Sequence[str] = ()
        self._blocks: dict[str, list[int]] = {}
        self._stats = WorkerStats()
        state = runner.model_state
        state.prepare_attn = partial(self._prepare_attn, state.prepare_attn)

    def _prepare_attn(self, original: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        self._request_ids = input_batch.req_ids
        return original(input_batch, *args, **kwargs)

    def begin_step(self, step: SchedulerOutput) -> None:
        for request_id in (*step.finished_req_ids, *(step.preempted_req_ids or ())):
            self._blocks.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            self._blocks[new.req_id] = list(new.block_ids[0])
        cached = step.scheduled_cached_reqs
        for request_id, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self._blocks[request_id] = []
            if ids is not None:
                self._blocks[request_id] += ids[0]

    def request_ids(self, num_reqs: int) -> Sequence[str]:
        return self._request_ids[:num_reqs]

    def block_ids(self, request_id: str) -> list[int]:
        return self._blocks[request_id]

    def without_graphs(self, barred: Set[CUDAGraphMode]) -> AbstractContextManager[None]:
        if self._runner.dp_size > 1:
            # Ranks vote, then each dispatches again by the numbers of all: with graphs the others
            # might find one that is barred here.
            barred = ANY
        manager = self._runner.cudagraph_manager
        original = manager.dispatch

        def dispatch(num_reqs: int, num_tokens: int, *_: Any, **kwargs: Any) -> Any:
            """As for a batch with a prefill in it: neither uniform nor bounded."""
            found = original(
                num_reqs, num_tokens, None, kwargs["num_active_loras"], max_query_len=None
            )
            if found.cg_mode not in barred:
                return found
            mode = CUDAGraphMode.NONE
            return replace(found, cg_mode=mode, num_tokens=num_tokens, num_reqs=num_reqs)

        return _dispatching(manager, dispatch)

    def send(self, stats: WorkerStats) -> None:
        self._stats = stats

    def complete(self, output: Any) -> None:
        """The last rank's output comes with `model_runner_output`, the others' say nothing."""
        held = getattr(output, "model_runner_output", None)
        if held is not None:
            held.kv_connector_output = _around(held.kv_connector_output, self._stats)


def _around(output: KVConnectorOutput | None, stats: WorkerStats) -> KVConnectorOutput | None:
    """A connector's output whose statistics are ours, with the connector's own inside."""
    theirs = output.kv_connector_stats if output else None
    if theirs is None and stats.is_empty():
        return output
    both = replace(stats, connector=theirs)
    return replace(output or KVConnectorOutput(), kv_connector_stats=both)


@contextmanager
def _dispatching(owner: Any, dispatch: Any) -> Iterator[None]:
    """`owner.dispatch` is this one inside. Such blocks may stand in each other."""
    outer = vars(owner).get("dispatch")
    owner.dispatch = dispatch
    try:
        yield
    finally:
        if outer is None:
            del owner.dispatch
        else:
            owner.dispatch = outer


def runner_of(runner: Any) -> Runner:
    """The way to ask this model runner.

    Raises:
        ValueError: it offers neither what the first nor what the second generation does.
    """
    if hasattr(runner, "input_batch") and hasattr(runner, "requests"):
        return FirstRunner(runner)
    if hasattr(runner, "model_state") and hasattr(runner, "cudagraph_manager"):
        return SecondRunner(runner)
    raise ValueError(
        f"kv-compress knows no way to ask {type(runner).__module__}.{type(runner).__qualname__}; "
        "set VLLM_USE_V2_MODEL_RUNNER=0"
    )
