"""A regular expression from a file never takes long: it is tried, or refused, at once."""

from __future__ import annotations

import re
import time

import pytest

from ptq_cli.core.patterns import ForeignPatterns
from ptq_cli.errors import InputError


def foreign_match(pattern, name, where):
    return ForeignPatterns([pattern], where).first(name) is not None


NAME = "model.layers.10.mlp.experts.127.down_proj"
LONG = "model." + "a" * 200 + "!"

USED = [  # by makers of checkpoints
    r".*lm_head",
    r".*\.18\..*gate.*",
    r".*\.(?:1[0-9]|2[0-9])\..*(?:down|up).*",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    r".*self_attn.(q|k|v|o)_proj$",
    r"^(?!.*layers\.5\.).*",
    r".*layers\.(0|1|2|3|4|5|6|7|8|9|10|11|12|13|14|15|16)\..*",
    r"(?i:MODEL)\.layers\.[0-9]{1,2}\.(?P<part>mlp)\.experts\.\d{3}\..*?_proj(?:\.weight)?$",
    r"[]x(+]*|model(?:\.[*+?]|\.layers)",
    "lm_head",
]
HARMFUL = [
    "(a+)+$", "(?:a+)*$", "(a*)*b", "(.*a)*$", "((a+))+$", "(a|a)*$", "(a|aa)+$", "(a?){40}a{40}$",
    "(a|a){40}$", "(?P<x>a+){2,}$", "(a+)+?$", "(?=(a+)+$)", ".*" * 30 + "x$", "a?" * 40 + "a" * 40,
    "(a|a)" * 40 + "$", r"([^\]]+)+$", r"(\w+\.?)+$", "(?x)(a # )\n+)+$", "(?#()(a+)+$",
    "a*" * 9 + "$", "(" * 5000 + "a", "[" * 5000,
    "((?=m){60000}){60000}Z", "((){60000}){60000}", "(?:(?!Z){9999}){999999}Z",
    "(?:(?=m){60000,}){60000,}Z", "(?:.(?=m){60000})*Z", ".*.*.*" + "(?=.)" * 800 + "Z",
]  # fmt: skip


@pytest.mark.parametrize("pattern", USED)
@pytest.mark.parametrize("name", [NAME, "lm_head", "visual.blocks.0.attn.qkv"])
def test_what_checkpoints_hold_is_matched_as_by_re(pattern, name):
    assert foreign_match(pattern, name, "config.json") == (re.match(pattern, name) is not None)


@pytest.mark.parametrize("pattern", HARMFUL)
def test_what_could_take_hours_is_refused_within_a_second(pattern):
    begin = time.perf_counter()
    with pytest.raises(InputError, match=r"^config.json: .* could take hours"):
        foreign_match(pattern, LONG, "config.json")
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("pattern", ["(", "a{4294967296}", "*", "[", "a)", r"\1"])
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(InputError, match=r"^config.json: .* is no regular expression"):
        foreign_match(pattern, NAME, "config.json")


def test_the_longest_that_is_tried_is_quick():
    begin = time.perf_counter()
    assert not foreign_match(".*a.*a.*a.*!!", "a" * 100, "config.json")
    assert time.perf_counter() - begin < 1


NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(30)]


@pytest.mark.parametrize(
    "pattern", ["model.layers.{}.mlp", r".*layers\.{}\.mlp$", r"^model\.layers\.{}$"]
)
def test_many_harmless_patterns_are_quick(pattern):
    begin = time.perf_counter()
    patterns = ForeignPatterns([pattern.replace("{}", str(i)) for i in range(4000)], "here")
    assert {patterns.first(name) for name in NAMES} == {None}
    assert time.perf_counter() - begin < 3


def matches(entries):
    patterns = ForeignPatterns(entries, "config.json")
    return [patterns.first(name) for name in NAMES]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([".*.*.*.*Z"] * 2000, "2000 regular expressions could take hours"),
        ([".*q_proj"] * 20_000, "20000 regular expressions, more than 10000 "),
        (["a." * 2000] * 200, "200 regular expressions, .* more than 500000 characters"),
    ],
)
def test_a_list_that_could_take_long_is_refused_at_once(entries, said):
    begin = time.perf_counter()
    with pytest.raises(InputError, match=f"^config.json: .*{said}"):
        matches(entries)
    assert time.perf_counter() - begin < 1


def test_the_first_pattern_that_matches_is_found():
    patterns = ForeignPatterns(["a.1", r".*\.2", "a"], "here")
    assert [patterns.first(name) for name in ["a.1.x", "a.2", "b.2", "b"]] == [0, 1, 1, None]
