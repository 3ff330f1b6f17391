"""Writes tests/golden/backbones.npz: what transformers says of the tiny checkpoints of tests/checkpoints.py.

PYTHONPATH=.torch .venv/bin/python -m tests.interop.make_backbone_golden
"""

import json
import pathlib
import tempfile

import numpy as np

from tests import checkpoints


def values(kind, folder):
    """Returns names and shapes of the tensors as JSON, and the features of the images and the texts."""
    import torch
    import transformers

    config, model, processor, tokenizer = {
        "clip": ("CLIPConfig", "CLIPModel", "CLIPImageProcessorPil", "CLIPTokenizer"),
        "siglip": ("SiglipConfig", "SiglipModel", "SiglipImageProcessorPil", "GemmaTokenizer"),
    }[kind]
    empty = getattr(transformers, model)(getattr(transformers, config)(**checkpoints.CONFIGS[kind]))
    shapes = {name: list(parameter.shape) for name, parameter in empty.named_parameters()}
    checkpoints.write(folder, kind, shapes)
    model, processor, tokenizer = (
        getattr(transformers, n).from_pretrained(folder) for n in (model, processor, tokenizer)
    )
    texts = [text.lower() for text in checkpoints.TEXTS]
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")["input_ids"]
    pixels = torch.tensor(np.array(processor(checkpoints.images(), return_tensors="np")["pixel_values"]))
    with torch.no_grad():
        image = model.eval().get_image_features(pixels).pooler_output.numpy()
        text = model.get_text_features(ids).pooler_output.numpy()
    return {"shapes": json.dumps(shapes), "ids": ids.numpy(), "image": image, "text": text}


def main():
    found = {}
    for kind in checkpoints.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            found |= {f"{kind}/{name}": value for name, value in values(kind, pathlib.Path(folder)).items()}
    np.savez_compressed(pathlib.Path(__file__).parents[1] / "golden" / "backbones.npz", **found)


if __name__ == "__main__":
    main()
