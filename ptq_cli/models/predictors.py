"""Blocks that predict further tokens (multi-token prediction; DeepSeek-V3, arXiv 2412.19437): they
stand behind the model's own, with numbers from `num_hidden_layers` on (DeepSeek-V3, GLM-4.5), or in
a module `mtp` (Qwen3-Next).

No forward here runs them, so no tokens reach them: their linears that have the names of the
family's are rounded to nearest, what else they hold stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ptq_cli.models.block_sites import kinds
from ptq_cli.models.families import family_of, multimodal_of
from ptq_cli.models.family import Config, Family, text_config

_MODULE = re.compile(r"(^|\.)mtp(_\w+)?\.")


def predictor_tensors(names: Iterable[str], config: Config) -> dict[str, bool]:
    """Those of blocks that predict further tokens, and whether each is the weight of a linear as
    the family's blocks have them. names: of all tensors; none where the family is not known"""
    family = family_of(config)
    if family is None:
        return {}
    behind, count = _in_a_block(family, config), text_config(config).get("num_hidden_layers")
    linear = _linears(family)
    found = {}
    for name in names:
        match = behind.match(name)
        after = match is not None and isinstance(count, int) and int(match[1]) >= count
        if after or _MODULE.search(name):
            found[name] = linear.search(name) is not None
    return found


def _in_a_block(family: Family, config: Config) -> re.Pattern[str]:
    """Matches the beginning of a name in a block, up to its number."""
    multimodal = multimodal_of(config)
    own = family.names.prefixes
    prefixes = own if multimodal is None else multimodal.prefixes(family.names)
    words = "|".join(map(re.escape, prefixes))
    return re.compile(rf"(?:{words}){re.escape(family.names.blocks)}\.(\d+)\.")


def _linears(family: Family) -> re.Pattern[str]:
    """Matches the end of a name that is the weight of a linear in a block."""
    own = {linear for kind in kinds(family) for site in kind for linear in site.linears}
    words = "|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in sorted(own))
    return re.compile(rf"\.\d+\.(?:{words})\.weight$")
