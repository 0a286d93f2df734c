"""Token-selective propagation says what a dense model says whose deep layers see the selected.

The reference is transformers' model in float64 (`dense.py`), which selects for itself.
"""

from random import Random

import pytest
import torch
from engine import dense
from engine.dense import watched
from engine.engines import (
    BLOCK,
    ask,
    assert_all_free,
    assert_same_words,
    compressor_of,
    counted,
    engine,
    free_blocks,
    greedy,
    prompt,
    propagation_of,
    scheduler_of,
    steps,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vllm_kvcompress import accounting
from vllm_kvcompress.presets import shipped_presets

pytestmark = pytest.mark.engine
LAYER, WINDOW = 1, 8  # of 4 layers; as published


def selected_tokens(n, rate=0.2):
    """How many of n tokens go on: those asked for, in whole blocks, and the tail."""
    tail = n % BLOCK
    return max(1, -(-(int(n * rate) - tail) // BLOCK)) * BLOCK + tail


def assert_as_dense(answer, arenas, layer=LAYER, window=WINDOW):
    n = len(answer.prompt)
    kept = dense.propagated(answer.prompt, layer, selected_tokens(n), window)
    masks = dense.selected_masks(n + len(answer.tokens), n, layer, kept)
    assert arenas, "nothing was propagated"
    dense.check(answer, arenas, masks=masks)
    return kept


def assert_nothing_left(llm, initial):
    assert_all_free(llm, initial)
    stash = propagation_of(llm).stash
    assert stash.free_tokens == len(stash._states)
    assert not scheduler_of(llm).per_head.propagating.occupied_tokens


def requests(*lengths, tokens=10, knobs=None):
    return [(prompt(Random(n), n), greedy(tokens, knobs)) for n in lengths]


@pytest.mark.parametrize(
    ("preset", "step_tokens"), [("tsp", 1024), ("tsp", 21), ("fastkv", 96), ("fastkv", 21)]
)
def test_prompts_in_any_chunks_equal_the_dense_reference(preset, step_tokens):
    """21 tokens a step: chunks smaller than a page, and selections that go on in slices."""
    llm = engine({"preset": preset}, step_tokens=step_tokens)
    initial = free_blocks(llm)
    with counted(propagation_of(llm), "_go_on") as slices:
        results = watched(llm, requests(100, 320, 333, 500))
    assert len(slices) > (12 if step_tokens == 21 else 0)
    for answer, arenas in results:
        kept = assert_as_dense(answer, arenas)
        n = len(answer.prompt)
        if preset == "tsp":  # layers 0 .. t hold all, those above the selected ones
            full = n // BLOCK * BLOCK
            _, keys, values = dense.forward(answer.prompt, dense.causal(n))
            early = dense.recover(
                dense.Arena(n, full, arenas[0].keys[: LAYER + 1], arenas[0].values[: LAYER + 1]),
                keys,
                values,
            )
            assert early == [[list(range(full))] * 4] * (LAYER + 1)
            held = [p for p in kept if p < full]
            assert {len(k) for row in arenas[0].keys[LAYER + 1 :] for k in row} == {len(held)}
    assert_nothing_left(llm, initial)


def every_policy_with_propagation():
    """Each shipped preset that evicts, with selected tokens above one layer or another."""
    found = {}
    for i, preset in enumerate(shipped_presets().values()):
        if not preset.propagates:
            own = {"name": f"tsp-{preset.name}", "group_leader": 0, "tsp_rate": 0.3}
            own["tsp_layer"] = i % 3
            found[own["name"]] = preset.model_copy(update=own).model_dump(mode="json")
    windows = found["tsp-windowkv"] | {"name": "tsp-global-windows"}
    return found | {"tsp-global-windows": windows | {"allocator": {"name": "global"}}}


def test_requests_of_every_preset_in_one_storm_say_what_each_says_alone():
    """Prefills and decodes of all presets and of none in the same steps, and preemptions; the
    presets with propagation select above three different layers."""
    ours = every_policy_with_propagation()
    llm = engine({"rate": 6, "presets": ours}, blocks=150, step_tokens=200)
    initial, rng = free_blocks(llm), Random(11)
    presets = compressor_of(llm)._config.known_presets()
    names = [*presets, "off", "off"]
    rng.shuffle(names)
    asked = []
    for name in names:
        task = {"kv_compress_task": "aggregation"} if name != "off" and presets[name].tasks else {}
        knobs = {"kv_compress": name} | task
        asked.append((prompt(rng, rng.randrange(130, 300)), greedy(6, knobs)))
    with counted(scheduler_of(llm), "_preempt_request") as preempted:
        together = watched(llm, asked, arrive_every=1, preempt_at={20, 45})
    assert len(preempted) > 4
    propagated = 0
    for (got, arenas), name, request in zip(together, names, asked, strict=True):
        llm.reset_prefix_cache()
        ((alone, _),) = watched(llm, [request])
        assert_same_words([got], [alone])
        plan, settings = plan_of(llm, len(got.prompt), request[1].extra_args)
        if plan.tsp_tokens is not None:
            n, layer = len(got.prompt), presets[name].last_full_layer(4)
            kept = dense.propagated(got.prompt, layer, plan.tsp_tokens, settings.window_tokens)
            masks = dense.selected_masks(n + len(got.tokens), n, layer, kept)
            assert arenas, name
            dense.check(got, arenas, masks=masks)
            propagated += 1
    assert propagated > len(ours)
    assert_nothing_left(llm, initial)


def test_selecting_every_token_says_what_plain_vllm_says():
    ids = [prompt(Random(n), n) for n in (20, 31, 32, 33, 64, 200, 333, 640)]
    plain = ask(engine(), ids, greedy(30))
    for step_tokens in (1024, 60):
        llm = engine(
            {"preset": "tsp", "tsp_rate": 1.0, "test_force_arena": True, "rate": 1},
            step_tokens=step_tokens,
        )
        with counted(propagation_of(llm), "_go_on") as calls:
            assert assert_same_words(ask(llm, ids, greedy(30)), plain) <= 1
        assert calls


def test_prompts_preempted_on_their_way_start_over():
    llm = engine({"preset": "fastkv"}, blocks=60, step_tokens=48)
    initial = free_blocks(llm)
    with counted(scheduler_of(llm), "_preempt_request") as preempted:
        results = watched(
            llm, requests(300, 333, 410, 290, tokens=40), preempt_at={5, 11, 18, 26, 60}
        )
    assert len(preempted) >= 5
    for answer, arenas in results:
        assert_as_dense(answer, arenas)
    assert_nothing_left(llm, initial)


@pytest.mark.parametrize("preset", ["tsp", "fastkv"])
def test_resumed_prompts_are_propagated_before_what_they_had_said(preset):
    llm = engine({"preset": preset}, step_tokens=256)
    initial = free_blocks(llm)
    results = watched(llm, requests(300, 333, tokens=50), preempt_at={13, 27, 41})
    for answer, arenas in results:
        assert_as_dense(answer, arenas)
    assert_nothing_left(llm, initial)


def test_prompts_wait_until_the_hidden_states_of_others_have_gone():
    llm = engine({"preset": "fastkv"}, blocks=28, step_tokens=64)  # a stash of 27 blocks
    initial, manager = free_blocks(llm), scheduler_of(llm).per_head
    room, most, waited = manager.propagating.capacity_tokens, 0, 0
    assert room == 27 * BLOCK
    for i, (ids, params) in enumerate(requests(400, 410, 420, tokens=4)):
        llm.llm_engine.add_request(f"q{i}", {"prompt_token_ids": ids}, params)
    for _ in steps(llm):
        inflight = manager.propagating.occupied_tokens
        most, waited = max(most, inflight), waited + bool(scheduler_of(llm).waiting)
        assert inflight <= room
    assert most > 400 and waited
    assert_nothing_left(llm, initial)


def test_propagated_prompts_are_neither_published_nor_hit():
    llm = engine({"preset": "tsp"}, step_tokens=256)
    llm.reset_prefix_cache()
    ids = prompt(Random(3), 400)
    off, tsp = greedy(4, {"kv_compress": "off"}), greedy(4)
    assert [ask(llm, [ids], p)[0].cached_tokens for p in (tsp, tsp, off)] == [0, 0, 0]
    assert ask(llm, [ids], off)[0].cached_tokens > 300
    assert ask(llm, [ids], tsp)[0].cached_tokens == 0


def test_a_question_unseen_follows_a_propagated_context():
    """`kv_compress_question`: the context goes on selected, the question sees all layers."""
    question = 30
    llm = engine({"preset": "fastkv"}, step_tokens=128)
    asked = requests(333, 410, knobs={"kv_compress_question": question})
    for answer, arenas in watched(llm, asked):
        n, context = len(answer.prompt), answer.prompt[:-question]
        kept = dense.propagated(context, LAYER, selected_tokens(len(context)), WINDOW)
        masks = dense.selected_masks(n + len(answer.tokens), len(context), LAYER, kept)
        assert [arena.point for arena in arenas] == [len(context)]
        dense.check(answer, arenas, masks=masks)


def test_original_positions_matter():
    """Positions 0 .. m-1 instead of the original ones change what is said."""
    llm = engine({"preset": "tsp"}, step_tokens=1024)
    (right,) = ask(llm, [prompt(Random(4), 400)], greedy(1))
    propagation = propagation_of(llm)
    forwards = propagation._forwards
    propagation._forwards = [
        lambda positions, h, r, f=forward: f(torch.arange(len(positions)), h, r)
        for forward in forwards
    ]
    try:
        (wrong,) = ask(llm, [right.prompt], greedy(1))
    finally:
        propagation._forwards = forwards
    gaps = [abs(right.logprobs[0].get(t, -20) - p) for t, p in wrong.logprobs[0].items()]
    assert max(gaps) > 0.01


@pytest.mark.parametrize(
    "own",
    [
        {"preset": "kv-compress", "tsp_rate": 0.3},
        {"preset": "windowkv", "tsp_rate": 0.3, "group_layers": 2, "task": "aggregation"},
        {"preset": "windowkv", "tsp_rate": 0.3, "group_layers": 4, "allocator": {"name": "global"}},
        {"preset": "kv-compress-continual", "tsp_rate": 0.4, "continual_slack_blocks": 1},
        {"preset": "fastkv-constant", "tsp_tokens": 100, "budget_tokens": 60, "tsp_layer": 2},
        {"preset": "fastkv", "tsp_layer": 0},
    ],
    ids=lambda own: " ".join(map(str, own.values())),
)
def test_propagation_goes_with_any_policy(own):
    kept = {} if "budget_tokens" in own else {"rate": 6}
    llm = engine(kept | own, step_tokens=128)
    initial = free_blocks(llm)
    results = watched(llm, requests(300, 420, tokens=60 if "continual" in own["preset"] else 8))
    for answer, arenas in results:
        n, (plan, settings) = len(answer.prompt), plan_of(llm, len(answer.prompt))
        assert plan.tsp_tokens < n
        layer = own.get("tsp_layer", LAYER)
        kept = dense.propagated(answer.prompt, layer, plan.tsp_tokens, settings.window_tokens)
        masks = dense.selected_masks(n + len(answer.tokens), n, layer, kept)
        assert len(arenas) > 1 if "continual" in own["preset"] else len(arenas) == 1
        dense.check(answer, arenas, masks=masks)
    assert_nothing_left(llm, initial)


def plan_of(llm, n, knobs=None):
    compressor = compressor_of(llm)
    settings = compressor._config.settings_or_off(knobs)
    return accounting.plan(n, BLOCK, compressor.pool.num_blocks, settings), settings


def test_a_compiled_model_says_what_an_eager_one_says():
    """Its steps without propagation stay compiled; those with are passed by."""
    asked = [
        (prompt(Random(n), n), greedy(16, {"kv_compress": name}))
        for n, name in ((300, "tsp"), (260, "off"), (333, "fastkv"), (290, "kv-compress"))
    ]
    both = [
        ask(engine({"preset": "fastkv"}, step_tokens=256, eager=eager), *zip(*asked, strict=True))
        for eager in (True, False)
    ]
    assert assert_same_words(both[1], both[0]) <= 1


FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": False}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"use_sliding_window": False}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_supported_family_equals_its_dense_reference(family, tmp_path_factory):
    model, config, own = FAMILIES[family]
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp(family))
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 5, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    size = {"vocab_size": 300, "max_position_embeddings": 4096, "initializer_range": 0.1}
    model(config(**shape, **heads, **size, **own)).save_pretrained(path)
    llm = engine({"preset": "fastkv"}, model=path, step_tokens=96, skip_tokenizer_init=True)
    rng = Random(5)
    asked = [
        ([rng.randrange(300) for _ in range(n)], greedy(6, detokenize=False)) for n in (200, 333)
    ]
    with dense.judging(path):
        for answer, arenas in watched(llm, asked):
            assert_as_dense(answer, arenas, layer=1)  # 5 layers: 5 // 2 - 1
