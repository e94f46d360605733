"""Frozen matrices in int8: one scale per output channel, products in the model's own dtype.

    W [in, out]  ~  kernel int8 [in, out] * kernel_scale float32 [out]

Only the kernels of attention and feed-forward blocks are quantised (`T5Config.quantization`);
embeddings, layer norms, position biases, the output layer and experts stay as they are. The grid
is that of Qwix's 'absmax' calibration, value for value: a channel's largest magnitude is 127.5
steps, so no value moves by more than half a step. Qwix (google/qwix) is the better kept of the two
libraries for this (0.1.8 of June 2026; AQT's last release is 0.9.0 of August 2025), but it
quantises linen models by patching JAX's functions while a model runs: kernels of a shape that
`jnp.matmul` has met before stay float unnoticed, and one that is cast before its product fails.
Shapes: in and out are those of a kernel; a stacked one has the L layers between them.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.errors import ElmError, nearest

Array = jax.Array
QUANTIZATIONS = ("int8",)
STEPS = 127.5
"""Steps of the grid between zero and a channel's largest magnitude."""
_QUANTIZED = re.compile(
    r"(?P<parent>(^|.*/)(\w*attention/(query|key|value|out)|mlp/(wi(_\d+)?|wo)))/kernel"
)


def check_quantization(name: str) -> None:
    """Refuses an unknown quantisation.

    Raises:
      ElmError: naming the accepted ones.
    """
    if name not in QUANTIZATIONS:
        raise ElmError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {name!r}"
            f"{nearest(str(name), QUANTIZATIONS)}"
        )


def quantize_kernel(kernel: Any) -> tuple[Any, Any]:
    """Rounds a kernel to int8.

    Args:
      kernel: floating [in, out] (numpy or jax).

    Returns:
      int8 [in, out] and the size of a step, float32 [out]; of the same library as `kernel`. No
      value of their product is further than half a step from `kernel`'s.

    Raises:
      ElmError: for values that are not finite (numpy only).

    >>> quantize_kernel(np.array([[1.0, 0.0], [-0.5, 0.0]], np.float32))
    (array([[127,   0],
           [-64,   0]], dtype=int8), array([0.00784314, 1.        ], dtype=float32))
    """
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    kernel = kernel.astype(np.float32)
    largest = xp.abs(kernel).max(axis=0)
    if xp is np and not np.isfinite(largest).all():
        raise ElmError("cannot quantise a kernel with values that are not finite")
    scale = xp.where(largest > 0, largest / np.float32(STEPS), np.float32(1.0))
    steps = xp.clip(xp.round(kernel / scale), -128, 127).astype(np.int8)
    return steps, scale.astype(np.float32)


def dequantize_kernel(kernel: Any, scale: Any) -> Any:
    """Returns the float32 matrix [in, out] that an int8 kernel and its scale [out] stand for."""
    return kernel.astype(np.float32) * scale


@jax.custom_vjp
def int8_matmul(x: Array, kernel: Array, scale: Array) -> Array:
    """Multiplies x by an int8 kernel, which is turned to x's dtype for the time of the product.

    Sums are float32. The gradient with respect to x is that of the float matrix; kernel and scale
    are frozen and have none.

    Args:
      x: floating [..., in].
      kernel: int8 [in, out].
      scale: float32 [out].

    Returns:
      [..., out], of x's dtype.
    """
    # The barriers keep XLA from making the float kernels ahead of time, all at once: out of a loop
    # over tokens, or in the forward pass for the backward pass. On a CPU it drops them early.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * scale).astype(x.dtype)


def _forward(x: Array, kernel: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return int8_matmul(x, kernel, scale), (kernel, scale)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    kernel, scale = saved
    g, kernel = jax.lax.optimization_barrier((g, kernel))
    scaled = (g.astype(jnp.float32) * scale).astype(g.dtype)
    x = jnp.matmul(scaled, kernel.astype(g.dtype).T, preferred_element_type=jnp.float32)
    return x.astype(g.dtype), None, None


int8_matmul.defvjp(_forward, _backward)


def is_quantized(path: str) -> bool:
    """Whether a parameter path of the backbone is one that quantisation turns to int8.

    >>> is_quantized('encoder/layers_0/mlp/wo/kernel'), is_quantized('decoder/logits_dense/kernel')
    (True, False)
    """
    return _QUANTIZED.fullmatch(path) is not None
