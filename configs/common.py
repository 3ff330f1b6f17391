"""The defaults of all settings: the paper's settings for MP16-Pro, with the photos and the backbone of a small demo.

Every other configuration changes some of the defaults. The keys of a section are explained in the frozen dataclass of
the section. A comment or docstring at each section names the module with this dataclass.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the settings of the published GeoToken (arXiv 2511.01082), with the demo's photos and backbone."""
    config = ConfigDict()
    config.name = "common"
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=-1)  # geotoken_jax/sharding.py
    config.watch = dict(connect_s=300.0, stalled_s=900.0, step_s=100.0, lost_s=60.0)  # geotoken_jax/processes.py
    config.photos = _photos()
    config.benchmarks = _benchmarks()
    config.embed = _embed()
    config.align = _align()
    config.index = _index()
    config.gallery = dict(placement="host", shards=-1)  # geotoken_jax/gallery/placement.py
    # geotoken_jax/data/join.py. All validation photos choose the step: half as many choose it with more noise.
    config.data = dict(photos=0, seed=0, split_validation=False)
    config.model = _model()
    config.loss = dict(first_weight=2.0, last_weight=1.0)  # geotoken_jax/model/task.py
    # 206 million examples are 50 epochs of the 4.12 million photos of MP16-Pro that `prepare` keeps.
    config.train = _train(2048, 206_000_000, 2_000, _published(5e-5, 0.9))
    config.pools = dict(photos=50_000, seed=0)  # geotoken_jax/configuration.py
    # geotoken_jax/model/reward.py
    config.reward = dict(model=dict(hidden=2048, dropout=0.1), train=_train_selector())
    config.channels = _channels()
    config.reranker = _reranker()
    # Name of a variant of the decoder -> sections and keys that differ from this configuration. `geotoken train`,
    # `learn` and `predict` run once per variant.
    config.variants = dict(geotoken=dict())
    config.predict = _predict()
    config.judge = _judge()
    config.baselines = _baselines()
    config.evaluate = _evaluate()
    config.export = _export()
    config.audit = dict(  # geotoken_jax/configuration.py
        coverage=dict(level=5, split="test", countries=8), leakage=dict(cosine_above=0.95)
    )
    return config


