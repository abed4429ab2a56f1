"""Settings: every key checked, the nearest name offered, one value for one meaning."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from triton_only_backend.errors import SettingsError, nearest
from triton_only_backend.settings import OWN_OPTIONS, Settings, from_environment, parse


def test_defaults():
    assert parse(environ={}) == Settings(
        on_violation="error", allow=(), deterministic=True, tuning="shipped", database=None,
        disable_passes=(), report=None, inductor={},
    )  # fmt: skip


@pytest.mark.parametrize(
    "mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
)
def test_a_mode_is_inductors(mode):
    assert parse(mode, environ={}).inductor == torch._inductor.list_mode_options()[mode]


def test_options_override_the_mode():
    settings = parse("reduce-overhead", {"triton.cudagraphs": False}, environ={})
    assert settings.inductor["triton.cudagraphs"] is False


@pytest.mark.parametrize("key", ["max_autotune", "max-autotune", "triton.unique_kernel_names"])
def test_any_key_of_inductors_config_is_an_option(key):
    assert parse(options={key: True}, environ={}).inductor == {key.replace("-", "_"): True}


def test_options_come_over_the_environment():
    environ = {
        "TRITON_ONLY_ON_VIOLATION": "warn",
        "TRITON_ONLY_ALLOW": "nccl, aten.sort*",
        "X": "y",
    }
    assert parse(environ=environ).allow == ("nccl", "aten.sort*")
    settings = parse(options={"on_violation": "ignore"}, environ=environ)
    assert (settings.on_violation, settings.allow) == ("ignore", ("nccl", "aten.sort*"))


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("TRUE", True), ("0", False), ("false", False)]
)
def test_deterministic_from_the_environment(text, value):
    assert parse(environ={"TRITON_ONLY_DETERMINISTIC": text}).deterministic is value


@pytest.mark.parametrize("tuning", ["heuristic", "shipped", "search"])
def test_tuning_and_database(tuning):
    path = Path("somewhere/tuning.db")
    settings = parse(options={"tuning": tuning, "database": path}, environ={})
    assert (settings.tuning, settings.database) == (tuning, str(path))
    environ = {"TRITON_ONLY_TUNING": tuning, "TRITON_ONLY_DATABASE": "none"}
    assert from_environment(environ) == Settings(tuning=tuning, database="none")


def test_lists_become_tuples_and_paths_become_text():
    options = {"allow": ["nccl"], "disable_passes": {"b", "a"}, "report": Path("r.json")}
    settings = parse(options=options, environ={})
    assert (settings.allow, settings.disable_passes) == (("nccl",), ("a", "b"))
    assert settings.report == "r.json"


@pytest.mark.parametrize(
    ("mode", "options", "environ", "message"),
    [
        ("reduce-overheads", {}, {}, r"unknown mode .*did you mean \"reduce-overhead\""),
        ("lite", {}, {}, "mode 'lite' cannot be used: it leaves every operation to ATen"),
        (None, {"on_violations": "warn"}, {}, r"unknown option .*did you mean \"on_violation\""),
        (None, {"max_autotun": True}, {}, r"unknown option .*did you mean \"max_autotune\""),
        (None, {"inductor": {}}, {}, "unknown option 'inductor'"),
        (None, {"on_violation": "wran"}, {}, r"option 'on_violation' .*did you mean \"warn\""),
        (
            None,
            {"tuning": "serch"},
            {},
            r"option 'tuning' is 'serch'; did you mean \"search\".*one of heuristic, shipped, search",
        ),
        (None, {"database": 3}, {}, "option 'database' must be a path or None, got 3"),
        (None, {"allow": "nccl"}, {}, "option 'allow' must be a list of strings, got 'nccl'"),
        (None, {"allow": 5}, {}, "option 'allow' must be a list of strings, got 5"),
        (None, {"disable_passes": [1]}, {}, "option 'disable_passes' must be a list of strings"),
        (None, {"deterministic": 1}, {}, "option 'deterministic' must be True or False, got 1"),
        (None, {"report": 3}, {}, "option 'report' must be a path or None, got 3"),
        (None, {"max_autotune": 1}, {}, "option 'max_autotune' takes a bool, got 1"),
        (None, {}, {"TRITON_ONLY_ALOW": ""}, r"variable TRITON_ONLY_ALOW.*TRITON_ONLY_ALLOW"),
        (None, {}, {"TRITON_ONLY_DETERMINISTIC": "yes"}, "must be 0, 1, true or false"),
        (None, {}, {"TRITON_ONLY_ON_VIOLATION": "no"}, "variable TRITON_ONLY_ON_VIOLATION is 'no'"),
    ],
)
def test_what_is_unknown_or_unfit_is_named(mode, options, environ, message):
    with pytest.raises(SettingsError, match=message):
        parse(mode, options, environ)


def test_the_key_holds_what_decides_the_code():
    """Every own option changes the cache key, but for those that only judge or report."""
    changed = {
        "deterministic": False, "tuning": "other", "database": "x", "disable_passes": ("x",),
        "attention": "flex",
    }  # fmt: skip
    judging = {"on_violation": "warn", "allow": ("x",), "report": "x"}
    assert {*changed, *judging} == set(OWN_OPTIONS)
    base = Settings()
    assert all(dataclasses.replace(base, **{k: v}).key != base.key for k, v in changed.items())
    assert all(dataclasses.replace(base, **{k: v}).key == base.key for k, v in judging.items())


def test_nearest_offers_nothing_far():
    assert nearest("zzz", ["allow"]) == ""
