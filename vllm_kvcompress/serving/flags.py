"""`--kv-compress` and its siblings: a short way to write `additional_config`.

    --kv-compress                       {"kv_compress": {"preset": "kv-compress"}}
    --kv-compress snapkv                {"kv_compress": {"preset": "snapkv"}}
    --kv-compress mine.yaml             {"kv_compress": {"preset": NAME, "presets": {NAME: {...}}}}
    --kv-compress-config '{"rate": 4}'  ... and "rate": 4 beside them
    --kv-compress-store redis://host    ... and "cachegen": {"store": "redis://host"}

Argparse keeps what a flag means; `apply_flags` moves it to where vLLM hands it to every process.
"""

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping
from typing import Any, NoReturn

from vllm_kvcompress.config import (
    ATTENTION_ENGINES,
    parse_engine_config,
    uses_store,
    wants_compression,
)
from vllm_kvcompress.presets import (
    CACHEGEN,
    DEFAULT_PRESET,
    OFF,
    UNCOMPRESSED,
    load_preset,
    shipped_presets,
    shorten,
    unknown_preset,
)

GROUP = "KV-Compress"
MIDDLEWARE = "vllm_kvcompress.serving.routes.KVCompressRoutes"
FILE_ENDINGS = (".yaml", ".yml")


def add_flags(parser: ArgumentParser) -> None:
    """Add the one argument group to `vllm serve` and its siblings."""
    group = parser.add_argument_group(
        title=GROUP, description="Compress KV caches per attention head (vllm-kvcompress)."
    )
    group.add_argument(
        "--kv-compress",
        nargs="?",
        const={"preset": DEFAULT_PRESET},
        type=preset_or_file,
        metavar="PRESET|FILE.yaml",
        help="Compress the KV caches of prompts, by a preset "
        f"({', '.join(shipped_presets())}), by one of your own in a YAML file, or by "
        f"`{OFF}`: only where a request asks for it; `{CACHEGEN}`: as `{OFF}`, and prompts' caches "
        f"go to a store and come back. Without a value: {DEFAULT_PRESET}. Write "
        "`vllm serve MODEL --kv-compress`, or `--kv-compress=PRESET` anywhere.",
    )
    group.add_argument(
        "--kv-compress-config",
        type=json_mapping,
        metavar="JSON",
        help="Overrides for the preset of `--kv-compress`, for instance "
        """'{"rate": 4, "window_tokens": 32}'. `attention_engine` says whose kernel reads """
        "compressed requests; `auto` takes the first that runs here of "
        f"{', '.join(ATTENTION_ENGINES)}. `kernels` says which of this package's own to use on a "
        "GPU: `triton`, `cuda`, or `auto`, the faster of the two.",
    )
    group.add_argument(
        "--kv-compress-store",
        metavar="URL",
        help="Keep prompts' caches as bitstreams in a store that servers share, with any preset: "
        "redis://host:6379, s3://bucket/prefix, or a folder. Default of preset "
        f"`{CACHEGEN}`: $KV_COMPRESS_STORE, else a folder in ~/.cache, at most 20 GB.",
    )


def preset_or_file(value: str) -> dict[str, Any]:
    """What `--kv-compress VALUE` means, as `additional_config["kv_compress"]`.

    Raises:
        ArgumentTypeError: neither a preset nor a readable preset file.
    """
    if value in (*UNCOMPRESSED, *shipped_presets()):
        return {"preset": value}
    if value.endswith(FILE_ENDINGS):
        try:
            preset = load_preset(value)
        except ValueError as error:
            raise ArgumentTypeError(_line(error)) from None
        return {"preset": preset.name, "presets": {preset.name: preset.model_dump(mode="json")}}
    raise ArgumentTypeError(
        _line(
            f"{unknown_preset(value, shipped_presets())}, or a file that ends in .yaml; if it is "
            f"the model, write `vllm serve {shorten(value)[1:-1]} --kv-compress` or "
            "`--kv-compress=PRESET`"
        )
    )


def json_mapping(value: str) -> dict[str, Any]:
    """What `--kv-compress-config` was given.

    Raises:
        ArgumentTypeError: it is no JSON object.
    """
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(_line(f"{shorten(value)} is not JSON: {error}")) from None
    if not isinstance(parsed, dict):
        raise ArgumentTypeError(_line(f'{shorten(value)} is no JSON object such as {{"rate": 4}}'))
    return parsed


def apply_flags(args: Namespace) -> bool:
    """Put the flags into `args.additional_config`, and our routes into `args.middleware`.

    Doing it again changes nothing. Ends the process with one line and code 2 where the flags
    contradict each other or make no sense; returns whether compression or a store is on.
    """
    flag = getattr(args, "kv_compress", None)
    overrides = getattr(args, "kv_compress_config", None)
    store = getattr(args, "kv_compress_store", None)
    config = getattr(args, "additional_config", None) or {}
    try:
        if (flag, overrides, store) != (None, None, None):
            meant = merged(flag, overrides, store, config.get("kv_compress"))
            config = {**config, "kv_compress": meant}
            args.additional_config = config
        elif wants_compression(config):
            parse_engine_config(config["kv_compress"])
    except ValueError as error:
        stop(error)
    if not wants_compression(config) and not uses_store(args):
        return False
    if hasattr(args, "middleware") and MIDDLEWARE not in args.middleware:
        args.middleware = [*args.middleware, MIDDLEWARE]
    return True


def merged(
    flag: Mapping[str, Any] | None,
    overrides: Mapping[str, Any] | None,
    store: str | None = None,
    existing: Any = None,
) -> dict[str, Any]:
    """The flags as one `additional_config["kv_compress"]`, checked against an existing one.

    Raises:
        ValueError: a contradiction, or a setting that does not exist.
    """
    if flag is None:
        asked = "--kv-compress-config" if store is None else "--kv-compress-store"
        also = "" if store is None else f", or `--kv-compress {CACHEGEN}` to compress nothing else"
        raise ValueError(f"{asked} changes what --kv-compress turns on: add --kv-compress{also}")
    overrides = overrides or {}
    if overrides.get("preset", flag["preset"]) != flag["preset"]:
        raise ValueError(
            f"--kv-compress names the preset {shorten(flag['preset'])} and --kv-compress-config "
            f"{shorten(overrides['preset'])}: name it once"
        )
    result = {**flag, **overrides}
    if flag.get("presets") and isinstance(overrides.get("presets"), Mapping):
        result["presets"] = {**overrides["presets"], **flag["presets"]}
    if store is not None:
        own = result.get("cachegen") or {}
        if isinstance(own, Mapping) and own.get("store", store) != store:
            raise ValueError("--kv-compress-store and --kv-compress-config name two stores")
        result["cachegen"] = {**own, "store": store}
    config = parse_engine_config(result)
    if existing is not None and parse_engine_config(existing) != config:
        raise ValueError(
            "--kv-compress and the kv_compress of --additional-config differ: give one of them"
        )
    return result


def stop(error: Exception) -> NoReturn:
    """End the process as argparse does: one line on stderr, exit code 2."""
    print(f"vllm-kvcompress: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2)


def _line(message: object) -> str:
    return " ".join(str(message).split())
