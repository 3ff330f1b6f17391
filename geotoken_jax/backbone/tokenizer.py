"""A published checkpoint's tokenizer: texts to rows of tokens, as long as its text tower takes."""

import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import models, normalizers, pre_tokenizers, processors

from geotoken_jax.backbone.checkpoint import read_json
from geotoken_jax.settings import SettingsError

#: What CLIP's pieces are cut from: its two marks, English endings, runs of letters, single digits, runs of others.
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class Tokenizer:
    """Texts to [B, T] tokens: cut to T with the end's token kept last, or padded to T."""

    def __init__(self, folder: pathlib.Path, length: int, kind: str):
        """kind: "clip", or "siglip" whose texts are in lower case, as SigLIP 2 was trained (its paper, section 2.1).

        Reads tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json where there is one. Raises
        SettingsError if there is none of them, or they are SigLIP's of 2023, which removes punctuation first.
        """
        config = read_json(folder, "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        if config.get("tokenizer_class") in ("SiglipTokenizer", "T5Tokenizer"):
            raise SettingsError(f"{folder} has the tokenizer of SigLIP's first version: give a SigLIP 2 checkpoint")
        self._tokens = _read(folder)
        if kind == "siglip":
            rest = [self._tokens.normalizer] if self._tokens.normalizer else []
            self._tokens.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
        pad = config.get("pad_token", "<|endoftext|>" if kind == "clip" else "<pad>")
        pad = pad["content"] if isinstance(pad, dict) else pad
        number = self._tokens.token_to_id(pad)
        if number is None:
            raise SettingsError(
                f"{folder}: its tokenizer has no {pad!r}, with which texts are padded: download it again"
            )
        side = config.get("padding_side", "right")
        self._tokens.enable_truncation(length)
        self._tokens.enable_padding(direction=side, pad_id=number, pad_token=pad, length=length)
        self._length = length

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "B T"]:
        """Returns the texts' tokens."""
        found = self._tokens.encode_batch_fast(list(texts))
        return np.array([text.ids for text in found], np.int32).reshape(-1, self._length)


def _read(folder: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        if (folder / "tokenizer.json").exists():
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return _clip(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the package raises no other kind
        raise SettingsError(f"{folder}: its tokenizer cannot be read ({error}): download it again") from None
    raise SettingsError(f"{folder} has no tokenizer.json, nor vocab.json and merges.txt: download them")


def _clip(vocabulary: str, merges: str) -> tokenizers.Tokenizer:
    """Returns CLIP's tokenizer of its older files, which leave its rules to the reader."""
    begin, end = "<|startoftext|>", "<|endoftext|>"
    pieces = models.BPE.from_file(
        vocabulary, merges, unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>"
    )
    found = tokenizers.Tokenizer(pieces)
    found.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    found.add_special_tokens([begin, end])
    ids = found.get_vocab()
    found.post_processor = processors.RobertaProcessing(
        (end, ids[end]), (begin, ids[begin]), trim_offsets=False, add_prefix_space=False
    )
    return found
