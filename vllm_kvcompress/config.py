"""The engine's settings, and what they make of a request's knobs.

Everything typed by a user is checked, and every refusal is a `ValueError` that says what was
asked, what is allowed and how to mend it.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from vllm_kvcompress.accounting import Settings
from vllm_kvcompress.knobs import AUTO, KnobError, changed_fields, known_knobs
from vllm_kvcompress.presets import (
    CACHEGEN,
    DEFAULT_PRESET,
    UNCOMPRESSED,
    Preset,
    StrictModel,
    Task,
    first_problem,
    shipped_presets,
    shorten,
    unknown_preset,
)

REFUSAL_REASONS = (
    "unknown_preset",
    "unknown_knob",
    "rate_and_budget",
    "bad_rate",
    "bad_budget",
    "bad_question",
    "bad_task",
    "tsp_unavailable",
    "tsp_prompt_logprobs",
    "no_store",
    "bad_level",
    "bad_ttft",
    "level_and_ttft",
)
STORE_CONNECTOR = "CacheGenConnector"
NO_STORE = "this server has no store: start it with `--kv-compress-store URL`"
ATTENTION_ENGINES = ("cpu", "flash_attn", "triton", "flashinfer", "xformers")
AttentionEngineName = Literal["auto", "cpu", "flash_attn", "triton", "flashinfer", "xformers"]
KernelsName = Literal["auto", "triton", "cuda"]
UNKNOWN_TASK: Task = "localization"  # of prompts without text


class StartupError(ValueError):
    """The engine cannot start; the message is one line that says what to do."""


class EngineConfig(StrictModel):
    """`additional_config["kv_compress"]`, checked.

    preset: what a request gets that names none: a shipped preset, or one of `presets`, or
        "off" (compress only the requests that ask for it), or "cachegen" (the same, with a
        store).
    cachegen: keeps prompts' caches in a store, whatever the preset; the settings of
        `transport.settings.ConnectorSettings`. None: no store.
    presets: further presets by name, for instance the file given to `--kv-compress`.
    tsp_max_inflight_tokens: prompt tokens of all requests whose deep layers still wait for
        their last chunk; their hidden states take memory from the cache. None: the context
        length where the model allows TSP; 0: no TSP.
    window_max_inflight_tokens: queries of all requests that are kept aside at once, until the
        step that compresses; a request that would be one too many waits. None: what fits in
        512 MiB, and at least the longest window of a preset.
    attention_engine: whose kernel reads compressed requests; "auto" takes the first of
        `ATTENTION_ENGINES` that runs here.
    kernels: which kernels of this package read and write pages on a GPU: Triton's, CUDA's, or,
        with "auto", at each size the faster, as measured at start-up.
    task_classifier: what tells the class of a task where a request leaves it to us: the id or
        folder of a Hugging Face sequence classifier; None: the shipped one.
    test_force_arena: for tests only; sends every prompt through an arena, even at rate 1, and
        through token-selective propagation, even if that selects all tokens.
    """

    preset: str = DEFAULT_PRESET
    cachegen: dict[str, Any] | None = None
    presets: dict[str, Preset] = Field(default_factory=dict)
    tsp_max_inflight_tokens: int | None = Field(default=None, ge=0, le=2**31)
    window_max_inflight_tokens: int | None = Field(default=None, ge=1, le=2**31)
    attention_engine: AttentionEngineName = "auto"
    kernels: KernelsName = "auto"
    task_classifier: str | None = Field(default=None, min_length=1, max_length=1024)
    test_force_arena: bool = False

    @model_validator(mode="after")
    def _presets_go_by_their_names(self) -> "EngineConfig":
        for name, preset in self.presets.items():
            if name != preset.name:
                raise ValueError(
                    f"presets: {shorten(name)} holds a preset whose name is {preset.name!r}: "
                    "give it under its own name"
                )
        return self

    @model_validator(mode="after")
    def _preset_exists(self) -> "EngineConfig":
        if self.preset not in (*UNCOMPRESSED, *self.known_presets()):
            raise ValueError(unknown_preset(self.preset, self.known_presets()))
        return self

    def known_presets(self) -> dict[str, Preset]:
        return {**shipped_presets(), **self.presets}

    def asked_presets(self) -> dict[str, Preset]:
        """Those that somebody chose for this engine: its own one, and `presets`."""
        own = self.known_presets().get(self.preset)
        return {**self.presets, own.name: own} if own else self.presets

    def to_dict(self) -> dict[str, Any]:
        """Plain data, equal after `parse_engine_config`: what travels to every process."""
        return self.model_dump(mode="json", exclude_defaults=True) | {"preset": self.preset}

    def request_settings(self, xargs: Mapping[str, Any] | None, max_tokens: int) -> Settings | None:
        """Resolve a request's knobs to its settings; None means it is not compressed.

        Args:
            xargs: the request's `vllm_xargs` (`SamplingParams.extra_args`); keys of other
                extensions pass.
            max_tokens: the largest budget allowed, the model's context length.

        Raises:
            KnobError: a `ValueError` naming the key, the value and what is allowed.
        """
        knobs = known_knobs(xargs)
        preset = self._asked_preset(knobs.get("kv_compress", self.preset))
        changes = changed_fields(knobs, max_tokens)
        if preset is None:
            return None
        if preset.tasks:
            task = changes.get("task", preset.task)
            changes["task"] = UNKNOWN_TASK if task == AUTO else task
            preset = preset.for_task(changes["task"])
        elif "task" in changes:
            presets = sorted(self.known_presets().items())
            knowing = ", ".join(name for name, other in presets if other.tasks)
            raise KnobError(
                "kv_compress_task",
                "bad_task",
                f"kv_compress_task has no effect on preset {preset.name!r}: leave it out, or take "
                f"a preset that knows tasks: {knowing}",
            )
        return preset.settings(force_arena=self.test_force_arena, **changes)

    def _asked_preset(self, name: Any) -> Preset | None:
        """The preset of that name, None for no compression. Raises KnobError."""
        presets = self.known_presets()
        if not isinstance(name, str) or name not in (*UNCOMPRESSED, *presets):
            raise KnobError(
                "kv_compress", "unknown_preset", "kv_compress: " + unknown_preset(name, presets)
            )
        if name == CACHEGEN and self.cachegen is None:
            raise KnobError("kv_compress", "no_store", f"kv_compress={CACHEGEN!r}: {NO_STORE}")
        preset = presets.get(name)
        if preset is not None and preset.propagates and self.tsp_max_inflight_tokens == 0:
            raise KnobError(
                "kv_compress",
                "tsp_unavailable",
                f"kv_compress: preset {name!r} propagates selected tokens, which this server does "
                "not do: its model or a feature does not allow it, or tsp_max_inflight_tokens is 0",
            )
        return preset

    def wants_task(self, xargs: Mapping[str, Any] | None) -> bool:
        """Whether the class of this request's task is still to be told from its prompt."""
        xargs = xargs or {}
        name = xargs.get("kv_compress", self.preset)
        preset = self.known_presets().get(name) if isinstance(name, str) else None
        if preset is None or not preset.tasks:
            return False
        return xargs.get("kv_compress_task", preset.task) == AUTO

    def settings_or_off(self, xargs: Mapping[str, Any] | None) -> Settings | None:
        """As `request_settings`, for where an error can no longer be told to anybody.

        Scheduler and workers resolve the same request alike, also one that came past the
        validation at admission.
        """
        try:
            return self.request_settings(xargs, max_tokens=2**31)
        except ValueError:
            return None


