"""An engine under stopwatches, asked how long prefills take and what compressing takes of them."""

import json
import sys
from dataclasses import asdict

from vllm_kvcompress.bench.engine import EngineSpec, Workload, open_engine
from vllm_kvcompress.bench.overhead import Clock, prefills, stopwatch_cost, watch_everything
from vllm_kvcompress.bench.process import answer_stream, questions, say


def main() -> None:
    answers = answer_stream()
    clock = Clock()
    watch_everything(clock)
    cost = stopwatch_cost()
    llm = open_engine(EngineSpec(**json.loads(sys.argv[1])))
    say(answers, {"ready": True})
    for line in questions():
        question = json.loads(line)
        work = Workload(**question["work"])
        done = prefills(llm, clock, work, question["count"], cost)
        say(answers, {"steps": [asdict(step) for step in done]})


if __name__ == "__main__":
    main()
