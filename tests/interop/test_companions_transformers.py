"""What comes along into an output, as transformers reads it: templates in a sub-folder, infinities
in config.json."""

from __future__ import annotations

import json
import math

import pytest

import ptq_cli
from tests.builders import copy_sample

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("fmt", ["ptq", "compressed-tensors"])
def test_templates_and_infinities(fmt, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = copy_sample(tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")
    (folder / "chat_template.jinja").write_text("{{ 'plain' }}")
    config = json.loads((folder / "config.json").read_text()) | {"time_step_limit": [0.0, math.inf]}
    (folder / "config.json").write_text(json.dumps(config))
    ptq_cli.rtn(folder, format=fmt, output=tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").time_step_limit == [
        0,
        math.inf,
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == {"default": "{{ 'plain' }}", "tool_use": "{{ 'tools' }}"}