def _train(batch_size: int, examples: int, evaluate_every: int, optimizer: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a training (geotoken_jax/train/loop.py).

    optimizer: settings of the optimizer (geotoken_jax/train/optimizer.py).
    """
    return dict(
        batch_size=batch_size,
        accumulate=1,
        gradient_dtype="float32",
        examples=examples,
        epochs=0,
        evaluate_every=evaluate_every,
        save_every_s=900.0,
        keep=2,
        log_every=100,
        seed=0,
        ema=0.0,
        max_skipped=10,
        max_damaged=0.001,
        profile=(0, 0),
        profiler_port=0,
        wandb="",
        optimizer=optimizer,
    )


def _published(learning_rate: float, decay: float) -> dict[str, Any]:
    """Returns the settings of AdamW in the paper. decay: factor by which each epoch multiplies the learning rate."""
    return dict(
        learning_rate=learning_rate,
        schedule="exponential",
        decay=decay,
        warmup=0.0,
        weight_decay=1e-6,
        b2=0.999,
        clip=0.0,
    )


def _cosine(learning_rate: float, warmup: float, weight_decay: float) -> dict[str, Any]:
    """Returns AdamW's settings with warm-up, cosine decay to zero, and gradients clipped to a norm of 1."""
    return dict(
        learning_rate=learning_rate,
        schedule="cosine",
        decay=1.0,
        warmup=warmup,
        weight_decay=weight_decay,
        b2=0.999,
        clip=1.0,
    )


def _train_selector() -> dict[str, Any]:
    """Returns the training settings for the two selection networks: the reward head and the comparator."""
    return _train(512, 10_000_000, 2_000, _cosine(2e-3, 0.1, 0.05))


def _photos() -> dict[str, Any]:
    """Returns the source of photos and the settings of each source (geotoken_jax/preparation.py)."""
    return dict(
        source="earthview",
        # Several sources in one gallery, as in dict(trips=dict(kind="folder", path="trips"), ...): see docs/data.md.
        sources=dict(),
        workers=2,
        beam=dict(runner="", options=()),
        max_dropped=0.01,
        null_island=False,
        keep_changed=False,
        dataset=dict(name="", version="1.0.0", license="", terms="", citation="", homepage=""),
        duplicates=dict(difference=3.0, keep=False),
        earthview=dict(
            seed=0,
            places=60_000,
            train=32_000,
            validation=2_000,
            test=3_000,
            test_unseen=1_000,
            test_shift=1_000,
            photos_per_shard=2_000,
        ),
        mp16_pro=dict(
            folder="",
            metadata="metadata/MP16_Pro_filtered.csv",
            seed=0,
            validation=0.01,
            photos_per_shard=10_000,  # a shard then has 0.8 GB
            placeholder=dict(hashes=(), distance=4, identical=100),
        ),
        folder=dict(path="", csv="", train=0.9, validation=0.05, test=0.05, photos_per_shard=2_000),
        im2gps3k=dict(path="", csv="", photos_per_shard=1_000),
        yfcc=dict(name="yfcc4k", path="", table="", photos_per_shard=1_000),
        osv5m=dict(path=""),
    )


def _benchmarks() -> dict[str, Any]:
    """Returns the settings of benchmarks (geotoken_jax/preparation.py). A benchmark is used if its path is not empty.

    Each benchmark is predicted once with the whole gallery, and once per entry of `exclude`: without the gallery photos
    that the entry's rules exclude (geotoken_jax/gallery/exclude.py).
    """

    def benchmark(author: str) -> dict[str, Any]:
        return dict(path="", table="", author=author, authors="", rows="", photos_per_shard=1_000)

    def rules(author: bool = False, cosine_above: float = 1.0) -> dict[str, Any]:
        return dict(author=author, cosine_above=cosine_above, within_km=0.0, source="")

    return dict(
        photos=dict(
            im2gps3k=benchmark("AUTHOR"),
            yfcc4k=benchmark("OwnerNSID"),
            yfcc26k=benchmark(""),  # its table has no column of authors
            commons26=benchmark("group"),
            labeled=benchmark("author"),
        ),
        exclude=dict(
            same_author=rules(author=True),
            near_duplicate=rules(cosine_above=0.95),  # the same value as config.audit.leakage.cosine_above
            both=rules(author=True, cosine_above=0.95),
        ),
    )


def _embed() -> dict[str, Any]:
    """Returns settings of the frozen backbone and of augmented views of training photos (geotoken_jax/preparation.py).

    The views are further training examples.
    """
    return dict(
        backbone="thumbnail",
        threads=2,
        thumbnail=dict(size=16),
        huggingface=dict(path="", dtype="bfloat16", batch_size=256),  # geotoken_jax/backbone/huggingface.py
        views=dict(  # geotoken_jax/backbone/views.py
            count=0, seed=0, rotation=12.0, crop=0.8, gamma=0.15, color=0.1, flip=False
        ),
    )


def _align() -> dict[str, Any]:
    """Returns settings of the alignment model and its training."""
    return dict(
        model=dict(  # geotoken_jax/align/heads.py
            hidden=768,
            dropout=0.0,
            whiten=0.0,
            location=dict(projection="mercator", sigmas=(1.0, 16.0, 256.0), fourier=256, hidden=1024, out=512),
        ),
        loss=dict(kind="info_nce", chunk=1024, queue=0, same_within_km=0.0),  # geotoken_jax/align/loss.py
        init=dict(location=""),  # geotoken_jax/interop/geoclip.py
        pixels=dict(tower="cached", augment=True, learning_rate=0.1, remat="dots"),  # geotoken_jax/align/pixels.py
        # 41.2 million examples are 10 epochs of the 4.12 million photos of MP16-Pro that `prepare` keeps.
        train=_train(256, 41_200_000, 4_000, _published(3e-5, 0.87)),
    )


def _index() -> dict[str, Any]:
    """Returns settings of the stored neighbors (geotoken_jax/preparation.py) and of the search for them."""
    return dict(
        neighbors=dict(
            count=20,
            exclude=dict(author=False, cosine_above=1.0, within_km=0.0, source=""),
            exclude_in_evaluation=dict(author=False, cosine_above=1.0, within_km=0.0, source=""),
        ),
        search=dict(  # geotoken_jax/gallery/index.py
            kind="scann",
            shard_rows=262_144,
            components=256,
            leaves_searched=64,
            reorder=300,
            reorder_dtype="float32",
            threads=2,
            min_recall=0.95,
            sample=1_000,
        ),
    )


def _model() -> dict[str, Any]:
    """Returns settings of the decoder (geotoken_jax/model/geotoken.py)."""
    return dict(
        scheme="s2",
        level=20,
        group=2,
        backbone_width=768,
        neighbors=15,
        width=512,
        heads=8,
        encoder_layers=10,
        decoder_layers=10,
        feed_forward=1024,
        dropout=0.1,
        norm="post",
        activation="relu",
        qk_norm=False,
        attention="auto",
        attention_dropout=0.0,  # 0.1 in the paper, but fused attention kernels support only 0 (configs/mp16_pro.py)
        positions="sinusoidal",
        memory="full",
        tie_tokens=False,
        copy_head=False,
        neighbor_tokens=True,
        neighbor_embeddings=True,
        neighbor_dropout=0.0,
        similarities=False,
        context="none",
        dtype="bfloat16",
        remat="dots",
        # The paper's shape. At this shape "mup" is the same model as "standard".
        parametrization="standard",
        base_width=512,
        base_heads=8,
        base_layers=10,
    )


def _channels() -> dict[str, Any]:
    """Returns settings of the channels, which are searches of the gallery with several kinds of vectors.

    geotoken_jax/configuration.py explains the section, and geotoken_jax/model/comparator.py explains the comparator, a
    network that is trained for one of the channels.
    """
    return dict(
        kind="scann",
        dtype="bfloat16",
        views=dict(count=0, seed=1, rotation=15.0, crop=0.75, gamma=0.15, color=0.1, flip=False),
        comparator=dict(hidden=2048, width=256, dropout=0.1, noise=0.8, same_within_km=20.0),
        train=_train_selector(),
    )


def _reranker() -> dict[str, Any]:
    """Returns settings of the reranker (geotoken_jax/model/reranker.py) and of its fit (model/reranker_fit.py).

    The reranker is a network that chooses the answer among candidates of all channels.
    """
    return dict(
        model=dict(
            channels=("index", "backbone", "comparator", "location"),
            depth=64,
            candidates=24,
            cells=16,
            widths_km=(1, 5, 25, 100, 400),
            sharpness=(2, 6),
            hidden=0,
            objective="accuracy",
        ),
        fit=dict(
            photos=20_000,
            folds=5,
            epochs=30,
            batch_size=64,
            learning_rate=1e-2,
            weight_decay=1e-2,
            dropped=0.2,
            seed=0,
        ),
    )


def _predict() -> dict[str, Any]:
    """Returns settings of prediction: candidates and the choice among them (geotoken_jax/predict/decode.py)."""
    return dict(
        samples=30,
        temperature=0.7,
        top_p=1.0,
        beam=0,
        search=dict(expansions=128, level=12, leaves=64, width=8),
        selectors=("greedy", "log_probability", "similarity", "consensus", "expected_25_km", "expected_geoscore"),
        vote=dict(temperature=0.05, sigma_km=25.0),
        choice="log_probability",
        batch_size=256,
        seed=0,
    )


def _judge() -> dict[str, Any]:
    """Returns settings of the judge (geotoken_jax/predict/judge.py).

    The judge is a multimodal language model that looks at a photo and chooses among the candidates for its place.
    """
    return dict(
        base_url="",  # if empty, no judge is used
        model="",
        splits=("test",),
        photos=0,  # 0 means all photos
        answer="choose",
        candidates=30,
        side=768,
        options=dict(temperature=0.0, max_tokens=512),
        timeout_s=120.0,
        attempts=5,
        concurrent=8,
        price_in=0.0,
        price_out=0.0,
        key_variable="",
    )


def _baselines() -> dict[str, Any]:
    """Returns settings of the baselines (geotoken_jax/stages/baselines.py) and of the classifier's training."""
    return dict(
        # This temperature is the best one for the demo. sigma_km is about the size of a city.
        knn=dict(neighbors=20, temperature=0.05, sigma_km=25.0),
        geoclip=dict(candidates=20),
        # max_photos and min_photos have the values of the finest partition of MP-16 by Mueller-Budack et al. 2018. It
        # has 12,893 cells.
        classifier=dict(max_photos=1_000, min_photos=50, hidden=1024, dropout=0.0, candidates=20),
        # 41.2 million examples are 10 epochs of the 4.12 million photos of MP16-Pro that `prepare` keeps.
        train=_train(2048, 41_200_000, 2_000, _cosine(1e-3, 0.05, 0.01)),
    )


def _evaluate() -> dict[str, Any]:
    """Returns settings of the evaluation (geotoken_jax/analysis/evaluate.py)."""
    return dict(
        resamples=2_000,
        seed=0,
        reference="geotoken",
        compare=(),  # pairs of methods to compare, such as (("geotoken:log_probability", "knn"),)
        earth="sphere",
        strict=False,
        labels=dict(
            top1_neighbor="Top-1 neighbor",
            knn="kNN vote",
            geoclip="GeoCLIP retrieval",
            classifier="Cell classifier",
            geotoken="GeoToken",
        ),
    )


def _export() -> dict[str, Any]:
    """Returns settings of the export (geotoken_jax/stages/export.py)."""
    return dict(
        gallery="bfloat16",
        weights=True,
        authors=False,  # for privacy, an export does not contain the authors of gallery photos
        # -1 stands for thumbnails of 64 pixels and 12 examples if the photos are EarthView's, and for none otherwise,
        # because other photos may show people.
        thumbnails=-1,
        examples=-1,
    )
