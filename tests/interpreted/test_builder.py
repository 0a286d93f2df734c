"""What a step's metadata promises CUDA graphs: fixed addresses, and nobody waits for the device."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from interpreted.device import NoWaiting
from kernels.caches import noise
from vllm.config import CUDAGraphMode
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_kvcompress.config import EngineConfig, parse_engine_config
from vllm_kvcompress.engine.attention.triton import TritonEngine
from vllm_kvcompress.engine.candidates import Candidates
from vllm_kvcompress.engine.device import HeadPathBuilder
from vllm_kvcompress.engine.device_batch import Scratch
from vllm_kvcompress.engine.device_compressor import DeviceCompressor
from vllm_kvcompress.engine.device_judge import DeviceJudge
from vllm_kvcompress.engine.device_worker import DeviceWorker
from vllm_kvcompress.engine.judge import Judge
from vllm_kvcompress.engine.propagation import Propagation
from vllm_kvcompress.engine.runners import ANY, FULL, FirstRunner, SecondRunner, runner_of
from vllm_kvcompress.engine.stash import Stash
from vllm_kvcompress.engine.stats import WorkerStats
from vllm_kvcompress.engine.windows import QueryWindow
from vllm_kvcompress.engine.worker import StepView
from vllm_kvcompress.kernels import attend_pages_reference, split_pages
from vllm_kvcompress.paging.pool import PageFormat, PagePool
from vllm_kvcompress.policy.propagators import AttentionPropagator
from vllm_kvcompress.transport.stats import CacheGenStats

LAYERS, HEADS, GROUP, SIZE, B, BLOCKS, WIDTH, ROWS = 2, 2, 2, 16, 16, 24, 6, 4


class VllmBuilder:
    """What vLLM's own builders do that matters here."""

    def __init__(self, mode):
        self.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode))

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        return AttentionCGSupport.ALWAYS

    def build(self, common_prefix_len, common, fast_build=False):
        return SimpleNamespace(seq_lens=common.seq_lens, block_table=common.block_table_tensor)


class Builder(HeadPathBuilder, VllmBuilder):
    pass


@pytest.fixture
def batch():
    """Rows a, b, c of a runner with persistent buffers; a and c are compressed on demand."""
    cache = noise(BLOCKS, LAYERS, HEADS, B, 2 * SIZE)
    pool = PagePool([cache[:, layer] for layer in range(LAYERS)], PageFormat.by_token(B, SIZE))
    judge = DeviceJudge(EngineConfig(), pool, SIZE**-0.5)
    compressor = DeviceCompressor(EngineConfig(), pool, judge, ROWS, WIDTH)
    compressor._in_step = True
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=["a", "b", "c"]), requests={}, attn_groups=[]
    )
    builder = Builder(CUDAGraphMode.FULL_DECODE_ONLY)
    builder.step_view = StepView(compressor, runner_of(runner), [])
    builder.scratch = Scratch(ROWS, HEADS, WIDTH, pool.device)
    seq_lens = torch.zeros(ROWS, dtype=torch.int32)
    table = torch.arange(ROWS * WIDTH, dtype=torch.int32).view(ROWS, WIDTH) % (BLOCKS - 2)
    return SimpleNamespace(
        pool=pool, compressor=compressor, builder=builder, seq_lens=seq_lens, table=table
    )


def common(batch, counts) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    rows = len(counts)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=batch.seq_lens[:rows],
        num_reqs=rows,
        num_actual_tokens=sum(counts),
        max_query_len=max(counts),
        max_seq_len=WIDTH * B,
        block_table_tensor=batch.table[:rows],
        slot_mapping=torch.zeros(sum(counts), dtype=torch.int64),
    )


def compress(batch, request_id, block, tail_block) -> None:
    pages = torch.tensor([[1, 2], [1, 0]])
    arena = torch.tensor([block])
    batch.compressor.tables.enter(request_id, pages, arena, tail_block * B)


