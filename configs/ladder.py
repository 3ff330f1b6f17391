"""Decoders of sizes from 5,000 to 1 billion weights, trained on MP16-Pro.

`--config=configs/ladder.py:52M` selects a size, one of SIZE, and `52M,mup` the same size with the parametrization "mup"
(geotoken_jax/model/parametrization.py). The name of a size is the number of weights in the encoder and decoder layers,
as in scaling laws (Kaplan et al. 2020, arXiv 2001.08361). Token tables, the output layer and the projections of
features are not counted. Sizes up to 1.5 million weights are for studies on a few cores (configs/scaling.py). Larger
sizes have not been trained yet.

One rule sets the shape. The depth is width / 51.2, as in the paper (10 layers, width 512). One ratio of depth and width
is enough for all sizes, because the loss hardly depends on the shape (Kaplan et al., section 3.1). As in the paper,
heads are 64 wide and the feed-forward width is twice the width. There are at least four heads, as in the demo: with
fewer, the smallest models could not attend to several neighbors at once.

A second rule sets the batch size, and the learning rate of "standard". DeepSeek LLM (Bi et al. 2024, arXiv
2401.02954, section 3.1) found that with compute C, the best batch size of AdamW grows as C^0.327 and the best learning
rate falls as C^-0.125. In compute-optimal training, C is proportional to the square of the size. Here the size is
proportional to the cube of the width. So the batch size is proportional to width^2, and the learning rate to
width^-0.75. The two constants are chosen by these validation losses on EarthView after 24,000 examples:

width  batch size  learning rate  nats per photo
  128          64           8e-4           12.07
  128         128           8e-4           12.25
  128         128           2e-3           12.13
   32          64         1.5e-3           12.18
   32          64           3e-3           12.12

With "mup" the learning rate is one number for all sizes, MUP_RATE, because the parametrization scales it with width and
depth. It does not scale it with the batch size, so large batches may allow a higher rate; this was not measured.

Warm-up is 5 percent of the examples for all sizes, as in the demo. The moving average of the parameters extends over
the same number of examples for all sizes of a study, so its decay per step depends on the batch size.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import mp16_pro

#: Name of a size -> width. The name is the number of weights, 20 * depth * width^2: an encoder layer has 8 * width^2
#: weights, and a decoder layer has 12 * width^2.
_WIDTHS = {
    "5K": 16,
    "12K": 24,
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


#: Shape at which "mup" is the same model as "standard". It is in the middle of the widths of `transfer`.
_BASE = dict(parametrization="mup", base_width=64, base_heads=4, base_layers=1)
#: Learning rate of all sizes with "mup". It is the rate of the "standard" rule at the base width.
MUP_RATE = 2e-3 * (64 / 96) ** -0.75
#: Number of examples over which the parameters are averaged in SIZE, for studies of up to 100,000 examples. It is 50
#: steps of the smallest batch.
EMA_EXAMPLES = 3_200


def ema(batch_size: int, examples: int) -> float:
    """Returns config.train.ema, the decay per step, for a moving average over a number of examples.

    Returns 0, which means no average, if a batch has as many examples.
    """
    return max(0.0, 1.0 - batch_size / examples)


def _train(width: int) -> dict[str, Any]:
    # The batch size is width^2 / 256, rounded down to a power of two, which can be divided among 2^k devices. It is at
    # least 64, because a step with fewer photos is mostly overhead.
    batch = max(64, 1 << ((width * width // 256).bit_length() - 1))
    rate = 2e-3 * (width / 96) ** -0.75
    return dict(batch_size=batch, ema=ema(batch, EMA_EXAMPLES), optimizer=dict(learning_rate=rate))


#: Name of a size -> section (model or train) -> keys and values that the size sets there.
SIZE: dict[str, dict[str, dict[str, Any]]] = {
    name: dict(model=_model(width), train=_train(width)) for name, width in _WIDTHS.items()
}
#: The same sizes with the parametrization "mup".
MUP_SIZE: dict[str, dict[str, dict[str, Any]]] = {
    name: dict(model={**size["model"], **_BASE}, train={**size["train"], "optimizer": dict(learning_rate=MUP_RATE)})
    for name, size in SIZE.items()
}

#: Keys and values of config.model for all sizes. They are the demo's. On EarthView, the demo's architecture has a lower
#: loss than the paper's after equally many examples (docs/experiments.md, published_form).
FORM: dict[str, Any] = dict(
    norm="pre",
    activation="gelu",
    positions="factored",
    memory="compact",
    tie_tokens=True,
    copy_head=True,
    similarities=True,
    attention_dropout=0.0,
)


def transfer() -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the models of a study of learning rates: widths over 16 times, each in both parametrizations.

    All have four layers, four heads and the same batch size, so only the width differs. A name is
    PARAMETRIZATION_WIDTH, such as `mup_16`. A value has the keys and values of sections, as in SIZE, without the
    learning rate.
    """
    models = {}
    for parametrization in ("standard", "mup"):
        for width in (16, 32, 64, 128, 256):
            shape = dict(width=width, heads=4, encoder_layers=2, decoder_layers=2, feed_forward=2 * width)
            base = dict(parametrization=parametrization, base_width=64, base_heads=4, base_layers=2)
            train = dict(batch_size=64, ema=ema(64, EMA_EXAMPLES))
            models[f"{parametrization}_{width}"] = dict(model={**shape, **base}, train=train)
    return models


def get_config(size: str = "52M") -> ConfigDict:
    """Returns the configuration for MP16-Pro with a decoder of the given size, and a cosine schedule.

    size: name of the size, one of SIZE, or the name and ",mup" for the size of that name in MUP_SIZE.
    """
    name, _, parametrization = size.partition(",")
    if name not in SIZE or parametrization not in ("", "mup"):
        raise ValueError(
            f"--config=configs/ladder.py:{size} names an unknown size: use one of {', '.join(SIZE)}, with or without "
            "the ending `,mup`"
        )
    config: Any = mp16_pro.get_config()
    config.name = "ladder"
    config.model.update(FORM)
    config.train.optimizer.update(schedule="cosine", warmup=0.05, weight_decay=0.01, clip=1.0)
    for section, changes in (MUP_SIZE if parametrization else SIZE)[name].items():
        config[section].update(changes)
    # One percent of the training. An average over EMA_EXAMPLES would end within a few steps of a pod.
    config.train.ema = ema(config.train.batch_size, config.train.examples // 100)
    return config
