"""Presets: one way to compress each, shipped in `configs/*.yaml` or written by a user.

What is wrong with one is a `ValueError` that says what was asked, what is allowed and how to
mend it.
"""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_kvcompress.accounting import Settings

OFF, CACHEGEN = "off", "cachegen"
UNCOMPRESSED = (OFF, CACHEGEN)  # stand where a preset may
DEFAULT_PRESET = "kv-compress"
MAX_RATE = 1024
MAX_CHARACTERS = 2**26  # of a preset or a prompt in a file
Task = Literal["localization", "aggregation"]
TASKS: tuple[Task, ...] = get_args(Task)


class StrictModel(BaseModel):
    """Unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Component(BaseModel):
    """A scorer, allocator or selector by its registered name; other keys are its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TaskChanges(StrictModel):
    """What a preset does differently for one class of tasks."""

    scorer: Component | None = None
    window_tokens: int | None = Field(default=None, ge=1, le=1024)
    recent_tokens: int | None = Field(default=None, ge=0, le=4096)


class Preset(StrictModel):
    """One way to compress: who scores, who allocates, who selects, and the numbers.

    group_layers: layers that share one scoring (WindowKV): a number that divides the model's,
        or "quarter": a quarter of the layers (8 of 32), or the next smaller divisor.
    group_leader: which layer of each group is scored, 0 for its first (WindowKV), or "last".
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
    group_leader: Annotated[int, Field(ge=0)] | Literal["last"] = 0
    tasks: dict[Task, TaskChanges] = Field(default_factory=dict)
    task: Task | Literal["auto"] = "auto"
    propagator: Component = Component(name="attention")
    tsp_rate: float | None = Field(default=None, gt=0, le=1)
    tsp_tokens: int | None = Field(default=None, ge=1, le=2**31)
    tsp_layer: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _name_is_free(self) -> "Preset":
        if self.name in UNCOMPRESSED:
            raise ValueError(f"{self.name!r} means no compression and cannot name a preset")
        return self

    @model_validator(mode="after")
    def _tsp_fits(self) -> "Preset":
        if self.tsp_rate is not None and self.tsp_tokens is not None:
            raise ValueError("tsp_rate and tsp_tokens exclude each other: give one of them")
        if self.tsp_layer is not None and not self.propagates:
            raise ValueError("tsp_layer has no effect without tsp_rate or tsp_tokens")
        if self.group_leader != 0 and self.propagates:
            raise ValueError(
                "group_leader must be 0 with tsp_rate or tsp_tokens: a layer that saw the selected "
                "tokens only cannot judge for one below that saw them all"
            )
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

    def leader_of_group(self, layers: int) -> int:
        """`group_leader` for a model of that many layers, 0-based inside the group.

        Raises:
            ValueError: a group has not so many layers.
        """
        size = self.layers_per_group(layers)
        leader = size - 1 if self.group_leader == "last" else self.group_leader
        if leader >= size:
            raise ValueError(
                f"preset {self.name!r}: group_leader={leader}, but a group has {size} layer(s); "
                f"allowed: 0 to {size - 1} or 'last'"
            )
        return leader

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
    return _parse_preset(read_text(path, "preset file "), str(path))


def read_text(path: str | Path, what: str = "") -> str:
    """Raises ValueError, with one line that says why, where `path` cannot be read as text."""
    try:
        with Path(path).open() as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"cannot read {what}{path}: {reason}") from None
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"cannot read {what}{path}: it has more than {MAX_CHARACTERS} characters")
    return text


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
    return f"unknown preset {shorten(name)}; known: {', '.join([*UNCOMPRESSED, *sorted(presets)])}"


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
