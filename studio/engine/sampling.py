"""The sample questions of a run, asked to the model as it is now."""

from collections.abc import Callable

from torch import nn

from studio.config.schema import RecordSection
from studio.engine.chat import before_stop, prompt_ids
from studio.engine.generate import generate
from studio.engine.models.load import LoadedModel
from studio.store.samples import Sample


def take_samples(
    model: nn.Module,
    loaded: LoadedModel,
    record: RecordSection,
    run_id: str,
    step: int,
    should_stop: Callable[[], bool] | None = None,
) -> list[Sample]:
    """One sample a question. A failure is stored in place of the answers: it must not end hours of training.

    `should_stop` is asked before every token: hundreds of them take minutes on a CPU. It leaves the answers cut.
    """
    prompts = record.sample_prompts
    try:
        answers = _answers(model, loaded, record, should_stop)
        return [Sample(run_id, step, prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:500]
        print(f"step {step}: sampling failed: {reason}", flush=True)
        return [Sample(run_id, step, prompt, error=reason) for prompt in prompts]


def _answers(
    model: nn.Module, loaded: LoadedModel, record: RecordSection, should_stop: Callable[[], bool] | None
) -> list[str]:
    system = [{"role": "system", "content": record.sample_system}] if record.sample_system else []
    chats = [[*system, {"role": "user", "content": prompt}] for prompt in record.sample_prompts]
    ids = [prompt_ids(loaded, chat) for chat in chats]
    answers = generate(
        model,
        ids,
        eos_ids=loaded.eos_ids,
        pad_id=loaded.pad_id,
        max_new_tokens=record.sample_max_new_tokens,
        should_stop=should_stop,
    )
    texts = [loaded.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return [before_stop(text, loaded.stops) for text in texts]
