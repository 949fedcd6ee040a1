"""bf16 and tf32 in NumPy, which has neither."""

from __future__ import annotations

import numpy as np


def widened(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    """bf16 bits of fp32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)


def to_tf32(values: np.ndarray, nearest: bool) -> np.ndarray:
    """fp32 values with ten bits of mantissa: rounded to nearest, ties away from zero, or the others cut off."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) + np.uint32(0x1000 if nearest else 0)
    return np.where(np.isfinite(values), (bits & 0xFFFFE000).view(np.float32), values)


def tf32_product(left: np.ndarray, right: np.ndarray, corrected: bool) -> np.ndarray:
    """left @ right as tensor cores compute it of fp32 tiles: "tf32", or `corrected` "tf32x3".

    They cut the last bits off what they are given. The compiler splits each operand for the latter into a rounded high
    part and the rest, and adds both mixed products.
    """
    if not corrected:
        return to_tf32(left, nearest=False) @ to_tf32(right, nearest=False)
    high_left, high_right = to_tf32(left, nearest=True), to_tf32(right, nearest=True)
    low_left, low_right = to_tf32(left - high_left, nearest=False), to_tf32(right - high_right, nearest=False)
    corrections = low_left @ high_right + high_left @ low_right
    return np.where(np.isnan(corrections), 0, corrections) + high_left @ high_right  # inf - inf is NaN
