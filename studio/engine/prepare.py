"""What a step needs before it can be taken: the base model, what learns on it, the rows as tokens, the trainer."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from studio.config.schema import RunConfig
from studio.data import mix
from studio.engine import adapters, devices, twice
from studio.engine.batches import Corpus, load_corpus
from studio.engine.distributed import Alone
from studio.engine.job import JobContext
from studio.engine.loop import Trainer
from studio.engine.models.load import LoadedModel, load_base
from studio.engine.tokenize import Versions, reporting
from studio.estimate import Twice, changed
from studio.models import require


@dataclass(frozen=True)
class Prepared:
    """`model` is what is trained: `loaded.model`, or that in an adapter."""

    loaded: LoadedModel
    model: nn.Module
    corpus: Corpus
    trainer: Trainer
    dtype: torch.dtype
    twice: Twice | None  # the choice that was made here, where the config leaves it open


def prepare(
    job: JobContext,
    config: RunConfig,
    versions: Versions | None = None,
    ranks: Alone | None = None,
    is_twice: bool | None = None,
) -> Prepared:
    """Load the model and the data; `versions` of the datasets, the newest ones where it is None.

    `is_twice`: what gradient_checkpointing auto came to before, None where that is to be found out.

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
    choice = None
    if config.train.gradient_checkpointing == "auto":
        choose = partial(twice.choose, config, loaded, dtype, corpus)
        is_twice, choice = _choose_together(ranks or Alone(), is_twice, choose, device)
        config = changed(config, {"train.gradient_checkpointing": is_twice})
    model = adapters.attach(loaded, config)
    trainer = Trainer(model, config, dtype, count_steps(corpus, config), loaded.pad_id, ranks)
    return Prepared(loaded, model, corpus, trainer, dtype, choice)


def _choose_together(
    ranks: Alone, before: bool | None, choose: Callable[[], Twice], device: torch.device
) -> tuple[bool, Twice | None]:
    """What the first process did `before` or chooses now, in all of them: each must do the same, and another machine's
    studio does not remember."""
    ranks.join(device)
    if (before := ranks.share(before)) is not None:
        return before, None
    choice = Twice(**ranks.share(asdict(choose()) if ranks.is_first else None))
    print(twice.told(choice), flush=True)
    return choice.is_on, choice


def count_steps(corpus: Corpus, config: RunConfig) -> int:
    """Optimizer steps of the run: as configured, or enough for the configured epochs."""
    if config.train.num_steps is not None:
        return config.train.num_steps
    rows = mix.epoch_length(corpus.sizes, config.data.sources)
    return mix.num_steps(rows, config.train.num_epochs or 1, config.examples_per_step)
