"""Makes tests/fixtures/formats.safetensors: small matrices as the libraries of each format pack and unpack them.

    pip download --no-deps --no-binary :all: autoawq==0.2.9 gptqmodel==7.7.0, and unpack both in FOLDER
    pip install torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1 loguru psutil
    python tests/make_format_fixtures.py FOLDER

AutoAWQ and GPTQModel need a GPU's extensions to be imported; what packs is lifted from their sources. For each case
NAME the file has NAME/TENSOR as the library writes it. The metadata has each quantization_config, the dtype and SHA-256
of the numbers that the library makes of the tensors again, and the versions.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import json
import math
import sys
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 32, 128
TARGET = Path(__file__).parent / "fixtures" / "formats.safetensors"
Tensors = dict[str, torch.Tensor]


def drawn(bits: int, group: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers on a grid, float16 [ROWS, COLUMNS], and its scales and zeros [ROWS, groups]."""
    rng, groups, top = np.random.default_rng(seed), -(-COLUMNS // group), (1 << bits) - 1
    scale = torch.tensor(rng.uniform(0.5, 1.5, (ROWS, groups)) / 256).half()
    zero = torch.tensor(rng.choice([0, top, top // 2, 3], (ROWS, groups)))
    codes = torch.tensor(rng.integers(0, top + 1, (ROWS, COLUMNS)))
    wide = [x.repeat_interleave(group, 1)[:, :COLUMNS] for x in (scale.float(), zero)]
    return ((codes - wide[1]) * wide[0]).half(), scale, zero


def linear(w: torch.Tensor) -> torch.nn.Linear:
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data = w
    return module


# --- AutoAWQ


def awq(root: Path) -> dict[str, tuple[dict, Tensors]]:
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):  # their __init__ import the whole package
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(root / name.replace(".", "/"))]
    sys.modules["awq.utils.utils"] = types.SimpleNamespace(get_best_device=lambda: "cpu")  # it needs accelerate
    found = {}
    for version_, kind in (("gemm", "WQLinear_GEMM"), ("gemv", "WQLinear_GEMV"), ("gemv_fast", "WQLinear_GEMVFast")):
        w, scale, zero = drawn(4, 64, 1)
        given = (scale.T, zero.T) if version_ == "gemm" else (scale, zero)
        module = getattr(importlib.import_module(f"awq.modules.linear.{version_}"), kind)
        packed = module.from_linear(linear(w), 4, 64, False, given[0].contiguous(), given[1].contiguous())
        config = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": version_}
        found[f"awq-{version_}"] = config, {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    unpack = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    x = found["awq-gemm"][1]
    numbers = unpack(x["qweight"], x["qzeros"], x["scales"], 4, 64).T  # the three layouts hold the same
    for _, tensors in found.values():
        tensors["numbers"] = numbers
    return found


# --- GPTQModel


def lifted(path: Path, names: tuple[str, ...], scope: dict) -> dict:
    """Functions of a source, of its classes too, without running the rest."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list, node.returns = [], None
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            exec(compile(ast.Module([node], []), path.name, "exec"), scope)
    return scope


class Packed(torch.nn.Module):
    """What the lifted functions ask of a layer."""

    planar, pack_dtype, pack_dtype_bits, in_features = False, torch.int32, 32, COLUMNS
    pack_np_math_dtype, pack_np_dtype, dequant_dtype = np.uint32, np.int32, torch.int16

    def __init__(self, bits: int, group: int):
        super().__init__()
        self.bits, self.maxq, self.pack_factor = bits, (1 << bits) - 1, 32 // bits
        shifts = torch.arange(0, 32, bits, dtype=torch.int32).unsqueeze(0)
        self.wf_unsqueeze_zero, self.wf_unsqueeze_neg_one = shifts.unsqueeze(0), shifts.unsqueeze(-1)
        self.register_buffer("g_idx", (torch.arange(COLUMNS) // group).to(torch.int32))

    def _init_wf_unsqueeze_buffers(self) -> None:
        pass


def gptq(root: Path) -> dict[str, tuple[dict, Tensors]]:
    class Other:
        pass

    scope = {"t": torch, "torch": torch, "np": np, "math": math, "nn": torch.nn, "_ConvNd": Other}
    scope["THREADPOOLCTL"] = types.SimpleNamespace(threadpool_limits=lambda _: contextlib.nullcontext())
    scope["transformers"] = types.SimpleNamespace(pytorch_utils=types.SimpleNamespace(Conv1D=Other))
    scope |= {"_torch_right_shift": torch.bitwise_right_shift, "BaseQuantLinear": Packed}
    scope["log"] = types.SimpleNamespace(info=types.SimpleNamespace(once=print))
    source = root / "gptqmodel/nn_modules/qlinear/__init__.py"
    lifted(source, ("pack_original", "dequantize_weight", "_dequantize_from_codes"), scope)
    lifted(root / "gptqmodel/utils/model.py", ("convert_gptq_v2_to_v1_format_module",), scope)
    Packed._dequantize_from_codes = scope["_dequantize_from_codes"]
    found = {}
    for bits, group in ((4, 64), (8, 64), (4, 96)):  # of 128 columns the last group is a short one
        w, scale, zero = drawn(bits, group, 2)
        module = Packed(bits, group)
        scope["pack_original"](module, linear(w), scale, zero)
        numbers = scope["dequantize_weight"](module).T
        names = "qweight", "qzeros", "scales", "g_idx"
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False}
        tensors = {name: getattr(module, name).clone() for name in names} | {"numbers": numbers}
        found[f"gptq-{bits}-{group}-v2"] = config | {"checkpoint_format": "gptq_v2"}, tensors
        module.qzero_format = lambda format: None  # noqa: A006
        scope["convert_gptq_v2_to_v1_format_module"](module, module)
        found[f"gptq-{bits}-{group}-v1"] = config, {**tensors, "qzeros": module.qzeros}
    return found


# --- compressed-tensors


def compressed() -> dict[str, tuple[dict, Tensors]]:
    from compressed_tensors.compressors import (
        FloatQuantizationCompressor,
        IntQuantizationCompressor,
        PackedQuantizationCompressor,
    )
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    packed, float_, int_ = PackedQuantizationCompressor, FloatQuantizationCompressor, IntQuantizationCompressor
    cases = {
        "ct-int4": (packed, {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}),
        "ct-int4-zeros": (packed, {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}),
        "ct-int8": (packed, {"num_bits": 8, "symmetric": True, "strategy": "channel"}),
        "ct-fp8": (float_, {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "ct-fp8-blocks": (float_, {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]}),
        "ct-w8a8": (int_, {"num_bits": 8, "strategy": "channel"}),
    }
    found, rng = {}, np.random.default_rng(3)
    rows = ROWS + 13  # no multiple of the 8 zeros of a word
    for name, (compressor, args) in cases.items():
        w = torch.tensor(rng.standard_normal((rows, COLUMNS)) / 16).bfloat16()
        parsed = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=["Linear"], weights=parsed)
        groups = COLUMNS // args.get("group_size", 1)
        shape = {"channel": (rows, 1), "block": (2, 2)}.get(args["strategy"], (rows, groups))
        top = 448 if args.get("type") == "float" else (1 << args["num_bits"]) / 2
        state = {"weight": w, "weight_scale": torch.tensor(rng.uniform(0.2, 0.3, shape) / top).bfloat16()}
        if not args.get("symmetric", True):
            state["weight_zero_point"] = torch.tensor(rng.integers(-8, 8, shape)).to(torch.int8)
        tensors = compressor.compress(state, scheme)
        numbers = compressor.decompress(tensors, scheme)["weight"]
        form = {packed: "pack-quantized", float_: "float-quantized", int_: "int-quantized"}[compressor]
        weights = json.loads(parsed.model_dump_json())
        config = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
        config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
        found[name] = config, tensors | {"numbers": numbers}
    return found


# --- transformers


def fp8() -> dict[str, tuple[dict, Tensors]]:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=(16, 64))
    quantizer = types.SimpleNamespace(quantization_config=config)
    w = torch.tensor(np.random.default_rng(4).standard_normal((ROWS, COLUMNS)) / 16).bfloat16()
    tensors = Fp8Quantize(quantizer).convert({"x.weight": w})
    tensors = {name.removeprefix("x."): x for name, x in tensors.items()}
    numbers = Fp8Dequantize(quantizer).convert(dict(tensors))
    numbers = next(x for x in numbers.values() if x.shape == w.shape)
    raw = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 64]}
    return {"fp8": (raw, {**tensors, "numbers": numbers})}


def main(folder: Path) -> None:
    roots = [next(folder.glob(f"{name}-*/")) for name in ("autoawq", "gptqmodel")]
    cases = {**awq(roots[0]), **gptq(roots[1]), **compressed(), **fp8()}
    metadata = {}
    for case, (config, of) in cases.items():
        numbers = of.pop("numbers").contiguous()
        digest = hashlib.sha256((numbers + 0.0).view(torch.uint8).numpy().tobytes()).hexdigest()
        told = {"shape": list(numbers.shape), "dtype": str(numbers.dtype).removeprefix("torch."), "sha256": digest}
        metadata[case] = json.dumps({"quantization_config": config, "numbers": told})
    tensors = {f"{case}/{name}": x.contiguous() for case, (_, of) in cases.items() for name, x in of.items()}
    made_by = {name: version(name) for name in ("torch", "transformers", "compressed-tensors")}
    metadata["made by"] = json.dumps(made_by | {root.name.split("-")[0]: root.name.split("-")[1] for root in roots})
    save_file({name: x.clone() for name, x in tensors.items()}, TARGET, metadata)
    print(f"{TARGET}: {TARGET.stat().st_size / 1000:.1f} KB, {len(cases)} cases, {metadata['made by']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
