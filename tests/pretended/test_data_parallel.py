"""Data-parallel ranks agree on graphs and padding, also where one of them keeps queries aside."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine.engines import DEMO_MODEL
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker import dp_utils as first_dp
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu import dp_utils as second_dp
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_kvcompress.engine.runners import FULL, FirstRunner, SecondRunner

BOTH = CUDAGraphMode.FULL_AND_PIECEWISE
SIZES = [1, 2, 4, 8, 16]


@pytest.fixture
def vllm_config():
    args = EngineArgs(
        model=DEMO_MODEL,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        data_parallel_size=2,
        compilation_config={"cudagraph_capture_sizes": SIZES, "cudagraph_mode": BOTH},
    )
    return args.create_engine_config()


def votes(monkeypatch, module, ask) -> tuple:
    """What both ranks come to, when each is asked with the other's vote; `ask(rank)`.

    The first round only collects the votes, the second hands them out.
    """
    cast = {}

    def all_reduce(tensor, group=None):
        cast.setdefault(rank, tensor[:, rank].clone())
        for other, vote in cast.items():
            tensor[:, other] = vote

    monkeypatch.setattr(module.dist, "all_reduce", all_reduce)
    group = SimpleNamespace(device=torch.device("cpu"), device_group=None, cpu_group=None)
    monkeypatch.setattr(module, "get_dp_group", lambda: group)
    for _ in range(2):
        found = []
        for rank in range(2):
            found.append(ask(rank))
    return tuple(found)


@pytest.mark.parametrize("tokens", [(2, 5), (5, 2), (1, 1), (8, 8)])
def test_the_second_runners_ranks_agree(tokens, vllm_config, monkeypatch):
    """All decode one token a request, and the first rank keeps queries aside."""
    monkeypatch.setattr(
        cudagraph_utils,
        "get_pp_group",
        lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True),
    )
    managers = [
        cudagraph_utils.CudaGraphManager(vllm_config, torch.device("cpu"), BOTH, 1)
        for _ in range(2)
    ]
    for manager in managers:
        manager._graphs_captured = True

    def ask(rank):
        count = tokens[rank]
        return second_dp.dispatch_cg_and_sync_dp(
            managers[rank], count, count, 1, 2, rank, max_query_len=1
        )

    graphs = votes(monkeypatch, second_dp, ask)
    assert [batch.cg_mode for batch, _ in graphs] == [CUDAGraphMode.FULL] * 2
    runner = SimpleNamespace(
        model_state=SimpleNamespace(prepare_attn=None), cudagraph_manager=managers[0], dp_size=2
    )
    with SecondRunner(runner).without_graphs(FULL):
        kept_out = votes(monkeypatch, second_dp, ask)
    for rank, (batch, agreed) in enumerate(kept_out):
        assert batch.cg_mode == CUDAGraphMode.NONE and batch.num_tokens == tokens[rank]
        assert agreed.eager and agreed.num_tokens_across_dp.tolist() == list(tokens)


@pytest.mark.parametrize("tokens", [(2, 5), (5, 2), (1, 1), (8, 8)])
def test_the_first_runners_ranks_agree(tokens, vllm_config, monkeypatch):
    vllm_config.parallel_config.disable_nccl_for_dp_synchronization = True
    dispatchers = [CudagraphDispatcher(vllm_config) for _ in range(2)]
    for dispatcher in dispatchers:
        dispatcher.initialize_cudagraph_keys(BOTH, 1)

    def ask(rank):
        vllm_config.parallel_config.data_parallel_rank = rank
        count = tokens[rank]
        runner = SimpleNamespace(
            _is_uniform_decode=GPUModelRunner._is_uniform_decode,
            uniform_decode_query_len=1,
            model_config=vllm_config.model_config,
            input_batch=SimpleNamespace(lora_id_to_lora_request={}),
            cudagraph_dispatcher=dispatchers[rank],
            vllm_config=vllm_config,
            parallel_config=vllm_config.parallel_config,
        )
        mode, batch, ubatch, across, _ = GPUModelRunner._determine_batch_execution_and_padding(
            runner, count, count, np.ones(count, dtype=np.int32), 1
        )
        return mode, batch.num_tokens, ubatch, across.tolist()

    padded = next(size for size in SIZES if size >= max(tokens))
    full = votes(monkeypatch, first_dp, ask)
    assert full == ((CUDAGraphMode.FULL, padded, False, [padded] * 2),) * 2
    with FirstRunner(SimpleNamespace(cudagraph_dispatcher=dispatchers[0])).without_graphs(FULL):
        kept_out = votes(monkeypatch, first_dp, ask)
    assert kept_out == ((CUDAGraphMode.PIECEWISE, padded, False, [padded] * 2),) * 2
