"""Weights in 4 and 8 bits, as files keep them: a small reader for each format, from tensors to `plain.Plain`.

config.json says which format it is and with what parameters (`read_config`); which layers are quantized, their tensors
say. Readers are array code over NumPy or CuPy, so that on a card codes are unpacked there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, shown
from ..storage import strict_json as json
from . import awq, compressed, fp8, gptq
from .base import Format, Linear, Unfit
from .plain import Plain, joined

__all__ = ["Format", "Linear", "Plain", "Unfit", "beside", "joined", "read_config"]

READERS: dict[str, tuple[Callable[[dict, str], Format], str]] = {
    "awq": (awq.read_config, "AWQ"),
    "gptq": (gptq.read_config, "GPTQ"),
    "compressed-tensors": (compressed.read_config, "compressed-tensors"),
    "fp8": (fp8.read_config, "FP8"),
    "fbgemm_fp8": (fp8.read_fbgemm, "FBGEMM FP8"),
}
OTHERS = ("bitsandbytes", "hqq", "torchao", "eetq", "quanto", "aqlm", "quip", "higgs", "vptq", "spqr", "modelopt")
OTHERS += ("quark", "mxfp4", "exl2", "exl3", "marlin", "gptq_p", "mlx")
SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
WAY_OUT = "use the model's BF16 weights (--weights int8 quantizes them), or AWQ, GPTQ, compressed-tensors or FP8 files"


def beside(raw: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """config.json, with the quantization_config that older folders keep in a file of its own."""
    for name, method in SIDE_FILES.items():
        if not raw.get("quantization_config") and (folder / name).is_file():
            found = json.read_object(folder / name, "it says how the weights are quantized")
            return {**raw, "quantization_config": {"quant_method": method, **found}}
    return raw


def read_config(raw: Mapping[str, Any], source: str) -> Format | None:
    """What config.json says of quantized weights; None: nothing. Raises UserError for what is not implemented."""
    found = raw.get("quantization_config") or raw.get("compression_config")
    if not found and raw.get("quantization"):
        found = {"quant_method": "mlx"}
    if not found:
        return None
    if not isinstance(found, dict):
        raise UserError(f"{source}: quantization_config must be an object, not {shown(found)}")
    method = str(found.get("quant_method", "compressed-tensors" if "config_groups" in found else None)).lower()
    if "auto-round" in method:
        method = _packing_of_auto_round(found)
    if method not in READERS:
        known = method if method in OTHERS else shown(method)
        raise UserError(f"{source}: quantization_config of {known} is not supported; {WAY_OUT}")
    reader, name = READERS[method]
    try:
        return reader(found, name)
    except Unfit as error:
        raise UserError(f"{source}: quantization_config: {error}; {WAY_OUT}") from None


def _packing_of_auto_round(found: dict) -> str:
    """auto-round exports in the layouts of others."""
    packing = str(found.get("packing_format", "")).lower()
    if found.get("data_type", "int") == "int" and "awq" in packing:
        found["version"] = "gemm"
        return "awq"
    if found.get("data_type", "int") == "int" and "gptq" in packing:
        found["checkpoint_format"] = "gptq_v2" if "v2" in packing else "gptq"
        return "gptq"
    return f"auto-round with packing_format {packing}"
