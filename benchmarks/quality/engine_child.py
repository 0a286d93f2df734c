"""The answering side of `engines.Engine`: a vLLM engine, asked in lines of JSON."""

import json
import sys
from typing import Any

from vllm_kvcompress.bench.engine import EngineSpec, open_engine
from vllm_kvcompress.bench.process import answer_stream, questions, say


def answer(llm: Any, asks: list[dict[str, Any]]) -> list[str]:
    """The texts said to `[{token_ids, max_tokens, knobs}]`, greedily."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ask["token_ids"]} for ask in asks]
    params = [
        SamplingParams(temperature=0, max_tokens=ask["max_tokens"], extra_args=ask["knobs"])
        for ask in asks
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def main() -> None:
    answers = answer_stream()
    llm = open_engine(EngineSpec(**json.loads(sys.argv[1])))
    say(answers, {"block_tokens": llm.llm_engine.vllm_config.cache_config.block_size})
    for line in questions():
        say(answers, {"texts": answer(llm, json.loads(line)["asks"])})


if __name__ == "__main__":
    main()
