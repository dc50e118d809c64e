"""What `serve run minioscar.app.ray_app:build model=M replicas=1:8 slots=16` builds: options as `minioscar serve` has
them, without their dashes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cli import parsed
from .serving import application

if TYPE_CHECKING:
    from ray.serve import Application


def build(options: dict[str, str]) -> Application:
    """Raises UserError for what cannot be."""
    given = {"replicas": "1"} | {name: str(value) for name, value in options.items()}
    model = given.pop("model", "")
    return application(parsed(["serve", model, *(f"--{name.replace('_', '-')}={given[name]}" for name in given)]))
