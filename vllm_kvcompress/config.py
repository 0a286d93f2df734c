"""What a user can set: presets (`configs/*.yaml`), the engine's settings, a request's knobs.

Everything typed by a user is checked here, and every refusal is a `ValueError` that says what
was asked, what is allowed and how to mend it.
"""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_kvcompress.accounting import Settings

OFF = "off"
DEFAULT_PRESET = "kv-compress"
MAX_RATE = 1024
REQUEST_PREFIX = "kv_compress"
REQUEST_KEYS = (
    "kv_compress",
    "kv_compress_rate",
    "kv_compress_budget",
    "kv_compress_question",
    "kv_compress_task",
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
)
Task = Literal["localization", "aggregation"]
AUTO = "auto"
TASKS: tuple[Task, ...] = get_args(Task)
UNKNOWN_TASK: Task = "localization"  # of prompts without text


class KnobError(ValueError):
    """A request's knob that is refused: `knob` is its key, `reason` a short label for counters."""

    def __init__(self, knob: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.knob, self.reason = knob, reason


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Component(BaseModel):
    """A scorer, allocator or selector by its registered name; other keys are its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TaskChanges(_Model):
    """What a preset does differently for one class of tasks."""

    scorer: Component | None = None
    window_tokens: int | None = Field(default=None, ge=1, le=1024)
    recent_tokens: int | None = Field(default=None, ge=0, le=4096)


class Preset(_Model):
    """One way to compress: who scores, who allocates, who selects, and the numbers.

    group_layers: layers that share one scoring (WindowKV): a number that divides the model's,
        or "quarter": a quarter of the layers (8 of 32), or the next smaller divisor.
    tasks: changes for the classes of tasks (WindowKV), for both of them or none.
    task: the class of a request that names none; "auto": the one its prompt looks like.
    tsp_rate, tsp_tokens: with one of them, only so many tokens of a prompt, chosen by
        `propagator`, go on above layer `tsp_layer` (FastKV's token-selective propagation).
    tsp_layer: 0-based, the last layer that sees all tokens; None: `L/2 - 1`.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = ""
    scorer: Component
    allocator: Component
    selector: Component = Component(name="top-k")
    rate: float = Field(default=8.0, ge=1, le=MAX_RATE)
    budget_tokens: int | None = Field(default=None, ge=1, le=2**31)
    window_tokens: int = Field(default=16, ge=1, le=1024)
    sink_tokens: int = Field(default=0, ge=0, le=4096)
    recent_tokens: int = Field(default=0, ge=0, le=4096)
    continual: bool = False
    continual_slack_blocks: int = Field(default=4, ge=1, le=1024)
    group_layers: Annotated[int, Field(ge=1)] | Literal["quarter"] = 1
    tasks: dict[Task, TaskChanges] = Field(default_factory=dict)
    task: Task | Literal["auto"] = "auto"
    propagator: Component = Component(name="attention")
    tsp_rate: float | None = Field(default=None, gt=0, le=1)
    tsp_tokens: int | None = Field(default=None, ge=1, le=2**31)
    tsp_layer: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _off_is_reserved(self) -> "Preset":
        if self.name == OFF:
            raise ValueError(f"{OFF!r} means no compression and cannot name a preset")
        return self

    @model_validator(mode="after")
    def _one_tsp_size(self) -> "Preset":
        if self.tsp_rate is not None and self.tsp_tokens is not None:
            raise ValueError("tsp_rate and tsp_tokens exclude each other: give one of them")
        if self.tsp_layer is not None and not self.propagates:
            raise ValueError("tsp_layer has no effect without tsp_rate or tsp_tokens")
        return self

    @property
    def propagates(self) -> bool:
        """Whether the deep layers see selected tokens only."""
        return self.tsp_rate is not None or self.tsp_tokens is not None

    def last_full_layer(self, layers: int) -> int:
        """`tsp_layer` for a model of that many layers.

        Raises:
            ValueError: there is no layer above it.
        """
        layer = max(0, layers // 2 - 1) if self.tsp_layer is None else self.tsp_layer
        if layer > layers - 2:
            raise ValueError(
                f"preset {self.name!r}: tsp_layer={layer} leaves no layer above it in a model of "
                f"{layers} layers; allowed: 0 to {layers - 2}"
            )
        return layer

    @model_validator(mode="after")
    def _both_tasks_or_none(self) -> "Preset":
        if len(self.tasks) not in (0, len(TASKS)):
            raise ValueError(f"tasks: give changes for each of {', '.join(TASKS)}")
        return self

    def for_task(self, task: Task | None) -> "Preset":
        """This preset as it serves a request of that class; None where it knows no classes."""
        if task is None:
            return self
        changes = {k: v for k, v in self.tasks[task] if v is not None}
        return self.model_copy(update={**changes, "tasks": {}})

    def variants(self) -> list["Preset"]:
        """What requests may get of this preset: itself, or one for each class of tasks."""
        return [self.for_task(task) for task in self.tasks] or [self]

    def layers_per_group(self, layers: int) -> int:
        """`group_layers` for a model of that many layers.

        Raises:
            ValueError: it does not divide them.
        """
        if self.group_layers == "quarter":
            return max(d for d in range(1, max(1, layers // 4) + 1) if layers % d == 0)
        if layers % self.group_layers:
            divisors = [d for d in range(1, layers + 1) if layers % d == 0]
            raise ValueError(
                f"preset {self.name!r}: group_layers={self.group_layers} does not divide the "
                f"model's {layers} layers; allowed: {', '.join(map(str, divisors))} or 'quarter'"
            )
        return self.group_layers

    def settings(self, **changes: Any) -> Settings:
        """The numbers of this preset as the arithmetic wants them."""
        fields = dict(
            preset=self.name,
            rate=self.rate,
            budget_tokens=self.budget_tokens,
            window_tokens=self.window_tokens,
            sink_tokens=self.sink_tokens,
            recent_tokens=self.recent_tokens,
            continual=self.continual,
            continual_slack_blocks=self.continual_slack_blocks,
            tsp_rate=self.tsp_rate,
            tsp_tokens=self.tsp_tokens,
        )
        return Settings(**{**fields, **changes})


class EngineConfig(_Model):
    """`additional_config["kv_compress"]`, checked.

    preset: what a request gets that names none: a shipped preset, or one of `presets`, or
        "off" (compress only the requests that ask for it).
    presets: further presets by name, for instance the file given to `--kv-compress`.
    tsp_max_inflight_tokens: prompt tokens of all requests whose deep layers still wait for
        their last chunk; their hidden states take memory from the cache. None: the context
        length where the model allows TSP; 0: no TSP.
    test_force_arena: for tests only; sends every prompt through an arena, even at rate 1, and
        through token-selective propagation, even if that selects all tokens.
    """

    preset: str = DEFAULT_PRESET
    presets: dict[str, Preset] = Field(default_factory=dict)
    tsp_max_inflight_tokens: int | None = Field(default=None, ge=0, le=2**31)
    test_force_arena: bool = False

    @model_validator(mode="after")
    def _preset_exists(self) -> "EngineConfig":
        if self.preset != OFF and self.preset not in self.known_presets():
            raise ValueError(unknown_preset(self.preset, self.known_presets()))
        return self

    def known_presets(self) -> dict[str, Preset]:
        return {**shipped_presets(), **self.presets}

    def asked_presets(self) -> dict[str, Preset]:
        """Those that somebody chose for this engine: its own one, and `presets`."""
        chosen = {} if self.preset == OFF else {self.preset: self.known_presets()[self.preset]}
        return {**self.presets, **chosen}

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
        knobs = {k: v for k, v in (xargs or {}).items() if str(k).startswith(REQUEST_PREFIX)}
        for key, value in knobs.items():
            if key not in REQUEST_KEYS and (key.startswith(REQUEST_PREFIX + "_")):
                raise KnobError(
                    key,
                    "unknown_knob",
                    f"{shorten(key)} (given {shorten(value)}) is not a knob of kv-compress; "
                    f"known: {', '.join(REQUEST_KEYS)}",
                )
        changes: dict[str, Any] = {"force_arena": self.test_force_arena}
        name = knobs.get("kv_compress", self.preset)
        presets = self.known_presets()
        if not isinstance(name, str) or (name != OFF and name not in presets):
            raise KnobError(
                "kv_compress", "unknown_preset", "kv_compress: " + unknown_preset(name, presets)
            )
        rate, budget = knobs.get("kv_compress_rate"), knobs.get("kv_compress_budget")
        if rate is not None and budget is not None:
            raise KnobError(
                "kv_compress_rate",
                "rate_and_budget",
                "kv_compress_rate and kv_compress_budget exclude each other: give one of them "
                f"(got {shorten(rate)} and {shorten(budget)})",
            )
        if "kv_compress_rate" in knobs:
            if not _is_number(rate) or not 1 <= rate <= MAX_RATE:
                raise KnobError(
                    "kv_compress_rate",
                    "bad_rate",
                    f"kv_compress_rate={shorten(rate)} is not allowed: give a number from 1 "
                    f"(keep everything) to {MAX_RATE} (keep a {MAX_RATE}th)",
                )
            changes |= {"rate": float(rate), "budget_tokens": None}
        if "kv_compress_budget" in knobs:
            if not _is_whole(budget) or not 1 <= budget <= max_tokens:
                raise KnobError(
                    "kv_compress_budget",
                    "bad_budget",
                    f"kv_compress_budget={shorten(budget)} is not allowed: give a whole number of "
                    f"tokens from 1 to {max_tokens}",
                )
            changes |= {"budget_tokens": int(budget)}
        if "kv_compress_question" in knobs:
            question = knobs["kv_compress_question"]
            if not _is_whole(question) or not 0 <= question <= max_tokens:
                raise KnobError(
                    "kv_compress_question",
                    "bad_question",
                    f"kv_compress_question={shorten(question)} is not allowed: give a whole "
                    f"number of tokens, from 0 to {max_tokens}, at the prompt's end",
                )
            changes |= {"question_tokens": int(question)}
        task = knobs.get("kv_compress_task")
        if "kv_compress_task" in knobs:
            if task not in (*TASKS, AUTO):
                raise KnobError(
                    "kv_compress_task",
                    "bad_task",
                    f"kv_compress_task={shorten(task)} is not allowed: give one of "
                    f"{', '.join((*TASKS, AUTO))}",
                )
            if name != OFF and not presets[name].tasks:
                knowing = [other for other, preset in sorted(presets.items()) if preset.tasks]
                raise KnobError(
                    "kv_compress_task",
                    "bad_task",
                    f"kv_compress_task has no effect on preset {name!r}: leave it out, or take "
                    f"a preset that knows tasks: {', '.join(knowing)}",
                )
        if name == OFF:
            return None
        preset = presets[name]
        if preset.propagates and self.tsp_max_inflight_tokens == 0:
            raise KnobError(
                "kv_compress",
                "tsp_unavailable",
                f"kv_compress: preset {name!r} propagates selected tokens, which this server does "
                "not do: its model or a feature does not allow it, or tsp_max_inflight_tokens is 0",
            )
        if not preset.tasks:
            return preset.settings(**changes)
        task = preset.task if task is None else task
        known = cast(Task, UNKNOWN_TASK if task == AUTO else task)
        return preset.for_task(known).settings(task=known, **changes)

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
    try:
        config = EngineConfig(**own)
        if not overrides:
            return config
        if config.preset == OFF:
            raise ValueError(
                f"{', '.join(overrides)} would override a preset, but the preset is {OFF!r}"
            )
        unknown = sorted(set(overrides) - set(Preset.model_fields) - {"name"})
        if unknown:
            allowed = [*EngineConfig.model_fields, *Preset.model_fields]
            raise ValueError(
                f"unknown key {shorten(unknown[0])}; known: {', '.join(sorted(set(allowed)))}"
            )
        base = config.known_presets()[config.preset].model_dump()
        if {"tsp_rate", "tsp_tokens"} & set(overrides):
            base |= {"tsp_rate": None, "tsp_tokens": None}
        preset = Preset(**{**base, **overrides})
        return EngineConfig(**{**own, "presets": {**config.presets, preset.name: preset}})
    except ValidationError as error:
        raise ValueError(f"kv_compress: {first_problem(error)}") from None


@cache
def shipped_presets() -> dict[str, Preset]:
    """The presets of `configs/`, by name."""
    files = resources.files("vllm_kvcompress.configs").iterdir()
    named = sorted((f for f in files if f.name.endswith(".yaml")), key=lambda f: f.name)
    presets = [_parse_preset(f.read_text(), f.name) for f in named]
    return {preset.name: preset for preset in presets}


def load_preset(path: str | Path) -> Preset:
    """Read a preset from a YAML file.

    Raises:
        ValueError: the file cannot be read, or is no preset; one line that says why.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"cannot read preset file {path}: {reason}") from None
    return _parse_preset(text, str(path))


def _parse_preset(text: str, where: str) -> Preset:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{where} is not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} is no preset: a mapping with name, scorer, allocator is wanted")
    try:
        return Preset(**data)
    except (ValidationError, TypeError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{where} is no preset: {problem}") from None


def unknown_preset(name: Any, presets: Mapping[str, Preset]) -> str:
    return f"unknown preset {shorten(name)}; known: {', '.join([OFF, *sorted(presets)])}"


def first_problem(error: ValidationError) -> str:
    """The first thing wrong, as `key: message (got value)`."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {shorten(problem['input'])})" if key else message


def shorten(value: Any, limit: int = 80) -> str:
    """`repr(value)`, cut so that an error never echoes a novel."""
    if isinstance(value, str) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} characters)"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> TypeGuard[int | float]:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())
