"""Nothing works only because the bundled models are tiny: OLMoE-1B-7B's width, two layers, under 4 GB."""

import json
import subprocess
import sys

import pytest

LIMIT = 4_000_000_000
TOKENS = 4096

SCRIPT = f"""
import json, torch
from transformers import OlmoeConfig, OlmoeForCausalLM
import moe_lens as ml
from moe_lens.capture.run import peak_memory_bytes
from moe_lens.models.lens import Lens

config = OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8,
                     num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=16, vocab_size=50304)
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    model = OlmoeForCausalLM(config)
model.to_empty(device="cpu")
torch.manual_seed(0)
for p in model.parameters():
    torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.0 if p.dim() == 1 else 0.02)
model.model.rotary_emb = type(model.model.rotary_emb)(config)
torch.set_default_dtype(torch.float32)
lens = Lens(model.eval(), ml.load("bundled:tiny-moe").tokenizer, name="random-olmoe-width")
result = ml.probe(lens, ml.corpus("bundled:"), k=(1,), max_tokens={TOKENS}, document_tokens=64, max_memory={LIMIT},
                  neurons=False, progress=False)  # whose AUROCs of every neuron and concept need more
print(json.dumps({{"peak": peak_memory_bytes(), "cells": len(result.cells), "d_ff": lens.spec.layers[0].d_ff,
                  "concepts": int(result.cells.concept.nunique()),
                  "tokens": int(result.cells.groupby(["layer", "expert"]).n_select.max().sum())}}))
"""


@pytest.mark.slow
def test_a_true_width_olmoe_streams_all_concepts_below_its_memory_limit():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] < LIMIT
    assert found["concepts"] > 80
    assert found["cells"] == 2 * 64 * found["concepts"]
    assert found["d_ff"] == 1024
    assert found["tokens"] > 0.3 * TOKENS * 8 * 2  # every routed row of the select half was streamed
