"""What no measurement can begin with is told before it begins."""

import pytest
from typer.testing import CliRunner

from vllm_kvcompress.cli import app


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("tune tsp-layer --dtype half", "'half' is none of auto, float32, bfloat16, float16"),
        ("bench throughput --dtype nope", "'nope' is none of auto"),
        ("bench quality --block-tokens 0", "greater than or equal to 1"),
        ("bench prefill --threads -1", "greater than or equal to 0"),
        ("bench codec --model ./nowhere", "./nowhere"),
        ("bench codec --layers 1000000000000000000000", "channels are more than 268435456"),
        ("bench codec --rounds 1000000000000000000000", "less than or equal to 1000"),
        ("bench codec --json /dev/null/a.json", "cannot write /dev/null/a.json: File exists"),
        ("bench attention --least-ms inf", "less than or equal to 60000"),
        ("bench attention --seed 1000000000000000000000", "less than or equal to 2147483648"),
        ("bench prefill --json .", "cannot write .: Is a directory"),
        ("bench stream --url nonsense", "no figures of a store from nonsense"),
        ("bench serve --url http://localhost:1", "no vLLM server answers at http://localhost:1"),
        ("bench serve --server-args '", "--server-args ': No closing quotation"),
        ("bench throughput --rates", "option --rates requires a value"),
        ("bench throughput --presets --rates 2", "option --presets requires a value"),
        ("bench reuse --urls http://localhost:1,http://localhost:1", "http://localhost:1: [Errno"),
        ("bench throughput --model /nowhere", "there is no model folder /nowhere"),
        ("bench parity --model /nowhere", "there is no model folder /nowhere"),
        ("bench parity --budget nan", "less than or equal to 1"),
        ("bench quality --model /nowhere", "there is no model folder /nowhere"),
        ("bench reuse --model ./nowhere", "there is no model folder ./nowhere"),
        ("tune tsp-layer --model /nowhere", "there is no model folder /nowhere"),
    ],
)
def test_a_wrong_value_is_told_in_one_message(given, says) -> None:
    done = CliRunner().invoke(app, given.split(), env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.output
    assert says in done.output and "Traceback" not in done.output
