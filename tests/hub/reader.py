"""What a reader of exported checkpoints does, in a process of its own: load them all, run them, say what ran.

Arguments: the folder of the checkpoints; the Auto class of each, as JSON.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers.models.auto.image_processing_auto import AutoImageProcessor


torch.set_num_threads(1)
exports, auto_classes, seen = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
for name, auto_class in auto_classes.items():
    answers = load_file(exports / f"{name}.answers")
    config = transformers.AutoConfig.from_pretrained(exports / name, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_pretrained(exports / name, trust_remote_code=True)
    with torch.no_grad():
        seen[name] = {
            "class": type(model).__name__,
            "modules": [type(model).__module__, type(config).__module__],
            # But for last digits, which may depend on where in memory a tensor lies.
            "same_output": torch.allclose(model(answers["input"])[0], answers["output"], rtol=0, atol=1e-6),
        }
        if "generated" in answers:
            generated = model.generate(answers["input"], max_new_tokens=6, do_sample=False)
            seen[name]["same_text"] = torch.equal(generated, answers["generated"])
        if "pixel_values" in model.main_input_name:
            processor = AutoImageProcessor.from_pretrained(exports / name, trust_remote_code=True)
            seen[name]["modules"].append(type(processor).__module__)
            image = torch.arange(5 * 6 * 3, dtype=torch.uint8).view(5, 6, 3).numpy()
            seen[name]["pixels"] = list(processor(image, return_tensors="pt")["pixel_values"].shape[1:])

# The base model and another head of a language model, its tokenizer and pipeline; and what its reader saves.
first = exports / next(iter(auto_classes))
base = transformers.AutoModel.from_pretrained(first, trust_remote_code=True)
other = transformers.AutoModelForSequenceClassification.from_pretrained(first, trust_remote_code=True)
pipe = transformers.pipeline("text-generation", model=str(first), trust_remote_code=True)
language_model = transformers.AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
language_model.save_pretrained(sys.argv[3])
again = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
ids = load_file(exports / f"{first.name}.answers")["input"]
with torch.no_grad():
    seen["others"] = {
        "classes": [type(base).__name__, type(other).__name__],
        "text": pipe("The statement", max_new_tokens=4)[0]["generated_text"],
        "saved_again": torch.equal(again(ids).logits, language_model(ids).logits),
        "sas_hf": "sas_hf" in sys.modules,
    }
print(json.dumps(seen))
