"""Linear layers whose weights are in 8 bits, and whose inputs are not.

LLM.int8() (https://arxiv.org/abs/2208.07339), as bitsandbytes computes it, rounds the inputs to 8 bits as well, but for
the columns in which any row of the batch has an outlier. So how a row is rounded depends on who is asked beside it; and
where rounding is that coarse, the last bit of a sum decides to which side a value falls. Here the weights are
taken back to the inputs' format, layer by layer: a row is computed as in a base that was not squeezed.
"""

from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional


def round_weights_alone(model: nn.Module) -> None:
    """Let the model's 8-bit layers leave their inputs as they are."""
    for layer in model.modules():
        if type(layer) is Linear8bitLt:
            layer.__class__ = _WeightsAlone  # its weights and their state stay as they are
            if "_old_forward" in vars(layer):  # a hook of accelerate stands before it
                layer._old_forward = _WeightsAlone.forward.__get__(layer)


class _WeightsAlone(Linear8bitLt):
    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the format of the inputs."""
        if self.weight.CB is not None:
            self.init_8bit_state()
        # Whole numbers up to 127 are exact in every format; so is a power of two, which keeps float16 from overflowing.
        product = functional.linear(x / 128, self.state.CB.to(x.dtype)) * (self.state.SCB * (128 / 127))
        return (product if self.bias is None else product + self.bias).to(x.dtype)
