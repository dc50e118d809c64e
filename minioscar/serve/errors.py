"""Errors as OpenAI's API tells them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError

TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 500: "server_error",
    503: "overloaded_error",
}  # fmt: skip


class ApiError(Exception):
    """param: the field of the request that is wrong. more: other fields of the error, beside OpenAI's."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: tuple[tuple[str, str], ...] = (), **more: Any,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


@contextmanager
def of_field(param: str | None = None) -> Iterator[None]:
    """A UserError is the request's fault."""
    try:
        yield
    except UserError as error:
        raise ApiError(400, str(error), param, getattr(error, "code", None)) from None
