"""What a hostile user gets: one line that names the file and the tensor, exit code 1, nothing
written, an older output untouched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.builders import Outcome, ptq, tree

Q = "layers.0.q_proj"

DOWN = "layers.0.down_proj"


def refused(*arguments: object, words: tuple[str, ...] = (), code: int = 1) -> Outcome:
    """Run a command that must fail: one line, that holds all `words`; nothing written, but for
    finished units, which it then speaks of and which are removed here."""
    before = tree(Path())
    outcome = ptq(*arguments)
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert len(outcome.errors) == 1, outcome.err
    assert [line for line in outcome.err.splitlines() if not line.startswith("ptq: ")] == []
    assert "internal error" not in outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.errors[0]
    kept = [name for name in os.listdir() if name.endswith(".partial")]
    assert bool(kept) == ("finished unit" in outcome.errors[0])
    for name in kept:
        assert {path.suffix for path in Path(name, "out").glob("*")} <= {".safetensors"}
        shutil.rmtree(name)
    assert tree(Path()) == before
    return outcome


def gptq_refused(model: object, *options: object, words: tuple[str, ...]) -> Outcome:
    """The same for gptq, with an older output that must survive it, replaced or not."""
    Path("old").mkdir()
    Path("old/model.safetensors").write_text("older output")
    Path("old/quantization.json").write_text("{}")
    refused("gptq", model, "--activations", "acts", "-o", "old", "--force", *options, words=words)
    return refused("gptq", model, "--activations", "acts", "-o", "new", *options, words=words)
