"""What each client makes of quantized folders: `in_own_process(results, client, jobs)`.

Jobs are `{"name", "folder", "float", …}`. Of each there is `<name>`, float32 logits
[1, n, vocabulary] of PROMPT, and `<name>.generated`, the token ids of `generate()`. A job that
fails puts its words into `<name>.error`.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = [[5, 300, 17, 1200, 44, 2, 99, 640, 7, 1999, 3, 815]]
NEW_TOKENS = 2
Result = tuple[Any, Any]


def _forward(model: Any) -> Result:
    import torch

    prompt = torch.tensor(PROMPT)
    with torch.no_grad():
        logits = model(prompt).logits.float().numpy()
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, do_sample=False,
        )  # fmt: skip
    return logits, np.asarray(out)


def reference(job: dict[str, Any]) -> Result:
    """The float model with what this tool's decoder gives, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from ptq_cli.storage.folder import open_quantized

    config = json.loads(Path(job["float"], "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(job["float"], dtype=torch.float32)
    quantized = open_quantized(Path(job["folder"]))
    state = model.state_dict()
    for module in quantized.layers:
        weight = torch.from_numpy(quantized.load(module).dequantized())
        if job["rounded"]:
            weight = weight.to(getattr(torch, config["dtype"])).float()
        state[f"{module}.weight"].copy_(weight)
    if job["format"] == "gguf":
        packed = {f"{module}.weight" for module in quantized.layers}
        for name, values in state.items():
            if values.ndim == 2 and name not in packed:
                values.copy_(values.half().float())
    return _forward(model.eval())


def transformers_plain(job: dict[str, Any]) -> Result:
    import torch
    from transformers import AutoModelForCausalLM

    options = {"gguf_file": "model.gguf"} if job.get("gguf") else {}
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32, **options)
    return _forward(model.eval())


def transformers_gptq(job: dict[str, Any]) -> Result:
    import torch
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    own: Any = None
    if job["format"] == "awq":
        own = AwqConfig(backend="torch_awq")
    elif not job.get("plain"):
        own = GPTQConfig(bits=job["bits"], backend="gptq_torch")
    options = {} if own is None else {"quantization_config": own}
    dtype = torch.bfloat16 if job.get("plain") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=dtype, device_map="cpu", **options
    )
    return _forward(model.eval())


def gptqmodel(job: dict[str, Any]) -> Result:
    import torch
    from gptqmodel import BACKEND, GPTQModel

    backend = BACKEND.AWQ_TORCH if job["format"] == "awq" else BACKEND.GPTQ_TORCH
    return _forward(
        GPTQModel.load(
            job["folder"], device="cpu", backend=backend, dtype=torch.float16
        ).model.eval()
    )


def mlx(job: dict[str, Any]) -> Result:
    import mlx.core as mx
    from mlx_lm import generate, load

    model, tokenizer = load(job["folder"])
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array(PROMPT)).astype(mx.float32))
    text = generate(model, tokenizer, prompt="def main():", max_tokens=NEW_TOKENS)
    return logits, np.array([len(text)])


def llama_cpp(job: dict[str, Any]) -> Result:
    """Log-probabilities of what follows each beginning of PROMPT, for logits."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(Path(job["folder"], "model.gguf"))
    settings.n_ctx, settings.n_parallel, settings.verbosity = 256, 1, 0
    settings.warmup = False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    vocabulary = json.loads(Path(job["float"], "config.json").read_text())["vocab_size"]
    request = {"max_tokens": 1, "temperature": 0, "n_probs": vocabulary, "cache_prompt": False}
    logits, text = np.full((1, len(PROMPT[0]), vocabulary), -np.inf, np.float32), ""
    for place in range(len(PROMPT[0])):
        answer = server.handle_completions({**request, "prompt": PROMPT[0][: place + 1]})
        (choice,) = answer["choices"]
        for token in choice["logprobs"]["content"][0]["top_logprobs"]:
            logits[0, place, token["id"]] = token["logprob"]
        text += choice["text"]
    return logits, np.array([len(text)])


CLIENTS: dict[str, Callable[[dict[str, Any]], Result]] = {
    "reference": reference,
    "transformers": transformers_plain,
    "transformers+gptqmodel": transformers_gptq,
    "gptqmodel": gptqmodel,
    "mlx": mlx,
    "llama.cpp": llama_cpp,
}


def compile_nothing() -> None:
    """GPTQModel compiles the loop that unpacks each layer, which takes 20 times as long as running
    it; the blocks of docs/loading.md compile it."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


def results(client: str, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    compile_nothing()
    found: dict[str, Any] = {}
    for job in jobs:
        try:
            found[job["name"]], found[f"{job['name']}.generated"] = CLIENTS[client](job)
        except Exception as error:
            found[f"{job['name']}.error"] = f"{type(error).__name__}: {error}"
        gc.freeze()  # GPTQModel collects garbage again and again, and would look at all modules
    return found
