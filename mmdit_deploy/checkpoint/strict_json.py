"""JSON objects from files that nobody vouches for: every way to fail is a `CheckpointError`."""

from __future__ import annotations

import json
from typing import Any

from mmdit_deploy.errors import CheckpointError


class _RepeatedName(Exception):
    """A name occurs twice in one object. JSON readers differ in which one wins, so none may."""


def quote(text: object, limit: int = 120) -> str:
    """Shows untrusted text in a message: on one line, printable, of bounded length.

    Args:
        text: anything; its `repr` is shown.
        limit: the most characters to show.

    Returns:
        The shortened `repr`, in ASCII.
    """
    shown = ascii(text)
    return shown if len(shown) <= limit else f"{shown[:limit]}… ({len(shown)} characters)"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise _RepeatedName(name)
        result[name] = value
    return result


def parse_json_object(raw: bytes, what: str, fix: str) -> dict[str, Any]:
    """Parses one JSON object, strictly: UTF-8, no repeated names, no lone surrogates.

    Args:
        raw: the bytes of the document.
        what: how to name the document in a message, e.g. ``the header of a.safetensors``.
        fix: what the user can do about a broken document.

    Returns:
        The object, with the names in the order of the document.

    Raises:
        CheckpointError: if the bytes are anything else.
    """
    rule = f"{what} must be one JSON object in UTF-8"
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        # An escaped lone surrogate parses, but can be neither printed nor written to a file again.
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(rule, received=f"not UTF-8 at byte {error.start}", fix=fix) from error
    except UnicodeEncodeError as error:
        raise CheckpointError(rule, received="a lone surrogate in a string (not UTF-8)", fix=fix) from error
    except RecursionError as error:
        raise CheckpointError(rule, received="JSON nested too deeply", fix=fix) from error
    except _RepeatedName as error:
        raise CheckpointError(
            f"{what} must name everything once", received=f"repeated key {quote(error.args[0])}", fix=fix
        ) from error
    except ValueError as error:  # bad syntax, and integers of more than 4300 digits
        raise CheckpointError(rule, received=f"not JSON ({error})", fix=fix) from error
    if not isinstance(document, dict):
        raise CheckpointError(rule, received=f"a JSON {type(document).__name__}", fix=fix)
    return document
