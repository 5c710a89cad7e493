"""Einsum as a product of stacks of matrices.

Einsum(q, k, "bnhd,bmhd->bhnm")   reads as   Transpose(q) · Transpose(Transpose(k))
"""

from __future__ import annotations

import onnx_ir as ir

Perm = tuple[int, ...]


def product_perms(node: ir.Node, meaning: str) -> tuple[Perm, Perm, Perm] | None:
    """How to transpose both operands and the result of an Einsum, so that it is the meaning.

    Args:
        meaning: in the same form, of rank 4; of rank 3 without its ``h``.
    """
    terms = _terms(node.attributes.get_string("equation", "") or "")
    wanted = _terms(meaning)
    if len(terms) != 3 or any(len(set(t)) != len(t) or not t.isalpha() for t in terms):
        return None
    if len(terms[0]) == 3:
        wanted = [w.replace("h", "") for w in wanted]
    if [len(t) for t in terms] != [len(w) for w in wanted]:
        return None
    letters = _letters(terms, wanted)
    if letters is None:
        return None
    first, second, result = (tuple(t.index(letters[w]) for w in ws) for t, ws in zip(terms, wanted, strict=True))
    return first, second, result


def _terms(equation: str) -> list[str]:
    return equation.replace(" ", "").replace("->", ",").split(",")


def _letters(terms: list[str], wanted: list[str]) -> dict[str, str] | None:
    """Which letter stands for which of the meaning's: in which terms a letter is says what it is for."""
    letters: dict[str, str] = {}
    for letter in dict.fromkeys(terms[0] + terms[1]):
        use = [letter in term for term in terms]
        free = [w for w in dict.fromkeys("".join(wanted)) if w not in letters and use == [w in term for term in wanted]]
        if not free:
            return None
        letters[free[0]] = letter
    return letters
