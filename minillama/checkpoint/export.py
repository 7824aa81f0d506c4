"""Write a model in Hugging Face's layout, so that what was trained here runs elsewhere."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from minillama.checkpoint.files import new_folder
from minillama.checkpoint.names import HUGGING_FACE, HUGGING_FACE_CONFIG, expand
from minillama.checkpoint.native import check_floats, find
from minillama.config import LinearScaling, Llama3Scaling, ModelConfig
from minillama.model import Llama
from minillama.rope import pairs_to_halves
from minillama.tokenizer import BPETokenizer, Tokenizer


def save_huggingface(model: Llama, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files into a new folder.

    `transformers` opens it and gives the same logits. Raises ValueError if the folder is there and not empty.
    """
    folder = Path(os.path.realpath(folder))
    check_floats(model)
    there = find(folder)
    if there.exists() and not (there.is_dir() and not any(there.iterdir())):
        raise ValueError(f"{there} is there and not an empty folder: choose another folder.")
    config = config_for(model.config, str(model.embedding.weight.dtype).removeprefix("torch."), tokenizer)
    ends: dict[str, Any] = {key: value for key, value in config.items() if key.endswith("_token_id")}
    if tokenizer:
        ends["eos_token_id"] = sorted(tokenizer.stop_ids)
    theirs = {ours: name for name, ours in expand(HUGGING_FACE, model.config.n_layers).items()}
    weights = {}
    for name, weight in model.named_parameters():
        turned = name.endswith(("wq.weight", "wk.weight"))
        rows = pairs_to_halves(weight.detach(), model.config.head_dim) if turned else weight.detach()
        weights[theirs[name]] = rows.contiguous()
    with new_folder(folder) as new:
        _write_json(new / "config.json", config)
        _write_json(new / "generation_config.json", ends)
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        (new / "model.safetensors").chmod((new / "config.json").stat().st_mode)  # the library lets only the owner read
        if tokenizer:
            _write_tokenizer(tokenizer, new)


def config_for(config: ModelConfig, dtype: str, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The contents of a config.json that releases of `transformers` before and after 5 understand."""
    theirs: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    theirs |= {key: getattr(config, field) for field, key in HUGGING_FACE_CONFIG.items()}
    rope: dict[str, Any] = {"rope_type": "default"}
    match config.rope_scaling:
        case LinearScaling(factor):
            rope = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                    "original_max_position_embeddings": original}  # fmt: skip
    theirs["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    theirs["rope_parameters"] = {**rope, "rope_theta": config.rope_theta}
    theirs |= {"tie_word_embeddings": config.tie_embeddings, "hidden_act": "silu", "attention_bias": False,
               "mlp_bias": False, "torch_dtype": dtype}  # fmt: skip
    if tokenizer:
        ends = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        theirs |= {f"{name}_token_id": i for name, i in ends.items() if i is not None}
    return theirs


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    ends = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    settings: dict[str, Any] = {f"{name}_token": tokenizer.token(i) for name, i in ends.items() if i is not None}
    if tokenizer.template is not None:
        settings["chat_template"] = tokenizer.template
    if isinstance(tokenizer, BPETokenizer):
        _write_json(folder / "tokenizer.json", tokenizer.to_library())
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        tokenizer.save(folder)
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": tokenizer.add_bos, "legacy": False}
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
