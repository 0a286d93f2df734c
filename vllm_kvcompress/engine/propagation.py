"""Token-selective propagation: layers above `tsp_layer` see only the selected tokens of a prompt.

    step       layers 0 .. t                       layers t+1 .. L-1
    chunk      all its tokens; hidden states       nothing
               go to the stash
    last chunk the same                            the selected tokens, from the stash, in slices
    others     as ever                             as ever, in a batch of their own

Around a step with such prompts the deep layers' `forward` is replaced; everything else of the
model and of the runner stays. Deep layers fill their first natural pages densely and put the
prompt's tail where it belongs, so that later tokens are written where vLLM expects them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.engine.compressor import Compressor, Span
from vllm_kvcompress.engine.stash import Stash
from vllm_kvcompress.engine.windows import Capture

Forward = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Tokens that go through a layer together, and what their attention wants to know."""

    positions: Tensor  # int64 [T']
    metadata: Any  # None: no tokens
    slots: Tensor  # [T'] where their keys and values go


@dataclass(frozen=True, slots=True)
class _Rest:
    """What stays in the batch once prompts have left it; the states of the others stand still."""

    tokens: Tensor  # int64 [T'], rows of the step's batch
    rows: _Rows
    hidden_states: Tensor  # [T, hidden] of the step's batch
    residual: Tensor

    def put_back(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The step's batch, with these states of the rest in it."""
        self.hidden_states[self.tokens], self.residual[self.tokens] = hidden_states, residual
        return self.hidden_states, self.residual


@dataclass(frozen=True, slots=True)
class _Slice:
    """Selected tokens `begin .. end` of one request, as the deep layers count them."""

    request_id: str
    begin: int
    end: int


class Propagation:
    """The deep layers of one worker's model.

    Args:
        model: its decoder layers' `forward` takes (positions, hidden_states, residual) and
            returns the latter two, and residual may be None.
        view: the step's batch and the metadata builder's input (`engine/worker.py`).
        slice_tokens: most selected tokens that go through the deep layers at once.
    """

    def __init__(
        self, model: Any, compressor: Compressor, view: Any, stash: Stash, slice_tokens: int
    ) -> None:
        self.stash = stash
        self._model = model
        self._layers: list[Any] = list(model.model.layers)
        self._names = [layer.self_attn.attn.layer_name for layer in self._layers]
        self._forwards: list[Forward] = [layer.forward for layer in self._layers]
        self._compressor = compressor
        self._view = view
        self._slice_tokens = slice_tokens
        self._leaving: dict[int, dict[str, Span]] = {}  # by the layer that they leave before
        self._rest: _Rest | None = None  # None: all are in the batch

    def begin_step(self, step: SchedulerOutput) -> None:
        """Drop the hidden states of requests that ended or were preempted."""
        for request_id in (*step.finished_req_ids, *(step.preempted_req_ids or ())):
            self.stash.release(request_id)
        for request_id in step.scheduled_cached_reqs.resumed_req_ids:
            self.stash.release(request_id)

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Replace the deep layers while a step with prompts in `propagating` runs.

        The model's compiled form, which has all layers in it, is passed by; of captured graphs
        the caller keeps the step out.
        """
        prompts = self._compressor.propagating
        if not prompts:
            yield
            return
        for request_id, span in prompts.items():
            layer = self._compressor.tsp_layer(request_id) + 1
            self._leaving.setdefault(layer, {})[request_id] = span
        deep = range(min(self._leaving), len(self._layers))
        uncompiled = self._model.register_forward_pre_hook(_pass_compiled_by)
        for layer in deep:
            self._layers[layer].forward = partial(self._deep_forward, layer)
        try:
            yield
        finally:
            for layer in deep:
                del self._layers[layer].forward
            uncompiled.remove()
            self._leaving, self._rest = {}, None

    def _deep_forward(
        self,
        layer: int,
        positions: Tensor,
        hidden_states: Tensor,
        residual: Tensor,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """A deep layer on what is still in the batch; after the last one the batch is whole again.

        `options`: what a model gives all its layers besides; handed on as it is.
        """
        if leaving := self._leaving.get(layer):
            if self._rest is not None:
                hidden_states, residual = self._rest.put_back(hidden_states, residual)
            self._leave(layer, leaving, hidden_states, residual, options)
            self._rest = self._without_prompts_below(layer, positions, hidden_states, residual)
            hidden_states = hidden_states[self._rest.tokens]
            residual = residual[self._rest.tokens]
        rest = self._rest
        assert rest is not None
        if rest.rows.metadata is not None:
            self._attend_as(layer, rest.rows)
            hidden_states, residual = self._forwards[layer](
                rest.rows.positions, hidden_states, residual, **options
            )
        if layer + 1 == len(self._layers):
            return rest.put_back(hidden_states, residual)
        return hidden_states, residual

    def _leave(
        self,
        layer: int,
        leaving: dict[str, Span],
        hidden_states: Tensor,
        residual: Tensor,
        options: dict[str, Any],
    ) -> None:
        """Take prompts out of the batch before `layer`; those that are complete go on selected."""
        starts = self._view.common.query_start_loc_cpu.tolist()
        last_rows: dict[str, int] = {}
        for row, request_id in enumerate(self._view.request_ids):
            if (span := leaving.get(request_id)) is None:
                continue
            tokens = slice(starts[row], starts[row + 1])
            n = self._compressor.plan_of(request_id).prompt_tokens
            states = hidden_states[tokens] + residual[tokens]
            self.stash.put(request_id, n, span[0], states)
            if sum(span) == n:
                last_rows[request_id] = starts[row + 1] - 1
        selected = {
            request_id: self._compressor.select(request_id, self._view.block_ids(request_id))
            for request_id in last_rows
        }
        for slices in self._sliced({name: len(chosen) for name, chosen in selected.items()}):
            outputs = self._go_on(layer, slices, selected, options)
            for part, output in zip(slices, outputs, strict=True):
                if part.end == len(selected[part.request_id]):
                    row = last_rows[part.request_id]
                    hidden_states[row], residual[row] = output
        for request_id in last_rows:
            self.stash.release(request_id)

    def _without_prompts_below(
        self, layer: int, positions: Tensor, hidden_states: Tensor, residual: Tensor
    ) -> _Rest:
        """The step's batch less the prompts that have left it by `layer`."""
        common, names = self._view.common, self._view.request_ids
        gone = {name for at, left in self._leaving.items() if at <= layer for name in left}
        own = [row for row, name in enumerate(names) if name not in gone]
        starts = common.query_start_loc_cpu.numpy()
        spans = [np.arange(starts[row], starts[row + 1]) for row in own]
        tokens = self._on_device(np.concatenate([np.arange(0), *spans]))
        slots, metadata = common.slot_mapping[tokens], None
        if own:
            rows = self._on_device(np.array(own))
            metadata = self._view.build(
                [names[row] for row in own],
                counts=[len(span) for span in spans],
                ends=common.seq_lens_cpu_upper_bound.numpy()[own],
                seq_lens=common.seq_lens[rows],
                block_table=common.block_table_tensor[rows],
                slots=slots,
            )
        return _Rest(tokens, _Rows(positions[tokens], metadata, slots), hidden_states, residual)

    def _sliced(self, selected: dict[str, int]) -> Iterator[list[_Slice]]:
        """All selected tokens in order, at most `slice_tokens` at a time."""
        slices: list[_Slice] = []
        room = self._slice_tokens
        for request_id, count in selected.items():
            begin = 0
            while begin < count:
                end = min(count, begin + room)
                slices.append(_Slice(request_id, begin, end))
                room -= end - begin
                begin = end
                if not room:
                    yield slices
                    slices, room = [], self._slice_tokens
        if slices:
            yield slices

    def _go_on(
        self,
        layer: int,
        slices: list[_Slice],
        selected: dict[str, Tensor],
        options: dict[str, Any],
    ) -> list[tuple[Tensor, Tensor]]:
        """Run selected tokens through `layer ..`; the last token's output of each slice."""
        chosen = [selected[s.request_id][s.begin : s.end] for s in slices]
        hidden_states = torch.cat(
            [self.stash.get(s.request_id, own) for s, own in zip(slices, chosen, strict=True)]
        )
        residual: Any = None
        rows = self._rows_of(slices, selected, torch.cat(chosen))
        for deep in range(layer, len(self._layers)):
            self._attend_as(deep, rows)
            hidden_states, residual = self._forwards[deep](
                rows.positions, hidden_states, residual, **options
            )
        ends = list(accumulate(s.end - s.begin for s in slices))
        return [(hidden_states[end - 1], residual[end - 1]) for end in ends]

    def _rows_of(
        self, slices: list[_Slice], selected: dict[str, Tensor], positions: Tensor
    ) -> _Rows:
        page_tokens = self._compressor.pool.page_tokens
        captures, tables, slots, start = [], [], [], 0
        for part in slices:
            plan = self._compressor.plan_of(part.request_id)
            natural = np.array(self._view.block_ids(part.request_id))
            m = len(selected[part.request_id])
            full = plan.prompt_tokens // page_tokens
            tail = natural[full : full + (m % page_tokens > 0)]
            blocks = np.concatenate([natural[: m // page_tokens], tail])
            token = np.arange(part.begin, part.end)
            slots.append(blocks[token // page_tokens] * page_tokens + token % page_tokens)
            tables.append(blocks)
            window = self._compressor.window_of(part.request_id)
            window_start = m - (window.end - window.start)
            begin = max(part.begin, window_start)
            if (count := part.end - begin) > 0:
                row = start + begin - part.begin
                captures.append(Capture(window, begin - window_start, row, count))
            start += part.end - part.begin
        ends = np.array([s.end for s in slices], dtype=np.int32)
        table = np.zeros((len(slices), max(map(len, tables))), dtype=np.int32)
        for row, blocks in zip(table, tables, strict=True):
            row[: len(blocks)] = blocks
        written = self._on_device(np.concatenate(slots))
        metadata = self._view.build(
            [],
            counts=[s.end - s.begin for s in slices],
            ends=ends,
            seq_lens=self._on_device(ends),
            block_table=self._on_device(table),
            slots=written,
            captures=captures,
        )
        return _Rows(positions, metadata, written)

    def _attend_as(self, layer: int, rows: _Rows) -> None:
        """Let one layer's attention see these rows instead of the step's."""
        context = get_forward_context()
        context.attn_metadata[self._names[layer]] = rows.metadata
        context.slot_mapping[self._names[layer]] = rows.slots

    def _on_device(self, array: np.ndarray) -> Tensor:
        return async_tensor_h2d(array, device=self._compressor.pool.device)


def _pass_compiled_by(model: Any, inputs: Any) -> None:
    get_forward_context().skip_compiled = True
