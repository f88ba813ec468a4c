"""Run in MLX's environment: read folders and tokens, write log-probabilities of all tokens."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

question = json.loads(Path(sys.argv[1]).read_text())
mx.set_default_device(mx.cpu)
answers = []
for request in question:
    model, _ = load_model(Path(request["base"]))
    if request["adapter"]:
        model = load_adapters(model, request["adapter"])
    model.eval()
    logits = [model(mx.array([tokens]))[0].astype(mx.float32) for tokens in request["tokens"]]
    found = [each - mx.logsumexp(each, axis=-1, keepdims=True) for each in logits]
    path = Path(request["out"])
    mx.save_safetensors(str(path), {str(i): each for i, each in enumerate(found)})
    answers.append(str(path))
Path(sys.argv[2]).write_text(json.dumps(answers))