def attended(batch, heads, layer=0):
    query = noise(ROWS, HEADS * GROUP, SIZE, seed=5)
    output = torch.full_like(query, torch.nan)
    impl = SimpleNamespace(scale=SIZE**-0.5, logits_soft_cap=0.0)
    heads.attend(impl, TritonEngine(), batch.pool, layer, query, output)
    return output


def test_a_captured_step_follows_later_ones(batch):
    batch.seq_lens[:] = 1
    batch.builder.step_view._runner._runner.input_batch.req_ids = []  # a dummy run
    captured = batch.builder.build(0, common(batch, [1] * ROWS)).kv_compress
    assert captured.everything and captured.heads.slots.tolist() == [-1] * ROWS
    batch.builder.step_view._runner._runner.input_batch.req_ids = ["a", "b", "c"]
    compress(batch, "a", BLOCKS - 1, 3)
    compress(batch, "c", BLOCKS - 2, 2)
    batch.seq_lens[:] = torch.tensor([60, 50, 40, 0])
    with NoWaiting():
        step = batch.builder.build(0, common(batch, [1, 1, 1, 0])).kv_compress
    for name in ("slots", "block_table", "seq_lens"):
        now, then = getattr(step.heads, name), getattr(captured.heads, name)
        assert now.data_ptr() == then.data_ptr() and now.shape == then.shape
    slots = batch.compressor.tables.slot
    assert step.heads.slots.tolist() == [slots("a"), -1, slots("c"), -1]
    replayed = attended(batch, captured.heads)
    torch.testing.assert_close(replayed, attended(batch, step.heads), rtol=0, atol=0)
    assert replayed[3].eq(0).all(), "padding"
    kept_and_tail = [[BLOCKS * 4 - 4, 4 * 3], [BLOCKS * 4 - 3, BLOCKS * 4 - 2, 4 * 3 + 1]]
    for head, pages in enumerate(kept_and_tail):
        want = attend_pages_reference(
            noise(ROWS, HEADS * GROUP, SIZE, seed=5).view(ROWS, HEADS, GROUP, SIZE)[:1, head],
            *split_pages(batch.pool.cache),
            torch.tensor([pages], dtype=torch.int32),
            torch.tensor([(len(pages) - 1) * B + 60 - 3 * B], dtype=torch.int32),
            SIZE**-0.5,
        )
        got = replayed.view(ROWS, HEADS, GROUP, SIZE)[:1, head].double()
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_a_step_in_which_nothing_changed_copies_nothing(batch, monkeypatch):
    compress(batch, "a", BLOCKS - 1, 3)
    copies = []
    original = "vllm_kvcompress.engine.device_batch.async_tensor_h2d"
    monkeypatch.setattr(
        original, lambda data, out: copies.append(out.copy_(torch.from_numpy(data)))
    )
    for _ in range(3):
        batch.builder.build(0, common(batch, [1, 1, 1]))
    assert len(copies) == 1
    batch.compressor.tables.remove("a")
    batch.builder.build(0, common(batch, [1, 1, 1]))
    assert len(copies) == 2


def test_a_mixed_step_stubs_compressed_rows_and_waits_for_nobody(batch):
    compress(batch, "b", BLOCKS - 1, 2)
    batch.seq_lens[:] = torch.tensor([20, 45, 30, 0])
    with NoWaiting():
        metadata = batch.builder.build(0, common(batch, [7, 2, 1]))
    step = metadata.kv_compress
    assert not step.everything and metadata.seq_lens.tolist() == [20, 2, 30]
    assert step.heads.seq_lens.tolist() == [45] and step.heads.sequences.rows.tolist() == [1]
    assert step.heads.sequences.tokens.tolist() == [7, 8, 7, 8]


