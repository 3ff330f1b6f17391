"""Encodes texts as token ids with the tokenizer of a published checkpoint. Texts are padded or cut to one length."""

import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import models, normalizers, pre_tokenizers, processors

from geotoken_jax.backbone.checkpoint import read_json
from geotoken_jax.settings import SettingsError

#: Pattern of the words of a text for CLIP. A word is a begin or end token, an English ending such as 's, a sequence of
#: letters, one digit, or a sequence of other characters.
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class Tokenizer:
    """Encodes texts as tokens [B, T]. Short texts are padded. Long texts are cut and still end with the end token."""

    def __init__(self, folder: pathlib.Path, length: int, kind: str):
        """Reads tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json if it exists.

        folder: checkpoint folder. length: T, the number of tokens per text. kind: "clip" or "siglip". With "siglip",
        texts are converted to lower case, as in the training of SigLIP 2 (section 2.1 of its paper).

        Raises SettingsError if the files are missing or damaged. Also raises it for the first version of SigLIP (2023),
        which removes punctuation.
        """
        config = read_json(folder, "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        if config.get("tokenizer_class") in ("SiglipTokenizer", "T5Tokenizer"):
            raise SettingsError(f"{folder} has the tokenizer of SigLIP's first version: choose a SigLIP 2 checkpoint")
        self._tokens = _read(folder)
        if kind == "siglip":
            rest = [self._tokens.normalizer] if self._tokens.normalizer else []
            self._tokens.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
        pad = config.get("pad_token", "<|endoftext|>" if kind == "clip" else "<pad>")
        pad = pad["content"] if isinstance(pad, dict) else pad
        number = self._tokens.token_to_id(pad)
        if number is None:
            raise SettingsError(
                f"{folder}: its tokenizer has no {pad!r}, the token that pads texts: download the folder again"
            )
        side = config.get("padding_side", "right")
        self._tokens.enable_truncation(length)
        self._tokens.enable_padding(direction=side, pad_id=number, pad_token=pad, length=length)
        self._length = length

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "B T"]:
        """Returns the tokens of texts."""
        encoded = self._tokens.encode_batch_fast(list(texts))
        return np.array([text.ids for text in encoded], np.int32).reshape(-1, self._length)


def _read(folder: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        if (folder / "tokenizer.json").exists():
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return _clip(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library tokenizers raises only Exception
        raise SettingsError(f"{folder}: its tokenizer cannot be read ({error}): download the folder again") from None
    raise SettingsError(f"{folder} has no tokenizer.json, and no vocab.json with merges.txt: download tokenizer.json")


def _clip(vocabulary: str, merges: str) -> tokenizers.Tokenizer:
    """Returns CLIP's tokenizer from the files vocab.json and merges.txt of older checkpoints.

    These files have no rules for normalizing and splitting texts, so the rules are written here.
    """
    begin, end = "<|startoftext|>", "<|endoftext|>"
    pieces = models.BPE.from_file(
        vocabulary, merges, unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>"
    )
    tokenizer = tokenizers.Tokenizer(pieces)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([begin, end])
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, ids[end]), (begin, ids[begin]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer
