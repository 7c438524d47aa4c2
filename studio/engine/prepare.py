"""What a step needs before it can be taken: the base model, what learns on it, the rows as tokens, the trainer."""

from dataclasses import dataclass

import torch
from torch import nn

from studio.config.schema import RunConfig
from studio.data import mix
from studio.engine import adapters, devices
from studio.engine.batches import Corpus, load_corpus
from studio.engine.distributed import Alone
from studio.engine.job import JobContext
from studio.engine.loop import Trainer
from studio.engine.models.load import LoadedModel, load_base
from studio.engine.tokenize import Versions, reporting
from studio.models import require


@dataclass(frozen=True)
class Prepared:
    """`model` is what is trained: `loaded.model`, or that in an adapter."""

    loaded: LoadedModel
    model: nn.Module
    corpus: Corpus
    trainer: Trainer
    dtype: torch.dtype


def prepare(
    job: JobContext, config: RunConfig, versions: Versions | None = None, ranks: Alone | None = None
) -> Prepared:
    """Load the model and the data; `versions` of the datasets, the newest ones where it is None.

    Raises StudioError, StopRequested.
    """
    device = devices.pick_device()
    dtype = devices.pick_dtype(config.model.dtype, device)
    job.phase("loading model")
    loaded = load_base(
        require(config.model.base),
        dtype=torch.float32 if config.method == "full" else dtype,
        attention=config.model.attention,
        bits=4 if config.method == "qlora" else 0,
        device=device,
        template=config.data.template,
    )
    job.check_stop()
    job.phase("tokenising", unit="rows")
    corpus = load_corpus(job.folder, config, loaded.template, loaded.tokenizer, reporting(job), versions)
    model = adapters.attach(loaded, config)
    trainer = Trainer(model, config, dtype, count_steps(corpus, config), loaded.pad_id, ranks)
    return Prepared(loaded, model, corpus, trainer, dtype)


def count_steps(corpus: Corpus, config: RunConfig) -> int:
    """Optimizer steps of the run: as configured, or enough for the configured epochs."""
    if config.train.num_steps is not None:
        return config.train.num_steps
    rows = mix.epoch_length(corpus.sizes, config.data.sources)
    return mix.num_steps(rows, config.train.num_epochs or 1, config.examples_per_step)
