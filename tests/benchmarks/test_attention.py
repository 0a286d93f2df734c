import pytest
import torch
from typer.testing import CliRunner

from vllm_kvcompress.bench import attention
from vllm_kvcompress.bench.attention import DENSE, Measured, measure, table, verdicts, ways_at
from vllm_kvcompress.bench.attention_step import (
    SHAPES,
    Attention,
    Cache,
    Point,
    Shape,
    gib,
    load_kernels,
)

B = 32
SMALL = {
    "float32": Shape("small", "a small one", 2, 2, 3, 32, "float32"),
    "bfloat16": Shape("small", "a small one", 2, 4, 2, 64, "bfloat16"),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture(params=SMALL)
def cache(request) -> Cache:
    load_kernels()
    return Cache(SMALL[request.param], Point(3, 8 * B), spread=1.0, seed=5)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v, for `[G, D]` queries and `[n, D]` keys and values."""
    weights = (query.float() @ keys.float().T / keys.shape[-1] ** 0.5).softmax(-1)
    return weights @ values.float()


def test_per_head_attention_is_dense_attention_over_each_head_s_own_pages(cache):
    shape, last = cache.shape, cache.shape.layers - 1
    heads = cache.head_batch(2)
    cache.head_batch = lambda rate: heads
    output = cache.per_head(2).step().clone()  # of the last layer
    lengths = heads.seq_lens[last].view(3, shape.kv_heads)
    pages = heads.block_table(last).view(3, shape.kv_heads, -1).long()
    for request in range(3):
        for head in range(shape.kv_heads):
            n = int(lengths[request, head])
            own = pages[request, head, : -(-n // B)][None]
            group = slice(head * shape.group, (head + 1) * shape.group)
            keys, values = cache.pool.keys(own)[0, :n], cache.pool.values(own)[0, :n]
            expected = attend(cache.query[request, group], keys, values)
            error = (output[request, group].float() - expected).abs().max()
            assert error < TOLERANCE[shape.dtype], (request, head)


def test_arenas_are_uneven_within_the_budget_and_hold_no_page_twice(cache):
    heads = cache.head_batch(2)
    lanes = cache.shape.layers * cache.shape.kv_heads
    kept = heads.seq_lens.view(cache.shape.layers, 3, -1) - 1  # without the new token
    assert (kept.sum(dim=(0, 2)) == 4 * B * lanes).all()  # half of 8 blocks, per request
    assert (kept >= B).all() and (kept <= 8 * B).all()
    assert kept.float().std() > 0
    heads._tables.check_integrity()


def test_what_is_read_is_counted(cache):
    ways = ways_at(cache, [2, 8])
    heads = 3 * cache.shape.kv_heads
    assert ways[DENSE].kvs == heads * (8 * B + 1)
    assert ways["2"].kvs == ways[f"{DENSE} 2"].kvs == heads * (4 * B + 1)
    assert ways["8"].kvs == heads * (B + 1)


def test_dense_over_the_same_keys_is_the_same_whatever_the_rate(cache):
    whole = cache.dense(8 * B).step().clone()
    assert torch.equal(whole, ways_at(cache, [1])[f"{DENSE} 1"].step())
    assert not torch.equal(whole, cache.dense(4 * B).step())


def test_ways_take_turns():
    calls = []
    ways = {name: Attention(lambda name=name: calls.append(name), 1) for name in "ab"}
    samples = measure(ways, repeats=2, least_s=0, tell=lambda: None)
    assert "".join(calls[:2]) in ("ab", "ba") and len(samples["a"]) == len(samples["b"]) == 2


def made(per_head_s: float) -> dict[str, list[Measured]]:
    samples = {DENSE: [8.0] * 3, "8": [per_head_s] * 3, f"{DENSE} 8": [1.0] * 3}
    kvs = {DENSE: 8 * 4 * 4096.0, "8": 8 * 4 * 512.0, f"{DENSE} 8": 8 * 4 * 512.0}
    return {"demo": [Measured(Point(8, 4096), samples, kvs)]}


def test_a_kernel_slowed_fivefold_is_caught_and_an_equal_one_passes():
    assert [verdict.met for verdict in verdicts(made(1.0))] == [True]
    assert [verdict.met for verdict in verdicts(made(1.2 * 5))] == [False]


def test_the_table_holds_times_per_layer_bandwidth_and_ratios():
    shown = table(SHAPES["demo"], made(2.0)["demo"], repeats=3)
    plain, ours = shown.rows
    assert plain[:4] == ["8 x 4,096", "plain", "4,096", "2,000,000"]
    assert ours[:4] == ["8 x 4,096", "8", "512", "500,000"]
    assert (ours[-2], ours[-1]) == ("0.50", "4.00")
    bandwidth = 8 * 4 * 4096 * 2 * 32 * 4 / 2.0 / 1e9  # float32 K and V over 2 s
    assert plain[4] == f"{bandwidth:.1f}"


def test_the_memory_of_a_point_is_known_beforehand():
    load_kernels()
    point = Point(3, 8 * B)
    cache = Cache(SMALL["float32"], point, spread=1.0)
    held = cache.by_layer.numel() * cache.by_layer.element_size()
    assert gib(SMALL["float32"], point) == held / 2**30


def test_the_command_writes_a_report_and_leaves_out_what_is_too_large(tmp_path):
    path = tmp_path / "a.json"
    options = ["--shapes", "demo", "--requests", "1", "64", "--tokens", "128", "--rates", "2"]
    options += ["--repeats", "1", "--least-ms", "0", "--memory-gib", "0.01", "--threads", "1"]
    done = CliRunner().invoke(attention.app, [*options, "--json", str(path)])
    assert done.exit_code in (0, 1), done.output  # times of one turn may miss their verdict
    assert "64 x 128: left out" in done.output and path.with_suffix(".png").exists()
    assert '"bench": "attention"' in path.read_text()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--shapes", "70b"], "no shape"),
     (["--memory-gib", "0.01", "--tokens", "65536"], "more memory")],
)  # fmt: skip
def test_bad_options_are_one_clear_line(options, complaint):
    done = CliRunner().invoke(attention.app, options)
    assert done.exit_code == 2 and complaint in " ".join(done.output.split())