def test_a_worker_has_compressed_before_anyone_asks(batch, monkeypatch):
    compressor, copied = batch.compressor, []
    monkeypatch.setattr(compressor, "_compact", lambda *args: copied.append(len(args[-1])))
    compressor.warm_up(HEADS * GROUP, torch.float32)
    assert copied == [1], "the fewest blocks that compression frees any of"
    assert not compressor.tables.requests()
    compressor.check_integrity()


@pytest.mark.parametrize("preset", ["snapkv", "fastkv", "keydiff", "windowkv", "tsp", "off"])
def test_a_worker_warms_up_whatever_its_preset(preset, monkeypatch):
    layers = 8  # groups of layers want some
    cache = noise(60, layers, HEADS, B, 2 * SIZE)
    views = [cache[:, layer] for layer in range(layers)]
    pool = PagePool(views, PageFormat.by_token(B, SIZE))
    config = parse_engine_config({"preset": preset})
    judge = DeviceJudge(config, pool, SIZE**-0.5)
    compressor, copied = DeviceCompressor(config, pool, judge, ROWS, 40), []
    monkeypatch.setattr(compressor, "_compact", lambda *args: copied.append(len(args[-1])))
    compressor.warm_up(HEADS * GROUP, torch.float32)
    assert len(copied) == (preset not in ("tsp", "off")), "what evicts nothing copies nothing"
    assert not compressor.tables.requests()


def test_the_made_up_prompt_is_as_long_as_the_window(batch, monkeypatch):
    compressor, windows = batch.compressor, []
    settings = replace(EngineConfig().settings_or_off(None), window_tokens=3 * B)
    monkeypatch.setattr(EngineConfig, "settings_or_off", lambda *_: settings)
    scored = compressor.judge.scores
    monkeypatch.setattr(
        compressor.judge,
        "scores",
        lambda policy, found, window: windows.append(window) or scored(policy, found, window),
    )
    compressor.warm_up(HEADS * GROUP, torch.float32)
    assert [len(window.positions()) for window in windows] == [3 * B]


def test_a_worker_compresses_before_vllm_looks_for_late_compilers():
    order = []

    class VllmWorker:
        vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                dtype=torch.float32, get_num_attention_heads=lambda parallel: 4
            ),
            parallel_config=None,
        )

        def compile_or_warm_up_model(self):
            order.append("vLLM")
            return "its answer"

    class Worker(DeviceWorker, VllmWorker):
        compressor = SimpleNamespace(warm_up=lambda heads, dtype: order.append((heads, dtype)))

    assert Worker().compile_or_warm_up_model() == "its answer"
    assert order == [(4, torch.float32), "vLLM"]


def test_without_graphs_an_untouched_decode_step_is_vllms(batch):
    batch.builder.vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    step = batch.builder.build(0, common(batch, [1, 1, 1])).kv_compress
    assert step.heads is None and not step.everything


def test_graphs_are_promised_for_single_token_decodes_only():
    support = Builder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_runners_are_told_apart_by_what_they_offer():
    first = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["x", "y"]), requests={})
    assert isinstance(runner_of(first), FirstRunner)
    state = SimpleNamespace(prepare_attn=lambda batch, mode: mode)
    second = runner_of(SimpleNamespace(model_state=state, cudagraph_manager=None))
    assert isinstance(second, SecondRunner)
    assert state.prepare_attn(SimpleNamespace(req_ids=["p", "q"]), "mode") == "mode"
    assert second.request_ids(1) == ["p"]
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        runner_of(SimpleNamespace())


def test_both_runners_send_their_news_along_with_a_connectors_own_statistics():
    def finished(connector_stats):
        return KVConnectorOutput(finished_sending={"x"}, kv_connector_stats=connector_stats)

    theirs = KVConnectorStats({"bytes": 7})
    held = SimpleNamespace(input_batch=None, requests={}, kv_connector_output=finished(theirs))
    news = WorkerStats.of([0.5], {"attention": ("cuda",)})
    FirstRunner(held).send(news)
    state = SimpleNamespace(prepare_attn=None)
    second = SecondRunner(SimpleNamespace(model_state=state))
    second.send(news)
    output = SimpleNamespace(kv_connector_output=finished(theirs))
    second.complete(SimpleNamespace(model_runner_output=output))
    for got in (held.kv_connector_output, output.kv_connector_output):
        assert got.finished_sending == {"x"}
        assert got.kv_connector_stats.data == news.data
        assert got.kv_connector_stats.connector is theirs
    second.send(WorkerStats.of([], {}))
    later = SimpleNamespace(kv_connector_output=None)
    second.complete(SimpleNamespace(model_runner_output=later))
    assert later.kv_connector_output is None


def test_ranks_whose_news_come_at_different_steps_are_added_up():
    """One rank's compression has ended, another's still runs; one has a connector's news."""
    connector = KVConnectorOutput(kv_connector_stats=CacheGenStats({"stored_bytes": 7}))
    outputs = []
    for seconds, held in [([0.5], None), ([], connector), ([], None), ([0.25], connector)]:
        runner = SimpleNamespace(kv_connector_output=held)
        FirstRunner(runner).send(WorkerStats.of(seconds, {}))
        outputs.append(SimpleNamespace(kv_connector_output=runner.kv_connector_output))
    stats = KVOutputAggregator(4).aggregate(outputs).kv_connector_output.kv_connector_stats
    assert stats.data["seconds"] == [0.5, 0.25]
    assert stats.connector.data == {"stored_bytes": 14}


def test_barred_steps_are_not_replayed():
    """Those that keep queries aside from no graph of attention, those that propagate from none."""

    class First:
        def dispatch(self, num_tokens, invalid_modes=None):
            return num_tokens, invalid_modes

    class Second:
        """A graph of 4 decoding tokens, a piecewise one of 8 tokens, and no other."""

        def dispatch(self, num_reqs, num_tokens, uniform, num_active_loras, max_query_len=None):
            if uniform and num_tokens <= 4:
                return BatchExecutionDescriptor(CUDAGraphMode.FULL, 4, 4)
            return BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, 8, None)

    first, second = First(), Second()
    dispatcher = FirstRunner(SimpleNamespace(cudagraph_dispatcher=first))
    for barred in (FULL, ANY):
        with dispatcher.without_graphs(barred):
            assert first.dispatch(num_tokens=8) == (8, barred)
    assert first.dispatch(num_tokens=8) == (8, None)
    state = SimpleNamespace(prepare_attn=None)
    held = SimpleNamespace(cudagraph_manager=second, model_state=state, dp_size=1)
    runner = SecondRunner(held)
    decode = {"num_active_loras": 0, "max_query_len": 1}
    with runner.without_graphs(FULL):
        assert second.dispatch(3, 3, 1, **decode).cg_mode is CUDAGraphMode.PIECEWISE
    with runner.without_graphs(ANY):
        eager = BatchExecutionDescriptor(CUDAGraphMode.NONE, 3, 3)
        assert second.dispatch(3, 3, 1, **decode) == eager
    assert second.dispatch(3, 3, 1, **decode).cg_mode is CUDAGraphMode.FULL


class Deep(torch.nn.Module):
    """A layer that only tells what came to it."""

    def __init__(self, name):
        super().__init__()
        self.seen = []
        self.self_attn = SimpleNamespace(attn=SimpleNamespace(layer_name=name))

    def forward(self, positions, hidden_states, residual):
        context = get_forward_context()
        name = self.self_attn.attn.layer_name
        told = context.attn_metadata[name], context.slot_mapping[name]
        self.seen.append((positions, hidden_states, *told))
        return hidden_states + 1, hidden_states if residual is None else residual


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = SimpleNamespace(layers=[Deep(f"layers.{i}") for i in range(LAYERS)])

    def forward(self, positions, hidden_states, residual):
        for layer in self.model.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual


