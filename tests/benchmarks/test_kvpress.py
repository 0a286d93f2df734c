"""The real kvpress against plain transformers and against dense attention with a mask.

The references run in this environment's own transformers, where kvpress cannot.
"""

from collections.abc import Sequence
from itertools import product
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_kvcompress.bench.demo_model.language import many_facts_task, span_task
from vllm_kvcompress.bench.engine import MODEL
from vllm_kvcompress.bench.peers.environment import installed_python
from vllm_kvcompress.bench.peers.kvpress import WORKER, KVPress, PeerAnswer, PeerAsk, PeerSpec

PYTHON = installed_python("kvpress")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="kvpress is not installed: the first `bench quality --peer` does it"
)

TOKENS = 400
MAX_TOKENS = 12
SINKS = 4
QUESTION = 9
EVEN = ("SnapKVPress(window_size=16)", "KeyDiffPress", "ExpectedAttentionPress", "TOVAPress",
        "StreamingLLMPress", "KnormPress", "CURPress", "LeverageScorePress",
        "CriticalKVPress(press=SnapKVPress(window_size=16))")  # fmt: skip
UNEVEN = ("AdaKVPress(press=SnapKVPress(window_size=16))",
          "CriticalAdaKVPress(press=SnapKVPress(window_size=16))")  # fmt: skip
ROUNDING = ("PyramidKVPress(window_size=16)", "ChunkKVPress(press=SnapKVPress(window_size=16))")


def spec(press: str) -> PeerSpec:
    return PeerSpec.parse(f"kvpress:{press}")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer, rng = AutoTokenizer.from_pretrained(MODEL), Random(5)
    tasks = [many_facts_task(rng, TOKENS, 8) for _ in range(3)]
    tasks += [span_task(rng, TOKENS, rng.random()) for _ in range(2)]
    turns = [[{"role": "user", "content": task.prompt}] for task in tasks]
    return [
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        for turn in turns
    ]


@pytest.fixture(scope="module")
def peer():
    with KVPress(PYTHON, str(MODEL), "float32", 1) as peer:
        yield peer


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


def ask(press: str, ids: Sequence[int], kept: int, question: int = 0) -> PeerAsk:
    return PeerAsk(press, spec(press), ids, MAX_TOKENS, kept, question)


def answer(peer: KVPress, *asked) -> PeerAnswer:
    (only,) = peer.answers([ask(*asked)])
    assert only.error is None
    return only


