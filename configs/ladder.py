"""Sizes of the decoder from 0.005 M to 1 B parameters, by one rule for its shape and one for how it trains.

`--config=configs/ladder.py:52M` is one of SIZE on MP16-Pro. A size's name counts the weights of encoder and decoder
layers, as scaling laws do (Kaplan et al. 2020, arXiv 2001.08361); token tables, output and the projection of features
come on top. Those under 0.3 M are for studies on a few cores (configs/scaling.py); past 1.5 M nothing was trained yet.

Shape. Depth is width / 51.2, the paper's 10 layers of 512: loss depends on a model's size and hardly on its shape
(Kaplan et al., section 3.1), so one proportion serves. Heads are 64 wide, the paper's, and at least four, the demo's:
with fewer the smallest could not look at several neighbors at once. The feed-forward is twice the width, the paper's.

Training. Of AdamW's best settings DeepSeek LLM (Bi et al. 2024, arXiv 2401.02954, section 3.1) found that, with
compute C, the batch grows as C^0.327 and the learning rate falls as C^-0.125. Along the frontier C goes with the square
of the size, and the size here with the cube of the width: so the batch goes with width^2 and the rate with width^-0.75.
Both start from what was measured on EarthView, the validation loss after 24,000 examples: at width 128 and a rate of
8e-4, 12.07 nats a photo in batches of 64 and 12.25 in batches of 128; in the latter 12.13 at a rate of 2e-3. At width
32 and in batches of 64, 12.18 at 1.5e-3 and 12.12 at 3e-3.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import mp16_pro

#: Name -> width; the name is 20 * depth * width^2: of 8 in an encoder's layer and 12 in a decoder's.
_WIDTHS = {
    "5K": 16,
    "20K": 32,
    "46K": 48,
    "82K": 64,
    "369K": 96,
    "655K": 128,
    "1536K": 160,
    "7M": 256,
    "24M": 384,
    "52M": 512,
    "177M": 768,
    "419M": 1024,
    "939M": 1344,
}


def _model(width: int) -> dict[str, Any]:
    depth = max(1, round(width / 51.2))
    heads = max(4, width // 64)
    return dict(width=width, heads=heads, encoder_layers=depth, decoder_layers=depth, feed_forward=2 * width)


def _train(width: int) -> dict[str, Any]:
    # Rounded down to a power of two, which divides over any mesh; never so few that a step is all overhead.
    batch = max(64, 1 << ((width * width // 256).bit_length() - 1))
    return dict(batch_size=batch, optimizer=dict(learning_rate=2e-3 * (width / 96) ** -0.75))


#: Name -> the keys of config.model and config.train that make the size.
SIZE: dict[str, dict[str, dict[str, Any]]] = {
    name: dict(model=_model(width), train=_train(width)) for name, width in _WIDTHS.items()
}

#: The form of every size: the demo's, which trains better than the paper's (docs/settings.md).
FORM: dict[str, Any] = dict(
    norm="pre",
    activation="gelu",
    positions="factored",
    memory="compact",
    tie_tokens=True,
    copy_head=True,
    similarities=True,
)


def get_config(size: str = "52M") -> ConfigDict:
    """Returns the paper's configuration on MP16-Pro with a decoder of one of SIZE."""
    if size not in SIZE:
        raise ValueError(f"configs/ladder.py has no size {size!r}: choose one of {', '.join(SIZE)}")
    config: Any = mp16_pro.get_config()
    config.name = "ladder"
    config.model.update(FORM)
    config.train.optimizer.update(schedule="cosine", warmup=0.05, weight_decay=0.01, clip=1.0)
    for section, changes in SIZE[size].items():
        config[section].update(changes)
    return config
