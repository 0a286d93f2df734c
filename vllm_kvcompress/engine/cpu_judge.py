"""The judge where the pages are a CPU's: the kernel for attention scores all layers at once."""

from typing import Any

from torch import Tensor

from vllm_kvcompress.engine.candidates import Candidates
from vllm_kvcompress.engine.cpu_kernels import CPUKernels
from vllm_kvcompress.engine.kernel_judge import KernelJudge
from vllm_kvcompress.engine.windows import QueryWindow
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.policy import Policy


class CPUJudge(KernelJudge):
    """Scores by the kernels of csrc/cpu."""

    def __init__(self, *args: Any, kernels: CPUKernels) -> None:
        super().__init__(*args)
        self._kernels = kernels

    def scores(self, policy: Policy, candidates: Candidates, window: QueryWindow | None) -> Tensor:
        scorer, alike = policy.scorer, type(candidates) is Candidates and policy.group_layers == 1
        if not alike or type(scorer) is not AttentionScorer or window is None:
            return super().scores(policy, candidates, window)
        return self._kernels.score(
            scorer,
            window.layers(self._pool.num_heads),
            window.positions(),
            candidates.pages,
            candidates.valid,
            candidates.positions,
            self._scale,
        )

    def _attention(
        self,
        scorer: AttentionScorer,
        candidates: Candidates,
        pages: Tensor,
        queries: Tensor,
        window: QueryWindow,
    ) -> Tensor:
        where, valid = candidates.positions, candidates.valid
        return self._kernels.score(
            scorer,
            queries[None],
            window.positions(),
            pages[None],
            None if valid is None else valid[None],
            where if where.dim() == 1 else where[None],
            self._scale,
        )[0]
