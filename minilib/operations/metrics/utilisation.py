"""How much of a machine a model uses: of its arithmetic in training, of its memory's bandwidth in decoding.

    MFU   FLOPs that the model needs  · tokens/s / peak FLOP/s       what the run is paid for
    HFU   FLOPs that the device does  · tokens/s / peak FLOP/s       recomputed activations and hidden pairs included
    MBU   bytes that decoding reads   · steps/s  / peak bytes/s      weights once a step, keys and values once a token

All three count seconds in which steps ran. What a run loses between its steps is goodput's matter, and counted there.

Sources: Chowdhery et al. 2022 (PaLM), section 4.1 and appendix B; Korthikanti et al. 2022, "Reducing Activation
Recomputation", section 5 (HFU); Agarwal et al. 2023, "LLM Inference Performance Engineering" (MBU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from minilib.mechanisms.basics.checks import check_whole
from minilib.model.config import ModelConfig
from minilib.serving.step_cost import weights_read
from minilib.training.planner.shape import TrainedShape


class ImpossibleUtilisation(ValueError):
    """More than a machine can do: the work, the seconds or the peak is wrong."""


class UnknownDevice(LookupError):
    """No data sheet for exactly this device; the message lists those there are."""


# What drivers call a device → its data sheet. Whole names, since names of one product are parts of others': H20 is in
# H200, B300 in GB300, and an H100 on PCIe reaches three quarters of one on SXM.
DATASHEET_OF = {
    "NVIDIA A100-SXM4-80GB": "a100-80g-sxm",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA GB300": "gb300",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
    "AMD Instinct MI300X": "mi300x",
}


def datasheet_of(device_name: str) -> str:
    """The name of the data sheet, for Machine.datasheet, of what torch.cuda.get_device_name says.

    Raises:
        UnknownDevice: if there is none for exactly this name. A similar product's peak would be a wrong one.
    """
    if device_name not in DATASHEET_OF:
        raise UnknownDevice(f"no data sheet of exactly {device_name!r}; there are those of: {', '.join(DATASHEET_OF)}")
    return DATASHEET_OF[device_name]


def model_flops_per_token(shape: TrainedShape, sequence: int, windows: Sequence[int | None] = ()) -> float:
    """FLOPs that a token of training needs: forward and backward, active experts, visible pairs.

    Args:
        shape: of the model.
        sequence: tokens of a training sequence.
        windows: for each layer, those of predicted tokens included, how many tokens a token sees, itself included;
            None for all before it. Empty if no layer slides.

    Raises:
        ValueError: if a size is no whole number ≥ 1, or the windows are not one a layer.
    """
    if not windows:
        return shape.flops_per_token(sequence)
    if len(windows) != shape.all_layers:
        raise ValueError(f"one window for each of {shape.all_layers} layers is needed, got {len(windows)}")
    of_one_pair = shape.attention_flops(1, causal=False)
    seen = sum(visible_tokens(sequence, window) for window in windows)
    return 6 * shape.matrix_parameters + 3 * of_one_pair * seen


def visible_tokens(sequence: int, window: int | None = None) -> float:
    """Tokens that a token sees on average, in causal attention: half of a long sequence, and at most the window.

    A token counts half of itself, as it does in `TrainedShape.attention_flops`.
    """
    check_whole("sequence", sequence, 1)
    if window is None or window >= sequence:
        return sequence / 2
    check_whole("window", window, 1)
    return window - window**2 / (2 * sequence)


def hardware_flops_per_token(
    shape: TrainedShape, sequence: int, recomputed: float = 0.0, hidden_pairs: bool = False
) -> float:
    """FLOPs that a device does for a token of training.

    Args:
        shape: of the model.
        sequence: tokens of a training sequence.
        recomputed: part of the layers whose forward is done twice, since their activations were not kept; 0 to 1.
        hidden_pairs: whether attention computes the pairs that the causal mask then hides, as plain products do and
            FlashAttention does not.

    Raises:
        ValueError: if `recomputed` is no part.
    """
    if not 0 <= recomputed <= 1:
        raise ValueError(f"recomputed is a part of the layers, 0 to 1; got {recomputed!r}")
    tables = shape.vocab * shape.hidden * (1 + shape.predicted_tokens)  # of unembedding, which nobody does twice
    attention = shape.attention_flops(sequence, causal=not hidden_pairs) * shape.all_layers
    layers = 2 * (shape.matrix_parameters - tables) + attention
    return shape.flops_per_token(sequence, causal=not hidden_pairs) + recomputed * layers


def flops_utilisation(flops_per_token: float, tokens_per_second: float, peak: float, devices: int = 1) -> float:
    """MFU or HFU, by whose FLOPs they are.

    Args:
        flops_per_token: of the model, or of the device.
        tokens_per_second: of all devices together, over seconds at whose end the devices were waited for.
        peak: FLOP/s of one device, dense, in the precision of the products.
        devices: how many share the tokens.

    Raises:
        ImpossibleUtilisation: above 1.
        ValueError: if an argument is no finite number, or a peak is not positive.
    """
    check_whole("devices", devices, 1)
    return _part(flops_per_token * tokens_per_second, peak * devices, "FLOP/s", _WRONG_FLOPS)


def decode_bytes(config: ModelConfig, contexts: Sequence[int], weight_bytes: float, kv_bytes: float) -> float:
    """Bytes that one decoding step reads: weights once, and keys and values of every sequence's context.

    Args:
        config: of the model. Of its experts those are read that the step's tokens are expected to hit.
        contexts: for each sequence of the batch the tokens that its new token sees, itself included.
        weight_bytes: bytes of a weight, such as 2 for bf16.
        kv_bytes: bytes of a number in the KV cache.

    Raises:
        ValueError: if there is no sequence, or a context is no whole number ≥ 1.
    """
    if not contexts:
        raise ValueError("a decoding step has a sequence or more")
    for context in contexts:
        check_whole("a context", context, 1)
    weights = weights_read(config, len(contexts), len(contexts))
    return weights * weight_bytes + sum(contexts) * config.kv_values_per_token * kv_bytes


def bandwidth_utilisation(bytes_read: float, seconds: float, bandwidth: float) -> float:
    """MBU of a step, or of many.

    Args:
        bytes_read: see `decode_bytes`.
        seconds: that the steps took, the device's work included.
        bandwidth: bytes/s of the memory, as measured.

    Raises:
        ImpossibleUtilisation: above 1: these bytes came from a cache, or the seconds lack a synchronisation.
        ValueError: if an argument is no finite number, or seconds or bandwidth are not positive.
    """
    return _part(bytes_read, bandwidth * seconds, "bytes", _WRONG_BYTES)


_WRONG_FLOPS = (
    "were seconds taken before the device had ended; are all experts counted and not the active ones, or pairs that "
    "a window or the causal mask hides; is the peak that of another device or precision?"
)
_WRONG_BYTES = "were seconds taken before the device had ended; do the weights fit into a cache?"


def _part(done: float, possible: float, unit: str, causes: str) -> float:
    if not (math.isfinite(done) and math.isfinite(possible) and done >= 0 and possible > 0):
        raise ValueError(f"work ≥ 0 and a peak > 0 are needed, both finite; got {done!r} of {possible!r} {unit}")
    if done > possible:
        raise ImpossibleUtilisation(f"{done:.4g} of {possible:.4g} {unit} are {done / possible:.0%}: {causes}")
    return done / possible