def wants_compression(additional_config: Any) -> bool:
    """Whether vLLM's `additional_config` turns compression on; null and false do not."""
    if not isinstance(additional_config, Mapping):
        return False
    value = additional_config.get("kv_compress")
    return value is not None and value is not False


def uses_store(config: Any) -> bool:
    """Whether vLLM's configuration, or its engine's arguments, name our KV connector."""
    transfer = getattr(config, "kv_transfer_config", None)
    return getattr(transfer, "kv_connector", None) == STORE_CONNECTOR


def parse_engine_config(raw: Any) -> EngineConfig:
    """Check `additional_config["kv_compress"]`: True, a preset's name, or a mapping.

    In a mapping, every field of a preset may stand beside `preset` and overrides it there.
    """
    if raw is True:
        raw = {}
    if isinstance(raw, str):
        raw = {"preset": raw}
    if not isinstance(raw, Mapping):
        raise ValueError(
            "kv_compress must be true, a preset's name or a mapping such as "
            f'{{"preset": "{DEFAULT_PRESET}", "rate": 8}}, not {shorten(raw)}'
        )
    own = {k: v for k, v in raw.items() if k in EngineConfig.model_fields}
    overrides = {k: v for k, v in raw.items() if k not in own}
    if own.get("preset") == CACHEGEN:
        own = {"cachegen": {}, **own}
    try:
        config = EngineConfig(**own)
        if not overrides:
            return config
        if config.preset in UNCOMPRESSED:
            raise ValueError(
                f"{', '.join(overrides)} would override a preset, but the preset is "
                f"{config.preset!r}"
            )
        changeable = set(Preset.model_fields) - {"name"}
        if unknown := sorted(set(overrides) - changeable):
            known = ", ".join(sorted({*EngineConfig.model_fields, *changeable}))
            raise ValueError(f"unknown key {shorten(unknown[0])}; known: {known}")
        base = config.known_presets()[config.preset].model_dump()
        if "rate" in overrides:
            if overrides.get("budget_tokens") is not None:
                raise ValueError(
                    "kv_compress: rate and budget_tokens exclude each other: give one of them"
                )
            base["budget_tokens"] = None
        if {"tsp_rate", "tsp_tokens"} & set(overrides):
            base |= {"tsp_rate": None, "tsp_tokens": None}
        preset = Preset(**{**base, **overrides})
        return EngineConfig(**{**own, "presets": {**config.presets, preset.name: preset}})
    except ValidationError as error:
        raise ValueError(f"kv_compress: {first_problem(error)}") from None
