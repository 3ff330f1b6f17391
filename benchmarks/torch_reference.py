"""The published model as a plain PyTorch nn.Transformer, trained and decoded as published.

benchmarks/train_step.py and benchmarks/decoding.py run this module to compare speeds; it then prints one JSON object.
tests/interop compares our model with it. The module follows the paper and its code, imports nothing from geotoken_jax,
and needs only torch and numpy.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the published model. layers: number of layers in the encoder, and also in the decoder."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    group: int
    neighbors: int
    level: int = 20
    backbone_width: int = 768
    dropout: float = 0.1

    @property
    def vocabulary(self) -> list[int]:
        """Number of values of each token: first the face, then `group` quads per token."""
        return [6] + [4**self.group] * (self.level // self.group)


def sinusoidal(length: int, width: int) -> Tensor:
    """Returns position vectors [length, width] of interleaved sines and cosines."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


class Reference(nn.Module):
    """Maps photo [B, 3, C], neighbors [B, M, 3, C] and their tokens [B, M, T] to logits of each position's token."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, d, sizes = shape, shape.width, shape.vocabulary
        self.start_token_embedding = nn.Parameter(torch.randn(1, d))
        self.cls_token = nn.Parameter(torch.randn(1, d))
        self.embedding = nn.Embedding(sum(sizes), d)
        self.retrieval_embedding = nn.Embedding(sum(sizes), d)
        self.image_proj, self.loc_proj, self.text_proj = (
            nn.Sequential(nn.Linear(shape.backbone_width, d), nn.ReLU(), nn.Linear(d, d)) for _ in range(3)
        )
        options = dict(nhead=shape.heads, dim_feedforward=shape.feed_forward, dropout=shape.dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d, **options), shape.layers, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(d, **options), shape.layers)
        self.output_layers = nn.ModuleList(nn.Linear(d, size) for size in sizes)
        self.dropout = nn.Dropout(shape.dropout)
        length = 4 + shape.neighbors * (3 + len(sizes))
        self.register_buffer("positions", sinusoidal(max(length, len(sizes)), d), persistent=False)
        self.register_buffer("offsets", torch.tensor(sizes).cumsum(0) - torch.tensor(sizes), persistent=False)

    def project(self, vectors: Tensor) -> Tensor:
        """Returns the projections of vectors [..., 3, C] as unit vectors [..., 3, D]."""
        projections = (self.image_proj, self.loc_proj, self.text_proj)
        projected = [project(vectors[..., e, :]) for e, project in enumerate(projections)]
        return functional.normalize(torch.stack(projected, -2), dim=-1)

    def encode(self, photo: Tensor, neighbors: Tensor, neighbor_tokens: Tensor) -> Tensor:
        """Returns the encoder's output [B, S, D]."""
        tokens = self.retrieval_embedding(neighbor_tokens + self.offsets)
        neighbor_parts = torch.cat([self.project(neighbors), tokens], 2).flatten(1, 2)
        x = torch.cat([self.cls_token.expand(len(photo), 1, -1), self.project(photo), neighbor_parts], 1)
        return self.encoder(self.dropout(x + self.positions[: x.shape[1]]))

    def decode(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """Returns the states [B, t + 1, D] that predict the tokens after 0, 1, ... t of the `tokens` [B, t]."""
        embedded = self.embedding(tokens + self.offsets[: tokens.shape[1]])
        x = torch.cat([self.start_token_embedding.expand(len(tokens), 1, -1), embedded], 1)
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.decoder(self.dropout(x + self.positions[: x.shape[1]]), memory, tgt_mask=causal, tgt_is_causal=True)

    def forward(self, photo: Tensor, neighbors: Tensor, neighbor_tokens: Tensor, tokens: Tensor) -> list[Tensor]:
        states = self.decode(self.encode(photo, neighbors, neighbor_tokens), tokens[:, :-1])
        return [head(states[:, t]) for t, head in enumerate(self.output_layers)]


def weighted_loss(logits: list[Tensor], tokens: Tensor) -> Tensor:
    """Returns the loss of a batch, with weights from 2 for the face to 1 for the last token."""
    losses = torch.stack([functional.cross_entropy(x, tokens[:, t]) for t, x in enumerate(logits)])
    weights = torch.linspace(2.0, 1.0, len(losses), device=losses.device)
    return (weights * losses).sum() / weights.sum()


def search(model: Reference, memory: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Returns the best `width` sequences [B, K, T] of a beam search, with their log-probabilities [B, K].

    There is no cache: each step reads all prefixes. Greedy decoding is a beam of width 1.
    """
    b, sizes = len(memory), model.shape.vocabulary
    tokens = torch.zeros(b, 1, 0, dtype=torch.long, device=memory.device)
    scores = torch.zeros(b, 1, device=memory.device)
    for t, size in enumerate(sizes):
        beams = tokens.shape[1]
        states = model.decode(memory.repeat_interleave(beams, 0), tokens.flatten(0, 1))
        log_p = functional.log_softmax(model.output_layers[t](states[:, -1]), -1).view(b, beams, size)
        scores, best = (scores[..., None] + log_p).flatten(1).topk(min(width, beams * size))
        before = tokens.gather(1, (best // size)[..., None].expand(-1, -1, t))
        tokens = torch.cat([before, (best % size)[..., None]], -1)
    return tokens, scores


@torch.no_grad()
def sample(model: Reference, memory: Tensor, temperature: float) -> tuple[Tensor, list[float]]:
    """Returns one candidate [B, T] per photo and its log-probability, sampled as in the published code.

    There is no cache: every token reads the whole prefix and projects the memory again. Log-probabilities are copied
    from the device one photo at a time.
    """
    tokens = torch.zeros(len(memory), 0, dtype=torch.long, device=memory.device)
    scores = [0.0] * len(memory)
    for head in model.output_layers:
        states = model.decode(memory, tokens)
        log_p = functional.log_softmax(head(states[:, -1]) / temperature, -1)
        drawn = torch.multinomial(log_p.exp(), 1)
        for i in range(len(memory)):
            scores[i] += log_p[i, drawn[i, 0]].item()
        tokens = torch.cat([tokens, drawn], 1)
    return tokens, scores


@torch.no_grad()
def stored_values(shape: Shape, seed: int, photos: int = 3, gallery: int = 40) -> dict[str, np.ndarray]:
    """Returns random weights and data with the results of this model, in the format of docs/fidelity.md."""
    torch.manual_seed(seed)
    model = Reference(shape).eval()
    for name, value in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # their initial zeros and ones could hide a mistake
            value += 0.1 * torch.randn_like(value)
    vectors = torch.randn(gallery + photos, 3, shape.backbone_width)
    tokens = torch.stack([torch.randint(size, (gallery + photos,)) for size in shape.vocabulary], -1)
    targets = tokens[gallery:]
    rows = torch.stack([torch.randperm(gallery)[: shape.neighbors + 1] for _ in range(photos)])

    def read(first: int) -> tuple[Tensor, Tensor, Tensor]:
        neighbor_rows = rows[:, first : first + shape.neighbors]
        return vectors[gallery:], vectors[neighbor_rows], tokens[neighbor_rows]

    memory = model.encode(*read(0))
    logits = model(*read(0), targets)
    widest = max(shape.vocabulary)
    beam_tokens, beam_scores = search(model, memory, 4)
    tempered = [functional.log_softmax(x / 0.7, -1) for x in logits]
    last = f"neighbors_0_to_{shape.neighbors - 1}"
    values = {
        "gallery_tokens": tokens[:gallery],
        "target_tokens": targets,
        "neighbor_index": rows,
        f"memory_{last}": memory,
        f"teacher_forced_logits_{last}": torch.stack(
            [functional.pad(x, (0, widest - x.shape[1]), value=-math.inf) for x in logits], 1
        ),
        f"greedy_tokens_{last}": search(model, memory, 1)[0][:, 0],
        "beam4_tokens": beam_tokens,
        "beam4_logprob": beam_scores,
        "target_logprob_temperature_0p7": sum(x.gather(1, targets[:, t, None])[:, 0] for t, x in enumerate(tempered)),
        f"train_loss_neighbors_1_to_{shape.neighbors}": weighted_loss(model(*read(1), targets), targets),
        **{f"query_{kind}": vectors[gallery:, e] for e, kind in enumerate(("image", "location", "text"))},
        **{f"gallery_{kind}": vectors[:gallery, e] for e, kind in enumerate(("image", "location", "text"))},
        **{f"w/{name}": value for name, value in model.state_dict().items()},
    }
    s = shape
    sizes = np.array([s.width, s.layers, s.heads, s.feed_forward, s.group, s.level, s.neighbors])
    return {"config": sizes, **{name: value.numpy() for name, value in values.items()}}


def batches(shape: Shape, batch: int, photos: int, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yields batches of random photos with random neighbors, gathered from a float32 table on the host."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((photos, 3, shape.backbone_width), np.float32)
    tokens = rng.integers(0, shape.vocabulary, (photos, len(shape.vocabulary)))
    neighbor_rows = rng.integers(0, photos, (photos, shape.neighbors))
    while True:
        rows = rng.integers(0, photos, batch)
        arrays = table[rows], table[neighbor_rows[rows]], tokens[neighbor_rows[rows]], tokens[rows]
        yield tuple(torch.from_numpy(x).to(device) for x in arrays)  # pyright: ignore[reportReturnType]


def measure(shape: Shape, batch: int, photos: int, steps: int, device: str, dtype: str) -> dict[str, float]:
    """Returns the median seconds of a step and of its input, after 3 warm-up steps, and the number of parameters."""
    torch.manual_seed(0)
    model = Reference(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=1e-6)
    read = batches(shape, batch, photos, device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    took, waited = [], []
    for _ in range(3 + steps):
        start = time.perf_counter()
        *inputs, tokens = next(read)
        _synchronize(device)
        waited.append(time.perf_counter() - start)
        with autocast:
            loss = weighted_loss(model(*inputs, tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _synchronize(device)
        took.append(time.perf_counter() - start)
    return {
        "step": statistics.median(took[3:]),
        "input": statistics.median(waited[3:]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.no_grad()
def measure_decoding(shape: Shape, batch: int, photos: int, times: int, device: str, dtype: str) -> dict[str, float]:
    """Returns the shortest seconds to encode a batch and to decode a candidate per photo, and the model's size."""
    torch.manual_seed(0)
    model = Reference(shape).to(device).eval()
    *inputs, _ = next(batches(shape, batch, photos, device))
    took: dict[str, list[float]] = {"encode": [], "candidate": []}
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        for _ in range(1 + times):
            start = time.perf_counter()
            memory = model.encode(*inputs)
            _synchronize(device)
            encoded = time.perf_counter()
            sample(model, memory, 0.7)
            took["encode"].append(encoded - start)
            took["candidate"].append(time.perf_counter() - encoded)
    fastest = {name: min(values[1:]) for name, values in took.items()}
    return {**fastest, "parameters": sum(p.numel() for p in model.parameters())}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measures the train step, or decoding with --candidates, and prints the figures.

    The batch is halved until it fits into the device's memory. `batch` in the output is its final size.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in dict(width=64, layers=2, heads=4, feed_forward=128, group=2, neighbors=15).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--photos", type=int, default=4096, help="rows of the gallery")
    parser.add_argument("--steps", type=int, default=10, help="number of train steps, or of candidates, to time")
    parser.add_argument("--candidates", type=int, default=0, help="measure decoding of this many candidates per photo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda")
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    names = ("width", "layers", "heads", "feed_forward", "group", "neighbors")
    shape = Shape(**{name: getattr(options, name) for name in names})
    measured = measure_decoding if options.candidates else measure
    batch, figures = options.batch, None
    while figures is None:
        try:
            figures = measured(shape, batch, options.photos, options.steps, options.device, dtype)
        except torch.OutOfMemoryError:
            batch //= 2
    if options.candidates:  # candidates are decoded one after another, and cost the same
        rate = {"photos_per_second": batch / (figures["encode"] + options.candidates * figures["candidate"])}
    else:
        rate = {"examples_per_second": batch / figures["step"], "input_wait": figures["input"] / figures["step"]}
    line = {
        **rate,
        "batch": batch,
        "parameters": figures["parameters"],
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "dtype": dtype,
        "torch": torch.__version__,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
