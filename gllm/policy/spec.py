"""Policies by name: `throttle`, `sarathi:token_budget=512`, `throttle:ut=false,order=edf`."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gllm.core import Order, Policy

_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _convert(key: str, text: str, default: Any, orders: Mapping[str, Order]) -> Any:  # noqa: ANN401 - a field's value
    try:
        if key == "order":
            return orders[text]
        if isinstance(default, bool):
            return _BOOLEANS[text.lower()]
        return type(default)(text)
    except KeyError:
        choices = orders if key == "order" else ("true", "false")
        raise ValueError(f"{key}={text}: choose one of {', '.join(choices)}") from None
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[type(default)]
        raise ValueError(f"{key}={text}: give {kind}, such as {default}") from None


def parse_spec(spec: str, policies: Mapping[str, Callable[..., Policy]], orders: Mapping[str, Order]) -> Policy:
    """Build the policy that `NAME[:key=value,...]` describes.

    Raises:
        ValueError: An unknown name or key, or a bad value; the message lists what exists.
    """
    name, _, options = spec.partition(":")
    make = policies.get(name)
    if make is None:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(policies)}")
    defaults = {field.name: field.default for field in fields(make)}  # type: ignore[arg-type]
    values = {}
    for option in filter(None, options.split(",")):
        key, equals, text = option.partition("=")
        if not equals or key not in defaults:
            raise ValueError(f"policy {name}: unknown option {option!r}; known: {', '.join(defaults)}")
        if key in values:
            raise ValueError(f"policy {name}: {key} is given twice")
        values[key] = text
    try:
        return make(**{key: _convert(key, text, defaults[key], orders) for key, text in values.items()})
    except ValueError as error:
        raise ValueError(f"policy {name}: {error}") from None


def format_spec(policy: Policy, policies: Mapping[str, Callable[..., Policy]], orders: Mapping[str, Order]) -> str:
    """The spec that builds this policy; defaults are left out."""
    name = next(name for name, make in policies.items() if make is type(policy))
    defaults = {field.name: field.default for field in fields(policy)}  # type: ignore[arg-type]
    options = [
        f"{key}={str(value).lower()}"
        for key, value in spec_options(policy, orders).items()
        if getattr(policy, key) != defaults[key]
    ]
    return name + (":" + ",".join(options) if options else "")


def spec_options(policy: Policy, orders: Mapping[str, Order]) -> dict[str, Any]:
    """Every option of a policy, defaults too; its order by name."""
    names = {order: name for name, order in orders.items()}
    values = {field.name: getattr(policy, field.name) for field in fields(policy)}  # type: ignore[arg-type]
    return {key: names[value] if key == "order" else value for key, value in values.items()}
