"""Components by name: the built-in ones and those of third parties.

A third party registers with the decorators below from a module that an entry point of the
group `vllm_kvcompress.policies` names; it is imported when a component is first looked up.
"""

import inspect
import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from vllm_kvcompress.policy.interfaces import Allocator, Propagator, Scorer, Selector
from vllm_kvcompress.policy.policy import Policy
from vllm_kvcompress.presets import Component, Preset, first_problem, shorten

ENTRY_POINT_GROUP = "vllm_kvcompress.policies"

S = TypeVar("S", bound=Callable[..., Scorer])
A = TypeVar("A", bound=Callable[..., Allocator])
K = TypeVar("K", bound=Callable[..., Selector])
P = TypeVar("P", bound=Callable[..., Propagator])

_scorers: dict[str, Callable[..., Scorer]] = {}
_allocators: dict[str, Callable[..., Allocator]] = {}
_selectors: dict[str, Callable[..., Selector]] = {}
_propagators: dict[str, Callable[..., Propagator]] = {}


def register_scorer(name: str) -> Callable[[S], S]:
    """Decorate a class, or a function that makes a `Scorer`, to give it a name in presets."""
    return lambda make: _register("scorer", _scorers, name, make)


def register_allocator(name: str) -> Callable[[A], A]:
    """Decorate a class, or a function that makes an `Allocator`, to give it a name."""
    return lambda make: _register("allocator", _allocators, name, make)


def register_selector(name: str) -> Callable[[K], K]:
    """Decorate a class, or a function that makes a `Selector`, to give it a name."""
    return lambda make: _register("selector", _selectors, name, make)


def register_propagator(name: str) -> Callable[[P], P]:
    """Decorate a class, or a function that makes a `Propagator`, to give it a name."""
    return lambda make: _register("propagator", _propagators, name, make)


def build(preset: Preset, layers: int | None = None) -> Policy:
    """Make the policy that a preset names, for a model of `layers` layers.

    Without `layers` only what does not depend on the model is checked.

    Raises:
        ValueError: a component is unknown, or a parameter of it is unknown, missing or out of
            range; one line that says which and what is allowed.
    """
    _load_third_parties()
    group_layers = preset.layers_per_group(layers) if layers is not None else 1
    group_leader = preset.leader_of_group(layers) if layers is not None else 0
    if layers is not None and preset.propagates:
        preset.last_full_layer(layers)
    scorer = _make("scorer", _scorers, preset.scorer)
    if scorer.shared_by_heads and preset.continual:
        raise ValueError(
            f"scorer {preset.scorer.name!r} shares its scores among heads, which keep different "
            "tokens once they are compressed again: leave out `continual`"
        )
    return Policy(
        scorer=scorer,
        allocator=_make("allocator", _allocators, preset.allocator, group_layers=group_layers),
        selector=_make("selector", _selectors, preset.selector),
        propagator=(
            _make("propagator", _propagators, preset.propagator) if preset.propagates else None
        ),
        group_layers=group_layers,
        group_leader=group_leader,
    )


def _register(kind: str, known: dict[str, Any], name: str, make: Any) -> Any:
    if known.setdefault(name, make) is not make:
        raise ValueError(f"{kind} {name!r} is registered already, by {known[name].__qualname__}")
    return make


def _make(
    kind: str, known: dict[str, Callable[..., Any]], component: Component, **offered: Any
) -> Any:
    """Make a component from its parameters, and from what is `offered` if it takes it."""
    if component.name not in known:
        names = ", ".join(sorted(known))
        raise ValueError(f"unknown {kind} {shorten(component.name)}; known: {names}")
    make, params = known[component.name], component.params
    where = f"{kind} {component.name!r}"
    signature = inspect.signature(make).parameters
    unknown = sorted(set(params) - set(signature))
    if unknown:
        allowed = ", ".join(signature) or "none"
        raise ValueError(f"{where} has no parameter {shorten(unknown[0])}; known: {allowed}")
    try:
        _check_types(make, params)
        taken = {name: value for name, value in offered.items() if name in signature}
        return make(**{**taken, **params})
    except ValidationError as error:
        raise ValueError(f"{where}: {first_problem(error)}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _check_types(make: Callable[..., Any], params: dict[str, Any]) -> None:
    """Check `params` against the annotations of `make`, `Annotated[..., Field(...)]` too."""
    hinted = make.__init__ if inspect.isclass(make) else make
    hints = get_type_hints(hinted, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(make).parameters.items():
        required = parameter.default is parameter.empty
        fields[name] = (hints.get(name, Any), ... if required else parameter.default)
    create_model("Parameters", __config__=ConfigDict(strict=True), **fields)(**params)


@cache
def _load_third_parties() -> None:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception:
            logging.getLogger(__name__).exception("policies of entry point %r failed", entry.name)
