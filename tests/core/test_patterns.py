"""A regular expression from a file never takes long: it is tried, or refused, at once."""

from __future__ import annotations

import re
import time

import pytest

from ptq_cli.core.patterns import foreign_match
from ptq_cli.errors import InputError

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