def arrives(batch, request_id, prompt_tokens, blocks, knobs) -> None:
    """Let the compressor see a step with all of a new prompt."""
    new = SimpleNamespace(
        req_id=request_id,
        sampling_params=SimpleNamespace(extra_args=knobs),
        prompt_token_ids=[0] * prompt_tokens,
        prompt_embeds=None,
        block_ids=(blocks,),
        num_computed_tokens=0,
    )
    step = SimpleNamespace(
        finished_req_ids=(),
        preempted_req_ids=(),
        scheduled_new_reqs=[new],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[]),
        num_scheduled_tokens={request_id: prompt_tokens},
    )
    batch.compressor.begin_step(step)


def test_a_propagating_step_waits_for_nobody(batch):
    """Of the 40 tokens of row b 24 go on, in pages, slots and metadata of their own."""
    n, m, view = 40, 24, batch.builder.step_view
    blocks = [7, 3, 11]
    arrives(batch, "b", n, blocks, {"kv_compress": "tsp"})
    view._runner._runner.requests = {"b": SimpleNamespace(block_ids=(blocks,))}
    view._attn_groups = [[SimpleNamespace(metadata_builders=[batch.builder])]]
    model = Model()
    stash = Stash(64, 8, torch.float32, batch.pool.device)
    propagation = Propagation(model, batch.compressor, view, stash, 64)
    batch.seq_lens[:] = torch.tensor([20, n, 30, 0])
    whole = common(batch, [1, n, 1]).replace(
        seq_lens_cpu_upper_bound=batch.seq_lens[:3], slot_mapping=torch.arange(n + 2)
    )
    states, positions = noise(n + 2, 8), torch.tensor([19, *range(n), 29])
    context = SimpleNamespace(attn_metadata={}, slot_mapping={})
    with NoWaiting(), override_forward_context(context), propagation.around_step():
        metadata = batch.builder.build(0, whole)
        for capture in metadata.kv_compress.captures:
            capture.take(0, noise(n + 2, HEADS * GROUP, SIZE))
        names = [f"layers.{i}" for i in range(LAYERS)]
        context.attn_metadata = dict.fromkeys(names, metadata)
        context.slot_mapping = dict.fromkeys(names, whole.slot_mapping)
        hidden, residual = model(positions, states.clone(), torch.zeros_like(states))
    assert context.skip_compiled and not model._forward_pre_hooks
    assert stash.free_tokens == 64
    (selected, of_b, own, slots), (others, rest, theirs, _) = model.model.layers[1].seen
    assert len(selected) == m and selected[-8:].tolist() == list(range(32, n))
    torch.testing.assert_close(of_b, states[1:-1][selected] + 1)
    assert own.seq_lens.tolist() == [m] and own.block_table.tolist() == [[7, 11]]
    assert slots.tolist() == [*range(7 * B, 8 * B), *range(11 * B, 11 * B + 8)]
    assert others.tolist() == [19, 29] and theirs.seq_lens.tolist() == [20, 30]
    assert torch.equal(theirs.block_table, batch.table[[0, 2]])
    torch.testing.assert_close(rest, states[[0, -1]] + 1)
    torch.testing.assert_close((hidden + residual)[[0, -1]], states[[0, -1]] + 2)
    torch.testing.assert_close(hidden[n], of_b[-1] + 1)
    torch.testing.assert_close(residual[n], of_b[-1])


def test_what_goes_on_is_judged_alike_by_the_kernel(batch):
    n, window = 40, QueryWindow(LAYERS, 32, 40)
    window.capture(32, 8, row=0).take(0, noise(8, HEADS * GROUP, SIZE))
    pages = batch.pool.page_ids(torch.tensor([7, 3, 11]))
    asked = AttentionPropagator(), Candidates(pages, torch.arange(n), None).of_layer(0), 0, window
    plain = Judge(EngineConfig(), batch.pool, SIZE**-0.5).saliency(*asked)
    torch.testing.assert_close(batch.compressor.judge.saliency(*asked), plain)
    assert plain[:32].min() > 0
