"""What the library `adapters` computes; run by a Python that has it, as `PYTHON THIS_FILE FOLDER`.

Reads FOLDER/backbone (a Hugging Face T5), FOLDER/tokens.safetensors, FOLDER/ours/* (adapters to
load) and FOLDER/theirs.json (name -> class and options of adapters to make). Writes the adapters
that it makes to FOLDER/theirs/<name>, and logits of all of them to FOLDER/logits.safetensors.
"""

import json
import sys
from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import load_file, save_file


def make_model(folder: Path) -> torch.nn.Module:
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder / "backbone").eval()
    adapters.init(model)
    return model


def main(folder: Path) -> None:
    tokens = load_file(folder / "tokens.safetensors")
    logits = {}

    def run(name: str, model: torch.nn.Module) -> None:
        with torch.no_grad():
            logits[name] = model(**{k: v.long() for k, v in tokens.items()}).logits

    run("backbone", make_model(folder))
    for path in sorted((folder / "ours").iterdir()):
        model = make_model(folder)
        found: dict = {}
        name = model.load_adapter(str(path), use_safetensors=True, loading_info=found)
        assert not found["missing_keys"] and not found["unexpected_keys"], found
        model.set_active_adapters(name)
        run(f"ours/{path.name}", model.eval())
    (folder / "theirs").mkdir()
    for name, (kind, options) in json.loads((folder / "theirs.json").read_text()).items():
        model = make_model(folder)
        with_head = options.pop("with_head", False)
        model.add_adapter("expert", config=getattr(adapters, kind)(**options), set_active=True)
        torch.manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "adapters.expert" in key:
                    parameter.normal_(0, 0.3)
        model.save_adapter(
            str(folder / "theirs" / name), "expert", use_safetensors=True, with_head=with_head
        )
        run(f"theirs/{name}", model.eval())
    save_file({name: tensor.contiguous() for name, tensor in logits.items()},
              folder / "logits.safetensors")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
