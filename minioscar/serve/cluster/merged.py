"""What all replicas say of themselves, as one answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ...storage import strict_json as json
from ..errors import ApiError

Bodies = Sequence[tuple[str, bytes]]  # names of replicas, and what they say
Merge = Callable[[Bodies], tuple[bytes, str]]


def metrics(bodies: Bodies) -> tuple[bytes, str]:
    """Prometheus text: every sample with the name of its replica."""
    lines: dict[str, list[str]] = {}  # metric -> its lines
    for name_of, body in bodies:
        for line in body.decode().splitlines():
            if line.startswith("#"):
                of = lines.setdefault(line.split()[2], [])
                of += [line] if line not in of else []
            else:
                name, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line).groups()
                of = lines.get(name, lines.get(re.sub("_(bucket|sum|count)$", "", name)))
                of.append(f'{name}{{replica="{name_of}"{"," + labels if labels else ""}}} {value}')
    text = "".join(f"{line}\n" for of in lines.values() for line in of)
    return text.encode(), "text/plain; version=0.0.4; charset=utf-8"


def slots(bodies: Bodies) -> tuple[bytes, str]:
    found = [row | {"replica": name} for name, body in bodies for row in json.loads(body)]
    return json.dumps(found).encode(), "application/json"


def status(bodies: Bodies) -> tuple[bytes, str]:
    """Numbers added up."""
    found = [json.loads(body) for _, body in bodies]
    added = {name: sum(one[name] for one in found) for name, value in found[0].items() if isinstance(value, int)}
    return json.dumps(found[0] | added | {"replicas": len(found)}).encode(), "application/json"


def health(bodies: Bodies) -> tuple[bytes, str]:
    """Raises ApiError where no replica is well."""
    if not any("status" in json.loads(body) for _, body in bodies):
        raise ApiError(503, "no replica is well; try again later", headers=(("retry-after", "1"),))
    return json.dumps({"status": "ok"}).encode(), "application/json"


PATHS: dict[str, Merge] = {"/metrics": metrics, "/slots": slots, "/status": status, "/health": health}