class Dense:
    """Greedy decoding with plain transformers, in which each (layer, head) is shown a part only.

    Every token is there with its key at its true position; a mask hides what a press drops.
    """

    def __init__(self, model) -> None:
        self.model = model
        self.keep: torch.Tensor | None = None  # [L, H, n]

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """Fills `cache`; the last logits [V]."""
        self.cache = DynamicCache()
        with torch.inference_mode():
            output = self.model(torch.tensor([ids]), past_key_values=self.cache)
        return output.logits[0, -1]

    def keys(self) -> torch.Tensor:
        """[L, H, n, D]"""
        return torch.stack([layer.keys[0] for layer in self.cache.layers])

    def step(self, token: int) -> torch.Tensor:
        hooks = [
            layer.self_attn.register_forward_pre_hook(self._mask(index), with_kwargs=True)
            for index, layer in enumerate(self.model.model.layers)
        ]
        with torch.inference_mode():
            output = self.model(torch.tensor([[token]]), past_key_values=self.cache)
        for hook in hooks:
            hook.remove()
        return output.logits[0, -1]

    def _mask(self, layer: int):
        config = self.model.config
        groups = config.num_attention_heads // config.num_key_value_heads

        def hook(module, args, kwargs):
            seen = self.cache.get_seq_length(layer) + 1
            shown = torch.ones(config.num_attention_heads, seen, dtype=torch.bool)
            n = self.keep.shape[2]
            shown[:, :n] = self.keep[layer].repeat_interleave(groups, 0)
            return args, {**kwargs, "attention_mask": shown[None, :, None]}

        return hook

    def continuation(self, logits: torch.Tensor) -> tuple[int, ...]:
        tokens = [int(logits.argmax())]
        while len(tokens) < MAX_TOKENS and tokens[-1] != self.model.config.eos_token_id:
            tokens.append(int(self.step(tokens[-1]).argmax()))
        return tuple(tokens)


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` best along the last dimension, as a mask."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(
        -1, scores.topk(count, -1).indices, True
    )


def knorm(dense: Dense, kept: int) -> torch.Tensor:
    return best(-dense.keys().norm(dim=-1), kept)


def streaming(dense: Dense, kept: int) -> torch.Tensor:
    shape = dense.keys().shape[:3]
    keep = torch.ones(shape, dtype=torch.bool)
    keep[:, :, SINKS : SINKS + shape[2] - kept] = False
    return keep


def adaptive(dense: Dense, kept: int) -> torch.Tensor:
    """AdaKV over key norms: a fifth is safe in each head, a layer's heads share the rest."""
    scores = -dense.keys().norm(dim=-1)
    layers, heads, _ = scores.shape
    scores[best(scores, int(kept * 0.2))] = torch.inf
    return best(scores.view(layers, -1), kept * heads).view_as(scores)


DENSE = {
    "KnormPress": knorm,
    "StreamingLLMPress": streaming,
    "AdaKVPress(press=KnormPress)": adaptive,
}


@pytest.mark.parametrize("press", ["KnormPress", "AdaKVPress(press=SnapKVPress)"])
def test_a_whole_cache_answers_as_plain_transformers_do(peer, model, prompts, press):
    for ids in prompts:
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([ids]), max_new_tokens=MAX_TOKENS, do_sample=False, temperature=None
            )[0, len(ids) :]
        for question in (0, QUESTION):
            got = answer(peer, press, ids, len(ids), question)
            assert got.token_ids == tuple(expected.tolist())
            assert got.kept_tokens == len(ids) - question


@pytest.mark.parametrize("press", EVEN + UNEVEN)
@pytest.mark.parametrize("share", [0.5, 0.125, 0.03125])
def test_what_was_asked_is_held(peer, prompts, press, share):
    ids = prompts[0]
    kept = int(share * len(ids))
    assert answer(peer, press, ids, kept).kept_tokens == kept


@pytest.mark.parametrize("press", ROUNDING)
@pytest.mark.parametrize("share", [0.5, 0.125])
def test_a_press_that_rounds_holds_no_more_than_asked(peer, prompts, press, share):
    ids = prompts[0]
    kept = int(share * len(ids))
    assert 20 >= kept - answer(peer, press, ids, kept).kept_tokens >= 0


@pytest.mark.parametrize("press", DENSE)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.125])
def test_it_decodes_as_dense_attention_that_sees_the_kept_tokens_only(
    peer, model, prompts, press, share
):
    for ids in prompts:
        dense, kept = Dense(model), int(share * len(ids))
        logits = dense.prefill(ids)
        dense.keep = DENSE[press](dense, kept)
        assert answer(peer, press, ids, kept).token_ids == dense.continuation(logits)


@pytest.mark.parametrize("press", DENSE)
def test_a_question_is_read_over_what_was_kept_without_it(peer, model, prompts, press):
    for ids in prompts:
        context, kept = ids[:-QUESTION], len(ids) // 2
        dense = Dense(model)
        dense.prefill(context)
        dense.keep = DENSE[press](dense, kept)
        for token in ids[-QUESTION:]:
            logits = dense.step(token)
        got = answer(peer, press, ids, kept, QUESTION)
        assert got.token_ids == dense.continuation(logits)
        assert got.kept_tokens == kept


def test_compression_changes_answers(peer, prompts):
    """Else the comparisons above would hold for a press that does nothing."""
    full = [answer(peer, "KnormPress", ids, len(ids)).token_ids for ids in prompts]
    for press in DENSE:
        pressed = [answer(peer, press, ids, len(ids) // 8).token_ids for ids in prompts]
        assert sum(a != b for a, b in zip(full, pressed, strict=True)) >= 3


def test_dropping_a_filler_token_changes_nothing(peer, prompts):
    """A position that slipped by one would."""
    for ids in prompts:
        full = answer(peer, "StreamingLLMPress", ids, len(ids)).token_ids
        assert answer(peer, "StreamingLLMPress", ids, len(ids) - 1).token_ids == full


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    """A worker that prefills anew for every case."""
    worker = tmp_path_factory.mktemp("worker") / "worker.py"
    text = WORKER.read_text()
    assert text.count("REPLAY_BYTES = 4 * 2**30") == 1
    worker.write_text(text.replace("REPLAY_BYTES = 4 * 2**30", "REPLAY_BYTES = 0"))
    with KVPress(PYTHON, str(MODEL), "float32", 1, worker) as peer:
        yield peer


@pytest.mark.parametrize("press", (*EVEN, *UNEVEN, *ROUNDING, "RandomPress"))
def test_a_shared_prefill_answers_as_one_of_its_own(peer, forgetful, prompts, press):
    cases = product(prompts[::4], (50,), (0, QUESTION))
    asks = [ask(press, *case) for case in cases]
    shared = list(peer.answers(asks))
    assert shared == list(forgetful.answers(asks))
    assert shared == list(peer.answers(asks[::-1]))[::-1]
    assert not any(answer.error for answer in shared)


def test_a_case_that_a_press_cannot_do_leaves_the_worker_alive(peer, prompts):
    ids = prompts[0]
    asks = [
        ask("SnapKVPress", ids[:40], 20),  # its window is longer than this prompt
        ask("ThinKPress", ids, 200),  # it cuts channels, not tokens
        ask("DecodingPress(base_press=KnormPress)", ids, 200),  # it compresses what is generated
        ask("KnormPress", ids, 200),
    ]
    window, channels, decoding, fine = peer.answers(asks)
    assert "greater than the window size 64" in window.error
    assert "cannot be set for ThinKPress" in channels.error
    assert "at any ratio; 200 were asked for" in decoding.error
    assert fine.error is None and fine.kept_tokens == 200


def test_a_press_that_is_not_there_is_named_with_those_that_are(peer):
    assert {"SnapKVPress", "AdaKVPress", "KeyDiffPress"} <= set(peer.presses)
    assert not {"BasePress", "ScorerPress"} & set(peer.presses)
    for name in ("SnapKV", "BasePress", "KVPressTextGenerationPipeline"):
        with pytest.raises(ValueError, match=rf"kvpress has no press '{name}'; it knows AdaKV"):
            peer.check(spec(name))
    with pytest.raises(ValueError, match=r"SnapKVPress cannot be made: .*windw"):
        peer.check(spec("SnapKVPress(windw=3)"))
    peer.check(spec("SnapKVPress(window_size=3)"))
