"""One frozen `Settings` from `mode`, `options` and the environment, parsed once and passed down."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from triton_only_backend import inductor
from triton_only_backend.errors import SettingsError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

ON_VIOLATION = ("error", "warn", "ignore")
TUNING = ("heuristic", "shipped", "search")
ATTENTION = ("triton", "flex")
# The pass that "flex" adds.
FLEX_PASS = "sdpa_to_flex"
# Modes of torch.compile that contradict this backend, with the reason.
REFUSED_MODES = {"lite": "it leaves every operation to ATen, which this backend exists to avoid"}


@dataclass(frozen=True)
class Settings:
    """How one `torch.compile(..., backend="triton_only")` behaves.

    Attributes:
        on_violation: "error" raises AuditError, "warn" logs the report, "ignore" does neither.
        allow: globs of ops or providers that may stay ("aten.sort*", "nccl"); still reported.
        deterministic: results are bitwise equal from run to run. False admits kernels whose order
            of summation varies; at present no kernel needs it.
        tuning: where kernel configurations come from. "shipped": the user's database, then the
            tables of this package, then the heuristic; "search" measures what neither knows when a
            graph is compiled, and saves it; "heuristic" is the heuristic alone.
        database: path of the user's database of configurations; None is the one in the user's
            cache directory, "none" is none.
        attention: "triton" runs scaled_dot_product_attention by the kernels of this package, "flex"
            by FlexAttention, Inductor's Triton template, where that does the same (on a GPU).
        disable_passes: names of passes to leave out.
        report: a path; the report of each compiled graph is written there as JSON.
        inductor: options of torch._inductor.config, the mode's and the user's, by dotted name.
    """

    on_violation: str = "error"
    allow: tuple[str, ...] = ()
    deterministic: bool = True
    tuning: str = "shipped"
    database: str | None = None
    attention: str = "triton"
    disable_passes: tuple[str, ...] = ()
    report: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What of the settings decides which code is compiled; part of the cache key."""
        return repr(
            (self.deterministic, self.tuning, self.database, self.attention, self.disable_passes)
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """The passes that do not run: those disabled, and those that belong to another choice."""
        return (
            self.disable_passes if self.attention == "flex" else (*self.disable_passes, FLEX_PASS)
        )


OWN_OPTIONS = tuple(f.name for f in fields(Settings) if f.name != "inductor")


def parse(
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Settings from torch.compile's `mode` and `options`, over TRITON_ONLY_* variables.

    Raises:
        SettingsError: an unknown mode, option or variable, or a value that does not fit.
    """
    own = _own_from_environment(environ)
    config = dict(_mode_options(mode))
    for key, value in (options or {}).items():
        if key in OWN_OPTIONS:
            own[key] = _checked(key, value, f"option {key!r}")
        else:
            name = _inductor_key(key)
            config[name] = _typed_as(inductor.option_type(name), value, key)
    return Settings(**own, inductor=config)


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """What holds where nothing is compiled: settings from TRITON_ONLY_* variables alone.

    Raises:
        SettingsError: an unknown variable, or a value that does not fit.
    """
    return Settings(**_own_from_environment(environ))


def _mode_options(mode: str | None) -> Mapping[str, Any]:
    modes = inductor.mode_options()
    mode = mode or "default"
    if mode in REFUSED_MODES:
        raise SettingsError(f"triton_only: mode {mode!r} cannot be used: {REFUSED_MODES[mode]}")
    if mode not in modes:
        known = [name for name in modes if name not in REFUSED_MODES]
        raise SettingsError(
            f"triton_only: unknown mode {mode!r}{nearest(mode, known)} (one of {', '.join(known)})"
        )
    return modes[mode]


def _inductor_key(key: str) -> str:
    known = inductor.option_names()
    name = key.replace("-", "_")
    if name not in known:
        raise SettingsError(
            f"triton_only: unknown option {key!r}{nearest(name, [*OWN_OPTIONS, *known])} "
            f"(own options: {', '.join(OWN_OPTIONS)}; or any key of torch._inductor.config)"
        )
    return name


def _typed_as(kind: type | None, value: Any, key: str) -> Any:
    if kind in (bool, int, float, str) and type(value) is not kind:
        raise SettingsError(f"triton_only: option {key!r} takes a {kind.__name__}, got {value!r}")
    return value


def _own_from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    prefix = "TRITON_ONLY_"
    own: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(prefix):
            continue
        key = variable.removeprefix(prefix).lower()
        if key not in OWN_OPTIONS:
            raise SettingsError(
                f"triton_only: unknown environment variable {variable}"
                f"{nearest(key, OWN_OPTIONS)} (known: "
                f"{', '.join(prefix + name.upper() for name in OWN_OPTIONS)})"
            )
        own[key] = _checked(key, _typed(key, text, variable), f"environment variable {variable}")
    return own


def _typed(key: str, text: str, variable: str) -> Any:
    if key in ("allow", "disable_passes"):
        return [item.strip() for item in text.split(",") if item.strip()]
    if key == "deterministic":
        if text.lower() in ("1", "true"):
            return True
        if text.lower() in ("0", "false"):
            return False
        raise SettingsError(f"triton_only: {variable}={text!r} must be 0, 1, true or false")
    return text


def _checked(key: str, value: Any, where: str) -> Any:
    choices = {"on_violation": ON_VIOLATION, "tuning": TUNING, "attention": ATTENTION}.get(key)
    if choices is not None:
        if value not in choices:
            hint = nearest(str(value), choices)
            raise SettingsError(
                f"triton_only: {where} is {value!r}{hint} (one of {', '.join(choices)})"
            )
    elif key in ("allow", "disable_passes"):
        listed = isinstance(value, list | tuple | set | frozenset)
        if not listed or not all(isinstance(item, str) for item in value):
            raise SettingsError(f"triton_only: {where} must be a list of strings, got {value!r}")
        value = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    elif key == "deterministic" and not isinstance(value, bool):
        raise SettingsError(f"triton_only: {where} must be True or False, got {value!r}")
    elif key in ("report", "database") and value is not None:
        if not isinstance(value, str | os.PathLike):
            raise SettingsError(f"triton_only: {where} must be a path or None, got {value!r}")
        value = os.fspath(value)
    return value
