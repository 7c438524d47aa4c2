"""The sample questions of a run, asked to the model as it is now."""

from collections.abc import Callable, Sequence

from torch import nn

from studio import faults
from studio.config.schema import RecordSection
from studio.engine.chat import before_stop, prompt_ids
from studio.engine.generate import generate
from studio.engine.models.load import LoadedModel
from studio.errors import StudioError
from studio.store.samples import Sample


def take_samples(
    model: nn.Module,
    loaded: LoadedModel,
    record: RecordSection,
    run_id: str,
    step: int,
    should_stop: Callable[[], bool] | None = None,
    together: bool = False,
) -> list[Sample]:
    """One sample a question. A failure is stored in place of the answers: it must not end hours of training.

    `should_stop` is asked before every token: hundreds of them take minutes on a CPU. It leaves the answers cut.
    `together`: several processes compute each token, and wait for one another. Raises StudioError when this one cannot
    go on with that; what fails before it fails in all of them alike.
    """
    prompts = record.sample_prompts
    try:
        ids = _ids(loaded, record)
    except Exception as error:
        return _failed(run_id, step, prompts, error)
    try:
        texts = _answers(model, loaded, record, ids, should_stop)
        return [Sample(run_id, step, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    except Exception as error:
        if together:
            raise _left_alone(step, error) from error
        return _failed(run_id, step, prompts, error)


def _ids(loaded: LoadedModel, record: RecordSection) -> list[list[int]]:
    system = [{"role": "system", "content": record.sample_system}] if record.sample_system else []
    chats = [[*system, {"role": "user", "content": prompt}] for prompt in record.sample_prompts]
    return [prompt_ids(loaded, chat) for chat in chats]


def _answers(
    model: nn.Module,
    loaded: LoadedModel,
    record: RecordSection,
    ids: list[list[int]],
    should_stop: Callable[[], bool] | None,
) -> list[str]:
    faults.hit("sample")
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


def _failed(run_id: str, step: int, prompts: Sequence[str], error: Exception) -> list[Sample]:
    reason = _reason(error)
    print(f"step {step}: sampling failed: {reason}", flush=True)
    return [Sample(run_id, step, prompt, error=reason) for prompt in prompts]


def _left_alone(step: int, error: Exception) -> StudioError:
    return StudioError(
        f"The samples of step {step} failed in this process ({_reason(error)}), and those that share out their weights "
        "cannot go on without it.",
        "Resume the run. If that fails again: a new run from its newest checkpoint (model.continue_from), with "
        "record.sample_prompts empty or a smaller record.sample_max_new_tokens.",
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
