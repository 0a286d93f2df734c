"""What of vLLM is wrapped, and that with the flag off nothing else is there."""

import subprocess
import sys

import pytest

LISTING = """
import sys
from types import FunctionType
from vllm.engine.arg_utils import EngineArgs
import vllm.v1.engine.async_llm
from vllm_kvcompress.plugin import register
from vllm_kvcompress.wrapping import MARK

def wrapped():
    found = set()
    for name, module in list(sys.modules.items()):
        if not name.startswith("vllm."):
            continue
        for owner in list(vars(module).values()):
            for key, value in list(vars(owner).items()) if isinstance(owner, type) else ():
                if isinstance(value, staticmethod | classmethod):
                    value = value.__func__
                if isinstance(value, FunctionType) and MARK in vars(value):
                    found.add(f"{owner.__name__}.{key}")
    return " ".join(sorted(found))

register()
register()
model = "vllm_kvcompress/demo_model"
plain = dict(model=model, max_model_len=4096, enforce_eager=True)
off = EngineArgs(**plain).create_engine_config()
stock = EngineArgs.create_engine_config.__wrapped__(EngineArgs(**plain))
print("same configuration:", off.compute_hash() == stock.compute_hash())
print("imported:", [m for m in sys.modules if m.startswith("vllm_kvcompress.engine")])
print("off:", wrapped())
on = EngineArgs(**plain, additional_config={"kv_compress": True}).create_engine_config()
print("on:", wrapped())
print("scheduler:", on.scheduler_config.scheduler_cls)
"""
ALWAYS = "EngineArgs.add_cli_args EngineArgs.create_engine_config EngineArgs.from_cli_args"
WHILE_ON = (
    f"{ALWAYS} InputProcessor._build_logits_processors_params_validator "
    "InputProcessor.process_inputs StatLoggerManager.__init__"
)


@pytest.mark.engine
def test_exactly_these_wrappers_exist(engine_environment) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTING],
        env=engine_environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["same configuration"] == "True"
    assert lines["imported"] == "[]"
    assert lines["off"] == ALWAYS
    assert lines["on"] == WHILE_ON
    assert lines["scheduler"].startswith("vllm_kvcompress.engine.scheduler.")
