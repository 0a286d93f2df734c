"""Two tensor-parallel ranks say what one does, and each has blocks and chunks of its own heads.

All of it in one engine (`two_ranks.py`), whose requests go through arenas unless they are `off`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from engine.engines import DEMO_MODEL, Answer, ask, assert_same_words, engine, greedy, prompt

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two cores"),
]
WINDOWS = {"kv_compress": "windowkv", "kv_compress_task": "aggregation"}


@pytest.fixture(scope="module")
def cases():
    rng = Random(6)
    tsp = {"kv_compress": "tsp"}
    return {
        "arena": [prompt(rng, n) for n in (20, 96, 250, 320, 333)],
        "propagated": [
            (prompt(Random(n), n), knobs) for n, knobs in ((320, tsp), (333, tsp), (400, WINDOWS))
        ],
        "store": [prompt(Random(30), n) for n in (300, 400)],
    }


@pytest.fixture(scope="module")
def ranks(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    asked, told = folder / "asked.json", folder / "told.json"
    asked.write_text(json.dumps(cases))
    script = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run(
        [sys.executable, "-P", script, DEMO_MODEL, folder / "kv", asked, told],
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(told.read_text())


def answers(prompts, said):
    return [Answer(ids, words) for ids, (words, _) in zip(prompts, said, strict=True)]


def test_ranks_agree_on_every_block(ranks, cases):
    assert ranks["free"] == ranks["free_at_first"] == 199
    assert ranks["compressed"] == 8  # all but the shortest, at two rates
    plain = ask(engine(), cases["arena"], greedy(30))
    assert assert_same_words(answers(cases["arena"], ranks["whole"]), plain) <= 1
    few = answers(cases["arena"], ranks["few"])
    assert [len(answer.tokens) for answer in few] == [30] * 5
    assert any(a.tokens != b.tokens for a, b in zip(few[1:], plain[1:], strict=True))


def test_ranks_select_what_one_does(ranks, cases):
    """Heads keep together what goes on; `windowkv` shares its windows among all heads too."""
    prompts, knobs = zip(*cases["propagated"], strict=True)
    llm = engine({"rate": 1, "test_force_arena": True}, step_tokens=200)
    alone = ask(llm, list(prompts), [greedy(20, own) for own in knobs])
    assert assert_same_words(answers(prompts, ranks["propagated"]), alone) <= 1


def test_ranks_store_and_load_their_own_heads(ranks, cases):
    plain = ask(engine(), cases["store"], greedy(12))
    first, again, few, spoilt = ranks["store"]
    for turn in (first, again, spoilt):
        assert_same_words(answers(cases["store"], turn), plain)
    assert [cached for _, cached in first + again] == [0, 0, 256, 384]
    assert ranks["by_rank"][0] == ranks["by_rank"][1] != []
    assert [len(words) for words, _ in few] == [12, 12]
