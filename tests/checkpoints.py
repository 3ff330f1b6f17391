"""Makes tiny checkpoint folders of CLIP and SigLIP 2 in Hugging Face's layout, with random parameters from a seed."""

import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers
from PIL import Image

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 16, "patch_size": 5}
CONFIGS = {
    "clip": {
        "model_type": "clip",
        "projection_dim": 12,
        "text_config": {
            **TOWER,
            "vocab_size": 514,
            "max_position_embeddings": 12,
            "bos_token_id": 512,
            "eos_token_id": 513,
        },
        "vision_config": VISION,
    },
    "siglip": {
        "model_type": "siglip",
        "text_config": {**TOWER, "vocab_size": 287, "max_position_embeddings": 12},
        "vision_config": VISION,
    },
}
_PROCESSOR = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
PROCESSORS = {
    "clip": {
        **_PROCESSOR, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 16, "width": 16},
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip": {
        **_PROCESSOR, "image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16},
        "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    },
}  # fmt: skip
TEXTS = ["Lyon, FRANCE", "a", "a text that is far too long for its tower", "東京 🗼"]


def images():
    """Returns three photos of odd sizes: wide, high, one pixel."""
    rng = np.random.default_rng(7)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in ((37, 23), (19, 41), (1, 1))]


def write(folder: pathlib.Path, kind: str, shapes: dict[str, list[int]]) -> pathlib.Path:
    """Writes a checkpoint folder. shapes: name -> shape of each tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    safetensors.numpy.save_file(parameters(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    {"clip": _clip_tokenizer, "siglip": _gemma_tokenizer}[kind](folder)
    return folder


def parameters(shapes):
    """Returns name -> numbers that keep a tower's activations in range."""
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in sorted(shapes.items()):
        values = rng.normal(size=shape) * (np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3)
        norm = "norm" in name.rsplit(".", 2)[-2:][0] and name.endswith("weight")
        found[name] = np.asarray(values + norm, np.float32)
    return found


def _clip_tokenizer(folder):
    """Writes a vocabulary of bytes as letters, without merges, in the two files of older checkpoints."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


def _gemma_tokenizer(folder):
    """Writes a vocabulary of lower-case letters, with other characters as bytes."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*marks, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    model = tokenizers.models.BPE(
        {token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    made.add_special_tokens(marks)
    made.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GemmaTokenizer", "padding_side": "right", "pad_token": "<pad>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
