"""How a model computes the examples of a step: laid out as rows, through its layers, through its head, and back.

What an architecture's code does not promise is tried on a few tokens at the start: whether it follows a layout, keeps
packed examples apart, and has a head apart from the rest. Where it does not, the slower way that it does follow is
taken, and said.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from studio.config.schema import RunConfig
from studio.data.packing import TREE_NODES, Ints, close_rooms, few_rooms
from studio.data.tokens import Example
from studio.engine import attention, head, pointwise, regions
from studio.engine.adapters import core_of, is_adapter, trainable_parameters
from studio.engine.attention import Layout, following
from studio.engine.batches import Batch, Place, collate, make_batches, make_rows
from studio.engine.cpu import compiled
from studio.engine.cuda import graphs, liger
from studio.engine.fused import fuse, keep_order, unfuse
from studio.engine.generate import quiet
from studio.engine.virtual import has_virtual_tokens, with_virtual_tokens

# Two examples that share their first two tokens, and where a tree of both has the nodes of the second.
FIRST = Example([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
SECOND = Example([1, 2, 7, 8, 9], [1, 2, 7, 8, 9])
NODES_OF_SECOND = [0, 1, 5, 6]
LARGE_LOGIT = 300.0  # caps of logits are 15 to 50
CLOSE = 0.02  # of its length: what two ways to compute a tensor may differ by


@dataclass(frozen=True)
class Traits:
    """How a model may be computed. `layouts`: rows of many examples with what they share computed once.

    `isolates_packed`: without a layout, examples in one row are kept apart by their positions. `splits_head`: logits
    are the head of the last hidden states, and nothing else.
    """

    splits_head: bool
    isolates_packed: bool
    layouts: bool


class Forward:
    """A model's passes over the batches of a step. `packing`, `kind` (of attention) and `why` say what was chosen."""

    def __init__(self, model: nn.Module, config: RunConfig, dtype: torch.dtype, pad_id: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._config, self._dtype, self._pad_id = config, dtype, pad_id
        self._core = core_of(model)
        self.why_not_compiled = self._compile()
        unfused = fuse(model) if is_adapter(model) else 1
        self._casts = dtype != torch.float32 and unfused > 0
        with self.precision():
            liger.use(self._core, config.train.liger, dtype, self.device)
        if self._casts and self.device.type == "cpu" and not self.why_not_compiled:
            self.why_not_compiled = "in 16 bits full training, dropout and DoRA are computed under autocast"
        self.kind, self.why = self._core.config._attn_implementation, "as transformers computes it"
        self.traits = self._find_traits()
        self.packing = self._choose_packing()
        if config.train.compile == "on" and self.device.type != "cpu" and not self.why_not_compiled:
            self.why_not_compiled = self.compile_regions()
        learned = trainable_parameters(model)
        self._replays = graphs.replays(self._pass, learned, config, self.device, self._unrecordable())
        self.keeps_gradients = self._replays is not None  # a recorded pass adds to these tensors, so they must stay

    def _compile(self) -> str:
        """Let layers be computed by code compiled for this device, as train.compile says; why they are not."""
        wanted, on_cpu = self._config.train.compile, self.device.type == "cpu"
        why = compiled.use(wanted, self._dtype, self.device)
        by_inductor = wanted == "on" and not on_cpu
        found = pointwise.use(by_inductor, self._dtype, self.device)
        return found if by_inductor else why

    def compile_regions(self) -> str:
        """Compile layers that run their own code by torch.compile. Returns why not: "" if so, or if there are none."""
        layers = regions.own_layers(self._core)
        if layers and self._config.train.gradient_checkpointing:
            return "layers are computed again for their gradient (train.gradient_checkpointing)"
        return regions.use(layers, self._results, self._are_close) if layers else ""

    def use_own_layers(self) -> None:
        """Compute every layer by its own code from here on: where another library's hooks must see it run."""
        unfuse(self.model)
        regions.leave(regions.own_layers(self._core))
        self._casts = self._dtype != torch.float32

    def keep_order(self) -> None:
        """What learns gets its gradient in the same order from here on, whatever the rows are."""
        keep_order(self.model)

    def batches(self, examples: Sequence[Example], micro_batch_size: int, place: Place = (0, 1)) -> list[Batch]:
        """The micro-batches of a step that fall to the process at `place`."""
        plan = (examples, self.packing, self._config.data.max_length, micro_batch_size)
        if not self.traits.layouts:
            return make_batches(*plan, self._pad_id, place)
        few_at_once = self.device.type == "cpu" and place[1] == 1
        fixed = self._replays is not None and not self._replays.given_up
        layout = partial(self._layout, fixed=fixed)
        return make_rows(*plan, layout, TREE_NODES if few_at_once else None, place, self._room(fixed))

    def _room(self, fixed: bool) -> Callable[[int], int] | None:
        """What rows are filled up to: oneDNN builds its 16-bit products anew for each size, and keeps them."""
        if fixed:
            return few_rooms
        return close_rooms if self.device.type == "cpu" and self._dtype != torch.float32 else None

    def backward(self, batch: Batch, num_trained: int, scale: float = 1.0) -> Tensor:
        """Add a micro-batch's part of the gradient of a step with `num_trained` tokens, times `scale`.

        Returns its part of the loss, unscaled.
        """
        counted = replace(batch, weights=batch.weights * (scale / num_trained))
        return (self._replays or self._pass)(counted) / scale

    def _pass(self, batch: Batch) -> Tensor:
        """Forward and backward over a batch whose weights say what each target counts in the step; returns its loss.

        The head runs on detached positions, few at a time, so that the logits of these are all that is ever kept; the
        gradient they leave then flows through the rest of the model once.
        """
        with following(batch.layout), self.same_inputs():
            with self.precision(), self._keeping():
                hidden = self._hidden(batch)
                loss, gradient = self._head_gradient(hidden, batch.targets, batch.weights)
            if hidden.requires_grad:
                hidden.backward(gradient)
        return loss

    def graph(self, batch: Batch, num_trained: int, num_pieces: int) -> Tensor:
        """A micro-batch's part of the loss as one graph, for engines that run the backward pass themselves.

        The logits of the `num_pieces` pieces are computed again in the backward pass, so that one piece's are kept.
        The backward pass, too, must run `following` the batch's layout.
        """
        with self.precision():
            hidden = self._hidden(batch)
            tensors = (hidden, batch.targets, batch.weights)
            pieces = zip(*(tensor.tensor_split(num_pieces) for tensor in tensors), strict=True)
            losses = [checkpoint(self._cross_entropy, *piece, use_reentrant=False) for piece in pieces]
        return torch.stack(losses).sum() / num_trained

    @torch.no_grad()
    def loss(self, batch: Batch, in_pieces: bool = True) -> float:
        """Sum of the cross-entropy over the trained tokens of a batch; the head runs once unless `in_pieces`."""
        with following(batch.layout), self.precision():
            states = (self._hidden(batch), batch.targets, batch.weights)
            pieces = _pieces(*states) if in_pieces else [states]
            return sum(float(self._cross_entropy(*piece)) for piece in pieces)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast to the run's dtype where a layer does not cast by itself."""
        with ExitStack() as stack:
            if self._casts:
                stack.enter_context(torch.autocast(self.device.type, dtype=self._dtype))
                stack.enter_context(self.same_inputs())
            yield

    @contextmanager
    def same_inputs(self) -> Iterator[None]:
        """PEFT casts no inputs up to the adapter's float32; layers that are computed again backwards need that, too."""
        if not (self._casts and is_adapter(self.model)):
            yield
            return
        with disable_input_dtype_casting(self.model):
            yield

    def _keeping(self) -> AbstractContextManager[Any]:
        """Where what the backward pass needs is kept meanwhile."""
        if not self._config.train.offload_activations:
            return nullcontext()
        return save_on_cpu(pin_memory=self.device.type == "cuda")

    def _layout(self, ends: Ints, fixed: bool = False) -> Layout:
        return attention.make_layout(self.kind, ends, self.device, fixed)

    def _unrecordable(self) -> str:
        """What of the model stands against recording its passes; "" for nothing."""
        if not self.traits.layouts:
            return "rows of this model have no fixed size"
        return "" if self.kind in graphs.KINDS else f"attention {self.kind} is of another shape for every row"

    def _hidden(self, batch: Batch) -> Tensor:
        """What the head is asked about: (trained tokens, hidden size), or their logits where the head is not apart."""
        inputs = with_virtual_tokens(self.model, self._inputs(batch))
        if self.traits.splits_head:
            states = self._core.get_decoder()(**inputs).last_hidden_state
        else:
            states = self._core(**inputs).logits
        return states[:, -batch.input_ids.shape[1] :].flatten(0, 1)[batch.places]

    def _head_gradient(self, hidden: Tensor, targets: Tensor, factors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss, weighted by `factors`, and its gradient at `hidden`."""
        output = self._core.get_output_embeddings()
        if self.traits.splits_head and head.is_frozen_linear(output):
            return head.frozen_head_gradient(hidden.detach(), output, targets, factors)
        below = hidden.detach().requires_grad_(hidden.requires_grad)
        losses = []
        for piece in _pieces(below, targets, factors):
            loss = self._cross_entropy(*piece)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum(), below.grad

    def _cross_entropy(self, states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum over targets, each as often as it has weight."""
        logits = self._core.get_output_embeddings()(states) if self.traits.splits_head else states
        return head.cross_entropy(logits, targets, weights)

    @torch.no_grad()
    def _find_traits(self) -> Traits:
        alone, packed = collate([[SECOND]], 0), collate([[FIRST, SECOND]], 0)
        is_own = not has_virtual_tokens(self.model)  # else every example needs them before it, in a row of its own
        with quiet(self.model), self.precision():
            whole, of_second = self._states(alone), -len(SECOND.input_ids)
            return Traits(
                splits_head=_has_parts(self._core) and self._splits_head(alone, whole[1]),
                isolates_packed=is_own and self._close([each[:, of_second:] for each in self._states(packed)], whole),
                layouts=is_own and self._follows_layouts([each[:, : len(NODES_OF_SECOND)] for each in whole]),
            )

    def _follows_layouts(self, expected: list[Tensor]) -> bool:
        """Take the first kind of attention with which the nodes of the second example have its states."""
        name, longest, failed = self._config.model.attention, self._config.data.max_length, ""
        for kind, why in attention.choices(name, self._core.config, longest, self._dtype, self.device):
            try:
                self.kind, self.why = attention.adopt(self._core, kind), why
                [tree] = make_rows([FIRST, SECOND], "tree", 64, 2, self._layout)
                if self._close([each[:, NODES_OF_SECOND] for each in self._states(tree)], expected):
                    return True
            except (RuntimeError, ValueError, TypeError, IndexError, ImportError) as error:
                failed = f" ({kind}: {' '.join(str(error).split())[:120]})"  # an architecture that takes no such thing
        is_eager = name == "eager" or not getattr(self._core, "_supports_sdpa", True)  # Gemma 2 caps its scores
        self.kind = attention.adopt(self._core, "eager" if is_eager else "sdpa")
        self.why = f"as transformers computes it: this model follows no layout of ours{failed}"
        return False

    def _close(self, found: list[Tensor], expected: list[Tensor]) -> bool:
        """Equal but for rounding: a leak or a missing scale differs by far more than a hundredth in the first layer.

        Thirty layers of 16-bit numbers make that a tenth: any two kernels differ by so much, and so may the logits
        unless they are float32.
        """
        return all(map(_is_close, found, expected, (CLOSE, self._limit)))

    @property
    def _limit(self) -> float:
        """What the results of many layers may differ by."""
        return CLOSE if self._dtype == torch.float32 else 0.3

    def _choose_packing(self) -> str:
        """How examples are laid out: as the config says, where this model computes the same gradient that way."""
        pack = self._config.data.pack
        if self.traits.layouts:
            return pack
        if has_virtual_tokens(self.model):
            self.why += ": virtual tokens stand before every example"
            if pack != "none":
                print("Virtual tokens stand before every example, so examples are padded (pack: none).", flush=True)
            return "none"
        if pack == "tree":
            pack = "sequence"
            print("This model's attention cannot follow a tree, so examples are packed as sequences.", flush=True)
        if pack == "sequence" and not self.traits.isolates_packed:
            pack = "none"
            print("This model lets packed examples see each other, so they are padded (pack: none).", flush=True)
        return pack

    def _states(self, batch: Batch) -> list[Tensor]:
        """Hidden states after the first layer, and logits."""
        batch = batch.to(self.device)
        with following(batch.layout):
            out = self._core(**self._inputs(batch), output_hidden_states=True)
        return [out.hidden_states[1], out.logits]

    def _results(self) -> list[Tensor]:
        """Hidden states of two short examples, and the gradients of the first and the last weight that learns."""
        make = partial(make_rows, layout=self._layout) if self.traits.layouts else partial(make_batches, pad_id=0)
        [batch] = make([FIRST, SECOND], self.packing, 64, 2)
        learned = trainable_parameters(self.model)
        found: list[Tensor] = []
        try:
            for is_training in (True, False):  # dropout is chance: what counts is without it, what trains must run, too
                self.model.train(is_training)
                with following(batch.layout), self.precision():
                    hidden = self._hidden(batch.to(self.device))
                    gradients = torch.autograd.grad(hidden.float().sum(), [learned[0], learned[-1]], allow_unused=True)
                found = [hidden.detach(), *(each for each in gradients if each is not None)]
        finally:
            self.model.train()
        return found

    def _are_close(self, found: list[Tensor], expected: list[Tensor]) -> bool:
        return all(_is_close(*each, self._limit) for each in zip(found, expected, strict=True))

    def _splits_head(self, batch: Batch, logits: Tensor) -> bool:
        """Whether the head may be asked apart from the rest: nothing comes between the two, and nothing after it, not
        even what leaves small logits as they are, as a cap does. `logits`: those of the batch."""
        factor = LARGE_LOGIT / logits.abs().max()
        handle = self._core.get_output_embeddings().register_forward_hook(lambda _, inputs, found: found * factor)
        try:
            states = self._core.get_decoder()(**self._inputs(batch.to(self.device))).last_hidden_state
            return _is_close(self._core.get_output_embeddings()(states), self._states(batch)[1])
        finally:
            handle.remove()

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        mask = batch.layout.mask if batch.layout else None
        if mask is None and batch.layout and self._config.train.cuda_graph != "off":
            # Else transformers asks the GPU for one.
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        if mask is not None and self.kind == "eager":  # adds its mask to the scores
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(self._dtype).min)
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "attention_mask": mask,
            "use_cache": False,
        }


def _pieces(states: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """States and what belongs to them in pieces small enough for the head."""
    return zip(*(tensor.split(head.HEAD_ROWS) for tensor in (states, *tensors)), strict=True)


def _is_close(found: Tensor, expected: Tensor, limit: float = CLOSE) -> bool:
    return bool((found.float() - expected.float()).norm() <= limit * expected.float().norm())


def _has_parts(core: nn.Module) -> bool:
    decoder = core.get_decoder() if hasattr(core, "get_decoder") else None
    return decoder is not None and decoder is not core and core.get_output_embeddings() is not None
