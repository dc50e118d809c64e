"""--debug: a back end that looks at what every operation computes, and names the first that is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .cache import NewTokens
from .decoding import Decoder
from .errors import Failure
from .quantized import Quantized
from .weights import Weights

if TYPE_CHECKING:
    from .ops.reference import Reference

Array = Any
PROJECTIONS = {
    "qkv": "qkv projection", "o": "output projection", "gate_up": "gate and up projection", "down": "down projection",
}


class Watch:
    """Wraps a back end: the model's operations are checked, everything else goes through. Costs a look at every result.

    Raises Failure at the first NaN or infinity, with the layer, the operation, and whether its weights brought it.
    """

    def __init__(self, ops: Reference, weights: Weights):
        self._ops, self._where = ops, ""
        self._names = {id(weights.head): ("", "logits")}
        self._layers = {id(layer): f"layer {i}: " for i, layer in enumerate(weights.layers)}
        for layer in weights.layers:
            for field, name in PROJECTIONS.items():
                self._names[id(getattr(layer, field))] = (self._layers[id(layer)], name)
        for kind, arrays in weights.towers.items():
            self._names |= {id(array): ("", f"{kind} tower, {name}") for name, array in arrays.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    @property
    def first(self) -> Watch:
        other = object.__new__(Watch)
        vars(other).update(vars(self), _ops=self._ops.first)
        return other

    def embed(self, table: Array, ids: np.ndarray) -> Array:
        return self._finite(self._ops.embed(table, ids), "embedding", {"embedding": table})

    def linear(self, x: Array, weight: Array, bias: Array | None = None, **options: Any) -> Array:
        self._where, name = self._names.get(id(weight), ("", "a tower's convolution"))  # whose weights are reshaped
        norm = options.get("norm")
        inputs = {"weight": weight, "bias": bias, "norm's weight": norm and norm[0]}
        return self._finite(self._ops.linear(x, weight, bias, **options), name, inputs)

    def experts(self, x: Array, layer: Any, *rest: Any) -> Array:
        self._where = self._layers[id(layer)]
        inputs = {"norm's weight": layer.post_norm, "router": layer.router}
        inputs |= {"gate and up weight": layer.gate_up, "down weight": layer.down}
        return self._finite(self._ops.experts(x, layer, *rest), "experts", inputs)

    def rotate_scale(self, qkv: Array, layer: Any, *rest: Any) -> tuple[Array, NewTokens]:
        self._where = self._layers[id(layer)]
        q, new = self._ops.rotate_scale(qkv, layer, *rest)
        inputs = {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
        for what, array in {"queries": q, **new._asdict()}.items():
            if array is not None:
                self._finite(array, f"rotation and scaling ({what})", inputs)
        return q, new

    def attention(self, *args: Any) -> Array:
        return self._finite(self._ops.attention(*args), "attention", {})

    def decoder(self, *args: Any, logits: bool = False, replay: str = "eager") -> Decoder:
        """Every step is one of the operations above, none is replayed."""
        return self._ops.decoder(*args, logits=logits, replay="eager")

    def _finite(self, result: Array, name: str, inputs: dict[str, Array | None]) -> Array:
        bad = self._bad(result)
        if bad.any():
            self._report(bad, result, name, inputs)
        return result

    def _bad(self, array: Array | Quantized) -> np.ndarray:
        """Which numbers are not finite; bool, on the host."""
        array = array.dequantize(self._ops.xp) if isinstance(array, Quantized) else array
        return ~np.isfinite(self._ops.numpy(array).astype(np.float32))

    def _damaged(self, array: Array | Quantized) -> bool:
        """Whether there is such a number, on any card."""
        return any(not np.isfinite(part.astype(np.float32)).all() for part in self._ops.on_cards(array))

    def _report(self, bad: np.ndarray, result: Array, name: str, inputs: dict[str, Array | None]) -> NoReturn:
        kind = "NaN" if np.isnan(self._ops.numpy(result).astype(np.float32)).any() else "infinite"
        token = int(bad.reshape(len(bad), -1).any(axis=1).argmax())
        guilty = [what for what, array in inputs.items() if array is not None and self._damaged(array)]
        damaged = f"its {guilty[0]} is not finite: the model's files are damaged" if guilty else ""
        where = f"{bad.sum()} of {bad.size} numbers are {kind}, first at token {token} of the pass"
        raise Failure(f"{self._where}{name}: {where}; {damaged or 'what went into it was finite'}")
